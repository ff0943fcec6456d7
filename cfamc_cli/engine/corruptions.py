"""The set "cfamc-corruptions-1": ten kinds of corruption at five severities, made here and of no publication.

Most kinds and severities follow the digital ones of Hendrycks & Dietterich, arXiv:1903.12261, at the sizes that they
have for 32 pixels, but kernels are batched and of our own: numbers are not those of CIFAR-10-C. Every image has a field
of normal noise for each kind and severity, drawn from its place in the split, so that it looks alike in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from cfamc_cli.engine.ball import per_sample
from cfamc_cli.engine.randomness import addressed_generator

NAME: Final = "cfamc-corruptions-1"
SEVERITIES: Final = (1, 2, 3, 4, 5)
_STREAKS = 9  # copies of an image that make up a motion blur
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601

# Images (N, 3, H, W) in [0, 1], their noise, as images, and the strength -> corrupted images, before the box
_Kernel = Callable[[Tensor, Tensor, float], Tensor]


def _share(noise: Tensor) -> Tensor:
    """Normal noise as uniform noise in (0, 1)."""
    return 0.5 * (1 + torch.erf(noise / 2**0.5))


def _impulses(x: Tensor, noise: Tensor, share: float) -> Tensor:
    u = _share(noise)
    return torch.where(u < share / 2, 0.0, torch.where(u > 1 - share / 2, 1.0, x))


def _blurred(x: Tensor, sigma: float) -> Tensor:
    sigma = sigma * x.shape[-1] / 32
    blurred: Tensor = V.gaussian_blur(x, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma, sigma])
    return blurred


def _moved(x: Tensor, shift: Tensor) -> Tensor:
    """Each pixel from where it is shifted to, (N, H, W, 2) across and down, in pixels of an image of 32."""
    identity = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(identity, list(x.shape), align_corners=False) + shift / 16
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _motion(x: Tensor, noise: Tensor, reach: float) -> Tensor:
    angle = math.pi * _share(noise[:, 0, 0, 0])
    way = torch.stack((angle.cos(), angle.sin()), 1)[:, None, None]  # (N, 1, 1, 2)
    return torch.stack([_moved(x, at * way) for at in torch.linspace(-reach, reach, _STREAKS).tolist()]).mean(0)


def _elastic(x: Tensor, noise: Tensor, reach: float) -> Tensor:
    field = _blurred(noise[:, :2], 4.0)
    field = field / per_sample(field.flatten(1).std(1), field)
    return _moved(x, reach * field.permute(0, 2, 3, 1))


def _pixelated(x: Tensor, _noise: Tensor, share: float) -> Tensor:
    tiles = F.interpolate(x, [side // 4 for side in x.shape[2:]], mode="area")
    return x + share * (F.interpolate(tiles, x.shape[2:], mode="nearest-exact") - x)


def _grey(x: Tensor) -> Tensor:
    return (x * torch.tensor(_GREY, device=x.device)[:, None, None]).sum(1, keepdim=True)


_KERNELS: Mapping[str, tuple[_Kernel, tuple[float, ...]]] = {  # with the strength at each severity
    "gaussian-noise": (lambda x, noise, sigma: x + sigma * noise, (0.04, 0.06, 0.08, 0.09, 0.1)),
    # photons, in the normal approximation
    "shot-noise": (lambda x, noise, photons: x + (x / photons).sqrt() * noise, (500, 250, 100, 75, 50)),
    "impulse-noise": (_impulses, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian-blur": (lambda x, _, sigma: _blurred(x, sigma), (0.4, 0.6, 0.7, 0.8, 1)),
    "motion-blur": (_motion, (0.8, 1.2, 1.6, 2.0, 2.6)),
    "pixelate": (_pixelated, (0.2, 0.35, 0.5, 0.7, 1.0)),  # how much of tiles of 4 x 4
    "elastic": (_elastic, (0.4, 0.7, 1.0, 1.3, 1.6)),
    "contrast": (lambda x, _, c: (m := x.mean((2, 3), keepdim=True)) + c * (x - m), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (lambda x, _, more: x + more, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "saturate": (lambda x, _, c: (g := _grey(x)) + c * (x - g), (1.5, 2, 2.5, 3.5, 5)),
}
KINDS: Final = tuple(_KERNELS)


def corrupted(x: Tensor, places: Tensor, *, kind: str, severity: int) -> Tensor:
    """Corrupt images, each in its own way.

    Args:
        x: (N, 3, H, W) in [0, 1].
        places: (N,) their places in the split, which with kind and severity fix their noise.
        kind: One of `KINDS`.
        severity: 1 to 5.

    Returns:
        (N, 3, H, W), in whole 255ths of [0, 1], as a file would hold them.
    """
    drawn = (addressed_generator(NAME, kind, severity, place) for place in places.tolist())
    noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in drawn]).to(x.device)
    kernel, strengths = _KERNELS[kind]
    made: Tensor = (kernel(x, noise, strengths[severity - 1]).clamp(0, 1) * 255).round() / 255
    return made
