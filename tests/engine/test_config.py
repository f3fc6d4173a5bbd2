"""Configuration: presets are complete, later values win, and every mistake is named with its file and key."""

from pathlib import Path
from typing import Any

import pytest

from zsad.engine.config import ConfigError, load_config, preset_names


def test_the_presets_are_complete_and_as_published() -> None:
    assert preset_names() == ["challenge", "musc", "small"]
    small, musc, challenge = (load_config(name) for name in ("small", "musc", "challenge"))
    assert musc.degrees == (1, 3, 5)
    assert musc.backbones["clip"].preprocessing == "clip"
    assert musc.backbones["clip"].taps == (5, 11, 17, 23)
    assert (musc.image_score.rule, musc.image_score.rscin) == ("map_maximum", (1, 2, 3))
    assert challenge.degrees == (1, 3)
    assert {name: backbone.preprocessing for name, backbone in challenge.backbones.items()} == {
        "dinov2": "imagenet",
        "clip": "imagenet",
    }
    assert (challenge.map.backbone, challenge.map.object_mask) == ("dinov2", True)
    assert (challenge.image_score.backbone, challenge.image_score.rule) == ("clip", "top_two")
    assert challenge.image_score.rscin == (1, 8, 9)
    assert {backbone.activation for backbone in (*musc.backbones.values(), *challenge.backbones.values())} == {"gelu"}
    assert small.backbones["dinov2"].taps == (5, 8)
    assert small.image_score.rscin == ()
    for config in (small, musc, challenge):
        assert config.image_size == 518
        assert config.interval == (0.0, 0.3)


def test_the_file_replaces_the_preset_and_the_command_line_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('degrees = [3]\nthreshold = "auto"\n[backbones.clip]\nheads = 2\n[map]\nobject_mask = false\n')
    config = load_config("challenge", file, {"degrees": (1, 5), "taps": (2, 4)})
    assert config.degrees == (1, 5)
    assert config.threshold == "auto"
    assert config.map.object_mask is False
    assert config.map.backbone == "dinov2"
    assert config.backbones["clip"].heads == 2
    assert {backbone.taps for backbone in config.backbones.values()} == {(2, 4)}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("degree = [1]", "'degree'"),
        ('preset = "musc"', "'preset'.*--preset"),
        ("[map]\nbackbones = 'clip'", r"'backbones' in \[map\]"),
        ("[backbones.dinov2]\ntap = [1]", r"'tap' in \[backbones.dinov2\]"),
        ("[backbones.other]\ntaps = [1]", r"\[backbones.other\].*checkpoint"),
        ("[backbones.dinov2]\ncheckpoint = 3", "checkpoint"),
        ("[backbones.dinov2]\ntaps = 5", "taps"),
        ("[backbones.dinov2]\ntaps = []", "taps"),
        ("[backbones.dinov2]\ntaps = [true]", "taps"),
        ("[backbones.dinov2]\nheads = 2.5", "heads"),
        ("[backbones.dinov2]\nactivation = 'relu'", "activation must be one of gelu, quick_gelu"),
        ("[backbones.dinov2]\npreprocessing = ['clip']", "preprocessing must be one of"),
        ("backbones = 3", r"\[backbones\] must hold one table"),
        ("backbones.dinov2 = 3", r"\[backbones.dinov2\] must be a table"),
        ("map = 'dinov2'", r"\[map\] must be a table"),
        ("[map]\nbackbone = 'clip'", r"\[map\] backbone must be one of dinov2"),
        ("[map]\nbackbone = [['dinov2']]", r"\[map\] backbone"),
        ("[map]\nbackbone = {name = 'dinov2'}", r"\[map\] backbone"),
        ("[map]\nobject_mask = 'yes'", r"\[map\] object_mask"),
        ("[image_score]\nrule = 'mean'", r"\[image_score\] rule must be one of"),
        ("[image_score]\nrscin = 3", r"\[image_score\] rscin"),
        ("[image_score]\nrscin = [0]", r"\[image_score\] rscin"),
        ("image_size = '518'", "image_size"),
        ("image_size = 100000", "image_size"),
        ("image_size = true", "image_size"),
        ("degrees = [2]", "degrees must be odd"),
        ("degrees = []", "degrees"),
        ("degrees = 3", "degrees"),
        ("interval = [0.3, 0.0]", "interval"),
        ("interval = [0.0, inf]", "interval"),
        ("interval = [nan, 1]", "interval"),
        ("interval = 0.3", "interval"),
        ("group_size = 1", "group_size must be at least 2"),
        ("threshold = 1.5", "threshold"),
        ("threshold = true", "threshold"),
        ("threshold = nan", "threshold"),
        ("threshold = 'high'", "threshold"),
        (f"threshold = {10**400}", "threshold"),
        ("seed = -1", "seed"),
        ("seed = 0.5", "seed"),
        ("degrees = [1", "cannot be read as TOML"),
        ("degrees = [1]\ndegrees = [3]", "cannot be read as TOML"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"(?s)mine.toml: .*{names}"):
        load_config("small", file)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.toml", "binary.toml", ""):
        with pytest.raises(ConfigError, match=f"{name or tmp_path.name}: cannot be read as TOML"):
            load_config("small", tmp_path / name)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"threshold": float("nan")}, "threshold"),
        ({"interval": (0.0, 0.3, 0.5)}, "interval"),
        ({"taps": (-1,)}, "taps"),
        ({"group_size": 0}, "group_size"),
        ({"seed": -3}, "seed"),
    ],
)
def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(
    tmp_path: Path, overrides: dict[str, Any], names: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("degrees = [1]")
    with pytest.raises(ConfigError, match=names) as caught:
        load_config("small", file, overrides)
    assert "mine.toml" not in str(caught.value)


def test_unknown_presets() -> None:
    with pytest.raises(ConfigError, match=r"no preset '\.\./small'; choose one of challenge, musc, small"):
        load_config("../small")
