"""A run's metrics in the forms that dashboards and spreadsheets read. Never imports torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence

from cfamc_cli import render
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.store import slug


def by_kind(lines: Iterable[Mapping[str, object]]) -> dict[str, list[dict[str, object]]]:
    """The records under the name of their kind, each with the numbers that JSON could not hold put back."""
    kinds: dict[str, list[dict[str, object]]] = {}
    for line in lines:
        row = {key: value for key, value in line.items() if key not in ("kind", "nonfinite")}
        nonfinite = line.get("nonfinite")
        if isinstance(nonfinite, dict):
            row |= {key: value for key, value in nonfinite.items() if value in ("nan", "inf", "-inf")}
        kinds.setdefault(slug(str(line.get("kind", "metrics"))), []).append(row)
    return kinds


def comma_separated(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Records as CSV, a column for each key; text that a spreadsheet would run is quoted for it."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(column) for column in columns])
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case "-inf":  # a number that JSON could not hold
            return value
        case str():
            shown = render.clean(value)
            return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
        case _:
            return json.dumps(value)


def events(lines: Iterable[Mapping[str, object]], *, began: float) -> bytes:
    """Records as a TensorBoard event file: a scalar kind/key for each number, at the step of its record.

    Args:
        lines: Records of metrics.jsonl.
        began: Seconds since 1970 that every event bears, for the records hold no times.

    Raises:
        CfamcError: Exit 2; tensorboard is missing.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise CfamcError(
            "--metrics tensorboard needs tensorboard",
            hint="pip install 'cfamc[tensorboard]'",
            exit_code=ExitCode.INVALID,
        ) from error
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
    for kind, rows in by_kind(lines).items():
        for row in rows:
            step = row.get("step")
            values = {key: _scalar(value) for key, value in row.items() if key != "step"}
            summary = Summary(
                value=[
                    Summary.Value(tag=f"{kind}/{render.clean(key)}", simple_value=value)
                    for key, value in values.items()
                    if value is not None
                ]
            )
            place = step if isinstance(step, int) else 0
            writer.write(Event(wall_time=began, step=place, summary=summary).SerializeToString())
    writer.flush()
    return buffer.getvalue()


def _scalar(value: object) -> float | None:
    if isinstance(value, bool | int | float):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") and isinstance(value, str) else None
