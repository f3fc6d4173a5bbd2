"""The throughput benchmark on tiny networks, on the CPU and an emulated device: what it checks, runs and records."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from host_build import COMPILER, MISSING_COMPILER

from zsad.bench import mutual_scoring_cuda, random_weights, runs, runtimes, throughput, towers, untrained
from zsad.bench.scenes import PLACES
from zsad.bench.towers import Shape
from zsad.engine.config import load_config
from zsad.engine.images.folders import scan
from zsad.engine.methods.method import method_class
from zsad.engine.networks import runtime
from zsad.export.linear_heads import read_linear_heads
from zsad.export.state_dict import CheckpointError
from zsad.export.vision_transformer import CLIP, DINOV2
from zsad.kernels.cpu.native import has_native_code

STAGES = {"decode", "networks", "scoring", "rescoring", "write"}


@pytest.fixture(autouse=True)
def _workplace(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tiny / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtimes, "PEAK_SHAPES", ((64, 64, 64), (30, 20, 40)))
    monkeypatch.setattr(throughput, "PAUSE", 0.0)
    precisions = {"onnxruntime": ("fp32", "int8"), "openvino": ("int8",), "native": ("int8",)}
    monkeypatch.setattr(runtimes, "CPU_PRECISIONS", precisions)
    monkeypatch.setattr(runtime, "has_native_code", has_native_code)


@pytest.fixture
def measure(tiny: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run the benchmark on four drawn images and return its records."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        output = tmp_path / "out.jsonl"
        common = ["--config", str(tiny / "config.toml"), "--images", "4", "--repeats", "2", "--output", str(output)]
        assert throughput.main([*common, *arguments]) == 0
        return [json.loads(line) for line in output.read_text("utf-8").splitlines()]

    return run


@pytest.mark.long
def test_on_the_cpu(measure: Callable[..., list[dict[str, Any]]]) -> None:
    network, *runs = measure("--device", "cpu")
    assert {"ONNX Runtime fp32", "ONNX Runtime int8"} <= set(network["seconds_per_row"])
    assert all(len(times) == 2 for times in network["seconds_per_row"].values())
    assert set(network["agreement"]) == set(network["seconds_per_row"])
    assert set(network["memory_bytes"]) == {name for name in network["agreement"] if not name.startswith("PyTorch")}
    assert all(1 << 18 < taken < 1 << 30 for taken in network["memory_bytes"].values())
    others = {"openvino": find_spec("openvino") is not None, "native": has_native_code()}
    libraries = ["onnxruntime", "onnxruntime", *(library for library, there in others.items() if there)]
    assert [run["runtime"].split()[0] for run in runs] == libraries
    assert [run["precision"] for run in runs] == [["fp32", "fp32"], *[["int8", "int8"]] * (len(libraries) - 1)]
    for run in runs:
        assert set(run["seconds_alone"]) == STAGES
        assert run["images"] == 4
        assert run["peak_host_bytes"] > 1 << 20
        assert run["peak_device_bytes"] is None


@pytest.mark.long
@pytest.mark.skipif(COMPILER is None, reason=MISSING_COMPILER)
@pytest.mark.usefixtures("tensorrt")
def test_on_a_device(measure: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual_scoring_cuda, "PEAK_SIDE", 64)
    monkeypatch.setattr(throughput, "find_spec", lambda name: None if name == "torch" else object())
    network, *runs = measure("--device", "cuda:0", "--batch-size", "2")
    assert {"TensorRT fp16", "TensorRT-RTX fp16"} <= set(network["seconds_per_row"])
    assert [run["runtime"].split()[0] for run in runs] == ["tensorrt", "tensorrt-rtx"]
    for run in runs:
        assert set(run["seconds_alone"]) == STAGES
        assert run["precision"] == ["fp16", "fp16"]
        assert run["peak_device_bytes"] > 0


@pytest.mark.slow
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
    monkeypatch.setitem(towers.SHAPES, "dinov2-vitl14", Shape(DINOV2, 64, 2, stored_grid=5))
    config = load_config("challenge", overrides={"taps": (0, 1)}, method_of=method_class)
    only = config.model_copy(update={"networks": {"dinov2": config.networks["dinov2"]}})
    replaced, weights = untrained.use_random_weights(only, tmp_path)
    assert weights == {"dinov2": "random, of the shape of dinov2-vitl14"}
    assert "random, of the shape of dinov2-vitl14" in capsys.readouterr().out
    assert Path(replaced.networks["dinov2"].checkpoint).is_file()


def test_absent_heads_are_replaced_by_random_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "empty"))
    monkeypatch.setitem(towers.SHAPES, "clip-vitl14-336", Shape(CLIP, 64, 2, projection=32))
    config, _ = untrained.use_random_weights(load_config("april-gan", method_of=method_class), tmp_path)
    heads = read_linear_heads(Path(config.settings.head), 4, 64, 32)
    assert {weight.shape for weight, _ in heads} == {(32, 64)}


@pytest.mark.long
@pytest.mark.parametrize("name", ["winclip", "april-gan"])
def test_whole_runs_of_text_guided_presets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights, for which there are no words."""
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "empty"))
    shape = Shape(CLIP, 64, 2, patch_size=16, stored_grid=3, projection=32)
    checkpoint = load_config(name, method_of=method_class).networks["clip"].checkpoint
    monkeypatch.setitem(towers.SHAPES, checkpoint, shape)
    Path("tiny.toml").write_text("image_size = 48\n[networks.clip]\ntaps = [0, 1]\n")
    common = ["--preset", name, "--config", "tiny.toml", "--device", "cpu", "--images", "3", "--repeats", "1"]
    assert throughput.main([*common, "--output", "out.jsonl"]) == 0
    network, *runs = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert {"ONNX Runtime fp32", "ONNX Runtime int8"} <= set(network["seconds_per_row"])
    assert [run["precision"] for run in runs][:2] == [["fp32", None], ["int8", None]]
    assert all(set(run["seconds_alone"]) >= {"decode", "networks", "write"} for run in runs)


