"""The settings of every attack, the standard ensemble as a plan of stages, and the one place that runs a stage.

The ensemble: Croce & Hein, arXiv:2003.01690, section 5 (standard: APGD-CE, APGD-T, FAB-T, Square) and its version for
randomised defences (rand: APGD-CE and APGD-DLR with 20 passes for each gradient).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.apgd import apgd
from cfamc_cli.engine.attacks.fab import fab
from cfamc_cli.engine.attacks.objectives import Loss
from cfamc_cli.engine.attacks.pgd import Start, embedding_pgd, fgsm, pgd
from cfamc_cli.engine.attacks.search import Predict, check, fooled, logits_at
from cfamc_cli.engine.attacks.square import square
from cfamc_cli.engine.ball import Norm

Version = Literal["standard", "rand"]


@dataclass(frozen=True)
class Fgsm:
    """One step of length eps."""

    eps: float
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        check(self.eps, {})


@dataclass(frozen=True)
class Pgd:
    """Projected gradient ascent on the cross-entropy; step_size in the units of eps."""

    eps: float
    norm: Norm = "linf"
    step_size: float = 0.01
    steps: int = 20
    restarts: int = 1
    start: Start = "random"

    def __post_init__(self) -> None:
        check(self.eps, {"steps": self.steps, "restarts": self.restarts})
        if not self.step_size > 0:
            raise ValueError(f"step_size must be above 0, not {self.step_size}")


@dataclass(frozen=True)
class Apgd:
    """Auto-PGD; `targets` belongs to the targeted loss alone."""

    eps: float
    norm: Norm = "linf"
    loss: Loss = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 1
    eot: int = 1

    def __post_init__(self) -> None:
        check(self.eps, {"steps": self.steps, "restarts": self.restarts, "targets": self.targets, "eot": self.eot})
        if self.targets > 1 and self.loss != "targeted-dlr":
            raise ValueError(f"targets has no effect on the loss {self.loss!r}")


@dataclass(frozen=True)
class Fab:
    """Targeted FAB."""

    eps: float
    norm: Norm = "linf"
    steps: int = 100
    targets: int = 9

    def __post_init__(self) -> None:
        check(self.eps, {"steps": self.steps, "targets": self.targets})


@dataclass(frozen=True)
class Square:
    """Random search with `queries` logits per sample."""

    eps: float
    norm: Norm = "linf"
    queries: int = 5000

    def __post_init__(self) -> None:
        check(self.eps, {"queries": self.queries})


@dataclass(frozen=True)
class Embedding:
    """PGD on the distance between embeddings, without labels."""

    eps: float
    norm: Norm = "linf"
    step_size: float = 0.01
    steps: int = 20
    restarts: int = 1

    def __post_init__(self) -> None:
        check(self.eps, {"steps": self.steps, "restarts": self.restarts})
        if not self.step_size > 0:
            raise ValueError(f"step_size must be above 0, not {self.step_size}")


Stage = Fgsm | Pgd | Apgd | Fab | Square | Embedding


@dataclass(frozen=True)
class AutoAttack:
    """The ensemble. The defaults are the published ones; anything shorter is not comparable with published numbers."""

    eps: float
    norm: Norm = "linf"
    version: Version = "standard"
    steps: int = 100
    targets: int = 9
    queries: int = 5000
    eot: int = 20

    def __post_init__(self) -> None:
        check(self.eps, {"steps": self.steps, "targets": self.targets, "queries": self.queries, "eot": self.eot})

    @property
    def is_published(self) -> bool:
        """Whether the stages are those of the publication."""
        return (self.steps, self.targets, self.queries, self.eot) == (100, 9, 5000, 20)


Attack = Stage | AutoAttack


@dataclass(frozen=True)
class Plan:
    """What an attack comes to against a number of classes.

    Attributes:
        stages: The stages in the order in which they run.
        notes: What a person must be told because it differs from the attack as published.
    """

    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = ()


def stage_name(stage: Stage) -> str:
    """The name under which a stage is reported, such as "apgd-t"."""
    match stage:
        case Fgsm():
            return "fgsm"
        case Pgd():
            return f"pgd-{stage.steps}"
        case Apgd():
            return "apgd-t" if stage.loss == "targeted-dlr" else f"apgd-{stage.loss}"
        case Fab():
            return "fab-t"
        case Square():
            return "square"
        case Embedding():
            return "embedding"
        case _:
            assert_never(stage)


def plan(attack: Attack, *, classes: int) -> Plan:
    """The stages of an attack against `classes` classes, with fewer targets where there are fewer classes.

    Raises:
        ValueError: There are fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"an attack needs at least two classes, not {classes}")
    match attack:
        case AutoAttack():
            stages = _ensemble(attack)
        case _:
            stages = (attack,)
    fitted, notes = [], []
    for stage in stages:
        match stage:
            case Apgd(loss="targeted-dlr") | Fab():
                if stage.targets > classes - 1:
                    fewer = f"{classes - 1} targets instead of {stage.targets}, as there are {classes} classes"
                    notes.append(f"{stage_name(stage)}: {fewer}")
                    stage = _with_targets(stage, classes - 1)
            case _:
                pass
        match stage:
            case Apgd(loss="dlr") if classes < 3:
                notes.append("apgd-dlr: the plain margin instead of the ratio, which needs at least 3 classes")
            case Apgd(loss="targeted-dlr") if classes == 3:
                notes.append(
                    "apgd-t: the ratio divides by z_(1) - z_(3), as the published one needs at least 4 classes"
                )
            case Apgd(loss="targeted-dlr") if classes < 3:
                notes.append("apgd-t: the plain gap instead of the ratio, which needs at least 3 classes")
            case _:
                pass
        fitted.append(stage)
    return Plan(tuple(fitted), tuple(notes))


