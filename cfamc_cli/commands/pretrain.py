"""`cfamc pretrain`: from a recipe to a run in the store.

Nothing here computes: the engine trains, the store keeps, and this puts them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cfamc_cli.commands.common import Options, Session, interruption, session
from cfamc_cli.commands.track import require_tracker, tracking
from cfamc_cli.engine.costs import plan_of, require_size
from cfamc_cli.engine.sink import NullLedger
from cfamc_cli.errors import CfamcError, Interrupted, bad_data, invalid
from cfamc_cli.recipe import file
from cfamc_cli.recipe.plan import PROCESS, Plan, duration
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.report import terminal
from cfamc_cli.report.plots import draw_training, require_plots
from cfamc_cli.store.files import sweep, write_bytes
from cfamc_cli.store.ledger import RunLedger, found, found_again
from cfamc_cli.store.records import Progress, RunRecord, Totals, now
from cfamc_cli.store.runs import CURVES, RunFolder, create_run, find_run, lock

if TYPE_CHECKING:
    from torch import Tensor

    from cfamc_cli.engine.data.sets import ImageSet
    from cfamc_cli.engine.pretrain import Trainer


def pretrain(
    reference: str | None,
    *,
    overrides: Sequence[str],
    seeds: Sequence[int],
    resume: str | None,
    dry_run: bool,
    force: bool,
    plot: bool = False,
    options: Options,
) -> None:
    """Train one run per seed, go on with a run, or say what would be done.

    Args:
        reference: A recipe's path or name; may be left out with `resume`.
        overrides: Texts of --set.
        seeds: Seeds to train; the recipe's own where there are none.
        resume: A run to go on with.
        dry_run: Print the resolved recipe and its cost, and do nothing.
        force: Start a run whose plan is beyond the memory there is.
        plot: Draw the curves of each run into its folder.
        options: Where and how.

    Raises:
        CfamcError: With the exit code of its cause; 129, 130, 138 or 143 for a signal, and the run can be resumed.
    """
    if plot:
        require_plots()  # before any work
    require_tracker(options.track, dry_run=dry_run)
    if resume is not None:
        recipes = [None] if reference is None else _recipes(reference, overrides, seeds)
        if len(recipes) > 1 or (reference is None and (overrides or seeds)):
            raise invalid("--resume goes on with one run and its own recipe", "leave out --set, --seed and --seeds")
        if dry_run:
            raise invalid("--dry-run and --resume exclude each other")
        results = _resume(resume, recipes[0], options)
    else:
        if reference is None:
            raise invalid(
                "which recipe?", "name one, such as: cfamc pretrain quickstart; all are listed by: cfamc recipes list"
            )
        recipes_to_train = _recipes(reference, overrides, seeds)
        if dry_run:
            _show_plan(recipes_to_train, options)
            return
        results = _start(recipes_to_train, options, force=force)
    if plot:
        _draw(results, options)
    if options.as_json and results:  # other processes of torchrun have none, and say nothing
        finished = [record.model_dump(mode="json") for record in results]
        terminal.print_json(finished[0] if len(finished) == 1 else {"runs": finished})
    elif results:
        terminal.write_out("".join(f"{record.id}\n" for record in results))


def _draw(results: Sequence[RunRecord], options: Options) -> None:
    """Draw the curves of each run into its folder."""
    for record in results:
        run = find_run(options.store, record.id)
        write_bytes(run.path / CURVES, draw_training(run))
        if not options.quiet:
            terminal.talk().say(f"drawn: {run.path / CURVES}")


def _recipes(reference: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[Recipe]:
    return [file.load(reference, overrides=overrides, seed=seed) for seed in seeds or (None,)]


def _show_plan(recipes: Sequence[Recipe], options: Options) -> None:
    """Print the first recipe and its cost; the others differ in their seed alone."""
    recipe, seeds = recipes[0], [recipe.seed for recipe in recipes]
    costs = plan_of(recipe, _images_of_folder(recipe))
    if options.as_json:
        terminal.print_json({"recipe": recipe.resolved(), "plan": dataclasses.asdict(costs), "seeds": seeds})
    else:
        of_all = f"# runs            {len(seeds)}, seeds {', '.join(map(str, seeds))}; counts are of each\n"
        words = _costs_in_words(costs) + (of_all if len(seeds) > 1 else "")
        terminal.write_out(f"{file.to_toml(recipe)}\n{words}")


def _images_of_folder(recipe: Recipe) -> int | None:
    """How many images a folder has for training; None for other data, and with a warning where there is no folder."""
    data = recipe.data
    if data.dataset != "folder" or data.root is None:
        return None
    root = Path(data.root).expanduser().absolute()
    if not root.exists():
        terminal.talk().say(f"warning: data.root {root} does not exist; counts are of a stand-in")
        return None
    from cfamc_cli.engine.data.folder import list_images

    left = len(list_images(root, "train").names) - data.holdout
    return max(left if data.limit is None else min(left, data.limit), 1)


def _costs_in_words(costs: Plan) -> str:
    of = f"{costs.images:,} images" + (" (a stand-in: counts are per 1,000)" if costs.per_thousand else "")
    full, again = costs.memory_full / 2**30, costs.memory_recompute / 2**30
    attack = f" and {costs.attack_view_passes:,} of the adversary" if costs.attack_view_passes else ""
    lines = [
        f"images          {of}",
        f"parameters      {costs.parameters:,}, {costs.backbone_parameters:,} of them in the backbone",
        f"weight updates  {costs.weight_updates:,} in {costs.batches:,} batches",
        f"view passes     {costs.view_passes:,}{attack}, forward and backward",
        f"arithmetic      {costs.flops / 1e15:.4g} PFLOP, {costs.flops_per_view / 1e9:.3g} GFLOP a view",
        f"memory          about {full:.2g} GiB in {costs.precision}, {again:.2g} with train.memory = recompute",
        f"                and on a CPU {PROCESS / 2**30:.1g} for the process itself",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _start(recipes: Sequence[Recipe], options: Options, *, force: bool) -> list[RunRecord]:
    """Train one run per recipe; what ends one of them ends the rest, and names those that were finished."""
    recipes = [pinned(recipe, options.store) for recipe in recipes]
    results: list[RunRecord] = []
    if recipes[0].model.timm is not None:  # recipes differ in their seed alone
        plan_of(recipes[0])  # before any image is read
    with session(options) as working:
        try:
            for recipe in recipes:
                if results and (signal := working.signals.pending()):  # it came too late to cut the run before
                    raise Interrupted(signal)
                # This and the next lines before a run is made for nothing.
                data = working.load_images(recipe, "train")
                if recipe.model.input_size is None:  # else they are resized
                    require_size(recipe.model, *data.images.shape[-2:])
                costs = plan_of(recipe, images=len(data.images))
                if not force:
                    _require_memory(costs, working)
                _starting_weights(recipe, options.store)
                run = (
                    create_run(options.store, recipe.name, seed=recipe.seed, now=now()) if working.world.leads else None
                )
                results += _train(recipe, data, run, working)
        except (CfamcError, Interrupted) as end:
            finished = [record.id for record in results]
            end.details |= {"finished": finished} if finished else {}
            raise
    return results


def _require_memory(costs: Plan, working: Session) -> None:
    """Refuse what would be killed for its memory; with several processes a plan says nothing of each."""
    from cfamc_cli.engine.device import whole_memory

    there, needed = whole_memory(working.device), costs.memory + (PROCESS if working.device.type == "cpu" else 0)
    if there is None or needed <= there or working.world.size > 1:
        return
    less = f"train.memory=recompute plans {costs.memory_recompute / 2**30:.2g} GiB; or lower "
    ways = less * (costs.memory_recompute < costs.memory) + "train.batch_size, crops.0.count or model.width"
    raise invalid(
        f"the plan takes about {needed / 2**30:.2g} GiB, and {working.device} has {there / 2**30:.2g}",
        f"{ways}; --force starts it all the same",
    )


def pinned(recipe: Recipe, store: Path) -> Recipe:
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
        CfamcError: There is no such run, no checkpoint of it can be read, it is of another architecture, or it has seen
            images that the recipe holds out.
    """
    if recipe.train.init is None:
        return None
    from cfamc_cli.engine import checkpoint
    from cfamc_cli.engine.encoder import build_encoder
    from cfamc_cli.engine.randomness import addressed_generator

    source = find_run(store, recipe.train.init)
    _require_unseen(recipe, source)
    path, saved, _ = checkpoint.newest_valid(source.checkpoints)
    encoder = build_encoder(recipe.model, generator=addressed_generator("init", recipe.seed))
    checkpoint.load_state(encoder, saved.model, path=path)
    return f"{source.id}, {path.name}", saved.model


