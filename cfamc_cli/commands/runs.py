"""`cfamc runs`: what lies in a store, and how a person looks after it. Never imports torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from cfamc_cli.errors import CfamcError, bad_data, invalid
from cfamc_cli.recipe import file
from cfamc_cli.recipe.plan import duration
from cfamc_cli.report import terminal
from cfamc_cli.report.audit import verdict
from cfamc_cli.store.files import discard, size_of, sweep, write_json
from cfamc_cli.store.records import (
    AttackRecord,
    EvaluationLine,
    MeasureRecord,
    MetricLine,
    RunRecord,
    TrainLine,
    load_record,
    now,
    read_metrics,
)
from cfamc_cli.store.runs import LATEST, RECORD, TAG, RunFolder, find_run, finished_probes, list_runs, lock

R = TypeVar("R", AttackRecord, MeasureRecord)
_SECONDS = 1.0  # between two looks at a run that is watched
_WIDTH = 24  # characters of a curve


def show_list(store: Path, *, as_json: bool) -> None:
    """List the runs of a store, the newest first; what is no readable run is named on stderr.

    Raises:
        CfamcError: The store cannot be read.
    """
    rows: list[tuple[str, ...]] = []
    told, left_out = [], []
    for run in reversed(_all(store)):
        try:
            record = run.record()
        except CfamcError as error:
            left_out.append({"what": run.id, "why": error.message})
            continue
        done, size, tags = record.progress, size_of(run.path), run.tags()
        share = done.step / done.total if done.total else 0.0
        rows.append(
            (
                *(run.id, run.state(record), _age(record), f"{100 * share:.0f} %", str(record.seed)),
                *(_last_evaluation(run, record), mebibytes(size), " ".join(tags)),
            )
        )
        told.append(
            record.model_dump(
                mode="json", include={"id", "name", "seed", "created", "updated", "progress", "evaluation"}
            )
            | {"status": run.state(record), "tags": tags, "size": size, "path": str(run.path)}
        )
    if as_json:
        terminal.print_json({"runs": told, "left_out": left_out})
        return
    _tell_left_out(left_out)
    columns = ("run", "status", "age", "done", "seed", "clean / robust %", "MiB", "tags")
    spare = {"tags"} if not any(row[7] for row in rows) else set()
    spare |= {"seed"} if all(f"-s{row[4]}-" in row[0] for row in rows) else set()  # ids tell it
    kept = [place for place, name in enumerate(columns) if name not in spare]
    title = f"{len(rows)} run{'' if len(rows) == 1 else 's'} in {store}"
    cells = [[row[place] for place in kept] for row in rows]
    right = [at for at, place in enumerate(kept) if place in (2, 3, 4, 6)]
    terminal.print_rows(title, [columns[place] for place in kept], cells, right=right)


def show(store: Path, reference: str | None) -> None:
    """Print one page of a run: what it is, in what its recipe is of its own, curves, and everything measured on it.

    Raises:
        CfamcError: There is no such run, or its record cannot be read.
    """
    run = find_run(store, LATEST if reference is None else reference)
    record = run.record()
    where, used, tags = record.environment, record.data, run.tags()
    how = f", {where.computation.precision}" if where.computation else ""
    facts = {
        "status": f"{run.state(record)}, {record.progress.step:,} of {record.progress.total:,} updates",
        "tags": " ".join(tags),
        "folder": f"{run.path}, {mebibytes(size_of(run.path))} MiB",
        "made": f"{record.created:%Y-%m-%d %H:%M} UTC, {duration(record.wall_seconds)}",
        "on": f"{where.device}{how}; torch {where.torch}, cfamc {where.cfamc}",
        "data": f"{used.n:,} images of {used.dataset} {used.split}" if used else "",
        "starts from": record.init or record.imported or "",
        "failure": record.failure.message if record.failure else "",
        "warning": "the encoder collapsed" if record.collapsed else "",
    }
    lines = [run.id, *(f"  {name:11} {text}" for name, text in facts.items() if text), "", *_own_settings(run, record)]
    with suppress(CfamcError):
        lines += ["", *_curves(run)]
    terminal.write_lines([*lines, ""])
    rows = [
        (when, *(terminal.interval(part) if part else "" for part in (found.clean, found.robust)), how)
        for when, found in (("untrained", record.untrained), ("trained", record.evaluation))
        if found is not None
        for how in [f"online {found.attack} {found.eps}, epoch {found.epoch:.3g}"]
    ]
    rows += [
        (f"probes/{folder.name}", terminal.interval(probe.test_accuracy), "", f"{probe.train.n:,} images")
        for folder, probe in finished_probes(run)
    ]
    for attack in _records(run.attacks, AttackRecord):
        reach = f"{attack.attack} {attack.threat.norm} {attack.threat.eps}: {verdict(attack)}"
        shares = (terminal.interval(attack.clean), terminal.interval(attack.robust))
        rows.append((f"attacks/{attack.id}", *shares, reach))
    for measure in _records(run.measures, MeasureRecord):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in measure.figures.items() if value is not None)
        rows.append((f"measures/{measure.id}", terminal.interval(measure.clean), "", figures))
    if not rows:
        terminal.write_out("nothing was measured yet\n")
        return
    columns = ("measured", "clean %", "robust %", "how, and checks")
    terminal.print_rows("With 95 % intervals", columns, rows, right=(1, 2))


def watch(store: Path, reference: str | None) -> None:
    """Show a run that another process trains, until it ends.

    Raises:
        CfamcError: There is no such run, or it did not end as finished; exit code 1.
    """
    run = find_run(store, LATEST if reference is None else reference)
    with terminal.Terminal(quiet=False) as talk:
        talk.message(f"watching {run.id}; leave with Ctrl-C, it goes on")
        seen = None
        while (state := run.state(record := run.record())) in ("created", "running"):
            done = record.progress
            if done.total > done.step and seen != record.updated:
                seen, lines = record.updated, []
                with suppress(CfamcError):
                    lines = read_metrics(run.metrics)
                talk.progress("train", done.step, done.total, _newest(lines))
            time.sleep(_SECONDS)
        words = f"run {run.id} is {state}, after {duration(record.wall_seconds)}"
        if state != "finished":
            hint = "" if state == "failed" else f"go on with: cfamc pretrain --resume {run.path}"
            raise CfamcError(words, hint=hint)
        talk.message(words)


def tag(store: Path, reference: str, words: Sequence[str], *, remove: bool) -> None:
    """Add or remove words that a run is called by, and print those that it has then.

    Raises:
        CfamcError: There is no such run, a word is none, or the run cannot be written.
    """
    run = find_run(store, reference)
    for word in words:
        if not TAG.fullmatch(word) or word == LATEST:
            raise invalid(
                f"{word!r:.60} is no tag", "a letter, then up to 47 letters, digits, dots, dashes; not latest"
            )
    _require_run(run)
    before = run.tags()
    kept = [old for old in before if not remove or (words and old not in words)]
    after = kept if remove else list(dict.fromkeys([*before, *words]))
    write_json(run.tags_json, after)
    terminal.write_out("".join(f"{word}\n" for word in after))


def remove(store: Path, references: Sequence[str], *, yes: bool) -> None:
    """Remove runs, after a question; none is removed where one of them cannot be.

    Raises:
        CfamcError: A reference is of no run, a live process holds one (exit 6), or nobody can be asked.
    """
    runs = list({run.path: run for run in (find_run(store, reference) for reference in references)}.values())
    for run in runs:
        _require_run(run)
        with lock(run):
            pass
    if not yes:
        if not sys.stdin.isatty():
            raise invalid("nobody is there to be asked", "say --yes")
        for run in runs:
            terminal.talk().say(f"{run.path}  {mebibytes(size_of(run.path))} MiB")
        terminal.talk().say(f"remove {len(runs)} run{'' if len(runs) == 1 else 's'}, for good? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            terminal.talk().say("nothing was removed")
            return
    for run in runs:
        with lock(run):
            discard(run.path)
        terminal.write_out(f"{run.id}\n")
    sweep(store)


def clear(store: Path, references: Sequence[str], *, dry_run: bool, as_json: bool) -> None:
    """Remove all checkpoints but the newest whole one of each run, and say what that frees.

    Raises:
        CfamcError: A reference is of no run, or the disk says no.
    """
    freed: list[tuple[str, list[str], int]] = []
    left_out = []
    for run in [find_run(store, reference) for reference in references] or _all(store):
        try:
            with nullcontext() if dry_run else lock(run):
                spare = run.spare_checkpoints()
                size = sum(map(size_of, spare))
                for path in () if dry_run else spare:
                    discard(path)
        except CfamcError as error:
            left_out.append({"what": run.id, "why": error.message})
            continue
        if spare:
            freed.append((run.id, [path.name for path in spare], size))
    total = sum(size for *_, size in freed)
    if as_json:
        told = [{"run": name, "checkpoints": spare, "size": size} for name, spare, size in freed]
        terminal.print_json({"freed": told, "size": total, "dry_run": dry_run, "left_out": left_out})
        return
    _tell_left_out(left_out)
    rows = [(name, str(len(spare)), mebibytes(size)) for name, spare, size in freed]
    verb = "would be freed" if dry_run else "freed"
    terminal.print_rows(f"{mebibytes(total)} MiB {verb}", ("run", "checkpoints", "MiB"), rows, right=(1, 2))


def _tell_left_out(left_out: Sequence[Mapping[str, str]]) -> None:
    for entry in left_out:
        terminal.talk().say(f"left out: {entry['what']}: {entry['why']}")


def _all(store: Path) -> list[RunFolder]:
    if not store.exists():
        raise invalid(f"no runs: {store} does not exist", "start one with: cfamc pretrain recipes/quickstart.toml")
    return list_runs(store)


def _require_run(run: RunFolder) -> None:
    """Refuse to write to, or remove, what may be somebody's other folder."""
    if run.path.is_symlink():
        raise bad_data(f"{run.path} is a symbolic link", "name the run that it leads to by its path")
    if not run.is_run():
        raise bad_data(f"{run.path} is no run")


