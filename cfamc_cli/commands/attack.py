"""`cfamc attack`: how much of a classifier's accuracy stands under attack, and whether that number can be trusted.

The engine attacks and audits; this finds run, head and samples, keeps the ledger so that an evaluation can be cut and
taken up again, and says what came out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfamc_cli.commands.attack_records import RECORD, Gallery, Ledger, key_of, open_ledger
from cfamc_cli.commands.attack_report import (
    NOT_AUDITED,
    Result,
    curves,
    draw_accuracy,
    draw_loss,
    lacks_audit,
    tell,
)
from cfamc_cli.commands.attack_settings import Flags, Space, asked_attacks, check_flags, invalid
from cfamc_cli.commands.common import Options, Session, interruption, session
from cfamc_cli.errors import CfamcError, ExitCode, missing_library
from cfamc_cli.files import write_bytes
from cfamc_cli.recipe import Attack, Recipe, number
from cfamc_cli.records import (
    Accuracy,
    AttackRecord,
    ClassRobustness,
    Flag,
    Outcomes,
    ProbeRecord,
    ThreatModel,
    capture_environment,
    load_record,
    now,
    save_record,
    unpack_bits,
)
from cfamc_cli.store import HEAD, LATEST, RunFolder, default_store, find_run

if TYPE_CHECKING:
    from torch import Tensor

    from cfamc_cli.engine.robust import Evaluation, Examples, Outcome

_PLOTTED = 64  # samples of the loss curve
_MAX_CROPPED = 4 * 2**30  # bytes of crops that are held at once


def attack(reference: str | None, *, flags: Flags, options: Options) -> None:
    """Evaluate a run under attack, or go on with an evaluation that was cut.

    Args:
        reference: The run; the newest with a checkpoint for None.
        flags: What to evaluate.
        options: Where and how.

    Raises:
        CfamcError: With the exit code of its cause; 5 where a check failed under --strict, 130 or 143 where a signal
            ended the work.
    """
    check_flags(flags)
    if flags.plot and find_spec("matplotlib") is None:
        raise missing_library("--plot needs matplotlib", extra="plots")
    run = find_run(default_store(options.runs), reference or LATEST, accept=_has_checkpoint)
    if not _has_checkpoint(run):
        raise CfamcError(
            f"run {run.id} has no checkpoint to attack yet",
            hint=f"go on with: cfamc pretrain --resume {run.id}",
            exit_code=ExitCode.BAD_DATA,
        )
    recipe, status = run.recipe(), run.record().status
    asked = asked_attacks(flags, recipe)
    message, again = "interrupted; every finished stage is kept", "go on with the same command"
    with session(options) as working, interruption(message=message, hint=lambda: again):
        if status != "finished":
            working.talk.warning(f"run {run.id} is not finished but {status}: attacking its newest checkpoint")
        work = _Work(run, recipe, flags, working)
        results = work.all(asked)
        drawn = work.plots(results) if flags.plot else []
    tell(run, results, drawn, strict=flags.strict, options=options)


def _has_checkpoint(run: RunFolder) -> bool:
    return run.checkpoints.is_dir() and any(path.name.startswith("step-") for path in run.checkpoints.iterdir())


class _Work:
    """The evaluations of one command: run, head and samples are the same in all of them."""

    def __init__(self, run: RunFolder, recipe: Recipe, flags: Flags, working: Session) -> None:
        self.run, self.recipe, self.flags, self.working = run, recipe, flags, working
        self.talk = working.talk
        self.space: Space = "crops" if flags.space == "crops" else "image"

    def all(self, asked: Sequence[Attack]) -> list[Result]:
        """Make every evaluation that is asked for."""
        from cfamc_cli.engine.device import out_of_memory

        with out_of_memory(hint="lower --limit, or choose another --device; what is finished is kept"):
            self._prepare()
            return [self._evaluate(table) for table in asked]

    def _prepare(self) -> None:
        """Head, classifier and samples."""
        from cfamc_cli.commands.probe import ensure_head, load_encoder, load_test_images

        loaded = load_encoder(self.run, self.recipe, self.working)
        folder = ensure_head(self.run, loaded, self.working, probe=self.flags.head)
        self.probe = load_record(folder / RECORD, ProbeRecord)
        if self.space == "crops" and self.probe.head != "crops":
            raise invalid(
                f"--space crops attacks the crops of an aggregated head, and {folder.name} reads whole images",
                f"name one with --head, or fit one with: cfamc probe {self.run.id} --head crops",
            )

        from cfamc_cli.engine.attacked import as_predictor
        from cfamc_cli.engine.heads import load_classifier
        from cfamc_cli.engine.randomness import balanced_order
        from cfamc_cli.engine.robust import BLOCK

        self.device = self.working.device
        self.classifier = load_classifier(loaded, self.probe, folder / HEAD, self.recipe)
        data = load_test_images(self.run, self.probe, talk=self.talk)
        labels = data.require_labels()
        self.data = data
        self.n = len(data) if self.flags.limit is None else self.flags.limit
        if self.n > len(data):
            raise invalid(f"--limit: {self.n:,} is more than the {len(data):,} test images of {data.dataset}")
        order = balanced_order(labels, "balanced order", data.fingerprint)
        self.order_digest = hashlib.sha256(order.numpy().tobytes()).hexdigest()
        self.chosen = order[: self.n]
        self.block = BLOCK
        self.y = labels[self.chosen]
        self.x = data.images[self.chosen].float() / 255
        if self.space == "crops":
            self.x = self._cropped()
        self.target = as_predictor(self.classifier, self.x[:8].to(self.device), space=self.space)

    def _cropped(self) -> Tensor:
        """The crops of each image, stacked in its channels: (N, n 3, S, S)."""
        import torch

        from cfamc_cli.engine.attacked import stacked_crops

        source = self.classifier.crops
        assert source is not None, "the head was seen to read crops"
        needed = 12 * self.n * source.group.count * source.group.size**2
        if needed > _MAX_CROPPED:
            fits = self.n * _MAX_CROPPED // needed
            raise invalid(f"--space crops: {needed / 2**30:.0f} GiB of crops do not fit", f"say --limit {fits}")
        parts = zip(torch.split(self.x, 256), torch.split(self.chosen, 256), strict=True)
        return torch.cat([stacked_crops(self.classifier, images, indices) for images, indices in parts])

    def _evaluate(self, table: Attack) -> Result:
        """One evaluation: from its ledger to its record."""
        from cfamc_cli.engine.attacks.audit import AuditSettings
        from cfamc_cli.engine.attacks.autoattack import plan
        from cfamc_cli.engine.robust import evaluate

        planned = plan(table, classes=len(self.probe.classes))
        name = table.name if self.space == "image" else f"{table.name}-crops"
        threat = ThreatModel(space=self.space, norm=table.norm, eps=table.eps)
        label = f"{name} {threat.norm} {threat.eps}"
        settings = table.model_dump(mode="json")
        with closing(open_ledger(self.run, name, self._empty(name, threat, settings), talk=self.talk)) as ledger:
            gallery = Gallery(ledger, self.flags.save_examples or 0)
            record = ledger.record()
            audited = record is not None and not lacks_audit(record)
            if record is not None and (audited or not self.flags.audit) and not gallery.missing():
                self.talk.message(f"{label}: finished on {record.created:%Y-%m-%d %H:%M} UTC as {record.id}")
            else:
                if done := len(ledger.outcomes):
                    self.talk.message(f"{label}: goes on from {done} finished stages in {ledger.folder.name}")

                def commit(outcome: Outcome, examples: Examples) -> None:
                    gallery.add(outcome, examples)
                    ledger.commit(outcome)

                evaluation = evaluate(
                    self.target,
                    self.x,
                    self.y,
                    plan=planned,
                    seed=self.recipe.seed,
                    block_size=self.block,
                    device=self.device,
                    finished=gallery.finished(),
                    commit=commit,
                    audit=AuditSettings() if self.flags.audit or audited else None,
                    label=label,
                    talk=self.talk,
                )
                record = self._record(ledger.folder.name, name, threat, settings, evaluation, planned.notes)
                save_record(ledger.folder / RECORD, record)
            if self.flags.save_examples:
                self._draw_examples(ledger, gallery, record)
            stored = ledger.as_record()
        last = stored.stages[-1].robust if stored.stages else stored.clean
        clean, robust = (tuple(unpack_bits(mask, self.n)) for mask in (stored.clean, last))
        return Result(self.run.attacks / record.id, record, clean, robust)

    def _empty(self, name: str, threat: ThreatModel, settings: Mapping[str, object]) -> Outcomes:
        """outcomes.json before the first outcome; its key is of all that they depend on but their number."""
        key = key_of(
            {
                "schema": 1,
                "encoder": self.probe.encoder_digest,
                "head": self.probe.head_digest,
                "head_settings": self.probe.settings,
                "features": self.probe.features,
                "data": self.data.fingerprint,
                "order": self.order_digest,
                "threat": threat.model_dump(),
                "attack": name,
                "settings": settings,
                "seed": self.recipe.seed,
                "block": self.block,
            }
        )
        return Outcomes(
            n=self.n,
            block=self.block,
            order_digest=self.order_digest,
            data_fingerprint=self.data.fingerprint,
            done=0,
            clean="",
            stages=(),
            key=key,
        )

    def _record(
        self,
        item: str,
        name: str,
        threat: ThreatModel,
        settings: dict[str, Any],
        evaluation: Evaluation,
        notes: tuple[str, ...],
    ) -> AttackRecord:
        from cfamc_cli.engine.device import describe

        totals, flags, probe = evaluation.totals(), evaluation.checks, self.probe
        if not any(flag.name == "eps-one" or flag.name == NOT_AUDITED for flag in flags):
            text = "not asked for: --audit"
            flags += (Flag(name=NOT_AUDITED, figure=None, limit=None, verdict="skipped", text=text),)
        return AttackRecord(
            id=item,
            run=self.run.id,
            probe=probe.id,
            created=now(),
            recipe_digest=self.recipe.digest(),
            seed=self.recipe.seed,
            head=probe.head,
            features=probe.features,
            threat=threat,
            attack=name,
            settings=settings,
            data=probe.test.model_copy(update={"n": self.n}),
            subset=self._subset(),
            notes=(*notes, *self._notes()),
            order_digest=self.order_digest,
            encoder_digest=probe.encoder_digest,
            head_digest=probe.head_digest,
            clean=Accuracy.of(sum(evaluation.clean), self.n),
            robust=Accuracy.of(sum(evaluation.robust), self.n),
            classes=self._by_class(evaluation.clean, evaluation.robust),
            stages=totals,
            flags=flags,
            forward=sum(total.forward for total in totals),
            backward=sum(total.backward for total in totals),
            wall_seconds=sum(total.wall_seconds for total in totals),
            environment=capture_environment(describe(self.device)),
        )

    def _subset(self) -> str:
        if self.n == len(self.data):
            return f"all {self.n} test images"
        return f"the first {self.n} of {len(self.data)} test images in an order balanced by class, fixed by the data"

    def _notes(self) -> tuple[str, ...]:
        if self.probe.head != "crops":
            return ()
        if self.space == "crops":
            return ("each crop is perturbed by itself: not comparable with a perturbed image",)
        return ("every image is read through the same fixed crops, those of test image 0, and attacked through them",)

    def _by_class(self, clean: Sequence[bool], robust: Sequence[bool]) -> tuple[ClassRobustness, ...]:
        rows: list[tuple[int, bool, bool]] = list(zip(self.y.tolist(), clean, robust, strict=True))
        found = []
        for label, name in enumerate(self.data.classes):
            right = [c for own, c, _ in rows if own == label]
            stood = [r for own, _, r in rows if own == label]
            n = len(right)
            found.append(
                ClassRobustness(
                    name=name,
                    clean=Accuracy.of(sum(right), n) if n else None,
                    robust=Accuracy.of(sum(stood), n) if n else None,
                )
            )
        return tuple(found)

    def _draw_examples(self, ledger: Ledger, gallery: Gallery, record: AttackRecord) -> None:
        from cfamc_cli.engine.pictures import Shown, sheet

        shown = gallery.shown()
        if not shown:
            self.talk.warning("no sample was broken: there is no example to draw")
            return
        names, eps = self.data.classes, number(record.threat.eps)
        samples = [
            Shown(
                clean=self.x[place],
                adversarial=image,
                title=f"test {int(self.chosen[place])}",
                label=names[int(self.y[place])],
                predicted=names[label],
            )
            for place, image, label in shown
        ]
        largest = max(float((s.adversarial - s.clean).abs().max()) for s in samples)
        gain = 0.5 / (eps if record.threat.norm == "linf" and eps > 0 else max(largest, 1e-6))
        threat = f"{record.attack} {record.threat.norm} eps {record.threat.eps}"
        heading = [
            f"{self.run.id}  {record.probe}  {threat}",
            f"clean | adversarial | difference x {gain:.3g} around grey",
        ]
        path = ledger.folder / "examples.png"
        write_bytes(path, sheet(samples, heading=heading, gain=gain))
        asked = self.flags.save_examples or 0
        fewer = f" (no more were broken than {len(samples)})" if len(samples) < asked else ""
        self.talk.message(f"{len(samples)} examples{fewer}: {path}")

    def plots(self, results: Sequence[Result]) -> list[Path]:
        """Draw loss against steps for each evaluation, and accuracy against eps once."""
        from cfamc_cli.engine.attacks.verify import undisturbed
        from cfamc_cli.engine.pictures import loss_by_step

        paths = []
        for result in results:
            record, eps = result.record, number(result.record.threat.eps)
            steps, size = record.settings.get("steps"), record.settings.get("step_size")
            count = steps if isinstance(steps, int) and isinstance(size, str) else 20
            length = number(size) if isinstance(size, str) else 2.5 * eps / count
            rows = [place for place, right in enumerate(result.clean) if right][:_PLOTTED]
            if not rows:
                self.talk.warning(f"{record.id}: no sample is classified right, so there is no loss to draw")
                continue
            x, y = self.x[rows].to(self.device), self.y[rows].to(self.device)
            with undisturbed(self.target.modules, self.device):
                losses, right = loss_by_step(
                    self.target.search, x, y, eps=eps, norm=record.threat.norm, step_size=length, steps=count
                )
            title = (
                f"PGD {record.threat.norm} {record.threat.eps}, step {length:.3g}, {len(rows)} samples right at first"
            )
            path = result.folder / "loss.png"
            write_bytes(path, draw_loss(losses, right, title=title))
            paths.append(path)
        for group in curves(results):
            path = group[-1].result.folder / "accuracy.png"
            write_bytes(path, draw_accuracy(group))
            paths.append(path)
        return paths
