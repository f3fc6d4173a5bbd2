"""Accuracy of mutual scoring and what it is compared with, on any folder of sets that have labels.

    python -m zsad.bench.accuracy SETS [--image-size 280] [--checkpoint dinov2-vits14] [--only methods planted ...]

SETS is laid out as MVTec AD is, or in another way that `zsad-eval` reads. Each set goes through the network once, and
its images are compared with each other once, in fp32; everything else is computed from the tokens and minima, which are
in memory for one set at a time. Masks and maps are compared at 256×256. Sections, a record each:

    methods        image and pixel metrics of every row, with intervals over images and over sets
    pooling        the same with SNAMD (MuSc-V2) for LNAMD
    windows        position windows of a few sizes, of `all` and `blended`
    contamination  the same images with fewer of the defective ones, drawn at random
    known          the same normal images left out, and compared with or not
    bounds         how many good images are rejected by the bounds that known-good ones give
    planted        one defect at the same place in 5 to 40 % of a set's normal images
    banks          metrics of images scored by banks that keep all patches or few, and how many normal ones these reject
    feedback       what accepting false alarms and rejecting missed defects does to other images
    precisions     image AUROC, pixel AP and patch scores of int8 networks beside fp32's, at the image size
    verdicts       F1, false alarms and recall of rules for the bound, from the scores of whole sets and of parts
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import ConfigError
from zsad.engine.evaluation.metrics import image_metrics
from zsad.engine.images.categories import Category
from zsad.engine.images.folders import NothingToScoreError, scan
from zsad.engine.networks.runtime import choose_runtime
from zsad.engine.scores.clean_references import fitting_blend
from zsad.engine.scores.image_scores import image_scores, rscin
from zsad.engine.scores.verdicts import (
    distribution_bounds,
    expected_bounds,
    log_distances,
    median_and_deviation,
    otsu,
)
from zsad.export.state_dict import CheckpointError
from zsad.kernels.averages import kept_averages
from zsad.kernels.mutual_scoring import square_grid
from zsad.kernels.snamd import similarity_pooled

from .accuracy_banks import FACTS as BANKS
from .accuracy_banks import banks
from .accuracy_batches import (
    DEGREES,
    INTERVAL,
    SMALL_DEGREES,
    SMALL_TAPS,
    TAPS,
    Batch,
    Bools,
    Floats,
    ImageSet,
    Metrics,
    Reader,
    Scored,
    clean_scored,
    defects,
    metrics_of,
    planted,
    read_set,
)
from .accuracy_feedback import FACTS as FEEDBACK
from .accuracy_feedback import feedback
from .accuracy_known import FACTS as KNOWN
from .accuracy_known import bounds
from .accuracy_precisions import precisions
from .records import RESULTS, append, environment

BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of image scores; maps have half, and all of it with 1
NEAREST_SHARE = 0.001  # of all patches, that AnomalyDINO averages

WINDOWS = (8, 4, 2)  # rows and columns of patches around a patch's own place
SHARES = {"20 %": (0.2, 2), "8 %": (0.08, 3)}  # of defective images, and draws
KNOWN_COUNTS, KNOWN_DRAWS = (0, 1, 4, 16, 32), 3
PLANTED_SHARES, PLANTED_DEFECTS, PLANTED_IMAGES = (0.05, 0.1, 0.2, 0.3, 0.4), 3, 60


def interval_scores(batch: Batch, taps: Sequence[int], degrees: Sequence[int]) -> Floats:
    """Return patch scores [N, P] in the published order: the interval of each tap and degree, then their mean."""
    each = batch.minima(taps, degrees)
    everyone = np.ones(each.shape[-1], np.bool_)
    averages = [kept_averages(minima, everyone, INTERVAL) for layer in each for minima in layer]
    return np.mean(averages, axis=0)  # type: ignore[no-any-return]


def musc(batch: Batch, image_size: int) -> Scored:
    maps = interval_scores(batch, TAPS, DEGREES)
    raw = image_scores(maps, square_grid(maps.shape[1]), "map_maximum", image_size)
    return Scored(raw, maps, raw)


def musc_rscin(batch: Batch, image_size: int) -> Scored:
    plain = musc(batch, image_size)
    return Scored(rscin(plain.raw, batch.embeddings, (1, 2, 3)), plain.maps, plain.raw)


def small(batch: Batch, image_size: int) -> Scored:
    maps = interval_scores(batch, SMALL_TAPS, SMALL_DEGREES)
    raw = image_scores(maps, square_grid(maps.shape[1]), "top_fraction", image_size)
    return Scored(raw, maps, raw)


def anomaly_dino(batch: Batch, image_size: int) -> Scored:
    """AnomalyDINO's batched scoring of `small`'s minima: cosine distances, the nearest 0.1 % of all other patches.

    Of those no more than one patch of each image is known here.
    """
    images, patches, _ = batch.each.shape[2:]
    cosine = np.square(batch.minima(SMALL_TAPS, SMALL_DEGREES), dtype=np.float64).mean(axis=(0, 1)) / 2
    count = min(max(1, int(NEAREST_SHARE * patches * (images - 1))), images - 1)
    maps = np.sort(cosine, axis=-1)[..., :count].mean(axis=-1)
    raw = image_scores(maps, square_grid(patches), "top_fraction", image_size)
    return Scored(raw, maps, raw)


def clean_rows(batch: Batch, blends: Sequence[float]) -> Iterator[Scored]:
    """Yield what clean references say with each blend of the image score; maps have half of them, and all with 1."""
    degrees = tuple(degree for degree in SMALL_DEGREES if degree in batch.degrees)
    minima = np.stack([batch.minima(SMALL_TAPS, some).mean(axis=(0, 1)) for some in (degrees, degrees[:1])])
    return clean_scored(minima, batch.tokens_of(SMALL_TAPS), blends)


def blend_name(blend: float) -> str:
    return {0.25: "blended", 1.0: "clean"}.get(blend, f"blend {blend:g}")


def similar(images: ImageSet, reader: Reader) -> Iterator[tuple[str, Scored]]:
    """Yield the rows of SNAMD, whose tokens are pooled first and compared anew: MuSc's settings, and `blended`."""
    own = images.batch
    pooled = similarity_pooled(own.tokens, square_grid(own.tokens.shape[2]), DEGREES)
    batch = reader.batch(pooled, own.embeddings, TAPS, (1,))
    maps = interval_scores(batch, TAPS, (1,))
    raw = image_scores(maps, square_grid(maps.shape[1]), "map_maximum", reader.image_size)
    yield "snamd", Scored(raw, maps, raw)
    smaller = similarity_pooled(own.tokens_of(SMALL_TAPS), square_grid(own.tokens.shape[2]), SMALL_DEGREES)
    batch = reader.batch(smaller, own.embeddings, SMALL_TAPS, (1,))
    yield "snamd blended", next(clean_rows(batch, (0.25,)))


