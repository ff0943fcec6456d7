"""Transfer matrices: what is right on one network under examples that were made on another. Never ranked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from cfamc_cli.comparison.tables import Condition, Entry
from cfamc_cli.store.records import Accuracy


@dataclass(frozen=True, slots=True)
class Transfer:
    """A result of a transfer attack."""

    entry: Entry  # what was judged
    source: str  # id of the run that the examples were made on

    def plain(self) -> dict[str, object]:
        """It as JSON values; fractions."""
        entry = self.entry
        return {
            "judged": entry.run.id,
            "source": self.source,
            "result": entry.result,
            "condition": asdict(entry.condition),
            "n": entry.n,
            "clean": entry.clean.value,
            "robust": entry.robust.value if entry.robust else None,
            "failed_checks": list(entry.failed),
        }


@dataclass(frozen=True)
class Matrix:
    """Transfers between runs under one attack, on equally many samples of the same images."""

    condition: Condition
    n: int
    judged: tuple[str, ...]  # ids of the runs in its rows
    sources: tuple[str, ...]  # in its columns
    clean: Mapping[str, Accuracy]  # by run that is judged
    robust: Mapping[
        tuple[str, str], Entry
    ]  # by run that is judged and source; where both are one, the attack on itself


def matrices(transfers: Sequence[Transfer], entries: Sequence[Entry]) -> list[Matrix]:
    """Sort transfers into matrices, the one with the most results first.

    Args:
        transfers: The newest counts of those that say the same.
        entries: Attacks that know their network; those under the condition of a matrix are its diagonal.
    """
    groups: dict[tuple[Condition, int, str], list[Transfer]] = defaultdict(list)
    for transfer in sorted(transfers, key=lambda transfer: transfer.entry.created):
        entry = transfer.entry
        groups[entry.condition, entry.n, entry.order].append(transfer)
    found = []
    for (condition, n, order), members in groups.items():
        robust = {(transfer.entry.run.id, transfer.source): transfer.entry for transfer in members}
        runs = sorted({run for pair in robust for run in pair})
        own = replace(condition, attack=condition.attack.removesuffix("-transfer"))
        for entry in sorted(entries, key=lambda entry: entry.created):
            if (entry.condition, entry.n, entry.order) == (own, n, order) and entry.run.id in runs:
                robust[entry.run.id, entry.run.id] = entry
        judged, sources = (tuple(run for run in runs if run in {pair[at] for pair in robust}) for at in (0, 1))
        clean = {run: entry.clean for (run, _), entry in robust.items()}
        found.append(Matrix(condition, n, judged, sources, clean, robust))
    return sorted(found, key=lambda matrix: -len(matrix.robust))
