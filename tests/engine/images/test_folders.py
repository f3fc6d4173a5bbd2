"""Folders: every layout is found alike, and results keep names of their own."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad.engine.images.folders import NothingToScoreError, scan
from zsad.engine.images.tree import RECORD, SCORES
from zsad.kernels.files import printable


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth colour image, so that lossy formats stay close to it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def touch_images(root: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path, format="PNG")


def found(root: Path, exclude: Path | None = None) -> dict[str, list[str]]:
    return {
        category.name: [str(image.relative) for image in category.images] for category in scan(root, exclude).categories
    }


# Layouts


def test_mvtec_layout_of_several_categories(tmp_path: Path) -> None:
    touch_images(
        tmp_path,
        "bolt/train/good/0.png",
        "bolt/test/good/0.png",
        "bolt/test/bent/0.png",
        "bolt/ground_truth/bent/0_mask.png",
        "nut/test/good/0.PNG",
        ".hidden/test/good/0.png",
        "nut/test/.thumbnails/0.png",
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "readme.txt").write_text("not an image")
    assert found(tmp_path) == {"bolt": ["test/bent/0.png", "test/good/0.png"], "nut": ["test/good/0.PNG"]}
    assert found(tmp_path / "bolt") == {"bolt": ["test/bent/0.png", "test/good/0.png"]}


def test_a_folder_of_images_and_folders_of_folders(tmp_path: Path) -> None:
    touch_images(
        tmp_path, "flat/b.png", "flat/a.jpeg", "flat/deep/er/c.TIF", "labelled/good/0.png", "labelled/bad/0.png"
    )
    (tmp_path / "flat" / "notes.txt").write_text("text")
    assert found(tmp_path / "flat") == {"flat": ["a.jpeg", "b.png", "deep/er/c.TIF"]}
    assert found(tmp_path / "labelled") == {"labelled": ["bad/0.png", "good/0.png"]}
    assert list(found(tmp_path)) == ["flat", "labelled"]
    assert dict(scan(tmp_path / "flat").categories[0].ignored) == {".txt": 1}


def test_nothing_to_score_says_why(tmp_path: Path) -> None:
    with pytest.raises(NothingToScoreError, match="no such folder"):
        scan(tmp_path / "absent")
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(NothingToScoreError, match="must be a folder"):
        scan(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToScoreError, match=r"no images in it.*\.webp"):
        scan(tmp_path / "empty")
    with pytest.raises(NothingToScoreError, match="another --output"):
        scan(tmp_path, exclude=tmp_path / "empty" / "..")


def test_results_of_this_and_of_earlier_runs_are_left_out(tmp_path: Path) -> None:
    touch_images(tmp_path, "a.png", "b.png", "out/part/overlays/a.jpg", "before/part/overlays/a.jpg")
    (tmp_path / "before" / "part" / RECORD).write_text("{}")
    (tmp_path / "before" / "part" / SCORES).write_text("path,score,rank,raw_score,map\n")
    assert found(tmp_path, exclude=tmp_path / "out") == {tmp_path.name: ["a.png", "b.png"]}


def test_links_in_circles_and_to_folders_read_before(tmp_path: Path) -> None:
    touch_images(tmp_path, "part/a.png", "part/sub/b.png", "elsewhere/c.png")
    part = tmp_path / "part"
    (part / "sub" / "up").symlink_to(part)
    (part / "outside").symlink_to(tmp_path / "elsewhere")
    (part / "self").symlink_to("self")
    (part / "self.png").symlink_to("self.png")
    assert found(part) == {"part": ["a.png", "self.png", "outside/c.png", "sub/b.png"]}
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "twin").symlink_to(part)
    assert list(found(tmp_path)) == ["elsewhere", "part", "twin"]


def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch_images(tmp_path, "bolt/test/bent/0.png", "bolt/test/good/0.png", "nut/0.png", "nut/1.png")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name in ("bent", "nut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    bolt, nut = scan(tmp_path).categories
    assert [str(image.relative) for image in bolt.images] == ["test/good/0.png"]
    assert [(str(path), why) for path, why in bolt.unreadable] == [
        ("test/bent", "cannot be listed (Permission denied)")
    ]
    assert not nut.images
    assert len(nut.unreadable) == 1
    with pytest.raises(NothingToScoreError, match="Permission denied"):
        scan(tmp_path / "nut")


# Names of results


def test_two_images_with_one_stem_keep_their_own_results(tmp_path: Path) -> None:
    touch_images(tmp_path, "a.png", "a.jpg", "b.png", "a.png.bmp", "B.tif", "c/a.png")
    keys = {str(image.relative): str(image.key) for image in scan(tmp_path).categories[0].images}
    assert keys["a.png"] == "a.png"
    assert keys["a.jpg"] == "a.jpg"
    assert keys["c/a.png"] == "c/a"
    assert len({key.casefold() for key in keys.values()}) == len(keys)


def test_result_files_and_folders_never_share_a_name(tmp_path: Path) -> None:
    touch_images(
        tmp_path,
        "a.png",
        "a.jpg/x.png",
        "a.tiff/x.png",
        "a_scores.json/x.png",
        "scores.csv/x.png",
        f"{'n' * 251}.png",
        f"{'n' * 250}m.png",
        f"{'d' * 255}/x.png",
        "e\u0301" * 80 + ".png",
    )
    keys = [image.key for image in scan(tmp_path).categories[0].images]
    for pattern in ("maps/{}.tiff", "overlays/{}.jpg", "{}_scores.json"):
        files = [Path(pattern.format(key)) for key in keys]
        folders = {parent for file in files for parent in file.parents}
        assert len(set(files)) == len(files)
        assert not folders & {*files, Path("scores.csv"), Path(RECORD)}
        assert all(len(os.fsencode(part)) <= 255 for file in files for part in file.parts)


def test_categories_never_take_a_reserved_or_taken_name(tmp_path: Path) -> None:
    touch_images(tmp_path, "report.html/0.png", "report.html_/0.png", "run.json/0.png", f"{'n' * 255}/0.png")
    names = list(found(tmp_path))
    assert not {"report.html", "run.json"} & set(names)
    assert len(set(names)) == 4
    assert max(map(len, names)) <= 200


def test_printable_escapes_what_a_terminal_obeys() -> None:
    assert printable("é\x1b[2J\n\udcff") == "é\\x1b[2J\\n\\udcff"
    assert printable("a\nb", keep="\n") == "a\nb"
