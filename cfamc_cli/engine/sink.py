"""How the engine speaks: it talks to a person and writes to a ledger, and knows neither terminals nor files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cfamc_cli.store.records import MetricLine, TimingLine


class Talk(Protocol):
    """The person who listens to the engine."""

    def message(self, text: str) -> None:
        """Say one line to the person."""

    def warning(self, text: str) -> None:
        """Say one line that the person should not miss."""

    def progress(self, task: str, done: int, total: int, values: Mapping[str, float | str]) -> None:
        """Report that `done` of `total` units of `task` are finished; `values` is shown beside it, text as it is."""


class Ledger(Protocol):
    """The records that a training leaves."""

    def metrics(self, line: MetricLine) -> None:
        """Append one line that repeats bit for bit when the work is repeated."""

    def timing(self, line: TimingLine) -> None:
        """Append one line of rates, memory and wall time."""

    def positions(self) -> Mapping[str, object]:
        """Make every record durable and return where each record file ends, as JSON values."""


class NullTalk:
    """Nobody listens."""

    def message(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        pass

    def progress(self, task: str, done: int, total: int, values: Mapping[str, float | str]) -> None:
        pass


class NullLedger:
    """Nothing is kept."""

    def metrics(self, line: MetricLine) -> None:
        pass

    def timing(self, line: TimingLine) -> None:
        pass

    def positions(self) -> Mapping[str, object]:
        return {}
