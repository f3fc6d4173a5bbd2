"""What feedback does to images that it is not of: a section of `accuracy`.

Of each draw 40 % of a set's normal images make a bank. Half of the others, normal and defective, come along and are
judged by it: the five normal ones that score highest are accepted, the five defective ones that score lowest are
rejected. The other half tells what that has changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, load_config
from zsad.engine.evaluation.metrics import image_metrics
from zsad.engine.methods.arrays import HostArrays
from zsad.engine.methods.bank import memories, raw_scores
from zsad.engine.methods.bank_build import Making, build_bank
from zsad.engine.methods.bank_feedback import Additions, Given, NothingToAddError, with_feedback
from zsad.engine.methods.bank_file import Bank, Kind
from zsad.engine.methods.method import Place, method_class
from zsad.engine.networks.network import Network
from zsad.engine.scores.conformal import upper_bound

from .accuracy_batches import SMALL_DEGREES, SMALL_TAPS, TAPS, Floats, ImageSet, Reader

DRAWS, GIVEN, BANK_SHARE, FALSE_ALARMS = 3, 5, 0.4, 0.1
FACTS = {"draws": DRAWS, "given": GIVEN, "false_alarms": FALSE_ALARMS}
MADE = {"bit_depth": 8, "chosen": False, "precision": "fp32"}


def place_of(image_size: int) -> tuple[Config, Place]:
    """Return a configuration and what a bank of kept tokens is made with, which runs no network."""
    overrides = {"image_size": image_size, "taps": SMALL_TAPS, "degrees": SMALL_DEGREES}
    config = load_config("small", None, overrides, method_of=method_class)
    networks = {name: Network(spec, "kept", "0" * 64, "imagenet", {}) for name, spec in config.networks.items()}
    return config, Place(networks, HostArrays((), None), {}, None)  # type: ignore[arg-type]


def parts(anomalous: NDArray[np.bool_], seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Deal images: the bank's, those that feedback may be of, and the rest."""
    rng = np.random.default_rng(seed)
    normal, bad = (rng.permutation(np.flatnonzero(which)) for which in (~anomalous, anomalous))
    bank, others = np.split(normal, [round(BANK_SHARE * len(normal))])
    seen, rest = (np.concatenate(pair) for pair in zip(np.array_split(others, 2), np.array_split(bad, 2), strict=True))
    return bank, seen, rest


class Compared:
    """Images by their patches' distances to what a bank was made from, which feedback does not change."""

    def __init__(self, bank: Bank, place: Place, tokens: NDArray[np.float32]) -> None:
        """tokens: [N, L, P, C]"""
        ((self._network, memory),) = memories(bank, place).items()
        self._units = [memory.units(image) for image in tokens]
        self._nearest = [memory.measured(units)[0] for units in self._units]

    def scores(self, bank: Bank) -> Floats:
        """Return raw scores [N] by a bank that has been told something."""
        pairs = zip(self._units, self._nearest, strict=True)
        maps = np.stack([with_feedback(bank, self._network, units, nearest) for units, nearest in pairs])
        return raw_scores(bank.header, {self._network: maps})


def told(
    bank: Bank, kind: Kind, images: Sequence[int], place: Place, tokens: NDArray[np.float32], masks: Mapping[int, Any]
) -> Bank:
    """Return a bank after feedback; masks: of images, where they are told."""
    additions, given = Additions(bank, kind, memories(bank, place)), list[Given]()
    for image in images:
        new = Given(
            str(image), f"{image:064x}", dict.fromkeys(place.networks, tokens[image : image + 1]), masks.get(image)
        )
        try:
            additions.add(new)
        except NothingToAddError:
            continue
        given.append(new)
    if not given:
        return bank
    return additions.bank(given, [0.0] * len(given), datetime(2026, 1, 1, tzinfo=timezone.utc))


def banks_after(
    bank: Bank, seen: NDArray[np.intp], images: ImageSet, tokens: NDArray[np.float32], place: Place
) -> Iterator[tuple[str, Bank]]:
    """Yield a bank before feedback and after each kind of it."""
    yield "before", bank
    scores, bad = Compared(bank, place, tokens[seen]).scores(bank), images.anomalous[seen]
    alarms = seen[~bad][np.argsort(-scores[~bad], kind="stable")[:GIVEN]].tolist()
    missed = seen[bad][np.argsort(scores[bad], kind="stable")[:GIVEN]].tolist()
    accepted = told(bank, "accept", alarms, place, tokens, {})
    yield "accept", accepted
    yield "reject", told(bank, "reject", missed, place, tokens, {})
    yield "both", told(accepted, "reject", missed, place, tokens, {})
    if images.masks is not None:
        masks = {image: images.masks[image].astype(np.float32) for image in missed}
        yield "reject, masks", told(bank, "reject", missed, place, tokens, masks)
        yield "both, masks", told(accepted, "reject", missed, place, tokens, masks)


def feedback(images: ImageSet, reader: Reader) -> dict[str, Any]:
    """Metrics of images that no feedback is of, before and after it, by draws."""
    config, place = place_of(reader.image_size)
    tokens, found = images.tokens[:, [TAPS.index(tap) for tap in SMALL_TAPS]], dict[str, dict[str, list[float]]]()
    for seed in range(DRAWS):
        known, seen, rest = parts(images.anomalous, seed)
        named = dict.fromkeys(place.networks, tokens[known])
        bank = build_bank(named, config, place, Making(), MADE, lambda *_: None)
        others, bad = Compared(bank, place, tokens[rest]), images.anomalous[rest]
        for row, after in banks_after(bank, seen, images, tokens, place):
            for key, value in judged(after, others.scores(after), bad).items():
                found.setdefault(row, {}).setdefault(key, []).append(round(value, 5))
    return found


def judged(bank: Bank, scores: Floats, bad: NDArray[np.bool_]) -> dict[str, float]:
    rejected = scores > upper_bound(bank.scores, FALSE_ALARMS)[0]
    return {
        "image_auroc": image_metrics(bad, scores)["auroc"],
        "false_alarms": float(rejected[~bad].mean()),
        "recall": float(rejected[bad].mean()),
    }
