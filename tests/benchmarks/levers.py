"""What each choice of a recipe is worth at equal cost: the base recipe with one thing changed, variant after variant.

Equal cost is equal arithmetic: steps of an adversary and the pass that reads features for clusters are counted, the
average of weights and k-means are not. All phases of a variant shrink or grow by one factor until it costs what the
base does, to half a batch a phase. Stages:

plan      prints what each variant would cost; trains nothing.
measure   trains each variant with the first seed, then with the next; judges each run when it is trained, on held-out
          images under both linear heads by PGD-20. The record (--record) is appended to, and what stands there is left
          out: call it again to go on, with more seeds or variants too.
table     prints a Markdown table of the record: means, standard deviations of several seeds, and in parentheses the
          difference to the base's same seeds.

Processor seconds are those of the whole `cfamc pretrain`, imports included. A run is about 70,000 passes of a view of
32 pixels: a minute on two cores, and as long again to judge. So one seed of all variants takes about an hour.
Example: python tests/benchmarks/levers.py ~/.cache/cifar10-jpeg --record levers.jsonl --seeds 0
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from points import (
    FIGURES,
    HEADS,
    Diverged,
    Record,
    add_arguments,
    judge,
    lengths,
    percentages,
    say,
    scaled,
    settings,
    train,
)

from cfamc_cli.engine.data.folder import list_images
from cfamc_cli.recipe import file
from cfamc_cli.recipe.plan import flops_per_view, plan

STAGES = ("plan", "measure", "table")
BASE = "cifar10-laptop-fast"
IMAGE_SIZE = 32  # pixels of the images whose features are clustered
LONG = 1000  # so many times as long, a run's cost is its length's, whatever is rounded to whole batches
SPLIT = "holdout"


def then(epochs: float, *, size: int, lr: float, end: float = 0.0, scale: float = 0.6) -> str:
    """A later phase as the base has it, as TOML."""
    crops = f"{{count = 4, size = {size}, scale = [{scale}, 1.0]}}"
    schedule = f'{{name = "cosine", end = {end}}}'
    return f"{{epochs = {epochs}, crops = [{crops}], optimizer = {{lr = {lr}}}, schedule = {schedule}}}"


LAST = then(0.036, size=32, lr=0.03)  # the base's
PLAIN = "{flip = 0.5, jitter_p = 0.0, grayscale_p = 0.0, blur_p = 0.0, solarize_p = 0.0}"


def throughout(key: str, value: object) -> tuple[str, str]:
    """Settings of the first phase and of the base's other one, which has a table of its own."""
    return f"{key}={value}", f"phase.0.{key}={value}"


def clusters(count: int) -> str:
    """A last phase on clusters: a fifth of the arithmetic that trains, one weak crop of each image, plain SGD."""
    crops, schedule = "{count = 1, scale = [0.8, 1.0]}", '{name = "cosine"}'
    objective = f'{{name = "clusters", count = {count}}}'
    sgd = "{lr = 0.1, trust_coefficient = 1000.0}"  # so large that clip holds every ratio at 1
    given = f"augment = {PLAIN}, objective = {objective}, optimizer = {sgd}, schedule = {schedule}"
    return f"{{epochs = 0.13, crops = [{crops}], {given}}}"


