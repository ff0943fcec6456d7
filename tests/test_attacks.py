"""Attacks against the closed form on a linear model, and the laws that every attack keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import by_hand
import pytest
import torch
from on_meta import META, watched
from stages import apgd, embedding, ensemble, fab, fgsm, pgd, square, targeted
from torch import Tensor, nn

from cfamc_cli.engine.attacks import apgd as apgd_module
from cfamc_cli.engine.attacks import fab as fab_module
from cfamc_cli.engine.attacks import pgd as pgd_module
from cfamc_cli.engine.attacks.apgd import checkpoints
from cfamc_cli.engine.attacks.fab import _crossed, to_hyperplane
from cfamc_cli.engine.attacks.objectives import Loss, dlr, label_margin, ranked_targets, targeted_dlr
from cfamc_cli.engine.attacks.plan import passes, plan, run_stage, stage_name
from cfamc_cli.engine.attacks.search import Region, Roster, climb, fooled, logits_at
from cfamc_cli.engine.attacks.square import _bump, _Hunt, _move_mass, _pyramid, _square, share_of_area
from cfamc_cli.engine.ball import norms, random_start
from cfamc_cli.engine.evaluation.pictures import loss_by_step
from cfamc_cli.engine.evaluation.verify import in_region
from cfamc_cli.recipe.schema import AutoAttackAttack, FabAttack, Norm, SquareAttack, Stage, TargetedApgdAttack, number

CLASSES, SHAPE = 5, (3, 8, 8)
NORMS: tuple[Norm, Norm] = ("linf", "l2")


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear:
    """Linear logits, whose robustness is known in closed form as long as the box is out of reach."""

    def __init__(self, classes: int = CLASSES, n: int = 100) -> None:
        g = generator(0)
        self.w: Tensor = torch.randn(classes, math.prod(SHAPE), generator=g) / 10
        self.x = torch.rand((n, *SHAPE), generator=g) * 0.4 + 0.3
        self.y: Tensor = self(self.x).argmax(1)

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w.T

    def radius(self, norm: Norm) -> Tensor:
        """min over j of (z_y - z_j) / ||w_y - w_j|| in the dual norm: the smallest eps that breaks each sample."""
        z = self(self.x)
        margins = z.gather(1, self.y[:, None]) - z
        gaps = (self.w[self.y][:, None] - self.w).norm(p=1 if norm == "linf" else 2, dim=2)
        smallest: Tensor = (margins / gaps.clamp_min(1e-12)).scatter(1, self.y[:, None], torch.inf).amin(1)
        return smallest

    def broken(self, stage: Stage, seed: int = 1) -> Tensor:
        points = run_stage(stage, self, self.x, self.y, embed=None, generator=generator(seed))
        assert in_region(self.x, points, eps=number(stage.eps), norm=stage.norm).all()
        return fooled(self(points), self.y)


LINEAR = Linear()


def stages(eps: float, norm: Norm) -> list[Stage]:
    return [
        fgsm(eps, norm),
        pgd(eps, norm, step_size=eps / 4, steps=10),
        pgd(eps, norm, step_size=eps / 4, steps=10, restarts=2, start="zero"),
        apgd(eps, norm, steps=20),
        apgd(eps, norm, loss="apgd-dlr", steps=30, restarts=2),
        targeted(eps, norm, steps=20, targets=4),
        fab(eps, norm, steps=20, targets=4),
        square(eps, norm, queries=100),
    ]


@pytest.mark.parametrize("norm", NORMS)
def test_linear_model_is_broken_exactly_beyond_its_radius(norm: Norm) -> None:
    radius = LINEAR.radius(norm)
    eps = float(radius.median()) * 1.01
    clear = (radius / eps - 1).abs() > 0.02
    should = radius < eps
    for stage in stages(eps, norm):
        broken = LINEAR.broken(stage)
        assert not (broken & ~should & clear).any(), stage
        if isinstance(stage, FabAttack | TargetedApgdAttack):
            assert (broken | ~should | ~clear).all(), stage  # each target is a convex problem: no sample is missed
        elif not isinstance(stage, SquareAttack):
            assert (broken & should).sum() >= 0.75 * should.sum(), stage
    if norm == "linf":
        assert (LINEAR.broken(square(eps, norm, queries=1500)) & should).sum() >= 0.8 * should.sum()


@pytest.mark.parametrize("norm", NORMS)
def test_two_classes_leave_nothing_to_choose(norm: Norm) -> None:
    linear = Linear(classes=2)
    radius = linear.radius(norm)
    eps = float(radius.median()) * 1.01
    clear = (radius / eps - 1).abs() > 0.01
    for stage in (
        fgsm(eps, norm),
        pgd(eps, norm, step_size=eps / 2, steps=8),
        *ensemble(eps, norm, steps=20, targets=1, queries=1).stages[:3],
    ):
        assert torch.equal(linear.broken(stage)[clear], (radius < eps)[clear]), stage


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("index", range(8))
def test_eps_zero_is_the_identity(norm: Norm, index: int) -> None:
    stage = stages(1.0, norm)[index]
    still = stage.model_copy(update={"eps": "0"})
    points = run_stage(still, LINEAR, LINEAR.x, LINEAR.y, embed=None, generator=generator())
    assert torch.equal(points, LINEAR.x)


def test_averaged_gradients_go_on_beyond_the_border() -> None:
    linear = Linear(classes=2)
    eps = float(linear.radius("linf").median()) * 1.01
    stage = apgd(eps, steps=30)
    points = run_stage(stage, linear, linear.x, linear.y, embed=None, eot=2, generator=generator())
    direction = torch.autograd.grad(
        nn.functional.cross_entropy(linear(z := linear.x.clone().requires_grad_()), linear.y), z
    )[0].sign()
    corner = (linear.x + eps * direction).clamp(0, 1)
    crossed = linear.radius("linf") < eps  # a draw of noise would undo a point that only just crossed
    reached, best = (
        nn.functional.cross_entropy(linear(p), linear.y, reduction="none")[crossed] for p in (points, corner)
    )
    torch.testing.assert_close(reached, best, rtol=1e-3, atol=1e-4)


def test_misclassified_samples_cost_nothing_and_stay() -> None:
    wrong = (LINEAR.y + 1) % CLASSES
    for stage in stages(0.05, "linf")[2:]:
        points = run_stage(stage, LINEAR, LINEAR.x, wrong, embed=None, generator=generator())
        assert torch.equal(points, LINEAR.x), stage


def curved() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(128, CLASSES)).eval()
    x = torch.rand((24, *SHAPE), generator=generator(5))
    return net, x, logits_at(net, x).argmax(1)


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_restarts_never_help_the_defender(norm: Norm) -> None:
    net, x, y = curved()
    eps = 0.02 if norm == "linf" else 0.15

    def broken(steps: int, restarts: int) -> Tensor:
        stage = pgd(eps, norm, step_size=eps / 4, steps=steps, restarts=restarts)
        return fooled(logits_at(net, run_stage(stage, net, x, y, embed=None, generator=generator())), y)

    few, many, again = broken(3, 1), broken(9, 1), broken(3, 3)
    assert not (few & ~many).any()
    assert not (few & ~again).any()
    assert 0 < few.sum() < len(x)


@pytest.mark.parametrize("norm", NORMS)
def test_a_larger_eps_breaks_more(norm: Norm) -> None:
    net, x, y = curved()
    counts = []
    for eps in (0.0, 0.01, 0.03, 0.1, 1.0):
        radius = eps if norm == "linf" else eps * math.sqrt(x[0].numel())
        stage = apgd(radius, norm, steps=20)
        counts.append(
            int(fooled(logits_at(net, run_stage(stage, net, x, y, embed=None, generator=generator())), y).sum())
        )
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == len(x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("index", range(8))
def test_every_attack_breaks_more_with_a_larger_eps(norm: Norm, index: int) -> None:
    radius = LINEAR.radius(norm)
    counts = [int(LINEAR.broken(stages(float(radius.quantile(q)), norm)[index]).sum()) for q in (0.05, 0.3, 0.6, 0.95)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_and_pgd_go_where_a_linear_model_with_two_classes_sends_them(norm: Norm) -> None:
    linear = Linear(classes=2)
    eps = float(linear.radius(norm).median()) / 2
    across = (linear.w[1 - linear.y] - linear.w[linear.y]).view_as(linear.x)  # from the label to the other class
    unit = across.sign() if norm == "linf" else across / norms(across, norm="l2")[:, None, None, None]
    stays = linear.radius(norm) > 2 * eps  # nobody stops early
    assert stays.sum() > 20
    for stage, length in (
        (fgsm(eps, norm), eps),
        (pgd(eps, norm, step_size=eps / 8, steps=3, start="zero"), eps * 3 / 8),
        (pgd(eps, norm, step_size=eps / 2, steps=5, start="zero"), eps),
    ):
        points = run_stage(stage, linear, linear.x, linear.y, embed=None, generator=generator())
        torch.testing.assert_close(points[stays], (linear.x + length * unit)[stays], atol=2e-6, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_loss_by_step_is_that_of_the_last_iterate(norm: Norm) -> None:
    linear, steps = Linear(classes=2), 6
    eps = float(linear.radius(norm).median()) * 1.2
    step_size = eps / 4
    losses, right = loss_by_step(linear, linear.x, linear.y, eps=eps, norm=norm, step_size=step_size, steps=steps)
    z = linear(linear.x)
    margin = z.gather(1, linear.y[:, None]).squeeze(1) - z.gather(1, 1 - linear.y[:, None]).squeeze(1)
    slope = (linear.w[0] - linear.w[1]).norm(p=1 if norm == "linf" else 2)  # of the margin, for each unit of length
    margins = [margin - min(step * step_size, eps) * slope for step in range(steps + 1)]
    torch.testing.assert_close(torch.tensor(losses), torch.stack([nn.functional.softplus(-m).mean() for m in margins]))
    assert right == pytest.approx([float((m > 0).float().mean()) for m in margins], abs=0.011)
    assert right[0] == 1 > right[-1] + 0.3


@pytest.mark.parametrize("norm", NORMS)
def test_every_attack_leaves_no_trace_and_repeats(norm: Norm) -> None:
    net, x, y = curved()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    caller = torch.get_rng_state()
    x_before = x.clone()
    for stage in [*stages(0.03 if norm == "linf" else 0.3, norm), embedding(0.03, norm)]:
        points = [run_stage(stage, net, x, y, embed=net, generator=generator()) for _ in range(2)]
        assert torch.equal(*points), stage
        assert not points[0].requires_grad
        assert in_region(x, points[0], eps=number(stage.eps), norm=norm).all()
    assert torch.equal(x, x_before)
    assert torch.equal(torch.get_rng_state(), caller)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("norm", NORMS)
def test_embedding_attack_moves_the_embedding_and_needs_no_labels(norm: Norm) -> None:
    net, x, y = curved()
    eps = 0.03 if norm == "linf" else 0.3
    clean = nn.functional.normalize(logits_at(net, x))

    def moved(points: Tensor) -> float:
        return float((nn.functional.normalize(logits_at(net, points)) - clean).norm(dim=1).mean())

    results = []
    for steps in (1, 20):
        stage = embedding(eps, norm, step_size=eps / 5, steps=steps)
        points = run_stage(stage, net, x, y, embed=net, generator=generator())
        assert torch.equal(points, run_stage(stage, net, x, y * 0, embed=net, generator=generator()))
        results.append(moved(points))
    assert results[1] > 1.5 * results[0] > 0
    with pytest.raises(ValueError, match="no embedding"):
        run_stage(embedding(eps, norm), net, x, y, embed=None, generator=generator())


@pytest.mark.parametrize("norm", NORMS)
def test_hyperplane_step_is_the_shortest_in_the_box(norm: Norm) -> None:
    g = generator(2)
    x = torch.rand((20, 1, 4, 5), generator=g)
    x[:, :, 0] = 0  # pixels on the border of the box
    w = torch.randn(x.shape, generator=g)
    w[:, :, 1, 0] = 0
    far = torch.where(w > 0, w * (1 - x), -w * x).flatten(1).sum(1)  # the most that the box allows
    gap = -far * torch.rand(20, generator=g)
    step = to_hyperplane(x, w, gap, norm=norm)
    landed = gap + (w * step).flatten(1).sum(1)
    assert landed.abs().max() < 1e-5
    assert ((x + step) >= -1e-6).all()
    assert ((x + step) <= 1 + 1e-6).all()
    size = norms(step, norm=norm)
    # bisection on the size: the most that a step of that size gains
    low, high = torch.zeros(20), torch.full((20,), 20.0)
    for _ in range(60):
        t = (low + high) / 2
        rate = torch.ones_like(w) if norm == "linf" else w.abs()
        d = torch.minimum(t[:, None, None, None] * rate, torch.where(w > 0, 1 - x, x))
        enough = (w.abs() * d).flatten(1).sum(1) >= -gap
        low, high = torch.where(enough, low, t), torch.where(enough, t, high)
    torch.testing.assert_close(size, norms(d, norm=norm), atol=1e-4, rtol=1e-4)
    corner = to_hyperplane(x, w, -2 * far - 1, norm=norm)
    torch.testing.assert_close((w * corner).flatten(1).sum(1), far)
    back = to_hyperplane(x, w, far * 0.01, norm=norm)
    assert ((w * back).flatten(1).sum(1) < 0).all()


def test_losses_by_hand() -> None:
    z = torch.tensor([[4.0, 1.0, 3.0, 0.0], [0.0, 2.0, 5.0, 1.0]])
    y, target = torch.tensor([0, 1]), torch.tensor([1, 2])
    assert label_margin(z, y).tolist() == [1.0, -3.0]
    torch.testing.assert_close(dlr(z, y), torch.tensor([-1 / 3, 3 / 4]))
    torch.testing.assert_close(targeted_dlr(z, y, target), torch.tensor([-3 / 3.5, 3 / 4.5]))
    torch.testing.assert_close(targeted_dlr(7 * z + 2, y, target), targeted_dlr(z, y, target))
    assert ranked_targets(z, y, count=9).tolist() == [[2, 1, 3], [2, 3, 0]]
    two = z[:, :2]
    assert dlr(two, y).tolist() == [-3.0, -2.0]
    assert targeted_dlr(two, y, 1 - y).tolist() == [-3.0, -2.0]


def test_checkpoints_and_squares_follow_the_papers() -> None:
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert [share_of_area(q) for q in (1, 10, 11, 51, 4999)] == [0.8, 0.8, 0.4, 0.2, 0.8 / 128]
    assert torch.equal(
        _pyramid(3, 3),
        torch.tensor([[1, 1, 1], [1, 4, 1], [1, 1, 1]]) * 0.25 + torch.tensor([[0.0, 0, 0], [0, 0.25, 0], [0, 0, 0]]),
    )
    assert float(_bump(7).norm()) == pytest.approx(1)


def test_plan_of_the_ensemble() -> None:
    published = AutoAttackAttack(name="autoattack", eps="0.03")
    ten = plan(published, classes=10)
    assert (ten.notes, ten.eot, ten.eps, ten.norm) == ((), 1, 0.03, "linf")
    assert [stage_name(s) for s in ten.stages] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert ten.stages == (
        apgd(0.03, steps=100),
        targeted(0.03, steps=100, targets=9),
        fab(0.03, steps=100, targets=9),
        square(0.03, queries=5000),
    )
    four = plan(published, classes=4)
    assert [s.targets for s in four.stages if isinstance(s, TargetedApgdAttack | FabAttack)] == [3, 3]
    assert four.notes == tuple(
        f"{name}: 3 targets instead of 9, as there are 4 classes" for name in ("apgd-t", "fab-t")
    )
    assert any("4 classes" in note for note in plan(published, classes=3).notes)
    assert any("plain gap" in note for note in plan(published, classes=2).notes)
    assert [s.targets for s in plan(published, classes=2).stages if isinstance(s, FabAttack)] == [1]
    assert plan(apgd(0.03, "l2"), classes=2).stages == (apgd(0.03, "l2"),)
    with pytest.raises(ValueError, match="two classes"):
        plan(published, classes=1)


def test_plan_against_randomised_predictors() -> None:
    randomised = AutoAttackAttack(name="autoattack", eps="0.5", norm="l2", version="rand")
    made = plan(randomised, classes=10)
    assert made.stages == (apgd(0.5, "l2").model_copy(update={"eps": "0.5"}), apgd(0.5, "l2", loss="apgd-dlr"))
    assert (made.eot, made.eps, made.norm, made.notes) == (20, 0.5, "l2", ())
    assert any("at least 3 classes" in note for note in plan(randomised, classes=2).notes)


def test_gradients_of_a_randomised_predictor_are_averaged() -> None:
    net, x, y = curved()
    calls = []

    def noisy(images: Tensor) -> Tensor:
        calls.append(len(images))
        return logits_plus_noise(net, images)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        stage = apgd(0.02, steps=3)
        points = run_stage(stage, noisy, x, y, embed=None, eot=5, generator=generator())
    assert in_region(x, points, eps=0.02, norm="linf").all()
    assert len(calls) == 1 + 4 * 5


def logits_plus_noise(net: nn.Module, images: Tensor) -> Tensor:
    out: Tensor = net(images)
    return out + 0.01 * torch.randn_like(out)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_ensemble_on_a_linear_model_is_exact(norm: Norm) -> None:
    radius = LINEAR.radius(norm)
    eps = float(radius.median()) * 1.01
    clear = (radius / eps - 1).abs() > 0.01
    published = AutoAttackAttack(name="autoattack", eps=repr(eps), norm=norm)
    broken = torch.stack([LINEAR.broken(stage) for stage in plan(published, classes=CLASSES).stages]).any(0)
    assert torch.equal(broken[clear], (radius < eps)[clear])


@pytest.mark.parametrize(
    ("norm", "eps", "reference"), [("linf", 0.02, (60, 71, 71, 18)), ("l2", 0.2, (56, 67, 67, 19))], ids=NORMS
)
def test_as_strong_as_an_independent_implementation(norm: Norm, eps: float, reference: tuple[int, ...]) -> None:
    """Counts of 100 samples that pyautoattack 0.2.0 broke with the same settings: the most of three seeds."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(128, CLASSES)).eval()
    x = torch.rand((100, *SHAPE), generator=generator(5))
    y = logits_at(net, x).argmax(1)
    attacks: list[Stage] = [
        apgd(eps, norm, steps=20),
        targeted(eps, norm, steps=20, targets=3),
        fab(eps, norm, steps=20, targets=3),
        square(eps, norm, queries=200),
    ]
    for stage, expected in zip(attacks, reference, strict=True):
        points = run_stage(stage, net, x, y, embed=None, generator=generator(0))
        assert int(fooled(logits_at(net, points), y).sum()) >= expected - 1, stage


