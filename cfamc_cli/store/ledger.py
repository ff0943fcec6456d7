"""The ledger of a run: run.json as the run goes, and the record files that the engine writes to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cfamc_cli.errors import CfamcError, ExitCode, Interrupted, bad_data
from cfamc_cli.recipe import file
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.store.environment import capture_environment
from cfamc_cli.store.files import JsonLines, Position, cut, write_json, write_text
from cfamc_cli.store.records import (
    Computation,
    DataUsed,
    EvaluationLine,
    Failure,
    MetricLine,
    Progress,
    RunRecord,
    TimingLine,
    Totals,
    TrainLine,
    now,
    read_metrics,
    save_record,
)
from cfamc_cli.store.runs import RunFolder

_SECONDS_BETWEEN_UPDATES = 5.0  # of run.json, which tells others how far the run is


def found(run: RunFolder, recipe: Recipe, *, device: str) -> RunRecord:
    """Write the recipe of a new run, and return its first record, for the caller to save."""
    write_text(run.recipe_toml, file.to_toml(recipe))
    write_json(run.resolved_json, recipe.resolved())
    return RunRecord(
        id=run.id,
        name=recipe.name,
        status="created",
        created=now(),
        updated=now(),
        recipe_digest=recipe.digest(),
        seed=recipe.seed,
        progress=Progress(),
        environment=capture_environment(device, None),
        wall_seconds=0.0,
        totals=Totals(steps=0, view_passes=0, parameters=0),
        data=None,
        init=recipe.train.init,
    )


def found_again(run: RunFolder, *, device: str) -> RunRecord:
    """The record of a run that goes on, here and now."""
    changes = {"environment": capture_environment(device, None), "failure": None}
    return run.record().model_copy(update=changes)


class RunLedger:
    """Keeps the records of one run, which the process has locked.

    Attributes:
        record: run.json as it stands.
        listener: Told of each line of metrics.jsonl once it is written.
    """

    def __init__(self, run: RunFolder, record: RunRecord) -> None:
        self.run, self.record = run, record
        self.listener: Callable[[MetricLine], None] = lambda _line: None
        self._before, self._started = record.wall_seconds, time.monotonic()  # seconds of earlier sittings, and of this
        self._change()
        self._metrics, self._timing = JsonLines(run.metrics), JsonLines(run.timing)

    def metrics(self, line: MetricLine) -> None:
        """Append to metrics.jsonl, and tell run.json what others look for there."""
        self._metrics.append(line.written())
        self._note(line)
        self.listener(line)
        if isinstance(line, TrainLine) and time.monotonic() - self._written >= _SECONDS_BETWEEN_UPDATES:
            total = self.record.totals.steps
            self._change(progress=Progress(batch=line.batch, step=line.step, epoch=line.epoch, total=total))

    def timing(self, line: TimingLine) -> None:
        """Append to timing.jsonl."""
        self._timing.append(line.written())

    def positions(self) -> dict[str, Position]:
        """Make both record files durable and return where they end."""
        return {lines.path.name: lines.position() for lines in (self._metrics, self._timing)}

    def cut_back(self, positions: Mapping[str, object]) -> None:
        """Drop what the record files hold beyond a checkpoint, and read again what they say of evaluations.

        Raises:
            CfamcError: Exit 4; they are not what they were at the checkpoint, or its positions are none.
        """
        self.close()
        for path in (self.run.metrics, self.run.timing):
            cut(path, _position(positions.get(path.name, 0), path))
        self._metrics, self._timing = JsonLines(self.run.metrics), JsonLines(self.run.timing)
        for line in read_metrics(self.run.metrics):
            self._note(line)

    def begin(self, data: DataUsed, totals: Totals, progress: Progress, computation: Computation) -> None:
        """The run is under way.

        Raises:
            CfamcError: It began on other data.
        """
        before = self.record.data
        if before is not None and before != data:
            raise bad_data(
                f"the data changed since run {self.record.id} began: fingerprint {data.fingerprint[:12]}, "
                f"not {before.fingerprint[:12]}",
                "bring the data back, or start a new run",
            )
        environment = self.record.environment.model_copy(update={"computation": computation})
        self._change(status="running", data=data, totals=totals, progress=progress, environment=environment)

    def end(self, status: str, progress: Progress) -> None:
        """The sitting is over."""
        self._change(status=status, progress=progress)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Within, whatever ends the work early is written down before it goes on its way."""
        try:
            yield
        except CfamcError as error:
            self._fail("diverged" if error.exit_code == ExitCode.DIVERGED else "failed", error)
            raise
        except (Interrupted, KeyboardInterrupt):
            self._quietly(status="interrupted")
            raise
        except Exception as error:
            self._fail("failed", CfamcError(f"{type(error).__name__}: {error}"))
            raise

    def close(self) -> None:
        """Close the record files."""
        self._metrics.close()
        self._timing.close()

    def _note(self, line: MetricLine) -> None:
        if isinstance(line, TrainLine) and line.collapsed != self.record.collapsed:
            self._change(collapsed=line.collapsed)
        if isinstance(line, EvaluationLine):
            evaluation = line.evaluation()
            self._change(evaluation=evaluation, untrained=evaluation if line.step == 0 else self.record.untrained)

    def _fail(self, status: str, error: CfamcError) -> None:
        where = {key: error.details.get(key) for key in ("batch", "step", "lr", "loss", "gradient_norm")}
        numbers = {key: float(value) if isinstance(value, str) else value for key, value in where.items()}
        failure = {"message": error.message, "exit_code": int(error.exit_code), **numbers}
        self._quietly(status=status, failure=Failure.model_validate(failure))

    def _quietly(self, **changes: object) -> None:
        with suppress(CfamcError):  # the first failure is the one to report
            self._change(**changes)

    def _change(self, **changes: object) -> None:
        wall = self._before + time.monotonic() - self._started
        self.record = self.record.model_copy(update={"updated": now(), "wall_seconds": wall, **changes})
        save_record(self.run.run_json, self.record)
        self._written = time.monotonic()


def _position(kept: object, path: Path) -> Position:
    """Where a file ended by a checkpoint; those of older runs tell its size alone."""
    match kept:
        case {"size": int(size), "sha256": str(sha256)} if size >= 0:
            return {"size": size, "sha256": sha256}
        case int(size) if size >= 0:
            return {"size": size, "sha256": None}
    raise bad_data(f"{path}: the checkpoint does not say where it ended")
