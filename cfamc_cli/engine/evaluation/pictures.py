"""Pictures of adversarial examples, how the loss climbs during an attack, and what it is like around images.

A sheet shows per sample the clean image, the adversarial one and their difference amplified around grey.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import cross_entropy

from cfamc_cli.engine.attacks.pgd import cross_entropy_of, projected_ascent
from cfamc_cli.engine.attacks.search import Predict, Region, climb, logits_at
from cfamc_cli.engine.ball import norms, per_sample
from cfamc_cli.engine.device import move
from cfamc_cli.engine.evaluation.honesty import losses
from cfamc_cli.recipe.schema import Norm

_TILE = 112  # pixels of the smaller side that small images are enlarged to
_GAP, _LINE = 8, 14
_COLUMNS = 3
REACH, STEPS = 2.0, 17  # radii that a loss surface goes to in both directions, and its steps
_INK, _PAPER, _WRONG = (20, 20, 20), (255, 255, 255), (170, 20, 20)


@dataclass(frozen=True)
class Shown:
    """One sample of a sheet."""

    clean: Tensor  # (3, H, W) in [0, 1]
    adversarial: Tensor  # (3, H, W) in [0, 1]
    title: str  # which sample it is
    label: str  # name of its class, which is also what the clean image is predicted as
    predicted: str  # name of the class that the adversarial image is predicted as


def sheet(samples: Sequence[Shown], *, heading: Sequence[str], gain: float) -> bytes:
    """Draw samples as one PNG.

    Args:
        samples: At least one; images of one size.
        heading: Lines above the pictures.
        gain: What differences are multiplied by before they are added to middle grey.
    """
    height, width = samples[0].clean.shape[-2:]
    scale = max(1, round(_TILE / min(height, width)))
    tile_w, tile_h = width * scale, height * scale
    cell_w, cell_h = 3 * tile_w + 2 * 2, tile_h + 3 * _LINE + _GAP
    columns = min(_COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    canvas, top = _headed(heading, width=columns * (cell_w + 2 * _GAP), height=rows * cell_h)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for place, sample in enumerate(samples):
        left = _GAP + place % columns * (cell_w + 2 * _GAP)
        upper = top + place // columns * cell_h
        difference = 0.5 + gain * (sample.adversarial - sample.clean)
        for number, image in enumerate((sample.clean, sample.adversarial, difference)):
            canvas.paste(_enlarged(image, (tile_w, tile_h)), (left + number * (tile_w + 2), upper))
        below = upper + tile_h + 2
        captions = (
            (f"{sample.title}: {sample.label}, predicted so when clean", _INK),
            (f"adversarial: predicted as {sample.predicted}", _WRONG),
        )
        for line, (text, ink) in enumerate(captions):
            draw.text((left, below + line * _LINE), _fitting(text, cell_w, font), fill=ink, font=font)
    return _png(canvas)


def crops_sheet(
    images: Tensor, clean: Sequence[Tensor], moved: Sequence[Tensor], *, heading: Sequence[str], gain: float
) -> bytes:
    """Draw each image and its crops in a line, below it the crops as they are perturbed, and the difference.

    Args:
        images: (N, 3, H, W) in [0, 1].
        clean: Crops by group, (V, N, 3, S, S) each.
        moved: The same, perturbed.
        heading: Lines above the pictures.
        gain: What differences are multiplied by before they are added to middle grey.

    Returns:
        A PNG.
    """
    step = _TILE + 2
    difference = [0.5 + gain * (after - before) for before, after in zip(clean, moved, strict=True)]
    lines = [[crop for group in groups for crop in group] for groups in (clean, moved, difference)]
    each = len(lines) * step + _GAP  # pixels of an image and what belongs to it
    canvas, top = _headed(heading, width=(1 + len(lines[0])) * step + 3 * _GAP, height=len(images) * each)
    for place, image in enumerate(images):
        upper = top + place * each
        canvas.paste(_enlarged(image, (_TILE, _TILE)), (_GAP, upper))
        for below, crops in enumerate(lines):
            for column, crop in enumerate(crops, start=1):
                at = 2 * _GAP + column * step, upper + below * step
                canvas.paste(_enlarged(crop[place], (_TILE, _TILE)), at)
    return _png(canvas)


def _headed(heading: Sequence[str], *, width: int, height: int) -> tuple[Image.Image, int]:
    """A canvas with lines of text, which make it wider where they must, and where the room below them begins."""
    font, top = ImageFont.load_default(), _GAP + _LINE * (len(heading) + 1)
    longest = max(round(font.getlength(_plain(line))) for line in heading)
    canvas = Image.new("RGB", (max(width, longest + 2 * _GAP), top + height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for line, text in enumerate(heading):
        draw.text((_GAP, _GAP + line * _LINE), _plain(text), fill=_INK, font=font)
    return canvas, top


def _png(canvas: Image.Image) -> bytes:
    out = io.BytesIO()
    canvas.save(out, format="PNG")
    return out.getvalue()


_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def _fitting(text: str, width: int, font: _Font) -> str:
    """The text, cut where it is wider than its place."""
    text = _plain(text)
    while len(text) > 4 and font.getlength(text) > width:
        text = text[:-4] + "..."
    return text


def _plain(text: str) -> str:
    """What the built-in font can draw."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _enlarged(image: Tensor, size: tuple[int, int]) -> Image.Image:
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.NEAREST)


