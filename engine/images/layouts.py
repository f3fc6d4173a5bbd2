"""What names of files and folders say in the layouts that data sets come in: splits, normal images, masks.

    MVTec AD           <category>/test/{good,<defect>}/000.png, ground_truth/<defect>/000_mask.png
    MVTec LOCO         the same, with ground_truth/<defect>/000/{000,001}.png: one file for each region
    MVTec AD 2         <category>/{test_public,test_private,…}/000.png, test_public/ground_truth/bad/000_mask.png
    VisA               <category>/Data/{Images,Masks}/{Normal,Anomaly}/000.JPG, or as MVTec AD without `_mask`
    BTAD               <category>/test/{ok,ko}/0000.bmp, ground_truth/ko/0000.png
    KolektorSDD        <category>/Part0.jpg and Part0_label.bmp beside it
    anomalib's Folder  {good,<defect>,mask/<defect>}/000.png

Names are compared without regard to case and Unicode form.
"""

import re
import unicodedata
from pathlib import PurePosixPath

# A folder that holds the images of a split; only those of a test are scored where there are any.
_TEST = re.compile(r"test(ing)?([ _-](public|private)([ _-]\w+)?)?")
_TRAINING = re.compile(r"train(ing)?")
_VALIDATION = re.compile(r"val(id(ation)?)?")
_NORMAL = re.compile(
    r"(good|ok|okay|normal|nominal|non[ _-]?defective|(defect|anomaly)[ _-]?free|no[ _-]?(defect|anomaly)s?)"
    r"([ _-](train|test|val)\w*)?"
)
MASK_FOLDERS = ("ground_truth", "masks", "gt", "labels", "annotations")  # by how likely they hold what is wanted
_MASKS = re.compile(r"ground[ _-]?truths?|masks?|gt|labels?|annotations?")
MASK_NAMES = ("mask", "label", "gt")  # at the end of a stem, likewise
_MASK_SUFFIX = re.compile(r"[ _-](mask|label|gt|ground[ _-]?truth)$")
_IMAGES = re.compile(r"data|images?|imgs?|rgb")  # a level of its own that says nothing of what is in the images

# What operating systems and storage boxes leave in folders; all names with a dot in front are left out as well.
_SYSTEM = frozenset(
    {
        "@eadir",
        "@recycle",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "__macosx",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    }
)


def fold(name: str) -> str:
    """Return a name in the form that names are compared in."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def is_hidden(name: str) -> bool:
    """Tell files and folders that are there for the system and no part of the data."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def is_test(name: str) -> bool:
    return _TEST.fullmatch(fold(name)) is not None


def is_training(name: str) -> bool:
    return _TRAINING.fullmatch(fold(name)) is not None


def is_split(name: str) -> bool:
    return is_test(name) or is_training(name) or _VALIDATION.fullmatch(fold(name)) is not None


def is_normal(name: str) -> bool:
    """Tell a folder of normal images from one of defects."""
    return _NORMAL.fullmatch(fold(name)) is not None


def holds_masks(name: str) -> bool:
    return _MASKS.fullmatch(fold(name)) is not None


def holds_images(name: str) -> bool:
    """Tell a folder that only says that images are in it, such as VisA's `Data` and `Images`."""
    return _IMAGES.fullmatch(fold(name)) is not None


def mask_stem(stem: str) -> str | None:
    """Return the folded stem of the image that a file named like a mask belongs to, None for any other name."""
    folded = fold(stem)
    short = _MASK_SUFFIX.sub("", folded)
    return short if short and short != folded else None


def folded_key(path: PurePosixPath) -> tuple[str, ...]:
    """Return the folded folders and stem of a file, by which images and masks are brought together."""
    *folders, stem = path.with_suffix("").parts
    return (*(fold(name) for name in folders if not holds_images(name)), fold(stem))


def preference(path: PurePosixPath) -> tuple[int, int]:
    """Order the masks of one image: by folder as in MASK_FOLDERS, and by name as in MASK_NAMES, then all others."""
    folder = next((fold(part) for part in path.parts if holds_masks(part)), MASK_FOLDERS[0])
    rank = next(n for n, name in enumerate(MASK_FOLDERS) if name[:4] == folder[:4])
    stem = fold(path.stem)
    return rank, next((n for n, name in enumerate(MASK_NAMES) if stem.endswith(name)), len(MASK_NAMES))
