"""Heads on frozen features: against references, against scikit-learn, and bit for bit across an interruption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from on_meta import META, watched
from sklearn.linear_model import LogisticRegression
from tiny import tiny_recipe
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

from cfamc_cli.engine import checkpoint
from cfamc_cli.engine.crops import CropParameters, crop_batch
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.device import Precision
from cfamc_cli.engine.encoder import Encoder, build_encoder
from cfamc_cli.engine.heads import classifier as heads
from cfamc_cli.engine.heads import frozen
from cfamc_cli.engine.heads.classifier import Classifier, CropSource, LoadedEncoder
from cfamc_cli.engine.heads.supervised import SupervisedTrainer, shift_and_flip
from cfamc_cli.engine.randomness import addressed_generator, epoch_order
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.schema import (
    AggregatedCrops,
    Augment,
    Crops,
    Finetune,
    Knn,
    Linear,
    Model,
    Recipe,
    RobustLinear,
)

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "schema": 1,
    "name": "t",
    "data": {"dataset": "fashion-mini"},
    "objective": {"name": "emp-ssl"},
    "adversary": {"name": "none"},
}
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
    return frozen.new_head(features.shape[1], classes, seed=0, device=CPU, statistics=statistics)


class Heard(NullTalk):
    """What was said."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.told: list[tuple[str, int, int, dict[str, float | str]]] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, values: Mapping[str, float | str]) -> None:
        self.told.append((task, done, total, dict(values)))


def task(talk: NullTalk, *, seed: int = 5) -> frozen.Task:
    """20 images to fit to and 8 others to judge on."""
    all_of = images(28)
    train = ImageSet(all_of[:20], torch.arange(20) % 4, tuple("abcd"), "", "folder", "train", "")
    test = ImageSet(all_of[20:], torch.arange(8) % 4, tuple("abcd"), "", "folder", "test", "")
    loaded = LoadedEncoder(encoder(), CPU, digest="", path=Path(), backbone_only=False)
    crops = [{"count": 2, "size": 8, "scale": [0.3, 0.6]}]
    return frozen.Task(loaded, tiny_recipe(crops=crops, seed=seed), train, test, talk)


@pytest.mark.parametrize("fit", ["adam", "sgd", "converged"])
def test_separable_classes_are_told_apart(fit: str) -> None:
    features, labels = blobs(200, 16, 4, spread=0.1)
    head = linear_head(features, 4)
    match fit:
        case "adam":
            frozen.fit_by_batches(head, features, labels, settings=Linear(head="linear", lr=0.02), seed=0)
        case "sgd":
            frozen.fit_by_batches(head, features, labels, settings=AggregatedCrops(head="crops"), seed=0)
        case _:
            assert frozen.fit_converged(head, features, labels, l2=1e-4) <= frozen.CONVERGED
    assert torch.equal(frozen.predict(head, features), labels)


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
    frozen.fit_by_batches(head, features, labels, settings=settings, seed=7)
    torch.testing.assert_close(head.weight, plain.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.bias, plain.bias, rtol=1e-4, atol=1e-6)


