"""How long a run will take, told before it begins: a few passes over its first batch, of which nothing stays."""

from __future__ import annotations

import time

import torch

from cfamc_cli.engine.costs import plan_of
from cfamc_cli.engine.device import autocast
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.recipe.plan import Plan

_PASSES = 5  # at most, of which the fastest counts: the first warms up, and other programs slow some
_ENOUGH = 2.0  # seconds, after which there is no further one


def forecast(trainer: Trainer, costs: Plan) -> float | None:
    """Seconds that the updates left take at least, at the rate of a forward and backward pass of the first crops.

    Crops, the optimizer, grips and checkpoints come beside them, a tenth or so on a CPU, and what else computes there.

    Args:
        trainer: Standing at the start of a phase; weights, statistics and gradients are left as they are.
        costs: The plan of the run.

    Returns:
        None where one pass says nothing of the others: with several processes, compiled, or before there are clusters.
    """
    recipe = trainer.recipe
    if trainer.world.size > 1 or trainer.computation.compiled or recipe.clusters:
        return None
    crops, labels = trainer.crops_of(0)
    weights = [weight for weight in trainer.encoder.parameters() if weight.requires_grad]
    seconds: list[float] = []
    while len(seconds) < _PASSES and sum(seconds) < _ENOUGH:
        began = time.perf_counter()
        with autocast(trainer.device, trainer.precision):
            loss = trainer.attacked_loss(crops, still=[], labels=labels)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        float(next(part for part in gradients if part is not None).sum())  # waits for the device
        seconds.append(time.perf_counter() - began)
    phase = plan_of(recipe, len(trainer.images))  # other phases may have larger crops
    of_batch = phase.flops_per_view * recipe.views * recipe.train.batch_size
    left = 1 - trainer.where()["step"] / trainer.total
    return min(seconds) * costs.flops / of_batch * left
