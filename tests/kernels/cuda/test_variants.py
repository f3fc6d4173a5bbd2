"""The product variants, compiled for the host and run against float64 references; where there is a GPU, on it too."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import host_build
import kernel_checks
import numpy as np
import pytest
import variant_checks as checks
from device_scores import device_scores
from host_build import HostDevice, KernelError

from zsad.kernels import reference
from zsad.kernels.cuda import comparers, variants
from zsad.kernels.cuda import device as cuda_device
from zsad.kernels.cuda.comparers import choose_comparer
from zsad.kernels.cuda.device import Device

needs_compiler = pytest.mark.skipif(host_build.COMPILER is None, reason=host_build.MISSING_COMPILER)

seeds = itertools.count()
WARP = 32  # threads of the emulation's own tests


def run(kernel: str, grid: tuple[int, int], threads: int, arguments: Any, shared_bytes: int = 0) -> None:
    built = host_build.library(cuda_device.build_of(kernel)[0])
    host_build.run(built, kernel, grid, threads, arguments, shared_bytes, seed=next(seeds))


def run_warpgroups(kernel: str, grid: tuple[int, int], threads: int, arguments: Any, shared_bytes: int = 0) -> None:
    built = host_build.library(cuda_device.build_of(kernel)[0], host_build.WARPGROUPS)
    host_build.run(built, kernel, grid, threads, arguments, shared_bytes, seed=next(seeds))


both_forms = pytest.mark.parametrize("run", [run, run_warpgroups], ids=["warps", "warpgroups"])


MULTIPLY = """
  ZSAD_SHARED(unsigned char, shared);
  const int lane = threadIdx.x;
  copy_async(shared, 16 * lane, left + 16 * lane);
  if (lane < 16) copy_async(shared, 512 + 16 * lane, right + 16 * lane);
  close_copies();
  wait_for_copies<0>();
  __syncthreads();
  unsigned a[4], b[4];
  load_matrices(a, shared, 32 * (lane % 16) + 16 * (lane / 16));
  load_matrices(b, shared, 512 + 32 * (lane % 8) + 16 * (lane / 8 % 2));
  T sums[4] = {1, 2, 3, 4};
  multiply_add(sums, a, b[0], b[1]);
  for (int c = 0; c < 4; ++c) out[(lane / 4 + c / 2 * 8) * 8 + lane % 4 * 2 + c % 2] = sums[c];
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("is_int8", [False, True])
def test_emulated_tensor_cores_multiply(is_int8: bool) -> None:
    sums, factors = (np.int32, np.int8) if is_int8 else (np.float32, np.float16)
    name = "int" if is_int8 else "float"
    (multiply,) = host_build.probes(
        f"const unsigned char* left, const unsigned char* right, {name}* out",
        MULTIPLY.replace("T ", f"{name} "),
        threads=WARP,
    )
    depth = 32 if is_int8 else 16
    random = kernel_checks.rng(depth)
    a, b = (random.integers(-120, 121, (rows, depth)).astype(factors) for rows in (16, 8))
    out = host_build.fenced((16, 8), sums)
    multiply(host_build.copied(a), host_build.copied(b), out, shared_bytes=1024)
    start = np.tile(np.array([[1, 2], [3, 4]]).repeat(8, axis=0), 4)
    np.testing.assert_array_equal(out, a.astype(np.int64) @ b.astype(np.int64).T + start)


COPY = "ZSAD_SHARED(int, s);\nconst int lane = threadIdx.x;\n"


@pytest.mark.slow
@needs_compiler
def test_emulated_copies_land_at_the_wait_and_not_before() -> None:
    source, late, landed = (host_build.copied(np.arange(128, dtype=np.int32)) for _ in range(3))
    (copy,) = host_build.probes(
        "const int* source, int* late, int* landed",
        f"{COPY}for (int i = 0; i < 4; ++i) s[4 * lane + i] = 5;\n"
        "copy_async(s, 16 * lane, source + 4 * lane); close_copies(); close_copies(); wait_for_copies<2>();\n"
        "for (int i = 0; i < 4; ++i) late[4 * lane + i] = s[4 * lane + i];\n"
        "wait_for_copies<1>();\n"
        "for (int i = 0; i < 4; ++i) landed[4 * lane + i] = s[4 * lane + i];",
        threads=WARP,
    )
    copy(source, late, landed, shared_bytes=1024)
    assert (late == 0x7B7B7B7B).all()
    np.testing.assert_array_equal(landed, source)


