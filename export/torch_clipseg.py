"""CLIPSeg in plain PyTorch: the oracle of its export, and what its speed is compared with."""

from typing import Any

import torch
from torch.nn import functional

from .clipseg import NORM_EPS, ClipSegDecoder
from .options import ClipSegDecoderOptions, ClipSegImageOptions
from .torch_forward import TorchBlocks, TorchForward
from .vision_transformer import VisionTransformer


class TorchClipSegImage(TorchForward):
    """CLIPSeg's image tower in plain PyTorch."""

    def __init__(
        self, vit: VisionTransformer, options: ClipSegImageOptions, device: str = "cpu", dtype: Any = torch.float32
    ) -> None:
        """options: all but the precision, which is `dtype`, and the form of attention."""
        super().__init__(vit, options.tower, device, dtype)

    def __call__(self, images: Any) -> dict[str, Any]:
        """Return the activations [B, L, T, C] of images [B, 3, S, S]."""
        taps, depth = self._options.taps, self._options.depth(len(self._vit.blocks))
        with torch.inference_mode():
            assert self._pre_norm is not None  # it is a tower of CLIP
            x = self._normed(self._embedded(images), self._pre_norm)
            tapped = [x for index, x in enumerate(self._streams(x, depth)) if index in taps]
            return {"activations": torch.stack(tapped, dim=1)}


class TorchClipSegDecoder(TorchBlocks):
    """CLIPSeg's decoder in plain PyTorch."""

    def __init__(
        self,
        decoder: ClipSegDecoder,
        options: ClipSegDecoderOptions,
        device: str = "cpu",
        dtype: Any = torch.float32,
    ) -> None:
        """options: all but the precision, which is `dtype`, and the form of attention."""
        super().__init__(decoder.blocks, options.heads, "relu", NORM_EPS, causal=False, where=(device, dtype))
        self._reduces = [self._affine(affine) for affine in decoder.reduces]
        self._film_mul, self._film_add = self._affine(decoder.film_mul), self._affine(decoder.film_add)
        self._convolution = self._affine(decoder.convolution)
        self._upsampling = [self._affine(affine) for affine in decoder.upsampling]
        self._grid = options.image_size // decoder.patch_size

    def __call__(self, activations: Any, conditions: Any) -> dict[str, Any]:
        """Return the logits [B, S, S] of activations [3, T, C] and prompts' vectors [B, D]."""
        with torch.inference_mode():
            mul = functional.linear(conditions, *self._film_mul)[:, None]
            add = functional.linear(conditions, *self._film_add)[:, None]
            x = mul * functional.linear(activations[-1], *self._reduces[0]) + add
            for index, block in enumerate(self._blocks):
                if index:
                    x = x + functional.linear(activations[-1 - index], *self._reduces[index])
                x = self._normed(x + self._attention(x, block), block["norm1"])
                x = self._normed(x + self._feed_forward(x, block), block["norm2"])
            x = x[:, 1:].transpose(1, 2).reshape(len(x), -1, self._grid, self._grid)
            x = functional.conv2d(x, *self._convolution, padding=1)
            for weight, bias in self._upsampling:
                x = functional.conv_transpose2d(functional.relu(x), weight, bias, stride=weight.shape[-1])
            return {"logits": x[:, 0]}
