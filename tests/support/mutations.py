"""Bugs to plant in the CUDA sources: the tests are worth what they find of them.

Run this file to see which are found; test_mutations.py demands at least nine of ten.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import host_build
import kernel_checks as checks
import numpy as np
import variant_checks

from zsad.kernels.cuda import device as cuda_device

Check = Callable[[checks.Run, checks.Make], None]


def _layer_norm(run: checks.Run, make: checks.Make) -> None:
    checks.check_layer_norm(run, make, 2, 49 * 20, np.float32)


def _pooled_norms(run: checks.Run, make: checks.Make) -> None:
    checks.check_pooled_norms(run, make, (5, 7), 40, (1, 3, 5))
    checks.check_pooled_norms(run, make, (5, 7), 8, (1, 3), zeros=True)


def _filter_max(run: checks.Run, make: checks.Make) -> None:
    checks.check_filter_max(run, make, (11, 13), (1, 3, 5))
    checks.check_filter_max(run, make, (7, 9), (1, 3, 5), band=3, segment=4)
    checks.check_filter_max(run, make, (9, 13), (1, 3), negative=True)
    checks.check_filter_max(run, make, (9, 13), (1, 3), window=2)


def _interval_average(run: checks.Run, make: checks.Make) -> None:
    checks.check_interval_average(run, make, 7, 49, (2, 5), zeros=True, image_first=2)
    checks.check_interval_average(run, make, 7, 49, (2, 5), ties=True)
    checks.check_kept_sums(run, make, 4, 12, 49)


def _pool_features(run: checks.Run, make: checks.Make) -> None:
    variant_checks.check_pool_features(run, make, (5, 7), 40, 3)
    variant_checks.check_pool_features(run, make, (5, 7), 8, 3, zeros=True)


def _fused(run: checks.Run, make: checks.Make) -> None:
    variant_checks.check_fused_max(run, make, 2, 49, 24)
    variant_checks.check_fused_winners(run, make, 2, 49, 24)
    variant_checks.check_fused_max(run, make, 2, 140, 200, negative=True)


def _tiled(run: checks.Run, make: checks.Make) -> None:
    variant_checks.check_tiled_max(run, make, (13, 12), (1, 5), images=2, channels=40)
    variant_checks.check_tiled_max(run, make, (12, 13), (1, 3), negative=True)
    variant_checks.check_tiled_max(run, make, (24, 24), (1, 3, 5), channels=8)


def _int8_quantise(run: checks.Run, make: checks.Make) -> None:
    variant_checks.check_int8_quantise(run, make, 7, 40, zeros=True)


def _int8_winners(run: checks.Run, make: checks.Make) -> None:
    variant_checks.check_winner_cosines(run, make, 2, 7, 300)


def _running_top(run: checks.Run, make: checks.Make) -> None:
    checks.check_running_top(run, make, 3, 150, 5)
    checks.check_running_top(run, make, 1, 3, 1)


DEFINES = {"filter_max": ("ZSAD_NEAR_MASK=3",)}  # what the checks need beyond the kernels that are always there
CHECKS: dict[str, Check] = {
    "layer_norm": _layer_norm,
    "pooled_norms": _pooled_norms,
    "filter_max": _filter_max,
    "interval_average": _interval_average,
    "pool_features": _pool_features,
    "fused": _fused,
    "tiled": _tiled,
    "int8_quantise": _int8_quantise,
    "int8_winners": _int8_winners,
    "running_top": _running_top,
}


@dataclass(frozen=True)
class Mutation:
    """One planted bug: the n-th occurrence of a text becomes another in a kernel's source or one of its headers."""

    bug: str
    source: str
    old: str
    new: str
    occurrence: int = 0
    warpgroups: bool = False  # in the form for sm_90a

    @property
    def defines(self) -> tuple[str, ...]:
        return (*DEFINES.get(self.source, ()), *(host_build.WARPGROUPS if self.warpgroups else ()))


