"""Reading DINOv3, whose positions turn queries and keys; other towers: test_oracles.py and test_checkpoints.py."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from zsad.bench.towers import SHAPES, Shape, tower_state
from zsad.export.state_dict import CheckpointError
from zsad.export.vision_transformer import DINOV3, VisionTransformer, read_vision_transformer

TINY = Shape(DINOV3, 32, 2, patch_size=4, registers=2, head_width=16)


def state(**changes: NDArray) -> dict[str, NDArray]:
    """A tiny DINOv3 in its official names."""
    return {**tower_state(TINY), **changes}


def read(folder: Path, tensors: dict[str, NDArray]) -> VisionTransformer:
    save_file(tensors, folder / "dinov3.safetensors")
    return read_vision_transformer(folder / "dinov3.safetensors")


def test_every_tensor_is_read(tmp_path: Path) -> None:
    vit = read(tmp_path, state(mask_token=np.zeros((1, 32), np.float32)))
    assert (vit.architecture, vit.patch_size, vit.width, len(vit.registers), len(vit.blocks)) == (DINOV3, 4, 32, 2, 2)
    assert vit.attention_heads(None) == vit.attention_heads(2) == 2  # as the periods tell
    with pytest.raises(CheckpointError, match="those of 2 attention heads; leave out --heads 4"):
        vit.attention_heads(4)
    with pytest.raises(
        CheckpointError, match=r"holds blocks\.1\.attn\.q_norm\.weight, which belongs to an architecture"
    ):
        read(tmp_path, state(**{"blocks.1.attn.q_norm.weight": np.ones(16, np.float32)}))


def test_the_keys_have_no_bias(tmp_path: Path) -> None:
    for block in read(tmp_path, state()).blocks:
        queries, keys, values = np.split(block.qkv[1], 3)
        assert queries.all()
        assert not keys.any()
        assert values.all()


def test_the_largest_has_no_biases_there_at_all(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in state().items() if "qkv.bias" not in name}
    assert not any(block.qkv[1].any() for block in read(tmp_path, tensors).blocks)
    with pytest.raises(CheckpointError, match=r"lacks the tensor blocks\.1\.attn\.qkv\.bias"):
        read(tmp_path, {name: tensor for name, tensor in state().items() if name != "blocks.1.attn.qkv.bias"})


def test_the_class_token_may_have_a_norm_of_its_own(tmp_path: Path) -> None:
    norms = {f"{name}.{kind}": np.full(32, 3, np.float32) for name in ("cls_norm",) for kind in ("weight", "bias")}
    local = {name.replace("cls_norm", "local_cls_norm"): tensor for name, tensor in norms.items()}
    own = read(tmp_path, state(**norms, **local))
    assert [set(part) for part in own.class_norm] == [{3.0}, {3.0}]
    assert own.norm[0].std() > 0
    shared = read(tmp_path, state(**local))  # which only its training's small crops have
    assert shared.class_norm is shared.norm


@pytest.mark.parametrize(
    "name",
    [
        "downsample_layers.0.0.weight",
        "stages.0.layers.0.depthwise_conv.weight",
        "model.stages.0.layers.0.depthwise_conv.weight",
    ],
)
def test_a_convnext_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="unusable as an image tower: a ConvNeXt, as of DINOv3, has no tokens"):
        read(tmp_path, {name: np.zeros((2, 3, 4, 4), np.float32), "norm.weight": np.ones(2, np.float32)})


@pytest.mark.parametrize("periods", [np.ones(3), np.zeros(4), -np.ones(4), np.empty(0), np.full(4, np.nan)])
def test_periods_that_fit_no_heads_are_refused(tmp_path: Path, periods: NDArray) -> None:
    with pytest.raises(CheckpointError, match="periods above 0 of rotary positions fit no heads of a width of 32"):
        read(tmp_path, state(**{"rope_embed.periods": periods.astype(np.float32)}))


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 20), (4096, 32)])
def test_heads_are_those_of_the_published_towers(width: int, heads: int) -> None:
    assert DINOV3.attention_heads(width, None) == heads
    assert heads == next(
        (s.width // s.head_width for s in SHAPES.values() if (s.architecture, s.width) == (DINOV3, width)), 32
    )


def test_positions_turn_patches_alone_by_their_centres(tmp_path: Path) -> None:
    angles = read(tmp_path, state()).angles(heads=2, grid=3)
    assert angles.shape == (1 + 2 + 9, 8)
    assert not angles[:3].any()  # class token and registers
    assert not angles[3 + 4].any()  # the middle
    rows, columns = np.split(angles[3:].reshape(3, 3, 8), 2, axis=-1)
    np.testing.assert_allclose(rows[:, 0], rows[:, 2])
    np.testing.assert_allclose(columns, rows.transpose(1, 0, 2))
    periods = 100 ** (np.arange(4) / 4)
    np.testing.assert_allclose(rows[2, 0], 2 * np.pi * (2 / 3) / periods, rtol=1e-6)
