"""The ledger of an evaluation: resumed equals uncut, nothing is trusted, nothing is left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from stages import apgd, embedding, ensemble, pgd
from torch import Tensor, nn

from cfamc_cli.engine.attacks.plan import Plan
from cfamc_cli.engine.attacks.search import Predict
from cfamc_cli.engine.ball import norms
from cfamc_cli.engine.evaluation import blocks as module
from cfamc_cli.engine.evaluation.blocks import Evaluation, Examples, evaluate
from cfamc_cli.engine.evaluation.folding import frozen_copy
from cfamc_cli.engine.evaluation.verify import Meter, Predictor, in_region, look, undisturbed
from cfamc_cli.engine.randomness import balanced_order
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.recipe.schema import Norm, Stage
from cfamc_cli.store.records import Outcome
from cfamc_cli.store.records import Stage as StageTotal

CPU = torch.device("cpu")
NORMS: tuple[Norm, Norm] = ("linf", "l2")
EPS = 0.02
ENSEMBLE = ensemble(EPS, steps=4, targets=2, queries=6)


def make() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten()).eval()
        head = nn.Linear(128, 4).eval()
        x = torch.rand(50, 3, 8, 8)
    with torch.no_grad():
        y = head(encoder(x)).argmax(1)
    y[::7] = (y[::7] + 1) % 4  # some are wrong from the start
    return encoder, head, x, y


ENCODER, HEAD, X, Y = make()
NET = nn.Sequential(ENCODER, HEAD)
PREDICTOR = Predictor(NET, frozen_copy(NET, X[:8]), (ENCODER, HEAD), ENCODER)


class CutError(Exception):
    """The process was killed."""


class Ledger:
    """Keeps what is committed, and may be killed after a number of commits."""

    def __init__(self, *, cut_after: int = 10_000) -> None:
        self.outcomes: list[Outcome] = []
        self.examples: list[Examples] = []
        self.cut_after = cut_after

    def commit(self, outcome: Outcome, examples: Examples) -> None:
        self.outcomes.append(outcome)
        self.examples.append(examples)
        if len(self.outcomes) == self.cut_after:
            raise CutError


def run(
    ledger: Ledger,
    *,
    n: int = 50,
    attack: Stage | None = None,
    seed: int = 0,
    finished: list[Outcome] | None = None,
    images: Tensor = X,
    labels: Tensor = Y,
    talk: NullTalk | None = None,
) -> Evaluation:
    return evaluate(
        PREDICTOR,
        images[:n],
        labels[:n],
        plan=ENSEMBLE if attack is None else Plan((attack,)),
        seed=seed,
        block_size=20,
        device=CPU,
        finished=finished or [],
        commit=ledger.commit,
        audit=None,
        label="attack",
        talk=talk or NullTalk(),
    )


def timeless(outcomes: tuple[Outcome, ...]) -> list[Outcome]:
    return [dataclasses.replace(outcome, seconds=0.0) for outcome in outcomes]


def test_ledger_adds_up() -> None:
    ledger = Ledger()
    evaluation = run(ledger)
    assert [t.name for t in evaluation.totals()] == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert [(o.block, o.stage) for o in evaluation.outcomes] == [(b, s) for b in range(3) for s in range(5)]
    assert timeless(evaluation.outcomes) == timeless(tuple(ledger.outcomes))
    totals = evaluation.totals()
    assert totals[0].attacked == 50
    assert sum(t.broken for t in totals) == 50 - sum(evaluation.robust)
    assert 0 < sum(evaluation.robust) < sum(evaluation.clean) < 50
    assert evaluation.clean == tuple((HEAD(ENCODER(X)).argmax(1) == Y).tolist())
    assert all(t.forward > 0 for t in totals if t.attacked)
    assert totals[0].backward == totals[4].backward == 0 < totals[1].backward


def outcome(block: int, stage: int, name: str, standing: str, broken: str, *, passes: int) -> Outcome:
    masks = [tuple(bit == "1" for bit in text) for text in (standing, broken)]
    none = (False,) * len(standing)
    return Outcome(block, stage, name, masks[0], masks[1], none, none, none, passes, 10 * passes, passes / 4)


def test_totals_are_those_of_the_blocks() -> None:
    outcomes = (
        outcome(0, 0, "clean", "1101", "0010", passes=1),
        outcome(0, 1, "pgd-2", "1001", "0100", passes=2),
        outcome(0, 2, "square", "0001", "1000", passes=4),
        outcome(1, 0, "clean", "10", "00", passes=8),  # the second is right, but not steady
        outcome(1, 1, "pgd-2", "10", "00", passes=16),
        outcome(1, 2, "square", "10", "00", passes=32),
    )
    evaluation = Evaluation(outcomes, ())
    assert evaluation.clean == (True, True, False, True, True, True)
    assert evaluation.robust == (False, False, False, True, True, False)

    def total(name: str, attacked: int, broken: int, passes: int) -> StageTotal:
        return StageTotal(
            name=name,
            attacked=attacked,
            broken=broken,
            forward=passes,
            backward=10 * passes,
            wall_seconds=passes / 4,
        )

    assert evaluation.totals() == (total("clean", 6, 1, 9), total("pgd-2", 4, 1, 18), total("square", 3, 1, 36))


def test_passes_of_a_stage_that_breaks_nothing() -> None:
    totals = run(Ledger(), attack=pgd(0.0001, step_size=0.0001, steps=6, start="zero")).totals()
    right = totals[1].attacked
    assert totals[1].broken == 0 < right < 50
    assert (totals[0].forward, totals[0].backward) == (4 * 50, 0)  # at once, and in batches of 1, 7 and 64
    assert (totals[1].forward, totals[1].backward) == ((6 + 1 + 4) * right, 6 * right)


def test_progress_goes_up_and_ends() -> None:
    class Heard(NullTalk):
        def __init__(self) -> None:
            self.steps: list[tuple[int, int]] = []

        def progress(self, task: str, done: int, total: int, values: Mapping[str, float]) -> None:
            assert task == "attack"
            self.steps.append((done, total))

    heard = Heard()
    run(Ledger(), talk=heard)
    assert heard.steps == sorted(heard.steps)
    assert heard.steps[0] == (0, 50)
    assert {done for done, _ in heard.steps} >= {0, 20, 40, 50}
    assert heard.steps.count((50, 50)) == 1


def test_examples_are_verified_and_complete() -> None:
    ledger = Ledger()
    evaluation = run(ledger)
    seen = {}
    for examples in ledger.examples:
        for place, image, label in zip(examples.positions, examples.images, examples.labels, strict=True):
            seen[place] = label
            assert in_region(X[place][None], image[None], eps=EPS, norm="linf").all()
            assert int(HEAD(ENCODER(image[None])).argmax()) == label != int(Y[place])
    assert sorted(seen) == [
        i for i, (c, r) in enumerate(zip(evaluation.clean, evaluation.robust, strict=True)) if c and not r
    ]


@pytest.mark.parametrize("cut", [1, 2, 5, 6, 9, 14])
def test_resumed_equals_uncut(cut: int) -> None:
    uncut = run(Ledger())
    first = Ledger(cut_after=cut)
    with pytest.raises(CutError):
        run(first)
    second = Ledger()
    resumed = run(second, finished=first.outcomes)
    assert timeless(resumed.outcomes) == timeless(uncut.outcomes)
    assert resumed.checks == uncut.checks
    assert len(first.outcomes) + len(second.outcomes) == len(uncut.outcomes)  # nothing is run twice


def test_a_larger_limit_reuses_whole_blocks() -> None:
    small = Ledger()
    run(small, n=45)
    grown = Ledger()
    extended = run(grown, n=50, finished=small.outcomes)
    assert {o.block for o in grown.outcomes} == {2}  # only the block that grew
    assert timeless(extended.outcomes) == timeless(run(Ledger(), n=50).outcomes)


def test_outcomes_of_another_attack_are_not_reused() -> None:
    other = Ledger()
    run(other, attack=pgd(EPS, steps=2))
    again = Ledger()
    run(again, attack=apgd(EPS, steps=2), finished=other.outcomes)
    assert {o.stage for o in again.outcomes} == {1}  # the clean predictions stay


def test_the_seed_decides_and_the_callers_random_state_does_not() -> None:
    attack = pgd(EPS, step_size=EPS / 8, steps=1)
    results = []
    for seed, caller in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(caller)
        ledger = Ledger()
        run(ledger, attack=attack, seed=seed)
        results.append(torch.cat([e.images for e in ledger.examples]))
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(caller).get_state())
    assert torch.equal(results[0], results[1])
    assert results[0].shape != results[2].shape or not torch.equal(results[0], results[2])


def test_an_evaluation_leaves_no_trace() -> None:
    grad = torch.ones_like(HEAD.weight)  # type: ignore[arg-type]
    HEAD.weight.grad = grad
    ENCODER.train()
    ENCODER[1].eval()  # type: ignore[index]
    modes = [m.training for m in (*ENCODER.modules(), *HEAD.modules())]
    state = {name: tensor.clone() for name, tensor in ENCODER.state_dict().items()}
    try:
        run(Ledger(), n=20, attack=pgd(EPS, steps=3))
        assert [m.training for m in (*ENCODER.modules(), *HEAD.modules())] == modes
        assert HEAD.weight.grad is grad
        assert torch.equal(grad, torch.ones_like(grad))
        assert all(p.grad is None for p in ENCODER.parameters())
        assert all(p.requires_grad for p in ENCODER.parameters())
        assert all(torch.equal(state[name], tensor) for name, tensor in ENCODER.state_dict().items())
    finally:
        ENCODER.eval()
        HEAD.weight.grad = None


def test_a_trace_is_seen() -> None:
    with undisturbed((ENCODER, HEAD), CPU) as traces:
        assert traces().changed == 0
        bias = HEAD.bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias += 1
        assert traces().changed == 1
        with torch.no_grad():
            bias -= 1
        bias.grad = torch.zeros_like(bias)
        assert traces().changed >= 1
        bias.grad = None


@pytest.mark.parametrize("wrong", ["far", "box", "nan", "shape"])
def test_invalid_examples_are_no_success(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def cheat(stage: Stage, predict: object, x: Tensor, *_: object, **__: object) -> Tensor:
        return {"far": 1 - x, "box": x - 2 * x, "nan": x * torch.nan, "shape": x[:, :, :4]}[wrong]

    monkeypatch.setattr(module, "run_stage", cheat)
    evaluation = run(Ledger(), attack=pgd(EPS, steps=2))
    assert evaluation.robust == evaluation.clean
    figures = {check.name: check.figure for check in evaluation.checks}
    assert figures["invalid-example"] == sum(evaluation.clean)
    assert {check.name for check in evaluation.checks if check.verdict == "failed"} == {"invalid-example"}


def test_the_last_bit_of_the_box_counts() -> None:
    x = torch.full((4, 1, 2, 2), 0.5)
    points = x.clone()
    points[0, 0, 0, 0], points[1, 0, 1, 1] = 1.0, 0.0
    points[2, 0, 0, 0], points[3, 0, 1, 1] = 1 + 2**-23, -(2**-149)
    for norm in NORMS:
        assert in_region(x, points, eps=2.0, norm=norm).tolist() == [True, True, False, False]


@pytest.mark.parametrize("norm", NORMS)
def test_the_edge_of_the_ball_is_measured_in_float64(norm: Norm) -> None:
    """eps is put between a distance and what float32 makes of it."""
    x, points = torch.rand((2, 400, 1, 1, 3), generator=torch.Generator().manual_seed(0)) ** 3
    exact = norms(points.double() - x.double(), norm=norm)
    rounded = norms(points - x, norm=norm).double()
    assert min(int((exact < rounded).sum()), int((exact > rounded).sum())) > 50
    for row in range(len(x)):
        allowed = float(exact[row] + rounded[row]) / 2
        inside = in_region(x[row][None], points[row][None], eps=(allowed - 1e-6) / (1 + 2e-6), norm=norm)
        assert exact[row] == rounded[row] or bool(inside) == bool(exact[row] < rounded[row])


@pytest.mark.parametrize("norm", NORMS)
def test_float32_rounding_is_allowed_on_the_surface_and_no_more(norm: Norm) -> None:
    x, eps = torch.full((3, 1, 1, 2), 0.5), 8 / 255
    reach = eps if norm == "linf" else eps / 2**0.5
    points = x + torch.tensor([reach, reach + 9e-7 / 2, reach + 2e-6])[:, None, None, None]
    assert in_region(x, points, eps=eps, norm=norm).tolist() == [True, True, False]
    assert in_region(x, x + torch.tensor([0, 1e-7, 5e-7])[:, None, None, None], eps=0, norm=norm).tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("norm", NORMS)
def test_verification_in_float64(norm: Norm) -> None:
    x = torch.full((4, 1, 2, 2), 0.5)
    points = x.clone()
    points[0] += 0.1
    points[1] += 0.1001
    points[2, 0, 0, 0] = torch.inf
    points[3] += 0.0
    eps = 0.1 if norm == "linf" else 0.2
    assert in_region(x, points, eps=eps, norm=norm).tolist() == [True, False, False, True]
    assert in_region(x, points, eps=0.0, norm="linf").tolist() == [False, False, False, True]


def test_representation_attack_is_evaluated_by_the_head() -> None:
    evaluation = run(Ledger(), attack=embedding(0.1, step_size=0.03, steps=10))
    assert [total.name for total in evaluation.totals()] == ["clean", "embedding"]
    assert sum(evaluation.clean) - sum(evaluation.robust) > 0


def test_passes_are_counted_by_sample() -> None:
    meter = Meter()
    predict = meter.watch(lambda x: HEAD(ENCODER(x)))
    x = X[:5].clone().requires_grad_()
    torch.autograd.grad(predict(x).sum(), x)
    look(predict, X[:10])
    assert meter.read() == (5 + 4 * 10, 5)
    assert meter.read() == (0, 0)


def test_balanced_order_is_balanced_and_fixed_by_the_data() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)[torch.randperm(85, generator=torch.Generator().manual_seed(0))]
    order = balanced_order(labels, "fingerprint")
    assert sorted(order.tolist()) == list(range(85))
    for k in range(1, 16):
        counts = labels[order[:k]].bincount(minlength=3)
        assert int(counts.max() - counts.min()) <= 1
    assert labels[order[15:65]].bincount(minlength=3).tolist() == [25, 25, 0]
    assert torch.equal(order, balanced_order(labels, "fingerprint"))
    assert not torch.equal(order, balanced_order(labels, "another"))


@pytest.mark.parametrize("images", [X[:0], X[:2] * 3, X[:2].double(), X[:2, 0]])
def test_what_cannot_be_evaluated_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"samples|float32"):
        run(Ledger(), images=images, labels=Y[: len(images)], attack=pgd(EPS))


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="4 logits"):
        run(Ledger(), n=4, labels=torch.tensor([0, 1, 2, 4]), attack=pgd(EPS))


def test_the_frozen_copy_says_the_same_and_the_original_is_kept() -> None:
    before = {name: tensor.clone() for name, tensor in ENCODER.state_dict().items()}
    norm = ENCODER[1]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d)
    search = frozen_copy(nn.Sequential(ENCODER, HEAD), X[:8])
    torch.testing.assert_close(search(X), HEAD(ENCODER(X)), atol=1e-5, rtol=1e-5)
    assert not search(X).requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in ENCODER.state_dict().items())


class TwoUses(nn.Module):
    """The output of a layer that feeds a batch norm is used a second time, so the norm cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.running_mean = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        out: Tensor = (self.norm(h) + h).flatten(1)
        return out


