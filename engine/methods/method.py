"""What a method is: images of one category in, one score and one map for each out.

    category_pass.py: for each group of a category
        method.start(group)
        for batch in loader: method.take(batch) → Scored, …       (methods that judge every image by itself)
        method.finish(progress) → Scored, …                       (methods that compare the images of a group)

A method is a class in a module of this folder, named in METHODS, and a preset that names it, its networks and its
settings. Everything else (files, resuming, groups, scaling to [0, 1], verdicts, reports) is the same for all of them.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zsad.engine.config import Config, ConfigError, Table
from zsad.engine.images.decode import Recipe
from zsad.engine.images.loader import Batch
from zsad.engine.networks.network import GraphRequest, Network
from zsad.engine.scores.verdicts import Bounds
from zsad.engine.text.vectors import TextVectors

from .arrays import Arrays
from .foreground import Stages, foreground_requests

METHODS = {  # name → module in this folder and class
    "musc": ".musc:MuSc",
    "winclip": ".winclip:WinCLIP",
    "april_gan": ".april_gan:AprilGAN",
    "vvv": ".vvv:VVV",
    "bank": ".bank:BankMethod",
}

Progress = Callable[[str, int, int], None]  # stage, done, all


@dataclass(frozen=True)
class Scored:
    """What a method says of one image."""

    index: int  # of the image within its category
    raw_score: float  # in the method's own units; higher is more anomalous
    map: NDArray[np.float32]  # [h, w] in the method's own resolution and units, row 0 at the top
    facts: ArrayLike | None = None  # [D], whatever the method's `image_scores` needs of an image beside its raw score
    stages: Stages | None = None
    score: float | None = None  # in [0, 1], where the method neither compares nor rescores; None: the raw score
    p_value: float | None = None  # share of normal images that score as high, where the method knows that


@dataclass(frozen=True)
class Group:
    """Images that are scored together, and what is known of them."""

    images: int  # at most; the first group of a category is the largest
    object: str  # what they show, as its folder is called
    references: Iterable[Batch] = ()  # known-good images, of all groups of a category; read once, with the first one
    reference_count: int = 0  # how many they are at most
    name: str = ""  # of the category
    number: int = 0  # among the groups of the category
    groups: int = 1  # of the category
    aligned: bool = False  # whether tiles of images are compared with those of the same place alone, where they are cut
    whole: int | None = None  # images of the category, where tiles of them are scored instead; None: they are images
    # What `kept` has said of the groups before this one, which ended in an earlier run; with the first that does not.
    earlier: Sequence[Mapping[str, NDArray[Any]]] = ()

    @property
    def first(self) -> bool:
        """Whether none of the category comes before it in this run."""
        return self.number == len(self.earlier)


@dataclass(frozen=True)
class Place:
    """What a method works with, and where."""

    networks: Mapping[str, Network]
    arrays: Arrays  # in host memory or on a device, as the networks' inputs and outputs are
    timings: MutableMapping[str, float]  # seconds by stage, added up
    text: TextVectors
    precision: str = "fp32"  # in which the networks run


class Method(Protocol):
    """Scores images of one category; made once for a run and used for all of its categories."""

    @property
    def inputs(self) -> Sequence[Recipe]:
        """What the loader makes of each image; none: it works on decoded images."""

    @property
    def takes_references(self) -> bool:
        """Whether known-good images are of any use to it."""

    @property
    def cells(self) -> int | None:
        """How many patches there are along a side of its maps; None: these are as fine as pixels."""

    @property
    def compares(self) -> bool:
        """Whether maps and scores depend on the other images of the category or group."""

    @property
    def rescores(self) -> bool:
        """Whether image scores do, which are asked for once a category is complete."""

    @property
    def map_range(self) -> tuple[float, float] | None:
        """The fixed range of its maps; None: they are relative to the category, and so are its scores.

        Of methods that compare it is known once all groups of a category have ended.
        The scores of a method that neither compares nor rescores are in [0, 1].
        """

    def record(self) -> dict[str, Any]:
        """Return the settings as they are in force, for fingerprints and the run record."""

    def needed(self, images: int, references: int) -> int:
        """Return the least bytes, of what `place.arrays` limits, in which a group of so many images can be scored.

        references: the known-good images that join in.
        """

    def start(self, group: Group) -> None:
        """Begin a group of images; whatever an earlier one has left is dropped, but for references of the category."""

    def take(self, batch: Batch) -> Iterable[Scored]:
        """Run the networks over a batch; methods that judge every image by itself answer here."""

    def finish(self, progress: Progress) -> Iterable[Scored]:
        """End the group; methods that compare answer here. Raises MemoryError."""

    def kept(self) -> Mapping[str, NDArray[Any]]:
        """Return what it needs of the group that has just ended, beside `Scored`; asked of methods that compare."""

    def image_scores(self, scored: Iterable[Scored]) -> NDArray[np.float64]:
        """Return the scores [N] in [0, 1] of a whole category, from all of `scored` but the maps."""

    def bounds(self) -> Bounds | None:
        """Return which scores of a category are accepted and rejected, where the method knows that by itself."""

    def note(self) -> str | None:
        """Return what is to be known of a category's scores, in words; asked of methods that compare."""

    def remarks(self, bounds: Bounds, scores: NDArray[np.float64]) -> Sequence[str]:
        """Return what is to be known of the verdicts that bounds give to a category's scores [N], in words.

        Asked of methods that judge every image by itself.
        """


class JudgesEach:
    """The part of `Method` of those that judge every image by itself; theirs are the scores of single images."""

    compares = False
    cells: int | None = None

    def finish(self, progress: Progress) -> Iterable[Scored]:
        return ()

    def kept(self) -> Mapping[str, NDArray[Any]]:
        return {}

    def image_scores(self, scored: Iterable[Scored]) -> NDArray[np.float64]:
        raise AssertionError("not asked of methods that judge every image by itself")

    def bounds(self) -> Bounds | None:
        return None

    def note(self) -> None:
        return None

    def remarks(self, bounds: Bounds, scores: NDArray[np.float64]) -> Sequence[str]:
        return ()


class ConfiguredMethod(Method, Protocol):
    """A method that a configuration can name: what its class says before there is a run."""

    Settings: ClassVar[type[Table]]  # the table in a configuration that is named after the method
    takes_references: ClassVar[bool]
    compares: ClassVar[bool]

    def __init__(self, config: Config, place: Place) -> None:
        """Raises ConfigError for settings that these networks or this machine cannot do."""

    @staticmethod
    def graph_requests(config: Config) -> list[GraphRequest]:
        """Return which graphs of the networks the method runs; raises ConfigError for networks that it cannot use."""


def method_class(name: str) -> type[ConfiguredMethod]:
    """Return the class of a method; raises ConfigError for a name that there is not."""
    if name not in METHODS:
        raise ConfigError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}")
    module, _, found = METHODS[name].partition(":")
    chosen: type[ConfiguredMethod] = getattr(importlib.import_module(module, __package__), found)
    return chosen


def graph_requests(config: Config) -> list[GraphRequest]:
    """Return which graphs of its networks a configuration's method runs, and which find the foreground."""
    return [*method_class(config.method).graph_requests(config), *foreground_requests(config)]
