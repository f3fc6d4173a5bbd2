"""A bank: each image is compared, by itself, with what is known to look normal.

batch → networks: tokens [B, L, P, C] → features pooled at each degree → distances to the bank's nearest, averaged over
taps and degrees [P] → map [g, g] of one network, score by the preset's rule of the same or another one → [0, 1] by
the bank's scales; p-value and bounds from the scores that the bank's own images have without themselves

A bank of tiles is given tiles for images (tiled.py). It says distances of these, and judges the map that comes of them.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from zsad.engine.config import Config, ConfigError, Table, Tiling
from zsad.engine.images.categories import counted
from zsad.engine.images.decode import Recipe, recipe
from zsad.engine.images.loader import Batch
from zsad.engine.images.stored import ImageError
from zsad.engine.networks.network import GraphRequest, Network, run_in_parts
from zsad.engine.scores.conformal import (
    FALSE_ALARMS,
    MOST_REVIEWED,
    images_needed,
    p_values,
    percent,
    upper_bound,
    verdict_bounds,
)
from zsad.engine.scores.drift import BEGINS, tail
from zsad.engine.scores.image_scores import image_scores
from zsad.engine.scores.verdicts import Bounds
from zsad.export.checkpoints import check_present, read_manifest
from zsad.export.state_dict import CheckpointError
from zsad.kernels.cpu.comparers import unit_features
from zsad.kernels.cpu.nearest import fast_precision, threads
from zsad.kernels.cuda.device import Device
from zsad.kernels.files import printable
from zsad.kernels.machine import available_cores
from zsad.kernels.mutual_scoring import square_grid
from zsad.kernels.nearest import Nearest, search_all

from .bank_file import AGAIN, SUFFIX, Bank, BankError, Header, keys_of, read_bank, read_header
from .method import Group, JudgesEach, Place, Scored

log = logging.getLogger("zsad")

LEAST_REVIEWED = images_needed(MOST_REVIEWED / 2)  # images of a bank of which two ranks lie within that share


class Settings(Table):
    """Which bank, and how many good images may be rejected."""

    bank: str = Field(description=f"a bank, or a folder of such, called CATEGORY{SUFFIX}")
    false_alarms: float = Field(FALSE_ALARMS, gt=0, lt=1, description="a number between 0 and 1")

    def sides(self, names: Sequence[str]) -> Mapping[str, int]:
        """See Table: of a folder those of the category's bank, of the first one where there is none."""
        given = Path(self.bank)
        if not given.is_dir():
            return {}
        banks = bank_files(given)
        header, _ = read_header(named_bank(given, names, banks) or banks[0])
        return header.input_sides