REFUSED = [
    ("copy_async(s, 16 * lane, source + 4 * lane); close_copies();", "before its copies landed"),
    ("copy_async(s, 16 * lane, source + 4 * lane);", "before its copies landed"),
    ("copy_async(s, 16 * lane + 4, source + 4 * lane);", "unaligned address in shared"),
    ("copy_async(s, 16 * lane, source + 4 * lane + 2);", "reads an unaligned"),
    ("copy_async(s, 1024 + 16 * lane, source + 4 * lane);", "outside shared"),
    ("unsigned m[4]; load_matrices(m, source, 0);", "outside shared"),
    ("unsigned m[4]; load_matrices(m, s, 4 * lane);", "unaligned address in shared"),
    ("unsigned m[4]; if (lane < 31) load_matrices(m, s, 0);", "warp collective"),
]


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_emulation_refuses(number: int) -> None:
    bodies = [COPY + body for body, _ in REFUSED]
    launch = host_build.probes("const int* source", *bodies, threads=WARP)[number]
    with pytest.raises(KernelError, match=REFUSED[number][1]):
        launch(host_build.copied(np.zeros(128, np.int32)), shared_bytes=1024)


# Images of shared memory, copied as they are, and descriptors of factors in them.
GROUP = """
  ZSAD_SHARED(unsigned char, shared);
  for (int at = 16 * threadIdx.x; at < bytes; at += 16 * 128) copy_async(shared, at, image + at);
  close_copies();
  wait_for_copies<0>();
  SHOW
  __syncthreads();
  T sums[16][4];
  for (int i = 0; i < 64; ++i) sums[i / 4][i % 4] = i;
  MULTIPLY
  for (int i = 0; i < 64; ++i) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
    out[row * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i / 4][i % 4];
  }
  END
"""
ORDERED = "order_sums(sums); multiply_group(sums, a, b); close_products();"
ARGUMENTS = "const unsigned char* image, int bytes, unsigned long long a, unsigned long long b, T* out"
PRODUCTS = [
    ("show_copies();", "order_sums(sums); multiply_group(sums, a, b); multiply_group(sums, a, b); close_products();\n"
     "wait_for_products(sums);", ""),
    ("show_copies();", ORDERED, "wait_for_products(sums);"),
    ("", f"{ORDERED} wait_for_products(sums);", ""),
    ("show_copies();", "multiply_group(sums, a, b); close_products(); wait_for_products(sums);", ""),
    ("show_copies();", f"{ORDERED} wait_for_products(sums); multiply_group(sums, a, b);", "wait_for_products(sums);"),
    ("show_copies();", ORDERED, ""),
    ("show_copies();", "order_sums(sums); multiply_group(sums, a, b);", "wait_for_products(sums);"),
    ("show_copies();", f"{ORDERED} __syncthreads(); shared[16 * threadIdx.x] ^= 1; __syncthreads();"
     "wait_for_products(sums);", ""),
    ("show_copies();", f"a += threadIdx.x == 5; {ORDERED} wait_for_products(sums);", ""),
    ("show_copies();", f"a += 1ull << 44; {ORDERED} wait_for_products(sums);", ""),
    ("show_copies();", f"if (threadIdx.x < 96) {{ {ORDERED} wait_for_products(sums); }}", ""),
]  # fmt: skip


