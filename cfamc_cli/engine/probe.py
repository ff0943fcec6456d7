"""Reading a frozen encoder: features, nearest neighbours and linear heads.

Weighted kNN: Wu et al., arXiv:1805.01978. Symbols: N samples, F feature dimension, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfamc_cli.engine.models import Encoder, Features

_CHUNK = 512  # samples of a forward pass, and rows of a distance matrix


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    images: Tensor,
    *,
    device: torch.device,
    features: Features = "pre_feature",
    each: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Features of whole images, in eval mode and float32; the encoder is left as it was.

    Args:
        encoder: On `device`.
        images: (N, 3, S, S) uint8, anywhere.
        device: Where to compute.
        features: Which layer to read.
        each: Told after each chunk how many of N samples are done.

    Returns:
        (N, F) float32 on `device`.
    """
    training = encoder.training
    encoder.eval()
    parts = []
    for first in range(0, len(images), _CHUNK):
        chunk = images[first : first + _CHUNK].to(device, non_blocking=True).float() / 255
        parts.append(encoder.features(chunk, features=features))
        each(min(first + _CHUNK, len(images)), len(images))
    encoder.train(training)
    return torch.cat(parts)


@torch.no_grad()
def weighted_knn(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Classify by the k nearest neighbours in cosine, each weighing exp(cosine / temperature).

    Args:
        bank: (N, F) features with known labels.
        bank_labels: (N,) int64.
        queries: (M, F).
        classes: C.
        k: Neighbours; all of the bank where it has fewer.
        temperature: > 0.

    Returns:
        (M,) predicted labels. Memory stays bounded by chunks of queries.
    """
    bank = F.normalize(bank, dim=1)
    k = min(k, len(bank))
    predictions = []
    for chunk in queries.split(_CHUNK):
        cosine, nearest = (F.normalize(chunk, dim=1) @ bank.T).topk(k, dim=1)
        # the largest weight becomes 1, so that no temperature overflows
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), classes, device=bank.device)
        predictions.append(votes.scatter_add_(1, bank_labels[nearest], weight).argmax(1))
    return torch.cat(predictions)


def fit_linear(
    features: Tensor, labels: Tensor, *, classes: int, l2: float = 1e-4, iterations: int = 200
) -> nn.Linear:
    """Multinomial logistic regression to convergence, by full-batch L-BFGS from zero.

    Features are standardised within, and the scaling is folded into the weights that are returned.

    Args:
        features: (N, F).
        labels: (N,) int64.
        classes: C.
        l2: Weight of the squared weights, on standardised features, against the mean cross-entropy.
        iterations: At most so many.

    Returns:
        A linear layer from raw features to C logits, frozen.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    scaled = (features - mean) / std
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-5, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = F.cross_entropy(scaled @ weight.T + bias, labels) + l2 * weight.square().sum()
        weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
        return loss

    solver.step(closure)
    head = nn.Linear(features.shape[1], classes, device=features.device)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - head.weight @ mean)
    return head.requires_grad_(False)
