"""The runtimes behind one protocol, and whole runs on a device: the real data flow, kernels as host code, no GPU."""

import importlib.util
import io
import os
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from host_build import COMPILER, MISSING_COMPILER, HostDevice, KernelError
from host_tensorrt import HostContext, HostEngine, HostRuntimeCache, HostRuntimeConfig, loaded
from numpy.typing import NDArray
from PIL import Image, ImageOps
from runs import draw, record, scores_and_maps

from zsad.engine.commands.export import main as export
from zsad.engine.commands.infer import main
from zsad.engine.config import ConfigError
from zsad.engine.networks import build as networks
from zsad.engine.networks import runtime as runtimes
from zsad.engine.networks import tensorrt as tensorrt_backbone
from zsad.engine.networks.network import TensorSpec, run_in_parts
from zsad.engine.networks.onnx_runtime import OnnxRuntimeGraph
from zsad.engine.networks.runtime import choose_runtime
from zsad.engine.networks.tensorrt import TensorRTGraph
from zsad.export.libraries import EngineError
from zsad.export.onnx_export import ExportedModel, export_onnx
from zsad.export.options import ExportOptions
from zsad.kernels.cuda import DeviceError
from zsad.kernels.mutual_scoring import MutualScoring

needs_compiler = pytest.mark.skipif(COMPILER is None, reason=MISSING_COMPILER)
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX (pip install tensorrt-rtx)"
)


@pytest.fixture(autouse=True)
def _workplace(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tiny / "cache"))
    monkeypatch.delenv("ZSAD_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)


# Stand-ins for what only a GPU has


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


@pytest.fixture
def model(random_dinov2: Callable[..., Path]) -> ExportedModel:
    """A tiny graph in half precision with an image embedding."""
    return export_onnx(str(random_dinov2()), ExportOptions((0, 1), 70, precision="fp16", attention="fused"))


INPUTS = {"images": TensorSpec((3, 70, 70), np.dtype(np.float32))}
OUTPUTS = {
    "tokens": TensorSpec((2, 25, 64), np.dtype(np.float16)),
    "embedding": TensorSpec((64,), np.dtype(np.float32)),
}


def check_equal(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    assert list(found) == list(expected) == list(OUTPUTS)
    for name, output in found.items():
        assert output.shape[1:] == OUTPUTS[name].shape
        np.testing.assert_array_equal(output, expected[name])


def images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).normal(size=(count, 3, 70, 70)).astype(np.float32)


# Which runtime


def having(monkeypatch: pytest.MonkeyPatch, *installed: str, capability: str = "8.9") -> None:
    """A machine with some of cupy, a gpu, tensorrt, tensorrt-rtx and ONNX Runtime's CUDA provider (cuda)."""
    device = HostDevice()
    device.compute_capability = capability

    def open_devices(name: str) -> list[HostDevice]:
        if "gpu" not in installed:
            raise DeviceError("CuPy finds no CUDA device")
        return [device]

    def import_tensorrt(target: str) -> Any:
        if target not in installed:
            raise EngineError(f"{target} is not installed; run: pip install it")
        return types.SimpleNamespace(__version__="1.7")

    providers = [*(["CUDAExecutionProvider"] if "cuda" in installed else []), "CPUExecutionProvider"]
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda _: object() if "cupy" in installed else None)
    monkeypatch.setattr(runtimes, "open_devices", open_devices)
    monkeypatch.setattr(runtimes, "import_tensorrt", import_tensorrt)
    onnx_runtime = types.SimpleNamespace(get_available_providers=lambda: providers, __version__="1.26")
    monkeypatch.setattr(runtimes, "import_onnxruntime", lambda: onnx_runtime)


