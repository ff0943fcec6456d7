"""Networks that others trained: their tensors, whatever they are called, as an encoder of ours and maybe a head.

Known are ResNets in torchvision's names and in those that one table below brings to them: kuangliu's CIFAR ResNets, the
dual batch norms of ACL, DynACL and AdvCL, lightly's numbered layers, solo-learn, CF-AMC-SSL's own code and our exports,
each under any prefix and in any wrapper. Architecture and sizes are read off the shapes.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from cfamc_cli.engine import checkpoint
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.encoder import Encoder, build_encoder, input_of
from cfamc_cli.engine.heads.classifier import LinearHead
from cfamc_cli.engine.heads.foreign_file import read_foreign_file
from cfamc_cli.engine.heads.frozen import extract_features, predict, weighted_knn
from cfamc_cli.engine.randomness import addressed_generator, balanced_order
from cfamc_cli.errors import bad_data, invalid
from cfamc_cli.recipe.plan import parameter_counts
from cfamc_cli.recipe.schema import DEPTHS, Features, Model, Normalize, Stem

_RENAMED = (  # in this order, wherever in a name they stand
    (r"\.bn_list\.(\d+\.)?", "."),  # ACL, DynACL and AdvCL: batch norms by branch; one of the branches is left by then
    (r"\bshortcut\.", "downsample."),  # kuangliu's CIFAR ResNets, and all that descend from them
    (r"\bdownsample\.conv\.", "downsample.0."),  # ACL, DynACL and AdvCL
    (r"\bdownsample\.bn\.", "downsample.1."),
    (r"\bprojection\.", "projector."),  # CF-AMC-SSL
)
_BRANCH = re.compile(r"\.bn_list\.(\d+)\.")
BRANCHES = ("normal", "pgd", "pgd_ce")  # what the branches are called in the code of ACL, DynACL and AdvCL, in order
_LAST = ("fc", "linear", "classifier", "classifier.fc", "head")  # a last layer, beside the backbone or in it
_NORMALIZED = (  # buffers of mean and std: ACL and DynACL, MadryLab's robustness, RobustBench, our exports
    *(("normalize.mean", "normalize.std"), ("normalizer.new_mean", "normalizer.new_std")),
    *(("mu", "sigma"), ("mean", "std"), ("input.mean", "input.std")),
)
_SECOND = re.compile(r"momentum|ema\b|ema_|_k\.|target|teacher|attacker")  # a network that follows another one
_SMALL_STEMS = tuple(stem for stem in get_args(Stem) if stem != "imagenet")  # whose weights have one shape
_STAGE = re.compile(r"layer([1-4])\.(\d+)\.conv1\.weight")
_KNOWN = f"known are {', '.join(DEPTHS)} in the names of torchvision, kuangliu, ACL, lightly and CF-AMC-SSL"
_LISTED = 8  # names that one line has
_NONE = 2  # the smallest size of a layer that the weights lack
_FEW = 10**7  # numbers of layers that a file may lack
_LOOKED_AT, _LARGE = 500, 100  # images that a suspicion rests on; fewer of them where each is `_PIXELS` large
_PIXELS = 64


@dataclass(frozen=True)
class Reading:
    """How a file is to be read, where it does not tell."""

    normalize: Normalize | None = None  # what the network expects of pixels; None for what the file says, or nothing
    input_size: int | None = None  # pixels of a side that it expects; None for images as they are
    batch_norm: str | None = None  # which branch of several batch norms: its place, or its name in `BRANCHES`
    network: str | None = None  # which of several networks: a part of its names
    stem: str | None = None  # which of those that shapes do not tell


@dataclass(frozen=True)
class LastLayer:
    """The layer that makes a network a classifier."""

    name: str  # in the file
    head: LinearHead  # on the CPU
    features: Features  # what it reads


@dataclass(frozen=True)
class Foreign:
    """A network that was read from a file."""

    model: Model  # its architecture
    encoder: Encoder  # on the CPU; where there was no `pre_feature` or projector, those hold initial weights
    last: LastLayer | None  # None where it is no classifier
    backbone_only: bool  # whether there was no `pre_feature`
    notes: tuple[str, ...]  # what a person should know: what was chosen, what did not fit, what is missing


def read_foreign(path: Path, reading: Reading | None = None) -> Foreign:
    """Read a ResNet that somebody else trained.

    Args:
        path: What `read_foreign_file` takes.
        reading: How; None leaves all to the file.

    Raises:
        CfamcError: Exit 4; it cannot be read, holds more than weights, or is no such network. Exit 2; it holds several
            networks or batch norms and nothing says which, or `reading` asks for what it does not hold.
    """
    reading = reading or Reading()
    found = _named(path, read_foreign_file(path), reading)
    root, tensors, theirs = found.root, found.tensors, found.theirs
    above = re.sub(r"[^.]+\.$", "", root)
    prefixes = {root: "backbone.", f"{above}pre_feature.": "pre_feature.", f"{above}projector.": "projector."}
    places = {  # names in the file with its prefixes, by ours
        ours + key.removeprefix(prefix): key
        for prefix, ours in prefixes.items()
        for key in tensors
        if key.startswith(prefix)
    }

    def rows(name: str) -> int:
        weight = tensors.get(places.get(name, ""))
        return 0 if weight is None or weight.dim() != 2 else len(weight)

    hidden = rows("pre_feature.0.weight")
    embedding = rows("projector.3.weight") if hidden else 0
    normalize, said = _normalization(tensors, (root, above), reading)
    stem, stem_notes = _stem(path, found, above, reading.stem)
    model = _model(
        path,
        _architecture(path, {key.removeprefix(root): value for key, value in tensors.items()})
        | {"stem": stem, "hidden_dim": hidden or _NONE, "embedding_dim": embedding or _NONE, "normalize": normalize}
        | {"input_size": reading.input_size or _exported_size(tensors.get(f"{above}input.size"))},
        numbers=sum(tensor.numel() for tensor in tensors.values()),
    )
    encoder = build_encoder(model, generator=addressed_generator("init", 0))
    parts = ("backbone.", *(["pre_feature."] if hidden else []), *(["projector."] if embedding else []))
    used = _load(path, encoder, found, {ours: key for ours, key in places.items() if ours.startswith(parts)}, parts)
    used |= {*said, f"{above}input.size"}
    last = _last_layer(tensors, (root, above), model, has_pre_feature=bool(hidden))
    if last is not None:
        used |= {f"{last.name}.weight", f"{last.name}.bias"}

    notes = [*found.notes, *stem_notes]
    if said:
        origin = "as the file has it" if reading.normalize is None else f"in place of the file's own {said[0]}"
        assert model.normalize is not None, "the file has one"
        notes.append(f"pixels are normalised by mean {model.normalize.mean} and std {model.normalize.std}, {origin}")
    if left := _groups(theirs[key] for key in tensors.keys() - used):
        notes.append(f"left out, for they are no part of the encoder: {left}")
    if not hidden:
        notes.append('there is no pre_feature layer: heads read the backbone (features "backbone")')
    elif not embedding:
        notes.append("there is no projector; heads do not read it")
    return Foreign(model, encoder, last, backbone_only=not hidden, notes=tuple(notes))


# Names


@dataclass(frozen=True)
class _Named:
    """The tensors of a file under torchvision's names, behind its own prefixes."""

    tensors: Mapping[str, Tensor]
    theirs: Mapping[str, str]  # what the file calls each of them
    root: str  # what stands before the names of the backbone, such as "module.backbone."
    notes: tuple[str, ...]