def group_probes(name: str) -> list[Any]:
    bodies = [
        GROUP.replace("T ", f"{name} ").replace("SHOW", show).replace("MULTIPLY", multiply).replace("END", end)
        for show, multiply, end in PRODUCTS
    ]
    parameters = ARGUMENTS.replace("T*", f"{name}*")
    return host_build.probes(parameters, *bodies, threads=128, defines=host_build.WARPGROUPS)


class Factors:
    """Two factors [rows, 32 bytes] in an image of shared memory, as the PTX ISA draws it, and their descriptors."""

    SIDES, END = (0, 8192), 8192 + 16384  # bytes of the image

    def __init__(self, width: int, dtype: Any) -> None:
        depth = 32 // np.dtype(dtype).itemsize
        random = kernel_checks.rng(width, depth)
        self.image = host_build.copied(np.full(self.END, 0x55, np.uint8))
        self.factors = [random.integers(-120, 121, (rows, depth)).astype(dtype) for rows in (64, 128)]
        self.descriptors = []
        for side, factor in zip(self.SIDES, self.factors, strict=True):
            pieces = factor.view(np.uint8).reshape(len(factor), 2, 16)
            first = width - 32 if width > 16 else 0  # byte of the rows: factors are the end of what is there
            run = 8 * width
            for row, piece in np.ndindex(len(factor), 2):
                if width == 16:  # not swizzled: all first halves, then all second ones
                    at = side + row * 16 + piece * 16 * len(factor)
                else:
                    column = (first // 16 + piece) ^ (row % 8 * width // 128)
                    at = side + row // 8 * run + row % 8 * width + 16 * column
                self.image[at : at + 16] = pieces[row, piece]
            start, leading = 1024 + side + first, 16 * len(factor) if width == 16 else 16
            swizzle = {16: 0, 128: 1, 64: 2, 32: 3}[width]
            self.descriptors.append(np.uint64(start >> 4 | leading >> 4 << 16 | run >> 4 << 32 | swizzle << 62))

    def launch(self, probe: Any, sums: Any) -> Any:
        """Return the probe's sums [64, 128]."""
        out = host_build.fenced((64, 128), sums)
        probe(self.image, np.int32(self.END), *self.descriptors, out, shared_bytes=self.END)
        return out

    def product(self) -> Any:
        a, b = (factor.astype(np.int64) for factor in self.factors)
        return a @ b.T

    @staticmethod
    def before() -> Any:
        """What the sums of a probe start at."""
        row, column = np.ogrid[:64, :128]
        return column // 8 * 4 + row // 8 % 2 * 2 + column % 2


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize(("name", "sums", "dtype"), [("float", np.float32, np.float16), ("int", np.int32, np.int8)])
def test_emulated_warpgroups_multiply(name: str, sums: Any, dtype: Any, width: int) -> None:
    factors = Factors(width, dtype)
    out = factors.launch(group_probes(name)[0], sums)
    np.testing.assert_array_equal(out, factors.before() + 2 * factors.product())


@pytest.mark.slow
@needs_compiler
def test_emulated_products_end_at_the_wait_and_not_before() -> None:
    assert (Factors(64, np.int8).launch(group_probes("int")[1], np.int32) == 0x7B7B7B7B).all()


REFUSALS = [  # of the probes after that
    *("not shown to it", "is not ordered", "is not ordered", "before its products ended", "before its products ended"),
    *("overwritten before it has", "different factors", "outside shared memory", "leaves out a product"),
]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_emulation_refuses_products(number: int) -> None:
    with pytest.raises(KernelError, match=REFUSALS[number]):
        Factors(64, np.int8).launch(group_probes("int")[2 + number], np.int32)


@needs_compiler
@pytest.mark.parametrize("degree", [1, 3, 9])
@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (5, 9), (1, 6), (6, 1)])
def test_pool_features(grid: tuple[int, int], degree: int) -> None:
    checks.check_pool_features(run, host_build.copied, grid, 70, degree, zeros=grid == (7, 7))


