"""From what networks give for known-good images to a bank of them.

tokens [n, L, P, C] → unit features of each degree → a few that cover all [M, C], stored → each image scored without
itself: scores and highest map values [n], scales

Of images in tiles the rows of tokens are tiles. To score an image all of its own are left out, and its map is put
together of theirs.

Of a thinned bank it is not enough to leave an image's own patches out: the others were chosen so that they cover this
image, too, which they do not do for a new one. So a bank is thinned anew for each of a few parts of the images, from
all but that part. Only these scores are to those of new images as any of these are to each other.

What follows from additions is computed later, from the most unusual patches of each image and what these are near to:
see bank_feedback.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, ConfigError
from zsad.kernels.coverage import farthest_first, project, thinning_bytes
from zsad.kernels.cpu.comparers import unit_features
from zsad.kernels.cuda.device import Device
from zsad.kernels.machine import zsad_version
from zsad.kernels.mutual_scoring import square_grid

from .bank import Search
from .bank_feedback import rederived
from .bank_file import (
    STORED,
    VERSION,
    VERSION_OF_TILES,
    Bank,
    BankNetwork,
    BankPrecision,
    Features,
    Header,
    Own,
    Scale,
)
from .method import Place, Progress
from .musc import Settings as MuScSettings
from .tile_grid import tile_grid

FOLDS = 5  # parts of the images, each of which is scored by a bank of the others
PATCHES = 20_000  # of a bank, per tap and degree, unless asked for otherwise
LEAST_SPAN = 1e-3  # of a scale: images may be copies of one
KEPT_SHARE, LEAST_KEPT = 0.03, 4  # of each image's patches, the most unusual: thrice what an image score averages

Units = Callable[[int], NDArray[np.float32]]  # the features [P, C] of an image by its number


@dataclass(frozen=True)
class Making:
    """What decides how a bank is made, beside the images."""

    size: int = PATCHES  # patches per tap and degree at most
    precision: BankPrecision = "fp16"
    neighbours: int = 1


def describe(config: Config, place: Place, making: Making, facts: Mapping[str, Any]) -> Header:
    """Return the header of a bank before it is made.

    facts: what neither networks nor settings say: bit_depth, chosen, the networks' precision and maybe sources.
    """
    settings = config.settings
    assert isinstance(settings, MuScSettings)
    facts = dict(facts)
    precision = facts.pop("precision")
    tiled: dict[str, Any] = {"image_network": settings.image_network, "image_rule": settings.image_rule}
    if config.tiling:  # an image's score is the maximum of its map
        tiled = {"image_network": settings.map_network, "image_rule": "map_maximum", "tiles": 2}
        tiled["tiling"] = config.tiling.model_copy(update={"tile_batches": "auto"})
    return Header(
        version=VERSION_OF_TILES if config.tiling else VERSION,
        zsad=zsad_version(),
        preset=config.preset,
        networks={
            name: BankNetwork(spec=network.spec, sha256=network.sha256, precision=precision)
            for name, network in place.networks.items()
        },
        degrees=settings.degrees,
        map_network=settings.map_network,
        neighbours=making.neighbours,
        foreground=config.foreground,
        precision=making.precision,
        images=2,
        patches=1,
        size=making.size,
        image_scale=Scale(low=0.0, middle=1.0),
        map_scale=Scale(low=0.0, middle=1.0),
        **tiled,
        **facts,
    )


def build_bank(
    tokens: Mapping[str, NDArray[Any]],
    config: Config,
    place: Place,
    making: Making,
    facts: Mapping[str, Any],
    progress: Progress,
    memory: int | None = None,
    sizes: NDArray[np.int32] | None = None,
) -> Bank:
    """Make a bank of tokens [n, L, P, C] by networks; n at least 2. facts: see `describe`; memory: see `remembered`.

    sizes: [images, 2], height and width of images whose tiles, one image after another, the tokens are of.
    """
    counts = {
        "images": len(next(iter(tokens.values()))),
        "patches": sum(array.shape[0] * array.shape[2] for array in tokens.values()),
    }
    owners = None
    if sizes is not None:
        cells, _ = square_grid(tokens[describe(config, place, making, facts).map_network].shape[2])
        grids = [tile_grid((height, width), config.tiling, cells) for height, width in sizes.tolist()]
        owners = np.repeat(np.arange(len(grids)), [len(grid) for grid in grids])
        counts |= {"tiles": counts["images"], "images": len(grids)}
    header = describe(config, place, making, facts).model_copy(update=counts)
    features: dict[tuple[str, int, int], Features] = {}
    own = {}
    for name, array in tokens.items():
        taps = header.networks[name].spec.taps
        report = partial(progress, f"bank of {name}")
        device = place.arrays.device
        found, own[name] = remembered(array, taps, header.degrees, making, device, report, memory, owners)
        features |= {(name, tap, degree): kept for (tap, degree), kept in found.items()}
    none = np.empty(0)
    bank = Bank(header, features, own, none, none, np.empty((0, 32), np.uint8))
    maps = own[header.map_network].maps.astype(np.float64)
    if sizes is not None:
        bank = replace(bank, sizes=sizes)
        maps = np.array([(whole.min(), whole.max()) for whole in bank.whole_maps(maps)], np.float64)
    bank = rederived(bank)
    scales = {"image_scale": _scale(bank.scores), "map_scale": _scale(maps)}
    return replace(bank, header=header.model_copy(update=scales))


def remembered(
    tokens: NDArray[Any],
    taps: Sequence[int],
    degrees: Sequence[int],
    making: Making,
    device: Device | Literal["cpu"],
    report: Callable[[int, int], None] = lambda *_: None,
    memory: int | None = None,
    owners: NDArray[np.intp] | None = None,
) -> tuple[dict[tuple[int, int], Features], Own]:
    """Return what a bank keeps of tokens [n, L, P, C], by tap and degree, and how each image looks without itself.

    report: is told how many patches have been chosen, and of how many. memory: bytes for a search, see `Nearest`.
    owners: [n] numbers of the images that they are of, from 0 and rising, where these are cut; None: each of its own.
    """
    count, _, patches, _ = tokens.shape
    if owners is None:
        owners = np.arange(count)
    found, distances = dict[tuple[int, int], Features](), dict[tuple[int, int], NDArray[np.float32]]()
    keys = [(layer, degree) for layer in range(len(taps)) for degree in degrees]
    total, chosen = np.zeros((count, patches)), _Chosen(report, len(keys) * _choices(owners, patches, making))
    for layer, degree in keys:
        units, key = _units(tokens, layer, degree), (taps[layer], degree)
        found[key] = _covering(np.arange(count), tokens.shape, units, making, chosen)
        measured = _without_themselves(owners, tokens.shape, units, found[key], making, device, chosen, memory)
        distances[key] = measured.astype(np.float32)
        total += measured.mean(axis=2)
    chosen.all()
    maps = total / len(keys)
    kept = min(patches, max(LEAST_KEPT, math.ceil(KEPT_SHARE * patches)))
    rows = np.sort(np.argpartition(-maps, kept - 1, axis=1)[:, :kept], axis=1).astype(np.int32)  # [n, T]
    features = {}
    for layer, degree in keys:
        units = _units(tokens, layer, degree)
        vectors = np.concatenate([units(image)[rows[image]] for image in range(count)])
        images = np.repeat(np.arange(count, dtype=np.int32), kept)
        features[taps[layer], degree] = Features.packed(vectors, images, making.precision)
        of_rows = np.take_along_axis(distances[taps[layer], degree], rows[:, :, None], axis=1)
        distances[taps[layer], degree] = of_rows.reshape(count * kept, -1)
    return found, Own(maps.astype(np.float32), rows, features, distances)


class _Chosen:
    """Counts the patches that were chosen for a bank and for those that score its own images."""

    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self._report, self._total, self._count = report, total, 0
        report(0, total)

    def more(self, count: int) -> None:
        self._count = min(self._count + count, self._total - 1)
        self._report(self._count, self._total)

    def all(self) -> None:
        """Copies need not have been chosen."""
        self._report(self._total, self._total)


def _choices(owners: NDArray[np.intp], patches: int, making: Making) -> int:
    """Return how many patches are chosen for a tap and a degree: once of all images, and of all but each part."""
    rows, images = len(owners) * patches, int(owners[-1]) + 1
    parts = images if making.size >= rows else min(images, FOLDS)
    return min(making.size, rows) * parts  # of parts as large as all of them but one


@dataclass(frozen=True)
class Needed:
    """Bytes that making a bank takes beside the networks' tokens."""

    held: int  # what there is of the bank
    moment: int  # at most while patches are chosen, scores derived or the file is written
    compared: int  # features that images are compared with
    search: int  # at least, while they are; on a device where that compares

    def of_host(self, device: Device | Literal["cpu"]) -> int:
        return self.held + max(self.moment, self.compared + (self.search if device == "cpu" else 0))


