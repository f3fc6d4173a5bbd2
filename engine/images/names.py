"""Names of results: no two images, and no file and folder, share one, and none is too long for a file system."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

# Longer names leave no room for what the results append to them; file systems take 255 bytes.
LONGEST_NAME = 200
# Folders so named could stand where a result file must go; names that look marked are marked too, to stay distinct.
_AMBIGUOUS_FOLDER = re.compile(r"\.(tiff|jpg|csv|json)$", re.IGNORECASE)
_MARKED = re.compile(r"~[0-9a-f]{8}$")


def result_keys(relatives: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Choose the names that results are kept under, so that no two images and no file and folder share one."""
    stems = Counter(str(relative.with_suffix("")).casefold() for relative in relatives)
    whole = {str(relative).casefold() for relative in relatives}
    keys = []
    for relative in relatives:
        stem = str(relative.with_suffix("")).casefold()
        key = relative.with_suffix("") if stems[stem] == 1 and stem not in whole else relative
        folders = [_marked(name) if _AMBIGUOUS_FOLDER.search(name) else shortened(name) for name in key.parent.parts]
        keys.append(PurePosixPath(*folders, shortened(key.name)))
    return keys


def shortened(name: str) -> str:
    """Return a name, cut and marked with a digest where it is too long."""
    return _marked(name) if len(os.fsencode(name)) > LONGEST_NAME or _MARKED.search(name) else name


def _marked(name: str) -> str:
    encoded = os.fsencode(name)
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: LONGEST_NAME - 9].decode('utf-8', 'ignore')}~{digest}"
