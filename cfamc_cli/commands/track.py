"""`cfamc pretrain --track`: the lines of metrics.jsonl, which stays the truth, told to a tracker as they are written.

A tracker gets numbers, the run's id and the recipe without paths: nothing of the environment, the command line or the
machine. All of them work without a network; WANDB_MODE, TRACKIO_SPACE_ID and MLFLOW_TRACKING_URI say otherwise. One
that fails is told nothing more, and the run goes on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, assert_never

from cfamc_cli.commands.export import portable
from cfamc_cli.errors import invalid, require_libraries
from cfamc_cli.recipe import file
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.report.metrics import EventFile, scalars
from cfamc_cli.store.records import MetricLine, Tracker
from cfamc_cli.store.runs import RunFolder

if TYPE_CHECKING:
    from cfamc_cli.engine.sink import Talk

Log = Callable[[MetricLine], None]
_PROJECT = "cfamc"


def require_tracker(tracker: Tracker | None, *, dry_run: bool) -> None:
    """Refuse a tracker that is not installed, or has nothing to hear, before any work is done.

    Raises:
        CfamcError: Exit 2.
    """
    if tracker is not None and dry_run:
        raise invalid("--track has no effect with --dry-run", "leave one of them out")
    if tracker is not None:
        require_libraries(tracker, by=f"--track {tracker}", extra=tracker)


@contextmanager
def tracking(tracker: Tracker | None, run: RunFolder, recipe: Recipe, talk: Talk) -> Iterator[Log]:
    """Within, a tracker takes the lines that it is given; none takes them for nothing."""
    working = tracker is not None

    def guarded(work: Callable[[], Any]) -> Any:
        nonlocal working
        try:
            with redirect_stdout(sys.stderr):  # stdout is data
                return work() if working else None
        except Exception as error:  # whatever a library raises
            working = False
            why = " ".join(str(error).split())[:200] or type(error).__name__
            talk.warning(f"--track {tracker} failed and is told nothing more: {why}; metrics.jsonl has every line")

    opened: tuple[Log, Callable[[], None]] | None = guarded(
        lambda: None if tracker is None else _opened(tracker, run, portable(recipe))
    )
    log, close = opened or (lambda _line: None, lambda: None)
    try:
        yield lambda line: guarded(lambda: log(line))
    finally:
        guarded(close)


def _opened(tracker: Tracker, run: RunFolder, recipe: Recipe) -> tuple[Log, Callable[[], None]]:
    """What takes a line, and what ends the tracking."""
    match tracker:
        case "tensorboard":
            events = EventFile(run.path / "tensorboard")
            return events.write, events.close
        case "wandb" | "trackio":
            return _wandb(tracker, run, recipe)
        case "mlflow":
            return _mlflow(run, recipe)
        case _:
            assert_never(tracker)


def _wandb(tracker: Literal["wandb", "trackio"], run: RunFolder, recipe: Recipe) -> tuple[Log, Callable[[], None]]:
    """Weights & Biases, and trackio, which has its interface; each with what else it would note switched off."""
    library: Any = import_module(tracker)
    if tracker == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        quiet = {"silent": True, "console": "off", "disable_git": True, "disable_code": True, "host": ""}
        quiet |= {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True}
        further = {"id": run.id, "dir": str(run.path), "mode": mode, "settings": library.Settings(**quiet)}
    else:
        further = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
    library.init(project=_PROJECT, name=run.id, config=recipe.resolved(), resume="allow", **further)
    return lambda line: library.log(scalars(line), step=line.step), library.finish


def _mlflow(run: RunFolder, recipe: Recipe) -> tuple[Log, Callable[[], None]]:
    """MLflow by its client, whose runs have none of the tags that tell of the caller."""
    mlflow: Any = import_module("mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(_PROJECT)
    place = client.create_experiment(_PROJECT) if experiment is None else experiment.experiment_id
    known = client.search_runs([place], f"attributes.run_name = '{run.id}'")
    own = (known[0] if known else client.create_run(place, run_name=run.id)).info.run_id
    for key, value in file.settings(recipe).items():
        client.log_param(own, key, value)  # the same again where a run goes on

    def log(line: MetricLine) -> None:
        now = int(1000 * time.time())
        told = [mlflow.entities.Metric(key, value, now, line.step) for key, value in scalars(line).items()]
        client.log_batch(own, metrics=told)

    def close() -> None:
        ends = {"finished": "FINISHED", "interrupted": "KILLED"}
        client.set_terminated(own, ends.get(str(run.status), "FAILED"))

    return log, close
