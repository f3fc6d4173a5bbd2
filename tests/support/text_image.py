"""The cheapest second method: one image vector against two text vectors that somebody else made."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from zsad.engine.config import Config, Table
from zsad.engine.images.decode import recipe
from zsad.engine.images.loader import Batch
from zsad.engine.methods.method import Group, JudgesEach, Place, Scored
from zsad.engine.networks.network import GraphRequest, run_in_parts

SHARPNESS = 100.0  # CLIP's


class Settings(Table):
    vectors: str = Field(description="a .npy file with two text vectors, normal and anomalous: [2, D]")


class TextImage(JudgesEach):
    Settings = Settings
    takes_references = False
    rescores = False
    map_range = (0.0, 1.0)

    def __init__(self, config: Config, place: Place) -> None:
        assert isinstance(config.settings, Settings)
        self.settings, self.place = config.settings, place
        ((self.name, network),) = place.networks.items()
        self.graph, self.inputs = network.graphs["image"], [recipe(network.preprocessing, network.spec.side)]
        texts = np.load(config.settings.vectors)  # [2, D]
        self.texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)

    @staticmethod
    def graph_requests(config: Config) -> list[GraphRequest]:
        return [GraphRequest(name, "image", ("embedding",)) for name in config.networks]

    def record(self) -> dict[str, Any]:
        return self.settings.model_dump()

    def needed(self, images: int, references: int) -> int:
        return 0

    def start(self, group: Group) -> None:
        pass

    def take(self, batch: Batch) -> Iterator[Scored]:
        for part, outputs in run_in_parts(self.graph, {"images": batch.inputs[self.inputs[0]]}):
            vectors = self.place.arrays.fetch(outputs["embedding"]).astype(np.float64)  # [B, D]
            cosines = vectors @ self.texts.T / np.linalg.norm(vectors, axis=1, keepdims=True)  # [B, 2]
            anomalous = 1 / (1 + np.exp(SHARPNESS * (cosines[:, 0] - cosines[:, 1])))  # softmax over the two texts
            for index, score in zip(batch.indices[part], anomalous.tolist(), strict=True):
                yield Scored(index, score, np.full((1, 1), score, np.float32))
