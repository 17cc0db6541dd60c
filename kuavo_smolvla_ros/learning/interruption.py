"""SIGINT and SIGTERM ask for an end; the loop ends where it can be continued."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Which signal has asked for an end, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # A second Ctrl-C must end a run that hangs.
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Catch both signals while the block runs; the same signal a second time ends the process at once."""
    asked = Interruption()
    before = {number: signal.signal(number, asked._ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
