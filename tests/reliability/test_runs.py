"""Whole runs: killed, starved, doubled, varied or among damaged files, their results are right, or a line says why."""

import csv
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from corruption import corrupted, images
from runs import draw

from zsad.engine.commands.infer import main

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("workplace")]

RUNS = int(os.environ.get("ZSAD_RUNS", "2"))  # of each test with a random choice
MEGABYTES = int(os.environ.get("ZSAD_MEGABYTES", "500"))  # between the limits of memory
SEED = int(os.environ.get("ZSAD_SEED", "0"))
IMAGES = 24
DAMAGED = 50  # files in a round
SECONDS = 120  # after which a run hangs
TABLES = ("scores.csv", "regions.csv")


def draw_data(folder: Path) -> None:
    """Draw the same images each time, in two categories."""
    for name in ("bolt", "nut"):
        draw(folder / "data" / name, IMAGES // 2)


def words(tiny: Path) -> list[str]:
    """Return the arguments of a run over a small network."""
    runtime = ["--device", "cpu", "--runtime", "onnxruntime"]  # else each process would find out which is faster
    return ["data", "--config", str(tiny / "config.toml"), *runtime, "--threshold", "auto", "-q"]


@pytest.fixture
def arguments(tiny: Path, tmp_path: Path) -> list[str]:
    """Those, beside a folder `data`."""
    draw_data(tmp_path)
    return words(tiny)


@pytest.fixture
def command(arguments: list[str]) -> list[str]:
    """That run as a process of its own."""
    start = [sys.executable, "-c", "import sys; from zsad.engine.commands.start import infer; sys.exit(infer())"]
    return [*start, *arguments]


def run(command: list[str], *options: str, megabytes: int | None = None) -> subprocess.CompletedProcess[str]:
    limits = None
    if megabytes is not None:
        limits = partial(resource.setrlimit, resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, timeout=SECONDS, preexec_fn=limits
    )


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing befalls."""
    folder = tmp_path_factory.mktemp("whole")
    draw_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSAD_CACHE", str(tiny / "cache"))
        patch.delenv("ZSAD_WEIGHTS", raising=False)
        patch.chdir(folder)
        assert main([*words(tiny), "--output", "whole"]) == 0
    return folder / "whole"


def results(output: Path) -> dict[str, str]:
    """Return digests of the tables, maps and overlays in an output folder; nothing hidden may be left in it."""
    files = [path for path in output.rglob("*") if path.is_file()]
    left = [path for path in files if path.relative_to(output).parts[0].startswith(".") and "lock" not in path.name]
    assert not left
    kept = (path for path in files if path.name in TABLES or path.suffix in (".tiff", ".jpg"))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def test_killed_runs_go_on_to_the_same_results(command: list[str], tmp_path: Path, whole: Path) -> None:
    rng = random.Random(SEED)
    for _ in range(RUNS):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for _ in range(rng.randrange(1, 4)):
            with subprocess.Popen([*command, "--output", "out", "--resume"], stderr=subprocess.DEVNULL) as process:
                try:
                    process.wait(rng.uniform(0.2, 2.5))
                except subprocess.TimeoutExpired:
                    process.send_signal(rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
                    assert process.wait(SECONDS) in (0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
        ended = run(command, "--output", "out", "--resume")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert results(tmp_path / "out") == results(whole)


@pytest.mark.parametrize("megabytes", range(300, 2100, MEGABYTES))
def test_a_limit_of_memory_ends_in_the_same_results_or_in_a_line(
    command: list[str], tmp_path: Path, whole: Path, megabytes: int
) -> None:
    ended = run(command, "--output", "out", megabytes=megabytes)
    if ended.returncode == 0:
        assert ended.stderr == ""
        assert results(tmp_path / "out") == results(whole)
    else:
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.startswith("zsad-infer: too little memory")
        assert ended.stderr.count("\n") == 1, ended.stderr


def test_of_two_runs_into_one_output_each_is_whole_or_refused(command: list[str], tmp_path: Path, whole: Path) -> None:
    rng = random.Random(SEED)
    for _ in range(RUNS):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        first = subprocess.Popen([*command, "--output", "out"], stderr=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            first.wait(rng.uniform(0, 0.5))
        second = run(command, "--output", "out")
        _, said = first.communicate(timeout=SECONDS)
        codes = sorted((first.returncode, second.returncode))
        assert codes in ([0, 0], [0, 2]), said + second.stderr
        assert results(tmp_path / "out") == results(whole)


@pytest.mark.parametrize(
    "options",
    [
        ("--workers", "1"),
        ("--workers", "7"),
        ("--batch-size", "5", "--workers", "3"),
        ("--memory-limit", "40MB"),
    ],
)
def test_how_the_work_is_dealt_changes_no_byte(
    arguments: list[str], tmp_path: Path, whole: Path, options: tuple[str, ...]
) -> None:
    """Of networks on a CPU the batch size may change the last bits: ONNX Runtime chooses other kernels for it."""
    plain = whole
    if options[0] == "--batch-size":
        plain = tmp_path / "plain"
        assert main([*arguments, "--output", "plain", *options[:2]]) == 0
    assert main([*arguments, "--output", "other", *options]) == 0
    assert results(tmp_path / "other") == results(plain)


def test_random_variations_change_no_byte(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among them the order in which the files were made."""
    rng, plain = random.Random(SEED), dict[str, dict[str, str]]()
    files = {path: path.read_bytes() for path in sorted((tmp_path / "data").rglob("*.png"))}
    for _ in range(RUNS):
        batch = str(rng.choice((1, 2, 3, 8)))
        for output, options in {
            **({} if batch in plain else {"plain": []}),
            "other": [
                *("--workers", str(rng.randrange(1, 9))),
                *rng.choice(([], ["--memory-limit", "40MB"], ["--memory-limit", "1GB"])),
            ],
        }.items():
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            assert main([*arguments, "--output", "out", "--batch-size", batch, *options]) == 0
            assert capsys.readouterr().err == ""
            found = results(tmp_path / "out")
            assert found == plain.setdefault(batch, found), (output, batch, options)
            shutil.rmtree(tmp_path / "data")
            for path in rng.sample(list(files), len(files)):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files[path])