def test_sgd_follows_a_cosine_that_falls_each_epoch() -> None:
    features, labels = blobs(20, 8, 2, spread=1.0)
    head = linear_head(features, 2)
    plain = torch.nn.Linear(8, 2)
    plain.load_state_dict(head.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.03, momentum=0.9, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    for epoch in range(5):
        for chosen in torch.split(epoch_order(0, epoch, 20), 8):
            optimizer.zero_grad()
            F.cross_entropy(plain(features[chosen]), labels[chosen]).backward()
            optimizer.step()
        schedule.step()
    settings = AggregatedCrops(head="crops", epochs=5, batch_size=8, weight_decay=0.1)
    frozen.fit_by_batches(head, features, labels, settings=settings, seed=0)
    torch.testing.assert_close(head.weight, plain.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("standardize", [False, True])
def test_converged_head_is_scikit_learns_logistic_regression(standardize: bool) -> None:
    features, labels = blobs(600, 24, 5, spread=1.5)
    queries, truth = blobs(601, 24, 5, spread=1.5)
    head = linear_head(features, 5, standardize=standardize)
    assert frozen.fit_converged(head, features, labels, l2=1e-3) <= frozen.CONVERGED
    seen = head.scaled(features).double().numpy()
    # ours: mean cross-entropy + l2 |w|^2; theirs: |w|^2 / 2 + C * summed cross-entropy
    reference = LogisticRegression(C=1 / (2 * 1e-3 * 600), tol=1e-8, max_iter=5000).fit(seen, labels.numpy())
    with torch.no_grad():
        ours = head(queries).softmax(1).numpy()
        theirs = reference.predict_proba(head.scaled(queries).double().numpy())
    assert np.abs(ours - theirs).max() < 2e-3
    right, expected = (frozen.predict(head, queries) == truth).sum(), (theirs.argmax(1) == truth.numpy()).sum()
    assert abs(int(right) - int(expected)) <= 1


def test_correlated_features_of_unlike_scales_converge_too() -> None:
    features, labels = blobs(600, 24, 5, spread=1.5)
    mix = torch.rand(24, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 200)
    features = 3 + features @ mix  # rank 24 of 200, far from the origin
    head = linear_head(features, 5)
    assert frozen.fit_converged(head, features, labels, l2=1e-4) <= frozen.CONVERGED
    wide = features.double()
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    reached = float(F.cross_entropy(F.linear(wide, weight, bias), labels) + 1e-4 * weight.square().sum())
    centred = (wide - wide.mean(0)).numpy()  # the bias is free, so that the optimum is the same
    solver = LogisticRegression(C=1 / (2 * 1e-4 * 600), tol=1e-10, max_iter=20_000, solver="newton-cholesky")
    best = solver.fit(centred, labels.numpy())
    loss = F.cross_entropy(torch.from_numpy(best.decision_function(centred)), labels)
    assert reached <= float(loss) + 1e-4 * float((best.coef_**2).sum()) + 1e-5


@pytest.mark.parametrize("standardize", [False, True])
def test_the_first_look_at_the_data_has_the_gradient_that_is_written_down(standardize: bool) -> None:
    """At W = 0, through W = V L^-1 with L L^T = cov / C + 2 l2 and its jitter, in float64."""
    features, labels = blobs(60, 6, 3, spread=1.0)
    features[:, 1] *= 5.0  # unlike scales
    head = linear_head(features, 3, standardize=standardize)
    told: list[tuple[int, int]] = []
    each = lambda done, total: told.append((done, total))  # noqa: E731
    reached = frozen.fit_converged(head, features, labels, l2=0.05, iterations=0, each=each)
    x = head.scaled(features).double()
    hessian = torch.cov(x.T, correction=0) / 3 + 2 * 0.05 * torch.eye(6)
    lower = torch.linalg.cholesky(hessian + 1e-6 * hessian.diagonal().max() * torch.eye(6))
    wrong = (1 / 3 - F.one_hot(labels, 3).double()) / 60  # softmax of zeros less the truth, of a mean
    by_white = wrong.T @ (x - x.mean(0)) @ torch.linalg.inv(lower).T
    assert reached == pytest.approx(float(max(by_white.abs().max(), wrong.sum(0).abs().max())), rel=1e-4)
    assert not head.weight.any()
    assert not head.bias.any()
    told.clear()
    assert frozen.fit_converged(head, features, labels, l2=0.05, tolerance=1e-3, each=each) <= 1e-3
    looks = len(told) - 1
    assert told == [(look, 1000) for look in range(1, looks + 1)] + [(1000, 1000)]
    loose = frozen.fit_converged(head, features, labels, l2=0.05, iterations=2)
    assert loose > frozen.fit_converged(head, features, labels, l2=0.05)


def test_a_head_that_diverges_says_in_which_epoch() -> None:
    features, labels = blobs(20, 8, 2, spread=1.0)
    told: list[tuple[int, int]] = []
    each = lambda done, total: told.append((done, total))  # noqa: E731
    settings = AggregatedCrops(head="crops", epochs=3, batch_size=8)
    frozen.fit_by_batches(linear_head(features, 2), features, labels, settings=settings, seed=0, each=each)
    assert told == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(CfamcError) as caught:
        frozen.fit_by_batches(linear_head(features, 2), features * torch.inf, labels, settings=settings, seed=0)
    assert (caught.value.message, caught.value.hint) == ("the head diverged in epoch 1", "lower probe.lr")
    assert caught.value.exit_code == ExitCode.DIVERGED


def test_a_new_head_is_drawn_from_the_seed_within_its_bound() -> None:
    features, _ = blobs(50, 16, 4, spread=1.0)
    head = frozen.new_head(16, 4, seed=3, device=CPU, statistics=features)
    generator = addressed_generator("head", 3)
    drawn = [(torch.rand(shape, generator=generator) - 0.5) / 2 for shape in ((4, 16), (4,))]  # within 1 / sqrt(16)
    torch.testing.assert_close([head.weight.detach(), head.bias.detach()], drawn)
    torch.testing.assert_close(head.mean, features.mean(0))
    assert frozen.new_head(16, 4, seed=3, device=CPU).mean is None
    fresh = heads.LinearHead(16, 4, standardized=True)
    assert torch.equal(fresh.scaled(features), features)
    assert not fresh(features).any()


ON_FEATURES: dict[str, Linear | AggregatedCrops | Knn] = {
    "knn": Knn(head="knn", k=19, temperature=1e-4),
    "crops": AggregatedCrops(head="crops", crops=3, epochs=2, batch_size=8),
    "linear": Linear(head="linear", features="backbone", epochs=2, lr=0.1),
    "standardized": Linear(head="linear", features="backbone", epochs=2, lr=0.1, standardize=True),
    "converged": Linear(head="linear", protocol="converged", l2=0.01),
    "cut short": Linear(head="linear", protocol="converged", l2=0.01),
}


@pytest.mark.parametrize("kind", ON_FEATURES)
def test_a_head_on_features_is_fitted_and_judged_part_by_part(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, converge = ON_FEATURES[kind], frozen.fit_converged
    if kind in ("converged", "cut short"):
        reached = frozen.CONVERGED if kind == "converged" else 2 * frozen.CONVERGED

        def fit(*given: Any, l2: float, each: frozen.Each) -> float:
            converge(*given, l2=l2)
            each(1, 7)
            return reached

        monkeypatch.setattr(frozen, "fit_converged", fit)
    heard = Heard()
    given = task(heard)
    found = frozen.fit_on_features(given, settings)
    assert found is not None
    source: dict[str, CropSource | None] = {"train": None, "test": None}
    if isinstance(settings, AggregatedCrops):
        group = given.recipe.crops[0].model_copy(update={"count": 3})
        for split in source:
            source[split] = CropSource(group=group, augment=given.recipe.augment, seed=5, split=split)
    train, test = (
        frozen.extract_features(
            given.loaded.encoder, part.images, device=CPU, features=settings.features, crops=source[part.split]
        )
        for part in (given.train, given.test)
    )
    labels = torch.arange(20) % 4
    read: list[tuple[str, int, int, dict[str, float]]]
    read = [("features of train", 20, 20, {}), ("features of test", 8, 8, {})]
    fitting = f"fitting the {settings.head} head"
    if isinstance(settings, Knn):
        nearest = frozen.weighted_knn(train, labels, test, classes=4, k=19, temperature=1e-4)
        assert (found.classifier, found.train, found.converged) == (None, None, None)
        assert torch.equal(found.test, nearest)
        assert heard.told == [*read, (fitting, 8, 8, {})]
        return
    head = frozen.new_head(train.shape[1], 4, seed=5, device=CPU, statistics=train if kind == "standardized" else None)
    if kind in ("converged", "cut short"):
        converge(head, train, labels, l2=0.01)
        assert heard.told == [*read, (fitting, 1, 7, {})]
        assert found.converged == (kind == "converged")
        late = ["the head had not converged when its time was up: gradient 0.0002"]
        assert heard.warnings == ([] if found.converged else late)
    else:
        frozen.fit_by_batches(head, train, labels, settings=settings, seed=5)
        assert heard.told == [*read, (fitting, 1, 2, {}), (fitting, 2, 2, {})]
        assert found.converged is None
    assert found.classifier is not None
    assert found.train is not None
    for name, value in head.state_dict().items():
        assert torch.equal(found.classifier.head.state_dict()[name], value)
    assert (found.classifier.features, found.classifier.crops) == (settings.features, source["test"])
    assert torch.equal(found.train, frozen.predict(head, train))
    assert torch.equal(found.test, frozen.predict(head, test))


def test_work_in_chunks_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    net, told = encoder(), []
    each = lambda done, total: told.append((done, total))  # noqa: E731
    classifier = Classifier(net, frozen.new_head(16, 4, seed=0, device=CPU), features="pre_feature").eval()

    def everything() -> list[Tensor]:
        told.clear()
        read = [frozen.extract_features(net, images(), device=CPU, crops=crops, each=each) for crops in (None, SOURCE)]
        nearest = frozen.weighted_knn(read[0], torch.arange(24) % 4, read[0][:11], classes=4, k=2, each=each)
        return [*read, nearest, frozen.classify(classifier, images(), device=CPU, each=each)]

    whole = everything()
    assert told == [(24, 24), (24, 24), (11, 11), (24, 24)]
    monkeypatch.setattr(frozen, "_CHUNK", 10)
    torch.testing.assert_close(everything(), whole, rtol=1e-4, atol=1e-5)
    tens = [(10, 24), (20, 24), (24, 24)]
    threes = [(done, 24) for done in range(3, 25, 3)]  # of 3 crops each
    assert told == [*tens, *threes, (10, 11), (11, 11), *tens]


def test_a_feature_that_never_changes_keeps_its_scale() -> None:
    features, _ = blobs(50, 6, 2, spread=1.0)
    features[:, 2] = 0.0
    mean, std = frozen.standardization(features)
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(std[:2], features.double().numpy().std(0)[:2], rtol=1e-5)
    assert mean[2] == 0
    assert std[2] == 1
    assert linear_head(features, 2, standardize=True).scaled(features).isfinite().all()


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (5, 1.0), (7, 0.01), (200, 0.5)])
def test_knn_is_the_plain_vote(k: int, temperature: float) -> None:
    """Equation 2 of arXiv:1805.01978 and its weighted vote, one query after the other in float64."""
    bank, labels = blobs(80, 8, 4, spread=2.0)
    queries, _ = blobs(81, 8, 4, spread=2.0)
    expected = []
    for query in queries.double().numpy():
        wide = bank.double().numpy()
        cosine = wide @ query / np.linalg.norm(wide, axis=1) / np.linalg.norm(query)
        votes = dict.fromkeys(range(4), 0.0)
        for place in np.argsort(-cosine)[:k]:
            votes[int(labels[place])] += np.exp(cosine[place] / temperature)
        expected.append(max(votes, key=lambda label: votes[label]))
    answers = frozen.weighted_knn(bank, labels, queries, classes=4, k=k, temperature=temperature)
    assert answers.tolist() == expected


def test_confusion_and_accuracy_by_class_are_counts() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])
    answers = torch.tensor([0, 1, 1, 1, 0, 3, 3, 3, 0])
    confusion = frozen.confusion_of(truth, answers, classes=4)
    assert confusion == ((1, 2, 0, 0), (1, 1, 0, 0), (0, 0, 0, 0), (1, 0, 0, 3))
    found = frozen.accuracy_by_class(confusion, ["a", "b", "c", "d"])
    assert [part.name for part in found] == ["a", "b", "c", "d"]
    assert [None if part.accuracy is None else (part.accuracy.correct, part.accuracy.n) for part in found] == [
        (1, 3),
        (1, 2),
        None,
        (3, 4),
    ]


