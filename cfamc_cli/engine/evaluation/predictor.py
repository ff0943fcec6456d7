"""A classifier as attacks see it: a function of one image's pixels, whoever else is in the batch.

The aggregated head reads every image through its own crops, and which these are it tells from the image, so that its
logits are a fixed and, but where two images meet, differentiable function of it; or its crops are themselves what is
perturbed, as the published evaluation does.
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
from cfamc_cli.recipe.schema import Norm
from cfamc_cli.store.records import Space

_CANDIDATES = 8  # nearest images by one product, among which the distance is worked out exactly


class _Network(nn.Module):
    """A classifier, read by one of the functions below."""

    def __init__(self, classifier: Classifier, reading: Callable[[Classifier, Tensor], Tensor]) -> None:
        super().__init__()
        self.classifier, self.reading = classifier, reading

    def forward(self, x: Tensor) -> Tensor:
        return self.reading(self.classifier, x)


class CropsOfImages:
    """Tells whose crops a point is read through: those of the clean image that it is nearest to, in L2.

    A point within eps of a clean image is never nearest to another, but where twice eps bridges the way between the
    two. Such images read the crops of the first of them, and so does every point within eps of any.

    Attributes:
        shared: Images that read the crops of another.
    """

    def __init__(self, clean: Tensor, indices: Tensor, *, eps: float, norm: Norm) -> None:
        """Prepare.

        Args:
            clean: The M clean images, (M, C, H, W) in [0, 1].
            indices: (M,) their places in the split, which fix their crops.
            eps: Radius of the ball in which the attacker stays.
            norm: Its norm.
        """
        self._centre = clean.flatten(1).mean(0)
        self._clean = clean.flatten(1) - self._centre  # (M, D); what is short is rounded less
        self._squares = self._clean.square().sum(1)
        first = torch.arange(len(clean))
        furthest = (2 * eps) ** 2 * (self._clean.shape[1] if norm == "linf" else 1)  # in L2, squared, of such a pair
        dual = 1 if norm == "linf" else 2
        for place in range(len(clean)):
            near = (self._squares[place] + self._distances(self._clean[place : place + 1])[0] <= furthest + 1).nonzero()
            delta = (
                self._clean[near.flatten()] - self._clean[place]
            )  # <e, delta> <= eps |delta|_dual for all |e| <= eps
            twins = near.flatten()[2 * eps * delta.norm(p=dual, dim=1) >= delta.square().sum(1)].cpu()
            groups = first[twins]
            first[torch.isin(first, groups)] = groups.min()
        self.shared = int((first != torch.arange(len(clean))).sum())
        self._indices = indices.cpu()[first].to(clean.device)

    def __deepcopy__(self, _memo: object) -> CropsOfImages:
        return self  # nothing in it changes

    def _distances(self, points: Tensor) -> Tensor:
        """Squared L2 from each of n points, centred, to each image, but for the point's own square: (n, M)."""
        return self._squares - 2 * points @ self._clean.T

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """The places in the split whose crops points (N, C, H, W) are read through, (N,)."""
        flat = points.detach().flatten(1) - self._centre
        near = self._distances(flat).topk(min(_CANDIDATES, len(self._clean)), dim=1, largest=False).indices
        exact = (self._clean[near] - flat[:, None]).square().sum(2)  # (N, candidates), without the product's rounding
        return self._indices[near.gather(1, exact.argmin(1, keepdim=True)).squeeze(1)]


Places = Callable[
    [Tensor], Tensor
]  # points (N, C, H, W) -> places in the split whose crops they are read through, (N,)


def _features(places: Places | None, classifier: Classifier, x: Tensor) -> Tensor:
    """What the head reads of images, (N, 3, H, W) to (N, F)."""
    return classifier.read(x, None if places is None else places(x))


def _of_images(places: Places | None, classifier: Classifier, x: Tensor) -> Tensor:
    """Logits of images, (N, 3, H, W) to (N, C)."""
    return classifier.logits(_features(places, classifier, x))


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


def as_predictor(classifier: Classifier, sample: Tensor, *, space: Space, places: Places | None = None) -> Predictor:
    """What is attacked.

    Args:
        classifier: Encoder and head, on the device of `sample`.
        sample: A few inputs: images, or what `stacked_crops` returns.
        space: Where the attacker acts.
        places: Whose crops an image is read through, for an aggregated head that reads images; other heads need none.
    """
    network = network_of(classifier, space=space, places=places)
    embed = partial(_features, places, classifier) if space == "image" else None
    return Predictor(network, frozen_copy(network, sample), (classifier,), embed)


def network_of(classifier: Classifier, *, space: Space, places: Places | None = None) -> nn.Module:
    """The logits of what is attacked, with arguments as for `as_predictor`."""
    match space:
        case "image":
            assert classifier.crops is None or places is not None, "an aggregated head reads the crops of some image"
            return _Network(classifier, partial(_of_images, places))
        case "crops":
            return _Network(classifier, _of_crops)
        case _:
            assert_never(space)
