"""`cfamc probe` from the outside: records, files, what is refused and with which exit code; foreign encoders."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_networks import Theirs, drawn, read_in_this_process, torchvision_network
from PIL import Image
from safetensors.torch import save_file
from tiny import image_folder, run_record, tiny_recipe
from torch import Tensor

from cfamc_cli import cli
from cfamc_cli.commands.common import Options, session
from cfamc_cli.commands.probe import ensure_head, load_judged_images
from cfamc_cli.engine import checkpoint
from cfamc_cli.engine.checkpoint import Checkpoint
from cfamc_cli.engine.data.sets import load
from cfamc_cli.engine.device import Precision, computation
from cfamc_cli.engine.encoder import build_encoder
from cfamc_cli.engine.heads import classifier as heads
from cfamc_cli.engine.heads import imported
from cfamc_cli.engine.heads.classifier import Classifier
from cfamc_cli.engine.heads.frozen import classify
from cfamc_cli.engine.heads.imported import read_foreign
from cfamc_cli.engine.heads.supervised import SupervisedTrainer
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import CfamcError
from cfamc_cli.recipe import file as recipe_file
from cfamc_cli.recipe.schema import Model
from cfamc_cli.store.files import write_json, write_text
from cfamc_cli.store.records import DataUsed, FeatureMap, ProbeRecord, RunRecord, load_record, now, save_record
from cfamc_cli.store.runs import HEAD, RunFolder, cache_folder, create_run, standard_probe

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")


def head_of(run: RunFolder, options: Options, probe: str | None = None) -> Path:
    with session(options) as working:
        return ensure_head(run, encoder_in(run), working, probe=probe)


def encoder_in(run: RunFolder) -> heads.LoadedEncoder:
    return heads.load_encoder(run.checkpoints, run.recipe().model, device=CPU, talk=NullTalk())


def classifier_in(run: RunFolder, folder: Path) -> Classifier:
    record = load_record(folder / "record.json", ProbeRecord)
    return heads.load_classifier(encoder_in(run), record, folder / HEAD, run.recipe())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("CFAMC_RUNS", raising=False)


def make_run(store: Path, data: Path, **tables: Mapping[str, Any]) -> RunFolder:
    """A finished run, as pretraining leaves one, of an encoder that was not trained."""
    settled: dict[str, Any] = {"data": {"root": str(data)}, "crops": [{"count": 4, "size": 12}]}
    recipe = tiny_recipe("emp-ssl", "none", **settled | {"name": "small"} | tables)
    run = create_run(store, recipe.name, seed=0, now=now())
    write_text(run.recipe_toml, recipe_file.to_toml(recipe))
    write_json(run.resolved_json, recipe.resolved())
    encoder = build_encoder(recipe.model, generator=addressed_generator("small"))
    checkpoint.save(run.checkpoints, 9, Checkpoint(encoder.state_dict(), {}, {"step": 9}))
    images = load(recipe.data, "train", seed=0, cache=Path(os.environ["XDG_CACHE_HOME"]) / "cfamc", talk=NullTalk())
    used = DataUsed(dataset="folder", split="train", n=len(images), fingerprint=images.fingerprint)
    record = run_record(id=run.id, name=recipe.name, recipe_digest=recipe.digest(), data=used)
    save_record(run.run_json, record)
    return run


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """`cfamc probe` on one run, in this process."""

    def __init__(self, run: RunFolder, capture: pytest.CaptureFixture[str]) -> None:
        self.run, self._capture = run, capture

    def __call__(self, *arguments: str) -> Done:
        self._capture.readouterr()
        code = cli.run(["probe", *arguments, "--runs", str(self.run.path.parent), "--device", "cpu"])
        return Done(code, *self._capture.readouterr())

    def refused(self, *arguments: str, code: int) -> str:
        done = self(*arguments, "--json")
        assert done.code == code, done.err
        assert done.json["error"]["exit_code"] == code
        assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1
        return f"{done.json['error']['message']} / {done.json['error']['hint']}"


@pytest.fixture
def probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(make_run(tmp_path / "runs", image_folder(tmp_path / "images")), capsys)


QUICK = {
    "linear": ("--epochs", "2"),
    "robust-linear": ("--epochs", "1", "--set", "probe.steps=1"),
    "crops": ("--epochs", "2", "--crops", "2"),
    "knn": (),
    "finetune": ("--epochs", "1", "--set", "probe.steps=1", "--set", "probe.batch_size=8"),
}


@pytest.mark.parametrize("kind", QUICK)
def test_a_head_is_a_record_that_can_be_measured_again(probe: Command, kind: str) -> None:
    done = probe("--head", kind, *QUICK[kind], "--json", "--quiet")
    assert done.code == 0
    assert all("not clearly better than one class" in line for line in done.err.splitlines())  # few steps, few images
    folder = probe.run.probes / f"{kind}-001"
    names = {"record.json"} if kind == "knn" else {"record.json", "head.safetensors"}
    if kind in ("linear", "crops", "knn"):  # fitted to features that are kept
        names.add("map.json")
        points = load_record(folder / "map.json", FeatureMap).points
        assert [label for _, _, label in points] == [label for label in range(3) for _ in range(5)]
    assert {path.name for path in folder.iterdir()} == names
    record = load_record(folder / "record.json", ProbeRecord)
    assert done.json == record.model_dump(mode="json")
    assert (record.id, record.run, record.head) == (folder.name, probe.run.id, kind)
    assert (record.train.n, record.test.n) == (24, 15)
    assert [part.name for part in record.classes] == list(CLASSES)
    assert [sum(row) for row in record.confusion] == [5, 5, 5]
    assert sum(row[label] for label, row in enumerate(record.confusion)) == record.test_accuracy.correct
    assert (record.train_accuracy is None) == (kind == "knn")
    _, saved, _ = checkpoint.newest_valid(probe.run.checkpoints)
    assert record.encoder_digest == checkpoint.sha256(checkpoint.encode(saved.model))
    if kind == "knn":
        with pytest.raises(CfamcError, match="no differentiable logits") as refusal:
            classifier_in(probe.run, folder)
        assert refusal.value.exit_code == 2
        return
    assert record.head_digest == checkpoint.sha256((folder / "head.safetensors").read_bytes())
    images = load_judged_images(probe.run, record, talk=NullTalk())
    assert images.labels is not None
    classifier = classifier_in(probe.run, folder)
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    answers = classify(classifier, images.images, device=CPU)
    assert int((answers == images.labels).sum()) == record.test_accuracy.correct
    for label, (row, part) in enumerate(zip(record.confusion, record.classes, strict=True)):
        taken = answers[images.labels == label]
        assert list(row) == [int((taken == other).sum()) for other in range(3)]
        assert part.accuracy is not None
        assert (part.accuracy.correct, part.accuracy.n) == (row[label], 5)
    train = load(probe.run.recipe().data, "train", seed=0, cache=cache_folder(), talk=NullTalk())
    crops = classifier.crops and dataclasses.replace(classifier.crops, split="train")
    fitted = Classifier(classifier.encoder, classifier.head, features=classifier.features, crops=crops).eval()
    hits = classify(fitted, train.images, device=CPU) == train.require_labels()
    assert record.train_accuracy is not None
    assert (record.train_accuracy.correct, record.train_accuracy.n) == (int(hits.sum()), 24)


@pytest.mark.parametrize(("kind", "precision"), [("linear", "float32"), ("robust-linear", "bfloat16")])
def test_a_head_trained_through_the_encoder_is_computed_as_that_was(
    probe: Command, kind: str, precision: Precision
) -> None:
    recipe = probe.run.recipe_toml
    recipe.write_text(recipe.read_text().replace('precision = "float32"', 'precision = "bfloat16"'))
    probe("--head", kind, *QUICK[kind])
    record = load_record(probe.run.probes / f"{kind}-001" / "record.json", ProbeRecord)
    assert record.environment.computation == computation(CPU, precision=precision)


def test_the_same_probe_twice_is_the_same(probe: Command) -> None:
    first, second = (probe("--head", "crops", *QUICK["crops"], "--json").json for _ in range(2))
    for record in (first, second):
        for key in ("id", "created", "wall_seconds", "environment"):
            del record[key]
    assert first == second
    weights = [(probe.run.probes / name / "head.safetensors").read_bytes() for name in ("crops-001", "crops-002")]
    assert weights[0] == weights[1]


def test_a_table_says_how_sure_it_is(probe: Command) -> None:
    done = probe("--epochs", "2")
    assert "linear-001" in done.out
    assert "test % [95 %]" in done.out
    assert all(name in done.out for name in CLASSES)
    assert "took" in done.err


def test_a_head_at_chance_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Noise that the class has no part in, and classes that their colour tells."""
    for name, told in (("noise", 0), ("colour", 100)):
        images = image_folder(tmp_path / name, train=20, test=20, told=told)
        probe = Command(make_run(tmp_path / f"{name} runs", images), capsys)
        done = probe("--protocol", "converged", "--quiet")
        assert done.code == 0
        told_so = [line for line in done.err.splitlines() if line.startswith("warning: linear-001 is right on ")]
        assert [line.endswith("not clearly better than one class for all: 33.3") for line in told_so] == (
            [True] if name == "noise" else []
        )


