"""Whether results of an earlier run are still valid."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zsad.engine.images.categories import Category
from zsad.engine.images.remote import stamps
from zsad.engine.images.tree import RECORD, RUN, SCORES
from zsad.kernels.files import parse_json
from zsad.kernels.machine import zsad_version

from .category import THUMBNAILS
from .records import CategoryRecord, read_record

# Keys of a configuration and of methods' settings that decide on verdicts, and of what judges each image on no score.
OF_VERDICTS = ("threshold", "expected_defects", "false_alarms")


def fingerprint(
    category: Category,
    config: Mapping[str, Any],
    checkpoints: Mapping[str, str],
    written: Iterable[str],
    references: Sequence[str] = (),
) -> str:
    """Return a digest of everything that decides a category's results, to know whether they are still valid.

    config: with the precisions in force. checkpoints: name → sha256. written: formats and the like.
    references: sha256 of known-good images.
    """
    # Of one JSON list; its part on images is not held whole, since they may be a million.
    digest = hashlib.sha256(f"[{json.dumps(zsad_version())}, [".encode())
    found = stamps(image.path for image in category.images)
    for number, (image, (size, modified)) in enumerate(zip(category.images, found, strict=True)):
        file = json.dumps([str(image.relative), size, modified])
        digest.update((f", {file}" if number else file).encode())
    others = json.dumps([config, dict(checkpoints), sorted(written), list(references)], sort_keys=True)
    digest.update(f"], {others.removeprefix('[')}".encode())
    return digest.hexdigest()


def image_fingerprint(
    product: str,
    config: Mapping[str, Any],
    checkpoints: Mapping[str, str],
    written: Iterable[str],
    references: Sequence[str],
    bit_depth: int | None,
) -> str:
    """Return a digest of what decides an image's results beside its file, of methods that judge every image by itself.

    Verdicts are given anew from the scores. product: as its folder is called. bit_depth: of grey values in 16-bit
    files. For others see `fingerprint`.
    """
    own = {key: value for key, value in config.items() if key not in OF_VERDICTS}
    own["settings"] = {key: value for key, value in config["settings"].items() if key not in OF_VERDICTS}
    version = zsad_version()
    everything = [version, product, own, dict(checkpoints), sorted(written), list(references), bit_depth]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def finished_record(output: Path, category: Category, wanted: str) -> CategoryRecord | None:
    """Return the record of a category that an earlier run finished with the same fingerprint, else None."""
    return whole_record(output / category.name, category, wanted)


def whole_record(folder: Path, category: Category, wanted: str | None = None) -> CategoryRecord | None:
    """Return the record in a category's folder, if it has the fingerprint `wanted` (None: any), else None.

    A category whose files are no longer all there, as they were written, counts as unfinished.
    """
    try:
        record = read_record(folder / RECORD)
        if wanted is not None and record.fingerprint != wanted:
            return None
        whole = {THUMBNAILS, SCORES} <= record.sizes.keys() and all(
            (folder / file).stat().st_size == size for file, size in record.sizes.items()
        )
        paths = (str(image.relative) for image in category.images)  # in the same order, some may have failed
        whole = whole and all(image.path in paths and image.sizes == image.sizes_in(folder) for image in record.images)
    except (OSError, ValueError):
        return None
    return record if whole else None


def why_again(
    output: Path, name: str, wanted: str, config: Mapping[str, Any], checkpoints: Mapping[str, str]
) -> str | None:
    """Say why a category that an earlier run finished is not kept under this fingerprint; None where none has.

    config, checkpoints: as for the fingerprint. What is no longer the same of them is told by the record of the run.
    """
    try:
        record = read_record(output / name / RECORD)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return "its record is damaged or of another version"
    if record.fingerprint == wanted:
        return "some of its files are gone or damaged"
    other = "it was finished with other settings"
    try:
        earlier = parse_json((output / RUN).read_text())
        weights = {checkpoint["name"]: checkpoint["sha256"] for checkpoint in earlier["checkpoints"]}
        before = _settings(earlier["version"], earlier["config"], weights)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # no run ended there, or one of an old version
        return other
    differing = _differing(before, _settings(zsad_version(), config, checkpoints))
    if not differing:
        return "its images, its known-good images, --format or --keep-stages are others"
    return f"{other} ({', '.join(differing)})"


def _settings(version: str, config: Mapping[str, Any], checkpoints: Mapping[str, str]) -> dict[str, Any]:
    """Return all settings as JSON has them, the method's own in the table of its name."""
    own = {key: value for key, value in config.items() if key != "settings"}
    everything = {"version": version, "weights": sorted(checkpoints.items()), **own, own["method"]: config["settings"]}
    settings: dict[str, Any] = json.loads(json.dumps(everything))
    return settings


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], table: str = "") -> list[str]:
    """Return the keys whose values differ, with their tables in front of them."""
    found = []
    for key in sorted(one.keys() | other.keys()):
        before, now = one.get(key), other.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differing(before, now, f"{table}{key}.")
        elif before != now:
            found.append(table + key)
    return found
