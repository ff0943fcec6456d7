from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import data_used, probe_record, run_record, tiny_recipe, write_record

from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.store import files
from cfamc_cli.store import runs as store
from cfamc_cli.store.runs import RunFolder

NOON = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
HOSTILE = ["../../x", "a\0b", "\x1b[31mred", "[bold]x", "=HYPERLINK(1)", "<script>", "x" * 10**6, "ünï", "..", "", "."]


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "run.json").write_text("{}")


@given(st.text())
def test_a_slug_is_a_plain_file_name(name: str) -> None:
    text = store.slug(name)
    assert 1 <= len(text) <= 48
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not text.startswith("-")
    assert not text.endswith("-")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_never_leaves_its_store(tmp_path: Path, name: str) -> None:
    run = store.create_run(tmp_path / "deep" / "runs", name, seed=0, now=NOON)
    assert run.path.parent == tmp_path / "deep" / "runs"
    assert run.path.is_dir()
    assert store.list_runs(tmp_path / "deep" / "runs") == [run]


def test_ids_tell_the_time_in_utc(tmp_path: Path) -> None:
    run = store.create_run(tmp_path, "CIFAR-10 CF", seed=0, now=NOON.astimezone(timezone(timedelta(hours=5))))
    assert run.id.startswith("20261122-120000-cifar-10-cf-")
    assert store.slug("ünï café") == "uni-cafe"


def test_the_store_is_chosen_by_flag_then_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CFAMC_RUNS", raising=False)
    assert store.default_store(None) == Path("runs")
    monkeypatch.setenv("CFAMC_RUNS", "")
    assert store.default_store(None) == Path("runs")
    monkeypatch.setenv("CFAMC_RUNS", "/other")
    assert store.default_store(None) == Path("/other")
    assert store.default_store(tmp_path) == tmp_path


def create_at(folder: Path, barrier: multiprocessing.synchronize.Barrier) -> None:
    barrier.wait(timeout=60)
    store.create_run(folder, "same", seed=0, now=NOON)
    store.new_item(folder / "probes", "linear")


def test_64_processes_in_one_second_get_64_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(64)
    processes = [context.Process(target=create_at, args=(tmp_path / "runs", barrier)) for _ in range(64)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 64
    runs = [run for run in store.list_runs(tmp_path / "runs") if run.id != "probes"]
    assert len(runs) == 64
    assert sorted(path.name for path in (tmp_path / "runs" / "probes").iterdir()) == [
        f"linear-{number:03d}" for number in range(1, 65)
    ]


def test_ids_that_collide_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["aaaaaa", "aaaaaa", "bbbbbb"])
    monkeypatch.setattr("secrets.token_hex", lambda size: next(drawn))
    ids = [store.create_run(tmp_path, "a", seed=0, now=NOON).id[-6:] for _ in range(2)]
    assert ids == ["aaaaaa", "bbbbbb"]


def test_items_count_up_by_kind(tmp_path: Path) -> None:
    made = [store.new_item(tmp_path / "attacks", kind).name for kind in ("pgd", "pgd", "autoattack", "../x")]
    assert made == ["pgd-001", "pgd-002", "autoattack-001", "x-001"]


A, B, C = "20261122-120000-a-000001", "20261122-120000-b-000002", "20261123-120000-c-000003"


