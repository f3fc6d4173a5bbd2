"""ONNX file in, TensorRT or TensorRT-RTX engine with a fingerprint beside it out.

One builder serves TensorRT 10.12 and later, 11, and TensorRT-RTX: the network is strongly typed, so that the ONNX file
alone decides the precisions. TensorRT builds on the GPU that will run the engine; TensorRT-RTX builds without one.
"""

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from zsad.kernels.files import find_sealed, parse_json, remembered_sha256, write_sealed, written_whole
from zsad.kernels.machine import cache_places, cache_to_write

from .agreement import Array, check_agreement, run_graph
from .cuda_driver import CudaError, use_device
from .libraries import RTX_CAPABILITIES, EngineError, import_tensorrt, numbers
from .onnx_export import ExportedModel, weights_path
from .options import GRAPH_WORDS, ExportOptions, GraphOptions, Shape
from .state_dict import CheckpointError

log = logging.getLogger("zsad")

LARGEST_BATCH = 4096  # images; TensorRT counts in 32 bits
RTX_DEFAULT = ("8.0", "8.6", "8.9", "12.0", "12.1")  # what an engine runs on when none is named: not Turing


@dataclass(frozen=True)
class EngineOptions:
    """Everything that decides what is in an engine besides the ONNX file."""

    target: str  # tensorrt or tensorrt-rtx
    batch: tuple[int, int, int] = (1, 8, 32)  # smallest, the one to optimise for, largest
    device: int = 0
    compute_capabilities: tuple[str, ...] = ()  # tensorrt-rtx only; none means all from 8.0
    strip_weights: bool = False
    version_compatible: bool = False  # tensorrt only: runs in later versions with the same major number
    hardware_compatible: bool = False  # tensorrt only: runs on every GPU from 8.0


