"""`cfamc bench`: where the time of a step goes, what a run will take, and which settings pay."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import recipe_text, tiny_recipe

from cfamc_cli import cli
from cfamc_cli.engine import bench, bench_attacks, journal, monitor, sections
from cfamc_cli.engine.attacks.plan import plan as attack_plan
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.evaluation.blocks import evaluate
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sections import Clock, section
from cfamc_cli.engine.sink import NullLedger, NullTalk
from cfamc_cli.errors import CfamcError, Interrupted
from cfamc_cli.recipe.plan import Plan, plan
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.store.records import BenchRecord, Spread, TrainingCost, load_record
from cfamc_cli.store.runs import list_runs

CPU = torch.device("cpu")


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time goes on by one second whenever it is asked for."""
    seconds: Iterator[float] = iter(map(float, range(100_000)))
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))


@pytest.mark.usefixtures("ticks")
def test_the_time_of_a_section_is_its_own_without_those_within() -> None:
    with Clock(CPU) as clock:  # 0
        with section("adversary"):  # 1 to 6
            with section("forward"):  # 2 to 3
                pass
            with section("forward"):  # 4 to 5
                pass
        assert clock.lap() == 7
        assert clock.lap() == 1
    with section("crops"):  # nobody listens
        pass
    first, second = clock.laps()
    assert (first.seconds, first.host, first.device) == (7, {"adversary": 3, "forward": 2}, None)
    assert (second.seconds, second.host) == (1, {})


