"""What the ledger of a run writes: run.json by value, and its two record files."""

from __future__ import annotations

import hashlib
import math
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import COMPUTATION, recipe_text, tiny_recipe

from cfamc_cli.commands.common import Options
from cfamc_cli.commands.pretrain import pretrain
from cfamc_cli.engine import device, distributed
from cfamc_cli.engine.checkpoint import read_tensors
from cfamc_cli.engine.data.sets import load as load_images
from cfamc_cli.engine.device import computation
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sink import NullLedger, NullTalk
from cfamc_cli.errors import CfamcError, ExitCode, Interrupted
from cfamc_cli.recipe.file import load
from cfamc_cli.recipe.plan import PROCESS, plan
from cfamc_cli.store import files
from cfamc_cli.store.ledger import RunLedger, found, found_again
from cfamc_cli.store.records import (
    DataUsed,
    EvaluationLine,
    Failure,
    GripLine,
    Progress,
    RunRecord,
    TimingLine,
    Totals,
    TrainLine,
    load_record,
    read_metrics,
    read_timing,
)
from cfamc_cli.store.runs import RunFolder, list_runs

USED = DataUsed(dataset="tiny", split="train", n=24, fingerprint="ab" * 32)
TOTALS = Totals(steps=12, view_passes=960, parameters=77)
COST = TimingLine(step=1, batch=1, epoch=0.5, views_per_second=2.0, data_share=0.1, seconds=0.5, peak_memory=3)


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The seconds of a run, to be moved by hand."""
    made = Clock()
    monkeypatch.setattr("cfamc_cli.store.ledger.time.monotonic", lambda: made.now)
    return made


def begun(folder: Path) -> RunLedger:
    kept = RunLedger(RunFolder(folder), found(RunFolder(folder), tiny_recipe(), device="cpu"))
    kept.begin(USED, TOTALS, Progress(total=12), COMPUTATION)
    return kept


def on_disk(kept: RunLedger) -> RunRecord:
    return load_record(kept.run.run_json, RunRecord)


def train_line(step: int) -> TrainLine:
    at = {"step": step, "batch": step // 2, "epoch": step / 4}
    return TrainLine.model_validate(
        {**at, "lr": 0.3, "loss": 1.0, "gradient_norm": 1.0, "effective_rank": 2.0, "feature_std": 0.1}
    )


@pytest.mark.parametrize(
    ("step", "rank", "spread", "heads", "collapsed"),
    [
        (100, 2.0, 0.1, 0.15, False),
        (100, 2.0, 0.1, None, False),  # a line from before heads were looked at
        (100, 1.9, 0.5, 0.5, True),
        (100, 9.0, 0.09, 0.5, True),
        (100, 9.0, 0.09, None, True),
        (100, 9.0, 0.5, 0.14, True),
        (99, 1.0, 0.0, 0.0, False),
    ],
)
def test_a_run_whose_encoder_collapsed_is_marked_until_it_recovers(
    step: int, rank: float, spread: float, heads: float | None, collapsed: bool, tmp_path: Path
) -> None:
    kept, line = begun(tmp_path), train_line(step)
    measured = {"effective_rank": rank, "feature_std": spread, "representation_std": heads}
    kept.metrics(line.model_copy(update=measured))
    assert on_disk(kept).collapsed == collapsed
    kept.metrics(train_line(step + 1))
    assert not on_disk(kept).collapsed


def evaluation_line(step: int, *, right: int) -> EvaluationLine:
    at = {"step": step, "batch": step // 2, "epoch": step / 4}
    return EvaluationLine.model_validate(
        {**at, "n": 20, "knn": right, "clean": right + 1, "robust": right - 1, "eps": "8/255", "attack": "pgd-20"}
    )


def test_records_are_kept_apart_and_name_what_is_not_finite(tmp_path: Path) -> None:
    grip = GripLine(step=1, batch=1, epoch=0.5, clean=math.nan, trained=math.inf, strongest=0.3, strength=1, lost=False)
    kept = begun(tmp_path)
    kept.metrics(grip)
    kept.timing(COST)
    held = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "timing.jsonl")}
    ends = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in held.items()}
    assert kept.positions() == ends
    assert files.read_jsonl(kept.run.metrics) == [
        {"kind": "grip", "step": 1, "batch": 1, "epoch": 0.5, "clean": None, "trained": None, "strongest": 0.3}
        | {"strength": 1, "lost": False, "nonfinite": {"clean": "nan", "trained": "inf"}}
    ]
    assert repr(read_metrics(kept.run.metrics)) == repr([grip])  # nan is not nan
    assert files.read_jsonl(kept.run.timing) == [COST.model_dump(exclude_none=True)]
    assert read_timing(kept.run.timing) == [COST]
    assert NullLedger().positions() == {}


def test_wall_time_is_that_of_all_sittings(tmp_path: Path, clock: Clock) -> None:
    kept = begun(tmp_path)
    clock.now += 7
    kept.end("interrupted", Progress(batch=3, step=6, epoch=1.5, total=12))
    kept.close()
    clock.now += 1000  # nobody works
    again = RunLedger(kept.run, found_again(kept.run, device="cpu"))
    clock.now += 2
    again.begin(USED, TOTALS, Progress(total=12), COMPUTATION)
    record = on_disk(again)
    assert (record.wall_seconds, record.status) == (9.0, "running")
    assert (record.data, record.totals) == (USED, TOTALS)
    assert record.environment.computation == COMPUTATION
    assert found_again(kept.run, device="cpu").environment.computation is None, "until it computes here and now"
    assert (record.recipe_digest, record.seed) == (tiny_recipe().digest(), tiny_recipe().seed)
    with pytest.raises(CfamcError, match="the data changed since run"):
        again.begin(USED.model_copy(update={"fingerprint": "cd" * 32}), TOTALS, Progress(total=12), COMPUTATION)


def test_progress_is_that_of_the_last_line_and_written_now_and_then(tmp_path: Path, clock: Clock) -> None:
    kept = begun(tmp_path)
    clock.now += 4.9
    kept.metrics(train_line(4))
    assert on_disk(kept).progress == Progress(total=12), "it is written every five seconds"
    clock.now += 0.2
    kept.metrics(train_line(6))
    assert on_disk(kept).progress == Progress(batch=3, step=6, epoch=1.5, total=12)


@pytest.mark.parametrize(
    ("end", "status", "failure"),
    [
        (Interrupted(15), "interrupted", None),
        (CfamcError("no room"), "failed", ("no room", 1, None, None)),
        (ValueError("odd"), "failed", ("ValueError: odd", 1, None, None)),
        (
            CfamcError("inf", exit_code=ExitCode.DIVERGED, details={"batch": 3, "step": 7, "lr": 0.5, "loss": "inf"}),
            "diverged",
            ("inf", 3, 7, 0.5),
        ),
    ],
    ids=["signal", "failure", "defect", "divergence"],
)
def test_what_ends_a_run_is_written_down(
    tmp_path: Path, end: BaseException, status: str, failure: tuple[object, ...] | None
) -> None:
    kept = begun(tmp_path)
    with pytest.raises(type(end)), kept.failures():
        raise end
    record = on_disk(kept)
    assert record.status == status
    found = record.failure
    assert (None if found is None else (found.message, found.exit_code, found.step, found.lr)) == failure
    kept.close()
    resumed = RunLedger(kept.run, found_again(kept.run, device="cpu"))
    assert on_disk(resumed).failure is None, "a run that goes on has not failed"


def test_a_divergence_keeps_the_numbers_that_are_finite(tmp_path: Path) -> None:
    kept = begun(tmp_path)
    details = {"batch": 3, "step": 7, "lr": 0.5, "loss": repr(2.5), "gradient_norm": repr(math.inf)}
    end = CfamcError("it grew", exit_code=ExitCode.DIVERGED, details=details | {"update": 8})
    with pytest.raises(CfamcError), kept.failures():
        raise end
    found = {"message": "it grew", "exit_code": 3, "batch": 3, "step": 7, "lr": 0.5, "loss": 2.5, "gradient_norm": None}
    assert on_disk(kept).failure == Failure.model_validate(found)


def test_a_cut_ledger_forgets_the_evaluations_beyond_the_checkpoint(tmp_path: Path) -> None:
    kept = begun(tmp_path)
    first, second = evaluation_line(0, right=3), evaluation_line(4, right=9)
    kept.metrics(first)
    at = kept.positions()
    kept.metrics(second)
    assert (on_disk(kept).untrained, on_disk(kept).evaluation) == (first.evaluation(), second.evaluation())
    kept.cut_back(at)
    assert (on_disk(kept).untrained, on_disk(kept).evaluation) == (first.evaluation(), first.evaluation())
    assert read_metrics(kept.run.metrics) == [first]
    with pytest.raises(CfamcError, match="where a checkpoint counts on"):
        kept.cut_back({"metrics.jsonl": 10**6})
    for none in (-1, "0", {"size": 0}, {"size": -1, "sha256": ""}, [0]):
        with pytest.raises(CfamcError, match="does not say where it ended") as refused:
            kept.cut_back({"metrics.jsonl": none})
        assert refused.value.exit_code == ExitCode.BAD_DATA


def test_no_process_leaves_before_an_interruption_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher ends the other processes when one is gone, and the first may still be writing."""
    path, options = tmp_path / "tiny.toml", Options(device="cpu", runs=tmp_path / "runs", quiet=True)
    path.write_text(recipe_text())
    waits: list[tuple[int, str]] = []

    def largest(flag: int, _: World) -> int:
        waits.append((flag, list_runs(tmp_path / "runs")[0].record().status))
        return flag

    monkeypatch.setattr(Trainer, "train", lambda *_, **__: signal.SIGTERM)
    monkeypatch.setattr(distributed, "largest", largest)
    with pytest.raises(CfamcError) as end:
        pretrain(str(path), overrides=[], seeds=[], resume=None, dry_run=False, force=False, options=options)
    assert (end.value.exit_code, waits) == (ExitCode.TERMINATED, [(signal.SIGTERM, "interrupted")])


