"""Pictures of results: overlays at one colour scale, thumbnails, JPEG."""

import base64
from collections.abc import Iterator, Mapping
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from zsad.engine.methods.bitmasks import union
from zsad.engine.methods.foreground import Stages

OVERLAY_SIDE = 1024  # pixels at most, so that large images do not make large reports
THUMBNAIL_SIDE = 256
FOREGROUND_COLOUR = (80, 220, 80)  # BGR
STRIP = 2**13  # pixels that are blended at once: what is between stays in the cache


def draw_overlay(bgr: NDArray[np.uint8], scores: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blend a map [H, W] in [0, 1] over an image [h, w, 3], which may be smaller.

    The colour scale is fixed, the opacity grows with the score.
    """
    resized = cv2.resize(scores, bgr.shape[1::-1], interpolation=cv2.INTER_AREA).astype(np.float32, copy=False)
    drawn, rows = np.empty_like(bgr), max(1, STRIP // bgr.shape[1])
    for top in range(0, len(bgr), rows):
        strip = slice(top, top + rows)
        here = np.clip(resized[strip], 0, 1)
        colours = cv2.applyColorMap((here * 255).astype(np.uint8), _turbo())
        opacity = cv2.merge([0.12 + 0.58 * here] * 3)
        below = cv2.multiply(bgr[strip], 1 - opacity, dtype=cv2.CV_32F)
        above = cv2.multiply(colours, opacity, dtype=cv2.CV_32F)
        drawn[strip] = cv2.add(below, above).astype(np.uint8)
    return drawn


@cache
def _turbo() -> NDArray[np.uint8]:
    """Return the colours [256, 1, 3] BGR of the scale, which OpenCV makes anew for every picture."""
    return cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO).astype(np.uint8, copy=False)


def draw_stages(bgr: NDArray[np.uint8], stages: Stages) -> NDArray[np.uint8]:
    """Draw foreground and tiles over an image [h, w, 3] of any size: the background dark, tiles coloured by score."""
    height, width = bgr.shape[:2]
    inside = _resized(union([stages.foreground], stages.size), (height, width))
    drawn = np.where(inside[:, :, None], bgr, bgr // 3).astype(np.uint8)
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    thickness = max(1, round(max(height, width) / 300))
    cv2.drawContours(drawn, outlines, -1, FOREGROUND_COLOUR, thickness)
    across, down = width / stages.size[1], height / stages.size[0]
    for box, score in stages.tiles:
        corners = (round(box.x0 * across), round(box.y0 * down)), (round(box.x1 * across) - 1, round(box.y1 * down) - 1)
        colour = cv2.applyColorMap(
            np.array([[255 * min(max(score, 0), 1)]], np.float32).astype(np.uint8), cv2.COLORMAP_TURBO
        )
        cv2.rectangle(drawn, *corners, colour[0, 0].tolist(), thickness)
    return drawn


def stage_pictures(small: NDArray[np.uint8], stages: Stages) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the pictures that show how the results of an image came about.

    The foreground, white, at full size; over the image at the overlays' size, [h, w, 3], the masks that it was put
    together from, each in a colour, and the tiles with their scores.
    """
    yield "foreground.png", _png(union([stages.foreground], stages.size).astype(np.uint8) * 255)
    if stages.parts:
        painted = small // 2
        for number, part in enumerate(stages.parts):
            hue = np.array([[[number * 67 % 180, 220, 255]]], np.uint8)  # neighbours in the order differ
            inside = _resized(union([part], stages.size), small.shape[:2])
            painted[inside] = painted[inside] // 2 + cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0] // 2
        yield "masks.png", _png(painted)
    drawn = draw_stages(small, stages)
    across, down = small.shape[1] / stages.size[1], small.shape[0] / stages.size[0]
    for box, score in stages.tiles:
        corner = (round(box.x0 * across) + 4, round(box.y0 * down) + 16)
        for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):  # readable on any ground
            cv2.putText(drawn, f"{score:.2f}", corner, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, thickness, cv2.LINE_AA)
    yield "tiles.jpg", jpeg(drawn, 90)


def _resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize a mask [H, W] to size [h, w], nearest pixels."""
    return cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)


def _png(image: NDArray[np.uint8]) -> bytes:
    done, encoded = cv2.imencode(".png", image)
    assert done
    return bytes(encoded)


def thumbnails_of(pictures: Mapping[str, NDArray[np.uint8]]) -> dict[str, str]:
    """Return small versions of BGR images [h, w, 3] by name."""
    return {name: thumbnail(picture) for name, picture in pictures.items()}


def thumbnail(image: NDArray[np.uint8]) -> str:
    """Return a small version of a BGR image [h, w, 3] as a data URI."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(shrink(image, THUMBNAIL_SIDE), 82)).decode()}"


def shrink(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Shrink an image [h, w, 3] until its longer side has at most this many pixels."""
    factor = side / max(image.shape[:2])
    if factor >= 1:
        return image
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """Encode a BGR image [h, w, 3]; quality: from 0 to 100."""
    done, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return bytes(encoded)
