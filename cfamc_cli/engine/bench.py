"""What a recipe costs on this machine: its own training loop, timed on random images for a few batches.

Sections are those that the loop names (cfamc_cli/engine/sections.py), rates are of the plan's count of operations, and
what is predicted is a sum: warm-up, batches, online evaluations, checkpoints.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.engine import monitor
from cfamc_cli.engine.costs import plan_of
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.device import (
    Precision,
    full_precision,
    out_of_memory,
    peak_memory,
    pick_compile,
    pick_precision,
)
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sections import Clock, Lap, Section
from cfamc_cli.engine.sink import NullLedger, NullTalk, Talk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.plan import Plan
from cfamc_cli.recipe.schema import NoAdversary, Recipe
from cfamc_cli.store.records import PeakRate, SectionTime, Spread, TrainingCost, Variant

Settings = dict[str, str | bool]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
CHOICES: dict[str, tuple[str | bool, ...]] = {
    "train.precision": PRECISIONS,
    "train.compile": (False, True),
    "train.memory": ("full", "recompute"),
}
LEAST, MOST = 3, 100  # batches that are timed, whatever time there is
_ENDLESS = {"epochs": 100_000.0, "checkpoint_every": 10**9, "checkpoint_minutes": 0.0}
_MOST_DATA = 2**30  # bytes of random images
_RESAMPLES = 2000  # of the bootstrap


def variants(recipe: Recipe, *, device: torch.device, seconds: float, alone: bool, talk: Talk) -> list[Variant]:
    """Measure training with the recipe's own settings, and with others, one choice after the other.

    The better of a choice is kept for the next ones, so that the best combination was measured as such.

    Args:
        recipe: Whose loop runs.
        device: Where.
        seconds: Time for each variant; at least 3 batches are timed, and one goes before them.
        alone: Measure the recipe's own settings only.
        talk: Hears what is under way.

    Returns:
        The recipe's own settings first. What ran out of memory or cannot run here says so.

    Raises:
        CfamcError: The recipe's own settings diverge or are too large, and so does all else.
    """
    costs = plan_of(recipe)
    data = random_images(recipe, costs.images)
    own = resolved_settings(recipe, costs.images, device=device, talk=talk)

    def measured(settings: Settings) -> Variant:
        variant = Variant(settings=settings, skipped="", cost=None)
        talk.message(f"measuring: {variant.words}")
        return _tried(with_settings(recipe, settings), variant, data, device, seconds, first=not made)

    made: list[Variant] = []
    made.append(measured(own))
    for key, values in () if alone else CHOICES.items():
        for value in values:
            kept = best(made)
            if value != kept.settings[key]:
                made.append(measured(_changed(kept.settings, key, value)))
    if all(variant.cost is None for variant in made):
        raise CfamcError(made[0].skipped, hint="lower train.batch_size, crops.0.count or model.width")
    return made


def _changed(settings: Settings, key: str, value: str | bool) -> Settings:
    """Other settings; what is compiled cannot be recomputed, so that one gives way to the other."""
    way = {"train.compile": False} if value == "recompute" else {"train.memory": "full"} if value is True else {}
    return settings | way | {key: value}


def _tried(
    recipe: Recipe, variant: Variant, data: ImageSet, device: torch.device, seconds: float, *, first: bool
) -> Variant:
    """Measure one variant, or say why it cannot be."""
    why = ""
    if variant.settings["train.precision"] == "bfloat16" and pick_precision("auto", device) != "bfloat16" and not first:
        return variant.model_copy(update={"skipped": "bfloat16 is emulated on this device"})
    try:
        with out_of_memory():
            cost = measure(recipe, data, device=device, seconds=seconds, memory=first)
            return variant.model_copy(update={"cost": cost})
    except CfamcError as error:
        if error.exit_code not in (ExitCode.FAILED, ExitCode.DIVERGED):
            raise
        why = error.message
    except Exception as error:  # the compiler's own kinds are many
        if not variant.settings["train.compile"]:
            raise
        why = f"it cannot be compiled here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return variant.model_copy(update={"skipped": why})


def best(made: Sequence[Variant]) -> Variant:
    """The first variant, or one that was measured to be faster: whose interval of the whole run lies below."""
    chosen = made[0]
    for variant in made[1:]:
        if variant.cost is not None and (chosen.cost is None or _below(variant.cost, chosen.cost)):
            chosen = variant
    return chosen


def _below(cost: TrainingCost, other: TrainingCost) -> bool:
    mine, its = cost.predicted, other.predicted
    return (mine.seconds if mine.high is None else mine.high) < (its.seconds if its.low is None else its.low)


def resolved_settings(recipe: Recipe, images: int, *, device: torch.device, talk: Talk) -> Settings:
    """What the recipe's "auto" comes to on a device."""
    return {
        "train.precision": pick_precision(recipe.train.precision, device),
        "train.compile": pick_compile(recipe, images, device, talk=talk),
        "train.memory": recipe.train.memory,
    }


def with_settings(recipe: Recipe, settings: Mapping[str, str | bool]) -> Recipe:
    """The recipe with other values of [train]."""
    return _with_train(recipe, {key.removeprefix("train."): value for key, value in settings.items()})


