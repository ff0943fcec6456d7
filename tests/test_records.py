from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import COMPUTATION, attack_record, probe_record, run_record

from cfamc_cli import __version__
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.store import environment, records
from cfamc_cli.store.files import JsonLines
from cfamc_cli.store.records import (
    Accuracy,
    AttackRecord,
    AttackResult,
    Environment,
    Evaluation,
    Failure,
    Outcomes,
    ProbeRecord,
    ProbeResult,
    RunRecord,
    StageOutcome,
    load_record,
)

FAILED = run_record(
    evaluation=Evaluation(
        epoch=1.0, knn=None, clean=Accuracy.of(7, 10), robust=Accuracy.of(3, 10), eps="8/255", attack="pgd-10"
    ),
    failure=Failure(message="a", exit_code=3, step=4, loss=float("nan"), gradient_norm=float("inf")),
)
UNDER_WAY = Outcomes(
    n=6,
    block=4,
    order_digest="0b",
    data_fingerprint="f",
    done=4,
    clean="0d",
    stages=(StageOutcome(name="pgd", done=4, robust="05", broken="08", passes=((4, 3),)),),
    key="aa",
)


@pytest.mark.parametrize("record", [FAILED, probe_record(), attack_record()], ids=lambda record: record.id)
def test_a_record_comes_back_as_it_was(tmp_path: Path, record: records.Record) -> None:
    records.save_record(tmp_path / "record.json", record)
    assert records.load_record(tmp_path / "record.json", type(record)) == record


@pytest.mark.parametrize(
    ("record", "read"),
    [
        (FAILED, RunRecord),
        (probe_record(), ProbeRecord),
        (probe_record(), ProbeResult),
        (attack_record(), AttackResult),
        (UNDER_WAY, Outcomes),
    ],
    ids=lambda part: part.__name__ if isinstance(part, type) else "",
)
def test_no_flipped_bit_of_a_record_is_taken_for_its_word(
    tmp_path: Path, record: records.Record, read: type[records.Record]
) -> None:
    path = tmp_path / "record.json"
    records.save_record(path, record)
    whole, known = path.read_bytes(), load_record(path, read)
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(whole):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
            with suppress(CfamcError):
                assert load_record(path, read) == known, whole[place - 20 : place + 20]
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert load_record(path, read) == known


def test_a_record_that_was_edited_is_read_once_its_editor_vouches_for_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.save_record(path, FAILED)
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content, indent=8))
    assert load_record(path, RunRecord) == FAILED
    content["name"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(CfamcError, match=r"run\.json was changed after it was written") as caught:
        load_record(path, RunRecord)
    assert (caught.value.exit_code, "sha256" in caught.value.hint) == (ExitCode.BAD_DATA, True)
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert load_record(path, RunRecord).name == "another"


def test_what_is_not_finite_or_no_text_is_stored_as_such(tmp_path: Path) -> None:
    failure = Failure(message="a\udcffb", exit_code=3, loss=float("nan"), gradient_norm=float("inf"))
    records.save_record(tmp_path / "run.json", run_record(failure=failure))
    stored = json.loads((tmp_path / "run.json").read_bytes())["failure"]
    assert stored["message"] == "a\\udcffb"
    assert stored["loss"] is None
    assert stored["gradient_norm"] is None


def test_a_record_that_breaks_its_schema_is_never_written(tmp_path: Path) -> None:
    for change in ({"seed": "0"}, {"wall_seconds": float("nan")}, {"status": "done"}):
        with pytest.raises(ValueError, match=r"validation error|not JSON compliant"):
            records.save_record(tmp_path / "run.json", run_record(**change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"run\.json: schema version 2, where 1 is known"),
        ({"schema_version": "x" * 1000}, r"run\.json: schema version 'x+, where 1 is known"),
        ({"colour": 1}, r"run\.json: colour: Extra inputs are not permitted"),
        ({"seed": True}, r"run\.json: seed: Input should be a valid integer"),
        ({"seed": "1"}, r"run\.json: seed: Input should be a valid integer"),
        ({"wall_seconds": float("nan")}, r"run\.json: wall_seconds: Input should be a finite number"),
        ({"progress": {"step": -1}}, r"run\.json: progress\.step: Input should be greater than or equal to 0"),
        ({"created": "yesterday"}, r"run\.json: created: "),
        ({"status": "\x1b[31m\n" + "x" * 10**6}, r"run\.json: status: Input should be 'created'"),
    ],
)
def test_a_foreign_record_is_refused_in_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_record().model_dump(mode="json") | change))
    with pytest.raises(CfamcError, match=message) as caught:
        records.load_record(path, RunRecord)
    assert caught.value.exit_code == ExitCode.BAD_DATA
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"<html>", b"[" * 100_000, b"\0" * 100, b"null"])
def test_damage_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(data)
    with pytest.raises(CfamcError, match=r"run\.json: ") as caught:
        records.load_record(path, RunRecord)
    assert caught.value.message.isprintable()


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_solves_its_defining_equation(case: tuple[int, int]) -> None:
    """Independent form: both ends p satisfy (p_hat - p)^2 = z^2 p (1 - p) / n."""
    correct, n = case
    for end in records.wilson(correct, n):
        assert abs((correct / n - end) ** 2 - 3.8414588206941254 * end * (1 - end) / n) < 1e-12
    low, high = records.wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),  # as scipy.stats.binomtest(...).proportion_ci(method="wilson") gives them
    [
        (7, 10, 0.39677814746114526, 0.892208732593699),
        (50, 100, 0.4038315303659956, 0.5961684696340044),
        (0, 10, 0.0, 0.27753279986288926),
        (10, 10, 0.7224672001371109, 1.0),
        (913, 1000, 0.8939135189433065, 0.9289255785476249),
        (4321, 10_000, 0.42241886572565823, 0.44183328125307963),
    ],
)
def test_an_accuracy_has_its_counts_its_value_and_wilsons_interval(
    correct: int, n: int, low: float, high: float
) -> None:
    made = Accuracy.of(correct, n)
    assert (made.correct, made.n, made.value) == (correct, n, correct / n)
    assert (made.low, made.high) == pytest.approx((low, high), abs=1e-12)