@pytest.mark.parametrize(("adversary", "passes"), [("none", 1), ("free", 3), ("pgd", 3)])
def test_the_loop_names_its_sections(
    adversary: str,
    passes: int,
    tiny_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch passes back thrice: PGD-2 twice before its update, free training has 3 replays."""
    entered: dict[str, int] = {}
    span = Clock.span

    def counted(clock: Clock, name: sections.Section) -> object:
        entered[name] = entered.get(name, 0) + 1
        return span(clock, name)

    monkeypatch.setattr(Clock, "span", counted)
    recipe = tiny_recipe("emp-ssl", adversary, train={"epochs": 0.125})
    trainer = Trainer(recipe, tiny_images, device=CPU, world=World(), talk=NullTalk(), ledger=NullLedger())
    with Clock(CPU):
        trainer.train(tmp_path, stop=lambda: 0)
    assert (entered["crops"], entered["objective"], entered["backward"]) == (1, passes, passes)
    once = {"crops", "forward", "objective", "backward", "optimizer", "records", "checkpoint"}
    assert set(entered) == once | ({"adversary"} if adversary != "none" else set())


@pytest.mark.usefixtures("ticks")
def test_a_batch_is_measured_on_the_loop_itself() -> None:
    """Under a clock that counts how often it is read: three replays, and rates by the plan's counts."""
    recipe = tiny_recipe(train={"log_every": 1000})
    cost = bench.measure(recipe, bench.random_images(recipe, 64), device=CPU, seconds=200)
    spent = {part.name: part.host for part in cost.sections}
    assert (spent["crops"], spent["objective"], spent["backward"]) == (1, 3, 3)
    assert "evaluation" not in spent
    assert sum(spent.values()) < cost.batch_seconds
    assert cost.batches == -(-200 // cost.batch_seconds)  # as many as fill 200 seconds
    costs = plan(recipe, images=64)
    assert cost.flops_per_second == pytest.approx(costs.flops / costs.batches / cost.batch_seconds)
    assert cost.views_per_second == pytest.approx(3 * 4 * 8 / cost.batch_seconds)


def test_an_evaluation_is_no_part_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "HELD_OUT", 16)
    recipe = tiny_recipe(data={"dataset": "fashion-mini", "root": None}, train={"evaluate_every": 1})
    cost = bench.measure(recipe, bench.random_images(recipe, 64), device=CPU, seconds=0)
    assert cost.batches == bench.LEAST
    names = {part.name for part in cost.sections}
    assert "forward" in names  # what was timed are batches, though the evaluation asks whether to stop as well
    assert "evaluation" not in names
    assert cost.evaluation_seconds > 0


@pytest.mark.parametrize(
    ("train", "apart"),
    [
        ({}, 1.0 * 2),  # two epochs, a checkpoint each
        ({"checkpoint_every": 3}, 1.0 * 6),
        ({"evaluate_every": 1}, 1.0 * 2 + 10.0 * 3),  # before the first update, and after each epoch
        ({"evaluate_every": 5}, 1.0 * 2 + 10.0 * 2),
    ],
)
def test_a_run_is_predicted_as_the_sum_of_its_parts(train: dict[str, Any], apart: float) -> None:
    recipe = tiny_recipe("emp-ssl", "none", train={"epochs": 2.0, **train})
    costs = plan(recipe, images=64)  # 16 batches
    steady = bench.predict([0.5] * 4, recipe, costs, warmup=7.0, evaluation=10.0, checkpoint=1.0)
    assert steady == Spread(seconds=7 + apart + 8, low=7 + apart + 8, high=7 + apart + 8)
    alone = bench.predict([0.5], recipe, costs, warmup=7.0, evaluation=10.0, checkpoint=1.0)
    assert alone == Spread(seconds=7 + apart + 8, low=None, high=None)


def test_later_phases_are_predicted_too_and_begin_with_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    phase = {"epochs": 1.0, "batch_size": 32, "adversary": {"name": "none"}}
    recipe = tiny_recipe(train={"evaluate_every": 1}, phase=[phase])
    predicted: list[tuple[int, float, bool]] = []

    def predict(seconds: list[float], recipe: Recipe, costs: Plan, *, first: bool, **_: float) -> Spread:
        predicted.append((costs.batches, recipe.train.epochs, first))
        return Spread(seconds=costs.batches, low=1.0, high=len(predicted) * 100.0)

    monkeypatch.setattr(bench, "predict", predict)
    cost = bench.measure(recipe, bench.random_images(recipe, 1000), device=CPU, seconds=0)
    assert predicted == [(125, 1.0, True), (31, 1.0, False)]
    assert (cost.phases, cost.batches) == (2, bench.LEAST)
    assert cost.predicted == Spread(seconds=156.0, low=2.0, high=300.0)
    monkeypatch.undo()
    costs = plan(recipe.parts()[1], images=64)  # 2 batches
    later = bench.predict([0.5], recipe, costs, warmup=7.0, evaluation=10.0, checkpoint=1.0, first=False)
    assert later.seconds == 7 + 10 + 1 + 2 * 0.5


def test_the_interval_is_that_of_the_mean() -> None:
    """Of 100 batches with a standard deviation of 0.1 s: 1.96 x 0.1 / sqrt(100), sixteen times."""
    times = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = 1 + 0.1 * (times - times.mean()) / times.std()
    recipe = tiny_recipe("emp-ssl", "none", train={"epochs": 2.0})
    found = bench.predict(times.tolist(), recipe, plan(recipe, images=64), warmup=0.0, evaluation=0.0, checkpoint=0.0)
    assert found.low is not None
    assert found.high is not None
    assert found.seconds == pytest.approx(16)
    assert (16 - found.low, found.high - 16) == pytest.approx((16 * 0.0196, 16 * 0.0196), rel=0.1)


def test_what_compares_adversaries_is_counted() -> None:
    """2 % of the view passes, where the run is long enough for comparisons."""
    recipe = tiny_recipe(train={"epochs": 1000.0})
    costs = plan(recipe, images=64)
    found = bench.predict([0.5], recipe, costs, warmup=0.0, evaluation=0.0, checkpoint=0.0)
    assert found.seconds == pytest.approx(0.5 * costs.batches * 1.02)


@pytest.mark.parametrize(("epochs", "compared"), [(8.0, 0.0), (16.0, 0.02)])
def test_comparisons_are_counted_by_the_passes_of_the_attack_too(epochs: float, compared: float) -> None:
    """With 6 passes an update, 1,024 images over the run are enough for one comparison, and 512 are not."""
    recipe = tiny_recipe("emp-ssl", "pgd", train={"epochs": epochs, "batch_size": 8}, adversary={"steps": 5})
    costs = plan(recipe, images=64)
    found = bench.predict([0.5], recipe, costs, warmup=0.0, evaluation=0.0, checkpoint=0.0)
    assert found.seconds == pytest.approx(0.5 * costs.batches * (1 + compared))


def a_cost(low: float, high: float) -> TrainingCost:
    return TrainingCost(
        batches=3,
        batch_seconds=0.5,
        sections=(),
        launches=None,
        waits=None,
        views_per_second=100.0,
        flops_per_second=5e9,
        peak_memory=None,
        warmup_seconds=0.0,
        evaluation_seconds=0.0,
        checkpoint_seconds=0.0,
        predicted=Spread(seconds=(low + high) / 2, low=low, high=high),
    )


def measured_as(monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[str, bool, str], float | Exception]) -> None:
    """The settings take so long, or fail so, within one second up and down."""

    def measure(recipe: Recipe, *_: object, **__: object) -> TrainingCost:
        found = seconds[(recipe.train.precision, bool(recipe.train.compile), recipe.train.memory)]
        if isinstance(found, Exception):
            raise found
        return a_cost(found - 1, found + 1)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "pick_precision", lambda wanted, _: "bfloat16" if wanted == "auto" else wanted)


