"""Catastrophic overfitting on a run that is made to collapse: the loss falls while PGD-10 breaks it ever more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe

from cfamc_cli.engine.data import sets
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.monitor import CHECKS, COST, schedule
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sink import NullLedger, NullTalk
from cfamc_cli.store.records import MetricLine


class Listener(NullTalk, NullLedger):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def metrics(self, line: MetricLine) -> None:
        self.records.append(line.written())

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def trained(adversary: dict[str, object], *, epochs: float, folder: Path) -> Listener:
    recipe = tiny_recipe(
        "emp-ssl",
        str(adversary["name"]),
        name="grip",
        data={"dataset": "fashion-mini", "root": None},
        crops=[{"count": 4, "size": 16}],
        model={"hidden_dim": 128, "embedding_dim": 64},
        adversary=adversary,
        train={"batch_size": 50, "epochs": epochs, "log_every": 20, "precision": "auto"},
    )
    listener = Listener()
    images = sets.load(recipe.data, "train", seed=0, cache=folder, talk=listener)
    trainer = Trainer(recipe, images, device=torch.device("cpu"), world=World(), talk=listener, ledger=listener)
    trainer.train(folder / "checkpoints", stop=lambda: 0)
    return listener


@pytest.mark.slow
def test_a_run_that_collapses_is_warned_of(tmp_path: Path) -> None:
    single_large_step = {"name": "pgd", "steps": 1, "start": "random", "eps": "16/255", "step_size": "20/255"}
    listener = trained(single_large_step, epochs=2.5, folder=tmp_path)
    grips = [record for record in listener.records if record["kind"] == "grip"]
    assert grips[-1]["lost"]
    assert grips[-1]["strongest"] - grips[-1]["clean"] > 2 * (grips[0]["strongest"] - grips[0]["clean"])
    assert any("catastrophic overfitting" in text for text in listener.warnings)


@pytest.mark.slow
def test_free_training_keeps_its_grip(tmp_path: Path) -> None:
    free = {"name": "free", "replays": 3, "eps": "16/255", "step_size": "0.02"}
    listener = trained(free, epochs=1, folder=tmp_path)
    grips = [record for record in listener.records if record["kind"] == "grip"]
    assert grips
    assert not any(record["lost"] for record in grips)
    assert not listener.warnings


@pytest.mark.parametrize(("updates", "batch", "passes"), [(15_000, 100, 1), (1500, 100, 1), (500, 50, 2), (72, 8, 6)])
def test_checks_cost_at_most_two_percent(updates: int, batch: int, passes: int) -> None:
    plan = schedule(updates=updates, batch_size=batch, passes_per_update=passes)
    checks = 0 if plan.every == 0 else updates // plan.every
    assert checks <= CHECKS + 1
    assert checks * plan.images * 13 <= COST * 1.06 * updates * batch * passes
