"""`cfamc export`: weights that load without cfamc, checked before they are handed over, and metrics for dashboards.

An export is a folder that appears whole: the files, `export.json` for programs and `README.md`, the model card.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never

from pydantic import AwareDatetime

from cfamc_cli import __version__, recipe_file, render
from cfamc_cli.commands.pretrain import Options
from cfamc_cli.commands.signals import Interrupted, catch_signals
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.files import explained, read_jsonl, staged_folder, write_bytes, write_text
from cfamc_cli.recipe import Recipe, number
from cfamc_cli.records import (
    AttackRecord,
    Count,
    DataUsed,
    Hex,
    Part,
    ProbeRecord,
    R,
    Record,
    RunRecord,
    load_record,
    now,
    save_record,
)
from cfamc_cli.store import LATEST, RunFolder, default_store, find_run, slug

if TYPE_CHECKING:
    from cfamc_cli.engine.data import ImageSet
    from cfamc_cli.engine.export import Agreement, Subject

Weights = Literal["backbone", "encoder", "classifier"]
Format = Literal["safetensors", "pt2", "onnx"]
Dashboard = Literal["csv", "tensorboard"]

RECORD, CARD = "export.json", "README.md"
_LIBRARY_WIDTH = 64  # the one width of torchvision's and timm's ResNets


class Written(Part):
    """One file of an export."""

    name: str
    size: Count
    sha256: Hex


class InputSpec(Part):
    """What goes in: float32, NCHW, RGB, values in `range`, with no further normalisation; any batch size."""

    name: str
    channels: Literal["RGB"]
    height: Count
    width: Count
    dtype: Literal["float32"]
    range: tuple[float, float]


class OutputSpec(Part):
    """What comes out: (batch, dim), float32."""

    name: Literal["features", "logits"]
    dim: Count


class Source(Part):
    """The run that the weights are from."""

    id: str
    name: str
    status: str
    seed: int
    created: AwareDatetime
    checkpoint: str
    recipe_digest: Hex
    encoder_digest: Hex
    head: str | None
    head_digest: Hex | None


class CheckRecord(Part):
    """How the files compare with the live model, after they were read back."""

    reader: str
    batches: tuple[Count, ...]
    rtol: float
    atol: float
    largest_difference: float
    data: DataUsed


class ExportRecord(Record):
    """export.json: weights that were handed over.

    Attributes:
        classes: Names of the logits in order; None where features are handed over.
        recipe: Every setting, without the paths of the machine that trained.
        licence: What is known of the terms of use of the data.
        probes: Measured on these weights.
        attacks: Likewise.
    """

    cfamc: str
    created: AwareDatetime
    part: Weights
    format: Format
    files: tuple[Written, ...]
    input: InputSpec
    output: OutputSpec
    classes: tuple[str, ...] | None
    source: Source
    recipe: dict[str, Any]
    data: DataUsed | None
    licence: str
    check: CheckRecord
    probes: tuple[ProbeRecord, ...]
    attacks: tuple[AttackRecord, ...]


class MetricsRecord(Record):
    """export.json: the metrics of a run in a form that dashboards read."""

    cfamc: str
    created: AwareDatetime
    format: Dashboard
    files: tuple[Written, ...]
    run: str
    records: Count


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
    store = default_store(options.runs)
    try:
        with catch_signals():
            if metrics is not None:
                run = find_run(store, reference or LATEST, accept=lambda run: run.metrics.is_file())
                target = out or Path(f"{run.id}-{metrics}")
                record: Record = _export_metrics(run, metrics, target, force=force)
            else:
                run = find_run(store, reference or LATEST, accept=lambda run: any(run.checkpoints.glob("step-*")))
                chosen, form = part or "backbone", wanted or "safetensors"
                target = out or Path(f"{run.id}-{chosen}-{form}")
                record = _export_weights(run, chosen, form, head, target, force=force, options=options)
    except Interrupted as stop:
        code = ExitCode(128 + stop.signal)
        raise CfamcError("interrupted; nothing was handed over", exit_code=code) from stop
    if options.as_json:
        render.print_json({"path": str(target.absolute()), **record.model_dump(mode="json")})
    else:
        render.write_out(f"{render.clean(target)}\n")


def _refuse_idle(*, part: Weights | None, wanted: Format | None, head: str | None, metrics: Dashboard | None) -> None:
    """Refuse options that would have no effect."""
    given = {"--part": part, "--format": wanted, "--head": head}
    if metrics is not None and (idle := [name for name, value in given.items() if value is not None]):
        raise CfamcError(
            f"--metrics hands over no weights, so {', '.join(idle)} would have no effect",
            hint="export weights and metrics one after the other",
            exit_code=ExitCode.INVALID,
        )
    if head is not None and part != "classifier":
        raise CfamcError(
            f"--head has no effect on --part {part or 'backbone'}",
            hint="ask for --part classifier",
            exit_code=ExitCode.INVALID,
        )


# Weights


@dataclass(frozen=True)
class _Choice:
    """What is exported, with what is known about it."""

    subject: Subject
    source: Source
    probe: ProbeRecord | None


def _export_weights(
    run: RunFolder, part: Weights, wanted: Format, head: str | None, target: Path, *, force: bool, options: Options
) -> ExportRecord:
    _refuse_taken(target, force=force)
    record = load_record(run.run_json, RunRecord)
    from cfamc_cli.engine import data as datasets
    from cfamc_cli.engine import export as engine
    from cfamc_cli.engine.device import out_of_memory
    from cfamc_cli.engine.heads import load_recipe

    engine.require(wanted)
    console = render.talk()
    with out_of_memory(), render.TerminalSink(quiet=options.quiet, metrics=None, timing=None) as sink:
        recipe = load_recipe(run)
        if record.status != "finished":
            sink.warning(f"run {run.id} is not finished ({record.status}); its newest checkpoint is exported")
        chosen = _choose(run, record, recipe, part, head, options=options, sink=sink)
        trained_on = datasets.load(recipe.data, "train", seed=recipe.seed, cache=_cache(), sink=sink)
        images, licence = trained_on, trained_on.licence
        if chosen.probe is not None:
            from cfamc_cli.commands.probe import load_test_images

            images = load_test_images(run, chosen.probe, sink=sink)  # a head may read other data than the encoder
            if images.dataset != trained_on.dataset:
                both = (trained_on, images)
                licence = "; ".join(f"{part.dataset}: {part.licence or 'not known'}" for part in both)
        results = measured(run, chosen.source, part, warn=sink.warning)
        sample = engine.some_images(images.images)
        with _staged(target, force=force) as staged:
            path = staged / f"{part}.{wanted}"
            agreement = engine.write(chosen.subject, path, sample, wanted=wanted)
            made = ExportRecord(
                cfamc=__version__,
                created=now(),
                part=part,
                format=wanted,
                files=_files(staged),
                input=InputSpec(
                    name=engine.INPUT,
                    channels="RGB",
                    height=sample.shape[2],
                    width=sample.shape[3],
                    dtype="float32",
                    range=(0.0, 1.0),
                ),
                output=OutputSpec(name="logits" if part == "classifier" else "features", dim=chosen.subject.output_dim),
                classes=None if chosen.probe is None else tuple(entry.name for entry in chosen.probe.classes),
                source=chosen.source,
                recipe=portable(recipe).resolved(),
                data=record.data,
                licence=licence,
                check=_check(agreement, images, rtol=engine.RTOL, atol=engine.ATOL),
                probes=results.probes,
                attacks=results.attacks,
            )
            save_record(staged / RECORD, made)
            write_text(staged / CARD, card(made, portable(recipe), record))
    if not options.quiet:
        console.say(
            f"{path.name}: read back by {agreement.reader}, differs by at most "
            f"{agreement.largest_difference:.2g} from the live model at batch "
            f"{', '.join(map(str, agreement.batches))}"
        )
    return made


def _choose(
    run: RunFolder,
    record: RunRecord,
    recipe: Recipe,
    part: Weights,
    head: str | None,
    *,
    options: Options,
    sink: render.TerminalSink,
) -> _Choice:
    """Read the part of a run that is asked for."""
    from cfamc_cli.engine import export as engine
    from cfamc_cli.engine.device import pick_device
    from cfamc_cli.engine.heads import load_classifier, load_encoder

    device, model, probe = pick_device(options.device), recipe.model, None
    folder = None
    if part == "classifier":
        from cfamc_cli.commands.probe import ensure_head

        folder = ensure_head(run, options=options, probe=head)
        probe = load_record(folder / "record.json", ProbeRecord)
    loaded = load_encoder(run.checkpoints, model, device=device)
    for warning in loaded.warnings:
        sink.warning(warning)
    match part:
        case "backbone":
            subject = engine.backbone_of(loaded.encoder, model, device=device)
        case "encoder":
            if loaded.backbone_only:
                raise CfamcError(
                    f"run {run.id} was imported without pre_feature, so there is only a backbone to export",
                    hint="ask for --part backbone",
                    exit_code=ExitCode.INVALID,
                )
            subject = engine.encoder_of(loaded.encoder, model, device=device)
        case "classifier":
            assert folder is not None, "a classifier has a probe"
            subject = engine.classifier_of(load_classifier(run, folder, device=device), model, device=device)
        case _:
            assert_never(part)
    source = Source(
        id=record.id,
        name=record.name,
        status=record.status,
        seed=record.seed,
        created=record.created,
        checkpoint=loaded.path.name,
        recipe_digest=record.recipe_digest,
        encoder_digest=loaded.digest,
        head=None if probe is None else probe.id,
        head_digest=None if probe is None else probe.head_digest,
    )
    return _Choice(subject, source, probe)


def _check(agreement: Agreement, images: ImageSet, *, rtol: float, atol: float) -> CheckRecord:
    return CheckRecord(
        reader=agreement.reader,
        batches=agreement.batches,
        rtol=rtol,
        atol=atol,
        largest_difference=agreement.largest_difference,
        data=DataUsed(
            dataset=images.dataset,
            split=images.split,
            n=min(sum(agreement.batches), len(images)),
            fingerprint=images.fingerprint,
        ),
    )


def portable(recipe: Recipe) -> Recipe:
    """The recipe without the paths of the machine that trained it; whoever gets it learns nothing of that machine."""
    init = recipe.train.init
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"root": None}),
            "train": recipe.train.model_copy(update={"init": None if init is None else Path(init).name}),
        }
    )


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("cfamc"))


def _files(folder: Path) -> tuple[Written, ...]:
    written = []
    for path in sorted(folder.iterdir()):
        with explained(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        written.append(Written(name=path.name, size=path.stat().st_size, sha256=digest))
    return tuple(written)


# Folders


def _refuse_taken(target: Path, *, force: bool) -> None:
    """Refuse a folder that is in use, before any work is done; an empty one is free."""
    with explained(target):
        if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
            return
        replaceable = target.is_dir() and not target.is_symlink() and (target / RECORD).is_file()
    if not replaceable:
        raise CfamcError(
            f"{target} exists and is no export", hint="name another folder with --out", exit_code=ExitCode.INVALID
        )
    if not force:
        raise CfamcError(
            f"{target} exists", hint="--force replaces it; or name another with --out", exit_code=ExitCode.INVALID
        )


@contextmanager
def _staged(target: Path, *, force: bool) -> Iterator[Path]:
    """Fill a folder that takes its name when it is complete, in place of an earlier export only then."""
    _refuse_taken(target, force=force)
    with explained(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".replaced-{secrets.token_hex(4)}"
    try:
        with staged_folder(target) as staged:
            yield staged
            if force and target.exists():
                target.rename(aside)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


# What was measured


@dataclass(frozen=True)
class Results:
    """Probes and attacks on the weights that are exported."""

    probes: tuple[ProbeRecord, ...]
    attacks: tuple[AttackRecord, ...]


def measured(run: RunFolder, source: Source, part: Weights, *, warn: Callable[[str], None]) -> Results:
    """Collect what was measured on exactly these weights; results of others are named and left out.

    Args:
        run: The run.
        source: What is exported.
        part: A classifier has the results of its own head, an encoder or backbone those of every head on it.
        warn: Told what was left out.
    """
    probes = [_without_paths(probe) for probe in _read_all(run.probes, ProbeRecord, warn)]
    attacks = list(_read_all(run.attacks, AttackRecord, warn))
    heads = {(probe.id, probe.head_digest) for probe in probes if _speaks_of(probe, source, part)}
    kept_probes = tuple(probe for probe in probes if (probe.id, probe.head_digest) in heads)
    kept_attacks = tuple(
        attack
        for attack in attacks
        if attack.encoder_digest == source.encoder_digest and (attack.probe, attack.head_digest) in heads
    )
    digests = {item.id: item.encoder_digest for item in probes} | {item.id: item.encoder_digest for item in attacks}
    stale = [name for name, digest in digests.items() if digest != source.encoder_digest]
    if stale:
        warn(f"left out of the model card, measured on other weights: {', '.join(stale)}")
    return Results(kept_probes, kept_attacks)


def _without_paths(probe: ProbeRecord) -> ProbeRecord:
    return probe.model_copy(update={"data": {key: value for key, value in probe.data.items() if key != "root"}})


def _speaks_of(probe: ProbeRecord, source: Source, part: Weights) -> bool:
    if probe.encoder_digest != source.encoder_digest:
        return False
    match part:
        case "backbone" | "encoder":
            return probe.head != "finetune"  # which changed the weights
        case "classifier":
            return probe.id == source.head
        case _:
            assert_never(part)


def _read_all(folder: Path, model: type[R], warn: Callable[[str], None]) -> Iterator[R]:
    paths = sorted(folder.glob("*/record.json")) if folder.is_dir() else []
    for path in paths:
        try:
            yield load_record(path, model)
        except CfamcError as error:
            warn(f"left out of the model card: {error.message}")


# The model card


def card(made: ExportRecord, recipe: Recipe, run: RunRecord) -> str:
    """The model card, in Markdown: what this is, how to load it, what was measured and what was not.

    Text of recipes and data sets is escaped, so that no reader takes it for markup.
    """
    sections = [
        f"# {_plain(made.source.name)}: {made.part}\n\n{_what(made, recipe)}",
        f"## Loading\n\n{loading(made, recipe)}",
        f"## Input and output\n\n{_input_output(made)}",
        f"## Measured\n\n{_measured_section(made)}",
        f"## Not measured\n\n{_bullets(not_measured(made))}",
        f"## Check of this file\n\n{_check_section(made)}",
        f"## Training\n\n{_training(made, recipe, run)}",
    ]
    return "\n\n".join(sections) + "\n"


def _what(made: ExportRecord, recipe: Recipe) -> str:
    model, adversary = recipe.model, recipe.adversary
    attack = "" if adversary.name == "none" else f" and {adversary.name} adversarial training at eps {adversary.eps}"
    stacked = {
        "backbone": "without a classifier",
        "encoder": "with the `pre_feature` layer that linear heads read",
        "classifier": f"with the head {_plain(made.source.head or '')}",
    }[made.part]
    labels = "with labels" if recipe.objective.name == "supcon" else "without labels"
    return (
        f"A {model.backbone} of width {model.width} with the {model.stem} stem, {stacked}. Pretrained {labels} on "
        f"{_plain(recipe.data.dataset)} with the {recipe.objective.name} objective{attack}, by cfamc {made.cfamc}."
    )


def loading(made: ExportRecord, recipe: Recipe) -> str:
    """How to load the file, as fenced Python."""
    name, value = f"{made.part}.{made.format}", made.output.name
    match made.format:
        case "pt2":
            code = [
                "import torch",
                "",
                f'net = torch.export.load("{name}").module()',
                f"{value} = net(images)",
            ]
        case "onnx":
            code = [
                "import onnxruntime",
                "",
                f'session = onnxruntime.InferenceSession("{name}")',
                f'({value},) = session.run(None, {{"{made.input.name}": images}})  # a float32 numpy array',
            ]
        case "safetensors":
            code = _safetensors_code(made, recipe, name)
        case _:
            assert_never(made.format)
    return _fence("\n".join(code), "python")


def _safetensors_code(made: ExportRecord, recipe: Recipe, name: str) -> list[str]:
    model = recipe.model
    if model.width == _LIBRARY_WIDTH:
        imports = ["import torch, torchvision"]
        net = [
            f"net = torchvision.models.{model.backbone}()  # timm.create_model({model.backbone!r}) takes them as well"
        ]
        if model.stem == "cifar":
            net.append("net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()")
        net.append("net.fc = torch.nn.Identity()")
    else:
        imports = ["import torch", "from cfamc_cli.engine.models import ResNet  # no other library has this width"]
        net = [f"net = ResNet({model.backbone!r}, stem={model.stem!r}, width={model.width})"]
    imports.append("from safetensors.torch import load_file")
    if made.part == "backbone":
        return [*imports, "", *net, f'net.load_state_dict(load_file("{name}"))', "features = net.eval()(images)"]
    dim = model.width * (32 if model.backbone == "resnet50" else 8)
    parts, reads, call = ['"backbone": net'], dim, 'parts["backbone"](images)'
    if made.part == "encoder" or _reads_pre_feature(made):
        layers = [f"Linear({dim}, {model.hidden_dim})", f"BatchNorm1d({model.hidden_dim})", "ReLU()"]
        parts.append(f'"pre_feature": torch.nn.Sequential({", ".join(f"torch.nn.{layer}" for layer in layers)})')
        reads, call = model.hidden_dim, f'parts["pre_feature"]({call})'
    if made.part == "classifier":
        parts.append(f'"head": torch.nn.Linear({reads}, {made.output.dim})')
        call = f'parts["head"]({call})'
    return [
        *imports,
        "",
        *net,
        "parts = torch.nn.ModuleDict({",
        *(f"    {part}," for part in parts),
        "})",
        f'parts.load_state_dict(load_file("{name}"))',
        "parts.eval()",
        f"{made.output.name} = {call}",
    ]


def _reads_pre_feature(made: ExportRecord) -> bool:
    return any(probe.id == made.source.head and probe.features == "pre_feature" for probe in made.probes)


def _input_output(made: ExportRecord) -> str:
    size = f"{made.input.height} x {made.input.width}"
    fixed = (
        "the size that heads were fitted to; the network takes others as well"
        if made.format == "safetensors"
        else "the only size that this file takes"
    )
    lines = [
        f"`{made.input.name}`: float32, (batch, 3, {made.input.height}, {made.input.width}), RGB, values in [0, 1], "
        "any batch size. No mean is subtracted and no deviation divided by.",
        f"{size} pixels is {fixed}.",
        f"`{made.output.name}`: float32, (batch, {made.output.dim}).",
    ]
    if made.classes is not None:
        names = ", ".join(f"{index} {_plain(name)}" for index, name in enumerate(made.classes))
        lines.append(f"Classes: {names}.")
    return _bullets(lines)


def _measured_section(made: ExportRecord) -> str:
    if not made.probes and not made.attacks:
        return "Nothing was measured on these weights."
    lines = ["Accuracies are percent with Wilson 95 % intervals, of the model in PyTorch that this file was made from."]
    if made.part == "backbone" and any(probe.features == "pre_feature" for probe in made.probes):
        lines.append("Heads on `pre_feature` read a layer above the backbone that is not part of this file.")
    if made.part == "classifier" and any(probe.head == "finetune" for probe in made.probes):
        lines.append("The whole network was trained with labels after the pretraining.")
    if made.probes:
        rows: list[tuple[str, ...]] = [
            (
                probe.id,
                probe.head,
                probe.features,
                f"{probe.test.dataset} {probe.test.split}",
                f"{probe.test_accuracy.n:,}",
                render.interval(probe.test_accuracy),
            )
            for probe in made.probes
        ]
        lines.append("Clean images:\n\n" + _table(("probe", "head", "features", "data", "n", "accuracy"), rows))
    if made.attacks:
        rows = [_attack_row(attack) for attack in made.attacks]
        columns = ("head", "threat model", "attack", "data", "n", "clean", "robust", "checks")
        lines.append("Under attack, every example found against these very weights:\n\n" + _table(columns, rows))
    notes = dict.fromkeys(note for attack in made.attacks for note in attack.notes)
    if notes:
        lines.append(_bullets(map(_plain, notes)))
    return "\n\n".join(lines)


def _attack_row(attack: AttackRecord) -> tuple[str, ...]:
    threat = attack.threat
    where = "every pixel of the image" if threat.space == "image" else "every crop by itself"
    named = {key: value for key, value in attack.settings.items() if key not in ("name", "eps", "norm", "space")}
    settings = ", ".join(f"{key} {value}" for key, value in named.items() if isinstance(value, str | int | float))
    failed = [flag.name for flag in attack.flags if flag.verdict == "failed"]
    passed = sum(flag.verdict == "passed" for flag in attack.flags)
    return (
        attack.probe,
        f"{threat.norm} {threat.eps}, {where}",
        f"{attack.attack}: {settings}" if settings else attack.attack,
        f"{attack.data.dataset} {attack.data.split}",
        f"{attack.robust.n:,}",
        render.interval(attack.clean),
        render.interval(attack.robust),
        f"failed: {', '.join(failed)}" if failed else f"{passed} passed",
    )


def not_measured(made: ExportRecord) -> list[str]:
    """What a reader might take for granted and nobody looked at."""
    gaps = []
    if not made.probes:
        gaps.append("Accuracy on clean images.")
    image_space = [attack for attack in made.attacks if attack.threat.space == "image"]
    standard = [a for a in image_space if a.attack == "autoattack" and a.settings.get("version") == "standard"]
    if not made.attacks:
        gaps.append("Accuracy under any attack: nothing is known about robustness.")
    else:
        if not image_space:
            gaps.append("Accuracy under an attack on whole images; an attack on single crops says nothing about it.")
        if not standard:
            gaps.append("The standard AutoAttack: a stronger attack may find lower accuracies than those above.")
        norms = sorted({attack.threat.norm for attack in made.attacks})
        by_size = sorted((attack.threat for attack in made.attacks), key=lambda threat: number(threat.eps))
        sizes = {threat.norm: f"{threat.norm} {threat.eps}" for threat in by_size}.values()  # the largest of each norm
        others = [norm for norm in ("linf", "l2") if norm not in norms]
        if others:
            gaps.append(f"Perturbations in {' and '.join(others)}.")
        gaps.append(f"Perturbations larger than {' and '.join(map(_plain, sizes))}, unrestricted ones and patches.")
        behind = [attack.id for attack in made.attacks if any(flag.verdict == "skipped" for flag in attack.flags)]
        if behind:
            gaps.append(f"Some of the checks of {', '.join(map(_plain, behind))}.")
    gaps += [
        "Natural shifts: noise, blur, weather, compression, other cameras, other data sets.",
        "Calibration, fairness between groups of people or things, and images of no known class.",
        "Other precisions than float32, and quantised or pruned copies.",
    ]
    return gaps


def _check_section(made: ExportRecord) -> str:
    check = made.check
    sizes = ", ".join(map(str, check.batches[:-1])) + f" and {check.batches[-1]}"
    classes = ", and each predicted class is the same" if made.output.name == "logits" else ""
    rows = [(written.name, f"{written.size:,}", written.sha256) for written in made.files]
    return (
        f"Before it was handed over, the file was read back by {_plain(check.reader)} and compared with the live model "
        f"at batch {sizes} on {check.data.n} images of {_plain(check.data.dataset)} {check.data.split}: the largest "
        f"difference was {check.largest_difference:.2g}{classes} (allowed: {check.rtol:g} relative and {check.atol:g} "
        f"absolute).\n\n" + _table(("file", "bytes", "SHA-256"), rows)
    )


def _training(made: ExportRecord, recipe: Recipe, run: RunRecord) -> str:
    data, where = made.data, run.environment
    used = "unknown" if data is None else f"{data.n:,} images of {_plain(data.dataset)} {data.split}"
    lines = [
        f"Run {_plain(made.source.id)}, {made.source.status}, {made.source.checkpoint}, seed {made.source.seed}; "
        f"{run.progress.step:,} of {run.progress.total:,} weight updates, {run.totals.view_passes:,} view passes.",
        f"Data: {used}; fingerprint {'unknown' if data is None else _plain(data.fingerprint)}.",
        f"Licence of the data: {_plain(made.licence) or 'not known to cfamc; ask who published it'}.",
        f"Time: {render.duration(run.wall_seconds)} on {_plain(where.device)} with torch {_plain(where.torch)}.",
        f"Recipe digest {made.source.recipe_digest}, encoder digest {made.source.encoder_digest}"
        + (f", head digest {made.source.head_digest}." if made.source.head_digest else "."),
    ]
    if run.imported is not None:
        lines.append("The weights were imported; the recipe describes their shape, not their training.")
    text = "\n".join(render.clean(line) for line in recipe_file.to_toml(recipe).splitlines())
    return f"{_bullets(lines)}\n\n{_fence(text, 'toml')}"


def _plain(text: object) -> str:
    """Text that Markdown and HTML leave alone."""
    return re.sub(r"([\\`*_|\[\]<>&#~$!])", r"\\\1", render.clean(text))


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fence(text: str, language: str) -> str:
    """A fenced block that no line of the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


