"""Phases of a run: what each starts from and draws, what counts on over the run, going on across their borders."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain import Listener, never, newest_bytes, trained, trainer_of
from tiny import image_folder, tiny_recipe
from torch import Tensor

from cfamc_cli import cli
from cfamc_cli.engine import checkpoint, journal, monitor, pretrain, randomness
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.optim import AdamWOptimizer, LarsOptimizer
from cfamc_cli.errors import CfamcError
from cfamc_cli.recipe.file import to_toml
from cfamc_cli.recipe.plan import plan
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.store.records import EvaluationLine, TrainLine, read_metrics
from cfamc_cli.store.runs import RunFolder

PHASES: list[dict[str, Any]] = [
    {
        "epochs": 0.5,  # of 5 batches
        "batch_size": 12,
        "crops": [{"count": 1, "size": 8}, {"count": 2, "size": 12}],
        "objective": {"name": "simclr"},
        "adversary": {"name": "pgd", "steps": 2, "views": "second", "start": "random"},
        "optimizer": {"lr": 0.1, "momentum": 0.5},
        "schedule": {"name": "cosine", "warmup": 1},
    },
    {"epochs": 0.25, "objective": {"name": "supcon"}, "augment": {"flip": 0.0}},
]
SHORT = {"epochs": 0.25, "log_every": 1}


def phased(*phases: Mapping[str, Any], **tables: Any) -> Recipe:
    """Two batches of free training of 3 replays, and then `phases`, or those above: 3 of PGD and 2 of free training."""
    tables = {"train": SHORT} | tables
    return tiny_recipe(phase=phases or PHASES, **tables)


def weights_of(trainer: pretrain.Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.encoder.state_dict().items()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# What counts on, and what starts anew


def test_each_phase_has_its_own_updates_and_learning_rates(tiny_images: ImageSet, tmp_path: Path) -> None:
    trainer, sink = trained(phased(), tiny_images, tmp_path)
    lines = [record for record in sink.records if record["kind"] == "train"]
    assert [(line["phase"], line["batch"], line["step"]) for line in lines] == [
        *((0, 1, 3), (0, 2, 6)),
        *((1, 3, 7), (1, 4, 8), (1, 5, 9)),
        *((2, 6, 12), (2, 7, 15)),
    ]
    epochs = [1 / 8, 2 / 8, *(2 / 8 + batch / 5 for batch in (1, 2, 3)), 0.85 + 1 / 8, 0.85 + 2 / 8]
    assert [line["epoch"] for line in lines] == pytest.approx(epochs)

    def cosine(step: int, updates: int, base: float = 0.3) -> float:
        return base * (1 + math.cos(math.pi * step / updates)) / 2

    first = [cosine(2, 6), cosine(5, 6)]  # of each batch the last update
    second = [0.1, 0.1, cosine(1, 2, base=0.1)]  # a warm-up of one update, and a cosine over the other two
    assert [line["lr"] for line in lines] == pytest.approx([*first, *second, *first])
    assert (trainer.total, trainer.where()["step"]) == (15, 15)
    shown = [(done, total) for _, done, total, _ in sink.shown]
    assert shown == [(line["step"], 15) for line in lines]


def test_a_phase_starts_from_the_end_of_the_one_before_and_carries_nothing_else(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(phased(train=SHORT | {"keep": 9, "checkpoint_every": 1}), tiny_images)
    began: list[dict[str, Tensor]] = []
    ended: list[dict[str, Tensor]] = []
    enter, crops_of = trainer.enter, trainer.crops_of

    def noted(phase: int) -> None:
        ended.append(weights_of(trainer))
        before = trainer.optimizer, trainer.adversary
        enter(phase)
        assert trainer.optimizer is not before[0]
        assert trainer.adversary is not before[1]
        assert not any(buffer.any() for buffer in trainer.optimizer.momentum)
        assert trainer.adversary.delta == []

    def taken(batch: int) -> object:
        if batch == 0:
            began.append(weights_of(trainer))
        return crops_of(batch)

    monkeypatch.setattr(trainer, "enter", noted)
    monkeypatch.setattr(trainer, "crops_of", taken)
    trainer.train(tmp_path, stop=never)
    assert len(began) == 3
    for step, end, start in zip((6, 9), ended, began[1:], strict=True):
        assert_equal(start, end)
        assert_equal(checkpoint.load(tmp_path / f"step-{step:08d}").model, end)
    assert isinstance(trainer.optimizer, LarsOptimizer)
    assert trainer.optimizer.settings == trainer.parts[0].optimizer
    assert [step for step, _ in checkpoints_of(tmp_path)] == [3, 6, 7, 8, 9, 12, 15]
    assert [phase for _, phase in checkpoints_of(tmp_path)] == [0, 0, 1, 1, 1, 2, 2]


def test_a_phase_may_have_another_optimizer_and_go_on_with_it(tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe = phased({"epochs": 0.25, "optimizer": {"name": "adamw", "lr": 0.01}})
    straight = trainer_of(recipe, tiny_images)
    assert isinstance(straight.optimizer, LarsOptimizer)
    straight.train(tmp_path / "straight", stop=never)
    assert isinstance(straight.optimizer, AdamWOptimizer)
    sink = Listener()
    trainer = trainer_of(recipe, tiny_images, sink)
    trainer.train(tmp_path / "cut", stop=lambda: 15 * (trainer.where()["step"] == 9))
    resumed = trainer_of(recipe, tiny_images, sink)
    path, saved, _ = checkpoint.newest_valid(tmp_path / "cut")
    resumed.load(saved, path=path)
    assert int(resumed.optimizer.momentum[-1]) == resumed.step == 3
    resumed.train(tmp_path / "cut", stop=never)
    assert newest_bytes(tmp_path / "cut") == newest_bytes(tmp_path / "straight")


def test_with_an_average_the_next_phase_starts_from_it(tiny_images: ImageSet, tmp_path: Path) -> None:
    train = SHORT | {"average": 0.5, "keep": 9, "checkpoint_every": 1}
    trainer = trainer_of(phased({"epochs": 0.125, "optimizer": {"lr": 0.0}}, train=train), tiny_images)
    trainer.train(tmp_path, stop=never)
    end, after = (checkpoint.load(tmp_path / f"step-{step:08d}") for step in (6, 9))
    weights = {name for name, _ in trainer.encoder.named_parameters()}  # which the second phase leaves as they are
    raw = {name.removeprefix("raw."): value for name, value in after.state.items() if name.startswith("raw.")}
    for name in weights:
        assert torch.equal(raw[name], end.model[name]), name
        assert torch.equal(after.model[name], end.model[name]), name
    assert not all(torch.equal(end.state[f"raw.{name}"], end.model[name]) for name in weights)
    # the average's decay rises anew: 2/11, 3/12 and 4/13, and the last batch-norm statistics outweigh the first
    assert [n for n in range(1, 4) if (1 + n) / (10 + n) < 0.5] == [1, 2, 3]


def checkpoints_of(folder: Path) -> list[tuple[object, object]]:
    progress = [checkpoint.load(path).progress for path in checkpoint.list_checkpoints(folder)[::-1]]
    return [(found["step"], found["phase"]) for found in progress]


def test_a_run_of_phases_is_runs_that_start_from_each_other(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, where the later run draws what the phase draws; the first draws what a run without phases does."""
    recipe = phased(*PHASES, {"epochs": 0.25})  # the last phase could carry on what the one before it leaves
    whole, sink = trained(recipe, tiny_images, tmp_path / "whole")
    weights, records = None, []
    for place, part in enumerate(recipe.parts()):
        assert part.phase == ()
        if place:
            monkeypatch.setattr(pretrain, "phase_address", lambda _, place=place: ("phase", place))
            monkeypatch.setattr(randomness, "phase_address", lambda _, place=place: ("phase", place))
            randomness.epoch_order.cache_clear()
        own = Listener()
        trainer = trainer_of(part, tiny_images, own)
        if weights is not None:
            trainer.encoder.load_state_dict(weights)
        trainer.train(tmp_path / f"{place}", stop=never)
        weights = weights_of(trainer)
        records += own.records
    randomness.epoch_order.cache_clear()
    assert weights is not None
    assert_equal(whole.encoder.state_dict(), weights)
    for one, other in zip(sink.records, records, strict=True):
        assert {**one, **other} == {
            **one,
            **other,
            **{key: one[key] for key in one.keys() - {"step", "batch", "epoch"}},
        }


