"""Image files in, batches of network inputs out: in order, decoded in threads, on the host or on a device."""

import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.kernels.machine import stopwatch

from .ahead import Ahead
from .categories import InputImage
from .decode import Recipe, decode, network_input, pixels
from .remote import Location, asked_ahead
from .stored import ImageError, read_header

if TYPE_CHECKING:
    from zsad.kernels.cuda.device import Device

    from .device_jpegs import DeviceJpegs

Array = Any  # a NumPy array, or an array on the device


@dataclass(frozen=True)
class Batch:
    """Images that were read together."""

    indices: list[int]  # of the readable ones, within their category
    inputs: Mapping[Recipe, Array]  # [B, 3, S, S] float32 each; valid until the next batch is asked for
    failures: list[tuple[int, str]]  # the other ones, and why they have no input
    images: Sequence[NDArray[np.uint8]] = ()  # [H, W, 3] RGB each, where the loader keeps them
    seconds: Sequence[float] = ()  # that reading each has taken, where the loader has read them


@dataclass(frozen=True)
class _Failure:
    """Stands for an image that cannot be read: its error would keep alive, by its traceback, what it has decoded."""

    reason: str


class Inputs(Protocol):
    """Makes network inputs of decoded images."""

    def read(self, path: Location, bit_depth: int | None) -> tuple[Any, Image.Image | None]:
        """Read a file in a worker thread; returns what `batch` takes, and the image if it was decoded on the host.

        Raises ImageError.
        """

    def prepare(self, image: Image.Image | NDArray[np.uint8]) -> Any:
        """Return what `batch` takes of an image, or pixels [H, W, 3], decoded already."""

    def batch(self, images: Sequence[Any]) -> AbstractContextManager[Mapping[Recipe, Array]]:
        """Make inputs [B, 3, S, S] of what `read` has given, valid within the context."""