@pytest.mark.parametrize(("adversary", "replays", "steps"), [("free", 3, 0), ("pgd", 1, 2)])
def test_the_record_of_a_training_is_that_of_what_was_trained(
    adversary: str, replays: int, steps: int, tmp_path: Path
) -> None:
    path, options = tmp_path / "tiny.toml", Options(device="cpu", runs=tmp_path / "runs", quiet=True)
    path.write_text(recipe_text("emp-ssl", adversary))
    short = ["data.limit=70", "train.precision='float32'"]
    pretrain(str(path), overrides=short, seeds=[3], resume=None, dry_run=False, force=False, options=options)
    (run,) = list_runs(tmp_path / "runs")
    record, recipe = run.record(), load(str(path), overrides=short, seed=3)
    updates = 8 * replays  # 70 images make 8 whole batches
    tensors = read_tensors(run.checkpoints / f"step-{updates:08d}" / "model.safetensors")
    buffers = ("running_mean", "running_var", "tracked")
    weights = sum(value.numel() for name, value in tensors.items() if not name.endswith(buffers))
    assert record.status == "finished"
    passes, ascent = updates * 8 * 4, 8 * 8 * 4 * steps
    assert record.totals == Totals(steps=updates, view_passes=passes, attack_view_passes=ascent, parameters=weights)
    assert record.progress == Progress(batch=8, step=updates, epoch=1.0, total=updates)
    assert (record.recipe_digest, record.seed, record.name) == (recipe.digest(), 3, "tiny")
    assert (run.recipe(), load(str(run.recipe_toml))) == (recipe, recipe)
    images = load_images(recipe.data, "train", seed=3, cache=tmp_path, talk=NullTalk())
    assert record.data == images.used()
    assert record.data.n == 70
    assert record.environment.computation == computation(torch.device("cpu"), precision="float32")


