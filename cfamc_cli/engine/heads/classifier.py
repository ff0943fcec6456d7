"""Encoder and head as one classifier, and how it is read back from a run.

Aggregated crops read the mean feature of n augmented crops, as in EMP-SSL (arXiv:2304.03977). Symbols: N samples, F
features, C classes, n crops of a sample, S pixels of a side. Images are float in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from cfamc_cli.engine import checkpoint as checkpoints
from cfamc_cli.engine.crops import CropParameters, crop_batch, cut, sample_parameters
from cfamc_cli.engine.device import move_together
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.engine.sink import Talk
from cfamc_cli.errors import CfamcError, bad_data, invalid
from cfamc_cli.recipe.schema import AggregatedCrops, Augment, Crops, Features, Model, Recipe
from cfamc_cli.store.records import ProbeRecord, settings_of

_VIEWS = 512  # views of one forward pass
_BLOCK = 64  # samples whose crops are drawn together; part of the address of a sample's crops


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
    """Which crops of a sample a head reads: fixed by seed, split and the index of the sample, whatever the batch."""

    group: Crops  # n and how the crops are cut
    augment: Augment  # what happens to them then
    seed: int  # of the run
    split: str  # "train" for images that a head is fitted to, "test" for those that it is judged on

    def parameters(self, x: Tensor, indices: Tensor | None) -> CropParameters:
        """The crops of the images `x` (N, 3, H, W), which lie at `indices` (N,) of the split; None: at 0 to N - 1."""
        return _crops_at(self, _places(x, indices), x.shape[-2], x.shape[-1])

    def packed(self, x: Tensor, indices: Tensor | None) -> list[list[Tensor]]:
        """The same as `cut` reads them, on the device of `x`: so many crops at a time as a forward pass holds."""
        places, rows = tuple(_places(x, indices).tolist()), max(1, _VIEWS // len(x))
        return _packed(self, places, x.shape[-2], x.shape[-1], rows, x.device)


def _places(x: Tensor, indices: Tensor | None) -> Tensor:
    """Where images lie in the split, (N,) on the CPU: as said, else at 0 to N - 1."""
    return torch.arange(len(x)) if indices is None else indices.cpu()


def _crops_at(source: CropSource, indices: Tensor, height: int, width: int) -> CropParameters:
    blocks, place = torch.unique(indices // _BLOCK, return_inverse=True)
    drawn = [vars(_draw(source, int(block), height, width)).values() for block in blocks]
    columns = place * _BLOCK + indices % _BLOCK
    return CropParameters(*(torch.cat(parts, 1)[:, columns] for parts in zip(*drawn, strict=True)))


@lru_cache(maxsize=8)  # an attack reads the same crops of an image at every step
def _packed(
    source: CropSource, indices: tuple[int, ...], height: int, width: int, rows: int, device: torch.device
) -> list[list[Tensor]]:
    whole = vars(_crops_at(source, torch.tensor(indices), height, width)).values()
    firsts = range(0, source.group.count, rows)
    parts = [CropParameters(*(drawn[first : first + rows] for drawn in whole)) for first in firsts]
    return move_together([part.lists() for part in parts], device)


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
        return self.logits(self.read(x, indices))

    def read(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """What the head reads of images: (N, F)."""
        return read_features(self.encoder, x, indices, features=self.features, crops=self.crops)

    def cut(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """The crops of each image, (n, N, 3, S, S) in [0, 1], for an attacker who moves each of them by itself."""
        assert self.crops is not None, "only the aggregated head reads crops"
        return crop_batch(x, self.crops.parameters(x, indices), size=self.crops.group.size)

    def logits_of_crops(self, crops: Tensor) -> Tensor:
        """Logits (N, C) of crops (n, N, 3, S, S), such as `cut` returns."""
        views, count = crops.shape[:2]
        parts = crops.split(max(1, _VIEWS // count))
        sums = [_sum_over_crops(self.encoder, part, features=self.features) for part in parts]
        return self.logits(torch.stack(sums).sum(0) / views)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, C) of features (N, F)."""
        logits: Tensor = self.head(features)
        return logits


def read_features(
    encoder: Encoder, x: Tensor, indices: Tensor | None, *, features: Features, crops: CropSource | None
) -> Tensor:
    """What a head reads of images, differentiable in `x`: their features, or the mean over the crops of each.

    Args:
        encoder: Read as it stands.
        x: (N, 3, H, W) in [0, 1].
        indices: (N,) places in the split, which fix the crops; 0 to N - 1 for None.
        features: Which layer to read.
        crops: Which crops; None for whole images.

    Returns:
        (N, F).
    """
    if crops is None:
        return encoder.features(x, features=features)
    parts, size = crops.packed(x, indices), crops.group.size

    def part(x: Tensor, lists: list[Tensor]) -> Tensor:
        return _sum_over_crops(encoder, cut(x, lists, size=size), features=features)

    # the activations of all crops would be too much to keep for a backward pass: compute them again
    again = partial(recomputed, part, use_reentrant=False, preserve_rng_state=False)
    read = again if torch.is_grad_enabled() and len(parts) > 1 else part
    return torch.stack([read(x, lists) for lists in parts]).sum(0) / crops.group.count


