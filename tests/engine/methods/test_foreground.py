"""What of an image is foreground."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zsad.engine.config import ForegroundSettings
from zsad.engine.images.decode import bilinear
from zsad.engine.methods.bitmasks import pack
from zsad.engine.methods.foreground import combined, dichotomous, is_too_small

SETTINGS = ForegroundSettings()


def test_golden_foregrounds(scene: dict[str, NDArray[Any]]) -> None:
    masks = [pack(mask) for mask in scene["masks"]]
    foreground = combined(scene["f_dis"], masks, SETTINGS)
    assert foreground.rule == scene["rule"]
    assert [mask in foreground.parts for mask in masks] == scene["kept"].tolist()
    np.testing.assert_array_equal(foreground.pixels, scene["foreground"])


def test_the_golden_foreground_of_a_network(golden_segmentation: Path) -> None:
    arrays = np.load(golden_segmentation / "isnet_tiny.npz")
    enlarged = bilinear(arrays["side1"], (90, 140))
    np.testing.assert_allclose(enlarged, arrays["upsampled"], rtol=0, atol=2e-7)
    normalised = (enlarged - enlarged.min()) / (enlarged.max() - enlarged.min())
    np.testing.assert_allclose(normalised, arrays["normalised"], rtol=0, atol=3e-7)
    np.testing.assert_array_equal(dichotomous(arrays["side1"], (90, 140), 0.8), arrays["mask"])
    assert arrays["mask"].any()


@pytest.mark.parametrize("kind", ["strong", "weak", "constant"])
def test_golden_foregrounds_with_and_without_the_rule_of_the_peak(golden_segmentation: Path, kind: str) -> None:
    arrays = np.load(golden_segmentation / "vvv_host.npz")
    values, name = arrays[f"dichotomous_{kind}_value"], f"dichotomous_{kind}_mask"
    np.testing.assert_array_equal(dichotomous(values, values.shape, 0.8), arrays[name])
    np.testing.assert_array_equal(dichotomous(values, values.shape, 0), arrays[f"{name}_without_peak_rule"])


def test_the_peak_is_that_of_the_enlarged_values_and_may_be_the_limit() -> None:
    values = np.array([[0.0, 1.0], [0.0, 0.0]], np.float32)
    assert dichotomous(values, (1, 1), 0.25).sum() == 0  # one value is constant
    assert dichotomous(values, (1, 2), 0.5).tolist() == [[False, True]]  # its highest is one half
    assert dichotomous(values, (1, 2), 0.51).sum() == 0
    assert dichotomous(np.full((2, 2), np.nan, np.float32), (4, 4), 0).sum() == 0


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
    assert combined(foreground, masks, SETTINGS).parts == [masks[1]]
    everything = combined(foreground, masks, SETTINGS.model_copy(update={"coverage": 0.0}))
    assert everything.parts == masks[:2]


def test_without_masks_the_foreground_is_taken_as_it_is() -> None:
    foreground = square(50, 20)
    assert combined(foreground, [], SETTINGS).rule == "dichotomous"
    assert combined(np.zeros((1, 1), bool), [], SETTINGS).pixels.all()
    assert combined(np.ones((1, 1), bool), [pack(np.ones((1, 1), bool))], SETTINGS).rule == "sam"
