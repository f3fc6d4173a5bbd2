"""Engines: built for real where TensorRT-RTX is installed, fingerprinted, cached, and refused when they do not fit."""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from clip_checkpoints import write_clip

from zsad.bench.random_weights import (
    clipseg_state,
    isnet_state,
    mask_decoder_state,
    sam_encoder_state,
    text_state,
    tiny_encoder_state,
    write_states,
)
from zsad.bench.towers import Shape, tower_state
from zsad.engine.commands.export import main
from zsad.export import libraries, tensorrt_engine
from zsad.export.cuda_driver import CudaError, use_device
from zsad.export.libraries import EngineError, import_tensorrt
from zsad.export.onnx_export import ExportedModel, export_onnx
from zsad.export.options import IMAGE_OUTPUTS, ExportOptions, IsnetOptions, TextOptions
from zsad.export.tensorrt_engine import (
    EngineOptions,
    Fingerprint,
    build_engine,
    fingerprint_path,
    load_engine,
    parse_network,
    read_engine,
)
from zsad.export.vision_transformer import CLIP
from zsad.kernels.files import file_sha256
from zsad.kernels.machine import CacheError

RTX = EngineOptions("tensorrt-rtx")
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX (pip install tensorrt-rtx)"
)


@pytest.fixture(autouse=True)
def cache(empty_cache: Path) -> Path:
    return empty_cache


@pytest.fixture(scope="module")
def exported(random_dinov2: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """A tiny half-precision graph for TensorRT."""
    options = ExportOptions((0, 1), 70, precision="fp16", attention="standard")
    return export_onnx(str(random_dinov2()), options, tmp_path_factory.mktemp("exported") / "tiny.onnx")


@pytest.fixture
def graph(exported: ExportedModel, tmp_path: Path) -> ExportedModel:
    """That graph in a file of the test's own."""
    return replace(exported, path=shutil.copy(exported.path, tmp_path / "tiny.onnx"))


class FakeBuilder:
    """Stands in for a library: takes every call, keeps what was asked of it."""

    def __init__(self, version: str) -> None:
        self.__version__ = version
        self.asked: list[str] = []
        self.plan: bytes | None = b"plan of an engine"
        flags = types.SimpleNamespace(
            TF32="tf32",
            STRIP_PLAN="strip",
            REFIT_IDENTICAL="refit",
            VERSION_COMPATIBLE="version",
            AMPERE_PLUS="ampere+",
        )
        self.BuilderFlag = self.HardwareCompatibilityLevel = flags
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})

    def Builder(self, log: object) -> "FakeBuilder":  # noqa: N802
        self.log = log
        return self

    def OnnxParser(self, network: object, log: object) -> "FakeBuilder":  # noqa: N802
        return self

    def parse_from_file(self, path: str) -> bool:
        return Path(path).is_file()

    def create_network(self, flags: int) -> str:
        self.asked.append(f"network {flags}")
        return "network"

    def create_builder_config(self) -> "FakeBuilder":
        return self

    def create_optimization_profile(self) -> "FakeBuilder":
        return self

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.asked.append(f"{name} {shapes}")

    def add_optimization_profile(self, profile: object) -> None:
        pass

    def set_flag(self, flag: str) -> None:
        self.asked.append(flag)

    def clear_flag(self, flag: str) -> None:
        self.asked.append(f"no {flag}")

    def __setattr__(self, name: str, value: object) -> None:
        if name == "hardware_compatibility_level":
            self.asked.append(str(value))
        super().__setattr__(name, value)

    def create_timing_cache(self, known: bytes) -> str:
        self.asked.append(f"timings {known!r}")
        return "timings"

    def set_timing_cache(self, cache: str, ignore_mismatch: bool) -> None:
        pass

    def get_timing_cache(self) -> "FakeBuilder":
        return self

    def serialize(self) -> bytes:
        return b"measured"

    def build_serialized_network(self, network: str, config: object) -> bytes | None:
        if self.plan is None:
            self.log.log(self.ILogger.ERROR, "out of memory")
        return self.plan


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> FakeBuilder:
    """A machine with TensorRT and a GPU of compute capability 8.9."""
    fake = FakeBuilder("10.13.0.35")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(tensorrt_engine, "use_device", lambda device: "8.9")
    return fake


