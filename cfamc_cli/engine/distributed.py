"""Several processes under torchrun: each takes its share of the batch, all see the whole batch's embeddings."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfamc_cli.errors import CfamcError

_LOST = re.compile(  # how gloo and NCCL tell that a peer is gone; their names alone also stand in errors of our own
    r"connection (closed|reset|refused)|broken pipe|timed out|remote process exited|socket", re.IGNORECASE
)
Made = TypeVar("Made")
_BUCKET = 25 * 2**20  # bytes of gradients that travel as one message, as in DistributedDataParallel


@dataclass(eq=False)
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
        return slice(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)

    def shares(self, batch_size: int) -> list[int]:
        """How many images of the global batch each process has, by rank; two shares differ by one at most."""
        starts = [rank * batch_size // self.size for rank in range(self.size + 1)]
        return [after - start for start, after in pairwise(starts)]


ALONE = World()


def join(device: torch.device) -> World:
    """Enter the process group that torchrun's environment describes; without torchrun, a world of one.

    Raises:
        CfamcError: The others cannot be reached.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
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
    """Leave the process group.

    Nothing may hold on to a group of gloo: its threads let go of the last message when they like, and where they do so
    after Python has begun to end, the process is aborted. With the last reference they are waited for.
    """
    if world.size > 1 and dist.is_initialized():
        world.control = None
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
    def forward(ctx: torch.autograd.function.FunctionCtx, own: Tensor, counts: Sequence[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank  # type: ignore[attr-defined]
        return _whole(own, counts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        counts: list[int] = ctx.counts  # type: ignore[attr-defined]
        return gradients[0].split(counts)[ctx.rank], None, None  # type: ignore[attr-defined]


def gather_embeddings(z: Tensor, counts: Sequence[int], world: World) -> Tensor:
    """The whole batch's embeddings (V, B, D) from this process's (V, counts[rank], D), with gradient."""
    if world.size == 1:
        return z
    gathered: Tensor = _Gather.apply(z.transpose(0, 1).contiguous(), counts, world.rank)
    return gathered.transpose(0, 1)


def gather_images(own: Sequence[Tensor], counts: Sequence[int], world: World) -> list[Tensor]:
    """Join (V, counts[rank], ...) tensors along the batch; every process gets the whole."""
    if world.size == 1:
        return list(own)
    return [_whole(tensor.transpose(0, 1).contiguous(), counts).transpose(0, 1) for tensor in own]


def _whole(own: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows (sum(counts), ...) of all processes, by rank; they travel in pieces of one size, which gloo asks for."""
    missing = max(counts) - len(own)
    sent = torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own
    pieces = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(pieces, sent)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])


class GradientSum:
    """Adds up the parameters' gradients over all processes, bucket by bucket while the backward pass still runs.

    DistributedDataParallel does this too, but regroups its buckets after its first backward pass: three or more
    processes that go on from a checkpoint would add in another order than in the uncut run, and differ in the last
    bits. Here the buckets stay as they are. Gradients are added, not averaged: each process has those of its own rows
    of one loss of the whole batch.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        """Listen to the parameters' gradients; in a world of one there is nothing to add."""
        self._buckets = [_Bucket(bucket) for bucket in _buckets(parameters)] if world.size > 1 else []
        self._under_way: list[dist.Work] = []
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket))

    def _arrived(self, bucket: _Bucket, _: Tensor) -> None:
        bucket.missing -= 1
        while len(self._under_way) < len(self._buckets) and not self._buckets[len(self._under_way)].missing:
            self._send()  # in one order in all processes, as messages have to be

    def _send(self) -> None:
        work = dist.all_reduce(self._buckets[len(self._under_way)].filled(), async_op=True)
        assert work is not None, "it is under way"
        self._under_way.append(work)

    def finish(self) -> None:
        """Make every parameter's gradient the sum over all processes; to be called after each backward pass."""
        while len(self._under_way) < len(self._buckets):
            self._send()  # a bucket with a parameter that had no part in the loss
        for bucket, work in zip(self._buckets, self._under_way, strict=True):
            work.wait()
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view
            bucket.missing = len(bucket.parameters)
        self._under_way = []


class _Bucket:
    """Gradients that travel as one message, and become views of it in their parameters' own layout."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.missing = parameters, len(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = parameters[0].new_empty(sum(sizes))
        parts = zip(parameters, self._flat.split(sizes), strict=True)
        self.views = [part.as_strided(parameter.shape, parameter.stride()) for parameter, part in parts]

    def filled(self) -> Tensor:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        torch._foreach_copy_(self.views, gradients)
        return self._flat


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of about `_BUCKET` bytes together, last ones first: their gradients come first."""
    bucket: list[nn.Parameter] = []
    for parameter in reversed(parameters):
        bucket.append(parameter)
        if sum(part.nbytes for part in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def largest(flag: int, world: World) -> int:
    """The largest of all processes' flags, waiting for all of them."""
    agreement = Agreement(world)
    return agreement.ask(flag) or agreement.heard()


def first_on_each_node(make: Callable[[], Made], world: World) -> Made:
    """Call `make` in one process of each node, and then in the others, which find what it left in a cache.

    Raises:
        CfamcError: Instead of waiting in vain, in the processes whose own call did not fail.
    """
    if world.size == 1:
        return make()
    leads, made, failed = os.environ.get("LOCAL_RANK", str(world.rank)) == "0", None, 1
    try:
        if leads:
            made = make()
        failed = 0
    finally:
        with peers(world, hint="see its own messages"):
            failed = largest(failed, world)
    if failed:
        raise CfamcError("another process of this run could not load the images", hint="see its own messages")
    return make() if made is None else made


class Agreement:
    """Flags of all processes, exchanged while they compute: what one says, all of them hear at the next asking."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._under_way: tuple[Tensor, dist.Work] | None = None

    def ask(self, flag: int) -> int:
        """Say `flag`, and hear the largest of those that were said the time before; alone, one hears oneself."""
        if self._world.size == 1:
            return flag
        heard = self.heard()
        if not heard:
            said = torch.tensor(flag)
            work = dist.all_reduce(said, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
            assert work is not None, "it is under way"
            self._under_way = said, work
        return heard

    def heard(self) -> int:
        """The largest of what was said last, of which all processes hear at once; 0 where nothing is under way."""
        if self._under_way is None:
            return 0
        (said, work), self._under_way = self._under_way, None
        work.wait()
        return int(said)


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
    """Every process's rows (n, ...), by rank, on the device of `own`; n may differ, all else is alike."""
    if world.size == 1:
        return [own]
    counts = [torch.empty((), dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor(len(own)), group=world.control)
    longest = int(max(counts))
    padded = torch.zeros(longest, *own.shape[1:], dtype=own.dtype)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=world.control)
    return [part[: int(count)].to(own.device) for part, count in zip(parts, counts, strict=True)]


def _letters(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
