"""Square attack: random search over squares, with nothing but the logits.

Andriushchenko et al., arXiv:1912.00049. Symbols: p the share of the image's area that a square covers, h its side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.objectives import label_margin
from cfamc_cli.engine.attacks.search import Predict, Region, Roster, blend, logits_at
from cfamc_cli.engine.ball import norms, per_sample
from cfamc_cli.engine.device import move

_P_INIT = 0.8
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which p is halved
_DRAWN_AT_ONCE = 64  # queries
_TINY = 1e-12


@dataclass
class _Hunt:
    """Per-sample state, n rows."""

    region: Region
    y: Tensor
    points: Tensor
    margin: Tensor
    done: Tensor


def share_of_area(query: int) -> float:
    """The share p at a query, halved at fixed places (arXiv:1912.00049, section 3.2 and supplement B).

    The places are those for a budget of 10,000; like the standard ensemble, a smaller budget does not compress them.
    """
    return float(_P_INIT / 2 ** sum(query > mark for mark in _HALVINGS))


def square(predict: Predict, region: Region, y: Tensor, *, queries: int, generator: torch.Generator) -> Tensor:
    """Random search that keeps a change of one square (two for L2) when it lowers the margin of the label.

    Every sample has squares of its own, drawn for all samples whether or not they are still worked on.

    Args:
        predict: Logits from images; no gradient is taken.
        region: What the points may be, around N clean images.
        y: Labels, (N,).
        queries: Logits that may be asked for, per sample.
        generator: CPU generator.

    Returns:
        The point of the lowest margin met, (N, C, H, W).

    Source: Andriushchenko et al., arXiv:1912.00049, algorithms 1 to 3.
    """
    x, norm = region.x, region.norm
    if region.eps == 0 or len(x) == 0:
        return x.clone()
    n, channels, height, width = x.shape
    clean = label_margin(logits_at(predict, x), y)
    begin = _stripes if norm == "linf" else _tiles
    points = blend(clean < 0, x, begin(region, generator))
    margin = torch.where(clean < 0, clean, label_margin(logits_at(predict, points), y))
    s = _Hunt(region, y, points, margin, margin < 0)
    roster = Roster(x)
    draws = torch.empty(0)
    for query in range(1, queries):
        s = roster.settle(s, step=query - 1)
        if len(s.done) == 0:
            break
        at = (query - 1) % _DRAWN_AT_ONCE
        if at == 0:
            draws = move(torch.rand((_DRAWN_AT_ONCE, n, 5 + channels), generator=generator), x.device)
        drawn = draws[at, roster.index]  # (n, 5 + C) in [0, 1)
        side = min(max(1, round((share_of_area(query) * height * width) ** 0.5)), height, width)
        ahead = _paint(s, drawn, side) if norm == "linf" else _move_mass(s, drawn, max(3, side // 2 * 2 + 1))
        margin = label_margin(logits_at(predict, ahead), s.y)
        better = (margin < s.margin) & ~s.done
        s.points = blend(better, ahead, s.points)
        s.margin = torch.where(better, margin, s.margin)
        s.done = s.margin < 0
    return roster.close(s.points)


def _stripes(region: Region, generator: torch.Generator) -> Tensor:
    """Vertical stripes one pixel wide at +-eps (arXiv:1912.00049, section 3.2)."""
    n, channels, _, width = region.x.shape
    up = move(torch.rand((n, channels, 1, width), generator=generator), region.x.device) < 0.5
    return torch.where(up, region.high, region.low)


def _offsets(drawn: Tensor, side: int, length: int) -> Tensor:
    """Where each pixel of a row lies in a square that fits into it, `side` beyond its ends, (n, length) in 0 .. side.

    Numbers in [0, 1), (n,), say where the square begins.
    """
    start = (drawn * (length - side + 1)).long().clamp_max(length - side)
    offset = torch.arange(length, device=start.device) - start[:, None]
    return torch.where((offset >= 0) & (offset < side), offset, side)


def _square(drawn: Tensor, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A square for each sample from numbers in [0, 1), (n, 2): its mask (n, 1, H, W), and offsets by row and column."""
    down = _offsets(drawn[:, 0], side, like.shape[2])[:, :, None]  # (n, H, 1)
    across = _offsets(drawn[:, 1], side, like.shape[3])[:, None, :]  # (n, 1, W)
    return ((down < side) & (across < side))[:, None], down, across