@both_forms
@needs_compiler
@pytest.mark.parametrize(
    ("images", "patches", "channels"),
    [
        *((1, 1, 24), (5, 49, 24), (2, 128, 96), (2, 129, 100), (3, 256, 32), (1, 300, 65)),
        pytest.param(1, 1369, 24, marks=pytest.mark.slow),
    ],
)
def test_fused_max(run: Any, images: int, patches: int, channels: int) -> None:
    checks.check_fused_max(run, host_build.copied, images, patches, channels)
    checks.check_fused_winners(run, host_build.copied, images, patches, channels)


@both_forms
@needs_compiler
@pytest.mark.parametrize("patches", [49, 140])
def test_fused_max_where_every_product_is_negative(run: Any, patches: int) -> None:
    checks.check_fused_max(run, host_build.copied, 2, patches, 40, negative=True)
    checks.check_fused_winners(run, host_build.copied, 2, patches, 40, negative=True)


@both_forms
@needs_compiler
def test_fused_max_of_zero_features(run: Any) -> None:
    checks.check_fused_max(run, host_build.copied, 3, 49, 24, zeros=True)
    checks.check_fused_max(run, host_build.copied, 3, 49, 24, zeros=True, negative=True)


@both_forms
@needs_compiler
@pytest.mark.parametrize("directions", [(True, False), (False, True)])
def test_a_direction_can_be_dropped(run: Any, directions: tuple[bool, bool]) -> None:
    checks.check_fused_max(run, host_build.copied, 2, 49, 24, directions=directions)
    checks.check_fused_winners(run, host_build.copied, 2, 49, 24, directions=directions)
    checks.check_winner_cosines(run, host_build.copied, 2, 49, 24, directions=directions)
    checks.check_tiled_max(run, host_build.copied, (6, 5), (1, 3), images=2, directions=directions)


@both_forms
@needs_compiler
@pytest.mark.parametrize("grid", [(1, 1), (5, 9), (1, 300), (130, 1), (16, 16), (11, 13), (19, 17)])
@pytest.mark.parametrize("degrees", [(1,), (1, 3), (1, 3, 5)])
def test_tiled_max(run: Any, grid: tuple[int, int], degrees: tuple[int, ...]) -> None:
    checks.check_tiled_max(run, host_build.copied, grid, degrees)


@both_forms
@needs_compiler
@pytest.mark.parametrize("degrees", [(5,), (3, 7), (1, 9)])
def test_tiled_max_of_other_degrees_and_several_images(run: Any, degrees: tuple[int, ...]) -> None:
    checks.check_tiled_max(run, host_build.copied, (13, 11), degrees, images=3, channels=100)


@both_forms
@needs_compiler
def test_tiled_max_of_negative_products_and_zero_features(run: Any) -> None:
    checks.check_tiled_max(run, host_build.copied, (12, 12), (1, 3, 5), negative=True)
    checks.check_tiled_max(run, host_build.copied, (12, 12), (1, 3), zeros=True)
    checks.check_tiled_max(run, host_build.copied, (12, 12), (1, 3), zeros=True, negative=True)


@needs_compiler
@pytest.mark.long
def test_tiled_max_at_full_size() -> None:
    checks.check_tiled_max(run, host_build.copied, (37, 37), (1, 3, 5), negative=True)


