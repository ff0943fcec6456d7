"""Comparisons as text: cells for people, and the same tables as JSON, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cfamc_cli.comparison.gather import Gathered
from cfamc_cli.comparison.published import Published, published
from cfamc_cli.comparison.statistics import Figure, probability
from cfamc_cli.comparison.tables import ComparedTable, Condition, Row, Which, exact_number
from cfamc_cli.recipe.plan import duration
from cfamc_cli.report.terminal import clean, percent

Format = Literal["rich", "json", "csv", "markdown", "latex"]
MOST_KEYS = 6  # recipe keys that a cell spells out
_NOT_OURS = "published, not measured here"
_WHICH: tuple[Which, ...] = ("clean", "robust")
_MEASURED = ("", "run", "clean %", "robust %")
_AGAINST = ("clean diff", "clean p", "robust diff", "robust p", "shared")
_COST = ("n", "time", "epochs", "passes")
SAID = ("recipe", "note")
DISPENSABLE = (*SAID, "passes", "epochs", "time")  # in the order in which a narrow terminal loses them


@dataclass(frozen=True)
class Sheet:
    """A table of text."""

    title: str
    columns: tuple[str, ...]  # headings
    right: tuple[int, ...]  # columns of numbers
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()  # sentences that belong below
    more: int = 0  # rows that were left out

    def without(self, name: str) -> Sheet:
        """The same rows without a column; itself where there is no such column."""
        if name not in self.columns:
            return self
        at = self.columns.index(name)
        right = tuple(index - (index > at) for index in self.right if index != at)
        rows = tuple(row[:at] + row[at + 1 :] for row in self.rows)
        return replace(self, columns=self.columns[:at] + self.columns[at + 1 :], right=right, rows=rows)

    def filled(self) -> Sheet:
        """The same rows without the named columns in which nothing stands."""
        sheet = self
        for name, *cells in zip(self.columns, *self.rows, strict=True):
            if name and cells and not any(cells):
                sheet = sheet.without(name)
        return sheet


def sheets(tables: Sequence[ComparedTable], *, with_published: bool, limit: int = 0) -> list[Sheet]:
    """Spell out a comparison: accuracy by eps in one sheet, as papers print it, where there are several radii; a sheet
    a table, one for what stands alone, and published rows where asked for.

    Args:
        tables: The comparison.
        with_published: Whether published rows stand beside those of the tables.
        limit: Measured rows of a sheet; 0 for all.
    """
    shown = [table for index, table in enumerate(tables) if index == 0 or len(table.rows) > 1]
    alone = [table for index, table in enumerate(tables) if index > 0 and len(table.rows) == 1]
    known = published() if with_published else {}
    own = [_as_published(table.condition) for table in shown]
    made = _by_eps(tables, limit)
    made += [_sheet(table, known.get(beside, []), limit) for table, beside in zip(shown, own, strict=True)]
    if alone:
        made.append(_apart(alone, limit))
    return made + [_published_sheet(condition, rows) for condition, rows in known.items() if condition not in own]


def _as_published(condition: Condition) -> Condition:
    """The condition without what is not published of it: digests, and settings but for the version of AutoAttack."""
    settings = condition.settings if condition.attack == "autoattack" else ""
    return replace(condition, fingerprint="", settings=settings)


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
    columns = [*_FLAT, *keys]
    return csv_text(columns, ([record.get(column) for column in columns] for record in records))


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV; text that a spreadsheet would take for a formula is marked as text."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_csv_cell(cell) for cell in row] for row in (columns, *rows))
    return out.getvalue()


def as_json(
    tables: Sequence[ComparedTable],
    left_out: Sequence[tuple[str, str]],
    found: Gathered,
    *,
    with_published: bool,
) -> dict[str, object]:
    """The whole comparison as plain JSON values; fractions and seconds."""
    made: dict[str, object] = {
        "schema_version": 1,
        "tables": [
            {
                "title": table.condition.title(),
                "condition": asdict(table.condition),
                "figure": table.condition.figure,  # what "robust" of a row is: robust, corrupted or certified
                "not_comparable_with_the_first": table.apart,
                "verdict": table.verdict,
                "notes": list(table.notes),
                "keys": list(table.keys),
                "rows": [_json_row(table, row) for row in table.rows],
            }
            for table in tables
        ],
        "left_out": [{"what": what, "why": why} for what, why in left_out],
        "transfers": [transfer.plain() for transfer in found.transfers],
        "unlabelled": [record.model_dump(mode="json") for record in found.unlabelled],
        "benches": [bench.model_dump(mode="json") for bench in found.benches],
    }
    if with_published:
        made["published"] = [
            {"origin": _NOT_OURS, **asdict(condition), **asdict(row)}
            for condition, rows in published().items()
            for row in rows
        ]
    return made


def figure_text(figure: Figure | None) -> str:
    """Such as "75.9 [75.0, 76.7]" for one run and "75.9 \u00b1 0.3" for several, in percent."""
    if figure is None:
        return ""
    if figure.low is None or figure.high is None:
        return f"{percent(figure.value)} \u00b1 {percent(figure.std or 0.0)}"
    return f"{percent(figure.value)} [{percent(figure.low)}, {percent(figure.high)}]"


def compact(count: int) -> str:
    """Such as 24.0 M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _by_eps(tables: Sequence[ComparedTable], limit: int) -> list[Sheet]:
    """The rows of the first table with a column for each eps under which its attack was made; none for a single one."""
    same: dict[str, ComparedTable] = {}
    for table in tables:
        if table.condition.attack and replace(table.condition, eps="") == replace(tables[0].condition, eps=""):
            same.setdefault(table.condition.eps, table)
    if len(same) < 2:
        return []
    radii = sorted(same, key=lambda eps: exact_number(eps) or 0.0)
    found = {eps: {row.who: row for row in same[eps].rows} for eps in radii}
    rows, shown = [], tables[0].rows[: limit or None]
    for row in shown:
        own = {eps: found[eps][row.who] for eps in radii if row.who in found[eps]}
        cells = [figure_text(own[eps].robust) if eps in own else "" for eps in radii]
        wrong = [f"{eps} not trusted: {', '.join(part.failed)}" for eps, part in own.items() if part.failed]
        wrong += [f"{eps} on {part.n:,}" for eps, part in own.items() if part.n != row.n]
        rows.append((row.label, f"{row.n:,}", figure_text(row.clean), *cells, "; ".join(wrong)))
    title = replace(tables[0].condition, eps="of several sizes").title()
    columns = ("run", "n", "clean %", *(f"{eps} %" for eps in radii), "note")
    more = len(tables[0].rows) - len(shown)
    return [Sheet(title, columns, tuple(range(1, len(columns) - 1)), tuple(rows), more=more)]


