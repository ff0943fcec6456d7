"""An export for RobustBench: its claim says what was measured, and its weights load into the model zoo's own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_export import CLASSES, IMAGES, TEST, USED, Made
from tiny import attack_record, data_used, probe_record, run_record, tiny_recipe
from torch import Tensor, nn

from cfamc_cli.commands import claim as module
from cfamc_cli.commands.claim import claim_of, require_architecture
from cfamc_cli.engine.heads.classifier import Classifier, LinearHead, write_head
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.store.records import (
    Accuracy,
    AttackRecord,
    ClassAccuracy,
    ExportRecord,
    Flag,
    MadeOn,
    ThreatModel,
    load_record,
)

STANDARD = {"name": "autoattack", "eps": "8/255", "norm": "linf", "version": "standard"}
WHOLE: dict[str, Any] = {
    "attack": "autoattack",
    "settings": STANDARD,
    "data": data_used("test", 10_000),
    "clean": Accuracy.of(8180, 10_000),
    "robust": Accuracy.of(4699, 10_000),
}
MODEL = {"width": 64, "stem": "cifar"}
RECIPE = tiny_recipe(model=MODEL, data={"dataset": "cifar10", "root": None})
HEAD = probe_record(features="backbone", test=data_used("test", 10_000))


def claimed(*attacks: AttackRecord, **run: Any) -> dict[str, object]:
    return claim_of(run_record(**run), RECIPE, HEAD, attacks, run="RUN")


def test_the_claim_has_the_boards_fields_and_the_newest_numbers() -> None:
    older = attack_record(**WHOLE | {"robust": Accuracy.of(1, 10_000)})
    newer = attack_record(**WHOLE | {"created": older.created.replace(hour=13)})
    found = claimed(newer, older, name="mine")
    assert list(found.items()) == [
        ("link", ""),
        ("name", "mine"),
        ("authors", ""),
        ("additional_data", False),
        ("number_forward_passes", 1),
        ("dataset", "cifar10"),
        ("venue", "Unpublished"),
        ("architecture", "ResNet-18"),
        ("eps", "8/255"),
        ("clean_acc", "81.80"),
        ("reported", "46.99"),
        ("autoattack_acc", "46.99"),
    ]
    assert claimed(newer, imported="x.pt")["additional_data"] is None
    other = RECIPE.model_copy(update={"data": RECIPE.data.model_copy(update={"dataset": "cifar100"})})
    assert claim_of(run_record(), other, HEAD, [newer], run="RUN")["additional_data"] is True
    begun = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"init": "other"})})
    assert claim_of(run_record(), begun, HEAD, [newer], run="RUN")["additional_data"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"attack": "pgd"},
        {"settings": STANDARD | {"version": "rand"}},
        {"data": data_used("test", 1000)},
        {"data": data_used("holdout", 10_000)},
        {"data": data_used("test", 10_000, "cifar100")},
        {"threat": ThreatModel(space="image", norm="linf", eps="4/255")},
        {"threat": ThreatModel(space="crops", norm="linf", eps="8/255")},
        {"threat": ThreatModel(space="image", norm="l2", eps="8/255")},
        {"source": MadeOn(run="a", probe="b", encoder_digest="c", head_digest="d")},
    ],
)
def test_no_number_comes_from_another_measurement(changes: dict[str, Any]) -> None:
    with pytest.raises(CfamcError, match="no standard AutoAttack at 8/255 on all test images of cifar10") as caught:
        claimed(attack_record(**WHOLE | changes))
    assert caught.value.exit_code == ExitCode.INVALID
    command = "cfamc attack RUN --head linear-001 --attack autoattack --eps 8/255 --split test"
    assert caught.value.hint == f"make one: {command}"


def test_no_number_comes_from_an_evaluation_that_is_not_trusted() -> None:
    bad = Flag(name="zero-gradient", figure=1.0, limit=0.1, verdict="failed", text="x")
    with pytest.raises(CfamcError, match="not to be trusted: zero-gradient") as caught:
        claimed(attack_record(**WHOLE | {"flags": (bad,)}))
    assert caught.value.exit_code == ExitCode.UNTRUSTED


@pytest.mark.parametrize(
    ("model", "head", "cause"),
    [
        ({"width": 32}, {}, "is 64 wide, and this one 32"),
        ({"stem": "imagenet"}, {}, "has the cifar stem, not imagenet"),
        ({"input_size": 64}, {}, "take images as they are"),
        ({"backbone": "timm:resnet18"}, {}, "the zoo's ResNets are no resnet18"),
        ({}, {"features": "pre_feature"}, "reads pre_feature, which the zoo's networks lack"),
        ({}, {"head": "crops"}, "reads random crops"),
        ({}, {"data": {"dataset": "cifar10", "size": 48}}, "have 32 pixels a side"),
        ({}, {"test": data_used("test", 26032, "svhn")}, "no board for svhn"),
    ],
)
def test_what_the_zoo_cannot_hold_is_refused(model: dict[str, Any], head: dict[str, Any], cause: str) -> None:
    recipe = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update=model)})
    with pytest.raises(CfamcError, match=cause) as caught:
        require_architecture(recipe, HEAD.model_copy(update=head), run="RUN")
    assert caught.value.exit_code == ExitCode.INVALID
    assert caught.value.hint
    require_architecture(RECIPE, HEAD, run="RUN")


# The weights


class Block(nn.Module):
    """A basic block by the zoo's names: `shortcut` is empty where shapes agree."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        changed = (nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Sequential(*(changed if stride > 1 else ()))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class Zoo(nn.Module):
    """The zoo's ResNet-18: a stem of 64 channels, four stages of two blocks, pooling over 4x4, and `linear`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for stage in range(4):
            width = 64 * 2**stage
            blocks = Block(inputs, width, 2 if stage else 1), Block(width, width, 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = width
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.linear(F.avg_pool2d(x, 4).flatten(1))
        return logits


def test_the_weights_load_into_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DATA", ("fashion-mini",))
    made = Made(tmp_path / "runs", width=64)
    generator = torch.Generator().manual_seed(3)
    head = LinearHead(512, len(CLASSES), standardized=True)
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    classifier = Classifier(made.encoder, head, features="backbone").eval().requires_grad_(False)
    (made.path / "probes/linear-001").mkdir(parents=True)
    digest = write_head(made.path / "probes/linear-001/head.safetensors", classifier, finetuned=False)
    made.probe = probe_record(
        run=made.path.name,
        features="backbone",
        settings={"head": "linear", "features": "backbone", "standardize": True},
        encoder_digest=made.digest,
        head_digest=digest,
        test=USED,
        classes=tuple(ClassAccuracy(name=name, accuracy=Accuracy.of(70, 100)) for name in CLASSES),
        data=made.recipe.data.model_dump(mode="json"),
    )
    (made.path / "probes/linear-001/record.json").write_text(made.probe.model_dump_json())
    out = tmp_path / "out"
    assert made.export(out, "--format", "robustbench", "--head", "linear-001") == ExitCode.INVALID
    assert not out.exists()
    made.add_attack("autoattack-001", attack="autoattack", settings=STANDARD)
    assert made.export(out, "--format", "robustbench", "--part", "backbone") == ExitCode.INVALID
    assert made.export(out, "--format", "robustbench", "--head", "linear-001") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "claim.json", "classifier.safetensors", "export.json")
    ]
    claim = json.loads((out / "claim.json").read_text())
    assert (claim["dataset"], claim["autoattack_acc"]) == ("fashion-mini", "33.40")

    from safetensors.torch import load_file

    zoo = Zoo(len(CLASSES))
    zoo.load_state_dict(load_file(out / "classifier.safetensors"))  # strict: every name, and no other
    images = IMAGES.double()  # in float32 the order of sums alone makes more than 1e-5
    with torch.no_grad():
        found, live = zoo.double().eval()(images), classifier.double()(images)
    torch.testing.assert_close(found, live, rtol=1e-5, atol=1e-5 * float(live.abs().max()))
    record = load_record(out / "export.json", ExportRecord)
    assert (record.part, record.format) == ("classifier", "robustbench")
    card = (out / "README.md").read_text()
    assert f"resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2], num_classes={len(CLASSES)})" in card
    assert len(TEST) == USED.n
