"""The text tower's graph against embeddings that open_clip computed."""

import itertools
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "precision", "attention"),
    [
        pytest.param(*options, marks=() if number in (0, 7) else pytest.mark.slow)
        for number, options in enumerate(itertools.product(ACTIVATIONS, ("fp32", "fp16"), ATTENTIONS))
    ],
)
def test_it_equals_open_clip(
    text: TextTransformer, run: Callable, activation: str, precision: str, attention: str
) -> None:
    arrays = text_arrays("clip_tiny")
    expected = arrays[f"{activation}_text_embedding"]
    found = run(build_text_graph(text, TextOptions(activation, None, precision, attention)), arrays["token_ids"])
    np.testing.assert_allclose(found, expected, atol=RELATIVE[precision] * np.abs(expected).max())
    other = arrays["gelu_text_embedding" if activation == "quick_gelu" else "quick_gelu_text_embedding"]
    assert np.abs(found - other).max() > 0.005


@pytest.mark.long
@pytest.mark.parametrize("attention", ["fused", pytest.param("standard", marks=pytest.mark.long)])
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "oracle"),
    [
        pytest.param("fp32", "graph", marks=pytest.mark.slow),
        ("fp16", "graph"),
        pytest.param("fp32", "torch", marks=pytest.mark.torch),
        pytest.param("fp16", "torch", marks=[pytest.mark.torch, pytest.mark.slow]),
    ],
)
def test_it_is_exported_beside_the_image_tower(empty_cache: Path, tmp_path: Path, precision: str, oracle: str) -> None:
    if oracle == "torch":
        pytest.importorskip("torch", reason="compares with PyTorch")
    checkpoint = str(write_clip(tmp_path, "april"))
    options = TextOptions(precision=precision)
    model = export_onnx(checkpoint, options, oracle=oracle)
    assert model.agreement.startswith(precision)
    assert model.inputs == {"ids": (None, 77)}
    assert model.path.name.startswith("april-text-")
    assert not export_onnx(checkpoint, options).built
    facts = {entry.key: entry.value for entry in onnx.load(model.path).metadata_props}
    assert (facts["architecture"], facts["context"]) == ("clip-text", "77")
    assert facts["checkpoint_sha256"] == model.sha256


@pytest.mark.slow
def test_other_options_are_other_files(empty_cache: Path, tmp_path: Path) -> None:
    checkpoint = str(write_clip(tmp_path, "april"))
    changes: list[dict[str, str]] = [{}, {"precision": "fp16"}, {"attention": "standard"}, {"activation": "quick_gelu"}]
    models = [export_onnx(checkpoint, replace(TextOptions(), **change)) for change in changes]
    assert all(model.built for model in models)
    assert len({model.path for model in models}) == len(changes)


def test_a_vocabulary_that_is_not_the_tokenizer_s_is_refused(tmp_path: Path) -> None:
    state = clip_state("april") | {"token_embedding.weight": np.zeros((32000, 64), np.float32)}
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match="vocabulary has 32000 tokens, CLIP's has 49408"):
        export_onnx(str(tmp_path / "clip.safetensors"), TextOptions(), tmp_path / "text.onnx")
    assert not (tmp_path / "text.onnx").exists()


@pytest.mark.slow
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
