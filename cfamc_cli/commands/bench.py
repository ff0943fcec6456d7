"""`cfamc bench`: what a recipe will cost on this machine, before anybody waits for it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cfamc_cli.commands.common import Options, Session, interruption, session
from cfamc_cli.engine.costs import plan_of
from cfamc_cli.errors import invalid
from cfamc_cli.recipe import file
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.report import bench as sheets
from cfamc_cli.report import terminal
from cfamc_cli.store.environment import capture_environment
from cfamc_cli.store.records import BenchRecord, now, save_record
from cfamc_cli.store.runs import BENCHES, RECORD, new_item


def bench(
    reference: str, *, overrides: Sequence[str], seconds: float, alone: bool, attack: bool, options: Options
) -> None:
    """Measure a recipe's training, or its attacks too, and leave a record in the store.

    Args:
        reference: A recipe's path or name.
        overrides: Texts of --set.
        seconds: Time for each variant of the settings.
        alone: Leave the other variants out.
        attack: Measure the recipe's attacks too.
        options: Where and how.

    Raises:
        CfamcError: With the exit code of its cause; 129, 130, 138 or 143 where a signal arrived; nothing was written.
    """
    began = time.monotonic()
    recipe = file.load(reference, overrides=overrides)
    if attack and not recipe.attack:
        raise invalid(f"{recipe.name} has no [[attack]] to measure", "leave --attack out")
    plan_of(recipe)  # what does not fit its data is seen before torch is loaded
    with session(options) as working, interruption(message="interrupted; nothing was written"):
        record = _measured(recipe, working, seconds=seconds, alone=alone, attack=attack)
        folder = new_item(options.store / BENCHES, recipe.name)
        record = record.model_copy(update={"id": folder.name, "wall_seconds": time.monotonic() - began})
        save_record(folder / RECORD, record)
        working.talk.message(f"{folder / RECORD}; all benches side by side: cfamc compare")
    if options.as_json:
        terminal.print_json(record.model_dump(mode="json"))
    else:
        terminal.write_out("\n")
        for sheet in sheets.spelled_out(record):
            terminal.print_rows(sheet.title, sheet.columns, sheet.rows, right=sheet.right)
            terminal.write_lines([*sheet.notes, ""])


def _measured(recipe: Recipe, session: Session, *, seconds: float, alone: bool, attack: bool) -> BenchRecord:
    """All that is measured; id and time are the caller's to fill in."""
    from cfamc_cli.engine import bench as engine
    from cfamc_cli.engine.bench_attacks import attacks
    from cfamc_cli.engine.device import describe

    if session.world.size > 1:
        raise invalid("a bench measures one process", "start it without torchrun")
    costs, device = plan_of(recipe), session.device
    variants = engine.variants(recipe, device=device, seconds=seconds, alone=alone, talk=session.talk)
    best, own = engine.best(variants).settings, variants[0].settings
    precisions = [
        precision
        for precision in engine.PRECISIONS
        if any(made.cost and made.settings["train.precision"] == precision for made in variants)
    ]
    return BenchRecord(
        id="",
        created=now(),
        name=recipe.name,
        recipe_digest=recipe.digest(),
        environment=capture_environment(describe(device), None),
        images=costs.images,
        batches=costs.batches,
        weight_updates=costs.weight_updates,
        flops=costs.flops,
        planned_memory=costs.memory,
        peaks=engine.peaks(recipe, device=device, precisions=precisions),
        variants=tuple(variants),
        recommended={key: value for key, value in best.items() if value != own[key]},
        attacks=attacks(recipe, device=device, talk=session.talk) if attack else (),
        wall_seconds=0.0,
    )
