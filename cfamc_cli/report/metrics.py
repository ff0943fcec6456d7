"""A run's metrics in the forms that dashboards and spreadsheets read. Never imports torch."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from cfamc_cli.errors import missing_library
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


def events(lines: Iterable[MetricLine], *, began: float) -> bytes:
    """Records as a TensorBoard event file: a scalar kind/key for each number, at the step of its record.

    Args:
        lines: Those of metrics.jsonl.
        began: Seconds since 1970 that every event bears, for the records hold no times.

    Raises:
        CfamcError: Exit 2; tensorboard is missing.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise missing_library("--metrics tensorboard needs tensorboard", extra="tensorboard") from error
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
    for kind, rows in by_kind(lines).items():
        for row in rows:
            summary = Summary(
                value=[
                    Summary.Value(tag=f"{kind}/{key}", simple_value=value)
                    for key, value in row.items()
                    if key != "step" and isinstance(value, int | float)
                ]
            )
            writer.write(Event(wall_time=began, step=row["step"], summary=summary).SerializeToString())
    writer.flush()
    return buffer.getvalue()
