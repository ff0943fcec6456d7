"""The ledger of one evaluation on disk: outcomes.json and timing.jsonl in attacks/<id>, record.json once it is done.

outcomes.json is rewritten whole for each finished stage of a block, and holds only what repeats bit for bit; times go
to timing.jsonl. An evaluation is found again by its key, a digest of what its outcomes depend on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.files import JsonLines, explained, read_jsonl, staged_folder, sweep
from cfamc_cli.records import AttackRecord, Outcomes, StageOutcome, load_record, pack_bits, save_record, unpack_bits
from cfamc_cli.store import RunFolder, lock, slug

if TYPE_CHECKING:
    from torch import Tensor

    from cfamc_cli.engine.robust import Examples, Outcome

RECORD, OUTCOMES, TIMING, EXAMPLES = "record.json", "outcomes.json", "timing.jsonl", "examples.safetensors"
_MASKS = ("broken", "not_finite", "unsteady", "invalid")

Place = tuple[int, int]  # block and stage


class Warns(Protocol):
    """Whoever is told of what cannot be used."""

    def warning(self, text: str) -> None: ...


def key_of(settings: Mapping[str, object]) -> str:
    """SHA-256 of what the outcomes depend on, in hex."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Identity:
    """What the outcomes of an evaluation depend on, beside the number of samples.

    Attributes:
        key: Digest of all of it.
        order_digest: Of the order of the samples.
        data_fingerprint: Of the whole split.
        block: Samples of a block.
    """

    key: str
    order_digest: str
    data_fingerprint: str
    block: int


