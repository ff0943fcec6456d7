"""The schema of every JSON file that is written, and how such a file is read back.

Accuracies are fractions with the counts they come from and a Wilson 95 % interval. Digests are hexadecimal SHA-256.
Per-sample outcomes are bit masks: sample i of the evaluated order is bit i of the number that the hexadecimal text
spells.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from cfamc_cli.errors import CfamcError, bad_data
from cfamc_cli.recipe.schema import Features, Norm
from cfamc_cli.store.files import read_bytes, read_jsonl, write_bytes

SCHEMA_VERSION: Literal[1] = 1
_Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def _is_lost(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]*$")]
# None where the number was not finite
Measured = Annotated[float | None, BeforeValidator(lambda value: None if _is_lost(value) else value)]
Status = Literal["created", "running", "finished", "diverged", "interrupted", "failed"]
Weights = Literal["backbone", "encoder", "classifier"]
Format = Literal["safetensors", "pt2", "onnx", "robustbench"]  # the last: safetensors, by the names of its model zoo
Dashboard = Literal["csv", "tensorboard"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Space = Literal["image", "crops"]  # where an attacker acts
HeadKind = Literal["linear", "robust-linear", "crops", "knn", "finetune", "imported"]
IMPORTED: HeadKind = "imported"  # the last layer of a classifier that others trained
Layer = Literal["backbone", "pre_feature", "embedding"]  # of an encoder


class Part(BaseModel):
    """What every record is made of: frozen, strict, nothing unknown, nothing that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Record(Part):
    """A record that has a file of its own."""

    schema_version: Literal[1] = SCHEMA_VERSION


