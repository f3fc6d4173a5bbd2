"""The steps of the published code against the float64 reference, and a small comparison of whole runs with them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zsad.bench import peers
from zsad.kernels import reference

pytestmark = pytest.mark.torch


def test_the_steps_are_those_of_the_reference() -> None:
    torch = pytest.importorskip("torch", reason="the published steps are in PyTorch")
    tokens = np.random.default_rng(0).normal(size=(6, 2, 25, 12)).astype(np.float32)
    published = object.__new__(peers.Published)
    published._torch, published._settings = torch, SimpleNamespace(degrees=(1, 3), interval=(0.0, 0.3))  # type: ignore[assignment]
    found = np.mean([published._of_degree(torch.from_numpy(tokens), degree).numpy() for degree in (1, 3)], axis=0)
    expected = reference.mutual_scores(tokens, (5, 5), (1, 3), (0.0, 0.3))
    np.testing.assert_allclose(found, expected, atol=2e-3)  # `cdist` takes a difference of squares


@pytest.mark.long
def test_whole_runs_are_compared(
    random_dinov2: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the published steps are in PyTorch")
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "cache"))
    weights, output = str(random_dinov2(width=64, depth=12)), tmp_path / "out.jsonl"

    def tiny(config: Any, folder: Path) -> tuple[Any, dict[str, str]]:
        specs = {name: spec.model_copy(update={"checkpoint": weights}) for name, spec in config.networks.items()}
        return config.model_copy(update={"networks": specs}), {"dinov2": "tiny"}

    monkeypatch.setattr(peers, "use_random_weights", tiny)
    monkeypatch.setattr(peers, "PAUSE", 0.0)
    arguments = ["--images", "6", "--image-size", "70", "--repeats", "2", "--output", str(output)]
    assert peers.main(arguments) == 0
    record = json.loads(output.read_text("utf-8"))
    assert {name: len(times) for name, times in record["seconds"].items()} == {
        "reference": 2,
        "zsad": 2,
        "zsad int8": 2,
    }
    assert record["correlation"]["zsad"] > peers.LEAST_CORRELATION["zsad"]
    monkeypatch.setattr(peers, "correlation", lambda *_: 0.9)
    with pytest.raises(SystemExit, match="nothing was timed"):
        peers.main(arguments)
