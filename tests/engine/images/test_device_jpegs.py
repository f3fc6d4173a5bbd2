"""JPEG files decoded on a device, with a stand-in for its library."""

import io
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from host_build import COMPILER, MISSING_COMPILER
from host_tensorrt import HostEngine
from numpy.typing import NDArray
from PIL import Image, ImageOps
from runs import draw, scores_and_maps

from zsad.engine.commands.infer import main

needs_compiler = pytest.mark.skipif(COMPILER is None, reason=MISSING_COMPILER)


@pytest.fixture(autouse=True)
def _workplace(workplace: None) -> None:
    """Every test here runs the tiny network in a folder of its own."""


class HostDecoder:
    """nvImageCodec's decoder on the host, with Pillow's pixels; like the real one it fills in what is cut off."""

    decoded: ClassVar[list[str]] = []

    def __init__(self, device_id: int, max_num_cpu_threads: int, options: str) -> None:
        assert (device_id, max_num_cpu_threads, options) == (0, 1, ":fancy_upsampling=1")

    def decode(self, content: bytes, params: dict[str, Any]) -> NDArray[np.uint8] | None:
        assert params == {"apply_exif_orientation": True, "color_spec": "sRGB"}
        with Image.open(io.BytesIO(content)) as image:
            HostDecoder.decoded.append(f"{image.format} {image.mode}")
            if image.size == (64, 64):  # a kind of JPEG that it does not know
                return None
            return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.slow
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
