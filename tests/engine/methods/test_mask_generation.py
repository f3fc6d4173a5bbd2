"""Mask generation against what segment_anything made of the same pictures, and its parts by themselves."""

import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from zsad.engine.config import ConfigError, MaskSettings, check
from zsad.engine.images.decode import bilinear
from zsad.engine.methods.arrays import HostArrays
from zsad.engine.methods.bitmasks import Box, union
from zsad.engine.methods.mask_generation import (
    Enlargement,
    GeneratedMasks,
    MaskGenerator,
    not_overlapping,
    padded_input,
    point_grid,
    resized_size,
)
from zsad.engine.networks.network import TensorSpec
from zsad.engine.networks.onnx_runtime import OnnxRuntimeGraph
from zsad.export.onnx_export import export_onnx
from zsad.export.options import SamImageOptions, SamMasksOptions

Arrays = Mapping[str, np.ndarray]
FLOATS = np.dtype(np.float32)


class Encoder:
    """Stands for the image encoder; keeps what it is asked."""

    largest_batch = 4

    def __init__(self, size: int, embedding: np.ndarray) -> None:
        self.inputs, self.outputs = {"images": TensorSpec((3, size, size), FLOATS)}, {}
        self.embedding, self.images = embedding, np.empty(0)

    def run(self, inputs: Arrays) -> Arrays:
        self.images = inputs["images"]
        return {"embedding": self.embedding[None]}


class Decoder:
    """Stands for the mask decoder and gives the answers of all points that are asked for, in their order."""

    def __init__(self, logits: np.ndarray, iou: np.ndarray, largest_batch: int) -> None:
        self.inputs = {"embedding": TensorSpec((1, 1), FLOATS, False), "points": TensorSpec((2,), FLOATS)}
        self.outputs = {"logits": TensorSpec(logits.shape[1:], FLOATS)}
        self.logits, self.iou, self.largest_batch = logits, iou, largest_batch
        self.points: list[np.ndarray] = []

    def run(self, inputs: Arrays) -> Arrays:
        start = sum(map(len, self.points))
        self.points.append(inputs["points"])
        part = slice(start, start + len(inputs["points"]))
        return {"logits": self.logits[part], "iou": self.iou[part]}


@pytest.fixture(scope="module")
def arrays(golden: Path) -> Arrays:
    return dict(np.load(golden / "segmentation" / "sam_tiny.npz"))


def settings_of(arrays: Arrays, image: int) -> MaskSettings:
    iou, stability, offset, overlap = arrays[f"image{image}_amg_thresholds"].tolist()
    return MaskSettings(
        points_per_side=8, min_predicted_iou=iou, min_stability=stability, stability_offset=offset, max_box_iou=overlap
    )


