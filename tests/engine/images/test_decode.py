"""Decoding: every kind of file gives the right pixels, the network's input equals Pillow's, broken files say why."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.decode import bilinear, decode, network_input, recipe
from zsad.engine.images.stored import SUFFIXES, ImageError, read_header


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
SEEN = np.where(GREY[::-1] == 0, 0, GREY)  # with GREY[::-1] as alpha


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", Image.fromarray(GREY), GREY),
        ("grey-alpha.png", Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY[::-1])]), SEEN),
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
    expected = np.where(np.asarray(image)[:, :, None] == 0, 0, np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "image.png")), expected)


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


@pytest.mark.parametrize("size", [(200, 90), (90, 200), (31, 20), (70, 70), (71, 70), (9, 400), (400, 9)])
def test_the_middle_square(size: tuple[int, int]) -> None:
    """As open_clip's own preprocessing: the shortest side to the size, then the middle."""
    pixels = np.random.default_rng(1).integers(80, 176, (size[1], size[0], 3), dtype=np.uint8)
    whole = tuple(int(70 * side / min(size)) for side in size)
    resized = Image.fromarray(pixels).resize(whole, Image.Resampling.BICUBIC)
    left, top = (round((side - 70) / 2) for side in whole)
    wanted = recipe("clip", 70, "shortest_crop")
    expected = np.asarray(resized.crop((left, top, left + 70, top + 70)), float)
    found = network_input(Image.fromarray(pixels), wanted)
    levels = (found.transpose(1, 2, 0) * np.array(wanted.deviation) + wanted.mean) * 255
    # Pillow takes the axes in the other order for some shapes, which may tip a rounding over.
    assert np.abs(levels - expected).max() < 2.1
    assert np.mean(np.abs(levels - expected) > 0.1) < 0.3
    if size == (70, 70):
        np.testing.assert_array_equal(found, network_input(Image.fromarray(pixels), recipe("clip", 70)))


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
    picture().save(tmp_path / "image.png", format="PCX")  # a format that is not promised is not read by luck
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


# More than 8 bits per channel


LEVELS = np.random.default_rng(0).integers(0, 65536, (40, 52, 4), dtype=np.uint16)


