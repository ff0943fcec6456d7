"""`cfamc attack`: what is asked, what is kept, what a cut costs (nothing), and what a person is told."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stages import ensemble
from tiny import recipe_text, the_run, tiny_recipe

from cfamc_cli import cli
from cfamc_cli.commands import attack as command
from cfamc_cli.commands.attack_report import Result, curves
from cfamc_cli.commands.attack_settings import Flags, asked_attacks
from cfamc_cli.commands.common import Options, session
from cfamc_cli.commands.pretrain import pretrain
from cfamc_cli.commands.probe import Request, ensure_head, load_judged_images, probe
from cfamc_cli.engine.attacks import plan as autoattack
from cfamc_cli.engine.attacks.plan import plan, run_stage, stage_name
from cfamc_cli.engine.checkpoint import read_tensors
from cfamc_cli.engine.corruptions import KINDS, corrupted
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.device import computation
from cfamc_cli.engine.evaluation import audit, blocks, honesty
from cfamc_cli.engine.evaluation.pictures import loss_by_step, loss_surface
from cfamc_cli.engine.heads import classifier as heads
from cfamc_cli.engine.heads.classifier import Classifier
from cfamc_cli.engine.randomness import balanced_order
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.schema import AutoAttackAttack, Stage
from cfamc_cli.store.outcomes import Ledger
from cfamc_cli.store.records import (
    Accuracy,
    AttackRecord,
    ClassRobustness,
    Outcome,
    Outcomes,
    ProbeRecord,
    load_record,
    unpack_bits,
)
from cfamc_cli.store.runs import HEAD, RunFolder, list_runs, lock

BLOCK = 8
PGD = ("--eps", "1/255", "--steps", "3", "--limit", "20", "--head", "linear")
QUICK = audit.AuditSettings(samples=6, steps=3, queries=20)
Attack = Callable[..., tuple[int, str, str]]
NAMES = ("pgd", "fgsm", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "square", "autoattack", "autoattack-rand", "embedding")
ATTACKS = '[[attack]]\nname = "pgd"\neps = "1/255"\nsteps = 2\n[[attack]]\nname = "fgsm"\neps = "4/255"\n'


def head_of(run: RunFolder, options: Options, probe: str | None = None) -> Path:
    with session(options) as working:
        return ensure_head(run, encoder_in(run), working, probe=probe)


def encoder_in(run: RunFolder) -> heads.LoadedEncoder:
    return heads.load_encoder(run.checkpoints, run.recipe().model, device=torch.device("cpu"), talk=NullTalk())


def classifier_in(run: RunFolder, folder: Path) -> Classifier:
    record = load_record(folder / "record.json", ProbeRecord)
    return heads.load_classifier(encoder_in(run), record, folder / HEAD, run.recipe())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run and its linear head."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.toml"
    path.write_text(recipe_text() + '[probe]\nhead = "linear"\nprotocol = "converged"\n' + ATTACKS)
    options = Options(device="cpu", runs=folder / "runs", quiet=True)
    pretrain(str(path), overrides=[], seeds=[], resume=None, dry_run=False, force=False, options=options)
    (run,) = list_runs(folder / "runs")
    head_of(run, options)
    return folder / "runs"


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)


@pytest.fixture(autouse=True)
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process would make is made in this one: seconds less for each audit."""
    monkeypatch.setattr(audit, "in_new_process", lambda anew, points: anew()(points))


