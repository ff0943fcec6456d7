"""`cfamc export`: weights that load without cfamc, checked before they are handed over, and metrics for dashboards.

An export is a folder that appears whole: the files, `export.json` for programs and `README.md`, the model card; it is
a model repository of the Hugging Face Hub as it stands.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, assert_never

from cfamc_cli import __version__
from cfamc_cli.commands.claim import CLAIM, claim_of, require_architecture
from cfamc_cli.commands.common import Options, Session, interruption, load_images, session
from cfamc_cli.errors import CfamcError, bad_data, invalid, require_libraries
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.report import hub, terminal
from cfamc_cli.report.card import card
from cfamc_cli.report.metrics import EventFile, by_kind, comma_separated
from cfamc_cli.store.files import explained, staged_folder, sweep, write_bytes, write_text
from cfamc_cli.store.records import (
    AttackRecord,
    Dashboard,
    Exported,
    ExportRecord,
    Format,
    InputSpec,
    MeasureRecord,
    MetricsRecord,
    ProbeRecord,
    R,
    Record,
    RunRecord,
    Source,
    UnlabelledRecord,
    Weights,
    Written,
    load_record,
    now,
    read_metrics,
    save_record,
    weights_file,
)
from cfamc_cli.store.runs import HEAD, LATEST, RECORD, RunFolder, find_run

if TYPE_CHECKING:
    from cfamc_cli.engine.export import Subject


OfHead = TypeVar("OfHead", AttackRecord, MeasureRecord)
EXPORT, CARD = "export.json", "README.md"


def export(
    reference: str | None,
    *,
    part: Weights | None,
    wanted: Format | None,
    head: str | None,
    metrics: Dashboard | None,
    out: Path | None,
    force: bool,
    options: Options,
) -> None:
    """Export weights, or metrics where those are asked for, and print the folder.

    Args:
        reference: A run; None for the newest.
        part: What to hand over; None for the backbone.
        wanted: How to write it; None for safetensors.
        head: Probe whose head makes the classifier; None for the run's standard one.
        metrics: In place of weights, metrics.jsonl in this form.
        out: The folder to make; None for one in the working folder, named after the run.
        force: Replace an earlier export that is there.
        options: Where and how.

    Raises:
        CfamcError: With the exit code of its cause; then nothing was written.
    """
    _refuse_idle(part=part, wanted=wanted, head=head, metrics=metrics)
    chosen, form = part or ("classifier" if wanted == "robustbench" else "backbone"), wanted or "safetensors"

    def fits(run: RunFolder) -> bool:
        return run.has_checkpoint() if metrics is None else run.metrics.is_file()

    with session(options) as working, interruption(message="interrupted; nothing was handed over"):
        run = find_run(options.store, LATEST if reference is None else reference, accept=fits)
        target = out or Path(f"{run.id}-{metrics or f'{chosen}-{form}'}")
        with _staged(target, force=force) as staged:
            record: Record
            if metrics is None:
                record = _weights(run, chosen, form, head, staged, working)
            else:
                record = _metrics(run, metrics, staged)
            save_record(staged / EXPORT, record)
    if options.as_json:
        terminal.print_json({"path": str(target.absolute()), **record.model_dump(mode="json")})
    else:
        terminal.write_out(f"{terminal.clean(target)}\n")


def _refuse_idle(*, part: Weights | None, wanted: Format | None, head: str | None, metrics: Dashboard | None) -> None:
    """Refuse options that would have no effect."""
    given = {"--part": part, "--format": wanted, "--head": head}
    if metrics is not None and (idle := [name for name, value in given.items() if value is not None]):
        message = f"--metrics hands over no weights, so {', '.join(idle)} would have no effect"
        raise invalid(message, "export weights and metrics one after the other")
    if wanted == "robustbench" and part not in (None, "classifier"):
        raise invalid(f"--format robustbench is of classifiers, not of --part {part}", "leave --part out")
    if head is not None and part != "classifier" and wanted != "robustbench":
        raise invalid(f"--head has no effect on --part {part or 'backbone'}", "ask for --part classifier")


# Weights


def _weights(
    run: RunFolder, part: Weights, wanted: Format, head: str | None, staged: Path, working: Session
) -> ExportRecord:
    """Write the weights and their card."""
    record, talk = run.record(), working.talk
    from cfamc_cli.commands.probe import load_judged_images
    from cfamc_cli.engine import export as engine
    from cfamc_cli.engine.device import out_of_memory

    engine.require(wanted)
    with out_of_memory():
        recipe = run.recipe()
        if record.status != "finished":
            talk.warning(f"run {run.id} is not finished ({record.status}); its newest checkpoint is exported")
        subject, source, probe = _chosen(run, record, recipe, part, head, working)
        images = load_images(recipe, "train", talk=talk)
        licence = images.licence
        if probe is not None:
            trained_on, images = images, load_judged_images(run, probe, talk=talk)  # a head may read other data
            if images.dataset != trained_on.dataset:
                both = (trained_on, images)
                licence = "; ".join(f"{part.dataset}: {part.licence or 'not known'}" for part in both)
        probes, attacks = measured(run, source, warn=talk.warning)
        if wanted == "robustbench":
            assert probe is not None, "a classifier has one"
            named = working.options.reference(run)
            require_architecture(recipe, probe, run=named)
            claim = claim_of(record, recipe, probe, attacks, run=named)
            write_text(staged / CLAIM, json.dumps(claim, indent=2) + "\n")
            talk.message(f"{CLAIM}: link, authors and venue are yours to fill in, as is a null")
        sample = engine.some_images(images.images)
        path, looked_at = staged / weights_file(part, wanted), min(len(images), len(sample))
        data = images.used().model_copy(update={"n": looked_at})
        check = engine.write(subject, path, sample, data=data, wanted=wanted)
    height, width = sample.shape[2:]
    made = ExportRecord(
        cfamc=__version__,
        created=now(),
        part=part,
        format=wanted,
        files=_files(staged),
        input=InputSpec(
            name=engine.INPUT, channels="RGB", height=height, width=width, dtype="float32", range=(0.0, 1.0)
        ),
        output=subject.output,
        classes=None if probe is None else tuple(entry.name for entry in probe.classes),
        source=source,
        recipe=portable(recipe).resolved(),
        data=record.data,
        licence=licence,
        check=check,
        probes=hub.short_probes(probes),
        attacks=hub.short_attacks(attacks),
    )
    if wanted == "safetensors":
        known = getattr(subject.module, "default_cfg", {})  # of timm's own nets
        write_text(staged / hub.CONFIG, json.dumps(hub.config(made, recipe.model, known), indent=2) + "\n")
        made = made.model_copy(update={"files": _files(staged)})
    unlabelled = _read_all(run.unlabelled, UnlabelledRecord, talk.warning)
    told = card(
        made,
        portable(recipe),
        record,
        probes=probes,
        attacks=attacks,
        measures=_of_heads(_read_all(run.measures, MeasureRecord, talk.warning), source, probes),
        unlabelled=[item for item in unlabelled if item.encoder_digest == source.encoder_digest],
    )
    write_text(staged / CARD, told)
    talk.message(
        f"{path.name}: read back by {check.reader}, differs by at most {check.largest_difference:.2g} "
        f"from the live model at batch {', '.join(map(str, check.batches))}"
    )
    return made.model_copy(update={"files": _files(staged)})  # the card with them


def _chosen(
    run: RunFolder, record: RunRecord, recipe: Recipe, part: Weights, head: str | None, working: Session
) -> tuple[Subject, Source, ProbeRecord | None]:
    """Read the part of a run that is asked for; a classifier comes with the record of its head."""
    from cfamc_cli.commands.probe import ensure_head
    from cfamc_cli.engine import export as engine
    from cfamc_cli.engine.heads.classifier import load_classifier, load_encoder

    model, device, probe = recipe.model, working.device, None
    loaded = load_encoder(run.checkpoints, recipe.model, device=working.device, talk=working.talk)
    match part:
        case "backbone":
            subject = engine.backbone_of(loaded.encoder, model, device=device)
        case "encoder":
            if loaded.backbone_only:
                message = f"run {run.id} was imported without pre_feature, so there is only a backbone to export"
                raise invalid(message, "ask for --part backbone")
            subject = engine.encoder_of(loaded.encoder, model, device=device)
        case "classifier":
            folder = ensure_head(run, loaded, working, probe=head)
            probe = load_record(folder / RECORD, ProbeRecord)
            classifier = load_classifier(loaded, probe, folder / HEAD, recipe)
            subject = engine.classifier_of(classifier, model, device=device)
        case _:
            assert_never(part)
    source = Source(
        **record.model_dump(include={"id", "name", "status", "seed", "created", "recipe_digest"}),
        checkpoint=loaded.path.name,
        encoder_digest=loaded.digest,
        head=None if probe is None else probe.id,
        head_digest=None if probe is None else probe.head_digest,
    )
    return subject, source, probe


def portable(recipe: Recipe) -> Recipe:
    """The recipe without the paths of the machine that trained it; whoever gets it learns nothing of that machine."""
    init = recipe.train.init
    data = recipe.data.model_copy(update={"root": None})
    train = recipe.train.model_copy(update={"init": None if init is None else Path(init).name})
    return recipe.model_copy(update={"data": data, "train": train})


def measured(
    run: RunFolder, source: Source, *, warn: Callable[[str], None]
) -> tuple[tuple[ProbeRecord, ...], tuple[AttackRecord, ...]]:
    """Collect the probes and attacks on exactly these weights; results of others are named and left out.

    A classifier has the results of its own head, an encoder or backbone those of every head on it.
    """
    probes, attacks = _read_all(run.probes, ProbeRecord, warn), _read_all(run.attacks, AttackRecord, warn)
    results: list[ProbeRecord | AttackRecord] = [*probes, *attacks]
    if stale := [item.id for item in results if item.encoder_digest != source.encoder_digest]:
        warn(f"left out of the model card, measured on other weights: {', '.join(stale)}")
    kept = []
    for probe in probes:
        own = probe.head != "finetune" if source.head is None else probe.id == source.head  # fine-tuned weights differ
        if own and probe.encoder_digest == source.encoder_digest:
            data = {key: value for key, value in probe.data.items() if key != "root"}
            kept.append(probe.model_copy(update={"data": data}))
    return tuple(kept), tuple(_of_heads(attacks, source, kept))


def _of_heads(results: Iterable[OfHead], source: Source, probes: Iterable[ProbeRecord]) -> list[OfHead]:
    """Those of exactly these heads on exactly this encoder."""
    heads = {(source.encoder_digest, probe.id, probe.head_digest) for probe in probes}
    return [item for item in results if (item.encoder_digest, item.probe, item.head_digest) in heads]


def _read_all(folder: Path, model: type[R], warn: Callable[[str], None]) -> list[R]:
    found = []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        try:
            found.append(load_record(path, model))
        except CfamcError as error:
            warn(f"left out of the model card: {error.message}")
    return found


# Metrics


def _metrics(run: RunFolder, wanted: Dashboard, staged: Path) -> MetricsRecord:
    record, lines = run.record(), read_metrics(run.metrics)
    if not lines:
        raise bad_data(f"run {run.id} has no metrics yet")
    match wanted:
        case "csv":
            for kind, rows in by_kind(lines).items():
                write_bytes(staged / f"{kind}.csv", comma_separated(rows))
        case "tensorboard":
            require_libraries("tensorboard", by="--metrics tensorboard", extra="tensorboard")
            with closing(EventFile(staged, began=record.created.timestamp())) as events:
                for line in lines:
                    events.write(line)
        case _:
            assert_never(wanted)
    written, count = _files(staged), len(lines)
    return MetricsRecord(cfamc=__version__, created=now(), format=wanted, files=written, run=run.id, records=count)


# Folders


def _files(folder: Path) -> tuple[Written, ...]:
    written = []
    for path in sorted(folder.iterdir()):
        with explained(path):
            written.append(Written(name=path.name, size=path.stat().st_size, sha256=_sha256(path)))
    return tuple(written)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_taken(target: Path, *, force: bool) -> None:
    """Refuse a folder that is in use; an empty one is free."""
    with explained(target):
        folder = target.is_dir() and not target.is_symlink()
        if not os.path.lexists(target) or (folder and not any(target.iterdir())):
            return
        earlier = folder and (target / EXPORT).is_file()
    if not earlier:
        raise invalid(f"{target} exists and is no export", "name another folder with --out")
    if not force:
        raise invalid(f"{target} exists", "--force replaces it; or name another with --out")
    if strange := _strange(target):
        message = f"{target} holds {strange}, which is not what the export there wrote"
        raise invalid(message, "take it out of there, or name another folder with --out")


def _strange(folder: Path) -> str | None:
    """What in the folder of an earlier export its export.json does not list with its digest; None for nothing."""
    try:
        listed = {(part.name, part.sha256) for part in load_record(folder / EXPORT, Exported).files}
    except CfamcError:
        return EXPORT
    for path in sorted(folder.iterdir()):
        if path.name == EXPORT:
            continue
        with explained(path):
            ours = path.is_file() and not path.is_symlink() and (path.name, _sha256(path)) in listed
        if not ours:
            return path.name
    return None


@contextmanager
def _staged(target: Path, *, force: bool) -> Iterator[Path]:
    """Fill a folder that takes its name when it is complete, in place of an earlier export only then."""
    with explained(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        for left in target.parent.glob(f".replaced-{glob.escape(target.name)}-*"):  # an export was killed
            if target.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(target)
    aside = target.parent / f".replaced-{target.name}-{secrets.token_hex(4)}"
    _refuse_taken(target, force=force)  # before any work is done
    try:
        with staged_folder(target) as staged:
            yield staged
            _refuse_taken(target, force=force)  # the work took its time
            if force and target.exists():
                target.rename(aside)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
