"""Reading a frozen encoder: features, nearest neighbours and linear heads on features that are extracted once.

Weighted kNN: Wu et al., arXiv:1805.01978. Symbols: N samples, F feature dimension, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.device import Precision, autocast, full_precision, held_to, move
from cfamc_cli.engine.distributed import ALONE, World, pooled
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.heads.classifier import (
    Classifier,
    CropSource,
    LinearHead,
    LoadedEncoder,
    crop_source,
    feature_dim,
    read_features,
)
from cfamc_cli.engine.optim import learning_rate
from cfamc_cli.engine.randomness import addressed_generator, epoch_order
from cfamc_cli.engine.sink import Talk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.schema import AggregatedCrops, Cosine, Features, Knn, Linear, Recipe
from cfamc_cli.store.records import Accuracy, ClassAccuracy

_CHUNK = 512  # samples of a forward pass, and rows of a distance matrix
_ROWS = 4096  # cached features of one product
_MAPPED = 500  # samples of a plane
CONVERGED = 1e-4  # largest entry of the gradient at which a head counts as converged: the loss is then within 1e-5

Each = Callable[[int, int], None]  # told how many of how many are done


def _silent(_done: int, _total: int) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Task:
    """A head that is to be fitted to an encoder, and judged."""

    loaded: LoadedEncoder
    recipe: Recipe  # [probe] says which head; the seed, and the crops of an aggregated one, are of the whole
    train: ImageSet  # labelled
    test: ImageSet  # labelled; the test images, or training images that are held out
    talk: Talk  # hears progress, and of a head that did not converge
    world: World = ALONE  # the processes that share the reading of features

    def labels(self) -> Tensor:
        """(N,) int64 of the training images, where the encoder is."""
        return self.train.require_labels().to(self.loaded.device)

    def progress(self, what: str) -> Each:
        """Tells how far a part of the task is."""
        return lambda done, total: self.talk.progress(what, done, total, {})


@dataclass(frozen=True)
class Plane:
    """Features of every `stride`-th sample at their first two principal components."""

    stride: int
    points: Tensor  # (N, 2), on the CPU
    explained: tuple[float, float]  # share of the variance along each


@dataclass(frozen=True)
class Fitted:
    """A head that is done, and what it answers."""

    classifier: Classifier | None  # None for knn, which has no weights
    train: Tensor | None  # (N,) predicted labels of the images that it was fitted to; None for knn
    test: Tensor  # (M,) predicted labels of the images that it is judged on
    converged: bool | None = None  # whether the protocol "converged" came to the optimum; None for the others
    precision: Precision = "float32"  # of the passes that it was fitted by
    plane: Plane | None = None  # of the test features; None for heads that keep none


def fit_on_features(task: Task, settings: Linear | AggregatedCrops | Knn) -> Fitted | None:
    """Extract the features of whole splits once, and fit the head of `settings` to them.

    Returns:
        The head; None in processes that do not lead: they read features, and one of them fits.

    Raises:
        CfamcError: Exit 3; the head diverged.
    """
    encoder, device, seed, classes = task.loaded.encoder, task.loaded.device, task.recipe.seed, len(task.train.classes)
    sources: list[CropSource | None] = [None, None]  # of what it is fitted to, and what it is judged on
    if isinstance(settings, AggregatedCrops):
        sources = [crop_source(task.recipe, settings, split=split) for split in ("train", "test")]
    features, queries = (
        extract_features(
            encoder,
            part.images,
            device=device,
            features=settings.features,
            crops=crops,
            each=task.progress(f"features of {part.split}"),
            world=task.world,
        )
        for part, crops in zip((task.train, task.test), sources, strict=True)
    )
    if not task.world.leads:
        return None
    labels, each = task.labels(), task.progress(f"fitting the {settings.head} head")
    if isinstance(settings, Knn):
        k, temperature = settings.k, settings.temperature
        nearest = weighted_knn(features, labels, queries, classes=classes, k=k, temperature=temperature, each=each)
        return Fitted(None, None, nearest, plane=principal_plane(queries))
    statistics = features if isinstance(settings, Linear) and settings.standardize else None
    head = new_head(features.shape[1], classes, seed=seed, device=device, statistics=statistics)
    converged = None
    if isinstance(settings, Linear) and settings.protocol == "converged":
        gradient = fit_converged(head, features, labels, l2=settings.l2, each=each)
        converged = gradient <= CONVERGED
        if not converged:
            task.talk.warning(f"the head had not converged when its time was up: gradient {gradient:.2g}")
    else:
        fit_by_batches(head, features, labels, settings=settings, seed=seed, each=each)
    classifier = Classifier(encoder, head, features=settings.features, crops=sources[1])
    answers = predict(head, features), predict(head, queries)
    return Fitted(classifier, *answers, converged, plane=principal_plane(queries))


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    images: Tensor,
    *,
    device: torch.device,
    features: Features = "pre_feature",
    crops: CropSource | None = None,
    each: Each = _silent,
    world: World = ALONE,
    precision: Precision = "float32",
) -> Tensor:
    """Features of images, in eval mode; the encoder is left as it was.

    Args:
        encoder: On `device`.
        images: (N, 3, S, S) uint8, anywhere: a whole split where `crops` are read, for these go by index.
        device: Where to compute.
        features: Which layer to read.
        crops: Read the mean over these crops of each image; None reads the whole image.
        each: Told after each chunk how many of N samples are done.
        world: The processes that share the chunks, each called with the same arguments.
        precision: Of the passes.

    Returns:
        (N, F) float32 on `device`, in every process.
    """
    training = encoder.training
    encoder.eval()
    read = torch.empty(len(images), feature_dim(encoder, features), device=device)  # filled in place: no room for two
    size = _CHUNK if crops is None else max(1, _CHUNK // crops.group.count)
    with held_to(device, precision), autocast(device, precision):
        for first in range(0, len(images), size * world.size):
            last = min(first + size * world.size, len(images))
            own = torch.arange(first, last)[world.rank * size :][:size]  # the same chunks however many share them
            part = read[:0]
            if len(own):
                x = _as_floats(images[own[0] : own[-1] + 1], device=device)
                part = read_features(encoder, x, own, features=features, crops=crops).float()
            read[first:last] = torch.cat(pooled(part, world))
            each(last, len(images))
    encoder.train(training)
    return read


def _chunks(images: Tensor, size: int, *, device: torch.device, each: Each) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (n, 3, S, S) in [0, 1] and their indices (n,), n of them at most `size`."""
    for indices in torch.arange(len(images)).split(size):
        first, last = int(indices[0]), int(indices[-1]) + 1
        yield _as_floats(images[first:last], device=device), indices
        each(last, len(images))


