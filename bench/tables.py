"""Writes the benchmark tables of the pages from the committed results: `python -m zsad.bench.tables` in a clone.

With `--gpu FOLDER` it writes FOLDER/gpu.md instead, from what `bench/gpu_suite.sh` has left there.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .growth import exponent
from .profile import peak_text, profile_rows
from .published import METRICS, read_published
from .records import NothingRecordedError, Record, read, results, table, where
from .roofline import GPUS, GRID, IMAGES, PRESETS, TILES, estimate, model_pairs
from .startup import times_faster
from .tables_accuracy import (
    banks_table,
    bounds_table,
    contamination_table,
    feedback_table,
    known_table,
    methods_table,
    percent,
    planted_table,
    pooling_table,
    precisions_table,
    verdicts_table,
    windows_table,
)

PAGES = (Path("README.md"), Path("bench/README.md"))  # that have tables
NAMES = {
    "reference": "reference's arithmetic: every degree, both directions, `torch.cdist`",
    "product": "one product per degree and direction, then the maximum",
    "zsad": "zsad",
    "zsad int8": "zsad, int8 products",
    "floor": "the bare product, one per pair (the floor)",
    "floor int8": "the bare int8 product, one per pair",
}
GPU_NAMES = {
    **NAMES,
    "zsad": "zsad, one product for all degrees",
    "zsad fused": "zsad, a fused product per degree",
    "zsad tiled": "zsad, one product in tiles that are filtered where they are",
    "zsad int8": "zsad, a fused int8 product per degree",
}
NEAREST_NAMES = {
    "zsad": "zsad",
    "zsad int8": "zsad, int8 products",
    "streamed": "zsad with the least memory: the bank is normalised for every search",
    "floor": "the bare fp32 product alone, all cosines written to memory",
}

LINE_PARTS = {
    "told": "until it is known of the image, and what is not told below",
    "image": "decoding, and the network's input",
    "network": "the network",
    "pool": "pooling its tokens",
    "search": "searching the bank",
    "files": "map and overlay",
    "disk": "waiting for the disk, at most once a second",
}
PEERS = {
    "reference": "the steps of the published code in PyTorch, nothing written",
    "zsad": "zsad, from files to report",
    "zsad int8": "zsad, networks and products in int8",
}
REFERENCES = {
    "scoring": "scoring alone, `--references all`",
    "scoring, minima handed back": "the same with the distances that clean references are chosen by",
    "references": "choosing them, and the scores that follow",
}
MANY = 1_000_000  # images that the cost of an archive is extrapolated to
TILE_WAYS = {
    "whole": "whole images",
    "aligned": "tiles, each compared with those of the same place",
    "pooled": "tiles, each compared with all others",
}


def place(record: Record) -> str:
    """Return the processor of a record."""
    return f"{record['cores']} cores of an {record['cpu']}"


def headline_table() -> str:
    """Three numbers of the README: scoring, whole runs, metrics."""
    scoring = next(
        r
        for r in reversed(read("mutual_scoring.jsonl"))
        if (r["channels"], r["degrees"], r.get("preset")) == (1024, [1, 3, 5], None)
    )
    median = {name: statistics.median(times) for name, times in scoring["ms_per_pair_and_layer"].items()}
    rates = {
        tuple(r["precision"]): r["images"] / r["seconds_together"]
        for r in read("throughput.jsonl")
        if r["kind"] == "run" and r["preset"] == "small"
    }
    metrics = read("metrics.jsonl")[-1]
    exact, loop = (statistics.median(metrics[key]) for key in ("exact_on_reference_maps_s", "reference_s"))
    whole = next(r for r in reversed(read("throughput.jsonl")) if r["kind"] == "run" and r["preset"] == "small")
    rows = [
        [
            "mutual scoring, per pair of images and layer (1369 patches, 1024 channels, 3 degrees)",
            f"{median['zsad']:.0f} ms: {median['reference'] / median['zsad']:.0f} times faster than the reference's",
            place(scoring),
        ],
        [
            "a whole run of preset `small` at 518 px, files to report",
            f"{rates['fp32', 'fp32']:.1f} images/s, {rates['int8', 'int8']:.1f} with int8",
            place(whole),
        ],
        [
            f"all four pixel metrics of {metrics['reference_maps']} maps of {metrics['size']}×{metrics['size']}",
            f"{exact:.1f} s: {loop / exact:.0f} times faster than the reference's loop",
            place(metrics),
        ],
    ]
    return table(["", "", "on"], rows)


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


def metrics_memory_table() -> str:
    record = read("metrics_memory.jsonl")[-1]
    size, small = record["size"], record["small_size"]
    rows = []
    for name, key in (("in memory", "in_memory"), ("beyond `--memory-limit`", "limited")):
        peak = record[f"{key}_bytes"]
        maps = (peak - record["small_bytes"]) / (4 * size * size) / record["workers"]
        rows.append([name, f"{peak / 2**20:.0f} MB", f"{maps:.1f}"])
    caption = f"Peak memory of `zsad-eval` with {record['maps']} maps of {size}×{size}; {where(record)}"
    head = ["", "peak memory", f"more than as many of {small}×{small}, in maps for each worker"]
    return f"{caption}:\n\n" + table(head, rows)


def mutual_scoring_cuda_table(file: str = "mutual_scoring_cuda.jsonl") -> str:
    latest = {(r["gpu"], r["patches"], r["channels"], tuple(r["degrees"])): r for r in read(file)}
    blocks = []
    for (gpu, patches, channels, degrees), record in latest.items():
        median = {name: statistics.median(times) for name, times in record["ms_per_pair_and_layer"].items()}
        peak = record["peak_flops"]
        rows = [
            [
                GPU_NAMES.get(name, name),
                f"{1e3 * value:.1f} µs",
                f"{100 * 2 * patches**2 * channels / (value * 1e-3) / peak:.0f} %",
                f"{median['reference'] / value:.1f}" if "reference" in median else "–",
            ]
            for name, value in median.items()
        ]
        caption = (
            f"Per image pair and layer on {gpu}, P {patches}, C {channels}, degrees {', '.join(map(str, degrees))}, "
            f"product peak {peak / 1e12:.0f} TFLOP/s; commit {record['commit'][:8]}, `{record['command']}`"
        )
        head = ["", "time", "of the peak", "times faster than the reference"]
        blocks.append(f"{caption}:\n\n" + table(head, rows))
    return "\n\n".join(blocks)


def mutual_scoring_table() -> str:
    latest = {
        (r.get("preset", ""), r["patches"], r["channels"], tuple(r["degrees"])): r for r in read("mutual_scoring.jsonl")
    }
    blocks = []
    for (preset, patches, channels, degrees), record in sorted(latest.items(), reverse=True):
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
        tokens = f"tokens of {record['weights']} over {record['images']} drawn images" if preset else "random tokens"
        caption = f"Per image pair and layer, {tokens}, P {patches}, C {channels}, "
        caption += f"degrees {', '.join(map(str, degrees))}"
        head = ["", "time", "times the floor", "times faster than the reference"]
        blocks.append(f"{caption}; {where(record)}:\n\n" + table(head, rows))
    return "\n\n".join(blocks)


def nearest_table() -> str:
    latest = {(r["bank"], r["channels"], r["neighbours"], r.get("device", "cpu")): r for r in read("nearest.jsonl")}
    blocks = []
    for (bank, channels, neighbours, device), record in sorted(latest.items(), reverse=True):
        rows = [
            [
                NEAREST_NAMES[name] if device == "cpu" or name == "floor" else f"{NEAREST_NAMES[name]}, {device}",
                f"{statistics.median(times):.0f} ms",
                f"{record['times_the_product'][name]:.2f}",
                f"{record['times_the_product_by_processors'][name]:.2f}",
            ]
            for name, times in record["milliseconds"].items()
        ]
        caption = (
            f"{neighbours} nearest of each of {record['queries']} queries among {bank} vectors of {channels} channels; "
            f"{where(record)}"
        )
        head = ["", "time", "times faster than the product", "by the time of the processors"]
        blocks.append(f"{caption}:\n\n" + table(head, rows))
    return "\n\n".join(blocks)


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios of each round, in which both saw the same machine."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def networks_table() -> str:
    """One table for all graphs of each run."""
    latest = {
        (r["preset"], r["weights"], r["graph"], r["image_size"], r["batch"]): r
        for r in read("throughput.jsonl")
        if r["kind"] == "network"
    }
    runs: dict[object, list[Record]] = {}
    for record in latest.values():
        runs.setdefault((record["date"], record["command"]), []).append(record)
    return "\n\n".join(map(graphs_block, runs.values()))


def variant_rows(
    flops: float, peaks: Sequence[float], seconds: Mapping[str, Sequence[float]]
) -> Iterator[tuple[str, str, str, str]]:
    """Yield what was measured of each variant of a graph: name, time, share of the peak, factor over PyTorch."""
    base = next((times for name, times in seconds.items() if name.startswith("PyTorch")), None)
    for name, times in seconds.items():
        yield (
            name,
            duration(statistics.median(times)),
            f"{100 * median_ratio([flops / peak for peak in peaks], times):.0f} %",
            f"{median_ratio(base, times):.2f}" if base else "–",
        )


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


def operations(flops: float) -> str:
    return f"{flops / 1e12:.3f} TFLOP" if flops >= 1e10 else f"{flops / 1e9:.2f} GFLOP"


def is_random(weights: str) -> bool:
    return weights.startswith("random")


def graphs_block(run: Sequence[Record]) -> str:
    rows = []
    measured_memory = any(record.get("memory_bytes") for record in run)
    for record in run:
        flops, row, memory = record["flops_per_row"], record["row"], record.get("memory_bytes", {})
        graph = (
            f"{record['network']}, `{record['graph']}`, {record['image_size']} px: one {row} of {record['batch']} at "
            f"once, {operations(flops)}"
        )
        for cells in variant_rows(flops, record["peak_flops"], record["seconds_per_row"]):
            taken = f"{memory[cells[0]] / 2**20:.0f} MB" if cells[0] in memory else "–"
            rows.append([graph, *cells, *([taken] if measured_memory else [])])
            graph = ""
    kinds = list(dict.fromkeys(record["weights"] for record in run))
    weights = "random weights of the true shapes" if all(map(is_random, kinds)) else "; ".join(kinds)
    peak = statistics.median(peak for record in run for peak in record["peak_flops"])
    caption = (
        f"Every graph of preset `{run[0]['preset']}` ({weights}), product peak {peak / 1e9:.0f} GFLOP/s; "
        f"{where(run[0])}"
    )
    head = ["graph", "", "time", "of the peak", "times faster than PyTorch"]
    return f"{caption}:\n\n" + table([*head, *(["memory"] if measured_memory else [])], rows)


def stage_time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def runs_table() -> str:
    latest = {
        (r["preset"], r["runtime"], r.get("decoder", "pillow"), *r["precision"]): r
        for r in read("throughput.jsonl")
        if r["kind"] == "run"
    }
    blocks = []
    for record in latest.values():
        images, together = record["images"], record["seconds_together"]
        rows = [[stage, stage_time(s / images)] for stage, s in record["seconds_alone"].items()]
        rows.append(["all together", stage_time(together / images)])
        precisions = ", ".join(
            f"{part} {precision}"
            for part, precision in zip(("networks", "scoring"), record["precision"], strict=True)
            if precision
        )
        found = record.get("found")
        seen = f"{images} images at {record['image_size']} px" + (f", {found['tiles']} tiles each" if found else "")
        seen += " decoded on the GPU" if record.get("decoder") == "nvimgcodec" else ""
        caption = (
            f"Whole runs, time per image: preset `{record['preset']}`, {seen}, "
            f"{record['runtime']}, {precisions}: "
            f"{images / together:.2f} images/s, overlap efficiency {record['overlap']:.2f}, peak memory "
            f"{record['peak_host_bytes'] / 2**30:.1f} GiB; {where(record)}"
        )
        blocks.append(f"{caption}:\n\n" + table(["stage alone", "time"], rows))
    return "\n\n".join(blocks)


def profile_table() -> str:
    """Where the time goes, a table for each preset and variant."""
    latest = {(r["preset"], r["variant"]): r for r in read("profile.jsonl")}
    blocks = []
    for record in latest.values():
        peaks = ", ".join(peak_text(name, rate) for name, rate in record["peaks"].items())
        caption = (
            f"{record['variant']}: preset `{record['preset']}`, {record['images']} images at "
            f"{record['image_size']} px; measured peaks {peaks}; {where(record)}"
        )
        head = ["stage, and class of operators in it", "time per image", "of the whole", "rate", "of the peak"]
        blocks.append(f"{caption}:\n\n" + table(head, list(profile_rows(record))))
    return "\n\n".join(blocks)


def roofline_table() -> str:
    rows = []
    for gpu in GPUS:
        for preset in PRESETS:
            bound = estimate(preset, gpu)
            rows.append(
                [
                    bound.gpu,
                    f"`{preset}`",
                    f"{bound.network_seconds:.2f} s",
                    f"{bound.scoring_seconds:.2f} s" if bound.scoring_seconds else "–",
                    f"{1e3 * (bound.network_seconds + bound.scoring_seconds) / IMAGES:.1f} ms",
                    f"{bound.bytes / 2**30:.1f} GiB",
                ]
            )
    caption = (
        f"Roofline **estimates, not measurements**, for {IMAGES} images, {TILES} tiles in each of `vvv`; "
        "`python -m zsad.bench.roofline`"
    )
    head = ["GPU", "preset", "networks at least", "scoring at least", "per image at least", "memory about"]
    return f"{caption}:\n\n" + table(head, rows)


def model_table() -> str:
    rows = [
        [
            pair.gpu,
            str(pair.channels),
            ", ".join(map(str, pair.degrees)),
            f"{1e6 * pair.bound:.1f} µs",
            str(pair.pairs),
            f"{100 * pair.cache_share:.0f} %",
            f"{1e6 * pair.product:.1f} µs",
            str(pair.instructions),
            f"{1e6 * pair.pass_:.1f} µs",
            f"{100 * pair.peak_share:.0f} %",
            "–" if pair.measured is None else f"{1e6 * pair.measured:.1f} µs",
        ]
        for pair in model_pairs(results.get())
    ]
    caption = (
        f"A pair of images and a layer with {GRID[0]}×{GRID[1]} patches, `--products gram`: the bound by the peak, a "
        "**model, not a measurement**, and what was measured; `python -m zsad.bench.roofline`"
    )
    head = ["GPU", "C", "degrees", "product at the peak", "pairs a launch", "of L2", "product in waves"]
    head += ["instructions an entry", "pass", "of the peak", "measured"]
    return f"{caption}:\n\n" + table(head, rows)


def cluster_table() -> str:
    record = read("cluster.jsonl")[-1]
    medians = {
        name: [statistics.median(run[key] for run in runs) for key in ("start_s", "score_s")]
        for name, runs in record["runs"].items()
    }
    rows = [
        [said, *(f"{seconds:.1f} s" for seconds in medians[name])]
        for name, said in (("process", "one process, two threads"), ("workers", "a local Ray of two workers"))
    ]
    caption = (
        f"{record['categories']} categories of {record['images']} images at {record['side']} px in groups of "
        f"{record['group_size']}: the workers are {record['efficiency']:.2f} times as fast as the process once they "
        f"have started; a job costs {1e3 * record['job_s']:.1f} ms beside its work; {where(record)}"
    )
    return f"{caption}:\n\n" + table(["", "start-up", "scoring"], rows)


def startup_table() -> str:
    latest = {(r["images"], r["precision"]): r for r in read("startup.jsonl")}
    rows = []
    for (images, precision), record in sorted(latest.items()):
        alone = statistics.median(record["networks_s"])
        for name, values in record["runs_s"].items():
            clock = [lap for lap, _ in values]
            beyond = statistics.median(lap - own for lap, own in zip(clock, record["networks_s"], strict=True))
            ratio = times_faster(record).get(name)
            rows.append(
                [
                    f"{images} images, {precision}",
                    "this commit" if name == "here" else f"commit {name[:8]}",
                    f"{statistics.median(clock):.2f} s",
                    f"{alone:.2f} s",
                    f"{beyond:.2f} s",
                    "–" if ratio is None else f"{ratio:.2f}",
                ]
            )
    places = "; ".join(dict.fromkeys(map(where, latest.values())))  # rows may be of several commits
    caption = (
        f"A second run of `zsad-infer` with preset `{record['preset']}` at {record['image_size']} px, from the start "
        f"of the process to its end, medians of rounds in turn; {places}"
    )
    head = ["", "", "in all", "the networks alone", "beyond them", "this commit is faster by"]
    return f"{caption}:\n\n" + table(head, rows)


def batches_table() -> str:
    latest = {(r["network"], r["image_size"]): r for r in read("batches.jsonl")}
    parts = []
    for record in latest.values():
        columns = list(next(iter(record["seconds"].values())))
        rows = [
            [name, *(f"{1e3 * statistics.median(own[way]):.0f} ms" for way in columns)]
            for name, own in record["seconds"].items()
        ]
        caption = (
            f"An image of {record['image_size']} px through a network ({record['weights']}), by images per call and "
            f"threads; {where(record)}"
        )
        parts.append(f"{caption}:\n\n" + table(["", *columns], rows))
    return "\n\n".join(parts)


def references_table() -> str:
    record = read("clean_references.jsonl")[-1]
    median = {name: statistics.median(times) for name, times in record["seconds"].items()}
    rows = [
        [said, f"{median[name]:.2f} s", f"{100 * median[name] / median['scoring']:.1f} %"]
        for name, said in REFERENCES.items()
    ]
    caption = f"Scoring of {record['images']} images, P {record['patches']}, C {record['channels']}; {where(record)}"
    return f"{caption}:\n\n" + table(["", "time", "of scoring"], rows)


def archive_table() -> str:
    record = read("archive.jsonl")[-1]
    start, rows = record["start"], []
    for run in record["runs"]:
        cost = (run["cpu_s"] - start["cpu_s"]) / (run["images"] - start["images"])
        rows.append([f"{run['images']:,}", f"{1e3 * cost:.1f} ms", f"{run['peak_bytes'] / 2**20:.0f} MB"])
    hours = MANY * cost / 3600
    rows.append([f"{MANY:,}, **extrapolated**", f"{1e3 * cost:.1f} ms: {hours:.0f} hours of a processor", "–"])
    caption = (
        f"Runs in groups of {record['group']} drawn images of {record['side']} px, without the time of starting; "
        f"{where(record)}"
    )
    return f"{caption}:\n\n" + table(["images", "processors' time per image", "peak memory"], rows)


def growth_table() -> str:
    record = read("growth.jsonl")[-1]
    seconds, memory = record["seconds"], record["memory_bytes"]
    rows = []
    for count in next(iter(seconds.values())):
        each = [[1e3 * seconds[way][count] / int(count), memory[way][count] / 2**20] for way in seconds]
        rows.append([f"{int(count):,}", *(cell for ms, mb in each for cell in (f"{ms:.2f} ms", f"{mb:.0f} MB"))])
    powers = [f"N^{exponent(series[way]):.2f}" for way in seconds for series in (seconds, memory)]
    rows.append(["time and memory of all of them grow as", *powers])
    caption = (
        f"Images of {record['patches']} patches compared with each other at once and in groups, and with a bank; C "
        f"{record['channels']}, degrees {', '.join(map(str, record['degrees']))}, one layer; {where(record)}"
    )
    head = ["images", *(cell for way in seconds for cell in (f"{way}: per image", "memory"))]
    return f"{caption}:\n\n" + table(head, rows)


def peers_table() -> str:
    record = read("peers.jsonl")[-1]
    rows = []
    for name, said in PEERS.items():
        times = record["seconds"][name]
        ratio = f"{record['times_faster'][name]:.1f}" if name in record["times_faster"] else "1"
        rows.append([said, f"{statistics.median(times):.1f} s", ratio])
    caption = (
        f"Whole runs over {record['images']} drawn images at {record['image_size']} px with the taps and degrees of "
        f"preset `small`; medians of {len(times)} rounds; {where(record)}"
    )
    return f"{caption}:\n\n" + table(["", "time", "times faster"], rows)


def bank_times_table() -> str:
    blocks = []
    records = read("banks.jsonl")
    latest = {(r["preset"], r["image_size"], r["precision"]): r for r in records if not r["watch"]}
    for (preset, side, precision), record in latest.items():
        network = record["seconds"]["network"]
        rows = []
        for name, times in record["seconds"].items():
            ratio = statistics.median(own / whole for own, whole in zip(times, network, strict=True))
            patches = str(record["sizes"][name][1]) if name in record["sizes"] else "–"
            label = f"the network in {precision}" if name == "network" else f"bank: {name}"
            rows.append([label, patches, f"{1e3 * statistics.median(times):.0f} ms", f"{ratio:.2f}"])
        caption = (
            f"One image of preset `{preset}` ({record['weights']}; {side} px, {record['taps']} taps, degrees "
            f"{', '.join(map(str, record['degrees']))}); {where(record)}"
        )
        head = ["", "patches per tap and degree", "time", "times the network's"]
        blocks.append(f"{caption}:\n\n" + table(head, rows))
    blocks += watched_blocks({r["precision"]: r for r in records if r["watch"]})
    return "\n\n".join(blocks)


def watched_blocks(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what lines of a watched folder take, and their parts where they are known; records: by precisions."""
    rows, parts, blocks = [], dict[str, list[str]](), list[str]()
    for record in records.values():
        alone, line = (record["seconds"][name] for name in ("network", "line"))
        beyond = statistics.median(whole - own for own, whole in zip(alone, line, strict=True))
        times = [f"{1e3 * value:.0f} ms" for value in (statistics.median(alone), statistics.median(line), beyond)]
        rows.append([record["precision"], str(record["patches"]), *times])
        for part, said in LINE_PARTS.items():
            if f"line: {part}" in record["seconds"]:
                median = statistics.median(record["seconds"][f"line: {part}"])
                parts.setdefault(said, []).append(f"{1e3 * median:.0f} ms")
    if rows:
        head = ["network", "patches per tap and degree", "network alone", "from arrival to line", "beyond the network"]
        blocks.append(
            f"Images that arrive one by one in a folder that is watched; {where(record)}:\n\n{table(head, rows)}"
        )
    if parts:
        known = [precision for precision, record in records.items() if "line: told" in record["seconds"]]
        head = ["from arrival to line, medians", *known]
        blocks.append(f"Of that, one after the other:\n\n{table(head, [[said, *ms] for said, ms in parts.items()])}")
    return blocks


