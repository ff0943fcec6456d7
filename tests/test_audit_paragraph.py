"""The audit in plain words: what was attacked, with what, what was looked for and what was not."""

from __future__ import annotations

from tiny import attack_record

from cfamc_cli.commands.attack_report import explained
from cfamc_cli.report.audit import audit_paragraph, lacks_audit
from cfamc_cli.store.records import Accuracy, Flag, Stage, ThreatModel


def flag(name: str, verdict: str = "passed", figure: float = 0.0, limit: float | None = 0.0) -> Flag:
    return Flag.model_validate(
        {"name": name, "figure": figure, "limit": limit, "verdict": verdict, "text": f"of {name}"}
    )


def test_the_paragraph_says_what_the_record_does() -> None:
    record = attack_record(
        robust=Accuracy.of(250, 1000),
        threat=ThreatModel(space="crops", norm="l2", eps="1/2"),
        flags=(
            flag("search"),
            flag("leap", "failed", 0.75, 0.1),
            flag("gradient"),
            flag("no-ascent", "failed", 0.5, 0.05),
            flag("strange", "failed", 3, 1),  # of no group
            flag("black-box", "skipped"),
            flag("robust-rounded", figure=0.25, limit=None),
            flag("drift"),
            flag("process", "skipped"),
        ),
    )
    said = audit_paragraph(record)
    assert "\n" not in said
    assert said.startswith("The linear head linear-001 on pre_feature features of run 20261122-120000-a-000000")
    assert (
        "on the first 1000 of a balanced order of cifar10: pgd (steps 20, step_size 0.01, restarts 1, seed 3)" in said
    )
    assert "every crop of an image by itself within l2 1/2" in said
    assert "Without an attack 70.0 [67.1, 72.8] % are right, and 25.0 [22.4, 27.8] % under it." in said
    assert "Robust after rounding: 0.25 (of robust-rounded)." in said
    found, rest = said.split("The audit found ")[1].split(" It looked for, and did not find: ")
    absent, unseen = rest.split(" It did not look for: ")
    assert found == (
        "gradients that are missing, lead nowhere or are not those of the answers (no-ascent 0.5, at most 0.05: of "
        "no-ascent); answers that hardly change before an image leaves the ball (leap 0.75, at most 0.1: of leap); "
        "strange 3, at most 1: of strange."
    )
    assert absent == (
        "answers that change with the pass, the batch or what was asked before; "
        "a copy that answers otherwise than what was judged."
    )
    assert "images that fall to Square, which needs no gradient;" in unseen  # skipped
    assert "accuracy that does not fall as eps rises;" in unseen  # absent
    assert "other norms than l2, radii above 1/2" in unseen
    assert said.endswith("by hand against this model, and state that it keeps outside itself.")


def test_nothing_found_is_said_so() -> None:
    said = audit_paragraph(attack_record(flags=(flag("process"),)))
    assert "found nothing against these numbers" in said
    assert said.endswith("by hand against this model.")  # a new process was asked


def test_an_audit_of_an_older_version_is_none() -> None:
    assert lacks_audit(attack_record(flags=(flag("eps-one"), flag("black-box"), flag("drift"))))
    made = attack_record(flags=(flag("between"), flag("transfer")))  # whose text is "of transfer"
    assert not lacks_audit(made)
    assert not lacks_audit(made, source="transfer")
    assert lacks_audit(made, source="20261122-120000-b-000000")
    assert lacks_audit(attack_record(flags=(flag("between"),)), source="20261122-120000-b-000000")


def test_what_a_table_of_attacks_cannot_tell_stands_below_it() -> None:
    stages = tuple(
        Stage(name=name, attacked=attacked, broken=broken, forward=1, backward=1, wall_seconds=1.0)
        for name, attacked, broken in (("clean", 1000, 300), ("apgd-ce", 700, 390), ("apgd-t", 310, 10))
    )
    lines = list(explained([attack_record(), attack_record(id="autoattack-001", stages=stages)]))
    assert [line.split(":")[0] for line in lines] == ["worst case", "no audit", "autoattack-001"]
    assert lines[2].endswith("broke: apgd-ce 390 of 700, apgd-t 10 of 310.")
    whole = attack_record(flags=(Flag(name="between", figure=0.0, limit=0.0, verdict="passed", text=""),))
    assert list(explained([whole])) == []
    assert list(explained([whole.model_copy(update={"stages": stages[:2]})])) == []
