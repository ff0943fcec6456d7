"""Encoder and head as one classifier, and how it is read back from a run.

Aggregated crops read the mean feature of n augmented crops, as in EMP-SSL (arXiv:2304.03977). Symbols: N samples, F
features, C classes, n crops of a sample, S pixels of a side. Images are float in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from cfamc_cli.engine import checkpoint as checkpoints
from cfamc_cli.engine.crops import CropParameters, crop_batch, sample_parameters
from cfamc_cli.engine.models import Encoder, Features
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.files import read_bytes
from cfamc_cli.recipe import AggregatedCrops, Augment, Crops, Model, Probe, Recipe
from cfamc_cli.records import ProbeRecord, load_record

HEAD = "head.safetensors"
RECORD = "record.json"
_VIEWS = 512  # views of one forward pass
_BLOCK = 64  # samples whose crops are drawn together; part of the address of a sample's crops


class RunPaths(Protocol):
    """The parts of a run that are read here."""

    @property
    def resolved_json(self) -> Path: ...
    @property
    def checkpoints(self) -> Path: ...


class LinearHead(nn.Module):
    """Logits (N, C) from features (N, F), which may be standardised before: (f - mean) / std."""

    def __init__(self, dim: int, classes: int, *, standardized: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, dim))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.mean: Tensor | None
        self.std: Tensor | None
        self.register_buffer("mean", torch.zeros(dim) if standardized else None)
        self.register_buffer("std", torch.ones(dim) if standardized else None)

    def scaled(self, features: Tensor) -> Tensor:
        """The features as the weights see them."""
        return features if self.mean is None or self.std is None else (features - self.mean) / self.std

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(self.scaled(features), self.weight, self.bias)


@dataclass(frozen=True)
class CropSource:
    """Which crops of a sample a head reads: fixed by seed, split and the sample's index, whoever else is in the batch.

    Attributes:
        group: n and how the crops are cut.
        augment: What happens to them then.
        seed: Seed of the run.
        split: "train" or "test".
    """

    group: Crops
    augment: Augment
    seed: int
    split: str

    def parameters(self, indices: Tensor, height: int, width: int) -> CropParameters:
        """The crops of the samples at `indices` (N,) of the split, for images of height x width pixels."""
        indices = indices.cpu()
        blocks, place = torch.unique(indices // _BLOCK, return_inverse=True)
        drawn = [_draw(self, int(block), height, width) for block in blocks]
        columns = place * _BLOCK + indices % _BLOCK
        names = CropParameters.__dataclass_fields__
        return CropParameters(*(torch.cat([getattr(part, name) for part in drawn], 1)[:, columns] for name in names))


@lru_cache(maxsize=256)
def _draw(source: CropSource, block: int, height: int, width: int) -> CropParameters:
    generator = addressed_generator("probe-crops", source.seed, source.split, block)
    group, augment = source.group, source.augment
    return sample_parameters(_BLOCK, height, width, group=group, augment=augment, generator=generator)


def crop_source(recipe: Recipe, settings: AggregatedCrops, *, split: str) -> CropSource:
    """The n crops of `settings`, cut and augmented as the first group of the recipe's own crops."""
    group = recipe.crops[0].model_copy(update={"count": settings.crops})
    return CropSource(group=group, augment=recipe.augment, seed=recipe.seed, split=split)


