"""Whether an evaluation can be trusted: each check a figure, a limit and a verdict.

The checks follow Carlini et al., arXiv:1902.06705 (on evaluating robustness), Croce & Hein, arXiv:2003.01690, and
Pintor et al., arXiv:2106.09947 (indicators of attack failure). `cheap_checks` cost a few passes over some images;
`full_checks` attack those images again with attacks of their own, and hold answers and gradients against each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from cfamc_cli.engine.attacks.apgd import apgd
from cfamc_cli.engine.attacks.pgd import fgsm, pgd
from cfamc_cli.engine.attacks.plan import Plan, run_stage
from cfamc_cli.engine.attacks.search import Predict, Region, climb, fooled, logits_at
from cfamc_cli.engine.attacks.square import square
from cfamc_cli.engine.ball import random_start
from cfamc_cli.engine.device import move
from cfamc_cli.engine.distributed import ALONE, World, pooled_texts
from cfamc_cli.engine.evaluation.honesty import (
    agreement,
    apart,
    in_new_process,
    leap,
    leap_between,
    loss_in_noise,
    losses,
    of_8_bits,
    rounded,
    standardised,
    without_memory,
)
from cfamc_cli.engine.evaluation.verify import Traces, in_region
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.recipe.schema import EmbeddingAttack, Norm, SquareAttack, reach
from cfamc_cli.store.records import Flag

_RANDOM = 1e-4  # relative difference of the logits of two equal passes
_LARGE_GAP = 60.0  # between the two largest logits: beyond it the softmax of float32 has no gradient left
_BLIND = 0.05  # share of samples without gradient, or with such a gap
_BLACK_BOX = 0.002  # share of samples that a black-box attack may add
_ADAPTIVE = 0.1  # share of samples that an attack with another loss may add to a weaker evaluation
_WIDE_GAP = 30.0  # between the two largest logits: a loss of float32 is 0 there, and says nothing to a step size
_UNSURE = 1.01  # times the chance level: a largest probability below it, and the softmax tells no class from another
_SHIFTED = 1e4  # times their spread: logits with such a mean lose their last bits
_TIED = 1e-4  # of z_(1) - z_(3): the second and third logit so close leave the difference of logits ratio constant
_SAME = 1e-3  # of the largest logit: two answers to one image that lie so close are the same
_LEAPS = 1.8  # times as far as just before: an answer that moves so at once, somewhere from the border outwards
_SHRUNK = 1.4  # the same for the median image (networks: 1.1, trained against attacks or not)
_WOKEN = 0.1  # share of samples whose answer may leap so (networks: 0, rarely 0.02)
_AGREES = 0.8  # cosine between what gradients and differences say (networks: 0.99, rarely 0.9)
_LOOKED_AT = 32  # images whose gradients are held against differences


def judge(name: str, figure: float, limit: float, text: str) -> Flag:
    """A check that passes while its figure is at most its limit.

    Args:
        name: Stable identifier, such as "zero-gradient".
        figure: What was measured.
        limit: The figure passes up to this value.
        text: What the figure counts, for a person; names the samples concerned where there are few.
    """
    return Flag(name=name, figure=figure, limit=limit, verdict="passed" if figure <= limit else "failed", text=text)


def skipped(name: str, text: str) -> Flag:
    """A check that could not be made."""
    return Flag(name=name, figure=0, limit=0, verdict="skipped", text=text)


def trace_checks(traces: Traces) -> list[Flag]:
    """What was wrong with the modules before, and what is different after."""
    return [
        judge("training-mode", traces.training, 0, "modules found in training mode (evaluated in eval mode)"),
        judge("precision", traces.not_float32, 0, "parameters and buffers that are not float32"),
        judge("trace", traces.changed, 0, "parameters, buffers and gradients that the evaluation changed"),
    ]


class _GradientWatch(TorchFunctionMode):
    """Sees whether any operation runs with gradients enabled although the caller disabled them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += torch.is_grad_enabled()
        return func(*args, **(kwargs or {}))


