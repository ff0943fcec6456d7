"""`cfamc probe`: from a run's encoder to a named head and its accuracies, or from foreign weights to a run.

Nothing here computes: the engine fits, the store keeps, and this puts them together.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from cfamc_cli import recipe_file, render
from cfamc_cli.commands.common import Options, Session, interruption, invalid, session
from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.errors import CfamcError, ExitCode, Interrupted
from cfamc_cli.ledger import found
from cfamc_cli.recipe import AggregatedCrops, Finetune, Knn, Linear, Recipe, RobustLinear
from cfamc_cli.records import (
    Accuracy,
    DataUsed,
    PendingProbe,
    ProbeRecord,
    RunRecord,
    Totals,
    capture_environment,
    load_record,
    now,
    save_record,
)
from cfamc_cli.store import LATEST, RunFolder, cache_folder, create_run, find_run, lock, new_item

if TYPE_CHECKING:
    from torch import Tensor

    from cfamc_cli.engine.data import ImageSet
    from cfamc_cli.engine.heads import CropSource, LoadedEncoder
    from cfamc_cli.engine.sink import Talk

RECORD, PENDING, CHECKPOINTS = "record.json", "pending.json", "checkpoints"
_MOST_CLASSES = 20  # that a table lists; a record has them all


@dataclass(frozen=True)
class Request:
    """Which head to fit; None leaves a setting to the recipe's [probe].

    Attributes:
        head: Its kind.
        features: The layer that it reads.
        crops: How many crops of an image "crops" reads.
        epochs: How long it is trained.
        protocol: "official" or "converged", for "linear".
        data: Another data set than the run's: its name, or the path of a folder.
        limit: Training images to fit it to, evenly of all classes.
        overrides: Texts of --set.
    """

    head: str | None = None
    features: str | None = None
    crops: int | None = None
    epochs: int | None = None
    protocol: str | None = None
    data: str | None = None
    limit: int | None = None
    overrides: Sequence[str] = field(default=())


def probe(
    reference: str | None,
    *,
    request: Request,
    foreign: Path | None,
    resume: bool,
    options: Options,
) -> None:
    """Fit one head, go on with one, or make a run of foreign weights and fit one to it.

    Args:
        reference: A run: its id, path, or "latest"; None for the newest finished one.
        request: Which head.
        foreign: A file of weights to import.
        resume: Go on with the newest unfinished head of the run.
        options: Where and how.

    Raises:
        CfamcError: With the exit code of its cause.
    """
    with session(options) as working:
        if foreign is not None:
            if reference is not None or resume:
                raise invalid("--import makes a run of its own", "leave out RUN and --resume")
            run = _import(foreign, request, working)
        else:
            run = find_run(options.store, reference or LATEST, accept=_finished)
        with interruption(hint=lambda: f"go on with: {_way_on(run)}"):
            if resume:
                if request != Request():
                    raise invalid("--resume goes on with the head as it was begun", "leave the other options out")
                folder = _go_on(run, working)
            else:
                folder = _fit(run, request, working)
    record = load_record(folder / RECORD, ProbeRecord)
    if options.as_json:
        render.print_json(record.model_dump(mode="json"))
    else:
        _show(record)


def ensure_head(run: RunFolder, working: Session, *, probe: str | None = None) -> Path:
    """The head that an evaluation of a run is about; the standard linear one is fitted where there is none.

    Args:
        run: The run.
        working: The command at work.
        probe: A probe's id, or a kind of head for the newest of that kind; None for the newest linear head of the
            newest encoder on all of the run's own data.

    Returns:
        The folder of a finished probe.

    Raises:
        CfamcError: There is no such probe (exit 2), or fitting failed.
    """
    records = finished_probes(run)
    if probe is None:
        if standard := _standard(run, records):
            return standard[-1]
        recipe = recipe_file.load(str(run.recipe_toml))
        request = Request() if isinstance(recipe.probe, Linear) else Request(head="linear")
        working.talk.message(f"run {run.id} has no linear head yet: fitting the standard one")
        return _fit(run, request, working)
    fitting = [folder for folder, record in records if probe in (folder.name, record.head)]
    if fitting:
        return fitting[-1]
    names = ", ".join(folder.name for folder, _ in records)
    hint = f"it has {names}" if names else f"fit one with: cfamc probe {run.id}"
    raise invalid(f"run {run.id} has no probe {probe!r:.100}", hint)


def _standard(run: RunFolder, records: Sequence[tuple[Path, ProbeRecord]]) -> list[Path]:
    """The linear heads that were fitted to the newest encoder on all of the run's own data, oldest first."""
    from cfamc_cli.engine import checkpoint

    linear = [(folder, record) for folder, record in records if record.head == "linear"]
    if not linear:
        return []
    _, saved, _ = checkpoint.newest_valid(run.checkpoints)
    digest = checkpoint.sha256(checkpoint.encode(saved.model))
    own, data = load_record(run.run_json, RunRecord).data, _identity(_table_of(run))
    whole = own.n if own is not None and own.dataset != "stl10" else None  # of stl10 a part has labels
    return [
        folder
        for folder, record in linear
        if record.encoder_digest == digest and _identity(record.data) == data and whole in (None, record.train.n)
    ]


