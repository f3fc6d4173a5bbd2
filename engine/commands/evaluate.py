"""`zsad-eval OUT DATA`: compare the results of `zsad-infer` with ground truth."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from zsad.engine.evaluation.evaluate import EvaluationError, Protocol, evaluate, format_csv, format_table
from zsad.kernels.files import printable, written_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zsad-eval`; returns 0 when done, 1 when something was left out, 2 when nothing could be evaluated."""
    parser = argparse.ArgumentParser(
        prog="zsad-eval",
        description="Compare the results of zsad-infer with ground truth in the MVTec layout.",
        epilog="Exit codes: 0 done, 1 something was left out (each named on stderr), 2 usage or configuration.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder that zsad-infer wrote")
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of categories, or one category")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of the table")
    parser.add_argument(
        "--protocol",
        choices=get_args(Protocol),
        default="official",
        help="official: full resolution, exact AUPRO; paper: 518x518 and 200-step AUPRO as in MuSc's tables",
    )
    parser.add_argument(
        "--aupro-limit",
        metavar="FPR",
        type=float,
        default=0.3,
        help="false-positive rate up to which AUPRO integrates (default %(default)s)",
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="the table as CSV (default OUT/metrics.csv)")
    parser.add_argument("--output-json", metavar="FILE", type=Path, help="the JSON (default OUT/metrics.json)")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.aupro_limit <= 1:
        parser.error(f"--aupro-limit {arguments.aupro_limit} must lie in (0, 1], usually 0.3 or 0.05")

    warnings = 0

    def warn(message: str) -> None:
        nonlocal warnings
        warnings += 1
        print(f"zsad-eval: {printable(message)}", file=sys.stderr)

    try:
        evaluation = evaluate(arguments.out, arguments.data, arguments.protocol, arguments.aupro_limit, warn)
        text = json.dumps(evaluation, indent=2, allow_nan=False) + "\n"
        for path, content in (
            (arguments.csv or arguments.out / "metrics.csv", format_csv(evaluation)),
            (arguments.output_json or arguments.out / "metrics.json", text),
        ):
            with written_whole(path) as temporary:
                # Names that are no valid Unicode keep their bytes.
                temporary.write_text(content, encoding="utf-8", errors="surrogateescape", newline="\n")
    except (EvaluationError, OSError) as error:
        print(f"zsad-eval: {printable(str(error))}", file=sys.stderr)
        return 2
    table = printable(format_table(evaluation, arguments.aupro_limit), keep="\n")
    print(text if arguments.json else table, end="")
    return 1 if warnings else 0
