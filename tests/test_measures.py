"""Measures of robustness without one eps: every figure worked out again from tensors, and cut equals uncut."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from fixed_inputs import signed, uniform
from torch import Tensor, nn

from cfamc_cli.commands.measure import Broken, smallest_summary, smoothing_summary
from cfamc_cli.engine.attacks.fmn import fmn
from cfamc_cli.engine.attacks.search import Predict
from cfamc_cli.engine.ball import norms
from cfamc_cli.engine.distributed import ALONE
from cfamc_cli.engine.evaluation.measures import Values, measure, smallest, smallest_eps
from cfamc_cli.engine.evaluation.smoothing import lower_bound, smoothing
from cfamc_cli.engine.evaluation.verify import Predictor
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import CfamcError
from cfamc_cli.recipe.schema import Measure, Norm, Smallest, Smoothing
from cfamc_cli.store.measured import open_measure, read_samples
from cfamc_cli.store.records import Accuracy, MeasuredBlock, MeasureHeader
from cfamc_cli.store.runs import RunFolder

NORMS: tuple[Norm, Norm] = ("linf", "l2")
CPU = torch.device("cpu")


def linear(classes: int = 4, pixels: int = 27) -> nn.Sequential:
    """A linear classifier of 3x3 images, whose classes are about equally near at grey."""
    weight = signed(classes, pixels, key="w").float()
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).requires_grad_(False)
    net.load_state_dict({"1.weight": weight, "1.bias": signed(classes, key="b").float() / 20 - weight.sum(1) / 2})
    return net.eval()


NET = linear()
X = 0.45 + 0.1 * uniform(30, 3, 3, 3, key="x").float()  # the box is further away than any border
Y = NET(X).argmax(1)


def closed_form(x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """The distance to the nearest border: the smallest (z_y - z_j) / |w_y - w_j| in the dual norm."""
    layer = NET[1]
    assert isinstance(layer, nn.Linear)
    w, z = layer.weight.double(), NET.double()(x.double())
    NET.float()
    apart = (w[y][:, None] - w[None]).norm(p=1 if norm == "linf" else 2, dim=2)  # (N, classes)
    gap = z.gather(1, y[:, None]) - z
    return torch.where(apart > 0, gap / apart.clamp_min(1e-12), torch.inf).amin(1)


@pytest.mark.parametrize("norm", NORMS)
def test_the_smallest_perturbation_of_a_linear_model_is_the_way_to_its_nearest_border(norm: Norm) -> None:
    expected = closed_form(X, Y, norm)
    points = fmn(NET, X, Y, norm=norm, steps=20, targets=3)
    size = norms(points.double() - X.double(), norm=norm)
    assert bool((NET(points).argmax(1) != Y).all())
    assert bool((size >= expected * (1 - 1e-5)).all())
    torch.testing.assert_close(size, expected, rtol=0.002, atol=0)


def test_each_target_is_walked_to() -> None:
    """With one target only the border of the likeliest class is found, which is not always the nearest."""
    one, all_three = (
        norms(fmn(NET, X, Y, norm="linf", steps=20, targets=targets) - X, norm="linf") for targets in (1, 3)
    )
    assert int((one > 1.05 * all_three).sum()) == 3
    assert bool((all_three <= one * (1 + 1e-6)).all())


def predictor(search: Predict = NET, logits: Predict = NET) -> Predictor:
    return Predictor(logits, search, (NET,))


def measured(
    values: Values, *, n: int = 30, finished: dict[int, MeasuredBlock] | None = None, cut: int = 99
) -> tuple[list[MeasuredBlock], list[MeasuredBlock]]:
    """The blocks that were measured, and those that were committed before the process was killed."""
    kept: list[MeasuredBlock] = []

    def commit(block: MeasuredBlock, _seconds: float) -> None:
        kept.append(block)
        if len(kept) == cut:
            raise InterruptedError

    try:
        blocks, checks = measure(
            predictor(),
            X[:n],
            LABELS[:n],
            values=values,
            seed=0,
            block_size=8,
            device=CPU,
            finished=finished or {},
            commit=commit,
            label="measure",
            talk=NullTalk(),
            world=ALONE,
        )
    except InterruptedError:
        return [], kept
    assert all(check.verdict == "passed" for check in checks)
    return blocks, kept


LABELS = torch.where(torch.arange(30) % 7 == 0, (Y + 1) % 4, Y)  # some are wrong from the start
SHORT = Smallest(name="smallest", steps=10)


@pytest.mark.parametrize("norm", NORMS)
def test_every_sample_has_the_eps_that_the_evaluator_measures(norm: Norm) -> None:
    blocks, _ = measured(smallest(Smallest(name="smallest", norm=norm, steps=20), seed=0))
    clean, eps = (torch.tensor([v for b in blocks for v in b.columns[name]]) for name in ("clean", "eps"))
    right = LABELS == Y
    assert torch.equal(clean.bool(), right)
    assert bool((eps[~right] == 0).all())
    torch.testing.assert_close(eps[right].double(), closed_form(X, Y, norm)[right], rtol=0.002, atol=0)
    assert sum(block.backward for block in blocks) == 20 * 3 * int(right.sum())


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_cut_and_resumed_equals_uncut(cut: int) -> None:
    uncut, _ = measured(smallest(SHORT, seed=0))
    _, kept = measured(smallest(SHORT, seed=0), cut=cut)
    assert kept == uncut[:cut]
    again, new = measured(smallest(SHORT, seed=0), finished={block.block: block for block in kept})
    assert again == uncut
    assert new == uncut[cut:]


def test_points_that_are_no_examples_have_no_eps() -> None:
    points = fmn(NET, X, Y, norm="linf", steps=20, targets=3)
    points[0] = X[0]  # right
    points[1] = points[1].clone().fill_(1.5)  # no image
    points[2, 0, 0, 0] = torch.nan
    generator = torch.Generator()
    found = smallest_eps(predictor(), X, Y, points, norm="linf", generator=generator)
    assert found.isnan().tolist() == [True] * 3 + [False] * 27
    assert torch.equal(found[3:], norms(points[3:].double() - X[3:].double(), norm="linf"))
    wrong_shape = smallest_eps(predictor(), X, Y, points[:, :1], norm="linf", generator=generator)
    assert bool(wrong_shape.isnan().all())


def test_where_the_copy_that_is_searched_disagrees_the_predictor_is_searched_through() -> None:
    def other(x: Tensor) -> Tensor:
        z: Tensor = NET(x)
        return z - 0.01 * nn.functional.one_hot(Y[:8], 4)  # its borders are nearer than they are

    values = smallest(Smallest(name="smallest", steps=20), seed=0)(predictor(search=other), X[:8], Y[:8], 0)
    torch.testing.assert_close(values["eps"], closed_form(X, Y, "linf")[:8], rtol=0.002, atol=0)


def test_a_predictor_without_a_border_leaves_samples_without_an_example() -> None:
    def constant(x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0, 0, 0]).expand(len(x), 4) + 0 * x.sum((1, 2, 3))[:, None]

    values = smallest(SHORT, seed=0)(predictor(constant, constant), X[:3], torch.tensor([0, 0, 1]), 0)
    assert values["eps"].isnan().tolist() == [True, True, False]
    summary = smallest_summary([None, None, 0.0], norm="linf", attacks=[])
    assert summary.figures["median eps"] is None
    assert summary.figures["without an example"] == 2
    assert [flag.verdict for flag in summary.flags] == ["passed", "failed"]


def test_the_curve_its_median_and_its_area_are_those_of_the_samples() -> None:
    eps = [0.0, 0.01, 4 / 255, 0.02, 0.2, None]
    attack = Broken("pgd-001", 8 / 255, [False, False, True, False, True, True])
    summary = smallest_summary(eps, norm="linf", attacks=[attack])
    least = [0.0, 0.01, 4 / 255, 0.02, 8 / 255, 8 / 255]  # what the attack broke at less counts
    by_eps = {point.at: point.accuracy for point in summary.points}
    assert by_eps[0.0] == Accuracy.of(5, 6)
    assert by_eps[4 / 255] == Accuracy.of(3, 6)  # one is broken there, and stands before
    assert by_eps[2 / 255] == Accuracy.of(5, 6)
    assert by_eps[6 / 255] == Accuracy.of(2, 6)
    assert by_eps[8 / 255] == Accuracy.of(0, 6)
    assert summary.figures["median eps"] == pytest.approx((4 / 255 + 0.02) / 2)
    assert summary.figures["auc"] == pytest.approx(sum(least) / 6 / (32 / 255))
    assert summary.figures["broken at less by an attack of one eps"] == 2
    assert "4 (pgd-001), 5 (pgd-001)" in summary.flags[0].text
    assert summary.flags[0].verdict == "failed"
    assert smallest_summary(eps, norm="linf", attacks=[]).figures["median eps"] == pytest.approx((4 / 255 + 0.02) / 2)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("n", [1, 40, 10_000])
def test_the_lower_bound_is_the_one_sided_quantile_of_beta(n: int, alpha: float) -> None:
    from scipy.stats import beta

    for hits in {0, 1, n // 2, n - 1, n}:
        expected = beta.ppf(alpha, hits, n - hits + 1) if hits else 0.0
        assert lower_bound(hits, n, alpha=alpha) == pytest.approx(expected, rel=1e-9, abs=1e-12)


SMOOTHING = Smoothing(name="smoothing", sigma="0.02", n0=50, n=400, alpha=0.01)


def test_a_certificate_of_a_linear_model_stays_within_the_way_to_its_border() -> None:
    """With two classes the probability of the class is exactly Phi(way / sigma), so R comes near the way."""
    two = nn.Sequential(nn.Flatten(), nn.Linear(27, 2)).requires_grad_(False)
    weight = signed(2, 27, key="two").float()
    two.load_state_dict({"1.weight": weight, "1.bias": -weight.sum(1) / 2})
    gap = two(X)[:, 0] - two(X)[:, 1]
    way = gap.double().abs() / (weight[0] - weight[1]).double().norm()
    y = two(X).argmax(1)
    found = smoothing(SMOOTHING, seed=0)(Predictor(two, two, (two,)), X, y, 0)
    held = found["right"].bool() & ~found["radius"].isnan()
    assert bool((found["radius"][held] <= way[held]).all())
    sigma, p = 0.02, found["hits"] / 400
    share = 0.5 * (1 + torch.erf(way / sigma / 2**0.5))
    assert bool(((p - share).abs()[held] < 4 * (share * (1 - share) / 400).sqrt()[held] + 0.01).all())
    assert float(found["radius"][held].max()) > 0.9 * sigma  # about sigma Phi^-1(.01^(1 / 400)) at most
    assert bool((found["clean"] == 1).all())


def test_votes_and_radii_are_those_of_the_noise_of_each_sample() -> None:
    found = smoothing(SMOOTHING, seed=3)(predictor(), X[:6], LABELS[:6], 2)
    for place in range(6):
        generator = addressed_generator("smoothing", 3, 2, place)
        noise = [torch.randn((k, 3, 3, 3), generator=generator) for k in (50, 250, 150)]
        first, *others = (NET(X[place] + 0.02 * drawn).argmax(1) for drawn in noise)
        chosen = int(first.bincount(minlength=4).argmax())
        hits = sum(int((labels == chosen).sum()) for labels in others)
        assert float(found["right"][place]) == float(chosen == int(LABELS[place]))
        assert int(found["hits"][place]) == hits
        p = lower_bound(hits, 400, alpha=0.01)
        if p > 0.5:
            assert float(found["radius"][place]) == pytest.approx(0.02 * NormalDist().inv_cdf(p))
        else:
            assert math.isnan(float(found["radius"][place]))


def test_certified_accuracy_counts_who_is_right_within_the_radius_and_whoever_abstains_is_not() -> None:
    summary = smoothing_summary([1, 1, 0, 1, 1], [0.3, None, 2.0, 0.25, 0.05], table=SMOOTHING)
    assert [(point.at, point.accuracy.correct) for point in summary.points[:4]] == [
        (0, 3),
        (0.1, 2),
        (0.25, 1),
        (0.5, 0),
    ]
    assert summary.figures == {
        "mean certified radius": pytest.approx(0.6 / 5),
        "abstained": 1,
        "sigma": 0.02,
        "confidence": 0.99,
    }


def test_every_setting_of_a_measure_has_an_effect() -> None:
    made: dict[str, Callable[..., Values]] = {"smallest": smallest, "smoothing": smoothing}
    bases: list[Measure] = [SHORT, Smoothing(name="smoothing", sigma="0.02", n0=1, n=60, alpha=0.01)]
    others = {"norm": "l2", "steps": 4, "targets": 1, "sigma": "0.05", "n0": 2, "n": 70, "alpha": 0.1}
    for base in bases:
        found = made[base.name](base, seed=0)(predictor(), X, LABELS, 0)
        for key in type(base).model_fields.keys() - {"name"}:
            changed = base.model_copy(update={key: others[key]})
            other = made[base.name](changed, seed=0)(predictor(), X, LABELS, 0)
            assert any(not torch.equal(found[name].nan_to_num(-1), other[name].nan_to_num(-1)) for name in found), key


def header(n: int, key: str = "aa") -> MeasureHeader:
    return MeasureHeader(n=n, block=8, order_digest="0b", data_fingerprint="f", key=key)


def block_of(number: int, size: int = 8) -> MeasuredBlock:
    values = (*(number + place / 16 for place in range(size - 1)), None)
    return MeasuredBlock(block=number, columns={"eps": values}, forward=3, backward=2)


def test_a_measure_is_kept_block_by_block_and_found_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for number in range(2):
        with open_measure(run, "smallest", header(20), warn=pytest.fail) as ledger:
            assert ledger.folder.name == "smallest-001"
            assert sorted(ledger.blocks) == list(range(number))
            ledger.commit(block_of(number), 1.5)
    with (ledger.folder / "samples.jsonl").open("ab") as torn:
        torn.write(b'{"block":2,')
    assert read_samples(ledger.folder / "samples.jsonl") == (header(20), {k: block_of(k).sealed() for k in (0, 1)})
    assert ledger.seconds() == 3.0
    with open_measure(run, "smallest", header(20), warn=pytest.fail) as ledger:
        ledger.commit(block_of(2, size=4), 1.0)
    with open_measure(run, "smallest", header(40), warn=pytest.fail) as more:  # the last block was no whole one
        assert (more.folder.name, sorted(more.blocks)) == ("smallest-002", [0, 1])
    with open_measure(run, "smallest", header(20, key="bb"), warn=pytest.fail) as other:
        assert (other.folder.name, other.blocks) == ("smallest-003", {})


def test_a_measure_whose_last_line_is_cut_short_measures_that_block_again(tmp_path: Path) -> None:
    """The line after it begins a line of its own; times that cannot be read are told by no error."""
    run = RunFolder(tmp_path)
    with open_measure(run, "smallest", header(20), warn=pytest.fail) as ledger:
        for number in range(2):
            ledger.commit(block_of(number), 1.5)
    samples = ledger.folder / "samples.jsonl"
    whole = samples.read_bytes()
    line = len(whole.splitlines(keepends=True)[-1])
    for kept in (1, line // 2, line - 1):  # bytes of the last line; the last lacks but its newline
        samples.write_bytes(whole[: len(whole) - line + kept])
        with open_measure(run, "smallest", header(20), warn=pytest.fail) as ledger:
            assert list(ledger.blocks) == [0]
            ledger.commit(block_of(1), 2.0)
        assert samples.read_bytes() == whole
    assert ledger.seconds() == 3.5
    (ledger.folder / "timing.jsonl").write_text('{"block":0}\n')
    assert ledger.seconds() == 0.0


@pytest.mark.parametrize(
    "line",
    [
        '{"block":0,"columns":{"eps":[1.0]},"forward":1,"backward":1}',
        '{"block":0}',
        '{"columns":3}',
        json.dumps(block_of(0).sealed().model_dump()).replace("0.0625", "0.0627"),
    ],
)
def test_samples_that_contradict_themselves_are_left_alone(tmp_path: Path, line: str) -> None:
    run, heard = RunFolder(tmp_path), list[str]()
    with open_measure(run, "smallest", header(20), warn=pytest.fail) as ledger:
        path = ledger.folder / "samples.jsonl"
    with path.open("a") as samples:
        samples.write(line + "\n")
    with pytest.raises(CfamcError, match=r"samples\.jsonl"):
        read_samples(path)
    with open_measure(run, "smallest", header(20), warn=heard.append) as ledger:
        assert ledger.folder.name == "smallest-002"
    assert len(heard) == 1