R = TypeVar("R", bound=BaseModel)
L = TypeVar("L")


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a fraction.

    Args:
        correct: How many of the samples count.
        n: How many samples there are, at least 1.

    Source:
        Wilson 1927, Probable inference, the law of succession, and statistical inference; the score interval.
    """
    p, z2 = correct / n, _Z95 * _Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if correct == 0 else max(0.0, centre - half)  # exact at the ends, where rounding would blur it
    return low, 1.0 if correct == n else min(1.0, centre + half)


_ROUNDED = 1e-9  # what a number may lose on its way through a file


class Accuracy(Part):
    """A measured fraction."""

    correct: Count  # samples that count
    n: Annotated[int, Field(ge=1)]  # samples measured
    value: Share  # correct / n
    low: Share  # lower end of the Wilson 95 % interval
    high: Share  # upper end of it

    @classmethod
    def of(cls, correct: int, n: int) -> Self:
        """The accuracy of `correct` in `n` samples."""
        if not 0 <= correct <= n or n < 1:
            raise ValueError(f"{correct} of {n} samples")
        low, high = wilson(correct, n)
        return cls(correct=correct, n=n, value=correct / n, low=low, high=high)

    @model_validator(mode="after")
    def _is_that_of_its_counts(self) -> Self:
        told, (low, high) = f"{self.correct} of {self.n}", wilson(min(self.correct, self.n), self.n)
        if max(abs(self.value - self.correct / self.n), abs(self.low - low), abs(self.high - high)) > _ROUNDED:
            raise ValueError(f"value and interval are not those of {told}")
        return self


class Computation(Part):
    """How numbers were computed, beside the device: what moves their last bits. None where there is no CUDA."""

    precision: Literal["float32", "bfloat16"]  # of forward and backward passes: what "auto" became
    processes: Annotated[int, Field(ge=1)]  # that shared the work
    compiled: bool
    tf32_products: bool | None  # whether matrix products of float32 are shortened to TF32
    tf32_convolutions: bool | None
    cuda: str | None  # versions of what torch was built with, and of the driver it met
    cudnn: str | None
    driver: str | None


class Environment(Part):
    """Where a run was made: a fixed list of facts, never the environment variables."""

    cfamc: str
    python: str
    torch: str
    torchvision: str
    platform: str
    cpu: str
    cores: Count
    device: str
    git_revision: Hex | None
    git_changed: bool  # whether the checkout differs from that revision
    computation: Computation | None = None  # None in older records, and until a run begins to train


class Progress(Part):
    """How far a run is."""

    batch: Count = 0  # batches finished
    step: Count = 0  # weight updates finished
    epoch: Annotated[float, Field(ge=0)] = 0.0  # epochs finished, with their fraction
    total: Count = 0  # weight updates that the recipe asks for


class Totals(Part):
    """What a run cost: weight updates, encoded views (forward and backward) and the size of the encoder."""

    steps: Count
    view_passes: Count  # that trained the weights
    attack_view_passes: Count | None = None  # of an adversary's own steps; None where it was not kept
    parameters: Count


class DataUsed(Part):
    """The samples that something was made from: data set, split, how many, and the digest of their content.

    The split "holdout" are training images that `data.holdout` keeps for choosing.
    """

    dataset: str
    split: str
    n: Count
    fingerprint: str


def images_of(split: str) -> str:
    """What the images of a split are called."""
    return {"holdout": "held-out training images", "test": "test images"}.get(split, split)


class Evaluation(Part):
    """The online evaluation of an encoder, for monitoring."""

    epoch: Annotated[float, Field(ge=0)]  # when it was made
    knn: Accuracy | None  # weighted nearest neighbours on features
    clean: Accuracy | None  # online linear head on clean images
    robust: Accuracy | None  # the same head under `attack`
    eps: str  # size of the attack, exact text
    attack: str  # its name with its steps


class Failure(Part):
    """Why a run ended early; `loss` and `gradient_norm` are None where they were not finite."""

    message: str
    exit_code: int
    batch: Count | None = None
    step: Count | None = None
    lr: Measured = None
    loss: Measured = None
    gradient_norm: Measured = None


class RunRecord(Record):
    """run.json: one pretraining run."""

    id: str
    name: str
    status: Status
    created: AwareDatetime
    updated: AwareDatetime
    recipe_digest: Hex  # equal for the seeds of one recipe
    seed: int
    progress: Progress
    environment: Environment
    wall_seconds: Seconds
    totals: Totals
    data: DataUsed | None
    init: str | None = None  # run whose encoder this one started from
    imported: str | None = None  # file of foreign weights that the encoder was read from, in place of training
    evaluation: Evaluation | None = None  # the last online evaluation
    untrained: Evaluation | None = None  # the same figures for the encoder before its first update
    failure: Failure | None = None
    collapsed: bool = False  # whether the last line of the training says so


class ClassAccuracy(Part):
    """One class of a probe; without an accuracy where the split has none of it."""

    name: str
    accuracy: Accuracy | None


class ProbeResult(Record):
    """What a comparison reads of a probe's record, and nothing else of it."""

    model_config = ConfigDict(extra="ignore")

    id: str
    run: str
    created: AwareDatetime
    head: HeadKind  # kind of head
    features: Features
    settings: dict[str, JsonValue]  # its resolved settings
    encoder_digest: Hex  # of the encoder that the head reads
    train: DataUsed  # what it was fitted to
    test: DataUsed  # what it was judged on
    test_accuracy: Accuracy
    wall_seconds: Seconds
    environment: Environment


class ProbeRecord(ProbeResult):
    """probes/<id>/record.json: one head on one encoder."""

    model_config = ConfigDict(extra="forbid")

    recipe_digest: Hex
    seed: int
    head_digest: Hex | None  # of the head's weights; None for knn, which has none
    data: dict[str, JsonValue] = Field(default_factory=dict)  # the [data] table read, the run's or that of a transfer
    train_accuracy: Accuracy | None  # on the samples the head was fitted to; None where that was not measured
    converged: bool | None = None  # whether the protocol "converged" came to the optimum; None for the others
    classes: tuple[ClassAccuracy, ...]  # of `test`, in label order
    confusion: tuple[tuple[Count, ...], ...]  # of `test`, a row per true class

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        by_class = [(row[label : label + 1], sum(row)) for label, row in enumerate(self.confusion)]
        told = [((part.accuracy.correct,), part.accuracy.n) if part.accuracy else None for part in self.classes]
        if told != [own if own[1] else None for own in by_class]:
            raise ValueError("the accuracies of its classes are not those of its confusion matrix")
        right, n = sum(sum(own[0]) for own in by_class), sum(own[1] for own in by_class)
        if (right, n, n) != (self.test_accuracy.correct, self.test_accuracy.n, self.test.n):
            raise ValueError("its accuracy is not that of its confusion matrix")
        return self


