"""Files that are whole, and what becomes of them: bits flipped, parts overwritten, removed, repeated or cut off."""

import io
import random

import cv2
import numpy as np
from PIL import Image


def picture(kind: str, image: Image.Image, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


def images() -> dict[str, bytes]:
    """Small pictures of every kind by file name."""
    rng = np.random.default_rng(1)
    colour = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    deep = rng.integers(0, 65536, (30, 40, 3), dtype=np.uint16)
    kinds = {"png": "PNG", "bmp": "BMP", "webp": "WEBP", "gif": "GIF", "jp2": "JPEG2000", "ppm": "PPM", "tga": "TGA"}
    files = {f"a.{suffix}": picture(kind, colour) for suffix, kind in kinds.items()}
    files |= {"b.jpg": picture("JPEG", colour), "p.jpg": picture("JPEG", colour, progressive=True)}
    compressions = ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    files |= {f"{how}.tif": picture("TIFF", colour, compression=how) for how in compressions}
    files |= {"g4.tif": picture("TIFF", colour.convert("1"), compression="group4")}
    for suffix in (".png", ".tif"):
        files[f"deep{suffix}"] = cv2.imencode(suffix, deep)[1].tobytes()
    return files


def corrupted(content: bytes, rng: random.Random) -> bytes:
    """Return a content with bits flipped, parts overwritten, removed or repeated, or cut off."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(changed) or 1)
        how = rng.randrange(6)
        if how < 2 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif how == 2:
            changed[place : place + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", rng.randbytes(4)))
        elif how == 3:
            del changed[place : place + rng.randrange(1, 64)]
        elif how == 4:
            changed[place:place] = changed[place : place + rng.randrange(1, 64)] * rng.choice((1, 50))
        else:
            del changed[place:]
    return bytes(changed)
