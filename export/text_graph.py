"""Writes the ONNX graph of CLIP's text tower."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from .options import TextOptions
from .state_dict import CheckpointError
from .text_transformer import NORM_EPS, TextTransformer
from .transformer_graph import TransformerGraph, check_choices, finished_model

PLACES = 2**24  # a float numbers no more, and there is one for each token of the vocabulary in each place of a text


class _Graph(TransformerGraph):
    """The graph of a text tower."""

    def embed(self, ids: str, text: TextTransformer) -> str:
        """The residual stream [B, T, C] in front of the first block."""
        tokens = self.node("Gather", [self.weight(text.token_embedding, "tokens"), ids], "embedded.tokens")
        positions = self.constant(text.positions[None, : self.causal], "positions")
        return self.node("Add", [self.widen(tokens), positions], "embedded")

    def pooled(self, x: str, ids: str) -> str:
        """The stream [B, T, C] at the largest token of each text, at the first of several: [B, C].

        No ArgMax: on integers, and in which of equal ones it takes, libraries differ. Here no two are equal, since an
        earlier place counts as more, and the token comes out of a product with its place.
        """
        count = self.constant(np.float32(self.causal), "pool.count")
        places = self.constant(np.arange(self.causal, dtype=np.float32), "pool.places")
        ranks = self.node("Cast", [ids], "pool.ids", to=TensorProto.FLOAT)
        ranks = self.node("Sub", [self.node("Mul", [ranks, count], "pool.scaled"), places], "pool.ranks")
        axis = self.constant(np.array([1]), "pool.axis")
        largest = self.node("ReduceMax", [ranks, axis], "pool.largest", keepdims=1)
        place = self.node("Cast", [self.node("Equal", [ranks, largest], "pool.equal")], "pool", to=TensorProto.FLOAT)
        row = self.node("Unsqueeze", [place, axis], "pool.row")  # [B, 1, T]
        return self.node("Squeeze", [self.node("MatMul", [row, x], "pooled.row"), axis], "pooled")


def build_text_graph(
    text: TextTransformer, options: TextOptions, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Build the graph of a text tower.

    Input `ids` [B, T] int32, padded with what is smaller than the token that ends a text, as CLIP's tokeniser does with
    0. Output `embedding` [B, D] fp32: the final norm of the largest token, projected, not brought to unit length.
    metadata: facts that are noted in the graph beside the options.

    Raises CheckpointError when an option does not fit the checkpoint.
    """
    heads = check_text_options(text, options)
    graph = _Graph(options.precision, options.attention == "fused", causal=options.context)
    x = graph.embed("ids", text)
    for index, block in enumerate(text.blocks):
        x = graph.block(x, block, heads, options.activation, NORM_EPS, f"block{index}")
    x = graph.layer_norm(graph.pooled(x, "ids"), text.norm, NORM_EPS, "norm")
    graph.node("MatMul", [x, graph.constant(text.projection, "projection")], "embedding")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT32, ["batch", options.context])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", text.projection.shape[1]])
    facts = {
        "architecture": "clip-text",
        "activation": options.activation,
        "context": str(options.context),
        "precision": options.precision,
        "attention": options.attention,
        **(metadata or {}),
    }
    return finished_model(graph, "clip-text", [ids], [embedding], facts)


def check_text_options(text: TextTransformer, options: TextOptions) -> int:
    """Return the number of attention heads; raises CheckpointError when an option does not fit the checkpoint."""
    longest = min(len(text.positions), PLACES // text.vocabulary)
    if not 0 < options.context <= longest:
        raise CheckpointError(f"its texts have up to {longest} tokens, not {options.context}; take another checkpoint")
    if options.precision == "int8":
        raise CheckpointError("a text tower is exported in fp32 or fp16 (--precision), not in int8")
    check_choices(options)
    return text.attention_heads(options.heads)