def _as_floats(images: Tensor, *, device: torch.device) -> Tensor:
    """Images of uint8 in [0, 1], on the device."""
    return move(images, device).float() / 255


@torch.no_grad()
def weighted_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    each: Each = _silent,
) -> Tensor:
    """Classify by the k nearest neighbours in cosine, each weighing exp(cosine / temperature).

    Args:
        bank: (N, F) features with known labels.
        bank_labels: (N,) int64.
        queries: (M, F).
        classes: C.
        k: Neighbours; all of the bank where it has fewer.
        temperature: > 0.
        each: Told after each chunk of queries.

    Returns:
        (M,) predicted labels. Memory stays bounded by chunks of queries.
    """
    bank = F.normalize(bank, dim=1)
    k = min(k, len(bank))
    predictions = []
    for chunk in torch.split(queries, _CHUNK):
        cosine, nearest = (F.normalize(chunk, dim=1) @ bank.T).topk(k, dim=1)
        # the largest weight becomes 1, so that no temperature overflows
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), classes, device=bank.device)
        predictions.append(votes.scatter_add_(1, bank_labels[nearest], weight).argmax(1))
        each(sum(map(len, predictions)), len(queries))
    return torch.cat(predictions)


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, *, device: torch.device, each: Each = _silent) -> Tensor:
    """Predicted labels (N,) of images (N, 3, S, S) uint8, in float32 and in the mode that the classifier is in."""
    chunks = _chunks(images, _CHUNK, device=device, each=each)
    with full_precision(device):
        return torch.cat([classifier(x, indices).argmax(1) for x, indices in chunks])