def _named(path: Path, tensors: Mapping[str, Tensor], reading: Reading) -> _Named:
    """Bring names to torchvision's, and choose one network and one branch of its batch norms."""
    spelled = {name: name for name in tensors} | dict(_spelled_out(tensors))  # what was numbered has names
    branches = sorted({int(match[1]) for name in spelled.values() if (match := _BRANCH.search(name))})
    branch, notes = _chosen_branch(path, branches, reading.batch_norm)
    theirs: dict[str, str] = {}
    for name, spelling in sorted(spelled.items()):  # a file's own order is not stable
        match = _BRANCH.search(spelling)
        if match is None or int(match[1]) == branch:
            for pattern, replacement in _RENAMED:
                spelling = re.sub(pattern, replacement, spelling)
        theirs.setdefault(spelling, name)
    stems = [name.removesuffix("conv1.weight") for name in theirs if name.endswith("conv1.weight")]
    roots = [stem for stem in stems if f"{stem}layer1.0.conv1.weight" in theirs]
    if not roots:
        shown = _groups(tensors) or "nothing"
        raise bad_data(f"{path}: no ResNet: it holds {shown}", _KNOWN)
    root, others = _chosen_network(path, roots, reading.network)
    if others:
        notes.append(f"of several networks {root or 'the outer one'} is read, not {', '.join(others)}")
    return _Named({ours: tensors[name] for ours, name in theirs.items()}, theirs, root, tuple(notes))


