"""What a run is from outside: its files, its exit codes, its lock, and what it has in common with another."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_inputs import uniform
from PIL import Image
from process import Child, Done, cfamc, warm
from tiny import recipe_text

TINY = ("--set", "train.epochs=0.25")  # two batches


def write_recipe(folder: Path, **settings: Any) -> None:
    (folder / "recipe.toml").write_text(recipe_text(**settings))


def train(folder: Path, *words: str, **settings: Any) -> Done:
    """Train in a forked process."""
    if not (folder / "recipe.toml").exists():
        write_recipe(folder)
    return warm().run("pretrain", "recipe.toml", *words, cwd=folder, **settings)


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def record(run: Path) -> dict[str, Any]:
    value = json.loads((run / "run.json").read_text())
    assert isinstance(value, dict)
    assert value.popitem()[0] == "sha256"  # of the rest, in the file alone
    return value


def untimed(run: Path) -> dict[str, object]:
    """All that a run wrote, without times, rates and its id."""
    found: dict[str, object] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if name == "run.json":
            dropped = ("id", "created", "updated", "wall_seconds")
            found[name] = {key: value for key, value in record(run).items() if key not in dropped}
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            del manifest["progress"]["positions"]["timing.jsonl"]
            manifest.pop("sha256", None)  # of all the rest
            found[name] = manifest
        elif name == "timing.jsonl":
            found[name] = [sorted(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


def test_the_exact_files_of_a_run(tmp_path: Path) -> None:
    write_recipe(tmp_path, every=1)
    done = train(tmp_path, "--set", "train.epochs=0.375", "--set", "train.keep=2")
    assert done.code == 0, done
    run = only_run(tmp_path)
    assert done.out == f"{run.name}\n"
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) == [
        "checkpoints/step-00000006/manifest.json",
        "checkpoints/step-00000006/model.safetensors",
        "checkpoints/step-00000006/state.safetensors",
        "checkpoints/step-00000009/manifest.json",
        "checkpoints/step-00000009/model.safetensors",
        "checkpoints/step-00000009/state.safetensors",
        "metrics.jsonl",
        "recipe.toml",
        "resolved.json",
        "run.json",
        "timing.jsonl",
    ]
    kept = record(run)
    assert (kept["status"], kept["id"], kept["failure"]) == ("finished", run.name, None)
    assert kept["progress"] == {"batch": 3, "step": 9, "epoch": 0.375, "total": 9}
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["recipe.toml", "runs"]
    lines = done.err.splitlines()
    assert lines[-2].startswith("trained 9 updates in ")
    assert lines[-1] == f"next: cfamc attack {run.name} --eps 8/255"


def test_json_prints_the_record(tmp_path: Path) -> None:
    done = train(tmp_path, *TINY, "--json", "--quiet")
    assert done.code == 0, done
    assert done.err == ""
    assert done.answer == record(only_run(tmp_path))


@pytest.mark.slow
def test_one_run_per_seed(tmp_path: Path) -> None:
    done = train(tmp_path, *TINY, "--seeds", "0,1", "--quiet")
    assert done.code == 0, done
    records = [record(tmp_path / "runs" / name) for name in done.out.split()]
    assert [kept["seed"] for kept in records] == [0, 1]
    assert len({kept["recipe_digest"] for kept in records}) == 1
    both = train(tmp_path, *TINY, "--seeds", "3,4", "--json").answer["runs"]
    assert [kept["seed"] for kept in both] == [3, 4]


def test_the_same_seed_writes_the_same_and_another_does_not(tmp_path: Path) -> None:
    settings = {
        "one": {"LC_ALL": "C", "LANG": "C", "TZ": "Asia/Tokyo"},
        "two": {"LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", "TZ": "UTC"},
    }
    for name, env in settings.items():
        (tmp_path / name).mkdir()
        assert train(tmp_path / name, *TINY, env=env).code == 0
    one, two = (untimed(only_run(tmp_path / name)) for name in settings)
    assert one == two
    assert len(one) == 11
    (tmp_path / "three").mkdir()
    assert train(tmp_path / "three", *TINY, "--seed", "1").code == 0
    three = untimed(only_run(tmp_path / "three"))
    assert three.keys() == one.keys()
    for name in ("metrics.jsonl", "checkpoints/step-00000006/model.safetensors", "resolved.json"):
        assert three[name] != one[name]


@pytest.mark.slow
def test_a_whole_process_with_another_hash_seed_writes_the_same(tmp_path: Path) -> None:
    (tmp_path / "forked").mkdir()
    assert train(tmp_path / "forked", *TINY).code == 0
    for name, env in {"one": {"PYTHONHASHSEED": "1", "LC_ALL": "C"}, "two": {"PYTHONHASHSEED": "2"}}.items():
        (tmp_path / name).mkdir()
        write_recipe(tmp_path / name)
        done = cfamc("pretrain", "recipe.toml", *TINY, cwd=tmp_path / name, env=env)
        assert done.code == 0, done
        assert untimed(only_run(tmp_path / name)) == untimed(only_run(tmp_path / "forked"))


def killed_in_its_fourth_update(folder: Path) -> Path:
    """A run of the folder's recipe, killed while its fourth loss is computed."""
    flag = folder / "flag"
    child = warm().start("pretrain", "recipe.toml", cwd=folder, hook="wait_in_loss", values=[str(flag), 4, 60])
    child.until(flag.exists)
    child.send(signal.SIGKILL)
    child.wait()
    return only_run(folder)


