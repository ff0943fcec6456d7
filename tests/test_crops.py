"""Crop kernels against torchvision sample by sample, parameters against its sampler, and their addresses."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import warnings

import pytest
import torch
from fixed_inputs import uniform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from cfamc_cli.engine import crops as kernels
from cfamc_cli.engine import randomness
from cfamc_cli.engine.crops import CropParameters, crop_batch, interpolation, resized_crops, sample_parameters
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.recipe.schema import Augment, Crops

N = 1000
TOLERANCE = 1e-5
PLAIN = Augment(flip=0.0, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0, solarize_p=0.0)
EVERYTHING = Augment(flip=0.5, jitter_p=1.0, grayscale_p=0.5, blur_p=0.5, solarize_p=0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(
    count: int = 4, batch: int = 8, *, height: int = 16, width: int = 16, augment: Augment = EVERYTHING, seed: int = 0
) -> CropParameters:
    group = Crops(count=count, size=8)
    return sample_parameters(batch, height, width, group=group, augment=augment, generator=generator(seed))


def samples(count: int = N, size: int = 12) -> Tensor:
    """Images with all that colour kernels stumble over: ties, greys, black, white, one saturated channel."""
    x = uniform(count, 3, size, size, key="crop samples").float()
    x[::7] = x[::7].mul(4).floor() / 4
    x[::11] = x[::11, :1].expand(-1, 3, -1, -1)
    x[0], x[1], x[2] = 0.0, 1.0, torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    return x


def worst(ours: Tensor, theirs: list[Tensor]) -> float:
    return float((ours - torch.stack(theirs)).abs().max())


# Kernels, each against torchvision


@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 8), (12, 20, 16), (9, 9, 24), (32, 32, 10)])
def test_crop_resize_and_flip(height: int, width: int, size: int) -> None:
    g, views, images = generator(), 25, 10
    x = uniform(images, 3, height, width, key="resize").float()
    tall = torch.randint(1, height + 1, (views, images), generator=g)
    wide = torch.randint(1, width + 1, (views, images), generator=g)
    top = (torch.rand(views, images, generator=g) * (height - tall + 1)).long()
    left = (torch.rand(views, images, generator=g) * (width - wide + 1)).long()
    flip = torch.rand(views, images, generator=g) < 0.5
    ours = resized_crops(x, torch.stack([top, left, tall, wide], -1).float(), flip, size=size)
    theirs = []
    for v in range(views):
        for i in range(images):
            box = [int(part[v, i]) for part in (top, left, tall, wide)]
            crop = tv.resized_crop(x[i], *box, [size, size], antialias=True)
            theirs.append(tv.horizontal_flip(crop) if flip[v, i] else crop)
    assert worst(ours.flatten(0, 1), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_blends(name: str) -> None:
    x, factors = samples(), torch.rand(N, generator=generator()) * 2
    factors[:3] = torch.tensor([0.0, 1.0, 2.0])
    theirs = [getattr(tv, f"adjust_{name}")(image, float(factor)) for image, factor in zip(x, factors, strict=True)]
    operation = torch.full((N,), getattr(kernels, name.upper()))
    assert worst(kernels.blend(x, kernels.blend_weights(operation, factors)), theirs) <= TOLERANCE


def test_hue() -> None:
    x, shifts = samples(), torch.rand(N, generator=generator()) - 0.5
    shifts[:20:4], shifts[1:20:4], shifts[2:20:4] = 0.0, 0.5, -0.5
    theirs = [tv.adjust_hue(image, float(shift)) for image, shift in zip(x, shifts, strict=True)]
    assert worst(kernels.hue(x, shifts), theirs) <= TOLERANCE


def test_gray_and_solarize() -> None:
    x = samples()
    x[5, 0, 0, 0] = 128 / 255
    assert worst(kernels.grayscale(x), [tv.rgb_to_grayscale(image, num_output_channels=3) for image in x]) <= TOLERANCE
    assert worst(kernels.solarize(x), [tv.solarize(image, 128 / 255) for image in x]) <= TOLERANCE


@pytest.mark.parametrize("size", [8, 12, 20])
def test_gaussian_blur(size: int) -> None:
    count = 334  # of 1,000 over the three sizes
    x, sigma = samples(count, size), 0.1 + 1.9 * torch.rand(count, generator=generator())
    theirs = [tv.gaussian_blur(image, [13, 13], [float(s), float(s)]) for image, s in zip(x, sigma, strict=True)]
    assert worst(kernels.gaussian_blur(x, sigma), theirs) <= TOLERANCE


def test_the_whole_pipeline_is_torchvisions_crop_by_crop() -> None:
    p, x = parameters(8, 16), uniform(16, 3, 16, 16, key="pipeline").float()
    ours = crop_batch(x, p, size=8)
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for v in range(8):
        for i in range(16):
            box = [int(part) for part in p.box[v, i]]
            crop = tv.resized_crop(x[i], *box, [8, 8], antialias=True)
            crop = tv.horizontal_flip(crop) if p.flip[v, i] else crop
            for operation in p.order[v, i].tolist():  # each crop in an order of its own
                crop = adjust[operation](crop, float(p.factors[v, i, operation]))
            crop = tv.rgb_to_grayscale(crop, num_output_channels=3) if p.grayscale[v, i] else crop
            sigma = float(p.sigma[v, i])
            crop = tv.gaussian_blur(crop, [13, 13], [sigma, sigma]) if sigma > 0 else crop
            if p.solarized[v, i]:  # a value beside the threshold may fall on either side of it
                inside = (crop - 128 / 255).abs() > 1e-5
                crop = torch.where(inside, tv.solarize(crop, 128 / 255), ours[v, i])
            assert float((ours[v, i] - crop).abs().max()) <= TOLERANCE
    orders = {tuple(order) for order in p.order.flatten(0, 1).tolist()}
    assert len(orders) == 24, "all orders of the four colour operations occur"


def test_uint8_is_a_255th_of_its_values() -> None:
    x, p = (uniform(8, 3, 16, 16, key="bytes") * 256).to(torch.uint8), parameters()
    assert torch.equal(crop_batch(x, p, size=8), crop_batch(x.float() / 255, p, size=8))


@pytest.mark.parametrize("value", [0.0, 1.0, 128 / 255])
@pytest.mark.parametrize("augment", [PLAIN, EVERYTHING])
def test_crops_stay_in_the_box(value: float, augment: Augment) -> None:
    crops = crop_batch(
        torch.full((32, 3, 17, 19), value), parameters(16, 32, height=17, width=19, augment=augment), size=13
    )
    assert float(crops.min()) >= 0
    assert float(crops.max()) <= 1
    assert crops.dtype == torch.float32


def test_images_are_not_changed() -> None:
    x = uniform(8, 3, 16, 16, key="kept").float()
    before = x.clone()
    crop_batch(x, parameters(), size=16)
    assert torch.equal(x, before)


def test_gradients_pass_through_a_crop() -> None:
    x = uniform(2, 3, 6, 5, key="gradient").requires_grad_()
    box = torch.tensor([[[0.0, 1.0, 4.0, 3.0], [2.0, 0.0, 4.0, 5.0]]] * 3, dtype=torch.float64)
    flip = torch.tensor([[True, False], [False, True], [True, True]])
    assert torch.autograd.gradcheck(lambda x: resized_crops(x, box, flip, size=4), x)


def test_interpolation_rows_sum_to_one() -> None:
    start, length = torch.tensor([0.0, 3.0, 5.0, 0.0]), torch.tensor([1.0, 4.0, 3.0, 8.0])
    for size in (1, 3, 8, 40):
        rows = interpolation(start, length, source=8, size=size)
        torch.testing.assert_close(rows.sum(-1), torch.ones(4, size))
        assert (rows >= 0).all()
        outside = (torch.arange(8) < start[:, None]) | (torch.arange(8) >= (start + length)[:, None])
        assert not rows.amax(1)[outside].any(), "nothing from beyond the crop's border"


# What is random


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [(32, 32, (0.08, 1.0), (0.75, 4 / 3)), (24, 40, (0.2, 0.9), (0.5, 2.0)), (32, 32, (0.25, 0.25), (1.0, 1.0))],
)
def test_boxes_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    count = 4000
    group = Crops(count=1, size=8, scale=scale, ratio=ratio)
    ours = sample_parameters(count, height, width, group=group, augment=PLAIN, generator=generator()).box[0]
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(1)
        sampler = v2.RandomResizedCrop(8, scale=scale, ratio=ratio, antialias=True)
        drawn = [sampler.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in drawn], dtype=torch.float32)
    for column, side in ((0, height), (1, width), (2, height), (3, width)):
        counts = [torch.histc(part[:, column], side + 1, -0.5, side + 0.5).cumsum(0) / count for part in (ours, theirs)]
        # Kolmogorov-Smirnov: beyond 1.95 sqrt(2 / n) with probability 0.001
        assert float((counts[0] - counts[1]).abs().max()) < 1.95 * math.sqrt(2 / count)
    areas = [(part[:, 2] * part[:, 3]).mean() for part in (ours, theirs)]
    assert float(areas[0]) == pytest.approx(float(areas[1]), rel=0.03)


def slow_box(tries: list[list[float]], corner: list[float], height: int, width: int, group: Crops) -> list[float]:
    """Torchvision's RandomResizedCrop with loops, from uniform numbers."""
    low, high = math.log(group.ratio[0]), math.log(group.ratio[1])
    for area, ratio in tries:
        pixels = height * width * (group.scale[0] + (group.scale[1] - group.scale[0]) * area)
        aspect = math.exp(low + (high - low) * ratio)
        tall, wide = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < tall <= height and 0 < wide <= width:
            return [int(corner[0] * (height - tall + 1)), int(corner[1] * (width - wide + 1)), tall, wide]
    tall, wide = height, width
    if width / height < group.ratio[0]:
        tall = round(width / group.ratio[0])
    elif width / height > group.ratio[1]:
        wide = round(height * group.ratio[1])
    return [(height - tall) // 2, (width - wide) // 2, tall, wide]


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (12, 20, (0.001, 1.0), (0.3, 2.5)),  # sizes of 0 pixels, of 1, of the whole side, and larger
        (20, 12, (0.3, 0.9), (0.75, 1.25)),
        (15, 15, (1.0, 1.0), (0.5, 2.0)),  # often nothing fits, though the image's own ratio is allowed
        (9, 40, (0.9, 1.0), (0.4, 1.3)),  # nothing fits and the image is too wide
        (40, 9, (0.9, 1.0), (0.7, 1.3)),
    ],
)
def test_every_parameter_is_of_a_draw_of_its_own(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    augment = Augment(flip=0.3, jitter=(0.4, 0.3, 0.2, 0.1), jitter_p=0.8, grayscale_p=0.2, blur_p=0.6, solarize_p=0.15)
    group = Crops(count=5, size=8, scale=scale, ratio=ratio)
    p = sample_parameters(40, height, width, group=group, augment=augment, generator=generator(3))
    again = generator(3)
    sigma, tries, corner, flip, jittered, order, factors, gray, blurred, solarized = (
        torch.rand(5, 40, *shape, generator=again).tolist()
        for shape in ((), (10, 2), (2,), (), (), (4,), (4,), (), (), ())
    )
    for v in range(5):
        for i in range(40):
            assert p.box[v, i].tolist() == slow_box(tries[v][i], corner[v][i], height, width, group)
            masks = [bool(mask[v, i]) for mask in (p.flip, p.jittered, p.grayscale, p.solarized)]
            draws = (flip, jittered, gray, solarized)
            assert masks == [draw[v][i] < share for draw, share in zip(draws, (0.3, 0.8, 0.2, 0.15), strict=True)]
            assert p.order[v, i].tolist() == sorted(range(4), key=order[v][i].__getitem__)
            signs = [2 * factor - 1 for factor in factors[v][i]]
            wanted = [1 + 0.4 * signs[0], 1 + 0.3 * signs[1], 1 + 0.2 * signs[2], 0.1 * signs[3]]
            assert p.factors[v, i].tolist() == pytest.approx(wanted, abs=1e-6)
            wanted_sigma = 0.1 + 1.9 * sigma[v][i] if blurred[v][i] < 0.6 else 0.0
            assert float(p.sigma[v, i]) == pytest.approx(wanted_sigma, abs=1e-6)


def test_boxes_lie_within_the_image() -> None:
    for height, width in ((8, 8), (8, 40), (40, 8), (1, 1), (3, 50)):
        p = parameters(64, 32, height=height, width=width)
        top, left, tall, wide = p.box.unbind(-1)
        assert (p.box == p.box.round()).all()
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (tall >= 1).all()
        assert (wide >= 1).all()
        assert (top + tall <= height).all()
        assert (left + wide <= width).all()


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (20, 20)])
def test_where_no_box_fits_it_is_torchvisions_central_crop(height: int, width: int) -> None:
    ratio = (3.0, 4.0) if height == width else (0.9, 1.1)
    group = Crops(count=1, size=8, scale=(1.0, 1.0), ratio=ratio)
    box = sample_parameters(4, height, width, group=group, augment=PLAIN, generator=generator()).box[0]
    d = v2.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=ratio).make_params([torch.zeros(3, height, width)])
    assert box.tolist() == [[d["top"], d["left"], d["height"], d["width"]]] * 4


