"""Transfers: examples that one run makes and another judges, their matrix, and heads on several data sets at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import attack_record, image_folder, recipe_text, run_record
from torch import Tensor

from cfamc_cli import cli
from cfamc_cli.commands.common import Options
from cfamc_cli.commands.pretrain import pretrain
from cfamc_cli.commands.probe import load_judged_images
from cfamc_cli.comparison.tables import Condition, Entry, Run
from cfamc_cli.comparison.transfer import Transfer, matrices
from cfamc_cli.engine.attacks.plan import run_stage
from cfamc_cli.engine.evaluation import audit
from cfamc_cli.engine.heads.classifier import Classifier, load_classifier, load_encoder
from cfamc_cli.engine.randomness import balanced_order
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.recipe.schema import PgdAttack
from cfamc_cli.store.records import Accuracy, AttackRecord, ProbeRecord, load_record
from cfamc_cli.store.runs import HEAD, RunFolder, list_runs

CPU = torch.device("cpu")
Cfamc = Callable[..., tuple[int, str, str]]
TRANSFER = ("--eps", "8/255", "--steps", "4", "--limit", "20")


def test_pgd_goes_on_where_another_network_will_judge() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [-1.0, 1.0, 0.5]])

    def logits(x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ weight.T

    x, y = torch.tensor([0.501, 0.499, 0.501]).view(1, 3, 1, 1), torch.tensor([0])
    stage = PgdAttack(name="pgd", eps="8/255", steps=20)
    ends = [
        run_stage(stage, logits, x, y, embed=None, onward=onward, generator=torch.Generator())
        for onward in (False, True)
    ]
    furthest = x + 8 / 255 * (weight[1] - weight[0]).sign().view(1, 3, 1, 1)
    torch.testing.assert_close(ends[1], furthest)
    assert float((ends[0] - x).abs().max()) == pytest.approx(0.01, abs=1e-6)  # it stopped at the first step


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two runs of one recipe, each with its linear head."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.toml"
    path.write_text(recipe_text() + '[probe]\nhead = "linear"\nprotocol = "converged"\n')
    options = Options(device="cpu", runs=folder / "runs", quiet=True)
    pretrain(str(path), overrides=[], seeds=[0, 1], resume=None, dry_run=False, force=False, options=options)
    for run in list_runs(folder / "runs"):
        assert cli.run(["probe", str(run.path), "--runs", str(folder / "runs"), "--device", "cpu", "-q"]) == 0
    return folder / "runs"


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def cfamc(store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cfamc:
    monkeypatch.setenv("XDG_CACHE_HOME", str(store.parent / "cache"))

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        own = () if arguments[0] == "compare" else ("--device", "cpu")
        code = cli.run([*arguments, "--runs", str(store), *own])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def two(store: Path) -> tuple[RunFolder, RunFolder]:
    first, second = list_runs(store)
    return first, second


def classifier_of(run: RunFolder) -> tuple[Classifier, ProbeRecord]:
    loaded = load_encoder(run.checkpoints, run.recipe().model, device=CPU, talk=NullTalk())
    record = load_record(run.probes / "linear-001" / "record.json", ProbeRecord)
    return load_classifier(loaded, record, run.probes / "linear-001" / HEAD, run.recipe()), record


def by_hand(source: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """Four signed steps of 0.01 on the loss of the source."""
    points = x
    for _ in range(4):
        points = points.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(source(points), y, reduction="sum"), points)
        points = torch.minimum(torch.maximum(points + 0.01 * grad.sign(), x - 8 / 255), x + 8 / 255).clamp(0, 1)
    return points.detach()


def test_examples_are_made_on_one_run_and_judged_on_another(store: Path, cfamc: Cfamc) -> None:
    source, judged = two(store)
    code, out, err = cfamc("attack", judged.id, "--source", source.id, *TRANSFER, "--json")
    assert code == 0, err
    (result,) = json.loads(out)["results"]
    record = load_record(judged.attacks / "pgd-transfer-001" / "record.json", AttackRecord)
    (maker, made_on), (judge, head) = classifier_of(source), classifier_of(judged)
    assert record.source is not None
    assert record.source.model_dump() == result["source"]
    assert (record.source.run, record.source.probe) == (source.id, "linear-001")
    assert (record.source.encoder_digest, record.source.head_digest) == (made_on.encoder_digest, made_on.head_digest)
    assert (record.encoder_digest, record.head_digest) == (head.encoder_digest, head.head_digest)
    assert (record.attack, result["worst_case"]["correct"]) == ("pgd-transfer", record.robust.correct)
    assert any("a transfer" in note for note in record.notes)

    images = load_judged_images(judged, head, talk=NullTalk())
    chosen = balanced_order(images.require_labels(), "balanced order", images.fingerprint)[:20]
    x, y = images.images[chosen].float() / 255, images.require_labels()[chosen]
    right = judge(x).argmax(1) == y
    stands = {name: right & (judge(by_hand(on, x, y)).argmax(1) == y) for name, on in (("A", maker), ("B", judge))}
    assert record.clean.correct == int(right.sum())
    assert abs(record.robust.correct - int(stands["A"].sum())) <= 1  # a gradient of 0 but for rounding has any sign
    assert int(stands["A"].sum()) > int(stands["B"].sum()) + 1  # so that this would show another maker

    _, _, err = cfamc("attack", judged.id, "--source", source.id, *TRANSFER)
    assert "finished on" in err
    assert cfamc("attack", judged.id, *TRANSFER)[0] == 0
    assert sorted(path.name for path in judged.attacks.iterdir()) == ["pgd-001", "pgd-transfer-001"]
    keys = {json.loads(path.read_bytes())["key"] for path in judged.attacks.glob("*/outcomes.json")}
    assert len(keys) == 2
    (plain,) = [load_record(judged.attacks / "pgd-001" / "record.json", AttackRecord)]
    assert plain.source is None

    code, out, err = cfamc("compare", "--json")
    assert code == 0, err
    found = json.loads(out)
    attacked = [table for table in found["tables"] if table["condition"]["attack"]]
    assert [table["condition"]["attack"] for table in attacked] == ["pgd"]
    (transfer,) = found["transfers"]
    assert (transfer["judged"], transfer["source"]) == (judged.id, source.id)
    assert transfer["robust"] == record.robust.value
    _, out, _ = cfamc("compare", "--format", "markdown")
    sheet = next(part for part in out.split("### ") if part.startswith("Transfer"))
    assert f"| {100 * record.robust.value:.1f} | {100 * plain.robust.value:.1f} |" in sheet
    assert "never ranked" in sheet


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--attack", "autoattack"], "autoattack stops where it fools the source"),
        (["--attack", "apgd-ce"], "apgd-ce stops"),
        (["--attack", "smallest", "--strict"], "--source has no effect on --attack smallest"),
        (["--eps", "8/255", "--audit", "--space", "crops"], "--space crops attacks crops"),
        (["--eps", "8/255", "--plot"], "--plot looks at the gradient"),
        (["--restarts", "3"], "restarts have no effect"),
    ],
)
def test_what_cannot_be_said_of_a_transfer_is_refused(
    arguments: list[str], cause: str, store: Path, cfamc: Cfamc
) -> None:
    source, judged = two(store)
    code, out, err = cfamc("attack", judged.id, "--source", source.id, *arguments)
    assert (code, out) == (2, "")
    assert cause in err
    assert not judged.attacks.exists()


def test_an_audit_with_a_source_attacks_the_run_itself_and_with_examples_of_the_other(
    store: Path, cfamc: Cfamc, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, judged = two(store)
    quick = audit.AuditSettings(samples=6, steps=2, queries=10)
    monkeypatch.setattr(audit, "AuditSettings", lambda: quick)
    monkeypatch.setattr(audit, "in_new_process", lambda anew, points: anew()(points))
    made: list[Tensor] = []
    climbed = audit._Audit.climbed

    def noted(self: audit._Audit, *arguments: Any, through: Any = None, **settings: Any) -> Tensor:
        points = climbed(self, *arguments, through=through, **settings)
        if through in self.settings.sources.values():
            made.append(through(points) - classifier_of(source)[0](points))
        return points

    monkeypatch.setattr(audit._Audit, "climbed", noted)
    path = judged.attacks / "pgd-001" / "record.json"
    for arguments, checked in (((), "skipped"), (("--source", source.id), "passed"), ((), "passed")):
        code, _, err = cfamc("attack", judged.id, *arguments, *TRANSFER, "--audit")
        assert code == 0, err
        record = load_record(path, AttackRecord)
        (flag,) = [flag for flag in record.flags if flag.name == "transfer"]
        assert (record.source, flag.verdict, source.id in flag.text) == (None, checked, checked == "passed")
    assert len(made) == 1  # what was audited with it before is not audited again
    assert float(made[0].abs().max()) < 1e-4
    assert "images that fall to examples of another network" in err.split("did not find: ")[1].split(" Not covered")[0]
    assert [path.name for path in judged.attacks.iterdir()] == ["pgd-001"]


@pytest.mark.parametrize("audit", [(), ("--audit",)], ids=["alone", "in the audit"])
def test_no_examples_are_made_on_a_head_that_reads_crops(store: Path, cfamc: Cfamc, audit: tuple[str, ...]) -> None:
    source, judged = two(store)
    for run in (source, judged):
        assert cfamc("probe", run.id, "--head", "crops", "--crops", "2", "--epochs", "1")[0] == 0
    code, _, err = cfamc("attack", judged.id, "--head", "crops", "--source", source.id, *TRANSFER, *audit)
    assert (code, "reads random crops" in err, "Traceback" in err) == (2, True, False)


def test_a_source_must_be_another_run_that_knows_the_classes(store: Path, cfamc: Cfamc) -> None:
    source, judged = two(store)
    code, _, err = cfamc("attack", judged.id, "--source", judged.id, *TRANSFER)
    assert (code, "names the run itself" in err) == (2, True)
    root = image_folder(store.parent / "images")
    assert cfamc("probe", judged.id, "--data", str(root))[0] == 0
    code, _, err = cfamc("attack", judged.id, "--head", "linear-002", "--source", source.id, "--eps", "8/255")
    assert (code, "knows other classes" in err) == (2, True)
    assert f"cfamc probe {source.path} --data" in err
    assert cfamc("probe", source.id, "--data", str(root))[0] == 0
    code, _, err = cfamc("attack", judged.id, "--head", "linear-002", "--source", source.id, "--eps", "8/255")
    assert code == 0, err
    record = load_record(judged.attacks / "pgd-transfer-001" / "record.json", AttackRecord)
    assert record.source is not None
    assert record.source.probe == "linear-002"
    assert cfamc("probe", source.id, "--data", str(root), "--set", "probe.l2=0.1")[0] == 0
    assert cfamc("attack", judged.id, "--head", "linear-002", "--source", source.id, "--eps", "8/255")[0] == 0
    assert len(list(judged.attacks.iterdir())) == 2  # of another head, though all else is the same


def test_a_head_for_each_data_set(store: Path, cfamc: Cfamc) -> None:
    run, _ = two(store)
    roots = [str(image_folder(store.parent / name, classes=names)) for name, names in (("a", "xyz"), ("b", "uv"))]
    code, out, err = cfamc("probe", run.id, "--data", roots[0], "--data", roots[1], "--json")
    assert code == 0, err
    told = json.loads(out)["probes"]
    assert [record["id"] for record in told] == ["linear-002", "linear-003"]
    assert [record["data"]["root"] for record in told] == roots
    assert [len(record["classes"]) for record in told] == [3, 2]
    kept = [load_record(run.probes / record["id"] / "record.json", ProbeRecord) for record in told]
    assert told == [record.model_dump(mode="json") for record in kept]
    code, _, err = cfamc("probe", run.id, "--data", roots[0], "--data", roots[0])
    assert (code, "given twice" in err) == (2, True)
    code, out, _ = cfamc("probe", run.id, "--data", roots[0], "--json")
    assert (code, json.loads(out)["id"]) == (0, "linear-004")


# The matrix


def entry(
    run: str, *, robust: int, attack: str = "pgd-transfer", n: int = 100, minutes: int = 0, **where: Any
) -> Entry:
    base = Condition("cifar10", "test", "f", "linear", "backbone", "image", "linf", "8/255", attack, "steps 20")
    condition = replace(base, **where)
    made = attack_record().created.replace(minute=minutes)
    about = Run(run, run, 0, run, {}, 1.0, 1, 1, 0, 1.0)
    return Entry(about, "attacks/x", condition, (), made, Accuracy.of(80, n), Accuracy.of(robust, n), order="o")


def test_a_matrix_holds_what_was_measured_alike() -> None:
    transfers = [
        Transfer(entry("a", robust=50), "b"),
        Transfer(entry("a", robust=51, minutes=1), "b"),
        Transfer(entry("b", robust=40), "a"),
        Transfer(entry("c", robust=30), "a"),
        Transfer(entry("a", robust=60, n=200), "b"),
        Transfer(entry("b", robust=70, eps="4/255"), "a"),
    ]
    own = [
        entry("a", robust=10, attack="pgd"),
        entry("b", robust=11, attack="pgd", n=200),
        entry("d", robust=12, attack="pgd"),
        entry("b", robust=13, attack="pgd", settings="steps 40"),
    ]
    first, *others = matrices(transfers, own)
    assert (first.judged, first.sources, first.n) == (("a", "b", "c"), ("a", "b"), 100)
    shares = {pair: found.robust.correct for pair, found in first.robust.items() if found.robust}
    assert shares == {("a", "b"): 51, ("b", "a"): 40, ("c", "a"): 30, ("a", "a"): 10}
    assert [len(matrix.robust) for matrix in others] == [2, 1]
    assert run_record().id not in first.judged
