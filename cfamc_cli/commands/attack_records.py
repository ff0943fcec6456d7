"""The ledger of one evaluation on disk: outcomes.json and timing.jsonl in attacks/<id>, record.json once it is done.

outcomes.json is rewritten whole for each finished stage of a block, and holds only what repeats bit for bit; times go
to timing.jsonl. An evaluation is found again by its key, a digest of what its outcomes depend on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.files import JsonLines, explained, read_jsonl, staged_folder, sweep
from cfamc_cli.records import (
    AttackRecord,
    Outcomes,
    StageOutcome,
    StageTime,
    load_record,
    pack_bits,
    save_record,
    unpack_bits,
)
from cfamc_cli.store import RunFolder, lock, slug

if TYPE_CHECKING:
    from torch import Tensor

    from cfamc_cli.engine.robust import Examples, Outcome
    from cfamc_cli.engine.sink import Talk

RECORD, OUTCOMES, TIMING, EXAMPLES = "record.json", "outcomes.json", "timing.jsonl", "examples.safetensors"

Place = tuple[int, int]  # block and stage


def key_of(settings: Mapping[str, object]) -> str:
    """SHA-256 of what the outcomes depend on, in hex."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Ledger:
    """The outcomes of one evaluation, held by this process; `empty` is what outcomes.json holds before the first."""

    def __init__(self, folder: Path, empty: Outcomes) -> None:
        self.folder, self.empty = folder, empty
        self.outcomes: dict[Place, Outcome] = {}
        self._held = ExitStack()

    def hold(self) -> None:
        """Keep others from the evaluation.

        Raises:
            CfamcError: A live process works on it (exit code 6), or the run cannot be written.
        """
        self._held.enter_context(lock(RunFolder(self.folder)))

    def close(self) -> None:
        """Let the evaluation go."""
        self._held.close()

    def record(self) -> AttackRecord | None:
        """The record of the finished evaluation; None while there is none that fits the outcomes."""
        try:
            record = load_record(self.folder / RECORD, AttackRecord)
        except CfamcError:
            return None
        return record if record.data.n == self.empty.n else None

    def take(self, outcomes: Iterable[Outcome]) -> None:
        """Start from outcomes of an earlier evaluation with the same key; what does not fit is left."""
        sizes = _block_sizes(self.empty)
        offered = {(o.block, o.stage): o for o in outcomes if [len(o.standing)] == sizes[o.block : o.block + 1]}
        for block in range(len(sizes)):
            stage = 0
            while (block, stage) in offered:
                self.outcomes[block, stage] = offered[block, stage]
                stage += 1

    def commit(self, outcome: Outcome) -> None:
        """Keep one finished stage of a block.

        Raises:
            CfamcError: It cannot be written, or a stage that was done again for its examples came out differently.
        """
        known = self.outcomes.get((outcome.block, outcome.stage))
        if known is None:
            with JsonLines(self.folder / TIMING) as timing:  # before the outcome: of two lines the later one counts
                _keep_time(timing, outcome)
            self.outcomes[outcome.block, outcome.stage] = outcome
            save_record(self.folder / OUTCOMES, self.as_record())
        elif known != dataclasses.replace(
            outcome, forward=known.forward, backward=known.backward, seconds=known.seconds
        ):
            raise CfamcError(
                f"{self.folder / OUTCOMES}: {outcome.name} of block {outcome.block} came out differently this time",
                hint=f"remove {self.folder} to evaluate anew",
                exit_code=ExitCode.BAD_DATA,
            )

    def in_order(self) -> list[Outcome]:
        """The outcomes by block and stage."""
        return [self.outcomes[place] for place in sorted(self.outcomes)]

    def as_record(self) -> Outcomes:
        """What outcomes.json holds."""
        stages = sorted({stage for _, stage in self.outcomes})
        parts = [_joined([o for o in self.in_order() if o.stage == stage], self.empty.n) for stage in stages]
        wrong = [bit for o in self.in_order() if o.stage == 0 for bit in o.broken]
        return self.empty.model_copy(
            update={
                "done": len(wrong),
                "clean": pack_bits([not bit for bit in wrong] + [False] * (self.empty.n - len(wrong))),
                "stages": tuple(parts[1:]),
                "predictions": parts[0] if parts else None,
            }
        )