def test_options_lie_over_the_recipes_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {"head": "linear", "features": "backbone", "epochs": 3, "lr": 0.01}
    probe = Command(make_run(tmp_path / "runs", image_folder(tmp_path / "images"), probe=table), capsys)
    assert probe("--json").json["settings"] == table | {"batch_size": 256, "standardize": False, "protocol": "official"}
    settings = probe("--protocol", "converged", "--set", "probe.standardize=true", "--json").json["settings"]
    assert settings == {
        "head": "linear",
        "features": "backbone",
        "protocol": "converged",
        "l2": 1e-4,
        "standardize": True,
    }
    knn = probe("--head", "knn", "--features", "pre_feature", "--set", "probe.k=3", "--json").json
    assert (knn["features"], knn["settings"]["k"]) == ("pre_feature", 3)
    folder = probe.run.probes / "linear-002"
    record = load_record(folder / "record.json", ProbeRecord)
    classifier = classifier_in(probe.run, folder)
    assert classifier.head.mean is not None
    images = load_judged_images(probe.run, record, talk=NullTalk())
    assert images.labels is not None
    right = int((classify(classifier, images.images, device=CPU) == images.labels).sum())
    assert right == record.test_accuracy.correct


def test_what_is_refused_before_anything_is_done(probe: Command, tmp_path: Path) -> None:
    assert "linear" in probe.refused("--head", "lineal", code=2)
    assert "probe.epochs" in probe.refused("--head", "knn", "--epochs", "3", code=2)
    assert "protocol" in probe.refused("--protocol", "converged", "--epochs", "3", code=2)
    assert "trained" in probe.refused("--set", "train.lr=1", code=2)
    assert "--data" in probe.refused("--set", "data.limit=3", code=2)
    assert "8/255" in probe.refused("--head", "finetune", "--set", "probe.eps=8", code=2)
    assert "known data set" in probe.refused("--data", "cifar11", code=2)
    assert "24" in probe.refused("--limit", "25", code=2)
    assert "no images of class" in probe.refused("--limit", "2", code=4)
    assert "no unfinished head" in probe.refused("--resume", code=2)
    assert "other options" in probe.refused("--resume", "--head", "knn", code=2)
    assert "no run" in probe.refused("nothing", code=2)
    assert "run of its own" in probe.refused("latest", "--import", "x.pt", code=2)
    assert not list(probe.run.probes.glob("*"))


