"""Detection and localisation metrics from exact curves: AUROC, AP, F1-max and AUPRO.

A curve over all thresholds changes its true positives only at the scores of positives, and there it needs nothing but
the number of negatives above. So the few positives are sorted, the many negatives are counted into narrow bins, and
only those that share a bin with a positive are sorted and searched. Every metric follows in closed form from the
counts, ties included, and no curve is ever stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.floating[Any]]
Images = NDArray[Any] | Sequence[ArrayLike]

# Both measured: larger pieces leave a core idle at the end, smaller ones repeat the search of the positives; more bins
# than these leave the cache, fewer leave more negatives to sort.
_PIECE_PIXELS = 4_000_000
_MAX_BINS = 2**20


@dataclass(frozen=True)
class _Sample:
    """Scores of two classes: positives [M] ascending, negatives in pieces, in no order.

    `weights` [M] belong to the positives and sum to 1: all alike for a plain recall, or 1 / (regions × area of the
    region) for the mean per-region overlap, whose saturated regions give all of it to their highest scores.
    """

    positives: FloatArray
    weights: NDArray[np.float64]
    negatives: list[FloatArray]

    @property
    def negative_count(self) -> int:
        return sum(piece.size for piece in self.negatives)

    @property
    def one_class(self) -> bool:
        return self.positives.size == 0 or self.negative_count == 0

    @cached_property
    def rates(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """False-positive rates just before and at the threshold of each positive: [M], [M], equal but for ties."""
        above, at_least = _count_beyond(self.negatives, self.positives)
        return above / self.negative_count, at_least / self.negative_count


@dataclass(frozen=True)
class Region:
    """An anomalous region of one image, where regions are given instead of taken from the mask."""

    mask: NDArray[np.bool_]  # [H, W]
    saturation_area: float  # pixels from which on it counts as found as a whole; at most its area


def _count_beyond(pieces: Sequence[FloatArray], thresholds: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of values > and ≥ each of the ascending thresholds: [T], [T], exact."""
    bins = min(_MAX_BINS, 16 * thresholds.size)
    limits = np.finfo(thresholds.dtype)
    with np.errstate(over="ignore", divide="ignore"):
        scale = np.clip(thresholds.dtype.type(bins) / (thresholds[-1] - thresholds[0]), limits.tiny, limits.max)

    def bin_of(values: FloatArray) -> NDArray[np.int32]:
        # Each step is monotone even after rounding: a value in a higher bin is larger, equal values share a bin.
        with np.errstate(over="ignore"):
            position = np.subtract(values, thresholds[0], dtype=thresholds.dtype)
            position *= scale
        position += 1
        position.clip(0, bins + 1, out=position)
        bin_: NDArray[np.int32] = position.astype(np.int32)
        return bin_

    threshold_bins = bin_of(thresholds)  # [T]
    contested = np.zeros(bins + 2, np.bool_)
    contested[threshold_bins] = True

    def count(piece: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        bin_ = bin_of(piece)
        near = np.sort(piece[contested[bin_]])
        above = near.size - np.searchsorted(near, thresholds, side="right")
        at_least = near.size - np.searchsorted(near, thresholds, side="left")
        return np.bincount(bin_, minlength=bins + 2), above, at_least

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        per_bin, above, at_least = (sum(parts) for parts in zip(*pool.map(count, pieces), strict=True))
    beyond = np.cumsum(np.where(contested, 0, per_bin)[::-1])[::-1][threshold_bins]  # [T] from uncontested bins
    return beyond + above, beyond + at_least


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """Detection metrics of one score per image.

    labels [N], 0 normal or 1 anomalous; scores [N], higher is more anomalous, any unit.
    Returns "auroc", "ap" and "f1" (the maximum over thresholds) in [0, 1], in scikit-learn's definitions; all are NaN
    where only one class is present. Raises ValueError for shapes that differ, labels other than 0 and 1, and scores
    that are not finite.
    """
    label, score = np.asarray(labels), np.asarray(scores, dtype=np.float64)  # [N], [N]
    if label.ndim != 1 or label.shape != score.shape:
        raise ValueError(f"labels {label.shape} and scores {score.shape} must be one-dimensional and of one length")
    anomalous = _binary(label, "labels")
    if not np.isfinite(score).all():
        raise ValueError(f"score {np.flatnonzero(~np.isfinite(score))[0]} is not finite: scores must be finite numbers")
    positives = np.sort(score[anomalous])
    weights = np.full(positives.size, 1 / max(positives.size, 1))
    return _classification(_Sample(positives, weights, [score[~anomalous]]))


def pixel_metrics(
    masks: Images,
    maps: Images,
    aupro_limit: float = 0.3,
    aupro_steps: int | None = None,
    regions: Sequence[Sequence[Region] | None] | None = None,
) -> dict[str, float]:
    """Localisation metrics of anomaly maps, over all pixels of all images together.

    masks and maps: [N, H, W], or N arrays [H, W] whose sizes may differ between images; masks 0 or 1, maps higher where
    more anomalous, any unit. regions: those of each image, within its mask; None: what hangs together in the mask. With
    saturation areas AUPRO becomes the area under MVTec LOCO's saturated per-region overlap. Returns "auroc", "ap", "f1"
    (the maximum over thresholds) and "aupro" in [0, 1], as `image_metrics` and `aupro` define them; all are NaN where
    only one class is present. Raises ValueError as `aupro`.
    """
    sample = _pool_pixels(masks, maps, regions)
    return {**_classification(sample), "aupro": _region_overlap_area(sample, aupro_limit, aupro_steps)}


def aupro(masks: Images, maps: Images, limit: float = 0.3, steps: int | None = None) -> float:
    """Area under the mean per-region overlap against the false-positive rate, up to `limit`, divided by `limit`.

    masks, maps: as `pixel_metrics`. Regions are the 8-connected components of each mask; the false-positive rate counts
    the pixels outside all masks, over all images. The curve is exact: every distinct score is a threshold, neighbouring
    points are joined by lines and the last one is cut at the limit (Bergmann et al., MVTec AD, IJCV 2021).
    With `steps`, the approximation of published tables: that many equal steps from the lowest to the highest score, in
    the precision of the maps, points with a rate below `limit`, and the rate rescaled to [0, 1] by the range that these
    points cover. NaN without a region, without a normal pixel, or where the points of `steps` cover no range.
    Raises ValueError for shapes that differ, masks other than 0 and 1, maps that are not finite, and a limit outside
    (0, 1].
    """
    return _region_overlap_area(_pool_pixels(masks, maps), limit, steps)


def _classification(sample: _Sample) -> dict[str, float]:
    positives = sample.positives
    if sample.one_class:
        return dict.fromkeys(("auroc", "ap", "f1"), float("nan"))
    true_positives = positives.size - np.searchsorted(positives, positives)  # [M]
    detected = true_positives + sample.rates[1] * sample.negative_count  # [M]
    # Each positive carries one M-th of the recall, at the precision of the threshold that reaches it.
    return {
        "auroc": _area(sample, np.full(positives.size, 1 / positives.size), 1.0),
        "ap": float(np.mean(true_positives / detected)),
        "f1": float(np.max(2 * true_positives / (detected + positives.size))),
    }


def _area(sample: _Sample, weights: NDArray[np.float64], limit: float) -> float:
    """Area up to `limit` under the weighted recall of the positives against the false-positive rate."""
    before, at = sample.rates
    # A positive counts fully at rates above `at`; across a tie with negatives its share rises along a line.
    ramp = np.clip(limit, before, at) - before
    share = np.divide(ramp, at - before, out=np.zeros_like(ramp), where=at > before)
    return float(weights @ (ramp * share / 2 + np.maximum(limit - at, 0)))


def _region_overlap_area(sample: _Sample, limit: float, steps: int | None) -> float:
    if not 0 < limit <= 1:
        raise ValueError(f"the limit of the false-positive rate is {limit}: it must lie in (0, 1], usually 0.3 or 0.05")
    if sample.one_class:
        return float("nan")
    if steps is None:
        return _area(sample, sample.weights, limit) / limit
    scores = [array for array in (sample.positives, *sample.negatives) if array.size]
    lowest, highest = min(array.min() for array in scores), max(array.max() for array in scores)
    # In the maps' own type, also with NumPy 1, as in the published code: it moves AUPRO's fifth digit.
    step = (highest - lowest) / lowest.dtype.type(steps)
    if step == 0:
        return float("nan")
    thresholds = np.arange(lowest, highest, step)  # [T]
    rate = _count_beyond(sample.negatives, thresholds)[0] / sample.negative_count  # [T]
    covered = np.append(np.cumsum(sample.weights[::-1])[::-1], 0)  # [M + 1] weight of the positives from each rank on
    overlap = covered[np.searchsorted(sample.positives, thresholds, side="right")]  # [T]
    rate, overlap = rate[rate < limit][::-1], overlap[rate < limit][::-1]
    if rate.size == 0 or rate[-1] == rate[0]:
        return float("nan")
    area = np.sum(np.diff(rate) * (overlap[1:] + overlap[:-1])) / 2
    return float(area / (rate[-1] - rate[0]))


def _pool_pixels(masks: Images, maps: Images, regions: Sequence[Sequence[Region] | None] | None = None) -> _Sample:
    """All pixels of all images as one sample, the positives weighted by region."""
    if len(masks) != len(maps):
        raise ValueError(f"{len(masks)} masks and {len(maps)} maps: every map needs one mask")
    arrays = [np.asarray(map_) for map_ in maps]
    dtype = np.result_type(np.float32, *arrays)  # one precision for all, float32 unless a map needs more
    given = [None] * len(masks) if regions is None else regions
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(partial(_split_pixels, masks, arrays, given, dtype), _batches([a.size for a in arrays])))
    positives = np.concatenate([part.positives for part in parts] or [np.empty(0, dtype)])  # [M]
    weights = np.concatenate([part.weights for part in parts] or [np.empty(0)])  # [M], each region summing to 1
    order = np.argsort(positives)
    count = weights.sum()
    return _Sample(
        positives[order], weights[order] / (count or 1), [piece for part in parts for piece in part.negatives]
    )


