from __future__ import annotations

import hashlib
import json
import os
import pty
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import attack_record, probe_record, run_record, tiny_recipe, write_record

from cfamc_cli import cli
from cfamc_cli.recipe import file
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.store.files import JsonLines
from cfamc_cli.store.records import EvaluationLine, Progress, TrainLine, now
from cfamc_cli.store.runs import RunFolder, lock

OLD, NEW = "20261122-120000-tiny-00000a", "20261123-120000-tiny-s1-00000b"


def make(store: Path, run_id: str, *, recipe: Recipe | None = None, steps: int = 3, **changes: Any) -> RunFolder:
    """A run with metrics and two checkpoints; `changes` go to its record."""
    run = RunFolder(store / run_id)
    write_record(run.run_json, run_record(**{"id": run_id, "name": "tiny", "created": now()} | changes))
    run.resolved_json.write_text(json.dumps((recipe or tiny_recipe()).resolved()))
    with JsonLines(run.metrics) as lines:
        where: dict[str, Any] = {"batch": 1, "epoch": 0.5}
        for step in range(1, steps + 1):
            line = TrainLine(
                **where, step=step, lr=0.3, loss=-step, gradient_norm=1.0, effective_rank=5.0, feature_std=1.0
            )
            lines.append(line.written())
        found = EvaluationLine(**where, step=steps, n=200, knn=20, clean=151, robust=50, eps="8/255", attack="pgd-10")
        lines.append(found.written())
    for step, whole in ((1, True), (2, True), (3, False)):
        checkpoint(run, step, whole=whole)
    return run


def checkpoint(run: RunFolder, step: int, *, whole: bool) -> None:
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 2**20)
    told = {"model.safetensors": {"size": 2**20, "sha256": hashlib.sha256(b"x" * 2**20).hexdigest() if whole else "00"}}
    (folder / "manifest.json").write_text(json.dumps({"files": told}))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "runs"
    make(store, OLD)
    make(store, NEW, seed=1)
    return store


def run(capsys: pytest.CaptureFixture[str], store: Path, *words: str) -> tuple[int, str, str]:
    code = cli.run(["runs", *words, "--runs", str(store)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_runs_are_listed_the_newest_first(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(store / OLD / "attacks/pgd-001/record.json", attack_record(run=OLD))
    half = Progress(batch=1, step=750, epoch=0.5, total=1500)
    make(store, "20261124-120000-tiny-s2-00000c", seed=2, status="running", progress=half, evaluation=None)
    (store / "notes").mkdir()
    (store / "loop").symlink_to("loop")
    (store / OLD / "attacks/link").symlink_to("/")
    code, out, err = run(capsys, store, "list")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("2026")]
    assert [row[0] for row in rows] == ["20261124-120000-tiny-s2-00000c", NEW, OLD]
    assert rows[0][1:6] == ["killed", rows[0][2], "s", "50", "%"]
    assert rows[2][1] == "finished"
    assert "70.0 / 30.0 pgd 8/255" in out
    assert err.startswith("left out: notes: ")
    code, out, _ = run(capsys, store, "list", "--json")
    told = json.loads(out)
    assert [(entry["seed"], entry["status"]) for entry in told["runs"]] == [
        (2, "killed"),
        (1, "finished"),
        (0, "finished"),
    ]
    files = [path for path in (store / OLD).rglob("*") if path.is_file() and not path.is_symlink()]
    assert told["runs"][2]["size"] == sum(path.stat().st_size for path in files)
    assert told["left_out"][0]["what"] == "notes"


def test_a_seed_that_every_id_tells_has_no_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "20261124-120000-tiny-s2-00000c", seed=2)
    make(tmp_path, "20261124-110000-tiny-s1-00000b", seed=1)
    (title, _, head, _, *rows, _) = run(capsys, tmp_path, "list")[1].splitlines()
    assert title.startswith("2 runs in ")
    assert head.split() == ["run", "status", "age", "done", "clean", "/", "robust", "%", "MiB"]
    assert [row[head.index("MiB") :].strip() for row in rows[:2]] == [row.split()[-1] for row in rows[:2]]
    make(tmp_path, "20261124-130000-tiny-00000d", seed=3)
    assert " seed " in run(capsys, tmp_path, "list")[1]


def test_a_missing_store_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("list",), ("gc",)):
        assert run(capsys, tmp_path / "none", *words)[0] == 2