PUBLISHED: Mapping[str, Callable[[Batch, int], Scored]] = {
    "musc": musc,
    "musc rscin": musc_rscin,
    "all": small,
    "anomaly dino": anomaly_dino,
}
COMPARED = (0.25, 0.5, 1.0)


def rows(batch: Batch, image_size: int) -> dict[str, Scored]:
    """Return every method's scores of a batch."""
    found = {name: row(batch, image_size) for name, row in PUBLISHED.items()}
    return found | dict(zip(map(blend_name, COMPARED), clean_rows(batch, COMPARED), strict=True))


# Intervals


def bootstrap(labels: Bools, scores: Mapping[str, Floats], draws: int, seed: int) -> dict[str, Floats]:
    """Return each row's image AUROC [draws] over images drawn again from each class, the same for all rows."""
    rng = np.random.default_rng(seed)
    good, bad = (rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in (np.sum(~labels), np.sum(labels)))
    found = {}
    for name, values in scores.items():
        left, right = values[labels][:, None], values[~labels]
        wins = (left > right) + 0.5 * (left == right)  # [bad, good]
        found[name] = np.einsum("db,bg,dg->d", bad, wins, good, optimize=True)
    return found


def percentiles(values: Floats) -> list[float]:
    """Return the ends of the 95 % interval."""
    return [round(float(value), 5) for value in np.percentile(values, [2.5, 97.5])]


