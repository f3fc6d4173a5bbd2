"""Runs whose image size follows from the images: one size for each category, whatever the others are."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import record

from zsad.engine import plan as plans
from zsad.engine import workplace as workplaces
from zsad.engine.commands.infer import main
from zsad.engine.config import load_config
from zsad.engine.images import survey
from zsad.engine.images.folders import scan
from zsad.engine.methods.method import method_class
from zsad.engine.plan import by_size, plan, said_sides
from zsad.engine.workplace import Options

SMALL, LARGE = 76, 103  # pixels, taken at 70 and 98


@pytest.fixture(autouse=True)
def _workplace(workplace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here runs the tiny network in a folder of its own, on images smaller than a real one takes."""
    monkeypatch.setattr(survey, "SMALLEST", 70)


@pytest.fixture
def auto(tiny: Path, tmp_path: Path) -> Path:
    """The configuration of the tiny network, with sizes that follow from the images."""
    text = (tiny / "config.toml").read_text()
    assert "image_size = 70" in text
    (tmp_path / "auto.toml").write_text(text.replace("image_size = 70", 'image_size = "auto"'))
    return tmp_path / "auto.toml"


@pytest.fixture
def infer(auto: Path) -> Callable[..., int]:
    return lambda *arguments: main([*map(str, arguments), "--config", str(auto)])


