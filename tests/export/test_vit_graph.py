"""Exported graphs against tokens that the public model code computed."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from clip_checkpoints import normalised, text_arrays, write_clip
from processor import needs_vnni
from safetensors.numpy import load_file, save_file

from zsad.bench.towers import Shape, tower_state
from zsad.export.libraries import import_onnxruntime
from zsad.export.onnx_export import export_onnx
from zsad.export.options import ACTIVATIONS, ATTENTIONS, IMAGE_OUTPUTS, ExportOptions
from zsad.export.quantisation import int8_errors
from zsad.export.state_dict import CheckpointError
from zsad.export.transformer_graph import LINEAR_LAYERS
from zsad.export.vision_transformer import CLIP, DINOV2, DINOV3, VisionTransformer, read_vision_transformer
from zsad.export.vit_graph import bicubic_matrix, build_vit_graph, resize_positions, window_tokens

WINCLIP = {
    "windows_2": "window_embedding_2",
    "windows_3": "window_embedding_3",
    "patches": "patch_tokens_ln_post",
    "embedding": "image_embedding",
    "tokens": "patch_tokens_last_block",
}


def run(model: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(model)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.astype(np.float32)})


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def dinov2(golden: Path) -> VisionTransformer:
    return read_vision_transformer(golden / "dinov2_vit_tiny.safetensors")


@pytest.fixture(scope="module")
def clip(golden: Path) -> VisionTransformer:
    return read_vision_transformer(golden / "clip_vit_tiny.safetensors")


@pytest.mark.parametrize("size", [518, 224])
def test_dinov2_equals_the_public_model(golden: Path, dinov2: VisionTransformer, size: int) -> None:
    arrays = np.load(golden / "dinov2_vit_tiny.npz")
    model = build_vit_graph(dinov2, ExportOptions(tuple(arrays["taps_zero_based"].tolist()), size, heads=3))
    tokens, embedding = run(model, arrays[f"image_{size}"])
    assert relative_error(tokens, arrays[f"patch_tokens_{size}"]) < 1e-5
    assert relative_error(embedding, arrays[f"image_embedding_{size}"]) < 1e-5


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip_equals_the_public_model(golden: Path, clip: VisionTransformer, activation: str) -> None:
    arrays = np.load(golden / "clip_vit_tiny.npz")
    model = build_vit_graph(clip, ExportOptions(tuple(arrays["taps_zero_based"].tolist()), 126, activation, heads=2))
    tokens, embedding = run(model, arrays["image"])
    assert relative_error(tokens, arrays[f"patch_tokens_{activation}"]) < 1e-5
    assert relative_error(embedding, arrays[f"image_embedding_{activation}"]) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)


def test_batch_is_dynamic_and_images_are_independent(golden: Path, clip: VisionTransformer) -> None:
    images = np.load(golden / "clip_vit_tiny.npz")["image"]
    model = build_vit_graph(clip, ExportOptions((2, 5), 126, heads=2))
    together, _ = run(model, images)
    for index, image in enumerate(images):
        alone, _ = run(model, image[None])
        np.testing.assert_allclose(alone[0], together[index], atol=1e-4)


def test_without_embedding_later_blocks_are_left_out(dinov2: VisionTransformer) -> None:
    images = np.random.default_rng(0).normal(size=(1, 3, 70, 70))
    full = build_vit_graph(dinov2, ExportOptions((0, 2), 70, heads=3))
    short = build_vit_graph(dinov2, ExportOptions((0, 2), 70, heads=3, outputs=("tokens",)))
    assert len(short.graph.node) < len(full.graph.node)
    assert [output.name for output in short.graph.output] == ["tokens"]
    np.testing.assert_allclose(run(short, images)[0], run(full, images)[0], atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_embedding_alone_takes_no_taps(clip: VisionTransformer, precision: str) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 126, 126))
    full = build_vit_graph(clip, ExportOptions((2, 5), 126, heads=2, precision=precision))
    alone = build_vit_graph(clip, ExportOptions((), 126, heads=2, outputs=("embedding",), precision=precision))
    assert [output.name for output in alone.graph.output] == ["embedding"]
    onnx.checker.check_model(alone, full_check=True)
    [embedding] = run(alone, images)
    np.testing.assert_array_equal(embedding, run(full, images)[1])


@pytest.fixture
def dinov3(tmp_path: Path) -> VisionTransformer:
    state = tower_state(Shape(DINOV3, 32, 3, patch_size=4, registers=2, head_width=16), deviation=0.25)
    save_file(state, tmp_path / "dinov3.safetensors")
    return read_vision_transformer(tmp_path / "dinov3.safetensors")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rotary_positions_count_and_are_the_same_everywhere(dinov3: VisionTransformer, attention: str) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 20, 20))
    model = build_vit_graph(dinov3, ExportOptions((0, 2), 20, attention=attention))
    onnx.checker.check_model(model, full_check=True)
    expected = outputs(build_vit_graph(dinov3, ExportOptions((0, 2), 20, attention="standard")), images)
    for name, found in outputs(model, images).items():
        np.testing.assert_allclose(found, expected[name], atol=2e-5)
    still = replace(dinov3, periods=np.full_like(dinov3.periods, 1e9))
    fixed = outputs(build_vit_graph(still, ExportOptions((0, 2), 20, attention=attention)), images)
    assert relative_error(fixed["tokens"], expected["tokens"]) > 0.05
    # The class token alone leaves the last block where no other is wanted.
    first = outputs(build_vit_graph(dinov3, ExportOptions((0,), 20, attention=attention)), images)
    np.testing.assert_allclose(first["embedding"], expected["embedding"], atol=2e-5)


def test_rotary_positions_are_turned_in_fp32(dinov3: VisionTransformer) -> None:
    for attention, operator in (("fused", "RotaryEmbedding"), ("standard", "Mul")):
        model = build_vit_graph(dinov3, ExportOptions((2,), 20, precision="fp16", attention=attention))
        inferred = onnx.shape_inference.infer_shapes(model)
        types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        turns = [node for node in model.graph.node if node.op_type == operator and "rotated" in node.name]
        assert len(turns) == 2 * 3 * (2 if operator == "Mul" else 1)
        assert {
            types[name] for node in turns for name in node.input if name in types and name != "positions.start"
        } == {onnx.TensorProto.FLOAT}


def test_windows_have_no_rotary_positions(dinov3: VisionTransformer) -> None:
    with pytest.raises(CheckpointError, match=r"windows are of towers that add positions to the tokens.*leave them"):
        build_vit_graph(dinov3, ExportOptions((), 20, outputs=("windows_2",)))


@needs_vnni
def test_rotary_positions_in_int8(dinov3: VisionTransformer) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 20, 20))
    expected, found = (
        run(build_vit_graph(dinov3, ExportOptions((0, 2), 20, precision=precision)), images)[0]
        for precision in ("fp32", "int8")
    )
    assert relative_error(found, expected) < 0.1
    errors = int8_errors(dinov3, ExportOptions((2,), 20, precision="int8", outputs=("tokens",)))
    assert len(errors) == 3 * len(LINEAR_LAYERS)


def test_metadata_says_what_is_in_the_file(dinov2: VisionTransformer) -> None:
    model = build_vit_graph(dinov2, ExportOptions((1, 3), 70, heads=3), metadata={"checkpoint": "x"})
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts == {
        "architecture": "dinov2",
        "taps": "1,3",
        "activation": "gelu",
        "image_size": "70",
        "grid": "5",
        "precision": "fp32",
        "attention": "fused",
        "checkpoint": "x",
    }


def test_rotary_positions_are_not_resized(dinov3: VisionTransformer) -> None:
    with pytest.raises(CheckpointError, match=r"antialias is of positions that are resized, and rotary ones are not"):
        build_vit_graph(dinov3, ExportOptions((), 20, outputs=("embedding",), antialias=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": (1, 6)}, "from 0 to 5"),
        ({"taps": ()}, "increasing"),
        ({"outputs": ("embedding",)}, r"taps \[1, 3\] give tokens, which are not wanted"),
        ({"outputs": ()}, "gives tokens, embedding, patches, windows_2, windows_3, not nothing"),
        ({"outputs": ("masks",)}, "gives tokens, embedding, patches, windows_2, windows_3, not masks"),
        ({"taps": (3, 1)}, "increasing"),
        ({"image_size": 500}, "--image-size 504"),
        ({"image_size": 0}, "--image-size 14"),
        ({"activation": "relu"}, "gelu, quick_gelu"),
        ({"heads": 5}, "do not divide"),
        ({"heads": None}, "48 wide has is not known; name the number with --heads"),
        ({"heads": 0}, "do not divide"),
    ],
)
def test_options_that_do_not_fit_are_refused(dinov2: VisionTransformer, change, message: str) -> None:
    arguments = {"taps": (1, 3), "image_size": 70, "heads": 3, **change}
    with pytest.raises(CheckpointError, match=message):
        build_vit_graph(dinov2, ExportOptions(**arguments))


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (384, 6), (896, 14), (1024, 16), (1280, 16), (1536, 24)])
def test_heads_are_those_of_the_published_towers(width: int, heads: int) -> None:
    for architecture in (DINOV2, CLIP):
        assert architecture.attention_heads(width, None) == heads
        assert architecture.attention_heads(width, 4) == 4


@pytest.mark.parametrize("width", [1088, 1152, 2048])
def test_heads_of_other_wide_towers_must_be_named(width: int) -> None:
    with pytest.raises(CheckpointError, match="is not known; name the number with --heads"):
        CLIP.attention_heads(width, None)


def test_positions_are_kept_at_the_stored_size(dinov2: VisionTransformer) -> None:
    assert resize_positions(dinov2, 37) is dinov2.positions


def test_bicubic_matrix_keeps_constants_and_equals_the_identity_at_scale_one() -> None:
    np.testing.assert_allclose(bicubic_matrix(24, 37, 37 / 24).sum(axis=1), 1)
    np.testing.assert_allclose(bicubic_matrix(9, 9, 1.0), np.eye(9), atol=1e-12)


def test_registers_stand_between_class_token_and_patches(golden: Path, tmp_path: Path) -> None:
    """With zero value projections attention adds nothing, so registers must not reach any patch."""
    state = dict(load_file(golden / "dinov2_vit_tiny.safetensors"))
    state["register_tokens"] = np.ones((1, 4, 48), np.float32)
    for name in state:
        if name.endswith(("attn.proj.weight", "attn.proj.bias")):
            state[name] = np.zeros_like(state[name])
    save_file(state, tmp_path / "with.safetensors")
    del state["register_tokens"]
    save_file(state, tmp_path / "without.safetensors")
    images = np.random.default_rng(0).normal(size=(2, 3, 518, 518))
    results = [
        run(build_vit_graph(read_vision_transformer(tmp_path / name), ExportOptions((0, 5), 518, heads=3)), images)
        for name in ("with.safetensors", "without.safetensors")
    ]
    for with_registers, without in zip(*results, strict=True):
        np.testing.assert_allclose(with_registers, without, atol=1e-5)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor whose type ONNX can infer."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output, *graph.input]}


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_half_precision_has_its_islands_in_fp32(request: pytest.FixtureRequest, name: str) -> None:
    vit: VisionTransformer = request.getfixturevalue(name)
    model = build_vit_graph(vit, ExportOptions((1, 3, 5), 70, heads=2, precision="fp16", attention="standard"))
    onnx.checker.check_model(model, full_check=True)
    types = types_of(model)
    operators = {node.output[0]: node.op_type for node in model.graph.node}
    wide = {"LayerNormalization", "Softmax", "LpNormalization", "Pad", "Gather"}
    narrow = {"MatMul", "Conv", "Gelu"}
    for output, operator in operators.items():
        if operator in wide:
            assert types[output] == onnx.TensorProto.FLOAT, output
        if operator in narrow and output != "class.projected":
            assert types[output] == onnx.TensorProto.FLOAT16, output
    assert types["tokens"] == onnx.TensorProto.FLOAT16  # every tap, also those that the next block reads
    assert types["embedding"] == types["images"] == onnx.TensorProto.FLOAT
    residuals = [output for output, operator in operators.items() if operator == "Add" and output.endswith("residual")]
    assert len(residuals) == len(vit.blocks)
    assert {types[output] for output in residuals} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("attention", ["fused", "standard"])
@pytest.mark.parametrize(("precision", "cosine"), [("fp16", 0.99999), pytest.param("int8", 0.999, marks=needs_vnni)])
def test_lower_precisions_stay_close(
    golden: Path, clip: VisionTransformer, precision: str, cosine: float, attention: str
) -> None:
    arrays = np.load(golden / "clip_vit_tiny.npz")
    taps = tuple(arrays["taps_zero_based"].tolist())
    model = build_vit_graph(clip, ExportOptions(taps, 126, heads=2, precision=precision, attention=attention))
    for found, name in zip(run(model, arrays["image"]), ("patch_tokens_gelu", "image_embedding_gelu"), strict=True):
        found, expected = found.astype(np.float64), arrays[name].astype(np.float64)
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        assert ((found * expected).sum(axis=-1) / lengths).min() > cosine


def test_standard_attention_uses_no_foreign_operators(dinov2: VisionTransformer) -> None:
    model = build_vit_graph(dinov2, ExportOptions((1,), 70, heads=3, precision="fp16", attention="standard"))
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]


def test_int8_results_do_not_depend_on_the_batch(golden: Path, clip: VisionTransformer) -> None:
    images = np.load(golden / "clip_vit_tiny.npz")["image"]
    model = build_vit_graph(clip, ExportOptions((2, 5), 126, heads=2, precision="int8"))
    together = run(model, np.concatenate([images, 50 * images]))
    for alone, all_of_them in zip(run(model, images[:1]), together, strict=True):
        np.testing.assert_array_equal(alone, all_of_them[:1])


@pytest.mark.parametrize("attention", ["fused", "standard"])
def test_exact_layers_of_an_int8_graph_are_computed_in_fp32(clip: VisionTransformer, attention: str) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 126, 126))
    layers = [f"block{index}.{layer}" for index in range(len(clip.blocks)) for layer in LINEAR_LAYERS]
    expected = run(build_vit_graph(clip, ExportOptions((2, 5), 126, heads=2)), images)
    deviations = []
    for exact in (layers, layers[1:], []):
        model = build_vit_graph(clip, ExportOptions((2, 5), 126, heads=2, precision="int8", attention=attention), exact)
        nodes, operator = model.graph.node, "DequantizeLinear"
        if attention == "fused":
            (loop,) = model.graph.node
            nodes, operator = loop.attribute[0].g.node, "DynamicQuantizeMatMul"
        assert [node.op_type for node in nodes].count(operator) == len(layers) - len(exact)
        deviations.append(relative_error(run(model, images)[0], expected[0]))
    assert deviations[0] < 1e-5 < deviations[1] < deviations[2]


def test_weights_beyond_half_precision_are_refused(golden: Path, tmp_path: Path) -> None:
    state = dict(load_file(golden / "dinov2_vit_tiny.safetensors"))
    state["blocks.2.mlp.fc1.weight"] = state["blocks.2.mlp.fc1.weight"] * 1e6
    save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(CheckpointError, match=r"block2\.fc1\.weight.*beyond the range of fp16"):
        build_vit_graph(
            read_vision_transformer(tmp_path / "large.safetensors"), ExportOptions((1,), 70, heads=3, precision="fp16")
        )


def test_antialiasing_is_an_option_and_changes_only_resized_positions(clip: VisionTransformer) -> None:
    stored = 6  # patches per side
    assert resize_positions(clip, stored, antialias=True) is clip.positions
    for grid in (4, 9):
        plain, smooth = (resize_positions(clip, grid, antialias) for antialias in (False, True))
        np.testing.assert_array_equal(plain, resize_positions(clip, grid))
        assert relative_error(smooth, plain) > 0.01


@pytest.mark.torch
@pytest.mark.parametrize(("source", "target"), [(24, 37), (37, 16), (6, 6)])
def test_bicubic_matrix_equals_pytorch(source: int, target: int) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    x = np.random.default_rng(0).normal(size=(source, source))
    for antialias in (False, True):
        matrix = bicubic_matrix(source, target, target / source, antialias)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(x)[None, None], size=(target, target), mode="bicubic", antialias=antialias
        )[0, 0].numpy()
        np.testing.assert_allclose(matrix @ x @ matrix.T, expected, atol=1e-6)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> VisionTransformer:
    return read_vision_transformer(write_clip(tmp_path_factory.mktemp("clip"), "clip_tiny"))


@pytest.fixture(scope="module")
def april(tmp_path_factory: pytest.TempPathFactory) -> VisionTransformer:
    return read_vision_transformer(write_clip(tmp_path_factory.mktemp("april"), "april"))


def outputs(model: onnx.ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what `run` does, by name."""
    return dict(zip((output.name for output in model.graph.output), run(model, images), strict=True))


