"""Filters and sort keys over results, such as "adversary.name=free", "robust>=30" and "seconds:desc"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from cfamc_cli.compare import Entry, Row, Scalar, SortKey, exact_number
from cfamc_cli.errors import CfamcError, ExitCode

_FILTER = re.compile(r"\s*([^=<>!\s]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<=": lambda mine, given: mine <= given,
    ">=": lambda mine, given: mine >= given,
    "!=": lambda mine, given: mine != given,
    "=": lambda mine, given: mine == given,
    "<": lambda mine, given: mine < given,
    ">": lambda mine, given: mine > given,
}


def fields_of(entry: Entry) -> dict[str, Scalar]:
    """Everything that results can be filtered and sorted by; accuracies in percent, time in seconds."""
    run, condition = entry.run, entry.condition
    known: dict[str, Scalar] = {
        "run": run.id,
        "name": run.name,
        "seed": run.seed,
        "epochs": run.epochs,
        "steps": run.steps,
        "views": run.view_passes,
        "seconds": run.seconds,
        "dataset": condition.dataset,
        "split": condition.split,
        "head": condition.head,
        "features": condition.features,
        "n": (entry.robust or entry.clean).n,
        "clean": 100 * entry.clean.value,
    }
    if entry.robust is not None:
        known |= {
            "robust": 100 * entry.robust.value,
            "space": condition.space,
            "norm": condition.norm,
            "eps": condition.eps,
            "attack": condition.attack,
        }
    return {**entry.run.recipe, **dict(entry.head), **known}


def filtered(entries: Sequence[Entry], filters: Sequence[str]) -> list[Entry]:
    """Keep the results that pass every filter; one that lacks the key does not.

    Raises:
        CfamcError: A filter cannot be read, or no result has its key; exit code 2.
    """
    kept = list(entries)
    for text in filters:
        found = _FILTER.fullmatch(text)
        if found is None:
            raise _invalid(f"cannot read the filter {text!r:.200}", "write KEY=VALUE, with = != < <= > or >=")
        key, operator, value = found.groups()
        _check_key(entries, key)
        kept = [entry for entry in kept if _passes(fields_of(entry).get(key), operator, value, text)]
    return kept


def sort_key(entries: Sequence[Entry], text: str) -> SortKey:
    """Make a sort key from "KEY", "KEY:asc" or "KEY:desc"; accuracies fall and the rest rises unless told.

    Raises:
        CfamcError: No result has the key; exit code 2.
    """
    key, _, direction = text.partition(":")
    direction = direction or ("desc" if key in ("clean", "robust") else "asc")
    if direction not in ("asc", "desc"):
        raise _invalid(f"cannot sort in the direction {direction!r:.200}", "write KEY:asc or KEY:desc")
    _check_key(entries, key)
    sign = -1 if direction == "desc" else 1

    def rank(row: Row) -> tuple[bool, float, str]:
        """Rows without the key come last, whole numbers before texts."""
        figure = {"clean": row.clean, "robust": row.robust}.get(key)
        value = figure.value if figure is not None else fields_of(row.entries[0]).get(key)
        number = _number(value)
        if number is not None:
            return (False, sign * number, "")
        if value is None:
            return (True, 0.0, "")
        return (False, 0.0, str(value) if sign > 0 else "".join(chr(0x10FFFF - ord(c)) for c in str(value)))

    return rank


def _passes(mine: Scalar, operator: str, given: str, text: str) -> bool:
    if mine is None:
        return False
    number, wanted = _number(mine), exact_number(given)
    if number is not None and wanted is not None:
        return _COMPARE[operator](number, wanted)
    if operator not in ("=", "!="):
        raise _invalid(
            f"cannot compare {str(mine)!r:.60} with {given!r:.60} in the filter {text!r:.200}", "use = or !="
        )
    equal = str(mine).lower() == given.lower() if isinstance(mine, bool) else str(mine) == given
    return equal == (operator == "=")


def _number(value: Scalar) -> float | None:
    if isinstance(value, str):
        return exact_number(value)
    return None if value is None or isinstance(value, bool) else float(value)


def _check_key(entries: Sequence[Entry], key: str) -> None:
    known: set[str] = set()
    for entry in entries:
        known.update(fields_of(entry))
    if entries and key not in known:
        near = difflib.get_close_matches(key, known, n=3)
        raise _invalid(f"no result has a key {key!r:.200}", f"did you mean {' or '.join(near)}?" if near else "")


def _invalid(message: str, hint: str) -> CfamcError:
    return CfamcError(message, hint=hint, exit_code=ExitCode.INVALID)
