"""What attacks maximise: functions of the logits, one value per sample, larger where the label is further from winning.

Symbols: z the logits (N, classes), y the label, t the target class, z_(1) >= z_(2) >= ... the sorted logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, assert_never

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Loss = Literal["apgd-ce", "apgd-dlr", "apgd-t"]  # as the attacks that ascend them are called in a recipe

_TINY = 1e-12


def label_margin(z: Tensor, y: Tensor) -> Tensor:
    """z_y minus the largest other logit, (N,): negative where the label has lost."""
    own = z.gather(1, y[:, None])
    return (own - z.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)).squeeze(1)


def dlr(z: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: minus the margin over z_(1) - z_(3), which makes it blind to scale and shift.

    Args:
        z: Logits, (N, classes). With two classes z_(3) does not exist, the ratio would be +-1 everywhere, and the
            plain negative margin is used.
        y: Labels, (N,).

    Returns:
        The loss, (N,); positive where the sample is misclassified.

    Source: Croce & Hein, arXiv:2003.01690, eq. 6.
    """
    if z.shape[1] < 3:
        return -label_margin(z, y)
    top = z.topk(3, dim=1).values
    return -label_margin(z, y) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_dlr(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio: -(z_y - z_t) over z_(1) - (z_(3) + z_(4)) / 2.

    Args:
        z: Logits, (N, classes). With three classes the denominator is z_(1) - z_(3); with two it is 1.
        y: Labels, (N,).
        target: Classes to be reached, (N,).

    Returns:
        The loss, (N,); positive where the target beats the label.

    Source: Croce & Hein, arXiv:2003.01690, eq. 7.
    """
    gap = (z.gather(1, target[:, None]) - z.gather(1, y[:, None])).squeeze(1)
    if z.shape[1] < 3:
        return gap
    top = z.topk(min(4, z.shape[1]), dim=1).values
    return gap / (top[:, 0] - top[:, 2:].mean(1) + _TINY)


def loss_of(loss: Loss, y: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of the given name as a function of the logits alone; `target` matters to the targeted one only."""
    match loss:
        case "apgd-ce":
            return partial(cross_entropy, target=y, reduction="none")
        case "apgd-dlr":
            return partial(dlr, y=y)
        case "apgd-t":
            return partial(targeted_dlr, y=y, target=target)
        case _:
            assert_never(loss)


def ranked_targets(z: Tensor, y: Tensor, *, count: int) -> Tensor:
    """The `count` likeliest classes other than the label, likeliest first, (N, min(count, classes - 1))."""
    order = z.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order[:, : min(count, z.shape[1] - 1)]
