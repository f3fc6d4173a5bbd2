"""Tables of made-up records."""

from collections.abc import Mapping
from typing import Any

import pytest

from zsad.bench import tables, tables_accuracy

ENVIRONMENT = {"date": "now", "cpu": "a processor", "cores": 2, "commit": "0123456789", "command": "measure"}


def graph(name: str, **values: Any) -> Mapping[str, Any]:
    common = {"kind": "network", "preset": "vvv", "network": "net", "row": "image", "image_size": 64, "batch": 1}
    measured = {"weights": "random, of the shape of a net", "peak_flops": [1e11, 1e11]}
    return {**ENVIRONMENT, **common, **measured, "graph": name, **values}


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """What a results file holds, to be filled."""
    found: list[Mapping[str, Any]] = []
    for module in (tables, tables_accuracy):
        monkeypatch.setattr(module, "read", lambda file: found)
    return found


def test_graphs_of_one_run_are_one_table(records: list[Mapping[str, Any]]) -> None:
    first = {"ONNX Runtime fp32": [2.0, 2.0], "PyTorch eager fp32": [3.0, 4.0]}
    records.append(graph("image", flops_per_row=1e11, seconds_per_row=first))
    second = {"ONNX Runtime fp32": [0.02, 0.02]}
    records.append(graph("masks", row="point", batch=64, flops_per_row=1e9, seconds_per_row=second))
    assert tables.networks_table().splitlines() == [
        "Every graph of preset `vvv` (random weights of the true shapes), product peak 100 GFLOP/s; a processor, "
        "2 cores, commit 01234567, `measure`:",
        "",
        "| graph |  | time | of the peak | times faster than PyTorch |",
        "| --- | --- | --- | --- | --- |",
        "| net, `image`, 64 px: one image of 1 at once, 0.100 TFLOP | ONNX Runtime fp32 | 2.00 s | 50 % | 1.75 |",
        "|  | PyTorch eager fp32 | 3.50 s | 29 % | 1.00 |",
        "| net, `masks`, 64 px: one point of 64 at once, 1.00 GFLOP | ONNX Runtime fp32 | 20.0 ms | 50 % | – |",
    ]


def test_memory_stands_beside_times_where_it_was_measured(records: list[Mapping[str, Any]]) -> None:
    seconds = {"native code fp32": [2.0], "PyTorch eager fp32": [3.0]}
    memory = {"native code fp32": 7 << 20}
    records.append(graph("image", peak_flops=[1e11], flops_per_row=1e11, seconds_per_row=seconds, memory_bytes=memory))
    lines = tables.networks_table().splitlines()
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["memory |", "--- |", "7 MB |", "– |"]


def test_a_later_run_replaces_an_earlier_one(records: list[Mapping[str, Any]]) -> None:
    for date, seconds in (("yesterday", 5.0), ("today", 2.0)):
        records.append(graph("image", date=date, flops_per_row=1e11, seconds_per_row={"zsad": [seconds, seconds]}))
    assert "2.00 s" in tables.networks_table()
    assert "5.00 s" not in tables.networks_table()


def test_banks_are_told_by_size_and_by_what_they_reject(records: list[Mapping[str, Any]]) -> None:
    rate = {"promised": 0.0952, "rejected": 0.091, "low": 0.084, "high": 0.099}
    found = {
        "bank_images": 30,
        "sizes": {"10 %": {"patches": 1200, "image_auroc": 0.912, "pixel_ap": 0.3}},
        "alarms": {"10 %": {"0.1": rate}},
    }
    about = {"section": "banks", "checkpoint": "net", "image_size": 280, "images": {"nut": [60, 40]}}
    records.append({**ENVIRONMENT, **about, "splits": 200, "drawn": 20, "sets": {"nut": found}})
    lines = tables_accuracy.banks_table().splitlines()
    assert "| `nut` | 10 % | 1200 | 91.2 | 30.0 | – |" in lines
    assert "| `nut` | 10 % | 10 | 9.5 | 9.1 (8.4 to 9.9) |" in lines


def test_the_cost_of_an_archive_is_extrapolated_from_the_largest_run(records: list[Mapping[str, Any]]) -> None:
    start = {"images": 20, "cpu_s": 4.0, "peak_bytes": 2**28}
    runs = [{"images": 220, "cpu_s": 24.0, "peak_bytes": 2**29}, {"images": 2020, "cpu_s": 184.0, "peak_bytes": 2**29}]
    records.append({**ENVIRONMENT, "group": 200, "side": 112, "start": start, "runs": runs})
    lines = tables.archive_table().splitlines()
    assert "| 220 | 100.0 ms | 512 MB |" in lines
    assert "| 1,000,000, **extrapolated** | 90.0 ms: 25 hours of a processor | – |" in lines


def test_whole_runs_are_told_beside_the_published_steps(records: list[Mapping[str, Any]]) -> None:
    seconds = {"reference": [60.0, 62, 61], "zsad": [6.0, 6, 6], "zsad int8": [3.0, 3, 3]}
    faster = {"zsad": 10.2, "zsad int8": 20.3}
    records.append({**ENVIRONMENT, "images": 60, "image_size": 518, "seconds": seconds, "times_faster": faster})
    lines = tables.peers_table().splitlines()
    assert "| the steps of the published code in PyTorch, nothing written | 61.0 s | 1 |" in lines
    assert "| zsad, networks and products in int8 | 3.0 s | 20.3 |" in lines