def _require_unseen(recipe: Recipe, source: RunFolder) -> None:
    """Refuse to start from a run that trained on images which are held out now; fewer are always some of more."""
    own = recipe.data
    if not own.holdout or source.record().imported is not None:  # nobody knows what foreign weights have seen
        return
    seen = source.recipe().data
    same = own.dataset == seen.dataset and (own.dataset != "folder" or own.root == seen.root)
    if same and own.holdout > seen.holdout:
        raise invalid(
            f"train.init: run {source.id} was trained on images that data.holdout = {own.holdout} keeps from training",
            "start from a run that holds out as many or more",
        )


def _resume(reference: str, wanted: Recipe | None, options: Options) -> list[RunRecord]:
    run = find_run(options.store, reference, accept=lambda run: run.status not in (None, "finished"))
    if not run.run_json.exists() or not run.recipe_toml.exists():
        raise bad_data(f"{run.path} holds no record to go on from: it was ended before it began", "start a new run")
    status, recipe = run.record().status, file.load(str(run.recipe_toml))
    _require_own(recipe, run.recipe_toml, run)
    _require_own(run.recipe(), run.resolved_json, run)
    if wanted is not None and (differing := file.differing_keys(recipe, wanted)):
        hint = "leave the recipe out to go on with the run's own, or start a new run"
        error = invalid(f"run {run.id} was started with another recipe: {', '.join(differing)}", hint)
        error.details["differing"] = differing
        raise error
    if status == "finished":
        raise invalid(
            f"run {run.id} is finished; there is nothing to go on with",
            "start a new run, or lengthen it with train.init and a new recipe",
        )
    with session(options) as working:
        # What may differ, where the data lie and how checkpoints are kept, is taken from the recipe that was given.
        recipe = wanted or recipe
        return _train(recipe, working.load_images(recipe, "train"), run, working)


