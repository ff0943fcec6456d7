"""The one place that makes what tests stand on: recipes, images, records. It never imports torch.

The recipe is small enough for a step to take milliseconds: an 8-channel net, batches of 8 images, 4 crops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cfamc_cli.recipe.file import to_toml
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.store.records import (
    Accuracy,
    AttackRecord,
    ClassAccuracy,
    ClassRobustness,
    Computation,
    DataUsed,
    Environment,
    Flag,
    ProbeRecord,
    Progress,
    RunRecord,
    Stage,
    ThreatModel,
    Totals,
)
from cfamc_cli.store.runs import RunFolder, list_runs

OBJECTIVES: dict[str, dict[str, Any]] = {
    "emp-ssl": {"name": "emp-ssl"},
    "simclr": {"name": "simclr"},
    "supcon": {"name": "supcon"},
    "clusters": {"name": "clusters", "count": 4},
}
ADVERSARIES: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "pgd": {"name": "pgd", "steps": 2},
    "free": {"name": "free", "replays": 3},
}


def tiny_recipe(
    objective: str = "emp-ssl",
    adversary: str = "free",
    /,
    **tables: Mapping[str, Any] | Sequence[Mapping[str, Any]] | int | str,
) -> Recipe:
    """A recipe of one epoch over 64 images: 8 batches; `tables` are laid over its own, key by key.

    SimCLR takes two groups of one crop and perturbs the second; the others take one group of four.
    """
    two_views = objective == "simclr"
    moved = ADVERSARIES[adversary] | ({"views": "second"} if two_views and adversary != "none" else {})
    whole: dict[str, Any] = {
        "schema": 1,
        "name": "tiny",
        "data": {"dataset": "folder", "root": "images"},
        "crops": [{"count": 1, "size": 8}] * 2 if two_views else [{"count": 4, "size": 8}],
        "model": {"width": 8, "hidden_dim": 16, "embedding_dim": 8},
        "objective": OBJECTIVES[objective],
        "adversary": moved,
        "train": {"epochs": 1.0, "batch_size": 8, "precision": "float32", "log_every": 1},
    }
    for name, table in tables.items():
        whole[name] = {**whole.get(name, {}), **table} if isinstance(table, Mapping) else table
    return Recipe.model_validate(whole)


def recipe_text(
    objective: str = "emp-ssl", adversary: str = "free", *, epochs: float = 1.0, every: int = 1, log_every: int = 2
) -> str:
    """The file of a recipe that runs anywhere, of 8 batches an epoch; without [probe] and [[attack]]."""
    recipe = tiny_recipe(
        objective,
        adversary,
        data={"dataset": "fashion-mini", "root": None, "limit": 64},
        crops=[{"count": 4 if objective == "emp-ssl" else 2, "size": 16, "scale": [0.2, 1.0]}],
        augment={"jitter": [0.4, 0.4, 0.0, 0.0], "grayscale_p": 0.0},
        model={"hidden_dim": 32, "embedding_dim": 16},
        adversary={} if adversary == "none" else {"views": "all"},
        train={"epochs": epochs, "checkpoint_every": every, "log_every": log_every},
    )
    return to_toml(recipe).partition("\n[probe]")[0]


def image_folder(
    root: Path,
    *,
    train: int = 8,
    test: int = 5,
    classes: Sequence[str] = ("ant", "bee", "cat"),
    told: int = 100,
) -> Path:
    """Images of 12x12 pixels: noise, with the colour of the class `told` steps brighter."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 120, (12, 12, 3))
                pixels[..., label % 3] += told
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
    return root


# Records

NOON = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
COMPUTATION = Computation(
    precision="bfloat16",
    processes=2,
    compiled=True,
    tf32_products=False,
    tf32_convolutions=True,
    cuda="13.0",
    cudnn="92400",
    driver="580.65.06",
)
ENVIRONMENT = Environment(  # of an older version
    cfamc="0.1.0",
    python="3.11.7",
    torch="2.9.0",
    torchvision="0.24.0",
    platform="Linux-6.1-x86_64",
    cpu="Some CPU",
    cores=2,
    device="cpu",
    git_revision="0" * 40,
    git_changed=False,
)


def data_used(split: str, n: int, dataset: str = "cifar10") -> DataUsed:
    return DataUsed(dataset=dataset, split=split, n=n, fingerprint=f"{dataset}-{split}".encode().hex())


def run_record(**changes: Any) -> RunRecord:
    """A finished run of 1,500 updates; `changes` are laid over it."""
    record = RunRecord(
        id="20261122-120000-a-000000",
        name="a",
        status="finished",
        created=NOON,
        updated=NOON,
        recipe_digest="aa",
        seed=0,
        progress=Progress(batch=500, step=1500, epoch=1.0, total=1500),
        environment=ENVIRONMENT,
        wall_seconds=700.0,
        totals=Totals(steps=1500, view_passes=600_000, attack_view_passes=0, parameters=2_000_000),
        data=data_used("train", 50_000),
    )
    return record.model_copy(update=changes)


def probe_record(**changes: Any) -> ProbeRecord:
    """A linear head, right on 700 of 1,000 images; `changes` are laid over it."""
    record = ProbeRecord(
        id="linear-001",
        run="20261122-120000-a-000000",
        created=NOON,
        recipe_digest="aa",
        seed=0,
        head="linear",
        features="pre_feature",
        settings={"head": "linear", "protocol": "official", "epochs": 20},
        encoder_digest="ee",
        head_digest="dd",
        train=data_used("train", 50_000),
        test=data_used("test", 1000),
        train_accuracy=None,
        test_accuracy=Accuracy.of(700, 1000),
        classes=tuple(ClassAccuracy(name=str(k), accuracy=Accuracy.of(70, 100)) for k in range(10)),
        confusion=tuple(tuple({0: 70, 1: 30}.get((j - k) % 10, 0) for j in range(10)) for k in range(10)),
        wall_seconds=30.0,
        environment=ENVIRONMENT,
    )
    return record.model_copy(update=changes)


def attack_record(**changes: Any) -> AttackRecord:
    """PGD on that head, which leaves 300 of 1,000 images right; `changes` are laid over it."""
    record = AttackRecord(
        id="pgd-001",
        run="20261122-120000-a-000000",
        probe="linear-001",
        created=NOON,
        recipe_digest="aa",
        seed=0,
        head="linear",
        features="pre_feature",
        threat=ThreatModel(space="image", norm="linf", eps="8/255"),
        attack="pgd",
        settings={"name": "pgd", "eps": "8/255", "steps": 20, "step_size": "0.01", "restarts": 1, "seed": 3},
        data=data_used("test", 1000),
        subset="the first 1000 of a balanced order",
        order_digest="0b",
        encoder_digest="ee",
        head_digest="dd",
        clean=Accuracy.of(700, 1000),
        robust=Accuracy.of(300, 1000),
        classes=tuple(
            ClassRobustness(name=str(k), clean=Accuracy.of(70, 100), robust=Accuracy.of(30, 100)) for k in range(10)
        ),
        stages=(Stage(name="pgd", attacked=700, broken=400, forward=1, backward=1, wall_seconds=1.0),),
        forward=1,
        backward=1,
        wall_seconds=1.0,
        flags=(Flag(name="ball", figure=0.0, limit=0.0, verdict="passed", text="inside"),),
        environment=ENVIRONMENT,
    )
    return record.model_copy(update=changes)


def write_record(path: Path, record: Any) -> None:
    """Write a record, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json(indent=2))


def the_run(store: Path) -> RunFolder:
    """The only run of a store."""
    (run,) = list_runs(store)
    return run