class FeatureMap(Record):
    """probes/<id>/map.json: features of evenly chosen samples of `test`, at their first two principal components."""

    points: tuple[tuple[float, float, Count], ...]  # and the label
    explained: tuple[float, float]  # share of the variance along each


class PendingProbe(Record):
    """probes/<id>/pending.json: a head under way that can be resumed."""

    recipe: dict[str, JsonValue]  # the resolved recipe with the probe's own settings
    transfer: bool  # whether the data is another than the run's own
    limit: int | None  # training images it is fitted to; None for all
    encoder_digest: Hex
    train: DataUsed
    test: DataUsed


class ThreatModel(Part):
    """What the attacker may do: where it acts, how distance is measured, and how far it may go (exact text)."""

    space: Space
    norm: Norm
    eps: str


class MadeOn(Part):
    """The network that a transfer attack made its examples on: its run and head, and the digests of their weights."""

    run: str
    probe: str
    encoder_digest: Hex
    head_digest: Hex | None


class ClassRobustness(Part):
    """One class of an attack; without accuracies where the samples have none of it."""

    name: str
    clean: Accuracy | None
    robust: Accuracy | None


class Stage(Part):
    """One stage of an attack: its name, how many samples it was given, how many it broke, and its cost."""

    name: str
    attacked: Count
    broken: Count
    forward: Count
    backward: Count
    wall_seconds: Seconds


class Flag(Part):
    """One check of whether the numbers can be trusted."""

    name: str
    figure: Measured  # what was measured; None where there is no number
    limit: Measured  # what it is held against
    verdict: Literal["passed", "failed", "skipped"]  # "skipped" says that the check was not made
    text: str


def failures(flags: Iterable[Flag]) -> list[Flag]:
    """The checks that say the numbers of a record cannot be trusted."""
    return [flag for flag in flags if flag.verdict == "failed"]


def failed_names(flags: Iterable[Flag]) -> tuple[str, ...]:
    """The names of those checks."""
    return tuple(flag.name for flag in failures(flags))


class AttackResult(Record):
    """What a comparison reads of an attack's record, and nothing else of it."""

    model_config = ConfigDict(extra="ignore")

    id: str
    run: str
    probe: str  # head that was attacked
    created: AwareDatetime
    head: HeadKind  # its kind
    features: Features
    threat: ThreatModel
    attack: str  # its name; only equal names with equal settings are compared
    settings: dict[str, JsonValue]  # its resolved settings
    data: DataUsed  # the first n of an order that the data fixes; the fingerprint is that of the whole split
    order_digest: Hex  # of that whole order
    encoder_digest: Hex  # of the encoder that was attacked
    source: MadeOn | None = None  # where the examples come from; None where they were made on what is judged
    clean: Accuracy
    robust: Accuracy
    flags: tuple[Flag, ...]
    wall_seconds: Seconds
    environment: Environment

    @model_validator(mode="after")
    def _counts_the_same_samples(self) -> Self:
        if not self.data.n == self.clean.n == self.robust.n or self.robust.correct > self.clean.correct:
            raise ValueError("its accuracies are not of the same samples")
        return self


class AttackRecord(AttackResult):
    """attacks/<id>/record.json: one finished evaluation under attack."""

    model_config = ConfigDict(extra="forbid")

    recipe_digest: Hex
    seed: int
    subset: str  # how the samples were chosen, in words
    notes: tuple[str, ...] = ()  # how the attack differs from the one published, and what else a reader must know
    head_digest: Hex | None
    classes: tuple[ClassRobustness, ...]
    stages: tuple[Stage, ...]
    forward: Count  # forward passes of single samples; `backward` likewise
    backward: Count

    @model_validator(mode="after")
    def _sums_up(self) -> Self:
        for whole, parts in (
            (self.clean, [part.clean for part in self.classes]),
            (self.robust, [part.robust for part in self.classes]),
        ):
            if (whole.correct, whole.n) != (sum(p.correct for p in parts if p), sum(p.n for p in parts if p)):
                raise ValueError("its accuracies are not the sums of those of its classes")
        return self


class Spectrum(Part):
    """How many directions the outputs of a layer use, over the images of its record."""

    layer: Layer
    dim: Count
    rank_me: float  # from 1 to the smaller of dim and images
    alpha: float | None  # exponent of the power law that the eigenvalues fall with; None where too few are above 0


