from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny import (
    COMPUTATION,
    ENVIRONMENT,
    NOON,
    attack_record,
    data_used,
    probe_record,
    run_record,
    tiny_recipe,
    write_record,
)

from cfamc_cli.commands.compare import compare
from cfamc_cli.comparison.gather import gather
from cfamc_cli.comparison.tables import tabulate
from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.report import sheets
from cfamc_cli.report.plots import learning_curves, panels
from cfamc_cli.store.records import (
    Accuracy,
    Evaluation,
    EvaluationLine,
    Flag,
    Line,
    MeasuredPoint,
    MeasureRecord,
    Outcomes,
    Progress,
    StageOutcome,
    ThreatModel,
    TimingLine,
    Totals,
    TrainLine,
    pack_bits,
)
from cfamc_cli.store.runs import RunFolder, list_runs


def make_run(
    store: Path,
    run: str,
    *,
    name: str = "a",
    seed: int = 0,
    digest: str = "aa",
    recipe: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A finished run without results; `changes` go to its record."""
    settled = {"id": run, "name": name, "recipe_digest": digest, "seed": seed, "wall_seconds": 700.0 + seed}
    write_record(store / run / "run.json", run_record(**settled | changes))
    resolved = {"schema": 1, "name": name, "seed": seed, "adversary": {"name": "free", "replays": 3}, **(recipe or {})}
    (store / run / "resolved.json").write_text(json.dumps(resolved))
    return store / run


def add_probe(run: Path, item: str = "linear-001", **changes: Any) -> None:
    record = probe_record(**{"id": item, "run": run.name} | changes)
    write_record(run / "probes" / item / "record.json", record)


def add_attack(
    run: Path,
    item: str = "pgd-001",
    *,
    clean: list[bool] | None = None,
    robust: list[bool] | None = None,
    eps: str = "8/255",
    space: Any = "image",
    outcomes: bool = True,
    **changes: Any,
) -> None:
    clean = [i % 10 < 7 for i in range(1000)] if clean is None else clean
    robust = [right and i % 3 == 0 for i, right in enumerate(clean)] if robust is None else robust
    n = len(clean)
    settled = {
        "id": item,
        "run": run.name,
        "threat": ThreatModel(space=space, norm="linf", eps=eps),
        "settings": {"name": "pgd", "eps": eps, "steps": 20, "step_size": "0.01", "restarts": 1, "seed": 3},
        "data": data_used("test", n),
        "subset": f"the first {n} of a balanced order",
        "clean": Accuracy.of(sum(clean), n),
        "robust": Accuracy.of(sum(robust), n),
    }
    record = attack_record(**settled | changes)
    write_record(run / "attacks" / item / "record.json", record)
    if outcomes:
        stage = StageOutcome(name="pgd", done=n, robust=pack_bits(robust))
        kept = Outcomes(
            n=n,
            block=64,
            order_digest="0b",
            data_fingerprint=record.data.fingerprint,
            done=n,
            clean=pack_bits(clean),
            stages=(stage,),
        )
        write_record(run / "attacks" / item / "outcomes.json", kept)


def run(references: list[str], store: Path, **changes: Any) -> None:
    options: dict[str, Any] = {
        "runs": store,
        "where": [],
        "sort": "",
        "baseline": None,
        "published": False,
        "fold": True,
        "limit": 50,
        "output": "json",
        "plot": None,
        "html": None,
    }
    compare(references, **(options | changes))


def result(capsys: pytest.CaptureFixture[str], references: list[str], store: Path, **changes: Any) -> dict[str, Any]:
    capsys.readouterr()
    run(references, store, **changes)
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def names(found: dict[str, Any]) -> list[list[str]]:
    return [[row["label"] for row in table["rows"]] for table in found["tables"]]


A, B, C, D = (f"20261122-12000{k}-{name}-00000{k}" for k, name in enumerate("abcd"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two comparable runs, of which the second is better, in a store."""
    runs = tmp_path / "runs"
    add_attack(make_run(runs, A, name="a"))
    clean = [i % 10 < 8 for i in range(1000)]
    totals = Totals(steps=1500, view_passes=600_000, attack_view_passes=3_000_000, parameters=2_000_000)
    recipe = {"adversary": {"name": "pgd", "steps": 5}}
    better = make_run(runs, B, name="b", digest="bb", recipe=recipe, totals=totals)
    add_attack(better, clean=clean, robust=[right and i % 2 == 0 for i, right in enumerate(clean)])
    return runs


def test_settings_that_came_after_a_run_tell_it_from_no_other_while_they_stand_at_their_default(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_id, train in ((A, {"compile": False}), (B, {"compile": "auto", "memory": "recompute"})):
        path = store / run_id / "resolved.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"train": train}))
    best, _ = result(capsys, [], store)["tables"][0]["rows"]
    assert best["recipe"] == {"adversary.name": "pgd", "adversary.steps": 5}


def test_the_better_run_leads(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, [], store, baseline=A)
    (table,) = found["tables"]
    assert names(found) == [[B, A]]
    best, base = table["rows"]
    assert best["recipe"] == {"adversary.name": "pgd", "adversary.steps": 5}
    assert base["recipe"] == {"adversary.name": "free", "adversary.replays": 3}
    assert (best["clean"]["value"], best["robust"]["value"]) == (0.8, 0.4)
    assert best["against"]["robust"]["shared"] == 1000
    assert best["against"]["robust"]["value"] == pytest.approx(0.4 - base["robust"]["value"])
    assert best["against"]["robust"]["p"] < 1e-4
    assert base["baseline"]
    assert best["front"]
    assert table["verdict"].startswith(f"{B} leads {A} by ")
    assert found["left_out"] == []


def test_runs_are_named_in_many_ways(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for references in ([str(store)], [A, B], [A[:-2], str(store / B)], [str(store), B], [A, A, B]):
        assert names(result(capsys, references, store)) == [[B, A]]
    assert names(result(capsys, [B], store)) == [[B]]
    monkeypatch.setenv("CFAMC_RUNS", str(store))
    assert names(result(capsys, [], store, runs=None)) == [[B, A]]
    other = store.parent / "other"
    add_attack(make_run(other, C, digest="cc"))
    assert names(result(capsys, [str(store), str(other)], store)) == [[B, A, C]]
    with pytest.raises(CfamcError, match="no run 'zzz'"):
        run(["zzz"], store)
    with pytest.raises(CfamcError, match="does not exist"):
        run([], store.parent / "missing")
    with pytest.raises(CfamcError, match="is not among the runs"):
        run([A], store, baseline=B)


@pytest.mark.parametrize("output", ["rich", "json", "csv", "markdown", "latex"])
def test_an_empty_folder_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
    run([], tmp_path, output=output)
    captured = capsys.readouterr()
    assert "nothing to compare" in captured.err
    if output == "json":
        assert json.loads(captured.out)["tables"] == []


def test_runs_of_different_n_are_cut_to_the_shared_samples(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = [i >= 100 for i in range(400)]
    add_attack(make_run(store, C, name="c", digest="cc"), clean=late, robust=late)
    few = [i % 2 == 0 for i in range(100)]
    add_attack(make_run(store, D, name="d", digest="dd"), clean=few, robust=few)
    (table,) = result(capsys, [], store, baseline=D)["tables"]
    assert [row["label"] for row in table["rows"]] == [D, B, A, C]
    assert {row["clean"]["n"] for row in table["rows"]} == {100}
    assert [row["n_measured"] for row in table["rows"]] == [[100], [1000], [1000], [400]]
    assert [row["against"] and row["against"]["robust"]["shared"] for row in table["rows"]] == [None, 100, 100, 100]
    assert "--where 'n>100'" in table["notes"][0]
    assert names(result(capsys, [], store, where=["n>400"])) == [[B, A]]
    run([], store, output="markdown")
    assert "cut from n 1,000" in capsys.readouterr().out


def test_clean_and_robust_differences_have_a_p_of_their_own(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [i % 10 < 7 for i in range(1000)]
    add_attack(make_run(store, C, digest="cc"), clean=few, robust=[False] * 1000)  # as right as A where it is clean
    run([], store, output="markdown", baseline=A)
    head, _, *rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    at = head.index("clean diff")
    assert head[at : at + 5] == ["clean diff", "clean p", "robust diff", "robust p", "shared"]
    assert rows[2][at : at + 5] == ["+0.0", "1", "-23.4", r"\< 0.0001", "1,000"]


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("attack.steps=20", [[B, A]]),
        ("attack.step_size<0.01", []),
        ("time>=700", [[B, A]]),
        ("knn>20", [[B]]),
        ("loss<-100", [[A]]),  # of the last batch: the file's torn line is not read
        ("memory>1000", [[A]]),
        ("memory<=2048", [[A]]),
        ("probe.head=linear", [[B]]),
        ("data.root=here", [[B]]),
        ("train.keep>1", [[B]]),
        ("adversary.steps=5", [[B]]),
        ("phase.0.epochs=0.5", [[B]]),
        ("phase.0.crops.1.count>3", [[B]]),
    ],
)
def test_filters_reach_every_metric_and_recipe_key(
    store: Path, capsys: pytest.CaptureFixture[str], where: str, left: list[list[str]]
) -> None:
    add_metrics(store / A)
    knn = Evaluation(epoch=1.0, knn=Accuracy.of(300, 1000), clean=None, robust=None, eps="8/255", attack="pgd-10")
    recipe = {"adversary": {"name": "pgd", "steps": 5}, "probe": {"head": "linear"}, "data": {"root": "here"}}
    later = {"train": {"keep": 2}, "phase": [{"epochs": 0.5, "crops": [{"count": 1}, {"count": 4}]}]}
    make_run(store, B, name="b", digest="bb", recipe=recipe | later, evaluation=knn)
    found = result(capsys, [], store, where=[where])
    assert names(found) == left
    for table in found["tables"]:
        assert not {"probe.head", "data.root", "train.keep", "loss"}.intersection(table["keys"])


def test_a_baseline_without_a_row_is_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_attack(make_run(store, C, name="a"), created=NOON + timedelta(hours=1))  # the seed of A once more
    make_run(store, D, digest="dd")
    for baseline, where, message, hint in (
        (B, [f"run!={B}"], "no result of it passes --where", "loosen the filters"),
        (A, [], f"{C} attacks/pgd-001 stands for it", "--no-fold"),
        (D, [], "nothing was measured on it yet", "name another run"),
    ):
        with pytest.raises(CfamcError, match=f"there is nothing of the baseline {baseline} to compare with") as caught:
            run([], store, baseline=baseline, where=where)
        assert message in caught.value.message
        assert hint in caught.value.hint
        assert caught.value.exit_code == ExitCode.INVALID
    assert capsys.readouterr().out == ""
    assert names(result(capsys, [], store, baseline=A, fold=False)) == [[B, A, C]]


def test_a_table_without_the_baseline_says_so(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_attack(store / B, "pgd-002", eps="4/255")
    first, second = result(capsys, [], store, baseline=A)["tables"]
    assert first["notes"] == []
    assert second["notes"] == [f"No differences: there is no result of the baseline {A} among these."]


def test_other_eps_spaces_and_attacks_stand_apart(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_attack(store / A, "pgd-002", eps="4/255")
    add_attack(store / A, "pgd-003", space="crops")
    add_attack(store / A, "autoattack-001", attack="autoattack", settings={"version": "standard"})
    add_attack(store / A, "pgd-004", data=data_used("test", 1000, "cifar100"))
    add_attack(store / A, "pgd-005", eps="16/510")  # the same size in another spelling, and the newer number
    add_probe(store / A)
    found = result(capsys, [], store)
    assert sorted(map(len, names(found)), reverse=True) == [2, 1, 1, 1, 1, 1]
    reasons = {table["not_comparable_with_the_first"] for table in found["tables"]}
    assert "eps 4/255, not 8/255" in reasons
    assert "space crops, not image" in reasons
    assert any("attack autoattack, not pgd" in reason for reason in reasons)
    assert any("dataset cifar100, not cifar10" in reason for reason in reasons)
    assert "clean images, not attacked" in reasons
    assert found["left_out"] == [{"what": f"{A} attacks/pgd-001", "why": f"{A} attacks/pgd-005 stands for it"}]
    run([], store, output="rich")
    out = capsys.readouterr().out
    assert "Apart: not comparable" in out


def test_other_data_stand_apart(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of the same name: what differs is their content."""
    changed = data_used("test", 1000).model_copy(update={"fingerprint": "cd" * 32})
    add_attack(store / A, data=changed)
    found = result(capsys, [], store)
    assert [len(rows) for rows in names(found)] == [1, 1]
    assert "fingerprint" in found["tables"][1]["not_comparable_with_the_first"]


def add_measure(run: Path, measure: Any, settings: dict[str, Any], points: Sequence[tuple[str, float, int]]) -> None:
    record = MeasureRecord(
        id=f"{measure}-001",
        run=run.name,
        probe="linear-001",
        created=NOON,
        head="linear",
        features="pre_feature",
        measure=measure,
        settings={"name": measure, **settings},
        data=data_used("test", 1000),
        order_digest="0b",
        encoder_digest="ee",
        clean=Accuracy.of(700, 1000),
        points=tuple(MeasuredPoint(name=n, at=at, accuracy=Accuracy.of(correct, 1000)) for n, at, correct in points),
        figures={"median eps": 0.02, "relative to clean": 0.65, "mean certified radius": None},
        flags=(),
        wall_seconds=1.0,
        environment=ENVIRONMENT,
        recipe_digest="aa",
        seed=0,
        head_digest="dd",
        forward=1,
        backward=0,
    )
    write_record(run / "measures" / record.id / "record.json", record)


def test_measures_stand_apart_from_attacks_and_are_not_called_robust(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_id, more in ((A, 0), (B, 50)):
        for source in ("cfamc-corruptions-1", "published"):
            points = [("blur", 1.0, 600 + more), ("blur", 2.0, 301 + more)]
            add_measure(store / run_id, "corruptions", {"source": source}, points)
            (store / run_id / "measures/corruptions-001").rename(store / run_id / f"measures/{source}")
    curve = [("accuracy", 0.0, 700), ("accuracy", 8 / 255, 222)]
    add_measure(store / A, "smallest", {"norm": "linf", "steps": 50}, curve)
    add_measure(store / A, "smoothing", {"sigma": "0.25"}, [("certified accuracy", 0.25, 111)])
    found = result(capsys, [], store)
    tables = {
        (table["figure"], table["condition"]["attack"], table["condition"]["settings"]): table
        for table in found["tables"]
    }
    own = tables["corrupted", "corruptions", "source cfamc-corruptions-1"]
    assert [row["label"] for row in own["rows"]] == [B, A]
    assert [row["robust"]["value"] for row in own["rows"]] == [pytest.approx(0.5005), pytest.approx(0.4505)]
    assert "points of corrupted accuracy" in own["verdict"]
    assert ("corrupted", "corruptions", "source published") in tables
    (least,) = tables["robust", "smallest", "steps 50"]["rows"]
    assert (least["robust"]["value"], tables["robust", "smallest", "steps 50"]["condition"]["eps"]) == (0.222, "8/255")
    (proof,) = tables["certified", "smoothing", "sigma 0.25"]["rows"]
    assert proof["robust"]["value"] == 0.111
    with pytest.raises(CfamcError, match="no result has a key 'certifed'"):
        run([], store, where=["certifed>3"])
    assert [row["label"] for row in result(capsys, [], store, where=["certified>3"])["tables"][0]["rows"]] == [A]
    run([], store, output="markdown", limit=0)
    out = capsys.readouterr().out
    assert "| corrupted % |" in out
    assert "relative to clean 0.65" in out
    assert re.search(r"11\.1 \\\[.*\\\] certified", out)


def test_seeds_fold(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, other in ((1, C), (2, D)):
        add_attack(make_run(store, other, name="a", seed=seed))
    assert names(result(capsys, [], store)) == [[B, "a (3 seeds)"]]
    assert names(result(capsys, [], store, fold=False)) == [[B, A, C, D]]
    make_run(
        store, D, name="a", seed=2, data=data_used("train", 50_000, "other")
    )  # not the same images: not the same recipe
    assert names(result(capsys, [], store)) == [[B, "a (2 seeds)", D]]


def test_what_training_and_evaluation_were_computed_by_is_held_against_each_other(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = ENVIRONMENT.model_copy(update={"device": "NVIDIA H100", "computation": COMPUTATION})
    single = card.model_copy(update={"computation": COMPUTATION.model_copy(update={"processes": 1})})
    make_run(store, A, name="a", environment=card)
    make_run(store, B, name="b", digest="bb", environment=single)

    def notes() -> list[str]:
        (table,) = result(capsys, [], store)["tables"]
        return list(table["notes"])

    assert notes() == ["Computed differently: training processes 1 / 2."]
    add_attack(store / A, environment=single)
    assert notes() == ["Computed differently: training processes 1 / 2; evaluation device cpu / NVIDIA H100."]


def test_seeds_that_draw_their_own_part_of_the_data_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, run_id in enumerate((A, B)):
        drawn = data_used("train", 1000).model_copy(update={"fingerprint": f"{seed:064x}"})
        recipe = {"data": {"dataset": "cifar10", "limit": 1000}}
        add_attack(make_run(tmp_path, run_id, seed=seed, recipe=recipe, data=drawn))
    assert names(result(capsys, [], tmp_path)) == [["a (2 seeds)"]]


def save_digest(run: Path, step: int, digest: str) -> None:
    """What a comparison reads of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"sha256": digest}}}))


@pytest.mark.parametrize(
    ("minutes", "digests", "kept"),
    [
        (1, [], True),
        (-1, [], False),
        (-1, ["ee"], True),  # taken up once more with nothing left to do
        (-1, ["ee", "ff"], False),
        (0.1, ["ee", "ff"], False),  # its head was begun before the training ended
        (1, ["ff"], True),  # made long after: checkpoints are not looked at
    ],
)
def test_results_of_an_encoder_that_was_trained_on_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], minutes: float, digests: list[str], kept: bool
) -> None:
    made = make_run(tmp_path, A)
    add_probe(made, created=NOON + timedelta(minutes=minutes))
    add_attack(made, created=NOON + timedelta(minutes=minutes), wall_seconds=30.0)
    for step, digest in enumerate(digests):
        save_digest(made, 10 * step, digest)
    found = result(capsys, [], tmp_path)
    assert len(found["tables"]) == (2 if kept else 0)
    if not kept:
        reasons = {item["what"]: item["why"] for item in found["left_out"]}
        for item in ("probes/linear-001", "attacks/pgd-001"):
            assert reasons[f"{A} {item}"].endswith("UTC, and the encoder was trained on since")


