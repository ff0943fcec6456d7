"""Heads that need the encoder at every step: adversarial linear heads, and fine-tuning of the whole network.

ALF and AFF as in AdvCL (arXiv:2111.01124): PGD examples (arXiv:1706.06083) or TRADES pairs (arXiv:1901.08573) of
encoder and head. Symbols: N samples of a batch, x images in [0, 1] (N, 3, S, S), y labels (N,), delta the perturbation.
Everything random has an address, so that a run that was cut goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from cfamc_cli.engine import ball
from cfamc_cli.engine import checkpoint as checkpoints
from cfamc_cli.engine.adversary import ascend_loss
from cfamc_cli.engine.checkpoint import Checkpoint
from cfamc_cli.engine.data.sets import batch as gather
from cfamc_cli.engine.data.sets import to_device
from cfamc_cli.engine.device import autocast, held_to, pick_precision
from cfamc_cli.engine.heads.classifier import Classifier, feature_dim, stored
from cfamc_cli.engine.heads.frozen import Fitted, Task, classify, new_head
from cfamc_cli.engine.optim import learning_rate
from cfamc_cli.engine.randomness import addressed_generator, epoch_order
from cfamc_cli.errors import CfamcError, ExitCode, bad_data
from cfamc_cli.recipe.schema import Cosine, Finetune, RobustLinear, number

_KEEP = 2  # checkpoints, so that one damaged is not the end
_TRADES_START = 1e-3  # deviation of the Gaussian that TRADES starts from, for its loss is flat at 0


class SupervisedTrainer:
    """A head, and for fine-tuning its encoder, under way."""

    def __init__(self, task: Task, settings: RobustLinear | Finetune) -> None:
        """Build the classifier of `settings` in its initial state; its encoder is changed by fine-tuning alone."""
        self.task, self.settings = task, settings
        self.seed, self.device, self.talk = task.recipe.seed, task.loaded.device, task.talk
        self.images, self.labels = to_device(task.train.images, device=self.device), task.labels()
        self.precision = pick_precision(task.recipe.train.precision, self.device)
        encoder, classes = task.loaded.encoder, len(task.train.classes)
        head = new_head(feature_dim(encoder, settings.features), classes, seed=self.seed, device=self.device)
        self.classifier = Classifier(encoder, head, features=settings.features).eval()
        self._saved = stored(self.classifier, finetuned=isinstance(settings, Finetune))
        parameters = list(head.parameters())
        self.optimizer: torch.optim.Optimizer
        match settings:
            case RobustLinear():
                self.optimizer = torch.optim.Adam(parameters, lr=settings.lr)
            case Finetune():
                read = [encoder.backbone, *([encoder.pre_feature] if settings.features == "pre_feature" else [])]
                parameters += [part for module in read for part in module.requires_grad_(True).parameters()]
                self.optimizer = torch.optim.SGD(
                    parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
                )
        self.parameters = parameters
        count, size = len(self.images), settings.batch_size
        joins = count % size == 1 and count > size  # a single sample has no batch statistics: it joins the batch before
        self.per_epoch = math.ceil(count / size) - joins
        self.updates = self.per_epoch * settings.epochs  # in all
        self.step = 0  # updates made

    def train(self, folder: Path, *, stop: Callable[[], int], seconds: Callable[[], float]) -> int:
        """Train to the end, or until `stop` returns a signal's number; saves each epoch and when it stops.

        Args:
            folder: Where checkpoints go.
            stop: Asked after each weight update.
            seconds: Wall time so far, over all sittings.

        Returns:
            The signal; 0 at the end.

        Raises:
            CfamcError: Exit 3 where the loss is not finite; or a checkpoint could not be written.
        """
        task = f"training the {self.settings.head} head"
        while self.step < self.updates:
            epoch, index = divmod(self.step, self.per_epoch)
            x, y = self._batch(epoch, index)
            if isinstance(self.settings, Finetune):
                falling = Cosine(name="cosine")
                rate = learning_rate(self.step, base=self.settings.lr, schedule=falling, updates=self.updates)
                self.optimizer.param_groups[0]["lr"] = rate
            with held_to(self.device, self.precision):
                loss = self._loss(x, y, addressed_generator("finetune-delta", self.seed, epoch, index))
                self.optimizer.zero_grad()
                loss.backward()
            self.optimizer.step()
            self.step += 1
            signal = stop() if self.step < self.updates else 0
            if signal or self.step % self.per_epoch == 0:
                self._save(folder, loss.detach(), seconds=seconds())
            self.talk.progress(task, self.step, self.updates, {"epoch": self.step / self.per_epoch})
            if signal:
                return signal
        return 0

    def take_up(self, folder: Path) -> float:
        """Stand where the newest whole checkpoint in `folder` stood, if there is one; returns the seconds until then.

        Raises:
            CfamcError: Exit 4; there are some, and none is whole or fits.
        """
        if not checkpoints.list_checkpoints(folder):
            return 0.0
        path, saved, problems = checkpoints.newest_valid(folder)
        for problem in problems:
            self.talk.warning(f"{problem.message}; going back to {path.name}")
        self.load(saved, path=path)
        return float(str(saved.progress.get("seconds", 0.0)))

    def load(self, saved: Checkpoint, *, path: Path) -> None:
        """Stand where `saved` stood.

        Raises:
            CfamcError: Exit 4; it does not fit.
        """
        checkpoints.load_state(self._saved, saved.model, path=path)
        keys = ["exp_avg", "exp_avg_sq", "step"] if isinstance(self.settings, RobustLinear) else ["momentum_buffer"]
        if isinstance(self.settings, Finetune) and not self.settings.momentum:
            keys = []
        try:
            step = int(str(saved.progress["step"]))
            known = {f"{place:04d}.{key}" for place in range(len(self.parameters)) for key in keys}
            if not 0 <= step <= self.updates or (step and saved.state.keys() != known):
                raise ValueError("another optimizer's state")
            for name, tensor in saved.state.items():
                place, _, key = name.partition(".")
                parameter = self.parameters[int(place)]
                if tensor.shape != (() if key == "step" else parameter.shape):
                    raise ValueError("another parameter's state")
                # like its parameter in memory, which a convolution's gradient is too
                own = torch.empty_like(parameter).copy_(tensor) if tensor.dim() else tensor.clone()
                self.optimizer.state[parameter][key] = own
            self.step = step
        except (LookupError, ValueError) as error:
            raise bad_data(f"{path}: its state does not fit the head") from error

    def judged(self) -> Fitted:
        """The classifier as it stands, and what it answers on whole splits."""
        classifier, task = self.classifier.eval(), self.task
        fitted, answers = (
            classify(classifier, part.images, device=self.device, each=task.progress(f"judging on {part.split}"))
            for part in (task.train, task.test)
        )
        return Fitted(classifier, fitted, answers, precision=self.precision)

    def _save(self, folder: Path, loss: Tensor, *, seconds: float) -> None:
        trained = [loss, *(parameter.detach() for parameter in self.parameters)]
        if not all(bool(torch.isfinite(part).all()) for part in trained):
            raise CfamcError(
                f"the {self.settings.head} head diverged before update {self.step}",
                hint="lower probe.lr",
                exit_code=ExitCode.DIVERGED,
            )
        state = {
            f"{place:04d}.{key}": value
            for place, parameter in enumerate(self.parameters)
            for key, value in self.optimizer.state[parameter].items()
        }
        progress: dict[str, object] = {"step": self.step, "seconds": seconds}
        path = checkpoints.save(folder, self.step, Checkpoint(self._saved.state_dict(), state, progress))
        checkpoints.prune(folder, newest=path, keep=_KEEP)

    def _batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        size = self.settings.batch_size
        last = len(self.images) if index == self.per_epoch - 1 else (index + 1) * size
        chosen = epoch_order(self.seed, epoch, len(self.images))[index * size : last]
        x = gather(self.images, chosen, device=self.device).float() / 255
        if isinstance(self.settings, Finetune):
            x = shift_and_flip(x, addressed_generator("finetune-shift", self.seed, epoch, index))
        return x.contiguous(memory_format=torch.channels_last), self.labels[chosen.to(self.device)]

    def _logits(self, x: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            logits: Tensor = self.classifier(x)
        return logits.float()

    def _loss(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of a weight update, on examples that were found in eval mode."""
        settings, encoder = self.settings, self.classifier.encoder
        match settings:
            case RobustLinear():
                moved = self._attack(x, torch.zeros_like(x), lambda logits: F.cross_entropy(logits, y))
                with torch.no_grad(), autocast(self.device, self.precision):
                    features = self.classifier.read(moved)
                return F.cross_entropy(self.classifier.logits(features.float()), y)
            case Finetune(objective="clean"):
                encoder.train()
                loss = F.cross_entropy(self._logits(x), y)
            case Finetune(objective="pgd"):
                start = ball.random_start(x, eps=number(settings.eps), generator=generator)
                moved = self._attack(x, start, lambda logits: F.cross_entropy(logits, y))
                encoder.train()
                loss = F.cross_entropy(self._logits(moved), y)
            case Finetune():
                with torch.no_grad():
                    target = self._logits(x).softmax(1)
                start = _TRADES_START * torch.randn(x.shape, generator=generator).to(x)
                moved = self._attack(x, start, lambda logits: _divergence(logits, target))
                encoder.train()
                clean = self._logits(x)
                loss = F.cross_entropy(clean, y)
                loss = loss + settings.trades_beta * _divergence(self._logits(moved), clean.softmax(1))
            case _:
                assert_never(settings)
        encoder.eval()
        return loss

    def _attack(self, x: Tensor, start: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """PGD that takes all of its steps, as the training of encoders does."""
        eps, step_size = number(self.settings.eps), number(self.settings.step_size)
        (delta,) = ascend_loss(
            lambda moved: loss_of(self._logits(moved[0])),
            [x],
            [start],
            eps=eps,
            step_size=step_size,
            steps=self.settings.steps,
        )
        return x + delta


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax(logits)), the mean over samples; both (N, C)."""
    return F.kl_div(logits.log_softmax(1), target, reduction="batchmean")


def shift_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side, black coming in, and mirror every other one.

    Args:
        x: (N, 3, S, S).
        generator: On the CPU.

    Returns:
        (N, 3, S, S).
    """
    count, channels, height, width = x.shape
    reach = height // 8  # 4 of 32 pixels
    shift = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = shift[0] + torch.arange(height)  # (N, S)
    columns = shift[1] + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (reach,) * 4)
    samples = torch.arange(count)[:, None, None, None]
    planes = torch.arange(channels)[:, None, None]
    places = [part.to(x.device) for part in (samples, planes, rows[:, None, :, None], columns[:, None, None, :])]
    return padded[places[0], places[1], places[2], places[3]]
