"""What the code asks of a card, shown without one: waits, copies and mixed devices, on torch's `meta` device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_meta import META, HostWaitsError, Seen, watched, without_autocast
from tiny import tiny_recipe
from torch import Tensor

from cfamc_cli.engine import pretrain
from cfamc_cli.engine.adversary import Adversary, Groups
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.device import move
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.objectives import Terms
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sink import NullLedger, NullTalk


def _backward(x: Tensor, hook: Callable[[Tensor], object]) -> None:
    x.register_hook(hook)
    torch.autograd.backward(x.sum())


FAULTS: dict[str, Callable[[Tensor, Tensor], object]] = {  # of a tensor of the device and one of the host
    "a number": lambda device, _: device[0].item(),
    "a truth": lambda device, _: bool((device > 0).any()),
    "a list": lambda device, _: device.tolist(),
    "a copy back": lambda device, _: device.cpu(),
    "a copy into the host's": lambda device, host: host.copy_(device),
    "a comparison": lambda device, _: torch.equal(device, device),
    "places": lambda device, _: device.nonzero(),
    "a mask read": lambda device, _: device[device > 0],
    "a mask written": lambda device, _: device.__setitem__(device > 0, 0.0),
    "a number of repeats": lambda device, _: device.repeat_interleave(device.long()),
    "a pageable copy": lambda device, host: host.to(META, non_blocking=True),
    "a blocking copy": lambda device, host: host.pin_memory().to(META),
    "a copy into the device's": lambda device, host: device.copy_(host),
    "a new tensor": lambda device, _: torch.tensor([1.0], device=META),
    "another new tensor": lambda device, _: device.new_tensor([1.0]),
    "an index in a list": lambda device, _: device[[0, 1]],
    "an index of the host": lambda device, host: device[host.long()],
    "a sum of both sides": lambda device, host: torch.cat([device, host]),
    "float64": lambda device, _: device.double(),
    "a backward pass": lambda device, _: _backward(
        device.clone().requires_grad_(), lambda gradient: gradient[0].item()
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_watch_sees(name: str) -> None:
    with watched(), pytest.raises(HostWaitsError):
        FAULTS[name](torch.empty(3, device=META), torch.ones(3))


def test_the_watch_counts_what_is_allowed() -> None:
    device, host = torch.empty(3, device=META), torch.ones(3)
    with watched() as seen:
        moved = move(host[1:], META)
        torch.where(moved > 0, moved, 0.0).masked_fill_(moved > 0, 2.0)
        assert host[host > 0].tolist() == [1.0, 1.0, 1.0]
        assert torch.is_tensor(device[device.long()] + host[0])
        with torch.autocast("meta", torch.bfloat16):
            move(device, META)
    assert [line.split(":")[0] for line in seen.copies] == ["device.py"]
    assert seen.waits == []
    with watched(answer=1.0) as seen:
        assert device[0].item() == 1.0
        assert device.tolist() == [1.0, 1.0, 1.0]
    assert len(seen.waits) == 2


# The training step


class Enough(Exception):  # noqa: N818 - no error
    """As many batches were watched as were asked for."""


def watched_batches(images: ImageSet, objective: str, adversary: str, count: int, *, start: str = "zero") -> list[Seen]:
    """What `Trainer.train` asks of the device in each of its first batches, between two records of the journal."""
    recipe = tiny_recipe(
        objective,
        adversary,
        adversary={} if adversary == "none" else {"start": start},
        augment={"flip": 0.5, "jitter_p": 0.8, "grayscale_p": 0.3, "blur_p": 0.3, "solarize_p": 0.3},
        train={"epochs": 100.0, "log_every": 1000, "checkpoint_every": 1000, "average": 0.99},
    )
    with without_autocast():
        trainer = Trainer(recipe, images, device=META, world=World(), talk=NullTalk(), ledger=NullLedger())
    parts: list[Seen] = []

    def after_batch() -> int:
        before = [len(part.copies) for part in parts]
        parts.append(Seen(seen.copies[sum(before) :], list(seen.waits)))
        if len(parts) == count:
            raise Enough
        return 0

    with watched() as seen, pytest.raises(Enough):
        trainer.train(Path("nowhere"), stop=after_batch)
    assert trainer.step == count * recipe.replays
    return parts


@pytest.mark.parametrize("adversary", ["none", "pgd", "free"])
def test_clusters_are_found_without_waiting_and_are_where_the_steps_are(adversary: str, tiny_images: ImageSet) -> None:
    first, second = watched_batches(tiny_images, "clusters", adversary, 2)
    assert len(first.copies) == 2  # the places of the first centres
    assert [line.split(":")[0] for line in second.copies] == ["device.py"]


@pytest.mark.parametrize("objective", ["emp-ssl", "simclr", "supcon"])
@pytest.mark.parametrize("adversary", ["none", "pgd", "free"])
def test_a_step_waits_for_nothing_and_copies_once(objective: str, adversary: str, tiny_images: ImageSet) -> None:
    for seen in watched_batches(tiny_images, objective, adversary, 1):
        assert [line.split(":")[0] for line in seen.copies] == ["device.py"]


def test_a_random_start_is_a_copy_of_its_own_where_it_is_drawn(tiny_images: ImageSet) -> None:
    every_batch = watched_batches(tiny_images, "simclr", "pgd", 2, start="random")
    assert [len(seen.copies) for seen in every_batch] == [2, 2]
    first_batch_alone = watched_batches(tiny_images, "emp-ssl", "free", 2, start="random")
    assert [len(seen.copies) for seen in first_batch_alone] == [2, 1]


def _read(terms: Terms) -> Terms:
    float(terms.loss)
    return terms


def _mask(crops: Tensor) -> Tensor:
    crops[crops > 1] = 1.0
    return crops


def _make(groups: Groups) -> Groups:
    return [group * torch.tensor([1.0], device=META) for group in groups]


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [(pretrain, "objective_loss", _read), (pretrain, "cut", _mask), (Adversary, "perturb", _make)],
)
def test_a_fault_that_is_planted_in_the_loop_is_seen(
    where: object,
    name: str,
    fault: Callable[[object], object],
    tiny_images: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **settings: fault(real(*args, **settings)))
    with pytest.raises(HostWaitsError):
        watched_batches(tiny_images, "emp-ssl", "none", 1)
