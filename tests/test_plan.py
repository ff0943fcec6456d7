"""The plan's counts against the modules, the published figures and hand-made numbers."""

from __future__ import annotations

import itertools
from typing import Any, Literal, get_args

import pytest
import torch
import torchvision
from tiny import tiny_recipe
from torch.utils.flop_counter import FlopCounterMode

from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe import file
from cfamc_cli.recipe.plan import Plan, activations_per_view, flops_per_view, parameter_counts, plan
from cfamc_cli.recipe.schema import Model, Recipe, Stem

Backbone = Literal["resnet18", "resnet34", "resnet50"]
BACKBONES: tuple[Backbone, ...] = get_args(Backbone)


def load(name: str, *overrides: str) -> Recipe:
    return file.load(name, overrides=overrides)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone_has_torchvisions_parameters(backbone: Backbone) -> None:
    with torch.device("meta"):
        reference = getattr(torchvision.models, backbone)()
    expected = sum(p.numel() for name, p in reference.named_parameters() if not name.startswith("fc."))
    assert parameter_counts(Model(backbone=backbone, stem="imagenet"))[1] == expected


@pytest.mark.parametrize(
    ("backbone", "stem", "width"), [*itertools.product(BACKBONES, ("cifar", "imagenet"), (3, 16, 64))]
)
def test_parameters_equal_the_modules(backbone: Backbone, stem: Stem, width: int) -> None:
    model = Model(backbone=backbone, stem=stem, width=width, hidden_dim=96, embedding_dim=40)
    with torch.device("meta"):
        encoder = Encoder(model)
    total = sum(p.numel() for p in encoder.parameters())
    assert parameter_counts(model) == (total, sum(p.numel() for p in encoder.backbone.parameters()))


def test_a_network_that_resizes_costs_what_it_sees() -> None:
    seen, resizing = Model(width=8), Model(width=8, input_size=64)
    assert flops_per_view(resizing, size=32) == flops_per_view(seen, size=64)
    assert activations_per_view(resizing, size=32) == activations_per_view(seen, size=64)
    assert parameter_counts(resizing) == parameter_counts(seen)


@pytest.mark.parametrize(
    ("backbone", "stem", "size"),
    [
        ("resnet18", "cifar", 32),
        ("resnet18", "imagenet", 33),
        ("resnet34", "imagenet", 64),
        ("resnet50", "cifar", 33),
        ("resnet50", "imagenet", 64),
        ("resnet18", "cifar-padded", 9),
        ("resnet18", "cifar-linear", 9),
    ],
)
def test_flops_equal_torchs_own_count(backbone: Backbone, stem: Stem, size: int) -> None:
    model = Model(backbone=backbone, stem=stem, width=8, hidden_dim=64, embedding_dim=32)
    with torch.device("meta"):
        encoder = Encoder(model)
        crops = torch.empty(2, 3, size, size, requires_grad=True)  # the perturbation's gradient is part of a pass
        with FlopCounterMode(display=False) as counter:
            encoder(crops).sum().backward()
    assert counter.get_total_flops() == 2 * flops_per_view(model, size=size)


