"""Statistics of a comparison, which know nothing of runs: figures over seeds, exact McNemar tests, the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cfamc_cli.store.records import Accuracy

CHANCE = 0.05  # a p-value above it is called chance


@dataclass(frozen=True, slots=True)
class Figure:
    """A fraction of one run with its Wilson 95 % interval, or the mean of several seeds with their spread."""

    value: float
    n: int  # samples of each run
    runs: int  # how many the value is the mean of
    std: float | None  # sample standard deviation over runs; None for one
    low: float | None  # end of the interval, as `high`; None for several runs
    high: float | None

    @classmethod
    def of(cls, accuracies: Sequence[Accuracy]) -> Figure:
        """The figure of one run, or of several."""
        values, n = [accuracy.value for accuracy in accuracies], accuracies[0].n
        if len(values) == 1:
            return cls(values[0], n, 1, None, accuracies[0].low, accuracies[0].high)
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return cls(mean, n, len(values), std, None, None)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a result lies from another, as a fraction."""

    value: float  # positive where the first is better
    shared: int | None = None  # samples that both were measured on; None where they could not be paired
    gained: int | None = None  # samples that only the first got right
    lost: int | None = None  # samples that only the other did
    p: float | None = None  # two-sided, of McNemar's exact test


def paired(first: int, second: int, *, n: int) -> Difference:
    """Compare two bit masks of right answers on their first `n` samples."""
    mask = (1 << n) - 1
    gained, lost = (first & ~second & mask).bit_count(), (second & ~first & mask).bit_count()
    return Difference((gained - lost) / n, n, gained, lost, mcnemar(gained, lost))


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p-value of the exact test that both predictors are equally often right.

    Args:
        gained: Samples that only the first got right.
        lost: Samples that only the second got right.

    Source:
        McNemar 1947, Note on the sampling error of the difference between correlated proportions; in its exact form
        the smaller count is Binomial(gained + lost, 1/2), and both tails are added.
    """
    total, least = gained + lost, min(gained, lost)
    if 2 * least >= total:
        return 1.0
    log_term = math.lgamma(total + 1) - math.lgamma(least + 1) - math.lgamma(total - least + 1) - total * math.log(2)
    tail, ratio = 0.0, 1.0  # terms fall from the largest, so the sum ends when they no longer count
    for k in range(least, -1, -1):
        tail += ratio
        ratio *= k / (total - k + 1)
        if ratio < 1e-17 * tail:
            break
    return min(1.0, 2 * math.exp(log_term) * tail)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell for each point whether no other is at least as large in both and larger in one."""
    on_front = [False] * len(points)
    highest, at = -math.inf, math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        x, y = points[index]
        on_front[index] = y > highest or (y == highest and x == at)
        if y > highest:
            highest, at = y, x
    return on_front


def probability(p: float) -> str:
    """Such as "= 0.031" or "< 0.0001"."""
    return f"= {p:.2g}" if p >= 1e-4 else "< 0.0001"
