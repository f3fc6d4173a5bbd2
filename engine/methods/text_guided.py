"""What the methods share that compare each image with words: settings, the words, running the network."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from zsad.engine.config import Config, ConfigError, Table
from zsad.engine.images.decode import Resize, recipe
from zsad.engine.images.loader import Batch
from zsad.engine.images.stored import ImageError
from zsad.engine.networks.network import GraphRequest, run_in_parts
from zsad.engine.text.prompts import PromptSet, prompt_set, read_prompts
from zsad.engine.text.tokenizer import VOCABULARY
from zsad.engine.text.vectors import TextMean, class_vector
from zsad.kernels.nearest import Nearest

from .method import Group, JudgesEach, Place

log = logging.getLogger("zsad")

Outputs = Mapping[str, NDArray[np.float32]]  # of the network by name, in host memory


def _with_letters(name: str) -> str:
    if not any(character.isalnum() for character in name):
        raise ValueError(name)
    return name


Name = Annotated[str, AfterValidator(_with_letters)]


class TextSettings(Table):
    """Settings of a method that compares images with words."""

    object: Name | None = Field(None, description="a name with letters")  # None: the category's folder is called so
    object_names: dict[str, Name] = Field(
        {}, description="names with letters, by folder"
    )  # instead of the folder's own
    spaces: bool = Field(False, description="true or false")  # underscores in folder names become spaces
    prompts: str | None = Field(None, description="a prompt set or a TOML file")  # None: the method's own
    # What is averaged over the prompts of a class: vectors as they are, or at unit length. None: the method's own.
    text_mean: TextMean | None = None
    resize: Resize = "squash"  # of images that are not square; shortest_crop looks at their middle square alone

    @property
    def files(self) -> tuple[str, ...]:
        return (VOCABULARY,)

    def name_of(self, folder: str) -> str:
        """Return what is written for the images of a folder; raises ImageError for a folder name without letters."""
        if self.object is not None:
            return self.object
        name = self.object_names.get(folder, folder.replace("_", " ") if self.spaces else folder)
        try:
            return _with_letters(name)
        except ValueError:
            raise ImageError(f"{name!r} is no name of an object; give one with --object") from None


def chosen_prompts(name: str) -> PromptSet:
    """Return a prompt set by its name, or the one of a file; raises ConfigError."""
    return read_prompts(Path(name)) if name.endswith(".toml") else prompt_set(name)


def tower_requests(config: Config, outputs: Sequence[str], name: str | None = None) -> list[GraphRequest]:
    """Return the requests for both towers of a network.

    name: None: of the only one that there is. Raises ConfigError where there are more, and for images that are cut to
    their middle where they are tiles.
    """
    assert isinstance(config.settings, TextSettings)
    if config.components and config.settings.resize != "squash":
        raise ConfigError(f"--components: tiles are to be seen whole; leave out resize in [{config.method}]")
    if name is None:
        if len(config.networks) != 1:
            raise ConfigError(f"method {config.method} takes one network, not {len(config.networks)}")
        (name,) = config.networks
    return [GraphRequest(name, "image", tuple(outputs)), GraphRequest(name, "text", ("embedding",), on_demand=True)]


class TextGuided(JudgesEach):
    """The part of `Method` that such methods share."""

    takes_references = True
    text_mean: ClassVar[TextMean]  # where the settings say nothing

    def __init__(
        self, config: Config, place: Place, prompts: str, remembered: Sequence[str] = (), tower: str | None = None
    ) -> None:
        """prompts: a set or a file. remembered: outputs that are kept of references.

        tower: the network that has both towers; None: the only one that there is.
        """
        assert isinstance(config.settings, TextSettings)
        self._text_settings, self._place, self._few_shot = config.settings, place, config.few_shot
        self._name, network = next((name, used) for name, used in place.networks.items() if tower in (name, None))
        self._graph, self._size = network.graphs["image"], network.spec.side
        self._remembered = remembered
        self._recipe = recipe(network.preprocessing, self._size, config.settings.resize)
        self.inputs = [self._recipe]
        self._prompts = chosen_prompts(prompts)
        self._classes: NDArray[np.float64] = np.zeros((2, 0))  # of the category, normal and abnormal
        self._memories: dict[str, list[Nearest]] = {}  # of each layer of each of `remembered`; none without references

    def record(self) -> dict[str, Any]:
        return {**self._text_settings.model_dump(), "prompts": asdict(self._prompts)}

    def needed(self, images: int, references: int) -> int:
        if not references:
            return 0
        banks = [self._bank(output, references) for output in self._remembered]
        work = max(self._searching(bank, resident=False) for bank in banks)
        return work if self._place.arrays.devices else work + 4 * sum(map(math.prod, banks))

    def start(self, group: Group) -> None:
        name = self._text_settings.name_of(group.object)
        log.info("images of %s are compared with words for %r", group.object, name)
        normal, abnormal = self._prompts.compose(name)
        vectors = self._place.text.of(self._name, [*normal, *abnormal])  # [M, D]
        halves = (vectors[: len(normal)], vectors[len(normal) :])
        mean = self._text_settings.text_mean or self.text_mean
        self._classes = np.stack([class_vector(half, mean) for half in halves])
        self._memories = {}
        if self._few_shot:
            self._memories = self._remember(group)

    def _run(self, batch: Batch) -> Iterator[tuple[slice, Outputs]]:
        """Run the image tower; yield which rows of the batch, and its outputs."""
        for part, outputs in run_in_parts(self._graph, {"images": batch.inputs[self._recipe]}):
            yield (
                part,
                {name: np.asarray(self._place.arrays.fetch(array), np.float32) for name, array in outputs.items()},
            )

    def _remember(self, group: Group) -> dict[str, list[Nearest]]:
        """Run the image tower over the references; return what searches their vectors, by output one for each layer."""
        shapes = {output: self._bank(output, group.reference_count) for output in self._remembered}
        sizes = ", ".join(f"{name} {4 * math.prod(shape) / 2**20:.1f} MiB" for name, shape in shapes.items())
        log.debug("%d known-good images take %s", group.reference_count, sizes)
        limit = self._place.arrays.limit()
        banks = {output: np.empty(shape, np.float32) for output, shape in shapes.items()}
        if not self._place.arrays.devices:
            limit -= sum(bank.nbytes for bank in banks.values())
        count = 0
        for batch in group.references:
            for _, outputs in self._run(batch):
                rows = slice(count, count + len(outputs["embedding"]))
                for output, bank in banks.items():
                    layers, _, vectors, channels = bank.shape
                    bank[:, rows] = outputs[output].reshape(-1, layers, vectors, channels).swapaxes(0, 1)
                count = rows.stop
        return self._searched({output: bank[:, :count] for output, bank in banks.items()}, limit)

    def _searched(self, banks: Mapping[str, NDArray[np.float32]], limit: int) -> dict[str, list[Nearest]]:
        """Return what searches banks [L, K, V, C], within so many bytes beside them: one search runs at a time."""
        least = {output: self._searching(bank.shape, resident=False) for output, bank in banks.items()}
        left = limit - max(least.values())  # for prepared vectors that stay
        memories: dict[str, list[Nearest]] = {}
        for output, bank in banks.items():
            memories[output] = []
            for layer in bank:
                stays = self._searching(bank.shape, resident=True) - least[output]
                allowed = least[output] + (stays if stays <= left else 0)
                left -= stays if stays <= left else 0
                vectors = layer.reshape(-1, layer.shape[-1])  # [K * V, C]
                memories[output].append(Nearest(vectors, device=self._place.arrays.device, memory_limit=allowed))
        return memories

    def _bank(self, output: str, references: int) -> tuple[int, int, int, int]:
        """Return the shape [L, K, V, C] of what is kept of an output of the references."""
        *layers, vectors, channels = self._graph.outputs[output].shape
        return math.prod(layers), references, vectors, channels

    def _searching(self, bank: tuple[int, ...], resident: bool) -> int:
        """Return the bytes in which one layer of a bank [L, K, V, C] is searched."""
        _, references, vectors, channels = bank
        where = "cuda" if self._place.arrays.devices else "cpu"
        return Nearest.needed(references * vectors, channels, device=where, resident=resident)
