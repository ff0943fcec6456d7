"""Runs AutoAttack's standard ensemble here and in pyautoattack 0.2.0 on one classifier: outcomes, and time by stages.

The classifier is the one that the package ships (CIFAR-10, ResNet-18), or encoder and head of a run. Both sides attack
the same images in one block, each stage what its own stages before left standing; the reference runs once for each
seed, and its own spread over the seeds is what a disagreement is held against. Time is processor time, in turns.
`pip install pyautoattack==0.2.0` first. Examples:
python tests/benchmarks/attack_agreement.py ~/.cache/cifar10-jpeg --eps 1/510 --steps 12 --targets 2 --queries 100
python tests/benchmarks/attack_agreement.py ~/.cache/cifar10-jpeg --run runs/ID --head linear --eps 8/255 --limit 200
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from heads import probe_of
from judge import read_folder, wilson
from machine import emit, machine
from torch import Tensor, nn

from cfamc_cli.engine.attacks.plan import run_stage, stage_name
from cfamc_cli.engine.attacks.search import fooled, logits_at
from cfamc_cli.engine.evaluation.folding import frozen_copy
from cfamc_cli.engine.evaluation.predictor import as_predictor
from cfamc_cli.engine.heads.classifier import load_classifier, load_encoder
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.recipe.schema import ApgdAttack, FabAttack, SquareAttack, Stage, TargetedApgdAttack
from cfamc_cli.store.records import ProbeRecord, load_record
from cfamc_cli.store.runs import HEAD, RECORD, RunFolder

Perturb = Callable[[str, Tensor, Tensor, int], Tensor]  # stage, images, labels, seed
_ROUNDING = 1e-6  # by which a reference's example may leave the ball


@dataclass
class Side:
    """What one side did with one seed: who stands after each stage, and its processor seconds."""

    standing: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    attacked: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What both sides spend; eps is exact text."""

    eps: str
    steps: int
    targets: int
    queries: int

    def stages(self) -> dict[str, Stage]:
        """The standard ensemble of this project by the names of its stages."""
        stages: tuple[Stage, ...] = (
            ApgdAttack(name="apgd-ce", eps=self.eps, steps=self.steps),
            TargetedApgdAttack(name="apgd-t", eps=self.eps, steps=self.steps, targets=self.targets),
            FabAttack(name="fab", eps=self.eps, steps=self.steps, targets=self.targets),
            SquareAttack(name="square", eps=self.eps, queries=self.queries),
        )
        return {stage_name(stage): stage for stage in stages}


def packaged_classifier() -> nn.Module:
    """The CIFAR-10 classifier of pyautoattack's examples."""
    import pyautoattack.examples.resnet as shipped

    net: nn.Module = shipped.ResNet18()
    weights = Path(shipped.__file__).parent / "model_test.pt"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net


def classifier_of(run: Path, head: str, sample: Tensor) -> nn.Module:
    """Encoder and head of a run, from images like `sample` to logits."""
    folder = RunFolder(run)
    probe = probe_of(run, head)
    recipe, record = folder.recipe(), load_record(probe / RECORD, ProbeRecord)
    loaded = load_encoder(folder.checkpoints, recipe.model, device=torch.device("cpu"), talk=NullTalk())
    classifier = load_classifier(loaded, record, probe / HEAD, recipe)
    logits = as_predictor(classifier, sample, space="image").logits
    assert isinstance(logits, nn.Module)
    return logits


def reference(net: nn.Module, settings: Settings) -> Perturb:
    """The reference's stages with the same settings."""
    import pyautoattack

    def perturb(stage: str, x: Tensor, y: Tensor, seed: int) -> Tensor:
        # Its check for vanishing gradients raises on any net; it changes no example.
        with mock.patch("pyautoattack.autopgd_base.check_zero_gradients"):
            suite: Any = pyautoattack.AutoAttack(
                net, norm="Linf", eps=float(Fraction(settings.eps)), seed=seed, device="cpu"
            )
            suite.verbose = False
            attacks = {"apgd-ce": suite.apgd, "apgd-t": suite.apgd_targeted, "fab-t": suite.fab, "square": suite.square}
            attack = attacks[stage]
            attack.n_restarts, attack.seed = 1, seed
            suite.apgd.loss, suite.fab.targeted = "ce", True
            suite.square.n_queries = settings.queries
            for gradient in (suite.apgd, suite.apgd_targeted, suite.fab):
                gradient.n_iter, gradient.n_target_classes = settings.steps, settings.targets
            result: Tensor = attack.perturb(x, y)
            return result

    return perturb


def here(net: nn.Module, stages: dict[str, Stage], sample: Tensor) -> Perturb:
    """The stages of this project, which search through the folded copy as `cfamc attack` does."""
    fast = frozen_copy(net, sample)

    def perturb(stage: str, x: Tensor, y: Tensor, seed: int) -> Tensor:
        return run_stage(stages[stage], fast, x, y, embed=None, generator=torch.Generator().manual_seed(seed))

    return perturb