@pytest.mark.parametrize("mask", [0b1, 0b11, 0b111, 0b11111])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (1, 1400), (37, 37), (9, 300), (100, 85)])
def test_tiles_cover_every_grid_and_fit_every_device(grid: tuple[int, int], mask: int) -> None:
    shape, reach = variants.tiled_shape(grid, mask), mask.bit_length() - 1
    blocks = []
    for block, most in ((shape.row_block, variants.TILED_ROWS), (shape.column_block, variants.TILED_COLUMNS)):
        assert block[0] * block[1] <= most
        parts = 1
        for held, size in zip(block, grid, strict=True):
            assert held == size or held > 2 * reach
            parts *= 1 if held == size else -(-(size - 2 * reach) // (held - 2 * reach))
        blocks.append(parts)
    assert shape.blocks == blocks[0] * blocks[1]
    assert shape.shared_bytes <= 99 * 1024  # what a block may have on sm_86, sm_89 and sm_120


def test_the_halo_multiplies_the_products_as_the_source_says() -> None:
    factors = [variants.tiled_shape((37, 37), mask).blocks * 256 * 128 / 1369**2 for mask in (0b1, 0b11, 0b111)]
    np.testing.assert_allclose(factors, [1.82, 2.36, 3.93], atol=0.01)


@needs_compiler
@pytest.mark.parametrize(("patches", "channels"), [(1, 24), (49, 40), (6, 100)])
def test_int8_quantise(patches: int, channels: int) -> None:
    checks.check_int8_quantise(run, host_build.copied, patches, channels, zeros=patches > 1)


@needs_compiler
@pytest.mark.parametrize(("images", "patches", "channels"), [(1, 1, 24), (3, 49, 300), (2, 256, 8), (1, 1369, 24)])
def test_winner_cosines(images: int, patches: int, channels: int) -> None:
    checks.check_winner_cosines(run, host_build.copied, images, patches, channels)


def recurring_tokens(images: int, patches: int, channels: int) -> Any:
    """Patches [N, P, C] that recur in every image with a little noise, in another order, and a few large channels."""
    random = kernel_checks.rng(images, patches, channels)
    normal = random.normal(size=(patches, channels))
    tokens = np.stack([normal[random.permutation(patches)] for _ in range(images)])
    scale = np.where(np.arange(channels) % 17 == 3, 5, 1)
    return ((tokens + random.normal(scale=0.3, size=tokens.shape)) * scale).astype(np.float32)


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize(
    ("images", "grid", "channels", "degrees"),
    [
        pytest.param(6, (7, 7), 100, (1, 3, 5), marks=pytest.mark.long),
        pytest.param(3, (10, 14), 200, (3,), marks=pytest.mark.long),
        (2, (1, 1), 24, (1, 3)),
        (4, (5, 4), 100, (5, 1, 1)),
    ],
)
def test_mutual_scores_equal_the_reference(
    images: int, grid: tuple[int, int], channels: int, degrees: tuple[int, ...]
) -> None:
    tokens = recurring_tokens(images, grid[0] * grid[1], channels)[:, None]
    by_degree = [reference.mutual_scores(tokens, grid, [degree], (0.0, 0.5)) for degree in degrees]
    expected = np.mean(by_degree, axis=0)
    scores = {
        name: device_scores(tokens, grid, degrees, (0.0, 0.5), HostDevice(), **options)
        for name, options in checks.VARIANTS.items()
    }
    np.testing.assert_allclose(scores["fused"], scores["gram"], atol=1e-3)
    np.testing.assert_allclose(scores["tiled"], scores["gram"], atol=1e-5)
    for found in scores.values():
        np.testing.assert_allclose(found, expected, atol=2e-3)
        assert np.abs(found - expected).mean() < 3e-4
        assert found.dtype == np.float32


@needs_compiler
@pytest.mark.parametrize("variant", ["fused", "tiled", "int8"])
def test_zero_features_follow_the_convention(variant: str) -> None:
    tokens = recurring_tokens(5, 16, 40)[:, None]
    tokens[1] = 3.0  # no variance: every feature of the image is zero
    tokens[4] = -1.0
    scores = device_scores(tokens, (4, 4), (1, 3), (0.0, 0.5), HostDevice(), **checks.VARIANTS[variant])
    expected = reference.mutual_scores(tokens, (4, 4), (1, 3), (0.0, 0.5))
    np.testing.assert_allclose(scores, expected, rtol=3e-3, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("variant", ["fused", "tiled", "int8"])
def test_identical_images_are_at_distance_zero(variant: str) -> None:
    tokens = np.repeat(recurring_tokens(1, 16, 64)[:, None], 3, axis=0)
    scores = device_scores(tokens, (4, 4), (1, 3), device=HostDevice(), **checks.VARIANTS[variant])
    assert scores.max() < 1e-3


@needs_compiler
def test_the_architecture_chooses_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, plans = recurring_tokens(3, 4, 8)[:, None], []

    def products(*capabilities: str, **options: Any) -> int:
        devices = [HostDevice() for _ in capabilities]
        for device, capability in zip(devices, capabilities, strict=True):
            device.card = replace(device.card, compute_capability=capability)
        device_scores(tokens, (2, 2), (1, 3), device=devices, on_plan=plans.append, **options)
        return sum(device.products for device in devices)

    monkeypatch.setattr(comparers, "FASTER", {"8.9": "fused"})
    assert products("8.9") == 6
    assert "fused product per degree" in plans[-1].describe()
    assert products("8.9", products="gram") == 3
    assert "one product for all degrees" in plans[-1].describe()
    assert products("8.9", products="tiled") == 3
    assert "one tiled product for all degrees" in plans[-1].describe()
    assert products("7.5") == 3
    assert products("7.5", products="fused") == 6
    assert products("8.9", "8.9") == 6
    assert products("8.9", "7.5") == 3  # they share features
    assert products("7.5", precision="int8") == 6
    assert "int8" in plans[-1].describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"products": "whole"}, "must be 'gram', 'fused' or 'tiled'"),
        ({"precision": "int8", "products": "gram"}, "int8 products are always fused"),
        ({"precision": "int8", "products": "tiled"}, "int8 products are always fused"),
        ({"precision": "int4"}, "use precision fp16 or int8"),
    ],
)
def test_choices_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        device_scores(recurring_tokens(3, 4, 8)[:, None], device=HostDevice(), **options)


