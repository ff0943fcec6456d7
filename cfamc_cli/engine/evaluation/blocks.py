"""The evaluation under attack: fixed blocks of samples, a ledger of outcomes, verification and audit.

Samples come in a fixed order and are cut into blocks; each block goes through the stages in order, and only what still
stands goes into the next stage. A finished stage of a block is committed whole and never run again. Everything random
is drawn from (seed, block, stage), so an evaluation that was cut and resumed, or whose blocks several processes shared,
equals one that was not.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, assert_never

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.plan import Plan, passes, run_stage, stage_name
from cfamc_cli.engine.attacks.search import Predict, climb, fooled, logits_at, rows_where
from cfamc_cli.engine.attacks.together import Member, side_by_side
from cfamc_cli.engine.ball import random_start
from cfamc_cli.engine.device import in_tf32
from cfamc_cli.engine.distributed import ALONE, World, pooled, pooled_texts, told
from cfamc_cli.engine.evaluation.audit import (
    AuditSettings,
    cheap_checks,
    drift_check,
    full_checks,
    judge,
    plan_checks,
    trace_checks,
)
from cfamc_cli.engine.evaluation.verify import BATCHES, Meter, Predictor, examine, look, undisturbed
from cfamc_cli.engine.randomness import addressed_generator, addressed_seed
from cfamc_cli.engine.sink import Talk
from cfamc_cli.store.records import Flag, Mask, Outcome, Stage

BLOCK = 250  # samples; divides 500, 1,000 and 10,000, and its gradients fit a laptop
_MOST_TOGETHER = 8  # blocks that make their passes together
_PROBED = 64  # samples that the cheap checks look at
_HEARTBEAT = 1.0  # seconds between two reports within a stage


@dataclass(frozen=True)
class Examples:
    """Verified examples of one committed stage."""

    positions: tuple[int, ...]  # their places in the order
    images: Tensor  # in [0, 1], (k, C, H, W), on the CPU
    labels: tuple[int, ...]  # what they are predicted as


Commit = Callable[[Outcome, Examples], None]
Place = tuple[int, int]  # block and stage


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of n samples in the given order."""

    outcomes: tuple[Outcome, ...]  # every committed stage, by block and stage
    checks: tuple[Flag, ...]  # what says whether the numbers can be trusted

    @property
    def clean(self) -> Mask:
        """Which samples are classified right without an attack; those with unsteady predictions among them."""
        return tuple(not bit for o in self.outcomes if o.stage == 0 for bit in o.broken)

    @property
    def robust(self) -> Mask:
        """Which samples stand after every stage."""
        last = self.outcomes[-1].stage
        return tuple(bit for o in self.outcomes if o.stage == last for bit in o.standing)

    def totals(self) -> tuple[Stage, ...]:
        """Each stage over all blocks, "clean" first."""
        totals, given = [], len(self.clean)
        for stage in range(self.outcomes[-1].stage + 1):
            done = [o for o in self.outcomes if o.stage == stage]
            total = Stage(
                name=done[0].name,
                attacked=given,
                broken=sum(sum(o.broken) for o in done),
                forward=sum(o.forward for o in done),
                backward=sum(o.backward for o in done),
                wall_seconds=sum(o.seconds for o in done),
            )
            totals.append(total)
            given = sum(sum(o.standing) for o in done)
        return tuple(totals)


class _Pace:
    """How far an evaluation is: the passes of the stage under way are held against about so many as it will make."""

    def __init__(self, talk: Talk, label: str, plan: Plan, *, n: int, block_size: int) -> None:
        self.meter = Meter(self._beat)
        self._talk, self._label, self._n, self._block_size = talk, label, n, block_size
        seen = 1 + len(BATCHES)  # passes with which an evaluator looks at a point, at most
        self._costs = [seen, *(seen + passes(stage, eot=plan.eot) for stage in plan.stages)]  # of one sample
        self._first = self._stage = 0
        self._blocks, self._standing, self._attacked = 1, 1.0, 0
        self._last = time.monotonic()

    def begin(self, first: int, stage: int, standing: Mask, *, blocks: int = 1) -> None:
        """A stage of some blocks is next, the first of which begins at sample `first`; `standing` is of those here."""
        self._first, self._blocks, self._stage = first, blocks, stage
        self._attacked, self._standing = sum(standing), sum(standing) / len(standing)
        self._report()

    def end(self) -> None:
        """All is done."""
        self._first = self._n
        self._talk.progress(self._label, self._n, self._n, {})

    def _beat(self) -> None:
        if time.monotonic() - self._last >= _HEARTBEAT and self._first < self._n:
            self._report()

    def _report(self) -> None:
        self._last = time.monotonic()
        size = min(self._block_size * self._blocks, self._n - self._first)
        expected = self._costs[self._stage] * self._attacked
        within = min(self.meter.forward / max(1.0, expected), 0.99)
        share = (sum(self._costs[: self._stage]) + within * self._costs[self._stage]) / sum(self._costs)
        at = min(self._first + int(share * size), self._n - 1)
        self._talk.progress(self._label, at, self._n, {"standing in block": f"{100 * self._standing:.0f} %"})


