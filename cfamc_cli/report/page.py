"""A comparison as one HTML page: nothing from outside, no script, readable on a phone and on paper."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cfamc_cli import __version__
from cfamc_cli.comparison.gather import Gathered, LeftOut
from cfamc_cli.comparison.tables import ComparedTable
from cfamc_cli.errors import CfamcError
from cfamc_cli.report.beside import beside
from cfamc_cli.report.closer import close_up
from cfamc_cli.report.plots import Curves, draw, leading, looks_of, results, trainings
from cfamc_cli.report.sheets import figure_text, sheets
from cfamc_cli.report.terminal import clean, templates
from cfamc_cli.store.files import read_bytes
from cfamc_cli.store.records import now

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_RUNS = 50  # runs whose recipe the page spells out
MOST_ROWS = 500  # rows of one table
_EXAMPLES = "images as they are, as the attack moved them, and the difference amplified; below, what each is taken for."


def page(
    tables: Sequence[ComparedTable],
    found: Gathered,
    curves: Curves,
    left_out: Sequence[LeftOut],
    *,
    with_published: bool,
) -> str:
    """Write the page.

    Args:
        tables: The comparison.
        found: Where the runs lie.
        curves: Their learning curves.
        left_out: What could not be used, and why.
        with_published: Whether to add the published rows.
    """
    from markupsafe import Markup

    def cleaned(value: object) -> str | Markup:
        """What the template writes is never interpreted, by a browser or by a terminal that shows the source."""
        return value if isinstance(value, Markup) else clean(value)

    table = leading(tables)
    closer, examples, without = close_up(table, found.folders) if table else ({}, {}, [])
    groups = [
        ("Results", results(tables, table) if table else {}),
        ("Training", trainings(curves, looks_of(table)) if table else {}),
        ("A closer look", closer),
    ]
    drawn: list[tuple[str, list[tuple[str, str, bytes]]]] = []
    missing = None
    try:
        for name, group in groups:
            told = {f"{', '.join(title.splitlines())}: {panel.words}.": panel for title, panel in group.items()}
            drawn.append((name, [(words, "svg+xml", draw([panel], ".svg")) for words, panel in told.items()]))
    except CfamcError as error:
        missing = error
    drawn.append(("Adversarial examples", [(f"{title}: {_EXAMPLES}", "png", data) for title, data in examples.items()]))
    runs = list(dict.fromkeys(entry.run.id for table in tables for row in table.rows for entry in row.entries))
    return (
        templates()
        .overlay(autoescape=True, finalize=cleaned)
        .get_template("page.html")
        .render(
            count=len(found.folders),
            now=f"{now():%Y-%m-%d %H:%M}",
            version=__version__,
            sheets=[
                sheet.filled()
                for sheet in [*(sheets(tables, with_published=with_published) if tables else []), *beside(found)]
            ],
            most_rows=MOST_ROWS,
            opening=_opening(table) if table else "",
            pictures=[
                (name, [(words, kind, Markup(base64.b64encode(data).decode())) for words, kind, data in group])
                for name, group in drawn
                if group
            ],
            missing=missing,
            runs=[(run, _details(run, found)) for run in runs[:MOST_RUNS]],
            more_runs=len(runs[MOST_RUNS:]),
            left_out=[*left_out, *without],
        )
    )


def _opening(table: ComparedTable) -> str:
    """What the leading table says, in a sentence."""
    if table.verdict:
        return f"{table.verdict}."
    row = table.rows[0]
    robust = f", {table.condition.figure} {figure_text(row.robust)} %" if row.robust else ""
    return f"{row.label}: clean {figure_text(row.clean)} %{robust}."


def _details(run: str, found: Gathered) -> tuple[list[str], list[str]]:
    """Lines of the recipe and of the environment of a run."""
    folder = found.folders[run]
    try:
        record = folder.record()
        recipe = read_bytes(folder.resolved_json).decode("utf-8", "replace")
    except CfamcError as error:
        return [error.message], []
    return recipe.splitlines(), record.environment.model_dump_json(indent=2).splitlines()
