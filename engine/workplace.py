"""What the categories of a run share: networks, method and loader, in host memory or on a device.

Networks are made for images of one size; categories whose images have the same size share all of it.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zsad.engine.config import Config, ConfigError
from zsad.engine.images.limits import Limits
from zsad.engine.images.loader import Batch, DeviceInputs, HostInputs, Inputs, Loader
from zsad.engine.methods.arrays import Arrays, DeviceArrays, HostArrays
from zsad.engine.methods.component_wise import ComponentWise
from zsad.engine.methods.foreground import Foregrounds
from zsad.engine.methods.method import Method, Place, graph_requests, method_class
from zsad.engine.methods.tiled import Cutter, tiled
from zsad.engine.networks.build import load_graph, load_networks
from zsad.engine.networks.network import GraphRequest, Network
from zsad.engine.networks.runtime import Runtime
from zsad.engine.results.formats import Export, Format
from zsad.engine.text.vectors import TextVectors
from zsad.kernels.machine import available_cores, default_memory_limit, peak_memory, stopwatch

if TYPE_CHECKING:
    from zsad.engine.methods.bank_build import Making

TEXTS = 64  # prompts per forward pass


@dataclass(frozen=True)
class Saving:
    """Where banks go, one file or a folder of one for each category, and how they are made."""

    path: Path
    making: "Making"


@dataclass(frozen=True)
class Options:
    """What decides how a run goes, and nothing about its scores."""

    output: Path
    formats: Sequence[Format] = ("zsad",)  # of single images
    exports: Sequence[Export] = ()  # formats that are made of all finished categories
    batch_size: int | None = None  # None: 1 on a CPU, 8 on a GPU
    workers: int | None = None  # threads that decode and write; None: one per core
    memory_limit: int | None = None  # bytes, of what scores; None: nearly all that is free
    limits: Limits = field(default_factory=Limits)  # of single files; their memory is half of what a run may take
    strict: bool = False  # stop at the first unreadable image
    resume: bool = False  # keep categories that an earlier run with these settings finished
    saving: Saving | None = None  # of banks of what is normal; None: there are none
    keep_stages: bool = False  # write what led to the scores as pictures: foregrounds, masks, tiles

    @property
    def written(self) -> list[str]:
        """All that is written of an image, and where the user has set such, the limits beyond which it is left out."""
        return [*self.formats, *["stages"] * self.keep_stages, *[str(self.limits)] * (self.limits != Limits())]


@dataclass(frozen=True)
class Setting:
    """With what a run scores its images, as its record tells it."""

    device: str  # cpu or cuda:N
    runtime: str
    reason: str  # for that runtime
    config: Mapping[str, Any]  # in force, with image sizes as they were asked for
    checkpoints: Sequence[tuple[str, str]]  # names of the networks' weights, and their sha256
    timings: Mapping[str, float]  # seconds by stage, of all processes together
    host_bytes: int  # the most that a process has had of host memory
    device_bytes: int | None  # of a device
    processes: int = 1  # that score

    @classmethod
    def here(cls, config: Config, runtime: Runtime, workplace: "Workplace") -> "Setting":
        """Return that of a run which scores in this process."""
        return cls(
            runtime.device_name,
            runtime.describe(workplace.libraries),
            runtime.reason,
            workplace.asked(config),
            [(network.checkpoint, network.sha256) for network in workplace.networks.values()],
            workplace.timings,
            peak_memory(),
            runtime.device.used_bytes() if runtime.device else None,
        )


@dataclass(frozen=True)
class Workplace:
    """What all categories of a run share."""

    method: Method
    place: Place  # of the method
    foregrounds: Foregrounds | None  # where the method leaves them to the run, and networks find them
    loader: Loader
    networks: Mapping[str, Network]
    arrays: Arrays
    record: Mapping[str, Any]  # the configuration in force, with the size of its images
    timings: MutableMapping[str, float]  # seconds by stage
    fatal: tuple[type[Exception], ...]  # errors after which nothing more can run here
    cutter: Cutter | None = None  # where the method is given tiles of images

    def try_out(self) -> None:
        """Let the method, which is started, take a plain image; raises what it raises where it can take none."""
        side = max(self.sides.values())
        plain, inputs = np.full((side, side, 3), 128, np.uint8), self.loader.inputs
        with inputs.batch([inputs.prepare(plain)]) as arrays:
            list(self.method.take(Batch([0], arrays, [], [plain])))
        if self.foregrounds is not None:
            self.foregrounds.find(plain)

    def asked(self, config: Config) -> dict[str, Any]:
        """Return the configuration in force with image sizes as they were asked for, which may be auto."""
        return {**self.record, **config.model_dump(mode="json", include={"image_size", "networks"})}

    @property
    def checkpoints(self) -> dict[str, str]:
        """The sha256 of the networks' weights, by their names."""
        return {network.checkpoint: network.sha256 for network in self.networks.values()}

    @property
    def libraries(self) -> set[str]:
        """The libraries that run the networks."""
        return {library for network in self.networks.values() for library in network.libraries}

    @property
    def sides(self) -> dict[str, int]:
        """The sides of the method's networks' inputs, in pixels."""
        return {name: spec["image_size"] for name, spec in self.record["networks"].items()}


