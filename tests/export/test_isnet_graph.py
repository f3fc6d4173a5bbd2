"""IS-Net's graph against what its class in PyTorch computed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from zsad.bench.random_weights import isnet_state, write_states
from zsad.export.agreement import run_graph, sample_batch
from zsad.export.isnet import read_isnet
from zsad.export.isnet_graph import build_isnet_graph
from zsad.export.onnx_export import export_onnx
from zsad.export.options import IsnetOptions
from zsad.export.state_dict import CheckpointError
from zsad.export.transformer_graph import TransformerGraph

Run = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
        onnx.checker.check_model(model, full_check=True)
        onnx.save_model(model, str(tmp_path / "isnet.onnx"))
        return run_graph(tmp_path / "isnet.onnx", {"images": images})["foreground"]

    return run


@pytest.mark.parametrize(("precision", "folded", "limit"), [("fp32", 1, 2e-6), ("fp32", 0, 2e-6), ("fp16", 1, 2e-3)])
def test_it_equals_the_reference(
    golden_segmentation: Path, run: Run, precision: str, folded: bool, limit: float
) -> None:
    arrays = np.load(golden_segmentation / "isnet_tiny.npz")
    isnet = read_isnet(golden_segmentation / "isnet_tiny.safetensors")
    model = build_isnet_graph(isnet, IsnetOptions(128, precision), folded=bool(folded))
    images = np.stack([arrays["network_input"], arrays["network_input"][:, ::-1]])
    found = run(model, images)
    assert found.shape == (2, 128, 128)
    np.testing.assert_allclose(found[0], arrays["side1"], atol=limit)
    assert np.abs(found[1] - found[0]).max() > 0.1
    np.testing.assert_allclose(run(model, images[1:]), found[1:], atol=limit)


def test_half_precision_is_in_all_convolutions_and_not_in_the_output(tmp_path: Path) -> None:
    model = build_isnet_graph(
        read_isnet(write_states(tmp_path / "isnet.safetensors", isnet_state(8))), IsnetOptions(64, "fp16")
    )
    assert {node.domain for node in model.graph.node} == {""}
    types = {value.name: value for value in onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info}
    of = {node.op_type: set() for node in model.graph.node}
    for node in model.graph.node:
        if node.output[0] in types:
            of[node.op_type].add(types[node.output[0]].type.tensor_type.elem_type)
    assert (of["Conv"], of["Sigmoid"]) == ({onnx.TensorProto.FLOAT16}, {onnx.TensorProto.FLOAT})
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 114  # of 119, less five side outputs
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "int8"}, "fp32 or fp16"),
        ({"precision": "fp8"}, "one of fp32, fp16, int8"),
        ({"image_size": 1000}, "use --image-size 1024"),
        ({"image_size": 20}, "use --image-size 64"),
        ({"image_size": 0}, "use --image-size 64"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    isnet = read_isnet(write_states(tmp_path / "isnet.safetensors", isnet_state(8)))
    with pytest.raises(CheckpointError, match=message):
        build_isnet_graph(isnet, replace(IsnetOptions(), **wrong))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "oracle"),
    [
        pytest.param("fp32", "graph", marks=pytest.mark.slow),
        pytest.param("fp16", "graph", marks=pytest.mark.slow),
        pytest.param("fp32", "torch", marks=pytest.mark.torch),
        pytest.param("fp16", "torch", marks=[pytest.mark.torch, pytest.mark.slow]),
    ],
)
def test_it_is_exported(empty_cache: Path, tmp_path: Path, precision: str, oracle: str) -> None:
    if oracle == "torch":
        pytest.importorskip("torch", reason="compares with PyTorch")
    checkpoint = str(write_states(tmp_path / "isnet.safetensors", isnet_state(8)))
    options = IsnetOptions(128, precision)
    model = export_onnx(checkpoint, options, oracle=oracle)
    assert model.agreement.startswith(f"{precision} against {'PyTorch' if oracle == 'torch' else 'the fp32 graph'}")
    assert "mean deviation" in model.agreement
    assert (model.inputs, model.preprocessing) == ({"images": (None, 3, 128, 128)}, "isnet")
    assert model.path.name.startswith("isnet-isnet-128-")
    assert not export_onnx(checkpoint, options).built
    facts = {entry.key: entry.value for entry in onnx.load(model.path).metadata_props}
    assert (facts["architecture"], facts["image_size"], facts["checkpoint_sha256"]) == ("isnet", "128", model.sha256)


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_not_written(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(self: TransformerGraph, x: str) -> str:
        return self.node("Add", [x, self.constant(np.float32(0.01), "shift")], x + ".shifted") if self.folded else x

    monkeypatch.setattr("zsad.export.isnet_graph._Graph.widen", shifted)
    with pytest.raises(CheckpointError, match=r"computes something else \(limit: mean deviation 0.0001\)"):
        export_onnx(str(write_states(tmp_path / "isnet.safetensors", isnet_state(8))), IsnetOptions(128))


@pytest.mark.long
def test_the_published_shape(empty_cache: Path, tmp_path: Path) -> None:
    """At 256 pixels, where it takes a sixteenth of the time."""
    checkpoint = str(write_states(tmp_path / "isnet.safetensors", isnet_state()))
    model = export_onnx(checkpoint, IsnetOptions(256, "fp16"))
    (foreground,) = run_graph(model.path, {"images": sample_batch(256)[:1]}).values()
    assert foreground.std() > 0.05