def test_no_two_phases_draw_alike(tiny_images: ImageSet) -> None:
    """The same epoch and batch of each; the first phase draws what a run without phases does."""
    phase = {"epochs": 0.25}
    trainer, alone = trainer_of(phased(phase, phase), tiny_images), trainer_of(tiny_recipe(train=SHORT), tiny_images)
    crops, deltas, orders = [], [], []
    for number in range(3):
        trainer.enter(number)
        crops.append(trainer._generators("crops", 0)[0].initial_seed())
        deltas.append(trainer._generators("delta", 0)[0].initial_seed())
        orders.append(randomness.epoch_order(0, 0, 64, number).tolist())
    assert len({*crops, *deltas}) == 6
    assert len(set(map(tuple, orders))) == 3
    assert [sorted(order) for order in orders] == [list(range(64))] * 3
    assert crops[0] == alone._generators("crops", 0)[0].initial_seed()
    assert deltas[0] == alone._generators("delta", 0)[0].initial_seed()
    assert orders[0] == randomness.epoch_order(0, 0, 64).tolist()


def test_what_a_phase_does_not_give_is_the_recipes() -> None:
    first, second, third = phased().parts()
    assert second.train == first.train.model_copy(update={"epochs": 0.5, "batch_size": 12})
    assert third.train == first.train
    assert (second.views, second.replays, second.ascent_steps, second.moved_views) == (3, 1, 2, 2)
    assert (third.crops, third.adversary, third.optimizer, third.schedule) == (
        *(first.crops, first.adversary, first.optimizer, first.schedule),
    )
    assert (second.augment, third.augment.flip, third.augment.jitter_p) == (first.augment, 0.0, 0.8)
    assert second.optimizer.weight_decay == 1e-4  # whole: its default
    assert [part.reads_labels for part in (first, second, third)] == [False, False, True]
    assert phased().reads_labels


