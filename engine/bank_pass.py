"""From known-good images to a bank: networks over all of them, then one file.

images → loader: batches of network inputs → networks: tokens [n, L, P, C] → methods/bank_build.py → CATEGORY.zsad
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, ConfigError
from zsad.engine.images.categories import Category, InputImage, counted
from zsad.engine.images.depth import batch_bit_depth
from zsad.engine.images.references import find_references
from zsad.engine.images.stored import ImageError
from zsad.engine.methods.bank import recipes
from zsad.engine.methods.bank_build import build_bank, check_making
from zsad.engine.methods.bank_file import SUFFIX, Bank, write_bank
from zsad.engine.methods.method import Progress
from zsad.engine.networks.network import run_in_parts
from zsad.engine.results.records import CategoryRecord, Failure
from zsad.engine.workplace import Saving, Workplace
from zsad.kernels.files import check_target, file_sha256, printable
from zsad.kernels.machine import scratch, stopwatch

from .category_pass import CategoryJob, CategoryProgress

log = logging.getLogger("zsad")


@dataclass(frozen=True)
class Normal:
    """Images of a category that are taken for normal."""

    category: Category
    images: Sequence[InputImage]
    bit_depth: int  # of grey values in 16-bit files
    chosen: bool  # by the run itself


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
            check_target(file_of(saving, category))
        except OSError as error:
            raise ConfigError(f"--save-bank {error}") from None


def save_bank(saving: Saving, normal: Normal, config: Config, workplace: Workplace, progress: Progress) -> Bank:
    """Make a bank of normal images and write it.

    Raises ImageError where fewer than two images are readable, OSError where it cannot be written, MemoryError.
    """
    path, images = file_of(saving, normal.category), normal.images
    with network_tokens(images, normal.bit_depth, workplace, partial(progress, "networks for the bank")) as found:
        for index, reason in found.failures:
            log.warning("%s is left out of the bank: %s", printable(str(images[index].path)), reason)
        count = len(found.indices)
        if count < 2:
            raise ImageError(
                f"no bank of {printable(normal.category.name)}: it takes at least two readable known-good images, "
                f"better 100, to tell how normal ones differ, and there {'is one' if count else 'is none'}"
            )
        facts = {
            "bit_depth": normal.bit_depth,
            "chosen": normal.chosen,
            "precision": workplace.record["network_precision"],
        }
        with stopwatch(workplace.timings, "bank"):
            bank = build_bank(found.tokens, config, workplace.place, saving.making, facts, progress)
            digests = b"".join(_digest(images[index].path) for index in found.indices)
            bank = replace(bank, digests=np.frombuffer(digests, np.uint8).reshape(count, 32))
            write_bank(path, bank)
    log.info("%s: the bank of %s is written; zsad-infer NEW/ --bank %s", path, counted(count, "image"), path)
    return bank


def _digest(path: Path) -> bytes:
    """Return the sha256 of a file; of one that has gone since it was read zeros: the bank is more than that."""
    try:
        return bytes.fromhex(file_sha256(path))
    except OSError:
        return bytes(32)


@dataclass(frozen=True)
class Tokens:
    """What the networks give for images."""

    indices: Sequence[int]  # of the readable ones, n of them
    tokens: Mapping[str, NDArray[np.float32]]  # [n, L, P, C] by networks, valid within the context
    failures: Sequence[tuple[int, str]]  # the other ones, and why


@contextmanager
def network_tokens(
    images: Sequence[InputImage], bit_depth: int | None, workplace: Workplace, report: Callable[[int, int], None]
) -> Iterator[Tokens]:
    """Run the networks over images; what they give is in memory, or if that is much, in a temporary file."""
    place, wanted = workplace.place, recipes(workplace.place)
    graphs = {name: network.graphs["image"] for name, network in place.networks.items()}
    indices, failures = list[int](), list[tuple[int, str]]()
    with ExitStack() as rooms:
        size = sum(4 * len(images) * int(np.prod(graph.outputs["tokens"].shape)) for graph in graphs.values())
        resident = size <= workplace.arrays.limit() // 2
        tokens: dict[str, Any] = {
            name: rooms.enter_context(scratch((len(images), *graph.outputs["tokens"].shape), resident))
            for name, graph in graphs.items()
        }
        for batch in workplace.loader.batches(images, range(len(images)), bit_depth, lambda *_: None):
            failures += batch.failures
            with stopwatch(workplace.timings, "networks"):
                for name, graph in graphs.items() if batch.indices else ():
                    for part, outputs in run_in_parts(graph, {"images": batch.inputs[wanted[name]]}):
                        rows = slice(len(indices) + part.start, len(indices) + part.stop)
                        tokens[name][rows] = place.arrays.fetch(outputs["tokens"])
            indices += batch.indices
            report(len(indices), len(images))
        yield Tokens(indices, {name: array[: len(indices)] for name, array in tokens.items()}, failures)


def save_category_bank(
    saving: Saving, job: CategoryJob, record: CategoryRecord, workplace: Workplace, progress: CategoryProgress
) -> CategoryRecord:
    """Save the bank of a category that was scored: of its known-good images, else of the half that scores lowest.

    Returns its record, with what went wrong among the failures: the results are there.
    """
    category, config, path = job.category, job.config, file_of(saving, job.category)
    if not record.images or (record.resumed and path.exists()):
        return record
    try:
        if config.few_shot:
            unscored = replace(category, images=())  # for a bank it does not matter that some are scored, too
            images = find_references(unscored, job.products, config.reference, config.shots, config.seed).images
        else:
            images = _lower_half(category, record)
        normal = Normal(category, images, used_bits(category.images, config), chosen=not config.few_shot)
        save_bank(saving, normal, job.config.sized(job.sides), workplace, partial(progress, printable(category.name)))
    except (ImageError, ConfigError, MemoryError, OSError) as error:
        log.error("no bank %s: %s", path, error)
        return replace(record, failures=[*record.failures, Failure(str(path), f"no bank: {error}")])
    return record


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
    return replace(empty, images=found.images, notes=found.notes)


def used_bits(images: Sequence[InputImage], config: Config) -> int:
    """Return how many bits of 16-bit files are in use."""
    return config.bit_depth or batch_bit_depth(image.path for image in images).bits