def _require_own(recipe: Recipe, path: Path, run: RunFolder) -> None:
    """Refuse a recipe that was changed in its file since the run began."""
    record = run.record()
    for key, own, kept in (("digest", recipe.digest(), record.recipe_digest), ("seed", recipe.seed, record.seed)):
        if own != kept:
            cause = f"{path} is not the recipe of the run any more: {key} {own!s:.12}, where run.json has {kept!s:.12}"
            raise bad_data(cause, "bring the file back as it was, or start a new run")


def _train(recipe: Recipe, data: ImageSet, run: RunFolder | None, session: Session) -> list[RunRecord]:
    """Train a run to its end; those that do not lead read checkpoints, write and say nothing, and return no record."""
    from cfamc_cli.engine import checkpoint, distributed
    from cfamc_cli.engine.device import out_of_memory
    from cfamc_cli.engine.pretrain import Trainer

    world = session.world
    keeping: AbstractContextManager[RunLedger | None] = nullcontext()
    if run is not None and world.leads:
        keeping = _keeping(run, recipe, session)
    with keeping as kept, distributed.peers(world), out_of_memory():
        ledger = NullLedger() if kept is None else kept
        trainer = Trainer(recipe, data, device=session.device, world=world, talk=session.talk, ledger=ledger)
        positions = _take_up(trainer, run, session)
        if kept is not None:
            kept.cut_back(positions)
            costs = plan_of(recipe, images=len(data.images))
            totals = Totals(
                steps=trainer.total,
                view_passes=costs.view_passes,
                attack_view_passes=costs.attack_view_passes,
                parameters=checkpoint.count_parameters(trainer.encoder),
            )
            kept.begin(data.used(), totals, _progress(trainer), trainer.computation)
            if not session.options.quiet:
                _introduce(kept, trainer, costs, session)
            if decay := recipe.train.average:
                session.talk.message(f"the average of the weights is evaluated and saved: train.average = {decay:g}")
        with session.signals.deferred():
            signal = trainer.train(Path() if run is None else run.checkpoints, stop=session.signals.pending)
        if kept is not None:
            kept.end("interrupted" if signal else "finished", _progress(trainer))
        if signal:
            distributed.largest(signal, world)  # nobody leaves before all is written: launchers end the others then
            raise Interrupted(signal)
    if kept is None:
        return []
    _tell(kept.record, kept.run, session)
    return [kept.record]