WAITED, SHOWN = "    wait_for_copies<kStages - 2>();\n", "    show_copies();\n"
NEXT = "start_step(step + kStages - 1);"
# Of products by warpgroups; the source is added below.
ORDERS = [
    Mutation("no barrier between a warpgroup's steps", "", "    __syncthreads();  // this step", "    // this step"),
    Mutation("copies not shown to the products", "", "    show_copies();\n", ""),
    Mutation("copies shown before they have landed", "", WAITED + SHOWN, SHOWN + WAITED),
    Mutation("no fence before the products", "", "  order_sums(sums);\n", ""),
    Mutation("products not closed", "", "  close_products();\n", ""),
    Mutation("the last products not waited for", "", "  wait_for_products(sums);\n}", "}"),
]
STEPS_AND_PLACES = [
    Mutation("a step's products not waited for", "", "    wait_for_products(sums);\n    __sync", "    __sync"),
    Mutation("stage overwritten while it is multiplied", "", NEXT, "start_step(step + kStages);", 1),
    Mutation("every product has a step's first channels", "", "i * kRun + depth, 2", "i * kRun, 2"),
    Mutation("channels of the columns do not go along", "", "column_side + depth", "column_side"),
    Mutation("rows of a product one after another", "", "depth, 2 * kRun)", "depth, kRun)"),
    Mutation("columns of a product too far apart", "", "column_side + depth, kRun)", "column_side + depth, 2 * kRun)"),
    Mutation("both products have the same rows", "", "group_side + i * kRun", "group_side"),
    Mutation("descriptor swizzled by 128 bytes", "", "2ull << 62", "1ull << 62"),
    Mutation("descriptor not swizzled", "", "| 2ull << 62", ""),
    Mutation("start in bytes", "", "(start & 0x3ffff) >> 4", "(start & 0x3fff)"),
    Mutation("strides in bytes", "", "(apart >> 4) << 32", "(apart) << 32"),
    Mutation("strides in the place of leading ones", "", "(apart >> 4) << 32", "(apart >> 4) << 16"),
    Mutation("halves of a warpgroup's sets mixed up", "", "8 * i + 16 * half :", "16 * i + 8 * half :"),
]

BARRIER = "    if (kReach > 0) __syncthreads();\n"
FINAL = "    __syncthreads();\n    int* const best_rows"

