"""Watching an encoder while it trains: accuracy of cheap heads, and whether the adversary has lost its grip.

Nothing here changes what is trained: weights, gradients, buffers and random numbers are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from cfamc_cli.engine.adversary import Groups, LossBeside, LossOf, ascend_loss
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.heads.frozen import extract_features, fit_converged, new_head, weighted_knn
from cfamc_cli.engine.objectives import feature_std
from cfamc_cli.recipe.schema import number
from cfamc_cli.store.records import EvaluationLine, GripLine

BANK = 5000  # training images that the online heads are fitted to, at most
ATTACK_STEPS = 10
_PASSES = 3 * ATTACK_STEPS  # of an image under attack, a backward pass counted as two
CHECKS = 20  # comparisons of adversaries over a run, at most
LOST = 0.05  # strength below which an adversary has lost its grip: free training measured 0.14 to 0.45, collapse < 0
COST = 0.02  # of the run's view passes that they may take
CROPS = 32  # of a batch, whose representations each record looks at
_FEWEST = 8  # images of a comparison; with fewer the loss says little
_CHUNK = 250  # samples of an attack's forward pass


class Where(TypedDict):
    """The position of a line of metrics.jsonl."""

    step: int
    batch: int
    epoch: float
    phase: int | None


class _Cut(Exception):  # noqa: N818 - no error
    """The evaluation was asked to stop."""


def evaluate(
    encoder: Encoder,
    bank: Tensor,
    bank_labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    *,
    classes: int,
    eps: str,
    device: torch.device,
    stop: Callable[[], int],
    each: Callable[[int, int], None],
    where: Where,
) -> EvaluationLine | None:
    """Fit heads to features of `bank` and count how often they are right on `held_out`.

    `knn` is weighted nearest neighbours (k 20, temperature 0.07), `clean` a linear head on detached features, `robust`
    the same head under PGD-10 of radius eps, step 2.5 eps / 10.

    Args:
        encoder: On `device`; its mode is restored.
        bank: (N, 3, S, S) uint8.
        bank_labels: (N,) int64.
        held_out: (M, 3, S, S) uint8.
        held_out_labels: (M,) int64.
        classes: C.
        eps: L-inf radius of the attack, exact text.
        device: Where to compute.
        stop: Asked all the while; what it returns, if not 0, ends the evaluation.
        each: Told how many passes of an image are done, and of how many; backward ones count twice.
        where: The encoder's position in its run.

    Returns:
        The counts; None where `stop` ended it.
    """
    attacked, before = len(held_out), len(bank) + len(held_out)  # what is wrong already is not attacked

    def look_up(done: int = 0, _: int = 0) -> None:
        if stop():
            raise _Cut
        if done:
            each(done, before + _PASSES * attacked)

    training = encoder.training
    bank_labels, held_out_labels = bank_labels.to(device), held_out_labels.to(device)
    try:
        features = extract_features(encoder, bank, device=device, each=look_up)
        seen = len(bank)
        queries = extract_features(encoder, held_out, device=device, each=lambda done, _: look_up(seen + done))
        neighbours = weighted_knn(features, bank_labels, queries, classes=classes)
        head = new_head(features.shape[1], classes, seed=0, device=device, statistics=features).requires_grad_(False)
        fit_converged(head, features, bank_labels, l2=1e-4, iterations=100, each=lambda *_: look_up())
        right = head(queries).argmax(1) == held_out_labels
        attacked, seen = int(right.sum()), before

        encoder.eval()
        still = right.clone()
        for chunk in right.nonzero().squeeze(1).split(_CHUNK):
            x = held_out[chunk.to(held_out.device)].to(device).float() / 255
            y = held_out_labels[chunk]

            def loss_of(moved: Sequence[Tensor], y: Tensor = y) -> Tensor:
                nonlocal seen
                seen += _PASSES // ATTACK_STEPS * len(y)
                look_up(seen)
                return F.cross_entropy(head(encoder.features(moved[0])), y, reduction="sum")

            (delta,) = _strongest(loss_of, [x], eps=number(eps))
            with torch.no_grad():
                still[chunk] = head(encoder.features(x + delta)).argmax(1) == y
    except _Cut:
        return None
    finally:
        encoder.train(training)
    knn, clean, robust = (int(hits.sum()) for hits in (neighbours == held_out_labels, right, still))
    n = len(held_out_labels)
    return EvaluationLine(**where, n=n, knn=knn, clean=clean, robust=robust, eps=eps, attack=f"pgd-{ATTACK_STEPS}")


def _strongest(loss_of: LossOf, clean: Groups, *, eps: float) -> Groups:
    """PGD-10 from zero, with steps of 2.5 eps / 10."""
    start = [torch.zeros_like(x) for x in clean]
    return ascend_loss(loss_of, clean, start, eps=eps, step_size=2.5 * eps / ATTACK_STEPS, steps=ATTACK_STEPS)


@dataclass(frozen=True)
class Schedule:
    """When grips are measured and on how many images of the batch: at most 2 % of the run's view passes."""

    every: int  # weight updates between two measurements; 0 where even one would cost too much
    images: int  # images of the batch


