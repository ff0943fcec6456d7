"""Online evaluation and the watch on the adversary: what they find, what they cost, what they leave alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from fixed_inputs import fill, uniform
from torch import Tensor

from cfamc_cli.engine import monitor
from cfamc_cli.engine.adversary import LossBeside, LossOf, ascend_loss
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.heads.classifier import LinearHead
from cfamc_cli.engine.heads.frozen import fit_converged, new_head
from cfamc_cli.recipe.schema import Model
from cfamc_cli.store.records import EvaluationLine

EPS = 8 / 255
HERE: monitor.Where = {"step": 3, "batch": 1, "epoch": 0.5, "phase": None}


@pytest.mark.parametrize("updates", [*range(1, 60), 119, 999, 1000, 5001, 15_630])
@pytest.mark.parametrize("batch_size", [2, 8, 100, 512])
def test_comparisons_cost_at_most_two_percent_of_the_view_passes(updates: int, batch_size: int) -> None:
    for passes in (1, 6):
        plan = monitor.schedule(updates=updates, batch_size=batch_size, passes_per_update=passes)
        if plan.every == 0:
            assert plan.images == 0
            assert 0.02 * updates * batch_size * passes < 13 * 8, "even one comparison of 8 images costs too much"
            continue
        comparisons = updates // plan.every
        assert 8 <= plan.images <= batch_size or plan.images == batch_size
        assert 1 <= comparisons <= 20
        each = (3 + monitor.ATTACK_STEPS) * plan.images  # clean, trained, strongest and the attack's own
        assert comparisons * each <= 0.02 * updates * batch_size * passes


def test_a_long_run_is_compared_every_twentieth_of_it() -> None:
    assert monitor.schedule(updates=15_000, batch_size=100, passes_per_update=1) == monitor.Schedule(750, 100)


@pytest.mark.parametrize(
    ("updates", "batch_size", "passes", "expected"),
    [
        (1000, 100, 1, (53, 8)),  # 153.8 images are allowed: 19 comparisons of 8
        (1000, 100, 6, (50, 46)),  # 923 images: 20 comparisons of 46
        (52, 100, 1, (52, 8)),  # 8 images exactly: one comparison
        (51, 100, 1, (0, 0)),  # 7.8 images
        (10, 4, 2000, (1, 4)),  # never more often than once an update, nor more images than the batch has
    ],
)
def test_a_plan_computed_by_hand(updates: int, batch_size: int, passes: int, expected: tuple[int, int]) -> None:
    plan = monitor.schedule(updates=updates, batch_size=batch_size, passes_per_update=passes)
    assert (plan.every, plan.images) == expected


TARGET = torch.ones(1, 4, 3, 6, 6)


def beside(loss_of: LossOf) -> LossBeside:
    """A loss of all groups, as a comparison asks for it."""
    return lambda spared: lambda moved: loss_of([*spared, *moved])


def smooth(groups: Sequence[Tensor]) -> Tensor:
    return (groups[-1] * TARGET).sum()


SMOOTH = beside(smooth)


def overfitted(groups: Sequence[Tensor]) -> Tensor:
    """A loss that is fitted to the corners of the ball: largest halfway there, and flat for a large single step."""
    away = (groups[-1] - 0.5) / EPS
    return (torch.sin(torch.pi * away.clamp(-1, 1)) * TARGET).sum()


def test_the_grip_of_a_full_attack_is_one_and_of_none_is_zero() -> None:
    crops = [torch.full((1, 4, 3, 6, 6), 0.5)]
    zero = [torch.zeros_like(crops[0])]
    strongest = ascend_loss(smooth, crops, zero, eps=EPS, step_size=0.01, steps=10)
    assert monitor.measure_grip(SMOOTH, crops, strongest, eps=EPS, where=HERE).strength == pytest.approx(1, abs=1e-3)
    grip = monitor.measure_grip(SMOOTH, crops, zero, eps=EPS, where=HERE)
    assert grip.strength == pytest.approx(0, abs=1e-3)
    assert grip.strongest > grip.clean == pytest.approx(grip.trained)


def test_one_large_step_loses_its_grip_on_an_overfitted_loss() -> None:
    crops = [torch.full((1, 4, 3, 6, 6), 0.5)]
    single = ascend_loss(overfitted, crops, [torch.zeros_like(crops[0])], eps=EPS, step_size=10 / 255, steps=1)
    grip = monitor.measure_grip(beside(overfitted), crops, single, eps=EPS, where=HERE)
    assert grip.strength < monitor.LOST
    assert grip.strongest > grip.clean + 100


def test_the_first_group_stays_clean_where_the_second_view_alone_is_perturbed() -> None:
    crops = [torch.full((1, 4, 3, 6, 6), 0.5), torch.full((1, 4, 3, 6, 6), 0.25)]

    def loss_of(groups: Sequence[Tensor]) -> Tensor:
        assert torch.equal(groups[0], crops[0])
        return smooth(groups)

    grip = monitor.measure_grip(beside(loss_of), crops, [torch.full_like(crops[1], EPS)], eps=EPS, where=HERE)
    assert grip.strength == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("share", "strength"), [(0.5, 1.0), (-0.5, 0.0), (0.0, 0.0)])
def test_where_pgd_itself_fails_a_grip_stays_within_its_scale(share: float, strength: float) -> None:
    def misleading(groups: Sequence[Tensor]) -> Tensor:
        return smooth([x.detach() * 2 - x for x in groups])  # its value is the smooth loss, its gradient leads down

    crops = [torch.full((1, 4, 3, 6, 6), 0.5)]
    trained = [torch.full_like(crops[0], share * EPS)]
    grip = monitor.measure_grip(beside(misleading), crops, trained, eps=EPS, where=HERE)
    assert grip.strongest < grip.clean
    assert (grip.strength, grip.lost) == (strength, strength == 0)


def test_a_grip_is_lost_below_a_twentieth() -> None:
    crops = [torch.full((1, 4, 3, 6, 6), 0.5)]
    at_rest, gain = 0.5 * 432, EPS * 432  # of 4 x 3 x 6 x 6 pixels
    for share, lost in ((0.04, True), (0.06, False)):
        grip = monitor.measure_grip(SMOOTH, crops, [torch.full_like(crops[0], share * EPS)], eps=EPS, where=HERE)
        values = (grip.clean, grip.trained, grip.strongest)
        assert values == pytest.approx((at_rest, at_rest + share * gain, at_rest + gain), rel=1e-5)
        assert grip.strength == pytest.approx(share, abs=1e-3)
        assert grip.lost == lost
        faint = monitor.measure_grip(
            beside(lambda groups: 1e-3 * smooth(groups)),
            crops,
            [torch.full_like(crops[0], share * EPS)],
            eps=EPS,
            where=HERE,
        )
        assert faint.strength == pytest.approx(share, abs=1e-3)
        assert (grip.kind, grip.step, grip.batch, grip.epoch) == ("grip", 3, 1, 0.5)


class Brightness(torch.nn.Module):
    """An encoder that reads the mean of an image, and how much is missing to white."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_feature = torch.nn.Sequential(torch.nn.Linear(1, 2))  # tells the number of features

    def features(self, x: Tensor, *, features: str = "pre_feature") -> Tensor:
        assert features == "pre_feature"
        assert not self.training
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, 1 - mean], 1)


