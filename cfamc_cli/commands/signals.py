"""SIGINT and SIGTERM: work under way finishes its step and saves; a second signal ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A signal ended the work; what was saved can be resumed.

    Attributes:
        signal: Its number.
        hint: One line with the way on; empty where nothing is left to go on with.
        details: Plain JSON values for `--json`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number
        self.hint = ""
        self.details: dict[str, object] = {}


class Signals:
    """What has arrived, and whether work under way asks to be told instead of being cut."""

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal only sets `received`; the second raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def pending(self) -> int:
        """The signal that arrived, or 0."""
        return self.received

    def _arrive(self, number: int, _frame: FrameType | None) -> None:
        if self.received or not self._deferred:
            raise Interrupted(number)
        self.received = number


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Turn SIGINT and SIGTERM into `Interrupted`, or into a request to stop where that is deferred."""
    signals = Signals()
    before = {number: signal.signal(number, signals._arrive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
