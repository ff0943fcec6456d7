"""Exports load without cfamc, agree with the live model, exist whole or not at all, and say what was not measured."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny import ENVIRONMENT, NOON, attack_record, data_used, probe_record, run_record, tiny_recipe, write_record
from torch import Tensor, nn

from cfamc_cli import errors
from cfamc_cli.cli import run as command_line
from cfamc_cli.engine import checkpoint, export
from cfamc_cli.engine.data.sets import load as load_data
from cfamc_cli.engine.encoder import Encoder, build_encoder
from cfamc_cli.engine.heads.classifier import Classifier, LinearHead, write_head
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.file import to_toml
from cfamc_cli.recipe.schema import Features, Model, Normalize
from cfamc_cli.report.hub import REGISTERED_BY
from cfamc_cli.report.metrics import comma_separated
from cfamc_cli.report.terminal import clean
from cfamc_cli.store.records import (
    Accuracy,
    ClassAccuracy,
    ClassRobustness,
    DataUsed,
    EvaluationLine,
    ExportRecord,
    Flag,
    GripLine,
    Line,
    MeasuredPoint,
    MeasureRecord,
    OutputSpec,
    Spectrum,
    ThreatModel,
    TrainLine,
    UnlabelledRecord,
    load_record,
)

RUN = "20261122-120000-tiny-000000"
CPU = torch.device("cpu")
RECIPE = tiny_recipe(data={"dataset": "fashion-mini", "root": None, "limit": 64}, crops=[{"count": 4, "size": 16}])
TEST = load_data(RECIPE.data, "test", seed=0, cache=Path(), talk=NullTalk())
CLASSES = TEST.classes
USED = DataUsed(dataset="fashion-mini", split="test", n=len(TEST), fingerprint=TEST.fingerprint)
IMAGES = TEST.images[:10].float() / 255


def by_class(robust: int) -> tuple[ClassRobustness, ...]:
    """Ten classes of 100 images, of which 70 are right, and so many in all under attack."""
    most, rest = divmod(robust, len(CLASSES))
    return tuple(
        ClassRobustness(name=name, clean=Accuracy.of(70, 100), robust=Accuracy.of(most + (place < rest), 100))
        for place, name in enumerate(CLASSES)
    )


class Made:
    """A finished run whose weights were drawn, with running statistics that are not their initial ones."""

    def __init__(self, store: Path, *, name: str = "tiny", progress: dict[str, object] | None = None, **model: Any):
        table = RECIPE.model.model_copy(update=model)
        self.recipe = RECIPE.model_copy(update={"name": name, "model": table})
        self.store, self.path = store, store / RUN
        self.path.mkdir(parents=True)
        generator = torch.Generator().manual_seed(5)
        self.encoder: Encoder = build_encoder(self.recipe.model, generator=generator).eval()
        for module in self.encoder.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean = torch.randn(module.num_features, generator=generator) / 10
                module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
        (self.path / "recipe.toml").write_text(to_toml(self.recipe))
        (self.path / "resolved.json").write_text(json.dumps(self.recipe.resolved()))
        self.digest = checkpoint.digest_of(self.encoder)
        saved = checkpoint.Checkpoint(self.encoder.state_dict(), {}, progress or {})
        checkpoint.save(self.path / "checkpoints", 24, saved)
        self.record()

    def record(self, **changes: Any) -> None:
        settled = {
            "id": RUN,
            "name": self.recipe.name,
            "recipe_digest": self.recipe.digest(),
            "data": data_used("train", 64, "fashion-mini"),
        }
        write_record(self.path / "run.json", run_record(**settled | changes))

    def add_probe(
        self, item: str = "linear-001", *, features: Features = "pre_feature", standardize: bool = False, **changes: Any
    ) -> Classifier:
        """A linear head fitted to 500 test images: good enough for attacks to have something to break."""
        from cfamc_cli.engine.heads.frozen import extract_features

        inputs = extract_features(self.encoder, TEST.images[:500], device=CPU, features=features)
        head = LinearHead(inputs.shape[1], len(CLASSES), standardized=standardize)
        labels = TEST.require_labels()[:500]
        mean, std = inputs.mean(0), inputs.std(0) + 1e-3
        targets = nn.functional.one_hot(labels, len(CLASSES)).float() - 0.1
        weight = torch.linalg.lstsq((inputs - mean) / std, targets).solution.T
        with torch.no_grad():
            if standardize:
                assert head.mean is not None
                assert head.std is not None
                head.mean.copy_(mean)
                head.std.copy_(std)
                head.weight.copy_(weight)
            else:
                head.weight.copy_(weight / std)
                head.bias.copy_(-(weight / std) @ mean)
        classifier = Classifier(self.encoder, head, features=features).eval().requires_grad_(False)
        folder = self.path / "probes" / item
        folder.mkdir(parents=True)
        settled = {
            "id": item,
            "run": RUN,
            "recipe_digest": self.recipe.digest(),
            "features": features,
            "settings": {"head": "linear", "features": features, "standardize": standardize},
            "encoder_digest": self.digest,
            "head_digest": write_head(folder / "head.safetensors", classifier, finetuned=False),
            "train": data_used("train", 64, "fashion-mini"),
            "test": USED,
            "classes": tuple(ClassAccuracy(name=name, accuracy=Accuracy.of(70, 100)) for name in CLASSES),
            "data": self.recipe.data.model_dump(mode="json"),
        }
        self.probe = probe_record(**settled | changes)
        write_record(folder / "record.json", self.probe)
        return classifier

    def add_attack(self, item: str = "pgd-001", **changes: Any) -> None:
        settled = {
            "id": item,
            "run": RUN,
            "probe": self.probe.id,
            "recipe_digest": self.recipe.digest(),
            "features": self.probe.features,
            "settings": {"name": "pgd", "eps": "8/255", "steps": 20, "step_size": "0.01"},
            "data": USED,
            "encoder_digest": self.digest,
            "head_digest": self.probe.head_digest,
            "robust": Accuracy.of(334, 1000),
            "classes": by_class(334),
        }
        write_record(self.path / "attacks" / item / "record.json", attack_record(**settled | changes))

    def export(self, out: Path, *arguments: str) -> int:
        return command_line(
            ["export", RUN, "--runs", str(self.store), "--out", str(out), "--device", "cpu", *arguments]
        )


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "runs")


def fenced_python(card: Path) -> str:
    found = re.search(r"```python\n(.*?)\n```", card.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch, images: Any = IMAGES) -> dict[str, Any]:
    """Run the card's own lines, in the folder of the export."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"images": images}
    with torch.no_grad():
        exec(compile(fenced_python(folder / "README.md"), "README.md", "exec"), names)
    return names


