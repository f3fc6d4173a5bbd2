"""Loader: batches in order and full, whatever fails in between; failures hold no memory."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_build import HostDevice
from PIL import Image

from zsad.engine.images.categories import HERE, ImageFolder, InputImage
from zsad.engine.images.decode import recipe
from zsad.engine.images.loader import DeviceInputs, HostInputs, Inputs, Loader
from zsad.engine.images.stored import ImageError

TINY = recipe("imagenet", 2)


class Numbers:
    """Reads no file: the input of image n is full of n, unless something else happens to it."""

    def __init__(self, happens: Callable[[int], None]) -> None:
        self.happens = happens

    def read(self, path: Path, bit_depth: int | None) -> tuple[Any, Image.Image]:
        number = int(path.name)
        self.happens(number)
        return np.full((3, 2, 2), number, np.float32), Image.new("RGB", (1, 1), (number, 0, 0))

    def batch(self, images: Sequence[Any]) -> AbstractContextManager[Mapping[Any, Any]]:
        return nullcontext({TINY: np.stack(images)})


def loader(inputs: Inputs, batch_size: int = 3) -> Loader:
    return Loader(inputs, batch_size, workers=2, memory_limit=1 << 20, timings={"decode": 0.0})


def images(paths: Sequence[Path]) -> list[InputImage]:
    return [InputImage(ImageFolder(path.parent, HERE, HERE), path.name) for path in paths]


NUMBERED = images([Path(str(number)) for number in range(20)])


def test_batches_are_in_order_and_full_except_the_last() -> None:
    def happens(number: int) -> None:
        if number in (1, 4, 5, 9):
            raise ImageError(f"no image {number}")

    seen: list[int] = []
    members = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    batches = loader(Numbers(happens)).batches(NUMBERED, members, None, lambda index, image: seen.append(index))
    taken = []
    for batch in batches:
        inputs = batch.inputs[TINY] if batch.indices else np.empty((0, 3, 2, 2))
        assert inputs[:, 0, 0, 0].tolist() == batch.indices
        taken.append((batch.indices, batch.failures))
    assert taken == [
        ([0, 2, 3], [(1, "no image 1")]),
        ([6, 7, 8], [(4, "no image 4"), (5, "no image 5")]),
        ([], [(9, "no image 9")]),
    ]
    assert sorted(seen) == [0, 2, 3, 6, 7, 8]


def test_images_on_a_device_stay_until_their_slot_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        shape = (2, 2, 3)

    monkeypatch.setattr("zsad.kernels.cuda.images.network_input", lambda *_: None)
    device = HostDevice()
    inputs = DeviceInputs(device, [TINY], 1, None)
    held: list[weakref.ref[OnDevice]] = []
    for turn in range(3):
        images = [OnDevice()]
        held.append(weakref.ref(images[0]))
        with inputs.batch(images):
            images.clear()  # as the loader forgets them
        assert device.waited == [("images", (slot + 1) % 2) for slot in range(turn + 1)]
    assert [reference() is None for reference in held] == [True, False, False]


def test_failures_keep_nothing_alive_that_was_decoded_before() -> None:
    held: list[weakref.ref[np.ndarray]] = []

    def happens(number: int) -> None:
        decoded = np.zeros(10)
        held.append(weakref.ref(decoded))
        try:
            raise ValueError("truncated")
        except ValueError as error:
            raise ImageError("damaged") from error

    (batch,) = loader(Numbers(happens)).batches(NUMBERED, range(5), None, lambda index, image: None)
    assert [index for index, _ in batch.failures] == [0, 1, 2, 3, 4]
    assert [reference() for reference in held] == [None] * 5


def test_an_image_without_memory_is_tried_again_and_then_a_failure() -> None:
    tries: list[int] = []

    def happens(number: int) -> None:
        tries.append(number)
        if number == 2 or (number == 0 and tries.count(0) == 1):
            raise MemoryError

    (batch,) = loader(Numbers(happens)).batches(NUMBERED, range(3), None, lambda index, image: None)
    assert (batch.indices, batch.failures) == ([0, 1], [(2, "not enough memory for it")])
    assert [tries.count(number) for number in range(3)] == [2, 1, 2]


def test_errors_of_who_is_told_are_raised() -> None:
    def seen(index: int, image: Image.Image | None) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(loader(Numbers(lambda number: None)).batches(NUMBERED, range(3), None, seen))


def test_files_on_the_host(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (5, 4), (255 * (number == 1), 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_text("words")
    found = images([tmp_path / f"{number}.png" for number in (0, 1, 2, 3)])
    (batch,) = loader(HostInputs([TINY]), batch_size=8).batches(found, range(4), None, lambda index, image: None)
    assert batch.indices == [0, 1]
    inputs = batch.inputs[TINY]
    assert inputs.shape == (2, 3, 2, 2)
    red, rest = inputs[1, 0] - inputs[0, 0], inputs[1, 1:] - inputs[0, 1:]
    np.testing.assert_allclose(red, 1 / TINY.deviation[0], atol=1e-6)
    np.testing.assert_allclose(rest, 0, atol=1e-6)
    assert [(index, reason.split(",")[0]) for index, reason in batch.failures] == [
        (2, "not a PNG"),
        (3, "no longer there"),
    ]
