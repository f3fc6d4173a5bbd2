"""Signs of damage in JPEG files: what decoders pass over is marked, and no whole file ever is."""

from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.decode import decode
from zsad.engine.images.stored import DAMAGE, ImageError


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
    [{}, {"quality": 95, "subsampling": 0}, {"quality": 30}, {"mode": "L"}, {"mode": "CMYK"}, {"optimize": True}],
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
            mode, progressive = ("RGB", "L", "CMYK")[trial % 3], trial % 5 == 0
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
