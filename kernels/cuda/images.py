"""The image side of the CUDA kernels: decoded images to the network's input."""

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import PIL
from numpy.typing import NDArray

from .device import DEVICE_ARRAY, Device, int32

Resampling = Literal["bilinear", "bicubic"]


def network_input(
    device: Device,
    image: DEVICE_ARRAY,
    out: DEVICE_ARRAY,
    resampling: Resampling,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    resized: tuple[int, int] | None = None,
) -> None:
    """Resize an image [rows, columns, 3] as Pillow does and normalise it into `out` [3, S, S] float32.

    image: uint8 RGB on the device. mean, deviation: per channel, of values in [0, 1]. resized: rows and columns that
    the image is resized to, of which `out` is the middle; where one is more than S, it comes first. None: S both.
    """
    (rows, columns, _), size = image.shape, out.shape[-1]
    target_rows, target_columns = resized or (size, size)
    rows_first = resizes_rows_first(rows, columns, size)
    if (target_rows, target_columns) != (size, size):
        rows_first = target_rows > target_columns
    order = (1, 0) if rows_first else (0, 1)
    between = device.empty((size, columns, 3) if order[0] else (rows, size, 3), np.uint8)
    statistics = [_on_device(device, values) for values in (mean, deviation)]
    for vertical, (kernel, source, target, more) in zip(
        order, (("resize", image, between, []), ("resize_normalise", between, out, statistics)), strict=True
    ):
        out_rows, out_columns = between.shape[:2] if kernel == "resize" else (size, size)
        side, target_side = (rows, target_rows) if vertical else (columns, target_columns)
        tables = _tables_on_device(device, side, target_side, size, resampling)
        device.launch(
            kernel,
            (-(-out_columns // 128), out_rows),
            128,
            (
                source,
                np.int32(source.shape[1]),
                *tables,
                *int32(tables[2].shape[1], vertical, out_columns),
                *more,
                target,
            ),
        )


@lru_cache(maxsize=64)
def _tables_on_device(
    device: Device, source: int, target: int, size: int, resampling: Resampling
) -> tuple[DEVICE_ARRAY, ...]:
    """Keep the weights of recent image sizes on the device: the images of a category mostly share one."""
    return tuple(device.to_device(table) for table in resize_weights(source, target, size, resampling))


@lru_cache(maxsize=64)
def _on_device(device: Device, values: tuple[float, ...]) -> DEVICE_ARRAY:
    return device.to_device(np.array(values, np.float32))


def resizes_rows_first(rows: int, columns: int, size: int) -> bool:
    """Tell whether the installed Pillow filters along rows before columns; from 13 on it does for tall images."""
    return int(PIL.__version__.partition(".")[0]) >= 13 and rows > size and 2 * columns < rows + size


def resize_weights(
    source: int, target: int, size: int, resampling: Resampling
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Return Pillow's taps along one side, of the middle S of `target` pixels.

    First source pixel [S], number [S], 22-bit fixed-point weights [S, taps].
    """
    scale = source / target
    stretch = max(scale, 1.0)  # shrinking widens the filter
    support = (1.0 if resampling == "bilinear" else 2.0) * stretch
    taps = math.ceil(support) * 2 + 1
    centres = (np.arange(size) + round((target - size) / 2) + 0.5) * scale
    first = np.maximum((centres - support + 0.5).astype(np.int32), 0)
    count = np.minimum((centres + support + 0.5).astype(np.int32), source) - first
    offsets = np.arange(taps)
    distance = np.abs((offsets + first[:, None] - centres[:, None] + 0.5) / stretch)  # [S, taps]
    if resampling == "bilinear":
        weights = np.maximum(1.0 - distance, 0.0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights[offsets >= count[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * (1 << 22) + np.copysign(0.5, weights)).astype(np.int32)
    return first, count, fixed