@pytest.mark.parametrize(
    ("seconds", "chosen", "skipped"),
    [
        (  # each choice is tried on the best so far; a second less is within the intervals
            {("float32", False, "full"): 20.0, ("bfloat16", False, "full"): 10.0, ("bfloat16", True, "full"): 9.0}
            | {("bfloat16", False, "recompute"): 12.0},
            ("bfloat16", False, "full"),
            {},
        ),
        (  # what is compiled is not recomputed
            {("float32", False, "full"): 20.0, ("bfloat16", False, "full"): 10.0, ("bfloat16", True, "full"): 5.0}
            | {("bfloat16", False, "recompute"): 12.0},
            ("bfloat16", True, "full"),
            {},
        ),
        (  # what does not fit is a row, and not the end
            {
                ("float32", False, "full"): torch.OutOfMemoryError("CUDA out of memory."),
                ("bfloat16", False, "full"): 9.0,
            }
            | {("bfloat16", True, "full"): RuntimeError("no compiler"), ("bfloat16", False, "recompute"): 9.5},
            ("bfloat16", False, "full"),
            {
                "float32": "out of memory: CUDA out of memory.",
                "bfloat16 compiled": "it cannot be compiled here: RuntimeError: no compiler",
            },
        ),
    ],
)
def test_the_faster_of_each_choice_is_kept(
    seconds: dict[tuple[str, bool, str], float | Exception],
    chosen: tuple[str, bool, str],
    skipped: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured_as(monkeypatch, seconds)
    made = bench.variants(RECIPE, device=CPU, seconds=0, alone=False, talk=NullTalk())
    assert [tuple(variant.settings.values()) for variant in made] == list(seconds)
    assert tuple(bench.best(made).settings.values()) == chosen
    assert {variant.words: variant.skipped for variant in made if variant.skipped} == skipped
    assert made[-1].words == "bfloat16 recompute"


def test_where_nothing_fits_the_reason_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(p, c, m) for p in ("float32", "bfloat16") for c in (False, True) for m in ("full", "recompute")]
    measured_as(monkeypatch, {key: MemoryError("too large") for key in sizes})
    with pytest.raises(CfamcError, match=r"^out of memory: too large$"):
        bench.variants(RECIPE, device=CPU, seconds=0, alone=False, talk=NullTalk())


def test_bfloat16_that_is_emulated_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(
        monkeypatch, dict.fromkeys([("float32", c, m) for c in (False, True) for m in ("full", "recompute")], 9.0)
    )
    monkeypatch.setattr(bench, "pick_precision", lambda *_: "float32")
    made = bench.variants(RECIPE, device=CPU, seconds=0, alone=False, talk=NullTalk())
    assert [variant.skipped for variant in made] == ["", "bfloat16 is emulated on this device", "", ""]


RECIPE = tiny_recipe(data={"dataset": "fashion-mini", "root": None})
PGD = {"name": "pgd", "steps": 14, "eps": "8/255"}


def test_what_an_attack_takes_in_full_is_told_from_its_beginning() -> None:
    """PGD-14, which was cut short at 4 and 12 steps, passes as often as the evaluation that runs it whole."""
    recipe = tiny_recipe(data={"dataset": "fashion-mini", "root": None, "size": 8}, attack=[PGD])
    (cost,) = bench_attacks.attacks(recipe, device=CPU, talk=NullTalk())
    x = torch.rand(cost.samples, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    predictor = bench_attacks._unmoved(recipe, x, classes=10)
    whole = evaluate(
        predictor,
        x,
        torch.zeros(len(x), dtype=torch.int64),
        plan=attack_plan(recipe.attack[0], classes=10),
        seed=0,
        block_size=250,
        device=CPU,
        finished=(),
        commit=lambda *_: None,
        audit=None,
        label="",
        talk=NullTalk(),
    ).totals()
    assert [stage.broken for stage in whole] == [0, 0]
    assert cost.forward == pytest.approx(sum(stage.forward for stage in whole) / len(x))
    assert cost.backward == pytest.approx(sum(stage.backward for stage in whole) / len(x)) == 14
    assert cost.test_images == 1000
    assert cost.predicted == pytest.approx(cost.seconds_per_1000)


@pytest.fixture
def tiny_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "_fastest", lambda *_: 0.001)
    path = tmp_path / "tiny.toml"
    path.write_text(recipe_text() + '\n[[attack]]\nname = "pgd"\nsteps = 2\n')
    return path


