"""A bank on disk: what a product's normal images look like, in one file that only holds numbers.

safetensors: per network, tap and degree unit features [M, C] with the image that each is of; of the bank's own images
their digests, the scores and highest map values that they have without themselves, and what these follow from; what
users have given back, step by step; in its metadata a header as JSON, and a digest.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from zsad.engine.config import ConfigError, Foreground, NetworkSpec, Table, Tiling
from zsad.engine.scores.image_scores import ScoreRule
from zsad.kernels.files import parse_json, written_whole
from zsad.kernels.machine import default_memory_limit
from zsad.kernels.mutual_scoring import square_grid

from .tile_grid import stitched, tile_grid

VERSION, VERSION_OF_TILES = 1, 2  # of the format; those who know the first alone cannot read banks of tiles
SUFFIX = ".zsad"
LARGEST_HEADER = 2**24  # bytes
LARGEST_IMAGE = 2**20  # pixels along a side

Count = Annotated[int, Field(ge=1)]
BankPrecision = Literal["fp32", "fp16", "int8"]
STORED: Mapping[str, Any] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}
STEPS = 127  # of int8, to each side
FEEDBACK_PART = 4  # accepted images may add a quarter of a bank's size, and so may rejected ones

Key = tuple[str, int, int]  # network, tap, degree


class BankError(ConfigError):
    """A bank that cannot be used; the message says why, and the command that makes another."""


class Scale(Table):
    """Which distances become which values in [0, 1], the same for every run: 0, 0.5, and above it never quite 1."""

    low: float = Field(ge=0)  # becomes 0: the lowest that the bank's images have
    middle: float = Field(gt=0)  # becomes 0.5: the highest that the bank's images reach

    def values(self, distances: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scale distances [...]; their order stays."""
        above = np.maximum(np.asarray(distances, np.float64) - self.low, 0) / (self.middle - self.low)
        scaled: NDArray[np.float64] = above / (1 + above)
        return scaled


class BankNetwork(Table):
    """A network whose features a bank holds."""

    spec: NetworkSpec
    sha256: str  # of its checkpoint
    precision: str  # in which it ran


Kind = Literal["accept", "reject"]


class GivenImage(Table):
    """An image that a user has given back."""

    name: str  # of its file
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    patches: dict[str, Annotated[int, Field(ge=0)]]  # that were kept of it, by network
    before: Annotated[float, Field(ge=0, lt=1)]  # its score
    after: Annotated[float, Field(ge=0, lt=1)]


class Step(Table):
    """What one command has added to a bank."""

    number: Count
    kind: Kind
    when: AwareDatetime
    images: tuple[GivenImage, ...] = Field(min_length=1)


