"""Signs of damage in JPEG and TIFF files: what decoders pass over is marked, and no whole file ever is."""

import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.damage import _cpu
from zsad.engine.images.decode import decode
from zsad.engine.images.stored import DAMAGE, ImageError

needs_kernels = pytest.mark.skipif(_cpu is None, reason="needs the native kernels")


def picture(seed: int, noise: float = 5.0, size: tuple[int, int] = (300, 220)) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size), np.float64)
    return np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)


def encoded(pixels: NDArray[np.uint8], mode: str = "RGB", **options: Any) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, "JPEG", **options)
    return content.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"quality": 95, "subsampling": 0}, {"quality": 30}, {"mode": "L"}, {"mode": "CMYK"}, {"optimize": True}),
        pytest.param({"progressive": True}, marks=needs_kernels),
        pytest.param({"progressive": True, "restart_marker_rows": 3}, marks=[needs_kernels, pytest.mark.slow]),
    ],
    ids=str,
)
def test_damaged_bits_are_refused_or_marked(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, path = encoded(picture(0), **options), tmp_path / "a.jpg"
    path.write_bytes(whole)
    right = np.asarray(decode(path))
    rng = np.random.default_rng(0)
    wrong = marked = 0
    for _ in range(20):
        damaged = bytearray(whole)
        start = int(rng.integers(whole.index(b"\xff\xda") + 20, len(whole) - 600))
        damaged[start : start + 500] = bytes(500)
        path.write_bytes(damaged)
        try:
            image = decode(path)
        except ImageError:
            continue
        assert not np.array_equal(np.asarray(image), right)
        wrong += 1
        marked += DAMAGE in image.info
    assert wrong >= 10
    assert marked >= 0.9 * wrong


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["Pillow", "OpenCV", "MPO", "flat", "zeros behind", "words behind"])
def test_whole_files_are_as_they_were(tmp_path: Path, writer: str) -> None:
    path, rng = tmp_path / "a.jpg", np.random.default_rng(1)
    for trial in range(40):
        size = (int(rng.integers(1, 120)), int(rng.integers(1, 90)))
        pixels = picture(trial, 3.0 * (trial % 4), size)
        quality = int(rng.integers(1, 101))
        if writer == "OpenCV":
            cv2.imwrite(
                str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, trial % 3]
            )
        elif writer == "MPO":
            Image.fromarray(pixels).save(path, "MPO", save_all=True, append_images=[Image.fromarray(255 - pixels)])
        else:
            if writer == "flat":
                pixels[:] = rng.integers(0, 256, 3) * (trial % 3 > 0)
            mode, progressive = ("RGB", "L", "CMYK")[trial % 3], trial % 5 < 2
            behind = {"zeros behind": bytes(300), "words behind": b"words"}.get(writer, b"")
            restart = {"restart_marker_blocks": 1 + trial % 7} if trial % 2 else {}
            path.write_bytes(encoded(pixels, mode, quality=quality, progressive=progressive, **restart) + behind)
        image = decode(path)
        assert DAMAGE not in image.info
        with Image.open(path) as expected:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))


def test_a_missing_part_is_marked(tmp_path: Path) -> None:
    whole = encoded(picture(0), restart_marker_rows=1)
    first, second = whole.index(b"\xff\xd2"), whole.index(b"\xff\xd4")
    (tmp_path / "a.jpg").write_bytes(whole[:first] + whole[second:])
    assert "a part of its picture is missing" in decode(tmp_path / "a.jpg").info[DAMAGE]


def test_bits_that_end_too_early_are_marked(tmp_path: Path) -> None:
    whole = encoded(picture(0))
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) * 2 // 3].rstrip(b"\xff") + b"\xff\xd9")
    assert decode(tmp_path / "a.jpg").info[DAMAGE] == ("the file looks damaged: its bits end before its picture does")