def even(values: Sequence[int]) -> Tensor:
    """One even image a value."""
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()


def test_online_evaluation_of_an_encoder_whose_answers_are_known() -> None:
    """A bank that is symmetric around 127.5, where the linear head therefore cuts; far out the neighbours disagree."""
    bank = [(50, 0)] * 60 + [(205, 1)] * 60 + [(242, 0)] * 25 + [(13, 1)] * 25
    asked = [  # value, label; under an attack of 8 / 255 a value moves by 8
        (150, 1),  # right in every way
        (105, 0),
        (136, 1),  # 128 under attack: still right
        (134, 1),  # 126 under attack
        (121, 0),
        (115, 1),  # wrong
        (242, 1),  # wrong by its neighbours alone
        (13, 0),
        (230, 0),  # right by its neighbours alone
    ]
    told: list[tuple[int, int]] = []
    found = monitor.evaluate(
        cast("Encoder", Brightness()),
        even([value for value, _ in bank]),
        torch.tensor([label for _, label in bank]),
        even([value for value, _ in asked]),
        torch.tensor([label for _, label in asked]),
        classes=2,
        eps="8/255",
        device=torch.device("cpu"),
        stop=lambda: 0,
        each=lambda done, total: told.append((done, total)),
        where=HERE,
    )
    assert found == EvaluationLine(**HERE, n=9, knn=6, clean=7, robust=5, eps="8/255", attack="pgd-10")
    passes = len(bank) + 9 + 7 * 10 * 3  # features; then of what is right, steps forward and backward
    assert told[-1] == (passes, passes)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_online_evaluation_counts_and_leaves_everything_alone() -> None:
    encoder = Encoder(Model(width=4, hidden_dim=16, embedding_dim=8))
    fill(encoder.state_dict())
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    labels = torch.arange(48) % 2
    images = (uniform(48, 3, 8, 8, key="online") * 100).to(torch.uint8)
    images[labels == 1] += 120  # dark and bright: easy
    random_state = torch.get_rng_state()
    found = monitor.evaluate(
        encoder,
        images[:32],
        labels[:32],
        images[32:],
        labels[32:],
        classes=2,
        eps="8/255",
        device=torch.device("cpu"),
        stop=lambda: 0,
        each=lambda *_: None,
        where=HERE,
    )
    assert found is not None
    assert found.n == 16
    assert found.clean == 16
    assert found.knn > 8
    assert 0 <= found.robust <= found.clean
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_online_evaluation_without_one_right_answer() -> None:
    encoder = Encoder(Model(width=2, hidden_dim=4, embedding_dim=4))
    images = (uniform(24, 3, 8, 8, key="online") * 100).to(torch.uint8)
    images[:8] += 120
    bank_labels = torch.tensor([1] * 8 + [0] * 8)
    found = monitor.evaluate(
        encoder,
        images[:16],
        bank_labels,
        images[16:],
        torch.full((8,), 2),
        classes=3,
        eps="8/255",
        device=torch.device("cpu"),
        stop=lambda: 0,
        each=lambda *_: None,
        where=HERE,
    )
    assert found is not None
    assert (found.n, found.knn, found.clean, found.robust) == (8, 0, 0, 0)


