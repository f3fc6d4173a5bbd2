"""What a graph takes in memory, in a process of its own: its library, its weights and passes over a batch."""

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from numpy.typing import NDArray

from zsad.engine.config import Config
from zsad.engine.networks.build import load_networks
from zsad.engine.networks.network import GraphRequest
from zsad.engine.networks.runtime import choose_runtime
from zsad.kernels.machine import peak_memory

PASSES = 3
Inputs = Mapping[str, NDArray[Any]]


def graph_memory(config: Config, request: GraphRequest, library: str, inputs: Inputs, rows: int) -> int:
    """Return by how many bytes a process grows at most that loads a graph on the CPU and runs it; rows: of inputs."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_grown, config, request, library, inputs, rows).result()


def _grown(config: Config, request: GraphRequest, library: str, inputs: Inputs, rows: int) -> int:
    before: int = psutil.Process().memory_info().rss
    networks = load_networks(config, [request], choose_runtime("cpu", library), rows)
    graph = networks[request.network].graphs[request.graph]
    for _ in range(PASSES):
        graph.run(inputs)
    return peak_memory() - before


def forget_peak_memory() -> None:
    """Let peaks count from now on, where the system can: Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
