"""Detection and localisation metrics from exact curves: AUROC, AP, F1-max and AUPRO.

A curve over all thresholds changes its true positives only at the scores of positives, and there it needs nothing but
the number of negatives above. So the few positives are sorted, the many negatives are counted into narrow bins, and
only those that share a bin with a positive are sorted and searched. Every metric follows in closed form from the
counts, ties included, and no curve is ever stored. Where the scores come from, from memory or from disk (`spilled.py`),
is the sample's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.floating[Any]]
Images = NDArray[Any] | Sequence[ArrayLike]

# Both measured: larger pieces leave a core idle at the end, smaller ones repeat the search of the positives; more bins
# than these leave the cache, fewer leave more negatives to sort.
_PIECE_PIXELS = 4_000_000
_MAX_BINS = 2**20

CLASSIFICATION = ("auroc", "ap", "f1")


# What positives weigh, by name: those of the regions given with an image, where there are some, and those of the
# regions that hang together in its mask. Only where the two differ is there the second.
GIVEN, CONNECTED = "given", "connected"

# Areas under overlaps up to a stricter limit: MVTec AD 2's, of regions that hang together, and MVTec LOCO's, of the
# regions given, which saturate.
SATURATED = "auspro_0.05"
STRICT = {"aupro_0.05": (CONNECTED, 0.05), SATURATED: (GIVEN, 0.05)}


@dataclass(frozen=True)
class Piece:
    """Positives that follow one another in the order of scores, ascending: each by itself, or equal ones together."""

    counts: NDArray[Any]  # [T] positives
    weights: Mapping[str, NDArray[np.float64]]  # [T], summing to 1 over all pieces
    found: NDArray[Any]  # [T] positives of the whole sample whose scores are as high or higher
    before: NDArray[np.float64]  # [T] false-positive rate of the scores above
    at: NDArray[np.float64]  # [T] the same with equal ones


class Sample(Protocol):
    """Scores of two classes; pixels or images."""

    @property
    def positive_count(self) -> int: ...
    @property
    def negative_count(self) -> int: ...
    @property
    def extremes(self) -> tuple[np.floating[Any], np.floating[Any]]:
        """The lowest and the highest score, in the precision of all."""

    def pieces(self) -> Iterator[Piece]:
        """All positives, piece by piece."""

    def above(self, thresholds: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Number of negatives and given weight of the positives above ascending thresholds: [T], [T]."""


@dataclass(frozen=True)
class Split:
    """Scores of two classes: positives [M], and negatives in pieces, in no order.

    `weights` [M] belong to the positives: all alike for a plain recall, or 1 / area of the region for the per-region
    overlap, whose saturated regions give all of it to their highest scores. Each region sums to 1.
    """

    positives: FloatArray
    weights: Mapping[str, NDArray[np.float64]]
    negatives: list[FloatArray]


