"""Attacks as pure functions (predict, x, y, ...) -> x_adv: no trace in the predictor, randomness from a generator.

Images are (N, C, H, W) in [0, 1]; eps and step sizes are in the units of that range. Only derivatives with respect to
images are formed. An attack may return anything: whoever counts its examples verifies them.
"""

from __future__ import annotations

from cfamc_cli.engine.attacks.apgd import apgd
from cfamc_cli.engine.attacks.autoattack import (
    Apgd,
    Attack,
    AutoAttack,
    Embedding,
    Fab,
    Fgsm,
    Pgd,
    Plan,
    Square,
    Stage,
    autoattack,
    plan,
    run_stage,
    stage_name,
)
from cfamc_cli.engine.attacks.fab import fab
from cfamc_cli.engine.attacks.pgd import embedding_pgd, fgsm, pgd
from cfamc_cli.engine.attacks.search import Predict, fooled, logits_at
from cfamc_cli.engine.attacks.square import square

__all__ = [
    "Apgd",
    "Attack",
    "AutoAttack",
    "Embedding",
    "Fab",
    "Fgsm",
    "Pgd",
    "Plan",
    "Predict",
    "Square",
    "Stage",
    "apgd",
    "autoattack",
    "embedding_pgd",
    "fab",
    "fgsm",
    "fooled",
    "logits_at",
    "pgd",
    "plan",
    "run_stage",
    "square",
    "stage_name",
]
