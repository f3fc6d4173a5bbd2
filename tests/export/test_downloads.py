"""Downloads from a server on this machine that breaks off, lies and cannot continue."""

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from zsad.engine.commands.export import main
from zsad.export import checkpoints, downloads
from zsad.export.checkpoints import Entry, Source, fetch_checkpoint, find_checkpoint
from zsad.export.digests import Digest
from zsad.export.downloads import download
from zsad.export.state_dict import CheckpointError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGEST = Digest("sha256", hashlib.sha256(CONTENT).hexdigest())


class Server(ThreadingHTTPServer):
    """Serves `content`; sends at most `limits[i]` bytes to the i-th request, then hangs up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.refusals: list[int] = []  # statuses of the first requests
        self.limits: list[int] = []
        self.ranges: list[str | None] = []  # of the requests, as they came
        self.continues = True
        self.may_send = threading.Event()
        self.may_send.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/weights.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        if not self.path.endswith("weights.pth"):
            self.send_error(404)
            return
        if self.server.refusals:
            self.send_error(self.server.refusals.pop(0))
            return
        content = self.server.content
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.continues else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.server.may_send.wait()
        limit = self.server.limits.pop(0) if self.server.limits else len(content)
        self.wfile.write(content[start : start + limit])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_broken_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.limits = [1_000_000, 500_000]
    download(server.url, tmp_path / "w.pth", DIGEST)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-", "bytes=1500000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_a_killed_download_is_resumed_by_the_next_run(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.pth.part").write_bytes(CONTENT[:2_000_000])
    download(server.url, tmp_path / "w.pth", DIGEST)
    assert server.ranges == ["bytes=2000000-"]
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_a_download_killed_before_its_rename_is_finished(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.pth.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "w.pth", DIGEST)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


def test_what_is_left_of_a_longer_file_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.pth.part").write_bytes(CONTENT + b"more")
    download(server.url, tmp_path / "w.pth", DIGEST)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.refusals = [429, 503]
    download(server.url, tmp_path / "w.pth", DIGEST)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


@pytest.mark.slow
def test_of_two_downloads_at_once_one_waits_for_the_other(server: Server, tmp_path: Path) -> None:
    server.may_send.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(download, server.url, tmp_path / "w.pth", DIGEST)
        while not server.ranges:
            time.sleep(0.01)
        second = pool.submit(download, server.url, tmp_path / "w.pth", DIGEST)
        time.sleep(0.3)  # in which the second would ask, too
        server.may_send.set()
        first.result()
        second.result()
    assert server.ranges == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_a_server_that_cannot_continue_starts_again(server: Server, tmp_path: Path) -> None:
    server.continues, server.limits = False, [1_000_000]
    download(server.url, tmp_path / "w.pth", DIGEST)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_a_server_that_always_hangs_up_is_given_up_and_progress_kept(server: Server, tmp_path: Path) -> None:
    server.limits = [1_000_000] + [0] * downloads.ATTEMPTS
    with pytest.raises(CheckpointError, match=r"broke off.*1000000 bytes are kept, run the command again"):
        download(server.url, tmp_path / "w.pth", DIGEST)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth.part"]


def test_another_digest_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"sha256 is {DIGEST.digits}, expected 0000"):
        download(server.url, tmp_path / "w.pth", Digest("sha256", "0" * 64))
    assert not list(tmp_path.iterdir())


def test_a_missing_file_and_a_missing_server(server: Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="404"):
        download(server.url.replace("weights", "nothing"), tmp_path / "w.pth", DIGEST)
    assert server.ranges == [None]  # not asked again
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="refused"):
        download("http://127.0.0.1:1/weights.pth", tmp_path / "w.pth", DIGEST)


@pytest.fixture
def one_checkpoint(server: Server, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A manifest with one checkpoint, whose first source is gone."""
    sources = tuple(
        Source("url", "weights.pth", url, DIGEST, len(CONTENT), {})
        for url in (server.url.replace("weights", "gone"), server.url)
    )
    monkeypatch.setattr(
        checkpoints, "read_manifest", lambda: {"one": Entry("one", "checkpoint", "dinov2", "MIT", sources)}
    )
    return server


def test_the_next_source_is_tried_and_the_file_found_afterwards(one_checkpoint: Server, empty_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="zsad-export --fetch one"):
        find_checkpoint("one")
    path = fetch_checkpoint("one")
    assert path == empty_cache / "weights" / "weights.pth"
    assert find_checkpoint("one") == (path, DIGEST.digits)
    requests = len(one_checkpoint.ranges)
    assert fetch_checkpoint("one") == path
    assert len(one_checkpoint.ranges) == requests


def test_a_folder_for_an_offline_machine(
    one_checkpoint: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "carry"
    assert main(["--fetch", "one", "--output", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "weights.pth")
    monkeypatch.setenv("ZSAD_WEIGHTS", str(folder))
    assert find_checkpoint("one") == (folder / "weights.pth", DIGEST.digits)
    other = tmp_path / "other"  # what is here is copied, not fetched again
    requests = len(one_checkpoint.ranges)
    assert fetch_checkpoint("one", other).read_bytes() == CONTENT
    assert len(one_checkpoint.ranges) == requests
    assert main(["--fetch", "two"]) == 2
    assert "'two' is neither" in capsys.readouterr().err


def test_when_no_source_answers_everything_is_said(one_checkpoint: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    one_checkpoint.limits = [0] * 9
    with pytest.raises(CheckpointError, match=r"404[\s\S]*broke off[\s\S]*curl"):
        fetch_checkpoint("one")
