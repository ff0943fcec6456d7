"""Pictures of a comparison, by matplotlib (the `plots` extra): no window, no state, no text taken for mathematics."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from cfamc_cli.compare import ComparedTable, Figure, Row, Run, exact_number
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.files import read_jsonl
from cfamc_cli.gather import Gathered
from cfamc_cli.render import clean, talk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C6D31",
    "#7B4173",
    "#31A354",
)
MOST_LINES = len(_COLOURS)  # rows that a picture shows as lines or names
_NUMBER = (int, float)
_LARGEST = 1e100  # that is drawn
_CLEAN = "clean accuracy (%)"
_CURVES = {  # kind of record, quantity, unit
    "Training loss": ("train", "loss", "loss"),
    "Online accuracy while training": ("evaluation", "clean", _CLEAN),
}
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


def overview(tables: Sequence[ComparedTable], found: Gathered, *, suffix: str) -> bytes:
    """Draw all panels of a comparison on one sheet.

    Args:
        tables: The comparison.
        found: Where the runs lie.
        suffix: ".png", ".svg" or ".pdf".

    Raises:
        CfamcError: There is nothing to draw, or matplotlib is missing.
    """
    drawn = list(panels(tables, found).values())
    if not drawn:
        raise CfamcError("there is nothing to draw", exit_code=ExitCode.INVALID)
    return _render(drawn, suffix)


def pictures(tables: Sequence[ComparedTable], found: Gathered) -> dict[str, bytes]:
    """Draw each panel of a comparison as an SVG of its own, by title.

    Raises:
        CfamcError: matplotlib is missing.
    """
    return {title: _render([panel], ".svg") for title, panel in panels(tables, found).items()}


def panels(tables: Sequence[ComparedTable], found: Gathered) -> dict[str, Panel]:
    """Return the panels that there are numbers for, by title."""
    if not tables:
        return {}
    made: dict[str, Panel] = {}
    attacked = next((table for table in tables if table.condition.attack), None)
    leading = attacked or tables[0]
    looks = _looks(leading.rows)
    if attacked is not None:
        made["Clean against robust accuracy"] = partial(_scatter, table=attacked, looks=looks)
    curves = _eps_curves(tables, leading)
    if curves:
        made["Accuracy against eps"] = partial(_eps, lines=curves, looks=looks)
    histories = {
        row.label: [_history(run, found) for run in {entry.run.id: entry.run for entry in row.entries}.values()]
        for row in leading.rows[:MOST_LINES]
    }
    for title in _CURVES:
        lines = {label: [seed[title] for seed in seeds if len(seed[title]) > 1] for label, seeds in histories.items()}
        if any(lines.values()):
            made[title] = partial(_learning, lines=lines, looks=looks, title=title)
    made["Accuracy against training time"] = partial(_time, table=leading, looks=looks)
    return made


def _looks(rows: Sequence[Row]) -> dict[str, Look]:
    """A name and a colour for each of the first rows, the same in all panels; a name that is not unique is an id."""
    rows = rows[:MOST_LINES]
    names = [row.run.name if len(row.entries) == 1 else row.label for row in rows]
    return {
        row.label: (_label(name if names.count(name) == 1 else row.label), _COLOURS[index % len(_COLOURS)])
        for index, (row, name) in enumerate(zip(rows, names, strict=True))
    }


def _render(drawn: Sequence[Panel], suffix: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise CfamcError(
            "pictures need matplotlib", hint="pip install 'cfamc[plots]'", exit_code=ExitCode.INVALID
        ) from error
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
    axes.set(xlabel=_CLEAN, ylabel=robust, title="Clean against robust accuracy")


def _time(axes: Axes, *, table: ComparedTable, looks: Mapping[str, Look]) -> None:
    for row in table.rows:
        minutes = sum(entry.run.seconds for entry in row.entries) / len(row.entries) / 60
        _point(axes, row, looks, x=minutes, figure=row.clean, hollow=True)
        if row.robust is not None:
            _point(axes, row, looks, x=minutes, figure=row.robust)
    shown = f"accuracy (%): clean hollow, robust filled\n{_attack(table)}" if table.condition.attack else _CLEAN
    axes.set(xlabel="training time (min)", ylabel=shown, title="Accuracy against training time")
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


def _eps(axes: Axes, *, lines: Lines, looks: Mapping[str, Look]) -> None:
    _lines(axes, lines, looks, marker="o")
    axes.set(xlabel="eps (255ths)", ylabel="accuracy (%)", title="Accuracy against eps")
    axes.set_ylim(bottom=0)


def _history(run: Run, found: Gathered) -> dict[str, Line]:
    """The learning curves of a run by title; metrics that cannot be read are named once, and left out."""
    path = found.folders[run.id].metrics
    try:
        imported = run.family == run.id  # and not trained here
        records = [] if imported else read_jsonl(path).records
        return {
            title: [
                _at(record, quantity, f"{path}:{line}")
                for line, record in enumerate(records, start=1)
                if record.get("kind") == kind and record.get(quantity) is not None  # a lost step has no loss
            ]
            for title, (kind, quantity, _) in _CURVES.items()
        }
    except CfamcError as error:
        left_out = (run.id, f"no learning curves: {error.message}")
        if left_out not in found.left_out:
            found.left_out.append(left_out)
            talk().say(f"left out: {': '.join(left_out)}")
        return {title: [] for title in _CURVES}


def _at(record: Mapping[str, object], quantity: str, where: str) -> tuple[float, float]:
    """Epoch and value; counts become percent."""
    share = 100 / _number(record, "n", where) if "n" in record else 1.0
    return _number(record, "epoch", where), share * _number(record, quantity, where)


def _number(record: Mapping[str, object], key: str, where: str) -> float:
    """A number that can be drawn, and divided by where it is `n`."""
    value = record.get(key)
    try:
        number = float(value) if isinstance(value, _NUMBER) else math.nan
    except OverflowError:
        number = math.nan
    if not abs(number) < _LARGEST or (key == "n" and number < 1):
        raise CfamcError(f"{where}: {key} is {value!r:.20}", exit_code=ExitCode.BAD_DATA)
    return number


def _learning(axes: Axes, *, lines: Lines, looks: Mapping[str, Look], title: str) -> None:
    _lines(axes, lines, looks, marker="")
    axes.set(xlabel="epoch", ylabel=_CURVES[title][2], title=title)


def _lines(axes: Axes, lines: Lines, looks: Mapping[str, Look], *, marker: str) -> None:
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


def _attack(table: ComparedTable) -> str:
    condition = table.condition
    return f"{clean(condition.attack)[:20]} {condition.norm} {clean(condition.eps)[:12]}"


def _label(text: str) -> str:
    """A legend hides labels that begin with an underscore."""
    short = clean(text)
    return f" {short[:60]}"
