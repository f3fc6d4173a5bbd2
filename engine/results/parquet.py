"""Parquet: a row for each image, in a part or several for each category, as pandas, DuckDB and Spark read them.

    images/partition=<category>/part-00000.parquet

Rows of `parquet-8bit` and `parquet-16bit` also hold the image's map, rounded to so many bits: its values, row by row,
as many as height times width; 255 or 65535 stands for 1. The category is a column too, since readers take what a folder
is called for a number where they can.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from zsad.engine.config import ConfigError
from zsad.engine.images.folders import Dataset
from zsad.export.libraries import install_command

from .formats import Export
from .records import CategoryRecord, ImageRecord, ImageRecords
from .source import Faults, Finished, Report, Source, in_threads

DATA = "images"  # the folder that readers are given
BITS: dict[str, int] = {"parquet": 0, "parquet-8bit": 8, "parquet-16bit": 16}  # of maps; none without

ROWS, BATCH_BYTES = 1000, 64 << 20  # that are held at once
PART_ROWS, PART_BYTES = 250_000, 1 << 30  # of a part, of maps before they are compressed


def library() -> Any:
    """Return pyarrow; raises ConfigError where it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        command = install_command("'zsad[parquet]'")
        raise ConfigError(f"Parquet files need pyarrow ({error}); run: {command}") from None
    return pyarrow


def write(folder: Path, source: Source, name: Export) -> Faults:
    """Write all categories, those images that failed without a score; raises OSError, ImageError, ConfigError."""
    pa, bits, done = library(), BITS[name], 0
    total = sum(len(category.record.images) for category in source.categories)
    schema = _schema(pa, bits)
    for category in source.categories:
        place = folder / DATA / f"partition={quote(category.record.name, safe=' ')}"
        place.mkdir(parents=True)
        for number, part in enumerate(_parts(_batches(_rows(category, bits)))):
            with pa.parquet.ParquetWriter(place / f"part-{number:05d}.parquet", schema, compression="zstd") as file:
                for rows in part:
                    file.write_table(pa.Table.from_pylist(rows, schema))
                    done += sum("score" in row for row in rows)
                    source.progress("export", done, total)
    return Faults()


def _schema(pa: Any, bits: int) -> Any:
    number, text, count = pa.float64(), pa.string(), pa.int64()
    region = pa.struct([*((name, count) for name in ("x", "y", "width", "height", "area")), ("peak", number)])
    columns = [("path", text), ("category", text), ("group", count), ("score", number), ("raw_score", number)]
    columns += [("rank", count), ("verdict", text), ("p_value", number), ("width", count), ("height", count)]
    columns += [("regions", pa.list_(region)), ("seconds", number), ("note", text), ("failure", text)]
    columns += [("map", pa.list_(pa.uint8() if bits == 8 else pa.uint16()))] * bool(bits)
    told = {name: {"description": SECONDS} if name == "seconds" else None for name, _ in columns}
    return pa.schema([pa.field(name, kind, metadata=told[name]) for name, kind in columns])


def _rows(category: Finished, bits: int) -> Iterator[dict[str, Any]]:
    record = category.record
    failures = {failure.path: failure.reason for failure in record.failures if failure.path not in record.references}

    def jobs() -> Iterator[tuple[ImageRecord, Callable[[], dict[str, Any]]]]:
        for image, group, took in zip(record.images, category.groups(), _seconds(record), strict=False):
            row = {
                **{key: value for key, value in asdict(image).items() if key in SAME},
                "path": _sound(image.path),
                "category": _sound(record.name),
                "group": group,
                "seconds": took,
                "failure": failures.pop(image.path, None),  # scored, but without a map
            }
            yield image, partial(_with_map, row, category, image, bits)

    yield from in_threads(jobs()) if bits else (job() for _, job in jobs())
    for path, reason in failures.items():
        yield {"path": _sound(path), "category": _sound(record.name), "failure": reason}


def _seconds(record: CategoryRecord) -> Iterator[float | None]:
    """Yield what each image has taken; None where an earlier run has scored it."""
    own = record.images.seconds if isinstance(record.images, ImageRecords) else None
    if own is not None and np.isfinite(own).any():
        yield from (None if math.isnan(seconds) else seconds for seconds in own.tolist())
    else:
        yield from repeat(None if record.resumed or not record.images else record.seconds / len(record.images))


def _with_map(row: dict[str, Any], category: Finished, image: ImageRecord, bits: int) -> dict[str, Any]:
    """Return a row with its image's map, where that is asked for and there is one."""
    if bits and image.map:
        values = np.rint(category.map(image).clip(0, 1) * np.float32(2**bits - 1))
        row["map"] = values.astype(np.uint8 if bits == 8 else np.uint16).ravel()
    return row


SECONDS = (
    "of methods that judge every image by itself, what reading, networks and writing took for this one, beside others "
    "on other cores; of methods that compare images the mean of the category's. None: an earlier run has scored it"
)

SAME = frozenset(("score", "raw_score", "rank", "verdict", "p_value", "width", "height", "regions", "note"))


def _sound(name: str) -> str:
    """Return a name with what is no Unicode replaced, which Parquet cannot hold."""
    return name.encode("utf-8", "replace").decode()


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in lists that are written at once."""
    batch: list[dict[str, Any]] = []
    held = 0
    for row in rows:
        batch.append(row)
        held += row["map"].nbytes if "map" in row else 0
        if len(batch) >= ROWS or held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _parts(batches: Iterator[list[dict[str, Any]]]) -> Iterator[Iterator[list[dict[str, Any]]]]:
    """Yield the batches of each part; one has to be taken whole before the next is asked for."""

    def part(batch: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        rows = held = 0
        following: list[dict[str, Any]] | None = batch
        while following is not None:
            yield following
            rows += len(following)
            held += sum(row["map"].nbytes for row in following if "map" in row)
            following = None if rows >= PART_ROWS or held >= PART_BYTES else next(batches, None)

    while (first := next(batches, None)) is not None:
        yield part(first)


def _fault(row: dict[str, Any], bits: int) -> str | None:
    """Return what is wrong with a row."""
    if row["failure"] is not None:
        return None
    if row["score"] is None or not 0 <= row["score"] <= 1:
        return "a score that is not in [0, 1]"
    if bits and len(row["map"] or ()) != row["height"] * row["width"]:
        return "a map of another size than its image"
    return None


def check(place: Path, name: str, dataset: Dataset | None, faults: Faults, report: Report) -> int:
    """Look at all rows; returns how many parts there are. Raises ConfigError where pyarrow is missing."""
    pa, parts, found = library(), 0, set[tuple[str, str]]()
    for path in sorted(place.glob("**/*.parquet")):
        try:
            for batch in pa.parquet.ParquetFile(path).iter_batches(100):
                for row in batch.to_pylist():
                    found.add((row["category"], row["path"]))
                    if (fault := _fault(row, BITS[name])) is not None:
                        faults.add(fault, row["path"])
        except (OSError, pa.ArrowException, KeyError, TypeError) as error:
            faults.add(f"cannot be read ({error})", path.relative_to(place))
        parts += 1
        report(parts)
    for category in dataset.categories if dataset is not None else ():
        for image in category.images:
            if (_sound(category.name), _sound(str(image.relative))) not in found:
                faults.add("no row", f"{category.name}/{image.relative}")
    return parts
