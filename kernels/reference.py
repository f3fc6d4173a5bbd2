"""What the kernels compute, in plain float64 NumPy: slow, obvious, and the oracle every kernel is compared with.

MuSc (Li et al., ICLR 2024): LNAMD is section 3.1, MSM section 3.2, the interval average section 3.2, eq. 4 and 5.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LAYER_NORM_EPS = 1e-5
ZERO_NORM = 1e-12  # below this length a feature has no direction and stays the zero vector


def spatial_layer_norm(tokens: ArrayLike) -> NDArray[np.float64]:
    """Normalise each image and layer by one mean and one variance over all patches and channels.

    tokens: [..., P, C]. Returns [..., P, C].
    """
    x = np.asarray(tokens, np.float64)
    mean = x.mean(axis=(-2, -1), keepdims=True)
    variance = x.var(axis=(-2, -1), keepdims=True)
    normalised: NDArray[np.float64] = (x - mean) / np.sqrt(variance + LAYER_NORM_EPS)
    return normalised


def box_mean(x: ArrayLike, grid: tuple[int, int], degree: int) -> NDArray[np.float64]:
    """Average every patch with its degree × degree neighbourhood; outside the grid counts as zero.

    x: [..., P, C] with P = grid[0]·grid[1]. Returns [..., P, C].
    """
    flat = np.asarray(x, np.float64)
    rows, columns = grid
    reach = degree // 2
    maps = flat.reshape(*flat.shape[:-2], rows, columns, flat.shape[-1])
    padded = np.pad(maps, [(0, 0)] * (maps.ndim - 3) + [(reach, reach), (reach, reach), (0, 0)])
    total = np.zeros_like(maps)
    for dy in range(degree):
        for dx in range(degree):
            total += padded[..., dy : dy + rows, dx : dx + columns, :]
    return (total / degree**2).reshape(flat.shape)


def lnamd(tokens: ArrayLike, grid: tuple[int, int], degree: int) -> NDArray[np.float64]:
    """Local neighbourhood aggregation: layer norm, box mean of one degree, unit length per patch.

    tokens: [..., P, C]. Returns unit vectors [..., P, C]; a feature of zero length stays zero.
    """
    pooled = box_mean(spatial_layer_norm(tokens), grid, degree)
    pooled /= np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), ZERO_NORM)
    return pooled


def snamd(tokens: ArrayLike, grid: tuple[int, int], degrees: Sequence[int] = (1, 3, 5)) -> NDArray[np.float64]:
    """Average neighbourhoods by similarity (SNAMD of MuSc-V2), then over degrees; unit length per patch.

    tokens: [P, C]. A neighbour weighs exp(−its distance to the patch in the middle). Returns unit vectors [P, C].
    """
    x = np.asarray(tokens, np.float64)
    apart = cells_apart(grid)
    weights = np.exp(-np.linalg.norm(x[:, None] - x, axis=2))  # [P, P]
    near = [np.where(apart <= degree // 2, weights, 0) for degree in degrees]
    pooled: NDArray[np.float64] = np.mean([w @ x / w.sum(axis=1, keepdims=True) for w in near], axis=0)
    units: NDArray[np.float64] = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), ZERO_NORM)
    return units


def checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """Return an interval as it is; raises ValueError where its bounds are none (see `interval_ranks`)."""
    low, high = interval
    if not 0 <= low < high < math.inf:
        raise ValueError(f"interval must satisfy 0 <= low < high, not {tuple(interval)}")
    for bound in interval:
        if bound > 1 and bound != int(bound):
            raise ValueError(f"interval {tuple(interval)}: a bound above 1 is a count of images and must be whole")
    return low, high


def interval_ranks(others: int, interval: tuple[float, float]) -> tuple[int, int]:
    """Turn an interval into ranks [first, last) among the sorted distances to the other images.

    others: N − 1, with K references N − 1 + K. A bound below 1 is a fraction of them, a bound above 1 a count. Of the
    bounds that are 1, an upper one that is a float is the fraction that means all: (0.0, 1.0) averages every distance;
    an integer and a lower one are a count: (0, 1) is the nearest image alone, (1.0, 3.0) the second and the third
    nearest. Counts of more images than there are mean all of them; at least one rank is kept.
    """
    low, high = interval
    first = int(others * low) if low < 1 else int(low)
    is_fraction = high < 1 or (high == 1 and isinstance(high, float | np.floating))
    last = min(max(int(others * high) if is_fraction else int(high), 1), others)
    return min(first, last - 1), last


def cells_apart(grid: tuple[int, int]) -> NDArray[np.int64]:
    """Count how many rows or columns, whichever are more, lie between the patches of a grid; returns [P, P]."""
    place = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), axis=1)  # [P, 2]
    apart: NDArray[np.int64] = np.abs(place[:, None] - place).max(axis=2)
    return apart


def patch_minima_per_degree(
    tokens: ArrayLike, grid: tuple[int, int], degree: int, references: int = 0, window: int | None = None
) -> NDArray[np.float64]:
    """Measure how far every patch of one layer is from the nearest patch of each image (MuSc, section 3.2).

    tokens: [N + K, P, C], of which the last K, `references`, are only compared with. window: a patch is compared only
    with patches at most so many cells apart from its own place; None with all. Returns [N, P, N + K]; infinity where an
    image would be compared with itself.
    """
    z = lnamd(tokens, grid, degree)  # [N + K, P, C]
    outside = np.zeros((z.shape[1],) * 2, bool) if window is None else cells_apart(grid) > window
    images = len(z)
    lengths = np.square(z).sum(axis=-1)  # [N + K, P], 1 except for zero features
    minima = np.full((images - references, z.shape[1], images), np.inf)
    for i in range(images - references):
        for j in range(images):
            if j != i:
                squared = lengths[i][:, None] + lengths[j] - 2 * z[i] @ z[j].T  # [P, P]
                squared[outside] = np.inf
                minima[i, :, j] = np.sqrt(np.maximum(squared.min(axis=1), 0.0))
    return minima


def interval_average(minima: ArrayLike, interval: tuple[float, float]) -> NDArray[np.float64]:
    """Average the distances of the chosen ranks (MuSc, section 3.2); [..., N] with one infinity each -> [...]."""
    x = np.asarray(minima, np.float64)
    first, last = interval_ranks(x.shape[-1] - 1, interval)
    average: NDArray[np.float64] = np.sort(x, axis=-1)[..., first:last].mean(axis=-1)
    return average


def kept_average(minima: ArrayLike, kept: ArrayLike, interval: tuple[float, float]) -> NDArray[np.float64]:
    """Average the distances of the chosen ranks among the images that are kept, every image but itself.

    minima: [N, P, N + K], kept: [N + K] bool. Returns [N, P].
    """
    x, chosen = np.asarray(minima, np.float64), np.asarray(kept, bool)
    averages = np.empty(x.shape[:2])
    for image, distances in enumerate(x):
        others = np.sort(distances[:, chosen & (np.arange(x.shape[2]) != image)], axis=1)  # [P, n]
        first, last = interval_ranks(others.shape[1], interval)
        averages[image] = others[:, first:last].mean(axis=1)
    return averages


def patch_minima(
    tokens: ArrayLike,
    grid: tuple[int, int],
    degrees: Sequence[int] = (1, 3, 5),
    references: int = 0,
    window: int | None = None,
) -> NDArray[np.float64]:
    """Measure every layer's and degree's minima; tokens: [N + K, L, P, C] with K `references`.

    window: see `patch_minima_per_degree`. Returns [L, R, N, P, N + K].
    """
    x = np.asarray(tokens, np.float64)
    return np.array(
        [
            [patch_minima_per_degree(x[:, layer], grid, degree, references, window) for degree in degrees]
            for layer in range(x.shape[1])
        ]
    )


def mutual_scores_per_degree(
    tokens: ArrayLike, grid: tuple[int, int], degree: int, interval: tuple[float, float] = (0.0, 0.3)
) -> NDArray[np.float64]:
    """Score every patch of one layer by its distances to the nearest patch of each other image.

    tokens: [N, P, C]. Returns [N, P].
    """
    return interval_average(patch_minima_per_degree(tokens, grid, degree), interval)


def mutual_scores(
    tokens: ArrayLike,
    grid: tuple[int, int],
    degrees: Sequence[int] = (1, 3, 5),
    interval: tuple[float, float] = (0.0, 0.3),
    references: int = 0,
    window: int | None = None,
) -> NDArray[np.float64]:
    """Average the mutual scores over layers, then over degrees (MuSc, eq. 6).

    tokens: [N + K, L, P, C], of which the last K, `references`, have no scores. window: see `patch_minima_per_degree`.
    Returns [N, P].
    """
    minima = patch_minima(tokens, grid, degrees, references, window)
    scores: NDArray[np.float64] = interval_average(minima, interval).mean(axis=(0, 1))
    return scores


def transformer_block(
    tokens: ArrayLike,
    layers: Mapping[str, tuple[ArrayLike, ArrayLike]],
    heads: int,
    activation: str,
    eps: float,
    angles: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Take tokens [T, C] through a block of a vision transformer: attention, then two layers, both on a residual.

    layers: weight and bias of norm1, qkv, proj, norm2, fc1 and fc2; linear weights are [out, in]. activation: gelu,
    quick_gelu or swiglu, for which the halves of fc1 are gate and value. angles: by how much channels i and i + d / 2
    of queries and keys are turned together in every head of width d, [T, d / 2].
    """
    x = np.asarray(tokens, np.float64)
    at = {name: [np.asarray(part, np.float64) for part in parts] for name, parts in layers.items()}

    def norm(y: NDArray[np.float64], name: str) -> Any:
        centred = y - y.mean(axis=1, keepdims=True)
        return centred / np.sqrt(centred.var(axis=1, keepdims=True) + eps) * at[name][0] + at[name][1]

    def linear(y: Any, name: str) -> Any:
        return y @ at[name][0].T + at[name][1]

    query, key, value = linear(norm(x, "norm1"), "qkv").reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
    if angles is not None:
        cosine, sine = np.cos(angles), np.sin(angles)
        halves = [np.split(part, 2, axis=-1) for part in (query, key)]
        query, key = (np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1) for a, b in halves)
    logits = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ value
    x = x + linear(mixed.transpose(1, 0, 2).reshape(x.shape), "proj")
    y = linear(norm(x, "norm2"), "fc1")
    if activation == "gelu":
        y = y / 2 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    elif activation == "quick_gelu":
        y = y / (1 + np.exp(-1.702 * y))
    else:
        gate, value = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * value
    after: NDArray[np.float64] = x + linear(y, "fc2")
    return after


def nearest(queries: ArrayLike, bank: ArrayLike, k: int = 1) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Find the k vectors of a bank with the largest cosines; a zero vector has cosine 0 with every other.

    queries: [Q, C], bank: [M, C], k at most M. Returns cosines [Q, k], descending, and indices [Q, k]; of equal cosines
    the lower index comes first.
    """
    left, right = (np.asarray(x, np.float64) for x in (queries, bank))
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (left, right)]
    left, right = (x / np.where(n > 0, n, 1) for x, n in zip((left, right), lengths, strict=True))
    cosines = left @ right.T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, order, axis=1), order.astype(np.int64)
