"""zsad's results on MVTec AD or VisA beside the published ones: one command for whoever has data and weights.

    python -m zsad.bench.published --data DATA --preset april-gan [--shots 4 --seed 0 1 2] [--config FILE.toml] ...

A whole run of the preset for each seed, into folders of `--output`, compared by `zsad-eval`'s protocol `paper`. What
the methods' authors set for a data set is set here too, unless `--config` does: APRIL-GAN's heads are those trained on
the other one, and MuSc takes more neighbours on VisA. VisA is taken in MVTec AD's layout, or as it is downloaded: then
its table `split_csv/1cls.csv` tells the test images. What was published is in `published.csv`, in percent as printed.
"""

import argparse
import csv
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsad.engine.commands.console import ProgressBars
from zsad.engine.commands.start import Interrupts
from zsad.engine.config import Config, ConfigError, load_config
from zsad.engine.evaluation.evaluate import Evaluation, EvaluationError, evaluate
from zsad.engine.evaluation.localisation import Comparison
from zsad.engine.images.folders import NothingToScoreError, scan
from zsad.engine.methods.method import method_class
from zsad.engine.networks.runtime import Runtime, choose_runtime
from zsad.engine.presets.names import preset_names
from zsad.engine.results.output import OutputError
from zsad.engine.run import run
from zsad.engine.workplace import Options
from zsad.export.libraries import EngineError
from zsad.export.state_dict import CheckpointError

from .records import RESULTS, append, environment

TABLE = Path(__file__).with_name("published.csv")
METRICS = {
    "image_auroc": "I-AUROC",
    "image_f1": "I-F1",
    "image_ap": "I-AP",
    "pixel_auroc": "P-AUROC",
    "pixel_f1": "P-F1",
    "pixel_ap": "P-AP",
    "pixel_aupro": "AUPRO",
}
# What the published runs of a preset's method set for a data set; everything else is in the preset.
SETTINGS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("april-gan", "MVTec AD"): {"head": "april-gan-visa"},
    ("april-gan", "VisA"): {"head": "april-gan-mvtec"},
    ("musc", "VisA"): {"rscin": (1, 8, 9)},
}
VISA_SPLIT = Path("split_csv") / "1cls.csv"


@dataclass(frozen=True)
class Published:
    """One line of a published table."""

    method: str  # as in presets
    source: str
    data: str
    shots: int
    name: str  # of a class, or "mean"
    values: Mapping[str, str]  # by METRICS, in percent, perhaps with a deviation: 93.1±2.0; empty where not printed


def read_published() -> list[Published]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [
            Published(
                row["method"],
                row["source"],
                row["data"],
                int(row["shots"]),
                row["class"],
                {key: row[key] for key in METRICS},
            )
            for row in csv.DictReader(file)
        ]


def data_set_of(names: Collection[str], published: Sequence[Published]) -> tuple[str, set[str]]:
    """Return the name of the data set that has these categories, and all its classes; raises SystemExit."""
    classes: dict[str, set[str]] = {}
    for row in published:
        classes.setdefault(row.data, set()).update({row.name} - {"mean"})
    for data, known in classes.items():
        if set(names) <= known:
            return data, known
    raise SystemExit(
        f"these are the categories of none of {', '.join(classes)}: {', '.join(sorted(names))}; "
        "give the folder that holds a data set's categories and nothing else"
    )


def with_splits(data: Path, place: Path) -> Path:
    """Return the data in a layout that tells test images: VisA as downloaded is linked in MVTec AD's below `place`."""
    if not (data / VISA_SPLIT).is_file():
        if any(data.glob("*/Data/Images")):
            raise SystemExit(f"{data / VISA_SPLIT} is missing: without it VisA's test images cannot be told")
        return data
    with (data / VISA_SPLIT).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kind = "good" if row["label"] == "normal" else "bad"
            _link(data / row["image"], place / row["object"] / row["split"] / kind)
            if row["mask"]:
                _link(data / row["mask"], place / row["object"] / "ground_truth" / kind)
    return place


