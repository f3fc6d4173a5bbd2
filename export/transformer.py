"""What image and text towers share: blocks, read from any of the names under which they are published."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .state_dict import CheckpointError, StateDict, read_state_dict

Array = NDArray[np.float32]
Tensors = Mapping[str, Array]
Affine = tuple[Array, Array]  # weight and bias
Named = tuple[str, Array, tuple[int, ...]]  # what it is, the tensor, the shape that it must have
Tower = TypeVar("Tower")
# A tensor that only one layout has → its reader, and which tensors beside the tower's own change nothing.
Layouts = Mapping[str, tuple[Callable[[Tensors], Tower], str]]

HEAD_WIDTH = 64  # in all towers of DINOv2 and CLIP but some wide ones
AVERAGED = re.compile(r"(^|[._])(teacher|ema)[._]")  # in names of towers that average others over the training


@dataclass(frozen=True)
class Block:
    """One transformer block; linear weights are [out, in], layer scale is folded into `proj` and `fc2`.

    Where `fc1` is twice as wide as `fc2` reads, its halves are gate and value of a SwiGLU (DINOv2 ViT-g/14).
    """

    norm1: Affine
    qkv: Affine  # [3C, C], [3C]
    proj: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine


def read_tower(path: Path, layouts: Layouts[Tower], check: Callable[[Tower], None], kind: str, families: str) -> Tower:
    """Read the one tower of a checkpoint that is named as in one of the layouts.

    From a training checkpoint with several towers comes the averaged one: `teacher` before `student`, `ema` before its
    model. check: raises ValueError where tensors do not fit each other. kind: `image tower`; families: whose.

    Raises CheckpointError when the file is unreadable, incomplete or of another architecture; a tensor of the tower
    that would not be used means another architecture.
    """
    state = read_state_dict(path)
    towers = [
        (marker, key.removesuffix(marker))
        for marker in layouts
        for key in state
        if key == marker or key.endswith("." + marker)
    ]
    if not towers:
        raise CheckpointError(
            f"{path}: none of its {len(state)} tensors is named as in a {families} {kind} "
            f"(looked for {', '.join(layouts)})"
        )
    towers = [tower for tower in towers if AVERAGED.search(tower[1])] or towers
    if len(towers) > 1:
        prefixes = ", ".join(repr(prefix) for _, prefix in towers)
        raise CheckpointError(f"{path}: holds several {kind}s ({prefixes}); save the one that is meant alone")
    (marker, prefix), *_ = towers
    layout, unused = layouts[marker]
    try:
        tensors = _Tower(state, prefix)
        transformer = layout(tensors)
        check(transformer)
    except KeyError as error:
        raise CheckpointError(
            f"{path}: lacks the tensor {prefix}{error.args[0]}: it is incomplete or of an architecture that zsad "
            "does not know"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: unusable as {'an' if kind[0] in 'aeiou' else 'a'} {kind}: {error}") from error
    foreign = [prefix + name for name in tensors.unread() if not re.fullmatch(unused, name)]
    around = prefix.removesuffix("trunk.")  # open_clip's name for a tower of timm, which it projects by itself
    foreign += [name for name in state if name.startswith(around) and not name.startswith(prefix)]
    if foreign:
        raise CheckpointError(f"{path}: holds {foreign[0]}, which belongs to an architecture that zsad does not know")
    return transformer


class _Tower(Tensors):
    """The tensors below a prefix as float32 with at least one axis; remembers which have been read."""

    def __init__(self, state: StateDict, prefix: str) -> None:
        below = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        # DINOv2's training groups its blocks: `blocks.<group>.<block>.`, where blocks are numbered through.
        self._stored = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name): below[name] for name in below}
        if len(self._stored) < len(below):
            raise ValueError("the blocks of every group are numbered from 0, which is no layout of DINOv2's")
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        tensor = np.atleast_1d(np.asarray(self._stored[name], np.float32))
        self._read.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def unread(self) -> list[str]:
        return [name for name in self._stored if name not in self._read]


def attention_heads(width: int, heads: int | None, published: int | None, key: str = "heads") -> int:
    """Return the number of attention heads: the one asked for, else that of the published tower of this width.

    No tensor tells it. key: what a network's configuration calls it. Raises CheckpointError when it does not divide the
    width or there is no such tower.
    """
    heads = published if heads is None else heads
    if heads is None:
        problem = f"how many attention heads a tower {width} wide has is not known"
    elif heads < 1 or width % heads:
        problem = f"{heads} attention heads do not divide a width of {width}"
    else:
        return heads
    raise CheckpointError(f"{problem}; name the number with --heads (or `{key}` of the network in the configuration)")


def check_tensors(tensors: Sequence[Named]) -> None:
    """Raise ValueError where a tensor has another shape than it must have, or holds no numbers."""
    for name, tensor, expected in tensors:
        if tensor.shape != expected or 0 in expected[1:]:
            raise ValueError(f"{name} is {tensor.shape} instead of {expected}")
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values: damaged; put a whole copy in its place")


def named_affine(name: str, affine: Affine, shape: tuple[int, ...]) -> list[Named]:
    """Return weight and bias for `check_tensors`."""
    weight, bias = affine
    return [(name, weight, shape), (name + " bias", bias, shape[:1])]


def named_blocks(blocks: Sequence[Block], width: int) -> list[Named]:
    """Return the tensors of blocks [C = width] for `check_tensors`; raises ValueError where there are none."""
    if not blocks:
        raise ValueError("there are no blocks")
    tensors: list[Named] = []
    for index, block in enumerate(blocks):
        hidden = block.fc2[0].shape[-1]
        wide = 2 * hidden if len(block.fc1[1]) == 2 * hidden else hidden
        shapes: dict[str, tuple[int, ...]] = {
            "norm1": (width,),
            "qkv": (3 * width, width),
            "proj": (width, width),
            "norm2": (width,),
            "fc1": (wide, width),
            "fc2": (width, hidden),
        }
        for name, shape in shapes.items():
            tensors += named_affine(f"block {index} {name}", getattr(block, name), shape)
    return tensors


def read_affine(state: Tensors, name: str) -> Affine:
    """Return weight and bias of a layer."""
    return state[name + ".weight"], state[name + ".bias"]


def scaled(affine: Affine, gamma: Array | None) -> Affine:
    """Fold a layer scale into the linear layer before it."""
    weight, bias = affine
    if gamma is None:
        return weight, bias
    if gamma.shape != bias.shape or gamma.shape != weight.shape[:1]:
        raise ValueError(f"a layer scale {gamma.shape} does not fit weights {weight.shape}")
    return (weight.T * gamma).T, bias * gamma


def count_blocks(state: Tensors, prefix: str) -> int:
    """Return how many blocks are numbered behind a prefix."""
    return 1 + max((int(name.split(".")[prefix.count(".")]) for name in state if name.startswith(prefix)), default=-1)


def read_clip_blocks(state: Tensors) -> list[Block]:
    """Read the blocks of a tower of CLIP in OpenAI's names, which open_clip shares; it knows layer scales besides."""
    blocks = []
    for index in range(count_blocks(state, "transformer.resblocks.")):
        block = f"transformer.resblocks.{index}."
        blocks.append(
            Block(
                norm1=read_affine(state, block + "ln_1"),
                qkv=(state[block + "attn.in_proj_weight"], state[block + "attn.in_proj_bias"]),
                proj=scaled(read_affine(state, block + "attn.out_proj"), state.get(block + "ls_1.gamma")),
                norm2=read_affine(state, block + "ln_2"),
                fc1=read_affine(state, block + "mlp.c_fc"),
                fc2=scaled(read_affine(state, block + "mlp.c_proj"), state.get(block + "ls_2.gamma")),
            )
        )
    return blocks