def test_what_cannot_be_folded_is_not() -> None:
    net = TwoUses().eval()
    torch.testing.assert_close(frozen_copy(net, X[:8])(X), net(X).detach(), atol=1e-5, rtol=1e-5)


HALF = torch.full((8, 3, 8, 8), 0.5)


def judge_half(predict: Predict, *, plan: Plan, images: Tensor = HALF) -> Evaluation:
    """Evaluate a function on eight images of the first of two classes."""
    return evaluate(
        Predictor(predict, predict, (nn.Identity(),)),
        images,
        torch.zeros(8, dtype=torch.int64),
        plan=plan,
        seed=0,
        block_size=8,
        device=CPU,
        finished=(),
        commit=Ledger().commit,
        audit=None,
        label="attack",
        talk=NullTalk(),
    )


def two_classes(margin: Tensor) -> Tensor:
    return torch.stack((margin, torch.zeros_like(margin)), 1)


def test_who_is_right_in_one_batch_only_does_not_stand() -> None:
    marked = torch.tensor([True, False] * 4)
    images = torch.where(marked[:, None, None, None], 0.75, HALF)

    def predict(x: Tensor) -> Tensor:
        flipped = (x.flatten(1).mean(1) > 0.7) & (len(x) == 1)
        return two_classes(torch.where(flipped, -1.0, 1.0) + 0 * x.flatten(1).sum(1))

    evaluation = judge_half(predict, plan=Plan((pgd(EPS, steps=1),)), images=images)
    first = evaluation.outcomes[0]
    assert first.standing == tuple((~marked).tolist())
    assert first.unsteady == tuple(marked.tolist())
    assert evaluation.clean == (True,) * 8


def test_who_is_not_finite_under_attack_is_lost_but_not_broken() -> None:
    def predict(x: Tensor) -> Tensor:
        moved = x[:, 0, 0, 0] != 0.5
        return two_classes(torch.where(moved, torch.nan, 1.0) - 1e-4 * x.flatten(1).sum(1))

    evaluation = judge_half(predict, plan=Plan((pgd(EPS, steps=1),)))
    assert evaluation.robust == (False,) * 8
    last = evaluation.outcomes[-1]
    assert (last.not_finite, last.broken) == ((True,) * 8, (False,) * 8)


def test_a_plan_says_how_many_passes_are_averaged() -> None:
    def predict(x: Tensor) -> Tensor:
        return two_classes(1 - 1e-6 * x.flatten(1).sum(1))

    for eot in (1, 5):
        total = judge_half(predict, plan=Plan((apgd(EPS, steps=3),), eot=eot)).totals()[1]
        assert total.forward == 8 * (1 + 4 * eot + 4)  # the clean logits, four gradients, and the look at the end
        assert total.backward == 8 * 4 * eot