@pytest.mark.parametrize(
    ("installed", "library", "device_name", "scoring_precision", "why"),
    [
        ("", "onnxruntime", "cpu", "fp32", "CuPy is not installed"),
        ("cupy", "onnxruntime", "cpu", "fp32", "CuPy finds no CUDA device"),
        ("cupy gpu tensorrt tensorrt-rtx cuda", "tensorrt", "cuda:0", "fp16", "the fastest"),
        ("cupy gpu tensorrt-rtx cuda", "tensorrt-rtx", "cuda:0", "fp16", "tensorrt cannot be used here"),
        ("cupy gpu cuda", "onnxruntime", "cuda:0", "fp16", "tensorrt and tensorrt-rtx cannot be used here"),
        ("cupy gpu", "onnxruntime", "cpu", "fp16", "has no CUDA provider"),
    ],
)
def test_auto_takes_the_fastest_that_is_installed_and_says_why(
    monkeypatch: pytest.MonkeyPatch, installed: str, library: str, device_name: str, scoring_precision: str, why: str
) -> None:
    having(monkeypatch, *installed.split())
    runtime = choose_runtime("auto", "auto")
    assert (runtime.library, runtime.device_name) == (library, device_name)
    assert why in runtime.reason
    assert (runtime.device is None) == (device_name == "cpu")
    assert runtime.network_precision("auto") == ("fp32" if device_name == "cpu" else "fp16")
    assert MutualScoring((2, 2), 1, 8, (1,), (0.0, 0.3), "auto", runtime.devices).precision == scoring_precision


def test_tensorrt_rtx_is_not_taken_for_a_gpu_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch, "cupy", "gpu", "tensorrt-rtx", "cuda", capability="9.0")
    runtime = choose_runtime("cuda:0")
    assert runtime.library == "onnxruntime"
    with pytest.raises(ConfigError, match=r"does not run on compute capability 9\.0"):
        choose_runtime("cuda:0", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("device", "library", "message"),
    [
        ("gpu", "auto", "must be auto, cpu, cuda:N"),
        ("cpu", "openvino", "must be auto or one of onnxruntime, tensorrt, tensorrt-rtx"),
        ("cpu", "tensorrt", "needs a GPU"),
        ("cuda", "auto", "finds no CUDA device"),
        ("auto", "tensorrt", "finds no CUDA device"),
    ],
)
def test_a_runtime_that_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, library: str, message: str
) -> None:
    having(monkeypatch, "cupy")
    with pytest.raises(ConfigError, match=message):
        choose_runtime(device, library)