SOURCE = CropSource(group=Crops(count=3, size=8), augment=Augment(), seed=0, split="test")


def crops_classifier(source: CropSource = SOURCE) -> Classifier:
    net = encoder()
    return Classifier(net, frozen.new_head(16, 4, seed=0, device=CPU), features="pre_feature", crops=source).eval()


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


@pytest.mark.parametrize("scale", [(0.08, 0.2), (0.6, 0.7)])
def test_a_head_reads_the_mean_over_crops_cut_as_the_recipe_says(scale: tuple[float, float]) -> None:
    """Held against torchvision's crops of the same boxes; their share of the area is that of the recipe."""
    calm = {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0}
    recipe = Recipe.model_validate(
        TINY | {"crops": [{"count": 2, "size": 8, "scale": list(scale), "ratio": [0.9, 1.1]}], "augment": calm}
    )
    source = heads.crop_source(recipe, AggregatedCrops(head="crops", crops=5), split="test")
    x = images(6, size=40).float() / 255
    drawn = source.parameters(x, None)
    share = drawn.box[..., 2] * drawn.box[..., 3] / 40**2
    assert share.shape == (5, 6)
    assert scale[0] - 0.03 <= float(share.min()) <= float(share.max()) <= scale[1] + 0.03  # sides are whole pixels
    net = encoder()
    expected = torch.zeros(6, 16)
    for view in range(5):
        for sample in range(6):
            box = [int(side) for side in drawn.box[view, sample]]
            crop = resized_crop(x[sample : sample + 1], *box, [8, 8], antialias=True)
            expected[sample] += net.features(crop.flip(3) if drawn.flip[view, sample] else crop)[0] / 5
    read = heads.read_features(net, x, None, features="pre_feature", crops=source)
    torch.testing.assert_close(read, expected, rtol=1e-3, atol=1e-4)
    extracted = frozen.extract_features(net, (x * 255).round().byte(), device=CPU, crops=source)
    torch.testing.assert_close(extracted, read, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_crops_also_when_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, x = crops_classifier().requires_grad_(False), images(4).float() / 255

    def gradient() -> Tensor:
        moved = x.clone().requires_grad_()
        return torch.autograd.grad(classifier(moved).logsumexp(1).sum(), moved)[0]

    together = gradient()
    assert (together.flatten(1).abs().amax(1) > 0).all()
    monkeypatch.setattr(heads, "_VIEWS", 4)  # one crop number a pass
    torch.testing.assert_close(gradient(), together, rtol=1e-3, atol=1e-6)


def test_the_crops_of_a_head_are_packed_once_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, x = crops_classifier().requires_grad_(False), images(4).float() / 255
    assert classifier.crops is not None
    monkeypatch.setattr(heads, "_VIEWS", 8)  # two crop numbers of three in a pass
    drawn = vars(classifier.crops.parameters(x, None)).values()
    expected = torch.zeros(4, 16)
    for first in (0, 2):
        crops = crop_batch(x, CropParameters(*(part[first : first + 2] for part in drawn)), size=8)
        features = classifier.encoder.features(crops.flatten(0, 1), features="pre_feature")
        expected += features.unflatten(0, crops.shape[:2]).sum(0)
    assert torch.equal(classifier.read(x), expected / 3)
    heads._packed.cache_clear()
    net, x = classifier.to(META), x.to(META)
    for copies in (1, 0, 0):
        moved = x.clone().requires_grad_()
        with watched() as seen:
            torch.autograd.grad(net(moved, torch.zeros(4, dtype=torch.int64)).sum(), moved)
        assert len(seen.copies) == copies
    other = heads._packed.cache_info().misses
    with watched():
        net(x[:3], torch.zeros(3, dtype=torch.int64))
        net(x, torch.arange(4))
    assert heads._packed.cache_info().misses == other + 2


def test_features_leave_the_encoder_as_it_was() -> None:
    net = encoder()
    net.train()
    before = checkpoint.digest_of(net)
    whole = frozen.extract_features(net, images(), device=CPU)
    assert whole.shape == (24, 16)
    assert frozen.extract_features(net, images(), device=CPU, features="backbone").shape == (24, 64)
    assert frozen.extract_features(net, images(), device=CPU, crops=SOURCE).shape == (24, 16)
    assert net.training
    assert checkpoint.digest_of(net) == before


LONG: dict[str, Callable[[], RobustLinear | Finetune]] = {
    "robust-linear": lambda: RobustLinear(head="robust-linear", epochs=2, batch_size=7, steps=2, lr=0.01),
    "pgd": lambda: Finetune(head="finetune", epochs=2, batch_size=7, steps=2),
    "trades": lambda: Finetune(head="finetune", epochs=2, batch_size=7, steps=2, objective="trades"),
    "clean": lambda: Finetune(head="finetune", epochs=2, batch_size=7, objective="clean", features="backbone"),
}


def trainer(settings: RobustLinear | Finetune, *, count: int = 24) -> SupervisedTrainer:
    few = ImageSet(images(count), torch.arange(count) % 4, tuple("abcd"), "", "folder", "train", "")
    loaded = LoadedEncoder(encoder(), CPU, digest="", path=Path(), backbone_only=False)
    return SupervisedTrainer(frozen.Task(loaded, tiny_recipe(), few, few, NullTalk()), settings)


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


@pytest.mark.parametrize(
    ("old", "new", "shape"),
    [
        ("", "99.momentum_buffer", (2, 7)),
        ("", "first.momentum_buffer", (2, 7)),
        ("", "0000.momentum_buffer", (2, 7)),
        ("", "0000.momentum_buffer", ()),
        ("0001.momentum_buffer", "0001.momentum", (2,)),
        ("0001.momentum_buffer", "", ()),
        ("", "step", (99,)),
    ],
)
def test_a_checkpoint_whose_state_is_of_another_optimizer_is_refused(
    old: str, new: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """The weights fit; the state has a name too many or too few, another one or another shape, or is beyond the end."""
    whole = trainer(LONG["pgd"]())
    train(whole, tmp_path, until=1)
    path, saved, _ = checkpoint.newest_valid(tmp_path)
    saved.state.pop(old, None)
    if new == "step":
        saved.progress["step"] = whole.updates + 1
    elif new:
        saved.state[new] = torch.zeros(shape)
    with pytest.raises(CfamcError, match=f"{path.name}: its state does not fit the head") as refused:
        whole.load(saved, path=path)
    assert refused.value.exit_code == ExitCode.BAD_DATA


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
    assert whole.classifier.encoder.state_dict()["backbone.bn1.num_batches_tracked"] == passes * whole.updates


def ascent(
    classifier: Classifier, x: Tensor, delta: Tensor, loss_of: Any, *, eps: float, size: float, k: int
) -> Tensor:
    """PGD written down once more: k signed steps, each cut to the ball and to [0, 1]."""
    for _ in range(k):
        point = (x + delta).requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(classifier(point)), point)
        delta = (delta + size * slope.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    return x + delta


EPS, SIZE, STEPS, BETA, LR = 6 / 255, 0.01, 3, 2.5, 0.05


def settings_by_hand(kind: str) -> RobustLinear | Finetune:
    """Two epochs in batches of 9 of robust-linear, or of fine-tuning's objective of that name."""
    fixed = {"epochs": 2, "batch_size": 9, "lr": LR}
    attack = {} if kind == "clean" else {"eps": "6/255", "step_size": "0.01", "steps": STEPS}
    if kind == "robust-linear":
        return RobustLinear.model_validate({"head": kind} | fixed | attack)
    own = {"momentum": 0.8, "weight_decay": 0.01} | ({"trades_beta": BETA} if kind == "trades" else {})
    return Finetune.model_validate({"head": "finetune", "objective": kind} | fixed | own | attack)


def points_by_hand(plain: Any, kind: str, batch: torch.Tensor, y: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Where an update reads the classifier: the batch, or its adversarial examples."""
    start, loss_of = torch.zeros_like(batch), lambda z: F.cross_entropy(z, y)
    if kind == "clean":
        return batch
    if kind == "pgd":
        start = ((2 * torch.rand(batch.shape, generator=g) - 1) * EPS + batch).clamp(0, 1) - batch
    elif kind == "trades":
        start = 0.001 * torch.randn(batch.shape, generator=g)
        with torch.no_grad():
            p = plain(batch).softmax(1)
        loss_of = lambda z: (p * (p.log() - z.log_softmax(1))).sum() / len(z)  # noqa: E731
    return ascent(plain, batch, start, loss_of, eps=EPS, size=SIZE, k=STEPS)


def loss_by_hand(plain: Any, kind: str, batch: torch.Tensor, points: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if kind != "trades":
        return F.cross_entropy(plain(points), y)
    p, q = plain(batch).softmax(1), plain(points).softmax(1)
    loss: torch.Tensor = -p[range(len(y)), y].log().mean() + BETA * (p * (p / q).log()).sum(1).mean()
    return loss


@pytest.mark.parametrize("kind", ["clean", "pgd", "trades", "robust-linear"])
def test_training_is_written_down_step_by_step(kind: str, tmp_path: Path) -> None:
    """Each update by hand: the batch, its examples, the loss, and the rate: half a cosine, or Adam's constant one."""
    settings = settings_by_hand(kind)
    trained, plain = trainer(settings), trainer(settings).classifier
    x, labels = images().float() / 255, torch.arange(24) % 4
    parts = [plain.head, *([] if kind == "robust-linear" else [plain.encoder.backbone, plain.encoder.pre_feature])]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.8, weight_decay=0.01)
    if kind == "robust-linear":
        optimizer = torch.optim.Adam(parameters, lr=LR)
    for update in range(6):  # 9, 9 and 6 images in each of 2 epochs
        epoch, index = divmod(update, 3)
        before = {name: value.clone() for name, value in trained.classifier.state_dict().items()}
        plain.load_state_dict(before)  # so that rounding does not add up
        chosen = epoch_order(0, epoch, 24)[9 * index : 9 * index + 9]
        batch, y = x[chosen], labels[chosen]
        if kind != "robust-linear":
            batch = shift_and_flip(batch, addressed_generator("finetune-shift", 0, epoch, index))
            optimizer.param_groups[0]["lr"] = LR * [1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873][update]
        points = points_by_hand(plain, kind, batch, y, addressed_generator("finetune-delta", 0, epoch, index))
        plain.encoder.train(kind != "robust-linear")
        loss = loss_by_hand(plain, kind, batch, points, y)
        plain.eval()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        train(trained, tmp_path, until=update + 1)
        for name, value in plain.state_dict().items():
            moved, expected = trained.classifier.state_dict()[name] - before[name], value - before[name]
            assert (moved - expected).abs().max() <= 0.01 * expected.abs().max(), (update, name)


def test_training_says_how_far_it_is_and_keeps_its_newest_states(tmp_path: Path) -> None:
    heard = Heard()
    given = task(heard)
    settings = RobustLinear(head="robust-linear", epochs=3, batch_size=8, steps=1)  # 3 updates an epoch
    whole = SupervisedTrainer(given, settings)
    torch.testing.assert_close(whole.classifier.head.weight, frozen.new_head(16, 4, seed=5, device=CPU).weight)
    asked: list[int] = []

    def stop() -> int:
        asked.append(whole.step)
        return 0

    assert whole.take_up(tmp_path) == 0.0
    assert whole.train(tmp_path, stop=stop, seconds=lambda: 10.0 + whole.step) == 0
    assert asked == list(range(1, 9))  # the last update ends it anyway
    assert heard.told == [("training the robust-linear head", k, 9, {"epoch": k / 3}) for k in range(1, 10)]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000009", "step-00000006"]
    heard.told.clear()
    judged = whole.judged()
    assert judged.classifier is whole.classifier
    assert judged.train is not None
    assert judged.converged is None
    for answers, part in ((judged.train, given.train), (judged.test, given.test)):
        with torch.no_grad():
            expected = whole.classifier(part.images.float() / 255).argmax(1)
        assert torch.equal(answers, expected)
    assert heard.told == [("judging on train", 20, 20, {}), ("judging on test", 8, 8, {})]

    again = SupervisedTrainer(given, settings)
    assert again.take_up(tmp_path) == 19.0
    assert (again.step, heard.warnings) == (9, [])
    assert torch.equal(again.classifier.head.weight, whole.classifier.head.weight)
    (tmp_path / "step-00000009" / checkpoint.MODEL).write_bytes(b"")
    assert again.take_up(tmp_path) == 16.0
    assert again.step == 6
    assert [text.rpartition("; ")[2] for text in heard.warnings] == ["going back to step-00000006"]
    assert "step-00000009" in heard.warnings[0]


@pytest.mark.parametrize(("precision", "short"), [("float32", False), ("bfloat16", True)])
def test_a_head_trained_in_float32_is_not_shortened_to_tf32(
    precision: Precision, short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(Finetune(head="finetune", epochs=1, batch_size=24, objective="clean"))
    whole.precision = precision
    loss_of, seen = whole._loss, list[bool]()

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        loss = loss_of(*arguments)
        loss.register_hook(lambda _: seen.append(torch.backends.cudnn.allow_tf32))
        return loss

    monkeypatch.setattr(whole, "_loss", watched)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # a run that was trained in this process may clear it
    train(whole, tmp_path)
    assert seen == [short, short]


def test_a_head_that_diverges_in_training_is_never_kept(tmp_path: Path) -> None:
    settings = RobustLinear(head="robust-linear", epochs=1, batch_size=8, steps=1)
    whole = SupervisedTrainer(task(NullTalk()), settings)
    with torch.no_grad():
        whole.classifier.head.weight[0, 0] = torch.nan
    with pytest.raises(CfamcError) as caught:
        train(whole, tmp_path)
    assert caught.value.message == "the robust-linear head diverged before update 3"
    assert (caught.value.hint, caught.value.exit_code) == ("lower probe.lr", ExitCode.DIVERGED)
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_an_encoder_is_read_from_the_newest_state_that_is_whole(tmp_path: Path) -> None:
    heard, net = Heard(), encoder()
    for step in (3, 6, 9):
        progress: dict[str, object] = {"backbone_only": True} if step == 6 else {}
        checkpoint.save(tmp_path, step, checkpoint.Checkpoint(net.state_dict(), {}, progress))
    before = torch.get_rng_state()
    loaded = heads.load_encoder(tmp_path, MODEL, device=CPU, talk=heard)
    assert torch.equal(torch.get_rng_state(), before)
    assert (loaded.path, loaded.backbone_only, loaded.device) == (tmp_path / "step-00000009", False, CPU)
    assert loaded.digest == checkpoint.digest_of(net) == checkpoint.digest_of(loaded.encoder)
    assert not loaded.encoder.training
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    assert heard.warnings == []
    (tmp_path / "step-00000009" / checkpoint.MODEL).write_bytes(b"")
    loaded = heads.load_encoder(tmp_path, MODEL, device=CPU, talk=heard)
    assert (loaded.path, loaded.backbone_only) == (tmp_path / "step-00000006", True)
    (text,) = heard.warnings
    assert text.endswith("; reading step-00000006")


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


def test_images_are_shifted_by_every_reach_and_every_other_one_is_mirrored() -> None:
    x = images(400, size=16).float()
    moved = shift_and_flip(x, addressed_generator("shift"))
    seen = []
    for before, after in zip(F.pad(x, (2, 2, 2, 2)), moved, strict=True):
        places = [(top, left, flip) for top in range(5) for left in range(5) for flip in (False, True)]
        for top, left, flip in places:
            window = before[:, top : top + 16, left : left + 16]
            if torch.equal(after, window.flip(2) if flip else window):
                seen.append((top, left, flip))
    assert len(seen) == 400  # each image is one window
    assert {place[:2] for place in seen} == {(top, left) for top in range(5) for left in range(5)}
    assert 160 < sum(flip for _, _, flip in seen) < 240
    assert torch.equal(moved, shift_and_flip(x, addressed_generator("shift")))
