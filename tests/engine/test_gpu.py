"""Networks and whole runs on a real device, in every runtime that it has."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import draw, record, scores_and_maps

from zsad.engine import workplace
from zsad.engine.commands import infer as cli
from zsad.engine.config import Config, ConfigError, load_config
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.networks import runtime as runtimes
from zsad.engine.networks.build import export_options, load_networks
from zsad.engine.networks.network import GraphRequest, Network, TensorSpec, run_in_parts
from zsad.engine.networks.runtime import Runtime, choose_runtime
from zsad.export.agreement import check_agreement, run_graph
from zsad.export.checkpoints import find_checkpoint
from zsad.export.onnx_export import export_onnx
from zsad.export.vision_transformer import read_vision_transformer
from zsad.kernels.cuda.device import Device

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


class TorchTower:
    """An image tower in PyTorch on the device's stream (see `Graph`): what a GPU without an engine library has."""

    def __init__(self, config: Config, request: GraphRequest, runtime: Runtime, batch_size: int) -> None:
        import torch

        from zsad.export.torch_forward import TorchForward

        assert runtime.device is not None
        spec = config.networks[request.network]
        options = export_options(spec, request, "fp16", "fused")
        path, self.sha256 = find_checkpoint(spec.checkpoint)
        vit = read_vision_transformer(path)
        patches = (spec.side // vit.patch_size) ** 2
        self.inputs = {"images": TensorSpec((3, spec.side, spec.side), np.dtype(np.float32))}
        self.outputs = {
            "tokens": TensorSpec((len(options.taps), patches, vit.width), np.dtype(np.float16)),
            "embedding": TensorSpec((vit.width,), np.dtype(np.float32)),
        }
        self.outputs = {name: self.outputs[name] for name in request.outputs}
        self.largest_batch = batch_size
        self._torch, self._stream = torch, torch.cuda.ExternalStream(runtime.device.stream)
        self._forward = TorchForward(vit, options, f"cuda:{runtime.device.number}", torch.float16)
        torch.cuda.synchronize()

    def run(self, inputs: Any) -> dict[str, Any]:
        import cupy

        with self._torch.cuda.stream(self._stream):
            outputs = self._forward(self._torch.from_dlpack(inputs["images"]).half())
        with cupy.cuda.ExternalStream(self._stream.cuda_stream):
            if "embedding" in outputs:
                outputs["embedding"] = outputs["embedding"].float()
            return {name: cupy.from_dlpack(output) for name, output in outputs.items()}


def torch_networks(
    config: Config, requests: list[GraphRequest], runtime: Runtime, batch_size: int
) -> dict[str, Network]:
    found = {}
    for request in requests:
        tower, spec = TorchTower(config, request, runtime, batch_size), config.networks[request.network]
        preprocessing = spec.preprocessing or "imagenet"
        found[request.network] = Network(spec, spec.checkpoint, tower.sha256, preprocessing, {"image": tower})
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_network_gives_what_its_graph_gives(gpu: Device, two_networks: Path, library: str) -> None:
    runtime = runtime_of(library)
    config = load_config("challenge", two_networks, method_of=method_class)
    (request,) = (each for each in graph_requests(config) if each.network == "clip")
    images = np.random.default_rng(0).normal(size=(11, 3, 70, 70)).astype(np.float32)
    spec = config.networks["clip"]
    expected = run_graph(
        export_onnx(spec.checkpoint, export_options(spec, request, "fp32", "fused")).path, {"images": images}
    )
    tower = load_networks(config, [request], runtime, 4)["clip"].graphs["image"]
    for _ in range(3):  # recorded, replayed, and shorter than a full batch
        outputs: dict[str, list[Any]] = {name: [] for name in tower.outputs}
        for _, arrays in run_in_parts(tower, {"images": gpu.to_device(images)}):
            for name, array in arrays.items():
                outputs[name].append(gpu.to_host(array).astype(np.float32))
        found = {name: np.concatenate(parts) for name, parts in outputs.items()}
        check_agreement(found, expected, "fp16", "the fp32 graph")


@pytest.mark.parametrize("limit", [[], ["--memory-limit", "230KB"]], ids=["resident", "spilled"])
@pytest.mark.parametrize("library", [*LIBRARIES, "torch"])
def test_a_run_on_the_device_equals_one_on_the_cpu(
    gpu: Device,
    two_networks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    library: str,
    limit: list[str],
) -> None:
    data = draw(tmp_path / "data", 11)
    (data / "05.png").write_bytes(b"no image")
    common = [str(data), "--preset", "challenge", "--config", str(two_networks), "-v"]
    assert cli.main([*common, "--device", "cpu", "--output", "cpu"]) == 1
    if library == "torch":
        if importlib.util.find_spec("torch") is None:
            pytest.skip("needs PyTorch")
        monkeypatch.setattr(runtimes, "choose_runtime", lambda *_: Runtime("onnxruntime", [gpu], gpu, "tested"))
        monkeypatch.setattr(workplace, "load_networks", torch_networks)
        common += ["--device", "cuda"]
    else:
        runtime_of(library)
        common += ["--device", "cuda", "--runtime", library]
    assert cli.main([*common, "--batch-size", "4", "--output", "gpu", *limit]) == 1
    assert ("are read in chunks" in capsys.readouterr().err) == bool(limit)
    (scores, maps), (expected, expected_maps) = scores_and_maps("gpu"), scores_and_maps("cpu")
    np.testing.assert_allclose(scores, expected, atol=0.02)
    for one, other in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02)
    assert record("gpu")["device"] == "cuda:0"
