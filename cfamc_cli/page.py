"""A comparison as one HTML page: nothing from outside, no script, readable on a phone and on paper."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from cfamc_cli import __version__
from cfamc_cli.compare import ComparedTable
from cfamc_cli.errors import CfamcError
from cfamc_cli.files import read_bytes
from cfamc_cli.gather import Gathered
from cfamc_cli.plots import pictures
from cfamc_cli.records import RunRecord, load_record, now
from cfamc_cli.render import clean
from cfamc_cli.sheets import Sheet, sheets

MOST_RUNS = 50  # runs whose recipe the page spells out
MOST_ROWS = 500  # rows of one table
_KINDS = {"": "mark", "run": "name", "recipe": "long"}  # of columns that hold no numbers; the others hold text
_STYLE = """
:root { color-scheme: light; --line: #d8dde3; --soft: #57606a; --mark: #0b62a8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1.2rem; background: #fff; color: #1f2328;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
.verdict { border-left: 4px solid var(--mark); padding: .3rem .8rem; background: #f3f7fb; }
.soft { color: var(--soft); font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #8c959f; vertical-align: bottom; }
.mark { min-width: 1rem; }
.name { min-width: 10rem; overflow-wrap: anywhere; }
.text { min-width: 7rem; overflow-wrap: anywhere; }
.long { min-width: 13rem; overflow-wrap: anywhere; }
.number { text-align: right; }
td.number { white-space: nowrap; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
img { width: 100%; height: auto; border: 1px solid var(--line); }
details { border-bottom: 1px solid var(--line); padding: .3rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: #f6f8fa; padding: .7rem; font-size: .78rem; line-height: 1.35; }
@media screen and (max-width: 40rem) { /* a row becomes a block, a cell a line of it */
  body { padding: .8rem; }
  table, tbody, tr { display: block; }
  thead { display: none; }
  tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  td { display: grid; grid-template-columns: 5.5rem 1fr; border: 0; padding: .05rem 0; }
  td::before { content: attr(data-column); color: var(--soft); }
  td.number { text-align: left; white-space: normal; }
  td.name { display: block; font-weight: 600; }
  td.mark { float: left; display: block; min-width: 0; padding-right: .4rem; }
  td.name::before, td.mark::before { content: none; }
  td:empty { display: none; }
}
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 7pt; width: 100%; }
  th, td { padding: .15rem .3rem; }
  .mark, .name, .long { min-width: 0; }
  .text { min-width: 5rem; }
  .wide, pre { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  tr, img, .verdict { break-inside: avoid; }
  h2 { break-after: avoid; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


def page(tables: Sequence[ComparedTable], found: Gathered, *, with_published: bool) -> str:
    """Write the page.

    Args:
        tables: The comparison.
        found: Where the runs lie, and what was left out.
        with_published: Whether to add the published rows.
    """
    parts = [_sheet(sheet) for sheet in sheets(tables, with_published=with_published)]
    if not tables:
        parts = ["<p>Nothing to compare.</p>"]
    drawn = _pictures(tables, found)  # may leave out more
    left_out = "".join(f"<li>{_text(what)}: {_text(why)}</li>" for what, why in found.left_out)
    if left_out:
        left_out = f"<h2>Left out</h2><ul class=soft>{left_out}</ul>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparison of encoders</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Comparison of encoders</h1>\n"
        f'<p class="soft">{len(found.folders)} runs, {now():%Y-%m-%d %H:%M} UTC, cfamc {_text(__version__)}. '
        "Accuracies in percent with Wilson 95 % intervals, or mean +- standard deviation over seeds.</p>\n"
        f"{''.join(parts)}{drawn}{_runs(tables, found)}{left_out}\n</body>\n</html>\n"
    )


def _sheet(sheet: Sheet) -> str:
    kinds = ["number" if index in sheet.right else _KINDS.get(name, "text") for index, name in enumerate(sheet.columns)]
    names = [_text(name) for name in sheet.columns]

    def line(cells: Sequence[str]) -> str:
        return "".join(
            f'<td class="{kind}" data-column="{name}">{_text(cell)}</td>'
            for kind, name, cell in zip(kinds, names, cells, strict=True)
        )

    rows = "\n".join(f"<tr>{line(row)}</tr>" for row in sheet.rows[:MOST_ROWS])
    notes = list(sheet.notes)
    if len(sheet.rows) > MOST_ROWS:
        notes.append(f"{len(sheet.rows) - MOST_ROWS:,} more rows are not shown.")
    shown = "".join(f'<p class="{"verdict" if " lead" in note else "soft"}">{_text(note)}</p>\n' for note in notes)
    head = "".join(f'<th class="{kind}">{name}</th>' for kind, name in zip(kinds, names, strict=True))
    return (
        f"<h2>{_text(sheet.title)}</h2>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>\n{shown}'
    )


def _pictures(tables: Sequence[ComparedTable], found: Gathered) -> str:
    try:
        drawn = pictures(tables, found)
    except CfamcError as error:
        return f'<p class="soft">No pictures: {_text(error.message)} ({_text(error.hint)}).</p>\n'
    images = "".join(
        f'<img alt="{_text(title)}" src="data:image/svg+xml;base64,{base64.b64encode(data).decode()}">\n'
        for title, data in drawn.items()
    )
    return f'<h2>Pictures</h2>\n<div class="pictures">\n{images}</div>\n' if images else ""


def _runs(tables: Sequence[ComparedTable], found: Gathered) -> str:
    """Recipe and environment of each run, folded away."""
    ids = list(dict.fromkeys(entry.run.id for table in tables for row in table.rows for entry in row.entries))
    blocks = []
    for run in ids[:MOST_RUNS]:
        folder = found.folders[run]
        try:
            record = load_record(folder.run_json, RunRecord)
            recipe = read_bytes(folder.resolved_json).decode("utf-8", "replace")
        except CfamcError as error:
            recipe, environment = error.message, ""
        else:
            environment = record.environment.model_dump_json(indent=2)
        blocks.append(
            f"<details><summary>{_text(run)}</summary>\n<pre>{_block(recipe)}</pre>\n<pre>{_block(environment)}</pre>"
            "</details>\n"
        )
    if len(ids) > MOST_RUNS:
        blocks.append(f'<p class="soft">{len(ids) - MOST_RUNS:,} more runs are not spelled out.</p>\n')
    return f"<h2>Recipes and environments</h2>\n{''.join(blocks)}" if blocks else ""


def _text(text: str) -> str:
    return html.escape(clean(text))


def _block(text: str) -> str:
    return "\n".join(map(_text, text.splitlines()))
