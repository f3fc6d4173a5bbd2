"""Checkpoint in, verified ONNX file in the cache (or where the user wants it) out.

What builds graphs is imported where one is built: most runs find theirs in the cache, and start sooner without.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from zsad.kernels.files import check_target, parse_json, remembered_sha256, written_whole
from zsad.kernels.machine import cache_places, cache_to_write

from .checkpoints import find_checkpoint
from .options import BUILDER_VERSION, NATIVE, ExportOptions, GraphOptions, Preprocessing, Shape
from .state_dict import CheckpointError

if TYPE_CHECKING:
    import onnx

    from .adopt import ReadyGraph
    from .agreement import Array
    from .builders import GraphBuilder

log = logging.getLogger("zsad")

# Bytes of weights beyond which they go into a file of their own: more than protobuf holds, and in the cache any, since
# they are then mapped into memory, where what is within protobuf is copied.
LARGEST_FILE, LARGEST_CACHED = 2**31 - 2**20, 2**20


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file, the checkpoint it was made from, and whether this call made it."""

    path: Path
    checkpoint: str
    sha256: str  # of the checkpoint file
    precision: str
    preprocessing: Preprocessing  # what the images are to be normalised with
    inputs: Mapping[str, Shape]
    built: bool
    agreement: str = ""  # how close it is to what it was compared with, if this call made it


def export_onnx(
    checkpoint: str,
    options: GraphOptions,
    output: Path | None = None,
    oracle: Literal["graph", "torch"] = "graph",
    keep: bool = False,
) -> ExportedModel:
    """Build an ONNX graph of a checkpoint and verify it, or return the one built before.

    checkpoint: a name of the manifest or a path. options: those of the kind of graph that is wanted. output: the file
    to write; by default one in the cache that is named after the checkpoint's digest and the options. oracle: what it
    is compared with, PyTorch or an fp32 graph that computes the same in another way. keep: it is of no use but in the
    cache; otherwise a temporary file will do, which goes when the process ends, where the cache may only be read.
    Weights beyond 2 GiB, of files in the cache all of them, stand in a second file, `output` + `.data`.

    Raises CheckpointError, also when the graph computes something else; EngineError without ONNX Runtime; CacheError
    when the cache cannot be written; OSError when the file cannot be, or is the checkpoint itself.
    """
    source, digest = find_checkpoint(checkpoint)
    log.debug("%s: weights of %s, sha256 %s", checkpoint, source, digest)
    key = hashlib.sha256(json.dumps([digest, BUILDER_VERSION, asdict(options)]).encode()).hexdigest()[:16]
    suffix = "safetensors" if isinstance(options, ExportOptions) and options.attention == NATIVE else "onnx"
    name = f"{Path(checkpoint).stem}-{options.label}-{key}.{suffix}"
    model = partial(ExportedModel, checkpoint=checkpoint, sha256=digest, precision=options.precision)
    if output is not None:
        check_target(output, source)
    else:
        for folder in cache_places("models"):
            if (known := _read_facts(folder / name)) is not None:
                preprocessing, inputs = known
                return model(path=folder / name, preprocessing=preprocessing, inputs=inputs, built=False)

    from .builders import read_builder

    builder = read_builder(source, options)
    path = output or cache_to_write("models", keep) / name
    metadata = {
        "checkpoint": Path(checkpoint).name,
        "checkpoint_sha256": digest,
        "preprocessing": builder.preprocessing,
        "builder_version": str(BUILDER_VERSION),
    }
    try:
        with written_whole(path) as draft:
            largest = LARGEST_FILE if output is not None else min(LARGEST_FILE, LARGEST_CACHED)
            agreement = _write_verified(draft, builder, options, metadata, oracle, largest)
            if weights_path(draft).exists():
                shutil.copymode(draft, weights_path(draft))  # from onnx it is the owner's alone
                weights_path(draft).replace(weights_path(path))
            else:
                weights_path(path).unlink(missing_ok=True)  # of a larger graph that had this name
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    if output is None:
        with written_whole(_facts_path(path)) as temporary:
            facts = {"sha256": _digests(path), "preprocessing": builder.preprocessing, "inputs": builder.inputs}
            temporary.write_text(json.dumps(facts), encoding="utf-8")
    return model(path=path, preprocessing=builder.preprocessing, inputs=builder.inputs, built=True, agreement=agreement)


