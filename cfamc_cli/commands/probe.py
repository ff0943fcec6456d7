"""`cfamc probe`: from a run's encoder to a named head and its accuracies, or from foreign weights to a run.

Nothing here computes: the engine fits, the store keeps, and this puts them together.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from cfamc_cli.commands.common import (
    SAME_COMMAND,
    Options,
    Session,
    among_others,
    interruption,
    leads,
    load_images,
    session,
)
from cfamc_cli.commands.probe_import import Import, import_run
from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.errors import Interrupted, bad_data, invalid
from cfamc_cli.recipe import file
from cfamc_cli.recipe.plan import duration
from cfamc_cli.recipe.schema import Data, Finetune, Judged, Recipe, RobustLinear
from cfamc_cli.report import terminal
from cfamc_cli.store.environment import capture_environment
from cfamc_cli.store.records import (
    IMPORTED,
    Accuracy,
    DataUsed,
    FeatureMap,
    HeadKind,
    PendingProbe,
    ProbeRecord,
    images_of,
    load_record,
    now,
    save_record,
    settings_of,
)
from cfamc_cli.store.runs import (
    HEAD,
    LATEST,
    MAP,
    PENDING,
    RECORD,
    RunFolder,
    find_probe,
    find_run,
    lock,
    new_item,
    standard_probe,
    turn,
    unfinished_probes,
)

if TYPE_CHECKING:
    from cfamc_cli.engine.data.sets import ImageSet
    from cfamc_cli.engine.heads.classifier import LoadedEncoder
    from cfamc_cli.engine.heads.frozen import Fitted, Task
    from cfamc_cli.engine.heads.imported import LastLayer
    from cfamc_cli.engine.sink import Talk

_MOST_CLASSES = 20  # that a table lists; a record has them all


@dataclass(frozen=True)
class Request:
    """Which head to fit; None leaves a setting to the recipe's [probe]."""

    head: str | None = None  # its kind
    features: str | None = None  # the layer that it reads
    crops: int | None = None  # how many crops of an image "crops" reads
    epochs: int | None = None
    protocol: str | None = None  # "official" or "converged", for "linear"
    data: str | None = None  # another data set than the run's: its name, or the path of a folder
    also: tuple[str, ...] = ()  # more of them, for a head each
    limit: int | None = None  # training images to fit it to, evenly of all classes
    split: Judged | None = None  # what to judge it on; held-out images where there are some, else test images
    overrides: Sequence[str] = ()  # texts of --set


