"""What int8 networks change, as zsad's own code and ONNX Runtime run them: a section of `accuracy`.

Images go through the graph of preset small in int8, and are compared and scored as with fp32: as the preset does it,
and by the plain maximum of the map. Where the native code is there, int8 products choose the nearest patches of both,
and fp32 measures them. Beside them stands what mirroring all images changes with fp32, which makes no set easier.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from PIL import ImageOps

from zsad.engine.config import ConfigError
from zsad.engine.images.decode import network_input, recipe
from zsad.engine.methods.method import graph_requests
from zsad.engine.networks.build import load_networks
from zsad.engine.networks.network import run_in_parts
from zsad.engine.networks.runtime import Library, choose_runtime
from zsad.engine.scores.image_scores import image_scores
from zsad.kernels.cpu.native import has_native_code
from zsad.kernels.mutual_scoring import MutualScoring, square_grid

from .accuracy_batches import (
    INTERVAL,
    SMALL_DEGREES,
    SMALL_TAPS,
    TAPS,
    Array,
    ImageSet,
    Reader,
    Scored,
    clean_scored,
    metrics_of,
)

WAYS: Mapping[str, Library] = {"native code int8": "native", "ONNX Runtime int8": "onnxruntime"}
MIRRORED = "fp32, images mirrored"
KEPT = ("image_auroc", "pixel_ap")
BLEND = 0.25  # of preset small


def int8_tokens(images: ImageSet, reader: Reader, library: Library) -> Array:
    """Return the tokens [N, L, P, C] of the preset's graph in int8; raises ConfigError where it cannot run."""
    runtime, config = choose_runtime("cpu", library), reader.config({"references": "blended"})
    config = config.model_copy(update={"network_precision": runtime.network_precision("int8")})
    (network,) = load_networks(config, graph_requests(config), runtime, 1).values()
    prepared, graph = recipe(network.preprocessing, reader.image_size), network.graphs["image"]
    pictures = (network_input(images.picture(image), prepared)[None] for image in images.images)
    parts = (outputs for picture in pictures for _, outputs in run_in_parts(graph, {"images": picture}))
    return np.concatenate([np.array(outputs["tokens"]) for outputs in parts])


def mirrored_tokens(images: ImageSet, reader: Reader) -> Array:
    """Return the fp32 tokens [N, L, P, C] of mirrored images, each where its patch was."""
    tokens, _ = reader.tokens(ImageOps.mirror(images.picture(image)) for image in images.images)
    count, _, patches, channels = tokens.shape
    rows, columns = square_grid(patches)
    own = tokens[:, [TAPS.index(tap) for tap in SMALL_TAPS]].reshape(count, -1, rows, columns, channels)
    return np.ascontiguousarray(own[:, :, :, ::-1]).reshape(count, -1, patches, channels)


def rows(tokens: Array, image_size: int) -> Iterator[tuple[str, Scored]]:
    """Yield what comes of tokens [N, L, P, C] as the preset scores them, and by the maximum of the map."""
    grid, precision = square_grid(tokens.shape[2]), "int8" if has_native_code() else "fp32"
    scoring = MutualScoring(grid, tokens.shape[1], tokens.shape[3], SMALL_DEGREES, INTERVAL, precision)
    maps, minima = scoring.scores(tokens, return_minima="smallest degree")
    yield "small", next(clean_scored(minima, tokens, (BLEND,)))
    raw = image_scores(maps, grid, "map_maximum", image_size)
    yield "maximum", Scored(raw, maps.astype(np.float64), raw)


def precisions(images: ImageSet, reader: Reader) -> dict[str, Any]:
    """Metrics by row and way, how alike patch scores are, and by how much two images that change places move AUROC."""
    own = images.tokens[:, [TAPS.index(tap) for tap in SMALL_TAPS]]
    exact = dict(rows(own, reader.image_size))
    found: dict[str, Any] = {row: {"fp32": _metrics(images, scored)} for row, scored in exact.items()}
    ways: dict[str, Callable[[ImageSet, Reader], Array]] = {MIRRORED: mirrored_tokens}
    ways |= {way: partial(int8_tokens, library=library) for way, library in WAYS.items()}
    for way, tokens_of in ways.items():
        try:
            tokens = tokens_of(images, reader)
        except ConfigError as error:
            print(f"{way}: not measured ({error})")
            continue
        for row, scored in rows(tokens, reader.image_size):
            alike = float(np.corrcoef(scored.maps.ravel(), exact[row].maps.ravel())[0, 1])
            found[row][way] = {**_metrics(images, scored), "correlation": round(alike, 6)}
            print(f"{images.name}, {row}, {way}: {found[row][way]}, in fp32 {found[row]['fp32']}", flush=True)
    pairs = int(np.sum(images.anomalous)) * int(np.sum(~images.anomalous))
    return {"rows": found, "pair": round(1 / pairs, 6)}


def _metrics(images: ImageSet, scored: Scored) -> dict[str, float]:
    return {key: value for key, value in metrics_of(images, scored).items() if key in KEPT}