def test_labels_that_a_later_phase_needs_are_missed_at_once(tiny_images: ImageSet) -> None:
    unlabelled = dataclasses.replace(tiny_images, labels=None, classes=())
    with pytest.raises(CfamcError, match="label"):
        trainer_of(phased(), unlabelled)
    trainer = trainer_of(phased({"epochs": 0.25}), unlabelled)
    assert trainer.labels is None


# The plan


def test_a_plan_is_the_sum_over_the_phases() -> None:
    recipe = phased()
    whole, each = plan(recipe, 64), [plan(part, 64) for part in recipe.parts()]
    assert (whole.batches, whole.weight_updates) == (2 + 3 + 2, 6 + 3 + 6)
    assert whole.view_passes == 6 * 8 * 4 + 3 * 12 * 3 + 6 * 8 * 4
    assert whole.attack_view_passes == 3 * 12 * 2 * 2
    assert whole.flops == sum(part.flops for part in each)
    trained_by = [part.flops_per_view * part.view_passes for part in each]
    assert whole.flops_per_view == pytest.approx(sum(trained_by) / whole.view_passes)
    assert whole.memory == max(part.memory for part in each) == each[1].memory > each[0].memory
    assert (whole.crop_bytes, whole.activation_bytes) == (each[1].crop_bytes, each[1].activation_bytes)
    assert whole.memory_recompute == max(part.memory_recompute for part in each)
    assert (whole.parameters, whole.batches_per_epoch) == (each[0].parameters, 8)


# Going on


