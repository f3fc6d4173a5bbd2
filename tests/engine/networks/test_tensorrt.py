"""Graphs on TensorRT engines, with stand-ins for what only a GPU has."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_build import HostDevice
from host_tensorrt import HostContext, HostEngine, HostRuntimeCache, HostRuntimeConfig, loaded
from numpy.typing import NDArray
from tiny_graph import INPUTS, OUTPUTS, check_equal, images

from zsad.engine.networks import tensorrt as tensorrt_graphs
from zsad.engine.networks.network import run_in_parts
from zsad.engine.networks.onnx_runtime import OnnxRuntimeGraph
from zsad.engine.networks.tensorrt import TensorRTGraph
from zsad.export.libraries import EngineError
from zsad.export.onnx_export import ExportedModel, export_onnx
from zsad.export.options import SamMasksOptions

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX (pip install tensorrt-rtx)"
)


@needs_rtx
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (HostEngine, "ICudaEngine"),
        (HostContext, "IExecutionContext"),
        (HostRuntimeConfig, "IRuntimeConfig"),
        (HostRuntimeCache, "IRuntimeCache"),
    ],
)
def test_the_stand_ins_have_only_what_the_library_has(ours: type, theirs: str) -> None:
    import tensorrt_rtx

    calls = [name for name in vars(ours) if not name.startswith("_")]
    assert calls
    assert all(hasattr(getattr(tensorrt_rtx, theirs), name) for name in calls)
    assert hasattr(tensorrt_rtx.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(tensorrt_rtx.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert str(tensorrt_rtx.DataType.HALF) == "DataType.HALF"


def test_an_engine_gives_what_onnx_runtime_gives(model: ExportedModel, tensorrt: list[HostEngine]) -> None:
    device = HostDevice()
    engine = TensorRTGraph(model.path, model.path, device, 4)
    plain = OnnxRuntimeGraph(model.path, None, 4)
    assert (engine.inputs, engine.outputs) == (INPUTS, OUTPUTS)
    slots = [device.empty((5, 3, 70, 70), np.float32) for _ in range(2)]
    for turn, count in enumerate((4, 4, 4, 3, 4, 1)):
        start = turn % 2  # parts of a batch lie where TensorRT takes no inputs
        batch = slots[turn % 2][start : start + count]
        assert (batch.ctypes.data % 256 == 0) == (start == 0)
        batch[...] = images(count) + turn
        check_equal(engine.run({"images": batch}), plain.run({"images": images(count) + turn}))
    assert device.recordings == 1  # of full batches; others are queued launch by launch
    assert sorted(set(tensorrt[0].runs)) == [1, 3, 4]


@pytest.mark.slow
def test_an_input_that_all_rows_share_goes_with_every_part(
    golden_segmentation: Path, empty_cache: Path, tensorrt: list[HostEngine]
) -> None:
    model = export_onnx(str(golden_segmentation / "sam_tiny.safetensors"), SamMasksOptions(192, heads=4))
    device, arrays = HostDevice(), np.load(golden_segmentation / "sam_tiny.npz")
    engine, plain = TensorRTGraph(model.path, model.path, device, 24), OnnxRuntimeGraph(model.path, None, 24)
    assert engine.inputs == plain.inputs
    assert [spec.batched for spec in engine.inputs.values()] == [False, True]
    held = []  # so that every image's inputs lie elsewhere
    for image in (0, 1, 0):
        inputs = {
            "embedding": arrays[f"image{image}_embedding"][None],
            "points": arrays[f"image{image}_points_scaled"].astype(np.float32),
        }
        held.append({name: device.to_device(array) for name, array in inputs.items()})
        parts = list(run_in_parts(plain, inputs))
        for (rows, found), (expected_rows, expected) in zip(run_in_parts(engine, held[-1]), parts, strict=True):
            assert rows == expected_rows
            for name, output in found.items():
                np.testing.assert_array_equal(output, expected[name])
    assert device.recordings == 1
    assert tensorrt[0].runs.count(16) == 3


@pytest.mark.slow
def test_kernels_that_tensorrt_rtx_compiles_are_kept(
    model: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tensorrt_graphs, "load_engine", lambda path, number, onnx: loaded(HostEngine(onnx, 32), rtx=True)
    )
    device, engine = HostDevice(), tmp_path / "tiny.engine"
    kernels = tmp_path / "tiny.engine.kernels"

    def run(*batches: int) -> list[int]:
        graph = TensorRTGraph(engine, model.path, device, 4)
        for count in batches:
            found = graph.run({"images": device.to_device(images(count))})
            check_equal(found, OnnxRuntimeGraph(model.path, None, 4).run({"images": images(count)}))
        compiled: list[int] = graph._full.kernels.compiled
        return compiled

    assert run(4, 4, 3) == [4, 3]
    assert run(4, 3, 1, 1) == [1]
    written = kernels.stat().st_mtime_ns
    assert run(4, 1) == []
    assert kernels.stat().st_mtime_ns == written
    kernels.write_bytes(b"made by another version")
    assert run(3) == [3]
    assert kernels.read_bytes()[32:] == b"kernels \x03"
    recordings = device.recordings
    monkeypatch.setattr(HostContext, "is_stream_capturable", lambda self, stream: False)
    assert run(4, 4) == [4]
    assert device.recordings == recordings > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.engine.kernels"]


def test_an_engine_takes_no_more_than_its_profile(model: ExportedModel, tensorrt: list[HostEngine]) -> None:
    assert TensorRTGraph(model.path, model.path, HostDevice(), 99).largest_batch == 32


def test_an_engine_that_fails_says_so(
    model: ExportedModel, tensorrt: list[HostEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice()

    def says(message: str, batch: int = 1) -> None:
        with pytest.raises(EngineError, match=message):
            TensorRTGraph(model.path, model.path, device, 2).run({"images": device.to_device(images(batch))})

    for call, returned, message in [
        ("execute_async_v3", False, "the engine failed: no reason given"),
        ("set_tensor_address", False, "refuses the address of images"),
        ("set_input_shape", False, "refuses the shape"),
        ("update_device_memory_size_for_shapes", 0, "cannot lay its memory out for a batch of 2"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(HostContext, call, lambda self, *_, returned=returned: returned)
            says(message)
            says(message, batch=2)
    monkeypatch.setattr(HostEngine, "create_execution_context", lambda self, strategy: None)
    says("see nvidia-smi")


def test_an_engine_takes_as_large_a_batch_as_the_device_has_room_for(
    model: ExportedModel, tensorrt: list[HostEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice()
    empty = device.empty
    room = 3000

    def full(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        if dtype is np.uint8 and shape[0] > room:
            raise MemoryError("no room")
        return empty(shape, dtype)

    monkeypatch.setattr(device, "empty", full)
    graph = TensorRTGraph(model.path, model.path, device, 8)
    assert graph.largest_batch == 2  # 8 and 4 need more than 3000 bytes
    found = graph.run({"images": device.to_device(images(2))})
    check_equal(found, OnnxRuntimeGraph(model.path, None, 2).run({"images": images(2)}))
    room = 1000
    with pytest.raises(MemoryError, match="no room"):
        TensorRTGraph(model.path, model.path, device, 8)
