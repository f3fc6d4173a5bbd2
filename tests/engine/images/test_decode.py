"""Decoding: every kind of file gives the right pixels, the network's input equals Pillow's, broken files say why."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.decode import SUFFIXES, ImageError, decode, network_input, recipe


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth colour image, so that lossy formats stay close to it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


# Decoding


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        (".png", {}, 0),
        (".bmp", {}, 0),
        (".tif", {}, 0),
        (".TIFF", {"compression": "tiff_lzw"}, 0),
        (".webp", {"lossless": True}, 0),
        (".JPG", {"quality": 95, "subsampling": 0}, 12),
        (".jpeg", {"quality": 95, "progressive": True, "subsampling": 0}, 12),
    ],
)
def test_formats(tmp_path: Path, suffix: str, options: dict[str, object], tolerance: int) -> None:
    path = tmp_path / f"image{suffix}"
    picture().save(path, **options)
    decoded = decode(path)
    assert decoded.mode == "RGB"
    difference = np.asarray(decoded, int) - np.asarray(picture(), int)
    assert np.abs(difference).max() <= tolerance


GREY = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", Image.fromarray(GREY), GREY),
        ("grey-alpha.png", Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY[::-1])]), GREY),
        ("sixteen.png", Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        ("sixteen.tif", Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        ("thirty-two.tif", Image.fromarray(GREY.astype(np.int32) * 257), GREY),
        ("one-bit.png", Image.fromarray(GREY > 127), np.where(GREY > 127, 255, 0)),
        ("one-bit.tif", Image.fromarray(GREY > 127), np.where(GREY > 127, 255, 0)),
        ("palette.png", Image.fromarray(GREY).convert("P"), GREY),
        ("palette.bmp", Image.fromarray(GREY).convert("P"), GREY),
        ("alpha.png", Image.merge("RGBA", [Image.fromarray(band) for band in (GREY, GREY, GREY, GREY.T.copy())]), GREY),
        ("cmyk.tif", Image.merge("CMYK", [Image.fromarray(255 - GREY)] * 3 + [Image.new("L", (16, 16))]), GREY),
    ],
)
def test_modes(tmp_path: Path, name: str, image: Image.Image, expected: NDArray[np.uint8]) -> None:
    image.save(tmp_path / name)
    decoded = np.asarray(decode(tmp_path / name), int)
    np.testing.assert_array_equal(decoded, np.repeat(np.asarray(expected, int)[:, :, None], 3, axis=2))


def test_sixteen_bit_grey_is_rounded_on_a_fixed_scale(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 1000, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "image.png")
    assert np.asarray(decode(tmp_path / "image.png"))[0, :, 0].tolist() == [0, 0, 1, 4, 254, 255, 255]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    picture().convert("CMYK").save(tmp_path / "image.jpg", quality=95)
    difference = np.asarray(decode(tmp_path / "image.jpg"), int) - np.asarray(picture(), int)
    assert np.abs(difference).mean() < 5


def test_of_several_pictures_the_first_is_taken(tmp_path: Path) -> None:
    first, second = picture(0), picture(1)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "pages.tif")), np.asarray(first))
    first.save(tmp_path / "stereo.jpg", format="MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(np.asarray(decode(tmp_path / "stereo.jpg"), int) - np.asarray(first, int)).mean() < 5


@pytest.mark.filterwarnings("ignore:Palette images")
def test_palette_with_transparency(tmp_path: Path) -> None:
    image = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "image.png", transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "image.png")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left, shown turned right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = picture()
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "image.png")), np.asarray(upright))


# The network's input


def antialiased(source: int, target: int, kernel: Callable[[NDArray[np.float64]], NDArray[np.float64]], support: float):
    """Weights [target, source] of a resize whose kernel is widened when it shrinks."""
    scale = max(source / target, 1.0)
    centre = (np.arange(target) + 0.5) * source / target
    distance = (np.arange(source)[None] + 0.5 - centre[:, None]) / scale
    weights = np.where(np.abs(distance) < support, kernel(distance), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(0.0, 1.0 - np.abs(x))


def cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a, x = -0.5, np.abs(x)
    return np.where(x < 1, ((a + 2) * x - (a + 3)) * x**2 + 1, a * (((x - 5) * x + 8) * x - 4))


@pytest.mark.parametrize("size", [(200, 90), (30, 70), (70, 70), (1, 1), (300, 1)])
@pytest.mark.parametrize("preprocessing", ["imagenet", "clip"])
def test_resize_and_normalisation(size: tuple[int, int], preprocessing: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if preprocessing == "imagenet":
        kernel, support, mean, std = triangle, 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    else:
        kernel, support = cubic, 2.0
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    rows, columns = antialiased(size[1], 70, kernel, support), antialiased(size[0], 70, kernel, support)
    # Pillow goes along the rows first and rounds to 8 bits after each direction.
    wide = np.clip(np.einsum("xi,yic->yxc", columns, pixels.astype(float)), 0, 255).round()
    resized = np.clip(np.einsum("yi,ixc->yxc", rows, wide), 0, 255)
    expected = ((resized / 255 - mean) / std).transpose(2, 0, 1)
    actual = network_input(Image.fromarray(pixels), recipe(preprocessing, 70))  # type: ignore[arg-type]
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    levels = np.abs(actual - expected) * np.array(std)[:, None, None] * 255
    assert levels.max() < 1.6  # a rounding of the first pass may tip over
    assert np.mean(levels > 0.51) < 0.01


def test_the_reference_feeds_the_same_input(golden: Path, real_data: Path) -> None:
    arrays = np.load(golden / "end_to_end_dinov2s.npz")
    (path,) = (real_data / "ball_screw").rglob(Path(str(arrays["files"][0])).name)
    np.testing.assert_allclose(network_input(decode(path), recipe("imagenet", 518)), arrays["image_0"], atol=1e-5)


# Files that are no good


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"these are words", "not a PNG, JPEG"),
        (b"%PDF-1.4 and so on", "not a PNG, JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG, JPEG"),
        (png_of_size(30000, 30000), "too large: more than 178 million pixels"),
        (png_of_size(0, 10), "not a PNG"),
        (b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 0, 5, 1, 24, 0, 0, 0, 0, 0, 0), "not a PNG"),
        (png_of_size(100, 100), "truncated|damaged|unrecognized|incomplete"),
    ],
)
def test_bad_content_says_why(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        decode(tmp_path / "image.png")


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    picture().save(tmp_path / "image.jpg", format="PNG")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "image.jpg")), np.asarray(picture()))
    picture().save(tmp_path / "image.png", format="GIF")  # a format that is not promised is not read by luck
    with pytest.raises(ImageError, match="not a PNG"):
        decode(tmp_path / "image.png")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.zeros((4, 4), np.float32)), "32-bit float"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), "do not fit 16 bits"),
    ],
)
def test_values_without_a_range_are_refused(tmp_path: Path, image: Image.Image, reason: str) -> None:
    image.save(tmp_path / "image.tif")
    with pytest.raises(ImageError, match=reason):
        decode(tmp_path / "image.tif")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "device.png"):
        with pytest.raises(ImageError, match="not a regular file"):
            decode(tmp_path / name)
    (tmp_path / "dangling.png").symlink_to("nowhere")
    with pytest.raises(ImageError, match="link to nothing"):
        decode(tmp_path / "dangling.png")
    (tmp_path / "self.png").symlink_to("self.png")
    with pytest.raises(ImageError, match="symbolic links"):
        decode(tmp_path / "self.png")
    with pytest.raises(ImageError, match="no longer there"):
        decode(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_damage_anywhere_gives_an_image_or_an_image_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(path, format=kind, **({} if kind == "BMP" else {"exif": exif}))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 2:
            del damaged[int(rng.integers(len(whole))) :]
        else:
            for position in rng.integers(0, min(len(whole), 200 if trial % 4 else len(whole)), 4):
                damaged[position] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            assert decode(path).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(("suffix", "form"), [(".jfif", "JPEG"), (".jpe", "JPEG"), (".dib", "DIB"), (".DIB", "BMP")])
def test_other_suffixes_of_the_formats_that_are_read(tmp_path: Path, suffix: str, form: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.new("RGB", (8, 6), (200, 40, 30)).save(path, format=form)
    assert path.suffix.lower() in SUFFIXES
    np.testing.assert_allclose(np.asarray(decode(path))[3, 4], (200, 40, 30), atol=3)
