"""Bugs to plant in the kernel that hands out distances; found, like the others, by the check of interval_average.cu."""

from __future__ import annotations

from mutations import Mutation

SOURCE = "interval_average"
TURNED = "  __syncthreads();\n  for (int row = warp;"

MUTATIONS = [
    Mutation("no barrier before the square is turned over", SOURCE, TURNED, "  for (int row = warp;"),
    Mutation(
        "square not turned over", SOURCE, "square[lane * (kSquare + 1) + row]", "square[row * (kSquare + 1) + lane]"
    ),
    Mutation("last images of a square not cut", SOURCE, "q >= patches || j >= images", "q >= patches"),
    Mutation("squares lie apart", SOURCE, "% squares * kSquare", "% squares * (kSquare + 1)"),
    Mutation("an image is its own reference", SOURCE, "if (j != i) {", "if (true) {"),
    Mutation("distances not weighted", SOURCE, "sum += weight[r] * distance", "sum += distance"),
    Mutation(
        "every image takes the first one's keys", SOURCE, "best + blockIdx.y * images * slab + at", "best + at", 1
    ),
    Mutation("images count that are not kept", SOURCE, "return kept[j] && j != self", "return j != self"),
    Mutation("a kept image counts for itself", SOURCE, "return kept[j] && j != self", "return kept[j]"),
    Mutation("every image takes the first one's distances", SOURCE, "minima + at * images", "minima + p * images"),
    Mutation("every image takes the first one's ranks", SOURCE, "ranks[2 * b], ranks[2 * b + 1]", "ranks[0], ranks[1]"),
    Mutation("zero features of the first image", SOURCE, "inverse[blockIdx.y * slab + at] == 0", "inverse[at] == 0", 1),
]
