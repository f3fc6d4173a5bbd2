"""The benchmark of batches and threads on a tiny network: what it checks and records."""

import json
from pathlib import Path

import numpy as np
import pytest

from zsad.bench import batches, runtimes
from zsad.export.state_dict import CheckpointError


@pytest.mark.long
def test_every_way_is_checked_and_timed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tiny / "cache"))
    monkeypatch.setattr(batches, "PAUSE", 0.0)
    monkeypatch.setattr(runtimes, "CPU_PRECISIONS", {"onnxruntime": ("fp32",), "openvino": (), "native": ()})
    output = tmp_path / "out.jsonl"
    assert batches.main(["--config", str(tiny / "config.toml"), "--rounds", "2", "--output", str(output)]) == 0
    (record,) = map(json.loads, output.read_text("utf-8").splitlines())
    assert list(record["seconds"]) == ["ONNX Runtime fp32"]
    assert [len(times) for times in record["seconds"]["ONNX Runtime fp32"].values()] == 5 * [2]

    first = batches.Way("one thread", 1, lambda: [{"tokens": np.ones((1, 2, 3))}])
    other = batches.Way("batch 2", 2, lambda: [{"tokens": np.stack([np.ones((2, 3)), -np.ones((2, 3))])}])
    with pytest.raises(CheckpointError, match="a single image with one thread"):
        batches.check([first, other], "fp32")
