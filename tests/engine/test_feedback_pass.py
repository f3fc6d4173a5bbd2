"""Feedback from the command line: files in, a bank that has learned, a log, and all of it taken back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from runs import draw

from zsad.engine.commands.infer import main
from zsad.engine.methods.bank_file import read_bank, read_header

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bank, the images that it was made from and others, made once."""
    folder = tmp_path_factory.mktemp("made")
    draw(folder / "good", 9)
    draw(folder / "new", 5)
    for number in range(4):  # a mark that no image of the bank has
        with Image.open(folder / f"new/{number:02d}.png") as image:
            ImageDraw.Draw(image).rectangle((10 * number, 10, 10 * number + 25, 40), (0, 0, 90 + 40 * number))
            image.save(folder / f"new/{number:02d}.png")
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSAD_CACHE", str(tiny / "cache"))
        patch.chdir(folder)
        options = ["--reference", "good", "--save-bank", "part.zsad", "--config", str(tiny / "config.toml")]
        assert main([*options, "--device", "cpu", "-q"]) == 0
    assert Path.cwd() == before
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that, where we are."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def tell(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Runs a command on the bank; returns its exit code, what it printed, and what it said."""

    def run(*options: str) -> tuple[int, Any, str]:
        try:
            code = main(["--bank", "part.zsad", "--device", "cpu", *options])
        except SystemExit as stop:
            code = stop.code  # type: ignore[assignment]
        printed, said = capsys.readouterr()
        return code, json.loads(printed) if "--json" in options and printed else printed, " ".join(said.split())

    return run


def score_of(name: str) -> tuple[float, str]:
    shutil.rmtree("out", ignore_errors=True)
    assert main(["new", "--bank", "part.zsad", "--device", "cpu", "-q"]) == 0
    images = json.loads(Path("out/new/category.json").read_text())["images"]
    return next((image["score"], image["verdict"]) for image in images if image["path"] == name)


@pytest.mark.slow
def test_a_false_alarm_is_accepted_and_taken_back(tell: Callable[..., tuple[int, Any, str]]) -> None:
    first, tensors = read_header(Path("part.zsad"))[1], read_bank(Path("part.zsad")).tensors
    before = score_of("00.png")
    assert before[1] == "reject"
    code, told, _ = tell("--accept", "new/00.png", "--json")
    (image,) = told["added"][0]["images"]
    assert code == 0
    assert (image["name"], len(image["sha256"])) == ("00.png", 64)
    assert image["before"] == pytest.approx(before[0], abs=1e-6)
    assert image["after"] == pytest.approx(score_of("00.png")[0], abs=1e-6)
    assert image["after"] < image["before"]
    assert told["threshold"]["rule"].startswith("at most 10 % of good images are rejected")
    code, log, _ = tell("--bank-log", "--json")
    assert (code, log["steps"]) == (0, told["added"])
    code, undone, _ = tell("--undo", "--json")
    assert (code, undone["removed"], undone["added"]) == (0, told["added"], [])
    assert undone["threshold"]["after"] == told["threshold"]["before"]
    assert read_header(Path("part.zsad"))[1] == first  # a digest of all of its content
    again = read_bank(Path("part.zsad")).tensors
    assert all(again[name].tobytes() == array.tobytes() for name, array in tensors.items())


@pytest.mark.slow
def test_a_missed_defect_is_rejected_where_its_mask_is(tell: Callable[..., tuple[int, Any, str]]) -> None:
    mask = Image.new("L", (97, 80))
    ImageDraw.Draw(mask).rectangle((10, 10, 60, 60), 255)
    Path("masks").mkdir()
    mask.save("masks/01_mask.png")
    before = score_of("01.png")[0]
    code, printed, said = tell("--reject", "new/01.png", "new/02.png", "--masks", "masks")
    assert code == 0
    assert "new/02.png: has no mask in --masks; its most unusual patches are taken" in said
    assert "2 rejected" in printed
    assert "→" in printed
    assert "rejected above" in printed
    assert score_of("01.png")[0] > before
    steps = read_header(Path("part.zsad"))[0].feedback
    assert [image.patches["dinov2"] > 1 for image in steps[0].images] == [True, False]


