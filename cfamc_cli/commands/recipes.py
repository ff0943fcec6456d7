"""What `cfamc recipes` does: list the shipped recipes, show one, copy one to start from. Never imports torch."""

from __future__ import annotations

import os
from pathlib import Path

from cfamc_cli.errors import invalid
from cfamc_cli.recipe import file
from cfamc_cli.store.files import write_text


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


def copy(reference: str, target: Path | None = None, *, force: bool = False) -> Path:
    """Copy a recipe and return where it lies now.

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
    write_text(target, text)
    return target
