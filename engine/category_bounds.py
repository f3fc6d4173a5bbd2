"""The bounds of a category's verdicts and regions: whose rule speaks, and on which scores and maps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config
from zsad.engine.results.groups import Results
from zsad.engine.scores.image_scores import FEW_IMAGES, min_max
from zsad.engine.scores.verdicts import ACCEPTED_PERCENTILE, Bounds, batch_bounds, expected_bounds

DISTRIBUTION = "distribution of the scores"  # the rule where nobody knows better
MANY_MAPS = 4000  # of images that are on disk; of more not all are looked at for a percentile
NO_VERDICTS = f"no verdicts, since fewer than {FEW_IMAGES} images tell too little; --threshold gives a bound"


@dataclass(frozen=True)
class Compared:
    """What scores in [0, 1] of images that were compared with each other come from."""

    raw_scores: NDArray[np.float64]  # [N]
    sound: Sequence[int]  # places of images that are not damaged, which alone decide


def image_bounds(
    config: Config, own: Bounds | None, scores: NDArray[np.float64], compared: Compared | None
) -> Bounds | None:
    """Return the bounds that the user, the method or the distribution of the scores [N] gives, in this order.

    own: the method's. compared: None of methods whose scores are probabilities. Returns None for too few images.
    """
    asked, expected = config.threshold, config.expected_defects
    if not isinstance(asked, str):
        # Of images that are judged each by itself, what is a region follows from no others either.
        return Bounds(asked, asked, "--threshold", None if own is None or compared else own.region)
    if own is not None and (expected is None or len(scores) < FEW_IMAGES):  # of few images no share can be told
        return own
    if len(scores) < FEW_IMAGES:
        return None
    if expected is not None:
        return Bounds(*expected_bounds(scores, expected), f"--expected-defects {expected:g}")
    if compared is None:
        return Bounds(*batch_bounds(scores, None), DISTRIBUTION)
    raw = compared.raw_scores[compared.sound]
    return Bounds(*batch_bounds(scores[compared.sound], (float(raw.min()), float(raw.max()))), DISTRIBUTION)


def region_bound(
    bounds: Bounds,
    scores: NDArray[np.float64],
    results: Results | None,
    map_percentile: Callable[[NDArray[np.intp], float], float | None],
) -> float | None:
    """Return the map value that the patches of accepted images stay below, of all images where none is accepted.

    scores: [N]; results: of methods that compare, whose maps are at hand; of others `map_percentile` reads those of
    images by their places. Returns None where no maps were written.
    """
    accepted = np.flatnonzero(scores <= bounds.accept)
    chosen = accepted if accepted.size else np.arange(scores.size)
    if results is None:
        return map_percentile(chosen, ACCEPTED_PERCENTILE)
    step = max(1, len(chosen) // MANY_MAPS) if results.on_disk else 1  # of very many, a part spread evenly
    maps = np.stack([results[place].map for place in chosen[::step].tolist()])  # [n, h, w]
    return float(np.percentile(min_max(maps, results[0].scale), ACCEPTED_PERCENTILE))
