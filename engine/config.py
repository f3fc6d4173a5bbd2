"""Presets, the user's TOML file and the command line, merged into one checked configuration."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from zsad.kernels.files import read_text

from .presets.names import PRESETS, preset_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_SIDE = 4096  # pixels; beyond, the similarities of one pair of images alone fill a large machine
SIDE = f"a number of pixels from 1 to {LARGEST_SIDE}"
LARGEST_AUTO = 518  # pixels; what published methods take images at, above which none is taken by itself

Precision = Literal["auto", "fp32", "fp16", "int8"]
NetworkPrecision = Literal["auto", "fp32", "fp16", "bf16", "int8"]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
LEAST_TILE = 32  # pixels; of less there is nothing to be seen
ImageSize = Side | Literal["auto"]  # auto: as large as a category's images are
Block = Annotated[int, Field(ge=0)]
TileCount = Annotated[int, Field(ge=1, le=1000)]
Share = Annotated[float, Field(ge=0, le=1, description="a number in [0, 1]")]
Foreground = Literal["none", "colour", "isnet", "isnet+sam"]


class ConfigError(Exception):
    """A configuration that cannot run; the message says how to mend it."""


class Table(BaseModel):
    """A table of a configuration: immutable, without keys that nobody reads, without conversions.

    A field's description completes the sentence "KEY must be …".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the manifest, or files, that a method with these settings reads beside its networks' checkpoints."""
        return ()

    def sides(self, names: Sequence[str]) -> Mapping[str, int]:
        """Return the sides in pixels, by networks, at which a category's images are taken where these settings say so.

        names: what the category may be called. Raises ConfigError.
        """
        return {}


def rising(interval: tuple[float, float]) -> tuple[float, float]:
    """Validate an interval: raises ValueError unless its first number is the smaller one."""
    if not interval[0] < interval[1]:
        raise ValueError(interval)
    return interval


class NetworkSpec(Table):
    """One network: which weights, where to tap them, how to feed them."""

    checkpoint: str = Field(description="a name of the manifest or a file")
    taps: Annotated[tuple[Block, ...], Field(description="block numbers, counted from 0")] = ()
    image_size: ImageSize = Field(description=f"{SIDE}, or 'auto'")  # the configuration's, unless it has its own
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    heads: Annotated[int | None, Field(ge=1, description="a count of attention heads")] = None
    text_heads: Annotated[int | None, Field(ge=1, description="a count of attention heads")] = None  # of texts
    # None: as the architecture resizes its positions.
    antialias: Annotated[bool | None, Field(description="true or false")] = None
    preprocessing: Literal["imagenet", "clip"] | None = None  # None: what the architecture was trained with

    @property
    def side(self) -> int:
        """The side of its input in pixels; of `auto` the largest that it can be, until the images are known."""
        return LARGEST_AUTO if self.image_size == "auto" else self.image_size


class ForegroundSettings(Table):
    """What counts as foreground."""

    min_peak: Share = 0.8  # IS-Net's highest value below it: there is no object; 0: never
    min_foreground: Share = 0.001  # of the image; below it all of the image is foreground
    coverage: Share = 0.8  # of a mask by the object, for it to be part of the object


class MaskSettings(Table):
    """Which points SAM is asked for, and which of their masks are kept. The defaults are segment_anything's."""

    points_per_side: Annotated[int, Field(ge=1, le=1024, description="a number from 1 to 1024")] = 32
    # A filter whose limit is 0 or less is not applied.
    min_predicted_iou: float = 0.88  # kept above it
    min_stability: float = 0.95  # kept from it on
    # Stability: the share that logits above the threshold plus this have in those above the threshold minus this.
    stability_offset: Annotated[float, Field(ge=0, description="at least 0")] = 1.0
    mask_threshold: float = 0.0  # of logits
    max_box_iou: Share = 0.7  # with a better mask's box


class TileSettings(Table):
    """What is a component, how tiles are laid over it, and what their scores are for the image."""

    min_component: Share = 0.001  # of the image; smaller ones are dropped unless all are
    min_side: Annotated[int, Field(ge=1, description="a number of pixels from 1")] = 352  # of a tile
    # Elongated is what has a box whose sides are to one another as more than `aspect`, and more parts than `parts`.
    aspect: Annotated[float, Field(ge=1, description="at least 1")] = 1.5
    parts: Annotated[int, Field(ge=0, description="a whole number from 0")] = 20
    step: Annotated[float, Field(gt=0, description="above 0")] = 0.5  # between its tiles, in short sides of its box
    flush: bool = True  # its end tiles end with the box; false: they are centred on its ends
    # Tiles that reach beyond the image are moved and cut, or the image is mirrored at its borders.
    pad: Literal["clamp", "reflect"] = "clamp"
    # The image's score is the mean of this share of its components, the highest; at least of one.
    top_share: Annotated[float, Field(gt=0, le=1, description="above 0, up to 1")] = 0.25
    top_rounding: Literal["ceil", "floor"] = "ceil"
    mask_background: bool = False  # within tiles too; outside of them it always has the lowest score


