"""Benches as text: one spelled out, and all of a store side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfamc_cli.recipe.plan import duration
from cfamc_cli.report.sheets import Sheet, compact
from cfamc_cli.report.terminal import number
from cfamc_cli.store.records import AttackCost, BenchRecord, Spread, TrainingCost, Variant


def spelled_out(record: BenchRecord) -> Iterator[Sheet]:
    """The sections of a batch, the variants of the settings, and the attacks where they were measured."""
    yield _sections(record, *_measured(record))
    yield _variants(record)
    if record.attacks:
        yield _attacks(record.attacks)


def side_by_side(records: Sequence[BenchRecord], *, limit: int) -> Sheet:
    """All benches of a store, a row each for the recipe's own settings, or the first that could be measured."""
    rows = []
    for record in records[: limit or None]:
        made, cost = _measured(record)
        rows.append(
            (
                record.id,
                record.environment.device,
                made.words,
                f"{cost.views_per_second:,.0f}",
                expected(cost.predicted),
            )
        )
    columns = ("bench", "device", "settings", "views/s", "whole run")
    title = "Benches: what recipes cost, measured on random images"
    return Sheet(title, columns, (3, 4), tuple(rows), more=len(records) - len(rows))


def _measured(record: BenchRecord) -> tuple[Variant, TrainingCost]:
    """The recipe's own settings, or the first that could be measured; a bench without any leaves no record."""
    return next((variant, variant.cost) for variant in record.variants if variant.cost is not None)


def expected(spread: Spread) -> str:
    """Such as "1 h 37 min \u00b1 2 %": half of the interval."""
    if spread.low is None or spread.high is None or spread.seconds == 0:
        return duration(spread.seconds)
    return f"{duration(spread.seconds)} \u00b1 {50 * (spread.high - spread.low) / spread.seconds:.0f} %"


def _sections(record: BenchRecord, variant: Variant, cost: TrainingCost) -> Sheet:
    on_device = any(part.device is not None for part in cost.sections)
    columns = ("section", "host ms", *(("device ms",) if on_device else ()), "share")

    def share(part: float) -> str:
        return f"{100 * part / cost.batch_seconds:.1f} %"

    rows = [
        (
            part.name,
            _ms(part.host),
            *((_ms(part.device or 0.0),) if on_device else ()),
            share(part.host if part.device is None else part.device),
        )
        for part in cost.sections
    ]
    rows.append(("whole batch", *(("",) if on_device else ()), _ms(cost.batch_seconds), "100.0 %"))
    title = f"{record.name} on {record.environment.device}: a batch's time, {variant.words}"
    notes = [f"Medians of {cost.batches} batches of the training loop, on random images."]
    if cost.phases > 1:
        notes.append(f"A batch is of the first of {cost.phases} phases; memory and the whole run are of all of them.")
    if cost.launches is not None:
        notes.append(f"A batch makes {cost.launches:,} launches and {cost.waits:,} waits for the device.")
    apart = [
        f"{duration(seconds)} for {what}"
        for what, seconds in (
            ("warming up", cost.warmup_seconds),
            ("an evaluation", cost.evaluation_seconds),
            ("a checkpoint", cost.checkpoint_seconds),
        )
        if seconds >= 0.5
    ]
    notes += [f"Besides: {', '.join(apart)}."] if apart else []
    return Sheet(title, columns, tuple(range(1, len(columns))), tuple(rows), tuple(notes))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}"


def _variants(record: BenchRecord) -> Sheet:
    rows, notes = [], []
    for variant in record.variants:
        cost, said = variant.cost, variant.words
        if cost is None:
            notes.append(f"{said} was not measured: {variant.skipped}.")
            continue
        memory = "" if cost.peak_memory is None else f"{cost.peak_memory / 2**30:.1f}"
        rates = (f"{cost.views_per_second:,.0f}", f"{cost.flops_per_second / 1e9:,.0f}")
        rows.append((said, *rates, _reached(record, variant), memory, expected(cost.predicted)))
    columns = ("settings", "views/s", "GFLOP/s", "of peak", "GiB", "whole run")
    whole = "process" if record.environment.device.startswith(("cpu", "mps")) else "device"
    for peak in record.peaks:
        product, convolution = (compact(int(rate)) for rate in (peak.matrix_product, peak.convolution))
        notes.append(f"Peak in {peak.precision}: matrix product {product}FLOP/s, convolution {convolution}FLOP/s.")
    notes.append(f"GiB: the most that the {whole} held; the plan says {record.planned_memory / 2**30:.2g}.")
    notes.append("\u00b1: half of the bootstrap 95 % interval of the mean batch, on a machine as it was.")
    if record.recommended:
        chosen = " ".join(f"--set {key}={str(value).lower()}" for key, value in record.recommended.items())
        notes.append(f"Faster here: {chosen}" if record.variants[0].cost else f"Possible here: {chosen}")
    elif len(record.variants) > 1:
        notes.append("None was measured to be faster than the recipe's own settings.")
    title = f"{record.batches:,} batches, {record.weight_updates:,} weight updates, {record.images:,} images"
    return Sheet(title, columns, (1, 2, 3, 4, 5), tuple(rows), tuple(notes))


def _reached(record: BenchRecord, variant: Variant) -> str:
    """The share of the better of the two peaks in the variant's precision."""
    best = [
        max(peak.matrix_product, peak.convolution)
        for peak in record.peaks
        if peak.precision == variant.settings["train.precision"]
    ]
    return f"{100 * variant.cost.flops_per_second / best[0]:.0f} %" if best and variant.cost else ""


def _attacks(attacks: Sequence[AttackCost]) -> Sheet:
    rows = [
        (
            f"{cost.name} {cost.threat.norm} {cost.threat.eps}",
            f"{cost.forward:,.0f}",
            f"{cost.backward:,.0f}",
            f"{number(cost.seconds_per_1000)} s",
            "" if cost.predicted is None else duration(cost.predicted),
        )
        for cost in attacks
    ]
    sizes = {cost.test_images for cost in attacks}
    of_all = f"all {sizes.pop():,} images" if sizes != {None} else "whole test set"
    columns = ("attack", "forward", "backward", "1,000 samples", of_all)
    notes = ("Of samples that no stage breaks, the most that it can cost: broken ones leave early.",)
    return Sheet("Attacks", columns, (1, 2, 3, 4), tuple(rows), notes)
