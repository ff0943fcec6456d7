"""Attack tables of a recipe from numbers, and a plan of them, for tests of the attacks themselves."""

from __future__ import annotations

from typing import Literal

from cfamc_cli.engine.attacks.plan import Plan
from cfamc_cli.recipe.schema import (
    ApgdAttack,
    EmbeddingAttack,
    FabAttack,
    FgsmAttack,
    Norm,
    PgdAttack,
    SquareAttack,
    Stage,
    TargetedApgdAttack,
)


def fgsm(eps: float, norm: Norm = "linf") -> FgsmAttack:
    return FgsmAttack(name="fgsm", eps=repr(eps), norm=norm)


def pgd(
    eps: float,
    norm: Norm = "linf",
    *,
    step_size: float = 0.01,
    steps: int = 20,
    restarts: int = 1,
    start: Literal["zero", "random"] = "random",
) -> PgdAttack:
    return PgdAttack(
        name="pgd", eps=repr(eps), norm=norm, step_size=repr(step_size), steps=steps, restarts=restarts, start=start
    )


def apgd(
    eps: float,
    norm: Norm = "linf",
    *,
    loss: Literal["apgd-ce", "apgd-dlr"] = "apgd-ce",
    steps: int = 100,
    restarts: int = 1,
) -> ApgdAttack:
    return ApgdAttack(name=loss, eps=repr(eps), norm=norm, steps=steps, restarts=restarts)


def targeted(eps: float, norm: Norm = "linf", *, steps: int = 100, targets: int = 9) -> TargetedApgdAttack:
    return TargetedApgdAttack(name="apgd-t", eps=repr(eps), norm=norm, steps=steps, targets=targets)


def fab(eps: float, norm: Norm = "linf", *, steps: int = 100, targets: int = 9) -> FabAttack:
    return FabAttack(name="fab", eps=repr(eps), norm=norm, steps=steps, targets=targets)


def square(eps: float, norm: Norm = "linf", *, queries: int = 5000) -> SquareAttack:
    return SquareAttack(name="square", eps=repr(eps), norm=norm, queries=queries)


def embedding(eps: float, norm: Norm = "linf", *, step_size: float = 0.01, steps: int = 20) -> EmbeddingAttack:
    return EmbeddingAttack(name="embedding", eps=repr(eps), norm=norm, step_size=repr(step_size), steps=steps)


def ensemble(eps: float, norm: Norm = "linf", *, steps: int, targets: int, queries: int) -> Plan:
    """The standard ensemble, shortened."""
    stages: tuple[Stage, ...] = (
        apgd(eps, norm, steps=steps),
        targeted(eps, norm, steps=steps, targets=targets),
        fab(eps, norm, steps=steps, targets=targets),
        square(eps, norm, queries=queries),
    )
    return Plan(stages)
