"""Throughput of the networks and of whole runs, for every runtime that is installed.

    python -m zsad.bench.throughput [--preset challenge] [--images 200] [--device auto] [--only networks|runs]

First every graph of the preset's networks alone, all variants in turn in one process, beside the product peak of the
same rounds (and, where PyTorch is installed, its plain forward pass):

    cpu      ONNX Runtime, OpenVINO and native code in fp32 and, for image towers, in int8, OpenVINO in bf16 where the
             processor has it, PyTorch eager fp32; the peak is the best of two large fp32 products
    cuda:N   TensorRT, TensorRT-RTX and ONNX Runtime in fp16, PyTorch fp16 with its fused attention; fp16 products

On a CPU also what each runtime's graph takes in memory, by a process of its own that loads it and runs it.

Then whole runs in each of these runtimes, networks and scoring in the same precision: each stage alone, then all
together. The overlap efficiency is the sum of the stages over the wall time of the whole.

With `--profile` it says where the time goes instead, on a CPU: whole runs by stage, and every graph by class of
operators, with the rates of products and of memory beside the peaks that are measured in the same run.

Validates first: outputs of every variant against the fp32 graph on the CPU. Where real weights are absent random ones
of the true shape are used, and the output says so; words have random vectors then. Random weights find no objects: in
whole runs of presets that look for them, IS-Net and SAM take their time, and what they say is then replaced by the
bright parts of drawn scenes and by discs around the points.

PyTorch does what the published code does: for `winclip` three passes over an image, the whole of it and its windows of
both sizes; of SAM's mask decoder all for every point.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.category_pass import CategoryJob, run_category
from zsad.engine.config import Config, ConfigError, NetworkPrecision, load_config
from zsad.engine.demo import draw_demo
from zsad.engine.images.categories import Category
from zsad.engine.images.folders import scan
from zsad.engine.images.loader import Batch
from zsad.engine.methods.foreground import Stages
from zsad.engine.methods.method import Group, Scored, graph_requests, method_class
from zsad.engine.networks.build import graph_options, graph_precision, load_networks
from zsad.engine.networks.network import Graph, GraphRequest
from zsad.engine.networks.runtime import Runtime, choose_runtime
from zsad.engine.presets.names import preset_names
from zsad.engine.text.vectors import TextVectors
from zsad.engine.workplace import Options, Workplace, set_up
from zsad.export.adopt import ReadyGraph
from zsad.export.agreement import check_agreement, run_graph, sample_rows
from zsad.export.builders import read_builder
from zsad.export.checkpoints import find_checkpoint
from zsad.export.onnx_export import export_onnx
from zsad.export.state_dict import CheckpointError
from zsad.kernels.cuda.device import Device
from zsad.kernels.machine import available_cores, peak_memory

from .graph_memory import graph_memory
from .mutual_scoring_cuda import peak_flops
from .products import count_products, plain_options, row_count
from .random_weights import write_random
from .records import RESULTS, append, environment
from .scenes import draw_scenes, stand_ins
from .towers import SHAPES, write_random_heads

RANDOM = "random"
ROWS = {"clipseg_decoder": "prompt", "sam_masks": "point"}  # graph → what its rows are, where they are no images
FINDERS = ("foreground", "masks")  # stages within what a method does with an image
CPU_PRECISIONS: Mapping[str, tuple[NetworkPrecision, ...]] = {
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "int8", "bf16"),
    "native": ("fp32", "int8"),
}
# Whose rate is the peak on a CPU: a large product, and a linear layer of a ViT-L.
PEAK_SHAPES = ((4096, 4096, 4096), (1370, 1024, 4096))  # rows, depth, columns
SCENES = 3  # by default, of presets that look for objects: on a CPU an image takes tens of seconds
Forward = Callable[..., Any]  # device, type → the network in PyTorch


# Seconds before each run: threads of the library before it, PyTorch's above all, go on spinning for a while and would
# take a core from the next.
PAUSE = 0.5


@dataclass(frozen=True)
class Variant:
    """One way to run a network over a batch that lies ready."""

    name: str
    precision: str
    run: Callable[[], Mapping[str, Any]]  # returns the outputs when they are complete
    fetch: Callable[[Any], NDArray[Any]]  # brings one to the host
    library: str = ""  # of zsad's runtimes


def use_random_weights(config: Config, folder: Path) -> tuple[Config, dict[str, str]]:
    """Replace checkpoints that are not here by random ones of the same shape; also return what each one is."""
    weights, changed = {}, {}
    for name, spec in config.specs.items():
        try:
            find_checkpoint(spec.checkpoint)
            weights[name] = spec.checkpoint
        except CheckpointError:
            path = folder / f"{spec.checkpoint}-random.safetensors"
            write_random(spec.checkpoint, path)
            changed[name] = spec.model_copy(update={"checkpoint": str(path)})
            weights[name] = f"{RANDOM}, of the shape of {spec.checkpoint}"
        print(f"weights of {name}: {weights[name]}")
    finders = {name: spec for name, spec in changed.items() if name not in config.networks}
    update = {
        "networks": {name: changed.get(name, spec) for name, spec in config.networks.items()},
        "stages": config.stages.model_copy(update=finders),
        "settings": _with_heads(config, folder),
    }
    return config.model_copy(update=update), weights


def _with_heads(config: Config, folder: Path) -> Any:
    """Return the method's settings, with random linear heads where it wants heads that are not here."""
    head = getattr(config.settings, "head", None)
    if head is None:
        return config.settings
    try:
        find_checkpoint(head)
    except CheckpointError:
        (spec,) = config.networks.values()
        shape, path = SHAPES[spec.checkpoint], folder / f"{head}-random.safetensors"
        write_random_heads(len(spec.taps), shape.width, shape.projection, path)
        print(f"linear heads: random, of the shape of {head}")
        return config.settings.model_copy(update={"head": str(path)})
    return config.settings