def weights_path(graph: Path) -> Path:
    """Return where a graph too large for one file keeps its weights."""
    return graph.with_name(graph.name + ".data")


def _facts_path(graph: Path) -> Path:
    return graph.with_name(graph.name + ".json")


def _read_facts(path: Path) -> tuple[Preprocessing, Mapping[str, Shape]] | None:
    """Return preprocessing and inputs of a cached graph; None where it is not there as it was written."""
    try:
        known = parse_json(_facts_path(path).read_text(encoding="utf-8"))
        inputs = {name: tuple(shape) for name, shape in known["inputs"].items()}
        if known["sha256"] == _digests(path):
            return known["preprocessing"], inputs
        log.warning("%s: damaged since it was built; it is built anew", path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return None


def _digests(path: Path) -> dict[str, str]:
    """The sha256 of a graph and of its weights, as the cache keeps them to notice what is damaged or lost."""
    files = (file for file in (path, weights_path(path)) if file.is_file())
    return {file.name: remembered_sha256(file) for file in files}


def save_graph(model: "onnx.ModelProto", path: Path, largest: int | None = None) -> None:
    """Write a model, with weights of more bytes than `largest`, or than it can hold, in `path` + `.data`."""
    import onnx

    weights_path(path).unlink(missing_ok=True)  # onnx would append to it
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    apart = size > (largest or LARGEST_FILE)
    onnx.save_model(model, str(path), save_as_external_data=apart, location=weights_path(path).name)


def _write_verified(
    draft: Path,
    builder: "GraphBuilder | ReadyGraph",
    options: GraphOptions,
    metadata: dict[str, str],
    oracle: str,
    largest: int,
) -> str:
    """Write a graph that passes ONNX's own rules and computes what it should; returns a line on the latter.

    In int8 with as few layers in fp32 as that takes, where `layers_in_fp32` offers them.
    """
    from .agreement import check_agreement, sample_inputs

    builder.check()
    inputs = sample_inputs(builder.inputs)
    name, expected = _expected(draft, builder, oracle, inputs)
    for exact in builder.choices():
        _save(draft, builder, exact, metadata, largest)
        found = _run(draft, options, inputs)
        try:
            line = check_agreement(found, expected, options.precision, name)
        except CheckpointError as error:
            log.debug("with %d linear layers in fp32: %s", len(exact), error)
            refusal = error
        else:
            return f"{line}; {len(exact)} linear layers in fp32" if exact else line
    raise refusal


def _save(
    path: Path, builder: "GraphBuilder | ReadyGraph", exact: Collection[str], metadata: dict[str, str], largest: int
) -> None:
    """Write a graph that passes ONNX's own rules, or the file of a native tower."""
    import onnx

    from .builders import ImageTowerBuilder
    from .native_weights import save_native_tower

    if isinstance(builder, ImageTowerBuilder) and builder.options.attention == NATIVE:
        return save_native_tower(path, builder.weights, builder.options, exact, metadata, builder.codes)
    save_graph(builder.build(exact, metadata), path, largest)
    return onnx.checker.check_model(str(path), full_check=True)


def _run(path: Path, options: GraphOptions, inputs: Mapping[str, NDArray[Any]]) -> "Mapping[str, Array]":
    """Return a graph's outputs from what it is to run in."""
    if isinstance(options, ExportOptions) and options.attention == NATIVE:
        from .native_tower import NativeTower

        return NativeTower(path).run(inputs["images"])
    from .agreement import run_graph

    return run_graph(path, inputs)


def _expected(
    draft: Path, builder: "GraphBuilder | ReadyGraph", oracle: str, inputs: Mapping[str, NDArray[Any]]
) -> "tuple[str, Mapping[str, Array]]":
    """Return what to compare a graph with, by name, and what that gives for the inputs."""
    from .adopt import ReadyGraph
    from .agreement import run_graph

    if isinstance(builder, ReadyGraph):
        return "the file as it came", builder.expected(inputs)
    if oracle == "torch":
        forward = builder.forward()
        outputs = forward(*(forward.tensor(array) for array in inputs.values()))
        return "PyTorch", {name: forward.fetch(output) for name, output in outputs.items()}
    reference = draft.with_name("fp32") / draft.name
    reference.parent.mkdir()
    save_graph(builder.other().build((), {}), reference)
    return "the fp32 graph", run_graph(reference, inputs)