def test_known_interval() -> None:
    assert records.wilson(1, 10) == pytest.approx((0.017876213095072924, 0.4041500267952385))
    with pytest.raises(ValueError, match="3 of 2"):
        Accuracy.of(3, 2)
    with pytest.raises(ValueError, match="0 of 0"):
        Accuracy.of(0, 0)


@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(bits: list[bool]) -> None:
    text = records.pack_bits(bits)
    assert records.unpack_bits(text, len(bits)) == bits
    assert len(text) == -(-len(bits) // 4)
    assert int(text or "0", 16).bit_count() == sum(bits)
    Outcomes(
        n=len(bits),
        block=8,
        order_digest="",
        data_fingerprint="",
        done=len(bits),
        clean=text,
        stages=(StageOutcome(name="pgd", done=0, robust=""),),
    )


def test_the_environment_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2-swordfish"
    for index in range(30):
        kind = ("TOKEN", "PASSWORD", "AWS_SECRET_ACCESS_KEY", "API_KEY", "CREDENTIALS")[index % 5]
        monkeypatch.setenv(f"{kind}_{index}", secret)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "__init__.py").write_text("")
    remote = f"https://me:{secret}@example.org/x.git"
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["remote", "add", "origin", remote], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run(["git", *identity, *arguments], cwd=checkout, check=True)
    monkeypatch.setattr(environment, "__file__", str(checkout / "store" / "environment.py"))
    captured = environment.capture_environment("cpu", None)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    assert captured.git_revision == head.stdout.strip()
    assert not captured.git_changed
    (checkout / "__init__.py").write_text("x = 1")
    assert environment.capture_environment("cpu", None).git_changed
    text = captured.model_dump_json()
    assert secret not in text
    assert not [name for name in os.environ if len(os.environ[name]) > 15 and os.environ[name] in text]


def test_the_environment_is_that_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nmodel name\t: Other\n"}
    versions = {"torch": "2.99.1", "torchvision": "0.99.2"}
    monkeypatch.setattr(Path, "read_text", lambda path, **_: texts[str(path)])
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5}, raising=False)
    monkeypatch.setattr(environment, "_git_state", lambda _: ("ab12", True))
    assert environment.capture_environment("a GPU", COMPUTATION) == Environment(
        cfamc=__version__,
        python=".".join(map(str, sys.version_info[:3])),
        torch="2.99.1",
        torchvision="0.99.2",
        platform=platform.platform(),
        cpu="Some CPU: 3 GHz",
        cores=3,
        device="a GPU",
        git_revision="ab12",
        git_changed=True,
        computation=COMPUTATION,
    )


def test_a_record_of_an_older_version_does_not_say_how_it_was_computed(tmp_path: Path) -> None:
    written = json.loads(run_record().model_dump_json())
    del written["environment"]["computation"]
    (tmp_path / "run.json").write_text(json.dumps(written))
    assert records.load_record(tmp_path / "run.json", RunRecord).environment.computation is None