def eight_bits(levels: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Levels [h, w, 1 or 3] as RGB, by the rule that 65535 levels become 255."""
    return np.repeat(np.round(levels / 257).astype(np.uint8), 3 // levels.shape[2], axis=2)


def stored_tiff(path: Path, levels: NDArray[Any], separate: bool = False, **options: Any) -> Path:
    samples = levels.shape[2]
    if samples in (2, 4):
        options["extrasamples"] = ["unassalpha"]
    if samples > 1:
        options["planarconfig"] = "separate" if separate else "contig"
    arranged = np.moveaxis(levels, 2, 0) if separate else levels if samples > 1 else levels[:, :, 0]
    tifffile.imwrite(path, arranged, metadata=None, **options)
    return path


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize(("samples", "separate"), [(1, False), (2, False), (2, True), (3, False), (3, True), (4, True)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_arrangements(
    tmp_path: Path, dtype: type, samples: int, separate: bool, tile: tuple[int, int] | None, order: str, deflated: bool
) -> None:
    levels = LEVELS[:, :, :samples] if dtype is np.uint16 else (LEVELS[:, :, :samples] >> 8).astype(np.uint8)
    options = {"compression": "deflate", "predictor": True} if deflated else {}
    kind = "rgb" if samples > 2 else "minisblack"
    path = stored_tiff(tmp_path / "a.tif", levels, separate, photometric=kind, tile=tile, byteorder=order, **options)
    colours = levels[:, :, : samples - (samples + 1) % 2]
    expected = eight_bits(colours.astype(np.uint16) * (257 if dtype is np.uint8 else 1))
    if samples in (2, 4):
        expected[levels[:, :, -1] == 0] = 0
    np.testing.assert_array_equal(np.asarray(decode(path)), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("options", [{}, {"compression": "deflate", "predictor": True}, {"tile": (16, 16)}])
def test_white_is_zero(tmp_path: Path, dtype: type, order: str, options: dict[str, Any]) -> None:
    levels = LEVELS[:, :, :1] if dtype is np.uint16 else (LEVELS[:, :, :1] >> 8).astype(np.uint8)
    stored_tiff(tmp_path / "a.tif", np.iinfo(dtype).max - levels, photometric="miniswhite", byteorder=order, **options)
    expected = eight_bits(levels.astype(np.uint16) * (257 if dtype is np.uint8 else 1))
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.tif")), expected)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate"])
def test_compressed_sixteen_bit_tiff(tmp_path: Path, compression: str) -> None:
    grey = LEVELS[:, :, 0]
    for white, values in ((1, grey), (0, 65535 - grey)):
        Image.fromarray(values).save(tmp_path / "a.tif", compression=compression, tiffinfo={262: white})
        np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.tif")), eight_bits(LEVELS[:, :, :1]))


@pytest.mark.parametrize("compression", [1, 5, 8, 32773])  # none, LZW, deflate, packbits
@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize("samples", [3, 4])
def test_sixteen_bit_colour(tmp_path: Path, samples: int, suffix: str, compression: int) -> None:
    levels = LEVELS[:, :, :samples].copy()
    levels[:5, :5, -1] = 0
    options = [cv2.IMWRITE_TIFF_COMPRESSION, compression] if suffix == ".tif" else []
    cv2.imwrite(str(tmp_path / f"a{suffix}"), levels[:, :, [2, 1, 0, 3][:samples]], options)
    expected = eight_bits(levels[:, :, :3])
    if samples == 4 and suffix == ".png":  # OpenCV does not say in a TIFF that the fourth sample is alpha
        expected[:5, :5] = 0
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / f"a{suffix}")), expected)


def png(header: tuple[int, int, int, int], rows: NDArray[Any], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of width, height, bits and colour type, its rows unfiltered, with further chunks before the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_sixteen_bit_grey_with_alpha_and_transparent_keys(tmp_path: Path) -> None:
    levels = LEVELS[:, :, :2].astype(">u2")
    levels[3, 4, 1] = 0
    (tmp_path / "la.png").write_bytes(png((52, 40, 16, 4), levels))
    expected = eight_bits(levels[:, :, :1])
    expected[levels[:, :, 1] == 0] = 0
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "la.png")), expected)

    grey = levels[:, :, :1]
    (tmp_path / "key.png").write_bytes(png((52, 40, 16, 0), grey, (b"tRNS", grey[7, 7].tobytes())))
    expected = eight_bits(grey)
    expected[grey[:, :, 0] == grey[7, 7]] = 0
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "key.png")), expected)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_bit_depth_scales_to_its_own_white(tmp_path: Path, bits: int) -> None:
    white = 2**bits - 1
    levels = np.array([[0, 1, white // 2, white - 1, white, white + 1, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    expected = np.minimum(np.round(levels / white * 255), 255)
    assert np.asarray(decode(tmp_path / "a.png", bits))[:, :, 0].tolist() == expected.tolist()
    small = levels[:, :5]
    for black in (white, 65535):  # inverted by the camera, or by a program
        Image.fromarray(black - small).save(tmp_path / "a.tif", tiffinfo={262: 0})
        assert np.asarray(decode(tmp_path / "a.tif", bits))[:, :, 0].tolist() == expected[:, :5].tolist()


def test_truncated_and_damaged_files_are_refused_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png((52, 40, 16, 2), LEVELS[:, :, :3].astype(">u2"))[:-3000])
    stored_tiff(tmp_path / "rgb.tif", LEVELS[:, :, :3], photometric="rgb")
    stored_tiff(tmp_path / "planes.tif", LEVELS[:, :, :3], True, photometric="rgb")
    stored_tiff(tmp_path / "grey.tif", LEVELS[:, :, :1], photometric="miniswhite", byteorder=">")
    for name in ("a.png", "rgb.tif", "planes.tif", "grey.tif"):
        path = tmp_path / name
        if name != "a.png":
            path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ImageError):
            decode(path)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.tif", compression="tiff_lzw")
    damaged = bytearray((tmp_path / "a.tif").read_bytes())
    damaged[10:20] = bytes(10)
    (tmp_path / "a.tif").write_bytes(damaged)
    with pytest.raises(ImageError):
        decode(tmp_path / "a.tif")
    assert capfd.readouterr().err == ""  # libraries keep quiet


def test_float_colour_is_refused_with_a_reason(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4, 3), np.float32), photometric="rgb")
    with pytest.raises(ImageError, match="float"):
        decode(tmp_path / "a.tif")


# Transparency


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", ["RGBA.png", "RGBA.tif", "RGBA.webp", "LA.png", "P.png", "P.gif", "RGB.png", "L.png"])
def test_hidden_colours_do_not_count(tmp_path: Path, kind: str) -> None:
    mode, suffix = kind.split(".")
    seen: list[bytes] = []
    for hidden in (10, 200):
        values = np.full((8, 8), 90, np.uint8)
        values[2:4, 2:4] = hidden
        grey = Image.fromarray(values)
        options: dict[str, Any] = {"lossless": True, "exact": True} if suffix == "webp" else {}
        if mode in ("RGBA", "LA"):
            image = grey.convert(mode)
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
        else:
            image = grey.convert(mode)
            options["transparency"] = (hidden,) * 3 if mode == "RGB" else hidden
        image.save(tmp_path / f"{hidden}.{suffix}", **options)
        decoded = decode(tmp_path / f"{hidden}.{suffix}")
        assert decoded.getpixel((0, 0)) == (90, 90, 90)
        seen.append(decoded.tobytes())
    assert seen[0] == seen[1]


def test_alpha_that_hides_everything_is_no_alpha(tmp_path: Path) -> None:
    image = picture()
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png")), np.asarray(picture()))


# Metadata that is damaged or too large, of valid files


def with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metadata_never_keep_an_image_from_being_read(tmp_path: Path) -> None:
    picture().save(tmp_path / "plain.jpg", quality=95)
    jpeg, expected = (tmp_path / "plain.jpg").read_bytes(), np.asarray(decode(tmp_path / "plain.jpg"))
    for number, (marker, data) in enumerate(
        [
            (0xE1, b"Exif\0\0" + b"\xff" * 40),
            (0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 30),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta" + b"<" * 200),
            (0xE2, b"ICC_PROFILE\0\x01\x02" + b"\0" * 60000),
            (0xE2, b"MPF\0" + b"\xff" * 60),
            (0xED, b"Photoshop 3.0\x008BIM\xff\xff\xff\xff\xff"),
        ]
    ):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(with_segment(jpeg, marker, data))
        np.testing.assert_array_equal(np.asarray(decode(path)), expected)
        assert read_header(path).bytes == read_header(tmp_path / "plain.jpg").bytes

    rows, expected = LEVELS[:, :, :3].astype(np.uint8), LEVELS[:, :, :3].astype(np.uint8)
    bomb = zlib.compress(bytes(80 << 20))
    for number, (kind, data) in enumerate(
        [
            (b"iCCP", b"name\0\0" + bomb),
            (b"iCCP", b"name\0\0not deflated"),
            (b"zTXt", b"Comment\0\0" + bomb),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
            (b"tEXt", b"\xff\xfe"),
            (b"eXIf", b"\xff" * 30),
            (b"pHYs", struct.pack(">IIB", 0, 0, 1)),
            (b"pHYs", b"\0"),
            (b"gAMA", b""),
            (b"cHRM", b"\0\0\0"),
        ]
    ):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png((52, 40, 8, 2), rows, (kind, data)))
        np.testing.assert_array_equal(np.asarray(decode(path)), expected, err_msg=repr((kind, data[:20])))


def test_orientation_survives_metadata_that_is_dropped(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = LEVELS[:, :, :3].astype(np.uint8)
    bomb = zlib.compress(bytes(80 << 20))
    chunks = [(b"zTXt", b"Comment\0\0" + bomb), (b"eXIf", exif.tobytes()[6:])]
    (tmp_path / "a.png").write_bytes(png((52, 40, 8, 2), rows, *chunks))
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png")), np.rot90(rows, -1))


def test_odd_tiff_tags(tmp_path: Path) -> None:
    levels = LEVELS[:, :, :3].astype(np.uint8)
    tags = [(34675, 7, 10, b"\xff" * 10, True), (700, 1, 5, b"<x>\0\0", True), (34665, 4, 1, 99999999, True)]
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric="rgb", extratags=tags, resolution=((77, 1), (77, 1)))
    content = (tmp_path / "a.tif").read_bytes()
    resolution = struct.pack("<II", 77, 1)
    assert resolution in content
    (tmp_path / "a.tif").write_bytes(content.replace(resolution, bytes(8)))
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.tif")), levels)


# Further formats


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".dib", ".gif", ".jp2", ".j2k", ".pgm", ".ppm", ".pnm", ".tga"])
def test_further_suffixes(tmp_path: Path, suffix: str) -> None:
    assert suffix in SUFFIXES
    grey = Image.fromarray(np.repeat(GREY, 2, axis=1))
    image = grey if suffix in (".pgm", ".gif") else grey.convert("RGB")
    image.save(tmp_path / f"a{suffix}", format={".jpe": "JPEG", ".jfif": "JPEG"}.get(suffix))
    difference = np.asarray(decode(tmp_path / f"a{suffix}"), int) - np.asarray(grey.convert("RGB"), int)
    assert np.abs(difference).max() <= (40 if suffix in (".jpe", ".jfif") else 0)


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    first, second = Image.new("L", (8, 8), 30), Image.new("L", (8, 8), 200)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert decode(tmp_path / "a.gif").getpixel((0, 0)) == (30, 30, 30)


def test_levels_of_a_pgm_are_scaled_by_its_own_largest(tmp_path: Path) -> None:
    levels = np.array([[0, 2048, 4095]], ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + levels.tobytes())
    assert np.asarray(decode(tmp_path / "a.pgm", 12))[0, :, 0].tolist() == [0, 128, 255]


def test_words_are_no_image_whatever_their_suffix(tmp_path: Path) -> None:
    for suffix in sorted(SUFFIXES):
        (tmp_path / f"a{suffix}").write_bytes(b"these are words, and more of them than any header has" * 20)
        with pytest.raises(ImageError):
            decode(tmp_path / f"a{suffix}")


def test_isnet_has_the_input_of_its_reference(golden_segmentation: Path) -> None:
    arrays = np.load(golden_segmentation / "isnet_tiny.npz")
    found = network_input(Image.fromarray(arrays["rgb"]), recipe("isnet", 128))
    np.testing.assert_array_equal(found, arrays["network_input"])
    np.testing.assert_array_equal(np.rint((found + 0.5) * 255), arrays["resized_uint8"])


@pytest.mark.parametrize("name", ["resize_40x27", "resize_5x6", "resize_9x30"])
def test_bilinear_equals_the_reference(golden_segmentation: Path, name: str) -> None:
    arrays = np.load(golden_segmentation / "vvv_host.npz")
    expected = arrays[name]
    found = bilinear(arrays["resize_input"], expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    colours = bilinear(np.stack([arrays["resize_input"]] * 3, axis=2), expected.shape)
    np.testing.assert_array_equal(colours, np.stack([found] * 3, axis=2))


@pytest.mark.torch
@pytest.mark.parametrize("size", [(1024, 1024), (31, 2000), (701, 12)])
def test_bilinear_equals_pytorch_up_to_the_last_bit(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    image = np.random.default_rng(0).integers(0, 256, (211, 307, 3), dtype=np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=False)[0]
    found, expected = bilinear(image, size), expected.permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    assert (np.floor(found) != np.floor(expected)).mean() < 2e-5


@settings(max_examples=50)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    start=st.integers(0, 39),
)
def test_resizing_interpolates_between_the_centres_of_pixels(
    shape: tuple[int, int], size: tuple[int, int], start: int
) -> None:
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    ys, xs = (
        np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        for source, target in zip(shape, size, strict=True)
    )
    expected = 2 * ys[:, None] - 3 * xs + 1  # linear functions are reproduced exactly, but at the edges
    np.testing.assert_allclose(bilinear(2 * y - 3 * x + 1, size), expected, atol=1e-4)
    rows = slice(start, start + 3)
    if start < size[0]:
        np.testing.assert_allclose(bilinear(2 * y - 3 * x + 1, size, rows), expected[rows], atol=1e-4)