class HostInputs:
    """Network inputs in host memory."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self._recipes = recipes

    def read(self, path: Location, bit_depth: int | None) -> tuple[dict[Recipe, NDArray[np.float32]], Image.Image]:
        image = decode(path, bit_depth)
        return self.prepare(image), image

    def prepare(self, image: Image.Image | NDArray[np.uint8]) -> dict[Recipe, NDArray[np.float32]]:
        return {recipe: network_input(image, recipe) for recipe in self._recipes}  # [3, S, S] each

    def batch(self, images: Sequence[Any]) -> AbstractContextManager[Mapping[Recipe, Array]]:
        if len(images) == 1:
            return nullcontext({recipe: values[None] for recipe, values in images[0].items()})
        return nullcontext({recipe: np.stack([image[recipe] for image in images]) for recipe in self._recipes})


class DeviceInputs:
    """Network inputs on a device.

    Images are uploaded and resized on one stream into one of two inputs while the networks read the other one on the
    stream of the passes; the host waits for neither.
    """

    def __init__(
        self, device: "Device", recipes: Sequence[Recipe], batch_size: int, jpegs: "DeviceJpegs | None"
    ) -> None:
        """jpegs: decodes on the device; None leaves all files to Pillow."""
        self._device, self._jpegs = device, jpegs
        self._inputs: list[dict[Recipe, Array]] = [
            {recipe: device.empty((batch_size, 3, recipe.size, recipe.size), np.float32) for recipe in recipes}
            for _ in range(2)
        ]
        self._slot = 0
        self._held: list[Sequence[Array]] = [(), ()]  # images on the device, which may still be reading them

    def read(self, path: Location, bit_depth: int | None) -> tuple[Array, Image.Image | None]:  # [h, w, 3] uint8
        on_device = None if self._jpegs is None else self._jpegs.decode(path)
        if on_device is not None:
            return on_device, None
        image = decode(path, bit_depth)
        return self.prepare(image), image

    def prepare(self, image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:  # [rows, columns, 3]
        return np.asarray(image)

    @contextmanager
    def batch(self, images: Sequence[Any]) -> Iterator[Mapping[Recipe, Array]]:
        from zsad.kernels.cuda.images import network_input as network_input_on_device

        self._slot = 1 - self._slot
        self._device.wait(("images", self._slot))
        self._held[self._slot] = [image for image in images if not isinstance(image, np.ndarray)]
        with self._device.producing(("images", self._slot)):
            for index, image in enumerate(images):
                on_device = image
                if isinstance(image, np.ndarray):
                    on_device = self._device.empty(image.shape, np.uint8)
                    self._device.upload(image, on_device)
                rows, columns, _ = on_device.shape
                for recipe, batch in self._inputs[self._slot].items():
                    assert recipe.resampling != "unfiltered", "such inputs are made on the host"
                    network_input_on_device(
                        self._device,
                        on_device,
                        batch[index],
                        recipe.resampling,
                        recipe.mean,
                        recipe.deviation,
                        recipe.resized(rows, columns),
                    )
        with self._device.consuming(("images", self._slot)):
            yield {recipe: batch[: len(images)] for recipe, batch in self._inputs[self._slot].items()}


def batches_of(
    count: int, part: Callable[[int], NDArray[np.uint8]], inputs: Inputs, batch_size: int
) -> Iterator[Batch]:
    """Yield parts of images [h, w, 3], numbered from 0, as methods take images."""
    for start in range(0, count, batch_size):
        members = range(start, min(start + batch_size, count))
        prepared = [inputs.prepare(part(member)) for member in members]
        with inputs.batch(prepared) as arrays:
            yield Batch(list(members), arrays, [])


def held_bytes(path: Location) -> int:
    """Return what an image takes while it is worked on; nothing where it cannot be read, which reading will say."""
    try:
        return read_header(path).bytes
    except ImageError:
        return 0


@dataclass(frozen=True)
class Loader:
    """Reads images in batches of at most `batch_size`."""

    inputs: Inputs
    batch_size: int
    workers: int  # threads that decode
    memory_limit: int  # bytes that images on their way may take
    timings: MutableMapping[str, float]
    keep_images: bool = False  # in the batches, as they were decoded

    def batches(
        self,
        images: Sequence[InputImage],
        members: Sequence[int],
        bit_depth: int | None,
        seen: Callable[[int, Image.Image | None], None],
    ) -> Iterator[Batch]:
        """Yield the images with these numbers; batches are full except the last.

        bit_depth: of the values in 16-bit files; None: all 16. seen: is told of every image that was read, in a worker
        thread, as `Inputs.read` gives it. Raises what `seen` raises, but for ImageError and a lack of memory.
        """

        def read(index: int, last_try: bool) -> Any:
            start = time.perf_counter()
            try:
                prepared, image = self.inputs.read(images[index].path, bit_depth)
                seen(index, image)
                # Pillow has four bytes for each pixel.
                kept = pixels(image) if self.keep_images and image is not None else None
                return prepared, kept, time.perf_counter() - start
            except MemoryError as error:
                if not last_try:
                    raise
                return _Failure(str(error) or "not enough memory for it")
            except ImageError as error:
                return _Failure(str(error))

        def results() -> Iterator[tuple[int, Any]]:
            sizes = asked_ahead((images[index].path for index in members), held_bytes)
            for index, size in zip(members, sizes, strict=True):
                yield from ahead.put(index, size)
            yield from ahead.rest()

        most = self.batch_size + self.workers
        with Ahead(read, self.workers, most, self.memory_limit, "decode") as ahead:
            following = results()
            while True:
                indices: list[int] = []
                prepared: list[Any] = []
                kept: list[NDArray[np.uint8]] = []
                seconds: list[float] = []
                failures: list[tuple[int, str]] = []
                with stopwatch(self.timings, "decode"):
                    for index, result in following:
                        if isinstance(result, _Failure):
                            failures.append((index, result.reason))
                        else:
                            indices.append(index)
                            prepared.append(result[0])
                            kept += [result[1]] if self.keep_images else []
                            seconds.append(result[2])
                        if len(indices) == self.batch_size:
                            break
                if not indices:
                    if failures:
                        yield Batch([], {}, failures)
                    return
                with self.inputs.batch(prepared) as inputs:
                    yield Batch(indices, inputs, failures, kept, seconds)
