"""Presets, the user's TOML file and the command line, merged into one checked configuration."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from zsad.export.onnx_export import ExportOptions
from zsad.export.vit_graph import ACTIVATIONS

from .images.decode import Preprocessing
from .scores.image_scores import ScoreRule

Precision = Literal["auto", "fp32", "fp16", "int8"]
Decoder = Literal["pillow", "nvimgcodec"]

PRESETS = Path(__file__).parent / "presets"
LARGEST_SIDE = 4096  # pixels; beyond, the similarities of one pair of images alone fill a large machine


class ConfigError(Exception):
    """A configuration that cannot run; the message says how to mend it."""


@dataclass(frozen=True)
class BackboneConfig:
    """One backbone: which weights, where to tap them, how to feed them."""

    checkpoint: str  # a name of the manifest or a file
    taps: tuple[int, ...]  # 0-based blocks
    activation: str = "gelu"
    heads: int | None = None  # by default those of the published tower of this width
    preprocessing: Preprocessing = "imagenet"


@dataclass(frozen=True)
class MapConfig:
    """Where the pixel maps come from."""

    backbone: str
    object_mask: bool = False


@dataclass(frozen=True)
class ImageScoreConfig:
    """Where the image scores come from; no `rscin` means no rescoring."""

    backbone: str
    rule: ScoreRule = "map_maximum"
    rscin: tuple[int, ...] = ()


@dataclass(frozen=True)
class Config:
    """Everything that decides the scores."""

    preset: str
    image_size: int
    degrees: tuple[int, ...]
    interval: tuple[float, float]
    backbones: dict[str, BackboneConfig]
    map: MapConfig
    image_score: ImageScoreConfig
    group_size: int | None = None  # None scores the whole category as one batch
    threshold: float | str | None = None  # a score in [0, 1] or "auto"
    precision: Precision = "auto"  # of the products of mutual scoring; auto: fp32 on a CPU, fp16 on a GPU
    backbone_precision: Precision = "auto"  # likewise
    decoder: Decoder = "pillow"  # nvimgcodec: JPEG files on the GPU, to slightly other pixels
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def export_options(self, name: str, precision: str, attention: str) -> ExportOptions:
        """Return what the graph of one of the backbones is exported with."""
        backbone = self.backbones[name]
        return ExportOptions(
            taps=backbone.taps,
            image_size=self.image_size,
            activation=backbone.activation,
            heads=backbone.heads,
            embedding=bool(self.image_score.rscin) and name == self.image_score.backbone,
            precision=precision,
            attention=attention,
            preprocessing=backbone.preprocessing,
        )


def preset_names() -> list[str]:
    """Return the presets that come with zsad."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_config(preset: str, file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Merge preset, file and overrides (later ones win) and check the result; raises ConfigError.

    overrides: values by the keys of Config; `taps` goes to every backbone.
    """
    if preset not in preset_names():
        raise ConfigError(f"there is no preset {preset!r}; choose one of {', '.join(preset_names())}")
    merged = _read_toml(PRESETS / f"{preset}.toml")
    if file is not None:
        merged = _merge(merged, _read_toml(file))
        try:
            _checked(preset, merged)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
    changes = dict(overrides or {})
    if "taps" in changes:
        taps = changes.pop("taps")
        changes["backbones"] = {name: {**backbone, "taps": taps} for name, backbone in merged["backbones"].items()}
    return _checked(preset, {**merged, **changes})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return table
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from error


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(kind: Any, values: Any, where: str) -> Any:
    """Construct a dataclass from a table, naming keys that are unknown or missing; lists become tuples."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a table, not {values!r}")
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {where}; it takes {', '.join(known)}")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _checked(preset: str, merged: Mapping[str, Any]) -> Config:
    backbones = merged.get("backbones")
    if not isinstance(backbones, Mapping):
        raise ConfigError(f"[backbones] must hold one table per backbone, not {backbones!r}")
    if "preset" in merged:
        raise ConfigError("unknown key 'preset' in the configuration; choose it with --preset")
    config: Config = _build(
        Config,
        {
            **merged,
            "preset": preset,
            "backbones": {name: _build(BackboneConfig, b, f"[backbones.{name}]") for name, b in backbones.items()},
            "map": _build(MapConfig, merged.get("map"), "[map]"),
            "image_score": _build(ImageScoreConfig, merged.get("image_score"), "[image_score]"),
        },
        "the configuration",
    )
    _require(
        _is_int(config.image_size, 1) and config.image_size <= LARGEST_SIDE,
        f"image_size must be a number of pixels from 1 to {LARGEST_SIDE}",
        config.image_size,
    )
    _require(
        _all_ints(config.degrees, 1) and all(d % 2 for d in config.degrees),
        "degrees must be odd numbers",
        config.degrees,
    )
    interval = config.interval
    _require(
        isinstance(interval, tuple)
        and len(interval) == 2
        and all(map(_is_number, interval))
        and 0 <= interval[0] < interval[1],
        "interval must be two finite bounds, 0 <= low < high",
        interval,
    )
    _require(
        config.group_size is None or _is_int(config.group_size, 2), "group_size must be at least 2", config.group_size
    )
    threshold = config.threshold
    _require(
        threshold in (None, "auto")
        or (isinstance(threshold, int | float) and not isinstance(threshold, bool) and 0 <= threshold <= 1),
        "threshold must be 'auto' or a number in [0, 1]",
        threshold,
    )
    _require_choice("precision", config.precision, get_args(Precision))
    _require_choice("backbone_precision", config.backbone_precision, get_args(Precision))
    _require_choice("decoder", config.decoder, get_args(Decoder))
    _require(_is_int(config.seed, 0), "seed must be a whole number", config.seed)
    for name, backbone in config.backbones.items():
        where = f"[backbones.{name}]"
        _require(
            isinstance(backbone.checkpoint, str), f"{where} checkpoint must be a name or file", backbone.checkpoint
        )
        _require(_all_ints(backbone.taps, 0), f"{where} taps must be block numbers", backbone.taps)
        _require(backbone.heads is None or _is_int(backbone.heads, 1), f"{where} heads must be a count", backbone.heads)
        _require_choice(f"{where} activation", backbone.activation, ACTIVATIONS)
        _require_choice(f"{where} preprocessing", backbone.preprocessing, get_args(Preprocessing))
    _require_choice("[map] backbone", config.map.backbone, list(config.backbones))
    _require_choice("[image_score] backbone", config.image_score.backbone, list(config.backbones))
    _require_choice("[image_score] rule", config.image_score.rule, get_args(ScoreRule))
    _require(
        isinstance(config.map.object_mask, bool), "[map] object_mask must be true or false", config.map.object_mask
    )
    _require(
        config.image_score.rscin == () or _all_ints(config.image_score.rscin, 1),
        "[image_score] rscin must be neighbour counts",
        config.image_score.rscin,
    )
    return config


def _require(holds: bool, message: str, got: Any) -> None:
    if not holds:
        raise ConfigError(f"{message}, not {got!r}")


def _require_choice(where: str, value: Any, choices: Sequence[str]) -> None:
    _require(value in choices, f"{where} must be one of {', '.join(choices)}", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _all_ints(values: Sequence[Any], least: int) -> bool:
    return isinstance(values, tuple) and len(values) > 0 and all(_is_int(value, least) for value in values)
