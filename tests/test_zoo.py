"""Predictors that cheat: each must raise its flag, and an honest one none."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from stages import embedding, pgd, square
from torch import Tensor
from zoo import (
    CHEATS,
    CLASSES,
    EPS,
    GENTLE,
    HONEST,
    NET,
    SETTINGS,
    SIDE,
    WEAKLY_ATTACKED,
    Cheat,
    Honest,
    X,
    Y,
    bonus_in_a_crowd,
    detached,
    evaluated,
    failed,
    forgetful,
    gradient_at_test_time,
    images,
    not_a_number,
    paragraph,
    quantiser,
    small,
    trained,
    where,
)

from cfamc_cli.engine.attacks.plan import Plan
from cfamc_cli.engine.attacks.search import Predict, Region
from cfamc_cli.engine.evaluation import audit, blocks
from cfamc_cli.engine.evaluation.audit import AuditSettings
from cfamc_cli.engine.evaluation.honesty import in_new_process, leap
from cfamc_cli.engine.evaluation.verify import Predictor, Traces
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.errors import bad_data
from cfamc_cli.recipe.schema import Norm, Stage
from cfamc_cli.store.records import Flag


def plain(predict: Predict) -> Predictor:
    return Predictor(predict, predict, (NET,))


def test_a_reader_is_told_by_which_figures_a_cheat_was_found() -> None:
    told = paragraph(next(cheat for cheat in CHEATS if cheat.name == "shrinking"))
    assert "attacked in float32 on 80 images of the zoo" in told
    assert "The audit found answers that hardly change before an image leaves the ball (radius " in told


def test_an_honest_predictor_raises_no_flag() -> None:
    evaluation = evaluated(plain(NET), audit=SETTINGS)
    assert failed(evaluation) == set(), [c for c in evaluation.checks if c.verdict == "failed"]
    assert 0 < sum(evaluation.robust) < sum(evaluation.clean)


@pytest.mark.parametrize("cheat", CHEATS, ids=[cheat.name for cheat in CHEATS])
def test_a_cheat_raises_its_flag(cheat: Cheat) -> None:
    evaluation = evaluated(cheat.predictor(), audit=cheat.audit_settings if cheat.audit else None)
    assert cheat.flag in failed(evaluation)


def named(name: str) -> Cheat:
    return next(cheat for cheat in CHEATS if cheat.name == name)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("quantiser", {"eps-one", "eps-flat", "no-ascent"}),
        ("one_pixel", {"noise-over-pgd"}),
        ("shattered_nearby", {"fgsm-over-pgd"}),
        ("nan_off_the_grid", {"weak-attack", "surrogate"}),
        ("loud", {"adaptive-loss", "surrogate"}),
        ("another_search", {"weak-attack", "adaptive-loss"}),
        ("hardens_later", {"memory"}),
        ("quantiser", {"surrogate"}),
    ],
)
def test_other_checks_see_it_too(name: str, flags: set[str]) -> None:
    assert flags <= failed(evaluated(named(name).predictor(), audit=SETTINGS))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("probabilities", {"probabilities"}),
        ("tied", {"ratio-tied"}),
        ("shrinking", {"radius", "leap"}),
        ("normalised", {"between"}),
        ("test_set_by_heart", {"gradient"}),
    ],
)
def test_what_no_other_check_sees(name: str, flags: set[str]) -> None:
    assert failed(evaluated(named(name).predictor(), audit=SETTINGS)) == flags


@pytest.mark.parametrize(
    ("attack", "classes"),
    [
        (pgd(2 / 255, step_size=1 / 255, steps=8), CLASSES),
        (pgd(0.7, "l2", step_size=0.2, steps=8), CLASSES),
        (pgd(1e-6, step_size=1e-6, steps=4), CLASSES),
        (pgd(0.0), CLASSES),
        (square(EPS / 4, queries=100), CLASSES),
        (pgd(2 / 255, step_size=1 / 255, steps=8), 2),
        (pgd(2 / 255, step_size=1 / 255, steps=8), 100),
    ],
)
def test_an_honest_net_raises_nothing_in_any_ball(attack: Stage, classes: int) -> None:
    x, y = images(classes, max(80, 2 * classes))
    net = NET if classes == CLASSES else trained(small(classes=classes), x, y, steps=20)
    evaluation = evaluated(Predictor(net, net, (net,)), audit=SETTINGS, x=x, y=y, attack=attack)
    assert failed(evaluation) == set(), [c for c in evaluation.checks if c.verdict == "failed"]


@pytest.mark.slow
@pytest.mark.parametrize("one", HONEST, ids=str)
def test_honest_encoders_raise_nothing(one: Honest) -> None:
    predictor, x, y = one.predictor()
    evaluation = evaluated(predictor, audit=SETTINGS, x=x, y=y, attack=GENTLE)
    assert failed(evaluation) == set(), [c for c in evaluation.checks if c.verdict == "failed"]


@pytest.mark.slow
def test_an_attack_that_is_too_weak_for_an_honest_encoder_is_said_to_be() -> None:
    predictor, x, y = WEAKLY_ATTACKED.predictor()
    raised = failed(evaluated(predictor, audit=SETTINGS, x=x, y=y, attack=GENTLE))
    assert {"adaptive-loss"} <= raised <= {"adaptive-loss", "surrogate", "noise-over-pgd"}


def test_a_module_in_training_mode_is_named_and_left_so() -> None:
    NET.train()
    try:
        evaluation = evaluated(plain(NET), audit=None)
        assert all(m.training for m in NET.modules())
    finally:
        NET.eval()
    assert failed(evaluation) == {"training-mode"}
    assert evaluation.robust == evaluated(plain(NET), audit=None).robust


def test_masked_gradients_fail_the_full_audit_too() -> None:
    evaluation = evaluated(plain(quantiser), audit=AuditSettings(samples=30, queries=300))
    assert {"zero-gradient", "black-box"} <= failed(evaluation)


def test_samples_without_a_finite_prediction_are_not_robust() -> None:
    evaluation = evaluated(plain(not_a_number), audit=None)
    nan = (X[:80, 0, 0, 0] > 0.5).tolist()
    assert not any(robust and bad for robust, bad in zip(evaluation.robust, nan, strict=True))


def test_samples_that_are_right_only_in_a_crowd_are_not_robust() -> None:
    evaluation = evaluated(plain(bonus_in_a_crowd), audit=None)
    assert sum(evaluation.clean) == 80
    assert sum(evaluation.robust) <= sum(evaluated(plain(NET), audit=None).robust) < 40


def test_a_confident_head_is_seen_to_lose_along_its_gradient() -> None:
    def confident(x: Tensor) -> Tensor:
        return NET(x) * 8  # type: ignore[no-any-return]

    checks = {
        check.name: check for check in evaluated(plain(confident), audit=AuditSettings(samples=30, queries=20)).checks
    }
    z = confident(X[:80])
    margin = z.topk(2, dim=1).values
    assert ((margin[:, 0] - margin[:, 1]) > 17).float().mean() > 0.05  # where float32's cross-entropy is 0
    assert checks["no-ascent"].verdict == "passed", checks["no-ascent"]


def test_every_check_has_a_figure_and_a_verdict() -> None:
    checks = evaluated(plain(NET), audit=AuditSettings(samples=10, queries=20)).checks
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert isinstance(check.figure, float | int)
        assert check.verdict in ("passed", "failed", "skipped")
        assert check.text


# The figure of every check, on predictors of which it is known: all pixels are START, and the label wins while
# `margin` of their mean is above 0.

START, N = 0.3, 6
IMAGES, LABELS = torch.full((N, 3, SIDE, SIDE), START), torch.zeros(N, dtype=torch.int64)


def decides(margin: Callable[[Tensor], Tensor], *, scale: float = 10.0) -> Predict:
    def predict(x: Tensor) -> Tensor:
        m = margin(x.flatten(1).mean(1))
        return scale * torch.stack((m, torch.zeros_like(m), torch.full_like(m, -2.0)), 1)

    return predict


def crosses_at(place: float) -> Predict:
    return decides(lambda t: place - t)


def over_a_wall(t: Tensor) -> Tensor:
    """Small steps up end in a dip before a wall; behind it the label loses."""
    return torch.where(t < 0.34, 0.4 - t, torch.where(t < 0.38, t - 0.28, -1.0))


def audited(
    predict: Predict, *, eps: float = 0.1, steps: int = 20, attack: Stage | None = None, broken: bool = True
) -> dict[str, Flag]:
    checks = audit.full_checks(
        predict,
        IMAGES,
        LABELS,
        search=predict,
        fresh=None,
        plan=Plan((attack or pgd(eps),)),
        broken=torch.full((N,), broken),
        places=torch.arange(10, 10 + N),
        settings=AuditSettings(steps=steps, queries=150),
        seed=0,
    )
    return {check.name: check for check in checks}


FIGURES = [
    ("eps-one", decides(lambda t: 0.1 + 0 * t), {}, 1.0, 0.0),
    ("eps-flat", crosses_at(0.9), {}, 1.0, 0.1),
    ("eps-monotone", decides(lambda t: (t - 0.4).abs() - 0.05), {"steps": 1}, 4 * N, 1),
    ("fgsm-over-pgd", decides(over_a_wall), {}, N, 1),
    ("black-box", decides(lambda t: 0.35 - t.detach()), {"broken": False}, N, 1),
    ("adaptive-loss", decides(lambda t: 0.35 - t, scale=1e6), {"broken": False}, N, 1),
    ("no-ascent", decides(lambda t: 0.35 - t.detach()), {}, 1.0, 0.05),
]


@pytest.mark.parametrize(("name", "predict", "settings", "figure", "limit"), FIGURES, ids=[row[0] for row in FIGURES])
def test_the_audit_fails_what_it_looks_for(
    name: str, predict: Predict, settings: dict[str, Any], figure: float, limit: float
) -> None:
    check = audited(predict, **settings)[name]
    assert (check.figure, check.limit, check.verdict) == (figure, limit, "failed")


def test_the_audit_of_an_honest_predictor_has_these_figures() -> None:
    checks = audited(crosses_at(0.35))
    limits = {
        "eps-zero": 0,
        "eps-one": 0,
        "eps-monotone": 1,
        "eps-flat": 0.1,
        "fgsm-over-pgd": 1,
        "more-steps": 0,
        "more-restarts": 0,
        "black-box": 1,
        "transfer": 0,
        "process": 0,
        "no-ascent": 0.05,
        "gradient": 0.05,
        "radius": 1.4,
        "leap": 0.1,
        "between": 1.8,
        "noise-over-pgd": 1,
        "search": 0,
        "memory": 0,
        "weak-attack": 1,
        "adaptive-loss": 1,
        "surrogate": 1,
        "rounding": 0,
    }
    assert {name: check.limit for name, check in checks.items()} == limits
    assert checks.pop("radius").figure == pytest.approx(2 ** (1 / 32), abs=0.01)  # it is linear
    assert checks.pop("between").figure == 1  # all images are one
    assert {check.figure for check in checks.values()} == {0}
    skipped = {check.name for check in checks.values() if check.verdict != "passed"}
    assert skipped == {"memory", "process", "transfer", "rounding"}  # nothing to copy, make or make examples on; and
    # images between two values of 8 bits
    curve = "0.05: 1.000, 0.1: 0.000, 0.1255: 0.000, 0.2: 0.000, 0.4: 0.000, 0.502: 0.000, 1: 0.000"
    assert audited(crosses_at(0.36))["eps-one"].text.endswith(f"the curve is {curve}")


def test_a_step_of_the_audit_is_an_eighth_of_eps() -> None:
    def narrow_wall(t: Tensor) -> Tensor:  # a step of 0.0125 leaps over it
        return torch.where(t < 0.326, 0.4 - t, torch.where(t < 0.337, t - 0.25, -1.0))

    assert audited(decides(narrow_wall))["fgsm-over-pgd"].figure == 0
    assert audited(decides(narrow_wall), steps=25)["fgsm-over-pgd"].figure == N


def test_what_the_evaluation_broke_is_no_news_from_a_black_box() -> None:
    assert audited(decides(lambda t: 0.35 - t.detach()), broken=True)["black-box"].figure == 0


def test_images_are_named_by_their_place_in_the_order() -> None:
    check = audited(decides(over_a_wall))["fgsm-over-pgd"]
    assert check.text == "images that only FGSM broke: number 10, 11, 12, 13, 14, 15 of the order"


@pytest.mark.parametrize(("hardened", "figures"), [(range(6, 10), (N, 0)), (range(9, 99), (0, N)), ((), (0, 0))])
def test_more_steps_and_restarts_that_break_less_are_seen(hardened: Sequence[int], figures: tuple[int, int]) -> None:
    calls = 0

    def predict(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return crosses_at(2.0 if calls in hardened else 0.35)(x)

    settings = AuditSettings(steps=1)
    checks = {check.name: check for check in auditor(predict, settings=settings).strength()}
    assert (checks["more-steps"].figure, checks["more-restarts"].figure) == figures
    for name, figure in zip(("more-steps", "more-restarts"), figures, strict=True):
        assert (checks[name].verdict == "failed") == (figure > 0)


def test_an_attack_that_moves_images_without_a_radius_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def moves_two(stage: Stage, predict: Predict, x: Tensor, *_: object, **__: object) -> Tensor:
        assert stage.eps == "0"
        moved = x.clone()
        moved[1:3, 0, 0, 0] += 1e-7
        return moved

    monkeypatch.setattr(audit, "run_stage", moves_two)
    check = audited(crosses_at(0.35))["eps-zero"]
    assert (check.figure, check.limit, check.verdict) == (2, 0, "failed")


def test_what_the_audit_cannot_ask_is_skipped() -> None:
    assert audited(crosses_at(0.35), attack=square(0.1))["black-box"].verdict == "skipped"
    assert {name: check.verdict for name, check in audited(crosses_at(0.35), eps=0.0).items()} == {
        "eps-zero": "passed",
        "audit": "skipped",
        "between": "skipped",
        "process": "skipped",
    }
    nothing = audit.full_checks(
        crosses_at(0.35),
        IMAGES[:0],
        LABELS[:0],
        search=NET,
        fresh=None,
        plan=Plan((pgd(0.1),)),
        broken=torch.zeros(0, dtype=torch.bool),
        places=torch.arange(0),
        settings=AuditSettings(),
        seed=0,
    )
    assert [(check.name, check.verdict) for check in nothing] == [
        (name, "skipped") for name in ("audit", "process", "between")
    ]


def test_the_audit_looks_at_the_first_samples_that_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def noted(predict: Predict, x: Tensor, y: Tensor, **rest: Any) -> list[Flag]:
        seen.update(rest, x=x, y=y)
        return []

    monkeypatch.setattr(blocks, "full_checks", noted)
    labels = Y.clone()
    labels[:4] = (labels[:4] + 1) % CLASSES  # misclassified: there is nothing to attack again
    settings = AuditSettings(samples=30)
    evaluation = evaluated(plain(NET), audit=settings, y=labels[:80])
    assert (seen["settings"], seen["seed"]) == (settings, 0)
    assert [stage.name for stage in seen["plan"].stages] == ["pgd"]
    assert seen["places"].tolist() == list(range(4, 34))
    assert torch.equal(seen["x"], X[4:34])
    assert torch.equal(seen["y"], Y[4:34])
    assert seen["broken"].tolist() == [not standing for standing in evaluation.robust[4:34]]
    assert 0 < int(seen["broken"].sum()) < 30


# The cheap checks


def cheap(predict: Predict, x: Tensor = X[:4], y: Tensor = Y[:4]) -> dict[str, Flag]:
    return {check.name: check for check in audit.cheap_checks(predict, x, y)}


def test_half_of_the_images() -> None:
    half = torch.tensor([True, True, False, False])[:, None]
    logits = torch.tensor([[61.0, 0.5, 0.25, 0.25]])
    share = torch.tensor([[0.25, 0.25, 0.25, 0.25]])

    def blind(x: Tensor) -> Tensor:
        return torch.where(half, NET(x.detach()), NET(x))

    def mixed(x: Tensor) -> Tensor:
        out: Tensor = torch.where(half, share, logits) + 0 * NET(x)
        return out

    found = {
        "zero-gradient": cheap(blind)["zero-gradient"],
        "probabilities": cheap(mixed)["probabilities"],
        "logit-scale": cheap(mixed)["logit-scale"],
    }
    assert {name: (check.figure, check.limit, check.verdict) for name, check in found.items()} == dict.fromkeys(
        found, (0.5, 0.05, "failed")
    )
    honest_figures = {name: check.figure for name, check in cheap(NET).items()}
    assert honest_figures == dict.fromkeys(honest_figures, 0)


def test_passes_that_differ_are_measured() -> None:
    calls = 0

    def drifting(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.full((len(x), CLASSES), 8.0) + 0 * x.sum() + (0.5 if calls == 2 else 0.0)

    assert cheap(drifting)["random"].figure == 0.5 / 8


def test_logits_of_another_type_and_gradients_at_test_time() -> None:
    def wide(x: Tensor) -> Tensor:
        return NET(x).double()  # type: ignore[no-any-return]

    assert (cheap(wide)["type"].figure, cheap(wide)["type"].verdict) == (1, "failed")
    assert cheap(gradient_at_test_time)["test-time-gradient"].verdict == "failed"
    assert cheap(NET)["test-time-gradient"].figure == 0


def test_what_was_found_in_the_modules_is_told() -> None:
    checks = audit.trace_checks(Traces(training=2, not_float32=3, changed=4))
    assert [(c.name, c.figure, c.limit, c.verdict) for c in checks] == [
        ("training-mode", 2, 0, "failed"),
        ("precision", 3, 0, "failed"),
        ("trace", 4, 0, "failed"),
    ]
    assert {c.verdict for c in audit.trace_checks(Traces(training=0, not_float32=0, changed=0))} == {"passed"}


# What the audit spends, and what its figures are taken of


def auditor(
    predict: Predict,
    *,
    eps: float = 0.1,
    norm: Norm = "linf",
    x: Tensor = IMAGES,
    seed: int = 0,
    settings: AuditSettings | None = None,
    search: Predict | None = None,
    fresh: Predict | None = None,
) -> audit._Audit:
    labels = torch.zeros(len(x), dtype=torch.int64)
    places, spent = torch.arange(len(x)) + 10, settings or AuditSettings()
    return audit._Audit(predict, search or predict, fresh, None, x, labels, places, eps, norm, seed, spent)


def test_the_curve_reaches_to_the_whole_box_in_either_norm() -> None:
    whole = (3 * SIDE * SIDE) ** 0.5
    for norm, eps, radii in (
        ("linf", 0.1, [0.05, 0.1, 32 / 255, 0.2, 0.4, 128 / 255, 1]),
        ("linf", 0.6, [0.3, 0.6, 1]),
        ("linf", 0.3, [0.15, 0.3, 128 / 255, 0.6, 1]),  # four times the radius would be beyond the box
        ("l2", 0.5, [0.25, 0.5, 1.0, whole / 8, 2.0, whole / 2, whole]),
        ("l2", 10.0, [5.0, 10.0, whole]),
    ):
        checks = auditor(crosses_at(2.0), eps=eps, norm=norm, settings=AuditSettings(steps=1)).curve()  # type: ignore[arg-type]
        curve = ", ".join(f"{radius:.4g}: 1.000" for radius in sorted(radii))
        assert checks[0].text == f"accuracy at the radius of the whole box; the curve is {curve}"
        assert [check.figure for check in checks] == [1.0, 0, 1.0]
        assert checks[2].text == f"accuracy at eps = {sorted(radii)[-2]:.4g}, half of the box"
        assert checks[1].limit == max(1, round(0.02 * N * len(radii)))


def test_limits_grow_with_the_images_and_only_some_are_named() -> None:
    n = 1500
    x = torch.full((n, 3, 1, 1), START)
    settings = AuditSettings(steps=2, queries=3)
    some = auditor(decides(over_a_wall), x=x, settings=settings)
    checks = [
        *some.curve(),
        *some.strength(),
        *some.black_box(torch.zeros(n, dtype=torch.bool), blinded=False),
        *some.adaptive(torch.zeros(n, dtype=torch.bool), blinded=False),
    ]
    assert {check.name: check.limit for check in checks} == {
        "eps-one": 0,
        "eps-monotone": 210,
        "eps-flat": 0.1,
        "fgsm-over-pgd": 3,
        "more-steps": 0,
        "more-restarts": 0,
        "black-box": 3,
        "weak-attack": 150,
        "adaptive-loss": 150,
        "surrogate": 150,
    }
    rows = torch.arange(n)
    assert some.named(rows < 20) == f": number {', '.join(str(10 + i) for i in range(20))} of the order"
    assert some.named(rows < 21) == f": number {', '.join(str(10 + i) for i in range(20))}, ... of the order"
    assert some.named(rows < 0) == ""


def test_what_falls_to_a_black_box_or_another_loss_alone_is_counted() -> None:
    known = torch.tensor([True, False, False, True, False, False])
    blind = auditor(decides(lambda t: 0.35 - t.detach()), settings=AuditSettings(queries=150))
    found = {
        check.name: check for check in (*blind.black_box(known, blinded=False), *blind.adaptive(known, blinded=False))
    }
    assert (found["black-box"].figure, found["adaptive-loss"].figure) == (4, 0)
    assert found["black-box"].text == "images broken by 150 queries of Square alone: number 11, 12, 14, 15 of the order"
    loud = auditor(decides(lambda t: 0.35 - t, scale=1e6), settings=AuditSettings(queries=150))
    found = {
        check.name: check for check in (*loud.black_box(known, blinded=False), *loud.adaptive(known, blinded=False))
    }
    assert found["adaptive-loss"].figure == 4
    assert found["adaptive-loss"].text.endswith("fell to APGD-DLR: number 11, 12, 14, 15 of the order")


def test_the_attacks_of_an_audit_spend_what_it_says_from_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    addresses: list[tuple[int | str, ...]] = []

    def noted(name: str) -> Callable[..., Tensor]:
        def attack(predict: Predict, region: Region, y: Tensor, **settings: Any) -> Tensor:
            assert torch.equal(y, LABELS)
            calls.append((name, {"eps": region.eps, "norm": region.norm, **settings}))
            return region.x

        return attack

    for name in ("fgsm", "pgd", "apgd", "square"):
        monkeypatch.setattr(audit, name, noted(name))

    def addressed(*address: int | str) -> str:
        addresses.append(address)
        return "generator"

    monkeypatch.setattr(audit, "addressed_generator", addressed)
    one = auditor(crosses_at(0.9), eps=0.5, norm="l2", seed=5, settings=AuditSettings(steps=4, queries=6))
    same = {"eps": 0.5, "norm": "l2"}
    drawn = {**same, "generator": "generator"}
    shape = {"step_size": 2.5 * 0.5 / 4, "start": "zero"}

    one.strength()
    assert calls == [
        ("fgsm", same),
        ("pgd", drawn | shape | {"steps": 4, "restarts": 1}),
        ("pgd", drawn | shape | {"steps": 8, "restarts": 1}),
        ("pgd", drawn | shape | {"steps": 4, "restarts": 2}),
    ]
    calls.clear()
    one.black_box(torch.ones(N, dtype=torch.bool), blinded=False)
    one.adaptive(torch.ones(N, dtype=torch.bool), blinded=False)
    spent = {"loss": "apgd-dlr", "steps": 4, "restarts": 1, "targets": 1, "eot": 1}
    assert calls == [
        ("square", drawn | {"queries": 6}),
        ("apgd", drawn | spent),
        ("pgd", drawn | shape | {"steps": 4, "restarts": 1}),
    ]
    assert addresses == [("audit", 5, label) for label in ("pgd", "pgd", "pgd", "square", "apgd-dlr", "pgd")]
    calls.clear()
    one.ascent()
    auditor(crosses_at(0.9)).ascent()
    auditor(crosses_at(0.9), eps=1e-4).ascent()
    assert [call["eps"] for _, call in calls] == [0.005, 0.25 / 255, 1e-4]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_a_leap_is_the_part_that_arrives_within_the_ball(share: float) -> None:
    weight = torch.randn((3 * SIDE * SIDE, 3), generator=torch.Generator().manual_seed(0))
    clean = torch.full((2, 3, SIDE, SIDE), START)

    def predict(x: Tensor) -> Tensor:
        moved = x - START
        near = moved.abs().flatten(1).amax(1) <= 0.0301
        return where(near, share * moved, moved).flatten(1) @ weight + 1

    found = leap(predict, clean, eps=0.03, norm="linf", generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, torch.full((2,), 2 ** (1 / 32) / share), rtol=0.02, atol=0)


def test_a_leap_is_found_wherever_answers_wake_up_to_sixteen_times_the_radius() -> None:
    def wakes_at(radius: float) -> Tensor:
        def predict(x: Tensor) -> Tensor:
            moved = (x - START).flatten(1)
            return (1.0 + 2.0 * (moved.abs().amax(1, keepdim=True) > radius)) * moved[:, :3]

        clean = torch.full((1, 3, SIDE, SIDE), START)
        return leap(predict, clean, eps=0.01, norm="linf", generator=torch.Generator().manual_seed(1))

    assert [float(wakes_at(radius)) > 2.9 for radius in (0.0101, 0.02, 0.07, 0.15, 0.2)] == [True] * 4 + [False]


@pytest.mark.slow
def test_a_new_process_answers_as_it_was_made_to() -> None:
    answers = in_new_process(forgetful, X[:5])
    assert answers is not None
    torch.testing.assert_close(answers, NET(X[:5]))


def moved_on() -> Predict:
    raise bad_data("the encoder is another by now")


@pytest.mark.slow
@pytest.mark.parametrize("anew", [partial(os._exit, 3), moved_on])
def test_a_process_that_cannot_make_the_predictor_gives_no_answers(anew: Callable[[], Predict]) -> None:
    assert in_new_process(anew, X[:2]) is None


def test_answers_of_a_new_process_are_held_against_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand((N, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    given: list[Tensor] = []

    def elsewhere(anew: Callable[[], Predict], points: Tensor) -> Tensor | None:
        given.append(points)
        answers = anew()(points)
        third = (points - x[3]).flatten(1).abs().amax(1) <= 0.1  # the image itself and what lies in its ball
        return answers + third[:, None] * 0.1

    monkeypatch.setattr(audit, "in_new_process", elsewhere)
    one = auditor(NET, x=x, settings=AuditSettings(steps=2, anew=lambda: NET))
    check = one.process()
    assert (check.name, check.figure, check.limit, check.verdict) == ("process", 1, 0, "failed")
    assert len(given[0]) == 3 * N
    assert not torch.equal(given[0], torch.cat((one.ends, one.inside, one.x)))  # not in the order that was asked in
    assert {tuple(p.flatten().tolist()) for p in given[0]} == {
        tuple(p.flatten().tolist()) for p in torch.cat((one.ends, one.inside, one.x))
    }
    monkeypatch.setattr(audit, "in_new_process", lambda anew, points: None)
    assert one.process().verdict == "skipped"


def test_examples_of_another_network_are_one_more_attack() -> None:
    blind, open_ = decides(lambda t: 0.35 - t.detach()), crosses_at(0.35)
    known = torch.tensor([True, False, False, True, False, False])
    check = auditor(blind, settings=AuditSettings(sources={"other-run": open_})).transfer(known)
    assert (check.figure, check.limit, check.verdict) == (4, 1, "failed")
    assert check.text == "images that only fell to examples of other-run: number 11, 12, 14, 15 of the order"
    seen = auditor(open_, settings=AuditSettings(sources={"other-run": open_})).transfer(~known & known)
    assert (seen.figure, seen.verdict) == (0, "passed")  # its own attack breaks them too


def test_an_image_breaks_where_its_example_holds() -> None:
    asked: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        asked.append(x)
        return crosses_at(0.35)(x)

    points = IMAGES + torch.tensor([0.0, 0.06, 0.2, 0.04, 0.09, -0.09])[:, None, None, None]
    assert auditor(predict).breaks(0.1, points).tolist() == [False, True, False, False, True, False]
    assert torch.equal(asked[0][2], IMAGES[2])  # what is no example is not looked at
    assert torch.equal(asked[0][[0, 1, 3, 4, 5]], points[[0, 1, 3, 4, 5]])


def test_every_stage_is_asked_to_stay_with_a_radius_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[tuple[str, str, int, Any]] = []

    def noted(stage: Stage, predict: Predict, x: Tensor, y: Tensor, **rest: Any) -> Tensor:
        assert torch.equal(y, LABELS)
        assert predict(x).shape == (N, 3)
        run.append((stage.name, stage.eps, rest["eot"], rest["generator"].initial_seed()))
        return x + 1e-6 * (torch.arange(N)[:, None, None, None] < 2)

    monkeypatch.setattr(audit, "run_stage", noted)
    check = auditor(crosses_at(0.9), seed=5).identity(Plan((embedding(0.1), pgd(0.1), square(0.1)), eot=3))
    seed = addressed_generator("audit", 5, "identity").initial_seed()
    assert run == [("pgd", "0", 3, seed), ("square", "0", 3, seed)]
    assert (check.name, check.figure, check.limit) == ("eps-zero", 4, 0)


def test_a_loss_that_stays_does_not_rise() -> None:
    n = 8

    def predict(x: Tensor) -> Tensor:  # half of them have no slope
        slope = (torch.arange(n) < 4).float()
        return decides(lambda t: 0.35 - slope * (t - START))(x)

    check = auditor(predict, x=torch.full((n, 3, 2, 2), START)).ascent()
    assert (check.figure, check.limit, check.verdict) == (0.5, 0.05, "failed")


def test_a_blind_audit_is_one_of_a_plan_of_squares_alone() -> None:
    def checked(plan: Plan) -> str:
        flags = audit.full_checks(
            crosses_at(0.35),
            IMAGES,
            LABELS,
            search=NET,
            fresh=None,
            plan=plan,
            broken=torch.ones(N, dtype=torch.bool),
            places=torch.arange(N),
            settings=AuditSettings(steps=1, queries=2),
            seed=0,
        )
        return next(flag.verdict for flag in flags if flag.name == "black-box")

    assert checked(Plan((square(0.1), square(0.1)))) == "skipped"
    assert checked(Plan((square(0.1), pgd(0.1)))) == "passed"


def test_odd_logits_one_by_one() -> None:
    """Eight outputs, each odd in one way or just not."""
    z = torch.tensor(
        [
            [61.0, 1.0, -1.0, -2.0],  # just not too far apart
            [0.0, 60.5, -1.0, 0.0],
            [0.5, 0.5, 0.0, 0.0],  # probabilities
            [1.5, -0.5, 0.0, 0.0],  # they sum to 1, and are none
            [0.4, 0.4, 0.1, 0.0995],  # sum to 0.9995
            [0.4, 0.4, 0.1, 0.095],
            [torch.nan, 0.0, 0.0, 0.0],
            [torch.inf, 0.0, 0.0, 0.0],
        ]
    )

    def predict(x: Tensor) -> Tensor:
        return z + 0 * x.flatten(1).sum(1, keepdim=True)

    checks = cheap(predict, X[:8], Y[:8])
    assert checks["logit-scale"].figure == 2 / 8  # the second, and the one that is infinite
    assert checks["probabilities"].figure == 2 / 8
    assert checks["random"].figure == 0.0  # nan counts elsewhere
    assert checks["type"].figure == 0
    assert "of 8 " in checks["zero-gradient"].text + checks["probabilities"].text


def test_gradients_that_are_not_finite_are_of_no_use() -> None:
    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            grad = grad.clone()
            grad[0, 0, 0, 0], grad[1, 0, 0, 0] = torch.nan, torch.inf
            return grad

    check = cheap(lambda x: NET(Spoiled.apply(x)))["zero-gradient"]
    assert (check.figure, check.limit) == (0.5, 0.05)


def test_the_cheap_checks_look_at_64_samples_of_the_evaluation() -> None:
    check = next(c for c in evaluated(plain(detached), audit=None).checks if c.name == "zero-gradient")
    assert (check.figure, check.text) == (1.0, "share of 64 images without a usable gradient")
