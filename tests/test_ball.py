"""Projection, ascent and starts of the perturbation ball."""

from __future__ import annotations

import pytest
import torch
from fixed_inputs import signed, uniform

from cfamc_cli.engine import ball
from cfamc_cli.recipe.schema import Norm

NORMS: tuple[Norm, Norm] = ("linf", "l2")
ULP = 6e-8  # of float32 below 1: x + delta rounds


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.0, 1e-4, 8 / 255, 0.5, 1.0])
def test_projections_lie_in_ball_and_box(norm: Norm, eps: float) -> None:
    x, delta = uniform(50, 3, 4, 4, key="x").float(), 3 * signed(50, 3, 4, 4, key="delta").float()
    x[0], x[1] = 0.0, 1.0
    found = ball.project(x, delta, eps=eps, norm=norm)
    assert float(ball.norms(found.double(), norm=norm).max()) <= eps + 50 * ULP
    assert float((x + found).min()) >= 0
    assert float((x + found).max()) <= 1
    torch.testing.assert_close(ball.project(x, found, eps=eps, norm=norm), found, rtol=0, atol=2 * ULP)


def test_the_linf_projection_is_the_nearest_point() -> None:
    x, delta = uniform(20, 10, key="x"), signed(20, 10, key="delta")
    found = ball.project(x, delta, eps=0.3)
    candidates = torch.linspace(-0.3, 0.3, 2001, dtype=torch.float64)
    for sample, wanted, got in zip(x.flatten(), delta.flatten(), found.flatten(), strict=True):
        allowed = candidates[(sample + candidates >= 0) & (sample + candidates <= 1)]
        assert abs(got - wanted) <= (allowed - wanted).abs().min() + 1e-12


def test_what_lies_inside_is_not_moved() -> None:
    x, delta = 0.4 + 0.2 * uniform(9, 6, key="x"), 0.01 * signed(9, 6, key="delta")
    for norm in NORMS:
        torch.testing.assert_close(ball.project(x, delta, eps=0.1, norm=norm), delta, rtol=1e-12, atol=1e-15)


def test_ascent_takes_a_step_of_the_length_asked_for() -> None:
    x, grad = torch.full((5, 8), 0.5, dtype=torch.float64), signed(5, 8, key="grad")
    zero = torch.zeros_like(x)
    torch.testing.assert_close(ball.ascend(x, zero, grad, eps=1, step_size=0.1), 0.1 * grad.sign())
    step = ball.ascend(x, zero, grad, eps=1, step_size=0.1, norm="l2")
    torch.testing.assert_close(step, 0.1 * grad / grad.norm(dim=1, keepdim=True))
    torch.testing.assert_close(ball.ascend(x, zero, 1e-6 * grad, eps=1, step_size=0.1, norm="l2"), step)
    cut = ball.ascend(x, zero, grad, eps=0.05, step_size=0.1, norm="l2")
    torch.testing.assert_close(cut, step / 2)


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_step(norm: Norm) -> None:
    x = torch.full((3, 4), 0.5)
    assert not ball.ascend(x, torch.zeros_like(x), torch.zeros_like(x), eps=0.1, step_size=0.1, norm=norm).any()


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball(norm: Norm) -> None:
    x = torch.full((4000, 2), 0.5, dtype=torch.float64)
    delta = ball.random_start(x, eps=0.2, generator=torch.Generator().manual_seed(0), norm=norm)
    again = ball.random_start(x, eps=0.2, generator=torch.Generator().manual_seed(0), norm=norm)
    assert torch.equal(delta, again)
    size = ball.norms(delta, norm=norm)
    assert float(size.max()) <= 0.2 + 1e-9
    # uniform in the plane: half the radius holds a quarter of the points
    assert float((size < 0.1).double().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(delta.mean(0), torch.zeros(2, dtype=torch.float64), atol=0.01, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_cut_to_the_box(norm: Norm) -> None:
    x = torch.tensor([[0.0] * 6, [1.0] * 6])
    moved = x + ball.random_start(x, eps=0.3, generator=torch.Generator().manual_seed(0), norm=norm)
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
