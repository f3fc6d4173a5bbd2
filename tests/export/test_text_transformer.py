"""Reading CLIP's text tower, and refusing what is none."""

from pathlib import Path

import numpy as np
import pytest
from clip_checkpoints import clip_state
from safetensors.numpy import save_file

from zsad.export.state_dict import CheckpointError
from zsad.export.text_transformer import TextTransformer, read_text_transformer


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
        ({"token_embedding.weight": np.zeros((99, 32), np.float32)}, r"positions is \(77, 64\) instead of \(77, 32\)"),
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


def tower(width: int) -> TextTransformer:
    """A tower without blocks."""
    norm = np.ones(width, np.float32), np.zeros(width, np.float32)
    rows = np.zeros((1, width), np.float32)
    return TextTransformer(rows, rows, [], norm, rows.T)


@pytest.mark.parametrize(("width", "heads"), [(512, 8), (640, 10), (768, 12), (1024, 16), (1280, 20)])
def test_heads_are_those_of_the_published_towers(width: int, heads: int) -> None:
    wide = tower(width)
    assert wide.attention_heads(None) == heads
    assert wide.attention_heads(4) == 4


def test_heads_of_odd_towers_must_be_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"100 wide has is not known; name the number with --heads \(or `text_heads` of"
    ):
        tower(100).attention_heads(None)