MUTATIONS = [
    Mutation("no barrier before the rows are summed", "filter_max", BARRIER, "", 0),
    Mutation("no barrier before the columns are summed", "filter_max", BARRIER, "", 1),
    Mutation("no barrier after zeroing", "filter_max", "  __syncthreads();\n\n  // NaN", "\n  // NaN"),
    Mutation(
        "no barrier before the inverse lengths are read", "filter_max", "  load();\n  __syncthreads();", "  load();"
    ),
    Mutation("no barrier before row maxima leave", "filter_max", FINAL, "    int* const best_rows"),
    Mutation("halo one row short", "filter_max", "min(band1 + kReach, H)", "min(band1 + kReach - 1, H)"),
    Mutation("halo of the row patches one column short", "filter_max", "x < x1 + kReach;", "x < x1 + kReach - 1;"),
    Mutation("walk starts one column late", "filter_max", "int x = first;", "int x = first + 1;"),
    Mutation("margin one column short", "filter_max", "pitch = W + kReach,", "pitch = W + kReach - 1,"),
    Mutation(
        "halo counted as the band's own", "filter_max", "qy >= band0 && qy < band1 ? a", "qy >= halo0 && qy < halo1 ? a"
    ),
    Mutation("last strip counts past the grid", "filter_max", "px < x1 && py < H;", "px < x1;"),
    Mutation(
        "last column of a segment is dropped", "filter_max", "px >= x0 && px < x1 &&", "px >= x0 && px < x1 - 1 &&"
    ),
    Mutation(
        "rows and columns swapped",
        "filter_max",
        "sums[r][y][i] * inverse_row.at[y]);",
        "sums[r][y][i] * inverse_column(r, i));",
    ),
    Mutation("row outside the grid not masked", "filter_max", "py >= 0 && py < H;", "true;"),
    Mutation("column outside the grid not masked", "filter_max", "x + 1 < W ? offset", "x < W ? offset"),
    Mutation("edges of the wrong run", "filter_max", "edge[2 * line]", "edge[line]"),
    Mutation("a window reaches one patch too far", "filter_max", "low + values[0]", "low + values[2 * K + 1]"),
    Mutation("what two rows share reaches too far", "filter_max", "+ loaded[at - k][i]", "+ loaded[at + 1 + k][i]"),
    Mutation("partial sums shifted by one", "filter_max", "open[d + 1] + vertical[y][i]", "open[d] + vertical[y][i]"),
    Mutation("maximum starts at zero", "filter_max", "float greatest = kLowest;", "float greatest = 0;"),
    Mutation("column maximum starts at zero", "filter_max", "column_best[r][i] = kLowest;", "column_best[r][i] = 0;"),
    Mutation("keys of negatives not reversed", "filter_max", "bits ^ ((bits >> 31) & 0x7fffffff);", "bits;"),
    Mutation("near rows one short", "filter_max", "abs(below + i - y) > a.window", "abs(below + i - y) >= a.window"),
    Mutation("any column is near", "filter_max", "abs(qx - (x - k)) <= a.window", "true"),
    Mutation("strip meets one row too few", "filter_max", "y0 + kStrip + a.window", "y0 + kStrip + a.window - 1"),
    Mutation("zero features are alike to all", "filter_max", "? 1.0f : 0.5f", "? 1.0f : 1.0f"),
    Mutation("Gram step ignored", "filter_max", "a.grams + blockIdx.y * a.gram_step", "a.grams"),
    Mutation(
        "scratch reused without a barrier",
        "layer_norm",
        "  __syncthreads();  // scratch",
        "  // scratch",
    ),
    Mutation("sum read before it is complete", "layer_norm", "= value;\n  __syncthreads();", "= value;"),
    Mutation("a slice overlaps the next", "layer_norm", "i < size; i += slices * ", "i < size; i += (slices - 1) * "),
    Mutation("last slice forgotten", "layer_norm", "s < slices; ++s", "s < slices - 1; ++s"),
    Mutation("corners of a ring counted twice", "pooled_norms", "dy == -ring || dy == ring ? 1", "dy == -ring ? 1"),
    Mutation("right border one column short", "pooled_norms", "xx < columns)", "xx < columns - 1)"),
    Mutation(
        "last warp's patches not cut", "pooled_norms", "  if (p >= patches) return;", "  if (p > patches) return;"
    ),
    Mutation("zero features not reported", "pooled_norms", "has_zero[at] = 1", "has_zero[at] = 0"),
    Mutation("first rank off by one", "interval_average", "sum_of_nearest(of, first,", "sum_of_nearest(of, first + 1,"),
    Mutation("ties counted once", "interval_average", "double(count - above)", "double(1)"),
    Mutation("image compared with itself", "interval_average", "of.counts(j) && of.key(j) >", "of.key(j) >"),
    Mutation(
        "zero features elsewhere ignored",
        "interval_average",
        "zero_there ? max(found, float_to_key(0.5f)) : found",
        "found",
    ),
    Mutation(
        "right border one column too far", "pool_features", "columns + reach, columns - 1)", "columns + reach, columns)"
    ),
    Mutation("padding left as it was", "pool_features", "c < stride; c", "c < channels; c"),
    Mutation(
        "length of the unrounded feature",
        "pool_features",
        "square += half_to_float(rounded) * half_to_float(rounded)",
        "square += sum * share * sum * share",
    ),
    Mutation("no barrier between steps", "fused", "    __syncthreads();  // this step", "    // this step"),
    Mutation("copies not waited for", "fused", "    wait_for_copies<kStages - 2>();\n", ""),
    Mutation("one group too many left open", "fused", "wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>"),
    Mutation("stage overwritten too early", "fused", "start_step(step + kStages - 1);", "start_step(step + kStages);"),
    Mutation("read from the wrong stage", "fused", "row_side = step % kStages", "row_side = (step + 1) % kStages"),
    Mutation(
        "group closed only where there is a step",
        "fused",
        "    close_copies();",
        "    if (step < steps) close_copies();",
    ),
    Mutation("last step forgotten", "fused", "step < steps; ++step", "step < steps - 1; ++step"),
    Mutation("every step reads the first channels", "fused", "source[i] + step * kStep", "source[i]"),
    Mutation("copies not swizzled", "fused", "target = swizzled(row, piece)", "target = row * kStep + piece * kPiece"),
    Mutation(
        "patches past the end not replaced", "fused", "min(p0 + row, a.patches - 1); }", "min(p0 + row, a.patches); }"
    ),
    Mutation("matrices of the row patches in the wrong order", "fused", "piece + lane / 16)", "piece + lane / 8 % 2)"),
    Mutation("matrices of the column patches mixed up", "fused", "right[j / 2][j % 2 * 2],", "right[j / 2][j % 2],"),
    Mutation("rows and columns of a set swapped", "fused", "sums[i][j][2 * half + e]", "sums[i][j][half + 2 * e]"),
    Mutation("warps take each other's columns", "fused", "% kWarpsAcross * kWarpColumns", "/ 2 * kWarpColumns"),
    Mutation(
        "no barrier before the stages hold maxima", "fused", "  __syncthreads();  // the stages", "  // the stages"
    ),
    Mutation("no barrier before the maxima leave", "fused", "  __syncthreads();\n  raise", "  raise"),
    Mutation("a column's maximum over half its rows", "fused", "other < kWarp; other", "other < kWarp / 2; other"),
    Mutation("a row's maximum over one warp", "fused", "raise<kWarpsAcross>", "raise<1>"),
    Mutation("fused row maximum starts at zero", "fused", "float best = kLowest;", "float best = 0;"),
    Mutation("fused column maximum starts at zero", "fused", "column_best[j][e] = kLowest;", "column_best[j][e] = 0;"),
    Mutation("one entry past the image is written", "fused", "first + mine >= patches", "first + mine > patches"),
    Mutation("every pair compares the first image", "fused", "a.rows + blockIdx.y * a.image_bytes", "a.rows"),
    Mutation("winners of rows and columns swapped", "fused", "a.index_mask, q[j][e]", "a.index_mask, p"),
    Mutation(
        "number of a patch past the end",
        "fused",
        "lane / 4, p = min(p0 + row, a.patches - 1)",
        "lane / 4, p = p0 + row",
    ),
    *(
        replace(mutation, source=source, warpgroups=True)
        for source, mutation in [
            *((source, mutation) for source in ("fused", "tiled") for mutation in ORDERS),
            *(("fused", mutation) for mutation in STEPS_AND_PLACES),
            ("tiled", Mutation("every warpgroup has the first one's rows", "", "* kWarpRows * kStep;", "* 0;")),
        ]
    ),
    Mutation("no barrier before a slice is overwritten", "tiled", "      __syncthreads();  // what", "      // what"),
    Mutation(
        "no barrier before a slice is read", "tiled", "      __syncthreads();\n      with_reach", "      with_reach"
    ),
    Mutation("no barrier before rows are summed", "tiled", "    __syncthreads();  // all is", "    // all is"),
    Mutation(
        "no barrier before warps' maxima are read", "tiled", "    __syncthreads();\n    if (a.best", "    if (a.best"
    ),
    Mutation("blocks overlap too little", "tiled", "number * (most - 2 * reach)", "number * (most - 2 * reach + 1)"),
    Mutation("places past the block's patches count", "tiled", "q < columns.own() ?", "true ?"),
    Mutation("own patches start late", "tiled", "number > 0 ? reach : 0", "number > 0 ? reach + 1 : 0"),
    Mutation("own patches end early", "tiled", "reach) ? reach : 0);", "reach) ? reach + 1 : 0);"),
    Mutation("patches counted with the own width", "tiled", "x.first + at % x.held", "x.first + at % x.own"),
    Mutation("left border not cut", "tiled", "if (-d >= low) ", ""),
    Mutation("right border one column too far", "tiled", "if (d < high)", "if (d <= high)"),
    Mutation("open sums shifted by one", "tiled", "open[d + 1] + value", "open[d] + value"),
    Mutation("box sums one row early", "tiled", "own_y = y - K - columns", "own_y = y - K + 1 - columns"),
    Mutation("rows of the box end with the block's", "tiled", "y < rows.y.held + K; ++y", "y < rows.y.held; ++y"),
    Mutation("slices of other warps' rows", "tiled", "line / 8 * kApart + number", "line / 8 * 8 + number"),
    Mutation("halves of a set swapped", "tiled", "{sums[i][j][2 * half]", "{sums[i][j][2 - 2 * half]"),
    Mutation("tiled row maximum starts at zero", "tiled", "float greatest = kLowest", "float greatest = 0"),
    Mutation("tiled column maximum starts at zero", "tiled", "column_best[i] = kLowest", "column_best[i] = 0"),
    Mutation(
        "tiled rows and columns swapped",
        "tiled",
        "column_best[i], sum.at[i] * inverse_row)",
        "column_best[i], sum.at[i])",
    ),
    Mutation(
        "a row's maximum of one lane",
        "tiled",
        "__reduce_max_sync(kFullWarp, float_to_key(greatest))",
        "float_to_key(greatest)",
    ),
    Mutation("a column's maximum over one warp", "tiled", "w < kWarps; ++w", "w < 1; ++w"),
    Mutation("warps leave out columns of the grid", "tiled", "x += kWarps)", "x += kWarps + 1)"),
    Mutation("every degree has the first one's lengths", "tiled", "a.inverse_columns + r * H * W", "a.inverse_columns"),
    Mutation(
        "every image has the first one's lengths",
        "tiled",
        "(blockIdx.y * static_cast<long long>(degrees) + r)",
        "static_cast<long long>(r)",
    ),
    Mutation("every pair multiplies the first image", "tiled", "a.rows + blockIdx.y * a.image_bytes", "a.rows"),
    Mutation("degrees of the mask not counted", "tiled", "reach = k, ++degrees", "reach = k, degrees = k + 1"),
    Mutation("transform leaves out neighbours", "int8_quantise", "int bit = 1;", "int bit = 2;"),
    Mutation("scale of one lane instead of the warp", "int8_quantise", "  largest = warp_max(largest);\n", ""),
    Mutation("weight without the length", "int8_quantise", " * inverse[blockIdx.y", " + 0 * inverse[blockIdx.y"),
    Mutation(
        "lowest bits of the key, not of the cosine", "int8_winners", "__float_as_int(key_to_float(*best))", "*best"
    ),
    Mutation(
        "directions measured with one image",
        "int8_winners",
        "inverse[p], column, column_inverse",
        "inverse[p], image, inverse",
    ),
    Mutation("a column past the end counts", "running_top", "c < columns ?", "c <= columns ?"),
    Mutation("of equal entries the first goes", "running_top", "kept.index : kNone", "-kept.index : kNone"),
    Mutation(
        "of equal candidates the last stays",
        "running_top",
        "warp_smallest(candidate == best",
        "warp_largest(candidate == best",
    ),
    Mutation(
        "equal products replace each other", "running_top", "if (best <= kept.smallest)", "if (best < kept.smallest)"
    ),
    Mutation("a candidate is taken twice", "running_top", "    if (column == winner) candidate = kNone;\n", ""),
    Mutation("smallest entry not renewed", "running_top", "    kept.smallest = warp_smallest(kept.key);\n", ""),
    Mutation("columns of a chunk not numbered on", "running_top", "first + column + i * kWarp", "column + i * kWarp"),
    Mutation("only the first of the loads", "running_top", "i < kAhead; ++i) take", "i < 1; ++i) take"),
    Mutation("the last row is written by two warps", "running_top", "if (row >= rows)", "if (row > rows)"),
    Mutation("half the channels measured", "int8_winners", "c < stride; c", "c < stride / 2; c"),
]


