"""What users say of images that a bank has scored: false alarms are normal from now on, missed defects are defects.

an image's tokens [T, L, P, C] → those of its patches that tell something → a step of the bank, stored beside what was
there before → the bank's own images as they are now without themselves: scores and highest map values [n]

Of a bank of whole images T is 1; of one of tiles they are those that the image is cut into.

A step only adds, so that taking it back leaves what was there before, to the byte. Bounds are derived from the images
that the bank was made from alone: those that users give back were picked for being odd, and would raise them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import cv2
import numpy as np
from numpy.typing import NDArray

from zsad.engine.scores.image_scores import TOP_FRACTION
from zsad.kernels.mutual_scoring import square_grid

from .bank import Memory, Search, raised, raw_scores
from .bank_file import Bank, Features, GivenImage, Header, Key, Kind, Step, keys_of
from .tile_grid import stitched, tile_grid
from .tiles import cut

USUAL = 95  # percentile of the distances of the bank's own patches, up to which a patch has nothing to add
COVERED = 0.5  # of a patch by a mask, from which on it is a part of the defect

Units = Sequence[NDArray[np.float32]]  # features [P, C] by taps, then degrees


class NothingToAddError(ValueError):
    """An image that changes nothing; the message says why."""


@dataclass(frozen=True)
class Given:
    """An image that is given back."""

    name: str
    sha256: str
    tokens: Mapping[str, NDArray[np.float32]]  # [T, L, P, C] by networks
    mask: NDArray[np.float32] | None = None  # [h, w] in [0, 1], where a rejected one has its defect
    size: tuple[int, int] = (0, 0)  # height and width, of an image that is cut


def image_score(header: Header, memories: Mapping[str, Memory], given: Given) -> float:
    """Return an image's score in [0, 1]."""
    patches = {name: np.stack([memories[name].distances(one) for one in own]) for name, own in given.tokens.items()}
    if not header.tiling:
        return float(header.image_scale.values(raw_scores(header, patches))[0])
    maps = patches[header.map_network]
    whole = stitched(given.size, header.tiling, maps.reshape(-1, *square_grid(maps.shape[1])))
    return float(header.image_scale.values(np.array([float(whole.max())]))[0])


class Additions:
    """Collects what the images of one command add to a bank."""

    def __init__(self, bank: Bank, kind: Kind, memories: Mapping[str, Memory]) -> None:
        self._bank, self._kind, self._memories = bank, kind, memories
        self._vectors: dict[Key, list[NDArray[np.float32]]] = {key: [] for key in keys_of(bank.header)}
        self._counts: list[dict[str, int]] = []
        self._own = {name: own.maps for name, own in bank.own.items()}

    def add(self, given: Given) -> None:
        """Choose an image's patches; raises NothingToAddError."""
        chosen: dict[str, NDArray[np.intp]] = {}
        units = {name: _of_all_tiles(self._memories[name], tokens) for name, tokens in given.tokens.items()}
        for name, own in units.items():
            left = self._bank.header.room - self._taken(name)
            if left <= 0:
                raise NothingToAddError(
                    f"the bank has no more room for what you {self._kind}, {self._bank.header.room} patches; take "
                    "something back with --undo, or save a larger one with --bank-size"
                )
            if self._kind == "accept":
                chosen[name] = self._odd(name, own, left)
            else:
                chosen[name] = self._defect(name, own, given)[:left]
        if not any(map(len, chosen.values())):
            raise NothingToAddError(
                f"none of its patches is more unusual than {USUAL} % of those of the bank's images, so that there is "
                "nothing to accept"
                if self._kind == "accept"
                else "its mask is empty"
            )
        self._counts.append({name: len(rows) for name, rows in chosen.items()})
        for key, own_units in zip(self._vectors, (u for own in units.values() for u in own), strict=True):
            self._vectors[key].append(own_units[chosen[key[0]]])

    def _taken(self, network: str) -> int:
        key = next(key for key in self._vectors if key[0] == network)
        return len(self._bank.added(self._kind, key)) + sum(counts[network] for counts in self._counts)

    def _odd(self, network: str, units: Units, most: int) -> NDArray[np.intp]:
        """Return patches, the most unusual first, after which no other one is more unusual than most of the bank's."""
        memory, bound = self._memories[network], float(np.percentile(self._own[network], USUAL))
        nearest, to_defects = memory.measured(units)
        of_network = [vectors for key, vectors in self._vectors.items() if key[0] == network]
        for index, own in enumerate(units):
            if earlier := of_network[index]:  # of other images
                nearest[index] = nearer(nearest[index], Search(np.concatenate(earlier), 1, "cpu").measured(own))
        # What is not unusual now does not become so: with every patch that is taken the others are so the less.
        odd = np.flatnonzero(raised(nearest, to_defects, memory.span) > bound)
        nearest, units = [distances[odd] for distances in nearest], [own[odd] for own in units]
        to_defects = None if to_defects is None else to_defects[odd]
        taken: list[int] = []
        while len(taken) < min(most, len(odd)):
            unusual = raised(nearest, to_defects, memory.span)
            unusual[taken] = -1
            worst = int(unusual.argmax())
            if unusual[worst] <= bound:
                break
            taken.append(worst)
            for index, own in enumerate(units):
                squared = np.maximum(2 - 2 * (own @ own[worst]).astype(np.float64), 0)
                nearest[index] = nearer(nearest[index], np.sqrt(squared)[:, None])
        return odd[taken]

    def _defect(self, network: str, units: Units, given: Given) -> NDArray[np.intp]:
        """Return patches in the mask, or without one those that decide the image's score; the most unusual first."""
        unusual = raised(self._memories[network].measured(units)[0], None, 0)
        patches = given.tokens[network].shape[2]
        if given.mask is None:
            return np.argsort(-unusual, kind="stable")[: max(1, round(TOP_FRACTION * patches))]
        covered = self._cover(given.mask, given.size, patches)
        inside = np.flatnonzero((covered > 0) & (covered >= min(COVERED, covered.max())))  # small ones cover no half
        return inside[np.argsort(-unusual[inside], kind="stable")]

    def _cover(self, mask: NDArray[np.float32], size: tuple[int, int], patches: int) -> NDArray[np.float32]:
        """Return which part of each patch a mask [h, w] covers, [T · P] of all tiles, each of so many patches."""
        if not (tiling := self._bank.header.tiling):
            return patch_cover(mask, patches)
        if mask.shape != size:
            mask = np.asarray(cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA), np.float32)
        boxes = tile_grid(size, tiling, square_grid(patches)[0]).boxes()
        return np.concatenate([patch_cover(cut(mask, box), patches) for box in boxes])

    def bank(self, images: Sequence[Given], before: Sequence[float], when: datetime) -> Bank:
        """Return the bank with these additions; images: those that have added something, with the scores they had."""
        header = self._bank.header
        number = max((step.number for step in header.feedback), default=0) + 1
        given = tuple(
            GivenImage(name=image.name, sha256=image.sha256, patches=patches, before=score, after=score)
            for image, patches, score in zip(images, self._counts, before, strict=True)
        )
        step = Step(number=number, kind=self._kind, when=when, images=given)
        features = {
            key: Features.packed(
                np.concatenate(vectors),
                np.repeat(np.arange(len(vectors), dtype=np.int32), [len(part) for part in vectors]),
                header.precision,
            )
            for key, vectors in self._vectors.items()
        }
        header = header.model_copy(update={"feedback": (*header.feedback, step)})
        return rederived(replace(self._bank, header=header, given={**self._bank.given, number: features}))


