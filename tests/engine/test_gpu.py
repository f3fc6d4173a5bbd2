"""Backbones and whole runs on a real device, in every runtime that it has."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import draw, record, scores_and_maps

from zsad.engine.commands import infer as cli
from zsad.engine.config import Config, ConfigError, load_config
from zsad.engine.networks.runtime import Runtime, choose_runtime, load_backbone, run_in_parts
from zsad.export.agreement import check_agreement, run_graph
from zsad.export.checkpoints import find_checkpoint
from zsad.export.onnx_export import export_onnx
from zsad.export.vision_transformer import read_vision_transformer
from zsad.kernels import cuda

pytestmark = pytest.mark.gpu

LIBRARIES = ("tensorrt", "tensorrt-rtx", "onnxruntime")


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def runtime_of(library: str) -> Runtime:
    """A runtime on the device; skips the test where the machine lacks it."""
    try:
        runtime = choose_runtime("cuda", library)
    except ConfigError as error:
        pytest.skip(str(error))
    if runtime.device is None:
        pytest.skip(runtime.reason)
    return runtime


class TorchBackbone:
    """An image tower in PyTorch on the device's stream (see `Backbone`): what a GPU without an engine library has."""

    def __init__(self, config: Config, name: str, runtime: Runtime, batch_size: int) -> None:
        import torch

        from zsad.export.torch_forward import TorchForward

        assert runtime.device is not None
        options = config.export_options(name, "fp16", "fused")
        self.checkpoint = config.backbones[name].checkpoint
        path, self.sha256 = find_checkpoint(self.checkpoint)
        vit = read_vision_transformer(path)
        side = config.image_size // vit.patch_size
        self.grid, self.layers, self.channels = (side, side), len(options.taps), vit.width
        self.token_type, self.largest_batch = np.dtype(np.float16), batch_size
        self._torch, self._stream = torch, torch.cuda.ExternalStream(runtime.device.stream)
        self._forward = TorchForward(vit, options, f"cuda:{runtime.device.number}", torch.float16)
        torch.cuda.synchronize()
        self.embedding_width = vit.width if options.embedding else None

    def run(self, images: Any) -> tuple[Any, Any]:
        import cupy

        with self._torch.cuda.stream(self._stream):
            tokens, *embedding = self._forward(self._torch.from_dlpack(images).half())
        with cupy.cuda.ExternalStream(self._stream.cuda_stream):
            return cupy.from_dlpack(tokens), cupy.from_dlpack(embedding[0].float()) if embedding else None


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_backbone_gives_what_its_graph_gives(gpu: cuda.Device, two_backbones: Path, library: str) -> None:
    runtime = runtime_of(library)
    config = runtime.resolve(load_config("challenge", two_backbones))
    images = np.random.default_rng(0).normal(size=(11, 3, 70, 70)).astype(np.float32)
    expected = run_graph(
        export_onnx(config.backbones["clip"].checkpoint, config.export_options("clip", "fp32", "fused")).path, images
    )
    backbone = load_backbone(config, "clip", runtime, 4)
    for _ in range(3):  # recorded, replayed, and shorter than a full batch
        outputs: list[list[Any]] = [[], []]
        for _, *arrays in run_in_parts(backbone, gpu.to_device(images)):
            for output, array in zip(outputs, arrays, strict=True):
                output.append(gpu.to_host(array).astype(np.float32))
        check_agreement([np.concatenate(output) for output in outputs], expected, "fp16", "the fp32 graph")


@pytest.mark.parametrize("limit", [[], ["--memory-limit", "230KB"]], ids=["resident", "spilled"])
@pytest.mark.parametrize("library", [*LIBRARIES, "torch"])
def test_a_run_on_the_device_equals_one_on_the_cpu(
    gpu: cuda.Device,
    two_backbones: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    library: str,
    limit: list[str],
) -> None:
    data = draw(tmp_path / "data", 11)
    (data / "05.png").write_bytes(b"no image")
    common = [str(data), "--preset", "challenge", "--config", str(two_backbones), "-v"]
    assert cli.main([*common, "--device", "cpu", "--output", "cpu"]) == 1
    if library == "torch":
        if importlib.util.find_spec("torch") is None:
            pytest.skip("needs PyTorch")
        monkeypatch.setattr(cli, "choose_runtime", lambda *_: Runtime("onnxruntime", [gpu], gpu, "tested"))
        monkeypatch.setattr(cli, "load_backbone", TorchBackbone)
        common += ["--device", "cuda"]
    else:
        runtime_of(library)
        common += ["--device", "cuda", "--runtime", library]
    assert cli.main([*common, "--batch-size", "4", "--output", "gpu", *limit]) == 1
    assert ("are read in blocks" in capsys.readouterr().err) == bool(limit)
    (scores, maps), (expected, expected_maps) = scores_and_maps("gpu"), scores_and_maps("cpu")
    np.testing.assert_allclose(scores, expected, atol=0.02)
    for one, other in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02)
    assert record("gpu")["device"] == "cuda:0"