@pytest.mark.parametrize("size", [96, 144, 64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_clip_equals_open_clip_at_other_sizes(tiny_clip: VisionTransformer, activation: str, size: int) -> None:
    arrays = text_arrays("clip_tiny")
    options = ExportOptions((0, 2, 5), size, activation, antialias=True)
    found = outputs(build_vit_graph(tiny_clip, options), normalised(arrays[f"resized_{size}"]))
    expected = arrays[f"{activation}_{size}_image_embedding"]
    np.testing.assert_allclose(found["embedding"], unit(expected), atol=1e-5)
    for index, block in enumerate((1, 3, 6)):
        np.testing.assert_allclose(
            found["tokens"][:, index], arrays[f"{activation}_{size}_block_{block}"][:, 1:], atol=1e-4
        )


def test_positions_are_resized_as_open_clip_does(tiny_clip: VisionTransformer, april: VisionTransformer) -> None:
    arrays = text_arrays("clip_tiny")
    for size in (64, 96, 144):
        np.testing.assert_allclose(
            resize_positions(tiny_clip, size // 16, True), arrays[f"positional_{size}"], atol=1e-6
        )
    np.testing.assert_allclose(resize_positions(april, 7, True), text_arrays("april")["positional"], atol=1e-6)
    assert np.abs(resize_positions(april, 7) - text_arrays("april")["positional"]).max() > 0.01


def test_blocks_equal_those_of_april_gan(april: VisionTransformer) -> None:
    arrays = text_arrays("april")
    blocks = arrays["layers"].tolist()
    options = ExportOptions(tuple(block - 1 for block in blocks), 98, antialias=True)
    found = outputs(build_vit_graph(april, options), normalised(arrays["resized"]))
    np.testing.assert_allclose(found["embedding"], unit(arrays["image_embedding"]), atol=1e-5)
    references = outputs(build_vit_graph(april, options), normalised(arrays["reference_resized"].reshape(4, 98, 98, 3)))
    for index, block in enumerate(blocks):
        np.testing.assert_allclose(found["tokens"][:, index], arrays[f"block_{block}"][:, 1:], atol=1e-4)
        expected = arrays[f"reference_block_{block}"].reshape(4, 50, 64)[:, 1:]
        np.testing.assert_allclose(references["tokens"][:, index], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "precision", "largest"),
    [
        ("fused", "fp32", 1e-5),
        pytest.param("standard", "fp32", 1e-5, marks=pytest.mark.long),
        pytest.param("fused", "fp16", 5e-3, marks=pytest.mark.long),
        pytest.param("standard", "fp16", 5e-3, marks=pytest.mark.long),
        pytest.param("fused", "int8", 0.15, marks=needs_vnni),
        pytest.param("standard", "int8", 0.15, marks=[needs_vnni, pytest.mark.long]),
    ],
)
def test_windows_equal_those_of_winclip(
    tiny_clip: VisionTransformer, precision: str, largest: float, attention: str
) -> None:
    arrays = text_arrays("winclip_anomalib")
    images = normalised(arrays["resized"])
    options = ExportOptions((5,), 96, outputs=IMAGE_OUTPUTS, precision=precision, attention=attention)
    model = build_vit_graph(tiny_clip, options)
    found = outputs(model, images)
    assert set(found) == set(IMAGE_OUTPUTS)
    assert np.linalg.norm(found["windows_2"], axis=-1).max() > 1.1
    found["tokens"] = found["tokens"][:, 0]
    for name, theirs in WINCLIP.items():
        expected = unit(arrays[theirs]) if name == "embedding" else arrays[theirs]
        error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
        assert error < largest, name
    if precision != "int8":
        alone = outputs(model, images[2:3])
        for name in ("windows_2", "windows_3", "patches"):
            np.testing.assert_allclose(alone[name], found[name][2:3], atol=largest)


@pytest.mark.slow
def test_every_output_can_stand_alone_and_is_the_same_then(tiny_clip: VisionTransformer) -> None:
    images = normalised(text_arrays("winclip_anomalib")["resized"][:2])
    whole = outputs(build_vit_graph(tiny_clip, ExportOptions((2,), 96, outputs=IMAGE_OUTPUTS)), images)
    for name in IMAGE_OUTPUTS:
        model = build_vit_graph(tiny_clip, ExportOptions((2,) if name == "tokens" else (), 96, outputs=(name,)))
        (found,) = outputs(model, images).items()
        assert found[0] == name
        np.testing.assert_allclose(found[1], whole[name], atol=1e-5)


def test_all_sequences_share_the_weights(tiny_clip: VisionTransformer) -> None:
    for precision in ("fp32", "fp16", "int8"):
        plain, windows = (
            build_vit_graph(tiny_clip, ExportOptions((5,), 96, outputs=wanted, precision=precision))
            for wanted in (("tokens", "embedding"), IMAGE_OUTPUTS)
        )
        sizes = [sum(len(tensor.raw_data) for tensor in model.graph.initializer) for model in (plain, windows)]
        assert sizes[1] - sizes[0] < 6000  # which tokens each window holds
        names = [tensor.name for tensor in windows.graph.initializer]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
# A window, several that do not come out even, and all at a time.
@pytest.mark.parametrize(
    "tokens", [pytest.param(1, marks=pytest.mark.slow), 35, pytest.param(10**6, marks=pytest.mark.slow)]
)
def test_parts_of_the_windows_give_what_all_do(
    tiny_clip: VisionTransformer, monkeypatch: pytest.MonkeyPatch, tokens: int, precision: str
) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 96, 96))
    options = ExportOptions((), 96, outputs=("embedding", "windows_2", "windows_3"))
    expected = run(build_vit_graph(tiny_clip, replace(options, attention="standard")), images)
    monkeypatch.setattr("zsad.export.vit_graph.WINDOW_TOKENS", tokens)
    model = build_vit_graph(tiny_clip, replace(options, precision=precision))
    onnx.checker.check_model(model, full_check=True)
    for found, right in zip(run(model, images), expected, strict=True):
        assert found.shape == right.shape
        assert relative_error(found, right) < (1e-5 if precision == "fp32" else 0.03)
    assert {node.op_type for node in model.graph.node if node.name.endswith(".parts")} == {"Scan"}


