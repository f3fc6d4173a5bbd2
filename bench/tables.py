"""Writes the benchmark tables of the README from the committed results: `python -m zsad.bench.tables` in a clone."""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .records import RESULTS

Record = Mapping[str, Any]

README = Path("README.md")
NAMES = {
    "reference": "reference's arithmetic: every degree, both directions, `torch.cdist`",
    "product": "one product per degree and direction, then the maximum",
    "zsad": "zsad",
    "zsad int8": "zsad, int8 products",
    "floor": "the bare product, one per pair (the floor)",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def read(file: str) -> list[Record]:
    """Return the records of a results file, oldest first."""
    return [json.loads(line) for line in (RESULTS / file).read_text(encoding="utf-8").splitlines()]


def where(record: Record) -> str:
    return f"{record['cpu']}, {record['cores']} cores, commit {record['commit'][:8]}, `{record['command']}`"


def metrics_table() -> str:
    record = read("metrics.jsonl")[-1]
    exact, loop = (statistics.median(record[key]) for key in ("exact_on_reference_maps_s", "reference_s"))
    rows = [
        ["reference: 200 thresholds, scikit-learn", f"{loop:.1f} s", "1"],
        ["zsad: exact curves", f"{exact:.2f} s", f"{loop / exact:.0f}"],
    ]
    maps, size = record["reference_maps"], record["size"]
    caption = f"All four pixel metrics of {maps} maps of {size}×{size}; {where(record)}"
    return f"{caption}:\n\n" + table(["", "time", "times faster"], rows)


def mutual_scoring_table() -> str:
    latest = {(r["patches"], r["channels"], tuple(r["degrees"])): r for r in read("mutual_scoring.jsonl")}
    blocks = []
    for (patches, channels, degrees), record in sorted(latest.items(), reverse=True):
        median = {name: statistics.median(times) for name, times in record["ms_per_pair_and_layer"].items()}
        rows = [
            [
                NAMES[name],
                f"{value:.1f} ms",
                f"{record['over_floor'][name]:.2f}",
                f"{median['reference'] / value:.1f}" if "reference" in median else "–",
            ]
            for name, value in median.items()
        ]
        caption = f"Per image pair and layer, P {patches}, C {channels}, degrees {', '.join(map(str, degrees))}"
        head = ["", "time", "times the floor", "times faster than the reference"]
        blocks.append(f"{caption}; {where(record)}:\n\n" + table(head, rows))
    return "\n\n".join(blocks)


def scaling_table() -> str:
    record = read("mutual_scoring_scaling.jsonl")[-1]
    rows = [
        [name, count, f"{1e3 * seconds / int(count):.0f} ms"]
        for name, series in record["seconds"].items()
        for count, seconds in series.items()
    ]
    caption = (
        f"Mutual scoring of whole batches, one layer, P {record['patches']}, C {record['channels']}: as one batch the "
        f"time grows as N^{record['exponent']:.2f}; in groups the time per image varies by "
        f"{100 * record['group_spread']:.0f} %; {where(record)}:"
    )
    return f"{caption}\n\n" + table(["scored as", "images", "time per image"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "metrics": metrics_table,
    "mutual scoring": mutual_scoring_table,
    "scaling": scaling_table,
}


def fill(text: str) -> str:
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->` by the table of that name."""
    return re.sub(
        r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