def _batches(sizes: Sequence[int]) -> Iterator[range]:
    """Ranges of consecutive images with about `_PIECE_PIXELS` pixels each."""
    start = pixels = 0
    for index, size in enumerate(sizes):
        pixels += size
        if pixels >= _PIECE_PIXELS or index == len(sizes) - 1:
            yield range(start, index + 1)
            start, pixels = index + 1, 0


def _split_pixels(
    masks: Images,
    maps: Sequence[NDArray[Any]],
    regions: Sequence[Sequence[Region] | None],
    dtype: np.dtype[Any],
    batch: range,
) -> _Sample:
    """The pixels of a batch: positives in no order, their weights 1 / area of their region, and one piece."""
    positives, weights, negatives = [np.empty(0, dtype)], [np.empty(0)], []
    for index in batch:
        mask, map_ = np.asarray(masks[index]), maps[index]  # [H, W], [H, W]
        if mask.ndim != 2 or mask.shape != map_.shape:
            raise ValueError(f"mask {index} is {mask.shape}, its map {map_.shape}: both must be [H, W] and of one size")
        if not np.isfinite(map_).all():
            raise ValueError(f"map {index} holds NaN or infinity: maps must be finite")
        anomalous = _binary(mask, f"mask {index}")
        if not anomalous.any():
            negatives.append(map_.ravel())
            continue
        positives.append(map_[anomalous])
        of_image = regions[index]
        if of_image is None:
            _, region, stats, _ = cv2.connectedComponentsWithStats(anomalous.view(np.uint8), connectivity=8)
            weights.append(1 / stats[region[anomalous], cv2.CC_STAT_AREA])
        else:
            weights.append(_saturated_weights(of_image, map_)[anomalous])
        negatives.append(map_[~anomalous])
    return _Sample(
        np.concatenate(positives, dtype=dtype), np.concatenate(weights), [np.concatenate(negatives, dtype=dtype)]
    )


def _saturated_weights(regions: Sequence[Region], map_: NDArray[Any]) -> NDArray[np.float64]:
    """What each pixel [H, W] adds to the overlaps of its regions, min(found pixels, s) / s.

    Whatever the threshold, the pixels found first are those of the highest scores: the s highest weigh 1 / s.
    """
    weights = np.zeros(map_.shape)
    for region in regions:
        scores = map_[region.mask]  # [A]
        rank = np.empty(scores.size)
        rank[np.argsort(-scores, kind="stable")] = np.arange(scores.size)
        weights[region.mask] += np.clip(region.saturation_area - rank, 0, 1) / region.saturation_area
    return weights


def _binary(labels: NDArray[Any], name: str) -> NDArray[np.bool_]:
    if labels.dtype == np.bool_:
        return labels
    positive: NDArray[np.bool_] = labels == 1
    if np.count_nonzero(labels) != np.count_nonzero(positive):
        raise ValueError(f"{name}: only 0 (normal) and 1 (anomalous) are allowed; pass `mask > 0` for a 0/255 mask")
    return positive
