"""LARS around SGD with Nesterov momentum, AdamW, and learning rates as pure functions of the weight update.

You et al., arXiv:1708.03888; Loshchilov and Hutter, arXiv:1711.05101. Symbols: w weights, g gradient, wd weight decay,
r the trust ratio of a parameter, n weight updates. Everything stays on the device: a step never waits for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from cfamc_cli.engine.sections import section
from cfamc_cli.recipe.schema import AdamW, Cosine, Lars, OfficialCosine

_ROW = 1024  # numbers that one entry of a ratio serves at once; padding to whole rows costs next to nothing


class Optimizer(ABC):
    """Updates parameters by the gradients that they carry.

    Attributes:
        momentum: What is carried from update to update: buffers in the order of `parameters`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, buffers: int) -> None:
        """Begin with so many `buffers` of zeros a parameter."""
        self.parameters = list(parameters)
        self.momentum = [
            torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(buffers) for p in self.parameters
        ]

    @section("optimizer")
    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @abstractmethod
    def step(self, *, lr: float) -> Tensor:
        """Update the weights with the gradients they carry, and return the L2 norm of the whole gradient.

        The norm is a scalar on the device.
        """

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]


def build_optimizer(parameters: Sequence[nn.Parameter], settings: Lars | AdamW) -> Optimizer:
    """The optimizer that a recipe asks for, before its first update."""
    match settings:
        case Lars():
            return LarsOptimizer(parameters, settings)
        case AdamW():
            return AdamWOptimizer(parameters, settings)
        case _:
            assert_never(settings)


class LarsOptimizer(Optimizer):
    """SGD with momentum whose gradients are first scaled per parameter.

    Parameters of two or more dimensions get g <- r (g + wd w) with
    r = min(trust |w| / (|g| + wd |w| + 1e-8) / lr, 1), untouched where a norm is 0; one-dimensional ones get neither
    the ratio nor weight decay.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: Lars) -> None:
        super().__init__(parameters, buffers=1)
        self.settings = settings
        self._scaled = [index for index, p in enumerate(self.parameters) if p.dim() > 1]
        self._rows = [math.ceil(self.parameters[index].numel() / _ROW) for index in self._scaled]
        if self._scaled:
            device = self.parameters[0].device
            owner = torch.arange(len(self._scaled)).repeat_interleave(torch.tensor(self._rows))
            self._owner = owner.to(device)  # of each row, the place of its parameter among the scaled ones
            self._places = torch.tensor(self._scaled, device=device)

    @section("optimizer")
    @torch.no_grad()
    def step(self, *, lr: float) -> Tensor:
        settings, gradients = self.settings, self._gradients()
        weights = [self.parameters[index].detach() for index in self._scaled]
        norms = torch.stack(torch._foreach_norm([*gradients, *weights]))
        g_norms, w_norms = norms.split([len(gradients), len(weights)])
        if weights:
            ratio = self._ratio(w_norms, g_norms.index_select(0, self._places), lr=lr)
            decayed = self._decayed(weights, [gradients[index] for index in self._scaled], ratio)
            for index, gradient in zip(self._scaled, decayed, strict=True):
                gradients[index] = gradient
        torch._foreach_mul_(self.momentum, settings.momentum)
        torch._foreach_add_(self.momentum, gradients)
        update = torch._foreach_add(gradients, self.momentum, alpha=settings.momentum) if settings.nesterov else None
        torch._foreach_add_([p.detach() for p in self.parameters], update or self.momentum, alpha=-lr)
        result: Tensor = g_norms.norm()
        return result

    def _ratio(self, w_norm: Tensor, g_norm: Tensor, *, lr: float) -> Tensor:
        """The ratio r of each scaled parameter; 0 leaves a weight without gradient alone, decay included."""
        settings = self.settings
        ratio = settings.trust_coefficient * w_norm / (g_norm + settings.weight_decay * w_norm + 1e-8)
        if settings.clip:
            ratio = (ratio / lr).clamp_max(1.0)
        return ratio.masked_fill_(g_norm == 0, 0.0).masked_fill_(w_norm == 0, 1.0)

    def _decayed(self, weights: list[Tensor], gradients: list[Tensor], ratio: Tensor) -> list[Tensor]:
        """The gradient r (g + wd w) of each scaled parameter.

        All lie in one buffer, each from a row of its own on: so its ratio is one product for all of them. A list of
        scalars on the device would cost a launch a parameter.
        """
        buffer = ratio.new_empty(len(self._owner), _ROW)
        parts = [
            part.as_strided(w.shape, w.stride()) for part, w in zip(buffer.split(self._rows), weights, strict=True)
        ]
        torch._foreach_copy_(parts, weights)
        buffer.mul_(self.settings.weight_decay)
        torch._foreach_add_(parts, gradients)
        buffer.mul_(ratio.index_select(0, self._owner)[:, None])
        return parts


class AdamWOptimizer(Optimizer):
    """Steps of about lr in each weight: the mean of gradients over the root of the mean of their squares.

    m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2; then, with n counting this update,
    w <- (1 - lr wd) w - lr m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + 1e-8). One-dimensional parameters get no
    weight decay. `momentum` holds every m, every v, and n.

    Source: arXiv:1711.05101, algorithm 2, where lr takes the place of both alpha and eta.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: AdamW) -> None:
        super().__init__(parameters, buffers=2)
        self.settings = settings
        self.momentum.append(torch.zeros((), dtype=torch.int64, device="cpu"))  # read without waiting for a device

    @section("optimizer")
    @torch.no_grad()
    def step(self, *, lr: float) -> Tensor:
        beta1, beta2, decay = self.settings.beta1, self.settings.beta2, self.settings.weight_decay
        gradients, weights = self._gradients(), [p.detach() for p in self.parameters]
        means, squares = self.momentum[: len(weights)], self.momentum[len(weights) : -1]
        n = int(self.momentum[-1].add_(1))
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_div_(sizes, math.sqrt(1 - beta2**n))
        torch._foreach_add_(sizes, 1e-8)
        torch._foreach_mul_(weights, [1 - lr * decay if w.dim() > 1 else 1.0 for w in weights])
        torch._foreach_addcdiv_(weights, means, sizes, -lr / (1 - beta1**n))
        result: Tensor = torch.stack(torch._foreach_norm(gradients)).norm()
        return result


def learning_rate(
    step: int, *, base: float, schedule: Cosine | OfficialCosine, updates: int, replays: int = 1
) -> float:
    """The learning rate of weight update `step`, counted from 0.

    Args:
        step: 0 to updates - 1.
        base: The recipe's lr.
        schedule: "cosine" falls to its end over all updates after a linear rise; "official-cosine" has the period of
            updates / replays, so that lr rises again (an error of the official free scripts, for reproduction).
        updates: Weight updates of the whole run.
        replays: m.

    Source: Loshchilov and Hutter, arXiv:1608.03983, eq. 5 without restarts.
    """
    match schedule:
        case Cosine(warmup=warmup, end=end):
            if step < warmup:
                return base * (step + 1) / warmup
            fallen = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, updates - warmup)))
            return base * (end + (1 - end) * fallen)
        case OfficialCosine():
            return base * 0.5 * (1 + math.cos(math.pi * step / (updates / replays)))
        case _:
            assert_never(schedule)
