"""What of an image is foreground."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zsad.engine.methods.bitmasks import pack
from zsad.engine.methods.foreground import ForegroundSettings, combined, is_too_small

SETTINGS = ForegroundSettings()


def test_golden_foregrounds(scene: dict[str, NDArray[Any]]) -> None:
    foreground = combined(scene["f_dis"], [pack(mask) for mask in scene["masks"]], SETTINGS)
    assert foreground.rule == scene["rule"]
    np.testing.assert_array_equal(foreground.kept, scene["kept"])
    np.testing.assert_array_equal(foreground.pixels, scene["foreground"])


def square(size: int, side: int) -> NDArray[np.bool_]:
    mask = np.zeros((size, size), bool)
    mask[:side, :side] = True
    return mask


@pytest.mark.parametrize(("pixels", "expected"), [(9, True), (10, False), (0, True)])
def test_a_thousandth_of_the_image_is_enough(pixels: int, expected: bool) -> None:
    foreground = np.zeros((100, 100), bool)
    foreground.flat[:pixels] = True
    assert is_too_small(foreground, 0.001) is expected


def test_what_is_covered_just_enough_is_kept() -> None:
    foreground = square(50, 20)  # 400 pixels
    covered = np.zeros((50, 50), bool)
    covered[:20, 10:20] = True
    enough, too_little = covered.copy(), covered.copy()
    enough[30, :50] = True  # 200 of 250
    too_little[30:32, :50] = True
    masks = [pack(mask) for mask in (too_little, enough, np.zeros_like(covered))]
    assert combined(foreground, masks, SETTINGS).kept.tolist() == [False, True, False]
    everything = combined(foreground, masks, SETTINGS.model_copy(update={"coverage": 0.0}))
    assert everything.kept.tolist() == [True, True, False]


def test_without_masks_the_foreground_is_taken_as_it_is() -> None:
    foreground = square(50, 20)
    assert combined(foreground, [], SETTINGS).rule == "dichotomous"
    assert combined(np.zeros((1, 1), bool), [], SETTINGS).pixels.all()
    assert combined(np.ones((1, 1), bool), [pack(np.ones((1, 1), bool))], SETTINGS).rule == "sam"
