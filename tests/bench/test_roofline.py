"""The model of mutual scoring's launches, beside the bound and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zsad.bench.roofline import GPUS, MODELLED, model_pair, model_pairs

RTX_4090, H200 = GPUS


def measured(gpu: str, milliseconds: float, **changes: Any) -> dict[str, Any]:
    of = {"gpu": gpu, "patches": 1369, "channels": 1024, "degrees": [1, 3, 5], **changes}
    return {**of, "ms_per_pair_and_layer": {"zsad": [1.0, milliseconds, milliseconds]}}


def test_the_model_is_the_desk_check_s() -> None:
    pair = model_pair(RTX_4090, 1024, (1, 3, 5), [])
    assert pair.bound == pytest.approx(23.2e-6, rel=0.01)
    assert 25.5e-6 <= pair.product <= 29e-6  # three whole waves
    assert 6e-6 <= pair.pass_ <= 11e-6
    assert 0.60 <= pair.peak_share <= 0.72
    assert pair.measured is None
    assert model_pair(RTX_4090, 1024, (1, 3), []).pass_ < pair.pass_ / 2
    on_hopper = model_pair(H200, 1024, (1, 3, 5), [])
    assert on_hopper.pass_ > on_hopper.product  # the pass is the limit there
    assert on_hopper.peak_share < 0.3


def test_what_was_measured_on_the_same_gpu_stands_beside_it(tmp_path: Path) -> None:
    records = [
        measured("NVIDIA GeForce RTX 4090", 0.050),
        measured("NVIDIA GeForce RTX 4090", 0.040),
        measured("NVIDIA GeForce RTX 4090", 0.020, degrees=[1, 3]),
        measured("NVIDIA H200 NVL", 0.015, patches=256),
    ]
    (tmp_path / "mutual_scoring_cuda.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    found = {(pair.gpu, pair.channels, pair.degrees): pair.measured for pair in model_pairs(tmp_path)}
    assert found.pop(("RTX 4090", 1024, (1, 3, 5))) == pytest.approx(40e-6)
    assert found.pop(("RTX 4090", 1024, (1, 3))) == pytest.approx(20e-6)
    assert set(found.values()) == {None}
    assert len(model_pairs(tmp_path / "nowhere")) == len(GPUS) * len(MODELLED)
