"""`cfamc pretrain`: from a recipe to a run in the store.

Nothing here computes: the engine trains, the store keeps, and this puts them together.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cfamc_cli import recipe_file, render
from cfamc_cli.commands.signals import Interrupted, Signals, catch_signals
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.files import JsonLines, cut, sweep, write_json, write_text
from cfamc_cli.plan import Plan, plan
from cfamc_cli.recipe import Recipe
from cfamc_cli.records import (
    DataUsed,
    EvaluationLine,
    Failure,
    MetricLine,
    Progress,
    RunRecord,
    Totals,
    TrainLine,
    capture_environment,
    load_record,
    now,
    read_metrics,
    save_record,
)
from cfamc_cli.store import RunFolder, cache_folder, create_run, default_store, find_run, lock

if TYPE_CHECKING:
    from torch import Tensor

    from cfamc_cli.engine.data import ImageSet
    from cfamc_cli.engine.distributed import World
    from cfamc_cli.engine.pretrain import Trainer

_SECONDS_BETWEEN_UPDATES = 5.0  # of run.json, which tells others how far the run is


@dataclass(frozen=True)
class Options:
    """Where and how to train; nothing here changes a number.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:0" or "mps".
        runs: The run store; None for CFAMC_RUNS, else ./runs.
        quiet: Say only warnings and errors.
        as_json: Whether stdout gets one JSON object.
    """

    device: str = "auto"
    runs: Path | None = None
    quiet: bool = False
    as_json: bool = False


def pretrain(
    reference: str | None,
    *,
    overrides: Sequence[str],
    seeds: Sequence[int],
    resume: str | None,
    dry_run: bool,
    options: Options,
) -> None:
    """Train one run per seed, go on with a run, or say what would be done.

    Args:
        reference: A recipe's path or name; may be left out with `resume`.
        overrides: Texts of --set.
        seeds: Seeds to train; the recipe's own where there are none.
        resume: A run to go on with.
        dry_run: Print the resolved recipe and its cost, and do nothing.
        options: Where and how.

    Raises:
        CfamcError: With the exit code of its cause.
        Interrupted: A signal arrived; the run can be resumed.
    """
    if resume is not None:
        recipes = [None] if reference is None else _recipes(reference, overrides, seeds)
        if len(recipes) > 1 or (reference is None and (overrides or seeds)):
            raise CfamcError(
                "--resume goes on with one run and its own recipe",
                hint="leave out --set, --seed and --seeds",
                exit_code=ExitCode.INVALID,
            )
        if dry_run:
            raise CfamcError("--dry-run and --resume exclude each other", exit_code=ExitCode.INVALID)
        results = [_resume(resume, recipes[0], options)]
    else:
        if reference is None:
            raise CfamcError(
                "which recipe?",
                hint="name one, such as: cfamc pretrain quickstart; all are listed by: cfamc recipes list",
                exit_code=ExitCode.INVALID,
            )
        recipes_to_train = _recipes(reference, overrides, seeds)
        if dry_run:
            _show_plan(recipes_to_train, options)
            return
        results = _start(recipes_to_train, options)
    finished = [result for result in results if result is not None]  # other processes of torchrun say nothing
    if options.as_json and finished:
        render.print_json(finished[0] if len(finished) == 1 else {"runs": finished})
    elif finished:
        render.write_out("".join(f"{result['id']}\n" for result in finished))


def _recipes(reference: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[Recipe]:
    if not seeds:
        return [recipe_file.load(reference, overrides=overrides)]
    return [recipe_file.load(reference, overrides=overrides, seed=seed) for seed in seeds]


def _show_plan(recipes: Sequence[Recipe], options: Options) -> None:
    """Print the first recipe and its cost; the others differ in their seed alone."""
    recipe, costs, seeds = recipes[0], plan(recipes[0]), [recipe.seed for recipe in recipes]
    if options.as_json:
        render.print_json({"recipe": recipe.resolved(), "plan": dataclasses.asdict(costs), "seeds": seeds})
    else:
        of_all = f"# runs            {len(seeds)}, seeds {', '.join(map(str, seeds))}; counts are of each\n"
        words = _costs_in_words(costs) + (of_all if len(seeds) > 1 else "")
        render.write_out(f"{recipe_file.to_toml(recipe)}\n{words}")


def _costs_in_words(costs: Plan) -> str:
    of = f"{costs.images:,} images" + (" (a stand-in: counts are per 1,000)" if costs.per_thousand else "")
    attack = f" and {costs.attack_view_passes:,} of the adversary" if costs.attack_view_passes else ""
    lines = [
        f"images          {of}",
        f"parameters      {costs.parameters:,}, {costs.backbone_parameters:,} of them in the backbone",
        f"weight updates  {costs.weight_updates:,} in {costs.batches:,} batches",
        f"view passes     {costs.view_passes:,}{attack}, forward and backward",
        f"arithmetic      {costs.flops / 1e15:.4g} PFLOP, {costs.flops_per_view / 1e9:.3g} GFLOP a view",
        f"memory          about {costs.memory / 2**30:.2g} GiB, {costs.activation_bytes / 2**30:.2g} of it activations",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _start(recipes: Sequence[Recipe], options: Options) -> list[Mapping[str, object] | None]:
    """Train one run per recipe; what ends one of them ends the rest, and names those that were finished."""
    store = default_store(options.runs)
    recipes = [_pinned(recipe, store) for recipe in recipes]
    results: list[Mapping[str, object] | None] = []
    with _session(options) as (world, signals):
        try:
            for recipe in recipes:
                if results and (signal := signals.pending()):  # it came too late to cut the run before
                    raise Interrupted(signal)
                data = _load(recipe, options, world)  # this and the next two lines before a run is made for nothing
                recipe.require_fit(len(data.images), processes=world.size)
                _starting_weights(recipe, store)
                run = create_run(store, recipe.name, now=now()) if world.leads else None
                results.append(_train(recipe, data, run, options, world=world, signals=signals, fresh=True))
        except (CfamcError, Interrupted) as end:
            finished = [result["id"] for result in results if result is not None]
            end.details |= {"finished": finished} if finished else {}
            raise
    return results


def _pinned(recipe: Recipe, store: Path) -> Recipe:
    """The recipe whose paths mean the same from any folder, and whose train.init is one certain run."""
    data, train = recipe.data, recipe.train
    if data.root is not None:
        data = data.model_copy(update={"root": str(Path(data.root).expanduser().absolute())})
    if train.init is not None:
        source = find_run(store, train.init)
        beside = source.path.resolve().parent == store.resolve()
        train = train.model_copy(update={"init": source.id if beside else str(source.path.absolute())})
    return recipe.model_copy(update={"data": data, "train": train})


def _starting_weights(recipe: Recipe, store: Path) -> tuple[str, dict[str, Tensor]] | None:
    """Where train.init says to start, in words, and the weights, which fit the recipe's encoder; None without it.

    Raises:
        CfamcError: There is no such run, no checkpoint of it can be read, or it is of another architecture.
    """
    if recipe.train.init is None:
        return None
    from cfamc_cli.engine import checkpoint
    from cfamc_cli.engine.models import build_encoder
    from cfamc_cli.engine.randomness import addressed_generator

    source = find_run(store, recipe.train.init)
    path, saved, _ = checkpoint.newest_valid(source.checkpoints)
    encoder = build_encoder(recipe.model, generator=addressed_generator("init", recipe.seed))
    checkpoint.load_state(encoder, saved.model, path=path)
    return f"{source.id}, {path.name}", saved.model


def _resume(reference: str, wanted: Recipe | None, options: Options) -> Mapping[str, object] | None:
    store = default_store(options.runs)
    run = find_run(store, reference, accept=_unfinished)
    if not run.run_json.exists() or not run.recipe_toml.exists():
        raise CfamcError(
            f"{run.path} holds no record to go on from: it was ended before it began",
            hint="start a new run",
            exit_code=ExitCode.BAD_DATA,
        )
    status = load_record(run.run_json, RunRecord).status
    recipe = recipe_file.load(str(run.recipe_toml))
    if wanted is not None and (differing := recipe_file.differing_keys(recipe, wanted)):
        raise CfamcError(
            f"run {run.id} was started with another recipe: {', '.join(differing)}",
            hint="leave the recipe out to go on with the run's own, or start a new run",
            exit_code=ExitCode.INVALID,
            details={"differing": differing},
        )
    if status == "finished":
        raise CfamcError(
            f"run {run.id} is finished; there is nothing to go on with",
            hint="start a new run, or lengthen it with train.init and a new recipe",
            exit_code=ExitCode.INVALID,
        )
    with _session(options) as (world, signals):
        # What may differ, where the data lie and how checkpoints are kept, is taken from the recipe that was given.
        recipe = wanted or recipe
        data = _load(recipe, options, world)
        return _train(recipe, data, run, options, world=world, signals=signals, fresh=False)


def _unfinished(run: RunFolder) -> bool:
    try:
        return load_record(run.run_json, RunRecord).status != "finished"
    except CfamcError:
        return False


@contextmanager
def _session(options: Options) -> Iterator[tuple[World, Signals]]:
    """Signals caught and the process group entered."""
    with catch_signals() as signals:
        from cfamc_cli.engine import distributed
        from cfamc_cli.engine.device import pick_device

        world = distributed.join(pick_device(options.device))
        try:
            yield world, signals
        finally:
            distributed.leave(world)


def _load(recipe: Recipe, options: Options, world: World) -> ImageSet:
    """The training images; the process that leads says how it goes."""
    from cfamc_cli.engine.data import load

    with render.TerminalSink(quiet=options.quiet or not world.leads, metrics=None, timing=None) as sink:
        return load(recipe.data, "train", seed=recipe.seed, cache=cache_folder(), sink=sink)


def _train(
    recipe: Recipe,
    data: ImageSet,
    run: RunFolder | None,
    options: Options,
    *,
    world: World,
    signals: Signals,
    fresh: bool,
) -> Mapping[str, object] | None:
    """Train a run to its end; `run` is None in processes that do not lead."""
    from cfamc_cli.engine import distributed
    from cfamc_cli.engine.device import describe, out_of_memory, pick_device
    from cfamc_cli.engine.pretrain import Trainer
    from cfamc_cli.engine.sink import NullSink

    device = pick_device(options.device)
    kept = run if world.leads else None  # the others read checkpoints, and write and say nothing
    with ExitStack() as stack:
        if kept is not None:
            stack.enter_context(_naming(kept, options))
            stack.enter_context(lock(kept))
            sweep(kept.path)
            sweep(kept.checkpoints)
        keeper = _Keeper(recipe, kept, describe(device), quiet=options.quiet, fresh=fresh)
        stack.callback(keeper.close)
        sink = NullSink() if kept is None else keeper.sink
        with keeper.failures(), distributed.peers(world), out_of_memory():
            trainer = Trainer(recipe, data, device=device, world=world, sink=sink)
            _take_up(trainer, run, options, fresh=fresh, keeper=keeper)
            keeper.begin(trainer, data)
            folder = run.checkpoints if run is not None else Path()
            with signals.deferred():
                signal = trainer.train(folder, stop=signals.pending)
            keeper.end(trainer, "interrupted" if signal else "finished")
            if signal:
                raise Interrupted(signal)
    return keeper.summary(_reference(kept, options)) if kept is not None else None


@contextmanager
def _naming(run: RunFolder, options: Options) -> Iterator[None]:
    """Within, whatever ends the work early says which run it was, and an interruption how to go on with it."""
    try:
        yield
    except (CfamcError, Interrupted) as end:
        end.details.setdefault("run", run.id)
        if isinstance(end, Interrupted) and run.run_json.exists():  # else there is nothing yet to go on with
            end.hint = f"go on with: cfamc pretrain --resume {_reference(run, options)}"
        raise


def _reference(run: RunFolder, options: Options) -> str:
    """What a next command calls the run by, typed in the same place."""
    return run.id if options.runs is None else str(run.path)


def _take_up(trainer: Trainer, run: RunFolder | None, options: Options, *, fresh: bool, keeper: _Keeper) -> None:
    """Put the trainer where it starts from: a run's own checkpoint, another run's encoder, or nothing."""
    from cfamc_cli.engine import checkpoint

    if not fresh and run is not None and checkpoint.list_checkpoints(run.checkpoints):
        path, saved, problems = checkpoint.newest_valid(run.checkpoints)
        for problem in problems:
            keeper.sink.warning(f"{problem.message}; going back to {path.name}")
        trainer.load(saved, path=path)
        positions = saved.progress.get("positions")
        keeper.cut_back(positions if isinstance(positions, dict) else {})
        return
    keeper.cut_back({})
    store = default_store(options.runs) if run is None else run.path.parent
    start = _starting_weights(trainer.recipe, store)
    if start is not None:
        source, weights = start
        checkpoint.load_state(trainer.encoder, weights, path=Path(source))
        keeper.sink.message(f"starts from the encoder of {source}")


class _Keeper:
    """Keeps a run's records: run.json as the run goes, and the streams that the engine writes to."""

    def __init__(self, recipe: Recipe, run: RunFolder | None, device: str, *, quiet: bool, fresh: bool) -> None:
        self.run = run
        self._streams: dict[str, JsonLines] = {}
        self._written = 0.0
        self._started = time.monotonic()
        self._before = 0.0  # seconds of earlier sittings
        self.record: RunRecord | None = None
        if run is not None:
            if fresh:
                write_text(run.recipe_toml, recipe_file.to_toml(recipe))
                write_json(run.resolved_json, recipe.resolved())
                self.record = _new_record(recipe, run, device)
                self._save()
            else:
                self.record = load_record(run.run_json, RunRecord)
                self._before = self.record.wall_seconds
                self._change(environment=capture_environment(device), failure=None)
            self._streams = {path.name: JsonLines(path) for path in (run.metrics, run.timing)}
        self.sink = _RunSink(self, quiet=quiet, streams=self._streams)

    def cut_back(self, positions: Mapping[str, object]) -> None:
        """Drop what the streams hold beyond a checkpoint, and read again what they say of evaluations."""
        if self.run is None:
            return
        for stream in self._streams.values():
            stream.close()
        for path in (self.run.metrics, self.run.timing):
            size = positions.get(path.name, 0)
            cut(path, size if isinstance(size, int) else 0)
            self._streams[path.name] = JsonLines(path)
        self.sink.write_to(self._streams)
        for line in read_metrics(self.run.metrics):
            self.note(line)

    def begin(self, trainer: Trainer, data: ImageSet) -> None:
        """The run is under way."""
        from cfamc_cli.engine.checkpoint import count_parameters

        used = DataUsed(dataset=data.dataset, split=data.split, n=len(data.images), fingerprint=data.fingerprint)
        if self.record is not None and self.record.data is not None and self.record.data != used:
            raise CfamcError(
                f"the data changed since run {self.record.id} began: fingerprint {data.fingerprint[:12]}, "
                f"not {self.record.data.fingerprint[:12]}",
                hint="bring the data back, or start a new run",
                exit_code=ExitCode.BAD_DATA,
            )
        costs = plan(trainer.recipe, images=len(data.images))
        totals = Totals(
            steps=trainer.updates,
            view_passes=costs.view_passes,
            parameters=count_parameters(trainer.encoder),
        )
        self._change(status="running", data=used, totals=totals, progress=_progress(trainer))

    def progress(self, line: TrainLine) -> None:
        """Write how far the run is, now and then."""
        if self.record is not None and time.monotonic() - self._written >= _SECONDS_BETWEEN_UPDATES:
            total = self.record.totals.steps
            self._change(progress=Progress(batch=line.batch, step=line.step, epoch=line.epoch, total=total))

    def end(self, trainer: Trainer, status: str) -> None:
        """The sitting is over."""
        self._change(status=status, progress=_progress(trainer))

    def note(self, line: MetricLine) -> None:
        """Take an evaluation from the engine's lines into run.json."""
        if self.record is not None and isinstance(line, EvaluationLine):
            evaluation = line.evaluation()
            self._change(evaluation=evaluation, untrained=evaluation if line.step == 0 else self.record.untrained)

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

    def _fail(self, status: str, error: CfamcError) -> None:
        details = error.details
        failure = Failure(
            message=error.message,
            exit_code=int(error.exit_code),
            batch=_integer(details.get("batch")),
            step=_integer(details.get("step")),
            lr=_floating(details.get("lr")),
            loss=_floating(details.get("loss")),
            gradient_norm=_floating(details.get("gradient_norm")),
        )
        self._quietly(status=status, failure=failure)

    def _quietly(self, **changes: object) -> None:
        with suppress(CfamcError):  # the first failure is the one to report
            self._change(**changes)

    def _change(self, **changes: object) -> None:
        if self.record is None:
            return
        wall = self._before + time.monotonic() - self._started
        self.record = self.record.model_copy(update={"updated": now(), "wall_seconds": wall, **changes})
        self._save()

    def _save(self) -> None:
        if self.run is not None and self.record is not None:
            save_record(self.run.run_json, self.record)
            self._written = time.monotonic()

    def summary(self, reference: str) -> Mapping[str, object]:
        """Say how the run ended and what can be done with `reference`, and return run.json for stdout."""
        assert self.record is not None, "only a process that keeps a run speaks"
        assert self.run is not None, "only a process that keeps a run speaks"
        record, say = self.record, self.sink.message
        say(f"trained {record.totals.steps} updates in {render.duration(record.wall_seconds)}: {self.run.path}")
        for label, evaluation in (("untrained", record.untrained), ("trained", record.evaluation)):
            if evaluation is not None and evaluation.clean and evaluation.robust and evaluation.knn:
                say(
                    f"{label:>9}: clean {render.interval(evaluation.clean)}  "
                    f"{evaluation.attack} {evaluation.eps} {render.interval(evaluation.robust)}  "
                    f"knn {render.interval(evaluation.knn)}  (% of {evaluation.clean.n} held-out training images)"
                )
        say(f"next: cfamc attack {reference} --eps 8/255")
        return record.model_dump(mode="json")

    def close(self) -> None:
        """Close the streams and take the display down."""
        self.sink.close()
        for stream in self._streams.values():
            stream.close()


