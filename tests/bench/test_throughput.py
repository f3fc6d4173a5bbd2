"""The throughput benchmark on tiny networks, on the CPU and an emulated device: what it checks, runs and records."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from host_build import COMPILER, MISSING_COMPILER

from zsad.bench import mutual_scoring_cuda, throughput
from zsad.engine.config import load_config
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.networks.build import export_options
from zsad.export.linear_heads import read_linear_heads
from zsad.export.options import ExportOptions
from zsad.export.state_dict import CheckpointError
from zsad.export.vision_transformer import CLIP, DINOV2

STAGES = {"decode", "networks", "scoring", "rescoring", "write"}


@pytest.fixture(autouse=True)
def _workplace(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tiny / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def measure(tiny: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run the benchmark on four drawn images and return its records."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        output = tmp_path / "out.jsonl"
        common = ["--config", str(tiny / "config.toml"), "--images", "4", "--repeats", "2", "--output", str(output)]
        assert throughput.main([*common, *arguments]) == 0
        return [json.loads(line) for line in output.read_text("utf-8").splitlines()]

    return run


@pytest.mark.slow
def test_on_the_cpu(measure: Callable[..., list[dict[str, Any]]]) -> None:
    network, *runs = measure("--device", "cpu")
    assert {"ONNX Runtime fp32", "ONNX Runtime int8"} <= set(network["seconds_per_image"])
    assert all(len(times) == 2 for times in network["seconds_per_image"].values())
    assert set(network["agreement"]) == set(network["seconds_per_image"])
    assert [run["precision"] for run in runs] == [["fp32", "fp32"], ["int8", "int8"]]
    for run in runs:
        assert set(run["seconds_alone"]) == STAGES
        assert run["images"] == 4
        assert run["peak_host_bytes"] > 1 << 20
        assert run["peak_device_bytes"] is None


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason=MISSING_COMPILER)
@pytest.mark.usefixtures("tensorrt")
def test_on_a_device(measure: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual_scoring_cuda, "PEAK_SIDE", 64)
    monkeypatch.setattr(throughput, "find_spec", lambda name: None if name == "torch" else object())
    network, *runs = measure("--device", "cuda:0", "--batch-size", "2")
    assert {"TensorRT fp16", "TensorRT-RTX fp16"} <= set(network["seconds_per_image"])
    assert [run["runtime"].split()[0] for run in runs] == ["tensorrt", "tensorrt-rtx"]
    for run in runs:
        assert set(run["seconds_alone"]) == STAGES
        assert run["precision"] == ["fp16", "fp16"]
        assert run["peak_device_bytes"] > 0


def test_a_network_that_computes_something_else_is_not_timed(
    measure: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = throughput.run_graph
    monkeypatch.setattr(
        throughput, "run_graph", lambda *arguments: {name: -output for name, output in real(*arguments).items()}
    )
    with pytest.raises(CheckpointError, match="computes something else"):
        measure("--device", "cpu", "--only", "networks")
    assert not (tmp_path / "out.jsonl").exists()


def test_absent_weights_are_replaced_by_random_ones_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "empty"))
    monkeypatch.setitem(throughput.SHAPES, "dinov2-vitl14", throughput.Shape(DINOV2, 64, 2, stored_grid=5))
    config = load_config("challenge", overrides={"taps": (0, 1)}, method_of=method_class)
    only = config.model_copy(update={"networks": {"dinov2": config.networks["dinov2"]}})
    replaced, weights = throughput.use_random_weights(only, tmp_path)
    assert weights == {"dinov2": "random, of the shape of dinov2-vitl14"}
    assert "random, of the shape of dinov2-vitl14" in capsys.readouterr().out
    assert Path(replaced.networks["dinov2"].checkpoint).is_file()


@pytest.mark.parametrize(("name", "teraflop"), [("dinov2-vitl14", 1.014), ("clip-vitl14-336", 1.014)])
def test_arithmetic_of_a_large_tower(name: str, teraflop: float) -> None:
    config = load_config("challenge", method_of=method_class)
    (request,) = (each for each in graph_requests(config) if each.network == name.partition("-")[0])
    graph = export_options(config.networks[request.network], request, "fp32", "fused")
    assert throughput.SHAPES[name].flops(graph) / 1e12 == pytest.approx(teraflop, abs=5e-4)


def test_arithmetic_of_windows_leaves_out_what_the_graph_does() -> None:
    shape = throughput.Shape(CLIP, 64, 2, patch_size=16, stored_grid=6, projection=32)
    options = ExportOptions((), 96, outputs=("embedding",))
    whole, plain, both = (
        shape.flops(replace(options, outputs=outputs))
        for outputs in (("patches",), ("embedding",), ("embedding", "windows_2"))
    )
    tokens, windows, block = 37, 25, 12 * 64**2
    assert whole - plain == (tokens - 1) * (2 * 9 * 64**2 + 4 * tokens * 64)
    linear = windows * (5 * 2 * (2 * block - 3 * 64**2) - 4 * 2 * 9 * 64**2)
    assert both - plain == linear + windows * 64 * 4 * (5**2 + 5)


def test_absent_heads_are_replaced_by_random_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "empty"))
    monkeypatch.setitem(throughput.SHAPES, "clip-vitl14-336", throughput.Shape(CLIP, 64, 2, projection=32))
    config, _ = throughput.use_random_weights(load_config("april-gan", method_of=method_class), tmp_path)
    heads = read_linear_heads(Path(config.settings.head), 4, 64, 32)
    assert {weight.shape for weight, _ in heads} == {(32, 64)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["winclip", "april-gan"])
def test_whole_runs_of_text_guided_presets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights, for which there are no words."""
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "empty"))
    shape = throughput.Shape(CLIP, 64, 2, patch_size=16, stored_grid=3, projection=32)
    checkpoint = load_config(name, method_of=method_class).networks["clip"].checkpoint
    monkeypatch.setitem(throughput.SHAPES, checkpoint, shape)
    Path("tiny.toml").write_text("image_size = 48\n[networks.clip]\ntaps = [0, 1]\n")
    common = ["--preset", name, "--config", "tiny.toml", "--device", "cpu", "--images", "3", "--repeats", "1"]
    assert throughput.main([*common, "--output", "out.jsonl"]) == 0
    network, *runs = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert {"ONNX Runtime fp32", "ONNX Runtime int8"} <= set(network["seconds_per_image"])
    assert [run["precision"] for run in runs] == [["fp32", None], ["int8", None]]
    assert all(set(run["seconds_alone"]) >= {"decode", "networks", "write"} for run in runs)
