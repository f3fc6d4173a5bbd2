"""Folders: every layout is found alike, and results keep names of their own."""

import os
import tracemalloc
from pathlib import Path

import pytest
from pictures import touch_images

from zsad.engine.images.folders import NothingToScoreError, scan
from zsad.engine.images.tree import EXPORT, EXPORT_START, RECORD, RUN, SCORES
from zsad.kernels.files import printable


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
    with pytest.raises(NothingToScoreError, match="is a file, and folders of images are read; give "):
        scan(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToScoreError, match=r"no images in it.*\.webp"):
        scan(tmp_path / "empty")
    with pytest.raises(NothingToScoreError, match="another --output"):
        scan(tmp_path, exclude=tmp_path / "empty" / "..")


def numbered(count: int, folder: str = "") -> list[str]:
    return [f"{folder}{index}.png" for index in range(count)]


@pytest.mark.parametrize("strays", [1, 3])
def test_stray_pictures_beside_categories(tmp_path: Path, strays: int) -> None:
    touch_images(tmp_path, *numbered(6, "ring/"), *numbered(6, "plate/"), *numbered(strays, "overview"))
    dataset = scan(tmp_path)
    assert [category.name for category in dataset.categories] == ["plate", "ring"]
    assert len(dataset.notes) == 1
    assert "overview0.png" in dataset.notes[0]
    assert ("and 2 more" in dataset.notes[0]) == (strays == 3)


def test_stray_pictures_beside_data_sets_of_any_size(tmp_path: Path) -> None:
    touch_images(tmp_path, "ring/test/good/0.png", "ring/test/bad/0.png", *numbered(9))
    dataset = scan(tmp_path)
    assert found(tmp_path) == {"ring": ["test/bad/0.png", "test/good/0.png"]}
    assert "8 more" in dataset.notes[0]


def test_many_pictures_beside_folders_are_one_category_with_them(tmp_path: Path) -> None:
    touch_images(tmp_path, *numbered(6), *numbered(20, "a/"), *numbered(20, "b/"))
    (category,) = scan(tmp_path).categories
    assert len(category.images) == 46
    assert "in its folders (a, b) are scored together" in category.notes[0]


def test_categories_at_any_depth(tmp_path: Path) -> None:
    touch_images(tmp_path, "visa/VisA_pytorch/1cls/candle/test/good/0.png", "visa/VisA_pytorch/1cls/pcb/test/bad/0.png")
    names = ["visa_VisA_pytorch_1cls_candle", "visa_VisA_pytorch_1cls_pcb"]
    assert list(found(tmp_path)) == names
    touch_images(tmp_path, "site/a/0.png", "site/b/0.png")
    site = scan(tmp_path).categories[0]
    assert site.name == "site"
    assert site.notes == ("the images in its folders (a, b) are scored together, as one category",)


def test_a_product_called_good(tmp_path: Path) -> None:
    touch_images(tmp_path, "good/test/good/0.png", "good/test/bad/0.png", "bottle/test/good/0.png")
    assert list(found(tmp_path)) == ["bottle", "good"]
    touch_images(tmp_path, "other/ok/good/0.png", "other/ok/bad/0.png", "other/nut/good/0.png", "other/nut/bad/0.png")
    assert list(found(tmp_path / "other")) == ["nut", "ok"]


def test_a_stray_picture_costs_neither_labels_nor_masks(tmp_path: Path) -> None:
    touch_images(tmp_path, *numbered(9, "a/images/"), "a/masks/0.png", "a/overview.png")
    touch_images(tmp_path, *numbered(9, "candle/Data/Images/Normal/"), "candle/Data/Images/Anomaly/0.png")
    touch_images(tmp_path, "candle/Data/Masks/Anomaly/0.png", "candle/Data/overview.png", "candle/overview.png")
    a, candle = scan(tmp_path).categories
    assert (a.name, len(a.images), sum(bool(image.masks.files) for image in a.images)) == ("a", 9, 1)
    assert a.notes[0] == "only images/ is scored; left out: overview.png"
    assert (candle.name, len(candle.images), candle.images[0].defect) == ("candle", 10, "Anomaly")
    assert candle.images[0].masks.files


