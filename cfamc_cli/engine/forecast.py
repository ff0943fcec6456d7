"""How long a run will take, told before it begins: one pass over its first batch, of which nothing stays."""

from __future__ import annotations

import time

import torch

from cfamc_cli.engine.device import autocast
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.recipe.plan import Plan

_WARM = 2.0  # seconds; a first pass that takes longer than that is no longer one of warming up


def forecast(trainer: Trainer, costs: Plan) -> float | None:
    """Seconds that the updates left will take, at the rate of a forward and backward pass of the first crops.

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
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with autocast(trainer.device, trainer.precision):
            loss = trainer.attacked_loss(crops, still=[], labels=labels)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        float(next(part for part in gradients if part is not None).sum())  # waits for the device
        seconds = time.perf_counter() - began
        if seconds > _WARM:
            break
    of_batch = costs.flops_per_view * recipe.views * recipe.train.batch_size
    left = 1 - trainer.where()["step"] / trainer.total
    return seconds * costs.flops / of_batch * left
