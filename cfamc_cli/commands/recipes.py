"""What `cfamc recipes` does: list the shipped recipes, show one, copy one to start from, say what its keys mean.

Never imports torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from cfamc_cli.errors import invalid
from cfamc_cli.recipe import describe, file
from cfamc_cli.store.files import write_text

SCHEMA = "cfamc-recipe.schema.json"


def titles() -> dict[str, str]:
    """What each shipped recipe trains, in one line: the first comment of its file; the quickstart first.

    Raises:
        CfamcError: One of them cannot be read.
    """
    known = file.shipped()
    return {
        name: file.read(known[name], label=name).partition("\n")[0].removeprefix("#").strip()
        for name in sorted(known, key=lambda name: (name != "quickstart", name))
    }


def show(reference: str) -> str:
    """Return the text of a recipe, comments included.

    Args:
        reference: As for `file.load`.

    Raises:
        CfamcError: There is no such recipe, or it cannot be read.
    """
    return file.read(file.find(reference), label=reference)


def explain(key: str) -> str:
    """What a key of a recipe means, in its forms; a table or no key at all is told with all keys in it.

    Args:
        key: As for `describe.explain`.

    Raises:
        CfamcError: No recipe has such a key.
    """
    from textwrap import indent

    told = []
    for entry in describe.explain(key):
        name = entry.key if entry.value else f"[{entry.key}]"
        told.append(f"{name}{f', {entry.form}' if entry.form else ''}\n")
        told += [indent(f"{line}\n", "    ") for line in (entry.meaning, entry.value) if line]
    return "".join(told)


def json_schema() -> str:
    """The JSON schema of a recipe, as editors read it."""
    return json.dumps(describe.json_schema(), indent=2) + "\n"


def copy(reference: str, target: Path | None = None, *, force: bool = False) -> Path:
    """Copy a recipe and return where it lies now; beside it goes the schema that its first line tells editors of.

    Args:
        reference: As for `file.load`.
        target: A file, or a folder to put it in; left out, the working folder.
        force: Replace a file that is there.

    Raises:
        CfamcError: There is no such recipe, the target exists, or it cannot be written.
    """
    source = file.find(reference)
    text = file.read(source, label=reference)
    target = target or Path()
    if target.is_dir():
        target = target / source.name
    if os.path.lexists(target) and not force:
        raise invalid(f"{target} exists", "--force replaces it; or name another file")
    described = target.parent / SCHEMA
    if not described.exists() or describe.TITLE in file.read(described, label=SCHEMA):  # else it is somebody else's
        write_text(described, json_schema())
    write_text(target, f"#:schema ./{SCHEMA}\n{text}")
    return target