class Header(Table):
    """All that decides what a bank's features are and how an image is scored by them."""

    version: int
    zsad: str  # that wrote it
    preset: str  # whose settings these are
    networks: dict[str, BankNetwork]
    degrees: tuple[Count, ...] = Field(min_length=1)
    map_network: str
    image_network: str
    image_rule: ScoreRule
    neighbours: Annotated[int, Field(ge=1, le=16)]
    foreground: Foreground
    bit_depth: Annotated[int, Field(ge=8, le=16)]  # of 16-bit files
    precision: BankPrecision  # of the features
    images: Annotated[int, Field(ge=2)]  # that it was made from
    tiling: Tiling = Tiling()  # how these were cut, tiles of all places being one population; not at all
    tiles: Annotated[int, Field(ge=0)] = 0  # of all of them
    patches: Count  # that they have in all, of which it keeps a part
    chosen: bool  # by the run itself, from images of which some may be defective
    size: Count  # patches per tap and degree that it may have of these
    sources: str = ""  # sha256 over those of the files that it was asked to be made from; nothing where not known
    image_scale: Scale
    map_scale: Scale
    feedback: tuple[Step, ...] = ()

    @property
    def parts(self) -> int:
        """How many pictures networks were given: images, or tiles of such."""
        return self.tiles or self.images

    @property
    def text(self) -> str:
        """Return it as it is written: of whole images without what is of tiles."""
        return self.model_dump_json(exclude=None if self.tiling else {"tiling", "tiles"})

    @property
    def room(self) -> int:
        """How many patches per tap and degree there may be of accepted images, and how many of rejected ones."""
        return max(self.size // FEEDBACK_PART, 1)

    @model_validator(mode="after")
    def _check_tiles(self) -> "Header":
        cut = self.version == VERSION_OF_TILES
        if bool(self.tiling) != cut or (cut and self.tiles < self.images) or (self.tiles and not cut):
            raise ValueError("tiles are not those of its images")
        return self

    @model_validator(mode="after")
    def _check_feedback(self) -> "Header":
        numbers = [step.number for step in self.feedback]
        digests = [image.sha256 for step in self.feedback for image in step.images]
        if numbers != sorted(set(numbers)) or len(set(digests)) < len(digests):
            raise ValueError("steps or images are there twice")
        if any(set(image.patches) != set(self.networks) for step in self.feedback for image in step.images):
            raise ValueError("images are of other networks")
        return self

    @property
    def input_sides(self) -> dict[str, int]:
        """The sides in pixels at which its networks take images."""
        return {name: network.spec.side for name, network in self.networks.items()}

    @property
    def kind(self) -> dict[str, Any]:
        """Return what banks of images of one size, that one run uses, must have in common."""
        named = {"checkpoint"}  # where it lies decides nothing
        networks = {name: (n.spec.model_dump(exclude=named), n.sha256) for name, n in self.networks.items()}
        return {**self.model_dump(include=KIND), "networks": networks}

    @property
    def making(self) -> dict[str, Any]:
        """Return all that decides what is in a bank that has not been told anything since."""
        made = self.model_dump(include={"zsad", "precision", "size", "chosen", "sources"})
        return {**self.kind, **made, "ran": [network.precision for network in self.networks.values()]}


KIND = {
    *("degrees", "map_network", "image_network", "image_rule", "neighbours", "foreground", "bit_depth", "preset"),
    "tiling",
}


@dataclass(frozen=True)
class Features:
    """What a bank holds of one network, tap and degree."""

    vectors: NDArray[Any]  # [M, C] float32, float16 or int8
    scales: NDArray[np.float32] | None  # [M], of int8: what its vectors are multiplied with
    images: NDArray[np.int32]  # [M], the number of the image, or tile, that each is of

    @classmethod
    def room(cls, vectors: int, channels: int, precision: BankPrecision) -> "Features":
        """Make room for so many vectors."""
        scales = np.empty(vectors, np.float32) if precision == "int8" else None
        return cls(np.empty((vectors, channels), STORED[precision]), scales, np.empty(vectors, np.int32))

    def put(self, at: slice, others: "Features") -> None:
        """Take others, of the same precision, into a part of the room."""
        self.vectors[at], self.images[at] = others.vectors, others.images
        if self.scales is not None and others.scales is not None:
            self.scales[at] = others.scales

    @classmethod
    def packed(cls, units: NDArray[np.float32], images: NDArray[np.int32], precision: BankPrecision) -> "Features":
        """Store unit vectors [M, C] in a precision."""
        if precision != "int8":
            return cls(units.astype(STORED[precision]), None, images)
        scales = np.maximum(np.abs(units).max(axis=1), np.finfo(np.float32).tiny) / np.float32(STEPS)
        return cls(np.rint(units / scales[:, None]).astype(np.int8), scales, images)

    def of(self, members: NDArray[np.bool_]) -> "Features":
        """Return those of some of the images; members: [n] by their numbers."""
        rows = members[self.images]
        return Features(self.vectors[rows], None if self.scales is None else self.scales[rows], self.images[rows])

    def units(self) -> NDArray[np.float32]:
        """Return the vectors [M, C] as they are compared, near unit length."""
        vectors = self.vectors.astype(np.float32, copy=False)
        return vectors if self.scales is None else vectors * self.scales[:, None]


@dataclass(frozen=True)
class Own:
    """How the images that a bank was made from look to one network without themselves: what changes with additions.

    Of each image that is known of its T most unusual patches; all others are nearer to normal ones. Of images in
    tiles these are n.
    """

    maps: NDArray[np.float32]  # [n, P] mean distances
    rows: NDArray[np.int32]  # [n, T] numbers of patches
    features: Mapping[tuple[int, int], Features]  # [n * T, C] by tap and degree
    distances: Mapping[tuple[int, int], NDArray[np.float32]]  # [n * T, k] to the nearest, ascending


@dataclass(frozen=True)
class Bank:
    """What a file holds."""

    header: Header
    features: Mapping[Key, Features]  # of the images that it was made from
    own: Mapping[str, Own]  # by networks
    scores: NDArray[np.float64]  # [n] of the bank's images, each scored without itself
    peaks: NDArray[np.float64]  # [n] the highest values of their maps
    digests: NDArray[np.uint8]  # [n, 32] sha256 of their files; [0, 32]: not known
    given: Mapping[int, Mapping[Key, Features]] = field(default_factory=dict)  # by the numbers of steps
    sizes: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 2), np.int32))  # [n, 2] of images in tiles

    def whole_maps(self, patches: NDArray[np.floating[Any]]) -> Iterator[NDArray[np.float32]]:
        """Put the maps [P] of all tiles together to that of each of the bank's images; patches: [tiles, P]."""
        (side, _), first = square_grid(patches.shape[1]), 0
        for height, width in self.sizes.tolist():
            last = first + len(tile_grid((height, width), self.header.tiling, side))
            yield stitched((height, width), self.header.tiling, patches[first:last].reshape(-1, side, side))
            first = last

    def added(self, kind: Kind, key: Key) -> NDArray[np.float32]:
        """Return the vectors [A, C] of all that was accepted, or rejected."""
        numbers = [step.number for step in self.header.feedback if step.kind == kind]
        none = np.empty((0, self.features[key].vectors.shape[1]), np.float32)
        return np.concatenate([none, *(self.given[number][key].units() for number in numbers)])

    def span(self, network: str) -> float:
        """Return from the lowest to the highest distance that patches of the bank's images have."""
        return float(np.ptp(self.own[network].maps))

    @cached_property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return its arrays by the names that they have in the file."""
        found: dict[str, NDArray[Any]] = {"scores": self.scores, "peaks": self.peaks, "digests": self.digests}
        for key, features in self.features.items():
            found |= _tensors(_name(*key), features)
        for network, own in self.own.items():
            found |= {f"own.{network}.maps": own.maps, f"own.{network}.rows": own.rows}
            for (tap, degree), features in own.features.items():
                name = f"own.{_name(network, tap, degree)}"
                found |= {**_tensors(name, features), f"{name}.distances": own.distances[tap, degree]}
        if self.header.tiling:
            found["sizes"] = self.sizes
        for number, step in self.given.items():
            for key, features in step.items():
                found |= _tensors(f"given.{number}.{_name(*key)}", features)
        return found


def _tensors(name: str, features: Features) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {f"{name}.vectors": features.vectors, f"{name}.images": features.images}
    if features.scales is not None:
        found[f"{name}.scales"] = features.scales
    return found


def write_bank(path: Path, bank: Bank) -> None:
    """Write a bank, whole or not at all; one that is replaced keeps its permissions. Raises OSError."""
    text = bank.header.text
    metadata = {"zsad_bank": text, "sha256": _digest(text, bank.tensors)}
    with written_whole(path) as draft:
        try:
            save_file(bank.tensors, draft, metadata)
        except SafetensorError as error:  # what the system said is in its text alone
            said = re.search(r"(?:os error|Os { code:) (\d+)", str(error))
            number = int(said[1]) if said else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error
        like = path if path.exists() else draft.parent  # safetensors makes files that nobody else may read
        with suppress(PermissionError):  # of file systems that have none
            draft.chmod(like.stat().st_mode & 0o666)


def read_header(path: Path) -> tuple[Header, str]:
    """Read what a bank says of itself, and the digest of its content; raises BankError."""
    size = _size(path)
    with _readable(path), path.open("rb") as file:
        start = file.read(8)
        length = min(int.from_bytes(start, "little"), LARGEST_HEADER)  # of one that is longer the beginning is refused
        return _header(path, start + file.read(length), size)


def read_bank(path: Path) -> Bank:
    """Read a bank and check all of it; raises BankError."""
    size = _size(path)
    if 3 * size > default_memory_limit():
        raise BankError(
            f"{path}: too little memory: a bank of {size >> 20} MB takes three times as much, and "
            f"{default_memory_limit() >> 20} MB are to be had; free some, or save a smaller one with --bank-size"
        )
    with _readable(path):
        content = path.read_bytes()
    header, digest = _header(path, content, len(content))
    try:
        tensors = load(content)
        text = _metadata(content)["zsad_bank"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BankError(f"{path}: the bank is damaged ({error}); {AGAIN}") from None
    if _digest(text, tensors) != digest:
        raise BankError(f"{path}: the bank is damaged or was changed: its digest is of another content; {AGAIN}")
    try:
        return _checked(header, tensors)
    except (KeyError, ValueError) as error:
        raise BankError(f"{path}: what the bank holds does not fit its header ({error}); {AGAIN}") from None


AGAIN = f"save it again: zsad-infer --reference GOOD/ --save-bank part{SUFFIX}"


def _checked(header: Header, tensors: Mapping[str, NDArray[Any]]) -> Bank:
    """Make a bank of a file's content; raises KeyError and ValueError for what does not fit the header."""
    features = {key: _features(tensors, _name(*key), header, header.parts) for key in keys_of(header)}
    for key, found in features.items():
        if len(found.vectors) < header.neighbours:
            raise ValueError(f"{_name(*key)} has fewer vectors than neighbours are wanted")
    own = {network: _own(tensors, network, header) for network in header.networks}
    given: dict[int, dict[Key, Features]] = {}
    for step in header.feedback:
        given[step.number] = {}
        for key in keys_of(header):
            name = f"given.{step.number}.{_name(*key)}"
            found = given[step.number][key] = _features(tensors, name, header, len(step.images))
            if np.bincount(found.images, minlength=len(step.images)).tolist() != [
                image.patches[key[0]] for image in step.images
            ]:
                raise ValueError(f"{name} has other patches")
            if found.vectors.shape[1] != features[key].vectors.shape[1]:
                raise ValueError(f"{name} has other channels")
    for name in ("scores", "peaks"):
        if tensors[name].dtype != np.float64:
            raise ValueError(f"{name} are {tensors[name].dtype}")
        _check(tensors, name, (header.images,))
    digests = tensors["digests"]
    if digests.dtype != np.uint8 or digests.shape not in ((header.images, 32), (0, 32)):
        raise ValueError("digests are not of its images")
    bank = Bank(header, features, own, tensors["scores"], tensors["peaks"], digests, given)
    return replace(bank, sizes=_sizes(tensors, bank)) if header.tiling else bank