def test_what_is_no_category_is_said(tmp_path: Path) -> None:
    touch_images(tmp_path, "bolt/0.png", "nut/train/good/0.png", "pin/masks/0.png")
    (tmp_path / "nut" / "test").mkdir()
    (tmp_path / "rod").mkdir()
    (tmp_path / "rod" / "0.heic").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    dataset = scan(tmp_path)
    assert [category.name for category in dataset.categories] == ["bolt"]
    nut, pin, rod = dataset.notes
    assert "only test/ would be scored, not train/ (1 image)" in nut
    assert "masks/ is taken for masks" in pin
    assert "other files: .heic 1" in rod


def test_masks_that_may_be_of_any_split_are_not_used(tmp_path: Path) -> None:
    touch_images(tmp_path, "can/test_public/bad/0.png", "can/test_private/bad/0.png", "can/ground_truth/bad/0_mask.png")
    for category in scan(tmp_path).categories:
        assert not any(image.masks.files for image in category.images)
        assert any("1 masks in ground_truth/ may be of any split" in note for note in category.notes)


def test_several_masks_of_one_image_are_said(tmp_path: Path) -> None:
    touch_images(tmp_path, "test/good/0.png", "test/bad/0.png", "ground_truth/bad/0_mask.png", "masks/bad/0.png")
    (category,) = scan(tmp_path).categories
    assert [str(mask) for image in category.images for mask in image.masks.files] == ["ground_truth/bad/0_mask.png"]
    assert any(
        "1 image has several masks, such as ground_truth/bad/0_mask.png and masks" in note for note in category.notes
    )


def test_what_lies_beside_a_split_is_named(tmp_path: Path) -> None:
    touch_images(tmp_path, "test/good/0.png", "train/good/0.png", "extra/0.png", "logo.png")
    (category,) = scan(tmp_path).categories
    assert [str(image.relative) for image in category.images] == ["test/good/0.png"]
    assert category.notes == ("only test/ is scored; left out: extra/, logo.png",)


def test_a_category_called_test_beside_others(tmp_path: Path) -> None:
    touch_images(tmp_path, "test/test/good/0.png", "nut/test/good/0.png")
    assert list(found(tmp_path)) == ["nut", "test"]


def test_a_test_without_normal_images_says_so(tmp_path: Path) -> None:
    touch_images(tmp_path, "test/fine/0.png", "test/bent/0.png")
    (category,) = scan(tmp_path).categories
    assert {image.anomalous for image in category.images} == {True}
    assert category.notes == (
        "no image of test/ counts as normal: looked for a folder named good, ok or normal; found bent, fine",
    )


def test_masks_are_never_images_and_are_said(tmp_path: Path) -> None:
    touch_images(tmp_path, "a.png", "b.png", "a_GT.bmp", "LABELS/b.png", "annotations/b.xml.png")
    (category,) = scan(tmp_path).categories
    assert {str(image.relative): [str(mask) for mask in image.masks.files] for image in category.images} == {
        "a.png": ["a_GT.bmp"],
        "b.png": ["LABELS/b.png"],
    }
    assert category.notes == (
        "taken for masks and not scored: 1 in LABELS/, 1 in annotations/, 1 beside their images, such as a_GT.bmp",
    )
    assert [str(path) for path in category.stray_masks] == ["annotations/b.xml.png"]


