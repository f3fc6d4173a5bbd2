"""Graphs on ONNX Runtime."""

import re
import types
from typing import Any

import pytest
from host_build import HostDevice
from tiny_graph import INPUTS, OUTPUTS, check_equal, images

from zsad.engine.config import ConfigError
from zsad.engine.networks.onnx_runtime import OnnxRuntimeGraph
from zsad.export.libraries import import_onnxruntime
from zsad.export.onnx_export import ExportedModel


def test_io_binding_gives_what_a_plain_session_gives(model: ExportedModel) -> None:
    device = HostDevice()
    plain = OnnxRuntimeGraph(model.path, None, 3)
    bound = OnnxRuntimeGraph(model.path, device, 3)
    assert bound.inputs == plain.inputs == INPUTS
    assert bound.outputs == plain.outputs == OUTPUTS
    for count in (3, 1, 2):  # outputs that are longer than the batch keep their rest
        check_equal(bound.run({"images": device.to_device(images(count))}), plain.run({"images": images(count)}))


def test_onnx_runtime_out_of_memory_is_a_memory_error(model: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = OnnxRuntimeGraph(model.path, None, 2)

    def fail(message: str) -> Any:
        def run(*_: object) -> None:
            raise RuntimeError(message)

        return types.SimpleNamespace(run=run)

    for message in (
        "Failed to allocate memory for requested buffer of size 99",
        "BFCArena::AllocateRawInternal Available memory of 0 is smaller than requested bytes",
        "CUDA failure 2: out of memory ; GPU=0",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED",
        "std::bad_alloc",
    ):
        monkeypatch.setattr(graph, "_session", fail(message))
        with pytest.raises(MemoryError, match=re.escape(message)):
            graph.run({"images": images(1)})
    monkeypatch.setattr(graph, "_session", fail("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        graph.run({"images": images(1)})


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_what_onnx_runtime_prints_is_no_result(
    model: ExportedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HostDevice, "kind", "cuda")
    ort = import_onnxruntime()
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudart.so.12"), raising=False)
    with pytest.raises(ConfigError, match="could not start its CUDA provider"):
        OnnxRuntimeGraph(model.path, HostDevice(), 1)
    said = capsys.readouterr()
    assert "libcudart" not in said.out
    assert "libcudart" in said.err
