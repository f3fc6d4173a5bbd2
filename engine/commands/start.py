"""Where the commands begin. Ctrl-C is one line from here on, so nothing slow is imported before it is caught."""

import atexit
import os
import signal
import sys
import threading
from functools import partial
from importlib import import_module
from types import FrameType

from zsad.engine.address_space import address_limit

INTERRUPTED = 130  # the exit code


class Interrupts:
    """Ends a command through its clean-up at Ctrl-C and SIGTERM, each a KeyboardInterrupt; within another one, is that.

    It is remembered: an exception that a signal raises inside a finalizer is dropped by the interpreter. While a
    library loads it is put off: an exception would be dropped there as well, called a missing library, or crash it.
    """

    UNHANDLED = ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    AGAIN = 0.01  # seconds until it is looked whether libraries are still loading

    def __init__(self) -> None:
        self.seen = False
        self.over = False  # all is cleaned up, there is nothing left to interrupt
        self.waits = False  # the first one is only remembered, for whoever looks at `seen` and ends by itself
        self.later = threading.Timer(0, os.kill)

    def __enter__(self) -> "Interrupts":
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Where the caller ignores a signal, or handles it, that stays so.
        self.installed = {s: h for s, h in self.UNHANDLED if in_main_thread and signal.getsignal(s) is h}
        self.report_dropped, sys.unraisablehook = sys.unraisablehook, self._dropped
        for number in self.installed:
            signal.signal(number, self._note)
        outer = (getattr(signal.getsignal(number), "__self__", None) for number, _ in self.UNHANDLED)
        return next((other for other in outer if isinstance(other, Interrupts)), self)

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.later.cancel()
        if self.later.ident is not None:
            self.later.join()  # what it is about to send arrives while it is ignored
        for number, handler in self.installed.items():
            signal.signal(number, handler)
        sys.unraisablehook = self.report_dropped

    def _dropped(self, dropped: "sys.UnraisableHookArgs") -> None:
        """Say nothing of an interrupt that the interpreter drops: it is remembered."""
        if not (self.seen and issubclass(dropped.exc_type, KeyboardInterrupt)):
            self.report_dropped(dropped)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            return
        first, self.seen = not self.seen, True
        if first and self.waits:
            return
        if not _loading(frame):
            self.check()
        self.later.cancel()
        self.later = threading.Timer(self.AGAIN, os.kill, (os.getpid(), number))
        self.later.start()

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one before; called wherever a command gets on."""
        if self.seen:
            self.later.cancel()
            raise KeyboardInterrupt


def _loading(frame: FrameType | None) -> bool:
    """Tell whether a frame belongs to an import that a command has begun."""
    while frame is not None and frame.f_code is not _run.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def infer() -> int:
    """Run `zsad-infer`."""
    return ended(_start("zsad-infer", "infer"))


def evaluate() -> int:
    """Run `zsad-eval`."""
    return ended(_start("zsad-eval", "evaluate"))


def export() -> int:
    """Run `zsad-export`."""
    return ended(_start("zsad-export", "export"))


def ended(code: int) -> int:
    """End the process with a command's exit code, as soon as all is written; what is to end otherwise gets it back.

    The interpreter would first take modules and arrays down one by one, which takes longer than writing the results of
    an image. Where a thread still works, or something cannot be written, it is left to it.
    """
    if threading.active_count() == 1:
        atexit._run_exitfuncs()
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            return code
        os._exit(code)
    return code


def _start(command: str, module: str) -> int:
    limit = address_limit()
    if limit is None:
        return _run(command, module)
    from .scarce import supervised

    return supervised(command, limit, partial(_run, command, module))


def _run(command: str, module: str) -> int:
    # Looking for plugins, of which zsad has none, reads what every installed package says of itself.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        with Interrupts():
            code: int = import_module(f"{__package__}.{module}").main()
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        code = INTERRUPTED
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # The interpreter would answer with a traceback while it is taken down. What was interrupted and does not let go
        # is ended by another one; otherwise all is done.
        signal.signal(signal.SIGINT, signal.SIG_DFL if code == INTERRUPTED else signal.SIG_IGN)
    return code