def _with_targets(stage: Apgd | Fab, targets: int) -> Apgd | Fab:
    """The same stage with another number of targets."""
    match stage:
        case Apgd():
            return Apgd(stage.eps, stage.norm, stage.loss, stage.steps, stage.restarts, targets, stage.eot)
        case Fab():
            return Fab(stage.eps, stage.norm, stage.steps, targets)
        case _:
            assert_never(stage)


def _ensemble(attack: AutoAttack) -> tuple[Stage, ...]:
    """The stages of the ensemble, for any number of classes."""
    eps, norm, steps = attack.eps, attack.norm, attack.steps
    match attack.version:
        case "standard":
            return (
                Apgd(eps, norm, loss="ce", steps=steps),
                Apgd(eps, norm, loss="targeted-dlr", steps=steps, targets=attack.targets),
                Fab(eps, norm, steps=steps, targets=attack.targets),
                Square(eps, norm, queries=attack.queries),
            )
        case "rand":
            return (
                Apgd(eps, norm, loss="ce", steps=steps, eot=attack.eot),
                Apgd(eps, norm, loss="dlr", steps=steps, eot=attack.eot),
            )
        case _:
            assert_never(attack.version)


def run_stage(
    stage: Stage, predict: Predict, x: Tensor, y: Tensor, *, embed: Predict | None, generator: torch.Generator
) -> Tensor:
    """Run one stage.

    Args:
        stage: Its settings.
        predict: Logits from images.
        x: Clean images in [0, 1], (N, C, H, W).
        y: Labels, (N,).
        embed: Embeddings from images; None where the predictor has no representation to attack.
        generator: CPU generator of everything random.

    Returns:
        A point for each sample, (N, C, H, W); whether it is an adversarial example is for the caller to verify.

    Raises:
        ValueError: The attack on the representation was asked for, and there is none.
    """
    eps, norm = stage.eps, stage.norm
    match stage:
        case Fgsm():
            return fgsm(predict, x, y, eps=eps, norm=norm)
        case Pgd():
            return pgd(
                predict,
                x,
                y,
                eps=eps,
                norm=norm,
                step_size=stage.step_size,
                steps=stage.steps,
                restarts=stage.restarts,
                start=stage.start,
                generator=generator,
            )
        case Apgd():
            return apgd(
                predict,
                x,
                y,
                eps=eps,
                norm=norm,
                loss=stage.loss,
                steps=stage.steps,
                restarts=stage.restarts,
                targets=stage.targets,
                eot=stage.eot,
                generator=generator,
            )
        case Fab():
            return fab(predict, x, y, eps=eps, norm=norm, steps=stage.steps, targets=stage.targets)
        case Square():
            return square(predict, x, y, eps=eps, norm=norm, queries=stage.queries, generator=generator)
        case Embedding():
            if embed is None:
                raise ValueError("the predictor has no embedding to attack")
            return embedding_pgd(
                embed,
                x,
                eps=eps,
                norm=norm,
                step_size=stage.step_size,
                steps=stage.steps,
                restarts=stage.restarts,
                generator=generator,
            )
        case _:
            assert_never(stage)


def autoattack(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    version: Version = "standard",
    classes: int,
    generator: torch.Generator,
) -> Tensor:
    """The published ensemble: each stage works on what the stages before it left standing.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1], (N, C, H, W).
        y: Labels, (N,).
        eps: Radius of the ball.
        norm: Its norm.
        version: "standard", or "rand" for randomised predictors.
        classes: Number of classes; with fewer than ten there are fewer targets.
        generator: CPU generator of everything random.

    Returns:
        A misclassified point where one was found, else x, (N, C, H, W).
    """
    result = x.clone()
    alive = (~fooled(logits_at(predict, x), y)).nonzero().flatten()
    for stage in plan(AutoAttack(eps, norm, version), classes=classes).stages:
        if len(alive) == 0:
            break
        points = run_stage(stage, predict, x[alive], y[alive], embed=None, generator=generator)
        broken = fooled(logits_at(predict, points), y[alive])
        result[alive[broken]] = points[broken]
        alive = alive[~broken]
    return result
