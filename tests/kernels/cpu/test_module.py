"""The native CPU kernels, in every instruction set of this machine, against plain float64 NumPy."""

import numpy as np
import pytest

from zsad.kernels import reference
from zsad.kernels.cpu import arrays, comparers
from zsad.kernels.cpu.arrays import box_sum, empty_gram
from zsad.kernels.cpu.comparers import winning_patches

if comparers._cpu is None:
    pytest.skip("installed without a compiler: the native kernels are not there", allow_module_level=True)

PASS_SETS = comparers._cpu.instruction_sets("gram_pass")
INT8_SETS = comparers._cpu.instruction_sets("int8")
GRIDS = [(1, 1), (1, 7), (7, 1), (2, 3), (4, 4), (3, 11), (7, 7), (16, 2), (9, 13), (20, 17)]


def make_pair(seed: int, patches: int, channels: int, offset: float = 0.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(patches, channels)) + offset).astype(np.float32) for _ in range(2)]


def inverse_lengths(x: np.ndarray, grid: tuple[int, int], degrees) -> np.ndarray:
    return np.stack([arrays.inverse_lengths(box_sum(x, grid, degree)) for degree in degrees])


def cosines_by_definition(pair, grid: tuple[int, int], degree: int) -> np.ndarray:
    """All cosines [P, P] of the unit vectors of the filtered tokens, in float64; 0 for zero features."""
    left, right = (reference.box_mean(x, grid, degree) for x in pair)
    lengths = [np.linalg.norm(x, axis=1) for x in (left, right)]
    left, right = (x / np.where(n > 1e-9, n, 1)[:, None] for x, n in zip((left, right), lengths, strict=True))
    return left @ right.T


def run_pass(pair, grid, degrees, gram=None, **options) -> list[np.ndarray]:
    patches = len(pair[0])
    gram = pair[0] @ pair[1].T if gram is None else gram
    out = [np.full((len(degrees), patches), np.nan, np.float32) for _ in range(2)]
    comparers._cpu.gram_pass(gram, grid, degrees, *(inverse_lengths(x, grid, degrees) for x in pair), *out, **options)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", PASS_SETS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("degrees", [[1], [3], [1, 3, 5], [5, 3, 1], [7, 9], [3, 3], [9]])
def test_pass_equals_the_definition(instruction_set: str, grid: tuple[int, int], degrees: list[int]) -> None:
    pair = make_pair(1, grid[0] * grid[1], 19)
    left, right = run_pass(pair, grid, degrees, instruction_set=instruction_set)
    for r, degree in enumerate(degrees):
        cosines = cosines_by_definition(pair, grid, degree)
        np.testing.assert_allclose(left[r], cosines.max(axis=1), atol=2e-6)
        np.testing.assert_allclose(right[r], cosines.max(axis=0), atol=2e-6)


@pytest.mark.parametrize("instruction_set", PASS_SETS)
@pytest.mark.parametrize("grid", GRIDS)
def test_keys_name_the_winners(instruction_set: str, grid: tuple[int, int]) -> None:
    patches, degrees = grid[0] * grid[1], [1, 3, 5, 9]
    pair = make_pair(2, patches, 19)
    left, right = run_pass(pair, grid, degrees, keys=True, instruction_set=instruction_set)
    # A key gives up as many of its 23 mantissa bits as a patch number takes; it lies between 0 and 2.
    precision = 2.0 ** (comparers._cpu.index_mask(patches).bit_length() - 22)
    for r, degree in enumerate(degrees):
        cosines = cosines_by_definition(pair, grid, degree)
        for keys, rows in ((left[r], cosines), (right[r], cosines.T)):
            np.testing.assert_allclose(1 - keys, rows.max(axis=1), atol=precision + 2e-6)
            winners = winning_patches(keys, patches)
            assert winners.min() >= 0
            assert winners.max() < patches
            chosen = np.take_along_axis(rows, winners[:, None], axis=1)[:, 0]
            np.testing.assert_allclose(chosen, rows.max(axis=1), atol=precision + 2e-6)


@pytest.mark.parametrize("instruction_set", PASS_SETS)
@pytest.mark.parametrize("offset", [0.2, 1.0])
@pytest.mark.parametrize(
    ("grid", "degrees"), [((1, 1), [1]), ((2, 3), [3, 1]), ((7, 9), [1, 3, 5]), ((9, 13), [1, 7]), ((20, 17), [9, 1])]
)
def test_narrow_keys_are_off_by_a_few_counts(
    instruction_set: str, grid: tuple[int, int], degrees: list[int], offset: float
) -> None:
    pair = make_pair(16, grid[0] * grid[1], 256, offset)
    pair[1][1:2] = 0
    options = {"keys": True, "instruction_set": instruction_set}
    wide, found = (run_pass(pair, grid, degrees, narrow=narrow, **options) for narrow in (False, True))
    for r, degree in enumerate(degrees):
        for before, keys in zip(wide, found, strict=True):
            assert (keys[r] != before[r]).mean() > 0.5 or instruction_set != "avx512"
        cosines = cosines_by_definition(pair, grid, degree)
        for keys, rows in zip((found[0][r], found[1][r]), (cosines, cosines.T), strict=True):
            np.testing.assert_allclose(1 - keys, rows.max(axis=1), atol=3e-3)
            chosen = np.take_along_axis(rows, winning_patches(keys, len(rows))[:, None], axis=1)[:, 0]
            assert (rows.max(axis=1) - chosen).max() < 3e-3
            assert np.abs(1 - keys - rows.max(axis=1)).mean() < 8e-4


