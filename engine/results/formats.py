"""The kinds of files that results are written as. Imports nothing that `--help` would wait for."""

from collections.abc import Collection
from typing import Literal, get_args

Format = Literal["zsad", "rayan"]
"""What is written of each image as its score comes."""

Export = Literal[
    "mvtec-ad", "mvtec-loco", "mvtec-3d", "mvtec-ad2", "visa", "coco", "parquet", "parquet-8bit", "parquet-16bit"
]
"""What others read, each a folder of that name, made of the maps and records that `zsad` writes."""

EXPORTS: tuple[Export, ...] = get_args(Export)
FORMATS: tuple[str, ...] = (*get_args(Format), *EXPORTS)


def of_images(chosen: Collection[str]) -> list[Format]:
    """Return which formats are written image by image, of those chosen; what others are made of is among them."""
    wanted = {*chosen, *["zsad" for name in chosen if name in EXPORTS]}
    return [name for name in get_args(Format) if name in wanted]


def of_finished(chosen: Collection[str]) -> list[Export]:
    """Return which formats are made once all categories are finished, of those chosen."""
    return [name for name in EXPORTS if name in chosen]