def test_data_that_no_classifier_can_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain"
    for split in ("train", "test"):
        (plain / split).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (12, 12), (number * 9,) * 3).save(plain / split / f"{number}.png")
    unlabelled = Command(make_run(tmp_path / "a", plain), capsys)
    assert "no labels" in unlabelled.refused(code=4)
    one = Command(make_run(tmp_path / "b", image_folder(tmp_path / "one", classes=("ant",))), capsys)
    assert "only one class" in one.refused(code=4)
    uneven = image_folder(tmp_path / "uneven")
    odd = Command(make_run(tmp_path / "c", uneven), capsys)
    (uneven / "test" / "bee").rename(uneven / "test" / "wasp")
    assert "wasp" in odd.refused(code=4)
    other = image_folder(tmp_path / "other", classes=("x", "y"))
    done = odd("--data", str(other), "--epochs", "1", "--json")  # transfer
    assert done.code == 0, done.err
    assert [part["name"] for part in done.json["classes"]] == ["x", "y"]
    record = load_record(odd.run.probes / "linear-001" / "record.json", ProbeRecord)
    assert len(load_judged_images(odd.run, record, talk=NullTalk())) == 10


def test_what_changed_since_is_noticed(probe: Command, tmp_path: Path) -> None:
    assert probe("--epochs", "1").code == 0
    folder = probe.run.probes / "linear-001"
    record = load_record(folder / "record.json", ProbeRecord)
    head = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(head[:-1] + bytes([head[-1] ^ 1]))
    with pytest.raises(CfamcError, match="not the head") as changed_head:
        classifier_in(probe.run, folder)
    assert changed_head.value.exit_code == 4
    (folder / "head.safetensors").write_bytes(head)

    Image.new("RGB", (12, 12)).save(tmp_path / "images/test/ant/000.png")
    with pytest.raises(CfamcError, match="data changed") as changed_test:
        load_judged_images(probe.run, record, talk=NullTalk())
    assert changed_test.value.exit_code == 4
    Image.new("RGB", (12, 12)).save(tmp_path / "images/train/ant/000.png")
    assert "data changed" in probe.refused(code=4)

    other = build_encoder(Model(width=8, hidden_dim=16, embedding_dim=8), generator=addressed_generator("other"))
    checkpoint.save(probe.run.checkpoints, 10, Checkpoint(other.state_dict(), {}, {"step": 10}))
    with pytest.raises(CfamcError, match="not the one that linear-001") as changed_encoder:
        classifier_in(probe.run, folder)
    assert changed_encoder.value.exit_code == 4