def plan_checks(plan: Plan) -> list[Flag]:
    """Whether the attack can get to the border of its ball at all."""
    reaches = [float(way) for stage in plan.stages if (way := reach(stage)) is not None]
    text = "radius, which steps x step size have to cover"
    return [judge("reach", plan.eps, min(reaches), text)] if reaches else []


def cheap_checks(predict: Predict, x: Tensor, y: Tensor) -> list[Flag]:
    """The checks that are always on: two passes forward and one backward over a few images.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1], (N, C, H, W), N at least 1.
        y: Labels, (N,).
    """
    with torch.no_grad(), _GradientWatch() as watch:
        first = predict(x).detach()
    second = logits_at(predict, x)
    change = (first - second).abs().amax() / first.abs().amax().clamp_min(1e-6)
    finite = first.isfinite().all(1)
    told, _, grad = climb(predict, x, lambda z: cross_entropy(z, y, reduction="none"))
    other = apart(told, second) > _SAME
    blind = (grad.flatten(1).abs().amax(1) == 0) | ~grad.flatten(1).isfinite().all(1)
    sums = (first.sum(1) - 1).abs() < 1e-3
    probable = finite & (first >= 0).all(1) & (first <= 1).all(1) & sums
    top = first.nan_to_num().topk(2, dim=1).values
    gap, n = top[:, 0] - top[:, 1], len(x)

    def share(rows: Tensor) -> float:
        return float(rows.sum()) / n

    return [
        judge("random", float(change.nan_to_num(nan=0.0)), _RANDOM, "relative change of the logits in an equal pass"),
        judge("test-time-gradient", watch.operations, 0, "operations of a prediction that ran with gradients on"),
        judge("grad-mode", share(other), _BLIND, f"share of {n} answers that are others where a gradient is asked for"),
        judge("zero-gradient", share(blind), _BLIND, f"share of {n} images without a usable gradient"),
        judge("probabilities", share(probable), _BLIND, f"share of {n} outputs that are no logits"),
        judge("logit-scale", share(gap > _LARGE_GAP), _BLIND, f"share of {n} outputs whose two largest are 60 apart"),
        judge("logit-gap", share(gap > _WIDE_GAP), 0.5, f"share of {n} outputs whose two largest are 30 apart"),
        judge("type", float(first.dtype != torch.float32), 0, f"logits are {first.dtype}"),
        *_loss_checks(first.float().nan_to_num(), y),
    ]


