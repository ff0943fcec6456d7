"""The moving average of the weights: what is evaluated and handed over, where a recipe asks for one.

Averages of iterates: Polyak and Juditsky 1992, Acceleration of stochastic approximation by averaging; exponential ones
of a network: Tarvainen and Valpola, arXiv:1703.01780. Symbols: w what is trained, a its average, d the decay, n weight
updates made.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cfamc_cli.engine import checkpoint as checkpoints
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.sections import section

_RAW = "raw."  # before the names of what is trained, in a checkpoint's state


class Average:
    """Follows an encoder in training: a <- d a + (1 - d) w after each update, with d = min(decay, (1 + n) / (10 + n)).

    The rise of d keeps the first weights from weighing long. Running statistics of batch norm are averaged like
    parameters, whole numbers are copied.

    Attributes:
        encoder: a, in eval mode; without decay the trained encoder itself.

    Source:
        The rise of d: tf.train.ExponentialMovingAverage, whose `num_updates` is n.
    """

    def __init__(self, trained: Encoder, *, decay: float) -> None:
        """Follow `trained` on its device; `decay` lies in [0, 1), and 0 is no average."""
        self._trained, self._decay = trained, decay
        self.encoder = copy.deepcopy(trained).eval().requires_grad_(False) if decay else trained
        self._real, self._whole = _state(self.encoder)
        self._trained_real, self._trained_whole = _state(trained)

    def start(self) -> None:
        """Begin with what is trained as it is now."""
        if self._decay:
            self.encoder.load_state_dict(self._trained.state_dict())

    def hand_over(self) -> None:
        """Go on training from the average, as the next phase does."""
        if self._decay:
            self._trained.load_state_dict(self.encoder.state_dict())

    @section("optimizer")
    def update(self, n: int) -> None:
        """Take in what update `n`, counted from 1, left; never waits for the device."""
        if self._decay:
            torch._foreach_lerp_(self._real, self._trained_real, 1 - min(self._decay, (1 + n) / (10 + n)))
            torch._foreach_copy_(self._whole, self._trained_whole)

    def raw(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside `encoder` to go on from: w, or nothing where that is the same."""
        return {_RAW + name: value for name, value in self._trained.state_dict().items()} if self._decay else {}

    def load(self, model: Mapping[str, Tensor], state: Mapping[str, Tensor], *, path: Path) -> None:
        """Stand where a checkpoint stood.

        Args:
            model: The state dict of `encoder`.
            state: What `raw` gave, among others.
            path: The checkpoint.

        Raises:
            CfamcError: Exit 4; they do not fit.
        """
        checkpoints.load_state(self.encoder, model, path=path / checkpoints.MODEL)
        if self._decay:
            raw = {name.removeprefix(_RAW): value for name, value in state.items() if name.startswith(_RAW)}
            checkpoints.load_state(self._trained, raw, path=path / checkpoints.STATE)


def _state(encoder: Encoder) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers in order: real numbers, whole numbers."""
    tensors = list(encoder.state_dict().values())
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
