"""CLIPSeg's graphs against what transformers computed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from zsad.export.agreement import run_graph
from zsad.export.builders import read_builder
from zsad.export.options import ATTENTIONS, ClipSegDecoderOptions, ClipSegImageOptions, GraphOptions, TextOptions

RELATIVE = {"fp32": 5e-6, "fp16": 3e-3}
IMAGE = ClipSegImageOptions(image_size=96, heads=3)
DECODER = ClipSegDecoderOptions(image_size=96, width=48, dimension=24)
TEXT = TextOptions("quick_gelu", heads=2, context=16)

Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def checkpoint(golden: Path) -> Path:
    return golden / "segmentation" / "clipseg_tiny.safetensors"


@pytest.fixture(scope="module")
def arrays(golden: Path) -> Mapping[str, np.ndarray]:
    return dict(np.load(golden / "segmentation" / "clipseg_tiny.npz"))


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Run:
    """Builds a graph and returns the one output that it has."""

    def run(options: GraphOptions, **inputs: np.ndarray) -> np.ndarray:
        model = read_builder(checkpoint, options).build((), {})
        onnx.checker.check_model(model, full_check=True)
        onnx.save_model(model, str(tmp_path / "graph.onnx"))
        [output] = run_graph(tmp_path / "graph.onnx", inputs).values()
        return output

    return run


def all_close(found: np.ndarray, expected: np.ndarray, precision: str) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE[precision] * np.abs(expected).max())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_all_three_graphs_equal_transformers(
    run: Run, arrays: Mapping[str, np.ndarray], precision: str, attention: str
) -> None:
    form = {"precision": precision, "attention": attention}
    activations = run(replace(IMAGE, **form), images=arrays["pixel_values"])
    all_close(activations, arrays["activations"], precision)
    conditions = run(replace(TEXT, **form), ids=arrays["input_ids"].astype(np.int32))
    all_close(conditions, arrays["conditional_embeddings"], precision)
    for given, expected in zip(activations, arrays["logits"], strict=True):
        found = run(replace(DECODER, **form), activations=given, conditions=conditions)
        all_close(found, expected, precision)
        if precision == "fp32":
            np.testing.assert_allclose(found, expected, atol=1e-4)
