"""The loop: golden series, repetition and resumption bit for bit, divergence, and what it counts."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_inputs import checksum, crops, fill, uniform
from on_meta import META, watched
from tiny import tiny_recipe
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cfamc_cli.engine import checkpoint, journal, monitor, randomness
from cfamc_cli.engine.adversary import build_adversary
from cfamc_cli.engine.crops import crop_batch, sample_parameters
from cfamc_cli.engine.data.sets import ImageSet, class_balanced_split
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.encoder import Encoder, build_encoder, frozen_statistics
from cfamc_cli.engine.forecast import forecast
from cfamc_cli.engine.journal import Diverged
from cfamc_cli.engine.objectives import Terms, objective_loss
from cfamc_cli.engine.optim import AdamWOptimizer, LarsOptimizer, learning_rate
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sink import NullLedger, NullTalk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.plan import flops_per_view, plan
from cfamc_cli.recipe.schema import (
    Augment,
    Cosine,
    Crops,
    EmpSsl,
    FreeAdversary,
    Lars,
    Model,
    OfficialCosine,
    Recipe,
    SimClr,
    SupCon,
)
from cfamc_cli.store.records import EvaluationLine, GripLine, MetricLine, TimingLine, TrainLine

DATA = Path(__file__).parent / "data"
GOLDEN: dict[str, Any] = json.loads((DATA / "golden.json").read_text())
SERIES: dict[str, list[float]] = json.loads((DATA / "series.json").read_text())
SYSTEMS = [
    (objective, adversary) for objective in ("emp-ssl", "simclr", "supcon") for adversary in ("none", "pgd", "free")
]
SHORT = {"epochs": 0.375, "log_every": 2}  # 3 batches


@dataclass
class Listener(NullTalk, NullLedger):
    """Keeps the records that repeat."""

    records: list[Mapping[str, object]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    costs: list[TimingLine] = field(default_factory=list)
    shown: list[tuple[str, int, int, dict[str, float | str]]] = field(default_factory=list)

    def metrics(self, line: MetricLine) -> None:
        self.records.append(json.loads(json.dumps(line.written(), allow_nan=False)))

    def timing(self, line: TimingLine) -> None:
        self.costs.append(line)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def progress(self, task: str, done: int, total: int, values: Mapping[str, float | str]) -> None:
        self.shown.append((task, done, total, dict(values)))

    def positions(self) -> dict[str, int]:
        return {"metrics.jsonl": len(self.records)}


def trainer_of(
    recipe: Recipe, images: ImageSet, listener: Listener | None = None, *, world: World | None = None
) -> Trainer:
    listener = listener or Listener()
    return Trainer(recipe, images, device=torch.device("cpu"), world=world or World(), talk=listener, ledger=listener)


def never() -> int:
    return 0


def trained(recipe: Recipe, images: ImageSet, folder: Path) -> tuple[Trainer, Listener]:
    sink = Listener()
    trainer = trainer_of(recipe, images, sink)
    assert (trainer.train(folder, stop=never), trainer.step) == (0, trainer.updates)
    return trainer, sink


def newest_bytes(folder: Path) -> dict[str, bytes]:
    path = checkpoint.list_checkpoints(folder)[0]
    return {name: (path / name).read_bytes() for name in (checkpoint.MODEL, checkpoint.STATE, checkpoint.MANIFEST)}


def losses(sink: Listener) -> list[float]:
    return [float(str(record["loss"])) for record in sink.records if record["kind"] == "train"]


# Numbers


@pytest.mark.parametrize(("objective", "adversary"), SYSTEMS)
def test_golden_losses(objective: str, adversary: str, tiny_images: ImageSet, tmp_path: Path) -> None:
    """Frozen on a CPU in float32; processors round differently, and five updates let that grow to about 1e-4."""
    recipe = tiny_recipe(objective, adversary, train={"epochs": 0.625 if adversary != "free" else 0.25})
    _, sink = trained(recipe, tiny_images, tmp_path)
    assert losses(sink) == pytest.approx(SERIES[f"{objective} {adversary}"], rel=2e-3)


@pytest.mark.parametrize("name", GOLDEN["free"])
def test_official_free_training(name: str) -> None:
    """Nine updates of three batches in float64, on the official loop's inputs: losses, lr, delta and weights."""
    expected = GOLDEN["free"][name]
    objective: EmpSsl | SimClr | SupCon
    match name.split(",")[0]:
        case "emp-ssl":
            objective = EmpSsl(name="emp-ssl")
        case "simclr":
            objective = SimClr(name="simclr")
        case _:
            objective = SupCon(name="supcon")
    two_views = not isinstance(objective, EmpSsl)
    tolerance = 1e-4 if two_views else 1e-9  # theirs works with other rounding
    schedule = OfficialCosine(name="official-cosine") if "official" in name else Cosine(name="cosine")
    net = Encoder(Model(width=4, hidden_dim=16, embedding_dim=8)).double()
    fill(net.state_dict())
    optimizer = LarsOptimizer(list(net.parameters()), Lars())
    adversary = build_adversary(FreeAdversary(name="free", views="second" if two_views else "all"))
    labels = torch.tensor([0, 1, 0, 2])
    seen: dict[str, list[float]] = {"lr": [], "loss": [], "delta": []}

    def refused(_: object) -> Tensor:
        raise AssertionError("free training asks for no loss of its own")

    for step in range(9):
        if step % 3 == 0:
            batch = crops(step // 3, views=2 if two_views else 3, images=4, size=8)
            groups = [batch[:1], batch[1:]] if two_views else [batch]
            adversary.begin(groups, [torch.Generator()] * len(groups))
        moved = [*adversary.spared, *adversary.perturb(refused)]
        seen["delta"].append(checksum(adversary.delta[0].flatten(0, 1), key="delta"))
        loss = objective_loss(net.embed(moved), labels, objective=objective).loss
        torch.autograd.backward(loss)
        adversary.ascend()
        lr = learning_rate(step, base=0.3, schedule=schedule, updates=9, replays=3)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        seen["lr"].append(lr)
        seen["loss"].append(loss.item())
    for key, values in seen.items():
        assert values == pytest.approx(expected[key], rel=tolerance, abs=tolerance), key
    state = net.state_dict()
    for key, value in expected["state"].items():
        assert checksum(state[key], key=key) == pytest.approx(value, rel=tolerance, abs=tolerance), key


def test_training_lowers_the_loss_and_spreads_the_embeddings(tiny_images: ImageSet, tmp_path: Path) -> None:
    _, sink = trained(tiny_recipe("emp-ssl", "none", train={"epochs": 2.0}), tiny_images, tmp_path)
    assert sum(losses(sink)[-5:]) < sum(losses(sink)[:5])


@pytest.mark.parametrize("views", ["all", "second"])
def test_a_run_makes_the_passes_and_the_arithmetic_of_its_plan(
    views: str, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "COST", 0.0)
    monkeypatch.setattr(monitor, "representation_std", lambda *_: torch.ones(()))
    groups = [{"count": 1, "size": 8}, {"count": 2, "size": 12}]
    adversary = {"views": views, "steps": 3}
    recipe = tiny_recipe("simclr", "pgd", crops=groups, adversary=adversary, train={"epochs": 0.25})
    trainer = trainer_of(recipe, tiny_images)
    images = 0

    def counted(_: object, inputs: tuple[Tensor]) -> None:
        nonlocal images
        images += len(inputs[0])

    trainer.encoder.register_forward_pre_hook(counted)
    with FlopCounterMode(display=False) as counter:
        trainer.train(tmp_path, stop=never)
    costs = plan(recipe, len(tiny_images.images))
    assert images == costs.view_passes + costs.attack_view_passes
    assert images == trainer.updates * trainer.journal._passes_per_update
    assert counter.get_total_flops() == pytest.approx(costs.flops, rel=0.02)  # crops and objective come on top


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_view_that_is_embedded_before_the_attack_trains_as_beside_the_other(
    precision: str, tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = tiny_recipe("simclr", "pgd", train={"epochs": 0.125, "precision": precision})
    trainer, by_hand = (trainer_of(recipe, tiny_images) for _ in range(2))
    trainer.train(tmp_path, stop=never)
    clean, second = by_hand.crops_of(0)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        z = by_hand.encoder.train().embed([clean, second + trainer.adversary.delta[0]])
    torch.autograd.backward(objective_loss(z, None, objective=recipe.objective).loss)
    by_hand.optimizer.step(lr=by_hand.learning_rate())
    for name, value in by_hand.encoder.state_dict().items():
        assert torch.equal(trainer.encoder.state_dict()[name], value), name


# Repetition


@pytest.mark.parametrize(("objective", "adversary"), [("emp-ssl", "free"), ("simclr", "pgd")])
def test_two_runs_are_bit_identical(objective: str, adversary: str, tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe = tiny_recipe(objective, adversary, train=SHORT)
    _, first = trained(recipe, tiny_images, tmp_path / "first")
    torch.manual_seed(99)  # the global state does not matter
    _, second = trained(recipe, tiny_images, tmp_path / "second")
    assert first.records == second.records
    assert newest_bytes(tmp_path / "first") == newest_bytes(tmp_path / "second")
    _, other = trained(tiny_recipe(objective, adversary, train=SHORT, seed=1), tiny_images, tmp_path / "other")
    assert losses(other) != losses(first)


@pytest.mark.parametrize(
    ("objective", "adversary"),
    [("emp-ssl", "none"), ("emp-ssl", "pgd"), ("emp-ssl", "free"), ("simclr", "free"), ("supcon", "free")],
)
def test_less_memory_gives_the_same_bytes_also_to_a_run_that_turns_to_it(
    objective: str, adversary: str, tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = tiny_recipe(objective, adversary, train=SHORT)
    frugal = tiny_recipe(objective, adversary, train=SHORT | {"memory": "recompute"})
    _, straight = trained(recipe, tiny_images, tmp_path / "straight")
    sink = Listener()
    trainer_of(recipe, tiny_images, sink).train(tmp_path / "cut", stop=lambda: 15)
    path, saved, _ = checkpoint.newest_valid(tmp_path / "cut")
    turned = trainer_of(frugal, tiny_images, sink)
    turned.load(saved, path=path)
    assert turned.encoder.backbone.memory == "recompute"
    turned.train(tmp_path / "cut", stop=never)
    assert sink.records == straight.records
    assert newest_bytes(tmp_path / "cut") == newest_bytes(tmp_path / "straight")


@pytest.mark.parametrize(
    ("objective", "adversary"),
    [("emp-ssl", "none"), ("emp-ssl", "pgd"), ("emp-ssl", "free"), ("simclr", "free"), ("supcon", "free")],
)
def test_stopped_after_every_batch_equals_straight_through(
    objective: str, adversary: str, tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = tiny_recipe(objective, adversary, train=SHORT)
    straight, records = trained(recipe, tiny_images, tmp_path / "straight")
    kept: list[Mapping[str, object]] = []
    folder = tmp_path / "cut"
    replays = recipe.replays
    for step in range(replays, straight.updates + 1, replays):
        sink = Listener(records=list(kept))
        trainer = trainer_of(recipe, tiny_images, sink)
        if step > replays:
            path, saved, problems = checkpoint.newest_valid(folder)
            assert not problems
            assert saved.progress["positions"] == {"metrics.jsonl": len(kept)}
            trainer.load(saved, path=path)
        signal = trainer.train(folder, stop=lambda: 15)
        kept = sink.records
        finished = step == straight.updates
        assert (signal, trainer.step) == (0 if finished else 15, step)
    assert kept == records.records
    assert newest_bytes(folder) == newest_bytes(tmp_path / "straight")


def test_adamw_goes_on_bit_for_bit_and_moves_weights_by_its_own_step(tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe = tiny_recipe("emp-ssl", "free", train=SHORT, optimizer={"name": "adamw", "lr": 0.01, "weight_decay": 0.5})
    straight = trainer_of(recipe, tiny_images)
    assert isinstance(straight.optimizer, AdamWOptimizer)
    began = [weight.detach().clone() for weight in straight.optimizer.parameters]
    straight.train(tmp_path / "straight", stop=never)
    trainer_of(recipe, tiny_images).train(tmp_path / "cut", stop=lambda: 15)
    path, saved, _ = checkpoint.newest_valid(tmp_path / "cut")
    first = [saved.model[name] for name, _ in straight.encoder.named_parameters()]
    assert saved.progress["step"] == 3  # replays, and so many steps of at most a little more than the rate
    assert all(0 < float((a - b).abs().max()) < 0.04 for a, b in zip(began, first, strict=True))
    resumed = trainer_of(recipe, tiny_images)
    resumed.load(saved, path=path)
    resumed.train(tmp_path / "cut", stop=never)
    assert newest_bytes(tmp_path / "cut") == newest_bytes(tmp_path / "straight")
    assert int(resumed.optimizer.momentum[-1]) == resumed.step == straight.updates


def test_a_signal_during_a_save_is_taken_before_the_next_batch(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, save = [0], checkpoint.save

    def signalled(*arguments: Any) -> Path:
        arrived[0] = 2
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", signalled)
    trainer = trainer_of(tiny_recipe("emp-ssl", "free", train={"checkpoint_every": 2}), tiny_images)
    assert (trainer.train(tmp_path, stop=lambda: arrived[0]), trainer.step) == (2, 6)


@pytest.mark.parametrize("cut", [0, 9])
def test_an_evaluation_that_a_signal_cut_is_made_when_the_run_goes_on(
    cut: int, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(
        *_: object, eps: str, where: monitor.Where, stop: Callable[[], int], **__: object
    ) -> EvaluationLine | None:
        line = EvaluationLine(**where, n=20, knn=5, clean=10, robust=1, eps=eps, attack="pgd-10")
        return None if where["step"] == cut and stop() else line

    monkeypatch.setattr(journal, "HELD_OUT", 20)
    monkeypatch.setattr(monitor, "evaluate", evaluate)
    recipe = tiny_recipe("emp-ssl", "free", train={**SHORT, "evaluate_every": 1})
    _, uncut = trained(recipe, tiny_images, tmp_path / "straight")
    sink = Listener()
    trainer = trainer_of(recipe, tiny_images, sink)
    assert trainer.train(tmp_path, stop=lambda: 15 if trainer.step == cut else 0) == 15
    assert [record["step"] for record in sink.records if record["kind"] == "evaluation"] == ([0] if cut else [])
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    assert saved.progress["step"] == cut
    assert saved.progress["positions"] == {"metrics.jsonl": len(sink.records)}
    resumed = trainer_of(recipe, tiny_images, sink)
    resumed.load(saved, path=path)
    assert resumed.train(tmp_path, stop=never) == 0
    assert sink.records == uncut.records
    assert newest_bytes(tmp_path)[checkpoint.STATE] == newest_bytes(tmp_path / "straight")[checkpoint.STATE]


def test_a_free_adversary_without_radius_and_replays_is_none_bit_for_bit(tiny_images: ImageSet, tmp_path: Path) -> None:
    still = {"eps": "0", "replays": 1}
    free, with_free = trained(
        tiny_recipe("emp-ssl", "free", train=SHORT, adversary=still), tiny_images, tmp_path / "free"
    )
    none, without = trained(tiny_recipe("emp-ssl", "none", train=SHORT), tiny_images, tmp_path / "none")
    assert losses(with_free) == losses(without)
    for name, value in none.encoder.state_dict().items():
        assert torch.equal(free.encoder.state_dict()[name], value), name
    for ours, theirs in zip(free.optimizer.momentum, none.optimizer.momentum, strict=True):
        assert torch.equal(ours, theirs)


def test_pgd_without_radius_is_none_bit_for_bit(tiny_images: ImageSet, tmp_path: Path) -> None:
    pgd, _ = trained(tiny_recipe("emp-ssl", "pgd", train=SHORT, adversary={"eps": "0"}), tiny_images, tmp_path / "pgd")
    none, _ = trained(tiny_recipe("emp-ssl", "none", train=SHORT), tiny_images, tmp_path / "none")
    for name, value in none.encoder.state_dict().items():
        assert torch.equal(pgd.encoder.state_dict()[name], value), name


# What is counted


@pytest.mark.parametrize("adversary", ["none", "pgd", "free"])
def test_statistics_move_once_a_weight_update(adversary: str, tiny_images: ImageSet, tmp_path: Path) -> None:
    trainer, _ = trained(tiny_recipe("emp-ssl", adversary, train=SHORT), tiny_images, tmp_path)
    assert trainer.updates == 3 * trainer.recipe.replays
    assert int(trainer.encoder.state_dict()["backbone.bn1.num_batches_tracked"]) == trainer.updates
    assert all(parameter.grad is None for parameter in trainer.encoder.parameters())


def test_an_incomplete_batch_is_dropped(tiny_images: ImageSet, tmp_path: Path) -> None:
    images = tiny_images.take(torch.arange(31))
    trainer, sink = trained(tiny_recipe("emp-ssl", "none"), images, tmp_path)
    assert (trainer.per_epoch, trainer.updates) == (3, 3)
    assert sink.records[-1]["epoch"] == 1


def test_an_epoch_sees_every_image_once_in_another_order(
    tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_recipe("emp-ssl", "none", train={"epochs": 2.0}), tiny_images)
    seen: list[Tensor] = []

    def note(images: Tensor, indices: Tensor, *, device: torch.device) -> Tensor:
        seen.append(indices)
        return images.index_select(0, indices)

    monkeypatch.setattr("cfamc_cli.engine.pretrain.gather", note)
    for batch in range(16):
        trainer.crops_of(batch)
    first, second = torch.cat(seen[:8]), torch.cat(seen[8:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(64))
    assert not torch.equal(first, second)


def test_groups_of_different_sizes_train_together(tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe = tiny_recipe("emp-ssl", "free", train=SHORT).model_dump(by_alias=True)
    recipe["crops"] = [{"count": 2, "size": 8}, {"count": 3, "size": 12, "scale": [0.1, 0.4]}]
    trainer, _ = trained(Recipe.model_validate(recipe), tiny_images, tmp_path)
    assert [tuple(delta.shape) for delta in trainer.adversary.delta] == [(2, 8, 3, 8, 8), (3, 8, 3, 12, 12)]


UNUSUAL: dict[str, Any] = {
    "augment": {"flip": 0.9, "jitter": [0.1, 0.2, 0.3, 0.05], "jitter_p": 0.6, "grayscale_p": 0.5, "blur_p": 0.4},
    "objective": {"invariance_weight": 7.0, "tcr_weight": 3.0, "tcr_eps": 0.5},
    "optimizer": {"lr": 0.7, "momentum": 0.6, "nesterov": False, "weight_decay": 0.03, "trust_coefficient": 0.01},
    "seed": 5,
}


def test_crops_are_those_of_the_recipe_and_of_their_epoch_and_batch(tiny_images: ImageSet) -> None:
    tiny_images = ImageSet(**{**vars(tiny_images), "images": tiny_images.images[..., :9]})
    raw = tiny_recipe("emp-ssl", "none", **UNUSUAL).resolved()
    group: dict[str, Any] = {"count": 2, "size": 8, "scale": [0.3, 0.5], "ratio": [0.5, 0.6]}
    recipe = Recipe.model_validate({**raw, "crops": [group, {"count": 1, "size": 12}]})
    trainer, augment = trainer_of(recipe, tiny_images), Augment.model_validate(UNUSUAL["augment"])
    for batch, epoch, index in ((0, 0, 0), (11, 1, 3)):
        order = randomness.epoch_order(5, epoch, 64)[index * 8 : (index + 1) * 8]
        found, _ = trainer.crops_of(batch)
        for place, wanted in enumerate((Crops(**group), Crops(count=1, size=12))):
            generator = randomness.addressed_generator("crops", 5, epoch, index, place, 0)
            drawn = sample_parameters(8, 12, 9, group=wanted, augment=augment, generator=generator)
            torch.testing.assert_close(found[place], crop_batch(tiny_images.images[order], drawn, size=wanted.size))


def test_a_process_has_its_share_of_the_crops_and_starts_of_its_own(tiny_images: ImageSet) -> None:
    recipe = tiny_recipe("supcon", "free", seed=5)
    whole, labels = trainer_of(recipe, tiny_images).crops_of(11)
    order = randomness.epoch_order(5, 1, 64)[24:32]
    for rank, part in ((0, slice(0, 4)), (1, slice(4, 8))):
        trainer = trainer_of(recipe, tiny_images, world=World(rank, 2))
        (own,), all_labels = trainer.crops_of(11)
        torch.testing.assert_close(own, whole[0][:, part])
        for found in (labels, all_labels):
            assert found is not None
            assert torch.equal(found, tiny_images.require_labels()[order])
        (of_crops,), (of_delta,) = trainer._generators("crops", 11), trainer._generators("delta", 11)
        assert of_crops.initial_seed() == randomness.addressed_seed("crops", 5, 1, 3, 0, 0)
        assert of_delta.initial_seed() == randomness.addressed_seed("delta", 5, 1, 3, 0, rank)
        initial = build_encoder(recipe.model, generator=randomness.addressed_generator("init", 5)).state_dict()
        for name, value in trainer.encoder.state_dict().items():
            assert torch.equal(value, initial[name]), name


@pytest.mark.parametrize("adversary", ["pgd", "free"])
def test_an_adversary_draws_its_start_by_seed_epoch_batch_and_group(
    adversary: str, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("simclr", adversary, train={"epochs": 0.25}, adversary={"start": "random"}, seed=5)
    trainer = trainer_of(recipe, tiny_images)
    begin, seeds = trainer.adversary.begin, []

    def noted(groups: Any, generators: Any) -> None:
        seeds.append([generator.initial_seed() for generator in generators])
        begin(groups, generators)

    monkeypatch.setattr(trainer.adversary, "begin", noted)
    trainer.train(tmp_path, stop=never)
    assert seeds == [[randomness.addressed_seed("delta", 5, 0, batch, g, 0) for g in (0, 1)] for batch in (0, 1)]
    _, saved, _ = checkpoint.newest_valid(tmp_path)
    kept = sorted(name for name in saved.state if name.startswith("delta."))
    assert kept == (["delta.0000"] if adversary == "free" else [])


def test_a_weight_update_is_that_of_the_recipes_objective_and_optimizer(tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe = tiny_recipe("emp-ssl", "none", train={"epochs": 0.25}, **UNUSUAL)
    trainer, by_hand = (trainer_of(recipe, tiny_images) for _ in range(2))
    trainer.train(tmp_path, stop=never)
    net = by_hand.encoder.train()
    settings = Lars(lr=0.7, momentum=0.6, nesterov=False, weight_decay=0.03, trust_coefficient=0.01)
    optimizer = LarsOptimizer(list(net.parameters()), settings)
    for batch, lr in ((0, 0.7), (1, 0.35)):  # the cosine of two updates
        z = net.embed(by_hand.crops_of(batch)[0]).double()  # (V, B, D)
        images, dim = z.shape[1:]
        grams = z.mT @ z * dim / (images * 0.5) + torch.eye(dim)
        invariance = -(z * torch.nn.functional.normalize(z.mean(0), dim=-1)).sum(-1).mean()
        torch.autograd.backward(7 * invariance - 3 * torch.logdet(grams).mean() / 2)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(trainer.encoder.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


class DeviceEvent:
    """An event of a device on which 250 ms pass between any two."""

    now = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        DeviceEvent.now += 250
        self.at = DeviceEvent.now

    def elapsed_time(self, end: DeviceEvent) -> int:
        return end.at - self.at


class Clock:
    """A clock that moves when it is told."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def slow_down(trainer: Trainer, clock: Clock, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock move on with the crops of each batch."""
    crops_of = trainer.crops_of

    def slow_crops(batch: int) -> Any:
        clock.now += seconds
        return crops_of(batch)

    monkeypatch.setattr(trainer, "crops_of", slow_crops)


def test_on_cuda_the_share_of_data_is_what_the_device_waited(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pauses a batch, to take its crops and to begin those of the next; there are none after the last."""
    monkeypatch.setattr(torch.cuda, "Event", DeviceEvent)
    monkeypatch.setattr(journal, "peak_memory", lambda _: 0)
    monkeypatch.setattr(journal, "time", clock := Clock())
    sink = Listener()
    trainer = trainer_of(tiny_recipe(train={"epochs": 0.5, "log_every": 2}), tiny_images, sink)
    trainer.journal.device = torch.device("cuda", 0)
    step = trainer.optimizer.step

    def slow_step(*, lr: float) -> Tensor:
        clock.now += 1  # three updates a batch
        return step(lr=lr)

    monkeypatch.setattr(trainer.optimizer, "step", slow_step)
    monkeypatch.setattr(trainer, "save", lambda _: None)
    trainer.train(tmp_path, stop=never)
    assert [cost.data_share for cost in sink.costs] == pytest.approx([4 * 0.25 / 6, 3 * 0.25 / 6])


def looked_at(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `monitor.representation_std` will find, each time on 32 crops of the batch that is over."""
    found: list[float] = []
    look, crops_of = monitor.representation_std, trainer.crops_of

    def noted(encoder: Encoder, few: Tensor) -> Tensor:
        groups, _ = crops_of(trainer.step // trainer.recipe.replays - 1)
        assert torch.equal(few, groups[0].flatten(0, 1)[:32])
        found.append(float(look(encoder, few)))
        return look(encoder, few)

    monkeypatch.setattr(monitor, "representation_std", noted)
    return found


@pytest.mark.parametrize("adversary", ["none", "pgd", "free"])
def test_every_number_of_the_journal_is_that_of_the_tensors(
    adversary: str, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {} if adversary == "none" else {"eps": "8/255", "step_size": "5/255"}
    recipe = tiny_recipe("emp-ssl", adversary, train={"epochs": 0.5, "log_every": 2}, adversary=settings)
    sink, clock = Listener(), Clock()
    monkeypatch.setattr(journal, "time", clock)
    trainer = trainer_of(recipe, tiny_images, sink)
    seen: list[tuple[Tensor, float, float]] = []
    deltas: list[Tensor] = []
    crops_of, loss_of, step = trainer.crops_of, trainer.loss_of, trainer.optimizer.step
    spreads, latest = looked_at(trainer, monkeypatch), list[tuple[Tensor, float]]()

    def slow_crops(batch: int) -> Any:
        clock.now += 2
        deltas.append(torch.zeros(0))
        return crops_of(batch)

    def slow_loss(groups: Any, labels: Tensor | None) -> tuple[Tensor, Terms]:
        clock.now += 1
        z, terms = loss_of(groups, labels)
        latest.append((z.detach().double(), float(terms.loss.detach())))
        return z, terms

    def noted(*, lr: float) -> Tensor:
        norm = sum(float(p.grad.double().square().sum()) for p in trainer.encoder.parameters() if p.grad is not None)
        seen.append((*latest[-1], math.sqrt(norm)))
        deltas[-1] = torch.cat([part.detach().flatten() for part in trainer.adversary.delta or [torch.zeros(0)]])
        return step(lr=lr)

    monkeypatch.setattr(trainer, "crops_of", slow_crops)
    monkeypatch.setattr(trainer, "loss_of", slow_loss)
    monkeypatch.setattr(trainer.optimizer, "step", noted)
    trainer.train(tmp_path, stop=never)

    replays, updates = recipe.replays, 4 * recipe.replays
    for number, line in enumerate(sink.records):
        end = 2 * (number + 1) * replays
        interval = seen[end - 2 * replays : end]
        expected: dict[str, float] = {
            "step": end,
            "batch": 2 * (number + 1),
            "epoch": 0.25 * (number + 1),
            "lr": 0.15 * (1 + math.cos(math.pi * (end - 1) / updates)),
            "loss": statistics.fmean(loss for _, loss, _ in interval),
            "gradient_norm": statistics.fmean(norm for _, _, norm in interval),
        }
        invariances, rates = [], []
        for z, _, _ in interval:
            invariances.append(-float((z * torch.nn.functional.normalize(z.mean(0), dim=-1)).sum(-1).mean()))
            rates.append(float(torch.logdet(torch.eye(8) + z.mT @ z / 0.2).mean()) / 2)  # D / (B eps) = 8 / (8 * 0.2)
        last = interval[-1][0][-1]
        shares = torch.linalg.svdvals(last) / torch.linalg.svdvals(last).sum()
        expected |= {
            "invariance": statistics.fmean(invariances),
            "coding_rate": statistics.fmean(rates),
            "feature_std": float(last.std(0).mean()) * math.sqrt(8),
            "representation_std": spreads[number],
        }
        if adversary != "none":
            size = deltas[2 * number + 1].abs()
            expected |= {"delta_mean": float(size.mean()), "delta_at_bound": float((size > 7.99 / 255).float().mean())}
            assert 0.1 < expected["delta_at_bound"] < 0.9
        found = {key: value for key, value in line.items() if key != "kind"}
        assert found.pop("effective_rank") == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=5e-3)
        assert found == pytest.approx(expected, rel=1e-4)
    passes = 3 if adversary == "pgd" else 1  # two steps of the adversary's
    seconds = 2 * (2 + replays * passes)
    views = 2 * replays * passes * 4 * 8  # of four crops of eight images
    assert len(sink.records) == len(sink.costs) == 2
    told = (shown for shown in sink.shown if shown[1] in (2 * replays, updates))  # the others are of no record
    for line, cost, shown in zip(sink.records, sink.costs, told, strict=True):
        assert (cost.views_per_second, cost.data_share, cost.seconds) == pytest.approx(
            (views / seconds, 4 / seconds, seconds)
        )
        assert cost.peak_memory > 2**20
        values = {key: line[key] for key in ("epoch", "lr", "loss", "gradient_norm", "invariance", "coding_rate")}
        assert shown == ("train", line["step"], updates, values | {"views/s": cost.views_per_second})


def test_a_slow_training_says_how_far_it_is_between_its_records(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, sink = Clock(), Listener()
    monkeypatch.setattr(journal, "time", clock)
    trainer = trainer_of(tiny_recipe("emp-ssl", "free", train={"log_every": 4}), tiny_images, sink)
    slow_down(trainer, clock, 1.5, monkeypatch)
    trainer.train(tmp_path, stop=never)
    assert [step for _, step, _, _ in sink.shown] == [6, 12, 18, 24]  # after 3 seconds, and with each record
    assert sink.shown[0][3] == {}
    assert sink.shown[2][3] == sink.shown[1][3]
    assert len(sink.records) == 2


def test_an_evaluation_is_no_part_of_the_rate_of_training(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, sink = Clock(), Listener()
    asked: list[tuple[Any, ...]] = []

    def evaluate(encoder: Encoder, *sets: Tensor, where: monitor.Where, eps: str, **_: object) -> EvaluationLine:
        asked.append((where["step"], eps, *sets))
        clock.now += 1000
        return EvaluationLine(**where, n=20, knn=5, clean=10, robust=1, eps=eps, attack="pgd-10")

    monkeypatch.setattr(journal, "time", clock)
    monkeypatch.setattr(journal, "HELD_OUT", 20)
    monkeypatch.setattr(monitor, "evaluate", evaluate)
    recipe = tiny_recipe(
        "emp-ssl", "free", adversary={"eps": "4/255"}, train={"epochs": 2.5, "evaluate_every": 2, "batch_size": 16}
    )
    trainer = trainer_of(recipe, tiny_images, sink)
    slow_down(trainer, clock, 1, monkeypatch)
    trainer.train(tmp_path, stop=never)
    assert [cost.seconds for cost in sink.costs] == [1.0] * 10
    for task, _, _, values in sink.shown:
        told = [text for key, text in values.items() if key.startswith("at epoch")]
        assert told == ["clean 50.0 %, pgd-10 4/255 5.0 %, knn 25.0 %"], task  # the newest, and no other
    assert [step for step, *_ in asked] == [0, 24, 30]  # before the first, after two epochs, and at the end
    for _, eps, bank, bank_labels, held_out, held_out_labels in asked:
        assert eps == "4/255"
        assert torch.bincount(held_out_labels).tolist() == [5] * 4
        assert torch.bincount(bank_labels).tolist() == [11] * 4
        both, labels = torch.cat([bank, held_out]), torch.cat([bank_labels, held_out_labels])
        same = (both[:, None] == tiny_images.images[None]).flatten(2).all(2)  # every image once, with its own label
        assert same.sum(0).tolist() == same.sum(1).tolist() == [1] * 64
        assert torch.equal(labels, tiny_images.require_labels()[same.int().argmax(1)])


def test_a_grip_line_is_of_the_losses_of_its_batch(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "COST", 3.0)
    monkeypatch.setattr(monitor, "_FEWEST", 4)
    sink, measure = Listener(), monitor.measure_grip
    trainer = trainer_of(tiny_recipe("emp-ssl", "free", train=SHORT, adversary={"eps": "16/255"}), tiny_images, sink)
    expected: list[tuple[float, float]] = []

    def noted(loss_beside: Any, crops: Any, delta: Any, *, eps: float, where: monitor.Where) -> Any:
        assert eps == 16 / 255
        whole = trainer.crops_of(where["batch"] - 1)[0]
        images = crops[0].shape[1]
        assert 4 <= images < 8
        moved = [whole[0][:, :images], (whole[0] + trainer.adversary.delta[0])[:, :images]]
        with torch.no_grad(), frozen_statistics(trainer.encoder):
            terms = [
                objective_loss(trainer.encoder.embed([x]), None, objective=trainer.recipe.objective) for x in moved
            ]
        expected.append((float(terms[0].loss), float(terms[1].loss)))
        return measure(loss_beside, crops, delta, eps=eps, where=where)

    monkeypatch.setattr(monitor, "measure_grip", noted)
    trainer.train(tmp_path, stop=never)
    lines = [record for record in sink.records if record["kind"] == "grip"]
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert [(line["clean"], line["trained"]) for line in lines] == [pytest.approx(pair, rel=1e-4) for pair in expected]


def test_lines_come_with_the_interval_and_comparisons_with_the_plan(
    tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_recipe("emp-ssl", "free", train={"epochs": 1.625, "log_every": 4}), tiny_images)
    written: list[int] = []
    compared: list[int] = []
    checked: list[int] = []
    notes = trainer.journal
    monkeypatch.setattr(notes, "check_finite", lambda encoder, *, step: checked.append(step))
    monkeypatch.setattr(notes, "_write", lambda *_, step: written.append(step))
    monkeypatch.setattr(notes, "_watch_grip", lambda crops, delta, loss_beside, *, step: compared.append(step))
    z, one = torch.zeros(1), [torch.zeros(1)]
    for every, wanted in ((4, [6, 9, 12, 18, 21, 24, 30, 33, 36]), (1, list(range(3, 40, 3))), (0, [])):
        monkeypatch.setattr(notes, "_grip_plan", monitor.Schedule(every=every, images=2))
        for steps in (written, compared, checked):
            steps.clear()
        for step in range(3, 40, 3):  # 13 batches of three replays
            notes.after_batch(trainer.encoder, z, one, one, lambda _: lambda _: z, step=step)
        assert written == [12, 24, 36, 39]
        assert compared == wanted
        assert checked == sorted({*written, *compared})


def test_a_lost_grip_is_warned_of_with_its_numbers(tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Listener()
    trainer = trainer_of(tiny_recipe("emp-ssl", "free"), tiny_images, sink)
    monkeypatch.setattr(trainer.journal, "_grip_plan", monitor.Schedule(every=1, images=2))
    for lost in (False, True):
        found = GripLine(step=6, batch=2, epoch=0.25, clean=-3, trained=-2.75, strongest=5, strength=0.03, lost=lost)
        monkeypatch.setattr(monitor, "measure_grip", lambda *_, found=found, **__: found)
        trainer.journal._watch_grip([], [], lambda _: lambda _: torch.zeros(()), step=6)
    assert sink.warnings == [
        "update 6: PGD-10 raises the loss by 8, the training adversary only by 0.25: catastrophic overfitting is "
        "likely; use a smaller adversary.step_size or more steps"
    ]
    assert [record["lost"] for record in sink.records] == [False, True]


@pytest.mark.parametrize(
    ("rows", "weight", "step", "lr", "loss", "norm"),
    [
        ([], float("nan"), 5, 0.0, "nan", "nan"),  # a weight, and no update since the last record
        ([[0.1, 2.5, 3.5], [0.2, 4.5, 5.5]], float("inf"), 5, 0.2, "4.5", "5.5"),  # as the last update left it
        ([[0.1, float("nan"), 3.5], [0.2, 4.5, 5.5]], 0.0, 4, 0.1, "nan", "3.5"),
        ([[0.1, 2.5, 3.5], [0.2, 4.5, float("inf")], [0.3, 1, 1]], 0.0, 4, 0.2, "4.5", "inf"),
    ],
)
def test_divergence_is_told_with_the_first_bad_update_or_the_last(
    rows: list[list[float]], weight: float, step: int, lr: float, loss: str, norm: str, tiny_images: ImageSet
) -> None:
    trainer = trainer_of(tiny_recipe("simclr", "free"), tiny_images)
    trainer.journal.load(torch.tensor(rows).view(-1, 3))
    assert trainer.journal.rows().shape == (len(rows), 3)
    with torch.no_grad():
        next(trainer.encoder.parameters())[0, 0, 0, 0] = weight
    with pytest.raises(Diverged) as caught:
        trainer.journal.check_finite(trainer.encoder, step=6)
    error = caught.value
    told = {"step": step, "batch": step // 3, "lr": pytest.approx(lr), "loss": loss, "gradient_norm": norm}
    assert error.details == told
    assert error.message == (
        f"training became non-finite at update {step}: loss {loss}, gradient norm {norm}, lr {lr:g}"
    )
    assert error.hint == "nothing of it was saved; lower optimizer.lr, or set train.precision to float32"
    assert error.exit_code == ExitCode.DIVERGED


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_weight_and_buffer_is_asked_whether_it_is_finite(value: float, tiny_images: ImageSet) -> None:
    trainer = trainer_of(tiny_recipe("simclr", "free"), tiny_images)
    state = [tensor for tensor in trainer.encoder.state_dict().values() if tensor.is_floating_point()]
    for tensor in state:
        tensor[-1] = value
        with pytest.raises(Diverged):
            trainer.journal.check_finite(trainer.encoder, step=6)
        tensor[-1] = 1.0
        trainer.journal.check_finite(trainer.encoder, step=6)


@pytest.mark.parametrize(
    ("labelled", "classes", "expected"),
    [(40, 4, True), (39, 4, False), (64, 2, True), (64, 1, False), (None, 4, False)],
)
def test_an_evaluation_needs_labels_and_two_classes_and_draws_its_bank(
    labelled: int | None, classes: int, expected: bool, tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def evaluate(*sets: Any, classes: int, eps: str, where: monitor.Where, **_: object) -> EvaluationLine:
        asked.append((sets[1:], classes, eps))
        return EvaluationLine(**where, n=20, knn=5, clean=10, robust=1, eps=eps, attack="pgd-10")

    monkeypatch.setattr(journal, "HELD_OUT", 20)
    monkeypatch.setattr(monitor, "BANK", 7)
    monkeypatch.setattr(monitor, "evaluate", evaluate)
    labels = None if labelled is None else torch.where(torch.arange(64) < labelled, torch.arange(64) % classes, -1)
    changed = {"labels": labels, "classes": tiny_images.classes[:classes]}
    images, sink = ImageSet(**{**vars(tiny_images), **changed}), Listener()
    trainer = trainer_of(tiny_recipe("emp-ssl", "none", seed=9), images, sink)
    for step in (0, 8):
        assert trainer.journal.evaluate(trainer.encoder, images.images, step=step, stop=never)
    refusal = ["no online evaluation: it needs 40 labelled images of two classes"]
    assert sink.messages == ([] if expected else refusal)
    assert [record["step"] for record in sink.records] == ([0, 8] if expected else [])
    for (bank, bank_labels, held_out, held_out_labels), number, eps in asked:
        assert labels is not None
        wanted, others = class_balanced_split(labels, 20, seed=9)
        drawn = others[torch.randperm(len(others), generator=randomness.addressed_generator("bank", 9))][:7]
        assert (number, eps) == (classes, "8/255")
        assert torch.equal(bank, images.images[drawn])
        assert torch.equal(bank_labels, labels[drawn])
        assert torch.equal(held_out, images.images[wanted])
        assert torch.equal(held_out_labels, labels[wanted])


def test_the_process_that_leads_evaluates_and_others_are_not_left_waiting(
    tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, size, expected in ((0, 1, [15]), (0, 2, [0]), (1, 2, [])):
        trainer = trainer_of(tiny_recipe(), tiny_images, world=World(rank, size))
        asked: list[int] = []

        def evaluate(*_: object, stop: Callable[[], int], asked: list[int] = asked, **__: object) -> bool:
            asked.append(stop())
            return True

        monkeypatch.setattr(trainer.journal, "evaluate", evaluate)
        assert trainer._evaluate(lambda: 15)
        assert asked == expected


def test_few_labels_are_not_evaluated_on(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "HELD_OUT", 20)
    recipe = tiny_recipe("emp-ssl", "none", train={**SHORT, "evaluate_every": 1})
    _, sink = trained(recipe, tiny_images, tmp_path / "all")
    assert [record["n"] for record in sink.records if record["kind"] == "evaluation"] == [20, 20]
    few = torch.where(torch.arange(64) < 39, tiny_images.require_labels(), -1)
    _, sink = trained(recipe, ImageSet(**{**vars(tiny_images), "labels": few}), tmp_path / "few")
    assert sink.messages == ["no online evaluation: it needs 40 labelled images of two classes"]
    assert not [record for record in sink.records if record["kind"] == "evaluation"]


@pytest.mark.parametrize("every", [0, 1, 3])
def test_checkpoints_come_when_asked_for_and_old_ones_go(every: int, tiny_images: ImageSet, tmp_path: Path) -> None:
    train = {"epochs": 2.0, "batch_size": 16, "checkpoint_every": every, "keep": 2}
    trained(tiny_recipe("emp-ssl", "none", train=train), tiny_images, tmp_path)
    steps = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert steps == [f"step-{step:08d}" for step in {0: (8, 4), 1: (8, 7), 3: (8, 6)}[every]]


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [8]), (2.5, [3, 6, 8]), (10.0, [8])])
def test_a_checkpoint_comes_when_the_last_is_long_ago(
    minutes: float, steps: list[int], tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 8 batches takes a minute of this clock; a checkpoint that another rule made counts as one."""
    train = {"epochs": 2.0, "batch_size": 16, "checkpoint_every": 8, "checkpoint_minutes": minutes, "keep": 9}
    trainer = trainer_of(tiny_recipe("emp-ssl", "none", train=train), tiny_images)
    monkeypatch.setattr("cfamc_cli.engine.pretrain.time.monotonic", lambda: 60.0 * trainer.step)
    trainer.saved = 0.0
    trainer.train(tmp_path, stop=lambda: 0)
    found = [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(tmp_path)]
    assert sorted(found) == steps


def test_a_batch_larger_than_the_data_and_supcon_without_labels_are_refused(tiny_images: ImageSet) -> None:
    with pytest.raises(CfamcError, match="65 is more than the 64 training images") as caught:
        trainer_of(tiny_recipe(train={"batch_size": 65}), tiny_images)
    assert caught.value.exit_code == ExitCode.INVALID
    unlabelled = ImageSet(**{**vars(tiny_images), "labels": torch.full((64,), -1)})
    with pytest.raises(CfamcError, match="no label"):
        trainer_of(tiny_recipe("supcon"), unlabelled)


def test_a_collapse_is_warned_of_once(tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.2, 0.05, 0.05, 0.2])
    monkeypatch.setattr("cfamc_cli.engine.journal.feature_std", lambda _: torch.tensor(next(found)))
    monkeypatch.setattr("cfamc_cli.store.records._SPREAD", 2)
    recipe = tiny_recipe("emp-ssl", "none", train={"batch_size": 16, "log_every": 1})
    _, sink = trained(recipe, tiny_images, tmp_path)
    (warning,) = sink.warnings
    assert warning.startswith("update 2: the encoder collapsed: effective rank ")
    assert re.search(r"feature std 0\.05, of what heads read 0\.[0-9]+; lower optimizer\.lr", warning)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_features_that_become_one_are_warned_of_where_embeddings_stay_apart(
    scale: float, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm, and the one behind it, make embeddings of what little is left of the differences of images."""
    monkeypatch.setattr("cfamc_cli.store.records._SPREAD", 36)
    sink = Listener()
    apart = {"invariance_weight": 0.0}
    recipe = tiny_recipe("emp-ssl", "free", train={"epochs": 3.0, "batch_size": 16}, objective=apart)
    trainer = trainer_of(recipe, tiny_images, sink)
    forward = trainer.encoder.backbone.forward
    monkeypatch.setattr(trainer.encoder.backbone, "forward", lambda x: 1 + scale * forward(x))
    trainer.train(tmp_path, stop=never)
    lines = [TrainLine.model_validate(record) for record in sink.records if record["kind"] == "train"]
    assert [line.step for line in lines] == list(range(3, 37, 3))
    assert all(line.effective_rank > 6 and line.feature_std > 0.8 for line in lines)
    assert [line.collapsed for line in lines] == [False] * 11 + [scale < 1]
    spread = lines[-1].representation_std
    assert spread is not None
    assert sink.warnings == [] if scale == 1 else f"of what heads read {spread:.2g}; lower" in sink.warnings[0]
    assert (0.2 < spread < 1) if scale == 1 else spread < 0.01
    assert trainer.encoder.training


def test_what_heads_read_is_looked_at_without_a_trace_or_a_wait() -> None:
    encoder = Encoder(Model(width=4, hidden_dim=16, embedding_dim=8)).eval()
    crops = uniform(6, 3, 8, 8, key="crops").float()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = encoder.features(crops).detach().double()
    features /= features.square().sum(1, keepdim=True).sqrt()
    expected = float((features - features.mean(0)).square().sum(0).div(5).sqrt().mean()) * 4
    encoder.train()
    found = monitor.representation_std(encoder, crops)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert encoder.training
    assert not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    few = encoder.to(META), crops.to(META)
    with watched() as seen:
        monitor.representation_std(*few)
    assert not seen.copies


# Resuming what does not fit


def test_a_checkpoint_of_another_recipe_is_refused(tiny_images: ImageSet, tmp_path: Path) -> None:
    trained(tiny_recipe("emp-ssl", "free", train=SHORT), tiny_images, tmp_path)
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    for other in (
        tiny_recipe("emp-ssl", "free", train=SHORT, optimizer={"lr": 0.1}),
        tiny_recipe("emp-ssl", "free", train=SHORT, model={"width": 4}),
        tiny_recipe("emp-ssl", "none", train=SHORT),
    ):
        with pytest.raises(CfamcError) as caught:
            trainer_of(other, tiny_images).load(saved, path=path)
        assert caught.value.exit_code == ExitCode.BAD_DATA


Damage = Callable[[dict[str, Tensor], dict[str, object]], object]
DAMAGES: dict[str, Damage] = {
    "no momentum": lambda state, progress: state.pop("momentum.0003"),
    "momentum that would broadcast": lambda state, progress: state.update({"momentum.0000": torch.zeros(1)}),
    "half-precision momentum": lambda state, progress: state.update({"momentum.0000": state["momentum.0000"].half()}),
    "no delta": lambda state, progress: state.pop("delta.0000"),
    "a delta of smaller crops": lambda state, progress: state.update({"delta.0000": state["delta.0000"][..., :4, :4]}),
    "a delta of another group": lambda state, progress: state.update({"delta.0001": state["delta.0000"]}),
    "a journal of other columns": lambda state, progress: state.update({"journal": torch.zeros(1, 9)}),
    "a scalar delta": lambda state, progress: state.update({"delta.0000": torch.zeros(())}),
    "no journal": lambda state, progress: state.pop("journal"),
    "no step": lambda state, progress: progress.pop("step"),
    "a step in words": lambda state, progress: progress.update(step="three"),
    "a step between two replays": lambda state, progress: progress.update(step=2),
    "no recipe": lambda state, progress: progress.pop("recipe"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_state_that_does_not_fit_is_refused(name: str, tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe = tiny_recipe("emp-ssl", "free", train={"epochs": 0.125})
    trained(recipe, tiny_images, tmp_path)
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    DAMAGES[name](saved.state, saved.progress)
    with pytest.raises(CfamcError, match="does not fit") as caught:
        trainer_of(recipe, tiny_images).load(saved, path=path)
    assert caught.value.exit_code == ExitCode.BAD_DATA


# Divergence


def poison(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, *, step: int, value: float) -> None:
    """Multiply the loss of one weight update, and so its gradient, by `value`."""
    loss_of = trainer.loss_of

    def poisoned(groups: Any, labels: Tensor | None) -> tuple[Tensor, Terms]:
        z, terms = loss_of(groups, labels)
        return z, Terms(terms.loss * (value if trainer.step == step else 1.0), terms.parts)

    monkeypatch.setattr(trainer, "loss_of", poisoned)


@pytest.mark.parametrize(
    ("value", "adversary", "step", "log_every"),
    [
        ("nan", "none", 0, 1),
        ("inf", "none", 2, 100),
        ("nan", "free", 7, 1),
        ("inf", "free", 4, 100),
        ("nan", "pgd", 3, 2),
    ],
)
def test_divergence_is_told_with_its_step_and_nothing_is_saved(
    value: str,
    adversary: str,
    step: int,
    log_every: int,
    tiny_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = {"epochs": 0.5, "log_every": log_every, "checkpoint_every": 1, "keep": 9}
    sink = Listener()
    trainer = trainer_of(tiny_recipe("emp-ssl", adversary, train=train), tiny_images, sink)
    poison(trainer, monkeypatch, step=step, value=float(value))
    with pytest.raises(Diverged) as caught:
        trainer.train(tmp_path, stop=never)
    error, replays = caught.value, trainer.recipe.replays
    assert error.exit_code == ExitCode.DIVERGED
    assert (error.details["step"], error.details["batch"]) == (step, step // replays)
    lr = 0.15 * (1 + math.cos(math.pi * step / trainer.updates))
    assert error.details["lr"] == pytest.approx(lr, rel=1e-5)
    assert error.details["loss"] in ("nan", "inf", "-inf")
    assert error.details["gradient_norm"] in ("nan", "inf")
    assert f"update {step}:" in error.message
    saved = checkpoint.list_checkpoints(tmp_path)
    assert [path.name for path in saved] == [f"step-{done * replays:08d}" for done in range(step // replays, 0, -1)]
    for path in saved:
        assert all(torch.isfinite(tensor).all() for tensor in checkpoint.load(path).model.values())


def test_divergence_is_found_when_the_run_is_stopped(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_recipe("emp-ssl", "free", train={"log_every": 100}), tiny_images)
    poison(trainer, monkeypatch, step=1, value=float("nan"))
    with pytest.raises(Diverged):
        trainer.train(tmp_path, stop=lambda: 15)
    assert not checkpoint.list_checkpoints(tmp_path)


@pytest.mark.parametrize("objective", ["emp-ssl", "supcon"])
def test_divergence_comes_before_the_adversarys_grip(
    objective: str, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "COST", 20.0)
    trainer = trainer_of(tiny_recipe(objective, "free", train={"epochs": 0.375, "log_every": 100}), tiny_images)
    poison(trainer, monkeypatch, step=1, value=float("nan"))
    with pytest.raises(Diverged) as caught:
        trainer.train(tmp_path, stop=never)
    assert caught.value.details["step"] == 1


# The adversary's grip, as the loop watches it


@pytest.mark.parametrize(("objective", "adversary"), [("emp-ssl", "pgd"), ("simclr", "free"), ("supcon", "free")])
def test_the_grip_is_measured_on_a_part_of_the_batch_and_changes_nothing(
    objective: str, adversary: str, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(objective, adversary, train=SHORT)
    trained(recipe, tiny_images, tmp_path / "without")
    monkeypatch.setattr(monitor, "COST", 3.0)
    monkeypatch.setattr(monitor, "_FEWEST", 4)
    _, sink = trained(recipe, tiny_images, tmp_path / "with")
    grips = [record for record in sink.records if record["kind"] == "grip"]
    assert grips
    assert all(record.keys() >= {"clean", "trained", "strongest", "strength", "lost", "step"} for record in grips)
    for name in (checkpoint.MODEL, checkpoint.STATE):
        assert newest_bytes(tmp_path / "with")[name] == newest_bytes(tmp_path / "without")[name]


# Precision and compilation


@pytest.mark.parametrize(("objective", "adversary"), [("emp-ssl", "free"), ("supcon", "none")])
def test_bfloat16_trains_close_to_float32(
    objective: str, adversary: str, tiny_images: ImageSet, tmp_path: Path
) -> None:
    train = {"epochs": 0.25, "log_every": 1}
    _, wide = trained(tiny_recipe(objective, adversary, train=train), tiny_images, tmp_path / "wide")
    narrow_recipe = tiny_recipe(objective, adversary, train=train | {"precision": "bfloat16"})
    trainer, narrow = trained(narrow_recipe, tiny_images, tmp_path / "narrow")
    assert losses(narrow)[0] != losses(wide)[0]
    assert losses(narrow)[0] == pytest.approx(losses(wide)[0], rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.encoder.parameters())
    assert all(delta.dtype == torch.float32 for delta in trainer.adversary.delta)


def test_deterministic_training_runs_and_is_undone_by_the_next_run(tiny_images: ImageSet, tmp_path: Path) -> None:
    trained(tiny_recipe("emp-ssl", "free", train={"epochs": 0.25, "deterministic": True}), tiny_images, tmp_path)
    assert torch.are_deterministic_algorithms_enabled()
    trainer_of(tiny_recipe(), tiny_images)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_float32_is_not_shortened_to_tf32(precision: str, tiny_images: ImageSet) -> None:
    trainer_of(tiny_recipe(train={"precision": precision}), tiny_images)
    short = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = True
    assert short == (precision == "bfloat16", False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adversary", ["pgd", "free"])
def test_a_compiled_encoder_trains_alike(adversary: str, tiny_images: ImageSet, tmp_path: Path) -> None:
    _, plain = trained(tiny_recipe("emp-ssl", adversary, train={"epochs": 0.25}), tiny_images, tmp_path / "plain")
    recipe = tiny_recipe("emp-ssl", adversary, train={"epochs": 0.25, "compile": True})
    trainer, compiled = trained(recipe, tiny_images, tmp_path / "compiled")
    assert losses(compiled)[0] == pytest.approx(losses(plain)[0], rel=1e-3)
    assert int(trainer.encoder.state_dict()["backbone.bn1.num_batches_tracked"]) == trainer.updates
    path, saved, _ = checkpoint.newest_valid(tmp_path / "compiled")
    trainer_of(recipe, tiny_images).load(saved, path=path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("objective", "adversary", "graphs"),
    [
        ("emp-ssl", "none", 1),
        ("emp-ssl", "free", 1),
        ("emp-ssl", "pgd", 2),  # the attack, which leaves statistics alone, and the update
        ("simclr", "free", 2),  # the view that is perturbed, and the other
        ("simclr", "pgd", 2),
    ],
)
def test_a_whole_run_takes_few_compilations(
    objective: str,
    adversary: str,
    graphs: int,
    tiny_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = partial(nn.Module.compile, backend=counted)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: compiled(self, **given))
    changed = {"epochs": 40.0, "batch_size": 32, "compile": True}
    _, sink = trained(tiny_recipe(objective, adversary, train=changed), tiny_images, tmp_path)
    compared = [record for record in sink.records if record["kind"] == "grip"]
    assert bool(compared) == (adversary != "none"), "other shapes, which are not compiled"
    assert counted.frame_count == graphs
    assert not torch._dynamo.utils.counters["graph_break"]  # which a reset clears


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
def test_encoder_and_features_are_one_graph_each(training: bool) -> None:
    pytest.importorskip("torch._dynamo")
    encoder = Encoder(tiny_recipe().model).train(training)
    for function in (encoder.forward, encoder.features):
        torch._dynamo.reset()
        found = torch._dynamo.explain(function)(torch.zeros(4, 3, 8, 8))
        assert (found.graph_count, found.break_reasons) == (1, [])


@pytest.mark.parametrize(("adversary", "passes"), [("free", 3), ("pgd", 1 + 2 * 2 / 3), ("none", 1)])
def test_a_forecast_is_the_plan_at_the_rate_of_one_pass_and_leaves_no_trace(
    adversary: str, passes: float, tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_recipe("emp-ssl", adversary), tiny_images)
    before = {name: value.clone() for name, value in trainer.encoder.state_dict().items()}
    random_state = torch.get_rng_state()
    readings = iter([0.0, 0.9, 10.0, 10.8, 20.0, 21.0])  # of three passes the fastest counts, and 2 s are enough
    monkeypatch.setattr("cfamc_cli.engine.forecast.time.perf_counter", lambda: next(readings))
    found = forecast(trainer, plan(trainer.recipe, len(trainer.images)))
    batches = len(trainer.images) // 8
    assert found == pytest.approx(0.8 * batches * passes)
    assert all(torch.equal(value, before[name]) for name, value in trainer.encoder.state_dict().items())
    assert all(weight.grad is None for weight in trainer.encoder.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    trainer.step = trainer.updates // 2
    readings = iter([0.0, 2.5])  # so long a pass is not made twice
    monkeypatch.setattr("cfamc_cli.engine.forecast.time.perf_counter", lambda: next(readings))
    assert forecast(trainer, plan(trainer.recipe, len(trainer.images))) == pytest.approx(2.5 * batches * passes / 2)


def test_a_forecast_knows_that_later_phases_have_other_crops(
    tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = [{"count": 4, "size": 16, "scale": [0.5, 1.0], "ratio": [1.0, 1.0]}]
    recipe = Recipe.model_validate(
        tiny_recipe("emp-ssl", "none").resolved() | {"phase": [{"epochs": 1.0, "crops": larger}]}
    )
    trainer = trainer_of(recipe, tiny_images)
    readings = iter([0.0, 2.5])
    monkeypatch.setattr("cfamc_cli.engine.forecast.time.perf_counter", lambda: next(readings))
    passes = [
        part.updates(64) * sum(group.count * flops_per_view(part.model, size=group.size) for group in part.crops)
        for part in recipe.parts()
    ]
    assert passes[1] > passes[0] / trainer.updates * recipe.parts()[1].updates(64)
    expected = 2.5 * sum(passes) / (passes[0] / trainer.updates)
    assert forecast(trainer, plan(recipe, len(trainer.images))) == pytest.approx(expected)
