"""Runs a command in a child where `ulimit -v` bounds its memory: libraries that get none crash in ways of their own."""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from types import FrameType

from zsad.engine.address_space import is_scarcity, said_scarcity
from zsad.kernels.machine import tell_allocator

INTERRUPTED, USAGE = 130, 2  # exit codes
THREAD_STACK = 2 << 20  # bytes of address space; eight are usual
M_ARENA_MAX = -8  # of glibc's mallopt


def supervised(command: str, limit: int, run: Callable[[], int]) -> int:
    """Return the exit code of a command that a child runs; where it fails for want of memory, say so in one line.

    limit: bytes of address space. What libraries print is held back until the child ends, and dropped with a crash.
    Signals go on to the child, which ends with its parent.
    """
    report, to_report = os.pipe()
    held, hold = os.pipe()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            os.close(report)
            os.close(hold)
            _divert_libraries(said.fileno())
            _save_address_space()
            threading.Thread(target=_end_with_parent, args=(held,), daemon=True).start()
            return _reported(run, to_report)
        os.close(to_report)
        os.close(held)
        signals: list[int] = []

        def forward(number: int, frame: FrameType | None) -> None:
            signals.append(number)
            os.kill(child, number)

        handled = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = [signal.signal(number, forward) for number in handled]
        _, status = os.waitpid(child, 0)
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
        code = os.read(report, 1)
        os.close(report)
        os.close(hold)
        if code:
            said.seek(0)
            os.write(2, said.read())
            return code[0]
    if signals and os.WIFSIGNALED(status):
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"{command}: {said_scarcity(limit)}", file=sys.stderr)
    return USAGE


def _divert_libraries(file: int) -> None:
    """Leave standard error to Python, and send there what libraries write to it."""
    os.setpgid(0, 0)  # so that Ctrl-C reaches the child once, through its parent
    sys.stderr = os.fdopen(os.dup(2), "w", 1, encoding=sys.stderr.encoding, errors="backslashreplace")
    os.dup2(file, 2)


def _save_address_space() -> None:
    """Give threads small stacks, and one heap to share: glibc keeps 64 MB of addresses for each thread's own."""
    threading.stack_size(THREAD_STACK)
    tell_allocator(M_ARENA_MAX, 1)


def _end_with_parent(held: int) -> None:
    os.read(held, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _reported(run: Callable[[], int], report: int) -> int:
    """Run a command and report its exit code, unless it fails for want of memory."""
    try:
        code = run()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        os.write(report, bytes([code]))
        raise
    except BaseException as error:
        if is_scarcity(error):
            os._exit(USAGE)
        os.write(report, b"\1")
        raise
    os.write(report, bytes([code]))
    return code
