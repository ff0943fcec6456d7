"""The encoder against torchvision's ResNets, its layers, and what building and freezing leave alone."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torchvision
from fixed_inputs import fill, uniform
from torch import nn

from cfamc_cli.engine.encoder import Encoder, ResNet, build_encoder, frozen_statistics
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.recipe.schema import Model

TINY = Model(width=4, hidden_dim=16, embedding_dim=8)
BACKBONES: tuple[Literal["resnet18", "resnet34", "resnet50"], ...] = ("resnet18", "resnet34", "resnet50")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_are_torchvisions(backbone: Literal["resnet18", "resnet34", "resnet50"]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = ResNet(backbone, stem="imagenet", width=64)
        theirs = getattr(torchvision.models, backbone)(weights=None)
    theirs.fc = nn.Identity()
    state = ours.state_dict()
    for name, value in state.items():
        if "running" in name:
            value.copy_(0.5 + uniform(*value.shape, key=name))
    theirs.load_state_dict(state)  # strict: the keys and shapes are the same
    x = uniform(2, 3, 48, 48, key="x").float()
    for training in (False, True):
        with torch.no_grad():
            mine, reference = ours.train(training)(x), theirs.train(training)(x)
        assert mine.shape == (2, ours.feature_dim)
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [2, 4, 7])
def test_narrow_nets_train_on_large_maps(width: int) -> None:
    torch.manual_seed(0)  # where the shortcut is a plain strided convolution, the heap breaks here
    net = ResNet("resnet18", stem="cifar", width=width).to(memory_format=torch.channels_last)
    x = torch.rand(64, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        net(x).square().sum().backward()
    shortcut = net.get_submodule("layer2.0.downsample.0")
    assert isinstance(shortcut, nn.Conv2d)
    maps = torch.rand(2, width, 15, 16, dtype=torch.float64)
    plain = nn.functional.conv2d(maps, shortcut.weight.double(), stride=2)
    torch.testing.assert_close(shortcut.double()(maps), plain)


def test_the_cifar_stem_keeps_the_resolution() -> None:
    net = ResNet("resnet18", stem="cifar", width=4)
    reference = torchvision.models.resnet18(weights=None, num_classes=1)
    assert net.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 32, 32)
    x = torch.zeros(1, 4, 32, 32)
    for stage in range(1, 5):
        x = net.get_submodule(f"layer{stage}")(x)
    assert x.shape == (1, 32, 4, 4)
    assert net.state_dict().keys() == {key for key in reference.state_dict() if not key.startswith("fc.")}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_layers_have_the_sizes_of_the_recipe(backbone: Literal["resnet18", "resnet34", "resnet50"]) -> None:
    model = Model(backbone=backbone, width=4, hidden_dim=24, embedding_dim=10)
    net = Encoder(model).eval()
    x = uniform(3, 3, 16, 16, key="x").float()
    assert net.features(x, features="backbone").shape == (3, 128 if backbone == "resnet50" else 32)
    features = net.features(x)
    assert features.shape == (3, 24)
    assert (features >= 0).all()
    z = net(x)
    assert z.shape == (3, 10)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))


def test_groups_pass_one_by_one_and_keep_their_order() -> None:
    net = Encoder(TINY).double()
    fill(net.state_dict())
    groups = [uniform(2, 4, 3, 16, 16, key="a"), uniform(3, 4, 3, 8, 8, key="b")]
    net.train()
    z = net.embed(groups)
    assert z.shape == (5, 4, 8)
    apart = [net(group.flatten(0, 1)).unflatten(0, (-1, 4)) for group in groups]
    torch.testing.assert_close(z, torch.cat(apart))


def test_autocast_embeds_in_float32() -> None:
    net = Encoder(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        z = net(uniform(4, 3, 8, 8, key="x").float())
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))


def test_weights_depend_on_the_address_alone_and_the_callers_rng_stays() -> None:
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    first = build_encoder(TINY, generator=addressed_generator("init", 0)).state_dict()
    assert torch.equal(torch.rand(5), expected)
    again = build_encoder(TINY, generator=addressed_generator("init", 0)).state_dict()
    other = build_encoder(TINY, generator=addressed_generator("init", 1)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.conv1.weight"], other["backbone.conv1.weight"])


def test_frozen_statistics_uses_the_batch_and_leaves_the_buffers() -> None:
    net = Encoder(TINY)
    fill(net.state_dict())
    x = uniform(6, 3, 8, 8, key="x").float()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with frozen_statistics(net):
        frozen = net(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert torch.equal(frozen, net(x)), "batch statistics are used either way"
    assert not torch.equal(net.state_dict()["backbone.bn1.running_mean"], before["backbone.bn1.running_mean"])
    assert int(net.state_dict()["backbone.bn1.num_batches_tracked"]) == 1


def test_frozen_statistics_is_undone_by_an_error() -> None:
    net = Encoder(TINY)
    with pytest.raises(ZeroDivisionError), frozen_statistics(net):
        raise ZeroDivisionError
    assert all(part.track_running_stats for part in net.modules() if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_blocks_that_are_made_again_are_the_same_in_every_bit(
    backbone: Literal["resnet18", "resnet50"], precision: torch.dtype
) -> None:
    def passes(memory: Literal["full", "recompute"]) -> tuple[list[torch.Tensor], int]:
        net = build_encoder(
            Model(backbone=backbone, width=8, hidden_dim=16, embedding_dim=8), generator=torch.Generator()
        )
        if memory == "recompute":
            net.recompute()
        delta, kept, found = uniform(2, 4, 3, 16, 16, key="x").float().requires_grad_(), 0, list[torch.Tensor]()

        def note(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        def embed() -> torch.Tensor:
            hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
            with torch.autocast("cpu", precision, enabled=precision != torch.float32), hooks:
                z = net.embed([delta, delta[:1]])  # two passes before their backward
            found.append(z.detach())
            return (z.square() * torch.arange(8)).sum()

        with frozen_statistics(net):  # as adversaries do: the backward pass comes when statistics move again
            loss = embed()
        found += torch.autograd.grad(loss, [delta])
        embed().backward()
        embed().backward()
        gradients = [parameter.grad for parameter in (delta, *net.parameters()) if parameter.grad is not None]
        assert all(norm.momentum == 0.1 for norm in net.modules() if isinstance(norm, nn.BatchNorm2d))
        assert int(net.state_dict()["backbone.bn1.num_batches_tracked"]) == 4
        return [*found, *gradients, *net.buffers()], kept

    (full, kept), (again, fewer) = passes("full"), passes("recompute")
    assert len(full) == len(again) > 100
    assert all(torch.equal(one, other) for one, other in zip(full, again, strict=True))
    assert fewer < kept / 5, "what is made in a block is not kept"


def test_only_training_with_gradients_makes_blocks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Encoder(TINY), torch.zeros(2, 3, 8, 8)
    net.recompute()
    made: list[object] = []

    def note(part: nn.Module, x: torch.Tensor, **_: object) -> object:
        made.append(part)
        return part(x)

    monkeypatch.setattr("cfamc_cli.engine.encoder.checkpoint", note)
    with torch.no_grad():
        net(x)
    net.eval()(x)
    assert made == []
    net.train()(x)
    assert len(made) == 9  # the stem and two blocks of each stage