# Weights that load elsewhere


@pytest.mark.parametrize(
    ("backbone", "stem", "width"),
    [
        ("resnet18", "cifar", 64),
        ("resnet18", "cifar", 16),
        ("resnet18", "imagenet", 16),
        ("resnet18", "cifar-padded", 16),
        ("resnet18", "cifar-linear", 4),
        ("resnet34", "cifar", 4),
        ("resnet50", "imagenet", 4),
        pytest.param("resnet34", "imagenet", 64, marks=pytest.mark.slow),
        pytest.param("resnet50", "imagenet", 64, marks=pytest.mark.slow),
    ],
)
def test_a_backbone_loads_into_torchvision_by_the_lines_of_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, stem: str, width: int
) -> None:
    made = Made(tmp_path / "runs", backbone=backbone, stem=stem, width=width)
    assert made.export(tmp_path / "out") == 0
    assert "cfamc_cli" not in fenced_python(tmp_path / "out/README.md")
    names = run_card(tmp_path / "out", monkeypatch)
    assert type(names["net"]).__module__.startswith("torchvision.")
    torch.testing.assert_close(names["features"], made.encoder.backbone(IMAGES).detach(), rtol=1e-3, atol=1e-4)
    assert load_record(tmp_path / "out/export.json", ExportRecord).check.reader.startswith("torchvision")