class Movement(Part):
    """How far an attack of one size moves features, over the first images of its record's order."""

    eps: str  # exact text
    cosine: Annotated[float, Field(ge=-1, le=1)]  # mean, of clean and attacked features
    kept: Accuracy  # images whose nearest neighbour among the other clean ones stays the same
    invalid: Count  # points of the attack that were no images within the ball; they count as unmoved
    wall_seconds: Seconds


class UnlabelledRecord(Record):
    """unlabelled/<id>/record.json: what can be said of an encoder without labels; grows by a movement for each eps."""

    id: str
    run: str
    created: AwareDatetime
    seed: int
    encoder_digest: Hex
    data: DataUsed  # the first n of an order that the data fixes; the fingerprint is that of the whole split
    spectra: tuple[Spectrum, ...]
    features: Features  # the layer that is attacked, which heads read
    norm: Norm
    settings: dict[str, JsonValue]  # of the attack, without its eps
    movements: tuple[Movement, ...]  # by eps, the smallest first
    key: Hex  # digest of what all but the list of eps depends on
    wall_seconds: Seconds
    environment: Environment


Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Outcome:
    """One finished stage of one block: what is committed, and enough to go on from. A mask has a bit per sample."""

    block: int  # number of the block; it begins at sample block * block_size of the order
    stage: int  # 0 for the clean predictions, then the stages of the plan from 1
    name: str  # "clean" for stage 0
    standing: Mask  # classified right, steadily and finitely under this stage and all before it
    broken: Mask  # newly lost to a verified example, wrong at whatever batch size (for stage 0: misclassified)
    not_finite: Mask  # newly lost to a prediction that is not finite
    unsteady: Mask  # whose logits, clean or attacked, changed with their batch by more than rounding
    invalid: Mask  # whose example left the ball or the box, or was no image; it is no success
    forward: int  # passes of single samples
    backward: int
    seconds: float  # wall time
    again: int = 0  # samples attacked a second time in float32, as what a shorter search found did not hold there


class StageOutcome(Part):
    """Which samples still stand after a stage."""

    name: str
    done: Count  # samples that the stage has finished with, from the first on; the bits of later ones are 0
    robust: Hex  # bit mask of those classified right under this stage and all before it
    broken: Hex = ""  # of those newly lost to a verified example; for the clean predictions those misclassified
    not_finite: Hex = ""  # of those newly lost to a prediction that is not finite
    unsteady: Hex = ""  # of those whose prediction changed with the batch it was made in
    invalid: Hex = ""  # of those whose example was no image within the ball, and therefore no success
    passes: tuple[tuple[Count, Count], ...] = ()  # forward and backward passes of single samples, for each block
    again: tuple[Count, ...] = ()  # samples attacked a second time in float32, for each block; empty where none was


class StageTime(Part):
    """A line of timing.jsonl of an attack: how long one stage took on one block."""

    block: Count
    stage: Count
    name: str
    seconds: Seconds


class Outcomes(Record):
    """attacks/<id>/outcomes.json: per-sample outcomes, complete or under way."""

    sha256: Hex | None = Field(default=None, exclude=True)  # a version before records had one sealed these alone

    n: Count  # samples to evaluate
    block: Annotated[int, Field(ge=1)]  # samples of one block; blocks are committed whole
    order_digest: Hex
    data_fingerprint: str
    done: Count  # samples whose clean prediction is known
    clean: Hex  # bit mask of those classified right without an attack
    stages: tuple[StageOutcome, ...]
    key: Hex = ""  # digest of what the outcomes depend on but `n`: what has the same key can be taken up again
    predictions: StageOutcome | None = None  # clean ones in the form of a stage: those right, finite and steady stand


class MeasuredPoint(Part):
    """An accuracy of a measure: at an eps or a radius, or of a kind of corruption at a severity."""

    name: str  # "accuracy", "certified accuracy", or the kind of corruption
    at: Annotated[float, Field(ge=0)]
    accuracy: Accuracy