def _spelled_out(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names of layers that a Sequential has numbered, as lightly's backbones are: 0 and 1, and four stages in a row."""
    for first in [name for name in tensors if re.search(r"(^|\.)0\.weight$", name)]:
        before = first.removesuffix("0.weight")
        stage = next((place for place in (2, 3, 4) if f"{before}{place}.0.conv1.weight" in tensors), None)
        if stage is not None:
            numbered = {0: "conv1", 1: "bn1"} | {stage + place: f"layer{place + 1}" for place in range(4)}
            for place, name in numbered.items():
                start = f"{before}{place}."
                yield from ((key, f"{before}{name}.{key[len(start) :]}") for key in tensors if key.startswith(start))


def _chosen_branch(path: Path, branches: Sequence[int], asked: str | None) -> tuple[int | None, list[str]]:
    """Which of several batch norms is read, and what to say of it."""
    if len(branches) < 2:
        if asked is not None:
            raise invalid(f"--batch-norm has no effect: {path} has one batch norm in each place", "leave it out")
        return (branches[0] if branches else None), []
    names = {place: BRANCHES[place] if place < len(BRANCHES) else str(place) for place in branches}
    listed = ", ".join(f"{place} ({name})" for place, name in names.items())
    for place, name in names.items():
        if asked in (str(place), name):
            return place, [f"of the batch norms {listed} in each place, {place} ({name}) is read"]
    hint = "such as --batch-norm pgd, the branch of adversarial examples, which their authors evaluate"
    wrong = f"--batch-norm {asked!r:.40} is none of" if asked else "nothing says which of its batch norms to read:"
    raise invalid(f"{path}: {wrong} {listed}", hint)


def _chosen_network(path: Path, roots: Sequence[str], asked: str | None) -> tuple[str, list[str]]:
    """Which of several networks is read, and which others there are; one that follows another is none to begin with."""
    fit = [root for root in roots if asked is None or asked in root]
    first = [root for root in fit if not _SECOND.search(root)] if asked is None else fit
    chosen = first or fit
    if len(chosen) != 1:
        what = "no network" if not chosen else "several networks"
        of = "" if asked is None else f" whose names hold {asked!r:.80}"
        raise invalid(
            f"{path}: {what}{of}: it has {', '.join(map(repr, roots))}", "choose by --network, a part of a name"
        )
    return chosen[0], [root for root in roots if root != chosen[0]]


def _groups(names: Iterator[str] | Mapping[str, Tensor]) -> str:
    """Names in a line: by the first two of their parts, with how many there are."""
    groups = sorted(Counter(".".join(name.split(".")[:2])[:100] for name in names).items())
    listed = ", ".join(name if count == 1 else f"{name}.* ({count})" for name, count in groups[:_LISTED])
    return listed + (f" and {len(groups) - _LISTED} more" if len(groups) > _LISTED else "")


# Numbers


def _model(path: Path, raw: Mapping[str, object], *, numbers: int) -> Model:
    """The [model] that a file's shapes and buffers come to, if a recipe could have it and the file so many numbers."""
    try:
        model = Model.model_validate(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, problem['loc']))} {problem['input']!r:.40}"
        cause = f"a network with {what} is none that is known: {problem['msg'].lower()}"
        raise bad_data(f"{path}: {cause}", _KNOWN) from error
    if (wanted := parameter_counts(model)[0]) > 4 * numbers + _FEW:  # before it takes memory
        raise bad_data(f"{path}: its first layers are of a network of {wanted:,} numbers; it has {numbers:,}", _KNOWN)
    return model