@pytest.mark.parametrize(
    ("installed", "precision", "message"),
    [
        ("", "fp16", "--network-precision fp16 is not available on a CPU; use fp32 or int8"),
        ("cupy gpu tensorrt", "int8", "use fp16 or fp32"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, installed: str, precision: str, message: str
) -> None:
    having(monkeypatch, *installed.split())
    with pytest.raises(ConfigError, match=message):
        choose_runtime().network_precision(precision)


@pytest.mark.parametrize("asked", [None, "0"])
def test_telemetry_is_off_unless_the_user_has_said_something(asked: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if asked is not None:
        environment["ORT_DISABLE_TELEMETRY"] = asked
    code = (
        "import os; from zsad.engine.networks.runtime import choose_runtime; choose_runtime('cpu').describe()\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == (asked or "1")


# One protocol


def test_io_binding_gives_what_a_plain_session_gives(model: ExportedModel) -> None:
    device = HostDevice()
    plain = OnnxRuntimeGraph(model.path, None, 3)
    bound = OnnxRuntimeGraph(model.path, device, 3)
    assert bound.inputs == plain.inputs == INPUTS
    assert bound.outputs == plain.outputs == OUTPUTS
    for count in (3, 1, 2):  # outputs that are longer than the batch keep their rest
        check_equal(bound.run({"images": device.to_device(images(count))}), plain.run({"images": images(count)}))


def test_an_engine_gives_what_onnx_runtime_gives(model: ExportedModel, tensorrt: list[HostEngine]) -> None:
    device = HostDevice()
    engine = TensorRTGraph(model.path, model.path, device, 4)
    plain = OnnxRuntimeGraph(model.path, None, 4)
    assert (engine.inputs, engine.outputs) == (INPUTS, OUTPUTS)
    slots = [device.empty((4, 3, 70, 70), np.float32) for _ in range(2)]
    for turn, count in enumerate((4, 4, 4, 3, 4, 1)):
        batch = slots[turn % 2][:count]
        batch[...] = images(count) + turn
        check_equal(engine.run({"images": batch}), plain.run({"images": images(count) + turn}))
    assert device.recordings == 2  # one for each of the two inputs; parts of a batch are queued launch by launch
    assert sorted(set(tensorrt[0].runs)) == [1, 3, 4]


def test_kernels_that_tensorrt_rtx_compiles_are_kept(
    model: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tensorrt_backbone, "load_engine", lambda path, number, onnx: loaded(HostEngine(onnx, 32), rtx=True)
    )
    device, engine = HostDevice(), tmp_path / "tiny.engine"
    kernels = tmp_path / "tiny.engine.kernels"

    def run(*batches: int) -> list[int]:
        graph = TensorRTGraph(engine, model.path, device, 4)
        for count in batches:
            found = graph.run({"images": device.to_device(images(count))})
            check_equal(found, OnnxRuntimeGraph(model.path, None, 4).run({"images": images(count)}))
        compiled: list[int] = graph._context.kernels.compiled
        return compiled

    assert run(4, 4, 3) == [4, 3]
    assert run(4, 3, 1, 1) == [1]
    written = kernels.stat().st_mtime_ns
    assert run(4, 1) == []
    assert kernels.stat().st_mtime_ns == written
    kernels.write_bytes(b"made by another version")
    assert run(3) == [3]
    assert kernels.read_bytes() == b"kernels \x03"
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
    graph = TensorRTGraph(model.path, model.path, device, 2)
    graph._context.fails = True
    with pytest.raises(EngineError, match="the engine failed: no reason given"):
        graph.run({"images": device.to_device(images(1))})
    monkeypatch.setattr(HostEngine, "create_execution_context", lambda self, strategy: None)
    with pytest.raises(EngineError, match="see nvidia-smi"):
        TensorRTGraph(model.path, model.path, device, 2)


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


class Narrow:
    """A graph whose memory holds a few images at once."""

    def __init__(self, room: int, largest_batch: int) -> None:
        self.room, self.largest_batch = room, largest_batch
        self.tried: list[int] = []

    def run(self, inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        self.tried.append(len(inputs["images"]))
        if len(inputs["images"]) > self.room:
            raise MemoryError("no room")
        return {"doubled": inputs["images"] * 2}


def test_a_batch_that_does_not_fit_halves_itself_and_stays_small() -> None:
    narrow = Narrow(room=3, largest_batch=8)
    batch = images(8)
    for _ in range(2):
        found = np.zeros_like(batch)
        for part, outputs in run_in_parts(narrow, {"images": batch}):  # type: ignore[arg-type]
            found[part] = outputs["doubled"]
        np.testing.assert_array_equal(found, batch * 2)
    assert narrow.tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    with pytest.raises(MemoryError, match="no room"):
        list(run_in_parts(Narrow(room=0, largest_batch=8), {"images": batch}))  # type: ignore[arg-type]


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


# Whole runs on a device


@needs_compiler
@pytest.mark.parametrize("limit", [[], ["--memory-limit", "230KB"]], ids=["resident", "spilled"])
def test_a_run_on_a_device_equals_one_on_the_cpu(
    two_networks: Path,
    emulated_gpu: HostDevice,
    tensorrt: list[HostEngine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    limit: list[str],
) -> None:
    data = draw(tmp_path / "data", 11)
    (data / "05.png").write_bytes(b"no image")
    common = [str(data), "--preset", "challenge", "--config", str(two_networks), "-v"]
    assert main([*common, "--device", "cpu", "--output", "cpu"]) == 1
    assert main([*common, "--device", "cuda:0", "--batch-size", "4", "--output", "gpu", *limit]) == 1
    said = capsys.readouterr().err
    assert "tensorrt 10.14.1 on the host" in said
    assert ("are read in chunks" in said) == bool(limit)
    assert [engine.runs for engine in tensorrt] == [[4, 4, 2]] * 2
    assert emulated_gpu.recordings == 4  # two inputs of two backbones
    (scores, maps), (expected, expected_maps) = scores_and_maps("gpu"), scores_and_maps("cpu")
    np.testing.assert_allclose(scores, expected, atol=0.02)
    for one, other in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02)
    assert np.argmax(scores) == 9
    assert record("gpu")["device"] == "cuda:0"
    assert record("gpu")["config"]["network_precision"] == "fp16"


@needs_compiler
def test_tokens_from_the_cpu_can_be_scored_on_a_device(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    having(monkeypatch, "cupy", "gpu")
    data = draw(tmp_path / "data", 6)
    for name in ("cpu", "cuda:0"):
        arguments = [str(data), "--device", name, "--output", name, "--config", str(tiny / "config.toml")]
        assert main(arguments) == 0
    np.testing.assert_allclose(scores_and_maps("cuda:0")[0], scores_and_maps("cpu")[0], atol=0.02)
    assert record("cuda:0")["device"] == "cpu"
    assert record("cuda:0")["config"]["settings"]["precision"] == "fp16"


@needs_compiler
def test_several_devices_share_the_scoring(
    two_networks: Path, tensorrt: list[HostEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [HostDevice(), HostDevice()]
    data = draw(tmp_path / "data", 7)
    common = [str(data), "--preset", "challenge", "--config", str(two_networks), "--device", "cuda:0,1"]
    for count in (1, 2):
        monkeypatch.setattr(runtimes, "open_devices", lambda name, count=count: devices[:count])
        assert main([*common, "--output", f"on{count}"]) == 0
    assert devices[1].launches > 0
    np.testing.assert_array_equal(scores_and_maps("on1")[0], scores_and_maps("on2")[0])


@needs_compiler
def test_a_gpu_that_fails_stops_the_run_and_keeps_what_is_finished(
    two_networks: Path,
    emulated_gpu: HostDevice,
    tensorrt: list[HostEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in "abc":
        draw(tmp_path / "data" / name, 4)
    upload, images = emulated_gpu.upload, 0

    def fail_later(array: NDArray[Any], out: NDArray[Any]) -> None:
        nonlocal images
        images += array.dtype == np.uint8
        if images == 7:
            raise KernelError("an illegal memory access was encountered")
        upload(array, out)

    monkeypatch.setattr(emulated_gpu, "upload", fail_later)
    arguments = [str(tmp_path / "data"), "--preset", "challenge", "--config", str(two_networks), "--device", "cuda:0"]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "the GPU failed (an illegal memory access was encountered)" in said
    assert "add --resume to go on from there" in said
    assert (Path("out") / "a" / "category.json").is_file()
    assert not (Path("out") / "b").exists()
    assert main([*arguments, "--resume"]) == 0
    assert "a: already finished" in capsys.readouterr().err


@needs_compiler
@needs_rtx
def test_zsad_infer_takes_the_engines_that_zsad_export_built(
    two_networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--preset", "challenge", "--config", str(two_networks)]
    assert export([*common, "--target", "tensorrt-rtx"]) == 0
    built, real, device = [], networks.build_engine, HostDevice()

    def build(*arguments: Any) -> Any:
        built.append(real(*arguments))
        return built[-1]

    monkeypatch.setattr(runtimes, "open_devices", lambda name: [device])
    monkeypatch.setattr(networks, "build_engine", build)
    monkeypatch.setattr(tensorrt_backbone, "load_engine", lambda path, number, onnx: loaded(HostEngine(onnx, 32), True))
    command = [str(draw(tmp_path / "data", 4)), *common, "--device", "cuda:0", "--runtime", "tensorrt-rtx"]
    assert main(command) == 0
    assert [engine.built for engine in built] == [False, False]
    assert len(scores_and_maps("out")[0]) == 4
    assert not any(engine.fingerprint.agreement for engine in built)
    assert main(command) == 0  # what the first run found is in the fingerprints
    assert all("fp16 against its graph on the CPU" in engine.fingerprint.agreement for engine in built[2:])


@needs_compiler
@needs_rtx
def test_an_engine_that_computes_something_else_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WrongEngine(HostEngine):
        def __init__(self, onnx: Path, most: int) -> None:
            super().__init__(onnx, most)
            run = self.session.run
            wrong = lambda *arguments: [output + output[:, :, ::-1] for output in run(*arguments)]  # noqa: E731
            self.session = types.SimpleNamespace(run=wrong, get_outputs=self.session.get_outputs)

    monkeypatch.setattr(runtimes, "open_devices", lambda name: [HostDevice()])
    monkeypatch.setattr(tensorrt_backbone, "load_engine", lambda path, number, onnx: loaded(WrongEngine(onnx, 32)))
    arguments = [str(draw(tmp_path / "data", 4)), "--config", str(tiny / "config.toml"), "--device", "cuda:0"]
    for _ in range(2):  # also when it lies in the cache
        assert main([*arguments, "--runtime", "tensorrt-rtx"]) == 2
        assert "engine: it computes something else (limit: cosine 0.999)" in capsys.readouterr().err


class HostDecoder:
    """nvImageCodec's decoder on the host, with Pillow's pixels; like the real one it fills in what is cut off."""

    decoded: ClassVar[list[str]] = []

    def __init__(self, device_id: int, max_num_cpu_threads: int) -> None:
        assert (device_id, max_num_cpu_threads) == (0, 1)

    def decode(self, content: bytes, params: dict[str, Any]) -> NDArray[np.uint8] | None:
        assert params == {"apply_exif_orientation": True, "color_spec": "sRGB"}
        with Image.open(io.BytesIO(content)) as image:
            HostDecoder.decoded.append(f"{image.format} {image.mode}")
            if image.size == (64, 64):  # a kind of JPEG that it does not know
                return None
            return np.asarray(ImageOps.exif_transpose(image))


@needs_compiler
def test_jpegs_can_be_decoded_on_the_device(
    two_networks: Path,
    tensorrt: list[HostEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = draw(tmp_path / "data", 5)
    upright, turned = Image.Exif(), Image.Exif()
    turned[0x0112] = 6
    for index, path in enumerate(sorted(data.iterdir())[:3]):
        with Image.open(path) as image:
            image.save(data / f"jpeg{index}.jpg", quality=92, exif=turned if index == 1 else upright)
            image.convert("L").save(data / f"grey{index}.jpg")
            image.resize((64, 64)).save(data / f"unknown{index}.jpg")
    whole = (data / "jpeg0.jpg").read_bytes()
    (data / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    common = [str(data), "--preset", "challenge", "--config", str(two_networks), "--device", "cuda:0"]
    assert main([*common, "--output", "pillow"]) == 1
    on_device = [*common, "--output", "device", "--decoder", "nvimgcodec"]
    monkeypatch.setitem(sys.modules, "nvidia", None)
    assert main(on_device) == 2
    assert "nvImageCodec is not installed" in capsys.readouterr().err
    library = types.SimpleNamespace(
        Decoder=HostDecoder,
        DecodeParams=dict,
        ColorSpec=types.SimpleNamespace(SRGB="sRGB"),
        __name__="nvidia.nvimgcodec",
    )
    monkeypatch.setitem(sys.modules, "nvidia", types.SimpleNamespace(nvimgcodec=library))
    HostDecoder.decoded.clear()
    assert main(on_device) == 1
    assert "cut.jpg: skipped" in capsys.readouterr().err
    assert HostDecoder.decoded == ["JPEG RGB"] * 6
    for one, other in zip(scores_and_maps("device")[1], scores_and_maps("pillow")[1], strict=True):
        np.testing.assert_array_equal(one, other)
    assert main([str(data), "--device", "cpu", "--decoder", "nvimgcodec", "--config", str(two_networks)]) == 2


# Both tiny published architectures, from the checkpoint file to the scores


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
