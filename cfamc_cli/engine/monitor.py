"""Watching an encoder while it trains: accuracy of cheap heads, and whether the adversary has lost its grip.

Nothing here changes what is trained: weights, gradients, buffers and random numbers are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfamc_cli.engine.adversary import Groups, LossOf, ascend_loss
from cfamc_cli.engine.models import Encoder
from cfamc_cli.engine.probe import extract_features, fit_converged, new_head, weighted_knn

BANK = 5000  # training images that the online heads are fitted to, at most
ATTACK_STEPS = 10
CHECKS = 20  # comparisons of adversaries over a run, at most
LOST = 0.05  # strength below which an adversary has lost its grip: free training measured 0.14 to 0.45, collapse < 0
COST = 0.02  # of the run's view passes that they may take
_FEWEST = 8  # images of a comparison; with fewer the loss says little
_CHUNK = 250  # samples of an attack's forward pass


@dataclass(frozen=True)
class OnlineAccuracy:
    """Counts of right answers among `n` held-out training images.

    Attributes:
        knn: Weighted nearest neighbours, k 20, temperature 0.07.
        clean: Linear head on detached features.
        robust: The same head under PGD-10 of radius eps, step 2.5 eps / 10.
    """

    n: int
    knn: int
    clean: int
    robust: int


def evaluate(
    encoder: Encoder,
    bank: Tensor,
    bank_labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    *,
    classes: int,
    eps: float,
    device: torch.device,
    stop: Callable[[], int],
) -> OnlineAccuracy | None:
    """Fit heads to features of `bank` and count how often they are right on `held_out`.

    Args:
        encoder: On `device`; its mode is restored.
        bank: (N, 3, S, S) uint8.
        bank_labels: (N,) int64.
        held_out: (M, 3, S, S) uint8.
        held_out_labels: (M,) int64.
        classes: C.
        eps: L-inf radius of the attack.
        device: Where to compute.
        stop: Asked all the while; what it returns, if not 0, ends the evaluation.

    Returns:
        The counts; None where `stop` ended it.
    """
    training = encoder.training
    try:
        return _evaluate(encoder, bank, bank_labels, held_out, held_out_labels, classes, eps, device, stop)
    except _Cut:
        return None
    finally:
        encoder.train(training)


class _Cut(Exception):  # noqa: N818 - no error
    """The evaluation was asked to stop."""


def _evaluate(
    encoder: Encoder,
    bank: Tensor,
    bank_labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    classes: int,
    eps: float,
    device: torch.device,
    stop: Callable[[], int],
) -> OnlineAccuracy:
    def look_up(done: int = 0, total: int = 0) -> None:  # noqa: ARG001 - how features report
        if stop():
            raise _Cut

    bank_labels, held_out_labels = bank_labels.to(device), held_out_labels.to(device)
    features = extract_features(encoder, bank, device=device, each=look_up)
    queries = extract_features(encoder, held_out, device=device, each=look_up)
    neighbours = weighted_knn(features, bank_labels, queries, classes=classes)
    head = new_head(features.shape[1], classes, seed=0, device=device, statistics=features).requires_grad_(False)
    fit_converged(head, features, bank_labels, l2=1e-4, iterations=100, each=look_up)
    right = head(queries).argmax(1) == held_out_labels

    encoder.eval()
    still = right.clone()
    for chunk in right.nonzero().squeeze(1).split(_CHUNK):
        x = held_out[chunk.to(held_out.device)].to(device).float() / 255
        y = held_out_labels[chunk]

        def loss_of(moved: Sequence[Tensor], y: Tensor = y) -> Tensor:
            look_up()
            return F.cross_entropy(head(encoder.features(moved[0])), y, reduction="sum")

        (delta,) = ascend_loss(
            loss_of, [x], [torch.zeros_like(x)], eps=eps, step_size=2.5 * eps / ATTACK_STEPS, steps=ATTACK_STEPS
        )
        with torch.no_grad():
            still[chunk] = head(encoder.features(x + delta)).argmax(1) == y
    return OnlineAccuracy(
        n=len(held_out_labels),
        knn=int((neighbours == held_out_labels).sum()),
        clean=int(right.sum()),
        robust=int(still.sum()),
    )


@dataclass(frozen=True)
class Grip:
    """How strong the training adversary is beside PGD-10 on the same crops.

    Attributes:
        clean: Loss without a perturbation.
        trained: Loss under the perturbation that training uses.
        strongest: Loss under PGD-10.
        strength: (trained - clean) / (strongest - clean): 1 where training meets the strongest attack, about 0 where
            it meets none.
    """

    clean: float
    trained: float
    strongest: float

    @property
    def strength(self) -> float:
        return (self.trained - self.clean) / max(self.strongest - self.clean, 1e-12)


@dataclass(frozen=True)
class Schedule:
    """When grips are measured and on how many images of the batch: at most 2 % of the run's view passes.

    Attributes:
        every: Weight updates between two measurements; 0 where even one would cost too much.
        images: Images of the batch.
    """

    every: int
    images: int


def schedule(*, updates: int, batch_size: int, passes_per_update: int) -> Schedule:
    """Spread the comparisons over a run.

    Args:
        updates: Weight updates of the run.
        batch_size: Images of a batch.
        passes_per_update: Forward and backward passes of a view in one weight update: 1, or 1 + K for PGD.
    """
    each = 3 + ATTACK_STEPS  # passes for clean, trained and strongest
    allowed = COST * updates * passes_per_update * batch_size / each  # images over the whole run
    checks = min(CHECKS, int(allowed // _FEWEST), updates)
    if checks < 1:
        return Schedule(0, 0)
    return Schedule(every=math.ceil(updates / checks), images=min(batch_size, int(allowed / checks)))


def measure_grip(
    loss_of: LossOf,
    crops: Groups,
    trained: Groups,
    *,
    first: int,
    eps: float,
) -> Grip:
    """Compare the training perturbation with PGD-10 (step 2.5 eps / 10, from zero) on the training loss.

    Args:
        loss_of: The training loss of groups of crops, leaving batch-norm statistics alone.
        crops: Clean groups, already cut to the images of the comparison.
        trained: The training perturbation of groups `first` and later.
        first: Index of the first perturbed group.
        eps: L-inf radius.
    """
    clean = crops[first:]

    def moved_loss(moved: Sequence[Tensor]) -> Tensor:
        return loss_of([*crops[:first], *moved])

    strongest = ascend_loss(
        moved_loss,
        clean,
        [torch.zeros_like(x) for x in clean],
        eps=eps,
        step_size=2.5 * eps / ATTACK_STEPS,
        steps=ATTACK_STEPS,
    )
    with torch.no_grad():
        losses = torch.stack(
            [
                moved_loss(clean),
                moved_loss([x + delta for x, delta in zip(clean, trained, strict=True)]),
                moved_loss([x + delta for x, delta in zip(clean, strongest, strict=True)]),
            ]
        ).tolist()
    return Grip(*losses)
