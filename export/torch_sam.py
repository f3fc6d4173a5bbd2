"""SAM and MobileSAM in plain PyTorch: the oracle of the export, and what its speed is compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from .options import SamMasksOptions
from .sam import (
    CHANNEL_EPS,
    TINY_EPS,
    Attention,
    Convolution,
    MaskDecoder,
    Neck,
    SamBlock,
    SamEncoder,
    TinyBlock,
    TinyEncoder,
    TwoWayBlock,
    dense_encoding,
    relative_table,
    window_biases,
)
from .sam_masks_graph import NORM_EPS
from .torch_forward import OnDevice
from .transformer import Affine, Block


class _Lazy(OnDevice):
    """A network whose weights are brought to the device when they are needed first, and stay there."""

    def __init__(self, device: str, dtype: Any) -> None:
        super().__init__(device, dtype)
        self._known: dict[int, tuple[Any, Any]] = {}  # by the weight's identity; the network keeps the weights

    def _affine(self, affine: Affine) -> tuple[Any, Any]:
        key = id(affine[0])
        if key not in self._known:
            self._known[key] = super()._affine(affine)
        return self._known[key]

    def _linear(self, x: Any, affine: Affine) -> Any:
        return functional.linear(x, *self._affine(affine))

    def _normed(self, x: Any, affine: Affine, eps: float) -> Any:
        return functional.layer_norm(x, x.shape[-1:], *self._affine(affine), eps)


class _TorchEncoder(_Lazy):
    """What both image encoders share."""

    def __init__(self, neck: Neck, device: str, dtype: Any) -> None:
        super().__init__(device, dtype)
        self._neck, self._narrow, self._smooth = neck, self.tensor(neck.narrow), self.tensor(neck.smooth)

    def _embedding(self, x: Any) -> dict[str, Any]:
        """The embedding [B, D, g, g] of tokens [B, g, g, C]."""
        y = self._normed(functional.linear(x, self._narrow), self._neck.norm1, CHANNEL_EPS)
        y = functional.conv2d(y.permute(0, 3, 1, 2), self._smooth, padding=1)
        y = self._normed(y.permute(0, 2, 3, 1), self._neck.norm2, CHANNEL_EPS)
        return {"embedding": y.permute(0, 3, 1, 2)}

    def _windowed(self, x: Any, side: int, attention: Any) -> Any:
        """Apply an attention to windows of tokens [B, g, g, C], beyond which there are zeros."""
        batch, grid, _, width = x.shape
        count = -(-grid // side)
        x = functional.pad(x, (0, 0, 0, count * side - grid, 0, count * side - grid))
        x = x.reshape(batch, count, side, count, side, width).transpose(2, 3).reshape(-1, side * side, width)
        x = attention(x).reshape(batch, count, count, side, side, width).transpose(2, 3)
        return x.reshape(batch, count * side, count * side, width)[:, :grid, :grid]

    def _attention(self, x: Any, block: Block, heads: int, bias: Any) -> Any:
        """Attention of windows [W, T, C]; bias: on the logits, from the queries [W, heads, T, C / heads]."""
        count, tokens, width = x.shape
        parts = self._linear(x, block.qkv).reshape(count, tokens, 3, heads, width // heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias(query))
        return self._linear(mixed.transpose(1, 2).reshape(count, tokens, width), block.proj)

    def _fed_forward(self, x: Any, block: Block, eps: float) -> Any:
        hidden = functional.gelu(self._linear(self._normed(x, block.norm2, eps), block.fc1))
        return x + self._linear(hidden, block.fc2)


class TorchSamEncoder(_TorchEncoder):
    """SAM's image encoder in plain PyTorch."""

    def __init__(self, encoder: SamEncoder, device: str = "cpu", dtype: Any = torch.float32) -> None:
        super().__init__(encoder.neck, device, dtype)
        self._encoder = encoder
        self._patches = self._affine((encoder.patch_weight, encoder.patch_bias))
        self._positions = self.tensor(encoder.positions)
        self._tables = [
            (self.tensor(relative_table(block.rows)), self.tensor(relative_table(block.columns)))
            for block in encoder.blocks
        ]

    def __call__(self, images: Any) -> dict[str, Any]:
        """Return the embedding of images [B, 3, S, S], as the graph does (see `build_sam_image_graph`)."""
        with torch.inference_mode():
            x = functional.conv2d(images, *self._patches, stride=self._encoder.patch_weight.shape[-1])
            x = x.permute(0, 2, 3, 1) + self._positions
            for block, tables in zip(self._encoder.blocks, self._tables, strict=True):
                y = self._normed(x, block.block.norm1, CHANNEL_EPS)
                x = x + self._windowed(y, block.side, lambda y, b=block, t=tables: self._seen(y, b, t))
                x = self._fed_forward(x, block.block, CHANNEL_EPS)
            return self._embedding(x)

    def _seen(self, x: Any, sam: SamBlock, tables: tuple[Any, Any]) -> Any:
        def bias(query: Any) -> Any:
            grid = query.unflatten(2, (sam.side, sam.side))  # [W, heads, y, x, d]
            rows = torch.einsum("whyxd,yid->whyxi", grid, tables[0])
            columns = torch.einsum("whyxd,xid->whyxi", grid, tables[1])
            return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)

        return self._attention(x, sam.block, sam.heads, bias)