def test_starting_is_told_beside_another_commit(records: list[Mapping[str, Any]]) -> None:
    runs = {"here": [(1.5, 2.0), (1.6, 2.0)], "0123456789": [(3.0, 4.0), (3.2, 4.0)]}
    found = {"networks_s": [1.0, 1.0], "runs_s": runs, "preset": "small", "image_size": 518}
    records.append({**ENVIRONMENT, **found, "images": 2, "precision": "fp32"})
    lines = tables.startup_table().splitlines()
    assert "| 2 images, fp32 | this commit | 1.55 s | 1.00 s | 0.55 s | – |" in lines
    assert "| 2 images, fp32 | commit 01234567 | 3.10 s | 1.00 s | 2.10 s | 2.00 |" in lines


def test_batches_and_threads_are_told_side_by_side(records: list[Mapping[str, Any]]) -> None:
    seconds = {"native code int8": {"one thread": [0.3, 0.31, 0.32], "2 threads, batch 1": [0.15, 0.16, 0.17]}}
    found = {"network": "dinov2", "weights": "dinov2-vits14", "preset": "small", "image_size": 518}
    records.append({**ENVIRONMENT, **found, "seconds": seconds})
    lines = tables.batches_table().splitlines()
    assert lines[2] == "|  | one thread | 2 threads, batch 1 |"
    assert lines[4] == "| native code int8 | 310 ms | 160 ms |"


def test_workers_are_told_beside_a_process(records: list[Mapping[str, Any]]) -> None:
    runs = {"process": [{"start_s": 1.0, "score_s": 30.0}], "workers": [{"start_s": 7.0, "score_s": 25.0}]}
    about = {"categories": 4, "images": 64, "side": 280, "group_size": 32}
    records.append({**ENVIRONMENT, **about, "runs": runs, "efficiency": 1.2, "job_s": 0.0024})
    text = tables.cluster_table()
    assert "1.20 times as fast" in text
    assert "a job costs 2.4 ms" in text
    assert "| a local Ray of two workers | 7.0 s | 25.0 s |" in text.splitlines()


def test_what_was_never_recorded_is_said(records: list[Mapping[str, Any]]) -> None:
    records.append({"section": "windows"})
    assert tables.made(tables_accuracy.pooling_table) == "Nothing is on record yet."

    def none() -> str:
        raise FileNotFoundError

    assert tables.made(none) == "Nothing is on record yet."


def test_bounds_of_known_good_images_are_told_with_what_they_promise(records: list[Mapping[str, Any]]) -> None:
    rates = {"0 %": {"rejected": 0.03, "low": 0.02, "high": 0.04}}
    rates["40 %"] = {**rates["0 %"], "recall": 0.5}
    found = {"known": 20, "promised": 0.05, "shares": rates}
    about = {"section": "bounds", "checkpoint": "net", "image_size": 280, "images": {"nut": [60, 40]}}
    records.append({**ENVIRONMENT, **about, "splits": 200, "sets": {"nut": found}})
    lines = tables_accuracy.bounds_table().splitlines()
    assert "| `nut` | 20 | 5.0 | 0 % | 3.0 (2.0 to 4.0) | – |" in lines
    assert "| `nut` | 20 | 5.0 | 40 % | 3.0 (2.0 to 4.0) | 50.0 |" in lines


def test_what_int8_moves_is_told_with_what_two_images_move(records: list[Mapping[str, Any]]) -> None:
    ways = {"fp32": {"image_auroc": 0.9}, "native code int8": {"image_auroc": 0.898, "correlation": 0.99951}}
    about = {"section": "precisions", "checkpoint": "net", "image_size": 518, "images": {"nut": [60, 40]}}
    records.append({**ENVIRONMENT, **about, "sets": {"nut": {"rows": {"small": ways}, "pair": 1 / 2400}}})
    text = tables_accuracy.precisions_table()
    assert "0.042 on `nut`" in text
    assert "| `nut` | preset `small` | native code int8 | 89.80 | – | -0.20 | 0.99951 |" in text.splitlines()


def test_runs_say_how_many_tiles_there_were(records: list[Mapping[str, Any]]) -> None:
    run = {"kind": "run", "preset": "vvv", "runtime": "a runtime", "precision": ["fp32", None], "image_size": 240}
    times = {"seconds_alone": {"masks": 30.0, "write": 0.5}, "seconds_together": 40.0, "overlap": 0.8}
    found = {"found": {"masks": 5, "tiles": 4}, "images": 2, "peak_host_bytes": 2**30}
    records.append({**ENVIRONMENT, **run, **times, **found})
    table = tables.runs_table()
    assert "preset `vvv`, 2 images at 240 px, 4 tiles each, a runtime, networks fp32: 0.05 images/s" in table
    assert "| masks | 15.0 s |\n| write | 250.0 ms |\n| all together | 20.0 s |" in table


def test_a_watched_line_has_its_parts_where_they_are_known() -> None:
    seconds = {"network": [0.25, 0.5], "line": [0.5, 0.75]}
    parts = {f"line: {part}": [0.125] for part in tables.LINE_PARTS}
    record = {**ENVIRONMENT, "precision": "fp32", "patches": 9, "seconds": seconds}
    (whole,) = tables.watched_blocks({"fp32": record})
    assert "| fp32 | 9 | 375 ms | 625 ms | 250 ms |" in whole
    _, known = tables.watched_blocks({"fp32": record, "int8": {**record, "seconds": {**seconds, **parts}}})
    assert "| from arrival to line, medians | int8 |" in known
    assert known.count("| 125 ms |") == len(tables.LINE_PARTS)
    assert tables.watched_blocks({}) == []
