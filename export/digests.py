"""What the manifest knows files by: their sha256, the beginning of it, git's id of their content, or their md5."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zsad.kernels.files import file_sha256, remembered_fact


def git_blob(path: Path) -> str:
    """Return the id of a file's content in a git repository, as `git hash-object` prints it."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def md5(path: Path) -> str:
    """Return the md5 of a file: against damage and mix-ups alone, since others with the same one can be made."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


# By the manifest's keys: what it is called, how many digits it has, what computes it.
KINDS: dict[str, tuple[str, int, Callable[[Path], str]]] = {
    "sha256": ("sha256", 64, file_sha256),
    "git_blob": ("git blob id", 40, git_blob),
    "md5": ("md5", 32, md5),
}

# The beginning of a digest, as an md5, guards against damage and mix-ups, not against malice: whoever wants to finds
# another file with the same eight digits. Fewer would not even do against the former.
FEWEST_DIGITS = 8


@dataclass(frozen=True)
class Digest:
    """A digest that a file must have; raises ValueError where the digits are too few, too many or not hexadecimal."""

    kind: str  # of KINDS
    digits: str  # hexadecimal; the first of them where no more are known

    def __post_init__(self) -> None:
        name, length, _ = KINDS[self.kind]
        if not re.fullmatch(f"[0-9a-f]{{{FEWEST_DIGITS},{length}}}", self.digits):
            raise ValueError(
                f"{self.digits!r} is no {name}: that has {length} hexadecimal digits in lower case, of which at least "
                f"the first {FEWEST_DIGITS} must be given"
            )

    def __str__(self) -> str:
        name, length, _ = KINDS[self.kind]
        return f"{name} {self.digits}{'…' if len(self.digits) < length else ''}"

    def of(self, path: Path) -> str:
        """Return the digest of this kind that a file has; of a file that stays as it is it is computed once."""
        return remembered_fact(path, self.kind, KINDS[self.kind][2])

    def problem(self, found: str) -> str | None:
        """Return what is wrong with a digest that was found, None where it fits."""
        name = KINDS[self.kind][0]
        expected = str(self).removeprefix(name + " ")
        return None if found.startswith(self.digits) else f"{name} is {found}, expected {expected}"
