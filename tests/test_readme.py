"""What the pages say is what runs, what there is, and what was measured."""

import json
import re
import sys
from pathlib import Path

import pytest

from zsad.bench import tables
from zsad.bench.towers import SHAPES
from zsad.engine.commands import evaluate, export, infer
from zsad.engine.config import load_config
from zsad.engine.methods.method import method_class
from zsad.engine.presets.names import preset_names
from zsad.export.checkpoints import read_manifest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "engine/README.md",
    "engine/cluster.md",
    "kernels/README.md",
    "export/README.md",
    "bench/README.md",
)
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = PAGES["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def helps(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What each command says to `--help`."""
    said = {}
    for command in (infer, evaluate, export):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        said[command.__name__.rpartition(".")[2]] = capsys.readouterr().out
    return said


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_continuous_integration_runs_the_test_command() -> None:
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python3 -m venv .*\[dev\].*$", run, flags=re.MULTILINE)
    assert command.endswith("/bin/pytest -n auto")
    command = command.replace('"$venv"', ".venv")
    assert f"```sh\n{command}\n```" in README


@pytest.mark.parametrize("name", NAMES)
def test_tables_come_from_the_committed_results(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(ROOT)
    assert tables.fill(PAGES[name]) == PAGES[name]
    assert ("<!-- table: " in PAGES[name]) == (Path(name) in tables.PAGES)


def test_every_table_is_on_a_page() -> None:
    shown = re.findall(r"<!-- table: (.*?) -->", "".join(PAGES.values()))
    assert sorted(shown) == sorted(tables.TABLES)


# The changelog also names what is gone, the page of the benchmarks their own options.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("CHANGELOG.md", "bench/README.md")])
def test_every_option_it_names_exists(helps: dict[str, str], name: str) -> None:
    known = "".join(helps.values())
    for option in set(re.findall(r"`(--[a-z-]+)", prose(PAGES[name]))):
        assert re.search(rf"{option}(?![a-z-])", known), option


@pytest.mark.parametrize(("command", "name"), [("infer", "engine"), ("evaluate", "engine"), ("export", "export")])
def test_every_option_is_described(helps: dict[str, str], command: str, name: str) -> None:
    options = set(re.findall(r"(--[a-z][a-z-]+)", helps[command])) - {"--help", "--quiet", "--verbose"}
    described = set(re.findall(r"(--[a-z][a-z-]+)", PAGES[f"{name}/README.md"]))
    assert options <= described, options - described


def test_every_preset_is_described() -> None:
    for preset in preset_names():
        assert f"| `{preset}`" in PAGES["engine/README.md"]


def test_the_configurations_it_shows_are_accepted(tmp_path: Path) -> None:
    shown = re.findall(r"```toml\n(.*?)```", PAGES["engine/README.md"], flags=re.DOTALL)
    shown = [text for text in shown if "[networks.dinov2]" in text]
    assert len(shown) == 2
    for text in shown:
        (tmp_path / "own.toml").write_text(text)
        load_config("small", tmp_path / "own.toml", method_of=method_class)
        # The alternatives in comments too.
        for name, taps in re.findall(r'^(?:# )?checkpoint = "(.*?)".*\n(?:# )?taps = (.*)$', text, flags=re.MULTILINE):
            assert name in read_manifest()
            assert json.loads(taps)[-1] < SHAPES[name].depth


def test_every_extra_it_installs_exists() -> None:
    extras = set(PROJECT["optional-dependencies"])
    named = re.findall(r"(?:\"\.|'zsad)\[([a-z,-]+)\]", "".join(PAGES.values()))
    assert {"cpu", "gpu", "gpu,tensorrt", "gpu,tensorrt-rtx", "dev"} <= set(named)
    for name in named:
        assert set(name.split(",")) <= extras, name


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(PAGES[name])):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (.*)$", PAGES["CHANGELOG.md"], flags=re.MULTILINE)
    first = headings[headings[0] == "Unreleased"]  # what came after this version stands above it
    assert re.fullmatch(rf"\[{re.escape(PROJECT['version'])}\] - \d{{4}}-\d\d-\d\d", first), first