def test_runs_are_found_by_path_id_prefix_and_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "runs", A, B, C, "renamed")
    (tmp_path / "runs" / ".hidden").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "runs" / B)
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    for reference, expected in [
        (A, A),
        (A[:-2], A),
        ("20261123", C),
        ("latest", C),
        ("renamed", "renamed"),
        ("ren", "renamed"),
        (f"runs/{B}", B),
        (str(tmp_path / "runs" / B), B),
        ("link", B),
        ("000002", B),
        ("b", B),
        ("b-000002", B),
    ]:
        assert store.find_run(runs, reference).id == expected
    assert store.find_run(runs, "latest", accept=lambda run: "-a-" in run.id).id == A
    monkeypatch.chdir(tmp_path / "runs" / A)
    assert store.find_run(Path("nowhere"), ".").id == A
    with pytest.raises(CfamcError, match="no run ''"):
        store.find_run(Path("nowhere"), "")


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("2026", r"'2026' means 3 runs in .*runs", f"one of: {A}, {B}, {C}"),
        ("zzz", r"no run 'zzz' in .*runs", f"newest: {C}, {B}, {A}"),
        ("", r"no run '' in ", "newest: "),
        ("./empty", r"empty is no run: it holds no run.json", ""),
        ("../../x", r"no run '\.\./\.\./x'", "newest: "),
        ("a\0b", r"no run 'a\\x00b'", "newest: "),
        ("n" * 300, r"no run 'nnn", "newest: "),
        ("loop", "no run 'loop'", "newest: "),
    ],
)
def test_what_is_not_found_lists_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, message: str, hint: str
) -> None:
    make(tmp_path / "runs", A, B, C)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "runs" / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CfamcError, match=message) as caught:
        store.find_run(tmp_path / "runs", reference)
    assert caught.value.exit_code == ExitCode.INVALID
    assert caught.value.hint.startswith(hint)


def test_a_store_without_runs_says_so(tmp_path: Path) -> None:
    with pytest.raises(CfamcError, match=r"no run in .*missing") as caught:
        store.find_run(tmp_path / "missing", "latest")
    assert "cfamc pretrain" in caught.value.hint
    make(tmp_path, A)
    with pytest.raises(CfamcError, match="none of the 1 runs fits"):
        store.find_run(tmp_path, "latest", accept=lambda run: False)


def test_ten_thousand_runs_are_listed_at_once(tmp_path: Path) -> None:
    for number in range(10_000):
        (tmp_path / f"20261122-120000-a-{number:06x}").mkdir()
    start = time.process_time()
    runs = store.list_runs(tmp_path)
    found = store.find_run(tmp_path, "latest", accept=lambda run: True)
    assert time.process_time() - start < 2
    assert len(runs) == 10_000
    assert found.path == runs[-1].path


HOLD = """
    import sys, time
    from pathlib import Path
    from cfamc_cli.store.runs import RunFolder, lock
    with lock(RunFolder(Path(sys.argv[1]))):
        print("held", flush=True)
        time.sleep(60)
"""


@contextmanager
def holding(run: RunFolder, code: str = HOLD) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(code), str(run.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_live_process_holds_its_run_and_a_dead_one_does_not(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with holding(run) as process:
        with pytest.raises(CfamcError, match=rf"is held by process {process.pid} on \S+ since 20") as caught:
            store.lock(run).__enter__()
        assert caught.value.exit_code == ExitCode.LOCKED
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / ".lock").exists()
        with store.lock(run):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_has_not_written_its_name_yet_is_not_called_by_a_dead_ones(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with holding(run):
        (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid, "since": "2026"}))
        with pytest.raises(CfamcError, match="is held by another process"):
            store.lock(run).__enter__()


def look_in_turn(folder: Path) -> None:
    """Note who had to be waited for, and then what is there."""
    store._held.clear()  # those of the process that this one was forked from
    with store.turn(folder, wait=lambda text: files.write_text(folder / f"waited-{os.getpid()}", text)):
        files.write_text(folder / f"found-{os.getpid()}", str(folder.joinpath("item").exists()))


def test_who_waits_for_its_turn_finds_what_was_begun_meanwhile(tmp_path: Path) -> None:
    folder, context = tmp_path / "attacks", multiprocessing.get_context("fork")
    processes = [context.Process(target=look_in_turn, args=(folder,)) for _ in range(3)]
    with store.turn(folder, wait=pytest.fail):
        for process in processes:
            process.start()
        until = time.monotonic() + 60
        while len(waited := list(folder.glob("waited-*"))) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        told = [path.read_text() for path in waited]  # one that comes before another is waited for too
        (folder / "item").mkdir()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [f"is held by process {os.getpid()} on" in text for text in told] == [True] * 3
    assert [path.read_text() for path in folder.glob("found-*")] == ["True"] * 3
    assert not (folder / ".lock").exists()


