"""Graphs on OpenVINO, and which graphs it runs."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_graph import INPUTS, OUTPUTS, images

from zsad.engine.config import Config, NetworkSpec, Table
from zsad.engine.networks import build as networks
from zsad.engine.networks import fastest
from zsad.engine.networks.network import GraphRequest, TensorSpec
from zsad.engine.networks.onnx_runtime import OnnxRuntimeGraph
from zsad.engine.networks.openvino import OpenVINOGraph, compiled
from zsad.engine.networks.runtime import Runtime
from zsad.export.libraries import EngineError
from zsad.export.onnx_export import ExportedModel, export_onnx
from zsad.export.options import ExportOptions
from zsad.kernels.machine import available_cores, cache_folder

IMAGE = GraphRequest("dinov2", "image", ("tokens",))
AUTO = Runtime("onnxruntime", (), None, "tested", rival="openvino")

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs OpenVINO (pip install openvino)")


@pytest.fixture
def exact(random_dinov2: Callable[..., Path]) -> ExportedModel:
    """A tiny fp32 graph in standard operators with an image embedding."""
    return export_onnx(str(random_dinov2()), ExportOptions((0, 1), 70, attention="standard"))


@pytest.fixture
def config(random_dinov2: Callable[..., Path]) -> Config:
    spec = NetworkSpec(checkpoint=str(random_dinov2()), taps=(0,), image_size=70)
    return Config(preset="x", method="x", image_size=70, networks={"dinov2": spec}, settings=Table())


@needs_openvino
def test_batches_of_any_length_give_what_onnx_runtime_gives(exact: ExportedModel) -> None:
    theirs, graph = OnnxRuntimeGraph(exact.path, None, 3), OpenVINOGraph(exact.path, "fp32", 3)
    assert graph.inputs == theirs.inputs == INPUTS
    assert graph.outputs == theirs.outputs == {**OUTPUTS, "tokens": TensorSpec((2, 25, 64), np.dtype(np.float32))}
    kept = []
    for count in (3, 1, 2):
        expected, found = (each.run({"images": images(count)}) for each in (theirs, graph))
        assert list(found) == list(expected)
        kept += [(found[name], expected[name]) for name in expected]
    for found, expected in kept:  # later runs leave earlier results alone
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@needs_openvino
@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("int8", "f32"), ("bf16", "bf16")])
def test_fp32_is_fp32_whatever_the_processor_could_do_and_no_thread_is_pinned(
    exact: ExportedModel, precision: str, hint: str
) -> None:
    _, model = compiled(exact.path, precision)
    if precision != "bf16":  # which is fp32 where the processor has none
        assert model.get_property("INFERENCE_PRECISION_HINT").to_string() == hint
    assert model.get_property("INFERENCE_NUM_THREADS") == available_cores()
    assert not model.get_property("ENABLE_CPU_PINNING")
    assert model.get_property("NUM_STREAMS") == 1


INTERRUPTED = """
import signal, sys, threading
from pathlib import Path
from zsad.engine.networks.openvino import compiled
held = [compiled(Path(sys.argv[1]), "fp32")]
thread = threading.Thread(target=held.clear)
thread.start()
thread.join()
signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
signal.raise_signal(signal.SIGINT)
"""


@needs_openvino
@pytest.mark.slow
def test_an_interrupt_is_no_crash_once_another_thread_has_let_go_of_a_graph(exact: ExportedModel) -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", INTERRUPTED, str(exact.path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr


@needs_openvino
def test_what_openvino_cannot_read_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"^OpenVINO \S+ refuses bad\.onnx: .*; use --runtime onnxruntime, or auto"):
        compiled(tmp_path / "bad.onnx", "fp32")


@needs_openvino
def test_openvino_out_of_memory_is_a_memory_error(exact: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = OpenVINOGraph(exact.path, "fp32", 1)

    class Failing:
        def infer(self, inputs: Any, share_inputs: bool) -> Any:
            raise RuntimeError("Exception from src/x.cpp:1:\nbad_alloc")

    monkeypatch.setattr(graph, "_request", Failing())
    with pytest.raises(MemoryError, match=r"^bad_alloc$"):
        graph.run({"images": images(1)})


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_graph_is_compared_with_fp32_once(
    config: Config, precision: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "zsad")
    config = config.model_copy(update={"network_precision": precision})
    runtime = Runtime("openvino", (), None, "asked for")
    for compared in (1, 1):
        (network,) = networks.load_networks(config, [IMAGE], runtime, 1).values()
        assert network.libraries == {"openvino"}
        assert caplog.text.count(f"compiled by OpenVINO, {precision} against the fp32 graph") == compared
    monkeypatch.setattr(OpenVINOGraph, "run", wrong(OpenVINOGraph.run))
    for path in network_notes(config):
        path.write_text("{damaged")
    with pytest.raises(EngineError, match=r"in OpenVINO: it computes something else .*; or use --runtime onnxruntime$"):
        networks.load_networks(config, [IMAGE], runtime, 1)


def wrong(run: Callable[..., Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
    return lambda graph, inputs: {name: array[:, :, ::-1] for name, array in run(graph, inputs).items()}


def network_notes(config: Config) -> list[Path]:
    notes = list((cache_folder() / "models").glob("*.onnx.openvino-*.json"))
    assert notes
    return notes


@needs_openvino
@pytest.mark.parametrize(("openvino", "library", "rows"), [(0.9, "openvino", 2), (0.96, "onnxruntime", 4)])
def test_auto_takes_openvino_where_it_is_clearly_faster_and_measures_that_once(
    config: Config,
    openvino: float,
    library: str,
    rows: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", "zsad")
    measured = []

    def seconds(graphs: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, float]:
        measured.append((list(graphs), len(inputs["images"])))
        return {"onnxruntime": 1.0, "openvino": openvino}

    monkeypatch.setattr(networks, "seconds", seconds)
    for _ in range(2):
        (network,) = networks.load_networks(config, [IMAGE], AUTO, rows).values()
        assert network.libraries == {library}
    assert measured == [(["onnxruntime", "openvino"], rows)]
    assert (
        f"{library} runs it: a batch takes 1000 ms in onnxruntime and {1000 * openvino:.0f} ms in openvino"
        in caplog.text
    )
    networks.load_networks(config, [IMAGE], AUTO, rows + 1)  # other batches may be another matter
    assert len(measured) == 2


def test_auto_says_why_openvino_does_not_run_a_graph(
    config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(path: Path, precision: str, rows: int) -> None:
        tried.append(path)
        raise EngineError("OpenVINO 1 refuses it: no such operator")

    monkeypatch.setattr("zsad.engine.networks.openvino.OpenVINOGraph", refuse)
    for _ in range(2):
        (network,) = networks.load_networks(config, [IMAGE], AUTO, 1).values()
        assert network.libraries == {"onnxruntime"}
    assert len(tried) == 1
    assert caplog.text.count("onnxruntime runs it, since OpenVINO 1 refuses it: no such operator") == 1


def test_times_are_the_shortest_of_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0, 9, 9, 14, 14, 15, 15, 17, 17, 18.5, 18.5, 20.5, 20.5, 21.5, 21.5, 23])
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: next(clock))

    class Fake:
        def run(self, inputs: Any) -> None: ...

    assert fastest.seconds({"a": Fake(), "b": Fake()}, {}) == {"a": 1.0, "b": 2.0}
