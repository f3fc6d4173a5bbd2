"""The benchmark of banks, small: features that it draws, and a record of each bank beside the network."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from zsad.bench import banks


def make_tokens(images: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.normal(size=(images, 2, 25, 16)).astype(np.float32))


def test_features_are_of_taps_then_degrees() -> None:
    tokens = make_tokens(3)
    features = banks.features_of(tokens, (1, 3), 75)  # all patches
    assert [vectors.shape for vectors in features] == [(75, 16)] * 4
    np.testing.assert_array_equal(features[2][25:50], banks.units_of(tokens[1][1], 1))
    assert [vectors.shape for vectors in banks.features_of(tokens, (1,), 20)] == [(20, 16)] * 2


def test_banks_of_the_same_size_come_from_few_and_many_images() -> None:
    sizes = banks.sizes_of((4, 40), 100, 300)
    assert sizes["300 of 4 images"] == (4, 300)
    assert sizes["300 of 40 images"] == (40, 300)
    assert sizes["1 % of 40 images"] == (40, 40)
    assert sizes["100 % of 40 images"] == (40, 4000)


def test_distances_that_are_off_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks, "CHECKED", 40)
    assert banks.validate(make_tokens(3), (1, 3)) < banks.GAP
    monkeypatch.setattr(banks.Memory, "distances", lambda self, tokens: np.zeros(25))
    with pytest.raises(SystemExit, match="nothing was timed"):
        banks.validate(make_tokens(3), (1, 3))


@pytest.mark.slow
def test_a_record_holds_every_bank(
    random_dinov2: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(banks, "use_random_weights", lambda config, folder: (with_weights(config), {"dinov2": "tiny"}))

    def with_weights(config):  # type: ignore[no-untyped-def]
        specs = {name: spec.model_copy(update={"checkpoint": weights}) for name, spec in config.networks.items()}
        return config.model_copy(update={"networks": specs})

    weights, output = str(random_dinov2(width=64, depth=12)), tmp_path / "out.jsonl"
    arguments = ["--image-size", "70", "--images", "4", "6", "--size", "50", "--repeats", "2"]
    assert banks.main([*arguments, "--output", str(output)]) == 0
    record = json.loads(output.read_text("utf-8"))
    assert list(record["seconds"]) == ["network", *record["sizes"]]
    assert record["sizes"]["50 of 6 images"] == [6, 50]
    assert all(len(times) == 2 for times in record["seconds"].values())