class BankMethod(JudgesEach):
    """See `Method`."""

    Settings = Settings
    takes_references = False
    rescores = False
    map_range = (0.0, 1.0)

    def __init__(self, config: Config, place: Place) -> None:
        assert isinstance(config.settings, Settings)
        self._settings, self._place = config.settings, place
        self._promises = isinstance(config.threshold, str)  # else the user's bound decides
        self._banks = find_banks(Path(config.settings.bank))
        self._first, _ = first_of(self._banks, config)
        self._recipes = recipes(place)
        self.inputs = list(dict.fromkeys(self._recipes.values()))
        of_maps = place.networks[self._banks[self._first][0].map_network]
        self.cells, _ = square_grid(of_maps.graphs["image"].outputs["tokens"].shape[1])
        self._bank: Bank | None = None
        self._memories: dict[str, Memory] = {}
        self._open: Path | None = None  # the file that is in memory
        if Path(config.settings.bank).is_file():
            self._take(Path(config.settings.bank))  # what is wrong with it is said before any work

    @staticmethod
    def graph_requests(config: Config) -> list[GraphRequest]:
        assert isinstance(config.settings, Settings)
        _, header = first_of(find_banks(Path(config.settings.bank)), config)
        check_cut(config.settings.bank, header.tiling, config.tiling)
        for name, network in header.networks.items():
            used = config.networks.get(name)
            for key, value in network.spec:
                if key != "checkpoint" and getattr(used, key, None) != value:
                    raise ConfigError(
                        f"the bank {config.settings.bank} is of [networks.{name}] {key} {value!r}, not "
                        f"{getattr(used, key, None)!r}; leave that to the bank, or save another one"
                    )
            if used is not None:
                check_weights_there(config.settings.bank, name, used.checkpoint)
        for key in ("foreground", "bit_depth"):
            if (asked := getattr(config, key)) != (made := getattr(header, key)):
                raise ConfigError(
                    f"the bank {config.settings.bank} is of {key} {made!r}, not {asked!r}; leave that to the bank, or "
                    "save another one"
                )
        if config.components:
            raise ConfigError("--components: a bank is of whole images; leave it out")
        return [GraphRequest(name) for name in header.networks]

    def record(self) -> dict[str, Any]:
        """Return the banks by their content: where they lie decides nothing."""
        sides = self._banks[self._first][0].input_sides  # others are for other categories
        digests = {path.name: digest for path, (header, digest) in self._banks.items() if header.input_sides == sides}
        return {"false_alarms": self._settings.false_alarms, "banks": digests}

    def needed(self, images: int, references: int) -> int:
        return 0  # what banks take is known, and checked, when they are read

    def start(self, group: Group) -> None:
        if (path := self._path(group)) != self._open:
            self._take(path)

    def _path(self, group: Group) -> Path:
        """Return the bank of a category; raises ImageError where there is none."""
        given = Path(self._settings.bank)
        if given in self._banks:
            return given
        if (path := named_bank(given, (group.name, group.object), self._banks)) is not None:
            return path
        names = ", ".join(printable(path.stem) for path in list(self._banks)[:5])
        raise ImageError(
            f"there is no bank of {printable(group.name)} in {given}/, which has {names}; save one: zsad-infer "
            f"--reference GOOD/ --save-bank {given / group.name}{SUFFIX}"
        )

    def _take(self, path: Path) -> None:
        """Bring a bank into memory; raises BankError where it is not for these networks."""
        self._memories, self._bank, self._open = {}, None, None
        bank = read_bank(path)
        first, _ = self._banks[self._first]
        if bank.header.kind != first.kind:
            raise BankError(
                f"{path} is of other settings than {self._first}; score its category by itself: "
                f"zsad-infer DATA/{path.stem} --bank {path}"
            )
        for name, network in bank.header.networks.items():
            check_network(path, name, network.sha256, self._place.networks[name])
        self._memories = memories(bank, self._place)
        self._bank, self._open = replace(bank, features={}, own={}, given={}), path  # which memories hold by now
        promise = f", {promised(bank, self._settings.false_alarms)[0]}" if self._promises else ""
        log.info("%s: %s%s", path, counted(bank.header.images, "image"), promise)
        if otherwise := self._otherwise(bank.header):
            log.warning("%s: %s", path, otherwise)

    def _otherwise(self, header: Header) -> str:
        """Say what is not as it was when a bank was made, nothing where all is."""
        used = self._place.precision
        made = next((n.precision for n in header.networks.values() if n.precision != used), None)
        if made is None:
            return ""
        return f"networks run in {used} and ran in {made} for the bank, which moves scores a little"

    def take(self, batch: Batch) -> Iterator[Scored]:
        assert self._bank is not None
        header = self._bank.header
        patches = {name: self._patch_scores(name, batch) for name in header.networks}  # [B, P] each
        maps = patches[header.map_network]
        maps = maps.reshape(-1, *square_grid(maps.shape[1]))
        if header.tiling:
            for index, distances in zip(batch.indices, maps, strict=True):
                yield Scored(index, float(distances.max()), distances.astype(np.float32))
            return
        for index, raw, distances in zip(batch.indices, raw_scores(header, patches).tolist(), maps, strict=True):
            yield self.judged(index, raw, distances)

    def judged(self, index: int, raw_score: float, distances: NDArray[Any]) -> Scored:
        """Return what the bank says of an image, whose patches have these distances [h, w]."""
        assert self._bank is not None
        header, raw = self._bank.header, np.array([raw_score])
        grid_map = header.map_scale.values(distances).astype(np.float32)
        score, p_value = header.image_scale.values(raw)[0], p_values(raw, self._bank.scores)[0]
        return Scored(index, raw_score, grid_map, score=float(score), p_value=float(p_value))

    def _patch_scores(self, name: str, batch: Batch) -> NDArray[np.float64]:
        """Return the distances [B, P] of a batch's patches to the bank's of one network."""
        graph, found = self._place.networks[name].graphs["image"], list[NDArray[np.float64]]()
        for _, outputs in run_in_parts(graph, {"images": batch.inputs[self._recipes[name]]}):
            tokens = np.asarray(self._place.arrays.fetch(outputs["tokens"]), np.float32)
            found += [self._memories[name].distances(image) for image in tokens]
        return np.stack(found)

    def bounds(self) -> Bounds | None:
        if self._bank is None:
            return None
        header, asked = self._bank.header, self._settings.false_alarms
        rule, reject = promised(self._bank, asked)
        rule = "; ".join(filter(None, [rule, self._otherwise(header)]))
        accept, _, _ = verdict_bounds(self._bank.scores, asked)
        region, _ = upper_bound(self._bank.peaks, asked)
        scaled = header.image_scale.values(np.array([accept, reject]))
        return Bounds(float(scaled[0]), float(scaled[1]), rule, float(header.map_scale.values(np.array([region]))[0]))

    def remarks(self, bounds: Bounds, scores: NDArray[np.float64]) -> list[str]:
        assert self._bank is not None
        found, images = [], len(self._bank.scores)
        if self._promises and images < LEAST_REVIEWED and bounds.accept == bounds.reject:
            found.append(
                "what is not rejected is accepted, with nothing to review between: that takes a bank of "
                f"{LEAST_REVIEWED} images, and this one is of {images}"
            )
        rejected = int((scores > bounds.reject).sum())
        if 2 * rejected > len(scores) and tail(rejected, len(scores), *self.count_above(bounds.reject)) < BEGINS:
            found.append(
                f"{rejected} of {counted(len(scores), 'image')} are rejected; either they are defective, or the "
                "pictures differ from those that the bank was made from (lighting, camera, crop)"
            )
        return found

    def count_above(self, score: float) -> tuple[int, int]:
        """Return how many of the open bank's images score above a score in [0, 1], and of how many."""
        assert self._bank is not None
        above = self._bank.header.image_scale.values(self._bank.scores) > score
        return int(above.sum()), len(above)


