"""Prompt sets are the references' lists, in their order; mistakes in files of prompts are named with file and key."""

import json
from pathlib import Path

import numpy as np
import pytest

from zsad.engine.config import ConfigError
from zsad.engine.text.prompts import PromptSet, prompt_set, read_prompts, set_names

COUNTS = {
    "anomalib21": (147, 84),
    "april35": (245, 175),
    "paper22": (154, 88),
    "paper22_noperiod": (154, 88),
    "vvv": (418, 506),
}


def test_there_are_as_many_prompts_as_published() -> None:
    assert set_names() == sorted(COUNTS)
    for name, counts in COUNTS.items():
        normal, abnormal = prompt_set(name).compose("bottle")
        assert (len(normal), len(abnormal)) == counts
        assert all("bottle" in prompt and "{" not in prompt for prompt in normal + abnormal)
    assert len(prompt_set("vvv").localising) == 19
    assert prompt_set("vvv").localising.count("an error") == 2
    assert prompt_set("anomalib21").templates.count("a jpeg corrupted photo of the {}.") == 2


def test_states_are_outside_and_templates_inside() -> None:
    prompts = PromptSet("two", ("{}", "good {}"), ("{} with flaw",), ("a {}.", "the {}."))
    assert prompts.compose("nut") == (
        ["a nut.", "the nut.", "a good nut.", "the good nut."],
        ["a nut with flaw.", "the nut with flaw."],
    )


@pytest.mark.parametrize("name", ["{}", "{0}", "}{", "{{x}}", "a{}b{}", "%s"])
def test_names_may_have_braces(name: str) -> None:
    prompts = PromptSet("one", ("good {}",), ("{} without {}",), ("a {}.",))
    assert prompts.compose(name) == ([f"a good {name}."], [f"a {name} without {name}."])


@pytest.mark.slow
def test_the_lists_are_those_of_the_references(golden_text: Path) -> None:
    arrays = np.load(golden_text / "tokens_prompts.npz")
    texts = json.loads(bytes(arrays["prompts_json"]))
    names = json.loads(bytes(arrays["list_names_json"]))
    bounds = arrays["list_offsets"]
    assert len(names) == 271
    for name, first, last in zip(names, bounds[:-1], bounds[1:], strict=True):
        expected = [texts[index] for index in arrays["list_index"][first:last]]
        if name == "local/all":
            assert list(prompt_set("vvv").localising) == expected
            continue
        prompts, object_name, label = name.split("/")
        assert prompt_set(prompts).compose(object_name)[label == "abnormal"] == expected, name


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, 'normal = ["{} ohne Mängel"]\nabnormal = ["rust", "bent {}"]\ntemplates = ["{}", "the {}!"]')
    prompts = read_prompts(path)
    assert prompts.name == "mine.toml"
    assert prompts.compose("nut") == (
        ["nut ohne Mängel", "the nut ohne Mängel!"],
        ["rust", "the rust!", "bent nut", "the bent nut!"],
    )


def test_templates_may_be_those_of_a_set(tmp_path: Path) -> None:
    states = 'normal = ["{}"]\nabnormal = ["bad {}"]\n'
    assert read_prompts(write(tmp_path, states)).templates == prompt_set("paper22").templates
    assert read_prompts(write(tmp_path, states + 'templates = "april35"')).templates == prompt_set("april35").templates


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "normal is missing; it must be a list of one or more texts, none of them empty"),
        ('normal = ["{}"]', "abnormal is missing"),
        (
            'normal = "{}"\nabnormal = ["bad {}"]',
            "normal must be a list of one or more texts, none of them empty, not '{}'",
        ),
        ('normal = []\nabnormal = ["bad {}"]', "normal must be a list .*, not ()"),
        ('normal = ["{}", "  "]\nabnormal = ["bad {}"]', "normal must be a list .*, not ('{}', '  ')"),
        ('normal = ["{}"]\nabnormal = [3]', "abnormal must be a list .*, not (3,)"),
        ('normal = ["{}"]\nabnormal = ["bad {}"]\ntemplates = []', "templates must be the name of .*, not ()"),
        ('normal = ["{}"]\nabnormal = ["bad {}"]\ntemplates = ["a photo"]', "with {} in each, not ('a photo',)"),
        (
            'normal = ["{}"]\nabnormal = ["bad {}"]\ntemplates = "paper"',
            "there is no prompt set 'paper'; choose one of anomalib21, april35, paper22, paper22_noperiod, vvv",
        ),
        (
            'normal = ["{}"]\nabnormal = ["bad {}"]\ntemplate = ["{}"]',
            "unknown key 'template' in the configuration; it takes normal, abnormal, templates",
        ),
        ("normal", "cannot be read as TOML"),
    ],
)
def test_mistakes_are_named_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    first, _, last = said.partition(".*")
    assert first in message
    assert last in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes('normal = ["Mängel"]'.encode("latin-1"))
    for bad in (path, tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(ConfigError, match="cannot be read as TOML") as caught:
            read_prompts(bad)
        assert str(bad) in str(caught.value)


def test_unknown_sets_are_named() -> None:
    with pytest.raises(ConfigError, match="there is no prompt set 'paper'; choose one of anomalib21, april35"):
        prompt_set("paper")