def test_what_is_asked_of_tensorrt(tensorrt: FakeBuilder, graph: ExportedModel, cache: Path) -> None:
    options = EngineOptions(
        "tensorrt", (2, 4, 16), strip_weights=True, version_compatible=True, hardware_compatible=True
    )
    engine = build_engine(graph, options, "again")
    assert engine.built
    assert tensorrt.asked == [
        "network 2",
        "no tf32",
        "images ((2, 3, 70, 70), (4, 3, 70, 70), (16, 3, 70, 70))",
        "strip",
        "refit",
        "version",
        "ampere+",
        "timings b''",
    ]
    assert engine.path.read_bytes() == b"plan of an engine"
    (timings,) = (cache / "engines").glob("timings-10.13.0.35-8.9-*.cache")
    assert timings.read_bytes() == b"measured"
    stored = json.loads(fingerprint_path(engine.path).read_text())
    assert stored == {
        "onnx": "tiny.onnx",
        "onnx_sha256": file_sha256(graph.path),
        "library": "tensorrt",
        "version": "10.13.0.35",
        "compute_capabilities": ["8.9"],
        "precision": "fp16",
        "profile": {"images": [[2, 3, 70, 70], [4, 3, 70, 70], [16, 3, 70, 70]]},
        "strip_weights": True,
        "version_compatible": True,
        "hardware_compatible": True,
        "command": "again",
        "agreement": "",
        "engine_sha256": file_sha256(engine.path),
        "engine_bytes": 17,
        "sha256": engine.fingerprint.sha256(),
    }
    build_engine(graph, EngineOptions("tensorrt"), "again")
    assert tensorrt.asked[-1] == "timings b'measured'"
    timings.write_bytes(b"damaged")
    build_engine(graph, EngineOptions("tensorrt", (1, 2, 3)), "again")
    assert tensorrt.asked[-1] == "timings b''"
    assert timings.read_bytes() == b"measured"


def test_engines_are_cached_by_fingerprint(
    tensorrt: FakeBuilder, graph: ExportedModel, cache: Path, monkeypatch
) -> None:
    options = EngineOptions("tensorrt")
    first = build_engine(graph, options, "again")
    calls = len(tensorrt.asked)
    again = build_engine(graph, options, "another command")
    assert (again.path, again.built, len(tensorrt.asked)) == (first.path, False, calls)
    paths = {first.path}
    for change in ({"batch": (1, 1, 1)}, {"strip_weights": True}, {"hardware_compatible": True}):
        paths.add(build_engine(graph, replace(options, **change), "again").path)
    paths.add(build_engine(replace(graph, precision="fp32"), options, "again").path)
    tensorrt.__version__ = "11.4.0.1"
    paths.add(build_engine(graph, options, "again").path)
    monkeypatch.setattr(tensorrt_engine, "use_device", lambda device: "9.0")
    paths.add(build_engine(graph, options, "again").path)
    graph.path.write_bytes(graph.path.read_bytes() + b"\x00")
    paths.add(build_engine(graph, options, "again").path)
    assert len(paths) == 8
    assert set((cache / "engines").glob("*.engine")) == paths


def test_a_damaged_engine_is_built_again(
    tensorrt: FakeBuilder, graph: ExportedModel, caplog: pytest.LogCaptureFixture
) -> None:
    first = build_engine(graph, EngineOptions("tensorrt"), "again")
    stored = json.loads(fingerprint_path(first.path).read_text())
    for damaged, content in (
        (first.path, "plan"),
        (first.path, "plan of an Engine"),
        (fingerprint_path(first.path), ""),
        (fingerprint_path(first.path), json.dumps({**stored, "engine_bytes": "x"})),
    ):
        damaged.write_text(content)
        assert build_engine(graph, EngineOptions("tensorrt"), "again").built
        assert first.path.read_bytes() == b"plan of an engine"
        assert not build_engine(graph, EngineOptions("tensorrt"), "again").built
    assert len(caplog.messages) == 4
    assert all(line.startswith(str(first.path)) and line.endswith("; it is built anew") for line in caplog.messages)