def _loss_checks(z: Tensor, y: Tensor) -> list[Flag]:
    """Whether the losses of attacks can see which class is next, from logits (N, classes) of clean images."""
    n, classes = z.shape
    unsure = z.softmax(1).amax(1) * classes < _UNSURE
    shifted = z.mean(1).abs() > _SHIFTED * z.std(1)
    checks = [
        judge("temperature", float(unsure.sum()) / n, 0.5, f"share of {n} outputs that the softmax makes all alike"),
        judge("logit-shift", float(shifted.sum()) / n, _BLIND, f"share of {n} outputs far from 0 for their spread"),
    ]
    if classes < 3:
        return [*checks, skipped("ratio-tied", "two logits have no ratio"), skipped("decoy", "no third class")]
    top = z.topk(3, dim=1)
    first, second, third = top.values.T
    tied = second - third <= _TIED * (first - third)
    runners_up = top.indices[:, 1].bincount(minlength=classes)
    runners_up[y] = 0  # a class that images are of may be the next of many
    text = f"of {n} images the largest number with one and the same next class that no image is of"
    return [
        *checks,
        judge("ratio-tied", float(tied.sum()) / n, 0.25, f"share of {n} outputs whose logits ratio is constant"),
        judge("decoy", int(runners_up.max()), max(5, n // 2), text),
    ]


@dataclass(frozen=True)
class AuditSettings:
    """How much the full audit spends, and whom it asks beside the predictor."""

    samples: int = 100  # the first samples of the order that are classified right; at most so many are attacked again
    steps: int = 20  # steps of its PGD; each step is 2.5 eps / steps long
    queries: int = 500  # queries of its black-box attack
    anew: Callable[[], Predict] | None = None  # makes the predictor in a new process, to which it is pickled
    sources: Mapping[str, Predict] = field(default_factory=dict)  # other networks of the same classes, by name


def drift_check(early: Tensor, late: Tensor) -> Flag:
    """Answers to the first queries of an evaluation, (N, classes), and to the same queries after all others."""
    text = "relative change of the first answers when they were asked for again at the end"
    return judge("drift", float(apart(early, late).amax()), _RANDOM, text)


def full_checks(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    search: Predict,
    fresh: Predict | None,
    network: Predict | None = None,
    plan: Plan,
    broken: Tensor,
    places: Tensor,
    settings: AuditSettings,
    seed: int,
    world: World = ALONE,
) -> list[Flag]:
    """The checks that attack again, and those of answers and gradients.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1] that are classified right, (N, C, H, W).
        y: Labels, (N,).
        search: What the evaluation attacked through.
        fresh: A copy of what `predict` calls that was never asked; None where it cannot be copied.
        network: A copy of the module alone that `predict` uses, where it has logits of its own.
        plan: What was evaluated.
        broken: Which of them the evaluation broke, (N,) bool.
        places: Their places in the order of the evaluation, (N,).
        settings: How much to spend, and whom to ask.
        seed: Of everything random.
        world: The processes that share the checks, each called with the same arguments; each gets them all.
    """
    if len(x) == 0:
        return [skipped(name, "no image is classified right and steady") for name in ("audit", "process", "between")]
    audit = _Audit(predict, search, fresh, network, x, y, places.cpu(), plan.eps, plan.norm, seed, settings)
    if plan.eps == 0:
        why = "a ball of radius 0 leaves nothing to attack again"
        return [audit.identity(plan), *(skipped(name, why) for name in ("audit", "process", "between"))]
    blinded = all(isinstance(stage, SquareAttack) for stage in plan.stages)
    parts: list[Callable[[], list[Flag]]] = [
        lambda: [audit.identity(plan)],
        audit.curve,
        audit.strength,
        lambda: audit.black_box(broken, blinded=blinded),
        lambda: [audit.transfer(broken), audit.process()],
        lambda: [audit.ascent(), audit.gradients()],
        audit.answers,
        lambda: audit.adaptive(broken, blinded=blinded),
        lambda: audit.rounding(broken),
    ]
    own = [[flag.model_dump() for flag in part()] for part in parts[world.rank :: world.size]]
    everyones = [json.loads(text) for text in pooled_texts(json.dumps(own), world)]  # by rank, and by turn
    flags = [flag for place in range(len(parts)) for flag in everyones[place % world.size][place // world.size]]
    return [Flag.model_validate(flag) for flag in flags]


@dataclass(frozen=True)
class _Audit:
    """The images of an audit and what it attacks them with."""

    predict: Predict
    search: Predict
    fresh: Predict | None
    network: Predict | None
    x: Tensor
    y: Tensor
    places: Tensor
    eps: float
    norm: Norm
    seed: int
    settings: AuditSettings

    def region(self, eps: float) -> Region:
        return Region.around(self.x, eps=eps, norm=self.norm)

    def generator(self, label: str) -> torch.Generator:
        return addressed_generator("audit", self.seed, label)

    def slack(self, share: float) -> int:
        """So many images are a share of them, and at least one."""
        return max(1, round(share * len(self.x)))

    def breaks(self, eps: float, points: Tensor) -> Tensor:
        """Which images an attack that found `points` breaks with an example that holds, (N,) bool."""
        valid = in_region(self.x, points, eps=eps, norm=self.norm)
        return valid & fooled(logits_at(self.predict, points.where(valid[:, None, None, None], self.x)), self.y)

    def climbed(self, eps: float, *, steps: int, restarts: int = 1, through: Predict | None = None) -> Tensor:
        """Where PGD from the clean images ends, (N, C, H, W)."""
        return pgd(
            through or self.predict,
            self.region(eps),
            self.y,
            step_size=2.5 * eps / self.settings.steps,
            steps=steps,
            restarts=restarts,
            start="zero",
            generator=self.generator("pgd"),
        )

    def pgd(self, eps: float, *, steps: int, restarts: int = 1) -> Tensor:
        return self.breaks(eps, self.climbed(eps, steps=steps, restarts=restarts))

    @cached_property
    def ends(self) -> Tensor:
        """Where its PGD ends."""
        return self.climbed(self.eps, steps=self.settings.steps)

    @cached_property
    def fallen(self) -> Tensor:
        """Which images it breaks, (N,) bool."""
        return self.breaks(self.eps, self.ends)

    @cached_property
    def inside(self) -> Tensor:
        """A random point of the ball around each image."""
        drawn = random_start(self.x, eps=self.eps, norm=self.norm, generator=self.generator("inside"))
        return self.x + drawn

    def fgsm(self, eps: float) -> Tensor:
        return fgsm(self.predict, self.region(eps), self.y)

    def named(self, rows: Tensor) -> str:
        """The places of a few images in the order of the evaluation."""
        places = self.places[rows.cpu()].tolist()
        shown = ", ".join(map(str, places[:20]))
        return f": number {shown}{', ...' if len(places) > 20 else ''} of the order" if places else ""

    def identity(self, plan: Plan) -> Flag:
        """With eps = 0 every attack returns the clean images, bit for bit."""
        moved = 0
        for stage in plan.stages:
            if isinstance(stage, EmbeddingAttack):
                continue
            still, generator = stage.model_copy(update={"eps": "0"}), self.generator("identity")
            points = run_stage(still, self.predict, self.x, self.y, embed=None, eot=plan.eot, generator=generator)
            moved += int((points != self.x).flatten(1).any(1).sum())
        return judge("eps-zero", moved, 0, "images that an attack moved although eps was 0")

    def curve(self) -> list[Flag]:
        """Accuracy falls as eps rises, and nothing survives eps = 1."""
        eps = self.eps
        largest = 128 / 255 if self.norm == "linf" else 0.5 * self.x[0].numel() ** 0.5
        whole = 1.0 if self.norm == "linf" else float(self.x[0].numel() ** 0.5)
        radii = sorted({eps / 2, eps, *(r for r in (2 * eps, 4 * eps, largest / 4, largest) if eps < r < whole), whole})
        fallen = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        accuracies, lost = [], 0
        for radius in radii:
            found = self.fallen if radius == eps else self.pgd(radius, steps=self.settings.steps)
            lost += int((fallen & ~found).sum())
            fallen |= found
            accuracies.append(1 - float(fallen.sum()) / len(fallen))
        points = ", ".join(f"{r:.4g}: {a:.3f}" for r, a in zip(radii, accuracies, strict=True))
        slack = self.slack(0.02 * len(radii))
        return [
            judge("eps-one", accuracies[-1], 0.0, f"accuracy at the radius of the whole box; the curve is {points}"),
            judge("eps-monotone", lost, slack, "times that a larger eps missed an image broken at a smaller one"),
            judge("eps-flat", accuracies[-2], 0.1, f"accuracy at eps = {radii[-2]:.4g}, half of the box"),
        ]

    def strength(self) -> list[Flag]:
        """Iterating helps: PGD against FGSM, more steps and restarts against fewer."""
        eps, steps = self.eps, self.settings.steps
        missed = self.breaks(eps, self.fgsm(eps)) & ~self.fallen
        longer = self.pgd(eps, steps=2 * steps)
        again = self.pgd(eps, steps=steps, restarts=2)
        slack = self.slack(_BLACK_BOX)
        return [
            judge("fgsm-over-pgd", int(missed.sum()), slack, "images that only FGSM broke" + self.named(missed)),
            judge("more-steps", int((self.fallen & ~longer).sum()), 0, "images broken with fewer steps only"),
            judge("more-restarts", int((self.fallen & ~again).sum()), 0, "images broken with fewer restarts only"),
        ]

    def black_box(self, broken: Tensor, *, blinded: bool) -> list[Flag]:
        """Attacks without gradients break next to nothing that attacks with gradients missed."""
        if blinded:
            return [skipped("black-box", "the evaluation itself is without gradients")]
        region, queries = self.region(self.eps), self.settings.queries
        points = square(self.predict, region, self.y, queries=queries, generator=self.generator("square"))
        beyond = self.breaks(self.eps, points) & ~(broken | self.fallen)
        text = f"images broken by {queries} queries of Square alone" + self.named(beyond)
        return [judge("black-box", int(beyond.sum()), self.slack(_BLACK_BOX), text)]

    def transfer(self, broken: Tensor) -> Flag:
        """Examples of other networks break next to nothing that attacks on this one missed."""
        if not self.settings.sources:
            return skipped("transfer", "no other network was named: --source")
        beyond = torch.zeros_like(broken)
        for source in self.settings.sources.values():
            points = self.climbed(self.eps, steps=self.settings.steps, through=source)
            beyond |= self.breaks(self.eps, points) & ~(broken | self.fallen)
        text = f"images that only fell to examples of {', '.join(self.settings.sources)}" + self.named(beyond)
        return judge("transfer", int(beyond.sum()), self.slack(_BLIND), text)

    def process(self) -> Flag:
        """A new process, which shares no memory with this one, answers the same."""
        if self.settings.anew is None:
            return skipped("process", "no other process can make the predictor")
        n = len(self.x)
        points = torch.cat((self.ends, self.inside, self.x))
        order = torch.randperm(len(points), generator=self.generator("process"))
        answers = in_new_process(self.settings.anew, points[order])
        if answers is None:
            return skipped("process", "a new process could not make the predictor")
        known = torch.cat([logits_at(self.predict, part) for part in points.split(n)]).cpu()
        other = (apart(known[order], answers) > _SAME)[order.argsort()].view(3, n).any(0)
        return judge("process", int(other.sum()), 0, "images that a new process answers in another way")

    def ascent(self) -> Flag:
        """The loss rises along the gradient (Pintor et al., arXiv:2106.09947, on attacks that do not optimise)."""
        points = self.fgsm(min(self.eps, 0.25 / 255) if self.norm == "linf" else self.eps / 100)
        before, after = (losses(logits_at(self.predict, images), self.y) for images in (self.x, points))
        flat = float((after <= before).sum()) / len(self.x)
        return judge(
            "no-ascent", flat, _BLIND, "share of images whose loss does not rise by a small step along its gradient"
        )

    def gradients(self) -> Flag:
        """What was attacked through has the gradient of what was judged: at the images, in the ball, where PGD ends."""
        y = self.y[:_LOOKED_AT]
        worst = torch.ones(len(y), device=y.device)
        for points in (self.x, self.inside, self.ends):
            for through in (self.search, self.predict):
                generator = self.generator("directions")
                found = agreement(self.predict, through, points[:_LOOKED_AT], y, generator=generator)
                worst = torch.minimum(worst, found)
        share = float((worst < _AGREES).sum()) / len(y)
        text = f"share of {len(y)} images whose gradients, here or in the ball, differences do not confirm"
        return judge("gradient", share, _BLIND, text)

    def answers(self) -> list[Flag]:
        """Answers are those of one function, smooth across the border of the ball."""
        eps, region = self.eps, self.region(self.eps)
        leaps = leap(self.predict, self.x, eps=eps, norm=self.norm, generator=self.generator("leap"))
        noise = loss_in_noise(self.predict, region, self.y, draws=10, generator=self.generator("noise"))
        at_ends = logits_at(self.predict, self.ends)
        lead = noise - losses(at_ends, self.y)  # of what PGD climbs
        useless = ~fooled(at_ends, self.y).cpu() & (lead > _SAME * float(at_ends.abs().amax()))
        other = torch.zeros_like(self.fallen)
        for points in (self.x, self.inside, self.ends):
            other |= apart(logits_at(self.predict, points), logits_at(self.search, points)) > _SAME
        n = len(self.x)
        share = float((leaps > _LEAPS).sum()) / n
        half = "times as far as just before on the way to other images, where most, for the median image"
        between = skipped("between", "one image has no other")
        if n > 1:
            between = judge("between", float(leap_between(self.predict, self.x).median()), _LEAPS, half)
        return [
            judge("radius", float(leaps.median()), _SHRUNK, "times as far as just before, where most outwards"),
            judge("leap", share, _WOKEN, f"share of {n} images whose answers leap outside the ball"),
            between,
            judge("noise-over-pgd", int(useless.sum()), self.slack(_BLIND), "images that noise moves further than PGD"),
            judge("search", int(other.sum()), 0, "images that the attacked copy answers in another way"),
            self.memory(),
        ]

    def memory(self) -> Flag:
        """Copies that were never asked before answer the same, whatever comes first."""
        if self.fresh is None:
            return skipped("memory", "the predictor cannot be copied")
        shuffled = move(torch.randperm(len(self.x), generator=self.generator("shuffled")), self.x.device)
        other = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        for points in (self.ends, self.inside, self.x):
            known = logits_at(self.predict, points)
            other[shuffled] |= apart(known[shuffled], logits_at(without_memory(self.fresh), points[shuffled])) > _SAME
        return judge("memory", int(other.sum()), 0, "images that a copy without memory answers in another way")

    def adaptive(self, broken: Tensor, *, blinded: bool) -> list[Flag]:
        """Attacks with other losses, one of them on a copy, break little that the evaluation left standing."""
        if blinded:
            return [skipped("adaptive-loss", "the evaluation itself is without gradients")]
        copied = self.network or (self.predict if self.fresh is None else without_memory(self.fresh))
        ratio = apgd(
            self.predict,
            self.region(self.eps),
            self.y,
            loss="apgd-dlr",
            steps=self.settings.steps,
            restarts=1,
            targets=1,
            eot=1,
            generator=self.generator("apgd-dlr"),
        )
        even = self.climbed(self.eps, steps=self.settings.steps, through=standardised(copied))
        found = {
            "weak-attack": (self.fallen, "PGD"),
            "adaptive-loss": (self.breaks(self.eps, ratio), "APGD-DLR"),
            "surrogate": (self.breaks(self.eps, even), "PGD on standardised logits of a copy"),
        }
        slack, flags = self.slack(_ADAPTIVE), []
        for name, (fallen, attack) in found.items():
            better = fallen & ~broken
            text = f"images that stood, and fell to {attack}" + self.named(better)
            flags.append(judge(name, int(better.sum()), slack, text))
        return flags

    def rounding(self, broken: Tensor) -> list[Flag]:
        """Images of 8 bits, which are all that an attacker can store, break no more than others."""
        fine = 0.5 / 255 * self.x[0].numel() ** 0.5  # how far rounding moves an image in L2, at most
        eps = int(255 * self.eps + 1e-6) / 255 if self.norm == "linf" else max(0, self.eps**2 - fine**2) ** 0.5
        if eps == 0 or float((self.x - rounded(self.x)).abs().amax()) > 1e-6:
            return [skipped("rounding", "the images, or the steps of the ball, are none of 8 bits")]
        points = rounded(self.climbed(eps, steps=self.settings.steps, through=of_8_bits(self.predict)))
        fallen = self.breaks(self.eps, points) | self.breaks(self.eps, rounded(self.ends))
        new, standing = fallen & ~broken, 1 - float(fallen.sum()) / len(self.x)
        n, pgd = len(self.x), f"PGD-{self.settings.steps}"
        free = 1 - float(self.fallen.sum()) / n
        told = f"share of {n} images that stand where {pgd} has to end at 8 bits, and {free:.3f} where it has not"
        return [
            judge(
                "rounding",
                int(new.sum()),
                self.slack(_ADAPTIVE),
                f"images that stood, and fell to {pgd} at 8 bits" + self.named(new),
            ),
            Flag(name="robust-rounded", figure=standing, limit=None, verdict="passed", text=told),
        ]
