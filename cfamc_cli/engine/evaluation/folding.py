"""A frozen copy of a network that computes the same in eval mode and is cheaper to attack.

Batch norms are folded into the layer before them and, on a CPU, weights are laid out channels last. Attacks search
through the copy; the evaluator counts what the original says.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cfamc_cli.engine.attacks.search import Predict, logits_at

_CLOSE = 1e-4  # of the largest output: how far the copy may be from the original

_Layer = nn.Conv2d | nn.Linear
_Norm = nn.BatchNorm1d | nn.BatchNorm2d


def frozen_copy(network: nn.Module, images: Tensor) -> Predict:
    """Copy a network for attacks; the network itself is left as it is.

    Args:
        network: Any module from images to outputs (N, ...), on the device of the images.
        images: A few images that it takes, (N, C, H, W); the copy is held against the original on them.

    Returns:
        A function with the outputs of the network in eval mode, up to rounding. Where folding would change them, as
        when the output of a layer is used a second time, nothing is folded.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    folded = copy.deepcopy(plain)
    _fold(folded, images)
    expected = logits_at(plain, images)
    scale = expected.abs().amax().clamp_min(1e-6)
    same = bool(((logits_at(folded, images) - expected).abs().amax() <= _CLOSE * scale).item())
    chosen = folded if same else plain
    if images.device.type != "cpu":
        return chosen
    last = torch.channels_last
    chosen = chosen.to(memory_format=last)
    return lambda points: chosen(points.contiguous(memory_format=last))


def _fold(network: nn.Module, images: Tensor) -> None:
    """Fold every batch norm that is fed by the output of exactly one layer, in place."""
    made: dict[int, tuple[_Layer, Tensor]] = {}  # the output is held, so that its id stays its own
    pairs: list[tuple[_Layer, _Norm]] = []
    calls: dict[nn.Module, int] = {}

    def after_layer(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        calls[layer] = calls.get(layer, 0) + 1
        made[id(output)] = layer, output

    def after_norm(norm: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        calls[norm] = calls.get(norm, 0) + 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], norm))

    handles = [
        part.register_forward_hook(after_layer if isinstance(part, nn.Conv2d | nn.Linear) else after_norm)
        for part in network.modules()
        if isinstance(part, nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    logits_at(network, images)
    for handle in handles:
        handle.remove()
    places = {part: (parent, name) for parent in network.modules() for name, part in parent.named_children()}
    for layer, norm in pairs:
        if calls[layer] != 1 or calls[norm] != 1 or norm.running_mean is None or norm.running_var is None:
            continue
        gain = (norm.running_var + norm.eps).rsqrt()
        if norm.affine:
            gain = gain * norm.weight
        shift = -norm.running_mean * gain + (norm.bias if norm.affine else 0)
        bias = shift if layer.bias is None else layer.bias * gain + shift
        layer.weight = nn.Parameter(layer.weight * gain.reshape(-1, *([1] * (layer.weight.dim() - 1))), False)
        layer.bias = nn.Parameter(bias, False)
        parent, name = places[norm]
        setattr(parent, name, nn.Identity())
