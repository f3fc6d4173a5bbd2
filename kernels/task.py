"""What mutual scoring is asked for: the shape of the images' tokens, and how they are compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .reference import checked_interval, interval_ranks


@dataclass(frozen=True)
class Task:
    """Images of one shape and how they are compared; raises ValueError for what makes no sense."""

    grid: tuple[int, int]  # rows and columns of patches
    layers: int
    channels: int
    degrees: tuple[int, ...]  # odd sizes of the neighbourhoods; one may be there twice
    interval: tuple[float, float]
    # How many rows and columns a patch may lie away from the place of one that it is compared with; None: any number.
    window: int | None = None

    def __post_init__(self) -> None:
        if min(*self.grid, self.layers, self.channels) < 1:
            raise ValueError(
                f"mutual scoring needs patches, layers and channels, not a grid {self.grid} with {self.layers} layers "
                f"of {self.channels} channels"
            )
        if not self.degrees or any(degree < 1 or degree % 2 == 0 for degree in self.degrees):
            raise ValueError(f"degrees must be odd and positive, and at least one, not {self.degrees}")
        checked_interval(self.interval)
        if self.window is not None and self.window < 0:
            raise ValueError(f"a position window is 0 cells (the same place only) or more, not {self.window}")

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    def ranks(self, images: int) -> tuple[int, int]:
        """Return which ranks [first, last) of a patch's sorted distances to the other images are averaged.

        images: all that are compared, references among them.
        """
        return interval_ranks(images - 1, self.interval)


def make_task(
    grid: tuple[int, int],
    layers: int,
    channels: int,
    degrees: Sequence[int],
    interval: tuple[float, float],
    window: int | None = None,
) -> Task:
    """Make a task of numbers of any kind, NumPy's among them; a window that leaves nothing out is none."""
    rows, columns = int(grid[0]), int(grid[1])
    low, high = interval
    if window is not None:
        window = int(window) if window < max(rows, columns) - 1 else None
    return Task((rows, columns), layers, channels, tuple(int(degree) for degree in degrees), (low, high), window)


def not_finite(image: int) -> ValueError:
    """Return the error of an image whose tokens hold infinities or no numbers."""
    return ValueError(
        f"the tokens of image {image} are not finite: the network that made them overflows in its precision; run it in "
        "fp32 (zsad-infer --network-precision fp32)"
    )
