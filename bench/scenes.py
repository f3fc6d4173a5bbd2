"""Pictures of several objects for whole runs, and what stands in for networks that find none with random weights."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from numpy.typing import NDArray

from zsad.engine import workplace
from zsad.engine.config import Config
from zsad.engine.demo import KINDS, draw_image
from zsad.engine.networks.build import load_networks
from zsad.engine.networks.network import Graph, GraphRequest, Network
from zsad.engine.networks.runtime import Runtime
from zsad.kernels.cuda.device import Device

SIDE = 1000  # pixels of a scene
PLACES = ((20, 20, 448), (520, 30, 440), (30, 560, 400), (560, 540, 400))  # of its objects: x, y, side
GROUND = 40  # grey value, of 255
BRIGHT = -0.2  # from which mean on an input of IS-Net shows an object
SMOOTH = 40  # that mean is over this share of a side
RADII = (6, 27, 54)  # of the masks of a point, in cells of SAM's logits: too small to be stable, parts, whole objects
SURE = (0.7, 0.98)  # between which masks' qualities lie: a third of them is above the usual limit

Arrays = dict[str, NDArray[Any]]


def draw_scenes(folder: Path, count: int) -> Path:
    """Draw pictures of a few objects on a plain ground and return their folder."""
    folder.mkdir(parents=True)
    for index in range(count):
        scene = np.full((SIDE, SIDE, 3), GROUND, np.uint8)
        for place, (x, y, side) in enumerate(PLACES):
            kind = KINDS[index % len(KINDS)] if place == index % len(PLACES) else None
            picture, _ = draw_image(np.random.default_rng([index, place]), kind)
            scene[y : y + side, x : x + side] = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
        (folder / f"{index:03d}.png").write_bytes(cv2.imencode(".png", scene)[1].tobytes())
    return folder


class StandIn:
    """A graph that takes its time, and whose results are then replaced by such as a trained network has."""

    def __init__(self, graph: Graph, made: Callable[[Mapping[str, NDArray[Any]]], Arrays], device: Device | None):
        self._graph, self._made, self._device = graph, made, device
        self.inputs, self.outputs = graph.inputs, graph.outputs

    @property
    def largest_batch(self) -> int:
        return self._graph.largest_batch

    @largest_batch.setter
    def largest_batch(self, rows: int) -> None:
        self._graph.largest_batch = rows

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Graph.run."""
        self._graph.run(inputs)
        device = self._device
        outputs = self._made(inputs if device is None else {name: device.to_host(x) for name, x in inputs.items()})
        typed = {name: array.astype(self.outputs[name].dtype, copy=False) for name, array in outputs.items()}
        return typed if device is None else {name: device.to_device(array) for name, array in typed.items()}


def bright_parts(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Return what IS-Net might find in scenes [B, 3, S, S]: `foreground` [B, S, S]."""
    grey = np.asarray(inputs["images"], np.float32).mean(axis=1)
    side = -(-grey.shape[-1] // SMOOTH)
    return {"foreground": np.stack([cv2.blur(image, (side, side)) > BRIGHT for image in grey])}


def discs(points: NDArray[Any], side: int, image_size: int) -> Arrays:
    """Return what SAM might find under points [B, 2]: `logits` [B, 3, side, side] and `iou` [B, 3]."""
    distance = np.hypot(*np.mgrid[-side:side, -side:side]).astype(np.float32)
    templates = 4 * (np.array(RADII, np.float32)[:, None, None] - distance)
    logits = np.empty((len(points), len(RADII), side, side), np.float32)
    for row, (x, y) in zip(logits, (np.asarray(points) * side / image_size).astype(int), strict=True):
        row[:] = templates[:, side - y : 2 * side - y, side - x : 2 * side - x]
    return {"logits": logits, "iou": np.random.default_rng(0).uniform(*SURE, logits.shape[:2])}


@contextmanager
def stand_ins(random: Collection[str]) -> Iterator[None]:
    """Let the networks that find foregrounds and have random weights find the objects of scenes; random: names."""

    def load(config: Config, requests: Sequence[GraphRequest], runtime: Runtime, batch_size: int) -> dict[str, Network]:
        networks = load_networks(config, requests, runtime, batch_size)
        made: dict[str, Callable[[Mapping[str, NDArray[Any]]], Arrays]] = {
            "isnet": bright_parts,
            "sam_masks": lambda inputs: discs(
                inputs["points"],
                networks["sam"].graphs["sam_masks"].outputs["logits"].shape[-1],
                networks["sam"].spec.side,
            ),
        }
        for name in {"isnet", "sam"}.intersection(random, networks):
            graphs = {
                graph: StandIn(one, made[graph], runtime.device) if graph in made else one
                for graph, one in networks[name].graphs.items()
            }
            networks[name] = replace(networks[name], graphs=graphs)
        return networks

    with patch.object(workplace, "load_networks", load):
        yield
