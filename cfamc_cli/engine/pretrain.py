"""The loop that trains every system: objective x adversary x crops.

CF-AMC-SSL (arXiv:2501.03507) is emp-ssl x free x 16 crops. Symbols: V crops per image, B images per batch, D embedding
dimension, m replays of a batch. A weight update is one replay; `step` counts them, `batch` counts batches.
The loop never waits for the device between two log intervals: what it reports stays there until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cfamc_cli.engine import checkpoint as checkpoints
from cfamc_cli.engine.adversary import Groups, LossOf, build_adversary
from cfamc_cli.engine.average import Average
from cfamc_cli.engine.batch_norm import synchronise
from cfamc_cli.engine.checkpoint import Checkpoint
from cfamc_cli.engine.clusters import cluster
from cfamc_cli.engine.crops import cut, sample_parameters
from cfamc_cli.engine.data.sets import ImageSet, to_device
from cfamc_cli.engine.data.sets import batch as gather
from cfamc_cli.engine.device import autocast, computation, move_together, pick_compile, pick_precision, prepare
from cfamc_cli.engine.distributed import Agreement, GradientSum, World, gather_embeddings, gather_images
from cfamc_cli.engine.encoder import build_encoder, frozen_statistics
from cfamc_cli.engine.heads.frozen import extract_features
from cfamc_cli.engine.journal import Journal
from cfamc_cli.engine.monitor import Where
from cfamc_cli.engine.objectives import Terms, objective_loss
from cfamc_cli.engine.optim import build_optimizer, learning_rate
from cfamc_cli.engine.prefetch import Prefetch
from cfamc_cli.engine.randomness import addressed_generator, epoch_order, phase_address
from cfamc_cli.engine.sections import section
from cfamc_cli.engine.sink import Ledger, Talk
from cfamc_cli.errors import bad_data
from cfamc_cli.recipe.schema import FreeAdversary, Recipe


class Trainer:
    """One run under way: what `train` moves from update to update, and what a checkpoint holds.

    A run is a phase, or several in turn. All that `enter` makes is of one phase: its recipe, fresh optimizer, adversary
    and journal, and `step` and its batches, which count from 0. `where` tells the position in the whole run.
    """

    def __init__(
        self, recipe: Recipe, data: ImageSet, *, device: torch.device, world: World, talk: Talk, ledger: Ledger
    ) -> None:
        """Build the run in its initial state.

        Args:
            recipe: What to train.
            data: The training images.
            device: Where to compute.
            world: This process among those that train together.
            talk: Who listens.
            ledger: Takes the metrics and timings.

        Raises:
            CfamcError: As for `Recipe.require_fit` and `synchronise`; supcon without labels.
        """
        recipe.require_fit(len(data.images), processes=world.size)
        self.labels = data.require_labels().to(device) if recipe.reads_labels else None
        self.precision = pick_precision(recipe.train.precision, device)
        prepare(device, deterministic=recipe.train.deterministic, precision=self.precision)
        compiled = pick_compile(recipe, len(data.images), device, talk=talk)
        self.computation = computation(device, precision=self.precision, compiled=compiled)
        self.data, self.device, self.world, self.talk, self.ledger = data, device, world, talk, ledger
        self.images = to_device(data.images, device=device)
        self.parts, self.digest = recipe.parts(), recipe.digest()
        self.total = recipe.updates(len(data.images))
        self.encoder = build_encoder(recipe.model, generator=addressed_generator("init", recipe.seed)).to(device)
        if recipe.train.memory == "recompute":
            self.encoder.recompute()
        if recipe.train.batch_norm == "synchronised":
            synchronise(self.encoder, device=device, world=world)
        self.average = Average(self.encoder, decay=recipe.train.average)
        if compiled:
            self.encoder.compile(dynamic=False)  # crops of a group have one shape all along a phase
        self.gradients = GradientSum(list(self.encoder.parameters()), world)
        self.signals = Agreement(world)
        self.saved = time.monotonic()  # when the last checkpoint was begun; before the first, when the run was
        self.enter(0)

    def enter(self, phase: int) -> None:
        """Stand before the first batch of a phase, with the weights as they are."""
        count, earlier = len(self.images), self.parts[:phase]
        self.phase, self.recipe, self.step = phase, self.parts[phase], 0
        if earlier and self.computation.compiled:
            torch.compiler.reset()  # what was compiled for other shapes counts against a limit: beyond it all is eager
        batch_size = self.recipe.train.batch_size
        self.per_epoch = count // batch_size  # an incomplete batch is dropped: delta is carried by position
        self.batches, self.updates = self.recipe.batches(count), self.recipe.updates(count)
        self.share, self.shares = self.world.share(batch_size), self.world.shares(batch_size)
        self.clusters: Tensor | None = None  # of the images, where the objective is to find them
        self.optimizer = build_optimizer(list(self.encoder.parameters()), self.recipe.optimizer)
        self.adversary = build_adversary(self.recipe.adversary)
        self.journal = Journal(
            self.recipe,
            self.data,
            device=self.device,
            talk=self.talk,
            ledger=self.ledger,
            updates=self.updates,
            per_epoch=self.per_epoch,
            share=min(self.shares),
            before={
                "step": sum(part.updates(count) for part in earlier),
                "batch": sum(part.batches(count) for part in earlier),
                "epoch": sum(part.batches(count) / (count // part.train.batch_size) for part in earlier),
                "phase": phase if len(self.parts) > 1 else None,
            },
            total=self.total,
        )

    def where(self) -> Where:
        """The position in the whole run."""
        return self.journal.where(self.step)

    def train(self, folder: Path, *, stop: Callable[[], int]) -> int:
        """Train from where the run stands to its end, or until `stop` returns a signal's number.

        Args:
            folder: Where checkpoints go.
            stop: Asked after every batch, and all the while in an evaluation; on a signal the loop saves and returns.

        Returns:
            The signal that ended it; 0 where all weight updates were made.

        Raises:
            Diverged: A loss, gradient or weight is not finite; nothing of it was saved.
            CfamcError: A checkpoint could not be written.
        """
        prefetch = Prefetch(self.crops_of, self.device)
        while True:
            signal = self._train_phase(prefetch, folder, stop=stop)
            if signal or self.phase + 1 == len(self.parts):
                return signal
            self.average.hand_over()
            self.enter(self.phase + 1)

    def preview(self) -> tuple[Tensor, Groups, Groups]:
        """The first batch: images in [0, 1], their crops, and those as the adversary moves them; weights stay."""
        crops, labels = self.crops_of(0)
        self.adversary.begin(crops, self._generators("delta", 0))
        for _ in range(self.recipe.replays):
            still = self.embed(self.adversary.spared)
            moved = self.adversary.perturb(partial(self.attacked_loss, still=still, labels=labels))
            self.loss_of([*still, *self.embed(moved)], labels)[1].loss.backward()
            self.adversary.ascend()
        images = gather(self.images, self._order(0).to(self.images.device), device=self.device)
        return images.float() / 255, crops, [*self.adversary.spared, *(x.detach() for x in self.adversary.moved())]

    def _train_phase(self, prefetch: Prefetch, folder: Path, *, stop: Callable[[], int]) -> int:
        """As `train`, to the end of the phase."""
        self.encoder.train()
        if self.step == 0:
            self.average.start()  # the first weights may be another run's, put in after this was made
            self.clusters = self._find_clusters()
        self.journal.start(self.step)
        while True:
            batch = self.step // self.recipe.replays
            # A checkpoint of this moment is older than its evaluation, which a run that goes on from there makes again.
            if self._evaluates_after(batch) and not self._evaluate(stop):
                self.save(folder)
                return stop()
            if batch == self.batches:
                return 0

            with self.journal.waiting():
                crops, labels = prefetch.take(batch)
            self.adversary.begin(crops, self._generators("delta", batch))
            for _ in range(self.recipe.replays):
                with autocast(self.device, self.precision):  # one for both passes: each weight is shortened once
                    still = self.embed(self.adversary.spared)  # serves the steps of an attack on the others too
                    with autocast(self.device, "float32"):
                        moved = self.adversary.perturb(partial(self.attacked_loss, still=still, labels=labels))
                    z, terms = self.loss_of([*still, *self.embed(moved)], labels)  # (V, B, D), unit norm
                with section("backward"):
                    terms.loss.backward()  # for free training, this one pass pays for weights and delta
                    self.gradients.finish()
                self.adversary.ascend()
                lr = self.learning_rate()
                self.journal.add(terms, self.optimizer.step(lr=lr), lr=lr)
                self.optimizer.zero_grad()
                self.step += 1
                self.average.update(self.step)
                z = z.detach()
                del still, moved, terms  # with the graph, which holds a replay's perturbation and its gradient

            if batch + 1 < self.batches:
                with self.journal.waiting():
                    prefetch.begin(batch + 1)
            loss_beside = partial(self.loss_beside, labels=labels)
            self.journal.after_batch(self.encoder, z, crops, self.adversary.delta, loss_beside, step=self.step)
            if self._saves_after(batch + 1):
                self.save(folder)
            if signal := self._agreed(folder, stop=stop):
                return signal

    def _find_clusters(self) -> Tensor | None:
        """The cluster of each image by the encoder as it is, (N,), the same in every process; None for no clusters."""
        if not (count := self.recipe.clusters):
            return None
        generator = addressed_generator("clusters", self.recipe.seed, *phase_address(self.phase))
        with section("clusters"):
            features = extract_features(
                self.encoder,
                self.images,
                device=self.device,
                each=lambda done, total: self.talk.progress(f"features for {count} clusters", done, total, {}),
                world=self.world,
                precision=self.precision,
            )
            return cluster(features, count=count, generator=generator)

    @section("forward")
    def embed(self, groups: Sequence[Tensor]) -> Groups:
        """The embeddings of this process's crops: (V, own images, D), unit norm; no tensor for no group."""
        with autocast(self.device, self.precision):
            return [self.encoder.embed(groups)] if groups else []

    @section("objective")
    def loss_of(self, embedded: Sequence[Tensor], labels: Tensor | None) -> tuple[Tensor, Terms]:
        """Gather the whole batch's embeddings, and compute the objective: z (V, B, D) and its terms."""
        own = torch.cat(list(embedded)) if len(embedded) > 1 else embedded[0]
        z = gather_embeddings(own, self._counts(own.shape[1]), self.world)
        return z, objective_loss(z, labels, objective=self.recipe.objective)

    def attacked_loss(self, moved: Sequence[Tensor], *, still: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """The training loss as an adversary sees it: running batch-norm statistics stay as they are.

        Args:
            moved: The groups that it moves, or the first images of each process's share of them.
            still: Embeddings of the same images in the groups that it spares: (V, own images, D) or nothing.
            labels: Of the whole batch, or its clusters, for the objectives that read them.
        """
        if labels is not None:
            shares = zip(labels.split(self.shares), self._counts(moved[0].shape[1]), strict=True)
            labels = torch.cat([share[:count] for share, count in shares])
        with frozen_statistics(self.encoder):
            embedded = self.embed(moved)
        return self.loss_of([*(z.detach() for z in still), *embedded], labels)[1].loss

    def loss_beside(self, spared: Sequence[Tensor], *, labels: Tensor | None) -> LossOf:
        """The loss of `attacked_loss` beside clean groups, which are embedded here."""
        with torch.no_grad(), frozen_statistics(self.encoder):
            still = self.embed(spared)
        return partial(self.attacked_loss, still=still, labels=labels)

    def _carried(self) -> list[tuple[int, ...]]:
        """Shapes of the perturbations that go on from batch to batch, a whole batch's: (V, B, C, S, S) a group."""
        adversary, images = self.recipe.adversary, (self.recipe.train.batch_size, self.images.shape[1])
        if not isinstance(adversary, FreeAdversary):
            return []
        moved = self.recipe.crops[1 if adversary.views == "second" else 0 :]
        return [(group.count, *images, group.size, group.size) for group in moved]

    def _counts(self, own: int) -> list[int]:
        """Images of each process where this one has so many: all of its share, or fewer than anybody's share."""
        return self.shares if own >= min(self.shares) else [own] * self.world.size

    def learning_rate(self) -> float:
        """The learning rate of the coming weight update, in its phase."""
        return learning_rate(
            self.step,
            base=self.recipe.optimizer.lr,
            schedule=self.recipe.schedule,
            updates=self.updates,
            replays=self.recipe.replays,
        )

    @section("crops")
    def crops_of(self, batch: int) -> tuple[Groups, Tensor | None]:
        """The crops of this process's share of a batch, and what labels there are, of the whole batch."""
        order, size = self._order(batch), self.recipe.train.batch_size
        height, width = self.images.shape[-2:]
        lists = []
        for group, generator in zip(self.recipe.crops, self._generators("crops", batch), strict=True):
            parameters = sample_parameters(
                size, height, width, group=group, augment=self.recipe.augment, generator=generator
            )  # of the whole batch, so that they do not depend on how many processes share it
            lists.append(parameters.images(self.share.start, self.share.stop).lists())
        (moved,), *lists = move_together([[order], *lists], self.device)
        places = order if self.images.device.type == "cpu" else moved
        images = gather(self.images, places[self.share], device=self.device)
        crops = [
            _channels_last(cut(images, own, size=group.size))
            for group, own in zip(self.recipe.crops, lists, strict=True)
        ]
        labels = self.labels if self.clusters is None else self.clusters
        return crops, None if labels is None else labels[moved]

    def _order(self, batch: int) -> Tensor:
        """Positions of the images of a whole batch, (B,)."""
        epoch, index = divmod(batch, self.per_epoch)
        size = self.recipe.train.batch_size
        return epoch_order(self.recipe.seed, epoch, len(self.images), self.phase)[index * size : (index + 1) * size]

    def _generators(self, purpose: Literal["crops", "delta"], batch: int) -> list[torch.Generator]:
        address = self.recipe.seed, *phase_address(self.phase), *divmod(batch, self.per_epoch)
        rank = self.world.rank if purpose == "delta" else 0
        return [addressed_generator(purpose, *address, group, rank) for group in range(len(self.recipe.crops))]

    def _evaluates_after(self, batches: int) -> bool:
        """Whether an evaluation is due when so many batches are done: at epochs of the recipe's choice, and the end.

        The end of a phase is the beginning of the next, which makes none of its own.
        """
        every, (epoch, rest) = self.recipe.train.evaluate_every, divmod(batches, self.per_epoch)
        if batches == 0 and self.phase > 0:
            return False
        return every > 0 and (batches == self.batches or (rest == 0 and epoch % every == 0))

    def _saves_after(self, batches: int) -> bool:
        """Whether a checkpoint is due when so many batches are done."""
        return batches == self.batches or batches % (self.recipe.train.checkpoint_every or self.per_epoch) == 0

    def _agreed(self, folder: Path, *, stop: Callable[[], int]) -> int:
        """The signal that ends the run after this batch, in all processes, saved; 0 for none.

        Saved is too where the last checkpoint is long ago, by the clock of the process that leads.
        """
        if self.where()["step"] == self.total:
            self.signals.heard()  # so that nothing stays under way
            return 0
        overdue = self.world.leads and 0 < 60 * self.recipe.train.checkpoint_minutes < time.monotonic() - self.saved
        signal, due = divmod(self.signals.ask(2 * stop() + overdue), 2)
        if signal or due:
            self.save(folder)
        return signal

    @section("evaluation")
    def _evaluate(self, stop: Callable[[], int]) -> bool:
        """Evaluate in the process that leads; False where a signal cut it."""
        if not self.world.leads:
            return True
        cut_by = stop if self.world.size == 1 else lambda: 0  # the other processes are waiting
        return self.journal.evaluate(self.average.encoder, self.images, step=self.step, stop=cut_by)

    @section("checkpoint")
    def save(self, folder: Path) -> None:
        """Write a checkpoint of this moment, and drop those beyond `train.keep`.

        Raises:
            Diverged: The moment is not finite; nothing was written.
            CfamcError: It could not be written.
        """
        self.journal.check_finite(self.encoder, self.average.encoder, step=self.step)
        self.saved = time.monotonic()
        carried = self.adversary.delta if isinstance(self.recipe.adversary, FreeAdversary) else []
        delta = gather_images(carried, self.shares, self.world)
        if not self.world.leads:
            return
        state = {f"momentum.{index:04d}": buffer for index, buffer in enumerate(self.optimizer.momentum)}
        state |= {f"delta.{index:04d}": part for index, part in enumerate(delta)}
        state |= {"journal": self.journal.rows()} | self.average.raw()
        state |= {} if self.clusters is None else {"clusters": self.clusters}
        step = self.where()["step"]
        progress = {"step": step, "phase": self.phase, "recipe": self.digest, "positions": self.ledger.positions()}
        path = checkpoints.save(folder, step, Checkpoint(self.average.encoder.state_dict(), state, progress))
        checkpoints.prune(folder, newest=path, keep=self.recipe.train.keep)

    def load(self, saved: Checkpoint, *, path: Path) -> None:
        """Stand where `saved` stood; going on from here repeats the uncut run bit for bit.

        Raises:
            CfamcError: Exit 4; the checkpoint does not fit the recipe.
        """
        self.average.load(saved.model, saved.state, path=path)
        try:
            if saved.progress["recipe"] != self.digest:
                raise ValueError("another recipe")
            step, phase = saved.progress["step"], saved.progress.get("phase", 0)  # the first runs had one phase
            if not isinstance(step, int) or not isinstance(phase, int) or not 0 <= phase < len(self.parts):
                raise ValueError("no position")
            self.enter(phase)
            step -= self.where()["step"]
            if step % self.recipe.replays or not 0 <= step <= self.updates:
                raise ValueError("not the end of a batch of its phase")
            for index, buffer in enumerate(self.optimizer.momentum):
                kept = saved.state[f"momentum.{index:04d}"]
                if kept.shape != buffer.shape or kept.dtype != buffer.dtype:
                    raise ValueError("another parameter's momentum")
                buffer.copy_(kept)
            delta = [saved.state[name] for name in sorted(saved.state) if name.startswith("delta.")]
            if [tuple(part.shape) for part in delta] != (self._carried() if step else []):
                raise ValueError("other crops' perturbations")
            self.adversary.delta = [_channels_last(part[:, self.share].to(self.device)) for part in delta]
            self.journal.load(saved.state["journal"].to(self.device))
            if self.recipe.clusters:
                found = _checked_clusters(saved.state["clusters"], self.recipe.clusters, images=len(self.images))
                self.clusters = found.to(self.device)
            self.step = step
        except (LookupError, RuntimeError, TypeError, ValueError, AssertionError) as error:
            cause = f"{path}: its state does not fit the recipe"
            raise bad_data(cause) from error


def _checked_clusters(saved: Tensor, count: int, *, images: int) -> Tensor:
    """The clusters of a checkpoint, if they are those of so many images.

    Raises:
        ValueError: They are not.
    """
    if saved.dtype != torch.int64 or saved.shape != (images,) or not bool(((saved >= 0) & (saved < count)).all()):
        raise ValueError("other images' clusters")
    return saved


def _channels_last(crops: Tensor) -> Tensor:
    """The same (V, B, C, S, S) values, laid out as the convolutions want them."""
    flat = crops.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return flat.view(crops.shape).detach()  # what is compiled would tell views from others, and be compiled for each
