"""Masks as bits."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from zsad.engine.methods.bitmasks import Box, overlap, pack, union


@settings(max_examples=100)
@given(height=st.integers(1, 20), width=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_bits_say_what_the_masks_say(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks, packed = [], []
    for _ in range(3):
        x0, y0 = int(rng.integers(width)), int(rng.integers(height))
        box = Box(x0, y0, int(rng.integers(x0, width)) + 1, int(rng.integers(y0, height)) + 1)
        mask = np.zeros((height, width), bool)
        mask[box.y0 : box.y1, box.x0 : box.x1] = rng.random((box.height, box.width)) < rng.random()
        masks.append(mask)
        packed.append(pack(mask[box.y0 : box.y1, box.x0 : box.x1], box.x0, box.y0))
        assert packed[-1].bits.nbytes <= box.height * (box.width // 8 + 2)
        np.testing.assert_array_equal(union([packed[-1]], mask.shape), mask)
    for mask, bits in zip(masks, packed, strict=True):
        assert bits.area == mask.sum()
        for other, other_bits in zip(masks, packed, strict=True):
            assert overlap(bits, other_bits) == (mask & other).sum()
        assert overlap(bits, pack(masks[0])) == (mask & masks[0]).sum()
    np.testing.assert_array_equal(union(packed, (height, width)), np.logical_or.reduce(masks))


def test_nothing() -> None:
    nothing = pack(np.zeros((0, 0), bool))
    assert nothing.area == overlap(nothing, pack(np.ones((4, 9), bool))) == 0
    assert union([nothing], (4, 9)).shape == (4, 9)
    assert not union([], (4, 9)).any()
