"""Files that are no local ones: whatever `fsspec` opens, by their URLs.

first bytes, which hold the header → the whole file, once more is asked for → kept while it is recent, so that looking
at a header, decoding and drawing an image ask for it once
"""

import hashlib
import io
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from zsad.export.libraries import install_command
from zsad.kernels.files import file_sha256

from .limits import ImageError, check_bytes

HEAD = 1 << 16  # bytes that are asked for first
RECENT = 64 << 20  # bytes of whole files that are kept
AT_ONCE = 32  # requests for facts of files, which mostly wait
GONE = (404, 410)  # what HTTP servers say of files that there are not
PLUG_INS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}  # by scheme

Result = TypeVar("Result")


@dataclass(frozen=True)
class Remote:
    """A file that `fsspec` opens, for example s3://bucket/001.png, https://host/001.png or zip://001.png::all.zip."""

    url: str

    def __str__(self) -> str:
        """Say which file that is, without what may be secret: queries, which may be signatures, and passwords."""
        return "::".join(_shown(piece) for piece in self.url.split("::"))

    @property
    def name(self) -> str:
        return PurePosixPath(str(Remote(self.url.split("::")[0]))).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def read_bytes(self) -> bytes:
        """Return all that is in the file; raises OSError."""
        kept = _recent.get(self.url)
        if kept is None:
            kept = _asked(self, lambda system, path: system.cat_file(path))
            _recent.put(self.url, kept)
        return kept

    def head(self) -> bytes:
        """Return the first bytes of the file, or all of them where that is known at once; raises OSError."""
        kept = _recent.get(self.url)
        if kept is None:
            kept = _asked(self, lambda system, path: system.cat_file(path, start=0, end=HEAD))
            if len(kept) != HEAD:  # all of a small file, or of a large one where the server knows of no parts
                _recent.put(self.url, kept)
        return kept

    def facts(self) -> dict[str, Any]:
        """Return what the file system says of the file; raises OSError."""
        found: dict[str, Any] = _asked(self, lambda system, path: system.info(path))
        return found


Location = Path | Remote


def location(text: str) -> Location:
    """Return the file that a path or a URL names."""
    return Remote(text) if is_url(text) else Path(text.removeprefix("file://"))


def is_url(text: str) -> bool:
    """Tell whether a text is a URL of what is not simply a local file."""
    return "::" in text or ("://" in text and not text.startswith("file://"))


def stamp(file: Location) -> tuple[int, int]:
    """Return the size of a file and when it was changed, in nanoseconds or what else tells that; of none -1.

    Decoding says what is wrong with a file that cannot be asked.
    """
    try:
        if isinstance(file, Path):
            status = file.stat()
            return status.st_size, status.st_mtime_ns
        facts = file.facts()
    except OSError:
        return -1, -1
    changed = repr(sorted((key, str(value)) for key, value in facts.items() if key.lower().replace("-", "") in CHANGES))
    return int(facts.get("size") or -1), int.from_bytes(hashlib.sha256(changed.encode()).digest()[:7], "big")


# What file systems call that which is another one once a file has changed.
CHANGES = frozenset(
    ("etag", "lastmodified", "last_modified", "mtime", "modified", "updated", "created", "md5", "contentmd5", "crc")
)


def digest(file: Location) -> str:
    """Return the sha256 of a file in hexadecimal; raises OSError."""
    return file_sha256(file) if isinstance(file, Path) else hashlib.sha256(file.read_bytes()).hexdigest()


def asked_ahead(files: Iterable[Location], ask: Callable[[Location], Result]) -> Iterator[Result]:
    """Yield what is to be known of each file, in order; many of the remote ones are asked at once."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(AT_ONCE, "ask") as pool:
        for file in files:
            if not waiting and isinstance(file, Path):
                yield ask(file)
                continue
            waiting.append(pool.submit(ask, file))
            if len(waiting) >= AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def stamps(files: Iterable[Location]) -> Iterator[tuple[int, int]]:
    """Yield the stamps of files in their order."""
    return asked_ahead(files, stamp)


def check_opens(file: Remote) -> None:
    """Raise ImageError, with the command that mends it, where this installation lacks what opens such files."""
    try:
        _filesystem(file)
    except ImportError as error:
        raise ImageError(f"{file}: {_missing(file, error)}") from None
    except Exception:
        return  # reading will say what is wrong with it


def _missing(file: Remote, error: ImportError) -> str:
    plug_in = PLUG_INS.get(file.url.rpartition("::")[2].partition("://")[0], "")
    command = install_command(f"'zsad[cloud]' {plug_in}".rstrip())
    return f"what opens such files is not installed ({error}); run: {command}"


def _filesystem(file: Remote) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # only where a URL is given

    found: tuple[Any, str] = url_to_fs(file.url)
    return found


def _asked(file: Remote, ask: Callable[[Any, str], Any]) -> Any:
    """Return what a file system answers; raises OSError for whatever goes wrong, of which each has its own kind."""
    try:
        return ask(*_filesystem(file))
    except FileNotFoundError as error:
        # fsspec says that of servers that cannot be reached, refuse or break off, too.
        why = error.__cause__
        unreached = isinstance(why, OSError) and not isinstance(why, FileNotFoundError)
        answered = type(why).__module__.partition(".")[0] == "aiohttp" and getattr(why, "status", None) not in GONE
        if why is not None and (unreached or answered):
            raise OSError(5, f"cannot be fetched: {said(why)}") from None
        raise FileNotFoundError(2, "there is no such file") from None
    except ImportError as error:
        raise OSError(5, _missing(file, error)) from None
    except Exception as error:
        raise OSError(5, f"cannot be fetched: {said(error)}") from None


def open_remote(file: Remote) -> BinaryIO:
    """Open a file of which parts are fetched as they are read; raises OSError where it cannot be opened."""
    opened: BinaryIO = _asked(file, lambda system, path: system.open(path, "rb"))
    return opened


def said(error: BaseException) -> str:
    """Say what went wrong, without a URL that may have a signature."""
    text = " ".join(str(error).split()) or type(error).__name__
    return " ".join(word.split("?")[0] for word in text.split(" "))


def _shown(piece: str) -> str:
    scheme, mark, rest = piece.rpartition("://")
    rest = rest.partition("?")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2] if mark else host}{slash}{path}"


class _Recent:
    """Whole files that were fetched last."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, url: str) -> bytes | None:
        with self._lock:
            if url in self._files:
                self._files.move_to_end(url)
            return self._files.get(url)

    def put(self, url: str, content: bytes) -> None:
        with self._lock:
            self._bytes += len(content) - len(self._files.pop(url, b""))
            self._files[url] = content
            while self._bytes > RECENT:
                self._bytes -= len(self._files.popitem(last=False)[1])


_recent = _Recent()


class RemoteFile(io.RawIOBase):
    """An open remote file: its first bytes, and once more is asked for, the whole."""

    def __init__(self, file: Remote) -> None:
        """Raises OSError."""
        self._file, self._position, self.content = file, 0, file.head()
        self._whole = len(self.content) != HEAD

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            self._fetch()
        start = (0, self._position, len(self.content))[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        if self._position >= len(self.content):
            self._fetch()
        part = self.content[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _fetch(self) -> None:
        if not self._whole:
            check_bytes(int(self._file.facts().get("size") or 0))
            self.content, self._whole = self._file.read_bytes(), True