def _load(path: Path, encoder: Encoder, found: _Named, places: Mapping[str, str], parts: tuple[str, ...]) -> set[str]:
    """Put the tensors at `places`, by our names, into those parts of the encoder, and return which were used."""
    state, used = {}, set()
    for key, own in encoder.state_dict().items():
        if key in places:
            state[key] = _numbers(path, found.theirs[places[key]], found.tensors[places[key]], like=own)
            used.add(places[key])
        elif not key.startswith(parts) or key.endswith("num_batches_tracked"):  # older files lack that; it is not used
            state[key] = own
    checkpoint.load_state(encoder, state, path=path, hint=_KNOWN)
    return used


def _numbers(path: Path, name: str, tensor: Tensor, *, like: Tensor) -> Tensor:
    """A tensor in the type of ours; one of whole numbers is no weight, and no variance lies below 0."""
    if like.is_floating_point() and not tensor.is_floating_point():
        raise bad_data(f"{path}: {name} is {tensor.dtype}", "save the network in float32, without quantisation")
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise bad_data(f"{path}: {name} is below 0, which no variance is", "get the file from its maker again")
    return tensor.to(like.dtype)


def _normalization(
    tensors: Mapping[str, Tensor], bases: Sequence[str], reading: Reading
) -> tuple[Normalize | dict[str, list[float]] | None, list[str]]:
    """What the network expects of pixels, and the buffers of the file that say so."""
    for base in dict.fromkeys(bases):
        for names in _NORMALIZED:
            keys = [base + name for name in names]
            if all(key in tensors and tensors[key].numel() == 3 for key in keys):
                mean, std = ([float(f"{value:.7g}") for value in tensors[key].flatten().tolist()] for key in keys)
                return reading.normalize or {"mean": mean, "std": std}, keys
    return reading.normalize, []


def _exported_size(size: Tensor | None) -> int | None:
    """The pixels that an export of ours resizes to."""
    return None if size is None or size.numel() != 1 else int(size)


def _last_layer(
    tensors: Mapping[str, Tensor], bases: Sequence[str], model: Model, *, has_pre_feature: bool
) -> LastLayer | None:
    """The first linear layer of a known name that fits the features."""
    for name in [base + last for base in dict.fromkeys(bases) for last in _LAST]:
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        features: Features = "pre_feature" if has_pre_feature and name.endswith("head") else "backbone"
        dim = model.hidden_dim if features == "pre_feature" else model.feature_dim
        if weight is None or weight.dim() != 2 or weight.shape[1] != dim or not bool(torch.isfinite(weight).all()):
            continue
        head = LinearHead(dim, len(weight))
        with torch.no_grad():
            head.weight.copy_(weight)
            if bias is not None:
                head.bias.copy_(bias)
        return LastLayer(name, head, features)
    return None


