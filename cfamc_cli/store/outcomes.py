"""The ledger of one evaluation on disk: outcomes.json and timing.jsonl in attacks/<id>, record.json once it is done.

outcomes.json is rewritten whole for each finished stage of a block, and holds only what repeats bit for bit; times go
to timing.jsonl. An evaluation is found again by its key, a digest of what its outcomes depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from pydantic import ValidationError

from cfamc_cli.errors import CfamcError, bad_data
from cfamc_cli.store.files import JsonLines, read_jsonl, staged_folder, sweep
from cfamc_cli.store.records import (
    AttackRecord,
    Outcome,
    Outcomes,
    StageOutcome,
    StageTime,
    load_record,
    pack_bits,
    save_record,
    unpack_bits,
)
from cfamc_cli.store.runs import OUTCOMES, RECORD, RunFolder, lock, slug, turn


def key_of(settings: Mapping[str, object]) -> str:
    """SHA-256 of what the outcomes depend on, in hex."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Ledger:
    """The outcomes of one evaluation by block and stage; `empty` is what outcomes.json holds before the first."""

    def __init__(self, folder: Path, empty: Outcomes, outcomes: Iterable[Outcome]) -> None:
        self.folder, self.empty = folder, empty
        self.outcomes = {(outcome.block, outcome.stage): outcome for outcome in outcomes}

    def record(self) -> AttackRecord | None:
        """The record of the finished evaluation; None while there is none that can be read."""
        try:
            return load_record(self.folder / RECORD, AttackRecord)
        except CfamcError:
            return None

    def commit(self, outcome: Outcome) -> None:
        """Keep one finished stage of a block.

        Raises:
            CfamcError: It cannot be written, or a stage that was done again for its examples came out differently.
        """
        known = self.outcomes.get((outcome.block, outcome.stage))
        if known is None:
            _keep_times(self.folder, [outcome])  # before the outcome: of two lines the later one counts
            self.outcomes[outcome.block, outcome.stage] = outcome
            save_record(self.folder / OUTCOMES, self.as_record())
        elif known != _as_dear(outcome, known):
            raise bad_data(
                f"{self.folder / OUTCOMES}: {outcome.name} of block {outcome.block} came out differently this time",
                f"remove {self.folder} to evaluate anew",
            )

    def in_order(self) -> list[Outcome]:
        """The outcomes by block and stage."""
        return [self.outcomes[place] for place in sorted(self.outcomes)]

    def as_record(self) -> Outcomes:
        """What outcomes.json holds."""
        known = self.in_order()
        parts = [self._joined([o for o in known if o.stage == stage]) for stage in sorted({o.stage for o in known})]
        right = [not bit for o in known if o.stage == 0 for bit in o.broken]
        return self.empty.model_copy(
            update={
                "done": len(right),
                "clean": self._mask(right),
                "stages": tuple(parts[1:]),
                "predictions": parts[0] if parts else None,
            }
        )

    def _joined(self, outcomes: list[Outcome]) -> StageOutcome:
        """One stage over its finished blocks, which are the first ones."""
        return StageOutcome(
            name=outcomes[0].name,
            done=sum(len(o.standing) for o in outcomes),
            robust=self._mask(bit for o in outcomes for bit in o.standing),
            broken=self._mask(bit for o in outcomes for bit in o.broken),
            not_finite=self._mask(bit for o in outcomes for bit in o.not_finite),
            unsteady=self._mask(bit for o in outcomes for bit in o.unsteady),
            invalid=self._mask(bit for o in outcomes for bit in o.invalid),
            passes=tuple((o.forward, o.backward) for o in outcomes),
            again=tuple(o.again for o in outcomes) if any(o.again for o in outcomes) else (),
        )

    def _mask(self, bits: Iterable[bool]) -> str:
        known = list(bits)
        return pack_bits(known + [False] * (self.empty.n - len(known)))


@contextmanager
def open_ledger(run: RunFolder, name: str, empty: Outcomes, *, warn: Callable[[str], None]) -> Iterator[Ledger]:
    """Find the evaluation of the first samples again, or begin it with what others with its key have finished.

    Args:
        run: The run.
        name: Beginning of a new evaluation's id.
        empty: Its outcomes.json before the first outcome: what they depend on, and how many samples there are.
        warn: Told of outcomes that cannot be read, and of samples that are attacked again.

    Yields:
        The ledger, kept from others until the end.

    Raises:
        CfamcError: A live process works on it (exit code 6), or the run cannot be written.
    """
    with turn(run.attacks, wait=warn):
        sweep(run.attacks)
        folder = _find_or_begin(run, name, empty, warn=warn)
    with lock(RunFolder(folder)):
        sweep(folder)
        stored = load_record(folder / OUTCOMES, Outcomes)  # again, now that nobody else writes
        yield Ledger(folder, empty, _read(folder, stored))