@pytest.fixture
def quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(
        *_: object, eps: str, where: monitor.Where, stop: Callable[[], int], **__: object
    ) -> EvaluationLine | None:
        return None if stop() == 2 else EvaluationLine(**where, n=20, knn=5, clean=10, robust=1, eps=eps, attack="pgd")

    monkeypatch.setattr(journal, "HELD_OUT", 20)
    monkeypatch.setattr(monitor, "evaluate", evaluate)


@pytest.mark.usefixtures("quick_evaluation")
@pytest.mark.parametrize("average", [0.0, 0.5])
def test_stopped_after_every_batch_of_every_phase_equals_straight_through(
    average: float, tiny_images: ImageSet, tmp_path: Path
) -> None:
    train = SHORT | {"evaluate_every": 1, "log_every": 2, "average": average}
    straight, records = trained(phased(train=train), tiny_images, tmp_path / "straight")
    evaluated = [record["step"] for record in records.records if record["kind"] == "evaluation"]
    assert evaluated == [0, 6, 9, 15]  # before the first update, and at the end of each phase
    recipe, folder, signal, kept = (
        phased(train=train | {"memory": "recompute"}),
        tmp_path / "cut",
        15,
        Listener().records,
    )
    sittings: list[tuple[int, int | None]] = []
    while signal:
        sink = Listener(records=list(kept))
        trainer = trainer_of(recipe, tiny_images, sink)
        if sittings:
            path, saved, problems = checkpoint.newest_valid(folder)
            assert not problems
            trainer.load(saved, path=path)
        signal = trainer.train(folder, stop=lambda: 15)
        kept = sink.records
        sittings.append((trainer.where()["step"], trainer.where()["phase"]))
    assert sittings == [(3, 0), (6, 0), (7, 1), (8, 1), (9, 1), (12, 2), (15, 2)]
    assert kept == records.records
    assert newest_bytes(folder) == newest_bytes(tmp_path / "straight")
    assert straight.phase == 2


