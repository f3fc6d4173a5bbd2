"""Whether the bounds that known-good images give keep what they promise: a section of `accuracy`.

Of a set's normal images some are drawn as known-good ones, and scored beside others with more or fewer of the defective
images among them, as `zsad-infer --reference` does it; how many of the good images are rejected is counted.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.methods.musc import Settings
from zsad.engine.scores.clean_references import Rule, clean_scores, salient_features
from zsad.engine.scores.image_scores import FEW_IMAGES, rscin, rscin_beside
from zsad.engine.scores.known_good import known_bounds

from .accuracy_batches import SMALL_DEGREES, SMALL_TAPS, Bools, Floats, ImageSet, small_settings

SHARES: Mapping[str, float] = {"0 %": 0.0, "8 %": 0.08, "40 %": 0.4}  # of the images that are judged
SPLITS, KNOWN, ASKED = 200, 20, 0.05
NORMAL_95 = 1.96  # deviations
FACTS = {"splits": SPLITS, "asked": ASKED}

Indices = NDArray[np.intp]


def drawn(anomalous: Bools, share: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Draw known-good images, and from the others all normal ones and so many defective ones that they are a share."""
    normal, bad = rng.permutation(np.flatnonzero(~anomalous)), np.flatnonzero(anomalous)
    known, rest = np.split(normal, [min(KNOWN, len(normal) - FEW_IMAGES)])
    count = min(round(share / (1 - share) * len(rest)), len(bad))
    return known, np.concatenate([rest, rng.choice(bad, count, replace=False)])


class Known:
    """Scores images of a set beside known-good ones of it as the method does; distances are measured once."""

    def __init__(self, images: ImageSet, settings: Settings) -> None:
        batch, rule = images.batch, settings.clean_rule(None)
        assert rule is not None
        self._rule: Rule = rule
        self._neighbours = settings.salient_rscin
        parts = [batch.minima(SMALL_TAPS, some).mean(axis=(0, 1)) for some in (SMALL_DEGREES, SMALL_DEGREES[:1])]
        self._minima = np.stack(parts)  # [2, N, P, N]
        self._tokens = batch.tokens_of(SMALL_TAPS)  # [N, l, P, C]

    def rejected(self, members: Indices, known: Indices) -> Bools:
        """Return which of the images [n] are above the bound that known-good ones give."""
        both = np.concatenate([members, known])
        minima = self._minima[:, both][..., both]  # [2, n + k, P, n + k]
        clean = clean_scores(minima, self._rule, known=len(known))
        vectors = salient_features(self._tokens[both, :, clean.salient])
        raw, beside = np.split(clean.image_scores, [len(members)])
        own, others = np.split(vectors, [len(members)])
        scores = rscin(raw, own, self._neighbours)
        bounds = known_bounds([rscin_beside(beside, others, raw, own, self._neighbours)], ASKED)
        return np.asarray(scores > bounds.reject)


def bounds(images: ImageSet, _: object) -> dict[str, Any]:
    """Return by shares of defective images which share of the good and of the defective ones is rejected.

    Of a set with few normal images fewer are known-good ones, and these promise less.
    """
    judging, found = Known(images, small_settings()), {}
    for name, share in SHARES.items():
        good: list[float] = []
        bad: list[float] = []
        for seed in range(SPLITS):
            known, members = drawn(images.anomalous, share, np.random.default_rng(seed))
            rejected, anomalous = judging.rejected(members, known), images.anomalous[members]
            good.append(float(rejected[~anomalous].mean()))
            bad += [float(rejected[anomalous].mean())] if anomalous.any() else []
        found[name] = rates(np.array(good), np.array(bad))
    promised = max(ASKED, 1 / (len(known) + 1))
    return {"known": len(known), "promised": round(promised, 5), "shares": found}


def rates(good: Floats, bad: Floats) -> dict[str, float]:
    """Return means over the splits, [splits] each, that of good images with its 95 % interval.

    Splits of one set share images, so that the interval is of these splits, not of other sets.
    """
    off = NORMAL_95 * float(good.std(ddof=1)) / math.sqrt(len(good))
    mean = float(good.mean())
    found = {"rejected": mean, "low": max(mean - off, 0.0), "high": mean + off}
    found |= {"recall": float(bad.mean())} if len(bad) else {}
    return {key: round(value, 5) for key, value in found.items()}
