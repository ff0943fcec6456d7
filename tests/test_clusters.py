"""Clusters of the encoder's own features: how they are found, what is learnt of them, and runs that go on with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixed_inputs import embeddings, signed, uniform
from test_phases import SHORT, phased
from test_pretrain import Listener, never, newest_bytes, trained, trainer_of
from tiny import tiny_recipe
from torch import Tensor

from cfamc_cli.engine import bench, checkpoint, clusters, pretrain
from cfamc_cli.engine.clusters import cluster
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.encoder import build_encoder
from cfamc_cli.engine.heads.frozen import extract_features
from cfamc_cli.engine.journal import Journal
from cfamc_cli.engine.objectives import cluster_loss, objective_loss
from cfamc_cli.engine.randomness import addressed_generator, epoch_order
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.plan import plan
from cfamc_cli.recipe.schema import Clusters
from cfamc_cli.store.records import TrainLine


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# K-means


def by_hand(features: Tensor, first: list[int], *, rounds: int) -> list[int]:
    """Spherical k-means in float64, image by image, whose first centres are the images `first`."""
    x = features.double().numpy()
    x = x - x.mean(0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    centres = [x[place] for place in first]
    for _ in range(rounds):
        members: list[list[Any]] = [[] for _ in centres]
        for row in x:
            members[int(np.argmax([row @ centre for centre in centres]))].append(row)
        sums = [np.sum(rows, axis=0) if rows else None for rows in members]
        centres = [old if new is None else new / np.linalg.norm(new) for old, new in zip(centres, sums, strict=True)]
    return [int(np.argmax([row @ centre for centre in centres])) for row in x]


@pytest.mark.parametrize("rounds", [0, 1, 2, 20])
def test_clusters_are_those_of_spherical_k_means(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 7 images do not divide 60."""
    monkeypatch.setattr(clusters, "ROUNDS", rounds)
    monkeypatch.setattr(clusters, "_ROWS", 7)
    features = (5 * signed(60, 6, key="features") + 3).float()
    found = cluster(features, count=9, generator=seeded())
    first = torch.randperm(60, generator=seeded())[:9].tolist()
    assert found.dtype == torch.int64
    assert found.tolist() == by_hand(features, first, rounds=rounds)


def test_rounds_move_images() -> None:
    """So that the test above tells how many there were."""
    features = 5 * signed(60, 6, key="features") + 3
    first = torch.randperm(60, generator=seeded())[:9].tolist()
    found = [by_hand(features, first, rounds=rounds) for rounds in (0, 1, 2, 20)]
    assert len(set(map(tuple, found))) == 4


def drawing(count: int, images: int, wanted: set[int]) -> torch.Generator:
    """A generator by which the first centres are of the images `wanted`, modulo their number."""
    draws = ((seed, torch.randperm(images, generator=seeded(seed))[:count] % len(wanted)) for seed in range(999))
    return seeded(next(seed for seed, places in draws if set(places.tolist()) == wanted))


def test_blobs_are_found_whatever_their_length_and_place() -> None:
    blobs = torch.eye(4).repeat(10, 1) * (0.5 + uniform(40, 1, key="lengths")) + 0.02 * signed(40, 4, key="blobs")
    for features in (blobs, 10 + 3 * blobs, 10 + 3 * blobs[:, [2, 0, 3, 1]]):
        found = cluster(features.float(), count=4, generator=drawing(4, 40, {0, 1, 2, 3})).view(10, 4)
        assert sorted(found[0].tolist()) == [0, 1, 2, 3]
        assert (found == found[0]).all()


def test_the_order_of_the_images_is_of_no_matter_but_for_the_first_centres() -> None:
    features, order = signed(60, 6, key="features").float(), torch.randperm(60, generator=seeded(1))
    generator = seeded()
    first = torch.randperm(60, generator=seeded())[:9]
    with pytest.MonkeyPatch.context() as patch:
        found = cluster(features, count=9, generator=generator)
        patch.setattr(torch, "randperm", lambda *_, **__: order.argsort()[first])  # the same images
        assert torch.equal(cluster(features[order], count=9, generator=generator), found[order])