@contextmanager
def random_words() -> Iterator[None]:
    """Give every prompt a random vector: random checkpoints have no text tower, which takes no part in a run's time."""

    def of(vectors: TextVectors, network: str, prompts: Sequence[str]) -> NDArray[np.float32]:
        graphs = vectors.networks[network].graphs
        compared = graphs["image"].outputs["embedding"] if "image" in graphs else None
        (dimension,) = (compared or graphs["clipseg_decoder"].inputs["conditions"]).shape
        return np.random.default_rng(0).standard_normal((len(prompts), dimension), np.float32)

    with patch.object(TextVectors, "of", of):
        yield


@contextmanager
def replaced(weights: Mapping[str, str]) -> Iterator[None]:
    """Replace what random weights cannot give: words' vectors, and the objects in an image."""
    random = {name for name, kind in weights.items() if kind.startswith(RANDOM)}
    with random_words() if random else nullcontext(), stand_ins(random):
        yield


def image_requests(config: Config) -> list[GraphRequest]:
    """Return the graphs that run on every image."""
    return [request for request in graph_requests(config) if not request.on_demand]


def runtimes(device: str) -> Iterator[tuple[str, Runtime, NetworkPrecision]]:
    """Yield every installed way to run a network on the device: name, runtime, precision."""
    if device == "cpu":
        for library, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO"), ("native", "native code")):
            for precision in CPU_PRECISIONS[library]:
                try:
                    runtime = choose_runtime("cpu", library)
                    runtime.network_precision(precision)
                    yield f"{name} {precision}", runtime, precision
                except ConfigError as error:
                    print(f"{name} {precision}: not measured ({error})")
        return
    for library, name in (("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT-RTX"), ("onnxruntime", "ONNX Runtime")):
        try:
            runtime = choose_runtime(device, library)
        except ConfigError as error:
            print(f"{name}: not measured ({error})")
            continue
        if runtime.device is None:
            print(f"{name}: not measured ({runtime.reason})")
        else:
            yield f"{name} fp16", runtime, "fp16"


