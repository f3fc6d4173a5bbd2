"""Chunks and segments of files: the same file without metadata that Pillow stumbles over, and what a PNG says."""

import struct
from typing import BinaryIO

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND")  # what decides the pixels
_WEBP_KEPT = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")


def without_metadata(file: BinaryIO, with_exif: bool) -> bytes | None:
    """Return a PNG, JPEG or WebP file without profiles, XMP and comments; None for other kinds, which are not read.

    with_exif: keep EXIF, which says which way up the picture is.
    """
    file.seek(0)
    start = file.read(12)
    if start.startswith(_PNG):
        strip = _png
    elif start.startswith(b"\xff\xd8"):
        strip = _jpeg
    elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
        strip = _webp
    else:
        return None
    return strip(start + file.read(), with_exif)


def significant_bits(file: BinaryIO) -> int | None:
    """Return how many bits of its samples a PNG says to be in use, the most of all channels without alpha."""
    colour = _png_chunk(file, b"IHDR")[9:10]
    bits = _png_chunk(file, b"sBIT")[: 3 if colour in (b"\2", b"\6") else 1]
    return max(bits, default=None)


def transparent_grey(file: BinaryIO) -> int | None:
    """Return which grey a PNG of 8 bits or fewer says to be transparent, from 0 to 255."""
    key, bits = _png_chunk(file, b"tRNS"), _png_chunk(file, b"IHDR")[8:9]
    white = 2 ** int.from_bytes(bits, "big") - 1
    return (int.from_bytes(key, "big") & white) * 255 // white if len(key) == 2 and white else None


def _png_chunk(file: BinaryIO, wanted: bytes) -> bytes:
    """Return the data of a chunk that precedes the pixels; empty without one."""
    position = len(_PNG)
    while True:
        file.seek(position)
        size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if kind == wanted:
            return file.read(size)
        if kind in (b"", b"IDAT"):
            return b""
        position += size + 12  # length, kind, data, checksum


def _png(content: bytes, with_exif: bool) -> bytes:
    kept, position = [_PNG], len(_PNG)
    while position + 8 <= len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")  # length, kind, data, checksum
        kind = content[position + 4 : position + 8]
        if kind in _PNG_KEPT or (with_exif and kind == b"eXIf"):
            kept.append(content[position:end])
        position = end
    return b"".join(kept)


def _jpeg(content: bytes, with_exif: bool) -> bytes:
    kept, position = [content[:2]], 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        # APP1 to APP15 and COM, without Adobe's APP14, which says what the channels are.
        name = content[position + 4 : position + 9]
        metadata = 0xE1 <= marker <= 0xEF or marker == 0xFE
        if not metadata or name == b"Adobe" or (with_exif and name == b"Exif\0"):
            kept.append(content[position:end])
        position = end
        if marker == 0xDA:  # what follows is the picture
            break
    return b"".join((*kept, content[position:]))


def _webp(content: bytes, with_exif: bool) -> bytes:
    kept, position = [], 12
    while position + 8 <= len(content):
        kind, size = content[position : position + 4], int.from_bytes(content[position + 4 : position + 8], "little")
        end = position + 8 + size + size % 2
        if kind == b"VP8X":  # its flags announce the profile, EXIF and XMP
            announced = 0x24 if with_exif else 0x2C
            flags = bytes(flag & ~announced for flag in content[position + 8 : position + 9])
            kept += [content[position : position + 8], flags, content[position + 9 : end]]
        elif kind in _WEBP_KEPT or (with_exif and kind == b"EXIF"):
            kept.append(content[position:end])
        position = end
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
