"""Layers that do not bear 8 bits are found, and exported in fp32."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from processor import needs_vnni
from safetensors.numpy import load_file, save_file

from zsad.export.agreement import SMALLEST_COSINE, run_graph, token_cosines
from zsad.export.checkpoints import find_checkpoint
from zsad.export.onnx_export import export_onnx
from zsad.export.options import ExportOptions
from zsad.export.quantisation import ALLOWED, int8_errors, layers_in_fp32
from zsad.export.state_dict import CheckpointError
from zsad.export.transformer_graph import LINEAR_LAYERS
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


@pytest.mark.slow
def test_a_layer_behind_outlier_channels_is_found(random_dinov2: Callable[..., Path], tmp_path: Path) -> None:
    plain = read_vision_transformer(random_dinov2())
    outliers = read_vision_transformer(with_outliers(random_dinov2(), tmp_path / "outliers.safetensors"))
    options = replace(OPTIONS, outputs=("tokens",))
    usual, found = (int8_errors(vit, options) for vit in (plain, outliers))
    assert max(found, key=lambda layer: found[layer][1]) == "block1.fc1"
    assert found["block1.fc1"][0] == 0  # the tap in front of it
    assert found["block1.fc1"][1] > 20 * usual["block1.fc1"][1]
    np.testing.assert_allclose(found["block0.fc1"], usual["block0.fc1"], rtol=1e-3)
    assert "block1.fc1" in next(layers_in_fp32(found))
    assert "block1.fc1" not in next(layers_in_fp32(usual))
    assert set(int8_errors(outliers, replace(options, taps=(0,)))) == {f"block0.{layer}" for layer in LINEAR_LAYERS}


def test_ever_more_layers_stay_in_fp32() -> None:
    errors = {
        "mild": np.array([0.1, 0.5]),
        "late": np.array([0.0, 0.9]),
        "early": np.array([0.7, 0.1]),
        "broken": np.array([np.inf, np.inf]),
    }
    choices = list(layers_in_fp32({layer: ALLOWED * error for layer, error in errors.items()}))
    assert choices[0] == ("late", "broken")
    assert choices[-1] == tuple(errors)
    assert all(set(fewer) < set(more) for fewer, more in pairwise(choices))


@pytest.mark.slow
@needs_vnni
def test_an_export_keeps_as_many_in_fp32_as_the_graph_needs(
    random_dinov2: Callable[..., Path], tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(with_outliers(random_dinov2(), tmp_path / "outliers.safetensors"))
    model = export_onnx(checkpoint, OPTIONS)
    facts = {entry.key: entry.value for entry in onnx.load(model.path).metadata_props}
    assert "block1.fc1" in facts["exact"].split(",")
    assert f"{len(facts['exact'].split(','))} linear layers in fp32" in model.agreement

    offered = iter([(), ("block0.qkv",), ("block1.fc1",), ("block0.qkv", "block1.fc1")])
    monkeypatch.setattr("zsad.export.builders.layers_in_fp32", lambda *_: offered)
    taken = export_onnx(checkpoint, replace(OPTIONS, taps=(1,)))
    facts = {entry.key: entry.value for entry in onnx.load(taken.path).metadata_props}
    assert facts["exact"] == "block1.fc1"
    monkeypatch.setattr("zsad.export.builders.layers_in_fp32", lambda *_: [()])
    with pytest.raises(CheckpointError, match="computes something else"):
        export_onnx(checkpoint, replace(OPTIONS, taps=(1,), outputs=("tokens",)))


@pytest.mark.long
def test_photographs_keep_the_promised_cosine(real_data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The weights and taps of the preset `small`; its massive activations are what random weights do not have."""
    try:
        find_checkpoint("dinov2-vits14")
    except CheckpointError as error:
        pytest.skip(str(error))
    photographs = [min(good.iterdir()) for good in sorted(real_data.glob("*/test/good"))]
    resized = [np.asarray(Image.open(file).convert("RGB").resize((280, 280)), np.float32) for file in photographs]
    images = (np.stack(resized).transpose(0, 3, 1, 2) / 255 - 0.45) / 0.225
    tokens = []
    for precision in ("int8", "fp32"):
        if precision == "fp32":
            request.getfixturevalue("uncompared")
        options = ExportOptions((5, 8), 280, outputs=("tokens",), precision=precision)
        model = export_onnx("dinov2-vits14", options, tmp_path / f"{precision}.onnx")
        tokens.append(run_graph(model.path, {"images": images})["tokens"])
    assert token_cosines(tokens[1], tokens[0]).min() >= SMALLEST_COSINE["int8"]
