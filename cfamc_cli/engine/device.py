"""Where and how precisely things are computed: device, precision, determinism."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cfamc_cli.engine.costs import plan_of
from cfamc_cli.engine.sink import Talk
from cfamc_cli.errors import CfamcError, invalid
from cfamc_cli.recipe.plan import compiling_pays
from cfamc_cli.recipe.schema import Recipe
from cfamc_cli.store.records import Computation

Precision = Literal["float32", "bfloat16"]
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_ALIGNED = 16  # bytes: what any type may be read from
_NO_MEMORY = (
    *("allocate memory", "out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED"),
    "could not create a primitive",  # as oneDNN says it
)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, then Apple's MPS, then the CPU.

    CUDA without an index is the card of this process: the one that torchrun's LOCAL_RANK counts to, else the first. It
    becomes the current card at once, before a process group could take another.

    Raises:
        CfamcError: There is no such device here, or several processes would share a card.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise NotImplementedError
        if device.type == "cuda" and torch.cuda.device_count():  # without a card, the next line says so
            device = _own_card(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        hint = "leave --device out, or name one of: cpu, cuda, cuda:0, mps"
        raise invalid(f"device {name!r} is not available here", hint) from error
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _own_card(device: torch.device) -> torch.device:
    """The card of this process, made the current one."""
    cards, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise invalid(f"every process of torchrun would compute on {device}", "leave the index out: --device cuda")
    index = rank if device.index is None else device.index
    if cards <= index:
        hint = f"start at most {cards} processes here" if device.index is None else f"the last is cuda:{cards - 1}"
        raise invalid(f"there is no card cuda:{index}: this machine shows {cards}", hint)
    found = torch.device("cuda", index)
    torch.cuda.set_device(found)
    return found


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the host goes on at once, for the copy leaves from pinned memory.

    MPS is waited for: it reads a temporary of the host after it was freed.
    """
    ahead = device.type not in (tensor.device.type, "mps")
    source = tensor.pin_memory() if ahead else tensor
    return source.to(device, non_blocking=ahead)


def move_together(groups: Sequence[Sequence[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """All tensors of the groups on `device`, in a single copy where copies cost most: many small ones, to a card."""
    if device.type in ("cpu", "mps"):
        return [[move(tensor, device) for tensor in group] for group in groups]
    tensors = [tensor for group in groups for tensor in group]
    moved = iter(unpack(move(pack(tensors), device), like=tensors))
    return [[next(moved) for _ in group] for group in groups]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors in a row, uint8; each begins at a multiple of 16."""
    rows = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors]
    return torch.cat([part for row in rows for part in (row, row.new_zeros(-len(row) % _ALIGNED))])


def unpack(buffer: Tensor, *, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `pack` made of tensors of these shapes and types, in their order."""
    ends = itertools.accumulate(tensor.nbytes + -tensor.nbytes % _ALIGNED for tensor in like)
    starts = [0, *ends]
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=False)
    ]


def pick_precision(wanted: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    """The precision of forward and backward passes; "auto" takes bfloat16 where the hardware multiplies it.

    Without such instructions bfloat16 is emulated: ten times slower than float32 on a CPU of 2017.
    """
    if wanted != "auto":
        return wanted
    match device.type:
        case "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        case "cpu":
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        case _:
            fast = False
    return "bfloat16" if fast else "float32"


def pick_compile(recipe: Recipe, images: int, device: torch.device, *, talk: Talk) -> bool:
    """Whether a training run on that many images is compiled; "auto" is never, but on CUDA where it pays and works."""
    train = recipe.train
    if train.compile != "auto":
        return train.compile
    whole = train.memory == "full" and train.batch_norm == "local"  # else what is compiled falls into many graphs
    if device.type != "cuda" or not whole or not compiling_pays(plan_of(recipe, images)):
        return False
    try:
        torch.compile(torch.relu)(torch.ones(2, device=device))
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        talk.warning(f"the run is not compiled, which would make it faster: torch.compile does not work here ({why})")
        return False
    return True


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The autocast context of a precision; losses step out of it by themselves."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within, float32 is float32: no autocast, and CUDA's convolutions do not shorten it either."""
    short = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = short


def held_to(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Within, passes of a precision are no shorter than that, backward passes included."""
    return full_precision(device) if precision == "float32" else nullcontext()


def has_tf32(device: torch.device) -> bool:
    """Whether the device has products that read float32 as TF32, with 10 bits of 23."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def in_tf32() -> Iterator[None]:
    """Within, convolutions and matrix products of float32 are read as TF32 where the device can."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def prepare(device: torch.device, *, deterministic: bool, precision: Precision) -> None:
    """Set the process-wide switches of training on `device`."""
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call loads the compiler: seconds of imports
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written first


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed buffers of up to 32 MiB, its limit, for the next tensor of that size.

    By default it hands them back, and the kernel clears the pages of the next one: about a tenth of a step of the
    laptop recipe.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def describe(device: torch.device) -> str:
    """The device in words, for records."""
    match device.type:
        case "cuda":
            return torch.cuda.get_device_name(device)
        case "cpu":
            return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        case _:
            return f"{device.type}, {platform.machine()}"


def computation(device: torch.device, *, precision: Precision, compiled: bool = False) -> Computation:
    """What moves the last bits of numbers computed on `device` in `precision`, for records."""
    cuda = device.type == "cuda"
    with held_to(device, precision):
        products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return Computation(
        precision=precision,
        processes=dist.get_world_size() if dist.is_initialized() else 1,
        compiled=compiled,
        tf32_products=products if cuda else None,
        tf32_convolutions=convolutions if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        cudnn=str(torch.backends.cudnn.version()) if cuda else None,
        driver=_driver() if cuda else None,
    )


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver; None where it does not show as a file."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text):
            return found[1]
    return None


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far: of the device's allocator on CUDA, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def whole_memory(device: torch.device) -> int | None:
    """Bytes that work on `device` may take at most, of card, machine or container; None where nobody knows."""
    match device.type:
        case "cuda":
            return torch.cuda.get_device_properties(device).total_memory
        case "cpu":
            found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
            with suppress(OSError, ValueError):  # "max" where the control group has no limit of its own
                found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
            return min(found, default=None)
        case _:
            return None


_LOWER = "lower train.batch_size, crops.0.count or model.width; cfamc pretrain --dry-run estimates the need"


@contextmanager
def out_of_memory(*, hint: str = _LOWER) -> Iterator[None]:
    """Within, running out of memory is one line that says what to lower.

    Args:
        hint: What to lower.

    Raises:
        CfamcError: In place of the allocator's error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        named = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not named and not any(words in text for words in _NO_MEMORY):
            raise
        raise CfamcError(f"out of memory: {text[:200] or type(error).__name__}", hint=hint) from error
