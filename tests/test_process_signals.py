"""Signals: the batch under way is finished and saved, the exit code says which, the run goes on."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest
from process import Child, Done, environment, warm
from tiny import recipe_text

from cfamc_cli.commands.common import Options, session

CLOSED = """\
import sys, time
from pathlib import Path
from cfamc_cli import cli
from cfamc_cli.engine import pretrain
whole = pretrain.Trainer.loss_of
def slow(self, *arguments):
    if self.step == 4:
        Path("flag").touch()
        time.sleep(1)
    return whole(self, *arguments)
pretrain.Trainer.loss_of = slow
sys.exit(cli.run(sys.argv[1:]))
"""
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138, signal.SIGHUP: 129}


def start(folder: Path, *words: str, hook: str = "", values: tuple[object, ...] = ()) -> Child:
    (folder / "recipe.toml").write_text(recipe_text(every=2, log_every=3))
    return warm().start("pretrain", "recipe.toml", *words, cwd=folder, hook=hook, values=values)


def interrupt(child: Child, flag: Path, *numbers: signal.Signals) -> tuple[Done, float]:
    """Send signals once the child is at its point; returns how it ended, and after how many seconds."""
    child.until(flag.exists)
    for number in numbers:
        time.sleep(0.1)
        child.send(number)
    started = time.monotonic()
    done = child.wait(30)
    return done, time.monotonic() - started


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def record(run: Path) -> dict[str, object]:
    value = json.loads((run / "run.json").read_text())
    assert isinstance(value, dict)
    return value


def results(run: Path) -> list[bytes]:
    last = run / "checkpoints" / "step-00000024"
    return [
        path.read_bytes() for path in (last / "model.safetensors", last / "state.safetensors", run / "metrics.jsonl")
    ]


def finish(folder: Path, *, uncut: list[bytes]) -> None:
    done = warm().run("pretrain", "--resume", "latest", "--quiet", cwd=folder)
    assert done.code == 0, done
    assert record(only_run(folder))["status"] == "finished"
    assert results(only_run(folder)) == uncut


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("uncut")
    assert start(folder).wait().code == 0
    return results(only_run(folder))


@pytest.mark.parametrize(
    ("number", "at"),
    [
        (signal.SIGTERM, 4),  # in the second replay of a batch
        (signal.SIGUSR1, 7),
        (signal.SIGHUP, 7),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),  # in the first batch
        pytest.param(signal.SIGTERM, 5, marks=pytest.mark.slow),  # in the last replay
        pytest.param(signal.SIGINT, 13, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_batch_under_way(
    number: signal.Signals, at: int, tmp_path: Path, uncut: list[bytes]
) -> None:
    flag = tmp_path / "flag"
    child = start(tmp_path, "--json", hook="wait_in_loss", values=(str(flag), at, 0.5))
    done, seconds = interrupt(child, flag, number)
    assert done.code == CODES[number], done
    assert seconds < 10
    run, step = only_run(tmp_path), 3 * (at // 3 + 1)  # three replays a batch
    assert (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    assert record(run)["status"] == "interrupted"
    progress = record(run)["progress"]
    assert isinstance(progress, dict)
    assert progress["step"] == step
    assert f"go on with: cfamc pretrain --resume {run.name}" in done.err
    assert "Traceback" not in done.err
    error = done.answer["error"]
    assert (error["exit_code"], error["run"]) == (CODES[number], run.name)
    assert not (run / ".lock").exists()
    finish(tmp_path, uncut=uncut)


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_a_signal_during_a_save(number: signal.Signals, tmp_path: Path, uncut: list[bytes]) -> None:
    flag = tmp_path / "flag"
    done, seconds = interrupt(start(tmp_path, hook="wait_in_save", values=(str(flag),)), flag, number)
    assert done.code == CODES[number], done
    assert seconds < 10
    run = only_run(tmp_path)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    finish(tmp_path, uncut=uncut)


@pytest.mark.slow
def test_a_signal_during_an_online_evaluation(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    words = ("--set", "train.evaluate_every=1")
    (whole / "flag").touch()  # nobody interrupts this one
    assert start(whole, *words, hook="wait_in_evaluation", values=(str(whole / "flag"), 20)).wait().code == 0
    done, seconds = interrupt(
        start(cut, *words, hook="wait_in_evaluation", values=(str(cut / "flag"), 20)), cut / "flag", signal.SIGTERM
    )
    assert done.code == 143, done
    assert seconds < 10
    resumed = warm().run(
        "pretrain", "--resume", "latest", cwd=cut, hook="wait_in_evaluation", values=(str(cut / "flag"), 20)
    )
    assert resumed.code == 0, resumed
    assert results(only_run(cut)) == results(only_run(whole))
    kept = record(only_run(cut))
    assert kept["untrained"] is not None
    assert kept["evaluation"] != kept["untrained"]


@pytest.mark.parametrize("second", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_second_signal_ends_at_once(second: signal.Signals, tmp_path: Path, uncut: list[bytes]) -> None:
    flag = tmp_path / "flag"
    child = start(tmp_path, hook="wait_in_loss", values=(str(flag), 10, 60))
    done, seconds = interrupt(child, flag, signal.SIGINT, second)
    assert done.code == CODES[second], done
    assert seconds < 5
    run = only_run(tmp_path)
    assert record(run)["status"] == "interrupted"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert run.name in done.err
    finish(tmp_path, uncut=uncut)


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_twice_inside_a_save_leaves_nothing_half_written(times: int, tmp_path: Path, uncut: list[bytes]) -> None:
    flag = tmp_path / "flag"
    child = start(tmp_path, hook="wait_in_save", values=(str(flag),))
    done, _ = interrupt(child, flag, *[signal.SIGTERM] * (times + 1))
    assert done.code == 143, done
    run = only_run(tmp_path)
    assert not list(run.rglob(".tmp-*"))
    assert list((run / "checkpoints").iterdir()) == []
    finish(tmp_path, uncut=uncut)


@pytest.mark.slow
def test_before_the_data_are_there_no_run_is_made(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    done, seconds = interrupt(start(tmp_path, hook="wait_in_load", values=(str(flag),)), flag, signal.SIGINT)
    assert done.code == 130, done
    assert seconds < 5
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_signal_in_the_last_update_ends_what_would_follow(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    child = start(tmp_path, "--seeds", "0,1", "--json", hook="wait_in_loss", values=(str(flag), 23, 0.5))
    done, _ = interrupt(child, flag, signal.SIGTERM)
    assert done.code == 143, done
    run = only_run(tmp_path)  # seed 1 was not begun
    assert record(run)["status"] == "finished"
    assert done.answer["error"]["finished"] == [run.name]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_ends_a_run_with_all_of_it_saved(
    ignored: bool, tmp_path: Path, uncut: list[bytes]
) -> None:
    """The kernel sends SIGHUP when the last one lets the terminal go; under nohup the run goes on."""
    (tmp_path / "recipe.toml").write_text(recipe_text(every=2, log_every=3))
    command = [sys.executable, "-c", CLOSED, "pretrain", "recipe.toml"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)  # whatever these tests run under
        os.execve(sys.executable, command, environment(TERM="xterm"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "flag").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (1 if ignored else 129)  # its id found no stdout to be written to
    run = only_run(tmp_path)
    assert record(run)["status"] == ("finished" if ignored else "interrupted")
    if not ignored:
        finish(tmp_path, uncut=uncut)
    assert results(run) == uncut


def test_a_script_that_starts_a_run_in_the_background_can_interrupt_it_and_nohup_is_heeded() -> None:
    """A shell has a background job ignore SIGINT, as nohup has it ignore SIGHUP."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        with session(Options(quiet=True)) as working:
            heard = [signal.getsignal(number) == working.signals.arrive for number in numbers]
        assert heard == [True, True, True, False]
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 4
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