def needed(
    images: int,
    shapes: Sequence[tuple[int, ...]],
    degrees: Sequence[int],
    making: Making,
    device: Device | Literal["cpu"],
) -> Needed:
    """Return what a bank of so many images takes; shapes: of the tokens of an image [L, P, C], by networks."""
    held, moments, compared, search = 0, [0], 0, 0
    for layers, patches, channels in shapes:
        rows, keys = images * patches, layers * len(degrees)
        kept, odd = min(making.size, rows), images * max(LEAST_KEPT, math.ceil(KEPT_SHARE * patches))
        # Of each vector its scale and its image's number are kept too.
        vector, k = channels * np.dtype(STORED[making.precision]).itemsize + 8, making.neighbours
        held += keys * ((kept + odd) * vector + rows * 4 * k) + rows * 24
        moments += [keys * odd * 4 * channels] + [thinning_bytes(rows, channels)] * (kept < rows)
        compared = max(compared, kept * (vector + 4 * channels) + rows * 8 * k)
        search = max(search, Search.least(kept, channels, k, device))
    return Needed(held, max(held, *moments), compared, search)  # the file is a copy of what is held


def check_making(config: Config, making: Making) -> None:
    """Raise ConfigError where there can be no bank of what a configuration runs."""
    if not isinstance(config.settings, MuScSettings):
        raise ConfigError(
            f"--save-bank: a bank is of presets that compare images, small, musc or challenge, not {config.preset}"
        )
    if config.settings.position_window is not None:
        raise ConfigError("--save-bank: the patches of a bank have no place of their own; leave out --position-window")
    if config.settings.pooling != "lnamd":
        raise ConfigError(
            f'--save-bank: a bank pools patches by neighbourhood; leave out pooling = "{config.settings.pooling}"'
        )
    if config.tiling.tile_batches == "aligned":
        raise ConfigError(
            "--save-bank: a bank keeps the tiles of all places together; leave out --tile-batches aligned"
        )
    if config.foreground not in ("none", "colour"):
        raise ConfigError("--save-bank: a bank is of whole images; leave out --foreground")
    if making.size < making.neighbours:
        raise ConfigError(f"--bank-size must be at least {making.neighbours}, not {making.size}")