class Workplaces:
    """The workplaces of a run: one for each size of images, one of them there at a time."""

    def __init__(self, config: Config, runtime: Runtime, options: Options) -> None:
        self.timings: dict[str, float] = {}  # of all of them
        self._config, self._runtime, self._options = config, runtime, options
        self._current: tuple[Mapping[str, int], Workplace] | None = None

    def of(self, sides: Mapping[str, int]) -> Workplace:
        """Return the one for these sides of inputs, by networks; must not be held when that for others is asked for.

        Raises what `set_up` raises.
        """
        if self._current is None or self._current[0] != sides:
            self._current = None  # its memory is given back before the next one takes any
            config = self._config.sized(sides)
            self._current = sides, set_up(config, self._runtime, self._options, self.timings)
        return self._current[1]


def set_up(config: Config, runtime: Runtime, options: Options, timings: MutableMapping[str, float]) -> Workplace:
    """Load the networks and make the method, for all categories; raises ConfigError where that cannot be.

    timings: seconds by stage, which are added to.
    """
    batch_size = options.batch_size or (8 if runtime.device else 1)
    workers = options.workers or available_cores()
    method_type = method_class(config.method)
    try:
        with stopwatch(timings, "load"):
            requests = graph_requests(config)
            networks = load_networks(config, requests, runtime, batch_size)
            batch_size = min(
                batch_size,
                *(networks[r.network].graphs[r.graph].largest_batch for r in requests if not (r.on_demand or r.rows)),
            )
            arrays = (DeviceArrays if runtime.device else HostArrays)(runtime.devices, options.memory_limit)
            own = {name: network for name, network in networks.items() if name in config.networks}
            precision = runtime.network_precision(config.network_precision)
            place = Place(own, arrays, timings, _text(config, runtime, own, arrays), precision)
            method: Method = method_type(config, place)
            inputs = _inputs(config, runtime, method, batch_size)
            foregrounds = cutter = None
            if config.components or config.foreground not in ("none", "colour"):
                foregrounds = Foregrounds(config, networks, arrays, timings)
            if config.tiling:
                cutter = Cutter(config.tiling, method.cells, inputs, batch_size)
                method = tiled(method, place, cutter)
                inputs = _inputs(config, runtime, method, batch_size)
            if config.components:
                assert foregrounds is not None
                method, foregrounds = ComponentWise(method, foregrounds, inputs, batch_size, config), None
                inputs = _inputs(config, runtime, method, batch_size)
    except MemoryError as error:
        raise ConfigError(
            f"too little memory to start ({error}); try --batch-size 1 or a smaller --image-size"
        ) from None
    return Workplace(
        method=method,
        place=place,
        foregrounds=foregrounds,
        loader=Loader(
            inputs,
            batch_size if method.inputs else 1,  # whole images may be large
            workers,
            image_memory(runtime, options),
            timings,
            keep_images=foregrounds is not None or not method.inputs,
        ),
        networks=networks,
        arrays=arrays,
        record={
            **config.model_dump(mode="json", exclude=None if config.tiling else {"tiling"}),
            "network_precision": precision,
            "settings": method.record(),
        },
        timings=timings,
        fatal=tuple(error for device in runtime.devices[:1] for error in device.failures),
        cutter=cutter,
    )


def _text(config: Config, runtime: Runtime, networks: Mapping[str, Network], arrays: Arrays) -> TextVectors:
    return TextVectors(
        networks,
        f"{runtime.library} {runtime.network_precision(config.network_precision)}",
        load=lambda name: load_graph(config, GraphRequest(name, "text", ("embedding",)), runtime, TEXTS),
        to_network=arrays.send,
        fetch=arrays.fetch,
    )


def _inputs(config: Config, runtime: Runtime, method: Method, batch_size: int) -> Inputs:
    if runtime.device is None or not method.inputs:
        if config.decoder == "nvimgcodec":
            raise ConfigError("--decoder nvimgcodec needs networks on a GPU; leave it out")
        return HostInputs(method.inputs)
    jpegs = None
    if config.decoder == "nvimgcodec":
        from zsad.engine.images.device_jpegs import DeviceJpegs

        jpegs = DeviceJpegs(runtime.device)
    return DeviceInputs(runtime.device, method.inputs, batch_size, jpegs)


def image_memory(runtime: Runtime, options: Options) -> int:
    """Return the bytes that images may take while they are decoded or written: half of what a run may take."""
    asked = None if runtime.devices else options.memory_limit
    return (default_memory_limit() if asked is None else asked) // 2