def planted(mutation: Mutation, folder: Path) -> str:
    """Write the headers to `folder` and return the kernel's source, one of them with the bug in it."""
    texts = cuda_device.sources(mutation.source)
    at = mutation.occurrence + 1
    name = next((file for file, text in texts.items() if text.count(mutation.old) >= at), None)
    if name is None:
        where = ", ".join(texts)
        raise LookupError(
            f"mutation {mutation.bug!r}: {mutation.old!r} no longer occurs in {where}; adapt the mutation"
        )
    parts = texts[name].split(mutation.old)
    texts[name] = mutation.old.join(parts[:at]) + mutation.new + mutation.old.join(parts[at:])
    (folder / "host").mkdir()
    source: str = texts.pop(f"{mutation.source}.cu")
    header = "host/cuda_host.h"
    for file, text in {**texts, header: (cuda_device.FOLDER / header).read_text("utf-8")}.items():
        (folder / file).write_text(text, "utf-8")
    return source


def check(source: str, built: ctypes.CDLL) -> None:
    """Run the checks of a source on a build of it."""

    def run(kernel: str, grid: tuple[int, int], threads: int, arguments: Any, shared_bytes: int = 0) -> None:
        host_build.run(built, kernel, grid, threads, arguments, shared_bytes)

    CHECKS[source](run, host_build.copied)


def found(mutation: Mutation) -> str | None:
    """Return what the checks say of a planted bug, None where it passes unnoticed."""
    with tempfile.TemporaryDirectory() as scratch:
        built = host_build.build(planted(mutation, Path(scratch)), Path(scratch), mutation.defines)
    try:
        check(mutation.source, built)
    except (AssertionError, host_build.KernelError) as error:
        said: list[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
        return said[0] if said else type(error).__name__
    return None


def main() -> int:
    survivors = 0
    for mutation in MUTATIONS:
        said = found(mutation)
        survivors += said is None
        print(f"{mutation.source:17} {mutation.bug:45} {said or 'NOT FOUND'}", flush=True)
    print(f"{len(MUTATIONS) - survivors} of {len(MUTATIONS)} found")
    return int(10 * survivors > len(MUTATIONS))


if __name__ == "__main__":
    sys.exit(main())
