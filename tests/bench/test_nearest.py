"""The benchmark of nearest neighbours, small: what it checks, runs and records."""

import json
from pathlib import Path

import numpy as np
import pytest

from zsad.bench import nearest as benchmark
from zsad.kernels.nearest import Nearest

SMALL = ["--queries", "20", "--bank", "600", "--channels", "24", "--neighbours", "3", "--repeats", "2"]


@pytest.fixture(autouse=True)
def small_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CHECKED_BANK", 700)


def test_every_variant_is_checked_and_timed(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert benchmark.main([*SMALL, "--output", str(output)]) == 0
    (record,) = map(json.loads, output.read_text("utf-8").splitlines())
    assert [record[name] for name in ("queries", "bank", "channels", "neighbours")] == [20, 600, 24, 3]
    assert {"zsad", "streamed", "floor"} <= set(record["milliseconds"])
    assert set(record["times_the_product"]) == set(record["milliseconds"]) == {*record["largest_deviation"], "floor"}
    assert all(len(times) == 2 for times in record["milliseconds"].values())


def test_refcheck_times_nothing(tmp_path: Path) -> None:
    assert benchmark.main([*SMALL, "--refcheck", "--output", str(tmp_path / "out.jsonl")]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["cosines", "indices"])
def test_neighbours_that_are_wrong_are_not_timed(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Nearest.search

    def off(self: Nearest, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosines, indices = search(self, queries)
        return (cosines - 1e-4, indices) if wrong == "cosines" else (cosines, indices + (np.arange(3) == 2))

    monkeypatch.setattr(Nearest, "search", off)
    with pytest.raises(SystemExit, match="nothing was timed"):
        benchmark.main([*SMALL, "--output", str(tmp_path / "out.jsonl")])
    assert not list(tmp_path.iterdir())
