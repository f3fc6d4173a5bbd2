"""From known-good images to a bank: networks over all of them, then one file.

images → loader: batches of network inputs → networks: tokens [n, L, P, C] → methods/bank_build.py → CATEGORY.zsad
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.config import Config, ConfigError
from zsad.engine.images.categories import Category, InputImage, counted
from zsad.engine.images.decode import Recipe
from zsad.engine.images.depth import batch_bit_depth
from zsad.engine.images.duplicates import Duplicates
from zsad.engine.images.loader import Batch
from zsad.engine.images.references import count_references, find_references
from zsad.engine.images.remote import Location, digest
from zsad.engine.images.stored import DAMAGE, ImageError
from zsad.engine.images.survey import survey
from zsad.engine.methods.bank import LEAST_REVIEWED, recipes
from zsad.engine.methods.bank_build import Needed, build_bank, check_making, describe, needed
from zsad.engine.methods.bank_file import SUFFIX, BankError, Header, read_bank, write_bank
from zsad.engine.methods.method import Progress
from zsad.engine.methods.musc import Settings as MuScSettings
from zsad.engine.methods.tile_grid import TilePlan
from zsad.engine.methods.tiled import Cutter
from zsad.engine.networks.network import run_in_parts
from zsad.engine.results.records import CategoryRecord, Failure
from zsad.engine.scores.conformal import FALSE_ALARMS, images_needed, percent
from zsad.engine.workplace import Saving, Workplace
from zsad.kernels.files import check_target, check_writable, printable
from zsad.kernels.machine import default_memory_limit, scratch, stopwatch

from .category_pass import NO_ROOM, CategoryJob, CategoryProgress, cost_of_one

log = logging.getLogger("zsad")


@dataclass(frozen=True)
class Normal:
    """Images of a category that are taken for normal."""

    category: Category
    images: Sequence[InputImage]
    bit_depth: int  # of grey values in 16-bit files
    chosen: bool  # by the run itself
    strict: bool = False  # the first one that cannot be read ends all

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """The sha256 of their files [n, 32], zeros of one that has gone."""
        digests = b"".join(_digest(image.path) for image in self.images)
        return np.frombuffer(digests, np.uint8).reshape(len(self.images), 32)

    def facts(self, workplace: Workplace) -> dict[str, Any]:
        """Return what a bank's header says of them and of how the networks run."""
        return {
            "bit_depth": self.bit_depth,
            "chosen": self.chosen,
            "precision": workplace.record["network_precision"],
            "sources": hashlib.sha256(self.digests.tobytes()).hexdigest(),
        }


def file_of(saving: Saving, category: Category) -> Path:
    """Return the file of a category's bank: the path itself where it names a file, else one in that folder."""
    return saving.path if saving.path.suffix == SUFFIX else saving.path / f"{category.name}{SUFFIX}"


def check_saving(saving: Saving, config: Config, categories: Sequence[Category]) -> None:
    """Raise ConfigError, before any work, where no bank can be made or written."""
    check_making(config, saving.making)
    if saving.path.suffix == SUFFIX and len(categories) > 1:
        raise ConfigError(
            f"--save-bank {saving.path}: there are {len(categories)} categories, each with a bank of its own; name a "
            f"folder: --save-bank {saving.path.with_suffix('')}/"
        )
    for category in categories:
        try:
            check_target(file := file_of(saving, category))
            check_writable(file.parent)
        except OSError as error:
            raise ConfigError(f"--save-bank {error if error.errno is None else _refused(file, error)}") from None


def check_room(saving: Saving, category: Category, images: int, config: Config, workplace: Workplace) -> Needed:
    """Return what making a bank of so many images, or tiles, takes; raises ConfigError where memory is too little."""
    place, settings = _of_bank(config, workplace).place, config.settings
    assert isinstance(settings, MuScSettings)
    shapes = [network.graphs["image"].outputs["tokens"].shape for network in place.networks.values()]
    takes = needed(images, shapes, settings.degrees, saving.making, place.arrays.device)
    least, limit = takes.of_host(place.arrays.device), _host_limit(workplace)
    if least > limit:
        said = counted(images, "tile" if config.tiling else "image")
        raise ConfigError(
            f"{printable(category.name)}: a bank of {said} takes {least / 2**20:.0f} MiB while it "
            f"is made and the memory limit is {limit / 2**20:.0f} MiB; raise --memory-limit, or make the work smaller "
            "with --bank-size, --image-size or fewer images"
        )
    return takes


