"""Reading runs for a comparison: what is damaged, unfinished or foreign is named in one line and left out."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias, TypeVar

from cfamc_cli.comparison.measured import headline
from cfamc_cli.comparison.tables import Condition, Entry, Run, Scalar, Settings
from cfamc_cli.comparison.transfer import Transfer
from cfamc_cli.errors import CfamcError, bad_data, invalid
from cfamc_cli.recipe.plan import plan
from cfamc_cli.recipe.schema import Outside, as_before, outside
from cfamc_cli.store.files import explained, read_bytes
from cfamc_cli.store.records import (
    AttackResult,
    BenchRecord,
    DataUsed,
    Environment,
    MeasureResult,
    Outcomes,
    ProbeResult,
    RunRecord,
    ThreatModel,
    TrainLine,
    UnlabelledRecord,
    failed_names,
    load_record,
    read_metrics,
    read_timing,
)
from cfamc_cli.store.runs import BENCHES, OUTCOMES, RECORD, RunFolder, find_run, list_runs

_SCALAR = (str, int, float, type(None))
Result = TypeVar("Result", ProbeResult, AttackResult, MeasureResult, UnlabelledRecord)
LeftOut: TypeAlias = tuple[str, str]  # what could not be used, and why

ONLINE = "online linear"  # the head that monitors training
_NOT_THE_ENCODER = frozenset({"schema", *outside(Outside.ENCODER)})  # recipe keys that never tell encoders apart
_NOT_THE_ATTACK = ("seed", "name", "eps", "norm", "space")  # they have a field of their own, or make no other attack


@dataclass
class Gathered:
    """What was found."""

    entries: list[Entry] = field(default_factory=list)  # every result of every run that can be read
    left_out: list[LeftOut] = field(default_factory=list)
    folders: dict[str, RunFolder] = field(default_factory=dict)  # by id of the run
    benches: list[BenchRecord] = field(default_factory=list)  # of the stores that were named, newest first
    transfers: list[Transfer] = field(default_factory=list)  # of the same runs; apart from the entries
    unlabelled: list[UnlabelledRecord] = field(default_factory=list)  # of the same runs; no results to rank


def gather(references: Sequence[str], store: Path, *, keys: Collection[str] = ()) -> Gathered:
    """Read the runs that are asked for.

    Args:
        references: Stores, paths of runs, ids or beginnings of ids; the store itself where there is none.
        store: Where ids are looked up.
        keys: What is filtered and sorted by; some of it lies in files that are read for no other purpose.

    Raises:
        CfamcError: A reference means nothing; exit code 2.
    """
    reader = _Reader(keys)
    gc.disable()  # records hold no cycles; looking for some takes a third of the time, then and later
    try:
        for reference in references or [str(store)]:
            for run in runs_of(reference, store):
                reader.read(run)
            reader.read_benches(Path(reference) / BENCHES)
    finally:
        gc.freeze()
        gc.enable()
    return reader.found


class KeptOutcomes:
    """Reads the per-sample outcomes behind results; `left_out` names those that cannot be used."""

    def __init__(self, folders: Mapping[str, RunFolder]) -> None:
        self.left_out: list[LeftOut] = []
        self._folders = folders
        self._read = lru_cache(maxsize=4)(self._read_once)

    def __call__(self, entry: Entry) -> Outcomes | None:
        """The outcomes of a result; None where there are none, or they are not those of its record."""
        entry = entry.whole or entry
        if entry.robust is None:
            return None
        counts = (entry.robust.n, entry.order, entry.clean.correct, entry.robust.correct)
        return self._read(entry.run.id, entry.result, counts)

    def _read_once(self, run: str, result: str, counts: tuple[int, str, int, int]) -> Outcomes | None:
        try:
            outcomes = load_record(self._folders[run].path / result / OUTCOMES, Outcomes)
        except CfamcError as error:
            self.left_out.append((f"{run} {result}", f"compared without pairs: {error.message}"))
            return None
        last = outcomes.stages[-1].robust if outcomes.stages else outcomes.clean
        clean, robust = (int(mask or "0", 16).bit_count() for mask in (outcomes.clean, last))
        if (outcomes.n, outcomes.order_digest, clean, robust) != counts:
            self.left_out.append((f"{run} {result}", "compared without pairs: outcomes.json is not of this record"))
            return None
        return outcomes


def runs_of(reference: str, store: Path) -> list[RunFolder]:
    """The runs that a reference means: all of a store, or one.

    Raises:
        CfamcError: It means nothing; exit code 2.
    """
    folder = Path(reference)
    with explained(folder):
        if folder.is_dir() and not RunFolder(folder).run_json.exists():
            return list_runs(folder)
    if reference == str(store) and not folder.exists():
        raise invalid(f"no runs: {store} does not exist", "start one with: cfamc pretrain recipes/quickstart.toml")
    return [find_run(store, reference)]


class _Reader:
    """Collects results; equal settings are kept once, for ten thousand runs share most of theirs."""

    def __init__(self, keys: Collection[str]) -> None:
        self.found = Gathered()
        self._metrics = {"loss", "memory"}.intersection(keys)
        apart = tuple(key for key in _NOT_THE_ENCODER if "." in key)
        self._settings_asked = [key for key in keys if key.startswith(("probe.", "attack.", *apart))]
        self._recipes: dict[str, Mapping[str, Scalar]] = {}
        self._conditions: dict[Condition, Condition] = {}
        self._flattened: dict[tuple[str, str], Settings] = {}
        self._ascents: dict[tuple[str, int], int] = {}

    def read(self, folder: RunFolder) -> None:
        """Read one run with all its results."""
        try:
            record = folder.record()
            if record.id in self.found.folders:
                if not folder.path.samefile(self.found.folders[record.id].path):
                    self._leave_out(folder.id, f"the same run as {self.found.folders[record.id].path}")
                return
            if record.status != "finished":
                step, total = record.progress.step, record.progress.total
                dead = record.status == "running" and folder.is_dead()
                status = "killed, or its machine went down," if dead else record.status
                self._leave_out(folder.id, f"{status} after {step:,} of {total:,} weight updates")
                return
            run = self._run(folder, record)
        except (CfamcError, OSError) as error:
            self._leave_out(
                folder.id, "no run.json: not a run, or not yet one" if _is_absent(folder.run_json) else str(error)
            )
            return
        self.found.folders[run.id] = folder
        before, transferred = len(self.found.entries), len(self.found.transfers)
        heads = self._probes(folder, run, record)
        self._attacks(folder, run, record, heads)
        self._measures(folder, run, record, heads)
        unlabelled = [found for _, found in self._records(folder, "unlabelled", UnlabelledRecord, record)]
        self.found.unlabelled += unlabelled
        if len(self.found.entries) == before:
            self._online(record, run, looked_at=bool(unlabelled) or len(self.found.transfers) > transferred)

    def read_benches(self, folder: Path) -> None:
        """Read what lies in a store's folder of benches; a run has none."""
        for path in folder.glob(f"*/{RECORD}"):
            try:
                self.found.benches.append(load_record(path, BenchRecord))
            except CfamcError as error:
                self._leave_out(f"{BENCHES}/{path.parent.name}", error.message)
        self.found.benches.sort(key=lambda bench: (bench.created, bench.id), reverse=True)

    def _run(self, folder: RunFolder, record: RunRecord) -> Run:
        imported = record.imported is not None  # its recipe says how to read it, not how it was trained
        recipe = {} if imported else self._recipes.get(record.recipe_digest)
        if recipe is None:
            whole = self._flat(as_before(self._resolved(folder)))
            recipe = {key: value for key, value in whole.items() if not _NOT_THE_ENCODER & {key, key.partition(".")[0]}}
            self._recipes[record.recipe_digest] = recipe
        # with data.limit each seed draws images of its own from the same set
        images = record.data.fingerprint if record.data is not None and recipe.get("data.limit") is None else ""
        origin = [record.recipe_digest, images, record.init or ""]
        return Run(
            id=record.id,
            name=record.name,
            seed=record.seed,
            family=record.id if imported else "\n".join(origin),
            recipe=recipe,
            epochs=record.progress.epoch,
            steps=record.totals.steps,
            view_passes=record.totals.view_passes,
            attack_view_passes=self._attack_view_passes(folder, record, recipe),
            seconds=record.wall_seconds,
            knn=record.evaluation.knn.value if record.evaluation and record.evaluation.knn else None,
            asked=self._asked(folder),
        )

    def _attack_view_passes(self, folder: RunFolder, record: RunRecord, recipe: Mapping[str, Scalar]) -> int:
        """Those of an adversary's own steps; records of before they were kept leave them to the recipe."""
        kept = record.totals.attack_view_passes
        stepping = any(key.endswith("adversary.name") and name == "pgd" for key, name in recipe.items())
        if kept is not None or not stepping or record.data is None:
            return kept or 0
        key = (record.recipe_digest, record.data.n)
        if key not in self._ascents:
            self._ascents[key] = plan(folder.recipe(), record.data.n).attack_view_passes
        return self._ascents[key]

    def _asked(self, folder: RunFolder) -> dict[str, Scalar]:
        """The last loss and the largest memory of training, and the recipe's other settings, where asked for."""
        asked: dict[str, Scalar] = dict.fromkeys(self._metrics)  # None where it cannot be read
        if self._settings_asked:
            recipe = self._flat(self._resolved(folder))
            asked |= {key: recipe[key] for key in self._settings_asked if key in recipe}
        if "loss" in self._metrics:
            with suppress(CfamcError):
                lines = [line.loss for line in read_metrics(folder.metrics) if isinstance(line, TrainLine)]
                asked["loss"] = next((loss for loss in reversed(lines) if math.isfinite(loss)), None)
        if "memory" in self._metrics:
            with suppress(CfamcError):
                sizes = (line.peak_memory / 2**20 for line in read_timing(folder.timing))
                asked["memory"] = max(sizes, default=None)
        return asked

    def _resolved(self, folder: RunFolder) -> dict[str, object]:
        path = folder.resolved_json
        try:
            resolved = json.loads(read_bytes(path))
        except (ValueError, RecursionError) as error:
            raise bad_data(f"{path}: not JSON") from error
        if not isinstance(resolved, dict):
            raise bad_data(f"{path}: not a recipe")
        return resolved

    def _flat(self, resolved: Mapping[str, object]) -> dict[str, Scalar]:
        return dict(pair for name, table in resolved.items() for pair in self._settings(table, name))

    def _probes(self, folder: RunFolder, run: Run, trained: RunRecord) -> dict[str, Settings]:
        """Add the results of all heads, and return the settings of each."""
        heads = {}
        for name, record in self._records(folder, "probes", ProbeResult, trained):
            settings = {**record.settings, "images": record.train.n}
            heads[name] = self._settings(settings, "head", without=("head", "features"))
            where = self._condition(record.test, record.head, record.features)
            clean, computed = record.test_accuracy, self._computed(trained, record.environment)
            entry = Entry(*(run, f"probes/{name}", where, heads[name], record.created, clean), computed=computed)
            self.found.entries.append(entry)
        return heads

    def _attacks(self, folder: RunFolder, run: Run, trained: RunRecord, heads: Mapping[str, Settings]) -> None:
        for name, record in self._records(folder, "attacks", AttackResult, trained):
            settings = self._settings(record.settings, "", without=_NOT_THE_ATTACK)
            attack = (record.attack, ", ".join(f"{key} {value}" for key, value in settings))
            where = self._condition(record.data, record.head, record.features, record.threat, attack)
            entry = Entry(
                *(run, f"attacks/{name}", where, heads.get(record.probe, ()), record.created, record.clean),
                robust=record.robust,
                order=sys.intern(record.order_digest),
                failed=failed_names(record.flags),
                attack=settings,
                computed=self._computed(trained, record.environment),
            )
            if record.source is None:
                self.found.entries.append(entry)
            else:
                self.found.transfers.append(Transfer(entry, record.source.run))

    def _measures(self, folder: RunFolder, run: Run, trained: RunRecord, heads: Mapping[str, Settings]) -> None:
        """Add measures: one of no one eps has its accuracy at the usual one, and corruptions their mean."""
        for name, record in self._records(folder, "measures", MeasureResult, trained):
            settings = self._settings(record.settings, "", without=_NOT_THE_ATTACK)
            found = headline(record)
            if found.accuracy is None:
                self._leave_out(f"{run.id} measures/{name}", "it has no accuracy that could be compared")
                continue
            attack = (record.measure, ", ".join(f"{key} {value}" for key, value in settings))
            where = self._condition(record.data, record.head, record.features, found.threat, attack)
            self.found.entries.append(
                Entry(
                    *(run, f"measures/{name}", where, heads.get(record.probe, ()), record.created, record.clean),
                    robust=found.accuracy,
                    failed=failed_names(record.flags),
                    attack=settings,
                    computed=self._computed(trained, record.environment),
                    remark=found.words,
                )
            )

    def _online(self, record: RunRecord, run: Run, *, looked_at: bool) -> None:
        """The figures that monitored the training, where nothing better was measured."""
        evaluation = record.evaluation
        if evaluation is None or evaluation.clean is None or record.data is None:
            if not looked_at:
                self._leave_out(run.id, "nothing was measured on it yet: cfamc attack")
            return
        attacked = evaluation.robust is not None
        threat = ThreatModel(space="image", norm="linf", eps=evaluation.eps) if attacked else None
        attack = (evaluation.attack if attacked else "", "")
        data = record.data.model_copy(update={"split": "held-out part of train"})
        where = self._condition(data, ONLINE, "pre_feature", threat, attack)
        computed = self._computed(record)
        entry = Entry(
            *(run, "run.json", where, (), record.updated, evaluation.clean, evaluation.robust), computed=computed
        )
        self.found.entries.append(entry)

    def _computed(self, trained: RunRecord, measured: Environment | None = None) -> Settings:
        """How the encoder was trained, and how the result was measured, where that came later."""
        found: Settings = ()
        for what, where in (("training", trained.environment), ("evaluation", measured)):
            if where is not None:
                how = where.computation.model_dump() if where.computation else {}
                found += self._settings({"device": where.device, "torch": where.torch, **how}, what)
        return found

    def _condition(
        self,
        data: DataUsed,
        head: str,
        features: str,
        threat: ThreatModel | None = None,
        attack: tuple[str, str] = ("", ""),
    ) -> Condition:
        """What a result was measured under; `attack` is its name and settings."""
        under = (threat.space, threat.norm, _plain_eps(threat.eps)) if threat else ("", "", "")
        found = Condition(data.dataset, data.split, data.fingerprint, head, features, *under, *attack)
        return self._conditions.setdefault(found, found)

    def _records(
        self, run: RunFolder, kind: str, model: type[Result], trained: RunRecord
    ) -> Iterator[tuple[str, Result]]:
        """Read the finished items of a run, and name the others; plain strings, for Path objects take longer."""
        try:
            with os.scandir(f"{run.path}/{kind}") as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        except FileNotFoundError:
            return
        except OSError as error:
            self._leave_out(f"{run.id} {kind}", str(error))
            return
        for name in names:
            path = f"{run.path}/{kind}/{name}/{RECORD}"
            try:
                record = load_record(path, model)
            except CfamcError as error:
                self._leave_out(f"{run.id} {kind}/{name}", "unfinished" if _is_absent(path) else error.message)
                continue
            if _is_of_final_encoder(record, run, trained):
                yield name, record
            else:
                made = f"{record.created:%Y-%m-%d %H:%M} UTC"
                self._leave_out(f"{run.id} {kind}/{name}", f"made on {made}, and the encoder was trained on since")

    def _leave_out(self, what: str, why: str) -> None:
        self.found.left_out.append((what, why))

    def _settings(self, settings: object, prefix: str, *, without: tuple[str, ...] = ()) -> Settings:
        """Spell nested settings as dotted keys and plain values; worked out once for equal ones."""
        key = (repr(settings), prefix)
        if key not in self._flattened:
            if without and isinstance(settings, dict):
                settings = {name: settings[name] for name in sorted(settings) if name not in without}
            found: dict[str, Scalar] = {}
            self._flatten(settings, prefix, found)
            self._flattened[key] = tuple(found.items())
        return self._flattened[key]

    def _flatten(self, value: object, prefix: str, found: dict[str, Scalar]) -> None:
        if isinstance(value, dict):
            items: Iterable[tuple[object, object]] = value.items()
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            items = enumerate(value)
        else:
            scalar = value if isinstance(value, _SCALAR) else json.dumps(value)
            found[sys.intern(prefix)] = sys.intern(scalar) if isinstance(scalar, str) else scalar
            return
        for key, item in items:
            self._flatten(item, f"{prefix}.{key}" if prefix else str(key), found)


def _is_absent(path: Path | str) -> bool:
    """Whether there is nothing; of what may not be looked at nobody knows."""
    try:
        Path(path).stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def _is_of_final_encoder(
    record: ProbeResult | AttackResult | MeasureResult | UnlabelledRecord, run: RunFolder, trained: RunRecord
) -> bool:
    """Whether a result is of the encoder that its run ended with; checkpoints are looked at only in doubt."""
    if record.created - timedelta(seconds=record.wall_seconds) >= trained.updated:
        return True
    final = run.final_encoder_digest()
    return record.created >= trained.updated if final is None else record.encoder_digest == final


@lru_cache(maxsize=1000)
def _plain_eps(text: str) -> str:
    """One spelling for equal sizes: in 255ths where that is whole."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text
    return f"{value * 255}/255" if (value * 255).denominator == 1 else f"{float(value):g}"
