"""FGSM, PGD with restarts, and PGD on the representation.

Goodfellow et al., arXiv:1412.6572; Madry et al., arXiv:1706.06083. PGD counts a sample as fooled at the first step that
misclassifies it, and stops there: more steps can never help the defender, and easy samples cost little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cfamc_cli.engine.attacks.search import Predict, Region, Roster, blend, climb, fooled, logits_at, rows_where
from cfamc_cli.engine.ball import norms, per_sample, random_start, steepest

Start = Literal["zero", "random"]
Objective = Callable[[Tensor, Tensor], Tensor]  # samples (n,) and their outputs -> one value each, (n,)
Look = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # samples, points, outputs, values -> who is done, (n,) bool


@dataclass
class _Climb:
    """Per-sample state of an ascent, n rows."""

    region: Region
    points: Tensor
    done: Tensor


def projected_ascent(
    predict: Predict,
    region: Region,
    points: Tensor,
    *,
    objective: Objective,
    look: Look,
    step_size: float,
    steps: int,
) -> Tensor:
    """Projected steepest ascent, of which every use of PGD in an evaluation is one.

    Args:
        predict: Outputs from images.
        region: What the points may be, around N clean images.
        points: Where the ascent begins, (N, C, H, W).
        objective: What is ascended. It and `look` get the indices of the n samples that are still worked on.
        look: Called at the beginning and after each step; a sample that it calls done stays where it is.
        step_size: Length of a step in the norm of the region.
        steps: Number of steps.

    Returns:
        The last point of each sample, (N, C, H, W).

    Source: Madry et al., arXiv:1706.06083.
    """
    roster = Roster(region.x)
    s = _Climb(region, region.project(points), torch.zeros(len(points), dtype=torch.bool, device=points.device))
    for step in range(steps):
        outputs, values, grad = climb(predict, s.points, partial(objective, roster.index))
        s.done = s.done | look(roster.index, s.points, outputs, values)
        ahead = s.region.project(s.points + step_size * steepest(grad, norm=region.norm))
        s.points = blend(s.done, s.points, ahead)
        s = roster.settle(s, step=step)
        if len(s.done) == 0:
            break
    else:
        outputs = logits_at(predict, s.points)
        look(roster.index, s.points, outputs, objective(roster.index, outputs))
    return roster.close(s.points)


def fgsm(predict: Predict, region: Region, y: Tensor) -> Tensor:
    """One step of length eps along the gradient of the cross-entropy.

    Args:
        predict: Logits from images.
        region: What the points may be, around N clean images.
        y: Labels, (N,).

    Returns:
        Points of the ball and the box, (N, C, H, W).

    Source: Goodfellow et al., arXiv:1412.6572, section 4.
    """
    if region.eps == 0 or len(y) == 0:
        return region.x.clone()
    _, _, grad = climb(predict, region.x, lambda z: cross_entropy(z, y, reduction="none"))
    return region.project(region.x + region.eps * steepest(grad, norm=region.norm))


def pgd(
    predict: Predict,
    region: Region,
    y: Tensor,
    *,
    step_size: float,
    steps: int,
    restarts: int,
    start: Start,
    generator: torch.Generator,
    onward: bool = False,
) -> Tensor:
    """Projected steepest ascent on the cross-entropy, repeated on the samples that still stand.

    Args:
        predict: Logits from images.
        region: What the points may be, around N clean images.
        y: Labels, (N,).
        step_size: Length of a step, in the units of eps.
        steps: Steps of each run.
        restarts: Runs. With start "zero" the first run starts at x and the others at random.
        start: "zero" begins at x, "random" at a point drawn uniformly from the ball.
        generator: CPU generator of the random starts.
        onward: Go on to the last step whatever is misclassified, for examples that another network will judge.

    Returns:
        The first misclassified point met, or the last point where none was, (N, C, H, W).

    Source: Madry et al., arXiv:1706.06083.
    """
    result = region.x.clone()
    alive = torch.arange(len(y), device=y.device)
    missed = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    if region.eps == 0:
        return result

    def look(samples: Tensor, _points: Tensor, logits: Tensor, _values: Tensor) -> Tensor:
        if not onward:
            missed[alive[samples]] |= fooled(logits, y[alive[samples]])
        return missed[alive[samples]]

    for restart in range(restarts):
        if restart > 0:
            alive = rows_where(~missed)
        if len(alive) == 0:
            break
        first = torch.zeros_like(region.x)
        if restart > 0 or start == "random":  # drawn for every sample, whoever still stands
            first = random_start(region.x, eps=region.eps, norm=region.norm, generator=generator)
        result[alive] = projected_ascent(
            predict,
            region.take(alive),
            (region.x + first)[alive],
            objective=cross_entropy_of(y[alive]),
            look=look,
            step_size=step_size,
            steps=steps,
        )
    return result


def cross_entropy_of(y: Tensor) -> Objective:
    """The cross-entropy of the logits of some samples, whose labels are among `y`."""
    return lambda samples, logits: cross_entropy(logits, y[samples], reduction="none")


def embedding_pgd(
    embed: Predict, region: Region, *, step_size: float, steps: int, restarts: int, generator: torch.Generator
) -> Tensor:
    """Move the representation as far as possible from that of the clean image, without labels.

    The ascended distance is Euclidean between the two unit-length embeddings, so that it says the same for an encoder
    that normalises as for one that does not. At x itself its gradient vanishes: every run starts at random.

    Args:
        embed: Embeddings or features from images, (N, D).
        region: What the points may be, around N clean images.
        step_size: Length of a step, in the units of eps.
        steps: Steps of each run.
        restarts: Runs; the furthest point of all is returned.
        generator: CPU generator of the random starts.

    Returns:
        The point with the most distant embedding met, (N, C, H, W).
    """
    x = region.x
    best = x.clone()
    if region.eps == 0 or len(x) == 0:
        return best
    clean = _unit(logits_at(embed, x))  # (N, D)
    furthest = torch.zeros(len(x), device=x.device)
    nobody = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def look(_samples: Tensor, points: Tensor, _outputs: Tensor, distance: Tensor) -> Tensor:
        nonlocal best, furthest
        better = distance > furthest
        best, furthest = blend(better, points, best), torch.where(better, distance, furthest)
        return nobody

    for _ in range(restarts):
        projected_ascent(
            embed,
            region,
            x + random_start(x, eps=region.eps, norm=region.norm, generator=generator),
            objective=lambda samples, z: (_unit(z) - clean[samples]).square().sum(1),
            look=look,
            step_size=step_size,
            steps=steps,
        )
    return best


def _unit(z: Tensor) -> Tensor:
    """Rows of unit length, (N, D)."""
    return z / per_sample(norms(z, norm="l2"), z).clamp_min(1e-12)
