"""What a predictor does that only seems robust: measures of its answers and gradients, one value a sample.

The audit says what is too much. After Athalye et al., arXiv:1802.00420 (obfuscated gradients), Carlini et al.,
arXiv:1902.06705, and Tramer et al., arXiv:2002.08347 (adaptive attacks).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from cfamc_cli.engine.attacks.objectives import ranked_targets
from cfamc_cli.engine.attacks.search import Predict, Region, climb, logits_at
from cfamc_cli.engine.ball import norms, per_sample
from cfamc_cli.engine.device import full_precision, move
from cfamc_cli.errors import CfamcError
from cfamc_cli.recipe.schema import Norm

_DIRECTIONS = 20  # in which a gradient is held against differences
_LENGTHS = (0.01 / 255, 0.1 / 255)  # of those differences a pixel: below the kinks of a net, above rounding
_ROUNDING = 1e-5  # of the largest logit: what float32 may add to a difference
_WAYS = 4  # random directions from an image to the border of its ball and beyond
_OCTAVES = 4  # how often the radius is doubled to see whether answers leap outside the ball
_INSIDE = 0.95  # of eps
_HALVINGS = 5  # of each octave
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the way from one image to another
_TOGETHER = 100  # images of one pass in a new process
_SHARP = 4.0  # standard deviations of the logits are so many units of a surrogate


def apart(first: Tensor, second: Tensor) -> Tensor:
    """How far two answers (N, classes) lie apart, relative to the largest logit, (N,); infinite where one is none."""
    if first.shape != second.shape:
        return torch.full((len(first),), torch.inf, device=first.device)
    scale = first.abs().nan_to_num(0, 0, 0).amax().clamp_min(1e-12)
    return ((first - second).abs().amax(1) / scale).nan_to_num(nan=torch.inf)


def agreement(predict: Predict, search: Predict, points: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
    """How well a gradient tells what differences show: their cosine over 20 random directions.

    Both are of the gap between the likeliest other class and the label. Directions point into the box where a pixel
    lies at its border. Of several lengths of a difference the one that agrees best counts.

    Args:
        predict: Logits from images, which the differences are of.
        search: What attacks look through, which the gradients are of.
        points: In [0, 1], (N, C, H, W).
        y: Labels, (N,).
        generator: CPU generator of the directions.

    Returns:
        (N,): about 1 for a network, 0 for a gradient of noise, -1 for a negated one and one that is not finite.
    """
    here = logits_at(predict, points)
    other = ranked_targets(here.nan_to_num(), y, count=1)

    def gap(z: Tensor) -> Tensor:
        return (z.gather(1, other) - z.gather(1, y[:, None])).squeeze(1)

    _, _, grad = climb(search, points, gap)
    signs = [torch.randint(0, 2, points.shape, generator=generator) * 2.0 - 1 for _ in range(_DIRECTIONS)]
    best = torch.full((len(points),), -1.0, device=points.device)
    for length in _LENGTHS:
        pairs = []
        for sign in signs:
            inwards = torch.where(points < length, 1.0, move(sign, points.device))
            v = length * torch.where(points > 1 - length, -1.0, inwards)
            pairs.append(((grad * v).flatten(1).sum(1), gap(logits_at(predict, points + v)) - gap(here)))
        told, seen = (torch.stack(rows, 1) for rows in zip(*pairs, strict=True))  # (N, directions)
        cosine = (told * seen).sum(1) / (told.norm(dim=1) * seen.norm(dim=1)).clamp_min(1e-30)
        best = torch.maximum(best, cosine.nan_to_num(nan=-1.0))
    return best.where(grad.flatten(1).isfinite().all(1), -1.0)


def leap(predict: Predict, x: Tensor, *, eps: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """How many times as far an answer is from the clean one, across the steepest 32nd of an octave, (N,).

    The radius is doubled from just within eps on along random directions, and the steeper half of each octave halved
    until a 32nd is left. The answers of a network are continuous: 1.02 where they are linear, 1.1 and for single images
    1.5 where they hardly change in the ball. Answers that were remembered, are flat, or move by a part of what was
    added while an image lies in the ball, leap at its border.
    """
    state = generator.get_state()
    whole = 0.5 if norm == "linf" else 0.5 * x[0].numel() ** 0.5
    radii = [radius for k in range(_OCTAVES + 1) if (radius := _INSIDE * eps * 2**k) <= whole]
    if len(radii) < 2:
        return torch.ones(len(x), device=x.device)

    def around(radius: Tensor) -> Iterator[Tensor]:
        """Points at a radius (N,), in the same directions each time."""
        generator.set_state(state)
        for _ in range(_WAYS):
            way = torch.randn(x.shape, generator=generator)
            way = move(way.sign() if norm == "linf" else way / per_sample(norms(way, norm="l2"), way), x.device)
            largest = x + radii[-1] * way  # inwards where that leaves the box: what is cut off moves all pixels one way
            way = torch.where(largest < 0, way.abs(), torch.where(largest > 1, -way.abs(), way))
            yield x + per_sample(radius, x) * way

    return _steepest(predict, x, around, radii)


def leap_between(predict: Predict, x: Tensor) -> Tensor:
    """The same on the way from each image to others of them, from a 16th of it on, (N,), N at least 2.

    Answers of a network are continuous there too: 1.02 to 1.3. Those that know images and pass on a part of what was
    added to the nearest leap halfway, however evenly they do so.
    """

    def along(share: Tensor) -> Iterator[Tensor]:
        for other in range(1, 1 + min(_WAYS, len(x) - 1)):
            yield x + per_sample(share, x) * (x.roll(other, 0) - x)

    return _steepest(predict, x, along, _SHARES)


def _steepest(
    predict: Predict, x: Tensor, points: Callable[[Tensor], Iterator[Tensor]], lengths: Sequence[float]
) -> Tensor:
    """How many times as large a change of answers is across the steepest 32nd of an octave of lengths, (N,).

    A change is summed over the points that lie at a length (N,), each (N, 3, S, S) and cut to [0, 1].
    """
    clean = logits_at(predict, x)

    def change(length: Tensor) -> Tensor:
        total = _ROUNDING * clean.abs().amax(1) + 1e-30
        for at in points(length):
            moved = logits_at(predict, at.clamp(0, 1)) - clean
            total = total + (moved - moved.mean(1, keepdim=True)).norm(dim=1)
        return total

    seen = [(at, change(at)) for at in (torch.full((len(x),), length, device=x.device) for length in lengths)]
    steepest = torch.zeros(len(x), device=x.device)
    for (low, near), (high, far) in pairwise(seen):
        for _ in range(_HALVINGS):
            middle = (low * high).sqrt()
            between = change(middle)
            inner = between / near > far / between
            low, near = low.where(inner, middle), near.where(inner, between)
            high, far = middle.where(inner, high), between.where(inner, far)
        steepest = torch.maximum(steepest, far / near)
    return steepest


def loss_in_noise(predict: Predict, region: Region, y: Tensor, *, draws: int, generator: torch.Generator) -> Tensor:
    """The highest cross-entropy at `draws` random points of the border of the ball, float64 (N,) on the CPU."""
    highest = torch.zeros(len(y), dtype=torch.float64)
    for _ in range(draws):
        way = torch.randn(region.x.shape, generator=generator)
        way = way.sign() if region.norm == "linf" else way / per_sample(norms(way, norm="l2"), way)
        points = region.project(region.x + region.eps * move(way, region.x.device))
        highest = torch.maximum(highest, losses(logits_at(predict, points), y))
    return highest


def losses(z: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of logits (N, classes), float64 (N,) on the CPU; that of a confident head is 0 to float32."""
    return cross_entropy(z.cpu().double(), y.cpu(), reduction="none")  # MPS has no float64


