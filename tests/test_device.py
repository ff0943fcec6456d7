"""Which device computes, where several processes share a machine, and what its errors are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cfamc_cli.engine import export
from cfamc_cli.engine.device import (
    Precision,
    computation,
    has_tf32,
    move,
    out_of_memory,
    pack,
    pick_compile,
    pick_device,
    prepare,
    unpack,
)
from cfamc_cli.engine.distributed import World, peers
from cfamc_cli.engine.evaluation import audit, verify
from cfamc_cli.engine.heads import frozen
from cfamc_cli.engine.heads.classifier import LinearHead
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe import file

PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine that shows two CUDA cards; what was made the current one is listed."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return current


@pytest.mark.parametrize(("name", "rank", "index"), [("cuda", 0, 0), ("cuda", 1, 1), ("auto", 1, 1), ("cuda:1", 0, 1)])
def test_a_process_takes_its_own_card(
    name: str, rank: int, index: int, chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert pick_device(name) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


@pytest.mark.parametrize(
    ("name", "rank", "size", "message", "hint"),
    [
        ("cuda", 2, 3, "there is no card cuda:2: this machine shows 2", "start at most 2 processes here"),
        ("cuda:5", 0, 1, "there is no card cuda:5: this machine shows 2", "the last is cuda:1"),
        ("cuda:0", 1, 2, "every process of torchrun would compute on cuda:0", "leave the index out: --device cuda"),
    ],
)
def test_cards_that_are_not_there_or_shared(
    name: str,
    rank: int,
    size: int,
    message: str,
    hint: str,
    chosen: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
    with pytest.raises(CfamcError) as caught:
        pick_device(name)
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (message, hint, ExitCode.INVALID)
    assert chosen == []


def test_without_cuda_its_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delattr(torch._C, "_cuda_setDevice", raising=False)  # as in PyTorch's builds for the CPU alone
    with pytest.raises(CfamcError, match="device 'cuda' is not available here"):
        pick_device("cuda")


@pytest.mark.parametrize(("kind", "waits"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_only_on_cuda_a_copy_goes_on_by_itself(kind: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, bool]] = []
    pinned = torch.ones(1)  # stands for a copy in pinned memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda source, _, non_blocking: asked.append((float(source), non_blocking)))
    move(torch.zeros(1), torch.device(kind))
    assert asked == [(0.0, False) if waits else (1.0, True)]


def test_what_a_processor_computes_has_no_versions_of_cuda() -> None:
    found = computation(torch.device("cpu"), precision="bfloat16", compiled=True)
    none = dict.fromkeys(("tf32_products", "tf32_convolutions", "cuda", "cudnn", "driver"))
    assert found.model_dump() == {"precision": "bfloat16", "processes": 1, "compiled": True, **none}


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x@y)", "580.65.06"),
        ("something else 1.2", None),
        (None, None),
    ],
)
def test_what_a_card_computes_is_told_with_versions_and_switches(
    line: str | None, driver: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **_: str) -> str:
        if line is None:
            raise FileNotFoundError(path)
        assert str(path) == "/proc/driver/nvidia/version"
        return f"{line}\nGCC version:  gcc version 12.2.0\n"

    card, short = torch.device("cuda", 0), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    same: dict[str, object] = {
        "processes": 8,
        "compiled": False,
        "tf32_products": False,
        "cuda": "13.0",
        "cudnn": "92400",
    }
    same |= {"driver": driver}
    try:
        prepare(torch.device("cpu"), deterministic=False, precision="bfloat16")
        found = [computation(card, precision=precision) for precision in PRECISIONS]
    finally:
        torch.backends.cudnn.allow_tf32 = short
    assert [part.model_dump() for part in found] == [
        {"precision": "bfloat16", "tf32_convolutions": True, **same},
        {"precision": "float32", "tf32_convolutions": False, **same},
    ]


def test_repeatable_training_does_not_fill_fresh_memory() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        prepare(torch.device("cpu"), deterministic=True, precision="float32")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(before)


def test_tensors_that_travel_together_arrive_as_they_were() -> None:
    tensors = [
        torch.arange(5),
        torch.tensor([[True, False, True]]),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([0.1, -2.5e-8, float("inf")])[::2],  # not contiguous
        torch.tensor(7.25),
        torch.arange(17, dtype=torch.uint8).view(17, 1),
    ]
    buffer = pack(tensors)
    assert buffer.numel() == 48 + 16 + 0 + 16 + 16 + 32
    for tensor, found in zip(tensors, unpack(buffer, like=tensors), strict=True):
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
        assert found.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "could not create a primitive",
    ],
)
def test_memory_that_is_out_is_called_so(text: str) -> None:
    with pytest.raises(CfamcError, match=r"^out of memory: "), out_of_memory():
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2934",
        "Read error [127.0.0.1]:2934: Connection reset by peer",
        "Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error: ncclRemoteError: A call failed possibly due to a network error or a remote process exited",
    ],
)
def test_a_process_that_is_gone_is_called_so(text: str) -> None:
    with pytest.raises(CfamcError, match="another process of this run ended"), peers(World(0, 2)):
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000",
        "NCCL error: ncclUnhandledCudaError: Call to CUDA function failed.",
        "[enforce fail at gloo] unsupported type",
    ],
)
def test_other_errors_of_the_communication_library_keep_their_own_words(text: str) -> None:
    with pytest.raises(RuntimeError, match=text[:20].replace("[", r"\[")), peers(World(0, 2)):
        raise RuntimeError(text)


def test_long_runs_on_cuda_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.device] = []
    monkeypatch.setattr(torch, "ones", lambda _, *, device: device)
    monkeypatch.setattr(torch, "compile", lambda _: tried.append)
    cpu, mps, cuda = (torch.device(name) for name in ("cpu", "mps", "cuda"))

    def picked(*overrides: str, images: int = 50_000, device: torch.device = cuda) -> bool:
        return pick_compile(file.load("cifar10", overrides=overrides), images, device, talk=NullTalk())

    assert [picked(device=device) for device in (cpu, mps, cuda)] == [False, False, True]
    assert tried == [cuda]
    assert not picked("train.epochs=5")
    assert not picked(images=25_000), "the images that were found count"
    assert not picked("train.memory=recompute")
    assert not picked("train.batch_norm=synchronised")
    assert picked("train.compile=true", "train.epochs=1", device=cpu)
    assert not picked("train.compile=false")
    assert tried == [cuda], "it is tried where it would be used, and where nobody asked for it"


def test_a_run_goes_on_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(NullTalk, "warning", lambda _, text: heard.append(text))
    monkeypatch.setattr(torch, "ones", lambda _, *, device: device)
    monkeypatch.setattr(torch, "compile", lambda _: lambda _: int("no compiler"))
    assert not pick_compile(file.load("cifar10"), 50_000, torch.device("cuda"), talk=NullTalk())
    assert heard == [
        "the run is not compiled, which would make it faster: torch.compile does not work here (invalid literal for "
        "int() with base 10: 'no compiler')"
    ]


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_which_cards_have_tf32(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_tf32(torch.device("cuda", 0)) is has
    assert not has_tf32(torch.device("cpu"))
    assert not has_tf32(torch.device("mps"))


class NoFloat64(TorchDispatchMode):
    """The device, played by torch's meta tensors, has no float64, as MPS has none; all that is read of it is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, source = func._schema.name, args[0] if args else None
        if isinstance(source, Tensor) and source.is_meta:
            if name == "aten::_local_scalar_dense":
                return 1.0
            if name == "aten::_to_copy" and kwargs.get("device") == torch.device("cpu"):
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        made = func(*args, **kwargs)
        wide = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.dtype == torch.float64]
        assert not any(leaf.is_meta for leaf in wide), f"{name}: float64 on the device"
        return made


