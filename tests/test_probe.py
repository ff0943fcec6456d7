"""Heads on frozen features: against references, against scikit-learn, and bit for bit across an interruption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from cfamc_cli.engine import checkpoint, heads, probe
from cfamc_cli.engine.crops import CropParameters
from cfamc_cli.engine.finetune import SupervisedTrainer, shift_and_flip
from cfamc_cli.engine.heads import Classifier, CropSource
from cfamc_cli.engine.models import Encoder, build_encoder
from cfamc_cli.engine.randomness import addressed_generator, epoch_order
from cfamc_cli.engine.sink import NullSink
from cfamc_cli.recipe import AggregatedCrops, Augment, Crops, Finetune, Linear, Model, RobustLinear

CPU = torch.device("cpu")
MODEL = Model(width=8, hidden_dim=16, embedding_dim=8)


def encoder() -> Encoder:
    return build_encoder(MODEL, generator=addressed_generator("test encoder")).eval().requires_grad_(False)


def images(count: int = 24, size: int = 12) -> Tensor:
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, generator=addressed_generator("test images"), dtype=torch.uint8)


def blobs(count: int, dim: int, classes: int, *, spread: float) -> tuple[Tensor, Tensor]:
    """Gaussian classes around random centres, features like those of a ReLU: none below 0."""
    generator = addressed_generator("blobs", count)
    centres = torch.randn(classes, dim, generator=addressed_generator("centres"))
    labels = torch.arange(count) % classes
    return (centres[labels] + spread * torch.randn(count, dim, generator=generator)).relu(), labels


def linear_head(features: Tensor, classes: int, *, standardize: bool = False) -> heads.LinearHead:
    statistics = features if standardize else None
    return probe.new_head(features.shape[1], classes, seed=0, device=CPU, statistics=statistics)


@pytest.mark.parametrize("fit", ["adam", "sgd", "converged"])
def test_separable_classes_are_told_apart(fit: str) -> None:
    features, labels = blobs(200, 16, 4, spread=0.1)
    head = linear_head(features, 4)
    match fit:
        case "adam":
            probe.fit_by_batches(head, features, labels, settings=Linear(head="linear", lr=0.02), seed=0)
        case "sgd":
            probe.fit_by_batches(head, features, labels, settings=AggregatedCrops(head="crops"), seed=0)
        case _:
            assert probe.fit_converged(head, features, labels, l2=1e-4) <= probe.CONVERGED
    assert torch.equal(probe.predict(head, features), labels)


def test_adam_sees_every_sample_as_a_plain_loop_does() -> None:
    features, labels = blobs(70, 8, 3, spread=1.0)  # the last batch has 6 samples
    settings = Linear(head="linear", epochs=3, batch_size=16, lr=0.01)
    head = linear_head(features, 3)
    plain = torch.nn.Linear(8, 3)
    plain.load_state_dict(head.state_dict())
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for epoch in range(3):
        for chosen in torch.split(epoch_order(7, epoch, 70), 16):
            optimizer.zero_grad()
            F.cross_entropy(plain(features[chosen]), labels[chosen]).backward()
            optimizer.step()
    probe.fit_by_batches(head, features, labels, settings=settings, seed=7)
    torch.testing.assert_close(head.weight, plain.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.bias, plain.bias, rtol=1e-4, atol=1e-6)


def test_sgd_follows_a_cosine_that_falls_each_epoch() -> None:
    features, labels = blobs(20, 8, 2, spread=1.0)
    head = linear_head(features, 2)
    plain = torch.nn.Linear(8, 2)
    plain.load_state_dict(head.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    for epoch in range(5):
        for chosen in torch.split(epoch_order(0, epoch, 20), 8):
            optimizer.zero_grad()
            F.cross_entropy(plain(features[chosen]), labels[chosen]).backward()
            optimizer.step()
        schedule.step()
    settings = AggregatedCrops(head="crops", epochs=5, batch_size=8)
    probe.fit_by_batches(head, features, labels, settings=settings, seed=0)
    torch.testing.assert_close(head.weight, plain.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("standardize", [False, True])
def test_converged_head_is_scikit_learns_logistic_regression(standardize: bool) -> None:
    features, labels = blobs(600, 24, 5, spread=1.5)
    queries, truth = blobs(601, 24, 5, spread=1.5)
    head = linear_head(features, 5, standardize=standardize)
    assert probe.fit_converged(head, features, labels, l2=1e-3) <= probe.CONVERGED
    seen = head.scaled(features).double().numpy()
    # ours: mean cross-entropy + l2 |w|^2; theirs: |w|^2 / 2 + C * summed cross-entropy
    reference = LogisticRegression(C=1 / (2 * 1e-3 * 600), tol=1e-8, max_iter=5000).fit(seen, labels.numpy())
    with torch.no_grad():
        ours = head(queries).softmax(1).numpy()
        theirs = reference.predict_proba(head.scaled(queries).double().numpy())
    assert np.abs(ours - theirs).max() < 2e-3
    right, expected = (probe.predict(head, queries) == truth).sum(), (theirs.argmax(1) == truth.numpy()).sum()
    assert abs(int(right) - int(expected)) <= 1


def test_correlated_features_of_unlike_scales_converge_too() -> None:
    features, labels = blobs(600, 24, 5, spread=1.5)
    mix = torch.rand(24, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 200)
    features = 3 + features @ mix  # rank 24 of 200, far from the origin
    head = linear_head(features, 5)
    assert probe.fit_converged(head, features, labels, l2=1e-4) <= probe.CONVERGED
    wide = features.double()
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    reached = float(F.cross_entropy(F.linear(wide, weight, bias), labels) + 1e-4 * weight.square().sum())
    centred = (wide - wide.mean(0)).numpy()  # the bias is free, so that the optimum is the same
    solver = LogisticRegression(C=1 / (2 * 1e-4 * 600), tol=1e-10, max_iter=20_000, solver="newton-cholesky")
    best = solver.fit(centred, labels.numpy())
    loss = F.cross_entropy(torch.from_numpy(best.decision_function(centred)), labels)
    assert reached <= float(loss) + 1e-4 * float((best.coef_**2).sum()) + 1e-5


def test_a_feature_that_never_changes_keeps_its_scale() -> None:
    features, _ = blobs(50, 6, 2, spread=1.0)
    features[:, 2] = 0.0
    mean, std = probe.standardization(features)
    assert mean[2] == 0
    assert std[2] == 1
    assert linear_head(features, 2, standardize=True).scaled(features).isfinite().all()


def test_knn_is_the_plain_vote() -> None:
    bank, labels = blobs(80, 8, 4, spread=2.0)
    queries, _ = blobs(30, 8, 4, spread=2.0)
    cosine = F.normalize(queries) @ F.normalize(bank).T
    expected = []
    for row in cosine:
        votes = torch.zeros(4)
        for place in row.argsort(descending=True)[:5]:
            votes[labels[place]] += torch.exp(row[place] / 0.07)
        expected.append(int(votes.argmax()))
    assert probe.weighted_knn(bank, labels, queries, classes=4, k=5).tolist() == expected


SOURCE = CropSource(group=Crops(count=3, size=8), augment=Augment(), seed=0, split="test")


def crops_classifier(source: CropSource = SOURCE) -> Classifier:
    net = encoder()
    return Classifier(net, probe.new_head(16, 4, seed=0, device=CPU), features="pre_feature", crops=source).eval()


def test_a_samples_crops_are_its_own_whoever_is_in_the_batch() -> None:
    x = images().float() / 255
    whole = SOURCE.parameters(x[:1].expand(200, -1, -1, -1), None)
    indices = torch.tensor([130, 3, 64, 63, 3])
    some = SOURCE.parameters(x, indices)
    for name in CropParameters.__dataclass_fields__:
        assert torch.equal(getattr(some, name), getattr(whole, name)[:, indices])
    other = dataclasses.replace(SOURCE, split="train").parameters(x, indices)
    assert not torch.equal(other.box, some.box)

    classifier = crops_classifier()
    with torch.no_grad():
        logits = classifier(x)
        torch.testing.assert_close(classifier(x[[5, 2]], torch.tensor([5, 2])), logits[[5, 2]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier.logits_of_crops(classifier.cut(x)), logits, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_crops_also_when_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, x = crops_classifier().requires_grad_(False), images(4).float() / 255

    def gradient() -> Tensor:
        moved = x.clone().requires_grad_()
        return torch.autograd.grad(classifier(moved).logsumexp(1).sum(), moved)[0]

    together = gradient()
    assert (together.flatten(1).abs().amax(1) > 0).all()
    monkeypatch.setattr(heads, "_VIEWS", 4)  # one crop number a pass
    torch.testing.assert_close(gradient(), together, rtol=1e-3, atol=1e-6)


def test_features_leave_the_encoder_as_it_was() -> None:
    net = encoder()
    net.train()
    before = checkpoint.digest_of(net)
    whole = probe.extract_features(net, images(), device=CPU)
    assert whole.shape == (24, 16)
    assert probe.extract_features(net, images(), device=CPU, features="backbone").shape == (24, 64)
    assert probe.extract_features(net, images(), device=CPU, crops=SOURCE).shape == (24, 16)
    assert net.training
    assert checkpoint.digest_of(net) == before


LONG: dict[str, Callable[[], RobustLinear | Finetune]] = {
    "robust-linear": lambda: RobustLinear(head="robust-linear", epochs=2, batch_size=7, steps=2, lr=0.01),
    "pgd": lambda: Finetune(head="finetune", epochs=2, batch_size=7, steps=2),
    "trades": lambda: Finetune(head="finetune", epochs=2, batch_size=7, steps=2, objective="trades"),
    "clean": lambda: Finetune(head="finetune", epochs=2, batch_size=7, objective="clean", features="backbone"),
}


def trainer(settings: RobustLinear | Finetune, *, count: int = 24) -> SupervisedTrainer:
    return SupervisedTrainer(
        encoder(),
        images(count),
        torch.arange(count) % 4,
        classes=4,
        settings=settings,
        seed=0,
        precision="float32",
        device=CPU,
        sink=NullSink(),
    )


def train(whole: SupervisedTrainer, folder: Path, *, until: int = 0) -> int:
    return whole.train(folder, stop=lambda: 15 if until and whole.step == until else 0, seconds=lambda: 0.0)


@pytest.mark.parametrize("kind", LONG)
def test_a_cut_run_ends_as_an_uncut_one(kind: str, tmp_path: Path) -> None:
    settings = LONG[kind]()
    uncut = trainer(settings)
    assert train(uncut, tmp_path / "uncut") == 0
    for cut_at in (3, 4):  # within an epoch of 4 updates, and at its end
        folder = tmp_path / f"cut-{cut_at}"
        first = trainer(settings)
        assert train(first, folder, until=cut_at) == 15
        second = trainer(settings)
        path, saved, _ = checkpoint.newest_valid(folder)
        second.load(saved, path=path)
        assert second.step == cut_at
        assert train(second, folder) == 0
        for name in (checkpoint.MODEL, checkpoint.STATE):
            last = f"step-{uncut.updates:08d}"
            assert (folder / last / name).read_bytes() == (tmp_path / "uncut" / last / name).read_bytes()


@pytest.mark.parametrize("kind", LONG)
def test_what_is_trained_moves_and_the_rest_stays(kind: str, tmp_path: Path) -> None:
    whole = trainer(LONG[kind]())
    before = {key: value.clone() for key, value in whole.classifier.state_dict().items()}
    train(whole, tmp_path)
    moved = {key for key, value in whole.classifier.state_dict().items() if not torch.equal(value, before[key])}
    assert {"head.weight", "head.bias"} <= moved
    tuned = {key for key in moved if key.startswith("encoder.")}
    if kind == "robust-linear":
        assert not tuned
        return
    assert "encoder.backbone.conv1.weight" in tuned
    assert not any(key.startswith("encoder.projector") for key in tuned)
    assert any(key.startswith("encoder.pre_feature") for key in tuned) == (kind != "clean")  # clean reads the backbone
    passes = 2 if kind == "trades" else 1  # an attack's passes leave batch norm alone
    assert whole.classifier.encoder.backbone.bn1.num_batches_tracked == passes * whole.updates


def test_a_single_last_sample_joins_the_batch_before(tmp_path: Path) -> None:
    whole = trainer(Finetune(head="finetune", epochs=1, batch_size=7, steps=1), count=22)
    assert whole.per_epoch == 3
    assert train(whole, tmp_path) == 0


def test_robust_head_beats_the_clean_one_under_its_own_attack(tmp_path: Path) -> None:
    """On features that trade off: the robust head's adversarial loss is the lower one."""
    settings = RobustLinear(head="robust-linear", epochs=10, batch_size=12, steps=2, lr=0.02)
    calm: Any = settings.model_copy(update={"eps": "0"})
    x, y = images().float() / 255, torch.arange(24) % 4
    losses = []
    for chosen in (settings, calm):
        whole = trainer(chosen)
        train(whole, tmp_path / chosen.eps.replace("/", "-"))
        judge = trainer(settings)
        judge.classifier.head.load_state_dict(whole.classifier.head.state_dict())
        moved = judge._attack(x, torch.zeros_like(x), lambda logits: F.cross_entropy(logits, y))
        with torch.no_grad():
            losses.append(float(F.cross_entropy(judge.classifier(moved), y)))
    assert losses[0] < losses[1]


def test_shifted_images_are_windows_of_the_padded_ones() -> None:
    x = images(6, size=16).float()
    moved = shift_and_flip(x, addressed_generator("shift"))
    padded = F.pad(x, (2, 2, 2, 2))
    for before, after in zip(padded, moved, strict=True):
        windows = [before[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
        assert any(torch.equal(after, w) or torch.equal(after, w.flip(2)) for w in windows)
    assert torch.equal(moved, shift_and_flip(x, addressed_generator("shift")))