def test_the_manifest_of_a_checkpoint_tells_the_digest_of_its_encoder(tmp_path: Path) -> None:
    from torch import nn

    from cfamc_cli.engine import checkpoint

    norm = nn.BatchNorm2d(4)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    for step in (99_999_999, 100_000_000):  # by number, not by name
        nn.init.constant_(norm.weight, step)
        saved = checkpoint.Checkpoint(module.state_dict(), {}, {"step": step})
        checkpoint.save(tmp_path / "checkpoints", step, saved)
    assert RunFolder(tmp_path).final_encoder_digest() == checkpoint.digest_of(module)
    assert RunFolder(tmp_path / "none").final_encoder_digest() is None


def test_a_head_fitted_to_fewer_images_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_run(tmp_path, A)
    add_probe(made)
    add_probe(made, "linear-002", train=data_used("train", 500), test_accuracy=Accuracy.of(400, 1000))
    (table,) = result(capsys, [], tmp_path)["tables"]
    rows = [(row["recipe"]["head.images"], row["clean"]["value"]) for row in table["rows"]]
    assert rows == [(50_000, 0.7), (500, 0.4)]


def test_what_was_never_attacked_shows_its_online_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    online = Evaluation(
        epoch=1.0, knn=None, clean=Accuracy.of(500, 1000), robust=Accuracy.of(200, 1000), eps="8/255", attack="pgd-10"
    )
    make_run(tmp_path, A, evaluation=online)
    make_run(tmp_path, B)
    found = result(capsys, [], tmp_path)
    condition = found["tables"][0]["condition"]
    assert condition["head"] == "online linear"
    assert [condition[key] for key in ("attack", "space", "norm", "eps")] == ["pgd-10", "image", "linf", "8/255"]
    assert found["left_out"] == [{"what": B, "why": "nothing was measured on it yet: cfamc attack"}]
    make_run(tmp_path, A, evaluation=online.model_copy(update={"robust": None}))
    condition = result(capsys, [], tmp_path)["tables"][0]["condition"]
    assert [condition[key] for key in ("attack", "space", "norm", "eps")] == ["", "", "", ""]


