"""Comparisons as text: cells for people, and the same tables as JSON, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from cfamc_cli.compare import (
    ComparedTable,
    Condition,
    Difference,
    Figure,
    Published,
    Row,
    Which,
    probability,
    published,
)
from cfamc_cli.render import clean, duration, percent

Format = Literal["rich", "json", "csv", "markdown", "latex"]
MOST_KEYS = 6  # recipe keys that a cell spells out
_NOT_OURS = "published, not measured here"
_WHICH: tuple[Which, ...] = ("clean", "robust")
_MEASURED = ("", "run", "clean %", "robust %")
_AGAINST = ("clean diff", "clean p", "robust diff", "robust p", "shared")
_COST = ("n", "time", "epochs", "views")
SAID = ("recipe", "note")
DISPENSABLE = (*SAID, "views", "epochs", "time")  # in the order in which a narrow terminal loses them


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Attributes:
        title: What it is about.
        columns: Headings; `right` says which are numbers.
        notes: Sentences that belong below.
        more: Rows that were left out.
    """

    title: str
    columns: tuple[str, ...]
    right: tuple[int, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    more: int = 0

    def without(self, name: str) -> Sheet:
        """The same rows without a column; itself where there is no such column."""
        if name not in self.columns:
            return self
        at = self.columns.index(name)
        right = tuple(index - (index > at) for index in self.right if index != at)
        rows = tuple(row[:at] + row[at + 1 :] for row in self.rows)
        return replace(self, columns=self.columns[:at] + self.columns[at + 1 :], right=right, rows=rows)


def sheets(tables: Sequence[ComparedTable], *, with_published: bool, limit: int = 0) -> list[Sheet]:
    """Spell out a comparison: a sheet a table, one for what stands alone, and published rows where asked for.

    Args:
        tables: The comparison.
        with_published: Whether published rows stand beside those of the tables.
        limit: Measured rows of a sheet; 0 for all.
    """
    shown = [table for index, table in enumerate(tables) if index == 0 or len(table.rows) > 1]
    alone = [table for index, table in enumerate(tables) if index > 0 and len(table.rows) == 1]
    made = [_sheet(table, published_beside(table.condition) if with_published else [], limit) for table in shown]
    if alone:
        made.append(_apart(alone, limit))
    if with_published:
        beside = {_as_published(table.condition) for table in shown}
        made += [
            _published_sheet(condition, rows) for condition, rows in published().items() if condition not in beside
        ]
    return made


def published_beside(condition: Condition) -> list[Published]:
    """The published rows that a table may show beside its own: all is the same but what is not published."""
    return published().get(_as_published(condition), [])


def _as_published(condition: Condition) -> Condition:
    return replace(condition, fingerprint="", settings="")


def markdown(sheet: Sheet) -> str:
    """A sheet as a Markdown table with its title and notes."""
    notes = "".join(f"\n{markdown_text(note)}\n" for note in sheet.notes)
    table = markdown_table(sheet.columns, sheet.rows, right=sheet.right)
    return f"### {markdown_text(sheet.title)}\n\n{table}\n{notes}\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Rows as a Markdown table; `right` says which columns are aligned to the right."""
    rules = ["---:" if index in right else "---" for index in range(len(columns))]
    head, *body = (list(map(markdown_text, line)) for line in (columns, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *body))


def markdown_text(text: object) -> str:
    """Text that Markdown and HTML leave alone; without its bracket an exclamation mark makes no image."""
    return re.sub(r"([\\`*_|\[\]<>&#~$])", r"\\\1", clean(text))


def latex(sheet: Sheet) -> str:
    """A sheet as a LaTeX tabular in the style of the booktabs package."""
    alignment = "".join("r" if index in sheet.right else "l" for index in range(len(sheet.columns)))
    lines = [" & ".join(map(_latex_text, line)) + r" \\" for line in (sheet.columns, *sheet.rows)]
    notes = "".join(f"% {clean(note)}\n" for note in sheet.notes)
    body = "\n".join([lines[0], r"\midrule", *lines[1:]])
    return (
        f"% {clean(sheet.title)}\n% needs \\usepackage{{booktabs}}\n"
        f"\\begin{{tabular}}{{{alignment}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n{notes}\n"
    )


def comma_separated(tables: Sequence[ComparedTable], *, with_published: bool) -> str:
    """All rows of all tables as one CSV; fractions and seconds, recipe keys as columns of their own."""
    keys = list(dict.fromkeys(key for table in tables for key in table.keys))
    records = [_flat(table, row) for table in tables for row in table.rows]
    if with_published:
        records += [_flat_published(condition, row) for condition, rows in published().items() for row in rows]
    columns = [*_flat_names(), *keys]
    return csv_text(columns, ([record.get(column) for column in columns] for record in records))


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV; text that a spreadsheet would take for a formula is marked as text."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_csv_cell(cell) for cell in row] for row in (columns, *rows))
    return out.getvalue()


def as_json(
    tables: Sequence[ComparedTable], left_out: Sequence[tuple[str, str]], *, with_published: bool
) -> dict[str, object]:
    """The whole comparison as plain JSON values; fractions and seconds."""
    made: dict[str, object] = {
        "schema_version": 1,
        "tables": [
            {
                "title": table.condition.title(),
                "condition": asdict(table.condition),
                "not_comparable_with_the_first": table.apart,
                "verdict": table.verdict,
                "notes": list(table.notes),
                "keys": list(table.keys),
                "rows": [_json_row(table, row) for row in table.rows],
            }
            for table in tables
        ],
        "left_out": [{"what": what, "why": why} for what, why in left_out],
    }
    if with_published:
        made["published"] = [
            {"origin": _NOT_OURS, **asdict(condition), **asdict(row)}
            for condition, rows in published().items()
            for row in rows
        ]
    return made


def differing(row: Row, keys: Iterable[str]) -> dict[str, object]:
    """The values of a row under the keys that it has."""
    recipe, head = row.entries[0].run.recipe, dict(row.entries[0].head)
    return {key: head[key] if key in head else recipe[key] for key in keys if key in head or key in recipe}


def figure_text(figure: Figure | None) -> str:
    """Such as "75.9 [75.0, 76.7]" for one run and "75.9 +- 0.3" for several, in percent."""
    if figure is None:
        return ""
    if figure.low is None or figure.high is None:
        return f"{percent(figure.value)} +- {percent(figure.std or 0.0)}"
    return f"{percent(figure.value)} [{percent(figure.low)}, {percent(figure.high)}]"


def compact(count: int) -> str:
    """Such as 24.0 M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _sheet(table: ComparedTable, beside: Sequence[Published], limit: int) -> Sheet:
    held = any(row.against for row in table.rows)
    columns = (*_MEASURED, *(_AGAINST if held else ()), *_COST, *SAID)
    empty = ("",) * len(_AGAINST) if held else ()
    rows = [
        (*_measured(row), *(_against_cells(row) if held else ()), *_cost(row), _recipe(table, row), _note(row))
        for row in table.rows[: limit or None]
    ]
    rows += [(*_published(row), *empty, *_published_cost(row), "", _NOT_OURS) for row in beside]
    notes = [table.verdict] if table.verdict else []
    notes += table.notes
    if table.apart:
        notes.append(f"Not comparable with the first table: {table.apart}.")
    if any(row.front for row in table.rows):
        notes.append("*: no other row is at least as good in both accuracies and better in one.")
    if beside:
        notes.append(
            "Published rows: arXiv:2501.03507, ResNet-18; hardware and samples are not those of the rows above."
        )
    right = tuple(range(2, len(columns) - 2))
    return Sheet(table.condition.title(), columns, right, tuple(rows), tuple(notes), _more(table.rows, limit))


def _more(rows: Sequence[object], limit: int) -> int:
    return max(0, len(rows) - limit) if limit else 0


def _apart(tables: Sequence[ComparedTable], limit: int) -> Sheet:
    columns = ("run", "n", "clean %", "robust %", "under", "why apart")
    everyone = [(table, row) for table in tables for row in table.rows]
    rows = [
        (
            row.label,
            f"{row.n:,}",
            figure_text(row.clean),
            figure_text(row.robust),
            table.condition.title(),
            table.apart,
        )
        for table, row in everyone[: limit or None]
    ]
    title = "Apart: not comparable with the first table, nor with each other"
    return Sheet(title, columns, (1, 2, 3), tuple(rows), more=_more(everyone, limit))


def _published_sheet(condition: Condition, rows: Sequence[Published]) -> Sheet:
    title = f"{condition.dataset} test, linear head, PGD, linf {condition.eps} in image space"
    cells = tuple((*_published(row), *_published_cost(row), _NOT_OURS) for row in rows)
    note = "arXiv:2501.03507, ResNet-18; nothing in this table was measured here."
    return Sheet(f"Published: {title}", (*_MEASURED, *_COST, "note"), tuple(range(2, 8)), cells, (note,))


def _measured(row: Row) -> tuple[str, ...]:
    return ("*" if row.front else "", row.label, figure_text(row.clean), figure_text(row.robust))


def _cost(row: Row) -> tuple[str, ...]:
    seconds = sum(each.run.seconds for each in row.entries) / len(row.entries)
    run = row.entries[0].run
    return (f"{row.n:,}", duration(seconds), f"{run.epochs:g}", compact(run.view_passes))


def _recipe(table: ComparedTable, row: Row) -> str:
    settings = [f"{key}={value}" for key, value in differing(row, table.keys).items()]
    more = [f"and {len(settings) - MOST_KEYS} more"] if len(settings) > MOST_KEYS else []
    return ", ".join(settings[:MOST_KEYS] + more)


def _published(row: Published) -> tuple[str, ...]:
    return ("", row.system, f"{row.clean:g}", f"{row.robust:g}")


def _published_cost(row: Published) -> tuple[str, ...]:
    return ("", duration(60 * row.minutes), str(row.epochs), "")


def _against_cells(row: Row) -> tuple[str, ...]:
    parts = row.against or {}
    shared = max((part.shared or 0 for part in parts.values()), default=0)
    return (*(cell for which in _WHICH for cell in _points(parts.get(which))), f"{shared:,}" if shared else "")


def _points(difference: Difference | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    p = "" if difference.p is None else probability(difference.p).removeprefix("= ")
    return f"{100 * difference.value:+.1f}", p


def _note(row: Row) -> str:
    parts = ["baseline"] if row.baseline else []
    if any(entry.whole for entry in row.entries):
        parts.append(f"cut from n {' '.join(f'{(entry.whole or entry).n:,}' for entry in row.entries)}")
    if row.failed:
        parts.append(f"not trusted: {', '.join(row.failed)}")
    last = (row.against or {}).get("robust", (row.against or {}).get("clean"))
    if last is not None and last.shared is None:
        parts.append("difference not paired")
    return "; ".join(parts)


def _json_figure(figure: Figure) -> dict[str, float | None]:
    return {name: getattr(figure, name) for name in Figure.__slots__}  # asdict takes ten times as long


def _json_row(table: ComparedTable, row: Row) -> dict[str, object]:
    return {
        "label": row.label,
        "runs": [entry.run.id for entry in row.entries],
        "seeds": [entry.run.seed for entry in row.entries],
        "results": [entry.result for entry in row.entries],
        "name": row.run.name,
        "recipe": differing(row, table.keys),
        "epochs": row.run.epochs,
        "steps": row.run.steps,
        "view_passes": row.run.view_passes,
        "seconds": [entry.run.seconds for entry in row.entries],
        "n_measured": [(entry.whole or entry).n for entry in row.entries],
        "clean": _json_figure(row.clean),
        "robust": _json_figure(row.robust) if row.robust else None,
        "front": row.front,
        "baseline": row.baseline,
        "against": {which: asdict(part) for which, part in row.against.items()} if row.against else None,
        "failed_checks": list(row.failed),
    }


def _flat_names() -> list[str]:
    figures = [f"{which}{part}" for which in ("clean", "robust") for part in ("", "_low", "_high", "_std")]
    against = [f"{which}_{part}" for which in ("clean", "robust") for part in ("diff", "p", "shared")]
    condition = list(Condition.__dataclass_fields__)
    run = ["label", "runs", "seeds", "epochs", "steps", "view_passes", "seconds", "n"]
    return [*condition, *run, *figures, "front", "baseline", *against, "failed_checks", "apart", "origin"]


def _flat(table: ComparedTable, row: Row) -> dict[str, object]:
    record: dict[str, object] = {
        **asdict(table.condition),
        "label": row.label,
        "runs": " ".join(entry.run.id for entry in row.entries),
        "seeds": " ".join(str(entry.run.seed) for entry in row.entries),
        "epochs": row.run.epochs,
        "steps": row.run.steps,
        "view_passes": row.run.view_passes,
        "seconds": sum(entry.run.seconds for entry in row.entries) / len(row.entries),
        "n": row.n,
        "front": row.front,
        "baseline": row.baseline,
        "failed_checks": " ".join(row.failed),
        "apart": table.apart,
        "origin": "measured",
        **differing(row, table.keys),
    }
    for which in _WHICH:
        figure, against = row.clean if which == "clean" else row.robust, (row.against or {}).get(which)
        if figure is not None:
            record |= {which: figure.value, f"{which}_low": figure.low, f"{which}_high": figure.high}
            record[f"{which}_std"] = figure.std
        if against is not None:
            record |= {f"{which}_diff": against.value, f"{which}_p": against.p, f"{which}_shared": against.shared}
    return record


def _flat_published(condition: Condition, row: Published) -> dict[str, object]:
    return {
        **asdict(condition),
        "label": row.system,
        "epochs": row.epochs,
        "seconds": 60 * row.minutes,
        "clean": round(row.clean / 100, 6),
        "robust": round(row.robust / 100, 6),
        "origin": _NOT_OURS,
    }


def _csv_cell(value: object) -> object:
    """A spreadsheet takes text with these beginnings for a formula; an apostrophe says that it is none."""
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "*": "{*}",  # at the start of a row these would belong to the command before it
    "[": "{[}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex_text(text: str) -> str:
    pieces = [_LATEX.get(character, character) for character in clean(text)]
    return "".join(pieces).replace(" +- ", r" $\pm$ ")