def with_scores(bank: Bank, after: Sequence[float]) -> Bank:
    """Return a bank whose last step says which scores its images have by now."""
    *steps, last = bank.header.feedback
    images = [image.model_copy(update={"after": score}) for image, score in zip(last.images, after, strict=True)]
    last = last.model_copy(update={"images": tuple(images)})
    return replace(bank, header=bank.header.model_copy(update={"feedback": (*steps, last)}))


def _of_all_tiles(memory: Memory, tokens: NDArray[np.float32]) -> Units:
    """Return the features [T · P, C] of tokens [T, L, P, C] by taps, then degrees."""
    return [np.concatenate(parts) for parts in zip(*map(memory.units, tokens), strict=True)]


def patch_cover(mask: NDArray[np.float32], patches: int) -> NDArray[np.float32]:
    """Return which part [P] of each patch of a square grid a mask [h, w] covers."""
    side, _ = square_grid(patches)
    cover = cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(cover, np.float32).reshape(-1)


def nearer(distances: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the k lowest, ascending, of distances [P, k] and others [P, m]."""
    both = np.concatenate([distances, others], axis=1)
    return np.sort(both, axis=1)[:, : distances.shape[1]]


def without(bank: Bank, number: int) -> Bank:
    """Return a bank without one of its steps."""
    steps = tuple(step for step in bank.header.feedback if step.number != number)
    given = {step: features for step, features in bank.given.items() if step != number}
    return rederived(replace(bank, header=bank.header.model_copy(update={"feedback": steps}), given=given))


def with_feedback(
    bank: Bank, network: str, units: Units, nearest: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Return how unusual patches are [Q] by all that a bank was told.

    units, nearest: their features [Q, C] and distances [Q, k] to what the bank was made from, by taps and degrees.
    """
    closer, to_defects = [], []
    for key, own, distances in zip(
        (key for key in keys_of(bank.header) if key[0] == network), units, nearest, strict=True
    ):
        accepted, rejected = bank.added("accept", key), bank.added("reject", key)
        if len(accepted):
            found = Search(accepted, min(bank.header.neighbours, len(accepted)), "cpu").measured(own)
            distances = nearer(distances, found)
        if len(rejected):
            to_defects.append(Search(rejected, 1, "cpu").measured(own)[:, 0])
        closer.append(distances)
    return raised(closer, np.mean(to_defects, axis=0) if to_defects else None, bank.span(network))


def rederived(bank: Bank) -> Bank:
    """Return a bank with the scores and highest map values that its own images have without themselves.

    All that was accepted is compared with them, and their most unusual patches with all that was rejected.
    """
    patches = dict[str, NDArray[np.float64]]()
    for name, own in bank.own.items():
        units = [features.units() for features in own.features.values()]
        nearest = [distances.astype(np.float64) for distances in own.distances.values()]
        patches[name] = own.maps.astype(np.float64)
        unusual = with_feedback(bank, name, units, nearest)
        np.put_along_axis(patches[name], own.rows, unusual.reshape(own.rows.shape), axis=1)
    if bank.header.tiling:
        highest = np.array([float(whole.max()) for whole in bank.whole_maps(patches[bank.header.map_network])])
        return replace(bank, scores=highest, peaks=highest)
    peaks = patches[bank.header.map_network].max(axis=1)
    return replace(bank, scores=raw_scores(bank.header, patches), peaks=peaks)
