"""The evaluator's side of an attack: what is attacked, what it costs, and whether an example counts.

Nothing here trusts an attack or a predictor: points are measured in float64, predictions are made again in batches of
other sizes, and the predictor is given back as it was found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfamc_cli.engine.attacks.search import Predict, blend, logits_at
from cfamc_cli.engine.ball import norms
from cfamc_cli.engine.device import full_precision, move
from cfamc_cli.recipe.schema import Norm

BATCHES = (1, 7, 64)  # sizes at which predictions are made again
_DRAWN = (12, 28, 64)  # samples that are looked at in each, as long as nothing odd is seen; else all are
_ROUNDING = 1e-6  # of eps and in image units: what float32 adds to a point on the surface of the ball
_SAME_LOGITS = (
    1e-4  # of a sample's largest logit, or the usual one if larger: up to this, float32 sums in another order
)


@dataclass(frozen=True)
class Predictor:
    """What is attacked."""

    logits: Predict  # logits (N, classes) from images in [0, 1], (N, C, H, W)
    # What attacks look through: the same function up to rounding, cheaper where that can be; of a transfer, the source.
    search: Predict
    modules: tuple[nn.Module, ...]  # whose parameters, buffers and mode it uses, such as encoder and head
    embed: Predict | None = None  # embeddings (N, D) from images; None where there is no representation to attack


class Meter:
    """Counts the single samples that went `forward` and `backward` since the last `read`."""

    def __init__(self, heard: Callable[[], None] = lambda: None) -> None:
        self.forward = 0
        self.backward = 0
        self._heard = heard

    def watch(self, predict: Predict) -> Predict:
        """The same function, counted."""

        def counted(images: Tensor) -> Tensor:
            self.forward += len(images)
            self._heard()
            out = predict(images)
            if out.requires_grad:
                out.register_hook(self._went_back)
            return out

        return counted

    def watched(self, predictor: Predictor) -> Predictor:
        """The same predictor, counted."""
        embed = None if predictor.embed is None else self.watch(predictor.embed)
        return Predictor(self.watch(predictor.logits), self.watch(predictor.search), predictor.modules, embed)

    def _went_back(self, grad: Tensor) -> None:
        self.backward += len(grad)

    def read(self) -> tuple[int, int]:
        """Forward and backward passes since the last reading."""
        counts = self.forward, self.backward
        self.forward = self.backward = 0
        return counts


@dataclass(frozen=True)
class Traces:
    """What an evaluation found and left in the modules of a predictor."""

    training: int  # modules that were in training mode at the start; they were evaluated in eval mode
    not_float32: int  # parameters and buffers of another floating type
    changed: int  # parameters and buffers whose bytes, and parameters whose `.grad`, are not what they were


@contextmanager
def undisturbed(modules: tuple[nn.Module, ...], device: torch.device) -> Iterator[Callable[[], Traces]]:
    """Eval mode, full float32, parameters that ask for no gradient, a random state of its own; all undone at the end.

    Yields:
        A function that says what was found, and what has changed so far.
    """
    parts = list({id(m): m for module in modules for m in module.modules()}.values())
    modes = [m.training for m in parts]
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    wanted = [p.requires_grad for p in parameters]
    before, grads = _digests(modules), [p.grad for p in parameters]
    grad_bytes = [None if g is None else _digest(g) for g in grads]
    odd = sum(t.is_floating_point() and t.dtype != torch.float32 for m in modules for t in m.state_dict().values())

    def traces() -> Traces:
        after = _digests(modules)
        changed = sum(a != b for a, b in zip(before, after, strict=True))
        for parameter, grad, held in zip(parameters, grads, grad_bytes, strict=True):
            changed += parameter.grad is not grad or (grad is not None and _digest(grad) != held)
        return Traces(training=sum(modes), not_float32=odd, changed=changed)

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), full_precision(device):
        try:
            for part in parts:
                part.training = False
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield traces
        finally:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode
            for parameter, want in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(want)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _digests(modules: tuple[nn.Module, ...]) -> list[str]:
    """One digest for each parameter and buffer, persistent or not."""
    tensors = [t for m in modules for group in (m.parameters(), m.buffers()) for t in group]
    return [_digest(t) for t in tensors]


def in_region(x: Tensor, points: Tensor, *, eps: float, norm: Norm) -> Tensor:
    """Whether each point is an image within eps of its clean image, measured in float64.

    Args:
        x: Clean images in [0, 1], (N, C, H, W).
        points: What an attack returned.
        eps: Radius of the ball; float32 rounding of 1e-6 (2 parts in a million of eps for L2) is allowed on top.
        norm: Its norm.

    Returns:
        (N,) bool. False for all where the shape is not that of x.
    """
    if points.shape != x.shape:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    wide = points.cpu().double()  # MPS has no float64
    finite = wide.isfinite().flatten(1).all(1)
    boxed = ((wide >= 0) & (wide <= 1)).flatten(1).all(1)
    distance = norms(wide - x.cpu().double(), norm=norm)
    allowed = eps * (1 + 2 * _ROUNDING) + _ROUNDING if eps > 0 else 0.0
    return (finite & boxed & (distance <= allowed)).to(x.device)


@dataclass(frozen=True)
class Seen:
    """Predictions as the evaluator made them, for N samples."""

    label: Tensor  # predicted class at full batch, (N,)
    other: Tensor  # a class that it is predicted as at another batch size, `label` where there is none, (N,)
    finite: Tensor  # whether all logits are finite at every batch size, (N,)
    steady: Tensor  # whether the predicted class is the same at every batch size, (N,)
    moved: Tensor  # largest change of a sample's logits relative to the largest, (N,); 0 within rounding


def look(predict: Predict, images: Tensor, y: Tensor, *, generator: torch.Generator) -> Seen:
    """Predict once with all images together, and 64, 28 and 12 of them again in batches of 64, of 7 and alone.

    They are drawn from those that are right and those that are not by turns. If one is odd in any batch, all samples
    are looked at in all. So a predictor that depends on its batch for every sample is found out, and all that it shows
    with it. One that does for a share p alone gets by with (1 - p)^28 in small batches, at every block and stage; one
    that was made for the seed and knows who is drawn gets by.

    Args:
        predict: Logits from images.
        images: (N, C, H, W) in [0, 1], N at least 1.
        y: Labels, (N,).
        generator: CPU generator of who is looked at again.
    """
    whole = logits_at(predict, images)  # (N, classes)
    order = move(torch.randperm(len(images), generator=generator), images.device)
    right = (whole.argmax(1) == y)[order]
    order = order[torch.where(right, right.cumsum(0), (~right).cumsum(0)).argsort(stable=True)]
    everyone = torch.arange(len(images), device=images.device)
    seen = _compared(predict, images, whole, [order[:most].sort().values for most in _DRAWN])
    odd = ~seen.finite | ~seen.steady | (seen.moved > 0)
    if len(images) > min(_DRAWN) and bool(odd.any()):
        return _compared(predict, images, whole, [everyone] * len(BATCHES))
    return seen


def _compared(predict: Predict, images: Tensor, whole: Tensor, rows: Sequence[Tensor]) -> Seen:
    """Logits at full batch, (N, classes), held against those of some rows for each size of a batch."""
    label, finite = whole.argmax(1), whole.isfinite().all(1)
    other, moved = label, torch.zeros(len(images), device=images.device)
    scale = whole.abs().amax(1).clamp_min(1e-6)
    scale = torch.maximum(scale, scale.nanmedian())  # sums that cancel are as unsure as others, and smaller
    for size, looked_at in zip(BATCHES, rows, strict=True):
        made = torch.cat([logits_at(predict, images[part]) for part in looked_at.split(size)])
        again = whole.index_copy(0, looked_at, made.to(whole.dtype))
        finite = finite & again.isfinite().all(1)
        other = torch.where(other == label, again.argmax(1), other)
        moved = torch.maximum(moved, torch.nan_to_num((again - whole).abs().amax(1) / scale, nan=0.0, posinf=0.0))
    return Seen(label, other, finite, other == label, torch.where(moved > _SAME_LOGITS, moved, 0.0))


@dataclass(frozen=True)
class Examined:
    """What became of N samples at the points of an attack."""

    points: Tensor  # where they are images within the ball, else the clean images, (N, C, H, W)
    valid: Tensor  # whether they are, (N,)
    seen: Seen  # predictions at `points`
    shown: Tensor  # predicted class, as wrong as it is at any batch size, (N,)
    broken: Tensor  # lost to a point that counts, (N,)


def examine(
    predict: Predict, x: Tensor, points: Tensor, y: Tensor, *, eps: float, norm: Norm, generator: torch.Generator
) -> Examined:
    """See whether points break samples; who made them has no say.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1] that are classified right, (N, C, H, W), N at least 1.
        points: What an attack returned.
        y: Labels, (N,).
        eps: As for `in_region`; infinite for any image.
        norm: Its norm.
        generator: As for `look`.
    """
    valid = in_region(x, points, eps=eps, norm=norm)
    points = blend(valid, points, x) if points.shape == x.shape else x
    seen = look(predict, points, y, generator=generator)
    shown = torch.where(seen.label != y, seen.label, seen.other)
    return Examined(points, valid, seen, shown, valid & seen.finite & (shown != y))
