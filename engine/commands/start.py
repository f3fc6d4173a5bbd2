"""Where the commands begin. Ctrl-C is one line from here on, so nothing slow is imported before it is caught."""

import signal
import sys
from importlib import import_module

INTERRUPTED = 130  # the exit code


def infer() -> int:
    """Run `zsad-infer`."""
    return _start("zsad-infer", "infer")


def evaluate() -> int:
    """Run `zsad-eval`."""
    return _start("zsad-eval", "evaluate")


def export() -> int:
    """Run `zsad-export`."""
    return _start("zsad-export", "export")


def _start(command: str, module: str) -> int:
    try:
        code: int = import_module(f"{__package__}.{module}").main()
        at_exit = signal.SIG_IGN  # everything is done
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        code, at_exit = INTERRUPTED, signal.SIG_DFL  # a second one ends what does not let go
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, at_exit)  # the interpreter would answer with a traceback while it is taken down
    return code