def test_a_bench_leaves_a_record_that_compare_reads(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = ["--set", "data.size=8", "--set", "crops.0.size=8"]
    assert cli.run(["bench", str(tiny_file), *smaller, "--alone", "--attack", "--seconds", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    path = Path("runs/benches/tiny-001/record.json")
    record = load_record(path, BenchRecord)
    assert json.loads(out) == record.model_dump(mode="json")
    assert err.splitlines()[-1] == f"{path}; all benches side by side: cfamc compare"
    assert sorted(map(str, Path("runs").rglob("*.*"))) == [str(path)]
    assert (record.id, record.name, record.images, record.batches, record.weight_updates) == (
        "tiny-001",
        "tiny",
        64,
        8,
        24,
    )
    (variant,) = record.variants
    assert variant.settings == {"train.precision": "float32", "train.compile": False, "train.memory": "full"}
    assert variant.cost is not None
    assert variant.cost.batches == bench.LEAST
    assert record.peaks[0].matrix_product == 2 * 1024**3 / 0.001
    assert [(cost.name, cost.backward) for cost in record.attacks] == [("pgd", 2)]
    assert record.wall_seconds > 0
    assert list_runs(Path("runs")) == []

    assert cli.run(["compare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["benches"] == [record.model_dump(mode="json")]
    Path("runs/benches/tiny-002").mkdir()  # one that was killed
    Path("runs/benches/tiny-003").mkdir()
    Path("runs/benches/tiny-003/record.json").write_text("{}")
    assert cli.run(["compare", "runs"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "Benches: what recipes cost, measured on random images"
    assert [line.split()[0] for line in out.splitlines() if "tiny-" in line] == ["tiny-001"]
    assert err.startswith("left out: benches/tiny-003: ")


def test_a_signal_leaves_nothing(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(*_: object, **__: object) -> TrainingCost:
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(bench, "measure", cut)
    assert cli.run(["bench", str(tiny_file), "--alone"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; nothing was written"
    assert not Path("runs").exists()


def test_attacks_that_are_not_there_are_an_error(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_file.write_text("attack = []\n" + recipe_text())
    assert cli.run(["bench", str(tiny_file), "--attack"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: tiny has no [[attack]] to measure"


class Heard(NullTalk):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize(
    ("evaluate_every", "said"),
    [
        (0, "about 1 min 40 s for the 30 updates left"),
        (1, "about 1 min 40 s for the 30 updates left, and 1 min 40 s for evaluations"),
    ],
)
def test_training_says_once_what_the_rest_will_take(
    evaluate_every: int, said: str, tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of ten seconds after a first of 1,000; in the middle of it all an evaluation of 50 s, and two to come."""
    seconds = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: seconds)
    recipe = tiny_recipe(train={"epochs": 2.0, "log_every": 2, "evaluate_every": evaluate_every})  # 16 batches
    talk = Heard()
    trainer = Trainer(recipe, tiny_images, device=CPU, world=World(), talk=talk, ledger=NullLedger())
    log = trainer.journal
    monkeypatch.setattr(log, "_write", lambda *_, **__: None)
    z = torch.zeros(1)

    def evaluation(*_: object, **__: object) -> None:
        nonlocal seconds
        seconds += 50.0

    monkeypatch.setattr(journal, "HELD_OUT", 16)
    monkeypatch.setattr(monitor, "evaluate", evaluation)
    for batch in range(1, 17):
        seconds += 1000.0 if batch == 1 else 10.0
        log.after_batch(trainer.encoder, z, [], [], lambda *_: lambda *_: z, step=3 * batch)
        if evaluate_every and batch == 3:
            log.evaluate(trainer.encoder, tiny_images.images, step=9, stop=lambda: 0)
    assert talk.messages == [said]
