"""What the commands share on a terminal: log lines, what stops them, and progress bars."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from zsad.kernels.files import printable

from .start import INTERRUPTED, Interrupts

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("zsad")

DONE, SOME_FAILED, USAGE, REJECTED = 0, 1, 2, 3  # exit codes, beside INTERRUPTED


class _Formatter(logging.Formatter):
    """Keeps names of files from steering the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


@contextmanager
def logging_to_stderr(command: str, level: int) -> Iterator[None]:
    """Send the library's log lines and warnings to standard error, each with the command's name in front.

    Where only errors are wanted, what native libraries write there by themselves goes nowhere: it names no file.
    """
    with _without_libraries() if level >= logging.ERROR else nullcontext(), _logging(command, level):
        yield


@contextmanager
def _without_libraries() -> Iterator[None]:
    sys.stderr.flush()
    before, encoding, kept = sys.stderr, sys.stderr.encoding, os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        if before is sys.__stderr__:
            sys.stderr = os.fdopen(os.dup(kept), "w", 1, encoding, "backslashreplace")
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _logging(command: str, level: int) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"{command}: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    before = log.level
    log.setLevel(level)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be Unicode
    with warnings.catch_warnings():
        # Pillow warns of large images and odd headers; what it cannot read it raises.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.showwarning = lambda message, *_: log.warning("%s", message)
        try:
            yield
        finally:
            log.setLevel(before)


def guarded(
    command: str,
    level: int,
    run: Callable[[Interrupts], int],
    explain: Callable[[Exception], tuple[str, int] | None],
    go_on: Callable[[], str] = str,
) -> int:
    """Run a command and return its exit code; what stops it becomes one line.

    explain: returns what to say of an exception and the exit code, or None for a fault of zsad itself, which is raised.
    go_on: returns what to say after an interruption; it imports nothing, since libraries may not have been loaded yet.
    """
    with logging_to_stderr(command, level), Interrupts() as interrupts:
        try:
            return run(interrupts)
        except BaseException as error:
            interrupts.over = True
            if interrupts.seen or isinstance(error, KeyboardInterrupt):
                log.error("interrupted%s", go_on())
                return INTERRUPTED
            said = explain(error) if isinstance(error, Exception) else None
            if said is None:
                raise
            log.error("%s", said[0])
            return said[1]


class ProgressBars:
    """One bar per stage of a category on standard error, where that is a terminal."""

    def __init__(self, quiet: bool, interrupts: Interrupts) -> None:
        self.interrupts = interrupts
        self.disabled = quiet or not sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.shown = ("", "")

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, category: str, stage: str, done: int, total: int) -> None:
        self.interrupts.check()
        if self.disabled:
            return
        if self.bar is None or (category, stage) != self.shown:
            self.__exit__()
            self.bar, self.shown = None, (category, stage)
            if not total:
                return
            counted = {
                "headers": "image",
                "networks": "image",
                "categories": "category",
                "bank": "patch",
                "export": "image",
                "regions": "image",
            }  # by the first words of stages
            unit = counted.get(stage.split(" ")[0], "pair")
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=f"{category}: {stage}", unit=unit, file=sys.stderr, leave=False)
        self.bar.update(done - self.bar.n)
        if done >= total:  # log lines may follow
            self.__exit__()


def emit(text: str) -> None:
    """Print to standard output, to a terminal without what would steer it; raises OSError when that is full or gone."""
    if sys.stdout.isatty():
        text = printable(text, keep="\n")
    try:
        print(text, flush=True)
    except OSError as error:
        # The interpreter writes what is left once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from None