# Metrics


def _export_metrics(run: RunFolder, wanted: Dashboard, target: Path, *, force: bool) -> MetricsRecord:
    record = load_record(run.run_json, RunRecord)
    lines = read_jsonl(run.metrics).records
    if not lines:
        raise CfamcError(f"run {run.id} has no metrics yet", exit_code=ExitCode.BAD_DATA)
    match wanted:
        case "csv":
            contents = {f"{kind}.csv": comma_separated(rows) for kind, rows in _by_kind(lines).items()}
        case "tensorboard":
            began = record.created.timestamp()
            contents = {f"events.out.tfevents.{int(began)}.cfamc": events(lines, began=began)}
        case _:
            assert_never(wanted)
    with _staged(target, force=force) as staged:
        for name, data in contents.items():
            write_bytes(staged / name, data)
        made = MetricsRecord(
            cfamc=__version__, created=now(), format=wanted, files=_files(staged), run=run.id, records=len(lines)
        )
        save_record(staged / RECORD, made)
    return made


def _by_kind(lines: Iterable[Mapping[str, object]]) -> dict[str, list[dict[str, object]]]:
    """The records under the name of their kind, each with the numbers that JSON could not hold put back."""
    kinds: dict[str, list[dict[str, object]]] = {}
    for line in lines:
        row = {key: value for key, value in line.items() if key not in ("kind", "nonfinite")}
        nonfinite = line.get("nonfinite")
        if isinstance(nonfinite, dict):
            row |= {key: value for key, value in nonfinite.items() if value in ("nan", "inf", "-inf")}
        kinds.setdefault(slug(str(line.get("kind", "metrics"))), []).append(row)
    return kinds


