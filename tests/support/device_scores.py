"""Mutual scoring on opened devices: what the tests of the CUDA half call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zsad.kernels.cuda.device import Device
from zsad.kernels.cuda.scoring import Options
from zsad.kernels.mutual_scoring import MutualScoring


def device_scores(
    tokens: Any,
    grid: tuple[int, int] | None = None,
    degrees: Sequence[int] = (1, 3, 5),
    interval: tuple[float, float] = (0.0, 0.3),
    device: Device | Sequence[Device] = (),
    precision: str = "auto",
    *,
    products: Any = None,
    pairs: int | None = None,
    host_memory_limit: int | None = None,
    window: int | None = None,
    recorded: bool = True,
    **call: Any,
) -> Any:
    """Score as `mutual_scores` does, with the options of a device; call: the other arguments of `scores`."""
    _, layers, patches, channels = tokens.shape
    grid = grid or (math.isqrt(patches),) * 2
    devices = device if isinstance(device, Sequence) else [device]
    options = Options(products, pairs, host_memory_limit, recorded)
    scoring = MutualScoring(grid, layers, channels, degrees, interval, precision, devices, options, window)
    return scoring.scores(tokens, **call)
