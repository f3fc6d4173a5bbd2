"""Presets with random weights where real ones are absent, and what stands in for what such weights cannot give."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config
from zsad.engine.text.vectors import TextVectors
from zsad.export.checkpoints import find_checkpoint
from zsad.export.state_dict import CheckpointError

from .random_weights import write_random
from .scenes import stand_ins
from .towers import SHAPES, write_random_heads

RANDOM = "random"


def use_random_weights(config: Config, folder: Path) -> tuple[Config, dict[str, str]]:
    """Replace checkpoints that are not here by random ones of the same shape; also return what each one is."""
    weights, changed = {}, {}
    for name, spec in config.specs.items():
        try:
            find_checkpoint(spec.checkpoint)
            weights[name] = spec.checkpoint
        except CheckpointError:
            path = folder / f"{spec.checkpoint}-random.safetensors"
            write_random(spec.checkpoint, path)
            changed[name] = spec.model_copy(update={"checkpoint": str(path)})
            weights[name] = f"{RANDOM}, of the shape of {spec.checkpoint}"
        print(f"weights of {name}: {weights[name]}")
    finders = {name: spec for name, spec in changed.items() if name not in config.networks}
    update = {
        "networks": {name: changed.get(name, spec) for name, spec in config.networks.items()},
        "stages": config.stages.model_copy(update=finders),
        "settings": _with_heads(config, folder),
    }
    return config.model_copy(update=update), weights


def _with_heads(config: Config, folder: Path) -> Any:
    """Return the method's settings, with random linear heads where it wants heads that are not here."""
    head = getattr(config.settings, "head", None)
    if head is None:
        return config.settings
    try:
        find_checkpoint(head)
    except CheckpointError:
        (spec,) = config.networks.values()
        shape, path = SHAPES[spec.checkpoint], folder / f"{head}-random.safetensors"
        write_random_heads(len(spec.taps), shape.width, shape.projection, path)
        print(f"linear heads: random, of the shape of {head}")
        return config.settings.model_copy(update={"head": str(path)})
    return config.settings


@contextmanager
def random_words() -> Iterator[None]:
    """Give every prompt a random vector: random checkpoints have no text tower, which takes no part in a run's time."""

    def of(vectors: TextVectors, network: str, prompts: Sequence[str]) -> NDArray[np.float32]:
        graphs = vectors.networks[network].graphs
        compared = graphs["image"].outputs["embedding"] if "image" in graphs else None
        (dimension,) = (compared or graphs["clipseg_decoder"].inputs["conditions"]).shape
        return np.random.default_rng(0).standard_normal((len(prompts), dimension), np.float32)

    with patch.object(TextVectors, "of", of):
        yield


@contextmanager
def replaced(weights: Mapping[str, str]) -> Iterator[None]:
    """Replace what random weights cannot give: words' vectors, and the objects in an image."""
    random = {name for name, kind in weights.items() if kind.startswith(RANDOM)}
    with random_words() if random else nullcontext(), stand_ins(random):
        yield