def test_the_online_head_is_fitted_to_standardised_features_and_asks_all_the_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[object, ...]] = []
    asked: list[int] = []

    def stop() -> int:
        asked.append(0)
        return 0

    def asks(each: Callable[[int, int], None]) -> None:
        before = len(asked)
        each(1, 2)
        assert len(asked) == before + 1

    def features(encoder: Any, images: Tensor, *, device: torch.device, each: Any) -> Tensor:
        asks(each)
        seen.append(("features", len(images), device))
        found: Tensor = encoder.eval().features(images.float() / 255)
        return found

    def head(dim: int, classes: int, *, seed: int, device: torch.device, statistics: Tensor) -> LinearHead:
        torch.testing.assert_close(statistics, Brightness().eval().features(bank.float() / 255))
        seen.append(("head", dim, classes, seed, device))
        return new_head(dim, classes, seed=seed, device=device, statistics=statistics)

    def fit(head: LinearHead, features: Tensor, labels: Tensor, *, l2: float, iterations: int, each: Any) -> float:
        asks(each)
        seen.append(("fit", len(features), l2, iterations))
        return fit_converged(head, features, labels, l2=l2, iterations=iterations)

    monkeypatch.setattr(monitor, "extract_features", features)
    monkeypatch.setattr(monitor, "new_head", head)
    monkeypatch.setattr(monitor, "fit_converged", fit)
    bank, held_out, cpu = even([50, 100, 150, 205]), even([40, 120, 210]), torch.device("cpu")
    found = monitor.evaluate(
        cast("Encoder", Brightness()),
        bank,
        torch.tensor([0, 0, 1, 1]),
        held_out,
        torch.tensor([0, 0, 1]),
        classes=2,
        eps="1/255",
        device=cpu,
        stop=stop,
        each=lambda *_: None,
        where=HERE,
    )
    assert found is not None
    assert (found.n, found.clean, found.robust, found.eps) == (3, 3, 3, "1/255")
    assert seen == [("features", 4, cpu), ("features", 3, cpu), ("head", 2, 2, 0, cpu), ("fit", 4, 1e-4, 100)]


def test_online_evaluation_ends_when_it_is_asked_to() -> None:
    encoder = Encoder(Model(width=2, hidden_dim=4, embedding_dim=4))
    images = (uniform(24, 3, 8, 8, key="online") * 100).to(torch.uint8)
    labels = torch.arange(24) % 2
    cpu, asked = torch.device("cpu"), iter([0, 0, 15])
    bank, held_out = (images[:16], labels[:16]), (images[16:], labels[16:])
    found = monitor.evaluate(
        encoder,
        *bank,
        *held_out,
        classes=2,
        eps="8/255",
        device=cpu,
        stop=lambda: next(asked),
        each=lambda *_: None,
        where=HERE,
    )
    assert found is None
    assert encoder.training
