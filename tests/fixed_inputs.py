"""Fixed inputs without a random number generator: a counter hashed to [0, 1) in exact integer arithmetic.

Written by us; copy it into a test's helper module as it is. Everything is float64.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform(*shape: int, key: str) -> Tensor:
    """Numbers in [0, 1) that depend on shape, position and key alone."""
    x = torch.arange(math.prod(shape), dtype=torch.int64)
    x = (x * 2654435761 + zlib.crc32(key.encode())) & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x046CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    x = x ^ (x >> 16)
    return (x.double() / 2**32).reshape(shape)


def signed(*shape: int, key: str) -> Tensor:
    """Numbers in [-1, 1)."""
    return 2 * uniform(*shape, key=key) - 1


def embeddings(*shape: int, key: str) -> Tensor:
    """Unit-norm rows."""
    return torch.nn.functional.normalize(signed(*shape, key=key), dim=-1)


@torch.no_grad()
def fill(state: dict[str, Tensor]) -> None:
    """Overwrite the weights of an encoder's state_dict (cfamc's names); running statistics stay 0 and 1."""
    for name, value in state.items():
        if "running_" in name or "num_batches" in name:
            continue
        if value.dim() > 1:
            fan_in = value[0].numel()
            value.copy_(signed(*value.shape, key=name) * math.sqrt(6 / fan_in))
        elif name.endswith("weight"):
            value.copy_(0.5 + uniform(*value.shape, key=name))
        else:
            value.copy_(0.2 * signed(*value.shape, key=name))


def crops(batch: int, *, views: int, images: int, size: int) -> Tensor:
    """(V, B, 3, S, S) in [0.1, 0.9], so that the box [0, 1] never cuts a perturbation of 8/255."""
    return 0.1 + 0.8 * uniform(views, images, 3, size, size, key=f"crops {batch}")


def checksum(value: Tensor, *, key: str) -> float:
    """The inner product with fixed signed numbers: one number that notices a change anywhere."""
    return float((value.detach().double().contiguous() * signed(*value.shape, key="checksum " + key)).sum())
