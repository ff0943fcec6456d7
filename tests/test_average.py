"""The moving average of the weights: by hand, in every file and evaluation, and as far as training goes: nowhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import recipe_text, tiny_recipe
from torch import Tensor

from cfamc_cli import cli
from cfamc_cli.engine import checkpoint
from cfamc_cli.engine.average import Average
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.encoder import Encoder, build_encoder
from cfamc_cli.engine.heads.classifier import load_encoder
from cfamc_cli.engine.journal import Diverged
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sections import Clock
from cfamc_cli.engine.sink import NullLedger, NullTalk
from cfamc_cli.errors import CfamcError
from cfamc_cli.recipe.plan import plan
from cfamc_cli.recipe.schema import Model, Recipe

CPU = torch.device("cpu")
SHORT = {"epochs": 0.375, "log_every": 2}  # 3 batches
DECAY = 0.33  # from the fourth update on; 2/11, 3/12 and 4/13 before

State = dict[str, Tensor]


def trainer_of(recipe: Recipe, images: ImageSet) -> Trainer:
    return Trainer(recipe, images, device=CPU, world=World(), talk=NullTalk(), ledger=NullLedger())


def copied(encoder: Encoder) -> State:
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def never() -> int:
    return 0


def by_hand(start: State, weights: list[State]) -> State:
    """The average in float64 after all updates."""
    average = {name: value.double() for name, value in start.items()}
    for n, state in enumerate(weights, 1):
        d = (2 / 11, 3 / 12, 4 / 13)[n - 1] if n < 4 else DECAY
        for name, value in state.items():
            average[name] = d * average[name] + (1 - d) * value.double() if value.is_floating_point() else value
    return average


@pytest.mark.parametrize(
    ("adversary", "settings"),
    [("free", {}), ("pgd", {"epochs": 0.625, "precision": "bfloat16", "memory": "recompute"})],
)
def test_what_is_evaluated_and_saved_is_the_average_of_weights_and_statistics(
    adversary: str, settings: dict[str, Any], tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = SHORT | settings | {"average": DECAY, "evaluate_every": 1}
    trainer = trainer_of(tiny_recipe("emp-ssl", adversary, train=train), tiny_images)
    start = build_encoder(trainer.recipe.model, generator=torch.Generator().manual_seed(9)).state_dict()
    trainer.encoder.load_state_dict(start)  # as train.init does
    weights: list[State] = []
    evaluated: list[State] = []
    zero_grad = trainer.optimizer.zero_grad

    def after_step() -> None:
        weights.append(copied(trainer.encoder))
        zero_grad()

    def evaluate(encoder: Encoder, *_: object, **__: object) -> bool:
        evaluated.append(copied(encoder))
        return True

    monkeypatch.setattr(trainer.optimizer, "zero_grad", after_step)
    monkeypatch.setattr(trainer.journal, "evaluate", evaluate)
    trainer.train(tmp_path, stop=never)

    assert len(weights) == trainer.updates > 4
    average = by_hand(start, weights)
    read = load_encoder(tmp_path, trainer.recipe.model, device=CPU, talk=NullTalk()).encoder.state_dict()
    for name, value in read.items():
        torch.testing.assert_close(value.double(), average[name].double(), rtol=1e-5, atol=1e-7, msg=name)
        assert value.stride() == trainer.encoder.state_dict()[name].stride()
    assert len(evaluated) == 2
    assert same(evaluated[0], start)
    assert same(evaluated[1], read)
    _, saved, _ = checkpoint.newest_valid(tmp_path)
    assert same({name: saved.state[f"raw.{name}"] for name in read}, weights[-1])


def test_training_does_not_know_of_the_average(tiny_images: ImageSet, tmp_path: Path) -> None:
    files = {}
    for decay in (0.0, 0.9):
        folder = tmp_path / str(decay)
        trainer = trainer_of(tiny_recipe(train=SHORT | {"average": decay}), tiny_images)
        trainer.train(folder, stop=never)
        files[decay] = checkpoint.newest_valid(folder)[1]
    plain, averaged = files[0.0], files[0.9]
    raw = {name: value for name, value in averaged.state.items() if name.startswith("raw.")}
    assert same({name: raw[f"raw.{name}"] for name in plain.model}, plain.model)
    assert same({name: value for name, value in averaged.state.items() if name not in raw}, plain.state)
    moved = [name for name in plain.model if not torch.equal(averaged.model[name], plain.model[name])]
    assert moved == [name for name in plain.model if not name.endswith("num_batches_tracked")]


def test_a_run_that_is_cut_after_every_batch_ends_with_the_files_of_an_uncut_one(
    tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = tiny_recipe(train=SHORT | {"average": 0.9})
    trainer_of(recipe, tiny_images).train(tmp_path / "straight", stop=never)
    trainer_of(recipe, tiny_images).train(tmp_path / "cut", stop=lambda: 15)
    for _ in range(2):
        resumed = trainer_of(recipe, tiny_images)
        path, saved, _ = checkpoint.newest_valid(tmp_path / "cut")
        resumed.load(saved, path=path)
        resumed.train(tmp_path / "cut", stop=lambda: 15)
    for file in ("model.safetensors", "state.safetensors", "manifest.json"):
        assert (tmp_path / "cut/step-00000009" / file).read_bytes() == (
            tmp_path / "straight/step-00000009" / file
        ).read_bytes()


Harm = Callable[[State], object]
HARMS: dict[str, tuple[Harm, str]] = {
    "missing": (lambda state: state.pop("raw.backbone.conv1.weight"), "lacks backbone.conv1.weight"),
    "not finite": (lambda state: state["raw.backbone.bn1.running_var"].fill_(torch.inf), "running_var is not finite"),
}


@pytest.mark.parametrize("name", HARMS)
def test_raw_weights_that_do_not_fit_are_refused(name: str, tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe, (harm, told) = tiny_recipe(train={"epochs": 0.125, "average": 0.9}), HARMS[name]
    trainer_of(recipe, tiny_images).train(tmp_path, stop=never)
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    harm(saved.state)
    with pytest.raises(CfamcError, match=rf"state\.safetensors: .*{told}") as caught:
        trainer_of(recipe, tiny_images).load(saved, path=path)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("which", ["average", "trained"])
def test_neither_an_average_nor_weights_are_saved_that_are_not_finite(
    which: str, tiny_images: ImageSet, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_recipe(train={"average": 0.9}), tiny_images)
    encoder = trainer.average.encoder if which == "average" else trainer.encoder
    encoder.state_dict()["pre_feature.1.running_mean"][3] = float("nan")
    with pytest.raises(Diverged):
        trainer.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_average_takes_its_time_from_the_optimizer() -> None:
    trained = Encoder(Model(width=1, hidden_dim=2, embedding_dim=2))
    average = Average(trained, decay=0.5)
    with Clock(CPU) as clock:
        average.update(1)
        clock.lap()
    assert [list(lap.host) for lap in clock.laps()] == [["optimizer"]]


def test_a_plan_counts_the_copy() -> None:
    plain, averaged = (plan(tiny_recipe(train={"average": decay}), 64) for decay in (0.0, 0.9))
    more = 4 * plain.parameters
    assert averaged.weight_bytes - plain.weight_bytes == averaged.memory - plain.memory == more
    assert averaged.memory_recompute - plain.memory_recompute == more


def test_a_person_is_told_and_every_command_reads_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CFAMC_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(recipe_text(epochs=0.25))
    told = "the average of the weights is evaluated and saved: train.average = 0.75"
    digests = []
    for decay in (0.75, 0):
        assert cli.run(["pretrain", "recipe.toml", "--set", f"train.average={decay}"]) in (0, None)
        printed = capsys.readouterr()
        assert (told in printed.err) == bool(decay)
        run = Path("runs", printed.out.split()[-1])
        assert cli.run(["probe", run.name, "--head", "knn", "--json", "--quiet"]) in (0, None)
        probe = json.loads(capsys.readouterr().out)
        digests.append(json.loads((run / "run.json").read_text())["recipe_digest"])
        model = max((run / "checkpoints").iterdir()) / "model.safetensors"
        assert probe["encoder_digest"] == hashlib.sha256(model.read_bytes()).hexdigest()
        assert cli.run(["export", run.name, "--out", f"out-{decay}", "--quiet"]) in (0, None)
        card = Path(f"out-{decay}/README.md").read_text()
        assert ("average of its weights and batch-norm statistics, of decay 0.75 a weight" in card) == bool(decay)
    assert digests[0] != digests[1]
