"""`cfamc attack`: how much of a classifier's accuracy stands under attack, and whether that number can be trusted.

The engine attacks and audits; this finds run, head and samples, keeps the ledger so that an evaluation can be cut and
taken up again, and says what came out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from cfamc_cli.commands.attack_report import NOT_AUDITED, Result, curves, draw_accuracy, draw_loss, draw_surface, tell
from cfamc_cli.commands.attack_settings import Flags, asked_attacks, asked_measure, check_flags, require_reach
from cfamc_cli.commands.common import SAME_COMMAND, Options, Session, interruption, require_checkpoint, session
from cfamc_cli.commands.measure import Subject, measured
from cfamc_cli.commands.transfer import audits, from_source, judged_on, require_transferable
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import invalid
from cfamc_cli.recipe.schema import Attack, EmbeddingAttack, Norm, PgdAttack, Recipe, number
from cfamc_cli.report.audit import lacks_audit
from cfamc_cli.report.plots import require_plots
from cfamc_cli.store.environment import capture_environment
from cfamc_cli.store.files import write_bytes
from cfamc_cli.store.outcomes import Ledger, key_of, open_ledger
from cfamc_cli.store.records import (
    Accuracy,
    AttackRecord,
    ClassRobustness,
    Environment,
    MadeOn,
    Outcome,
    Outcomes,
    ProbeRecord,
    Space,
    ThreatModel,
    images_of,
    load_record,
    now,
    save_record,
)
from cfamc_cli.store.runs import ACCURACY, EXAMPLES, HEAD, LATEST, LOSS, RECORD, SHEET, SURFACE, RunFolder, find_run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cfamc_cli.engine.attacks.plan import Plan
    from cfamc_cli.engine.attacks.search import Predict
    from cfamc_cli.engine.evaluation.blocks import Commit, Evaluation, Examples
    from cfamc_cli.engine.evaluation.examples import Gallery
    from cfamc_cli.engine.evaluation.predictor import CropsOfImages
    from cfamc_cli.engine.evaluation.verify import Predictor

_PLOTTED = 64  # samples of the loss curve
_SURFACED = 8  # samples of the loss surface: of more, what is jagged evens out
_AUDITED, _PLAIN = "audited", "plain"  # what the leading process tells the others to make; nothing where all is there
_MAX_CROPPED = 4 * 2**30  # bytes of crops that are held at once


def attack(reference: str | None, *, flags: Flags, options: Options) -> None:
    """Evaluate a run under attack, or go on with an evaluation that was cut.

    Args:
        reference: The run; the newest with a checkpoint for None.
        flags: What to evaluate.
        options: Where and how.

    Raises:
        CfamcError: With the exit code of its cause; 5 where a check failed under --strict; 129, 130, 138 or 143 where
            a signal ended the work.
    """
    check_flags(flags)
    if flags.plot:
        require_plots()
    run = find_run(options.store, LATEST if reference is None else reference, accept=RunFolder.has_checkpoint)
    require_checkpoint(run, options)
    recipe, status = run.recipe(), run.record().status
    measure = asked_measure(flags)
    asked = asked_attacks(flags, recipe) if measure is None else ()
    if flags.source is not None:
        require_transferable(flags, asked, measure=measure is not None)
    if flags.strict:
        require_reach(asked)
    message, again = "interrupted; every finished stage is kept", "go on with the same command"
    with session(options) as working, interruption(message=message, hint=lambda: again):
        from cfamc_cli.engine.device import has_tf32, out_of_memory
        from cfamc_cli.engine.distributed import peers

        if any(table.search_precision == "tf32" for table in asked) and not has_tf32(working.device):
            raise invalid(f"search_precision: {working.device} has no tf32", "leave it at float32")

        if status != "finished":
            working.talk.warning(f"run {run.id} is not finished but {status}: attacking its newest checkpoint")
        lower = "lower --limit, or choose another --device; what is finished is kept"
        with peers(working.world, hint=SAME_COMMAND), out_of_memory(hint=lower):
            work = Work(run, recipe, flags, working)
            if measure is not None:
                measured(work.subject(), measure, options)
                return
            if not working.world.leads:
                for table in asked:
                    work.assist(table)
                return
            results = [work.evaluate(table) for table in asked]
            drawn = work.plots(asked, results) if flags.plot else []
    tell(run, results, drawn, strict=flags.strict, options=options)


def _from_files(
    run: RunFolder, recipe: Recipe, probe: ProbeRecord, space: Space, places: CropsOfImages | None, device: torch.device
) -> Predict:
    """The logits of a run's encoder and head."""
    from cfamc_cli.engine.evaluation.predictor import network_of
    from cfamc_cli.engine.heads.classifier import load_classifier, load_encoder

    loaded = load_encoder(run.checkpoints, recipe.model, device=device, talk=NullTalk())
    classifier = load_classifier(loaded, probe, run.probes / probe.id / HEAD, recipe)
    return network_of(classifier, space=space, places=places)


