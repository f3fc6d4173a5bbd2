"""The README's commands and tables are what runs and what was measured."""

import re
from pathlib import Path

import pytest

from zsad.bench import tables
from zsad.engine.commands import evaluate, export, infer
from zsad.engine.config import load_config, preset_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_continuous_integration_runs_the_test_command() -> None:
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert "pytest" in last
    assert f"```sh\n{last}\n```" in README


def test_tables_come_from_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert tables.fill(README) == README
    for name in tables.TABLES:
        assert f"<!-- table: {name} -->" in README


def test_every_option_it_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    helps = ""
    for command in (infer.main, evaluate.main, export.main):
        with pytest.raises(SystemExit):
            command(["--help"])
        helps += capsys.readouterr().out
    own = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for option in set(re.findall(r"`(--[a-z-]+)", own)):
        assert option in helps, option


def test_every_preset_is_described_and_loads() -> None:
    for preset in preset_names():
        assert f"| `{preset}`" in README
        assert load_config(preset).backbones


def test_every_file_it_links_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+?)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
