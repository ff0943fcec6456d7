"""LARS against steps computed by hand, SGD and the official wrapper; AdamW by hand; schedules against torch's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_inputs import signed
from on_meta import META, watched
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.optim import AdamWOptimizer, LarsOptimizer, build_optimizer, learning_rate
from cfamc_cli.recipe.schema import AdamW, Cosine, Lars, Model, OfficialCosine

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())
SHAPES = {
    "matrix": (3, 4),
    "conv": (2, 3, 2, 2),
    "vector": (5,),
    "zero weight": (2, 3),
    "zero gradient": (2, 2),
    "tiny gradient": (3, 3),
}
COSINE = Cosine(name="cosine")


def parameter(*values: float, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64).view(shape))


def test_a_step_computed_by_hand() -> None:
    weight = parameter(3.0, 4.0, shape=(1, 2))  # norm 5
    weight.grad = torch.tensor([[0.0, 2.0]], dtype=torch.float64)  # norm 2
    settings = Lars(lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1, trust_coefficient=0.01, clip=True)
    optimizer = LarsOptimizer([weight], settings)
    assert float(optimizer.step(lr=0.5)) == 2
    ratio = 0.01 * 5 / (2 + 0.1 * 5 + 1e-8) / 0.5  # 0.04
    gradient = [ratio * 0.3, ratio * 2.4]
    expected = [3 - 0.5 * 1.9 * gradient[0], 4 - 0.5 * 1.9 * gradient[1]]  # Nesterov's first step: 1 + momentum
    assert weight.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert optimizer.momentum[0].flatten().tolist() == pytest.approx(gradient, rel=1e-12)

    before = weight.flatten().tolist()
    weight.grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    optimizer.step(lr=0.25)
    norm = math.hypot(*before)
    ratio = 0.01 * norm / (1 + 0.1 * norm + 1e-8) / 0.25
    second = [ratio * (1 + 0.1 * before[0]), ratio * 0.1 * before[1]]
    momentum = [0.9 * old + new for old, new in zip(gradient, second, strict=True)]
    expected = [w - 0.25 * (g + 0.9 * m) for w, g, m in zip(before, second, momentum, strict=True)]
    assert weight.flatten().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("clip", [True, False])
def test_official_weights_after_each_step(clip: bool) -> None:
    entry = GOLDEN["lars"]["clip" if clip else "no clip"]
    parameters = {name: nn.Parameter(signed(*shape, key=f"w {name}")) for name, shape in SHAPES.items()}
    parameters["zero weight"].data.zero_()
    optimizer = LarsOptimizer(list(parameters.values()), Lars(clip=clip))
    factors = {"zero gradient": 0.0, "tiny gradient": 1e-3}
    for step, lr in enumerate(entry["lrs"]):
        for name, weight in parameters.items():
            weight.grad = signed(*weight.shape, key=f"g {name} {step}") * factors.get(name, 1.0)
        optimizer.step(lr=lr)
        for name, weight in parameters.items():
            expected = torch.tensor(entry["weights_after_step"][step][name], dtype=torch.float64)
            torch.testing.assert_close(weight.detach().flatten(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_equals_sgd_where_the_ratio_is_clipped_to_one(nesterov: bool, momentum: float) -> None:
    settings = Lars(momentum=momentum, nesterov=nesterov, weight_decay=1e-2, trust_coefficient=1e6)
    ours, theirs = ([nn.Parameter(signed(3, 4, key="w")), nn.Parameter(signed(2, 2, key="v"))] for _ in range(2))
    optimizer = LarsOptimizer(ours, settings)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=1e-2)
    for step in range(5):
        for weights in (ours, theirs):
            for index, weight in enumerate(weights):
                weight.grad = signed(*weight.shape, key=f"g {step} {index}")
        optimizer.step(lr=0.1)
        reference.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_one_dimensional_parameters_get_plain_momentum() -> None:
    ours, theirs = nn.Parameter(signed(6, key="w")), nn.Parameter(signed(6, key="w"))
    optimizer = LarsOptimizer([ours], Lars(weight_decay=0.5, trust_coefficient=1e-3))
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True)
    for step in range(4):
        ours.grad, theirs.grad = signed(6, key=f"g {step}"), signed(6, key=f"g {step}")
        optimizer.step(lr=0.1)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_zero_weight_takes_the_raw_gradient() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LarsOptimizer([weight], Lars(momentum=0.0, nesterov=False)).step(lr=0.1)
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.1))


@pytest.mark.parametrize("gradient", [torch.zeros(2, 2), None])
def test_a_zero_or_missing_gradient_moves_nothing(gradient: Tensor | None) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = gradient
    LarsOptimizer([weight], Lars(weight_decay=0.5)).step(lr=0.1)
    assert torch.equal(weight.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("clip", [True, False])
def test_a_learning_rate_of_zero_moves_nothing_and_poisons_nothing(clip: bool) -> None:
    weights = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(3))]
    before = [weight.detach().clone() for weight in weights]
    optimizer = LarsOptimizer(weights, Lars(clip=clip))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step(lr=0.0)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    assert all(torch.isfinite(buffer).all() for buffer in optimizer.momentum)


def test_gradients_are_read_and_not_changed() -> None:
    weight = nn.Parameter(signed(3, 3, key="w"))
    weight.grad = signed(3, 3, key="g")
    optimizer = LarsOptimizer([weight], Lars())
    optimizer.step(lr=0.1)
    assert torch.equal(weight.grad, signed(3, 3, key="g"))
    optimizer.zero_grad()
    assert weight.grad is None
    assert float(optimizer.step(lr=0.0)) == 0


class Kernels(TorchDispatchMode):
    """Notes what is computed; lists of tensors have to be such that CUDA takes them in one launch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.__name__)
        if func.__name__.startswith("_foreach"):
            lists = [arg for arg in args if isinstance(arg, list) and isinstance(arg[0], Tensor)]
            for tensors in zip(*lists, strict=True):
                strides = [[step for n, step in zip(t.shape, t.stride(), strict=True) if n > 1] for t in tensors]
                assert all(step == strides[0] for step in strides)
                assert len({(tensor.dtype, tensor.shape) for tensor in tensors}) == 1, (
                    f"{func}: one launch a tensor, not one for all"
                )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [Lars(), AdamW(name="adamw")])
