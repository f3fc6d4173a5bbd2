"""Machines with other libraries installed than this one."""

import types
from dataclasses import replace
from typing import Any

import pytest
from host_build import HostDevice

from zsad.engine.config import ConfigError
from zsad.engine.networks import runtime as runtimes
from zsad.export.libraries import EngineError
from zsad.kernels.cuda.device import DeviceError


def having(monkeypatch: pytest.MonkeyPatch, *installed: str, capability: str = "8.9") -> None:
    """A machine with some of cupy, a gpu, openvino, tensorrt, tensorrt-rtx and ONNX Runtime's CUDA provider (cuda)."""
    device = HostDevice()
    device.card = replace(device.card, compute_capability=capability)

    def open_devices(name: str) -> list[HostDevice]:
        if "gpu" not in installed:
            raise DeviceError("CuPy finds no CUDA device")
        return [device]

    def import_tensorrt(target: str) -> Any:
        if target not in installed:
            raise EngineError(f"{target} is not installed; run: pip install it")
        return types.SimpleNamespace(__version__="1.7")

    providers = [*(["CUDAExecutionProvider"] if "cuda" in installed else []), "CPUExecutionProvider"]

    def import_openvino() -> Any:
        if "openvino" not in installed:
            raise EngineError("OpenVINO is not installed; run: pip install it")
        return types.SimpleNamespace(__version__="2026.1.0-18000-abc")

    monkeypatch.setattr(runtimes, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(runtimes, "import_openvino", import_openvino)
    monkeypatch.setattr("zsad.kernels.cuda.device.open_devices", open_devices)
    monkeypatch.setattr(runtimes, "import_tensorrt", import_tensorrt)
    onnx_runtime = types.SimpleNamespace(get_available_providers=lambda: providers, __version__="1.26")
    monkeypatch.setattr(runtimes, "import_onnxruntime", lambda: onnx_runtime)

    def try_provider(device: HostDevice) -> None:
        if "old-driver" in installed:
            raise ConfigError("ONNX Runtime could not start its CUDA provider; use --device cpu")

    monkeypatch.setattr(runtimes, "try_provider", try_provider)
