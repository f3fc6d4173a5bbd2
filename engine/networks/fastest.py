"""Which of the libraries at hand runs a graph faster on this machine: measured once, and noted beside the graph."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from zsad.kernels.files import parse_json, written_whole
from zsad.kernels.machine import available_cores, processor

from .network import Graph

log = logging.getLogger("zsad")

Name = TypeVar("Name", bound=str)

ROUNDS, LONGEST = 3, 10.0  # counted ones, and the seconds after which no other one begins
CLEARLY = 0.95  # of the time of the library that is there in any case


class Note:
    """A line that is kept beside a graph and holds for one machine and the versions of two libraries."""

    def __init__(self, graph: Path, kind: str, *facts: object) -> None:
        versions = []
        for package in ("onnxruntime", "onnxruntime-gpu", "openvino", "zsad"):
            with suppress(metadata.PackageNotFoundError):
                versions.append(f"{package} {metadata.version(package)}")
        known = [versions, processor(), processor("flags"), available_cores(), *facts]
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        self._path = graph.with_name(f"{graph.name}.{kind}-{key}.json")

    def read(self) -> Mapping[str, str] | None:
        """Return what is noted; None where nothing is, or nothing that can be read."""
        with suppress(OSError, ValueError):
            found = parse_json(self._path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
                return found
        return None

    def write(self, **values: str) -> None:
        """Note something down, where the cache can be written; else it is found out again."""
        with suppress(OSError), written_whole(self._path) as draft:
            draft.write_text(json.dumps(values), encoding="utf-8")


def seconds(graphs: Mapping[Name, Graph], inputs: Mapping[str, NDArray[Any]]) -> dict[Name, float]:
    """Return the shortest time that each of several graphs takes for a batch, all in turn; none of those that fail."""
    times: dict[Name, list[float]] = {name: [] for name in graphs}
    start = time.perf_counter()
    for counted in range(-1, ROUNDS):
        if counted > 0 and time.perf_counter() - start > LONGEST:
            break
        for name in list(times):
            begin = time.perf_counter()
            try:
                graphs[name].run(inputs)
            except Exception as error:  # libraries have many kinds with no base of their own
                log.warning("%s fails with a batch of samples and is not timed: %s", name, error)
                del times[name]
            else:
                times[name].append(time.perf_counter() - begin)
    return {name: min(values[1:]) for name, values in times.items()}