def test_probabilities_and_ranges_are_the_recipes() -> None:
    augment = Augment(flip=0.3, jitter=(0.4, 0.3, 0.2, 0.1), jitter_p=0.8, grayscale_p=0.2, blur_p=0.1, solarize_p=0.15)
    p = parameters(100, 200, augment=augment)
    for mask, expected in (
        (p.flip, 0.3),
        (p.jittered, 0.8),
        (p.grayscale, 0.2),
        (p.sigma > 0, 0.1),
        (p.solarized, 0.15),
    ):
        assert float(mask.float().mean()) == pytest.approx(expected, abs=0.015)
    for operation, (centre, spread) in enumerate(((1, 0.4), (1, 0.3), (1, 0.2), (0, 0.1))):
        drawn = p.factors[..., operation]
        assert float(drawn.min()) == pytest.approx(centre - spread, abs=1e-3)
        assert float(drawn.max()) == pytest.approx(centre + spread, abs=1e-3)
        assert float(drawn.mean()) == pytest.approx(centre, abs=0.01)
    blurred = p.sigma[p.sigma > 0]
    assert float(blurred.min()) == pytest.approx(0.1, abs=0.02)
    assert float(blurred.max()) == pytest.approx(2.0, abs=0.02)
    share = torch.stack([(p.order[..., 0] == operation).float().mean() for operation in range(4)])
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.015, rtol=0)


