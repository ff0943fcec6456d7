"""The evaluation under attack: fixed blocks of samples, a ledger of outcomes, verification and audit.

Samples come in a fixed order and are cut into blocks; each block goes through the stages in order, and only what still
stands goes into the next stage. A finished stage of a block is committed whole and never run again. Everything random
is drawn from (seed, block, stage), so an evaluation that was cut and resumed equals one that was not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.audit import AuditSettings, Check, cheap_checks, full_checks, judge, trace_checks
from cfamc_cli.engine.attacks.autoattack import Attack, Stage, plan, run_stage, stage_name
from cfamc_cli.engine.attacks.search import Predict, logits_at
from cfamc_cli.engine.attacks.verify import Meter, Predictor, in_region, look, undisturbed
from cfamc_cli.engine.randomness import addressed_generator, addressed_seed
from cfamc_cli.engine.sink import Sink

BLOCK = 250  # samples; divides 500, 1,000 and 10,000, and its gradients fit a laptop
_PROBED = 64  # samples that the cheap checks look at

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Outcome:
    """One finished stage of one block: what is committed, and enough to go on from.

    Attributes:
        block: Number of the block; it begins at sample block * block_size of the order.
        stage: 0 for the clean predictions, then the stages of the plan from 1.
        name: Name of the stage, "clean" for stage 0.
        standing: For each sample of the block, whether it is classified right, steadily and finitely under this stage
            and all before it.
        broken: Newly lost to a verified example, wrong at whatever batch size (for stage 0: misclassified).
        not_finite: Newly lost to a prediction that is not finite.
        unsteady: Whose logits, on the clean image or where the attack ended, changed with the batch they are in by
            more than rounding.
        invalid: Whose example left the ball or the box, or was no image; it is no success.
        forward: Forward passes of single samples.
        backward: Backward passes of single samples.
        seconds: Wall time.
    """

    block: int
    stage: int
    name: str
    standing: Mask
    broken: Mask
    not_finite: Mask
    unsteady: Mask
    invalid: Mask
    forward: int
    backward: int
    seconds: float


@dataclass(frozen=True)
class Examples:
    """Verified examples of one committed stage.

    Attributes:
        positions: Their places in the order.
        images: In [0, 1], (k, C, H, W), on the CPU.
        labels: What they are predicted as.
    """

    positions: tuple[int, ...]
    images: Tensor
    labels: tuple[int, ...]


Commit = Callable[[Outcome, Examples], None]


@dataclass(frozen=True)
class StageTotal:
    """A stage over all blocks: samples it was given, samples it broke, and its cost."""

    name: str
    attacked: int
    broken: int
    forward: int
    backward: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of n samples in the given order.

    Attributes:
        eps: Radius of the ball, in units of the image range.
        norm: Its norm.
        classes: Number of logits.
        stages: Names of the stages, "clean" first.
        outcomes: Every committed stage, by block and stage.
        checks: What says whether the numbers can be trusted.
        notes: How the attack differs from the one published, in words.
    """

    eps: float
    norm: str
    classes: int
    stages: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    def standing_after(self, stage: int) -> Mask:
        """Which samples stand after a stage, by its place in `stages`."""
        return tuple(bit for o in self.outcomes if o.stage == stage for bit in o.standing)

    @property
    def clean(self) -> Mask:
        """Which samples are classified right without an attack; those with unsteady predictions among them."""
        return tuple(not bit for o in self.outcomes if o.stage == 0 for bit in o.broken)

    @property
    def robust(self) -> Mask:
        """Which samples stand after every stage."""
        return self.standing_after(len(self.stages) - 1)

    @property
    def trusted(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "failed" for check in self.checks)

    def broken_by(self) -> tuple[str, ...]:
        """For each sample the stage that took it ("clean" if misclassified or unsteady), "" where it is robust."""
        fates: list[str] = []
        for first in (o for o in self.outcomes if o.stage == 0):
            chain = [o for o in self.outcomes if o.block == first.block]
            places = range(len(first.standing))
            fates += [next((o.name for o in chain if not o.standing[place]), "") for place in places]
        return tuple(fates)

    def totals(self) -> tuple[StageTotal, ...]:
        """Each stage over all blocks, "clean" first."""
        totals, given = [], len(self.clean)
        for stage, name in enumerate(self.stages):
            done = [o for o in self.outcomes if o.stage == stage]
            totals.append(
                StageTotal(
                    name=name,
                    attacked=given,
                    broken=sum(sum(o.broken) for o in done),
                    forward=sum(o.forward for o in done),
                    backward=sum(o.backward for o in done),
                    seconds=sum(o.seconds for o in done),
                )
            )
            given = sum(sum(o.standing) for o in done)
        return tuple(totals)


