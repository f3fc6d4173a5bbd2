"""`zsad-export`: checkpoints to ONNX graphs and TensorRT engines."""

import argparse
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from zsad.export.checkpoints import fetch_checkpoint, read_manifest
from zsad.export.libraries import TARGETS, EngineError
from zsad.export.onnx_export import ExportedModel, export_onnx
from zsad.export.options import ACTIVATIONS, ATTENTIONS, PRECISIONS, ExportOptions
from zsad.export.state_dict import CheckpointError
from zsad.export.tensorrt_engine import (
    EngineOptions,
    build_engine,
    check_options,
    rebuild_command,
)
from zsad.kernels.files import check_target
from zsad.kernels.machine import CacheError

EXAMPLES = """examples:
  zsad-export --preset challenge --target tensorrt-rtx      every engine that the preset needs
  zsad-export --checkpoint model.pth --taps 5,11,17,23 --output model.onnx
  zsad-export --fetch dinov2-vitl14 clip-vitl14-336 --output FOLDER
                                                            then, offline: ZSAD_WEIGHTS=FOLDER"""


@dataclass(frozen=True)
class Job:
    """One checkpoint to export."""

    checkpoint: str
    options: ExportOptions
    output: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zsad-export`; 0 done, 2 usage or anything that stopped it, 130 interrupted."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        with _terminable():
            _run(parser, arguments)
    except KeyboardInterrupt:
        print("zsad-export: interrupted", file=sys.stderr)
        return 130
    except (CheckpointError, EngineError, CacheError, OSError) as error:
        print(f"zsad-export: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocat" not in str(error):  # PyTorch's, which has no class for it
            raise
        detail = " ".join(str(error).split())
        print(f"zsad-export: not enough memory ({detail}); take a smaller --image-size", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command through its clean-up, as Ctrl-C does, unless the caller has other plans for it."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.list:
        for checkpoint in read_manifest().values():
            print(f"{checkpoint.name}  ({checkpoint.architecture}, {checkpoint.licence})")
            for source in checkpoint.sources:
                print(f"    {source.location}\n        {source.file}: {source.facts}; {source.present() or 'not here'}")
        return
    if arguments.fetch:
        for name in arguments.fetch:
            print(fetch_checkpoint(name, arguments.output))
        return
    # What can be refused is refused before minutes of work.
    jobs = _jobs(parser, arguments)
    for job in jobs:
        if job.output is not None:
            # pathlib raises for a user that there is not.
            check_target(job.output, Path(os.path.expanduser(job.checkpoint)))  # noqa: PTH111
    if arguments.target != "onnx":
        check_options(_engine_options(arguments), jobs[0].options.precision)
    for job in jobs:
        if job.checkpoint in read_manifest():
            fetch_checkpoint(job.checkpoint)
        if arguments.target == "onnx":
            print(_export(job, job.output, keep=True).path)
        else:
            _build(job, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zsad-export",
        description="Export vision transformer checkpoints to ONNX graphs and TensorRT engines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="list the checkpoints of the manifest and exit")
    what.add_argument("--fetch", nargs="+", metavar="NAME", help="fetch checkpoints of the manifest and exit")
    what.add_argument("--preset", metavar="NAME", help="export every backbone of a preset of zsad-infer")
    what.add_argument("--checkpoint", metavar="NAME|FILE", help="a name of the manifest or a checkpoint file")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="with --preset: overrides, as in zsad-infer")
    parser.add_argument("--target", choices=["onnx", *TARGETS], default="onnx", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, help="(default: fp32 for onnx, else fp16)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="(default: the preset's, else 518)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="the file, or the folder with --preset and --fetch (default: the cache)",
    )
    graph = parser.add_argument_group("the graph")
    graph.add_argument("--taps", type=_numbers, metavar="5,11,...", help="blocks to tap, 0-based")
    graph.add_argument(
        "--attention", choices=ATTENTIONS, help="operators of the attention (default: fused for onnx, else standard)"
    )
    own = parser.add_argument_group("the graph of a --checkpoint (a preset brings its own)")
    own.add_argument("--activation", choices=ACTIVATIONS, help=f"(default: {ExportOptions.activation})")
    own.add_argument("--heads", type=int, help="attention heads (default: the published tower's of this width)")
    own.add_argument(
        "--preprocessing",
        choices=["imagenet", "clip"],
        help="noted in the file (default: the model's own)",
    )
    own.add_argument(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        help="when resizing the position embedding (default: as the model does)",
    )
    without = partial(own.add_argument, dest="outputs", action="store_const")
    without("--no-embedding", const=("tokens",), help="leave out the image embedding and unused blocks")
    without("--no-tokens", const=("embedding",), help="leave out the patch tokens; takes no --taps")
    engine = parser.add_argument_group("the engine (--target tensorrt or tensorrt-rtx)")
    engine.add_argument(
        "--batch", type=_numbers, default=(1, 8, 32), metavar="1,8,32", help="smallest, best and largest batch"
    )
    engine.add_argument("--device", type=int, default=0, metavar="GPU", help="GPU to build for (default: %(default)s)")
    engine.add_argument(
        "--compute-capability",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="8.9,...",
        help="GPUs to build for, tensorrt-rtx only (default: all from 8.0)",
    )
    engine.add_argument(
        "--strip-weights", action="store_true", help="leave the weights out; loading takes the ONNX file"
    )
    engine.add_argument("--version-compatible", action="store_true", help="run in later TensorRT versions too")
    engine.add_argument("--hardware-compatible", action="store_true", help="run on every GPU from 8.0 (slower)")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, not {text!r}") from None


def _jobs(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Job]:
    """The exports that the command line asks for."""
    from zsad.engine.config import LARGEST_SIDE

    onnx = arguments.target == "onnx"
    if len(arguments.batch) != 3:
        parser.error("--batch takes three numbers: smallest, best and largest, for example 1,8,32")
    if onnx and _engine_options(arguments) != EngineOptions(arguments.target):
        parser.error("--batch, --device and the other options of an engine need --target tensorrt or tensorrt-rtx")
    size = 518 if arguments.image_size is None else arguments.image_size
    if not 0 < size <= LARGEST_SIDE:
        parser.error(f"--image-size must be from 1 to {LARGEST_SIDE} pixels, not {size}")
    own = {
        name: value
        for name in ("activation", "heads", "preprocessing", "antialias", "outputs")
        if (value := getattr(arguments, name)) is not None
    }
    options = ExportOptions(
        taps=arguments.taps or (),
        image_size=size,
        precision=arguments.precision or ("fp32" if onnx else "fp16"),
        attention=arguments.attention or ("fused" if onnx else "standard"),
        **own,
    )
    if not onnx and options.attention == "fused":
        parser.error("--attention fused is ONNX Runtime's; TensorRT reads standard")
    if arguments.preset is not None:
        if own:
            parser.error(f"a preset brings its own {', '.join(own)}; leave it out (--config changes a preset)")
        return _preset_jobs(parser, arguments, options)
    if arguments.config is not None:
        parser.error("--config changes a preset; name one with --preset")
    if not options.taps and "tokens" in options.outputs:
        parser.error("--taps is needed with --checkpoint, for example --taps 5,11,17,23")
    return [Job(arguments.checkpoint, options, arguments.output)]


def _preset_jobs(parser: argparse.ArgumentParser, arguments: argparse.Namespace, options: ExportOptions) -> list[Job]:
    """The exports that `zsad-infer --preset` would make itself, with the precision and target asked for."""
    from zsad.engine.config import ConfigError, load_config
    from zsad.engine.methods.method import graph_requests, method_class
    from zsad.engine.networks.build import export_options

    try:
        config = load_config(
            arguments.preset,
            arguments.config,
            {k: v for k in ("taps", "image_size") if (v := getattr(arguments, k)) is not None},
            method_of=method_class,
        )
    except ConfigError as error:
        parser.error(str(error))
    suffix = ".onnx" if arguments.target == "onnx" else ".engine"
    jobs = []
    for request in graph_requests(config):
        spec = config.networks[request.network]
        own = export_options(spec, request, options.precision, options.attention)
        file = f"{request.network}-{own.image_size}-{own.precision}{suffix}"
        jobs.append(Job(spec.checkpoint, own, arguments.output / file if arguments.output else None))
    return jobs


def _export(job: Job, output: Path | None, keep: bool) -> ExportedModel:
    model = export_onnx(job.checkpoint, job.options, output, "torch" if _has_torch() else "graph", keep)
    print(f"zsad-export: {job.checkpoint}: {model.agreement or 'already built'}", file=sys.stderr)
    return model


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _engine_options(arguments: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        arguments.target,
        arguments.batch,
        arguments.device,
        arguments.compute_capability,
        arguments.strip_weights,
        arguments.version_compatible,
        arguments.hardware_compatible,
    )


def _build(job: Job, arguments: argparse.Namespace) -> None:
    graph = _export(job, None, keep=arguments.strip_weights)  # which loading such an engine takes
    started = time.monotonic()
    options = _engine_options(arguments)
    command = rebuild_command(job.checkpoint, job.options, options, job.output)
    engine = build_engine(graph, options, command, job.output, keep=True)
    said = f"built in {time.monotonic() - started:.1f} s" if engine.built else "already built"
    mebibytes = engine.fingerprint.engine_bytes / 2**20
    print(f"zsad-export: {engine.path.name}: {mebibytes:.0f} MiB, {said}", file=sys.stderr)
    print(engine.path)