def loss_by_step(
    predict: Predict, x: Tensor, y: Tensor, *, eps: float, norm: Norm, step_size: float, steps: int
) -> tuple[list[float], list[float]]:
    """How PGD from the clean images climbs when no sample stops early.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1], (N, C, H, W).
        y: Labels, (N,).
        eps: Radius of the ball.
        norm: Its norm.
        step_size: Length of a step, in the units of eps.
        steps: Number of steps.

    Returns:
        Mean cross-entropy and accuracy after 0 to `steps` steps; the last iterate counts, not the best.
    """
    losses: list[float] = []
    right: list[float] = []
    nobody = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def look(_samples: Tensor, _points: Tensor, logits: Tensor, values: Tensor) -> Tensor:
        losses.append(float(values.mean()))
        right.append(float((logits.argmax(1) == y).float().mean()))
        return nobody

    region = Region.around(x, eps=eps, norm=norm)
    projected_ascent(predict, region, x, objective=cross_entropy_of(y), look=look, step_size=step_size, steps=steps)
    return losses, right


def loss_surface(
    predict: Predict, x: Tensor, y: Tensor, *, eps: float, norm: Norm, generator: torch.Generator
) -> list[list[float]]:
    """The mean cross-entropy around images, in a random direction (rows) and along the gradient (columns).

    Both directions have the length of the radius; `STEPS` of them go from -`REACH` to `REACH` radii. What leaves the
    box is cut off.

    Args:
        predict: Logits from images.
        x: Clean images in [0, 1], (N, C, H, W).
        y: Labels, (N,).
        eps: Radius of the ball.
        norm: Its norm.
        generator: CPU generator of the random direction.
    """
    _, _, grad = climb(predict, x, lambda z: cross_entropy(z, y, reduction="none"))
    drawn = move(torch.randn(x.shape, generator=generator), x.device)
    along, other = (
        way.sign() if norm == "linf" else way / per_sample(norms(way, norm="l2").clamp_min(1e-30), way)
        for way in (grad.nan_to_num(), drawn)
    )
    steps = [REACH * eps * (2 * at / (STEPS - 1) - 1) for at in range(STEPS)]

    def loss(across: float, ahead: float) -> float:
        return float(losses(logits_at(predict, (x + across * other + ahead * along).clamp(0, 1)), y).mean())

    return [[loss(across, ahead) for ahead in steps] for across in steps]
