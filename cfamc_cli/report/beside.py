"""What stands beside a comparison and is never ranked: transfer matrices, and what was measured without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfamc_cli.comparison.gather import Gathered
from cfamc_cli.comparison.transfer import Matrix, matrices
from cfamc_cli.report.sheets import Sheet
from cfamc_cli.report.terminal import interval, number, percent
from cfamc_cli.store.records import UnlabelledRecord, images_of

_TRANSFER = (
    "Each column's run made the examples, each row's run judges them; where both are one it is the attack on itself. "
    "A transfer is an upper bound of robust accuracy, and never ranked with an attack that knows the network."
)
_UNLABELLED = (
    "RankMe: how many directions a layer uses, at most its size and the number of images; alpha: how fast its spectrum "
    "falls, best near 1.",
    "cosine, neighbours kept %: of features with those of the clean image, under the attack that moves them furthest.",
)


def beside(found: Gathered, *, limit: int = 0) -> list[Sheet]:
    """All of it, as far as there is any; `limit` is for the rows of each sheet, 0 for all."""
    made = [_matrix(matrix) for matrix in matrices(found.transfers, found.entries)]
    return made + ([unlabelled(found.unlabelled, limit=limit)] if found.unlabelled else [])


def _matrix(matrix: Matrix) -> Sheet:
    """A matrix, a row for each run that judges; robust accuracies in percent."""

    def cell(run: str, source: str) -> str:
        entry = matrix.robust.get((run, source))
        if entry is None or entry.robust is None:
            return ""
        return percent(entry.robust.value) + ("" if not entry.failed else f" (not trusted: {', '.join(entry.failed)})")

    rows = tuple(
        (run, interval(matrix.clean[run]), *(cell(run, source) for source in matrix.sources)) for run in matrix.judged
    )
    columns = ("judged on", "clean %", *(f"made on {source}" for source in matrix.sources))
    title = f"Transfer: robust % on {matrix.n:,} samples, {matrix.condition.title()}"
    return Sheet(title, columns, tuple(range(1, len(columns))), rows, (_TRANSFER,))


def unlabelled(records: Sequence[UnlabelledRecord], *, limit: int = 0) -> Sheet:
    """A row for each layer of an encoder, and below the layer that is attacked a row for each eps.

    Args:
        records: What was measured.
        limit: Records that are shown; 0 for all.
    """
    shown = records[: limit or None]
    rows = tuple(row for record in shown for row in _rows(record))
    columns = ("run", "images", "layer", "RankMe", "alpha", "attack", "n", "cosine", "neighbours kept %")
    title = "Without labels: no accuracy, and not comparable with one"
    return Sheet(title, columns, (3, 4, 6, 7, 8), rows, _UNLABELLED, more=len(records) - len(shown))


def _rows(record: UnlabelledRecord) -> Iterator[tuple[str, ...]]:
    data = record.data
    images = f"{data.dataset}, {data.n:,} {images_of(data.split)} ({data.fingerprint[:8]})"
    for spectrum in record.spectra:
        alpha = "" if spectrum.alpha is None else f"{spectrum.alpha:.2f}"
        found = f"{number(spectrum.rank_me)} of {min(spectrum.dim, data.n):,}"
        yield record.run, images, spectrum.layer, found, alpha, "", "", "", ""
    steps = ", ".join(f"{key} {value}" for key, value in record.settings.items() if key not in ("name", "norm"))
    for movement in record.movements:
        attack = f"{record.norm} {movement.eps} ({steps})"
        figures = (f"{movement.kept.n:,}", f"{movement.cosine:.3f}", interval(movement.kept))
        yield record.run, images, record.features, "", "", attack, *figures
