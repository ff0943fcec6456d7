"""Auto-PGD: ascent with momentum whose step halves where it stops paying.

Croce & Hein, arXiv:2003.01690, algorithm 1. Symbols: eta the step size, w_j the checkpoints at which eta may be
halved, rho the share of rising steps below which it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.objectives import Loss, loss_of, ranked_targets
from cfamc_cli.engine.attacks.search import Predict, Region, Roster, blend, climb, fooled, logits_at, rows_where
from cfamc_cli.engine.ball import norms, per_sample, steepest
from cfamc_cli.engine.device import move

_MOMENTUM = 0.75  # alpha of the paper: the share of the new step
_RHO = 0.75


@dataclass
class _Ascent:
    """Per-sample state of an APGD run, n rows."""

    region: Region
    y: Tensor
    target: Tensor
    points: Tensor
    previous: Tensor
    grad: Tensor
    loss: Tensor
    best: Tensor  # the point of the highest loss so far
    best_grad: Tensor
    best_loss: Tensor
    checked_loss: Tensor  # best_loss at the last checkpoint
    eta: Tensor
    rises: Tensor  # steps since the last checkpoint that raised the loss
    halved: Tensor  # whether the last checkpoint halved eta
    done: Tensor


def checkpoints(steps: int) -> tuple[int, ...]:
    """The steps w_1 < w_2 < ... < steps after which the step size may be halved.

    Counted in hundredths, so that rounding never moves a checkpoint.

    Source: arXiv:2003.01690, section 3: p_0 = 0, p_1 = .22, p_(j+1) = p_j + max(p_j - p_(j-1) - .03, .06) and
        w_j = ceil(p_j steps).
    """
    marks, before, at = [], 0, 22
    while at < 100:
        marks.append(math.ceil(at * steps / 100))
        before, at = at, at + max(at - before - 3, 6)
    return tuple(sorted(set(marks)))


def apgd(
    predict: Predict,
    region: Region,
    y: Tensor,
    *,
    loss: Loss,
    steps: int,
    restarts: int,
    targets: int,
    eot: int,
    generator: torch.Generator,
) -> Tensor:
    """Auto-PGD on a loss of the logits; only samples that still stand go into the next restart or target.

    Args:
        predict: Logits from images.
        region: What the points may be, around N clean images.
        y: Labels, (N,).
        loss: "apgd-ce", "apgd-dlr" or the targeted "apgd-t".
        steps: Steps of each run.
        restarts: Runs (of each target).
        targets: How many of the likeliest wrong classes a targeted loss aims at, one after the other; at most
            classes - 1 of them exist. Without effect, and to be 1, for the other losses.
        eot: Passes that are averaged for each gradient, for randomised predictors.
        generator: CPU generator of the random starts.

    Returns:
        A misclassified point where one was met, else the point of the highest loss of the last run, (N, C, H, W).
        With `eot` above 1 always the latter: a point that was just crossed is right again in the next draw.

    Source: Croce & Hein, arXiv:2003.01690, algorithm 1.
    """
    result = region.x.clone()
    if region.eps == 0 or len(y) == 0:
        return result
    clean = logits_at(predict, region.x)
    alive = rows_where(~fooled(clean, y))
    aims = ranked_targets(clean, y, count=targets) if loss == "apgd-t" else y[:, None]  # (N, aims)
    for aim in aims.T:
        for _ in range(restarts):
            if len(alive) == 0:
                return result
            start = _start(region, generator)[alive]
            result[alive], done = _run(predict, region.take(alive), y[alive], aim[alive], start, loss, steps, eot)
            alive = alive[rows_where(~done)]
    return result


def _start(region: Region, generator: torch.Generator) -> Tensor:
    """A point on the sphere of radius eps around each image, before the box; drawn on the CPU for every sample."""
    shape, norm = region.x.shape, region.norm
    drawn = (
        torch.rand(shape, generator=generator) * 2 - 1 if norm == "linf" else torch.randn(shape, generator=generator)
    )
    drawn = drawn / per_sample(norms(drawn, norm=norm), drawn).clamp_min(1e-12)
    return region.x + region.eps * move(drawn, region.x.device)


def _run(
    predict: Predict, region: Region, y: Tensor, target: Tensor, points: Tensor, loss: Loss, steps: int, eot: int
) -> tuple[Tensor, Tensor]:
    """One run from `points`: the points it ends with, and which of them are misclassified."""
    norm = region.norm
    roster = Roster(region.x)
    missed = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    points = region.project(points)
    logits, value, grad = climb(predict, points, loss_of(loss, y, target), passes=eot)
    s = _Ascent(
        region=region,
        y=y,
        target=target,
        points=points,
        previous=points,
        grad=grad,
        loss=value,
        best=points,
        best_grad=grad,
        best_loss=value,
        checked_loss=value,
        eta=torch.full_like(value, 2 * region.eps),
        rises=torch.zeros_like(value),
        halved=torch.ones_like(missed),
        done=fooled(logits, y) & (eot == 1),
    )
    missed |= fooled(logits, y)
    marks, last_mark = checkpoints(steps), 0
    for step in range(1, steps + 1):
        s = roster.settle(s, step=step - 1)
        if len(s.done) == 0:
            break

        ahead = s.region.project(s.points + per_sample(s.eta, s.points) * steepest(s.grad, norm=norm))
        if step > 1:
            ahead = s.points + _MOMENTUM * (ahead - s.points) + (1 - _MOMENTUM) * (s.points - s.previous)
            ahead = s.region.project(ahead)
        s.points, s.previous = blend(s.done, s.points, ahead), s.points

        logits, value, s.grad = climb(predict, s.points, loss_of(loss, s.y, s.target), passes=eot)
        crossed = fooled(logits, s.y)
        s.done = s.done | (crossed & (eot == 1))
        missed[roster.index] |= crossed
        s.rises = s.rises + (value > s.loss)
        s.loss = value
        better = value > s.best_loss
        s.best, s.best_grad = blend(better, s.points, s.best), blend(better, s.grad, s.best_grad)
        s.best_loss = torch.where(better, value, s.best_loss)

        if step in marks:
            stuck = ~s.halved & (s.best_loss <= s.checked_loss)
            halve = ((s.rises < _RHO * (step - last_mark)) | stuck) & ~s.done
            s.eta = torch.where(halve, s.eta / 2, s.eta)
            s.points, s.grad = blend(halve, s.best, s.points), blend(halve, s.best_grad, s.grad)
            s.halved, s.checked_loss, s.rises, last_mark = halve, s.best_loss, torch.zeros_like(s.rises), step
    return roster.close(blend(s.done, s.points, s.best)), missed
