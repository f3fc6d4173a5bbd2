"""`zsad-export`: checkpoints to ONNX graphs and TensorRT engines."""

import argparse
import importlib.util
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsad.export.libraries import TARGETS
from zsad.export.options import (
    ACTIVATIONS,
    ATTENTIONS,
    GRAPH_WORDS,
    GRAPHS,
    IMAGE_OUTPUTS,
    NATIVE,
    PRECISIONS,
    ExportOptions,
    GraphOptions,
)

from .arguments import Parser, Version, add_loudness, log_level, numbers

if TYPE_CHECKING:  # `--help` waits for nothing that works on graphs
    from zsad.export.onnx_export import ExportedModel
    from zsad.export.tensorrt_engine import EngineOptions

    from .start import Interrupts

log = logging.getLogger("zsad")

EXAMPLES = """examples:
  zsad-export --preset challenge --target tensorrt-rtx      every engine that the preset needs
  zsad-export --checkpoint model.pth --taps 5,11,17,23 --output model.onnx
  zsad-export --fetch dinov2-vitl14 clip-vitl14-336 --output FOLDER
                                                            then, offline: ZSAD_WEIGHTS=FOLDER

exit codes: 0 done, 2 usage or anything that stopped it, 130 interrupted"""


@dataclass(frozen=True)
class Job:
    """One checkpoint to export."""

    checkpoint: str
    options: GraphOptions
    output: Path | None
    batch: tuple[int, int, int] | None = None  # of an engine, where the command line has none; None: the usual one
    files: tuple[str, ...] = ()  # what a preset's method reads beside the checkpoint: names of the manifest or files
    follows_images: bool = False  # zsad-infer makes it as large as images are; here it is as large as it can be


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zsad-export`; 0 done, 2 usage or anything that stopped it, 130 interrupted."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    from .console import guarded

    return guarded("zsad-export", log_level(arguments), partial(_run, parser, arguments), _explain)


def _explain(error: Exception) -> tuple[str, int] | None:
    """Say what stopped a command, with the exit code."""
    from zsad.engine.address_space import address_limit, said_scarcity
    from zsad.export.libraries import EngineError
    from zsad.export.state_dict import CheckpointError
    from zsad.kernels.machine import CacheError

    from .console import USAGE

    if isinstance(error, (CheckpointError, EngineError, CacheError, OSError)):
        return str(error), USAGE
    # PyTorch has no class of its own for it.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocat" in str(error)):
        if (limit := address_limit()) is not None:
            return said_scarcity(limit), USAGE
        return f"not enough memory ({' '.join(str(error).split())}); take a smaller --image-size", USAGE
    return None


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, interrupts: "Interrupts") -> int:
    """Do what is asked for; standard output gets the list, or the path of every file, and nothing else."""
    from zsad.export.checkpoints import fetch_checkpoint, read_manifest
    from zsad.export.tensorrt_engine import check_options
    from zsad.kernels.files import check_target

    from .console import DONE, emit

    interrupts.check()  # it may have been put off until here
    if arguments.list:
        for entry in read_manifest().values():
            automatic = any(source.automatic for source in entry.sources)
            fetchable = any(source.fetchable for source in entry.sources)
            fetched = "fetched when it is needed" if automatic else "with --fetch" if fetchable else "bring it yourself"
            emit(f"{entry.name}  ({entry.architecture or entry.kind}, {entry.licence}, {fetched})")
            for source in entry.sources:
                emit(f"    {source.location}\n        {source.file}: {source.facts}; {source.present() or 'not here'}")
        return DONE
    if arguments.fetch:
        for name in arguments.fetch:
            emit(str(fetch_checkpoint(name, arguments.output)))
            interrupts.check()
        return DONE
    # What can be refused is refused before minutes of work.
    jobs = _jobs(parser, arguments)
    for job in jobs:
        if job.output is not None:
            # pathlib raises for a user that there is not.
            check_target(job.output, Path(os.path.expanduser(job.checkpoint)))  # noqa: PTH111
    if arguments.target != "onnx":
        check_options(_engine_options(arguments), jobs[0].options.precision)
    for name in dict.fromkeys(name for job in jobs for name in (job.checkpoint, *job.files)):
        if name in read_manifest():
            fetch_checkpoint(name)
            interrupts.check()
    for job in map(_whole_patches, jobs):
        onnx = arguments.target == "onnx"
        emit(str(_export(job, job.output, keep=True).path if onnx else _build(job, arguments)))
        interrupts.check()
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zsad-export",
        description="Export vision transformer checkpoints to ONNX graphs and TensorRT engines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="list what the manifest names and exit")
    what.add_argument("--fetch", nargs="+", metavar="NAME", help="fetch what the manifest names so and exit")
    what.add_argument(
        "--preset",
        metavar="NAME",
        help="export every network of a preset of zsad-infer, also for known-good images, and fetch what it reads",
    )
    what.add_argument("--checkpoint", metavar="NAME|FILE", help="a name of the manifest or a checkpoint file")
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE.toml", help="with --preset: overrides, as in zsad-infer")
    add("--target", choices=["onnx", *TARGETS], default="onnx", help="(default: %(default)s)")
    add("--precision", choices=PRECISIONS, help="(default: fp32 for onnx, else fp16)")
    add("--image-size", type=int, metavar="PIXELS", help="(default: the preset's, else 518)")
    add(
        "--output",
        type=Path,
        metavar="PATH",
        help="the file, or the folder with --preset and --fetch (default: the cache)",
    )
    add_loudness(parser, "which weights are read, and how close each try in int8 comes")
    add("--version", action=Version, nargs=0, help="print the version and exit")
    _add_graph(parser)
    _add_engine(parser)
    return parser


def _add_graph(parser: argparse.ArgumentParser) -> None:
    graph = parser.add_argument_group("the graph")
    graph.add_argument("--taps", type=numbers(int), metavar="5,11,...", help="blocks to tap, 0-based")
    graph.add_argument(
        "--attention",
        choices=[*ATTENTIONS, NATIVE],
        help="operators of the attention (default: fused for onnx, else standard); native: a tower for zsad alone",
    )
    add = parser.add_argument_group("the graph of a --checkpoint (a preset brings its own)").add_argument
    add("--activation", choices=ACTIVATIONS, help=f"(default: {ExportOptions.activation})")
    add("--heads", type=int, help="attention heads (default: the published tower's of this width)")
    add("--preprocessing", choices=["imagenet", "clip"], help="noted in the file (default: the model's own)")
    add(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        help="when resizing the position embedding (default: as the model does)",
    )
    add("--graph", choices=GRAPHS, default="image", help="which of the graphs of its network (default: %(default)s)")
    add(
        "--outputs",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,...",
        help=f"of {', '.join(IMAGE_OUTPUTS)} (default: {','.join(ExportOptions.outputs)})",
    )
    without = partial(add, dest="outputs", action="store_const")
    without("--no-embedding", const=("tokens",), help="leave out the image embedding and unused blocks")
    without("--no-tokens", const=("embedding",), help="leave out the patch tokens; takes no --taps")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the engine (--target tensorrt or tensorrt-rtx)").add_argument
    add(
        "--batch",
        type=numbers(int),
        metavar="1,8,32",
        help="smallest, best and largest batch (default: what zsad-infer takes for a preset's graph, else %(metavar)s)",
    )
    add("--device", type=int, default=0, metavar="GPU", help="GPU to build for (default: %(default)s)")
    add(
        "--compute-capability",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="8.9,...",
        help="GPUs to build for, tensorrt-rtx only (default: all from 8.0)",
    )
    add("--strip-weights", action="store_true", help="leave the weights out; loading takes the ONNX file")
    add("--version-compatible", action="store_true", help="run in later TensorRT versions too")
    add("--hardware-compatible", action="store_true", help="run on every GPU from 8.0 (slower)")


def _jobs(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Job]:
    """The exports that the command line asks for."""
    from zsad.engine.config import LARGEST_SIDE
    from zsad.export.tensorrt_engine import EngineOptions

    onnx = arguments.target == "onnx"
    if arguments.batch is not None and len(arguments.batch) != 3:
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
    if not onnx and options.attention != "standard":
        parser.error(f"--attention {options.attention} is not TensorRT's, which reads standard")
    if arguments.preset is not None:
        if own or arguments.graph != "image":
            named = ", ".join([*own, *(["graph"] if arguments.graph != "image" else [])])
            parser.error(f"a preset brings its own {named}; leave it out (--config changes a preset)")
        return _preset_jobs(parser, arguments, options)
    if arguments.config is not None:
        parser.error("--config changes a preset; name one with --preset")
    if arguments.graph != "image":
        return [Job(arguments.checkpoint, _graph_options(parser, arguments, options), arguments.output)]
    if not options.taps and "tokens" in options.outputs:
        parser.error("--taps is needed with --checkpoint, for example --taps 5,11,17,23")
    return [Job(arguments.checkpoint, options, arguments.output)]


def _graph_options(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, image: ExportOptions
) -> GraphOptions:
    """The options of a graph that is no image tower's; image: those of one on the same command line."""
    kind = GRAPHS[arguments.graph]
    known = {option.name for option in fields(kind)}
    given: dict[str, Any] = {name: value for name in GRAPH_WORDS if (value := getattr(arguments, name)) is not None}
    if foreign := [name.replace("_", "-") for name in given if name not in known]:
        parser.error(f"--graph {arguments.graph}: this graph has no {', '.join(foreign)}; leave it out")
    both: dict[str, Any] = {"precision": image.precision, "attention": image.attention}
    return kind(**given, **{name: value for name, value in both.items() if name in known})


def _preset_jobs(parser: argparse.ArgumentParser, arguments: argparse.Namespace, options: ExportOptions) -> list[Job]:
    """The exports that `zsad-infer --preset` would make itself, with known-good images and without.

    They have the precision and are for the target asked for.
    """
    from zsad.engine.config import ConfigError, load_config
    from zsad.engine.methods.method import graph_requests, method_class
    from zsad.engine.networks.build import candidates, engine_batch, graph_options
    from zsad.engine.networks.runtime import choose_runtime

    given = {k: v for k in ("taps", "image_size") if (v := getattr(arguments, k)) is not None}
    load = partial(load_config, arguments.preset, arguments.config, method_of=method_class)
    try:
        config = load({**given, "reference": None, "shots": None})
        requests = dict.fromkeys(graph_requests(config), "")  # with what tells their files from each other
        if method_class(config.method).takes_references:  # which may take more of the networks
            few_shot = graph_requests(load({**given, "shots": 1}))
            requests |= {request: "-few-shot" for request in few_shot if request not in requests}
    except ConfigError as error:
        parser.error(str(error))
    suffix = ".onnx" if arguments.target == "onnx" else ".engine"
    jobs = []
    for request, kind in requests.items():
        spec = config.specs[request.network]
        attention = options.attention
        if arguments.target == "onnx" and arguments.output is None and arguments.attention is None:
            first, *_ = candidates(request, options.precision, choose_runtime("cpu"))
            attention = NATIVE if first == "native" else attention
        own = graph_options(spec, request, options.precision, attention)
        file = f"{request.network}-{own.label}{kind}-{own.precision}{suffix}"
        output = arguments.output / file if arguments.output else None
        follows_images = spec.image_size == "auto"
        jobs.append(Job(spec.checkpoint, own, output, engine_batch(request), config.settings.files, follows_images))
    return jobs


def _whole_patches(job: Job) -> Job:
    """Make a graph that follows the images as large as whole patches of its checkpoint allow, and say for what size."""
    from zsad.export.checkpoints import find_checkpoint
    from zsad.export.vision_transformer import read_patch_size

    if not job.follows_images:
        return job
    assert isinstance(job.options, ExportOptions)
    patch = read_patch_size(find_checkpoint(job.checkpoint)[0])
    options = replace(job.options, image_size=job.options.image_size // patch * patch)
    said = "zsad-infer takes images as large as they are; this is for %d px, --image-size for another"
    log.info(f"%s: {said}", job.checkpoint, options.image_size)
    if job.output is None:
        return replace(job, options=options)
    name = f"-{options.label}".join(job.output.name.rsplit(f"-{job.options.label}", 1))
    return replace(job, options=options, output=job.output.with_name(name))


def _export(job: Job, output: Path | None, keep: bool) -> "ExportedModel":
    from zsad.export.onnx_export import export_onnx

    has_torch = importlib.util.find_spec("torch") is not None
    model = export_onnx(job.checkpoint, job.options, output, "torch" if has_torch else "graph", keep)
    log.info("%s: %s", job.checkpoint, model.agreement or "already built")
    return model


def _engine_options(arguments: argparse.Namespace, batch: tuple[int, int, int] | None = None) -> "EngineOptions":
    from zsad.export.tensorrt_engine import EngineOptions

    return EngineOptions(
        arguments.target,
        arguments.batch or batch or EngineOptions.batch,
        arguments.device,
        arguments.compute_capability,
        arguments.strip_weights,
        arguments.version_compatible,
        arguments.hardware_compatible,
    )


def _build(job: Job, arguments: argparse.Namespace) -> Path:
    """Export a graph, build its engine, and return the engine's file."""
    from zsad.export.tensorrt_engine import build_engine, rebuild_command

    graph = _export(job, None, keep=arguments.strip_weights)  # which loading such an engine takes
    started = time.monotonic()
    options = _engine_options(arguments, job.batch)
    command = rebuild_command(job.checkpoint, job.options, options, job.output)
    engine = build_engine(graph, options, command, job.output, keep=True)
    said = f"built in {time.monotonic() - started:.1f} s" if engine.built else "already built"
    log.info("%s: %.0f MiB, %s", engine.path.name, engine.fingerprint.engine_bytes / 2**20, said)
    return engine.path