@dataclass(frozen=True)
class _Held(Split):
    """A sample in memory, positives ascending, whose weights sum to 1."""

    @property
    def positive_count(self) -> int:
        return self.positives.size

    @property
    def negative_count(self) -> int:
        return sum(piece.size for piece in self.negatives)

    @property
    def extremes(self) -> tuple[np.floating[Any], np.floating[Any]]:
        scores = [array for array in (self.positives, *self.negatives) if array.size]
        return min(array.min() for array in scores), max(array.max() for array in scores)

    def pieces(self) -> Iterator[Piece]:
        positives, count = self.positives, self.negative_count
        above, at_least = _count_beyond(self.negatives, positives)
        found = positives.size - np.searchsorted(positives, positives)
        yield Piece(np.ones(positives.size), self.weights, found, above / count, at_least / count)

    def above(self, thresholds: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        covered = np.append(np.cumsum(self.weights[GIVEN][::-1])[::-1], 0)  # [M + 1] weight from each rank on
        weight = covered[np.searchsorted(self.positives, thresholds, side="right")]
        return _count_beyond(self.negatives, thresholds)[0], weight


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
        totals: list[NDArray[np.int64]] = []
        for parts in pool.map(count, pieces):  # added at once: there are as many thresholds as positives
            totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else list(parts)
    per_bin, above, at_least = totals
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
    found = measure(_Held(positives, {}, [score[~anomalous]]), {})
    return {key: found[key] for key in CLASSIFICATION}


def pixel_metrics(
    masks: Images,
    maps: Images,
    aupro_limit: float = 0.3,
    aupro_steps: int | None = None,
    regions: Sequence[Sequence[Region] | None] | None = None,
    strict: bool = False,
) -> dict[str, float]:
    """Localisation metrics of anomaly maps, over all pixels of all images together.

    masks and maps: [N, H, W], or N arrays [H, W] whose sizes may differ between images; masks 0 or 1, maps higher where
    more anomalous, any unit. regions: those of each image, within its mask; None: what hangs together in the mask. With
    saturation areas AUPRO becomes the area under MVTec LOCO's saturated per-region overlap. Returns "auroc", "ap", "f1"
    (the maximum over thresholds) and "aupro" in [0, 1], as `image_metrics` and `aupro` define them; all are NaN where
    only one class is present. `strict` adds those in STRICT. Raises ValueError as `aupro`.
    """
    return curve_metrics(_pool_pixels(masks, maps, regions, strict), aupro_limit, aupro_steps, strict)


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
    return curve_metrics(_pool_pixels(masks, maps), limit, steps)["aupro"]


def curve_metrics(
    sample: Sample, aupro_limit: float, aupro_steps: int | None, strict: bool = False
) -> dict[str, float]:
    """Metrics of a sample of pixels; see `pixel_metrics`."""
    if not 0 < aupro_limit <= 1:
        said = f"the limit of the false-positive rate is {aupro_limit}: it must lie in (0, 1], usually 0.3 or 0.05"
        raise ValueError(said)
    overlaps = {"aupro": (GIVEN, aupro_limit)} if aupro_steps is None else {}
    found = measure(sample, overlaps | (STRICT if strict else {}))
    return found if aupro_steps is None else {**found, "aupro": _stepped_overlap(sample, aupro_limit, aupro_steps)}


def measure(sample: Sample, overlaps: Mapping[str, tuple[str, float]]) -> dict[str, float]:
    """AUROC, AP, F1-max, and areas under overlaps: by name which weights, and up to which false-positive rate."""
    total, negatives = sample.positive_count, sample.negative_count
    names = (*CLASSIFICATION, *overlaps)
    if not total or not negatives:
        return dict.fromkeys(names, float("nan"))
    found = dict.fromkeys(names, 0.0)
    for piece in sample.pieces():
        detected = piece.found + piece.at * negatives  # [T]
        # Each positive carries its share of the recall, at the precision of the threshold that reaches it.
        found["auroc"] += _area(piece, piece.counts / total, 1.0)
        found["ap"] += float(np.sum(piece.counts * (piece.found / detected)) / total)
        found["f1"] = max(found["f1"], float(np.max(2 * piece.found / (detected + total))))
        for name, (kind, limit) in overlaps.items():
            found[name] += _area(piece, piece.weights.get(kind, piece.weights[GIVEN]), limit) / limit
    return found


def _area(piece: Piece, weights: NDArray[np.float64], limit: float) -> float:
    """What positives add to the area up to `limit` under their weighted recall against the false-positive rate."""
    before, at = piece.before, piece.at
    # A positive counts fully at rates above `at`; across a tie with negatives its share rises along a line.
    ramp = np.clip(limit, before, at) - before
    share = np.divide(ramp, at - before, out=np.zeros_like(ramp), where=at > before)
    return float(weights @ (ramp * share / 2 + np.maximum(limit - at, 0)))


def _stepped_overlap(sample: Sample, limit: float, steps: int) -> float:
    if not sample.positive_count or not sample.negative_count:
        return float("nan")
    lowest, highest = sample.extremes
    # In the maps' own type, also with NumPy 1, as in the published code: it moves AUPRO's fifth digit.
    step = (highest - lowest) / lowest.dtype.type(steps)
    if step == 0:
        return float("nan")
    thresholds = np.arange(lowest, highest, step)  # [T]
    above, overlap = sample.above(thresholds)
    rate = above / sample.negative_count  # [T]
    rate, overlap = rate[rate < limit][::-1], overlap[rate < limit][::-1]
    if rate.size == 0 or rate[-1] == rate[0]:
        return float("nan")
    area = np.sum(np.diff(rate) * (overlap[1:] + overlap[:-1])) / 2
    return float(area / (rate[-1] - rate[0]))


def _pool_pixels(
    masks: Images,
    maps: Images,
    regions: Sequence[Sequence[Region] | None] | None = None,
    connected: bool = False,
) -> _Held:
    """All pixels of all images as one sample, the positives weighted by region."""
    if len(masks) != len(maps):
        raise ValueError(f"{len(masks)} masks and {len(maps)} maps: every map needs one mask")
    arrays = [np.asarray(map_) for map_ in maps]
    dtype = np.result_type(np.float32, *arrays)  # one precision for all, float32 unless a map needs more
    given = [None] * len(masks) if regions is None else regions
    connected = connected and any(of_image is not None for of_image in given)

    def split(batch: range) -> Split:
        return _joined([split_pixels(masks[i], arrays[i], given[i], connected, str(i)) for i in batch], dtype)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(split, _batches([a.size for a in arrays])))
    negatives = [piece for part in parts for piece in part.negatives]
    pooled = _joined([replace(part, negatives=[]) for part in parts], dtype)
    order = np.argsort(pooled.positives)
    weights = {kind: values[order] / (values.sum() or 1) for kind, values in pooled.weights.items()}
    return _Held(pooled.positives[order], weights, negatives)


