from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


MAX_DEGREE: int = 9

MAX_KEY_PATCHES: int = 65536

PANEL: int = 16

def instruction_sets(kernel: str = 'gram_pass') -> list[str]:
    """
    Instruction sets of a kernel (bounded_bank, bounded_pair, fp32_product, gram_pass, image_tower, pool, int8, measured_best, rank_sums, running_top, unit_vectors, winner_cosines) that build and processor share, fastest first; fp32_product has one for processors with tiles only.
    """

GROUP: int = 48

CODES: int = 32

CODED: int = 29

WIDEST_HEAD: int = 128

def tower_parts() -> list[str]:
    """What the threads of an image tower spend their time on."""

class ImageTower:
    """A vision transformer's image tower over arrays that it keeps."""

    def __init__(self, width_and_heads: tuple[int, int], patch_and_grid: tuple[int, int], front: int, eps: float, activation: str, int8: bool, blocks: int, arrays: dict[str, object]) -> None: ...

    @property
    def patches(self) -> int:
        """Patches of an image."""

    def forward(self, images: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu', writable=False)], taps: Sequence[int], normed: bool, tokens: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu')], patches: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')] | None, classes: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')] | None, depth: int, only_first: bool, windows: Sequence[tuple[Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')]]], threads: int, instruction_set: str = '', seconds: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')] | None = None) -> None:
        """
        Take images [B, 3, S, S] through the first depth blocks: fill tokens [B, taps, P, C] behind those of taps, through the final norm or as they are, patches [B, P, C] behind the last, through the norm, and classes [B, C], raw. only_first: of the last block only class tokens are wanted. windows: of each size the tokens [W, T'] of an image's windows, class token first, and what is filled with their class tokens behind the last of all blocks, [B, W, C], raw. seconds: one for each of tower_parts, which what a thread spends on it in the mean is added to.
        """

def code_bank(heads: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], terms: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], tails: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.int16], dict(shape=(None, None), order='C', device='cpu')], instruction_set: str = '') -> tuple[float, float]:
    """
    Make codes [groups, GROUP * CODES] of a bank's unit vectors u for bounded_bank, group by group: heads [n, CODED] are the first coordinates of u - mean in an orthogonal basis, terms [n] are mean . u - |mean|^2 / 2, tails [n] squares of what heads leave. Returns how long heads are at most, and what codes leave of these.
    """

def pair_bytes(patches: int, head: int, lead: int) -> int:
    """Size of what bound_image makes of so many patches."""

def bound_image(heads: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], terms: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], tails: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], lead: int, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], instruction_set: str = '') -> None:
    """
    Make the bounds of an image's unit vectors u for bounded_pair: heads [P, h] are the first coordinates of u - mean in an orthogonal basis, those first in which vectors differ most, terms [P] are mean . u - |mean|^2 / 2, tails [P] squares of what the coordinates leave. lead: of a head, so many coordinates have codes.
    """

def bounded_pair(left: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], right: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], left_bounds: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], right_bounds: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], head: int, lead: int, best_left: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], best_right: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], instruction_set: str = '') -> int:
    """
    Fill best_left [P] and best_right [Q] with the largest product of each unit vector of left [P, C] and of right [Q, C] with one of the other side, and return how many products that took. Bounds by one mean and basis tell which.
    """

def bounded_bank(queries: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], coordinates: tuple[Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]], queue: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], squares: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], radii: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], bank: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], inverse: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, order: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], codes: Annotated[NDArray[numpy.int16], dict(shape=(None, None), order='C', device='cpu', writable=False)], lengths: tuple[float, float], most_taken: int, cosines: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], indices: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')], given_up: Annotated[NDArray[numpy.bool_], dict(shape=(None,), order='C', device='cpu')], halves: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None = None, instruction_set: str = '') -> int:
    """
    Fill cosines [P, k], descending, and indices [P, k] with the vectors of bank [M, C], of these inverse lengths [M] or of 1, that are nearest to unit queries [P, C], and return how many products that took. coordinates: heads, terms and tails of the queries as code_bank takes them; queue: [P] the order in which they come, best one in which those that follow each other are alike; squares: [P, groups] of the distances from heads to the centres of groups, and radii [groups] of the spheres around these that hold the heads of groups; order: [groups, GROUP], the vectors of each group, -1 for none; codes, lengths: of the groups, by code_bank. Of equal cosines the lower index comes first. given_up [P]: for which more than most_taken products would have been taken. halves: [groups * GROUP, C] bits of 16-bit floats that are exactly the groups' vectors; read with AVX-512.
    """

def fp32_product_bytes(rows: int, columns: int, channels: int) -> int:
    """What a thread keeps for such products."""