def _sizes(tensors: Mapping[str, NDArray[Any]], bank: Bank) -> NDArray[np.int32]:
    """Return how high and wide the bank's images are; raises KeyError and ValueError."""
    header, sizes = bank.header, tensors["sizes"]
    _check(tensors, "sizes", (header.images, 2))
    if sizes.dtype != np.int32 or ((sizes < 1) | (sizes > LARGEST_IMAGE)).any():
        raise ValueError("sizes are of no images")
    cells, _ = square_grid(bank.own[header.map_network].maps.shape[1])
    if sum(len(tile_grid((height, width), header.tiling, cells)) for height, width in sizes.tolist()) != header.tiles:
        raise ValueError("tiles are not those of its images")
    return sizes


def _features(tensors: Mapping[str, NDArray[Any]], name: str, header: Header, images: int) -> Features:
    """Return the features of a name, of so many images; raises KeyError and ValueError."""
    vectors, numbers = tensors[f"{name}.vectors"], tensors[f"{name}.images"]
    if vectors.dtype != STORED[header.precision] or vectors.ndim != 2 or numbers.shape != vectors.shape[:1]:
        raise ValueError(f"{name} is {vectors.dtype} {list(vectors.shape)}")
    if numbers.dtype != np.int32 or ((numbers < 0) | (numbers >= images)).any():
        raise ValueError(f"{name} is of images that it does not have")
    _check(tensors, f"{name}.vectors", vectors.shape)
    if header.precision != "int8":
        return Features(vectors, None, numbers)
    scales = tensors[f"{name}.scales"]
    if scales.dtype != np.float32:
        raise ValueError(f"{name} has other scales")
    _check(tensors, f"{name}.scales", numbers.shape)
    return Features(vectors, scales, numbers)


