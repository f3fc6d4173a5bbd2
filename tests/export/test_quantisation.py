"""Layers that do not bear 8 bits are found, and exported in fp32."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from zsad.export.checkpoints import find_checkpoint
from zsad.export.onnx_export import ExportOptions, export_onnx
from zsad.export.parity import SMALLEST_COSINE, run_graph, token_cosines
from zsad.export.quantisation import sensitive_layers
from zsad.export.state_dict import CheckpointError
from zsad.export.vision_transformer import read_vision_transformer

OPTIONS = ExportOptions(taps=(0, 1), image_size=70, precision="int8")


def with_outliers(checkpoint: Path, file: Path, channels: int = 1) -> Path:
    """Write a checkpoint whose second block has channels in front of fc1 that are 1000 times as large as the others."""
    state = dict(load_file(checkpoint))
    for name in ("weight", "bias"):
        state[f"blocks.1.norm2.{name}"][:channels] *= 1000
    state["blocks.1.mlp.fc1.weight"][:, :channels] /= 1000
    save_file(state, file)
    return file


def test_a_layer_behind_outlier_channels_is_found(random_dinov2: Callable[..., Path], tmp_path: Path) -> None:
    plain = read_vision_transformer(random_dinov2())
    outliers = read_vision_transformer(with_outliers(random_dinov2(), tmp_path / "outliers.safetensors"))
    arguments = (70, "gelu", 1, None)
    expected = set(sensitive_layers(plain, 2, *arguments)) | {"block1.fc1"}
    found = sensitive_layers(outliers, 2, *arguments)
    assert set(found) == expected
    assert "block1.fc1" not in sensitive_layers(plain, 2, *arguments)
    assert found == sensitive_layers(outliers, 2, *arguments)
    assert "block1.fc1" not in sensitive_layers(outliers, 1, *arguments)


def test_an_export_leaves_them_in_fp32(
    random_dinov2: Callable[..., Path], tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(with_outliers(random_dinov2(), tmp_path / "outliers.safetensors"))
    model = export_onnx(checkpoint, OPTIONS)
    facts = {entry.key: entry.value for entry in onnx.load(model.path).metadata_props}
    assert "block1.fc1" in facts["exact"].split(",")
    monkeypatch.setattr("zsad.export.onnx_export.sensitive_layers", lambda *_: ())
    with pytest.raises(CheckpointError, match="computes something else"):
        export_onnx(checkpoint, replace(OPTIONS, taps=(1,)))


def test_photographs_keep_the_promised_cosine(real_data: Path, tmp_path: Path) -> None:
    """The weights and taps of the preset `small`; its massive activations are what random weights do not have."""
    try:
        find_checkpoint("dinov2-vits14")
    except CheckpointError as error:
        pytest.skip(str(error))
    photographs = [min((category / "test" / "good").iterdir()) for category in sorted(real_data.glob("*/"))]
    resized = [np.asarray(Image.open(file).convert("RGB").resize((280, 280)), np.float32) for file in photographs]
    images = (np.stack(resized).transpose(0, 3, 1, 2) / 255 - 0.45) / 0.225
    tokens = []
    for precision in ("fp32", "int8"):
        options = ExportOptions((5, 8), 280, embedding=False, precision=precision)
        model = export_onnx("dinov2-vits14", options, tmp_path / f"{precision}.onnx")
        tokens.append(run_graph(model.path, images)[0])
    assert token_cosines(tokens[1], tokens[0]).min() >= SMALLEST_COSINE["int8"]
