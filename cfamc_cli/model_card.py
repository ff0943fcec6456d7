"""The model card of an export, in Markdown: what it is, how to load it, what was measured and what was not."""

from __future__ import annotations

import re
from typing import assert_never

from cfamc_cli import recipe_file, render
from cfamc_cli.recipe import DEPTHS, Model, Recipe, number
from cfamc_cli.records import AttackRecord, ExportRecord, ProbeRecord, RunRecord
from cfamc_cli.sheets import markdown_table, markdown_text

_ATTACK_COLUMNS = ("head", "threat model", "attack", "data", "n", "clean", "robust", "checks")
_LIBRARY_WIDTH = 64  # the one width of torchvision's and timm's ResNets


def card(made: ExportRecord, recipe: Recipe, run: RunRecord) -> str:
    """The model card, in Markdown: what this is, how to load it, what was measured and what was not.

    Text of recipes and data sets is escaped, so that no reader takes it for markup.
    """
    environment = render.templates()
    environment.filters |= {"plain": markdown_text, "duration": render.duration}
    written = [(file.name, f"{file.size:,}", file.sha256) for file in made.files]
    toml = "\n".join(render.clean(line) for line in recipe_file.to_toml(recipe).splitlines())
    return environment.get_template("card.md").render(
        made=made,
        recipe=recipe,
        run=run,
        loading=loading(made, recipe),
        probes=markdown_table(("probe", "head", "features", "data", "n", "accuracy"), map(_probe_row, made.probes)),
        attacks=markdown_table(_ATTACK_COLUMNS, map(_attack_row, made.attacks)),
        notes=list(dict.fromkeys(note for attack in made.attacks for note in attack.notes)),
        gaps=not_measured(made),
        files=markdown_table(("file", "bytes", "SHA-256"), written),
        toml=_fence(toml, "toml"),
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


def _probe_row(probe: ProbeRecord) -> tuple[str, ...]:
    data, accuracy = f"{probe.test.dataset} {probe.test.split}", probe.test_accuracy
    return (probe.id, probe.head, probe.features, data, f"{accuracy.n:,}", render.interval(accuracy))


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
        gaps.append(
            f"Perturbations larger than {' and '.join(map(markdown_text, sizes))}, unrestricted ones and patches."
        )
        behind = [attack.id for attack in made.attacks if any(flag.verdict == "skipped" for flag in attack.flags)]
        if behind:
            gaps.append(f"Some of the checks of {', '.join(map(markdown_text, behind))}.")
    gaps += [
        "Natural shifts: noise, blur, weather, compression, other cameras, other data sets.",
        "Calibration, fairness between groups of people or things, and images of no known class.",
        "Other precisions than float32, and quantised or pruned copies.",
    ]
    return gaps


def _fence(text: str, language: str) -> str:
    """A fenced block that no line of the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
