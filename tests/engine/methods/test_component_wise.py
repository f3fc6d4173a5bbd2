"""Tiles of components put together again: maps and scores of images."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import save_pictures
from PIL import Image
from runs import scores_and_maps
from vvv_checkpoints import write_bright_isnet

from zsad.engine.config import TileSettings
from zsad.engine.images.decode import bilinear
from zsad.engine.methods.bitmasks import Box
from zsad.engine.methods.component_wise import TileMean, component_scores, image_score
from zsad.engine.methods.tiles import components, cut, tiles

Arrays = Mapping[str, NDArray[Any]]


def test_golden_scenes(scene: Arrays) -> None:
    mean = TileMean(tuple(scene["size"].tolist()), len(scene["tiles"]))
    for box, score, tile_map in zip(scene["tiles"].tolist(), scene["tile_scores"], scene["tile_maps"], strict=True):
        mean.add(Box(*box), score * tile_map)
    pixels = mean.finish()
    assert pixels.dtype == np.float32
    step = int(scene["pixel_map_step"])
    np.testing.assert_allclose(pixels[::step, ::step], scene["pixel_map"], atol=1e-5)
    assert pixels.mean(dtype=np.float64) == pytest.approx(float(scene["pixel_map_mean"]), abs=1e-6)
    per_component = component_scores(scene["tile_scores"], scene["tile_component"], len(scene["component_boxes"]))
    np.testing.assert_allclose(per_component, scene["component_scores"], atol=1e-5)
    assert image_score(per_component, TileSettings()) == pytest.approx(float(scene["image_score"]), abs=1e-5)


def test_golden_functions(vvv_host: Arrays) -> None:
    for name, expected in vvv_host.items():
        if name.startswith("top_share_") and name.endswith("_score"):
            scores = vvv_host[name.replace("_score", "_components")].astype(np.float64)
            assert image_score(scores, TileSettings()) == pytest.approx(float(expected), abs=1e-5)


def test_a_pixel_has_the_mean_of_the_tiles_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsad.engine.methods.component_wise.STRIP", 8)  # tiles in strips of few rows
    mean = TileMean((6, 9), 70_000)
    mean.add(Box(0, 0, 4, 4), np.full((2, 2), 1.0, np.float32))
    mean.add(Box(2, 2, 6, 6), np.full((3, 3), 4.0, np.float32), times=2)
    mean.add(Box(-3, 5, 3, 11), np.full((2, 2), 5.0, np.float32))  # mirrored: reaches beyond the image
    expected = np.zeros((6, 9))
    expected[:4, :4] = 1
    expected[2:, 2:6] = 4
    expected[2:4, 2:4] = (1 + 4 + 4) / 3
    expected[5, :3] = 5, 5, (5 + 4 + 4) / 3
    np.testing.assert_allclose(mean.finish(), expected, rtol=1e-6)


def test_strips_of_a_tile_are_the_tile() -> None:
    values = np.random.default_rng(0).random((22, 22), np.float32)
    mean = TileMean((1500, 1300), 1)
    mean.add(Box(-40, -30, 1360, 1470), values)
    expected = bilinear(values, (1500, 1400))[30:, 40:1340]
    pixels = mean.finish()
    np.testing.assert_allclose(pixels[:1470], expected, atol=1e-6)
    assert not pixels[1470:].any()


@pytest.mark.parametrize(
    ("count", "share", "top", "expected"),
    [(1, 0.25, "floor", 1), (7, 0.25, "floor", 1), (7, 0.25, "ceil", 2), (100, 0.07, "ceil", 7), (5, 1.0, "floor", 5)],
)
def test_how_many_components_score_an_image(count: int, share: float, top: Any, expected: int) -> None:
    scores = np.random.default_rng(0).permutation(count).astype(np.float64)
    found = image_score(scores, TileSettings(top_share=share, top_rounding=top))
    assert found == np.arange(count)[count - expected :].mean()


# Runs on its own, so that the highest use of memory is that of one image.
LARGE = """
from pathlib import Path
import numpy as np
from zsad.engine.methods.bitmasks import pack
from zsad.engine.methods.foreground import combined
from zsad.engine.config import StageSettings
from zsad.engine.methods.component_wise import TileMean
from zsad.engine.methods.tiles import components, tiles, with_parts

