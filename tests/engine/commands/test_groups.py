"""Runs in groups: one that dies goes on after the groups that have ended, to the results of one that did not die."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import draw, scores_and_maps

from zsad.engine import category_pass
from zsad.engine.commands.infer import main
from zsad.engine.methods.bitmasks import Box, pack
from zsad.engine.methods.foreground import Stages
from zsad.engine.methods.method import Scored
from zsad.engine.methods.musc import MuSc
from zsad.engine.results.category import CategoryWriter
from zsad.engine.results.groups import EndedGroups, GroupFacts


@pytest.fixture(autouse=True)
def _workplace(workplace: None) -> None:
    """Every test here runs the tiny network in a folder of its own."""


@pytest.fixture
def infer(tiny: Path) -> Callable[..., int]:
    return lambda *arguments: main([*map(str, arguments), "--config", str(tiny / "config.toml"), "-q"])


class Died(BaseException):
    """As if the process was killed there."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of groups whose images went through the networks, one for each batch."""
    numbers: list[int] = []
    take = MuSc.take

    def noted(self: MuSc, batch: Any) -> Any:
        numbers.append(self._group.number)
        return take(self, batch)

    monkeypatch.setattr(MuSc, "take", noted)
    return numbers


def content(output: str) -> dict[str, bytes]:
    """All that is written of a category; of its record what does not tell of time."""
    folder = Path(output) / "data"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(found.pop("category.json"))
    return {**found, "record": json.dumps({key: value for key, value in record.items() if key != "seconds"}).encode()}


def die_in_group(patch: pytest.MonkeyPatch, number: int) -> None:
    finish = MuSc.finish

    def dying(self: MuSc, progress: Any) -> Any:
        if self._group.number == number:
            raise Died
        return finish(self, progress)

    patch.setattr(MuSc, "finish", dying)


def die_while_writing(patch: pytest.MonkeyPatch) -> None:
    def dying(self: CategoryWriter, result: Any) -> None:
        raise Died

    patch.setattr(CategoryWriter, "write", dying)


@pytest.mark.parametrize("known_good", [0, 12])
@pytest.mark.parametrize("moment", ["in the last group", "while writing"])
@pytest.mark.slow
def test_a_run_that_died_goes_on_after_the_groups_that_have_ended(
    infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[int], moment: str, known_good: int
) -> None:
    data, options = draw(tmp_path / "data", 13), ["--group-size", 5, "--references", "blended"]
    shutil.copy(data / "03.png", data / "copy.png")
    (data / "broken.png").write_bytes(b"no image")
    if known_good:
        good = draw(tmp_path / "good", known_good + 1)
        (good / f"{known_good:02d}.png").unlink()
        for number, path in enumerate(sorted(good.iterdir())):  # none of those to be scored
            Image.fromarray(255 - np.asarray(Image.open(path)) // (number + 2)).save(path)
        options += ["--reference", good]
    assert infer(data, "--output", "whole", *options) == 1
    assert sorted(set(taken)) == [0, 1, 2]
    taken.clear()
    with monkeypatch.context() as patch:
        die_in_group(patch, 2) if moment == "in the last group" else die_while_writing(patch)
        with pytest.raises(Died):
            infer(data, *options)
    taken.clear()
    assert infer(data, "--resume", *options) == 1
    assert set(taken) == ({2} if moment == "in the last group" else set())
    assert content("out") == content("whole")
    assert not list(Path("out").glob(".*"))


@pytest.mark.slow
def test_other_settings_and_runs_without_resume_begin_anew(
    infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[int]
) -> None:
    data = draw(tmp_path / "data", 12)
    for options in (["--resume", "--degrees", "1"], []):
        with monkeypatch.context() as patch:
            die_in_group(patch, 1)
            with pytest.raises(Died):
                infer(data, "--group-size", 6)
        assert list(Path("out").glob(".*.groups"))
        taken.clear()
        assert infer(data, "--group-size", 6, *options) == 0
        assert set(taken) == {0, 1}
        assert not list(Path("out").glob(".*"))


def test_what_was_half_written_counts_for_nothing(tmp_path: Path) -> None:
    def ended(number: int) -> tuple[list[Scored], GroupFacts]:
        rng = np.random.default_rng(number)
        maps = [rng.random((2 + n, 3), np.float32) for n in range(3)]  # as of images in tiles
        masks = [pack(rng.random((9, 14)) < 0.5, 3, n) for n in range(3)]
        stages = [None, Stages(masks[0], (20, 30), masks[1:], [(Box(1, 2, 3, 4), 0.5)]), Stages(masks[1], (20, 30))]
        scored = [Scored(3 * n + number, float(maps[n].max()), maps[n], np.arange(4) / 3, stages[n]) for n in range(3)]
        return scored, GroupFacts(number, 1.0, {7: "no"}, {}, [], kept={"x": np.arange(number)})

    groups = EndedGroups(tmp_path / "g", "as it is", resume=True)
    for number in range(2):
        groups.add(*ended(number))
    groups.close()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "g").iterdir()}
    lines = whole["groups.jsonl"].splitlines(keepends=True)
    for name, size, expected in (
        ("groups.jsonl", len(whole["groups.jsonl"]) - 5, 1),
        ("groups.jsonl", len(lines[0]) - 1, 0),
        ("maps", len(whole["maps"]) - 1, 1),
        ("vectors", 10, 0),
        ("stages", len(whole["stages"]) - 1, 1),
        ("maps", len(whole["maps"]), 2),
    ):
        for other, kept in whole.items():
            (tmp_path / "g" / other).write_bytes(kept[:size] if other == name else kept)
        groups = EndedGroups(tmp_path / "g", "as it is", resume=True)
        assert len(groups.facts) == expected
        for number in range(expected, 2):
            groups.add(*ended(number))
        images = groups.images()
        assert [image.index for image in images] == [0, 1, 3, 4, 6, 7]
        for number in range(2):
            for image, wanted in zip(list(images)[number::2], ended(number)[0], strict=True):
                assert image.raw_score == wanted.raw_score
                assert np.array_equal(image.map, wanted.map)
                assert np.array_equal(np.asarray(image.facts), np.asarray(wanted.facts))
                assert (image.stages is None) == (wanted.stages is None)
                if image.stages is not None and wanted.stages is not None:
                    assert (image.stages.size, list(image.stages.tiles)) == ((20, 30), list(wanted.stages.tiles))
                    both = [
                        [(mask.row, mask.byte, mask.bits.tolist()) for mask in (stages.foreground, *stages.parts)]
                        for stages in (image.stages, wanted.stages)
                    ]
                    assert both[0] == both[1]
        assert groups.facts[1].kept["x"].tolist() == [0]
        groups.close()
    assert not EndedGroups(tmp_path / "g", "another", resume=True).facts


@pytest.mark.slow
def test_scores_of_very_many_images_are_averaged_within_their_groups(
    infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw(tmp_path / "data", 24)
    assert infer(data, "--output", "together", "--group-size", 12) == 0
    monkeypatch.setattr(category_pass, "TOGETHER", 20)
    assert infer(data, "--output", "apart", "--group-size", 12) == 0
    (together, maps), (apart, same_maps) = scores_and_maps("together"), scores_and_maps("apart")
    assert all(np.array_equal(one, other) for one, other in zip(maps, same_maps, strict=True))
    assert (apart.min(), int(apart.argmax())) == (apart.min(), int(together.argmax()))
    assert not np.array_equal(apart, together)
    assert "own group" in Path("apart/run.json").read_text()
