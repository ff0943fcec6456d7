"""The recipe: everything that changes a number, as frozen Pydantic models of one TOML file.

A system of arXiv:2501.03507 is one point of objective x adversary x crops. Images live in [0, 1]; eps and step sizes
are exact text ("8/255") in that range, so that a record says what was meant and not what a float made of it.
This module never imports torch. Reading files, overrides and the wording of errors live beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.errors import invalid

# Blocks of the four stages of a ResNet.
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
_LONGEST = 10_000  # sqrt(3) times the side of an image in pixels is no more
TIMM = "timm:"  # before the name of a backbone that the library timm makes
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?|\.[0-9]+", re.ASCII)
_RATIO = re.compile(r"([0-9]+(?:\.[0-9]+)?)/([0-9]+)", re.ASCII)


def exact(value: object) -> str:
    """Check a length of a pixel's range [0, 1] and return its exact text.

    Args:
        value: Text such as "8/255" or "0.03", or a TOML float.

    Raises:
        ValueError: Not such a number, or outside [0, 1]; says what was probably meant.
    """
    text = _number_text(value)
    if fraction(text) > 1:
        raise ValueError(_beyond_a_pixel(text))
    return text


def length(value: object) -> str:
    """Check a length of images, which in L2 may be larger than 1, and return its exact text.

    Args:
        value: As for `exact`.

    Raises:
        ValueError: Not such a number, or longer than the diagonal of any image.
    """
    text = _number_text(value)
    if fraction(text) > _LONGEST:
        raise ValueError(f"{text} is longer than the difference of any two images")
    return text


def _number_text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | float | int):
        raise ValueError('must be text such as "8/255" or a number such as 0.03')
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError("is larger than 1: images live in [0, 1]")
    text = value.strip() if isinstance(value, str) else repr(value)
    if len(text) > 40:
        raise ValueError("must be a short number such as 8/255 or 0.03")
    ratio = _RATIO.fullmatch(text)
    if ratio is None and _NUMBER.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a number such as 8/255 or 0.03 between 0 and 1")
    if ratio is not None and int(ratio[2]) == 0:
        raise ValueError(f"{text!r} divides by zero")
    return text


def _beyond_a_pixel(text: str) -> str:
    value = fraction(text)
    whole = value.denominator == 1 and value <= 255
    return f"{text} is larger than 1: " + (f"did you mean {int(value)}/255?" if whole else "images live in [0, 1]")


def fraction(text: str) -> Fraction:
    """The value of exact text such as "8/255"."""
    above, _, below = text.partition("/")
    return Fraction(above) / Fraction(below or 1)


def number(text: str) -> float:
    """The float nearest to exact text such as "8/255"."""
    return float(fraction(text))


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the lower end {pair[0]} is above the upper end {pair[1]}")
    return pair


def _within_image(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[1] > 1:
        raise ValueError(f"{pair[1]} is larger than the image; shares of its area lie in (0, 1]")
    return pair


def _jitter_in_range(jitter: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if max(jitter[:3]) > 1:
        raise ValueError("brightness, contrast and saturation, the first three numbers, lie in [0, 1]")
    if jitter[3] > 0.5:
        raise ValueError("hue, the fourth number, lies in [0, 0.5]")
    return jitter


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("a path cannot hold a NUL character")
    return text


def _backbone(name: str) -> str:
    if name in DEPTHS or re.fullmatch(TIMM + "[a-z0-9_]{1,100}", name, re.ASCII):
        return name
    if name.startswith(TIMM):
        raise ValueError(f'"{TIMM}" stands before a name of small letters, digits and _, without a tag of weights')
    expected = ", ".join(f"'{known}'" for known in (*DEPTHS, f"{TIMM}NAME"))
    raise PydanticCustomError("literal_error", "must be one of {expected}", {"expected": expected})


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """Check what timm's `create_model` shall be told beside the name."""
    for key, value in options.items():
        if key in _OURS:
            raise ValueError(
                f'"{key}" is not yours to set: a backbone begins untrained, reads RGB and has no classifier'
            )
        if "drop" in key:
            raise ValueError(f'"{key}" cannot be set: nothing is dropped, since an adversary needs passes that repeat')
        numbers = [value]
        while any(isinstance(part, list) for part in numbers):
            numbers = [inner for part in numbers for inner in (part if isinstance(part, list) else [part])]
        if not numbers or not all(isinstance(part, bool | int | float | str) for part in numbers):
            raise ValueError(f'"{key}" must be a number, text, true, false or a list of those')
        if any(isinstance(part, int | float) and not abs(part) <= 65536 for part in numbers):
            raise ValueError(f'"{key}" is out of range: numbers lie within 65,536 of 0')
    return options