class Ledger:
    """The outcomes of one evaluation, held by this process."""

    def __init__(self, folder: Path, identity: Identity, n: int) -> None:
        self.folder, self.identity, self.n = folder, identity, n
        self.outcomes: dict[Place, Outcome] = {}
        self._held = ExitStack()

    def close(self) -> None:
        """Let the evaluation go."""
        self._held.close()

    @property
    def is_complete(self) -> bool:
        """Whether the record is written: for these samples, from these outcomes."""
        return self.record() is not None

    def record(self) -> AttackRecord | None:
        """The record of the finished evaluation; None while there is none that fits the outcomes."""
        try:
            record = load_record(self.folder / RECORD, AttackRecord)
        except CfamcError:
            return None
        return record if record.data.n == self.n else None

    def take(self, outcomes: Iterable[Outcome]) -> None:
        """Start from outcomes of an earlier evaluation with the same key; what does not fit is left."""
        offered = {(o.block, o.stage): o for o in outcomes if len(o.standing) == self._samples(o.block)}
        for block in range(-(-self.n // self.identity.block)):
            stage = 0
            while (block, stage) in offered:
                self.outcomes[block, stage] = offered[block, stage]
                stage += 1

    def commit(self, outcome: Outcome) -> None:
        """Keep one finished stage of a block.

        Raises:
            CfamcError: It cannot be written, or a stage that was done again for its examples came out differently.
        """
        place = (outcome.block, outcome.stage)
        if (known := self.outcomes.get(place)) is not None:
            if dataclasses.replace(outcome, forward=known.forward, backward=known.backward, seconds=known.seconds) != (
                known
            ):
                raise CfamcError(
                    f"{self.folder / OUTCOMES}: {outcome.name} of block {outcome.block} came out differently this time",
                    hint=f"remove {self.folder} to evaluate anew",
                    exit_code=ExitCode.BAD_DATA,
                )
            return
        with JsonLines(self.folder / TIMING) as timing:  # before the outcome: of two lines the later one counts
            timing.append(
                {"block": outcome.block, "stage": outcome.stage, "name": outcome.name, "seconds": outcome.seconds}
            )
        self.outcomes[place] = outcome
        self.save()

    def save(self) -> None:
        """Write outcomes.json."""
        save_record(self.folder / OUTCOMES, self.as_record())

    def as_record(self) -> Outcomes:
        """What outcomes.json holds."""
        stages = sorted({stage for _, stage in self.outcomes})
        parts = [_stage_outcome([o for o in self._in_order() if o.stage == stage], self.n) for stage in stages]
        wrong = [bit for o in self._in_order() if o.stage == 0 for bit in o.broken]
        return Outcomes(
            n=self.n,
            block=self.identity.block,
            order_digest=self.identity.order_digest,
            data_fingerprint=self.identity.data_fingerprint,
            done=len(wrong),
            clean=pack_bits([not bit for bit in wrong] + [False] * (self.n - len(wrong))),
            stages=tuple(parts[1:]),
            key=self.identity.key,
            predictions=parts[0] if parts else None,
        )

    def _in_order(self) -> list[Outcome]:
        return [self.outcomes[place] for place in sorted(self.outcomes)]

    def _samples(self, block: int) -> int:
        return max(0, min(self.identity.block, self.n - block * self.identity.block))


def open_ledger(run: RunFolder, name: str, identity: Identity, n: int, *, warns: Warns) -> Ledger:
    """Find the evaluation of the first `n` samples again, or begin it with what others with its key have finished.

    Args:
        run: The run.
        name: Beginning of a new evaluation's id.
        identity: What the outcomes depend on.
        n: Samples.
        warns: Told of outcomes that cannot be read.

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
            if stored.key == identity.key:
                found.append((path, stored, read_outcomes(path, stored)))
        except CfamcError as error:
            warns.warning(f"{error.message}; left alone")
    same = [path for path, stored, _ in found if stored.n == n]
    same.sort(key=lambda path: not (path / RECORD).is_file())  # a finished one first
    ledger = Ledger(same[0] if same else Path(), identity, n)
    if same:
        ledger._held.enter_context(lock(RunFolder(ledger.folder)))
        sweep(ledger.folder)
        own = load_record(ledger.folder / OUTCOMES, Outcomes)  # again, now that nobody else writes
        ledger.take(read_outcomes(ledger.folder, own))
        return ledger
    for path, stored, outcomes in sorted(found, key=lambda item: item[1].n):
        ledger.take(outcomes)
        if stored.n < n and (again := stored.n % identity.block):
            whole = f"blocks of {identity.block} samples are evaluated whole"
            warns.warning(f"{whole}: the last {again} of {path.name} are attacked again")
    ledger.folder = _begin(run.attacks, name, ledger)
    ledger._held.enter_context(lock(RunFolder(ledger.folder)))
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
                    for (block, stage), outcome in sorted(ledger.outcomes.items()):
                        timing.append(
                            {"block": block, "stage": stage, "name": outcome.name, "seconds": outcome.seconds}
                        )
        except CfamcError:
            if final.exists():  # another process was faster
                continue
            raise
        return final


def _stage_outcome(outcomes: Sequence[Outcome], n: int) -> StageOutcome:
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


def read_outcomes(folder: Path, stored: Outcomes) -> list[Outcome]:
    """The finished stages of the blocks in an outcomes.json, with the times from timing.jsonl where it has them.

    Raises:
        CfamcError: Exit 4; the parts of the file contradict each other.
    """
    from cfamc_cli.engine.robust import Outcome

    seconds = _seconds(folder / TIMING)
    outcomes = []
    for stage, part in enumerate((stored.predictions, *stored.stages) if stored.predictions else ()):
        sizes = [min(stored.block, stored.n - first) for first in range(0, stored.n, stored.block)][: len(part.passes)]
        masks = {name: unpack_bits(getattr(part, name), stored.n) for name in ("robust", *_MASKS)}
        if part.done > stored.n or part.done != sum(sizes) or len(sizes) != len(part.passes):
            raise CfamcError(
                f"{folder / OUTCOMES}: {part.name} is done with {part.done} samples in {len(part.passes)} blocks",
                exit_code=ExitCode.BAD_DATA,
            )
        for block, (size, (forward, backward)) in enumerate(zip(sizes, part.passes, strict=True)):
            first = block * stored.block
            own = {name: tuple(bits[first : first + size]) for name, bits in masks.items()}
            standing = own.pop("robust")
            outcomes.append(
                Outcome(
                    block=block,
                    stage=stage,
                    name=part.name,
                    standing=standing,
                    forward=forward,
                    backward=backward,
                    seconds=seconds.get((block, stage), 0.0),
                    **own,
                )
            )
    return outcomes


def _seconds(path: Path) -> dict[Place, float]:
    """Times by block and stage; none where they cannot be read."""
    try:
        lines = read_jsonl(path).records
    except CfamcError:
        return {}
    found: dict[Place, float] = {}
    for line in lines:
        block, stage, seconds = line.get("block"), line.get("stage"), line.get("seconds")
        if isinstance(block, int) and isinstance(stage, int) and isinstance(seconds, int | float) and seconds >= 0:
            found[block, stage] = float(seconds)
    return found


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

    def _wanted_places(self) -> list[tuple[int, Place]]:
        """Positions of the first examples that the known outcomes speak of, each with its block and stage."""
        places: list[tuple[int, Place]] = []
        for (block, stage), outcome in sorted(self._ledger.outcomes.items()):
            if stage > 0 and len(places) < self._wanted:
                first = block * self._ledger.identity.block
                places += [(first + row, (block, stage)) for row, bit in enumerate(outcome.broken) if bit]
        return places[: self._wanted]

    def missing(self) -> set[Place]:
        """Stages of blocks whose examples are wanted and were not kept."""
        return {place for position, place in self._wanted_places() if position not in self._found}

    def finished(self) -> list[Outcome]:
        """The known outcomes, without those that are made again for their examples."""
        again = self.missing()
        return [outcome for place, outcome in sorted(self._ledger.outcomes.items()) if place not in again]

    def add(self, outcome: Outcome, examples: Examples) -> None:
        """Keep what is still wanted; written before the outcome is."""
        import torch

        from cfamc_cli.engine.checkpoint import write_tensors

        before = sum(
            sum(known.broken)
            for place, known in self._ledger.outcomes.items()
            if place[1] > 0 and place < (outcome.block, outcome.stage)
        )
        room = self._wanted - before
        if outcome.stage == 0 or room <= 0 or not examples.positions:
            return
        rows = zip(examples.positions[:room], examples.images, examples.labels, strict=False)
        self._found.update({position: (image.clone(), label) for position, image, label in rows})
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
        places = sorted(place for place, _ in self._wanted_places() if place in self._found)
        return [(place, *self._found[place]) for place in places]