@dataclass(frozen=True)
class _Work:
    """What the blocks of one evaluation share."""

    predictor: Predictor  # its passes are counted
    pace: _Pace
    plan: Plan
    seed: int
    block_size: int
    device: torch.device
    world: World
    together: int  # blocks that make their passes together


@dataclass
class _Piece:
    """A block before a stage, on the device."""

    block: int
    first: int  # its first sample
    x: Tensor
    y: Tensor
    alive: Tensor  # which of them still stand
    forward: int = 0  # passes that the stage has made for it
    backward: int = 0

    @property
    def given(self) -> tuple[Tensor, Tensor]:
        """Images and labels of those that still stand."""
        return self.x[self.alive], self.y[self.alive]

    def pay(self, forward: int, backward: int) -> tuple[int, int]:
        """Count passes; returns all so far."""
        self.forward, self.backward = self.forward + forward, self.backward + backward
        return self.forward, self.backward


def evaluate(
    predictor: Predictor,
    x: Tensor,
    y: Tensor,
    *,
    plan: Plan,
    seed: int,
    block_size: int,
    device: torch.device,
    finished: Sequence[Outcome],
    commit: Commit,
    audit: AuditSettings | None,
    label: str,
    talk: Talk,
    world: World = ALONE,
) -> Evaluation:
    """Attack samples in fixed blocks and keep a ledger of what happened to each.

    Args:
        predictor: What is attacked, on `device`.
        x: Clean images in their fixed order, float32 in [0, 1], (N, C, H, W), on any device.
        y: Labels, int64 (N,).
        plan: The stages of the attack.
        seed: Of everything random; draws are addressed by (seed, block, stage).
        block_size: Samples of a block. The last block may be smaller; if more samples are asked for later, that block
            alone is done again, and all others are taken from `finished`.
        device: Where the attacks compute.
        finished: Outcomes committed earlier for the same predictor, data, plan, seed and block size. Those that do
            not fit the blocks at hand are left unused; a stage that is missing among them is done again by itself. Of
            several processes, those that the leading one has count.
        commit: Called with each newly finished stage of a block and its verified examples, a block's stages in order
            and each stage's blocks too; in every process, with what all have found.
        audit: What the full audit spends; None for the cheap checks alone.
        label: What progress is reported under.
        talk: Hears of it.
        world: The processes that share the blocks, each called with the same arguments.

    Returns:
        The ledger, in every process, equal to that of an uncut evaluation except for times.

    Raises:
        ValueError: There is no sample, the images are not float32 in [0, 1], or labels and logits do not fit.
    """
    _require(x, y, block_size)
    pace = _Pace(talk, label, plan, n=len(x), block_size=block_size)
    watched = pace.meter.watched(predictor)
    predict = watched.logits
    with undisturbed(predictor.modules, device) as traces:
        torch.manual_seed(addressed_seed("predictor", seed))
        head, head_labels = x[:_PROBED].to(device), y[:_PROBED].to(device)
        fresh = None if audit is None else _copied(predictor.logits)  # before anything is asked
        nearby = addressed_generator("drift", seed)
        queries = head + random_start(head, eps=plan.eps, norm=plan.norm, generator=nearby)
        early = logits_at(predict, queries)
        classes = logits_at(predict, head).shape[1]
        if not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"labels reach from {int(y.min())} to {int(y.max())}, but there are {classes} logits")
        checks = plan_checks(plan) + cheap_checks(predict, head, head_labels)
        together = _blocks_at_once(watched.search, head, block_size)
        work = _Work(watched, pace, plan, seed, block_size, device, world, together)
        pace.meter.read()
        known = _outcomes_in(told(_text_of(finished), world)) if world.size > 1 else finished
        outcomes = _all_blocks(work, x, y, {(o.block, o.stage): o for o in known}, commit)
        checks += _ledger_checks(outcomes)
        if audit is not None:
            checks += _audited(work, x, y, outcomes, audit, fresh)
            checks += [drift_check(early, logits_at(predict, queries))]
        checks += trace_checks(traces())
    return Evaluation(tuple(outcomes), tuple(checks))


