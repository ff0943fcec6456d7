"""`cfamc attack --attack smallest`, corruptions or smoothing: measures of robustness that have no one eps.

The engine measures block by block; this keeps the ledger, makes figures of what is in it, and says what came out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, assert_never

from pydantic import JsonValue

from cfamc_cli.commands.attack_report import draw_points, failure, untrusted
from cfamc_cli.commands.common import Options
from cfamc_cli.comparison.measured import length, norm_of
from cfamc_cli.engine.sink import Talk
from cfamc_cli.errors import CfamcError, invalid
from cfamc_cli.recipe.schema import Corruptions, Measure, Norm, Recipe, Smallest, Smoothing, number
from cfamc_cli.report import terminal
from cfamc_cli.store.files import write_bytes
from cfamc_cli.store.measured import open_measure
from cfamc_cli.store.outcomes import key_of
from cfamc_cli.store.records import (
    Accuracy,
    AttackRecord,
    Environment,
    Flag,
    MeasuredBlock,
    MeasuredPoint,
    MeasureHeader,
    MeasureRecord,
    Outcomes,
    ProbeRecord,
    failures,
    load_record,
    now,
    save_record,
    unpack_bits,
)
from cfamc_cli.store.runs import ACCURACY, OUTCOMES, RECORD, RunFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cfamc_cli.engine.data.corrupted import Published
    from cfamc_cli.engine.data.sets import ImageSet
    from cfamc_cli.engine.distributed import World
    from cfamc_cli.engine.evaluation.measures import Values
    from cfamc_cli.engine.evaluation.verify import Predictor

Column = Sequence[float | None]
_SIZES = ("median eps", "auc up to eps")  # figures that are lengths
_SHOWN: dict[Norm, tuple[str, ...]] = {  # radii at which a curve is told; every sample's own is in samples.jsonl
    "linf": ("1/255", "2/255", "4/255", "6/255", "8/255", "12/255", "16/255", "24/255", "32/255"),
    "l2": ("0.1", "0.25", "128/255", "0.75", "1", "1.5", "2"),
}
_RADII = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # likewise, of certificates
_FOR_VALIDATION = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # published beside the 15 of every mean
_ROUNDING = 1e-6  # by which an example of a fixed eps may lie beyond it


@dataclass(frozen=True)
class Subject:
    """What is measured, on which samples, and where."""

    run: RunFolder
    recipe: Recipe
    probe: ProbeRecord
    predictor: Predictor
    data: ImageSet
    chosen: Tensor  # (N,) places of the samples in the split, in the order of `order_digest`
    order_digest: str
    x: Tensor  # their images, (N, C, H, W) in [0, 1]
    y: Tensor  # (N,)
    corruptions: Path | None  # folder of published ones; None for those of our own
    strict: bool  # a failed check is exit code 5
    plot: bool  # draw its points
    device: torch.device
    environment: Environment
    talk: Talk
    world: World


@dataclass(frozen=True)
class Broken:
    """Which of the first samples an attack of one eps has broken, with verified examples."""

    attack: str  # its id
    eps: float
    samples: Sequence[bool]


@dataclass
class Summary:
    """What the columns of a measure come to."""

    points: list[MeasuredPoint]
    figures: Mapping[str, float | None]
    flags: list[Flag] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def smallest_summary(eps: Column, *, norm: Norm, attacks: Sequence[Broken]) -> Summary:
    """The curve of accuracy against eps and its figures, from the smallest eps of each sample.

    Args:
        eps: Of each sample: 0 where it is wrong without an attack, None where no example was found at all.
        norm: What they are measured in.
        attacks: Of one eps each, on the same samples; what they broke at less counts.
    """
    known = [math.inf if value is None else value for value in eps]
    least, blamed = list(known), []
    for attack in attacks:
        for place, hit in enumerate(attack.samples[: len(known)]):
            if hit and attack.eps + _ROUNDING < known[place]:
                blamed.append(f"{place} ({attack.attack})")
                least[place] = min(least[place], attack.eps)
    n, limit, missing = len(known), number(_SHOWN[norm][-1]), sum(map(math.isinf, known))
    found = sum(value < old for value, old in zip(least, known, strict=True))
    points = [
        MeasuredPoint(name="accuracy", at=at, accuracy=Accuracy.of(sum(value > at + _ROUNDING for value in least), n))
        for at in map(number, ("0", *_SHOWN[norm]))
    ]
    figures = {
        "median eps": median(least) if math.isfinite(median(least)) else None,
        "auc": sum(min(value, limit) for value in least) / limit / n,
        "auc up to eps": limit,
        "broken at less by an attack of one eps": float(found),
        "without an example": float(missing),
    }
    told = f": {', '.join(blamed[:20])}{', ...' if len(blamed) > 20 else ''}" if blamed else ""
    flags = [
        _judged("contradiction", found, max(1, round(0.02 * n)), "samples that an attack of one eps broke at less, "
                f"which counts{told}"),
        _judged("without-example", missing, max(1, round(0.002 * n)), "samples of which no image at all is wrong"),
    ]  # fmt: skip
    held = ", ".join(attack.attack for attack in attacks)
    return Summary(points, figures, flags, [f"held against {held}" if held else "held against no attack of one eps"])


def smoothing_summary(right: Column, radius: Column, *, table: Smoothing) -> Summary:
    """Certified accuracy against the radius in L2.

    Args:
        right: Of each sample whether the smoothed classifier's class is its own: 1 or 0.
        radius: Within which that class stays; None where it abstains, which is never right.
        table: How they were found.
    """
    certified = [value if hit and value is not None else 0.0 for hit, value in zip(right, radius, strict=True)]
    n, abstained = len(certified), sum(value is None for value in radius)
    points = [
        MeasuredPoint(name="certified accuracy", at=at, accuracy=Accuracy.of(sum(value > at for value in certified), n))
        for at in _RADII
    ]
    figures = {
        "mean certified radius": sum(certified) / n,
        "abstained": float(abstained),
        "sigma": number(table.sigma),
        "confidence": 1 - table.alpha,
    }
    note = (
        f"a proof about the vote of noisy copies (sigma {table.sigma}), each wrong with probability {table.alpha:g} at "
        "most; neither an attack nor the accuracy of the classifier itself"
    )
    return Summary(points, figures, [], [note])


def corruptions_summary(columns: Mapping[str, Column], *, apart: Sequence[str] = ()) -> Summary:
    """Accuracy of each kind at each severity, of each kind, and their mean beside the clean one.

    Args:
        columns: Of each sample whether it is right: "clean", and "kind/severity".
        apart: Kinds that the mean leaves out where there are others.

    Source: Hendrycks & Dietterich, arXiv:1903.12261, whose mean is over 15 kinds; four more are for validation.
    """
    n, cells = len(columns["clean"]), [name.partition("/") for name in columns if name != "clean"]
    correct = {name: round(sum(value or 0 for value in column)) for name, column in columns.items()}
    points = [
        MeasuredPoint(name=kind, at=float(severity), accuracy=Accuracy.of(correct[f"{kind}/{severity}"], n))
        for kind, _, severity in cells
    ]
    kinds: dict[str, list[float]] = {}
    for point in points:
        kinds.setdefault(point.name, []).append(point.accuracy.value)
    left = [kind for kind in kinds if kind in apart] if set(kinds) - set(apart) else []
    counted = [value for kind, values in kinds.items() if kind not in left for value in values]
    mean, clean = sum(counted) / len(counted), correct["clean"] / n
    figures = {
        "mean": mean,
        "relative to clean": mean / clean if clean else None,
        **{f"mean of {kind}": sum(values) / len(values) for kind, values in kinds.items()},
    }
    notes = [f"the mean leaves out {', '.join(left)}, which were published for validation"] if left else []
    return Summary(points, figures, notes=notes)


def _judged(name: str, figure: float, limit: float, text: str) -> Flag:
    return Flag(name=name, figure=figure, limit=limit, verdict="passed" if figure <= limit else "failed", text=text)


def _attacks_on_the_same(work: Subject, norm: Norm) -> Iterator[Broken]:
    """What finished attacks of one eps did to these samples."""
    for path in sorted(work.run.attacks.glob(f"[!.]*/{RECORD}")):
        try:
            record, outcomes = load_record(path, AttackRecord), load_record(path.parent / OUTCOMES, Outcomes)
        except CfamcError as error:
            work.talk.warning(f"{error.message}; left alone")
            continue
        theirs = record.encoder_digest, record.head_digest, record.order_digest, record.data.fingerprint
        ours = work.probe.encoder_digest, work.probe.head_digest, work.order_digest, work.data.fingerprint
        if theirs == ours and (record.threat.space, record.threat.norm) == ("image", norm):
            masks = [unpack_bits(stage.broken, outcomes.n) for stage in outcomes.stages]
            yield Broken(record.id, number(record.threat.eps), [any(bits) for bits in zip(*masks, strict=True)])


def measured(work: Subject, table: Measure, options: Options) -> None:
    """Make one measure, or what is left of it, and say what came out.

    Raises:
        CfamcError: Exit 5; a check failed, and --strict refuses that.
    """
    from cfamc_cli.engine.evaluation import measures
    from cfamc_cli.engine.evaluation.blocks import BLOCK

    published = _published(work)
    settings = table.model_dump(mode="json") | ({"fingerprint": published.fingerprint} if published else {})
    header, label = _header(work, settings, BLOCK), f"{table.name} of {len(work.x):,} images"
    values = _values(work, table, published)

    def blocks_of(
        finished: Mapping[int, MeasuredBlock], commit: measures.Commit
    ) -> tuple[list[MeasuredBlock], tuple[Flag, ...]]:
        return measures.measure(
            work.predictor,
            work.x,
            work.y,
            values=values,
            seed=work.recipe.seed,
            block_size=BLOCK,
            device=work.device,
            finished=finished,
            commit=commit,
            label=label,
            talk=work.talk,
            world=work.world,
        )

    if not work.world.leads:
        blocks_of({}, lambda _block, _seconds: None)
        return
    with open_measure(work.run, table.name, header, warn=work.talk.warning) as ledger:
        if ledger.blocks:
            work.talk.message(f"{label}: goes on from {len(ledger.blocks)} finished blocks in {ledger.folder.name}")
        blocks, checks = blocks_of(ledger.blocks, ledger.commit)
        columns = {name: [value for block in blocks for value in block.columns[name]] for name in blocks[0].columns}
        summary = _summary(work, table, columns)
        record = MeasureRecord(
            id=ledger.folder.name,
            run=work.run.id,
            probe=work.probe.id,
            created=now(),
            head=work.probe.head,
            features=work.probe.features,
            measure=table.name,
            settings=settings,
            data=work.data.used().model_copy(update={"n": len(work.x)}),
            order_digest=work.order_digest,
            encoder_digest=work.probe.encoder_digest,
            clean=Accuracy.of(round(sum(value or 0 for value in columns["clean"])), len(work.x)),
            points=tuple(summary.points),
            figures=dict(summary.figures),
            flags=(*checks, *summary.flags),
            wall_seconds=ledger.seconds(),
            environment=work.environment,
            recipe_digest=work.recipe.digest(),
            seed=work.recipe.seed,
            head_digest=work.probe.head_digest,
            notes=tuple(summary.notes),
            forward=sum(block.forward for block in blocks),
            backward=sum(block.backward for block in blocks),
        )
        save_record(ledger.folder / RECORD, record)
        if work.plot:
            write_bytes(ledger.folder / ACCURACY, draw_points(record))
            work.talk.message(f"drawn: {ledger.folder / ACCURACY}")
        _tell(work.run, RunFolder(ledger.folder), record, strict=work.strict, options=options)


def _header(work: Subject, settings: Mapping[str, JsonValue], block: int) -> MeasureHeader:
    """What the values depend on but the number of samples makes the key."""
    key = {
        "schema": 1,
        "encoder": work.probe.encoder_digest,
        "head": work.probe.head_digest,
        "features": work.probe.features,
        "data": work.data.fingerprint,
        "order": work.order_digest,
        "settings": settings,
        "seed": work.recipe.seed,
        "block": block,
    }
    return MeasureHeader(
        n=len(work.x),
        block=block,
        order_digest=work.order_digest,
        data_fingerprint=work.data.fingerprint,
        key=key_of(key),
    )


def _published(work: Subject) -> Published | None:
    """The published corruptions that were asked for; None for those of our own."""
    from cfamc_cli.engine.data.corrupted import find_published

    if work.corruptions is None:
        return None
    if work.data.split != "test":
        raise invalid("--corruptions: published corruptions are of test images", "add --split test")
    return find_published(work.corruptions, work.data)


def _values(work: Subject, table: Measure, published: Published | None) -> Values:
    from cfamc_cli.engine.corruptions import KINDS, corrupted
    from cfamc_cli.engine.evaluation import measures
    from cfamc_cli.engine.evaluation.blocks import BLOCK
    from cfamc_cli.engine.evaluation.smoothing import smoothing

    match table:
        case Smallest():
            return measures.smallest(table, seed=work.recipe.seed)
        case Smoothing():
            return smoothing(table, seed=work.recipe.seed)
        case Corruptions():

            def corrupt(x: Tensor, places: Tensor, kind: str, severity: int) -> Tensor:
                if published is not None:
                    return published.images(places, kind=kind, severity=severity)
                return corrupted(x, places, kind=kind, severity=severity)

            kinds = published.kinds if published else KINDS
            return measures.corruptions(kinds, corrupt, places=work.chosen, block_size=BLOCK)
        case _:
            assert_never(table)


def _summary(work: Subject, table: Measure, columns: dict[str, list[float | None]]) -> Summary:
    match table:
        case Smallest():
            attacks = list(_attacks_on_the_same(work, table.norm))
            return smallest_summary(columns["eps"], norm=table.norm, attacks=attacks)
        case Smoothing():
            return smoothing_summary(columns["right"], columns["radius"], table=table)
        case Corruptions():
            return corruptions_summary(columns, apart=() if work.corruptions is None else _FOR_VALIDATION)
        case _:
            assert_never(table)


def _tell(run: RunFolder, kept: RunFolder, record: MeasureRecord, *, strict: bool, options: Options) -> None:
    """Say what came out: talk to stderr, the table or one JSON object to stdout.

    Raises:
        CfamcError: Exit 5; a check failed, and `strict` refuses that.
    """
    say, failed = terminal.talk().say, failures(record.flags)
    for flag in failed:
        say(failure(record.id, flag))
    if not options.quiet:
        for note in record.notes:
            say(f"note: {note}")
    answer = {**record.model_dump(mode="json"), "path": str(kept.path), "trusted": not failed}
    if not options.as_json:
        size = partial(length, norm=norm_of(record))
        figures = "; ".join(
            f"{name} {'unknown' if value is None else size(value) if name in _SIZES else terminal.number(value)}"
            for name, value in record.figures.items()
        )
        title = f"{run.id}, head {record.probe}: {record.measure}, {record.clean.n:,} images; % with 95 % intervals"
        rows = [("clean", "", terminal.interval(record.clean))]
        rows += [(point.name, size(point.at), terminal.interval(point.accuracy)) for point in record.points]
        terminal.print_rows(title, ("", "at", "right %"), rows, right=(1, 2))
        terminal.write_out(f"{figures}\nkept as {record.id}\n")
    if strict and failed:
        raise untrusted("measure", [flag.name for flag in failed], details=answer)
    if options.as_json:
        terminal.print_json(answer)
