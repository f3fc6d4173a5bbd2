"""Images: every kind is found and decoded alike, the network's input equals Pillow's, and broken files say why."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.decode import RECIPES, ImageError, decode, network_input
from zsad.engine.images.folders import RECORD, NothingToScoreError, scan
from zsad.kernels.files import printable


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth colour image, so that lossy formats stay close to it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def touch_images(root: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path, format="PNG")


def found(root: Path, exclude: Path | None = None) -> dict[str, list[str]]:
    return {category.name: [str(image.relative) for image in category.images] for category in scan(root, exclude)}


# Layouts


def test_mvtec_layout_of_several_categories(tmp_path: Path) -> None:
    touch_images(
        tmp_path,
        "bolt/train/good/0.png",
        "bolt/test/good/0.png",
        "bolt/test/bent/0.png",
        "bolt/ground_truth/bent/0_mask.png",
        "nut/test/good/0.PNG",
        ".hidden/test/good/0.png",
        "nut/test/.thumbnails/0.png",
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "readme.txt").write_text("not an image")
    assert found(tmp_path) == {"bolt": ["test/bent/0.png", "test/good/0.png"], "nut": ["test/good/0.PNG"]}
    assert found(tmp_path / "bolt") == {"bolt": ["test/bent/0.png", "test/good/0.png"]}


def test_a_folder_of_images_and_folders_of_folders(tmp_path: Path) -> None:
    touch_images(
        tmp_path, "flat/b.png", "flat/a.jpeg", "flat/deep/er/c.TIF", "labelled/good/0.png", "labelled/bad/0.png"
    )
    (tmp_path / "flat" / "notes.txt").write_text("text")
    assert found(tmp_path / "flat") == {"flat": ["a.jpeg", "b.png", "deep/er/c.TIF"]}
    assert found(tmp_path / "labelled") == {"labelled": ["bad/0.png", "good/0.png"]}
    assert list(found(tmp_path)) == ["flat", "labelled"]
    assert [path.name for path in scan(tmp_path / "flat")[0].ignored] == ["notes.txt"]


def test_nothing_to_score_says_why(tmp_path: Path) -> None:
    with pytest.raises(NothingToScoreError, match="no such folder"):
        scan(tmp_path / "absent")
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(NothingToScoreError, match="must be a folder"):
        scan(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToScoreError, match=r"no images in it.*\.webp"):
        scan(tmp_path / "empty")
    with pytest.raises(NothingToScoreError, match="another --output"):
        scan(tmp_path, exclude=tmp_path / "empty" / "..")


def test_results_of_this_and_of_earlier_runs_are_left_out(tmp_path: Path) -> None:
    touch_images(tmp_path, "a.png", "b.png", "out/part/overlays/a.jpg", "before/part/overlays/a.jpg")
    (tmp_path / "before" / "part" / RECORD).write_text("{}")
    assert found(tmp_path, exclude=tmp_path / "out") == {tmp_path.name: ["a.png", "b.png"]}


def test_links_in_circles_and_to_folders_read_before(tmp_path: Path) -> None:
    touch_images(tmp_path, "part/a.png", "part/sub/b.png", "elsewhere/c.png")
    part = tmp_path / "part"
    (part / "sub" / "up").symlink_to(part)
    (part / "outside").symlink_to(tmp_path / "elsewhere")
    (part / "self").symlink_to("self")
    (part / "self.png").symlink_to("self.png")
    assert found(part) == {"part": ["a.png", "self.png", "outside/c.png", "sub/b.png"]}
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "twin").symlink_to(part)
    assert list(found(tmp_path)) == ["elsewhere", "part", "twin"]


def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch_images(tmp_path, "bolt/test/bent/0.png", "bolt/test/good/0.png", "nut/0.png", "nut/1.png")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name in ("bent", "nut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    bolt, nut = scan(tmp_path)
    assert [str(image.relative) for image in bolt.images] == ["test/good/0.png"]
    assert [(str(path), why) for path, why in bolt.unreadable] == [
        ("test/bent", "cannot be listed (Permission denied)")
    ]
    assert not nut.images
    assert len(nut.unreadable) == 1
    with pytest.raises(NothingToScoreError, match="Permission denied"):
        scan(tmp_path / "nut")


# Names of results


def test_two_images_with_one_stem_keep_their_own_results(tmp_path: Path) -> None:
    touch_images(tmp_path, "a.png", "a.jpg", "b.png", "a.png.bmp", "B.tif", "c/a.png")
    keys = {str(image.relative): str(image.key) for image in scan(tmp_path)[0].images}
    assert keys["a.png"] == "a.png"
    assert keys["a.jpg"] == "a.jpg"
    assert keys["c/a.png"] == "c/a"
    assert len({key.casefold() for key in keys.values()}) == len(keys)


def test_result_files_and_folders_never_share_a_name(tmp_path: Path) -> None:
    touch_images(
        tmp_path,
        "a.png",
        "a.jpg/x.png",
        "a.tiff/x.png",
        "a_scores.json/x.png",
        "scores.csv/x.png",
        f"{'n' * 251}.png",
        f"{'n' * 250}m.png",
        f"{'d' * 255}/x.png",
        "e\u0301" * 80 + ".png",
    )
    keys = [image.key for image in scan(tmp_path)[0].images]
    for pattern in ("maps/{}.tiff", "overlays/{}.jpg", "{}_scores.json"):
        files = [Path(pattern.format(key)) for key in keys]
        folders = {parent for file in files for parent in file.parents}
        assert len(set(files)) == len(files)
        assert not folders & {*files, Path("scores.csv"), Path(RECORD)}
        assert all(len(os.fsencode(part)) <= 255 for file in files for part in file.parts)


def test_categories_never_take_a_reserved_or_taken_name(tmp_path: Path) -> None:
    touch_images(tmp_path, "report.html/0.png", "report.html_/0.png", "run.json/0.png", f"{'n' * 255}/0.png")
    names = list(found(tmp_path))
    assert not {"report.html", "run.json"} & set(names)
    assert len(set(names)) == 4
    assert max(map(len, names)) <= 200


def test_printable_escapes_what_a_terminal_obeys() -> None:
    assert printable("é\x1b[2J\n\udcff") == "é\\x1b[2J\\n\\udcff"
    assert printable("a\nb", keep="\n") == "a\nb"


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
    actual = network_input(Image.fromarray(pixels), 70, RECIPES[preprocessing])  # type: ignore[index]
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    levels = np.abs(actual - expected) * np.array(std)[:, None, None] * 255
    assert levels.max() < 1.6  # a rounding of the first pass may tip over
    assert np.mean(levels > 0.51) < 0.01


def test_the_reference_feeds_the_same_input(golden: Path, real_data: Path) -> None:
    arrays = np.load(golden / "end_to_end_dinov2s.npz")
    (path,) = (real_data / "ball_screw").rglob(Path(str(arrays["files"][0])).name)
    np.testing.assert_allclose(network_input(decode(path), 518, RECIPES["imagenet"]), arrays["image_0"], atol=1e-5)


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
