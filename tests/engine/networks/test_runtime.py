"""Which library runs the networks, on what, and why."""

import pytest
from machines import having

from zsad.engine.config import ConfigError
from zsad.engine.networks import build
from zsad.engine.networks import runtime as runtimes
from zsad.engine.networks.build import candidates
from zsad.engine.networks.network import GraphRequest
from zsad.engine.networks.runtime import choose_runtime
from zsad.kernels.mutual_scoring import MutualScoring


@pytest.mark.parametrize(
    ("installed", "library", "device_name", "scoring_precision", "why"),
    [
        ("", "onnxruntime", "cpu", "fp32", "CuPy is not installed"),
        ("cupy", "onnxruntime", "cpu", "fp32", "CuPy finds no CUDA device"),
        ("cupy gpu tensorrt tensorrt-rtx cuda", "tensorrt", "cuda:0", "fp16", "the fastest"),
        ("cupy gpu tensorrt-rtx cuda", "tensorrt-rtx", "cuda:0", "fp16", "tensorrt cannot be used here"),
        ("cupy gpu cuda", "onnxruntime", "cuda:0", "fp16", "tensorrt and tensorrt-rtx cannot be used here"),
        ("cupy gpu", "onnxruntime", "cpu", "fp16", "has no CUDA provider"),
        ("cupy gpu cuda old-driver", "onnxruntime", "cpu", "fp16", "could not start its CUDA provider"),
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
        ("cpu", "ncnn", "must be auto or one of onnxruntime, openvino, native, tensorrt, tensorrt-rtx"),
        ("auto", "openvino", "^--runtime openvino: OpenVINO is not installed; run: pip install it$"),
        ("cpu", "tensorrt", "needs a GPU"),
        ("cuda", "auto", "^--device cuda: CuPy finds no CUDA device; without a GPU use --device cpu$"),
        ("auto", "tensorrt", "^--runtime tensorrt: CuPy finds no CUDA device; without a GPU leave --runtime out$"),
    ],
)
def test_a_runtime_that_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, library: str, message: str
) -> None:
    having(monkeypatch, "cupy")
    with pytest.raises(ConfigError, match=message):
        choose_runtime(device, library)


@pytest.mark.parametrize(
    ("device", "library", "extras", "otherwise"),
    [
        ("cuda:0", "auto", "gpu", "use --device cpu"),
        ("auto", "tensorrt", "gpu,tensorrt", "leave --runtime out"),
        ("cuda:1", "tensorrt-rtx", "gpu,tensorrt-rtx", "use --device cpu"),
    ],
)
def test_what_a_gpu_needs_is_installed_in_one_go(
    monkeypatch: pytest.MonkeyPatch, device: str, library: str, extras: str, otherwise: str
) -> None:
    having(monkeypatch)
    with pytest.raises(ConfigError) as refused:
        choose_runtime(device, library)
    asked = f"--device {device}" if device != "auto" else f"--runtime {library}"
    assert str(refused.value).startswith(f"{asked} needs CuPy")
    assert f"pip install 'zsad[{extras}]' (in a clone of zsad '.[{extras}]')" in str(refused.value)
    assert str(refused.value).endswith(otherwise)


@pytest.mark.parametrize(
    ("installed", "device", "library", "libraries"),
    [
        ("openvino", "auto", "auto", ("onnxruntime", "openvino")),
        ("openvino", "cpu", "auto", ("onnxruntime", "openvino")),
        ("openvino", "cpu", "onnxruntime", ("onnxruntime",)),
        ("openvino", "auto", "openvino", ("openvino",)),
        ("", "cpu", "auto", ("onnxruntime",)),
        ("openvino cupy gpu cuda", "auto", "openvino", ("openvino",)),
        ("openvino cupy gpu", "auto", "auto", ("onnxruntime", "openvino")),
        ("openvino cupy gpu cuda", "auto", "auto", ("onnxruntime",)),
    ],
)
def test_on_a_cpu_openvino_may_run_what_it_is_faster_at(
    monkeypatch: pytest.MonkeyPatch, installed: str, device: str, library: str, libraries: tuple[str, ...]
) -> None:
    having(monkeypatch, *installed.split())
    runtime = choose_runtime(device, library)
    assert runtime.libraries("fp32", on_demand=False) == libraries
    assert runtime.libraries("fp32", on_demand=True) == libraries[:1]
    if "openvino" in libraries:
        assert runtime.describe({"openvino", "onnxruntime"}) == "onnxruntime 1.26 and openvino 2026.1.0 on the CPU"