def test_damage_is_named_and_left_out(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "a-file").write_text("x")
    (store / "foreign").mkdir()
    (store / "loop").symlink_to("loop")
    for name, content in {
        "torn": (store / A / "run.json").read_text()[:-40],
        "newer": (store / A / "run.json").read_text().replace('"schema_version": 1', '"schema_version": 9'),
        "nan": (store / A / "run.json").read_text().replace("700.0", "NaN"),
        "html": "<html>",
        "empty": "",
    }.items():
        (store / name).mkdir()
        (store / name / "run.json").write_text(content)
    (store / "pipe").mkdir()
    os.mkfifo(store / "pipe" / "run.json")
    (store / "copy").symlink_to(store / A)
    make_run(store, C, status="interrupted", progress=Progress(batch=4, step=12, epoch=0.1, total=1500))
    make_run(store, D, status="diverged")
    (store / A / "attacks" / "pgd-002").mkdir()
    (store / A / "attacks" / "pgd-003").mkdir()
    (store / A / "attacks" / "pgd-003" / "record.json").write_text("{}")
    (store / B / "attacks" / "pgd-001" / "outcomes.json").write_text("{")
    found = result(capsys, [], store, baseline=A)
    assert names(found) == [[B, A]]
    assert found["tables"][0]["rows"][0]["against"]["robust"]["p"] is None
    why = {item["what"]: item["why"] for item in found["left_out"]}
    assert why["foreign"] == "no run.json: not a run, or not yet one"
    assert "Invalid JSON" in why["torn"]
    assert "schema version 9, where 1 is known" in why["newer"]
    assert "Invalid JSON" in why["nan"] or "finite number" in why["nan"]
    assert "Invalid JSON" in why["html"]
    assert "Invalid JSON" in why["empty"]
    assert "not a regular file" in why["pipe"]
    assert why[C] == "interrupted after 12 of 1,500 weight updates"
    assert why[D].startswith("diverged after")
    assert why[f"{A} attacks/pgd-002"] == "unfinished"
    assert "Field required" in why[f"{A} attacks/pgd-003"]
    assert why[f"{B} attacks/pgd-001"].startswith("compared without pairs: ")
    assert "copy" not in why  # the same folder under another name
    run([], store, output="rich")
    captured = capsys.readouterr()
    assert f"left out: {C}: interrupted after 12 of 1,500 weight updates\n" in captured.err
    assert "left out" not in captured.out