@contextmanager
def _keeping(run: RunFolder, recipe: Recipe, session: Session) -> Iterator[RunLedger]:
    """Within, the run is held and its ledger open; what ends the work early says which run it was, and how to go on."""
    from cfamc_cli.engine.device import describe

    def hint() -> str:  # without a record there is nothing yet to go on with
        return f"go on with: cfamc pretrain --resume {session.options.reference(run)}" if run.run_json.exists() else ""

    try:
        with interruption(hint=hint), lock(run):
            sweep(run.path)
            sweep(run.checkpoints)
            device = describe(session.device)
            begun = run.run_json.exists()
            kept = RunLedger(run, found_again(run, device=device) if begun else found(run, recipe, device=device))
            told = tracking(session.options.track, run, recipe, session.talk)
            with told as kept.listener, closing(kept), kept.failures():
                yield kept
    except (CfamcError, Interrupted) as end:
        end.details.setdefault("run", run.id)
        raise


def _take_up(trainer: Trainer, run: RunFolder | None, session: Session) -> Mapping[str, object]:
    """Put the trainer where it starts from: a run's own checkpoint, another run's encoder, or nothing.

    Returns:
        The sizes that the record files had there.
    """
    from cfamc_cli.engine import checkpoint

    if run is not None and checkpoint.list_checkpoints(run.checkpoints):
        path, saved, problems = checkpoint.newest_valid(run.checkpoints)
        for problem in problems:
            session.talk.warning(f"{problem.message}; going back to {path.name}")
        trainer.load(saved, path=path)
        positions = saved.progress.get("positions")
        return positions if isinstance(positions, dict) else {}
    start = _starting_weights(trainer.recipe, session.options.store if run is None else run.path.parent)
    if start is not None:
        source, weights = start
        checkpoint.load_state(trainer.encoder, weights, path=Path(source))
        session.talk.message(f"starts from the encoder of {source}")
    return {}


def _introduce(kept: RunLedger, trainer: Trainer, costs: Plan, session: Session) -> None:
    """Say what the run is and what it will take, before it begins."""
    from cfamc_cli.engine.forecast import forecast

    record, recipe, say = kept.record, trainer.parts[0], session.talk.message
    phases = f", {len(trainer.parts)} phases" if len(trainer.parts) > 1 else ""
    crops = " and ".join(f"{group.count} crops of {group.size} pixels" for group in recipe.crops)
    assert record.data is not None, "the run has begun"
    say(f"run     {record.id} in {kept.run.path.parent}")
    method = f"{recipe.objective.name}, adversary {recipe.adversary.name}{phases}"
    say(f"recipe  {recipe.name}, seed {recipe.seed}: {method}")
    say(f"data    {record.data.n:,} images of {record.data.dataset} {record.data.split}, {crops}")
    say(f"device  {record.environment.device}, in {trainer.computation.precision}")
    seconds, left = forecast(trainer, costs), trainer.total - record.progress.step
    time = "time is told after some batches" if seconds is None else f"at best {duration(seconds)} and evaluations"
    memory = costs.memory + (PROCESS if trainer.device.type == "cpu" else 0)
    say(f"plan    {left:,} weight updates, {memory / 2**30:.2g} GiB, {time}")


def _progress(trainer: Trainer) -> Progress:
    where = trainer.where()
    return Progress(batch=where["batch"], step=where["step"], epoch=where["epoch"], total=trainer.total)


def _tell(record: RunRecord, run: RunFolder, session: Session) -> None:
    """Say how the run ended and what can be done with it."""
    say = session.talk.message
    say(f"trained {record.totals.steps} updates in {duration(record.wall_seconds)}: {run.path}")
    for label, evaluation in (("untrained", record.untrained), ("trained", record.evaluation)):
        if evaluation is not None and evaluation.clean and evaluation.robust and evaluation.knn:
            say(
                f"{label:>9}: clean {terminal.interval(evaluation.clean)}  "
                f"{evaluation.attack} {evaluation.eps} {terminal.interval(evaluation.robust)}  "
                f"knn {terminal.interval(evaluation.knn)}  "
                f"(% of {evaluation.clean.n} training images held out of the head)"
            )
    say(f"next: cfamc attack {session.options.reference(run)} --eps 8/255")
