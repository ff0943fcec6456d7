"""Weights of a network that timm makes, as an encoder of ours and maybe a head; which network is told, not guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cfamc_cli.engine import checkpoint
from cfamc_cli.engine.encoder import Encoder, build_encoder
from cfamc_cli.engine.heads.classifier import LinearHead, feature_dim
from cfamc_cli.engine.heads.foreign_file import read_foreign_file
from cfamc_cli.engine.heads.imported import Foreign, LastLayer, Reading
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.errors import bad_data, invalid
from cfamc_cli.recipe.schema import Features, Model

_OPTIONS = "options of timm.create_model follow the name: --architecture timm:NAME,img_size=32,patch_size=4"
_ABOVE = "pre_feature."  # the layer of an export of ours that heads read


def read_timm(path: Path, architecture: Model, reading: Reading) -> Foreign:
    """Read the weights of a network of timm, under timm's names behind any prefix.

    Args:
        path: What `read_foreign_file` takes.
        architecture: Its backbone and options count.
        reading: What the network expects of pixels.

    Raises:
        CfamcError: Exit 4; it cannot be read, or is another network. Exit 2; timm cannot make it, or `reading` asks
            for a choice that there is not.
    """
    asked = {"--batch-norm": reading.batch_norm, "--network": reading.network, "--stem": reading.stem}
    if idle := [flag for flag, value in asked.items() if value is not None]:
        raise invalid(f"{', '.join(idle)} would have no effect beside --architecture", "leave it out")
    tensors = read_foreign_file(path)
    above = {key.removeprefix(_ABOVE): value for key, value in tensors.items() if key.startswith(_ABOVE)}
    sizes = {"hidden_dim": len(above["0.weight"])} if "0.weight" in above else {}
    reads = {"normalize": reading.normalize, "input_size": reading.input_size}
    model = architecture.model_copy(update=reads | sizes)
    encoder = build_encoder(model, generator=addressed_generator("init", 0))
    own = encoder.backbone.state_dict()
    prefix = _prefix(tensors, own)
    found = {key: tensors[prefix + key].to(own[key].dtype) for key in own if prefix + key in tensors}
    if not found:
        shown = ", ".join(sorted(tensors)[:3])
        raise bad_data(f"{path}: no {model.backbone}: it holds {shown}", "--architecture says what the file has")
    checkpoint.load_state(encoder.backbone, found, path=path, hint=_OPTIONS)
    if sizes:
        checkpoint.load_state(encoder.pre_feature, above, path=path)
    last = _last_layer(tensors, prefix, encoder, "pre_feature" if sizes else "backbone")
    used = {prefix + key for key in found} | {_ABOVE + key for key in above if sizes}
    used |= {f"{last.name}.weight", f"{last.name}.bias"} if last else set()
    left = sorted(tensors.keys() - used)
    notes = [f"left out, for they are no part of the backbone: {', '.join(left[:8])}"] if left else []
    if not sizes:
        notes.append('there is no pre_feature layer: heads read the backbone (features "backbone")')
    return Foreign(model, encoder, last, backbone_only=not sizes, notes=tuple(notes))


def _prefix(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What stands before timm's names in most places, such as "module."."""
    first = next(iter(own))
    prefixes = [key.removesuffix(first) for key in tensors if key == first or key.endswith(f".{first}")]
    return max(prefixes, key=lambda prefix: sum(prefix + key in tensors for key in own), default="")


def _last_layer(tensors: Mapping[str, Tensor], prefix: str, encoder: Encoder, features: Features) -> LastLayer | None:
    """The classifier: the head of an export of ours, or what timm names where that reads the features as they are."""
    name, dim = "head", feature_dim(encoder, features)
    if prefix != "backbone.":
        name = prefix + str(getattr(encoder.backbone, "default_cfg", {}).get("classifier"))
    weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
    if weight is None or weight.dim() != 2 or weight.shape[1] != dim:
        return None
    head = LinearHead(dim, len(weight))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return LastLayer(name, head, features)
