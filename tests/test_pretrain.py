"""The loop: golden series, repetition and resumption bit for bit, divergence, and what it counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_inputs import checksum, crops, fill
from tiny import tiny_recipe
from torch import Tensor

from cfamc_cli.engine import checkpoint, journal, monitor
from cfamc_cli.engine.adversary import build_adversary
from cfamc_cli.engine.data import ImageSet
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.journal import Diverged
from cfamc_cli.engine.losses import Terms, objective_loss
from cfamc_cli.engine.models import Encoder
from cfamc_cli.engine.optim import LarsOptimizer, learning_rate
from cfamc_cli.engine.pretrain import Outcome, Trainer
from cfamc_cli.engine.sink import NullSink
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe import Cosine, EmpSsl, FreeAdversary, Lars, Model, OfficialCosine, Recipe, SimClr, SupCon
from cfamc_cli.records import MetricLine

DATA = Path(__file__).parent / "data"
GOLDEN: dict[str, Any] = json.loads((DATA / "golden.json").read_text())
SERIES: dict[str, list[float]] = json.loads((DATA / "series.json").read_text())
SYSTEMS = [
    (objective, adversary) for objective in ("emp-ssl", "simclr", "supcon") for adversary in ("none", "pgd", "free")
]
SHORT = {"epochs": 0.375, "log_every": 2}  # 3 batches


@dataclass
class Listener(NullSink):
    """Keeps the records that repeat."""

    records: list[Mapping[str, object]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def metrics(self, line: MetricLine) -> None:
        self.records.append(json.loads(json.dumps(line.written(), allow_nan=False)))

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def positions(self) -> dict[str, int]:
        return {"metrics.jsonl": len(self.records)}


def trainer_of(recipe: Recipe, images: ImageSet, sink: NullSink | None = None) -> Trainer:
    return Trainer(recipe, images, device=torch.device("cpu"), world=World(), sink=sink or Listener())


def never() -> int:
    return 0


def trained(recipe: Recipe, images: ImageSet, folder: Path) -> tuple[Trainer, Listener]:
    sink = Listener()
    trainer = trainer_of(recipe, images, sink)
    assert trainer.train(folder, stop=never) == Outcome("finished", trainer.updates, 0)
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
        moved = adversary.perturb(refused)
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
        outcome = trainer.train(folder, stop=lambda: 15)
        kept = sink.records
        finished = step == straight.updates
        assert outcome == (Outcome("finished", step, 0) if finished else Outcome("interrupted", step, 15))
    assert kept == records.records
    assert newest_bytes(folder) == newest_bytes(tmp_path / "straight")


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


def test_records_hold_what_a_person_watches(tiny_images: ImageSet, tmp_path: Path) -> None:
    _, sink = trained(tiny_recipe("emp-ssl", "free", train=SHORT), tiny_images, tmp_path)
    assert [record["batch"] for record in sink.records] == [2, 3]
    record = sink.records[-1]
    wanted = "kind step batch epoch lr loss gradient_norm invariance coding_rate delta_mean delta_at_bound"
    assert record.keys() == {*wanted.split(), "effective_rank", "feature_std"}
    assert (record["step"], record["epoch"]) == (9, 0.375)


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


def test_a_batch_larger_than_the_data_and_supcon_without_labels_are_refused(tiny_images: ImageSet) -> None:
    with pytest.raises(CfamcError, match="65 is more than the 64 training images") as caught:
        trainer_of(tiny_recipe(train={"batch_size": 65}), tiny_images)
    assert caught.value.exit_code == ExitCode.INVALID
    unlabelled = ImageSet(**{**vars(tiny_images), "labels": torch.full((64,), -1)})
    with pytest.raises(CfamcError, match="no label"):
        trainer_of(tiny_recipe("supcon"), unlabelled)


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