@pytest.mark.slow
def test_a_bank_of_tiles_learns_as_one_of_whole_images_does(
    tell: Callable[..., tuple[int, Any, str]], tiny: Path
) -> None:
    options = ["--reference", "good", "--save-bank", "part.zsad", "--config", str(tiny / "config.toml")]
    assert main([*options, "--tile", "50", "--device", "cpu", "-q"]) == 0  # 2 × 2 or 2 × 3 in each image
    first = read_header(Path("part.zsad"))[1]
    assert tell("--accept", "new/00.png", "-q")[0] == 0
    (accepted,) = read_header(Path("part.zsad"))[0].feedback[0].images
    assert accepted.after == pytest.approx(score_of("00.png")[0], abs=1e-6)
    assert accepted.after < accepted.before
    before = score_of("01.png")[0]
    mask = Image.new("L", (194, 160))  # twice as large
    ImageDraw.Draw(mask).rectangle((20, 20, 70, 80), 255)
    mask.save("01_mask.png")
    assert tell("--reject", "new/01.png", "new/02.png", "--masks", "01_mask.png", "-q")[0] == 0
    in_mask, without = read_header(Path("part.zsad"))[0].feedback[1].images
    assert in_mask.before == pytest.approx(before, abs=1e-6)
    assert in_mask.after == pytest.approx(score_of("01.png")[0], abs=1e-6)
    assert in_mask.after > in_mask.before
    assert without.patches["dinov2"] == 1  # as of one tile
    # The mark of 26 × 31 pixels lies in the first tile, of 50 pixels and 25 patches, and reaches into the next ones.
    assert 8 <= in_mask.patches["dinov2"] <= 30
    assert tell("--undo", "-q")[0] == tell("--undo", "-q")[0] == 0
    assert read_header(Path("part.zsad"))[1] == first


@pytest.mark.slow
def test_what_cannot_be_done_is_a_line_each_and_the_others_are_done(
    tell: Callable[..., tuple[int, Any, str]],
) -> None:
    Path("text.png").write_text("no image")
    shutil.copy("new/00.png", "copy.png")
    os.mkfifo("pipe.png")
    assert tell("--reject", "new/03.png")[0] == 0
    files = ["new/00.png", "copy.png", "new/01.png", "new/03.png", "good/02.png", "none.png", "text.png", "pipe.png"]
    code, told, said = tell("--accept", *files, "--reject", "new/01.png", "--json")
    assert code == 1
    assert [[image["name"] for image in step["images"]] for step in told["added"]] == [["00.png"]]
    reasons = {failure["path"]: failure["reason"] for failure in told["failures"]}
    assert reasons == {
        "copy.png": "the same image as new/00.png, which counts once",
        "new/01.png": "is to be accepted and to be rejected, so it is neither; decide on one",
        "new/03.png": "rejected already, in step 1, which --undo 1 takes back",
        "good/02.png": "the bank was made from it",
        "none.png": "cannot be read (there is no such file)",
        "pipe.png": "cannot be read (not a regular file)",
        "text.png": reasons["text.png"],
    }
    assert all(said.count(f"{path}: ") == 1 for path in reasons)
    before = Path("part.zsad").read_bytes()
    code, printed, _ = tell("--accept", "new/00.png")
    assert (code, "as before" in printed) == (1, True)
    assert Path("part.zsad").read_bytes() == before


