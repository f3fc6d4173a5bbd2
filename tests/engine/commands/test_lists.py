"""Whole runs over lists of files, here and at URLs: the same results as of a folder of the same files."""

import csv
import json
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import draw, scores_and_maps

from zsad.engine.commands.evaluate import main as evaluate
from zsad.engine.commands.infer import main

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def _workplace(workplace: None) -> None:
    """Every test here runs the tiny network in a folder of its own."""


@pytest.fixture
def infer(tiny: Path) -> Callable[..., int]:
    return lambda *arguments: main([*map(str, arguments), "--config", str(tiny / "config.toml"), "-q"])


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def send_head(self) -> Any:
        if self.path != "/breaks-off.csv":
            return super().send_head()
        self.connection.shutdown(socket.SHUT_RDWR)
        return None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server of the test's folder; it knows of no parts of files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def written(path: Path, urls: list[str], **columns: str) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["url", *columns])
        table.writerows([url, *columns.values()] for url in urls)
    return path


def places(kind: str, data: Path, server: str) -> list[str]:
    """Make the files of a folder available in some way; returns their URLs."""
    names = sorted(path.name for path in data.iterdir())
    if kind == "http":
        return [f"{server}/data/{name}?signature={name}" for name in names]
    if kind == "zip":
        with zipfile.ZipFile(data.parent / "all.zip", "w") as archive:
            for name in names:
                archive.write(data / name, f"in/{name}")
        return [f"zip://in/{name}::{data.parent}/all.zip" for name in names]
    if kind == "memory":
        fsspec.filesystem("memory").pipe({f"/images/{name}": (data / name).read_bytes() for name in names})
        return [f"memory://images/{name}" for name in names]
    return [f"data/{name}" for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path", "memory", "zip", "http"])
def test_a_list_gives_the_scores_of_the_folder(infer, tmp_path: Path, server: str, kind: str) -> None:
    data = draw(tmp_path / "data", 6)
    assert infer(data, "--output", "folder") == 0
    urls = places(kind, data, server)
    assert infer(written(tmp_path / "list.csv", urls, category="data"), "--output", "list", "--resume") == 0
    (wanted, wanted_maps), (found, maps) = scores_and_maps("folder"), scores_and_maps("list")
    assert np.array_equal(found, wanted)
    assert all(np.array_equal(one, other) for one, other in zip(maps, wanted_maps, strict=True))
    stamp = Path("list/data/category.json").stat().st_mtime_ns
    assert infer(tmp_path / "list.csv", "--output", "list", "--resume") == 0
    assert Path("list/data/category.json").stat().st_mtime_ns == stamp


def test_files_that_cannot_be_fetched_are_named_and_the_others_scored(infer, tmp_path: Path, capsys) -> None:
    data = draw(tmp_path / "data", 4)
    urls = [*places("memory", data, ""), "memory://images/none.png", "nosuch://x/y.png"]
    assert infer(written(tmp_path / "list.csv", urls)) == 1
    error = capsys.readouterr().err
    assert "none.png: skipped: no longer there" in error
    assert "y.png: skipped: cannot be fetched" in error
    record = json.loads(Path("out/list/category.json").read_text())
    assert len(record["images"]) == 4
    assert len(record["failures"]) == 2


@pytest.mark.slow
def test_labels_and_masks_of_a_list_are_compared(infer, tmp_path: Path, server: str, capsys) -> None:
    data = draw(tmp_path / "data", 5)
    mask = np.zeros((80, 97), np.uint8)
    mask[20:50, 30:60] = 255
    last = Image.open(data / "04.png")
    Image.fromarray(mask[: last.height, : last.width]).save(tmp_path / "mask.png")
    rows = [
        {"path": f"data/{n:02d}.png", "label": "bad" if n == 4 else "good", "mask": f"{server}/mask.png" * (n == 4)}
        for n in range(5)
    ]
    (tmp_path / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert infer("list.jsonl") == 0
    metrics = json.loads(Path("out/run.json").read_text())["metrics"]["mean"]
    assert metrics["image_auroc"] is not None
    assert metrics["pixel_aupro"] is not None
    assert evaluate(["out", "list.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] == metrics


def test_a_list_at_a_url_names_files_beside_it(infer, tmp_path: Path) -> None:
    data = draw(tmp_path / "data", 3)
    places("memory", data, "")
    fsspec.filesystem("memory").pipe("/images/list.csv", b"path\n00.png\n01.png\n02.png\n")
    assert infer("memory://images/list.csv") == 0
    assert {path.name for path in Path("out/list/maps").iterdir()} == {"00.tiff", "01.tiff", "02.tiff"}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9/list.csv", "cannot be fetched: Cannot connect to host 127.0.0.1:9"),
        ("{server}/nowhere.csv", "there is no such file"),
        ("{server}/breaks-off.csv", "cannot be fetched: Server disconnected"),
        ("unheard://of/list.csv", "cannot be fetched: Protocol not known: unheard"),
        ("nowhere.csv", "there is no such list"),
    ],
)
def test_a_list_that_cannot_be_fetched_says_why(infer, server: str, capsys, url: str, said: str) -> None:
    assert infer(url.format(server=server)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_url_that_is_no_list_says_what_is_read(infer, capsys) -> None:
    assert infer("memory://images/") == 2
    assert "only lists are read (.csv" in capsys.readouterr().err