def test_a_run_says_what_it_is_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, options = tmp_path / "tiny.toml", Options(device="cpu", runs=tmp_path / "runs")
    path.write_text(recipe_text())
    pretrain(str(path), overrides=[], seeds=[3], resume=None, dry_run=False, force=False, options=options)
    (run,) = list_runs(tmp_path / "runs")
    said = [line.partition("  ")[2].strip() for line in capsys.readouterr().err.splitlines()[:5]]
    assert said[:3] == [
        f"{run.id} in {tmp_path / 'runs'}",
        "tiny, seed 3: emp-ssl, adversary free",
        "64 images of fashion-mini train, 4 crops of 16 pixels",
    ]
    assert "-s3-" in run.id
    assert said[3].startswith("cpu, ")
    assert said[3].endswith(" in float32")
    assert re.fullmatch(r"24 weight updates, 0\.\d+ GiB, at best \d+ s and evaluations", said[4])


def test_what_is_beyond_the_memory_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = tmp_path / "tiny.toml", Options(device="cpu", runs=tmp_path / "runs", quiet=True)
    path.write_text(recipe_text())
    needed = plan(load(str(path)), images=64).memory + PROCESS
    begin = partial(pretrain, str(path), overrides=[], seeds=[], resume=None, dry_run=False, options=options)
    monkeypatch.setattr(device, "whole_memory", lambda _: needed - 1)
    with pytest.raises(CfamcError, match=r"the plan takes about [\d.]+ GiB, and cpu has [\d.]+") as refused:
        begin(force=False)
    assert refused.value.exit_code == ExitCode.INVALID
    assert refused.value.hint.startswith("train.memory=recompute plans ")
    assert refused.value.hint.endswith("; --force starts it all the same")
    assert not (tmp_path / "runs").exists()
    begin(force=True)
    monkeypatch.setattr(device, "whole_memory", lambda _: needed)
    begin(force=False)
    assert len(list_runs(tmp_path / "runs")) == 2


def test_the_memory_of_this_machine_is_known() -> None:
    """As its own tools have it; a container may have less."""
    found = device.whole_memory(torch.device("cpu"))
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert found is not None
    assert 2**28 < found <= total
    assert device.whole_memory(torch.device("meta")) is None