def product_peak(runtime: Runtime) -> Callable[[], float]:
    """Return what measures the rate of large products, FLOP/s: fp32 on a CPU, fp16 with fp32 sums on a device."""
    if runtime.devices:
        return lambda: peak_flops(runtime.devices[0], repeats=1)
    rng = np.random.default_rng(0)
    factors = [tuple(rng.standard_normal(side, np.float32) for side in ((m, k), (k, n))) for m, k, n in PEAK_SHAPES]

    def measure() -> float:
        rates = []
        for left, right in factors:
            start = time.perf_counter()
            np.matmul(left, right)
            rates.append(2.0 * left.size * right.shape[1] / (time.perf_counter() - start))
        return float(max(rates))

    return measure


def variants(
    config: Config,
    request: GraphRequest,
    where: str,
    inputs: Mapping[str, NDArray[Any]],
    rows: int,
    forward: Forward | None,
) -> Iterator[Variant]:
    """Yield every variant of one graph that can run here; forward: of PyTorch, where there is one."""
    for variant, runtime, precision in runtimes(where):
        if graph_precision(request, precision) != precision:
            continue  # only image towers are there in int8 and bf16
        chosen = config.model_copy(update={"network_precision": precision})
        networks = load_networks(chosen, [request], runtime, rows)
        device = runtime.device
        fed = inputs if device is None else {name: device.to_device(array) for name, array in inputs.items()}
        fetch = np.asarray if device is None else device.to_host
        run = partial(_complete, networks[request.network].graphs[request.graph], fed, device)
        yield Variant(variant, precision, run, fetch, runtime.library)
    if forward is None:
        print("PyTorch: not measured (a ready graph has no weights for it)")
        return
    if find_spec("torch") is None:
        print("PyTorch: not measured (it is not installed)")
        return
    import torch

    torch.set_num_threads(available_cores())
    precision, torch_type, kind = "fp32", torch.float32, "cpu"
    if where != "cpu":
        precision, torch_type, kind = "fp16", torch.float16, f"cuda:{choose_runtime(where).devices[0].number}"
    network = forward(kind, torch_type)
    tensors = [network.tensor(array) for array in inputs.values()]

    def run_torch() -> Any:
        outputs = network(*tensors)
        if where != "cpu":
            torch.cuda.synchronize()
        return outputs

    yield Variant(f"PyTorch eager {precision}", precision, run_torch, network.fetch)


def _complete(graph: Graph, inputs: Mapping[str, Any], device: Device | None) -> Mapping[str, Any]:
    outputs = graph.run(inputs)
    if device is not None:
        device.synchronise()
    return outputs


def check_variants(found: Sequence[Variant], expected: Mapping[str, NDArray[np.float32]]) -> dict[str, str]:
    """Compare the first row of every variant with what is expected of it; raises CheckpointError."""
    agreement = {}
    for variant in found:
        outputs = {name: variant.fetch(array)[:1].astype(np.float32) for name, array in variant.run().items()}
        agreement[variant.name] = check_agreement(outputs, expected, variant.precision, "the fp32 graph on the CPU")
        print(f"check: {variant.name}: {agreement[variant.name]}")
    return agreement