@dataclass
class _Work:
    """What the blocks of one evaluation share."""

    predict: Predict  # what counts
    search: Predict  # what attacks look through
    embed: Predict | None
    meter: Meter
    stages: tuple[Stage, ...]
    seed: int
    eps: float
    device: torch.device


def evaluate(
    predictor: Predictor,
    x: Tensor,
    y: Tensor,
    *,
    attack: Attack,
    seed: int,
    block_size: int,
    device: torch.device,
    finished: Sequence[Outcome],
    commit: Commit,
    audit: AuditSettings | None,
    sink: Sink,
) -> Evaluation:
    """Attack samples in fixed blocks and keep a ledger of what happened to each.

    Args:
        predictor: What is attacked, on `device`.
        x: Clean images in their fixed order, float32 in [0, 1], (N, C, H, W), on any device.
        y: Labels, int64 (N,).
        attack: One attack or the ensemble.
        seed: Of everything random; draws are addressed by (seed, block, stage).
        block_size: Samples of a block. The last block may be smaller; if more samples are asked for later, that block
            alone is done again, and all others are taken from `finished`.
        device: Where the attacks compute.
        finished: Outcomes committed earlier for the same predictor, data, attack, seed and block size. Those that do
            not fit the blocks at hand are left unused; a stage that is missing among them is done again by itself.
        commit: Called with each newly finished stage of a block and its verified examples, in order.
        audit: What the full audit spends; None for the cheap checks alone.
        sink: Hears of progress.

    Returns:
        The ledger, equal to that of an uncut evaluation except for times.

    Raises:
        ValueError: There is no sample, the images are not float32 in [0, 1], or labels and logits do not fit.
    """
    _require(x, y, block_size)
    meter = Meter()
    work = _Work(
        predict=meter.watch(predictor.logits),
        search=meter.watch(predictor.search),
        embed=None if predictor.embed is None else meter.watch(predictor.embed),
        meter=meter,
        stages=(),
        seed=seed,
        eps=attack.eps,
        device=device,
    )
    with undisturbed(predictor.modules, device) as traces:
        torch.manual_seed(addressed_seed("predictor", seed))
        head, head_labels = x[:_PROBED].to(device), y[:_PROBED].to(device)
        classes = logits_at(work.predict, head).shape[1]
        if not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"labels reach from {int(y.min())} to {int(y.max())}, but there are {classes} logits")
        todo = plan(attack, classes=classes)
        work.stages = todo.stages
        checks = cheap_checks(work.predict, head, head_labels)
        meter.read()
        outcomes = _all_blocks(work, x, y, block_size, {(o.block, o.stage): o for o in finished}, commit, sink)
        checks += _ledger_checks(outcomes)
        if audit is not None:
            checks += _audited(work, x, y, outcomes, audit, attack)
        checks += trace_checks(traces())
    names = ("clean", *(stage_name(stage) for stage in todo.stages))
    return Evaluation(attack.eps, attack.norm, classes, names, tuple(outcomes), tuple(checks), todo.notes)


def _require(x: Tensor, y: Tensor, block_size: int) -> None:
    """Refuse what cannot be evaluated."""
    if len(x) == 0 or len(x) != len(y) or x.dim() != 4:
        raise ValueError(f"images {tuple(x.shape)} and labels {tuple(y.shape)} are no samples to evaluate")
    if x.dtype != torch.float32 or not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"images must be float32 in [0, 1], not {x.dtype} in [{float(x.min())}, {float(x.max())}]")
    if block_size < 1:
        raise ValueError(f"a block holds at least one sample, not {block_size}")


def _all_blocks(
    work: _Work,
    x: Tensor,
    y: Tensor,
    block_size: int,
    known: dict[tuple[int, int], Outcome],
    commit: Commit,
    sink: Sink,
) -> list[Outcome]:
    """Every stage of every block, from `known` where it is there."""
    outcomes: list[Outcome] = []
    for block, first in enumerate(range(0, len(x), block_size)):
        images = x[first : first + block_size].to(work.device)
        labels = y[first : first + block_size].to(work.device)
        standing: Mask = (True,) * len(images)
        for number in range(len(work.stages) + 1):
            name = "clean" if number == 0 else stage_name(work.stages[number - 1])
            outcome = known.get((block, number))
            if outcome is None or not _follows(outcome, name, standing):
                began = time.perf_counter()
                torch.manual_seed(addressed_seed("predictor", work.seed, block, number))
                if number == 0:
                    outcome, examples = _clean(work, images, labels, block)
                else:
                    outcome, examples = _attacked(work, images, labels, standing, block, number, first)
                outcome = _timed(outcome, work.meter, time.perf_counter() - began)
                commit(outcome, examples)
            standing = outcome.standing
            outcomes.append(outcome)
            done = first + (len(images) if number == len(work.stages) else 0)
            sink.progress(name, done, len(x), {"standing in block": sum(standing) / len(standing)})
    return outcomes


