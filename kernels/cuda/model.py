"""What comparing takes on a card by counts alone: a model, for the pairs of a launch and for the benchmarks' page.

A product's blocks and a pass's run in waves, as many at once as fit the multiprocessors, and the two do not fit beside
each other. Nothing here has been measured; what is measured belongs in its place.
"""

from dataclasses import dataclass

from .card import Card
from .comparers import OWN_ROWS, filter_max_shape, strip_rows

# [degrees as bits: bit k stands for degree 2k + 1] -> instructions that a thread of filter_max.cu executes on an entry
# at most, counted in the machine code by tests/kernels/cuda/test_compile.py
INSTRUCTIONS = {0b1: 10, 0b11: 28, 0b111: 62}
OTHER_INSTRUCTIONS = 20  # for each degree up to the largest of any other mask
# [compute capability] -> dense fp16 operations with fp32 sums of a multiprocessor in a cycle, from data sheets
TENSOR_RATE = {"8.0": 2048, "8.6": 512, "8.9": 512, "9.0": 4096, "10.0": 8192, "12.0": 512}
PRODUCT_SIDE = 128  # of a block of cuBLAS' product, one of which fills a multiprocessor's registers
ISSUE_RATE = 4 * 0.65  # instructions of a multiprocessor in a cycle: four schedulers, as far as warps are ready
FULL = 64  # so many pairs leave no wave to speak of half empty
LAUNCH_CYCLES = 8000  # from the end of a product to the start of its pass, and back


@dataclass(frozen=True)
class Filtered:
    """What the pass over a Gram looks at."""

    grid: tuple[int, int]
    mask: int
    window: int | None = None

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


def product_cycles(patches: int, channels: int, pairs: int, card: Card) -> float:
    """Return what the product of a launch takes: whole waves of blocks."""
    blocks = -(-patches // PRODUCT_SIDE) * -(-pairs * patches // PRODUCT_SIDE)
    each = 2 * PRODUCT_SIDE**2 * channels / TENSOR_RATE.get(card.compute_capability, 512)
    return -(-blocks // card.multiprocessors) * each


def pass_cycles(filtered: Filtered, pairs: int, card: Card) -> float:
    """Return what the pass of a launch takes: whole waves of blocks, column after column."""
    mask = filtered.mask
    shape = filter_max_shape(filtered.grid, mask, pairs, card, filtered.window)
    entries = shape.resident * shape.threads // 32 * OWN_ROWS * strip_rows(mask)  # of all warps, at a column
    return shape.steps * entries * INSTRUCTIONS.get(mask, OTHER_INSTRUCTIONS * mask.bit_length()) / ISSUE_RATE


def pair_cycles(filtered: Filtered, channels: int, pairs: int, card: Card) -> float:
    """Return what a pair takes in a launch of so many."""
    product = product_cycles(filtered.patches, channels, pairs, card)
    return (product + pass_cycles(filtered, pairs, card) + LAUNCH_CYCLES) / pairs


def best_pairs(filtered: Filtered, channels: int, most: int, card: Card) -> int:
    """Return how many pairs a launch should have, at most so many: the most of those that are best."""
    if most > FULL:
        return most
    return min(range(most, 0, -1), key=lambda pairs: pair_cycles(filtered, channels, pairs, card))