TINY = """
image_size = 48
[networks.clipseg]
image_size = 32
heads = 3
[stages.isnet]
checkpoint = "isnet-general-use"
image_size = 64
[stages.sam]
checkpoint = "sam-vitb"
image_size = 128
heads = 4
[stages.masks]
points_per_side = 4
"""


@pytest.mark.long
def test_every_graph_and_whole_runs_of_vvv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random weights: IS-Net's and SAM's results are replaced by what scenes show."""
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "empty"))
    tower = Shape(CLIP, 64, 2, patch_size=16, stored_grid=3, projection=32)
    monkeypatch.setitem(towers.SHAPES, "clip-vitb16plus-240-e31", tower)
    states = {
        "clipseg-rd64-refined": random_weights.clipseg_state(48, 24, 16),
        "isnet-general-use": random_weights.isnet_state(8),
        "sam-vitb": random_weights.sam_encoder_state(32, [3, 8], 16, 8, out=32)
        | random_weights.mask_decoder_state(32, hidden=16, quality=16),
    }
    for name, state in states.items():
        monkeypatch.setitem(random_weights.STATES, name, lambda state=state: state)
    Path("tiny.toml").write_text(TINY)
    common = ["--preset", "vvv", "--config", "tiny.toml", "--device", "cpu", "--images", "2", "--repeats", "1"]
    assert throughput.main([*common, "--output", "out.jsonl"]) == 0
    records = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    networks, runs = ([each for each in records if each["kind"] == kind] for kind in ("network", "run"))
    assert [(each["graph"], each["row"], each["batch"]) for each in networks] == [
        ("image", "image", 1),
        ("clipseg_image", "image", 1),
        ("clipseg_decoder", "prompt", 6),
        ("isnet", "image", 1),
        ("sam_image", "image", 1),
        ("sam_masks", "point", 16),
    ]
    for each in networks:
        assert ("ONNX Runtime int8" in each["seconds_per_row"]) == (each["graph"] == "image")
        assert each["flops_per_row"] > 0
    assert [run["precision"] for run in runs][:2] == [["fp32", None], ["int8", None]]
    for run in runs:
        assert list(run["seconds_alone"])[:4] == ["decode", "foreground", "masks", "networks"]
        assert run["found"]["tiles"] == len(PLACES)
    assert "random, of the shape of sam-vitb" in capsys.readouterr().out


@pytest.mark.slow
def test_images_for_the_gpu_s_decoder_are_drawn_as_jpeg_files(tmp_path: Path) -> None:
    config = load_config("small", overrides={"decoder": "nvimgcodec"}, method_of=method_class)
    (category,) = scan(runs.draw(config, 4, tmp_path / "drawn")).categories
    assert [image.path.suffix for image in category.images] == [".jpg"] * 4