class MeasureResult(Record):
    """What a comparison reads of the record of a measure, and nothing else of it."""

    model_config = ConfigDict(extra="ignore")

    id: str
    run: str
    probe: str  # head that was measured
    created: AwareDatetime
    head: HeadKind  # its kind
    features: Features
    measure: Literal["smallest", "corruptions", "smoothing"]
    settings: dict[str, JsonValue]  # its resolved settings
    data: DataUsed  # as for an attack
    order_digest: Hex
    encoder_digest: Hex
    clean: Accuracy
    points: tuple[MeasuredPoint, ...]
    figures: dict[str, Measured]  # such as "median eps"; None where there is no number
    flags: tuple[Flag, ...]
    wall_seconds: Seconds
    environment: Environment


class MeasureRecord(MeasureResult):
    """measures/<id>/record.json: robustness that is no accuracy under one attack of one eps."""

    model_config = ConfigDict(extra="forbid")

    recipe_digest: Hex
    seed: int
    head_digest: Hex | None
    notes: tuple[str, ...] = ()
    forward: Count  # passes of single samples; `backward` likewise
    backward: Count


class MeasureHeader(Record):
    """The first line of measures/<id>/samples.jsonl: which samples were measured, and how."""

    n: Count  # samples to measure
    block: Annotated[int, Field(ge=1)]  # samples of one block
    order_digest: Hex
    data_fingerprint: str
    key: Hex  # as of `Outcomes`