@torch.no_grad()
def predict(head: LinearHead, features: Tensor) -> Tensor:
    """Predicted labels (N,) from features (N, F), in chunks."""
    return torch.cat([head(chunk).argmax(1) for chunk in torch.split(features, _ROWS)])


def principal_plane(features: Tensor) -> Plane | None:
    """The plane in which features (N, F) of at most 500 evenly chosen samples vary most; None for fewer than 3.

    By the eigenvectors of their inner products; a component's sign makes its largest entry positive.
    """
    if len(features) < 3:
        return None
    stride = -(-len(features) // _MAPPED)
    chosen = features[::stride].cpu().double()
    chosen -= chosen.mean(0)
    values, vectors = torch.linalg.eigh(chosen @ chosen.T)
    values, vectors = values.flip(0)[:2].clamp(min=0), vectors.flip(1)[:, :2]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    first, second = (values / chosen.square().sum().clamp(min=1e-12)).tolist()
    return Plane(stride, vectors * signs * values.sqrt(), (first, second))


def confusion_of(truth: Tensor, answers: Tensor, *, classes: int) -> tuple[tuple[int, ...], ...]:
    """How often samples of each class (a row) were taken for each class (a column).

    Args:
        truth: (N,) int64 labels.
        answers: (N,) predicted labels.
        classes: C.
    """
    counts = torch.bincount(truth * classes + answers, minlength=classes**2)
    return tuple(map(tuple, counts.view(classes, classes).tolist()))


def accuracy_by_class(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> tuple[ClassAccuracy, ...]:
    """The accuracy on each class, whose names are in the order of the labels."""
    return tuple(
        ClassAccuracy(name=name, accuracy=Accuracy.of(row[label], sum(row)) if sum(row) else None)
        for label, (name, row) in enumerate(zip(names, confusion, strict=True))
    )


def new_head(
    dim: int, classes: int, *, seed: int, device: torch.device, statistics: Tensor | None = None
) -> LinearHead:
    """A linear head as torch draws one, from the seed alone.

    Args:
        dim: F.
        classes: C.
        seed: The recipe's seed.
        device: Where to put it.
        statistics: Features (N, F) whose mean and deviation standardise what the head reads; None for raw features.
    """
    head = LinearHead(dim, classes, standardized=statistics is not None)
    bound = dim**-0.5
    generator = addressed_generator("head", seed)
    with torch.no_grad():
        head.weight.uniform_(-bound, bound, generator=generator)
        head.bias.uniform_(-bound, bound, generator=generator)
        if statistics is not None:
            head.mean, head.std = standardization(statistics)
    return head.to(device)


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) of features (N, F); a feature that never changes keeps its scale."""
    std, mean = torch.std_mean(features, 0, correction=0)
    return mean, torch.where(std > 1e-6, std, 1.0)


def fit_by_batches(
    head: LinearHead,
    features: Tensor,
    labels: Tensor,
    *,
    settings: Linear | AggregatedCrops,
    seed: int,
    each: Each = _silent,
) -> None:
    """Train a linear head on cached features; every sample once an epoch, the last batch as well.

    "linear" is trained by Adam at a constant rate, "crops" by SGD with a cosine that falls each epoch.

    Args:
        head: From `new_head`, on the device of the features.
        features: (N, F).
        labels: (N,) int64.
        settings: Epochs, batch size and those of the optimizer.
        seed: The recipe's seed, for the order of each epoch.
        each: Told after each epoch.

    Raises:
        CfamcError: Exit 3; the weights are not finite any more.
    """
    optimizer: torch.optim.Optimizer
    match settings:
        case Linear():
            fused = features.device.type in ("cpu", "cuda")
            optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr, fused=fused)
        case AggregatedCrops(lr=lr, momentum=momentum, weight_decay=decay):
            optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=momentum, weight_decay=decay, foreach=True)
        case _:
            assert_never(settings)
    rows = torch.empty(min(settings.batch_size, len(features)), features.shape[1], device=features.device)
    for epoch in range(settings.epochs):
        if isinstance(settings, AggregatedCrops):
            falling = Cosine(name="cosine")
            rate = learning_rate(epoch, base=settings.lr, schedule=falling, updates=settings.epochs)
            optimizer.param_groups[0]["lr"] = rate
        order = epoch_order(seed, epoch, len(features)).to(features.device)
        for chosen in torch.split(order, settings.batch_size):
            batch = torch.index_select(features, 0, chosen, out=rows[: len(chosen)])  # half the time of a new tensor
            logits = (head.weight @ head.scaled(batch).T).T + head.bias  # faster backward than head(batch): 0.85 a step
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
        if not torch.isfinite(head.weight).all():
            raise CfamcError(
                f"the head diverged in epoch {epoch + 1}", hint="lower probe.lr", exit_code=ExitCode.DIVERGED
            )
        each(epoch + 1, settings.epochs)


def fit_converged(
    head: LinearHead,
    features: Tensor,
    labels: Tensor,
    *,
    l2: float,
    iterations: int = 500,
    tolerance: float = 1e-5,
    each: Each = _silent,
) -> float:
    """Multinomial logistic regression to convergence, by full-batch L-BFGS from zero.

    The weights are W = V L^-1 with L L^T = cov(features) / C + 2 l2, about the Hessian: V sees features that are white,
    however correlated they are, and some dozens of iterations are enough. The optimum is that of W.

    Args:
        head: From `new_head`; its weights see the features scaled as it says.
        features: (N, F), on the device of the head.
        labels: (N,) int64.
        l2: Weight of the squared weights, against the mean cross-entropy; biases are free.
        iterations: At most so many.
        tolerance: Stop where no entry of the gradient is larger.
        each: Told after each look at the whole data.

    Returns:
        The largest entry of the gradient at the end, of V and of the bias; at most the tolerance where it converged.
    """
    scaled = head.scaled(features)
    classes = len(head.bias)
    mean = scaled.mean(0)
    with torch.no_grad():
        hessian = torch.zeros(len(mean), len(mean), device=mean.device)
        for part in torch.split(scaled, _ROWS):
            hessian.addmm_((part - mean).T, part - mean, alpha=1 / (len(scaled) * classes))
        hessian.diagonal().add_(2 * l2 + 1e-6 * hessian.diagonal().amax())
        wide = hessian.cpu().double()  # correlated features are too much for float32's Cholesky
        lower = torch.linalg.cholesky(wide).to(hessian)
    white = torch.zeros_like(head.weight).requires_grad_()
    bias = torch.zeros_like(head.bias).requires_grad_()  # of centred features
    parameters = [white, bias]

    def weight() -> Tensor:
        solved: Tensor = torch.linalg.solve_triangular(lower, white, upper=False, left=False)
        return solved.contiguous()

    solver = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    looks, largest = 0, math.inf

    def closure() -> Tensor:
        nonlocal looks, largest
        with torch.enable_grad():
            weights = weight()
            logits = F.linear(scaled, weights, bias - weights @ mean)
            loss = F.cross_entropy(logits, labels) + l2 * weights.square().sum()
        white.grad, bias.grad = (part.contiguous() for part in torch.autograd.grad(loss, parameters))
        looks += 1
        largest = max(float(part.grad.abs().max()) for part in parameters if part.grad is not None)
        each(min(looks, 2 * iterations - 1), 2 * iterations)
        return loss

    solver.step(closure)
    with torch.no_grad():
        head.weight.copy_(weight())
        head.bias.copy_(bias - head.weight @ mean)
    each(2 * iterations, 2 * iterations)
    return largest