def ascent(device: torch.device) -> object:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).to(device), torch.rand(4, 3, 2, 2).to(device)
    y = torch.zeros(4, dtype=torch.int64).to(device)
    spent = audit.AuditSettings()
    return audit._Audit(net, net, None, None, x, y, torch.arange(4), 0.01, norm="linf", seed=0, settings=spent).ascent()


def converged(device: torch.device) -> object:
    features, labels = torch.rand(6, 1).to(device), torch.zeros(6, dtype=torch.int64).to(device)
    head = frozen.new_head(1, 3, seed=0, device=device)
    return frozen.fit_converged(head, features, labels, l2=0.1, iterations=2)


WIDE: dict[str, Callable[[torch.device], object]] = {  # what reckons in float64
    "verify": lambda device: verify.in_region(
        torch.rand(2, 3, 4, 4).to(device), torch.rand(2, 3, 4, 4).to(device), eps=0.1, norm="l2"
    ),
    "audit": ascent,
    "converged head": converged,
    "export": lambda device: export._plain_linear(LinearHead(4, 3, standardized=True).to(device)),
}


@pytest.mark.parametrize("name", WIDE)
def test_float64_stays_on_the_processor(name: str) -> None:
    with NoFloat64():  # type: ignore[no-untyped-call]
        WIDE[name](torch.device("meta"))
