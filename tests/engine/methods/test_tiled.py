"""Whole images in tiles: methods take these for images, and what they say of them is put together."""

import json
import shutil
import tracemalloc
import types
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import save_pictures
from PIL import Image
from runs import record, scores_and_maps

from zsad.engine.commands.infer import main
from zsad.engine.methods.tiled import TiledTogether, TileStore, together
from zsad.engine.results.category import CategoryWriter
from zsad.engine.scores.known_good import Calibration

TILE = ("--tile", "70", "--overlap", "14")  # of five patches each way, as many as the tiny network's input has
WIDE = 182  # pixels: tiles begin at 0, 56 and 112


@pytest.fixture(autouse=True)
def _workplace(workplace: None) -> None:
    """Every test here runs in a folder of its own."""


@pytest.fixture
def run(tiny: Path) -> Callable[..., int]:
    config = str(tiny / "config.toml")
    return lambda *arguments: main(["data", *map(str, arguments), "--config", config, "--device", "cpu", "-q"])


def texture(number: int, size: tuple[int, int] = (WIDE, WIDE)) -> NDArray[np.uint8]:
    """Noise that is everywhere alike."""
    return np.random.default_rng(number).normal(128, 12, (*size, 3)).clip(0, 255).astype(np.uint8)


def planted(image: NDArray[np.uint8], y: int, x: int) -> NDArray[np.uint8]:
    """Return an image with a defect of 14 × 14 pixels."""
    found = image.copy()
    found[y : y + 14, x : x + 14] = (255, 0, 0)
    return found


def raw_scores(output: str) -> list[float]:
    found = json.loads((Path(output) / "data" / "category.json").read_text())["images"]
    return [image["raw_score"] for image in sorted(found, key=lambda image: image["path"])]


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["aligned", "pooled"])
def test_seams_do_not_show(run: Callable[..., int], batches: str) -> None:
    cell = np.random.default_rng(0).normal(128, 25, (14, 14, 3))
    alike = [(np.tile(cell, (13, 13, 1)) + 4 * number).clip(0, 255).astype(np.uint8) for number in range(6)]
    save_pictures("data", *alike[:5], planted(alike[5], 70, 28))
    assert run(*TILE, "--tile-batches", batches) == 0
    scores, maps = scores_and_maps("out")
    assert scores.argmax() == 5
    for values in maps[:5]:  # 1 is what the defect comes to
        assert max(np.abs(np.diff(values, axis=axis)).max() for axis in (0, 1)) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["aligned", "pooled"])
def test_a_defect_is_found_on_a_seam_as_well_as_inside(run: Callable[..., int], batches: str) -> None:
    places = (28, 28), (56, 56), (112, 28), (84, 112), (168, 168)  # inside, on seams and their crossing, in a corner
    images = [texture(number) for number in range(10)]
    save_pictures("data", *(planted(image, *place) for image, place in zip(images, places, strict=False)), *images[5:])
    assert run(*TILE, "--tile-batches", batches) == 0
    raw, (_, maps) = np.array(raw_scores("out")), scores_and_maps("out")
    assert raw[:5].min() > 1.4 * raw[5:].max()
    assert raw[1:5].min() > 0.9 * raw[0]
    for values, place in zip(maps, places, strict=False):
        found = np.unravel_index(int(values.argmax()), values.shape)
        assert np.abs(np.subtract(found, place) - 7).max() <= 14  # a patch


