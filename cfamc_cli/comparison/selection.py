"""Filters and sort keys over results, such as "adversary.name=free", "robust>=30" and "seconds:desc"."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cfamc_cli.comparison.tables import Entry, Row, RowFilter, Scalar, SortKey, Which, exact_number
from cfamc_cli.errors import invalid

_FILTER = re.compile(r"\s*([^=<>!\s]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_DIFFERENCES: Mapping[str, tuple[Which, str]] = {  # keys of a row that is held against a baseline
    "clean_diff": ("clean", "value"),
    "clean_p": ("clean", "p"),
    "robust_diff": ("robust", "value"),
    "robust_p": ("robust", "p"),
}
# What is measured of a run: a filter that took single seeds by it would leave a mean of the lucky ones.
_RESULTS = ("clean", "robust", "corrupted", "certified", "knn", "loss", "memory", "seconds", "time")
_LARGEST_FIRST = ("clean", "robust", "corrupted", "certified", "knn", "clean_diff", "robust_diff")


@dataclass(frozen=True)
class Filter:
    """A condition on results, or on rows where its key is an outcome: a result, or a difference to the baseline."""

    key: str
    operator: str
    value: str
    text: str  # as it was written

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read "KEY=VALUE", with = != < <= > or >=.

        Raises:
            CfamcError: It cannot be read; exit code 2.
        """
        found = _FILTER.fullmatch(text)
        if found is None:
            raise invalid(f"cannot read the filter {text!r:.200}", "write KEY=VALUE, with = != < <= > or >=")
        return cls(found[1], found[2], found[3], text)

    def passes(self, mine: Scalar) -> bool:
        """Whether a value fits; what has none does not."""
        if mine is None:
            return False
        number, wanted = _number(mine), exact_number(self.value)
        if number is not None and wanted is not None:
            return _COMPARE[self.operator](number, wanted)
        if self.operator not in ("=", "!="):
            raise invalid(
                f"cannot compare {str(mine)!r:.60} with {self.value!r:.60} in the filter {self.text!r:.200}",
                "use = or !=",
            )
        equal = str(mine).lower() == self.value.lower() if isinstance(mine, bool) else str(mine) == self.value
        return equal == (self.operator == "=")

    @property
    def of_rows(self) -> bool:
        """Whether it is about rows, the seeds of which are folded."""
        return self.key in _DIFFERENCES or self.key in _RESULTS


def fields_of(entry: Entry) -> dict[str, Scalar]:
    """Everything that results can be filtered and sorted by; accuracies in percent, time in seconds, memory in MiB."""
    run, condition = entry.run, entry.condition
    known: dict[str, Scalar] = {
        "run": run.id,
        "name": run.name,
        "seed": run.seed,
        "epochs": run.epochs,
        "steps": run.steps,
        "views": run.view_passes,
        "passes": run.passes,
        "seconds": run.seconds,
        "time": run.seconds,
        "knn": None if run.knn is None else 100 * run.knn,
        "dataset": condition.dataset,
        "split": condition.split,
        "head": condition.head,
        "features": condition.features,
        "n": entry.n,
        "clean": 100 * entry.clean.value,
    }
    if entry.robust is not None:
        known |= {
            condition.figure: 100 * entry.robust.value,
            "space": condition.space,
            "norm": condition.norm,
            "eps": condition.eps,
            "attack": condition.attack,
            **{f"attack.{key}": value for key, value in entry.attack},
        }
    return {**run.asked, **run.recipe, **dict(entry.head), **known}


def filtered(entries: Sequence[Entry], filters: Sequence[Filter]) -> list[Entry]:
    """Keep the results that pass every filter that is not of rows; one that lacks the key does not.

    Raises:
        CfamcError: No result has the key of a filter, or its value cannot be compared; exit code 2.
    """
    kept = list(entries)
    for wanted in filters:
        if wanted.key not in _DIFFERENCES:
            _check(wanted.key, entries)
        if not wanted.of_rows:
            kept = [entry for entry in kept if wanted.passes(fields_of(entry).get(wanted.key))]
    return kept


def row_filter(filters: Sequence[Filter], *, baseline: str | None) -> RowFilter | None:
    """Make a test of rows from the filters on outcomes; None where there is no such filter.

    Raises:
        CfamcError: One is a difference to a baseline, and there is none; exit code 2.
    """
    outcomes = [wanted for wanted in filters if wanted.of_rows]
    for wanted in outcomes:
        _check(wanted.key, baseline=baseline)

    def keep(row: Row) -> bool:
        return all(wanted.passes(_value(row, wanted.key)) for wanted in outcomes)

    return RowFilter(" and ".join(wanted.text.strip() for wanted in outcomes), keep) if outcomes else None


def sort_key(entries: Sequence[Entry], text: str, *, baseline: str | None = None) -> SortKey:
    """Make a sort key from "KEY", "KEY:asc" or "KEY:desc"; accuracies fall and the rest rises unless told.

    Raises:
        CfamcError: No result has the key, or it is a difference and there is no baseline; exit code 2.
    """
    key, _, direction = text.partition(":")
    direction = direction or ("desc" if key in _LARGEST_FIRST else "asc")
    if direction not in ("asc", "desc"):
        raise invalid(f"cannot sort in the direction {direction!r:.200}", "write KEY:asc or KEY:desc")
    _check(key, entries, baseline=baseline)
    sign = -1 if direction == "desc" else 1

    def rank(row: Row) -> tuple[bool, float, str]:
        """Rows without the key come last, whole numbers before texts."""
        value = _value(row, key)
        number = _number(value)
        if number is not None:
            return (False, sign * number, "")
        if value is None:
            return (True, 0.0, "")
        return (False, 0.0, str(value) if sign > 0 else "".join(chr(0x10FFFF - ord(c)) for c in str(value)))

    return rank


def _value(row: Row, key: str) -> Scalar:
    """The mean over the seeds of a row where they all have numbers, else what the first has.

    Differences are in points of accuracy, or p-values; the baseline itself has 0 and no p.
    """
    if key in _DIFFERENCES:
        which, quantity = _DIFFERENCES[key]
        found = (row.against or {}).get(which)
        if quantity == "p":
            return found.p if found else None
        return 100 * found.value if found else 0.0 if row.baseline else None
    values = [fields_of(entry).get(key) for entry in row.entries]
    numbers = [number for value in values if (number := _number(value)) is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else values[0]


def _number(value: Scalar) -> float | None:
    if isinstance(value, str):
        return exact_number(value)
    return None if value is None or isinstance(value, bool) else float(value)


def _check(key: str, entries: Sequence[Entry] = (), *, baseline: str | None = None) -> None:
    """Refuse a key that no result has, or a difference where nothing is held against a baseline."""
    if key in _DIFFERENCES and baseline is None:
        raise invalid(f"{key} is a difference to a baseline, and there is none", "name one with --baseline RUN")
    known = {*_DIFFERENCES, *(name for entry in entries for name in fields_of(entry))}
    if entries and key not in known:
        near = difflib.get_close_matches(key, known, n=3)
        raise invalid(f"no result has a key {key!r:.200}", f"did you mean {' or '.join(near)}?" if near else "")
