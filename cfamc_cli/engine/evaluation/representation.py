"""What an encoder's features are like where nobody has labels: how many directions they use, and how far attacks move.

RankMe: Garrido et al., arXiv:2210.02885; alpha-ReQ: Agrawal et al., NeurIPS 2022. Symbols: N images, D dimensions of a
layer, sigma the singular values of its outputs (N, D), lambda the eigenvalues of their covariance. All of it is float64
on the CPU but the passes of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfamc_cli.engine.attacks.plan import run_stage
from cfamc_cli.engine.attacks.search import Predict, blend, logits_at
from cfamc_cli.engine.device import full_precision, move
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.evaluation.verify import in_region
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.recipe.schema import EmbeddingAttack, number
from cfamc_cli.store.records import Layer

MOST_IMAGES = 25_600  # whose spectrum is taken, as RankMe does
_CHUNK = 250  # images of a pass, and part of the address of an attack's random starts
_SMOOTHING = 1e-7  # that RankMe adds to each share
_TAIL = (11, 100)  # ranks of the eigenvalues that the power law is fitted to, counted from 1
_NOTHING = 1e-12  # of the largest eigenvalue: what float64 leaves of an eigenvalue that is 0

Each = Callable[[int, int], None]  # told how many of how many images are done


@torch.no_grad()
def outputs_of(
    encoder: Encoder, images: Tensor, *, backbone_only: bool, device: torch.device, each: Each
) -> dict[Layer, Tensor]:
    """What each layer that heads or objectives read makes of images, in one pass.

    Args:
        encoder: In eval mode, on `device`.
        images: (N, 3, S, S) uint8, anywhere.
        backbone_only: Whether the encoder was imported without the layers above its backbone.
        device: Where to compute.
        each: Told after each chunk.

    Returns:
        float32 on the CPU, by layer: "backbone" (N, F), "pre_feature" (N, hidden_dim), and "embedding" (N, D), of unit
        norm.
    """
    chunks: dict[Layer, list[Tensor]] = {}
    with full_precision(device):
        for first in range(0, len(images), _CHUNK):
            x = move(images[first : first + _CHUNK], device).float() / 255
            made: dict[Layer, Tensor] = {"backbone": encoder.features(x, features="backbone")}
            if not backbone_only:
                made["pre_feature"] = encoder.pre_feature(made["backbone"])
                made["embedding"] = F.normalize(encoder.projector(made["pre_feature"]), dim=1)
            for layer, output in made.items():
                chunks.setdefault(layer, []).append(output.float().cpu())
            each(min(first + _CHUNK, len(images)), len(images))
    return {layer: torch.cat(parts) for layer, parts in chunks.items()}


def rank_me(outputs: Tensor) -> float:
    """RankMe: the exponential of the entropy of p_k = sigma_k / sum(sigma) + 1e-7, from 1 to min(N, D).

    Args:
        outputs: (N, D), not centred.

    Source: Garrido et al., arXiv:2210.02885, equation 2.
    """
    sigma = _eigenvalues(outputs.double().cpu()).sqrt()
    share = sigma / sigma.sum().clamp_min(1e-300) + _SMOOTHING
    return float((-share * share.log()).sum().exp())


def alpha_req(outputs: Tensor) -> float | None:
    """alpha-ReQ: the exponent of the power law lambda_k ~ k^-alpha that the spectrum falls with; near 1 is best.

    A line is fitted to log lambda_k against log k at the ranks 11 to 100, each weighing 1/k, so that equal stretches of
    log k weigh alike; eigenvalues that are 0 but for rounding are left out.

    Args:
        outputs: (N, D).

    Returns:
        alpha; None where the tail has fewer than two eigenvalues above 0.

    Source: Agrawal et al., "alpha-ReQ", NeurIPS 2022, section 3, with the fit of Stringer et al., Nature 571, 2019.
    """
    wide = outputs.double().cpu()
    eigenvalues = _eigenvalues(wide - wide.mean(0)) / len(wide)
    first, last = _TAIL
    tail = eigenvalues[first - 1 : last]
    tail = tail[tail > _NOTHING * eigenvalues[:1]]
    if len(tail) < 2:
        return None
    rank = torch.arange(first, first + len(tail), dtype=torch.float64)
    x, y, weight = rank.log(), tail.log(), 1 / rank / (1 / rank).sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return float(-(weight * x * y).sum() / (weight * x * x).sum())


def _eigenvalues(z: Tensor) -> Tensor:
    """The eigenvalues of z^T z that can be above 0, falling: the squares of the singular values of z (N, D)."""
    gram = z @ z.T if len(z) <= z.shape[1] else z.T @ z  # a tenth of the time of a decomposition of z
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return eigenvalues


@dataclass(frozen=True)
class Moved:
    """What an attack did to the features of M images."""

    cosine: Tensor  # (M,) float64, of clean and attacked features; 1 where nothing moved
    kept: Tensor  # (M,) bool, whether the nearest neighbour among the other clean images is still the same one
    invalid: int  # points that the attack returned and that were no images within the ball; these count as unmoved


def moved(
    embed: Predict, images: Tensor, bank: Tensor, *, stage: EmbeddingAttack, seed: int, device: torch.device, each: Each
) -> Moved:
    """Move the features of images as far as an attack can, without labels, and see what is left of them.

    Args:
        embed: Features (n, D) from images in [0, 1], on `device`; of a module in eval mode.
        images: uint8, (M, 3, S, S), anywhere.
        bank: Features of N >= max(M, 2) clean images, the first M of which are `images`, (N, D).
        stage: The attack.
        seed: Of the random starts, which are addressed by (seed, chunk).
        device: Where to compute.
        each: Told after each chunk.
    """
    directions = F.normalize(bank.double().cpu(), dim=1)
    cosines, kept, invalid = [], [], 0
    for first in range(0, len(images), _CHUNK):
        x = move(images[first : first + _CHUNK], device).float() / 255
        nobody = torch.zeros(len(x), dtype=torch.int64, device=device)  # no label is looked at
        generator = addressed_generator("unlabelled", seed, first // _CHUNK)
        points = run_stage(stage, embed, x, nobody, embed=embed, generator=generator)
        valid = in_region(x, points, eps=number(stage.eps), norm=stage.norm)
        attacked = F.normalize(logits_at(embed, blend(valid, points, x)).double().cpu(), dim=1)
        own = torch.arange(first, first + len(x))
        cosines.append((attacked * directions[own]).sum(1).clamp(-1, 1))
        kept.append(_nearest(attacked, directions, own) == _nearest(directions[own], directions, own))
        invalid += int((~valid).sum())
        each(first + len(x), len(images))
    return Moved(torch.cat(cosines), torch.cat(kept), invalid)


def _nearest(queries: Tensor, directions: Tensor, own: Tensor) -> Tensor:
    """The row of the bank, other than their own, with the largest cosine to each query, (n,)."""
    cosine = queries @ directions.T  # (n, N)
    cosine[torch.arange(len(own)), own] = -torch.inf
    return cosine.argmax(1)