def _paint(s: _Hunt, drawn: Tensor, side: int) -> Tensor:
    """Set one square to +-eps, with one sign for each channel (arXiv:1912.00049, algorithm 2)."""
    inside, _, _ = _square(drawn[:, :2], side, s.points)
    up = (drawn[:, 5:] < 0.5)[:, :, None, None]  # (n, C, 1, 1)
    return torch.where(inside, torch.where(up, s.region.high, s.region.low), s.points)


def _pyramid(height: int, width: int) -> Tensor:
    """The bump of the L2 attack on a height x width rectangle: concentric sums of 1 / k^2.

    Source: arXiv:1912.00049, section 3.3, the function eta^(h1, h2) with r and s counted from 1.
    """
    n = height // 2
    r, c = torch.arange(1, height + 1)[:, None], torch.arange(1, width + 1)[None, :]
    reach = n - torch.maximum((r - height // 2 - 1).abs(), (c - width // 2 - 1).abs())  # M(r, s)
    k = torch.arange(n + 1)
    terms = 1.0 / (n + 1 - k).double() ** 2
    bump: Tensor = (terms * (k <= reach[..., None])).sum(-1).float()
    return bump


def _bump(side: int) -> Tensor:
    """The update of a square window: a bump above a bump of the other sign, of unit length, (side, side)."""
    upper = side // 2
    bump = torch.cat((_pyramid(upper, side), -_pyramid(side - upper, side)))
    return bump / bump.square().sum().sqrt().clamp_min(_TINY)


def _tiles(region: Region, generator: torch.Generator) -> Tensor:
    """A grid of bumps, five along a side, each of random sign and orientation (arXiv:1912.00049, section 3.3)."""
    n, channels, height, width = region.x.shape
    side = max(3, min(height, width) // 5)
    bump = _bump(side)
    down, across = height // side, width // side
    drawn = torch.rand((2, n, channels, down, across), generator=generator)
    tile = (
        torch.where((drawn[1] < 0.5)[..., None, None], bump, bump.T) * (drawn[0] < 0.5).mul(2).sub(1)[..., None, None]
    )
    delta = torch.zeros(region.x.shape)
    delta[:, :, : down * side, : across * side] = tile.transpose(3, 4).reshape(n, channels, down * side, across * side)
    delta = delta / per_sample(norms(delta, norm="l2"), delta).clamp_min(_TINY) * region.eps
    return region.project(region.x + move(delta, region.x.device))


@lru_cache(maxsize=32)
def _window(side: int, device: torch.device) -> Tensor:
    """The update of a square window on the device, with an empty row and column at its ends, (side + 1, side + 1)."""
    return move(torch.nn.functional.pad(_bump(side), (0, 1, 0, 1)), device)


def _move_mass(s: _Hunt, drawn: Tensor, side: int) -> Tensor:
    """Empty one window and give its mass, with what the box left unused, to another (arXiv:1912.00049, algorithm 3)."""
    x, eps = s.region.x, s.region.eps
    side = min(side, *x.shape[2:])
    delta = s.points - x
    gains, down, across = _square(drawn[:, :2], side, x)
    loses, _, _ = _square(drawn[:, 2:4], side, x)

    unused = (eps**2 - delta.flatten(1).square().sum(1)).clamp_min(0)
    mass = _mass(delta * (gains | loses))  # (n, C, 1, 1)
    available = (mass + per_sample(unused, mass) / x.shape[1]).sqrt()

    window = delta * gains
    window = window / _mass(window).sqrt().clamp_min(_TINY)
    bump = _window(side, x.device)
    turned = bump.T.contiguous()
    placed = torch.where((drawn[:, 4] < 0.5)[:, None, None], bump[down, across], turned[down, across])[:, None]
    sign = (drawn[:, 5:] < 0.5).to(x.dtype).mul(2).sub(1)[:, :, None, None]
    window = sign * placed + window
    window = window / _mass(window).sqrt().clamp_min(_TINY) * available
    delta = torch.where(gains, window, delta.masked_fill(loses, 0.0))
    return s.region.project(x + delta)


def _mass(delta: Tensor) -> Tensor:
    """Squared L2 norm of each channel, (n, C, 1, 1)."""
    return delta.square().sum((2, 3), keepdim=True)
