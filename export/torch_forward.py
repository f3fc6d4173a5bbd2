"""Towers in plain PyTorch: the oracle of the export, and what its speed is compared with."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from .options import WINDOWS, ExportOptions, TextOptions
from .text_transformer import NORM_EPS, TextTransformer
from .transformer import Affine, Block
from .vision_transformer import LONGEST_PERIOD, VisionTransformer

Array = NDArray[np.float32]

BLOCK = [field.name for field in fields(Block)]
ACTIVATION: dict[str, Callable[[Any], Any]] = {
    "gelu": functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
}


class OnDevice:
    """What networks in PyTorch share: arrays in, arrays out."""

    def __init__(self, device: str, dtype: Any) -> None:
        self._device, self._dtype = device, dtype

    def tensor(self, array: Any) -> Any:
        """Bring an array, such as images [B, 3, S, S], to the device and, unless it holds integers, to the type."""
        tensor = torch.as_tensor(np.array(array))
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)

    def fetch(self, tensor: Any) -> Array:
        """Bring a result to the host as fp32; waits for it."""
        found: Array = tensor.float().cpu().numpy()
        return found

    def _affine(self, affine: Affine) -> tuple[Any, Any]:
        return self.tensor(affine[0]), self.tensor(affine[1])


class TorchBlocks(OnDevice):
    """Blocks in plain PyTorch, eager, with its fused attention; weights are converted once."""

    def __init__(
        self,
        blocks: Sequence[Block],
        heads: int,
        activation: str,
        eps: float,
        causal: bool,
        where: tuple[str, Any],
    ) -> None:
        """causal: a token sees none behind it. where: device and type."""
        super().__init__(*where)
        self._heads, self._activation, self._eps, self._causal = heads, ACTIVATION[activation], eps, causal
        self._turn: tuple[Any, Any] | None = None  # cosine and sine of rotary positions, [P, head width]
        self._blocks = [{name: self._affine(getattr(block, name)) for name in BLOCK} for block in blocks]

    def _streams(self, x: Any, depth: int) -> Iterator[Any]:
        """Yield the residual stream behind each of the first `depth` blocks."""
        for block in self._blocks[:depth]:
            x = x + self._attention(self._normed(x, block["norm1"]), block)
            x = x + self._feed_forward(self._normed(x, block["norm2"]), block)
            yield x

    def _normed(self, x: Any, affine: tuple[Any, Any]) -> Any:
        return functional.layer_norm(x, x.shape[-1:], *affine, self._eps)

    def _attention(self, x: Any, block: dict[str, tuple[Any, Any]]) -> Any:
        batch, count, width = x.shape
        parts = functional.linear(x, *block["qkv"]).reshape(batch, count, 3, self._heads, width // self._heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if self._turn is not None:
            query, key = self._turned(query, *self._turn), self._turned(key, *self._turn)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self._causal)
        return functional.linear(mixed.transpose(1, 2).reshape(batch, count, width), *block["proj"])

    def _turned(self, x: Any, cosine: Any, sine: Any) -> Any:
        """Turn the patches of x [B, heads, T, head width], which stand last."""
        front, patches = x[:, :, : -len(cosine)], x[:, :, -len(cosine) :].float()
        first, second = patches.chunk(2, dim=-1)
        return torch.cat([front, (patches * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)], dim=2)

    def _feed_forward(self, x: Any, block: dict[str, tuple[Any, Any]]) -> Any:
        hidden = functional.linear(x, *block["fc1"])
        if hidden.shape[-1] == 2 * block["fc2"][0].shape[1]:
            gate, value = hidden.chunk(2, dim=-1)
            return functional.linear(functional.silu(gate) * value, *block["fc2"])
        return functional.linear(self._activation(hidden), *block["fc2"])


class TorchForward(TorchBlocks):
    """An image tower in plain PyTorch."""

    def __init__(
        self, vit: VisionTransformer, options: ExportOptions, device: str = "cpu", dtype: Any = torch.float32
    ) -> None:
        """options: all but the precision, which is `dtype`, and the form of attention."""
        own = vit.architecture
        heads = vit.attention_heads(options.heads)
        super().__init__(vit.blocks, heads, options.activation, own.norm_eps, causal=False, where=(device, dtype))
        self._vit, self._options = vit, options
        if own.rotary:
            self._turn = self._rotation(vit.width // heads)
        self._norm, self._class_norm = self._affine(vit.norm), self._affine(vit.class_norm)
        self._pre_norm = None if vit.pre_norm is None else self._affine(vit.pre_norm)
        self._patches = self.tensor(vit.patch_weight), None if vit.patch_bias is None else self.tensor(vit.patch_bias)
        self._class_token, self._registers = self.tensor(vit.class_token), self.tensor(vit.registers)
        self._positions = self.tensor(self._resized_positions(options.image_size // vit.patch_size))
        self._projection = None if vit.projection is None else self.tensor(vit.projection)

    def __call__(self, images: Any) -> dict[str, Any]:
        """Return of images [B, 3, S, S] what the options ask for, as the graph does (see `build_vit_graph`)."""
        vit, wanted, front = self._vit, self._options.outputs, 1 + len(self._vit.registers)
        with torch.inference_mode():
            x = self._embedded(images)
            outputs = {name: self._windows(x, side) for name, side in WINDOWS.items() if name in wanted}
            x = x if self._pre_norm is None else self._normed(x, self._pre_norm)
            tapped = []
            for index, x in enumerate(self._streams(x, self._options.depth(len(vit.blocks)))):  # noqa: B020
                if index in self._options.taps:
                    y = self._normed(x, self._norm) if vit.architecture.normed_taps else x
                    tapped.append(y[:, front:])
            if tapped:
                outputs["tokens"] = torch.stack(tapped, dim=1)
            if "embedding" in wanted:
                y = self._class_vector(x)
                outputs["embedding"] = y if self._projection is None else functional.normalize(y, dim=-1)
            if "patches" in wanted:
                outputs["patches"] = self._normed(x, self._norm)[:, front:]
            return outputs

    def _embedded(self, images: Any) -> Any:
        """The tokens [B, T, C] in front of the first norm."""
        x = functional.conv2d(images, *self._patches, stride=self._vit.patch_size)
        x = x.flatten(2).transpose(1, 2)  # [B, P, C]
        x = torch.cat([self._class_token.expand(len(x), 1, -1), x], dim=1) + self._positions
        return torch.cat([x[:, :1], self._registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)

    def _class_vector(self, x: Any) -> Any:
        y = self._normed(x[:, 0], self._class_norm)
        return y if self._projection is None else y @ self._projection

    def _windows(self, x: Any, side: int) -> Any:
        """The class vector of every window [B, W, D] of the embedded tokens [B, T, C], in front of the first norm."""
        front = 1 + len(self._vit.registers)
        grid = math.isqrt(x.shape[1] - front)
        patches = x[:, front:].unflatten(1, (grid, grid)).unfold(1, side, 1).unfold(2, side, 1)  # [B, y, x, C, k, k]
        patches = patches.flatten(1, 2).flatten(3).transpose(2, 3)  # [B, W, k², C]
        windows = torch.cat([x[:, None, :front].expand(-1, patches.shape[1], -1, -1), patches], dim=2)
        y = windows.flatten(0, 1)
        y = y if self._pre_norm is None else self._normed(y, self._pre_norm)
        *_, y = self._streams(y, len(self._vit.blocks))
        return self._class_vector(y).unflatten(0, (len(x), -1))

    def _rotation(self, width: int) -> tuple[Any, Any]:
        """Cosine and sine [P, width] of rotary positions, for heads of this width."""
        grid = self._options.image_size // self._vit.patch_size
        centres = (torch.arange(grid, device=self._device) + 0.5) / grid * 2 - 1
        centres = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1).flatten(0, 1)  # [P, 2]
        if self._vit.periods is None:
            periods = LONGEST_PERIOD ** torch.arange(0, 1, 4 / width, device=self._device)
        else:
            periods = torch.tensor(self._vit.periods, device=self._device)
        angles = (2 * torch.pi * centres[:, :, None] / periods).flatten(1).tile(2)
        return angles.cos(), angles.sin()

    def _resized_positions(self, grid: int) -> Any:
        vit = self._vit
        if vit.architecture.rotary:
            return np.zeros((1 + grid * grid, vit.width), np.float32)
        positions = torch.from_numpy(np.array(vit.positions))
        stored = math.isqrt(len(positions) - 1)
        if stored == grid:
            return positions
        own, antialias = vit.architecture, self._options.antialias
        smooth = own.antialias if antialias is None else antialias
        # A scale factor is kept as the coordinates' scale; a size would recompute it.
        factor: dict[str, Any] = {"scale_factor": (grid + own.position_offset) / stored}
        where = factor if own.position_offset else {"size": (grid, grid)}
        maps = positions[1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
        maps = functional.interpolate(maps, mode="bicubic", antialias=smooth, **where)
        return torch.cat([positions[:1], maps.flatten(2)[0].T])


class TorchTextForward(TorchBlocks):
    """A text tower in plain PyTorch."""

    def __init__(
        self, text: TextTransformer, options: TextOptions, device: str = "cpu", dtype: Any = torch.float32
    ) -> None:
        """options: all but the precision, which is `dtype`, and the form of attention."""
        heads = text.attention_heads(options.heads)
        super().__init__(text.blocks, heads, options.activation, NORM_EPS, causal=True, where=(device, dtype))
        self._tokens, self._positions = self.tensor(text.token_embedding), self.tensor(text.positions)
        self._norm, self._projection = self._affine(text.norm), self.tensor(text.projection)

    def __call__(self, ids: Any) -> dict[str, Any]:
        """Return the embedding [B, D] of ids [B, T]."""
        with torch.inference_mode():
            x = self._tokens[ids.long()] + self._positions[: ids.shape[1]]
            *_, x = self._streams(x, len(self._blocks))
            y = x[torch.arange(len(x)), ids.argmax(dim=1)]  # the first of several
            return {"embedding": self._normed(y, self._norm) @ self._projection}
