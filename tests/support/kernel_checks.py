"""Each kernel against float64 NumPy on one case: called by the tests, and by the planted bugs that must fail them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.decode import network_input as host_input
from zsad.engine.images.decode import recipe as make_recipe
from zsad.kernels import reference
from zsad.kernels.cuda.card import Card
from zsad.kernels.cuda.comparers import filter_max_shape, strip_rows
from zsad.kernels.cuda.device import filter_max_kernel
from zsad.kernels.cuda.images import network_input as device_input

# run(kernel, grid, threads, arguments, shared_bytes): on the host or on a device
Run = Callable[..., None]
# make(array): a copy where the kernel can reach it; get(array): the copy back
Make = Callable[[NDArray[Any]], Any]

LOWEST_KEY = -(2**31)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([7, *seed])


def keys_to_floats(keys: NDArray[np.int32]) -> NDArray[np.float32]:
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(np.float32)


def floats_to_keys(values: NDArray[Any]) -> NDArray[np.int32]:
    bits = np.ascontiguousarray(values, np.float32).view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def check_layer_norm(run: Run, make: Make, images: int, size: int, dtype: Any, threads: int = 64, gap: int = 5) -> None:
    """Rows `gap` entries apart, a mean far from zero, fewer entries than threads or more."""
    x = (rng(size).normal(size=(images, size + gap)) * 3 + 40).astype(dtype)
    slices = 3
    shift, sums = make(np.full(images, 9e9, np.float32)), make(np.full((images, slices, 2), 9e9))
    y, finite = make(np.full((images, size), 9, np.float16)), make(np.full(images, 7, np.int32))
    kind = "f32" if dtype == np.float32 else "f16"
    where = (make(x), np.int64(size + gap), np.int32(size), shift, sums)
    run(f"layer_norm_sums_{kind}", (slices, images), threads, where, threads // 32 * 8)
    run(
        f"layer_norm_apply_{kind}",
        (2, images),
        threads,
        (*where, np.int32(slices), np.float32(reference.LAYER_NORM_EPS), y, finite),
    )
    expected = reference.spatial_layer_norm(x[:, None, :size].astype(np.float64))[:, 0]
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=6e-4, atol=1e-5)
    assert np.asarray(finite).all()


def check_pooled_norms(
    run: Run, make: Make, grid: tuple[int, int], channels: int, degrees: Sequence[int], zeros: bool = False
) -> None:
    """Two images; with `zeros` the second is zero but for one patch."""
    patches = math.prod(grid)
    x = rng(patches, channels).normal(size=(2, patches, channels)).astype(np.float16)
    if zeros:
        x[1, 1:] = 0
    inverse = make(np.full((2, len(degrees), patches), 9, np.float32))
    has_zero = make(np.zeros((2, len(degrees)), np.uint8))
    reaches = make(np.array([degree // 2 for degree in degrees], np.int32))
    scalars = (np.int32(grid[0]), np.int32(grid[1]), np.int32(channels), reaches, np.int32(len(degrees)))
    run("pooled_norms", (-(-patches // 2), 2), 64, (make(x), *scalars, inverse, has_zero))
    for r, degree in enumerate(degrees):
        lengths = np.linalg.norm(reference.box_mean(x, grid, degree) * degree**2, axis=-1)
        expected = np.where(lengths > 0, 1 / np.where(lengths > 0, lengths, 1), 0)
        np.testing.assert_allclose(np.asarray(inverse)[:, r], expected, rtol=2e-6)
        assert (np.asarray(has_zero)[:, r] == (lengths == 0).any(axis=1)).all()


def box(gram: NDArray[Any], grid: tuple[int, int], degree: int) -> NDArray[np.float64]:
    """Box-sum [P, Q] over the neighbourhoods of both sides."""
    left = reference.box_mean(gram, grid, degree) * degree**2
    both: NDArray[np.float64] = (reference.box_mean(left.T, grid, degree) * degree**2).T
    return both


def check_filter_max(
    run: Run,
    make: Make,
    grid: tuple[int, int],
    degrees: Sequence[int],
    pairs: int = 2,
    negative: bool = False,
    band: int | None = None,
    segment: int | None = None,
    directions: tuple[bool, bool] = (True, True),
    window: int | None = None,
) -> None:
    """Both directions of every Gram, with padded rows, a zero before poisoned padding, and room between the outputs.

    With a window some features are zero.
    """
    patches, stride, pair = math.prod(grid), math.prod(grid) + 3, len(degrees) * math.prod(grid)
    random = rng(patches, pairs)
    products = random.normal(size=(pairs, patches, patches)).astype(np.float32)
    if negative:
        products = -np.abs(products)
    padded = np.full((pairs, patches, stride), 1e36, np.float32)
    padded[..., : patches + 1] = np.pad(products, ((0, 0), (0, 0), (0, 1)))
    inverse_rows = random.uniform(0.2, 2, (pairs, len(degrees), patches)).astype(np.float32)
    inverse_columns = random.uniform(0.2, 2, (len(degrees), patches)).astype(np.float32)
    if window is not None:
        inverse_rows[:, :, 1::5] = inverse_columns[:, 1::3] = 0
    best_rows = make(np.full((pairs, 2, pair), LOWEST_KEY, np.int32))
    best_columns = make(np.full((pairs, 3, pair), LOWEST_KEY, np.int32))

    mask = sum(1 << degree // 2 for degree in degrees)
    shape = filter_max_shape(grid, mask, pairs, Card("8.9", 5, 0, 100 << 10), window)
    segment, band, threads, shared = segment or shape.segment, band or shape.band, shape.threads, shape.shared_bytes
    met = grid[0] if window is None else min(strip_rows(mask) + 2 * window, grid[0])
    blocks = -(-grid[0] // strip_rows(mask)) * -(-grid[1] // segment) * -(-met // band)
    if segment > shape.segment:
        shared += 4 * strip_rows(mask) * len(degrees) * segment * (1 + threads // 32)
    arguments = (
        make(padded),
        np.int32(stride),
        np.int64(patches * stride),
        np.int32(grid[0]),
        np.int32(grid[1]),
        make(inverse_rows),
        make(inverse_columns),
        best_rows if directions[0] else None,
        np.int64(2 * pair),
        best_columns if directions[1] else None,
        np.int64(3 * pair),
        np.int32(segment),
        np.int32(band),
        *([] if window is None else [np.int32(window)]),
    )
    run(filter_max_kernel(mask, window is not None), (blocks, pairs), threads, arguments, shared)

    rows, columns = np.asarray(best_rows), np.asarray(best_columns)
    assert (rows[:, 1:] == LOWEST_KEY).all()
    assert (columns[:, 1:] == LOWEST_KEY).all()
    for t in range(pairs):
        for r, degree in enumerate(degrees):
            cosines = box(products[t], grid, degree) * inverse_rows[t, r][:, None] * inverse_columns[r]
            if window is not None:
                zeros = (inverse_rows[t, r] == 0)[:, None] + (inverse_columns[r] == 0).astype(int)
                cosines = np.where(zeros == 0, cosines, zeros / 2)
                cosines[reference.cells_apart(grid) > window] = -np.inf
            for keys, axis, kept in ((rows, 1, directions[0]), (columns, 0, directions[1])):
                found = keys[t, 0].reshape(len(degrees), patches)[r]
                if kept:
                    np.testing.assert_allclose(keys_to_floats(found), cosines.max(axis=axis), rtol=2e-5, atol=2e-5)
                else:
                    assert (found == LOWEST_KEY).all()


def check_interval_average(
    run: Run,
    make: Make,
    images: int,
    patches: int,
    ranks: tuple[int, int],
    zeros: bool = False,
    ties: bool = False,
    image_first: int = 0,
) -> None:
    """Images from `image_first` on; with `zeros` some features have no direction; with `ties` few distinct cosines.

    Scores and distances come from the same keys and are both checked.
    """
    degrees, first, last = 2, *ranks
    random = rng(images, patches, first, last)
    rows = images - image_first
    cosines = random.uniform(-1, 1, (rows, images, degrees, patches)).astype(np.float32)
    if ties:
        cosines = (np.round(cosines * 2) / 2).astype(np.float32)
    inverse = np.ones((images, degrees, patches), np.float32)
    if zeros:
        inverse[random.random(inverse.shape) < 0.2] = 0
        inverse[0] = 1
    has_zero = (inverse == 0).any(axis=2)  # [N, R]
    best = floats_to_keys(cosines)
    for b in range(rows):
        best[b, image_first + b] = 2**31 - 1  # an image is not compared with itself
    weights = np.array([0.25, 2], np.float32)
    scores = make(np.full((images, patches), 0.5, np.float32))
    minima = make(np.full((rows, patches, images), 9e9, np.float32))
    arguments = (make(best), make(inverse[image_first:]), make(has_zero.astype(np.uint8)), make(weights))
    sizes = [np.int32(n) for n in (images, degrees, patches, image_first)]
    run(
        "interval_average",
        (-(-patches // 32), rows),
        32,
        (*arguments, *sizes, np.int32(first), np.int32(last), scores),
    )
    squares = -(-patches // 32) * -(-images // 32)
    run("minimum_distances", (squares, rows), 64, (*arguments, *sizes, minima), 4 * 32 * 33)

    squared = 2 - 2 * cosines.astype(np.float64)  # [B, N, R, P]
    there, here = has_zero[:, :, None], inverse[image_first:, None] == 0
    squared = np.where(here, 1.0 - there, np.where(there, np.minimum(squared, 1), squared))
    distances = np.sqrt(np.maximum(squared, 0))
    distances[range(rows), range(image_first, images)] = np.inf
    expected = np.full((images, patches), 0.5)
    lowest = np.sort(distances, axis=1)[:, first:last].sum(axis=1)  # [B, R, P]
    expected[image_first:] += np.einsum("r,brp->bp", weights, lowest)
    np.testing.assert_allclose(np.asarray(scores), expected, rtol=1e-5)
    together = np.einsum("r,bnrp->bpn", weights, distances)
    np.testing.assert_allclose(np.asarray(minima), together, rtol=1e-5, atol=1e-6)


def check_kept_sums(run: Run, make: Make, images: int, others: int, patches: int, ties: bool = False) -> None:
    """Images 2, 3, … of others, of which every third is not kept, each with ranks of its own."""
    first = 2
    minima = rng(images, others, patches).uniform(0, 2, (images, patches, others)).astype(np.float32)
    if ties:
        minima = np.round(minima * 2) / np.float32(2)
    minima[range(images), :, range(first, first + images)] = 0  # whatever it is, it does not count
    kept = np.arange(others) % 3 != 1
    ranks = [(image % 2, 2 + image % 3) for image in range(images)]
    sums = make(np.full((images, patches), 9e9))
    arguments = (make(minima), make(kept.astype(np.uint8)), make(np.array(ranks, np.int32)))
    sizes = [np.int32(n) for n in (others, patches, first)]
    run("kept_sums", (-(-patches // 32), images), 32, (*arguments, *sizes, sums))
    for image, (low, high) in enumerate(ranks):
        chosen = minima[image][:, kept & (np.arange(others) != first + image)].astype(np.float64)
        np.testing.assert_allclose(
            np.asarray(sums)[image], np.sort(chosen, axis=1)[:, low:high].sum(axis=1), rtol=1e-12
        )


def check_resize(device: Any, source: tuple[int, int], size: int, resampling: Any) -> None:
    """Bit for bit what Pillow makes of noise with saturated areas."""
    image = rng(*source).integers(-80, 336, (*source, 3)).clip(0, 255).astype(np.uint8)
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    on_device = device.empty((3, size, size), np.float32)
    device_input(device, device.to_device(image), on_device, resampling, mean, deviation)
    out = device.to_host(on_device)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    pillow = np.asarray(Image.fromarray(image).resize((size, size), filters[resampling]))
    pixels = np.rint((out.transpose(1, 2, 0) * np.array(deviation) + mean) * 255)
    np.testing.assert_array_equal(pixels, pillow)
    np.testing.assert_allclose(out, ((pillow / 255 - mean) / deviation).transpose(2, 0, 1), atol=2e-6)


def check_middle_square(device: Any, source: tuple[int, int], size: int) -> None:
    """Bit for bit what the host makes of the middle square of an image."""
    image = rng(*source).integers(-80, 336, (*source, 3)).clip(0, 255).astype(np.uint8)
    recipe = make_recipe("clip", size, "shortest_crop")
    on_device = device.empty((3, size, size), np.float32)
    statistics = (recipe.resampling, recipe.mean, recipe.deviation)
    device_input(device, device.to_device(image), on_device, *statistics, recipe.resized(*source))
    expected = host_input(Image.fromarray(image), recipe)
    np.testing.assert_allclose(device.to_host(on_device), expected, atol=2e-6)


def check_running_top(run: Run, make: Make, rows: int, columns: int, kept: int, get: Any = np.asarray) -> None:
    """Three chunks with many equal products and a row of negative ones, infinity behind each row."""
    random = rng(rows, columns, kept)
    products = random.integers(-9, 60, (3, rows, columns)).astype(np.float32)
    products[:, rows // 2] *= -1
    keys = make(np.full((rows, kept), LOWEST_KEY, np.int32))
    indices = make(np.tile(-1 - np.arange(kept, dtype=np.int32), (rows, 1)))
    for number, chunk in enumerate(products):
        wide = make(np.pad(chunk, ((0, 0), (0, 3)), constant_values=np.inf))
        scalars = [np.int32(value) for value in (columns + 3, rows, columns, 5 + number * columns)]
        run("running_top", (-(-rows // 2), 1), 64, (wide, *scalars, keys, indices, np.int32(kept)))
    flat = np.concatenate(list(products), axis=1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :kept]
    found, numbers = keys_to_floats(get(keys)), get(indices)
    by_rank = np.lexsort((numbers, -found))[:, : order.shape[1]]
    np.testing.assert_array_equal(np.take_along_axis(numbers, by_rank, axis=1), 5 + order)
    np.testing.assert_array_equal(np.take_along_axis(found, by_rank, axis=1), np.take_along_axis(flat, order, axis=1))
