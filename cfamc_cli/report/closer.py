"""A closer look at the rows that lead a comparison: accuracy and confusion by class, examples, a map of features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cfamc_cli.comparison.gather import LeftOut
from cfamc_cli.comparison.tables import ComparedTable, Entry
from cfamc_cli.errors import CfamcError, bad_data
from cfamc_cli.report.plots import Panel
from cfamc_cli.report.terminal import clean
from cfamc_cli.store.files import read_bytes
from cfamc_cli.store.records import AttackRecord, ClassAccuracy, ClassRobustness, FeatureMap, ProbeRecord, load_record
from cfamc_cli.store.runs import MAP, RECORD, SHEET, RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 3  # that are looked at
_MOST_CLASSES = 20  # that a picture has room for: the weakest
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_BYTES = 4 << 20  # of a picture that a page takes in


def close_up(
    table: ComparedTable, folders: Mapping[str, RunFolder]
) -> tuple[dict[str, Panel], dict[str, bytes], list[LeftOut]]:
    """Look at the first result of each of the first rows.

    Args:
        table: The leading table.
        folders: Where the runs lie, by id.

    Returns:
        Panels by title; adversarial examples as PNG by title; and what could not be read, and why.
    """
    panels: dict[str, Panel] = {}
    sheets: dict[str, bytes] = {}
    left_out: list[LeftOut] = []
    for row in table.rows[:MOST_ROWS]:
        entry = row.entries[0]
        try:
            panels |= dict(_panels(entry, folders[entry.run.id]))
            sheets |= dict(_sheets(entry, folders[entry.run.id]))
        except CfamcError as error:
            left_out.append((f"{entry.run.id} {entry.result}", f"no closer look: {error.message}"))
    return panels, sheets, left_out


def _panels(entry: Entry, run: RunFolder) -> Iterator[tuple[str, Panel]]:
    folder, probe = run.path / entry.result, entry.result.partition("/")[2]
    if entry.robust is not None:
        attacked = load_record(folder / RECORD, AttackRecord)
        probe = attacked.probe
        title = f"By class\n{run.id}, {attacked.id}"
        shares = _shares(attacked.classes)
        words = "; ".join(f"{name} {right:.0f} % clean, {robust:.0f} % under attack" for robust, right, name in shares)
        yield title, Panel(partial(_by_class, title=title, shares=shares), words)
    judged = load_record(run.probes / probe / RECORD, ProbeRecord)
    if len(judged.classes) <= _MOST_CLASSES:
        title = f"Confusion on clean images\n{run.id}, {judged.id}"
        yield title, Panel(partial(_confusion, title=title, judged=judged), _answers(judged))
    if (run.probes / probe / MAP).is_file():
        found = load_record(run.probes / probe / MAP, FeatureMap)
        title = f"Features at their first two principal components\n{run.id}, {judged.id}"
        words = f"{len(found.points):,} images of {len(judged.classes)} classes, each a dot in the colour of its class"
        yield title, Panel(partial(_map, title=title, found=found, classes=judged.classes), words)


def _sheets(entry: Entry, run: RunFolder) -> Iterator[tuple[str, bytes]]:
    path = run.path / entry.result / SHEET
    if path.is_file():
        data = read_bytes(path, limit=_MOST_BYTES)
        if not data.startswith(_PNG):
            raise bad_data(f"{path} is no PNG")
        yield f"Adversarial examples: {run.id}, {entry.result.partition('/')[2]}", data


def _shares(classes: Sequence[ClassRobustness]) -> list[tuple[float, float, str]]:
    """Robust and clean accuracy in percent, and the name; the weakest classes first."""
    shares = [
        (100 * part.robust.value, 100 * part.clean.value, clean(part.name)[:20])
        for part in classes
        if part.clean is not None and part.robust is not None
    ]
    return sorted(shares)[:_MOST_CLASSES]


def _by_class(axes: Axes, *, title: str, shares: Sequence[tuple[float, float, str]]) -> None:
    """Clean accuracy as pale bars, robust accuracy as dark ones within; the weakest class on top."""
    robust, right, names = zip(*shares, strict=True)
    axes.barh(names, right, color="#9CC7E3", label="clean")
    axes.barh(names, robust, color="#0072B2", label="under attack", height=0.5)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(title=title, xlabel="accuracy (%)", xlim=(0, 100))


def _confusion(axes: Axes, *, title: str, judged: ProbeRecord) -> None:
    """Of each true class, a row, the share that is answered as each class."""
    shares = [[count / max(1, sum(row)) for count in row] for row in judged.confusion]
    names = [clean(part.name)[:20] for part in judged.classes]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share >= 0.005:
                colour = "white" if share > 0.5 else "black"
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)
    axes.set(title=title, xlabel="answered (%)", ylabel="true class")


def _answers(judged: ProbeRecord) -> str:
    """How often each class is answered rightly, and what else it is taken for most."""
    names = [clean(part.name)[:20] for part in judged.classes]
    told = []
    for at, row in enumerate(judged.confusion):
        wrong, taken = max(
            (count, name) for other, (count, name) in enumerate(zip(row, names, strict=True)) if other != at
        )
        right, most = (100 * count / max(1, sum(row)) for count in (row[at], wrong))
        told.append(f"{names[at]} {right:.0f} % right, {most:.0f} % taken for {taken}")
    return "; ".join(told)


def _map(axes: Axes, *, title: str, found: FeatureMap, classes: Sequence[ClassAccuracy]) -> None:
    """Each image at its first two principal components; the name of a class at the middle of its images."""
    x, y, labels = zip(*found.points, strict=True)
    axes.scatter(x, y, c=labels, cmap="tab10" if len(classes) <= 10 else "tab20", s=6, alpha=0.6, linewidths=0)
    for label, part in enumerate(classes if len(classes) <= _MOST_CLASSES else ()):
        own = [(a, b) for a, b, of in found.points if of == label]
        if own:
            at = (sum(a for a, _ in own) / len(own), sum(b for _, b in own) / len(own))
            look = {"boxstyle": "round", "fc": "white", "alpha": 0.8, "lw": 0}
            axes.text(*at, clean(part.name)[:20], ha="center", fontsize=8, bbox=look)
    first, second = (f"{100 * share:.0f} % of the variance" for share in found.explained)
    axes.set(title=title, xlabel=first, ylabel=second)