def test_a_square_fits_into_the_image_and_its_offsets_count_from_its_corner() -> None:
    drawn = torch.tensor([[0.0, 0.0], [0.999, 0.5]])
    inside, down, across = _square(drawn, 3, torch.zeros(2, 1, 5, 7))
    expected = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    expected[0, 0, :3, :3] = expected[1, 0, 2:, 2:5] = True
    assert torch.equal(inside, expected)
    assert down[1].flatten().tolist() == [3, 3, 0, 1, 2]
    assert across[1].flatten().tolist() == [3, 3, 0, 1, 2, 3, 3]


def test_one_window_is_emptied_and_another_gets_its_mass_and_a_share_of_what_is_left_of_the_ball() -> None:
    x = torch.full((1, 3, 9, 9), 0.5)
    points = x.clone()
    points[0, 0, :3, :3] += 0.1  # of norm 0.3, where the ball allows 0.5: 0.16 is left for three channels
    region = Region.around(x, eps=0.5, norm="l2")
    state = _Hunt(region, torch.tensor([0]), points, torch.ones(1), torch.tensor([False]))
    drawn = torch.tensor([[0.999, 0.999, 0.0, 0.0, 0.1, 0.1, 0.1, 0.9]])  # gains below on the right; signs + + -
    delta = (_move_mass(state, drawn, 3) - x)[0]
    expected = torch.zeros(3, 9, 9)
    for channel, length in enumerate(((0.09 + 0.16 / 3) ** 0.5, (0.16 / 3) ** 0.5, -((0.16 / 3) ** 0.5))):
        expected[channel, 6:, 6:] = length * _bump(3)
    torch.testing.assert_close(delta, expected, atol=1e-6, rtol=0)


