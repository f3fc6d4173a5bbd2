"""Lists of files: which rows become which images, under which names, and what of a list is never held."""

import csv
import json
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsad.engine.images.categories import Category
from zsad.engine.images.folders import NothingToScoreError, scan
from zsad.engine.images.manifest import ListedImages, read_manifest


def listed(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the way that the path's suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
    return path


def facts(categories: list[Category]) -> list[Any]:
    return [
        (c.name, [(str(i.path), str(i.relative), str(i.key), i.anomalous, i.defect) for i in c.images])
        for c in categories
    ]


ROWS = [
    {"path": "a/1.png", "category": "bolt", "label": "good", "mask": ""},
    {"path": "/far/2.png", "category": "bolt", "label": "scratch", "mask": "m/2.png"},
    {"path": "http://bucket/3.png?signature=x", "category": "nut/steel", "label": "1", "mask": "https://host/3.png"},
    {"path": "zip://in/4.png::/far/all.zip", "category": "", "label": "", "mask": ""},
]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", pytest.param(".parquet", marks=pytest.mark.slow)])
def test_rows_become_images_of_their_categories(tmp_path: Path, suffix: str) -> None:
    categories = read_manifest(listed(tmp_path / f"parts{suffix}", ROWS), ())
    far = "/far/2.png".removeprefix("/")
    assert facts(categories) == [
        (
            "bolt",
            [
                (f"{tmp_path}/a/1.png", "a/1.png", "a/1", False, None),
                ("/far/2.png", far, "far/2", True, "scratch"),
            ],
        ),
        ("nut_steel", [("http://bucket/3.png", "http/bucket/3.png", "http/bucket/3", True, "defect")]),
        ("parts", [("zip://in/4.png::/far/all.zip", "far/all.zip/zip/in/4.png", "far/all.zip/zip/in/4", None, None)]),
    ]
    assert [str(mask) for image in categories[0].images for mask in image.masks.files] == [f"{tmp_path}/m/2.png"]
    assert str(categories[1].images[0].masks.files[0]) == "https://host/3.png"
    assert [category.product for category in categories] == ["bolt", "nut_steel", "parts"]


def test_a_list_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes('\ufeffLabel;Path\r\ngood;"a;b.png"\r\n\r\nbad;c.png\r\n'.encode())
    (category,) = read_manifest(tmp_path / "list.csv", ())
    assert [(str(i.relative), i.anomalous) for i in category.images] == [("a;b.png", False), ("c.png", True)]


names = st.text("aA.~/é ", min_size=1, max_size=5).map(lambda text: f"{text}.png")


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(names, names.map("memory://b/{}".format), names.map("/f/{}".format)), min_size=1))
def test_no_two_images_share_a_name_and_none_is_lost(tmp_path: Path, paths: list[str]) -> None:
    (category,) = read_manifest(listed(tmp_path / "list.jsonl", [{"path": path} for path in paths]), ())
    found = list(category.images)
    for of_image in ("key", "relative"):
        seen = [str(getattr(image, of_image)).casefold() for image in found]
        assert len(set(seen)) == len(found)
        assert not any(part in ("", ".", "..") for name in seen for part in PurePosixPath(name).parts)
        assert not any(name.startswith("/") for name in seen)
    assert {image.path for image in found} == {image.path for image in set(found)}
    twice = sum(int(note.split()[0]) for note in category.notes)
    assert len(found) + twice + len(category.unreadable) == len(paths)


def test_rows_that_name_no_file_are_told_and_the_others_are_read(tmp_path: Path) -> None:
    lines = ['{"path": "a.png"}', "no JSON", '{"path": 3}', '{"path": "b.png", "category": ".x"}', "[1]"]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    (category,) = read_manifest(tmp_path / "list.jsonl", ())
    assert [str(image.relative) for image in category.images] == ["a.png"]
    assert [str(path) for path, _ in category.unreadable] == [f"list.jsonl, row {row}" for row in (2, 3, 4, 5)]
    assert "begin" in category.unreadable[2][1] or "called" in category.unreadable[2][1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("list.csv", b"file,label\na.png,good\n", r"no column path, url or image .* \(it has file, label\)"),
        ("list.csv", b"path\n", "no row that names an image"),
        ("list.jsonl", b"\xff\xfe\n", "UTF-8"),
        ("list.parquet", b"PAR1", "Parquet"),
    ],
)
def test_what_is_no_list_says_why(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NothingToScoreError, match=said):
        scan(tmp_path / name)


def test_a_list_of_files_that_nothing_here_opens_ends_before_any_work(tmp_path: Path, monkeypatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(NothingToScoreError, match=r"install 'zsad\[cloud\]' gcsfs"):
        scan(listed(tmp_path / "list.csv", [{"path": "gs://bucket/a.png"}]))


def test_images_of_a_list_go_to_another_process(tmp_path: Path) -> None:
    (category,) = read_manifest(listed(tmp_path / "list.jsonl", [{"path": f"{n}.png"} for n in range(3)]), ())
    assert isinstance(category.images, ListedImages)
    assert pickle.loads(pickle.dumps(category)).images == tuple(category.images)
