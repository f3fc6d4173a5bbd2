"""From images that users give back to a bank that knows them: false alarms as normal, missed defects as such.

files → digests: what the bank has already → networks: tokens [T, L, P, C] of each, of its tiles where the bank is of
such → methods/bank_feedback.py → the bank's file, written whole
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config
from zsad.engine.evaluation.masks import MaskError, read_mask
from zsad.engine.images.categories import HERE, ImageFolder, InputImage
from zsad.engine.images.layouts import fold, mask_stem
from zsad.engine.images.limits import limited
from zsad.engine.images.stored import ImageError
from zsad.engine.images.tree import read_tree
from zsad.engine.methods.bank import BankMethod, memories, promised
from zsad.engine.methods.bank_feedback import Additions, Given, NothingToAddError, image_score, with_scores, without
from zsad.engine.methods.bank_file import Bank, BankError, Kind, Step, read_bank, read_header, write_bank
from zsad.engine.methods.method import Progress
from zsad.engine.networks.runtime import Runtime
from zsad.engine.results.records import Failure
from zsad.engine.workplace import Options, Workplace, Workplaces, image_memory
from zsad.kernels.files import check_writable, file_sha256, printable

from .bank_pass import network_tokens
from .category_pass import CategoryProgress

log = logging.getLogger("zsad")

VERB: Mapping[Kind, str] = {"accept": "accepted", "reject": "rejected"}


@dataclass(frozen=True)
class Threshold:
    """Above which score images are rejected, before and after."""

    before: float
    after: float
    rule: str


@dataclass(frozen=True)
class Feedback:
    """What a command has changed."""

    bank: str
    threshold: Threshold
    added: tuple[Step, ...] = ()
    removed: tuple[Step, ...] = ()
    failures: Sequence[Failure] = ()


@dataclass
class Work:
    """A bank that is being changed, and what could not be done."""

    path: Path
    digest: str  # of the bank's content as it was read
    before: Bank
    bank: Bank
    failures: dict[Path, str] = field(default_factory=dict)

    def fail(self, path: Path, reason: str) -> None:
        """Say why an image is left out, once."""
        if path not in self.failures:
            log.error("%s: %s", path, reason)
            self.failures[path] = reason

    def write(self, false_alarms: float) -> Feedback:
        """Write the bank if it has changed, and say how; raises BankError where another command was faster, OSError."""
        (_, before), (rule, after) = (promised(bank, false_alarms) for bank in (self.before, self.bank))
        scaled = self.bank.header.image_scale.values(np.array([before, after]))
        old, new = ({step.number: step for step in b.header.feedback} for b in (self.before, self.bank))
        if old.keys() != new.keys():
            if read_header(self.path)[1] != self.digest:
                raise BankError(f"{self.path}: another command has changed the bank meanwhile; give this one again")
            write_bank(self.path.resolve(), self.bank)  # where a link leads: who reads the file itself learns of it too
        return Feedback(
            str(self.path),
            Threshold(float(scaled[0]), float(scaled[1]), rule),
            tuple(new[number] for number in new.keys() - old.keys()),
            tuple(old[number] for number in old.keys() - new.keys()),
            [Failure(str(path), reason) for path, reason in self.failures.items()],
        )


def refuse_folder(path: Path) -> None:
    """Raise BankError for a folder of banks."""
    if path.is_dir():
        raise BankError(f"--bank {path}: is a folder; name the bank of one category: --bank {path / 'CATEGORY.zsad'}")


def begin(path: Path) -> Work:
    """Read a bank that is to be changed; raises BankError, also where it cannot be written."""
    refuse_folder(path)
    digest = read_header(path)[1]
    bank = read_bank(path)
    try:
        check_writable(path.resolve().parent)
    except OSError as error:
        raise BankError(
            f"--bank {path}: cannot be written there ({error.strerror}); copy it to another folder, or change that one"
        ) from None
    return Work(path, digest, bank, bank)


def take_back(path: Path, number: int | None, false_alarms: float) -> Feedback:
    """Take back a step of a bank, None: the last one; raises BankError, and OSError where it cannot be written."""
    work = begin(path)
    numbers = [step.number for step in work.bank.header.feedback]
    if not numbers:
        raise BankError(f"{path}: there is nothing to take back; the bank is as it was saved")
    if number is not None and number not in numbers:
        there = ", ".join(map(str, numbers))
        raise BankError(f"{path}: there is no step {number} to take back, but {there}; see --bank-log")
    work.bank = without(work.bank, numbers[-1] if number is None else number)
    return work.write(false_alarms)


def give_back(
    path: Path,
    files: Mapping[Kind, Sequence[Path]],
    masks: Sequence[Path],
    config: Config,
    runtime: Runtime,
    options: Options,
    progress: CategoryProgress,
) -> Feedback:
    """Accept false alarms and reject missed defects; what cannot be done with single images is said and recorded.

    files, masks: files, or folders of such. Raises BankError and what `run` raises before any work, OSError where the
    bank cannot be written.
    """
    work = begin(path)
    chosen = _chosen(work, files)
    if any(chosen.values()):
        with limited(replace(options.limits, bytes=image_memory(runtime, options))):
            workplace = Workplaces(config, runtime, options).of({})
            for kind, images in chosen.items():
                found = {} if kind == "accept" or not masks else _masks(work, images, masks)
                images = {image: digest for image, digest in images.items() if image not in work.failures}
                if images:
                    _add(work, kind, images, found, workplace, partial(progress, printable(path.name)))
    assert isinstance(config.settings, BankMethod.Settings)
    return work.write(config.settings.false_alarms)


def _chosen(work: Work, files: Mapping[Kind, Sequence[Path]]) -> dict[Kind, dict[Path, str]]:
    """Return which files are to be accepted and rejected, with their digests; says of the others why they are not."""
    known = {bytes(digest).hex(): "the bank was made from it" for digest in work.bank.digests}
    for step in work.bank.header.feedback:
        said = f"{VERB[step.kind]} already, in step {step.number}, which --undo {step.number} takes back"
        known |= {image.sha256: said for image in step.images}
    listed = {kind: list(dict.fromkeys(_listed(given))) for kind, given in files.items()}
    digests: dict[Path, str] = {}
    for path in dict.fromkeys(path for paths in listed.values() for path in paths):
        try:
            if not path.is_file():
                raise OSError(0, "there is no such file" if not path.exists() else "not a regular file")
            digests[path] = file_sha256(path)
        except OSError as error:
            work.fail(path, f"cannot be read ({error.strerror})")
    wanted = {kind: {digests[path] for path in paths if path in digests} for kind, paths in listed.items()}
    both = set.intersection(*wanted.values()) if len(wanted) > 1 else set()
    chosen: dict[Kind, dict[Path, str]] = {kind: {} for kind in listed}
    for kind, paths in listed.items():
        first: dict[str, Path] = {}
        for path in (path for path in paths if path in digests):
            digest = digests[path]
            if digest in both:
                work.fail(path, "is to be accepted and to be rejected, so it is neither; decide on one")
            elif digest in known:
                work.fail(path, known[digest])
            elif digest in first:
                work.fail(path, f"the same image as {first[digest]}, which counts once")
            else:
                first[digest] = path
                chosen[kind][path] = digest
    return chosen


def _listed(given: Sequence[Path]) -> Iterator[Path]:
    """Yield files, and the images in folders."""
    for path in given:
        if path.is_dir():
            yield from (path / name for name in read_tree(path, None).images())
        else:
            yield path


def _masks(work: Work, images: Mapping[Path, str], given: Sequence[Path]) -> dict[Path, NDArray[np.float32]]:
    """Return the masks [h, w] of images by their names; says which images are left out, and which have none."""
    stems: dict[str, list[Path]] = {}
    for path in _masks_listed(given):
        for stem in {fold(path.stem), mask_stem(path.stem)} - {None}:
            stems.setdefault(str(stem), []).append(path)
    found = {}
    for image in images:
        candidates = stems.get(fold(image.stem), [])
        near = [path for path in candidates if fold(path.parent.name) == fold(image.parent.name)]
        candidates = near or candidates
        if len(candidates) > 1:
            work.fail(image, f"{candidates[0]} and {candidates[1]} may be its mask; name one of them in --masks")
        elif not candidates:
            log.warning("%s: has no mask in --masks; its most unusual patches are taken", image)
        else:
            try:
                mask = read_mask(candidates[0])
                if not mask.any():
                    raise MaskError("is empty")
                found[image] = mask.astype(np.float32)
            except (ImageError, MaskError) as error:
                work.fail(image, f"its mask {candidates[0]} {error}")
    return found


def _masks_listed(given: Sequence[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            for _, folder in read_tree(path, None).walk():
                yield from (folder.path / name for name in folder.images())
        else:
            yield path


def _add(
    work: Work,
    kind: Kind,
    files: Mapping[Path, str],
    masks: Mapping[Path, NDArray[np.float32]],
    workplace: Workplace,
    progress: Progress,
) -> None:
    """Add a step to the bank: of these files with their digests those that are readable and tell something."""
    bank, place = work.bank, workplace.place
    paths = list(files)
    folders = [ImageFolder(path.parent, PurePosixPath(path.parent.as_posix()), HERE) for path in paths]
    images = [InputImage(folder, path.name) for folder, path in zip(folders, paths, strict=True)]
    known, before = memories(bank, place), []
    additions, given = Additions(bank, kind, known), list[Given]()
    report = partial(progress, "networks for the bank")
    with network_tokens(images, bank.header.bit_depth, workplace, report) as found:
        for index, reason in found.failures:
            work.fail(paths[index], reason)
        rows = np.array(found.indices)
        for index, size in found.images.items():
            path = paths[index]
            first, last = np.searchsorted(rows, index), np.searchsorted(rows, index, side="right")
            tokens = {name: array[first:last] for name, array in found.tokens.items()}
            image = Given(printable(path.name), files[path], tokens, masks.get(path), size)
            try:
                additions.add(image)
            except NothingToAddError as error:
                work.fail(path, str(error))
                continue
            given.append(image)
            before.append(image_score(bank.header, known, image))
        if not given:
            return
        changed = additions.bank(given, before, datetime.now(timezone.utc).replace(microsecond=0))
        known = memories(changed, place)
        work.bank = with_scores(changed, [image_score(changed.header, known, image) for image in given])
