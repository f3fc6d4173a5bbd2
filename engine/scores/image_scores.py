"""From patch scores to one score per image, and RsCIN."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .maps import upsample

ScoreRule = Literal["map_maximum", "top_two", "top_fraction"]

TOP_FRACTION = 0.01
FEW_IMAGES = 10  # below, images say little about what is usual


def image_scores(
    patch_scores: ArrayLike, grid: tuple[int, int], rule: ScoreRule, image_size: int
) -> NDArray[np.float64]:
    """Reduce patch scores [N, P] to image scores [N].

    `map_maximum`: maximum of the map upsampled to image_size (MuSc). `top_two`: (3 · largest + second) / 4 of the patch
    scores (challenge system). `top_fraction`: mean of the highest 1 % of the patch scores.
    """
    scores = np.asarray(patch_scores, np.float64)  # [N, P]
    if rule == "map_maximum":
        size = (image_size, image_size)
        return np.array([upsample(image.reshape(grid), size).max() for image in scores])
    if rule == "top_two":
        top = np.sort(scores, axis=1)[:, -2:]  # [N, 2], or [N, 1] for a single patch
        return (3 * top[:, -1] + top[:, 0]) / 4
    return top_mean(scores)


def top_mean(patch_scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average the highest 1 % of the patch scores [N, P], at least one, of each image; returns [N]."""
    count = max(1, round(TOP_FRACTION * patch_scores.shape[1]))
    return np.partition(patch_scores, -count, axis=1)[:, -count:].mean(axis=1)  # type: ignore[no-any-return]


def min_max(values: ArrayLike, ends: tuple[float, float] | None = None) -> NDArray[np.float64]:
    """Stretch values to [0, 1]; equal values all become 0. ends: what becomes 0 and 1; without, lowest and highest."""
    v = np.asarray(values, np.float64)
    low, high = (v.min(), v.max()) if ends is None else ends
    stretched = np.zeros_like(v) if high <= low else (v - low) / (high - low)
    return stretched if ends is None else np.clip(stretched, 0, 1)


def rscin(scores: ArrayLike, embeddings: ArrayLike, ks: Sequence[int]) -> NDArray[np.float64]:
    """Re-score images by their most similar ones (RsCIN; MuSc, section 3.3).

    scores: [N]; embeddings: [N, D] image embeddings. Scores are stretched to [0, 1]; for each k every score becomes the
    mean of the k most similar images' scores (the image itself among them), weighted by similarity; the results of all
    ks are averaged. k above N means all. Returns [N] in [0, 1]. Raises ValueError for shapes or ks that make no sense.
    """
    stretched = min_max(scores)
    e = np.asarray(embeddings, np.float64)
    if stretched.ndim != 1 or e.ndim != 2 or len(e) != len(stretched):
        raise ValueError(f"scores must be [N] and embeddings [N, D], got {stretched.shape} and {e.shape}")
    if not ks or any(k < 1 for k in ks):
        raise ValueError(f"ks must be positive neighbour counts, not {tuple(ks)}")
    return np.array([_averaged(stretched, e @ vector, image, ks) for image, vector in enumerate(e)]).clip(0.0, 1.0)


def rscin_beside(
    others: ArrayLike, vectors: ArrayLike, scores: ArrayLike, embeddings: ArrayLike, ks: Sequence[int]
) -> NDArray[np.float64]:
    """Re-score other images, each as if it were one more of those that `rscin` re-scores.

    others: [M] scores of the others; vectors: [M, D] their embeddings; the rest as of `rscin`. Scores are stretched as
    those of its images are. Returns [M] in [0, 1].
    """
    s, e, v, own = (np.asarray(values, np.float64) for values in (scores, embeddings, vectors, others))
    stretched, beside = min_max(s), (own - s.min()) / (np.ptp(s) or 1.0)  # these not only within [0, 1]
    rescored = [
        _averaged(np.append(stretched, score), np.append(e @ vector, vector @ vector), len(s), ks)
        for score, vector in zip(beside, v, strict=True)
    ]
    return np.array(rescored).clip(0.0, 1.0)


def _averaged(scores: NDArray[np.float64], similarity: NDArray[np.float64], image: int, ks: Sequence[int]) -> float:
    """Return the mean over all ks of the weighted mean score of the images most similar to one."""
    others = np.arange(len(scores)) != image  # among equally similar images, itself first
    order = np.lexsort((others, -similarity))[: max(ks)]
    rescored = 0.0
    for k in ks:
        kept = order[:k]
        weight = similarity[kept].sum()
        # Opposed embeddings can cancel; such a row says nothing, and the score stays.
        value = similarity[kept] @ scores[kept] / weight if weight > 1e-12 else scores[image]
        rescored += float(value) / len(ks)
    return rescored