TileBatches = Literal["aligned", "pooled"]


class Tiling(Table):
    """How whole images are cut into tiles, each of which a method takes for an image; none are unless one says how."""

    tile: Annotated[int, Field(ge=LEAST_TILE)] | None = Field(
        default=None, description=f"a number of pixels from {LEAST_TILE}"
    )  # of its side, in the image at its scale
    tiles: tuple[TileCount, TileCount] | None = Field(
        default=None, description="a count of columns and one of rows, 4x3 say"
    )  # of every image, instead
    overlap: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="a number of pixels from 0"
    )  # at least
    scale: Annotated[float, Field(gt=0, le=8, description="a number above 0, up to 8")] = 1.0  # of images
    # Of methods that compare images: the tiles of one place with each other, or all with all; auto: of one place where
    # all images of a category have one size.
    tile_batches: TileBatches | Literal["auto"] = "auto"

    def __bool__(self) -> bool:
        return self.tile is not None or self.tiles is not None

    @property
    def options(self) -> str:
        """What says the same on the command line."""
        given = {
            "tile": self.tile,
            "tiles": None if self.tiles is None else "{}x{}".format(*self.tiles),
            "overlap": self.overlap,
            "scale": None if self.scale == 1 else self.scale,
            "tile_batches": None if self.tile_batches == "auto" else self.tile_batches,
        }
        return " ".join(f"{_option(name)} {value}" for name, value in given.items() if value is not None)


# What [stages] says of its networks where a file does not.
STAGE_NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "isnet": {"checkpoint": "isnet-general-use", "image_size": 1024},
    "sam": {"checkpoint": "sam-vitb", "image_size": 1024},
}


class StageSettings(Table):
    """What comes before a method: the foreground of an image, and its components in tiles.

    Variance Vigilance Vanguard's report leaves most of it open; the defaults are this implementation's choices.
    """

    isnet: NetworkSpec = NetworkSpec.model_validate(STAGE_NETWORKS["isnet"])
    sam: NetworkSpec = NetworkSpec.model_validate(STAGE_NETWORKS["sam"])
    foreground: ForegroundSettings = ForegroundSettings()
    masks: MaskSettings = MaskSettings()
    tiles: TileSettings = TileSettings()


class Config(Table):
    """Everything that decides the scores."""

    preset: str
    method: str = Field(description="the name of a method")
    image_size: ImageSize = Field(description=f"{SIDE}, or 'auto'")
    networks: dict[str, NetworkSpec] = Field(description="one table per network")
    settings: SerializeAsAny[Table]  # of the method, in files the table of its name
    reference: str | None = Field(None, description="a folder of known-good images, or a file that lists them")
    shots: Annotated[int, Field(ge=1)] | None = Field(None, description="a count of known-good images")  # None: all
    foreground: Foreground = "none"  # how it is found; the background gets the lowest score
    components: bool = Field(False, description="true or false")  # of the foreground, each looked at by itself
    stages: StageSettings = StageSettings()
    tiling: Tiling = Tiling()  # of whole images
    group_size: Annotated[int, Field(ge=2)] | None = Field(None, description="at least 2")  # None: whole categories
    threshold: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        "auto", description="'auto' or a number in [0, 1]"
    )  # of verdicts; auto: what the method knows, or the distribution of the scores says
    expected_defects: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="a share of the images, above 0 and below 1"
    )
    network_precision: NetworkPrecision = "auto"  # auto: fp32 on a CPU, fp16 on a GPU
    decoder: Literal["pillow", "nvimgcodec"] = "pillow"  # nvimgcodec: JPEG files on the GPU, to slightly other pixels
    bit_depth: Annotated[int, Field(ge=8, le=16)] | None = Field(
        None, description="a number of bits from 8 to 16"
    )  # of grey values in 16-bit files; None: as many as the category's files use
    seed: Annotated[int, Field(ge=0)] = Field(0, description="a whole number from 0")

    @property
    def few_shot(self) -> bool:
        """Whether known-good images join in."""
        return self.reference is not None or self.shots is not None

    @property
    def specs(self) -> dict[str, NetworkSpec]:
        """All networks by name: the method's own and those that find the foreground."""
        finders = {name: getattr(self.stages, name) for name in self.foreground.split("+") if name in ("isnet", "sam")}
        return {**self.networks, **finders}

    @property
    def unsized(self) -> list[str]:
        """The names of the networks whose inputs are as large as a category's images are."""
        return [name for name, spec in self.networks.items() if spec.image_size == "auto"]

    def sized(self, sides: Mapping[str, int]) -> "Config":
        """Return this configuration with these sides of the inputs, in pixels, of its networks without one."""
        networks = {
            name: spec.model_copy(update={"image_size": sides[name]}) if name in sides else spec
            for name, spec in self.networks.items()
        }
        size = max(sides.values()) if sides and self.image_size == "auto" else self.image_size
        return self.model_copy(update={"image_size": size, "networks": networks})