def intervals(
    of_sets: Mapping[str, Mapping[str, Floats]], metrics: Mapping[str, Mapping[str, Metrics]], seed: int
) -> Any:
    """Return intervals of the mean gain over `all` in image AUROC: over images, and over sets, by row."""
    names, rng = list(of_sets), np.random.default_rng(seed)
    found = {}
    for row in next(iter(of_sets.values())):
        gains = np.array([of_sets[name][row] - of_sets[name]["all"] for name in names])  # [sets, draws]
        point = np.array([metrics[name][row]["image_auroc"] - metrics[name]["all"]["image_auroc"] for name in names])
        drawn = point[rng.integers(0, len(names), (gains.shape[1], len(names)))].mean(axis=1)
        found[row] = {"images": percentiles(gains.mean(axis=0)), "sets": percentiles(drawn)}
    return found


# Sections: what their records hold of a set


def methods(images: ImageSet, reader: Reader) -> dict[str, Any]:
    scored = rows(images.batch, reader.image_size)
    return {
        "metrics": {name: metrics_of(images, row) for name, row in scored.items()},
        "anomalous": images.anomalous,
        "scores": {name: row.images for name, row in scored.items()},
    }


def gains(found: Mapping[str, Any], draws: int) -> dict[str, Any]:
    """Return the metrics of all sets, and what the rows gain on average."""
    metrics = {name: of_set["metrics"] for name, of_set in found.items()}
    drawn = {
        name: bootstrap(of_set["anomalous"], of_set["scores"], draws, number)
        for number, (name, of_set) in enumerate(found.items())
    }
    return {"sets": metrics, "gain_over_all": intervals(drawn, metrics, 0)}


def pooling(images: ImageSet, reader: Reader) -> dict[str, Any]:
    pairs = {"musc": musc, "all": small}
    scored = {name: row(images.batch, reader.image_size) for name, row in pairs.items()}
    scored |= {"blended": next(clean_rows(images.batch, (0.25,))), **dict(similar(images, reader))}
    return {name: metrics_of(images, row) for name, row in scored.items()}


def windows(images: ImageSet, reader: Reader) -> dict[str, Any]:
    own, of_set = images.batch, {}
    chosen = own.tokens_of(SMALL_TAPS), own.embeddings, SMALL_TAPS, SMALL_DEGREES
    for window in (None, *WINDOWS):
        batch = own if window is None else reader.batch(*chosen, window=window)
        scored = {"all": small(batch, reader.image_size), "blended": next(clean_rows(batch, (0.25,)))}
        of_set[str(window)] = {name: metrics_of(images, row) for name, row in scored.items()}
    return of_set


