"""Image files as they arrive in a folder: each is handed out once, when it is completely written.

What the system tells of changes only says where to look, if it tells at all: the folder itself is looked through
again and again, so that nothing is missed on network shares, in bursts, or while nobody was watching.
"""

import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from .categories import HERE, ImageFolder, InputImage
from .layouts import is_hidden
from .names import marked, result_folder, shortened, stem_of
from .tree import DEEPEST, is_export, is_image, is_results, is_stream

log = logging.getLogger("zsad")

SETTLED = 0.2  # seconds without a change after which a file counts as written
PATIENCE = 5.0  # seconds without a change until what cannot be read then is no longer waited for
# Seconds between looks through the whole folder, with and without being told of changes; a look that takes long is
# made less often: only in one of so many parts of the time.
RESCAN_TOLD, RESCAN = 5.0, 0.5
PART = 20
MOST_WAITING = 10_000  # files that are kept in mind; others are met by the next look through the folder
COARSE = 10**7  # nanoseconds; times that are multiples of it come from file systems that keep no finer ones
MERGED = 4096  # new keys that are kept apart
STEP = 2  # milliseconds after which the system is asked again whether there is something new
LISTEN = 10  # milliseconds that it is listened for at least
FAILURES, LASTING = 4, 1.0  # of the system to tell, each within so many seconds, after which it is asked no more


class Version(NamedTuple):
    """What a file is while it is not changed."""

    size: int  # bytes
    modified: int  # ns
    inode: int
    mode: int = 0  # its permissions


@dataclass(frozen=True)
class Arrival:
    """A file that is completely written."""

    relative: str  # to the folder that is watched
    version: Version
    image: InputImage
    young: bool  # it may still be that it is not: what cannot be read is to be tried again


class Known:
    """Which files were handled: by path, and by inode, which a renamed file keeps; and how their results are called.

    It takes 32 bytes for each, and as much again for a moment.
    """

    def __init__(self) -> None:
        self._sorted, self._new = np.zeros(0, np.uint64), set[int]()

    def add(self, relative: str, version: Version, refused: bool = False) -> None:
        """refused: it has no score, which other permissions or another name may change."""
        self._add([_key_of_refused(relative, version)] if refused else _keys(relative, version))

    def has(self, relative: str, version: Version) -> bool:
        return any(map(self._has, (*_keys(relative, version), _key_of_refused(relative, version))))

    def call(self, relative: str, key: str) -> bool:
        """Call a file's results by a key; returns False where those of another file are called so."""
        taken = f"\0\0{key.casefold()}"
        own = _key(f"{taken}\0{relative}")
        if self._has(own):
            return True
        if self._has(_key(taken)):
            return False
        self._add((_key(taken), own))
        return True

    def _add(self, keys: Iterable[int]) -> None:
        self._new.update(keys)
        if len(self._new) >= max(MERGED, len(self._sorted) // 64):
            new = np.fromiter(self._new, np.uint64, len(self._new))
            new.sort()
            places = np.searchsorted(self._sorted, new)
            known = self._sorted[np.minimum(places, len(self._sorted) - 1)] == new if len(self._sorted) else places < 0
            self._sorted = np.insert(self._sorted, places[~known], new[~known])
            self._new.clear()

    def _has(self, key: int) -> bool:
        if key in self._new:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(key)))
        return place < len(self._sorted) and int(self._sorted[place]) == key


def _keys(relative: str, version: Version) -> Iterator[int]:
    size, modified, inode, _ = version
    yield _key(f"{relative}\0{size}\0{modified}")
    if modified % COARSE:  # else a file that takes the place of a removed one could be mistaken for it
        yield _key(f"\0{inode}\0{size}\0{modified}")


def _key_of_refused(relative: str, version: Version) -> int:
    return _key(f"\0\0\0{relative}\0{version.size}\0{version.modified}\0{version.mode}")


def _key(text: str) -> int:
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass
class _Waiting:
    """A file that is not handled yet."""

    version: Version
    changed: float  # when that was first seen of it
    due: float  # when it counts as written, unless it changes before


