"""The output folder: one run at a time writes there; what killed runs have left is taken up or removed."""

import errno
import fcntl
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import TextIO

import psutil

from zsad.engine.images.categories import Category
from zsad.engine.images.tree import DEMO, RECORD, REPORT, REPORT_FILES, RUN, is_export, is_results
from zsad.kernels.files import check_target, check_writable, flush

from .formats import Export
from .records import read_record

LOCK = ".zsad.lock"  # there while a run writes; says who
JOURNAL = "journal.jsonl"  # the fingerprint, then a line for each image that is written; gone once all is written
ENDED = "groups.jsonl"  # the fingerprint, then a line for each group of images that has ended
UNFINISHED = "images.jsonl"  # stands for the journal where no later run may go on

TAKEN = (errno.EAGAIN, errno.EACCES)  # what a lock answers that another process has

# Hidden folders of a category have a digest of its name, which may be as long as allowed, and who writes them; what was
# left for a later run to go on from is nobody's.
_HIDDEN = re.compile(r"\.(?P<of>[0-9a-f]{16})(\.(?P<host>.*)\.(?P<pid>\d+))?\.(?P<kind>partial|old|groups)")
_DRAFT = re.compile(rf"\.(?P<host>.*)\.(?P<pid>\d+)\.({re.escape(REPORT)}|{re.escape(RUN)})")


class OutputError(Exception):
    """Results that cannot be written; the message says why and what to do."""


@contextmanager
def claimed(
    output: Path, categories: Sequence[Category], resume: bool, exports: Sequence[Export] = ()
) -> Iterator[None]:
    """Hold an output folder, made if need be, and make sure that results can be written; raises OutputError.

    exports: folders in it for what others read. What killed runs have left there goes, but for what `resume` can go on
    from.
    """
    folders = [output / category.name for category in categories]
    for folder in folders:
        if folder.name in exports:
            raise OutputError(
                f"{folder}: --format {folder.name} and the category of this name would both write there; score the "
                "folder above it, or rename it"
            )
    with ExitStack() as held:
        try:
            output.mkdir(parents=True, exist_ok=True)
            check_writable(output)
            _refuse_links(output, [*folders, *(output / name for name in exports)])
            for name in (RUN, REPORT):
                check_target(output / name)
            _tidy(output, held.enter_context(_locked(output)), resume)
            taken = [folder for folder in folders if folder.exists() and not is_results(folder)]
            ours = [output / name for name in (REPORT_FILES, *exports)]
            taken += [folder for folder in ours if folder.exists() and not is_export(folder)]
        except OSError as error:
            raise OutputError(
                f"{output}: cannot be written to ({error.strerror or error}); choose another --output"
            ) from error
        if taken:
            raise OutputError(f"{taken[0]}: exists and holds no zsad results; move it away or choose another --output")
        yield


def check_there(output: Path) -> None:
    """Raise OSError where a run's output folder is gone by now, or can no longer be written to."""
    if not output.is_dir():
        raise OSError(f"the output folder {output} is gone, and what was written there with it; start again")
    if not os.access(output, os.W_OK | os.X_OK):
        raise OSError(f"the output folder {output} can no longer be written to; change its mode")


@contextmanager
def _locked(output: Path) -> Iterator[bool]:
    """Hold the folder's lock, which the system releases if the process dies; raises OutputError where another has it.

    Yields False on file systems without locks.
    """
    try:
        with _held(output) as alone:
            yield alone
    finally:
        # An interrupt may have come between the lock's making and its holding: so it is removed by its path.
        _remove_unheld(output / LOCK)


@contextmanager
def _held(output: Path) -> Iterator[bool]:
    path = output / LOCK
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _lies_at(lock.fileno(), path):  # whoever held it has removed it
                    continue
                lock.truncate()
                lock.write(f"process {os.getpid()} on {platform.node()}, since {datetime.now(timezone.utc):%F %T} UTC")
                lock.flush()
                alone = True
            except OSError as error:
                if error.errno in TAKEN:
                    raise OutputError(f"{_writer(output, lock)} or choose another --output") from None
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                    raise
                alone = False
            yield alone
            return


def _remove_unheld(path: Path) -> None:
    """Remove a lock that no process holds; the folder may be another by now, or gone."""
    with suppress(OSError), os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                return
        if _lies_at(lock.fileno(), path):
            path.unlink()


def check_unclaimed(output: Path) -> None:
    """Raise OutputError where a run is writing: what is read there would be of two runs."""
    with suppress(OSError), open(output / LOCK, opener=_without_links) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                raise OutputError(_writer(output, lock)) from None


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _writer(output: Path, lock: TextIO) -> str:
    """Say who writes into an output folder, by its lock."""
    said = lock.read(200) or "it has just begun"
    return f"{output}: another run is writing there ({said}); wait until it has ended"


