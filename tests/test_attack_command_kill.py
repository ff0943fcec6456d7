"""`kill -9` and SIGTERM while an evaluation runs: what is resumed equals what was never cut."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from process import Warm
from tiny import recipe_text

pytestmark = pytest.mark.slow

# three blocks of two stages for each of two radii
COMMAND = (
    "attack",
    "--save-examples",
    "5",
    "--runs",
    "runs",
    "--eps",
    "1/255",
    "--eps",
    "4/255",
    "--steps",
    "5",
    "--limit",
    "600",
)


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    parent = Warm()
    yield parent
    parent.close()


@pytest.fixture(scope="module")
def home(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its head and no evaluation."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.toml").write_text(recipe_text() + '[probe]\nhead = "linear"\nprotocol = "converged"\n')
    for arguments in (("pretrain", "tiny.toml"), ("probe",)):
        done = warm.run(*arguments, "--runs", "runs", cwd=folder, seconds=300)
        assert done.code == 0, done.err
    return folder


def clear(home: Path) -> None:
    shutil.rmtree(attacks(home), ignore_errors=True)


def attacks(home: Path) -> Path:
    (run,) = (home / "runs").iterdir()
    return run / "attacks"


def kept(home: Path) -> dict[str, str]:
    """Every file of the evaluations, the records without their times; times have a file of their own."""
    files = {}
    for path in sorted(attacks(home).rglob("*")):
        if path.is_dir() or path.name == "timing.jsonl":
            continue
        text = path.read_bytes().decode("latin-1")
        if path.name == "record.json":
            record = json.loads(text)
            del record["environment"], record["sha256"]
            text = re.sub(r'"(created|wall_seconds)": ("[^"]*"|[0-9.e-]+)', "", json.dumps(record))
        files[str(path.relative_to(attacks(home)))] = text
    return files


def test_killed_at_random_moments_and_resumed_equals_uncut(warm: Warm, home: Path) -> None:
    clear(home)
    began = time.monotonic()
    done = warm.run(*COMMAND, cwd=home, seconds=600)
    seconds = time.monotonic() - began
    assert done.code == 0, done.err
    uncut = kept(home)
    assert {"pgd-001/outcomes.json", "pgd-001/record.json", "pgd-001/examples.png"} <= uncut.keys()
    moments = random.Random(0)
    kills = 0
    clear(home)
    while kills < 20:
        child = warm.start(*COMMAND, cwd=home)
        time.sleep(moments.uniform(0.02, 0.6) * seconds)
        child.send(signal.SIGKILL)
        done = child.wait()
        assert done.code in (0, -signal.SIGKILL), done.err
        kills += done.code != 0
        if done.code == 0:  # it got to its end: that is compared as well, and begun again
            assert kept(home) == uncut
            clear(home)
    done = warm.run(*COMMAND, cwd=home, seconds=600)
    assert done.code == 0, done.err
    assert kept(home) == uncut
    assert not list(attacks(home).rglob(".*"))  # nor is anything left lying about


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heeded_at_once_and_costs_nothing(warm: Warm, home: Path, number: signal.Signals) -> None:
    clear(home)
    child = warm.start(*COMMAND, "--json", cwd=home)
    child.until(lambda: attacks(home).is_dir() and any(attacks(home).glob("*/timing.jsonl")), 300)
    child.send(number)
    began = time.monotonic()
    done = child.wait(60)
    assert time.monotonic() - began < 10
    assert done.code == 128 + number
    assert done.answer["error"]["hint"] == "go on with the same command"
    assert warm.run(*COMMAND, cwd=home, seconds=600).code == 0


def test_two_equal_attacks_at_once_do_the_work_once(warm: Warm, home: Path, tmp_path: Path) -> None:
    """The head as well, which both find missing; who comes second waits for it, and is told of the evaluation."""
    shutil.copytree(home / "runs", tmp_path / "runs")
    (run,) = (tmp_path / "runs").iterdir()
    for made in ("probes", "attacks"):
        shutil.rmtree(run / made, ignore_errors=True)
    both = [warm.start(*COMMAND, cwd=tmp_path) for _ in range(2)]
    done = sorted((child.wait(600) for child in both), key=lambda one: one.code)
    assert [one.code for one in done] in ([0, 0], [0, 6]), done
    if done[1].code == 6:
        assert "is held by process" in done[1].err
    assert [path.name for path in (run / "probes").iterdir()] == ["linear-001"]
    assert sorted(path.name for path in attacks(tmp_path).iterdir()) == ["pgd-001", "pgd-002"]  # one of each eps
    eps = {json.loads(path.read_text())["threat"]["eps"] for path in attacks(tmp_path).glob("*/record.json")}
    assert eps == {"1/255", "4/255"}
