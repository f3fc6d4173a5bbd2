"""The text tower's graph against embeddings that open_clip computed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from clip_checkpoints import clip_state, text_arrays, write_clip
from safetensors.numpy import save_file

from zsad.export.agreement import run_graph, sample_texts
from zsad.export.onnx_export import export_onnx
from zsad.export.options import ACTIVATIONS, ATTENTIONS, TextOptions
from zsad.export.state_dict import CheckpointError
from zsad.export.text_graph import build_text_graph
from zsad.export.text_transformer import TextTransformer, read_text_transformer
from zsad.export.transformer_graph import TransformerGraph

RELATIVE = {"fp32": 1e-5, "fp16": 2e-3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextTransformer:
    return read_text_transformer(write_clip(tmp_path_factory.mktemp("clip"), "clip_tiny"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[[onnx.ModelProto, np.ndarray], np.ndarray]:
    def run(model: onnx.ModelProto, ids: np.ndarray) -> np.ndarray:
        onnx.checker.check_model(model, full_check=True)
        onnx.save_model(model, str(tmp_path / "text.onnx"))
        return run_graph(tmp_path / "text.onnx", {"ids": ids})["embedding"]

    return run


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_equals_open_clip(
    text: TextTransformer, run: Callable, activation: str, precision: str, attention: str
) -> None:
    arrays = text_arrays("clip_tiny")
    expected = arrays[f"{activation}_text_embedding"]
    found = run(build_text_graph(text, TextOptions(activation, None, precision, attention)), arrays["token_ids"])
    np.testing.assert_allclose(found, expected, atol=RELATIVE[precision] * np.abs(expected).max())
    other = arrays["gelu_text_embedding" if activation == "quick_gelu" else "quick_gelu_text_embedding"]
    assert np.abs(found - other).max() > 0.005


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_batch_is_dynamic_and_only_what_stands_in_front_of_the_end_counts(
    text: TextTransformer, run: Callable, attention: str
) -> None:
    ids = text_arrays("clip_tiny")["token_ids"]
    model = build_text_graph(text, TextOptions(attention=attention))
    together = run(model, ids)
    padded = ids.copy()
    ends = ids.argmax(axis=1)
    for row, end in zip(padded, ends, strict=True):
        row[end + 1 :] = 49407  # a second largest token is not the first
    np.testing.assert_allclose(run(model, padded), together, atol=1e-5)
    np.testing.assert_allclose(run(model, ids[3:4]), together[3:4], atol=1e-5)
    changed = ids.copy()
    changed[np.arange(len(ids)), ends - 1] = 1
    assert np.abs(run(model, changed) - together).max(axis=1).min() > 0.01


def test_a_tower_of_longer_texts_is_cut_and_one_of_shorter_texts_refused(text: TextTransformer, run: Callable) -> None:
    ids = text_arrays("clip_tiny")["token_ids"]
    short = ids[ids.argmax(axis=1) < 20][:, :20]
    assert len(short) > 3
    expected = run(build_text_graph(text, TextOptions()), np.pad(short, ((0, 0), (0, 57))))
    found = run(build_text_graph(text, TextOptions(context=20)), short)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="up to 77 tokens, not 78"):
        build_text_graph(text, TextOptions(context=78))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "int8"}, "fp32 or fp16"),
        ({"activation": "relu"}, "gelu, quick_gelu"),
        ({"attention": "flash"}, "fused, standard"),
        ({"heads": 3}, "do not divide a width of 128"),
    ],
)
def test_options_that_do_not_fit_are_refused(text: TextTransformer, wrong: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_text_graph(text, replace(TextOptions(), **wrong))


def test_standard_attention_uses_no_foreign_operators(text: TextTransformer) -> None:
    model = build_text_graph(text, TextOptions(precision="fp16", attention="standard"))
    assert {node.domain for node in model.graph.node} == {""}
    types = {value.name: value for value in onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info}
    for node in model.graph.node:
        if node.op_type in ("Softmax", "LayerNormalization"):
            assert types[node.output[0]].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("oracle", ["graph", pytest.param("torch", marks=pytest.mark.torch)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_is_exported_beside_the_image_tower(empty_cache: Path, tmp_path: Path, precision: str, oracle: str) -> None:
    if oracle == "torch":
        pytest.importorskip("torch", reason="compares with PyTorch")
    checkpoint = str(write_clip(tmp_path, "april"))
    options = TextOptions(precision=precision)
    model = export_onnx(checkpoint, options, oracle=oracle)
    assert model.agreement.startswith(precision)
    assert model.inputs == {"ids": (77,)}
    assert model.path.name.startswith("april-text-")
    assert not export_onnx(checkpoint, options).built
    changes = {"attention": "standard"}, {"activation": "quick_gelu"}
    others = [export_onnx(checkpoint, replace(options, **change)).path for change in changes]
    assert len({model.path, *others}) == 3
    facts = {entry.key: entry.value for entry in onnx.load(model.path).metadata_props}
    assert (facts["architecture"], facts["context"]) == ("clip-text", "77")
    assert facts["checkpoint_sha256"] == model.sha256


def test_a_graph_that_computes_something_else_is_not_written(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(self: TransformerGraph, x: str, kind: str, name: str) -> str:
        return self.node("Mul", [x, self.constant(np.float32(1.01 if self.fused else 1), name + ".wrong")], name)

    monkeypatch.setattr(TransformerGraph, "activation", scaled)
    with pytest.raises(CheckpointError, match="computes something else"):
        export_onnx(str(write_clip(tmp_path, "april")), TextOptions())


def test_sample_texts_are_texts_with_two_ends_among_them() -> None:
    texts = sample_texts(77)
    assert texts.dtype == np.int32
    assert ((texts >= 0) & (texts < 49408)).all()
    assert (texts[:, 0] == 49406).all()
    assert sorted((texts == 49407).sum(axis=1)) == [1, 1, 1, 2]
    assert len(set(texts.argmax(axis=1))) == 4


def test_hugging_face_names(tmp_path: Path) -> None:
    state, port = clip_state("april"), {}
    whole = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "logit_scale": "logit_scale",
    }
    parts = {
        "transformer.resblocks.": "text_model.encoder.layers.",
        "ln_": "layer_norm",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for name, tensor in state.items():
        if name.startswith("visual."):
            continue
        renamed = whole.get(name, name)
        for theirs, ours in parts.items() if name not in whole else ():
            renamed = renamed.replace(theirs, ours)
        if "attn.in_proj_" in renamed:
            block, kind = renamed.split("attn.in_proj_")
            for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
                port[f"{block}self_attn.{part}_proj.{kind}"] = rows.copy()
        elif renamed == "text_projection":
            port["text_projection.weight"] = np.ascontiguousarray(tensor.T)
        else:
            port[renamed] = tensor
    port["text_model.embeddings.position_ids"] = np.arange(77)[None]
    port["vision_model.post_layernorm.weight"] = np.ones(3, np.float32)
    save_file(port, tmp_path / "port.safetensors")
    save_file(state, tmp_path / "official.safetensors")
    found, expected = (read_text_transformer(tmp_path / f"{name}.safetensors") for name in ("port", "official"))
    for name in ("token_embedding", "positions", "projection"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_array_equal(found.norm, expected.norm)
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2"):
            for x, y in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("prefix", ["", "state_dict.module."])
def test_what_stands_beside_the_tower_changes_nothing(tmp_path: Path, prefix: str) -> None:
    state = clip_state("april") | {"input_resolution": np.array(70), "context_length": np.array(77)}
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "clip.safetensors")
    assert read_text_transformer(tmp_path / "clip.safetensors").width == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"token_embedding.weight": np.zeros((32000, 64), np.float32)},
            "vocabulary has 32000 tokens, CLIP's has 49408",
        ),
        ({"cls_emb": np.zeros(64, np.float32)}, "holds cls_emb, which belongs to an architecture"),
        ({"text_projection": None}, "lacks the tensor text_projection"),
        ({"text_projection": np.zeros((32, 24), np.float32)}, r"projection is \(32, 24\) instead of \(64, 24\)"),
        ({"positional_embedding": np.full((77, 64), np.nan, np.float32)}, "positions holds NaN"),
        ({"ln_final.weight": None}, "none of its .* is named as in a CLIP text tower"),
    ],
)
def test_other_architectures_are_refused(tmp_path: Path, change: dict[str, np.ndarray | None], message: str) -> None:
    state = {name: tensor for name, tensor in (clip_state("april") | change).items() if tensor is not None}
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_text_transformer(tmp_path / "clip.safetensors")


@pytest.mark.parametrize(("width", "heads"), [(512, 8), (640, 10), (768, 12), (1024, 16), (1280, 20)])
def test_heads_are_those_of_the_published_towers(text: TextTransformer, width: int, heads: int) -> None:
    wide = replace(text, token_embedding=np.zeros((1, width), np.float32))
    assert wide.attention_heads(None) == heads
    assert wide.attention_heads(4) == 4


def test_heads_of_odd_towers_must_be_named(text: TextTransformer) -> None:
    with pytest.raises(CheckpointError, match="100 wide has is not known; name the number with --heads"):
        replace(text, token_embedding=np.zeros((1, 100), np.float32)).attention_heads(None)
