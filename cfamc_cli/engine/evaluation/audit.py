"""Whether an evaluation can be trusted: each check a figure, a limit and a verdict.

The checks follow Carlini et al., arXiv:1902.06705 (on evaluating robustness), Croce & Hein, arXiv:2003.01690, and
Pintor et al., arXiv:2106.09947 (indicators of attack failure). `cheap_checks` cost a few passes over some images;
`full_checks` attack those images again with attacks of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
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
from cfamc_cli.engine.distributed import ALONE, World, pooled_texts
from cfamc_cli.engine.evaluation.verify import Traces, in_region
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.recipe.schema import EmbeddingAttack, Norm, SquareAttack
from cfamc_cli.store.records import Flag

_RANDOM = 1e-4  # relative difference of the logits of two equal passes
_LARGE_GAP = 60.0  # between the two largest logits: beyond it the softmax of float32 has no gradient left
_BLIND = 0.05  # share of samples without gradient, or with such a gap
_BLACK_BOX = 0.002  # share of samples that a black-box attack may add


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
    _, _, grad = climb(predict, x, lambda z: cross_entropy(z, y, reduction="none"))
    blind = (grad.flatten(1).abs().amax(1) == 0) | ~grad.flatten(1).isfinite().all(1)
    sums = (first.sum(1) - 1).abs() < 1e-3
    probable = finite & (first >= 0).all(1) & (first <= 1).all(1) & sums
    top = first.nan_to_num().topk(2, dim=1).values
    wide = top[:, 0] - top[:, 1] > _LARGE_GAP
    n = len(x)
    return [
        judge("random", float(change.nan_to_num(nan=0.0)), _RANDOM, "relative change of the logits in an equal pass"),
        judge("test-time-gradient", watch.operations, 0, "operations of a prediction that ran with gradients on"),
        judge("zero-gradient", float(blind.sum()) / n, _BLIND, f"share of {n} images without a usable gradient"),
        judge("probabilities", float(probable.sum()) / n, _BLIND, f"share of {n} outputs that are no logits"),
        judge("logit-scale", float(wide.sum()) / n, _BLIND, f"share of {n} outputs whose two largest are 60 apart"),
        judge("type", float(first.dtype != torch.float32), 0, f"logits are {first.dtype}"),
    ]


@dataclass(frozen=True)
class AuditSettings:
    """How much the full audit spends."""

    samples: int = 100  # the first samples of the order that are classified right; at most so many are attacked again
    steps: int = 20  # steps of its PGD; each step is 2.5 eps / steps long
    queries: int = 500  # queries of its black-box attack


def full_checks(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    plan: Plan,
    broken: Tensor,
    places: Tensor,
    settings: AuditSettings,
    seed: int,
    world: World = ALONE,
) -> list[Flag]:
    """The checks that attack again.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1] that are classified right, (N, C, H, W).
        y: Labels, (N,).
        plan: What was evaluated.
        broken: Which of them the evaluation broke, (N,) bool.
        places: Their places in the order of the evaluation, (N,).
        settings: How much to spend.
        seed: Of everything random.
        world: The processes that share the checks, each called with the same arguments; each gets them all.
    """
    if len(x) == 0:
        return [skipped("audit", "no image is classified right and steady")]
    audit = _Audit(predict, x, y, places.cpu(), plan.norm, seed, settings)
    eps = plan.eps
    if eps == 0:
        return [audit.identity(plan), skipped("audit", "a ball of radius 0 leaves nothing to attack again")]
    parts: list[Callable[[], list[Flag]]] = [
        lambda: [audit.identity(plan)],
        lambda: audit.curve(eps),
        lambda: audit.strength(eps),
        lambda: audit.black_box(eps, broken, blinded=all(isinstance(s, SquareAttack) for s in plan.stages)),
        lambda: [audit.ascent(eps)],
    ]
    own = [[flag.model_dump() for flag in part()] for part in parts[world.rank :: world.size]]
    everyones = [json.loads(text) for text in pooled_texts(json.dumps(own), world)]  # by rank, and by turn
    flags = [flag for place in range(len(parts)) for flag in everyones[place % world.size][place // world.size]]
    return [Flag.model_validate(flag) for flag in flags]


@dataclass(frozen=True)
class _Audit:
    """The images of an audit and what it attacks them with."""

    predict: Predict
    x: Tensor
    y: Tensor
    places: Tensor
    norm: Norm
    seed: int
    settings: AuditSettings

    def region(self, eps: float) -> Region:
        return Region.around(self.x, eps=eps, norm=self.norm)

    def generator(self, label: str) -> torch.Generator:
        return addressed_generator("audit", self.seed, label)

    def breaks(self, eps: float, points: Tensor) -> Tensor:
        """Which images an attack that found `points` breaks with an example that holds, (N,) bool."""
        valid = in_region(self.x, points, eps=eps, norm=self.norm)
        return valid & fooled(logits_at(self.predict, points.where(valid[:, None, None, None], self.x)), self.y)

    def pgd(self, eps: float, *, steps: int, restarts: int) -> Tensor:
        points = pgd(
            self.predict,
            self.region(eps),
            self.y,
            step_size=2.5 * eps / self.settings.steps,
            steps=steps,
            restarts=restarts,
            start="zero",
            generator=self.generator("pgd"),
        )
        return self.breaks(eps, points)

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

    def curve(self, eps: float) -> list[Flag]:
        """Accuracy falls as eps rises, and nothing survives eps = 1."""
        largest = 128 / 255 if self.norm == "linf" else 0.5 * self.x[0].numel() ** 0.5
        whole = 1.0 if self.norm == "linf" else float(self.x[0].numel() ** 0.5)
        radii = sorted({eps / 2, eps, *(r for r in (2 * eps, 4 * eps, largest / 4, largest) if eps < r < whole), whole})
        fallen = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        accuracies, lost = [], 0
        for radius in radii:
            found = self.pgd(radius, steps=self.settings.steps, restarts=1)
            lost += int((fallen & ~found).sum())
            fallen |= found
            accuracies.append(1 - float(fallen.sum()) / len(fallen))
        points = ", ".join(f"{r:.4g}: {a:.3f}" for r, a in zip(radii, accuracies, strict=True))
        slack = max(1, round(0.02 * len(self.x) * len(radii)))
        return [
            judge("eps-one", accuracies[-1], 0.0, f"accuracy at the radius of the whole box; the curve is {points}"),
            judge("eps-monotone", lost, slack, "times that a larger eps missed an image broken at a smaller one"),
            judge("eps-flat", accuracies[-2], 0.1, f"accuracy at eps = {radii[-2]:.4g}, half of the box"),
        ]

    def strength(self, eps: float) -> list[Flag]:
        """Iterating helps: PGD against FGSM, more steps and restarts against fewer."""
        slack = max(1, round(_BLACK_BOX * len(self.x)))
        steps = self.settings.steps
        pgd = self.pgd(eps, steps=steps, restarts=1)
        missed = self.breaks(eps, self.fgsm(eps)) & ~pgd
        longer = self.pgd(eps, steps=2 * steps, restarts=1)
        again = self.pgd(eps, steps=steps, restarts=2)
        return [
            judge("fgsm-over-pgd", int(missed.sum()), slack, "images that only FGSM broke" + self.named(missed)),
            judge("more-steps", int((pgd & ~longer).sum()), 0, "images broken with fewer steps only"),
            judge("more-restarts", int((pgd & ~again).sum()), 0, "images broken with fewer restarts only"),
        ]

    def black_box(self, eps: float, broken: Tensor, *, blinded: bool) -> list[Flag]:
        """Attacks without gradients break next to nothing that attacks with gradients missed."""
        if blinded:
            return [skipped("black-box", "the evaluation itself is without gradients")]
        slack = max(1, round(_BLACK_BOX * len(self.x)))
        white = broken | self.pgd(eps, steps=self.settings.steps, restarts=1)
        region, queries = self.region(eps), self.settings.queries
        points = square(self.predict, region, self.y, queries=queries, generator=self.generator("square"))
        beyond = self.breaks(eps, points) & ~white
        text = f"images broken by {queries} queries of Square alone" + self.named(beyond)
        points = apgd(
            self.predict,
            region,
            self.y,
            loss="apgd-dlr",
            steps=self.settings.steps,
            restarts=1,
            targets=1,
            eot=1,
            generator=self.generator("apgd-dlr"),
        )
        better = self.breaks(eps, points) & ~broken
        weak = "images that stood, and fell to APGD-DLR" + self.named(better)
        return [
            judge("black-box", int(beyond.sum()), slack, text),
            judge("adaptive-loss", int(better.sum()), max(1, round(0.1 * len(self.x))), weak),
        ]

    def ascent(self, eps: float) -> Flag:
        """The loss rises along the gradient (Pintor et al., arXiv:2106.09947, on attacks that do not optimise)."""
        points = self.fgsm(min(eps, 0.25 / 255) if self.norm == "linf" else eps / 100)
        # In float64, which MPS has not: that of a confident head is 0 to float32.
        before, after = (
            cross_entropy(logits_at(self.predict, images).cpu().double(), self.y.cpu(), reduction="none")
            for images in (self.x, points)
        )
        flat = float((after <= before).sum()) / len(self.x)
        return judge(
            "no-ascent", flat, _BLIND, "share of images whose loss does not rise by a small step along its gradient"
        )