def highest():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

height, width = 5760, 7840
settings = StageSettings()
tile = np.ones((400, 392), bool)
tile[350:] = tile[:, 340:] = False
found = np.tile(tile, (14, 20))  # of 280 plates
found = np.pad(found, ((0, height - len(found)), (0, 0)))
found[5600:] = True  # joins none; 160 rows, elongated
masks = [pack(np.ones((40, 50), bool), x, y) for y in range(0, 5600, 400) for x in range(3, width, 392)]
masks += [pack(np.ones((200, 250), bool), x, y) for y in range(0, 5600, 400) for x in range(5, width, 392)]
masks += [pack(np.ones((160, 300), bool), x, 5600) for x in range(0, 7500, 100)]
masks += [pack(found)] * 300
Path("/proc/self/clear_refs").write_text("5")  # the highest use starts again from the present one
before = highest()
foreground = combined(found, masks, settings.foreground)
labels, parts = components(foreground.pixels, settings.tiles.min_component)
parts = with_parts(labels, parts, foreground.parts)
del labels
laid = list(tiles(parts, found.shape, settings.tiles))
mean = TileMean(found.shape, len(laid))
for tile in laid:
    mean.add(tile.box, np.ones((352, 352), np.float32))
pixels = mean.finish()
print(len(parts), len(laid), parts[0].parts, parts[-1].parts, int(pixels.max()), highest() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_of_a_large_image() -> None:
    result = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    *facts, highest = map(int, result.stdout.split())
    assert facts == [281, 280 + 95, 2, 75, 1]
    # The foreground, its labels, the bytes that OpenCV takes for these, and little more.
    assert highest < 9 * 5760 * 7840


def laid_tiles(foreground: Path, **settings: Any) -> tuple[int, list[Any]]:
    """Return how many components a foreground picture has, and the tiles of side 32 and more."""
    with Image.open(foreground) as file:
        pixels = np.asarray(file) > 0
    _, found = components(pixels, 0.001)
    return len(found), list(tiles(found, pixels.shape, TileSettings(min_side=32, **settings)))


def as_network_inputs(picture: NDArray[np.uint8], laid: list[Any], side: int) -> list[NDArray[np.uint8]]:
    """Return the tiles of a picture at the size that a network has them resized to."""
    crops = (Image.fromarray(np.ascontiguousarray(cut(picture, tile.box))) for tile in laid)
    return [np.asarray(crop.resize((side, side), Image.Resampling.BICUBIC)) for crop in crops]


@pytest.mark.long
@pytest.mark.parametrize(
    ("preset", "side", "references", "pad"),
    [
        ("winclip", 96, True, "clamp"),
        pytest.param("winclip", 96, False, "reflect", marks=pytest.mark.long),
        pytest.param("april-gan", 98, False, "clamp", marks=pytest.mark.long),
    ],
)
def test_a_method_sees_tiles_as_it_sees_images(
    infer: Callable[..., int],
    golden_pictures: list[NDArray[np.uint8]],
    preset: str,
    side: int,
    references: bool,
    pad: str,
) -> None:
    picture, good = golden_pictures[:2]
    save_pictures("nuts", picture)
    save_pictures("good", good)
    common = ["--object", "nut", "--foreground", "isnet"]
    own = {"tiles": f'pad = "{pad}"'}
    few = ["--reference", "good"] if references else []
    assert infer(preset, "nuts", *common, "--components", "--keep-stages", "--batch-size", "2", *few, **own) == 0

    count, laid = laid_tiles(Path("out/nuts/stages/0-foreground.png"), pad=pad)
    assert count == len(laid) == 5
    save_pictures("tiles", *as_network_inputs(picture, laid, side))
    if references:
        assert infer(preset, "good", *common, "--keep-stages", "--output", "good-out", **own) == 0
        _, of_good = laid_tiles(Path("good-out/good/stages/0-foreground.png"), pad=pad)
        save_pictures("good-tiles", *as_network_inputs(good, of_good, side))
        few = ["--reference", "good-tiles"]
    assert infer(preset, "tiles", "--object", "nut", "--foreground", "none", "--output", "apart", *few) == 0
    tile_scores, tile_maps = scores_and_maps("apart", "tiles")
    mean = TileMean(picture.shape[:2], len(laid))
    for tile, tile_map in zip(laid, tile_maps, strict=True):
        mean.add(tile.box, tile_map)
    (score,), (found,) = scores_and_maps("out", "nuts")
    np.testing.assert_allclose(found, mean.finish(), atol=1e-5)
    per_component = component_scores(tile_scores, [tile.component for tile in laid], count)
    assert score == pytest.approx(image_score(per_component, TileSettings()), abs=2e-6)  # scores are written rounded
    assert not found.all()  # nothing looks beside the tiles


@pytest.mark.long
def test_references_are_tiles_of_components_too(
    infer: Callable[..., int], golden_pictures: list[NDArray[np.uint8]], capsys: pytest.CaptureFixture[str]
) -> None:
    save_pictures("nuts", golden_pictures[0])
    golden_pictures[0][0, 0] ^= 1  # another picture with the same tiles
    save_pictures("good", golden_pictures[0])
    common = ["--foreground", "isnet", "--components", "--object", "nut", "-v"]
    assert infer("winclip", "nuts", *common, "--reference", "good") == 0
    assert "5 known-good images take" in capsys.readouterr().err
    assert infer("winclip", "nuts", *common, "--output", "zero") == 0
    with_references, without = scores_and_maps("out", "nuts"), scores_and_maps("zero", "nuts")
    np.testing.assert_allclose(with_references[0], without[0] / 2, atol=1e-5)


@pytest.mark.long
def test_parts_of_the_background_within_tiles_can_be_dropped(
    infer: Callable[..., int], golden_pictures: list[NDArray[np.uint8]]
) -> None:
    save_pictures("nuts", golden_pictures[0])
    common = ["--foreground", "isnet", "--components"]
    assert infer("winclip", "nuts", *common) == 0
    assert infer("winclip", "nuts", *common, "--keep-stages", "--output", "own", tiles="mask_background = true") == 0
    with Image.open("own/nuts/stages/0-foreground.png") as file:
        inside = np.asarray(file) > 0
    (_, (found,)), (_, (whole,)) = scores_and_maps("own", "nuts"), scores_and_maps("out", "nuts")
    np.testing.assert_array_equal(found, np.where(inside, whole, 0))
    assert whole[~inside].any()


def odd_images() -> dict[str, NDArray[np.uint8]]:
    """Pictures that hardly have an object: none may stop a run."""
    rng = np.random.default_rng(0)
    specks = np.full((300, 400, 3), 20, np.uint8)
    specks[::6, ::6] = specks[1::6, 1::6] = 255
    specks[100:200, 100:220] = rng.integers(150, 255, (100, 120, 3))
    return {
        "small": rng.integers(0, 255, (20, 30, 3), np.uint8),
        "pixel": np.full((1, 1, 3), 200, np.uint8),
        "row": np.full((1, 300, 3), 200, np.uint8),
        "background": np.full((60, 80, 3), 20, np.uint8),
        "specks": specks,
    }


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["clamp", pytest.param("reflect", marks=pytest.mark.slow)])
def test_odd_images_have_results_and_damaged_ones_are_named(
    infer: Callable[..., int], capsys: pytest.CaptureFixture[str], pad: str
) -> None:
    images = odd_images()
    Path("nuts").mkdir()
    for name, pixels in images.items():
        Image.fromarray(pixels).save(f"nuts/{name}.png")
    Path("nuts/damaged.png").write_bytes(Path("nuts/specks.png").read_bytes()[:500])
    options = ["--foreground", "isnet+sam", "--components", "--keep-stages"]
    assert infer("winclip", "nuts", *options, tiles=f'pad = "{pad}"') == 1
    assert "nuts/damaged.png: skipped" in capsys.readouterr().err
    scores, maps = scores_and_maps("out", "nuts")
    assert len(scores) == len(images)
    for name, found in zip(sorted(images), maps, strict=True):
        assert found.shape == images[name].shape[:2]
        assert np.isfinite(found).all()
    with Image.open("out/nuts/stages/background-foreground.png") as file:
        assert np.asarray(file).all()  # where nothing is an object, all is looked at