def schedule(*, updates: int, batch_size: int, passes_per_update: int) -> Schedule:
    """Spread the comparisons over a run.

    Args:
        updates: Weight updates of the run.
        batch_size: Images of a batch.
        passes_per_update: Forward and backward passes of a view that the adversary moves, in one weight update: 1, or
            1 + K for PGD. A view that it spares makes one pass an update, and one forward pass a comparison.
    """
    each = 3 + ATTACK_STEPS  # passes for clean, trained and strongest
    allowed = COST * updates * passes_per_update * batch_size / each  # images over the whole run
    checks = min(CHECKS, int(allowed // _FEWEST), updates)
    if checks < 1:
        return Schedule(0, 0)
    return Schedule(every=math.ceil(updates / checks), images=min(batch_size, int(allowed / checks)))


@torch.no_grad()
def representation_std(encoder: Encoder, crops: Tensor) -> Tensor:
    """How far apart heads see images: `feature_std` of `pre_feature` in eval mode, brought to unit norm.

    Embeddings do not tell: the batch norm of a training pass spreads what differs in its last digits alone.

    Args:
        encoder: Its mode is restored.
        crops: (N, 3, S, S) in [0, 1], of several images.

    Returns:
        A scalar on the device: 0 where all are one, about 1 where nothing is common.
    """
    training = encoder.training
    features = encoder.eval().features(crops)
    encoder.train(training)
    return feature_std(F.normalize(features, dim=-1))


def measure_grip(loss_beside: LossBeside, crops: Groups, trained: Groups, *, eps: float, where: Where) -> GripLine:
    """Compare the training perturbation with PGD-10 (step 2.5 eps / 10, from zero) on the training loss.

    Args:
        loss_beside: From the groups that stay clean to the training loss of the others, leaving batch-norm statistics
            alone.
        crops: Clean groups, already cut to the images of the comparison.
        trained: The training perturbation of the last of these groups; those before them stay clean.
        eps: L-inf radius.
        where: The encoder's position in its run.
    """
    first = len(crops) - len(trained)
    loss_of, clean = loss_beside(crops[:first]), crops[first:]
    strongest = _strongest(loss_of, clean, eps=eps)
    still = [torch.zeros_like(x) for x in clean]
    with torch.no_grad():
        losses = [
            loss_of([x + part for x, part in zip(clean, delta, strict=True)]) for delta in (still, trained, strongest)
        ]
    at_rest, under_training, under_attack = torch.stack(losses).tolist()
    reached = max(under_attack, under_training) - at_rest  # PGD fails where gradients lead nowhere
    strength = (under_training - at_rest) / reached if reached > 0 else 0.0
    return GripLine(
        **where,
        clean=at_rest,
        trained=under_training,
        strongest=under_attack,
        strength=strength,
        lost=strength < LOST,
    )
