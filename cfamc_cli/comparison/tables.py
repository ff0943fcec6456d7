"""Which numbers may be compared, and what their differences mean. Pure functions; nothing is read or printed here.

Two results are comparable when they share the data, the head and the whole attack (`Condition`). Runs that were
attacked on the same samples are compared sample by sample, by McNemar's exact test.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from fractions import Fraction
from typing import Literal, TypeAlias

from cfamc_cli.comparison.statistics import CHANCE, Difference, Figure, paired, pareto_front, probability
from cfamc_cli.store.records import Accuracy, Outcomes, images_of

Scalar: TypeAlias = str | float | bool | None
Settings: TypeAlias = tuple[tuple[str, Scalar], ...]
Which = Literal["clean", "robust"]
USUAL_EPS = "8/255"
STRONGEST = "autoattack"
FEW = 0.1  # of the median number of samples: results on fewer cut no others
_MARK = 8  # digits that tell fingerprints apart, for people
_FIGURES = {"corruptions": "corrupted", "smoothing": "certified"}


@dataclass(frozen=True, slots=True)
class Condition:
    """What two results must share to be compared."""

    dataset: str
    split: str
    fingerprint: str  # digest of the samples' whole split
    head: str  # its kind, read from `features`
    features: str
    space: str = ""  # where the attack acts; empty, as all below, where nothing was attacked
    norm: str = ""
    eps: str = ""
    attack: str = ""
    settings: str = ""  # all others of the attack, as "key value" pairs

    def title(self) -> str:
        """The condition in one line."""
        data = f"{self.dataset} {images_of(self.split)} ({self.fingerprint[:_MARK]})"
        head = f"{self.head} head on {self.features}"
        if not self.attack:
            return f"{data}, {head}, clean images"
        attack = f"{self.attack} ({self.settings})" if self.settings else self.attack
        reach = f", {self.norm} {self.eps} in {self.space} space" if self.norm else ""
        return f"{data}, {head}, {attack}{reach}"

    @property
    def figure(self) -> str:
        """What the second accuracy is called; what no attack has measured is not called robust."""
        return _FIGURES.get(self.attack, "robust")

    def rank(self) -> tuple[bool, bool, float, str]:
        """Sort key: attacks before clean images, the field's usual size first, then by size."""
        under = bool(self.attack) and self.figure == "robust"
        return (not under, self.eps != USUAL_EPS, exact_number(self.eps) or 0.0, self.title())

    def differences(self, other: Condition) -> list[str]:
        """What keeps the two apart, such as "eps 4/255, not 8/255"."""
        told, compared = [], fields(self)
        if bool(self.attack) != bool(other.attack):
            told = ["attacked, not clean" if self.attack else "clean images, not attacked"]
            compared = compared[: [part.name for part in compared].index("space")]
        for name in (part.name for part in compared if getattr(self, part.name) != getattr(other, part.name)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "settings":  # those that both have go without saying, unless it is another attack
                same = set(mine.split(", ")) & set(theirs.split(", ")) if self.attack == other.attack else set()
                mine, theirs = (", ".join(x for x in text.split(", ") if x not in same) for text in (mine, theirs))
            if name == "split":
                mine, theirs, name = images_of(mine), images_of(theirs), ""
            length = _MARK if name == "fingerprint" else 60
            told.append(f"{name} {mine[:length] or 'none'}, not {theirs[:length] or 'none'}".strip())
        return told


@dataclass(frozen=True, slots=True)
class Run:
    """What a comparison needs to know of a run."""

    id: str
    name: str
    seed: int
    family: str  # equal for the seeds of one recipe on the same training data from the same start
    recipe: Mapping[str, Scalar]  # what makes the encoder, flat: "adversary.name", "crops.0.count"
    epochs: float
    steps: int
    view_passes: int  # that trained the weights
    attack_view_passes: int  # beside them: the steps of an adversary that trains none
    seconds: float  # wall time of pretraining
    knn: float | None = None  # accuracy of nearest neighbours in the last online evaluation
    asked: Mapping[str, Scalar] = field(default_factory=dict)  # what only a filter or a sort key asks for: "loss"

    @property
    def passes(self) -> int:
        """All passes of a view."""
        return self.view_passes + self.attack_view_passes


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured result of a run."""

    run: Run
    result: str  # its name in the run, such as "attacks/pgd-001"
    condition: Condition
    head: Settings  # settings, as ("head.epochs", 20)
    created: datetime
    clean: Accuracy
    robust: Accuracy | None = None
    order: str = ""  # digest of the order of the samples; empty where outcomes were not kept
    failed: tuple[str, ...] = ()  # checks that say the number cannot be trusted
    attack: Settings = ()  # settings, as ("steps", 20)
    computed: Settings = ()  # where and how, as ("training.precision", "bfloat16")
    whole: Entry | None = None  # the result as it was measured, where this is a part of its samples
    remark: str = ""  # what a reader wants to know beside the two accuracies

    @property
    def n(self) -> int:
        """How many samples it was measured on."""
        return (self.robust or self.clean).n


OutcomesOf: TypeAlias = Callable[[Entry], Outcomes | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a run, or the seeds of one recipe."""

    entries: tuple[Entry, ...]  # the results behind it, by seed
    label: str  # tells it from the others: the id of one run, the name of several
    clean: Figure
    robust: Figure | None
    front: bool = False  # no other row is at least as good in clean and robust accuracy and better in one
    baseline: bool = False
    against: Mapping[Which, Difference] | None = None  # differences to the baseline, where the table has one

    @property
    def run(self) -> Run:
        """The run, or the first of the seeds."""
        return self.entries[0].run

    @property
    def who(self) -> object:
        """Equal for rows of the same encoders and heads, whatever attacked them."""
        return (tuple(entry.run.id for entry in self.entries), self.entries[0].head)

    @property
    def condition(self) -> Condition:
        return self.entries[0].condition

    @property
    def n(self) -> int:
        """Samples of each of the results."""
        return self.entries[0].n

    @property
    def seconds(self) -> float:
        """Wall time of pretraining, the mean over the seeds."""
        return sum(entry.run.seconds for entry in self.entries) / len(self.entries)

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(sorted({name for entry in self.entries for name in entry.failed}))

    def figure(self, which: Which) -> Figure:
        """The figure that is asked for; rows of a table are all attacked, or none is."""
        found = self.clean if which == "clean" else self.robust
        assert found is not None, "asked of attacked rows only"
        return found


SortKey: TypeAlias = Callable[[Row], tuple[bool, float, str]]


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Which rows stay."""

    text: str  # as a person asked for it
    keeps: Callable[[Row], bool]


@dataclass(frozen=True, slots=True)
class ComparedTable:
    """Rows that may be ranked."""

    condition: Condition
    rows: tuple[Row, ...]
    keys: tuple[str, ...]  # of the recipe, in which the rows differ
    verdict: str  # who leads and whether that is more than chance, in one sentence; empty for a single row
    apart: str  # why it may not be compared with the first table; empty for that one
    notes: tuple[str, ...] = ()  # what else a reader must know, in sentences


def tabulate(
    entries: Iterable[Entry],
    *,
    fold: bool,
    baseline: str | None,
    outcomes_of: OutcomesOf,
    order: SortKey | None = None,
    keep: RowFilter | None = None,
) -> list[ComparedTable]:
    """Sort results into tables of what may be compared; the one that says most comes first.

    Results of one condition that were measured on different numbers of samples are cut to those that all share, but for
    those on few samples, which stand apart.

    Args:
        entries: Results of any runs.
        fold: Whether the seeds of one recipe become one row.
        baseline: Id of the run that the others are held against.
        outcomes_of: Reads the per-sample outcomes of a result; None where it has none.
        order: Sort key of rows; the best robust, then clean accuracy first unless given.
        keep: Which rows stay, seeds folded and differences found; the baseline always does.
    """
    conditions: dict[Condition, list[Entry]] = defaultdict(list)
    for entry in entries:
        conditions[entry.condition].append(entry)
    tables: list[ComparedTable] = []
    for members in conditions.values():
        for apart, group in _on_shared_samples(members, outcomes_of).items():
            rows = _rows(group, fold=fold)
            if held := [row for row in rows if any(entry.run.id == baseline for entry in row.entries)]:
                rows = [_against(row, held[0], outcomes_of) for row in rows]
            if keep is not None:
                rows = [row for row in rows if row.baseline or keep.keeps(row)]
            n, cut = group[0].n, any(entry.whole for entry in group)
            shared = f"All rows on the first {n:,} samples, which they share: --where 'n>{n}' compares those with more."
            notes = [shared] if cut else []
            if keep is not None and any(len(row.entries) > 1 for row in rows):
                notes.append(f"Only rows with {keep.text}; of several seeds that is their mean.")
            if baseline is not None and not any(row.baseline for row in rows):
                notes.append(f"No differences: there is no result of the baseline {baseline} among these.")
            notes += _computed_differently([entry for row in rows for entry in row.entries])
            if rows:
                tables.append(_table(rows, apart, notes, outcomes_of, order))
    tables.sort(key=_first)
    return [replace(table, apart=_apart(table, tables[0])) for table in tables]


def _first(table: ComparedTable) -> tuple[object, ...]:
    """Sort key of tables: a comparison, under attack, of the most rows that are trusted, seeds and samples."""
    trusted = [row for row in table.rows if not row.failed]
    of_clean, *size = table.condition.rank()
    strength = table.condition.attack != STRONGEST
    seeds, n = sum(len(row.entries) for row in trusted), max(row.n for row in table.rows)
    return (bool(table.apart), len(trusted) < 2, of_clean, -len(trusted), -seeds, size[0], strength, -n, *size)


def _apart(table: ComparedTable, first: ComparedTable) -> str:
    reasons = [*table.condition.differences(first.condition), table.apart]
    return "" if table is first else "; ".join(filter(None, reasons))


def _computed_differently(entries: Sequence[Entry]) -> list[str]:
    """What is known to differ in how results were computed, in one sentence; nothing where nothing does."""
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for entry in entries:
        for key, value in entry.computed:
            if value is not None:
                values[key][str(value)] = None
    parts = [f"{key.replace('.', ' ')} {' / '.join(found)}" for key, found in values.items() if len(found) > 1]
    return [f"Computed differently: {'; '.join(parts)}."] if parts else []


def find_superseded(entries: Sequence[Entry], *, fold: bool) -> dict[int, str]:
    """Find results that would count one thing twice.

    Returns:
        For the position of each such result, the name of the one that stands for it.
    """
    kept: dict[object, int] = {}
    replaced: dict[int, str] = {}
    for index, entry in enumerate(entries):
        who = (entry.run.family, entry.run.seed) if fold else entry.run.id
        key = (who, entry.condition, entry.head)
        other = kept.setdefault(key, index)
        if other != index:
            newer = (entry.n, entry.created) >= (entries[other].n, entries[other].created)
            old, kept[key] = (other, index) if newer else (index, other)
            replaced[old] = f"{entries[kept[key]].run.id} {entries[kept[key]].result}"
    return replaced


def _on_shared_samples(entries: list[Entry], outcomes_of: OutcomesOf) -> dict[str, list[Entry]]:
    """Cut results of one condition to the samples that all share; the others by why they are apart."""
    if len({entry.n for entry in entries}) == 1:
        return {"": entries}
    ((order, _),) = Counter(entry.order for entry in entries).most_common(1)
    enough = FEW * statistics.median(entry.n for entry in entries)
    n = min((entry.n for entry in entries if entry.order == order and entry.n >= enough), default=0)
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        cut = _cut(entry, n, outcomes_of) if entry.order == order and entry.n >= n else None
        why = f"n {entry.n:,}, and no outcomes on the {n:,} samples that others share"
        if entry.n < enough:
            why = f"n {entry.n:,}, too few to cut the others to, which have {n:,} and more"
        groups["" if cut else why].append(cut or entry)
    return groups


def _cut(entry: Entry, n: int, outcomes_of: OutcomesOf) -> Entry | None:
    """The result on the first `n` samples of its order; None where it is not known what became of each."""
    if entry.n == n:
        return entry
    outcomes = outcomes_of(entry) if entry.order else None
    if outcomes is None:
        return None
    mask = (1 << n) - 1
    clean, robust = (Accuracy.of((_right(outcomes, which) & mask).bit_count(), n) for which in ("clean", "robust"))
    return replace(entry, clean=clean, robust=robust, whole=entry)


def _rows(entries: Sequence[Entry], *, fold: bool) -> list[Row]:
    """One row a run, or the seeds of a recipe; the best first."""
    families: dict[object, list[Entry]] = defaultdict(list)
    for entry in entries:
        families[(entry.run.family if fold else entry.run.id, entry.head)].append(entry)
    rows = []
    for members in families.values():
        members.sort(key=lambda entry: (entry.run.seed, entry.run.id))
        robust = [entry.robust for entry in members if entry.robust is not None]
        clean = Figure.of([entry.clean for entry in members])
        label = members[0].run.id if len(members) == 1 else f"{members[0].run.name} ({len(members)} seeds)"
        rows.append(Row(tuple(members), label, clean, Figure.of(robust) if robust else None))
    rows.sort(key=_best_first)
    taken = Counter(row.label for row in rows)
    return [replace(row, label=f"{row.label} {row.entries[0].result}") if taken[row.label] > 1 else row for row in rows]


def _table(
    rows: list[Row], apart: str, notes: list[str], outcomes_of: OutcomesOf, order: SortKey | None
) -> ComparedTable:
    trusted = [row for row in rows if not row.failed]
    verdict = _verdict(trusted, outcomes_of) if len(trusted) > 1 else ""
    if len(trusted) > 1 and trusted[0].robust is not None:
        points = [(row.clean.value, row.figure("robust").value) for row in trusted]
        front = {row.label for row, on_front in zip(trusted, pareto_front(points), strict=True) if on_front}
        rows = [replace(row, front=row.label in front) for row in rows]
    if order is not None:
        rows = sorted(rows, key=order)
    keys = differing_keys([row.entries[0] for row in rows])
    return ComparedTable(rows[0].condition, tuple(rows), keys, verdict, apart, tuple(notes))


def _best_first(row: Row) -> tuple[float, float, str]:
    return (-row.robust.value if row.robust else 0.0, -row.clean.value, row.run.id)


def _against(row: Row, baseline: Row, outcomes_of: OutcomesOf) -> Row:
    if row == baseline:
        return replace(row, baseline=True)
    parts: dict[Which, Difference] = {"clean": difference(row, baseline, which="clean", outcomes_of=outcomes_of)}
    if row.robust is not None:
        parts["robust"] = difference(row, baseline, which="robust", outcomes_of=outcomes_of)
    return replace(row, against=parts)


def difference(row: Row, other: Row, *, which: Which, outcomes_of: OutcomesOf) -> Difference:
    """Hold one row against another, sample by sample where each is one run whose outcomes were kept."""
    mine, theirs = row.figure(which), other.figure(which)
    plain = Difference(mine.value - theirs.value)
    first, second = row.entries[0], other.entries[0]
    if len(row.entries) > 1 or len(other.entries) > 1 or not first.order or first.order != second.order:
        return plain
    outcomes = outcomes_of(first), outcomes_of(second)
    if outcomes[0] is None or outcomes[1] is None:
        return plain
    return paired(_right(outcomes[0], which), _right(outcomes[1], which), n=min(mine.n, theirs.n))


def differing_keys(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Return the keys of recipe and head in which results differ, in the order of the recipe."""
    recipes = list({id(entry.run.recipe): entry.run.recipe for entry in entries}.values())
    heads = [dict(head) for head in {entry.head for entry in entries}]
    return (*_differing(recipes), *_differing(heads))


def _differing(settings: Sequence[Mapping[str, Scalar]]) -> list[str]:
    values: dict[str, set[tuple[type, Scalar]]] = {}
    times: Counter[str] = Counter()
    for setting in settings:
        times.update(list(setting))
        for key, value in setting.items():
            values.setdefault(key, set()).add((type(value), value))
    return [key for key in values if len(values[key]) > 1 or times[key] < len(settings)]


def _right(outcomes: Outcomes, which: Which) -> int:
    """The bit mask of right answers, after all stages for "robust"."""
    mask = outcomes.clean if which == "clean" or not outcomes.stages else outcomes.stages[-1].robust
    return int(mask or "0", 16)


def _verdict(ranked: Sequence[Row], outcomes_of: OutcomesOf) -> str:
    best, second = ranked[0], ranked[1]
    which: Which = "robust" if best.robust is not None else "clean"
    found = difference(best, second, which=which, outcomes_of=outcomes_of)
    called = "clean" if which == "clean" else best.condition.figure
    lead = f"{best.label} leads {second.label} by {100 * found.value:.1f} points of {called} accuracy"
    if found.value == 0:
        lead = f"{best.label} and {second.label} have equal {called} accuracy"
    if found.p is not None:
        chance = "chance alone explains that" if found.p > CHANCE else "more than chance"
        return f"{lead} on {found.shared:,} shared samples: {chance} (McNemar p {probability(found.p)})"
    mine, theirs = best.figure(which), second.figure(which)
    if mine.low is not None and theirs.high is not None:
        overlap = "their intervals are apart" if mine.low > theirs.high else "their intervals overlap"
        return f"{lead}: {overlap}; samples could not be paired"
    spread = " and ".join(
        f"{100 * figure.std:.1f}" if figure.std is not None else "one run" for figure in (mine, theirs)
    )
    return f"{lead} (means over seeds; std {spread})"


def exact_number(text: str) -> float | None:
    """Read "8/255", "0.03" or "1e-3"; None where it is no finite number."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