def check_rooms(saving: Saving, jobs: Sequence[CategoryJob], workplace: Workplace) -> None:
    """Raise ConfigError, before any work, where there is too little memory to make the banks of categories."""
    for job in jobs:
        category, config = job.category, job.config
        images = max(2, round(len(category.images) / 2))
        if config.few_shot:
            images = count_references(category, job.products, config.reference, config.shots)
        if job.tiles is not None:
            images = job.tiles.tiles(images, workplace.method.cells)
        check_room(saving, category, images, config, workplace)


def _of_bank(config: Config, workplace: Workplace) -> Workplace:
    """Return a workplace with the networks that a bank is of: of tiles that of the maps, which their scores follow."""
    if not config.tiling:
        return workplace
    assert isinstance(config.settings, MuScSettings)
    name, place = config.settings.map_network, workplace.place
    return replace(workplace, place=replace(place, networks={name: place.networks[name]}))


def _parts(images: Sequence[InputImage], cutter: Cutter | None) -> int:
    """Return how many pictures the networks will be given of images: as many, or all tiles, by their headers."""
    if cutter is None:
        return len(images)
    sizes = survey((image.path for image in images), lambda: None).sizes
    return TilePlan(sizes, cutter.tiling).tiles(len(images), cutter.cells)


def _host_limit(workplace: Workplace) -> int:
    """Return the bytes that may be used in host memory, of which the limit of a device says nothing."""
    arrays = workplace.place.arrays
    return arrays.limit() if arrays.device == "cpu" else default_memory_limit()


def _refused(file: Path, error: OSError) -> str:
    return f"{file}: cannot be written there ({error.strerror}); name a file in another folder"


def save_bank(
    saving: Saving, normal: Normal, config: Config, workplace: Workplace, progress: Progress
) -> Sequence[tuple[int, str]]:
    """Make a bank of normal images and write it; returns the numbers of those that cannot be read, and why.

    Raises ConfigError where fewer than two images are left, ImageError where `normal.strict` and one cannot be read,
    OSError where the bank cannot be written, MemoryError.
    """
    path, images, odd = file_of(saving, normal.category), normal.images, _Odd(normal.images)
    report = partial(progress, "networks for the bank")
    limit, workplace = _host_limit(workplace), _of_bank(config, workplace)
    takes = check_room(saving, normal.category, _parts(images, workplace.cutter), config, workplace)
    beside = takes.of_host(workplace.place.arrays.device)
    with network_tokens(images, normal.bit_depth, workplace, report, odd.seen, normal.strict, beside) as found:
        left_out = {**odd.left_out(), **dict(found.failures)}
        for index, reason in left_out.items():
            log.warning("%s is left out of the bank: %s", printable(str(images[index].path)), reason)
        kept = found.without(left_out)
        count = len(kept.images)
        if count < 2:
            raise ConfigError(
                f"no bank of {printable(normal.category.name)}: it takes at least two readable known-good images, "
                f"better 100, to tell how normal ones differ, and there {'is one' if count else 'is none'}"
            )
        of_search = limit - takes.held - takes.compared - found.memory
        if workplace.place.arrays.device != "cpu":
            of_search = workplace.place.arrays.limit()
        with stopwatch(workplace.timings, "bank"):
            facts = normal.facts(workplace)
            sizes = np.array(list(kept.images.values()), np.int32) if config.tiling else None
            bank = build_bank(kept.tokens, config, workplace.place, saving.making, facts, progress, of_search, sizes)
            write_bank(path, replace(bank, digests=normal.digests[list(kept.images)]))
    few = ""
    if count < (enough := images_needed(FALSE_ALARMS)):
        least = percent(1 / (count + 1))
        few = f". It can promise no fewer than {least} false alarms; {percent(FALSE_ALARMS)} takes {enough} images"
    said = "%s: the bank of %s is written; zsad-infer NEW/ --bank %s%s"
    log.log(logging.WARNING if count < LEAST_REVIEWED else logging.INFO, said, path, counted(count, "image"), path, few)
    return found.failures


