"""Pictures of a comparison, by matplotlib (the `plots` extra): no window, no state, no text taken for mathematics."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from cfamc_cli.comparison.gather import LeftOut
from cfamc_cli.comparison.statistics import Figure
from cfamc_cli.comparison.tables import ComparedTable, Row, Run, exact_number
from cfamc_cli.errors import CfamcError, invalid, require_libraries
from cfamc_cli.recipe.plan import duration
from cfamc_cli.report.sheets import differing, figure_text
from cfamc_cli.report.terminal import clean
from cfamc_cli.store.records import EvaluationLine, GripLine, MetricLine, TrainLine, read_metrics
from cfamc_cli.store.runs import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#000000", "#8C6D31", "#7B4173", "#31A354"),
)
MOST_LINES = len(_COLOURS)  # rows that a picture shows as lines or names
_DIRECT = 4  # rows that are named where they are drawn; more have a legend
_FEW = 4  # points of a line that words spell out
_NAME_HEIGHT = 0.06  # of the axes
_VEIL: dict[str, Any] = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}  # behind a name on a line
_TIMES = (("s", 1), ("min", 60), ("h", 3600))
_CLEAN = "clean accuracy (%)"
FRONT, _BY_EPS, _BY_TIME = "Clean against robust accuracy", "Accuracy against eps", "Accuracy against training time"
_LOSS, _ACCURACY = "Training loss", "Online accuracy while training"
_GRIP, _ROBUST = "Grip of the adversary", "Online accuracy under attack"
_CURVES = {  # of a training: what its axis says; first those of each interval
    _LOSS: "loss",
    "Invariance term": "mean cosine, negated",
    "Coding rate": "coding rate",
    "Learning rate": "learning rate",
    "Effective rank": "effective rank of embeddings",
    _GRIP: "loss it adds, of what PGD-10 adds",
    _ACCURACY: _CLEAN,
    _ROBUST: "robust accuracy (%)",
}
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,  # an id, a head and an attack fit above a panel
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 7,
    "legend.framealpha": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "cfamc",
    "text.parse_math": False,
}
_TERMS = (_LOSS, "Invariance term", "Coding rate")  # of an objective
T = TypeVar("T")
Painter: TypeAlias = "Callable[[Axes], None]"
Look: TypeAlias = tuple[str, str]  # name in the legend, colour
Line: TypeAlias = Sequence[tuple[float, float]]
Lines: TypeAlias = Mapping[str, Sequence[Line]]  # by row; several seeds have a line each
Curves: TypeAlias = Mapping[str, Lines]  # by title


@dataclass(frozen=True)
class Panel:
    """What draws on axes, and what tells its figures to those who do not see them."""

    paint: Painter
    words: str

    def __call__(self, axes: Axes) -> None:
        """Draw."""
        self.paint(axes)


def learning_curves(tables: Sequence[ComparedTable], folders: Mapping[str, RunFolder]) -> tuple[Curves, list[LeftOut]]:
    """Read the learning curves of the rows that pictures name, and tell which cannot be drawn."""
    found: dict[str, dict[str, list[Line]]] = {}
    left_out: list[LeftOut] = []
    table = leading(tables)
    read: set[str] = set()  # a run stands in a row for each of its heads
    for row in table.rows[:MOST_LINES] if table else ():
        for run in {entry.run.id: entry.run for entry in row.entries if entry.run.id not in read}.values():
            read.add(run.id)
            try:
                imported = run.family == run.id  # and not trained here
                lines = [] if imported else read_metrics(folders[run.id].metrics)
            except CfamcError as error:
                left_out.append((run.id, f"no learning curves: {error.message}"))
                continue
            for title, curve in _points(lines, _objectives(run)).items():
                if len(curve) > 1:
                    found.setdefault(title, {}).setdefault(row.label, []).append(curve)
    return _in_order(found), list(dict.fromkeys(left_out))


def _objectives(run: Run) -> list[str]:
    """The objective of each phase, as far as the record tells."""
    first = str(run.recipe.get("objective.name", ""))
    phases = sum(key.startswith("phase.") and key.endswith(".epochs") for key in run.recipe)
    return [first, *(str(run.recipe.get(f"phase.{k}.objective.name", first)) for k in range(phases))]


def _in_order(found: Mapping[str, T]) -> dict[str, T]:
    """Curves in the order of `_CURVES`, those of each objective together."""
    return {title: found[title] for start in _CURVES for title in found if title.partition(",")[0] == start}


def _points(lines: Sequence[MetricLine], objectives: Sequence[str]) -> dict[str, Line]:
    """What was measured while training, by the title of its curve; a step that was lost has no point.

    The loss and its terms have a curve for each objective, for those of two say nothing of each other.
    """
    found: dict[str, list[tuple[float, float | None]]] = defaultdict(list)
    for line in lines:
        match line:
            case TrainLine():
                values = (line.loss, line.invariance, line.coding_rate, line.lr, line.effective_rank)
                of = objectives[line.phase or 0] if (line.phase or 0) < len(objectives) else ""
                for title, value in zip(_CURVES, values, strict=False):
                    found[f"{title}, {of}" if of and title in _TERMS else title].append((line.epoch, value))
            case GripLine():
                found[_GRIP].append((line.epoch, line.strength))
            case EvaluationLine():
                found[_ACCURACY].append((line.epoch, 100 * line.clean / line.n))
                found[_ROBUST].append((line.epoch, 100 * line.robust / line.n))
    return {
        title: [(epoch, value) for epoch, value in points if value is not None and math.isfinite(value)]
        for title, points in found.items()
    }


def panels(tables: Sequence[ComparedTable], curves: Curves) -> dict[str, Panel]:
    """Return the panels of results that there are numbers for, by title, and those of the two usual curves."""
    table = leading(tables)
    if table is None:
        return {}
    usual = {title: lines for title, lines in curves.items() if title.partition(",")[0] in (_LOSS, _ACCURACY)}
    return results(tables, table) | trainings(usual, looks_of(table))


def results(tables: Sequence[ComparedTable], leading: ComparedTable) -> dict[str, Panel]:
    """A panel for each way to look at the leading table, by title."""
    made: dict[str, Panel] = {}
    looks = looks_of(leading)
    told = [
        f"{looks[row.label][0].strip()}: clean {figure_text(row.clean)} %"
        + (f", {leading.condition.figure} {figure_text(row.robust)} %" if row.robust else "")
        for row in leading.rows[:MOST_LINES]
    ]
    if leading.condition.attack:
        made[FRONT] = Panel(partial(_scatter, table=leading, looks=looks), "; ".join(told))
    if by_eps := _eps_curves(tables, leading):
        labels = ("eps (255ths)", "accuracy (%)")
        paint = partial(_lines, lines=by_eps, looks=looks, title=_BY_EPS, labels=labels, marker="o")
        made[_BY_EPS] = Panel(paint, _in_words(by_eps, looks, labels))
    timed = (f"{words}, trained for {duration(row.seconds)}" for words, row in zip(told, leading.rows, strict=False))
    made[_BY_TIME] = Panel(partial(_time, table=leading, looks=looks), "; ".join(timed))
    return made


def draw_training(run: RunFolder) -> bytes:
    """Draw all curves of one training as a PNG.

    Raises:
        CfamcError: Its metrics cannot be read, or are too few to draw.
    """
    curves = {title: {run.id: [line]} for title, line in training_curves(run).items() if len(line) > 1}
    return draw(list(trainings(curves, {run.id: ("", _COLOURS[0])}).values()), ".png")


def training_curves(run: RunFolder) -> dict[str, Line]:
    """All curves of one training by title, as pairs of epoch and value; some may have no point.

    Raises:
        CfamcError: Its metrics or its recipe cannot be read.
    """
    return _in_order(_points(read_metrics(run.metrics), [part.objective.name for part in run.recipe().parts()]))


def trainings(curves: Curves, looks: Mapping[str, Look]) -> dict[str, Panel]:
    """A panel for each curve of trainings that has points, by title; several objectives never share axes."""
    return {
        title: Panel(
            partial(_lines, lines=lines, looks=looks, title=title, labels=labels, marker=""),
            _in_words(lines, looks, labels),
        )
        for title, lines in curves.items()
        if lines
        for labels in [("epoch", _CURVES[title.partition(",")[0]])]
    }


def _in_words(lines: Lines, looks: Mapping[str, Look], labels: tuple[str, str]) -> str:
    """The few points of each line, or the ends of a longer one; of several seeds the first."""
    told = []
    for label, (points, *others) in lines.items():
        if label in looks:
            few = points if len(points) <= _FEW else (points[0], points[-1])
            of = ", the first" if others else ""
            told.append(f"{looks[label][0].strip()}{of}: " + ", ".join(f"{y:.4g} at {x:.3g}" for x, y in few))
    return f"{labels[1]}, by {labels[0]}. " + "; ".join(told)


def leading(tables: Sequence[ComparedTable]) -> ComparedTable | None:
    """The table that is drawn: the first under attack, else the first."""
    return next((table for table in tables if table.condition.attack), tables[0] if tables else None)


def looks_of(table: ComparedTable) -> dict[str, Look]:
    """A name and a colour for each of the first rows, the same in all panels."""
    rows = table.rows[:MOST_LINES]
    labels = [f" {clean(name)[:60]}" for name in _names(table, rows)]  # a legend hides those that begin with "_"
    return {row.label: (name, colour) for row, name, colour in zip(rows, labels, _COLOURS, strict=False)}


def _names(table: ComparedTable, rows: Sequence[Row]) -> list[str]:
    """Their runs' names; where rows share one, the first setting that tells them apart, else their labels."""
    same: dict[str, list[dict[str, object]]] = defaultdict(list)
    for row in rows:
        same[row.run.name].append(differing(table, row))

    def named(row: Row) -> str:
        found = same[row.run.name]
        if len(found) == 1:
            return row.label if len(row.entries) > 1 else row.run.name
        telling = (key for key in found[0] if len({str(own[key]) for own in found if key in own}) == len(found))
        setting = next((f"{key}={differing(table, row)[key]}" for key in telling), row.label)
        return setting if len(same) == 1 else f"{row.run.name}, {setting}"

    return [named(row) for row in rows]


