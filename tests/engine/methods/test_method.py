"""What a method has to bring, shown by the cheapest one: it needs no change anywhere else."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

from zsad.engine.category_pass import CategoryJob
from zsad.engine.commands.infer import main
from zsad.engine.config import Config, ConfigError, load_config
from zsad.engine.images.decode import decode, network_input, recipe
from zsad.engine.images.folders import scan
from zsad.engine.methods import method as methods
from zsad.engine.results.records import CategoryRecord
from zsad.engine.workplace import Options
from zsad.export.agreement import run_graph
from zsad.export.onnx_export import export_onnx
from zsad.export.options import ExportOptions

WIDTH = 48


@pytest.fixture
def text_image(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of the method; text vectors and checkpoint are random."""
    monkeypatch.setenv("ZSAD_CACHE", str(tiny / "cache"))
    monkeypatch.setitem(methods.METHODS, "text_image", "text_image:TextImage")
    np.save(tmp_path / "texts.npy", np.random.default_rng(2).standard_normal((2, WIDTH)))
    (checkpoint,) = (line for line in (tiny / "config.toml").read_text().splitlines() if "checkpoint" in line)
    file = tmp_path / "text_image.toml"
    file.write_text(
        f'method = "text_image"\nimage_size = 70\nthreshold = 0.5\n[networks.dinov2]\n{checkpoint}\nheads = 3\n'
        f'taps = []\n[text_image]\nvectors = "{tmp_path / "texts.npy"}"\n'
    )
    return file


def expected(config: Config, image: Path) -> float:
    spec = config.networks["dinov2"]
    options = ExportOptions(taps=(1, 3), image_size=70, heads=3)
    graph = export_onnx(spec.checkpoint, options).path
    pixels = network_input(decode(image), recipe("imagenet", 70))
    vector = run_graph(graph, {"images": pixels[None]})["embedding"][0].astype(np.float64)
    texts = np.load(config.settings.vectors)  # type: ignore[attr-defined]
    cosines = texts @ vector / np.linalg.norm(texts, axis=1) / np.linalg.norm(vector)
    return float(1 / (1 + np.exp(100 * (cosines[0] - cosines[1]))))


@pytest.mark.slow
def test_a_second_method_needs_nothing_but_its_module(text_image: Path, tmp_path: Path) -> None:
    data = runs.draw(tmp_path / "data", 5)
    (data / "broken.png").write_bytes(b"none")
    assert main([str(data), "--config", str(text_image), "--output", str(tmp_path / "out")]) == 1
    record = CategoryRecord.from_json((tmp_path / "out/data/category.json").read_text())
    config = load_config("small", text_image, method_of=methods.method_class)
    assert [image.path for image in record.images] == [f"{n:02d}.png" for n in range(5)]
    for image in record.images:
        assert image.raw_score == pytest.approx(expected(config, data / image.path), abs=1e-5)
        assert image.score == image.raw_score  # probabilities stay what they are
        assert image.verdict == ("reject" if image.score > 0.5 else "accept")
        assert bool(image.regions) == (image.verdict == "reject")
    assert (record.scale, record.relative, len(record.failures)) == ((0.0, 1.0), False, 1)
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["method"] == "text_image"
    assert not any("relative" in note for note in run["notes"])


def test_one_image_is_enough_for_a_method_that_does_not_compare(text_image: Path, tmp_path: Path) -> None:
    data = runs.draw(tmp_path / "data", 1)
    assert main([str(data), "--config", str(text_image), "--output", str(tmp_path / "out")]) == 0


def test_images_are_written_as_they_come(text_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last image is read, the first one's map has long been written."""
    data = runs.draw(tmp_path / "data", 8)
    written = []
    original = decode

    def watched(path: Path, *arguments: Any) -> Any:
        if path.name == "07.png":
            written.extend((tmp_path / "out").rglob("*.tiff"))
        return original(path, *arguments)

    monkeypatch.setattr("zsad.engine.images.loader.decode", watched)
    arguments = [str(data), "--config", str(text_image), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    assert written


@pytest.mark.parametrize("damage", [None, "a torn line", "a lost map", "another setting", "another bound"])
def test_an_interrupted_run_goes_on_where_it_was(
    text_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None
) -> None:
    data = runs.draw(tmp_path / "data", 8)
    arguments = [str(data), "--config", str(text_image), "--workers", "1"]
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    read: list[str] = []
    stop = ["06.png"]
    original = decode

    def watched(path: Path, *rest: Any) -> Any:
        read.append(path.name)
        if path.name in stop:
            raise KeyboardInterrupt
        return original(path, *rest)

    monkeypatch.setattr("zsad.engine.images.loader.decode", watched)
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 130
    (partial,) = (tmp_path / "out").glob(".*.partial")
    journal = (partial / "journal.jsonl").read_text().splitlines()
    kept = len(journal) - 1
    assert 1 <= kept <= 6
    if damage == "a torn line":
        (partial / "journal.jsonl").write_text("\n".join(journal)[:-20])
    elif damage == "a lost map":
        next(partial.rglob("00.tiff")).unlink()
    read.clear()
    stop.clear()
    more = {"another bound": ["--threshold", "0.4"], "another setting": ["--max-megapixels", "9"]}.get(str(damage), [])
    assert main([*arguments, *more, "--output", str(tmp_path / "out"), "--resume"]) == 0
    redone = {None: 8 - kept, "another bound": 8 - kept, "another setting": 8}.get(damage, 9 - kept)
    assert len(read) == redone
    assert not list((tmp_path / "out").glob(".*"))
    for path in (tmp_path / "whole/data").rglob("*.*"):
        same = tmp_path / "out/data" / path.relative_to(tmp_path / "whole/data")
        if path.name not in ("category.json", "regions.csv", "scores.csv", "scored.jsonl") or not more:
            ignored = ("seconds", "fingerprint")
            if path.name == "category.json":
                one, two = (json.loads(file.read_text()) for file in (path, same))
                assert {k: v for k, v in one.items() if k not in ignored} == {
                    k: v for k, v in two.items() if k not in ignored
                }
            else:
                assert path.read_bytes() == same.read_bytes()


def test_a_category_job_and_its_record_can_travel(text_image: Path, tmp_path: Path) -> None:
    data = runs.draw(tmp_path / "data", 3)
    config = load_config("small", text_image, method_of=methods.method_class)
    job = CategoryJob(scan(data).categories[0], config, Options(tmp_path / "out"))
    assert pickle.loads(pickle.dumps(job)) == job
    main([str(data), "--config", str(text_image), "--output", str(tmp_path / "out")])
    record = CategoryRecord.from_json((tmp_path / "out/data/category.json").read_text())
    assert pickle.loads(pickle.dumps(record)) == record
    assert CategoryRecord.from_json(record.to_json()) == record


def test_settings_of_another_method_are_refused(text_image: Path) -> None:
    with pytest.raises(ConfigError, match="--degrees is nothing for preset small, whose method is text_image"):
        load_config("small", text_image, {"degrees": (1,)}, method_of=methods.method_class)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no method 'none'; choose one of musc"):
        methods.method_class("none")
