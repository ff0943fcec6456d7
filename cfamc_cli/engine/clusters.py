"""Pseudo-labels: clusters of the features that the encoder itself has learnt, for training that nobody labelled.

DeepCluster (Caron et al., arXiv:1807.05520) and, of an adversarially trained encoder, DynACL++ (Luo et al.,
arXiv:2303.02203). Symbols: N images, F feature dimension, k clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cfamc_cli.engine.device import move

ROUNDS = 20  # of k-means; later ones move few images
_ROWS = 4096  # images of one product


@torch.no_grad()
def cluster(features: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means on centred features of unit norm, from `count` images drawn at random.

    Sums are products with indicator matrices, so that equal inputs give equal clusters on any one device.

    Args:
        features: (N, F) float32, N >= count.
        count: k.
        generator: Draws the first centres, on the CPU.

    Returns:
        The cluster of each image: int64, (N,), in 0 .. k - 1. A cluster may be empty.

    Source: Dhillon and Modha, "Concept decompositions for large sparse text data using clustering", 2001.
    """
    directions = F.normalize(features - features.mean(0), dim=1)
    chosen = torch.randperm(len(directions), generator=generator)[:count]
    centres = directions[move(chosen, directions.device)]
    for _ in range(ROUNDS):
        sums = torch.zeros_like(centres)
        for rows in directions.split(_ROWS):
            sums += F.one_hot(_nearest(rows, centres), count).to(rows.dtype).T @ rows
        empty = (sums == 0).all(1, keepdim=True)
        centres = torch.where(empty, centres, F.normalize(sums, dim=1))
    return torch.cat([_nearest(rows, centres) for rows in directions.split(_ROWS)])


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    return (rows @ centres.T).argmax(1)
