"""The model card of an export, in Markdown: what it is, how to load it, what was measured and what was not."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cfamc_cli.comparison.measured import headline, norm_of
from cfamc_cli.recipe import file as recipe_file
from cfamc_cli.recipe.plan import duration
from cfamc_cli.recipe.schema import DEPTHS, PADDING, Recipe, number
from cfamc_cli.report import terminal
from cfamc_cli.report.audit import audit_paragraph, lacks_audit
from cfamc_cli.report.beside import unlabelled as without_labels
from cfamc_cli.report.hub import REGISTERED_BY, front_matter, leading, results_of, timm_name
from cfamc_cli.report.sheets import markdown_table, markdown_text
from cfamc_cli.store.records import (
    AttackRecord,
    ExportRecord,
    MeasureRecord,
    ProbeRecord,
    RunRecord,
    UnlabelledRecord,
    failed_names,
    images_of,
    weights_file,
)

_ATTACK_COLUMNS = ("head", "threat model", "attack", "data", "n", "clean", "robust", "checks")
_MEASURE_COLUMNS = ("head", "measure", "data", "n", "clean", "result", "checks")
_PROBE_COLUMNS = ("probe", "head", "features", "data", "n", "accuracy")
_LIBRARY_WIDTH = 64  # the one width of torchvision's and timm's ResNets


def card(
    made: ExportRecord,
    recipe: Recipe,
    run: RunRecord,
    *,
    probes: Sequence[ProbeRecord],
    attacks: Sequence[AttackRecord],
    measures: Sequence[MeasureRecord] = (),
    unlabelled: Sequence[UnlabelledRecord] = (),
) -> str:
    """The model card, in Markdown: what this is, how to load it, what was measured and what was not.

    Text of recipes and data sets is escaped, so that no reader takes it for markup.

    Args:
        made: The export, of whose files the card tells the digests.
        recipe: What the run was made by.
        run: Its record.
        probes: What was measured on these weights.
        attacks: Likewise.
        measures: Likewise.
        unlabelled: Likewise, of the encoder.
    """
    environment = terminal.templates()
    environment.filters |= {"plain": markdown_text, "duration": duration}
    read = [probe.features for probe in probes if probe.id == made.source.head]
    lead, timm = leading(attacks), timm_name(made, recipe.model)
    written = [(file.name, f"{file.size:,}", file.sha256) for file in made.files]
    sheet = without_labels(unlabelled)
    toml = "\n".join(terminal.clean(line) for line in recipe_file.to_toml(recipe).splitlines())
    return environment.get_template("card.md").render(
        made=made,
        recipe=recipe,
        run=run,
        front=front_matter(made, recipe if run.imported is None else None, timm, results_of(probes, lead)),
        file=weights_file(made.part, made.format),
        digest=next(file.sha256 for file in made.files if file.name == weights_file(made.part, made.format)),
        timm=timm,
        registered_by=REGISTERED_BY if timm is not None and timm.endswith("_cifar") else "",
        library_width=_LIBRARY_WIDTH,
        padding=PADDING[recipe.model.stem],
        depths=DEPTHS.get(recipe.model.backbone, ()),
        backbone_dim="features" if recipe.model.timm else recipe.model.feature_dim,  # the net itself tells it
        pre_feature=made.part == "encoder" or "pre_feature" in read,
        lead=markdown_table(_ATTACK_COLUMNS, map(_attack_row, lead)) if lead else "",
        audited=_audited(lead),
        above="pre_feature" in [probe.features for probe in probes],
        finetuned="finetune" in [probe.head for probe in probes],
        probes=markdown_table(_PROBE_COLUMNS, map(_probe_row, probes)) if probes else "",
        attacks=markdown_table(_ATTACK_COLUMNS, map(_attack_row, attacks)) if attacks else "",
        measures=markdown_table(_MEASURE_COLUMNS, map(_measure_row, measures)) if measures else "",
        unlabelled=markdown_table(sheet.columns, sheet.rows) if unlabelled else "",
        notes=[
            *dict.fromkeys(note for attack in attacks for note in attack.notes),
            *(audit_paragraph(attack) for attack in attacks if not lacks_audit(attack)),
        ],
        gaps=not_measured(probes, attacks, measures),
        files=markdown_table(("file", "bytes", "SHA-256"), written),
        toml=_fenced(toml),
    )


def _audited(lead: Sequence[AttackRecord]) -> str:
    """How many of the leading results had the full audit, in a sentence."""
    made, of = sum(not lacks_audit(attack) for attack in lead), len(lead)
    if made == of:
        return "The full audit, which attacks again in other ways, was made and found nothing."
    return (
        f"The full audit was made of {made} of {of}: `cfamc attack --audit` makes it."
        if made
        else ("No full audit was made: `cfamc attack --audit` makes one.")
    )


def _probe_row(probe: ProbeRecord) -> tuple[str, ...]:
    data, accuracy = f"{probe.test.dataset} {images_of(probe.test.split)}", probe.test_accuracy
    return (probe.id, probe.head, probe.features, data, f"{accuracy.n:,}", terminal.interval(accuracy))


def _attack_row(attack: AttackRecord) -> tuple[str, ...]:
    threat = attack.threat
    where = "every pixel of the image" if threat.space == "image" else "every crop by itself"
    named = {key: value for key, value in attack.settings.items() if key not in ("name", "eps", "norm", "space")}
    settings = ", ".join(f"{key} {value}" for key, value in named.items() if isinstance(value, str | int | float))
    failed, passed = failed_names(attack.flags), sum(flag.verdict == "passed" for flag in attack.flags)
    audited = "" if lacks_audit(attack) else ", audited"
    return (
        attack.probe,
        f"{threat.norm} {threat.eps}, {where}",
        f"{attack.attack}: {settings}" if settings else attack.attack,
        f"{attack.data.dataset} {images_of(attack.data.split)}",
        f"{attack.robust.n:,}",
        terminal.interval(attack.clean),
        terminal.interval(attack.robust),
        f"failed: {', '.join(failed)}" if failed else f"{passed} passed{audited}",
    )


def _measure_row(measure: MeasureRecord) -> tuple[str, ...]:
    told, failed = headline(measure), failed_names(measure.flags)
    where = f"{told.threat.norm} {told.threat.eps}" if told.threat else "the mean of all"
    share = f"{terminal.interval(told.accuracy)} at {where}; " if told.accuracy else ""
    settings = ", ".join(f"{key} {value}" for key, value in measure.settings.items() if key not in ("name", "norm"))
    return (
        measure.probe,
        f"{measure.measure}: {settings}",
        f"{measure.data.dataset} {images_of(measure.data.split)}",
        f"{measure.clean.n:,}",
        terminal.interval(measure.clean),
        f"{share}{told.words}",
        f"failed: {', '.join(failed)}" if failed else "passed",
    )


def not_measured(
    probes: Sequence[ProbeRecord], attacks: Sequence[AttackRecord], measures: Sequence[MeasureRecord] = ()
) -> list[str]:
    """What a reader might take for granted and nobody looked at."""
    gaps = [] if probes else ["Accuracy on clean images."]
    if not attacks:
        gaps.append("Accuracy under any attack: nothing is known about robustness.")
    else:
        whole = [attack for attack in attacks if attack.threat.space == "image" and attack.source is None]
        if not whole:
            beside = "an attack on single crops, or with examples of another network, says nothing about it"
            gaps.append(f"Accuracy under an attack on whole images that knows the network; {beside}.")
        if ("autoattack", "standard") not in [(attack.attack, attack.settings.get("version")) for attack in whole]:
            gaps.append("The standard AutoAttack: a stronger attack may find lower accuracies than those above.")
        by_size = sorted((attack.threat for attack in attacks), key=lambda threat: number(threat.eps))
        sizes = {threat.norm: f"{threat.norm} {threat.eps}" for threat in by_size}  # the largest of each norm
        found = {norm_of(measure) for measure in measures if measure.measure == "smallest"}
        others = [norm for norm in ("linf", "l2") if norm not in sizes and norm not in found]
        if others:
            gaps.append(f"Perturbations in {' and '.join(others)}.")
        largest = " and ".join(map(markdown_text, sizes.values()))
        gaps.append(f"Perturbations larger than {largest}, unrestricted ones and patches.")
        behind = [attack.id for attack in attacks if any(flag.verdict == "skipped" for flag in attack.flags)]
        if behind:
            gaps.append(f"Some of the checks of {', '.join(map(markdown_text, behind))}.")
    corrupted = any(measure.measure == "corruptions" for measure in measures)
    gaps += [
        f"Natural shifts: {'' if corrupted else 'noise, blur, weather, compression, '}other cameras, other data sets.",
        "Calibration, fairness between groups of people or things, and images of no known class.",
        "Other precisions than float32, and quantised or pruned copies.",
    ]
    return gaps


def _fenced(text: str) -> str:
    """A block of TOML that no line of the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}toml\n{text}\n{fence}"
