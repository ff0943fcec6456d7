"""What a training run says of itself: records at intervals, the adversary's grip, online evaluation, divergence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cfamc_cli.engine import monitor
from cfamc_cli.engine.adversary import Groups, LossBeside
from cfamc_cli.engine.data.sets import ImageSet, batch, class_balanced_split
from cfamc_cli.engine.device import peak_memory
from cfamc_cli.engine.encoder import Encoder, uncompiled
from cfamc_cli.engine.monitor import Where
from cfamc_cli.engine.objectives import Terms, effective_rank, feature_std
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.engine.sections import section
from cfamc_cli.engine.sink import Ledger, Talk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.plan import duration
from cfamc_cli.recipe.schema import EmpSsl, NoAdversary, Recipe, number
from cfamc_cli.store.records import TimingLine, TrainLine

_SECONDS = 2.0  # at least this long between two words of how far it is, but for records
_PREDICTED_FROM = 5  # batches after the first, on which a prediction rests at least
HELD_OUT = 1000  # training images that the online evaluation asks about


class Diverged(CfamcError):  # noqa: N818 - it names an outcome
    """Training became non-finite; `details` holds step, batch, lr, loss and gradient_norm."""


class Journal:
    """Collects what each update reports, on the device, and reads it once an interval."""

    def __init__(
        self,
        recipe: Recipe,
        data: ImageSet,
        *,
        device: torch.device,
        talk: Talk,
        ledger: Ledger,
        updates: int,
        per_epoch: int,
        share: int,
        before: Where,
        total: int,
    ) -> None:
        """Begin the journal of a phase, in which `step` counts from 0.

        Args:
            recipe: The phase's own.
            data: The training images.
            device: Where they are computed with.
            talk: Who listens.
            ledger: Takes the lines.
            updates: Weight updates of the phase.
            per_epoch: Batches of an epoch.
            share: Images of a batch that every process has at least.
            before: Where in the run the phase begins.
            total: Weight updates of the run.
        """
        self.recipe, self.data, self.device, self.talk, self.ledger = recipe, data, device, talk, ledger
        self.updates, self.per_epoch, self.before, self.total = updates, per_epoch, before, total
        parts = ["invariance", "coding_rate"] if isinstance(recipe.objective, EmpSsl) else []
        self._names = ["lr", "loss", "gradient_norm", *parts]
        self._rows: list[Tensor] = []
        self._eps = 0.0 if isinstance(recipe.adversary, NoAdversary) else number(recipe.adversary.eps)
        steps = recipe.ascent_steps
        self._passes_per_update = (recipe.views + steps * recipe.moved_views) * recipe.train.batch_size
        self._grip_plan = monitor.schedule(updates=updates, batch_size=share, passes_per_update=1 + steps)
        few = self._grip_plan.images
        self._few = slice(few if few < share else None)  # images of a batch; of each process's share, or all of them
        self._shown: dict[str, float | str] = {}  # of the last record
        self._told = time.perf_counter()
        self._accuracy: dict[str, str] = {}  # of the last evaluation, in words
        self._first: tuple[int, float] | None = None  # update and time at the end of this sitting's first batch
        self._evaluation = 0.0  # seconds of the last one
        self._predicted = False
        self._collapsed = False  # whether the last line said so
        self.start(0)

    def start(self, step: int) -> None:
        """Begin to count time, at update `step`."""
        self._since, self._since_step, self._waited = time.perf_counter(), step, 0.0
        self._pauses: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of a CUDA device: began, ended

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time within counts as waiting for data: the host's, or on CUDA the device's, which the next record reads."""
        if self.device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._pauses.append((began, ended))
            return
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @section("records")
    def add(self, terms: Terms, gradient_norm: Tensor, *, lr: float) -> None:
        """Note one weight update, without waiting for the device."""
        loss = terms.loss.detach()
        self._rows.append(torch.stack([torch.full_like(loss, lr), loss, gradient_norm, *terms.parts.values()]))

    def rows(self) -> Tensor:
        """What was noted since the last record, (updates, columns), for a checkpoint."""
        return torch.stack(self._rows) if self._rows else torch.zeros(0, len(self._names), device=self.device)

    def load(self, rows: Tensor) -> None:
        """Go on from a checkpoint's rows.

        Raises:
            ValueError: They are not of a journal.
        """
        if rows.dim() != 2 or rows.shape[1] != len(self._names):
            raise ValueError("another journal's rows")
        self._rows = list(rows.unbind())

    def check_finite(self, *encoders: Encoder, step: int) -> Tensor:
        """Wait for the device and return the rows on the CPU.

        Raises:
            Diverged: A loss or gradient since the last record, or a weight or buffer now, is not finite.
        """
        rows = self.rows().cpu()
        tensors = [tensor for encoder in set(encoders) for tensor in encoder.state_dict().values()]
        state = [tensor for tensor in tensors if tensor.is_floating_point()]
        finite = torch.stack(torch._foreach_norm(state, math.inf)).isfinite()  # the largest of each, or what is none
        bad = (~torch.isfinite(rows[:, 1:3])).any(1).nonzero()
        if len(bad) or not bool(finite.all()):
            at = int(bad[0]) if len(bad) else len(rows) - 1
            where = self.where(step - len(rows) + at)
            update = where["step"]
            lr, loss, norm = rows[at, :3].tolist() if len(rows) else (0.0, float("nan"), float("nan"))
            raise Diverged(
                f"training became non-finite at update {update}: loss {loss:g}, gradient norm {norm:g}, lr {lr:g}",
                hint="nothing of it was saved; lower optimizer.lr, or set train.precision to float32",
                exit_code=ExitCode.DIVERGED,
                details={
                    "step": update,
                    "batch": where["batch"],
                    "lr": lr,
                    "loss": repr(loss),
                    "gradient_norm": repr(norm),
                },
            )
        return rows

    @section("records")
    def after_batch(
        self, encoder: Encoder, z: Tensor, crops: Groups, delta: Groups, loss_beside: LossBeside, *, step: int
    ) -> None:
        """Write the lines of an interval when it is full or the run is, and compare adversaries when that is due.

        Between them it is said now and then how far it is, without waiting for the device.

        Args:
            encoder: To be checked for finite weights and a collapse.
            z: Embeddings of the last update, (V, B, D).
            crops: The batch's clean crops.
            delta: The adversary's perturbations of the last groups.
            loss_beside: The training loss beside clean groups, leaving batch-norm statistics alone.
            step: Weight updates made.

        Raises:
            Diverged: As `check_finite`.
        """
        if self._first is None:
            self._first = step, time.perf_counter()
        full = step // self.recipe.replays % self.recipe.train.log_every == 0 or step == self.updates
        every = self._grip_plan.every if delta else 0
        compared = every > 0 and step // every > (step - self.recipe.replays) // every
        if full or compared:
            rows = self.check_finite(encoder, step=step)
        if full:
            self._write(rows, encoder, z, crops, delta, step=step)
            self._predict(step)
        elif time.perf_counter() > self._told + _SECONDS:
            self._tell(step)
        if compared:
            with uncompiled(encoder):
                self._watch_grip(crops, delta, loss_beside, step=step)

    def _write(self, rows: Tensor, encoder: Encoder, z: Tensor, crops: Groups, delta: Groups, *, step: int) -> None:
        means = dict(zip(self._names, rows.double().mean(0).tolist(), strict=True)) | {"lr": float(rows[-1, 0])}
        where = self.where(step)
        scalars = {"effective_rank": effective_rank(z[-1]), "feature_std": feature_std(z[-1])}
        scalars["representation_std"] = monitor.representation_std(encoder, crops[0].flatten(0, 1)[: monitor.CROPS])
        if delta:
            size = torch.cat([part.abs().flatten() for part in delta])
            at_bound = (size >= 0.999 * self._eps).float().mean()
            scalars |= {"delta_mean": size.mean(), "delta_at_bound": at_bound}
        shape = dict(zip(scalars, torch.stack([*scalars.values()]).tolist(), strict=True))  # read at once
        line = TrainLine.model_validate({**where, **means, **shape})
        self.ledger.metrics(line)
        if line.collapsed and not self._collapsed:
            self.talk.warning(
                f"update {line.step}: the encoder collapsed: effective rank {line.effective_rank:.3g}, feature std "
                f"{line.feature_std:.2g}, of what heads read {line.representation_std:.2g}; lower optimizer.lr, or "
                "weigh what spreads embeddings (objective.tcr_weight)"
            )
        self._collapsed = line.collapsed

        seconds = max(time.perf_counter() - self._since, 1e-9)
        self._waited += sum(began.elapsed_time(ended) for began, ended in self._pauses) / 1000  # all of them are over
        passes = (step - self._since_step) * self._passes_per_update
        rate, share = passes / seconds, self._waited / seconds
        memory = peak_memory(self.device)
        self.ledger.timing(
            TimingLine(**where, views_per_second=rate, data_share=share, seconds=seconds, peak_memory=memory)
        )
        self._shown = {"epoch": where["epoch"], **means, "views/s": rate}
        self._tell(step)
        self._rows = []
        self.start(step)

    def _tell(self, step: int) -> None:
        """Say how far it is, beside what was known at the last record."""
        self._told = time.perf_counter()
        self.talk.progress("train", self.before["step"] + step, self.total, self._shown | self._accuracy)

    def _predict(self, step: int) -> None:
        """Say once what the rest will take, by the batches after the first, in which things are compiled and chosen."""
        assert self._first is not None, "a batch is over"
        (first, began), left = self._first, self.updates - step
        if self._predicted or not left or step - first < _PREDICTED_FROM * self.recipe.replays:
            return
        self._predicted = True
        said = f"about {duration((time.perf_counter() - began) / (step - first) * left)} for the {left:,} updates left"
        said += "" if self.before["phase"] is None else f" of phase {self.before['phase']}"
        if self._evaluation:
            batches, every = self.updates // self.recipe.replays, self.recipe.train.evaluate_every * self.per_epoch
            coming = -(-batches // every) - step // self.recipe.replays // every
            said += f", and {duration(self._evaluation * coming)} for evaluations"
        self.talk.message(said)

    def where(self, step: int) -> Where:
        """The position in the run after `step` updates of the phase."""
        batch, before = step // self.recipe.replays, self.before
        return {
            "step": before["step"] + step,
            "batch": before["batch"] + batch,
            "epoch": before["epoch"] + batch / self.per_epoch,
            "phase": before["phase"],
        }

    @section("monitor")
    def _watch_grip(self, crops: Groups, delta: Groups, loss_beside: LossBeside, *, step: int) -> None:
        cut_crops, cut_delta = ([group[:, self._few] for group in groups] for groups in (crops, delta))
        grip = monitor.measure_grip(loss_beside, cut_crops, cut_delta, eps=self._eps, where=self.where(step))
        self.ledger.metrics(grip)
        if grip.lost:
            self.talk.warning(
                f"update {grip.step}: PGD-{monitor.ATTACK_STEPS} raises the loss by {grip.strongest - grip.clean:.3g}, "
                f"the training adversary only by {grip.trained - grip.clean:.3g}: catastrophic overfitting is likely; "
                "use a smaller adversary.step_size or more steps"
            )

    def evaluate(self, encoder: Encoder, images: Tensor, *, step: int, stop: Callable[[], int]) -> bool:
        """Record the accuracy of cheap heads on training images held out of them, where labels exist.

        Those of `data.holdout` are none of these: nothing of a run under way is known of them.

        Args:
            encoder: To read; its mode is restored.
            images: All training images, wherever they lie.
            step: Weight updates made.
            stop: Asked all the while; what it returns, if not 0, ends the evaluation.

        Returns:
            Whether there is nothing left to evaluate; False where `stop` ended it.

        Raises:
            Diverged: As `check_finite`.
        """
        labels = self.data.labels
        if labels is None or len(self.data.classes) < 2 or int((labels >= 0).sum()) < 2 * HELD_OUT:
            if step == 0:
                self.talk.message(f"no online evaluation: it needs {2 * HELD_OUT:,} labelled images of two classes")
            return True
        began = time.perf_counter()
        self.check_finite(encoder, step=step)
        held_out, others = class_balanced_split(labels, HELD_OUT, seed=self.recipe.seed)
        bank = others[torch.randperm(len(others), generator=addressed_generator("bank", self.recipe.seed))]
        bank = bank[: monitor.BANK]
        adversary, passes = self.recipe.adversary, 1
        task = f"evaluation {'' if step or self.before['step'] else 'of the untrained encoder '}in passes:"

        def tell(done: int, total: int) -> None:
            nonlocal passes
            passes = total
            self.talk.progress(task, min(done, total - 1), total, {})

        line = monitor.evaluate(
            encoder,
            batch(images, bank, device=self.device),
            labels[bank],
            batch(images, held_out, device=self.device),
            labels[held_out],
            classes=len(self.data.classes),
            eps="8/255" if isinstance(adversary, NoAdversary) else adversary.eps,
            device=self.device,
            stop=stop,
            each=tell,
            where=self.where(step),
        )
        self._evaluation = time.perf_counter() - began
        self._since += self._evaluation  # no part of the rate of training
        if self._first is not None:
            self._first = self._first[0], self._first[1] + self._evaluation
        if line is None:
            return False
        self.ledger.metrics(line)
        self._accuracy = line.shown()
        self.talk.progress(task, passes, passes, self._accuracy)
        return True