# What `create_model` is told by us, or never
_OURS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "model_name"}
_OURS |= {"num_classes", "in_chans", "features_only", "device", "dtype", "scriptable", "exportable", "no_jit"}


def _no_number(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):  # Pydantic would take 1 for true
        raise ValueError(f'must be "auto", true or false, not {value}')
    return value


Norm = Literal["linf", "l2"]  # how the length of a perturbation is measured
SearchPrecision = Literal["float32", "tf32"]
Features = Literal["pre_feature", "backbone"]  # what a head reads
Stem = Literal["cifar", "imagenet", "cifar-padded", "cifar-linear"]  # the first layers of a ResNet
PADDING: dict[Stem, int] = {"cifar": 1, "imagenet": 3, "cifar-padded": 2, "cifar-linear": 1}  # of its convolution
Judged = Literal["holdout", "test"]  # the images that results are measured on
Split = Literal["train"] | Judged
# in units of the range of pixels, which is [0, 1]: text such as "8/255", or 0.03
Exact = Annotated[str, BeforeValidator(exact, json_schema_input_type=str | float)]
# in units of the range of pixels, which is [0, 1]: text such as "8/255", or 0.03; in L2 it may be above 1
Length = Annotated[str, BeforeValidator(length, json_schema_input_type=str | float)]
Eps = Exact  # how far a perturbation may go in any pixel
StepSize = Exact  # how far each ascent step goes
AscentSteps = Annotated[int, Field(ge=1, le=1000)]  # projected ascent steps of each attack
Start = Literal["zero", "random"]  # where a perturbation begins: at the clean image, or drawn from the ball
Views = Literal["all", "second"]  # the groups of crops that are perturbed: all, or the second alone
AttackSteps = Annotated[int, Field(ge=1, le=100_000)]  # gradient steps of each run
Restarts = Annotated[int, Field(ge=1, le=1000)]  # runs; each takes up what those before it left standing
Targets = Annotated[int, Field(ge=1, le=100_000)]  # likeliest wrong classes that are aimed at
Momentum = Annotated[float, Field(ge=0, lt=1)]  # of SGD
Decay = Annotated[float, Field(ge=0, lt=1)]  # share of what was before that an update keeps
PathText = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Temperature = Positive  # of the softmax over similarities
Deviation = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
HeadEpochs = Count  # passes over the training images
HeadBatch = Count  # images
Epochs = Annotated[float, Field(gt=0, le=100_000)]  # passes over the images, replays not counted; fractions allowed
BatchSize = Annotated[int, Field(ge=2, le=1_000_000)]  # images, over all processes
Range = Annotated[tuple[Positive, Positive], Field(strict=False), AfterValidator(_ordered)]
Jitter = Annotated[
    tuple[NonNegative, NonNegative, NonNegative, NonNegative], Field(strict=False), AfterValidator(_jitter_in_range)
]


class Outside(Enum):
    """The mark of a field that is no part of what makes the encoder; `outside` lists them.

    The digest, the columns of a comparison and the check of a resumed run all read these marks, and nothing else.
    """

    ENCODER = "another value makes another run of the same recipe"
    RUN = "a run may even be resumed with another value"


@dataclass(frozen=True)
class Later:
    """The mark of a field that came, or whose default moved, after runs of the recipe were digested.

    At its default it counts as what those runs had: as `before`, or where that is None as not there. `as_before` does
    this, and the digest, the columns of a comparison and the check of a resumed run all see recipes through it.
    """

    before: object = None


