"""What builds each kind of graph from the weights of its network."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import onnx

from .adopt import ReadyGraph, read_ready_graph
from .clipseg import ClipSegDecoder, read_clipseg_decoder
from .clipseg_graph import (
    build_clipseg_decoder_graph,
    build_clipseg_image_graph,
    check_clipseg_decoder_options,
    check_clipseg_image_options,
    clipseg_decoder_inputs,
)
from .isnet import ISNet, read_isnet
from .isnet_graph import build_isnet_graph, check_isnet_options
from .native_weights import Codes, check_native_options
from .options import (
    NATIVE,
    ClipSegDecoderOptions,
    ClipSegImageOptions,
    ExportOptions,
    GraphOptions,
    IsnetOptions,
    Preprocessing,
    SamImageOptions,
    SamMasksOptions,
    Shape,
    TextOptions,
)
from .quantisation import LOOSEST, int8_errors, layers_in_fp32
from .sam import MaskDecoder, SamEncoder, TinyEncoder, read_mask_decoder, read_sam_encoder
from .sam_image_graph import build_sam_image_graph, check_sam_image_options
from .sam_masks_graph import build_sam_masks_graph, check_sam_masks_options, sam_masks_inputs
from .state_dict import CheckpointError
from .text_graph import build_text_graph, check_text_options
from .text_transformer import VOCABULARY, TextTransformer, read_text_transformer
from .vision_transformer import CLIP, VisionTransformer, read_vision_transformer
from .vit_graph import build_vit_graph, check_options
from .weight_rounding import fitted_codes

log = logging.getLogger("zsad")


class GraphBuilder(Protocol):
    """The weights of a network and what its graph is to be."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What images are to be normalised with."""

    @property
    def inputs(self) -> Mapping[str, Shape]:
        """The shapes of the graph's inputs."""

    def check(self) -> None:
        """Raise CheckpointError where an option does not fit the weights."""

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        """Build the graph; exact: the linear layers that stay in fp32 where the others are int8."""

    def other(self) -> "GraphBuilder":
        """Return the builder of a graph that computes the same in fp32, as differently as can be."""

    def choices(self) -> Iterable[tuple[str, ...]]:
        """Yield ever more layers to keep in fp32."""

    def forward(self, *where: Any) -> Any:
        """Return the same network in PyTorch; where: device and type, the CPU and float32 unless they are given."""


class _Builder:
    """What most builders share: images go in, all layers have one precision, attention is computed in two ways."""

    options: Any

    @property
    def inputs(self) -> Mapping[str, Shape]:
        return {"images": (None, 3, self.options.image_size, self.options.image_size)}

    def choices(self) -> Iterable[tuple[str, ...]]:
        return [()]

    def other(self) -> Any:
        attention = "standard" if self.options.attention == "fused" else "fused"
        options = replace(self.options, precision="fp32", attention=attention)
        return replace(cast(Any, self), options=options)


@dataclass(frozen=True)
class ImageTowerBuilder(_Builder):
    """Of an image tower (see `GraphBuilder`)."""

    weights: VisionTransformer
    options: ExportOptions

    @property
    def preprocessing(self) -> Preprocessing:
        return self.options.preprocessing or self.weights.architecture.preprocessing

    def check(self) -> None:
        native = self.options.attention == NATIVE
        (check_native_options if native else check_options)(self.weights, self.options)

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        return build_vit_graph(self.weights, self.options, exact, metadata)

    def choices(self) -> Iterable[tuple[str, ...]]:
        if self.options.precision != "int8":
            return [()]
        log.info("rounding weights to 8 bits, which takes minutes where a network is large")
        return layers_in_fp32(int8_errors(self.weights, self.options), LOOSEST.get(self.options.attention, 1.0))

    @cached_property
    def codes(self) -> Mapping[str, Codes]:
        """Codes of weights that are not the nearest ones."""
        native = self.options.attention == NATIVE and self.options.precision == "int8"
        return fitted_codes(self.weights, self.options) if native else {}

    def forward(self, *where: Any) -> Any:
        from .torch_forward import TorchForward

        return TorchForward(self.weights, self.options, *where)


@dataclass(frozen=True)
class TextTowerBuilder(_Builder):
    """Of a text tower (see `GraphBuilder`)."""

    weights: TextTransformer
    options: TextOptions

    @property
    def preprocessing(self) -> Preprocessing:
        return CLIP.preprocessing  # of the images that its texts describe

    @property
    def inputs(self) -> Mapping[str, Shape]:
        return {"ids": (None, self.options.context)}

    def check(self) -> None:
        if self.weights.vocabulary != VOCABULARY:  # whatever the graph could do with it
            raise CheckpointError(
                f"its vocabulary has {self.weights.vocabulary} tokens, CLIP's has {VOCABULARY}; take another checkpoint"
            )
        check_text_options(self.weights, self.options)

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        return build_text_graph(self.weights, self.options, metadata)

    def forward(self, *where: Any) -> Any:
        from .torch_forward import TorchTextForward

        return TorchTextForward(self.weights, self.options, *where)