def differing(found: GeneratedMasks, arrays: Arrays, image: int) -> int:
    """Check everything but the last bits of masks; return how many pixels differ."""

    def expected(name: str) -> np.ndarray:
        return arrays[f"image{image}_amg_{name}"]

    height, width, _ = arrays[f"image{image}_rgb"].shape
    np.testing.assert_array_equal(found.points, expected("points"))
    np.testing.assert_allclose(found.predicted_iou, expected("predicted_iou"), atol=1e-5)
    boxes = [(box.x0, box.y0, box.width - 1, box.height - 1) for box in found.boxes]
    np.testing.assert_array_equal(boxes, expected("boxes_xywh"))
    masks = np.unpackbits(expected("masks_packed"), axis=1, count=height * width).reshape(-1, height, width)
    pixels = sum(
        np.count_nonzero(union([mask], (height, width)) != whole)
        for mask, whole in zip(found.masks, masks, strict=True)
    )
    if not pixels:
        np.testing.assert_array_equal([mask.area for mask in found.masks], expected("areas"))
        np.testing.assert_allclose(found.stability, expected("stability"), atol=1e-6)
    return int(pixels)


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("batch", [64, 7])
def test_the_same_masks_come_from_the_same_logits(arrays: Arrays, image: int, batch: int) -> None:
    encoder = Encoder(192, arrays[f"image{image}_embedding"])
    decoder = Decoder(arrays[f"image{image}_low_res_logits"], arrays[f"image{image}_iou_predictions"], batch)
    generator = MaskGenerator(encoder, decoder, HostArrays([], None), settings_of(arrays, image))
    found = generator.generate(arrays[f"image{image}_rgb"])
    assert differing(found, arrays, image) == 0
    np.testing.assert_allclose(encoder.images[0], arrays[f"image{image}_network_input"], atol=1e-6)
    np.testing.assert_allclose(np.concatenate(decoder.points), arrays[f"image{image}_points_scaled"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("image", [0, 1])
def test_the_same_masks_come_from_the_whole_network(
    empty_cache: Path, golden: Path, arrays: Arrays, image: int
) -> None:
    checkpoint = str(golden / "segmentation" / "sam_tiny.safetensors")
    encoder, decoder = (
        OnnxRuntimeGraph(export_onnx(checkpoint, options).path, None, 24)
        for options in (SamImageOptions(192), SamMasksOptions(192, heads=4))
    )
    generator = MaskGenerator(encoder, decoder, HostArrays([], None), settings_of(arrays, image))
    assert differing(generator.generate(arrays[f"image{image}_rgb"]), arrays, image) < 50  # of |logit| < 1e-3


@pytest.mark.parametrize(("size", "side"), [((37, 90), 16), ((200, 64), 16), ((5, 700), 32), ((96, 96), 24)])
def test_enlarging_a_part_is_enlarging_all_of_it(size: tuple[int, int], side: int) -> None:
    resized = resized_size(size, 4 * side)
    enlargement = Enlargement(side, 4 * side, resized, size)
    rng = np.random.default_rng(0)
    for spot in ((2, 5, 1, 4), (0, side, 0, side), (side - 2, side, 0, 3), (4, 5, 0, 1)):
        top, bottom, left, right = spot
        logits = np.full((side, side), -9, np.float32)
        logits[top:bottom, left:right] = rng.normal(size=(bottom - top, right - left))
        padded = bilinear(logits, (4 * side, 4 * side))
        expected = bilinear(padded[: resized[0], : resized[1]], size)
        part = enlargement.part(logits, -5)
        found = np.full(size, -9, np.float32)
        for row, strip in enlargement.strips(part, part.box):
            found[row : row + len(strip), part.box.x0 : part.box.x1] = strip
        near = np.abs(expected + 5) > 1e-4
        np.testing.assert_array_equal((found > -5)[near], (expected > -5)[near])
        inside = np.zeros(size, bool)
        inside[part.box.y0 : part.box.y1, part.box.x0 : part.box.x1] = True
        np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5)
        assert part.box.x0 % 8 == 0
        assert part.logits.size <= (bottom - top + 4) * (right - left + 12)


def generated(logits: np.ndarray, iou: np.ndarray, size: tuple[int, int], **settings: object) -> GeneratedMasks:
    """Return the masks of an image of some size whose only point gives these logits [3, s, s] and IoUs."""
    encoder = Encoder(4 * logits.shape[-1], np.zeros((1, 1), np.float32))
    decoder = Decoder(logits[None].astype(np.float32), iou[None].astype(np.float32), 1)
    own = MaskSettings.model_validate({"points_per_side": 1, **settings})
    return MaskGenerator(encoder, decoder, HostArrays([], None), own).generate(np.zeros((*size, 3), np.uint8))


def test_both_filters_and_what_turns_them_off() -> None:
    logits = np.full((3, 16, 16), -9.0)
    logits[0, :8, :8] = 9  # steep
    logits[1, 8:, 8:] = 0.5  # a mask, but nothing above 1
    wide = {"min_predicted_iou": 0.0, "min_stability": 0.0}
    iou = np.array([0.9, 0.95, 0.89])
    assert [mask.area > 0 for mask in generated(logits, iou, (64, 64)).masks] == [True]
    both = generated(logits, iou, (64, 64), min_stability=0.0)
    np.testing.assert_allclose(both.predicted_iou, [0.95, 0.9, 0.89])
    assert both.stability[0] == 0
    assert np.isnan(both.stability[2])  # nothing near to a mask, and no filter
    assert (both.boxes[2], both.masks[2].area) == (Box(0, 0, 0, 0), 0)
    np.testing.assert_array_equal(union([both.masks[2]], (64, 64)), np.zeros((64, 64), bool))
    assert len(generated(logits, np.array([0.88, -1, 2]), (64, 64), min_stability=0.0).masks) == 1  # strictly above
    assert len(generated(logits, np.array([-1, -2, -3]), (64, 64), **wide).masks) == 3
    assert generated(logits, np.array([0, 0, 0]), (64, 64)).masks == []


def test_an_exact_stability_is_kept_and_the_threshold_counts() -> None:
    logits = np.full((3, 16, 16), -9.0)
    logits[:] = np.repeat([5.0, 1.5, -9.0, -9.0], 4)  # columns
    size, iou = (64, 64), np.array([1.0, 0, 0])
    [found] = [generated(logits, iou, size, min_stability=0.0).stability]
    assert found.shape == (1,)
    exact = float(found[0])
    assert len(generated(logits, iou, size, min_stability=exact).masks) == 1
    assert len(generated(logits, iou, size, min_stability=exact + 1e-6).masks) == 0
    narrow, broad = (
        generated(logits, iou, size, min_stability=0.0, mask_threshold=threshold).masks[0].area
        for threshold in (3.0, 0.0)
    )
    assert 0 < narrow < broad


def test_better_boxes_suppress_those_that_overlap_them() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 40, (200, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 30, (200, 2))], axis=1)
    scores = rng.integers(0, 20, 200).astype(np.float32)  # many are equal
    kept: list[int] = []
    for index in sorted(range(200), key=lambda index: -scores[index]):  # stable
        x0, y0, x1, y1 = boxes[index].tolist()
        for other in kept:
            u0, v0, u1, v1 = boxes[other].tolist()
            common = max(0, min(x1, u1) - max(x0, u0)) * max(0, min(y1, v1) - max(y0, v0))
            total = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - common
            if total and common / total > 0.5:
                break
        else:
            kept.append(index)
    assert 100 < len(kept) < 180
    np.testing.assert_array_equal(not_overlapping(boxes, scores, 0.5), kept)
    lines = np.array([[0, 0, 0, 5], [0, 0, 0, 5]])
    assert len(not_overlapping(lines, np.ones(2, np.float32), 0.0)) == 2  # 0 / 0
    assert not_overlapping(np.empty((0, 4), np.int64), np.empty(0, np.float32), 0.7).shape == (0,)