def scores(output: Path) -> dict[tuple[str, str], float]:
    """Return the methods' own scores by category and image."""
    found = {}
    for table in output.glob("*/scores.csv"):
        with table.open(newline="") as file:
            found |= {(table.parent.name, row["path"]): float(row["raw_score"]) for row in csv.DictReader(file)}
    return found


def test_other_names_change_scores_by_a_millionth_at_most(arguments: list[str], tmp_path: Path, whole: Path) -> None:
    """Sums in another order round otherwise."""
    expected, rng = scores(whole), random.Random(SEED)
    for _ in range(RUNS):
        names = {}
        for folder in (tmp_path / "data").iterdir():
            files = sorted(folder.iterdir())
            for place, file in zip(rng.sample(range(len(files)), len(files)), files, strict=True):
                names[folder.name, f"{place:03d}.png"] = (folder.name, file.name)
        shutil.rmtree(tmp_path / "renamed", ignore_errors=True)
        for (category, new), (_, old) in names.items():
            (tmp_path / "renamed" / category).mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "data" / category / old, tmp_path / "renamed" / category / new)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert main(["renamed", *arguments[1:], "--output", "out"]) == 0
        for name, score in scores(tmp_path / "out").items():
            assert score == pytest.approx(expected[names[name]], abs=1.1e-6)  # the table has six digits


def test_among_damaged_files_every_good_image_is_scored(command: list[str], tmp_path: Path) -> None:
    good = {(path.parent.name, path.name) for path in (tmp_path / "data").rglob("*.png")}
    undamaged = list(images().items())
    for number in range(RUNS):
        rng = random.Random(f"{SEED} {number}")
        for old in (tmp_path / "data").rglob("damaged-*"):
            old.unlink()
        for index in range(DAMAGED):
            name, content = rng.choice(undamaged)
            (tmp_path / "data" / "bolt" / f"damaged-{index:03d}{Path(name).suffix}").write_bytes(
                corrupted(content, rng)
            )
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ended = run(command, "--output", "out")
        assert ended.returncode in (0, 1), f"round {number}: {ended.stderr}"
        assert all(line.startswith("zsad-infer: bolt/damaged-") for line in ended.stderr.splitlines()), ended.stderr
        assert good <= scores(tmp_path / "out").keys(), f"round {number}"
