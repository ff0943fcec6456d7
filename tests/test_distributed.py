"""Processes that share a batch compute what one process computes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from tiny import tiny_recipe
from torch import Tensor

from cfamc_cli.engine import distributed, monitor
from cfamc_cli.engine.batch_norm import synchronise
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.distributed import Agreement, GradientSum, World, first_on_each_node
from cfamc_cli.engine.encoder import build_encoder
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.engine.sink import NullLedger, NullTalk
from cfamc_cli.errors import CfamcError, ExitCode


def run(ranks: int, own: Path, other: Path) -> dict[str, Any]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = []
    for rank in range(ranks):
        named = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in named.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).parent / "ranks.py"), str(own), str(other)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


def flat(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    if isinstance(value, list):
        return [number for part in value for number in flat(part)]
    assert isinstance(value, float)
    return [value]


SYSTEMS = ("emp-ssl free", "simclr free", "supcon pgd", "emp-ssl none", "phases", "clusters")
SYNCHRONISED = ("simclr pgd synchronised", "emp-ssl none synchronised")


@pytest.mark.slow
def test_two_and_three_gloo_ranks_equal_one_process(
    tmp_path: Path,
) -> None:
    """8 images are shared evenly by 2 processes, and by 3 as 2, 3 and 3; batch norm is frozen or synchronised."""
    one = run(1, tmp_path / "1", tmp_path / "none")
    three = run(3, tmp_path / "3", tmp_path / "1")
    two = run(2, tmp_path / "2", tmp_path / "3")
    for world, size in ((two, 2), (three, 3)):
        assert world["size"] == size
        for system in SYSTEMS:
            assert flat(world[system]) == pytest.approx(flat(one[system]), rel=2e-3, abs=1e-6), (size, system)
        for system in SYNCHRONISED:
            assert flat(world[system]) == pytest.approx(flat(one[system]), rel=1e-3, abs=1e-6), (size, system)
        # of free training the first two updates, between which it ascends: rounding grows at each later one
        first = [flat(found["emp-ssl free synchronised"]["updates"][:2]) for found in (world, one)]
        assert first[0] == pytest.approx(first[1], rel=2e-3), size
        assert world["norm error"] < 1e-12, size  # in float64
        uncut = one["emp-ssl free"]
        resumed = {**uncut, "updates": uncut["updates"][3:]}  # by another number of processes
        assert flat(world["resumed"]) == pytest.approx(flat(resumed), rel=2e-3, abs=1e-6), size
        assert world["resumed is uncut"], size  # bit for bit
        assert world["first images"][str(size)] == pytest.approx(one["first images"][str(size)], rel=1e-4), size


def test_ranks_share_a_batch_without_overlap() -> None:
    for batch_size, counts in ((12, [3, 3, 3, 3]), (13, [3, 3, 3, 4]), (15, [3, 4, 4, 4]), (3, [0, 1, 1, 1])):
        shares = [World(rank, 4).share(batch_size) for rank in range(4)]
        assert [index for share in shares for index in range(batch_size)[share]] == list(range(batch_size))
        assert [share.stop - share.start for share in shares] == counts == World(2, 4).shares(batch_size)


@pytest.mark.parametrize(
    ("epochs", "images", "counts"), [(92.0, (8, 8, 8), [8, 8, 8]), (3000.0, (10, 11, 11), [10, 11, 11])]
)
def test_adversaries_are_compared_on_whole_shares_or_on_equal_parts_of_them(
    epochs: float, images: tuple[int, ...], counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[int] = []

    def measure_grip(_loss_of: object, crops: list[Tensor], *_: object, **__: object) -> NoReturn:
        cut.append(crops[0].shape[1])
        raise StopIteration

    monkeypatch.setattr(monitor, "measure_grip", measure_grip)
    data = ImageSet(torch.zeros(64, 3, 8, 8, dtype=torch.uint8), None, (), "0" * 64, "folder", "train", "")
    for rank in range(3):
        trainer = Trainer(
            tiny_recipe(train={"batch_size": 32, "epochs": epochs}),
            data,
            device=torch.device("cpu"),
            world=World(rank, 3),
            talk=NullTalk(),
            ledger=NullLedger(),
        )
        crops = [torch.zeros(4, trainer.shares[rank], 3, 8, 8)]
        with pytest.raises(StopIteration):
            trainer.journal._watch_grip(crops, crops, partial(trainer.loss_beside, labels=None), step=0)
        assert trainer._counts(cut[rank]) == counts
    assert tuple(cut) == images


def test_gradients_are_added_in_buckets_while_the_backward_pass_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_recipe().model
    encoder = build_encoder(model, generator=addressed_generator("init", 0))
    x = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = build_encoder(model, generator=addressed_generator("init", 0))
    alone.embed([x, x])[..., 0].sum().backward()

    sent: list[tuple[int, int]] = []  # bytes of a message, and gradients that were there when it left

    class Work:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def wait(self) -> None:
            self.tensor.mul_(2)  # the other process has the same

    def all_reduce(tensor: Tensor, *, async_op: bool) -> Work:
        assert async_op
        sent.append((tensor.nbytes, sum(p.grad is not None for p in encoder.parameters())))
        return Work(tensor)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "_BUCKET", 100_000)
    gradients = GradientSum(list(encoder.parameters()), World(0, 2))
    for _ in range(2):
        encoder.embed([x, x])[..., 0].sum().backward()
        gradients.finish()
        for summed, own in zip(encoder.parameters(), alone.parameters(), strict=True):
            assert summed.grad is not None
            assert own.grad is not None
            assert torch.equal(summed.grad, 2 * own.grad)
            assert summed.grad.stride() == summed.stride()
            summed.grad = None
    sizes, there = zip(*sent[:6], strict=True)
    assert sent[6:] == sent[:6]
    assert sum(sizes) == sum(p.nbytes for p in encoder.parameters())
    assert min(sizes[:-1]) >= 100_000
    assert there == (13, 16, 25, 28, 43, 70)


@pytest.mark.parametrize(
    ("device", "size", "norm"), [("cpu", 1, "BatchNorm2d"), ("cpu", 2, "_OnHost"), ("cuda", 2, "SyncBatchNorm")]
)
def test_synchronised_batch_norm_keeps_parameters_and_names(device: str, size: int, norm: str) -> None:
    encoder = build_encoder(tiny_recipe().model, generator=addressed_generator("init", 0))
    parameters, names = list(encoder.parameters()), list(encoder.state_dict())
    synchronise(encoder, device=torch.device(device), world=World(0, size))
    assert type(encoder.backbone.bn1).__name__ == norm
    kinds = {
        type(part).__name__ for part in encoder.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
    }
    assert kinds == ({norm} if size > 1 else {"BatchNorm1d", "BatchNorm2d"})
    assert list(map(id, encoder.parameters())) == list(map(id, parameters))
    assert list(encoder.state_dict()) == names


def test_synchronised_batch_norm_is_refused_where_there_is_none() -> None:
    with pytest.raises(CfamcError, match=r'train\.batch_norm = "synchronised" does not work on mps') as refused:
        synchronise(torch.nn.BatchNorm2d(3), device=torch.device("mps"), world=World(0, 2))
    assert refused.value.exit_code == ExitCode.INVALID
    assert refused.value.hint == 'use --device cpu, or train.batch_norm = "local"'


def test_a_flag_is_heard_by_all_one_asking_later(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Work:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def wait(self) -> None:
            order.append(f"waited for {int(self.tensor)}")

    def all_reduce(tensor: Tensor, op: object, **_: object) -> Work:
        assert op == torch.distributed.ReduceOp.MAX
        order.append(f"sent {int(tensor)}")
        return Work(tensor)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    agreement = Agreement(World(0, 2))
    assert [agreement.ask(flag) for flag in (0, 15, 0)] == [0, 0, 15]
    assert order == ["sent 0", "waited for 0", "sent 15", "waited for 15"]  # nothing is under way at the end
    assert [agreement.ask(0), agreement.heard(), agreement.heard()] == [0, 0, 0]
    assert order[4:] == ["sent 0", "waited for 0"]
    assert Agreement(World()).ask(15) == 15


@pytest.mark.parametrize(
    ("rank", "local", "heard", "order"),
    [
        (0, "0", 0, ["made", "said 0"]),
        (1, "1", 0, ["said 0", "made"]),
        (8, "0", 0, ["made", "said 0"]),  # the first of the second node
        (1, "1", 1, ["said 0"]),
        (8, "0", 1, ["made", "said 0"]),
    ],
)
def test_one_process_of_each_node_loads_first(
    rank: int, local: str, heard: int, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    def largest(flag: int, _: World) -> int:
        did.append(f"said {flag}")
        return max(flag, heard)

    def make() -> str:
        did.append("made")
        return "images"

    monkeypatch.setattr(distributed, "largest", largest)
    monkeypatch.setenv("LOCAL_RANK", local)
    if heard:
        with pytest.raises(CfamcError, match="another process of this run could not load the images"):
            first_on_each_node(make, World(rank, 16))
    else:
        assert first_on_each_node(make, World(rank, 16)) == "images"
    assert did == order


def test_who_could_not_load_says_so_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise KeyboardInterrupt

    def largest(flag: int, _: World) -> int:
        said.append(flag)
        return flag

    said: list[int] = []
    monkeypatch.setattr(distributed, "largest", largest)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(KeyboardInterrupt):
        first_on_each_node(broken, World(0, 2))
    assert said == [1]