def _age(record: RunRecord) -> str:
    seconds = max((now() - record.created).total_seconds(), 0)
    size, unit = next((pair for pair in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= pair[0]), (1, "s"))
    return f"{seconds / size:.0f} {unit}"


def mebibytes(size: int) -> str:
    """Such as 12.3."""
    return f"{size / 2**20:,.1f}"


def _last_evaluation(run: RunFolder, record: RunRecord) -> str:
    """Clean and robust accuracy of the newest attack, else of the online evaluation, in percent, and what it was."""
    newest = max(_records(run.attacks, AttackRecord), key=lambda attack: attack.created, default=None)
    if newest is not None:
        clean, robust, how = newest.clean, newest.robust, f"{newest.attack} {newest.threat.eps}"
    elif (found := record.evaluation) is not None and found.clean is not None and found.robust is not None:
        clean, robust, how = found.clean, found.robust, "online"
    else:
        return ""
    return f"{terminal.percent(clean.value)} / {terminal.percent(robust.value)} {how}"


def _records(folder: Path, kind: type[R]) -> list[R]:
    """The finished items of a kind, by name; those that cannot be read are left out."""
    found = []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        with suppress(CfamcError):
            found.append(load_record(path, kind))
    return found


def _own_settings(run: RunFolder, record: RunRecord) -> list[str]:
    """In what the recipe differs from the shipped one of its name, or else from what a recipe need not say."""
    recipe = run.recipe()
    if record.imported is not None:
        return []
    base = file.load(record.name) if record.name in file.shipped() else None
    known = file.settings(base) if base else {}
    own = {key: value for key, value in file.settings(recipe).items() if known.get(key) != value}
    gone = [f"  {key} (left out)" for key in known if key not in file.settings(recipe)]
    if base is None:
        told = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        keys = [key for key, _ in file.leaves(told, "") if key in own and key != "schema"]
        title = f"recipe {record.name}, seed {record.seed}, other than by default in:"
        return [title, *(f"  {key} = {own[key]}" for key in keys)]
    title = f"recipe {record.name}, seed {record.seed}, "
    lines = [f"  {key} = {value}" + (f", not {known[key]}" if key in known else "") for key, value in own.items()]
    return [title + ("other than shipped in:" if lines or gone else "as it ships"), *lines, *gone]


def _curves(run: RunFolder) -> Iterator[str]:
    """Figures of the training from its first record to its last, a line each."""
    from cfamc_cli.report.plots import training_curves  # what it imports, no other command here needs

    for title, points in training_curves(run).items():
        if points:
            values = [value for _epoch, value in points]
            first, last = terminal.number(values[0]), terminal.number(values[-1])
            yield f"{title:30}  {first:>9}  {terminal.curve(values, width=_WIDTH)}  {last}"


def _newest(lines: Sequence[MetricLine]) -> dict[str, float | str]:
    """What the last records say, as the training itself shows it."""
    shown: dict[str, float | str] = {}
    for line in lines:
        match line:
            case TrainLine():
                shown |= {"epoch": line.epoch, "loss": line.loss, "lr": line.lr}
            case EvaluationLine():
                shown |= line.shown()
    return shown
