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
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, load_config
from zsad.engine.methods.method import method_class
from zsad.engine.networks.build import graph_options, graph_precision, load_networks
from zsad.engine.networks.network import Graph, GraphRequest
from zsad.engine.networks.runtime import Runtime, choose_runtime
from zsad.engine.presets.names import preset_names
from zsad.export.adopt import ReadyGraph
from zsad.export.agreement import check_agreement, run_graph, sample_rows
from zsad.export.builders import read_builder
from zsad.export.checkpoints import find_checkpoint
from zsad.export.onnx_export import export_onnx
from zsad.kernels.cuda.device import Device
from zsad.kernels.machine import available_cores

from .memory import graph_memory
from .products import ROWS, count_products, image_requests, plain_options, row_count
from .profile import profile
from .records import RESULTS, append, environment
from .runs import measure_run, print_run
from .runtimes import in_precision, product_peak, runtimes
from .untrained import replaced, use_random_weights

SCENES = 3  # by default, of presets that look for objects: on a CPU an image takes tens of seconds
# Seconds before each run: threads of the library before it, PyTorch's above all, go on spinning for a while and would
# take a core from the next.
PAUSE = 0.5
Forward = Callable[..., Any]  # device, type → the network in PyTorch


@dataclass(frozen=True)
class Variant:
    """One way to run a network over a batch that lies ready."""

    name: str
    precision: str
    run: Callable[[], Mapping[str, Any]]  # returns the outputs when they are complete
    fetch: Callable[[Any], NDArray[Any]]  # brings one to the host
    library: str = ""  # of zsad's runtimes


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


def whole_runs(
    config: Config, runtime: Runtime, weights: Mapping[str, str], arguments: argparse.Namespace, record: Any
) -> None:
    """Time the stages alone and together, print that and append one record."""
    measured = measure_run(config, runtime, arguments)
    print_run(config.preset, measured)
    append(arguments.output, {**record, "kind": "run", "preset": config.preset, "weights": dict(weights), **measured})


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
