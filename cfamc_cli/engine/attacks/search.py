"""What every attack shares: one pass through the predictor, the allowed region, and who is still worked on.

Symbols: x the clean images and `points` the candidates, (N, C, H, W) in [0, 1]; y the labels, (N,); eps the radius in
units of the image range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.together import Member
from cfamc_cli.engine.ball import norms, per_sample, project
from cfamc_cli.recipe.schema import Norm

Predict = Callable[[Tensor], Tensor]  # images in [0, 1], (N, C, H, W) -> logits (N, classes)

_SETTLE_EVERY = 8  # steps between looks at who is done on an accelerator, where each look waits for the device
_WORTH_MOVING = 16  # the state is compacted once one sample in this many is done


@dataclass(frozen=True)
class Region:
    """The points within `eps` of x that are images; every attack stays in it."""

    x: Tensor  # clean images in [0, 1], (N, C, H, W)
    low: Tensor  # lowest allowed value of each pixel (the box alone for L2), as x
    high: Tensor  # highest allowed value of each pixel, as x
    eps: float
    norm: Norm

    @classmethod
    def around(cls, x: Tensor, *, eps: float, norm: Norm) -> Region:
        reach = eps if norm == "linf" else 1.0
        return cls(x, (x - reach).clamp_min(0), (x + reach).clamp_max(1), eps, norm)

    def project(self, points: Tensor) -> Tensor:
        """The point of the region that belongs to each of `points`: ball first, then box."""
        if self.norm == "linf":
            return torch.minimum(torch.maximum(points, self.low), self.high)
        return (self.x + project(self.x, points - self.x, eps=self.eps, norm=self.norm)).clamp(0, 1)

    def distance(self, points: Tensor) -> Tensor:
        """How far each of `points` is from its clean image in the norm of the region, (N,)."""
        return norms(points - self.x, norm=self.norm)

    def take(self, rows: Tensor) -> Region:
        return dataclasses.replace(self, x=self.x[rows], low=self.low[rows], high=self.high[rows])


def rows_where(mask: Tensor) -> Tensor:
    """The rows at which a mask (N,) holds. An accelerator is waited for, so that this is no part of a step."""
    return mask.nonzero().flatten()


class State(Protocol):
    """What an attack knows of the samples it still works on: a dataclass of tensors and regions, a row for each.

    The attack freezes the point of a sample that is done.
    """

    points: Tensor  # (n, C, H, W)
    done: Tensor  # which need no more work, (n,) bool


Rows = TypeVar("Rows", bound=State)


class Roster:
    """The samples an attack still works on, and the point it will return for each sample it was given."""

    def __init__(self, x: Tensor) -> None:
        self.result = x.clone()  # (N, C, H, W)
        self.index = torch.arange(len(x), device=x.device)  # for each remaining row its place in `result`, (n,)

    def settle(self, state: Rows, *, step: int) -> Rows:
        """Put away the points of samples that are done, where dropping their rows is worth it.

        Args:
            state: Of the remaining samples.
            step: The number of the step, so that an accelerator is waited for only now and then.

        Returns:
            The state of the samples that go on, which may be none.
        """
        done = state.done
        if done.device.type != "cpu" and step % _SETTLE_EVERY:
            return state
        count = int(done.sum())
        if count == 0 or (count < len(done) and count * _WORTH_MOVING < len(done)):
            return state
        finished, rows = rows_where(done), rows_where(~done)
        self.result[self.index[finished]] = state.points[finished]
        self.index = self.index[rows]
        assert dataclasses.is_dataclass(state)
        assert not isinstance(state, type)
        parts: dict[str, object] = {}
        for field in dataclasses.fields(state):
            value = getattr(state, field.name)
            parts[field.name] = value.take(rows) if isinstance(value, Region) else value[rows]
        return dataclasses.replace(state, **parts)

    def close(self, points: Tensor) -> Tensor:
        """Put away what is left and return a point for every sample, (N, C, H, W)."""
        self.result[self.index] = points
        return self.result


def logits_at(predict: Predict, points: Tensor) -> Tensor:
    """Logits at `points` without a graph, (N, classes)."""
    with torch.no_grad():
        return predict(points).detach()


def climb(
    predict: Predict, points: Tensor, objective: Callable[[Tensor], Tensor], *, passes: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one backward pass: the objective at `points` and its gradient there.

    Only the derivative with respect to the points is formed, so no parameter receives a `.grad`. A predictor through
    which no gradient flows has gradient zero.

    Args:
        predict: Logits from images.
        points: (N, C, H, W) in [0, 1].
        objective: One value per sample from logits (N, classes), (N,).
        passes: How many passes of a randomised predictor are averaged (EOT, Athalye et al., arXiv:1802.00420).

    Returns:
        Mean logits (N, classes), mean objective (N,), and its gradient (N, C, H, W).
    """
    points = points.detach().requires_grad_()
    logits_sum: Tensor | None = None
    values_sum, grad_sum = torch.zeros(len(points), device=points.device), torch.zeros_like(points)
    for _ in range(passes):
        with torch.enable_grad():
            logits = predict(points)
            values = objective(logits)
        if values.requires_grad:
            grad = _gradient(predict, values, logits, points)
            if grad is not None:
                grad = grad.contiguous()  # convolutions may return another layout, which slows whatever follows
                grad_sum = grad if passes == 1 else grad_sum + grad
        values_sum = values_sum + values.detach()
        logits_sum = logits.detach() if logits_sum is None else logits_sum + logits.detach()
    assert logits_sum is not None, "passes must be at least 1"
    return logits_sum / passes, values_sum / passes, grad_sum / passes if passes > 1 else grad_sum


def _gradient(predict: Predict, values: Tensor, logits: Tensor, points: Tensor) -> Tensor | None:
    """The gradient of the sum of `values` at the points; None where they have no part in it."""
    if isinstance(predict, Member):
        return predict.back(*torch.autograd.grad(values.sum(), logits))
    return torch.autograd.grad(values.sum(), points, allow_unused=True)[0]


def fooled(logits: Tensor, y: Tensor) -> Tensor:
    """Where the largest logit is not the label's, (N,) bool."""
    return logits.argmax(1) != y


def blend(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` for the samples where `condition` (N,) holds and `no` elsewhere, as yes."""
    return torch.where(per_sample(condition, yes), yes, no)