@pytest.mark.slow
def test_images_of_all_kinds(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [(WIDE, WIDE), (30, 40), (200, 90), (71, 70), (100, 300)]
    save_pictures("data", *(texture(number, size) for number, size in enumerate(sizes)))
    Image.fromarray(texture(8)[:, :, 0]).save("data/5.png")
    Image.fromarray(texture(9)[:, :, 0].astype(np.uint16) * 16).save("data/6.png")  # of a camera with 12 bits
    Path("data/7.png").write_bytes(b"none")
    assert run(*TILE) == 1
    assert "7.png: skipped" in capsys.readouterr().err
    _, maps = scores_and_maps("out")
    assert [values.shape for values in maps] == [*sizes, (WIDE, WIDE), (WIDE, WIDE)]
    assert run(*TILE, "--tile-batches", "aligned") == 2
    assert "from 40 × 30 to 90 × 200 pixels" in capsys.readouterr().err
    assert run("--tiles", "2x1", "--tile-batches", "aligned", "--group-size", 3) == 1


@pytest.mark.slow
def test_a_single_image_and_known_good_ones(run: Callable[..., int]) -> None:
    save_pictures("good", *(texture(number) for number in range(4)))
    save_pictures("data", planted(texture(9), 56, 56))
    for batches in ("aligned", "pooled"):
        assert run(*TILE, "--reference", "good", "--tile-batches", batches) == 0
        (score,), (values,) = scores_and_maps("out")
        assert score > 0.7
        assert values[63, 63] > 0.9
        assert np.median(values) < 0.5
        category = record("out")["categories"]["data"]
        assert category["bounds"]["rule"] == "the most unusual of 4 known-good images" or batches == "pooled"


@pytest.mark.slow
def test_methods_that_judge_every_image_by_itself(
    infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_pictures("data", texture(0), planted(texture(1), 56, 56))
    assert infer("winclip", "data", "--tile", "96", "--object", "part", "-q") == 0
    scores, maps = scores_and_maps("out")
    assert scores == pytest.approx([values.max() for values in maps], abs=1e-6)
    whole = record("out")["config"]["tiling"]
    assert (whole["tile"], whole["overlap"]) == (96, None)
    save_pictures("one", planted(texture(1), 56, 56))
    assert infer("winclip", "one", "--tile", "96", "--object", "part", "-q") == 0
    assert scores_and_maps("out", "one")[0] == pytest.approx(scores[1:])


@pytest.mark.slow
def test_a_bank_of_tiles(run: Callable[..., int], tiny: Path) -> None:
    sizes = [(WIDE, WIDE), (70, 200), (60, 90), (100, 100), (WIDE, 90)]
    save_pictures("good", *(texture(number, sizes[number % 5]) for number in range(10)))
    Path("good/broken.png").write_bytes(b"none")
    config = ("--config", str(tiny / "config.toml"))
    assert main(["--reference", "good", "--save-bank", "part.zsad", *TILE, *config, "-q"]) == 1
    save_pictures("data", texture(20), planted(texture(21), 56, 112), texture(22, (90, 130)))
    assert main(["data", "--bank", "part.zsad", "--false-alarms", "0.1", "-q"]) == 0
    scores, maps = scores_and_maps("out")
    category = json.loads(Path("out/data/category.json").read_text())
    assert category["images"][1]["verdict"] == "reject"
    assert category["images"][1]["p_value"] == pytest.approx(1 / 11)
    assert category["bounds"]["rule"] == "at most 10 % of good images are rejected"
    assert scores[1] > 0.5 > min(scores[0], scores[2])
    assert np.abs(np.subtract(np.unravel_index(int(maps[1].argmax()), maps[1].shape), (63, 119))).max() <= 14
    save_pictures("one", planted(texture(21), 56, 112))
    assert main(["one", "--bank", "part.zsad", *TILE, "-q"]) == 0
    (score,), (alone,) = scores_and_maps("out", "one")
    assert (score, alone.tobytes()) == (scores[1], maps[1].tobytes())
    assert run(*TILE, "--save-bank", "of_half.zsad", "--output", "half") == 0  # of images that were scored


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["finish", "write"])
def test_groups_of_images_in_tiles_are_gone_on_from(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save_pictures("good", *(texture(number) for number in range(30, 34)))
    save_pictures(
        "data", *(texture(number, (WIDE, WIDE - 40 * (number % 2))) for number in range(5)), planted(texture(5), 9, 9)
    )
    options = (*TILE, "--group-size", "3", "--reference", "good")
    assert run(*options, "--output", "whole") == 0
    with monkeypatch.context() as patch:
        where = TiledTogether if moment == "finish" else CategoryWriter
        usual, calls = getattr(where, moment), list[object]()

        def dying(*arguments: Any) -> Any:
            calls.append(arguments)
            if moment == "write" or len(calls) > 1:
                raise KeyboardInterrupt
            return usual(*arguments)

        patch.setattr(where, moment, dying)
        assert run(*options) == 130
    taken: list[int] = []
    finish = TiledTogether.finish

    def counted(self: TiledTogether, *arguments: Any) -> Any:
        taken.append(self._group.number)
        return finish(self, *arguments)

    monkeypatch.setattr(TiledTogether, "finish", counted)
    assert run(*options, "--resume") == 0
    assert taken == ([1] if moment == "finish" else [])
    for one in Path("whole/data").rglob("*"):
        if one.is_file() and one.name != "category.json":
            assert one.read_bytes() == (Path("out/data") / one.relative_to("whole/data")).read_bytes(), one
    found, wanted = (record(out)["categories"]["data"] for out in ("out", "whole"))
    assert {**found, "seconds": 0} == {**wanted, "seconds": 0}
    assert not list(Path("out").glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tile", "10"), "--tile must be a number of pixels from 32, not 10"),
        (("--tile", "70", "--overlap", "36"), "--overlap must be at most half of --tile, 35 pixels, not 36"),
        (("--tile", "70", "--tiles", "2x2"), "leave out one of them"),
        (("--tiles", "2x2", "--scale", "0.5"), "--scale: --tiles cuts every image into as many"),
        (("--tiles", "2"), "must be columns and rows, 4x3 say, not '2'"),
        (("--overlap", "8"), "give --tile or --tiles too"),
        (("--tile", "70", "--tile-batches", "all"), "--tile-batches must be"),
        (("--tile", "70", "--save-bank", "p.zsad", "--tile-batches", "aligned"), "tiles of all places together"),
    ],
)
def test_what_cannot_be_done(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    save_pictures("data", texture(0), texture(1))
    try:
        code: Any = run(*options)
    except SystemExit as end:  # of options that cannot be read
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_memory_that_all_tiles_together_do_not_fit_in(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_pictures("data", *(texture(number, (WIDE, WIDE + 300 * number)) for number in range(4)))
    assert run(*TILE, "--memory-limit", "50KB") == 2
    assert "scoring 138 tiles together needs" in capsys.readouterr().err


def test_a_disk_that_tiles_do_not_fit_on(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures("data", texture(0), texture(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=2 * 9 * 3 * 70 * 70 - 1))
    assert run(*TILE) == 2
    assert "the tiles of 2 images take 0.0 GB for a while" in capsys.readouterr().err


def test_tiles_that_wait_are_not_in_memory() -> None:
    tile = texture(0, (120, 120))
    tracemalloc.start()
    with closing(TileStore()) as store:
        for number in range(100):  # 4.3 MB
            store.add(np.roll(tile, number, axis=1))
        assert tracemalloc.get_traced_memory()[1] < 2**20
        np.testing.assert_array_equal(store.read(73), np.roll(tile, 73, axis=1))
    tracemalloc.stop()


def test_what_is_half_of_the_way_for_whole_images() -> None:
    copies, one, other = Calibration.unlike(0.7), Calibration(0.3, 0.1, 0.4, 5), Calibration(0.5, 0.2, 0.3, 5)
    assert together([]) is None
    assert together([copies, copies]) == Calibration(copies.highest, 0.0, copies.highest, 0)
    assert together([one, copies, other]) == Calibration(0.4, 0.1, 0.4, 5)
