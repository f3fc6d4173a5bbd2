"""Products that bounds leave to be taken against all of them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from zsad.kernels import mutual_scores, reference
from zsad.kernels.cpu import comparers
from zsad.kernels.cpu import nearest as cpu_nearest
from zsad.kernels.cpu.arrays import aligned_empty
from zsad.kernels.cpu.bounds import HEAD, LEAD, Basis, Groups, halved, taken_share
from zsad.kernels.nearest import Nearest

INSTRUCTION_SETS = [] if comparers._cpu is None else comparers._cpu.instruction_sets("bounded_bank")
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
    left: Array, right: Array, instruction_set: str = "", basis: Basis | None = None, lead: int = LEAD
) -> tuple[Array, Array, int]:
    """Return the largest product of each vector with one of the other side, and how many products were taken."""
    basis = basis or Basis.of(np.concatenate([left, right]))
    kernels = comparers._cpu
    bounds = [aligned_empty((kernels.pair_bytes(len(side), HEAD, lead),), np.uint8) for side in (left, right)]
    for side, out in zip((left, right), bounds, strict=True):
        kernels.bound_image(*basis.coordinates(side), lead, out, instruction_set)
    best = np.empty(len(left), np.float32), np.empty(len(right), np.float32)
    return *best, kernels.bounded_pair(left, right, *bounds, HEAD, lead, *best, instruction_set)


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


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("lead", [4, 16, HEAD // 2, HEAD])
def test_so_many_coordinates_have_codes_as_one_likes(instruction_set: str, lead: int) -> None:
    one, other = near_planes(1, 150, 256), near_planes(2, 170, 256)
    of_left, of_right, taken = nearest(one, other, instruction_set, lead=lead)
    expected = nearest(one, other, instruction_set)
    np.testing.assert_array_equal(of_left, expected[0])
    np.testing.assert_array_equal(of_right, expected[1])
    assert taken < one.shape[0] * other.shape[0] / 5


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-4, 0.01, 2.0])  # from a vector that all but one of a side are near
def test_bounds_hold_at_every_scale(instruction_set: str, apart: float) -> None:
    rng = np.random.default_rng(11)
    middle = unit(rng.normal(size=(1, 128)))
    one, other = (unit(middle + apart * rng.normal(size=(count, 128))) for count in (90, 120))
    one[3], other[5] = -middle, unit(rng.normal(size=(1, 128)))
    for basis in (None, Basis.of(one[:1]), Basis.of(unit(rng.normal(size=(300, 128))))):
        of_left, of_right, _ = nearest(one, other, instruction_set, basis)
        products = one.astype(np.float64) @ other.T
        np.testing.assert_allclose(of_left, products.max(axis=1), atol=1e-6)
        np.testing.assert_allclose(of_right, products.max(axis=0), atol=1e-6)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_images_of_more_rows_than_are_kept_at_a_time(instruction_set: str) -> None:
    one, other = near_planes(12, 1700, 128), near_planes(13, 100, 128)
    of_left, of_right, _ = nearest(one, other, instruction_set)
    products = one.astype(np.float64) @ other.T
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
    tokens = tokens_of(kind, comparers.LEAST_BOUNDED[precision], 12 * 11, 256)
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
    for limit in (20.0, 15.0, 14.0, 13.5):
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
    tokens = tokens_of("alike", comparers.LEAST_BOUNDED["fp32"], 12 * 12, 256)
    few = mutual_scores(tokens[:-1], (12, 12), (1, 3))
    np.testing.assert_allclose(few, reference.mutual_scores(tokens[:-1], (12, 12), (1, 3), (0.0, 0.3)), atol=2e-6)


def by_all_products(bank: Array, queries: Array, k: int) -> tuple[NDArray[np.floating], NDArray[np.intp]]:
    cosines = unit(queries).astype(np.float64) @ unit(bank).T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, order, axis=1), order


def is_grouped(search: Nearest) -> bool:
    return isinstance(search._search, cpu_nearest.Search) and search._search._groups is not None


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("vectors", "queries", "k"), [(2048, 1, 1), (2500, 333, 1), (5000, 130, 5)])
def test_the_nearest_of_a_bank_are_those_of_all_products(precision: str, vectors: int, queries: int, k: int) -> None:
    bank, asked = near_planes(1, vectors, 256), near_planes(2, queries, 256)
    search = Nearest(bank, k, precision)
    assert is_grouped(search)
    cosines, indices = search.search(asked)
    expected, _ = by_all_products(bank, asked, k)
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    np.testing.assert_allclose(np.einsum("qc,qkc->qk", asked, bank[indices]), expected, atol=1e-6)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set_finds_the_same(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, asked = near_planes(1, 3000, 256), near_planes(2, 101, 256)
    expected = Nearest(bank, 3, "int8").search(asked)
    for name in ("code_bank", "bounded_bank"):
        kernel = getattr(comparers._cpu, name)
        monkeypatch.setattr(comparers._cpu, name, lambda *a, kernel=kernel: kernel(*a, instruction_set=instruction_set))
    cosines, indices = Nearest(bank, 3, "int8").search(asked)
    np.testing.assert_allclose(cosines, expected[0], atol=1e-6)
    np.testing.assert_array_equal(indices, expected[1])


def test_of_equal_vectors_the_lower_index_comes_first() -> None:
    bank = near_planes(1, 3000, 256)
    bank[2500:2600] = bank[100:200]
    bank[7] = 0
    _, indices = Nearest(bank, 2, "int8").search(bank[2500:2600])
    np.testing.assert_array_equal(indices, np.column_stack([np.arange(100, 200), np.arange(2500, 2600)]))


def test_vectors_of_16_bit_floats_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = near_planes(1, 3000, 256).astype(np.float16).astype(np.float32)  # as banks are stored
    asked = near_planes(2, 101, 256)
    found = Nearest(bank, 3, "int8").search(asked)
    np.testing.assert_allclose(found[0], by_all_products(bank, asked, 3)[0], atol=1e-6)
    monkeypatch.setattr(Groups, "halves", lambda *_: None)
    for one, other in zip(found, Nearest(bank, 3, "int8").search(asked), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_vectors_of_16_bit_floats_are_held_so() -> None:
    bank = near_planes(1, 3000, 256)
    search = Nearest(bank, 1, "int8")._search
    assert isinstance(search, cpu_nearest.Search)
    assert search._groups is not None
    assert search._halves is None
    halves = search._groups.halves(bank.astype(np.float16).astype(np.float32))
    if INSTRUCTION_SETS[0].startswith("avx512"):
        assert halves is not None
        order = search._groups.order.reshape(-1)
        there = order >= 0
        np.testing.assert_array_equal(halves.view(np.float16)[there], bank.astype(np.float16)[order[there]])


def test_queries_far_from_everything_meet_all_of_the_bank() -> None:
    bank = near_planes(1, 3000, 256)
    far = np.concatenate([near_planes(2, 20, 256), -bank[:20], unit(np.random.default_rng(3).normal(size=(20, 256)))])
    search = Nearest(bank, 1, "int8")
    given_up = np.zeros(len(far), bool)
    assert is_grouped(search)
    bounded = search._search._bounded_search

    def watched(queries, *arguments):
        given_up[queries] = bounded(queries, *arguments)
        return given_up[queries]

    search._search._bounded_search = watched
    cosines, _ = search.search(far)
    np.testing.assert_allclose(cosines, by_all_products(bank, far, 1)[0], atol=1e-6)
    assert given_up.any()
    assert not given_up[:20].any()


def test_vectors_of_many_directions_are_not_grouped() -> None:
    bank = unit(np.random.default_rng(1).normal(size=(3000, 256)))
    assert not is_grouped(Nearest(bank, 1, "int8"))
    assert not is_grouped(Nearest(near_planes(1, 2000, 256), 1, "int8"))  # few are searched at once


def test_halves_hold_everything_once() -> None:
    vectors = np.random.default_rng(1).normal(size=(1000, 8)).astype(np.float32)
    parts = halved(vectors, 48)
    assert all(0 < len(part) <= 48 for part in parts)
    assert len(parts) == -(-1000 // 48)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    assert [len(part) for part in halved(np.ones((100, 8), np.float32), 48)] == [48, 48, 4]


def test_no_vector_of_a_group_is_nearer_than_its_sphere() -> None:
    bank, asked = near_planes(1, 1000, 256, noise=0.3), near_planes(2, 100, 256, noise=0.3)
    asked[3] = 0
    asked[4:9] = bank[:5]

    def read(at: slice, out: Array) -> None:
        out[:] = bank[at]

    groups = Groups.of(Basis.of(bank[::2]), len(bank), read, 256)
    gaps = np.sqrt(np.maximum(groups.squares(groups.basis.coordinates(asked)[0]) - 1e-5, 0)) - groups.radii
    distances = np.linalg.norm(asked[:, None].astype(np.float64) - bank, axis=2)
    for members, of_group in zip(groups.order, gaps.T, strict=True):
        assert (distances[:, members[members >= 0]].min(axis=1) >= of_group).all()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_all_instruction_sets_have_the_same_codes(instruction_set: str) -> None:
    bank = near_planes(1, 480, 256, noise=0.3)
    kernels = comparers._cpu
    heads, terms, tails = Basis.of(bank).first(kernels.CODED).coordinates(bank)
    shape = (len(bank) // kernels.GROUP, kernels.GROUP * kernels.CODES)
    expected, codes = (aligned_empty(shape, np.int16) for _ in range(2))
    lengths = kernels.code_bank(heads, terms, tails, expected, "portable")
    assert kernels.code_bank(heads, terms, tails, codes, instruction_set) == lengths
    np.testing.assert_array_equal(codes, expected)


def test_bounds_of_a_bank_hold_at_every_scale() -> None:
    rng = np.random.default_rng(11)
    middle = unit(rng.normal(size=(1, 256)))
    for apart in (0.0, 1e-7, 1e-4, 0.01, 0.1):
        bank, asked = (unit(middle + apart * rng.normal(size=(count, 256))) for count in (3000, 60))
        bank[5], asked[3], asked[4], asked[5] = -middle, -middle, 0, unit(rng.normal(size=256)[None])
        cosines, _ = Nearest(bank, 2, "int8").search(asked)
        np.testing.assert_allclose(cosines, by_all_products(bank, asked, 2)[0], atol=1e-6)
