"""What banks learn: accepting raises nothing, rejecting raises only what is nearer to a defect, undoing is exact."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banks import CHANNELS, built, make_tokens, place_of
from numpy.typing import NDArray

from zsad.engine.config import load_config
from zsad.engine.methods.bank import Memory, memories, raised
from zsad.engine.methods.bank_feedback import (
    Additions,
    Given,
    NothingToAddError,
    image_score,
    patch_cover,
    rederived,
    with_scores,
    without,
)
from zsad.engine.methods.bank_file import Bank, BankError, Kind, read_bank, write_bank
from zsad.engine.methods.method import Place, method_class

WHEN = datetime(2026, 1, 2, tzinfo=timezone.utc)
SLACK = 1e-6  # products of other shapes round otherwise


def place() -> Place:
    return place_of(load_config("small", overrides={"image_size": 42}, method_of=method_class))


def memory_of(bank: Bank) -> Memory:
    return memories(bank, place())["dinov2"]


def odd_tokens(count: int, seed: int = 7) -> NDArray[np.float32]:
    """Images like the others but for a few patches."""
    rng, tokens = np.random.default_rng(seed), make_tokens(count, seed)
    tokens[:, :, 2:4] += 2.5 * rng.normal(size=(count, 1, 1, CHANNELS)).astype(np.float32)
    return tokens


def told(bank: Bank, kind: Kind, tokens: NDArray[np.float32], masks: Sequence[Any] | None = None) -> Bank:
    additions, given, known = Additions(bank, kind, memories(bank, place())), [], memories(bank, place())
    for number, image in enumerate(tokens):
        digest = f"{len(bank.header.feedback)}{number}" * 32
        given.append(Given(f"{number}.png", digest, {"dinov2": image[None]}, None if masks is None else masks[number]))
        additions.add(given[-1])
    before = [image_score(bank.header, known, image) for image in given]
    changed = additions.bank(given, before, WHEN)
    known = memories(changed, place())
    return with_scores(changed, [image_score(changed.header, known, image) for image in given])


@pytest.mark.slow
@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("size", [10_000, 40])
def test_accepting_raises_no_patch_of_any_image(size: int, neighbours: int) -> None:
    bank = built(make_tokens(12), size=size, neighbours=neighbours)
    changed = told(bank, "accept", odd_tokens(3))
    before, after = memory_of(bank), memory_of(changed)
    for image in np.concatenate([make_tokens(8, 3), odd_tokens(4, 8)]):
        assert (after.distances(image) <= before.distances(image) + SLACK).all()
    assert (changed.scores <= bank.scores + SLACK).all()
    assert (changed.peaks <= bank.peaks + SLACK).all()
    for key, features in bank.features.items():
        assert changed.features[key] is features


@pytest.mark.slow
def test_what_was_accepted_is_no_longer_unusual() -> None:
    bank, odd = built(make_tokens(12), precision="fp32"), odd_tokens(2)
    changed = told(bank, "accept", odd)
    usual = np.percentile(bank.own["dinov2"].maps, 95)
    for image, said in zip(odd, changed.header.feedback[0].images, strict=True):
        assert memory_of(bank).distances(image).max() > usual >= memory_of(changed).distances(image).max() - SLACK
        assert said.after < said.before
        assert 0 < said.patches["dinov2"] < 9
    with pytest.raises(NothingToAddError, match="nothing to accept"):
        told(changed, "accept", odd[:1])


@pytest.mark.slow
def test_own_images_are_scored_without_themselves_but_with_all_that_was_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zsad.engine.methods.bank_build.LEAST_KEPT", 9)  # all of their patches
    monkeypatch.setattr("zsad.engine.methods.bank_feedback.USUAL", 0)
    own, odd = make_tokens(20), odd_tokens(2)
    own[0, :, 2:4] += 0.6 * (odd[0, :, 2:4] - own[0, :, 2:4])  # odd in the way of one that is accepted
    bank = built(own, precision="fp32")
    changed = told(bank, "accept", odd)
    assert changed.scores[0] < bank.scores[0]
    keys, added = list(bank.features), {key: changed.added("accept", key) for key in bank.features}
    for number, image in enumerate(own):
        others = [bank.features[key].units()[bank.features[key].images != number] for key in keys]
        memory = Memory([np.concatenate(pair) for pair in zip(others, added.values(), strict=True)], (1, 3), 1, "cpu")
        assert changed.peaks[number] == pytest.approx(memory.distances(image).max(), abs=1e-6)


@pytest.mark.slow
def test_rejecting_raises_what_is_nearer_to_a_defect_and_nothing_else() -> None:
    bank, odd = built(make_tokens(12), size=40), odd_tokens(3)
    changed = told(bank, "reject", odd)
    before, after = memory_of(bank), memory_of(changed)
    some = False
    for image in np.concatenate([make_tokens(8, 3), odd + 0.1, odd_tokens(4, 8)]):
        nearest, to_defects = after.measured(after.units(image))
        assert to_defects is not None
        nearer = to_defects < np.mean([found[:, 0] for found in nearest], axis=0)
        old, new = before.distances(image), after.distances(image)
        assert (new[nearer] > old[nearer]).all()
        assert new[~nearer].tobytes() == old[~nearer].tobytes()
        some |= bool(nearer.any())
    assert some
    assert all(image.after > image.before for image in changed.header.feedback[0].images)


def test_raising_grows_with_the_normal_distance_and_falls_with_that_to_a_defect() -> None:
    rng = np.random.default_rng(0)
    normal, defect = rng.uniform(0, 1, (2, 500))
    values = raised([normal[:, None]], defect, 0.4)
    assert (raised([normal[:, None] + 0.01], defect, 0.4) > values).all()
    assert (raised([normal[:, None]], defect + 0.01, 0.4) <= values).all()
    assert raised([np.array([[0.3], [0.0]])], np.zeros(2), 0.4).tolist() == pytest.approx([0.7, 0])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_taking_back_is_exact_in_any_order(tmp_path: Path, precision: str) -> None:
    def written(bank: Bank) -> Bank:
        write_bank(tmp_path / "part.zsad", bank)
        return read_bank(tmp_path / "part.zsad")

    def same(one: Bank, other: Bank) -> bool:
        equal = all(one.tensors[name].tobytes() == array.tobytes() for name, array in other.tensors.items())
        return equal and one.tensors.keys() == other.tensors.keys() and one.header == other.header

    first = written(built(make_tokens(12), size=40, precision=precision))
    second = written(told(first, "accept", odd_tokens(2)))
    third = written(told(second, "reject", odd_tokens(2, 9)))
    assert [step.number for step in third.header.feedback] == [1, 2]
    assert same(written(without(third, 2)), second)
    assert same(written(without(without(third, 2), 1)), first)
    assert same(without(without(third, 1), 2), first)
    assert not same(without(third, 1), first)


@pytest.mark.slow
def test_masks_say_which_patches_are_the_defect() -> None:
    bank, odd = built(make_tokens(12), precision="fp32"), odd_tokens(1)
    mask = np.zeros((60, 30), np.float32)
    mask[:20, 20:30] = 1  # the third patch, and a corner of the sixth
    mask[20:24, 20:24] = 1
    np.testing.assert_allclose(patch_cover(mask, 9), [0, 0, 1, 0, 0, 0.08, 0, 0, 0], atol=1e-3)
    changed = told(bank, "reject", odd, [mask])
    assert changed.header.feedback[0].images[0].patches == {"dinov2": 1}
    np.testing.assert_allclose(
        changed.added("reject", ("dinov2", 5, 1))[0], memory_of(bank).units(odd[0])[0][2], atol=1e-6
    )
    small = np.zeros((90, 90), np.float32)
    small[32:36, 32:36] = 1  # covers no patch to a half
    assert told(bank, "reject", odd, [small]).header.feedback[0].images[0].patches == {"dinov2": 1}
    with pytest.raises(NothingToAddError, match="mask is empty"):
        told(bank, "reject", odd, [np.zeros((9, 9), np.float32)])


@pytest.mark.slow
def test_there_is_room_for_a_quarter_of_the_size() -> None:
    bank = built(make_tokens(12), size=12)
    assert bank.header.room == 3
    additions, whole = Additions(bank, "reject", memories(bank, place())), np.ones((9, 9), np.float32)
    for number, room in enumerate((True, False)):
        given = Given("a", f"{number}" * 64, {"dinov2": odd_tokens(2)[number : number + 1]}, whole)
        if room:
            additions.add(given)
            continue
        with pytest.raises(
            NothingToAddError, match=r"no more room for what you reject, 3 patches.*--undo.*--bank-size"
        ):
            additions.add(given)
    changed = additions.bank([Given("a", "0" * 64, {}, None)], [0.0], WHEN)
    assert len(changed.added("reject", ("dinov2", 5, 1))) == 3
    told(changed, "accept", odd_tokens(1))  # what is accepted has room of its own


@pytest.mark.slow
def test_without_feedback_scores_follow_from_what_is_kept() -> None:
    bank = built(make_tokens(12), size=40)
    again = rederived(replace(bank, scores=np.zeros(12), peaks=np.zeros(12)))
    assert again.scores.tobytes() == bank.scores.tobytes()
    assert again.peaks.tobytes() == bank.peaks.tobytes()


def change_step(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["feedback"][0].update({key: value})


def change_image(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["feedback"][0]["images"][0].update({key: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_step("number", 0), "header is damaged"),
        (change_step("number", 7), "does not fit its header"),
        (change_step("kind", "like"), "header is damaged"),
        (change_step("when", "yesterday"), "header is damaged"),
        (change_step("images", []), "header is damaged"),
        (change_image("sha256", "ab"), "header is damaged"),
        (change_image("patches", {"dinov2": 5000}), "does not fit its header"),
        (change_image("patches", {"other": 1}), "header is damaged"),
        (change_image("before", 1.5), "header is damaged"),
        (lambda header: header.update(feedback=2 * header["feedback"]), "header is damaged"),
        (lambda header: header.pop("size"), "header is damaged"),
    ],
)
def test_feedback_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    from safetensors.numpy import load, save

    from zsad.engine.methods.bank_file import _digest, _metadata

    path = tmp_path / "part.zsad"
    write_bank(path, told(built(make_tokens(5), size=20), "accept", odd_tokens(1)))
    content = path.read_bytes()
    header = json.loads(_metadata(content)["zsad_bank"])
    change(header)
    text, tensors = json.dumps(header), load(content)
    path.write_bytes(save(tensors, {"zsad_bank": text, "sha256": _digest(text, tensors)}))
    with pytest.raises(BankError, match=said):
        read_bank(path)
