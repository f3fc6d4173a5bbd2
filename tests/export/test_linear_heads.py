"""APRIL-GAN's linear layers: read from its own kind of file, refused where they do not fit."""

from pathlib import Path

import numpy as np
import pytest
from clip_checkpoints import ARRAYS, text_arrays
from safetensors.numpy import save_file

from zsad.export.linear_heads import read_linear_heads
from zsad.export.state_dict import CheckpointError

FILE = ARRAYS / "april_head.pth"


def test_the_file_of_the_reference_gives_its_logits() -> None:
    arrays = text_arrays("april")
    heads = read_linear_heads(FILE, layers=4, width=64, dimension=24)
    for block, (weight, bias) in zip(arrays["layers"], heads, strict=True):
        assert weight.dtype == bias.dtype == np.float32
        tokens = arrays[f"block_{block}"][:, 1:] @ weight.T + bias
        tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
        for index, category in enumerate(arrays["class_index"]):
            text = arrays[("text_bottle", "text_metal_nut")[category]]  # [D, 2]
            logits = 100 * (tokens[index] @ text).T.reshape(2, 7, 7)
            np.testing.assert_allclose(logits, arrays[f"zero_logits_{block}"][index], atol=1e-3)


def state(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    tensors = {}
    for layer in range(2):
        tensors[f"trainable_linearlayer.fc.{layer}.weight"] = np.zeros((3, 5), np.float32)
        tensors[f"trainable_linearlayer.fc.{layer}.bias"] = np.zeros(3, np.float32)
    renamed = {"trainable_linearlayer." + name.replace("_", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in {**tensors, **renamed}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc_2_weight": np.zeros((3, 5))}, "linear layers 0, 1, 2, but there are 2 taps; name as many"),
        ({"fc_1_weight": None, "fc_1_bias": None}, "linear layers 0, but there are 2 taps"),
        ({"fc_1_bias": None}, r"lacks the tensor trainable_linearlayer\.fc\.1\.bias: it is incomplete"),
        ({"fc_1_weight": np.zeros((3, 4))}, r"fc\.1 is \(3, 4\) with a bias \(3,\), but tokens of 5"),
        ({"fc_1_bias": np.zeros(4)}, r"fc\.1 is \(3, 5\) with a bias \(4,\)"),
        ({"fc_0_bias": np.full(3, np.nan)}, r"fc\.0 holds NaN"),
        ({"scale": np.ones(1)}, r"holds trainable_linearlayer\.scale; a file of APRIL-GAN holds"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    save_file(state(), tmp_path / "right.safetensors")
    assert len(read_linear_heads(tmp_path / "right.safetensors", 2, 5, 3)) == 2
    save_file(state(**changes), tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_linear_heads(tmp_path / "wrong.safetensors", 2, 5, 3)


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    save_file({"fc.0.weight": np.zeros((3, 5), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"holds fc\.0\.weight; a file of APRIL-GAN holds trainable_linearlayer"):
        read_linear_heads(tmp_path / "other.safetensors", 1, 5, 3)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_linear_heads(tmp_path / "empty.safetensors", 1, 5, 3)
