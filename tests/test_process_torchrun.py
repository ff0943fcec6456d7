"""Two processes under torchrun: one run, one voice, equal heads and evaluations, one end when one of them ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from process import cfamc, environment
from tiny import recipe_text

pytestmark = pytest.mark.slow


@contextmanager
def torchrun(
    folder: Path, *words: str, command: str = "pretrain", launch: Sequence[str] = ("--nproc-per-node", "2")
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in 2 ranks, or as `launch` says; whatever is left of them at the end of the block is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", *launch, "--master-port", str(port)]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [*launcher, "-m", "cfamc_cli", command, *words],
            cwd=folder,
            env=environment(PYTHONWARNINGS="default", GLOO_SOCKET_IFNAME="lo"),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for pid in [*ranks(process), process.pid]:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def kill_one(launcher: subprocess.Popen[bytes], rank: int, folder: Path) -> None:
    """Kill a rank, and hold that the others and the launcher end by themselves, not well."""
    pids = ranks(launcher)
    os.kill(pids[rank], signal.SIGKILL)
    started = time.monotonic()
    while any(map(alive, pids)):
        assert time.monotonic() - started < 60, (folder / "err").read_text()
        time.sleep(0.05)
    assert launcher.wait(60) != 0


def ranks(launcher: subprocess.Popen[bytes]) -> list[int]:
    """The processes that train, by rank."""
    found = {}
    if not alive(launcher.pid):
        return []
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        try:
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")), None)
        if rank is not None:
            found[rank] = int(pid)
    return [found[rank] for rank in sorted(found)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: object, process: subprocess.Popen[bytes], folder: Path) -> None:
    limit = time.monotonic() + 120
    assert callable(condition)
    while not condition():
        assert process.poll() is None, (folder / "err").read_text()
        assert time.monotonic() < limit, (folder / "err").read_text()
        time.sleep(0.02)


def saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs/*/checkpoints/step-*/manifest.json"))


def prepare(folder: Path, *, epochs: float) -> None:
    (folder / "recipe.toml").write_text(recipe_text(epochs=epochs, every=2, log_every=2))


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def test_two_ranks_write_one_run_and_speak_once(tmp_path: Path) -> None:
    prepare(tmp_path, epochs=0.5)
    with torchrun(tmp_path, "recipe.toml", "--json") as process:
        assert process.wait(180) == 0, (tmp_path / "err").read_text()
    answer = json.loads((tmp_path / "out").read_text())
    run = only_run(tmp_path)
    assert (answer["id"], answer["status"]) == (run.name, "finished")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12]
    err = (tmp_path / "err").read_text()
    assert err.count("train 12/12") == 1
    assert err.count("trained 12 updates") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_saves_and_ends_both(rank: int, tmp_path: Path) -> None:
    prepare(tmp_path, epochs=2.0)
    with torchrun(tmp_path, "recipe.toml") as process:
        until(lambda: saved(tmp_path), process, tmp_path)
        pids = ranks(process)
        assert len(pids) == 2
        os.kill(pids[rank], signal.SIGTERM)
        started = time.monotonic()
        while any(map(alive, pids)):
            assert time.monotonic() - started < 30, (tmp_path / "err").read_text()
            time.sleep(0.05)
        process.wait(60)
    run = only_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "interrupted", (tmp_path / "err").read_text()
    stopped = record["progress"]["step"]
    assert f"step-{stopped:08d}" in {path.parent.name for path in saved(tmp_path)}
    assert not list(run.rglob(".tmp-*"))
    if rank == 0:
        return
    with torchrun(tmp_path, "--resume", run.name) as process:
        assert process.wait(180) == 0, (tmp_path / "err").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6, 49, 6))  # of one writer
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_9_of_one_rank_ends_the_other(rank: int, tmp_path: Path) -> None:
    prepare(tmp_path, epochs=8.0)
    with torchrun(tmp_path, "recipe.toml") as process:
        until(lambda: saved(tmp_path), process, tmp_path)
        kill_one(process, rank, tmp_path)
    run = only_run(tmp_path)
    assert saved(tmp_path)
    assert json.loads((run / "run.json").read_text())["status"] != "finished"
    if rank == 1:
        err = (tmp_path / "err").read_text()
        # it noticed by itself, or torchrun's SIGTERM came first, before or after it could say so
        assert any(text in err for text in ("another process of this run ended", "interrupted", "(SIGTERM)")), err


README = Path(__file__).parent.parent / "README.md"
SMALL = {  # the embedded images and a net of a few weights, but the recipe's batch; a setting for each command
    "pretrain": [
        *("data.dataset=fashion-mini", "data.limit=100", "train.epochs=1", "train.evaluate_every=0"),
        *("crops.0.count=2", "crops.0.size=16", "model.width=4", "model.hidden_dim=16", "model.embedding_dim=8"),
    ],
    "probe": [],
    "attack": [],
}


def test_every_torchrun_line_of_the_readme_runs(tmp_path: Path) -> None:
    lines = re.findall(r"torchrun ([^`\n]*?) -m cfamc_cli ([^`\n]+)", README.read_text(encoding="utf-8"))
    lines.sort(key=lambda line: not line[1].startswith("pretrain"))  # probes and attacks need a run
    for launch, rest in lines:
        command, *words = rest.replace("RUN", "latest").split()
        words += [word for setting in SMALL[command] for word in ("--set", setting)]
        words += ["--limit", "20"] if command == "attack" else []
        with torchrun(tmp_path, *words, "--device", "cpu", command=command, launch=launch.split()) as process:
            assert process.wait(400) == 0, (tmp_path / "err").read_text()
    (run, *_) = sorted((tmp_path / "runs").iterdir())
    record = json.loads((run / "run.json").read_text())
    processes = int(re.findall(r"--nproc-per-node[ =](\d+)", lines[0][0])[0])
    assert record["status"] == "finished"
    assert record["environment"]["computation"]["processes"] == processes


def test_images_that_cannot_be_read_are_told_once(tmp_path: Path) -> None:
    prepare(tmp_path, epochs=0.5)
    missing = ("--set", "data.dataset=cifar10", "--set", "data.root=nowhere", "--set", "data.limit=64")
    with torchrun(tmp_path, "recipe.toml", *missing) as process:
        assert process.wait(120) != 0
    err = (tmp_path / "err").read_text()
    assert err.count("does not hold") == 1, err  # the second process did not look
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run whose encoder tells some classes apart."""
    folder = tmp_path_factory.mktemp("trained")
    prepare(folder, epochs=0.25)
    done = cfamc("pretrain", "recipe.toml", "--set", "optimizer.lr=0.01", cwd=folder)
    assert done.code == 0, done.err
    return folder


