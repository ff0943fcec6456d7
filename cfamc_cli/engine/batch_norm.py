"""Batch norm over the images of all processes, so that several compute what one process would.

Ioffe and Szegedy, arXiv:1502.03167. On CUDA this is torch.nn.SyncBatchNorm, which waits for the device in each forward
pass; torch has none for the CPU, so that here is one, with the names and the state of that.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfamc_cli.engine.distributed import World
from cfamc_cli.errors import invalid


def synchronise(module: nn.Module, *, device: torch.device, world: World) -> None:
    """Give every batch norm within `module` the statistics of the whole batch; alone, a process has them already.

    Parameters, buffers and their names stay. Shares of the batch may differ in size: each value counts the same.

    Raises:
        CfamcError: Neither torch nor this module has it for the device.
    """
    if world.size == 1:
        return
    if device.type not in ("cpu", "cuda"):
        cause = f'train.batch_norm = "synchronised" does not work on {device.type}'
        raise invalid(cause, 'use --device cpu, or train.batch_norm = "local"')
    nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for part in module.modules():
        if device.type == "cpu" and isinstance(part, nn.SyncBatchNorm):
            part.__class__ = _OnHost


class _OnHost(nn.SyncBatchNorm):
    """Two sums over all processes: of the values, then of their squared distances from the mean."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        if not self.training:
            return super().forward(input)
        x = input.to(self.weight.dtype)  # (N, C, ...); statistics are not taken in bfloat16
        others = [dimension for dimension in range(x.dim()) if dimension != 1]
        own = x.new_tensor([x.numel() // x.shape[1]])
        total = _Total.apply(torch.cat([x.sum(others), own]))
        count = total[-1].detach()
        mean = total[:-1] / count  # (C,)
        centred = x - mean.view(-1, *[1] * (x.dim() - 2))
        variance = _Total.apply(centred.square().sum(others)) / count
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        scale, bias = (part.view(-1, *[1] * (x.dim() - 2)) for part in (scale, self.bias))
        normalised: Tensor = centred * scale + bias
        return normalised.to(input.dtype)


class _Total(torch.autograd.Function):
    """The sum over all processes; each differentiates its own rows' part of one loss, so that gradients add up too."""

    @staticmethod
    def forward(_ctx: torch.autograd.function.FunctionCtx, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
