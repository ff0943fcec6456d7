"""Objectives against transcriptions in float64, closed forms, direction, and what degenerate inputs do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixed_inputs import checksum, embeddings, uniform
from torch import Tensor

from cfamc_cli.engine.objectives import (
    effective_rank,
    emp_ssl_loss,
    feature_std,
    invariance_loss,
    nt_xent,
    objective_loss,
    sup_con,
    total_coding_rate,
)
from cfamc_cli.recipe.schema import EmpSsl, SimClr, SupCon

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())
EMP = EmpSsl(name="emp-ssl")
OBJECTIVES = [EMP, SimClr(name="simclr"), SupCon(name="supcon")]


def random_z(views: int, images: int, dim: int, *, seed: int = 0) -> Tensor:
    z = torch.randn(views, images, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(z, dim=-1)


def emp(z: Tensor) -> Tensor:
    return emp_ssl_loss(z, invariance_weight=200, tcr_weight=1, tcr_eps=0.2).loss


# Independent transcriptions: formulas with loops, nothing shared with the engine


def slow_rate(z: Tensor, eps: float) -> float:
    images, dim = z.shape
    matrix = torch.eye(dim, dtype=torch.float64)
    for row in z:
        matrix += dim / (images * eps) * torch.outer(row, row)
    return 0.5 * float(torch.linalg.eigvalsh(matrix).log().sum())


def slow_invariance(z: Tensor) -> float:
    total = 0.0
    for image in z.unbind(1):
        mean = image.mean(0)
        for crop in image:
            total += float(crop @ mean / (crop.norm() * mean.norm()))
    return -total / (z.shape[0] * z.shape[1])


def slow_contrast(z: Tensor, labels: list[int], temperature: float) -> float:
    rows = [(z[v, i], labels[i]) for v in range(z.shape[0]) for i in range(z.shape[1])]
    losses = []
    for a, (anchor, label) in enumerate(rows):
        scores = {b: float(anchor @ other / temperature) for b, (other, _) in enumerate(rows) if b != a}
        total = math.log(sum(math.exp(score) for score in scores.values()))
        same = [b for b in scores if rows[b][1] == label]
        losses.append(-sum(scores[b] - total for b in same) / len(same))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4), (2, 6, 6), (1, 1, 5)])
def test_emp_ssl_is_the_formula(shape: tuple[int, int, int]) -> None:
    z = random_z(*shape)
    rates = [slow_rate(crop, 0.2) for crop in z]
    assert total_coding_rate(z, eps=0.2).tolist() == pytest.approx(rates, rel=1e-12)
    assert float(invariance_loss(z)) == pytest.approx(slow_invariance(z), rel=1e-12)
    terms = emp_ssl_loss(z, invariance_weight=7, tcr_weight=3, tcr_eps=0.2)
    assert float(terms.loss) == pytest.approx(7 * slow_invariance(z) - 3 * sum(rates) / len(rates), rel=1e-12)
    assert float(terms.parts["invariance"]) == pytest.approx(slow_invariance(z), rel=1e-12)
    assert float(terms.parts["coding_rate"]) == pytest.approx(sum(rates) / len(rates), rel=1e-12)
    assert not any(part.requires_grad for part in terms.parts.values())


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
@pytest.mark.parametrize("views", [2, 3])
def test_contrastive_losses_are_the_formula(views: int, temperature: float) -> None:
    z = random_z(views, 5, 4)
    assert float(nt_xent(z, temperature=temperature)) == pytest.approx(
        slow_contrast(z, [0, 1, 2, 3, 4], temperature), rel=1e-12
    )
    labels = [0, 1, 0, 2, 1]
    assert float(sup_con(z, torch.tensor(labels), temperature=temperature)) == pytest.approx(
        slow_contrast(z, labels, temperature), rel=1e-12
    )


@pytest.mark.parametrize("name", GOLDEN["losses"])
def test_official_values_and_gradients(name: str) -> None:
    words, expected = name.split(), GOLDEN["losses"][name]
    views, images, dim = (int(word) for word in words[-1].split("x"))
    key = f"z {views} {images} {dim}"
    z = embeddings(views, images, dim, key=key).requires_grad_()
    match words[0]:
        case "emp-ssl":
            value = emp(z)
        case "nt-xent":
            value = nt_xent(z, temperature=float(words[1]))
        case _:
            labels = torch.tensor(expected["labels"])
            value = sup_con(z, labels, temperature=float(words[1]))
    (gradient,) = torch.autograd.grad(value, z)
    tolerance = 1e-9 if words[0] == "emp-ssl" else 1e-4
    assert value.item() == pytest.approx(expected["value"], rel=tolerance)
    assert checksum(gradient, key=key) == pytest.approx(expected["gradient_checksum"], rel=tolerance, abs=tolerance)
    assert float(gradient.norm()) == pytest.approx(expected["gradient_norm"], rel=tolerance)


# Closed forms


def test_orthonormal_rows_have_the_largest_rate() -> None:
    images, dim, eps = 4, 6, 0.2
    z = torch.eye(images, dim, dtype=torch.float64).repeat(3, 1, 1)
    expected = images / 2 * math.log(1 + dim / (images * eps))
    assert total_coding_rate(z, eps=eps).tolist() == pytest.approx([expected] * 3, rel=1e-12)
    assert (total_coding_rate(random_z(50, images, dim), eps=eps) < expected).all()
    assert float(invariance_loss(z)) == pytest.approx(-1)


def test_more_rows_than_dimensions_are_bounded_by_a_tight_frame() -> None:
    dim, eps = 3, 0.2
    z = torch.eye(dim, dtype=torch.float64).repeat(4, 1)  # 12 rows with Z^T Z = 4 I
    assert float(total_coding_rate(z, eps=eps)) == pytest.approx(dim / 2 * math.log(1 + 1 / eps), rel=1e-12)


def test_collapsed_rows_have_the_smallest_rate() -> None:
    for images, dim in ((4, 6), (6, 4)):
        z = F.normalize(torch.ones(2, images, dim, dtype=torch.float64), dim=-1)
        smallest = 0.5 * math.log(1 + dim / 0.2)
        assert total_coding_rate(z, eps=0.2).tolist() == pytest.approx([smallest] * 2, rel=1e-12)
        assert (total_coding_rate(random_z(50, images, dim), eps=0.2) > smallest).all()


def test_contrastive_losses_of_a_collapse_and_of_a_perfect_answer() -> None:
    collapsed = F.normalize(torch.ones(2, 5, 4, dtype=torch.float64), dim=-1)
    assert float(nt_xent(collapsed, temperature=0.07)) == pytest.approx(math.log(9))
    perfect = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
    expected = math.log(math.exp(1 / 0.5) + 8) - 1 / 0.5
    assert float(nt_xent(perfect, temperature=0.5)) == pytest.approx(expected, rel=1e-12)


def test_views_of_one_image_that_cancel_have_no_invariance() -> None:
    z = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    assert float(invariance_loss(z)) == pytest.approx(-math.sqrt(0.5))


# Direction


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_spreading_lowers_the_loss_and_collapse_raises_it(objective: EmpSsl | SimClr | SupCon) -> None:
    spread = torch.eye(4, 6, dtype=torch.float64).repeat(2, 1, 1)
    labels = torch.arange(4)
    losses = []
    for share in (0.0, 0.3, 0.6, 0.9):
        z = F.normalize((1 - share) * spread + share * torch.ones_like(spread), dim=-1)
        losses.append(float(objective_loss(z, labels, objective=objective).loss))
    assert losses == sorted(losses)
    assert losses[0] < losses[-1] - 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_down_the_gradient_spreads_images_and_joins_crops(objective: EmpSsl | SimClr | SupCon) -> None:
    labels = torch.arange(4)
    z = F.normalize(torch.ones(2, 4, 6, dtype=torch.float64) + 0.1 * random_z(2, 4, 6), dim=-1)
    for _ in range(200):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(objective_loss(z, labels, objective=objective).loss, z)
        z = F.normalize(z.detach() - 0.01 * F.normalize(gradient.flatten(), dim=0).view_as(z) * 5, dim=-1)
    assert effective_rank(z[0]) > 3
    assert F.cosine_similarity(z[0], z[1]).min() > 0.9


# Symmetry and gradients


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_order_of_crops_and_of_images_does_not_matter(objective: EmpSsl | SimClr | SupCon) -> None:
    z, labels = random_z(3, 5, 4), torch.tensor([0, 1, 0, 2, 1])
    loss = objective_loss(z, labels, objective=objective).loss
    crops, images = torch.tensor([2, 0, 1]), torch.tensor([4, 1, 3, 0, 2])
    torch.testing.assert_close(objective_loss(z[crops], labels, objective=objective).loss, loss)
    torch.testing.assert_close(objective_loss(z[:, images], labels[images], objective=objective).loss, loss)


def test_supcon_with_a_label_an_image_is_simclr() -> None:
    z = random_z(2, 5, 4)
    torch.testing.assert_close(sup_con(z, torch.tensor([7, 3, 9, 1, 0]), temperature=0.1), nt_xent(z, temperature=0.1))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3)])
def test_gradients_are_the_derivatives(shape: tuple[int, int, int]) -> None:
    z = random_z(*shape).requires_grad_()
    labels = torch.arange(shape[1]) % 2
    assert torch.autograd.gradcheck(lambda z: total_coding_rate(z, eps=0.2), z)
    assert torch.autograd.gradcheck(invariance_loss, z)
    assert torch.autograd.gradcheck(emp, z)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, temperature=0.3), z)
    assert torch.autograd.gradcheck(lambda z: sup_con(z, labels, temperature=0.3), z)


@pytest.mark.parametrize(("images", "dim"), [(3, 11), (11, 3), (5, 5)])
def test_both_sides_of_sylvester_agree(images: int, dim: int) -> None:
    z = random_z(1, images, dim)[0]
    scale = dim / (images * 0.2)
    wide = 0.5 * torch.logdet(torch.eye(dim, dtype=torch.float64) + scale * z.T @ z)
    narrow = 0.5 * torch.logdet(torch.eye(images, dtype=torch.float64) + scale * z @ z.T)
    torch.testing.assert_close(wide, narrow)
    torch.testing.assert_close(total_coding_rate(z, eps=0.2), wide)


def test_float32_is_close_to_float64_at_full_size() -> None:
    z = random_z(2, 100, 1024)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        moved = z.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(emp(moved), moved)[0].double())
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


# Degenerate inputs

DEGENERATE = {
    "identical crops": random_z(1, 5, 4).repeat(3, 1, 1),
    "zero vectors": torch.zeros(3, 5, 4),
    "one zero vector": torch.cat([torch.zeros(3, 1, 4), random_z(3, 4, 4)], dim=1),
    "one image": random_z(2, 1, 4),
    "two images": random_z(2, 2, 4),
    "collapsed": F.normalize(torch.ones(3, 5, 4), dim=-1),
    "collapsed, wide": F.normalize(torch.ones(3, 4, 64), dim=-1),
    "opposite crops": torch.stack([random_z(1, 5, 4)[0], -random_z(1, 5, 4)[0]]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_embeddings_have_finite_losses_and_gradients(
    name: str, objective: EmpSsl | SimClr | SupCon, dtype: torch.dtype
) -> None:
    z = DEGENERATE[name].to(dtype).requires_grad_()
    labels = torch.zeros(z.shape[1], dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = objective_loss(z, labels, objective=objective).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast_does_not_reach_into_the_loss(objective: EmpSsl | SimClr | SupCon) -> None:
    z, labels = random_z(3, 9, 16).float(), torch.arange(9) % 2
    plain = objective_loss(z, labels, objective=objective).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective_loss(z, labels, objective=objective).loss, plain)


def test_supcon_needs_labels() -> None:
    with pytest.raises(ValueError, match="labels"):
        objective_loss(random_z(2, 4, 4), None, objective=SupCon(name="supcon"))


# What a person watches


def test_effective_rank_counts_directions() -> None:
    assert float(effective_rank(torch.eye(5, 9))) == pytest.approx(5, rel=1e-4)
    assert float(effective_rank(0.01 * torch.eye(5, 9))) == pytest.approx(5, rel=1e-4)
    assert float(effective_rank(torch.eye(3).repeat(4, 1))) == pytest.approx(3, rel=1e-4)
    assert float(effective_rank(torch.ones(6, 4))) == pytest.approx(1, abs=0.05)
    assert torch.isfinite(effective_rank(torch.zeros(6, 4)))


def test_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values() -> None:
    for shape in ((6, 40), (40, 6), (9, 9)):
        z = uniform(*shape, key="rank")
        share = torch.linalg.svdvals(z) / torch.linalg.svdvals(z).sum()
        assert float(effective_rank(z)) == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-4)


def test_feature_std_tells_spread_from_collapse() -> None:
    assert float(feature_std(random_z(1, 4000, 32)[0])) == pytest.approx(1, abs=0.02)
    assert float(feature_std(torch.ones(6, 4))) == 0