class Table(BaseModel):
    """A table of the recipe: frozen, strict, without unknown keys, and without settings that have no effect.

    A setting that others of its table switch off is refused where it was given, and left out where the table is
    written, so that what is written can be read back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def idle(self) -> dict[str, str]:
        """The fields that have no effect beside the others of this table, and why."""
        return {}

    def fault(self) -> tuple[str, str] | None:
        """A field that cannot be what it is beside the others of this table, and what is wrong with it."""
        return None

    @model_validator(mode="after")
    def _refuse_idle_and_faulty(self) -> Self:
        given = {field: f"has no effect: {why}" for field, why in self.idle().items() if field in self.model_fields_set}
        if not given and (fault := self.fault()) is not None:
            given = dict([fault])
        if given:
            message = "; ".join(f"{field} {why}" for field, why in given.items())
            raise PydanticCustomError("at_field", "{message}", {"fields": given, "message": message})
        return self

    def unwritten(self) -> set[str]:
        """The fields that are left out where the table is written."""
        return set(self.idle())

    @model_serializer(mode="wrap")
    def _leave_out_unwritten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unwritten = self.unwritten()
        return {field: value for field, value in handler(self).items() if field not in unwritten}


class Data(Table):
    """Which images; labels are read where there are some, and used by no objective but supcon."""

    # "fashion-mini" is embedded; "folder" is one of your own, with train/ and test/.
    dataset: Literal["fashion-mini", "cifar10", "cifar100", "fashion-mnist", "svhn", "stl10", "folder"]
    # The folder of "folder"; where the raw files of the others lie, else the cache.
    root: Annotated[PathText | None, Outside.RUN] = None
    size: Annotated[int, Field(ge=8, le=1024)] | None = None  # pixels; resize the shorter side, then centre crop
    # Training images, evenly of all classes and the same for every seed, that are kept for choosing: training and heads
    # never see them, and results are measured on them unless the test images are asked for.
    holdout: Annotated[int, Field(ge=0, le=10**9), Later()] = 0
    limit: Count | None = None  # the first images of a seeded shuffle of the training split, without those held out

    def fault(self) -> tuple[str, str] | None:
        missing = "root", 'missing; dataset "folder" needs the folder that holds train/ and test/'
        return missing if self.dataset == "folder" and self.root is None else None

    @property
    def known_images(self) -> int | None:
        """Images to train on, as far as the recipe tells: None for a folder without a limit."""
        known = KNOWN_SETS.get(self.dataset)
        if known is None:
            return self.limit  # a folder may have fewer
        left = max(0, known.train - self.holdout)
        return left if self.limit is None else min(left, self.limit)


class Crops(Table):
    """One group of crops: `count` random resized crops per image, passed through the encoder together."""

    count: Annotated[int, Field(ge=1, le=1024)]  # crops of an image
    size: Annotated[int, Field(ge=8, le=512)] = 32  # pixels
    scale: Annotated[Range, AfterValidator(_within_image)] = (0.08, 1.0)  # area, as a share of the image
    ratio: Range = (0.75, 1.3333333333333333)  # width / height


class Augment(Table):
    """What happens to a crop after it was cut; the order of the four jitter operations is random per crop."""

    flip: Probability = 0.5  # how often left and right are swapped
    jitter: Jitter = (0.4, 0.4, 0.4, 0.2)  # brightness, contrast, saturation, and hue, which is at most 0.5
    jitter_p: Probability = 0.8  # how often colours are jittered
    grayscale_p: Probability = 0.2  # how often they are taken out
    blur_p: Probability = 0.1  # how often it is blurred: Gaussian, sigma 0.1 to 2 pixels
    solarize_p: Probability = 0.1  # how often it is solarised, at the threshold 128/255

    def idle(self) -> dict[str, str]:
        return {"jitter": "jitter_p is 0"} if self.jitter_p == 0 else {}


class Normalize(Table):
    """What a network was trained to expect of pixels: (x - mean) / std, for red, green and blue."""

    mean: Annotated[tuple[Probability, Probability, Probability], Field(strict=False)]  # of red, green, blue
    std: Annotated[tuple[Deviation, Deviation, Deviation], Field(strict=False)]  # likewise


class Model(Table):
    """Backbone, the `pre_feature` layer that linear heads read, and the projector.

    `normalize` and `input_size` are part of the network: images, crops and attacks stay in [0, 1] before them.
    """

    backbone: Annotated[str, AfterValidator(_backbone)] = "resnet18"  # resnet18, resnet34, resnet50 or timm:NAME
    # 3x3 of stride 1 without pooling, and the same padded by 2 (solo-learn's) or without ReLU (lightly's), or imagenet:
    # 7x7 of stride 2 and max-pooling.
    stem: Stem = "cifar"
    width: Annotated[int, Field(ge=1, le=512)] = 64  # channels of the first stage
    # What timm is told beside the name, such as img_size and patch_size of a vision transformer.
    options: Annotated[dict[str, Any], AfterValidator(_options), Later()] = {}
    hidden_dim: Annotated[int, Field(ge=2, le=65536)] = 4096  # of `pre_feature` and the projector
    embedding_dim: Annotated[int, Field(ge=2, le=65536)] = 1024  # of what the objective reads
    normalize: Annotated[Normalize | None, Later()] = None  # left out: pixels as they are
    # Pixels of a side that the backbone sees: whatever comes in is resized to that, with antialiasing.
    input_size: Annotated[int | None, Field(ge=8, le=1024), Later()] = None

    def idle(self) -> dict[str, str]:
        if self.timm is None:
            return {"options": f"only a backbone {TIMM}NAME has any"}
        return dict.fromkeys(("stem", "width"), f"{self.backbone} has its own (see model.options)")

    @property
    def timm(self) -> str | None:
        """The name by which timm knows the backbone; None for our ResNets."""
        return self.backbone.removeprefix(TIMM) if self.backbone.startswith(TIMM) else None

    @property
    def feature_dim(self) -> int:
        """F, what a ResNet of ours hands on: eight times the width, and in bottlenecks four times that."""
        return self.width * (32 if self.backbone == "resnet50" else 8)


class EmpSsl(Table):
    """EMP-SSL, arXiv:2304.03977: invariance of the crops plus total coding rate."""

    name: Literal["emp-ssl"]
    invariance_weight: NonNegative = 200.0  # of the likeness of an image's crops
    tcr_weight: NonNegative = 1.0  # of the total coding rate, which spreads embeddings
    tcr_eps: Positive = 0.2  # distortion that the coding rate allows

    def idle(self) -> dict[str, str]:
        return {"tcr_eps": "tcr_weight is 0"} if self.tcr_weight == 0 else {}

    def fault(self) -> tuple[str, str] | None:
        no_term = "invariance_weight", "must not be 0 where tcr_weight is 0: nothing would be learnt"
        return no_term if self.invariance_weight == 0 and self.tcr_weight == 0 else None


class SimClr(Table):
    """SimCLR, arXiv:2002.05709: NT-Xent over the views of a batch."""

    name: Literal["simclr"]
    temperature: Temperature = 0.07


class SupCon(Table):
    """Supervised contrastive learning, arXiv:2004.11362; the one objective that reads labels."""

    name: Literal["supcon"]
    temperature: Temperature = 0.07


class Clusters(Table):
    """Pseudo-labels: each crop's cluster, of `count` that the encoder's own features form when the phase begins.

    DeepCluster, arXiv:1807.05520, as a second stage of adversarial training DynACL++, arXiv:2303.02203.
    """

    name: Literal["clusters"]
    count: Annotated[int, Field(ge=2, le=65536)] = 50  # several a class: it should be no hint at how many there are
    temperature: Temperature = 0.1


class NoAdversary(Table):
    """Clean training."""

    name: Literal["none"]


class PgdAdversary(Table):
    """K projected ascent steps of the training loss before each weight step, arXiv:1706.06083."""

    name: Literal["pgd"]
    eps: Eps = "8/255"
    step_size: StepSize = "0.01"
    steps: AscentSteps = 5
    start: Start = "zero"
    views: Views = "all"


class FreeAdversary(Table):
    """Free adversarial training, arXiv:1904.12843: each replay's one backward pass pays for weights and delta."""

    name: Literal["free"]
    eps: Eps = "8/255"
    step_size: StepSize = "0.01"
    replays: Annotated[int, Field(ge=1, le=100)] = 3  # weight updates with each batch
    start: Start = "zero"
    views: Views = "all"


