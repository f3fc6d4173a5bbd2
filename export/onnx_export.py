"""Checkpoint in, ONNX file in the cache (or where the user wants it) out."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from .checkpoints import cache_folder, find_checkpoint
from .files import written_whole
from .state_dict import CheckpointError, read_vision_transformer
from .vit_graph import BUILDER_VERSION, build_vit_graph


@dataclass(frozen=True)
class ExportOptions:
    """Everything that decides what is in an exported graph besides the weights."""

    taps: tuple[int, ...]
    image_size: int
    activation: str = "gelu"
    heads: int | None = None
    embedding: bool = True


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file, the checkpoint it was made from, and whether this call made it."""

    path: Path
    checkpoint: str
    sha256: str  # of the checkpoint file
    built: bool


def export_onnx(checkpoint: str, options: ExportOptions, output: Path | None = None) -> ExportedModel:
    """Build the ONNX graph of a checkpoint, or return the one built before.

    checkpoint: a name of the manifest or a path. output: the file to write; by default one in the cache that is named
    after the checkpoint's digest and the options. Raises CheckpointError, OSError when the file cannot be written.
    """
    source, digest = find_checkpoint(checkpoint)
    key = hashlib.sha256(json.dumps([digest, BUILDER_VERSION, asdict(options)]).encode()).hexdigest()[:16]
    path = output or cache_folder() / "models" / f"{Path(checkpoint).stem}-{options.image_size}-{key}.onnx"
    if output is None and path.is_file():
        return ExportedModel(path, checkpoint, digest, built=False)

    transformer = read_vision_transformer(source)
    try:
        model = build_vit_graph(
            transformer,
            options.taps,
            options.image_size,
            options.activation,
            options.heads,
            options.embedding,
            metadata={"checkpoint": Path(checkpoint).name, "checkpoint_sha256": digest},
        )
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    with written_whole(path) as temporary:
        onnx.save_model(model, str(temporary))
    return ExportedModel(path, checkpoint, digest, built=True)