def test_a_cluster_that_nobody_is_in_keeps_its_centre() -> None:
    """Two first centres are equal, and the first takes all; when it has moved, the other is nearest to some."""
    angles = torch.tensor([0.0, 0.0, 2.0, 2.3, 4.5, 5.0], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], 1)
    seed = next(seed for seed in range(999) if set(torch.randperm(6, generator=seeded(seed))[:2].tolist()) == {0, 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "ROUNDS", 0)
        assert cluster(points, count=2, generator=seeded(seed)).tolist() == [0] * 6
        for rounds in (1, 2):
            patch.setattr(clusters, "ROUNDS", rounds)
            found = cluster(points, count=2, generator=seeded(seed)).tolist()
            assert found == by_hand(points, [0, 1], rounds=rounds)
            assert set(found) == {0, 1}


# The loss


@pytest.mark.parametrize(("count", "temperature"), [(3, 0.1), (5, 1.0)])
def test_embeddings_on_the_axes_of_their_clusters(count: int, temperature: float) -> None:
    """Logits are 1 / t at the own cluster and 0 at the others, so the loss is log(1 + (k - 1) e^(-1/t))."""
    of = torch.tensor([0, 2, 1, 2])
    z = torch.eye(6, dtype=torch.float64)[of].expand(2, 4, 6)
    right = math.log(1 + (count - 1) * math.exp(-1 / temperature))
    assert cluster_loss(z, of, count=count, temperature=temperature).item() == pytest.approx(right, rel=1e-12)
    wrong = 1 / temperature + right  # on the axis of another
    assert cluster_loss(z, (of + 1) % 3, count=count, temperature=temperature).item() == pytest.approx(wrong, rel=1e-12)


def test_each_crop_has_the_cluster_of_its_image_and_coordinates_beyond_the_clusters_are_no_logits() -> None:
    z, of = embeddings(3, 4, 7, key="z"), torch.tensor([4, 0, 0, 2])
    expected = 0.0
    for crop in z:
        for row, own in zip(crop, of, strict=True):
            shares = [math.exp(value / 0.2) for value in row[:5].tolist()]
            expected -= math.log(shares[own] / sum(shares)) / 12
    found = objective_loss(z, of, objective=Clusters(name="clusters", count=5, temperature=0.2))
    assert found.loss.item() == pytest.approx(expected, rel=1e-12)
    assert found.parts == {}
    assert torch.equal(cluster_loss(z, of, count=5, temperature=0.2), found.loss)
    alone = torch.stack([cluster_loss(crop[None], of, count=5, temperature=0.2) for crop in z])
    assert alone.mean().item() == pytest.approx(expected, rel=1e-12)  # a single crop is enough


def test_a_step_down_moves_crops_towards_the_axes_of_their_clusters() -> None:
    of = torch.tensor([1, 0, 2])
    z = embeddings(2, 3, 4, key="z").requires_grad_()
    (gradient,) = torch.autograd.grad(cluster_loss(z, of, count=3, temperature=0.5), z)
    own = gradient.gather(2, of.expand(2, 3)[..., None])
    assert (own < 0).all()
    others = gradient[..., :3].masked_fill(torch.nn.functional.one_hot(of, 3).bool(), 1.0)
    assert (others > 0).all()
    assert not gradient[..., 3].any()
    cluster_after = cluster_loss(z - 0.1 * gradient, of, count=3, temperature=0.5)
    assert cluster_after < cluster_loss(z, of, count=3, temperature=0.5)


def test_clusters_are_to_be_found_first() -> None:
    with pytest.raises(ValueError, match="found first"):
        objective_loss(embeddings(1, 4, 4, key="z"), None, objective=Clusters(name="clusters", count=3))


# A run

PHASE: dict[str, Any] = {
    "epochs": 0.375,  # 3 batches
    "objective": {"name": "clusters", "count": 5},
    "adversary": {"name": "none"},
    "crops": [{"count": 1, "size": 8}],
}
ADVERSARIES: list[dict[str, Any]] = [{"name": "none"}, {"name": "pgd", "steps": 2}, {"name": "free", "replays": 2}]
KEPT = SHORT | {"keep": 9, "checkpoint_every": 1}


def states(folder: Path) -> dict[int, Mapping[str, Tensor]]:
    """What each checkpoint holds beside the encoder, by its update."""
    found = [checkpoint.load(path) for path in checkpoint.list_checkpoints(folder)[::-1]]
    return {int(str(saved.progress["step"])): saved.state for saved in found}


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_clusters_are_those_of_the_encoder_that_the_phase_before_left(
    average: float, tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = phased(PHASE, PHASE, train=KEPT | {"average": average})
    trainer, sink = trained(recipe, tiny_images, tmp_path)
    kept = states(tmp_path)
    assert list(kept) == [3, 6, 7, 8, 9, 10, 11, 12]
    assert not {"clusters"} & {*kept[3], *kept[6]}
    for phase, border, within in ((1, 6, (7, 8, 9)), (2, 9, (10, 11, 12))):
        encoder = build_encoder(recipe.model, generator=seeded())
        encoder.load_state_dict(checkpoint.load(tmp_path / f"step-{border:08d}").model)
        features = extract_features(encoder, tiny_images.images, device=torch.device("cpu"))
        expected = cluster(features, count=5, generator=addressed_generator("clusters", 0, "phase", phase))
        assert len(expected.unique()) > 1
        assert all(torch.equal(kept[step]["clusters"], expected) for step in within), phase
    assert not torch.equal(kept[7]["clusters"], kept[10]["clusters"])
    assert trainer.clusters is not None
    lines = [TrainLine.model_validate(record) for record in sink.records]
    assert [(line.phase, line.step) for line in lines] == [(0, 3), (0, 6)] + [
        (phase, step) for phase, steps in ((1, (7, 8, 9)), (2, (10, 11, 12))) for step in steps
    ]
    assert [line.coding_rate is None for line in lines] == [line.phase != 0 for line in lines]


def test_a_batch_has_the_clusters_of_its_images_and_a_later_phase_has_none(
    tiny_images: ImageSet, tmp_path: Path
) -> None:
    trainer = trainer_of(phased(PHASE, {"epochs": 0.125, "objective": {"name": "supcon"}}), tiny_images)
    seen: list[tuple[int, Tensor | None, Tensor | None]] = []
    crops_of = trainer.crops_of

    def noted(batch: int) -> Any:
        crops, labels = crops_of(batch)
        seen.append((trainer.phase, labels, trainer.clusters))
        return crops, labels

    trainer.crops_of = noted  # type: ignore[method-assign]
    trainer.train(tmp_path, stop=never)
    assert [phase for phase, *_ in seen] == [0, 0, 1, 1, 1, 2]
    trainer.clusters = seen[2][2]
    trainer.enter(2)
    assert trainer.clusters is None
    orders = [epoch_order(0, 0, 64, phase) for phase in range(3)]
    for place, (phase, labels, found) in enumerate(seen):
        batch = place - (0, 2, 5)[phase]
        images = orders[phase][batch * 8 : batch * 8 + 8]
        source = found if phase == 1 else tiny_images.labels
        assert (found is None) == (phase != 1)
        assert labels is not None
        assert source is not None
        assert torch.equal(labels, source[images])


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda table: table["name"])
def test_stopped_after_every_batch_equals_straight_through(
    adversary: dict[str, Any], tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = phased(PHASE | {"adversary": adversary}, {"epochs": 0.125}, train=SHORT | {"average": 0.5})
    _, records = trained(recipe, tiny_images, tmp_path / "straight")
    signal, folder, kept, sittings = 15, tmp_path / "cut", Listener().records, 0
    while signal:
        sink = Listener(records=list(kept))
        trainer = trainer_of(recipe, tiny_images, sink)
        if sittings:
            path, saved, _ = checkpoint.newest_valid(folder)
            trainer.load(saved, path=path)
        signal, sittings, kept = trainer.train(folder, stop=lambda: 15), sittings + 1, sink.records
    assert sittings == 2 + 3 + 1
    assert kept == records.records
    assert newest_bytes(folder) == newest_bytes(tmp_path / "straight")


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda table: table["name"])
def test_what_is_learnt_are_the_clusters(adversary: dict[str, Any], tiny_images: ImageSet, tmp_path: Path) -> None:
    long = PHASE | {"epochs": 6.0, "adversary": adversary, "optimizer": {"lr": 0.3}}
    _, sink = trained(phased(long, augment={"jitter_p": 0.0}), tiny_images, tmp_path)
    losses = [float(str(record["loss"])) for record in sink.records if record["kind"] == "train" and record["phase"]]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_features_are_read_in_the_precision_of_the_run(
    precision: str, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Tensor] = []

    def noted(features: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
        read.append(features)
        return cluster(features, count=count, generator=generator)

    monkeypatch.setattr(pretrain, "cluster", noted)
    recipe = phased(PHASE, train=KEPT | {"precision": precision})
    trained(recipe, tiny_images, tmp_path)
    encoder = build_encoder(recipe.model, generator=seeded()).eval()
    encoder.load_state_dict(checkpoint.load(tmp_path / "step-00000006").model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        expected = encoder.features(tiny_images.images.float() / 255).float()
    assert read[0].dtype == torch.float32
    assert torch.equal(read[0], expected)


def test_clusters_of_a_start_outlive_a_cut_before_the_first_batch(
    tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose own objective they are starts from another run's encoder, and is cut in its first evaluation."""
    monkeypatch.setattr(Journal, "evaluate", lambda _self, *_, stop, **__: not stop())
    recipe = tiny_recipe("clusters", "none", train=SHORT | {"evaluate_every": 1})
    weights = build_encoder(recipe.model, generator=seeded(5)).state_dict()
    trainer = trainer_of(recipe, tiny_images)
    trainer.encoder.load_state_dict(weights)
    assert trainer.train(tmp_path, stop=lambda: 15) == 15
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    assert saved.progress["step"] == 0
    resumed = trainer_of(recipe, tiny_images)
    resumed.load(saved, path=path)
    resumed.train(tmp_path, stop=never)
    uncut = trainer_of(recipe, tiny_images)
    uncut.encoder.load_state_dict(weights)
    uncut.train(tmp_path / "uncut", stop=never)
    assert newest_bytes(tmp_path) == newest_bytes(tmp_path / "uncut")
    features = extract_features(trainer.encoder, tiny_images.images, device=torch.device("cpu"))
    expected = cluster(features, count=4, generator=addressed_generator("clusters", 0))
    assert resumed.clusters is not None
    assert torch.equal(resumed.clusters, expected)


DAMAGE: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda _: None,
    "shorter": lambda found: found[:-1],
    "another shape": lambda found: found[None],
    "another type": lambda found: found.int(),
    "below": lambda found: found.index_fill(0, torch.tensor([7]), -1),
    "above": lambda found: found.index_fill(0, torch.tensor([7]), 5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_clusters_are_refused(damage: str, tiny_images: ImageSet, tmp_path: Path) -> None:
    recipe = phased(PHASE)
    trainer = trainer_of(recipe, tiny_images)
    trainer.train(tmp_path, stop=lambda: 15 if trainer.phase == 1 else 0)
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    trainer_of(recipe, tiny_images).load(saved, path=path)
    damaged = DAMAGE[damage](saved.state.pop("clusters"))
    saved.state.update({} if damaged is None else {"clusters": damaged})
    with pytest.raises(CfamcError, match="its state does not fit the recipe") as refused:
        trainer_of(recipe, tiny_images).load(saved, path=path)
    assert refused.value.exit_code is ExitCode.BAD_DATA


def test_more_clusters_than_images_are_refused_where_the_images_are_counted(tiny_images: ImageSet) -> None:
    many = PHASE | {"objective": {"name": "clusters", "count": 65}}
    with pytest.raises(CfamcError, match=r"phase\.0\.objective\.count: 65 clusters are more than the 64") as refused:
        trainer_of(phased(many), tiny_images)
    assert refused.value.exit_code is ExitCode.INVALID
    assert refused.value.hint == "lower phase.0.objective.count"


# What is told


def test_the_images_are_told_as_they_are_read(tiny_images: ImageSet, tmp_path: Path) -> None:
    _, sink = trained(phased(PHASE), tiny_images, tmp_path)
    assert [shown for shown in sink.shown if shown[0] != "train"] == [("features for 5 clusters", 64, 64, {})]


def test_a_bench_times_them_before_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = phased(PHASE | {"objective": {"name": "clusters", "count": 1200}}, model={"embedding_dim": 1200})
    assert plan(recipe).images == recipe.fewest_images == 1200  # of a folder that nobody counted
    found: list[int] = []

    def numbered(features: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
        found.append(len(features))
        return torch.arange(len(features)) % count

    monkeypatch.setattr(pretrain, "cluster", numbered)
    cost = bench.measure(recipe, bench.random_images(recipe, 5), device=torch.device("cpu"), seconds=0)
    assert found == [1200]
    assert "clusters" not in {part.name for part in cost.sections}