def test_the_class_token_alone_leaves_the_last_block(clip: VisionTransformer) -> None:
    """Where no other token of the last block is wanted, its feed-forward layers see one row."""
    last, arrays = len(clip.blocks) - 1, {}
    images = np.random.default_rng(0).normal(size=(2, 3, 126, 126))
    for attention, taps in itertools.product(ATTENTIONS, ((0,), (0, last))):
        model = build_vit_graph(clip, ExportOptions(taps, 126, heads=2, attention=attention))
        assert any(node.name == f"block{last}.first" for node in model.graph.node) == (last not in taps)
        arrays[attention, taps] = run(model, images)[1]
    for embedding in arrays.values():
        np.testing.assert_allclose(embedding, arrays["fused", (0, last)], atol=1e-6)


def test_windows_are_numbered_as_in_anomalib() -> None:
    arrays = text_arrays("winclip_anomalib")
    for side in (2, 3):
        np.testing.assert_array_equal(window_tokens(6, side, 0), arrays[f"windows_{side}"].T)
        found = window_tokens(6, side, 5)
        np.testing.assert_array_equal(found[:, :5], np.tile(np.arange(5), (len(found), 1)))
        np.testing.assert_array_equal(found[:, 5:], 5 + arrays[f"windows_{side}"].T)