def require_plots() -> None:
    """Raise where nothing can be drawn, before the work that is to be drawn.

    Raises:
        CfamcError: Exit 2; matplotlib is missing.
    """
    require_libraries("matplotlib", by="drawing", extra="plots")


def draw(drawn: Sequence[Painter], suffix: str) -> bytes:
    """Draw panels beside and below each other, with one legend, in the format of a suffix: .png, .svg or .pdf.

    Raises:
        CfamcError: There is nothing to draw, or matplotlib is missing.
    """
    if not drawn:
        raise invalid("there is nothing to draw")
    require_plots()
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    columns = min(2, len(drawn))
    lines = -(-len(drawn) // columns)
    with matplotlib.rc_context(_STYLE):
        canvas: Canvas = Canvas(figsize=(6.2 * columns, 4.2 * lines + 0.4), layout="constrained")
        grid = canvas.add_gridspec(lines, columns)
        known: dict[str, Any] = {}
        for index, panel in enumerate(drawn):
            alone = index == len(drawn) - 1 and index % columns == 0  # in its line, which it fills
            axes = canvas.add_subplot(grid[index // columns, :] if alone else grid[index // columns, index % columns])
            panel(axes)
            handles, labels = axes.get_legend_handles_labels()
            if len(handles) > 1 and not axes.texts:  # else a name is not needed, or stands where it belongs
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
    axes.set(xlabel=_CLEAN, ylabel=robust, title=FRONT)
    if len(table.rows) <= _DIRECT:
        _name(axes, [(100 * row.clean.value, _height(row), row.label) for row in table.rows], looks)


def _time(axes: Axes, *, table: ComparedTable, looks: Mapping[str, Look]) -> None:
    longest = max(row.seconds for row in table.rows)
    unit, size = next(((unit, size) for unit, size in _TIMES if longest < 120 * size), _TIMES[-1])
    for row in table.rows:
        _point(axes, row, looks, x=row.seconds / size, figure=row.clean, hollow=True)
        if row.robust is not None:
            _point(axes, row, looks, x=row.seconds / size, figure=row.robust)
    shown = f"accuracy (%): clean hollow, robust filled\n{_attack(table)}" if table.condition.attack else _CLEAN
    axes.set(xlabel=f"training time ({unit})", ylabel=shown, title=_BY_TIME)
    axes.set_xlim(0, 1.05 * axes.dataLim.x1 or 1)
    if len(table.rows) <= _DIRECT:
        _name(axes, [(row.seconds / size, _height(row), row.label) for row in table.rows], looks)


def _height(row: Row) -> float:
    return 100 * (row.robust or row.clean).value


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
    curves: dict[object, dict[float, float]] = defaultdict(dict)
    for table in tables:
        eps = exact_number(table.condition.eps)
        if eps is None or replace(table.condition, eps="") != replace(leading.condition, eps=""):
            continue
        for row in table.rows:
            if row.robust is not None:
                curves[row.who] |= {0.0: 100 * row.clean.value, 255 * eps: 100 * row.robust.value}
    return {row.label: [sorted(curves[row.who].items())] for row in leading.rows if len(curves[row.who]) > 2}


def _lines(
    axes: Axes, *, lines: Lines, looks: Mapping[str, Look], title: str, labels: tuple[str, str], marker: str
) -> None:
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    for label, seeds in lines.items():
        name, colour = looks.get(label, (None, ""))
        for index, points in enumerate(() if name is None else seeds):
            axes.plot(
                *zip(*points, strict=True),
                marker=marker,
                markersize=4,
                linewidth=1.4 if len(seeds) == 1 else 0.7,
                label=(name or None) if index == 0 else None,
                color=colour,
            )
    if title == _BY_EPS:
        axes.set_ylim(bottom=0)
    if 1 < len(lines) <= _DIRECT:
        _name(axes, [(*seeds[0][-1], label) for label, seeds in lines.items() if label in looks], looks)


def _name(axes: Axes, points: Sequence[tuple[float, float, str]], looks: Mapping[str, Look]) -> None:
    """Write each row's name above its point, within the axes and moved up where two would meet."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    free, room = 0.0, 1 - _NAME_HEIGHT * len(points)
    for x, y, label in sorted(points, key=lambda point: point[1]):
        name, colour = looks[label]
        across = (x - left) / (right - left)
        side = "left" if across < 1 / 3 else "right" if across > 2 / 3 else "center"
        free = max(free, min((y - low) / (high - low) + 0.02, room))
        look: dict[str, Any] = {"ha": side, "va": "bottom", "color": colour, "fontsize": 8, "bbox": _VEIL}
        axes.text(across, free, name.strip(), transform=axes.transAxes, **look)
        free, room = free + _NAME_HEIGHT, room + _NAME_HEIGHT


def _attack(table: ComparedTable) -> str:
    condition = table.condition
    return f"{clean(condition.attack)[:20]} {condition.norm} {clean(condition.eps)[:12]}"