def _with_train(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def random_images(recipe: Recipe, images: int) -> ImageSet:
    """Labelled images that nobody has to download: of the recipe's size, and so many of them or 1 GiB."""
    known = KNOWN_SETS.get(recipe.data.dataset)
    size = recipe.data.size or (known.size if known else max(group.size for group in recipe.crops))
    count = max(recipe.fewest_images, min(images, _MOST_DATA // (3 * size**2)))
    classes = known.classes if known else 10
    return ImageSet(
        images=torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8),
        labels=torch.arange(count) % classes,
        classes=tuple(f"class {label}" for label in range(classes)),
        dataset=recipe.data.dataset,
        split="train",
        fingerprint="",
        licence="",
    )


class _Enough(Exception):  # noqa: N818 - it is no failure
    """Ends the loop before it saves."""


def measure(
    recipe: Recipe, data: ImageSet, *, device: torch.device, seconds: float, memory: bool = True
) -> TrainingCost:
    """Run the recipe's training loop for a few batches of each phase.

    Args:
        recipe: With its settings as they are to be measured.
        data: Images to train on.
        device: Where to compute.
        seconds: Time for batches after the warm-up; at least 3 of a phase are timed, and at most 100.
        memory: Whether the peak of a process's memory is this recipe's; on CUDA it is measured always.

    Returns:
        The cost of a batch of the first phase; memory and what is predicted are of the whole run.

    Raises:
        CfamcError: As `Trainer.train`.
    """
    parts = recipe.parts()
    costs = [
        _measure_phase(part, data, device=device, seconds=seconds / len(parts), memory=memory, first=place == 0)
        for place, part in enumerate(parts)
    ]
    memories, predicted = [cost.peak_memory for cost in costs], [cost.predicted for cost in costs]
    whole = {
        "phases": len(parts),
        "peak_memory": max((peak for peak in memories if peak is not None), default=None),
        "predicted": Spread(
            seconds=sum(spread.seconds for spread in predicted),
            low=_sum([spread.low for spread in predicted]),
            high=_sum([spread.high for spread in predicted]),
        ),
    }
    return costs[0].model_copy(update=whole)


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _measure_phase(
    recipe: Recipe, data: ImageSet, *, device: torch.device, seconds: float, memory: bool, first: bool
) -> TrainingCost:
    """As `measure`, of a recipe without phases."""
    warm = 3 if device.type == "cuda" else 1  # choosing kernels, filling the allocator
    endless = _with_train(recipe, _ENDLESS | {"evaluate_every": 100_000 if recipe.train.evaluate_every else 0})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer(endless, data, device=device, world=World(), talk=NullTalk(), ledger=NullLedger())
    profiler = _profiler(device)
    done, spent = 0, 0.0  # batches, and seconds of those after the warm-up

    def after_batch() -> int:
        nonlocal done, spent
        if trainer.step < (done + 1) * recipe.replays:  # an evaluation asks too
            return 0
        took, done = clock.lap(), done + 1
        spent += took if done > warm else 0.0
        timed = done - warm
        if profiled:
            raise _Enough
        if timed >= MOST or (timed >= LEAST and spent >= seconds):
            if profiler is None:
                raise _Enough
            profiled.append(timed)
            profiler.start()
        return 0

    profiled: list[int] = []
    with Clock(device) as clock, tempfile.TemporaryDirectory() as folder:
        with suppress(_Enough):
            trainer.train(Path(folder), stop=after_batch)
        if profiler is not None:
            profiler.stop()
        laps = clock.laps()
        began = time.perf_counter()
        trainer.save(Path(folder))
        saved = time.perf_counter() - began
    timed = laps[warm : profiled[0] + warm] if profiled else laps[warm:]
    peak = peak_memory(device) if memory or device.type == "cuda" else None
    return _cost(recipe, laps[:warm], timed, saved=saved, peak=peak, counted=_counts(profiler), first=first)


def _cost(
    recipe: Recipe,
    warm: Sequence[Lap],
    laps: Sequence[Lap],
    *,
    saved: float,
    peak: int | None,
    counted: tuple[int, int] | None,
    first: bool,
) -> TrainingCost:
    costs = plan_of(recipe)
    evaluation = sum(lap.host.get("evaluation", 0.0) for lap in warm)
    mean = statistics.fmean(lap.seconds for lap in laps)
    extra = max(0.0, sum(lap.seconds for lap in warm) - evaluation - len(warm) * mean)
    passes = (costs.view_passes + costs.attack_view_passes) / costs.batches
    return TrainingCost(
        batches=len(laps),
        batch_seconds=statistics.median(lap.seconds for lap in laps),
        sections=tuple(_section(name, laps) for name in get_args(Section) if any(name in lap.host for lap in laps)),
        launches=counted and counted[0],
        waits=counted and counted[1],
        views_per_second=passes / mean,
        flops_per_second=costs.flops / costs.batches / mean,
        peak_memory=peak,
        warmup_seconds=extra,
        evaluation_seconds=evaluation,
        checkpoint_seconds=saved,
        predicted=predict(
            [lap.seconds for lap in laps],
            recipe,
            costs,
            warmup=extra,
            evaluation=evaluation,
            checkpoint=saved,
            first=first,
        ),
    )


def _section(name: Section, laps: Sequence[Lap]) -> SectionTime:
    device = [lap.device.get(name, 0.0) for lap in laps if lap.device is not None]
    host = statistics.median(lap.host.get(name, 0.0) for lap in laps)
    return SectionTime(name=name, host=host, device=max(0.0, statistics.median(device)) if device else None)


def predict(
    seconds: Sequence[float],
    recipe: Recipe,
    costs: Plan,
    *,
    warmup: float,
    evaluation: float,
    checkpoint: float,
    first: bool = True,
) -> Spread:
    """The time of a run of one phase, from batches that were timed.

    Args:
        seconds: Of those batches.
        recipe: Says how often there are evaluations and checkpoints, and whether adversaries are compared.
        costs: Of the run.
        warmup: What the first batches take longer, in seconds.
        evaluation: Seconds of one evaluation.
        checkpoint: Seconds of one checkpoint.
        first: Whether there is an evaluation before the first batch, as in a run's first phase.

    Source:
        Efron 1979, Bootstrap methods: the 95 % percentile interval of the mean of the batches; what changes between
        the bench and the run is not in it.
    """
    every = recipe.train.checkpoint_every or costs.batches_per_epoch
    apart = warmup + checkpoint * -(-costs.batches // every)
    if recipe.train.evaluate_every:
        apart += evaluation * (first - (-costs.batches // (costs.batches_per_epoch * recipe.train.evaluate_every)))
    compared = 0.0 if isinstance(recipe.adversary, NoAdversary) else _share_of_comparisons(recipe, costs)
    times = torch.tensor(seconds, dtype=torch.float64)
    whole = costs.batches * (1 + compared)
    if len(seconds) < 2:
        return Spread(seconds=apart + whole * float(times.mean()), low=None, high=None)
    drawn = torch.randint(len(times), (_RESAMPLES, len(times)), generator=torch.Generator().manual_seed(0))
    low, high = times[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Spread(seconds=apart + whole * float(times.mean()), low=apart + whole * low, high=apart + whole * high)


def _share_of_comparisons(recipe: Recipe, costs: Plan) -> float:
    """What the monitor of catastrophic overfitting adds to the passes of a run."""
    size, passes = recipe.train.batch_size, 1 + recipe.ascent_steps
    planned = monitor.schedule(updates=costs.weight_updates, batch_size=size, passes_per_update=passes)
    return monitor.COST if planned.every else 0.0


def _profiler(device: torch.device) -> torch.profiler.profile | None:
    """What counts launches and waits; on a CPU there are none."""
    if device.type != "cuda":
        return None
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])


def _counts(profiler: torch.profiler.profile | None) -> tuple[int, int] | None:
    """Launches of kernels and waits of the host, from the names of CUDA's calls; None where none was seen."""
    if profiler is None:
        return None
    calls = {event.key: event.count for event in profiler.key_averages()}
    launches = sum(count for name, count in calls.items() if "LaunchKernel" in name)
    waits = sum(count for name, count in calls.items() if name.startswith("cuda") and "Synchronize" in name)
    return (launches, waits) if launches else None


def peaks(recipe: Recipe, *, device: torch.device, precisions: Sequence[Precision]) -> tuple[PeakRate, ...]:
    """What the device reaches at best: the product of two square matrices, and a convolution of the recipe's kind."""
    return tuple(_peak(recipe, device, precision) for precision in precisions)


def _peak(recipe: Recipe, device: torch.device, precision: Precision) -> PeakRate:
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    large = device.type == "cuda"
    side, images = (8192, 1024) if large else (1024, 64)
    channels = 2 * recipe.model.width
    pixels = max(4, recipe.crops[0].size // (8 if recipe.model.stem == "imagenet" else 2))
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    last = torch.channels_last
    x = torch.randn(images, channels, pixels, pixels, device=device, dtype=dtype).to(memory_format=last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=last)
    with torch.no_grad(), full_precision(device):
        product = _fastest(lambda: a @ b, device)
        convolution = _fastest(lambda: functional.conv2d(x, weight, padding=1), device)
    operations = 2 * images * pixels**2 * channels**2 * 9
    return PeakRate(precision=precision, matrix_product=2 * side**3 / product, convolution=operations / convolution)


def _fastest(work: Callable[[], Tensor], device: torch.device, *, seconds: float = 0.3) -> float:
    """The shortest of several calls, in seconds; a few together on CUDA, so that the host is not what is measured."""
    calls = 10 if device.type == "cuda" else 1
    work()
    return min(_repeated(work, device, calls, seconds))


def _repeated(work: Callable[[], Tensor], device: torch.device, calls: int, seconds: float) -> Iterator[float]:
    until = time.perf_counter() + seconds
    while True:
        _wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(device)
        now = time.perf_counter()
        yield (now - began) / calls
        if now >= until:
            return


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
