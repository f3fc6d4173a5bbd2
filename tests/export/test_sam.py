"""What is read from checkpoints of SAM and MobileSAM, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from zsad.bench.random_weights import mask_decoder_state, sam_encoder_state, tiny_encoder_state, write_states
from zsad.export.sam import (
    MaskDecoder,
    SamEncoder,
    TinyEncoder,
    dense_encoding,
    read_mask_decoder,
    read_sam_encoder,
    window_biases,
    window_places,
)
from zsad.export.state_dict import CheckpointError

DECODER = mask_decoder_state(32, hidden=48, quality=24)
SAM = sam_encoder_state(32, [3, 4, 3], 16, 4, out=32)
TINY = tiny_encoder_state((8, 16, 16, 32), (1, 1, 1, 1), (3, 4, 3), head=8, out=32)


def test_sizes_are_those_of_the_tensors(golden: Path) -> None:
    checkpoint = golden / "segmentation" / "sam_tiny.safetensors"
    encoder = read_sam_encoder(checkpoint)
    assert isinstance(encoder, SamEncoder)
    assert encoder.image_size == 192
    assert [block.side for block in encoder.blocks] == [5, 5, 12, 5]
    assert {block.heads for block in encoder.blocks} == {3}
    decoder = read_mask_decoder(checkpoint)
    assert (decoder.width, len(decoder.blocks), len(decoder.hyper)) == (32, 2, 3)
    with np.load(golden / "segmentation" / "sam_tiny.npz") as arrays:
        expected = arrays["dense_pe"].reshape(32, -1).T
    np.testing.assert_allclose(dense_encoding(decoder, 12), expected, atol=1e-6)


def test_both_kinds_of_encoder_are_told_apart_wherever_they_stand(tmp_path: Path) -> None:
    for name, state, kind in (("sam", SAM, SamEncoder), ("mobile", TINY, TinyEncoder)):
        whole = {f"model.{key}": value for key, value in {**state, **DECODER}.items()}
        path = write_states(tmp_path / f"{name}.safetensors", whole)
        assert isinstance(read_sam_encoder(path), kind)
        assert isinstance(read_mask_decoder(path), MaskDecoder)


def test_batch_norms_are_folded_and_heads_of_tinyvit_sorted(tmp_path: Path) -> None:
    encoder = read_sam_encoder(write_states(tmp_path / "mobile.safetensors", TINY))
    assert isinstance(encoder, TinyEncoder)
    name = "image_encoder.layers.0.downsample.conv2"
    gamma, beta, mean, variance = (TINY[f"{name}.bn.{x}"] for x in ("weight", "bias", "running_mean", "running_var"))
    x = 0.7
    expected = (TINY[name + ".c.weight"].sum(axis=(1, 2, 3)) * x - mean) / np.sqrt(variance + 1e-5) * gamma + beta
    found = encoder.downsamplings[0][1]
    np.testing.assert_allclose(found.weight.sum(axis=(1, 2, 3)) * x + found.bias, expected, atol=1e-5)
    block = encoder.stages[2][0]  # 32 channels, 4 heads of 8
    stored = TINY["image_encoder.layers.3.blocks.0.attn.qkv.weight"].reshape(4, 3, 8, 32)
    np.testing.assert_array_equal(block.block.qkv[0][32 + 2 * 8 + 1], stored[2, 1, 1])  # channel 1 of key of head 2
    biases = window_biases(block)
    assert biases.shape == (4, 9, 9)
    np.testing.assert_array_equal(biases[:, 0, 5], block.biases[:, 1 * 3 + 2])  # one row, two columns apart
    np.testing.assert_array_equal(biases, biases.swapaxes(1, 2))


@pytest.mark.parametrize(("grid", "side"), [(6, 3), (7, 3), (4, 14), (5, 5)])
def test_windows_hold_every_token_once(grid: int, side: int) -> None:
    places, back = window_places(grid, side)
    count = -(-grid // side)
    assert len(places) == (count * side) ** 2
    np.testing.assert_array_equal(places[back], np.arange(grid * grid))
    assert (places == grid * grid).sum() == len(places) - grid * grid
    inside = places.reshape(-1, side * side)
    for window in inside:
        tokens = window[window < grid * grid]
        assert np.ptp(tokens // grid) < side
        assert np.ptp(tokens % grid) < side


def without(name: str) -> Callable[[dict], None]:
    return lambda state: state.pop(name) is None


def replaced(name: str, value: np.ndarray) -> Callable[[dict], None]:
    return lambda state: state.update({name: value})


BLOCK, STAGE = "image_encoder.blocks.1.", "image_encoder.layers.2.blocks.0."


@pytest.mark.parametrize(
    ("state", "change", "message"),
    [
        (SAM, without(BLOCK + "attn.rel_pos_w"), r"lacks the tensor image_encoder\.blocks\.1\.attn\.rel_pos_w"),
        (
            SAM,
            replaced(BLOCK + "attn.rel_pos_w", np.zeros((5, 16), np.float32)),
            r"block 1 relative columns is \(5, 16",
        ),
        (SAM, replaced(BLOCK + "attn.rel_pos_h", np.zeros((9, 16), np.float32)), "no window of a grid of 4 × 4"),
        (SAM, replaced(BLOCK + "attn.rel_pos_h", np.zeros((7, 5), np.float32)), "no window of a grid"),
        (SAM, replaced("image_encoder.neck.0.weight", np.zeros((32, 32, 3, 3), np.float32)), "not 1×1"),
        (SAM, replaced("image_encoder.neck.4.weight", np.zeros(32, np.float32)), r"holds image_encoder\.neck\.4"),
        (SAM, replaced("image_encoder.pos_embed", np.zeros((1, 4, 5, 32), np.float32)), "positions is"),
        (SAM, replaced("image_encoder.neck.1.bias", np.full(32, np.nan, np.float32)), "NaN"),
        (TINY, replaced(STAGE + "attn.attention_biases", np.zeros((2, 15), np.float32)), "attention biases is"),
        (TINY, replaced(STAGE + "attn.attention_biases", np.zeros((5, 16), np.float32)), "do not fit"),
        (TINY, replaced(STAGE + "local_conv.bn.running_var", np.ones(3, np.float32)), "batch norm of"),
        (TINY, replaced(STAGE + "local_conv.c.weight", np.zeros((16, 1, 5, 5), np.float32)), "convolution 0 is"),
        (TINY, without("image_encoder.layers.0.downsample.conv3.c.weight"), "lacks the tensor"),
        (TINY, replaced("image_encoder.layers.1.blocks.0.attn.gate", np.zeros(3, np.float32)), r"holds .*attn\.gate"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(
    tmp_path: Path, state: dict[str, np.ndarray], change: Callable[[dict], None], message: str
) -> None:
    changed = dict(state)
    change(changed)
    with pytest.raises(CheckpointError, match=message):
        read_sam_encoder(write_states(tmp_path / "wrong.safetensors", changed))


def test_a_tinyvit_of_other_stages_is_refused(tmp_path: Path) -> None:
    state = tiny_encoder_state((8, 16, 32), (1, 1, 1), (3, 3), head=8, out=32)
    with pytest.raises(CheckpointError, match="2 stages of transformer blocks"):
        read_sam_encoder(write_states(tmp_path / "short.safetensors", state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("mask_decoder.iou_prediction_head.layers.2.bias"), "lacks the tensor"),
        (without("prompt_encoder.not_a_point_embed.weight"), "lacks the tensor"),
        (replaced("mask_decoder.mask_tokens.weight", np.zeros((5, 32), np.float32)), "tokens is"),
        (replaced("mask_decoder.output_upscaling.3.weight", np.zeros((8, 4, 3, 3), np.float32)), "enlargement 2 is"),
        (replaced("mask_decoder.hf_token.weight", np.zeros((1, 32), np.float32)), r"holds mask_decoder\.hf_token"),
        (replaced("mask_decoder.transformer.norm_final_attn.bias", np.full(32, np.inf, np.float32)), "infinite"),
        (
            replaced("mask_decoder.transformer.layers.1.self_attn.q_proj.weight", np.zeros((32, 16), np.float32)),
            "block 1 self attention query is",
        ),
    ],
)
def test_decoders_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    changed = dict(DECODER)
    change(changed)
    with pytest.raises(CheckpointError, match=message):
        read_mask_decoder(write_states(tmp_path / "wrong.safetensors", changed))


def test_foreign_files_are_refused(random_dinov2: Callable[..., Path]) -> None:
    for read, kind in ((read_sam_encoder, "image encoder"), (read_mask_decoder, "mask decoder")):
        with pytest.raises(CheckpointError, match=f"named as in a SAM or MobileSAM {kind}"):
            read(random_dinov2())
