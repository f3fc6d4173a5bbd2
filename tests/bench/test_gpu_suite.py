"""The script for a machine with a GPU, rehearsed: its logic with stubs, its commands, and the page they fill."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_build
import pytest
from host_build import HostDevice

from zsad.bench import mutual_scoring_cuda, nearest, tables, throughput
from zsad.kernels import nearest as nearest_kernels

SCRIPT = Path(__file__).resolve().parents[2] / "bench/gpu_suite.sh"
NINE_MINUTES = 9 * 60

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

STUBS = {
    # What must not be waited for ends as the real one ends it.
    "timeout": 'echo "$2 $3" >> "$SEEN/limits"; [ "$3" = "$HANGING" ] && exit 124; shift 3; exec "$@"',
    "python3": 'echo "$*" >> "$SEEN/calls"; echo "said: $*"; case "$*" in $FAILING) exit 3 ;; esac',
    "nvidia-smi": 'echo "nvidia-smi" >> "$SEEN/calls"',
}


@pytest.fixture
def suite(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Run the script with stubs for what it calls; returns how it ended and the commands that it gave."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n", "utf-8")
        (stubs / name).chmod(0o755)

    def run(failing: str = "", hanging: str = "", **environment: str) -> Any:
        (tmp_path / "calls").write_text("", "utf-8")
        paths = {"PATH": f"{stubs}:/usr/bin:/bin", "SEEN": str(tmp_path), "OUT": str(tmp_path / "out")}
        done = subprocess.run(
            ["bash", str(SCRIPT)],
            env={**paths, "FAILING": failing, "HANGING": hanging, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done, (tmp_path / "calls").read_text("utf-8").splitlines()

    return run


def steps_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return what the end of the output says of every step."""
    lines = done.stdout.partition("== steps\n")[2].splitlines()
    return dict(re.sub(r" \(\d+ s\)$", "", line).split(": ", 1) for line in lines)


def test_everything_runs_the_most_valuable_first(suite: Any, tmp_path: Path) -> None:
    done, calls = suite(WHEELS=str(tmp_path))
    assert done.returncode == 0
    steps = steps_of(done)
    assert set(steps.values()) == {"done"}
    values = (
        "device wheels build tests products_challenge products_musc pairs_musc challenge musc winclip april_gan vvv"
    )
    assert list(steps) == [*values.split(), "banks", "decoders", "page"]
    assert (tmp_path / "out/gpu_steps.txt").read_text("utf-8") == done.stdout.partition("== steps\n")[2]
    assert "said: -m pytest -q -m gpu" in (tmp_path / "out/gpu_tests.log").read_text("utf-8")
    limits = [line.split() for line in (tmp_path / "limits").read_text("utf-8").splitlines()]
    assert len(limits) == len(calls) == len(steps)
    assert sum(int(grace) + int(limit) for grace, limit in limits) < NINE_MINUTES


def test_failures_are_named_and_stop_nothing(suite: Any) -> None:
    done, calls = suite(failing="*challenge*", hanging="95")
    assert done.returncode == 1
    steps = steps_of(done)
    assert [name for name, said in steps.items() if said != "done"] == ["tests", "challenge"]
    assert steps["tests"] == "FAILED: not done within 95 s"
    assert steps["challenge"] == "FAILED with status 3"
    assert len(calls) == len(steps) - 1  # all but the one that hung
    assert list(steps)[-1] == "page"


class _AcceptedError(Exception):
    """A benchmark has read its arguments and starts."""


def test_the_benchmarks_take_the_arguments_that_the_script_gives(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(*arguments: Any) -> None:
        raise _AcceptedError

    monkeypatch.setattr(throughput, "choose_runtime", accept)
    for module in (mutual_scoring_cuda, nearest):
        monkeypatch.setattr(module, "environment", accept)
    monkeypatch.setattr(tables, "gpu_page", accept)
    modules = {module.__name__: module for module in (mutual_scoring_cuda, nearest, tables, throughput)}
    _, calls = suite()
    given = [call.split()[1:] for call in calls if call.startswith("-m zsad.")]
    assert {name for name, *_ in given} == modules.keys()
    for name, *arguments in given:
        with pytest.raises(_AcceptedError):
            modules[name].main(arguments)


@pytest.mark.long
@pytest.mark.skipif(host_build.COMPILER is None, reason=host_build.MISSING_COMPILER)
def test_what_is_measured_fills_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice()
    monkeypatch.setattr(mutual_scoring_cuda, "open_device", lambda name: device)
    monkeypatch.setattr(mutual_scoring_cuda, "PEAK_SIDE", 64)
    monkeypatch.setattr(mutual_scoring_cuda, "by_pairs", lambda *shape: {})
    monkeypatch.setattr(nearest_kernels, "open_device", lambda name: device)
    monkeypatch.setattr(nearest, "CHECKED_BANK", 700)
    (tmp_path / "gpu_steps.txt").write_text("build: done (3 s)\nvvv: FAILED with status 1 (9 s)\n", "utf-8")
    small = ["--images", "3", "--layers", "2", "--side", "4", "--channels", "384", "--degrees", "1,3", "--repeats", "1"]
    for file, more in (
        ("mutual_scoring_cuda", []),
        ("pairs_cuda", ["--products", "gram", "--pairs", "1", "--unrecorded"]),
    ):
        assert mutual_scoring_cuda.main([*small, *more, "--output", str(tmp_path / f"{file}.jsonl")]) == 0
    of_banks = ["--queries", "20", "--bank", "600", "--channels", "24", "--repeats", "1", "--device", "cuda"]
    assert nearest.main([*of_banks, "--output", str(tmp_path / "nearest.jsonl")]) == 0
    assert tables.main(["--gpu", str(tmp_path)]) == 0
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert "- vvv: FAILED with status 1 (9 s)" in page
    for row in (
        "zsad, one product for all degrees",
        "zsad, 1 pairs",
        "zsad, launch by launch",
        "zsad, cuda",
        "RTX 4090",
    ):
        assert f"| {row} |" in page
    assert page.count("Nothing was measured.") == 2  # of networks and whole runs
