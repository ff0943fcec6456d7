"""`cfamc attack --unlabelled`: what can be said of an encoder without labels, and without a head.

How many directions its layers use, and how far an attack moves the features that heads read, over a curve of eps. Each
eps is kept as it is finished, so that the same command goes on where it was cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

from cfamc_cli.commands.attack_settings import Flags, asked_attacks
from cfamc_cli.commands.common import (
    Options,
    Session,
    interruption,
    leads,
    load_images,
    require_checkpoint,
    session,
)
from cfamc_cli.commands.probe import chosen_split, data_table
from cfamc_cli.errors import CfamcError, invalid
from cfamc_cli.recipe.schema import Data, EmbeddingAttack, Features, Recipe, Split, fraction
from cfamc_cli.report import terminal
from cfamc_cli.report.beside import unlabelled as sheet
from cfamc_cli.store.environment import capture_environment
from cfamc_cli.store.outcomes import key_of
from cfamc_cli.store.records import (
    Accuracy,
    Movement,
    Spectrum,
    UnlabelledRecord,
    images_of,
    load_record,
    now,
    save_record,
)
from cfamc_cli.store.runs import LATEST, RECORD, RunFolder, find_run, new_item, turn

MOVED = 1000  # images that are attacked where --limit says nothing
_SHARES = (Fraction(1, 4), Fraction(1, 2), 1)  # of the attack's own eps, where --eps says nothing
_OWN = ("eps", "attack", "steps", "step_size", "restarts", "norm", "limit", "split", "data", "unlabelled")


def unlabelled(reference: str | None, *, flags: Flags, options: Options) -> None:
    """Measure an encoder without labels, or go on with that.

    Args:
        reference: The run; the newest with a checkpoint for None.
        flags: What to measure.
        options: Where and how.

    Raises:
        CfamcError: With the exit code of its cause.
    """
    _require(flags)
    run = find_run(options.store, LATEST if reference is None else reference, accept=RunFolder.has_checkpoint)
    require_checkpoint(run, options)
    recipe = run.recipe()
    tables = _curve(flags, recipe)
    data = Data.model_validate(data_table(flags.data)) if flags.data is not None else recipe.data
    recipe = recipe.model_copy(update={"data": data})
    message, again = "interrupted; every finished eps is kept", "go on with the same command"
    with session(options) as working, interruption(message=message, hint=lambda: again):
        from cfamc_cli.engine.device import out_of_memory

        if not leads():
            return  # nothing here is shared
        with out_of_memory(), turn(run.unlabelled, wait=working.talk.message):
            folder, record = _measured(run, recipe, tables, flags, working)
    if options.as_json:
        answer = record.model_dump(mode="json")
        terminal.print_json({"run": run.id, "path": str(folder), "results": [answer]})
        return
    told = sheet([record])
    terminal.print_rows(told.title, told.columns, told.rows, right=told.right)
    terminal.write_lines(told.notes)


def _require(flags: Flags) -> None:
    """Refuse what has no effect here."""
    idle = [field.name for field in fields(Flags) if field.name not in _OWN]
    if given := [name for name in idle if getattr(flags, name) != getattr(Flags(), name)]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise invalid(f"{named} would have no effect: --unlabelled reads neither head nor labels", "leave it out")
    if flags.attack not in (None, "embedding"):
        raise invalid(f"--attack {flags.attack[:40]} needs labels", "leave it out: --unlabelled moves embeddings")


def _curve(flags: Flags, recipe: Recipe) -> list[EmbeddingAttack]:
    """The attack at each eps, the smallest first."""
    asked = asked_attacks(replace(flags, attack="embedding"), recipe)
    tables = [table for table in asked if isinstance(table, EmbeddingAttack)]
    if not flags.eps:
        sizes = [share * 255 * fraction(tables[0].eps) for share in _SHARES]  # whole 255ths, as its own is
        tables = [tables[0].model_copy(update={"eps": f"{size}/255"}) for size in sizes]
    return sorted(tables, key=lambda table: fraction(table.eps))


def _measured(
    run: RunFolder, recipe: Recipe, tables: Sequence[EmbeddingAttack], flags: Flags, working: Session
) -> tuple[Path, UnlabelledRecord]:
    """The folder of the record with a movement for each eps that is asked for, and the record."""
    from cfamc_cli.engine.device import computation, describe
    from cfamc_cli.engine.evaluation import representation as engine
    from cfamc_cli.engine.evaluation.verify import undisturbed
    from cfamc_cli.engine.heads.classifier import load_encoder
    from cfamc_cli.engine.randomness import addressed_order

    talk, device = working.talk, working.device
    loaded = load_encoder(run.checkpoints, recipe.model, device=device, talk=talk)
    layer: Features = "backbone" if loaded.backbone_only else recipe.probe.features
    images = load_images(recipe, _split(recipe.data, flags), talk=talk)
    chosen = addressed_order(len(images), "unlabelled", images.fingerprint)[: engine.MOST_IMAGES]
    count = min(flags.limit or MOVED, len(chosen))
    if len(chosen) < 2 or count < (flags.limit or 0):
        raise invalid(f"--limit: there are {len(chosen):,} {images_of(images.split)} of {images.dataset} to look at")
    settings = {key: value for key, value in tables[0].model_dump(mode="json").items() if key != "eps"}
    data = images.used().model_copy(update={"n": len(chosen)})
    about = {"layer": layer, "moved": count, "settings": settings, "seed": recipe.seed, "data": data.model_dump()}
    key = key_of({"schema": 1, "encoder": loaded.digest, **about})
    folder, record = _kept(run, key)
    missing = [table for table in tables if record is None or not _has(record, table.eps)]
    if record is not None and not missing:
        talk.message(f"finished on {record.created:%Y-%m-%d %H:%M} UTC as {record.id}")
        return folder, record
    pixels = images.images[chosen]

    def progress(what: str) -> Callable[[int, int], None]:
        return lambda done, total: talk.progress(what, done, total, {})

    with undisturbed((loaded.encoder,), device) as traces:
        outputs = engine.outputs_of(
            loaded.encoder,
            pixels,
            backbone_only=loaded.backbone_only,
            device=device,
            each=progress(f"features of {images_of(images.split)}"),
        )
        if record is None:
            began = time.monotonic()
            spectra = tuple(
                Spectrum(layer=name, dim=z.shape[1], rank_me=engine.rank_me(z), alpha=engine.alpha_req(z))
                for name, z in outputs.items()
            )
            folder = new_item(run.unlabelled, f"embedding-{tables[0].norm}")
            record = UnlabelledRecord(
                id=folder.name,
                run=run.id,
                created=now(),
                seed=recipe.seed,
                encoder_digest=loaded.digest,
                data=data,
                spectra=spectra,
                features=layer,
                norm=tables[0].norm,
                settings=settings,
                movements=(),
                key=key,
                wall_seconds=time.monotonic() - began,
                environment=capture_environment(describe(device), computation(device, precision="float32")),
            )
            save_record(folder / RECORD, record)
        for table in missing:
            began = time.monotonic()
            moved = engine.moved(
                partial(loaded.encoder.features, features=layer),
                pixels[:count],
                outputs[layer],
                stage=table,
                seed=recipe.seed,
                device=device,
                each=progress(f"{table.norm} {table.eps}"),
            )
            assert not traces().changed, "an attack left a trace in the encoder"
            if moved.invalid:
                talk.warning(f"{moved.invalid} points left the ball or are no images: they count as unmoved")
            found = Movement(
                eps=table.eps,
                cosine=float(moved.cosine.mean()),
                kept=Accuracy.of(int(moved.kept.sum()), count),
                invalid=moved.invalid,
                wall_seconds=time.monotonic() - began,
            )
            record = _with(record, found)
            save_record(folder / RECORD, record)
    return folder, record


def _split(data: Data, flags: Flags) -> Split:
    """What to look at: held-out images where there are some, else test images, or all of a folder without such."""
    if data.dataset == "folder" and data.root is not None and flags.split is None and not data.holdout:
        root = Path(data.root).expanduser()
        return "test" if any((root / name).is_dir() for name in ("test", "val")) else "train"
    return chosen_split(data, flags.split)


def _kept(run: RunFolder, key: str) -> tuple[Path, UnlabelledRecord | None]:
    """The record with this key and its folder, where there is one that can be read."""
    for path in sorted(run.unlabelled.glob(f"*/{RECORD}")):
        with suppress(CfamcError):
            record = load_record(path, UnlabelledRecord)
            if record.key == key:
                return path.parent, record
    return Path(), None


def _has(record: UnlabelledRecord, eps: str) -> bool:
    return any(fraction(movement.eps) == fraction(eps) for movement in record.movements)


def _with(record: UnlabelledRecord, found: Movement) -> UnlabelledRecord:
    """The record with one movement more."""
    movements = sorted((*record.movements, found), key=lambda movement: fraction(movement.eps))
    seconds = record.wall_seconds + found.wall_seconds
    return record.model_copy(update={"movements": tuple(movements), "created": now(), "wall_seconds": seconds})
