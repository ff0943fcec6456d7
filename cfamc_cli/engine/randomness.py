"""Randomness by address: a draw depends on what it is for, never on what was drawn before it.

An address is a tuple such as ("order", seed, epoch). Draws are made on the CPU and moved, so that the same recipe
draws the same numbers on any device and wherever a run was cut.
"""

from __future__ import annotations

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


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Shuffle the images of one epoch.

    Args:
        seed: The recipe's seed.
        epoch: Counts from 0.
        count: Number of images.

    Returns:
        A permutation of 0 .. count - 1: int64, (count,), on the CPU.
    """
    return torch.randperm(count, generator=addressed_generator("order", seed, epoch))