def test_a_step_is_few_kernels_and_waits_for_none(settings: Lars | AdamW) -> None:
    encoder = Encoder(Model()).to(META).to(memory_format=torch.channels_last)
    torch.autograd.backward(encoder(torch.empty(4, 3, 8, 8, device=META)).sum())
    optimizer = build_optimizer(list(encoder.parameters()), settings)
    with watched() as asked, Kernels() as seen:
        optimizer.step(lr=0.1)
    assert len(seen.names) <= 25  # CUDA makes 26 launches of them for ResNet-18: a norm of many tensors is several
    assert not asked.copies


# AdamW


def adamw(w: float, gradients: list[float], lrs: list[float], settings: AdamW, *, decay: float) -> list[float]:
    """A weight after each step, as algorithm 2 of arXiv:1711.05101 has it: no mean or square is kept, but all g."""
    found = []
    for n in range(1, len(gradients) + 1):
        weighed = [[(1 - b) * b ** (n - i) for i in range(1, n + 1)] for b in (settings.beta1, settings.beta2)]
        mean = sum(share * g for share, g in zip(weighed[0], gradients, strict=False)) / sum(weighed[0])
        square = sum(share * g * g for share, g in zip(weighed[1], gradients, strict=False)) / sum(weighed[1])
        w = w - lrs[n - 1] * (mean / (math.sqrt(square) + 1e-8) + decay * w)
        found.append(w)
    return found


