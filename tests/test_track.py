"""Trackers hear what metrics.jsonl holds and nothing else; one that fails is left alone. The real packages, offline."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import recipe_text, run_record, tiny_recipe, write_record

from cfamc_cli import errors
from cfamc_cli.cli import run as command_line
from cfamc_cli.commands import track
from cfamc_cli.errors import ExitCode
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.report.metrics import scalars
from cfamc_cli.store.records import EvaluationLine, MetricLine, Tracker, TrainLine, read_metrics
from cfamc_cli.store.runs import RunFolder

TRAIN: dict[str, Any] = {"lr": 0.3, "gradient_norm": 1.0, "effective_rank": 2.0, "feature_std": 0.1}
EVALUATED = EvaluationLine(step=8, batch=4, epoch=1.0, n=10, knn=3, clean=7, robust=1, eps="8/255", attack="pgd-10")
LINES: list[MetricLine] = [
    *(TrainLine(step=step, batch=step // 2, epoch=step / 8, loss=-step / 3, **TRAIN) for step in (2, 4, 6)),
    EVALUATED,
]
SECRET = "hunter2-of-nobody"


class Told:
    """A person who remembers what was said."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def message(self, text: str) -> None:
        raise AssertionError(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, values: object) -> None:
        raise AssertionError(task)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    for name in ("API_SECRET", "WANDB_NOTES_SECRET"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("sys.argv", ["cfamc", f"--token={SECRET}"])
    folder = RunFolder(tmp_path / "runs/20261122-120000-tiny-000000")
    write_record(folder.run_json, run_record(id=folder.id, status="finished"))
    return folder


RECIPE: Recipe = tiny_recipe(data={"dataset": "folder", "root": f"/home/{SECRET}/images"})


def events_of(run: RunFolder) -> Any:
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    return events


def whole_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind the 7 bytes of wandb's header: blocks of 32 KiB of parts with a header."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def heard(tracker: Tracker, run: RunFolder) -> dict[tuple[str, int], float]:
    """What the tracker's own library reads back: by name and step."""
    match tracker:
        case "tensorboard":
            events = events_of(run)
            told = [(tag, event) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
            return {(tag, event.step): event.value for tag, event in told}
        case "trackio":
            store = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
            return {
                (name, entry["step"]): value
                for entry in store.get_logs("cfamc", run.id)
                for name, value in entry.items()
                if "/" in name
            }
        case "wandb":
            proto: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
            importlib.import_module("wandb").teardown()  # what a process does at its end: the file is whole then
            (path,) = (run.path / "wandb").glob("offline-run-*/*.wandb")
            found = {}
            for data in whole_records(path.read_bytes()):
                record = proto.Record.FromString(data)
                for item in record.history.item:
                    name = item.key or "/".join(item.nested_key)
                    if not name.startswith("_"):
                        found[name, record.history.step.num] = json.loads(item.value_json)
            return found
        case "mlflow":
            client = importlib.import_module("mlflow").MlflowClient()
            (own,) = client.search_runs([client.get_experiment_by_name("cfamc").experiment_id])
            assert (own.info.run_name, own.info.status) == (run.id, "FINISHED")
            assert own.data.params["train.batch_size"] == "8"
            names = own.data.metrics
            return {
                (name, one.step): one.value
                for name in names
                for one in client.get_metric_history(own.info.run_id, name)
            }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tracker", ["tensorboard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "trackio", "mlflow"))]
)
def test_a_tracker_hears_every_number_and_no_secret(
    tracker: Tracker, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(tracker)
    talk = Told()
    with track.tracking(tracker, run, RECIPE, talk) as log:
        for line in LINES:
            log(line)
    assert talk.warnings == []
    assert capsys.readouterr().out == ""
    wanted = {(name, line.step): float(value) for line in LINES for name, value in scalars(line).items()}
    assert {key: pytest.approx(value, rel=1e-6) for key, value in wanted.items()} == heard(tracker, run)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_what_a_run_that_goes_on_says_again_counts_once(run: RunFolder) -> None:
    for lines in (LINES[:3], LINES[1:]):
        with track.tracking("tensorboard", run, RECIPE, Told()) as log:
            for line in lines:
                log(line)
    assert [event.step for event in events_of(run).Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.parametrize("when", ["opening", "a line", "closing"])
def test_a_tracker_that_fails_is_told_nothing_more_and_that_is_said_once(
    when: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fails_at(place: str) -> None:
        asked.append(place)
        if place == when:
            raise ConnectionError("no route\nto host")

    def opened(*_: object) -> tuple[track.Log, Any]:
        fails_at("opening")
        return lambda line: fails_at("a line"), lambda: fails_at("closing")

    monkeypatch.setattr(track, "_opened", opened)
    talk = Told()
    with track.tracking("wandb", run, RECIPE, talk) as log:
        for line in LINES[:2]:
            log(line)
    assert asked == {"opening": ["opening"], "a line": ["opening", "a line"]}.get(
        when, ["opening", "a line", "a line", "closing"]
    )
    assert talk.warnings == [
        "--track wandb failed and is told nothing more: no route to host; metrics.jsonl has every line"
    ]


def test_a_failure_of_the_work_is_not_the_tracker_s(run: RunFolder) -> None:
    talk = Told()
    with pytest.raises(KeyError), track.tracking("tensorboard", run, RECIPE, talk):
        raise KeyError
    assert talk.warnings == []


def test_a_tracked_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.toml").write_text(recipe_text(every=0))
    for store, flags in (("plain", []), ("tracked", ["--track", "tensorboard"])):
        assert command_line(["pretrain", "one.toml", "--runs", store, "--device", "cpu", "--quiet", *flags]) == 0
    (plain,), (tracked,) = (list(Path(store).glob("*/metrics.jsonl")) for store in ("plain", "tracked"))
    assert plain.read_bytes() == tracked.read_bytes()
    told = {(name, line.step): value for line in read_metrics(tracked) for name, value in scalars(line).items()}
    found = heard("tensorboard", RunFolder(tracked.parent))
    assert found == {key: pytest.approx(float(value), rel=1e-6) for key, value in told.items()}
    assert any(name == "train/loss" for name, _ in found)


def test_what_cannot_be_tracked_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    assert command_line(["pretrain", "quickstart", "--track", "mlflow"]) == ExitCode.INVALID
    assert capsys.readouterr().err.splitlines() == [
        "error: --track mlflow needs mlflow",
        "hint: pip install 'cfamc[mlflow]'",
    ]
    assert command_line(["pretrain", "quickstart", "--track", "wandb", "--dry-run"]) == ExitCode.INVALID
    assert "--track has no effect with --dry-run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