class CheckedMethod(Protocol):
    """What a configuration's check asks of its method."""

    Settings: ClassVar[type[Table]]
    takes_references: ClassVar[bool]
    compares: ClassVar[bool]

    @staticmethod
    def graph_requests(config: Config) -> object:
        """Raise ConfigError for networks that the method cannot use."""


MethodOf = Callable[[str], type[CheckedMethod]]
SomeTable = TypeVar("SomeTable", bound=Table)


def load_config(
    preset: str,
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    method_of: MethodOf,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Merge preset, file and overrides (later ones win) and check the result; raises ConfigError.

    base: what takes the place of the preset's file; the preset then only lends its name.

    overrides: values by the keys of Config, or by those of the method's settings; `taps` and `image_size` go to every
    network. method_of: gives the class of a method, and raises ConfigError for an unknown one.
    """
    if base is None and preset not in preset_names():
        raise ConfigError(f"there is no preset {preset!r}; choose one of {', '.join(preset_names())}")
    merged = read_toml(PRESETS / f"{preset}.toml") if base is None else dict(base)
    if file is not None:
        own = read_toml(file)
        known = {*Config.model_fields, *(own if base is None else base)}
        if more := [key for key in own if isinstance(own[key], dict) and key not in known]:
            raise ConfigError(
                f"{file}: [{more[0]}] is nothing for a run by a bank, which says that itself; leave it out"
            )
        merged = _merged(merged, own)
        if "preset" in merged:
            raise ConfigError(f"{file}: unknown key 'preset' in the configuration; choose it with --preset")
        try:
            _checked(preset, merged, method_of)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
    overridden = _override(merged, overrides or {})
    method = overridden["method"]
    unknown = overridden[method].keys() - merged.get(method, {}).keys() - method_of(method).Settings.model_fields.keys()
    for key in sorted(unknown):
        if base is not None:
            raise ConfigError(f"{_option(key)} cannot be chosen for what is scored by a bank; leave it out")
        raise ConfigError(f"{_option(key)} is nothing for preset {preset}, whose method is {method}")
    return _checked(preset, overridden, method_of, (overrides or {}).keys())


def check(model: type[SomeTable], values: object, where: str = "", options: Collection[str] = frozenset()) -> SomeTable:
    """Make a table of values; raises ConfigError that names the key, what it takes and what was given.

    where: the table's name as in the file, for example [musc]. options: keys that the command line gave; they are named
    as it has them.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(model, error.errors()[0], values, where, options)) from None


def _checked(
    preset: str, merged: Mapping[str, Any], method_of: MethodOf, options: Collection[str] = frozenset()
) -> Config:
    name = merged.get("method")
    if "settings" in merged:
        raise ConfigError(f"unknown key 'settings' in the configuration; the method's own settings are in [{name}]")
    values = {key: value for key, value in merged.items() if key != name}
    values |= {"preset": preset, "settings": Table()}
    stages = values.get("stages", {})
    values["stages"] = _merge(STAGE_NETWORKS, stages) if isinstance(stages, Mapping) else stages
    networks = values.get("networks")
    if isinstance(networks, Mapping):
        values["networks"] = {
            name: {"image_size": values.get("image_size"), **table} if isinstance(table, Mapping) else table
            for name, table in networks.items()
        }
    method = method_of(check(Config, values, "", options).method)  # what its settings may be depends on it
    settings = check(method.Settings, merged.get(str(name), {}), f"[{name}]", options)
    config = check(Config, {**values, "settings": settings})
    if config.few_shot and not method.takes_references:
        raise ConfigError(f"method {name} makes no use of known-good images; leave out --reference and --shots")
    if config.expected_defects is not None and config.threshold != "auto":
        raise ConfigError("--threshold and --expected-defects both say what is rejected; leave out one of them")
    if config.group_size is not None and not method.compares:
        raise ConfigError(f"method {name} judges every image by itself; leave out --group-size")
    if config.components and method.compares:
        raise ConfigError(f"--components: scores of method {name} depend on other images; leave it out")
    if config.decoder == "nvimgcodec" and (config.components or config.foreground not in ("none", "colour")):
        raise ConfigError("--decoder nvimgcodec leaves no image where its foreground could be found; leave it out")
    if config.tiling:
        _check_tiling(config)
    elif given := config.tiling.model_fields_set:
        raise ConfigError(f"{_option(sorted(given)[0])} says how images are cut into tiles; give --tile or --tiles too")
    if config.unsized and not method.compares:
        raise ConfigError(
            f"method {name} judges every image by itself, so that no size follows from the others; "
            "give --image-size a number, or leave it out"
        )
    for stage, spec in (("isnet", config.stages.isnet), ("sam", config.stages.sam)):
        if spec.image_size == "auto":
            raise ConfigError(f"[stages.{stage}] image_size must be {SIDE}, not 'auto'")
    method.graph_requests(config)
    return config


