"""What of an image is foreground."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_checkpoints import write_clip
from numpy.typing import NDArray
from pictures import save_pictures
from PIL import Image
from runs import draw, scores_and_maps

from zsad.engine.commands.infer import main
from zsad.engine.config import ForegroundSettings
from zsad.engine.images.decode import bilinear
from zsad.engine.methods.bitmasks import pack
from zsad.engine.methods.foreground import combined, dichotomous, is_too_small
from zsad.engine.scores.maps import object_mask

SETTINGS = ForegroundSettings()


def test_golden_foregrounds(scene: dict[str, NDArray[Any]]) -> None:
    masks = [pack(mask) for mask in scene["masks"]]
    foreground = combined(scene["f_dis"], masks, SETTINGS)
    assert foreground.rule == scene["rule"]
    assert [mask in foreground.parts for mask in masks] == scene["kept"].tolist()
    np.testing.assert_array_equal(foreground.pixels, scene["foreground"])


def test_the_golden_foreground_of_a_network(golden_segmentation: Path) -> None:
    arrays = np.load(golden_segmentation / "isnet_tiny.npz")
    enlarged = bilinear(arrays["side1"], (90, 140))
    np.testing.assert_allclose(enlarged, arrays["upsampled"], rtol=0, atol=2e-7)
    normalised = (enlarged - enlarged.min()) / (enlarged.max() - enlarged.min())
    np.testing.assert_allclose(normalised, arrays["normalised"], rtol=0, atol=3e-7)
    np.testing.assert_array_equal(dichotomous(arrays["side1"], (90, 140), 0.8), arrays["mask"])
    assert arrays["mask"].any()


@pytest.mark.parametrize("kind", ["strong", "weak", "constant"])
def test_golden_foregrounds_with_and_without_the_rule_of_the_peak(golden_segmentation: Path, kind: str) -> None:
    arrays = np.load(golden_segmentation / "vvv_host.npz")
    values, name = arrays[f"dichotomous_{kind}_value"], f"dichotomous_{kind}_mask"
    np.testing.assert_array_equal(dichotomous(values, values.shape, 0.8), arrays[name])
    np.testing.assert_array_equal(dichotomous(values, values.shape, 0), arrays[f"{name}_without_peak_rule"])


def test_the_peak_is_that_of_the_enlarged_values_and_may_be_the_limit() -> None:
    values = np.array([[0.0, 1.0], [0.0, 0.0]], np.float32)
    assert dichotomous(values, (1, 1), 0.25).sum() == 0  # one value is constant
    assert dichotomous(values, (1, 2), 0.5).tolist() == [[False, True]]  # its highest is one half
    assert dichotomous(values, (1, 2), 0.51).sum() == 0
    assert dichotomous(np.full((2, 2), np.nan, np.float32), (4, 4), 0).sum() == 0


def square(size: int, side: int) -> NDArray[np.bool_]:
    mask = np.zeros((size, size), bool)
    mask[:side, :side] = True
    return mask


@pytest.mark.parametrize(("pixels", "expected"), [(9, True), (10, False), (0, True)])
def test_a_thousandth_of_the_image_is_enough(pixels: int, expected: bool) -> None:
    foreground = np.zeros((100, 100), bool)
    foreground.flat[:pixels] = True
    assert is_too_small(foreground, 0.001) is expected


def test_what_is_covered_just_enough_is_kept() -> None:
    foreground = square(50, 20)  # 400 pixels
    covered = np.zeros((50, 50), bool)
    covered[:20, 10:20] = True
    enough, too_little = covered.copy(), covered.copy()
    enough[30, :50] = True  # 200 of 250
    too_little[30:32, :50] = True
    masks = [pack(mask) for mask in (too_little, enough, np.zeros_like(covered))]
    assert combined(foreground, masks, SETTINGS).parts == [masks[1]]
    everything = combined(foreground, masks, SETTINGS.model_copy(update={"coverage": 0.0}))
    assert everything.parts == masks[:2]


def test_without_masks_the_foreground_is_taken_as_it_is() -> None:
    foreground = square(50, 20)
    assert combined(foreground, [], SETTINGS).rule == "dichotomous"
    assert combined(np.zeros((1, 1), bool), [], SETTINGS).pixels.all()
    assert combined(np.ones((1, 1), bool), [pack(np.ones((1, 1), bool))], SETTINGS).rule == "sam"


RULES = ("colour", "isnet", "isnet+sam")
ALIKE = [pytest.param("small", rule, marks=pytest.mark.slow) for rule in RULES[1:]]
ALIKE += [pytest.param(preset, "isnet+sam", marks=pytest.mark.slow) for preset in ("winclip", "april-gan")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "rule"), [("small", "colour"), ("winclip", "isnet"), ("april-gan", "isnet"), *ALIKE]
)
def test_the_background_has_the_lowest_score_whatever_the_method(
    infer: Callable[..., int], golden_pictures: list[NDArray[np.uint8]], preset: str, rule: str
) -> None:
    save_pictures("nuts", *golden_pictures)
    settings = {"foreground": "coverage = 0.25"}
    assert infer(preset, "nuts", "--output", "plain", "--foreground", "none", **settings) == 0
    assert infer(preset, "nuts", "--foreground", rule, "--keep-stages", **settings) == 0
    (scores, maps), (plain_scores, plain_maps) = scores_and_maps("out", "nuts"), scores_and_maps("plain", "nuts")
    np.testing.assert_array_equal(scores, plain_scores)  # of which the background is no part, whatever shows in it
    backgrounds = []
    for number, (found, plain, picture) in enumerate(zip(maps, plain_maps, golden_pictures, strict=True)):
        if rule == "colour":
            inside = object_mask(picture[:, :, ::-1])
        else:
            with Image.open(f"out/nuts/stages/{number}-foreground.png") as file:
                inside = np.asarray(file) > 0
        np.testing.assert_array_equal(found, np.where(inside, plain, 0))
        backgrounds.append(np.mean(~inside))
    assert max(backgrounds) > 0.05
    kinds = {path.name.partition("-")[2] for path in Path("out/nuts").glob("stages/*")}
    wanted = {"colour": set(), "isnet": {"foreground.png", "tiles.jpg"}}
    assert kinds == wanted.get(rule, {"foreground.png", "masks.png", "tiles.jpg"})


@pytest.mark.slow
def test_groups_with_foregrounds_are_gone_on_from(infer: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    draw(Path("data"), 7)
    options = ("--foreground", "isnet", "--group-size", "4", "--keep-stages", "-q")
    assert infer("small", "data", *options, "--output", "whole") == 0
    with monkeypatch.context() as patch:

        def dying(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("zsad.engine.results.category.CategoryWriter.write", dying)
        assert infer("small", "data", *options) == 130
    monkeypatch.setattr("zsad.engine.methods.foreground.Foregrounds.find", None)  # all of it is there
    assert infer("small", "data", *options, "--resume") == 0
    for one in Path("whole/data").rglob("*"):
        if one.is_file() and one.name != "category.json":
            assert one.read_bytes() == (Path("out/data") / one.relative_to("whole/data")).read_bytes(), one


@pytest.mark.slow
def test_without_an_object_all_is_foreground(
    infer: Callable[..., int], golden_pictures: list[NDArray[np.uint8]]
) -> None:
    dark = golden_pictures[0] // 8
    save_pictures("nuts", dark, dark)
    for rule in ("none", "isnet+sam"):
        assert infer("winclip", "nuts", "--foreground", rule, "--output", rule) == 0
    for found, plain in zip(scores_and_maps("isnet+sam", "nuts")[1], scores_and_maps("none", "nuts")[1], strict=True):
        np.testing.assert_array_equal(found, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "role", "wrong", "said"),
    [
        ("winclip", "isnet", "sam_tiny", "is named as in a DIS foreground network"),
        ("winclip", "sam", "isnet_tiny", "is named as in a SAM or MobileSAM image encoder"),
        ("winclip", "sam", "bright", "is named as in a SAM or MobileSAM image encoder"),
        ("vvv", "clipseg", "isnet_tiny", "is named as in a DINOv2, DINOv3 or CLIP image tower"),
        ("vvv", "clipseg", "clip_tiny", "an image tower of 6 blocks; CLIPSeg's is CLIP's ViT-B/16, with 12"),
    ],
)
def test_files_of_other_networks_are_named(
    infer: Callable[..., int],
    bright_isnet: Path,
    golden_segmentation: Path,
    golden_pictures: list[NDArray[np.uint8]],
    capsys: pytest.CaptureFixture[str],
    preset: str,
    role: str,
    wrong: str,
    said: str,
) -> None:
    save_pictures("nuts", golden_pictures[2])
    others = {"bright": bright_isnet, "clip_tiny": write_clip(Path.cwd(), "clip_tiny")}
    file = others.get(wrong, golden_segmentation / f"{wrong}.safetensors")
    assert infer(preset, "nuts", "--foreground", "isnet+sam", replaced={role: file}) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert said in error
    assert not Path("out/nuts").exists()


def test_missing_networks_are_named_at_once(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures("nuts", np.zeros((9, 9, 3), np.uint8))
    assert main(["nuts", "--preset", "vvv", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "4 files are not on this machine" in said
    assert "zsad-export --fetch clip-vitb16plus-240-e31 isnet-general-use sam-vitb\n" in said
    assert "e31-8fb26589.pt (sha256 8fb26589…, about 795 MiB, MIT)" in said
    assert "model.safetensors (no digest published, about 575 MiB, Apache-2.0)" in said
    assert "isnet-general-use.pth (no digest published, about 169 MiB, code Apache-2.0; weights not" in said
    assert re.search(r"sam_vit_b_01ec64.pth \(sha256 [0-9a-f]{64}, 358 MiB, Apache-2.0\)", said)
    assert main(["nuts", "--preset", "small", "--foreground", "isnet", "--device", "cpu"]) == 2
    assert "the graph isnet-general-use is not on this machine" in capsys.readouterr().err