def draw(anomalous: Bools, share: float, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return all normal images and so many of the others that they have this share, as far as there are so many."""
    bad = np.flatnonzero(anomalous)
    count = min(round(share / (1 - share) * np.count_nonzero(~anomalous)), len(bad))
    return np.sort(np.concatenate([np.flatnonzero(~anomalous), rng.choice(bad, count, replace=False)]))


def draws(anomalous: Bools) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield parts of a set by what share of them is defective."""
    for name, (share, count) in SHARES.items():
        for seed in range(count):
            yield name, draw(anomalous, share, np.random.default_rng(seed))


def contamination(images: ImageSet, reader: Reader) -> dict[str, Any]:
    """Image AUROC of `all` and every blend; each part is scored by itself."""
    of_set: dict[str, dict[str, list[float]]] = {}
    everyone = np.arange(len(images.anomalous))
    for name, members in [("all", everyone), *draws(images.anomalous)]:
        batch = images.batch.of(members)
        scored = {"all": small(batch, reader.image_size)}
        scored |= dict(zip(map(blend_name, BLENDS), clean_rows(batch, BLENDS), strict=True))
        for row, values in scored.items():
            auroc = image_metrics(images.anomalous[members], values.images)["auroc"]
            of_set.setdefault(name, {}).setdefault(row, []).append(round(auroc, 5))
    return of_set


def known_good(images: ImageSet, reader: Reader) -> dict[str, Any]:
    """Image AUROC beside so many known-good images, drawn from the normal ones; those that are drawn are not scored.

    Counts of more than half of a set's normal images are left out.
    """
    of_set: dict[str, dict[str, list[float]]] = {}
    normal = np.flatnonzero(~images.anomalous)
    for seed in range(KNOWN_DRAWS):
        drawn = np.random.default_rng(seed).permutation(normal)[: min(max(KNOWN_COUNTS), len(normal) // 2)]
        scored = np.setdiff1d(np.arange(len(images.anomalous)), drawn)
        for count in (count for count in KNOWN_COUNTS if count <= len(drawn)):
            batch = images.batch.of(scored, drawn[:count])
            for row, values in compared_rows(batch, reader.image_size).items():
                auroc = image_metrics(images.anomalous[scored], values.images)["auroc"]
                of_set.setdefault(str(count), {}).setdefault(row, []).append(round(auroc, 5))
    return of_set


def planted_defects(images: ImageSet, reader: Reader) -> dict[str, Any]:
    """Image AUROC where some of the normal images have the same defect at the same place, by share and row."""
    normal = np.random.default_rng(0).permutation(np.flatnonzero(~images.anomalous))[:PLANTED_IMAGES]
    most = round(max(PLANTED_SHARES) * len(normal))
    curves: dict[str, dict[str, list[float]]] = {}
    for defect in defects(images, PLANTED_DEFECTS):
        pictures = (planted(images.picture(images.images[i]), defect) for i in normal[:most])
        own = images.batch.of(normal)
        kept = zip((own.tokens, own.embeddings), reader.tokens(pictures), strict=True)
        tokens, embeddings = (np.concatenate(pair) for pair in kept)
        chosen = tokens[:, [TAPS.index(tap) for tap in SMALL_TAPS]]
        both = reader.batch(chosen, embeddings, SMALL_TAPS, SMALL_DEGREES)
        for share in PLANTED_SHARES:
            count = round(share * len(normal))
            members = np.r_[len(normal) : len(normal) + count, count : len(normal)]
            for row, scored in compared_rows(both.of(members), reader.image_size).items():
                auroc = image_metrics(np.arange(len(normal)) < count, scored.images)["auroc"]
                curves.setdefault(f"{share:g}", {}).setdefault(row, []).append(round(auroc, 5))
    return curves


def compared_rows(batch: Batch, image_size: int) -> dict[str, Scored]:
    return {"all": small(batch, image_size)} | dict(
        zip(map(blend_name, COMPARED), clean_rows(batch, COMPARED), strict=True)
    )


# Rules for the bound above which an image counts as defective, on the logarithms of scores [N] in distances


def two_gaussians(logs: Floats) -> float:
    """Return the lowest score that more probably belongs to the higher of two normal distributions."""
    from sklearn.mixture import GaussianMixture  # takes long to import

    mixture = GaussianMixture(2, random_state=0, n_init=3).fit(logs[:, None])
    low, high = np.sort(mixture.means_[:, 0]).tolist()
    line = np.linspace(low, high, 1001)
    higher = mixture.predict(line[:, None]) == mixture.means_[:, 0].argmax()
    return float(line[np.argmax(higher)])


def deviations(count: float) -> Callable[[Floats], float]:
    def bound(logs: Floats) -> float:
        median, deviation = median_and_deviation(logs)
        return median + count * deviation

    return bound


def lower_half(logs: Floats) -> float:
    """Return the bound of `--threshold auto` of version 0.2: three deviations of the scores' own lower half."""
    raw = np.exp(logs)
    median = np.median(raw)
    return float(np.log(median + 3 * 1.4826 * np.median(median - raw[raw <= median])))


RULES: Mapping[str, Callable[[Floats], float]] = {
    "lower half": lower_half,
    "otsu": otsu,
    "two gaussians": two_gaussians,
    "2.5 deviations": deviations(2.5),
    "3.5 deviations": deviations(3.5),
    "zsad reject": lambda logs: distribution_bounds(logs)[1],
    "zsad review": lambda logs: distribution_bounds(logs)[0],
}


EXPECTED = ("expected review", "expected reject")  # of `--expected-defects` told the share that there is


def judged(labels: Bools, scores: Floats, rejected: Bools) -> Metrics:
    """Return F1, false alarms and recall of a verdict, with the best F1 that any bound has; NaN where there is none."""
    hits, alarms = np.sum(rejected & labels), np.sum(rejected & ~labels)
    with np.errstate(invalid="ignore"):
        recall = hits / labels.sum()
        f1 = 2 * hits / (hits + alarms + labels.sum()) if labels.any() else np.nan
        false = alarms / np.sum(~labels)
    best = image_metrics(labels, scores)["f1"]
    return {"f1": float(f1), "false_alarms": float(false), "recall": float(recall), "best_f1": best}


def verdicts(images: ImageSet, reader: Reader) -> dict[str, Any]:
    """What each rule makes of the scores of whole sets and of parts of them, which keep the scores of the whole."""
    labels = images.anomalous
    told = {"all": float(labels.mean()), **{name: share for name, (share, _) in SHARES.items()}, "0 %": 0.0}
    blends = sorted({fitting_blend(None), *map(fitting_blend, told.values())})
    scored = dict(zip(blends, clean_rows(images.batch, blends), strict=True))
    untold = scored[fitting_blend(None)]
    logs = log_distances(untold.images, (float(untold.raw.min()), float(untold.raw.max())))  # as the product has them
    parts = [("all", np.arange(len(labels))), *draws(labels), ("0 %", np.flatnonzero(~labels))]
    of_set: dict[str, dict[str, list[dict[str, float | None]]]] = {}
    for name, members in parts:
        bounds = {rule: (logs[members], bound(logs[members])) for rule, bound in RULES.items()}
        own = scored[fitting_blend(told[name])].images[members]
        for rule, bound in zip(EXPECTED, expected_bounds(own, told[name]), strict=True):
            bounds[rule] = own, bound
        for rule, (scores, bound) in bounds.items():
            values = judged(labels[members], scores, scores > bound)
            rounded = {key: None if np.isnan(value) else round(value, 5) for key, value in values.items()}
            of_set.setdefault(name, {}).setdefault(rule, []).append(rounded)
    return of_set


@dataclass(frozen=True)
class Section:
    """What a record is made from."""

    of_set: Callable[[ImageSet, Reader], Any]
    of_all: Callable[[Mapping[str, Any], int], dict[str, Any]] = lambda found, draws: {"sets": found}  # by their names
    facts: Mapping[str, Any] = field(default_factory=dict)  # that hold of every set


SECTIONS: Mapping[str, Section] = {
    "methods": Section(methods, gains),
    "pooling": Section(pooling),
    "windows": Section(windows),
    "contamination": Section(contamination),
    "known": Section(known_good),
    "bounds": Section(bounds, facts=KNOWN),
    "planted": Section(planted_defects),
    "banks": Section(banks, facts=BANKS),
    "feedback": Section(feedback, facts=FEEDBACK),
    "precisions": Section(precisions),
    "verdicts": Section(verdicts),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.accuracy", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("sets", type=Path, metavar="SETS", help="a folder of sets with labels, and masks if there are any")
    add("--checkpoint", default="dinov2-vits14", help="a vision transformer of 12 blocks (default %(default)s)")
    add("--image-size", type=int, default=280, help="(default %(default)s)")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections (default: all)")
    add("--draws", type=int, default=2000, help="of the intervals (default %(default)s)")
    add("--device", default="cpu", help="auto, cpu or cuda:N (default %(default)s)")
    add("--output", type=Path, default=RESULTS / "accuracy.jsonl", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    try:
        _measure(arguments)
    except (CheckpointError, ConfigError, NothingToScoreError) as error:
        raise SystemExit(str(error)) from error
    return 0


def _measure(arguments: argparse.Namespace) -> None:
    checkpoint = Path(arguments.checkpoint).name  # records hold no paths
    said = ["SETS", "--checkpoint", checkpoint, "--image-size", str(arguments.image_size)]
    record = environment("zsad.bench.accuracy", said, ["numpy", "onnxruntime", "zsad"])
    categories = [category for category in scan(arguments.sets).categories if category.has_ground_truth]
    reader = Reader(arguments.checkpoint, arguments.image_size, choose_runtime(arguments.device))
    found: dict[str, dict[str, Any]] = {name: {} for name in arguments.only}
    counts = {}
    for category in categories:
        counts[category.name] = _measure_set(category, reader, found)
    for name, of_sets in found.items():
        section = SECTIONS[name]
        about = {"section": name, "checkpoint": checkpoint, "image_size": arguments.image_size, "images": counts}
        append(arguments.output, {**record, **about, **section.facts, **section.of_all(of_sets, arguments.draws)})


def _measure_set(category: Category, reader: Reader, found: Mapping[str, dict[str, Any]]) -> list[int]:
    """Add what sections find in a set, of which nothing else is kept; returns its normal and defective images."""
    images = read_set(category, reader)
    normal, defective = int(np.sum(~images.anomalous)), int(np.sum(images.anomalous))
    print(f"{category.name}: {normal + defective} images, {defective} of them defective", flush=True)
    for name, of_sets in found.items():
        of_sets[category.name] = SECTIONS[name].of_set(images, reader)
    return [normal, defective]


if __name__ == "__main__":
    raise SystemExit(main())
