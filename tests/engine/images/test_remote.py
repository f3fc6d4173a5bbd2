"""Files at URLs: how much of them is fetched, and what is said of those that cannot be."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad.engine.images import remote
from zsad.engine.images.decode import decode
from zsad.engine.images.remote import HEAD, Remote, check_opens, stamps
from zsad.engine.images.stored import ImageError, read_header

fsspec = pytest.importorskip("fsspec")


def encoded(side: int, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(content, kind)
    return content.getvalue()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of what was fetched of files of memory://."""
    sizes: list[int] = []
    system = fsspec.filesystem("memory")
    fetch = type(system).cat_file

    def noted(self: object, *arguments: object, **options: object) -> bytes:
        found: bytes = fetch(self, *arguments, **options)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(type(system), "cat_file", noted)
    monkeypatch.setattr(remote, "_recent", remote._Recent())
    yield sizes
    system.store.clear()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_a_header_fetches_a_part_and_pixels_the_file_once(asked: list[int], kind: str) -> None:
    content = encoded(400, kind)
    assert len(content) > HEAD
    fsspec.filesystem("memory").pipe("/a/x.bin", content)
    file = Remote("memory://a/x.bin")
    assert (read_header(file).rows, read_header(file).columns) == (400, 400)
    # Of TIFF files later versions of Pillow write behind the pixels what the directory points at.
    assert asked == [HEAD, HEAD] or (kind == "TIFF" and asked == [HEAD, len(content)])
    assert np.array_equal(np.asarray(decode(file)), np.asarray(Image.open(io.BytesIO(content))))
    decode(file)
    assert sum(size == len(content) for size in asked) == 1


def test_a_file_that_cannot_be_had_is_named(asked: list[int]) -> None:
    with pytest.raises(ImageError, match="no longer there"):
        decode(Remote("memory://a/none.png"))
    fsspec.filesystem("memory").pipe("/empty.png", b"")
    with pytest.raises(ImageError, match="empty"):
        decode(Remote("memory://empty.png"))


def test_a_changed_file_has_another_stamp(asked: list[int], tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    (tmp_path / "local.png").write_bytes(b"12")
    files = [tmp_path / "local.png", Remote("memory://x.png"), Remote("memory://none.png")]
    system.pipe("/x.png", b"123")
    local, before, none = stamps(files)
    assert local == (2, (tmp_path / "local.png").stat().st_mtime_ns)
    assert before[0] == 3
    assert none == (-1, -1)
    system.pipe("/x.png", b"321")
    assert list(stamps(files))[1] != before


def test_secrets_in_a_url_are_not_said() -> None:
    assert str(Remote("https://me:word@host/a.png?signature=x")) == "https://host/a.png"
    assert str(Remote("zip://in/a.png::https://h/all.zip?x=1")) == "zip://in/a.png::https://h/all.zip"
    assert Remote("https://host/a.PNG?x=.tif").suffix == ".PNG"


def test_a_missing_plug_in_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ImageError, match=r"install 'zsad\[cloud\]' s3fs"):
        check_opens(Remote("s3://bucket/a.png"))
    with pytest.raises(ImageError, match="not installed"):
        decode(Remote("s3://bucket/a.png"))