def _units(tokens: NDArray[Any], layer: int, degree: int) -> Units:
    def read(image: int) -> NDArray[np.float32]:
        own = np.ascontiguousarray(tokens[image, layer], np.float32)
        units: NDArray[np.float32] = unit_features(own, square_grid(len(own)), (degree,))[0]
        return units

    return read


def _covering(
    members: NDArray[np.intp], shape: tuple[int, ...], units: Units, making: Making, chosen: _Chosen
) -> Features:
    """Choose features of some images that cover those of all of them; shape: [n, L, P, C] of all tokens."""
    _, _, patches, channels = shape
    rows = np.arange(len(members) * patches)
    if making.size < len(rows):
        projected = project(len(members), patches, channels, lambda part: units(int(members[part])))
        distinct = farthest_first(projected, making.size, chosen.more)
        if len(distinct) < making.neighbours:  # copies are neighbours, too
            distinct = np.union1d(distinct, rows[: making.neighbours])
        rows = distinct
        del projected
    else:
        chosen.more(len(rows))
    found, parts = Features.room(len(rows), channels, making.precision), rows // patches
    for part in np.unique(parts).tolist():
        at = slice(*np.searchsorted(parts, [part, part + 1]).tolist())
        numbers = np.full(at.stop - at.start, members[part], np.int32)
        found.put(at, Features.packed(units(int(members[part]))[rows[at] % patches], numbers, making.precision))
    return found


def _without_themselves(
    owners: NDArray[np.intp],
    shape: tuple[int, ...],
    units: Units,
    everything: Features,
    making: Making,
    device: Device | Literal["cpu"],
    chosen: _Chosen,
    memory: int | None,
) -> NDArray[np.float64]:
    """Return the distances [n, P, k] of each image's patches to the nearest of a bank that was made without it.

    owners, shape: see `remembered`; of an image in tiles all are left out. everything: the bank of all images.
    """
    (count, _, patches, _), images = shape, int(owners[-1]) + 1
    whole = making.size >= count * patches  # then it costs nothing to leave out one image alone
    dealt = np.random.default_rng(0).permutation(images)
    distances = np.empty((count, patches, making.neighbours))
    for fold in np.array_split(dealt, images if whole else min(images, FOLDS)):
        left_out = np.isin(owners, fold)
        if whole:
            covering = everything.of(~left_out).units()
            chosen.more(len(covering))
        else:
            others = np.flatnonzero(~left_out)
            part = max(making.size * len(others) // count, making.neighbours)
            covering = _covering(others, shape, units, replace(making, size=part), chosen).units()
        search = Search(covering, making.neighbours, device, memory)
        del covering
        for row in np.flatnonzero(left_out).tolist():
            distances[row] = search.measured(units(row))
        del search  # before there is another
    return distances


def _scale(values: NDArray[np.float64]) -> Scale:
    low, high = float(values.min()), float(values.max())
    return Scale(low=low, middle=max(high, low + LEAST_SPAN))