@pytest.mark.usefixtures("quick_evaluation")
@pytest.mark.parametrize("border", [6, 9])
def test_a_run_that_is_cut_in_the_evaluation_between_two_phases_goes_on(
    border: int, tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = phased(train=SHORT | {"evaluate_every": 1})
    _, uncut = trained(recipe, tiny_images, tmp_path / "straight")
    sink = Listener()
    trainer = trainer_of(recipe, tiny_images, sink)
    asked: list[int] = []

    def stop() -> int:  # the batch's own asking comes first
        asked.append(trainer.where()["step"])
        return 2 if asked.count(border) >= 2 else 0

    assert (trainer.train(tmp_path, stop=stop), trainer.where()["step"]) == (2, border)
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    assert (saved.progress["step"], saved.progress["phase"]) == (border, 0 if border == 6 else 1)
    resumed = trainer_of(recipe, tiny_images, sink)
    resumed.load(saved, path=path)
    assert resumed.train(tmp_path, stop=never) == 0
    assert sink.records == uncut.records
    assert newest_bytes(tmp_path) == newest_bytes(tmp_path / "straight")


def test_checkpoints_of_runs_before_there_were_phases_are_read(tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe = tiny_recipe(train=SHORT)
    trainer_of(recipe, tiny_images).train(tmp_path, stop=lambda: 15)
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    assert saved.progress.pop("phase") == 0
    resumed = trainer_of(recipe, tiny_images)
    resumed.load(saved, path=path)
    assert (resumed.phase, resumed.step) == (0, 3)


@pytest.mark.parametrize(
    "progress",
    [
        {"phase": 3},
        {"phase": -1, "step": 9},
        {"phase": "1"},
        {"step": 8.0},
        {"phase": 0, "step": 9},
        {"phase": 2, "step": 6},
    ],
)
def test_a_position_that_is_of_no_phase_is_refused(
    progress: dict[str, object], tiny_images: ImageSet, tmp_path: Path
) -> None:
    trainer = trainer_of(phased(), tiny_images)
    trainer.train(tmp_path, stop=lambda: 15 if trainer.phase == 1 else 0)
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    trainer_of(phased(), tiny_images).load(saved, path=path)
    saved.progress.update(progress)
    with pytest.raises(CfamcError, match="its state does not fit the recipe"):
        trainer_of(phased(), tiny_images).load(saved, path=path)


# Divergence, several processes, a run of the command


def test_divergence_in_a_later_phase_is_told_with_its_update_of_the_run(tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe = phased({"epochs": 0.25, "optimizer": {"lr": 1e30, "clip": False}})
    with pytest.raises(journal.Diverged) as diverged:
        trainer_of(recipe, tiny_images).train(tmp_path, stop=never)
    step, batch = diverged.value.details["step"], diverged.value.details["batch"]
    assert isinstance(step, int)
    assert 6 < step < 12
    assert batch == 2 + (step - 6) // 3
    assert f"at update {step}:" in diverged.value.message


def test_shares_of_a_batch_follow_the_phase(tiny_images: ImageSet) -> None:
    trainer = trainer_of(phased(), tiny_images, world=World(2, 3))
    found = []
    for phase in range(3):
        trainer.enter(phase)
        found.append((trainer.shares, trainer.crops_of(0)[0][-1].shape[:2]))
    assert found == [([2, 3, 3], (4, 3)), ([4, 4, 4], (2, 4)), ([2, 3, 3], (4, 3))]


def test_a_command_trains_all_phases_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image_folder(tmp_path / "images", train=22)
    recipe = phased(data={"limit": 64})
    Path("recipe.toml").write_text(to_toml(recipe))
    assert cli.run(["pretrain", "recipe.toml", "--set", "phase.1.epochs=0.125", "--quiet"]) in (0, None)
    (folder,) = Path("runs").iterdir()
    run = RunFolder(folder)
    record, costs = run.record(), plan(run.recipe(), 64)
    assert [record.status, record.progress.step, record.progress.total] == ["finished", 12, 12]
    assert (record.totals.steps, record.totals.view_passes) == (costs.weight_updates, costs.view_passes)
    assert record.progress.epoch == pytest.approx(0.25 + 0.6 + 0.125)
    assert run.recipe().phase[1].epochs == 0.125
    lines = [line for line in read_metrics(run.metrics) if isinstance(line, TrainLine)]
    assert [line.phase for line in lines] == [0, 0, 1, 1, 1, 2]
    assert [path.name for path in run.checkpoints.iterdir() if path.name == "step-00000012"]
    settings = json.loads(run.resolved_json.read_text())["phase"]
    assert settings[1].keys() == {"epochs", "objective", "augment"}
    assert cli.run(["export", "--part", "backbone", "--out", "weights", "--quiet"]) in (0, None)
    assert (
        "Pretrained with labels on folder with the emp-ssl objective and free adversarial training at eps 8/255, then "
        "with the simclr objective and pgd adversarial training at eps 8/255, then with the supcon objective and free "
        "adversarial training at eps 8/255, by cfamc"
    ) in " ".join(Path("weights/README.md").read_text().split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_phase_of_other_shapes_is_compiled_again_and_trains_alike(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = partial(torch.nn.Module.compile, backend=counted)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compiled(self, **given))
    phases = [
        {"epochs": 0.25, "batch_size": 8 + place, "crops": [{"count": 1, "size": size}, {"count": 2, "size": 12}]}
        | {"adversary": {"name": "pgd", "steps": 1}}
        for place, size in enumerate((8, 9, 10, 11, 12))
    ]
    _, plain = trained(phased(*phases), tiny_images, tmp_path / "plain")
    _, sink = trained(phased(*phases, train=SHORT | {"compile": True}), tiny_images, tmp_path / "compiled")
    assert [line["loss"] for line in sink.records] == pytest.approx([line["loss"] for line in plain.records], rel=1e-3)
    assert (
        counted.frame_count == 1 + 5 * 4
    )  # the first is free training; of PGD two groups, with statistics and without
    assert "recompile_limit" not in caplog.text
