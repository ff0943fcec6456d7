"""Networks as other projects write them, for imports to be held against: kuangliu's layers, and dual batch norms.

Each has the names and the arithmetic of its project; weights and running statistics are drawn.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from cfamc_cli.engine.heads import foreign_file


class Branches(nn.Module):
    """A batch norm for each kind of batch, as ACL, DynACL and AdvCL have it."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.bn_list = nn.ModuleList([nn.BatchNorm2d(channels) for _ in range(count)])
        self.branch = 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn_list[self.branch](x)
        return y


def norm(channels: int, branches: int) -> nn.Module:
    return Branches(channels, branches) if branches else nn.BatchNorm2d(channels)


class Downsample(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, branches: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs, branches)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, branches: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), norm(width, branches)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width, branches)
        self.other = "downsample" if branches else "shortcut"
        changes = stride != 1 or inputs != width
        if branches:
            self.downsample = Downsample(inputs, width, stride, branches) if changes else None
        else:
            layers = [nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)] if changes else []
            self.shortcut = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        other = getattr(self, self.other)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if other is None else other(x)))


class Normalized(nn.Module):
    """ImageNet's mean and std, as ACL has them in its networks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]))

    def forward(self, x: Tensor) -> Tensor:
        held = dict(self.named_buffers())
        return (x - held["mean"][:, None, None]) / held["std"][:, None, None]


class Theirs(nn.Module):
    """A ResNet-18 of 32-pixel images: kuangliu's without branches of batch norm, ACL's with them."""

    def __init__(self, *, width: int = 4, branches: int = 0, classes: int = 3) -> None:
        super().__init__()
        if branches:
            self.normalize = Normalized()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width, branches)
        inputs = width
        for stage in range(4):
            outputs, stride = width * 2**stage, 2 if stage else 1
            blocks = [Block(inputs, outputs, stride, branches), Block(outputs, outputs, 1, branches)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = outputs
        if not branches:
            self.linear = nn.Linear(inputs, classes)

    def features(self, x: Tensor, *, branch: int = 0) -> Tensor:
        for module in self.modules():
            if isinstance(module, Branches):
                module.branch = branch
        normalized = self.normalize(x) if hasattr(self, "normalize") else x
        x = F.relu(self.bn1(self.conv1(normalized)))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return F.avg_pool2d(x, x.shape[-1]).flatten(1)


def drawn(network: nn.Module) -> nn.Module:
    """The network with weights and running statistics that are not the initial ones, in eval mode and float64."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and not name.startswith(("normalize", "input")):
                fan = tensor[0].numel() if tensor.dim() > 1 else 25
                tensor.normal_(0, (2 / fan) ** 0.5, generator=generator)
                tensor.add_(1 if tensor.dim() == 1 and name.endswith("weight") else 0)
    return network.eval().double()


def torchvision_network(name: str, stem: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = getattr(torchvision.models, name)(num_classes=3)
        if stem == "cifar":
            network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return drawn(network)


def read_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Spare a test the start of another process, where that process is not what it is about."""

    def here(descriptor: int, name: str, *, seconds: int) -> tuple[int | None, bytes]:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return foreign_file._answer(file, name)

    patch.setattr(foreign_file, "_in_a_process", here)
