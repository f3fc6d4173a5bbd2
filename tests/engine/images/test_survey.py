"""The size of a category's images from their headers: medians, bounds, patches, and what no header says."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from zsad.engine.images import survey as surveys
from zsad.engine.images.stored import Header
from zsad.engine.images.survey import Survey, survey


def side(*shorter: int, patch: int = 14, largest: int = 518) -> int | None:
    return Survey({each: shorter.count(each) for each in shorter}, deep=False).side(patch, largest)


@pytest.mark.parametrize(
    ("shorter", "expected"),
    [
        ([300], 294),
        ([280], 280),
        ([279], 266),
        ([280, 420], 350),  # the middle of both
        ([281, 308], 294),
        ([250, 300, 4000], 294),
        ([100, 200], 224),
        ([1], 224),
        ([517], 504),
        ([518], 518),
        ([9000], 518),
    ],
)
def test_the_median_rounded_down_within_bounds(shorter: list[int], expected: int) -> None:
    assert side(*shorter) == expected


@pytest.mark.parametrize(("patch", "low", "high"), [(14, 224, 518), (16, 224, 512), (8, 224, 512), (15, 225, 510)])
def test_sizes_are_multiples_of_the_patch(patch: int, low: int, high: int) -> None:
    assert (side(10, patch=patch), side(5000, patch=patch)) == (low, high)
    for shorter in range(200, 540, 7):
        found = side(shorter, patch=patch)
        assert found is not None
        assert found % patch == 0
        assert low <= found <= max(low, min(high, shorter))


@pytest.mark.parametrize(
    ("shorter", "expected"),
    [
        ([], None),
        ([300], None),
        ([300, 450], None),
        ([300, 451], (300, 451)),
        ([300] * 19 + [9000], None),  # one of twenty may be of any size, at either end
        ([10] + [300] * 19, None),
        ([300] * 18 + [9000] * 2, (300, 9000)),
        ([10] * 2 + [300] * 18, (10, 300)),
    ],
)
def test_sizes_are_mixed_where_most_are_far_apart(shorter: list[int], expected: tuple[int, int] | None) -> None:
    assert Survey({each: shorter.count(each) for each in shorter}, deep=False).mixed == expected


def test_headers_of_every_kind_and_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.jpg", "c.bmp", "d.webp"):
        Image.new("RGB", (300, 70)).save(tmp_path / name)
    image = Image.new("RGB", (90, 40))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.jpg", exif=exif)
    tifffile.imwrite(
        tmp_path / "planes.tif", np.zeros((3, 50, 64), np.uint8), photometric="rgb", planarconfig="separate"
    )
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"no image")
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)
    calls = []
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "gone.png"]
    found = survey(iter(paths), lambda: calls.append(1))
    assert found == Survey({70: 4, 40: 1, 50: 1}, deep=False)
    assert len(calls) == len(paths)


def test_without_a_readable_header_there_is_no_size(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    found = survey([tmp_path / "a.png"], lambda: None)
    assert (found.median, found.side(14, 518), found.mixed, found.deep) == (None, None, None, False)


@pytest.mark.parametrize(
    ("name", "deep"), [("a.png", True), ("a.tif", True), ("rgb.png", True), ("eight.png", False), ("a.pgm", False)]
)
def test_which_files_may_be_of_a_camera_of_16_bits(tmp_path: Path, name: str, deep: bool) -> None:
    levels = np.full((30, 40), 3000, np.uint16)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 40 30 4095\n" + levels.astype(">u2").tobytes())
    elif name == "rgb.png":
        cv2 = pytest.importorskip("cv2")
        (tmp_path / name).write_bytes(cv2.imencode(".png", np.dstack([levels] * 3))[1].tobytes())
    else:
        Image.fromarray(levels if deep else levels.astype(np.uint8)).save(tmp_path / name)
    assert survey([tmp_path / name], lambda: None) == Survey({30: 1}, deep)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = iter(range(10**9))
    monkeypatch.setattr(surveys, "read_header", lambda path: Header(4000, 200 + next(sides) % 300, 1, False))
    tracemalloc.start()
    try:
        found = survey((Path("a") for _ in range(20_000)), lambda: None)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert len(found.shorter) == 300
    assert found.side(14, 518) == 336
