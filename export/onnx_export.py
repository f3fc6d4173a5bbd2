"""Checkpoint in, verified ONNX file in the cache (or where the user wants it) out."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import onnx

from zsad.kernels.files import check_target, written_whole

from .agreement import Array, check_agreement, run_graph, sample_batch
from .checkpoints import cache_folder, find_checkpoint
from .quantisation import int8_errors, layers_in_fp32
from .state_dict import CheckpointError
from .vision_transformer import VisionTransformer, read_vision_transformer
from .vit_graph import BUILDER_VERSION, build_vit_graph, check_options

LARGEST_FILE = 2**31 - 2**20  # bytes; beyond, protobuf cannot hold the weights and they go into a file of their own


@dataclass(frozen=True)
class ExportOptions:
    """Everything that decides what is in an exported graph besides the weights."""

    taps: tuple[int, ...]
    image_size: int
    activation: str = "gelu"
    heads: int | None = None
    embedding: bool = True
    precision: str = "fp32"  # fp32, fp16 or int8
    attention: str = "fused"  # fused for ONNX Runtime, standard for TensorRT
    antialias: bool | None = None  # of the position embedding's resize; None is the model's own way
    preprocessing: str = "imagenet"  # only noted in the file: what the images have been normalised with


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file, the checkpoint it was made from, and whether this call made it."""

    path: Path
    checkpoint: str
    sha256: str  # of the checkpoint file
    built: bool
    agreement: str = ""  # how close it is to what it was compared with, if this call made it


def export_onnx(
    checkpoint: str,
    options: ExportOptions,
    output: Path | None = None,
    oracle: Literal["graph", "torch"] = "graph",
) -> ExportedModel:
    """Build the ONNX graph of a checkpoint and verify it, or return the one built before.

    checkpoint: a name of the manifest or a path. output: the file to write; by default one in the cache that is named
    after the checkpoint's digest and the options. oracle: what it is compared with, PyTorch or the fp32 graph in the
    other form of attention. Weights beyond 2 GiB stand in a second file, `output` + `.data`.

    Raises CheckpointError, also when the graph computes something else; OSError when the file cannot be written, or is
    the checkpoint itself.
    """
    source, digest = find_checkpoint(checkpoint)
    key = hashlib.sha256(json.dumps([digest, BUILDER_VERSION, asdict(options)]).encode()).hexdigest()[:16]
    path = output or cache_folder() / "models" / f"{Path(checkpoint).stem}-{options.image_size}-{key}.onnx"
    sizes = path.with_name(path.name + ".json")
    if output is None and sizes.is_file() and sizes.read_bytes() == _sizes(path):
        return ExportedModel(path, checkpoint, digest, built=False)

    check_target(path, source)
    metadata = {"checkpoint": Path(checkpoint).name, "checkpoint_sha256": digest}
    transformer = read_vision_transformer(source)
    try:
        with written_whole(path) as draft:
            agreement = _write_verified(draft, transformer, options, metadata, oracle)
            if weights_path(draft).exists():
                shutil.copymode(draft, weights_path(draft))  # from onnx it is the owner's alone
                weights_path(draft).replace(weights_path(path))
            else:
                weights_path(path).unlink(missing_ok=True)  # of a larger graph that had this name
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    if output is None:
        with written_whole(sizes) as temporary:
            temporary.write_bytes(_sizes(path))
    return ExportedModel(path, checkpoint, digest, built=True, agreement=agreement)


def weights_path(graph: Path) -> Path:
    """Return where a graph too large for one file keeps its weights."""
    return graph.with_name(graph.name + ".data")


def _sizes(path: Path) -> bytes:
    """The sizes in bytes of a graph and its weights, as the cache keeps them to notice what was cut or lost."""
    files = (file for file in (path, weights_path(path)) if file.is_file())
    return json.dumps({file.name: file.stat().st_size for file in files}).encode()


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, with large weights in `path` + `.data`."""
    weights_path(path).unlink(missing_ok=True)  # onnx would append to it
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save_model(model, str(path), save_as_external_data=size > LARGEST_FILE, location=weights_path(path).name)


def _write_verified(
    draft: Path, vit: VisionTransformer, options: ExportOptions, metadata: dict[str, str], oracle: str
) -> str:
    """Write a graph that passes ONNX's own rules and computes what it should; returns a line on the latter.

    In int8 with as few layers in fp32 as that takes, where `layers_in_fp32` offers them.
    """
    heads = check_options(vit, options.taps, options.image_size, options.heads)
    images = sample_batch(options.image_size)
    name, expected = _expected(draft, vit, options, oracle, images)
    choices: Iterable[tuple[str, ...]] = [()]
    if options.precision == "int8":
        taps = sorted({*options.taps, len(vit.blocks) - 1}) if options.embedding else options.taps
        choices = layers_in_fp32(
            int8_errors(vit, taps, options.image_size, options.activation, heads, options.antialias)
        )
    for exact in choices:
        save_graph(_build(vit, options, metadata, exact), draft)
        onnx.checker.check_model(str(draft), full_check=True)
        found = run_graph(draft, images)
        try:
            line = check_agreement(found, expected, options.precision, name)
        except CheckpointError as error:
            refusal = error
        else:
            return f"{line}; {len(exact)} linear layers in fp32" if exact else line
    raise refusal


def _build(
    vit: VisionTransformer, options: ExportOptions, metadata: dict[str, str], exact: tuple[str, ...]
) -> onnx.ModelProto:
    return build_vit_graph(
        vit,
        options.taps,
        options.image_size,
        options.activation,
        options.heads,
        options.embedding,
        options.precision,
        options.attention,
        options.antialias,
        exact,
        metadata={**metadata, "preprocessing": options.preprocessing, "builder_version": str(BUILDER_VERSION)},
    )


def _expected(
    draft: Path, vit: VisionTransformer, options: ExportOptions, oracle: str, images: Array
) -> tuple[str, list[Array]]:
    """Return what to compare a graph with, by name, and what that gives for images [B, 3, S, S]."""
    if oracle == "torch":
        from .torch_forward import TorchForward

        forward = TorchForward(vit, options)
        return "PyTorch", [forward.fetch(output) for output in forward(forward.tensor(images))]
    other = "standard" if options.attention == "fused" else "fused"
    reference = draft.with_name("fp32") / draft.name
    reference.parent.mkdir()
    save_graph(_build(vit, replace(options, precision="fp32", attention=other), {}, ()), reference)
    return "the fp32 graph", run_graph(reference, images)
