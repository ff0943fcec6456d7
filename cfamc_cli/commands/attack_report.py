"""What `cfamc attack` says: the table, the curve over eps, the checks that failed, one JSON object, and plots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from cfamc_cli.commands.common import Options
from cfamc_cli.comparison.measured import norm_of
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.schema import fraction
from cfamc_cli.report import terminal
from cfamc_cli.report.audit import audit_paragraph, lacks_audit, verdict
from cfamc_cli.report.plots import draw
from cfamc_cli.store.records import Accuracy, AttackRecord, Flag, Mask, MeasuredPoint, MeasureRecord, failures
from cfamc_cli.store.runs import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_AUDITED = Flag(name="audit", figure=None, limit=None, verdict="skipped", text="not asked for: --audit")
_CURVE_WIDTH = 40


@dataclass(frozen=True)
class Result:
    """One finished evaluation."""

    folder: Path
    record: AttackRecord
    clean: Mask  # which samples are classified right without an attack
    robust: Mask  # which of them stand under it

    @property
    def eps(self) -> Fraction:
        """Its radius."""
        return fraction(self.record.threat.eps)

    @property
    def failed(self) -> list[Flag]:
        """The checks that say not to trust it."""
        return failures(self.record.flags)


@dataclass(frozen=True)
class Point(Result):
    """One evaluation of a curve."""

    worst: Accuracy  # over the samples that stand here and at every smaller radius of the curve


def curves(results: Sequence[Result]) -> list[list[Point]]:
    """Results of one threat model but for its size, each list from the smallest radius to the largest.

    The worst case of a sample counts every attack of the list up to its radius: what broke it within a smaller ball
    lies in the larger one too.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.record.threat.space, result.record.threat.norm), []).append(result)
    return [list(_curve(group)) for group in groups.values()]


def _curve(group: list[Result]) -> Iterator[Point]:
    standing = list(group[0].clean)
    for eps in sorted({result.eps for result in group}):
        same = [result for result in group if result.eps == eps]
        standing = [all(bits) for bits in zip(standing, *(result.robust for result in same), strict=True)]
        worst = Accuracy.of(sum(standing), len(standing))
        yield from (Point(r.folder, r.record, r.clean, r.robust, worst) for r in same)


def tell(run: RunFolder, results: Sequence[Result], drawn: Sequence[Path], *, strict: bool, options: Options) -> None:
    """Say what came out: talk to stderr, the table or one JSON object to stdout.

    Raises:
        CfamcError: Exit 5; a check failed, and `strict` refuses that.
    """
    groups = curves(results)
    points = [point for group in groups for point in group]
    _talk(results, drawn, groups, quiet=options.quiet)
    failed = dict.fromkeys(flag.name for result in results for flag in result.failed)
    answer = {
        "run": run.id,
        "path": str(run.path),
        "probe": results[0].record.probe,
        "trusted": not failed,
        "results": [
            {
                **point.record.model_dump(mode="json"),
                "path": str(point.folder),
                "trusted": not point.failed,
                "worst_case": point.worst.model_dump(mode="json"),
                "audit": None if lacks_audit(point.record) else audit_paragraph(point.record),
            }
            for point in points
        ],
    }
    if not options.as_json:
        _print_table(points)
    if strict and failed:
        raise untrusted("evaluation", failed, details=answer)
    if options.as_json:
        terminal.print_json(answer)


def failure(record: str, flag: Flag) -> str:
    """A failed check of a record, in words."""
    figure = "" if flag.figure is None else f" {terminal.number(flag.figure)}, at most {flag.limit:g}"
    return f"warning: {record}: check {flag.name} failed:{figure}: {flag.text}"


def untrusted(what: str, failed: Iterable[str], *, details: Mapping[str, object]) -> CfamcError:
    """The error of an "evaluation" or a "measure" whose checks of these names failed, under --strict."""
    return CfamcError(
        f"the {what} cannot be trusted: {', '.join(failed)}",
        hint="each failed check and its figure is in the record's flags; leave --strict out to accept the numbers",
        exit_code=ExitCode.UNTRUSTED,
        details=details,
    )


def _talk(results: Sequence[Result], drawn: Sequence[Path], groups: list[list[Point]], *, quiet: bool) -> None:
    say = terminal.talk().say
    for result in results:
        for flag in result.failed:
            say(failure(result.record.id, flag))
    if quiet:
        return
    records = [result.record for result in results]
    notes = dict.fromkeys(f"note: {note}" for record in records for note in record.notes)
    audits = [f"audit of {record.id}: {audit_paragraph(record)}" for record in records if not lacks_audit(record)]
    for line in (*notes, *audits):
        say(line)
    for path in drawn:
        say(f"drawn: {path}")
    for group in groups:
        by_eps = {point.record.threat.eps: point.worst for point in group}
        if len(by_eps) > 1:
            record = group[0].record
            say(f"accuracy against {record.threat.norm} eps (a sample broken at a smaller eps stays broken):")
            width = max(map(len, by_eps))
            for eps, accuracy in ({"0": record.clean} | by_eps).items():
                bar = "#" * round(_CURVE_WIDTH * accuracy.value)
                say(f"  {eps:>{width}} |{bar:<{_CURVE_WIDTH}}| {terminal.interval(accuracy)}")


