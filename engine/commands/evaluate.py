"""`zsad-eval OUT DATA`: compare the results of `zsad-infer` with ground truth."""

import argparse
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from zsad.engine.results.formats import EXPORTS

from .arguments import Parser, Version, add_file_limits, file_limits, location, size

if TYPE_CHECKING:
    from .start import Interrupts

log = logging.getLogger("zsad")

CHECKED = ("rayan", *EXPORTS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zsad-eval`; 0 done, 1 something was left out, 2 nothing could be evaluated, 130 interrupted."""
    arguments = _parse(argv)
    from .console import guarded

    level = logging.ERROR if arguments.quiet else logging.INFO
    return guarded("zsad-eval", level, partial(_run, arguments), _explain)


def _explain(error: Exception) -> tuple[str, int] | None:
    """Say why nothing could be evaluated, with the exit code."""
    from zsad.engine.config import ConfigError
    from zsad.engine.evaluation.evaluate import EvaluationError
    from zsad.engine.images.folders import NothingToScoreError
    from zsad.engine.results.output import OutputError

    from .console import USAGE

    known = (ConfigError, EvaluationError, NothingToScoreError, OutputError, OSError)
    return (str(error), USAGE) if isinstance(error, known) else None


def _run(arguments: argparse.Namespace, interrupts: "Interrupts") -> int:
    from zsad.engine.evaluation.evaluate import evaluate, format_csv, format_table
    from zsad.engine.evaluation.localisation import Comparison
    from zsad.engine.images.folders import scan
    from zsad.engine.images.limits import Limits, limited
    from zsad.engine.results.output import check_unclaimed
    from zsad.kernels.files import printable, written_whole
    from zsad.kernels.machine import default_memory_limit

    from .console import DONE, SOME_FAILED, emit

    interrupts.check()  # it may have been put off until here
    warnings = 0

    def warn(message: object) -> None:
        nonlocal warnings
        interrupts.check()
        warnings += 1
        log.warning("%s", message)

    how = Comparison(arguments.protocol, arguments.aupro_limit, arguments.strict_metrics, arguments.memory_limit)
    check_unclaimed(arguments.out)
    if arguments.check is not None:
        return _check(arguments, interrupts)
    dataset = scan(arguments.data, exclude=arguments.out)
    for note in dataset.all_notes():
        log.info("%s", note)
    with limited(Limits(**file_limits(arguments), bytes=default_memory_limit())):
        evaluation = evaluate(arguments.out, dataset, how, warn)
    text = json.dumps(evaluation, indent=2, allow_nan=False) + "\n"
    for path, content in (
        (arguments.csv or arguments.out / "metrics.csv", format_csv(evaluation)),
        (arguments.output_json or arguments.out / "metrics.json", text),
    ):
        with written_whole(path) as temporary:
            # Names that are no valid Unicode keep their bytes.
            temporary.write_text(content, encoding="utf-8", errors="surrogateescape", newline="\n")
    table = printable(format_table(evaluation, arguments.aupro_limit), keep="\n")
    emit((text if arguments.json else table).removesuffix("\n"))
    return SOME_FAILED if warnings else DONE


def _check(arguments: argparse.Namespace, interrupts: "Interrupts") -> int:
    """Say what is wrong with files of a format."""
    from zsad.engine.images.categories import counted
    from zsad.engine.images.folders import scan
    from zsad.engine.images.limits import Limits, limited
    from zsad.engine.results.exports import check
    from zsad.kernels.files import printable
    from zsad.kernels.machine import default_memory_limit

    from .console import DONE, SOME_FAILED, emit

    dataset = None if arguments.data is None else scan(arguments.data, exclude=arguments.out)
    with limited(Limits(**file_limits(arguments), bytes=default_memory_limit())):
        found = check(arguments.check, arguments.out, dataset, lambda _: interrupts.check())
    faults = found.faults
    if arguments.json:
        kinds = {kind: {"count": count, "first": faults.first[kind]} for kind, count in faults.counts.items()}
        facts = {"format": arguments.check, "place": str(found.place), "files": found.files, "faults": kinds}
        emit(json.dumps(facts, indent=2))
        return SOME_FAILED if faults else DONE
    compared = "" if dataset is not None else "; names, counts and sizes were not compared with images: give DATA too"
    if dataset is None and arguments.check == "mvtec-ad2":
        compared = "; sizes were not compared with images: give DATA too"
    kinds_of = counted(found.files, "image" if arguments.check == "coco" else "file")
    head = f"{found.place}: {kinds_of} looked at, {counted(len(faults), 'fault')}{compared}"
    emit(printable("\n".join([head, *(f"  {line}" for line in faults.lines())]), keep="\n"))
    return SOME_FAILED if faults else DONE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="zsad-eval",
        description="Compare the results of zsad-infer with the labels and masks that lie among the images.",
        epilog="Exit codes: 0 done, 1 something was left out (each named on stderr), 2 usage or configuration, "
        "130 interrupted.",
    )
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="folder that zsad-infer wrote")
    add("data", metavar="DATA", type=location, nargs="?", help="folder or list that zsad-infer was given")
    add(
        "--check",
        choices=CHECKED,
        metavar="FORMAT",
        help="look at what was written in this format, or at a submission itself, as its reader would, before anybody "
        f"uploads it; with DATA also at missing names and at sizes: {', '.join(CHECKED)}",
    )
    add("--json", action="store_true", help="print JSON on stdout instead of the table")
    add(
        "--protocol",
        choices=("official", "paper"),
        default="official",
        help="official: full resolution, exact AUPRO; paper: as the published code of the run's method, 200-step AUPRO",
    )
    add(
        "--aupro-limit",
        metavar="FPR",
        type=float,
        default=0.3,
        help="false-positive rate up to which AUPRO integrates (default %(default)s)",
    )
    add(
        "--strict-metrics",
        action="store_true",
        help="beside the others AUPRO and, of MVTec LOCO, AU-sPRO up to a false-positive rate of 0.05, AUPIMO for "
        "rates from 1e-5 to 1e-4, and SegF1 of the run's regions",
    )
    add(
        "--memory-limit",
        metavar="4GB",
        type=size,
        help="of masks, maps and curves; beyond it scores go to temporary files, with the same result (default: 3/4 of "
        "the free memory)",
    )
    add_file_limits(parser)
    add("--csv", metavar="FILE", type=Path, help="the table as CSV (default OUT/metrics.csv)")
    add("--output-json", metavar="FILE", type=Path, help="the JSON (default OUT/metrics.json)")
    add("-q", "--quiet", action="store_true", help="errors only")
    add("--version", action=Version, nargs=0, help="print the version and exit")
    arguments = parser.parse_args(argv)
    if arguments.data is None and arguments.check is None:
        parser.error("the following arguments are required: DATA")
    if not 0 < arguments.aupro_limit <= 1:
        parser.error(f"--aupro-limit {arguments.aupro_limit} must lie in (0, 1], usually 0.3 or 0.05")
    if arguments.strict_metrics and arguments.protocol == "paper":
        parser.error("--strict-metrics are those of full resolution: leave out --protocol paper")
    return arguments
