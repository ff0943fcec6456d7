"""The model card of an export, in Markdown: what it is, how to load it, what was measured and what was not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import assert_never

from cfamc_cli import recipe_file, render
from cfamc_cli.recipe import DEPTHS, Model, Recipe, number
from cfamc_cli.records import AttackRecord, ExportRecord, RunRecord

_LIBRARY_WIDTH = 64  # the one width of torchvision's and timm's ResNets


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
    model, net = recipe.model, _torchvision_code(recipe.model)
    imports = ["import torch, torchvision", "from safetensors.torch import load_file"]
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


def _torchvision_code(model: Model) -> list[str]:
    """Lines that make `net`; at other widths than torchvision's own, its stages are built anew."""
    width = model.width
    line = f"net = torchvision.models.{model.backbone}()"
    small = f"torch.nn.Conv2d(3, {width}, 3, 1, 1, bias=False)"
    cifar = model.stem == "cifar"
    if width == _LIBRARY_WIDTH:
        code = [f"{line}  # timm.create_model({model.backbone!r}) takes them as well"]
        code += [f"net.conv1, net.maxpool = {small}, torch.nn.Identity()"] if cifar else []
    else:
        conv = small if cifar else f"torch.nn.Conv2d(3, {width}, 7, 2, 3, bias=False)"
        code = [
            f"{line}  # of width {_LIBRARY_WIDTH}; the next lines make it {width}",
            f"net.inplanes, net.conv1, net.bn1 = {width}, {conv}, torch.nn.BatchNorm2d({width})",
            "block = type(net.layer1[0])",
        ]
        for stage, depth in enumerate(DEPTHS[model.backbone], start=1):
            stride = ", stride=2" if stage > 1 else ""
            code.append(f"net.layer{stage} = net._make_layer(block, {width * 2 ** (stage - 1)}, {depth}{stride})")
        code += ["net.maxpool = torch.nn.Identity()"] if cifar else []
    return [*code, "net.fc = torch.nn.Identity()"]


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
