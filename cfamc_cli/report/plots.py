"""Pictures of a comparison, by matplotlib (the `plots` extra): no window, no state, no text taken for mathematics."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from cfamc_cli.comparison.gather import LeftOut
from cfamc_cli.comparison.statistics import Figure
from cfamc_cli.comparison.tables import ComparedTable, Row, exact_number
from cfamc_cli.errors import CfamcError, invalid, missing_library
from cfamc_cli.report.terminal import clean
from cfamc_cli.store.records import EvaluationLine, MetricLine, TrainLine, read_metrics
from cfamc_cli.store.runs import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#000000", "#8C6D31", "#7B4173", "#31A354"),
)
MOST_LINES = len(_COLOURS)  # rows that a picture shows as lines or names
_CLEAN = "clean accuracy (%)"
_FRONT, _BY_EPS, _BY_TIME = "Clean against robust accuracy", "Accuracy against eps", "Accuracy against training time"
_LOSS, _ACCURACY = "Training loss", "Online accuracy while training"
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 7,
    "legend.framealpha": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "cfamc",
    "text.parse_math": False,
}
Panel: TypeAlias = "Callable[[Axes], None]"
Look: TypeAlias = tuple[str, str]  # name in the legend, colour
Line: TypeAlias = Sequence[tuple[float, float]]
Lines: TypeAlias = Mapping[str, Sequence[Line]]  # by row; several seeds have a line each
Curves: TypeAlias = Mapping[str, Lines]  # by title


def learning_curves(tables: Sequence[ComparedTable], folders: Mapping[str, RunFolder]) -> tuple[Curves, list[LeftOut]]:
    """Read the learning curves of the rows that pictures name, and tell which cannot be drawn."""
    curves: dict[str, dict[str, list[Line]]] = {_LOSS: {}, _ACCURACY: {}}
    left_out: list[LeftOut] = []
    leading = _leading(tables)
    for row in leading.rows[:MOST_LINES] if leading else ():
        for run in {entry.run.id: entry.run for entry in row.entries}.values():
            try:
                imported = run.family == run.id  # and not trained here
                lines = [] if imported else read_metrics(folders[run.id].metrics)
            except CfamcError as error:
                left_out.append((run.id, f"no learning curves: {error.message}"))
                continue
            for title, curve in _points(lines).items():
                if len(curve) > 1:
                    curves[title].setdefault(row.label, []).append(curve)
    return curves, list(dict.fromkeys(left_out))


def _points(lines: Sequence[MetricLine]) -> dict[str, Line]:
    losses = [(line.epoch, line.loss) for line in lines if isinstance(line, TrainLine)]
    shares = [(line.epoch, 100 * line.clean / line.n) for line in lines if isinstance(line, EvaluationLine)]
    return {_LOSS: [point for point in losses if math.isfinite(point[1])], _ACCURACY: shares}  # a lost step has no loss


def panels(tables: Sequence[ComparedTable], curves: Curves) -> dict[str, Panel]:
    """Return the panels that there are numbers for, by title."""
    leading = _leading(tables)
    if leading is None:
        return {}
    made: dict[str, Panel] = {}
    looks = _looks(leading.rows)
    if leading.condition.attack:
        made[_FRONT] = partial(_scatter, table=leading, looks=looks)
    if by_eps := _eps_curves(tables, leading):
        made[_BY_EPS] = partial(
            _lines, lines=by_eps, looks=looks, title=_BY_EPS, labels=("eps (255ths)", "accuracy (%)"), marker="o"
        )
    for title, lines in curves.items():
        if lines:
            unit = "loss" if title == _LOSS else _CLEAN
            made[title] = partial(_lines, lines=lines, looks=looks, title=title, labels=("epoch", unit), marker="")
    made[_BY_TIME] = partial(_time, table=leading, looks=looks)
    return made


def _leading(tables: Sequence[ComparedTable]) -> ComparedTable | None:
    """The table that is drawn: the first under attack, else the first."""
    return next((table for table in tables if table.condition.attack), tables[0] if tables else None)


def _looks(rows: Sequence[Row]) -> dict[str, Look]:
    """A name and a colour for each of the first rows, the same in all panels; a name that is not unique is an id."""
    names = [row.run.name if len(row.entries) == 1 else row.label for row in rows[:MOST_LINES]]
    told = [name if names.count(name) == 1 else row.label for row, name in zip(rows, names, strict=False)]
    labels = [f" {clean(name)[:60]}" for name in told]  # a legend hides those that begin with an underscore
    return {row.label: (name, colour) for row, name, colour in zip(rows, labels, _COLOURS, strict=False)}


def draw(drawn: Sequence[Panel], suffix: str) -> bytes:
    """Draw panels beside and below each other, with one legend, in the format of a suffix: .png, .svg or .pdf.

    Raises:
        CfamcError: There is nothing to draw, or matplotlib is missing.
    """
    if not drawn:
        raise invalid("there is nothing to draw")
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise missing_library("pictures need matplotlib", extra="plots") from error
    columns = min(2, len(drawn))
    lines = -(-len(drawn) // columns)
    with matplotlib.rc_context(_STYLE):
        canvas: Canvas = Canvas(figsize=(6.2 * columns, 4.2 * lines + 0.4), layout="constrained")
        known: dict[str, Any] = {}
        for index, panel in enumerate(drawn, start=1):
            axes = canvas.add_subplot(lines, columns, index)
            panel(axes)
            handles, labels = axes.get_legend_handles_labels()
            known = {**dict(zip(labels, handles, strict=True)), **known}
        if known:
            canvas.legend(known.values(), known.keys(), loc="outside lower center", ncols=2 * columns)
        out = io.BytesIO()
        metadata = {} if suffix == ".png" else {"Date" if suffix == ".svg" else "CreationDate": None}
        canvas.savefig(out, format=suffix[1:], dpi=150, metadata=metadata)
    return out.getvalue()


def _scatter(axes: Axes, *, table: ComparedTable, looks: Mapping[str, Look]) -> None:
    for row in table.rows:
        if row.robust is not None:
            _point(axes, row, looks, x=100 * row.clean.value, figure=row.robust, x_bars=_bars(row.clean))
    front = sorted((100 * row.clean.value, 100 * row.robust.value) for row in table.rows if row.front and row.robust)
    if len(front) > 1:  # to the left of each point nothing better is known
        axes.plot(*zip(*front, strict=True), "--", drawstyle="steps-pre", color="0.6", linewidth=1, zorder=0)
    robust = f"robust accuracy (%), {_attack(table)}"
    axes.set(xlabel=_CLEAN, ylabel=robust, title=_FRONT)


def _time(axes: Axes, *, table: ComparedTable, looks: Mapping[str, Look]) -> None:
    for row in table.rows:
        minutes = row.seconds / 60
        _point(axes, row, looks, x=minutes, figure=row.clean, hollow=True)
        if row.robust is not None:
            _point(axes, row, looks, x=minutes, figure=row.robust)
    shown = f"accuracy (%): clean hollow, robust filled\n{_attack(table)}" if table.condition.attack else _CLEAN
    axes.set(xlabel="training time (min)", ylabel=shown, title=_BY_TIME)
    axes.set_xlim(0, 1.05 * axes.dataLim.x1 or 1)


def _point(
    axes: Axes,
    row: Row,
    looks: Mapping[str, Look],
    *,
    x: float,
    figure: Figure,
    x_bars: list[list[float]] | None = None,
    hollow: bool = False,
) -> None:
    """A row with its 95 % interval, or the standard deviation over seeds; the first rows have names."""
    name, colour = looks.get(row.label, (None, "0.75"))
    axes.errorbar(
        x,
        100 * figure.value,
        xerr=x_bars,
        yerr=_bars(figure),
        fmt="o",
        markersize=5 if name else 2,
        markerfacecolor="white" if hollow else colour,
        elinewidth=1 if name else 0.3,
        capsize=2 if name else 0,
        label=None if hollow else name,
        color=colour,
        zorder=2 if name else 1,
    )


def _bars(figure: Figure) -> list[list[float]]:
    if figure.low is None or figure.high is None:
        return [[100 * (figure.std or 0)]] * 2
    return [[100 * max(0.0, figure.value - figure.low)], [100 * max(0.0, figure.high - figure.value)]]


def _eps_curves(tables: Sequence[ComparedTable], leading: ComparedTable) -> dict[str, list[Line]]:
    """Accuracy by eps in 255ths, for rows that the leading table's attack met at two sizes or more; clean at 0."""
    curves: dict[str, dict[float, float]] = defaultdict(dict)
    for table in tables:
        eps = exact_number(table.condition.eps)
        if eps is None or replace(table.condition, eps="") != replace(leading.condition, eps=""):
            continue
        for row in table.rows:
            if row.robust is not None:
                curves[row.label] |= {0.0: 100 * row.clean.value, 255 * eps: 100 * row.robust.value}
    return {label: [sorted(curve.items())] for label, curve in curves.items() if len(curve) > 2}


def _lines(
    axes: Axes, *, lines: Lines, looks: Mapping[str, Look], title: str, labels: tuple[str, str], marker: str
) -> None:
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    for label, seeds in lines.items():
        name, colour = looks.get(label, (None, ""))
        for index, points in enumerate(seeds if name else ()):
            axes.plot(
                *zip(*points, strict=True),
                marker=marker,
                markersize=4,
                linewidth=1.4 if len(seeds) == 1 else 0.7,
                label=name if index == 0 else None,
                color=colour,
            )
    if title == _BY_EPS:
        axes.set_ylim(bottom=0)


def _attack(table: ComparedTable) -> str:
    condition = table.condition
    return f"{clean(condition.attack)[:20]} {condition.norm} {clean(condition.eps)[:12]}"