def draw(folder: str, side: int, count: int = 3) -> Path:
    """Alike images, wider than high."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    base = np.random.default_rng(0).integers(40, 200, (6, 8, 3)).astype(np.uint8)
    for number in range(count):
        picture = np.asarray(Image.fromarray(base).resize((side + 20, side), Image.Resampling.BICUBIC)).astype(float)
        noise = np.random.default_rng([side, number]).normal(0, 6, picture.shape)
        Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8)).save(f"{folder}/{number:02d}.png")
    return Path(folder)


def files(category: Path) -> dict[str, bytes]:
    """What is written of a category, but for its record, which has times."""
    return {
        str(path.relative_to(category)): path.read_bytes()
        for path in category.rglob("*")
        if path.is_file() and path.name != "category.json"
    }


def sizes(output: str) -> dict[str, int]:
    return {name: category["image_sizes"]["dinov2"] for name, category in record(output)["categories"].items()}


@pytest.mark.slow
def test_categories_of_two_sizes_equal_runs_of_each_alone(
    infer: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, side in (("a", SMALL), ("b", LARGE), ("c", SMALL)):
        draw(f"data/{name}", side)
    alive: list[Any] = []
    set_up = workplaces.set_up

    def noted(*arguments: Any) -> Any:
        assert all(earlier() is None for earlier in alive)  # networks of one size at a time
        made = set_up(*arguments)
        alive.append(weakref.ref(made))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(workplaces, "set_up", noted)
        assert infer("data", "--output", "together") == 0
    assert len(alive) == 3  # those of the first size are there when the work begins, and serve both of its categories
    said = capsys.readouterr().err
    assert "a: images are taken at 70 px, since the median of their shorter sides is 76" in said
    assert "b: images are taken at 98 px" in said
    assert sizes("together") == {"a": 70, "b": 98, "c": 70}
    run = record("together")
    assert (run["config"]["image_size"], run["config"]["networks"]["dinov2"]["image_size"]) == ("auto", "auto")
    assert json.loads(Path("together/b/category.json").read_text())["image_sizes"] == {"dinov2": 98}
    for name, size in (("a", "70"), ("b", "98")):
        assert infer(f"data/{name}", "--output", name, "--image-size", size) == 0
        assert files(Path(name) / name) == files(Path("together") / name)
    assert record("a")["config"]["image_size"] == 70


@pytest.mark.slow
def test_what_is_finished_is_kept_while_its_size_is_the_same(
    infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    draw("data/a", SMALL)
    draw("data/b", LARGE)
    assert infer("data") == 0
    capsys.readouterr()
    draw("data/c", SMALL)  # changes no other category
    assert infer("data", "--resume") == 0
    said = capsys.readouterr().err
    assert "a: already finished" in said
    assert "b: already finished" in said
    assert sizes("out") == {"a": 70, "b": 98, "c": 70}
    assert infer("data", "--resume", "--image-size", "98") == 0
    said = capsys.readouterr().err
    assert "b: already finished" in said
    assert "a: scored again, since it was finished with other settings (image_size, networks.dinov2.image_size)" in said


@pytest.mark.slow
def test_a_category_without_a_readable_image_costs_the_others_nothing(
    infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    draw("data/a", 0x60, 1)
    Path("data/a/00.png").write_bytes(b"no image")
    draw("data/b", LARGE)
    (Path("data/b") / "99.png").write_bytes(b"")
    draw("data/c", SMALL, 1)
    assert infer("data") == 1
    said = capsys.readouterr().err
    assert "a: fewer than two readable images" in said
    assert "c: fewer than two readable images" in said
    assert "b/99.png: skipped: empty file" in said
    assert record("out")["images"] == 3
    assert not list(Path("cache").glob("models/*-518-*"))


def test_mixed_sizes_are_noted(infer: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    draw("data", SMALL, 2)
    Image.new("RGB", (130, 120)).save("data/99.png")
    assert infer("data") == 0
    note = "data: images of mixed sizes: most have shorter sides of 76 to 120 pixels, and all are taken at 70 px"
    assert note in capsys.readouterr().err
    assert any(said.startswith(note) for said in record("out")["notes"])


def test_memory_is_checked_for_every_size_before_any_work(
    infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    draw("data/a", SMALL)
    draw("data/b", LARGE, 4)
    assert infer("data", "--memory-limit", "8KB") == 2
    assert "b: scoring 4 images together needs at least" in capsys.readouterr().err
    assert not Path("out/a").exists()


def test_files_of_16_bits_are_looked_for_only_where_a_header_has_them(
    infer: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw("data", SMALL, 2)
    with monkeypatch.context() as patch:
        patch.setattr("zsad.engine.category_pass.batch_bit_depth", None)
        assert infer("data") == 0
    Image.fromarray(np.full((SMALL, SMALL), 1000, np.uint16)).save("data/deep.png")
    assert infer("data") == 0
    assert "taken as 10 bits" in capsys.readouterr().err


def test_networks_with_other_patches_get_sizes_of_their_own(
    two_networks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, side in (("a", 300), ("b", 500), ("c", 310)):
        draw(f"data/{name}", side, 1)
    monkeypatch.setattr(
        plans, "patch_sizes", lambda config: {name: {"dinov2": 14, "clip": 16}[name] for name in config.unsized}
    )
    two_networks.write_text(two_networks.read_text().replace("image_size = 70", 'image_size = "auto"'))
    categories = scan(Path("data")).categories

    def planned(overrides: dict[str, Any]) -> list[Any]:
        config = load_config("challenge", two_networks, overrides, method_of=method_class)
        return plan(categories, config, Options(tmp_path / "out"), lambda *_: None, {})

    jobs = planned({})
    assert [dict(job.sides) for job in jobs] == [
        {"dinov2": 294, "clip": 288},
        {"dinov2": 490, "clip": 496},
        {"dinov2": 308, "clip": 304},
    ]
    assert [[job.category.name for job in group] for group in by_size(jobs)] == [["a"], ["b"], ["c"]]
    assert said_sides(jobs[0].sides) == "294 px (dinov2), 288 px (clip)"
    sized = jobs[0].config.sized(jobs[0].sides)
    assert (sized.image_size, sized.networks["clip"].side) == (294, 288)
    assert {spec.image_size for spec in jobs[0].config.networks.values()} == {"auto"}
    two_networks.write_text(two_networks.read_text().replace("[networks.clip]", "[networks.clip]\nimage_size = 96"))
    assert dict(planned({})[0].sides) == {"dinov2": 294}
    assert [dict(job.sides) for job in planned({"image_size": 84})] == [{}] * 3
    assert [[job.category.name for job in group] for group in by_size(planned({"image_size": 84}))] == [["a", "b", "c"]]
