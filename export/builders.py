"""What builds each kind of graph: of image towers and of text towers."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import onnx

from .options import ExportOptions, GraphOptions, Preprocessing, TextOptions
from .quantisation import int8_errors, layers_in_fp32
from .text_graph import build_text_graph, check_text_options
from .text_transformer import TextTransformer, read_text_transformer
from .vision_transformer import CLIP, VisionTransformer, read_vision_transformer
from .vit_graph import build_vit_graph, check_options

Options = TypeVar("Options", ExportOptions, TextOptions)


class GraphBuilder(Protocol):
    """The weights of a network and what its graph is to be."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What images are to be normalised with."""

    def check(self) -> None:
        """Raise CheckpointError where an option does not fit the weights."""

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        """Build the graph; exact: the linear layers that stay in fp32 where the others are int8."""

    def other(self) -> "GraphBuilder":
        """Return the builder of a graph that computes the same in fp32, as differently as can be."""

    def choices(self) -> Iterable[tuple[str, ...]]:
        """Yield ever more layers to keep in fp32."""

    def forward(self) -> Any:
        """Return the same network in PyTorch."""


@dataclass(frozen=True)
class ImageTowerBuilder:
    """Of an image tower (see `GraphBuilder`)."""

    weights: VisionTransformer
    options: ExportOptions

    @property
    def preprocessing(self) -> Preprocessing:
        return self.options.preprocessing or self.weights.architecture.preprocessing

    def check(self) -> None:
        check_options(self.weights, self.options)

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        return build_vit_graph(self.weights, self.options, exact, metadata)

    def other(self) -> "ImageTowerBuilder":
        return replace(self, options=_other(self.options))

    def choices(self) -> Iterable[tuple[str, ...]]:
        int8 = self.options.precision == "int8"
        return layers_in_fp32(int8_errors(self.weights, self.options)) if int8 else [()]

    def forward(self) -> Any:
        from .torch_forward import TorchForward

        return TorchForward(self.weights, self.options)


@dataclass(frozen=True)
class TextTowerBuilder:
    """Of a text tower (see `GraphBuilder`)."""

    weights: TextTransformer
    options: TextOptions

    @property
    def preprocessing(self) -> Preprocessing:
        return CLIP.preprocessing  # of the images that its texts describe

    def check(self) -> None:
        check_text_options(self.weights, self.options)

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        return build_text_graph(self.weights, self.options, metadata)

    def other(self) -> "TextTowerBuilder":
        return replace(self, options=_other(self.options))

    def choices(self) -> Iterable[tuple[str, ...]]:
        return [()]

    def forward(self) -> Any:
        from .torch_forward import TorchTextForward

        return TorchTextForward(self.weights, self.options)


# Options of a kind of graph → what reads its weights.
BUILDERS: Mapping[type, Callable[[Path, Any], GraphBuilder]] = {
    ExportOptions: lambda path, options: ImageTowerBuilder(read_vision_transformer(path), options),
    TextOptions: lambda path, options: TextTowerBuilder(read_text_transformer(path), options),
}


def read_builder(path: Path, options: GraphOptions) -> GraphBuilder:
    """Read from a checkpoint the weights for which the options are; raises CheckpointError."""
    return BUILDERS[type(options)](path, options)


def _other(options: Options) -> Options:
    """Return options of a graph that computes the same in fp32 and in the other form of attention."""
    return replace(options, precision="fp32", attention="standard" if options.attention == "fused" else "fused")
