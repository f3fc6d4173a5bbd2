"""Where the arrays of a run live: in host memory, or on a CUDA device from the decoded image to the patch scores."""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from zsad.kernels import cuda, mutual_scores
from zsad.kernels.cpu import pair_kernel
from zsad.kernels.cuda.device import Device
from zsad.kernels.machine import default_memory_limit, scratch
from zsad.kernels.mutual_scoring import plan_on_cpu

from .config import Config, ConfigError
from .images.decode import Preprocessing, decode, network_input, recipe
from .images.device_jpegs import DeviceJpegs
from .networks.runtime import Backbone, Runtime

Array = Any  # a NumPy array, or an array on the device


class Placement(Protocol):
    """What the pipeline asks of the place that it runs in."""

    fatal: tuple[type[Exception], ...]  # errors after which nothing more can run there

    def decode(self, path: Path) -> Any:
        """Read an image file in a worker thread; raises ImageError."""

    def prepare(self, image: Any) -> Any:
        """Do what belongs to a decoded image alone, in the thread that decoded it."""

    def network_inputs(self, prepared: Sequence[Any]) -> AbstractContextManager[Mapping[Preprocessing, Array]]:
        """Make the backbones' inputs [B, 3, S, S] of prepared images, valid within the context."""

    def share_memory(self, images: int, backbones: Mapping[str, Backbone]) -> tuple[bool, int | None]:
        """Decide whether the tokens of a group stay resident, and how many bytes are left to score them with.

        They stay if they take at most half of the limit and leave enough. Raises MemoryError where nothing is enough.
        """

    def store(self, shape: tuple[int, ...], dtype: DTypeLike, resident: bool) -> AbstractContextManager[Array]:
        """Make room for the tokens or embeddings of a group."""

    def put(self, values: Array, store: Array) -> None:
        """Copy a backbone's output into its part of a store."""

    def fetch(self, store: Array) -> NDArray[Any]:
        """Wait for what is still under way and return a store's content in host memory."""

    def patch_scores(
        self,
        tokens: Array,
        grid: tuple[int, int],
        memory_limit: int | None,
        progress: Callable[[int, int], None],
        timings: MutableMapping[str, float],
        on_plan: Callable[[Any], None],
    ) -> NDArray[np.float32]:
        """Score tokens [N, L, P, C] against each other; returns [N, P]."""


class _Scoring:
    """Mutual scoring as the configuration asks for it, on the CPU or on devices."""

    def __init__(self, config: Config, devices: Sequence[Device], memory_limit: int | None) -> None:
        """devices: none means the CPU. memory_limit: bytes, of each device or of host memory."""
        self._config, self._devices, self._memory_limit = config, devices, memory_limit
        self.fatal = tuple(error for device in devices[:1] for error in device.failures)

    def patch_scores(
        self,
        tokens: Array,
        grid: tuple[int, int],
        memory_limit: int | None,
        progress: Callable[[int, int], None],
        timings: MutableMapping[str, float],
        on_plan: Callable[[Any], None],
    ) -> NDArray[np.float32]:
        config = self._config
        score = partial(cuda.mutual_scores, device=self._devices) if self._devices else mutual_scores
        return score(
            tokens,
            grid,
            config.degrees,
            config.interval,
            precision=config.precision,
            memory_limit=memory_limit,
            progress=progress,
            timings=timings,
            on_plan=on_plan,
        )


class HostPlacement(_Scoring):
    """Backbones on the CPU; scoring there too, or on devices that take the tokens from host memory."""

    def __init__(self, config: Config, devices: Sequence[Device], memory_limit: int | None) -> None:
        super().__init__(config, devices, memory_limit)
        self._kinds = sorted({backbone.preprocessing for backbone in config.backbones.values()})

    def decode(self, path: Path) -> Image.Image:
        return decode(path)

    def prepare(self, image: Image.Image) -> dict[Preprocessing, NDArray[np.float32]]:  # [3, S, S] each
        return {kind: network_input(image, recipe(kind, self._config.image_size)) for kind in self._kinds}

    def network_inputs(self, prepared: Sequence[Any]) -> AbstractContextManager[Mapping[Preprocessing, Array]]:
        return nullcontext({kind: np.stack([image[kind] for image in prepared]) for kind in self._kinds})

    def share_memory(self, images: int, backbones: Mapping[str, Backbone]) -> tuple[bool, int | None]:
        if self._devices:  # the limit is theirs; they plan when they score
            return _token_bytes(images, backbones) <= default_memory_limit() // 2, self._memory_limit

        def check(limit: int) -> None:
            for backbone in backbones.values():
                kernel = pair_kernel(backbone.grid, self._config.degrees, self._config.precision)
                patches = math.prod(backbone.grid)
                plan_on_cpu(kernel, images, patches, backbone.channels, self._config.interval, limit)

        limit = default_memory_limit() if self._memory_limit is None else self._memory_limit
        return _share(limit, _token_bytes(images, backbones), check)

    def store(self, shape: tuple[int, ...], dtype: DTypeLike, resident: bool) -> AbstractContextManager[Array]:
        return scratch(shape, resident, dtype)

    def put(self, values: Array, store: Array) -> None:
        store[...] = values

    def fetch(self, store: Array) -> NDArray[Any]:
        return np.asarray(store)


