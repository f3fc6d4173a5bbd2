"""The benchmark of mutual scoring on a CPU, with few small images."""

import json
from pathlib import Path

import pytest

from zsad.bench import mutual_scoring as benchmark


@pytest.mark.slow
def test_what_clean_references_add_is_a_stage_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.jsonl"
    shape = ["--images", "11", "--side", "4", "--channels", "16", "--repeats", "2"]
    assert benchmark.main(["--references", *shape, "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert {name: len(times) for name, times in record["seconds"].items()} == {
        "scoring": 2,
        "scoring, minima handed back": 2,
        "references": 2,
    }
    assert (record["images"], record["degrees"]) == (11, [1, 3])
    assert "clean references add" in capsys.readouterr().out


@pytest.mark.slow
def test_validating_times_nothing(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    shape = ["--images", "11", "--side", "4", "--channels", "16"]
    assert benchmark.main(["--references", "--refcheck", *shape, "--output", str(file)]) == 0
    assert not file.exists()


@pytest.mark.slow
def test_int8_has_its_own_product_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.jsonl"
    shape = ["--images", "3", "--side", "4", "--channels", "16", "--repeats", "2"]
    assert benchmark.main([*shape, "--output", str(file)]) == 0
    times = json.loads(file.read_text())["ms_per_pair_and_layer"]
    assert ("floor int8" in times) == ("zsad int8" in times)
    assert ("times its own product" in capsys.readouterr().out) == ("zsad int8" in times)


@pytest.mark.slow
def test_tokens_may_be_those_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "IMAGE_SIZE", 56)
    file = tmp_path / "found.jsonl"
    assert benchmark.main(["--preset", "small", "--images", "3", "--repeats", "1", "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert (record["preset"], record["patches"], record["channels"], record["degrees"]) == ("small", 16, 384, [1, 3])