def fp32_product(left: Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu', writable=False)], right: Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu')]) -> None:
    """
    Fill out [P, Q] with the dot products of left [P, C] with right [Q, C], as exactly as fp32; ValueError where the processor has no tiles.
    """

def gram_pass(gram: Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu', writable=False)], grid: tuple[int, int], degrees: Sequence[int], inverse_left: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], inverse_right: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], best_left: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], best_right: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], keys: bool = False, window: int | None = None, narrow: bool = False, instruction_set: str = '') -> None:
    """
    Box-filter one Gram for every degree and take the maxima of both directions, as cosines or as keys, of patches at most window rows and columns apart. narrow: of a Gram that is approximate, in 16 bits where these are enough.
    """

def pool(tokens: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], grid: tuple[int, int], degrees: Sequence[int], zero_length: float, inverse: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], unit: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')] | None = None, instruction_set: str = '') -> None:
    """
    Box-sum tokens [P, C] for every degree: inverse lengths [R, P] and, where wanted, unit features [R, P, C].
    """

def index_mask(patches: int) -> int:
    """Bits of a key that hold the winner's patch number."""

def int8_bytes(patches: int, channels: int) -> int:
    """Size of a quantised image."""

def int8_quantise(tokens: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], mean: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], instruction_set: str = '', near: bool = False) -> None:
    """
    Quantise layer-normed tokens [P, C] around a mean [C] that all images share, for int8_multiply. near: products of near tokens are to be the more exact, those of others may be less so.
    """

def int8_multiply(left: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], right: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], gram: Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu')], apart: int | None = None, instruction_set: str = '') -> None:
    """
    Fill the Gram [P, Q] of two quantised images, at least where patches' numbers are at most so far apart.
    """

def int8_nearest(left: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], right: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], best_left: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], best_right: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], instruction_set: str = '') -> None:
    """
    Fill best_left [R, P] and best_right [R, Q] with keys of the nearest in the other image, by the products of R pairs of quantised images of unit vectors, [R, int8_bytes(P, C)] and [R, int8_bytes(Q, C)], without a Gram.
    """

def int8_running_top(left: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], right: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], columns: int, first: int, values: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], indices: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu')], instruction_set: str = '', margins: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, wanted: int = 1) -> None:
    """
    running_top by the products of a quantised image with several [N, bytes] of as many patches each, without a Gram; right has room for as many columns. With margins [P] only products larger than the wanted-th largest so far less its row's margin are taken, which behind those come in any order.
    """

def jpeg_scan_damage(content: bytes, rows: int, columns: int) -> int:
    """
    What is wrong with the scans of a progressive JPEG of this size: 0 nothing, 1 bits end early, 2 bits are left over, 3 a part is missing, 4 no such code.
    """

def measured_best(queries: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device='cpu', writable=False)], numbers: Annotated[NDArray[numpy.int32], dict(shape=(None, None, None), device='cpu', writable=False)], errors: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], bank: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], inverse: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, all: bool, cosines: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], indices: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')], doubtful: Annotated[NDArray[numpy.bool_], dict(shape=(None,), order='C', device='cpu')], instruction_set: str = '') -> None:
    """
    Fill cosines [Q, k], descending, and indices [Q, k] with the vectors of bank [M, C], of these inverse lengths [M] or of 1, that are nearest to queries [Q, C] among the candidates of G runs: products values [G, Q, K], off by up to errors [Q], and numbers [G, Q, K], -1 for none. Of equal ones the lower number comes first. doubtful [Q]: whether a nearer one may be no candidate; never, where all are.
    """

def rank_sums(distances: Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu', writable=False)], images: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], first: int, last: int, sums: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')], instruction_set: str = '') -> None:
    """
    Fill sums [P] with what the ranks first ... last - 1 of distances [P, N], none of them negative, to the images [n] add up to.
    """

def running_top(products: Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu', writable=False)], first: int, values: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], indices: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu')], instruction_set: str = '') -> None:
    """
    Raise the largest values [P, K] of every row, descending, and their columns, by products [P, Q] of the columns first, first + 1, ...; of equal ones the first to come stays before.
    """

def tiff_strip_is_whole(strip: bytes, compression: int, wanted: int) -> bool:
    """
    Whether a strip of a TIFF, by LZW (5) or PackBits (32773), becomes as many bytes as wanted, and no more.
    """

def unit_vectors(vectors: Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu', writable=False)], units: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], lengths: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')], instruction_set: str = '') -> None:
    """
    Fill units [N, C] with vectors [N, C] divided by their lengths [N], also filled; zero ones stay zero.
    """

def winner_cosines(left: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], right: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], first: int, image: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], patch: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], cosines: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], instruction_set: str = '') -> None:
    """
    Dot products [K, P] of unit features with those winners that are among images first, first + 1, ... of right.
    """
