"""What the code asks of a card, shown without one: waits, copies and mixed devices, on torch's `meta` device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from on_meta import META, HostWaitsError, watched
from torch import Tensor

from cfamc_cli.engine.device import move


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