class TorchTinyEncoder(_TorchEncoder):
    """MobileSAM's image encoder in plain PyTorch."""

    def __init__(self, encoder: TinyEncoder, device: str = "cpu", dtype: Any = torch.float32) -> None:
        super().__init__(encoder.neck, device, dtype)
        self._encoder = encoder
        self._biases = [[self.tensor(window_biases(block)) for block in stage] for stage in encoder.stages]

    def __call__(self, images: Any) -> dict[str, Any]:
        """Return the embedding of images [B, 3, S, S], as the graph does (see `build_sam_image_graph`)."""
        encoder, last = self._encoder, len(self._encoder.stages) - 1
        with torch.inference_mode():
            x = functional.gelu(self._convolved(images, encoder.stem[0], 2))
            x = self._convolved(x, encoder.stem[1], 2)
            for row in encoder.inverted:
                x = functional.gelu(x + self._bottleneck(x, row, 1))
            for stage, (row, blocks) in enumerate(zip(encoder.downsamplings, encoder.stages, strict=True)):
                x = self._bottleneck(x, row, 1 if stage == last else 2)
                for block, biases in zip(blocks, self._biases[stage], strict=True):
                    x = self._block(x.permute(0, 2, 3, 1), block, biases)
            return self._embedding(x.permute(0, 2, 3, 1))

    def _convolved(self, x: Any, convolution: Convolution, stride: int = 1) -> Any:
        out, within, side, _ = convolution.weight.shape
        affine = self._affine((convolution.weight, convolution.bias))
        return functional.conv2d(x, *affine, stride=stride, padding=side // 2, groups=out if within == 1 else 1)

    def _bottleneck(self, x: Any, row: Sequence[Convolution], stride: int) -> Any:
        x = functional.gelu(self._convolved(x, row[0]))
        x = functional.gelu(self._convolved(x, row[1], stride))
        return self._convolved(x, row[2])

    def _block(self, x: Any, tiny: TinyBlock, biases: Any) -> Any:
        """[B, g, g, C] → [B, C, g, g]."""

        def seen(y: Any) -> Any:
            return self._attention(
                self._normed(y, tiny.block.norm1, TINY_EPS), tiny.block, tiny.heads, lambda _: biases
            )

        x = x + self._windowed(x, tiny.side, seen)
        x = self._convolved(x.permute(0, 3, 1, 2), tiny.local).permute(0, 2, 3, 1)
        return self._fed_forward(x, tiny.block, TINY_EPS).permute(0, 3, 1, 2)


class TorchMaskDecoder(_Lazy):
    """SAM's prompt encoder and mask decoder in plain PyTorch, every point by itself as published."""

    def __init__(
        self, decoder: MaskDecoder, options: SamMasksOptions, device: str = "cpu", dtype: Any = torch.float32
    ) -> None:
        """options: all but the precision, which is `dtype`."""
        super().__init__(device, dtype)
        self._decoder, self._options = decoder, options
        self._grid = options.image_size // 16
        self._encoding = self.tensor(dense_encoding(decoder, self._grid))
        self._tokens, self._no_mask = self.tensor(decoder.tokens), self.tensor(decoder.no_mask)
        self._no_point, self._point = self.tensor(decoder.no_point), self.tensor(decoder.point)
        self._frequencies = torch.as_tensor(decoder.frequencies).to(device)

    def __call__(self, embedding: Any, points: Any) -> dict[str, Any]:
        """Return logits and iou of points [B, 2], as the graph does (see `build_sam_masks_graph`)."""
        decoder, batch = self._decoder, len(points)
        with torch.inference_mode():
            prompt = self._prompt(points)
            keys = (embedding.flatten(2).transpose(1, 2) + self._no_mask).expand(batch, -1, -1)
            tokens = prompt
            for index, block in enumerate(decoder.blocks):
                tokens, keys = self._block(tokens, keys, prompt, block, index == 0)
            y = self._attend(tokens + prompt, keys + self._encoding, keys, decoder.to_image)
            tokens = self._normed(tokens + y, decoder.norm, NORM_EPS)
            quality = self._layers(tokens[:, 0], decoder.quality)
            hyper = torch.stack(
                [self._layers(tokens[:, 2 + mask], layers) for mask, layers in enumerate(decoder.hyper)], dim=1
            )
            x = keys.transpose(1, 2).unflatten(2, (self._grid, self._grid))
            x = functional.conv_transpose2d(x, *self._affine(decoder.enlarge1), stride=2).permute(0, 2, 3, 1)
            x = self._normed(x, decoder.enlarge_norm, CHANNEL_EPS)
            x = functional.gelu(x).permute(0, 3, 1, 2)
            x = functional.gelu(functional.conv_transpose2d(x, *self._affine(decoder.enlarge2), stride=2))
            return {"logits": torch.einsum("bmc,bcyx->bmyx", hyper, x), "iou": quality[:, 1:]}

    def _prompt(self, points: Any) -> Any:
        unit = 2 * (points.float() + 0.5) / self._options.image_size - 1
        angles = 2 * torch.pi * (unit @ self._frequencies)
        point = torch.cat([angles.sin(), angles.cos()], dim=1).to(self._dtype) + self._point
        rest = self._no_point.expand(len(points), 1, -1)
        return torch.cat([self._tokens.expand(len(points), -1, -1), point[:, None], rest], dim=1)

    def _block(self, tokens: Any, keys: Any, prompt: Any, block: TwoWayBlock, first: bool) -> tuple[Any, Any]:
        if first:
            tokens = self._attend(tokens, tokens, tokens, block.self_attention)
        else:
            placed = tokens + prompt
            tokens = tokens + self._attend(placed, placed, tokens, block.self_attention)
        tokens = self._normed(tokens, block.norm1, NORM_EPS)
        y = self._attend(tokens + prompt, keys + self._encoding, keys, block.to_image)
        tokens = self._normed(tokens + y, block.norm2, NORM_EPS)
        tokens = self._normed(tokens + self._layers(tokens, [block.fc1, block.fc2]), block.norm3, NORM_EPS)
        y = self._attend(keys + self._encoding, tokens + prompt, tokens, block.from_image)
        return tokens, self._normed(keys + y, block.norm4, NORM_EPS)

    def _attend(self, query: Any, key: Any, value: Any, attention: Attention) -> Any:
        heads = self._options.heads
        parts = (
            self._linear(x, affine).unflatten(2, (heads, -1)).transpose(1, 2)
            for x, affine in ((query, attention.query), (key, attention.key), (value, attention.value))
        )
        mixed = functional.scaled_dot_product_attention(*parts)
        return self._linear(mixed.transpose(1, 2).flatten(2), attention.out)

    def _layers(self, x: Any, layers: Sequence[Affine]) -> Any:
        for index, affine in enumerate(layers):
            x = self._linear(functional.relu(x) if index else x, affine)
        return x
