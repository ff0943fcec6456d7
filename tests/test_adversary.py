"""What moves the pixels in training: ball and box, what is carried, and what is left untouched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fixed_inputs import fill, signed, uniform
from torch import Tensor

from cfamc_cli.engine.adversary import Adversary, Groups, ascend_loss, build_adversary
from cfamc_cli.engine.encoder import Encoder, frozen_statistics
from cfamc_cli.engine.objectives import nt_xent
from cfamc_cli.recipe.schema import FreeAdversary, Model, NoAdversary, PgdAdversary

EPS = 8 / 255
ULP = 1.2e-7
TARGET = [signed(1, 4, 3, 6, 6, key=f"target {index}").float() for index in range(2)]


def two_groups(batch: int) -> Groups:
    """Two groups of one crop of four images, with black, white and all between."""
    groups = [uniform(1, 4, 3, 6, 6, key=f"adversary {batch} {index}").float() * 1.4 - 0.2 for index in range(2)]
    return [group.clamp(0, 1) for group in groups]


def linear_loss(groups: Sequence[Tensor]) -> Tensor:
    """A loss whose ascent direction is the sign of TARGET."""
    return torch.stack([(group * target).sum() for group, target in zip(groups, TARGET, strict=True)]).sum()


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(2)]


def in_ball_and_box(clean: Groups, moved: Groups) -> None:
    for x, y in zip(clean, moved, strict=True):
        assert float((x.double() - y.double()).abs().max()) <= EPS + ULP
        assert float(y.min()) >= 0
        assert float(y.max()) <= 1


def replay(adversary: Adversary) -> Groups:
    moved = adversary.perturb(lambda groups: linear_loss([*adversary.spared, *groups]))
    moved = [*adversary.spared, *moved]
    loss = linear_loss(moved)
    if loss.requires_grad:
        torch.autograd.backward(loss)
    adversary.ascend()
    return [group.detach() for group in moved]


SETTINGS: dict[str, NoAdversary | PgdAdversary | FreeAdversary] = {
    "none": NoAdversary(name="none"),
    "pgd": PgdAdversary(name="pgd"),
    "pgd from random": PgdAdversary(name="pgd", start="random", step_size="10/255", steps=1),
    "pgd of the second view": PgdAdversary(name="pgd", views="second"),
    "free": FreeAdversary(name="free"),
    "free from random": FreeAdversary(name="free", start="random"),
    "free of the second view": FreeAdversary(name="free", views="second"),
    "free with large steps": FreeAdversary(name="free", step_size="0.5"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_replay_stays_in_ball_and_box(name: str) -> None:
    adversary = build_adversary(SETTINGS[name])
    for batch in range(4):
        clean = two_groups(batch)
        adversary.begin(clean, generators())
        for _ in range(4):
            moved = replay(adversary)
            in_ball_and_box(clean, moved)
            assert all(torch.isfinite(part).all() for part in adversary.delta)
            assert all(float(part.abs().max()) <= EPS + ULP for part in adversary.delta)


@pytest.mark.parametrize("kind", ["pgd", "free"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_the_second_view_alone_is_moved(kind: str, start: str) -> None:
    settings: dict[str, Any] = {"start": start, "views": "second"}
    adversary = build_adversary(
        PgdAdversary(name="pgd", **settings) if kind == "pgd" else FreeAdversary(name="free", **settings)
    )
    for batch in range(2):
        clean = two_groups(batch)
        adversary.begin(clean, generators())
        for place in range(3):
            moved = replay(adversary)
            assert torch.equal(moved[0], clean[0])
            assert torch.equal(moved[1], clean[1]) == (kind == "free" and start == "zero" and batch == place == 0)
            assert len(adversary.delta) == 1


def test_free_steps_once_a_replay_and_carries_delta_by_position() -> None:
    adversary = build_adversary(FreeAdversary(name="free", step_size="0.01"))
    expected = [torch.zeros_like(group) for group in two_groups(0)]
    for batch in range(3):
        clean = two_groups(batch)
        adversary.begin(clean, generators())
        # what was carried is cut to the new images' box before its first use
        expected = [(x + d.clamp(-EPS, EPS)).clamp(0, 1) - x for x, d in zip(clean, expected, strict=True)]
        for _ in range(3):
            moved = replay(adversary)
            for x, y, delta in zip(clean, moved, expected, strict=True):
                torch.testing.assert_close(y, x + delta, rtol=0, atol=ULP)
            expected = [
                (x + (d + 0.01 * target.sign()).clamp(-EPS, EPS)).clamp(0, 1) - x
                for x, d, target in zip(clean, expected, TARGET, strict=True)
            ]
            for got, wanted in zip(adversary.delta, expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=ULP)
    assert max(float(delta.abs().max()) for delta in expected) == pytest.approx(EPS, abs=ULP)


def test_a_carried_delta_leaves_black_and_white_images_alone_where_it_points_outwards() -> None:
    adversary = build_adversary(FreeAdversary(name="free"))
    adversary.delta = [torch.full_like(group, EPS) for group in two_groups(0)]
    white = [torch.ones_like(group) for group in two_groups(0)]
    adversary.begin(white, generators())
    assert all(torch.equal(moved, torch.ones_like(moved)) for moved in adversary.perturb(linear_loss))


def test_free_goes_on_from_a_saved_delta() -> None:
    straight, cut = (build_adversary(FreeAdversary(name="free")) for _ in range(2))
    clean = two_groups(0)
    straight.begin(clean, generators())
    replay(straight)
    cut.delta = [delta.clone() for delta in straight.delta]
    clean = two_groups(1)
    for adversary in (straight, cut):
        adversary.begin(clean, generators())
    for moved, other in zip(replay(straight), replay(cut), strict=True):
        assert torch.equal(moved, other)


def test_pgd_climbs_a_linear_loss_to_its_corner() -> None:
    clean = [torch.full_like(group, 0.5) for group in two_groups(0)]
    adversary = build_adversary(PgdAdversary(name="pgd", steps=5))
    adversary.begin(clean, generators())
    for x, y, target in zip(clean, replay(adversary), TARGET, strict=True):
        torch.testing.assert_close(y, x + EPS * target.sign(), rtol=0, atol=ULP)
    fewer = build_adversary(PgdAdversary(name="pgd", steps=2))
    fewer.begin(clean, generators())
    replay(fewer)
    assert all(float(delta.abs().max()) == pytest.approx(0.02, abs=ULP) for delta in fewer.delta)


def test_pgd_starts_afresh_with_every_batch() -> None:
    adversary = build_adversary(PgdAdversary(name="pgd", start="random", steps=1))
    seen = []
    for batch in (0, 1, 0):
        adversary.begin(two_groups(batch), generators())
        seen.append(replay(adversary))
    assert all(torch.equal(first, third) for first, third in zip(seen[0], seen[2], strict=True))


def test_pgd_leaves_gradients_statistics_and_crops_alone() -> None:
    net = Encoder(Model(width=4, hidden_dim=16, embedding_dim=8))
    fill(net.state_dict())
    net.train()
    clean = [group.clone() for group in two_groups(0)]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    random_state = torch.get_rng_state()

    def loss_of(groups: Sequence[Tensor]) -> Tensor:
        with frozen_statistics(net):
            return nt_xent(net.embed(groups), temperature=0.5)

    adversary = build_adversary(PgdAdversary(name="pgd", step_size="0.0001"))  # where the loss is nearly linear
    adversary.begin(clean, generators())
    moved = adversary.perturb(loss_of)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert all(torch.equal(x, y) for x, y in zip(clean, two_groups(0), strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(group.requires_grad for group in moved)
    assert float(loss_of(moved).detach()) > float(loss_of(clean).detach())


def test_ascending_no_steps_returns_the_start() -> None:
    clean = two_groups(0)
    start = [torch.full_like(group, 0.01) for group in clean]
    found = ascend_loss(linear_loss, clean, start, eps=EPS, step_size=0.01, steps=0)
    assert all(torch.equal(x, y) for x, y in zip(found, start, strict=True))


def test_a_random_start_is_drawn_from_the_ball_by_each_groups_own_generator() -> None:
    adversary = build_adversary(PgdAdversary(name="pgd", start="random", step_size="0", steps=1))
    clean = two_groups(0)
    adversary.begin(clean, generators())
    moved = adversary.perturb(linear_loss)
    for x, y, generator in zip(clean, moved, generators(), strict=True):
        drawn = (2 * torch.rand(4, 3, 6, 6, generator=generator) - 1) * EPS
        torch.testing.assert_close(y, (x + drawn).clamp(0, 1), rtol=0, atol=2 * ULP)


def test_as_many_perturbations_as_groups() -> None:
    clean, one = two_groups(0), [torch.zeros_like(two_groups(0)[0])]
    for start in (one, [*one, *one, *one]):
        with pytest.raises(ValueError, match="zip"):
            ascend_loss(lambda moved: moved[0].sum(), clean, start, eps=EPS, step_size=0.01, steps=1)
        free = build_adversary(FreeAdversary(name="free"))
        free.delta = start
        with pytest.raises(ValueError, match="zip"):
            free.begin(clean, generators())
    pgd = build_adversary(PgdAdversary(name="pgd", start="random"))
    pgd.begin(clean, generators()[:1])
    with pytest.raises(ValueError, match="zip"):
        pgd.perturb(linear_loss)