def tiles_table() -> str:
    sets: dict[str, dict[str, Record]] = {}
    for record in read("tiles.jsonl"):
        sets.setdefault(record["set"], {})[record["way"]] = record
    blocks = []
    for name, ways in sets.items():
        rows = [
            [said, *(percent([share]) for share in ways[way]["found"].values())]
            for way, said in TILE_WAYS.items()
            if way in ways
        ]
        *_, record = ways.values()
        sizes = [f"{size} px" for size in record["found"]]
        defects = record["of_each"] * (record["images"] // 2)
        caption = (
            f"`{name}`: AUROC in percent of {defects} planted defects of each size against "
            f"{record['images'] - record['images'] // 2} whole clean images of {record['width']}×{record['height']} "
            f"pixels, each by its highest map value; tiles of {record['tile']} pixels; commit {record['commit'][:8]}, "
            f"`{record['command']}`"
        )
        blocks.append(f"{caption}:\n\n{table(['', *sizes], rows)}")
    return "\n\n".join(blocks)


def report_table() -> str:
    record = read("report.jsonl")[-1]
    rows = []
    for run in record["runs"]:
        seconds = [f"{run[f'{step}_s']:.2f} s" for step in ("open", "open_cpu", "filter", "search", "sort")]
        sizes = [f"{run[key] / 1e6:.0f} MB" for key in ("memory_bytes", "heap_bytes", "used_memory_bytes")]
        rows.append([str(run["images"]), *seconds[:2], *sizes[:2], *seconds[2:], sizes[2]])
    caption = f"Reports in Chromium {record['chromium']}; {where(record)}"
    head = ["images", "open in", "processors' time", "memory", "the script's", "filter", "search", "sort"]
    return f"{caption}:\n\n" + table([*head, "memory after these"], rows)


def published_table() -> str:
    rows = [
        [row.data, row.source, str(row.shots), *(text or "–" for text in row.values.values())]
        for row in sorted(read_published(), key=lambda row: (row.data, row.shots))
        if row.name == "mean"
    ]
    caption = "**Published** means over the classes, in percent; zsad has not been measured here"
    return f"{caption}:\n\n" + table(["data", "source", "known-good images", *METRICS.values()], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "accuracy": methods_table,
    "archive": archive_table,
    "bank times": bank_times_table,
    "banks": banks_table,
    "batches": batches_table,
    "bounds": bounds_table,
    "clean references": references_table,
    "cluster": cluster_table,
    "contamination": contamination_table,
    "feedback": feedback_table,
    "growth": growth_table,
    "headline": headline_table,
    "known": known_table,
    "metrics": metrics_table,
    "metrics_memory": metrics_memory_table,
    "model": model_table,
    "mutual scoring": mutual_scoring_table,
    "nearest": nearest_table,
    "networks": networks_table,
    "peers": peers_table,
    "planted": planted_table,
    "pooling": pooling_table,
    "precisions": precisions_table,
    "profile": profile_table,
    "published": published_table,
    "report": report_table,
    "roofline": roofline_table,
    "runs": runs_table,
    "startup": startup_table,
    "tiles": tiles_table,
    "verdicts": verdicts_table,
    "windows": windows_table,
}


def made(make: Callable[[], str]) -> str:
    """Return a table, or that there is none since nothing was recorded."""
    try:
        return make()
    except (FileNotFoundError, NothingRecordedError):
        return "Nothing is on record yet."


def fill(text: str) -> str:
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->` by the table of that name."""
    return re.sub(
        r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{made(TABLES[match[2]])}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


# [heading of the page of a GPU's results] -> the file that its table is made from, and what makes it
GPU_TABLES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "Ways to multiply": ("mutual_scoring_cuda.jsonl", mutual_scoring_cuda_table),
    "Pairs per launch, and CUDA graphs": ("pairs_cuda.jsonl", partial(mutual_scoring_cuda_table, "pairs_cuda.jsonl")),
    "Model beside measurement": ("mutual_scoring_cuda.jsonl", model_table),
    "Networks": ("throughput.jsonl", networks_table),
    "Whole runs": ("throughput.jsonl", runs_table),
    "Nearest neighbours": ("nearest.jsonl", nearest_table),
}


def gpu_page(folder: Path) -> str:
    """Make a page of what the steps of `gpu_suite.sh` left in a folder; what is not there is said."""
    steps = (folder / "gpu_steps.txt").read_text(encoding="utf-8").splitlines()
    parts = ["# What was measured on a GPU", "\n".join(f"- {step}" for step in steps)]
    token = results.set(folder)
    try:
        for heading, (file, make) in GPU_TABLES.items():
            made = make() if (folder / file).exists() else ""
            parts += [f"## {heading}", made or "Nothing was measured."]
    finally:
        results.reset(token)
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpu", type=Path, metavar="FOLDER", help="write FOLDER/gpu.md from the results there")
    arguments = parser.parse_args(argv)
    if arguments.gpu is not None:
        (arguments.gpu / "gpu.md").write_text(gpu_page(arguments.gpu), encoding="utf-8")
        return 0
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