def standardised(predict: Predict) -> Predict:
    """The same classes by logits of one mean and one spread a sample: whatever was done to their scale is undone."""

    def surrogate(images: Tensor) -> Tensor:
        z = predict(images)
        z = z - z.mean(1, keepdim=True)
        spread = z.abs().amax(1, keepdim=True).clamp_min(1e-30)  # first by it, so that squares do not vanish
        z = z / spread
        return _SHARP * z / z.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)

    return surrogate


def of_8_bits(predict: Predict) -> Predict:
    """Answers at the nearest image of 8 bits; gradients pass through the rounding (arXiv:1802.00420, BPDA)."""
    return lambda images: predict(images + (rounded(images) - images).detach())


def rounded(images: Tensor) -> Tensor:
    """The nearest images of 8 bits, as images in [0, 1]."""
    return (images.detach() * 255).round() / 255


def without_memory(fresh: Predict) -> Predict:
    """Answers of a predictor that was never asked before: each pass is made by a new copy."""
    return lambda images: copy.deepcopy(fresh)(images)


def in_new_process(anew: Callable[[], Predict], points: Tensor) -> Tensor | None:
    """Answers of a process that was never asked before and shares no memory: logits (N, classes) on the CPU.

    Args:
        anew: Makes the predictor there, on the device of the points; it is pickled.
        points: In [0, 1], (N, C, H, W).

    Returns:
        None where that process fails, as at weights that are no longer what they were.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            made = pool.submit(partial(_answers, anew, points.cpu().numpy(), str(points.device))).result()
        except (BrokenProcessPool, CfamcError, OSError):
            return None
    return torch.from_numpy(made)


def _answers(anew: Callable[[], Predict], points: NDArray[np.float32], device: str) -> NDArray[np.float32]:
    where = torch.device(device)
    with full_precision(where):
        predict = anew()
        parts = torch.from_numpy(points).split(_TOGETHER)
        answers: NDArray[np.float32] = torch.cat(
            [logits_at(predict, move(part, where)).cpu() for part in parts]
        ).numpy()
    return answers