def test_a_package_outside_any_checkout_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "store" / "environment.py"))
    assert environment.capture_environment("cpu", None).git_revision is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.capture_environment("cpu", None).git_revision is None


WHERE: dict[str, Any] = {"step": 6, "batch": 2, "epoch": 0.5}


def test_a_metric_line_is_written_in_the_order_of_its_fields_and_read_back(tmp_path: Path) -> None:
    train = records.TrainLine(
        **WHERE, lr=0.3, loss=-1.5, gradient_norm=2.0, coding_rate=3.0, effective_rank=4.0, feature_std=0.9
    )
    evaluation = records.EvaluationLine(**WHERE, n=10, knn=4, clean=7, robust=2, eps="8/255", attack="pgd-10")
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        lines.append(train.written())
        lines.append(evaluation.written())
    assert path.read_text() == (
        '{"kind":"train","step":6,"batch":2,"epoch":0.5,"lr":0.3,"loss":-1.5,"gradient_norm":2.0,"coding_rate":3.0,'
        '"effective_rank":4.0,"feature_std":0.9}\n'
        '{"kind":"evaluation","step":6,"batch":2,"epoch":0.5,"n":10,"knn":4,"clean":7,"robust":2,"eps":"8/255",'
        '"attack":"pgd-10"}\n'
    )
    assert records.read_metrics(path) == [train, evaluation]
    kept = evaluation.evaluation()
    assert (kept.epoch, kept.eps, kept.attack) == (0.5, "8/255", "pgd-10")
    assert [part and (part.correct, part.n) for part in (kept.knn, kept.clean, kept.robust)] == [
        (4, 10),
        (7, 10),
        (2, 10),
    ]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{}", "kind is missing"),
        ('{"kind":"other"}', "kind is 'other'"),
        ('{"kind":"grip","step":-1}', "step is -1"),
        ('{"kind":"grip","step":1e999}', "step is inf"),
        (
            '{"kind":"grip","step":1,"batch":1,"epoch":0,"clean":1,"trained":1,"strongest":1,"lost":true}',
            "strength is miss",
        ),
        ('{"kind":"grip","unknown":1}', "unknown is 1"),
    ],
)
def test_a_line_that_is_no_metric_is_named(line: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(CfamcError, match=re.escape(f"{path}:1: {cause}")) as caught:
        records.read_metrics(path)
    assert caught.value.exit_code == ExitCode.BAD_DATA


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("clean.value", 0.97, "value and interval are not those of 700 of 1000"),
        ("clean.n", 1008, "value and interval are not those of 700 of 1008"),
        ("robust.low", 0.2, "value and interval are not those of 300 of 1000"),
        ("robust.correct", 1001, "value and interval are not those of 1001 of 1000"),
        ("data.n", 999, "its accuracies are not of the same samples"),
        ("robust", Accuracy.of(701, 1000).model_dump(), "its accuracies are not of the same samples"),
        ("robust", Accuracy.of(301, 1000).model_dump(), "its accuracies are not the sums of those of its classes"),
        ("clean", Accuracy.of(699, 1000).model_dump(), "its accuracies are not the sums of those of its classes"),
    ],
)
def test_an_attack_that_contradicts_itself_is_no_record(key: str, value: object, why: str, tmp_path: Path) -> None:
    refuse(attack_record(), key, value, why, tmp_path / "record.json")


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("test_accuracy", Accuracy.of(701, 1000).model_dump(), "its accuracy is not that of its confusion matrix"),
        ("test.n", 1001, "its accuracy is not that of its confusion matrix"),
        ("confusion.3", [70] * 10, "the accuracies of its classes are not those of its confusion matrix"),
        ("classes.3.accuracy", None, "the accuracies of its classes are not those of its confusion matrix"),
    ],
)
def test_a_probe_that_contradicts_itself_is_no_record(key: str, value: object, why: str, tmp_path: Path) -> None:
    refuse(probe_record(), key, value, why, tmp_path / "record.json")


def refuse(record: ProbeRecord | AttackRecord, key: str, value: object, why: str, path: Path) -> None:
    """Edit one value of a record on disk, and see it refused for that."""
    whole = record.model_dump(mode="json")
    *above, last = key.split(".")
    part: Any = whole
    for name in above:
        part = part[int(name) if isinstance(part, list) else name]
    part[int(last) if isinstance(part, list) else last] = value
    path.write_text(json.dumps(whole))
    with pytest.raises(CfamcError, match=re.escape(why)) as refused:
        load_record(path, type(record))
    assert refused.value.exit_code == ExitCode.BAD_DATA
