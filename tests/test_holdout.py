"""`data.holdout` from the outside: what training, heads, attacks and comparisons see of images kept for choosing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import image_folder, tiny_recipe
from torch import Tensor

from cfamc_cli import cli
from cfamc_cli.engine.data.sets import ImageSet, load
from cfamc_cli.engine.data.sets import batch as gather
from cfamc_cli.engine.heads.classifier import Classifier, load_classifier, load_encoder
from cfamc_cli.engine.heads.frozen import classify, extract_features, weighted_knn
from cfamc_cli.engine.heads.supervised import SupervisedTrainer
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.recipe.file import to_toml
from cfamc_cli.recipe.schema import Split
from cfamc_cli.store.records import ProbeRecord, load_record
from cfamc_cli.store.runs import HEAD, RunFolder, cache_folder, list_runs

CPU = torch.device("cpu")
HELD = 6  # of 24 training images, two of each class; test has 15 images
ATTACK = ("--eps", "8/255", "--steps", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a recipe that holds some out, and runs of the seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("held")
    images = image_folder(folder / "images")
    recipe = tiny_recipe(
        "emp-ssl",
        "none",
        data={"root": str(images), "holdout": HELD},
        train={"epochs": 2.0},
        probe={"head": "linear", "epochs": 2},
    )
    (folder / "recipe.toml").write_text(to_toml(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        arguments = ("--seeds", "0,1", "--device", "cpu", "--runs", str(folder / "runs"), "--quiet")
        assert cli.run(["pretrain", str(folder / "recipe.toml"), *arguments]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained / "cache"))
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


Run = Callable[..., Any]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process, with its JSON."""

    def call(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        where = ["--runs", str(folder / "runs"), "--json"]
        where += [] if arguments[0] == "compare" else ["--device", "cpu"]
        found, said = cli.run([*arguments, *where]), capsys.readouterr()
        assert found == code, said.err
        return json.loads(said.out)

    return call


def first(folder: Path) -> RunFolder:
    return next(run for run in list_runs(folder / "runs") if run.record().seed == 0)


def images_of(run: RunFolder, split: Split) -> ImageSet:
    return load(run.recipe().data, split, seed=run.recipe().seed, cache=cache_folder(), talk=NullTalk())


def rows(images: Tensor) -> Counter[bytes]:
    return Counter(image.numpy().tobytes() for image in images)


def test_no_batch_of_training_has_a_held_out_image(trained: Path, tmp_path: Path, run: Run) -> None:
    seen: list[Tensor] = []

    def watched(images: Tensor, indices: Tensor, *, device: torch.device) -> Tensor:
        seen.append(gather(images, indices, device=device))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cfamc_cli.engine.pretrain.gather", watched)
        run("pretrain", str(trained / "recipe.toml"), "--set", "train.batch_size=6")
    made = max(list_runs(tmp_path / "runs"), key=lambda run: run.record().created)
    whole = load(
        made.recipe().data.model_copy(update={"holdout": 0}), "train", seed=0, cache=cache_folder(), talk=NullTalk()
    )
    held, used = images_of(made, "holdout"), made.record().data
    assert len(rows(whole.images)) == 24
    left = rows(whole.images) - rows(held.images)
    assert sum(left.values()) == 24 - HELD
    assert rows(torch.cat(seen[1:])) == left + left, (
        "after the forecast's, two epochs of three batches see each of the others twice"
    )
    assert used is not None
    assert (used.split, used.n, used.fingerprint) == ("train", 18, images_of(made, "train").fingerprint)


def test_seeds_hold_the_same_images_out(folder: Path, run: Run) -> None:
    runs = list_runs(folder / "runs")
    assert {run.record().seed for run in runs} == {0, 1}
    records = [run("attack", made.id, *ATTACK)["results"][0] for made in runs]
    assert records[0]["data"] == records[1]["data"]
    assert records[0]["order_digest"] == records[1]["order_digest"]
    (table, *_) = run("compare", "--where", "attack=pgd")["tables"]
    assert [row["label"] for row in table["rows"]] == ["tiny (2 seeds)"]


QUICK = {
    "linear": (),
    "robust-linear": ("--epochs", "1", "--set", "probe.steps=1"),
    "crops": ("--epochs", "2", "--crops", "2"),
    "knn": ("--set", "probe.k=3"),
    "finetune": ("--epochs", "1", "--set", "probe.steps=1", "--set", "probe.batch_size=8"),
}


@pytest.mark.parametrize("kind", QUICK)
def test_a_head_is_fitted_on_the_rest_and_judged_on_what_is_held_out(kind: str, folder: Path, run: Run) -> None:
    made = first(folder)
    run("probe", made.id, "--head", kind, *QUICK[kind])
    run("probe", made.id, "--head", kind, *QUICK[kind], "--split", "test")
    chosen, final = (load_record(made.probes / f"{kind}-00{number}" / "record.json", ProbeRecord) for number in (1, 2))
    train = images_of(made, "train")
    assert chosen.train == final.train == train.used()
    assert chosen.head_digest == final.head_digest, "the head does not depend on what it is judged on"
    assert (chosen.test.n, final.test.n) == (HELD, 15)
    loaded = load_encoder(made.checkpoints, made.recipe().model, device=CPU, talk=NullTalk())
    splits: tuple[tuple[ProbeRecord, Split], ...] = ((chosen, "holdout"), (final, "test"))
    for record, split in splits:
        images = images_of(made, split)
        assert record.test == images.used()
        assert record.test.split == split
        if kind == "knn":
            bank, queries = (extract_features(loaded.encoder, part.images, device=CPU) for part in (train, images))
            answers = weighted_knn(bank, train.require_labels(), queries, classes=3, k=3)
        else:
            classifier = load_classifier(loaded, record, made.probes / record.id / HEAD, made.recipe())
            answers = classify(classifier, images.images, device=CPU)
            crops = classifier.crops and dataclasses.replace(classifier.crops, split="train")
            fitted = Classifier(classifier.encoder, classifier.head, features=classifier.features, crops=crops).eval()
            hits = classify(fitted, train.images, device=CPU) == train.require_labels()
            assert record.train_accuracy is not None
            assert (record.train_accuracy.correct, record.train_accuracy.n) == (int(hits.sum()), 18)
        assert record.test_accuracy.correct == int((answers == images.require_labels()).sum())
        assert [sum(row) for row in record.confusion] == images.require_labels().bincount().tolist()


@pytest.mark.parametrize("asked", [(), ("--split", "test")])
def test_a_head_goes_on_with_the_split_that_it_was_begun_for(
    asked: Sequence[str], folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = first(folder)
    settings = ("--head", "robust-linear", "--epochs", "2", "--set", "probe.steps=1", "--set", "probe.batch_size=6")
    uncut = run("probe", made.id, *settings, *asked)
    train = SupervisedTrainer.train

    def cut(self: SupervisedTrainer, folder: Path, *, stop: object, seconds: Callable[[], float]) -> int:
        return train(self, folder, stop=lambda: signal.SIGINT, seconds=seconds)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "train", cut)
        run("probe", made.id, *settings, *asked, code=130)
    again = run("probe", made.id, "--resume")
    assert again["id"] == "robust-linear-002"
    for key in ("head_digest", "train", "test", "confusion"):
        assert again[key] == uncut[key]


@pytest.mark.parametrize("judged", ["holdout", "test"])
def test_any_head_is_attacked_on_either_split(judged: str, folder: Path, run: Run) -> None:
    made = first(folder)
    assert run("probe", made.id, "--split", judged)["test"]["split"] == judged
    found = {}
    for asked, split in (((), "holdout"), (("--split", "test"), "test"), (("--split", "holdout"), "holdout")):
        (record,) = run("attack", made.id, *ATTACK, *asked)["results"]
        images = images_of(made, split)  # type: ignore[arg-type]
        assert record["data"] == images.used().model_dump(mode="json")
        assert record["subset"] == ("all 6 held-out training images" if split == "holdout" else "all 15 test images")
        loaded = load_encoder(made.checkpoints, made.recipe().model, device=CPU, talk=NullTalk())
        head = load_record(made.probes / record["probe"] / "record.json", ProbeRecord)
        classifier = load_classifier(loaded, head, made.probes / head.id / HEAD, made.recipe())
        right = classify(classifier, images.images, device=CPU) == images.require_labels()
        assert record["clean"]["correct"] == int(right.sum())
        found[record["id"]] = record["probe"]
    assert found == {"pgd-001": "linear-001", "pgd-002": "linear-001"}, "one head, and no result made again"
    (record,) = run("attack", made.id, *ATTACK, "--limit", "3", "--split", "holdout")["results"]
    assert [part["clean"]["n"] for part in record["classes"]] == [1, 1, 1], "balanced"


def test_held_out_and_test_images_are_never_in_one_table(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    made = first(folder)
    for asked in ((), ("--split", "test")):
        run("probe", made.id, *asked)
        run("attack", made.id, *ATTACK, *asked)
    tables = run("compare")["tables"]
    assert sorted((table["condition"]["split"], table["condition"]["attack"]) for table in tables) == [
        ("holdout", ""),
        ("holdout", "pgd"),
        ("test", ""),
        ("test", "pgd"),
    ]
    assert all(len(table["rows"]) == 1 for table in tables)
    assert cli.run(["compare", "--runs", str(folder / "runs")]) == 0
    assert "held-out training images, not test images" in " ".join(capsys.readouterr().out.split())
    assert cli.run(["probe", made.id, "--runs", str(folder / "runs"), "--device", "cpu"]) == 0
    assert "Held-out accuracy by class" in capsys.readouterr().out


def test_an_export_names_the_split(folder: Path, run: Run) -> None:
    made = first(folder)
    run("attack", made.id, *ATTACK)
    out = folder / "handed"
    record = run("export", made.id, "--part", "classifier", "--out", str(out))
    assert record["check"]["data"]["split"] == "holdout"
    assert record["data"]["n"] == 18
    assert (out / "README.md").read_text().count("folder held-out training images") == 2, "a head and an attack"


def test_what_is_refused(trained: Path, folder: Path, run: Run) -> None:
    recipe = str(trained / "recipe.toml")
    refused = run("pretrain", recipe, "--set", "data.holdout=24", code=2)["error"]
    assert refused["message"] == "data.holdout is 24 but folder has 24 training images"
    refused = run("pretrain", recipe, "--set", "data.limit=19", code=2)["error"]
    assert refused["message"] == "data.limit is 19 but folder has 18 training images beside those held out"
    refused = run("pretrain", recipe, "--set", "data.holdout=20", code=2)["error"]
    assert refused["message"] == "train.batch_size: 8 is more than the 4 training images"
    plain = run("pretrain", recipe, "--set", "data.holdout=0")["id"]
    for command in (("probe", plain), ("attack", plain, *ATTACK)):
        refused = run(*command, "--split", "holdout", code=2)["error"]
        assert refused["message"] == "--split holdout: no training images of folder were held out"
        assert "data.holdout" in refused["hint"]
    refused = run("pretrain", recipe, "--set", f"train.init={plain}", code=2)["error"]
    assert refused["message"].startswith(f"train.init: run {plain} was trained on images that data.holdout = 6 keeps")
    refused = run("pretrain", recipe, "--set", "data.holdout=7", "--set", f"train.init={first(folder).id}", code=2)
    assert "as many or more" in refused["error"]["hint"]
    run("pretrain", recipe, "--set", f"train.init={first(folder).id}")
    run("pretrain", recipe, "--set", "data.holdout=5", "--set", f"train.init={first(folder).id}")
    assert not list((folder / "runs" / plain / "probes").glob("*"))
    assert run("probe", plain)["test"]["split"] == "test"
    assert "other options" in run("probe", plain, "--resume", "--split", "test", code=2)["error"]["hint"]


def test_another_data_set_has_test_images_unless_its_own_table_holds_some_out(folder: Path, run: Run) -> None:
    made, other = first(folder), str(image_folder(folder / "other", train=4, test=3))
    record = run("probe", made.id, "--data", other)
    assert (record["train"]["n"], record["test"]["split"], record["test"]["n"]) == (12, "test", 9)
    record = run("probe", made.id, "--data", other, "--set", "data.holdout=3")
    assert (record["train"]["n"], record["test"]["split"], record["test"]["n"]) == (9, "holdout", 3)
    (attacked,) = run("attack", made.id, *ATTACK, "--head", record["id"])["results"]
    assert attacked["data"] == record["test"]


def test_held_out_images_that_may_be_others_by_now_are_refused(trained: Path, folder: Path, run: Run) -> None:
    """A head that was judged on test images kept no digest of those that are held out, but one of the rest."""
    made, root = first(folder), folder / "images"
    shutil.copytree(trained / "images", root)
    for split_of in (made.recipe_toml, made.resolved_json):
        split_of.write_text(split_of.read_text().replace(str(trained / "images"), str(root)))
    run("probe", made.id, "--split", "test")
    run("probe", made.id, "--split", "test", "--limit", "9")
    for head in ("linear-001", "linear-002"):
        attacked = run("attack", made.id, *ATTACK, "--head", head, "--split", "holdout")["results"][0]["data"]
        assert attacked["fingerprint"] == images_of(made, "holdout").fingerprint
    shutil.copy(root / "test" / "ant" / "000.png", root / "train" / "ant" / "new.png")
    for head in ("linear-001", "linear-002"):
        refused = run("attack", made.id, *ATTACK, "--head", head, "--split", "holdout", code=4)["error"]
        assert refused["message"].startswith(f"the data changed since head {head} was fitted")


def test_a_head_from_before_there_was_such_a_setting_is_still_the_standard_one(folder: Path, run: Run) -> None:
    plain = run("pretrain", str(first(folder).recipe_toml), "--set", "data.holdout=0")["id"]
    record = run("probe", plain)
    path = folder / "runs" / plain / "probes" / record["id"] / "record.json"
    older = json.loads(path.read_text())
    del older["data"]["holdout"], older["sha256"]
    path.write_text(json.dumps(older))
    assert run("attack", plain, *ATTACK)["probe"] == record["id"]