class MeasuredBlock(Part):
    """A line of samples.jsonl: what was measured of the samples of one block, in their order."""

    sha256: Hex | None = None  # of the rest; older versions wrote none
    block: Count
    columns: dict[str, tuple[float | None, ...]]  # None where there is no number
    forward: Count
    backward: Count

    def sealed(self) -> Self:
        """The same with its digest."""
        return self.model_copy(update={"sha256": self._digest()})

    @model_validator(mode="after")
    def _is_unchanged(self) -> Self:
        if self.sha256 not in (None, self._digest()):
            raise ValueError("was changed: the rest is not what this digest is of")
        return self

    def _digest(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


class Spread(Part):
    """An expected time with its 95 % interval, which a single measurement does not have."""

    seconds: Seconds
    low: Seconds | None
    high: Seconds | None


class SectionTime(Part):
    """A part of a batch of training, without the parts within it: medians over the batches, in seconds."""

    name: str
    host: Seconds
    device: Seconds | None  # where the device's time can be told from the host's


class TrainingCost(Part):
    """What training costs with certain settings, measured on the loop itself."""

    batches: Annotated[int, Field(ge=1)]  # that were timed
    batch_seconds: Seconds  # of one, the median
    sections: tuple[SectionTime, ...]
    launches: Count | None  # of kernels in a batch, and waits of the host for the device, where a profiler tells
    waits: Count | None
    views_per_second: float  # forward and backward passes of single views, those of the adversary counted
    flops_per_second: float  # by the plan's count of operations
    peak_memory: Count | None  # bytes: of the device's allocator on CUDA, elsewhere of the whole process
    warmup_seconds: Seconds  # that the first batches take longer than the others: compiling, choosing kernels
    evaluation_seconds: Seconds  # of one online evaluation; 0 where the recipe has none
    checkpoint_seconds: Seconds  # of one checkpoint
    predicted: Spread  # the whole run
    phases: Annotated[int, Field(ge=1)] = 1  # of the run; but for memory and what is predicted all is of the first


class Variant(Part):
    """Settings that a bench tried, by dotted key, as they come out on its device."""

    settings: dict[str, str | bool]
    skipped: str  # why they were not measured; empty where they were
    cost: TrainingCost | None

    @property
    def words(self) -> str:
        """Such as "float32", "bfloat16 compiled" or "bfloat16 recompute"; eager and full go without saying."""
        spelled = {True: "compiled", False: "", "full": ""}
        return " ".join(filter(None, (str(spelled.get(value, value)) for value in self.settings.values())))


class PeakRate(Part):
    """What a device reaches in one precision: floating-point operations a second."""

    precision: Literal["float32", "bfloat16"]
    matrix_product: float
    convolution: float  # 3x3, of the size that the recipe's second stage has


class AttackCost(Part):
    """What an attack costs for samples that no stage of it breaks, which is the most it can."""

    name: str
    threat: ThreatModel
    samples: Count  # that were timed
    seconds_per_1000: Seconds
    forward: float  # passes of a sample; `backward` likewise
    backward: float
    test_images: Count | None  # of the whole test set, where their number is known
    predicted: Seconds | None  # for all of them


class BenchRecord(Record):
    """benches/<id>/record.json: what a recipe costs on one machine, measured on random images."""

    id: str
    created: AwareDatetime
    name: str  # of the recipe
    recipe_digest: Hex
    environment: Environment
    images: Count  # training images that the predictions refer to
    batches: Count  # of the whole run
    weight_updates: Count
    flops: Count  # of the whole run
    planned_memory: Count  # the plan's estimate, bytes
    peaks: tuple[PeakRate, ...]
    variants: tuple[Variant, ...]  # the recipe's own settings first
    recommended: dict[str, str | bool]  # settings that are faster here than the recipe's own; empty where those are
    attacks: tuple[AttackCost, ...]
    wall_seconds: Seconds


class Written(Part):
    """One file of an export."""

    name: str
    size: Count
    sha256: Hex


class InputSpec(Part):
    """What goes in: float32, NCHW, RGB, values in `range`, with no further normalisation; any batch size."""

    name: str
    channels: Literal["RGB"]
    height: Count
    width: Count
    dtype: Literal["float32"]
    range: tuple[float, float]


class OutputSpec(Part):
    """What comes out: (batch, dim), float32."""

    name: Literal["features", "logits"]
    dim: Count


class Source(Part):
    """The run that the weights are from."""

    id: str
    name: str
    status: str
    seed: int
    created: AwareDatetime
    checkpoint: str
    recipe_digest: Hex
    encoder_digest: Hex
    head: str | None
    head_digest: Hex | None


class CheckRecord(Part):
    """How the files compare with the live model, after they were read back."""

    reader: str
    batches: tuple[Count, ...]
    rtol: float
    atol: float
    largest_difference: float
    data: DataUsed


class Exported(Record):
    """What any export.json says of the files beside it, and nothing else of it."""

    model_config = ConfigDict(extra="ignore")

    files: tuple[Written, ...]


class ExportedProbe(Part):
    """A head on the weights of an export, in short."""

    id: str
    head: HeadKind
    features: Features
    data: DataUsed
    accuracy: Accuracy


class ExportedAttack(Part):
    """An attack on one of those heads, in short."""

    id: str
    probe: str
    attack: str
    settings: dict[str, JsonValue]
    threat: ThreatModel
    data: DataUsed
    clean: Accuracy
    robust: Accuracy
    audited: bool  # whether the full audit was made
    failed: tuple[str, ...]  # checks that say the numbers cannot be trusted


class ExportRecord(Record):
    """export.json: weights that were handed over."""

    cfamc: str
    created: AwareDatetime
    part: Weights
    format: Format
    files: tuple[Written, ...]
    input: InputSpec
    output: OutputSpec
    classes: tuple[str, ...] | None  # names of the logits in order; None where features are handed over
    source: Source
    recipe: dict[str, Any]  # every setting, without the paths of the machine that trained
    data: DataUsed | None
    licence: str  # what is known of the terms of use of the data
    check: CheckRecord
    probes: tuple[ExportedProbe, ...]  # measured on these weights: the first of those that the card has
    attacks: tuple[ExportedAttack, ...]  # likewise


def weights_file(part: Weights, form: Format) -> str:
    """The name of the file that an export keeps its weights in; of safetensors the one that the Hub and timm look for.

    RobustBench's zoo has a file for each classifier.
    """
    return "model.safetensors" if form == "safetensors" else f"{part}.{form.replace('robustbench', 'safetensors')}"


class MetricsRecord(Record):
    """export.json: the metrics of a run in a form that dashboards read."""

    cfamc: str
    created: AwareDatetime
    format: Dashboard
    files: tuple[Written, ...]
    run: str
    records: Count


class Line(Part):
    """A line of metrics.jsonl or timing.jsonl: where the run stood, and what was measured there.

    On disk a number that is not finite is null, and its name stands under "nonfinite".
    """

    model_config = ConfigDict(allow_inf_nan=True)

    kind: str
    step: Count
    batch: Count
    epoch: Annotated[float, Field(ge=0)]
    phase: Count | None = None  # 0 for the recipe's own tables, 1 for its first [[phase]]; None where there is none

    def written(self) -> dict[str, object]:
        """The line as JSON holds it; what was not measured is left out."""
        values = self.model_dump(exclude_none=True)
        lost = {key: str(value) for key, value in values.items() if _is_lost(value)}
        return values | dict.fromkeys(lost) | ({"nonfinite": lost} if lost else {})


_SPREAD = 100  # updates in which embeddings have left their common start


class TrainLine(Line):
    """An interval of training: means over its weight updates, and the last of lr, delta and embeddings."""

    kind: Literal["train"] = "train"
    lr: float  # of the last update
    loss: float
    gradient_norm: float  # L2, over all weights
    invariance: float | None = None  # the term of emp-ssl, before its weight; `coding_rate` likewise
    coding_rate: float | None = None
    delta_mean: float | None = None  # mean size of an entry, in units of the image range; None without an adversary
    delta_at_bound: float | None = None  # share of its entries at eps or 0.1 % below
    effective_rank: float  # of the last update's embeddings of one view; `feature_std` likewise
    feature_std: float
    representation_std: float | None = None  # the same of what heads read, brought to unit norm; older lines have none

    @property
    def collapsed(self) -> bool:
        """Whether images are as one, or along one line, to heads or objective; at the start to any network they are.

        Trained encoders measured a `representation_std` of 0.3 to 0.8, collapsed ones 0.09 at most.
        """
        blind = self.representation_std is not None and self.representation_std < 0.15
        return self.step >= _SPREAD and (self.effective_rank < 2 or self.feature_std < 0.1 or blind)


class GripLine(Line):
    """How strong the training adversary was beside PGD-10 on the same crops."""

    kind: Literal["grip"] = "grip"
    clean: float  # loss without a perturbation
    trained: float  # loss under the perturbation that training uses
    strongest: float  # loss under PGD-10
    strength: float  # (trained - clean) / (the higher of both - clean): 1 where PGD-10 is no stronger, about 0 for none
    lost: bool  # whether that is too little, and catastrophic overfitting likely


class EvaluationLine(Line):
    """The online evaluation: right answers among n training images that the heads never saw, else as `Evaluation`."""

    kind: Literal["evaluation"] = "evaluation"
    n: Annotated[int, Field(ge=1)]
    knn: Count
    clean: Count
    robust: Count
    eps: str
    attack: str

    def shown(self) -> dict[str, str]:
        """When it was made and what came out, for people."""
        clean, robust, knn = (f"{100 * right / self.n:.1f} %" for right in (self.clean, self.robust, self.knn))
        text = f"clean {clean}, {self.attack} {self.eps} {robust}, knn {knn}"
        return {f"at epoch {self.epoch:.3g}:": text}

    def evaluation(self) -> Evaluation:
        """The same as run.json keeps it, with intervals."""
        knn, clean, robust = (Accuracy.of(right, self.n) for right in (self.knn, self.clean, self.robust))
        return Evaluation(epoch=self.epoch, knn=knn, clean=clean, robust=robust, eps=self.eps, attack=self.attack)


class TimingLine(Line):
    """What an interval of training cost."""

    kind: Literal["train"] = "train"
    views_per_second: float  # forward and backward passes of single views, those of the adversary counted
    data_share: float  # share of the time that was spent on images and crops
    seconds: Seconds
    peak_memory: Count  # bytes, at the highest point so far


_LOST = ("nan", "inf", "-inf")
MetricLine = TrainLine | GripLine | EvaluationLine
_METRIC: TypeAdapter[MetricLine] = TypeAdapter(Annotated[MetricLine, Field(discriminator="kind")])
_TIMING = TypeAdapter(TimingLine)


def read_metrics(path: Path) -> list[MetricLine]:
    """Read metrics.jsonl; a line that is still being written is left out.

    Raises:
        CfamcError: Exit 1; the file is missing or cannot be read. Exit 4; a line is none of these: names file, line
            and value.
    """
    return _read_lines(path, _METRIC)


def read_timing(path: Path) -> list[TimingLine]:
    """Read timing.jsonl of a run, as `read_metrics`."""
    return _read_lines(path, _TIMING)


def _read_lines(path: Path, schema: TypeAdapter[L]) -> list[L]:
    lines = []
    for number, raw in enumerate(read_jsonl(path), start=1):
        named = raw.pop("nonfinite", None)
        lost = {key: float(text) for key, text in named.items() if text in _LOST} if isinstance(named, dict) else {}
        key = next((key for key, value in raw.items() if _is_lost(value)), None)  # 1e999 is JSON
        try:
            if key is None:
                lines.append(schema.validate_python(raw | lost))
                continue
        except ValidationError as error:
            problem = min(error.errors(include_url=False), key=lambda problem: problem["type"] == "missing")
            key = str(problem["loc"][-1]) if problem["loc"] else "kind"
        value = f"{raw[key]!r:.20}" if key in raw else "missing"
        raise bad_data(f"{path}:{number}: {key} is {value}")
    return lines


def pack_bits(bits: Sequence[bool]) -> str:
    """Spell a bit mask: bit i of the number is `bits[i]`, in ceil(n / 4) digits."""
    if not bits:
        return ""
    number = int("".join("1" if bit else "0" for bit in reversed(bits)), 2)
    return f"{number:0{-(-len(bits) // 4)}x}"


def unpack_bits(text: str, n: int) -> list[bool]:
    """Read the first `n` bits of a mask that `pack_bits` spelled."""
    number = int(text or "0", 16)
    return [bool(number >> i & 1) for i in range(n)]


def now() -> datetime:
    """The time, in UTC and whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


_SEAL = re.compile(rb',\s*"sha256":\s*"([0-9a-f]{64})"\s*\}\s*\Z')  # the last key of a record


def _digest(record: bytes) -> str:
    """SHA-256 of a record as JSON, however an editor lays it out."""
    return hashlib.sha256(record.translate(None, b" \t\r\n")).hexdigest()


def load_record(path: Path | str, model: type[R]) -> R:
    """Read a record, or a recipe as it was resolved.

    Raises:
        CfamcError: Exit 1; the file is missing or cannot be read. Exit 4; it does not hold such a record, or was
            changed since it was written: one line that names file and field.
    """
    data = read_bytes(path)
    if seal := _SEAL.search(data, max(0, len(data) - 200)):  # older versions wrote none
        data = data[: seal.start()] + b"}"
        if _digest(data) != seal[1].decode():
            changed = f"{path} was changed after it was written: the rest of it is not what its sha256 is of"
            raise bad_data(changed, "bring it back as it was; without its last key, sha256, it is read as it stands")
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _unfit(error, str(path)) from error


def settings_of(probe: ProbeRecord, key: Literal["data", "settings"], model: type[R]) -> R:
    """A table of the recipe that a probe's record keeps as plain values.

    Raises:
        CfamcError: Exit 4; it is no such table: one line that names probe and field.
    """
    try:
        return model.model_validate_json(json.dumps(getattr(probe, key)))
    except ValidationError as error:
        raise _unfit(error, f"{probe.id}: {key}") from error


def _unfit(error: ValidationError, what: str) -> CfamcError:
    """The first thing in which what was read differs from its schema."""
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, problem["loc"]))
    if where == "schema_version":
        found = f"{what}: schema version {problem['input']!r:.20}, where {SCHEMA_VERSION} is known"
        return bad_data(found, "read it with the version of cfamc that wrote it, or a newer one")
    cause = " ".join(problem["msg"].split())
    return bad_data(f"{what}: {where + ': ' if where else ''}{cause}"[:500])


def save_record(path: Path, record: Record) -> None:
    """Write a record whole, with a digest of itself; one that could not be read back is never written.

    Raises:
        ValueError: The record breaks its own schema, as a careless `model_copy` can.
        CfamcError: The file cannot be written.
    """
    value = _storable(record.model_dump(mode="json", warnings="none"))
    data = json.dumps(value, indent=2, allow_nan=False).encode()
    type(record).model_validate_json(data)
    write_bytes(path, data[:-2] + f',\n  "sha256": "{_digest(data)}"\n}}\n'.encode())


def _storable(value: object) -> object:
    """File names may hold bytes that are no UTF-8; JSON may not."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_storable(key): _storable(item) for key, item in value.items()}
        case list():
            return [_storable(item) for item in value]
        case _:
            return value