def time_variants(
    found: Sequence[Variant], peak: Callable[[], float], rows: int, repeats: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Return the seconds of each variant for a row, and the peak rate, of rounds in which all run in turn."""
    seconds: dict[str, list[float]] = {variant.name: [] for variant in found}
    peaks = []
    for repeat in range(repeats + 1):
        rate = peak()
        times = {}
        for variant in found:
            time.sleep(PAUSE)
            start = time.perf_counter()
            variant.run()
            times[variant.name] = (time.perf_counter() - start) / rows
        if repeat:  # the first round warms up
            peaks.append(rate)
            for label, value in times.items():
                seconds[label].append(value)
    return seconds, peaks


def measure_memory(
    config: Config, request: GraphRequest, found: Sequence[Variant], inputs: Mapping[str, NDArray[Any]], rows: int
) -> dict[str, int]:
    """Return what each of zsad's variants takes on a CPU."""
    taken = {}
    for variant in (variant for variant in found if variant.library):
        chosen = config.model_copy(update={"network_precision": variant.precision})
        taken[variant.name] = graph_memory(chosen, request, variant.library, inputs, rows)
    return taken


def compare_networks(config: Config, weights: Mapping[str, str], arguments: argparse.Namespace, record: Any) -> None:
    """Validate and time every variant of every graph in turn, and append one record for each graph."""
    peak = product_peak(choose_runtime(arguments.device))
    for request in image_requests(config):
        spec, rows = config.specs[request.network], row_count(request, arguments.batch_size)
        source = find_checkpoint(spec.checkpoint)[0]
        options = graph_options(spec, request, "fp32", "fused")
        builder = read_builder(source, options)
        inputs = sample_rows(builder.inputs, rows)
        graph = export_onnx(spec.checkpoint, options).path
        forward = None if isinstance(builder, ReadyGraph) else builder.forward
        print(f"\n{request.network}, {request.graph}: {weights[request.network]}")
        found = list(variants(config, request, arguments.device, inputs, rows, forward))
        agreement = check_variants(found, run_graph(graph, sample_rows(builder.inputs, 1)))
        seconds, peaks = time_variants(found, peak, rows, arguments.repeats)
        flops, _ = count_products(read_builder(source, plain_options(spec, request)), rows)
        timed = {
            "flops_per_row": flops,
            "peak_flops": peaks,
            "seconds_per_row": seconds,
            "memory_bytes": measure_memory(config, request, found, inputs, rows) if arguments.device == "cpu" else {},
        }
        print_network(spec.side, ROWS.get(request.graph, "image"), rows, timed)
        append(
            arguments.output,
            {
                **record,
                "kind": "network",
                "preset": config.preset,
                "network": request.network,
                "graph": request.graph,
                "row": ROWS.get(request.graph, "image"),
                "weights": weights[request.network],
                "image_size": spec.side,
                "batch": rows,
                **timed,
                "agreement": agreement,
            },
        )


def print_network(image_size: int, row: str, rows: int, timed: Mapping[str, Any]) -> None:
    """Print what was measured of a graph."""
    flops, peaks, seconds = timed["flops_per_row"], timed["peak_flops"], timed["seconds_per_row"]
    memory = timed["memory_bytes"]
    print(f"{image_size} px, batch {rows}, {flops / 1e12:.4f} TFLOP per {row}")
    print(f"  product peak{statistics.median(peaks) / 1e9:26.0f} GFLOP/s")
    for label, values in seconds.items():
        value = statistics.median(values)
        share = statistics.median(flops / time / peak for time, peak in zip(values, peaks, strict=True))
        print(
            f"  {label:<22}{1e3 * value:9.1f} ms per {row} {flops / value / 1e9:9.0f} GFLOP/s "
            f"{100 * share:5.0f} % of the peak" + (f" {memory[label] / 2**20:6.0f} MiB" if label in memory else "")
        )


def forget_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can: Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Clock:
    """Seconds of the stages, each measured alone with the device idle before and after."""

    def __init__(self, runtime: Runtime) -> None:
        self.device, self.seconds = runtime.device, dict[str, float]()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        if self.device is not None:
            self.device.synchronise()
        start = time.perf_counter()
        yield
        if self.device is not None:
            self.device.synchronise()
        self.seconds[stage] = time.perf_counter() - start


def stages_alone(category: Category, runtime: Runtime, workplace: Workplace) -> tuple[dict[str, float], Stages | None]:
    """Run every stage of a category by itself over all images; returns seconds by stage, and what was found in one."""
    clock, count = Clock(runtime), len(category.images)
    loader, method = workplace.loader, workplace.method

    def batches(members: range) -> Iterator[Batch]:
        return loader.batches(category.images, members, None, lambda *_: None)

    with clock.measure("decode"):
        for _ in batches(range(count)):
            pass
    method.start(Group(count, category.root.name))
    workplace.timings.clear()
    taken: list[Scored] = []
    # Every batch runs on the input of the first one, so that nothing else is timed.
    for first in batches(range(min(loader.batch_size, count))):
        with clock.measure("networks"):
            for start in range(0, count, loader.batch_size):
                inputs = {recipe: images[: count - start] for recipe, images in first.inputs.items()}
                indices = list(range(start, min(start + loader.batch_size, count)))
                taken += method.take(Batch(indices, inputs, [], first.images[: count - start]))
    spent = clock.seconds.pop("networks")
    clock.seconds |= {stage: workplace.timings[stage] for stage in FINDERS if stage in workplace.timings}
    clock.seconds["networks"] = spent - sum(workplace.timings.get(stage, 0) for stage in FINDERS)
    with clock.measure("scoring"):
        scored = list(method.finish(lambda *_: None))
    if scored:
        with clock.measure("rescoring"):
            method.image_scores(scored)
    return clock.seconds, taken[0].stages if taken else None


def whole_runs(
    config: Config, runtime: Runtime, weights: Mapping[str, str], arguments: argparse.Namespace, record: Any
) -> None:
    """Time the stages alone and together, print that and append one record."""
    measured = measure_run(config, runtime, arguments)
    print_run(config.preset, measured)
    append(arguments.output, {**record, "kind": "run", "preset": config.preset, "weights": dict(weights), **measured})


def measure_run(config: Config, runtime: Runtime, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the stages alone and together."""
    with tempfile.TemporaryDirectory() as folder:
        (output := Path(folder) / "out").mkdir()
        options = Options(output, batch_size=arguments.batch_size, strict=True)
        workplace = set_up(config, runtime, options, {})
        data = arguments.data or draw(config, arguments.images, Path(folder) / "data")
        (category, *_) = scan(data).categories
        category = replace(category, images=category.images[: arguments.images])

        def run(images: int) -> tuple[float, float, dict[str, float]]:
            part, start, busy = replace(category, images=category.images[:images]), time.perf_counter(), processors()
            workplace.timings.clear()
            run_category(CategoryJob(part, config, options), workplace, lambda *_: None)
            return time.perf_counter() - start, processors() - busy, dict(workplace.timings)

        run(1 if config.components else 2)  # warms up
        alone, found = stages_alone(category, runtime, workplace)
        forget_peak_memory()
        together, busy, stages = run(len(category.images))
        alone["write"] = stages["write"]  # nothing runs beside it
        host, device = peak_memory(), None if runtime.device is None else runtime.device.used_bytes()
    return {
        "runtime": runtime.describe(workplace.libraries),
        "precision": [workplace.record["network_precision"], workplace.record["settings"].get("precision")],
        "image_size": config.image_size,
        "decoder": config.decoder,
        "images": len(category.images),
        "batch": workplace.loader.batch_size,
        "found": found and {"masks": len(found.parts), "tiles": len(found.tiles)},
        "seconds_alone": alone,
        "seconds_together": together,
        "seconds_of_processors": busy,
        "flops_of_pairs": flops_of_pairs(workplace, len(category.images)),
        "overlap": sum(alone.values()) / together,
        "peak_host_bytes": host,
        "peak_device_bytes": device,
    }


def flops_of_pairs(workplace: Workplace, images: int) -> float:
    """Return the operations of one product for each pair of images and layer, the least that comparing them takes."""
    if not workplace.method.compares:
        return 0.0
    towers = [network.graphs["image"] for network in workplace.networks.values() if "image" in network.graphs]
    shapes = [tower.outputs["tokens"].shape for tower in towers if "tokens" in tower.outputs]
    return sum(images * (images - 1) / 2 * layers * 2.0 * patches**2 * width for layers, patches, width in shapes)


def processors() -> float:
    """Return the seconds that all processors together have worked for this process."""
    spent = os.times()
    return spent.user + spent.system


def draw(config: Config, count: int, folder: Path) -> Path:
    """Draw images for whole runs and return their folder."""
    if config.components:
        return draw_scenes(folder, count)
    drawn = draw_demo(folder, count=count, defects=count // 4)
    if config.decoder == "nvimgcodec":
        for path in drawn.glob("**/test/*/*.png"):
            Image.open(path).save(path.with_suffix(".jpg"))
            path.unlink()
    return drawn


def print_run(preset: str, measured: Mapping[str, Any]) -> None:
    """Print what was measured of whole runs."""
    count, alone, together = (measured[key] for key in ("images", "seconds_alone", "seconds_together"))
    host, device, found = (measured[key] for key in ("peak_host_bytes", "peak_device_bytes", "found"))
    print(f"\nwhole runs: preset {preset}, {count} images, {measured['runtime']}, {measured['precision'][0]}")
    for stage, value in alone.items():
        print(f"  {stage:<12}{value:9.2f} s alone {1e3 * value / count:9.1f} ms per image")
    print(
        f"  together    {together:9.2f} s       {1e3 * together / count:9.1f} ms per image, "
        f"{count / together:.2f} images/s, overlap efficiency {measured['overlap']:.2f}"
    )
    if found is not None:
        print(f"  {found['tiles']} tiles in the first image, {found['masks']} masks that are parts of objects")
    print(
        f"  peak memory {host / 2**30:.2f} GiB"
        + (f", on the device {device / 2**30:.2f} GiB" if device is not None else "")
    )


def in_precision(config: Config, precision: NetworkPrecision) -> Config:
    """Return a configuration whose networks run in a precision, and its scoring in the nearest one that it has."""
    settings = config.settings
    if "precision" in type(settings).model_fields:
        settings = settings.model_copy(update={"precision": "int8" if precision == "bf16" else precision})
    return config.model_copy(update={"network_precision": precision, "settings": settings})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.throughput", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--preset", default="small", choices=preset_names(), help="(default %(default)s)")
    add("--config", type=Path, metavar="FILE.toml", help="values that replace the preset's")
    add("--images", type=int, help=f"of whole runs (default: 200, or {SCENES} where objects are looked for)")
    add("--data", type=Path, help="folder of images for whole runs; drawn ones by default")
    add("--image-size", type=int, help="(default: the preset's; of auto the largest)")
    add("--device", default="auto", help="auto, cpu or cuda:N (default %(default)s)")
    add("--batch-size", type=int, help="(default: 1 on a CPU, 8 on a GPU)")
    add("--repeats", type=int, default=5, help="counted rounds of the networks (default %(default)s)")
    add("--decoder", choices=["pillow", "nvimgcodec"], help="of whole runs; drawn images are JPEG then")
    add("--only", choices=["networks", "runs"], help="leave out the other half")
    add("--profile", action="store_true", help="say where the time goes instead, on a CPU: by stage and operator class")
    add("--output", type=Path, help="JSON lines to append to (default: throughput.jsonl or profile.jsonl in results)")
    arguments = parser.parse_args(argv)
    runtime = choose_runtime(arguments.device)
    arguments.batch_size = arguments.batch_size or (8 if runtime.device else 1)
    if arguments.device == "auto":
        arguments.device = "cuda" if runtime.devices else "cpu"
    if arguments.profile and arguments.device != "cpu":
        parser.error("--profile is of a CPU; add --device cpu")
    arguments.output = arguments.output or RESULTS / ("profile.jsonl" if arguments.profile else "throughput.jsonl")
    packages = ["numpy", "onnxruntime", "openvino", "torch", "tensorrt", "zsad"]
    record = environment("zsad.bench.throughput", argv, packages)
    print(f"device: {runtime.describe()} ({runtime.reason})")
    given = {"image_size": arguments.image_size, "decoder": arguments.decoder}
    overrides = {key: value for key, value in given.items() if value is not None}
    config = load_config(arguments.preset, arguments.config, overrides, method_of=method_class)
    config = config.sized({name: config.networks[name].side for name in config.unsized})
    arguments.images = arguments.images or (SCENES if config.components else 200)
    with tempfile.TemporaryDirectory() as folder:
        config, weights = use_random_weights(config, Path(folder))
        if arguments.profile:
            from .profile import profile  # which runs what is here

            profile(config, weights, arguments, record)
            return 0
        if arguments.only != "runs":
            compare_networks(config, weights, arguments, record)
        if arguments.only != "networks":
            found = [(runtime, precision) for _, runtime, precision in runtimes(arguments.device)]
            for runtime, precision in found or [(choose_runtime(arguments.device), "auto")]:
                with replaced(weights):
                    whole_runs(in_precision(config, precision), runtime, weights, arguments, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
