"""Scenes of objects, and what stands in for networks that cannot find them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad.bench.scenes import PLACES, RADII, SIDE, bright_parts, discs, draw_scenes
from zsad.engine.config import TileSettings
from zsad.engine.methods.tiles import components


@pytest.mark.slow
def test_bright_parts_are_the_objects(tmp_path: Path) -> None:
    (file, _) = sorted(draw_scenes(tmp_path / "scenes", 2).iterdir())
    scene = np.asarray(Image.open(file))
    assert scene.shape == (SIDE, SIDE, 3)
    images = scene.transpose(2, 0, 1)[None].astype(np.float32) / 255 - 0.5
    (foreground,) = bright_parts({"images": images})["foreground"]
    _, found = components(foreground.astype(bool), TileSettings().min_component)
    centres = [((each.box.x0 + each.box.x1) / 2, (each.box.y0 + each.box.y1) / 2) for each in found]
    expected = [(x + side / 2, y + side / 2) for x, y, side in PLACES]
    np.testing.assert_allclose(sorted(centres), sorted(expected), atol=12)


def test_discs_lie_around_their_points() -> None:
    points = np.array([[512, 256], [1, 1023]], np.float32)
    found = discs(points, 256, 1024)
    assert found["logits"].shape == (2, 3, 256, 256)
    rows, columns = np.nonzero(found["logits"][0, 1] > 0)
    assert (rows.mean(), columns.mean()) == (64, 128)
    assert np.hypot(rows - 64, columns - 128).max() < RADII[1]
    assert found["logits"][1, 2].argmax() == 255 * 256
    assert found["iou"].shape == (2, 3)
