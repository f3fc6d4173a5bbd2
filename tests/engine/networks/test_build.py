"""Networks made ready: from checkpoints and engines to scores."""

import importlib.util
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_checkpoints import normalised, text_arrays, write_clip
from host_build import COMPILER, MISSING_COMPILER, HostDevice
from host_tensorrt import HostEngine, loaded
from runs import draw, record, scores_and_maps

from zsad.engine.commands.export import main as export
from zsad.engine.commands.infer import main
from zsad.engine.config import Config, NetworkSpec, Table
from zsad.engine.networks import build as networks
from zsad.engine.networks import runtime as runtimes
from zsad.engine.networks import tensorrt as tensorrt_graphs
from zsad.engine.networks.network import GraphRequest, TensorSpec, run_in_parts
from zsad.export import tensorrt_engine
from zsad.export.libraries import EngineError

needs_compiler = pytest.mark.skipif(COMPILER is None, reason=MISSING_COMPILER)
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX (pip install tensorrt-rtx)"
)


@pytest.mark.slow
@needs_compiler
@needs_rtx
def test_zsad_infer_takes_the_engines_that_zsad_export_built(
    two_networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--preset", "challenge", "--config", str(two_networks)]
    assert export([*common, "--target", "tensorrt-rtx"]) == 0
    built, real, device = [], tensorrt_engine.build_engine, HostDevice()

    def build(*arguments: Any) -> Any:
        built.append(real(*arguments))
        return built[-1]

    monkeypatch.setattr("zsad.kernels.cuda.device.open_devices", lambda name: [device])
    monkeypatch.setattr("zsad.export.tensorrt_engine.build_engine", build)
    monkeypatch.setattr(tensorrt_graphs, "load_engine", lambda path, number, onnx: loaded(HostEngine(onnx, 32), True))
    command = [str(draw(tmp_path / "data", 4)), *common, "--device", "cuda:0", "--runtime", "tensorrt-rtx"]
    assert main(command) == 0
    assert [engine.built for engine in built] == [False, False]
    assert len(scores_and_maps("out")[0]) == 4
    assert not any(engine.fingerprint.agreement for engine in built)
    assert main(command) == 0  # what the first run found is in the fingerprints
    assert all("fp16 against its graph on the CPU" in engine.fingerprint.agreement for engine in built[2:])


@needs_compiler
@needs_rtx
@pytest.mark.slow
def test_an_engine_that_computes_something_else_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WrongEngine(HostEngine):
        def __init__(self, onnx: Path, most: int) -> None:
            super().__init__(onnx, most)
            run = self.session.run
            wrong = lambda *arguments: [output + output[:, :, ::-1] for output in run(*arguments)]  # noqa: E731
            self.session = types.SimpleNamespace(run=wrong, get_outputs=self.session.get_outputs)

    monkeypatch.setattr("zsad.kernels.cuda.device.open_devices", lambda name: [HostDevice()])
    monkeypatch.setattr(tensorrt_graphs, "load_engine", lambda path, number, onnx: loaded(WrongEngine(onnx, 32)))
    arguments = [str(draw(tmp_path / "data", 4)), "--config", str(tiny / "config.toml"), "--device", "cuda:0"]
    for _ in range(2):  # also when it lies in the cache
        assert main([*arguments, "--runtime", "tensorrt-rtx"]) == 2
        assert "engine: it computes something else (limit: cosine 0.999)" in capsys.readouterr().err


@pytest.mark.slow
def test_golden_checkpoints_run_in_the_challenge_preset(golden: Path, tmp_path: Path) -> None:
    config = tmp_path / "golden.toml"
    config.write_text(
        f"""
        image_size = 126
        [networks.dinov2]
        checkpoint = "{golden / "dinov2_vit_tiny.pth"}"
        heads = 3
        taps = [1, 3, 5]
        [networks.clip]
        checkpoint = "{golden / "clip_vit_tiny.safetensors"}"
        heads = 2
        taps = [5, 11]
        """
    )
    data = draw(tmp_path / "data", 6)
    common = ["--preset", "challenge", "--config", str(config)]
    assert export([*common, "--target", "onnx", "--output", str(tmp_path / "graphs")]) == 0
    graphs = sorted(path.name for path in (tmp_path / "graphs").iterdir())
    assert graphs == ["clip-126-fp32.onnx", "dinov2-126-fp32.onnx"]
    assert main([str(data), *common]) == 0
    assert np.argmax(scores_and_maps("out")[0]) == 5
    assert record("out")["config"]["settings"]["rscin"] == [1, 8, 9]


@pytest.fixture
def clip_config(tmp_path: Path) -> Config:
    """A configuration whose network has both towers of CLIP."""
    spec = {"checkpoint": str(write_clip(tmp_path, "april")), "taps": (2,), "image_size": 98, "antialias": True}
    networks = {"clip": NetworkSpec(**spec)}
    return Config(preset="x", method="x", image_size=98, networks=networks, settings=Table())


IMAGE = GraphRequest("clip", "image", ("tokens", "embedding", "windows_2"))
TEXT = GraphRequest("clip", "text", ("embedding",))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
def test_a_network_has_an_image_graph_and_a_text_graph(clip_config: Config, precision: str) -> None:
    config = clip_config.model_copy(update={"network_precision": precision})
    runtime = runtimes.choose_runtime("cpu")
    network = networks.load_networks(config, [IMAGE, TEXT], runtime, 4)["clip"]
    assert network.preprocessing == "clip"
    assert list(network.graphs) == ["image", "text"]
    images, texts = network.graphs["image"], network.graphs["text"]
    assert list(images.outputs) == ["tokens", "embedding", "windows_2"]
    assert texts.inputs == {"ids": TensorSpec((77,), np.dtype(np.int32))}
    assert texts.outputs == {"embedding": TensorSpec((24,), np.dtype(np.float32))}
    ids = text_arrays("clip_tiny")["token_ids"]
    parts = [outputs["embedding"] for _, outputs in run_in_parts(texts, {"ids": ids})]
    assert [len(part) for part in parts] == [4, 4, 4, 2]
    alone = networks.load_graph(config, TEXT, runtime, len(ids))
    np.testing.assert_allclose(alone.run({"ids": ids})["embedding"], np.concatenate(parts), atol=1e-5)
    only = networks.load_networks(config, [TEXT], runtime, 4)["clip"]
    assert (only.sha256, only.preprocessing, list(only.graphs)) == (network.sha256, "clip", ["text"])


@pytest.mark.slow
def test_heads_of_a_text_tower_are_those_of_the_configuration(clip_config: Config) -> None:
    spec, ids = clip_config.networks["clip"], {"ids": text_arrays("clip_tiny")["token_ids"]}
    runtime = runtimes.choose_runtime("cpu")
    found = []
    for change in ({}, {"heads": 4}, {"text_heads": 4}):
        config = clip_config.model_copy(update={"networks": {"clip": spec.model_copy(update=change)}})
        found.append(networks.load_graph(config, TEXT, runtime, len(ids["ids"])).run(ids)["embedding"])
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


@pytest.mark.slow
def test_positions_are_resized_as_the_configuration_says(clip_config: Config) -> None:
    arrays, runtime = text_arrays("april"), runtimes.choose_runtime("cpu")
    spec = clip_config.networks["clip"]
    plain = clip_config.model_copy(update={"networks": {"clip": spec.model_copy(update={"antialias": None})}})
    images = {"images": normalised(arrays["resized"])}
    smooth, rough = (
        networks.load_graph(config, IMAGE, runtime, 8).run(images)["tokens"][:, 0] for config in (clip_config, plain)
    )
    np.testing.assert_allclose(smooth, arrays["block_3"][:, 1:], atol=1e-4)
    assert np.abs(rough - arrays["block_3"][:, 1:]).max() > 0.01


@pytest.mark.slow
@needs_compiler
@needs_rtx
def test_a_text_graph_runs_on_an_engine_that_is_compared_once(
    clip_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "zsad")
    device = HostDevice()
    monkeypatch.setattr(tensorrt_graphs, "load_engine", lambda path, number, onnx: loaded(HostEngine(onnx, 32), True))
    runtime = runtimes.Runtime("tensorrt-rtx", [device], device, "asked for")
    ids = text_arrays("clip_tiny")["token_ids"]
    for compared in (1, 1):
        graph = networks.load_graph(clip_config, TEXT, runtime, 32)
        found = device.to_host(graph.run({"ids": device.to_device(ids)})["embedding"])
        assert caplog.text.count("comparing its engine with its graph") == compared
    expected = networks.load_graph(clip_config, TEXT, runtimes.choose_runtime("cpu"), 32).run({"ids": ids})["embedding"]
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_the_fastest_of_several_libraries_runs_a_graph_and_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[str] = []
    broken: set[str] = set()
    times = {"onnxruntime": 1.0, "openvino": 0.8, "native": 0.5}

    def by(loading: Any, library: Any) -> Any:
        tried.append(library)
        if library in broken:
            raise EngineError("it is broken")
        return networks.Ready(loading.exported(library), types.SimpleNamespace(), library)  # type: ignore[arg-type]

    monkeypatch.setattr(networks.Loading, "by", by)
    model = types.SimpleNamespace(path=tmp_path / "graph.onnx", inputs={})
    monkeypatch.setattr(networks.Loading, "exported", lambda *_: model)
    monkeypatch.setattr(networks, "seconds", lambda graphs, inputs: {name: times[name] for name in graphs})
    runtime = runtimes.Runtime("onnxruntime", (), None, "tested")
    spec = NetworkSpec(checkpoint="x", taps=(2,), image_size=98)

    def found(rows: int) -> str:
        tried.clear()
        return (
            networks.Loading(spec, IMAGE, runtime, "fp32", rows).faster("onnxruntime", ["openvino", "native"]).library
        )

    assert found(1) == "native"
    assert (found(1), tried) == ("native", ["native"])
    times["native"] = 0.96
    assert found(2) == "openvino"
    times["openvino"] = 0.97
    assert found(3) == "onnxruntime"
    assert (found(3), tried) == ("onnxruntime", ["onnxruntime"])
    broken |= {"native", "openvino"}
    assert found(4) == "onnxruntime"
    assert (found(1), tried) == ("onnxruntime", ["native", "onnxruntime"])