def _own(tensors: Mapping[str, NDArray[Any]], network: str, header: Header) -> Own:
    """Return what is known of the bank's images; raises KeyError and ValueError."""
    maps, rows = tensors[f"own.{network}.maps"], tensors[f"own.{network}.rows"]
    if maps.ndim != 2 or rows.ndim != 2 or rows.dtype != np.int32 or maps.dtype != np.float32:
        raise ValueError(f"own.{network} is {maps.dtype} {list(maps.shape)}")
    _check(tensors, f"own.{network}.maps", (header.parts, maps.shape[1]))
    _check(tensors, f"own.{network}.rows", (header.parts, rows.shape[1]))
    if ((rows < 0) | (rows >= maps.shape[1])).any():
        raise ValueError(f"own.{network}.rows are of patches that there are not")
    features, distances = {}, {}
    for name, tap, degree in keys_of(header):
        if name == network:
            own = f"own.{_name(name, tap, degree)}"
            features[tap, degree] = _features(tensors, own, header, header.parts)
            distances[tap, degree] = tensors[f"{own}.distances"]
            _check(tensors, f"{own}.distances", (rows.size, header.neighbours))
            if features[tap, degree].vectors.shape != (
                rows.size,
                tensors[f"{_name(name, tap, degree)}.vectors"].shape[1],
            ):
                raise ValueError(f"{own} has other vectors")
    return Own(maps, rows, features, distances)


