"""Everything that decides what is in an exported graph besides the weights."""

from dataclasses import dataclass
from typing import Literal

Preprocessing = Literal["imagenet", "clip"]

ACTIVATIONS = ("gelu", "quick_gelu")
PRECISIONS = ("fp32", "fp16", "int8")
ATTENTIONS = ("fused", "standard")  # ONNX Runtime's operator, and what TensorRT reads
IMAGE_OUTPUTS = ("tokens", "embedding")  # of an image tower


@dataclass(frozen=True)
class ExportOptions:
    """Options of an image tower's graph."""

    taps: tuple[int, ...]  # 0-based blocks; none where `outputs` has no tokens
    image_size: int
    activation: str = "gelu"
    heads: int | None = None  # None: those of the published tower of this width
    outputs: tuple[str, ...] = IMAGE_OUTPUTS
    precision: str = "fp32"  # int8: ONNX Runtime only
    attention: str = "fused"
    antialias: bool | None = None  # of the position embedding's resize; None is the model's own way
    preprocessing: Preprocessing | None = None  # only noted: what the images are normalised with; None: the model's own

    @property
    def embedding(self) -> bool:
        """Whether the image embedding is wanted, for which every block is needed."""
        return "embedding" in self.outputs
