"""LARS around SGD with Nesterov momentum, and learning rates as pure functions of the weight update.

You et al., arXiv:1708.03888. Symbols: w weights, g gradient, wd weight decay, r the trust ratio of a parameter.
Everything stays on the device: a step never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from cfamc_cli.engine.sections import section
from cfamc_cli.recipe.schema import Cosine, Lars, OfficialCosine


class LarsOptimizer:
    """SGD with momentum whose gradients are first scaled per parameter.

    Parameters of two or more dimensions get g <- r (g + wd w) with
    r = min(trust |w| / (|g| + wd |w| + 1e-8) / lr, 1), untouched where a norm is 0; one-dimensional ones get neither
    the ratio nor weight decay.

    Attributes:
        momentum: One buffer a parameter, in the order of `parameters`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: Lars) -> None:
        self.parameters = list(parameters)
        self.settings = settings
        self.momentum = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]
        self._scaled = [index for index, p in enumerate(self.parameters) if p.dim() > 1]

    @section("optimizer")
    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @section("optimizer")
    def gradient_norm(self) -> Tensor:
        """The L2 norm of the whole gradient, a scalar on the device."""
        result: Tensor = torch.stack(torch._foreach_norm(self._gradients())).norm()
        return result

    @section("optimizer")
    @torch.no_grad()
    def step(self, *, lr: float) -> None:
        """Update the weights with the gradients they carry."""
        settings = self.settings
        gradients = self._gradients()
        if self._scaled:
            weights = [self.parameters[index].data for index in self._scaled]
            scaled = self._trusted(weights, [gradients[index] for index in self._scaled], lr=lr)
            for index, gradient in zip(self._scaled, scaled, strict=True):
                gradients[index] = gradient
        torch._foreach_mul_(self.momentum, settings.momentum)
        torch._foreach_add_(self.momentum, gradients)
        update = torch._foreach_add(gradients, self.momentum, alpha=settings.momentum) if settings.nesterov else None
        torch._foreach_add_([p.data for p in self.parameters], update or self.momentum, alpha=-lr)

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def _trusted(self, weights: list[Tensor], gradients: list[Tensor], *, lr: float) -> list[Tensor]:
        settings = self.settings
        w_norm = torch.stack(torch._foreach_norm(weights))
        g_norm = torch.stack(torch._foreach_norm(gradients))
        ratio = settings.trust_coefficient * w_norm / (g_norm + settings.weight_decay * w_norm + 1e-8)
        if settings.clip:
            ratio = (ratio / lr).clamp_max(1.0)
        touched = (w_norm > 0) & (g_norm > 0)
        ratio = torch.where(touched, ratio, 1.0)
        decay = torch.where(touched, torch.full_like(w_norm, settings.weight_decay), 0.0)
        decayed = torch._foreach_add(gradients, torch._foreach_mul(weights, list(decay.unbind())))
        return list(torch._foreach_mul(decayed, list(ratio.unbind())))


def learning_rate(
    step: int, *, base: float, schedule: Cosine | OfficialCosine, updates: int, replays: int = 1
) -> float:
    """The learning rate of weight update `step`, counted from 0.

    Args:
        step: 0 to updates - 1.
        base: The recipe's lr.
        schedule: "cosine" falls to zero over all updates after a linear rise; "official-cosine" has the period of
            updates / replays, so that lr rises again (an error of the official free scripts, for reproduction).
        updates: Weight updates of the whole run.
        replays: m.

    Source: Loshchilov and Hutter, arXiv:1608.03983, eq. 5 without restarts.
    """
    match schedule:
        case Cosine(warmup=warmup):
            if step < warmup:
                return base * (step + 1) / warmup
            return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, updates - warmup)))
        case OfficialCosine():
            return base * 0.5 * (1 + math.cos(math.pi * step / (updates / replays)))
        case _:
            assert_never(schedule)
