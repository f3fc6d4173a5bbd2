"""CLIPSeg's graphs against what transformers computed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from clipseg_checkpoints import openai_image_tower, original_decoder
from safetensors.numpy import load_file, save_file

from zsad.export.agreement import run_graph
from zsad.export.builders import read_builder
from zsad.export.onnx_export import export_onnx
from zsad.export.options import ATTENTIONS, ClipSegDecoderOptions, ClipSegImageOptions, GraphOptions, TextOptions
from zsad.export.state_dict import CheckpointError
from zsad.export.transformer_graph import TransformerGraph

RELATIVE = {"fp32": 5e-6, "fp16": 3e-3}
IMAGE = ClipSegImageOptions(image_size=96, heads=3)
DECODER = ClipSegDecoderOptions(image_size=96)
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
    """Builds a graph, of the tiny checkpoint unless another is named, and returns the one output that it has."""

    def run(options: GraphOptions, path: Path = checkpoint, **inputs: np.ndarray) -> np.ndarray:
        model = read_builder(path, options).build((), {})
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


def test_positions_are_resized_as_they_are_there(checkpoint: Path, arrays: Mapping[str, np.ndarray]) -> None:
    builder = read_builder(checkpoint, IMAGE)
    initializers = {tensor.name: tensor for tensor in builder.build((), {}).graph.initializer}
    positions = onnx.numpy_helper.to_array(initializers["positions"])[0]
    expected = arrays["position_table"]
    np.testing.assert_allclose(positions[1:], expected[1:], atol=1e-6)
    np.testing.assert_allclose(positions[0], expected[0] + builder.weights.class_token, atol=1e-6)


def test_blocks_that_the_decoder_does_not_see_are_left_out(checkpoint: Path) -> None:
    names = {tensor.name for tensor in read_builder(checkpoint, IMAGE).build((), {}).graph.initializer}
    assert "block9.fc2.weight" in names
    assert not any(name.startswith(("block10.", "block11.", "class")) for name in names)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_prompts_do_not_see_each_other(run: Run, arrays: Mapping[str, np.ndarray], attention: str) -> None:
    options, conditions = replace(DECODER, attention=attention), arrays["conditional_embeddings"]
    together = run(options, activations=arrays["activations"][0], conditions=conditions)
    alone = run(options, activations=arrays["activations"][0], conditions=conditions[2:3])
    np.testing.assert_allclose(alone, together[2:3], atol=1e-5)


def test_the_decoder_sees_all_three_blocks_and_the_class_token(run: Run, arrays: Mapping[str, np.ndarray]) -> None:
    given, conditions = arrays["activations"][0], arrays["conditional_embeddings"]
    expected = arrays["logits"][0]
    for change in (given[::-1], np.concatenate([np.zeros_like(given[:, :1]), given[:, 1:]], axis=1)):
        found = run(DECODER, activations=np.ascontiguousarray(change), conditions=conditions)
        assert np.abs(found - expected).max() > 0.01


@pytest.mark.parametrize("oracle", ["graph", pytest.param("torch", marks=pytest.mark.torch)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("options", [IMAGE, DECODER])
def test_graphs_are_exported(
    checkpoint: Path, empty_cache: Path, options: GraphOptions, precision: str, oracle: Literal["graph", "torch"]
) -> None:
    if oracle == "torch":
        pytest.importorskip("torch", reason="compares with PyTorch")
    options = replace(options, precision=precision)
    model = export_onnx(str(checkpoint), options, oracle=oracle)
    assert model.agreement.startswith(f"{precision} against {'PyTorch' if oracle == 'torch' else 'the fp32 graph'}")
    assert model.preprocessing == "imagenet"
    assert model.path.name.startswith(f"clipseg_tiny-{options.label}-")
    assert not export_onnx(str(checkpoint), options).built
    facts = {entry.key: entry.value for entry in onnx.load(model.path).metadata_props}
    assert facts["architecture"] == options.kind.replace("_", "-")
    assert (facts["image_size"], facts["checkpoint_sha256"]) == ("96", model.sha256)


@pytest.mark.parametrize("options", [IMAGE, DECODER])
def test_a_graph_that_computes_something_else_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: GraphOptions
) -> None:
    def scaled(self: TransformerGraph, x: str, kind: str, name: str) -> str:
        return self.node("Mul", [x, self.constant(np.float32(1.01 if self.fused else 1), name + ".wrong")], name)

    monkeypatch.setattr(TransformerGraph, "activation", scaled)
    with pytest.raises(CheckpointError, match="computes something else"):
        export_onnx(str(checkpoint), options, tmp_path / "graph.onnx")
    assert not (tmp_path / "graph.onnx").exists()


def test_the_original_decoder_stands_beside_openai_s_tower(
    checkpoint: Path, run: Run, arrays: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    state = load_file(checkpoint)
    save_file(openai_image_tower(state), tmp_path / "tower.safetensors")
    save_file(original_decoder(state), tmp_path / "decoder.safetensors")
    activations = run(IMAGE, tmp_path / "tower.safetensors", images=arrays["pixel_values"])
    all_close(activations, arrays["activations"], "fp32")
    conditions = arrays["conditional_embeddings"]
    found = run(DECODER, tmp_path / "decoder.safetensors", activations=activations[1], conditions=conditions)
    all_close(found, arrays["logits"][1], "fp32")
    with pytest.raises(CheckpointError, match="is named as in a CLIPSeg decoder"):
        read_builder(tmp_path / "tower.safetensors", DECODER)
    with pytest.raises(CheckpointError, match="is named as in a DINOv2, DINOv3 or CLIP image tower"):
        read_builder(tmp_path / "decoder.safetensors", IMAGE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(IMAGE, precision="int8"), "fp32 or fp16 .*, not in int8"),
        (replace(IMAGE, activation="relu"), "gelu, quick_gelu"),
        (replace(IMAGE, attention="flash"), "fused, standard"),
        (replace(IMAGE, heads=5), "do not divide a width of 48"),
        (replace(IMAGE, heads=None), "48 wide has is not known; name the number with --heads"),
        (replace(IMAGE, taps=(3, 12)), "increasing block numbers from 0 to 11"),
        (replace(IMAGE, taps=()), "increasing block numbers"),
        (replace(IMAGE, image_size=100), "use --image-size 96"),
        (replace(DECODER, precision="int8"), "fp32 or fp16 .*, not in int8"),
        (replace(DECODER, precision="fp8"), "fp32, fp16"),
        (replace(DECODER, attention="flash"), "fused, standard"),
        (replace(DECODER, heads=3), "do not divide a width of 16"),
        (replace(DECODER, image_size=100), "use --image-size 96"),
    ],
)
def test_options_that_do_not_fit_are_refused(checkpoint: Path, options: GraphOptions, message: str) -> None:
    builder = read_builder(checkpoint, options)
    for refusing in (builder.check, lambda: builder.build((), {})):
        with pytest.raises(CheckpointError, match=message):
            refusing()


def test_towers_that_are_not_clip_s_are_refused(random_dinov2: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="an image tower of dinov2; CLIPSeg's is CLIP's"):
        read_builder(random_dinov2(), replace(IMAGE, taps=(0, 1), image_size=70, heads=None)).check()


@pytest.mark.parametrize("options", [IMAGE, DECODER])
def test_half_precision_is_read_by_tensorrt(checkpoint: Path, options: GraphOptions) -> None:
    model = read_builder(checkpoint, replace(options, precision="fp16", attention="standard")).build((), {})
    assert {node.domain for node in model.graph.node} == {""}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in inferred}
    for node in model.graph.node:
        if node.op_type in ("Softmax", "LayerNormalization") or node.name.endswith((".residual", ".norm2")):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
        if node.op_type in ("Conv", "ConvTranspose") or node.name.endswith((".fc1", ".fc2", ".proj", ".qkv")):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT16
    assert all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in model.graph.output)


@pytest.mark.long
def test_the_published_shape_agrees(
    empty_cache: Path, published_clipseg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsad.export.agreement.LARGE_IMAGE", 352)  # two images are enough
    checkpoint = str(published_clipseg)
    image = export_onnx(checkpoint, ClipSegImageOptions(precision="fp16", attention="standard"))
    segmentation = export_onnx(checkpoint, ClipSegDecoderOptions(precision="fp16", attention="standard"))
    assert image.inputs == {"images": (None, 3, 352, 352)}
    assert segmentation.inputs == {"activations": (3, 485, 768), "conditions": (None, 512)}
    assert image.agreement.startswith("fp16")
    assert segmentation.agreement.startswith("fp16")