def test_adamw_is_its_publication_weight_by_weight() -> None:
    settings = AdamW(name="adamw", beta1=0.8, beta2=0.9, weight_decay=0.3)
    conv = nn.Parameter(signed(2, 3, 2, 2, key="conv").to(memory_format=torch.channels_last))
    weights = [conv, nn.Parameter(signed(5, key="bias")), nn.Parameter(signed(1, 4, key="token"))]
    began = [weight.detach().clone() for weight in weights]
    gradients = [[signed(*w.shape, key=f"g {i} {step}") for step in range(4)] for i, w in enumerate(weights)]
    gradients[0][2].zero_()
    optimizer, lrs = AdamWOptimizer(weights, settings), [0.1, 0.05, 0.2, 0.0]
    for step, lr in enumerate(lrs):
        for weight, own in zip(weights, gradients, strict=True):
            weight.grad = own[step].clone(memory_format=torch.preserve_format)
        norm = optimizer.step(lr=lr)
        assert float(norm) == pytest.approx(math.hypot(*(float(own[step].norm()) for own in gradients)))
        for weight, start, own in zip(weights, began, gradients, strict=True):
            decay = 0.3 if weight.dim() > 1 else 0.0
            for place in range(weight.numel()):
                values = [float(g.flatten()[place]) for g in own[: step + 1]]
                expected = adamw(float(start.flatten()[place]), values, lrs, settings, decay=decay)[-1]
                assert float(weight.detach().flatten()[place]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert weight.grad is not None
            assert torch.equal(weight.grad, own[step])


def test_a_missing_gradient_counts_as_zero_for_adamw() -> None:
    weight, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    other.grad = torch.ones(2, 2)
    AdamWOptimizer([weight, other], AdamW(name="adamw", weight_decay=0.5)).step(lr=0.1)
    assert torch.equal(weight.detach(), torch.full((2, 2), 0.95))
    torch.testing.assert_close(other.detach(), torch.full((2, 2), 0.85))


# Schedules


def official(step: int, *, updates: int, replays: int, base: float = 0.3) -> float:
    return learning_rate(
        step, base=base, schedule=OfficialCosine(name="official-cosine"), updates=updates, replays=replays
    )


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize(("updates", "replays"), [(24, 1), (24, 3), (40, 5), (24, 2), (7, 1)])
def test_official_cosine_is_torchs_scheduler_stepped_for_every_replay(updates: int, replays: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=updates // replays)
    for step in range(updates):
        assert official(step, updates=updates, replays=replays) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        scheduler.step()


def test_official_cosine_rises_again_and_ours_does_not() -> None:
    rates = [official(step, updates=30, replays=3) for step in range(31)]
    assert rates[10] == pytest.approx(0)
    assert rates[20] == pytest.approx(0.3)
    assert rates[30] == pytest.approx(0)
    ours = [learning_rate(step, base=0.3, schedule=COSINE, updates=30, replays=3) for step in range(31)]
    assert ours == sorted(ours, reverse=True)
    assert [ours[0], ours[15], ours[30]] == pytest.approx([0.3, 0.15, 0])


def test_without_replays_both_cosines_are_one() -> None:
    for step in range(20):
        ours = learning_rate(step, base=0.3, schedule=COSINE, updates=20)
        assert official(step, updates=20, replays=1) == pytest.approx(ours)


def test_warmup_rises_linearly_to_the_top_of_the_cosine() -> None:
    schedule = Cosine(name="cosine", warmup=4)
    rates = [learning_rate(step, base=0.4, schedule=schedule, updates=12) for step in range(12)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[8] == pytest.approx(0.2)


def test_a_cosine_may_end_above_zero() -> None:
    schedule = Cosine(name="cosine", warmup=2, end=0.25)
    rates = [learning_rate(step, base=0.4, schedule=schedule, updates=10) for step in range(10)]
    last = 0.1 + 0.3 * (1 + math.cos(math.pi * 7 / 8)) / 2
    assert [rates[0], rates[1], rates[2], rates[6], rates[9]] == pytest.approx([0.2, 0.4, 0.4, 0.1 + 0.3 / 2, last])
    assert learning_rate(10, base=0.4, schedule=schedule, updates=10) == pytest.approx(0.1)


@pytest.mark.parametrize("base", [0.3, 0.1, 1e-4])
def test_an_end_of_zero_changes_no_bit_of_a_rate(base: float) -> None:
    for step in range(97):
        before = base * 0.5 * (1 + math.cos(math.pi * step / 97))
        assert learning_rate(step, base=base, schedule=COSINE, updates=97) == before


@pytest.mark.parametrize("warmup", [0, 1, 5, 10])
def test_no_schedule_divides_by_zero(warmup: int) -> None:
    schedule = Cosine(name="cosine", warmup=warmup)
    assert all(0 <= learning_rate(step, base=1.0, schedule=schedule, updates=5) <= 1 for step in range(5))
    assert official(0, updates=1, replays=1) == pytest.approx(0.3)
