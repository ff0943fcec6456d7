"""Who moves the pixels during training: nobody, PGD (arXiv:1706.06083), or free training (arXiv:1904.12843).

All ascend the training loss itself, without labels, in the L-inf ball of radius eps around crops in [0, 1].
The loop asks three things of an adversary: `begin` a batch, `perturb` it before each forward pass, `ascend` after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

import torch
from torch import Tensor

from cfamc_cli.engine import ball
from cfamc_cli.engine.sections import section
from cfamc_cli.recipe.schema import FreeAdversary, NoAdversary, PgdAdversary, number

Groups = list[Tensor]  # one (V_g, B, C, S_g, S_g) a group of crops
LossOf = Callable[[Sequence[Tensor]], Tensor]  # of the groups that move
LossBeside = Callable[[Sequence[Tensor]], LossOf]  # of groups that stay clean: they are embedded once, not at each step


class Adversary:
    """Clean training: the crops pass as they are.

    Attributes:
        spared: The first groups of the batch, where the adversary leaves them clean; none here.
        delta: The perturbations of the other groups; none here.
    """

    def __init__(self) -> None:
        self.spared: Groups = []
        self.delta: Groups = []

    def begin(self, crops: Groups, generators: Sequence[torch.Generator]) -> None:  # noqa: ARG002
        """Take the crops of the next batch, and a CPU generator for each group."""
        self.crops = crops

    def perturb(self, loss_of: LossOf) -> Groups:  # noqa: ARG002
        """The crops to train on beside the spared ones: in [0, 1] and within eps of the clean ones."""
        return self.moved()

    def moved(self) -> Groups:
        """The groups that are not spared, with their perturbations as they stand."""
        return self.crops

    def ascend(self) -> None:
        """Use the gradient that the training loss's backward pass left, if it is of use."""


class Moving(Adversary):
    """What PGD and free training share: the ball, and which groups stay clean."""

    def __init__(self, settings: PgdAdversary | FreeAdversary) -> None:
        super().__init__()
        self.first = 1 if settings.views == "second" else 0  # index of the first group that is perturbed
        self.start = settings.start
        self.eps, self.step_size = number(settings.eps), number(settings.step_size)

    @section("adversary")
    def begin(self, crops: Groups, generators: Sequence[torch.Generator]) -> None:
        self.spared, self.clean = crops[: self.first], crops[self.first :]
        self.generators = generators[self.first :]

    def fresh(self) -> Groups:
        """Perturbations that carry nothing on: zero, or drawn from the ball."""
        if self.start == "zero":
            return [torch.zeros_like(x) for x in self.clean]
        return [
            ball.random_start(x, eps=self.eps, generator=generator)
            for x, generator in zip(self.clean, self.generators, strict=True)
        ]

    def moved(self) -> Groups:
        return [x + delta for x, delta in zip(self.clean, self.delta, strict=True)]


class Pgd(Moving):
    """K ascent steps on the perturbation before each weight step; the weights' gradients stay untouched."""

    def __init__(self, settings: PgdAdversary) -> None:
        super().__init__(settings)
        self.steps = settings.steps

    @section("adversary")
    def perturb(self, loss_of: LossOf) -> Groups:
        self.delta = ascend_loss(
            loss_of, self.clean, self.fresh(), eps=self.eps, step_size=self.step_size, steps=self.steps
        )
        return self.moved()


class Free(Moving):
    """One backward pass pays for the weight step and the ascent; delta is carried from batch to batch by position."""

    @section("adversary")
    def begin(self, crops: Groups, generators: Sequence[torch.Generator]) -> None:
        super().begin(crops, generators)
        carried = self.delta or self.fresh()
        self.delta = [ball.project(x, delta, eps=self.eps) for x, delta in zip(self.clean, carried, strict=True)]

    @section("adversary")
    def perturb(self, loss_of: LossOf) -> Groups:  # noqa: ARG002
        self.delta = [delta.detach().requires_grad_() for delta in self.delta]
        return self.moved()

    @section("adversary")
    @torch.no_grad()
    def ascend(self) -> None:
        moved = []
        for x, delta in zip(self.clean, self.delta, strict=True):
            assert delta.grad is not None, "ascend() follows the backward pass of the training loss"
            moved.append(ball.ascend(x, delta.detach(), delta.grad, eps=self.eps, step_size=self.step_size))
        self.delta = moved


def build_adversary(settings: NoAdversary | PgdAdversary | FreeAdversary) -> Adversary:
    """The adversary of a recipe, in its initial state."""
    match settings:
        case NoAdversary():
            return Adversary()
        case PgdAdversary():
            return Pgd(settings)
        case FreeAdversary():
            return Free(settings)
        case _:
            assert_never(settings)


def ascend_loss(
    loss_of: LossOf, clean: Sequence[Tensor], start: Sequence[Tensor], *, eps: float, step_size: float, steps: int
) -> Groups:
    """PGD on any loss of groups of images: `steps` projected sign steps from `start`.

    Args:
        loss_of: From the moved groups to the scalar to ascend.
        clean: Groups of images in [0, 1].
        start: One perturbation a group.
        eps: L-inf radius.
        step_size: Length of a step.
        steps: K.

    Returns:
        One perturbation a group, detached. No gradient of a parameter is computed: autograd prunes what leads to none
        of the perturbations.
    """
    delta = [part.detach() for part in start]
    for _ in range(steps):
        delta = [part.requires_grad_() for part in delta]
        loss = loss_of([x + part for x, part in zip(clean, delta, strict=True)])
        with section("backward"):
            gradients = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta = [
                ball.ascend(x, part.detach(), gradient, eps=eps, step_size=step_size)
                for x, part, gradient in zip(clean, delta, gradients, strict=True)
            ]
    return delta
