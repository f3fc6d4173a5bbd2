"""Data sets in the layouts that they are published in: which images are scored together, their labels, their masks."""

import unicodedata
from pathlib import Path

import pytest
from pictures import touch_images

from zsad.engine.images.folders import Dataset, scan
from zsad.engine.images.layouts import holds_masks, is_hidden, is_normal, is_split, is_test, mask_stem

GOOD = None  # the defect of a normal image


def read(dataset: Dataset) -> dict[str, dict[str, object]]:
    """Every category's images: defect, or (defect, masks) where there are any, or "?" without a label."""
    found: dict[str, dict[str, object]] = {}
    for category in dataset.categories:
        found[category.name] = {}
        for image in category.images:
            label = "?" if image.anomalous is None else image.defect
            assert image.anomalous in (None, label is not GOOD)
            masks = tuple(map(str, image.masks.files))
            found[category.name][str(image.relative)] = (label, *masks) if masks else label
    return found


LAYOUTS: dict[str, tuple[list[str], dict[str, dict[str, object]]]] = {
    "MVTec AD": (
        [
            "bolt/train/good/9.png",
            "bolt/test/good/0.png",
            "bolt/test/bent/0.png",
            "bolt/ground_truth/bent/0_mask.png",
            "nut/test/good/0.png",
            "nut/test/bent/0.png",
        ],
        {
            "bolt": {"test/bent/0.png": ("bent", "ground_truth/bent/0_mask.png"), "test/good/0.png": GOOD},
            "nut": {"test/bent/0.png": "bent", "test/good/0.png": GOOD},
        },
    ),
    "MVTec AD 2": (
        [
            "can/train/good/0.png",
            "can/validation/good/0.png",
            "can/test_public/good/0_regular.png",
            "can/test_public/bad/0_shift.png",
            "can/test_public/ground_truth/bad/0_shift_mask.png",
            "can/test_private/0.png",
            "can/test_private_mixed/0.png",
        ],
        {
            "can_test_private": {"test_private/0.png": "?"},
            "can_test_private_mixed": {"test_private_mixed/0.png": "?"},
            "can_test_public": {
                "test_public/bad/0_shift.png": ("bad", "test_public/ground_truth/bad/0_shift_mask.png"),
                "test_public/good/0_regular.png": GOOD,
            },
        },
    ),
    "MVTec LOCO": (
        [
            "pins/train/good/0.png",
            "pins/validation/good/0.png",
            "pins/test/good/0.png",
            "pins/test/logical_anomalies/0.png",
            "pins/ground_truth/logical_anomalies/0/000.png",
            "pins/ground_truth/logical_anomalies/0/001.png",
        ],
        {
            "pins": {
                "test/good/0.png": GOOD,
                "test/logical_anomalies/0.png": (
                    "logical_anomalies",
                    "ground_truth/logical_anomalies/0/000.png",
                    "ground_truth/logical_anomalies/0/001.png",
                ),
            }
        },
    ),
    "VisA": (
        ["candle/Data/Images/Normal/0.JPG", "candle/Data/Images/Anomaly/0.JPG", "candle/Data/Masks/Anomaly/0.png"],
        {
            "candle": {
                "Data/Images/Anomaly/0.JPG": ("Anomaly", "Data/Masks/Anomaly/0.png"),
                "Data/Images/Normal/0.JPG": GOOD,
            }
        },
    ),
    "VisA as MVTec AD": (
        ["pcb/train/good/1.JPG", "pcb/test/good/0.JPG", "pcb/test/bad/0.JPG", "pcb/ground_truth/bad/0.png"],
        {"pcb": {"test/bad/0.JPG": ("bad", "ground_truth/bad/0.png"), "test/good/0.JPG": GOOD}},
    ),
    "BTAD": (
        ["01/train/ok/0.bmp", "01/test/ok/0.bmp", "01/test/ko/0.bmp", "01/ground_truth/ko/0.png"],
        {"01": {"test/ko/0.bmp": ("ko", "ground_truth/ko/0.png"), "test/ok/0.bmp": GOOD}},
    ),
    "KolektorSDD": (
        ["kos01/Part0.jpg", "kos01/Part0_label.bmp", "kos01/Part1.jpg", "kos01/Part1_label.bmp"],
        {"kos01": {"Part0.jpg": ("?", "Part0_label.bmp"), "Part1.jpg": ("?", "Part1_label.bmp")}},
    ),
    "KolektorSDD2": (
        ["ksdd2/train/1.png", "ksdd2/train/1_GT.png", "ksdd2/test/2.png", "ksdd2/test/2_GT.png"],
        {"ksdd2": {"test/2.png": ("?", "test/2_GT.png")}},
    ),
    "anomalib's Folder": (
        ["tile/good/0.jpg", "tile/normal_test/1.jpg", "tile/crack/0.jpg", "tile/mask/crack/0.png"],
        {
            "tile": {
                "crack/0.jpg": ("crack", "mask/crack/0.png"),
                "good/0.jpg": GOOD,
                "normal_test/1.jpg": GOOD,
            }
        },
    ),
    "DAGM": (
        [
            "Class1/Train/1.PNG",
            "Class1/Train/Label/1_label.PNG",
            "Class1/Test/2.PNG",
            "Class1/Test/3.PNG",
            "Class1/Test/Label/2_label.PNG",
        ],
        {"Class1": {"Test/2.PNG": ("?", "Test/Label/2_label.PNG"), "Test/3.PNG": "?"}},
    ),
    "images and masks in folders of their own": (
        ["part/images/0.jpg", "part/images/1.jpg", "part/masks/1.png"],
        {"part": {"images/0.jpg": "?", "images/1.jpg": ("?", "masks/1.png")}},
    ),
    "splits without a test": (
        ["part/train/good/0.png", "part/val/good/0.png", "part/val/bad/0.png"],
        {"part_train": {"train/good/0.png": "?"}, "part_val": {"val/bad/0.png": "bad", "val/good/0.png": GOOD}},
    ),
    "splits with images and masks": (
        ["neu/train/images/1.jpg", "neu/train/masks/1.png", "neu/val/images/2.jpg", "neu/val/masks/2.png"],
        {
            "neu_train": {"train/images/1.jpg": ("?", "train/masks/1.png")},
            "neu_val": {"val/images/2.jpg": ("?", "val/masks/2.png")},
        },
    ),
    "products within a split": (
        [
            "all/test/bottle/good/0.png",
            "all/test/bottle/bad/0.png",
            "all/test/cable/good/0.png",
            "all/test/cable/bad/0.png",
            "all/ground_truth/bottle/bad/0_mask.png",
        ],
        {
            "all_bottle": {
                "test/bottle/bad/0.png": ("bad", "ground_truth/bottle/bad/0_mask.png"),
                "test/bottle/good/0.png": GOOD,
            },
            "all_cable": {"test/cable/bad/0.png": "bad", "test/cable/good/0.png": GOOD},
        },
    ),
    "a training split beside labelled images": (
        ["tile/good/0.png", "tile/bad/0.png", "tile/train/1.png"],
        {"tile": {"bad/0.png": "bad", "good/0.png": GOOD}},
    ),
    "a folder of data sets": (
        ["sets/a/bolt/test/good/0.png", "sets/a/nut/test/good/0.png", "sets/a/nut/test/bad/0.png"],
        {
            "a_bolt": {"test/good/0.png": GOOD},
            "a_nut": {"test/bad/0.png": "bad", "test/good/0.png": GOOD},
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_from_above(tmp_path: Path, layout: str) -> None:
    names, expected = LAYOUTS[layout]
    touch_images(tmp_path, *names)
    above = tmp_path / "sets" if (tmp_path / "sets").is_dir() else tmp_path
    assert read(scan(above)) == expected


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "a folder of data sets"])
def test_a_layout_by_one_of_its_categories(tmp_path: Path, layout: str) -> None:
    names, expected = LAYOUTS[layout]
    touch_images(tmp_path, *names)
    top = names[0].split("/")[0]
    own = {name: images for name, images in expected.items() if name.startswith(top)}
    assert read(scan(tmp_path / top)) == own


@pytest.mark.parametrize("layout", ["MVTec AD", "MVTec AD 2", "VisA", "BTAD", "anomalib's Folder"])
def test_neither_case_nor_unicode_form_of_names_matters(tmp_path: Path, layout: str) -> None:
    names, expected = LAYOUTS[layout]

    def renamed(name: str, form: str = "NFC") -> str:
        first, *rest = name.split("/")
        *folders, last = rest
        stem, suffix = last.rsplit(".", 1)
        return "/".join([first, *map(str.upper, folders), unicodedata.normalize(form, f"ä{stem}") + f".{suffix}"])

    masks = [any(holds_masks(part) for part in name.split("/")) for name in names]
    touch_images(tmp_path, *(renamed(n, "NFD" if mask else "NFC") for n, mask in zip(names, masks, strict=True)))
    found, before = scan(tmp_path), read_counts(expected)
    assert {
        c.name.casefold(): (len(c.images), sum(bool(i.masks.files) for i in c.images)) for c in found.categories
    } == before


def read_counts(expected: dict[str, dict[str, object]]) -> dict[str, tuple[int, int]]:
    return {
        name.casefold(): (len(images), sum(isinstance(image, tuple) for image in images.values()))
        for name, images in expected.items()
    }


# Names


@pytest.mark.parametrize("name", ["Test", "TEST", "testing", "test_public", "test-private", "test_private_mixed"])
def test_splits_of_a_test(name: str) -> None:
    assert is_test(name)
    assert is_split(name)


@pytest.mark.parametrize("name", ["test_run", "tests", "contest", "testbench", "latest"])
def test_other_names_with_test_in_them(name: str) -> None:
    assert not is_split(name)


def test_folders_of_normal_images() -> None:
    assert all(map(is_normal, ["good", "Good", "OK", "ok", "normal", "Normal", "normal_test", "defect-free"]))
    assert not any(map(is_normal, ["abnormal", "not_ok", "goods", "ko", "bad", "okra", "normality", "nok"]))


def test_folders_and_names_of_masks() -> None:
    folders = ["ground_truth", "Ground Truth", "groundtruth", "Mask", "masks", "GT", "label", "Labels", "annotations"]
    assert all(map(holds_masks, folders))
    assert not any(map(holds_masks, ["masked", "labelling", "gtx", "unmask", "images"]))
    stems = {"0_mask": "0", "0_MASK": "0", "Part 1_label": "part 1", "x-GT": "x", "x_ground_truth": "x"}
    assert {name: mask_stem(name) for name in stems} == stems
    assert not any(map(mask_stem, ["mask", "_mask", "unmasked", "0_masks2", "gt"]))


def test_what_systems_leave() -> None:
    names = ["@eaDir", ".DS_Store", "._a.png", "Thumbs.db", ".thumbnails", "desktop.ini", "#recycle", "__MACOSX"]
    assert all(map(is_hidden, names))
    assert not any(map(is_hidden, ["a.png", "thumbs", "eaDir"]))
