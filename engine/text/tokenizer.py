"""CLIP's byte pair encoding: texts in, token numbers out."""

import gzip
import html
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zsad.export.checkpoints import find_checkpoint
from zsad.export.state_dict import CheckpointError

VOCABULARY = "clip-bpe"  # in the manifest
MERGES = 48_894  # those that CLIP uses: lines 2 to 48,895 of the vocabulary's file
CONTEXT = 77  # tokens of a text, start and end included
CACHED = 1 << 16  # pieces whose tokens are remembered

START, END = "<start_of_text>", "<end_of_text>"
PIECE = rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"
WORD_END = "</w>"
# Bytes that stand for themselves; the others get letters from U+0100 on.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))


TOKENIZER_VERSION = 1  # goes up when texts become other tokens: what was made of them is made anew


class Tokenizer:
    """Turns texts into the numbers that CLIP's text tower reads."""

    def __init__(self, merges: Iterable[tuple[str, str]], context: int = CONTEXT) -> None:
        """Take the pairs of symbols that are merged, in the order of their ranks.

        context: tokens of a text, start and end included; longer texts are cut.
        """
        import regex  # has the classes of Unicode that the standard library's lacks

        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        letters = _byte_letters()
        self._letters = [letters[byte] for byte in range(256)]
        symbols = [*letters.values(), *(letter + WORD_END for letter in letters.values())]
        symbols += map("".join, self._ranks)
        self.start, self.end = len(symbols), len(symbols) + 1
        self._numbers = {symbol: number for number, symbol in enumerate(symbols)}
        self._context = context
        self._pieces = regex.compile(PIECE, regex.IGNORECASE)
        self._spaces = regex.compile(r"\s+")
        self._encode_piece = lru_cache(CACHED)(self._merge)

    def encode(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """Return the tokens [M, context] of M texts: start, text, end, zeros; texts too long are cut."""
        tokens = np.zeros((len(texts), self._context), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            found = [self.start]
            for piece in self._pieces.findall(self._clean(text)):
                found += self._encode_piece(piece)
            found = [*found[: self._context - 1], self.end]
            row[: len(found)] = found
        return tokens

    def _clean(self, text: str) -> str:
        """Mend wrong encodings and entities of HTML, and leave single spaces and small letters."""
        if "&" in text or not (text.isascii() and text.isprintable()):  # others ftfy leaves as they are
            import ftfy

            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return str(self._spaces.sub(" ", text.strip()).strip().lower())

    def _merge(self, piece: str) -> tuple[int, ...]:
        """Return the tokens of a piece: its bytes, merged pair by pair, the lowest rank first."""
        if piece in (START, END):
            return (self.start if piece == START else self.end,)
        symbols = [self._letters[byte] for byte in piece.encode()]
        symbols[-1] += WORD_END
        while len(symbols) > 1:
            pair = min(pairwise(symbols), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if pair not in self._ranks:
                break
            merged: list[str] = []
            place = 0
            while place < len(symbols):
                both = tuple(symbols[place : place + 2]) == pair
                merged.append("".join(pair) if both else symbols[place])
                place += 1 + both
            symbols = merged
        return tuple(self._numbers[symbol] for symbol in symbols)


def load_tokenizer(context: int = CONTEXT) -> Tokenizer:
    """Return CLIP's tokenizer, with the vocabulary of the manifest; that is fetched where it is not here.

    Raises CheckpointError when it cannot be had or is damaged, CacheError when it cannot be kept.
    """
    return Tokenizer(read_merges(find_checkpoint(VOCABULARY)[0]), context)


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Return the merges that CLIP uses of OpenAI's vocabulary file; raises CheckpointError for another file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : MERGES + 1]  # the first line is a header
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _unusable(path, f"cannot be read as gzipped UTF-8 ({error})") from None
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines) if first and second]
    if len(merges) < MERGES:
        raise _unusable(path, f"has {len(merges)} merges where CLIP uses {MERGES}")
    return merges


def _byte_letters() -> dict[int, str]:
    """Return the letter of every byte, those that stand for themselves first, as the vocabulary numbers them."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    letters = {byte: chr(byte) for byte in PRINTABLE}
    return letters | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _unusable(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}; it is no vocabulary of CLIP or damaged. Bring it again: "
        f"rm '{path}' && zsad-export --fetch {VOCABULARY}"
    )
