"""The ledger of one measure on disk: samples.jsonl and timing.jsonl in measures/<id>, record.json once it is done.

samples.jsonl has a header and a line for each finished block, and holds only what repeats bit for bit. A measure is
found again by its key, a digest of what its values depend on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from cfamc_cli.errors import CfamcError, bad_data
from cfamc_cli.store.files import JsonLines, read_jsonl
from cfamc_cli.store.outcomes import read_times
from cfamc_cli.store.records import MeasuredBlock, MeasureHeader, StageTime
from cfamc_cli.store.runs import RunFolder, lock, new_item, turn


class MeasureLedger:
    """The blocks of one measure that are done, by number."""

    def __init__(self, folder: Path, header: MeasureHeader, blocks: dict[int, MeasuredBlock]) -> None:
        self.folder, self.header, self.blocks = folder, header, blocks

    def commit(self, block: MeasuredBlock, seconds: float) -> None:
        """Keep one finished block, and how long it took.

        Raises:
            CfamcError: It cannot be written.
        """
        run = RunFolder(self.folder)
        with JsonLines(run.timing) as timing, JsonLines(run.samples) as samples:
            timing.append(StageTime(block=block.block, stage=0, name="block", seconds=seconds).model_dump())
            samples.append(block.sealed().model_dump())
            samples.position()
        self.blocks[block.block] = block

    def seconds(self) -> float:
        """Wall time of all blocks, as far as it is known."""
        return sum(read_times(self.folder).values())


@contextmanager
def open_measure(
    run: RunFolder, name: str, header: MeasureHeader, *, warn: Callable[[str], None]
) -> Iterator[MeasureLedger]:
    """Find a measure of these samples again, or begin it with the whole blocks that others with its key have finished.

    Args:
        run: The run.
        name: Beginning of a new measure's id.
        header: What its values depend on, and how many samples there are.
        warn: Told of what cannot be read.

    Yields:
        The ledger, kept from others until the end.

    Raises:
        CfamcError: A live process works on it (exit code 6), or the run cannot be written.
    """
    with turn(run.measures, wait=warn):
        folder = _find_or_begin(run, name, header, warn=warn)
    with lock(RunFolder(folder)):
        yield MeasureLedger(folder, header, read_samples(RunFolder(folder).samples)[1])


def _find_or_begin(run: RunFolder, name: str, header: MeasureHeader, *, warn: Callable[[str], None]) -> Path:
    """The folder of the measure; see `open_measure`."""
    known: dict[int, MeasuredBlock] = {}
    found = None
    for path in sorted(run.measures.glob(f"[!.]*/{run.samples.name}")):
        try:
            stored, blocks = read_samples(path)
        except CfamcError as error:
            warn(f"{error.message}; left alone")
            continue
        if stored.key == header.key:
            found = path.parent if stored.n == header.n else found
            known |= {number: block for number, block in blocks.items() if _fits(block, header)}
    if found is not None:
        return found
    folder = new_item(run.measures, name)
    with JsonLines(RunFolder(folder).samples) as samples:
        samples.append(header.model_dump())
    for block in known.values():
        MeasureLedger(folder, header, {}).commit(block, 0.0)
    return folder


def _fits(block: MeasuredBlock, header: MeasureHeader) -> bool:
    """Whether a block of another measure is one of these samples', as long as it is here."""
    size = min(header.block, header.n - block.block * header.block)
    return all(len(values) == size for values in block.columns.values())


def read_samples(path: Path) -> tuple[MeasureHeader, dict[int, MeasuredBlock]]:
    """Read samples.jsonl; a line that is still being written is left out.

    Raises:
        CfamcError: Exit 1; it cannot be read. Exit 4; it is none, or its lines contradict each other.
    """
    lines = read_jsonl(path)
    try:
        header = MeasureHeader.model_validate(lines[0] if lines else {})
        blocks = [MeasuredBlock.model_validate_json(json.dumps(line)) for line in lines[1:]]
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
        raise bad_data(f"{path}: {where}: not as a measure keeps it") from error
    for block in blocks:
        if not _fits(block, header):
            raise bad_data(f"{path}: block {block.block} is not of as many samples as it has")
    return header, {block.block: block for block in blocks}