@pytest.mark.parametrize(
    ("degrees", "length", "shared", "window"),
    [([1, 3], 9.0, 1.0, None), ([3], 1.0, 1.0, None), ([1, 3], 1.0, 9.0, None), ([1, 3], 1.0, 1.0, 4)],
)
def test_what_sixteen_bits_cannot_hold_is_done_in_floats(
    degrees: list[int], length: float, shared: float, window: int | None
) -> None:
    """Tokens of very unequal length; no single tokens that would bound sums; all of them alike; windows."""
    pair = make_pair(17, 63, 64, shared)
    pair[0][5] *= length
    pair[1][40] *= length
    options = {"keys": True, "window": window}
    wide, narrow = (run_pass(pair, (7, 9), degrees, narrow=narrow, **options) for narrow in (False, True))
    np.testing.assert_array_equal(narrow, wide)


@pytest.mark.skipif("avx512" not in PASS_SETS, reason="16 bits are for AVX-512 alone")
@pytest.mark.parametrize("grid", [(7, 9), (2, 37)])
def test_sixteen_bits_are_used_where_they_are_enough(grid: tuple[int, int]) -> None:
    """Even of an image and itself, whose patches differ from those at other places."""
    pair = 2 * make_pair(17, grid[0] * grid[1], 64, 1.0)[:1]
    wide, narrow = (run_pass(pair, grid, [1, 3], narrow=narrow, keys=True) for narrow in (False, True))
    assert (wide[0] != narrow[0]).mean() > 0.5


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("instruction_set", PASS_SETS)
@pytest.mark.parametrize(("grid", "degrees", "window"), [((5, 7), [1], 0), ((20, 17), [1, 3], 2), ((9, 30), [5, 9], 1)])
def test_windows_read_and_find_what_is_near_alone(
    instruction_set: str, grid: tuple[int, int], degrees: list[int], window: int, keys: bool
) -> None:
    pair = make_pair(15, grid[0] * grid[1], 19)
    gram, row = pair[0] @ pair[1].T, np.arange(len(pair[0])) // grid[1]
    needed = np.abs(row[:, None] - row) <= window + 2 * (max(degrees) // 2)
    gram[~needed] = 1e30
    left, right = run_pass(pair, grid, degrees, gram, keys=keys, window=window, instruction_set=instruction_set)
    near = reference.cells_apart(grid) <= window
    precision = 2.0 ** (comparers._cpu.index_mask(len(gram)).bit_length() - 22) if keys else 0
    for r, degree in enumerate(degrees):
        cosines = np.where(near, cosines_by_definition(pair, grid, degree), -np.inf)
        for best, rows in ((left[r], cosines), (right[r], cosines.T)):
            np.testing.assert_allclose(1 - best if keys else best, rows.max(axis=1), atol=precision + 3e-6)
            if keys:
                chosen = np.take_along_axis(rows, winning_patches(best, len(gram))[:, None], axis=1)[:, 0]
                np.testing.assert_allclose(chosen, rows.max(axis=1), atol=precision + 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", PASS_SETS)
def test_keys_tell_close_neighbours_apart(instruction_set: str) -> None:
    # 4096 patches take 12 of 23 bits; cosines of 1 - 1e-5 and closer must not lose what tells them apart.
    grid, patches = (64, 64), 4096
    rng = np.random.default_rng(14)
    left = rng.normal(size=(patches, 6)).astype(np.float32)
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    right = (left + 1e-3 * rng.normal(size=left.shape)).astype(np.float32)
    keys, _ = run_pass([left, right], grid, [1], keys=True, instruction_set=instruction_set)
    unit = right / np.linalg.norm(right, axis=1, keepdims=True).astype(np.float64)
    cosines = left.astype(np.float64) @ unit.T
    chosen = np.take_along_axis(cosines, winning_patches(keys[0], patches)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, cosines.max(axis=1), atol=1e-6)


@pytest.mark.parametrize(("keys", "narrow"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("instruction_set", PASS_SETS)
def test_only_negative_cosines(instruction_set: str, keys: bool, narrow: bool) -> None:
    left, right = make_pair(3, 35, 8, offset=4.0)
    pair = [left, -right]
    options = {"keys": keys, "narrow": narrow, "instruction_set": instruction_set}
    best_left, best_right = run_pass(pair, (5, 7), [1, 3, 5], **options)
    bound = 4e-4 if narrow else 1e-4 if keys else 2e-6
    for r, degree in enumerate([1, 3, 5]):
        cosines = cosines_by_definition(pair, (5, 7), degree)
        assert cosines.max() < 0
        for best, rows in ((best_left[r], cosines), (best_right[r], cosines.T)):
            np.testing.assert_allclose(1 - best if keys else best, rows.max(axis=1), atol=bound)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("instruction_set", PASS_SETS)
def test_zero_features_have_cosine_zero(instruction_set: str, keys: bool) -> None:
    left, right = make_pair(4, 25, 8)
    right[:] = 0
    left[7] = 0
    for best in run_pass([left, right], (5, 5), [1, 3], keys=keys, instruction_set=instruction_set):
        np.testing.assert_allclose(1 - best if keys else best, 0, atol=1e-5)


@pytest.mark.parametrize("instruction_set", PASS_SETS)
def test_rows_of_the_gram_may_be_apart(instruction_set: str) -> None:
    grid, degrees = (6, 7), [1, 3, 5]
    pair = make_pair(5, 42, 12)
    store = np.full((42, 101), np.nan, np.float32)
    gram = store[:, 3:45]  # unaligned, poison on both sides
    np.matmul(pair[0], pair[1].T, out=gram)
    expected = run_pass(pair, grid, degrees, instruction_set=instruction_set)
    for got, want in zip(run_pass(pair, grid, degrees, gram, instruction_set=instruction_set), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_pass_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="no such kernel"):
        comparers._cpu.instruction_sets("abacus")
    pair = make_pair(6, 12, 5)
    for grid, degrees, options, message in (
        ((3, 5), [1], {}, "P = rows"),
        ((0, 4), [1], {}, "at least one row"),
        ((3, 4), [], {}, "at least one degree"),
        ((3, 4), [2], {}, "odd"),
        ((3, 4), [11], {}, "at most 9"),
        ((3, 4), [1], {"instruction_set": "abacus"}, "abacus"),
        ((3, 4), [1], {"window": -1}, "negative"),
    ):
        inverse, out = np.ones((len(degrees), 12), np.float32), np.empty((len(degrees), 12), np.float32)
        with pytest.raises(ValueError, match=message):
            comparers._cpu.gram_pass(pair[0] @ pair[1].T, grid, degrees, inverse, inverse, out, out.copy(), **options)
    inverse, out = np.ones((1, 12), np.float32), np.empty((1, 12), np.float32)
    gram = pair[0] @ pair[1].T
    with pytest.raises(ValueError, match="contiguous rows"):
        comparers._cpu.gram_pass(gram.T, (3, 4), [1], inverse, inverse, out, out.copy())
    with pytest.raises(ValueError, match=r"\[R, P\]"):
        comparers._cpu.gram_pass(gram, (3, 4), [1, 3], inverse, inverse, out, out.copy())


@pytest.mark.parametrize("instruction_set", comparers._cpu.instruction_sets("pool"))
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("channels", [1, 16, 45])
def test_pooling(instruction_set: str, grid: tuple[int, int], channels: int) -> None:
    patches, degrees = grid[0] * grid[1], [1, 3, 5, 9, 15]
    x = make_pair(11, patches, channels)[0]
    x[patches // 2] = 0
    inverse = np.full((5, patches), np.nan, np.float32)
    unit = np.full((5, patches, channels), np.nan, np.float32)
    comparers._cpu.pool(x, grid, degrees, reference.ZERO_NORM, inverse, unit, instruction_set)
    for r, degree in enumerate(degrees):
        pooled = reference.box_mean(x, grid, degree) * degree**2
        lengths = np.linalg.norm(pooled, axis=1)
        directed = lengths > 1e-4  # in between, rounding decides
        np.testing.assert_allclose(inverse[r][directed], 1 / lengths[directed], rtol=2e-4)
        np.testing.assert_allclose(unit[r][directed], pooled[directed] / lengths[directed, None], atol=2e-4)
    assert inverse[0, patches // 2] == 0
    assert not unit[0, patches // 2].any()
    alone = np.empty_like(inverse)
    comparers._cpu.pool(x, grid, degrees, reference.ZERO_NORM, alone, instruction_set=instruction_set)
    np.testing.assert_array_equal(alone, inverse)
    for arguments, message in (
        ((x, (grid[0], grid[1] + 1), degrees), "P = rows"),
        ((x, grid, [2]), "odd"),
        ((x, grid, [1]), r"\[R, P\]"),
    ):
        with pytest.raises(ValueError, match=message):
            comparers._cpu.pool(*arguments, 0.0, inverse, unit)


def quantise(x: np.ndarray, instruction_set: str, mean: np.ndarray | None = None, near: bool = False) -> np.ndarray:
    codes = np.full(comparers._cpu.int8_bytes(*x.shape), 0xAA, np.uint8)
    mean = np.zeros(x.shape[1], np.float32) if mean is None else mean
    comparers._cpu.int8_quantise(x, mean, codes, instruction_set, near)
    return codes


@pytest.mark.parametrize("instruction_set", INT8_SETS)
@pytest.mark.parametrize("patches", [1, 7, 16, 49, 100])
@pytest.mark.parametrize("channels", [1, 3, 16, 50, 128, 384, 513])
def test_int8_gram(instruction_set: str, patches: int, channels: int) -> None:
    pair = make_pair(7, patches, channels)
    if patches > 2:
        pair[0][2] = 0
    gram = empty_gram(patches)
    gram[:] = np.nan
    comparers._cpu.int8_multiply(*(quantise(x, instruction_set) for x in pair), gram, instruction_set=instruction_set)
    exact = pair[0].astype(np.float64) @ pair[1].T
    # Rounding moves every code by at most half a step; with C independent errors the sum grows with its root.
    steps = [np.abs(x).max(axis=1) / 127 for x in pair]
    lengths = [np.linalg.norm(x, axis=1) for x in pair]
    bound = 4 * (steps[0][:, None] * lengths[1] + lengths[0][:, None] * steps[1])
    assert (np.abs(gram - exact) <= bound + 1e-6).all()


@pytest.mark.parametrize("instruction_set", INT8_SETS)
@pytest.mark.parametrize("patches", [1, 40, 333])
@pytest.mark.parametrize("apart", [0, 5, 70, 400])
def test_int8_gram_near_the_diagonal(instruction_set: str, patches: int, apart: int) -> None:
    codes = [quantise(x, instruction_set) for x in make_pair(16, patches, 30)]
    whole, part = empty_gram(patches), empty_gram(patches)
    part[:] = np.nan
    comparers._cpu.int8_multiply(*codes, whole, instruction_set=instruction_set)
    comparers._cpu.int8_multiply(*codes, part, apart, instruction_set)
    number = np.arange(patches)
    near = np.abs(number[:, None] - number) <= apart
    np.testing.assert_array_equal(part[near], whole[near])
    assert np.isnan(part).any() or patches <= 2 * apart + 64  # the rest costs time


@pytest.mark.parametrize("instruction_set", INT8_SETS)
def test_a_common_mean_takes_no_part_in_the_rounding(instruction_set: str) -> None:
    rng = np.random.default_rng(12)
    left, right = make_pair(13, 40, 90)
    mean = (100 * rng.normal(size=90)).astype(np.float32)
    gram, centred = empty_gram(40), empty_gram(40)
    comparers._cpu.int8_multiply(
        *(quantise(x, instruction_set) for x in (left, right)), centred, instruction_set=instruction_set
    )
    codes = [quantise(x + mean, instruction_set, mean) for x in (left, right)]
    comparers._cpu.int8_multiply(*codes, gram, instruction_set=instruction_set)
    exact = (left + mean).astype(np.float64) @ (right + mean).T.astype(np.float64)
    error = np.abs(centred - left.astype(np.float64) @ right.T).max()
    np.testing.assert_allclose(gram, exact, atol=error + 1e-6 * exact.max())


@pytest.mark.parametrize("instruction_set", INT8_SETS)
@pytest.mark.parametrize("apart", [0.01, 0.1, 0.5])
def test_products_of_near_tokens_are_off_in_proportion_to_how_far_they_are_apart(
    instruction_set: str, apart: float
) -> None:
    x, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in make_pair(17, 100, 384))
    pair, mean = (x, x + np.float32(apart) * other), 0.02 * make_pair(18, 1, 384)[0][0]
    errors = []
    for near in (False, True):
        gram = empty_gram(100)
        comparers._cpu.int8_multiply(
            *(quantise(x, instruction_set, mean, near) for x in pair), gram, instruction_set=instruction_set
        )
        errors.append(np.std(np.diagonal(gram - pair[0].astype(np.float64) @ pair[1].T)))
    assert errors[1] < 1.5 * apart * errors[0] + 3e-5  # and the product of what both roundings leave


@pytest.mark.parametrize("channels", [6, 64, 200])
def test_int8_instruction_sets_agree(channels: int) -> None:
    pair, mean = make_pair(8, 61, channels), make_pair(9, 1, channels)[0][0]
    grams = []
    for instruction_set in INT8_SETS:
        grams.append(empty_gram(61))
        codes = [quantise(x, instruction_set, mean) for x in pair]
        comparers._cpu.int8_multiply(*codes, grams[-1], instruction_set=instruction_set)
        np.testing.assert_allclose(grams[-1], grams[0], atol=1e-4)  # the integers are the same


@pytest.mark.parametrize("instruction_set", INT8_SETS)
def test_int8_products_of_the_largest_codes_do_not_overflow(instruction_set: str) -> None:
    # The transform is its own inverse, so that applied to random signs beforehand it makes every code ±127.
    rng = np.random.default_rng(9)
    walsh = np.ones((1, 1))
    for _ in range(11):
        walsh = np.block([[walsh, walsh], [walsh, -walsh]])
    signs = rng.choice([-1.0, 1.0], size=(20, 2048))
    signs[3], signs[4] = 1, -1
    x = (signs @ walsh / np.sqrt(2048)).astype(np.float32)
    gram = empty_gram(20)
    comparers._cpu.int8_multiply(*(quantise(x, instruction_set),) * 2, gram, instruction_set=instruction_set)
    np.testing.assert_allclose(gram, signs @ signs.T, rtol=1e-5, atol=1e-2)


def test_int8_refuses_what_does_not_fit() -> None:
    x = np.zeros((20, 8), np.float32)
    codes = quantise(x, "")
    with pytest.raises(ValueError, match="int8_bytes"):
        comparers._cpu.int8_quantise(x, x[0], codes[:-1])
    with pytest.raises(ValueError, match="mean"):
        comparers._cpu.int8_quantise(x, x[0, 1:], codes)
    with pytest.raises(ValueError, match="rounded up"):
        comparers._cpu.int8_multiply(codes, codes, np.empty((20, 20), np.float32))
    with pytest.raises(ValueError, match="int8_bytes"):
        comparers._cpu.int8_multiply(codes, quantise(np.zeros((20, 12), np.float32), ""), empty_gram(20))
    with pytest.raises(ValueError, match="int8_bytes"):
        comparers._cpu.int8_multiply(codes[1:], codes[1:], empty_gram(20))
    with pytest.raises(ValueError, match="channels"):
        comparers._cpu.int8_multiply(codes[:3], codes[:3], empty_gram(20))
    with pytest.raises(ValueError, match="channels"):
        comparers._cpu.int8_bytes(20, 0)
    with pytest.raises(ValueError, match="abacus"):
        comparers._cpu.int8_quantise(x, x[0], codes, "abacus")


@pytest.mark.parametrize("instruction_set", comparers._cpu.instruction_sets("winner_cosines"))
@pytest.mark.parametrize("channels", [1, 5, 16, 50, 96])
def test_winner_cosines(instruction_set: str, channels: int) -> None:
    rng = np.random.default_rng(10)
    images, patches, ranks, first = 5, 9, 3, 4
    left = rng.normal(size=(patches, channels)).astype(np.float32)
    right = rng.normal(size=(images, patches, channels)).astype(np.float32)
    image = rng.integers(0, 2 * first + images, (ranks, patches)).astype(np.int32)  # some are not resident
    patch = rng.integers(0, patches, (ranks, patches)).astype(np.int32)
    cosines = np.full((ranks, patches), 7, np.float32)
    comparers._cpu.winner_cosines(left, right, first, image, patch, cosines, instruction_set)
    resident = (image >= first) & (image < first + images)
    assert resident.any()
    assert not resident.all()
    chosen = right[np.where(resident, image - first, 0), patch].astype(np.float64)  # [K, P, C]
    np.testing.assert_allclose(cosines, np.where(resident, (chosen * left).sum(axis=2), 7), atol=1e-4)
    with pytest.raises(ValueError, match="0 to Q - 1"):
        comparers._cpu.winner_cosines(left, right, first, image, patch + np.int32(1), cosines)
    with pytest.raises(ValueError, match=r"\[K, P\]"):
        comparers._cpu.winner_cosines(left, right, first, image[:, 1:].copy(), patch, cosines)


@pytest.mark.parametrize("instruction_set", comparers._cpu.instruction_sets("winner_cosines"))
def test_winner_cosines_of_images_with_other_numbers_of_patches(instruction_set: str) -> None:
    rng = np.random.default_rng(11)
    left = rng.normal(size=(9, 20)).astype(np.float32)
    right = rng.normal(size=(3, 2, 20)).astype(np.float32)
    image = rng.integers(0, 3, (4, 9)).astype(np.int32)
    patch = rng.integers(0, 2, (4, 9)).astype(np.int32)
    cosines = np.empty((4, 9), np.float32)
    comparers._cpu.winner_cosines(left, right, 0, image, patch, cosines, instruction_set)
    np.testing.assert_allclose(cosines, (right[image, patch] * left).sum(axis=2), atol=1e-5)


@pytest.mark.parametrize("instruction_set", comparers._cpu.instruction_sets("measured_best"))
@pytest.mark.parametrize(("runs", "wanted", "all_"), [(1, 1, False), (2, 3, True), (3, 5, False)])
def test_the_best_of_candidates_are_measured(instruction_set: str, runs: int, wanted: int, all_: bool) -> None:
    rng = np.random.default_rng(18)
    queries, bank = (rng.normal(size=(n, 37)) / 37**0.5 for n in (50, 90))
    bank[45:] = bank[:45]  # of equal ones the lower number comes first
    inverse = np.where(np.arange(90) % 45 < 20, 0.6, 1.0)
    exact = queries @ (bank * inverse[:, None]).T
    errors = rng.uniform(0.05, 0.2, 50)
    others = np.delete(np.arange(90), [0, 45])
    numbers = np.stack([rng.permutation(others)[: 8 * runs].reshape(runs, 8) for _ in range(50)], axis=1)
    values = exact[np.arange(50)[:, None], numbers] + errors[:, None] * rng.uniform(-1, 1, numbers.shape)
    numbers[:, :, 6:], values[:, :, 6:] = -1, np.finfo(np.float32).min
    numbers[0, :25, 6:] = [0, 45]  # twins, in a run that is full
    values[0, :25, 6:] = exact[:25, [0, 45]]

    candidates = np.full((50, 90), -9.0)
    for run in numbers:
        rows, columns = np.nonzero(run >= 0)
        candidates[rows, run[rows, columns]] = exact[rows, run[rows, columns]]
    order = np.argsort(-candidates.round(9), axis=1, kind="stable")[:, :wanted]
    best = np.take_along_axis(candidates, order, axis=1)
    cosines, indices = np.empty((50, wanted), np.float32), np.empty((50, wanted), np.int64)
    doubtful, floats = np.empty(50, np.bool_), [x.astype(np.float32) for x in (queries, values, errors, bank, inverse)]
    arguments = (*floats[:2], numbers.astype(np.int32), *floats[2:], all_, cosines, indices, doubtful)
    comparers._cpu.measured_best(*arguments, instruction_set)
    np.testing.assert_allclose(cosines, best.clip(-1, 1), atol=1e-6)
    np.testing.assert_array_equal(indices, order)
    missed = values.min(axis=2).max(axis=0) + errors >= best[:, -1]
    np.testing.assert_array_equal(doubtful, missed & (not all_))
    assert missed.any()
    assert not missed.all()
    with pytest.raises(ValueError, match="up to M - 1"):
        comparers._cpu.measured_best(*arguments[:4], floats[3][:44], None, *arguments[6:])
    with pytest.raises(ValueError, match=r"\[G, Q, K\]"):
        comparers._cpu.measured_best(*arguments[:2], arguments[2][:, 1:], *arguments[3:])


@pytest.mark.parametrize("instruction_set", INT8_SETS)
@pytest.mark.parametrize(("left", "right"), [(1, 40), (20, 1), (9, 100), (33, 16)])
def test_int8_product_of_different_numbers_of_patches(instruction_set: str, left: int, right: int) -> None:
    x, y = make_pair(12, left, 64)[0], make_pair(13, right, 64)[0]
    gram = np.full((left, 112), np.nan, np.float32)[:, :right]
    comparers._cpu.int8_multiply(*(quantise(z, instruction_set) for z in (x, y)), gram, instruction_set=instruction_set)
    np.testing.assert_allclose(gram, x @ y.T, atol=1.0)


@pytest.mark.parametrize("instruction_set", INT8_SETS)
@pytest.mark.parametrize(("left", "right"), [(1, 1), (1, 40), (20, 1), (16, 33), (70, 50), (100, 129)])
@pytest.mark.parametrize("channels", [1, 50, 64, 384])
def test_int8_nearest(instruction_set: str, left: int, right: int, channels: int) -> None:
    degrees, names = 2, ("left", "right")
    numbers = {"left": left, "right": right}
    codes, grams = {name: [] for name in names}, []
    for degree in range(degrees):
        mean = 0.1 * make_pair(30 + degree, 1, channels)[0][0]
        for seed, name in enumerate(names):
            x = make_pair(20 + 2 * degree + seed, numbers[name], channels)[0]
            codes[name].append(quantise(x / np.linalg.norm(x, axis=1, keepdims=True), instruction_set, mean))
        grams.append(np.empty((left, 144), np.float32)[:, :right])
        pair = codes["left"][-1], codes["right"][-1]
        comparers._cpu.int8_multiply(*pair, grams[-1], instruction_set=instruction_set)
    best = {name: np.full((degrees, numbers[name]), np.nan, np.float32) for name in names}
    stacked = [np.stack(codes[name]) for name in names]
    comparers._cpu.int8_nearest(*stacked, best["left"], best["right"], instruction_set)
    for degree, gram in enumerate(grams):
        for name, cosines in (("left", gram), ("right", gram.T)):
            keys = best[name][degree]
            winners = winning_patches(keys, cosines.shape[1])
            numbered = int(comparers._cpu.index_mask(cosines.shape[1])).bit_length()
            rounding = 2.0 ** (numbered + 1 - 23)  # of keys, whose lowest bits are a number
            nearest = np.maximum(1 - cosines.max(axis=1), 0)
            np.testing.assert_allclose(keys, nearest, atol=1e-6, rtol=rounding)
            chosen = np.maximum(1 - cosines[np.arange(len(cosines)), winners], 0)
            np.testing.assert_allclose(chosen, nearest, atol=1e-6, rtol=2 * rounding)


def test_int8_nearest_refuses_what_does_not_fit() -> None:
    codes = np.stack([quantise(np.zeros((20, 8), np.float32), "")] * 2)
    best = np.zeros((2, 20), np.float32)
    with pytest.raises(ValueError, match="a row for each degree"):
        comparers._cpu.int8_nearest(codes, codes, best, best[:1])
    with pytest.raises(ValueError, match="int8_bytes"):
        comparers._cpu.int8_nearest(codes, codes[:, 1:].copy(), best, best)
    with pytest.raises(ValueError, match="than a key can name"):
        comparers._cpu.int8_nearest(codes, codes, np.zeros((2, 65537), np.float32), best)


@pytest.mark.parametrize("instruction_set", comparers._cpu.instruction_sets("running_top"))
@pytest.mark.parametrize("columns", [1, 63, 64, 200])
@pytest.mark.parametrize("kept", [1, 4, 47])
def test_running_top(instruction_set: str, columns: int, kept: int) -> None:
    rng = np.random.default_rng(14)
    store = rng.integers(-5, 90, (7, 3 * columns + 5)).astype(np.float32)  # many are equal
    store[3] = -store[3]
    values, indices = np.full((7, kept), -3e38, np.float32), np.full((7, kept), -1, np.int32)
    for chunk in range(3):
        products = store[:, chunk * columns : (chunk + 1) * columns]  # with something else behind it
        comparers._cpu.running_top(products, 10 + chunk * columns, values, indices, instruction_set)
    order = np.argsort(-store[:, : 3 * columns], axis=1, kind="stable")[:, :kept]
    np.testing.assert_array_equal(indices[:, : order.shape[1]], 10 + order)
    np.testing.assert_array_equal(values[:, : order.shape[1]], np.take_along_axis(store, order, axis=1))
    assert (indices[:, order.shape[1] :] == -1).all()


def test_running_top_refuses_what_does_not_fit() -> None:
    products, values, indices = np.zeros((3, 8), np.float32), np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int32)
    with pytest.raises(ValueError, match="contiguous rows"):
        comparers._cpu.running_top(products[:, ::2], 0, values, indices)
    with pytest.raises(ValueError, match=r"\[P, K\]"):
        comparers._cpu.running_top(products, 0, values, indices[:2])
    with pytest.raises(ValueError, match="abacus"):
        comparers._cpu.running_top(products, 0, values, indices, "abacus")


@pytest.mark.parametrize("instruction_set", INT8_SETS)
@pytest.mark.parametrize(
    ("patches", "columns", "channels", "kept"), [(1, 1, 3, 1), (9, 40, 50, 5), (67, 133, 130, 24), (300, 33, 2048, 3)]
)
def test_int8_running_top(instruction_set: str, patches: int, columns: int, channels: int, kept: int) -> None:
    left, right = make_pair(18, patches, channels)[0], make_pair(19, columns + 20, channels)[0]
    codes = [quantise(x, instruction_set) for x in (left, right)]
    gram = arrays.aligned_empty((patches, -(-(columns + 20) // 16) * 16), np.float32)[:, : columns + 20]
    comparers._cpu.int8_multiply(*codes, gram, instruction_set=instruction_set)
    values = np.full((patches, kept), np.finfo(np.float32).min, np.float32)
    indices = np.full((patches, kept), -1, np.int32)
    expected = values.copy(), indices.copy()
    for first in (10, 10 + columns):  # the second time nothing is larger
        comparers._cpu.int8_running_top(codes[0], codes[1][None], columns, first, values, indices, instruction_set)
        comparers._cpu.running_top(gram[:, :columns], first, *expected)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(indices, expected[1])


@pytest.mark.parametrize("instruction_set", INT8_SETS)
def test_int8_running_top_takes_what_is_within_a_margin_of_the_best(instruction_set: str) -> None:
    left, right = make_pair(18, 37, 50)[0], make_pair(19, 133, 50)[0]
    codes = [quantise(x, instruction_set) for x in (left, right)]
    gram = arrays.aligned_empty((37, 144), np.float32)[:, :133]
    comparers._cpu.int8_multiply(*codes, gram, instruction_set=instruction_set)
    second = np.sort(gram, axis=1)[:, -2]
    margins = np.linspace(0, np.ptp(gram) / 2, 37, dtype=np.float32)
    values, indices = np.full((37, 133), np.finfo(np.float32).min, np.float32), np.full((37, 133), -1, np.int32)
    quantised = codes[0], codes[1][None]
    comparers._cpu.int8_running_top(*quantised, 133, 7, values, indices, instruction_set, margins=margins, wanted=2)
    np.testing.assert_array_equal(values[:, :2], np.sort(gram, axis=1)[:, :-3:-1])
    for row, numbers in enumerate(indices):
        found = numbers[numbers >= 0] - 7
        np.testing.assert_array_equal(values[row, : len(found)], gram[row, found])
        assert set(np.flatnonzero(gram[row] > second[row] - margins[row])) <= set(found)
    assert (indices[0] < 0).any()
    with pytest.raises(ValueError, match=r"margins must be \[P\]"):
        comparers._cpu.int8_running_top(*quantised, 133, 7, values, indices, margins=margins[1:])
    with pytest.raises(ValueError, match="wanted must be 1 to K"):
        comparers._cpu.int8_running_top(*quantised, 133, 7, values, indices, margins=margins, wanted=134)


@pytest.mark.parametrize("instruction_set", INT8_SETS)
@pytest.mark.parametrize("kept", [3, 8, 40])
def test_int8_running_top_leaves_out_only_what_is_far_from_the_best_or_too_much(
    instruction_set: str, kept: int
) -> None:
    left, right = make_pair(18, 200, 50)[0], make_pair(19, 600, 50)[0]
    values = np.full((200, kept), np.finfo(np.float32).min, np.float32)
    indices, products = np.full((200, kept), -1, np.int32), []
    margins = np.linspace(0, 3, 200, dtype=np.float32)
    for first in range(0, 600, 40):  # rows are full by then, of what was near the best that there was before
        codes = [quantise(x, instruction_set) for x in (left, right[first : first + 40])]
        gram = arrays.aligned_empty((200, 48), np.float32)[:, :40]
        comparers._cpu.int8_multiply(*codes, gram, instruction_set=instruction_set)
        products.append(gram)
        top = codes[0], codes[1][None], 40, first, values, indices
        comparers._cpu.int8_running_top(*top, instruction_set, margins=margins, wanted=2)
    every = np.concatenate(products, axis=1)
    np.testing.assert_array_equal(values[:, :2], np.sort(every, axis=1)[:, :-3:-1])
    assert (np.take_along_axis(every, indices.clip(0), axis=1) == values)[indices >= 0].all()
    for row, numbers in enumerate(indices):
        every[row, numbers[numbers >= 0]] = -np.inf  # what is left was left out
    enough = np.maximum(values[:, 1] - margins, values.min(axis=1))
    assert (every.max(axis=1) <= enough).all()


@pytest.mark.parametrize("instruction_set", INT8_SETS)
@pytest.mark.parametrize("margin", [None, 0.5])
def test_int8_running_top_takes_several_chunks_as_one_after_the_other(
    instruction_set: str, margin: float | None
) -> None:
    left, right = make_pair(18, 50, 40)[0], make_pair(19, 96, 40)[0]
    codes, *chunks = (quantise(x, instruction_set) for x in (left, *np.split(right, 3)))
    margins = None if margin is None else np.full(50, margin, np.float32)

    def best() -> tuple[np.ndarray, np.ndarray]:
        return np.full((50, 9), np.finfo(np.float32).min, np.float32), np.full((50, 9), -1, np.int32)

    together, apart = best(), best()
    comparers._cpu.int8_running_top(codes, np.stack(chunks), 90, 5, *together, instruction_set, margins=margins)
    for number, chunk in enumerate(chunks):
        columns, first = min(32, 90 - 32 * number), 5 + 32 * number
        comparers._cpu.int8_running_top(codes, chunk[None], columns, first, *apart, instruction_set, margins=margins)
    for found, expected in zip(together, apart, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_int8_running_top_refuses_what_does_not_fit() -> None:
    codes = quantise(np.zeros((20, 8), np.float32), "")
    values, indices = np.zeros((20, 4), np.float32), np.zeros((20, 4), np.int32)
    for arguments, message in (
        ((codes, codes[None], 33, 0, values, indices), "room for the columns"),
        ((codes, codes[None], 0, 0, values, indices), "room for the columns"),
        ((codes, codes[None, :-64], 20, 0, values, indices), "int8_bytes"),
        ((codes, codes[None, :0], 20, 0, values, indices), "at least one patch"),
        ((codes, codes[None], 20, 0, values, indices[1:]), r"\[P, K\]"),
        ((codes, codes[None], 20, 0, values[:0], indices[:0]), "at least one patch"),
    ):
        with pytest.raises(ValueError, match=message):
            comparers._cpu.int8_running_top(*arguments)


@pytest.mark.parametrize("instruction_set", comparers._cpu.instruction_sets("unit_vectors"))
@pytest.mark.parametrize("channels", [1, 31, 32, 100])
def test_unit_vectors(instruction_set: str, channels: int) -> None:
    x = make_pair(20, 9, channels + 3)[0][:, :channels]
    x *= 10.0 ** np.linspace(-30, 30, 9, dtype=np.float32)[:, None]
    x[2], x[4, -1] = 0, np.inf
    units, lengths = np.full((9, channels), np.nan, np.float32), np.empty(9)
    comparers._cpu.unit_vectors(x, units, lengths, instruction_set)
    exact = np.linalg.norm(x.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, exact, rtol=1e-12)
    finite = np.arange(9) != 4
    exact = np.where(exact > 0, exact, 1)[finite, None]
    np.testing.assert_allclose(units[finite], x[finite] / exact, rtol=1e-6)
    with pytest.raises(ValueError, match=r"lengths \[N\]"):
        comparers._cpu.unit_vectors(x, units, lengths[1:])
    with pytest.raises(ValueError, match="contiguous"):
        comparers._cpu.unit_vectors(np.asfortranarray(make_pair(20, 9, 5)[0]), np.empty((9, 5), np.float32), lengths)


@pytest.mark.parametrize("instruction_set", comparers._cpu.instruction_sets("rank_sums"))
@pytest.mark.parametrize(("patches", "images"), [(1, 1), (3, 40), (16, 7), (50, 33)])
@pytest.mark.parametrize("ties", [False, True])
def test_rank_sums(instruction_set: str, patches: int, images: int, ties: bool) -> None:
    rng = np.random.default_rng(patches)
    x = rng.uniform(0, 2, (patches, images)).astype(np.float32)
    x = np.round(x * 2) / 2 * np.where(rng.random(x.shape) < 0.5, -0.0, 1).astype(np.float32) if ties else x
    x[0, 0], sums = np.inf, np.empty(patches)
    chosen = np.flatnonzero(rng.random(images) < 0.7).astype(np.int32)
    chosen = chosen[chosen > 0] if images > 1 else np.zeros(1, np.int32)
    if images == 1:
        x[0, 0] = -0.0
    count = len(chosen)
    for first, last in {(0, 1), (0, count), (count - 1, count), (count // 3, count // 3 + 1), (0, count // 2 + 1)}:
        for array in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
            comparers._cpu.rank_sums(array, chosen, first, min(last, count), sums, instruction_set)
            expected = np.sort(x[:, chosen].astype(np.float64), axis=1)[:, first:last].sum(axis=1)
            np.testing.assert_allclose(sums, expected, rtol=1e-12)


def test_rank_sums_refuse_what_is_not_there() -> None:
    x, sums = np.zeros((3, 4), np.float32), np.empty(3)
    for images, first, last, message in (
        ([0, 4], 0, 1, "0 to N - 1"),
        ([0, 1], 0, 3, "ranks"),
        ([0, 1], 1, 1, "ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            comparers._cpu.rank_sums(x, np.array(images, np.int32), first, last, sums)
    with pytest.raises(ValueError, match=r"sums \[P\]"):
        comparers._cpu.rank_sums(x, np.zeros(1, np.int32), 0, 1, sums[1:])