def test_a_child_that_outlives_its_parent_does_not_hold_the_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    code = """
        import os, sys, time
        from pathlib import Path
        from cfamc_cli.store.runs import RunFolder, lock
        with lock(RunFolder(Path(sys.argv[1]))):
            if os.fork() == 0:
                os.close(1)
                time.sleep(3)
                os._exit(0)
            print("held", flush=True)
            time.sleep(60)
    """
    with holding(run, code) as process:
        process.kill()
        process.wait()
        with store.lock(run):
            pass


def test_one_process_does_not_hold_a_run_twice(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    run = RunFolder(tmp_path / "run")
    with store.lock(run):
        for path in (tmp_path / "run", tmp_path / "link"):
            with pytest.raises(CfamcError, match="is held by this process"):
                store.lock(RunFolder(path)).__enter__()
    with pytest.raises(KeyError), store.lock(run):
        raise KeyError
    with store.lock(run):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x1b[31m"])
def test_a_lock_file_without_a_holder_is_no_lock(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    with store.lock(RunFolder(tmp_path)):
        pass


def take_turns(path: Path, rounds: int) -> None:
    """Count up in a file that only the holder of the lock may touch."""
    done = 0
    while done < rounds:
        try:
            with store.lock(RunFolder(path)):
                value = int((path / "n").read_text())
                os.sched_yield()
                (path / "n").write_text(str(value + 1))
                done += 1
        except CfamcError:
            time.sleep(0.001)


def test_two_never_hold_a_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=take_turns, args=(tmp_path, 100)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "n").read_text() == "400"


def append(path: Path) -> None:
    with files.JsonLines(path) as lines:
        for number in range(200):
            lines.append({"n": number, "pad": "x" * 500})
            files.write_json(path.with_suffix(".json"), {"n": number, "pad": "x" * 500})


@pytest.mark.slow
def test_16_writers_are_never_read_torn(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    paths = [tmp_path / f"{number}.jsonl" for number in range(16)]
    processes = [context.Process(target=append, args=(path,)) for path in paths]
    for process in processes:
        process.start()
    for turn in range(1000):
        path = paths[turn % 16]
        if path.exists():
            records = files.read_jsonl(path)
            assert [record["n"] for record in records] == list(range(len(records)))
        if path.with_suffix(".json").exists():
            assert files.read_bytes(path.with_suffix(".json")).endswith(b"}\n")
    for process in processes:
        process.join(timeout=120)
    assert [len(files.read_jsonl(path)) for path in paths] == [200] * 16


# Reading a run


def test_what_a_run_holds_is_read_in_one_place(tmp_path: Path) -> None:
    run, recipe = RunFolder(tmp_path / "a"), tiny_recipe()
    write_record(run.run_json, run_record(status="interrupted"))
    files.write_json(run.resolved_json, recipe.resolved())
    probes = [
        probe_record(id=name, head=name[:-4], created=NOON + timedelta(minutes=age))
        for age, name in enumerate(("linear-002", "knn-001", "linear-001"))
    ]
    for record in reversed(probes):  # the time of a file says nothing
        write_record(run.probes / record.id / "record.json", record)
    (run.probes / "knn-002").mkdir()
    (run.probes / "knn-002" / "record.json").write_text("{}")
    assert (run.recipe(), run.status) == (recipe, "interrupted")
    assert [record for _, record in store.finished_probes(run)] == probes, "oldest first, without the unreadable"
    assert store.find_probe(run, "linear").name == "linear-001"
    assert store.find_probe(run, "linear-002").name == "linear-002"
    with pytest.raises(CfamcError, match="has no probe 'finetune'") as caught:
        store.find_probe(run, "finetune")
    assert caught.value.hint == "it has linear-002, knn-001, linear-001"


def test_heads_that_were_begun_come_oldest_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for age, name in enumerate(("finetune-002", "finetune-001", "done-001")):
        pending = run.probes / name / "pending.json"
        pending.parent.mkdir(parents=True)
        pending.write_text("{}")
        os.utime(pending, (1000 + age, 1000 + age))
    (run.probes / "empty-001").mkdir()
    (run.probes / "done-001" / "record.json").write_text("{}")
    assert [folder.name for folder in store.unfinished_probes(run)] == ["finetune-002", "finetune-001"]


def test_the_standard_probe_is_the_newest_linear_one_of_this_encoder_on_all_of_the_runs_data(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "20261122-120000-a-000000")
    recipe = tiny_recipe(data={"dataset": "cifar10", "root": "here"})
    write_record(run.run_json, run_record())
    run.resolved_json.write_text(json.dumps(recipe.resolved()))
    own = {**recipe.data.model_dump(mode="json"), "root": "elsewhere"}  # where a known set lies is no matter

    def add(item: str, minutes: int, **changes: Any) -> None:
        made = probe_record(**{"created": NOON + timedelta(minutes=minutes), "data": own} | changes)
        write_record(run.probes / item / "record.json", made)

    assert store.standard_probe(run, "ee") is None
    add("linear-001", 2)
    add("linear-002", 1)
    unfit: dict[str, dict[str, Any]] = {
        "knn-001": {"head": "knn"},
        "linear-003": {"encoder_digest": "ff"},
        "linear-004": {"train": data_used("train", 49_999)},
        "linear-005": {"data": own | {"size": 16}},
    }
    for item, changes in unfit.items():
        add(item, 9, **changes)
    (run.probes / "torn-001").mkdir()
    (run.probes / "torn-001" / "record.json").write_text("{")
    assert store.standard_probe(run, "ee") == run.probes / "linear-001"
    assert store.standard_probe(run, "ff") == run.probes / "linear-003"
    write_record(run.run_json, run_record(data=data_used("train", 105_000, "stl10")))
    assert store.standard_probe(run, "ee") == run.probes / "linear-004"  # 5,000 of stl10's images have labels
    add("linear-006", 10)
    assert store.find_probe(run, "linear") == run.probes / "linear-006"
    assert store.find_probe(run, "linear-002") == run.probes / "linear-002"
    with pytest.raises(CfamcError, match=r"torn-001/record\.json: Invalid JSON"):
        store.find_probe(run, "torn-001")
    with pytest.raises(CfamcError, match="has no probe 'crops'") as refusal:
        store.find_probe(run, "crops")
    assert refusal.value.exit_code == ExitCode.INVALID
    assert (
        refusal.value.hint == "it has linear-002, linear-001, knn-001, linear-003, linear-004, linear-005, linear-006"
    )


@pytest.mark.parametrize("link", [".lock", "metrics.jsonl", "checkpoints", "attacks/pgd-001/record.json"])
def test_no_link_below_a_run_is_followed(link: str, tmp_path: Path) -> None:
    """What it leads to stays as it was; a run folder that is a link itself is fine."""
    run, outside = RunFolder(tmp_path / "run"), tmp_path / "outside"
    (run.path / link).parent.mkdir(parents=True)
    if link == "checkpoints":
        outside.mkdir()
    else:
        outside.write_text("mine, without a newline")
    (run.path / link).symlink_to(outside)
    said = rf"{link} is a symbolic link; those below a run are not followed"
    with pytest.raises(CfamcError, match=said) as refused, store.lock(run):
        pass
    assert refused.value.exit_code == ExitCode.BAD_DATA
    (run.path / link).unlink()
    (tmp_path / "linked").symlink_to(run.path)
    with store.lock(RunFolder(tmp_path / "linked")):
        pass
    assert outside.is_dir() or outside.read_text() == "mine, without a newline"


@pytest.mark.parametrize("kind", ["attacks", "measures", "probes", "unlabelled"])
def test_no_item_is_held_by_way_of_a_linked_folder(kind: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "item-001").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / kind).symlink_to(tmp_path / "elsewhere")
    item = RunFolder(tmp_path / "run" / kind / "item-001")
    with pytest.raises(CfamcError, match=f"{kind} is a symbolic link"), store.lock(item):
        pass


def test_streams_and_cuts_follow_no_link(tmp_path: Path) -> None:
    """Even one that was put there after the run was looked at."""
    (tmp_path / "mine").write_text("no line of ours")
    for name in ("lines", ".lock"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    for use in (
        lambda: files.JsonLines(tmp_path / "lines"),
        lambda: files.cut(tmp_path / "lines", {"size": 1, "sha256": None}),
        lambda: store._open_lock(tmp_path / ".lock", RunFolder(tmp_path)),
    ):
        with pytest.raises((CfamcError, OSError), match="symbolic links"):
            use()
    assert (tmp_path / "mine").read_text() == "no line of ours"
