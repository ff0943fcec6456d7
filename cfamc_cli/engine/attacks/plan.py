"""What an attack of the recipe comes to, stage by stage, and the one place that runs a stage.

A stage is one of the recipe's attack tables; the ensemble is several. The ensemble: Croce & Hein, arXiv:2003.01690,
section 5 (standard: APGD-CE, APGD-T, FAB-T, Square) and its version for randomised defences (rand: APGD-CE and APGD-DLR
with 20 passes for each gradient). Anything shorter than its defaults is not comparable with published numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.apgd import apgd
from cfamc_cli.engine.attacks.fab import fab
from cfamc_cli.engine.attacks.pgd import embedding_pgd, fgsm, pgd
from cfamc_cli.engine.attacks.search import Predict, Region
from cfamc_cli.engine.attacks.square import square
from cfamc_cli.recipe.schema import (
    ApgdAttack,
    Attack,
    AutoAttackAttack,
    EmbeddingAttack,
    FabAttack,
    FgsmAttack,
    Norm,
    PgdAttack,
    SquareAttack,
    Stage,
    TargetedApgdAttack,
    number,
)

_EOT = 20  # passes for each gradient of the version "rand"


@dataclass(frozen=True)
class Plan:
    """What an attack comes to against a number of classes."""

    stages: tuple[Stage, ...]  # in the order in which they run, all of one eps and norm
    eot: int = 1  # passes that APGD averages for each gradient, for randomised predictors
    notes: tuple[str, ...] = ()  # what a person must be told because it differs from the attack as published
    onward: bool = False  # whether searches go on when they fool what they run on, which then is not what is judged

    @property
    def eps(self) -> float:
        """Radius of the ball, in units of the image range."""
        return number(self.stages[0].eps)

    @property
    def norm(self) -> Norm:
        """Its norm."""
        return self.stages[0].norm


def stage_name(stage: Stage) -> str:
    """The name under which a stage is reported, such as "apgd-t"."""
    match stage:
        case PgdAttack():
            return f"pgd-{stage.steps}"
        case FabAttack():
            return "fab-t"
        case _:
            return stage.name


def plan(attack: Attack, *, classes: int) -> Plan:
    """The stages of an attack against `classes` classes, with fewer targets where there are fewer classes.

    Raises:
        ValueError: There are fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"an attack needs at least two classes, not {classes}")
    fitted: list[Stage] = []
    notes = []
    for stage in _ensemble(attack) if isinstance(attack, AutoAttackAttack) else (attack,):
        if isinstance(stage, TargetedApgdAttack | FabAttack) and stage.targets > classes - 1:
            fewer = f"{classes - 1} targets instead of {stage.targets}, as there are {classes} classes"
            notes.append(f"{stage_name(stage)}: {fewer}")
            stage = stage.model_copy(update={"targets": classes - 1})
        match stage:
            case FgsmAttack():
                notes.append("fgsm: a single step bounds robust accuracy from above, and is no estimate of it")
            case ApgdAttack(name="apgd-dlr") if classes < 3:
                notes.append("apgd-dlr: the plain margin instead of the ratio, which needs at least 3 classes")
            case TargetedApgdAttack() if classes == 3:
                notes.append(
                    "apgd-t: the ratio divides by z_(1) - z_(3), as the published one needs at least 4 classes"
                )
            case TargetedApgdAttack() if classes < 3:
                notes.append("apgd-t: the plain gap instead of the ratio, which needs at least 3 classes")
            case _:
                pass
        fitted.append(stage)
    randomised = isinstance(attack, AutoAttackAttack) and attack.version == "rand"
    return Plan(tuple(fitted), _EOT if randomised else 1, tuple(notes))


def _ensemble(attack: AutoAttackAttack) -> tuple[Stage, ...]:
    """The stages of the ensemble, for any number of classes."""
    stages: tuple[Stage, ...]
    match attack.version:
        case "standard":
            stages = (
                ApgdAttack(name="apgd-ce"),
                TargetedApgdAttack(name="apgd-t"),
                FabAttack(name="fab"),
                SquareAttack(name="square"),
            )
        case "rand":
            stages = ApgdAttack(name="apgd-ce"), ApgdAttack(name="apgd-dlr")
        case _:
            assert_never(attack.version)
    shared = {"eps": attack.eps, "norm": attack.norm, "search_precision": attack.search_precision}
    return tuple(stage.model_copy(update=shared) for stage in stages)


def passes(stage: Stage, *, eot: int) -> int:
    """About how many passes forward a stage makes for a sample that it does not break."""
    match stage:
        case FgsmAttack():
            return 1
        case PgdAttack() | EmbeddingAttack():
            return (stage.steps + 1) * stage.restarts
        case ApgdAttack():
            return (stage.steps + 1) * stage.restarts * eot
        case TargetedApgdAttack():
            return (stage.steps + 1) * stage.restarts * stage.targets * eot
        case FabAttack():
            return (stage.steps + 1) * stage.targets * 2
        case SquareAttack():
            return stage.queries + 1
        case _:
            assert_never(stage)


def run_stage(
    stage: Stage,
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    embed: Predict | None,
    eot: int = 1,
    onward: bool = False,
    generator: torch.Generator,
) -> Tensor:
    """Run one stage.

    Args:
        stage: Its settings.
        predict: Logits from images.
        x: Clean images in [0, 1], (N, C, H, W).
        y: Labels, (N,).
        embed: Embeddings from images; None where the predictor has no representation to attack.
        eot: Passes that APGD averages for each gradient.
        onward: Whether PGD goes on to its last step whatever it fools.
        generator: CPU generator of everything random.

    Returns:
        A point for each sample, (N, C, H, W); whether it is an adversarial example is for the caller to verify.

    Raises:
        ValueError: The attack on the representation was asked for, and there is none.
    """
    region = Region.around(x, eps=number(stage.eps), norm=stage.norm)
    match stage:
        case FgsmAttack():
            return fgsm(predict, region, y)
        case PgdAttack():
            return pgd(
                predict,
                region,
                y,
                step_size=number(stage.step_size),
                steps=stage.steps,
                restarts=stage.restarts,
                start=stage.start,
                generator=generator,
                onward=onward,
            )
        case ApgdAttack() | TargetedApgdAttack():
            return apgd(
                predict,
                region,
                y,
                loss=stage.name,
                steps=stage.steps,
                restarts=stage.restarts,
                targets=stage.targets if isinstance(stage, TargetedApgdAttack) else 1,
                eot=eot,
                generator=generator,
            )
        case FabAttack():
            return fab(predict, region, y, steps=stage.steps, targets=stage.targets)
        case SquareAttack():
            return square(predict, region, y, queries=stage.queries, generator=generator)
        case EmbeddingAttack():
            if embed is None:
                raise ValueError("the predictor has no embedding to attack")
            length, steps, restarts = number(stage.step_size), stage.steps, stage.restarts
            return embedding_pgd(embed, region, step_size=length, steps=steps, restarts=restarts, generator=generator)
        case _:
            assert_never(stage)
