"""Metadata that keeps Pillow from opening a valid image: the same file without it, for a second try."""

import struct

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND")  # what decides the pixels
_WEBP_KEPT = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")


def without_metadata(content: bytes, with_exif: bool) -> bytes | None:
    """Return a PNG, JPEG or WebP file without profiles, XMP and comments; None for other kinds.

    with_exif: keep EXIF, which says which way up the picture is.
    """
    if content.startswith(_PNG):
        return _png(content, with_exif)
    if content.startswith(b"\xff\xd8"):
        return _jpeg(content, with_exif)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return _webp(content, with_exif)
    return None


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
            kept.append(content[position : position + 8] + bytes([content[position + 8] & ~announced]))
            kept.append(content[position + 9 : end])
        elif kind in _WEBP_KEPT or (with_exif and kind == b"EXIF"):
            kept.append(content[position:end])
        position = end
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
