"""FGSM, PGD with restarts, and PGD on the representation.

Goodfellow et al., arXiv:1412.6572; Madry et al., arXiv:1706.06083. PGD counts a sample as fooled at the first step that
misclassifies it, and stops there: more steps can never help the defender, and easy samples cost little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cfamc_cli.engine.attacks.search import Predict, Region, Roster, blend, climb, fooled, logits_at, steepest, take
from cfamc_cli.engine.ball import Norm, norms, per_sample, random_start

Start = Literal["zero", "random"]


@dataclass
class _Climb:
    """Per-sample state of a PGD run, n rows."""

    region: Region
    y: Tensor
    points: Tensor
    done: Tensor


def _cross_entropy_of(y: Tensor) -> Callable[[Tensor], Tensor]:
    """The cross-entropy as a function of the logits alone, one value per sample."""
    return lambda z: cross_entropy(z, y, reduction="none")


def fgsm(predict: Predict, x: Tensor, y: Tensor, *, eps: float, norm: Norm = "linf") -> Tensor:
    """One step of length eps along the gradient of the cross-entropy.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1], (N, C, H, W).
        y: Labels, (N,).
        eps: Radius of the ball.
        norm: Its norm.

    Returns:
        Points of the ball and the box, (N, C, H, W).

    Source: Goodfellow et al., arXiv:1412.6572, section 4.
    """
    if eps == 0 or len(x) == 0:
        return x.clone()
    _, _, grad = climb(predict, x, _cross_entropy_of(y))
    return Region.around(x, eps=eps, norm=norm).project(x + eps * steepest(grad, norm=norm))


def pgd(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    step_size: float,
    steps: int,
    restarts: int,
    start: Start,
    generator: torch.Generator,
) -> Tensor:
    """Projected steepest ascent on the cross-entropy, repeated on the samples that still stand.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1], (N, C, H, W).
        y: Labels, (N,).
        eps: Radius of the ball.
        norm: Its norm.
        step_size: Length of a step, in the units of eps.
        steps: Steps of each run.
        restarts: Runs. With start "zero" the first run starts at x and the others at random.
        start: "zero" begins at x, "random" at a point drawn uniformly from the ball.
        generator: CPU generator of the random starts.

    Returns:
        The first misclassified point met, or the last point where none was, (N, C, H, W).

    Source: Madry et al., arXiv:1706.06083.
    """
    result = x.clone()
    alive = torch.arange(len(x), device=x.device)
    if eps == 0:
        return result
    for restart in range(restarts):
        if len(alive) == 0:
            break
        first = torch.zeros_like(x)
        if restart > 0 or start == "random":
            first = random_start(x, eps=eps, norm=norm, generator=generator)  # for all of x: see the module `search`
        points, done = _pgd_run(
            predict, Region.around(x[alive], eps=eps, norm=norm), y[alive], (x + first)[alive], step_size, steps
        )
        result[alive] = points
        alive = alive[~done]
    return result


def _pgd_run(
    predict: Predict, region: Region, y: Tensor, points: Tensor, step_size: float, steps: int
) -> tuple[Tensor, Tensor]:
    """One run from `points`: the points it ends with, and which of them are misclassified."""
    roster = Roster(region.x)
    missed = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    state = _Climb(region, y, region.project(points), missed.clone())
    for step in range(steps + 1):
        if step < steps:
            logits, _, grad = climb(predict, state.points, _cross_entropy_of(state.y))
        else:
            logits = logits_at(predict, state.points)
        state.done = state.done | fooled(logits, state.y)
        missed[roster.index] = state.done
        if step == steps:
            break
        ahead = state.region.project(state.points + step_size * steepest(grad, norm=region.norm))
        state.points = blend(state.done, state.points, ahead)
        rows = roster.settle(state.points, state.done, step=step)
        if rows is not None:
            state = take(state, rows)
            if len(rows) == 0:
                break
    return roster.close(state.points), missed


def embedding_pgd(
    embed: Predict,
    x: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    step_size: float,
    steps: int,
    restarts: int,
    generator: torch.Generator,
) -> Tensor:
    """Move the representation as far as possible from that of the clean image, without labels.

    The ascended distance is Euclidean between the two unit-length embeddings, so that it says the same for an encoder
    that normalises as for one that does not. At x itself its gradient vanishes: every run starts at random.

    Args:
        embed: Embeddings or features from images, (N, D).
        x: Clean images in [0, 1], (N, C, H, W).
        eps: Radius of the ball.
        norm: Its norm.
        step_size: Length of a step, in the units of eps.
        steps: Steps of each run.
        restarts: Runs; the furthest point of all is returned.
        generator: CPU generator of the random starts.

    Returns:
        The point with the most distant embedding met, (N, C, H, W).
    """
    best = x.clone()
    if eps == 0 or len(x) == 0:
        return best
    region = Region.around(x, eps=eps, norm=norm)
    clean = _unit(logits_at(embed, x))  # (N, D)
    furthest = torch.zeros(len(x), device=x.device)
    for _ in range(restarts):
        points = region.project(x + random_start(x, eps=eps, norm=norm, generator=generator))
        for step in range(steps + 1):
            if step < steps:
                _, distance, grad = climb(embed, points, lambda z: (_unit(z) - clean).square().sum(1))
            else:
                distance = (_unit(logits_at(embed, points)) - clean).square().sum(1)
            better = distance > furthest
            best = blend(better, points, best)
            furthest = torch.where(better, distance, furthest)
            if step < steps:
                points = region.project(points + step_size * steepest(grad, norm=norm))
    return best


def _unit(z: Tensor) -> Tensor:
    """Rows of unit length, (N, D)."""
    return z / per_sample(norms(z, norm="l2"), z).clamp_min(1e-12)
