"""The benchmark of growth, with few small images: what it fits, and what its table says."""

import json
from pathlib import Path

import pytest

from zsad.bench import growth, tables


def test_the_power_that_fits() -> None:
    assert growth.exponent({str(n): 1e-5 * n**1.5 for n in (50, 100, 400)}) == pytest.approx(1.5)
    assert growth.exponent({"50": 0, "100": 0}) == 0  # nothing was added
    assert growth.exponent({"50": 0, "100": 3, "200": 6, "400": 12}) == pytest.approx(1)


@pytest.mark.slow
def test_three_ways_over_ever_more_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "growth.jsonl"
    shape = ["--side", "4", "--channels", "16", "--group-size", "4", "--bank", "50"]
    assert growth.main(["--counts", "4", "8", "16", *shape, "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert list(record["seconds"]) == ["one batch", "groups of 4", "a bank of 50 patches"]
    assert all(list(series) == ["4", "8", "16"] for series in record["seconds"].values())
    monkeypatch.setattr(tables, "read", lambda _: [record])
    lines = tables.growth_table().splitlines()
    assert lines[4].startswith("| 4 | ")
    assert [line.count("|") for line in lines[2:]] == [8] * 6
    assert lines[-1].count("N^") == 6