def test_a_changed_recipe_is_not_resumed(tmp_path: Path) -> None:
    write_recipe(tmp_path, every=1)
    run = killed_in_its_fourth_update(tmp_path)
    before = record(run)
    done = train(tmp_path, "--resume", run.name, "--set", "optimizer.lr=0.1", "--set", "crops.0.count=8", "--json")
    assert done.code == 2
    error = done.answer["error"]
    assert error["differing"] == ["crops.0.count", "optimizer.lr"]
    assert "crops.0.count, optimizer.lr" in error["message"]
    assert record(run) == before
    bad = warm().run("pretrain", "--resume", run.name, "--seed", "1", "--json", cwd=tmp_path)
    assert bad.code == 2, bad
    assert train(tmp_path, "--resume", run.name, "--dry-run").code == 2
    assert train(tmp_path, "--resume", "latest", "--device", "cpu", "--quiet").code == 0  # where, not what
    again = train(tmp_path, "--resume", run.name)
    assert again.code == 2
    assert "is finished" in again.err


def test_what_was_changed_in_a_cut_run_is_not_gone_on_from(tmp_path: Path) -> None:
    """Lines of metrics before the checkpoint, either recipe or its seed; the run goes on once the file is back."""
    write_recipe(tmp_path, every=1, log_every=1)
    run = killed_in_its_fourth_update(tmp_path)
    for name, old, new in (
        ("metrics.jsonl", b'"loss":', b'"lost":'),
        ("metrics.jsonl", b'"lr":0', b'"lr":1'),
        ("recipe.toml", b"\nlr = 0.3", b"\nlr = 0.2"),
        ("recipe.toml", b"\nseed = 0", b"\nseed = 1"),
        ("resolved.json", b'"lr": 0.3', b'"lr": 0.2'),
        ("resolved.json", b'"seed": 0', b'"seed": 1'),
    ):
        whole = (run / name).read_bytes()
        assert old in whole, (name, old)
        (run / name).write_bytes(whole.replace(old, new, 1))
        refused = warm().run("pretrain", "--resume", run.name, "--json", cwd=tmp_path)
        assert refused.code == 4, refused
        assert str(Path("runs", run.name, name)) in refused.answer["error"]["message"]
        (run / name).write_bytes(whole)
    assert warm().run("pretrain", "--resume", run.name, "--quiet", cwd=tmp_path).code == 0


def test_a_resumed_run_takes_what_may_change(tmp_path: Path) -> None:
    write_recipe(tmp_path, every=1)
    flag = tmp_path / "flag"
    child = warm().start("pretrain", "recipe.toml", cwd=tmp_path, hook="wait_in_loss", values=[str(flag), 4, 60])
    child.until(flag.exists)
    child.send(signal.SIGKILL)
    child.wait()
    done = train(tmp_path, "--resume", "latest", "--set", "train.keep=1", "--set", "train.log_every=3")
    assert done.code == 0, done
    assert len(list((only_run(tmp_path) / "checkpoints").iterdir())) == 1


