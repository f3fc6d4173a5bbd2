"""What `zsad-export` refuses, and how it ends when something stops it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from clip_checkpoints import write_clip
from pictures import touch_images

from zsad.bench.towers import Shape, write_random_checkpoint
from zsad.engine.commands import export
from zsad.engine.commands.export import main
from zsad.engine.commands.infer import main as infer
from zsad.export.options import ExportOptions
from zsad.export.vision_transformer import DINOV2


@pytest.fixture(autouse=True)
def cache(empty_cache: Path) -> Path:
    return empty_cache


@pytest.fixture
def command(random_dinov2: Callable[..., Path]) -> list[str]:
    """A command line that exports a tiny checkpoint."""
    return ["--checkpoint", str(random_dinov2()), "--taps", "0", "--image-size", "70"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.long
def test_interruption_is_one_line_and_leaves_nothing(command: list[str], cache: Path, name: str) -> None:
    code = (
        "import signal, sys\n"
        "from zsad.engine.commands import export as cli; from zsad.export import agreement\n"
        f"agreement.check_agreement = lambda *_: signal.raise_signal(signal.{name})\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "zsad-export: interrupted\n")
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 9.9 TiB"), "not enough memory (Unable to allocate 9.9 TiB)"),
        (RuntimeError("DefaultCPUAllocator:\ncan't allocate memory"), "(DefaultCPUAllocator: can't allocate memory)"),
    ],
)
def test_want_of_memory_is_one_line(
    command: list[str], error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("zsad.export.onnx_export.export_onnx", fail)
    assert main(command) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.endswith("take a smaller --image-size")


@pytest.mark.slow
def test_loudness(command: list[str], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for option in ("-q", "--image-size=70", "-v"):
        assert main([*command, option]) == 0
        printed = capsys.readouterr()
        [graph] = (cache / "models").glob("*.onnx")
        assert printed.out == f"{graph}\n"
        said[option] = printed.err.splitlines()
    assert said["-q"] == []
    assert said["--image-size=70"] == [f"zsad-export: {command[1]}: already built"]
    assert said["-v"][-1:] == said["--image-size=70"]
    assert f"{command[1]}: weights of {command[1]}, sha256 " in said["-v"][0]


def test_faults_of_the_program_are_not_hidden(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("zsad.export.onnx_export.export_onnx", fail)
    with pytest.raises(RuntimeError, match="something else"):
        main(command)


def test_a_damaged_checkpoint_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    assert main(["--checkpoint", str(damaged), "--taps", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"zsad-export: {damaged}: ")
    assert said.count(str(damaged)) == 1


def test_a_home_that_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "~nobody-here/a.pth", "--taps", "0", "--output", str(tmp_path / "a.onnx")]) == 2
    assert "'~nobody-here/a.pth' is neither a checkpoint file nor a name" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["onnx", "tensorrt-rtx"])
def test_outputs_that_would_destroy_something(
    command: list[str], target: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(command[1])
    content = checkpoint.read_bytes()
    for arguments, said in (
        ([*command, "--output", str(checkpoint)], f"{checkpoint} is what is to be read; name another file to write"),
        ([*command, "--output", str(tmp_path)], f"{tmp_path} is a folder; name a file"),
        (["--preset", "small", "--output", str(checkpoint)], f"{checkpoint} is not a folder"),
    ):
        assert main([*arguments, "--target", target]) == 2
        assert capsys.readouterr().err == f"zsad-export: {said}\n"
    assert checkpoint.read_bytes() == content
    assert not cache.exists()  # nothing was begun


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("small", ["dinov2-vits14"]),
        ("challenge", ["dinov2-vitl14", "clip-vitl14-336"]),
        ("winclip", ["clip-vitb16plus-240-e31", "clip-bpe"]),
        ("april-gan", ["clip-vitl14-336", "clip-bpe", "april-gan-visa"]),
        ("own head", ["clip-vitl14-336", "clip-bpe"]),
    ],
)
def test_a_preset_brings_all_that_it_reads(
    preset: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--preset", preset]
    if preset == "own head":
        (tmp_path / "own.toml").write_text('[april_gan]\nhead = "own.pth"\n')
        arguments = ["--preset", "april-gan", "--config", str(tmp_path / "own.toml")]
    fetched: list[str] = []

    def export(*_: object, **__: object) -> None:
        assert fetched == names  # before any work
        raise MemoryError

    monkeypatch.setattr("zsad.export.checkpoints.fetch_checkpoint", fetched.append)
    monkeypatch.setattr("zsad.export.onnx_export.export_onnx", export)
    assert main(arguments) == 2
    assert fetched == names


@pytest.mark.parametrize(("target", "suffix"), [("onnx", "fp32.onnx"), ("tensorrt-rtx", "fp16.engine")])
@pytest.mark.parametrize(
    ("preset", "names", "outputs"),
    [
        ("winclip", ["clip-240-", "clip-text-", "clip-240-few-shot-"], "embedding windows_2 windows_3 patches"),
        ("april-gan", ["clip-518-", "clip-text-"], "embedding tokens"),
        ("musc", ["clip-518-"], "tokens embedding"),
    ],
)
def test_a_preset_brings_the_graphs_for_known_good_images_too(
    preset: str, names: list[str], outputs: str, target: str, suffix: str
) -> None:
    parser = export._parser()
    jobs = export._jobs(parser, parser.parse_args(["--preset", preset, "--target", target, "--output", "here"]))
    assert [job.output for job in jobs] == [Path("here", name + suffix) for name in names]
    (largest,) = {
        job.options.outputs for job in jobs if set(getattr(job.options, "outputs", ())) == set(outputs.split())
    }
    assert largest == tuple(outputs.split())


@pytest.mark.parametrize(("given", "sizes"), [([], (518, True)), (["--image-size", "280"], (280, False))])
def test_a_preset_that_follows_the_images_is_made_for_one_size(given: list[str], sizes: tuple[int, bool]) -> None:
    parser = export._parser()
    (job,) = export._jobs(parser, parser.parse_args(["--preset", "small", *given]))
    assert isinstance(job.options, ExportOptions)
    assert (job.options.image_size, job.follows_images) == sizes


@pytest.mark.parametrize(
    ("patch", "given", "size", "said"),
    [(14, [], 518, True), (16, [], 512, True), (16, ["--image-size", "280"], 280, False)],
)
def test_a_preset_that_follows_the_images_is_made_of_whole_patches(
    patch: int,
    given: list[str],
    size: int,
    said: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tmp_path / "tower-518.safetensors"
    write_random_checkpoint(Shape(DINOV2, 64, 2, patch_size=patch, stored_grid=5), checkpoint, deviation=0.05)
    config = tmp_path / "tower.toml"
    config.write_text(f'[networks.dinov2]\ncheckpoint = "{checkpoint}"\ntaps = [0]\n')
    seen = []

    def exported(job: export.Job, output: Path | None, keep: bool) -> SimpleNamespace:
        seen.append((job.options.label, output))
        return SimpleNamespace(path=output)

    monkeypatch.setattr(export, "_export", exported)
    assert main(["--preset", "small", "--config", str(config), "--output", str(tmp_path), *given]) == 0
    assert seen == [(str(size), tmp_path / f"dinov2-{size}-fp32.onnx")]
    assert (f"this is for {size} px, --image-size for another" in capsys.readouterr().err) == said


@pytest.mark.long
def test_what_was_exported_is_what_runs_read(
    tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = write_clip(tmp_path, "clip_tiny")
    Path("tiny.toml").write_text(f'image_size = 96\n[networks.clip]\ncheckpoint = "{checkpoint}"\n')
    touch_images(tmp_path, "data/bolt/0.png", "good/0.png")
    preset = ["--preset", "winclip", "--config", "tiny.toml"]
    assert main(preset) == 0
    monkeypatch.setattr("zsad.export.builders.read_builder", None)
    assert infer(["data", *preset, "--device", "cpu", "--output", "zero"]) == 0
    assert infer(["data", *preset, "--device", "cpu", "--output", "few", "--reference", "good"]) == 0


PRESET = ["--preset", "small"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image-size", "0"], "--image-size must be from 1 to 4096 pixels, not 0"),
        (["--image-size", "14000"], "--image-size must be from 1 to 4096 pixels, not 14000"),
        (["--batch", "1,2,4"], "need --target tensorrt or tensorrt-rtx"),
        (["--device", "1"], "need --target tensorrt or tensorrt-rtx"),
        (["--compute-capability", "8.9"], "need --target tensorrt or tensorrt-rtx"),
        (["--strip-weights"], "need --target tensorrt or tensorrt-rtx"),
        (["--version-compatible"], "need --target tensorrt or tensorrt-rtx"),
        (["--hardware-compatible"], "need --target tensorrt or tensorrt-rtx"),
        ([*PRESET, "--activation", "gelu"], "a preset brings its own activation;"),
        ([*PRESET, "--heads", "6"], "a preset brings its own heads;"),
        ([*PRESET, "--preprocessing", "imagenet"], "a preset brings its own preprocessing;"),
        ([*PRESET, "--no-antialias"], "a preset brings its own antialias;"),
        ([*PRESET, "--no-embedding"], "a preset brings its own outputs;"),
        ([*PRESET, "--no-tokens"], "a preset brings its own outputs;"),
        ([*PRESET, "--outputs", "windows_2"], "a preset brings its own outputs;"),
        ([*PRESET, "--graph", "text"], "a preset brings its own graph;"),
        (["--graph", "text"], "--graph text: this graph has no image-size, taps; leave it out"),
    ],
)
def test_no_option_is_ignored(
    command: list[str], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments if arguments[: len(PRESET)] == PRESET else [*command, *arguments]
    with pytest.raises(SystemExit, match="2"):
        main(line)
    assert said in capsys.readouterr().err


def test_a_cache_that_may_only_be_read_gives_what_it_has(
    command: list[str], cache: Path, read_only: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    built = capsys.readouterr().out
    read_only(cache)
    assert main(command) == 0
    assert capsys.readouterr().out == built
    assert main([*command, "--precision", "fp16"]) == 2  # a graph that is gone when the command ends is of no use
    assert "cannot be written (Read-only file system); set ZSAD_CACHE" in capsys.readouterr().err
    assert main([*command, "--precision", "fp16", "--output", str(cache.parent / "graph.onnx")]) == 0
