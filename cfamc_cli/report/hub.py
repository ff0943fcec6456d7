"""What makes an export a model repository of the Hugging Face Hub: its leading results, front matter, and config.json.

The front matter is YAML whose values are written as JSON, which is YAML too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from cfamc_cli.comparison.tables import STRONGEST
from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.recipe.schema import Model, Recipe, number
from cfamc_cli.report.audit import lacks_audit
from cfamc_cli.report.terminal import clean
from cfamc_cli.store.records import (
    Accuracy,
    AttackRecord,
    DataUsed,
    ExportedAttack,
    ExportedProbe,
    ExportRecord,
    ProbeRecord,
    failed_names,
    failures,
    images_of,
)

CONFIG = "config.json"
REGISTERED_BY = "cfamc_cli.engine.timm_cifar"  # tells timm the names that end in _cifar
_WIDTH = 64  # of timm's own ResNets
_LISTED = 11  # heads, and attacks, that export.json has at most: it is read over a network, the card by people


def leading(attacks: Iterable[AttackRecord]) -> list[AttackRecord]:
    """The results that stand first: of the best head, one for each norm and eps; none where a check failed.

    They are attacks on whole images that know the network. For each head and size the most trustworthy one is taken:
    an audited one, AutoAttack, of most images; of equals the one that leaves least. Of heads the best is one whose
    results can be trusted as far, and that stays right most often.
    """

    def trust(attack: AttackRecord) -> tuple[bool, bool, int]:
        return not lacks_audit(attack), attack.attack == STRONGEST, attack.data.n

    heads: dict[str, dict[tuple[str, float], AttackRecord]] = {}
    for attack in attacks:
        if attack.threat.space == "image" and attack.source is None and not failures(attack.flags):
            own, size = heads.setdefault(attack.probe, {}), (attack.threat.norm, number(attack.threat.eps))
            best = own.get(size)
            if best is None or (trust(attack), -attack.robust.value) > (trust(best), -best.robust.value):
                own[size] = attack
    if not heads:
        return []
    chosen = max(heads.values(), key=lambda own: max((trust(attack), attack.robust.value) for attack in own.values()))
    return [chosen[size] for size in sorted(chosen, key=lambda size: (size[0] != "linf", size))]


def short_probes(probes: Sequence[ProbeRecord]) -> tuple[ExportedProbe, ...]:
    """What export.json says of heads."""
    return tuple(
        ExportedProbe(id=one.id, head=one.head, features=one.features, data=one.test, accuracy=one.test_accuracy)
        for one in probes[:_LISTED]
    )


def short_attacks(attacks: Sequence[AttackRecord]) -> tuple[ExportedAttack, ...]:
    """What export.json says of attacks, the leading ones first."""
    lead = leading(attacks)
    fields = set(ExportedAttack.model_fields) - {"audited", "failed"}
    return tuple(
        ExportedAttack(
            **{key: getattr(one, key) for key in fields}, audited=not lacks_audit(one), failed=failed_names(one.flags)
        )
        for one in [*lead, *(one for one in attacks if one not in lead)][:_LISTED]
    )


def timm_name(made: ExportRecord, model: Model) -> str | None:
    """What timm calls a net that it makes and loads from the folder of an export; None for what is no net of timm's."""
    if (made.part, made.format) != ("backbone", "safetensors") or model.normalize or model.input_size:
        return None
    if model.timm is not None:
        return model.timm
    if model.stem == "cifar":
        return f"{model.backbone}_cifar" if model.width % 2 == 0 else None
    return model.backbone if model.stem == "imagenet" and model.width == _WIDTH else None