def _find_or_begin(run: RunFolder, name: str, empty: Outcomes, *, warn: Callable[[str], None]) -> Path:
    """The folder of the evaluation; see `open_ledger`."""
    found: list[tuple[Path, Outcomes, list[Outcome]]] = []
    for path in sorted(run.attacks.glob(f"[!.]*/{OUTCOMES}")):
        try:
            stored = load_record(path, Outcomes)
            if stored.key == empty.key:
                found.append((path.parent, stored, _read(path.parent, stored)))
        except CfamcError as error:
            warn(f"{error.message}; left alone")
    same = [folder for folder, stored, _ in found if stored.n == empty.n]
    same.sort(key=lambda folder: not (folder / RECORD).is_file())  # a finished one first
    if same:
        return same[0]
    sizes = dict(enumerate(_block_sizes(empty)))
    known: list[Outcome] = []
    for path, stored, outcomes in sorted(found, key=lambda item: item[1].n):
        known += [outcome for outcome in outcomes if len(outcome.standing) == sizes.get(outcome.block)]
        if stored.n < empty.n and (again := stored.n % empty.block):
            whole = f"blocks of {empty.block} samples are evaluated whole"
            warn(f"{whole}: the last {again} of {path.name} are attacked again")
    return _begin(run.attacks, slug(name), Ledger(Path(), empty, known))


def _as_dear(outcome: Outcome, known: Outcome) -> Outcome:
    """The same outcome at the cost of another."""
    return replace(outcome, forward=known.forward, backward=known.backward, seconds=known.seconds, again=known.again)


def _begin(attacks: Path, name: str, ledger: Ledger) -> Path:
    """Make attacks/<name>-001 or the next number: it appears with its outcomes.json, so that it is never lost."""
    final = next(path for number in count(1) if not (path := attacks / f"{name}-{number:03d}").exists())
    with staged_folder(final) as staged:
        save_record(staged / OUTCOMES, ledger.as_record())
        _keep_times(staged, ledger.in_order())
    return final


def _block_sizes(stored: Outcomes) -> list[int]:
    """Samples of each block."""
    return [min(stored.block, stored.n - first) for first in range(0, stored.n, stored.block)]


def _read(folder: Path, stored: Outcomes) -> list[Outcome]:
    """The finished stages of the blocks in an outcomes.json, with the times from timing.jsonl where it has them.

    Raises:
        CfamcError: Exit 4; the parts of the file contradict each other.
    """
    seconds, found = read_times(folder), []
    sizes = _block_sizes(stored)
    for stage, part in enumerate((stored.predictions, *stored.stages) if stored.predictions else ()):
        sizes = sizes[: len(part.passes)]  # no block is further than in the stage before
        if part.done != sum(sizes) or len(sizes) != len(part.passes) or len(part.again) not in (0, len(sizes)):
            raise bad_data(
                f"{folder / OUTCOMES}: {part.name} is done with {part.done} samples in {len(part.passes)} blocks"
            )
        texts = (part.robust, part.broken, part.not_finite, part.unsteady, part.invalid)
        masks = [unpack_bits(text, stored.n) for text in texts]
        for block, (size, (forward, backward)) in enumerate(zip(sizes, part.passes, strict=True)):
            own = slice(block * stored.block, block * stored.block + size)
            standing, broken, not_finite, unsteady, invalid = (tuple(bits[own]) for bits in masks)
            found.append(
                Outcome(
                    block=block,
                    stage=stage,
                    name=part.name,
                    standing=standing,
                    broken=broken,
                    not_finite=not_finite,
                    unsteady=unsteady,
                    invalid=invalid,
                    forward=forward,
                    backward=backward,
                    seconds=seconds.get((block, stage), 0.0),
                    again=part.again[block] if part.again else 0,
                )
            )
    return found


def _keep_times(folder: Path, outcomes: Iterable[Outcome]) -> None:
    with JsonLines(RunFolder(folder).timing) as timing:
        for o in outcomes:
            timing.append(StageTime(block=o.block, stage=o.stage, name=o.name, seconds=o.seconds).model_dump())


def read_times(folder: Path) -> dict[tuple[int, int], float]:
    """Times by block and stage; none where they cannot be read."""
    try:
        lines = [StageTime.model_validate(line) for line in read_jsonl(RunFolder(folder).timing)]
    except (CfamcError, ValidationError):
        return {}
    return {(line.block, line.stage): line.seconds for line in lines}