def turn(
    side: Side, stage: str, perturb: Perturb, net: nn.Module, x: Tensor, y: Tensor, *, eps: float, seed: int
) -> None:
    """One stage against what stands; an example counts if it fools the net itself, inside ball and box."""
    standing = next(reversed(side.standing.values())).clone()
    rows = standing.nonzero().flatten()
    side.attacked[stage] = len(rows)
    started = time.process_time()
    if len(rows):
        points = perturb(stage, x[rows], y[rows], seed).detach()
        distance = (points.double() - x[rows].double()).abs().flatten(1).amax(1)
        valid = (distance <= eps + _ROUNDING) & (points.flatten(1).amin(1) >= 0) & (points.flatten(1).amax(1) <= 1)
        standing[rows[fooled(logits_at(net, points), y[rows]) & valid]] = False
    side.seconds[stage] = time.process_time() - started
    side.standing[stage] = standing


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="image folder with test/<class>/")
    parser.add_argument("--run", type=Path, help="a run's folder (default: the classifier that pyautoattack ships)")
    parser.add_argument("--head", default="linear", help="part of the name of the run's probe")
    parser.add_argument("--eps", required=True, help="such as 8/255")
    parser.add_argument("--limit", type=int, default=100, help="test images, balanced")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--targets", type=int, default=9)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the reference")
    parser.add_argument("--our-seeds", type=int, default=3, help="seeds of ours; pairs are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    eps = float(Fraction(options.eps))
    images, labels, names = read_folder(options.folder / "test", limit=options.limit)
    settings = Settings(options.eps, options.steps, min(options.targets, len(names) - 1), options.queries)
    x = images.float() / 255
    net = packaged_classifier() if options.run is None else classifier_of(options.run, options.head, x[:16])
    net.eval().requires_grad_(False)
    stages = settings.stages()
    sides: dict[str, tuple[Perturb, int]] = {
        "reference": (reference(net, settings), options.seeds),
        "ours": (here(net, stages, x[:16]), options.our_seeds),
    }
    clean = ~fooled(logits_at(net, x), labels)
    done: dict[str, list[Side]] = {"reference": [], "ours": []}
    for seed in range(max(options.seeds, options.our_seeds)):
        for name, (_, seeds) in sides.items():
            if seed < seeds:
                done[name].append(Side({"clean": clean}))
        for stage in stages:  # in turns, so that a busy neighbour hits both
            for name, (perturb, seeds) in sides.items():
                if seed < seeds:
                    turn(done[name][seed], stage, perturb, net, x, labels, eps=eps, seed=seed)
                    right, took = int(done[name][seed].standing[stage].sum()), done[name][seed].seconds[stage]
                    print(f"seed {seed} {stage} {name}: {right} stand, {took:.0f} s", file=sys.stderr, flush=True)

    last = list(stages)[-1]
    pairs = list(zip(done["reference"], done["ours"], strict=False))

    def differ(a: Side, b: Side) -> int:
        return int((a.standing[last] != b.standing[last]).sum())

    robust = {name: [int(side.standing[last].sum()) for side in runs] for name, runs in done.items()}
    ratios = {
        stage: statistics.median(ours.seconds[stage] / theirs.seconds[stage] for theirs, ours in pairs)
        for stage in stages
        if all(theirs.attacked[stage] and ours.attacked[stage] for theirs, ours in pairs)
    }
    total = statistics.median(sum(ours.seconds.values()) / sum(theirs.seconds.values()) for theirs, ours in pairs)
    title = f"AutoAttack L-inf {options.eps} on {len(x)} images, {int(clean.sum())} of them right"
    record = {
        "machine": machine(),
        "classifier": "pyautoattack 0.2.0, examples/model_test.pt" if options.run is None else options.run.name,
        "head": None if options.run is None else options.head,
        "eps": options.eps,
        "norm": "linf",
        "n": len(x),
        "settings": {"steps": options.steps, "targets": options.targets, "queries": options.queries},
        "clean_right": int(clean.sum()),
        "robust_right": robust,
        "robust_interval95_ours": wilson(robust["ours"][0], len(x)),
        "disagreements": {
            "ours_with_reference": [differ(theirs, ours) for theirs, ours in pairs],
            "reference_with_itself": [differ(a, b) for a, b in itertools.combinations(done["reference"], 2)],
        },
        "standing": {
            name: [{stage: int(mask.sum()) for stage, mask in side.standing.items()} for side in runs]
            for name, runs in done.items()
        },
        "processor_seconds": {name: [side.seconds for side in runs] for name, runs in done.items()},
        "time_ratio": total,
        "time_ratio_of_stages": ratios,
    }
    rows = [["stage", "reference stand", "ours stand", "time ratio"]]
    for stage in stages:
        counts = [", ".join(str(int(side.standing[stage].sum())) for side in done[name]) for name in done]
        rows.append([stage, *counts, f"{ratios[stage]:.2f}" if stage in ratios else "nobody left"])
    rows.append(["in all", "", "", f"{total:.2f}"])
    emit(record, title=title, rows=rows)


if __name__ == "__main__":
    main()