def config(made: ExportRecord, model: Model, known: Mapping[str, object]) -> dict[str, object]:
    """What config.json says, in the form that timm reads.

    Args:
        made: The export.
        model: The recipe's.
        known: What timm's own net says of itself; empty for a ResNet of ours.
    """
    name, resnet = timm_name(made, model), model.timm is None
    own_width = resnet and model.width != _WIDTH
    classes = made.output.dim if made.part == "classifier" else 0
    return {
        "architecture": name or f"cfamc_{made.part}",  # timm says that it does not know the latter
        "num_classes": classes,
        "num_features": made.output.dim,
        "model_args": {"channels": [model.width * 2**stage for stage in range(4)]} if own_width else model.options,
        "pretrained_cfg": {
            "input_size": [3, made.input.height, made.input.width],
            "fixed_input_size": bool(known.get("fixed_input_size", False)),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [0.0, 0.0, 0.0],  # images as they are
            "std": [1.0, 1.0, 1.0],
            "num_classes": classes,
            "first_conv": known.get("first_conv", "conv1"),
            "classifier": known.get("classifier", "fc"),
        },
    }


def front_matter(
    made: ExportRecord, trained_by: Recipe | None, timm: str | None, results: Sequence[Mapping[str, object]]
) -> str:
    """The metadata of the model card, between two lines of dashes.

    Args:
        made: The export.
        trained_by: The recipe; None where others trained the weights.
        timm: As of `timm_name`.
        results: As of `results_of`.
    """
    by_format = {"onnx": "onnx", "safetensors": "timm" if timm and not timm.endswith("_cifar") else "pytorch"}
    dataset, tags = "", ["adversarial-robustness"]
    if trained_by is not None:
        parts, dataset = trained_by.parts(), _on_the_hub(trained_by.data.dataset)
        tags += ["supervised" if trained_by.reads_labels else "self-supervised-learning"]
        tags += sorted({part.objective.name for part in parts})
        kinds = {part.adversary.name for part in parts} - {"none"}
        tags += [f"{kind}-adversarial-training" for kind in sorted(kinds)]
    fields: dict[str, object] = {
        "library_name": by_format.get(made.format, "pytorch"),
        "license": "unknown",  # that of the weights is their maker's to choose
        "datasets": [dataset] if dataset else [],
        "tags": tags,
        "pipeline_tag": "image-classification" if made.part == "classifier" else "image-feature-extraction",
        "model-index": [{"name": clean(made.source.name), "results": results}],
    }
    written = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value != [])
    return "\n".join(["---", *written, "---"]).replace("<", "\\u003c")  # no markup where it is shown as it is


def results_of(probes: Sequence[ProbeRecord], lead: Sequence[AttackRecord]) -> list[dict[str, object]]:
    """The leading results as the Hub lists them, for each data set; of what was never attacked, the best head's."""
    found: list[tuple[DataUsed, str, str, Accuracy]] = []
    for attack in lead:
        found.append((attack.data, "accuracy", "without an attack", attack.clean))
        by = f"under {attack.attack} in {attack.threat.norm} {attack.threat.eps}"
        found.append((attack.data, "robust_accuracy", by, attack.robust))
    if not lead and probes:
        best = max(probes, key=lambda probe: probe.test_accuracy.value)
        found.append((best.test, "accuracy", f"{best.head} head", best.test_accuracy))
    results: dict[tuple[str, str], dict[str, dict[str, object]]] = {}
    for data, kind, how, accuracy in found:
        name = f"% right, {how}, of {accuracy.n:,} {images_of(data.split)}"  # what has the same name was said already
        metric = {"type": kind, "value": round(100 * accuracy.value, 2), "name": name}
        results.setdefault((data.dataset, data.split), {})[name] = metric
    return [
        {
            "task": {"type": "image-classification"},
            "dataset": {"type": _on_the_hub(dataset) or clean(dataset), "name": clean(dataset), "split": split},
            "metrics": list(metrics.values()),
        }
        for (dataset, split), metrics in results.items()
    ]


def _on_the_hub(dataset: str) -> str:
    known = KNOWN_SETS.get(dataset)
    return known.hub if known is not None else ""
