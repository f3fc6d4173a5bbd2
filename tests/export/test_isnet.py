"""Reading IS-Net: files that are damaged, incomplete or another network's are refused."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from zsad.bench.random_weights import isnet_state
from zsad.export.isnet import NORM_EPS, Convolution, read_isnet
from zsad.export.state_dict import CheckpointError


def with_changes(path: Path, prefix: str = "", **changes: np.ndarray | None) -> Path:
    """Write a random checkpoint, some tensors changed or (None) left out."""
    tensors = {**isnet_state(8), **changes}
    save_file({prefix + name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def test_every_tensor_of_the_reference_is_known(golden_segmentation: Path) -> None:
    isnet = read_isnet(golden_segmentation / "isnet_tiny.safetensors")
    assert [len(stage.down) for stage in isnet.encoder] == [7, 6, 5, 4, 4, 4]
    assert [stage.name for stage in (*isnet.encoder, *isnet.decoder) if stage.flat] == ["stage5", "stage6", "stage5d"]
    parts = [part for stage in (*isnet.encoder, *isnet.decoder) for part in (stage.entry, *stage.down, *stage.up)]
    assert len(parts) == 112


def test_names_may_have_a_prefix_and_other_side_outputs_be_missing(tmp_path: Path) -> None:
    changes = {f"side{number}.{kind}": None for number in range(2, 7) for kind in ("weight", "bias")}
    plain = read_isnet(with_changes(tmp_path / "plain.safetensors"))
    found = read_isnet(with_changes(tmp_path / "isnet.safetensors", "module.", **changes))
    np.testing.assert_array_equal(found.decoder[-1].up[-1].weight, plain.decoder[-1].up[-1].weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage3.rebnconv2.bn_s1.running_var": None}, "lacks the tensor stage3.rebnconv2.bn_s1.running_var"),
        ({"stage1d.rebnconv6d.conv_s1.weight": None}, "lacks the tensor stage1d.rebnconv6d.conv_s1.weight"),
        ({"conv_in.weight": None}, "lacks the tensor conv_in.weight"),
        ({"stage6.rebnconv5.conv_s1.weight": np.zeros((32, 32, 3, 3), np.float32)}, "holds stage6.rebnconv5"),
        ({"outconv.weight": np.zeros((1, 6, 1, 1), np.float32)}, "holds outconv.weight"),
        (
            {"conv_in.weight": np.zeros((8, 1, 3, 3), np.float32)},
            r"conv_in is \(8, 1, 3, 3\) instead of \(8, 3, 3, 3\)",
        ),
        ({"side1.weight": np.zeros((2, 8, 3, 3), np.float32)}, r"side1 is \(2, 8, 3, 3\) instead of \(1, 8, 3, 3\)"),
        ({"stage2.rebnconv1.conv_s1.weight": np.zeros((4, 16, 5, 5), np.float32)}, "stage2.rebnconv1 is"),
        ({"stage4d.rebnconvin.conv_s1.weight": np.zeros((32, 64, 3, 3), np.float32)}, "instead of .32, 128, 3, 3."),
        ({"stage1.rebnconv1d.bn_s1.running_mean": np.zeros(7, np.float32)}, "stage1.rebnconv1d mean is"),
        ({"stage1.rebnconvin.bn_s1.bias": np.full(8, np.nan, np.float32)}, "NaN or infinite"),
        ({"stage1.rebnconvin.bn_s1.running_var": np.full(8, -1, np.float32)}, "stage1 has a variance below 0"),
        ({"stage1.rebnconvin.conv_s1.weight": None}, "none of its .* named as in a DIS foreground network"),
    ],
)
def test_what_is_no_isnet_is_refused(tmp_path: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_isnet(with_changes(tmp_path / "isnet.safetensors", **changes))


def test_a_folded_convolution_computes_the_norm() -> None:
    rng = np.random.default_rng(0)
    scale, shift, mean, variance, bias = rng.uniform(0.5, 2, (5, 4)).astype(np.float32)
    weight = rng.normal(size=(4, 2, 3, 3)).astype(np.float32)
    x = rng.normal(size=(2, 3, 3))
    folded_weight, folded_bias = Convolution(weight, bias, scale, shift, mean, variance).folded()
    convolved = np.einsum("oiyx,iyx->o", weight, x) + bias
    expected = (convolved - mean) / np.sqrt(variance + NORM_EPS) * scale + shift
    np.testing.assert_allclose(np.einsum("oiyx,iyx->o", folded_weight, x) + folded_bias, expected, rtol=1e-5)
