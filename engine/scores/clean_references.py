"""Clean references: a batch says which of its images look normal, and patches are compared with those.

minima [2, N, P, N + K] → first pass: mean distance to all others → rounds: the images of the lowest scores are kept,
and the distances to them averaged → blends with MuSc's own average over all images, and with that over known-good ones
alone: pixel maps [N, P], raw image scores [N], the most salient patch of each image [N]

MuSc's interval is there so that a patch need not occur in every image; it also lets a defect that many images have pass
for usual. Neither needs a product or a forward pass beyond MuSc's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zsad.kernels.averages import kept_averages

from .image_scores import FEW_IMAGES, top_mean

if TYPE_CHECKING:
    from zsad.kernels.cuda.device import Device

Floats = NDArray[np.float64]

EVERYONE = (0.0, 1.0)  # the interval of all distances: what is left of them hides a defect that repeats
LEAST_KEPT = 2  # known-good images among them
KNOWN_HALF = 16  # known-good images beside a first one that count as much by themselves as all that is blended does


def fitting_blend(defects: float | None) -> float:
    """Return how much clean references should count in image scores where about this share of the images is defective.

    None: nobody knows. Of a nearly clean batch they throw away what is usual variety; where defects are many, they are
    what tells them from what is usual.
    """
    if defects is None:
        return 0.25
    return 0.0 if defects < 0.1 else 0.25 if defects <= 0.3 else 0.75


@dataclass(frozen=True)
class Rule:
    """How references are chosen, and what their distances count beside those to all images."""

    interval: tuple[float, float]  # of the distances to the images that are kept, and to all
    keep_share: float  # of the images, those of the lowest scores
    rounds: int  # 0: all are kept
    image_blend: float  # 0: the image score of all images, 1: of those that are kept alone
    map_blend: float  # the same of pixel maps


@dataclass(frozen=True)
class Round:
    """One choice of references."""

    image_scores: Floats  # [N] that it is made by
    kept: NDArray[np.bool_]  # [N + K]
    patch_scores: Floats  # [N, P], distances to what is kept


@dataclass(frozen=True)
class CleanScores:
    """What clean references say of a group of images; the averages are over layers and degrees if nothing else is said.

    `average` is over the interval of all images, `clean` over that of those which are kept.
    """

    rule: Rule
    first_pass: Floats  # [N, P] mean distances to all others
    rounds: Sequence[Round]  # none where there are too few images
    average: Floats  # [N, P]
    average_smallest: Floats  # [N, P], of the smallest degree alone
    clean: Floats  # [N, P]
    clean_smallest: Floats  # [N, P], of the smallest degree alone
    known: Floats | None = None  # [N, P], over the interval of known-good images; None where there are none
    known_smallest: Floats | None = None  # [N, P], of the smallest degree alone
    known_share: float = 0.0  # what the last two count

    @property
    def patch_maps(self) -> Floats:
        """Pixel maps [N, P]: of the smallest degree, whose edges are the sharpest."""
        return self._smallest(self.rule.map_blend)

    @property
    def image_scores(self) -> Floats:
        """Raw image scores [N]: a mean of the highest patches of all degrees, and the highest of the smallest one."""
        blended = _blend(self.average, self.clean, self.rule.image_blend)
        both = blended if self.known is None else _blend(blended, self.known, self.known_share)
        scores: Floats = top_mean(both) + self._smallest(self.rule.image_blend).max(axis=1)
        return scores

    @property
    def salient(self) -> NDArray[np.intp]:
        """The patch of each image that is the farthest from what is kept, [N]."""
        farthest = self.clean if self.known is None else _blend(self.clean, self.known, self.known_share)
        patches: NDArray[np.intp] = farthest.argmax(axis=1)
        return patches

    def _smallest(self, share: float) -> Floats:
        blended = _blend(self.average_smallest, self.clean_smallest, share)
        return blended if self.known_smallest is None else _blend(blended, self.known_smallest, self.known_share)


def clean_scores(
    minima: NDArray[np.float32], rule: Rule, devices: "Sequence[Device]" = (), known: int | None = None
) -> CleanScores:
    """Score images by those among them that look normal.

    minima: [2, M, P, N + K] as mutual scoring hands them back for "smallest degree", in memory or a memory map, of N
        images and behind them M - N of K known-good ones. These are always kept.
    devices: opened CUDA devices; none is the CPU.
    known: K, at least 2 where known-good images are scored themselves; None: as many as are not scored.

    Results have M rows. Fewer than ten images, known-good ones among them, say too little: all of them are then the
    references, as MuSc has it. The more known-good images there are, the more the distances to them alone count.
    """
    of_all, of_smallest = minima
    scored, compared = len(of_all), of_all.shape[2]
    images = scored if known is None else compared - known
    everyone, are_known = np.ones(compared, bool), np.arange(compared) >= images
    mean = partial(kept_averages, interval=rule.interval, devices=devices)
    average, average_smallest = mean(of_all, everyone), mean(of_smallest, everyone)
    patch_scores = first_pass = kept_averages(of_all, everyone, EVERYONE, devices)
    if compared < FEW_IMAGES or rule.rounds == 0:
        return CleanScores(rule, first_pass, (), average, average_smallest, average, average_smallest)
    rounds: list[Round] = []
    for _ in range(rule.rounds):
        scores = top_mean(patch_scores)
        kept = _kept(scores[:images], compared, rule.keep_share)
        patch_scores = mean(of_all, kept)
        rounds.append(Round(scores, kept, patch_scores))
    clean_smallest = mean(of_smallest, rounds[-1].kept)
    found = CleanScores(rule, first_pass, rounds, average, average_smallest, patch_scores, clean_smallest)
    count = compared - images
    if count < 2:  # one says nothing of what varies
        return found
    share = (count - 1) / (count - 1 + KNOWN_HALF)
    of_known = mean(of_all, are_known), mean(of_smallest, are_known)
    return replace(found, known=of_known[0], known_smallest=of_known[1], known_share=share)


def _kept(image_scores: Floats, compared: int, share: float) -> NDArray[np.bool_]:
    """Choose the share of the images with the lowest scores [N], and all behind them; returns [N + K]."""
    count = max(LEAST_KEPT - (compared - len(image_scores)), round(share * len(image_scores)))
    kept = np.zeros(compared, bool)
    kept[np.argsort(image_scores, kind="stable")[:count]] = True
    kept[len(image_scores) :] = True  # known-good images: always kept
    return kept


def _blend(average: Floats, clean: Floats, share: float) -> Floats:
    blended: Floats = average + share * (clean - average)
    return blended


def salient_features(tokens: ArrayLike) -> Floats:
    """Turn the raw tokens [N, L, C] of each image's most salient patch into unit vectors [N, L·C].

    Layers have equal shares of them. Those of images with the same defect are alike.
    """
    x = np.asarray(tokens, np.float64)
    lengths = np.linalg.norm(x, axis=2, keepdims=True)
    units = x / np.where(lengths > 0, lengths, 1)
    features: Floats = units.reshape(len(x), -1) / np.sqrt(x.shape[1])
    return features
