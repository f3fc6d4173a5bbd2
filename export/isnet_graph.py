"""Writes the ONNX graph of IS-Net."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from .isnet import HALVINGS, NORM_EPS, Convolution, ISNet, Stage
from .options import IsnetOptions
from .state_dict import CheckpointError
from .transformer import Affine, Array
from .transformer_graph import TransformerGraph, check_choices, finished_model


def doubling_matrix(source: int) -> Array:
    """Return the weights [2 source, source] that double a row: bilinear, between the centres of pixels."""
    near = np.arange(2 * source) // 2
    far = np.clip(near + np.where(np.arange(2 * source) % 2, 1, -1), 0, source - 1)
    return np.asarray(0.75 * np.eye(source)[near] + 0.25 * np.eye(source)[far], np.float32)


class _Graph(TransformerGraph):
    """The graph of IS-Net.

    folded: convolutions compute the norms behind them, and images are doubled by the operator for it. Otherwise norms
    are nodes of their own and images are doubled by matrix products: the same, computed differently.
    """

    def __init__(self, precision: str, folded: bool) -> None:
        super().__init__(precision, fused=False)
        self.folded = folded

    def convolved(self, x: str, affine: Affine, name: str, dilation: int = 1, stride: int = 1) -> str:
        weight, bias = (
            self.weight(part, f"{name}.{kind}") for part, kind in zip(affine, ("weight", "bias"), strict=True)
        )
        pads, dilations, strides = [dilation] * 4, [dilation] * 2, [stride] * 2
        return self.node("Conv", [x, weight, bias], name, pads=pads, dilations=dilations, strides=strides)

    def unit(self, x: str, part: Convolution, name: str, dilation: int = 1) -> str:
        """Convolution, norm and ReLU."""
        if self.folded:
            y = self.convolved(x, part.folded(), name, dilation)
        else:
            y = self.convolved(x, (part.weight, part.bias), name, dilation)
            kinds = ("scale", "shift", "mean", "variance")
            norm = [self.constant(getattr(part, kind), f"{name}.{kind}") for kind in kinds]
            y = self.node("BatchNormalization", [y, *norm], name + ".norm", epsilon=NORM_EPS)
        return self.node("Relu", [y], name + ".relu")

    def halved(self, x: str) -> str:
        return self.node("MaxPool", [x], x + ".halved", kernel_shape=[2, 2], strides=[2, 2])

    def doubled(self, x: str, side: int) -> str:
        """A map [B, C, side, side] twice as large, bilinear between the centres of pixels."""
        if not self.folded:
            matrix = doubling_matrix(side)
            rows = self.node("MatMul", [self.constant(matrix, f"rows.{side}"), x], x + ".rows")
            return self.node("MatMul", [rows, self.constant(matrix.T, f"columns.{side}")], x + ".doubled")
        # By factors, not by sizes: so ONNX Runtime's CPU keeps its layout of channels in blocks.
        factors = self.constant(np.array([1, 1, 2, 2], np.float32), "twice")
        mode = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        return self.node("Resize", [x, "", factors], x + ".doubled", **mode)

    def joined(self, below: str, beside: str) -> str:
        return self.node("Concat", [below, beside], below + ".joined", axis=1)

    def stage(self, x: str, stage: Stage, side: int) -> str:
        """What a stage makes of a map with this side, of the same side."""
        name, deepest = stage.name, len(stage.down) - 1
        entry = y = self.unit(x, stage.entry, name + ".in")
        made = []
        for level, part in enumerate(stage.down):
            if 0 < level < deepest and not stage.flat:
                y, side = self.halved(y), side // 2
            spread = 2**level if stage.flat else 2 if level == deepest else 1
            y = self.unit(y, part, f"{name}.{level + 1}", spread)
            made.append(y)
        made.pop()
        for level, part in zip(range(deepest - 1, -1, -1), stage.up, strict=True):
            if level < deepest - 1 and not stage.flat:
                y, side = self.doubled(y, side), side * 2
            y = self.unit(self.joined(y, made.pop()), part, f"{name}.{level + 1}d", 2**level if stage.flat else 1)
        return self.node("Add", [y, entry], name)


def build_isnet_graph(
    isnet: ISNet, options: IsnetOptions, metadata: Mapping[str, str] | None = None, folded: bool = True
) -> onnx.ModelProto:
    """Build the graph of IS-Net.

    Input `images` [B, 3, S, S] fp32, values in [0, 1] less 0.5. Output `foreground` [B, S, S] fp32 in [0, 1]: the first
    side output, behind the sigmoid. Half precision: all but the last doubling and the sigmoid in fp16. metadata: facts
    that are noted in the graph beside the options. folded: see `_Graph`.

    Raises CheckpointError when an option does not fit.
    """
    check_isnet_options(options)
    size = options.image_size
    graph = _Graph(options.precision, folded)
    x, side = graph.convolved(graph.narrow("images"), isnet.first, "first", stride=2), size // 2
    made: list[str] = []
    for stage in isnet.encoder:
        if made:
            x, side = graph.halved(x), side // 2
        x = graph.stage(x, stage, side)
        made.append(x)
    made.pop()
    for stage in isnet.decoder:
        x, side = graph.doubled(x, side), side * 2
        x = graph.stage(graph.joined(x, made.pop()), stage, side)
    x = graph.doubled(graph.widen(graph.convolved(x, isnet.side, "side")), side)
    x = graph.node("Sigmoid", [x], "probability")
    graph.node("Reshape", [x, graph.constant(np.array([0, size, size]), "shape")], "foreground")
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])
    foreground = helper.make_tensor_value_info("foreground", TensorProto.FLOAT, ["batch", size, size])
    facts = {"architecture": "isnet", "image_size": str(size), "precision": options.precision, **(metadata or {})}
    return finished_model(graph, "isnet", [images], [foreground], facts)


def check_isnet_options(options: IsnetOptions) -> None:
    """Raise CheckpointError when an option does not fit IS-Net."""
    size, step = options.image_size, 2**HALVINGS
    if size <= 0 or size % step:
        nearest = max(1, round(size / step)) * step
        raise CheckpointError(
            f"IS-Net halves its image {HALVINGS} times, which {size} pixels cannot be; use --image-size {nearest}"
        )
    if options.precision == "int8":
        raise CheckpointError("IS-Net is exported in fp32 or fp16 (--precision), not in int8")
    check_choices(options)