@pytest.mark.parametrize(
    ("backbone", "stem", "width"),
    [
        ("resnet18", "cifar", 16),
        ("resnet50", "cifar", 4),
        ("resnet18", "imagenet", 64),
        pytest.param("resnet18", "cifar", 64, marks=pytest.mark.slow),
    ],
)
def test_timm_loads_the_folder_with_not_a_bit_of_difference(
    tmp_path: Path, backbone: str, stem: str, width: int
) -> None:
    """The CIFAR stem by the names that a module of ours gives to timm."""
    timm: Any = importlib.import_module("timm")
    if stem == "cifar":
        importlib.import_module(REGISTERED_BY)
    made = Made(tmp_path / "runs", backbone=backbone, stem=stem, width=width)
    assert made.export(tmp_path / "out") == 0
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torchvisions = export.torchvision_backbone(made.recipe.model).eval()
    torchvisions.load_state_dict(checkpoint.read_tensors(tmp_path / "out/model.safetensors"))
    with torch.no_grad():
        assert isinstance(net, timm.models.resnet.ResNet)
        assert float((net(IMAGES) - torchvisions(IMAGES)).abs().max()) == 0.0
        torch.testing.assert_close(net(IMAGES), made.encoder.backbone(IMAGES), rtol=1e-4, atol=1e-5)
        tuned = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7).eval()
        assert tuned(IMAGES).shape == (10, 7)
        assert torch.equal(tuned.forward_head(tuned.forward_features(IMAGES), pre_logits=True), net(IMAGES))
    pixels = timm.data.resolve_data_config(model=net)
    assert [[*pixels[key]] for key in ("mean", "std", "input_size")] == [[0, 0, 0], [1, 1, 1], [3, 28, 28]]
    card = (tmp_path / "out/README.md").read_text()
    assert 'timm.create_model("local-dir:.", pretrained=True)`' in card
    assert (f"`import {REGISTERED_BY}; timm" in card, "with cfamc installed" in card) == (stem == "cifar",) * 2
    taps = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, features_only=True).eval()
    sides = [part.shape[-1] for part in taps(torch.zeros(1, 3, 32, 32))]
    assert [32 // side for side in sides] == taps.feature_info.reduction()


def test_what_timm_does_not_make_it_says_it_does_not_know(made: Made, tmp_path: Path) -> None:
    import timm

    assert made.export(tmp_path / "out", "--part", "encoder") == 0
    with pytest.raises(RuntimeError, match="cfamc_encoder"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert "timm" not in (tmp_path / "out/README.md").read_text()


def test_an_encoder_of_another_width_loads_by_the_lines_of_its_card(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made.export(tmp_path / "out", "--part", "encoder") == 0
    found = run_card(tmp_path / "out", monkeypatch)["features"]
    torch.testing.assert_close(found, made.encoder.features(IMAGES).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", ["pre_feature", "backbone"])
@pytest.mark.parametrize("standardize", [False, True])
def test_a_classifier_loads_by_the_lines_of_its_card_as_plain_layers(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: Features, standardize: bool
) -> None:
    live = made.add_probe(features=features, standardize=standardize)
    assert made.export(tmp_path / "out", "--part", "classifier", "--head", "linear-001") == 0
    found = run_card(tmp_path / "out", monkeypatch)["logits"]
    torch.testing.assert_close(found, live(IMAGES), rtol=1e-3, atol=1e-4)
    assert torch.equal(found.argmax(1), live(IMAGES).argmax(1))
    keys = checkpoint.read_tensors(tmp_path / "out/model.safetensors").keys()
    assert {key.partition(".")[0] for key in keys} == {"backbone", "head"} | (
        {"pre_feature"} if features == "pre_feature" else set()
    )
    assert load_record(tmp_path / "out/export.json", ExportRecord).classes == CLASSES


def adversarial(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """PGD of 5 steps at 8/255, on batches of 100."""
    parts = []
    for x, y in zip(torch.split(images, 100), torch.split(labels, 100), strict=True):
        delta = torch.zeros_like(x)
        for _ in range(5):
            delta.requires_grad_(True)
            loss = nn.functional.cross_entropy(classifier((x + delta).clamp(0, 1)), y)
            (grad,) = torch.autograd.grad(loss, delta)
            delta = (delta.detach() + 0.01 * grad.sign()).clamp(-8 / 255, 8 / 255)
        parts.append((x + delta).clamp(0, 1))
    return torch.cat(parts)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_a_classifier_predicts_the_same_through_other_runtimes(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    live = made.add_probe(standardize=True)
    assert made.export(tmp_path / "out", "--part", "classifier", "--format", form) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        f"classifier.{form}",
        "export.json",
    ]
    real = TEST.images.float() / 255
    attacked = adversarial(live, real, TEST.require_labels())
    broken = live(attacked).argmax(1) != live(real).argmax(1)
    assert broken.float().mean() > 0.2  # else the attack would show nothing
    for images in (real, attacked):
        found = run_card(tmp_path / "out", monkeypatch, images.numpy() if form == "onnx" else images)["logits"]
        found = torch.as_tensor(found)
        torch.testing.assert_close(found, live(images), rtol=1e-3, atol=1e-4)
        assert torch.equal(found.argmax(1), live(images).argmax(1))
    data = (tmp_path / f"out/classifier.{form}").read_bytes()
    named = hashlib.sha256(data).hexdigest() in fenced_python(tmp_path / "out/README.md")
    assert named == (form == "pt2")  # whose loader may run what a stranger wrote
    assert str(Path(export.__file__).parent).encode() not in data  # where it was made is nobody's business


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ("safetensors", "backbone"),
        ("safetensors", "encoder"),
        pytest.param("pt2", "backbone", marks=pytest.mark.slow),
        pytest.param("onnx", "backbone", marks=pytest.mark.slow),
    ],
)
def test_normalisation_and_size_go_along_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, part: str
) -> None:
    wanted = Normalize(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    made = Made(tmp_path / "runs", normalize=wanted, input_size=20)
    assert made.export(tmp_path / "out", "--part", part, "--format", form) == 0
    found = run_card(tmp_path / "out", monkeypatch, IMAGES.numpy() if form == "onnx" else IMAGES)["features"]
    with torch.no_grad():
        live = made.encoder.features(IMAGES, features="backbone" if part == "backbone" else "pre_feature")
        bare = made.encoder.backbone(IMAGES)
    torch.testing.assert_close(torch.as_tensor(found), live, rtol=1e-3, atol=1e-4)
    assert part == "encoder" or not torch.allclose(live, bare, rtol=1e-2, atol=1e-2)
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "Subtracting the mean 0.5, 0.4, 0.3 and dividing by 0.2, 0.3, 0.4 is part of the network. Resizing to 20"
        in card
    )
    assert load_record(tmp_path / "out/export.json", ExportRecord).input.range == (0.0, 1.0)


# Nothing unchecked is handed over


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_computes_something_else_is_removed(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = export.read_back

    def slightly_wrong(*arguments: Any, **named: Any) -> tuple[str, export.Forward]:
        reader, forward = right(*arguments, **named)
        return reader, lambda x: forward(x) * (1.01 if len(x) == 7 else 1)

    monkeypatch.setattr(export, "read_back", slightly_wrong)
    assert made.export(tmp_path / "exports/out") == ExitCode.FAILED
    assert left(tmp_path / "exports") == []
    message = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"error: model\.safetensors, read back by torchvision \S+, differs from the live model at batch 7 "
        r"by up to \S+, more than 0\.001 relative and 1e-05 absolute",
        message[-2],
    )
    assert message[-1].startswith("hint: ")


def test_a_file_that_cannot_be_read_back_is_removed(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def torn(path: Path, tensors: Any) -> str:
        path.write_bytes(checkpoint.encode(tensors)[:-1])
        return ""

    monkeypatch.setattr(checkpoint, "write_tensors", torn)
    assert made.export(tmp_path / "exports/out") == ExitCode.FAILED
    assert left(tmp_path / "exports") == []
    assert "error: model.safetensors cannot be read back: " in capsys.readouterr().err


def constant(logits: Tensor, output: Literal["logits", "features"] = "logits") -> export.Subject:
    made = OutputSpec(name=output, dim=logits.shape[-1])
    return export.Subject(Model(), nn.Identity(), lambda x: logits.expand(len(x), -1), CPU, made)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (torch.tensor([1.0, 1.0 + 1e-6]), "another class"),
        (torch.tensor([float("nan"), 1.0]), "by up to nan"),
        (torch.ones(3), "shape"),
    ],
)
def test_another_class_nan_and_another_shape_are_differences(found: Tensor, text: str) -> None:
    images = export.some_images(TEST.images)
    with pytest.raises(CfamcError, match=text):
        export.compare(
            constant(torch.tensor([1.0 + 1e-6, 1.0])),
            lambda x: found.expand(len(x), -1),
            images,
            name="x",
        )


def test_the_check_uses_different_images_in_batches_of_1_2_and_7() -> None:
    assert export.some_images(TEST.images).shape == (10, 3, 28, 28)
    assert torch.equal(export.some_images(TEST.images[:3])[3], TEST.images[0])
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.ones(len(x), 2)

    export.compare(constant(torch.ones(2), "features"), forward, TEST.images[:10], name="x")
    assert [len(x) for x in seen] == [1, 2, 7]
    assert torch.equal(torch.cat(seen), IMAGES)


def test_replacing_needs_force_and_an_earlier_export(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = tmp_path / "exports"
    (exports / "empty").mkdir(parents=True)
    assert made.export(exports / "empty") == 0  # an empty folder is free
    assert made.export(exports / "empty") == ExitCode.INVALID
    assert "--force replaces it" in capsys.readouterr().err
    assert made.export(exports / "empty", "--force", "--part", "encoder") == 0
    assert left(exports) == ["empty"]
    assert left(exports / "empty") == ["README.md", "config.json", "export.json", "model.safetensors"]
    (exports / "mine").mkdir()
    (exports / "mine/thesis.tex").touch()
    assert made.export(exports / "mine", "--force") == ExitCode.INVALID
    assert "exists and is no export" in capsys.readouterr().err
    monkeypatch.setattr(export, "ATOL", -1.0)
    monkeypatch.setattr(export, "RTOL", 0.0)
    assert made.export(exports / "empty", "--force") == ExitCode.FAILED
    assert left(exports / "empty") == ["README.md", "config.json", "export.json", "model.safetensors"]
    assert left(exports) == ["empty", "mine"]


@pytest.mark.parametrize("strange", ["thesis.tex", "README.md", "export.json", "model.safetensors", "folder", "link"])
def test_force_replaces_nothing_but_what_an_export_wrote(
    strange: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file beside the export's, one of them that was changed, another program's export.json, a folder, a link."""
    out = tmp_path / "out"
    assert made.export(out, "--part", "encoder") == 0
    match strange:
        case "folder":
            (out / strange).mkdir()
        case "link":
            (out / strange).symlink_to("README.md")
        case "export.json":
            (out / strange).write_text('{"files": "all of them"}')
        case _:
            (out / strange).write_text("mine")
    before = {path.name: path.lstat().st_mtime_ns for path in out.iterdir()}
    assert made.export(out, "--force") == ExitCode.INVALID
    assert f"out holds {strange}, which is not what the export there wrote" in capsys.readouterr().err
    assert {path.name: path.lstat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("at", ["before its own is in place", "after"])
def test_what_a_killed_export_left_is_put_back_or_swept(at: str, made: Made, tmp_path: Path) -> None:
    out, aside = tmp_path / "out", tmp_path / ".replaced-out-0123abcd"
    assert made.export(out, "--part", "encoder") == 0
    if at == "after":
        shutil.copytree(out, aside)
    else:
        out.rename(aside)
    assert made.export(out) == ExitCode.INVALID  # an export is there
    assert left(tmp_path) == ["out", "runs"]
    assert left(out) == ["README.md", "config.json", "export.json", "model.safetensors"]


def test_a_folder_that_was_filled_while_the_export_worked_is_left_alone(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.write

    def slow(*arguments: Any, **named: Any) -> Any:
        (tmp_path / "exports/out").mkdir()
        (tmp_path / "exports/out/thesis.tex").touch()
        return right(*arguments, **named)

    monkeypatch.setattr(export, "write", slow)
    assert made.export(tmp_path / "exports/out", "--force") == ExitCode.INVALID
    assert left(tmp_path / "exports") == ["out"]
    assert left(tmp_path / "exports/out") == ["thesis.tex"]


# Sidecar and card


def test_the_sidecar_says_what_a_loader_must_know(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.add_probe()
    made.add_attack()
    assert made.export(tmp_path / "out", "--part", "encoder", "--json", "--quiet") == 0
    printed = json.loads(capsys.readouterr().out)
    record = load_record(tmp_path / "out/export.json", ExportRecord)
    assert printed == {"path": str(tmp_path / "out"), **record.model_dump(mode="json")}
    assert [written.name for written in record.files] == ["README.md", "config.json", "model.safetensors"]
    for written in record.files:
        data = (tmp_path / "out" / written.name).read_bytes()
        assert (written.size, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert record.input.model_dump() == {
        "name": "images",
        "channels": "RGB",
        "height": 28,
        "width": 28,
        "dtype": "float32",
        "range": (0.0, 1.0),
    }
    assert (record.output.name, record.output.dim, record.classes) == ("features", 16, None)
    assert record.source.encoder_digest == made.digest
    assert record.recipe["model"] == made.recipe.resolved()["model"]
    assert record.licence == "MIT, Copyright (c) 2017 Zalando SE"
    assert [probe.id for probe in record.probes] == ["linear-001"]
    assert [attack.robust.correct for attack in record.attacks] == [334]


def test_the_card_has_numbers_with_intervals_and_threat_models_and_what_is_missing(made: Made, tmp_path: Path) -> None:
    made.add_probe()
    made.add_attack()
    made.add_attack("autoattack-001", attack="autoattack", settings={"version": "rand"})
    crops = ThreatModel(space="crops", norm="linf", eps="4/255")
    failed = Flag(name="masking", figure=1.0, limit=0.0, verdict="failed", text="")
    made.add_attack("pgd-002", threat=crops, flags=(failed,), notes=("a note",))
    assert made.export(tmp_path / "out", "--part", "classifier") == 0
    card = (tmp_path / "out/README.md").read_text()
    assert r"70.0 \[67.1, 72.8\]" in card
    assert r"33.4 \[30.5, 36.4\]" in card
    assert "| linf 8/255, every pixel of the image | pgd: steps 20, step\\_size 0.01 |" in card
    assert "| linf 4/255, every crop by itself |" in card
    assert "failed: masking" in card
    assert "- a note" in card
    gaps = card.partition("## Not measured")[2].partition("##")[0]
    assert "standard AutoAttack" in gaps
    assert "Perturbations in l2" in gaps
    assert "Perturbations larger than linf 8/255," in gaps
    assert "float32, (batch, 3, 28, 28), RGB, values in [0, 1]" in card
    assert "Licence of the data: MIT, Copyright (c) 2017 Zalando SE." in card


def metadata(folder: Path) -> tuple[Any, list[Any]]:
    """The card's metadata and its results, as huggingface_hub reads them; it refuses what is no metadata of a model."""
    hub: Any = importlib.import_module("huggingface_hub")
    data = hub.ModelCard((folder / "README.md").read_text(), ignore_metadata_errors=False).data
    return data, data.eval_results or []


def test_the_hub_reads_the_metadata_of_the_card(made: Made, tmp_path: Path) -> None:
    """By huggingface_hub's own parser; its `validate` asks a server."""
    made.add_probe()
    made.add_attack(
        threat=ThreatModel(space="image", norm="linf", eps="4/255"),
        robust=Accuracy.of(512, 1000),
        classes=by_class(512),
    )
    made.add_attack("pgd-002")
    assert made.export(tmp_path / "out", "--part", "classifier", "--head", "linear-001") == 0
    data, results = metadata(tmp_path / "out")
    assert (data.library_name, data.license, data.datasets) == (
        "pytorch",
        "unknown",
        ["zalando-datasets/fashion_mnist"],
    )
    assert data.pipeline_tag == "image-classification"
    assert data.tags == [
        *("adversarial-robustness", "self-supervised-learning"),
        RECIPE.objective.name,
        f"{RECIPE.adversary.name}-adversarial-training",
    ]
    assert [(one.metric_type, one.metric_value, one.dataset_split) for one in results] == [
        ("accuracy", 70.0, "test"),
        ("robust_accuracy", 51.2, "test"),
        ("robust_accuracy", 33.4, "test"),
    ]
    assert results[1].metric_name == "% right, under pgd in linf 4/255, of 1,000 test images"
    made.record(imported="/somewhere/weights.pt")
    assert made.export(tmp_path / "foreign") == 0
    data, _ = metadata(tmp_path / "foreign")
    assert (data.tags, data.datasets) == (["adversarial-robustness"], None)
    assert "Others trained it" in (tmp_path / "foreign/README.md").read_text()


def test_the_card_leads_with_what_can_be_trusted_most_and_folds_the_rest(made: Made, tmp_path: Path) -> None:
    drift = Flag(name="between", figure=0.0, limit=0.0, verdict="passed", text="")
    failed = Flag(name="gradient", figure=1.0, limit=0.0, verdict="failed", text="")
    made.add_probe("linear-001")
    made.add_attack("pgd-001", robust=Accuracy.of(500, 1000), classes=by_class(500))
    made.add_attack("pgd-002", robust=Accuracy.of(410, 1000), classes=by_class(410), flags=(drift,))
    made.add_attack("pgd-003", robust=Accuracy.of(400, 1000), classes=by_class(400), flags=(drift,))
    made.add_attack("pgd-004", robust=Accuracy.of(690, 1000), classes=by_class(690), flags=(drift, failed))
    made.add_probe("linear-002", standardize=True)
    made.add_attack("pgd-005", robust=Accuracy.of(600, 1000), classes=by_class(600))  # of a better head, not audited
    assert made.export(tmp_path / "out", "--part", "encoder") == 0
    card = (tmp_path / "out/README.md").read_text()
    lead, folded = card.partition("## Loading")[0], card.partition("<details>")[2]
    assert re.findall(r"\| (\d\d\.\d) [^|]*\| [^|]*audited \|", lead) == ["40.0"]
    assert "The full audit, which attacks again in other ways, was made and found nothing." in lead
    assert [f"{share} \\[" in folded for share in ("50.0", "41.0", "40.0", "69.0", "60.0")] == [True] * 5
    assert not re.search(r"50\.0|41\.0|69\.0|60\.0", lead)
    assert card.count("<details>") == card.count("</details>") == 3
    listed = load_record(tmp_path / "out/export.json", ExportRecord).attacks
    assert [(one.id, one.audited, one.failed) for one in listed][:2] == [("pgd-003", True, ()), ("pgd-001", False, ())]
    assert ("pgd-004", True, ("gradient",)) in [(one.id, one.audited, one.failed) for one in listed]


def test_no_attack_that_passed_leads_nothing(made: Made, tmp_path: Path) -> None:
    failed = Flag(name="gradient", figure=1.0, limit=0.0, verdict="failed", text="")
    made.add_probe()
    made.add_attack(flags=(failed,))
    made.add_attack("pgd-002", threat=ThreatModel(space="crops", norm="linf", eps="4/255"))
    assert made.export(tmp_path / "out", "--part", "encoder") == 0
    assert "No attack on whole images" in (tmp_path / "out/README.md").read_text().partition("## Loading")[0]
    assert [one.metric_type for one in metadata(tmp_path / "out")[1]] == ["accuracy"]


def test_the_sidecar_stays_small_and_the_card_has_all(made: Made, tmp_path: Path) -> None:
    for head in range(15):
        made.add_probe(f"linear-{head:03}")
        made.add_attack(f"pgd-{head:03}")
    assert made.export(tmp_path / "out", "--part", "encoder") == 0
    assert (tmp_path / "out/export.json").stat().st_size < 20_000
    card = (tmp_path / "out/README.md").read_text()
    assert [f"| linear-{head:03} |" in card for head in range(15)] == [True] * 15


def test_nothing_measured_is_said_plainly(made: Made, tmp_path: Path) -> None:
    assert made.export(tmp_path / "out") == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "Nothing was measured on these weights." in card
    assert "- Accuracy under any attack: nothing is known about robustness." in card


def test_results_of_other_weights_stay_out(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.add_probe()
    made.add_attack("pgd-old", encoder_digest="ee")
    made.add_attack("pgd-other", head_digest="dd")
    (made.path / "probes/torn-001").mkdir()
    (made.path / "probes/torn-001/record.json").write_text("{")
    assert made.export(tmp_path / "out", "--part", "encoder") == 0
    assert load_record(tmp_path / "out/export.json", ExportRecord).attacks == ()
    err = capsys.readouterr().err
    assert "measured on other weights: pgd-old" in err
    assert "torn-001/record.json" in err


def test_a_classifier_has_the_results_of_its_own_head_and_an_encoder_those_of_every_frozen_one(
    made: Made, tmp_path: Path
) -> None:
    kinds: list[dict[str, Any]] = [{}, {"standardize": True}, {"features": "backbone", "head": "finetune"}]
    for number, changes in enumerate(kinds, start=1):
        made.add_probe(f"head-{number}", **changes)
        made.add_attack(f"pgd-{number}")
    for part, heads in {"classifier": [1], "encoder": [1, 2], "backbone": [1, 2]}.items():
        which = ["--head", "head-1"] if part == "classifier" else []
        assert made.export(tmp_path / part, "--part", part, *which) == 0
        record = load_record(tmp_path / part / "export.json", ExportRecord)
        assert [probe.id for probe in record.probes] == [f"head-{number}" for number in heads]
        assert [attack.id for attack in record.attacks] == [f"pgd-{number}" for number in heads]


def test_hostile_text_is_not_markup_and_paths_stay_at_home(tmp_path: Path) -> None:
    name = "<script>alert(1)</script> `x` [a](http://b) | \x1b[31m ``` \u202e"
    hostile = Made(tmp_path / "runs", name=name)
    secret = "/home/someone/private"
    hostile.add_probe(data={"dataset": "fashion-mini", "root": secret})
    train = {**hostile.recipe.resolved()["train"], "init": f"{secret}/20261122-110000-before-aaaaaa"}
    resolved = hostile.recipe.resolved() | {"train": train}
    (hostile.path / "resolved.json").write_text(json.dumps(resolved))
    assert hostile.export(tmp_path / "out", "--part", "encoder") == 0
    text = (tmp_path / "out/README.md").read_text()
    card, recipe = text.split("````toml")
    assert "<script>" not in card.replace(r"\<script", "")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert recipe.endswith("\n````\n\n</details>\n")
    assert metadata(tmp_path / "out")[0].model_name == clean(name)
    assert "20261122-110000-before-aaaaaa" in recipe
    assert secret not in text + (tmp_path / "out/export.json").read_text()


# Errors: one line, one hint, the right exit code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "linear-001"], "--head has no effect on --part backbone"),
        (["--part", "encoder", "--head", "linear-001"], "--head has no effect on --part encoder"),
        (["--metrics", "csv", "--part", "encoder", "--format", "onnx"], "--part, --format would have no effect"),
        (["--part", "classifier", "--head", "crops-001"], "aggregated crops reads random crops"),
        (["--part", "classifier", "--head", "nothing"], "has no probe 'nothing'"),
        (["--part", "everything"], "everything"),
        (["--device", "abacus"], "device 'abacus' is not available here"),
    ],
)
def test_what_cannot_be_exported(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    made.add_probe("crops-001", head="crops", settings={"head": "crops", "crops": 2})
    assert made.export(tmp_path / "out", *arguments) == ExitCode.INVALID
    err = capsys.readouterr().err.splitlines()
    assert message in err[-2]
    assert err[-2].startswith("error: ")
    assert err[-1].startswith("hint: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named_before_any_work(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == missing else object())
    assert made.export(tmp_path / "out", "--format", "onnx") == ExitCode.INVALID
    assert capsys.readouterr().err.splitlines() == [
        f"error: --format onnx needs {missing}",
        "hint: pip install 'cfamc[onnx]'",
    ]


def test_a_missing_tensorboard_is_named(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_metrics(made)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert made.export(tmp_path / "out", "--metrics", "tensorboard") == ExitCode.INVALID
    assert capsys.readouterr().err.splitlines() == [
        "error: --metrics tensorboard needs tensorboard",
        "hint: pip install 'cfamc[tensorboard]'",
    ]


def test_an_empty_store_a_damaged_checkpoint_and_an_imported_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    assert command_line(["export", "--runs", str(tmp_path / "none")]) == ExitCode.INVALID
    partial = Made(tmp_path / "partial", progress={"backbone_only": True})
    assert partial.export(tmp_path / "out", "--part", "encoder") == ExitCode.INVALID
    assert "there is only a backbone" in capsys.readouterr().err
    assert partial.export(tmp_path / "out") == 0
    weights = partial.path / "checkpoints/step-00000024/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert partial.export(tmp_path / "other") == ExitCode.BAD_DATA
    assert not (tmp_path / "other").exists()


def test_no_run_is_the_newest_with_weights_and_the_folder_is_named_after_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (made.store / "20261123-120000-later-000000").mkdir()
    made.record(status="interrupted")
    monkeypatch.chdir(tmp_path)
    assert command_line(["export", "--runs", str(made.store), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{RUN}-backbone-safetensors\n"
    assert "not finished (interrupted)" in err
    assert (tmp_path / out.strip() / "model.safetensors").is_file()


# Metrics

WHERE: dict[str, Any] = {"step": 6, "batch": 2, "epoch": 1.0}
TRAIN: dict[str, Any] = {"lr": 0.3, "gradient_norm": 1.0, "effective_rank": 2.0, "feature_std": 0.1}
LINES: list[Line] = [
    TrainLine(step=3, batch=1, epoch=0.5, loss=-1.5, **TRAIN),
    TrainLine(**WHERE, loss=math.nan, delta_mean=-math.inf, **TRAIN),
    EvaluationLine(**WHERE, n=1000, knn=300, clean=700, robust=100, eps="8/255", attack="=HYPERLINK(1)"),
    GripLine(**WHERE, clean=1.0, trained=1.0, strongest=2.0, strength=0.0, lost=True),
]


def put_metrics(made: Made) -> None:
    text = "".join(json.dumps(line.written()) + "\n" for line in LINES)
    (made.path / "metrics.jsonl").write_text(text)


def test_metrics_as_csv(made: Made, tmp_path: Path) -> None:
    put_metrics(made)
    assert made.export(tmp_path / "out", "--metrics", "csv") == 0
    assert left(tmp_path / "out") == ["evaluation.csv", "export.json", "grip.csv", "train.csv"]
    train, evaluation, grip = (
        (tmp_path / f"out/{kind}.csv").read_text().splitlines() for kind in ("train", "evaluation", "grip")
    )
    assert train == [
        "step,batch,epoch,lr,loss,gradient_norm,effective_rank,feature_std,delta_mean",
        "3,1,0.5,0.3,-1.5,1.0,2.0,0.1,",
        "6,2,1.0,0.3,nan,1.0,2.0,0.1,-inf",
    ]
    assert evaluation == [
        "step,batch,epoch,n,knn,clean,robust,eps,attack",
        "6,2,1.0,1000,300,700,100,8/255,'=HYPERLINK(1)",
    ]
    assert grip == ["step,batch,epoch,clean,trained,strongest,strength,lost", "6,2,1.0,1.0,1.0,2.0,0.0,true"]


def test_every_float_survives_the_csv() -> None:
    values = [0.1, 1e-300, -2.2250738585072014e-308, 1 / 3, 12345678901234567890.0]
    text = comma_separated([{"x": value} for value in values]).decode()
    assert [float(row["x"]) for row in csv.DictReader(io.StringIO(text))] == values


def test_metrics_as_tensorboard_events(made: Made, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    put_metrics(made)
    assert made.export(tmp_path / "out", "--metrics", "tensorboard") == 0
    (file,) = (tmp_path / "out").glob("events.out.tfevents.*")
    found = [
        (event.step, value.tag, value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value)
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    assert (3, "train/loss", -1.5) in found
    assert (6, "evaluation/clean", 700.0) in found
    assert (6, "grip/lost", 1.0) in found
    assert not [tag for _, tag, _ in found if tag.endswith(("/step", "/attack", "/kind"))]
    assert [value != value for step, tag, value in found if (step, tag) == (6, "train/loss")] == [True]


def test_no_metrics_yet(made: Made, tmp_path: Path) -> None:
    (made.path / "metrics.jsonl").touch()
    assert made.export(tmp_path / "out", "--metrics", "csv") == ExitCode.BAD_DATA
    assert not (tmp_path / "out").exists()


def test_the_card_has_measures_and_what_needs_no_labels(made: Made, tmp_path: Path) -> None:
    made.add_probe()
    share = Accuracy.of(300, 1000)

    def add(item: str, measure: str, settings: dict[str, Any], figures: dict[str, float], **changes: Any) -> None:
        place = {"smallest": ("accuracy", 128 / 255), "corruptions": ("blur", 1.0), "smoothing": ("certified", 0.25)}
        name, at = place[measure]
        same = attack_record(data=USED).model_dump(
            include={"created", "recipe_digest", "seed", "order_digest", "data", "clean", "wall_seconds", "environment"}
        )
        whole = same | {
            "id": item,
            "run": RUN,
            "probe": "linear-001",
            "head": "linear",
            "features": "pre_feature",
            "measure": measure,
            "settings": {"name": measure, **settings},
            "encoder_digest": made.digest,
            "head_digest": made.probe.head_digest,
            "points": (MeasuredPoint(name=name, at=at, accuracy=share),),
            "figures": figures,
            "flags": (),
            "forward": 1,
            "backward": 1,
        }
        write_record(made.path / "measures" / item / "record.json", MeasureRecord.model_validate(whole | changes))

    add("smallest-001", "smallest", {"norm": "l2", "steps": 30}, {"median eps": 0.4, "auc": 0.25, "auc up to eps": 2})
    add("corruptions-001", "corruptions", {"source": "ours"}, {"relative to clean": 0.8})
    add("smoothing-001", "smoothing", {"sigma": "0.25"}, {"mean certified radius": 0.1}, encoder_digest="ab")
    spectrum = Spectrum(layer="backbone", dim=64, rank_me=20.5, alpha=1.25)
    kept = UnlabelledRecord(
        id="embedding-linf-001",
        run=RUN,
        created=NOON,
        seed=0,
        encoder_digest=made.digest,
        data=USED,
        spectra=(spectrum,),
        features="pre_feature",
        norm="linf",
        settings={},
        movements=(),
        key="ab",
        wall_seconds=1.0,
        environment=ENVIRONMENT,
    )
    write_record(made.path / "unlabelled" / kept.id / "record.json", kept)
    assert made.export(tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("| linear")
    ]
    told = {row[1]: row[5] for row in rows if len(row) == 7}
    interval = "30.0 [27.2, 32.9]"
    assert {key.replace("\\", ""): value.replace("\\", "") for key, value in told.items()} == {
        "smallest: steps 30": f"{interval} at l2 128/255; median eps 0.4, AUC 0.25 up to 2",
        "corruptions: source ours": f"{interval} at the mean of all; relative to clean 0.8",
    }
    assert "20.5 of 64" in card
    assert "smoothing" not in card  # of other weights
    assert "noise, blur" not in card.split("## Not measured")[1].split("##")[0]
    assert "Perturbations in l2" not in card