def _table_of(run: RunFolder) -> Mapping[str, object]:
    return recipe_file.load(str(run.recipe_toml)).data.model_dump(mode="json")


def _identity(data: Mapping[str, object]) -> dict[str, object]:
    """A [data] table without the place where the files of a known set lie."""
    return {key: value for key, value in data.items() if key != "root" or data["dataset"] == "folder"}


def finished_probes(run: RunFolder) -> list[tuple[Path, ProbeRecord]]:
    """The finished probes of a run, oldest first; records that cannot be read are left out."""
    found = []
    for path in run.probes.glob(f"*/{RECORD}"):
        with suppress(CfamcError):
            found.append((path.parent, load_record(path, ProbeRecord)))
    return sorted(found, key=lambda item: (item[1].created, (item[0] / RECORD).stat().st_mtime_ns))


def load_test_images(run: RunFolder, record: ProbeRecord, *, talk: Talk) -> ImageSet:
    """The labelled test images that a head was judged on.

    Raises:
        CfamcError: Exit 4; they are not there any more, or have changed.
    """
    from cfamc_cli.engine.heads import load_recipe

    recipe = load_recipe(run)
    if record.data:
        raw = recipe.resolved() | {"data": dict(record.data)}
        recipe = recipe_file.validate(raw, label=str(run.resolved_json))
    images = _load(recipe, "test", talk=talk).labelled()
    _same_data(images.used(), record.test, whose=f"head {record.id} was fitted")
    return images


# Settings


def _settled(run: RunFolder, request: Request) -> Recipe:
    """The run's recipe with the [probe] and [data] that were asked for."""
    path = str(run.recipe_toml)
    recipe = recipe_file.load(path)
    for text in request.overrides:
        key = text.partition("=")[0].strip()
        moved = key == "data.root" or (key.startswith("data.") and request.data is not None)
        if not key.startswith("probe.") and not moved:
            raise invalid(
                f"--set {key:.80}: the encoder is trained; only probe.* can be set, data.root, and with --data data.*",
                "such as: --set probe.lr=0.001",
            )
    given = {"head": request.head, "protocol": request.protocol}
    if any(value is not None and value != getattr(recipe.probe, key, None) for key, value in given.items()):
        table: dict[str, object] = {"head": request.head or recipe.probe.head}
        if recipe.probe.features != "pre_feature":
            table["features"] = recipe.probe.features
    else:
        defaults = type(recipe.probe)(head=recipe.probe.head).model_dump()  # type: ignore[arg-type]
        table = {k: v for k, v in recipe.probe.model_dump().items() if k == "head" or v != defaults.get(k)}
    overrides = [f"probe={_inline(table)}"]
    if request.data is not None:
        overrides.append(f"data={_inline(_data_table(request.data))}")
    for key in ("features", "crops", "epochs", "protocol"):
        value = getattr(request, key)
        if value is not None:
            overrides.append(f"probe.{key}={json.dumps(value)}")
    return recipe_file.load(path, overrides=[*overrides, *request.overrides])