def test_an_image_without_windows_is_refused(tiny_clip: VisionTransformer) -> None:
    model = build_vit_graph(tiny_clip, ExportOptions((), 32, outputs=("windows_2",)))
    assert run(model, np.zeros((3, 3, 32, 32)))[0].shape == (3, 1, 32)
    with pytest.raises(CheckpointError, match="no windows of 3 × 3 patches; use --image-size 48 or more"):
        build_vit_graph(tiny_clip, ExportOptions((), 32, outputs=("windows_2", "windows_3")))


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "oracle"),
    [
        pytest.param("fp32", "graph", marks=pytest.mark.long),
        pytest.param("fp16", "graph", marks=pytest.mark.long),
        pytest.param("int8", "graph", marks=pytest.mark.long),
        pytest.param("fp32", "torch", marks=pytest.mark.torch),
        pytest.param("fp16", "torch", marks=[pytest.mark.torch, pytest.mark.long]),
        pytest.param("int8", "torch", marks=[pytest.mark.torch, pytest.mark.long]),
    ],
)
@pytest.mark.parametrize("registers", [0, pytest.param(4, marks=pytest.mark.long)])
def test_windows_are_compared_before_they_are_kept(
    empty_cache: Path, random_dinov2: Callable[..., Path], tmp_path: Path, precision: str, oracle: str, registers: int
) -> None:
    if oracle == "torch":
        pytest.importorskip("torch", reason="compares with PyTorch")
    # With registers and without a projection, and the opposite.
    checkpoint = random_dinov2(registers=4) if registers else write_clip(tmp_path, "april")
    options = ExportOptions((1,), 70, outputs=IMAGE_OUTPUTS, precision=precision)
    assert export_onnx(str(checkpoint), options, oracle=oracle).agreement.startswith(precision)


@pytest.mark.torch
@pytest.mark.slow
def test_windows_that_are_wrong_are_not_kept(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="compares with PyTorch")
    right = window_tokens
    monkeypatch.setattr("zsad.export.vit_graph.window_tokens", lambda *sizes: right(*sizes)[::-1].copy())
    options = ExportOptions((), 70, outputs=("embedding", "windows_2"))
    with pytest.raises(CheckpointError, match="computes something else"):
        export_onnx(str(write_clip(tmp_path, "april")), options, oracle="torch")
