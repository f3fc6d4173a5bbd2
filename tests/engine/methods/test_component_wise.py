"""Tiles of components put together again: maps and scores of images."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zsad.engine.config import TileSettings
from zsad.engine.images.decode import bilinear
from zsad.engine.methods.bitmasks import Box
from zsad.engine.methods.component_wise import TileMean, component_scores, image_score

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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_of_a_large_image() -> None:
    result = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    *facts, highest = map(int, result.stdout.split())
    assert facts == [281, 280 + 95, 2, 75, 1]
    # The foreground, its labels, the bytes that OpenCV takes for these, and little more.
    assert highest < 9 * 5760 * 7840