def test_the_next_command_is_typed_in_the_same_place(tmp_path: Path) -> None:
    store = tmp_path / "elsewhere" / "store"
    done = train(tmp_path, *TINY, "--runs", str(store))
    assert done.code == 0, done
    assert done.err.splitlines()[-1] == f"next: cfamc attack {store / done.out.strip()} --eps 8/255"


def test_a_run_starts_from_the_newest_run_before_it(tmp_path: Path) -> None:
    first = train(tmp_path, *TINY).out.strip()
    second = train(tmp_path, *TINY, "--set", "train.init=latest")
    assert second.code == 0, second
    assert f"starts from the encoder of {first}, step-00000006" in second.err
    run = tmp_path / "runs" / second.out.strip()
    assert record(run)["init"] == first
    assert json.loads((run / "resolved.json").read_text())["train"]["init"] == first
    other = train(tmp_path, *TINY, "--set", "train.init=latest", "--set", "model.width=16", "--json")
    assert other.code == 4, other
    message = other.answer["error"]["message"]
    assert (
        "backbone.conv1.weight is torch.float32 (8, 3, 3, 3) where torch.float32 (16, 3, 3, 3) is expected" in message
    )
    assert len(list((tmp_path / "runs").iterdir())) == 2  # none was made for nothing


def test_a_run_goes_on_from_another_folder(tmp_path: Path) -> None:
    for index in range(16):
        path = tmp_path / "images" / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (uniform(16, 16, 3, key=f"image {index}") * 256).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    write_recipe(tmp_path, every=1)
    flag = tmp_path / "flag"
    words = ("pretrain", "recipe.toml", "--set", 'data={dataset="folder", root="images"}')
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    child = warm().start(*words, cwd=tmp_path, env=cache, hook="wait_in_loss", values=[str(flag), 4, 60])
    child.until(flag.exists)
    child.send(signal.SIGKILL)
    child.wait()
    (tmp_path / "elsewhere").mkdir()
    done = warm().run("pretrain", "--resume", str(only_run(tmp_path)), cwd=tmp_path / "elsewhere", env=cache)
    assert done.code == 0, done


