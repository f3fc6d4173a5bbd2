"""An image tower in plain PyTorch: the oracle of the export, and what its speed is compared with."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from .options import ExportOptions
from .vision_transformer import Affine, Block, VisionTransformer

Array = NDArray[np.float32]

BLOCK = [field.name for field in fields(Block)]


class TorchForward:
    """The same image tower in plain PyTorch, eager, with its fused attention; weights are converted once."""

    def __init__(
        self, vit: VisionTransformer, options: ExportOptions, device: str = "cpu", dtype: Any = torch.float32
    ) -> None:
        """options: all but the precision, which is `dtype`, and the form of attention."""
        self._device, self._dtype = device, dtype
        self._vit, self._options = vit, options
        self._heads = vit.architecture.attention_heads(vit.width, options.heads)
        self._blocks = [{name: self._affine(getattr(block, name)) for name in BLOCK} for block in vit.blocks]
        self._norm = self._affine(vit.norm)
        self._pre_norm = None if vit.pre_norm is None else self._affine(vit.pre_norm)
        self._patches = self.tensor(vit.patch_weight), None if vit.patch_bias is None else self.tensor(vit.patch_bias)
        self._class_token, self._registers = self.tensor(vit.class_token), self.tensor(vit.registers)
        self._positions = self.tensor(self._resized_positions(options.image_size // vit.patch_size))
        self._projection = None if vit.projection is None else self.tensor(vit.projection)

    def tensor(self, array: Any) -> Any:
        """Bring an array, images [B, 3, S, S] among them, to the device and the type."""
        return torch.as_tensor(np.array(array)).to(self._device, self._dtype)

    def fetch(self, tensor: Any) -> Array:
        """Bring a result to the host as fp32; waits for it."""
        found: Array = tensor.float().cpu().numpy()
        return found

    def __call__(self, images: Any) -> dict[str, Any]:
        """Return of images [B, 3, S, S] what the options ask for: tokens [B, L, P, C], embedding [B, D]."""
        vit = self._vit
        with torch.inference_mode():
            x = functional.conv2d(images, *self._patches, stride=vit.patch_size)
            x = x.flatten(2).transpose(1, 2)  # [B, P, C]
            x = torch.cat([self._class_token.expand(len(x), 1, -1), x], dim=1) + self._positions
            x = torch.cat([x[:, :1], self._registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
            x = x if self._pre_norm is None else self._normed(x, self._pre_norm)
            tapped = []
            last = len(vit.blocks) - 1 if self._options.embedding else self._options.taps[-1]
            for index, block in enumerate(self._blocks[: last + 1]):
                x = x + self._attention(self._normed(x, block["norm1"]), block)
                x = x + self._feed_forward(self._normed(x, block["norm2"]), block)
                if index in self._options.taps:
                    y = self._normed(x, self._norm) if vit.architecture.normed_taps else x
                    tapped.append(y[:, 1 + len(vit.registers) :])
            outputs = {"tokens": torch.stack(tapped, dim=1)} if tapped else {}
            if self._options.embedding:
                y = self._normed(x[:, 0], self._norm)
                outputs["embedding"] = (
                    y if self._projection is None else functional.normalize(y @ self._projection, dim=-1)
                )
            return outputs

    def _affine(self, affine: Affine) -> tuple[Any, Any]:
        return self.tensor(affine[0]), self.tensor(affine[1])

    def _normed(self, x: Any, affine: tuple[Any, Any]) -> Any:
        return functional.layer_norm(x, x.shape[-1:], *affine, self._vit.architecture.norm_eps)

    def _attention(self, x: Any, block: dict[str, tuple[Any, Any]]) -> Any:
        batch, count, width = x.shape
        parts = functional.linear(x, *block["qkv"]).reshape(batch, count, 3, self._heads, width // self._heads)
        mixed = functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        return functional.linear(mixed.transpose(1, 2).reshape(batch, count, width), *block["proj"])

    def _feed_forward(self, x: Any, block: dict[str, tuple[Any, Any]]) -> Any:
        hidden = functional.linear(x, *block["fc1"])
        if hidden.shape[-1] == 2 * block["fc2"][0].shape[1]:
            gate, value = hidden.chunk(2, dim=-1)
            return functional.linear(functional.silu(gate) * value, *block["fc2"])
        plain = self._options.activation == "gelu"
        hidden = functional.gelu(hidden) if plain else hidden * torch.sigmoid(1.702 * hidden)
        return functional.linear(hidden, *block["fc2"])

    def _resized_positions(self, grid: int) -> Any:
        vit = self._vit
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