class Lars(Table):
    """SGD with Nesterov momentum under LARS, arXiv:1708.03888."""

    name: Literal["lars"] = "lars"
    lr: NonNegative = 0.3  # learning rate, before the schedule
    momentum: Momentum = 0.9
    nesterov: bool = True  # whether momentum looks ahead
    weight_decay: NonNegative = 1e-4  # added to gradients of weights, not of biases and norms
    trust_coefficient: Positive = 0.005  # length of a step as a share of the weights'
    clip: bool = True  # whether a step is at most that of plain SGD

    def fault(self) -> tuple[str, str] | None:
        still = "nesterov", "has no effect: momentum is 0 (set nesterov = false)"
        return still if self.nesterov and self.momentum == 0 else None


class AdamW(Table):
    """Adam with decoupled weight decay, arXiv:1711.05101: what vision transformers are trained with."""

    name: Literal["adamw"]
    lr: NonNegative = 1e-3  # learning rate, before the schedule: about how far a step moves each weight
    beta1: Decay = 0.9  # of the mean of gradients
    beta2: Decay = 0.999  # of the mean of their squares
    weight_decay: NonNegative = 0.05  # share of weights, times the rate, that a step takes off; not of biases and norms


def _optimizer(settings: object) -> object:
    """Its name; there was LARS alone when the first recipes were written, which may leave it out."""
    return settings.get("name", "lars") if isinstance(settings, dict) else getattr(settings, "name", "lars")


class Cosine(Table):
    """Cosine over all weight updates of a phase, after `warmup` updates of linear rise."""

    name: Literal["cosine"]
    warmup: Annotated[int, Field(ge=0, le=10**9)] = 0  # weight updates of linear rise
    end: Annotated[float, Field(ge=0, lt=1), Later()] = 0.0  # where it falls to, as a share of lr


class OfficialCosine(Table):
    """The official free scripts' schedule: a cosine whose period forgets the replays, so that lr rises again."""

    name: Literal["official-cosine"]


