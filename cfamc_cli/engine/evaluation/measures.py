"""Measures of robustness beside attacks of one eps: fixed blocks of samples, each committed whole.

A measure is a function from a block to columns of one value per sample. What it draws is drawn from (seed, block), for
as many samples as a block has room for, so that a measure that was cut and resumed equals one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cfamc_cli.engine.attacks.fmn import fmn
from cfamc_cli.engine.attacks.search import fooled, logits_at, rows_where
from cfamc_cli.engine.ball import norms
from cfamc_cli.engine.corruptions import SEVERITIES
from cfamc_cli.engine.distributed import World, pooled_texts, told
from cfamc_cli.engine.evaluation.audit import cheap_checks, trace_checks
from cfamc_cli.engine.evaluation.verify import Meter, Predictor, examine, look, undisturbed
from cfamc_cli.engine.randomness import addressed_generator, addressed_seed
from cfamc_cli.engine.sink import Talk
from cfamc_cli.recipe.schema import Norm, Smallest
from cfamc_cli.store.records import Flag, MeasuredBlock

_PROBED = 64  # samples that the cheap checks look at
# Predictor, images (N, C, H, W) and labels (N,) of a block, its number -> columns (N,), nan where there is no number
Values = Callable[[Predictor, Tensor, Tensor, int], Mapping[str, Tensor]]
Commit = Callable[[MeasuredBlock, float], None]  # a block, and the seconds that it took


def measure(
    predictor: Predictor,
    x: Tensor,
    y: Tensor,
    *,
    values: Values,
    seed: int,
    block_size: int,
    device: torch.device,
    finished: Mapping[int, MeasuredBlock],
    commit: Commit,
    label: str,
    talk: Talk,
    world: World,
) -> tuple[list[MeasuredBlock], tuple[Flag, ...]]:
    """Measure samples in fixed blocks.

    Args:
        predictor: What is measured, on `device`.
        x: Clean images in their fixed order, float32 in [0, 1], (N, C, H, W), on any device.
        y: Labels, int64 (N,).
        values: The measure; it may use the predictor as it likes, without leaving a trace.
        seed: Of whatever the predictor draws itself.
        block_size: Samples of a block; the last block may be smaller.
        device: Where to compute.
        finished: Blocks measured earlier, by number; of several processes, those of the leading one count.
        commit: Called with each new block, in every process with what all have measured.
        label: What progress is reported under.
        talk: Hears of it.
        world: The processes that share the blocks, each called with the same arguments.

    Returns:
        All blocks in order, and the checks that cost next to nothing.
    """
    firsts = range(0, len(x), block_size)
    known = [block.model_dump_json() for block in finished.values()]
    blocks = {block.block: block for block in map(_block, json.loads(told(json.dumps(known), world)))}
    missing = [number for number in range(len(firsts)) if number not in blocks]
    meter = Meter()
    watched = meter.watched(predictor)
    with undisturbed(predictor.modules, device) as traces:
        torch.manual_seed(addressed_seed("predictor", seed))
        checks = cheap_checks(watched.logits, x[:_PROBED].to(device), y[:_PROBED].to(device))
        meter.read()
        for at in range(0, len(missing), world.size):
            talk.progress(label, firsts[missing[at]], len(x), {})
            began, own = time.perf_counter(), missing[at : at + world.size][world.rank :][:1]
            made = []
            for number in own:
                rows = slice(firsts[number], firsts[number] + block_size)
                torch.manual_seed(addressed_seed("predictor", seed, number))
                columns = values(watched, x[rows].to(device), y[rows].to(device), number)
                forward, backward = meter.read()
                plain = {name: _plain(column) for name, column in columns.items()}
                made.append(MeasuredBlock(block=number, columns=plain, forward=forward, backward=backward))
            everyones = pooled_texts(json.dumps([block.model_dump_json() for block in made]), world)
            for block in map(_block, [text for texts in everyones for text in json.loads(texts)]):
                commit(block, (time.perf_counter() - began) / world.size)
                blocks[block.block] = block
        talk.progress(label, len(x), len(x), {})
        checks += trace_checks(traces())
    return [blocks[number] for number in sorted(blocks)], tuple(checks)


def _block(text: str) -> MeasuredBlock:
    return MeasuredBlock.model_validate_json(text)


def _plain(column: Tensor) -> tuple[float | None, ...]:
    """The values of a column (N,), None where they are no finite numbers."""
    finite = column.isfinite().tolist()
    return tuple(value if known else None for value, known in zip(column.double().tolist(), finite, strict=True))


def smallest(settings: Smallest, *, seed: int) -> Values:
    """For each sample whether it is right ("clean"), and the smallest eps at which it was broken ("eps").

    The eps is 0 for a sample that is wrong, unsteady or not finite without an attack, and missing where no image of the
    whole box was found. An example is measured in float64, held to the box and predicted again, in batches of several
    sizes; where the copy that was searched through and the predictor itself disagree, the latter is searched through.
    """

    def values(target: Predictor, x: Tensor, y: Tensor, block: int) -> dict[str, Tensor]:
        seen = look(target.logits, x, y, generator=addressed_generator("look", seed, block, 0))
        right = seen.label == y
        eps = torch.zeros(len(x), dtype=torch.float64)
        rows = rows_where(right & seen.finite & seen.steady)
        for number, search in enumerate((target.search, target.logits), start=1):
            if len(rows):
                points = fmn(
                    search, x[rows], y[rows], norm=settings.norm, steps=settings.steps, targets=settings.targets
                )
                looking = addressed_generator("look", seed, block, number)
                found = smallest_eps(target, x[rows], y[rows], points, norm=settings.norm, generator=looking)
                eps[rows.cpu()] = found
                rows = rows[rows_where(found.isnan().to(rows.device))]
        return {"clean": right.double(), "eps": eps}

    return values


def corruptions(
    kinds: Sequence[str], corrupt: Callable[[Tensor, Tensor, str, int], Tensor], *, places: Tensor, block_size: int
) -> Values:
    """For each sample whether it is right as it is ("clean"), and in each kind of corruption at each severity.

    Args:
        kinds: Kinds of corruption.
        corrupt: The corrupted images of clean ones (N, C, H, W) that lie at places (N,), of a kind at a severity.
        places: Of all samples, (M,).
        block_size: Samples of a block.
    """

    def values(target: Predictor, x: Tensor, y: Tensor, block: int) -> dict[str, Tensor]:
        own = places[block * block_size :][: len(x)]
        found = {"clean": (~fooled(logits_at(target.logits, x), y)).double()}
        for kind in kinds:
            for severity in SEVERITIES:
                images = corrupt(x, own, kind, severity).to(x.device)
                found[f"{kind}/{severity}"] = (~fooled(logits_at(target.logits, images), y)).double()
        return found

    return values


def smallest_eps(
    target: Predictor, x: Tensor, y: Tensor, points: Tensor, *, norm: Norm, generator: torch.Generator
) -> Tensor:
    """The radius at which each point breaks its sample, as the evaluator sees it: (N,) float64, nan where it does not.

    Args:
        target: What is attacked.
        x: Clean images in [0, 1] that are classified right, (N, C, H, W).
        y: Labels, (N,).
        points: What an attack returned.
        norm: What the radius is measured in.
        generator: CPU generator of who is looked at again.
    """
    found = examine(target.logits, x, points, y, eps=torch.inf, norm=norm, generator=generator)
    size = norms(found.points.cpu().double() - x.cpu().double(), norm=norm)  # MPS has no float64
    return torch.where(found.broken.cpu(), size, torch.nan)