def _print_table(points: Sequence[Point]) -> None:
    first = points[0].record
    rows = []
    for point in points:
        record = point.record
        worst = (terminal.percent(point.worst.value),) if len(points) > 1 else ()
        shares = (terminal.interval(record.clean), terminal.interval(record.robust), *worst)
        rows.append((record.attack, f"{record.threat.norm} {record.threat.eps}", *shares, verdict(record), record.id))
    title = f"{first.run}, head {first.probe}: {first.subset}; % with 95 % intervals"
    columns = ("attack", "threat", "clean", "robust", *(["worst case"] if len(points) > 1 else []), "checks", "kept as")
    terminal.print_rows(title, columns, rows, right=range(2, len(columns) - 2))
    terminal.write_lines(explained([point.record for point in points]))


def explained(records: Sequence[AttackRecord]) -> Iterator[str]:
    """What a reader of the table cannot know."""
    if len(records) > 1:
        yield "worst case: what stands under this attack and all others here of its eps or a smaller one."
    if any(map(lacks_audit, records)):
        yield "no audit: only checks that cost nothing were made; --audit attacks again to see whether to trust this."
    for record in records:
        attacks = [stage for stage in record.stages if stage.name != "clean"]
        if len(attacks) > 1:
            stages = ", ".join(f"{stage.name} {stage.broken:,} of {stage.attacked:,}" for stage in attacks)
            yield f"{record.id}: stages, each on what is still right, broke: {stages}."


def draw_loss(losses: Sequence[float], right: Sequence[float], *, title: str) -> bytes:
    """Draw loss and accuracy against steps, as a PNG."""

    def panel(axes: Axes) -> None:
        axes.set_title(terminal.clean(title))
        axes.set_xlabel("steps")
        axes.plot(losses, color="#0072B2", marker=".")
        axes.set_ylabel("mean cross-entropy", color="#0072B2")
        other = axes.twinx()
        other.plot([100 * share for share in right], color="#D55E00", linestyle="--")
        other.set_ylabel("accuracy of the iterate (%)", color="#D55E00")
        other.set_ylim(0, 102)
        other.spines["right"].set_visible(True)

    return draw([panel], ".png")


def draw_accuracy(group: Sequence[Point]) -> bytes:
    """Draw the worst case against eps, with its interval, and each attack's own figures, as a PNG."""
    record = group[0].record
    title = f"{record.run}, {record.probe}, {record.threat.norm}, n = {record.clean.n}"
    at = [0.0, *(255 * float(point.eps) for point in group)]
    worst = [record.clean, *(point.worst for point in group)]

    def panel(axes: Axes) -> None:
        axes.set_title(terminal.clean(title))
        axes.set_xlabel("eps (255ths of the image range)")
        low, high = [100 * accuracy.low for accuracy in worst], [100 * accuracy.high for accuracy in worst]
        axes.fill_between(at, low, high, alpha=0.2, color="#0072B2")
        axes.plot(at, [100 * accuracy.value for accuracy in worst], color="#0072B2", label="worst case up to eps")
        for name in dict.fromkeys(point.record.attack for point in group):
            own = [point for point in group if point.record.attack == name]
            values = [100 * point.record.robust.value for point in own]
            axes.plot([255 * float(point.eps) for point in own], values, "o", label=terminal.clean(name))
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(bottom=0)

    return draw([panel], ".png")


def draw_points(record: MeasureRecord) -> bytes:
    """Draw the points of a measure with their intervals, a line for each kind, as a PNG."""
    scale, along = {
        "smallest": (255, "eps (255ths of the image range)") if norm_of(record) == "linf" else (1, "eps in L2"),
        "smoothing": (1, "radius in L2"),
        "corruptions": (1, "severity"),
    }[record.measure]
    curves: dict[str, list[MeasuredPoint]] = {}
    for point in record.points:
        curves.setdefault(point.name, []).append(point)

    def panel(axes: Axes) -> None:
        title = f"{record.run}, {record.probe}, {record.measure}, n = {record.clean.n}"
        axes.set(title=terminal.clean(title), xlabel=along, ylabel="right (%)", ylim=(0, 100))
        axes.axhline(100 * record.clean.value, color="0.5", linestyle="--", label="clean")
        for name, points in curves.items():
            at, shares = [scale * point.at for point in points], [point.accuracy for point in points]
            (line,) = axes.plot(at, [100 * share.value for share in shares], marker=".", label=terminal.clean(name))
            if len(curves) == 1:
                low, high = [100 * share.low for share in shares], [100 * share.high for share in shares]
                axes.fill_between(at, low, high, alpha=0.2, color=line.get_color())

    return draw([panel], ".png")


def draw_surface(surface: Sequence[Sequence[float]], reach: float, *, title: str) -> bytes:
    """Draw the mean loss around images, and the ball in it, as a PNG; lengths in radii of the ball.

    Args:
        surface: Losses, a row for each step along a random direction, from -reach to reach; a column for each along the
            gradient.
        reach: How far both go, in radii.
        title: Above the picture.
    """

    def panel(axes: Axes) -> None:
        axes.set(title=terminal.clean(title), xlabel="along the gradient (eps)", ylabel="in a random direction (eps)")
        steps = [reach * (2 * at / (len(surface) - 1) - 1) for at in range(len(surface))]
        filled = axes.contourf(steps, steps, surface, levels=20, cmap="viridis")
        axes.plot((-1, 1, 1, -1, -1), (-1, -1, 1, 1, -1), color="white", linewidth=1)
        bar = axes.inset_axes((1.03, 0, 0.04, 1))
        axes.figure.colorbar(filled, cax=bar, label="mean cross-entropy")

    return draw([panel], ".png")