class _Odd:
    """Finds images that do not belong into a bank, as they are read."""

    def __init__(self, images: Sequence[InputImage]) -> None:
        self._images, self._duplicates, self._damaged = images, Duplicates(), dict[int, str]()

    def seen(self, index: int, image: Image.Image | None) -> None:
        if image is not None and DAMAGE in image.info:
            self._damaged[index] = image.info[DAMAGE]
            return
        with suppress(OSError):  # a file that has just gone is no copy of anything
            self._duplicates.add(index, self._images[index].path, image)

    def left_out(self) -> dict[int, str]:
        """Return images by their number, and why: an image beside its copy would seem to have nothing unusual."""
        found = dict(self._damaged)
        for copies in self._duplicates.groups():
            first, *others = copies.indices
            kind = "the same picture" if copies.exact else "nearly the same picture"
            found |= dict.fromkeys(others, f"it is {kind} as {printable(str(self._images[first].path))}")
        return dict(sorted(found.items()))


def _digest(path: Location) -> bytes:
    """Return the sha256 of a file; of one that has gone since it was read zeros: the bank is more than that."""
    try:
        return bytes.fromhex(digest(path))
    except OSError:
        return bytes(32)


@dataclass(frozen=True)
class Tokens:
    """What the networks give for images."""

    indices: Sequence[int]  # of the readable ones, n of them; of images in tiles for each of these
    images: Mapping[int, tuple[int, int]]  # the numbers of the readable ones, with their sizes where they are cut
    tokens: Mapping[str, NDArray[np.float32]]  # [n, L, P, C] by networks, valid within the context
    failures: Sequence[tuple[int, str]]  # the other ones, and why
    memory: int  # bytes of it that they take, none where they are in a file

    def without(self, left_out: Collection[int]) -> "Tokens":
        """Leave out images by their number; moves the others' tokens together, in the same memory."""
        rows = [row for row, index in enumerate(self.indices) if index not in left_out]
        for array in self.tokens.values():
            for to, row in enumerate(rows):
                if to != row:
                    array[to] = array[row]
        tokens = {name: array[: len(rows)] for name, array in self.tokens.items()}
        images = {index: size for index, size in self.images.items() if index not in left_out}
        return replace(self, indices=[self.indices[row] for row in rows], images=images, tokens=tokens)