def of_attack(run: Path) -> dict[str, object]:
    """What an evaluation left, without its times."""
    (folder,) = (run / "attacks").iterdir()
    record = json.loads((folder / "record.json").read_text())
    for part in (record, *record["stages"]):
        del part["wall_seconds"]
    del record["created"], record["sha256"], record["environment"]["computation"]["processes"]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("timing.jsonl", "lock")}
    return files | {"record.json": record}


def of_probe(run: Path, name: str) -> tuple[dict[str, object], bytes]:
    record = json.loads((run / "probes" / name / "record.json").read_text())
    del record["created"], record["wall_seconds"], record["sha256"], record["environment"]["computation"]["processes"]
    return record, (run / "probes" / name / "head.safetensors").read_bytes()


PGD = ("--attack", "pgd", "--steps", "3", "--eps", "8/255", "--limit", "600", "--save-examples", "10")


def test_heads_and_evaluations_of_two_ranks_are_those_of_one_process(trained: Path, tmp_path: Path) -> None:
    crops = ("--head", "crops", "--crops", "3", "--epochs", "2")
    runs = [Path(shutil.copytree(trained / "runs", tmp_path / name)) for name in ("alone", "shared")]
    alone, shared = (next(store.iterdir()) for store in runs)
    for command, words in (("attack", PGD), ("probe", crops)):
        assert cfamc(command, *words, "--runs", str(runs[0]), cwd=tmp_path).code == 0
        with torchrun(tmp_path, *words, "--runs", str(runs[1]), "--json", command=command) as process:
            assert process.wait(180) == 0, (tmp_path / "err").read_text()
        json.loads((tmp_path / "out").read_text())  # of one voice
    assert of_attack(shared) == of_attack(alone)
    assert len(list((shared / "probes").iterdir())) == 2
    for name in ("linear-001", "crops-001"):
        assert of_probe(shared, name) == of_probe(alone, name)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_evaluation_goes_on_after_kill_9_of_one_rank(rank: int, trained: Path, tmp_path: Path) -> None:
    """Two ranks begin it; after the end of rank 0 two go on, after that of rank 1 one process does."""
    words = ("--attack", "pgd", "--steps", "150", "--step-size", "0.001", "--eps", "2/255", "--limit", "600")
    whole, cut = (Path(shutil.copytree(trained / "runs", tmp_path / name)) for name in ("whole", "cut"))
    run = next(cut.iterdir())

    def stages() -> int:
        """Those that are committed: a kill may fall between the line of a stage's time and its outcome."""
        stored = [json.loads(path.read_text()) for path in run.glob("attacks/*/outcomes.json")]
        return sum(len(part["passes"]) for one in stored for part in (one["predictions"], *one["stages"]) if part)

    with torchrun(tmp_path, *words, "--runs", str(cut), command="attack") as process:
        until(lambda: stages() >= 2, process, tmp_path)
        kill_one(process, rank, tmp_path)
    assert 2 <= (kept := stages()) < 6
    assert not list(run.glob("attacks/*/record.json"))
    if rank == 0:
        with torchrun(tmp_path, *words, "--runs", str(cut), command="attack") as process:
            assert process.wait(180) == 0, (tmp_path / "err").read_text()
        said = (tmp_path / "err").read_text()
    else:
        done = cfamc("attack", *words, "--runs", str(cut), cwd=tmp_path)
        assert done.code == 0, done.err
        said = done.err
    assert said.count(f"goes on from {kept} finished stages") == 1
    assert cfamc("attack", *words, "--runs", str(whole), cwd=tmp_path).code == 0
    assert of_attack(run) == of_attack(next(whole.iterdir()))
