"""From what networks give for known-good images to a bank of them.

tokens [n, L, P, C] → unit features of each degree → a few that cover all [M, C], stored → each image scored without
itself: scores and highest map values [n], scales

An image's own patches are taken out of the bank when it is scored, and with them went what made their neighbours in
other images superfluous. So in place of each stands the nearest patch of another image: about what the bank would hold
if the image had not been there. Without that, thinning makes the bank's own images score higher than new ones.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, ConfigError
from zsad.kernels.coverage import farthest_first, project
from zsad.kernels.cpu.comparers import unit_features
from zsad.kernels.cuda.device import Device

from .bank import Search, raw_scores, square
from .bank_file import VERSION, Bank, BankNetwork, BankPrecision, Features, Header, Scale
from .method import Place, Progress
from .musc import Settings as MuScSettings

PATCHES = 20_000  # of a bank, per tap and degree, unless asked for otherwise
LEAST_SPAN = 1e-3  # of a scale: images may be copies of one

Units = Callable[[int], NDArray[np.float32]]  # the features [P, C] of an image by its number


@dataclass(frozen=True)
class Making:
    """What decides how a bank is made, beside the images."""

    size: int = PATCHES  # patches per tap and degree at most
    precision: BankPrecision = "fp16"
    neighbours: int = 1


def build_bank(
    tokens: Mapping[str, NDArray[Any]],
    config: Config,
    place: Place,
    making: Making,
    facts: Mapping[str, Any],
    progress: Progress,
) -> Bank:
    """Make a bank of tokens [n, L, P, C] by networks; n at least 2.

    facts: of the header, what neither networks nor settings say: bit_depth, chosen, and the networks' precision.
    """
    settings = config.settings
    assert isinstance(settings, MuScSettings)
    header = Header(
        version=VERSION,
        zsad=importlib.metadata.version("zsad"),
        preset=config.preset,
        networks={
            name: BankNetwork(spec=network.spec, sha256=network.sha256, precision=facts["precision"])
            for name, network in place.networks.items()
        },
        degrees=settings.degrees,
        map_network=settings.map_network,
        image_network=settings.image_network,
        image_rule=settings.image_rule,
        neighbours=making.neighbours,
        foreground=config.foreground,
        bit_depth=facts["bit_depth"],
        precision=making.precision,
        images=len(next(iter(tokens.values()))),
        patches=sum(array.shape[0] * array.shape[2] for array in tokens.values()),
        chosen=facts["chosen"],
        image_scale=Scale(low=0.0, middle=1.0),
        map_scale=Scale(low=0.0, middle=1.0),
    )
    features: dict[tuple[str, int, int], Features] = {}
    patches = {}
    for name, array in tokens.items():
        taps = header.networks[name].spec.taps
        found, patches[name] = remembered(
            array, settings.degrees, making, place.arrays.device, partial(progress, f"bank of {name}")
        )
        features |= {(name, taps[layer], degree): kept for (layer, degree), kept in found.items()}
    raw, maps = raw_scores(header, patches, place.networks), patches[header.map_network]
    scales = {"image_scale": _scale(raw), "map_scale": _scale(maps)}
    return Bank(header.model_copy(update=scales), features, raw, maps.max(axis=1))


def remembered(
    tokens: NDArray[Any],
    degrees: Sequence[int],
    making: Making,
    device: Device | Literal["cpu"],
    report: Callable[[int, int], None] = lambda *_: None,
) -> tuple[dict[tuple[int, int], Features], NDArray[np.float64]]:
    """Return what a bank keeps of tokens [n, L, P, C], by layer and degree, and each image's distances without itself.

    The distances [n, P] are means over layers and degrees.
    """
    found: dict[tuple[int, int], Features] = {}
    patches = np.zeros((tokens.shape[0], tokens.shape[2]))
    keys = [(layer, degree) for layer in range(tokens.shape[1]) for degree in degrees]
    for done, (layer, degree) in enumerate(keys):
        report(done, len(keys))
        units = _units(tokens, layer, degree)
        kept = found[layer, degree] = _covering(tokens.shape, units, making)
        patches += _without_themselves(kept, len(tokens), units, making, device) / len(keys)
    report(len(keys), len(keys))
    return found, patches


def check_making(config: Config, making: Making) -> None:
    """Raise ConfigError where there can be no bank of what a configuration runs."""
    if not isinstance(config.settings, MuScSettings):
        raise ConfigError(
            f"--save-bank: a bank is of presets that compare images, small, musc or challenge, not {config.preset}"
        )
    if config.foreground not in ("none", "colour"):
        raise ConfigError("--save-bank: a bank is of whole images; leave out --foreground")
    if making.size < making.neighbours:
        raise ConfigError(f"--bank-size must be at least {making.neighbours}, not {making.size}")


def _units(tokens: NDArray[Any], layer: int, degree: int) -> Units:
    def read(image: int) -> NDArray[np.float32]:
        own = np.ascontiguousarray(tokens[image, layer], np.float32)
        units: NDArray[np.float32] = unit_features(own, square(len(own)), (degree,))[0]
        return units

    return read


def _covering(shape: tuple[int, ...], units: Units, making: Making) -> Features:
    """Choose features of all images that cover them."""
    count, _, patches, channels = shape
    if making.size >= count * patches:
        rows = np.arange(count * patches)
    else:
        rows = farthest_first(project(count, patches, channels, units), making.size)
    images = (rows // patches).astype(np.int32)
    chosen = [units(image)[rows[images == image] % patches] for image in np.unique(images).tolist()]
    return Features.packed(np.concatenate(chosen), images, making.precision)


def _without_themselves(
    found: Features, count: int, units: Units, making: Making, device: Device | Literal["cpu"]
) -> NDArray[np.float64]:
    """Return the distances [n, P] of each image's patches to the nearest of what the bank were without it."""
    vectors = found.units()
    whole = len(vectors) == count * len(units(0))
    instead = None if whole else _instead(found, vectors, count, units, making, device)
    distances = []
    for image in range(count):
        own = found.images == image
        others = vectors[~own] if instead is None else np.where(own[:, None], instead, vectors)
        distances.append(Search(others, making.neighbours, device).distances(units(image)))
    return np.stack(distances)


def _instead(
    found: Features,
    vectors: NDArray[np.float32],
    count: int,
    units: Units,
    making: Making,
    device: Device | Literal["cpu"],
) -> NDArray[np.float32]:
    """Return for each feature of the bank the nearest of another image, as it would be stored: [M, C]."""
    best = np.full(len(vectors), np.inf)
    instead = np.zeros_like(vectors)
    for image in range(count):
        others = np.flatnonzero(found.images != image)
        own = units(image)
        distances, numbers = Search(own, 1, device).nearest(vectors[others])
        nearer = distances < best[others]
        rows = others[nearer]
        best[rows], instead[rows] = distances[nearer], own[numbers[nearer]]
    return Features.packed(instead, found.images, making.precision).units()


def _scale(values: NDArray[np.float64]) -> Scale:
    low, high = float(values.min()), float(values.max())
    return Scale(low=low, middle=max(high, low + LEAST_SPAN))
