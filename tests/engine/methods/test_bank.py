"""Banks: scoring by everything equals scoring against everything, images are alone, and rates are what was promised."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banks import CHANNELS, built, make_tokens, place_of
from numpy.typing import NDArray
from PIL import Image
from runs import draw, record

from zsad.engine.commands.infer import main
from zsad.engine.config import ConfigError, load_config
from zsad.engine.images import survey
from zsad.engine.images.decode import decode
from zsad.engine.images.loader import Batch
from zsad.engine.methods.bank import BankMethod, Memory, bank_settings, raised
from zsad.engine.methods.bank_build import Making, check_making, needed, remembered
from zsad.engine.methods.bank_file import Bank, BankError, Features, read_bank, write_bank
from zsad.engine.methods.method import Group, Scored, method_class
from zsad.engine.methods.tile_grid import tile_grid
from zsad.engine.scores.conformal import upper_bound
from zsad.engine.scores.verdicts import Bounds
from zsad.kernels import reference
from zsad.kernels.cpu.comparers import unit_features

GRID = (3, 3)


def method_of(path: Path, **overrides: Any) -> BankMethod:
    preset, base = bank_settings(path)
    config = load_config(preset, None, {"bank": str(path), **overrides}, method_of=method_class, base=base)
    return BankMethod(config, place_of(config))


def scored(method: BankMethod, tokens: NDArray[np.float32], batch: int = 2) -> list[Scored]:
    method.start(Group(len(tokens), "part", name="part"))
    found: list[Scored] = []
    for first in range(0, len(tokens), batch):
        part = tokens[first : first + batch]
        indices = list(range(first, first + len(part)))
        found += method.take(Batch(indices, {method.inputs[0]: part}, []))
    return found


def raw_maps(bank: Bank, tokens: NDArray[np.float32]) -> NDArray[np.float64]:
    memory = Memory([features.units() for features in bank.features.values()], (1, 3), 1, "cpu")
    return np.stack([memory.distances(image) for image in tokens])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-3), ("int8", 2e-2)])
def test_a_bank_of_everything_equals_scoring_against_everything(precision: str, tolerance: float) -> None:
    known, new = make_tokens(6), make_tokens(3, 1)
    new[1, 0] = 0.5  # features without a direction
    bank = built(known, precision=precision)
    expected = np.stack(  # each new image among the known ones alone
        [
            reference.mutual_scores(np.concatenate([new[i : i + 1], known]), GRID, (1, 3), (0, 1))[0]
            for i in range(len(new))
        ]
    )
    np.testing.assert_allclose(raw_maps(bank, new), expected, atol=tolerance)
    others = reference.mutual_scores(known, GRID, (1, 3), (0, 1))
    np.testing.assert_allclose(bank.peaks, others.max(axis=1), atol=tolerance)
    np.testing.assert_allclose(bank.scores, others.max(axis=1), atol=tolerance)  # one patch is 1 % of nine


def test_more_neighbours_are_averaged() -> None:
    known, new = make_tokens(6), make_tokens(2, 1)
    features = {r: np.concatenate([reference.lnamd(known[:, layer], GRID, r) for layer in (0,)]) for r in (1,)}
    bank = built(known, neighbours=3, precision="fp32")
    units = features[1].reshape(-1, CHANNELS)
    wanted, _ = reference.nearest(reference.lnamd(new[:, 0], GRID, 1)[0], units, 3)
    memory = Memory([bank.features["dinov2", 5, 1].units()], (1,), 3, "cpu")
    found = memory.distances(new[0, :1])
    np.testing.assert_allclose(found, np.sqrt(2 - 2 * wanted).mean(axis=1), atol=1e-4)


def test_copies_that_are_left_out_leave_enough_neighbours() -> None:
    bank = built(np.ones((4, 2, 9, CHANNELS), np.float32), size=20, neighbours=3, precision="fp32")
    assert len(bank.features["dinov2", 5, 1].units()) == 3
    np.testing.assert_allclose(bank.scores, 0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [10_000, 20])
def test_an_image_scores_the_same_whatever_else_is_there(tmp_path: Path, size: int) -> None:
    write_bank(tmp_path / "part.zsad", built(make_tokens(6), size=size))
    new = make_tokens(5, 1)
    together = scored(method_of(tmp_path / "part.zsad"), new)
    for number in range(len(new)):
        (alone,) = scored(method_of(tmp_path / "part.zsad"), new[number : number + 1])
        assert (alone.raw_score, alone.score, alone.p_value) == (
            together[number].raw_score,
            together[number].score,
            together[number].p_value,
        )
        assert alone.map.tobytes() == together[number].map.tobytes()


@pytest.mark.slow
def test_scores_and_maps_keep_the_order_of_distances_in_a_fixed_range(tmp_path: Path) -> None:
    bank = built(make_tokens(12), size=40)
    assert len(next(iter(bank.features.values())).vectors) == 40
    write_bank(tmp_path / "part.zsad", bank)
    new = make_tokens(8, 1)
    new[3] += 3 * np.random.default_rng(3).normal(size=new[3].shape).astype(np.float32)
    found = scored(method_of(tmp_path / "part.zsad"), new)
    raw = np.array([image.raw_score for image in found])
    scores = np.array([image.score for image in found])
    assert ((scores >= 0) & (scores < 1)).all()
    assert (np.argsort(raw) == np.argsort(scores)).all()
    assert scores[3] > 0.5
    assert bank.header.image_scale.values(bank.scores).max() == pytest.approx(0.5)
    assert all(0 <= image.map.min() <= image.map.max() < 1 for image in found)


@pytest.mark.slow
def test_bounds_are_conformal_and_say_what_they_promise(tmp_path: Path) -> None:
    bank = built(make_tokens(30), size=100)
    write_bank(tmp_path / "part.zsad", bank)
    method = method_of(tmp_path / "part.zsad", false_alarms=0.1)
    bounds = method.bounds()
    assert bounds is not None
    expected = bank.header.image_scale.values(np.array([upper_bound(bank.scores, 0.1)[0]]))
    assert bounds.reject == pytest.approx(expected[0])
    assert bounds.accept <= bounds.reject
    assert bounds.rule == "at most 10 % of good images are rejected"
    few = method_of(tmp_path / "part.zsad").bounds()
    assert few is not None
    assert few.rule == "at most 3.23 % of good images are rejected; 1 % takes a bank of 99 images"
    assert few.reject == pytest.approx(0.5)
    assert few.accept == pytest.approx(bank.header.image_scale.values(np.array([upper_bound(bank.scores, 0.1)[0]]))[0])
    assert few.accept < few.reject  # five times as many as are rejected, a tenth at most


@pytest.mark.slow
def test_verdicts_of_small_banks_and_of_other_pictures_are_remarked_on(tmp_path: Path) -> None:
    for images in (18, 19):
        write_bank(tmp_path / f"{images}.zsad", built(make_tokens(images), size=20))
        method = method_of(tmp_path / f"{images}.zsad")
        bounds = method.bounds()
        assert bounds is not None
        said = method.remarks(bounds, np.full(30, 0.1))
        assert [remark for remark in said if "takes a bank of 19 images, and this one is of 18" in remark] == said
        assert len(said) == (images == 18) == (bounds.accept == bounds.reject)
    for rejected, told in ((15, False), (16, True)):
        scores = np.array([0.9] * rejected + [0.1] * (30 - rejected))
        found = method.remarks(bounds, scores)
        assert [remark[:30] for remark in found] == ["16 of 30 images are rejected; "] * told
    assert not method.remarks(bounds, np.array([0.9]))  # a single defect is nothing odd
    alone = method_of(tmp_path / "18.zsad", threshold=0.6)
    assert not alone.remarks(Bounds(0.6, 0.6, "--threshold"), np.full(30, 0.1))


class Products:
    """Finds the nearest without the threads that searches of real banks pay for."""

    def __init__(self, vectors: NDArray[np.float32], *_: object) -> None:
        self._vectors = vectors

    def search(self, queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], None]:
        return (queries @ self._vectors.T).max(axis=1, keepdims=True), None

    @staticmethod
    def search_all(banks: Sequence[Products], queries: Sequence[NDArray[np.float32]]) -> list[Any]:
        return [bank.search(own) for bank, own in zip(banks, queries, strict=True)]


@pytest.mark.parametrize(
    ("size", "precision"),
    [(10_000, "fp32"), *(pytest.param(900, precision, marks=pytest.mark.slow) for precision in ("fp16", "int8"))],
)
def test_making_a_bank_takes_no_more_memory_than_is_planned_and_tells_how_far_it_is(
    size: int, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsad.engine.methods.bank.Nearest.__init__", Products.__init__)
    monkeypatch.setattr("zsad.engine.methods.bank.Nearest.search", Products.search)
    tokens = np.random.default_rng(1).normal(size=(6, 1, 256, 512)).astype(np.float32)
    making, told = Making(size=size, precision=precision), list[tuple[int, int]]()
    takes = needed(len(tokens), [tokens.shape[1:]], (1, 3), making, "cpu")
    tracemalloc.start()
    kept = remembered(tokens, (5,), (1, 3), making, "cpu", lambda *so_far: told.append(so_far))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept[0][5, 3].vectors) == min(size, 6 * 256)
    own = 20 * 256 * 512 + 8 * 256 * 6 * 256  # an image's features, and the products that stand for a search
    assert takes.of_host("a device") / 3 < peak < takes.of_host("a device") + own  # type: ignore[arg-type]
    assert told == sorted(told)
    assert (told[0][0], told[-1][0], len(told) > 10) == (0, told[-1][1], True)


@pytest.mark.long
@pytest.mark.parametrize("size", [10_000, 36, 18])  # all patches, a fifth, a tenth
def test_false_alarms_are_what_was_asked_for(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsad.engine.methods.bank.Nearest", Products)
    monkeypatch.setattr("zsad.engine.methods.bank.search_all", Products.search_all)
    splits, count, held, share = int(os.environ.get("ZSAD_SPLITS", "150")), 20, 40, 0.1
    pool, rng, making = make_tokens(400, 5)[:, :1], np.random.default_rng(6), Making(size=size)
    units = np.stack([unit_features(image[0], GRID, (1,))[0] for image in pool])  # [400, P, C]
    alarms, promised = 0, 2 / (count + 1)  # ranks 20 and 21 of 21
    for _ in range(splits):
        chosen = rng.choice(len(pool), count + held, replace=False)
        kept, own = remembered(pool[chosen[:count]], (0,), (1,), making, "cpu")
        memory = Memory([features.units() for features in kept.values()], (1,), 1, "cpu")
        nearest, to_defects = memory.measured([np.concatenate(units[chosen[count:]])])
        new = raised(nearest, to_defects, memory.span).reshape(held, -1).max(axis=1)
        alarms += int((new > upper_bound(own.maps.max(axis=1).astype(np.float64), share)[0]).sum())
    # Images of one split share their bound, so that they count for less than independent ones.
    deviation = np.sqrt(promised * (1 - promised) / (splits * held) * (1 + held / count))
    rate = alarms / (splits * held)
    assert rate < promised + 3 * deviation
    # Of thinned banks the scores that they promise by are of fewer images than the bank's, which reject no more.
    assert rate > (promised if size == 10_000 else promised / 2) - 3 * deviation


@pytest.fixture
def bank_file(tmp_path: Path) -> Path:
    write_bank(tmp_path / "part.zsad", built(make_tokens(5), size=20))
    return tmp_path / "part.zsad"


def test_a_bank_is_read_as_it_was_written(bank_file: Path) -> None:
    bank, again = built(make_tokens(5), size=20), read_bank(bank_file)
    assert again.header == bank.header
    assert again.tensors.keys() == bank.tensors.keys()
    assert all((again.tensors[name] == array).all() for name, array in bank.tensors.items())


def test_a_bank_has_the_permissions_of_other_files_and_keeps_those_that_it_was_given(tmp_path: Path) -> None:
    bank, path, other = built(make_tokens(5), size=20), tmp_path / "part.zsad", tmp_path / "other"
    other.touch()
    write_bank(path, bank)
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    write_bank(path, bank)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_bank_that_was_there(
    bank_file: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    before, bank = bank_file.read_bytes(), read_bank(bank_file)
    with files_up_to(len(before) // 2), pytest.raises(OSError, match=r"part\.zsad") as refused:
        write_bank(bank_file, bank)
    assert refused.value.errno == errno.EFBIG
    assert [path.name for path in bank_file.parent.iterdir()] == ["part.zsad"]
    assert bank_file.read_bytes() == before


@pytest.mark.parametrize("left", [0, 4, 7, 100, 1000, -1])
def test_a_bank_that_was_cut_short_is_refused(bank_file: Path, left: int) -> None:
    whole = bank_file.read_bytes()
    bank_file.write_bytes(whole[:left])
    with pytest.raises(BankError, match=r"--save-bank"):
        read_bank(bank_file)


@pytest.mark.slow
def test_every_changed_byte_is_noticed(bank_file: Path) -> None:
    whole = bytearray(bank_file.read_bytes())
    for place in np.random.default_rng(0).integers(0, len(whole), 200).tolist():
        whole[place] ^= 1
        bank_file.write_bytes(whole)
        with pytest.raises(BankError, match=r"part\.zsad"):
            read_bank(bank_file)
        whole[place] ^= 1
    bank_file.write_bytes(whole)
    read_bank(bank_file)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a header as somebody would who knows how its digest is made."""
    from safetensors.numpy import load, save

    from zsad.engine.methods.bank_file import _digest, _metadata

    content = path.read_bytes()
    header = json.loads(_metadata(content)["zsad_bank"])
    change(header)
    text, tensors = json.dumps(header), load(content)
    path.write_bytes(save(tensors, {"zsad_bank": text, "sha256": _digest(text, tensors)}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("version", 3, r"format 3, and this zsad reads formats 1 and 2; install a newer zsad: pip install"),
        ("version", 2, "tiles are not those of its images"),
        ("version", "1", "format '1'"),
        ("images", 3, "does not fit its header"),
        ("degrees", [1, 5], "does not fit its header"),
        ("precision", "int8", "does not fit its header"),
        ("neighbours", 0, r"header is damaged \(neighbours"),
        ("map_network", "other", "map_network is none of its networks"),
        ("more", 1, r"header is damaged \(more"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(bank_file: Path, key: str, value: Any, said: str) -> None:
    rewritten(bank_file, lambda header: header.update({key: value}))
    with pytest.raises(BankError, match=said):
        read_bank(bank_file)


SIZES = ((40, 70), (32, 32), (90, 33))  # in tiles of 32 pixels: 6, 1 and 6


@pytest.mark.slow
def test_images_in_tiles_are_scored_without_any_of_their_own_tiles(tmp_path: Path) -> None:
    tokens, cut = make_tokens(13), {"tile": 32, "overlap": 4}
    bank = built(tokens, SIZES, cut, precision="fp32")
    assert (bank.header.images, bank.header.tiles, bank.header.image_rule) == (3, 13, "map_maximum")
    first = 0
    for number, size in enumerate(SIZES):
        grid = tile_grid(size, bank.header.tiling, 3)
        own = slice(first, first + len(grid))
        others = built(np.delete(tokens, own, axis=0), precision="fp32")  # of whole images it is the same
        whole = np.zeros(grid.size, np.float32)
        for tile, distances in enumerate(raw_maps(others, tokens[own])):
            grid.add(whole, tile, distances.reshape(3, 3).astype(np.float32))
        assert bank.scores[number] == bank.peaks[number] == pytest.approx(whole.max(), abs=1e-5)
        first += len(grid)
    write_bank(tmp_path / "part.zsad", bank)
    again = read_bank(tmp_path / "part.zsad")
    assert (again.header, again.sizes.tolist()) == (bank.header, [list(size) for size in SIZES])
    assert bank_settings(tmp_path / "part.zsad")[1]["tiling"] == {**cut, "scale": 1.0, "tile_batches": "auto"}
    write_bank(tmp_path / "part.zsad", replace(bank, sizes=bank.sizes + 40))
    with pytest.raises(BankError, match="tiles are not those of its images"):
        read_bank(tmp_path / "part.zsad")
    assert "tiling" not in built(make_tokens(2)).header.text


@pytest.mark.parametrize(
    ("cut", "asked", "said"),
    [
        ({}, {"tile": 64}, "is of whole images, and this run cuts with --tile 64, .* part.zsad --tile 64"),
        ({"tile": 32, "overlap": 4}, {"tile": 64}, "tiles that --tile 32 --overlap 4 cuts, .*--tile 64 --overlap 4"),
        ({"tile": 32, "overlap": 4}, {"tiles": (2, 1)}, "this run cuts with --tiles 2x1"),
        (
            {"tile": 32, "overlap": 4},
            {"tile_batches": "pooled"},
            "--tile-batches: a bank is of the tiles of all places",
        ),
    ],
)
def test_a_run_that_cuts_otherwise_than_the_bank_is_refused(
    tmp_path: Path, cut: dict[str, Any], asked: dict[str, Any], said: str
) -> None:
    write_bank(tmp_path / "part.zsad", built(make_tokens(13), SIZES, cut) if cut else built(make_tokens(3)))
    with pytest.raises(ConfigError, match=said):
        method_of(tmp_path / "part.zsad", **asked)
    assert method_of(tmp_path / "part.zsad", **cut).cells == 3


@pytest.mark.slow
def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    bank = built(make_tokens(5), size=20)
    key = next(iter(bank.features))
    features = bank.features[key]
    features.vectors[3, 2] = np.nan
    write_bank(tmp_path / "part.zsad", bank)
    with pytest.raises(BankError, match="is not finite"):
        read_bank(tmp_path / "part.zsad")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.zsad")
    for path, said in (
        (tmp_path / "pipe.zsad", "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.zsad", "No such file"),
    ):
        with pytest.raises(BankError, match=said):
            read_bank(path)


def test_too_little_memory_is_said(bank_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsad.engine.methods.bank_file.default_memory_limit", lambda: 1000)
    with pytest.raises(BankError, match=r"too little memory.*--bank-size"):
        read_bank(bank_file)


def test_a_bank_of_other_weights_is_refused(bank_file: Path) -> None:
    preset, base = bank_settings(bank_file)
    config = load_config(preset, method_of=method_class, base=base)
    with pytest.raises(BankError, match="the bank is of other weights of dinov2"):
        BankMethod(config, place_of(config, "cd" * 32))


@pytest.mark.parametrize("option", [{"image_size": 56}, {"taps": (3,)}, {"foreground": "colour"}, {"bit_depth": 12}])
def test_what_the_bank_decides_cannot_be_replaced(bank_file: Path, option: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="leave that to the bank"):
        method_of(bank_file, **option)


def test_int8_features_are_near_those_that_were_stored() -> None:
    units = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    units[7] = 0
    packed = Features.packed(units, np.zeros(50, np.int32), "int8")
    assert packed.vectors.dtype == np.int8
    np.testing.assert_allclose(packed.units(), units, atol=0.003)


def infer(tiny: Path, *options: str) -> int:
    config = [] if "--bank" in options else ["--config", str(tiny / "config.toml")]
    return main([*options, *config, "--device", "cpu", "-q"])


def images_of(output: str, category: str = "data") -> dict[str, dict[str, Any]]:
    found: Sequence[dict[str, Any]] = json.loads((Path(output) / category / "category.json").read_text())["images"]
    return {image["path"]: image for image in found}


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_known_good_images_become_a_bank_that_scores_single_images(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(Path("good"), 9)
    Path("good/08.png").unlink()  # the one with a defect
    draw(Path("data"), 4)
    saved = ["--reference", "good", "--save-bank", "part.zsad", "--config", str(tiny / "config.toml")]
    assert main([*saved, "--device", "cpu"]) == 0
    assert "It can promise no fewer than 11.1 % false alarms; 1 % takes 99 images" in capsys.readouterr().err
    assert not Path("out").exists()
    assert infer(tiny, "data", "--bank", "part.zsad", "--output", "all") == 0
    Path("one").mkdir()
    Path("data/03.png").rename("one/03.png")
    assert infer(tiny, "one", "--bank", "part.zsad", "--output", "alone") == 0
    together, alone = images_of("all")["03.png"], images_of("alone", "one")["03.png"]
    assert together["score"] == alone["score"] > 0.5
    assert alone["verdict"] == "reject"
    assert alone["p_value"] == pytest.approx(1 / 9)
    capsys.readouterr()
    own = record("alone")["categories"]["one"]["bounds"]
    assert main(["one", "--bank", "part.zsad", "--threshold", "0.1", "--output", "asked", "--device", "cpu"]) == 0
    asked, said = record("asked"), capsys.readouterr().err
    assert "good images are rejected" not in said + json.dumps(asked)
    bounds = asked["categories"]["one"]["bounds"]
    assert bounds == {**own, "accept": 0.1, "reject": 0.1, "rule": "--threshold"}
    assert Path("all/data/maps/03.tiff").read_bytes() == Path("alone/one/maps/03.tiff").read_bytes()
    assert "p_value" in Path("all/data/scores.csv").read_text().splitlines()[0]
    assert record("alone")["method"] == "bank"


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_a_run_keeps_the_half_that_looks_normal(tiny: Path) -> None:
    draw(Path("data"), 11)
    assert infer(tiny, "data", "--save-bank", "part.zsad") == 0
    header = read_bank(Path("part.zsad")).header
    assert (header.images, header.chosen) == (6, True)
    assert len(images_of("out")) == 11
    draw(Path("good"), 5)
    assert infer(tiny, "data", "--reference", "good", "--save-bank", "part.zsad", "--bank-precision", "int8") == 0
    header = read_bank(Path("part.zsad")).header
    assert (header.images, header.chosen, header.precision) == (5, False, "int8")


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_categories_have_banks_of_their_own(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nut", "bolt"):
        draw(Path("data") / name, 5)
    assert infer(tiny, "data", "--save-bank", "part.zsad") == 2
    assert "--save-bank part/" in capsys.readouterr().err
    assert infer(tiny, "data", "--save-bank", "banks") == 0
    assert sorted(path.name for path in Path("banks").iterdir()) == ["bolt.zsad", "nut.zsad"]
    draw(Path("data") / "gear", 2)
    assert infer(tiny, "data", "--bank", "banks", "--output", "new") == 1
    said = capsys.readouterr().err
    assert "gear: there is no bank of gear in banks/, which has bolt, nut" in said
    assert "--save-bank banks/gear.zsad" in said
    assert len(images_of("new", "nut")) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_categories_with_images_of_two_sizes_equal_each_with_its_bank_alone(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(survey, "SMALLEST", 70)
    for name, side in (("bolt", 80), ("nut", 110), ("ring", 80)):
        draw(Path("data") / name, 4)
        for path in Path("data", name).iterdir():
            Image.open(path).resize((side + 9, side)).save(path)
    assert infer(tiny, "data", "--save-bank", "banks", "--image-size", "auto") == 0
    draw(Path("data") / "gear", 2)
    assert infer(tiny, "data", "--bank", "banks", "--output", "all") == 1
    assert "gear: there is no bank of gear in banks/, which has bolt, nut, ring" in capsys.readouterr().err
    sizes = {name: c["image_sizes"].get("dinov2") for name, c in record("all")["categories"].items()}
    assert sizes == {"bolt": 70, "nut": 98, "ring": 70, "gear": None}
    for name in ("bolt", "nut", "ring"):
        assert infer(tiny, f"data/{name}", "--bank", f"banks/{name}.zsad", "--output", "alone") == 0
        assert images_of("alone", name) == images_of("all", name)
        assert Path("alone", name, "maps/03.tiff").read_bytes() == Path("all", name, "maps/03.tiff").read_bytes()
        shutil.rmtree("alone")
    Path("banks/ring.zsad").unlink()
    assert infer(tiny, "data/nut", "--bank", "banks", "--output", "all", "--resume") == 0
    assert infer(tiny, "data/nut", "--bank", "banks", "--image-size", "auto") == 2
    assert "give --image-size a number, or leave it out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_a_checkpoint_that_was_moved_is_named_by_a_configuration(
    tiny: Path, random_dinov2: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tiny / "config.toml").read_text()
    (there,) = re.findall('checkpoint = "(.*)"', text)
    shutil.copy(there, "before.safetensors")
    Path("before.toml").write_text(text.replace(there, "before.safetensors"))
    Path("after.toml").write_text(text.replace(there, "after.safetensors"))
    draw(Path("good"), 5)
    draw(Path("data"), 2)
    saved = ["--reference", "good", "--save-bank", "part.zsad", "--config", "before.toml"]
    assert main([*saved, "--device", "cpu"]) == 0
    assert main(["data", "--bank", "part.zsad", "--device", "cpu", "--output", "before"]) == 0
    Path("before.safetensors").rename("after.safetensors")
    again = ["data", "--bank", "part.zsad", "--device", "cpu", "--output", "after"]
    capsys.readouterr()
    assert main(again) == 2
    said = capsys.readouterr().err
    assert "before.safetensors" in said
    assert "--config" in said
    assert main([*again, "--config", "after.toml"]) == 0
    assert images_of("before") == images_of("after")
    shutil.copy(random_dinov2(width=48, depth=5), "after.safetensors")
    assert main([*again, "--config", "after.toml"]) == 2
    assert "the bank is of other weights of dinov2" in capsys.readouterr().err
    Path("after.toml").write_text(text + "[musc]\ndegrees = [1, 5]\n")
    assert main([*again, "--config", "after.toml"]) == 2
    assert "after.toml: [musc] is nothing for a run by a bank" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_networks_run_in_the_banks_precision_or_it_is_said(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("good"), 5)
    draw(Path("data"), 2)
    assert infer(tiny, "--reference", "good", "--save-bank", "part.zsad", "--network-precision", "int8") == 0
    assert infer(tiny, "data", "--bank", "part.zsad") == 0
    assert record("out")["config"]["network_precision"] == "int8"
    assert "networks" not in record("out")["categories"]["data"]["bounds"]["rule"]
    capsys.readouterr()
    assert main(["data", "--bank", "part.zsad", "--network-precision", "fp32", "--device", "cpu"]) == 0
    said = "networks run in fp32 and ran in int8 for the bank, which moves scores a little"
    assert said in capsys.readouterr().err
    assert record("out")["categories"]["data"]["bounds"]["rule"].endswith(said)


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_two_networks_make_one_bank(two_networks: Path) -> None:
    draw(Path("good"), 6)
    Path("good/05.png").unlink()  # the one with a defect
    draw(Path("data"), 3)
    challenge = ["--preset", "challenge", "--config", str(two_networks), "--device", "cpu", "-q"]
    assert main(["--reference", "good", "--save-bank", "part.zsad", *challenge]) == 0
    bank = read_bank(Path("part.zsad"))
    assert {name for name, _, _ in bank.features} == {"dinov2", "clip"}
    assert (bank.header.map_network, bank.header.image_network) == ("dinov2", "clip")
    assert main(["data", "--bank", "part.zsad", "--device", "cpu", "-q"]) == 0
    scores = {name: image["score"] for name, image in images_of("out").items()}
    assert max(scores, key=lambda name: scores[name]) == "02.png"
    assert record("out")["preset"] == "challenge"
    Path("one").mkdir()
    Path("data/02.png").rename("one/02.png")
    assert main(["one", "--bank", "part.zsad", "--device", "cpu", "-q", "--output", "alone"]) == 0
    assert images_of("alone", "one")["02.png"]["score"] == scores["02.png"]


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_resuming_knows_the_bank(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("data"), 5)
    draw(Path("good"), 5)
    assert infer(tiny, "--reference", "good", "--save-bank", "a.zsad") == 0
    assert infer(tiny, "data", "--bank", "a.zsad") == 0
    before = Path("out/data/category.json").stat().st_mtime_ns
    Path("a.zsad").rename("b.zsad")  # where it lies decides nothing
    assert infer(tiny, "data", "--bank", "b.zsad", "--resume") == 0
    Path("good/04.png").unlink()
    assert infer(tiny, "--reference", "good", "--save-bank", "b.zsad") == 0
    assert main(["data", "--bank", "b.zsad", "--resume", "--device", "cpu"]) == 0
    assert "scored again" in capsys.readouterr().err
    assert Path("out/data/category.json").stat().st_mtime_ns != before


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_resuming_scores_only_what_is_new_and_gives_all_verdicts_anew(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(Path("good"), 5)
    draw(Path("data"), 4)
    more = draw(Path("more"), 7)
    assert infer(tiny, "--reference", "good", "--save-bank", "a.zsad") == 0
    read: list[str] = []

    def watched(path: Path, *rest: Any) -> Any:
        read.append(path.name)
        return decode(path, *rest)

    monkeypatch.setattr("zsad.engine.images.loader.decode", watched)

    def scored_now(*options: str) -> list[str]:
        read.clear()
        command = ["data", "--bank", "a.zsad", *options, "--device", "cpu"]
        assert main([*command, "--resume"]) == 0
        now = sorted(read)
        assert main([*command, "--output", "whole", "-q"]) == 0
        for path in Path("whole/data").rglob("*.*"):
            again = Path("out/data") / path.relative_to("whole/data")
            if path.name == "category.json":
                one, two = (json.loads(file.read_text()) for file in (path, again))
                assert {**one, "seconds": 0} == {**two, "seconds": 0}
            else:
                assert path.read_bytes() == again.read_bytes(), path
        return now

    assert scored_now() == ["00.png", "01.png", "02.png", "03.png"]
    assert scored_now("--false-alarms", "0.4") == []
    assert scored_now("--threshold", "0") == []
    shutil.copy(more / "05.png", "data/005.png")  # before all others
    assert scored_now("--threshold", "0") == ["005.png"]
    said = capsys.readouterr().err
    assert "data: going on after 4 images" in said
    assert "scored again" not in said
    shutil.copy(more / "06.png", "data/01.png")
    Path("data/02.png").unlink()
    assert scored_now() == ["01.png"]
    Image.open(more / "04.png").save("data/03.jpg", quality=95)  # whose map would be called as that of 03.png is
    assert scored_now() == ["03.jpg", "03.png"]
    next(Path("out/data/maps").glob("00.tiff")).unlink()
    assert scored_now("--threshold", "0.4") == ["00.png"]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["data", "--bank", "none.zsad"], "--bank none.zsad: cannot be read (No such file or directory)"),
        (["data", "--bank", "data"], "there is no bank"),
        (["data", "--bank", "data/00.png"], "is no bank, or only its beginning"),
        (["data", "--bank", "x.zsad", "--preset", "musc"], "leave out --preset musc"),
        (["data", "--bank", "made.zsad", "--expected-defects", "0.1"], "leave it out, or say with --false-alarms"),
        (["data", "--bank", "x.zsad", "--save-bank", "y.zsad"], "give one of them"),
        (["data", "--bank-size", "5"], "give --save-bank FILE too"),
        (["data", "--save-bank", "y.zsad", "--bank-size", "0"], "must be at least 1"),
        (["data", "--save-bank", "y.zsad", "--neighbours", "17"], "must be from 1 to 16"),
        (["data", "--bank", "x.zsad", "--neighbours", "3"], "--reference GOOD/ --save-bank part.zsad --neighbours 3"),
        (["--save-bank", "y.zsad"], "give known-good images with --reference GOOD/"),
        (["data", "--save-bank", "y.zsad", "--memory-limit", "1MB"], "make the work smaller with --bank-size"),
        (["--reference", "data", "--save-bank", "y.zsad", "--memory-limit", "1MB"], "--image-size or fewer images"),
        (["data/00.png"], "give data/, a new folder with a copy of it"),
        (["--reference", "none", "--save-bank", "y.zsad"], "none"),
        (["data", "--save-bank", "y.zsad", "--preset", "winclip"], "presets that compare images"),
        (
            ["data", "--false-alarms", "0.1"],
            "give --bank part.zsad or --reference GOOD/, or without these --expected-defects SHARE",
        ),
    ],
)
def test_mistakes_are_said_before_any_work(
    tiny: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(Path("data"), 2)
    write_bank(Path("made.zsad"), built(make_tokens(5), size=20))
    config = [] if {"--bank", "--preset"} & set(options) else ["--config", str(tiny / "config.toml")]
    try:
        code = main([*options, *config, "--device", "cpu"])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not Path("out/data").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_resuming_keeps_a_bank_only_where_it_would_be_made_the_same(tiny: Path) -> None:
    draw(Path("data"), 5)
    path, again = Path("part.zsad"), ["data", "--save-bank", "part.zsad", "--resume"]
    assert infer(tiny, *again) == 0
    before = path.stat().st_mtime_ns
    assert infer(tiny, *again) == 0
    assert path.stat().st_mtime_ns == before
    assert infer(tiny, *again, "--bank-size", "30") == 0
    assert read_bank(path).header.size == 30
    draw(Path("good"), 6)
    assert infer(tiny, "--reference", "good", "--save-bank", "part.zsad") == 0  # of other images
    assert infer(tiny, *again) == 0
    assert read_bank(path).header.chosen
    path.write_bytes(path.read_bytes()[:-9])
    assert infer(tiny, *again) == 0
    read_bank(path)


def test_banks_are_not_of_patches_pooled_by_similarity() -> None:
    config = load_config("small", overrides={"pooling": "snamd"}, method_of=method_class)
    with pytest.raises(ConfigError, match="leave out pooling"):
        check_making(config, Making())


@pytest.mark.usefixtures("workplace")
def test_too_few_images_for_a_bank_lose_no_results(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("data"), 3)
    Path("good").mkdir()
    Image.new("RGB", (50, 50), (9, 99, 9)).save("good/a.png")
    assert infer(tiny, "data", "--reference", "good", "--save-bank", "part.zsad") == 1
    assert "at least two readable known-good images" in capsys.readouterr().err
    assert len(images_of("out")) == 3
    assert not Path("part.zsad").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_what_goes_wrong_with_a_bank_is_said_before_any_work_or_costs_that_bank_alone(
    tiny: Path,
    read_only: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw(Path("data"), 3)
    read_only(Path("banks"))
    Path("banks").mkdir()
    for options in (["data"], ["--reference", "data"]):
        assert infer(tiny, *options, "--save-bank", "banks/more/part.zsad") == 2
        said = "--save-bank banks/more/part.zsad: cannot be written there (Read-only file system); name a file in"
        assert said in capsys.readouterr().err
    assert not Path("out/data").exists()
    broken: list[Exception] = [RuntimeError("the session broke"), OSError(errno.ENOSPC, "No space left on device")]

    def fail(*_: Any) -> Any:
        raise broken.pop(0)

    monkeypatch.setattr("zsad.engine.bank_pass.build_bank", fail)
    assert infer(tiny, "data", "--save-bank", "part.zsad") == 1
    assert "no bank part.zsad: the session broke" in capsys.readouterr().err
    assert record("out")["categories"]["data"]["failures"][0]["reason"] == "no bank: the session broke"
    assert infer(tiny, "data", "--save-bank", "part.zsad") == 1
    assert "no bank part.zsad: [Errno 28] No space left on device" in capsys.readouterr().err
    assert len(images_of("out")) == 3
    assert Path("out/report.html").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_copies_and_damaged_images_are_left_out(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("good"), 9)
    good = Path("good")
    (good / "exact.png").write_bytes((good / "03.png").read_bytes())
    with Image.open(good / "04.png") as image:
        image.save(good / "near.jpg", quality=95)
        image.save(good / "cut.jpg", quality=95)
    damaged = (good / "cut.jpg").read_bytes()
    (good / "cut.jpg").write_bytes(damaged[: len(damaged) // 2] + damaged[len(damaged) // 2 + 400 :])
    assert main(["--reference", "good", "--save-bank", "a.zsad", "--config", str(tiny / "config.toml")]) == 0
    said = capsys.readouterr().err
    assert "exact.png is left out: it is a copy of" in said
    assert "near.jpg is left out of the bank: it is nearly the same picture as" in said
    assert "cut.jpg is left out of the bank: the file looks damaged" in said
    bank = read_bank(Path("a.zsad"))
    assert bank.header.images == len(bank.scores) == 9
    # A run that chooses the images itself, by their scores, keeps no copies either.
    for number in range(3):
        (good / f"copy{number}.png").write_bytes((good / "03.png").read_bytes())
    assert infer(tiny, "good", "--save-bank", "b.zsad") == 0
    digests = {row.tobytes() for row in read_bank(Path("b.zsad")).digests}
    assert len(digests) == read_bank(Path("b.zsad")).header.images


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_unreadable_known_good_images_are_failures(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("good"), 5)
    Path("good/02.png").write_bytes(b"no image")
    assert infer(tiny, "--reference", "good", "--save-bank", "part.zsad", "--strict") == 1
    assert "stopped by --strict: good/02.png" in capsys.readouterr().err
    assert not Path("part.zsad").exists()
    assert infer(tiny, "--reference", "good", "--save-bank", "part.zsad") == 1
    assert read_bank(Path("part.zsad")).header.images == 4
    Path("list.txt").write_text("good/00.png\ngood/01.png\nabsent.png\n")
    assert infer(tiny, "--reference", "list.txt", "--save-bank", "part.zsad") == 1
    assert infer(tiny, "--reference", "list.txt", "--save-bank", "part.zsad", "--strict") == 1
    assert "stopped by --strict: absent.png" in capsys.readouterr().err


@pytest.mark.usefixtures("workplace")
def test_one_known_good_image_makes_no_bank(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("good"), 1)
    assert infer(tiny, "--reference", "good", "--save-bank", "part.zsad") == 2
    said = capsys.readouterr().err
    assert "at least two readable known-good images" in said
    assert "--strict" not in said