def _sheet(table: ComparedTable, beside: Sequence[Published], limit: int) -> Sheet:
    held, shown = any(row.against for row in table.rows), table.rows[: limit or None]
    second = f"{table.condition.figure} %"
    columns = (*_MEASURED[:-1], second, *(_AGAINST if held else ()), *_COST, *SAID)
    rows = [
        (*_measured(row), *(_against_cells(row) if held else ()), *_cost(row), _recipe(table, row), _note(row))
        for row in shown
    ]
    rows += [_published_cells(row, held=held) for row in beside]
    notes = [table.verdict] if table.verdict else []
    notes += table.notes
    if table.apart:
        notes.append(f"Not comparable with the first table: {table.apart}.")
    if any(row.front for row in table.rows):
        notes.append("*: no other row is at least as good in both accuracies and better in one.")
    if beside:
        notes.append(f"Published rows: {_sources(beside)}; hardware and samples are not those of the rows above.")
    right, more = tuple(range(2, len(columns) - 2)), len(table.rows) - len(shown)
    return Sheet(table.condition.title(), columns, right, tuple(rows), tuple(notes), more)


def _apart(tables: Sequence[ComparedTable], limit: int) -> Sheet:
    shown = tables[: limit or None]
    rows = [
        (row.label, f"{row.n:,}", figure_text(row.clean), _called(table, row), why)
        for table in shown
        for row in table.rows
        for why in ["; ".join(filter(None, [*_untrusted(row), table.apart]))]
    ]
    title = "Apart: not comparable with the first table, nor with each other"
    columns = ("run", "n", "clean %", "robust %", "where it differs")
    return Sheet(title, columns, (1, 2, 3), tuple(rows), more=len(tables) - len(shown))


def _called(table: ComparedTable, row: Row) -> str:
    """The second accuracy, by its name where it is none under attack."""
    text = figure_text(row.robust)
    return text if table.condition.figure == "robust" else f"{text} {table.condition.figure}"


def _published_sheet(condition: Condition, rows: Sequence[Published]) -> Sheet:
    attack = {"pgd": "PGD", "autoattack": "AutoAttack"}[condition.attack]
    head = "trained with labels" if condition.head == "supervised" else f"{condition.head} head on {condition.features}"
    title = f"Published: {condition.dataset} test, {head}, {attack}, linf {condition.eps} in image space"
    cells = tuple(_published_cells(row, held=False) for row in rows)
    note = f"{_sources(rows)}; nothing in this table was measured here."
    return Sheet(title, (*_MEASURED, *_COST, *SAID), tuple(range(2, 8)), cells, (note,)).without("recipe")


def _sources(rows: Sequence[Published]) -> str:
    return "; ".join(dict.fromkeys(row.source for row in rows))


def _published_cells(row: Published, *, held: bool) -> tuple[str, ...]:
    measured = ("", row.system, "" if row.clean is None else f"{row.clean:g}", f"{row.robust:g}")
    return (
        *measured,
        *("" for _ in _AGAINST if held),
        "",
        "" if row.minutes is None else duration(60 * row.minutes),
        "" if row.epochs is None else str(row.epochs),
        "",
        "",
        _NOT_OURS,
    )