@pytest.mark.slow
def test_masks_that_are_of_no_use_are_said(tell: Callable[..., tuple[int, Any, str]]) -> None:
    for folder in ("a", "b", "c"):
        Path(folder).mkdir()
    Image.new("L", (90, 80)).save("a/00_mask.png")
    Path("a/01.png").write_bytes(b"no image")
    for folder in ("b", "c"):
        Image.new("L", (90, 80)).save(f"{folder}/02.png")
    code, told, _ = tell("--reject", "new", "--masks", "a", "b", "c", "--json")
    reasons = {failure["path"]: failure["reason"] for failure in told["failures"]}
    assert code == 1
    assert reasons["new/00.png"] == "its mask a/00_mask.png is empty"
    assert reasons["new/01.png"].startswith("its mask a/01.png")
    assert reasons["new/02.png"] == "b/02.png and c/02.png may be its mask; name one of them in --masks"
    assert [image["name"] for image in told["added"][0]["images"]] == ["03.png", "04.png"]


def test_a_bank_is_not_lost_when_it_cannot_be_written(
    tell: Callable[..., tuple[int, Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path("part.zsad").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zsad.kernels.files.flush", full)
        assert tell("--accept", "new/00.png")[0] == 1
    assert Path("part.zsad").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == ["good", "new", "part.zsad"]


def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(
    tell: Callable[..., tuple[int, Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zsad.kernels.files.tempfile.TemporaryFile", refuse)
    code, _, said = tell("--accept", "new/00.png")
    assert code == 2
    assert "--bank part.zsad: cannot be written there (Permission denied); copy it" in said


def test_what_a_link_leads_to_learns(tell: Callable[..., tuple[int, Any, str]]) -> None:
    Path("banks").mkdir()
    Path("part.zsad").rename("banks/part.zsad")
    Path("part.zsad").symlink_to("banks/part.zsad")
    assert tell("--accept", "new/00.png")[0] == 0
    assert Path("part.zsad").is_symlink()
    assert len(read_header(Path("banks/part.zsad"))[0].feedback) == 1


def test_another_command_that_was_faster_is_noticed(
    tell: Callable[..., tuple[int, Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsad.engine.feedback_pass.read_header", lambda path: (None, str(os.urandom(4))))
    before = Path("part.zsad").read_bytes()
    code, _, said = tell("--accept", "new/00.png")
    assert code == 2
    assert "another command has changed the bank meanwhile" in said
    assert Path("part.zsad").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--undo"], "there is nothing to take back"),
        (["--undo", "0"], "from 1, not 0"),
        (["--undo", "--bank-log"], "--bank-log goes with no other"),
        (["--accept", "a.png", "--undo", "1"], "--undo goes with no other"),
        (["--masks", "m"], "give these too"),
        (["--accept", "a.png", "--masks", "m"], "give these too"),
        (["new", "--accept", "a.png"], "leave out new"),
        (["--bank-log", "--save-bank", "b.zsad"], "leave out --save-bank"),
        (["--bank", ".", "--bank-log"], "--bank .: is a folder; name the bank of one category"),
        (["--bank", "none.zsad", "--accept", "new/00.png"], "cannot be read"),
        (["--accept"], "expected at least one argument"),
    ],
)
def test_mistakes_are_said_before_any_work(
    tell: Callable[..., tuple[int, Any, str]], options: list[str], said: str
) -> None:
    before = Path("part.zsad").read_bytes()
    code, _, told = tell(*options)
    assert code == 2
    assert said in told
    assert Path("part.zsad").read_bytes() == before


def test_feedback_needs_a_bank(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--accept", "a.png"])
    assert "give --bank part.zsad too" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_that_there_is_not(tell: Callable[..., tuple[int, Any, str]]) -> None:
    tell("--accept", "new/00.png")
    tell("--accept", "new/01.png")
    code, _, said = tell("--undo", "5")
    assert code == 2
    assert "there is no step 5 to take back, but 1, 2" in said
    assert tell("--undo", "1")[0] == 0
    assert [step.number for step in read_header(Path("part.zsad"))[0].feedback] == [2]
    assert tell("--accept", "new/00.png")[0] == 0
    assert [step.number for step in read_header(Path("part.zsad"))[0].feedback] == [2, 3]