class _RunSink(render.TerminalSink):
    """A terminal that also keeps run.json up to date."""

    def __init__(self, keeper: _Keeper, *, quiet: bool, streams: Mapping[str, JsonLines]) -> None:
        super().__init__(quiet=quiet, metrics=streams.get("metrics.jsonl"), timing=streams.get("timing.jsonl"))
        self._keeper = keeper

    def write_to(self, streams: Mapping[str, JsonLines]) -> None:
        """Go on with other record files."""
        self._records = {name: streams.get(name) for name in self._records}

    def metrics(self, line: MetricLine) -> None:
        super().metrics(line)
        self._keeper.note(line)
        if isinstance(line, TrainLine):
            self._keeper.progress(line)


def _new_record(recipe: Recipe, run: RunFolder, device: str) -> RunRecord:
    return RunRecord(
        id=run.id,
        name=recipe.name,
        status="created",
        created=now(),
        updated=now(),
        recipe_digest=recipe.digest(),
        seed=recipe.seed,
        progress=Progress(),
        environment=capture_environment(device),
        wall_seconds=0.0,
        totals=Totals(steps=0, view_passes=0, parameters=0),
        data=None,
        init=recipe.train.init,
    )


def _progress(trainer: Trainer) -> Progress:
    batch = trainer.step // trainer.recipe.replays
    return Progress(batch=batch, step=trainer.step, epoch=batch / trainer.per_epoch, total=trainer.updates)


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _floating(value: object) -> float | None:
    return float(value) if isinstance(value, int | float | str) else None
