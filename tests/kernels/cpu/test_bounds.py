"""Products that bounds leave to be taken against all of them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from zsad.kernels import mutual_scores, reference
from zsad.kernels.cpu import comparers
from zsad.kernels.cpu.arrays import aligned_empty
from zsad.kernels.cpu.bounds import HEAD, Basis, taken_share

INSTRUCTION_SETS = [] if comparers._cpu is None else comparers._cpu.instruction_sets("bounded_nearest")
pytestmark = pytest.mark.skipif(comparers._cpu is None, reason="installed without a compiler: bounds are native code")

Array = NDArray[np.float32]


def near_planes(seed: int, count: int, channels: int, directions: int = 20, noise: float = 0.1) -> Array:
    """Unit vectors [count, C] near a mean and few directions, the same for all seeds, as tokens of one product are."""
    plane = np.random.default_rng(99).normal(size=(directions + 1, channels))
    rng = np.random.default_rng(seed)
    vectors = plane[0] + rng.normal(size=(count, directions)) @ plane[1:] * 0.5
    vectors += noise * rng.normal(size=vectors.shape) * np.sqrt(directions)
    return unit(vectors)


def unit(vectors: NDArray[np.floating]) -> Array:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def nearest(
    left: Array, right: Array, instruction_set: str = "", basis: Basis | None = None
) -> tuple[Array, Array, int]:
    """Return the largest product of each vector with one of the other side, and how many products were taken."""
    basis = basis or Basis.of(np.concatenate([left, right]))
    bounds = [aligned_empty((comparers._cpu.bounds_bytes(len(side), HEAD),), np.uint8) for side in (left, right)]
    for side, out in zip((left, right), bounds, strict=True):
        comparers._cpu.bound_vectors(*basis.coordinates(side), out, instruction_set)
    best = np.empty(len(left), np.float32), np.empty(len(right), np.float32)
    return *best, comparers._cpu.bounded_nearest(left, right, *bounds, HEAD, *best, instruction_set)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(("left", "right"), [(1, 1), (7, 130), (64, 48), (333, 201), (130, 1600)])
def test_the_nearest_of_both_sides_are_those_of_all_products(instruction_set: str, left: int, right: int) -> None:
    one, other = near_planes(1, left, 250), near_planes(2, right, 250)
    of_left, of_right, taken = nearest(one, other, instruction_set)
    products = one.astype(np.float64) @ other.T
    np.testing.assert_allclose(of_left, products.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(of_right, products.max(axis=0), atol=1e-6)
    assert taken <= products.size
    if products.size > 50_000:
        assert taken < products.size / 5


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])  # up to vectors that have no direction in common
@pytest.mark.parametrize("channels", [HEAD, 96, 384])
def test_bounds_hold_whatever_vectors_leave(noise: float, channels: int) -> None:
    one, other = near_planes(3, 90, channels, noise=noise), near_planes(4, 120, channels, noise=noise)
    other[::7], one[5], other[11] = one[: len(other[::7])], 0, 0  # the same ones, and zeros
    products = one.astype(np.float64) @ other.T
    for basis in (None, Basis.of(near_planes(5, 200, channels)[:, ::-1].copy())):  # also one of other vectors
        of_left, of_right, _ = nearest(one, other, basis=basis)
        np.testing.assert_allclose(of_left, products.max(axis=1), atol=1e-6)
        np.testing.assert_allclose(of_right, products.max(axis=0), atol=1e-6)


def test_directions_are_orthogonal_and_carry_most() -> None:
    vectors = near_planes(6, 500, 384, noise=0.01)
    basis = Basis.of(vectors)
    np.testing.assert_allclose(basis.directions.T @ basis.directions, np.eye(HEAD), atol=1e-5)
    _, _, tails = basis.coordinates(vectors)
    assert tails.mean() < 1e-3


def test_the_share_of_products_tells_vectors_of_one_kind_from_others() -> None:
    alike, others = near_planes(7, 400, 384), unit(np.random.default_rng(8).normal(size=(400, 384)))
    assert taken_share(Basis.of(alike), alike[:200], alike[200:]) < comparers.MOST_TAKEN["fp32"]
    assert taken_share(Basis.of(others), others[:200], others[200:]) > 0.5


def tokens_of(kind: str, images: int, patches: int, channels: int) -> Array:
    if kind == "alike":
        tokens = [near_planes(seed, 2 * patches, channels, noise=0.02) for seed in range(images)]
    else:
        tokens = [np.random.default_rng(seed).normal(size=(2 * patches, channels)) for seed in range(images)]
    return np.stack(tokens).reshape(images, 2, patches, channels).astype(np.float32)


@pytest.mark.parametrize("kind", ["alike", "others"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_scores_are_those_of_the_reference(kind: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparers, "HAS_TILES", False)
    bounded = []
    pays = comparers.Bounded.pays
    monkeypatch.setattr(comparers.Bounded, "pays", lambda *a: bounded.append(pays(*a)) or bounded[-1])
    tokens = tokens_of(kind, comparers.LEAST_BOUNDED, 12 * 11, 256)
    scores = mutual_scores(tokens, (12, 11), (1, 3), precision=precision)
    assert bounded == [kind == "alike"] * 2  # once for each layer
    expected = reference.mutual_scores(tokens, (12, 11), (1, 3), (0.0, 0.3))
    exact = kind == "alike" or precision == "fp32"
    np.testing.assert_allclose(scores, expected, atol=2e-6 if exact else 5e-3)


def test_every_plan_gives_the_same_scores() -> None:
    tokens = tokens_of("alike", 14, 12 * 12, 256)
    tokens[3, :, 40] = 0  # a patch without direction
    whole, minima = mutual_scores(tokens, (12, 12), (1, 3), references=2, return_minima="each")
    plans = []
    for limit in (8.0, 3.0, 2.0, 1.5):
        scores, others = mutual_scores(
            tokens,
            (12, 12),
            (1, 3),
            references=2,
            return_minima="each",
            memory_limit=int(limit * 2**20),
            on_plan=plans.append,
        )
        np.testing.assert_array_equal(scores, whole)
        np.testing.assert_array_equal(others, minima)
    assert len({plan.chunk for plan in plans}) > 1


def test_fewer_images_are_compared_by_all_products() -> None:
    tokens = tokens_of("alike", comparers.LEAST_BOUNDED, 12 * 12, 256)
    few = mutual_scores(tokens[:-1], (12, 12), (1, 3))
    np.testing.assert_allclose(few, reference.mutual_scores(tokens[:-1], (12, 12), (1, 3), (0.0, 0.3)), atol=2e-6)