@pytest.fixture
def attack(store: Path, capsys: pytest.CaptureFixture[str]) -> Attack:
    """Run the command line in this process: exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(["attack", "--runs", str(store), "--device", "cpu", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def kept(store: Path, item: str = "pgd-001") -> tuple[bytes, dict[str, Any]]:
    """The bytes of the outcomes, and the record without its times."""
    folder = the_run(store).attacks / item
    record = json.loads((folder / "record.json").read_bytes())
    for key in ("created", "wall_seconds", "environment", "sha256"):  # the revision of a checkout may change meanwhile
        del record[key]
    for stage in record["stages"]:
        del stage["wall_seconds"]
    return (folder / "outcomes.json").read_bytes(), record


# What is asked for


def test_without_flags_the_recipe_decides() -> None:
    tables = [{"name": "fgsm", "eps": "4/255"}, {"name": "autoattack"}]
    asked = asked_attacks(Flags(limit=5, audit=True), tiny_recipe(attack=tables))
    assert [table.model_dump(exclude_unset=True) for table in asked] == tables
    with pytest.raises(CfamcError, match="no \\[\\[attack\\]\\]"):
        asked_attacks(Flags(), tiny_recipe(attack=[]))


def test_any_flag_means_pgd_of_the_official_protocol() -> None:
    (asked,) = asked_attacks(Flags(steps=7), tiny_recipe())
    assert asked.model_dump() == {
        "name": "pgd",
        "eps": "8/255",
        "norm": "linf",
        "step_size": "0.01",
        "steps": 7,
        "restarts": 1,
        "start": "zero",
    }
    curve = asked_attacks(Flags(eps=("2/255", "0.01")), tiny_recipe())
    assert [(table.eps, table.model_dump()["steps"]) for table in curve] == [("2/255", 20), ("0.01", 20)]
    (again,) = asked_attacks(Flags(restarts=3), tiny_recipe())
    assert (again.model_dump()["restarts"], again.model_dump()["start"]) == (3, "zero")


def test_l2_has_defaults_of_its_own() -> None:
    (asked,) = asked_attacks(Flags(norm="l2"), tiny_recipe())
    assert (asked.eps, asked.model_dump()["step_size"]) == ("128/255", "0.1")
    assert asked_attacks(Flags(norm="l2", eps=("1",)), tiny_recipe())[0].eps == "1"
    assert plan(asked_attacks(Flags(norm="l2", eps=("1.5",)), tiny_recipe())[0], classes=10).eps == 1.5
    assert tiny_recipe(attack=[{"name": "fgsm", "norm": "l2"}]).attack[0].eps == "128/255"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_every_attack_reaches_the_engine(name: str, norm: str) -> None:
    (asked,) = asked_attacks(Flags(attack=name, norm=norm, eps=("3/255",)), tiny_recipe())
    made = plan(asked, classes=10)
    assert (made.eps, made.norm) == (3 / 255, norm)
    if not isinstance(asked, AutoAttackAttack):
        assert made.stages == (asked,)


@pytest.mark.parametrize("name", NAMES)
def test_a_search_in_float32_is_as_evaluations_were_known_before(name: str) -> None:
    (plain,) = asked_attacks(Flags(attack=name), tiny_recipe())
    (short,) = asked_attacks(Flags(attack=name, search_precision="tf32"), tiny_recipe())
    assert asked_attacks(Flags(attack=name, search_precision="float32"), tiny_recipe()) == (plain,)
    assert short.model_dump() == plain.model_dump() | {"search_precision": "tf32"} != plain.model_dump()
    for asked in (plain, short):
        assert {stage.search_precision for stage in plan(asked, classes=10).stages} == {asked.search_precision}


WRONG = [
    (("--eps", "8"), "error: --eps: 8 is larger than 1: did you mean 8/255?"),
    (("--eps", "8/0"), "error: --eps: '8/0' divides by zero"),
    (("--eps", "-1/255"), "error: --eps: '-1/255' is not a number such as 8/255 or 0.03 between 0 and 1"),
    (("--eps", "nan"), "error: --eps: 'nan' is not a number such as 8/255 or 0.03 between 0 and 1"),
    (("--eps", "8/255", "--eps", "16/510"), "error: --eps: a radius is given twice"),
    (("--step-size", "x"), "error: --step-size: 'x' is not a number such as 8/255 or 0.03 between 0 and 1"),
    (("--step-size", "2", "--norm", "linf"), "error: --step-size: 2 is larger than 1: did you mean 2/255?"),
    (("--step-size", "0"), "error: --step-size: must be above 0"),
    (("--attack", "agpd-ce"), 'error: --attack: "agpd-ce" is no attack\nhint: did you mean "apgd-ce"?'),
    (("--attack", "fgsm", "--steps", "3"), "error: --steps has no effect on fgsm"),
    (("--attack", "square", "--step-size", "0.01"), "error: --step-size has no effect on square"),
    (("--steps", "0"), "error: --steps: should be greater than or equal to 1"),
    (("--restarts", "-1"), "error: --restarts: should be greater than or equal to 1"),
    (("--norm", "l1"), "error: --norm: should be 'linf' or 'l2'"),
    (("--search-precision", "half"), "error: --search-precision: should be 'float32' or 'tf32'"),
    (("--search-precision", "tf32"), "error: search_precision: cpu has no tf32\nhint: leave it at float32"),
    (("--space", "pixels"), 'error: --space: "pixels" is neither "image" nor "crops"'),
    (("--space", "crops", "--save-examples", "3"), "error: --save-examples shows whole images"),
    (("--space", "crops", "--plot"), "error: --plot shows whole images"),
    (("--limit", "0"), "error: Invalid value for '--limit'"),
    (("--limit", "1001"), "error: --limit: 1,001 is more than the 1,000 test images of fashion-mini"),
    (("--head", "linear-009"), "has no probe 'linear-009'"),
    (("--space", "crops"), "error: --space crops attacks the crops of an aggregated head"),
    (("--device", "abacus"), "error: device 'abacus' is not available here"),
    (("2025",), "error: no run '2025' in"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_is_wrong_is_told_in_a_line(attack: Attack, arguments: Sequence[str], message: str) -> None:
    code, out, err = attack(*arguments)
    assert code == ExitCode.INVALID
    assert out == ""
    assert message in err
    assert err.count("error:") == 1
    assert "Traceback" not in err


def test_a_run_without_a_checkpoint(attack: Attack, store: Path) -> None:
    run = the_run(store)
    shutil.rmtree(run.checkpoints)
    code, _, err = attack(run.id)
    assert code == ExitCode.BAD_DATA
    assert f"hint: go on with: cfamc pretrain --resume {run.path}" in err  # which is found from anywhere
    code, _, err = attack()
    assert code == ExitCode.INVALID
    assert "none of the 1 runs fits" in err


# What is kept


def test_an_evaluation(attack: Attack, store: Path) -> None:
    code, out, err = attack(*PGD)
    assert code == 0
    assert "pgd linf 1/255 20/20" in err
    assert "no audit" in out
    run = the_run(store)
    folder = run.attacks / "pgd-001"
    assert sorted(path.name for path in folder.iterdir()) == ["outcomes.json", "record.json", "timing.jsonl"]
    record, outcomes = (
        load_record(folder / "record.json", AttackRecord),
        load_record(folder / "outcomes.json", Outcomes),
    )
    probe = load_record(run.probes / record.probe / "record.json", ProbeRecord)
    assert (record.threat.space, record.threat.norm, record.threat.eps) == ("image", "linf", "1/255")
    assert (record.encoder_digest, record.head_digest) == (probe.encoder_digest, probe.head_digest)
    assert record.data == probe.test.model_copy(update={"n": 20})
    assert record.environment.computation == computation(torch.device("cpu"), precision="float32")
    assert [stage.name for stage in record.stages] == ["clean", "pgd-3"]
    assert record.forward == sum(stage.forward for stage in record.stages)
    assert record.stages[1].backward > 0 < record.wall_seconds
    clean, robust = unpack_bits(outcomes.clean, 20), unpack_bits(outcomes.stages[-1].robust, 20)
    assert (record.clean.correct, record.robust.correct) == (sum(clean), sum(robust))
    assert 0 < sum(robust) < sum(clean) < 20
    assert all(c for c, r in zip(clean, robust, strict=True) if r)
    assert sum(part.clean.n for part in record.classes if part.clean) == 20
    assert {part.clean.n for part in record.classes if part.clean} == {2}
    assert (outcomes.n, outcomes.block, outcomes.done, outcomes.order_digest) == (20, BLOCK, 20, record.order_digest)
    assert [flag.verdict for flag in record.flags if flag.name == "audit"] == ["skipped"]


def judged(run: RunFolder, record: AttackRecord) -> tuple[Classifier, ImageSet, torch.Tensor, torch.Tensor]:
    """The classifier, its images and labels in the order of an evaluation, read without the command."""
    probe_record = load_record(run.probes / record.probe / "record.json", ProbeRecord)
    data = load_judged_images(run, probe_record, talk=NullTalk())
    order = balanced_order(data.require_labels(), "balanced order", data.fingerprint)[: record.data.n]
    classifier = classifier_in(run, run.probes / record.probe)
    return classifier, data, data.images[order].float() / 255, data.require_labels()[order]


def test_every_number_of_a_record_is_that_of_its_samples(attack: Attack, store: Path) -> None:
    assert attack("--eps", "4/255", "--steps", "2", "--limit", "60", "--save-examples", "60")[0] == 0
    run = the_run(store)
    folder = run.attacks / "pgd-001"
    record = load_record(folder / "record.json", AttackRecord)
    classifier, data, x, y = judged(run, record)
    examples = read_tensors(folder / "examples.safetensors")
    moved = x.clone()
    moved[examples["positions"]] = examples["images"]
    right, stands = classifier(x).argmax(1) == y, classifier(moved).argmax(1) == y
    assert 0 < int(stands.sum()) < int(right.sum()) < 60
    assert (record.clean, record.robust) == tuple(Accuracy.of(int(mask.sum()), 60) for mask in (right, stands))
    of_classes = [(right[y == label], stands[y == label]) for label in range(len(data.classes))]
    assert record.classes == tuple(
        ClassRobustness(name=name, clean=Accuracy.of(int(a.sum()), len(a)), robust=Accuracy.of(int(b.sum()), len(b)))
        for name, (a, b) in zip(data.classes, of_classes, strict=True)
    )
    assert any(part.robust != part.clean for part in record.classes)
    clean, pgd = record.stages
    assert (clean.name, clean.attacked, clean.broken) == ("clean", 60, 60 - int(right.sum()))
    assert (pgd.name, pgd.attacked, pgd.broken) == ("pgd-2", int(right.sum()), int((right & ~stands).sum()))
    assert (clean.forward, clean.backward) == (4 * 60, 0)
    assert 5 * pgd.attacked < pgd.forward <= 7 * pgd.attacked  # 3 passes of the attack, unless a sample falls early
    assert pgd.attacked <= pgd.backward <= 2 * pgd.attacked
    assert (record.forward, record.backward) == (clean.forward + pgd.forward, pgd.backward)
    lines = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    seconds = {name: sum(line["seconds"] for line in lines if line["name"] == name) for name in ("clean", "pgd-2")}
    assert [clean.wall_seconds, pgd.wall_seconds] == pytest.approx(list(seconds.values()))
    assert record.wall_seconds == pytest.approx(sum(seconds.values()))


def test_a_finished_evaluation_is_not_made_again(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first, _ = attack(*PGD)
    monkeypatch.setattr(blocks, "evaluate", None)
    code, again, err = attack(*PGD)
    assert (code, again) == (0, first)
    assert "finished on" in err


class CutError(Exception):
    """The process was killed."""


def cut_after(monkeypatch: pytest.MonkeyPatch, commits: int, *, how: Callable[[], None]) -> list[Outcome]:
    """Let the evaluation end after so many commits; returns a list that commits are counted in."""
    commit, seen = Ledger.commit, list[Outcome]()

    def counted(self: Ledger, outcome: Outcome) -> None:
        commit(self, outcome)
        seen.append(outcome)
        if len(seen) == commits:
            how()

    monkeypatch.setattr(Ledger, "commit", counted)
    return seen


def die() -> None:
    raise CutError


def test_cut_and_resumed_equals_uncut(attack: Attack, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack(*PGD)
    uncut = kept(store)
    for commits in (1, 2, 5, 6):
        shutil.rmtree(the_run(store).attacks)
        with monkeypatch.context() as patch:
            first = cut_after(patch, commits, how=die)
            with pytest.raises(CutError):
                command.attack(None, flags=flags_of(PGD), options=Options(device="cpu", runs=store, quiet=True))
        assert not (the_run(store).attacks / "pgd-001" / "record.json").exists()
        with monkeypatch.context() as patch:
            second = cut_after(patch, 1000, how=die)
            code, _, err = attack(*PGD)
        assert code == 0
        assert f"goes on from {commits} finished stages" in err
        assert len(first) + len(second) == 6  # nothing is run twice
        assert kept(store) == uncut


def flags_of(arguments: Sequence[str]) -> Flags:
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return Flags(eps=(given["--eps"],), steps=int(given["--steps"]), limit=int(given["--limit"]), head=given["--head"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_evaluation_and_loses_nothing(
    attack: Attack,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    with monkeypatch.context() as patch:
        cut_after(patch, 3, how=lambda: os.kill(os.getpid(), number))
        code, out, err = attack(*PGD, "--json")
    assert code == 128 + number
    assert json.loads(out)["error"]["exit_code"] == 128 + number
    assert "error: interrupted; every finished stage is kept\nhint: go on with the same command" in err
    _, _, err = attack(*PGD)
    assert "goes on from 3 finished stages" in err


def test_another_limit_reuses_finished_blocks(attack: Attack, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack(*PGD)
    seen = cut_after(monkeypatch, 1000, how=die)
    _, _, err = attack(*PGD, "--limit", "30")
    assert "blocks of 8 samples are evaluated whole: the last 4 of pgd-001 are attacked again" in err
    assert [outcome.block for outcome in seen] == [2, 2, 3, 3]  # the part of block 2 is done again, whole
    seen.clear()
    attack(*PGD, "--limit", "16")
    assert seen == []
    grown = kept(store, "pgd-002")
    shutil.rmtree(the_run(store).attacks)
    attack(*PGD, "--limit", "30")
    fresh = kept(store)
    assert fresh[0] == grown[0]
    assert fresh[1] == grown[1] | {"id": "pgd-001"}


def test_damaged_outcomes_are_left_alone(attack: Attack, store: Path) -> None:
    attack(*PGD)
    path = the_run(store).attacks / "pgd-001" / "outcomes.json"
    good = path.read_text()
    for bad in (good[:50], good.replace('"done": 20', '"done": 15', 3), good.replace('"n": 20', '"n": 25')):
        path.write_text(bad)
        code, out, err = attack(*PGD)
        assert code == 0
        assert "pgd-002" in out
        assert "left alone" in err
        shutil.rmtree(the_run(store).attacks / "pgd-002")


def test_an_evaluation_has_one_worker(attack: Attack, store: Path) -> None:
    attack(*PGD)
    holder = RunFolder(the_run(store).attacks / "pgd-001")
    with lock(holder):
        assert attack(*PGD)[0] == ExitCode.LOCKED
        assert attack(*PGD, "--step-size", "0.02")[0] == 0  # another one


def test_eps_zero_is_clean_and_the_order_is_the_datas(attack: Attack, store: Path) -> None:
    code, out, _ = attack("--eps", "0", "--limit", "25", "--json")
    assert code == 0
    (result,) = json.loads(out)["results"]
    assert result["clean"] == result["robust"]
    run = the_run(store)
    classifier, _, x, y = judged(run, load_record(run.attacks / result["id"] / "record.json", AttackRecord))
    right = classifier(x).argmax(1) == y
    outcomes = load_record(run.attacks / result["id"] / "outcomes.json", Outcomes)
    assert unpack_bits(outcomes.clean, 25) == right.tolist()


# What is said


def test_json_of_the_recipes_attacks(attack: Attack) -> None:
    code, out, _ = attack("--json", "--limit", "20", "--quiet")
    assert code == 0
    answer = json.loads(out)
    assert [(r["attack"], r["threat"]["eps"]) for r in answer["results"]] == [("pgd", "1/255"), ("fgsm", "4/255")]
    assert answer["trusted"] is True
    assert answer["results"][1]["worst_case"]["correct"] <= answer["results"][0]["robust"]["correct"]


def test_a_curve_and_its_worst_case(attack: Attack, store: Path) -> None:
    code, out, err = attack("--eps", "16/255", "--eps", "1/255", "--steps", "2", "--limit", "20")
    assert code == 0
    assert "accuracy against linf eps (a sample broken at a smaller eps stays broken):" in err
    bars = [line for line in err.splitlines() if "|" in line]
    assert [line.split("|")[0].strip() for line in bars] == ["0", "1/255", "16/255"]
    assert out.index("linf 1/255") < out.index("linf 16/255")


def test_worst_case_counts_smaller_balls(attack: Attack, store: Path) -> None:
    attack(*PGD)
    record = load_record(the_run(store).attacks / "pgd-001" / "record.json", AttackRecord)

    def at(eps: str, robust: Sequence[int]) -> Result:
        threat = record.threat.model_copy(update={"eps": eps})
        return Result(Path(), record.model_copy(update={"threat": threat}), (True,) * 4, tuple(map(bool, robust)))

    ((small, also, large),) = curves([at("8/255", (1, 0, 0, 1)), at("2/255", (1, 1, 0, 1)), at("2/255", (0, 1, 1, 1))])
    assert [point.record.threat.eps for point in (small, also, large)] == ["2/255", "2/255", "8/255"]
    assert [point.worst.correct for point in (small, also, large)] == [2, 2, 1]


def test_strict_refuses_what_cannot_be_trusted(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "cheap_checks", lambda *_: [audit.judge("zero-gradient", 0.5, 0.05, "share of images")])
    code, out, err = attack(*PGD)
    assert code == 0
    assert "failed: zero-gradient" in out
    assert "warning: pgd-001: check zero-gradient failed: 0.5, at most 0.05: share of images" in err
    monkeypatch.setattr(audit, "AuditSettings", lambda: QUICK)
    code, out, err = attack(*PGD, "--strict")
    assert code == ExitCode.UNTRUSTED
    assert "error: the evaluation cannot be trusted: zero-gradient" in err
    code, out, err = attack(*PGD, "--strict", "--json")
    assert code == ExitCode.UNTRUSTED
    failure = json.loads(out)["error"]
    assert failure["exit_code"] == 5
    assert failure["results"][0]["trusted"] is False


def test_strict_makes_the_audit(attack: Attack, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "AuditSettings", lambda: QUICK)
    monkeypatch.setattr(audit, "in_new_process", honesty.in_new_process)
    few = (*PGD[:4], "--limit", "8", "--head", "linear")
    code, out, err = attack(*few, "--strict")
    assert code == 0, err
    assert "no audit" not in out
    assert "audit of pgd-001: The linear head linear-001 on pre_feature features" in err
    path = the_run(store).attacks / "pgd-001" / "record.json"
    flags = load_record(path, AttackRecord).flags
    names = [flag.name for flag in flags]
    assert {"memory", "gradient", "rounding", "drift"} <= {*names}
    assert [flag.verdict for flag in flags if flag.name in ("process", "transfer")] == ["skipped", "passed"]
    older = json.loads(path.read_bytes())
    del older["sha256"]  # as for the checks: of an older version
    older["flags"] = [flag for flag in older["flags"] if flag["name"] != "between"]  # of an audit with fewer checks
    path.write_text(json.dumps(older))
    assert "no audit" in attack(*few)[1]
    told = json.loads(attack(*few, "--strict", "--json")[1])["results"][0]["audit"]
    assert told in err
    assert [flag.name for flag in load_record(path, AttackRecord).flags] == names


def test_an_attack_that_cannot_reach_the_border_is_not_trusted(attack: Attack, store: Path) -> None:
    short = ("--eps", "1/255", "--steps", "3", "--step-size", "0.001", "--limit", "8", "--head", "linear")
    code, _, err = attack(*short, "--strict")
    assert code == ExitCode.UNTRUSTED
    assert "error: pgd at eps 1/255 cannot be trusted: its steps lead 0.003 at most" in err
    assert not the_run(store).attacks.exists()
    assert attack(*short)[0] == 0
    record = load_record(the_run(store).attacks / "pgd-001" / "record.json", AttackRecord)
    (check,) = [flag for flag in record.flags if flag.name == "reach"]
    assert (check.figure, check.limit, check.verdict) == (1 / 255, 0.003, "failed")
    attack("--eps", "3/1000", *short[2:])  # just so far
    record = load_record(the_run(store).attacks / "pgd-002" / "record.json", AttackRecord)
    assert [flag.verdict for flag in record.flags if flag.name == "reach"] == ["passed"]


def test_a_single_step_is_never_without_a_remark(attack: Attack) -> None:
    assert "a single step bounds robust accuracy from above" in attack("--attack", "fgsm", "--limit", "8")[2]


def test_the_audit_is_added_to_a_finished_evaluation(
    attack: Attack, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ("--eps", "1/255", "--steps", "3", "--limit", "20")
    attack(*plain)
    before = kept(store)
    monkeypatch.setattr(audit, "AuditSettings", lambda: QUICK)
    seen = cut_after(monkeypatch, 1000, how=die)
    code, _, _ = attack(*plain, "--audit")
    assert code == 0
    assert seen == []
    after = kept(store)
    assert after[0] == before[0]
    names = {flag["name"] for flag in after[1]["flags"]}
    assert {"eps-one", "eps-monotone", "black-box"} <= names
    assert "audit" not in names
    attack(*plain)
    assert kept(store) == after  # asked for without it, it is not lost


def test_examples_are_drawn_and_survive_a_cut(attack: Attack, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = (*PGD, "--save-examples", "7")
    code, _, err = attack(*wanted)
    assert code == 0, err
    assert "examples" in err
    folder = the_run(store).attacks / "pgd-001"
    sheet = (folder / "examples.png").read_bytes()
    with Image.open(folder / "examples.png") as image:
        image.load()
        assert image.mode == "RGB"
    shutil.rmtree(the_run(store).attacks)
    with monkeypatch.context() as patch:
        cut_after(patch, 4, how=lambda: os.kill(os.getpid(), signal.SIGINT))
        code, _, err = attack(*wanted)
        assert code == ExitCode.INTERRUPTED, err
    code, _, err = attack(*wanted)
    assert code == 0, err
    assert (folder / "examples.png").read_bytes() == sheet
    shutil.rmtree(the_run(store).attacks)
    code, _, err = attack(*PGD)
    assert code == 0, err
    outcomes = (folder / "outcomes.json").read_bytes()
    code, _, err = attack(*wanted)  # they were not kept, and are made again
    assert code == 0, err
    assert (folder / "examples.png").read_bytes() == sheet
    assert (folder / "outcomes.json").read_bytes() == outcomes


def test_only_stages_that_owe_an_example_are_run_again(
    attack: Attack, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ensemble(2 / 255, steps=3, queries=5, targets=2)
    monkeypatch.setattr(autoattack, "plan", lambda *_, **__: short)
    wanted = ("--attack", "autoattack", "--eps", "2/255", "--limit", "8")
    attack(*wanted)
    seen = cut_after(monkeypatch, 1000, how=die)
    run: list[str] = []

    def noted(stage: Stage, *rest: Any, **more: Any) -> torch.Tensor:
        run.append(stage_name(stage))
        return run_stage(stage, *rest, **more)

    monkeypatch.setattr(blocks, "run_stage", noted)
    attack(*wanted, "--save-examples", "1")
    assert (run, len(seen)) == (["apgd-ce"], 1)
    folder = the_run(store).attacks / "autoattack-001"
    assert (folder / "examples.png").is_file()


def test_an_audit_of_a_ball_without_radius_is_skipped(attack: Attack) -> None:
    code, out, _ = attack("--eps", "0", "--limit", "8", "--audit", "--json")
    assert code == 0
    flags = {flag["name"]: flag["verdict"] for flag in json.loads(out)["results"][0]["flags"]}
    assert (flags["eps-zero"], flags["audit"]) == ("passed", "skipped")


def test_stored_examples_hold_at_every_batch_size(attack: Attack, store: Path) -> None:
    attack(*PGD, "--save-examples", "12")
    run = the_run(store)
    stored = read_tensors(run.attacks / "pgd-001" / "examples.safetensors")
    classifier = classifier_in(run, run.probes / "linear-001")
    for size in (1, 7, 64):
        parts = torch.split(stored["images"], size)
        assert torch.equal(torch.cat([classifier(part).argmax(1) for part in parts]), stored["labels"])


def test_plots(attack: Attack, store: Path) -> None:
    code, _, err = attack("--eps", "1/255", "--eps", "2/255", "--steps", "3", "--limit", "10", "--plot")
    assert code == 0
    assert err.count("drawn: ") == 3
    for name in ("pgd-001/loss.png", "pgd-002/loss.png", "pgd-002/accuracy.png"):
        with Image.open(the_run(store).attacks / name) as image:
            image.load()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is drawn, by matplotlib's own artists."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig

    def noted(self: Any, *arguments: Any, **settings: Any) -> None:
        drawn.append(self)
        save(self, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", noted)
    return drawn


def test_what_the_loss_curve_shows(attack: Attack, store: Path, figures: list[Any]) -> None:
    attack("--eps", "4/255", "--steps", "3", "--limit", "30", "--plot")
    run = the_run(store)
    record = load_record(run.attacks / "pgd-001" / "record.json", AttackRecord)
    classifier, _, x, y = judged(run, record)
    right = classifier(x).argmax(1) == y
    x, y = x[right], y[right]
    losses, shares = loss_by_step(classifier, x, y, eps=4 / 255, norm="linf", step_size=0.01, steps=3)
    axes, other = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "mean cross-entropy")
    assert axes.get_title() == f"PGD linf 4/255, step 0.01, {len(x)} samples right at first"
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 1, 2, 3]
    assert list(line.get_ydata()) == pytest.approx(losses, rel=1e-4)
    assert line.get_ydata()[0] == pytest.approx(float(torch.nn.functional.cross_entropy(classifier(x), y)), rel=1e-4)
    assert other.get_ylabel() == "accuracy of the iterate (%)"
    (line,) = other.lines
    assert list(line.get_xdata()) == [0, 1, 2, 3]
    assert list(line.get_ydata()) == pytest.approx([100 * share for share in shares])
    assert line.get_ydata()[0] == 100 > line.get_ydata()[-1]


def test_what_the_curve_over_eps_shows(attack: Attack, store: Path, figures: list[Any]) -> None:
    code, out, _ = attack(
        "--eps", "1/255", "--eps", "4/255", "--steps", "2", "--limit", "40", "--plot", "--json", "--attack", "pgd"
    )
    assert code == 0
    small, large = json.loads(out)["results"]
    (axes,) = figures[-1].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("eps (255ths of the image range)", "accuracy (%)")
    worst, own = axes.lines
    assert [text.get_text() for text in figures[-1].legends[0].get_texts()] == ["worst case up to eps", "pgd"]
    parts = [small["clean"], small["worst_case"], large["worst_case"]]
    assert list(worst.get_xdata()) == pytest.approx([0, 1, 4])
    assert list(worst.get_ydata()) == pytest.approx([100 * part["value"] for part in parts])
    assert list(own.get_xdata()) == pytest.approx([1, 4])
    assert list(own.get_ydata()) == pytest.approx([100 * small["robust"]["value"], 100 * large["robust"]["value"]])
    (band,) = axes.collections
    corners = {(round(float(a), 6), round(float(b), 6)) for a, b in band.get_paths()[0].vertices}
    for x, part in zip((0, 1, 4), parts, strict=True):
        assert (x, round(100 * part["low"], 6)) in corners
        assert (x, round(100 * part["high"], 6)) in corners


def test_the_loss_around_images_is_drawn_where_it_is_looked_into(
    attack: Attack, store: Path, figures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "AuditSettings", lambda: QUICK)
    attack("--eps", "4/255", "--steps", "3", "--limit", "8", "--plot")
    folder = the_run(store).attacks / "pgd-001"
    assert not (folder / "surface.png").exists()
    attack("--eps", "4/255", "--steps", "3", "--limit", "8", "--plot", "--audit")
    assert (folder / "surface.png").is_file()
    (axes,) = figures[-2].axes
    (bar,) = axes.child_axes
    assert axes.get_title().startswith("Loss around ")
    assert (axes.get_xlabel(), bar.get_ylabel()) == ("along the gradient (eps)", "mean cross-entropy")
    assert axes.get_xlim() == pytest.approx((-2, 2))


def test_the_loss_surface_is_of_the_gradient_and_of_a_random_direction() -> None:
    weight = torch.randn((12, 3), generator=torch.Generator().manual_seed(0))
    x, y = torch.full((2, 3, 2, 2), 0.5), torch.tensor([0, 1])

    def predict(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ weight

    for norm in ("linf", "l2"):
        surface = loss_surface(predict, x, y, eps=0.1, norm=norm, generator=torch.Generator().manual_seed(1))
        moved = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(predict(moved), y, reduction="sum"), moved)
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        ways = [
            way.sign() if norm == "linf" else way / way.flatten(1).norm(dim=1)[:, None, None, None]
            for way in (grad, drawn)
        ]

        def loss(points: torch.Tensor) -> float:
            return float(torch.nn.functional.cross_entropy(predict(points), y))

        assert len(surface) == len(surface[0]) == 17
        assert surface[8][8] == pytest.approx(loss(x))
        assert surface[8][12] == pytest.approx(loss(x + 0.1 * ways[0]))  # a row goes along the gradient
        assert surface[0][8] == pytest.approx(loss(x - 0.2 * ways[1]))
        assert surface[8] == sorted(surface[8])


def test_what_a_measure_shows(attack: Attack, store: Path, figures: list[Any]) -> None:
    asked = ("--attack", "smallest", "--steps", "3", "--limit", "20")
    record = json.loads(attack(*asked, "--json")[1])
    folder = the_run(store).measures / "smallest-001"
    assert not (folder / "accuracy.png").exists()
    _, _, err = attack(*asked, "--plot")
    assert f"drawn: {folder / 'accuracy.png'}" in " ".join(err.split())
    (axes,) = figures[-1].axes
    assert axes.get_xlabel() == "eps (255ths of the image range)"
    clean, curve = axes.lines
    assert list(clean.get_ydata()) == pytest.approx([100 * record["clean"]["value"]] * 2)
    assert list(curve.get_xdata()) == pytest.approx([255 * point["at"] for point in record["points"]])
    assert list(curve.get_ydata()) == pytest.approx([100 * point["accuracy"]["value"] for point in record["points"]])
    assert len(axes.collections) == 1

    attack("--attack", "corruptions", "--limit", "8", "--plot")
    (axes,) = figures[-1].axes
    kinds = {line.get_label() for line in axes.lines}
    assert {"clean"} < kinds
    assert len(kinds) == 1 + len(KINDS)
    assert [list(line.get_xdata()) for line in axes.lines[1:]] == [[1, 2, 3, 4, 5]] * len(KINDS)
    assert axes.get_xlabel() == "severity"


def test_without_matplotlib_plots_are_refused_first(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = attack("--plot")
    assert code == ExitCode.INVALID
    assert "hint: pip install 'cfamc[plots]'" in err


# Measures


def test_one_run_gives_the_curve_and_an_attack_that_broke_a_sample_at_less_counts(attack: Attack, store: Path) -> None:
    code, out, _ = attack("--attack", "smallest", "--steps", "3", "--targets", "2", "--limit", "20", "--json")
    assert code == 0
    alone = json.loads(out)
    assert alone["measure"] == "smallest"
    assert alone["settings"] == {"name": "smallest", "norm": "linf", "steps": 3, "targets": 2}
    assert attack("--eps", "2/255", "--steps", "9", "--step-size", "0.001", "--limit", "20")[0] == 0
    _, record = kept(store)
    assert alone["clean"] == record["clean"]
    code, out, err = attack("--attack", "smallest", "--steps", "3", "--targets", "2", "--limit", "20", "--json")
    assert code == 0
    assert "goes on from 3 finished blocks" in err
    held, folder = json.loads(out), the_run(store).measures / "smallest-001"
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    eps = [math.inf if value is None else value for line in lines[1:] for value in line["columns"]["eps"]]
    outcomes = load_record(the_run(store).attacks / "pgd-001" / "outcomes.json", Outcomes)
    broken = unpack_bits(outcomes.stages[0].broken, 20)
    least = [min(value, 2 / 255) if hit else value for value, hit in zip(eps, broken, strict=True)]
    assert held["figures"]["median eps"] == statistics.median(least)
    assert held["figures"]["broken at less by an attack of one eps"] == sum(map(float.__lt__, least, eps)) > 0
    by_eps = {point["at"]: point["accuracy"]["correct"] for point in held["points"]}
    assert by_eps[2 / 255] == sum(value > 2 / 255 + 1e-6 for value in least) <= record["robust"]["correct"]
    assert by_eps[0] == record["clean"]["correct"]
    assert [flag["name"] for flag in held["flags"]][-2:] == ["contradiction", "without-example"]
    code, out, _ = attack("--attack", "smallest", "--steps", "3", "--targets", "2", "--limit", "20")
    median = 255 * held["figures"]["median eps"]
    told = f"median eps {median:.3g}/255" if median else "median eps 0"
    assert f"{told}; auc " in out
    assert "; auc up to eps 32/255; broken at less by an attack of one eps " in out
    assert re.search(r"accuracy +8/255 ", out)


def test_corruptions_are_the_same_for_every_run_and_go_on_where_they_were(attack: Attack, store: Path) -> None:
    code, out, _ = attack("--attack", "corruptions", "--limit", "10", "--json")
    assert code == 0
    made, run = json.loads(out), the_run(store)
    assert made["settings"] == {"name": "corruptions", "source": "cfamc-corruptions-1"}
    record = load_record(run.probes / "linear-001" / "record.json", ProbeRecord)
    images = load_judged_images(run, record, talk=NullTalk())
    chosen = balanced_order(images.require_labels(), "balanced order", images.fingerprint)[:10]
    x, y = images.images[chosen].float() / 255, images.require_labels()[chosen]
    classifier = classifier_in(run, run.probes / "linear-001")
    for point in made["points"][::7]:
        seen = corrupted(x, chosen, kind=point["name"], severity=int(point["at"]))
        assert point["accuracy"]["correct"] == int((classifier(seen).argmax(1) == y).sum())
    assert len(made["points"]) == 50
    assert made["figures"]["mean"] == pytest.approx(sum(p["accuracy"]["value"] for p in made["points"]) / 50)
    code, _, err = attack("--attack", "corruptions", "--corruptions", str(store), "--limit", "10")
    assert (code, "holds no corrupted images" in err) == (ExitCode.BAD_DATA, True)


def test_a_certificate_is_no_attack(attack: Attack, store: Path) -> None:
    flags = ("--attack", "smoothing", "--sigma", "0.1", "--n0", "9", "--n", "40", "--alpha", "0.05", "--limit", "20")
    code, out, err = attack(*flags, "--json")
    assert code == 0
    made = json.loads(out)
    assert made["settings"] == {"name": "smoothing", "sigma": "0.1", "n0": 9, "n": 40, "alpha": 0.05}
    assert "neither an attack nor the accuracy of the classifier itself" in err
    assert made["forward"] == 20 * (9 + 40 + 3)  # two looks at how many classes there are, and a clean prediction
    lines = (the_run(store).measures / "smoothing-001" / "samples.jsonl").read_text().splitlines()[1:]
    columns = [json.loads(line)["columns"] for line in lines]
    radii = [r or 0.0 for c in columns for r in c["radius"]]
    right = [bit for c in columns for bit in c["right"]]
    certified = {point["at"]: point["accuracy"]["correct"] for point in made["points"]}
    for at, correct in certified.items():
        assert correct == sum(radius > at and bit == 1 for radius, bit in zip(radii, right, strict=True))
    assert 0 < certified[0.0] < 20
    assert not the_run(store).attacks.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smallest", "--eps", "8/255"), "--eps has no effect on smallest"),
        (("smallest", "--audit"), "--audit has no effect on smallest"),
        (("smallest", "--sigma", "0.5"), "--sigma has no effect on smallest"),
        (("smallest", "--space", "crops"), "--space crops has no effect on smallest"),
        (("smallest", "--steps", "0"), "--steps: should be greater than or equal to 1"),
        (("fgsm", "--targets", "2"), "--targets has no effect on fgsm"),
        (("pgd", "--corruptions", "x"), "--corruptions has no effect on pgd"),
        (("smoothing", "--sigma", "64"), "--sigma: 64 is in units of the image range: did you mean 64/255?"),
        (("smoothing", "--sigma", "0"), "--sigma: must be above 0"),
    ],
)
def test_a_setting_without_effect_is_refused(attack: Attack, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = attack("--attack", *arguments)
    assert code == ExitCode.INVALID
    assert f"error: {message}" in err


def test_square_and_fab_take_queries_and_targets() -> None:
    (square,) = asked_attacks(Flags(attack="square", queries=7), tiny_recipe())
    (fab,) = asked_attacks(Flags(attack="fab", targets=2, steps=3), tiny_recipe())
    assert square.model_dump()["queries"] == 7
    assert (fab.model_dump()["targets"], fab.model_dump()["steps"]) == (2, 3)


# Aggregated crops


def test_both_spaces_of_an_aggregated_head(attack: Attack, store: Path) -> None:
    options = Options(device="cpu", runs=store, quiet=True, as_json=True)
    probe(None, request=Request(head="crops", crops=2, epochs=60), foreign=None, resume=False, options=options)
    flags = ("--head", "crops", "--eps", "16/255", "--step-size", "0.03", "--steps", "3", "--limit", "20", "--json")
    code, out, _ = attack(*flags)
    assert code == 0
    (image,) = json.loads(out)["results"]
    assert (image["attack"], image["threat"]["space"], image["id"]) == ("pgd", "image", "pgd-001")
    assert image["robust"]["correct"] < image["clean"]["correct"]
    assert image["trusted"]
    assert "its own fixed crops" in image["notes"][0]
    assert image["settings"]["crops"] == "of each image"
    (run,) = list_runs(store)
    (folder,) = run.probes.glob("crops-*")
    record = load_record(folder / "record.json", ProbeRecord)
    images = load_judged_images(run, record, talk=NullTalk())
    chosen = balanced_order(images.require_labels(), "balanced order", images.fingerprint)[:20]
    logits = classifier_in(run, folder)(images.images[chosen].float() / 255, chosen)
    assert image["clean"]["correct"] == int((logits.argmax(1) == images.require_labels()[chosen]).sum())
    code, out, _ = attack(*flags, "--space", "crops")
    assert code == 0
    (crops,) = json.loads(out)["results"]
    assert (crops["attack"], crops["threat"]["space"], crops["id"]) == ("pgd-crops", "crops", "pgd-crops-001")
    assert crops["robust"]["correct"] < crops["clean"]["correct"]
    code, _, _ = attack("--head", "crops", "--attack", "embedding", "--steps", "2", "--limit", "20")
    assert code == 0
