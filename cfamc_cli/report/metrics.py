"""A run's metrics in the forms that dashboards and spreadsheets read. Never imports torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from cfamc_cli.report.sheets import csv_text
from cfamc_cli.store.records import MetricLine

Row: TypeAlias = Mapping[str, object]


def by_kind(lines: Iterable[MetricLine]) -> dict[str, list[Row]]:
    """What was measured, under the name of its kind."""
    kinds: dict[str, list[Row]] = {}
    for line in lines:
        kinds.setdefault(line.kind, []).append(line.model_dump(exclude_none=True, exclude={"kind"}))
    return kinds


def comma_separated(rows: Sequence[Row]) -> bytes:
    """Records as CSV, a column for each key; numbers that are not finite are nan, inf and -inf."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = ([_cell(row.get(column, "")) for column in columns] for row in rows)
    return csv_text(columns, cells).encode("utf-8", "backslashreplace")


def _cell(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def scalars(line: MetricLine) -> dict[str, float]:
    """The numbers of a record but its step, as dashboards call them: kind/key."""
    told = line.model_dump(exclude_none=True, exclude={"kind", "step"})
    return {f"{line.kind}/{key}": value for key, value in told.items() if isinstance(value, int | float)}


class EventFile:
    """A TensorBoard event file that grows by one event for each record, at its step.

    Args:
        folder: Where it is made, beside others: what those hold from the first step of this one on counts no more.
        began: Seconds since 1970 that every event bears; None for the time of each.

    Raises:
        ImportError: tensorboard is missing.
    """

    def __init__(self, folder: Path, *, began: float | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._began, self._first = Event, Summary, began, True
        self._start = SessionLog(status=SessionLog.START)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.time() if began is None else began
        self._file = (folder / f"events.out.tfevents.{start:.6f}.cfamc").open("xb")
        self._writer = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")

    def write(self, line: MetricLine) -> None:
        """Append a record."""
        if self._first:
            self._add(step=line.step, session_log=self._start)
        self._first = False
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line).items()]
        self._add(step=line.step, summary=self._summary(value=values))
        self._writer.flush()

    def _add(self, **event: object) -> None:
        at = time.time() if self._began is None else self._began
        self._writer.write(self._event(wall_time=at, **event).SerializeToString())

    def close(self) -> None:
        """No more records come."""
        self._file.close()