# Every point against a second transcription of the papers, in float64


def wild(shape: tuple[int, int, int], *, n: int = 10, classes: int = CLASSES) -> tuple[nn.Module, Tensor, Tensor]:
    """A net on which attacks have turns to take, and images of which a few are misclassified from the start."""
    g = generator(11)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        first = nn.Linear(math.prod(shape), 24)
        net = nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(24, classes)).double()
    first.weight.data *= 6
    x = torch.rand((n, *shape), generator=g).double()
    x[1, :, 0] = 0  # on the border of the box
    y = logits_at(net, x).argmax(1)
    y[3] = (y[3] + 1) % classes
    return net.eval().requires_grad_(False), x, y


def found(stage: Stage, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    points = run_stage(stage, net, x, y, embed=net, generator=generator(1))
    broken = fooled(logits_at(net, points), y)
    assert 1 < int(broken.sum()) < len(x) or stage.name == "embedding", stage  # some fall, and some stand
    return points


def one_by_one(net: nn.Module, x: Tensor, y: Tensor) -> list[tuple[int, by_hand.Logits, Tensor, int]]:
    """Of each sample its number, the logits as a function of one image, the image and its label."""
    return [(i, lambda point: net(point[None])[0], x[i], int(y[i])) for i in range(len(x))]


def starts(x: Tensor, runs: int, eps: float, norm: Norm) -> list[Tensor]:
    g = generator(1)
    return [x + random_start(x, eps=eps, norm=norm, generator=g) for _ in range(runs)]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.25)])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_pgd_goes_where_its_paper_says(norm: Norm, eps: float, start: Literal["zero", "random"]) -> None:
    net, x, y = wild((3, 4, 5))
    stage = pgd(eps, norm, step_size=eps / 3, steps=5, restarts=3, start=start)
    begin = [x, *starts(x, 2, eps, norm)] if start == "zero" else starts(x, 3, eps, norm)
    expected = [
        by_hand.pgd(f, image, label, [s[i] for s in begin], eps=eps, norm=norm, step_size=eps / 3, steps=5)
        for i, f, image, label in one_by_one(net, x, y)
    ]
    torch.testing.assert_close(found(stage, net, x, y), torch.stack(expected), atol=1e-6, rtol=0)
    by_fgsm = [by_hand.fgsm(f, image, label, eps=eps, norm=norm) for _, f, image, label in one_by_one(net, x, y)]
    torch.testing.assert_close(found(fgsm(eps, norm), net, x, y), torch.stack(by_fgsm), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.25)])
