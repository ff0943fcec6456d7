"""Backbones that the library timm makes: built without classifier or dropping, and measured without memory.

What is measured runs on torch's meta device, where tensors have shapes and no values: a plan of a large net takes as
little as that of a small one. Symbols: F features, S pixels of a side.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.errors import invalid
from cfamc_cli.recipe.plan import Part, Shape
from cfamc_cli.recipe.schema import Model, Recipe, key_of

_RATES = ("p", "drop_prob", "prob")  # what modules that drop something call how often
_VIEWS = 2  # that are measured: batch norm needs two


def create(model: Model) -> nn.Module:
    """The backbone of [model] as timm makes it, (N, 3, S, S) to (N, F), on torch's present default device.

    It has no classifier, and drops nothing: all rates of dropout and stochastic depth are 0, since an adversary needs
    passes that repeat. Its initial weights are drawn from torch's default generator.

    Raises:
        CfamcError: Exit 2; timm knows no such name, or cannot make it with those options.
    """
    name, options = model.timm or "", model.options
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists all names"
        raise invalid(f"model.backbone: timm {timm.__version__} knows no {name}", hint)
    try:
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except Exception as error:  # each net checks its options in its own way, if at all
        key = "options" if options else "backbone"
        raise invalid(
            f"model.{key}: timm cannot make {name}{' with these' if options else ''}: {_words(error)}",
            "the arguments of timm.create_model for that name are what can be set",
        ) from error
    for part in net.modules():
        if "drop" in type(part).__name__.lower():
            for rate in (rate for rate in _RATES if isinstance(getattr(part, rate, None), float)):
                setattr(part, rate, 0.0)
    return net


def features_of(net: nn.Module) -> int:
    """F, as timm tells it: what comes out of a net without classifier."""
    return int(getattr(net, "head_hidden_size", None) or net.num_features)  # type: ignore[arg-type]


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The blocks or stages that a net repeats: the members of its outermost lists of like modules."""
    found = []
    for child in net.children():
        members = list(child.children())
        alike = isinstance(child, nn.Sequential | nn.ModuleList) and len({type(member) for member in members}) == 1
        found += members if alike and list(child.parameters()) else blocks_of(child)
    return found


def refusal(model: Model, height: int, width: int) -> str:
    """Why the backbone does not take images of that size, in timm's words; empty where it does."""
    return _refusal(model.model_dump_json(), height, width)


@lru_cache(maxsize=64)
def _refusal(model: str, height: int, width: int) -> str:
    net = _on_meta(model).eval()
    try:
        with torch.no_grad():
            shape = tuple(net(_views(height, width)).shape[1:])
    except Exception as error:  # whatever a net raises at a size that it cannot take
        return _words(error)
    return "" if shape == (features_of(net),) else f"what comes out is {shape}, not {features_of(net)} features"


def measure(recipe: Recipe) -> dict[int, Shape]:
    """What the backbone of a recipe comes to, for each size of its crops.

    Raises:
        CfamcError: Exit 2; as for `create`, the backbone does not take the crops or images of the recipe, draws random
            numbers in training, or has no blocks that could be computed again.
    """
    model, known = recipe.model, KNOWN_SETS.get(recipe.data.dataset)
    sizes = {
        key_of(place, f"crops.{index}.size"): model.input_size or group.size
        for place, part in enumerate(recipe.parts())
        for index, group in enumerate(part.crops)
    }
    whole = model.input_size or recipe.data.size or (known.size if known else None)  # of the images that heads read
    for key, size in (sizes if whole is None else sizes | {"data.size": whole}).items():
        require_size(model, size, size, what=f"{key}: ")
    if recipe.train.memory == "recompute" and not blocks_of(_on_meta(model.model_dump_json())):
        why = f'"recompute" has no effect: {model.backbone} has no list of blocks to compute again'
        raise invalid(f"train.memory: {why}", 'set train.memory = "full"')
    return {size: _shape(model.model_dump_json(), size) for size in sizes.values()}


def require_size(model: Model, height: int, width: int, *, what: str = "") -> None:
    """Refuse images of a size that the backbone does not take; `what` says whose size that is.

    Raises:
        CfamcError: Exit 2, with timm's reason.
    """
    if why := refusal(model, height, width):
        raise invalid(
            f"{what}{model.backbone} does not take images of {height}x{width} pixels: {why}",
            "set model.options, such as img_size, to what crops and images have; many nets take one size only",
        )


@lru_cache(maxsize=2)
def _on_meta(model: str) -> nn.Module:
    with torch.device("meta"):
        return create(Model.model_validate_json(model))


def _views(height: int, width: int) -> Tensor:
    return torch.empty(_VIEWS, 3, height, width, device="meta").contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=64)
def _shape(model: str, size: int) -> Shape:
    """One forward pass in training; a part ends where a block begins or ends."""
    net = _on_meta(model).train()
    seen = {parameter.untyped_storage()._cdata: parameter.detach() for parameter in net.parameters()}
    parts: list[Part] = []
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage()._cdata) not in seen:
            seen[place] = tensor  # else another might come to lie there
            kept.append(tensor.nbytes // 4 // _VIEWS)  # a place that max-pooling chose counts as two numbers
        return tensor

    def end(found: object, *, again: bool) -> None:
        output = found.numel() // _VIEWS if isinstance(found, Tensor) else 0
        if kept:
            parts.append(Part(kept=sum(kept), output=output, largest=max(kept), again=again))
        kept.clear()

    hooks = [block.register_forward_pre_hook(lambda _, x: end(x[0], again=False)) for block in blocks_of(net)]
    hooks += [block.register_forward_hook(lambda _, __, y: end(y, again=True)) for block in blocks_of(net)]
    draws = _Draws()
    with FlopCounterMode(display=False) as counter, draws, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        end(net(_views(size, size).requires_grad_()), again=False)
    for hook in hooks:
        hook.remove()
    if draws.found:
        name = Model.model_validate_json(model).backbone
        why = f"{name} draws random numbers in training ({', '.join(sorted(draws.found))})"
        raise invalid(f"model.backbone: {why}", "an adversary needs passes that repeat; choose another")
    return Shape(
        features=features_of(net),
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        products=counter.get_total_flops() // (2 * _VIEWS),
        parts=tuple(parts),
    )


class _Draws(TorchDispatchMode):
    """Notes the operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


def recompute(net: nn.Module, again: Callable[..., Any]) -> None:
    """Let each block that a net repeats run as `again(block's own forward, ...)`; copies of the net do likewise."""
    for block in blocks_of(net):
        block.forward = partial(again, block.forward)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