class Classifier(nn.Module):
    """Encoder and head: images (N, 3, S, S) in [0, 1] to logits (N, C).

    Attributes:
        encoder: On the device of the head.
        head: From the encoder's features to logits.
        features: Which layer of the encoder the head reads.
        crops: What the aggregated head reads of an image; None for heads that read it whole.
    """

    def __init__(
        self, encoder: Encoder, head: LinearHead, *, features: Features, crops: CropSource | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.features, self.crops = encoder, head, features, crops

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Logits; `indices` (N,) say which samples of the split these are, and matter to aggregated crops alone.

        Differentiable in `x`, also through the crops. Without `indices` the samples count as 0 to N - 1.
        """
        if self.crops is None:
            return self.logits(self.encoder.features(x, features=self.features))
        return self.logits(crop_features(self.encoder, x, indices, source=self.crops, features=self.features))

    def cut(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """The crops of each image, (n, N, 3, S, S) in [0, 1], for an attacker who moves each of them by itself."""
        assert self.crops is not None, "only the aggregated head reads crops"
        parameters = self.crops.parameters(_or_all(indices, x), x.shape[-2], x.shape[-1])
        return crop_batch(x, parameters, size=self.crops.group.size)

    def logits_of_crops(self, crops: Tensor) -> Tensor:
        """Logits (N, C) of crops (n, N, 3, S, S), such as `cut` returns."""
        return self.logits(_mean_features(self.encoder, crops, features=self.features))

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, C) of features (N, F)."""
        logits: Tensor = self.head(features)
        return logits


def crop_features(
    encoder: Encoder, x: Tensor, indices: Tensor | None, *, source: CropSource, features: Features
) -> Tensor:
    """The mean feature of each image's crops, (N, F), differentiable in `x`.

    Args:
        encoder: Read as it stands.
        x: (N, 3, H, W) in [0, 1].
        indices: (N,) places in the split; 0 to N - 1 for None.
        source: Which crops.
        features: Which layer to read.
    """
    parameters = source.parameters(_or_all(indices, x), x.shape[-2], x.shape[-1])
    rows = max(1, _VIEWS // len(x))  # crop numbers of one forward pass
    views = source.group.count

    def part(x: Tensor, first: int) -> Tensor:
        names = CropParameters.__dataclass_fields__
        own = CropParameters(*(getattr(parameters, name)[first : first + rows] for name in names))
        crops = crop_batch(x, own, size=source.group.size)
        read = encoder.features(crops.flatten(0, 1), features=features)
        return read.view(-1, len(x), read.shape[1]).sum(0)

    total: Tensor | None = None
    for first in range(0, views, rows):
        keeps_too_much = torch.is_grad_enabled() and rows < views  # activations of all crops: compute them again
        piece = (
            recomputed(part, x, first, use_reentrant=False, preserve_rng_state=False)
            if keeps_too_much
            else part(x, first)
        )
        total = piece if total is None else total + piece
    assert total is not None, "there is at least one crop"
    return total / views


def _mean_features(encoder: Encoder, crops: Tensor, *, features: Features) -> Tensor:
    """Features of crops (n, N, 3, S, S), averaged over n: (N, F)."""
    views, count = crops.shape[:2]
    rows = max(1, _VIEWS // count)
    sums = []
    for first in range(0, views, rows):
        read = encoder.features(crops[first : first + rows].flatten(0, 1), features=features)
        sums.append(read.view(-1, count, read.shape[1]).sum(0))
    return torch.stack(sums).sum(0) / views


def _or_all(indices: Tensor | None, x: Tensor) -> Tensor:
    return torch.arange(len(x)) if indices is None else indices


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder as a run left it.

    Attributes:
        encoder: On the device, in eval mode, without gradients.
        digest: SHA-256 of its parameters and buffers.
        path: The checkpoint.
        warnings: What was wrong with newer checkpoints, one line each.
        backbone_only: Whether it was imported without `pre_feature`, which then holds nothing of worth.
    """

    encoder: Encoder
    digest: str
    path: Path
    warnings: tuple[str, ...]
    backbone_only: bool


def load_encoder(folder: Path, model: Model, *, device: torch.device) -> LoadedEncoder:
    """Read the newest valid checkpoint of a run.

    Args:
        folder: The run's checkpoints.
        model: The recipe's [model].
        device: Where to put the encoder.

    Raises:
        CfamcError: Exit 4; there is none, or it does not fit the recipe.
    """
    path, saved, problems = checkpoints.newest_valid(folder)
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, and overwritten
        encoder = Encoder(model).to(memory_format=torch.channels_last)
    checkpoints.load_state(encoder, saved.model, path=path / checkpoints.MODEL)
    return LoadedEncoder(
        encoder=encoder.to(device).eval().requires_grad_(False),
        digest=checkpoints.digest_of(encoder),
        path=path,
        warnings=tuple(f"{problem.message}; reading {path.name}" for problem in problems),
        backbone_only=bool(saved.progress.get("backbone_only", False)),
    )


def feature_dim(encoder: Encoder, features: Features) -> int:
    """F, the length of what a head reads."""
    if features == "backbone":
        return encoder.backbone.feature_dim
    return len(encoder.pre_feature.state_dict()["0.bias"])


def load_recipe(run: RunPaths) -> Recipe:
    """The recipe of a run, as it was resolved when the run began.

    Raises:
        CfamcError: Exit 4; the file is missing or damaged.
    """
    path = run.resolved_json
    try:
        return Recipe.model_validate_json(read_bytes(path))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise CfamcError(f"{path}: {where}: {problem['msg']}"[:500], exit_code=ExitCode.BAD_DATA) from error


def parse_settings(settings: Mapping[str, object], *, path: Path) -> Probe:
    """The probe table of a record.

    Raises:
        CfamcError: Exit 4; it is none.
    """
    try:
        parsed: Probe = _PROBE.validate_json(json.dumps(settings))
    except ValidationError as error:
        raise CfamcError(f"{path}: settings of no known head", exit_code=ExitCode.BAD_DATA) from error
    return parsed


_PROBE: TypeAdapter[Probe] = TypeAdapter(Probe)


def load_classifier(run: RunPaths, probe_folder: Path, *, device: torch.device) -> Classifier:
    """Read encoder and head of a finished probe, ready to be judged: eval mode, float32, no gradients of parameters.

    Aggregated crops are those of the test split.

    Args:
        run: The run that the head belongs to.
        probe_folder: Such as probes/linear-001.
        device: Where to put it.

    Raises:
        CfamcError: Exit 2 for knn, which has no logits to differentiate. Exit 4 where a file is missing or damaged,
            or where encoder or head are not those that the record was made with.
    """
    path = probe_folder / RECORD
    record = load_record(path, ProbeRecord)
    recipe, settings = load_recipe(run), parse_settings(record.settings, path=path)
    if record.head == "knn":
        raise CfamcError(
            f"{probe_folder.name} is a knn head, which has no differentiable logits",
            hint="name another head, such as one of: cfamc probe --head linear",
            exit_code=ExitCode.INVALID,
        )
    loaded = load_encoder(run.checkpoints, recipe.model, device=device)
    if loaded.digest != record.encoder_digest:
        raise _changed(f"the encoder of {loaded.path} is not the one that {probe_folder.name} was fitted to")
    tensors = read_head(probe_folder / HEAD, digest=record.head_digest)
    head = LinearHead(
        feature_dim(loaded.encoder, record.features), len(record.classes), standardized="head.mean" in tensors
    )
    crops = crop_source(recipe, settings, split="test") if isinstance(settings, AggregatedCrops) else None
    classifier = Classifier(loaded.encoder, head.to(device), features=record.features, crops=crops)
    whole = classifier if record.head == "finetune" else nn.ModuleDict({"head": classifier.head})
    checkpoints.load_state(whole, tensors, path=probe_folder / HEAD)
    return classifier.eval().requires_grad_(False)


def read_head(path: Path, *, digest: str | None) -> dict[str, Tensor]:
    """Read head.safetensors, "head." before each name; a finetuned classifier has "encoder." as well.

    Raises:
        CfamcError: Exit 4; it is missing, damaged, or not what `digest` says.
    """
    try:
        data = read_bytes(path, limit=2**40)
    except CfamcError as error:
        raise CfamcError(error.message, hint=error.hint, exit_code=ExitCode.BAD_DATA) from error
    tensors = checkpoints.decode(path, data)
    if checkpoints.sha256(data) != digest:
        raise _changed(f"{path} is not the head that its record was made with")
    return tensors


def write_head(folder: Path, classifier: Classifier, *, finetuned: bool) -> str:
    """Write head.safetensors, with the encoder where that was changed too, and return its SHA-256."""
    whole = classifier if finetuned else nn.ModuleDict({"head": classifier.head})
    return checkpoints.write_tensors(folder / HEAD, whole.state_dict())


def _changed(message: str) -> CfamcError:
    hint = "fit a new head with: cfamc probe RUN"
    return CfamcError(message, hint=hint, exit_code=ExitCode.BAD_DATA)
