"""Randomness by address: a draw depends on what it is for, never on what was drawn before it.

An address is a tuple such as ("order", seed, epoch). Draws are made on the CPU and moved, so that the same recipe
draws the same numbers on any device and wherever a run was cut.
"""

from __future__ import annotations

import functools
import hashlib
import json

import torch
from torch import Tensor


def addressed_seed(*address: int | str) -> int:
    """Hash an address into a seed.

    Args:
        *address: What the draw is for; 1 and "1" differ, and so do ("a", "b") and ("ab",).

    Returns:
        A number of 63 bits: the head of the SHA-256 of the address written as JSON. (torch's CPU generator looks at
        its low 32 bits only, so among n addresses two share a stream with probability n^2 / 2^33.)
    """
    digest = hashlib.sha256(json.dumps(address).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def addressed_generator(*address: int | str) -> torch.Generator:
    """Return a fresh CPU generator for an address; two calls draw the same numbers.

    Args:
        *address: What the draws are for, such as ("crops", seed, epoch, batch).

    Returns:
        A CPU generator that nobody else holds.
    """
    return torch.Generator(device="cpu").manual_seed(addressed_seed(*address))


def phase_address(phase: int) -> tuple[int | str, ...]:
    """What the addresses of a phase hold in addition, so that no two phases draw alike: nothing in the first, 0."""
    return ("phase", phase) if phase else ()


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, count: int, phase: int = 0) -> Tensor:
    """Shuffle the images of one epoch.

    Args:
        seed: The recipe's seed.
        epoch: Counts from 0 in each phase.
        count: Number of images.
        phase: Counts from 0.

    Returns:
        A permutation of 0 .. count - 1: int64, (count,), on the CPU. To be read only: the last one is kept, so that
        the batches of an epoch draw it once.
    """
    return torch.randperm(count, generator=addressed_generator("order", seed, *phase_address(phase), epoch))


def addressed_order(count: int, *address: int | str) -> Tensor:
    """A permutation of 0 .. count - 1: int64, (count,), on the CPU."""
    return torch.randperm(count, generator=addressed_generator(*address))


def balanced_order(labels: Tensor, *address: int | str) -> Tensor:
    """Shuffle images so that every prefix holds the classes as evenly as it can.

    Args:
        labels: int64, (N,); images labelled -1 are left out.
        *address: What the order is for.

    Returns:
        Indices of the labelled images, int64, on the CPU. Among the first k of them the counts of any two classes that
        are not used up differ by at most one.
    """
    labels = labels.cpu()
    order = addressed_order(len(labels), *address)
    order = order[labels[order] >= 0]
    by_class = labels[order].argsort(stable=True)
    sizes = torch.bincount(labels[order])
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(by_class)  # the how-manieth of its class, in the shuffled order
    rank[by_class] = torch.arange(len(by_class)) - starts.repeat_interleave(sizes)
    return order[rank.argsort(stable=True)]
