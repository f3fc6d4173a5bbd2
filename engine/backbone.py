"""Runs an exported vision transformer: images in, patch tokens and image embedding out."""

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from zsad.export.onnx_export import ExportOptions, export_onnx
from zsad.kernels.planner import available_cores

from .config import BackboneConfig, ConfigError

Array = NDArray[np.float32]


def choose_device(device: str) -> str:
    """Resolve `auto`, `cpu` or `cuda:N` to a device that ONNX Runtime can use here; raises ConfigError."""
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if device == "auto":
        return "cuda:0" if has_cuda else "cpu"
    kind, _, number = device.partition(":")
    if device == "cpu" or (kind == "cuda" and (number.isdigit() or not number)):
        if kind == "cuda" and not has_cuda:
            raise ConfigError(
                f"device {device!r}: the installed ONNX Runtime has no CUDA provider; run: "
                "pip uninstall -y onnxruntime && pip install onnxruntime-gpu   (or use --device cpu)"
            )
        return "cpu" if kind == "cpu" else f"cuda:{number or 0}"
    raise ConfigError(f"device must be auto, cpu or cuda:N, not {device!r}")


@dataclass(frozen=True)
class Backbone:
    """An ONNX Runtime session over one exported graph."""

    session: ort.InferenceSession
    checkpoint: str
    sha256: str  # of the checkpoint file
    grid: tuple[int, int]
    layers: int
    channels: int
    has_embedding: bool

    def run(self, images: Array) -> tuple[Array, Array | None]:
        """Return patch tokens [B, L, P, C] and, where exported, image embeddings [B, D] of images [B, 3, S, S]."""
        outputs = self.session.run(None, {"images": images})
        return outputs[0], outputs[1] if self.has_embedding else None


def load_backbone(config: BackboneConfig, image_size: int, embedding: bool, device: str) -> Backbone:
    """Export the checkpoint if that was not done before, and open a session on the device.

    Raises CheckpointError for weights that cannot be had or used.
    """
    options = ExportOptions(
        config.taps, image_size, config.activation, config.heads, embedding, preprocessing=config.preprocessing
    )
    model = export_onnx(config.checkpoint, options)
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = available_cores()
    # Threads that spin between batches would take their core from decoding and from mutual scoring.
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.split(":")[1]}))
    session = ort.InferenceSession(str(model.path), session_options, providers=providers)
    _, layers, patches, channels = session.get_outputs()[0].shape
    side = int(session.get_modelmeta().custom_metadata_map["grid"])
    assert side * side == patches
    return Backbone(session, config.checkpoint, model.sha256, (side, side), layers, channels, embedding)
