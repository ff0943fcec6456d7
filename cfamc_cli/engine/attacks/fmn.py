"""FMN: the smallest perturbation that is misclassified, for each sample its own, aimed at one class after the other.

Pintor et al., arXiv:2102.12827. Aimed at whatever class is likeliest, as published, the walk stays at that border; 4 of
23 samples of an encoder had one that was nearer by up to 36 %, and walks of a third of the length to each of the three
likeliest classes found it. Symbols: delta the perturbation, eps the radius to which it is projected at each step, gap
the value of z_y - z_t, t the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.objectives import ranked_targets
from cfamc_cli.engine.attacks.search import Predict, blend, climb, fooled, logits_at
from cfamc_cli.engine.ball import norms, per_sample
from cfamc_cli.recipe.schema import Norm

_STEP = (1.0, 0.01)  # alpha at the first and the last step, L2 length in units of the image range
_GAMMA = (0.05, 0.001)  # by which share eps grows and shrinks


def fmn(predict: Predict, x: Tensor, y: Tensor, *, norm: Norm, steps: int, targets: int) -> Tensor:
    """The nearest misclassified point that walks along the borders met. It draws nothing, and no sample stops early.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1], (N, C, H, W).
        y: Labels, (N,).
        norm: What "near" means.
        steps: Steps of each walk; one pass forward and one back each.
        targets: How many of the likeliest wrong classes are aimed at; at most classes - 1 of them exist.

    Returns:
        A misclassified image of whatever class, or x where none was met, (N, C, H, W).

    Source: Pintor et al., arXiv:2102.12827, algorithm 1, with its decay of both step sizes by a cosine.
    """
    furthest = norms(torch.maximum(x, 1 - x), norm=norm)  # the way to the corner of the box
    best, nearest = x.clone(), furthest
    for target in ranked_targets(logits_at(predict, x), y, count=targets).T:
        delta, eps = torch.zeros_like(x), torch.full_like(nearest, torch.inf)
        found = torch.zeros_like(y, dtype=torch.bool)
        for step in range(steps):
            decay = (1 + math.cos(math.pi * step / steps)) / 2
            alpha, gamma = (last + (first - last) * decay for first, last in (_STEP, _GAMMA))
            logits, gap, grad = climb(predict, x + delta, _gap_to(target, y))
            missed, size = fooled(logits, y), norms(delta, norm=norm)
            better = missed & (size < nearest)
            best, nearest = blend(better, x + delta, best), torch.where(better, size, nearest)
            found = found | missed
            slope = grad.flatten(1).norm(p=1 if norm == "linf" else 2, dim=1).clamp_min(1e-12)
            # beyond the border, not on it: there float32 may never see it crossed
            outside = torch.where(found, eps, size + gap.abs() / slope) * (1 + gamma)
            eps = torch.where(missed, torch.minimum(eps * (1 - gamma), nearest), outside).clamp_max(furthest)
            delta = delta - alpha * grad / per_sample(norms(grad, norm="l2"), grad).clamp_min(1e-12)
            reach = per_sample(eps, delta)
            if norm == "linf":
                delta = delta.clamp(-reach, reach)
            else:
                delta = delta * (reach / per_sample(norms(delta, norm=norm), delta).clamp_min(1e-12)).clamp_max(1)
            delta = (x + delta).clamp(0, 1) - x
    return best


def _gap_to(target: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """How far the label is ahead of a class, one value per sample."""
    return lambda z: (z.gather(1, y[:, None]) - z.gather(1, target[:, None])).squeeze(1)