def test_a_defect_called_label_and_a_product_called_mask(tmp_path: Path) -> None:
    touch_images(tmp_path, "jar/test/good/0.png", "jar/test/label/0.png", "jar/ground_truth/label/0_mask.png")
    touch_images(tmp_path, "mask/test/good/0.png", "mask/test/torn/0.png", "labels/0.png")
    dataset = scan(tmp_path)
    assert found(tmp_path) == {
        "jar": ["test/good/0.png", "test/label/0.png"],
        "mask": ["test/good/0.png", "test/torn/0.png"],
    }
    assert len(dataset.notes) == 1
    assert "labels: taken for masks" in dataset.notes[0]


def test_a_folder_of_masks_alone_says_what_to_do(tmp_path: Path) -> None:
    touch_images(tmp_path, "labels/0.png", "labels/1.png")
    with pytest.raises(NothingToScoreError, match=r"taken for masks because of its name: .*zsad-infer .*labels"):
        scan(tmp_path)
    assert found(tmp_path / "labels") == {"labels": ["0.png", "1.png"]}


def finish(folder: Path) -> None:
    """Leave a finished category's tables in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text("{}")
    (folder / SCORES).write_text("path,score,rank,raw_score,map\n")


def test_results_of_this_and_of_earlier_runs_are_left_out(tmp_path: Path) -> None:
    touch_images(tmp_path, "a.png", "b.png", "out/part/overlays/a.jpg", "before/part/overlays/a.jpg")
    touch_images(tmp_path, "before/coco/a.png", "mvtec-ad/part/test/good/0.tiff")
    for name in ("before/coco", "mvtec-ad"):
        (tmp_path / name / EXPORT).write_text(f'{{"{EXPORT_START}": "coco"}}')
    touch_images(tmp_path, "before/demo-data/flange/test/good/0.png")
    finish(tmp_path / "before" / "part")
    run = '{\n "version": "0.1",\n "preset": "small"\n}'
    for name in ("report.html", "metrics.json", "metrics.csv", RUN):
        (tmp_path / "before" / name).write_text(run if name == RUN else "")
    assert found(tmp_path, exclude=tmp_path / "out") == {tmp_path.name: ["a.png", "b.png"]}
    assert not scan(tmp_path).categories[0].ignored


def test_files_of_others_with_our_names_hide_nothing(tmp_path: Path) -> None:
    touch_images(tmp_path, "maps/a.png", "demo-data/b.png", "report.html/c.png", "a.png", "b.png", "c.png", "d.png")
    for name in (RECORD, RUN, "metrics.json"):
        (tmp_path / name).write_text('{"images": [], "annotations": []}')  # as COCO has them
    (tmp_path / SCORES).write_text("file,score\n")
    names = ["a.png", "b.png", "c.png", "d.png", "demo-data/b.png", "maps/a.png", "report.html/c.png"]
    assert found(tmp_path) == {tmp_path.name: names}


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


def test_links_to_what_a_folder_lies_in_are_not_followed(tmp_path: Path) -> None:
    touch_images(tmp_path, "data/bottle/0.png", "data/bottle/1.png", "data/cable/0.png", "data/cable/1.png")
    (tmp_path / "data/self").symlink_to(tmp_path / "data")
    (tmp_path / "data/bottle/up").symlink_to(tmp_path / "data")
    assert found(tmp_path / "data") == {"bottle": ["0.png", "1.png"], "cable": ["0.png", "1.png"]}
    assert found(tmp_path / "data/bottle") == {"bottle": ["0.png", "1.png"]}


def test_pipes_with_names_of_ours_are_not_waited_for(tmp_path: Path) -> None:
    touch_images(tmp_path, "a/0.png", "a/1.png")
    (tmp_path / "a" / RECORD).write_text("{}")
    for name in (RUN, SCORES):
        os.mkfifo(tmp_path / "a" / name)
    assert found(tmp_path / "a") == {"a": ["0.png", "1.png"]}


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_folders_of_other_users(tmp_path: Path) -> None:
    touch_images(tmp_path, "a/0.png", "a/locked/0.png", "a/closed/0.png")
    (tmp_path / "a/locked").chmod(0o000)
    (tmp_path / "a/closed").chmod(0o444)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        (category,) = scan(tmp_path / "a").categories
    finally:
        os.seteuid(0)
    assert {str(path) for path, _ in category.unreadable} == {"locked"}
    assert [str(image.relative) for image in category.images] == ["0.png", "closed/0.png"]


def test_linked_splits_and_masks(tmp_path: Path) -> None:
    touch_images(tmp_path, "store/good/0.png", "store/bent/0.png", "store/masks/bent/0.png")
    (tmp_path / "bolt" / "test").mkdir(parents=True)
    for name in ("good", "bent"):
        (tmp_path / "bolt" / "test" / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "bolt" / "ground_truth").symlink_to(tmp_path / "store" / "masks")
    (category,) = scan(tmp_path / "bolt").categories
    assert {str(image.relative): list(map(str, image.masks.files)) for image in category.images} == {
        "test/bent/0.png": ["ground_truth/bent/0.png"],
        "test/good/0.png": [],
    }


@pytest.mark.slow
def test_a_tree_deeper_than_python_calls_functions(tmp_path: Path) -> None:
    folders = [tmp_path / "a"]
    for _ in range(1100):
        folders.append(folders[-1] / "d")
    for folder in folders:
        folder.mkdir()
    touch_images(folders[0], "0.png", "d/0.png")
    touch_images(folders[-1], "0.png")
    (category,) = scan(tmp_path / "a").categories
    assert [str(image.relative) for image in category.images] == ["0.png", "d/0.png"]
    assert [reason for _, reason in category.unreadable] == ["lies more than 64 folders deep and is not read"]
    for folder in reversed(folders):  # what clears temporary folders gives up on these
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


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


@pytest.mark.slow
def test_little_is_held_of_an_image_and_little_more_while_folders_are_read(tmp_path: Path) -> None:
    for number in range(1500):
        (tmp_path / f"part_{number:04}.png").touch()
    scan(tmp_path)  # what is made once
    tracemalloc.start()
    try:
        (category,) = scan(tmp_path).categories
        assert len({(image.path, image.relative, image.key) for image in category.images}) == 1500
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        (again,) = scan(tmp_path).categories
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / 1500 < 250
    assert (peak - held) / len(again.images) < 400


@pytest.mark.parametrize("name", ["d", "good", "images"])
def test_folders_nested_too_deep_are_named_and_cost_no_images(tmp_path: Path, name: str) -> None:
    deepest = tmp_path.joinpath("data", *[name] * 300, "test", "good")
    deepest.mkdir(parents=True)
    (deepest / "deep.png").touch()
    with pytest.raises(NothingToScoreError):
        scan(tmp_path / "data")
    for number in range(9):
        (tmp_path / "data" / f"{number}.png").touch()
    (category,) = scan(tmp_path / "data").categories
    assert len(category.images) == 9
    ((path, reason),) = category.unreadable
    assert str(path).startswith(f"{name}/{name}/")
    assert reason == "lies more than 64 folders deep and is not read"


def test_coordinates_beside_images_are_left_out(tmp_path: Path) -> None:
    for kind, suffix in (("rgb", "png"), ("xyz", "tiff"), ("gt", "png")):
        for name in ("good", "hole"):
            (tmp_path / f"bagel/test/{name}/{kind}").mkdir(parents=True)
            (tmp_path / f"bagel/test/{name}/{kind}/000.{suffix}").touch()
    (category,) = scan(tmp_path).categories
    assert [str(image.relative) for image in category.images] == ["test/good/rgb/000.png", "test/hole/rgb/000.png"]
    assert [str(mask) for image in category.images for mask in image.masks.files] == [
        "test/good/gt/000.png",
        "test/hole/gt/000.png",
    ]
    assert "left out as coordinates of what the images beside them show: 2 files in xyz/" in category.notes
