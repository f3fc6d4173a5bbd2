"""IS-Net in plain PyTorch: the oracle of the export, and what its speed is compared with."""

from typing import Any

import torch
from torch.nn import functional

from .isnet import NORM_EPS, Convolution, ISNet, Stage
from .torch_forward import OnDevice


class TorchIsnet(OnDevice):
    """IS-Net in plain PyTorch, for evaluation, norms by themselves; weights are converted once."""

    def __init__(self, isnet: ISNet, device: str = "cpu", dtype: Any = torch.float32) -> None:
        super().__init__(device, dtype)
        self._first, self._side = self._affine(isnet.first), self._affine(isnet.side)
        self._encoder = [self._stage(stage) for stage in isnet.encoder]
        self._decoder = [self._stage(stage) for stage in isnet.decoder]

    def __call__(self, images: Any) -> dict[str, Any]:
        """Return the foreground [B, S, S] of images [B, 3, S, S], as the graph does (see `build_isnet_graph`)."""
        with torch.inference_mode():
            x = functional.conv2d(images, *self._first, stride=2, padding=1)
            made: list[Any] = []
            for stage in self._encoder:
                x = stage(_halved(x) if made else x)
                made.append(x)
            made.pop()
            for stage in self._decoder:
                beside = made.pop()
                x = stage(torch.cat([_resized(x, beside), beside], dim=1))
            logits = functional.conv2d(x, *self._side, padding=1)
            return {"foreground": torch.sigmoid(_resized(logits.float(), images))[:, 0]}

    def _stage(self, stage: Stage) -> "_TorchStage":
        down, up = ([self._unit(part) for part in parts] for parts in (stage.down, stage.up))
        return _TorchStage(self._unit(stage.entry), down, up, stage.flat)

    def _unit(self, part: Convolution) -> "_TorchUnit":
        norm = tuple(self.tensor(array) for array in (part.mean, part.variance, part.scale, part.shift))
        return _TorchUnit(self._affine((part.weight, part.bias)), norm)


class _TorchUnit:
    """Convolution, norm and ReLU."""

    def __init__(self, affine: tuple[Any, Any], norm: tuple[Any, ...]) -> None:
        self._affine, self._norm = affine, norm

    def __call__(self, x: Any, dilation: int = 1) -> Any:
        y = functional.conv2d(x, *self._affine, padding=dilation, dilation=dilation)
        mean, variance, scale, shift = self._norm
        return functional.relu(functional.batch_norm(y, mean, variance, scale, shift, eps=NORM_EPS))


class _TorchStage:
    def __init__(self, entry: _TorchUnit, down: list[_TorchUnit], up: list[_TorchUnit], flat: bool) -> None:
        self._entry, self._down, self._up, self._flat = entry, down, up, flat

    def __call__(self, x: Any) -> Any:
        deepest = len(self._down) - 1
        entry = y = self._entry(x)
        made = []
        for level, unit in enumerate(self._down):
            halve = 0 < level < deepest and not self._flat
            y = unit(_halved(y) if halve else y, 2**level if self._flat else 1 + (level == deepest))
            made.append(y)
        made.pop()
        for level, unit in zip(range(deepest - 1, -1, -1), self._up, strict=True):
            beside = made.pop()
            y = unit(torch.cat([_resized(y, beside), beside], dim=1), 2**level if self._flat else 1)
        return y + entry


def _halved(x: Any) -> Any:
    return functional.max_pool2d(x, 2, stride=2, ceil_mode=True)


def _resized(x: Any, like: Any) -> Any:
    """A map in the size of another one, bilinear between the centres of pixels."""
    size = like.shape[2:]
    return x if x.shape[2:] == size else functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