def _follows(outcome: Outcome, name: str, standing: Mask) -> bool:
    """Whether a committed stage is the one that comes next: it began with what stands."""
    fates = zip(outcome.standing, outcome.broken, outcome.not_finite, strict=True)
    if outcome.name != name or len(outcome.standing) != len(standing):
        return False
    return outcome.stage == 0 or tuple(any(fate) for fate in fates) == standing


def _timed(outcome: Outcome, meter: Meter, seconds: float) -> Outcome:
    forward, backward = meter.read()
    return dataclasses.replace(outcome, forward=forward, backward=backward, seconds=seconds)


def _mask(bits: Tensor) -> Mask:
    return tuple(bits.tolist())


def _clean(work: _Work, x: Tensor, y: Tensor, block: int) -> tuple[Outcome, Examples]:
    """Stage 0: which samples are classified right at all."""
    seen = look(work.predict, x)
    right = seen.label == y
    outcome = Outcome(
        block=block,
        stage=0,
        name="clean",
        standing=_mask(right & seen.finite & seen.steady),
        broken=_mask(~right),
        not_finite=_mask(~seen.finite),
        unsteady=_mask(~seen.steady | (seen.moved > 0)),
        invalid=_mask(torch.zeros_like(right)),
        forward=0,
        backward=0,
        seconds=0.0,
    )
    return outcome, Examples((), torch.empty(0, *x.shape[1:]), ())


def _attacked(
    work: _Work, x: Tensor, y: Tensor, standing: Mask, block: int, number: int, first: int
) -> tuple[Outcome, Examples]:
    """One stage on the samples of a block that still stand."""
    stage = work.stages[number - 1]
    alive = torch.tensor(standing, device=x.device).nonzero().flatten()
    lost = {name: torch.zeros(len(x), dtype=torch.bool, device=x.device) for name in ("broken", "odd", "moved", "out")}
    examples = Examples((), torch.empty(0, *x.shape[1:]), ())
    if len(alive):
        given, labels = x[alive], y[alive]
        generator = addressed_generator("attack", work.seed, block, number)
        points = run_stage(stage, work.search, given, labels, embed=work.embed, generator=generator)
        valid = in_region(given, points, eps=stage.eps, norm=stage.norm)
        points = torch.where(valid[:, None, None, None], points, given) if points.shape == given.shape else given
        seen = look(work.predict, points)
        shown = torch.where(seen.label != labels, seen.label, seen.other)  # as wrong as it is at any batch size
        broken = valid & seen.finite & (shown != labels)
        lost["broken"][alive], lost["odd"][alive], lost["out"][alive] = broken, ~seen.finite, ~valid
        lost["moved"][alive] = seen.moved > 0
        hits = broken.nonzero().flatten()
        examples = Examples(
            positions=tuple((alive[hits] + first).tolist()),
            images=points[hits].cpu(),
            labels=tuple(shown[hits].tolist()),
        )
    before = torch.tensor(standing, device=x.device)
    outcome = Outcome(
        block=block,
        stage=number,
        name=stage_name(stage),
        standing=_mask(before & ~lost["broken"] & ~lost["odd"]),
        broken=_mask(lost["broken"]),
        not_finite=_mask(lost["odd"]),
        unsteady=_mask(lost["moved"]),
        invalid=_mask(lost["out"]),
        forward=0,
        backward=0,
        seconds=0.0,
    )
    return outcome, examples


def _ledger_checks(outcomes: Sequence[Outcome]) -> list[Check]:
    """What the ledger itself says against the numbers."""
    count = {name: sum(sum(getattr(o, name)) for o in outcomes) for name in ("not_finite", "unsteady", "invalid")}
    return [
        judge("not-finite", count["not_finite"], 0, "samples with a prediction that is not finite"),
        judge("batch", count["unsteady"], 0, "samples whose prediction changes with the batch they are in"),
        judge("invalid-example", count["invalid"], 0, "examples that are no images or left the ball"),
    ]


def _audited(
    work: _Work, x: Tensor, y: Tensor, outcomes: Sequence[Outcome], audit: AuditSettings, attack: Attack
) -> list[Check]:
    """The full audit, on the first samples that stood without an attack."""
    clean = torch.tensor([bit for o in outcomes if o.stage == 0 for bit in o.standing])
    robust = torch.tensor([bit for o in outcomes if o.stage == len(work.stages) for bit in o.standing])
    rows = clean.nonzero().flatten()[: audit.samples]
    return full_checks(
        work.predict,
        x[rows].to(work.device),
        y[rows].to(work.device),
        eps=attack.eps,
        norm=attack.norm,
        broken=~robust[rows].to(work.device),
        places=rows,
        stages=work.stages,
        settings=audit,
        seed=work.seed,
    )
