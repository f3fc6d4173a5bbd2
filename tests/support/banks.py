"""Banks of a few images whose tokens are drawn, without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import load_config
from zsad.engine.methods.arrays import HostArrays
from zsad.engine.methods.bank_build import Making, build_bank
from zsad.engine.methods.bank_file import Bank
from zsad.engine.methods.method import Place, method_class
from zsad.engine.networks.network import Network, TensorSpec

CHANNELS = 24
FACTS = {"bit_depth": 16, "chosen": False, "precision": "fp32"}


class Tower:
    """A graph whose inputs are its outputs."""

    largest_batch = 3
    inputs = {"images": TensorSpec((2, 9, CHANNELS), np.dtype(np.float32))}  # noqa: RUF012
    outputs = {"tokens": inputs["images"]}  # noqa: RUF012

    def run(self, inputs: Any) -> dict[str, NDArray[np.float32]]:
        return {"tokens": inputs["images"]}


def place_of(config: Any, sha256: str = "ab" * 32) -> Place:
    networks = {
        name: Network(spec, "tiny", sha256, "dinov2", {"image": Tower()}) for name, spec in config.networks.items()
    }
    return Place(networks, HostArrays((), None), {}, None)  # type: ignore[arg-type]


def make_tokens(count: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(9).normal(size=(1, 2, 9, CHANNELS))
    # Images differ as a whole, too, as real ones do.
    own = rng.normal(size=(count, 2, 1, CHANNELS)) * rng.uniform(0.2, 0.6, (count, 1, 1, 1))
    return (shared + own + 0.4 * rng.normal(size=(count, 2, 9, CHANNELS))).astype(np.float32)


def built(
    tokens: NDArray[np.float32],
    sizes: Sequence[tuple[int, int]] | None = None,
    cut: Mapping[str, Any] | None = None,
    **making: Any,
) -> Bank:
    """sizes: of images whose tiles the tokens are of, which `cut` has cut."""
    config = load_config("small", overrides={"image_size": 42, **(cut or {})}, method_of=method_class)
    place, of_images = place_of(config), None if sizes is None else np.array(sizes, np.int32)
    return build_bank({"dinov2": tokens}, config, place, Making(**making), FACTS, lambda *_: None, sizes=of_images)