def _link(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / file.name
    if not link.is_symlink():
        link.symlink_to(file.resolve())


def configuration(arguments: argparse.Namespace, data_set: str, seed: int | None) -> Config:
    """Return the preset with the user's file, and what the authors set for the data set where the file leaves that."""
    preset = load_config(arguments.preset, method_of=method_class)
    chosen = load_config(arguments.preset, arguments.config, method_of=method_class)
    overrides = {
        key: value
        for key, value in SETTINGS.get((arguments.preset, data_set), {}).items()
        if getattr(chosen.settings, key, None) == getattr(preset.settings, key)
    }
    given = {"shots": arguments.shots, "reference": arguments.reference, "seed": seed}
    overrides |= {key: value for key, value in given.items() if value is not None}
    return load_config(arguments.preset, arguments.config, overrides, method_of=method_class)


def run_once(data: Path, config: Config, runtime: Runtime, options: Options) -> Evaluation:
    with Interrupts() as interrupts, ProgressBars(False, interrupts) as progress:
        record = run(data, config, runtime, options, progress)
    if record.failed:
        print(f"{record.failed} images failed, see {options.output}: what follows is without them")
    return evaluate(options.output, scan(data), Comparison("paper"))


def measured(evaluations: Sequence[Evaluation], name: str) -> dict[str, list[float]]:
    """Return the values of a category or of the mean in percent, one for each seed; empty where one has none."""
    found: dict[str, list[float]] = {}
    for key in METRICS:
        values = [
            dict(evaluation["mean"] if name == "mean" else evaluation["categories"][name])[key]
            for evaluation in evaluations
        ]
        found[key] = [100 * value for value in values if value is not None]
    return found


def lines(name: str, values: Mapping[str, list[float]], published: Sequence[Published]) -> Iterator[tuple[str, ...]]:
    """Yield zsad's line of a table, and below it every published one with the differences."""
    means = {key: statistics.fmean(of_seeds) if of_seeds else None for key, of_seeds in values.items()}
    cells = ["-" if value is None else f"{value:.1f}" for value in means.values()]
    if name == "mean":
        deviations = [statistics.stdev(of_seeds) if len(of_seeds) > 1 else None for of_seeds in values.values()]
        cells = [c if d is None else f"{c}±{d:.1f}" for c, d in zip(cells, deviations, strict=True)]
    yield (name, "zsad", *cells)
    for row in published:
        yield ("", row.source, *(text or "-" for text in row.values.values()))
        differences = (
            f"{value - float(text.partition('±')[0]):+.1f}" if text and (value := means[key]) is not None else "-"
            for key, text in row.values.items()
        )
        yield ("", "  difference", *differences)


def table(evaluations: Sequence[Evaluation], published: Sequence[Published], complete: bool) -> str:
    """Return the comparison in percent; the published means only where all classes were there."""
    rows: list[tuple[str, ...]] = [("class", "", *METRICS.values())]
    for name in [*evaluations[0]["categories"], "mean"]:
        shown = [row for row in published if row.name == name and (complete or name != "mean")]
        rows += lines(name, measured(evaluations, name), shown)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        _compare(arguments, argv)
    except (ConfigError, CheckpointError, EngineError, EvaluationError, NothingToScoreError, OutputError) as error:
        raise SystemExit(str(error)) from error
    return 0


def _compare(arguments: argparse.Namespace, argv: Sequence[str] | None) -> None:
    published = read_published()
    data = with_splits(arguments.data, arguments.output / "VisA")
    data_set, classes = data_set_of([category.name for category in scan(data).categories], published)
    runtime = choose_runtime(arguments.device)
    record = environment("zsad.bench.published", argv, ["numpy", "onnxruntime", "zsad"])
    print(f"device: {runtime.describe()} ({runtime.reason})")
    evaluations = []
    for seed in arguments.seed or [None]:
        config = configuration(arguments, data_set, seed)
        folder = arguments.output / ("run" if seed is None else f"seed-{seed}")
        options = Options(folder, batch_size=arguments.batch_size, resume=arguments.resume)
        evaluations.append(run_once(data, config, runtime, options))
    beside = [
        row for row in published if (row.method, row.data, row.shots) == (config.method, data_set, arguments.shots or 0)
    ]
    complete = set(evaluations[0]["categories"]) == classes
    print(f"\n{data_set}, preset {arguments.preset}, {arguments.shots or 'no'} known-good images, in percent")
    print(table(evaluations, beside, complete))
    if not beside:
        print("nothing published is known for this preset and number of known-good images")
    if not complete:
        print(f"{len(evaluations[0]['categories'])} of {len(classes)} classes: no comparison of the means")
    record |= {
        "data_set": data_set,
        "preset": arguments.preset,
        "method": config.method,
        "shots": arguments.shots or 0,
        "seeds": arguments.seed or [],
        "complete": complete,
        "percent": {name: measured(evaluations, name) for name in [*evaluations[0]["categories"], "mean"]},
    }
    append(arguments.results, record)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zsad.bench.published", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="MVTec AD or VisA, whole or some categories of it")
    add("--preset", default="april-gan", choices=preset_names(), help="(default %(default)s)")
    add("--config", type=Path, metavar="FILE.toml", help="values that replace the preset's")
    add("--shots", type=int, metavar="K", help="known-good images of each category, from its split train")
    add("--reference", metavar="FOLDER|LIST", help="draw them from these instead, such as a published k_shot.txt")
    add("--seed", type=int, nargs="+", metavar="S", help="one run for each: mean and deviation are printed")
    add("--device", default="auto", help="auto, cpu or cuda:N (default %(default)s)")
    add("--batch-size", type=int, metavar="N", help="(default: 1 on a CPU, 8 on a GPU)")
    add("--resume", action="store_true", help="keep what an earlier call finished")
    add("--output", type=Path, default=Path("published"), help="folder of the runs (default: %(default)s)")
    add("--results", type=Path, default=RESULTS / "published.jsonl", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    if arguments.reference is not None and arguments.shots is None:
        parser.error("--reference needs --shots, by which the published lines are chosen")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
