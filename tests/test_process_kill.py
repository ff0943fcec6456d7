"""kill -9 at any moment: what is resumed ends as if it had never been cut, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from process import Child, warm
from tiny import recipe_text

from cfamc_cli.store.files import _temp_name, process_start
from cfamc_cli.store.runs import RunFolder, lock

pytestmark = pytest.mark.slow

SYSTEMS = {  # name: objective, adversary, epochs, checkpoint every
    "emp-ssl-free": ("emp-ssl", "free", 1.0, 1),
    "emp-ssl-none": ("emp-ssl", "none", 3.0, 5),
    "emp-ssl-pgd": ("emp-ssl", "pgd", 3.0, 5),
    "simclr-free": ("simclr", "free", 1.0, 1),
}


def write_recipe(folder: Path, system: str) -> None:
    objective, adversary, epochs, every = SYSTEMS[system]
    text = recipe_text(objective, adversary, epochs=epochs, every=every, log_every=3)
    (folder / "recipe.toml").write_text(text)


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of all that must repeat: weights, optimizer and adversary, and the metric stream."""
    last = run / "checkpoints" / "step-00000024"
    files = [last / "model.safetensors", last / "state.safetensors", run / "metrics.jsonl"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


Uncut = Callable[[str], tuple[dict[str, str], float]]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Uncut:
    """The digests of a run that nobody disturbed, and the seconds it took."""

    @cache
    def train_uncut(system: str) -> tuple[dict[str, str], float]:
        folder = tmp_path_factory.mktemp(f"uncut-{system}")
        write_recipe(folder, system)
        started = time.monotonic()
        done = warm().run("pretrain", "recipe.toml", "--quiet", cwd=folder)
        assert done.code == 0, done
        return digests(folder / "runs" / done.out.strip()), time.monotonic() - started

    return train_uncut


def status(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["status"])


def open_run(folder: Path) -> Path | None:
    """The run that can be resumed; one that was killed before its record existed is nothing yet."""
    runs = [path for path in sorted((folder / "runs").glob("*")) if (path / "run.json").exists()]
    return next((run for run in runs if status(run) != "finished"), None)


def train(folder: Path, **hook: object) -> Child:
    """Resume what is open, or start anew."""
    run = open_run(folder)
    words = ["recipe.toml"] if run is None else ["--resume", run.name]
    return warm().start("pretrain", *words, "--quiet", cwd=folder, **hook)  # type: ignore[arg-type]


def finish(folder: Path) -> list[Path]:
    """Train what is open to its end, and return all finished runs."""
    if open_run(folder) is not None or not (folder / "runs").exists():
        done = train(folder).wait()
        assert done.code == 0, done
    return [run for run in (folder / "runs").iterdir() if (run / "run.json").exists()]


def valid_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that exist under their names, each of which must be whole."""
    steps = []
    for path in sorted((run / "checkpoints").glob("step-*")):
        manifest = json.loads((path / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            data = (path / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"]), path
        steps.append(int(manifest["progress"]["step"]))
    return steps


@pytest.mark.parametrize(
    ("system", "kills"), [("emp-ssl-free", 25), ("emp-ssl-none", 5), ("emp-ssl-pgd", 5), ("simclr-free", 5)]
)
def test_killed_at_random_moments_equals_uncut(system: str, kills: int, tmp_path: Path, uncut: Uncut) -> None:
    expected, seconds = uncut(system)
    write_recipe(tmp_path, system)
    moments = random.Random(system)
    landed = 0
    while landed < kills:
        child = train(tmp_path)
        time.sleep(moments.uniform(0, seconds / 3))  # a resumed run has less before it
        child.send(signal.SIGKILL)
        done = child.wait()
        assert done.code in (0, -signal.SIGKILL), done
        assert "Traceback" not in done.err, done
        landed += done.code == -signal.SIGKILL
    runs = finish(tmp_path)
    assert runs
    for run in runs:
        assert status(run) == "finished"
        assert digests(run) == expected
        assert not list(run.rglob(".tmp-*"))
        with lock(RunFolder(run)):  # what a kill after the end left behind holds nobody off
            pass
        assert not (run / ".lock").exists()


POINTS = [
    "half the data",
    "after data",
    "before fsync",
    "after fsync",
    "before rename",
    "after rename",
    "after the folder's fsync",
    "after save",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_inside_a_save(point: str, tmp_path: Path, uncut: Uncut) -> None:
    system, every, kills = "emp-ssl-none", 5, 10
    write_recipe(tmp_path, system)
    moved = point in POINTS[POINTS.index("after rename") :]
    landed = 0
    alive = tmp_path / _temp_name()  # this process lives
    while landed < kills:
        run = open_run(tmp_path)
        before = max(valid_steps(run), default=0) if run else 0
        if run is not None and not (run / alive.name).exists():
            (run / alive.name).mkdir()
        child = train(tmp_path, hook="kill_in_save", values=[point, 1 + landed % 2])
        done = child.wait()
        assert done.code in (0, -signal.SIGKILL), done
        landed += done.code == -signal.SIGKILL
        run = open_run(tmp_path)
        if run is None:
            continue
        steps = valid_steps(run)
        nth = 1 + (landed - 1) % 2
        expected = before + every * (nth if moved else nth - 1)
        if expected < 24:  # the last save comes at 24, off the interval
            assert max(steps, default=0) == expected, (point, steps)
    for run in finish(tmp_path):
        left = [path.name for path in run.rglob(".tmp-*")]
        assert left in ([], [alive.name]), left
        assert digests(run) == uncut(system)[0]


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    write_recipe(tmp_path, "emp-ssl-free")
    assert train(tmp_path, hook="kill_in_save", values=["before rename", 2]).wait().code == -signal.SIGKILL
    run = open_run(tmp_path)
    assert run is not None
    checkpoints = run / "checkpoints"
    dead = [path.name for path in checkpoints.glob(".tmp-*")]
    assert len(dead) == 1
    live = checkpoints / _temp_name()
    live.mkdir()
    pid, start = os.getpid(), process_start(os.getpid()) or 0
    other_host = checkpoints / f".tmp-00000000-{pid}-{start}-00000000"
    other_host.mkdir()
    reused = checkpoints / live.name.replace(f"-{start}-", f"-{start + 1}-")
    reused.mkdir()
    assert train(tmp_path).wait().code == 0
    assert sorted(path.name for path in checkpoints.glob(".tmp-*")) == sorted([live.name, other_host.name])


def test_a_damaged_checkpoint_is_left_for_the_one_before(tmp_path: Path, uncut: Uncut) -> None:
    write_recipe(tmp_path, "emp-ssl-free")
    child = train(tmp_path)
    child.until(lambda: len(list(tmp_path.glob("runs/*/checkpoints/step-*"))) == 2)
    child.send(signal.SIGKILL)
    child.wait()
    run = open_run(tmp_path)
    assert run is not None
    newest = max((run / "checkpoints").glob("step-*"))
    damaged = newest / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = train(tmp_path).wait()
    assert done.code == 0, done
    assert "going back to step-" in done.err
    assert str(damaged) in done.err.replace("\n", "") or damaged.name in done.err
    assert digests(run) == uncut("emp-ssl-free")[0]
