"""Several processes under torchrun: each takes its share of the batch, all see the whole batch's embeddings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from cfamc_cli.errors import CfamcError

_LOST = re.compile(  # how gloo and NCCL tell that a peer is gone; their names alone also stand in errors of our own
    r"connection (closed|reset|refused)|broken pipe|timed out|remote process exited|socket", re.IGNORECASE
)


@dataclass(frozen=True)
class World:
    """This process among all; one process is a world of its own."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None  # on the CPU, so that asking whether to stop never waits for a GPU

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """The images of the global batch that are this process's."""
        part = batch_size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


def join(device: torch.device) -> World:
    """Enter the process group that torchrun's environment describes; without torchrun, a world of one.

    Raises:
        CfamcError: The others cannot be reached.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return World()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        except (ValueError, RuntimeError) as error:
            raise CfamcError(
                f"cannot join the processes that WORLD_SIZE announces: {' '.join(str(error).split())[:200]}",
                hint="start cfamc with torchrun, or unset RANK and WORLD_SIZE",
            ) from error
    # a rank waits here for as long as another works alone; the end of a process is noticed at once, whatever the limit
    control = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    assert isinstance(control, dist.ProcessGroup), "every process is a member"
    return World(dist.get_rank(), dist.get_world_size(), control)


def leave(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def peers(world: World, *, hint: str = "see its own messages; then go on with --resume") -> Iterator[None]:
    """Within, another process's end is one line.

    Args:
        world: Without others, nothing is caught.
        hint: The way on.

    Raises:
        CfamcError: In place of the communication library's error.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if world.size == 1 or not (
            isinstance(error, dist.DistNetworkError | dist.DistStoreError) or _LOST.search(text)
        ):
            raise
        raise CfamcError(
            "another process of this run ended, or cannot be reached",
            hint=hint,
            details={"cause": text[:200]},
        ) from error


class _Gather(torch.autograd.Function):
    """All processes' rows. Each computes the same loss of all rows, so that the gradient of its own rows is whole."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, own: Tensor, world: World) -> Tensor:
        ctx.world = world  # type: ignore[attr-defined]
        return torch.cat(_parts(own, world))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        world: World = ctx.world  # type: ignore[attr-defined]
        return gradients[0].chunk(world.size)[world.rank], None


def gather_embeddings(z: Tensor, world: World) -> Tensor:
    """The whole batch's embeddings (V, B, D) from this process's (V, B / size, D), with gradient."""
    if world.size == 1:
        return z
    gathered: Tensor = _Gather.apply(z.transpose(0, 1).contiguous(), world)
    return gathered.transpose(0, 1)


def sum_gradients(parameters: Sequence[Tensor], world: World) -> None:
    """Add up the parameters' gradients over all processes, in one message."""
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, torch.split_with_sizes(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def largest(flag: int, world: World) -> int:
    """The largest of all processes' flags."""
    if world.size == 1:
        return flag
    value = torch.tensor(flag)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=world.control)
    return int(value)


def told(text: str, world: World) -> str:
    """The leading process's text, in every process; the others wait for it, and their own counts for nothing."""
    if world.size == 1:
        return text
    letters = _letters(text)
    length = torch.tensor(len(letters))
    dist.broadcast(length, 0, group=world.control)
    if not world.leads:
        letters = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(letters, 0, group=world.control)
    return bytes(letters.tolist()).decode()


def pooled_texts(own: str, world: World) -> list[str]:
    """The text of every process, by rank."""
    return [own] if world.size == 1 else [bytes(part.tolist()).decode() for part in pooled(_letters(own), world)]


def pooled(own: Tensor, world: World) -> list[Tensor]:
    """Every process's rows (n, ...), by rank, on the CPU; n may differ, all else is alike."""
    if world.size == 1:
        return [own.cpu()]
    counts = [torch.empty((), dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor(len(own)), group=world.control)
    longest = int(max(counts))
    padded = torch.zeros(longest, *own.shape[1:], dtype=own.dtype)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=world.control)
    return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]


def _letters(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def gather_images(own: Sequence[Tensor], world: World) -> list[Tensor]:
    """Join (V, B / size, ...) tensors along the batch; every process gets the whole."""
    return list(own) if world.size == 1 else [torch.cat(_parts(tensor, world), dim=1) for tensor in own]


def _parts(own: Tensor, world: World) -> list[Tensor]:
    """Every process's tensor, by rank."""
    parts = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(parts, own.contiguous())
    return parts
