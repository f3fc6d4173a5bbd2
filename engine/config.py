"""Presets, the user's TOML file and the command line, merged into one checked configuration."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .images import Preprocessing
from .rescoring import ScoreRule

PRESETS = Path(__file__).parent / "presets"


class ConfigError(Exception):
    """A configuration that cannot run; the message says how to mend it."""


@dataclass(frozen=True)
class BackboneConfig:
    """One backbone: which weights, where to tap them, how to feed them."""

    checkpoint: str  # a name of the manifest or a file
    taps: tuple[int, ...]  # 0-based blocks
    activation: str = "gelu"
    heads: int | None = None  # width / 64 by default
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
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    changes = dict(overrides or {})
    taps = changes.pop("taps", None)
    merged.update(changes)
    if taps is not None:
        for backbone in merged["backbones"].values():
            backbone["taps"] = taps
    return _checked(preset, merged)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
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


def _checked(preset: str, merged: dict[str, Any]) -> Config:
    backbones = merged.pop("backbones", {})
    if not isinstance(backbones, Mapping):
        raise ConfigError("[backbones] must hold one table per backbone")
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
    _require(_is_int(config.image_size, 1), "image_size must be a positive number of pixels", config.image_size)
    _require(
        _all_ints(config.degrees, 1) and all(d % 2 for d in config.degrees),
        "degrees must be odd numbers",
        config.degrees,
    )
    interval = config.interval
    _require(
        isinstance(interval, tuple)
        and len(interval) == 2
        and all(isinstance(bound, int | float) for bound in interval)
        and 0 <= interval[0] < interval[1],
        "interval must be two bounds, 0 <= low < high",
        interval,
    )
    _require(
        config.group_size is None or _is_int(config.group_size, 2), "group_size must be at least 2", config.group_size
    )
    threshold = config.threshold
    _require(
        threshold in (None, "auto") or (isinstance(threshold, int | float) and 0 <= threshold <= 1),
        "threshold must be 'auto' or a number in [0, 1]",
        threshold,
    )
    _require(_is_int(config.seed, 0), "seed must be a whole number", config.seed)
    for name, backbone in config.backbones.items():
        _require(isinstance(backbone.checkpoint, str), f"[backbones.{name}] checkpoint must be a name or file", "")
        _require(_all_ints(backbone.taps, 0), f"[backbones.{name}] taps must be block numbers", backbone.taps)
        _require(
            backbone.preprocessing in get_args(Preprocessing),
            f"[backbones.{name}] preprocessing must be one of {', '.join(get_args(Preprocessing))}",
            backbone.preprocessing,
        )
    for where, used in (("map", config.map.backbone), ("image_score", config.image_score.backbone)):
        _require(used in config.backbones, f"[{where}] backbone must be one of {', '.join(config.backbones)}", used)
    _require(
        config.image_score.rule in get_args(ScoreRule),
        f"[image_score] rule must be one of {', '.join(get_args(ScoreRule))}",
        config.image_score.rule,
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


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _all_ints(values: Sequence[Any], least: int) -> bool:
    return isinstance(values, tuple) and len(values) > 0 and all(_is_int(value, least) for value in values)