@contextmanager
def network_tokens(
    images: Sequence[InputImage],
    bit_depth: int | None,
    workplace: Workplace,
    report: Callable[[int, int], None],
    seen: Callable[[int, Image.Image | None], None] = lambda *_: None,
    strict: bool = False,
    beside: int = 0,
) -> Iterator[Tokens]:
    """Run the networks over images; what they give is in memory, or if that is much, in a temporary file.

    seen: see `Loader.batches`. beside: bytes that are to be left beside it afterwards. Raises ImageError for the first
    image that cannot be read if strict.
    """
    place, cutter, wanted = workplace.place, workplace.cutter, recipes(workplace.place)
    graphs = {name: network.graphs["image"] for name, network in place.networks.items()}
    indices, failures, read = list[int](), list[tuple[int, str]](), dict[int, tuple[int, int]]()
    count = _parts(images, cutter)
    with ExitStack() as rooms:
        size = sum(4 * count * int(np.prod(graph.outputs["tokens"].shape)) for graph in graphs.values())
        limit = _host_limit(workplace)
        resident = size <= limit - max(limit // 2, beside)  # images that are decoded take up to half of it
        tokens: dict[str, Any] = {
            name: rooms.enter_context(scratch((count, *graph.outputs["tokens"].shape), resident))
            for name, graph in graphs.items()
        }
        for batch in workplace.loader.batches(images, range(len(images)), bit_depth, seen):
            failures += batch.failures
            if strict and failures:
                raise ImageError(f"{images[failures[0][0]].path}: {failures[0][1]}")
            for owners, inputs in _inputs(batch, cutter):
                if len(indices) + len(owners) > count:
                    raise ImageError(f"{images[owners[0]].path}: is larger than it was when its header was read")
                with stopwatch(workplace.timings, "networks"):
                    for name, graph in graphs.items():
                        for part, outputs in run_in_parts(graph, {"images": inputs[wanted[name]]}):
                            rows = slice(len(indices) + part.start, len(indices) + part.stop)
                            tokens[name][rows] = place.arrays.fetch(outputs["tokens"])
                indices += owners
            sizes = [image.shape[:2] for image in batch.images] or [(0, 0)] * len(batch.indices)
            read |= zip(batch.indices, sizes, strict=True)
            report(len(read), len(images))
        whole = {name: array[: len(indices)] for name, array in tokens.items()}
        yield Tokens(indices, read, whole, failures, size if resident else 0)


def _inputs(batch: Batch, cutter: Cutter | None) -> Iterator[tuple[list[int], Mapping[Recipe, Any]]]:
    """Yield what networks take of a batch, and of which image each part of that is."""
    if cutter is not None:
        for index, image in zip(batch.indices, batch.images, strict=True):
            for tiles in cutter.batches(image):
                yield [index] * len(tiles.indices), tiles.inputs
    elif batch.indices:
        yield batch.indices, batch.inputs


def save_category_bank(
    saving: Saving, job: CategoryJob, record: CategoryRecord, workplace: Workplace, progress: CategoryProgress
) -> CategoryRecord:
    """Save the bank of a category that was scored: of its known-good images, else of the half that scores lowest.

    Returns its record, with what went wrong among the failures: the results are there.
    """
    category, config, path = job.category, job.config.sized(job.sides), file_of(saving, job.category)
    if not record.images:
        return record
    try:
        if config.few_shot:
            unscored = replace(category, images=())  # for a bank it does not matter that some are scored, too
            images = find_references(unscored, job.products, config.reference, config.shots, config.seed).images
        else:
            images = _lower_half(category, record)
        normal = Normal(category, images, used_bits(category.images, config), chosen=not config.few_shot)
        place = _of_bank(config, workplace).place
        wanted = describe(config, place, saving.making, normal.facts(workplace))
        if record.resumed and _is_made(path, wanted):
            log.info("%s: the bank is there already", path)
            return record
        save_bank(saving, normal, config, workplace, partial(progress, printable(category.name)))
    except Exception as error:  # as in `run_category`
        full = getattr(error, "errno", None) in NO_ROOM  # where banks are: where the results are there may be room
        said = str(error) if full else cost_of_one(error, workplace, job.options)
        log.error("no bank %s: %s", path, said)
        log.debug("%s", path, exc_info=True)
        return replace(record, failures=[*record.failures, Failure(str(path), f"no bank: {said}")])
    return record


def _is_made(path: Path, wanted: Header) -> bool:
    """Whether a file is a whole bank, made as one would be now of the same files."""
    try:
        return read_bank(path).header.making == wanted.making
    except BankError:
        return False


def _lower_half(category: Category, record: CategoryRecord) -> tuple[InputImage, ...]:
    """Return the half of a category's images with the lowest raw scores; damaged ones are none of them."""
    scores = {image.path: image.raw_score for image in record.images if image.note is None}
    images = [image for image in category.images if str(image.relative) in scores]
    order = np.argsort([scores[str(image.relative)] for image in images], kind="stable")
    return tuple(images[number] for number in sorted(order[: max(2, round(len(images) / 2))].tolist()))


def known_good(reference: str, shots: int | None, seed: int) -> Category:
    """Return known-good images, a folder or a list, as a category of their own; raises ConfigError."""
    root = Path(reference)
    empty = Category(root.resolve().stem, root if root.is_dir() else root.parent, (), {}, ())
    try:
        found = find_references(empty, (), reference, shots, seed)
    except ImageError as error:
        raise ConfigError(f"--reference: {error}") from None
    return replace(
        empty, images=found.images, notes=(*found.notes, *_mixture(root, found.images)), unreadable=found.unreadable
    )


def _mixture(root: Path, images: Sequence[InputImage]) -> list[str]:
    """Note where images lie in several folders of one, which may be of as many products."""
    paths = [image.folder.path / image.name for image in images]
    folders = sorted({path.relative_to(root).parts[0] for path in paths if root in path.parents})
    if len(folders) < 2 or any((root / name).is_file() for name in folders):
        return []
    named = printable(", ".join(folders[:3])) + (" …" if len(folders) > 3 else "")
    return [
        f"the folders {named} of {printable(str(root))} are taken as one product; else save a bank of each: "
        f"zsad-infer --reference {printable(str(root / folders[0]))} --save-bank BANKS/{printable(folders[0])}{SUFFIX}"
    ]


def used_bits(images: Sequence[InputImage], config: Config) -> int:
    """Return how many bits of 16-bit files are in use."""
    return config.bit_depth or batch_bit_depth(image.path for image in images).bits