def test_a_cache_that_may_only_be_read(
    tensorrt: FakeBuilder, graph: ExportedModel, cache: Path, read_only: Callable[[Path], None]
) -> None:
    options = EngineOptions("tensorrt")
    kept = build_engine(graph, options, "again")
    read_only(cache)
    assert build_engine(graph, options, "again", keep=True).path == kept.path
    larger = replace(options, batch=(1, 8, 64))
    with pytest.raises(CacheError, match="cannot be written"):
        build_engine(graph, larger, "again", keep=True)
    here = build_engine(graph, larger, "again")
    assert here.built
    assert not here.path.is_relative_to(cache)
    assert build_engine(graph, larger, "again") == replace(here, built=False)  # in the same process
    assert list((cache / "engines").glob("*.engine")) == [kept.path]


def test_a_failed_build_leaves_nothing(tensorrt: FakeBuilder, graph: ExportedModel, cache: Path) -> None:
    tensorrt.plan = None
    with pytest.raises(EngineError, match=r"built no engine.*out of memory.*smaller --batch"):
        build_engine(graph, EngineOptions("tensorrt"), "again")
    assert not list((cache / "engines").iterdir())


def test_no_fingerprint_appears_without_its_engine(
    tensorrt: FakeBuilder, graph: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target.suffix == ".engine":
            raise PermissionError(f"{target}: in use")
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError, match="in use"):
        build_engine(graph, EngineOptions("tensorrt"), "again", tmp_path / "out" / "model.engine")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "abc"),
        ("version", None),
        ("version", 7),
        ("engine_bytes", "x"),
        ("engine_bytes", None),
        ("compute_capabilities", [8.9]),
        ("compute_capabilities", 8.9),
        ("library", "other"),
        ("precision", "fp32"),
        ("profile", {"images": [[1, 3, 70, 70], [8, 3, 70, 70], [64, 3, 70, 70]]}),
        ("strip_weights", True),
        ("version_compatible", True),
        ("hardware_compatible", True),
        ("agreement", "fine"),
        ("sha256", ""),
    ],
)
def test_an_edited_fingerprint_is_refused(
    tensorrt: FakeBuilder, graph: ExportedModel, tmp_path: Path, field: str, value: object
) -> None:
    path = tmp_path / "model.engine"
    build_engine(graph, EngineOptions("tensorrt"), "again", path)
    stored = json.loads(fingerprint_path(path).read_text())
    assert stored[field] != value
    fingerprint_path(path).write_text(json.dumps({**stored, field: value}))
    with pytest.raises(EngineError, match=r"no fingerprint of this version.*--target tensorrt \(or tensorrt-rtx\)"):
        read_engine(path)


MAKE_AGAIN = "build it again: zsad-export --checkpoint x"


def test_engines_that_do_not_fit_are_refused(
    tensorrt: FakeBuilder, graph: ExportedModel, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "model.engine"
    build_engine(graph, EngineOptions("tensorrt"), "zsad-export --checkpoint x", path)
    plan, fingerprint = read_engine(path, onnx=graph.path)
    assert plan == b"plan of an engine"
    assert isinstance(fingerprint, Fingerprint)

    other = tmp_path / "other.onnx"
    other.write_bytes(b"another graph")
    with pytest.raises(EngineError, match=f"from another graph than .*other.onnx; {MAKE_AGAIN}"):
        read_engine(path, onnx=other)
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_engine, "use_device", lambda device: "9.0")
        with pytest.raises(EngineError, match=f"capability 8.9, device 0 has 9.0; {MAKE_AGAIN}"):
            read_engine(path)
    tensorrt.__version__ = "10.14.1"
    with pytest.raises(EngineError, match=rf"tensorrt 10\.13\.0\.35, installed is 10\.14\.1; {MAKE_AGAIN}"):
        read_engine(path)
    tensorrt.__version__ = "10.13.0.35"

    path.write_bytes(plan[:5])
    with pytest.raises(EngineError, match=f"truncated, 5 of 17 bytes; {MAKE_AGAIN}"):
        read_engine(path)
    path.write_bytes(plan[::-1])
    with pytest.raises(EngineError, match=f"not the engine that its fingerprint describes; {MAKE_AGAIN}"):
        read_engine(path)
    for text in ("{", "[]", "{}", "7", '"text"', json.dumps(asdict(fingerprint))):
        fingerprint_path(path).write_text(text)
        with pytest.raises(EngineError, match=r"no fingerprint of this version.*build one: zsad-export --preset"):
            read_engine(path)
    fingerprint_path(path).unlink()
    with pytest.raises(EngineError, match="zsad did not build it; build one: zsad-export --preset"):
        read_engine(path)
    path.unlink()
    with pytest.raises(EngineError, match="no such engine; build one"):
        read_engine(path)


