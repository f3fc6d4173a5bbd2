"""Masks: one shape in every encoding that ground truth comes in gives the same pixels, or an error that says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.evaluation.masks import MaskError, read_mask
from zsad.engine.images.stored import ImageError

SHAPE = np.zeros((60, 90), bool)
SHAPE[10:30, 20:50] = True
SHAPE[40:60, 70:80] = True  # touches the border
PARTS = np.where(SHAPE, np.where(np.arange(90) > 60, 2, 1), 0)  # two classes


def grey(values: Any) -> Image.Image:
    return Image.fromarray(np.asarray(values, np.uint8))


def with_alpha(image: Image.Image, alpha: Any) -> Image.Image:
    image = image.copy()
    image.putalpha(grey(alpha))
    return image


def coloured(*colours: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(np.asarray(colours, np.uint8)[PARTS])


def indexed(*colours: tuple[int, int, int], numbers: tuple[int, int, int] = (0, 1, 2)) -> Image.Image:
    image = Image.fromarray(np.asarray(numbers, np.uint8)[PARTS]).convert("P")
    image = Image.frombytes("P", image.size, np.asarray(numbers, np.uint8)[PARTS].tobytes())
    palette = [255, 0, 255] * 256
    for number, colour in zip(numbers, colours, strict=True):
        palette[3 * number : 3 * number + 3] = colour
    image.putpalette(palette)
    return image


WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (200, 0, 0), (0, 0, 90)
GREY16 = {0: 0, 1: 300, 2: 65535}

KINDS: dict[str, Callable[[Path], None]] = {
    "L 0/255": lambda path: grey(SHAPE * 255).save(path, "PNG"),
    "L 0/1": lambda path: grey(SHAPE).save(path, "PNG"),
    "L classes": lambda path: grey(PARTS).save(path, "PNG"),
    "L 0/128/255": lambda path: grey(np.array([0, 128, 255])[PARTS]).save(path, "PNG"),
    "bilevel": lambda path: Image.fromarray(SHAPE).save(path, "PNG"),
    "bilevel TIFF": lambda path: Image.fromarray(SHAPE).save(path, "TIFF", compression="group4"),
    "BMP": lambda path: grey(SHAPE * 255).save(path, "BMP"),
    "GIF": lambda path: grey(SHAPE * 255).save(path, "GIF"),
    "RGB": lambda path: grey(SHAPE * 255).convert("RGB").save(path, "PNG"),
    "RGB classes": lambda path: coloured(BLACK, RED, BLUE).save(path, "PNG"),
    "RGB classes on white": lambda path: coloured(WHITE, RED, BLUE).save(path, "PNG"),
    "RGB classes on blue": lambda path: coloured(BLUE, RED, WHITE).save(path, "PNG"),
    "shape in alpha, white": lambda path: with_alpha(grey(SHAPE * 0 + 255).convert("RGB"), SHAPE * 255).save(
        path, "PNG"
    ),
    "shape in alpha, black": lambda path: with_alpha(grey(SHAPE * 0).convert("RGB"), SHAPE * 255).save(path, "PNG"),
    "shape in alpha, LA": lambda path: with_alpha(grey(SHAPE * 0 + 255), SHAPE * 255).save(path, "PNG"),
    "shape in alpha and colours": lambda path: with_alpha(coloured(WHITE, RED, BLUE), SHAPE * 255).save(path, "PNG"),
    "shape in alpha, TIFF": lambda path: with_alpha(coloured(WHITE, WHITE, WHITE), SHAPE * 255).save(path, "TIFF"),
    "half opaque": lambda path: with_alpha(grey(SHAPE * 0 + 255).convert("RGB"), SHAPE * 90).save(path, "PNG"),
    "opaque alpha": lambda path: with_alpha(grey(SHAPE * 255).convert("RGB"), SHAPE * 0 + 255).save(path, "PNG"),
    "alpha unused": lambda path: with_alpha(grey(SHAPE * 255).convert("RGB"), SHAPE * 0).save(path, "PNG"),
    "black and defects opaque": lambda path: with_alpha(
        grey(SHAPE * 255).convert("RGB"), np.where(np.arange(90) < 10, 0, 255) + SHAPE * 0
    ).save(path, "PNG"),
    "palette": lambda path: indexed(BLACK, RED, BLUE).save(path, "PNG"),
    "palette, white background": lambda path: indexed(WHITE, BLACK, BLACK).save(path, "PNG"),
    "palette, background last": lambda path: indexed(BLACK, WHITE, RED, numbers=(9, 0, 3)).save(path, "PNG"),
    "palette of one colour": lambda path: indexed(BLACK, BLACK, BLACK).save(path, "PNG"),
    "palette, transparent background": lambda path: indexed(RED, WHITE, BLUE).save(path, "PNG", transparency=0),
    "inverted 0/255": lambda path: grey(~SHAPE * 255).save(path, "PNG"),
    "inverted 0/1": lambda path: grey(~SHAPE).save(path, "PNG"),
    "inverted bilevel": lambda path: Image.fromarray(~SHAPE).save(path, "PNG"),
    "classes from 1": lambda path: grey(PARTS + 1).save(path, "PNG"),
    "16 bit": lambda path: Image.fromarray((SHAPE * 65535).astype(np.uint16)).save(path, "PNG"),
    "16 bit classes": lambda path: Image.fromarray(np.array([0, 1, 300], np.uint16)[PARTS]).save(path, "PNG"),
    "16 bit TIFF, white is zero": lambda path: Image.fromarray((~SHAPE * 65535).astype(np.uint16)).save(
        path, "TIFF", tiffinfo={262: 0}
    ),
    "16 bit RGB": lambda path: tifffile.imwrite(
        path, np.repeat(SHAPE[:, :, None] * np.uint16(40000), 3, axis=2), photometric="rgb"
    ),
    "32 bit": lambda path: Image.fromarray((PARTS * 100000).astype(np.int32)).save(path, "TIFF"),
    "float": lambda path: Image.fromarray(SHAPE.astype(np.float32)).save(path, "TIFF"),
    "classes and 255": lambda path: grey(np.where(np.arange(90) > 85, 255, PARTS)).save(path, "PNG"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoding_gives_the_shape(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "mask.png")
    expected = SHAPE | (np.arange(90) > 85) if kind == "classes and 255" else SHAPE
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), expected)


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize(
    ("values", "by_way_of_png"),
    # Grey classes whose file does not say that it once was a JPEG stay what they are: other than black.
    [((0, 255, 255), False), ((255, 0, 0), False), ((0, 128, 255), False), ((0, 255, 255), True), ((255, 0, 0), True)],
)
def test_noise_of_jpeg_is_no_defect(
    tmp_path: Path, quality: int, values: tuple[int, int, int], by_way_of_png: bool
) -> None:
    rng = np.random.default_rng(0)
    shape = SHAPE.copy()
    shape[5:9, 60:66] = rng.random((4, 6)) > 0.2  # a ragged edge, where the noise is
    parts = np.where(shape, np.maximum(PARTS, 1), 0)
    grey(np.asarray(values)[parts]).save(tmp_path / "mask.jpg", quality=quality)
    path = tmp_path / "mask.jpg"
    if by_way_of_png:
        Image.open(path).save(tmp_path / "mask.png")
        path = tmp_path / "mask.png"
    assert (read_mask(path) != shape).mean() < 0.004
    assert (np.asarray(Image.open(path)) != 0).mean() > shape.mean() + 0.02  # what counting everything would give


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "GIF"])
def test_empty_masks_are_empty(tmp_path: Path, format: str) -> None:
    grey(SHAPE * 0).save(tmp_path / "mask", format)
    assert not read_mask(tmp_path / "mask").any()
    if format in ("PNG", "TIFF"):
        with_alpha(grey(SHAPE * 0 + 255).convert("RGB"), SHAPE * 0).save(tmp_path / "mask", format)
        assert not read_mask(tmp_path / "mask").any()


def test_empty_masks_with_a_palette_are_empty(tmp_path: Path) -> None:
    for number, colour in ((0, BLACK), (5, BLACK), (0, WHITE)):  # a single class is normal as number 0 or black
        image = Image.frombytes("P", (9, 6), bytes([number]) * 54)
        image.putpalette([255, 0, 255] * number + list(colour))
        image.save(tmp_path / "mask.png")
        assert not read_mask(tmp_path / "mask.png").any()
    image = Image.frombytes("P", (9, 6), bytes([5]) * 54)
    image.putpalette([0, 0, 0] * 5 + list(WHITE))
    image.save(tmp_path / "mask.png")
    with pytest.raises(MaskError, match="one colour that is not black"):
        read_mask(tmp_path / "mask.png")


def test_class_numbers_beside_255_are_no_noise(tmp_path: Path) -> None:
    values = np.arange(40 * 40).reshape(40, 40) % 25
    values[5:10, 5:10] = 255
    values[0] = values[-1] = values[:, 0] = values[:, -1] = 0
    grey(values).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), values != 0)


def test_soft_edges_count_as_before(tmp_path: Path) -> None:
    soft = np.asarray(grey(SHAPE * 255).resize((180, 120), Image.Resampling.BILINEAR))
    grey(soft).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), soft != 0)


def test_large_defects_at_the_border_are_no_background(tmp_path: Path) -> None:
    values = np.zeros((60, 90), np.uint8)
    values[:, :70] = 255  # 78 % of the image, and of its border
    grey(values).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), values > 0)


def test_what_cannot_be_decided_is_said(tmp_path: Path) -> None:
    grey(SHAPE * 0 + 255).save(tmp_path / "white.png")
    with pytest.raises(MaskError, match="one colour that is not black"):
        read_mask(tmp_path / "white.png")
    halves: NDArray[Any] = np.where(np.arange(90) < 45, 100, 200) + SHAPE * 0
    grey(halves).save(tmp_path / "halves.png")
    with pytest.raises(MaskError, match="what is normal"):
        read_mask(tmp_path / "halves.png")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(MaskError, match="NaN"):
        read_mask(tmp_path / "nan.tif")
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(ImageError, match="not a PNG"):
        read_mask(tmp_path / "words.png")


def test_masks_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey(np.rot90(SHAPE) * 255).save(tmp_path / "mask.png", exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), SHAPE)


def test_masks_of_real_data_are_read_as_ever(real_data: Path) -> None:
    paths = sorted(real_data.glob("*/ground_truth/*/*.png"))
    assert len(paths) >= 120
    for path in paths:
        with Image.open(path) as image:
            np.testing.assert_array_equal(read_mask(path), np.asarray(image.convert("L")) != 0)
