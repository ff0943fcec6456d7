"""What a recipe costs before anything runs: counts, parameters, arithmetic and memory. Never imports torch.

The encoder is torchvision's ResNet without its classifier, `pre_feature` and the projector, as in
cfamc_cli/engine/encoder.py; tests hold the counts here to the modules there. What a backbone of timm takes is measured
by cfamc_cli/engine/timm_backbone.py and handed in. Symbols: B images of a batch, V crops of an image, S side of a crop
in pixels, F backbone features.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.recipe.schema import DEPTHS, PADDING, AdamW, Model, NoAdversary, Recipe

Precision: TypeAlias = Literal["float32", "bfloat16"]
PER_IMAGES = 1_000  # what counts refer to where the number of images is unknown
_FLOAT = 4  # bytes of a float32
_PLACE = 8  # bytes of a place that max-pooling chose
_WORKSPACES = 2 * 32 * 2**20  # bytes that PyTorch lends cuBLAS on an H100, for training and for the next crops
PROCESS = 600 * 2**20  # bytes of a process that has torch in it and does nothing: resident, measured on Linux
_PAYS = 6e16  # floating-point operations of a run from which on it is compiled


class Part(NamedTuple):
    """A piece of a backbone that comes after another, in numbers of one view."""

    kept: int  # kept for the backward pass
    output: int
    largest: int  # the largest tensor in it
    places: int = 0  # that max-pooling chose
    again: bool = True  # whether train.memory = "recompute" makes it twice, and keeps its output alone


class Shape(NamedTuple):
    """What a backbone comes to, for views of one size."""

    features: int  # F
    parameters: int  # trained numbers
    products: int  # multiply-adds of the forward pass of one view
    parts: tuple[Part, ...]  # in order


Measured: TypeAlias = Mapping[int, Shape]  # by the size of a crop in pixels


@dataclass(frozen=True)
class Plan:
    """The cost of a run; memory and its parts are those of the phase that takes most.

    Training is counted; evaluations are not, nor the clusters of a phase, which take one forward pass of each image.
    """

    images: int  # training images that the counts refer to
    per_thousand: bool  # whether `images` only stands in for a number that is not known yet
    batches_per_epoch: int  # whole batches of an epoch of the first phase
    batches: int  # batches of the run
    weight_updates: int  # optimizer steps; each batch has one for every replay
    view_passes: int  # forward and backward passes of one view that train the weights
    attack_view_passes: int  # those for the steps of a PGD adversary: perturbed views only, no gradient of a weight
    parameters: int  # trained numbers of the whole encoder
    backbone_parameters: int  # those of the backbone
    flops_per_view: float  # forward and backward of one view, 2 per multiply-add, averaged over the groups of crops
    flops: int  # the run's, attack included, in whole floating-point operations
    memory: int  # an estimate of the peak in bytes, as PyTorch counts on CUDA: the parts below and workspaces
    weight_bytes: int  # weights, gradients, momentum (two of AdamW), and the average of the weights where there is one
    activation_bytes: int  # what one step keeps for its backward pass, and what that pass works on
    data_bytes: int  # the resident images; 0 where their size is unknown
    crop_bytes: int  # crops of this batch and the next, the perturbation, and both together
    memory_full: int  # the same with train.memory = "full"
    memory_recompute: int  # the same with train.memory = "recompute"
    precision: Precision  # what these are for


def plan(recipe: Recipe, images: int | None = None, *, measured: Measured | None = None) -> Plan:
    """Count what a run of `recipe` does.

    Args:
        recipe: A checked recipe.
        images: Training images, where they were counted; else those of a known set, or 1,000 of a folder.
        measured: A backbone that timm makes, for each size of a crop; None for our ResNets, which are counted here.

    Raises:
        CfamcError: As for `Recipe.require_fit`.
    """
    counted, parts = recipe.data.known_images if images is None else images, recipe.parts()
    count = max(PER_IMAGES, recipe.fewest_images) if counted is None else counted
    if counted is not None:
        recipe.require_fit(counted)
    return _in_turn([_plan_of_phase(part, count, measured, per_thousand=counted is None) for part in parts])


def _in_turn(plans: Sequence[Plan]) -> Plan:
    """The cost of phases that follow each other."""
    passes = [phase.view_passes for phase in plans]
    return replace(
        max(plans, key=lambda phase: phase.memory),
        batches_per_epoch=plans[0].batches_per_epoch,
        batches=sum(phase.batches for phase in plans),
        weight_updates=sum(phase.weight_updates for phase in plans),
        view_passes=sum(passes),
        attack_view_passes=sum(phase.attack_view_passes for phase in plans),
        flops_per_view=statistics.fmean([phase.flops_per_view for phase in plans], weights=passes),
        flops=sum(phase.flops for phase in plans),
        memory_full=max(phase.memory_full for phase in plans),
        memory_recompute=max(phase.memory_recompute for phase in plans),
    )


def _plan_of_phase(recipe: Recipe, count: int, measured: Measured | None, *, per_thousand: bool) -> Plan:
    """The cost of a recipe without phases over `count` images."""
    batch, batches = recipe.train.batch_size, recipe.batches(count)
    updates = batches * recipe.replays

    # Per image: arithmetic of all its crops, and of those that a PGD step passes.
    costs = [group.count * flops_per_view(recipe.model, measured, size=group.size) for group in recipe.crops]
    # A free adversary lives on the passes that train the weights, and what is spared is embedded by them.
    attacked = recipe.ascent_steps * recipe.moved_views
    attack_cost = (
        recipe.ascent_steps * sum(costs[recipe.spared_groups :]) * 2 // 3
    )  # no gradient of a weight is computed

    parameters, backbone_parameters = parameter_counts(recipe.model, measured)
    precision: Precision = "float32" if recipe.train.precision == "float32" else "bfloat16"
    full, again = (
        activation_bytes(recipe, measured, precision=precision, memory=keep) for keep in ("full", "recompute")
    )
    activations = full if recipe.train.memory == "full" else again
    pixels = sum(batch * group.count * 3 * group.size**2 for group in recipe.crops)
    kept_pixels = 2 if isinstance(recipe.adversary, NoAdversary) else 4  # the next crops are made meanwhile
    known = KNOWN_SETS.get(recipe.data.dataset)
    size = recipe.data.size or (known.size if known else 0)
    copies = 3 + bool(recipe.train.average) + isinstance(recipe.optimizer, AdamW)
    weight_bytes = copies * _FLOAT * parameters
    data_bytes, crop_bytes = count * 3 * size**2, _FLOAT * kept_pixels * pixels
    others = weight_bytes + data_bytes + crop_bytes + _WORKSPACES
    return Plan(
        images=count,
        per_thousand=per_thousand,
        batches_per_epoch=count // batch,
        batches=batches,
        weight_updates=updates,
        view_passes=updates * batch * recipe.views,
        attack_view_passes=batches * batch * attacked,
        parameters=parameters,
        backbone_parameters=backbone_parameters,
        flops_per_view=sum(costs) / recipe.views,
        flops=batch * (updates * sum(costs) + batches * attack_cost),
        memory=others + activations,
        weight_bytes=weight_bytes,
        activation_bytes=activations,
        data_bytes=data_bytes,
        crop_bytes=crop_bytes,
        memory_full=others + full,
        memory_recompute=others + again,
        precision=precision,
    )


def compiling_pays(costs: Plan) -> bool:
    """Whether `train.compile = "auto"` compiles a run on CUDA.

    Compiling costs one to two minutes of the host, and fuses what stands between the convolutions: about a quarter of a
    step. So it pays from some six minutes on, which the fastest cards of today (2e14 operations a second of such nets)
    fill with 6e16 operations; on a slower card the same work takes longer, and more is saved.
    """
    return costs.flops >= _PAYS


def duration(seconds: float) -> str:
    """Such as 12 s, 3 min 05 s or 1 h 37 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _Conv(NamedTuple):
    """A convolution without bias and the batch norm behind it."""

    inputs: int
    outputs: int
    kernel: int
    size: int  # side of what comes out

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.kernel**2

    @property
    def numbers(self) -> int:
        """What comes out, of one view."""
        return self.outputs * self.size**2