def _sum_over_crops(encoder: Encoder, crops: Tensor, *, features: Features) -> Tensor:
    """Features of crops (n, N, 3, S, S), summed over n: (N, F)."""
    return encoder.features(crops.flatten(0, 1), features=features).view(*crops.shape[:2], -1).sum(0)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder as a run left it."""

    encoder: Encoder  # on `device`, in eval mode, without gradients
    device: torch.device
    digest: str  # SHA-256 of its parameters and buffers
    path: Path  # the checkpoint
    backbone_only: bool  # whether it was imported without `pre_feature`, which then holds nothing of worth


def load_encoder(folder: Path, model: Model, *, device: torch.device, talk: Talk) -> LoadedEncoder:
    """Read the newest checkpoint of a run that is whole.

    Args:
        folder: The run's checkpoints.
        model: The recipe's [model].
        device: Where to put the encoder.
        talk: Hears what is wrong with newer checkpoints.

    Raises:
        CfamcError: Exit 4; there is none, or it does not fit the recipe.
    """
    path, saved, problems = checkpoints.newest_valid(folder)
    for problem in problems:
        talk.warning(f"{problem.message}; reading {path.name}")
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, and overwritten
        encoder = Encoder(model).to(memory_format=torch.channels_last)
    checkpoints.load_state(encoder, saved.model, path=path / checkpoints.MODEL)
    return LoadedEncoder(
        encoder=encoder.to(device).eval().requires_grad_(False),
        device=device,
        digest=checkpoints.digest_of(encoder),
        path=path,
        backbone_only=bool(saved.progress.get("backbone_only", False)),
    )


def feature_dim(encoder: Encoder, features: Features) -> int:
    """F, the length of what a head reads."""
    return encoder.feature_dim if features == "backbone" else len(encoder.state_dict()["pre_feature.0.bias"])


def load_classifier(loaded: LoadedEncoder, probe: ProbeRecord, path: Path, recipe: Recipe) -> Classifier:
    """Read the head of a finished probe, ready to be judged: eval mode, float32, no gradients of parameters.

    Aggregated crops are those of the test split.

    Args:
        loaded: The encoder of the run; the classifier has it, on the same device.
        probe: The record of the head.
        path: Its weights.
        recipe: That of the run.

    Raises:
        CfamcError: Exit 2 for knn, which has no logits to differentiate. Exit 4 where the file is missing or damaged,
            where encoder or head are not those that the record was made with, or where its settings are of no head.
    """
    name = path.parent.name
    if probe.head == "knn":
        raise invalid(
            f"{name} is a knn head, which has no differentiable logits",
            "name another head, such as one of: cfamc probe --head linear",
        )
    if loaded.digest != probe.encoder_digest:
        raise _changed(f"the encoder of {loaded.path} is not the one that {name} was fitted to")
    tensors = checkpoints.read_tensors(path)
    if checkpoints.sha256(checkpoints.encode(tensors)) != probe.head_digest:
        raise _changed(f"{path} is not the head that its record was made with")
    dim = feature_dim(loaded.encoder, probe.features)
    head = LinearHead(dim, len(probe.classes), standardized="head.mean" in tensors).to(loaded.device)
    crops = None
    if probe.head == "crops":
        crops = crop_source(recipe, settings_of(probe, "settings", AggregatedCrops), split="test")
    classifier = Classifier(loaded.encoder, head, features=probe.features, crops=crops)
    checkpoints.load_state(stored(classifier, finetuned=probe.head == "finetune"), tensors, path=path)
    return classifier.eval().requires_grad_(False)


def write_head(path: Path, classifier: Classifier, *, finetuned: bool) -> str:
    """Write the weights of a head, with the encoder where that was changed too, and return their SHA-256."""
    return checkpoints.write_tensors(path, stored(classifier, finetuned=finetuned).state_dict())


def stored(classifier: Classifier, *, finetuned: bool) -> nn.Module:
    """What head.safetensors holds: "head." before each name, and "encoder." before those of a finetuned one."""
    return classifier if finetuned else nn.ModuleDict({"head": classifier.head})


def _changed(message: str) -> CfamcError:
    return bad_data(message, "fit a new head with: cfamc probe RUN")