def _lies_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _refuse_links(output: Path, folders: Sequence[Path]) -> None:
    """Raise OutputError where what is written, replaced or gone on with would lie elsewhere."""
    written = [output / LOCK, output / RUN, output / REPORT, output / REPORT_FILES, *folders]
    for path in (path for path in output.iterdir() if path.name == DEMO or _HIDDEN.fullmatch(path.name)):
        written.append(path)
        written += (Path(above, name) for above, *names in os.walk(path) for name in (*names[0], *names[1]))
    for path in written:
        if path.is_symlink():
            raise OutputError(
                f"{path} is a link, and nothing is written through links; remove it or choose another --output"
            )


def _tidy(output: Path, alone: bool, resume: bool) -> None:
    """Put in place what a killed run had finished, keep what can be gone on from, and remove all else it has left.

    alone: nobody else writes here; otherwise what others are at stays.
    """
    for path in sorted(output.iterdir(), key=lambda path: path.suffix == ".old"):  # what replaces old results is first
        match = _HIDDEN.fullmatch(path.name)
        left = match or _DRAFT.fullmatch(path.name)
        if left is None or not (alone or _is_dead(left["host"], left["pid"])):
            continue
        if match is not None and match["kind"] == "groups" and resume and (path / ENDED).is_file():
            continue
        if match is not None:
            final = _place_of(path, match["of"])
            if final is not None and (match["kind"] == "partial" or not final.exists()):
                move_into_place(path, final)
                continue
            kept = path.with_name(f".{match['of']}.partial")
            if resume and (path / JOURNAL).is_file():
                if not kept.exists():
                    path.rename(kept)
                if path == kept or not path.exists():
                    continue
        shutil.rmtree(path, ignore_errors=True)


def _is_dead(host: str | None, process: str | None) -> bool:
    """Return whether nobody writes a hidden folder any more; who works on other machines may live."""
    if host is None or process is None:
        return True
    # In a container it often is the same number.
    return host == platform.node() and (int(process) == os.getpid() or not psutil.pid_exists(int(process)))


def _place_of(hidden: Path, of: str) -> Path | None:
    """Return where a hidden folder belongs if it holds finished results, and nothing else is there."""
    try:
        name = read_record(hidden / RECORD).name
        final = hidden.with_name(name)  # raises ValueError where it would lie elsewhere
        unfinished = any((hidden / journal).exists() for journal in (JOURNAL, UNFINISHED))
        free = not final.is_symlink() and (not final.exists() or is_results(final))
        return final if free and not unfinished and _digest(final) == of and not name.startswith(".") else None
    except (OSError, ValueError):
        return None


@contextmanager
def token(output: Path) -> Iterator[tuple[Path, str]]:
    """Yield a file of the output folder and what is in it, by which others can tell whether they see that folder."""
    folder = output / f".{platform.node()}.{os.getpid()}.{RUN}"  # removed by later runs, where this one is killed
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        said = secrets.token_hex(16)
        (folder / "token").write_text(said)
        yield folder / "token", said
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left(output: Path, finished: Iterable[str]) -> None:
    """Remove what killed processes of a run have left of categories that are in place by now; none may be at work."""
    digests = {_digest(output / name) for name in finished}
    for path in list(output.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is not None and match["of"] in digests:
            shutil.rmtree(path, ignore_errors=True)


def flush_all(folder: Path) -> None:
    """Wait until everything in a folder is on disk; several files at once, which takes a tenth of the time."""
    waiting = [folder]
    with ThreadPoolExecutor(8) as pool:
        while waiting:
            current = waiting.pop()
            with os.scandir(current) as entries:
                while some := list(islice(entries, 1024)):  # there may be a million
                    waiting += [Path(entry.path) for entry in some if entry.is_dir()]
                    for _ in pool.map(flush, [Path(entry.path) for entry in some if entry.is_file()]):
                        pass
            flush(current)


def own_folder(final: Path, kind: str) -> Path:
    """Name a hidden folder of this process beside a category's, of the kind partial or old."""
    return final.with_name(f".{_digest(final)}.{platform.node()}.{os.getpid()}.{kind}")


def left_folder(final: Path) -> Path:
    """Name the hidden folder beside a category's that a run leaves for a later one to go on from."""
    return final.with_name(f".{_digest(final)}.partial")


def ended_folder(final: Path) -> Path:
    """Name the hidden folder beside a category's of its groups that have ended."""
    return final.with_name(f".{_digest(final)}.groups")


def _digest(final: Path) -> str:
    return hashlib.sha256(os.fsencode(final.name)).hexdigest()[:16]


def move_into_place(staging: Path, final: Path) -> None:
    """Replace a finished category's folder; the old one stays whole until the new one is ready."""
    old = own_folder(final, "old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        staging.rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)
