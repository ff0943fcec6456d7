"""What a shell offers when Tab is pressed: recipes, runs, heads, attacks, keys. What cannot be read offers nothing."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import get_args

import typer

from cfamc_cli.errors import CfamcError

Offer = tuple[str, str]  # a word, and what it means


def recipes(incomplete: str) -> list[Offer]:
    """Shipped recipes, files of recipes and the folders on the way to them."""
    from cfamc_cli.commands.recipes import titles

    typed = Path(incomplete)
    here = typed if incomplete.endswith("/") else typed.parent
    start = incomplete[: len(incomplete) - len("" if incomplete.endswith("/") else typed.name)]
    with suppress(OSError):
        files = [(f"{start}{path.name}{'/' * path.is_dir()}", "") for path in sorted(here.iterdir())]
        return [*titles().items(), *(file for file in files if file[0].endswith((".toml", "/")))]
    return list(titles().items())


def runs(context: typer.Context) -> list[Offer]:
    """The runs of the store that --runs names, the newest first, and their tags."""
    from cfamc_cli.store.runs import LATEST, default_store, list_runs

    offers: list[Offer] = []
    with suppress(CfamcError):
        for run in reversed(list_runs(default_store(context.params.get("runs")))):
            with suppress(CfamcError):
                record = run.record()
                offers += [(run.id, run.state(record)), *((tag, run.id) for tag in run.tags())]
    return [(LATEST, "the newest"), *offers] if offers else []


def kinds(key: str) -> list[Offer]:
    """The forms that a table of a recipe may have: its heads or attacks."""
    from cfamc_cli.recipe import describe

    forms = (entry for entry in describe.explain(key) if not entry.value)
    return [(name, _first_line(entry.meaning)) for entry in forms for name in entry.choices]


def heads(context: typer.Context) -> list[Offer]:
    """The heads of the run that stands on the line, or of the newest, and the kinds of heads."""
    from cfamc_cli.store.runs import LATEST, default_store, find_run, finished_probes

    offers: list[Offer] = []
    if context.info_name != "probe":
        with suppress(CfamcError):
            run = find_run(default_store(context.params.get("runs")), _subject(context) or LATEST)
            offers = [(folder.name, f"{record.head} head") for folder, record in finished_probes(run)]
    return offers + kinds("probe")


def attacks() -> list[Offer]:
    """Attacks and measures."""
    from cfamc_cli.recipe.schema import Measure

    measures = [(table.model_fields["name"].annotation, table.__doc__) for table in get_args(Measure)]
    return kinds("attack") + [
        (name, _first_line(told or "")) for literal, told in measures for name in get_args(literal)
    ]


def settings(context: typer.Context, incomplete: str) -> list[Offer]:
    """Keys for --set with their values where there are few, else with the recipe's; of probe only those of its table.

    A second word that begins alike keeps bash from closing `key=` with a blank.
    """
    from cfamc_cli.recipe import describe, file

    known: dict[str, str] = {}
    with suppress(CfamcError):
        known = file.settings(file.load(_subject(context)))
    start = "probe." if context.info_name == "probe" else ""
    offers: dict[str, str] = {}
    for entry in describe.explain(start.rstrip(".")):
        if entry.value and entry.key.startswith(incomplete.partition("=")[0]):
            words = entry.choices or ("", known.get(entry.key, "").strip('"'))
            offers |= {f"{entry.key}={word}": entry.meaning for word in words if " " not in word}
    return list(offers.items())


def keys() -> list[Offer]:
    """Keys and tables of recipes."""
    from cfamc_cli.recipe import describe

    return list({entry.key: _first_line(entry.meaning) for entry in describe.explain("")}.items())


@contextmanager
def joined_for_bash() -> Iterator[None]:
    """Where bash asks, which splits words at `=`: join them, and offer only what it would put behind the `=`."""
    if os.environ.get("_CFAMC_COMPLETE") != "complete_bash":
        yield
        return
    at = int(os.environ["COMP_CWORD"])
    words = os.environ["COMP_WORDS"].split("\n")[: at + 1]
    line = re.sub("\n=\n?", "=", "\n".join(words))
    os.environ |= {"COMP_WORDS": line, "COMP_CWORD": str(at - len(words) + 1 + line.count("\n"))}
    before = line.rpartition("\n")[2].removesuffix(words[-1].removeprefix("="))
    offered = io.StringIO()
    try:
        with redirect_stdout(offered):
            yield
    finally:
        sys.stdout.writelines(word.removeprefix(before) for word in offered.getvalue().splitlines(keepends=True))


def _subject(context: typer.Context) -> str:
    """The recipe or run that stands on the line; an option that still lacks its value leaves it unread."""
    return str(context.params.get("recipe") or context.params.get("run") or next(iter(context.args), ""))


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
