"""Writes a transformer's ONNX graph straight from its weights: no tracing, no PyTorch.

The builder decides every type. Half precision: linear layers, attention products and activations in fp16; residual
stream, LayerNorm, softmax and the embedding in fp32, as under PyTorch's autocast.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .options import ACTIVATIONS, ATTENTIONS, PRECISIONS, GraphOptions
from .state_dict import CheckpointError
from .transformer import Affine, Array, Block

OPSET = 20
IR_VERSION = 10

PLAIN_ACTIVATIONS = {"gelu": "Gelu", "relu": "Relu"}  # those that ONNX has an operator for
LINEAR_LAYERS = ("qkv", "proj", "fc1", "fc2")  # of every block
PADDING = 16  # columns
HIDDEN = -1e4  # the logit of a token that is not to be seen; in half precision there still is such a number
IN_FP32 = "take fp32: zsad-export --precision fp32, zsad-infer --network-precision fp32"


class TransformerGraph:
    """Collects nodes and initializers; every method returns the name of its result.

    Names that `narrow` returns carry the type of the linear layers; everything else is fp32. exact: names of linear
    layers (`block0.fc1`) that stay in fp32 where the others are int8. causal: length of a sequence in which a token
    sees none behind it; 0: every token sees all. angles: by how much queries and keys are turned, [T, head width / 2],
    channel i of a head together with channel i + head width / 2; the first token's are 0.

    A constant that is there already is shared: the same blocks can be applied to several streams, each in a scope.
    """

    def __init__(
        self,
        precision: str,
        fused: bool,
        exact: Collection[str] = (),
        causal: int = 0,
        angles: NDArray[np.float64] | None = None,
    ) -> None:
        self.precision, self.fused, self.exact, self.causal, self.angles = precision, fused, exact, causal, angles
        self.dtype = np.float16 if precision == "fp16" else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.domains = {""}
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._scope = ""

    @contextmanager
    def scope(self, prefix: str) -> Iterator[None]:
        """Put a prefix before the names of the nodes that are made meanwhile, not before those of constants."""
        self._scope = prefix
        yield
        self._scope = ""

    def _scoped(self, name: str) -> str:
        return name if name.startswith(self._scope) else self._scope + name

    def constant(self, value: Any, name: str) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def weight(self, value: Array, name: str) -> str:
        if name in self.initializers:
            return name
        if np.abs(value).max(initial=0) > np.finfo(self.dtype).max:
            raise CheckpointError(f"{name} holds values beyond the range of {self.precision}; {IN_FP32}")
        return self.constant(np.ascontiguousarray(value.astype(self.dtype)), name)

    def node(self, operator: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.domains.add(domain)
        output = self._scoped(output)
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def reshape(self, x: str, shape: Sequence[int], name: str) -> str:
        return self.node("Reshape", [x, self.constant(np.array(shape), "to." + "x".join(map(str, shape)))], name)

    def cast(self, x: str, to: int, name: str) -> str:
        return self.node("Cast", [x], name, to=to) if self.precision == "fp16" else x

    def narrow(self, x: str) -> str:
        """fp32 → the type of the linear layers."""
        return self.cast(x, TensorProto.FLOAT16, x + ".half")

    def widen(self, x: str) -> str:
        """The type of the linear layers → fp32."""
        return self.cast(x, TensorProto.FLOAT, x + ".float")

    def linear(self, x: str, affine: Affine, name: str) -> str:
        if self.precision == "int8" and name not in self.exact:
            return self.quantised_linear(x, affine, name)
        if self.fused and self.precision != "fp16":
            return self.padded_linear(x, affine, name)
        return self.plain_linear(x, affine, name)

    def plain_linear(self, x: str, affine: Affine, name: str) -> str:
        """A product and a sum."""
        weight, bias = affine
        product = self.node("MatMul", [x, self.weight(weight.T, name + ".weight")], name + ".product")
        return self.node("Add", [product, self.weight(bias, name + ".bias")], name)

    def padded_linear(self, x: str, affine: Affine, name: str) -> str:
        """A product whose input gains columns of ones; the first of them multiplies the bias.

        ONNX Runtime's CPU product reads a dozen rows of its left side at a time. Rows of 1024 or 4096 floats start at
        multiples of 4096 bytes and so fall into one set of the first-level cache: 66 GFLOP/s on a core of an EPYC with
        AVX-512, with the additional columns 93. And the bias costs no pass over the output.
        """
        weight, bias = affine
        columns = np.zeros((len(bias), PADDING), np.float32)
        columns[:, 0] = bias
        widths, one = self.constant(np.array([0, 0, 0, 0, 0, PADDING]), "padding"), self.constant(np.float32(1), "one")
        padded = self.node("Pad", [x, widths, one], name + ".input")
        return self.node("MatMul", [padded, self.weight(np.hstack([weight, columns]).T, name + ".weight")], name)

    def quantised_linear(self, x: str, affine: Affine, name: str) -> str:
        """A product in 8 bits: weights with a scale per output, activations with one that is found as they come.

        One scale for all weights of a layer is no faster, and tokens of DINOv2 ViT-S/14 fall to a cosine of 0.96.
        MatMulNBits (a scale for every 32 inputs) errs a tenth as much but takes 2.5 times as long with AVX-512 VNNI,
        unsigned weights 2.3 times. Layers that one scale for all activations would spoil belong in `exact`, and so do
        those in which the 16-bit sums of a processor without VNNI overflow.

        In standard operators only the weights have 8 bits: what runs the graph finds the scales of activations, as
        OpenVINO does for every 32 of a token, or leaves them as they are.
        """
        weight, bias = affine
        codes, scale = weight_codes(weight)
        levels = np.ascontiguousarray(codes.T)
        if not self.fused:
            stored = [self.constant(levels, name + ".levels"), self.constant(scale, name + ".scale")]
            wide = self.node("DequantizeLinear", stored, name + ".weight", axis=1)
            product = self.node("MatMul", [x, wide], name + ".product")
            return self.node("Add", [product, self.constant(bias, name + ".bias")], name)
        inputs = [
            x,
            self.constant(levels, name + ".weight"),
            self.constant(scale, name + ".scale"),
            "",
            self.constant(bias, name + ".bias"),
        ]
        return self.node("DynamicQuantizeMatMul", inputs, name, "com.microsoft")

    def layer_norm(self, x: str, affine: Affine, eps: float, name: str) -> str:
        weight, bias = affine
        inputs = [x, self.constant(weight, name + ".weight"), self.constant(bias, name + ".bias")]
        return self.node("LayerNormalization", inputs, name, axis=-1, epsilon=eps)

    def activation(self, x: str, kind: str, name: str) -> str:
        if kind in PLAIN_ACTIVATIONS:
            return self.node(PLAIN_ACTIVATIONS[kind], [x], name)
        slope = self.constant(self.dtype(1.702), name + ".slope")
        return self.node(
            "Mul", [x, self.node("Sigmoid", [self.node("Mul", [x, slope], name + ".scaled")], name + ".gate")], name
        )

    def split(self, x: str, parts: Sequence[str], name: str) -> list[str]:
        """Cut the channels of x [B, T, C] into equal parts."""
        name = self._scoped(name)
        outputs = [f"{name}.{part}" for part in parts]
        self.nodes.append(
            helper.make_node("Split", [x], outputs, name=name + ".split", axis=2, num_outputs=len(outputs))
        )
        return outputs

    def cut(self, x: str, start: int, end: int, name: str) -> str:
        """Some tokens of every sequence: [B, T, C] to [B, end - start, C]."""
        bounds = [self.constant(np.array([number]), f"at.{number}") for number in (start, end, 1)]
        return self.node("Slice", [x, *bounds], name)

    def packed(self, x: str, block: Block, heads: int, eps: float, name: str) -> str:
        """Queries, keys and values [B, T, 3C] of the residual stream: each token's depend on that token alone."""
        y = self.narrow(self.layer_norm(x, block.norm1, eps, name + ".norm1"))
        return self.projected(y, block, heads, name)

    def projected(self, y: str, block: Block, heads: int, name: str) -> str:
        """Queries, keys and values [B, T, 3C] of what the attention sees, [B, T, C]."""
        weight, bias = block.qkv
        if not self.fused:
            # Queries are scaled in the weights, as TensorRT's fusion wants it: before the first product.
            width = len(bias) // 3
            scale = np.repeat(np.array([(width // heads) ** -0.5, 1, 1], np.float32), width)
            weight, bias = weight * scale[:, None], bias * scale
        return self.linear(y, (weight, bias), name + ".qkv")

    def attention(self, packed: str, width: int, heads: int, name: str, only_first: bool) -> str:
        """Self-attention [B, T or 1, C] up to the concatenated heads, of all tokens or the first; width: C."""
        name += ".attention"
        parts = self.split(packed, ("query", "key", "value"), name)
        if only_first:
            parts[0] = self.cut(parts[0], 0, 1, parts[0] + ".first")
        if self.fused:
            parts = self.rotated(parts, heads, only_first)
            unidirectional = {"unidirectional": 1} if self.causal else {}
            return self.node("MultiHeadAttention", parts, name, "com.microsoft", num_heads=heads, **unidirectional)
        shape = self.constant(np.array([0, 0, heads, width // heads]), name + ".heads")
        parts = [self.node("Reshape", [part, shape], part + ".split") for part in parts]
        query, key, value = (
            self.node("Transpose", [part], part + ".heads", perm=perm)
            for part, perm in zip(
                self.rotated(parts, heads, only_first), ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True
            )
        )
        logits = self.widen(self.node("MatMul", [query, key], name + ".logits"))
        if self.causal:
            mask = self.constant(np.triu(np.full((self.causal, self.causal), HIDDEN, np.float32), 1), "mask")
            logits = self.node("Add", [logits, mask], name + ".masked")
        weights = self.narrow(self.node("Softmax", [logits], name + ".softmax", axis=-1))
        mixed = self.node("MatMul", [weights, value], name + ".mixed")
        merged = self.node("Transpose", [mixed], name + ".merged", perm=[0, 2, 1, 3])
        return self.node("Reshape", [merged, self.constant(np.array([0, 0, width]), name + ".width")], name)

    def rotated(self, parts: Sequence[str], heads: int, only_first: bool) -> list[str]:
        """Queries, keys and values, the former two turned by the angles of their positions, where there are any.

        Each [B, T, C] for the fused attention, else [B, T, heads, C / heads]. only_first: the queries are the first
        token's, which is never turned. Turned in fp32: beside the angles' own rounding fp16 would add that of products.
        """
        query, key, value = parts
        if self.angles is None:
            return [query, key, value]
        return [query if only_first else self._rotated(query, heads), self._rotated(key, heads), value]

    def _rotated(self, x: str, heads: int) -> str:
        assert self.angles is not None
        cosine, sine = np.cos(self.angles), np.sin(self.angles)
        name, wide = x + ".rotated", self.widen(x)
        if self.fused:
            tables = [
                self.constant(table.astype(np.float32), f"positions.{label}")
                for table, label in ((cosine, "cosine"), (sine, "sine"))
            ]
            start = self.constant(np.array([0]), "positions.start")
            y = self.node("RotaryEmbedding", [wide, start, *tables], name, "com.microsoft", num_heads=heads)
            return self.narrow(y)
        # (a, b) becomes (a, b) · cosine + (b, a) · (-sine, sine).
        cosine, sine = (np.hstack(pair)[:, None].astype(np.float32) for pair in ((cosine, cosine), (-sine, sine)))
        halves = [f"{name}.{half}" for half in ("first", "second")]
        self.nodes.append(helper.make_node("Split", [wide], halves, name=name + ".split", axis=3, num_outputs=2))
        swapped = self.node("Concat", halves[::-1], name + ".swapped", axis=3)
        still = self.node("Mul", [wide, self.constant(cosine, "positions.cosine")], name + ".cosine")
        across = self.node("Mul", [swapped, self.constant(sine, "positions.sine")], name + ".sine")
        return self.narrow(self.node("Add", [still, across], name))

    def feed_forward(self, x: str, block: Block, kind: str, name: str) -> str:
        """Two linear layers around the activation, or around the gate of a SwiGLU."""
        y = self.linear(x, block.fc1, name + ".fc1")
        if len(block.fc1[1]) == 2 * block.fc2[0].shape[1]:
            gate, value = self.split(y, ("gate", "value"), name + ".swiglu")
            silu = self.node("Mul", [gate, self.node("Sigmoid", [gate], name + ".sigmoid")], name + ".silu")
            y = self.node("Mul", [silu, value], name + ".activation")
        else:
            y = self.activation(y, kind, name + ".activation")
        return self.linear(y, block.fc2, name + ".fc2")

    def block(
        self,
        x: str,
        block: Block,
        heads: int,
        kind: str,
        eps: float,
        name: str,
        packed: str = "",
        only_first: bool = False,
    ) -> str:
        """A whole block on the residual stream x [B, T, C].

        packed: of x, where it is there already. only_first: the first token is all that is wanted, [B, 1, C].
        """
        packed = packed or self.packed(x, block, heads, eps, name)
        y = self.attention(packed, len(block.proj[1]), heads, name, only_first)
        y = self.widen(self.linear(y, block.proj, name + ".proj"))
        x = self.cut(x, 0, 1, name + ".first") if only_first else x
        x = self.node("Add", [x, y], name + ".residual")
        y = self.narrow(self.layer_norm(x, block.norm2, eps, name + ".norm2"))
        y = self.widen(self.feed_forward(y, block, kind, name))
        return self.node("Add", [x, y], name)


def weight_codes(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """Return 8-bit codes [N, K] of weights and their scale per output [N]."""
    scale = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def finished_model(
    graph: TransformerGraph,
    name: str,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    facts: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return the model of a graph; facts: its metadata."""
    model = helper.make_model(
        helper.make_graph(graph.nodes, name, inputs, outputs, list(graph.initializers.values())),
        opset_imports=[helper.make_opsetid(domain, 1 if domain else OPSET) for domain in sorted(graph.domains)],
        ir_version=IR_VERSION,
        producer_name="zsad",
    )
    helper.set_model_props(model, dict(facts or {}))
    return model


def check_choices(options: GraphOptions) -> None:
    """Raise CheckpointError where an option is none of those that there are."""
    for name, known in (("activation", ACTIVATIONS), ("precision", PRECISIONS), ("attention", ATTENTIONS)):
        if name in {field.name for field in fields(options)} and (value := getattr(options, name)) not in known:
            raise CheckpointError(f"{value!r} must be one of {', '.join(known)}")