def test_a_page_shows_the_recipe_curves_and_all_that_was_measured(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = file.load("quickstart", overrides=["optimizer.lr=0.2"])
    folder = make(store, "20261124-120000-quickstart-s0-00000c", name="quickstart", recipe=shown, steps=50).path
    write_record(folder / "attacks/pgd-001/record.json", attack_record(run=folder.name))
    write_record(folder / "probes/linear-001/record.json", probe_record(run=folder.name))
    code, out, _ = run(capsys, store, "show", "quickstart")
    assert code == 0
    assert "recipe quickstart, seed 0, other than shipped in:\n  optimizer.lr = 0.2, not 0.3\n\n" in out
    (loss,) = (line for line in out.splitlines() if line.startswith("Training loss"))
    *title, first, drawn, last = loss.split()
    assert (title, first, last) == (["Training", "loss,", "emp-ssl"], "-1", "-50")
    assert (len(drawn), drawn[0], drawn[-1]) == (24, "\u2588", "\u2581")
    assert re.search("Online accuracy while training +75.5  \u2581  75.5\n", out)
    assert "probes/linear-001  70.0 [67.1, 72.8]" in out
    assert "attacks/pgd-001    70.0 [67.1, 72.8]  30.0 [27.2, 32.9]  pgd linf 8/255: 1 passed, no audit" in out
    code, out, _ = run(capsys, store, "show", OLD)
    assert 'recipe tiny, seed 0, other than by default in:\n  data.dataset = "folder"\n' in out
    assert "  crops.0.size = 8\n" in out
    assert " = null" not in out
    bare = make(store, "20261125-120000-bare-s0-00000d", evaluation=None, untrained=None).path.name
    assert run(capsys, store, "show", bare)[1].endswith("\nnothing was measured yet\n")


def test_tags_names_and_ends_of_ids_address_a_run(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, store, "tag", "00000b", "best", "paper-1")
    assert (code, out) == (0, "best\npaper-1\n")
    for reference in ("best", "paper-1", "00000b", "tiny-s1", "tiny-s1-00000b", "20261123"):
        assert run(capsys, store, "show", reference)[1].startswith(NEW)
    code, _, err = run(capsys, store, "show", "tiny")
    assert (code, f"one of: {OLD}, {NEW}" in err) == (2, True)
    assert "best paper-1" in run(capsys, store, "list")[1]
    for word in ("latest", "-x", "1st", "a/b", "x" * 49, "a\nb"):
        assert run(capsys, store, "tag", OLD, "--", word)[0] == 2
    assert run(capsys, store, "untag", "best", "paper-1")[1] == "best\n"
    assert run(capsys, store, "untag", "best")[1] == ""
    assert run(capsys, store, "show", "best")[0] == 2
    (store / OLD / "tags.json").symlink_to("/dev/zero")
    assert run(capsys, store, "list")[0] == 0


def test_runs_are_removed_after_a_question(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "documents").mkdir()
    (store / "20261124-120000-link-00000c").symlink_to(store / OLD)
    for reference, code in (("documents", 4), ("00000c", 4), ("nothing", 2)):
        assert run(capsys, store, "rm", "--yes", NEW, reference)[0] == code
    assert (run(capsys, store, "rm", NEW)[0], (store / NEW).exists()) == (2, True)  # nobody can be asked
    code, out, _ = run(capsys, store, "rm", "--yes", NEW, "00000b")
    assert (code, out) == (0, f"{NEW}\n")
    assert sorted(path.name for path in store.iterdir()) == sorted([OLD, "20261124-120000-link-00000c", "documents"])


def test_a_run_that_is_held_is_not_removed(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock(RunFolder(store / OLD)):
        code, _, err = run(capsys, store, "rm", "--yes", NEW, OLD)
        assert (code, "is held by" in err) == (6, True)
        code, out, _ = run(capsys, store, "gc", "--json")
        assert [entry["what"] for entry in json.loads(out)["left_out"]] == [OLD]
    assert (store / NEW).exists()
    controller, terminal = pty.openpty()
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        os.write(controller, b"n\n")
        code, out, err = run(capsys, store, "rm", NEW)
        assert (code, out, (store / NEW).exists()) == (0, "", True)
        assert "nothing was removed" in err
        os.write(controller, b"y\n")
        assert run(capsys, store, "rm", NEW)[:2] == (0, f"{NEW}\n")
    os.close(controller)
    assert not (store / NEW).exists()


def test_checkpoints_but_the_newest_whole_one_are_cleared(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, left in ((("--dry-run",), ["1", "2", "3"]), ((), ["2", "3"]), ((), ["2", "3"])):
        code, out, _ = run(capsys, store, "gc", OLD, *words)
        assert code == 0
        assert sorted(path.name[-1] for path in (store / OLD / "checkpoints").iterdir()) == left
        assert out.splitlines()[0] in ("1.0 MiB would be freed", "1.0 MiB freed", "0.0 MiB freed")
        assert ("checkpoints" in out) == (out[0] == "1")  # no table of nothing
        assert ("would" in out) == bool(words)
    (store / NEW / "checkpoints/step-00000002/model.safetensors").write_bytes(b"y" * 2**20)
    code, out, _ = run(capsys, store, "gc", "--json")
    assert json.loads(out)["freed"] == []  # of the newer run the oldest alone is whole


def test_a_run_is_watched_to_its_end(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Progress(batch=1, step=750, epoch=0.5, total=1500)
    record = run_record(id=NEW, name="tiny", status="running", progress=half)
    write_record(store / NEW / "run.json", record)
    code, _, err = run(capsys, store, "watch", NEW)
    assert (code, "is killed" in err) == (1, True)

    def end(_seconds: float) -> None:
        (store / NEW / "new").write_text(run_record(id=NEW, name="tiny").model_dump_json())
        (store / NEW / "new").replace(store / NEW / "run.json")

    monkeypatch.setattr("cfamc_cli.commands.runs.time.sleep", end)
    with lock(RunFolder(store / NEW)):
        code, _, err = run(capsys, store, "watch", NEW)
    assert code == 0
    assert "train 750/1500  started  epoch 0.5  loss -3  lr 0.3  at epoch 0.5: clean 75.5 %, pgd-10 8/255 25.0 %" in err
    assert err.endswith("is finished, after 11 min 40 s\n")


def test_who_leaves_a_watch_is_told_nothing_of_a_failure(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cfamc_cli.commands.runs.time.sleep", leave)
    write_record(store / NEW / "run.json", run_record(id=NEW, name="tiny", status="running"))
    with lock(RunFolder(store / NEW)):
        code, out, err = run(capsys, store, "watch", NEW)
    assert (code, out) == (130, "")
    assert "it goes on" in err
    assert "error" not in err
