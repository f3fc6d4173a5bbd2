"""Inference libraries that are missing, and what the one there is may send."""

import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pictures import touch_images

from zsad.engine.commands.export import main as export
from zsad.engine.commands.infer import main as infer
from zsad.export import libraries
from zsad.export.libraries import EngineError, import_onnxruntime

PIP = f"run: {sys.executable} -m pip install 'zsad[cpu]' (with an NVIDIA GPU 'zsad[gpu]';"
UV = f"run: uv pip install --python {sys.executable} 'zsad[cpu]' (with an NVIDIA GPU 'zsad[gpu]';"


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    import_onnxruntime.cache_clear()
    yield
    import_onnxruntime.cache_clear()


@pytest.mark.parametrize(("pip", "line"), [(True, PIP), (False, UV)])
def test_a_missing_onnx_runtime_says_how_to_install_it(
    without_onnxruntime: None, pip: bool, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if pip else None)
    with pytest.raises(EngineError, match=rf"^ONNX Runtime is not installed .*{re.escape(line)}"):
        import_onnxruntime()


def test_an_onnx_runtime_of_which_a_folder_is_left(without_onnxruntime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(__path__=["/site/onnxruntime"]))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"\['/site/onnxruntime'\] is incomplete; delete that folder, then run: "):
        import_onnxruntime()


def test_commands_stop_without_onnx_runtime(
    without_onnxruntime: None,
    random_dinov2: Callable[..., Path],
    empty_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = str(random_dinov2())
    Path("tiny.toml").write_text(f'image_size = 70\n[networks.dinov2]\ncheckpoint = "{checkpoint}"\ntaps = [1]\n')
    assert export(["--checkpoint", checkpoint, "--taps", "1", "--image-size", "70"]) == 2
    assert "'zsad[cpu]'" in capsys.readouterr().err
    touch_images(tmp_path, "data/0.png", "data/1.png")
    assert infer(["data", "--config", "tiny.toml"]) == 2
    assert "ONNX Runtime is not installed" in capsys.readouterr().err
    assert not list((empty_cache / "models").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, pytest.param("0", marks=pytest.mark.slow)])
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


ORT_12, ORT_13 = ("nvidia-cuda-runtime-cu12~=12.0; extra == 'cuda'",), ("nvidia-cuda-runtime~=13.0; extra == 'cuda'",)


@pytest.mark.parametrize(
    ("installed", "onnx_runtime", "extras", "mixed"),
    [
        ((), None, "'zsad[gpu,tensorrt]'", ""),
        (("cupy-cuda12x", "tensorrt-cu12"), ORT_12, "'zsad[gpu,tensorrt]'", ""),
        (("cupy-cuda13x", "tensorrt-rtx-cu13"), ORT_13, "'zsad[gpu-cuda13,tensorrt-cuda13]'", ""),
        (
            ("cupy-cuda12x",),
            ORT_13,
            "'zsad[gpu,tensorrt]'",
            "cupy-cuda12x for CUDA 12, onnxruntime-gpu for CUDA 13: in a new environment install",
        ),
    ],
)
def test_packages_of_one_cuda_are_told_from_a_mixture(
    monkeypatch: pytest.MonkeyPatch,
    installed: tuple[str, ...],
    onnx_runtime: tuple[str, ...] | None,
    extras: str,
    mixed: str,
) -> None:
    def distribution(name: str) -> None:
        if name not in installed:
            raise libraries.metadata.PackageNotFoundError(name)

    def requires(name: str) -> list[str] | None:
        assert name == "onnxruntime-gpu"
        if onnx_runtime is None:
            raise libraries.metadata.PackageNotFoundError(name)
        return list(onnx_runtime)

    monkeypatch.setattr(libraries.metadata, "distribution", distribution)
    monkeypatch.setattr(libraries.metadata, "requires", requires)
    assert libraries.gpu_extras("gpu", "tensorrt") == extras
    assert libraries.mixed_cuda().startswith(mixed)
    assert bool(libraries.mixed_cuda()) == bool(mixed)