def open_ledger(run: RunFolder, name: str, empty: Outcomes, *, talk: Talk) -> Ledger:
    """Find the evaluation of the first samples again, or begin it with what others with its key have finished.

    Args:
        run: The run.
        name: Beginning of a new evaluation's id.
        empty: Its outcomes.json before the first outcome: what they depend on, and how many samples there are.
        talk: Told of outcomes that cannot be read.

    Raises:
        CfamcError: A live process works on it (exit code 6), or the run cannot be written.
    """
    with explained(run.attacks):
        run.attacks.mkdir(parents=True, exist_ok=True)
    sweep(run.attacks)
    found: list[tuple[Path, Outcomes, list[Outcome]]] = []
    for path in sorted(run.attacks.iterdir()):
        if path.name.startswith(".") or not (path / OUTCOMES).is_file():
            continue
        try:
            stored = load_record(path / OUTCOMES, Outcomes)
            if stored.key == empty.key:
                found.append((path, stored, list(read_outcomes(path, stored))))
        except CfamcError as error:
            talk.warning(f"{error.message}; left alone")
    same = [path for path, stored, _ in found if stored.n == empty.n]
    same.sort(key=lambda path: not (path / RECORD).is_file())  # a finished one first
    ledger = Ledger(same[0] if same else Path(), empty)
    if same:
        ledger.hold()
        sweep(ledger.folder)
        own = load_record(ledger.folder / OUTCOMES, Outcomes)  # again, now that nobody else writes
        ledger.take(read_outcomes(ledger.folder, own))
        return ledger
    for path, stored, outcomes in sorted(found, key=lambda item: item[1].n):
        ledger.take(outcomes)
        if stored.n < empty.n and (again := stored.n % empty.block):
            whole = f"blocks of {empty.block} samples are evaluated whole"
            talk.warning(f"{whole}: the last {again} of {path.name} are attacked again")
    ledger.folder = _begin(run.attacks, name, ledger)
    ledger.hold()
    return ledger


def _begin(folder: Path, name: str, ledger: Ledger) -> Path:
    """Make attacks/<name>-001 or the next number: it appears with its outcomes.json, so that it is never lost."""
    number = 0
    while True:
        number += 1
        final = folder / f"{slug(name)}-{number:03d}"
        if final.exists():
            continue
        try:
            with staged_folder(final) as staged:
                save_record(staged / OUTCOMES, ledger.as_record())
                with JsonLines(staged / TIMING) as timing:
                    for outcome in ledger.in_order():
                        _keep_time(timing, outcome)
        except CfamcError:
            if final.exists():  # another process was faster
                continue
            raise
        return final


def _block_sizes(stored: Outcomes) -> list[int]:
    """Samples of each block."""
    return [min(stored.block, stored.n - first) for first in range(0, stored.n, stored.block)]


def _joined(outcomes: Sequence[Outcome], n: int) -> StageOutcome:
    """One stage over its finished blocks."""

    def mask(name: str) -> str:
        bits = [bit for o in outcomes for bit in getattr(o, name)]
        return pack_bits(bits + [False] * (n - len(bits)))

    return StageOutcome(
        name=outcomes[0].name,
        done=sum(len(o.standing) for o in outcomes),
        robust=mask("standing"),
        broken=mask("broken"),
        not_finite=mask("not_finite"),
        unsteady=mask("unsteady"),
        invalid=mask("invalid"),
        passes=tuple((o.forward, o.backward) for o in outcomes),
    )


