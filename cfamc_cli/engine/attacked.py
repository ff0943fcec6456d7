"""A classifier as attacks see it: a function of one image's pixels, whoever else is in the batch.

The aggregated head reads every image through the same crops, so that its logits are a fixed and differentiable
function of the image; or its crops are themselves what is perturbed, as the published evaluation does.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from cfamc_cli.engine.attacks.fast import frozen_copy
from cfamc_cli.engine.attacks.verify import Predictor
from cfamc_cli.engine.heads import Classifier

Space = Literal["image", "crops"]


class _Features(nn.Module):
    """What the head reads of an image, (N, 3, H, W) to (N, F)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.read(x, torch.zeros(len(x), dtype=torch.int64))


class _Images(nn.Module):
    """Logits of images, (N, 3, H, W) to (N, C)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.features = _Features(classifier)

    def forward(self, x: Tensor) -> Tensor:
        return self.features.classifier.logits(self.features(x))


class _Crops(nn.Module):
    """Logits of crops that are stacked in the channels, (N, n 3, S, S) to (N, C)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.logits_of_crops(x.reshape(len(x), -1, 3, *x.shape[2:]).transpose(0, 1))


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
            whole = _Images(classifier)
            return Predictor(whole, frozen_copy(whole, sample), (classifier,), whole.features)
        case "crops":
            crops = _Crops(classifier)
            return Predictor(crops, frozen_copy(crops, sample), (classifier,))
        case _:
            assert_never(space)
