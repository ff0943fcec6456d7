"""Code meant for CUDA, watched on torch's `meta` device: CPU tensors are the host's, `meta` tensors the card's.

Operations on `meta` compute nothing but shapes. The code's own path runs, and what it would ask of a card shows:

    with watched() as seen:
        step_under_test(...)  # on tensors and modules that were put on META before
    assert len(seen.copies) <= 2

Within, these raise `HostWaitsError` at the line that does them: reading a value of the device (`.item()`, `bool`,
`.cpu()`, `.tolist()`); a shape that depends on values (`nonzero`, a boolean mask as index, `unique`); a copy to the
device that is not `non_blocking` from pinned memory, as `torch.tensor(..., device=...)` or an index in a list are; an
operation on tensors of both sides; float64 on the device. `pin_memory` needs no card here.

Code that has to read now and then is given an answer for every value, and each reading is noted instead:

    with watched(answer=1.0) as seen: ...
    assert len(seen.waits) == 1
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_FROM_VALUES = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
_BY_INDEX = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")


class HostWaitsError(AssertionError):
    """The host would wait for the card, or the card would refuse."""


@dataclass
class Seen:
    """What was asked of the device, each as "file:line what"."""

    copies: list[str] = field(default_factory=list)  # to the device
    waits: list[str] = field(default_factory=list)  # readings that were answered


@contextmanager
def watched(*, answer: float | None = None) -> Iterator[Seen]:
    """Watch what runs within.

    Args:
        answer: What every value reads that is asked of the device; None refuses to be asked.

    Yields:
        What was seen so far.
    """
    seen = Seen()
    with without_autocast(), _Values(), _Operations(seen, answer):
        yield seen


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within, an autocast of META, which torch refuses, does nothing: for building what will be watched."""
    autocast = torch.autocast

    def elsewhere(kind: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", elsewhere)
        yield


class _Values(TorchFunctionMode):
    """Sees what never reaches an operation: tensors made on the device from values of the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func in _FROM_VALUES and made.is_meta and not (args and _on_device(args[0]) and func is torch.as_tensor):
            raise HostWaitsError("a blocking copy: a tensor made on the device from values of the host")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                raise HostWaitsError("a blocking copy: an index in a list")
        return made


class _Operations(TorchDispatchMode):
    """Sees every operation, those of a backward pass included."""

    def __init__(self, seen: Seen, answer: float | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.answer = seen, answer
        self.pinned: list[Tensor] = []  # kept, so that no other tensor takes the place of one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = [tensor for tensor in tensors if tensor.is_meta]
        match name:
            case "aten::is_pinned":
                return self._is_pinned(args[0])
            case "aten::_pin_memory":
                self.pinned.append(args[0].clone())
                return self.pinned[-1]
            case "aten::_to_copy":
                return self._copy(args[0], func, args, kwargs, to=kwargs.get("device") or args[0].device)
            case "aten::copy_":
                return self._copy(args[1], func, args, kwargs, to=args[0].device)
        if not device:
            return self._made(func(*args, **kwargs))
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(name, lambda answer: answer)
        if torch.Tag.dynamic_output_shape in func.tags and (name not in _BY_INDEX or _by_mask(args[1])):
            raise HostWaitsError(f"{name}: a shape that depends on values")
        if name in _BY_INDEX and _by_mask(args[1]):
            raise HostWaitsError(f"{name}: a boolean mask is searched for its places")
        scalars = torch.Tag.pointwise in func.tags
        if any(not tensor.is_meta and not (scalars and tensor.dim() == 0) for tensor in tensors):
            raise HostWaitsError(f"{name}: tensors of the host and of the device")
        return self._made(func(*args, **kwargs))

    def _copy(self, source: Tensor, func: Any, args: Any, kwargs: Any, *, to: torch.device) -> Any:
        """A copy, within one side or between the two."""
        if source.is_meta and to.type != "meta":
            target = torch.empty(source.shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return self._read(func._schema.name, lambda answer: target.fill_(answer))
        if not source.is_meta and to.type == "meta":
            whether = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if not (whether and self._is_pinned(source)):
                raise HostWaitsError("a blocking copy to the device: it is sent non_blocking, from pinned memory")
            self.seen.copies.append(_line("copy"))
        return self._made(func(*args, **kwargs))

    def _read(self, name: str, answer: Callable[[float], Any]) -> Any:
        if self.answer is None:
            raise HostWaitsError(f"{name}: the host waits for a value of the device")
        self.seen.waits.append(_line(name))
        return answer(self.answer)

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr() for kept in self.pinned)

    def _made(self, made: Any) -> Any:
        if any(isinstance(leaf, Tensor) and leaf.is_meta and leaf.dtype == torch.float64 for leaf in tree_leaves(made)):
            raise HostWaitsError("float64 on the device")
        return made


def _on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _line(what: str) -> str:
    """The innermost line of the project that asked."""
    frames = [f for f in traceback.extract_stack() if "cfamc_cli" in Path(f.filename).parts]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {what}" if frames else what
