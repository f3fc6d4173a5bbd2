"""Limits of single files: a few bytes get neither gigabytes nor hours, and ordinary files never meet them."""

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import tifffile
from PIL import Image

from zsad.engine.images import limits, stored
from zsad.engine.images.decode import decode
from zsad.engine.images.limits import SPARE_BYTES, Limits, limited
from zsad.engine.images.stored import ImageError, read_header, read_stored

SIDE = 2000


def progressive(side: int, scans: int) -> bytes:
    """A black JPEG whose scans say in a few bytes that nothing changes in the whole image."""
    count = (side // 8) ** 2
    bits = ("0" + "1" * 14) * (count // 32767 + 1)
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def table(number: int, symbol: int) -> bytes:
        return b"\xff\xc4" + struct.pack(">H", 20) + bytes([number, 1] + [0] * 15 + [symbol])

    head = b"\xff\xd8\xff\xdb\0\x43\0" + b"\1" * 64 + b"\xff\xc2\0\x0b\x08" + struct.pack(">HH", side, side)
    first = b"\xff\xda\0\x08\1\1\0\0\0\0" + bytes(count // 8 + 1)
    others = (b"\xff\xda\0\x08\1\1\0" + bytes([1 + scan % 63] * 2 + [0]) + body for scan in range(scans))
    return head + b"\1\1\x11\0" + table(0, 0) + table(16, 0xE0) + first + b"".join(others) + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_stopped_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(progressive(400, 20000))
    now = [0.0]
    reads = []

    def tick() -> float:
        reads.append(now[0])
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr(limits.time, "monotonic", tick)
    with limited(Limits(seconds=5)):
        with pytest.raises(ImageError, match=r"takes more than 5 s to read; .* raise --file-timeout"):
            decode(path)
        assert len(reads) < 60
        reads.clear()
        for read in (decode, read_header):
            with pytest.raises(ImageError, match="takes more than 5 s"):
                read(path)
        assert len(reads) <= 2
    path.write_bytes(progressive(400, 20))
    with limited(Limits(seconds=5)):
        assert decode(path).size == (400, 400)


def test_progressive_files_in_small_blocks_are_the_same(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", progressive=True, quality=95)
    assert (tmp_path / "a.jpg").stat().st_size > 10 * stored.PROGRESSIVE_BLOCK
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.jpg")), np.asarray(Image.open(tmp_path / "a.jpg")))


@pytest.mark.parametrize("start", [b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\2", b"GIF89a" + b"\1\0" * 2 + bytes(3)])
def test_headers_without_an_end_are_stopped(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "a.jpg"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(1 << 38)
    with limited(Limits(seconds=0.1)):
        for read in (decode, read_header):
            with pytest.raises(ImageError, match="takes more than"):
                read(path)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_holes_are_not_read_into_memory(tmp_path: Path, kind: str) -> None:
    content = io.BytesIO()
    Image.new("RGB", (50, 40)).save(content, kind)
    with (tmp_path / "a.png").open("wb") as file:
        file.write(content.getvalue()[:33])
        file.truncate(1 << 38)
    with limited(Limits(bytes=1 << 30)), pytest.raises(ImageError, match="too large: it takes about 256"):
        decode(tmp_path / "a.png")


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("TIFF", "RGB"), ("PNG", "I;16")])
def test_what_takes_too_much_memory_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str
) -> None:
    Image.new(mode, (SIDE, SIDE)).save(tmp_path / "a", kind)
    needed = read_header(tmp_path / "a").bytes
    assert needed >= 22 * SIDE**2
    monkeypatch.setattr(limits, "SPARE_BYTES", 1000)
    with limited(Limits(bytes=needed - 1000)):
        assert decode(tmp_path / "a").size == (SIDE, SIDE)
    monkeypatch.setattr(stored, "_loaded", None)
    monkeypatch.setattr(stored, "_of_opened_tiff", None)
    with limited(Limits(bytes=needed - 1001)):
        with pytest.raises(ImageError, match=r"too large: it takes about .* GB, .*\(--memory-limit\)"):
            decode(tmp_path / "a")
        assert read_header(tmp_path / "a").bytes == needed  # so that it is known what it takes
    assert SPARE_BYTES > 22 * 24e6


def test_a_tiff_of_many_channels_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    levels = np.zeros((30, 40, 60), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric="minisblack", planarconfig="contig", metadata=None)
    assert read_header(tmp_path / "a.tif").bytes == 2 * levels.nbytes
    assert decode(tmp_path / "a.tif").size == (40, 30)
    assert not caplog.records  # Pillow, which reads fewer, has nothing to say


def declare(path: Path, side: int) -> None:
    """Write a PNG that has few pixels of those that its header declares."""
    content = io.BytesIO()
    Image.new("1", (8, 8)).save(content, "PNG")
    header = b"IHDR" + struct.pack(">II", side, side) + content.getvalue()[24:29]
    path.write_bytes(content.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + content.getvalue()[33:])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixels_are_limited_either_way(tmp_path: Path) -> None:
    declare(tmp_path / "a.png", 13000)
    with limited(Limits(megapixels=100)), pytest.raises(ImageError, match=r"more than 100 million pixels.*--max-mega"):
        read_header(tmp_path / "a.png")
    read_header(tmp_path / "a.png")
    declare(tmp_path / "a.png", 14000)
    with pytest.raises(ImageError, match="more than 178 million pixels"):
        read_header(tmp_path / "a.png")
    with limited(Limits(megapixels=200)):
        read_header(tmp_path / "a.png")
    with limited(Limits()), pytest.raises(ImageError, match="more than 178 million"):
        read_header(tmp_path / "a.png")


def test_sixteen_bits_take_no_eight_bytes_per_value(tmp_path: Path) -> None:
    Image.fromarray(np.full((SIDE, SIDE), 4000, np.uint16)).save(tmp_path / "a.png")
    tracemalloc.start()
    try:
        assert decode(tmp_path / "a.png", 12).getpixel((3, 3)) == (249, 249, 249)
        assert tracemalloc.get_traced_memory()[1] < 24 * SIDE**2
    finally:
        tracemalloc.stop()


def test_one_try_after_the_other_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's pixels of a file that is refused go before it is tried again without its metadata."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (SIDE, SIDE)).save(path, comment="words")
    path.write_bytes(path.read_bytes()[:-3000])
    loads = []
    load = stored._load

    def watched(file: BinaryIO, image: Image.Image) -> Exception | None:
        refusal = load(file, image)
        assert refusal is None or refusal.__traceback__ is None
        # Older versions of Pillow have it under the other name.
        assert all((vars(before).get("_im") or vars(before).get("im")) is None for before in loads)
        loads.append(image)
        return refusal

    monkeypatch.setattr(stored, "_load", watched)
    with pytest.raises(ImageError, match="truncated"):
        read_stored(path)
    assert len(loads) == 2  # without the comment; there is no EXIF to try without


def test_a_decoder_that_nothing_ends_is_tried_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jp2"
    Image.new("RGB", (60, 40), (9, 8, 7)).save(path)
    monkeypatch.setitem(limits.UNINTERRUPTED, "JPEG2000", 1000)
    tries = []
    run = limits.subprocess.run

    def watched(command: list[str], **options: float) -> object:
        tries.append(command[-2:])
        return run(command, **options)

    monkeypatch.setattr(limits.subprocess, "run", watched)
    with limited(Limits()):
        for _ in range(2):
            assert decode(path).getpixel((3, 3)) == (9, 8, 7)
        assert tries == [[os.fspath(path), "JPEG2000"]]
    with limited(Limits()):
        monkeypatch.setattr(limits, "_TRIAL", "import time; time.sleep(100)")
        monkeypatch.setattr(limits, "_limits", Limits(seconds=0.05))
        with pytest.raises(ImageError, match=r"more than 0.05 s"):
            decode(path)
    with limited(Limits()):
        monkeypatch.setattr(limits, "_TRIAL", "import os; os.abort()")
        with pytest.raises(ImageError, match="makes the decoder of JPEG2000 crash"):
            decode(path)