class Arrivals:
    """The files of a folder and all below it that are not `known`, once they are completely written."""

    def __init__(self, root: Path, exclude: Path, known: Known) -> None:
        """exclude: a folder to leave out."""
        self.root, self._known = root.absolute(), known
        self._excluded = os.path.realpath(exclude)
        self._waiting: dict[str, _Waiting] = {}
        self._folders: dict[str, ImageFolder] = {}  # of the images that were handed out last
        self._signals = Signals(self.root)
        self._next_scan = 0.0
        self._gone = False  # the folder cannot be looked through
        self._place: tuple[int, int] | None = None  # which folder it is that the system tells of; None: unsure

    def __enter__(self) -> "Arrivals":
        with suppress(OSError):
            self._place = _place(self.root)
        self._signals.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.stop()

    def take(self, most: int) -> list[Arrival]:
        """Look around; return files that are complete by now, oldest first."""
        for path in self._signals.changed():
            if path == self.root:  # it may have been removed and made again, and of the new one nothing is told
                self._place, self._next_scan = None, 0.0
            else:
                self._look_at(path)
        if self._signals.missed() or time.monotonic() >= self._next_scan:
            self._scan()
        now = time.monotonic()
        due = [relative for relative, waiting in self._waiting.items() if waiting.due <= now]
        due.sort(key=lambda relative: (self._waiting[relative].version.modified, relative))
        found = []
        for relative in due[:most]:
            self._look_at(self.root / relative)  # once more, directly before
            waiting = self._waiting.get(relative)
            if waiting is not None and waiting.due <= now:
                del self._waiting[relative]
                young = now - waiting.changed < PATIENCE
                found.append(Arrival(relative, waiting.version, self._image(relative), young))
        return found

    def wait(self, seconds: float) -> None:
        """Wait until there may be something to take, at most so long."""
        now = time.monotonic()
        following = min((waiting.due for waiting in self._waiting.values()), default=now + seconds)
        self._signals.wait(max(0.0, min(seconds, following - now, self._next_scan - now)))

    def put_back(self, arrival: Arrival) -> None:
        """Take back a file that cannot be read, or has changed; it is handed out again when it has rested."""
        now = time.monotonic()
        self._waiting[arrival.relative] = _Waiting(arrival.version, now - SETTLED, now + PATIENCE)
        self._look_at(self.root / arrival.relative)

    def version(self, arrival: Arrival) -> Version | None:
        """Return what the file is by now, None where it is no longer there."""
        try:
            return _version(os.stat(self.root / arrival.relative))  # noqa: PTH116
        except OSError:
            return None

    def _look_at(self, path: Path) -> None:
        """Take note of what a file is by now."""
        try:
            relative = str(path.relative_to(self.root))
            status = os.stat(path)  # noqa: PTH116
        except (OSError, ValueError):
            with suppress(ValueError):
                self._waiting.pop(str(path.relative_to(self.root)), None)
            return
        if stat.S_ISREG(status.st_mode):
            if relative in self._waiting or self._would_find(relative):
                self._meet(relative, _version(status))
        elif stat.S_ISDIR(status.st_mode):
            self._next_scan = 0.0  # a folder that was moved here may be full of files, of which nobody tells

    def _meet(self, relative: str, version: Version) -> None:
        """Take note of a file that is to be scored, unless it was handled as it is."""
        now, waiting = time.monotonic(), self._waiting.get(relative)
        if waiting is not None and waiting.version == version:
            return
        if waiting is None and len(self._waiting) >= MOST_WAITING:
            return
        if self._known.has(relative, version):
            self._waiting.pop(relative, None)
            return
        rested = 0.0 if waiting is not None else time.time() - version.modified / 1e9
        due = now if rested > SETTLED else now + SETTLED
        self._waiting[relative] = _Waiting(version, now, due)

    def _would_find(self, relative: str) -> bool:
        """Tell whether a file that was told of is one that `_walk` finds."""
        path = PurePosixPath(relative)
        if not is_image(path.name) or any(map(is_hidden, path.parts)) or len(path.parents) > DEEPEST + 1:
            return False
        return not any(self._holds_results(self.root / folder) for folder in path.parents)

    def _holds_results(self, folder: Path) -> bool:
        """Tell whether a folder is the output or in it, or holds results of any other run."""
        real = os.path.realpath(folder)
        in_output = real == self._excluded or real.startswith(f"{self._excluded}/")
        return in_output or is_results(folder) or is_stream(folder) or is_export(folder)

    def _scan(self) -> None:
        """Look through the whole folder."""
        start = time.monotonic()
        self._find_root()
        if not self._gone:
            for relative in [r for r in self._waiting if not os.path.exists(self.root / r)]:  # noqa: PTH110 - never raises
                del self._waiting[relative]  # moved away or deleted
        for relative, version in self._walk():
            self._meet(relative, version)
        taken = time.monotonic() - start
        pause = RESCAN_TOLD if self._signals.telling() else RESCAN
        if len(self._waiting) >= MOST_WAITING:
            pause = RESCAN  # there may be more
        self._next_scan = time.monotonic() + max(pause, PART * taken)

    def _find_root(self) -> None:
        """Say where the folder is gone, is there again or is another one, and let the system tell of that."""
        try:
            place = _place(self.root)
        except OSError as error:
            if not self._gone:
                log.error("%s cannot be listed (%s); waiting for it to come back", self.root, error.strerror)
                self._signals.stop()
            self._gone = True
            return
        if self._gone:
            log.warning("%s is there again", self.root)
        elif self._place not in (place, None):
            log.warning("%s is another folder by now (made again, mounted or unmounted); going on with it", self.root)
        if self._gone or self._place != place:
            self._signals.start()
        self._gone, self._place = False, place

    def _walk(self) -> Iterator[tuple[str, Version]]:
        """Yield the image files that are there; what cannot be listed is left out."""
        met, waiting = set[str](), [("", 0)]
        while waiting:
            above, depth = waiting.pop()
            folder = self.root / above
            real = os.path.realpath(folder)
            if real in met or self._holds_results(folder):
                continue
            met.add(real)
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    relative = f"{above}{entry.name}"
                    if is_hidden(entry.name):
                        continue
                    with suppress(OSError):
                        if entry.is_dir():
                            if depth < DEEPEST:
                                waiting.append((f"{relative}/", depth + 1))
                        elif is_image(entry.name) and entry.is_file():
                            yield relative, _version(entry.stat())

    def _image(self, relative: str) -> InputImage:
        """Name an image: as runs do, and with its suffix where an earlier one of the same stem has that name."""
        above, _, name = relative.rpartition("/")
        if above not in self._folders:
            if len(self._folders) >= MERGED:
                self._folders.clear()
            path = HERE / above
            self._folders[above] = ImageFolder(self.root / above, path, result_folder(path))
        folder = self._folders[above]
        own = (shortened(stem_of(name)), shortened(name))
        key = next((key for key in own if self._known.call(relative, str(folder.key / key))), None)
        return InputImage(folder, name, key or marked(name, relative))