@pytest.mark.slow
def test_specks_beside_an_object_are_dropped_and_alone_looked_at(infer: Callable[..., int]) -> None:
    specks = np.full((128, 128, 3), 20, np.uint8)
    specks[::12, ::12] = 255
    both = specks.copy()
    both[30:70, 50:90] = 200
    save_pictures("nuts", both, specks)
    options = ["--foreground", "isnet", "--components"]
    assert infer("winclip", "nuts", *options, "--keep-stages") == 0
    count, laid = laid_tiles(Path("out/nuts/stages/0-foreground.png"))
    assert count == len(laid) == 1
    count, laid = laid_tiles(Path("out/nuts/stages/1-foreground.png"))
    assert count == len(laid) == 121
    _, (around_object, around_specks) = scores_and_maps("out", "nuts")
    box = laid_tiles(Path("out/nuts/stages/0-foreground.png"))[1][0].box
    outside = np.ones((128, 128), bool)
    outside[box.y0 : box.y1, box.x0 : box.x1] = False
    assert not around_object[outside].any()
    assert around_object[~outside].all()
    assert around_specks.all()


# Runs on its own, so that the highest use of memory is that of one run.
BOARD = """
import sys
from pathlib import Path
from zsad.engine.commands.infer import main

def highest():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

options = ["--preset", "vvv", "--config", "tiny.toml", "--device", "cpu", "--workers", "2", "-q"]
options += ["--runtime", "onnxruntime"]  # else it is found out first which is faster
assert main(["little", *options, "--output", "little-out"]) == 0  # libraries, graphs and text vectors are there
Path("/proc/self/clear_refs").write_text("5")  # the highest use starts again from the present one
before = highest()
assert main(["board", *options]) == 0
print(highest() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_of_a_large_board_through_all_stages(
    infer: Callable[..., int], tmp_path: Path, golden_pictures: list[NDArray[np.uint8]]
) -> None:
    height, width = 5800, 7800
    board = np.full((height, width, 3), 40, np.uint8)
    rng = np.random.default_rng(0)
    for y in range(140, height, 1160):
        for x in range(90, width, 780):
            board[y : y + 300, x : x + 200] = rng.integers(150, 255, 3)
            board[y + 50 : y + 80, x + 20 : x + 50] = rng.integers(150, 255, 3)
    save_pictures("board", board)
    save_pictures("little", golden_pictures[0])
    isnet = write_bright_isnet(tmp_path / "bright.onnx", 1024)
    assert infer("vvv", "little", replaced={"isnet": isnet}, isnet_size=1024, tiles="min_component = 0.0005") == 0
    result = subprocess.run([sys.executable, "-c", BOARD], capture_output=True, text=True, check=True)
    (image,) = json.loads(Path("out/board/category.json").read_text())["images"]
    assert (image["width"], image["height"]) == (width, height)
    (found,) = scores_and_maps("out", "board")[1]
    assert all(found[y + 150, x + 100] > 0 for y in range(140, height, 1160) for x in range(90, width, 780))
    assert found[: height // 2, :5].max() == 0  # before the first tiles
    # Scoring: the image's pixels, foreground, labels or sums. Writing: Pillow's pixels and NumPy's, or three maps.
    assert int(result.stdout) < 19 * height * width
