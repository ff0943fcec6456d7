"""The L-inf and L2 balls of radius eps around images in [0, 1], shared by training and evaluation.

Symbols: x the clean images, delta the perturbation, eps the radius, all in units of the image range [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfamc_cli.engine.device import move
from cfamc_cli.recipe.schema import Norm


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (N,) values so that they broadcast over the N samples of `like` (N, ...)."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def norms(delta: Tensor, *, norm: Norm) -> Tensor:
    """The norm of each sample of delta (N, ...): (N,), in the units of delta."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def project(x: Tensor, delta: Tensor, *, eps: float, norm: Norm = "linf") -> Tensor:
    """The perturbation nearest to `delta` that keeps x + delta in the ball and in the box [0, 1].

    Args:
        x: Clean images in [0, 1], (N, ...).
        delta: Perturbation of the same shape.
        eps: Radius of the ball.
        norm: "linf" or "l2". For L2 the ball comes first, then the box, which only shrinks delta.

    Returns:
        delta within the ball and with x + delta in [0, 1].
    """
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        size = per_sample(norms(delta, norm=norm), delta)
        delta = delta * (eps / size.clamp_min(1e-12)).clamp_max(1.0)
    return (x + delta).clamp(0, 1) - x


def steepest(grad: Tensor, *, norm: Norm) -> Tensor:
    """The direction of unit length in `norm` along which a linear function rises fastest, as grad."""
    return grad.sign() if norm == "linf" else grad / per_sample(norms(grad, norm=norm), grad).clamp_min(1e-12)


def ascend(x: Tensor, delta: Tensor, grad: Tensor, *, eps: float, step_size: float, norm: Norm = "linf") -> Tensor:
    """One projected step of steepest ascent of length `step_size` along `grad` (Madry et al., arXiv:1706.06083)."""
    return project(x, delta + step_size * steepest(grad, norm=norm), eps=eps, norm=norm)


def random_start(x: Tensor, *, eps: float, generator: torch.Generator, norm: Norm = "linf") -> Tensor:
    """A perturbation drawn uniformly from the ball, on the generator's device, then cut to the box."""
    drawn_on = generator.device
    if norm == "linf":
        delta = (torch.rand(x.shape, generator=generator, device=drawn_on) * 2 - 1) * eps
    else:
        direction = torch.randn(x.shape, generator=generator, device=drawn_on)
        direction = direction / per_sample(norms(direction, norm="l2"), direction).clamp_min(1e-12)
        radius = torch.rand(x.shape[0], generator=generator, device=drawn_on) ** (1 / x[0].numel())
        delta = direction * per_sample(radius, direction) * eps
    return project(x, move(delta.to(x.dtype), x.device), eps=eps, norm=norm)
