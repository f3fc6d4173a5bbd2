"""The inference libraries: each is imported here and nowhere else, and a missing one yields the line that brings it."""

import importlib
import importlib.util
import os
import platform
import re
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any

# The library of each TensorRT target: its import name and the platforms that it is made for. The targets' names are
# also those of zsad's extras.
TARGETS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "tensorrt": ("tensorrt", {"Linux": ("x86_64", "aarch64")}),
    "tensorrt-rtx": ("tensorrt_rtx", {"Linux": ("x86_64",)}),
}
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
OLDEST = {"tensorrt": (10, 12), "tensorrt-rtx": (1, 2), "openvino": (2025, 0)}

# What is built for one version of CUDA and says so in its name.
CUDA_BUILDS = {
    f"{name}{major}{x}": major
    for name, x in (("cupy-cuda", "x"), ("tensorrt-cu", ""), ("tensorrt-rtx-cu", ""), ("nvidia-nvimgcodec-cu", ""))
    for major in (12, 13)
}
DRIVERS = "drivers from 525 on run what is built for CUDA 12, from 580 on also CUDA 13"


class EngineError(Exception):
    """An inference library or an engine of it that cannot be had or used; the message says how to mend it."""


def install_command(what: str) -> str:
    """Return the command that installs a requirement into this environment, which may have no pip."""
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {sys.executable} {what}"
    return f"{sys.executable} -m pip install {what}"


def cuda_builds() -> dict[str, int]:
    """Return the installed packages that are built for a version of CUDA, and which."""
    builds = {}
    for name, major in CUDA_BUILDS.items():
        with suppress(metadata.PackageNotFoundError):
            metadata.distribution(name)
            builds[name] = major
    with suppress(metadata.PackageNotFoundError):  # which names it only in what it requires
        required = " ".join(metadata.requires("onnxruntime-gpu") or ())
        if found := re.search(r"nvidia-cuda-runtime(?:-cu|~=)(\d+)", required):
            builds["onnxruntime-gpu"] = int(found[1])
    return builds


def gpu_extras(*names: str) -> str:
    """Return what to install for extras such as gpu or tensorrt, of the CUDA that is here already."""
    suffix = "-cuda13" if 13 in cuda_builds().values() and 12 not in cuda_builds().values() else ""
    return f"'zsad[{','.join(name + suffix for name in names)}]'"


def mixed_cuda() -> str:
    """Say which installed packages are built for different versions of CUDA, and what to do; empty: none are."""
    builds = cuda_builds()
    if len(set(builds.values())) < 2:
        return ""
    named = ", ".join(f"{name} for CUDA {major}" for name, major in sorted(builds.items()))
    return f"{named}: in a new environment install 'zsad[gpu]' (CUDA 12) or 'zsad[gpu-cuda13]'; {DRIVERS}"


@cache
def import_onnxruntime() -> Any:
    """Import ONNX Runtime; raises EngineError with the line that installs it, MemoryError where it does not fit.

    Its telemetry, which writes a device number and a queue of events into the home folder, is off unless the user has
    set ORT_DISABLE_TELEMETRY; it reads that when it is loaded.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    cpu = install_command("'zsad[cpu]'")
    both = f"run: {cpu} (with an NVIDIA GPU 'zsad[gpu]'; in a clone of zsad '.[cpu]' or '.[gpu]')"
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        if "failed to map" in str(error):  # it is there, but memory for it is not
            raise MemoryError(str(error)) from None
        raise EngineError(f"ONNX Runtime is not installed ({error}); {both}") from None
    except (OSError, RuntimeError) as error:
        raise EngineError(f"ONNX Runtime cannot be loaded ({error}); {both}") from error
    if not hasattr(ort, "InferenceSession"):  # a folder that an uninstalled package has left
        raise EngineError(f"the ONNX Runtime in {list(ort.__path__)} is incomplete; delete that folder, then {both}")
    return ort


@cache
def import_openvino() -> Any:
    """Import OpenVINO; raises EngineError with the line that installs it, or a newer one."""
    install = install_command("'zsad[cpu,openvino]'")
    try:
        openvino = importlib.import_module("openvino")
    except ImportError as error:
        raise EngineError(
            f"OpenVINO is not installed ({error}); run: {install} (in a clone of zsad '.[cpu,openvino]')"
        ) from None
    except (OSError, RuntimeError) as error:
        raise EngineError(f"OpenVINO cannot be loaded ({error}); run: {install} --force-reinstall") from error
    if numbers(openvino.__version__) < OLDEST["openvino"]:
        oldest = ".".join(map(str, OLDEST["openvino"]))
        raise EngineError(f"OpenVINO {openvino.__version__} is too old, {oldest} is needed; run: {install} --upgrade")
    return openvino


def import_tensorrt(target: str) -> Any:
    """Import the library of a target; raises EngineError with the line that installs it."""
    module, platforms = TARGETS[target]
    install = install_command(gpu_extras("gpu", target))
    try:
        trt = importlib.import_module(module)
    except ImportError as error:
        system, machine = platform.system(), platform.machine()
        if machine not in platforms.get(system, ()):
            raise EngineError(f"{target} is not made for {system} on {machine}; use --target onnx") from None
        raise EngineError(f"{target} is not installed ({error}); run: {install}") from None
    except (OSError, RuntimeError) as error:  # its libraries, or the CUDA libraries that they want
        raise EngineError(f"{target} cannot be loaded ({error}); run: {install} --force-reinstall") from error
    if numbers(trt.__version__) < OLDEST[target]:
        oldest = ".".join(map(str, OLDEST[target]))
        raise EngineError(f"{target} {trt.__version__} is too old, {oldest} is needed; run: {install} --upgrade")
    return trt


def numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, or of a compute capability, for comparing."""
    return tuple(int(part) for part in version.split(".")[:2])
