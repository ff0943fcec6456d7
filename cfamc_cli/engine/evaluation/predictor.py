"""A classifier as attacks see it: a function of one image's pixels, whoever else is in the batch.

The aggregated head reads every image through the same crops, so that its logits are a fixed and differentiable
function of the image; or its crops are themselves what is perturbed, as the published evaluation does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import assert_never

import torch
from torch import Tensor, nn

from cfamc_cli.engine.evaluation.folding import frozen_copy
from cfamc_cli.engine.evaluation.verify import Predictor
from cfamc_cli.engine.heads.classifier import Classifier
from cfamc_cli.store.records import Space


class _Network(nn.Module):
    """A classifier, read by one of the functions below."""

    def __init__(self, classifier: Classifier, reading: Callable[[Classifier, Tensor], Tensor]) -> None:
        super().__init__()
        self.classifier, self.reading = classifier, reading

    def forward(self, x: Tensor) -> Tensor:
        return self.reading(self.classifier, x)


def _features(classifier: Classifier, x: Tensor) -> Tensor:
    """What the head reads of images, (N, 3, H, W) to (N, F)."""
    return classifier.read(x, torch.zeros(len(x), dtype=torch.int64))


def _of_images(classifier: Classifier, x: Tensor) -> Tensor:
    """Logits of images, (N, 3, H, W) to (N, C)."""
    return classifier.logits(_features(classifier, x))


def _of_crops(classifier: Classifier, x: Tensor) -> Tensor:
    """Logits of crops that are stacked in the channels, (N, n 3, S, S) to (N, C)."""
    return classifier.logits_of_crops(x.reshape(len(x), -1, 3, *x.shape[2:]).transpose(0, 1))


def stacked_crops(classifier: Classifier, x: Tensor, indices: Tensor) -> Tensor:
    """The crops of images, stacked in the channels.

    Args:
        classifier: With an aggregated head.
        x: (N, 3, H, W) in [0, 1].
        indices: (N,) places of the images in the test split, which fix their crops.

    Returns:
        (N, n 3, S, S) in [0, 1].
    """
    return classifier.cut(x, indices).transpose(0, 1).flatten(1, 2).clamp(0, 1)


def as_predictor(classifier: Classifier, sample: Tensor, *, space: Space) -> Predictor:
    """What is attacked.

    Args:
        classifier: Encoder and head, on the device of `sample`.
        sample: A few inputs: images, or what `stacked_crops` returns.
        space: Where the attacker acts.
    """
    match space:
        case "image":
            network = _Network(classifier, _of_images)
            return Predictor(network, frozen_copy(network, sample), (classifier,), partial(_features, classifier))
        case "crops":
            network = _Network(classifier, _of_crops)
            return Predictor(network, frozen_copy(network, sample), (classifier,))
        case _:
            assert_never(space)
