"""The kinds of files that results are written as. Imports nothing that `--help` would wait for."""

from typing import Literal, get_args

Format = Literal["zsad", "rayan"]
FORMATS: tuple[Format, ...] = get_args(Format)
