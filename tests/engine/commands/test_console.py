"""Signals as commands take them."""

import signal
from collections.abc import Iterator

import pytest

from zsad.engine.commands.console import Interrupts

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    before = [signal.signal(*unhandled) for unhandled in Interrupts.UNHANDLED]
    yield
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_either_signal_ends_a_command_and_is_remembered(number: signal.Signals) -> None:
    with Interrupts() as interrupts:
        interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert [(number, signal.getsignal(number)) for number in BOTH] == list(Interrupts.UNHANDLED)


@pytest.mark.parametrize("number", BOTH)
def test_what_the_caller_ignores_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        interrupts.check()
    assert signal.getsignal(number) is signal.SIG_IGN