def test_the_attack_on_the_embedding_ends_at_the_furthest_point_it_met(norm: Norm, eps: float) -> None:
    net, x, y = wild((3, 4, 5))
    stage = embedding(eps, norm, step_size=eps, steps=4).model_copy(update={"restarts": 3})
    expected = [
        by_hand.embedding_pgd(
            f, image, [s[i] for s in starts(x, 3, eps, norm)], eps=eps, norm=norm, step_size=eps, steps=4
        )
        for i, f, image, _ in one_by_one(net, x, y)
    ]
    torch.testing.assert_close(found(stage, net, x, y), torch.stack(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.025), ("l2", 0.2)])
@pytest.mark.parametrize("loss", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_apgd_goes_where_its_paper_says(norm: Norm, eps: float, loss: Loss) -> None:
    net, x, y = wild((3, 4, 5), n=8)
    aims, steps = 2 if loss == "apgd-t" else 1, 16
    g, runs = generator(1), []
    for _ in range(aims * 2):
        drawn = torch.rand(x.shape, generator=g) * 2 - 1 if norm == "linf" else torch.randn(x.shape, generator=g)
        runs.append(torch.stack([image + eps * d / by_hand.length(d, norm) for image, d in zip(x, drawn, strict=True)]))
    stage: Stage = (
        targeted(eps, norm, steps=steps, targets=aims).model_copy(update={"restarts": 2})
        if loss == "apgd-t"
        else apgd(eps, norm, loss=loss, steps=steps, restarts=2)
    )
    expected = []
    for i, f, image, label in one_by_one(net, x, y):
        ranked = by_hand.likeliest(f, image, label)
        own = [(ranked[number // 2], run[i]) for number, run in enumerate(runs)]
        expected.append(by_hand.apgd(f, image, label, own, loss=loss, eps=eps, norm=norm, steps=steps))
    torch.testing.assert_close(found(stage, net, x, y), torch.stack(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.025), ("l2", 0.2)])
def test_fab_goes_where_its_paper_says(norm: Norm, eps: float) -> None:
    net, x, y = wild((3, 4, 5))
    expected = [
        by_hand.fab(f, image, label, by_hand.likeliest(f, image, label)[:2], eps=eps, norm=norm, steps=6)
        for _, f, image, label in one_by_one(net, x, y)
    ]
    points = found(fab(eps, norm, steps=6, targets=2), net, x, y)
    torch.testing.assert_close(points, torch.stack(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("norm", "eps", "shape"),
    [
        ("linf", 0.02, (2, 21, 25)),
        ("linf", 0.06, (1, 4, 30)),
        ("l2", 0.3, (2, 21, 25)),
        ("l2", 0.3, (2, 5, 12)),
    ],
)
def test_square_goes_where_its_paper_says(norm: Norm, eps: float, shape: tuple[int, int, int]) -> None:
    net, x, y = wild(shape)
    n, (channels, height, width), g = len(x), shape, generator(1)
    if norm == "linf":
        up = torch.rand((n, channels, 1, width), generator=g) < 0.5
        first = [by_hand.stripes(image, bits[:, 0], eps) for image, bits in zip(x, up, strict=True)]
    else:
        side = max(3, min(height, width) // 5)
        drawn = torch.rand((2, n, channels, height // side, width // side), generator=g)
        first = [by_hand.tiles(image, drawn[:, i], eps) for i, image in enumerate(x)]
    draws = torch.cat([torch.rand((64, n, 5 + channels), generator=g) for _ in range(2)])[:74]
    expected = [
        by_hand.square(f, image, label, first[i], list(draws[:, i]), eps=eps, norm=norm)
        for i, f, image, label in one_by_one(net, x, y)
    ]
    points = found(square(eps, norm, queries=75), net, x, y)
    torch.testing.assert_close(points, torch.stack(expected), atol=1e-6, rtol=0)


# What the attacks share


@dataclass
class Walkers:
    """A state with one number a row beside the points."""

    region: Region
    points: Tensor
    done: Tensor
    tag: Tensor


def walkers(n: int, done: Sequence[int]) -> Walkers:
    x = torch.arange(n, dtype=torch.float32)[:, None, None, None] / n
    finished = torch.zeros(n, dtype=torch.bool)
    finished[list(done)] = True
    return Walkers(Region.around(x, eps=0.1, norm="linf"), x + 100, finished, torch.arange(n))


def test_a_region_is_a_ball_within_the_box() -> None:
    x = torch.tensor([0.1, 0.5, 0.9]).reshape(1, 1, 1, 3)
    square_one, round_one = (Region.around(x, eps=0.2, norm=norm) for norm in NORMS)
    torch.testing.assert_close(square_one.low.flatten(), torch.tensor([0.0, 0.3, 0.7]))
    torch.testing.assert_close(square_one.high.flatten(), torch.tensor([0.3, 0.7, 1.0]))
    assert (round_one.low.unique().tolist(), round_one.high.unique().tolist()) == ([0.0], [1.0])
    far = x + torch.tensor([-0.3, 0.0, 0.4])
    torch.testing.assert_close(square_one.project(far).flatten(), torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(round_one.project(far).flatten(), torch.tensor([0.0, 0.5, 1.0]))  # 0.9 + 0.16 is cut
    near = x + torch.tensor([0.3, 0.0, -0.4])
    torch.testing.assert_close(round_one.project(near).flatten(), torch.tensor([0.1 + 0.12, 0.5, 0.9 - 0.16]))
    assert square_one.distance(near).tolist() == pytest.approx([0.4])
    assert round_one.distance(near).tolist() == pytest.approx([0.5])


def test_who_is_done_is_put_away_once_it_is_worth_it() -> None:
    state = walkers(48, [4, 9])
    roster = Roster(state.region.x)
    assert roster.settle(state, step=0) is state  # 2 of 48 are not worth moving the others
    assert roster.settle(walkers(48, []), step=0).tag.tolist() == list(range(48))
    left = roster.settle(walkers(48, [4, 9, 47]), step=0)
    rows = [i for i in range(47) if i not in (4, 9)]
    assert left.tag.tolist() == roster.index.tolist() == rows
    assert torch.equal(left.region.x, state.region.x[rows])
    assert torch.equal(left.points, state.points[rows])
    last = dataclasses.replace(left, done=torch.arange(45) < 3)
    left = roster.settle(last, step=1)
    assert left.tag.tolist() == roster.index.tolist() == rows[3:]
    points = roster.close(left.points * 2)
    expected = state.points.clone()
    expected[rows[3:]] *= 2
    assert torch.equal(points, expected)
    everybody = walkers(3, [0, 1, 2])
    assert len(Roster(everybody.region.x).settle(everybody, step=0).done) == 0
    one = walkers(17, [5])
    assert len(Roster(one.region.x).settle(one, step=3).done) == 17
    one = walkers(16, [5])
    assert len(Roster(one.region.x).settle(one, step=3).done) == 15


def test_an_accelerator_is_waited_for_now_and_then() -> None:
    state = walkers(4, [0, 1])
    elsewhere = Walkers(state.region, state.points.to("meta"), state.done.to("meta"), state.tag)  # it cannot be read
    roster = Roster(state.region.x)
    for step in (1, 3, 7, 9):
        assert roster.settle(elsewhere, step=step) is elsewhere
    with pytest.raises((NotImplementedError, RuntimeError)):
        roster.settle(elsewhere, step=8)


def test_a_climb_is_the_mean_of_its_passes() -> None:
    w = torch.randn((2, 12), generator=generator())
    x = torch.rand((3, 3, 2, 2), generator=generator())
    calls = 0

    def predict(points: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return points.flatten(1) @ w.T * calls

    z = x.flatten(1) @ w.T
    for times, first, second in ((2, (1 + 2) / 2, (1 + 4) / 2), (3, (1 + 2 + 3) / 3, (1 + 4 + 9) / 3)):
        calls = 0
        logits, values, grad = climb(predict, x, lambda z: z.square().sum(1), passes=times)
        torch.testing.assert_close(logits, first * z)
        torch.testing.assert_close(values, second * z.square().sum(1))
        torch.testing.assert_close(grad.flatten(1), second * 2 * z @ w)
    calls = 1
    logits, values, grad = climb(predict, x, lambda z: z.square().sum(1))
    torch.testing.assert_close((logits, values), (2 * z, 4 * z.square().sum(1)))
    torch.testing.assert_close(grad.flatten(1), 8 * z @ w)
    assert not any(t.requires_grad for t in (logits, values, grad, x))
    for blind in (lambda points: points.detach().flatten(1), lambda points: torch.zeros((3, 2)).requires_grad_()):
        for times in (1, 2):
            _, _, none = climb(blind, x, lambda z: z.sum(1), passes=times)
            assert torch.equal(none, torch.zeros_like(x))


def test_only_samples_that_still_stand_are_asked_about() -> None:
    asked: list[int] = []

    def predict(points: Tensor) -> Tensor:
        asked.append(len(points))
        return LINEAR(points)

    x, y = LINEAR.x[:40], LINEAR.y[:40].clone()
    y[::4] = (y[::4] + 1) % CLASSES
    for stage, calls in (
        (pgd(1e-4, step_size=1e-4, steps=2, restarts=2), [40, 30, 30, 30, 30, 30]),
        (apgd(1e-4, steps=2, restarts=2), [40, 30, 30, 30, 30, 30, 30]),
        (targeted(1e-4, steps=1, targets=2), [40, 30, 30, 30, 30]),
        (fab(1e-4, steps=3, targets=2), [40, 30, 30, 30, 30, 30, 30]),  # nobody comes within the ball
        (square(1e-4, queries=4), [40, 40, 30, 30, 30]),
    ):
        asked.clear()
        run_stage(stage, predict, x, y, embed=None, generator=generator())
        assert asked == calls, stage


def test_a_walk_asks_of_the_points_within_the_ball_alone_unless_that_would_wait_for_a_device() -> None:
    asked: list[int] = []

    def predict(points: Tensor) -> Tensor:
        asked.append(len(points))
        return points.flatten(1)

    points, y = torch.eye(4)[:, :, None, None], torch.tensor([0, 0, 2, 0])
    within = torch.tensor([True, True, True, False])
    assert _crossed(predict, points, y, within)[:3].tolist() == [False, True, False]
    assert not _crossed(predict, points, y, ~within | within & False)[:3].any()
    assert not _crossed(predict, points, y, within & False).any()
    there = [t.to("meta") for t in (points, y, within)]
    assert _crossed(predict, *there).shape == (4,)
    assert asked == [3, 1, 4]


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_alone_is_attacked_as_among_others(norm: Norm) -> None:
    eps = float(LINEAR.radius(norm).median())
    for stage in stages(eps, norm):
        among = run_stage(stage, LINEAR, LINEAR.x, LINEAR.y, embed=None, generator=generator())
        if stage.name in ("fgsm", "fab"):  # which draw nothing: others have other draws
            alone = [
                run_stage(stage, LINEAR, LINEAR.x[i : i + 1], LINEAR.y[i : i + 1], embed=None, generator=generator())
                for i in range(6)
            ]
            torch.testing.assert_close(torch.cat(alone), among[:6], atol=1e-6, rtol=0)
    weakest = LINEAR.radius(norm).argmin()
    x, y = LINEAR.x[weakest][None], LINEAR.y[weakest][None]
    for stage in stages(1.5 * float(LINEAR.radius(norm).min()), norm)[1:]:
        points = run_stage(stage, LINEAR, x, y, embed=None, generator=generator())
        assert isinstance(stage, SquareAttack) or fooled(LINEAR(points), y).all(), stage
        assert not torch.equal(points, x), stage
    for stage in (embedding(eps, norm), embedding(eps, norm, steps=1)):
        assert not torch.equal(run_stage(stage, LINEAR, x, y, embed=LINEAR, generator=generator()), x)


def test_nobody_is_attacked() -> None:
    for stage in [*stages(0.1, "linf"), embedding(0.1)]:
        points = run_stage(stage, LINEAR, LINEAR.x[:0], LINEAR.y[:0], embed=LINEAR, generator=generator())
        assert points.shape == LINEAR.x[:0].shape
    still = embedding(1.0).model_copy(update={"eps": "0"})
    assert torch.equal(run_stage(still, LINEAR, LINEAR.x, LINEAR.y, embed=LINEAR, generator=generator()), LINEAR.x)


def test_passes_and_names_of_the_stages() -> None:
    two = {"restarts": 2}
    table: list[tuple[Stage, str, int]] = [
        (fgsm(0.1), "fgsm", 1),
        (pgd(0.1, steps=7, restarts=3), "pgd-7", 24),
        (embedding(0.1, steps=7).model_copy(update=two), "embedding", 16),
        (apgd(0.1, steps=7).model_copy(update=two), "apgd-ce", 16 * 5),
        (apgd(0.1, steps=7, loss="apgd-dlr"), "apgd-dlr", 8 * 5),
        (targeted(0.1, steps=7, targets=3).model_copy(update=two), "apgd-t", 48 * 5),
        (fab(0.1, steps=7, targets=3), "fab-t", 48),
        (square(0.1, queries=7), "square", 8),
    ]
    assert [(stage, stage_name(stage), passes(stage, eot=5)) for stage, _, _ in table] == table
    assert passes(apgd(0.1, steps=7), eot=1) == 8


def test_what_a_person_is_told_of_few_classes() -> None:
    standard, rand = (AutoAttackAttack(name="autoattack", eps="0.03", version=v) for v in ("standard", "rand"))
    fewer = "{} instead of 9, as there are {} classes"
    assert plan(standard, classes=3).notes == (
        "apgd-t: " + fewer.format("2 targets", 3),
        "apgd-t: the ratio divides by z_(1) - z_(3), as the published one needs at least 4 classes",
        "fab-t: " + fewer.format("2 targets", 3),
    )
    assert plan(standard, classes=2).notes == (
        "apgd-t: " + fewer.format("1 targets", 2),
        "apgd-t: the plain gap instead of the ratio, which needs at least 3 classes",
        "fab-t: " + fewer.format("1 targets", 2),
    )
    margin = "apgd-dlr: the plain margin instead of the ratio, which needs at least 3 classes"
    assert plan(rand, classes=2).notes == (margin,)
    assert plan(rand, classes=3).notes == ()
    assert plan(apgd(0.1, loss="apgd-dlr"), classes=2).eot == plan(standard, classes=2).eot == 1
    assert plan(targeted(0.1, targets=3), classes=4).notes == ()


def test_losses_of_three_classes_and_of_equal_logits() -> None:
    z, y = torch.tensor([[4.0, 1.0, 3.0], [0.0, 2.0, 5.0]]), torch.tensor([0, 1])
    torch.testing.assert_close(targeted_dlr(z, y, torch.tensor([1, 2])), torch.tensor([-3 / 3, 3 / 5]))
    torch.testing.assert_close(dlr(z, y), torch.tensor([-1 / 3, 3 / 5]))
    assert dlr(torch.zeros(1, 4), torch.tensor([0])).tolist() == [0.0]
    assert targeted_dlr(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([1])).tolist() == [0.0]
    assert ranked_targets(torch.zeros(1, 20), torch.tensor([1]), count=3).tolist() == [[0, 2, 3]]
    assert ranked_targets(torch.full((1, 3), -3e38), torch.tensor([1]), count=9).tolist() == [[0, 2]]


def test_points_where_the_hyperplane_is_met_nowhere_or_at_once() -> None:
    x = torch.full((4, 1, 1, 2), 0.5)
    w = torch.tensor([[3.0, 1.0], [0.0, 0.0], [1e-20, 2e-20], [1e20, -1e20]]).reshape(4, 1, 1, 2)
    gap = torch.tensor([-0.9, -1.0, -0.6e-20, -0.4e20])
    by_linf = to_hyperplane(x, w, gap, norm="linf").flatten(1)
    torch.testing.assert_close(by_linf, torch.tensor([[0.225, 0.225], [0.0, 0.0], [0.2, 0.2], [0.2, -0.2]]))
    by_l2 = to_hyperplane(x, w, gap, norm="l2").flatten(1)
    torch.testing.assert_close(by_l2, torch.tensor([[0.27, 0.09], [0.0, 0.0], [0.12, 0.24], [0.2, -0.2]]))


# What an accelerator is asked for. Each of `steps` reads who is done in one of 8; rows are chosen between runs.

ASKED: dict[str, tuple[Callable[[Norm], Stage], int, int, int]] = {  # copies, reads, choices of rows
    "fgsm": (lambda norm: fgsm(0.1, norm), 0, 0, 0),
    "pgd": (lambda norm: pgd(0.1, norm, steps=20), 1, 3, 0),
    "pgd, restarted": (lambda norm: pgd(0.1, norm, steps=16, restarts=3, start="zero"), 2, 3 * 2, 2),
    "apgd": (lambda norm: apgd(0.1, norm, steps=20), 1, 3, 2),
    "apgd-t": (lambda norm: targeted(0.1, norm, steps=9, targets=3), 3, 3 * 2, 4),
    "fab": (lambda norm: fab(0.1, norm, steps=20, targets=2), 0, 2 * 3, 3),
    "square": (lambda norm: square(0.1, norm, queries=131), 1 + 3, 17, 0),
    "embedding": (lambda norm: embedding(0.1, norm, steps=20), 1, 3, 0),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ASKED)
def test_a_stage_waits_for_an_accelerator_only_to_drop_who_is_done(
    norm: Norm, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, copies, reads, choices = ASKED[name]
    chosen = []

    def everyone(mask: Tensor) -> Tensor:  # no device without values knows where a mask holds
        chosen.append(mask)
        return torch.arange(len(mask), device=mask.device)

    for place in (apgd_module, fab_module, pgd_module):
        monkeypatch.setattr(place, "rows_where", everyone)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    net.eval().requires_grad_(False).to(META)
    x, y = torch.empty((6, *SHAPE), device=META), torch.empty(6, dtype=torch.int64, device=META)
    with watched(answer=0.0) as seen:
        points = run_stage(make(norm), net, x, y, embed=net, generator=generator())
    assert points.shape == x.shape
    of_l2 = len({square_side(query) for query in range(1, 131)}) if (name, norm) == ("square", "l2") else 0
    assert {line.split(" ")[1] for line in seen.waits} <= {"aten::_local_scalar_dense"}
    assert {line.split(":")[0] for line in seen.waits} <= {"search.py"}
    assert (len(seen.copies) - of_l2, len(seen.waits), len(chosen)) == (copies, reads, choices)


def square_side(query: int) -> int:
    """The side of the window that Square moves in L2, of images of 8 x 8 pixels."""
    side = round(math.sqrt(share_of_area(query) * 64))
    return min(max(3, side // 2 * 2 + 1), 8)


@pytest.mark.parametrize("norm", NORMS)
def test_eight_rounds_find_the_hyperplane(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator, where nobody asks whether the search has ended: the same bits, up to 95 % of the way."""
    g = generator(3)
    x = torch.rand((60, 3, 32, 32), generator=g)
    x[30:] = torch.where(x[30:] < 0.5, x[30:] / 25, x[30:])  # many pixels at the border of the box
    w = torch.randn(x.shape, generator=g)
    far = torch.where(w > 0, w * (1 - x), -w * x).flatten(1).sum(1)
    gap = -far * torch.linspace(0.001, 0.95, 30).repeat(2)
    exact = to_hyperplane(x, w, gap, norm=norm)
    monkeypatch.setattr(fab_module, "_NEWTON_STEPS", fab_module._NEWTON_UNSEEN)
    assert torch.equal(to_hyperplane(x, w, gap, norm=norm), exact)
    short = to_hyperplane(x, w, -0.999 * far, norm=norm)  # beyond, no further than it should
    assert ((w * short).flatten(1).sum(1) <= 0.9991 * far).all()
    assert ((w * short).flatten(1).sum(1) >= 0.99 * far).all()
