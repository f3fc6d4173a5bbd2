"""The tables of accuracy: of what `bench/accuracy.py` has recorded, section by section."""

import statistics
from collections.abc import Mapping, Sequence

from .published import METRICS
from .records import NothingRecordedError, Record, read, table

ROWS = {
    "musc": "MuSc's settings: blocks 2, 5, 8, 11, degrees 1, 3, 5, maximum",
    "musc rscin": "the same with RsCIN 1/2/3 on the class token",
    "snamd": "MuSc's settings with SNAMD (MuSc-V2)",
    "snamd blended": "`--references blended` with SNAMD of degrees 1, 3",
    "all": "preset `small` with `--references all`",
    "anomaly dino": "AnomalyDINO's batched scoring, from the minima of `small`",
    "blended": "`--references blended`: image blend 0.25, map blend 0.5",
    "blend 0": "image blend 0: degree-1 maximum and rescoring alone",
    "blend 0.5": "image blend 0.5",
    "blend 0.75": "image blend 0.75",
    "clean": "`--references clean`: blends 1",
}
PRECISION_ROWS = {"small": "preset `small`", "maximum": "the maximum of the map"}
RULES = {
    "lower half": "median + 3 deviations of the lower half (version 0.2)",
    "otsu": "Otsu",
    "two gaussians": "two Gaussians",
    "2.5 deviations": "median + 2.5 MAD of all",
    "3.5 deviations": "median + 3.5 MAD of all",
    "zsad reject": "zsad, rejected",
    "zsad review": "zsad, rejected or to be reviewed",
    "expected reject": "`--expected-defects` with the true share, rejected",
    "expected review": "`--expected-defects` with the true share, rejected or to be reviewed",
}


def accuracy(section: str) -> Record:
    """Return the latest record of a section; raises NothingRecordedError."""
    found = [record for record in read("accuracy.jsonl") if record["section"] == section]
    if not found:
        raise NothingRecordedError
    return found[-1]


def about(record: Record) -> str:
    images = ", ".join(f"`{name}` {good} normal and {bad} defective" for name, (good, bad) in record["images"].items())
    return (
        f"{record['checkpoint']}, {record['image_size']} px; {images}; commit {record['commit'][:8]}, "
        f"`{record['command']} --only {record['section']}`"
    )


def percent(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * statistics.fmean(known):.1f}" if known else "–"


def measured(rate: Mapping[str, float]) -> str:
    return f"{percent([rate['rejected']])} ({percent([rate['low']])} to {percent([rate['high']])})"


def methods_table() -> str:
    record = accuracy("methods")
    sets, rows = record["sets"], []
    for row in next(iter(sets.values())):
        cells = [percent([of_set[row].get(key) for of_set in sets.values()]) for key in METRICS]
        gain = record["gain_over_all"][row]
        ends = ["–" if row == "all" else " to ".join(f"{100 * end:+.1f}" for end in gain[kind]) for kind in gain]
        rows.append([ROWS[row], *cells, *ends])
    head = ["", *METRICS.values(), "I-AUROC's gain over `all`, 95 %: over images", "over sets"]
    return (
        f"Means over the sets in percent, those of pixels over the sets with masks, at 256×256; {about(record)}:\n\n"
        f"{table(head, rows)}\n\nEach set, I-AUROC / P-AP:\n\n{sets_table(sets)}"
    )


def pooling_table() -> str:
    record = accuracy("pooling")
    return f"I-AUROC / P-AP in percent; {about(record)}:\n\n{sets_table(record['sets'])}"


