"""Crops of the next batch are made while this one trains: on CUDA, on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cfamc_cli.engine.adversary import Groups

Batch = tuple[Groups, Tensor | None]  # crops, and labels where they are read


class Prefetch:
    """Batches in their order; elsewhere than on CUDA each is made when it is taken.

    Two batches are in memory, however far the host runs ahead of the device. Memory of the second stream is used again
    in the order of the host, without `Tensor.record_stream`: the making of batch n + 1 waits for the training of batch
    n - 1, and whoever takes batch n keeps it until the making of n + 1 began.
    """

    def __init__(self, make: Callable[[int], Batch], device: torch.device) -> None:
        """Take what makes the batch of a number, from tensors that stay."""
        self._make, self._device = make, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._made: tuple[int, Batch] | None = None
        self._taken: torch.cuda.Event | None = None  # the work before it used older batches

    def take(self, batch: int) -> Batch:
        """The batch; on CUDA the device waits until it is made, and the host does not."""
        if self._stream is None:
            return self._make(batch)
        training = torch.cuda.current_stream(self._device)
        if self._made is None or self._made[0] != batch:
            self._taken = training.record_event()
            self.begin(batch)
        assert self._made is not None, "begun above, if not before"
        (_, made), self._made = self._made, None
        training.wait_stream(self._stream)
        self._taken = training.record_event()
        return made

    def begin(self, batch: int) -> None:
        """Begin to make the batch that will be taken next, once the training on the last one was sent on its way."""
        if self._stream is None:
            return
        assert self._taken is not None, "the first batch is taken"
        self._stream.wait_event(self._taken)
        with torch.cuda.stream(self._stream):
            self._made = batch, self._make(batch)