def probe(
    reference: str | None,
    *,
    request: Request,
    foreign: Import | None,
    resume: bool,
    options: Options,
) -> None:
    """Fit one head, go on with one, or make a run of a foreign network, whose last layer may be a head already.

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
        kept: Path | None = None
        if foreign is None:
            path = find_run(
                options.store, LATEST if reference is None else reference, accept=lambda run: run.status == "finished"
            ).path
        elif reference is not None or resume:
            raise invalid("--import makes a run of its own", "leave out RUN and --resume")
        else:
            path, kept = _import(foreign, request, working) if leads() else (Path(), None)
        run = RunFolder(Path(working.agreed(str(path))))
        enough = working.agreed("kept" if kept is not None and request == Request(data=request.data) else "")
        with interruption(hint=lambda: f"go on with: {_way_on(run, options)}"):
            folders = [kept] if enough else _fit_asked(run, request, working, resume=resume)
    records = [load_record(folder / RECORD, ProbeRecord) for folder in folders if folder is not None]
    if not options.as_json:
        for record in records:
            _show(record)
    elif records:
        told = [record.model_dump(mode="json") for record in records]
        terminal.print_json({"probes": told} if request.also else told[0])


def ensure_head(
    run: RunFolder, loaded: LoadedEncoder, working: Session, *, probe: str | None = None, split: Judged | None = None
) -> Path:
    """The head that an evaluation of a run is about; the standard linear one is fitted where there is none.

    Args:
        run: The run.
        loaded: Its encoder.
        working: The command at work.
        probe: A probe's id, or a kind of head for the newest of that kind; None for the newest linear head of the
            encoder on all of the run's own data.
        split: What a head that has to be fitted is judged on. Heads are fitted to the same images whatever it is.

    Returns:
        The folder of a finished probe.

    Raises:
        CfamcError: There is no such probe (exit 2), or fitting failed.
    """
    if probe is not None:
        return find_probe(run, probe)
    with turn(run.probes, wait=working.talk.message) if leads() else nullcontext():
        standard = standard_probe(run, loaded.digest)
        name = working.agreed(standard.name if standard else "")
        if not name:
            working.talk.message(f"run {run.id} has no linear head yet: fitting the standard one")
            fitted = _fit(run, _settled(run, Request(head="linear")), working, loaded=loaded, split=split)
            name = working.agreed(fitted.name if fitted else "")
    return run.probes / name


def load_judged_images(run: RunFolder, record: ProbeRecord, *, talk: Talk) -> ImageSet:
    """The labelled images that a head was judged on.

    Raises:
        CfamcError: Exit 4; they are not there any more, or have changed.
    """
    images = load_images(_recipe_of(run, record), _judged(record.test), talk=talk).labelled()
    _same_data(images.used(), record.test, whose=f"head {record.id} was fitted")
    return images


def load_attacked_images(run: RunFolder, record: ProbeRecord, *, split: Judged | None, talk: Talk) -> ImageSet:
    """The labelled images to attack a head on, which may be others than it was judged on.

    Raises:
        CfamcError: Exit 2 where none are held out and such are asked for; exit 4 where the data is not there any more,
            or has changed.
    """
    recipe = _recipe_of(run, record)
    chosen = chosen_split(recipe.data, split)
    if chosen == _judged(record.test):
        return load_judged_images(run, record, talk=talk)
    # No digest of these images was kept, but one of those that the head was fitted to, which lie in the same place.
    train = load_images(recipe, "train", talk=talk).labelled()
    train = _evenly(train, min(record.train.n, len(train)), seed=recipe.seed)
    _same_data(train.used(), record.train, whose=f"head {record.id} was fitted")
    return load_images(recipe, chosen, talk=talk).labelled()


def _recipe_of(run: RunFolder, record: ProbeRecord) -> Recipe:
    """The run's recipe with the [data] that a head read."""
    recipe = run.recipe()
    return recipe.model_copy(update={"data": settings_of(record, "data", Data)}) if record.data else recipe


def _judged(used: DataUsed) -> Judged:
    return "holdout" if used.split == "holdout" else "test"


def chosen_split(data: Data, asked: Judged | None) -> Judged:
    """The images that results are of: nothing is chosen on test images, so those are for whom asks for them.

    Raises:
        CfamcError: Exit 2; held-out images are asked for, and there are none.
    """
    if asked == "holdout" and not data.holdout:
        hint = "train with data.holdout, or set it beside --data; or leave --split out"
        raise invalid(f"--split holdout: no training images of {data.dataset} were held out", hint)
    return asked or ("holdout" if data.holdout else "test")


# Settings


def _settled(run: RunFolder, request: Request) -> Recipe:
    """The run's recipe with the [probe] and [data] that were asked for."""
    own = run.recipe().probe
    for text in request.overrides:
        key = text.partition("=")[0].strip()
        moved = key == "data.root" or (key.startswith("data.") and request.data is not None)
        if not key.startswith("probe.") and not moved:
            raise invalid(
                f"--set {key:.80}: the encoder is trained; only probe.* can be set, data.root, and with --data data.*",
                "such as: --set probe.lr=0.001",
            )
    asked = {key: getattr(request, key) for key in ("head", "features", "crops", "epochs", "protocol")}
    asked = {key: value for key, value in asked.items() if value is not None}
    table = own.model_dump(exclude_defaults=True)
    if any(key in asked and asked[key] != getattr(own, key, None) for key in ("head", "protocol")):
        table = {"head": own.head, "features": own.features}  # the rest belongs to another kind of head
    overrides = [f"probe={_inline(table)}", *(f"probe.{key}={json.dumps(value)}" for key, value in asked.items())]
    if request.data is not None:
        overrides.append(f"data={_inline(data_table(request.data))}")
    return file.load(str(run.recipe_toml), overrides=[*overrides, *request.overrides])


def data_table(name: str) -> dict[str, object]:
    """The [data] of a known set, or of a folder of images.

    Raises:
        CfamcError: Exit 2; it is neither.
    """
    if name in KNOWN_SETS:
        return {"dataset": name}
    if os.sep in name or Path(name).is_dir():
        return {"dataset": "folder", "root": name}
    hint = f"one of: {', '.join(KNOWN_SETS)}, or a path"
    raise invalid(f"--data {name!r:.100} is neither a known data set nor a folder", hint)