class Work:
    """The evaluations and measures of one command: run, head and samples are the same in all of them."""

    def __init__(self, run: RunFolder, recipe: Recipe, flags: Flags, working: Session) -> None:
        from cfamc_cli.commands.probe import ensure_head, load_attacked_images
        from cfamc_cli.engine.distributed import first_on_each_node
        from cfamc_cli.engine.heads.classifier import load_classifier, load_encoder
        from cfamc_cli.engine.randomness import balanced_order

        self.run, self.recipe, self.flags = run, recipe, flags
        self.talk, self.device, self.world = working.talk, working.device, working.world
        self.space: Space = "crops" if flags.space == "crops" else "image"
        loaded = load_encoder(run.checkpoints, recipe.model, device=self.device, talk=self.talk)
        folder = ensure_head(run, loaded, working, probe=flags.head, split=flags.split)
        self.probe = load_record(folder / RECORD, ProbeRecord)
        if self.space == "crops" and self.probe.head != "crops":
            raise invalid(
                f"--space crops attacks the crops of an aggregated head, and {folder.name} reads whole images",
                f"name one with --head, or fit one with: cfamc probe {working.options.reference(run)} --head crops",
            )
        self.classifier = load_classifier(loaded, self.probe, folder / HEAD, recipe)
        attacked = partial(load_attacked_images, run, self.probe, split=flags.split, talk=self.talk)
        self.data = first_on_each_node(attacked, self.world)
        self.images = images_of(self.data.split)
        self.n = len(self.data) if flags.limit is None else flags.limit
        if self.n > len(self.data):
            what = f"{self.images} of {self.data.dataset}"
            raise invalid(f"--limit: {self.n:,} is more than the {len(self.data):,} {what}")
        labels = self.data.require_labels()
        order = balanced_order(labels, "balanced order", self.data.fingerprint)
        self.order_digest = hashlib.sha256(order.numpy().tobytes()).hexdigest()
        self.chosen = order[: self.n]
        self.x, self.y = self.data.images[self.chosen].float() / 255, labels[self.chosen]
        if self.space == "crops":
            self.x = self._cropped()
        self.source: MadeOn | None = None
        self.maker: Predictor | None = None  # what examples are made on, where that is another network
        self.others: dict[str, Predict] = {}  # what the audit makes examples on, beside
        if flags.source is not None:
            made_on, maker = from_source(flags.source, run, self.probe, self.x[:8].to(self.device), working)
            if audits(flags):
                self.others[made_on.run] = maker.logits
            else:
                self.source, self.maker = made_on, maker
        self.own_crops = self.classifier.crops is not None and self.space == "image"
        self._places: dict[tuple[str, str], CropsOfImages] = {}

    def places(self, norm: Norm, eps: str) -> CropsOfImages | None:
        """Whose crops an image is read through, for an attacker of that reach; None where the head reads none of it."""
        from cfamc_cli.engine.evaluation.predictor import CropsOfImages

        if self.own_crops and (norm, eps) not in self._places:
            x = self.x.to(self.device)
            self._places[norm, eps] = CropsOfImages(x, self.chosen, eps=number(eps), norm=norm)
        return self._places.get((norm, eps))

    def target(self, norm: Norm = "linf", eps: str = "0") -> Predictor:
        """What an attacker of that reach attacks."""
        from cfamc_cli.engine.evaluation.predictor import as_predictor

        sample = self.x[:8].to(self.device)
        own = as_predictor(self.classifier, sample, space=self.space, places=self.places(norm, eps))
        return own if self.maker is None else judged_on(own, self.maker)

    def _cropped(self) -> Tensor:
        """The crops of each image, stacked in its channels: (N, n 3, S, S)."""
        import torch

        from cfamc_cli.engine.evaluation.predictor import stacked_crops

        assert self.classifier.crops is not None, "the head was seen to read crops"
        group = self.classifier.crops.group
        needed = 12 * self.n * group.count * group.size**2
        if needed > _MAX_CROPPED:
            fits = self.n * _MAX_CROPPED // needed
            raise invalid(f"--space crops: {needed / 2**30:.0f} GiB of crops do not fit", f"say --limit {fits}")
        parts = zip(self.x.split(256), self.chosen.split(256), strict=True)
        return torch.cat([stacked_crops(self.classifier, images, indices) for images, indices in parts])

    def subject(self) -> Subject:
        """What a measure needs to know.

        Raises:
            CfamcError: Exit 2; the head reads no whole images.
        """
        if self.own_crops:
            raise invalid(f"--attack {self.flags.attack} needs a head that reads whole images", "name one with --head")
        return Subject(
            run=self.run,
            recipe=self.recipe,
            probe=self.probe,
            predictor=self.target(),
            data=self.data,
            chosen=self.chosen,
            order_digest=self.order_digest,
            x=self.x,
            y=self.y,
            corruptions=self.flags.corruptions,
            strict=self.flags.strict,
            plot=self.flags.plot,
            device=self.device,
            environment=self.environment(),
            talk=self.talk,
            world=self.world,
        )

    def evaluate(self, table: Attack) -> Result:
        """Make one evaluation, or what is left of it: from its ledger to its record."""
        from cfamc_cli.engine.distributed import told
        from cfamc_cli.engine.evaluation.blocks import BLOCK, Evaluation
        from cfamc_cli.engine.evaluation.examples import Gallery

        label = self._label(table)
        empty, wanted = self._empty(table, BLOCK), self.flags.save_examples or 0
        with open_ledger(self.run, self._name(table), empty, warn=self.talk.warning) as ledger:
            path = ledger.folder / EXAMPLES
            gallery = Gallery(path, ledger.outcomes, block_size=BLOCK, wanted=wanted)
            record, again = ledger.record(), gallery.missing()
            audited = record is not None and not lacks_audit(record, source="".join(self.others))
            wanted_audit = audits(self.flags)
            if record is not None and (audited or not wanted_audit) and not again:
                told("", self.world)
                self.talk.message(f"{label}: finished on {record.created:%Y-%m-%d %H:%M} UTC as {record.id}")
            else:
                if done := len(ledger.outcomes):
                    self.talk.message(f"{label}: goes on from {done} finished stages in {ledger.folder.name}")

                def commit(outcome: Outcome, examples: Examples) -> None:
                    gallery.add(outcome, examples)
                    ledger.commit(outcome)

                audit = wanted_audit or audited
                told(_AUDITED if audit else _PLAIN, self.world)
                planned = self._plan(table)
                finished = [outcome for place, outcome in ledger.outcomes.items() if place not in again]
                evaluation = self._evaluate(table, planned, finished, commit, audit=audit)
                if not audit:
                    evaluation = Evaluation(evaluation.outcomes, (*evaluation.checks, NOT_AUDITED))
                record = self._record(table, ledger.folder.name, evaluation, planned.notes)
                save_record(ledger.folder / RECORD, record)
            if wanted:
                self._draw_examples(ledger, gallery, record)
            known = Evaluation(tuple(ledger.in_order()), ())
        return Result(ledger.folder, record, known.clean, known.robust)

    def assist(self, table: Attack) -> None:
        """Take part in an evaluation that the leading process makes and keeps."""
        from cfamc_cli.engine.distributed import told

        if asked := told("", self.world):
            self._evaluate(table, self._plan(table), (), lambda _outcome, _examples: None, audit=asked == _AUDITED)

    def _evaluate(
        self, table: Attack, planned: Plan, finished: Sequence[Outcome], commit: Commit, *, audit: bool
    ) -> Evaluation:
        from cfamc_cli.engine.evaluation.audit import AuditSettings
        from cfamc_cli.engine.evaluation.blocks import BLOCK, evaluate

        return evaluate(
            self.target(table.norm, table.eps),
            self.x,
            self.y,
            plan=planned,
            seed=self.recipe.seed,
            block_size=BLOCK,
            device=self.device,
            finished=finished,
            commit=commit,
            audit=replace(AuditSettings(), anew=self._anew(table), sources=self.others) if audit else None,
            label=self._label(table),
            talk=self.talk,
            world=self.world,
        )

    def _anew(self, table: Attack) -> Callable[[], Predict]:
        """Makes what is attacked from its files, in another process too."""
        places = self.places(table.norm, table.eps)
        return partial(_from_files, self.run, self.recipe, self.probe, self.space, places, self.device)

    def _plan(self, table: Attack) -> Plan:
        from cfamc_cli.engine.attacks.plan import plan

        return replace(plan(table, classes=len(self.probe.classes)), onward=self.source is not None)

    def _label(self, table: Attack) -> str:
        return f"{self._name(table)} {table.norm} {table.eps}"

    def _name(self, table: Attack) -> str:
        kind = "-transfer" if self.source is not None else "-crops" if self.space == "crops" else ""
        return table.name + kind

    def _threat(self, table: Attack) -> ThreatModel:
        return ThreatModel(space=self.space, norm=table.norm, eps=table.eps)

    def _settings(self, table: Attack) -> dict[str, JsonValue]:
        """Those of the attack; an aggregated head was once read through the crops of one image alone."""
        return table.model_dump(mode="json") | ({"crops": "of each image"} if self.own_crops else {})

    def _empty(self, table: Attack, block: int) -> Outcomes:
        """outcomes.json before the first outcome; its key is of all that they depend on but their number."""
        key = {
            "schema": 1,
            "encoder": self.probe.encoder_digest,
            "head": self.probe.head_digest,
            "head_settings": self.probe.settings,
            "features": self.probe.features,
            "data": self.data.fingerprint,
            "order": self.order_digest,
            "threat": self._threat(table).model_dump(),
            "attack": self._name(table),
            "settings": self._settings(table),
            "seed": self.recipe.seed,
            "block": block,
        }
        if self.source is not None:  # without one the key is that of older evaluations
            key["source"] = self.source.model_dump(exclude={"run", "probe"})
        return Outcomes(
            n=self.n,
            block=block,
            order_digest=self.order_digest,
            data_fingerprint=self.data.fingerprint,
            done=0,
            clean="",
            stages=(),
            key=key_of(key),
        )

    def _record(self, table: Attack, item: str, evaluation: Evaluation, notes: tuple[str, ...]) -> AttackRecord:
        whole, probe, totals = len(self.data), self.probe, evaluation.totals()
        subset = f"the first {self.n} of {whole} {self.images} in an order balanced by class, fixed by the data"
        if self.source is not None:
            made_on = f"{self.source.run}, head {self.source.probe}"
            notes += (f"examples were made on {made_on}: a transfer, which no white-box number is comparable with",)
        if self.space == "crops":
            notes += ("each crop is perturbed by itself: not comparable with a perturbed image",)
        elif places := self.places(table.norm, table.eps):
            notes += (f"every image is read through its own fixed crops and attacked through them; {places.shared} "
                      "read those of another, which lies within twice eps",)  # fmt: skip

        def share(bits: Sequence[bool], label: int) -> Accuracy | None:
            own = [bit for bit, of in zip(bits, self.y.tolist(), strict=True) if of == label]
            return Accuracy.of(sum(own), len(own)) if own else None

        if table.search_precision == "tf32":
            again = sum(outcome.again for outcome in evaluation.outcomes)
            notes += (
                f"searched in TF32; {again} samples whose example float32 did not confirm were attacked again in it",
            )
        clean, robust = evaluation.clean, evaluation.robust
        return AttackRecord(
            id=item,
            run=self.run.id,
            probe=probe.id,
            created=now(),
            recipe_digest=self.recipe.digest(),
            seed=self.recipe.seed,
            head=probe.head,
            features=probe.features,
            threat=self._threat(table),
            attack=self._name(table),
            settings=self._settings(table),
            data=self.data.used().model_copy(update={"n": self.n}),
            subset=f"all {self.n} {self.images}" if self.n == whole else subset,
            notes=notes,
            order_digest=self.order_digest,
            encoder_digest=probe.encoder_digest,
            head_digest=probe.head_digest,
            source=self.source,
            clean=Accuracy.of(sum(clean), self.n),
            robust=Accuracy.of(sum(robust), self.n),
            classes=tuple(
                ClassRobustness(name=name, clean=share(clean, label), robust=share(robust, label))
                for label, name in enumerate(self.data.classes)
            ),
            stages=totals,
            flags=evaluation.checks,
            forward=sum(total.forward for total in totals),
            backward=sum(total.backward for total in totals),
            wall_seconds=sum(total.wall_seconds for total in totals),
            environment=self.environment(),
        )

    def environment(self) -> Environment:
        """Where and how results are computed."""
        from cfamc_cli.engine.device import computation, describe

        return capture_environment(describe(self.device), computation(self.device, precision="float32"))

    def _draw_examples(self, ledger: Ledger, gallery: Gallery, record: AttackRecord) -> None:
        from cfamc_cli.engine.evaluation.pictures import Shown, sheet

        names, threat = self.data.classes, record.threat
        samples = [
            Shown(
                clean=self.x[place],
                adversarial=image,
                title=f"{self.data.split} {int(self.chosen[place])}",
                label=names[int(self.y[place])],
                predicted=names[label],
            )
            for place, image, label in gallery.shown()
        ]
        if not samples:
            self.talk.warning("no sample was broken: there is no example to draw")
            return
        largest = max(float((sample.adversarial - sample.clean).abs().max()) for sample in samples)
        gain = 0.5 / max(number(threat.eps) if threat.norm == "linf" else largest, 1e-6)
        heading = [
            f"{self.run.id}  {record.probe}  {record.attack} {threat.norm} eps {threat.eps}",
            f"clean | adversarial | difference x {gain:.3g} around grey",
        ]
        path = ledger.folder / SHEET
        write_bytes(path, sheet(samples, heading=heading, gain=gain))
        fewer = len(samples) < (self.flags.save_examples or 0)
        note = f" (no more were broken than {len(samples)})" if fewer else ""
        self.talk.message(f"{len(samples)} examples{note}: {path}")

    def plots(self, asked: Sequence[Attack], results: Sequence[Result]) -> list[Path]:
        """Draw loss against steps for each evaluation, around images where that is looked into, and accuracy by eps."""
        from cfamc_cli.engine.evaluation.pictures import REACH, loss_by_step, loss_surface
        from cfamc_cli.engine.evaluation.verify import undisturbed
        from cfamc_cli.engine.randomness import addressed_generator

        drawn: dict[Path, bytes] = {}
        for table, result in zip(asked, results, strict=True):
            eps, steps, step_size = number(table.eps), 20, 2.5 * number(table.eps) / 20
            if isinstance(table, PgdAttack | EmbeddingAttack):
                steps, step_size = table.steps, number(table.step_size)
            rows = [place for place, right in enumerate(result.clean) if right][:_PLOTTED]
            if not rows:
                self.talk.warning(f"{result.record.id}: no sample is classified right, so there is no loss to draw")
                continue
            x, y = self.x[rows].to(self.device), self.y[rows].to(self.device)
            target = self.target(table.norm, table.eps)
            with undisturbed(target.modules, self.device):
                losses, right = loss_by_step(
                    target.search, x, y, eps=eps, norm=table.norm, step_size=step_size, steps=steps
                )
            title = f"PGD {table.norm} {table.eps}, step {step_size:.3g}, {len(rows)} samples right at first"
            drawn[result.folder / LOSS] = draw_loss(losses, right, title=title)
            if eps and (result.failed or audits(self.flags)):
                few = slice(_SURFACED)
                generator = addressed_generator("surface", self.recipe.seed)
                with undisturbed(target.modules, self.device):
                    seen = loss_surface(target.search, x[few], y[few], eps=eps, norm=table.norm, generator=generator)
                title = f"Loss around {len(x[few])} images, {table.norm} {table.eps}"
                drawn[result.folder / SURFACE] = draw_surface(seen, REACH, title=title)
        for group in curves(results):
            drawn[group[-1].folder / ACCURACY] = draw_accuracy(group)
        for path, picture in drawn.items():
            write_bytes(path, picture)
        return list(drawn)
