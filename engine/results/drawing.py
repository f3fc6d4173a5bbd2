"""Pictures of results: overlays at one colour scale, thumbnails, JPEG."""

import base64

import cv2
import numpy as np
from numpy.typing import NDArray

OVERLAY_SIDE = 1024  # pixels at most, so that large images do not make large reports
THUMBNAIL_SIDE = 256


def draw_overlay(bgr: NDArray[np.uint8], scores: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blend a map [h, w] in [0, 1] over an image [h, w, 3]: fixed colour scale, opacity growing with the score."""
    colours = cv2.applyColorMap((np.clip(scores, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    opacity = (0.12 + 0.58 * np.clip(scores, 0, 1))[:, :, None]
    return (bgr * (1 - opacity) + colours * opacity).astype(np.uint8)


def draw_small(bgr: NDArray[np.uint8], scores: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return an image [H, W, 3] at the overlays' size, and its overlay with the map [H, W], both [h, w, 3]."""
    small = shrink(bgr, OVERLAY_SIDE)
    resized = cv2.resize(scores, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    return small, draw_overlay(small, resized.astype(np.float32, copy=False))


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