def _copied(predict: Predict) -> Predict | None:
    """A copy with a state of its own; None where there can be none."""
    try:
        return copy.deepcopy(predict)
    except (RuntimeError, TypeError):
        return None


def _network(predictor: Predictor, sample: Tensor) -> Predict | None:
    """A copy of the module that the predictor uses, where it answers with as many logits by itself."""
    network = predictor.modules[0] if len(predictor.modules) == 1 else None
    if network is None or len(sample) == 0:
        return None
    copied = copy.deepcopy(network)
    same = logits_at(copied, sample).shape == logits_at(predictor.logits, sample).shape
    return copied if same else None


def _blocks_at_once(search: Predict, sample: Tensor, block_size: int) -> int:
    """How many blocks make their passes together: as many as half of a card's free memory takes; one on a CPU."""
    device = sample.device
    if device.type != "cuda":
        return 1
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    climb(search, sample, lambda outputs: outputs.sum(1))
    needed = (torch.cuda.max_memory_allocated(device) - before) / len(sample) * block_size
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(_MOST_TOGETHER, int(free / 2 / needed)))


def _require(x: Tensor, y: Tensor, block_size: int) -> None:
    """Refuse what cannot be evaluated."""
    if len(x) == 0 or len(x) != len(y) or x.dim() != 4:
        raise ValueError(f"images {tuple(x.shape)} and labels {tuple(y.shape)} are no samples to evaluate")
    if x.dtype != torch.float32 or not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"images must be float32 in [0, 1], not {x.dtype} in [{float(x.min())}, {float(x.max())}]")
    if block_size < 1:
        raise ValueError(f"a block holds at least one sample, not {block_size}")


def _all_blocks(work: _Work, x: Tensor, y: Tensor, known: Mapping[Place, Outcome], commit: Commit) -> list[Outcome]:
    """Every stage of every block, from `known` where it is there; the processes share what is missing."""
    names = ("clean", *(stage_name(stage) for stage in work.plan.stages))
    firsts = range(0, len(x), work.block_size)
    outcomes: dict[Place, Outcome] = {}

    def standing(block: int, number: int) -> Mask:
        size = min(work.block_size, len(x) - firsts[block])
        return outcomes[block, number - 1].standing if number else (True,) * size

    def taken(block: int, number: int) -> bool:
        outcome = known.get((block, number))
        if outcome is None or not _follows(outcome, names[number], standing(block, number)):
            return False
        outcomes[block, number] = outcome
        return True

    unfinished = [b for b in range(len(firsts)) if not all(taken(b, number) for number in range(len(names)))]
    # A stage of as many blocks as are worked on at once, then the next: no block gets ahead of one before it.
    at_once = work.world.size * work.together
    for at in range(0, len(unfinished), at_once):
        wave = unfinished[at : at + at_once]
        for number, name in enumerate(names):
            missing = [block for block in wave if not taken(block, number)]
            if not missing:
                continue
            own = missing[work.world.rank :: work.world.size]
            before = [standing(block, number) for block in own or missing]
            work.pace.begin(firsts[missing[0]], number, sum(before, ()), blocks=len(missing))
            began = time.perf_counter()
            pieces = [_piece(work, x, y, block, firsts[block], standing(block, number)) for block in own]
            done = _stage(work, pieces, number, name)
            everyones = _pooled(done, x, work.world)
            seconds = (time.perf_counter() - began) / len(missing)
            for outcome, examples in everyones:
                timed = replace(outcome, seconds=seconds)
                commit(timed, examples)
                outcomes[timed.block, number] = timed
    work.pace.end()
    return [outcomes[place] for place in sorted(outcomes)]


