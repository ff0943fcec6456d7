"""Predictors that cheat: each must raise its flag, and an honest one none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stages import pgd
from torch import Tensor, nn
from torch.nn.functional import batch_norm, dropout, one_hot

from cfamc_cli.engine.attacks.audit import AuditSettings
from cfamc_cli.engine.attacks.autoattack import Plan
from cfamc_cli.engine.attacks.search import Predict
from cfamc_cli.engine.attacks.verify import Predictor
from cfamc_cli.engine.robust import Evaluation, evaluate
from cfamc_cli.engine.sink import NullSink

CLASSES, SIDE, EPS = 4, 8, 16 / 255


def honest() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small trained net, and images of four classes that it tells apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand((CLASSES, 3, SIDE, SIDE), generator=generator) * 0.4 + 0.3
    y = torch.arange(160) % CLASSES
    noise = torch.randn((160, 3, SIDE, SIDE), generator=generator)
    x = (centres[y] + 0.1 * noise).clamp(0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, CLASSES)
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    net.eval()
    net.zero_grad()
    return net, x, y


NET, X, Y = honest()


class ZeroGradient(torch.autograd.Function):
    """The identity whose gradient is zero."""

    @staticmethod
    def forward(ctx: object, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)


def zero_gradient(x: Tensor) -> Tensor:
    out: Tensor = NET(ZeroGradient.apply(x))
    return out


def quantiser(x: Tensor) -> Tensor:
    return NET((x * 16).round() / 16)  # type: ignore[no-any-return]


def detached(x: Tensor) -> Tensor:
    return NET(x.detach())  # type: ignore[no-any-return]


def noisy(x: Tensor) -> Tensor:
    return NET(x + 0.1 * torch.randn_like(x))  # type: ignore[no-any-return]


def dropping(x: Tensor) -> Tensor:
    return NET(dropout(x, 0.3, training=True))  # type: ignore[no-any-return]


def probabilities(x: Tensor) -> Tensor:
    return NET(x).softmax(1)  # type: ignore[no-any-return]


def loud(x: Tensor) -> Tensor:
    return NET(x) * 1e4  # type: ignore[no-any-return]


def decided(x: Tensor) -> Tensor:
    return one_hot(NET(x).argmax(1), CLASSES).float()


def not_a_number(x: Tensor) -> Tensor:
    z: Tensor = NET(x)
    return torch.where(x[:, 0, 0, :1] > 0.5, torch.nan, z)


def batch_statistics(x: Tensor) -> Tensor:
    norm = NET[1]
    assert isinstance(norm, nn.BatchNorm2d)
    h = batch_norm(NET[0](x), None, None, norm.weight, norm.bias, training=True)
    return NET[2:](h)  # type: ignore[no-any-return]


def gradient_at_test_time(x: Tensor) -> Tensor:
    with torch.enable_grad():
        moved = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(NET(moved).amax(1).sum(), moved)
    return NET((x + 0.02 * grad.sign()).clamp(0, 1))  # type: ignore[no-any-return]


def random_crops(x: Tensor) -> Tensor:
    shift = [int(s) for s in torch.randint(-2, 3, (2,))]
    return NET(x.roll(shift, (2, 3)))  # type: ignore[no-any-return]


def bonus_in_a_crowd(x: Tensor) -> Tensor:
    """Right with many others in the batch, whatever was done to the image; honest on clean images and alone."""
    z: Tensor = NET(x)
    distance, nearest = (x.flatten(1)[:, None] - X.flatten(1)[None]).abs().amax(2).min(1)
    moved = (distance > 0) & (len(x) >= 20)
    return z + 6 * moved[:, None] * one_hot(Y[nearest], CLASSES)


ZOO: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (zero_gradient, "zero-gradient"),
    (quantiser, "zero-gradient"),
    (detached, "zero-gradient"),
    (noisy, "random"),
    (dropping, "random"),
    (probabilities, "probabilities"),
    (loud, "logit-scale"),
    (decided, "zero-gradient"),
    (not_a_number, "not-finite"),
    (batch_statistics, "batch"),
    (gradient_at_test_time, "test-time-gradient"),
    (random_crops, "random"),
    (bonus_in_a_crowd, "batch"),
]


def evaluated(predict: Predict, *, audit: AuditSettings | None) -> Evaluation:
    return evaluate(
        Predictor(predict, predict, (NET,)),
        X[:80],
        Y[:80],
        plan=Plan((pgd(EPS, step_size=EPS / 2, steps=8),)),
        seed=0,
        block_size=40,
        device=torch.device("cpu"),
        finished=(),
        commit=lambda outcome, examples: None,
        audit=audit,
        label="attack",
        sink=NullSink(),
    )


def failed(evaluation: Evaluation) -> set[str]:
    return {check.name for check in evaluation.checks if check.verdict == "failed"}


def test_an_honest_predictor_raises_no_flag() -> None:
    evaluation = evaluated(NET, audit=AuditSettings(samples=30, queries=100))
    assert failed(evaluation) == set(), [c for c in evaluation.checks if c.verdict == "failed"]
    assert 0 < sum(evaluation.robust) < sum(evaluation.clean)


@pytest.mark.parametrize(("predict", "flag"), ZOO, ids=[predict.__name__ for predict, _ in ZOO])
def test_a_cheat_raises_its_flag(predict: Predict, flag: str) -> None:
    evaluation = evaluated(predict, audit=None)
    assert flag in failed(evaluation)


def test_a_module_in_training_mode_is_named_and_left_so() -> None:
    NET.train()
    try:
        evaluation = evaluated(NET, audit=None)
        assert all(m.training for m in NET.modules())
    finally:
        NET.eval()
    assert failed(evaluation) == {"training-mode"}
    assert evaluation.robust == evaluated(NET, audit=None).robust


def test_masked_gradients_fail_the_full_audit_too() -> None:
    evaluation = evaluated(quantiser, audit=AuditSettings(samples=30, queries=300))
    assert {"zero-gradient", "black-box"} <= failed(evaluation)


def test_samples_without_a_finite_prediction_are_not_robust() -> None:
    evaluation = evaluated(not_a_number, audit=None)
    nan = (X[:80, 0, 0, 0] > 0.5).tolist()
    assert not any(robust and bad for robust, bad in zip(evaluation.robust, nan, strict=True))


def test_samples_that_are_right_only_in_a_crowd_are_not_robust() -> None:
    evaluation = evaluated(bonus_in_a_crowd, audit=None)
    assert sum(evaluation.clean) == 80
    assert sum(evaluation.robust) <= sum(evaluated(NET, audit=None).robust) < 40


def test_a_confident_head_is_seen_to_lose_along_its_gradient() -> None:
    def confident(x: Tensor) -> Tensor:
        return NET(x) * 8  # type: ignore[no-any-return]

    checks = {check.name: check for check in evaluated(confident, audit=AuditSettings(samples=30, queries=20)).checks}
    z = confident(X[:80])
    margin = z.topk(2, dim=1).values
    assert ((margin[:, 0] - margin[:, 1]) > 17).float().mean() > 0.05  # where float32's cross-entropy is 0
    assert checks["no-ascent"].verdict == "passed", checks["no-ascent"]


def test_every_check_has_a_figure_and_a_verdict() -> None:
    checks = evaluated(NET, audit=AuditSettings(samples=10, queries=20)).checks
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert isinstance(check.figure, float | int)
        assert check.verdict in ("passed", "failed", "skipped")
        assert check.text