def test_a_record_with_tables_of_something_else_is_one_line(probe: Command) -> None:
    """Edited by hand, digest and all: its settings and its data are read again, and may be anything that is JSON."""
    assert probe("--head", "crops", "--crops", "2", "--epochs", "1").code == 0
    folder = probe.run.probes / "crops-001"
    path, whole = folder / "record.json", json.loads((folder / "record.json").read_text())
    del whole["sha256"]
    path.write_text(json.dumps(whole | {"settings": whole["settings"] | {"crops": 0}}))
    with pytest.raises(CfamcError, match=r"crops-001: settings: crops: .* greater than or equal to 1") as settings:
        classifier_in(probe.run, folder)
    path.write_text(json.dumps(whole | {"data": {"root": "here"}}))
    with pytest.raises(CfamcError, match="crops-001: data: dataset: Field required") as data:
        load_judged_images(probe.run, load_record(path, ProbeRecord), talk=NullTalk())
    assert settings.value.exit_code == data.value.exit_code == 4
    assert standard_probe(probe.run, whole["encoder_digest"]) is None


def test_a_standard_head_is_there_when_it_is_asked_for(
    probe: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(device="cpu", runs=probe.run.path.parent)
    other = image_folder(tmp_path / "other")
    probe("--head", "knn")
    for unfit in (("--limit", "6"), ("--data", str(other))):
        assert probe("--epochs", "1", *unfit).code == 0
    made = head_of(probe.run, options)
    assert made.name == "linear-003"
    assert "fitting the standard one" in capsys.readouterr().err
    assert head_of(probe.run, options) == made
    assert head_of(probe.run, options, probe="knn").name == "knn-001"
    assert head_of(probe.run, options, probe="linear-003") == made
    with pytest.raises(CfamcError, match="no probe 'finetune'") as missing:
        head_of(probe.run, options, probe="finetune")
    assert "linear-001" in missing.value.hint


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_the_way_on_from_an_interruption_finds_the_run(
    probe: Command, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    """In a store that was named by --runs, an id alone would mean nothing."""

    def cut(*_: object, **__: object) -> int:
        return number

    monkeypatch.setattr(SupervisedTrainer, "train", cut)
    said = probe.refused("--head", "finetune", code=code)
    assert said == f"interrupted / go on with: cfamc probe {probe.run.path} --resume"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["robust-linear", "finetune"])
def test_a_killed_head_is_finished_as_an_uncut_one(probe: Command, kind: str) -> None:
    settings = ["--set", "probe.steps=1", "--set", "probe.batch_size=4", "--epochs", "12"]
    options = ["--head", kind, *settings, "--runs", str(probe.run.path.parent), "--device", "cpu", "--json"]
    uncut = probe(*options).json
    command = [sys.executable, "-m", "cfamc_cli", "probe", *options]
    folder = probe.run.probes / f"{kind}-002"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not checkpoint.list_checkpoints(folder / "checkpoints"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = probe("--resume", "--json").json
    assert resumed["id"] == folder.name
    for key in ("head_digest", "test_accuracy", "train_accuracy", "confusion"):
        assert resumed[key] == uncut[key]
    assert {path.name for path in folder.iterdir()} == {"record.json", "head.safetensors"}


# Foreign networks, whose layouts are those of tests/test_imported.py


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_this_process(monkeypatch)


def kuangliu(folder: Path, *, classes: int = 3) -> Path:
    torch.save({"net": drawn(Theirs(classes=classes)).float().state_dict()}, folder / "theirs.pth")
    return folder / "theirs.pth"


@pytest.mark.usefixtures("here")
def test_an_encoder_becomes_a_run(probe: Command, tmp_path: Path) -> None:
    file = tmp_path / "theirs.pt"
    torch.save({"state_dict": drawn(Theirs(branches=2)).float().state_dict()}, file)
    done = probe(
        "--import", str(file), "--batch-norm", "pgd", "--data", str(tmp_path / "images"), "--epochs", "1", "--json"
    )
    assert done.code == 0, done.err
    assert "1 (pgd) is read" in done.err
    assert (done.json["head"], done.json["features"]) == ("linear", "backbone")
    run = RunFolder(probe.run.path.parent / done.json["run"])
    record = load_record(run.run_json, RunRecord)
    assert (record.status, record.imported) == ("finished", str(file))
    assert "without a pre_feature" in probe.refused(run.id, "--features", "pre_feature", code=2)
    classifier = classifier_in(run, run.probes / "linear-001")
    assert classifier.features == "backbone"
    assert classifier.encoder.input is not None
    assert run.recipe().model.normalize is not None  # the file says so


@pytest.mark.usefixtures("here")
def test_a_classifier_becomes_a_run_with_its_last_layer_as_head(
    probe: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, data = kuangliu(tmp_path), ("--data", str(tmp_path / "images"))
    done = probe("--import", str(file), *data, "--mean", "half", "--size", "24", "--json")
    assert done.code == 0, done.err
    assert "its last layer net.linear is the head; its outputs are taken as 0 ant, 1 bee, 2 cat" in done.err
    assert "likely trained" not in done.err
    assert (done.json["id"], done.json["head"], done.json["settings"]) == (
        "imported-001",
        "imported",
        {"head": "imported", "features": "backbone"},
    )
    assert done.json["train"] == {"dataset": "unknown", "split": "train", "n": 0, "fingerprint": ""}
    run = RunFolder(probe.run.path.parent / done.json["run"])
    assert [path.name for path in run.probes.iterdir()] == ["imported-001"]
    classifier = classifier_in(run, run.probes / "imported-001")
    theirs = drawn(Theirs())
    assert isinstance(theirs, Theirs)
    x = torch.rand(4, 3, 12, 12, generator=addressed_generator("x"))
    with torch.no_grad():
        large = torch.nn.functional.interpolate(x, (24, 24), mode="bilinear", antialias=True)
        wanted = theirs.linear(theirs.features((large.double() - 0.5) / 0.5))
        torch.testing.assert_close(classifier(x).double(), wanted, rtol=1e-4, atol=1e-4)
    images = load_judged_images(run, load_record(run.probes / "imported-001/record.json", ProbeRecord), talk=NullTalk())
    right = int((classify(classifier, images.images, device=CPU) == images.require_labels()).sum())
    assert done.json["test_accuracy"]["correct"] == right

    capsys.readouterr()
    attack = ["attack", run.id, "--eps", "2/255", "--steps", "2", "--limit", "6", "--json"]
    assert cli.run([*attack, "--runs", str(probe.run.path.parent), "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["attacks"][0]["probe"] == "imported-001" if "attacks" in record else record["probe"] == "imported-001"
    assert [path.name for path in run.probes.iterdir()] == ["imported-001"]  # nothing had to be fitted


@pytest.mark.usefixtures("here")
def test_a_last_layer_of_other_classes_is_left_out_and_a_head_is_fitted(
    probe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[object] = []
    monkeypatch.setattr(imported, "better_with", lambda foreign, *_: judged.append(foreign.last))
    done = probe(
        *("--import", str(kuangliu(tmp_path, classes=7)), "--data", str(tmp_path / "images"), "--epochs", "1", "--json")
    )
    assert done.code == 0, done.err
    assert "left out: net.linear tells 7 classes, not the 3 of the data" in done.err
    assert done.json["id"] == "linear-001"
    assert judged == [None]


@pytest.mark.usefixtures("here")
def test_what_there_is_to_suspect_is_said(probe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torchvision_network("resnet18", "imagenet").float().state_dict(), tmp_path / "theirs.pt")
    monkeypatch.setattr(imported, "better_with", lambda *_: (5, 14, 15))
    asked = ("--import", str(tmp_path / "theirs.pt"), "--data", str(tmp_path / "images"))
    said = " ".join(probe(*asked).err.split())
    assert "an ImageNet stem reads images of 12 pixels" in said
    assert "mostly trained on normalised pixels" in said
    assert "its last layer is right on 14 of 15 images normalised as for imagenet, and on 5 without" in said
    assert "no more than chance" in said
    quiet = " ".join(probe(*asked, "--mean", "imagenet", "--size", "32").err.split())
    assert "normalised" not in quiet
    assert "an ImageNet stem" not in quiet


@pytest.mark.usefixtures("here")
def test_flags_of_an_import_are_refused_where_they_say_nothing(probe: Command, tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "images"))
    file = ("--import", str(kuangliu(tmp_path)), *data)
    assert "--mean, --batch-norm would have no effect without --import" in probe.refused(
        "--mean", "half", "--batch-norm", "1", code=2
    )
    assert "--std is missing" in probe.refused(*file, "--mean", "0.5,0.5,0.5", code=2)
    assert "--mean is missing" in probe.refused(*file, "--std", "0.5,0.5,0.5", code=2)
    assert "one of: imagenet, cifar10" in probe.refused(*file, "--mean", "imagnet", "--std", "half", code=2)
    for mean, std in (("1,2", "half"), ("123,116,103", "58,57,57"), ("half", "0,1,1"), ("nan,0,0", "half")):
        assert "three numbers each, of pixels in [0, 1]" in probe.refused(*file, "--mean", mean, "--std", std, code=2)
    assert "--batch-norm has no effect" in probe.refused(*file, "--batch-norm", "pgd", code=2)
    assert "run of its own" in probe.refused("latest", *file, code=2)
    assert "--data cifar10" in probe.refused("--import", "x.pt", code=2)
    assert "no such file" in probe.refused("--import", str(tmp_path / "none.pt"), *data, code=4)
    assert len(list(probe.run.path.parent.iterdir())) == 1


def official_weights() -> dict[str, Tensor]:
    """Keys as CF-AMC-SSL's own code names them."""
    encoder = build_encoder(Model(width=8, hidden_dim=16, embedding_dim=8), generator=addressed_generator("official"))
    return {key.replace("projector.", "projection."): value for key, value in encoder.state_dict().items()}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("prefix", ["", "module.", "model.encoder."])
def test_an_encoder_of_the_official_layout_is_read_whole(tmp_path: Path, prefix: str) -> None:
    weights = official_weights()
    file = tmp_path / "official.safetensors"
    save_file({prefix + key: value.contiguous() for key, value in weights.items()}, file)
    read = read_foreign(file)
    assert not read.backbone_only
    assert (read.model.stem, read.model.width, read.model.hidden_dim, read.model.embedding_dim) == ("cifar", 8, 16, 8)
    assert read.notes == ()
    for key, value in read.encoder.state_dict().items():
        assert torch.equal(value, weights[key.replace("projector.", "projection.")])


def test_files_that_hold_no_encoder(probe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--data", str(tmp_path / "images"))
    other = tmp_path / "other.safetensors"
    save_file({"blocks.0.weight": torch.zeros(2, 2)}, other)
    assert "no ResNet: it holds blocks.0" in probe.refused("--import", str(other), *data, code=4)  # by its own process
    read_in_this_process(monkeypatch)
    lacking = official_weights()
    del lacking["backbone.layer2.0.bn1.weight"]
    save_file({key: value.contiguous() for key, value in lacking.items()}, other)
    assert "backbone.layer2.0.bn1.weight" in probe.refused("--import", str(other), *data, code=4)
    deep = official_weights() | {"backbone.layer4.2.conv1.weight": torch.zeros(64, 64, 3, 3)}
    save_file({key: value.contiguous() for key, value in deep.items()}, other)
    assert "2-2-2-3" in probe.refused("--import", str(other), *data, code=4)
    assert len(list(probe.run.path.parent.iterdir())) == 1