def _piece(work: _Work, x: Tensor, y: Tensor, block: int, first: int, standing: Mask) -> _Piece:
    """The block that begins at sample `first`, on the device."""
    own = slice(first, first + len(standing))
    alive = rows_where(torch.tensor(standing, device=work.device))
    return _Piece(block, first, x[own].to(work.device), y[own].to(work.device), alive)


def _stage(work: _Work, pieces: Sequence[_Piece], number: int, name: str) -> list[tuple[Outcome, Examples]]:
    """One stage of some blocks, and its verified examples; times are left at 0."""
    done = []
    ends = _searched(work, [piece for piece in pieces if len(piece.alive)], number) if number else {}
    for piece in pieces:
        if number == 0:
            torch.manual_seed(addressed_seed("predictor", work.seed, piece.block, 0))
            fates, examples, again = _predicted(work, piece.x, piece.y, piece.block), _no_examples(piece.x), 0
        else:
            points, again = ends.get(piece.block, (piece.x[:0], 0))
            fates, examples = _judged(work, piece, points, number)
        standing, broken, not_finite, unsteady, invalid = (tuple(bits) for bits in fates.tolist())
        forward, backward = piece.pay(*work.pace.meter.read())
        masks = (standing, broken, not_finite, unsteady, invalid)
        done.append((Outcome(piece.block, number, name, *masks, forward, backward, 0.0, again), examples))
    return done


def _pooled(own: Sequence[tuple[Outcome, Examples]], x: Tensor, world: World) -> list[tuple[Outcome, Examples]]:
    """What every process found, in the order of the blocks."""
    if world.size == 1:
        return list(own)
    images = pooled(torch.cat([_no_examples(x).images, *(examples.images for _, examples in own)]), world)
    places = [(examples.positions, examples.labels) for _, examples in own]
    texts = pooled_texts(_text_of([outcome for outcome, _ in own]), world), pooled_texts(json.dumps(places), world)
    found = []
    for rest, outcomes, where in zip(images, *texts, strict=True):
        for outcome, (positions, labels) in zip(_outcomes_in(outcomes), json.loads(where), strict=True):
            found.append((outcome, Examples(tuple(positions), rest[: len(positions)], tuple(labels))))
            rest = rest[len(positions) :]
    return sorted(found, key=lambda item: item[0].block)


def _text_of(outcomes: Sequence[Outcome]) -> str:
    return json.dumps([asdict(outcome) for outcome in outcomes])


def _outcomes_in(text: str) -> list[Outcome]:
    """What `_text_of` wrote."""
    rows: list[dict[str, Any]] = json.loads(text)
    for row in rows:
        row |= {key: tuple(value) for key, value in row.items() if isinstance(value, list)}
    return [Outcome(**row) for row in rows]


def _follows(outcome: Outcome, name: str, standing: Mask) -> bool:
    """Whether a committed stage is the one that comes next: it began with what stands."""
    fates = zip(outcome.standing, outcome.broken, outcome.not_finite, strict=True)
    if outcome.name != name or len(outcome.standing) != len(standing):
        return False
    return outcome.stage == 0 or tuple(any(fate) for fate in fates) == standing


def _no_examples(x: Tensor) -> Examples:
    return Examples((), torch.empty(0, *x.shape[1:]), ())


def _predicted(work: _Work, x: Tensor, y: Tensor, block: int) -> Tensor:
    """Stage 0, which samples are classified right at all: the five masks of its outcome, (5, N)."""
    seen = look(work.predictor.logits, x, y, generator=addressed_generator("look", work.seed, block, 0))
    right = seen.label == y
    unsteady = ~seen.steady | (seen.moved > 0)
    return torch.stack((right & seen.finite & seen.steady, ~right, ~seen.finite, unsteady, torch.zeros_like(right)))


def _judged(work: _Work, piece: _Piece, points: Tensor, number: int) -> tuple[Tensor, Examples]:
    """What became of the samples that stood, at the points of a stage: the masks of its outcome, and its examples."""
    plan, target, alive = work.plan, work.predictor, piece.alive
    fates = torch.zeros((5, len(piece.x)), dtype=torch.bool, device=piece.x.device)
    if not len(alive):
        return fates, _no_examples(piece.x)
    given, labels = piece.given
    generator = addressed_generator("look", work.seed, piece.block, number)
    found = examine(target.logits, given, points, labels, eps=plan.eps, norm=plan.norm, generator=generator)
    seen, broken = found.seen, found.broken
    fates[:, alive] = torch.stack((~broken & seen.finite, broken, ~seen.finite, seen.moved > 0, ~found.valid))
    hits = rows_where(broken)
    places, classes = (alive[hits] + piece.first).tolist(), found.shown[hits].tolist()
    return fates, Examples(tuple(places), found.points[hits].cpu(), tuple(classes))


