"""Which library runs the networks, on what, and why.

TensorRT, TensorRT-RTX or ONNX Runtime on a CUDA device; on a CPU ONNX Runtime, OpenVINO, or zsad's own code.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

from zsad.engine.config import ConfigError
from zsad.export.libraries import (
    DRIVERS,
    RTX_CAPABILITIES,
    TARGETS,
    EngineError,
    gpu_extras,
    import_onnxruntime,
    import_openvino,
    import_tensorrt,
    install_command,
    mixed_cuda,
)
from zsad.kernels.cpu.native import has_native_code
from zsad.kernels.machine import processor, zsad_version

from .onnx_runtime import try_provider

if TYPE_CHECKING:
    from zsad.kernels.cuda.device import Device

log = logging.getLogger("zsad")

# native: image towers in zsad's own code for CPUs, everything else in ONNX Runtime
Library = Literal["onnxruntime", "openvino", "native", "tensorrt", "tensorrt-rtx"]
# Flags of processors that multiply in bf16.
BF16 = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True)
class Runtime:
    """Which library runs the networks, on what, where scores are computed, and why."""

    library: Library
    devices: "Sequence[Device]"  # that score; none is the CPU
    device: "Device | None"  # the one of them that runs the networks; None is the CPU
    reason: str
    rival: Library | None = None  # on a CPU: what runs the graphs that a measurement finds it faster at
    native: bool = False  # on a CPU: image towers may run in zsad's own code too
    measures: bool = True  # where several may: whether a measurement decides; else the usual one runs them

    @property
    def device_name(self) -> str:
        """What the networks run on: cpu or cuda:N."""
        return f"cuda:{self.device.number}" if self.device else "cpu"

    def describe(self, used: Collection[str] = ()) -> str:
        """Name the library with its version and what it runs on; used: those that run graphs, where that is known."""
        named = [f"{library} {_version(library)}" for library in sorted(used or {self.library})]
        return f"{' and '.join(named)} on {self.device.name if self.device else 'the CPU'}"

    def libraries(self, precision: str, on_demand: bool) -> tuple[Library, ...]:
        """Return what may run a graph in a precision: the first one, unless another one turns out to be faster.

        on_demand: the graph runs seldom, which is worth no comparison.
        """
        if precision == "bf16":
            return ("openvino",)
        if self.rival is None or on_demand or not self.measures:
            return (self.library,)
        return (self.library, self.rival)

    def network_precision(self, asked: str) -> str:
        """Return the precision that networks run in; raises ConfigError for one that is not to be had here."""
        allowed = ("fp16", "fp32") if self.device else ("fp32", "int8")
        if not self.device and asked == "bf16":
            self._check_bf16()
            return asked
        if asked not in ("auto", *allowed):
            where = "a GPU" if self.device else "a CPU"
            if self.devices and not self.device:
                where += f" ({self.reason})"
            raise ConfigError(f"--network-precision {asked} is not available on {where}; use {' or '.join(allowed)}")
        return allowed[0] if asked == "auto" else asked

    def _check_bf16(self) -> None:
        """Raise ConfigError unless networks can run in bf16 here."""
        otherwise = "use --network-precision fp32 or int8"
        if not BF16 & set(processor("flags").split()):
            raise ConfigError(f"--network-precision bf16: this processor does not multiply in bf16; {otherwise}")
        if "openvino" not in (self.library, self.rival):
            runs = "leave --runtime out" if find_spec("openvino") else install_command("'zsad[cpu,openvino]'")
            raise ConfigError(f"--network-precision bf16 needs OpenVINO: {runs}; else {otherwise}")


def choose_runtime(device: str = "auto", library: str = "auto") -> Runtime:
    """Choose the fastest runtime that is installed, within what is asked for.

    device: auto, cpu, cuda:N, or several that share the scoring: cuda:N,M or cuda:all. library: auto, onnxruntime,
    openvino, native, tensorrt or tensorrt-rtx. Raises ConfigError with the command that brings what is missing.
    """
    chosen = _choose(device, library)
    native = chosen.device is None and library in ("auto", "native") and has_native_code()
    return replace(chosen, native=native)


def _choose(device: str, library: str) -> Runtime:
    if library not in ("auto", *get_args(Library)):
        raise ConfigError(f"--runtime must be auto or one of {', '.join(get_args(Library))}, not {library!r}")
    if device == "cpu":
        if library in TARGETS:
            raise ConfigError(f"--runtime {library} needs a GPU; on a CPU use onnxruntime, openvino or native")
        return _on_cpu(library, (), "asked for")
    if device != "auto" and not device.startswith("cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda:N, cuda:N,M or cuda:all, not {device!r}")
    cpu_will_do = device == "auto" and library not in TARGETS
    if cpu_will_do and find_spec("cupy") is None:
        return _on_cpu(library, (), "no GPU is used: CuPy is not installed")
    from zsad.kernels.cuda.device import DeviceError, open_devices

    try:
        devices = open_devices("cuda" if device == "auto" else device)
    except DeviceError as error:
        if cpu_will_do:
            return _on_cpu(library, (), f"no GPU is used: {error}")
        asked, otherwise = (f"--device {device}", "use --device cpu")
        if device == "auto":
            asked, otherwise = (f"--runtime {library}", "leave --runtime out")
        why = f"{asked}: {error}"
        if find_spec("cupy") is None:
            extras = f"gpu,{library}" if library in TARGETS else "gpu"
            why = (
                f"{asked} needs CuPy, which is not installed; in a new environment run: pip install 'zsad[{extras}]' "
                f"(in a clone of zsad '.[{extras}]'); {DRIVERS}"
            )
        raise ConfigError(f"{why}; without a GPU {otherwise}") from None

    if mixed := mixed_cuda():
        log.warning("%s", mixed)
    if library in ("openvino", "native"):
        return _on_cpu(library, devices, "asked for; only scoring uses the GPU")
    unusable: dict[str, str] = {}
    for candidate in (library,) if library != "auto" else ("tensorrt", "tensorrt-rtx", "onnxruntime"):
        missing = _missing(candidate, devices[0])
        if missing is None:
            reason = f"{' and '.join(unusable)} cannot be used here" if unusable else "the fastest"
            return Runtime(candidate, devices, devices[0], "asked for" if library != "auto" else reason)  # type: ignore[arg-type]
        unusable[candidate] = missing
        log.debug("%s", missing)
    if library in TARGETS:
        raise ConfigError(unusable[library])
    return _on_cpu(library, devices, f"only scoring uses the GPU, not the networks: {unusable['onnxruntime']}")


def _on_cpu(library: str, devices: "Sequence[Device]", reason: str) -> Runtime:
    """Return what runs networks on a CPU; raises ConfigError where what is asked for cannot be had."""
    if library == "openvino":
        try:
            import_openvino()
        except EngineError as error:
            raise ConfigError(f"--runtime openvino: {error}") from None
        return Runtime("openvino", devices, None, reason)
    if library == "native":
        if not has_native_code():
            raise ConfigError(
                "--runtime native: zsad was installed without a working C++ compiler, so its own code is not there; "
                "leave --runtime out, or install a compiler and zsad again"
            )
        return Runtime("native", devices, None, reason)
    rival = library == "auto" and find_spec("openvino") is not None
    return Runtime("onnxruntime", devices, None, reason, "openvino" if rival else None)


def _version(library: str) -> str:
    """Return the version of a library that runs networks."""
    if library == "native":
        return zsad_version()
    if library in TARGETS:
        return str(import_tensorrt(library).__version__)
    found = import_onnxruntime() if library == "onnxruntime" else import_openvino()
    return str(found.__version__).partition("-")[0]  # OpenVINO's goes on with its build


def _missing(library: str, device: "Device") -> str | None:
    """Say why a library cannot run networks on a device; None where it can."""
    if library == "onnxruntime":
        try:
            providers = import_onnxruntime().get_available_providers()
        except EngineError as error:
            return str(error)
        if "CUDAExecutionProvider" in providers:  # which says nothing of the driver and the libraries
            try:
                try_provider(device)
            except ConfigError as error:
                return str(error)
            return None
        gpu = install_command(gpu_extras("gpu"))
        return f"the installed ONNX Runtime has no CUDA provider; in a new environment run: {gpu}"
    try:
        import_tensorrt(library)
    except EngineError as error:
        return str(error)
    if library == "tensorrt-rtx" and device.card.compute_capability not in RTX_CAPABILITIES:
        return (
            f"tensorrt-rtx does not run on compute capability {device.card.compute_capability} "
            f"(only {', '.join(RTX_CAPABILITIES)})"
        )
    return None