def _measured(row: Row) -> tuple[str, ...]:
    return ("*" if row.front else "", row.label, figure_text(row.clean), figure_text(row.robust))


def _cost(row: Row) -> tuple[str, ...]:
    """`passes` are all of them; in parentheses those of an adversary's own steps."""
    ascent = row.run.attack_view_passes
    passes = compact(row.run.passes) + (f" ({compact(ascent)})" if ascent else "")
    return (f"{row.n:,}", duration(row.seconds), f"{row.run.epochs:g}", passes)


def _recipe(table: ComparedTable, row: Row) -> str:
    settings = [f"{key}={value}" for key, value in differing(table, row).items()]
    more = [f"and {len(settings) - MOST_KEYS} more"] if len(settings) > MOST_KEYS else []
    return ", ".join(settings[:MOST_KEYS] + more)


def differing(table: ComparedTable, row: Row) -> dict[str, object]:
    """The settings of a row in which its table differs, as far as it has them."""
    known = {**row.run.recipe, **dict(row.entries[0].head)}
    return {key: known[key] for key in table.keys if key in known}


def _against_cells(row: Row) -> list[str]:
    cells, shared = [], 0
    for which in _WHICH:
        part = (row.against or {}).get(which)
        p = "" if part is None or part.p is None else probability(part.p).removeprefix("= ")
        cells += ["" if part is None else f"{100 * part.value:+.1f}", p]
        shared = max(shared, part.shared or 0 if part else 0)
    return [*cells, f"{shared:,}" if shared else ""]


def _note(row: Row) -> str:
    parts = ["baseline"] if row.baseline else []
    parts += [entry.remark for entry in row.entries if entry.remark]
    if any(entry.whole for entry in row.entries):
        parts.append(f"cut from n {' '.join(f'{(entry.whole or entry).n:,}' for entry in row.entries)}")
    parts += _untrusted(row)
    last = (row.against or {}).get("robust", (row.against or {}).get("clean"))
    if last is not None and last.shared is None:
        parts.append("difference not paired")
    return "; ".join(parts)


def _untrusted(row: Row) -> list[str]:
    return [f"not trusted: {', '.join(row.failed)}"] if row.failed else []


def _json_figure(figure: Figure) -> dict[str, float | None]:
    return {name: getattr(figure, name) for name in Figure.__slots__}  # asdict takes ten times as long


def _json_row(table: ComparedTable, row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "runs": [entry.run.id for entry in row.entries],
        "seeds": [entry.run.seed for entry in row.entries],
        "results": [entry.result for entry in row.entries],
        "name": row.run.name,
        "recipe": differing(table, row),
        "epochs": row.run.epochs,
        "steps": row.run.steps,
        "view_passes": row.run.view_passes,
        "attack_view_passes": row.run.attack_view_passes,
        "seconds": [entry.run.seconds for entry in row.entries],
        "n_measured": [(entry.whole or entry).n for entry in row.entries],
        "clean": _json_figure(row.clean),
        "robust": _json_figure(row.robust) if row.robust else None,
        "front": row.front,
        "baseline": row.baseline,
        "against": {which: asdict(part) for which, part in row.against.items()} if row.against else None,
        "failed_checks": list(row.failed),
    }


_FLAT = (  # columns of the CSV
    *Condition.__dataclass_fields__,
    *("label", "runs", "seeds", "epochs", "steps", "view_passes", "attack_view_passes", "seconds", "n"),
    *(f"{which}{part}" for which in _WHICH for part in ("", "_low", "_high", "_std")),
    *("front", "baseline"),
    *(f"{which}_{part}" for which in _WHICH for part in ("diff", "p", "shared")),
    *("failed_checks", "apart", "origin"),
)


def _flat(table: ComparedTable, row: Row) -> dict[str, object]:
    """What JSON tells of a row, without lists or tables in it."""
    told = _json_row(table, row)
    record = {**asdict(table.condition), **told, "n": row.n, "seconds": row.seconds, "apart": table.apart}
    record |= {key: " ".join(map(str, told[key])) for key in ("runs", "seeds", "failed_checks")}
    record |= {"origin": "measured", **told["recipe"]}
    for which in _WHICH:
        figure, against = told[which] or {}, (told["against"] or {}).get(which, {})
        record |= {f"{which}_{part}": value for part, value in (figure | against).items()}
        record |= {which: figure.get("value"), f"{which}_diff": against.get("value")}
    return record


def _flat_published(condition: Condition, row: Published) -> dict[str, object]:
    return {
        **asdict(condition),
        "label": row.system,
        "epochs": row.epochs,
        "seconds": None if row.minutes is None else 60 * row.minutes,
        "clean": None if row.clean is None else round(row.clean / 100, 6),
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
    "\u00b1": r"$\pm$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex_text(text: str) -> str:
    pieces = [_LATEX.get(character, character) for character in clean(text)]
    return "".join(pieces)