def _resnet(model: Model, size: int) -> Shape:
    """A ResNet of ours for crops of `size` pixels."""
    blocks = list(_blocks(model, size=size))
    convolutions = [conv for block in blocks for conv in block.convolutions]
    return Shape(
        features=model.feature_dim,
        parameters=sum(conv.weights + 2 * conv.outputs for conv in convolutions),
        products=sum(conv.weights * conv.size**2 for conv in convolutions),
        parts=tuple(block.part for block in blocks),
    )


class _Block(NamedTuple):
    """The stem, or a block: its convolutions, the last of which is the shortcut where `shortcut` is true."""

    convolutions: tuple[_Conv, ...]
    shortcut: bool
    pooled: int = 0  # numbers that come out of max-pooling

    @property
    def part(self) -> Part:
        """Of each convolution what goes into its batch norm and what comes out, but for shortcuts: of those a sum."""
        sizes = [conv.numbers for conv in self.convolutions]
        kept = sum(sizes) + sum(sizes[:-1] if self.shortcut else sizes) + self.pooled
        return Part(kept=kept, output=self.pooled or sizes[-1], largest=max(sizes), places=self.pooled)


def _blocks(model: Model, *, size: int) -> Iterator[_Block]:
    """The stem and the blocks for crops of `size` pixels, in order."""
    size = model.input_size or size
    if model.stem == "imagenet":
        side = _halved(_halved(size))  # max-pooling, kernel 3, stride 2
        yield _Block((_Conv(3, model.width, 7, _halved(size)),), shortcut=False, pooled=model.width * side**2)
    else:
        side = size + 2 * PADDING[model.stem] - 2
        yield _Block((_Conv(3, model.width, 3, side),), shortcut=False)
    inputs = model.width
    for stage, depth in enumerate(DEPTHS[model.backbone]):
        width = model.width * 2**stage
        outputs = 4 * width if model.backbone == "resnet50" else width
        for place in range(depth):
            strided = stage > 0 and place == 0
            before, side = side, _halved(side) if strided else side
            if model.backbone == "resnet50":
                main = [_Conv(inputs, width, 1, before), _Conv(width, width, 3, side), _Conv(width, outputs, 1, side)]
            else:
                main = [_Conv(inputs, width, 3, side), _Conv(width, width, 3, side)]
            shortcut = [_Conv(inputs, outputs, 1, side)] if strided or inputs != outputs else []
            yield _Block((*main, *shortcut), shortcut=bool(shortcut))
            inputs = outputs


