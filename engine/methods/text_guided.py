"""What the methods share that compare images with words: their settings, and the vectors of an object's two classes."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from zsad.engine.config import ConfigError, Table
from zsad.engine.networks.network import GraphRequest
from zsad.engine.text.prompts import PromptSet, prompt_set, read_prompts
from zsad.engine.text.tokenizer import VOCABULARY
from zsad.engine.text.vectors import TextVectors, class_vector


class TextGuided(Table):
    """Settings of a method that compares images with words."""

    object: str | None = Field(None, description="what the images show, in words")  # None: the category's folder name
    object_names: dict[str, str] = Field({}, description="a name for each folder name")  # instead of the folder's own
    spaces: bool = Field(False, description="true or false")  # underscores in folder names become spaces
    prompts: str | None = Field(None, description="a prompt set or a TOML file")  # None: the method's own

    @property
    def files(self) -> tuple[str, ...]:
        return (VOCABULARY,)

    def name_of(self, folder: str) -> str:
        """Return what is written for the images of a folder; raises ConfigError for a name without letters."""
        name = self.object if self.object is not None else self.object_names.get(folder, folder)
        if self.spaces and self.object is None:
            name = name.replace("_", " ")
        if not any(character.isalnum() for character in name):
            raise ConfigError(f"{name!r} is no name of an object; give one with --object")
        return name


def chosen_prompts(name: str) -> PromptSet:
    """Return a prompt set by its name, or the one of a file; raises ConfigError."""
    return read_prompts(Path(name)) if name.endswith(".toml") else prompt_set(name)


def text_request(network: str) -> GraphRequest:
    return GraphRequest(network, "text", ("embedding",), on_demand=True)


def class_vectors(
    text: TextVectors, network: str, prompts: PromptSet, name: str, each_at_unit_length: bool
) -> NDArray[np.float64]:
    """Return unit vectors [2, D] of an object in its normal and in its abnormal states."""
    normal, abnormal = prompts.compose(name)
    vectors = text.of(network, [*normal, *abnormal])  # [M, D]
    halves = (vectors[: len(normal)], vectors[len(normal) :])
    return np.stack([class_vector(half, each_at_unit_length) for half in halves])