def _check_tiling(config: Config) -> None:
    """Raise ConfigError where images cannot be cut into tiles as a configuration says."""
    tiling = config.tiling
    if tiling.tile is not None and tiling.tiles is not None:
        raise ConfigError("--tile says how large tiles are and --tiles how many; leave out one of them")
    if tiling.tiles is not None and tiling.scale != 1:
        raise ConfigError("--scale: --tiles cuts every image into as many, at any scale; leave it out, or give --tile")
    if tiling.tile is not None and tiling.overlap is not None and tiling.overlap > tiling.tile // 2:
        raise ConfigError(f"--overlap must be at most half of --tile, {tiling.tile // 2} pixels, not {tiling.overlap}")
    if config.components:
        raise ConfigError(
            "--tile and --tiles cut whole images, and --components (of preset vvv) cuts tiles of its own around each "
            "component of the foreground, of which tiles would show parts; give only one"
        )
    if config.decoder == "nvimgcodec":
        raise ConfigError("--decoder nvimgcodec leaves no image that could be cut into tiles; leave it out")


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _override(merged: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    changes = {key: value for key, value in overrides.items() if key in Config.model_fields}
    everywhere = {key: overrides[key] for key in ("taps", "image_size") if key in overrides}
    changes["networks"] = {name: {**table, **everywhere} for name, table in merged["networks"].items()}
    if tiling := {key: overrides[key] for key in Tiling.model_fields if key in overrides}:
        instead = {"tile": "tiles", "tiles": "tile"}
        before = {key: value for key, value in merged.get("tiling", {}).items() if instead.get(key) not in tiling}
        changes["tiling"] = {**before, **tiling}
    elsewhere = {*Config.model_fields, *Tiling.model_fields, "taps"}
    own = {key: value for key, value in overrides.items() if key not in elsewhere}
    method = merged["method"]
    return {**merged, **changes, method: {**merged.get(method, {}), **own}}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, lists as tuples, as strict tables take them; raises ConfigError."""
    try:
        frozen: dict[str, Any] = _frozen(tomllib.loads(read_text(path)))
        return frozen
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({getattr(error, 'strerror', None) or error})") from error
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as TOML (nested too deep)") from None


def _frozen(value: Any) -> Any:
    """Turn lists into tuples, at any depth."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _merged(preset: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    if file.get("method", preset["method"]) != preset["method"]:
        preset = {key: value for key, value in preset.items() if key != preset["method"]}  # another method's settings
    return _merge(preset, file)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(model: type[Table], error: Any, values: Any, where: str, options: Collection[str]) -> str:
    """Say which key of which table is wrong, what it takes, and what was given."""
    description, given = "a table", values
    path = list(error["loc"])
    key, outer = "", ""
    while path and path[0] in model.model_fields:
        key = str(path.pop(0))
        field = model.model_fields[key]
        description = field.description or _taken(field.annotation)
        given = given.get(key) if isinstance(given, Mapping) else None
        inner: Any = get_args(field.annotation)[-1] if get_origin(field.annotation) is dict else field.annotation
        if not (isinstance(inner, type(Table)) and issubclass(inner, Table)):  # `type` includes tuple[int] in 3.10
            break
        if inner is not field.annotation:  # one table for each name
            if not path:
                return f"[{key}] must hold {description}, not {given!r}"
            key = f"{key}.{path.pop(0)}"
            given = dict(given or {}).get(key.partition(".")[2])
        outer += f"{key}."
        model, where, key = inner, f"[{outer[:-1]}]", ""
        description = "a table"
    subject = " ".join(filter(None, (where, key))) or "the configuration"
    if key in options:
        subject = _option(key)
    if error["type"] == "extra_forbidden":
        takes = ", ".join(name for name in model.model_fields if name not in ("preset", "settings"))
        return f"unknown key {path[0]!r} in {where or 'the configuration'}; it takes {takes}"
    if error["type"] == "missing":
        return f"{subject} is missing; it must be {description}"
    return f"{subject} must be {description}, not {given!r}"


def _taken(annotation: Any) -> str:
    """Say what a type takes."""
    if annotation in (bool, float):
        return "true or false" if annotation is bool else "a number"
    literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return f"one of {', '.join(str(value) for literal in literals for value in get_args(literal))}"