TOWER, WINDOWS = GraphRequest("x"), GraphRequest("x", outputs=("embedding", "windows_2"))


@pytest.mark.parametrize(
    ("installed", "library", "precision", "request_", "compiled", "wide", "libraries"),
    [
        ("openvino", "auto", "int8", TOWER, True, True, ("native",)),
        ("openvino", "auto", "int8", TOWER, True, False, ("onnxruntime", "openvino", "native")),
        ("openvino", "auto", "fp32", TOWER, True, True, ("onnxruntime", "openvino", "native")),
        ("", "auto", "fp32", TOWER, True, True, ("onnxruntime", "native")),
        ("", "auto", "int8", TOWER, False, True, ("onnxruntime",)),
        ("", "auto", "int8", WINDOWS, True, True, ("native",)),
        ("", "auto", "fp32", GraphRequest("x", "text", ("embedding",)), True, True, ("onnxruntime",)),
        ("", "native", "fp32", TOWER, True, False, ("native",)),
        ("", "native", "fp32", WINDOWS, True, True, ("native",)),
        ("", "onnxruntime", "int8", TOWER, True, True, ("onnxruntime",)),
        ("openvino", "auto", "bf16", TOWER, True, True, ("openvino",)),
        ("cupy gpu cuda", "auto", "fp32", TOWER, True, True, ("onnxruntime",)),
    ],
)
def test_native_code_may_run_image_towers_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
    installed: str,
    library: str,
    precision: str,
    request_: GraphRequest,
    compiled: bool,
    wide: bool,
    libraries: tuple[str, ...],
) -> None:
    having(monkeypatch, *installed.split())
    monkeypatch.setattr(runtimes, "has_native_code", lambda: compiled)
    monkeypatch.setattr(build, "vectors_are_wide", lambda: wide)
    assert candidates(request_, precision, choose_runtime("auto", library)) == libraries


def test_native_code_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "has_native_code", lambda: False)
    with pytest.raises(ConfigError, match=r"without a working C.. compiler.*install a compiler and zsad again"):
        choose_runtime("cpu", "native")


@pytest.mark.parametrize(
    ("installed", "library", "flags", "message"),
    [
        ("openvino", "auto", "avx2 avx512_bf16", ""),
        ("openvino", "openvino", "amx_bf16", ""),
        ("openvino", "auto", "avx2", "bf16: this processor does not multiply in bf16; use .* fp32 or int8"),
        ("openvino", "onnxruntime", "amx_bf16", "bf16 needs OpenVINO: leave --runtime out; else"),
        (
            "",
            "auto",
            "amx_bf16",
            r"bf16 needs OpenVINO: .*install 'zsad\[cpu,openvino\]'; else use --network-precision",
        ),
    ],
)
def test_bf16_needs_openvino_and_a_processor_that_has_it(
    monkeypatch: pytest.MonkeyPatch, installed: str, library: str, flags: str, message: str
) -> None:
    having(monkeypatch, *installed.split())
    monkeypatch.setattr(runtimes, "processor", lambda fact: flags)
    runtime = choose_runtime("cpu", library)
    if not message:
        assert runtime.network_precision("bf16") == "bf16"
        assert runtime.libraries("bf16", on_demand=False) == ("openvino",)
        return
    with pytest.raises(ConfigError, match=message):
        runtime.network_precision("bf16")


@pytest.mark.parametrize(
    ("installed", "precision", "message"),
    [
        ("", "fp16", "--network-precision fp16 is not available on a CPU; use fp32 or int8"),
        ("cupy gpu tensorrt", "int8", "--network-precision int8 is not available on a GPU; use fp16 or fp32"),
        ("cupy gpu", "fp16", r"not available on a CPU \(only scoring uses the GPU, .*\); use fp32 or int8"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, installed: str, precision: str, message: str
) -> None:
    having(monkeypatch, *installed.split())
    with pytest.raises(ConfigError, match=message):
        choose_runtime().network_precision(precision)
