"""Graphs on ONNX Runtime."""

import types
from typing import Any

import pytest
from host_build import HostDevice
from tiny_graph import INPUTS, OUTPUTS, check_equal, images

from zsad.engine.networks.onnx_runtime import OnnxRuntimeGraph
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

    monkeypatch.setattr(graph, "_session", fail("Failed to allocate memory for requested buffer of size 99"))
    with pytest.raises(MemoryError, match="size 99"):
        graph.run({"images": images(1)})
    monkeypatch.setattr(graph, "_session", fail("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        graph.run({"images": images(1)})