def _check(tensors: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> None:
    if tensors[name].shape != shape or not np.isfinite(tensors[name]).all():
        raise ValueError(f"{name} is not finite, or not {list(shape)}")


def keys_of(header: Header) -> Iterator[Key]:
    """Yield the networks, taps and degrees that a bank has features of, in the order of taps and degrees."""
    for name, network in header.networks.items():
        for tap in network.spec.taps:
            for degree in header.degrees:
                yield name, tap, degree


def _name(network: str, tap: int, degree: int) -> str:
    return f"{network}.{tap}.{degree}"


def _digest(text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(array.data)
    return digest.hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the file system says into what a bank's user can do; raises BankError."""
    try:
        yield
    except OSError as error:
        raise BankError(f"--bank {path}: cannot be read ({error.strerror})") from None


def _size(path: Path) -> int:
    """Return the size of a bank's file; raises BankError for what is no file: a pipe would be waited for."""
    with _readable(path):
        status = os.stat(path)  # noqa: PTH116
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise BankError(f"--bank {path}: is {kind}; name a file that --save-bank has written")
    return status.st_size


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file from its beginning; raises ValueError, KeyError or TypeError."""
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= min(LARGEST_HEADER, len(content) - 8):
        raise ValueError("its beginning is not that of a safetensors file")
    metadata = parse_json(content[8 : 8 + length])["__metadata__"]
    if not isinstance(metadata, dict):
        raise TypeError("no metadata")
    return metadata


def _header(path: Path, content: bytes, size: int) -> tuple[Header, str]:
    """Read the header from a file's beginning; size: of all of the file."""
    try:
        metadata = _metadata(content)
        text, digest = metadata["zsad_bank"], metadata["sha256"]
        version = parse_json(text)["version"]
    except (ValueError, KeyError, TypeError):
        short = "is empty" if not size else "is no bank, or only its beginning"
        raise BankError(f"{path}: {short}; name a file that --save-bank has written, or {AGAIN}") from None
    if version not in (VERSION, VERSION_OF_TILES):
        newer = isinstance(version, int) and version > VERSION_OF_TILES
        mend = "install a newer zsad: pip install --upgrade zsad" if newer else AGAIN
        reads = f"this zsad reads formats {VERSION} and {VERSION_OF_TILES}"
        raise BankError(f"{path}: the bank has format {version!r}, and {reads}; {mend}")
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BankError(f"{path}: the bank's header is damaged ({where}: {first['msg']}); {AGAIN}") from None
    for key in ("map_network", "image_network"):
        if getattr(header, key) not in header.networks:
            raise BankError(f"{path}: the bank's header is damaged ({key} is none of its networks); {AGAIN}")
    return header, digest
