"""What every benchmark prints and keeps beside its numbers, and how tables read it."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from zsad.kernels.machine import processor

# Relative to the current folder: benchmarks are run from a clone, whose committed results they extend.
RESULTS = Path("bench") / "results"
results = ContextVar("results", default=RESULTS)  # the folder that tables are made from

Record = Mapping[str, Any]


class NothingRecordedError(Exception):
    """There is no record that a table could be made of."""


def environment(module: str, argv: Sequence[str] | None, packages: Sequence[str]) -> dict[str, Any]:
    """Return date, processor, versions, commit and the command that repeats the run, and print them."""
    given = sys.argv[1:] if argv is None else argv
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "commit": _commit(),
        "command": shlex.join(["python", "-m", module, *given]),
    }
    for name, value in record.items():
        print(f"{name}: {value}")
    return record


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON line to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(f"appended to {path}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the commit of the clone that the command runs in, marked when files differ from it."""
    sources = ["--", ":(exclude)bench/results"]  # which this very run may extend
    try:
        run = [
            subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", *sources])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run[0] + (" with changes" if run[1] else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def read(file: str) -> list[Record]:
    """Return the records of a results file, oldest first."""
    return [json.loads(line) for line in (results.get() / file).read_text(encoding="utf-8").splitlines()]


def where(record: Record) -> str:
    return f"{record['cpu']}, {record['cores']} cores, commit {record['commit'][:8]}, `{record['command']}`"