def sets_table(sets: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return image AUROC and pixel AP of every row, a column for each set."""
    pair = ("image_auroc", "pixel_ap")
    rows = [
        [ROWS[row], *(" / ".join(percent([of_set[row].get(key)]) for key in pair) for of_set in sets.values())]
        for row in next(iter(sets.values()))
    ]
    return table(["", *(f"`{name}`" for name in sets)], rows)


def windows_table() -> str:
    record = accuracy("windows")
    sets, pair = record["sets"], ("image_auroc", "pixel_ap")
    rows = [
        ["all" if window == "None" else window, ROWS[row]]
        + [" / ".join(percent([of_set[window][row].get(key)]) for key in pair) for of_set in sets.values()]
        for row in ("all", "blended")
        for window in next(iter(sets.values()))
    ]
    return (
        f"I-AUROC / P-AP in percent; {about(record)}:\n\n"
        f"{table(['rows and columns', '', *(f'`{name}`' for name in sets)], rows)}"
    )


def precisions_table() -> str:
    record = accuracy("precisions")
    rows = []
    for name, found in record["sets"].items():
        for row, ways in found["rows"].items():
            exact = ways["fp32"]
            for way, values in ways.items():
                both = [f"{100 * values[key]:.2f}" if key in values else "–" for key in ("image_auroc", "pixel_ap")]
                moved = 100 * (values["image_auroc"] - exact["image_auroc"])
                alike = f"{values['correlation']:.5f}" if "correlation" in values else "–"
                rows.append([f"`{name}`", PRECISION_ROWS[row], way, *both, f"{moved:+.2f}", alike])
    pairs = ", ".join(f"{100 * found['pair']:.3f} on `{name}`" for name, found in record["sets"].items())
    head = ["", "", "network", "I-AUROC", "P-AP", "moved by", "patch scores correlate with fp32's at"]
    return f"In percent; two images that change places move I-AUROC by {pairs}; {about(record)}:\n\n{table(head, rows)}"


def contamination_table() -> str:
    record = accuracy("contamination")
    sets, rows = record["sets"], []
    shares = list(next(iter(sets.values())))
    for row in next(iter(sets.values()))[shares[0]]:
        cells = []
        for share in shares:
            means = {key: [statistics.fmean(s[share][key]) for s in sets.values()] for key in (row, "all")}
            worst = min(own - base for own, base in zip(means[row], means["all"], strict=True))
            cells.append(percent(means[row]) + (f" ({100 * worst:+.1f})" if row != "all" else ""))
        rows.append([ROWS[row], *cells])
    names = ["as they are" if share == "all" else f"{share} defective" for share in shares]
    return (
        "Image AUROC in percent, mean of the sets, with fewer of the defective images; in brackets the set that loses "
        f"most against `all`; {about(record)}:\n\n{table(['', *names], rows)}"
    )


def curves_of(record: Record) -> list[list[str]]:
    """Return a line for each set and row, with the mean of the draws for each number of images or share."""
    columns = max(record["sets"].values(), key=len)  # small sets have fewer
    return [
        [f"`{name}`", ROWS[row], *(percent(curves[key][row]) if key in curves else "–" for key in columns)]
        for name, curves in record["sets"].items()
        for row in next(iter(curves.values()))
    ]


def known_table() -> str:
    record = accuracy("known")
    counts = max(record["sets"].values(), key=len)
    draws = len(counts["0"]["all"])
    return (
        f"Image AUROC in percent beside so many known-good images, mean of {draws} draws; the {max(map(int, counts))} "
        f"normal images drawn are never scored; {about(record)}:\n\n{table(['', '', *counts], curves_of(record))}"
    )


def bounds_table() -> str:
    record = accuracy("bounds")
    rows = [
        [
            f"`{name}`",
            str(found["known"]),
            percent([found["promised"]]),
            share,
            measured(rate),
            percent([rate.get("recall")]),
        ]
        for name, found in record["sets"].items()
        for share, rate in found["shares"].items()
    ]
    head = ["", "known-good images", "promised at most", "defective among the others", "good ones rejected"]
    return (
        f"Good images rejected by the bounds that known-good ones give, in percent, with the 95 % interval of "
        f"{record['splits']} draws; {about(record)}:\n\n"
        f"{table([*head, 'defective ones rejected'], rows)}"
    )


def banks_table() -> str:
    record = accuracy("banks")
    keys = ("image_auroc", "pixel_ap", "pixel_aupro")
    sizes = [
        [f"`{name}`", share, str(row["patches"]), *(percent([row.get(key)]) for key in keys)]
        for name, of_set in record["sets"].items()
        for share, row in of_set["sizes"].items()
    ]
    alarms = [
        [f"`{name}`", size, f"{100 * float(asked):g}", percent([rate["promised"]]), measured(rate)]
        for name, of_set in record["sets"].items()
        for size, rates in of_set["alarms"].items()
        for asked, rate in rates.items()
    ]
    return (
        "A bank of half of the normal images scores the other half and the defective ones, in percent; "
        f"{about(record)}:\n\n"
        f"{table(['', 'kept', 'patches per tap and degree', *(METRICS[key] for key in keys)], sizes)}\n\n"
        f"Banks of {record['drawn']} normal images judge {record['drawn']} others, in {record['splits']} draws: good "
        "images rejected in percent, with the 95 % interval:\n\n"
        f"{table(['', 'kept', 'asked for at most', 'promised by so few images', 'rejected'], alarms)}"
    )


def feedback_table() -> str:
    record = accuracy("feedback")
    lines = []
    for name, rows in record["sets"].items():
        for row, values in rows.items():
            means = [percent(values[key]) for key in ("image_auroc", "false_alarms", "recall")]
            lines.append([f"`{name}`", row, *means])
    return (
        f"In percent, means of {record['draws']} draws; {record['given']} images of each kind are given back, others "
        f"are measured; {100 * record['false_alarms']:g} % of false alarms is the share asked for; {about(record)}:\n\n"
        f"{table(['', 'feedback', 'image AUROC', 'false alarms', 'recall'], lines)}"
    )


def planted_table() -> str:
    record = accuracy("planted")
    shares = [f"{100 * float(share):g} %" for share in next(iter(record["sets"].values()))]
    return (
        "Image AUROC in percent where that share of the normal images has one and the same defect at the same place, "
        f"mean of {len(next(iter(next(iter(record['sets'].values())).values()))['all'])} defects; {about(record)}:\n\n"
        f"{table(['', '', *shares], curves_of(record))}"
    )


def verdicts_table() -> str:
    record = accuracy("verdicts")
    sets, rows = list(record["sets"].values()), []
    parts = list(sets[0])

    def mean(part: str, rule: str, key: str) -> str:
        return percent(
            [statistics.fmean(v[key] for v in s[part][rule]) for s in sets if s[part][rule][0][key] is not None]
        )

    for rule in sets[0][parts[0]]:
        cells = [
            mean(part, rule, "false_alarms")
            if part == "0 %"
            else " / ".join(mean(part, rule, key) for key in ("f1", "false_alarms", "recall"))
            for part in parts
        ]
        rows.append([RULES[rule], *cells])
    heads = []
    for part in parts:
        named = "as they are" if part == "all" else f"{part} defective"
        best = f"{named} (best F1 {mean(part, next(iter(RULES)), 'best_f1')})"
        heads.append("none defective: false alarms" if part == "0 %" else best)
    return (
        "F1 / false alarms / recall in percent, means of the sets; fewer defective images are drawn from the scores of "
        f"the whole sets; {about(record)}:\n\n{table(['rule', *heads], rows)}"
    )