def promised(bank: Bank, asked: float) -> tuple[str, float]:
    """Say what the bound of a bank promises where this share of false alarms is asked for, and return the raw score."""
    reject, share = upper_bound(bank.scores, asked)
    rule = f"at most {percent(share)} of good images are rejected"
    if bank.header.chosen:
        rule += " if they are like those that the run itself chose for the bank, else more"
    if share > asked:
        rule += f"; {percent(asked)} takes a bank of {images_needed(asked)} images"
    return rule, reject


class Memory:
    """What a bank holds of one network, ready to be compared with."""

    def __init__(
        self,
        features: Sequence[NDArray[np.float32]],
        degrees: Sequence[int],
        neighbours: int,
        device: Device | Literal["cpu"],
        memory_limit: int | None = None,
        defects: Sequence[NDArray[np.float32]] = (),
        span: float = 0.0,
    ) -> None:
        """features, defects: unit vectors [M, C] by taps, then degrees. memory_limit: bytes beside them.

        span: what a patch that is the same as a defect's is raised by.
        """
        share = None if memory_limit is None else memory_limit // (len(features) + len(defects))
        self._degrees, self.span = degrees, span
        self._searches = [Search(vectors, neighbours, device, share) for vectors in features]
        self._defects = [Search(vectors, 1, device, share) for vectors in defects]

    def distances(self, tokens: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return how unusual an image's patches, tokens [L, P, C], are: [P], see `raised`."""
        nearest, to_defects = self.measured(self.units(tokens))
        return raised(nearest, to_defects, self.span)

    def units(self, tokens: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return the features [P, C] of tokens [L, P, C] by taps, then degrees."""
        with threads("work", available_cores()) as pool:
            found = pool.map(lambda layer: unit_features(layer, square_grid(len(layer)), self._degrees), tokens)
            return [units for of_layer in found for units in of_layer]

    def measured(
        self, units: Sequence[NDArray[np.float32]]
    ) -> tuple[list[NDArray[np.float64]], NDArray[np.float64] | None]:
        """Return the distances [P, k] of features [P, C] to the nearest normal ones, by taps and degrees.

        Beside them the mean distances [P] to the nearest of a defect, None where the bank has no defects.
        """
        searches = [*self._searches, *self._defects]
        asked = [*units, *units] if self._defects else list(units)
        found = search_all([search.nearest for search in searches], asked)
        distances = [
            search.distances(own, cosines) for search, own, (cosines, _) in zip(searches, asked, found, strict=True)
        ]
        nearest, to_defects = distances[: len(units)], distances[len(units) :]
        return nearest, np.mean([own[:, 0] for own in to_defects], axis=0) if to_defects else None


def raised(
    nearest: Sequence[NDArray[np.float64]], to_defects: NDArray[np.float64] | None, span: float
) -> NDArray[np.float64]:
    """Return how unusual patches are [P]: their mean distance, and more where they are nearer to a defect.

    nearest: distances [P, k] to normal patches by taps and degrees, ascending; to_defects: mean distances [P]. With d
    to the nearest normal patch and e to the nearest of a defect, span · (1 − e/d) is added where e < d: nothing where
    both are as near, all of the span for the same patch. It grows with d and falls with e.
    """
    total = np.zeros(len(nearest[0]))
    for distances in nearest:
        total += distances.mean(axis=1)
    unusual: NDArray[np.float64] = total / len(nearest)
    if to_defects is None:
        return unusual
    first = np.mean([distances[:, 0] for distances in nearest], axis=0)
    nearer = to_defects < first
    unusual[nearer] += span * (1 - to_defects[nearer] / first[nearer])
    return unusual


class Search:
    """Finds how far features are from the nearest of a bank, as mutual scoring measures it."""

    def __init__(
        self,
        vectors: NDArray[np.float32],
        neighbours: int,
        device: Device | Literal["cpu"],
        memory_limit: int | None = None,
    ) -> None:
        """vectors: [M, C] of about unit length, or zero."""
        self._with_zero = not vectors.any(axis=1).all()
        if memory_limit is not None:
            memory_limit = max(memory_limit, self.least(len(vectors), vectors.shape[1], neighbours, device))
        self.nearest = Nearest(vectors, neighbours, self._precision(device), device, memory_limit)

    @classmethod
    def least(cls, vectors: int, channels: int, neighbours: int, device: Device | Literal["cpu"]) -> int:
        """Return the bytes in which so many vectors can be searched."""
        where = "cpu" if device == "cpu" else "cuda"
        return Nearest.needed(vectors, channels, neighbours, cls._precision(device), where)

    @staticmethod
    def _precision(device: Device | Literal["cpu"]) -> str:
        return fast_precision() if device == "cpu" else "auto"

    def measured(self, units: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the distances [P, k] of unit features [P, C] to the nearest, ascending."""
        return self.distances(units, self.nearest.search(units)[0])

    def distances(self, units: NDArray[np.float32], cosines: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the distances [P, k] of unit features [P, C] that have these cosines [P, k] with the nearest.

        A feature without direction is at distance 1 from every other, and at 0 from such.
        """
        squared = np.maximum(2 - 2 * cosines.astype(np.float64), 0)
        if self._with_zero:
            squared = np.minimum(squared, 1)
        squared[~units.any(axis=1)] = 0 if self._with_zero else 1
        distances: NDArray[np.float64] = np.sqrt(squared)
        return distances


def check_cut(bank: str, made: Tiling, asked: Tiling) -> None:
    """Raise ConfigError where a run cuts images otherwise than those of a bank were cut."""
    if made == asked:
        return
    if asked.tile_batches != "auto":
        raise ConfigError(
            "--tile-batches: a bank is of the tiles of all places, and compares no images with each other; leave it out"
        )
    of_bank = f"tiles that {made.options} cuts" if made else "whole images"
    raise ConfigError(
        f"the bank {bank} is of {of_bank}, and this run cuts with {asked.options}, which shows things at another size; "
        f"leave that to the bank: zsad-infer DATA --bank {bank}, or save one of such tiles: zsad-infer --reference "
        f"GOOD/ --save-bank part{SUFFIX} {asked.options}"
    )


def recipes(place: Place) -> dict[str, Recipe]:
    """Return what the loader makes of each image for each network."""
    return {name: recipe(network.preprocessing, network.spec.side) for name, network in place.networks.items()}


def memories(bank: Bank, place: Place) -> dict[str, Memory]:
    """Make what each network's tokens are compared with; raises BankError where there is too little memory."""
    header = bank.header
    normal = {key: bank.features[key].units() for key in keys_of(header)}
    for key in normal:
        if len(added := bank.added("accept", key)):
            normal[key] = np.concatenate([normal[key], added])
    defects = {key: added for key in normal if len(added := bank.added("reject", key))}
    held = sum(array.nbytes for array in [*normal.values(), *defects.values()])
    limit = place.arrays.limit()
    if place.arrays.device == "cpu":
        limit -= held
    if limit < 0:
        raise BankError(
            f"the bank takes {held >> 20} MB, more than the memory limit of {place.arrays.limit() >> 20} MB; raise "
            "--memory-limit, or save a smaller one with --bank-size"
        )
    return {
        name: Memory(
            [array for key, array in normal.items() if key[0] == name],
            header.degrees,
            header.neighbours,
            place.arrays.device,
            limit // len(header.networks),
            [array for key, array in defects.items() if key[0] == name],
            bank.span(name),
        )
        for name in header.networks
    }


def raw_scores(header: Header, patches: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the raw scores [B] of images with these distances [B, P] of each network's patches."""
    scores = patches[header.image_network]
    side = header.networks[header.image_network].spec.side
    return image_scores(scores, square_grid(scores.shape[1]), header.image_rule, side)


def check_weights_there(bank: str, name: str, checkpoint: str) -> None:
    """Raise BankError where the file of a network's weights is not where it was when the bank was made."""
    if checkpoint in read_manifest():
        return
    try:
        check_present([checkpoint])
    except CheckpointError:
        raise BankError(
            f"the bank {bank} needs the weights {checkpoint}, which are not there; say where they are: --config "
            f'FILE.toml with the lines [networks.{name}] and checkpoint = "PATH"'
        ) from None


def check_network(path: Path, name: str, sha256: str, network: Network) -> None:
    """Raise BankError unless a network has the weights that a bank is of."""
    if network.sha256 != sha256:
        raise BankError(
            f"{path}: the bank is of other weights of {name} (sha256 {sha256[:12]}…) than {network.checkpoint} here "
            f"({network.sha256[:12]}…), so that nothing can be compared; {AGAIN}"
        )


def find_banks(given: Path) -> dict[Path, tuple[Header, str]]:
    """Read what a bank, or each bank of a folder, says of itself, with its digest; raises BankError."""
    return {path: read_header(path) for path in bank_files(given)}


def bank_files(given: Path) -> list[Path]:
    """Return a bank's file, or those of a folder, at least one; raises BankError."""
    if not given.is_dir():
        return [given]
    try:
        paths = sorted(path for path in given.iterdir() if path.suffix == SUFFIX)
    except OSError as error:
        raise BankError(f"--bank {given}: cannot be read ({error.strerror})") from None
    if not paths:
        raise BankError(f"--bank {given}: there is no bank, CATEGORY{SUFFIX}, in this folder; {AGAIN}")
    return paths


def named_bank(folder: Path, names: Sequence[str], banks: Collection[Path]) -> Path | None:
    """Return the bank of a folder that is called as a category may be."""
    return next((path for name in names if (path := folder / f"{name}{SUFFIX}") in banks), None)


def first_of(banks: Mapping[Path, tuple[Header, str]], config: Config) -> tuple[Path, Header]:
    """Return the first bank of images as large as a configuration takes them, where there is none the first of all."""
    found = [(path, header) for path, (header, _) in banks.items()]
    sides = {name: spec.side for name, spec in config.networks.items()}
    return next((pair for pair in found if pair[1].input_sides == sides), found[0])


def bank_settings(given: Path) -> tuple[str, dict[str, Any]]:
    """Return the preset that a bank is of, and what it decides of a configuration; raises BankError."""
    header, _ = read_header(bank_files(given)[0])
    networks = {name: network.spec.model_dump(exclude_none=True) for name, network in header.networks.items()}
    # What int8 networks give is further from all others' than those are from each other.
    exact = "int8" not in (network.precision for network in header.networks.values())
    return header.preset, {
        "method": "bank",
        "image_size": header.networks[header.map_network].spec.side,
        "networks": networks,
        "foreground": header.foreground,
        "bit_depth": header.bit_depth,
        "network_precision": "auto" if exact else "int8",
        "bank": {"bank": str(given)},
        **({"tiling": header.tiling.model_dump(exclude_none=True)} if header.tiling else {}),
    }
