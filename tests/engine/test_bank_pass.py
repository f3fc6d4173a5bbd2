"""Networks over known-good images: what they give lies in host memory, whatever a device has left."""

from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from banks import place_of
from pictures import touch_images

from zsad.engine.bank_pass import known_good, network_tokens
from zsad.engine.config import load_config
from zsad.engine.methods.method import method_class
from zsad.kernels.machine import scratch


@pytest.mark.parametrize(("of_device", "of_host", "resident"), [(1 << 40, 1000, False), (1000, 1 << 40, True)])
def test_tokens_are_in_memory_where_the_host_has_enough(
    of_device: int, of_host: int, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def watched(shape: tuple[int, ...], in_memory: bool) -> AbstractContextManager[Any]:
        asked.append(in_memory)
        return scratch(shape, in_memory)

    monkeypatch.setattr("zsad.engine.bank_pass.scratch", watched)
    monkeypatch.setattr("zsad.engine.bank_pass.default_memory_limit", lambda: of_host)
    place = place_of(load_config("small", overrides={"image_size": 42}, method_of=method_class))
    object.__setattr__(place, "arrays", SimpleNamespace(device="a device", limit=lambda: of_device))
    loader = SimpleNamespace(batches=lambda *_: ())
    workplace: Any = SimpleNamespace(place=place, arrays=place.arrays, loader=loader, timings={}, cutter=None)
    images: Any = range(7)
    with network_tokens(images, 8, workplace, lambda *_: None) as found:
        assert not found.indices
    assert asked == [resident]


def test_known_good_images_of_several_folders_are_named(tmp_path: Path) -> None:
    touch_images(tmp_path, "good/tile/0.png", "good/cell/0.png", "part/train/good/0.png", "flat/0.png", "flat/b/0.png")
    (note,) = known_good(str(tmp_path / "good"), None, 0).notes
    assert note.startswith(f"the folders cell, tile of {tmp_path / 'good'} are taken as one product")
    assert note.endswith("/good/cell --save-bank BANKS/cell.zsad")
    for single in ("good/tile", "part", "flat"):
        assert not known_good(str(tmp_path / single), None, 0).notes
