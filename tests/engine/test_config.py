"""Configuration: presets are complete, later values win, and every mistake is named with its file and key."""

import os
from pathlib import Path
from typing import Any

import pytest

from zsad.engine.config import Config, ConfigError, load_config
from zsad.engine.methods.method import method_class
from zsad.engine.presets.names import preset_names
from zsad.engine.text.prompts import read_prompts


def load(preset: str, file: Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    return load_config(preset, file, overrides, method_of=method_class)


def test_the_presets_are_complete_and_as_published() -> None:
    assert preset_names() == ["april-gan", "challenge", "musc", "small", "vvv", "winclip"]
    small, musc, challenge = (load(name) for name in ("small", "musc", "challenge"))
    assert musc.settings.degrees == (1, 3, 5)
    assert musc.networks["clip"].preprocessing == "clip"
    assert musc.networks["clip"].taps == (5, 11, 17, 23)
    assert (musc.settings.image_rule, musc.settings.rscin) == ("map_maximum", (1, 2, 3))
    assert challenge.settings.degrees == (1, 3)
    assert {name: network.preprocessing for name, network in challenge.networks.items()} == {
        "dinov2": "imagenet",
        "clip": "imagenet",
    }
    assert (challenge.settings.map_network, challenge.foreground) == ("dinov2", "colour")
    assert (challenge.settings.image_network, challenge.settings.image_rule) == ("clip", "top_two")
    assert challenge.settings.rscin == (1, 8, 9)
    assert {network.activation for network in (*musc.networks.values(), *challenge.networks.values())} == {"gelu"}
    assert small.networks["dinov2"].taps == (5, 8)
    assert small.settings.rscin == ()
    assert [config.image_size for config in (small, musc, challenge)] == ["auto", 518, 518]
    for config in (small, musc, challenge):
        assert config.settings.interval == (0.0, 0.3)


def test_the_text_guided_presets_are_as_published() -> None:
    april, winclip = load("april-gan"), load("winclip")
    assert (april.image_size, april.networks["clip"].taps) == (518, (5, 11, 17, 23))
    assert (winclip.image_size, winclip.settings.tau, winclip.settings.prompt_name) == (240, 0.07, "anomalib21")
    assert load("winclip", overrides={"variant": "paper"}).settings.prompt_name == "paper22"
    for config in (april, winclip):
        network = config.networks["clip"]
        assert (network.activation, network.antialias, network.preprocessing) == ("gelu", True, "clip")


def test_a_size_follows_from_the_images_only_where_they_are_compared(tmp_path: Path) -> None:
    assert load("musc", overrides={"image_size": "auto"}).unsized == ["clip"]
    with pytest.raises(ConfigError, match=r"method winclip judges every image by itself.*give --image-size a number"):
        load("winclip", overrides={"image_size": "auto"})
    file = tmp_path / "mine.toml"
    file.write_text("[stages.sam]\nimage_size = 'auto'\n")
    with pytest.raises(ConfigError, match=r"\[stages.sam\] image_size must be a number of pixels.*not 'auto'"):
        load("small", file)
    file.write_text("[networks.dinov2]\nimage_size = 280\n")
    small = load("small", file)
    assert (small.unsized, small.networks["dinov2"].side, small.sized({}).image_size) == ([], 280, "auto")
    file.write_text("image_size = 'auto'\n[networks.clip]\nimage_size = 336\n")
    challenge = load("challenge", file)
    assert challenge.unsized == ["dinov2"]
    sized = challenge.sized({"dinov2": 280})
    assert (sized.image_size, {name: spec.side for name, spec in sized.networks.items()}) == (
        280,
        {"dinov2": 280, "clip": 336},
    )
    assert load("small", overrides={"image_size": 448}).networks["dinov2"].image_size == 448


def test_components_need_scores_that_depend_on_no_other_image(tmp_path: Path) -> None:
    few = {"components": True, "reference": "good"}
    assert load("april-gan", overrides={"components": True}).components
    with pytest.raises(ConfigError, match="--components: with known-good images scores depend on other images"):
        load("april-gan", overrides=few)
    file = tmp_path / "mine.toml"
    file.write_text('[april_gan]\nminmax_scope = "off"\n')
    assert load("april-gan", file, few).components
    file.write_text('[winclip]\nresize = "shortest_crop"\n')
    assert load("winclip", file).settings.resize == "shortest_crop"
    with pytest.raises(ConfigError, match=r"tiles are to be seen whole; leave out resize in \[winclip\]"):
        load("winclip", file, {"components": True})


def test_methods_without_use_for_references_refuse_them() -> None:
    with pytest.raises(ConfigError, match="method vvv makes no use of known-good images; leave out --reference"):
        load("vvv", overrides={"reference": "good"})
    assert load("small", overrides={"reference": "good"}).few_shot


def test_the_file_replaces_the_preset_and_the_command_line_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('threshold = "auto"\nforeground = "none"\n[networks.clip]\nheads = 2\n[musc]\ndegrees = [3]\n')
    config = load("challenge", file, {"degrees": (1, 5), "taps": (2, 4)})
    assert config.settings.degrees == (1, 5)
    assert config.threshold == "auto"
    assert config.foreground == "none"
    assert config.settings.map_network == "dinov2"
    assert config.networks["clip"].heads == 2
    assert {network.taps for network in config.networks.values()} == {(2, 4)}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[musc]\ndegree = [1]", "'degree'"),
        ('preset = "musc"', "'preset'.*--preset"),
        ("[musc]\nnetwork = 'clip'", r"'network' in \[musc\]; it takes degrees, interval"),
        ("method = 'patchcore'", "no method 'patchcore'; choose one of musc"),
        ("method = 3", "method must be the name of a method, not 3"),
        ("[networks.dinov2]\ntap = [1]", r"'tap' in \[networks.dinov2\]"),
        ("[networks.other]\ntaps = [1]", r"\[networks.other\].*checkpoint"),
        ("[networks.dinov2]\ncheckpoint = 3", "checkpoint"),
        ("[networks.dinov2]\ntaps = 5", "taps"),
        ("[networks.dinov2]\ntaps = []", "taps"),
        ("[networks.dinov2]\ntaps = [true]", "taps"),
        ("[networks.dinov2]\nheads = 2.5", "heads"),
        ("[networks.dinov2]\nactivation = 'relu'", "activation must be one of gelu, quick_gelu"),
        ("[networks.dinov2]\npreprocessing = ['clip']", "preprocessing must be one of"),
        ("networks = 3", r"\[networks\] must hold one table"),
        ("networks.dinov2 = 3", r"\[networks.dinov2\] must be a table"),
        ("musc = 'dinov2'", r"\[musc\] must be a table"),
        ("[settings]\ndegrees = [1]", r"the method's own settings are in \[musc\]"),
        ("[musc]\nmap_network = 'clip'", r"\[musc\] map_network must be one of dinov2"),
        ("[musc]\nmap_network = [['dinov2']]", r"\[musc\] map_network"),
        ("[musc]\nmap_network = {name = 'dinov2'}", r"\[musc\] map_network"),
        ("[stages.tiles]\nmin_side = 0", r"\[stages.tiles\] min_side must be a number of pixels from 1, not 0"),
        ("[stages.tiles]\nflush = 1", r"\[stages.tiles\] flush must be true or false, not 1"),
        ("[stages.masks]\nfoo = 1", r"unknown key 'foo' in \[stages.masks\]; it takes points_per_side"),
        ("[stages.isnet]\nimage_size = 0", r"\[stages.isnet\] image_size must be a number of pixels"),
        ("foreground = 'yes'", "foreground must be one of none, colour, isnet, isnet\\+sam, not 'yes'"),
        ("[musc]\nimage_rule = 'mean'", r"\[musc\] image_rule must be one of"),
        ("[musc]\nrscin = 3", r"\[musc\] rscin"),
        ("[musc]\nrscin = [0]", r"\[musc\] rscin"),
        ("image_size = '518'", "image_size"),
        ("image_size = 100000", "image_size"),
        ("image_size = true", "image_size"),
        ("[musc]\ndegrees = [2]", "degrees must be odd"),
        ("[musc]\ndegrees = []", "degrees"),
        ("[musc]\ndegrees = 3", "degrees"),
        ("[musc]\ninterval = [0.3, 0.0]", "interval"),
        ("[musc]\ninterval = [0.0, inf]", "interval"),
        ("[musc]\ninterval = [nan, 1]", "interval"),
        ("[musc]\ninterval = 0.3", "interval"),
        ("group_size = 1", "group_size must be at least 2"),
        ("threshold = 1.5", "threshold"),
        ("threshold = true", "threshold"),
        ("threshold = nan", "threshold"),
        ("threshold = 'high'", "threshold"),
        (f"threshold = {10**400}", "threshold"),
        ("seed = -1", "seed"),
        ("seed = 0.5", "seed"),
        ("components = true", "--components: scores of method musc depend on other images; leave it out"),
        ("foreground = 'isnet'\ndecoder = 'nvimgcodec'", "--decoder nvimgcodec leaves no image"),
        ("stages = 3", r"\[stages\] must be a table, not 3"),
        ("[stages]\nisnet = 'isnet-general-use'", r"\[stages.isnet\] must be a table, not 'isnet-general-use'"),
        ("[stages.tile]\nmin_side = 3", r"'tile' in \[stages\]; it takes isnet, sam, foreground, masks, tiles"),
        ("[stages.tiles]\nside = 3", r"'side' in \[stages.tiles\]; it takes min_component, min_side"),
        ("[stages.tiles]\nstep = nan", r"\[stages.tiles\] step must be above 0, not nan"),
        ("[stages.tiles]\npad = 'mirror'", r"\[stages.tiles\] pad must be one of clamp, reflect, not 'mirror'"),
        ("[stages.foreground]\ncoverage = 2", r"\[stages.foreground\] coverage must be a number in \[0, 1\], not 2"),
        ("[stages.sam]\nhead = 4", r"'head' in \[stages.sam\]; it takes checkpoint"),
        ("[musc]\ndegrees = [1", "cannot be read as TOML"),
        ("[musc]\ndegrees = [1]\ndegrees = [3]", "cannot be read as TOML"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"(?s)mine.toml: .*{names}"):
        load("small", file)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.toml", "binary.toml", ""):
        with pytest.raises(ConfigError, match=f"{name or tmp_path.name}: cannot be read as TOML"):
            load("small", tmp_path / name)


@pytest.mark.parametrize("text", ["a = " + "[" * 1000 + "]" * 1000, f"[{'.'.join(['a'] * 1000)}]"])
def test_files_nested_too_deep(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"deep.toml: cannot be read as TOML \(nested too deep\)"):
        load("small", tmp_path / "deep.toml")


@pytest.mark.parametrize(("name", "reason"), [("pipe.toml", "not a regular file"), ("/dev/zero", "not a"), (".", "a")])
def test_what_is_no_file(tmp_path: Path, name: str, reason: str) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match=rf"cannot be read as TOML \({reason}"):
        load("small", tmp_path / name)
    with pytest.raises(ConfigError, match=rf"cannot be read as TOML \({reason}"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"threshold": float("nan")}, "--threshold must be"),
        ({"interval": (0.0, 0.3, 0.5)}, "--interval must be"),
        ({"taps": (-1,)}, "--taps must be"),
        ({"group_size": 0}, "--group-size must be"),
        ({"seed": -3}, "--seed must be"),
    ],
)
def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(
    tmp_path: Path, overrides: dict[str, Any], names: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[musc]\ndegrees = [1]")
    with pytest.raises(ConfigError, match=names) as caught:
        load("small", file, overrides)
    assert "mine.toml" not in str(caught.value)


def test_unknown_presets() -> None:
    with pytest.raises(
        ConfigError, match=r"no preset '\.\./small'; choose one of april-gan, challenge, musc, small, vvv, winclip"
    ):
        load("../small")


def test_a_network_of_a_stage_keeps_what_a_file_does_not_replace(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[stages.isnet]\ncheckpoint = "mine.onnx"\n[stages]\nsam = {heads = 4}\ntiles = {min_side = 100}\n')
    stages = load("vvv", file).stages
    assert (stages.isnet.checkpoint, stages.isnet.image_size) == ("mine.onnx", 1024)
    assert (stages.sam.checkpoint, stages.sam.heads, stages.tiles.min_side) == ("sam-vitb", 4, 100)
    assert load("vvv").stages.tiles.min_side == 352