def test_a_share_has_the_parameters_of_the_whole_batch() -> None:
    x, p = uniform(8, 3, 16, 16, key="share").float(), parameters()
    whole = crop_batch(x, p, size=8)
    for first, last in ((0, 4), (4, 8), (2, 3)):
        torch.testing.assert_close(crop_batch(x[first:last], p.images(first, last), size=8), whole[:, first:last])


_ADDRESSED = """
import hashlib
import torch
from cfamc_cli.engine.crops import crop_batch, sample_parameters
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.recipe.schema import Augment, Crops

images = (torch.arange(8 * 3 * 16 * 16) * 37 % 256).to(torch.uint8).view(8, 3, 16, 16)
augment = Augment(flip=0.5, jitter_p=1.0, grayscale_p=0.5, blur_p=0.5, solarize_p=0.5)
parameters = sample_parameters(
    8, 16, 16, group=Crops(count=4, size=8), augment=augment, generator=addressed_generator("crops", 1, 2, 3, 0, 0)
)
digest = hashlib.sha256(crop_batch(images, parameters, size=8).numpy().tobytes()).hexdigest()
"""


def test_another_process_draws_the_same_crops() -> None:
    torch.rand(17)  # what was drawn before does not matter
    here: dict[str, str] = {}
    exec(_ADDRESSED, here)
    environment = {"PYTHONHASHSEED": "123", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    command = [sys.executable, "-c", _ADDRESSED + "print(digest)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == here["digest"]


def test_addresses_draw_different_numbers() -> None:
    addresses = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]
    drawn = {tuple(torch.rand(4, generator=addressed_generator("crops", *address)).tolist()) for address in addresses}
    assert len(drawn) == len(addresses)


def hashed(address: str) -> torch.Generator:
    """A generator seeded with the head of the SHA-256 of an address written as JSON."""
    return torch.Generator().manual_seed(int(hashlib.sha256(address.encode()).hexdigest()[:16], 16) // 2)


def test_seeds_are_the_heads_of_hashes_and_orders_are_drawn_from_them() -> None:
    assert randomness.addressed_seed("crops", 1, "1") == hashed('["crops", 1, "1"]').initial_seed()
    assert addressed_generator("crops", 1).initial_seed() == hashed('["crops", 1]').initial_seed()
    order = randomness.epoch_order(3, 7, 50)
    assert torch.equal(order, torch.randperm(50, generator=hashed('["order", 3, 7]')))


def test_a_balanced_order_takes_the_first_of_every_class_then_the_second_and_so_on() -> None:
    labels = torch.randint(-1, 4, (500,), generator=generator())
    shuffled = torch.randperm(500, generator=hashed('["held-out", 5]')).tolist()
    ranks: dict[int, int] = {}
    ranked = []
    for place, index in enumerate(shuffled):
        label = int(labels[index])
        if label >= 0:
            ranked.append((ranks.get(label, 0), place, index))
            ranks[label] = ranks.get(label, 0) + 1
    assert randomness.balanced_order(labels, "held-out", 5).tolist() == [index for _, _, index in sorted(ranked)]


def test_lists_hold_each_operation_of_a_crop_once_and_hue_in_the_middle() -> None:
    p = parameters(augment=EVERYTHING.model_copy(update={"jitter_p": 0.5}))
    *_, gray, blurred, solarized, sigma = p.lists()[:6]
    for places, mask in ((gray, p.grayscale), (blurred, p.sigma > 0), (solarized, p.solarized)):
        assert places.tolist() == [place for place, set_ in enumerate(mask.flatten().tolist()) if set_]
    assert torch.equal(sigma, p.sigma.flatten()[blurred])
    turns = p.lists()[6::2]
    jittered = [place for place, set_ in enumerate(p.jittered.flatten().tolist()) if set_]
    assert turns[3].tolist() == jittered
    assert torch.cat(turns).sort().values.tolist() == sorted(4 * jittered)
    for turn, chosen in enumerate(turns):
        hue_at = p.order.flatten(0, 1).tolist()
        assert all(0 <= hue_at[place].index(kernels.HUE) + turn - 3 < 4 for place in chosen.tolist())


@pytest.mark.parametrize("piece", [1, 3 * 8 * 8 * 5, 10**9])
def test_pieces_change_no_bit(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, p = uniform(8, 3, 16, 16, key="pieces").float(), parameters()
    whole = crop_batch(x, p, size=8)
    monkeypatch.setattr(kernels, "_PIECE", piece)
    assert torch.equal(crop_batch(x, p, size=8), whole)
