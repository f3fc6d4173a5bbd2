"""What is decided for all categories of a run before any is scored: the size of their images, and whether memory lasts.

headers of the images → a side for each category and network → categories by size, whose networks are made once
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from itertools import count

from zsad.engine.config import LARGEST_AUTO, Config, ConfigError
from zsad.engine.images.categories import Category, counted
from zsad.engine.images.references import NoReferencesError, candidates, count_references
from zsad.engine.images.survey import survey
from zsad.engine.methods.method import method_class
from zsad.engine.methods.tile_grid import TilePlan
from zsad.engine.networks.build import patch_sizes
from zsad.kernels.files import printable
from zsad.kernels.machine import stopwatch

from .category_pass import CategoryJob, CategoryProgress, deal_groups
from .workplace import Options, Workplace

log = logging.getLogger("zsad")


def plan(
    categories: Sequence[Category],
    config: Config,
    options: Options,
    progress: CategoryProgress,
    timings: MutableMapping[str, float],
) -> list[CategoryJob]:
    """Return what there is to do, with the size of each category's images; raises CheckpointError, ConfigError.

    Where that size follows from the images, the headers of all of them are read.
    """
    products = frozenset(category.product for category in categories)
    jobs = [
        CategoryJob(category, config, options, products, config.settings.sides((category.name, category.product)))
        for category in categories
    ]
    tiled = bool(config.tiling) and method_class(config.method).compares
    if not config.unsized and not tiled:
        return jobs
    patches = patch_sizes(config) if config.unsized else {}
    with stopwatch(timings, "headers"):
        jobs = [_sized(job, patches, progress) for job in jobs]
    if not config.unsized:
        return jobs
    # Where no image is readable no size is of use, and one that is there anyway costs nothing.
    usual = next(
        (job.sides for job in jobs if job.sides),
        {name: LARGEST_AUTO // patches[name] * patches[name] for name in patches},
    )
    return [job if job.sides else replace(job, sides=usual) for job in jobs]


def check_references(categories: Sequence[Category], config: Config) -> None:
    """Raise ConfigError where known-good images are asked for and no category has any; without, one fails by itself."""
    products, reasons = frozenset(category.product for category in categories), list[str]()
    for category in categories if config.few_shot else ():
        try:
            candidates(category, products, config.reference)
            return
        except NoReferencesError as error:
            reasons.append(str(error))
    if reasons:
        raise ConfigError(reasons[0])


def _sized(job: CategoryJob, patches: Mapping[str, int], progress: CategoryProgress) -> CategoryJob:
    """Return a category with the sides of the networks' inputs, none where no image is readable."""
    category, numbers = job.category, count(1)
    name, total = printable(category.name), len(category.images)
    found = survey((image.path for image in category.images), lambda: progress(name, "headers", next(numbers), total))
    tiles = None
    if job.config.tiling:
        tiles = TilePlan(found.sizes, job.config.tiling)
        _check_aligned(name, tiles)
        found = replace(found, shorter=tiles.sides())  # which are what networks see
    sides = {network: side for network, patch in patches.items() if (side := found.side(patch, LARGEST_AUTO))}
    notes = (*category.notes, *([_mixed(found.mixed, sides)] if found.mixed and sides else []))
    median = found.median if patches else None
    return replace(
        job, category=replace(category, notes=notes), sides=sides, deep=found.deep, median=median, tiles=tiles
    )


def _check_aligned(name: str, tiles: TilePlan) -> None:
    """Raise ConfigError where tiles of one place are to be compared, and images do not have the same places."""
    if tiles.tiling.tile is not None and tiles.aligned and len(tiles.sizes) > 1:
        one, other = (f"{columns} × {rows}" for rows, columns in (min(tiles.sizes), max(tiles.sizes)))
        raise ConfigError(
            f"{name}: images are from {one} to {other} pixels, so that tiles of {tiles.tiling.tile} pixels are not in "
            "the same places; leave out --tile-batches aligned, or give --tiles COLUMNSxROWS instead of --tile"
        )


def _check_room(name: str, images: int, stored: int) -> None:
    """Raise ConfigError where the temporary file of the tiles of so many images finds no room."""
    folder = tempfile.gettempdir()
    if stored > (free := shutil.disk_usage(folder).free):
        raise ConfigError(
            f"{name}: the tiles of {images} images take {stored / 2**30:.1f} GB for a while, and {folder} has "
            f"{free / 2**30:.1f} GB left; name another folder in the environment variable TMPDIR, or give --group-size"
        )


def _mixed(span: tuple[int, int], sides: Mapping[str, int]) -> str:
    return (
        f"images of mixed sizes: most have shorter sides of {span[0]} to {span[1]} pixels, and all are taken at "
        f"{said_sides(sides)}, which makes equal things unequally large; score those of one size apart from the others"
    )


def said_sides(sides: Mapping[str, int]) -> str:
    """Say at which size networks take images."""
    if len(set(sides.values())) == 1:
        return f"{next(iter(sides.values()))} px"
    return ", ".join(f"{side} px ({name})" for name, side in sides.items())


def by_size(jobs: Sequence[CategoryJob]) -> list[list[CategoryJob]]:
    """Return categories in groups of one size, in the order in which sizes first come up."""
    groups: dict[tuple[tuple[str, int], ...], list[CategoryJob]] = {}
    for job in jobs:
        groups.setdefault(tuple(job.sides.items()), []).append(job)
    return list(groups.values())


def check_memory(jobs: Sequence[CategoryJob], workplace: Workplace) -> None:
    """Make sure, before any work, that every group can be scored within the limit; raises ConfigError."""
    limit = workplace.arrays.limit()
    for job in jobs:
        category, config = job.category, job.config
        references = count_references(category, job.products, config.reference, config.shots) if config.few_shot else 0
        largest = max(map(len, deal_groups(len(category.images), config.group_size, config.seed)))
        what = "images"
        if job.tiles is not None:
            cells = workplace.method.cells
            _check_room(printable(category.name), largest, job.tiles.stored(largest, cells))
            largest, references = (job.tiles.together(count, cells) for count in (largest, references))
            what = "images" if job.tiles.aligned else "tiles"
        needed = workplace.method.needed(largest, references)
        if needed > limit:
            known = f"comparing with {counted(references, 'known-good image')}"
            work, option = f"scoring {largest} {what} together", "--group-size"
            if not workplace.method.compares:
                work, option = known, "--shots"
            elif references:
                work, option = f"{work} and {known}", "--group-size or --shots"
            raise ConfigError(
                f"{printable(category.name)}: {work} needs at least {needed / 2**20:.0f} MiB and the memory limit is "
                f"{limit / 2**20:.0f} MiB; raise --memory-limit, or make the work smaller with --image-size or {option}"
            )
