"""Random resized crops and colour augmentation of whole batches, as matrix products and vectorised kernels.

What is random is drawn once, on the CPU, into `CropParameters`; the kernels are deterministic functions of
(images, parameters) and are held to torchvision.transforms.v2.functional sample by sample.
Symbols: V crops per image, B images, N = V * B crops in crop-major order, C channels, S output size, H x W source size.
Images are float in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfamc_cli.engine.device import move_together
from cfamc_cli.recipe.schema import Augment, Crops

BLUR_RADIUS = 6  # pixels: three times the largest sigma
BLUR_SIGMA = (0.1, 2.0)
SOLARIZE_THRESHOLD = 128 / 255
_ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it takes the central crop
_LUMA = (0.2989, 0.587, 0.114)
_PIECE = 2**18  # numbers of crops that a CPU's cache holds while their colours change
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class CropParameters:
    """Everything random about a group of crops, on the CPU; (V, B) each unless noted."""

    box: Tensor  # top, left, height and width in source pixels, (V, B, 4), whole numbers as float
    flip: Tensor  # whether the crop is mirrored
    jittered: Tensor  # whether the four colour operations are applied
    order: Tensor  # the order of BRIGHTNESS, CONTRAST, SATURATION and HUE, (V, B, 4)
    factors: Tensor  # their strengths, (V, B, 4): three factors around 1 and a hue shift in [-0.5, 0.5]
    grayscale: Tensor  # whether the crop loses its colour
    sigma: Tensor  # standard deviation of the Gaussian blur in pixels, 0 where there is none
    solarized: Tensor  # whether values of 128/255 and above are inverted

    def images(self, first: int, last: int) -> CropParameters:
        """The parameters of images first to last - 1 of the batch: a process's own share."""
        return CropParameters(*(getattr(self, name)[:, first:last] for name in self.__dataclass_fields__))

    def lists(self) -> list[Tensor]:
        """The parameters as `cut` reads them: masks as lists of crops, so that no device is asked for their lengths.

        Colour operations come in seven turns, hue in the middle one: whatever a crop's own order, hue is a single
        operation of the batch, with those before and after it around it.
        """
        places = [_places(mask.flatten()) for mask in (self.grayscale, self.sigma > 0, self.solarized)]
        order, factors = self.order.flatten(0, 1), self.factors.flatten(0, 1)  # (N, 4)
        turn = torch.arange(4) - order.argmax(1, keepdim=True)  # (N, 4), 0 at hue
        turn = torch.where(self.jittered.flatten()[:, None], turn, 4)
        turns = []
        for now in range(-3, 4):
            chosen, place = (turn == now).nonzero(as_tuple=True)
            operation = order[chosen, place]
            factor = factors[chosen, operation]
            turns += [chosen, factor if now == 0 else blend_weights(operation, factor)]
        return [self.box, self.flip, *places, self.sigma[self.sigma > 0], *turns]


def sample_parameters(
    batch_size: int, height: int, width: int, *, group: Crops, augment: Augment, generator: torch.Generator
) -> CropParameters:
    """Draw the parameters of `group.count` crops for each of `batch_size` images of height x width pixels.

    Boxes follow torchvision's RandomResizedCrop: ten tries of an area share uniform in `scale` and an aspect ratio
    log-uniform in `ratio`, then the central crop.
    """
    shape = (group.count, batch_size)

    def uniform(*extra: int) -> Tensor:
        return torch.rand(*shape, *extra, generator=generator)

    jitter = torch.tensor(augment.jitter)
    centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * uniform()
    return CropParameters(
        box=_sample_boxes(uniform(_ATTEMPTS, 2), uniform(2), height, width, group),
        flip=uniform() < augment.flip,
        jittered=uniform() < augment.jitter_p,
        order=uniform(4).argsort(-1),
        factors=centre + jitter * (2 * uniform(4) - 1),
        grayscale=uniform() < augment.grayscale_p,
        sigma=torch.where(uniform() < augment.blur_p, sigma, 0.0),
        solarized=uniform() < augment.solarize_p,
    )


