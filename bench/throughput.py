"""Throughput of the backbones and of whole runs, for every runtime that is installed.

    python -m zsad.bench.throughput [--preset challenge] [--images 200] [--device auto] [--only backbones|runs]

First every backbone of the preset alone, all variants in turn in one process, beside the product peak of the same
rounds (and, where PyTorch is installed, its plain forward pass):

    cpu      ONNX Runtime fp32 and int8, PyTorch eager fp32; the peak is the best of two large fp32 products
    cuda:N   TensorRT, TensorRT-RTX and ONNX Runtime in fp16, PyTorch fp16 with its fused attention; fp16 products

Then whole runs in each of these runtimes, backbones and scoring in the same precision: each stage alone, then all
together. The overlap efficiency is the sum of the stages over the wall time of the whole.

Validates first: tokens of every variant against the fp32 graph on the CPU. Where real weights are absent random ones of
the true shape are used, and the output says so.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, ConfigError, Precision, load_config, preset_names
from zsad.engine.demo import draw_demo
from zsad.engine.images.folders import Category, scan
from zsad.engine.networks.runtime import Backbone, Runtime, choose_runtime, load_backbone
from zsad.engine.pipeline import CategoryScores, Options, Stages, features_of, rescore, run_backbones, score_category
from zsad.engine.placement import Placement, choose_placement
from zsad.engine.results.category import write_category
from zsad.export.agreement import check_agreement, run_graph, sample_images
from zsad.export.checkpoints import find_checkpoint
from zsad.export.onnx_export import export_onnx
from zsad.export.state_dict import CheckpointError
from zsad.export.vision_transformer import VisionTransformer, read_vision_transformer
from zsad.kernels.cuda.device import Device
from zsad.kernels.machine import available_cores, peak_memory

from .mutual_scoring_cuda import peak_flops
from .records import RESULTS, append, environment
from .towers import SHAPES, Shape, write_random_checkpoint


@dataclass(frozen=True)
class Variant:
    """One way to run a backbone over a batch that lies ready."""

    name: str
    precision: str
    run: Callable[[], Any]  # returns the tokens when they are complete
    fetch: Callable[[Any], NDArray[Any]]  # brings them to the host


def use_random_weights(config: Config, folder: Path) -> tuple[Config, dict[str, str]]:
    """Replace checkpoints that are not here by random ones of the same shape; also return what each one is."""
    weights, backbones = {}, dict(config.backbones)
    for name, backbone in config.backbones.items():
        try:
            find_checkpoint(backbone.checkpoint)
            weights[name] = backbone.checkpoint
        except CheckpointError:
            path = folder / f"{backbone.checkpoint}-random.safetensors"
            write_random_checkpoint(SHAPES[backbone.checkpoint], path)
            backbones[name] = replace(backbone, checkpoint=str(path))
            weights[name] = f"random, of the shape of {backbone.checkpoint}"
        print(f"weights of {name}: {weights[name]}")
    return replace(config, backbones=backbones), weights


def runtimes(device: str) -> Iterator[tuple[str, Runtime, Precision]]:
    """Yield every installed way to run a backbone on the device: name, runtime, precision."""
    if device == "cpu":
        yield "ONNX Runtime fp32", choose_runtime("cpu"), "fp32"
        yield "ONNX Runtime int8", choose_runtime("cpu"), "int8"
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
    shapes = ((4096, 4096, 4096), (1370, 1024, 4096))  # a large one, and a linear layer of a ViT-L
    factors = [(rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)) for m, k, n in shapes]

    def measure() -> float:
        rates = []
        for left, right in factors:
            start = time.perf_counter()
            np.matmul(left, right)
            rates.append(2.0 * left.size * right.shape[1] / (time.perf_counter() - start))
        return float(max(rates))

    return measure


def variants(
    config: Config, name: str, where: str, batch: NDArray[np.float32], vit: VisionTransformer
) -> Iterator[Variant]:
    """Yield every variant of one backbone that can run here."""
    for variant, runtime, precision in runtimes(where):
        backbone = load_backbone(replace(config, backbone_precision=precision), name, runtime, len(batch))
        device = runtime.device
        images = batch if device is None else device.to_device(batch)
        fetch = np.asarray if device is None else device.to_host
        yield Variant(variant, precision, partial(_complete, backbone, images, device), fetch)
    if importlib.util.find_spec("torch") is None:
        print("PyTorch: not measured (it is not installed)")
        return
    import torch

    from zsad.export.torch_forward import TorchForward

    torch.set_num_threads(available_cores())
    precision, torch_type, kind = "fp32", torch.float32, "cpu"
    if where != "cpu":
        precision, torch_type, kind = "fp16", torch.float16, f"cuda:{choose_runtime(where).devices[0].number}"
    forward = TorchForward(vit, config.export_options(name, "fp32", "fused"), kind, torch_type)
    tensor = forward.tensor(batch)

    def run() -> Any:
        tokens = forward(tensor)[0]
        if where != "cpu":
            torch.cuda.synchronize()
        return tokens

    yield Variant(f"PyTorch eager {precision}", precision, run, forward.fetch)


def _complete(backbone: Backbone, images: Any, device: Device | None) -> Any:
    tokens, _ = backbone.run(images)
    if device is not None:
        device.synchronise()
    return tokens


def compare_backbones(config: Config, weights: Mapping[str, str], arguments: argparse.Namespace, record: Any) -> None:
    """Validate and time every variant of every backbone in turn, and append one record for each backbone."""
    peak = product_peak(choose_runtime(arguments.device))
    for name, backbone in config.backbones.items():
        batch = np.repeat(sample_images(config.image_size), arguments.batch_size, axis=0)
        graph = config.export_options(name, "fp32", "fused")
        vit = read_vision_transformer(find_checkpoint(backbone.checkpoint)[0])
        expected = run_graph(export_onnx(backbone.checkpoint, graph).path, batch[:1])[:1]
        found = list(variants(config, name, arguments.device, batch, vit))
        agreement = {}
        for variant in found:
            tokens = variant.fetch(variant.run())[:1].astype(np.float32)
            agreement[variant.name] = check_agreement(
                [tokens], expected, variant.precision, "the fp32 graph on the CPU"
            )
            print(f"check: {variant.name}: {agreement[variant.name]}")
        seconds: dict[str, list[float]] = {variant.name: [] for variant in found}
        peaks = []
        for repeat in range(arguments.repeats + 1):
            rate = peak()
            times = {}
            for variant in found:
                start = time.perf_counter()
                variant.run()
                times[variant.name] = (time.perf_counter() - start) / len(batch)
            if repeat:  # the first round warms up
                peaks.append(rate)
                for label, value in times.items():
                    seconds[label].append(value)
        flops = Shape.of(vit).flops(graph)
        median, rate = {label: statistics.median(values) for label, values in seconds.items()}, max(peaks)
        print(
            f"\n{name}: {weights[name]}, {config.image_size} px, batch {len(batch)}, {flops / 1e12:.3f} TFLOP per image"
        )
        print(f"  product peak{rate / 1e9:26.0f} GFLOP/s")
        for label, value in median.items():
            print(
                f"  {label:<22}{1e3 * value:9.1f} ms per image {flops / value / 1e9:9.0f} GFLOP/s "
                f"{100 * flops / value / rate:5.0f} % of the peak"
            )
        append(
            arguments.output,
            {
                **record,
                "kind": "backbone",
                "backbone": name,
                "weights": weights[name],
                "image_size": config.image_size,
                "batch": len(batch),
                "flops_per_image": flops,
                "peak_flops": peaks,
                "seconds_per_image": seconds,
                "agreement": agreement,
            },
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


def stages_alone(
    category: Category,
    config: Config,
    runtime: Runtime,
    backbones: Mapping[str, Backbone],
    placement: Placement,
    options: Options,
) -> dict[str, float]:
    """Run every stage of a category by itself over all images; returns seconds by stage."""
    clock, count = Clock(runtime), len(category.images)
    with ThreadPoolExecutor(options.workers) as pool, ExitStack() as stack:
        with clock.measure("decode"):
            decoded = list(pool.map(lambda image: placement.decode(image.path), category.images))
        with clock.measure("resize"):
            prepared = list(pool.map(placement.prepare, decoded))
            for start in range(0, count, options.batch_size):
                with placement.network_inputs(prepared[start : start + options.batch_size]):
                    pass
        resident, memory_left = placement.share_memory(count, backbones)
        features = stack.enter_context(features_of(count, resident, backbones, placement))
        # Every batch runs on the input of the first one, so that nothing else is timed.
        with placement.network_inputs(prepared[: options.batch_size]) as inputs, clock.measure("backbone"):
            for start in range(0, count, options.batch_size):
                batch = {name: images[: count - start] for name, images in inputs.items()}
                run_backbones(batch, start, features, config, backbones, placement)
        with clock.measure("scoring"):
            scores = {
                name: placement.patch_scores(
                    features.tokens[name], backbone.grid, memory_left, lambda *_: None, {}, lambda plan: None
                )
                for name, backbone in backbones.items()
            }
        chosen = config.image_score.backbone
        embeddings = placement.fetch(features.embeddings[chosen]) if config.image_score.rscin else None
        with clock.measure("rescoring"):
            rescore(config, scores[chosen], backbones[chosen].grid, embeddings)
    return clock.seconds


def whole_runs(
    config: Config, runtime: Runtime, weights: Mapping[str, str], arguments: argparse.Namespace, record: Any
) -> None:
    """Time the stages alone and together, and append one record."""
    config = runtime.resolve(config)
    options = Options(arguments.batch_size, available_cores(), strict=True)
    backbones = {name: load_backbone(config, name, runtime, options.batch_size) for name in config.backbones}
    placement = choose_placement(config, runtime, options.batch_size, None)
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or draw_demo(Path(folder) / "data", count=arguments.images, defects=arguments.images // 4)
        (category, *_) = scan(data)
        category = replace(category, images=category.images[: arguments.images])

        def run(images: int) -> tuple[CategoryScores, float]:
            part, start = replace(category, images=category.images[:images]), time.perf_counter()
            scored = score_category(part, config, backbones, placement, options, Stages(), lambda *_: None)
            write_category(Path(folder) / "out", part, scored, config, ["zsad"], "", options.workers)
            return scored, time.perf_counter() - start

        run(2)  # warms up
        alone = stages_alone(category, config, runtime, backbones, placement, options)
        forget_peak_memory()
        scored, together = run(len(category.images))
        host, device = peak_memory(), None if runtime.device is None else runtime.device.used_bytes()
        start = time.perf_counter()
        write_category(Path(folder) / "out", category, scored, config, ["zsad"], "", options.workers)
        alone["write"] = time.perf_counter() - start
    count = len(category.images)
    overlap = sum(alone.values()) / together
    print(f"\nwhole runs: preset {config.preset}, {count} images, {runtime.describe()}")
    for stage, value in alone.items():
        print(f"  {stage:<12}{value:9.2f} s alone {1e3 * value / count:9.1f} ms per image")
    print(
        f"  together    {together:9.2f} s       {1e3 * together / count:9.1f} ms per image, "
        f"{count / together:.2f} images/s, overlap efficiency {overlap:.2f}\n"
        f"  peak memory {host / 2**30:.2f} GiB"
        + (f", on the device {device / 2**30:.2f} GiB" if device is not None else "")
    )
    append(
        arguments.output,
        {
            **record,
            "kind": "run",
            "preset": config.preset,
            "weights": dict(weights),
            "runtime": runtime.describe(),
            "precision": [config.backbone_precision, config.precision],
            "image_size": config.image_size,
            "images": count,
            "batch": options.batch_size,
            "seconds_alone": alone,
            "seconds_together": together,
            "overlap": overlap,
            "peak_host_bytes": host,
            "peak_device_bytes": device,
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.throughput", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--preset", default="small", choices=preset_names(), help="(default %(default)s)")
    add("--config", type=Path, metavar="FILE.toml", help="values that replace the preset's")
    add("--images", type=int, default=200, help="of whole runs (default %(default)s)")
    add("--data", type=Path, help="folder of images for whole runs; drawn ones by default")
    add("--image-size", type=int, help="(default: the preset's)")
    add("--device", default="auto", help="auto, cpu or cuda:N (default %(default)s)")
    add("--batch-size", type=int, help="(default: 1 on a CPU, 8 on a GPU)")
    add("--repeats", type=int, default=5, help="counted rounds of the backbones (default %(default)s)")
    add("--only", choices=["backbones", "runs"], help="leave out the other half")
    add("--output", type=Path, default=RESULTS / "throughput.jsonl", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    runtime = choose_runtime(arguments.device)
    arguments.batch_size = arguments.batch_size or (8 if runtime.device else 1)
    if arguments.device == "auto":
        arguments.device = "cuda" if runtime.devices else "cpu"
    record = environment("zsad.bench.throughput", argv, ["numpy", "onnxruntime", "torch", "tensorrt", "zsad"])
    print(f"device: {runtime.describe()} ({runtime.reason})")
    overrides = {} if arguments.image_size is None else {"image_size": arguments.image_size}
    with tempfile.TemporaryDirectory() as folder:
        config, weights = use_random_weights(load_config(arguments.preset, arguments.config, overrides), Path(folder))
        if arguments.only != "runs":
            compare_backbones(config, weights, arguments, record)
        if arguments.only != "backbones":
            found = [(runtime, precision) for _, runtime, precision in runtimes(arguments.device)]
            for runtime, precision in found or [(choose_runtime(arguments.device), "auto")]:
                whole_runs(
                    replace(config, backbone_precision=precision, precision=precision),
                    runtime,
                    weights,
                    arguments,
                    record,
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
