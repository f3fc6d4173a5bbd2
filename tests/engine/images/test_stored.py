"""Files as they are stored: upright whoever decodes them, what PNG chunks say, errors to the point, and memory."""

import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.stored import ImageError, read_header, read_stored

LEVELS = np.random.default_rng(0).integers(300, 65536, (40, 52, 4), dtype=np.uint16)


def transposed(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """The picture as EXIF describes it: where its first row and its first column are seen."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values[::-1] if orientation in (3, 4, 7, 8) else values


def tiff(path: Path, levels: NDArray[Any], photometric: str, separate: bool = False, **options: Any) -> Path:
    if levels.shape[2] > 1:
        options["planarconfig"] = "separate" if separate else "contig"
    arranged = np.moveaxis(levels, 2, 0) if separate else levels if levels.shape[2] > 1 else levels[:, :, 0]
    tifffile.imwrite(path, arranged, metadata=None, photometric=photometric, **options)
    return path


def png(bits: int, rows: list[bytes], *chunks: tuple[bytes, bytes], colour: int = 0, width: int = 4) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("orientation", range(1, 10))  # 9: no such orientation
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("samples", "separate"), [(1, False), (2, False), (2, True), (3, False), (3, True), (4, False), (4, True)]
)
def test_tiffs_are_upright_whoever_decodes_them(
    tmp_path: Path, samples: int, separate: bool, dtype: type, orientation: int
) -> None:
    levels = LEVELS[:, :, :samples] if dtype is np.uint16 else (LEVELS[:, :, :samples] >> 8).astype(np.uint8)
    levels = levels.copy()
    colours = levels[:, :, :3] if samples > 2 else levels[:, :, :1]
    options: dict[str, Any] = {"extratags": [(274, 3, 1, orientation, True)], "compression": "deflate"}
    if samples in (2, 4):
        options["extrasamples"] = ["unassalpha"]
        levels[7, 9, -1] = 0
    stored = read_stored(tiff(tmp_path / "a.tif", levels, "rgb" if samples > 2 else "minisblack", separate, **options))
    values = np.asarray(stored.values)
    values = values[:, :, None] if values.ndim == 2 else values
    np.testing.assert_array_equal(values[:, :, : colours.shape[2]], transposed(colours, orientation))
    if samples in (2, 4):
        assert stored.hidden is not None
        np.testing.assert_array_equal(stored.hidden, transposed(levels[:, :, -1] == 0, orientation))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("samples", [2, 3, 4])
def test_grey_with_further_samples(tmp_path: Path, dtype: type, separate: bool, photometric: str, samples: int) -> None:
    levels = LEVELS[:, :, :samples] if dtype is np.uint16 else (LEVELS[:, :, :samples] >> 8).astype(np.uint8)
    options = {"extrasamples": ["unspecified"] * (samples - 1)}
    stored = read_stored(tiff(tmp_path / "a.tif", levels, photometric, separate, **options))
    values = np.asarray(stored.values)
    inverted = photometric == "miniswhite" and not stored.white_is_zero
    expected = np.iinfo(dtype).max - levels[:, :, 0] if inverted else levels[:, :, 0]
    np.testing.assert_array_equal(values if values.ndim == 2 else values[:, :, 0], expected)


def test_premultiplied_grey_is_read(tmp_path: Path) -> None:
    levels = np.full((6, 8, 2), (100, 255), np.uint8)
    levels[0] = 0
    stored = read_stored(tiff(tmp_path / "a.tif", levels, "minisblack", extrasamples=["assocalpha"]))
    assert stored.hidden is not None
    assert stored.hidden.sum() == 8
    assert isinstance(stored.values, Image.Image)
    assert stored.values.convert("RGB").getpixel((3, 3)) == (100, 100, 100)


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x40"), (2, b"\x1b"), (4, b"\x01\x23"), (8, b"\0\1\2\3")])
def test_the_transparent_grey_of_few_bits(tmp_path: Path, bits: int, row: bytes) -> None:
    (tmp_path / "a.png").write_bytes(png(bits, [row, row], (b"tRNS", b"\0\1")))
    stored = read_stored(tmp_path / "a.png")
    assert stored.transparent is not None
    assert stored.transparent.tolist() == [[False, True, False, False]] * 2


def test_significant_bits_wherever_the_chunk_is(tmp_path: Path) -> None:
    rows = [row.tobytes() for row in (LEVELS[:, :4, 0] >> 4).astype(">u2")]
    profile = (b"iCCP", b"name\0\0" + zlib.compress(np.random.default_rng(0).bytes(6000)))
    text = (b"tEXt", b"Comment\0made without sBIT and IDAT")
    path = tmp_path / "a.png"
    for chunks, bits in (([profile, (b"sBIT", b"\x0c")], 12), ([text], None), ([text, (b"sBIT", b"\x0a")], 10)):
        path.write_bytes(png(16, rows, *chunks))
        assert read_stored(path).said_bits == bits
    rows = [row.tobytes() for row in LEVELS[:, :4, :].astype(">u2")]
    path.write_bytes(png(16, rows, (b"sBIT", b"\x0a\x0c\x0b\x10"), colour=6))  # the last is that of alpha
    assert read_stored(path).said_bits == 12


def test_a_damaged_compressed_tiff_needs_no_package(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.tif", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 30, (300, 300, 3), dtype=np.uint8)).save(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = rng.bytes(500)
    path.write_bytes(content)
    with pytest.raises(ImageError, match="damaged") as refusal:
        read_stored(path)
    assert "pip install" not in str(refusal.value)


def test_a_large_file_that_is_no_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.write(b"words")
        file.truncate(100 << 20)
    tracemalloc.start()
    try:
        for read in (read_stored, read_header):
            with pytest.raises(ImageError, match="not a PNG"):
                read(tmp_path / "a.png")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


LARGE = (4000, 3000)

# Runs on its own, so that the highest use of memory is that of one image.
WRITE = """
import sys
from pathlib import Path
import numpy as np
import cv2, tifffile
from zsad.engine.images.decode import decode, network_input, recipe
from zsad.engine.images.duplicates import Duplicates
from zsad.engine.images.stored import read_header
from zsad.engine.results.drawing import OVERLAY_SIDE, draw_overlay, jpeg, shrink
from zsad.engine.scores.maps import object_mask, pixel_map
from PIL import Image

def highest():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

path = Path(sys.argv[1])
estimate = read_header(path).bytes
Path("/proc/self/clear_refs").write_text("5")  # the highest use starts again from the present one
before = highest()
image = decode(path)
network_input(image, recipe("clip", 518))
Duplicates().add(0, path, image)
read = highest() - before
picture = np.asarray(image)
bgr = np.ascontiguousarray(picture[:, :, ::-1])
mask = object_mask(bgr) if sys.argv[2] == "masked" else None
scores = pixel_map(np.eye(37), picture.shape[:2], (0.0, 1.0), mask)
Image.fromarray(scores).save(path.with_name("map.tiff"), format="TIFF")
jpeg(draw_overlay(shrink(bgr, OVERLAY_SIDE), scores), 90)
print(estimate, read, highest() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "kind",
    ["jpeg", "masked jpeg", "grey png", "alpha png", "16 bit tiff", "16 bit colour tiff", "16 bit planes"],
)
def test_reading_and_writing_take_what_the_header_says(tmp_path: Path, kind: str) -> None:
    grey = np.zeros(LARGE[::-1], np.uint8)
    grey[::7] = np.arange(LARGE[0]) % 251
    levels, path = grey.astype(np.uint16) * 257, tmp_path / "image"
    rgb = Image.merge("RGB", [Image.fromarray(grey)] * 3)
    if "jpeg" in kind:
        rgb.save(path, "JPEG")
    elif kind == "grey png":
        Image.fromarray(grey).save(path, "PNG", compress_level=1)
    elif kind == "alpha png":
        rgb.putalpha(Image.fromarray(grey))
        rgb.save(path, "PNG", compress_level=1)
    elif kind == "16 bit tiff":
        Image.fromarray(levels).save(path, "TIFF")
    elif kind == "16 bit colour tiff":
        tifffile.imwrite(path, np.stack([levels] * 3, axis=2), photometric="rgb")
    else:
        tifffile.imwrite(
            path, np.stack([levels] * 4), photometric="rgb", planarconfig="separate", extrasamples=["unassalpha"]
        )
    command = [sys.executable, "-c", WRITE, str(path), kind.split()[0]]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    estimate, read, written = (int(number) / LARGE[0] / LARGE[1] for number in found.stdout.split())
    print(f"{kind}: {estimate:.0f} bytes per pixel estimated, reading took {read:.1f}, with writing {written:.1f}")
    assert written < 1.1 * estimate
    assert written > 0.75 * estimate


@pytest.mark.parametrize("tag", [256, 257])
def test_a_tiff_without_pixels_is_damaged(tmp_path: Path, tag: int) -> None:
    path = tmp_path / "none.tif"
    Image.new("RGB", (3, 2)).save(path)
    content = bytearray(path.read_bytes())
    entry = re.search(re.escape(tag.to_bytes(2, "little")) + rb"[\3\4]\0", content)
    assert entry is not None
    content[entry.start() + 8 : entry.start() + 12] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(ImageError, match="has no pixels"):
        read_stored(path)