class Train(Table):
    """How long, how large, and how a run keeps itself."""

    epochs: Epochs = 10.0
    batch_size: BatchSize = 100
    init: PathText | None = None  # a run whose encoder is the start
    # Whose statistics batch norm takes with several processes: its own share's, or the whole batch's.
    batch_norm: Annotated[Literal["local", "synchronised"], Later()] = "local"
    # Decay of a moving average over the weight updates, which then is the encoder for all but training; 0: none.
    average: Annotated[float, Field(ge=0, lt=1), Later()] = 0.0
    deterministic: bool = False  # the same bits each time, and slower
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of passes; "auto": bfloat16 where hardware has it
    # "auto": on CUDA, where the run is long enough for it (`plan.compiling_pays`).
    compile: Annotated[Literal["auto", True, False], BeforeValidator(_no_number), Later(before=False)] = "auto"
    # "recompute" makes each stage of the backbone twice instead of keeping what is in it: slower, and the same bits.
    memory: Annotated[Literal["full", "recompute"], Outside.RUN] = "full"
    checkpoint_every: Annotated[int, Field(ge=0, le=10**9), Outside.RUN] = 0  # batches; 0: the end of each epoch
    checkpoint_minutes: Annotated[float, Field(ge=0, le=10**6), Outside.RUN] = 10.0  # since the last one; 0: never
    keep: Annotated[int, Field(ge=1, le=10_000), Outside.RUN] = 2  # newest checkpoints
    evaluate_every: Annotated[int, Field(ge=0, le=100_000), Outside.ENCODER] = 0  # epochs; 0: never
    log_every: Annotated[Count, Outside.RUN] = 10  # batches

    def fault(self) -> tuple[str, str] | None:
        both = "memory", 'cannot be "recompute" where compile is true: what is compiled is one graph'
        return both if self.compile is True and self.memory == "recompute" else None


class Linear(Table):
    """SLF: a linear classifier on frozen features of whole clean images."""

    head: Literal["linear"]
    features: Features = "pre_feature"
    protocol: Literal["official", "converged"] = "official"  # some epochs of Adam, or to the optimum
    epochs: HeadEpochs = 20
    batch_size: HeadBatch = 256
    lr: Positive = 3e-4  # learning rate of Adam
    l2: NonNegative = 1e-4  # weight of the squared weights in the converged loss
    standardize: bool = False  # whether features are brought to mean 0 and deviation 1

    def idle(self) -> dict[str, str]:
        if self.protocol == "official":
            return {"l2": 'it belongs to protocol "converged"'}
        return dict.fromkeys(("epochs", "batch_size", "lr"), 'protocol "converged" trains until the loss stands still')


class RobustLinear(Table):
    """ALF: a linear classifier trained on PGD examples of encoder + head, the encoder frozen."""

    head: Literal["robust-linear"]
    features: Features = "pre_feature"
    epochs: HeadEpochs = 20
    batch_size: HeadBatch = 256
    lr: Positive = 3e-4  # learning rate of Adam
    eps: Eps = "8/255"
    step_size: StepSize = "0.01"
    steps: AscentSteps = 5


class AggregatedCrops(Table):
    """A linear classifier on the mean feature of n augmented crops."""

    head: Literal["crops"]
    features: Features = "pre_feature"
    crops: Annotated[int, Field(ge=1, le=1024)] = 16  # of an image
    epochs: HeadEpochs = 100
    batch_size: HeadBatch = 100
    lr: Positive = 0.03  # learning rate of SGD, cosine per epoch
    momentum: Momentum = 0.9
    weight_decay: NonNegative = 5e-5  # of SGD


class Knn(Table):
    """Weighted nearest neighbours by cosine, arXiv:1805.01978."""

    head: Literal["knn"]
    features: Features = "pre_feature"
    k: Count = 20  # neighbours that vote
    temperature: Temperature = 0.07


class Finetune(Table):
    """AFF: the whole network trained with labels, on PGD examples, TRADES pairs or clean images."""

    head: Literal["finetune"]
    features: Features = "pre_feature"
    objective: Literal["pgd", "trades", "clean"] = "pgd"  # what it is trained on
    epochs: HeadEpochs = 25
    batch_size: HeadBatch = 128
    lr: Positive = 0.01  # learning rate of SGD, cosine
    momentum: Momentum = 0.9
    weight_decay: NonNegative = 5e-4  # of SGD
    eps: Eps = "8/255"
    step_size: StepSize = "2/255"
    steps: AscentSteps = 10
    trades_beta: NonNegative = 6.0  # weight of the divergence from clean answers, arXiv:1901.08573

    def idle(self) -> dict[str, str]:
        match self.objective:
            case "clean":
                return dict.fromkeys(("eps", "step_size", "steps", "trades_beta"), 'objective "clean" attacks nothing')
            case "pgd":
                return {"trades_beta": 'it belongs to objective "trades"'}
            case "trades":
                return {}


