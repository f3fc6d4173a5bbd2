"""Text vectors: run once, kept in the cache, and the tower dropped in between."""

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zsad.engine.networks.network import TensorSpec
from zsad.engine.text.vectors import TextVectors


class Tower:
    """Gives every text its first eight ids."""

    def __init__(self) -> None:
        self.inputs = {"ids": TensorSpec((16,), np.dtype(np.int32))}
        self.outputs = {"embedding": TensorSpec((8,), np.dtype(np.float32))}
        self.largest_batch = 2

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"embedding": inputs["ids"][:, :8].astype(np.float32)}


@pytest.fixture
def towers(tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TextVectors, list]:
    """Text vectors in an empty cache, and a weak reference to each tower that was loaded."""
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path))
    loaded: list[weakref.ref[Tower]] = []

    def load(name: str) -> Tower:
        tower = Tower()
        loaded.append(weakref.ref(tower))
        return tower

    network = SimpleNamespace(sha256="0", spec=SimpleNamespace(activation="gelu"))
    return TextVectors({"clip": network}, "fp32", load, np.asarray, np.asarray), loaded


@pytest.mark.slow
def test_a_tower_is_loaded_for_new_words_and_dropped_again(towers: tuple[TextVectors, list]) -> None:
    vectors, loaded = towers
    bolt = vectors.of("clip", ["a bolt", "a broken bolt", "bolts"])
    assert bolt.shape == (3, 8)
    gc.collect()
    assert [tower() for tower in loaded] == [None]
    np.testing.assert_array_equal(vectors.of("clip", ["a bolt", "a broken bolt", "bolts"]), bolt)
    assert len(loaded) == 1
    assert not np.array_equal(vectors.of("clip", ["a nut", "a broken nut", "nuts"]), bolt)
    gc.collect()
    assert [tower() for tower in loaded] == [None, None]


def test_damaged_vectors_are_computed_again(
    towers: tuple[TextVectors, list], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vectors, loaded = towers
    bolt = vectors.of("clip", ["a bolt"])
    (kept,) = (tmp_path / "text").iterdir()
    content = bytearray(kept.read_bytes())
    content[-2] ^= 1
    kept.write_bytes(content)
    np.testing.assert_array_equal(vectors.of("clip", ["a bolt"]), bolt)
    assert len(loaded) == 2
    assert caplog.messages == [f"{kept}: damaged, it is made anew"]
