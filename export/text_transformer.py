"""CLIP's text tower, read from any of the names under which it is published."""

from dataclasses import dataclass
from pathlib import Path

from .transformer import (
    HEAD_WIDTH,
    Affine,
    Array,
    Block,
    Layouts,
    Tensors,
    attention_heads,
    check_tensors,
    named_affine,
    named_blocks,
    read_affine,
    read_clip_blocks,
    read_tower,
    rename_hugging_face_clip,
)

VOCABULARY = 49408  # tokens of CLIP's tokeniser; the last two start and end a text
ODD_HEADS = {1152: 16}  # width → attention heads: of ViTamin-XL
NORM_EPS = 1e-5


@dataclass(frozen=True)
class TextTransformer:
    """The text tower of CLIP: a token sees those in front of it alone."""

    token_embedding: Array  # [V, C]
    positions: Array  # [T, C]
    blocks: list[Block]
    norm: Affine
    projection: Array  # [C, D]

    @property
    def width(self) -> int:
        return int(self.token_embedding.shape[-1])

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return len(self.token_embedding)

    def attention_heads(self, heads: int | None) -> int:
        """Return the number of attention heads, see the function of this name."""
        usual = None if self.width % HEAD_WIDTH else self.width // HEAD_WIDTH
        return attention_heads(self.width, heads, ODD_HEADS.get(self.width, usual), "text_heads")


def read_text_transformer(path: Path) -> TextTransformer:
    """Read the text tower of a checkpoint of CLIP as float32, in OpenAI's (also open_clip's) or Hugging Face's names.

    Hugging Face's may stand in a file of CLIPSeg. Raises CheckpointError, see `read_tower`.
    """
    return read_tower(path, LAYOUTS, _check, "text tower", "CLIP")


def _check(text: TextTransformer) -> None:
    """Raise ValueError where a tensor does not fit the others or holds no numbers."""
    width = text.width
    check_tensors(
        [
            ("token embedding", text.token_embedding, (text.vocabulary, width)),
            ("positions", text.positions, (len(text.positions), width)),
            *named_blocks(text.blocks, width),
            *named_affine("norm", text.norm, (width,)),
            ("projection", text.projection, (width, text.projection.shape[-1])),
        ]
    )


def _read_clip(state: Tensors) -> TextTransformer:
    """OpenAI's names, which open_clip shares."""
    return TextTransformer(
        token_embedding=state["token_embedding.weight"],
        positions=state["positional_embedding"],
        blocks=read_clip_blocks(state),
        norm=read_affine(state, "ln_final"),
        projection=state["text_projection"],
    )


def _read_hugging_face_clip(state: Tensors) -> TextTransformer:
    """Names of the Hugging Face port: rename to OpenAI's and read those."""
    embeddings = "text_model.embeddings."
    renamed = {
        "token_embedding.weight": state[embeddings + "token_embedding.weight"],
        "positional_embedding": state[embeddings + "position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
    }
    return _read_clip({**renamed, **rename_hugging_face_clip(state, "text_model.", {"final_layer_norm": "ln_final"})})


# Beside the tower stand the image tower, and in OpenAI's files numbers that describe both.
LAYOUTS: Layouts[TextTransformer] = {
    "ln_final.weight": (
        _read_clip,
        r"visual\..*|logit_scale|attn_mask|input_resolution|context_length|vocab_size",
    ),
    "text_model.final_layer_norm.weight": (
        _read_hugging_face_clip,
        r"(vision_model|visual_projection|logit_scale)(\..*)?|text_model\.embeddings\.position_ids",
    ),
}