def _sample_boxes(tries: Tensor, corner: Tensor, height: int, width: int, group: Crops) -> Tensor:
    """Boxes (V, B, 4) from uniform numbers: tries (V, B, attempts, 2) for area and ratio, corner (V, B, 2)."""
    area = height * width * (group.scale[0] + (group.scale[1] - group.scale[0]) * tries[..., 0])
    low, high = math.log(group.ratio[0]), math.log(group.ratio[1])
    ratio = torch.exp(low + (high - low) * tries[..., 1])
    size = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], -1)  # (V, B, attempts, 2)
    fits = (size >= 1).all(-1) & (size[..., 0] <= height) & (size[..., 1] <= width)
    first = fits.float().argmax(-1)  # the first that fits; 0 where none does
    size = size.gather(-2, first[..., None, None].expand(*first.shape, 1, 2)).squeeze(-2)  # (V, B, 2)
    room = torch.tensor([height, width]) - size
    at = torch.minimum((corner * (room + 1)).floor(), room)

    whole = width / height
    if whole < group.ratio[0]:
        central = (round(width / group.ratio[0]), width)
    elif whole > group.ratio[1]:
        central = (height, round(height * group.ratio[1]))
    else:
        central = (height, width)
    middle = torch.tensor([(height - central[0]) // 2, (width - central[1]) // 2, *central], dtype=torch.float32)
    return torch.where(fits.any(-1, keepdim=True), torch.cat([at, size], -1), middle)


def crop_batch(images: Tensor, parameters: CropParameters, *, size: int) -> Tensor:
    """Cut, flip and augment all crops of a batch.

    Args:
        images: (B, C, H, W) uint8, or float in [0, 1].
        parameters: V crops of each of these images.
        size: S, pixels of a crop's side.

    Returns:
        (V, B, C, S, S) float32 in [0, 1].
    """
    (lists,) = move_together([parameters.lists()], images.device)
    return cut(images, lists, size=size)


def cut(images: Tensor, lists: Sequence[Tensor], *, size: int) -> Tensor:
    """As `crop_batch`, from `CropParameters.lists` on the device of the images."""
    box, flip, gray, blurred, solarized, sigma, *turns = lists
    crops: Tensor = resized_crops(images, box, flip, size=size).flatten(0, 1)  # (N, C, S, S)
    rows = max(1, _PIECE // crops[0].numel()) if crops.device.type == "cpu" else len(crops)
    for now, (chosen, strength) in enumerate(zip(turns[::2], turns[1::2], strict=True), start=-3):
        for part, own in zip(chosen.split(rows), strength.split(rows), strict=True):
            _change(crops, part, hue if now == 0 else blend, own)
    _change(crops, gray, grayscale)
    _change(crops, blurred, gaussian_blur, sigma)
    _change(crops, solarized, solarize)
    return crops.clamp_(0, 1).view(*flip.shape, *crops.shape[1:])  # sums of weights round to 1 + 2e-7


def _places(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)


def _change(crops: Tensor, chosen: Tensor, kernel: Callable[..., Tensor], *strength: Tensor) -> None:
    """Put what a kernel makes of the chosen crops in their place."""
    if len(chosen):
        crops[chosen] = kernel(crops[chosen], *strength)


def resized_crops(images: Tensor, box: Tensor, flip: Tensor, *, size: int) -> Tensor:
    """Crop and resize with antialiasing: per crop two interpolation matrices, rows x image x columns^T.

    Args:
        images: (B, C, H, W) uint8 or float in [0, 1].
        box: (V, B, 4) top, left, height, width in pixels, on the images' device as `flip` is.
        flip: (V, B), mirror left and right.
        size: S.

    Returns:
        (V, B, C, S, S) float32; differentiable in `images`.
    """
    count, channels, height, width = images.shape
    if images.dtype == torch.uint8:
        images = images.float() / 255
    rows = interpolation(box[..., 0], box[..., 2], source=height, size=size)  # (V, B, S, H)
    columns = interpolation(box[..., 1], box[..., 3], source=width, size=size)  # (V, B, S, W)
    columns = torch.where(flip[..., None, None], columns.flip(-2), columns)

    views = box.shape[0]
    across = columns.permute(1, 3, 0, 2).reshape(count, width, views * size)  # (B, W, V S)
    wide = images.reshape(count, channels * height, width) @ across  # (B, C H, V S)
    wide = wide.reshape(count, channels, height, views, size).permute(3, 0, 1, 2, 4)  # (V, B, C, H, S)
    return rows.unsqueeze(2) @ wide  # (V, B, C, S, S)


def interpolation(start: Tensor, length: Tensor, *, source: int, size: int) -> Tensor:
    """Matrices that resample `length` pixels from `start` on to `size`, with a triangle filter.

    Half-pixel centres; the filter widens when it shrinks and is cut at the crop's own border, as
    torchvision.transforms.v2.functional.resized_crop does with antialias=True.

    Args:
        start: (...) first source pixel.
        length: (...) number of source pixels.
        source: Pixels of the source's side.
        size: Pixels of the output's side.

    Returns:
        (..., size, source), rows that sum to 1.
    """
    start, length = start[..., None, None], length[..., None, None]
    scale = length / size
    centre = (torch.arange(size, device=start.device).unsqueeze(1) + 0.5) * scale  # in pixels of the crop
    pixel = torch.arange(source, device=start.device) - start  # (..., 1, source)
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weight = weight * ((pixel >= 0) & (pixel < length))
    return weight / weight.sum(-1, keepdim=True)


def blend_weights(operation: Tensor, factor: Tensor) -> Tensor:
    """The weights with which `blend` does an operation (N,), each BRIGHTNESS, CONTRAST or SATURATION, by factor (N,).

    Brightness blends a crop with black, contrast with its mean grey level, saturation with its grey image.
    """
    rest = 1 - factor
    grey, level = (torch.where(operation == other, rest, 0.0) for other in (SATURATION, CONTRAST))
    return torch.stack([factor, grey, level], 1)[..., None, None, None]


def blend(crops: Tensor, weights: Tensor) -> Tensor:
    """Add up (N, 3, S, S), its grey image and its mean grey level by weights (N, 3, 1, 1, 1); clamp to [0, 1]."""
    own, grey, level = weights.unbind(1)
    luma = _luma(crops)
    other = grey * luma + level * luma.mean((-2, -1), keepdim=True)
    return (own * crops + other).clamp(0, 1)


def hue(crops: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of (N, 3, S, S) by shift (N,), in turns: [-0.5, 0.5]."""
    high, low = crops.amax(1), crops.amin(1)  # (N, S, S)
    chroma = high - low
    red, green, blue = crops.unbind(1)
    safe = chroma.clamp_min(torch.finfo(crops.dtype).tiny)
    sixth = torch.where(
        red == high,
        (green - blue) / safe,
        torch.where(green == high, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixth = sixth + 6 * shift[:, None, None]
    offsets = torch.arange(5.0, 0.0, -2.0, device=crops.device)[:, None, None]
    angle = (offsets + sixth.unsqueeze(1)) % 6  # (N, 3, S, S)
    weight = torch.minimum(angle, 4 - angle).clamp(0, 1)
    return high.unsqueeze(1) - chroma.unsqueeze(1) * weight


def grayscale(crops: Tensor) -> Tensor:
    """The grey image of (N, 3, S, S), in three equal channels."""
    return _luma(crops).expand_as(crops)


def gaussian_blur(crops: Tensor, sigma: Tensor) -> Tensor:
    """Blur (N, C, S, S) with sigma (N,) in pixels: a Gaussian cut at 6 pixels, borders reflected."""
    size = crops.shape[-1]
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=crops.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # (N, 13)
    at = (torch.arange(size, device=crops.device).unsqueeze(1) + offsets).abs()  # (S, 13)
    at = (size - 1) - (size - 1 - at).abs()
    taps = torch.nn.functional.one_hot(at, size).to(crops.dtype)  # (S, 13, S)
    matrix = torch.einsum("nk,skt->nst", kernel, taps).unsqueeze(1)  # (N, 1, S, S)
    return matrix @ crops @ matrix.transpose(-2, -1)


def solarize(crops: Tensor) -> Tensor:
    """Invert the values of 128/255 and above."""
    return torch.where(crops >= SOLARIZE_THRESHOLD, 1 - crops, crops)


def _luma(crops: Tensor) -> Tensor:
    """Grey levels (N, 1, S, S) by the weights of ITU-R BT.601."""
    red, green, blue = crops[:, :1], crops[:, 1:2], crops[:, 2:]
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