def rename_hugging_face_blocks(
    state: Tensors, source: str, target: str, attention: str, layers: Mapping[str, str]
) -> dict[str, Array]:
    """Return the blocks that are numbered behind `source` in Hugging Face's names, behind `target` in others.

    attention: what is `self_attn` there. layers: of a block beside it, theirs → ours.
    """
    renamed = {}
    for index in range(count_blocks(state, source)):
        theirs, ours = f"{source}{index}.", f"{target}{index}."
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            renamed[f"{ours}{attention}.in_proj_{kind}"] = np.concatenate(parts)
        for name, own in {"self_attn.out_proj": f"{attention}.out_proj", **layers}.items():
            renamed[f"{ours}{own}.weight"], renamed[f"{ours}{own}.bias"] = read_affine(state, theirs + name)
    return renamed


def rename_hugging_face_clip(state: Tensors, tower: str, layers: Mapping[str, str]) -> dict[str, Array]:
    """Return the blocks of a tower of CLIP, and further layers of theirs → ours, from Hugging Face's to OpenAI's names.

    tower: `vision_model.` or `text_model.`.
    """
    of_block = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    renamed = rename_hugging_face_blocks(state, tower + "encoder.layers.", "transformer.resblocks.", "attn", of_block)
    for theirs, ours in layers.items():
        renamed[ours + ".weight"], renamed[ours + ".bias"] = read_affine(state, tower + theirs)
    return renamed