def comma_separated(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Records as CSV, a column for each key; text that a spreadsheet would run is quoted for it."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(column) for column in columns])
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case "-inf":  # a number that JSON could not hold
            return value
        case str():
            shown = render.clean(value)
            return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
        case _:
            return json.dumps(value)


def events(lines: Iterable[Mapping[str, object]], *, began: float) -> bytes:
    """Records as a TensorBoard event file: a scalar kind/key for each number, at the step of its record.

    Args:
        lines: Records of metrics.jsonl.
        began: Seconds since 1970 that every event bears, for the records hold no times.

    Raises:
        CfamcError: Exit 2; tensorboard is missing.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise CfamcError(
            "--metrics tensorboard needs tensorboard",
            hint="pip install 'cfamc[tensorboard]'",
            exit_code=ExitCode.INVALID,
        ) from error
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
    for kind, rows in _by_kind(lines).items():
        for row in rows:
            step = row.get("step")
            values = {key: _scalar(value) for key, value in row.items() if key != "step"}
            summary = Summary(
                value=[
                    Summary.Value(tag=f"{kind}/{render.clean(key)}", simple_value=value)
                    for key, value in values.items()
                    if value is not None
                ]
            )
            place = step if isinstance(step, int) else 0
            writer.write(Event(wall_time=began, step=place, summary=summary).SerializeToString())
    writer.flush()
    return buffer.getvalue()


def _scalar(value: object) -> float | None:
    if isinstance(value, bool | int | float):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") and isinstance(value, str) else None
