"""Values on the command line that several commands read. Imports nothing that `--help` would wait for."""

import argparse
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """Return what reads numbers separated by commas."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers separated by commas, not {text!r}") from None

    return parse


def size(text: str) -> int:
    """Read a number of bytes, for example 800MB or 4GiB; both count in powers of 1024."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    try:
        if match and match[0] == match[1]:
            raise argparse.ArgumentTypeError(f"needs a unit: {match[1]}GB or {match[1]}MB?")
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))  # type: ignore[index]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"must be a size like 800MB or 4GB, not {text!r}") from None


def location(text: str) -> Any:
    """Read a path or a URL, which is no path: there two slashes are one."""
    if "://" not in text and "::" not in text:
        return Path(text)
    from zsad.engine.images.remote import location as found

    return found(text)


def positive(text: str) -> float:
    """Read a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number


def add_file_limits(parser: argparse.ArgumentParser) -> None:
    """Add what a single image file may cost, by the names of `images.limits.Limits`."""
    parser.add_argument(
        "--max-megapixels",
        dest="megapixels",
        type=positive,
        metavar="N",
        help="larger images are named and left out (default: 178, as Pillow has it)",
    )
    parser.add_argument(
        "--file-timeout",
        dest="seconds",
        type=positive,
        metavar="SECONDS",
        help="files that take longer to read are named and left out (default: 20)",
    )


def file_limits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return those limits that are given."""
    return {name: value for name in ("megapixels", "seconds") if (value := getattr(arguments, name)) is not None}


def add_loudness(parser: argparse.ArgumentParser, verbose: str) -> None:
    """Add -v and -q, which `log_level` reads; verbose: what is said with -v."""
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help=verbose)
    loudness.add_argument("-q", "--quiet", action="store_true", help="errors only")


def log_level(arguments: argparse.Namespace) -> int:
    """Return the level from which on log lines are shown."""
    return logging.ERROR if arguments.quiet else logging.DEBUG if arguments.verbose else logging.INFO


class Parser(argparse.ArgumentParser):
    """A parser whose complaints, which quote names of files, do not steer the terminal."""

    def error(self, message: str) -> NoReturn:
        from zsad.kernels.files import printable

        super().error(printable(message))


class Version(argparse.Action):
    """Prints the version, which is only looked up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(f"zsad {importlib.metadata.version('zsad')}")
        parser.exit()