def test_sizes_are_rounded_to_the_nearest_and_points_are_middles() -> None:
    assert resized_size((1000, 1500), 1024) == (683, 1024)  # 682.67
    assert resized_size((3, 1025), 1024) == (3, 1024)
    points = point_grid(2, (10, 40))
    np.testing.assert_array_equal(points, [[10, 2.5], [30, 2.5], [10, 7.5], [30, 7.5]])
    image = np.full((2, 4, 3), (124, 116, 104), np.uint8)
    padded = padded_input(image, (4, 8), 8)
    np.testing.assert_allclose(padded[:, 0, 0], [0.325 / 58.395, -0.28 / 57.12, 0.47 / 57.375], atol=1e-5)
    np.testing.assert_array_equal(padded[:, 4:], 0)


@pytest.mark.slow
def test_many_candidates_of_a_large_image_take_little_memory() -> None:
    size, points = (3000, 4000), 3
    logits = np.full((points**2, 3, 64, 64), 9, np.float32)  # every mask is the whole image
    logits[:, 0] = -9
    iou = np.linspace(0.9, 1, points**2 * 3).reshape(-1, 3)
    encoder = Encoder(256, np.zeros((1, 1), np.float32))
    generator = MaskGenerator(
        encoder,
        Decoder(logits, iou.astype(np.float32), 64),
        HostArrays([], None),
        MaskSettings(points_per_side=points, max_box_iou=1.0),
    )
    image = np.zeros((*size, 3), np.uint8)
    tracemalloc.start()
    try:
        found = generator.generate(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.masks) == 2 * points**2
    bits = sum(mask.bits.nbytes for mask in found.masks)
    assert bits == 2 * points**2 * size[0] * size[1] // 8
    assert peak < bits + 50e6  # beside a copy of the image, of 36 MB; a mask of bytes would have 12 MB


@pytest.mark.parametrize(
    "wrong", [{"points_per_side": 0}, {"max_box_iou": 1.5}, {"stability_offset": -1.0}, {"crops": 1}]
)
def test_settings_that_there_are_not_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        check(MaskSettings, wrong, "[masks]")