# What --set says. Each is one change, made in both phases; the base's rate falls to a tenth before its last phase.
LEVERS: dict[str, tuple[str, ...]] = {
    "base": (),
    "crop-scale-0.08": ("crops.0.scale=[0.08, 1.0]",),
    "crop-scale-0.4": ("crops.0.scale=[0.4, 1.0]",),
    "last-scale-0.25": ("phase.0.crops.0.scale=[0.25, 1.0]",),
    "last-scale-0.8": ("phase.0.crops.0.scale=[0.8, 1.0]",),
    "colours-published": (
        "augment={jitter = [0.4, 0.4, 0.4, 0.2], jitter_p = 0.8, grayscale_p = 0.2, blur_p = 0.1, solarize_p = 0.1}",
    ),
    "colours-none": (f"augment={PLAIN}",),
    "size-32": ("crops.0.size=32", "phase=[]", "schedule.end=0.0"),
    "size-16-24-32": (  # 40, 40 and 20 % of the batches, on one cosine
        "crops.0.size=16",
        "schedule.end=0.65",
        f"phase=[{then(0.16, size=24, lr=0.195, end=0.15, scale=0.25)}, {then(0.08, size=32, lr=0.03)}]",
    ),
    "crops-2": throughout("crops.0.count", 2),
    "crops-8": throughout("crops.0.count", 8),
    "batch-50": ("train.batch_size=50",),
    "batch-200": ("train.batch_size=200",),
    "replays-1": ("adversary.replays=1",),
    "replays-2": ("adversary.replays=2",),
    "replays-4": ("adversary.replays=4",),
    "average-0": ("train.average=0.0",),
    "average-0.99": ("train.average=0.99",),
    "trust-0.01": throughout("optimizer.trust_coefficient", 0.01),
    "lr-0.15": ("optimizer.lr=0.15", "phase.0.optimizer.lr=0.015"),
    "lr-0.6": ("optimizer.lr=0.6", "phase.0.optimizer.lr=0.06"),
    "invariance-100": ("objective.invariance_weight=100.0",),
    "invariance-400": ("objective.invariance_weight=400.0",),
    "tcr-eps-0.1": ("objective.tcr_eps=0.1",),
    "tcr-eps-0.5": ("objective.tcr_eps=0.5",),
    "hidden-2048": ("model.hidden_dim=2048",),
    "start-random": ("adversary.start=random",),
    "step-0.005": ("adversary.step_size=0.005",),
    "step-0.02": ("adversary.step_size=0.02",),
    "eps-6": ("adversary.eps=6/255",),
    "eps-10": ("adversary.eps=10/255",),
    "pgd-2": ('adversary={name = "pgd", eps = "8/255", step_size = "4/255", steps = 2}',),  # two steps reach the ball
    "clusters-50": (f"phase=[{LAST}, {clusters(50)}]",),
    "clusters-200": (f"phase=[{LAST}, {clusters(200)}]",),
    "published": (),
}
OTHER_BASE = {"published": "cifar10-laptop"}


@dataclass(frozen=True)
class Variant:
    """A recipe at the base's cost."""

    name: str
    recipe: str
    overrides: tuple[str, ...]  # beside `settings`
    digest: str
    epochs: float  # of all phases
    flops: float
    flops_ratio: float  # to the base
    weight_updates: int


def operations(reference: str, overrides: Sequence[str], images: int) -> tuple[float, float]:
    """Those of the passes that find clusters, whatever a run's length, and those of its length, before any rounding."""
    recipe = file.load(reference, overrides=overrides)
    passes = images * sum(1 for part in recipe.parts() if part.clusters)  # forward only, a third of a view
    long = file.load(reference, overrides=[*overrides, *scaled(lengths(recipe), LONG)])
    return passes * flops_per_view(recipe.model, size=IMAGE_SIZE) / 3, plan(long, images).flops / LONG


def variants(options: argparse.Namespace, names: Iterable[str]) -> list[Variant]:
    """The variants of these names, each as long as the base's cost allows."""
    images, common = len(list_images(options.folder.expanduser(), "train").names) - options.holdout, settings(options)
    base = file.load(BASE, overrides=common)
    if base.phase != file.load(BASE, overrides=[*common, f"phase=[{LAST}]"]).phase:
        raise SystemExit(f"{BASE} has another last phase than this script's variants of it")
    cost, found = sum(operations(BASE, common, images)), []
    for name in names:
        reference, changes = OTHER_BASE.get(name, BASE), LEVERS[name]
        once, growing = operations(reference, [*common, *changes], images)
        own = lengths(file.load(reference, overrides=[*common, *changes]))
        overrides = (*changes, *scaled(own, (cost - once) / growing))
        recipe = file.load(reference, overrides=[*common, *overrides])
        planned, epochs = plan(recipe, images), sum(lengths(recipe).values())
        flops = planned.flops + once
        found.append(
            Variant(name, reference, overrides, recipe.digest(), epochs, flops, flops / cost, planned.weight_updates)
        )
    return found