def _batches(sizes: Sequence[int]) -> Iterator[range]:
    """Ranges of consecutive images with about `_PIECE_PIXELS` pixels each."""
    start = pixels = 0
    for index, size in enumerate(sizes):
        pixels += size
        if pixels >= _PIECE_PIXELS or index == len(sizes) - 1:
            yield range(start, index + 1)
            start, pixels = index + 1, 0


def _joined(parts: Sequence[Split], dtype: np.dtype[Any]) -> Split:
    """Several samples as one, in one precision; negatives in one piece, if there are any."""
    kinds = parts[0].weights if parts else {GIVEN: None}
    negatives = [piece for part in parts for piece in part.negatives]
    return Split(
        np.concatenate([np.empty(0, dtype), *(part.positives for part in parts)], dtype=dtype),
        {kind: np.concatenate([np.empty(0), *(part.weights[kind] for part in parts)]) for kind in kinds},
        [np.concatenate(negatives, dtype=dtype)] if negatives else [],
    )


def split_pixels(
    mask: ArrayLike,
    map_: NDArray[Any],
    regions: Sequence[Region] | None,
    connected: bool,
    name: str,
    in_place: bool = False,
) -> Split:
    """The pixels of one image: positives and negatives, which may be a view of the map.

    mask, map_: [H, W]. connected: weights of the regions that hang together too. in_place: the map, which has to be
    writable and contiguous, becomes its negatives in ascending order, so that there is no second one. Raises ValueError
    as `aupro`.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.shape != map_.shape:
        raise ValueError(f"mask {name} is {mask.shape}, its map {map_.shape}: both must be [H, W] and of one size")
    if not finite(map_):
        raise ValueError(f"map {name} holds NaN or infinity: maps must be finite")
    anomalous = _binary(mask, f"mask {name}")
    kinds = (GIVEN, CONNECTED) if connected else (GIVEN,)
    if not anomalous.any():
        negatives = map_.reshape(-1)
        if in_place:
            negatives.sort()
        return Split(np.empty(0, map_.dtype), dict.fromkeys(kinds, np.empty(0)), [negatives])
    weights = {
        kind: _connected_weights(anomalous)
        if regions is None or kind == CONNECTED
        else _saturated_weights(regions, map_, anomalous)
        for kind in kinds
    }
    positives = map_[anomalous]
    if not in_place:
        return Split(positives, weights, [map_[~anomalous]])
    map_[anomalous] = np.inf  # behind all others
    negatives = map_.reshape(-1)
    negatives.sort()
    return Split(positives, weights, [negatives[: negatives.size - positives.size]])


def finite(values: NDArray[Any]) -> bool:
    """Return whether there is no NaN and no infinity, without a mask of all values."""
    return not values.size or bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def _connected_weights(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 / area of its 8-connected region, for each pixel of a mask [H, W], which has one."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    part = np.ascontiguousarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    # Labels take four times what a mask does, or twice, where they are few: no more than runs of pixels in rows.
    runs = np.count_nonzero(part[:, 0]) + np.count_nonzero(part[:, 1:] > part[:, :-1])
    kind = cv2.CV_16U if runs < 2**15 else cv2.CV_32S
    _, region, stats, _ = cv2.connectedComponentsWithStats(part.view(np.uint8), connectivity=8, ltype=kind)
    weights: NDArray[np.float64] = 1 / stats[region[part], cv2.CC_STAT_AREA]
    return weights


def _saturated_weights(
    regions: Sequence[Region], map_: NDArray[Any], anomalous: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """What each anomalous pixel [M] adds to the overlaps of its regions, min(found pixels, s) / s.

    Whatever the threshold, the pixels found first are those of the highest scores: the s highest weigh 1 / s.
    """
    pixels = np.flatnonzero(anomalous)
    weights = np.zeros(pixels.size)
    for region in regions:
        scores = map_[region.mask]  # [A]
        rank = np.empty(scores.size)
        rank[np.argsort(-scores, kind="stable")] = np.arange(scores.size)
        share, inside = np.clip(region.saturation_area - rank, 0, 1) / region.saturation_area, anomalous[region.mask]
        weights[np.searchsorted(pixels, np.flatnonzero(region.mask)[inside])] += share[inside]
    return weights


def _binary(labels: NDArray[Any], name: str) -> NDArray[np.bool_]:
    if labels.dtype == np.bool_:
        return labels
    positive: NDArray[np.bool_] = labels == 1
    if np.count_nonzero(labels) != np.count_nonzero(positive):
        raise ValueError(f"{name}: only 0 (normal) and 1 (anomalous) are allowed; pass `mask > 0` for a 0/255 mask")
    return positive
