"""What `cfamc attack` says: the table, the curve over eps, the checks that failed, one JSON object, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from cfamc_cli import render
from cfamc_cli.commands.common import Options
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.plots import draw
from cfamc_cli.recipe import fraction
from cfamc_cli.records import Accuracy, AttackRecord, Flag
from cfamc_cli.store import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_AUDITED = "audit"  # the flag that says that the full audit was not asked for
_CURVE_WIDTH = 40


@dataclass(frozen=True)
class Result:
    """One finished evaluation.

    Attributes:
        folder: Where it lies.
        record: Its record.
        clean: Which samples are classified right without an attack.
        robust: Which of them stand under it.
    """

    folder: Path
    record: AttackRecord
    clean: tuple[bool, ...]
    robust: tuple[bool, ...]

    @property
    def trusted(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> list[Flag]:
        return [flag for flag in self.record.flags if flag.verdict == "failed"]


def lacks_audit(record: AttackRecord) -> bool:
    """Whether the full audit was not made."""
    return any(flag.name == NOT_AUDITED and flag.verdict == "skipped" for flag in record.flags)


@dataclass(frozen=True)
class Point:
    """One evaluation of a curve.

    Attributes:
        result: The evaluation.
        worst: Accuracy over the samples that stand here and at every smaller radius of the curve.
    """

    result: Result
    worst: Accuracy


def curves(results: Sequence[Result]) -> list[list[Point]]:
    """Results of one threat model but for its size, each list from the smallest radius to the largest.

    The worst case of a sample counts every attack of the list up to its radius: what broke it within a smaller ball
    lies in the larger one too.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.record.threat.space, result.record.threat.norm), []).append(result)
    made = []
    for group in groups.values():
        points: list[Point] = []
        standing = list(group[0].clean)
        for _, tied in groupby(sorted(group, key=_radius), key=_radius):
            same = list(tied)
            for result in same:
                standing = [a and b for a, b in zip(standing, result.robust, strict=True)]
            worst = Accuracy.of(sum(standing), len(standing))
            points += [Point(result, worst) for result in same]
        made.append(points)
    return made


def _radius(result: Result) -> Fraction:
    return fraction(result.record.threat.eps)


def tell(run: RunFolder, results: Sequence[Result], drawn: Sequence[Path], *, strict: bool, options: Options) -> None:
    """Say what came out: talk to stderr, the table or one JSON object to stdout."""
    points = [point for group in curves(results) for point in group]
    untrusted = [result for result in results if not result.trusted]
    say = render.talk()
    for result in results:
        for flag in result.failed:
            figure = "" if flag.figure is None else f" {render.number(flag.figure)}, at most {flag.limit:g}"
            say.say(f"warning: {result.record.id}: check {flag.name} failed:{figure}: {flag.text}")
    if not options.quiet:
        for note in dict.fromkeys(note for result in results for note in result.record.notes):
            say.say(f"note: {note}")
        for path in drawn:
            say.say(f"drawn: {path}")
        for group in curves(results):
            if len({point.result.record.threat.eps for point in group}) > 1:
                for line in _curve_lines(group):
                    say.say(line)
    answer = {
        "run": run.id,
        "path": str(run.path),
        "probe": results[0].record.probe,
        "trusted": not untrusted,
        "results": [
            {
                **point.result.record.model_dump(mode="json"),
                "path": str(point.result.folder),
                "trusted": point.result.trusted,
                "worst_case": point.worst.model_dump(mode="json"),
            }
            for point in points
        ],
    }
    if not options.as_json:
        _print_table(points)
    if strict and untrusted:
        names = ", ".join(dict.fromkeys(flag.name for result in untrusted for flag in result.failed))
        raise CfamcError(
            f"the evaluation cannot be trusted: {names}",
            hint="each failed check and its figure is in the record's flags; leave --strict out to accept the numbers",
            exit_code=ExitCode.UNTRUSTED,
            details=answer,
        )
    if options.as_json:
        render.print_json(answer)


def _print_table(points: Sequence[Point]) -> None:
    first = points[0].result.record
    rows = []
    for point in points:
        record, threat = point.result.record, point.result.record.threat
        shares = (render.interval(record.clean), render.interval(record.robust), render.percent(point.worst.value))
        rows.append((record.attack, f"{threat.norm} {threat.eps}", *shares, _verdict(point.result), record.id))
    title = f"{first.run}, head {first.probe}: {first.subset}; % with 95 % intervals"
    columns = ("attack", "threat", "clean", "robust", "worst case", "checks", "kept as")
    render.print_rows(title, columns, rows, right=(2, 3, 4))


def _verdict(result: Result) -> str:
    if not result.trusted:
        return "failed: " + ", ".join(flag.name for flag in result.failed)
    made = sum(flag.verdict == "passed" for flag in result.record.flags)
    return f"{made} passed" + (", no audit" if lacks_audit(result.record) else "")


def _curve_lines(group: Sequence[Point]) -> list[str]:
    """Worst-case accuracy against eps, as bars of characters."""
    record = group[0].result.record
    by_eps = {"0": record.clean} | {point.result.record.threat.eps: point.worst for point in group}
    width = max(map(len, by_eps))
    lines = [f"accuracy against {record.threat.norm} eps (a sample broken at a smaller eps stays broken):"]
    for eps, accuracy in by_eps.items():
        bar = "#" * round(_CURVE_WIDTH * accuracy.value)
        lines.append(f"  {eps:>{width}} |{bar:<{_CURVE_WIDTH}}| {render.interval(accuracy)}")
    return lines


def draw_loss(losses: Sequence[float], right: Sequence[float], *, title: str) -> bytes:
    """Draw loss and accuracy against steps, as a PNG."""

    def panel(axes: Axes) -> None:
        axes.set_title(render.clean(title), fontsize=9)
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
    record = group[0].result.record
    title = f"{record.run}, {record.probe}, {record.threat.norm}, n = {record.clean.n}"
    worst = [(0.0, record.clean), *((_place(point), point.worst) for point in group)]

    def panel(axes: Axes) -> None:
        axes.set_title(render.clean(title), fontsize=9)
        axes.set_xlabel("eps (255ths of the image range)")
        at = [x for x, _ in worst]
        low, high = [100 * a.low for _, a in worst], [100 * a.high for _, a in worst]
        axes.fill_between(at, low, high, alpha=0.2, color="#0072B2")
        axes.plot(at, [100 * a.value for _, a in worst], color="#0072B2", label="worst case up to eps")
        for name in dict.fromkeys(point.result.record.attack for point in group):
            own = [point for point in group if point.result.record.attack == name]
            values = [100 * point.result.record.robust.value for point in own]
            axes.plot([_place(point) for point in own], values, "o", label=render.clean(name))
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(bottom=0)

    return draw([panel], ".png")


def _place(point: Point) -> float:
    """Its radius in 255ths."""
    return 255 * float(_radius(point.result))