def measure(options: argparse.Namespace, record: Record, chosen: Sequence[Variant]) -> None:
    """Train and judge what the record lacks; a training that diverges is told of and left out."""
    for seed in options.seeds:
        for variant in chosen:
            name = f"{variant.name}, seed {seed}"
            if (training := trained(record, variant, seed)) is None:
                say(f"{name}: {variant.epochs:.4g} epochs")
                before = processor_seconds()
                try:
                    run = train(options, variant.recipe, variant.overrides, seed=seed, runs=options.runs)
                except Diverged as end:
                    say(f"{name}: diverged; {end}")
                    continue
                seconds = {"seconds": run["wall_seconds"], "processor_seconds": processor_seconds() - before}
                record.append("training", **vars(variant), seed=seed, run=run["id"], **seconds)
                training = record.lines[-1]
            judge(options, record, training["run"], name=name, split=SPLIT)


def trained(record: Record, variant: Variant, seed: int) -> dict[str, Any] | None:
    """The line of a training."""
    lines = record.of("training", name=variant.name, digest=variant.digest, seed=seed)
    return lines[-1] if lines else None


def processor_seconds() -> float:
    """Of all commands so far, all threads together."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def figures(options: argparse.Namespace, record: Record, variant: Variant) -> dict[tuple[str, str], dict[int, float]]:
    """Of each head and figure the percentages by seed, as far as there are some."""
    found: dict[tuple[str, str], dict[int, float]] = {(head, figure): {} for head in HEADS for figure in FIGURES}
    for seed in options.seeds:
        for head in HEADS:
            training = trained(record, variant, seed)
            judged = training and percentages(record, training["run"], head=head, split=SPLIT, n=options.n)
            for figure, percent in (judged or {}).items():
                found[head, figure][seed] = percent
    return found


def cell(own: Mapping[int, float], base: Mapping[int, float]) -> str:
    """Mean and standard deviation over seeds, and the mean difference over the seeds that the base has too."""
    if not own:
        return "-"
    spread = f" +- {statistics.stdev(own.values()):.1f}" if len(own) > 1 else ""
    differences = [own[seed] - base[seed] for seed in own.keys() & base.keys()]
    beside = f" ({statistics.mean(differences):+.1f})" if differences else ""
    return f"{statistics.mean(own.values()):.1f}{spread}{beside}"


def table(options: argparse.Namespace, record: Record, chosen: Sequence[Variant]) -> Iterator[list[str]]:
    """A heading, and a row for each variant; the first one is the base."""
    yield ["variant", "flops", "processor s", "seeds", *(f"{head}: {figure}" for head in HEADS for figure in FIGURES)]
    base = figures(options, record, chosen[0])
    for variant in chosen:
        lines = [line for seed in options.seeds if (line := trained(record, variant, seed))]
        seconds = f"{statistics.mean(line['processor_seconds'] for line in lines):.0f}" if lines else "-"
        own = figures(options, record, variant)
        cells = [cell(own[of], {} if variant is chosen[0] else base[of]) for of in own]
        yield [variant.name, f"{variant.flops_ratio:.3f}", seconds, str(len(lines)), *cells]


def plans(chosen: Sequence[Variant]) -> Iterator[list[str]]:
    """A heading, and a row for each variant."""
    yield ["variant", "flops", "weight updates", "epochs"]
    for variant in chosen:
        yield [variant.name, f"{variant.flops_ratio:.3f}", f"{variant.weight_updates:,}", f"{variant.epochs:.4g}"]


def markdown(rows: Iterator[list[str]]) -> str:
    """A table of Markdown; the first row is its heading."""
    heading, *others = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, ["---"] * len(heading), *others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", choices=STAGES, help="make this stage (default: measure, then table)")
    parser.add_argument("--variants", help="such as crops-8,eps-6, beside the base (default: all)")
    options = parser.parse_args()
    names = ["base", *(options.variants.split(",") if options.variants else LEVERS)]
    if unknown := set(names) - set(LEVERS):
        parser.error(f"no such variants: {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    record, chosen = Record(options.record), variants(options, dict.fromkeys(names))
    if options.only == "plan":
        print(markdown(plans(chosen)), end="")
    if options.only in (None, "measure"):
        measure(options, record, chosen)
    if options.only in (None, "table"):
        print(markdown(table(options, record, chosen)), end="")


if __name__ == "__main__":
    main()
