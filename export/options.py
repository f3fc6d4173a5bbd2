"""Everything that decides what is in an exported graph besides the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

# Part of every cache key: raise it whenever a graph changes.
BUILDER_VERSION = 8

Preprocessing = Literal["imagenet", "clip", "isnet"]
# None: the batch, always the first axis; an input without one goes with every part of it.
Shape = tuple[int | None, ...]

ACTIVATIONS = ("gelu", "quick_gelu")
PRECISIONS = ("fp32", "fp16", "int8")
ATTENTIONS = ("fused", "standard")  # ONNX Runtime's operators, and what TensorRT and OpenVINO read
NATIVE = "native"  # of image towers: the whole tower in zsad's own code for CPUs, which no library reads
WINDOWS = {"windows_2": 2, "windows_3": 3}  # output → patches per side of a window
# Options of graphs that `zsad-export` takes beside precision and attention, which it has for all of them.
GRAPH_WORDS = ("image_size", "outputs", "taps", "activation", "heads", "preprocessing", "antialias")
IMAGE_OUTPUTS = ("tokens", "embedding", "patches", *WINDOWS)  # of an image tower


@dataclass(frozen=True)
class ExportOptions:
    """Options of an image tower's graph."""

    kind: ClassVar = "image"
    taps: tuple[int, ...]  # 0-based blocks; none where `outputs` has no tokens
    image_size: int
    activation: str = "gelu"
    heads: int | None = None  # None: those of the published tower of this width
    outputs: tuple[str, ...] = ("tokens", "embedding")
    precision: str = "fp32"  # int8: not TensorRT
    attention: str = "fused"  # or native
    antialias: bool | None = None  # of the position embedding's resize; None is the model's own way
    preprocessing: Preprocessing | None = None  # only noted: what the images are normalised with; None: the model's own

    @property
    def label(self) -> str:
        """What tells the graph's file from those of other graphs of the same weights."""
        return str(self.image_size)

    def depth(self, blocks: int) -> int:
        """Return how many of a tower's blocks the whole image passes through."""
        if "embedding" in self.outputs or "patches" in self.outputs:
            return blocks
        return self.taps[-1] + 1 if self.taps else 0


@dataclass(frozen=True)
class TextOptions:
    """Options of a text tower's graph."""

    kind: ClassVar = "text"
    activation: str = "gelu"
    heads: int | None = None  # None: one for every 64 channels
    precision: str = "fp32"  # or fp16
    attention: str = "fused"
    context: int = 77  # tokens per text; a tower of longer texts is cut to them, which changes nothing

    @property
    def label(self) -> str:
        """What tells the graph's file from those of other graphs of the same weights."""
        return "text"


class _Labelled:
    """Options of a graph of one of several kinds, for one size of images."""

    prefix: ClassVar[str]
    image_size: int

    @property
    def label(self) -> str:
        """What tells the graph's file from those of other graphs of the same weights."""
        return f"{self.prefix}-{self.image_size}"


@dataclass(frozen=True)
class ClipSegImageOptions(_Labelled):
    """Options of the graph of CLIPSeg's image tower."""

    kind: ClassVar = "clipseg_image"
    prefix: ClassVar = "image"
    image_size: int = 352
    taps: tuple[int, ...] = (3, 6, 9)  # 0-based blocks, those that the decoder has learnt from
    activation: str = "quick_gelu"
    heads: int | None = None  # None: those of the published tower of this width
    precision: str = "fp32"  # or fp16
    attention: str = "fused"

    @property
    def tower(self) -> ExportOptions:
        """The options of an image tower that takes the images through the same blocks."""
        return ExportOptions(
            taps=self.taps,
            image_size=self.image_size,
            activation=self.activation,
            heads=self.heads,
            outputs=("tokens",),
            precision=self.precision,
            attention=self.attention,
            antialias=False,
        )


@dataclass(frozen=True)
class ClipSegDecoderOptions(_Labelled):
    """Options of the graph of CLIPSeg's decoder."""

    kind: ClassVar = "clipseg_decoder"
    prefix: ClassVar = "decoder"
    image_size: int = 352  # of logits, as of images
    heads: int = 4
    precision: str = "fp32"  # or fp16
    attention: str = "fused"


@dataclass(frozen=True)
class IsnetOptions(_Labelled):
    """Options of IS-Net's graph."""

    kind: ClassVar = "isnet"
    prefix: ClassVar = "isnet"
    image_size: int = 1024  # a multiple of 64
    precision: str = "fp32"  # or fp16


@dataclass(frozen=True)
class SamImageOptions(_Labelled):
    """Options of the graph of an image encoder of SAM or MobileSAM."""

    kind: ClassVar = "sam_image"
    prefix: ClassVar = "image"
    image_size: int = 1024
    precision: str = "fp32"  # or fp16
    attention: str = "fused"


@dataclass(frozen=True)
class SamMasksOptions(_Labelled):
    """Options of the graph of SAM's prompt encoder and mask decoder."""

    kind: ClassVar = "sam_masks"
    prefix: ClassVar = "masks"
    image_size: int = 1024  # in whose pixels points are; 16 make a cell of the embedding
    heads: int = 8
    precision: str = "fp32"  # or fp16


GraphOptions = (
    ExportOptions
    | TextOptions
    | ClipSegImageOptions
    | ClipSegDecoderOptions
    | IsnetOptions
    | SamImageOptions
    | SamMasksOptions
)
GRAPHS: Mapping[str, type[GraphOptions]] = {options.kind: options for options in get_args(GraphOptions)}
