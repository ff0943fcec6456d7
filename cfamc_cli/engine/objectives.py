"""Objectives as pure functions of unit-norm embeddings.

EMP-SSL (Tong et al., arXiv:2304.03977), NT-Xent (Chen et al., arXiv:2002.05709), SupCon (Khosla et al.,
arXiv:2004.11362), pseudo-labels (Caron et al., arXiv:1807.05520).
Symbols: z embeddings (V, B, D) for V crops of B images, R the total coding rate.
All are minimised, and computed in float32 or wider also under autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from cfamc_cli.recipe.schema import Clusters, EmpSsl, SimClr, SupCon


@dataclass(frozen=True)
class Terms:
    """A loss and the parts that a person watches."""

    loss: Tensor  # scalar to minimise, with its graph
    parts: dict[str, Tensor]  # detached scalars by name


def objective_loss(z: Tensor, labels: Tensor | None, *, objective: EmpSsl | SimClr | SupCon | Clusters) -> Terms:
    """The recipe's objective for z (V, B, D); labels (B,) are read by supcon, clusters (B,) by clusters.

    Raises:
        ValueError: supcon without labels, or clusters without clusters.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        match objective:
            case EmpSsl():
                return emp_ssl_loss(
                    z,
                    invariance_weight=objective.invariance_weight,
                    tcr_weight=objective.tcr_weight,
                    tcr_eps=objective.tcr_eps,
                )
            case SimClr():
                return Terms(nt_xent(z, temperature=objective.temperature), {})
            case SupCon():
                if labels is None:
                    raise ValueError("supcon needs labels")
                return Terms(sup_con(z, labels, temperature=objective.temperature), {})
            case Clusters():
                if labels is None:
                    raise ValueError("clusters need to be found first")
                return Terms(cluster_loss(z, labels, count=objective.count, temperature=objective.temperature), {})
            case _:
                assert_never(objective)


def total_coding_rate(z: Tensor, *, eps: float) -> Tensor:
    """R = 1/2 logdet(I + D / (B eps) Z^T Z) of each (B, D) matrix of z.

    Computed on the smaller side (Sylvester: logdet(I_D + c Z^T Z) = logdet(I_B + c Z Z^T)) through a Cholesky factor.

    Args:
        z: (..., B, D).
        eps: Distortion, > 0.

    Returns:
        (...) rates in nats, >= 0; larger where the rows spread over more directions.

    Source: Yu et al., arXiv:2006.08558, eq. 1.
    """
    rows, columns = z.shape[-2:]
    gram = z @ z.mT if rows <= columns else z.mT @ z
    gram = gram * (columns / (rows * eps))
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor = torch.linalg.cholesky_ex(gram).L  # I + PSD always factors, so that no error needs waiting for
    result: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return result


def invariance_loss(z: Tensor) -> Tensor:
    """Minus the mean cosine between each crop's embedding and the mean embedding of its image's crops.

    Args:
        z: (V, B, D).

    Returns:
        Scalar in [-1, 0].

    Source: arXiv:2304.03977, eq. 3.
    """
    return -F.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()


def emp_ssl_loss(z: Tensor, *, invariance_weight: float, tcr_weight: float, tcr_eps: float) -> Terms:
    """Invariance minus total coding rate, averaged over crops.

    The rate is maximised: the sign matters, since the opposite one rewards collapse.

    Args:
        z: Unit-norm embeddings (V, B, D).
        invariance_weight: Factor of the invariance loss.
        tcr_weight: Factor of the coding rate.
        tcr_eps: Distortion of the coding rate.
    """
    invariance = invariance_loss(z)
    rate = total_coding_rate(z, eps=tcr_eps).mean()
    loss = invariance_weight * invariance - tcr_weight * rate
    return Terms(loss, {"invariance": invariance.detach(), "coding_rate": rate.detach()})


def nt_xent(z: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of finding an image's other views among all other views of the batch.

    For V > 2 the log-probability is averaged over the V - 1 positives, as SupCon does without labels.

    Args:
        z: Unit-norm embeddings (V, B, D), V >= 2.
        temperature: > 0.

    Source: arXiv:2002.05709, eq. 1; arXiv:2004.11362, eq. 2.
    """
    images = torch.arange(z.shape[1], device=z.device)
    return sup_con(z, images, temperature=temperature)


def sup_con(z: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """SupCon's L_out: every view of every image of the same label is a positive.

    Args:
        z: Unit-norm embeddings (V, B, D), V >= 2.
        labels: (B,) integers.
        temperature: > 0.

    Source: arXiv:2004.11362, eq. 2. The original code also multiplies by temperature / 0.07; this does not.
    """
    views = z.shape[0]
    flat = z.flatten(0, 1)  # (N, D)
    itself = torch.eye(flat.shape[0], dtype=torch.bool, device=z.device)
    logits = (flat @ flat.T / temperature).masked_fill(itself, float("-inf"))
    log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(itself, 0.0)
    groups = labels.repeat(views)
    positive = (groups[:, None] == groups[None, :]) & ~itself
    return -((log_p * positive).sum(1) / positive.sum(1)).mean()


def cluster_loss(z: Tensor, clusters: Tensor, *, count: int, temperature: float) -> Tensor:
    """Cross-entropy of finding the cluster of an image from each of its crops.

    The first `count` coordinates of an embedding, over the temperature, are its logits: the classifier is fixed and
    orthonormal, and the layers before it learn to meet it.

    Args:
        z: Unit-norm embeddings (V, B, D), D >= count.
        clusters: (B,) integers in 0 .. count - 1.
        count: k.
        temperature: > 0.

    Source: Hoffer et al., arXiv:1801.04540 (a fixed classifier); the clusters are those of arXiv:1807.05520.
    """
    logits = z[..., :count].flatten(0, 1) / temperature  # (V B, k)
    return F.cross_entropy(logits, clusters.repeat(len(z)))


def effective_rank(z: Tensor) -> Tensor:
    """The exponential of the entropy of the normalised singular values of a (B, D) matrix: 1 to min(B, D).

    RankMe (arXiv:2210.02885) is the same of a layer on many images: `engine.evaluation.representation.rank_me`.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    z = z.detach().float()
    gram = z @ z.T if z.shape[0] <= z.shape[1] else z.T @ z
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-12)
    result: Tensor = torch.xlogy(-share, share).sum().exp()  # CUDA would compile torch.special.entr as it runs
    return result


def feature_std(z: Tensor) -> Tensor:
    """The mean standard deviation of a dimension over the images of (B, D), times sqrt(D).

    About 1 for unit-norm embeddings that spread in all directions, 0 after a collapse to a point.
    """
    result: Tensor = z.detach().float().std(0).mean() * z.shape[-1] ** 0.5
    return result
