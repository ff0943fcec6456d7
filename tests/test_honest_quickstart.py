"""The encoder that everyone meets first is trained against attacks, and the audit accuses none of its heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfamc_cli import cli
from cfamc_cli.commands.probe import load_judged_images
from cfamc_cli.engine.ball import per_sample
from cfamc_cli.engine.evaluation.audit import _SHRUNK
from cfamc_cli.engine.evaluation.honesty import leap
from cfamc_cli.engine.heads.classifier import load_classifier, load_encoder
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.store.records import ProbeRecord, load_record
from cfamc_cli.store.runs import HEAD, RECORD, list_runs

HEADS = (["linear"], ["robust-linear", "--epochs", "2"], ["crops", "--crops", "4"])
EPS = 8 / 255


@pytest.mark.slow
def test_no_head_of_the_quickstart_is_accused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--runs", str(tmp_path), "--device", "cpu", "-q"]
    assert cli.run(["pretrain", "quickstart", *where]) == 0
    for head in HEADS:
        assert cli.run(["probe", "--head", *head, *where]) == 0
        capsys.readouterr()
        code = cli.run(["attack", "--head", head[0], "--eps", "8/255", "--limit", "100", "--strict", "--json", *where])
        told = json.loads(capsys.readouterr().out)
        assert code == 0, told
        checks = {flag["name"]: flag["verdict"] for flag in told["results"][0]["flags"]}
        assert checks["process"] == checks["radius"] == "passed"

    (run,) = list_runs(tmp_path)
    loaded = load_encoder(run.checkpoints, run.recipe().model, device=torch.device("cpu"), talk=NullTalk())
    folder = run.probes / "linear-001"
    record = load_record(folder / RECORD, ProbeRecord)
    classifier = load_classifier(loaded, record, folder / HEAD, run.recipe())
    x = load_judged_images(run, record, talk=NullTalk()).images[:25].float() / 255

    def halved(points: Tensor) -> Tensor:
        """Half of what was added arrives, within the ball around what is known."""
        distance, place = (points.flatten(1)[:, None] - x.flatten(1)[None]).abs().amax(2).min(1)
        near = per_sample(distance <= 1.01 * EPS, points)
        known = x[place]
        return classifier(torch.where(near, known + 0.5 * (points - known), points))  # type: ignore[no-any-return]

    found = [leap(net, x, eps=EPS, norm="linf", generator=addressed_generator("leap")) for net in (classifier, halved)]
    assert float(found[0].median()) < 1.25 < _SHRUNK < 1.9 < float(found[1].median())