@dataclass(frozen=True)
class ClipSegImageBuilder(_Builder):
    """Of CLIPSeg's image tower (see `GraphBuilder`)."""

    weights: VisionTransformer
    options: ClipSegImageOptions
    preprocessing: Preprocessing = "imagenet"  # unlike CLIP's

    def check(self) -> None:
        check_clipseg_image_options(self.weights, self.options)

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        return build_clipseg_image_graph(self.weights, self.options, metadata)

    def forward(self, *where: Any) -> Any:
        from .torch_clipseg import TorchClipSegImage

        return TorchClipSegImage(self.weights, self.options, *where)


@dataclass(frozen=True)
class ClipSegDecoderBuilder(_Builder):
    """Of CLIPSeg's decoder (see `GraphBuilder`)."""

    weights: ClipSegDecoder
    options: ClipSegDecoderOptions
    preprocessing: Preprocessing = "imagenet"  # of the images that it segments

    @property
    def inputs(self) -> Mapping[str, Shape]:
        return clipseg_decoder_inputs(self.weights, self.options)

    def check(self) -> None:
        check_clipseg_decoder_options(self.weights, self.options)

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        return build_clipseg_decoder_graph(self.weights, self.options, metadata)

    def forward(self, *where: Any) -> Any:
        from .torch_clipseg import TorchClipSegDecoder

        return TorchClipSegDecoder(self.weights, self.options, *where)


@dataclass(frozen=True)
class IsnetBuilder(_Builder):
    """Of IS-Net (see `GraphBuilder`)."""

    weights: ISNet
    options: IsnetOptions
    folded: bool = True
    preprocessing: Preprocessing = "isnet"

    def check(self) -> None:
        check_isnet_options(self.options)

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        return build_isnet_graph(self.weights, self.options, metadata, self.folded)

    def other(self) -> "IsnetBuilder":
        return replace(self, options=replace(self.options, precision="fp32"), folded=not self.folded)

    def forward(self, *where: Any) -> Any:
        from .torch_isnet import TorchIsnet

        return TorchIsnet(self.weights, *where)


@dataclass(frozen=True)
class SamImageBuilder(_Builder):
    """Of an image encoder of SAM or MobileSAM (see `GraphBuilder`)."""

    weights: SamEncoder | TinyEncoder
    options: SamImageOptions
    preprocessing: Preprocessing = "imagenet"

    def check(self) -> None:
        check_sam_image_options(self.weights, self.options)

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        return build_sam_image_graph(self.weights, self.options, metadata)

    def forward(self, *where: Any) -> Any:
        from .torch_sam import TorchSamEncoder, TorchTinyEncoder

        if isinstance(self.weights, TinyEncoder):
            return TorchTinyEncoder(self.weights, *where)
        return TorchSamEncoder(self.weights, *where)


@dataclass(frozen=True)
class SamMasksBuilder(_Builder):
    """Of SAM's prompt encoder and mask decoder (see `GraphBuilder`)."""

    weights: MaskDecoder
    options: SamMasksOptions
    folded: bool = True
    preprocessing: Preprocessing = "imagenet"  # of the image whose embedding it reads

    @property
    def inputs(self) -> Mapping[str, Shape]:
        return sam_masks_inputs(self.weights, self.options)

    def check(self) -> None:
        check_sam_masks_options(self.weights, self.options)

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        return build_sam_masks_graph(self.weights, self.options, metadata, self.folded)

    def other(self) -> "SamMasksBuilder":
        return replace(self, options=replace(self.options, precision="fp32"), folded=not self.folded)

    def forward(self, *where: Any) -> Any:
        from .torch_sam import TorchMaskDecoder

        return TorchMaskDecoder(self.weights, self.options, *where)


def _read_isnet(path: Path, options: IsnetOptions) -> GraphBuilder | ReadyGraph:
    if path.suffix.lower() == ".onnx":
        return read_ready_graph(path, options)
    return IsnetBuilder(read_isnet(path), options)


# Options of a kind of graph → what reads its weights.
BUILDERS: Mapping[type, Callable[[Path, Any], GraphBuilder | ReadyGraph]] = {
    ExportOptions: lambda path, options: ImageTowerBuilder(read_vision_transformer(path), options),
    TextOptions: lambda path, options: TextTowerBuilder(read_text_transformer(path), options),
    IsnetOptions: _read_isnet,
    ClipSegImageOptions: lambda path, options: ClipSegImageBuilder(read_vision_transformer(path), options),
    ClipSegDecoderOptions: lambda path, options: ClipSegDecoderBuilder(read_clipseg_decoder(path), options),
    SamImageOptions: lambda path, options: SamImageBuilder(read_sam_encoder(path), options),
    SamMasksOptions: lambda path, options: SamMasksBuilder(read_mask_decoder(path), options),
}


def read_builder(path: Path, options: GraphOptions) -> GraphBuilder | ReadyGraph:
    """Read from a checkpoint the weights for which the options are, or a ready graph; raises CheckpointError."""
    return BUILDERS[type(options)](path, options)