@dataclass(frozen=True)
class Fingerprint:
    """What an engine was made from and for, kept as JSON beside it."""

    onnx: str
    onnx_sha256: str
    library: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    profile: dict[str, list[list[int]]]  # input → smallest, best and largest shape
    strip_weights: bool
    version_compatible: bool
    hardware_compatible: bool
    command: str  # builds it again
    agreement: str = ""  # how close it is to its graph, once it has run on a GPU
    engine_sha256: str = ""
    engine_bytes: int = 0

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "sha256": self.sha256()}, indent=2) + "\n"

    def sha256(self) -> str:
        """Return a digest of everything in it, by which an edited one is known."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def key(self) -> str:
        """Return a digest of everything that decides the engine's content."""
        decisive = {
            k: v
            for k, v in asdict(self).items()
            if k not in ("onnx", "command", "agreement") and not k.startswith("engine")
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BuiltEngine:
    """An engine file, its fingerprint, and whether this call made it."""

    path: Path
    fingerprint: Fingerprint
    built: bool


def build_engine(
    graph: ExportedModel, options: EngineOptions, command: str, output: Path | None = None, keep: bool = False
) -> BuiltEngine:
    """Build the engine of an exported graph (attention `standard`), or return the one built before.

    command: what the fingerprint tells to run when the engine must be made again. output: the file to write; by default
    one in the cache that is named after the fingerprint. keep: see `export_onnx`.

    Raises EngineError when the library or the GPU is missing, or when the library refuses the graph; CacheError when
    the cache cannot be written.
    """
    trt, capabilities = check_options(options, graph.precision)
    onnx = graph.path
    fingerprint = Fingerprint(
        onnx=onnx.name,
        onnx_sha256=_onnx_sha256(onnx),
        library=options.target,
        version=trt.__version__,
        compute_capabilities=capabilities,
        precision=graph.precision,
        profile={name: _profile(shape, options.batch) for name, shape in graph.inputs.items()},
        strip_weights=options.strip_weights,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        command=command,
    )
    name = f"{onnx.stem}-{fingerprint.key()}.engine"
    for path in [output] if output else [folder / name for folder in cache_places("engines")]:
        try:
            found = _read_fingerprint(path)
            if found.key() == fingerprint.key():
                return BuiltEngine(path, found, built=False)
        except EngineError as error:  # missing, damaged or foreign
            if path.is_file():
                log.warning("%s", str(error).partition("; ")[0] + "; it is built anew")
    path = output or cache_to_write("engines", keep) / name
    engine = _build(trt, onnx, fingerprint, options)
    fingerprint = replace(fingerprint, engine_sha256=hashlib.sha256(engine).hexdigest(), engine_bytes=len(engine))
    with written_whole(fingerprint_path(path)) as beside, written_whole(path) as temporary:  # the engine appears first
        temporary.write_bytes(engine)
        beside.write_text(fingerprint.as_json(), encoding="utf-8")
    return BuiltEngine(path, fingerprint, built=True)


def _profile(shape: Shape, batches: Sequence[int]) -> list[list[int]]:
    """Return an input's shape with the smallest, the best and the largest batch."""
    return [[batch if length is None else length for length in shape] for batch in batches]


def confirm_engine(
    engine: BuiltEngine, onnx: Path, inputs: Mapping[str, NDArray[Any]], found: Mapping[str, Array]
) -> None:
    """Note in the fingerprint that an engine computes what its graph does; raises EngineError where it does not.

    found: what it gives for the inputs.
    """
    try:
        line = check_agreement(found, run_graph(onnx, inputs), engine.fingerprint.precision, "its graph on the CPU")
    except CheckpointError as error:
        raise EngineError(f"{engine.path}: {error}") from None
    # Where the folder cannot be written to, the next run compares again.
    with suppress(OSError), written_whole(fingerprint_path(engine.path)) as beside:
        beside.write_text(replace(engine.fingerprint, agreement=line).as_json(), encoding="utf-8")


def rebuild_command(checkpoint: str, graph: GraphOptions, options: EngineOptions, output: Path | None = None) -> str:
    """Return the command line that exports this graph and builds this engine of it."""
    words = ["zsad-export", "--checkpoint", checkpoint]
    words += _graph_words(graph)
    words += ["--target", options.target, "--precision", graph.precision]
    words += ["--batch", ",".join(map(str, options.batch)), "--device", str(options.device)]
    words += ["--compute-capability", ",".join(options.compute_capabilities)] if options.compute_capabilities else []
    for flag in ("strip_weights", "version_compatible", "hardware_compatible"):
        words += ["--" + flag.replace("_", "-")] if getattr(options, flag) else []
    words += ["--output", str(output)] if output else []
    return shlex.join(words)


def _graph_words(graph: GraphOptions) -> list[str]:
    """The options of a kind of graph in the words of `zsad-export`."""
    words = [] if isinstance(graph, ExportOptions) else ["--graph", graph.kind]
    for option in fields(graph):
        value, flag = getattr(graph, option.name), "--" + option.name.replace("_", "-")
        if option.name not in GRAPH_WORDS or value in (None, ()):
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def read_engine(path: Path, device: int = 0, onnx: Path | None = None) -> tuple[bytes, Fingerprint]:
    """Return an engine's bytes and fingerprint after checking that it may run here.

    onnx: the graph that it must have been made from, if known. Raises EngineError when the file is missing, truncated
    or foreign, or was made by another library version, for another GPU or from another graph.
    """
    fingerprint = _read_fingerprint(path)
    trt = import_tensorrt(fingerprint.library)
    again = f"; build it again: {fingerprint.command}"
    same_major = trt.__version__.split(".")[0] == fingerprint.version.split(".")[0]
    newer = numbers(trt.__version__) >= numbers(fingerprint.version)
    if trt.__version__ != fingerprint.version and not (fingerprint.version_compatible and same_major and newer):
        raise EngineError(
            f"{path}: built by {fingerprint.library} {fingerprint.version}, installed is {trt.__version__}{again}"
        )
    if onnx is not None and _onnx_sha256(onnx) != fingerprint.onnx_sha256:
        raise EngineError(f"{path}: built from another graph than {onnx}{again}")
    try:
        capability = use_device(device)
    except CudaError as error:
        raise EngineError(f"{path}: {error}; without a GPU use ONNX Runtime on the CPU: --device cpu") from None
    if capability not in fingerprint.compute_capabilities and not (
        fingerprint.hardware_compatible and numbers(capability) >= (8, 0)
    ):
        built_for = ", ".join(fingerprint.compute_capabilities)
        raise EngineError(f"{path}: built for compute capability {built_for}, device {device} has {capability}{again}")
    return path.read_bytes(), fingerprint


@dataclass(frozen=True)
class LoadedEngine:
    """An ICudaEngine, and what must live as long as it does."""

    engine: Any
    library: Any  # tensorrt or tensorrt_rtx
    runtime: Any
    log: Any  # `said()` returns the library's latest complaints


def load_engine(path: Path, device: int = 0, onnx: Path | None = None) -> LoadedEngine:
    """Load a file that `read_engine` accepts; stripped ones get their weights from `onnx`.

    Raises EngineError, also when the library refuses the engine.
    """
    plan, fingerprint = read_engine(path, device, onnx)
    trt = import_tensorrt(fingerprint.library)
    log = _logger(trt)
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = fingerprint.version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{path}: {log.said()}; build it again: {fingerprint.command}")
    if fingerprint.strip_weights:
        if onnx is None:
            raise EngineError(f"{path}: holds no weights; name the graph that it was made from ({fingerprint.onnx})")
        refitter = trt.Refitter(engine, log)
        if not trt.OnnxParserRefitter(refitter, log).refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
            raise EngineError(f"{path}: the weights of {onnx} do not fit ({log.said()}); {fingerprint.command}")
    return LoadedEngine(engine, trt, runtime, log)


def fingerprint_path(engine: Path) -> Path:
    """Return where the fingerprint of an engine lies."""
    return engine.with_name(engine.name + ".json")


def check_options(options: EngineOptions, precision: str) -> tuple[Any, tuple[str, ...]]:
    """Return the library and the compute capabilities that an engine will run on, before any work is done.

    Raises EngineError when the library or the GPU is missing, or when the options do not go together.
    """
    trt = import_tensorrt(options.target)
    if precision == "int8":
        raise EngineError("int8 is for the CPU (--target onnx); TensorRT engines take --precision fp16 or fp32")
    if not 0 < options.batch[0] <= options.batch[1] <= options.batch[2] <= LARGEST_BATCH:
        raise EngineError(
            f"batch sizes must rise from smallest to largest and not beyond {LARGEST_BATCH}, for example "
            f"--batch 1,8,32, not {','.join(map(str, options.batch))}"
        )
    if options.device < 0:
        raise EngineError(f"--device counts GPUs from 0, not {options.device}")
    return trt, _rtx_capabilities(options) if options.target == "tensorrt-rtx" else _own_capability(options)


def _own_capability(options: EngineOptions) -> tuple[str, ...]:
    if options.compute_capabilities:
        raise EngineError("--compute-capability is TensorRT-RTX's; TensorRT builds for the GPU named by --device")
    try:
        return (use_device(options.device),)
    except CudaError as error:
        raise EngineError(
            f"{error}. TensorRT builds on the GPU that will run the engine; --target tensorrt-rtx builds without one"
        ) from None


def _rtx_capabilities(options: EngineOptions) -> tuple[str, ...]:
    if options.version_compatible or options.hardware_compatible:
        raise EngineError(
            "TensorRT-RTX engines run on every RTX GPU of the named --compute-capability and are bound to their "
            "version; leave out --version-compatible and --hardware-compatible"
        )
    for capability in options.compute_capabilities:
        if capability not in RTX_CAPABILITIES:
            raise EngineError(
                f"TensorRT-RTX does not know compute capability {capability} (only {', '.join(RTX_CAPABILITIES)}); "
                "for datacentre GPUs use --target tensorrt"
            )
    if options.strip_weights:
        try:
            use_device(options.device)
        except CudaError as error:
            raise EngineError(f"{error}; TensorRT-RTX strips weights only on a machine with a GPU") from None
    return options.compute_capabilities or RTX_DEFAULT


def parse_network(trt: Any, onnx: Path, log: Any) -> tuple[Any, Any]:
    """Return the builder and the strongly typed network of a graph; raises EngineError with the parser's complaints."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        complaints = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineError(f"{onnx}: refused by the parser ({complaints}); export it with --target tensorrt")
    return builder, network


def _build(trt: Any, onnx: Path, fingerprint: Fingerprint, options: EngineOptions) -> bytes:
    log = _logger(trt)
    builder, network = parse_network(trt, onnx, log)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on unless cleared: fp32 products with the factors cut to 10 bits
    profile = builder.create_optimization_profile()
    for name, shapes in fingerprint.profile.items():
        profile.set_shape(name, *(tuple(shape) for shape in shapes))
    config.add_optimization_profile(profile)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index)
    timings = ""
    if options.target == "tensorrt":  # TensorRT-RTX does not time, and asks for a GPU when given a cache
        timings = f"timings-{fingerprint.version}-{fingerprint.compute_capabilities[0]}.cache"
        found = [file for folder in cache_places("engines") if (file := find_sealed(folder / timings)) is not None]
        known = b""
        with suppress(OSError, IndexError):  # another process may have measured more just now
            known = found[-1].read_bytes()
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{options.target} built no engine from {onnx}: {log.said()}; try a smaller --batch")
    if timings:
        measured = write_sealed(cache_to_write("engines") / timings, bytes(config.get_timing_cache().serialize()))
        for old in set(found) - {measured}:
            with suppress(OSError):
                old.unlink()
    return bytes(plan)


def _read_fingerprint(path: Path) -> Fingerprint:
    """Read the fingerprint of an engine; raises EngineError unless the two belong together."""
    anew = f"build one: zsad-export --preset NAME --target tensorrt (or tensorrt-rtx) --output '{path.parent}'"
    if not path.is_file():
        raise EngineError(f"{path}: there is no such engine; {anew}")
    beside = fingerprint_path(path)
    try:
        stored = dict(parse_json(beside.read_text(encoding="utf-8")))
        sha256, capabilities = stored.pop("sha256", ""), tuple(stored.pop("compute_capabilities", ()))
        fingerprint = Fingerprint(**stored, compute_capabilities=capabilities)
        if fingerprint.sha256() != sha256:
            raise ValueError("edited or damaged")
    except FileNotFoundError:
        raise EngineError(f"{path}: has no fingerprint ({beside.name}), so zsad did not build it; {anew}") from None
    except (ValueError, TypeError) as error:
        raise EngineError(f"{beside}: no fingerprint of this version ({error}); {anew}") from None
    size = path.stat().st_size
    if size < fingerprint.engine_bytes:
        raise EngineError(
            f"{path}: truncated, {size} of {fingerprint.engine_bytes} bytes; build it again: {fingerprint.command}"
        )
    if remembered_sha256(path) != fingerprint.engine_sha256:
        raise EngineError(
            f"{path}: not the engine that its fingerprint describes; build it again: {fingerprint.command}"
        )
    return fingerprint


def _onnx_sha256(onnx: Path) -> str:
    """The digest of a graph, and of the file of weights beside it where there is one."""
    digests = [remembered_sha256(file) for file in (onnx, weights_path(onnx)) if file.is_file()]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _logger(trt: Any) -> Any:
    """A logger that keeps errors for the message instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message.strip())

        def said(self) -> str:
            return "; ".join(self.errors[-3:]) or "no reason given"

    return Log()
