"""Random weights in the published shapes."""

from pathlib import Path

import pytest

from zsad.bench import random_weights
from zsad.bench.random_weights import STATES, text_state, write_states
from zsad.bench.towers import SHAPES, Shape, tower_state
from zsad.engine.config import load_config
from zsad.engine.methods.method import method_class
from zsad.engine.presets.names import preset_names
from zsad.export.checkpoints import read_manifest
from zsad.export.text_transformer import VOCABULARY, read_text_transformer
from zsad.export.vision_transformer import CLIP


@pytest.mark.parametrize("preset", preset_names())
def test_every_network_of_a_preset_has_random_weights(preset: str) -> None:
    config = load_config(preset, method_of=method_class)
    assert {spec.checkpoint for spec in config.specs.values()} <= {*SHAPES, *STATES}


def test_they_have_names_of_the_manifest() -> None:
    assert {*SHAPES, *STATES} <= set(read_manifest())


def test_the_configuration_names_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(random_weights, "write_random", lambda name, path: written.append((name, path)))
    assert random_weights.main(["--preset", "vvv", str(tmp_path)]) == 0
    preset, config = (load_config("vvv", file, method_of=method_class) for file in (None, tmp_path / "vvv.toml"))
    assert [(preset.specs[name].checkpoint, Path(spec.checkpoint)) for name, spec in config.specs.items()] == written
    assert {name: spec.image_size for name, spec in preset.specs.items()} == {
        name: spec.image_size for name, spec in config.specs.items()
    }


def test_text_towers_are_read(tmp_path: Path) -> None:
    images = tower_state(Shape(CLIP, 64, 1, projection=64))
    tower = read_text_transformer(write_states(tmp_path / "clip.safetensors", text_state(64), images))
    assert (tower.vocabulary, len(tower.blocks), tower.projection.shape) == (VOCABULARY, 12, (64, 64))
