from __future__ import annotations

import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from process import environment
from tiny import recipe_text

from cfamc_cli import cli
from cfamc_cli.commands import sweep
from cfamc_cli.errors import CfamcError
from cfamc_cli.store.runs import list_runs


def settings(reference: str, *overrides: str, path: Path | None = None, seeds: tuple[int, ...] = ()) -> list[str]:
    return [str(point) for point in sweep.grid(reference, overrides, path, seeds)]


def test_a_grid_is_every_combination_of_values_and_seeds(tmp_path: Path) -> None:
    assert settings("quickstart", "crops.0.count=4,8", "adversary.eps=4/255,8/255", seeds=(0, 1)) == [
        f"crops.0.count={count} adversary.eps={eps} seed={seed}"
        for count in (4, 8)
        for eps in ("4/255", "8/255")
        for seed in (0, 1)
    ]
    assert settings("quickstart", "crops.0.scale=[0.2, 1.0]") == ["seed=0"]  # the label has what varies
    assert settings("quickstart", "crops.0.scale=[0.2,1.0],[0.1,1.0]") == [
        f"crops.0.scale=[{low}, 1.0] seed=0" for low in (0.2, 0.1)
    ]
    assert [point.settings for point in sweep.grid("quickstart", ["name=a, b"], None, ())] == [("name=a, b",)]
    path = tmp_path / "sweep.toml"
    path.write_text('seed = [5, 6]\noptimizer.lr = [0.1, 0.3]\n"adversary.eps" = ["8/255"]\n')
    assert settings("quickstart", path=path) == [
        f"optimizer.lr={lr} seed={seed}" for lr in (0.1, 0.3) for seed in (5, 6)
    ]
    path.write_text("optimizer.lr = 0.1")
    with pytest.raises(CfamcError, match=r"optimizer\.lr is no list of values"):
        settings("quickstart", path=path)
    with pytest.raises(CfamcError, match=r"--set crops\.0\.count: must be a whole number"):
        settings("quickstart", "crops.0.count=4,x")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(recipe_text(epochs=0.25))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(["pretrain", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_sweep_leaves_out_what_is_finished_and_goes_on_with_the_rest(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "runs"
    words = (str(recipe), "--set", "optimizer.lr=0.1,0.3", "--seeds", "0,1", "--runs", str(store), "--device", "cpu")
    code, out, _ = run(capsys, *words, "--print-jobs")
    lines = out.splitlines()
    assert code == 0
    assert [line[line.index("--set") : line.index(" --runs")] for line in lines] == [
        f"--set optimizer.lr={lr} --seed {seed}" for lr in (0.1, 0.3) for seed in (0, 1)
    ]
    assert run(capsys, *shlex.split(lines[1])[2:], "--dry-run")[0] == 2
    started: list[list[str]] = []

    class Ended:
        """In place of a process: it trains here, but for the third, which is interrupted before it has trained."""

        stderr = None

        def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
            started.append(command[4:])
            with pytest.MonkeyPatch.context() as patch:
                if len(started) == 3:
                    patch.setattr("cfamc_cli.engine.pretrain.Trainer.train", lambda *_, **__: signal.SIGTERM)
                self.code = cli.run(command[3:])
            self.out = capsys.readouterr().out

        def poll(self) -> int:
            return self.code

        def communicate(self) -> tuple[str, None]:
            return self.out, None

    real = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            subprocess, "Popen", lambda words, **more: (Ended if "cfamc_cli" in words else real)(words, **more)
        )
        code, _, err = run(capsys, *words, "--quiet")
        assert code == 1
        assert "1 of 4 runs did not finish: optimizer.lr=0.3 seed=0 (exit code 143)" in err
        assert len(list_runs(store)) == 4
        code, out, _ = run(capsys, *words, "--jobs", "2", "--json")
    records = json.loads(out)["runs"]
    assert code == 0
    assert [words[:1] for words in started[4:]] == [["--resume"]]
    assert sorted((record["seed"], record["status"]) for record in records) == [
        (seed, "finished") for seed in (0, 0, 1, 1)
    ]
    assert run(capsys, *words, "--print-jobs") == (0, "", "")


def test_runs_are_spread_over_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a")
    assert sweep._cards("auto") == ["3", "GPU-a"]
    assert sweep._cards("cpu") == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert sweep._cards("cuda") == ["0", "1"]


def test_runs_at_the_same_time_never_share_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = tmp_path / "training"  # in its place: it says which card it was given, and when
    training.write_text(
        "#!/bin/sh\nbegan=$(date +%s%N); sleep 0.3\n"
        'echo "{\\"id\\": \\"$CUDA_VISIBLE_DEVICES\\", \\"began\\": $began, \\"ended\\": $(date +%s%N)}"\n'
    )
    training.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(training))
    monkeypatch.setattr(sweep, "_SECONDS", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a")
    store = ("--runs", str(tmp_path / "runs"))
    code, out, _ = run(capsys, "quickstart", "--seeds", "0,1,2,3", "--device", "cuda", "--jobs", "2", "--json", *store)
    found = sorted(json.loads(out)["runs"], key=lambda record: record["began"])
    assert (code, {record["id"] for record in found}) == (0, {"3", "GPU-a"})
    for before, after in itertools.combinations(found, 2):
        assert before["id"] != after["id"] or before["ended"] <= after["began"]


@pytest.mark.slow
def test_a_signal_ends_every_run_of_a_sweep_resumably(recipe: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    words = [sys.executable, "-m", "cfamc_cli", "pretrain", str(recipe), "--set", "train.epochs=400", "--seeds", "0,1"]
    words += ["--runs", str(store), "--device", "cpu", "--jobs", "2"]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and sum(path.stat().st_size > 0 for path in store.glob("*/metrics.jsonl")) < 2:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "hint: give the same command again" in err
    assert "[seed=0] run " in err
    assert [made.record().status for made in list_runs(store)] == ["interrupted"] * 2