def _inline(table: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


# Data


def _load_splits(
    run: RunFolder, recipe: Recipe, *, split: Judged, transfer: bool, limit: int | None, talk: Talk
) -> tuple[ImageSet, ImageSet]:
    """The images to fit a head to and those to judge it on, labelled and fit for it."""
    train = load_images(recipe, "train", talk=talk)
    own = run.record().data
    if not transfer and own is not None:
        _same_data(train.used(), own, whose=f"run {run.id} was trained")
    train = train.labelled()
    if limit is not None:
        if limit > len(train):
            raise invalid(
                f"--limit is {limit:,} but {train.dataset} has {len(train):,} labelled training images",
                "lower --limit or leave it out",
            )
        train = _evenly(train, limit, seed=recipe.seed)
    train.require_labels()
    test = load_images(recipe, split, talk=talk).labelled()
    assert test.classes == train.classes, "the splits of a data set name their classes alike"
    return train, test


def _evenly(train: ImageSet, count: int, *, seed: int) -> ImageSet:
    """So many labelled images, evenly of all classes."""
    from cfamc_cli.engine.data.sets import class_balanced_split

    assert train.labels is not None, "labelled() raises otherwise"
    return train if count == len(train) else train.take(class_balanced_split(train.labels, count, seed=seed)[0])


def _same_data(found: DataUsed, expected: DataUsed, *, whose: str) -> None:
    if found != expected:
        raise bad_data(
            f"the data changed since {whose}: {found.split} fingerprint {found.fingerprint[:12]}, "
            f"not {expected.fingerprint[:12]}",
            "bring the data back, or probe with --data for another data set",
        )


# Fitting


def _fit_asked(run: RunFolder, request: Request, working: Session, *, resume: bool) -> list[Path | None]:
    """Fit a head to each data set that was asked for, or the newest unfinished one; returns what `_fit` does."""
    if not resume:
        recipes = [_settled(run, replace(request, data=name)) for name in (request.data, *request.also)]
        if len({recipe.data for recipe in recipes}) < len(recipes):
            raise invalid("--data: a data set is given twice")
        transfer, limit, split = request.data is not None, request.limit, request.split
        return [_fit(run, recipe, working, transfer=transfer, limit=limit, split=split) for recipe in recipes]
    if request != Request():
        raise invalid("--resume goes on with the head as it was begun", "leave the other options out")
    return [_go_on(run, working)]


def _go_on(run: RunFolder, working: Session) -> Path | None:
    """Finish the newest unfinished head; returns what `_fit` does."""
    unfinished = unfinished_probes(run)
    if not unfinished:
        raise invalid(f"run {run.id} has no unfinished head", "robust-linear and finetune can be resumed")
    folder = unfinished[-1]
    pending = load_record(folder / PENDING, PendingProbe)
    recipe = file.validate(pending.recipe, label=str(folder / PENDING))
    split = _judged(pending.test)
    return _fit(run, recipe, working, transfer=pending.transfer, limit=pending.limit, split=split, begun=folder)


def _fit(
    run: RunFolder,
    recipe: Recipe,
    working: Session,
    *,
    loaded: LoadedEncoder | None = None,
    transfer: bool = False,
    limit: int | None = None,
    split: Judged | None = None,
    begun: Path | None = None,
) -> Path | None:
    """Fit a head, a new one or one that was begun, and keep it; returns its folder, in the leading process alone."""
    from cfamc_cli.engine.device import out_of_memory
    from cfamc_cli.engine.distributed import first_on_each_node, peers
    from cfamc_cli.engine.heads.classifier import load_encoder
    from cfamc_cli.engine.heads.frozen import Task, fit_on_features
    from cfamc_cli.engine.heads.supervised import SupervisedTrainer

    started, settings, talk, signals = time.monotonic(), recipe.probe, working.talk, working.signals
    judged = chosen_split(recipe.data, split)
    if (status := run.record().status) != "finished":
        talk.warning(f"run {run.id} is not finished but {status}: reading its newest checkpoint")
    with peers(working.world, hint=SAME_COMMAND), out_of_memory(), ExitStack() as held:
        loaded = loaded or load_encoder(run.checkpoints, recipe.model, device=working.device, talk=talk)
        if loaded.backbone_only and settings.features == "pre_feature":
            raise invalid(
                f"run {run.id} was imported without a pre_feature layer",
                "read the backbone instead: cfamc probe --features backbone",
            )
        splits = partial(_load_splits, run, recipe, split=judged, transfer=transfer, limit=limit, talk=talk)
        train, test = first_on_each_node(splits, working.world)
        if isinstance(settings, RobustLinear | Finetune) and not working.world.leads:
            return None
        task = Task(loaded, recipe, train, test, talk, working.world)
        if isinstance(settings, RobustLinear | Finetune):
            if among_others():
                talk.warning(f"{settings.head} is trained by one process: the others of torchrun leave")
            folder = begun or _begin(run, task, transfer=transfer, limit=limit)
            pending = load_record(folder / PENDING, PendingProbe)
            if loaded.digest != pending.encoder_digest:
                raise bad_data(
                    f"the encoder of {run.id} changed since {folder.name} was begun",
                    "begin a new head: leave --resume out",
                )
            for images, expected in ((train, pending.train), (test, pending.test)):
                _same_data(images.used(), expected, whose=f"{folder.name} was begun")
            held.enter_context(lock(RunFolder(folder)))
            trainer = SupervisedTrainer(task, settings)
            checkpoints = RunFolder(folder).checkpoints
            started -= trainer.take_up(checkpoints)  # the seconds of earlier sittings
            with signals.deferred():
                signal = trainer.train(checkpoints, stop=signals.pending, seconds=lambda: time.monotonic() - started)
            if signal:
                raise Interrupted(signal)
            fitted = trainer.judged()
        else:
            found = fit_on_features(task, settings)
            if found is None:
                return None
            fitted, folder = found, new_item(run.probes, settings.head)
        _keep(folder, run, task, fitted, seconds=time.monotonic() - started)
        (folder / PENDING).unlink(missing_ok=True)
        shutil.rmtree(RunFolder(folder).checkpoints, ignore_errors=True)
    return folder


def _begin(run: RunFolder, task: Task, *, transfer: bool, limit: int | None) -> Path:
    """Make the folder of a head that can be gone on with."""
    if unfinished := unfinished_probes(run):
        task.talk.message(f"{unfinished[-1].name} is unfinished; go on with it by: cfamc probe {run.id} --resume")
    folder = new_item(run.probes, task.recipe.probe.head)
    pending = PendingProbe(
        recipe=task.recipe.resolved(),
        transfer=transfer,
        limit=limit,
        encoder_digest=task.loaded.digest,
        train=task.train.used(),
        test=task.test.used(),
    )
    save_record(folder / PENDING, pending)
    return folder


def _keep(
    folder: Path, run: RunFolder, task: Task, fitted: Fitted, *, seconds: float, imported: LastLayer | None = None
) -> None:
    """Write the weights of a head, then its record, which makes it one; nobody knows what an imported one saw."""
    from cfamc_cli.engine.checkpoint import digest_of
    from cfamc_cli.engine.device import computation, describe
    from cfamc_cli.engine.heads.classifier import write_head
    from cfamc_cli.engine.heads.frozen import accuracy_by_class, confusion_of

    recipe, loaded, train, test = task.recipe, task.loaded, task.train, task.test
    settings, accuracy, digest = recipe.probe, None, None
    kind: HeadKind = settings.head if imported is None else IMPORTED
    features = settings.features if imported is None else imported.features
    told: dict[str, JsonValue] = {"head": kind, "features": features}
    unknown = DataUsed(dataset="unknown", split="train", n=0, fingerprint="")
    finetuned = isinstance(settings, Finetune)
    # a frozen encoder that changed would make every number of this head worthless
    assert finetuned or digest_of(loaded.encoder) == loaded.digest, "fitting a head changed the encoder"
    if fitted.classifier is not None:
        digest = write_head(folder / HEAD, fitted.classifier, finetuned=finetuned)
    if fitted.train is not None:
        accuracy = Accuracy.of(int((fitted.train == task.labels()).sum()), len(train))
    assert test.labels is not None, "labelled() raises otherwise"
    confusion = confusion_of(test.labels, fitted.test.cpu(), classes=len(train.classes))
    record = ProbeRecord(
        id=folder.name,
        run=run.id,
        created=now(),
        head=kind,
        features=features,
        settings=settings.model_dump(mode="json") if imported is None else told,
        recipe_digest=run.record().recipe_digest,
        seed=recipe.seed,
        encoder_digest=loaded.digest,
        head_digest=digest,
        data=recipe.data.model_dump(mode="json"),
        train=train.used() if imported is None else unknown,
        test=test.used(),
        train_accuracy=accuracy,
        converged=fitted.converged,
        test_accuracy=Accuracy.of(sum(row[label] for label, row in enumerate(confusion)), len(test)),
        classes=accuracy_by_class(confusion, train.classes),
        confusion=confusion,
        wall_seconds=seconds,
        environment=capture_environment(
            describe(loaded.device), computation(loaded.device, precision=fitted.precision)
        ),
    )
    if (plane := fitted.plane) is not None:
        labels = test.labels[:: plane.stride].tolist()
        points = ((x, y, label) for (x, y), label in zip(plane.points.tolist(), labels, strict=True))
        save_record(folder / MAP, FeatureMap(points=tuple(points), explained=plane.explained))
    save_record(folder / RECORD, record)
    commonest = max(map(sum, confusion)) / len(test)
    if record.test_accuracy.low <= commonest:
        found, one = terminal.interval(record.test_accuracy), terminal.percent(commonest)
        task.talk.warning(f"{folder.name} is right on {found} %, not clearly better than one class for all: {one}")


# Foreign weights


def _import(asked: Import, request: Request, working: Session) -> tuple[Path, Path | None]:
    """Make a run of a foreign network; returns its folder, and that of its last layer where this is a head."""
    if request.data is None:
        raise invalid("which images shall the imported encoder be probed on?", "such as: --data cifar10")
    run, last = import_run(asked, data_table(request.data), working)
    return run.path, None if last is None else _keep_last_layer(run, last, working)


def _keep_last_layer(run: RunFolder, last: LastLayer, working: Session) -> Path:
    """Judge the last layer of an imported classifier, and keep it as a head that nobody has to fit."""
    from cfamc_cli.engine.heads.classifier import Classifier, load_encoder
    from cfamc_cli.engine.heads.frozen import Fitted, Task, classify

    started, recipe, device = time.monotonic(), run.recipe(), working.device
    loaded = load_encoder(run.checkpoints, recipe.model, device=device, talk=working.talk)
    test = load_images(recipe, "test", talk=working.talk).labelled()
    task = Task(loaded, recipe, test, test, working.talk)
    classifier = Classifier(loaded.encoder, last.head.to(device), features=last.features).eval()
    answers = classify(classifier, test.images, device=device, each=task.progress("judging the last layer"))
    fitted, folder = Fitted(classifier, None, answers), new_item(run.probes, IMPORTED)
    _keep(folder, run, task, fitted, seconds=time.monotonic() - started, imported=last)
    assert test.labels is not None, "labelled() raises otherwise"
    right, n = int((answers.cpu() == test.labels).sum()), len(test)
    if Accuracy.of(right, n).low * len(test.classes) <= 1:
        working.talk.warning(
            f"{last.name} is right on {right} of {n} images, no more than chance: was it trained, and on classes in "
            f"this order? fit a head with: cfamc probe {working.options.reference(run)} --head linear"
        )
    return folder


# Telling


def _show(record: ProbeRecord) -> None:
    judged = images_of(record.test.split).partition(" ")[0]  # "held-out" or "test"
    row = [
        record.id,
        record.features,
        f"{record.train.dataset}, {record.train.n:,}",
        "-" if record.train_accuracy is None else terminal.percent(record.train_accuracy.value),
        f"{record.test.dataset}, {record.test.n:,}",
        terminal.interval(record.test_accuracy),
        duration(record.wall_seconds),
    ]
    columns = ("head", "features", "train images", "train %", f"{judged} images", f"{judged} % [95 %]", "time")
    terminal.print_rows(f"Clean accuracy, run {record.run}", columns, [row], right=(3, 5, 6))
    measured = [(part.name, part.accuracy) for part in record.classes if part.accuracy is not None]
    title = f"{judged.capitalize()} accuracy by class"
    if len(measured) > _MOST_CLASSES:
        measured = sorted(measured, key=lambda item: item[1].value)[: _MOST_CLASSES // 2]
        title = f"The {len(measured)} weakest of {len(record.classes)} classes"
    rows = [(name, f"{accuracy.n:,}", terminal.interval(accuracy)) for name, accuracy in measured]
    terminal.print_rows(title, ("class", "n", f"{judged} % [95 %]"), rows, right=(1, 2))


def _way_on(run: RunFolder, options: Options) -> str:
    return f"cfamc probe {options.reference(run)} --resume" if unfinished_probes(run) else "the same command"