class EpsAttack(Table):
    """What all attacks share: in L2 a length means something else, so its defaults are others."""

    name: str
    eps: Length = "8/255"  # how far the attack may go
    norm: Norm = "linf"
    # "tf32" is for CUDA: an example then counts if float32 agrees, and where it does not the sample is attacked again.
    search_precision: SearchPrecision = "float32"

    def unwritten(self) -> set[str]:
        """At its default the precision is left out, for it came after evaluations that are known by their settings."""
        return super().unwritten() | ({"search_precision"} if self.search_precision == "float32" else set())

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_norm(cls, raw: object) -> object:
        if not isinstance(raw, dict) or raw.get("norm") != "l2":
            return raw
        return {key: value for key, value in _L2_DEFAULTS.items() if key in cls.model_fields} | raw

    def fault(self) -> tuple[str, str] | None:
        lengths = {key: getattr(self, key) for key in _L2_DEFAULTS if key in type(self).model_fields}
        for key, text in lengths.items():
            if self.norm == "linf" and fraction(text) > 1:
                return key, _beyond_a_pixel(text)
        return ("step_size", "must be above 0") if fraction(lengths.get("step_size", "1")) == 0 else None


_L2_DEFAULTS = {"eps": "128/255", "step_size": "0.1"}


class PgdAttack(EpsAttack):
    """PGD on the cross-entropy of encoder + head."""

    name: Literal["pgd"]
    step_size: Length = "0.01"  # how far each step goes
    steps: AttackSteps = 20
    restarts: Restarts = 1
    start: Start = "zero"  # of the first run; restarts begin at random


class FgsmAttack(EpsAttack):
    """One step along the gradient of the cross-entropy, arXiv:1412.6572."""

    name: Literal["fgsm"]


class ApgdAttack(EpsAttack):
    """Auto-PGD on the cross-entropy or the difference of logits ratio, arXiv:2003.01690."""

    name: Literal["apgd-ce", "apgd-dlr"]
    steps: AttackSteps = 100
    restarts: Restarts = 1


class TargetedApgdAttack(EpsAttack):
    """Auto-PGD on the targeted difference of logits ratio, one run per target class, arXiv:2003.01690."""

    name: Literal["apgd-t"]
    steps: AttackSteps = 100
    restarts: Restarts = 1
    targets: Targets = 9


class FabAttack(EpsAttack):
    """Targeted FAB, arXiv:1907.02044."""

    name: Literal["fab"]
    steps: AttackSteps = 100
    targets: Targets = 9


class SquareAttack(EpsAttack):
    """Square, a random search that sees logits only, arXiv:1912.00049."""

    name: Literal["square"]
    queries: Annotated[int, Field(ge=1, le=1_000_000)] = 5000  # of an image


class EmbeddingAttack(EpsAttack):
    """PGD on the distance of the features from those of the clean image: it needs no labels."""

    name: Literal["embedding"]
    step_size: Length = "0.01"  # how far each step goes
    steps: AttackSteps = 20
    restarts: Restarts = 1


class AutoAttackAttack(EpsAttack):
    """AutoAttack, arXiv:2003.01690."""

    name: Literal["autoattack"]
    version: Literal["standard", "rand"] = "standard"  # "rand" is for networks that draw


class Smallest(Table):
    """For each image the smallest perturbation that is found: FMN, arXiv:2102.12827, one target after the other."""

    name: Literal["smallest"]
    norm: Norm = "linf"
    steps: AttackSteps = 50  # of each walk
    targets: Targets = 3


class Corruptions(Table):
    """Accuracy on corrupted images, of each kind at five severities. No attack: nobody searches for the worst."""

    name: Literal["corruptions"]
    source: Literal["cfamc-corruptions-1", "published"] = "cfamc-corruptions-1"


class Smoothing(Table):
    """Certified accuracy in L2 of the classifier under Gaussian noise, arXiv:1902.02918. No attack, but a proof."""

    name: Literal["smoothing"]
    sigma: Length = "0.25"  # of the noise, in units of the image range
    n0: Annotated[int, Field(ge=1, le=1_000_000)] = 100  # noisy copies of an image that choose the class
    n: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000  # others that prove it
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.001  # how often a certificate may be wrong

    def fault(self) -> tuple[str, str] | None:
        sigma = fraction(self.sigma)
        if sigma > 4:
            return "sigma", f"{self.sigma} is in units of the image range: did you mean {self.sigma}/255?"
        return ("sigma", "must be above 0") if sigma == 0 else None


CropGroups = Annotated[tuple[Crops, ...], Field(strict=False, min_length=1, max_length=16)]
Objective = Annotated[EmpSsl | SimClr | SupCon | Clusters, Field(discriminator="name")]
Adversary = Annotated[NoAdversary | PgdAdversary | FreeAdversary, Field(discriminator="name")]
Optimizer = Annotated[Annotated[Lars, Tag("lars")] | Annotated[AdamW, Tag("adamw")], Discriminator(_optimizer)]
Schedule = Annotated[Cosine | OfficialCosine, Field(discriminator="name")]
Probe = Annotated[Linear | RobustLinear | AggregatedCrops | Knn | Finetune, Field(discriminator="head")]
Stage = PgdAttack | FgsmAttack | ApgdAttack | TargetedApgdAttack | FabAttack | SquareAttack | EmbeddingAttack
Attack = Annotated[Stage | AutoAttackAttack, Field(discriminator="name")]
Measure = Smallest | Corruptions | Smoothing  # of robustness, at no one eps; asked for by flags alone