def _data_table(name: str) -> dict[str, object]:
    if name in KNOWN_SETS:
        return {"dataset": name}
    if os.sep in name or Path(name).is_dir():
        return {"dataset": "folder", "root": name}
    hint = f"one of: {', '.join(KNOWN_SETS)}, or a path"
    raise invalid(f"--data {name!r:.100} is neither a known data set nor a folder", hint)


def _inline(table: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


# Data


def _load(recipe: Recipe, split: str, *, talk: Talk) -> ImageSet:
    from cfamc_cli.engine.data import load

    cache = cache_folder()
    return load(recipe.data, "train" if split == "train" else "test", seed=recipe.seed, cache=cache, talk=talk)


def _load_splits(
    run: RunFolder, recipe: Recipe, *, transfer: bool, limit: int | None, talk: Talk
) -> tuple[ImageSet, ImageSet]:
    """The images to fit a head to and those to judge it on, labelled and fit for it."""
    from cfamc_cli.engine.data import class_balanced_split

    train = _load(recipe, "train", talk=talk)
    own = load_record(run.run_json, RunRecord).data
    if not transfer and own is not None:
        _same_data(train.used(), own, whose=f"run {run.id} was trained")
    train = train.labelled()
    if limit is not None:
        if limit > len(train):
            raise invalid(
                f"--limit is {limit:,} but {train.dataset} has {len(train):,} labelled training images",
                "lower --limit or leave it out",
            )
        assert train.labels is not None, "labelled() raises otherwise"
        if limit < len(train):
            train = train.take(class_balanced_split(train.labels, limit, seed=recipe.seed)[0])
    train.require_labels()
    test = _load(recipe, "test", talk=talk).labelled()
    assert test.classes == train.classes, "the splits of a data set name their classes alike"
    return train, test


def _same_data(found: DataUsed, expected: DataUsed, *, whose: str) -> None:
    if found != expected:
        raise CfamcError(
            f"the data changed since {whose}: {found.split} fingerprint {found.fingerprint[:12]}, "
            f"not {expected.fingerprint[:12]}",
            hint="bring the data back, or probe with --data for another data set",
            exit_code=ExitCode.BAD_DATA,
        )


# Fitting


def _fit(run: RunFolder, request: Request, working: Session) -> Path:
    """Fit a new head and keep it; returns its folder."""
    from cfamc_cli.engine.device import out_of_memory

    started = time.monotonic()
    recipe = _settled(run, request)
    with out_of_memory():
        encoder = _encoder(run, recipe, working)
        transfer = request.data is not None
        train, test = _load_splits(run, recipe, transfer=transfer, limit=request.limit, talk=working.talk)
        job = _Job(run, recipe, encoder, train, test, working, started=started)
        match recipe.probe:
            case Linear() | AggregatedCrops() | Knn():
                return job.fit_on_features()
            case RobustLinear() | Finetune():
                pending = PendingProbe(
                    recipe=recipe.resolved(),
                    transfer=transfer,
                    limit=request.limit,
                    encoder_digest=encoder.digest,
                    train=train.used(),
                    test=test.used(),
                )
                if unfinished := _unfinished(run):
                    working.talk.message(
                        f"{unfinished[-1].name} is unfinished; go on with it by: cfamc probe {run.id} --resume"
                    )
                folder = new_item(run.probes, recipe.probe.head)
                save_record(folder / PENDING, pending)
                return job.fit_by_steps(folder)
            case _:
                assert_never(recipe.probe)


def _go_on(run: RunFolder, working: Session) -> Path:
    """Finish the newest unfinished head; returns its folder."""
    from cfamc_cli.engine.device import out_of_memory

    started = time.monotonic()
    unfinished = _unfinished(run)
    if not unfinished:
        raise invalid(f"run {run.id} has no unfinished head", "robust-linear and finetune can be resumed")
    folder = unfinished[-1]
    pending = load_record(folder / PENDING, PendingProbe)
    recipe = recipe_file.validate(pending.recipe, label=str(folder / PENDING))
    with out_of_memory():
        encoder = _encoder(run, recipe, working)
        if encoder.digest != pending.encoder_digest:
            raise CfamcError(
                f"the encoder of {run.id} changed since {folder.name} was begun",
                hint="begin a new head: leave --resume out",
                exit_code=ExitCode.BAD_DATA,
            )
        train, test = _load_splits(run, recipe, transfer=pending.transfer, limit=pending.limit, talk=working.talk)
        for images, expected in ((train, pending.train), (test, pending.test)):
            _same_data(images.used(), expected, whose=f"{folder.name} was begun")
        job = _Job(run, recipe, encoder, train, test, working, started=started)
        return job.fit_by_steps(folder)


def _unfinished(run: RunFolder) -> list[Path]:
    """Folders of heads that were begun and can be gone on with, oldest first."""
    begun = [path for path in run.probes.glob(f"*/{PENDING}") if not (path.parent / RECORD).exists()]
    return [path.parent for path in sorted(begun, key=lambda path: (path.stat().st_mtime_ns, path))]


def _encoder(run: RunFolder, recipe: Recipe, working: Session) -> LoadedEncoder:
    from cfamc_cli.engine.heads import load_encoder

    record = load_record(run.run_json, RunRecord)
    if record.status != "finished":
        working.talk.warning(f"run {run.id} is not finished but {record.status}: reading its newest checkpoint")
    loaded = load_encoder(run.checkpoints, recipe.model, device=working.device)
    for text in loaded.warnings:
        working.talk.warning(text)
    if loaded.backbone_only and recipe.probe.features == "pre_feature":
        raise invalid(
            f"run {run.id} was imported without a pre_feature layer",
            "read the backbone instead: cfamc probe --features backbone",
        )
    return loaded


class _Job:
    """One head under way."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        encoder: LoadedEncoder,
        train: ImageSet,
        test: ImageSet,
        working: Session,
        *,
        started: float,
    ) -> None:
        self.run, self.recipe, self.loaded, self.train, self.test = run, recipe, encoder, train, test
        self.device, self.talk, self.signals, self.started = working.device, working.talk, working.signals, started
        self.classes = len(train.classes)
        self.before = 0.0  # seconds of earlier sittings
        self.converged: bool | None = None

    def fit_on_features(self) -> Path:
        """Extract features once, fit the head to them, and keep it."""
        from cfamc_cli.engine import probe as engine
        from cfamc_cli.engine.heads import Classifier, crop_source, write_head

        settings, seed = self.recipe.probe, self.recipe.seed
        sources: dict[str, CropSource | None] = {"train": None, "test": None}
        if isinstance(settings, AggregatedCrops):
            sources = {split: crop_source(self.recipe, settings, split=split) for split in sources}
        features = self._features(self.train, sources["train"])
        queries = self._features(self.test, sources["test"])
        labels = self._labels(self.train)
        statistics = features if isinstance(settings, Linear) and settings.standardize else None
        head = engine.new_head(features.shape[1], self.classes, seed=seed, device=self.device, statistics=statistics)
        each = self._progress(f"fitting the {settings.head} head")
        match settings:
            case Knn():
                k, temperature = settings.k, settings.temperature
                answers = engine.weighted_knn(
                    features, labels, queries, classes=self.classes, k=k, temperature=temperature, each=each
                )
                return self._keep(new_item(self.run.probes, "knn"), None, None, answers)
            case Linear(protocol="converged"):
                gradient = engine.fit_converged(head, features, labels, l2=settings.l2, each=each)
                self.converged = gradient <= engine.CONVERGED
                if not self.converged:
                    self.talk.warning(f"the head had not converged when its time was up: gradient {gradient:.2g}")
            case Linear() | AggregatedCrops():
                engine.fit_by_batches(head, features, labels, settings=settings, seed=seed, each=each)
            case _:
                raise AssertionError(f"{settings.head} is not fitted to features")
        fitted, answers = engine.predict(head, features), engine.predict(head, queries)
        classifier = Classifier(self.loaded.encoder, head, features=settings.features, crops=sources["test"])
        self._untouched()
        folder = new_item(self.run.probes, settings.head)
        return self._keep(folder, write_head(folder, classifier, finetuned=False), fitted, answers)

    def fit_by_steps(self, folder: Path) -> Path:
        """Train a head that needs the encoder at every step, from where it stands, and keep it."""
        from cfamc_cli.engine import checkpoint
        from cfamc_cli.engine import probe as engine
        from cfamc_cli.engine.finetune import SupervisedTrainer
        from cfamc_cli.engine.heads import write_head

        settings = self.recipe.probe
        assert isinstance(settings, RobustLinear | Finetune), "the others are fitted to features"
        with lock(RunFolder(folder)):
            trainer = SupervisedTrainer(
                self.loaded.encoder,
                self.train.images,
                self._labels(self.train),
                classes=self.classes,
                settings=settings,
                seed=self.recipe.seed,
                precision=self.recipe.train.precision,
                device=self.device,
                talk=self.talk,
            )
            if checkpoint.list_checkpoints(folder / CHECKPOINTS):
                path, saved, problems = checkpoint.newest_valid(folder / CHECKPOINTS)
                for problem in problems:
                    self.talk.warning(f"{problem.message}; going back to {path.name}")
                trainer.load(saved, path=path)
                self.before = float(str(saved.progress.get("seconds", 0.0)))
            with self.signals.deferred():
                signal = trainer.train(folder / CHECKPOINTS, stop=self.signals.pending, seconds=self._seconds)
            if signal:
                raise Interrupted(signal)
            classifier = trainer.classifier.eval()
            fitted = engine.classify(
                classifier, self.train.images, device=self.device, each=self._progress("judging on train")
            )
            answers = engine.classify(
                classifier, self.test.images, device=self.device, each=self._progress("judging on test")
            )
            finetuned = isinstance(settings, Finetune)
            if not finetuned:
                self._untouched()
            self._keep(folder, write_head(folder, classifier, finetuned=finetuned), fitted, answers)
            (folder / PENDING).unlink()
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return folder

    def _features(self, images: ImageSet, source: CropSource | None) -> Tensor:
        from cfamc_cli.engine.probe import extract_features

        return extract_features(
            self.loaded.encoder,
            images.images,
            device=self.device,
            features=self.recipe.probe.features,
            crops=source,
            each=self._progress(f"features of {images.split}"),
        )

    def _labels(self, images: ImageSet) -> Tensor:
        assert images.labels is not None, "labelled() raises otherwise"
        return images.labels.to(self.device)

    def _progress(self, task: str) -> Callable[[int, int], None]:
        return lambda done, total: self.talk.progress(task, done, total, {})

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def _untouched(self) -> None:
        """A frozen encoder that changed would make every number of this head worthless."""
        from cfamc_cli.engine.checkpoint import digest_of

        assert digest_of(self.loaded.encoder) == self.loaded.digest, "fitting a head changed the encoder"

    def _keep(self, folder: Path, head_digest: str | None, fitted: Tensor | None, answers: Tensor) -> Path:
        """Write the record of a head, which makes it one."""
        from cfamc_cli.engine.device import describe
        from cfamc_cli.engine.probe import accuracy_by_class, confusion_of

        confusion = confusion_of(self._labels(self.test), answers, classes=self.classes)
        right = None if fitted is None else int((fitted == self._labels(self.train)).sum())
        settings = self.recipe.probe
        record = ProbeRecord(
            id=folder.name,
            run=self.run.id,
            created=now(),
            head=settings.head,
            features=settings.features,
            settings=settings.model_dump(mode="json"),
            recipe_digest=load_record(self.run.run_json, RunRecord).recipe_digest,
            seed=self.recipe.seed,
            encoder_digest=self.loaded.digest,
            head_digest=head_digest,
            data=self.recipe.data.model_dump(mode="json"),
            train=self.train.used(),
            test=self.test.used(),
            train_accuracy=None if right is None else Accuracy.of(right, len(self.train)),
            converged=self.converged,
            test_accuracy=Accuracy.of(sum(row[label] for label, row in enumerate(confusion)), len(self.test)),
            classes=accuracy_by_class(confusion, self.train.classes),
            confusion=confusion,
            wall_seconds=self._seconds(),
            environment=capture_environment(describe(self.device)),
        )
        save_record(folder / RECORD, record)
        return folder


# Foreign weights


def _import(path: Path, request: Request, working: Session) -> RunFolder:
    """Make a finished run of somebody else's encoder."""
    from cfamc_cli.engine import checkpoint
    from cfamc_cli.engine.checkpoint import Checkpoint
    from cfamc_cli.engine.device import describe
    from cfamc_cli.engine.foreign import read_foreign

    if request.data is None:
        raise invalid("which images shall the imported encoder be probed on?", "such as: --data cifar10")
    foreign = read_foreign(path)
    raw: dict[str, object] = {
        "schema": 1,
        "name": path.stem[:200] or "imported",
        "data": _data_table(request.data),
        "crops": [{"count": 16, "size": 32 if foreign.model.stem == "cifar" else 224}],
        "model": foreign.model.model_dump(mode="json"),
        "objective": {"name": "emp-ssl"},
        "adversary": {"name": "none"},
        "probe": {"head": "linear", "features": "backbone" if foreign.backbone_only else "pre_feature"},
    }
    recipe = recipe_file.validate(raw, label=str(path))
    run = create_run(working.options.store, recipe.name, now=now())
    record = found(run, recipe, device=describe(working.device))
    progress = {"step": 0, "recipe": recipe.digest(), "positions": {}, "backbone_only": foreign.backbone_only}
    checkpoint.save(run.checkpoints, 0, Checkpoint(foreign.encoder.state_dict(), {}, progress))
    totals = Totals(steps=0, view_passes=0, parameters=checkpoint.count_parameters(foreign.encoder))
    save_record(run.run_json, record.model_copy(update={"status": "finished", "totals": totals, "imported": str(path)}))
    model = foreign.model
    working.talk.message(f"imported {path} as {run.id}: {model.backbone}, {model.stem} stem, width {model.width}")
    for text in foreign.notes:
        working.talk.message(text)
    return run


# Telling


def _show(record: ProbeRecord) -> None:
    row = [
        record.id,
        record.features,
        f"{record.train.dataset}, {record.train.n:,}",
        "-" if record.train_accuracy is None else render.percent(record.train_accuracy.value),
        f"{record.test.dataset}, {record.test.n:,}",
        render.interval(record.test_accuracy),
        render.duration(record.wall_seconds),
    ]
    columns = ("head", "features", "train images", "train %", "test images", "test % [95 %]", "time")
    render.print_rows(f"Clean accuracy, run {record.run}", columns, [row], right=(3, 5, 6))
    measured = [(part.name, part.accuracy) for part in record.classes if part.accuracy is not None]
    title = "Test accuracy by class"
    if len(measured) > _MOST_CLASSES:
        measured = sorted(measured, key=lambda item: item[1].value)[: _MOST_CLASSES // 2]
        title = f"The {len(measured)} weakest of {len(record.classes)} classes"
    rows = [(name, f"{accuracy.n:,}", render.interval(accuracy)) for name, accuracy in measured]
    render.print_rows(title, ("class", "n", "test % [95 %]"), rows, right=(1, 2))


def _way_on(run: RunFolder) -> str:
    return f"cfamc probe {run.id} --resume" if _unfinished(run) else "the same command"


def _finished(run: RunFolder) -> bool:
    try:
        return load_record(run.run_json, RunRecord).status == "finished"
    except CfamcError:
        return False
