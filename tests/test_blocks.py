"""The ledger of an evaluation: resumed equals uncut, nothing is trusted, nothing is left behind."""

from __future__ import annotations

import copy
import dataclasses
import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from fixed_inputs import signed
from on_meta import META, watched
from PIL import Image, ImageDraw, ImageFont
from stages import apgd, embedding, ensemble, pgd
from torch import Tensor, nn

from cfamc_cli.engine.attacks.plan import Plan, run_stage, stage_name
from cfamc_cli.engine.attacks.search import Predict, logits_at
from cfamc_cli.engine.attacks.together import Member, side_by_side
from cfamc_cli.engine.ball import norms
from cfamc_cli.engine.checkpoint import read_tensors, write_tensors
from cfamc_cli.engine.encoder import build_encoder
from cfamc_cli.engine.evaluation import blocks as module
from cfamc_cli.engine.evaluation import folding, pictures
from cfamc_cli.engine.evaluation.blocks import Evaluation, Examples, evaluate
from cfamc_cli.engine.evaluation.examples import Gallery
from cfamc_cli.engine.evaluation.folding import frozen_copy
from cfamc_cli.engine.evaluation.predictor import CropsOfImages, as_predictor, stacked_crops
from cfamc_cli.engine.evaluation.verify import Meter, Predictor, in_region, look, undisturbed
from cfamc_cli.engine.heads.classifier import Classifier, CropSource, LinearHead
from cfamc_cli.engine.randomness import addressed_generator, addressed_seed, balanced_order
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.recipe.schema import Augment, Crops, Model, Norm, Stage
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
    evaluation = run(Ledger(), attack=pgd(0.0001, step_size=0.0001, steps=6, start="zero"))
    totals = evaluation.totals()
    right = totals[1].attacked
    assert totals[1].broken == 0 < right < 50
    blocks = [sum(o.standing) for o in evaluation.outcomes if o.stage == 1]
    alone = [sum(min(12, size) for size in sizes) for sizes in ((20, 20, 10), blocks)]  # and all in batches of 7 and 64
    assert (totals[0].forward, totals[0].backward) == (3 * 50 + alone[0], 0)
    assert (totals[1].forward, totals[1].backward) == ((6 + 1 + 3) * right + alone[1], 6 * right)


def test_progress_goes_up_and_ends() -> None:
    class Heard(NullTalk):
        def __init__(self) -> None:
            self.steps: list[tuple[int, int]] = []

        def progress(self, task: str, done: int, total: int, values: Mapping[str, float | str]) -> None:
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


