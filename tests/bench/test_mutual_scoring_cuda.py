"""The benchmark of mutual scoring on a device, small and on the host: what it checks, runs and records."""

from __future__ import annotations

import json
from pathlib import Path

import host_build
import pytest
from host_build import HostDevice

from zsad.bench import mutual_scoring_cuda as benchmark

pytestmark = pytest.mark.skipif(host_build.COMPILER is None, reason=host_build.MISSING_COMPILER)

# With fewer channels the int8 winners stray by more than the benchmark, which is for networks, accepts.
SMALL = ["--images", "3", "--layers", "2", "--side", "4", "--channels", "384", "--degrees", "1,3", "--repeats", "1"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    device = HostDevice()
    monkeypatch.setattr(benchmark, "open_device", lambda name: device)
    monkeypatch.setattr(benchmark, "PEAK_SIDE", 64)
    monkeypatch.setattr(benchmark, "by_pairs", lambda *shape: {})  # they run on a GPU only
    return device


@pytest.mark.long
def test_every_variant_is_checked_and_timed(device: HostDevice, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert benchmark.main([*SMALL, "--pairs", "1", "--unrecorded", "--output", str(output)]) == 0
    (record,) = map(json.loads, output.read_text("utf-8").splitlines())
    zsad = [f"{name}{pairs}" for name in benchmark.VARIANTS for pairs in ("", ", 1 pairs", ", launch by launch")]
    assert set(record["ms_per_pair_and_layer"]) == {"floor", *zsad}
    assert all(len(times) == 1 for times in record["ms_per_pair_and_layer"].values())
    assert set(record["stages_s"]) == set(zsad)
    assert set(record["largest_deviation"]) == set(benchmark.VARIANTS)
    assert record["peak_flops"] > 0


@pytest.mark.long
def test_scores_that_are_off_are_not_timed(device: HostDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variant, (options, _) in benchmark.VARIANTS.items():
        monkeypatch.setitem(benchmark.VARIANTS, variant, (options, 0.0))
        with pytest.raises(SystemExit, match=f"{variant} deviates by more than 0e.00: nothing was timed"):
            benchmark.main([*SMALL, "--output", str(tmp_path / "out.jsonl")])
        monkeypatch.undo()
        monkeypatch.setattr(benchmark, "open_device", lambda name: device)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_refcheck_times_nothing(device: HostDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([*SMALL, "--refcheck", "--output", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().out.count("largest deviation from float64") == len(benchmark.VARIANTS)
    assert benchmark.main([*SMALL, "--refcheck", "--products", "tiled,gram"]) == 0
    checked = [line.split(" largest")[0] for line in capsys.readouterr().out.splitlines() if "largest" in line]
    assert [line.split(":")[1].strip() for line in checked] == ["zsad tiled", "zsad"]
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL, "--products", "whole"])
    assert "'whole' is none of gram, fused, tiled, int8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