def _place(folder: Path) -> tuple[int, int]:
    """Return which folder it is; raises OSError where it cannot be listed."""
    with os.scandir(folder):
        status = os.stat(folder)  # noqa: PTH116
    return status.st_dev, status.st_ino


def _version(status: os.stat_result) -> Version:
    return Version(status.st_size, status.st_mtime_ns, status.st_ino, stat.S_IMODE(status.st_mode))


class Signals:
    """What the system tells of changes in a folder, by the library watchfiles; without it, nothing.

    It is asked while somebody waits, and keeps in mind what happens meanwhile: no thread looks for it, which would take
    time from the networks.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths: dict[str, None] = {}
        self._changes: Iterator[Iterable[tuple[object, str]]] | None = None  # next ones; None: nobody tells of them
        self._missed = False
        self._begun, self._failed = 0.0, 0  # when it was asked last, and how often it failed since it last went well

    def start(self) -> None:
        self._begun = time.monotonic()
        try:
            from watchfiles import watch
        except ImportError:
            log.info(
                "looking for new files every half second; to see them at once: pip install 'zsad[watch]'",
            )
            return
        self.stop()
        self._missed = True  # what came before it tells
        self._changes = watch(
            self._root, watch_filter=None, debounce=50, step=STEP, rust_timeout=LISTEN, yield_on_timeout=True
        )
        self._listen()

    def stop(self) -> None:
        self._changes = None

    def telling(self) -> bool:
        return self._changes is not None

    def wait(self, seconds: float) -> None:
        """Wait until there is something to look at, at most so long."""
        end = time.monotonic() + seconds
        while not (self._paths or self._missed) and (left := end - time.monotonic()) > 0:
            if self._changes is None or left < LISTEN / 1000:
                time.sleep(left)
                return
            self._listen()

    def changed(self) -> list[Path]:
        """Return the paths that were told of since the last call."""
        if not self._paths:
            self._listen()
        paths, self._paths = list(self._paths), {}
        return [Path(path) for path in paths]

    def missed(self) -> bool:
        """Tell whether there was more than could be kept in mind since the last call."""
        missed, self._missed = self._missed, False
        return missed

    def _listen(self) -> None:
        """Take what was told since the last time, or is told within a moment."""
        if self._changes is None:
            return
        try:
            self._paths.update((path, None) for _, path in next(self._changes, ()))
        except Exception as error:  # too few inotify watches, the folder is gone, or a name that is no valid Unicode
            self._failed = 1 if time.monotonic() - self._begun > LASTING else self._failed + 1
            if self._failed <= FAILURES:  # one name, of which it may tell several times, does not slow the others
                self.start()
                return
            log.warning("the system does not tell of new files (%s); looking for them every half second", error)
            self._changes = None
        if len(self._paths) > MOST_WAITING:
            self._paths.clear()
            self._missed = True