@needs_kernels
@pytest.mark.slow
def test_scans_are_damaged_where_the_decoder_warns() -> None:
    """OpenCV lets libjpeg print its warnings, in a process of its own for the sake of the others' standard error."""
    rng, files = np.random.default_rng(2), []
    for trial in range(60):
        content = bytearray(encoded(picture(trial), progressive=True, restart_marker_rows=trial % 3))
        if trial % 6:
            start = int(rng.integers(content.index(b"\xff\xda") + 20, len(content) - 200))
            content[start : start + 100] = bytes(100)
        files.append(bytes(content))
    reads = (
        "import cv2, numpy as np, os, pickle, sys\n"
        "for content in pickle.load(sys.stdin.buffer):\n"
        "    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)\n"
        "    os.write(2, b'|' if image is not None else b'refused|')"
    )
    ended = subprocess.run([sys.executable, "-c", reads], input=pickle.dumps(files), capture_output=True, check=True)
    pairs = [
        (b"Corrupt" in said or b"Premature" in said, _cpu.jpeg_scan_damage(content, 220, 300) > 0)
        for said, content in zip(ended.stderr.split(b"|")[:-1], files, strict=True)
        if b"refused" not in said
    ]
    assert pairs.count((True, True)) >= 40
    assert pairs.count((False, False)) >= 10
    assert pairs.count((True, False)) <= 2  # of a few bits left over nothing is said


@needs_kernels
def test_scans_of_what_is_no_progressive_picture_are_not_judged() -> None:
    whole = encoded(picture(0), progressive=True)
    assert _cpu.jpeg_scan_damage(whole, 220, 301) == 0
    assert _cpu.jpeg_scan_damage(encoded(picture(0)), 220, 300) == 0
    for length in range(0, len(whole), 97):
        assert _cpu.jpeg_scan_damage(whole[:length], 220, 300) in (0, 1)


def test_a_compressed_strip_that_is_not_all_of_its_picture_is_marked(tmp_path: Path) -> None:
    """libtiff stops once it has the pixels, and looks at no checksum behind them."""
    path, content = tmp_path / "a.tif", BytesIO()
    Image.fromarray(picture(0)).save(content, "TIFF", compression="tiff_adobe_deflate")
    damaged = bytearray(content.getvalue())
    damaged[3000:3040] = bytes(40)
    path.write_bytes(damaged)
    assert decode(path).info[DAMAGE] == (
        "the file looks damaged: a part of its picture is longer or shorter than its pixels"
    )


@needs_kernels
def test_codes_of_strips_are_followed_to_their_end() -> None:
    bits = f"{256:09b}{1:09b}{2:09b}{258:09b}{257:09b}"  # clear, 1, 2, 1 2, end
    lzw = int(bits.ljust(48, "0"), 2).to_bytes(6, "big")
    pack_bits = bytes([1, 5, 6, 254, 7])  # 5, 6, 7, 7, 7
    assert [size for size in range(3, 9) if _cpu.tiff_strip_is_whole(lzw, 5, size)] == [4]
    assert [size for size in range(4, 9) if _cpu.tiff_strip_is_whole(pack_bits, 32773, size)] == [5]
    assert not _cpu.tiff_strip_is_whole(lzw[:3], 5, 4)
    assert not _cpu.tiff_strip_is_whole(pack_bits[:4], 32773, 5)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "I;16"])
def test_whole_strips_are_not_marked(tmp_path: Path, compression: str, mode: str) -> None:
    path, rng = tmp_path / "a.tif", np.random.default_rng(1)
    for trial in range(20):
        pixels = picture(trial, 2.0 * (trial % 4), (int(rng.integers(1, 200)), int(rng.integers(1, 200))))
        grey = Image.fromarray(pixels).convert("L")
        image = Image.fromarray(np.asarray(grey) * np.uint16(257)) if mode == "I;16" else Image.fromarray(pixels)
        options: dict[int, int] = {278: 1 + trial} if trial % 3 else {}  # rows in a strip
        options |= {317: 2} if trial % 2 and compression != "packbits" and mode in ("RGB", "L") else {}  # differences
        (image if mode == "I;16" else image.convert(mode)).save(path, "TIFF", compression=compression, tiffinfo=options)
        assert DAMAGE not in decode(path).info
