"""`cfamc compare`: which encoder is better, and whether the difference is real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from cfamc_cli.comparison.gather import Gathered, KeptOutcomes, LeftOut, gather, runs_of
from cfamc_cli.comparison.selection import Filter, filtered, row_filter, sort_key
from cfamc_cli.comparison.tables import ComparedTable, Entry, find_superseded, tabulate
from cfamc_cli.errors import CfamcError, invalid
from cfamc_cli.report import sheets, terminal
from cfamc_cli.report.bench import side_by_side
from cfamc_cli.report.beside import beside
from cfamc_cli.report.sheets import Format, Sheet
from cfamc_cli.store.files import write_bytes, write_text
from cfamc_cli.store.runs import default_store, find_run

_PICTURES = (".png", ".svg", ".pdf")


def compare(
    references: Sequence[str],
    *,
    runs: Path | None,
    where: Sequence[str],
    sort: str,
    baseline: str | None,
    published: bool,
    fold: bool,
    limit: int,
    output: Format,
    plot: Path | None,
    html: Path | None,
    checklist: bool = False,
) -> None:
    """Compare runs, on stdout; what was left out is said on stderr.

    Args:
        references: Stores, runs, ids or beginnings of ids; the store where there is none.
        runs: The store; CFAMC_RUNS or ./runs where it is None.
        where: Filters, such as "adversary.name=free", "robust>=30" or "clean_diff>0"; all must hold.
        sort: "KEY", "KEY:asc" or "KEY:desc"; empty for the most robust first.
        baseline: Run that the others are held against.
        published: Whether to add the rows of the published table.
        fold: Whether the seeds of one recipe become one row.
        limit: Rows of a table that are shown on a terminal; 0 for all.
        output: What is written to stdout.
        plot: Picture to write: .png, .svg or .pdf.
        html: Page to write.
        checklist: Print what the NeurIPS checklist asks of experiments, as Markdown, in place of the tables.

    Raises:
        CfamcError: A reference, filter or sort key means nothing, the baseline has no row, or a file cannot be
            written.
    """
    if plot is not None and plot.suffix not in _PICTURES:
        raise invalid(f"cannot draw {plot.suffix!r:.20}", "use .png, .svg or .pdf")
    store = default_store(runs)
    filters = [Filter.parse(text) for text in where]
    found = gather(references, store, keys={sort.partition(":")[0], *(wanted.key for wanted in filters)})
    passing = filtered(found.entries, filters)
    superseded = find_superseded(passing, fold=fold)
    entries = [entry for index, entry in enumerate(passing) if index not in superseded]
    left_out = found.left_out + [
        (f"{passing[index].run.id} {passing[index].result}", f"{other} stands for it")
        for index, other in superseded.items()
    ]
    held = _baseline_id(baseline, found, store)
    if held is not None and not any(entry.run.id == held for entry in entries):
        raise _no_row(held, found, passing, left_out)
    outcomes_of = KeptOutcomes(found.folders)
    tables = tabulate(
        entries,
        fold=fold,
        baseline=held,
        outcomes_of=outcomes_of,
        order=sort_key(entries, sort, baseline=held) if sort else None,
        keep=row_filter(filters, baseline=held),
    )
    left_out += outcomes_of.left_out
    if plot is not None or html is not None:
        from cfamc_cli.report.plots import draw, learning_curves, panels

        curves, without = learning_curves(tables, found.folders)
        left_out += without
    console = terminal.talk()
    for what, why in left_out:
        console.say(f"left out: {what}: {why}")
    if filters:
        kept = {entry.run.id for table in tables for row in table.rows for entry in row.entries}
        found.unlabelled = [record for record in found.unlabelled if record.run in kept]
        found.transfers = [transfer for transfer in found.transfers if transfer.entry.run.id in kept]
    if not (entries or found.benches or found.unlabelled or found.transfers):
        console.say("nothing to compare: no finished run with a measured result")
    if plot is not None:  # files first: where one cannot be written, stdout has nothing but the error
        write_bytes(plot, draw(list(panels(tables, curves).values()), plot.suffix))
    if html is not None:
        from cfamc_cli.report.page import page

        write_text(html, page(tables, found, curves, left_out, with_published=published))
    if checklist:
        from cfamc_cli.report.checklist import checklist as answers

        folders = [run for reference in references or [str(store)] for run in runs_of(reference, store)]
        terminal.write_out(answers(tables, folders))
        return
    _write(tables, left_out, found, output=output, published=published, limit=limit)


def _baseline_id(reference: str | None, found: Gathered, store: Path) -> str | None:
    if reference is None or reference in found.folders:
        return reference
    matches = [run for run in found.folders if reference and run.startswith(reference)]
    if len(matches) != 1:
        folder = find_run(store, reference).path.resolve()
        matches = [run for run, other in found.folders.items() if other.path.resolve() == folder]
    if not matches:
        raise invalid(f"the baseline {reference!r:.200} is not among the runs that are compared")
    return matches[0]


def _no_row(baseline: str, found: Gathered, passing: Sequence[Entry], left_out: Sequence[LeftOut]) -> CfamcError:
    """Why there is nothing of the baseline to hold the others against."""
    reasons = [why for what, why in left_out if what.split(" ")[0] == baseline]
    why, hint = reasons[-1] if reasons else "nothing was measured on it", "name another run, or leave --baseline out"
    if any(entry.run.id == baseline for entry in passing):
        hint = "name the other run, or keep both with --no-fold"
    elif any(entry.run.id == baseline for entry in found.entries):
        why, hint = "no result of it passes --where", "loosen the filters, or name another run"
    return invalid(f"there is nothing of the baseline {baseline} to compare with: {why}", hint)


def _write(
    tables: Sequence[ComparedTable],
    left_out: Sequence[LeftOut],
    found: Gathered,
    *,
    output: Format,
    published: bool,
    limit: int,
) -> None:
    def told(limit: int = 0) -> list[Sheet]:
        made = sheets.sheets(tables, with_published=published, limit=limit)
        made += beside(found, limit=limit)
        return made + ([side_by_side(found.benches, limit=limit)] if found.benches else [])

    match output:
        case "rich":
            for sheet in told(limit):
                _print(sheet)
        case "json":
            terminal.print_json(sheets.as_json(tables, left_out, found, with_published=published))
        case "csv":
            terminal.write_out(sheets.comma_separated(tables, with_published=published))
        case "markdown":
            terminal.write_out("".join(map(sheets.markdown, told())))
        case "latex":
            terminal.write_out("".join(map(sheets.latex, told())))
        case _:
            assert_never(output)


def _print(sheet: Sheet) -> None:
    """Print a sheet; on a terminal too narrow for it, recipes and notes go below, and columns of the cost go away."""
    narrow = sheet = sheet.filled()
    for name in sheets.DISPENSABLE:
        if not terminal.fits(narrow.columns, narrow.rows, wrapped=name not in sheets.SAID):
            narrow = narrow.without(name)
    if not terminal.fits(narrow.columns, narrow.rows):
        narrow = sheet  # it becomes a list, which has room for everything
    terminal.print_rows(narrow.title, narrow.columns, narrow.rows, right=narrow.right)
    gone = [name for name in sheet.columns if name not in narrow.columns]
    said = [index for index, name in enumerate(sheet.columns) if name in gone and name in sheets.SAID]
    below = [f"{row[1]}: {'; '.join(cells)}" for row in sheet.rows if (cells := [row[at] for at in said if row[at]])]
    if costs := [name for name in gone if name not in sheets.SAID]:
        below.append(f"Too wide for this terminal: {', '.join(costs)}; --format csv has them.")
    if sheet.more:
        below.append(f"{sheet.more:,} more rows; --limit 0 shows all")
    terminal.write_lines([*below, *sheet.notes, ""])