def test_compatible_engines_run_elsewhere(
    tensorrt: FakeBuilder, graph: ExportedModel, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "model.engine"
    options = EngineOptions("tensorrt", version_compatible=True, hardware_compatible=True)
    build_engine(graph, options, "zsad-export --checkpoint x", path)
    monkeypatch.setattr(tensorrt_engine, "use_device", lambda device: "12.0")
    tensorrt.__version__ = "10.14.1"
    read_engine(path)
    for version in ("10.12.0", "11.0.0"):
        tensorrt.__version__ = version
        with pytest.raises(EngineError, match="installed is"):
            read_engine(path)
    tensorrt.__version__ = "10.13.0.35"
    monkeypatch.setattr(tensorrt_engine, "use_device", lambda device: "7.5")
    with pytest.raises(EngineError, match=r"has 7\.5"):
        read_engine(path)


@pytest.mark.parametrize(
    ("options", "precision", "message"),
    [
        (EngineOptions("tensorrt"), "int8", "int8 is for the CPU"),
        (EngineOptions("tensorrt", (8, 1, 32)), "fp16", "--batch 1,8,32"),
        (EngineOptions("tensorrt", (0, 1, 2)), "fp16", "--batch 1,8,32"),
        (EngineOptions("tensorrt", (1, 8, 3_000_000_000)), "fp16", "not beyond 4096.*, not 1,8,3000000000"),
        (EngineOptions("tensorrt", device=-1), "fp16", "--device counts GPUs from 0, not -1"),
        (EngineOptions("tensorrt", compute_capabilities=("8.9",)), "fp16", "--compute-capability is TensorRT-RTX's"),
    ],
)
def test_options_that_do_not_fit(
    tensorrt: FakeBuilder, graph: ExportedModel, options: EngineOptions, precision: str, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        build_engine(replace(graph, precision=precision), options, "again")


def test_without_a_gpu(tensorrt: FakeBuilder, graph: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(device: int) -> str:
        raise CudaError("no NVIDIA driver on this machine")

    monkeypatch.setattr(tensorrt_engine, "use_device", none)
    with pytest.raises(EngineError, match=r"no NVIDIA driver.*tensorrt-rtx builds without one"):
        build_engine(graph, EngineOptions("tensorrt"), "again")


def test_the_command_refuses_before_it_exports(
    random_dinov2: Callable[..., Path], cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    arguments = ["--checkpoint", str(random_dinov2()), "--taps", "0", "--target", "tensorrt"]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main(arguments) == 2
    assert "tensorrt is not" in capsys.readouterr().err
    assert not cache.exists()
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--attention", "fused"])


def test_the_driver_is_asked_or_missing() -> None:
    for device in (99, -1):
        with pytest.raises(CudaError, match=f"no NVIDIA driver|there is no GPU {device}"):
            use_device(device)


@pytest.mark.parametrize(("target", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt-rtx")])
def test_a_missing_library_says_how_to_install_it(target: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = target.replace("-", "_")
    monkeypatch.setitem(sys.modules, module, None)
    for system, machine in (("Darwin", "arm64"), ("Linux", "riscv64")):
        monkeypatch.setattr(libraries.platform, "system", lambda system=system: system)
        monkeypatch.setattr(libraries.platform, "machine", lambda machine=machine: machine)
        with pytest.raises(EngineError, match=f"not made for {system} on {machine}; use --target onnx"):
            import_tensorrt(target)
    monkeypatch.setattr(libraries.platform, "system", lambda: "Linux")
    monkeypatch.setattr(libraries.platform, "machine", lambda: "x86_64")
    with pytest.raises(EngineError, match=rf"not installed.*-m pip install 'zsad\[gpu,{extra}\]'"):
        import_tensorrt(target)
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(__version__="0.9.0"))
    with pytest.raises(EngineError, match=r"too old.*--upgrade"):
        import_tensorrt(target)


@pytest.mark.slow
def test_importing_the_export_side_imports_neither_pytorch_nor_tensorrt() -> None:
    code = (
        "import sys, zsad.export.onnx_export, zsad.export.tensorrt_engine;"
        "print([m for m in ('torch', 'tensorrt', 'tensorrt_rtx') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@needs_rtx
def test_tensorrt_rtx_reads_the_types_that_the_graph_says(graph: ExportedModel) -> None:
    trt = import_tensorrt("tensorrt-rtx")
    _, network = parse_network(trt, graph.path, tensorrt_engine._logger(trt))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types_of: dict[str, Counter] = {}
    for layer in layers:
        types_of.setdefault(layer.type.name, Counter())[layer.get_output_type(0).name] += 1
    assert types_of["CONVOLUTION"] == {"HALF": 1}
    assert types_of["MATRIX_MULTIPLY"] == {"HALF": 2 * 6}  # qkv, logits, mixed, proj, fc1, fc2
    assert types_of["SOFTMAX"] == {"FLOAT": 2}
    assert types_of["NORMALIZATION"] == {"FLOAT": 2 * 2 + 2 + 1}  # blocks, taps, embedding
    assert types_of["ACTIVATION"] == {"HALF": 2}
    outputs = {network.get_output(index).name: network.get_output(index).dtype for index in range(network.num_outputs)}
    assert {name: dtype.name for name, dtype in outputs.items()} == {"tokens": "HALF", "embedding": "FLOAT"}
    assert tuple(network.get_input(0).shape) == (-1, 3, 70, 70)
    assert network.get_input(0).dtype.name == "FLOAT"


@needs_rtx
def test_a_foreign_graph_is_refused_by_the_parser(random_dinov2: Callable[..., Path], tmp_path: Path) -> None:
    options = ExportOptions((0, 1), 70, precision="int8")
    quantised = export_onnx(str(random_dinov2()), options, tmp_path / "int8.onnx")
    with pytest.raises(EngineError, match=r"refused by the parser.*--target tensorrt"):
        build_engine(replace(quantised, precision="fp32"), RTX, "again")


@pytest.mark.slow
@needs_rtx
def test_tensorrt_rtx_builds_caches_and_needs_a_gpu_to_run(graph: ExportedModel, cache: Path) -> None:
    engine = build_engine(graph, replace(RTX, compute_capabilities=("8.9", "12.0")), "again")
    assert engine.built
    assert engine.fingerprint.compute_capabilities == ("8.9", "12.0")
    assert engine.path.stat().st_size == engine.fingerprint.engine_bytes > 100_000
    assert not build_engine(graph, replace(RTX, compute_capabilities=("8.9", "12.0")), "again").built
    assert len(list((cache / "engines").iterdir())) == 2
    try:
        use_device(0)
    except CudaError:
        with pytest.raises(EngineError, match="use ONNX Runtime on the CPU"):
            load_engine(engine.path)


@needs_rtx
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(RTX, version_compatible=True), "leave out --version-compatible"),
        (replace(RTX, compute_capabilities=("9.0",)), "does not know compute capability 9.0.*--target tensorrt"),
    ],
)
def test_options_that_tensorrt_rtx_does_not_take(graph: ExportedModel, options: EngineOptions, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        build_engine(graph, options, "again")


@pytest.mark.long
@needs_rtx
def test_command_builds_two_layers_of_vit_large(
    random_dinov2: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = random_dinov2(width=1024)
    arguments = ["--checkpoint", str(checkpoint), "--taps", "0,1", "--image-size", "70", "--target", "tensorrt-rtx"]
    arguments += ["--batch", "1,2,4", "--output", str(tmp_path / "large.engine")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "large.engine")
    assert "fp16 against" in printed.err
    fingerprint = json.loads((tmp_path / "large.engine.json").read_text())
    weights = 2 * 12 * 1024**2 * 2  # bytes: two blocks, twelve matrices' worth, fp16
    assert weights < fingerprint["engine_bytes"] < 1.3 * weights
    assert fingerprint["profile"] == {"images": [[1, 3, 70, 70], [2, 3, 70, 70], [4, 3, 70, 70]]}
    words = fingerprint["command"].split()
    assert words[0] == "zsad-export"
    assert main(words[1:]) == 0  # the command that mends makes the same engine
    assert capsys.readouterr().err.count("already built") == 2


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_tensorrt_rtx_builds_a_text_tower(tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(write_clip(tmp_path, "april")), "--graph", "text", "--target", "tensorrt-rtx"]
    arguments += ["--precision", precision, "--batch", "1,8,64", "--output", str(tmp_path / "text.engine")]
    assert main(arguments) == 0
    assert f"{precision} against" in capsys.readouterr().err
    fingerprint = json.loads((tmp_path / "text.engine.json").read_text())
    assert fingerprint["profile"] == {"ids": [[1, 77], [8, 77], [64, 77]]}
    assert main(shlex.split(fingerprint["command"])[1:]) == 0
    assert capsys.readouterr().err.count("already built") == 2


@pytest.mark.slow
@needs_rtx
def test_tensorrt_rtx_reads_the_types_of_a_text_tower(tmp_path: Path) -> None:
    trt = import_tensorrt("tensorrt-rtx")
    options = TextOptions(precision="fp16", attention="standard")
    graph = export_onnx(str(write_clip(tmp_path, "april")), options)
    _, network = parse_network(trt, graph.path, tensorrt_engine._logger(trt))
    (ids, embedding) = network.get_input(0), network.get_output(0)
    assert (ids.dtype.name, tuple(ids.shape)) == ("INT32", (-1, 77))
    assert (embedding.dtype.name, tuple(embedding.shape)) == ("FLOAT", (-1, 24))


@pytest.mark.long
@needs_rtx
def test_tensorrt_rtx_builds_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ",".join(IMAGE_OUTPUTS)
    arguments = ["--checkpoint", str(write_clip(tmp_path, "april")), "--taps", "2,5", "--image-size", "98"]
    arguments += ["--outputs", outputs, "--antialias", "--target", "tensorrt-rtx"]
    assert main([*arguments, "--output", str(tmp_path / "windows.engine")]) == 0
    capsys.readouterr()
    fingerprint = json.loads((tmp_path / "windows.engine.json").read_text())
    assert "--antialias" in fingerprint["command"]
    assert main(shlex.split(fingerprint["command"])[1:]) == 0
    assert capsys.readouterr().err.count("already built") == 2
    assert fingerprint["engine_bytes"] > 2 * 12 * 12 * 64**2  # weights in fp16, once for all three sequences


@pytest.mark.long
@needs_rtx
@pytest.mark.usefixtures("uncompared")
def test_tensorrt_rtx_builds_clipseg(
    published_clipseg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles = {
        "clipseg_image": {"images": [[1, 3, 352, 352], [1, 3, 352, 352], [4, 3, 352, 352]]},
        "clipseg_decoder": {"activations": [[3, 485, 768]] * 3, "conditions": [[1, 512], [19, 512], [32, 512]]},
    }
    for (graph, profile), batch in zip(profiles.items(), ("1,1,4", "1,19,32"), strict=True):
        engine = tmp_path / f"{graph}.engine"
        arguments = ["--checkpoint", str(published_clipseg), "--graph", graph, "--target", "tensorrt-rtx"]
        assert main([*arguments, "--batch", batch, "--output", str(engine)]) == 0
        capsys.readouterr()
        fingerprint = json.loads((tmp_path / f"{graph}.engine.json").read_text())
        assert fingerprint["profile"] == profile
        assert main(shlex.split(fingerprint["command"])[1:]) == 0
        assert capsys.readouterr().err.count("already built") == 2


@pytest.mark.long
@needs_rtx
@pytest.mark.usefixtures("uncompared")
def test_tensorrt_rtx_builds_isnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the published shape, at a quarter of the published side."""
    checkpoint = write_states(tmp_path / "isnet.safetensors", isnet_state())
    arguments = ["--checkpoint", str(checkpoint), "--graph", "isnet", "--image-size", "256", "--target", "tensorrt-rtx"]
    arguments += ["--batch", "1,1,2", "--compute-capability", "8.9"]
    assert main([*arguments, "--output", str(tmp_path / "isnet.engine")]) == 0
    capsys.readouterr()
    fingerprint = json.loads((tmp_path / "isnet.engine.json").read_text())
    assert fingerprint["profile"] == {"images": [[1, 3, 256, 256], [1, 3, 256, 256], [2, 3, 256, 256]]}
    assert fingerprint["engine_bytes"] > 2 * 43_000_000
    assert main(shlex.split(fingerprint["command"])[1:]) == 0
    assert capsys.readouterr().err.count("already built") == 2


@pytest.mark.slow
@needs_rtx
def test_tensorrt_rtx_reads_the_types_of_isnet(tmp_path: Path) -> None:
    trt = import_tensorrt("tensorrt-rtx")
    graph = export_onnx(str(write_states(tmp_path / "isnet.safetensors", isnet_state(8))), IsnetOptions(128, "fp16"))
    _, network = parse_network(trt, graph.path, tensorrt_engine._logger(trt))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types_of: dict[str, Counter] = {}
    for layer in layers:
        types_of.setdefault(layer.type.name, Counter())[layer.get_output_type(0).name] += 1
    assert types_of["CONVOLUTION"] == {"HALF": 114}
    assert types_of["RESIZE"] == {"HALF": 33, "FLOAT": 1}
    (images, foreground) = network.get_input(0), network.get_output(0)
    assert (images.dtype.name, tuple(images.shape)) == ("FLOAT", (-1, 3, 128, 128))
    assert (foreground.dtype.name, tuple(foreground.shape)) == ("FLOAT", (-1, 128, 128))


@pytest.mark.long
@needs_rtx
@pytest.mark.usefixtures("uncompared")
@pytest.mark.parametrize(
    ("kind", "graph", "weights"),
    [
        ("sam", "sam_image", 2 * 12 * 768**2),  # two of its blocks
        ("sam", "sam_masks", 3_000_000),
        ("mobile", "sam_image", 5_000_000),
    ],
)
def test_tensorrt_rtx_builds_sam_at_its_size(
    kind: str, graph: str, weights: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = sam_encoder_state(768, [14, 64], 64, 64) if kind == "sam" else tiny_encoder_state()
    checkpoint = write_states(tmp_path / f"{kind}.safetensors", encoder, mask_decoder_state())
    arguments = ["--checkpoint", str(checkpoint), "--graph", graph, "--target", "tensorrt-rtx", "--batch", "1,1,64"]
    assert main([*arguments, "--output", str(tmp_path / "sam.engine")]) == 0
    capsys.readouterr()
    fingerprint = json.loads((tmp_path / "sam.engine.json").read_text())
    assert 2 * weights < fingerprint["engine_bytes"] < 3 * (2 * weights)
    shapes = {"images": [1, 3, 1024, 1024]} if graph == "sam_image" else {"points": [1, 2]}
    assert {name: profile[0] for name, profile in fingerprint["profile"].items() if name in shapes} == shapes
    assert main(shlex.split(fingerprint["command"])[1:]) == 0
    assert capsys.readouterr().err.count("already built") == 2


@pytest.mark.long
@needs_rtx
def test_command_builds_every_engine_of_vvv(tmp_path: Path) -> None:
    """For as many rows as runs have; in the sizes of a toy."""
    states = {
        "clip": [tower_state(Shape(CLIP, 64, 2, patch_size=16, stored_grid=3, projection=64)), text_state(64)],
        "clipseg": [clipseg_state(48, 24, 16)],
        "isnet": [isnet_state(8)],
        "sam": [sam_encoder_state(32, [3, 8], 16, 8, out=32), mask_decoder_state(32, hidden=16, quality=16)],
    }
    files = {name: write_states(tmp_path / f"{name}.safetensors", *parts) for name, parts in states.items()}
    config = tmp_path / "tiny.toml"
    config.write_text(
        f"""
        image_size = 48
        [networks.clip]
        checkpoint = "{files["clip"]}"
        [networks.clipseg]
        checkpoint = "{files["clipseg"]}"
        image_size = 32
        heads = 3
        text_heads = 2
        [stages.isnet]
        checkpoint = "{files["isnet"]}"
        image_size = 64
        [stages.sam]
        checkpoint = "{files["sam"]}"
        image_size = 128
        heads = 4
        """
    )
    arguments = ["--preset", "vvv", "--config", str(config), "--target", "tensorrt-rtx", "--output", str(tmp_path)]
    assert main(arguments) == 0
    batches = {}
    for file in tmp_path.glob("*.engine.json"):
        profile = json.loads(file.read_text())["profile"]
        batched = profile.get("points") or profile.get("conditions") or next(iter(profile.values()))
        batches[file.name.removesuffix("-fp16.engine.json")] = [shape[0] for shape in batched]
    assert batches == {
        "clip-48": [1, 8, 32],
        "clip-text": [1, 8, 32],
        "clipseg-image-32": [1, 8, 32],
        "clipseg-decoder-32": [1, 6, 6],
        "clipseg-text": [1, 8, 32],
        "isnet-isnet-64": [1, 1, 1],
        "sam-image-128": [1, 1, 1],
        "sam-masks-128": [1, 16, 16],
    }