def _searched(work: _Work, pieces: Sequence[_Piece], number: int) -> dict[int, tuple[Tensor, int]]:
    """By block, the points at which a stage ends, and how many of them it found in a second run, in float32.

    Those are the samples that a shorter search has misclassified and the evaluator has not.
    """
    target, precision = work.predictor, work.plan.stages[number - 1].search_precision
    match precision:
        case "float32":
            return {piece.block: (points, 0) for piece, points in zip(pieces, _run(work, pieces, number), strict=True)}
        case "tf32":
            found = {}
            with in_tf32():
                ends = _run(work, pieces, number)
            for piece, points in zip(pieces, ends, strict=True):
                x, y = piece.given
                with in_tf32():
                    claimed = fooled(logits_at(target.search, points), y)
                rows = rows_where(claimed & ~fooled(logits_at(target.logits, points), y))
                if len(rows):
                    points[rows] = _attack(work, target, x[rows], y[rows], piece.block, number, "again")
                piece.pay(*work.pace.meter.read())
                found[piece.block] = points, len(rows)
            return found
        case _:
            assert_never(precision)


def _run(work: _Work, pieces: Sequence[_Piece], number: int) -> list[Tensor]:
    """The points at which a stage ends, for each block; several blocks make their passes together."""
    if pieces:
        torch.manual_seed(addressed_seed("predictor", work.seed, pieces[0].block, number))
    if len(pieces) < 2:
        return [_attack(work, work.predictor, *piece.given, piece.block, number) for piece in pieces]

    def attack(piece: _Piece, member: Callable[[Predict], Member]) -> Tensor:
        search, embed = member(work.predictor.search), work.predictor.embed
        embedded = None if embed is None else member(embed)
        own = replace(work.predictor, search=search, embed=embedded)
        points = _attack(work, own, *piece.given, piece.block, number)
        for part in (search, *([embedded] if embedded else [])):
            piece.pay(part.forward, part.backward)
        return points

    ends = side_by_side([partial(attack, piece) for piece in pieces])
    work.pace.meter.read()  # of all of them; each has paid its own
    return ends


def _attack(work: _Work, target: Predictor, x: Tensor, y: Tensor, block: int, number: int, *address: str) -> Tensor:
    generator = addressed_generator("attack", work.seed, block, number, *address)
    stage, plan = work.plan.stages[number - 1], work.plan
    return run_stage(
        stage, target.search, x, y, embed=target.embed, eot=plan.eot, onward=plan.onward, generator=generator
    )


def _ledger_checks(outcomes: Sequence[Outcome]) -> list[Flag]:
    """What the ledger itself says against the numbers."""
    return [
        judge(
            "not-finite", sum(sum(o.not_finite) for o in outcomes), 0, "samples with a prediction that is not finite"
        ),
        judge(
            "batch",
            sum(sum(o.unsteady) for o in outcomes),
            0,
            "samples whose prediction changes with the batch they are in",
        ),
        judge(
            "invalid-example", sum(sum(o.invalid) for o in outcomes), 0, "examples that are no images or left the ball"
        ),
    ]


def _audited(
    work: _Work, x: Tensor, y: Tensor, outcomes: Sequence[Outcome], audit: AuditSettings, fresh: Predict | None
) -> list[Flag]:
    """The full audit, on the first samples that stood without an attack."""
    clean = torch.tensor([bit for o in outcomes if o.stage == 0 for bit in o.standing])
    robust = torch.tensor([bit for o in outcomes if o.stage == len(work.plan.stages) for bit in o.standing])
    rows = clean.nonzero().flatten()[: audit.samples]
    given = x[rows].to(work.device)
    return full_checks(
        work.predictor.logits,
        given,
        y[rows].to(work.device),
        search=work.predictor.search,
        fresh=fresh,
        network=_network(work.predictor, given[:1]),
        plan=work.plan,
        broken=~robust[rows].to(work.device),
        places=rows,
        settings=audit,
        seed=work.seed,
        world=work.world,
    )