def test_a_run_has_one_owner(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    flag = tmp_path / "flag"
    child = warm().start("pretrain", "recipe.toml", cwd=tmp_path, hook="wait_in_loss", values=[str(flag), 4, 60])
    child.until(flag.exists)
    run = only_run(tmp_path)
    before = record(run)
    assert before["status"] == "running"
    second = warm().run("pretrain", "--resume", "latest", "--json", cwd=tmp_path)
    assert second.code == 6, second
    error = second.answer["error"]
    assert f"process {child.pid} on {os.uname().nodename}" in error["message"]
    assert error["run"] == run.name
    assert record(run) == before
    child.send(signal.SIGKILL)
    child.wait()
    assert (run / ".lock").exists()  # of a dead process: no lock
    assert warm().run("pretrain", "--resume", "latest", "--quiet", cwd=tmp_path).code == 0


# Failures


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite(value: str, tmp_path: Path) -> None:
    write_recipe(tmp_path, every=1, log_every=8)
    done = train(tmp_path, "--json", hook="nan_at", values=[7, value])
    assert done.code == 3, done
    run = only_run(tmp_path)
    kept = record(run)
    assert kept["status"] == "diverged"
    failure = kept["failure"]
    assert (failure["step"], failure["batch"], failure["exit_code"]) == (7, 2, 3)
    assert failure["lr"] > 0
    assert (failure["loss"], failure["gradient_norm"]) == (None, None)
    error = done.answer["error"]
    assert (error["step"], error["batch"], error["run"], error["exit_code"]) == (7, 2, run.name, 3)
    assert error["lr"] == failure["lr"]
    assert value in error["loss"]
    assert "nan" in error["gradient_norm"] or "inf" in error["gradient_norm"]
    assert "non-finite at update 7" in done.err
    assert "Traceback" not in done.err
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert not (run / "metrics.jsonl").read_text()  # nothing poisoned, and no interval was full
    assert train(tmp_path, "--resume", "latest", "--quiet").code == 0  # without the fault, it goes on
    assert (record(run)["status"], record(run)["failure"]) == ("finished", None)


@pytest.mark.parametrize(
    "kind", ["cpu", pytest.param("cuda", marks=pytest.mark.slow), pytest.param("python", marks=pytest.mark.slow)]
)
def test_out_of_memory(kind: str, tmp_path: Path) -> None:
    write_recipe(tmp_path, every=1)
    done = train(tmp_path, "--json", hook="out_of_memory_at", values=[4, kind])
    assert done.code == 1, done
    error = done.answer["error"]
    assert error["message"].startswith("out of memory")
    assert "train.batch_size" in error["hint"]
    assert "Traceback" not in done.err
    run = only_run(tmp_path)
    assert (record(run)["status"], record(run)["failure"]["exit_code"]) == ("failed", 1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [0, 2**20])
def test_an_address_space_limit(extra: int, tmp_path: Path) -> None:
    # Quiet, for a forecast leaves behind buffers that are enough for a training as tiny.
    done = train(tmp_path, "--json", "--quiet", hook="limit_memory", values=[extra])
    assert done.code == 1, done
    assert done.answer["error"]["message"].startswith("out of memory"), done
    assert record(only_run(tmp_path))["status"] == "failed"
    assert not list(only_run(tmp_path).rglob(".tmp-*"))


def test_a_defect_is_told_as_one(tmp_path: Path) -> None:
    done = train(tmp_path, "--json", hook="defect_at", values=[1])
    assert done.code == 1, done
    assert "ZeroDivisionError: a defect" in done.answer["error"]["message"]
    assert "Traceback" in done.err
    assert record(only_run(tmp_path))["status"] == "failed"


def test_data_and_places_that_cannot_be_used(tmp_path: Path) -> None:
    missing = train(tmp_path, "--set", 'data={dataset="folder", root="missing"}', "--json")
    assert missing.code == 4, missing
    assert "missing" in missing.answer["error"]["message"]
    (tmp_path / "file").touch()
    blocked = train(tmp_path, "--runs", "file", "--json")
    assert blocked.code == 1, blocked
    assert "file" in blocked.answer["error"]["message"]
    unknown = train(tmp_path, "--resume", "nothing", "--json")
    assert unknown.code == 2, unknown
    device = train(tmp_path, "--device", "abacus", "--json")
    assert device.code == 2, device
    nowhere = train(tmp_path, "--device", "meta", "--json")
    assert nowhere.code == 2, nowhere
    init = train(tmp_path, "--set", "train.init=nowhere", "--json")
    assert init.code == 2, init
    assert not (tmp_path / "runs").exists()  # none of these made a run for nothing
    (tmp_path / "runs" / "20260101-000000-tiny-000000").mkdir(
        parents=True
    )  # of a process that was killed in its first moment
    unborn = train(tmp_path, "--resume", "20260101", "--json")
    assert unborn.code == 4, unborn
    alone = train(tmp_path, "--json", env={"RANK": "0", "WORLD_SIZE": "2"})
    assert alone.code == 1, alone
    assert "torchrun" in alone.answer["error"]["hint"]
    odd = train(tmp_path, "--json", env={"RANK": "0", "WORLD_SIZE": "several"})
    assert odd.code == 1, odd
    for done in (missing, blocked, unknown, device, nowhere, init, unborn, alone, odd):
        assert "Traceback" not in done.err


# Terminals


def test_nothing_is_left_of_a_closed_stream(tmp_path: Path) -> None:
    for closed in ([0], [1], [2], [0, 1, 2]):
        folder = tmp_path / "".join(map(str, closed))
        folder.mkdir()
        done = train(folder, *TINY, closed=closed)
        assert done.code == 0, done
        assert "Traceback" not in done.err
        assert (done.out == "") == (1 in closed)
        run = only_run(folder)
        assert record(run)["status"] == "finished"
        for path in (run / "metrics.jsonl", run / "run.json"):
            assert b"trained 6 updates" not in path.read_bytes()  # no talk in the files that took the numbers


@pytest.mark.parametrize(
    ("env", "live"),
    [
        ({"TERM": "xterm-256color", "COLUMNS": "20"}, True),
        pytest.param({"TERM": "dumb"}, False, marks=pytest.mark.slow),
        pytest.param({"TERM": "xterm", "NO_COLOR": "1"}, True, marks=pytest.mark.slow),
    ],
)
def test_on_a_terminal(env: dict[str, str], live: bool, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                shown.append(os.read(master, 4096))
            except OSError:  # nobody is left on the other side
                return

    reader = threading.Thread(target=read)
    reader.start()
    child: Child = warm().start(
        "pretrain", write_and_name(tmp_path), *TINY, "--json", cwd=tmp_path, env=env, terminal=os.ttyname(slave)
    )
    done = child.wait()
    os.close(slave)
    reader.join(10)
    os.close(master)
    text = b"".join(shown).decode()
    assert done.code == 0, text
    assert done.answer["status"] == "finished"
    assert "Traceback" not in text
    assert "trained 6 updates" in " ".join(text.split())
    assert ("\x1b[" in text) == live
    if "NO_COLOR" in env:
        assert "\x1b[1;3" not in text


def write_and_name(folder: Path) -> str:
    write_recipe(folder)
    return "recipe.toml"


@pytest.mark.parametrize("home", ["missing", pytest.param("unset", marks=pytest.mark.slow)])
def test_without_a_home(home: str, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    env = {"HOME": "/proc/none", "XDG_CACHE_HOME": "", "LANG": "C"} if home == "missing" else {"HOME": ""}
    done = train(tmp_path, *TINY, env=env)
    assert done.code == 0, done
    assert "Traceback" not in done.err


# What must not get in or out


def secrets() -> dict[str, str]:
    names = [
        f"{service}_{kind}"
        for service in ("AWS", "HF", "WANDB", "GITHUB", "OPENAI", "SMTP")
        for kind in ("TOKEN", "SECRET_KEY", "PASSWORD", "API_KEY", "CREDENTIALS")
    ]
    return {name: f"s3cr3t-{index:02d}-{name.lower()}" for index, name in enumerate(names)}


def assert_clean(folder: Path, done: Done, words: list[str]) -> None:
    texts = [done.out.encode(), done.err.encode()]
    texts += [path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()]
    for word in words:
        assert not any(word.encode() in text for text in texts), word


def test_no_secret_of_the_environment_is_kept(tmp_path: Path) -> None:
    assert len(secrets()) == 30
    done = train(tmp_path, *TINY, "--json", env=secrets())
    assert done.code == 0, done
    assert_clean(tmp_path, done, ["s3cr3t"])
    shutil.rmtree(tmp_path / "runs")
    failed = train(tmp_path, *TINY, "--json", env=secrets(), hook="defect_at", values=[1])
    assert failed.code == 1, failed
    assert_clean(tmp_path, failed, ["s3cr3t"])


@pytest.mark.slow
def test_no_credentials_of_the_checkout_are_kept(tmp_path: Path) -> None:
    import cfamc_cli

    package = Path(cfamc_cli.__file__).parent
    shutil.copytree(package, tmp_path / "cfamc_cli", ignore=shutil.ignore_patterns("__pycache__"))

    def git(*words: str) -> str:
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    git("add", "cfamc_cli/__init__.py")
    git("commit", "--quiet", "-m", "one")
    git("remote", "add", "origin", "https://someone:s3cr3t-remote@example.org/x.git")
    write_recipe(tmp_path)
    done = cfamc("pretrain", "recipe.toml", *TINY, cwd=tmp_path, env=secrets())
    assert done.code == 0, done
    assert record(only_run(tmp_path))["environment"]["git_revision"] == git("rev-parse", "HEAD").strip()
    assert_clean(tmp_path, done, ["s3cr3t", "someone", "example.org"])


def test_no_socket_is_opened(tmp_path: Path) -> None:
    done = train(tmp_path, *TINY, hook="no_sockets")
    assert done.code == 0, done


@pytest.mark.slow
def test_it_works_without_a_network(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("no network namespaces here")
    write_recipe(tmp_path)
    done = cfamc("pretrain", "recipe.toml", *TINY, cwd=tmp_path, prefix=["unshare", "-rn"])
    assert done.code == 0, done