def read_outcomes(folder: Path, stored: Outcomes) -> Iterator[Outcome]:
    """The finished stages of the blocks in an outcomes.json, with the times from timing.jsonl where it has them.

    Raises:
        CfamcError: Exit 4; the parts of the file contradict each other.
    """
    from cfamc_cli.engine.robust import Outcome

    seconds = _seconds(folder / TIMING)
    for stage, part in enumerate((stored.predictions, *stored.stages) if stored.predictions else ()):
        sizes = _block_sizes(stored)[: len(part.passes)]
        if part.done != sum(sizes) or len(sizes) != len(part.passes):
            raise CfamcError(
                f"{folder / OUTCOMES}: {part.name} is done with {part.done} samples in {len(part.passes)} blocks",
                exit_code=ExitCode.BAD_DATA,
            )
        texts = (part.robust, part.broken, part.not_finite, part.unsteady, part.invalid)
        masks = [unpack_bits(text, stored.n) for text in texts]
        for block, (size, (forward, backward)) in enumerate(zip(sizes, part.passes, strict=True)):
            own = slice(block * stored.block, block * stored.block + size)
            standing, broken, not_finite, unsteady, invalid = (tuple(bits[own]) for bits in masks)
            yield Outcome(
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
            )


def _keep_time(timing: JsonLines, outcome: Outcome) -> None:
    line = StageTime(block=outcome.block, stage=outcome.stage, name=outcome.name, seconds=outcome.seconds)
    timing.append(line.model_dump())


def _seconds(path: Path) -> dict[Place, float]:
    """Times by block and stage; none where they cannot be read."""
    try:
        lines = [StageTime.model_validate(line) for line in read_jsonl(path)]
    except (CfamcError, ValidationError):
        return {}
    return {(line.block, line.stage): line.seconds for line in lines}


class Gallery:
    """The first examples of an evaluation in the order of their stages, kept in a file as they are found."""

    def __init__(self, ledger: Ledger, wanted: int) -> None:
        self._ledger, self._wanted = ledger, wanted
        self._path = ledger.folder / EXAMPLES
        self._found: dict[int, tuple[Tensor, int]] = self._read() if wanted else {}

    def _read(self) -> dict[int, tuple[Tensor, int]]:
        from cfamc_cli.engine.checkpoint import read_tensors

        if not self._path.is_file():
            return {}
        try:
            stored = read_tensors(self._path)
            rows = zip(stored["positions"].tolist(), stored["images"], stored["labels"].tolist(), strict=True)
            return {position: (image, label) for position, image, label in rows}
        except (CfamcError, KeyError, ValueError):
            return {}  # they are made again

    def _places(self, outcomes: Mapping[Place, Outcome]) -> list[tuple[int, Place]]:
        """Positions of the first examples that the outcomes speak of, each with its block and stage."""
        places: list[tuple[int, Place]] = []
        for (block, stage), outcome in sorted(outcomes.items()):
            if stage > 0 and len(places) < self._wanted:
                first = block * self._ledger.empty.block
                places += [(first + row, (block, stage)) for row, bit in enumerate(outcome.broken) if bit]
        return places[: self._wanted]

    def missing(self) -> set[Place]:
        """Stages of blocks whose examples are wanted and were not kept."""
        return {place for position, place in self._places(self._ledger.outcomes) if position not in self._found}

    def finished(self) -> list[Outcome]:
        """The known outcomes, without those that are made again for their examples."""
        again = self.missing()
        return [outcome for outcome in self._ledger.in_order() if (outcome.block, outcome.stage) not in again]

    def add(self, outcome: Outcome, examples: Examples) -> None:
        """Keep what is still wanted; written before the outcome is."""
        import torch

        from cfamc_cli.engine.checkpoint import write_tensors

        places = self._places({**self._ledger.outcomes, (outcome.block, outcome.stage): outcome})
        wanted = {position for position, _ in places}
        rows = zip(examples.positions, examples.images, examples.labels, strict=True)
        new = {position: (image.clone(), label) for position, image, label in rows if position in wanted}
        if not new:
            return
        self._found.update(new)
        kept = sorted(self._found.items())
        write_tensors(
            self._path,
            {
                "positions": torch.tensor([position for position, _ in kept]),
                "images": torch.stack([image for _, (image, _) in kept]),
                "labels": torch.tensor([label for _, (_, label) in kept]),
            },
        )

    def shown(self) -> list[tuple[int, Tensor, int]]:
        """Position, image and predicted label of the first examples."""
        places = sorted(place for place, _ in self._places(self._ledger.outcomes) if place in self._found)
        return [(place, *self._found[place]) for place in places]
