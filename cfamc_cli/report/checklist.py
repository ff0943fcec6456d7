"""What the NeurIPS paper checklist asks of experiments, answered from records as Markdown. Never imports torch.

Source: https://neurips.cc/public/guides/PaperChecklist, items 4 to 8 and 12. What no record tells is said to be open.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from cfamc_cli.comparison.tables import ComparedTable
from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.errors import CfamcError
from cfamc_cli.recipe.plan import duration
from cfamc_cli.report.sheets import figure_text, markdown_table, markdown_text
from cfamc_cli.store.records import (
    AttackResult,
    DataUsed,
    Environment,
    MeasureResult,
    ProbeResult,
    RunRecord,
    load_record,
    read_timing,
)
from cfamc_cli.store.runs import RECORD, RunFolder

_RESULTS: tuple[tuple[str, type[ProbeResult] | type[AttackResult] | type[MeasureResult]], ...] = (
    ("probes", ProbeResult),
    ("attacks", AttackResult),
    ("measures", MeasureResult),
)


class _Found:
    """What the records of all runs add up to."""

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        self.runs: list[RunRecord] = []
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # by device: of training, of evaluation
        self.data: set[tuple[str, str, int]] = set()
        self.environments: list[Environment] = []
        self.memory = 0  # bytes, at most
        for folder in folders:
            with suppress(CfamcError):
                self._add(folder)

    def _add(self, folder: RunFolder) -> None:
        record = folder.record()
        self.runs.append(record)
        self._spent(record.environment, record.wall_seconds, 0)
        used = [record.data] if record.data else []
        for kind, schema in _RESULTS:
            for path in (folder.path / kind).glob(f"*/{RECORD}"):
                with suppress(CfamcError):
                    result: ProbeResult | AttackResult | MeasureResult = load_record(path, schema)
                    self._spent(result.environment, result.wall_seconds, 1)
                    used += [result.train, result.test] if isinstance(result, ProbeResult) else [result.data]
        self.data |= {_data(part) for part in used}
        with suppress(CfamcError):
            self.memory = max([self.memory, *(line.peak_memory for line in read_timing(folder.timing))])

    def _spent(self, where: Environment, seconds: float, what: int) -> None:
        device = f"{where.cpu}, {where.device}" if where.device.startswith("cpu") else where.device
        self.seconds[device][what] += seconds
        self.environments.append(where)


def _data(used: DataUsed) -> tuple[str, str, int]:
    return used.dataset, used.split, used.n


def checklist(tables: Sequence[ComparedTable], folders: Sequence[RunFolder]) -> str:
    """The answers, for the results of a comparison.

    Args:
        tables: The comparison.
        folders: Every run that was made for it, finished or not: all of them cost something.
    """
    found = _Found(folders)
    return "\n".join(
        [
            f"# Paper checklist, from the records of {len(found.runs)} runs",
            *_settings(found),
            *_error_bars(tables),
            *_compute(found),
            *_assets(found),
            "",
        ]
    )


def _settings(found: _Found) -> Iterator[str]:
    yield "\n## Reproducibility, code and settings (items 4, 5, 6)\n"
    names = sorted({(record.name, record.recipe_digest[:12]) for record in found.runs})
    yield "Yes. Every setting lies beside each run, in `recipe.toml` and `resolved.json`; the command is"
    yield "`cfamc pretrain recipe.toml --seed N`. Recipes: " + ", ".join(
        f"{markdown_text(name)} ({digest})" for name, digest in names
    )
    versions = sorted(
        {(part.cfamc, part.torch, (part.git_revision or "")[:12], part.git_changed) for part in found.environments}
    )
    for cfamc, torch, revision, changed in versions:
        of = f", revision {revision}" if revision else ""
        yield f"- cfamc {cfamc}{of}{', with changes that no revision holds' if changed else ''}, torch {torch}"
    yield "- Open: how settings were chosen, and on which images. No record tells it."


def _error_bars(tables: Sequence[ComparedTable]) -> Iterator[str]:
    yield "\n## Statistical significance (item 7)\n"
    rows = [(table, row) for table in tables for row in table.rows]
    single = [row for _, row in rows if len(row.entries) == 1]
    yield f"{'Partly' if single else 'Yes'}. \u00b1 is the sample standard deviation (n - 1) over seeds, each of which"
    yield "changes first weights, order and crops; [..] is the Wilson 95 % interval over test samples, of one training."
    if single:
        yield f"{len(single)} of {len(rows)} results below are of one seed, and tell nothing of another training."
    lines = [
        (row.label, str(len(row.entries)), f"{row.n:,}", figure_text(row.clean), figure_text(row.robust), title)
        for table, row in rows
        for title in [table.condition.title()]
    ]
    yield "\n" + markdown_table(("result", "seeds", "samples", "clean %", "robust %", "of"), lines, right=(1, 2, 3, 4))


def _compute(found: _Found) -> Iterator[str]:
    yield "\n## Compute (item 8)\n"
    rows = [
        (device, duration(trained), duration(evaluated), f"{(trained + evaluated) / 3600:,.2f}")
        for device, (trained, evaluated) in sorted(found.seconds.items())
    ]
    yield markdown_table(("device", "training", "evaluation", "hours in all"), rows, right=(1, 2, 3))
    finished = [record for record in found.runs if record.status == "finished"]
    hours = sum(map(sum, found.seconds.values())) / 3600
    yield f"\n{hours:,.2f} hours in all, those of {len(found.runs) - len(finished)} unfinished runs among them; a"
    mean = sum(record.wall_seconds for record in finished) / max(len(finished), 1)
    yield f"finished run took {duration(mean)} on average. Most memory of a training: {found.memory / 2**30:.2g} GiB."
    yield "- Open: runs that were removed, and work outside of these records."


def _assets(found: _Found) -> Iterator[str]:
    yield "\n## Licences of assets (item 12)\n"
    counts: dict[str, list[str]] = defaultdict(list)
    for dataset, split, n in sorted(found.data):
        counts[dataset].append(f"{split} {n:,}")
    rows: list[Any] = []
    for dataset, parts in counts.items():
        known = KNOWN_SETS.get(dataset)
        rows.append((dataset, ", ".join(parts), (known.licence if known else "") or "open: not recorded"))
    yield markdown_table(("data", "images", "licence"), rows)
    if foreign := sorted({record.imported for record in found.runs if record.imported}):
        yield f"- Weights of others, whose licence is open: {', '.join(map(markdown_text, foreign))}"
