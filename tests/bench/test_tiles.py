"""The tiles' benchmark, small: what it draws, plants and counts."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad.bench import tiles
from zsad.bench.tiles import Defect, detection, enlarged, places, plant


def test_a_small_image_fills_a_large_one() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    values = enlarged(image, 110, 150, np.random.default_rng(0))
    assert values.shape == (150, 110, 3)
    noise = values[:, :40] - values[:, 79:39:-1]  # the mirrored picture, but for its own noise
    assert np.abs(noise).mean() < 3 * tiles.NOISE


def test_defects_lie_apart_and_are_as_large_as_they_are_said_to_be() -> None:
    found = places(2000, 800, np.random.default_rng(0))
    assert [one.size for one in found] == [4, 8, 16] * tiles.OF_EACH
    image = np.full((800, 2000, 3), 100, np.float32)
    plant(image, found, np.random.default_rng(0))
    areas = [np.abs(image[one.y - 20 : one.y + 20, one.x - 20 : one.x + 20, 0] - 100).sum() / 60 for one in found]
    assert areas == pytest.approx([np.pi * one.size**2 / 4 for one in found], rel=0.05)
    assert (image != 100).any(axis=2).sum() < 1.5 * sum(areas)


def test_found_is_what_lies_above_clean_images() -> None:
    maps = [np.zeros((200, 200), np.float32) for _ in range(4)]
    maps[0][5, 5], maps[2][7, 7] = 0.3, 0.5
    maps[1][100, 100], maps[1][30, 30], maps[1][170, 170] = 0.4, 0.9, 0.2
    defects = {1: [Defect(100, 100, 4), Defect(35, 25, 8)], 3: [Defect(100, 100, 16)]}
    assert detection(maps, defects) == {"4": 0.5, "8": 1.0, "16": 0.0}


@pytest.mark.slow
def test_from_pictures_to_a_record(
    tiny: Path, tmp_path: Path, workplace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "APART", 20)
    monkeypatch.setattr(tiles, "NEAR", 4)
    for label in ("good", "bad"):
        (tmp_path / "sets" / "part" / "test" / label).mkdir(parents=True)
        for number in range(4):
            values = np.random.default_rng(number).normal(128, 5, (70, 90, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / "sets" / "part" / "test" / label / f"{number}.png")
    arguments = ["sets", "--images", "4", "--width", "150", "--height", "150", "--tile", "70"]
    assert tiles.main([*arguments, "--config", str(tiny / "config.toml"), "--output", "tiles.jsonl"]) == 0
    records = [json.loads(line) for line in Path("tiles.jsonl").read_text().splitlines()]
    assert [(record["set"], record["way"]) for record in records] == [("part", way) for way in tiles.ways(70)]
    assert all(record["found"].keys() == {"4", "8", "16"} for record in records)