@pytest.mark.parametrize("attack", [None, embedding(EPS, steps=3), pgd(EPS, steps=3, restarts=2)])
def test_blocks_that_make_their_passes_together_leave_the_same_ledger(
    attack: Stage | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = Ledger(), Ledger()
    expected = run(alone, attack=attack)
    sizes = []

    def counted(attacks: Sequence[Callable[[Callable[[Predict], Member]], Tensor]]) -> list[Tensor]:
        sizes.append(len(attacks))
        return side_by_side(attacks)

    monkeypatch.setattr(module, "_blocks_at_once", lambda search, sample, block_size: 3)
    monkeypatch.setattr(module, "side_by_side", counted)
    found = run(together, attack=attack)
    assert sizes == [3] * (len(ENSEMBLE.stages) if attack is None else 1)
    assert timeless(found.outcomes) == timeless(expected.outcomes)
    assert [(o.stage, o.block) for o in together.outcomes] == sorted((o.stage, o.block) for o in alone.outcomes)
    examples = {o.block + o.stage * 10: e for o, e in zip(alone.outcomes, alone.examples, strict=True)}
    for outcome, own in zip(together.outcomes, together.examples, strict=True):
        other = examples[outcome.block + outcome.stage * 10]
        assert (own.positions, own.labels) == (other.positions, other.labels)
        torch.testing.assert_close(own.images, other.images, atol=1e-6, rtol=0)


def test_an_attack_that_fails_beside_others_ends_them_all() -> None:
    def endless(member: Callable[[Predict], Member]) -> Tensor:
        search = member(pixels)
        while True:
            logits_at(search, X[:2])

    def failing(member: Callable[[Predict], Member]) -> Tensor:
        logits_at(member(pixels), X[:2])
        raise CutError

    before = threading.active_count()
    with pytest.raises(CutError):
        side_by_side([endless, failing, endless])

    def broken(_: Tensor) -> Tensor:
        raise CutError

    with pytest.raises(CutError):  # in the pass itself, which the caller makes
        side_by_side([lambda member: logits_at(member(broken), X[:2])])
    assert threading.active_count() == before


def pixels(x: Tensor) -> Tensor:
    return x.flatten(1)


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
    look(predict, X[:10], Y[:10], generator=torch.Generator())
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


def judge_half(
    predict: Predict, *, plan: Plan, images: Tensor = HALF, seed: int = 0, block_size: int = 8
) -> Evaluation:
    """Evaluate a function on eight images of the first of two classes."""
    return evaluate(
        Predictor(predict, predict, (nn.Identity(),)),
        images,
        torch.zeros(8, dtype=torch.int64),
        plan=plan,
        seed=seed,
        block_size=block_size,
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


def test_what_a_shorter_search_finds_counts_if_float32_agrees_else_it_searches_again() -> None:
    """A search that rounds its inputs coarsely while TF32 is allowed, as a card would a little."""
    found: list[tuple[Outcome, Examples]] = []
    short: list[bool] = []

    def search(x: Tensor) -> Tensor:
        short.append(torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32)
        out: Tensor = NET(x + ((x * 24).round() / 24 - x).detach() if short[-1] else x)
        return out

    def strict(x: Tensor) -> Tensor:
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        out: Tensor = NET(x)
        return out

    stage = pgd(EPS, step_size=EPS / 4, steps=4).model_copy(update={"search_precision": "tf32"})
    switches = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    evaluate(
        Predictor(strict, search, (ENCODER, HEAD)),
        X,
        Y,
        plan=Plan((stage,)),
        seed=0,
        block_size=len(X),
        device=CPU,
        finished=(),
        commit=lambda outcome, examples: found.append((outcome, examples)),
        audit=None,
        label="attack",
        talk=NullTalk(),
    )
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == switches
    (clean, _), (outcome, examples) = found
    rows = torch.tensor(clean.standing).nonzero().flatten()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        points = run_stage(
            stage, search, X[rows], Y[rows], embed=None, generator=addressed_generator("attack", 0, 0, 1)
        )
        claimed = search(points).argmax(1) != Y[rows]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = switches
    doubted = rows[claimed & (NET(points).argmax(1) == Y[rows])]
    assert outcome.again == len(doubted) > 1
    generator = addressed_generator("attack", 0, 0, 1, "again")
    points[torch.isin(rows, doubted)] = run_stage(stage, NET, X[doubted], Y[doubted], embed=None, generator=generator)
    wrong = NET(points).argmax(1) != Y[rows]
    assert examples.positions == tuple(rows[wrong].tolist())
    assert torch.equal(examples.images, points[wrong])
    assert wrong[torch.isin(rows, doubted)].all()  # all of them fall then
    assert set(short) == {True, False}


def test_a_plan_says_how_many_passes_are_averaged() -> None:
    def predict(x: Tensor) -> Tensor:
        return two_classes(1 - 1e-6 * x.flatten(1).sum(1))

    for eot in (1, 5):
        total = judge_half(predict, plan=Plan((apgd(EPS, steps=3),), eot=eot)).totals()[1]
        assert total.forward == 8 * (1 + 4 * eot + 4)  # the clean logits, four gradients, and the look at the end
        assert total.backward == 8 * 4 * eot


# Values: what a block commits, what a report says, what the evaluator sees


def test_a_block_is_what_its_attacks_return_and_the_evaluator_sees() -> None:
    """Stage by stage from the attacks themselves; examples and masks bit for bit."""
    ledger, seed = Ledger(), 3
    run(ledger, seed=seed)
    made = {(o.block, o.stage): (o, e) for o, e in zip(ledger.outcomes, ledger.examples, strict=True)}
    for block, first in enumerate((0, 20, 40)):
        x, y = X[first : first + 20], Y[first : first + 20]
        standing = logits_at(NET, x).argmax(1) == y
        assert made[block, 0][0].standing == tuple(standing.tolist())
        assert (made[block, 0][1].positions, made[block, 0][1].images.shape) == ((), (0, 3, 8, 8))
        for number, stage in enumerate(ENSEMBLE.stages, 1):
            rows = standing.nonzero().flatten()
            generator = addressed_generator("attack", seed, block, number)
            points = run_stage(stage, PREDICTOR.search, x[rows], y[rows], embed=None, generator=generator)
            seen = logits_at(NET, points).argmax(1)
            fallen = rows[seen != y[rows]]
            standing[fallen] = False
            outcome, examples = made[block, number]
            assert outcome.name == stage_name(stage)
            assert outcome.standing == tuple(standing.tolist())
            assert outcome.broken == tuple(row in fallen for row in range(len(x)))
            assert examples.positions == tuple((first + fallen).tolist())
            assert examples.labels == tuple(seen[seen != y[rows]].tolist())
            assert torch.equal(examples.images, points[seen != y[rows]])


def test_whatever_a_predictor_draws_itself_is_addressed_by_block_and_stage() -> None:
    seeds: list[int] = []

    def predict(x: Tensor) -> Tensor:
        if torch.initial_seed() not in seeds:
            seeds.append(torch.initial_seed())
        return two_classes(1 - 1e-6 * x.flatten(1).sum(1))

    judge_half(predict, plan=Plan((pgd(EPS, steps=1),)), seed=7, block_size=5)
    places = [(), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert seeds == [addressed_seed("predictor", 7, *place) for place in places]


def test_an_example_that_is_wrong_at_one_batch_size_only_is_shown_as_that() -> None:
    def predict(x: Tensor) -> Tensor:
        moved = x[:, 0, 0, 0] != 0.5
        z = torch.where(moved & (len(x) == 7), -1.0, 1.0) - 1e-4 * x.flatten(1).sum(1)
        return two_classes(z)

    examples: list[Examples] = []
    evaluation = evaluate(
        Predictor(predict, predict, (nn.Identity(),)),
        HALF,
        torch.zeros(8, dtype=torch.int64),
        plan=Plan((pgd(EPS, steps=1),)),
        seed=0,
        block_size=8,
        device=CPU,
        finished=(),
        commit=lambda _, found: examples.append(found),
        audit=None,
        label="attack",
        talk=NullTalk(),
    )
    # a batch of 7 and one of 1: the last image is never in one of 7
    assert evaluation.outcomes[1].broken == (True,) * 7 + (False,)
    assert evaluation.outcomes[1].standing == (False,) * 7 + (True,)
    assert evaluation.outcomes[1].unsteady == (True,) * 7 + (False,)
    assert (examples[1].positions, examples[1].labels) == (tuple(range(7)), (1,) * 7)


def test_what_the_ledger_says_against_the_numbers() -> None:
    def marks(text: str) -> tuple[bool, ...]:
        return tuple(bit == "1" for bit in text)

    outcomes = [
        Outcome(0, 0, "clean", marks("111"), marks("000"), marks("100"), marks("110"), marks("111"), 0, 0, 0.0),
        Outcome(0, 1, "square", marks("111"), marks("111"), marks("001"), marks("011"), marks("101"), 0, 0, 0.0),
    ]
    checks = [(check.name, check.figure, check.limit, check.verdict) for check in module._ledger_checks(outcomes)]
    assert checks == [("not-finite", 2, 0, "failed"), ("batch", 4, 0, "failed"), ("invalid-example", 5, 0, "failed")]
    assert {check.verdict for check in module._ledger_checks([])} == {"passed"}


def test_a_committed_stage_follows_where_it_began_with_what_stands() -> None:
    none = (False,) * 3
    clean = Outcome(0, 0, "clean", (True, True, False), (False, False, True), none, none, none, 0, 0, 0.0)
    lost = (False, True, False)
    later = Outcome(0, 1, "fgsm", (True, False, False), none, lost, none, none, 0, 0, 0.0)
    broken = dataclasses.replace(later, broken=lost, not_finite=none)
    assert module._follows(clean, "clean", (True, True, True))
    assert not module._follows(clean, "fgsm", (True, True, True))
    assert not module._follows(clean, "clean", (True, True))
    for outcome in (later, broken):
        assert module._follows(outcome, "fgsm", (True, True, False))
        assert not module._follows(outcome, "fgsm", (True, False, False))
        assert not module._follows(outcome, "fgsm", (True, True, True))


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_progress_is_the_share_of_the_passes_that_the_plan_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, heard = Clock(monkeypatch), Spoken()
    pace = module._Pace(heard, "attack", Plan((pgd(0.1, steps=6), apgd(0.1, steps=3)), eot=2), n=50, block_size=20)
    predict = pace.meter.watch(lambda x: x)  # costs of a sample: 4 to look at it; 7 + 4; 4 * 2 + 4
    pace.begin(0, 0, (True,) * 20)
    predict(torch.zeros(40, 1))  # of 80
    assert heard.steps == [("attack", 0, 50, {"standing in block": "100 %"})]  # it is not yet time for another
    clock.now += 0.99
    predict(torch.zeros(1, 1))
    assert len(heard.steps) == 1
    clock.now += 0.01
    predict(torch.zeros(4, 1))
    assert heard.steps[-1] == ("attack", int(20 * 4 * 45 / 80 / 27), 50, {"standing in block": "100 %"})
    clock.now += 0.5
    predict(torch.zeros(1, 1))
    assert len(heard.steps) == 2  # a report starts the clock again
    pace.meter.read()
    pace.begin(20, 1, (True, False) * 10)
    assert heard.steps[-1] == ("attack", 20 + int(20 * 4 / 27), 50, {"standing in block": "50 %"})
    clock.now += 1
    predict(torch.zeros(55, 1))  # of 10 * 11
    assert heard.steps[-1] == ("attack", 20 + int(20 * 9.5 / 27), 50, {"standing in block": "50 %"})
    clock.now += 1
    predict(torch.zeros(500, 1))  # more than was expected never passes the end of the stage
    assert heard.steps[-1] == ("attack", 20 + int(20 * (4 + 0.99 * 11) / 27), 50, {"standing in block": "50 %"})
    pace.meter.read()
    pace.begin(40, 2, (False,) * 10)  # the last block is smaller
    assert heard.steps[-1] == ("attack", 40 + int(10 * 15 / 27), 50, {"standing in block": "0 %"})
    clock.now += 1
    predict(torch.zeros(1, 1))
    assert heard.steps[-1] == ("attack", 40 + int(10 * (15 + 0.99 * 12) / 27), 50, {"standing in block": "0 %"})
    pace.end()
    clock.now += 5
    predict(torch.zeros(1, 1))
    assert heard.steps[-1] == ("attack", 50, 50, {})
    single = module._Pace(heard, "one", Plan((pgd(0.1, steps=1),)), n=1, block_size=1)
    single.begin(0, 1, (True,))
    single.meter.forward = 1000
    single._report()
    assert heard.steps[-1] == ("one", 0, 1, {"standing in block": "100 %"})


class Spoken(NullTalk):
    """Remembers the progress that was reported."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int, dict[str, float | str]]] = []

    def progress(self, task: str, done: int, total: int, values: Mapping[str, float | str]) -> None:
        self.steps.append((task, done, total, dict(values)))


def test_what_is_just_outside_is_refused() -> None:
    y = Y[:2]
    for images, labels, size in (
        (X[:2], y[:1], 20),
        (X[:2] - 1, y, 20),
        (torch.full_like(X[:2], 1.0001), y, 20),
        (torch.full_like(X[:2], -0.0001), y, 20),
        (X[:2], y, 0),
    ):
        with pytest.raises(ValueError, match=r"samples|float32|at least one"):
            module._require(images, labels, size)
    for edge in (0.0, 1.0):
        module._require(torch.full_like(X[:2], edge), y, 1)
    for labels in (torch.tensor([0, -1]), torch.tensor([4, 0])):
        with pytest.raises(ValueError, match=f"from {int(labels.min())} to {int(labels.max())}, but there are 4"):
            run(Ledger(), n=2, labels=labels, attack=pgd(EPS))


def test_the_evaluator_looks_alone_and_in_batches_of_other_sizes() -> None:
    """65 images: all at once, singly, in sevens (the last two alone), and 64 with one left over."""
    n = 65
    plain = torch.stack((torch.full((n,), 2.0), torch.linspace(0, 1.9, n), torch.full((n,), -4.0)), 1)
    x = torch.arange(n).double()[:, None]

    def predict(rows: Tensor) -> Tensor:
        numbers = rows[:, 0].long()
        z = plain[numbers].clone()
        size = len(rows)
        z[(numbers == 3) & (size == 1), 1] = 3.0  # another class when it is alone
        z[(numbers == 4) & (size == 7), 2] = 5.0  # another in sevens
        z[(numbers == 4) & (size == 64), 1] = 5.0  # and a third: the first counts
        z[(numbers == 5) & (size == 64), 2] += 0.01  # moves, by 0.01 of 4
        z[(numbers == 6) & (size == 7), 2] += 0.0002  # moves within rounding
        z[(numbers == 7) & (size == 7), 1] = torch.nan
        z[(numbers == 8) & (size == n), 2] = -torch.inf
        z[(numbers == 10) & (size == 7), 2] = -torch.inf
        z[(numbers == 9) & (size == 1), 0] += 0.02
        z[(numbers == 9) & (size == 7), 0] += 0.01
        return z

    seen = look(predict, x, torch.zeros(n), generator=torch.Generator())
    expected = {"label": torch.zeros(n, dtype=torch.int64), "moved": torch.zeros(n)}
    other = torch.zeros(n, dtype=torch.int64)
    other[3], other[4], other[7] = 1, 2, 1  # argmax takes what is not a number for the largest
    expected["moved"][[3, 4, 5, 9]] = torch.tensor([(3 - float(plain[3, 1])) / 4, 9 / 4, 0.0025, 0.005])
    assert torch.equal(seen.label, expected["label"])
    assert torch.equal(seen.other, other)
    assert torch.equal(seen.steady, other == 0)
    assert (~seen.finite).nonzero().flatten().tolist() == [7, 8, 10]
    torch.testing.assert_close(seen.moved, expected["moved"], atol=1e-6, rtol=0)
    assert float(seen.moved[6]) == 0.0
    zero = look(
        lambda rows: torch.zeros(len(rows), 2) + 1e-7 * (len(rows) == 1),
        torch.zeros(3, 1),
        torch.zeros(3),
        generator=torch.Generator(),
    )
    assert zero.moved.tolist() == pytest.approx([0.1] * 3)  # relative to 1e-6 at the least


def test_other_batches_are_for_a_few_of_the_right_and_of_the_wrong_until_one_is_odd() -> None:
    n = 250
    x = torch.arange(n).float()[:, None]
    y = (torch.arange(n) % 5 == 0).long()  # a fifth of them is wrong
    asked: list[Tensor] = []

    def predict(rows: Tensor) -> Tensor:
        asked.append(rows[:, 0].long())
        return two_classes(1 + 0 * rows[:, 0])

    def seen_by(seed: int, predict: Predict) -> list[tuple[int, int]]:
        asked.clear()
        seen = look(predict, x, y, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(seen.steady, seen.moved == 0)
        assert torch.equal((~seen.steady).nonzero().flatten(), odd.nonzero().flatten())
        return [(len(rows), int(y[rows].sum())) for rows in asked]

    odd = torch.zeros(n, dtype=torch.bool)
    batches = seen_by(0, predict)
    assert [size for size, _ in batches] == [n, *[1] * 12, *[7] * 4, 64]
    alone, sevens = torch.cat(asked[1:13]), torch.cat(asked[13:17])
    assert (int(y[alone].sum()), int(y[sevens].sum())) == (6, 14)
    assert set(alone.tolist()) < set(sevens.tolist()) < set(asked[17].tolist())
    assert int(y[asked[17]].sum()) == 32
    assert torch.equal(sevens, sevens.unique())  # in their order, none of them twice
    seen_by(0, predict)
    assert torch.equal(torch.cat(asked[13:17]), sevens)
    seen_by(1, predict)
    assert not torch.equal(torch.cat(asked[13:17]), sevens)

    odd[sevens[20]] = True  # one that is drawn; whoever else is odd is found too
    odd[next(row for row in range(n) if row not in sevens)] = True

    def in_sevens(rows: Tensor) -> Tensor:
        return predict(rows) * torch.where(odd[rows[:, 0].long()] & (len(rows) in (5, 7)), -1, 1)[:, None]

    whole = [n, *[1] * n, *[7] * 35, 5, 64, 64, 64, 58]
    assert [size for size, _ in seen_by(0, in_sevens)] == [n, *[1] * 12, *[7] * 4, 64, *whole[1:]]


@pytest.mark.parametrize(("noise", "odd"), [(2e-4, 0), (5e-3, 1)])
def test_a_sum_that_cancels_is_as_unsure_as_others(noise: float, odd: int) -> None:
    """Logits of about 10, but for one sample of about 0.01: what moves alone is rounding, or more than that."""
    logits = torch.tensor([[10.0, 3.0]]).repeat(40, 1)
    logits[7] = torch.tensor([0.01, -0.01])

    def predict(x: Tensor) -> Tensor:
        rows = x[:, 0, 0, 0].long()
        alone = (rows == 7)[:, None] * torch.tensor([noise, 0.0]) * (len(x) == 1)
        return logits[rows] + alone

    x = torch.arange(40.0)[:, None, None, None].expand(40, 3, 2, 2)
    seen = look(predict, x, torch.zeros(40, dtype=torch.int64), generator=torch.Generator().manual_seed(2))
    everyone = look(predict, x[5:10], torch.zeros(5, dtype=torch.int64), generator=torch.Generator())
    assert int((everyone.moved > 0).sum()) == odd
    assert int((seen.moved > 0).sum()) <= odd


def test_a_look_waits_for_an_accelerator_once() -> None:
    net = copy.deepcopy(NET).to(META)
    x, y = torch.empty((70, *X.shape[1:]), device=META), torch.empty(70, dtype=torch.int64, device=META)
    with watched(answer=0.0) as seen:
        assert look(net, x, y, generator=torch.Generator()).label.shape == (70,)
    assert ([line.split(":")[0] for line in seen.copies], len(seen.waits)) == (["device.py"], 1)


def test_what_is_found_and_left_in_the_modules_is_counted() -> None:
    linear, norm, dropout = nn.Linear(2, 2).double(), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout())
    norm.running_var = torch.ones(2, dtype=torch.float16)
    net = nn.Sequential(linear, norm, dropout).eval()
    dropout.train()
    linear.bias.requires_grad_(False)
    wanted = [p.requires_grad for p in net.parameters()]
    norm.weight.grad = torch.ones(2)
    modules = (net, dropout)  # a module that is there twice counts once
    caller = torch.get_rng_state()
    with undisturbed(modules, CPU) as traces:
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        assert (traces().training, traces().not_float32, traces().changed) == (2, 3, 0)
        torch.rand(1)
        linear.weight.data += 1
        assert traces().changed == 1
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        assert traces().changed == 2
        norm.weight.grad.mul_(2)
        assert traces().changed == 3
        norm.weight.grad = torch.ones(2)
        assert traces().changed == 3  # the same numbers, but not the caller's
        norm.bias.grad = torch.zeros(2)
        assert traces().changed == 4
    assert [m.training for m in net.modules()] == [False, False, False, True, True]
    assert [p.requires_grad for p in net.parameters()] == wanted
    assert torch.equal(torch.get_rng_state(), caller)


def test_a_watched_predictor_counts_every_way_in() -> None:
    beats: list[int] = []
    meter = Meter(lambda: beats.append(1))
    plain = meter.watched(Predictor(NET, NET, (NET,)))
    assert plain.embed is None
    assert plain.modules == (NET,)
    whole = meter.watched(PREDICTOR)
    assert whole.embed is not None
    for predict, expected in ((whole.logits, NET(X[:3])), (whole.search, NET(X[:3])), (whole.embed, ENCODER(X[:3]))):
        torch.testing.assert_close(predict(X[:3]), expected, atol=1e-5, rtol=1e-5)
    assert (meter.read(), len(beats)) == ((9, 0), 3)


# The copy that attacks look through


class Layers(nn.Module):
    """Norms that can be folded, and some that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.biased = nn.Conv2d(4, 4, 1)
        self.plain = nn.BatchNorm2d(4, affine=False, eps=0.1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.after_twice = nn.BatchNorm2d(4)
        self.some = nn.Conv2d(4, 4, 1)
        self.others = nn.Conv2d(4, 4, 1)
        self.shared = nn.BatchNorm2d(4)
        self.alone = nn.BatchNorm2d(4)  # not fed by a layer
        self.linear = nn.Linear(4, 5)
        self.flat = nn.BatchNorm1d(5)
        self.batch = nn.BatchNorm1d(5, track_running_stats=False)
        self.last = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.biased(self.norm(self.conv(x)).tanh()))
        x = self.after_twice(self.twice(self.twice(x).tanh()))
        x = self.shared(self.some(x)) + self.shared(self.others(x))
        x = self.alone(x.tanh()).mean((2, 3))
        out: Tensor = self.batch(self.last(self.flat(self.linear(x))))
        return out


def test_every_norm_behind_one_layer_is_folded_and_no_other() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = Layers()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                if part.affine:
                    nn.init.uniform_(part.weight, 0.5, 2)
                    nn.init.uniform_(part.bias, -1, 1)
                if part.running_mean is not None and part.running_var is not None:
                    part.running_mean.uniform_(-1, 1)
                    part.running_var.uniform_(0.3, 3)
    net.double().eval()
    x = X[:8].double()
    expected = net(x).detach()
    folded = copy.deepcopy(net).requires_grad_(False)
    folding._fold(folded, x)
    gone = {name for name, part in folded.named_children() if isinstance(part, nn.Identity)}
    assert gone == {"norm", "plain", "flat"}
    torch.testing.assert_close(logits_at(folded, x), expected, atol=1e-9, rtol=0)
    assert not any(p.requires_grad for p in folded.parameters())
    assert not any(part._forward_hooks for part in folded.modules())
    assert all(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in (net.norm, net.plain, net.flat))


def test_the_copy_is_the_folded_one_where_that_is_the_same_and_lies_channels_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).train()
    layouts: list[bool] = []

    def fold(network: nn.Module, images: Tensor) -> None:
        assert not network.training
        assert images.shape == (8, 3, 8, 8)
        list(network.parameters())[1].add_(change)  # the bias of the layer
        network.register_forward_pre_hook(
            lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )

    monkeypatch.setattr(folding, "_fold", fold)
    scale = float(logits_at(copy.deepcopy(net).eval(), X[:8]).abs().max())
    change = 0.0
    for share, chosen in ((0.5e-4, True), (3e-4, False)):
        change = share * scale
        layouts.clear()
        search = frozen_copy(net, X[:8])
        calls = len(layouts)
        search(X)
        assert (len(layouts) > calls) == chosen
        assert not chosen or layouts[-1]
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


# A classifier as attacks see it


def test_images_or_their_crops_are_what_is_attacked() -> None:
    model = Model(width=8, hidden_dim=16, embedding_dim=8)
    encoder = build_encoder(model, generator=addressed_generator("test encoder")).eval().requires_grad_(False)
    source = CropSource(group=Crops(count=3, size=8), augment=Augment(), seed=0, split="test")
    head = LinearHead(16, 4)
    nn.init.normal_(head.weight, generator=addressed_generator("head"))
    nn.init.normal_(head.bias, generator=addressed_generator("bias"))
    classifier = Classifier(encoder, head.requires_grad_(False), features="pre_feature", crops=source).eval()
    x, indices = X[:6], torch.tensor([4, 70, 2, 3, 9, 11])

    places = CropsOfImages(x, indices, eps=EPS, norm="linf")
    assert places.shared == 0
    by_image = as_predictor(classifier, x, space="image", places=places)
    own = classifier.read(x, indices)
    assert by_image.modules == (classifier,)
    assert by_image.embed is not None
    torch.testing.assert_close(by_image.embed(x), own)
    moved = (x + EPS * torch.sign(signed(*x.shape, key="moved")).float()).clamp(0, 1)
    for predict in (by_image.logits, by_image.search):
        torch.testing.assert_close(predict(x), classifier.logits(own), atol=1e-4, rtol=1e-4)
        expected = classifier(moved, indices)  # moved as far as may be, in whatever company
        torch.testing.assert_close(predict(moved), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(predict(moved[[5, 2]]), expected[[5, 2]], atol=1e-4, rtol=1e-4)

    crops = stacked_crops(classifier, x, indices)
    cut = classifier.cut(x, indices)  # (3, 6, 3, 8, 8)
    assert crops.shape == (6, 9, 8, 8)
    for sample in range(6):
        for view in range(3):
            assert torch.equal(crops[sample, 3 * view : 3 * view + 3], cut[view, sample].clamp(0, 1))
    by_crops = as_predictor(classifier, crops, space="crops")
    assert (by_crops.modules, by_crops.embed) == ((classifier,), None)
    expected = classifier.logits(torch.stack([encoder.features(part, features="pre_feature") for part in cut]).mean(0))
    for predict in (by_crops.logits, by_crops.search):
        torch.testing.assert_close(predict(crops), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_a_point_within_eps_is_read_through_the_crops_of_its_own_image(norm: Norm) -> None:
    """Also where it is nearest to another: such images read the crops of the first."""
    x, indices, eps = X[:12].clone(), torch.arange(100, 112), 0.04 if norm == "linf" else 0.5
    x[7] = (x[3] + 1.5 * eps * (torch.ones(3, 8, 8) if norm == "linf" else torch.eye(8) / 24**0.5)).clamp(0, 1)
    x[9] = x[7]
    places = CropsOfImages(x, indices, eps=eps, norm=norm)
    assert places.shared == 2
    expected = indices.clone()
    expected[[7, 9]] = 103
    way = x.roll(1, 0) - x  # towards another image, as far as may be; for 3 towards 7
    way[3] = x[7] - x[3]
    step = eps * (way.sign() if norm == "linf" else way / norms(way, norm="l2").clamp_min(1e-9)[:, None, None, None])
    step[norms(step, norm=norm) > norms(way, norm=norm)] = way[norms(step, norm=norm) > norms(way, norm=norm)]
    assert torch.equal(places(x), expected)
    assert torch.equal(places(x + step), expected)
    assert CropsOfImages(x, indices, eps=0.7 * eps, norm=norm).shared == 1  # the way between 3 and 7 is too long
    assert torch.equal(places((x + step)[[4, 3]]), expected[[4, 3]])


# Examples and their picture


def fallen(block: int, stage: int, broken: str) -> Outcome:
    bits, none = tuple(bit == "1" for bit in broken), (False,) * len(broken)
    return Outcome(block, stage, "x", none, bits, none, none, none, 0, 0, 0.0)


def examples_of(*positions: int) -> Examples:
    """Images that are as bright as their place."""
    images = torch.stack([torch.full((3, 2, 2), place / 100) for place in positions])
    return Examples(positions, images, tuple(place + 5 for place in positions))


def test_the_first_examples_are_kept_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "examples.safetensors"
    outcomes = {(0, 0): fallen(0, 0, "1000"), (0, 1): fallen(0, 1, "0010")}  # a misclassified image is no example
    gallery = Gallery(path, outcomes, block_size=4, wanted=4)
    assert gallery.outcomes is outcomes
    assert (gallery.missing(), gallery.shown()) == ({(0, 1)}, [])
    gallery.add(outcomes[0, 1], examples_of(2))
    assert gallery.missing() == set()
    outcomes[1, 1] = fallen(1, 1, "1111")
    gallery.add(outcomes[1, 1], examples_of(4, 5, 6, 7))  # no more than four in all
    assert [(place, label) for place, _, label in gallery.shown()] == [(2, 7), (4, 9), (5, 10), (6, 11)]
    assert [float(image[0, 0, 0]) for _, image, _ in gallery.shown()] == pytest.approx([0.02, 0.04, 0.05, 0.06])
    outcomes[0, 2] = fallen(0, 2, "0100")
    assert gallery.missing() == {(0, 2)}  # a stage before what was kept
    gallery.add(fallen(0, 2, "0100"), examples_of(1))
    assert [place for place, _, _ in gallery.shown()] == [1, 2, 4, 5]

    again = Gallery(path, outcomes, block_size=4, wanted=4)
    assert again.missing() == set()
    for (place, image, label), (_, before, _) in zip(again.shown(), gallery.shown(), strict=True):
        assert torch.equal(image, before)
        assert label == place + 5
    stored = read_tensors(path)
    assert stored["positions"].tolist() == [1, 2, 4, 5, 6]
    assert stored["labels"].tolist() == [6, 7, 9, 10, 11]
    assert stored["images"][:, 0, 0, 0].tolist() == pytest.approx([0.01, 0.02, 0.04, 0.05, 0.06])
    assert Gallery(path, outcomes, block_size=4, wanted=0).shown() == []


@pytest.mark.parametrize("content", [b"", b"no tensors at all", {}, {"images": 1, "labels": 2}])
def test_examples_that_cannot_be_read_are_made_again(tmp_path: Path, content: bytes | dict[str, int]) -> None:
    path = tmp_path / "examples.safetensors"
    if isinstance(content, dict):  # some are missing, or fewer than the others
        write_tensors(path, {"positions": torch.tensor([2, 3])} | {k: torch.ones(n) for k, n in content.items()})
    else:
        path.write_bytes(content)
    gallery = Gallery(path, {(0, 1): fallen(0, 1, "0010")}, block_size=4, wanted=4)
    assert gallery.missing() == {(0, 1)}
    gallery.add(fallen(1, 1, "0000"), Examples((), torch.empty(0, 3, 2, 2), ()))
    assert isinstance(content, dict) or path.read_bytes() == content  # nothing new is nothing to write


def drawn(size: tuple[int, int], texts: Sequence[tuple[tuple[int, int], str, tuple[int, int, int]]]) -> Image.Image:
    """A sheet of paper with these texts."""
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for place, text, ink in texts:
        draw.text(place, text, fill=ink, font=ImageFont.load_default())
    return canvas


def test_a_sheet_shows_clean_adversarial_and_amplified_difference() -> None:
    """Four samples of 40 x 30 pixels, four times enlarged, three in a row and one below."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand((4, 3, 30, 40), generator=generator)
    adversarial = (clean + 0.2 * torch.rand((4, 3, 30, 40), generator=generator) - 0.1).clamp(0, 1)
    names = [f"sample {i}" for i in range(4)]
    long = "a class whose name is far too long for the place below three little pictures " * 2
    shown = [
        pictures.Shown(clean=c, adversarial=a, title=t, label="caf\u00e9", predicted=long)
        for c, a, t in zip(clean, adversarial, names, strict=True)
    ]
    sheet = Image.open(io.BytesIO(pictures.sheet(shown, heading=("what it is", "how \u00b5"), gain=3.0)))
    font = ImageFont.load_default()
    tile_w, tile_h = 160, 120  # 4 times: nearest to 112 on the smaller side
    cell_w, cell_h, top = 3 * tile_w + 4, tile_h + 3 * 14 + 8, 8 + 3 * 14
    assert (sheet.mode, sheet.size) == ("RGB", (3 * (cell_w + 16), top + 2 * cell_h))
    cut = f"adversarial: predicted as {long}"
    while font.getlength(cut) > cell_w:
        cut = cut[:-4] + "..."
    texts = [((8, 8), "what it is", (20, 20, 20)), ((8, 22), "how ?", (20, 20, 20))]
    corners = [(8 + i % 3 * (cell_w + 16), top + i // 3 * cell_h) for i in range(4)]
    for (left, upper), name in zip(corners, names, strict=True):
        texts.append(((left, upper + tile_h + 2), f"{name}: caf?, predicted so when clean", (20, 20, 20)))
        texts.append(((left, upper + tile_h + 16), cut, (170, 20, 20)))
    expected = drawn(sheet.size, texts)
    for i, (left, upper) in enumerate(corners):
        for column, image in enumerate((clean[i], adversarial[i], 0.5 + 3 * (adversarial[i] - clean[i]))):
            pixels = (image.clamp(0, 1) * 255).round().byte().repeat_interleave(4, 1).repeat_interleave(4, 2)
            expected.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), (left + column * (tile_w + 2), upper))
    assert sheet.tobytes() == expected.tobytes()


def test_a_sheet_of_one_is_as_wide_as_its_heading() -> None:
    small = torch.zeros(3, 100, 200)
    shown = pictures.Shown(clean=small, adversarial=small, title="t", label="l", predicted="p")
    font = ImageFont.load_default()
    narrow = Image.open(io.BytesIO(pictures.sheet([shown], heading=("w",), gain=1.0)))
    assert narrow.size == (3 * 200 + 4 + 16, 8 + 2 * 14 + 100 + 3 * 14 + 8)
    assert narrow.getpixel((8 + 2 * 202 + 5, 8 + 28 + 5)) == (128, 128, 128)  # no difference is middle grey
    heading = "w" * 200
    wide = Image.open(io.BytesIO(pictures.sheet([shown], heading=("w", heading, "w"), gain=1.0)))
    assert wide.size == (round(font.getlength(heading)) + 16, 8 + 4 * 14 + 100 + 3 * 14 + 8)
    large = torch.zeros(3, 300, 300)  # never made smaller
    shown = pictures.Shown(clean=large, adversarial=large, title="t", label="l", predicted="p")
    assert Image.open(io.BytesIO(pictures.sheet([shown], heading=("w",), gain=1.0))).size == (920, 386)


def test_text_is_cut_to_its_place_and_drawn_in_ascii() -> None:
    font = ImageFont.load_default()
    assert pictures._fitting("plain", 1000, font) == "plain"
    assert pictures._fitting("plain", round(font.getlength("plain")) + 1, font) == "plain"
    assert pictures._fitting("a long text", round(font.getlength("a lo...")) + 1, font) == "a lo..."
    assert pictures._fitting("words", 0, font) == "w..."
    assert pictures._plain(" ~a\x1f\x7f\u00e9\n") == " ~a????"
