"""Bit depth of a batch: found from what the 16-bit files hold and say, never from other files."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad.engine.images.depth import batch_bit_depth


def grey(path: Path, largest: int, **options: object) -> Path:
    levels = np.linspace(0, largest, 300).astype(np.uint16).reshape(15, 20)
    Image.fromarray(levels).save(path, **options)
    return path


def with_significant_bits(path: Path, bits: int) -> Path:
    content = path.read_bytes()
    data = b"sBIT" + bytes([bits])
    chunk = struct.pack(">I", 1) + data + struct.pack(">I", zlib.crc32(data))
    path.write_bytes(content[:33] + chunk + content[33:])
    return path


@pytest.mark.parametrize(
    ("largest", "bits"), [(255, 8), (256, 10), (1023, 10), (1024, 12), (4095, 12), (16383, 14), (16384, 16)]
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_largest_level_of_the_batch_decides(tmp_path: Path, largest: int, bits: int, suffix: str) -> None:
    paths = [grey(tmp_path / f"{number}{suffix}", level) for number, level in enumerate((100, largest, 30))]
    depth = batch_bit_depth(paths)
    assert depth.bits == bits
    if bits == 16:
        assert depth.note is None
    else:
        assert depth.note is not None
        assert f"value above {2**bits - 1}: taken as {bits} bits" in depth.note
        assert "--bit-depth" in depth.note


def test_files_of_8_bits_and_broken_ones_do_not_count(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.tif")
    Image.new("RGB", (8, 8)).save(tmp_path / "c.jpg")
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "gone.png"]
    assert batch_bit_depth(paths).bits == 16
    assert batch_bit_depth([*paths, grey(tmp_path / "e.png", 4000)]).bits == 12
    assert batch_bit_depth([grey(tmp_path / "black.png", 0)]).bits == 16
    (tmp_path / "scaled.pgm").write_bytes(b"P5 2 1 4095\n" + np.array([0, 40], ">u2").tobytes())
    assert batch_bit_depth([tmp_path / "scaled.pgm"]).bits == 16


def test_what_files_say_counts_where_their_levels_bear_it_out(tmp_path: Path) -> None:
    dark = with_significant_bits(grey(tmp_path / "dark.png", 700), 12)
    assert batch_bit_depth([dark]).bits == 12
    bright = with_significant_bits(grey(tmp_path / "bright.png", 60000), 12)  # scaled to 16 bits, as PNG wants it
    assert batch_bit_depth([dark, bright]).bits == 16
    said = grey(tmp_path / "said.tif", 700, tiffinfo={281: 4095})
    assert batch_bit_depth([said]).bits == 12
    said = grey(tmp_path / "ome.tif", 700, tiffinfo={270: '<OME><Pixels SignificantBits="14"/></OME>'})
    assert batch_bit_depth([said]).bits == 14


@pytest.mark.parametrize("black", [4095, 65535])
def test_inverted_levels(tmp_path: Path, black: int) -> None:
    levels = black - np.linspace(0, 3000, 300).astype(np.uint16).reshape(15, 20)
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert batch_bit_depth([tmp_path / "a.tif"]).bits == 12


def test_hidden_levels_do_not_count(tmp_path: Path) -> None:
    levels = np.full((8, 8), 900, np.uint16)
    levels[0] = 65535
    Image.fromarray(levels).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    data = b"tRNS" + struct.pack(">H", 65535)
    chunk = struct.pack(">I", 2) + data + struct.pack(">I", zlib.crc32(data))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    assert batch_bit_depth([tmp_path / "a.png"]).bits == 10