class DevicePlacement(_Scoring):
    """Everything from the decoded image to the patch scores on a CUDA device.

    Images are uploaded and resized on one stream into one of two inputs while the backbones read the other one on the
    stream of the passes; the host waits for neither before the tokens of a group are complete. Where several devices
    score, the first one runs the backbones and the tokens go to host memory, from where all take them.
    """

    def __init__(
        self,
        config: Config,
        devices: Sequence[Device],
        batch_size: int,
        memory_limit: int | None,
        jpegs: DeviceJpegs | None,
    ) -> None:
        """jpegs: decodes on the device; None leaves all files to Pillow."""
        super().__init__(config, devices, memory_limit)
        self._device, self._jpegs = devices[0], jpegs
        shape = (batch_size, 3, config.image_size, config.image_size)
        kinds = {backbone.preprocessing for backbone in config.backbones.values()}
        self._inputs: list[dict[Preprocessing, Array]] = [
            {kind: self._device.empty(shape, np.float32) for kind in sorted(kinds)} for _ in range(2)
        ]
        self._slot = 0

    def decode(self, path: Path) -> Array:  # [rows, columns, 3] uint8, on the host or on the device
        on_device = None if self._jpegs is None else self._jpegs.decode(path)
        return np.asarray(decode(path)) if on_device is None else on_device

    def prepare(self, image: Array) -> Array:
        return image

    @contextmanager
    def network_inputs(self, prepared: Sequence[Any]) -> Iterator[Mapping[Preprocessing, Array]]:
        self._slot = 1 - self._slot
        with self._device.producing(self._slot):
            for index, image in enumerate(prepared):
                on_device = image
                if isinstance(image, np.ndarray):
                    on_device = self._device.empty(image.shape, np.uint8)
                    self._device.upload(image, on_device)
                for kind, batch in self._inputs[self._slot].items():
                    how = recipe(kind, batch.shape[-1])
                    cuda.network_input(self._device, on_device, batch[index], how.resampling, how.mean, how.deviation)
        with self._device.consuming(self._slot):
            yield {kind: batch[: len(prepared)] for kind, batch in self._inputs[self._slot].items()}

    def share_memory(self, images: int, backbones: Mapping[str, Backbone]) -> tuple[bool, int | None]:
        limit = self._memory_limit
        if limit is None:
            limit = int(cuda.MEMORY_SHARE * self._device.free_bytes())

        def check(limit: int) -> None:
            for backbone in backbones.values():
                patches, degrees = math.prod(backbone.grid), len(set(self._config.degrees))
                cuda.plan_mutual_scoring(
                    images,
                    patches,
                    backbone.channels,
                    degrees,
                    limit,
                    self._device.cache_bytes,
                    devices=len(self._devices),
                    comparer=cuda.choose_comparer(self._devices, self._config.precision, None, patches),
                )

        if len(self._devices) > 1:
            check(limit)
            return False, limit
        return _share(limit, _token_bytes(images, backbones), check)

    @contextmanager
    def store(self, shape: tuple[int, ...], dtype: DTypeLike, resident: bool) -> Iterator[Array]:
        if resident:
            yield self._device.empty(shape, dtype)
            return
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with scratch(shape, size <= default_memory_limit() // 2, dtype) as array:
            yield array

    def put(self, values: Array, store: Array) -> None:
        if isinstance(store, np.ndarray) and not isinstance(values, np.ndarray):
            store[...] = self._device.to_host(values)
        else:
            self._device.copy(values, store)

    def fetch(self, store: Array) -> NDArray[Any]:
        return self._device.to_host(store)

    def patch_scores(self, *arguments: Any) -> NDArray[np.float32]:
        self._device.synchronise()  # tokens that are still being written
        return super().patch_scores(*arguments)


def choose_placement(config: Config, runtime: Runtime, batch_size: int, memory_limit: int | None) -> Placement:
    """Return the place that a runtime works in; memory_limit: bytes, of what scores.

    Raises ConfigError where the configuration's decoder cannot be had.
    """
    if runtime.device is None:
        if config.decoder == "nvimgcodec":
            raise ConfigError("--decoder nvimgcodec needs backbones on a GPU; leave it out")
        return HostPlacement(config, runtime.devices, memory_limit)
    jpegs = DeviceJpegs(runtime.device) if config.decoder == "nvimgcodec" else None
    return DevicePlacement(config, runtime.devices, batch_size, memory_limit, jpegs)


def _token_bytes(images: int, backbones: Mapping[str, Backbone]) -> int:
    return sum(images * b.layers * math.prod(b.grid) * b.channels * b.token_type.itemsize for b in backbones.values())


def _share(limit: int, tokens: int, check: Callable[[int], None]) -> tuple[bool, int]:
    """See Placement.share_memory; `check` raises MemoryError where a limit is too small for the scoring."""
    if tokens <= limit // 2:
        with suppress(MemoryError):
            check(limit - tokens)
            return True, limit - tokens
    check(limit)
    return False, limit
