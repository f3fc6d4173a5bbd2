"""Reading CLIPSeg's decoder, and refusing what is none."""

from pathlib import Path

import numpy as np
import pytest
from clipseg_checkpoints import original_decoder
from safetensors.numpy import load_file, save_file

from zsad.export.clipseg import ClipSegDecoder, read_clipseg_decoder
from zsad.export.state_dict import CheckpointError


def same(a: object, b: object) -> None:
    """Compare what is nested in decoders."""
    if isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        assert type(a) is type(b)
        same(list(vars(a).values()), list(vars(b).values()))


@pytest.fixture(scope="module")
def tiny(golden: Path) -> dict[str, np.ndarray]:
    return load_file(golden / "segmentation" / "clipseg_tiny.safetensors")


def read(state: dict[str, np.ndarray], folder: Path) -> ClipSegDecoder:
    save_file(state, folder / "clipseg.safetensors")
    return read_clipseg_decoder(folder / "clipseg.safetensors")


def test_both_names_are_read_alike(tiny: dict[str, np.ndarray], tmp_path: Path) -> None:
    port, original = read(tiny, tmp_path), read(original_decoder(tiny), tmp_path)
    same(port, original)
    assert (port.width, port.token_width, port.dimension, port.patch_size) == (16, 48, 24, 16)
    np.testing.assert_array_equal(port.blocks[1].qkv[0][16:32], tiny["decoder.layers.1.self_attn.k_proj.weight"])


@pytest.mark.long
def test_sizes_of_the_published_decoder(published_clipseg: Path) -> None:
    decoder = read_clipseg_decoder(published_clipseg)
    assert (decoder.width, decoder.token_width, decoder.dimension, decoder.patch_size) == (64, 768, 512, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.film_mul.weight": None}, r"looked for film_mul\.weight"),
        ({"decoder.film_mul.bias": None}, r"lacks the tensor decoder\.film_mul\.bias: it is incomplete"),
        ({"decoder.layers.2.mlp.fc2.weight": None}, r"lacks the tensor decoder\.layers\.2\.mlp\.fc2\.weight"),
        ({"decoder.layers.2.norm_extra": (3,)}, r"holds decoder\.layers\.2\.norm_extra, which belongs to"),
        ({"decoder.extra_blocks.0.linear1.weight": (3,)}, r"holds decoder\.extra_blocks\.0\.linear1\.weight, which"),
        ({"decoder.reduces.3.weight": (16, 48), "decoder.reduces.3.bias": (16,)}, "3 blocks for 4 of the image tower"),
        ({"decoder.reduces.1.weight": (16, 40)}, r"reduce 1 is \(16, 40\) instead of \(16, 48\)"),
        ({"decoder.film_add.weight": (16, 20)}, r"film_add is \(16, 20\) instead of \(16, 24\)"),
        ({"decoder.layers.0.mlp.fc1.weight": (80, 16), "decoder.layers.0.mlp.fc1.bias": (80,)}, "block 0 fc1 is gated"),
        ({"decoder.transposed_convolution.0.weight": (16, 16, 1, 1)}, r"convolution is \(16, 16, 1, 1\) instead of"),
        ({"decoder.transposed_convolution.2.weight": (16, 8, 4, 2)}, r"upsampling 0 is \(16, 8, 4, 2\) instead of"),
        ({"decoder.transposed_convolution.2.weight": (16, 9, 4, 4)}, r"upsampling 0 is \(16, 9, 4, 4\) instead of"),
        ({"decoder.transposed_convolution.4.weight": (8, 16)}, r"upsampling 1 is \(8, 16\) instead of"),
        ({"decoder.transposed_convolution.4.bias": (2,)}, r"upsampling 1 bias is \(2,\) instead of \(1,\)"),
    ],
)
def test_other_decoders_are_refused(
    tiny: dict[str, np.ndarray], tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    state = dict(tiny)
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = np.zeros(shape, np.float32)
    with pytest.raises(CheckpointError, match=message):
        read(state, tmp_path)


def test_numbers_that_are_none_are_refused(tiny: dict[str, np.ndarray], tmp_path: Path) -> None:
    state = tiny | {"decoder.transposed_convolution.4.bias": np.full(1, np.inf, np.float32)}
    with pytest.raises(CheckpointError, match="upsampling 1 bias holds NaN or infinite values"):
        read(state, tmp_path)


@pytest.mark.parametrize("original", [False, True])
def test_a_decoder_that_is_not_refined_is_refused(tiny: dict[str, np.ndarray], tmp_path: Path, original: bool) -> None:
    state = original_decoder(tiny) if original else dict(tiny)
    head = "trans_conv." if original else "decoder.transposed_convolution."
    for name in [name for name in state if name.startswith(head)]:
        del state[name]
    state |= {head + "weight": np.zeros((16, 1, 16, 16), np.float32), head + "bias": np.zeros(1, np.float32)}
    with pytest.raises(CheckpointError, match="not the refined one"):
        read(state, tmp_path)
