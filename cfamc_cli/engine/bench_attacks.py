"""What a recipe's attacks cost on this machine, for samples that none of their stages breaks.

The evaluation itself runs, on a classifier that cannot be moved. Each stage is cut short at two lengths, and what it
takes in full lies on the line through both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.engine.attacks.plan import Plan, passes, plan
from cfamc_cli.engine.bench import random_images
from cfamc_cli.engine.encoder import build_encoder
from cfamc_cli.engine.evaluation.blocks import BLOCK, evaluate
from cfamc_cli.engine.evaluation.predictor import as_predictor
from cfamc_cli.engine.evaluation.verify import Predictor
from cfamc_cli.engine.heads.classifier import Classifier, LinearHead
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.engine.sink import NullTalk, Talk
from cfamc_cli.recipe.schema import FabAttack, FgsmAttack, Recipe, SquareAttack, Stage, TargetedApgdAttack
from cfamc_cli.store.records import AttackCost, ThreatModel

_LENGTHS = (4, 12)  # steps or queries of a stage that is cut short


@dataclass(frozen=True)
class _Spent:
    """What one stage took for one sample."""

    seconds: float
    forward: float
    backward: float


def attacks(recipe: Recipe, *, device: torch.device, talk: Talk) -> tuple[AttackCost, ...]:
    """Measure each attack of a recipe against a linear head on an encoder of its kind.

    Args:
        recipe: With attacks.
        device: Where.
        talk: Hears what is under way.
    """
    known = KNOWN_SETS.get(recipe.data.dataset)
    images = random_images(recipe, BLOCK)
    x = images.images[: BLOCK if device.type == "cuda" else 64].float() / 255
    predictor = _unmoved(recipe, x.to(device), classes=len(images.classes))
    made = []
    for attack in recipe.attack:
        talk.message(f"measuring: {attack.name} {attack.norm} {attack.eps}")
        whole = plan(attack, classes=len(images.classes))
        brief, longer = (_spent(predictor, x, _cut(whole, length), recipe.seed, device) for length in _LENGTHS)
        spent = _extended(whole, brief, longer)
        seconds = sum(stage.seconds for stage in spent)
        made.append(
            AttackCost(
                name=attack.name,
                threat=ThreatModel(space="image", norm=attack.norm, eps=attack.eps),
                samples=len(x),
                seconds_per_1000=1000 * seconds,
                forward=sum(stage.forward for stage in spent),
                backward=sum(stage.backward for stage in spent),
                test_images=known and known.test,
                predicted=seconds * known.test if known else None,
            )
        )
    return tuple(made)


def _unmoved(recipe: Recipe, x: torch.Tensor, *, classes: int) -> Predictor:
    """A classifier of the recipe's architecture that says class 0 whatever happens, with gradients all the same."""
    encoder = build_encoder(recipe.model, generator=addressed_generator("init", recipe.seed)).to(x.device).eval()
    with torch.no_grad():
        features = encoder.features(x, features=recipe.probe.features)
        head = LinearHead(features.shape[1], classes).to(x.device)
        head.weight.copy_(torch.linspace(-1, 1, head.weight.numel()).view_as(head.weight))
        head.weight.div_(1000 * features.norm(dim=1).max() * features.shape[1] ** 0.5)
        head.bias[0] = 1.0
    return as_predictor(Classifier(encoder, head, features=recipe.probe.features), x[:8], space="image")


def _spent(predictor: Predictor, x: torch.Tensor, short: Plan, seed: int, device: torch.device) -> list[_Spent]:
    """One sample's share of every stage, the clean predictions first; the second of two evaluations counts."""
    for _ in range(2):
        evaluation = evaluate(
            predictor,
            x,
            torch.zeros(len(x), dtype=torch.int64),
            plan=short,
            seed=seed,
            block_size=BLOCK,
            device=device,
            finished=(),
            commit=lambda *_: None,
            audit=None,
            label="bench",
            talk=NullTalk(),
        )
    n = len(x)
    return [_Spent(s.wall_seconds / n, s.forward / n, s.backward / n) for s in evaluation.totals()]


def _extended(whole: Plan, brief: list[_Spent], longer: list[_Spent]) -> list[_Spent]:
    """What the stages take in full, by the passes that they make."""
    counts = [[passes(stage, eot=whole.eot) for stage in _cut(whole, length).stages] for length in _LENGTHS]
    made = [longer[0]]  # the clean predictions, which nothing cuts short
    for stage, first, second, low, high in zip(whole.stages, brief[1:], longer[1:], *counts, strict=True):
        beyond = (passes(stage, eot=whole.eot) - high) / (high - low) if high > low else 0.0
        pairs = ((getattr(first, name), getattr(second, name)) for name in ("seconds", "forward", "backward"))
        made.append(_Spent(*(after + beyond * max(0.0, after - before) for before, after in pairs)))
    return made


def _cut(whole: Plan, length: int) -> Plan:
    return Plan(tuple(_shortened(stage, length) for stage in whole.stages), whole.eot)


def _shortened(stage: Stage, length: int) -> Stage:
    """A stage of so many steps or queries, or its own where those are fewer; once, and for one target."""
    match stage:
        case FgsmAttack():
            return stage
        case SquareAttack():
            changes = {"queries": min(length, stage.queries)}
        case FabAttack():
            changes = {"steps": min(length, stage.steps), "targets": 1}
        case TargetedApgdAttack():
            changes = {"steps": min(length, stage.steps), "restarts": 1, "targets": 1}
        case _:
            changes = {"steps": min(length, stage.steps), "restarts": 1}
    return stage.model_copy(update=changes)
