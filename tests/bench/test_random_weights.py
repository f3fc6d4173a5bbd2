"""Random weights in the published shapes."""

import pytest

from zsad.bench.random_weights import STATES
from zsad.bench.towers import SHAPES
from zsad.engine.config import load_config
from zsad.engine.methods.method import method_class
from zsad.engine.presets.names import preset_names
from zsad.export.checkpoints import read_manifest


@pytest.mark.parametrize("preset", preset_names())
def test_every_network_of_a_preset_has_random_weights(preset: str) -> None:
    config = load_config(preset, method_of=method_class)
    assert {spec.checkpoint for spec in config.specs.values()} <= {*SHAPES, *STATES}


def test_they_have_names_of_the_manifest() -> None:
    assert {*SHAPES, *STATES} <= set(read_manifest())
