"""The graphs of SAM's and MobileSAM's image encoders against segment_anything's arrays, PyTorch and timm."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from zsad.bench.random_weights import mask_decoder_state, sam_encoder_state, tiny_encoder_state, write_states
from zsad.export.agreement import run_graph, sample_images
from zsad.export.builders import read_builder
from zsad.export.onnx_export import export_onnx
from zsad.export.options import ATTENTIONS, SamImageOptions
from zsad.export.sam import TinyEncoder, read_sam_encoder
from zsad.export.sam_image_graph import build_sam_image_graph
from zsad.export.state_dict import CheckpointError
from zsad.export.transformer_graph import TransformerGraph

RELATIVE = {"fp32": 3e-6, "fp16": 3e-3}
WIDTHS, DEPTHS, SIDES = (16, 32, 32, 64), (1, 2, 1, 1), (3, 14, 5)

Run = Callable[..., np.ndarray]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Builds the graph of a checkpoint and returns its embedding."""

    def run(checkpoint: Path, options: SamImageOptions, images: np.ndarray) -> np.ndarray:
        model = build_sam_image_graph(read_sam_encoder(checkpoint), options)
        onnx.checker.check_model(model, full_check=True)
        onnx.save_model(model, str(tmp_path / "graph.onnx"))
        return run_graph(tmp_path / "graph.onnx", {"images": images})["embedding"]

    return run


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small TinyViT; at 96 px its grids are 12, 6 and 6 tokens wide, and its windows 3, 14 and 5."""
    return write_states(
        tmp_path_factory.mktemp("sam") / "mobile.safetensors", tiny_encoder_state(WIDTHS, DEPTHS, SIDES, head=8, out=32)
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sam_equals_segment_anything(run: Run, golden: Path, precision: str, attention: str) -> None:
    arrays = np.load(golden / "segmentation" / "sam_tiny.npz")
    images, expected = (
        np.stack([arrays[f"image{index}_{name}"] for index in (0, 1)]) for name in ("network_input", "embedding")
    )
    options = SamImageOptions(192, precision, attention)
    found = run(golden / "segmentation" / "sam_tiny.safetensors", options, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE[precision] * np.abs(expected).max())
    if precision == "fp32":
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rows_and_columns_are_not_mixed_up(run: Run, tmp_path: Path, attention: str) -> None:
    """Images and relative positions on their side give the embedding on its side, and nothing else does."""
    state = sam_encoder_state(32, [3, 4], 16, 4, out=32)
    turned = {name: value.swapaxes(1, 2) if name.endswith("pos_embed") else value for name, value in state.items()}
    for name in list(state):
        if name.endswith("rel_pos_h"):
            other = name.replace("rel_pos_h", "rel_pos_w")
            turned[name], turned[other] = state[other], state[name]
    for name in ("patch_embed.proj.weight", "neck.2.weight"):
        turned[f"image_encoder.{name}"] = state[f"image_encoder.{name}"].swapaxes(2, 3)
    images, options = sample_images(64), SamImageOptions(64, attention=attention)
    upright = write_states(tmp_path / "upright.safetensors", state)
    expected = run(upright, options, images)
    found = run(write_states(tmp_path / "turned.safetensors", turned), options, images.swapaxes(2, 3))
    np.testing.assert_allclose(found.swapaxes(2, 3), expected, atol=1e-4)
    assert (
        np.abs(run(write_states(tmp_path / "upright.safetensors", state), options, images.swapaxes(2, 3)) - found).max()
        > 0.1
    )


@pytest.mark.slow
@pytest.mark.torch
def test_mobile_sam_equals_timm(run: Run, torchvision: None, mobile: Path) -> None:
    import torch
    from safetensors.numpy import load_file

    timm = pytest.importorskip("timm", reason="needs timm")
    model = timm.models.tiny_vit.TinyVit(
        num_classes=0, embed_dims=WIDTHS, depths=DEPTHS, num_heads=(2, 4, 4, 8), window_sizes=(7, *SIDES)
    ).eval()
    model.stages[3].downsample.conv2.conv.stride = (1, 1)  # MobileSAM's own change
    state = load_file(mobile)
    own = {}
    for name in model.state_dict():
        theirs = name.replace("patch_embed.conv1.", "patch_embed.seq.0.").replace(
            "patch_embed.conv2.", "patch_embed.seq.2."
        )
        if ".downsample." in name:  # timm puts it in front of the next stage
            stage = int(name.split(".")[1])
            theirs = theirs.replace(f"stages.{stage}.", f"layers.{stage - 1}.")
        theirs = theirs.replace("stages.", "layers.").replace(".conv.", ".c.")
        theirs = theirs.replace("local_c.", "local_conv.").replace("local_conv.conv.", "local_conv.c.")
        if not name.startswith("head"):
            own[name] = torch.from_numpy(state[f"image_encoder.{theirs}"])
    model.load_state_dict(own, strict=False)
    images = sample_images(96)
    with torch.inference_mode():
        tokens = model.forward_features(torch.from_numpy(images)).permute(0, 2, 3, 1).numpy()  # [1, 6, 6, C]
    encoder = read_sam_encoder(mobile)
    assert isinstance(encoder, TinyEncoder)
    forward = read_builder(mobile, SamImageOptions(96)).forward()
    expected = forward.fetch(forward._embedding(forward.tensor(tokens))["embedding"])
    np.testing.assert_allclose(run(mobile, SamImageOptions(96), images), expected, atol=3e-5)


@pytest.mark.parametrize(
    ("precision", "oracle"),
    [
        pytest.param("fp32", "graph", marks=pytest.mark.slow),
        ("fp16", "graph"),
        pytest.param("fp32", "torch", marks=pytest.mark.torch),
        pytest.param("fp16", "torch", marks=[pytest.mark.torch, pytest.mark.slow]),
    ],
)
@pytest.mark.parametrize("kind", ["sam", "mobile"])
def test_they_are_exported(
    empty_cache: Path, tmp_path: Path, mobile: Path, kind: str, precision: str, oracle: str
) -> None:
    if oracle == "torch":
        pytest.importorskip("torch", reason="compares with PyTorch")
    checkpoint = (
        mobile
        if kind == "mobile"
        else write_states(
            tmp_path / "sam.safetensors",
            sam_encoder_state(48, [4, 6, 4], 16, 6, out=32),
            mask_decoder_state(32, hidden=16, quality=16),
        )
    )
    options = SamImageOptions(96, precision)
    model = export_onnx(str(checkpoint), options, oracle=oracle)
    assert model.agreement.startswith(precision)
    assert model.preprocessing == "imagenet"
    assert model.inputs == {"images": (None, 3, 96, 96)}
    assert model.path.name.startswith(f"{kind}-image-96-")
    facts = {entry.key: entry.value for entry in onnx.load(model.path).metadata_props}
    assert facts["architecture"] == ("mobile-sam-image" if kind == "mobile" else "sam-image")
    assert not export_onnx(str(checkpoint), options).built


@pytest.mark.parametrize("kind", ["sam", "mobile"])
def test_standard_attention_uses_no_foreign_operators_and_keeps_norms_in_fp32(
    golden: Path, mobile: Path, kind: str
) -> None:
    checkpoint, size = (mobile, 96) if kind == "mobile" else (golden / "segmentation" / "sam_tiny.safetensors", 192)
    model = build_sam_image_graph(read_sam_encoder(checkpoint), SamImageOptions(size, "fp16", "standard"))
    assert {node.domain for node in model.graph.node} == {""}
    types = {value.name: value for value in onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info}
    elements: dict[str, set[int]] = {}
    for node in model.graph.node:
        if node.output[0] in types:
            elements.setdefault(node.op_type, set()).add(types[node.output[0]].type.tensor_type.elem_type)
    assert elements["Softmax"] == elements["LayerNormalization"] == {onnx.TensorProto.FLOAT}
    assert elements["MatMul"] == elements["Conv"] == elements["Gelu"] == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("sam", {"precision": "int8"}, "fp32 or fp16"),
        ("sam", {"attention": "flash"}, "fused, standard"),
        ("sam", {"image_size": 208}, "trained at 192 pixels; use --image-size 192"),
        ("mobile", {"image_size": 100}, "no multiple of 16; use --image-size 96"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    golden: Path, mobile: Path, kind: str, wrong: dict[str, object], message: str
) -> None:
    checkpoint = mobile if kind == "mobile" else golden / "segmentation" / "sam_tiny.safetensors"
    options = replace(SamImageOptions(192), **wrong)
    with pytest.raises(CheckpointError, match=message):
        build_sam_image_graph(read_sam_encoder(checkpoint), options)


def test_a_graph_that_computes_something_else_is_not_written(
    empty_cache: Path, mobile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = TransformerGraph.split

    def swapped(self: TransformerGraph, x: str, parts: list[str], name: str) -> list[str]:
        found = cut(self, x, parts, name)
        return found[::-1] if self.fused else found

    monkeypatch.setattr(TransformerGraph, "split", swapped)
    with pytest.raises(CheckpointError, match="computes something else"):
        export_onnx(str(mobile), SamImageOptions(96))


@pytest.mark.long
@pytest.mark.torch
def test_a_vit_b_equals_pytorch(run: Run, tmp_path: Path) -> None:
    """At its size, with two of its blocks: the others repeat them."""
    pytest.importorskip("torch", reason="compares with PyTorch")
    checkpoint = write_states(tmp_path / "vit_b.safetensors", sam_encoder_state(768, [14, 64], 64, 64))
    images = sample_images(1024)
    forward = read_builder(checkpoint, SamImageOptions()).forward()
    expected = forward.fetch(forward(forward.tensor(images))["embedding"])
    found = run(checkpoint, SamImageOptions(), images)
    assert found.shape == (1, 256, 64, 64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sam", "mobile"])
def test_the_published_widths_agree_in_half_precision(empty_cache: Path, tmp_path: Path, kind: str) -> None:
    """As TensorRT gets them, of a small image; of ViT-B two blocks."""
    state = sam_encoder_state(768, [14, 16], 64, 16) if kind == "sam" else tiny_encoder_state()
    checkpoint = str(write_states(tmp_path / f"{kind}.safetensors", state, mask_decoder_state()))
    assert export_onnx(checkpoint, SamImageOptions(256, "fp16", "standard")).agreement.startswith("fp16")


@pytest.mark.slow
@pytest.mark.parametrize(("head", "every"), [(64, 6), (80, 8)])  # ViT-L and ViT-H, narrower
def test_the_larger_ones_have_their_windows_and_heads(tmp_path: Path, head: int, every: int) -> None:
    sides = ([14] * (every - 1) + [64]) * 4
    checkpoint = write_states(tmp_path / "large.safetensors", sam_encoder_state(2 * head, sides, head, 64, hidden=32))
    encoder = read_sam_encoder(checkpoint)
    for attention in ATTENTIONS:
        model = build_sam_image_graph(encoder, SamImageOptions(attention=attention))
        onnx.checker.check_model(model, full_check=True)
        if attention == "fused":
            nodes = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
            assert len(nodes) == 4 * every
            for node in nodes:
                own = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
                assert own["num_heads"] == 2
                np.testing.assert_allclose(own["scale"], head**-0.5)