def test_int8_takes_no_more_patches_than_a_key_can_number() -> None:
    assert variants.index_mask(1) == 0
    assert variants.index_mask(1369) == 2047
    assert variants.index_mask(2048) == 2047
    most = variants.MAX_INT8_PATCHES
    assert choose_comparer([], "int8", None, most).layout(most, 8, 1)
    with pytest.raises(ValueError, match="use precision fp16"):
        choose_comparer([], "int8", None, most + 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("images", "patches", "channels"), [(1, 1, 24), (5, 49, 100), (3, 256, 384), (4, 1369, 1024)])
def test_products_on_a_device(gpu: Device, images: int, patches: int, channels: int) -> None:
    how = (gpu.launch, gpu.to_device)
    for negative in (False, True):
        checks.check_fused_max(*how, images, patches, channels, negative=negative, get=gpu.to_host)
        checks.check_fused_winners(*how, images, patches, channels, negative=negative, get=gpu.to_host)
    checks.check_fused_max(*how, images, patches, channels, zeros=True, get=gpu.to_host)
    checks.check_winner_cosines(*how, images, patches, channels, get=gpu.to_host, put=gpu.copy)


@pytest.mark.gpu
@pytest.mark.parametrize("degrees", [(1,), (1, 3), (1, 3, 5), (3, 7), (1, 9)])
@pytest.mark.parametrize(("grid", "channels"), [((1, 1), 24), ((5, 9), 100), ((37, 37), 1024), ((45, 40), 384)])
def test_tiles_on_a_device(gpu: Device, grid: tuple[int, int], channels: int, degrees: tuple[int, ...]) -> None:
    how = (gpu.launch, gpu.to_device, grid, degrees)
    checks.check_tiled_max(*how, images=2, channels=channels, get=gpu.to_host)
    checks.check_tiled_max(*how, channels=channels, negative=True, get=gpu.to_host)


@pytest.mark.gpu
@pytest.mark.parametrize(("grid", "channels"), [((1, 1), 24), ((5, 9), 100), ((37, 37), 1024)])
def test_features_on_a_device(gpu: Device, grid: tuple[int, int], channels: int) -> None:
    for degree in (1, 3, 5):
        checks.check_pool_features(gpu.launch, gpu.to_device, grid, channels, degree, get=gpu.to_host)
    checks.check_int8_quantise(gpu.launch, gpu.to_device, grid[0] * grid[1], channels, get=gpu.to_host)
