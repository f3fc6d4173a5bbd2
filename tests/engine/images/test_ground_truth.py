"""Masks and images are brought together by their names, and what is ambiguous stays apart."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from pictures import picture
from PIL import Image

from zsad.engine.images.ground_truth import MaskFile, masks_beside, match_masks


def matched(images: Sequence[str], masks: Sequence[str], by_name_alone: bool = True) -> tuple[dict[str, str], set[str]]:
    files = [MaskFile(PurePosixPath("ground_truth", mask), PurePosixPath(mask)) for mask in masks]
    found = match_masks([PurePosixPath(image) for image in images], files, by_name_alone)
    pairs = {
        images[index]: " ".join(str(mask.relative_to("ground_truth")) for mask in chosen.files)
        for index, chosen in found.masks.items()
    }
    return pairs, {str(mask.relative_to("ground_truth")) for mask in found.strays}


@pytest.mark.parametrize("mask", ["0_mask.png", "0.bmp", "0_label.TIF", "0_GT.jpg", "0-mask.png", "0_MASK.PNG"])
def test_names_of_masks(mask: str) -> None:
    assert matched(["bent/0.jpg", "bent/1.jpg"], [f"bent/{mask}"]) == ({"bent/0.jpg": f"bent/{mask}"}, set())


def test_every_region_in_a_folder_named_after_the_image() -> None:
    pairs, strays = matched(["bent/0.png", "bent/1.png"], ["bent/0/000.png", "bent/0/001.png", "bent/2/000.png"])
    assert pairs == {"bent/0.png": "bent/0/000.png bent/0/001.png"}
    assert strays == {"bent/2/000.png"}


def test_a_mask_in_no_folder_belongs_to_the_only_defective_image_of_its_name() -> None:
    images = ["good/0.png", "bent/0.png", "bent/1.png", "torn/1.png"]
    assert matched(images, ["0.png", "1.png"]) == ({"bent/0.png": "0.png"}, {"1.png"})
    assert matched(images, ["0.png"], by_name_alone=False) == ({}, {"0.png"})


def test_a_mask_of_an_absent_image_is_not_given_to_another_defect() -> None:
    assert matched(["bent/0.png", "torn/7.png"], ["bent/7_mask.png"]) == ({}, {"bent/7_mask.png"})


def test_images_that_differ_only_in_case_keep_their_own_masks() -> None:
    pairs, _ = matched(["bent/A.png", "bent/a.png"], ["bent/A_mask.png", "bent/a_mask.png"])
    assert pairs == {"bent/A.png": "bent/A_mask.png", "bent/a.png": "bent/a_mask.png"}


def test_of_several_masks_the_one_named_as_a_mask_counts() -> None:
    pairs, strays = matched(["bent/0.png"], ["bent/0.png", "bent/0_label.png", "bent/0_mask.png"])
    assert (pairs, strays) == ({"bent/0.png": "bent/0_mask.png"}, set())


def test_a_mask_of_another_defect_is_no_mask_of_this_one() -> None:
    images = ["good/0.png", "scratch/0.png", "scratch/1.png"]
    pairs, strays = matched(images, ["cut/0_mask.png", "cut/1_mask.png", "scratch/0_mask.png"])
    assert (pairs, strays) == ({"scratch/0.png": "scratch/0_mask.png"}, {"cut/0_mask.png", "cut/1_mask.png"})


def test_masks_in_no_folder_of_normal_images() -> None:
    pairs, strays = matched(["good/0.png", "bad/5.png"], ["0.png", "5.png"])
    assert (pairs, strays) == ({"good/0.png": "0.png", "bad/5.png": "5.png"}, set())


def test_folders_that_say_nothing_do_not_count() -> None:
    images = ["crack/image/0.png", "hole/image/0.png", "crack/rgb/1.png"]
    pairs, _ = matched(images, ["crack/0.png", "hole/0.png", "crack/1.png"])
    assert pairs == {
        "crack/image/0.png": "crack/0.png",
        "hole/image/0.png": "hole/0.png",
        "crack/rgb/1.png": "crack/1.png",
    }


def test_an_image_named_as_its_defect_has_no_region_files() -> None:
    mask = MaskFile(PurePosixPath("ground_truth/cut/cut_mask.png"), PurePosixPath("cut/cut_mask.png"))
    found = match_masks([PurePosixPath("cut/cut.png")], [mask], True)
    assert not found.masks[0].regions


def test_masks_beside_images(tmp_path: Path) -> None:
    names = ["Part0.jpg", "Part0_label.bmp", "Part1_label.bmp", "x_GT.png", "X.tif"]
    assert masks_beside(tmp_path, names) == {"Part0_label.bmp": "Part0.jpg", "x_GT.png": "X.tif"}


@pytest.mark.parametrize("drawn", [True, False])
def test_a_drawn_png_beside_every_jpeg_is_its_mask(tmp_path: Path, drawn: bool) -> None:
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.jpg")
    for index in range(2):
        mask = np.zeros((30, 40), np.uint8)
        mask[:9, :9] = 255
        (Image.fromarray(mask) if drawn else picture(index)).save(tmp_path / f"{index}.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert masks_beside(tmp_path, names) == ({"0.png": "0.jpg", "1.png": "1.jpg"} if drawn else {})