def _halved(size: int) -> int:
    return (size + 1) // 2


def _shape(model: Model, measured: Measured | None, *, size: int) -> Shape:
    return _resnet(model, size) if measured is None else measured[model.input_size or size]


def _linears(model: Model, features: int) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the linear layers, all with bias: pre_feature, then the projector's two."""
    hidden = model.hidden_dim
    return (features, hidden), (hidden, hidden), (hidden, model.embedding_dim)


def parameter_counts(model: Model, measured: Measured | None = None) -> tuple[int, int]:
    """Trained numbers of the whole encoder, and of its backbone."""
    shape = _shape(model, measured, size=32 if measured is None else next(iter(measured)))
    linears = _linears(model, shape.features)
    heads = sum((inputs + 1) * outputs for inputs, outputs in linears) + 2 * 2 * model.hidden_dim
    return shape.parameters + heads, shape.parameters


def flops_per_view(model: Model, measured: Measured | None = None, *, size: int) -> int:
    """Floating-point operations of one view, forward and backward: 2 per multiply-add, backward twice the forward."""
    shape = _shape(model, measured, size=size)
    return 3 * 2 * (shape.products + sum(inputs * outputs for inputs, outputs in _linears(model, shape.features)))


def activation_bytes(
    recipe: Recipe,
    measured: Measured | None = None,
    *,
    precision: Precision,
    memory: Literal["full", "recompute"],
) -> int:
    """The most that a step holds for its backward pass at a time, in bytes.

    When that pass comes to a part, the part's own activations are there, two gradients, and of each part before it what
    `memory` keeps: all activations, or the output alone. A view of the crop in `precision` counts as the stem's.
    """
    width, highest, held = 4 if precision == "float32" else 2, 0, 0
    for group in recipe.crops:
        views, shape = recipe.train.batch_size * group.count, _shape(recipe.model, measured, size=group.size)
        held += views * 3 * group.size**2 * width if width < _FLOAT else 0
        for part in shape.parts:
            kept = views * (width * part.kept + _PLACE * part.places)
            highest = max(highest, held + kept + views * width * (part.output + part.largest))
            held += views * width * part.output if memory == "recompute" and part.again else kept
        held += views * width * _kept_by_heads(recipe.model, shape.features)
    return max(highest, held)


def activations_per_view(model: Model, *, size: int) -> int:
    """Numbers that one view keeps for the backward pass; the places that max-pooling chose are none."""
    shape = _resnet(model, size)
    return sum(part.kept for part in shape.parts) + _kept_by_heads(model, shape.features)


def _kept_by_heads(model: Model, features: int) -> int:
    """Of a linear layer and its batch norm what goes in and what comes out."""
    return features + 2 * 2 * model.hidden_dim + model.embedding_dim
