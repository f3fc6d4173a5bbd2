"""Each kernel of the product variants against float64 NumPy: called by the tests, and by the planted bugs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from kernel_checks import LOWEST_KEY, Make, Run, box, keys_to_floats, rng
from numpy.typing import NDArray

from zsad.kernels import reference
from zsad.kernels.cuda import variants

# [name] -> what selects it in `device_scores`
VARIANTS: dict[str, Any] = {
    "gram": {"products": "gram"},
    "fused": {"products": "fused"},
    "tiled": {"products": "tiled"},
    "int8": {"precision": "int8"},
}


def products_of_a_pair(variant: str, degrees: Sequence[int]) -> int:
    """Return how many products a variant queues for a pair."""
    return 1 if variant in ("gram", "tiled") else len(set(degrees))


def put_array(source: Any, out: Any) -> None:
    out[...] = source


def get_array(array: Any) -> NDArray[Any]:
    return np.asarray(array)


def padded_features(seed: int, images: int, patches: int, channels: int, negative: bool = False) -> NDArray[np.float16]:
    """Random features [B, P, S] with zero padding; with `negative` images of odd and even number point apart."""
    features = np.zeros((images, patches, variants.feature_stride(channels)), np.float16)
    features[..., :channels] = rng(seed, images, patches, channels).normal(size=(images, patches, channels))
    if negative:
        features = np.abs(features)
        features[1::2] *= -1
    return features


def inverse_lengths(features: NDArray[Any]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.linalg.norm(features.astype(np.float64), axis=-1)
    return np.where(lengths > 0, 1 / np.where(lengths > 0, lengths, 1), 0)


def beside_another_degree(array: NDArray[Any]) -> NDArray[Any]:
    """Put entries that must not be read between those of one image and the next; [B, ...] -> [B, 2, ...]."""
    return np.stack([array, np.full_like(array, np.nan if array.dtype.kind == "f" else 85)], axis=1)


def walsh_hadamard(x: NDArray[Any]) -> NDArray[np.float64]:
    """Transform every 32 channels."""
    matrix = np.ones((1, 1))
    for _ in range(5):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    groups: NDArray[np.float64] = x.reshape(*x.shape[:-1], -1, 32) @ matrix
    return groups.reshape(x.shape)


class PairRun:
    """Outputs for one image against a run of others, with the entries of other images and degrees between them."""

    def __init__(self, make: Make, images: int, patches: int, directions: tuple[bool, bool]) -> None:
        self.arrays = [make(np.full((images, gap, patches), LOWEST_KEY, np.int32)) for gap in (2, 3)]  # [T, gap, P]
        self.views = [array[:, 1] if kept else None for array, kept in zip(self.arrays, directions, strict=True)]
        self.directions = directions

    def found(self, get: Any) -> list[NDArray[np.int32] | None]:
        """Return the keys [T, P] of both directions, None for a dropped one; everything else must be untouched."""
        keys: list[NDArray[np.int32] | None] = []
        for array, kept in zip(self.arrays, self.directions, strict=True):
            everything = np.array(get(array))
            keys.append(everything[:, 1].copy() if kept else None)
            if kept:
                everything[:, 1] = LOWEST_KEY
            assert (everything == LOWEST_KEY).all()
        return keys


def check_pool_features(
    run: Run,
    make: Make,
    grid: tuple[int, int],
    channels: int,
    degree: int,
    zeros: bool = False,
    get: Any = get_array,
) -> None:
    """Two images; with `zeros` the second is zero but for one patch."""
    patches, stride = math.prod(grid), variants.feature_stride(channels)
    x = rng(patches, channels, degree).normal(size=(2, patches, channels)).astype(np.float16)
    if zeros:
        x[1, 1:] = 0
    features = make(np.full((2, 2, patches, stride), 9, np.float16))  # [B, R, P, S], of which this is the second
    inverse, has_zero = make(np.full((2, 3, patches), 9, np.float32)), make(np.zeros((2, 3), np.uint8))
    variants.pool_features(run, make(x), grid, degree, features[:, 1], inverse[:, 1], has_zero[:, 1])

    assert (get(features)[:, 0] == 9).all()
    z = get(features)[:, 1].astype(np.float64)
    expected = reference.box_mean(x, grid, degree)
    np.testing.assert_allclose(z[..., :channels], expected, rtol=6e-4, atol=1e-6)
    assert (z[..., channels:] == 0).all()
    np.testing.assert_allclose(get(inverse)[:, 1], inverse_lengths(z), rtol=2e-6)
    assert (get(inverse)[:, ::2] == 9).all()
    assert (get(has_zero)[:, 1] == (z == 0).all(axis=-1).any(axis=-1)).all()
    assert (get(has_zero)[:, ::2] == 0).all()


def check_fused_max(
    run: Run,
    make: Make,
    images: int,
    patches: int,
    channels: int,
    negative: bool = False,
    zeros: bool = False,
    directions: tuple[bool, bool] = (True, True),
    get: Any = get_array,
) -> None:
    """One image against `images` others, in two launches of which the second must not lower anything."""
    features = padded_features(1, images + 1, patches, channels)
    if negative:
        features = np.abs(features)
        features[:-1] *= -1
    if zeros:
        features[::2, patches // 2] = 0
        features[-1, 0] = 0
    inverse = inverse_lengths(features).astype(np.float32)
    out = PairRun(make, images, patches, directions)
    rows, column = make(beside_another_degree(features[:-1])), make(features[-1])
    row_weights = make(beside_another_degree(inverse[:-1]))
    for column_weights in (inverse[-1], inverse[-1] / 2):
        variants.fused_max(run, rows[:, 0], column, row_weights[:, 0], make(column_weights), *out.views)

    cosines = (
        (features[:-1].astype(np.float64) @ features[-1].astype(np.float64).T) * inverse[:-1, :, None] * inverse[-1]
    )
    for keys, axis in zip(out.found(get), (2, 1), strict=True):
        if keys is not None:
            best = cosines.max(axis=axis)
            np.testing.assert_allclose(keys_to_floats(keys), np.maximum(best, best / 2), rtol=1e-5, atol=2e-6)


def check_tiled_max(
    run: Run,
    make: Make,
    grid: tuple[int, int],
    degrees: Sequence[int],
    images: int = 1,
    channels: int = 24,
    negative: bool = False,
    zeros: bool = False,
    directions: tuple[bool, bool] = (True, True),
    get: Any = get_array,
) -> None:
    """One image against `images` others with any inverse lengths; the features of others' images lie between."""
    patches, mask = math.prod(grid), sum(1 << degree // 2 for degree in degrees)
    features = padded_features(6, images + 1, patches, channels)
    if negative:
        features = np.abs(features)
        features[:-1] *= -1
    inverse = rng(7, patches).uniform(0.2, 2, (images + 1, len(degrees), patches)).astype(np.float32)
    if zeros:
        inverse[:-1, :, 1::3] = inverse[-1, :, ::4] = 0
    shape = (images, len(degrees) * patches)
    out = PairRun(make, *shape, directions)
    views = [None if view is None else view.reshape(images, len(degrees), patches) for view in out.views]
    rows = make(beside_another_degree(features[:-1]))[:, 0]
    variants.tiled_max(run, rows, make(features[-1]), grid, mask, make(inverse[:-1]), make(inverse[-1]), *views)

    found = out.found(get)
    for t in range(images):
        gram = features[t].astype(np.float64) @ features[-1].astype(np.float64).T
        for r, degree in enumerate(degrees):
            cosines = box(gram, grid, degree) * inverse[t, r][:, None] * inverse[-1, r]
            error = 1e-6 * np.abs(box(np.abs(gram), grid, degree)).max() * 4
            for keys, axis in zip(found, (1, 0), strict=True):
                if keys is not None:
                    best = keys_to_floats(keys[t].reshape(len(degrees), patches)[r])
                    np.testing.assert_allclose(best, cosines.max(axis=axis), rtol=1e-5, atol=error)


def check_int8_quantise(
    run: Run, make: Make, patches: int, channels: int, zeros: bool = False, get: Any = get_array
) -> None:
    features = padded_features(2, 2, patches, channels)
    features[..., channels // 2] *= 20  # a channel that would drown the others
    if zeros:
        features[1, -1] = 0
    inverse = rng(3, patches).uniform(0.5, 2, (2, patches)).astype(np.float32)
    codes = make(np.full((2, 2, patches, variants.code_stride(features.shape[2])), 99, np.int8))
    weights = make(np.full((2, 2, patches), 9, np.float32))
    held = make(beside_another_degree(features))
    variants.int8_quantise(run, held[:, 0], make(inverse), codes[:, 1], weights[:, 0])

    assert (get(codes)[:, 0] == 99).all()
    transformed = np.zeros(get(codes)[:, 1].shape)
    transformed[..., : features.shape[2]] = walsh_hadamard(features.astype(np.float64))
    scale = np.abs(transformed).max(axis=-1) / 127
    np.testing.assert_allclose(get(weights)[:, 0], scale * inverse, rtol=1e-5)
    assert (get(weights)[:, 1] == 9).all()
    units = transformed / np.where(scale > 0, scale, 1)[..., None]
    assert np.abs(get(codes)[:, 1] - units).max() <= 0.5 + 1e-3


def check_fused_winners(
    run: Run,
    make: Make,
    images: int,
    patches: int,
    channels: int,
    negative: bool = False,
    directions: tuple[bool, bool] = (True, True),
    get: Any = get_array,
) -> None:
    """The int8 product names a patch whose approximate cosine is the best to the digits that a key keeps."""
    random = rng(4, images, patches, channels)
    codes = np.zeros((images + 1, patches, variants.code_stride(channels)), np.int8)
    codes[..., :channels] = random.integers(-127, 128, (images + 1, patches, channels))
    if negative:
        codes = np.abs(codes)
        codes[:-1] *= -1
    weights = (random.uniform(0.2, 1, (images + 1, patches)) * inverse_lengths(codes)).astype(np.float32)
    out = PairRun(make, images, patches, directions)
    rows, column = make(beside_another_degree(codes[:-1])), make(codes[-1])
    variants.fused_max(run, rows[:, 0], column, make(weights[:-1]), make(weights[-1]), *out.views)

    cosines = (codes[:-1].astype(np.float64) @ codes[-1].astype(np.float64).T) * weights[:-1, :, None] * weights[-1]
    mask = int(variants.index_mask(patches))
    for keys, axis in zip(out.found(get), (2, 1), strict=True):
        if keys is None:
            continue
        values = keys_to_floats(keys)
        winner = values.view(np.int32) & mask
        assert (winner < patches).all()
        named = np.take_along_axis(cosines, np.expand_dims(winner, axis), axis).squeeze(axis)
        best = cosines.max(axis=axis)
        kept = (mask + 1) * 2.0**-23 * 1.01  # of 1 - cosine
        np.testing.assert_array_less(best - named, kept * (1 - best) + 1e-6)
        np.testing.assert_allclose(values + 1, named, atol=kept * (1 - best).max() + 1e-6)


def check_winner_cosines(
    run: Run,
    make: Make,
    images: int,
    patches: int,
    channels: int,
    directions: tuple[bool, bool] = (True, True),
    get: Any = get_array,
    put: Any = put_array,
) -> None:
    """Random winners: their numbers are read, their cosines measured."""
    random = rng(5, images, patches, channels)
    features = padded_features(5, images + 1, patches, channels)
    features[0, 0] = 0
    inverse = inverse_lengths(features).astype(np.float32)
    mask = int(variants.index_mask(patches))
    out = PairRun(make, images, patches, directions)
    winners = random.integers(0, patches, (2, images, patches)).astype(np.int32)
    for view, winner in zip(out.views, winners, strict=True):
        if view is not None:
            values = random.uniform(-1.9, 0, winner.shape).astype(np.float32)
            bits = (values.view(np.int32) & ~mask) | winner
            put(make(bits ^ ((bits >> 31) & 0x7FFFFFFF)), view)
    rows, column = make(beside_another_degree(features[:-1])), make(features[-1])
    variants.winner_cosines(run, rows[:, 0], column, make(inverse[:-1]), make(inverse[-1]), *out.views)

    cosines = (
        (features[:-1].astype(np.float64) @ features[-1].astype(np.float64).T) * inverse[:-1, :, None] * inverse[-1]
    )
    for keys, winner, axis in zip(out.found(get), winners, (2, 1), strict=True):
        if keys is not None:
            exact = np.take_along_axis(cosines, np.expand_dims(winner, axis), axis).squeeze(axis)
            np.testing.assert_allclose(keys_to_floats(keys), exact, rtol=1e-5, atol=2e-6)