@pytest.mark.parametrize(
    ("backbone", "stem", "size"),
    [
        ("resnet18", "cifar", 16),
        ("resnet18", "imagenet", 33),
        ("resnet50", "cifar", 9),
        ("resnet18", "cifar-padded", 9),
        ("resnet18", "cifar-linear", 9),
    ],
)
def test_activations_are_what_autograd_keeps(backbone: Backbone, stem: Stem, size: int) -> None:
    model, views = Model(backbone=backbone, stem=stem, width=8, hidden_dim=64, embedding_dim=32), 2
    kept: dict[int, int] = {}
    with torch.device("meta"):
        encoder = Encoder(model)
        own = {parameter.untyped_storage()._cdata for parameter in encoder.parameters()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if len(tensor) == views and tensor.stride(-1) and tensor[0].numel() > 1:  # no norm, nor what a channel has
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            z = encoder(torch.empty(views, 3, size, size))
    places = 8 * 8 * 9**2 if stem == "imagenet" else 0  # int64
    expected = views * (4 * activations_per_view(model, size=size) + places + 4 * 3 * size**2)
    assert sum(nbytes for storage, nbytes in kept.items() if storage not in own) == expected
    assert z.shape == (views, 32)


# Peaks of the training loop in MiB, "full" and "recompute", counted by PyTorch's allocator for CUDA (2.14) with the
# kernels left out: three batches on 5,000 images, of imagenet100 on 1,000 of 256 pixels.
COUNTED = {
    ("cifar10",): (4_206, 2_136),
    ("imagenet100",): (11_168, 7_471),
    ("cifar10-simclr-crop-pgd",): (2_769, 1_319),
    ("cifar10-laptop",): (348, 218),
    ("cifar10", "model.backbone=resnet50"): (20_370, 6_956),
}


@pytest.mark.parametrize("counted", COUNTED)
def test_memory_is_what_pytorch_counts(counted: tuple[str, ...]) -> None:
    shown = plan(load(*counted), 1_000 if "imagenet100" in counted else 5_000)
    found = [shown.memory_full / 2**20, shown.memory_recompute / 2**20]
    assert found == pytest.approx(COUNTED[counted], rel=0.15)
    assert shown.precision == "bfloat16"


def test_every_count_of_a_small_run_by_hand() -> None:
    """70 images in batches of 8, 1 epoch, a free adversary of 3 replays, 4 crops of 8 pixels in float32."""
    recipe = tiny_recipe()
    with torch.device("meta"):
        encoder = Encoder(recipe.model)
    parameters = sum(p.numel() for p in encoder.parameters())
    view, kept = flops_per_view(recipe.model, size=8), activations_per_view(recipe.model, size=8)
    others = 3 * 4 * parameters + 4 * 4 * 8 * 4 * 3 * 8 * 8 + 64 * 2**20
    assert plan(recipe, 70) == Plan(
        images=70,
        per_thousand=False,
        batches_per_epoch=8,  # six images are left out
        batches=8,
        weight_updates=24,
        view_passes=24 * 8 * 4,
        attack_view_passes=0,
        parameters=parameters,
        backbone_parameters=sum(p.numel() for p in encoder.backbone.parameters()),
        flops_per_view=view,
        flops=24 * 8 * 4 * view,
        memory=others + 4 * 8 * 4 * kept,
        weight_bytes=3 * 4 * parameters,
        activation_bytes=4 * 8 * 4 * kept,
        data_bytes=0,  # a folder's size is not known
        crop_bytes=4 * 4 * 8 * 4 * 3 * 8 * 8,  # crops, those of the next batch, the perturbation, and crops with it on
        memory_full=others + 4 * 8 * 4 * kept,
        # In the backward pass of the last block of the first stage: what goes into it and the block before, what its
        # two convolutions keep, and two gradients.
        memory_recompute=others + 4 * 8 * 4 * (2 + 4 + 2) * 8 * 8 * 8,
        precision="float32",
    )
    pooled = tiny_recipe(model={"stem": "imagenet"})  # 8 channels of 2 x 2 pixels, whose places take 8 bytes each
    kept = activations_per_view(pooled.model, size=8)
    assert plan(pooled, 70).activation_bytes == 8 * 4 * (4 * kept + 8 * 8 * 2 * 2)
    resized = tiny_recipe(data={"size": 12}, train={"epochs": 2.5})
    assert plan(resized, 70).data_bytes == 70 * 3 * 12 * 12
    assert plan(resized, 70).weight_updates == 20 * 3


def test_adamw_keeps_a_number_more_of_each_weight() -> None:
    lars, adamw = (plan(tiny_recipe(optimizer={"name": name}), 70) for name in ("lars", "adamw"))
    assert adamw.weight_bytes - lars.weight_bytes == adamw.memory - lars.memory == 4 * lars.parameters


def test_published_size_and_cost() -> None:
    total, backbone = parameter_counts(Model())
    assert (round(total / 1e6, 1), round(backbone / 1e6, 1)) == (34.3, 11.2)
    assert flops_per_view(Model(), size=32) == pytest.approx(3.48e9, rel=0.005)


def test_cf_amc_ssl() -> None:
    shown = plan(load("cifar10"))
    assert (shown.images, shown.per_thousand) == (50_000, False)
    assert (shown.batches_per_epoch, shown.batches, shown.weight_updates) == (500, 5_000, 15_000)
    assert (shown.view_passes, shown.attack_view_passes) == (24_000_000, 0)
    assert shown.flops == pytest.approx(83.5e15, rel=0.005)
    assert shown.flops == shown.view_passes * shown.flops_per_view


def test_pgd_passes_are_counted_apart() -> None:
    everything = plan(load("cifar10-emp-ssl-crop-pgd"))
    assert everything.batches == everything.weight_updates == 30 * 390
    assert everything.attack_view_passes == 5 * everything.view_passes
    second = plan(load("cifar10-simclr-crop-pgd"))
    assert second.attack_view_passes == 5 * second.view_passes // 2
    assert second.flops == (second.view_passes + second.attack_view_passes * 2 / 3) * second.flops_per_view


def test_every_group_but_the_first_is_perturbed_as_the_second_view() -> None:
    groups = "crops=[{count = 1, size = 32}, {count = 1, size = 32}, {count = 4, size = 16}]"
    shown = plan(load("cifar10-simclr-crop-pgd", groups))
    model = load("cifar10-simclr-crop-pgd").model
    large, small = flops_per_view(model, size=32), flops_per_view(model, size=16)
    assert shown.attack_view_passes == 5 * shown.view_passes * 5 // 6
    assert shown.flops == shown.batches * 512 * (2 * large + 4 * small + 5 * 2 / 3 * (large + 4 * small))


def test_warm_up_that_takes_all_updates_of_a_counted_folder_is_refused() -> None:
    recipe = load("folder", "schedule.warmup=300", "train.epochs=1")
    assert plan(recipe).per_thousand
    assert plan(recipe, 10_100).weight_updates > 300
    with pytest.raises(CfamcError, match=r"schedule\.warmup: 300 updates .* a run of 300"):
        plan(recipe, 10_000)


def test_groups_of_different_sizes() -> None:
    shown = plan(load("cifar10-laptop", "crops=[{count = 2, size = 32}, {count = 6, size = 16}]"))
    model = load("cifar10-laptop").model
    large, small = flops_per_view(model, size=32), flops_per_view(model, size=16)
    assert shown.flops_per_view == (2 * large + 6 * small) / 8
    assert shown.flops == shown.weight_updates * 100 * (2 * large + 6 * small)
    kept = 2 * activations_per_view(model, size=32) + 6 * activations_per_view(model, size=16)
    assert shown.activation_bytes == 2 * 100 * (kept + 3 * (2 * 32**2 + 6 * 16**2))  # bfloat16, and crops cast to it


def test_folders_count_per_thousand_images_until_they_are_counted() -> None:
    folder = load("folder")
    assert folder.data.known_images is None
    rough = plan(folder)
    assert (rough.images, rough.per_thousand, rough.batches_per_epoch) == (1_000, True, 10)
    counted = plan(folder, 2_550)
    assert (counted.images, counted.per_thousand, counted.batches_per_epoch) == (2_550, False, 25)
    assert plan(load("folder", "data.limit=300")).images == 300
    assert plan(load("folder", "train.batch_size=4096")).batches_per_epoch == 1


def test_a_folder_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(CfamcError) as refused:
        plan(load("folder"), 64)
    assert refused.value.message == "train.batch_size: 100 is more than the 64 training images"
    assert refused.value.hint == "--set train.batch_size=64"
    assert refused.value.exit_code is ExitCode.INVALID


@pytest.mark.parametrize(
    ("overrides", "images"),
    [
        ([], 50_000),
        (["data.limit=5000"], 5_000),
        (["data.dataset=svhn"], 73_257),
        (["data.dataset=stl10"], 105_000),
        (["data.holdout=5000"], 45_000),
        (["data.holdout=5000", "data.limit=45000"], 45_000),
        (["data.holdout=5000", "data.limit=200"], 200),
    ],
)
def test_sizes_of_known_sets_are_built_in(overrides: list[str], images: int) -> None:
    assert plan(load("cifar10", *overrides)).images == images


def test_memory_has_its_parts() -> None:
    clean: Any = plan(load("cifar10", 'adversary={name="none"}', "train.precision=float32"))
    free = plan(load("cifar10"))
    for shown in (clean, free):
        parts = shown.weight_bytes + shown.activation_bytes + shown.data_bytes + shown.crop_bytes
        assert shown.memory == shown.memory_full == parts + 64 * 2**20
    pixels = 100 * 16 * 3 * 32 * 32
    assert clean.activation_bytes == 2 * (free.activation_bytes - 2 * pixels)  # crops are cast to bfloat16
    assert free.crop_bytes == 2 * clean.crop_bytes == 4 * 4 * pixels
    frugal = plan(load("cifar10", "train.memory=recompute"))
    assert frugal.memory == frugal.memory_recompute == free.memory_recompute < frugal.memory_full == free.memory
    assert frugal.activation_bytes - free.activation_bytes == frugal.memory - free.memory
    assert clean.data_bytes == 50_000 * 3 * 32 * 32


def test_a_short_run_has_one_batch() -> None:
    shown = plan(load("cifar10", "train.epochs=0.0001"))
    assert (shown.batches, shown.weight_updates) == (1, 3)