def reach(attack: EpsAttack) -> Fraction | None:
    """How far the steps of an attack lead at most; None where it has no steps of a fixed length."""
    if isinstance(attack, PgdAttack | EmbeddingAttack):
        return attack.steps * fraction(attack.step_size)
    return None


class Phase(Table):
    """Training that goes on from the encoder of the phase before it.

    A table that is left out is the recipe's; one that is given replaces it whole, so that what it leaves out is at its
    default.
    """

    epochs: Epochs
    batch_size: BatchSize | None = None
    crops: CropGroups | None = None
    augment: Augment | None = None
    objective: Objective | None = None
    adversary: Adversary | None = None
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What replaces the recipe's, by its key."""
        return {key: value for key, value in self if value is not None}

    def unwritten(self) -> set[str]:
        return type(self).model_fields.keys() - self.given.keys()


class Recipe(Table):
    """One run, whole: the phase that its own tables describe, and those that come after it.

    Counts of views, steps and replays are of the first phase; `parts` has those of the others.
    """

    schema_version: Annotated[Literal[1], Field(alias="schema")]  # of this format
    name: Annotated[str, Field(min_length=1, max_length=200), Outside.RUN]  # in words; runs are called after it
    seed: Annotated[int, Field(ge=0, lt=2**32), Outside.ENCODER] = 0  # of all that is drawn
    data: Data
    crops: CropGroups
    augment: Augment = Augment()
    model: Model = Model()
    objective: Objective
    adversary: Adversary
    optimizer: Optimizer = Lars()
    schedule: Schedule = Cosine(name="cosine")
    train: Train = Train()
    phase: Annotated[tuple[Phase, ...], Field(strict=False, max_length=16)] = ()
    probe: Annotated[Probe, Outside.ENCODER] = Linear(head="linear")
    attack: Annotated[tuple[Attack, ...], Field(strict=False), Outside.ENCODER] = (PgdAttack(name="pgd"),)

    def unwritten(self) -> set[str]:
        return super().unwritten() | (set() if self.phase else {"phase"})

    def parts(self) -> tuple[Recipe, ...]:
        """The recipe of each phase in turn, as one without phases."""
        first, parts = self.model_copy(update={"phase": ()}), []
        for phase in self.phase:
            given = phase.given
            train = self.train.model_copy(
                update={key: given.pop(key) for key in phase.given if key in Train.model_fields}
            )
            parts.append(first.model_copy(update={**given, "train": train}))
        return first, *parts

    @property
    def reads_labels(self) -> bool:
        """Whether the encoder is trained with labels, in whatever phase."""
        return any(isinstance(part.objective, SupCon) for part in self.parts())

    @property
    def clusters(self) -> int:
        """How many the images fall into; 0 where the objective asks for none."""
        return self.objective.count if isinstance(self.objective, Clusters) else 0

    @property
    def fewest_images(self) -> int:
        """The least number of images with which each phase has a batch, and as many images as clusters."""
        return max(max(part.train.batch_size, part.clusters) for part in self.parts())

    @property
    def views(self) -> int:
        """V, the number of crops of one image over all groups."""
        return sum(group.count for group in self.crops)

    @property
    def ascent_steps(self) -> int:
        """Steps of the adversary that train no weight, before each weight update: K of PGD, else 0."""
        return self.adversary.steps if isinstance(self.adversary, PgdAdversary) else 0

    @property
    def spared_groups(self) -> int:
        """How many groups of crops, the first ones, the adversary leaves clean."""
        return 0 if isinstance(self.adversary, NoAdversary) or self.adversary.views == "all" else 1

    @property
    def moved_views(self) -> int:
        """The crops of one image in the groups that are not spared."""
        return sum(group.count for group in self.crops[self.spared_groups :])

    @property
    def replays(self) -> int:
        """How often a batch is used for a weight update."""
        return self.adversary.replays if isinstance(self.adversary, FreeAdversary) else 1

    def batches(self, images: int) -> int:
        """Batches of a run over `images` images, at least one a phase; an epoch's incomplete last batch is dropped."""
        trains = [part.train for part in self.parts()]
        return sum(max(1, math.floor(train.epochs * (images // train.batch_size) + 0.5)) for train in trains)

    def updates(self, images: int) -> int:
        """Weight updates of a run over `images` images."""
        return sum(part.batches(images) * part.replays for part in self.parts())

    def misfits(self, images: int, *, processes: int = 1) -> Iterator[tuple[str, str, str]]:
        """What does not fit that many training images and processes: a dotted key, what is wrong, and a way out."""
        told = set()  # a batch size that a phase has from the recipe is told of once
        for place, part in enumerate(self.parts()):
            for key, wrong, hint in part._misfits(images, processes, place):
                if wrong not in told:
                    yield key, wrong, hint
                told.add(wrong)

    def _misfits(self, images: int, processes: int, place: int) -> Iterator[tuple[str, str, str]]:
        """Those of one phase, which is the recipe's part at `place`."""
        size, epochs, warmup = (key_of(place, key) for key in ("train.batch_size", "train.epochs", "schedule.warmup"))
        batch, updates = self.train.batch_size, self.updates(images)
        alone = self.train.batch_norm == "local" and any(group.count == 1 for group in self.crops)
        fewest = 2 if alone else 1  # batch norm needs two values of a channel
        if batch > images:
            hint = f"--set {size}={images}" if images > 1 else "add images"
            yield size, f"{batch} is more than the {images} training images", hint
        elif batch // processes < fewest:
            hint = f"start at most {batch // fewest} processes, or raise {size}"
            yield size, f"{processes} processes cannot share {batch} images: each needs {fewest}", hint
        elif isinstance(self.schedule, Cosine) and self.schedule.warmup >= updates:
            of = f"a phase of {updates}" if place else f"a run of {updates}"
            wrong = f"{self.schedule.warmup} updates of warm-up leave nothing of {of}"
            yield warmup, wrong, f"lower {warmup}, or raise {epochs}"
        elif self.clusters > images:
            count = key_of(place, "objective.count")
            yield count, f"{self.clusters} clusters are more than the {images} training images", f"lower {count}"

    def require_fit(self, images: int, *, processes: int = 1) -> None:
        """Refuse a recipe that does not fit the images and processes that were found.

        Raises:
            CfamcError: A batch is larger than the data or too small for the processes, warm-up takes all updates, or
                clusters are more than images.
        """
        for key, wrong, hint in self.misfits(images, processes=processes):
            raise invalid(f"{key}: {wrong}", hint)

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)

    def digest(self) -> str:
        """SHA-256 of what makes the encoder, in hex: of every field that is not marked `Outside`, `as_before`."""
        kept = as_before(self.resolved())
        for path in outside(Outside.ENCODER):
            table, _, key = path.rpartition(".")
            del (kept[table] if table else kept)[key]
        return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def key_of(place: int, key: str) -> str:
    """What a recipe calls a key of its part at `place`, where a phase may say otherwise than the recipe."""
    return f"phase.{place - 1}.{key.removeprefix('train.')}" if place else key


def tables(annotation: Any) -> list[type[Table]]:
    """The models that an annotation of `Recipe` allows, below unions, tuples and metadata."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return tables(get_args(annotation)[0])
    if origin in (Union, UnionType, tuple):
        return [table for part in get_args(annotation) if part is not NoneType for table in tables(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Table) else []


def outside(what: Outside) -> list[str]:
    """The dotted keys that are no part of the encoder, or of the run: what is outside the run is outside both."""

    def marked(table: type[Table], prefix: str = "") -> Iterator[str]:
        for name, field in table.model_fields.items():
            if Outside.RUN in field.metadata or what in field.metadata:
                yield prefix + name
            else:
                for inner in tables(field.annotation):
                    yield from marked(inner, f"{prefix}{name}.")

    return list(marked(Recipe))


def as_before(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What `Recipe.resolved` gives, as it was before the fields came that are marked `Later`."""
    return _as_before(resolved, Recipe)


def _as_before(settings: Mapping[str, Any], table: type[Table]) -> dict[str, Any]:
    kept = dict(settings)
    for key, field in table.model_fields.items():
        if key not in kept:
            continue
        value, forms = kept[key], tables(field.annotation)
        for mark in field.metadata:
            if isinstance(mark, Later) and value == field.default:
                del kept[key]
                kept |= {} if mark.before is None else {key: mark.before}
        if isinstance(value, dict):
            kept[key] = _as_before(value, _form_of(value, forms))
        elif isinstance(value, list):
            kept[key] = [
                _as_before(entry, _form_of(entry, forms)) if isinstance(entry, dict) else entry for entry in value
            ]
    return kept


def _form_of(settings: Mapping[str, Any], forms: Sequence[type[Table]]) -> type[Table]:
    """Which of the tables that a place allows these are: the only one, or that of their name; `Table` for strangers."""
    for form in forms:
        tag = form.model_fields.get("head") or form.model_fields.get("name")
        name = settings.get("head") or settings.get("name")
        if len(forms) == 1 or (tag is not None and name in get_args(tag.annotation)):
            return form
    return Table
