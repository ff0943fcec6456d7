"""Certified accuracy in L2 by randomised smoothing: a proof, up to a stated doubt, and no attack.

Cohen et al., arXiv:1902.02918. What is certified is not the classifier but what it says most often under Gaussian
noise. Symbols: sigma the standard deviation of the noise in units of the image range, p the probability of that class,
R the radius, alpha the probability that a certificate is wrong.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.search import Predict, logits_at
from cfamc_cli.engine.device import move
from cfamc_cli.engine.evaluation.measures import Values
from cfamc_cli.engine.evaluation.verify import Predictor
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.recipe.schema import Smoothing, number

_COPIES = 250  # noisy copies of one pass
_HALVINGS = 50  # of the interval in which a probability lies


def lower_bound(hits: int, n: int, *, alpha: float) -> float:
    """The probability of a hit that is exceeded with confidence 1 - alpha, one-sided, after `hits` in `n` draws.

    Source:
        Clopper & Pearson 1934, The use of confidence or fiducial limits: the p at which so many hits or more have
        probability alpha, which is the alpha quantile of Beta(hits, n - hits + 1); found by halving.
    """
    if hits == 0:
        return 0.0
    low, high = 0.0, hits / n
    log_ways = math.lgamma(n + 1) - math.lgamma(hits + 1) - math.lgamma(n - hits + 1)
    for _ in range(_HALVINGS):
        p = (low + high) / 2
        term, tail = 1.0, 0.0  # terms fall from the first, for p is below hits / n
        for k in range(hits, n + 1):
            tail += term
            term *= (n - k) / (k + 1) * p / (1 - p)
            if term < 1e-17 * tail:
                break
        log_tail = log_ways + hits * math.log(p) + (n - hits) * math.log1p(-p) + math.log(tail)
        low, high = (p, high) if log_tail < math.log(alpha) else (low, p)
    return low


def smoothing(settings: Smoothing, *, seed: int) -> Values:
    """For each sample: whether it is right without noise ("clean"), whether the class that `n0` noisy copies choose is
    its own ("right"), how many of `n` others say that class ("hits"), and the radius within which it stays ("radius").

    There is no radius where the smoothed classifier abstains, as its class may have a probability of 1/2 or less. The
    noise of a sample is drawn from (seed, block, sample).

    Source: Cohen et al., arXiv:1902.02918, algorithm CERTIFY: R = sigma Phi^-1(p).
    """
    sigma = number(settings.sigma)

    def values(target: Predictor, x: Tensor, y: Tensor, block: int) -> dict[str, Tensor]:
        right, hits, radius = [], [], []
        for place, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
            generator = addressed_generator("smoothing", seed, block, place)
            draws = image, sigma, generator
            chosen = int(noisy_votes(target.logits, *draws, n=settings.n0).argmax())
            hit = int(noisy_votes(target.logits, *draws, n=settings.n)[chosen])
            p = lower_bound(hit, settings.n, alpha=settings.alpha)
            right.append(float(chosen == label))
            hits.append(float(hit))
            radius.append(sigma * NormalDist().inv_cdf(p) if p > 0.5 else math.nan)
        clean = (logits_at(target.logits, x).argmax(1) == y).double()
        doubles = (torch.tensor(column, dtype=torch.float64) for column in (right, hits, radius))
        return {"clean": clean, **dict(zip(("right", "hits", "radius"), doubles, strict=True))}

    return values


def noisy_votes(predict: Predict, image: Tensor, sigma: float, generator: torch.Generator, *, n: int) -> Tensor:
    """How often each class is predicted for noisy copies of an image (C, H, W), which leave the box: (classes,)."""
    votes = torch.zeros(logits_at(predict, image[None]).shape[1], dtype=torch.int64)
    for first in range(0, n, _COPIES):
        noise = torch.randn((min(_COPIES, n - first), *image.shape), generator=generator)
        labels = logits_at(predict, image + sigma * move(noise, image.device)).argmax(1)
        votes += labels.bincount(minlength=len(votes)).cpu()
    return votes