def test_outcomes_of_another_record_are_not_paired(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store / B / "attacks" / "pgd-001" / "outcomes.json"
    path.write_bytes((store / A / "attacks" / "pgd-001" / "outcomes.json").read_bytes())
    found = result(capsys, [], store, baseline=A)
    assert found["tables"][0]["rows"][0]["against"]["robust"]["p"] is None
    assert "outcomes.json is not of this record" in found["left_out"][0]["why"]


def test_runs_that_vanish_while_they_are_read(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def vanish(folder: Path) -> list[RunFolder]:
        runs = list_runs(folder)
        (store / A).rename(store.parent / "gone")
        return runs

    monkeypatch.setattr("cfamc_cli.comparison.gather.list_runs", vanish)
    found = result(capsys, [], store)
    assert names(found) == [[B]]
    assert found["left_out"][0]["what"] == A


def test_published_rows_are_marked(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([], store, output="markdown", published=True)
    out = capsys.readouterr().out
    sheets = {sheet.splitlines()[0]: sheet.count("published, not measured here") for sheet in out.split("### ")[1:]}
    assert list(sheets.values()) == [7, 7, 11, 10, 10, 6, 7, 7, 10, 8, 8, 1]
    beside, *own = sheets
    assert beside.startswith("cifar10 test")
    assert all(title.startswith("Published: cifar10") for title in own)
    assert not any("PGD" in title and "8/255" in title and "cifar10 " in title for title in own)
    assert "| CF-AMC-SSL, 16 crops, m = 3 |" in out
    run([], store, output="csv", published=True)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["origin"] for row in rows].count("measured") == 2
    assert not any(row["front"] == "True" for row in rows if row["origin"] != "measured")
    told = [(row["dataset"], row["eps"]) for row in rows if row["origin"] != "measured" and row["attack"] == "pgd"]
    assert sorted(told) == sorted([(f"cifar10{more}", eps) for more in ("", "0") for eps in ("4/255", "8/255")] * 7)
    origins = [row["origin"] for row in result(capsys, [], store, published=True)["published"]]
    assert origins == ["published, not measured here"] * 92


@pytest.mark.parametrize(
    "changes",
    [
        {"data": data_used("test", 1000, "folder")},
        {"data": data_used("train", 1000)},
        {"features": "backbone"},
        {"head": "crops"},
        {"attack": "autoattack"},
        {"attack": "autoattack", "features": "backbone", "settings": {"name": "autoattack", "version": "rand"}},
        {"attack": "autoattack", "settings": {"name": "autoattack", "version": "standard"}},
        {"space": "crops"},
        {"eps": "2/255"},
    ],
)
def test_published_rows_stand_beside_what_was_measured_alike_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    add_attack(make_run(tmp_path, A), **changes)
    run([], tmp_path, output="markdown", published=True)
    first, *own = capsys.readouterr().out.split("### ")[1:]
    assert "published" not in first
    assert len(own) == 12
    assert all(sheet.startswith("Published: ") and "nothing in this table was measured here" in sheet for sheet in own)


def test_a_board_stands_beside_what_was_measured_by_its_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"name": "autoattack", "eps": "8/255", "norm": "linf", "version": "standard"}
    add_attack(make_run(tmp_path, A), attack="autoattack", features="backbone", settings=settings)
    run([], tmp_path, output="markdown", published=True)
    first, *own = capsys.readouterr().out.split("### ")[1:]
    assert first.count("published, not measured here") == 11
    assert "| DynACL-AIR++ | 81.8 | 46.99 |" in first
    assert "Published rows: robustssl.github.io of 2023-12-12" in first
    assert first.index(A) < first.index("DynACL")
    assert len(own) == 11


HOSTILE = {
    "markup": "[bold red]x[/] [link=http://a]b",
    "ansi": "\x1b[31mred\x1b]8;;http://a\x07",
    "path": "../../../x",
    "formula": "=HYPERLINK(1)",
    "script": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "latex": r"\input{/etc/passwd} $x_1^2$ 100% a&b #1 ~",
    "markdown": "| a | `b` [c](http://d) **e**",
    "newline": "a\nb\r\n| c |",
    "mathtext": "$\\frac{$",
    "bidi": "\u202ea",
    "large": "x" * 10**6,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_are_never_interpreted(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    store = tmp_path / "runs"
    for number, (name, digest) in enumerate(((text, "aa"), (f"_{text}", "bb"))):
        made = make_run(
            store, f"r{number}", name=name, digest=digest, recipe={"note": text + str(number), "=k": number}
        )
        record = json.loads((made / "run.json").read_text()) | {"id": f"{number}{text}"}
        (made / "run.json").write_text(json.dumps(record))
        add_attack(made, flags=(Flag(name=text, figure=1.0, limit=0.0, verdict="failed", text=text),), subset=text)
        add_attack(made, "pgd-002", eps="4/255")
        add_attack(made, "pgd-003", attack=text)
    for output in ("rich", "json", "csv", "markdown", "latex"):
        run([], store, output=output, published=True)
        out = capsys.readouterr().out
        assert out.replace("\n", "").isprintable()
        if output == "csv":
            cells = [cell for row in csv.reader(io.StringIO(out)) for cell in row]
            assert not [cell for cell in cells if cell.startswith(("=", "@", "+"))]
        if output == "latex":
            typeset = "".join(line for line in out.splitlines() if not line.startswith("%"))
            assert r"\input" not in typeset
            assert r"\frac" not in typeset
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert sorted(path.name for path in store.iterdir()) == ["r0", "r1"]
    if text not in DRAWN:  # a second each
        return
    page = tmp_path / "page.html"
    run([], store, output="json", html=page, plot=tmp_path / "p.svg")
    parser = Tags()
    parser.feed(page.read_text())
    assert parser.bad == []
    assert "<script" not in (tmp_path / "p.svg").read_text()


DRAWN = {HOSTILE[name] for name in ("script", "mathtext")}


class Tags(HTMLParser):
    """Collects what a page must not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("script", "link", "iframe", "object", "base", "form", "a"):
            self.bad.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (name in ("src", "href") and not (value or "").startswith("data:")):
                self.bad.append(f"{tag} {name}={value}")


def add_metrics(run: Path, *, start: float = -200.0) -> None:
    lines: list[Line] = []
    for step in range(0, 1501, 50):
        where: dict[str, Any] = {"step": step, "batch": step // 3, "epoch": step / 1500}
        loss = start + 30 * 0.998**step
        lines.append(TrainLine(**where, loss=loss, lr=0.3, gradient_norm=1.0, effective_rank=2.0, feature_std=0.1))
        if step % 500 == 0:
            right: dict[str, Any] = {"n": 1000, "knn": 300, "clean": 200 + step // 5, "robust": 100}
            lines.append(EvaluationLine(**where, **right, eps="8/255", attack="pgd-10"))
    put_lines(run / "metrics.jsonl", lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"torn')
    memory = [
        TimingLine(step=0, batch=0, epoch=0.0, views_per_second=1.0, data_share=0.1, seconds=1.0, peak_memory=size)
        for size in (2**30, 2**31, 2**29)
    ]
    put_lines(run / "timing.jsonl", memory)


def put_lines(path: Path, lines: Sequence[Line]) -> None:
    path.write_text("".join(json.dumps(line.written()) + "\n" for line in lines))


def test_the_page_holds_everything_and_nothing_from_outside(store: Path, tmp_path: Path) -> None:
    for item in (A, B):
        add_metrics(store / item)
        add_attack(store / item, "pgd-002", eps="4/255", robust=[i % 5 < 2 for i in range(1000)])
    page = tmp_path / "page.html"
    run([], store, html=page, published=True, baseline=A)
    text = page.read_text()
    parser = Tags()
    parser.feed(text)
    assert parser.bad == []
    assert parser.tags.count("img") == 8  # three of the results, five of the trainings
    for part in (A, B, "Some CPU", "&#34;replays&#34;: 3", "leads", "published, not measured here", "default-src"):
        assert part in text
    assert not re.search(r"https?://", text)
    for cell in (
        f'<td class="name" data-column="run">{A}</td>',
        '<td class="number" data-column="n">1,000</td>',
        '<td class="long" data-column="recipe">adversary.name=free, adversary.replays=3</td>',
    ):
        assert cell in text  # columns are sized by what they hold, and named where they are stacked


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures(store: Path, tmp_path: Path, suffix: str, magic: bytes) -> None:
    add_metrics(store / A)
    for name in ("one", "two"):
        run([], store, plot=tmp_path / f"{name}{suffix}")
    data = (tmp_path / f"one{suffix}").read_bytes()
    assert data.startswith(magic)
    assert data == (tmp_path / f"two{suffix}").read_bytes()


def drawn(store: Path, title: str) -> Any:
    """One panel of a comparison, as axes whose content can be asked for."""
    from matplotlib.figure import Figure

    found = gather([], store)
    tables = tabulate(found.entries, fold=True, baseline=None, outcomes_of=lambda _: None, order=None)
    axes = Figure().add_subplot()
    curves, _ = learning_curves(tables, found.folders)
    panels(tables, curves)[title](axes)
    return axes


def test_learning_curves_have_a_thin_line_for_each_seed(store: Path) -> None:
    starts = {0: -200.0, 1: -150.0, 2: -100.0}
    for seed, start in starts.items():
        run = store / A if seed == 0 else make_run(store, f"20261122-12010{seed}-a-00000{seed}", seed=seed)
        add_metrics(run, start=start)
        add_attack(run)
    add_metrics(store / B)
    lines = drawn(store, "Training loss").get_lines()
    thin = [line for line in lines if line.get_linewidth() < 1]
    assert sorted(line.get_ydata()[0] for line in thin) == [start + 30 for start in starts.values()]
    assert len({line.get_color() for line in thin}) == 1
    assert len([line for line in lines if line.get_linewidth() > 1]) == 1  # the other recipe's only seed
    assert len([line for line in lines if not str(line.get_label()).startswith("_")]) == 2


def points(axes: Any) -> list[dict[str, Any]]:
    """What each point of a picture says: where it lies, how far its bars reach, and what it is called."""
    from matplotlib.container import ErrorbarContainer

    found = []
    for bars in axes.containers:
        assert isinstance(bars, ErrorbarContainer)
        parts: Any = bars.lines
        line, _, collections = parts
        reach = [segment for collection in collections for segment in collection.get_segments()]
        found.append(
            {
                "x": line.get_xdata()[0],
                "y": line.get_ydata()[0],
                "bars": [
                    sorted([*segment[:, 0]] if bars.has_xerr and not k else [*segment[:, 1]])
                    for k, segment in enumerate(reach)
                ],
                "hollow": line.get_markerfacecolor() == "white",
                "name": None if str(bars.get_label()).startswith("_") else str(bars.get_label()).strip(),
                "colour": line.get_color(),
            }
        )
    return found


def wilson_by_roots(correct: int, n: int) -> list[float]:
    """Percent; where the score test is just not significant: (p - q)^2 = z^2 q (1 - q) / n, solved for q."""
    z2, p = 1.959963984540054**2 / n, correct / n
    a, b, c = 1 + z2, -(2 * p + z2), p * p
    root = (b * b - 4 * a * c) ** 0.5
    return [100 * (-b - root) / (2 * a), 100 * (-b + root) / (2 * a)]


def test_clean_accuracy_lies_on_x_and_robust_on_y_each_with_its_interval(store: Path) -> None:
    axes = drawn(store, "Clean against robust accuracy")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("clean accuracy (%)", "robust accuracy (%), pgd linf 8/255")
    assert axes.get_title() == "Clean against robust accuracy"
    best, other = points(axes)
    assert [(point["name"], point["x"], point["y"]) for point in (best, other)] == [
        ("b", 80.0, 40.0),
        ("a", 70.0, pytest.approx(23.4)),
    ]
    for point, clean, robust in ((best, 800, 400), (other, 700, 234)):
        across, upright = point["bars"]
        assert across == pytest.approx(wilson_by_roots(clean, 1000))
        assert upright == pytest.approx(wilson_by_roots(robust, 1000))
    assert best["colour"] != other["colour"]
    assert [line for line in axes.get_lines() if line.get_linestyle() == "--"] == []  # one alone is the whole front


def test_the_front_is_drawn_through_what_nothing_dominates(store: Path) -> None:
    sure = [i % 10 < 9 for i in range(1000)]
    add_attack(make_run(store, C, name="c", digest="cc"), clean=sure, robust=[i < 300 for i in range(1000)])
    axes = drawn(store, "Clean against robust accuracy")
    (front,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert [*zip(front.get_xdata(), front.get_ydata(), strict=True)] == [(80.0, 40.0), (90.0, 30.0)]  # and not a
    assert front.get_drawstyle() == "steps-pre"


def test_seeds_have_the_spread_as_their_bars(store: Path) -> None:
    more = [i % 10 < 7 for i in range(1000)]
    add_attack(make_run(store, C, seed=1), clean=more, robust=[i < 300 for i in range(1000)])
    folded = next(
        point for point in points(drawn(store, "Clean against robust accuracy")) if "2 seeds" in point["name"]
    )
    assert (folded["x"], folded["y"]) == (70.0, pytest.approx(26.7))
    spread = 6.6 / 2**0.5  # of 23.4 and 30.0, by n - 1
    assert folded["bars"] == [[70.0, 70.0], pytest.approx([26.7 - spread, 26.7 + spread])]


def test_accuracy_against_eps_begins_with_clean_images(store: Path) -> None:
    add_attack(store / A, "pgd-002", eps="4/255", robust=[i % 5 < 2 for i in range(1000)])
    axes = drawn(store, "Accuracy against eps")
    (line,) = axes.get_lines()  # b was attacked at one size
    assert [*line.get_xdata()] == pytest.approx([0.0, 4.0, 8.0])
    assert [*line.get_ydata()] == pytest.approx([70.0, 40.0, 23.4])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("eps (255ths)", "accuracy (%)")
    assert str(line.get_label()).strip() == "a"
    assert axes.get_ylim()[0] == 0


def test_learning_curves_are_those_of_the_metrics(store: Path) -> None:
    add_metrics(store / A)
    add_metrics(store / B)
    axes = drawn(store, "Training loss")
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("epoch", "loss", "Training loss")
    steps = range(0, 1501, 50)
    for line in axes.get_lines():
        assert [*line.get_xdata()] == pytest.approx([step / 1500 for step in steps])
        assert [*line.get_ydata()] == pytest.approx([-200 + 30 * 0.998**step for step in steps])
    axes = drawn(store, "Online accuracy while training")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "clean accuracy (%)")
    assert [str(line.get_label()).strip() for line in axes.get_lines()] == ["b", "a"]
    for line in axes.get_lines():
        assert [*line.get_xdata()] == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert [*line.get_ydata()] == pytest.approx([20.0, 30.0, 40.0, 50.0])


def test_a_step_without_a_loss_has_no_point(store: Path) -> None:
    losses = [-1.0, math.nan, -3.0, math.inf, -5.0]
    rest: dict[str, Any] = {"lr": 0.3, "gradient_norm": 1.0, "effective_rank": 2.0, "feature_std": 0.1}
    lines = [TrainLine(step=k, batch=k, epoch=float(k), loss=loss, **rest) for k, loss in enumerate(losses)]
    put_lines(store / A / "metrics.jsonl", lines)
    (line,) = drawn(store, "Training loss").get_lines()
    assert ([*line.get_xdata()], [*line.get_ydata()]) == ([0.0, 2.0, 4.0], [-1.0, -3.0, -5.0])


def test_time_is_held_against_clean_and_robust_accuracy(store: Path) -> None:
    make_run(store, B, name="b", digest="bb", recipe={"adversary": {"name": "pgd", "steps": 5}}, wall_seconds=90.0)
    axes = drawn(store, "Accuracy against training time")
    found = [(point["x"], point["y"], point["hollow"], point["name"]) for point in points(axes)]
    assert found == [
        (1.5, 80.0, True, None),
        (1.5, 40.0, False, "b"),
        (pytest.approx(700 / 60), 70.0, True, None),
        (pytest.approx(700 / 60), pytest.approx(23.4), False, "a"),
    ]
    assert [point["bars"] for point in points(axes)] == [
        [pytest.approx(wilson_by_roots(right, 1000))] for right in (800, 400, 700, 234)
    ]
    assert axes.get_xlabel() == "training time (min)"
    assert axes.get_ylabel() == "accuracy (%): clean hollow, robust filled\npgd linf 8/255"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (None, "metrics.jsonl"),
        ("{}\nnonsense\n", "metrics.jsonl:2: not a JSON object"),
        ('{"kind":"train","epoch":"x","loss":1.0}\n', "metrics.jsonl:1: epoch is 'x'"),
        ('{"kind":"train","epoch":1.0,"loss":1e999}\n', "metrics.jsonl:1: loss is inf"),
        (f'{{"kind":"train","epoch":1.0,"loss":1{"0" * 400}}}\n', "metrics.jsonl:1: loss is 1000"),
        ('{"kind":"evaluation","epoch":1.0,"clean":7,"n":0}\n', "metrics.jsonl:1: n is 0"),
    ],
    ids=["missing", "torn", "text", "infinite", "huge", "of none"],
)
def test_metrics_that_cannot_be_drawn_are_named_once(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, cause: str
) -> None:
    add_metrics(store / A)
    if text is not None:
        (store / B / "metrics.jsonl").write_text(text)
    page = tmp_path / "page.html"
    run([], store, plot=tmp_path / "a.svg", html=page)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "learning curves" in line]
    assert said.startswith(f"left out: {B}: no learning curves: ")
    assert cause in said
    assert "no learning curves" in page.read_text().partition("<h2>Left out</h2>")[2]
    (line,) = drawn(store, "Training loss").get_lines()  # the other run's
    assert len(line.get_xdata()) == 31


def test_an_imported_run_has_no_learning_curves_and_needs_none(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_attack(make_run(store, C, imported="encoder.pt"))
    add_metrics(store / A)
    add_metrics(store / B)
    run([], store, plot=tmp_path / "a.svg")
    assert "learning curves" not in capsys.readouterr().err


@pytest.mark.parametrize("imported", ["20261122-000000-c-000003", "20261122-230000-c-000003"])
def test_an_imported_run_lends_no_recipe(store: Path, imported: str) -> None:
    add_attack(make_run(store, imported, imported="encoder.pt"))
    recipes = {entry.run.id: entry.run.recipe for entry in gather([], store).entries}
    assert recipes.pop(imported) == {}
    assert all(recipe["adversary.name"] for recipe in recipes.values())


def test_pictures_that_cannot_be(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CfamcError, match=r"cannot draw '\.gif'") as caught:
        run([], store, plot=tmp_path / "a.gif")
    assert caught.value.exit_code == ExitCode.INVALID
    (tmp_path / "none").mkdir()
    with pytest.raises(CfamcError, match="nothing to draw"):
        run([], tmp_path / "none", plot=tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CfamcError, match="drawing needs matplotlib") as caught:
        run([], store, plot=tmp_path / "a.png")
    assert "cfamc[plots]" in caught.value.hint
    with pytest.raises(CfamcError):
        run([], store, html=tmp_path)
    assert capsys.readouterr().out == ""  # the error is the one object on stdout
    run([], store, html=tmp_path / "page.html")
    assert "No pictures: drawing needs matplotlib" in (tmp_path / "page.html").read_text()


def test_the_checklist_adds_up_every_record(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours are of training and evaluation, of what is not finished too; bars of seeds are no bars of samples."""
    second = make_run(store, "20261122-120007-a-000007", name="a", seed=1)
    add_attack(second)
    for made in (second, store / A):
        add_probe(made)
    make_run(store, "20261122-120008-cut-000008", digest="cc", status="interrupted", wall_seconds=1800.0)
    run([], store, output="rich", checklist=True)
    out = capsys.readouterr().out
    records = [found.record() for found in list_runs(store)]
    attacks, probes = len(list(store.glob("*/attacks/*"))), len(list(store.glob("*/probes/*")))
    hours = (sum(record.wall_seconds for record in records) + attacks * 1.0 + probes * 30.0) / 3600
    assert f"\n{hours:,.2f} hours in all, those of 1 unfinished runs among them" in out
    assert "Partly. \u00b1 is the sample standard deviation (n - 1) over seeds" in out
    assert re.search(r"\(2 seeds\)[^|]*\| 2 \| 1,000 \| 7.\.0 \u00b1 .\.. \| ", out)
    assert "| cifar10 | test 1,000, train 50,000 | open: not recorded |" in out
    assert "- cfamc 0.1.0, revision 000000000000, torch 2.9.0" in out
    assert KNOWN_SETS["svhn"].licence == "for non-commercial use only"


def test_a_narrow_terminal_loses_no_accuracy(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for columns in (40, 90, 140, 400):
        monkeypatch.setenv("COLUMNS", str(columns))
        run([], store, output="rich", baseline=A)
        out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert re.search(r"80\.0( |\s[^\]]*\s)\[77\.4, 82\.4\]", out)
        assert "adversary.name=pgd, adversary.steps=5" in " ".join(out.split())
        assert "\u2026" not in out  # no number is cut
        assert (f"\n{B}: adversary.name=pgd, adversary.steps=5" in out) == (columns == 140), columns


def test_a_long_table_says_what_it_leaves_out(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([], store, output="rich", limit=1)
    assert "1 more rows; --limit 0 shows all\n" in capsys.readouterr().out
    run([], store, output="rich", limit=0)
    assert A in capsys.readouterr().out


def test_markdown_and_latex_and_csv_have_a_cell_for_each_column(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([], store, output="markdown", baseline=A)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {16}
    run([], store, output="latex", baseline=A)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {14}
    run([], store, output="csv", baseline=A)
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert len({len(row) for row in rows}) == 1


def test_cells_of_text_tables(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([], store, output="markdown", baseline=A)
    title, _, head, _, first, second, *rest = capsys.readouterr().out.splitlines()
    assert title.startswith("### cifar10 test images (63696661), linear head on pre\\_feature, pgd (restarts 1, ")
    assert title.endswith("step\\_size 0.01, steps 20), linf 8/255 in image space")
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (head, first, second)]
    assert dict(zip(cells[0], cells[1], strict=True)) == {
        "": r"\*",
        "run": B,
        "clean %": r"80.0 \[77.4, 82.4\]",
        "robust %": r"40.0 \[37.0, 43.1\]",
        "clean diff": "+10.0",
        "clean p": r"\< 0.0001",
        "robust diff": "+16.6",
        "robust p": r"\< 0.0001",
        "shared": "1,000",
        "n": "1,000",
        "time": "11 min 40 s",
        "epochs": "1",
        "passes": "3.6 M (3.0 M)",
        "recipe": "adversary.name=pgd, adversary.steps=5",
        "note": "",
    }
    assert cells[2][1:9] == [A, r"70.0 \[67.1, 72.8\]", r"23.4 \[20.9, 26.1\]", "", "", "", "", ""]
    assert cells[2][-2:] == ["adversary.name=free, adversary.replays=3", "baseline"]
    assert rest[1] == (
        f"{B} leads {A} by 16.6 points of robust accuracy on 1,000 shared samples: more than chance "
        r"(McNemar p \< 0.0001)"
    )
    run([], store, output="latex", baseline=A)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [r"\begin{tabular}{llrrrrrrrrrrrll}", r"\toprule", lines[4]]
    assert lines[6] == (
        rf"{{*}} & {B} & 80.0 {{[}}77.4, 82.4] & 40.0 {{[}}37.0, 43.1] & +10.0 & \textless{{}} 0.0001 & +16.6 & "
        r"\textless{} 0.0001 & 1,000 & 1,000 & 11 min 40 s & 1 & 3.6 M (3.0 M) & "
        r"adversary.name=pgd, adversary.steps=5 &  \\"
    )


@pytest.mark.parametrize(("adversary", "ascent"), [("pgd", 5 * 1000), ("free", 0)])
def test_cost_is_all_passes_of_older_records_too(
    store: Path, capsys: pytest.CaptureFixture[str], adversary: str, ascent: int
) -> None:
    """PGD-5 on the second of two views takes 5 passes of each of 1,000 images; records of before do not say so."""
    steps = {"adversary": {"steps": 5}} if adversary == "pgd" else {}
    recipe = tiny_recipe("simclr", adversary, **steps, train={"batch_size": 10})
    totals = Totals(steps=100, view_passes=2000, parameters=2_000_000)
    older = make_run(store, C, name="c", digest="cc", totals=totals, data=data_used("train", 1000))
    (older / "resolved.json").write_text(json.dumps(recipe.resolved()))
    add_attack(older)
    rows = {row["runs"][0]: row for row in result(capsys, [], store)["tables"][0]["rows"]}
    assert [(rows[run]["view_passes"], rows[run]["attack_view_passes"]) for run in (B, C)] == [
        (600_000, 3_000_000),
        (2000, ascent),
    ]
    assert names(result(capsys, [], store, where=["passes<5000"])) == ([] if ascent else [[C]])


def test_cells_of_the_csv_and_the_json(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_attack(make_run(store, C, seed=1), robust=[i < 300 for i in range(1000)])
    run([], store, output="csv", baseline=B)
    best, folded = csv.DictReader(io.StringIO(capsys.readouterr().out))
    shares = {key: float(value) for key, value in best.items() if key.startswith(("clean", "robust")) and value}
    low, high = zip(wilson_by_roots(800, 1000), wilson_by_roots(400, 1000), strict=True)
    assert shares == pytest.approx(
        {
            **{"clean": 0.8, "clean_low": low[0] / 100, "clean_high": high[0] / 100},
            **{"robust": 0.4, "robust_low": low[1] / 100, "robust_high": high[1] / 100},
        }
    )
    shares = {key: float(value) for key, value in folded.items() if key.startswith(("clean", "robust")) and value}
    spread = 0.066 / 2**0.5
    means = {"clean": 0.7, "clean_std": 0.0, "robust": 0.267, "robust_std": spread}
    assert shares == pytest.approx(means | {"clean_diff": -0.1, "robust_diff": -0.133})
    said = ("label", "runs", "seeds", "seconds", "n", "front", "baseline", "adversary.name", "origin", "eps")
    assert [best[key] for key in said] == [B, B, "0", "700.0", "1000", "True", "True", "pgd", "measured", "8/255"]
    told = ["a (2 seeds)", f"{A} {C}", "0 1", "700.5", "1000", "False", "False", "free", "measured", "8/255"]
    assert [folded[key] for key in said] == told
    (table,) = result(capsys, [], store, baseline=A, fold=False)["tables"]
    row = table["rows"][0]
    assert row["label"] == B
    for which, right in (("clean", 800), ("robust", 400)):
        low_end, high_end = wilson_by_roots(right, 1000)
        assert row[which] == pytest.approx(
            {"value": right / 1000, "n": 1000, "runs": 1, "std": None, "low": low_end / 100, "high": high_end / 100}
        )
    mine = [i % 10 < 8 and i % 2 == 0 for i in range(1000)]
    theirs = [i % 10 < 7 and i % 3 == 0 for i in range(1000)]
    gained, lost = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((mine, theirs), (theirs, mine)))
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    exact = {"value": 0.166, "shared": 1000, "gained": gained, "lost": lost, "p": 2 * tail / 2 ** (gained + lost)}
    assert row["against"]["robust"] == pytest.approx(exact)


@pytest.mark.parametrize("label", ["*", "[1em]"])
def test_no_latex_command_takes_the_start_of_a_row_for_its_argument(label: str) -> None:
    text = sheets.latex(sheets.Sheet("title", (label, "n"), (1,), ((label, "1"), (label, "2"))))
    body = text.partition("\\toprule")[2]
    assert not re.search(r"(\\\\|\\[a-z]+)\s*[*\[]", body)
    assert body.count(f"{{{label[0]}}}{label[1:]} & ") == 3


MEASURE = """
    import json, sys, time
    start = time.process_time()
    for _ in range(3_000_000):
        pass
    loop = time.process_time() - start
    from pathlib import Path
    from cfamc_cli.commands.compare import compare
    compare(
        [], runs=Path(sys.argv[1]), where=[], sort="", baseline=None, published=False, fold=sys.argv[2] == "fold",
        limit=50, output="rich", plot=None, html=None,
    )
    status = Path("/proc/self/status").read_text()  # ru_maxrss would tell of the parent too
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    seconds = time.process_time() - start - loop
    print(json.dumps([loop, seconds, peak, "torch" in sys.modules]), file=sys.stderr)
"""


def measure(store: Path, fold: str) -> tuple[float, float]:
    """Seconds and MiB that a comparison takes; seconds of a quiet machine, by the time of an empty loop."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(store), fold]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    loop, seconds, peak, torch = json.loads(done.stderr.splitlines()[-1])
    assert not torch
    print(f"{fold}: {seconds:.1f} s of processor time, {peak:.0f} MiB")
    return seconds / max(1.0, loop / 0.09), peak


def test_a_comparison_takes_less_than_a_second_and_no_torch(store: Path) -> None:
    seconds, peak = measure(store, "fold")
    assert seconds < 1
    assert peak < 250


@pytest.mark.slow
def test_ten_thousand_runs_in_five_seconds_and_250_megabytes(tmp_path: Path) -> None:
    made = make_run(tmp_path / "one", A, recipe={"model": {f"key{k}": k for k in range(50)}, "lr": "LEARNING"})
    add_probe(made)
    add_attack(made)
    files = {path.relative_to(made): path.read_text() for path in made.rglob("*.json")}
    rng = random.Random(0)
    for number in range(10_000):
        folder = tmp_path / "runs" / f"20261122-120000-a-{number:06x}"
        correct = rng.randrange(200, 300)
        changes = {
            A: folder.name,
            '"seed": 0': f'"seed": {number % 3}',
            '"recipe_digest": "aa"': f'"recipe_digest": "{number // 3:064x}"',
            "LEARNING": f"{number // 3}",
            '"correct": 234': f'"correct": {correct}',
        }
        for path, text in files.items():
            for old, new in changes.items():
                text = text.replace(old, new)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    for fold in ("fold", "single"):
        seconds, peak = measure(tmp_path / "runs", fold)
        assert seconds < 5
        assert peak < 250


def test_what_may_not_be_read_is_left_out(store: Path) -> None:
    """A run, a folder of probes and an attack that belong to somebody else cost nobody the table."""
    paths = [make_run(store, f"20261122-12000{place}-x-00000{place}", digest=f"d{place}") for place in (6, 7, 8)]
    for path in paths:
        add_attack(path)
        add_attack(path, "pgd-002")
    (paths[1] / "probes").mkdir()
    closed = [paths[0], paths[1] / "probes", paths[2] / "attacks" / "pgd-002"]
    for path in closed:
        path.chmod(0)
    for path in (store, *store.parents):  # which are this user's own
        if path.owner() == store.owner() and path != Path(tempfile.gettempdir()):
            path.chmod(path.stat().st_mode | 0o755)
    child = os.fork()
    if child == 0:  # another user, for root may read all
        with suppress(BaseException):
            if os.geteuid() == 0:
                os.seteuid(65534)
            found = gather([], store)
            rows = Counter(entry.run.id for entry in found.entries)
            left_out = [what for what, why in found.left_out if "ermission denied" in why]
            expected = [paths[0].name, f"{paths[1].name} probes", f"{paths[2].name} attacks/pgd-002"]
            right = left_out == expected and len(found.left_out) == 3
            os._exit(0 if right and rows == Counter({A: 1, B: 1, paths[1].name: 2, paths[2].name: 1}) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for path in closed:
        path.chmod(0o755)


def test_a_killed_run_is_told_from_one_that_runs(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By who holds it: nobody, a process that is gone, this one, or one of a machine of which nothing is known."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    running: dict[str, Any] = {"status": "running", "progress": Progress(batch=4, step=12, epoch=0.1, total=1500)}
    here: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    holders: dict[str, dict[str, Any] | None] = {
        "nobody": None,
        "gone": here | {"pid": gone.pid},
        "here": here,
        "elsewhere": {"host": "other", "pid": 1},
    }
    for name, holder in holders.items():
        path = make_run(store, f"20261122-120009-{name}-000009", **running)
        if holder is not None:
            (path / ".lock").write_text(json.dumps(holder))
    why = {item["what"].split("-")[2]: item["why"] for item in result(capsys, [], store)["left_out"]}
    dead, alive = "killed, or its machine went down, after 12 of 1,500", "running after 12 of 1,500"
    assert why == {name: f"{dead if name in ('nobody', 'gone') else alive} weight updates" for name in holders}