def _stem(path: Path, found: _Named, above: str, asked: str | None) -> tuple[str, list[str]]:
    """What the first layers are, and what to say of it: shapes tell neither padding nor ReLU."""
    first = found.tensors[f"{found.root}conv1.weight"]
    if first.dim() != 4 or first.shape[1] != 3 or first.shape[2] not in (3, 7):
        cause = f"its first convolution is {tuple(first.shape)}; known are 3x3 and 7x7 on 3 channels"
        raise bad_data(f"{path}: {cause}", _KNOWN)
    if first.shape[2] == 7:
        if asked is not None:
            raise invalid(f"--stem has no effect: the first convolution of {path} is 7x7", "leave it out")
        return "imagenet", []
    numbered = re.search(r"\b(\d)\.0\.conv1\.weight$", found.theirs[f"{found.root}layer1.0.conv1.weight"])
    if asked is not None:
        if asked not in _SMALL_STEMS:
            raise invalid(f"--stem {asked!r:.40} is none of {', '.join(_SMALL_STEMS)}", "such as: --stem cifar-padded")
        return asked, []
    if numbered and numbered[1] == "2":
        return "cifar-linear", ["there is no ReLU among its numbered layers before the first block, as in lightly's"]
    if not numbered and found.root != above and f"{above}classifier.weight" in found.tensors:
        cause = "its layers have solo-learn's names, and nothing says whether its first one pads as solo-learn's"
        raise invalid(f"{path}: {cause}", "--stem cifar-padded for a network of solo-learn, --stem cifar for others")
    return "cifar", []


def _architecture(path: Path, backbone: Mapping[str, Tensor]) -> dict[str, object]:
    """What [model] says of the backbone."""
    stages = [found[1] for key in backbone if (found := _STAGE.fullmatch(key))]
    depths = tuple(stages.count(stage) for stage in "1234")
    bottlenecks = "layer1.0.conv3.weight" in backbone
    for name, known in DEPTHS.items():
        if depths == known and bottlenecks == (name == "resnet50"):
            return {"backbone": name, "width": len(backbone["conv1.weight"])}
    block = "bottleneck" if bottlenecks else "basic"
    shape = "-".join(map(str, depths))
    raise bad_data(f"{path}: {block} blocks {shape} are no network that is known: {', '.join(DEPTHS)}", _KNOWN)


# Suspicions


def better_with(
    foreign: Foreign, normalize: Normalize, bank: ImageSet, judged: ImageSet
) -> tuple[int, int, int] | None:
    """Whether a network that was read without a normalisation is clearly more often right with one.

    Args:
        foreign: The network, on the CPU; a classifier is judged by its last layer, an encoder by nearest neighbours.
        normalize: What it may have been trained with.
        bank: Labelled images that vote as neighbours; a classifier needs none of them.
        judged: Labelled images of the same classes.

    Returns:
        Right answers without it, with it, and of how many; None where that is no clear gain: 3 points, and 3 deviations
        of a difference between paired answers.
    """
    most = _LOOKED_AT if judged.images.shape[-1] <= _PIXELS else _LARGE

    def some(images: ImageSet) -> tuple[Tensor, Tensor]:
        assert images.labels is not None, "labelled() raises otherwise"
        chosen = balanced_order(images.labels, "suspicion")[:most]
        return images.images[chosen], images.labels[chosen]

    (x, y), (known, votes), encoder = some(judged), some(bank), copy.deepcopy(foreign.encoder)

    def right(model: Model) -> Tensor:
        encoder.input = input_of(model)
        features: Features = "backbone" if foreign.last is None else foreign.last.features
        read = partial(extract_features, encoder, device=torch.device("cpu"), features=features)
        if foreign.last is not None:
            return predict(foreign.last.head, read(x)) == y
        return weighted_knn(read(known), votes, read(x), classes=len(judged.classes)) == y

    without, with_it = (right(foreign.model.model_copy(update={"normalize": part})) for part in (None, normalize))
    gained, lost = int((with_it & ~without).sum()), int((without & ~with_it).sum())
    clear = gained - lost > max(0.03 * len(x), 3 * (gained + lost) ** 0.5)
    return (int(without.sum()), int(with_it.sum()), len(x)) if clear else None
