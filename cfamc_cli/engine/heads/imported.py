"""Encoders that others trained: their tensors, whatever they are called, as an encoder of ours.

Known are torchvision's ResNets and the layout of CF-AMC-SSL's own code (backbone, pre_feature, projection), each under
any prefix. Architecture and sizes are read off the shapes. A .pt file is read as weights only, never unpickled freely.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cfamc_cli.engine import checkpoint
from cfamc_cli.engine.encoder import Encoder, build_encoder
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.errors import CfamcError, bad_data
from cfamc_cli.recipe.schema import DEPTHS, Model

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "encoder", "backbone")
_STAGE = re.compile(r"layer([1-4])\.(\d+)\.conv1\.weight")
_LISTED = 8  # keys that one line names
_NONE = 2  # the smallest size of a layer that the weights lack


@dataclass(frozen=True)
class Foreign:
    """An encoder that was read from a file."""

    model: Model  # its architecture
    encoder: Encoder  # on the CPU; where there was no `pre_feature` or projector, those hold initial weights
    backbone_only: bool  # whether there was no `pre_feature`
    notes: tuple[str, ...]  # what a person should know: what did not fit, what is missing


def read_foreign(path: Path) -> Foreign:
    """Read a ResNet that somebody else trained.

    Args:
        path: A safetensors file, or a .pt, .pth, .bin or .tar file of plain tensors.

    Raises:
        CfamcError: Exit 4; it cannot be read, holds more than weights, or is no such network.
    """
    tensors = _read(path)
    root = _root(path, tensors)
    above = root.removesuffix("backbone.")
    prefixes = {root: "backbone.", f"{above}pre_feature.": "pre_feature."}
    prefixes |= {f"{above}{name}.": "projector." for name in ("projector", "projection")}
    theirs = {  # names in the file, by ours
        ours + key.removeprefix(prefix): key
        for prefix, ours in prefixes.items()
        for key in tensors
        if key.startswith(prefix)
    }
    architecture = _architecture(path, {key.removeprefix(root): value for key, value in tensors.items()})

    def rows(name: str) -> int:
        weight = tensors.get(theirs.get(name, ""))
        return 0 if weight is None or weight.dim() != 2 else len(weight)

    hidden = rows("pre_feature.0.weight")
    embedding = rows("projector.3.weight") if hidden else 0
    sizes = {"hidden_dim": hidden or _NONE, "embedding_dim": embedding or _NONE}
    model = Model.model_validate(architecture | sizes)
    encoder = build_encoder(model, generator=addressed_generator("init", 0))
    parts = ("backbone.", *(["pre_feature."] if hidden else []), *(["projector."] if embedding else []))
    state, used = {}, set()
    for key, own in encoder.state_dict().items():
        if key.startswith(parts) and key in theirs:
            state[key] = tensors[theirs[key]].to(own.dtype)
            used.add(theirs[key])
        elif not key.startswith(parts) or key.endswith("num_batches_tracked"):  # older files lack that; it is not used
            state[key] = own
    checkpoint.load_state(encoder, state, path=path)

    unused = sorted(tensors.keys() - used)
    notes = []
    if unused:
        more = f" and {len(unused) - _LISTED} more" if len(unused) > _LISTED else ""
        notes.append(f"left out, for they are no part of the encoder: {', '.join(unused[:_LISTED])}{more}")
    if not hidden:
        notes.append('there is no pre_feature layer: heads read the backbone (features "backbone")')
    elif not embedding:
        notes.append("there is no projector; heads do not read it")
    notes.append("images are given as values in [0, 1]; a network trained on normalised images needs that folded in")
    return Foreign(model=model, encoder=encoder, backbone_only=not hidden, notes=tuple(notes))


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without wrappers."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise _bad(path, f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _tensors(path, _unpickled(path))
    return checkpoint.read_tensors(path)


def _unpickled(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats of old, which are read all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _bad(
            path,
            "holds more than weights, and would run code to be read",
            hint="save its state dict alone, as safetensors or by torch.save(model.state_dict(), ...)",
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise _bad(path, f"not a readable file of weights ({' '.join(str(error).split())[:120]})") from error


def _tensors(path: Path, content: object) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if any(key.endswith("conv1.weight") for key in tensors):
            return tensors
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return tensors
        content = inner
    raise _bad(path, f"holds a {type(content).__name__}, not tensors by name")


def _root(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """What stands before the names of the backbone, such as "module.backbone."."""
    stems = [key.removesuffix("conv1.weight") for key in tensors if key.endswith("conv1.weight")]
    roots = [root for root in stems if f"{root}layer1.0.conv1.weight" in tensors]
    if not roots:
        shown = ", ".join(sorted(tensors)[:_LISTED]) or "nothing"
        raise _bad(path, f"no ResNet: it holds {shown}", hint="known are torchvision's names and backbone.*")
    return min(roots, key=lambda root: ("momentum" in root or "_k." in root, len(root), root))


def _architecture(path: Path, backbone: Mapping[str, Tensor]) -> dict[str, object]:
    """What [model] says of the backbone."""
    first = backbone["conv1.weight"]
    if first.dim() != 4 or first.shape[1] != 3 or first.shape[2] not in (3, 7):
        raise _bad(path, f"its first convolution is {tuple(first.shape)}; known are 3x3 and 7x7 on 3 channels")
    stages = [found[1] for key in backbone if (found := _STAGE.fullmatch(key))]
    depths = tuple(stages.count(stage) for stage in "1234")
    bottlenecks = "layer1.0.conv3.weight" in backbone
    for name, known in DEPTHS.items():
        if depths == known and bottlenecks == (name == "resnet50"):
            return {"backbone": name, "stem": "cifar" if first.shape[2] == 3 else "imagenet", "width": len(first)}
    block = "bottleneck" if bottlenecks else "basic"
    shape = "-".join(map(str, depths))
    raise _bad(path, f"{block} blocks {shape} are no network that is known: {', '.join(DEPTHS)}")


def _bad(path: Path, cause: str, *, hint: str = "") -> CfamcError:
    return bad_data(f"{path}: {cause}", hint)
