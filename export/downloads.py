"""Fetches one file over HTTP: resumes what broke off, verifies, and never leaves half a file under the final name."""

import fcntl
import logging
import sys
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from .digests import Digest
from .state_dict import CheckpointError

log = logging.getLogger("zsad")

ATTEMPTS = 5  # in a row without a single new byte
PAUSE = 2.0  # seconds before the next attempt
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20


def download(url: str, target: Path, digest: Digest, size: int | None = None) -> None:
    """Fetch a URL into `target`; what a broken run left in `target` + `.part` is continued.

    While another process fetches the same file this one waits, and takes what that brought.

    Raises CheckpointError when the server refuses or stays away, or when the digest is another.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with part.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is fetching %s; waiting for it", target)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        try:
            if target.is_file() and not digest.problem(digest.of(target)):
                return
            fetch(url, part, size)
            if problem := digest.problem(digest.of(part)):
                part.unlink()
                raise CheckpointError(f"{url}: {problem}; the server has another file. It was not kept")
            part.replace(target)
        finally:
            if not _size(part):
                part.unlink(missing_ok=True)


def fetch(url: str, part: Path, size: int | None = None) -> None:
    """Append to `part` until nothing is missing; raises CheckpointError when the server refuses or stays away."""
    hidden = not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO))
    with tqdm(total=size, desc=part.stem, unit="B", unit_scale=True, file=sys.stderr, disable=hidden) as bar:
        failures = 0
        while True:
            before = _size(part)
            try:
                _continue(url, part, bar)
                return
            except urllib.error.HTTPError as error:
                if error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code != HTTPStatus.TOO_MANY_REQUESTS:
                    raise CheckpointError(f"{url}: the server answers {error.code} {error.reason}") from None
                problem: Exception = error
            except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
                problem = error
            failures = 0 if _size(part) > before else failures + 1
            if failures == ATTEMPTS:
                kept = f"; {_size(part)} bytes are kept, run the command again to go on" if _size(part) else ""
                raise CheckpointError(f"{url}: {problem}{kept}")
            time.sleep(PAUSE)


def _continue(url: str, part: Path, bar: "tqdm[None]") -> None:
    """Append the rest of a URL to `part`; raises OSError or HTTPException when it breaks off."""
    have = _size(part)
    headers = {"User-Agent": "zsad", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            if error.headers["Content-Range"] == f"bytes */{have}":
                return  # nothing is left to fetch
            part.write_bytes(b"")
            raise ConnectionError("what was kept is no part of the server's file") from None
        raise
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server cannot continue and sends everything
        length = response.headers["Content-Length"]
        if length is not None:
            bar.total = have + int(length)
        bar.n = have
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if length is not None and _size(part) < have + int(length):
            raise ConnectionError(f"the connection broke off after {_size(part)} of {have + int(length)} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
