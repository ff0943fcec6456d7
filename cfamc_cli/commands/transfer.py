"""`cfamc attack B --source A`: the examples are made on A, its encoder and head, and judged on B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cfamc_cli.commands.attack_settings import Flags
from cfamc_cli.commands.common import Session, require_checkpoint
from cfamc_cli.errors import invalid
from cfamc_cli.recipe.schema import Attack, EmbeddingAttack, FgsmAttack, PgdAttack
from cfamc_cli.store.records import MadeOn, ProbeRecord, load_record
from cfamc_cli.store.runs import HEAD, RECORD, RunFolder, find_run, finished_probes

if TYPE_CHECKING:
    from torch import Tensor

    from cfamc_cli.engine.evaluation.verify import Predictor


def audits(flags: Flags) -> bool:
    """Whether the audit is made, in which another run is one more attacker."""
    return flags.audit or flags.strict


def require_transferable(flags: Flags, asked: Sequence[Attack], *, measure: bool) -> None:
    """Refuse what cannot be said of examples from elsewhere.

    Raises:
        CfamcError: Exit 2; an attack ends where it fools the network that it runs on, or a flag is about that network.
    """
    if measure:
        raise invalid(f"--source has no effect on --attack {flags.attack}", "say --attack pgd, fgsm or embedding")
    if flags.space == "crops":
        raise invalid("--space crops attacks crops, and --source makes examples that are whole images")
    if audits(flags):
        return  # its examples are one check of the audit
    if flags.plot:
        raise invalid("--plot looks at the gradient of what is attacked, and --source attacks another network")
    for table in asked:
        if not isinstance(table, PgdAttack | FgsmAttack | EmbeddingAttack):
            message = f"--source: {table.name} stops where it fools the source, and such examples hardly transfer"
            raise invalid(message, "say --attack pgd, fgsm or embedding")
        if table.search_precision != "float32":
            raise invalid("--source: search_precision has no effect on it", "leave it at float32")
        if isinstance(table, PgdAttack) and table.restarts > 1:
            raise invalid("--source: restarts have no effect, for PGD goes on to its last step once", "leave them out")


def from_source(
    reference: str, run: RunFolder, judged: ProbeRecord, sample: Tensor, working: Session
) -> tuple[MadeOn, Predictor]:
    """Read the other network.

    Args:
        reference: Its run.
        run: The run that is judged.
        judged: Its head.
        sample: A few images, where the networks compute.
        working: The command at work.

    Returns:
        What the examples are made on, in words and as attacks see it.

    Raises:
        CfamcError: Exit 2; there is no such run, it is the one that is judged, or its head knows other classes or
            reads crops.
    """
    from cfamc_cli.commands.probe import ensure_head
    from cfamc_cli.engine.evaluation.predictor import as_predictor
    from cfamc_cli.engine.heads.classifier import load_classifier, load_encoder

    source = find_run(working.options.store, reference)
    if source.path.resolve() == run.path.resolve():
        raise invalid("--source names the run itself: that is no transfer", "name another run, or leave it out")
    require_checkpoint(source, working.options)
    recipe, names = source.recipe(), [entry.name for entry in judged.classes]
    loaded = load_encoder(source.checkpoints, recipe.model, device=working.device, talk=working.talk)
    alike = [
        folder
        for folder, record in finished_probes(source)
        if [entry.name for entry in record.classes] == names
        and (record.head, record.encoder_digest) == (judged.head, loaded.digest)
    ]
    name = working.agreed(alike[-1].name if alike else "")
    folder = source.probes / name if name else ensure_head(source, loaded, working)
    probe = load_record(folder / RECORD, ProbeRecord)
    if [entry.name for entry in probe.classes] != names:
        hint = f"fit one to the same data: cfamc probe {working.options.reference(source)} --data ..."
        raise invalid(f"--source: {folder.name} of {source.id} knows other classes than {judged.id}", hint)
    classifier = load_classifier(loaded, probe, Path(folder / HEAD), recipe)
    if classifier.crops is not None:
        message = f"--source: {folder.name} of {source.id} reads random crops, and examples are made on whole images"
        raise invalid(message, "judge a head that reads the image: --head linear")
    maker = as_predictor(classifier, sample, space="image")
    made_on = MadeOn(run=source.id, probe=probe.id, encoder_digest=probe.encoder_digest, head_digest=probe.head_digest)
    return made_on, maker


def judged_on(target: Predictor, maker: Predictor) -> Predictor:
    """The network that is judged, with attacks that search on another."""
    return replace(target, search=maker.search, embed=maker.embed, modules=(*target.modules, *maker.modules))
