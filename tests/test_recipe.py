"""The recipe's models: exact numbers, settings without effect, and the digest."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from typing import Annotated, Any

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.schema import (
    Augment,
    Finetune,
    FreeAdversary,
    Later,
    Linear,
    Outside,
    Phase,
    Recipe,
    Train,
    as_before,
    exact,
    fraction,
    length,
    number,
    outside,
)

RAW: dict[str, Any] = {
    "schema": 1,
    "name": "golden",
    "data": {"dataset": "cifar10"},
    "crops": [{"count": 4}],
    "objective": {"name": "emp-ssl"},
    "adversary": {"name": "free"},
}
GOLDEN = "2c75049e0ed5c64664efdff6c222aeb576425a2eab002cbc9a30bf2e2f1fa669"


def recipe(**tables: Any) -> Recipe:
    return Recipe.model_validate(RAW | tables)


@pytest.mark.parametrize(
    ("given", "text", "value"),
    [
        ("8/255", "8/255", Fraction(8, 255)),
        (" 8/255 ", "8/255", Fraction(8, 255)),
        ("2.5/255", "2.5/255", Fraction(5, 510)),
        ("0.0314", "0.0314", Fraction(314, 10_000)),
        (0.0314, "0.0314", Fraction(314, 10_000)),
        ("0", "0", Fraction(0)),
        (0, "0", Fraction(0)),
        ("1", "1", Fraction(1)),
        ("1e-3", "1e-3", Fraction(1, 1000)),
        (1e-5, "1e-05", Fraction(1, 100_000)),
        (".5", ".5", Fraction(1, 2)),
    ],
)
def test_exact_numbers_are_accepted(given: object, text: str, value: Fraction) -> None:
    assert exact(given) == text
    assert fraction(text) == value
    assert number(text) == float(value)


NOT_A_NUMBER = " is not a number such as 8/255 or 0.03 between 0 and 1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("8", "8 is larger than 1: did you mean 8/255?"),
        (8, "8 is larger than 1: did you mean 8/255?"),
        (8.0, "8.0 is larger than 1: did you mean 8/255?"),
        ("1.5", "1.5 is larger than 1: images live in [0, 1]"),
        ("256", "256 is larger than 1: images live in [0, 1]"),
        ("256/255", "256/255 is larger than 1: images live in [0, 1]"),
        pytest.param(10**5000, "is larger than 1: images live in [0, 1]", id="5001 digits"),
        ("8/0", "'8/0' divides by zero"),
        ("-1/255", "'-1/255'" + NOT_A_NUMBER),
        ("-0.1", "'-0.1'" + NOT_A_NUMBER),
        ("1e400", "'1e400'" + NOT_A_NUMBER),
        (float("inf"), "'inf'" + NOT_A_NUMBER),
        ("nan", "'nan'" + NOT_A_NUMBER),
        ("8//255", "'8//255'" + NOT_A_NUMBER),
        ("8/255/2", "'8/255/2'" + NOT_A_NUMBER),
        ("\u0668/255", "'\u0668/255'" + NOT_A_NUMBER),
        ("1_0/255", "'1_0/255'" + NOT_A_NUMBER),
        ("", "''" + NOT_A_NUMBER),
        ("__import__('os')", "\"__import__('os')\"" + NOT_A_NUMBER),
        ("9" * 41, "must be a short number such as 8/255 or 0.03"),
        (True, 'must be text such as "8/255" or a number such as 0.03'),
        (None, 'must be text such as "8/255" or a number such as 0.03'),
        ([8, 255], 'must be text such as "8/255" or a number such as 0.03'),
    ],
)
def test_other_numbers_are_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the text is compared whole
        exact(given)
    assert str(refused.value) == message


def test_a_length_ends_where_no_two_images_are_further_apart() -> None:
    assert [length("1e4"), length("388"), length("8/255")] == ["1e4", "388", "8/255"]
    for given in ("10001", "1e99", "40000/3"):
        with pytest.raises(ValueError, match=f"^{given} is longer than the difference of any two images$"):
            length(given)


def test_what_is_written_leaves_out_what_has_no_effect() -> None:
    clean = Finetune(head="finetune", objective="clean")
    assert not {"eps", "step_size", "steps", "trades_beta"} & clean.model_dump().keys()
    assert "trades_beta" not in Finetune(head="finetune").model_dump()
    assert "trades_beta" in Finetune(head="finetune", objective="trades").model_dump()
    converged = Linear(head="linear", protocol="converged")
    assert not {"epochs", "batch_size", "lr"} & converged.model_dump().keys()
    assert Linear.model_validate(converged.model_dump()) == converged


def test_a_default_that_has_no_effect_is_still_refused_when_given() -> None:
    with pytest.raises(ValidationError, match="epochs has no effect"):
        Linear(head="linear", protocol="converged", epochs=20)


def test_what_is_compiled_keeps_its_activations() -> None:
    assert recipe(train={"memory": "recompute"}).train.compile == "auto"
    with pytest.raises(ValidationError, match='memory cannot be "recompute" where compile is true'):
        recipe(train={"memory": "recompute", "compile": True})


def test_models_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().seed = 3  # type: ignore[misc]


def test_views_replays_and_batches() -> None:
    shown = recipe(crops=[{"count": 4}, {"count": 3, "size": 24}], train={"epochs": 2.5, "batch_size": 100})
    assert shown.views == 7
    assert shown.replays == 3
    assert recipe(adversary={"name": "pgd"}).replays == 1
    assert shown.batches(1_050) == 25  # ten whole batches an epoch
    assert recipe(train={"epochs": 0.001, "batch_size": 100}).batches(1_000) == 1


def test_digest_is_stable_and_leaves_out_seed_name_paths_checkpoints_and_logs() -> None:
    assert recipe().digest() == GOLDEN
    for other in (
        recipe(seed=7),
        recipe(name="other"),
        recipe(data={"dataset": "cifar10", "root": "/elsewhere"}),
        recipe(
            train={
                "checkpoint_every": 5,
                "checkpoint_minutes": 1.0,
                "keep": 9,
                "evaluate_every": 1,
                "log_every": 3,
                "memory": "recompute",
            }
        ),
        recipe(train={"compile": False}),  # what "auto" was in the first runs
        recipe(probe={"head": "knn"}),
        recipe(attack=[{"name": "autoattack"}]),
        recipe(adversary={"name": "free", "eps": "8/255", "replays": 3}),
    ):
        assert other.digest() == GOLDEN
    for changed in (
        recipe(adversary={"name": "free", "replays": 4}),
        recipe(crops=[{"count": 5}]),
        recipe(train={"epochs": 11.0}),
        recipe(train={"compile": True}),
        recipe(train={"average": 0.99}),
        recipe(data={"dataset": "cifar100"}),
    ):
        assert changed.digest() != GOLDEN


def test_what_is_no_part_of_the_encoder_or_of_the_run_is_marked_on_the_fields() -> None:
    bookkeeping = {
        "name",
        "data.root",
        "train.checkpoint_every",
        "train.checkpoint_minutes",
        "train.keep",
        "train.log_every",
        "train.memory",
    }
    assert set(outside(Outside.RUN)) == bookkeeping
    assert set(outside(Outside.ENCODER)) == bookkeeping | {"seed", "train.evaluate_every", "probe", "attack"}


def test_what_came_later_is_as_before_while_it_stands_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(Train):
        added: Annotated[int, Later()] = 3
        nothing: Annotated[int | None, Later()] = None

    first = recipe().resolved()
    assert first["train"]["compile"] == "auto"
    kept = {key: value for key, value in first["train"].items() if key not in ("average", "batch_norm")}
    data = {key: value for key, value in first["data"].items() if key != "holdout"}
    schedule = {"name": "cosine", "warmup": 0}  # of the two schedules the one with a later key
    model = {key: value for key, value in first["model"].items() if key not in ("normalize", "input_size")}
    then = {"data": data, "model": model, "schedule": schedule, "train": kept | {"compile": False}}
    assert as_before(first) == first | then
    monkeypatch.setitem(Recipe.model_fields, "train", FieldInfo.from_annotated_attribute(Longer, Longer()))
    longer = first | {"train": first["train"] | {"added": 3, "nothing": None}}
    assert as_before(longer) == as_before(first)
    longer["data"] = first["data"] | {"holdout": 1}
    longer["model"] = first["model"] | {"normalize": {"mean": [0.0] * 3, "std": [1.0] * 3}, "input_size": 64}
    longer["schedule"] = first["schedule"] | {"end": 0.5}
    longer["train"] |= {"added": 4, "nothing": 1, "compile": True, "average": 0.5, "batch_norm": "synchronised"}
    assert as_before(longer) == longer
    broken = {"train": "broken", "other": 1, "crops": [1], "schedule": {"name": [], "end": 0.0}, "probe": {"name": "x"}}
    assert as_before(broken) == broken  # as are tables of a name that is yet to come


def test_what_came_later_is_as_before_in_a_phase_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Milder(Augment):
        strength: Annotated[float, Later()] = 1.0

    info = FieldInfo.from_annotation(Milder | None)  # type: ignore[arg-type]
    monkeypatch.setitem(Phase.model_fields, "augment", info)
    first = recipe(phase=[{"epochs": 1.0, "augment": {"flip": 0.0}}]).resolved()
    later = recipe(phase=[{"epochs": 1.0, "augment": {"flip": 0.0}}]).resolved()
    later["phase"][0]["augment"]["strength"] = 1.0
    assert as_before(later) == as_before(first)
    later["phase"][0]["augment"]["strength"] = 0.5
    assert as_before(later)["phase"][0]["augment"] == first["phase"][0]["augment"] | {"strength": 0.5}


def test_phases_are_written_as_they_were_given_and_are_in_the_digest() -> None:
    plain, phased = recipe(), recipe(phase=[{"epochs": 0.5, "crops": [{"count": 2}]}])
    assert "phase" not in plain.resolved()
    assert phased.resolved()["phase"] == [
        {"epochs": 0.5, "crops": [{"count": 2, "size": 32, "scale": [0.08, 1.0], "ratio": [0.75, 4 / 3]}]}
    ]
    digests = {made.digest() for made in (plain, phased, recipe(phase=[{"epochs": 0.5}]))}
    assert len(digests) == 3
    assert recipe(phase=[]).digest() == plain.digest()


ONE_CROP: dict[str, Any] = {"crops": [{"count": 4}, {"count": 1}]}
WARM_UP: dict[str, Any] = {"schedule": {"name": "cosine", "warmup": 90}}


@pytest.mark.parametrize(
    ("tables", "images", "processes", "expected"),
    [
        ({}, 100, 1, []),
        ({}, 99, 1, ["train.batch_size", "100 is more than the 99 training images", "--set train.batch_size=99"]),
        ({}, 1, 1, ["train.batch_size", "100 is more than the 1 training images", "add images"]),
        ({}, 100, 8, []),
        ({}, 100, 100, []),
        (
            {},
            100,
            101,
            [
                "train.batch_size",
                "101 processes cannot share 100 images: each needs 1",
                "start at most 100 processes, or raise train.batch_size",
            ],
        ),
        (ONE_CROP, 100, 50, []),
        (ONE_CROP | {"train": {"batch_norm": "synchronised"}}, 100, 100, []),
        (
            ONE_CROP,
            100,
            51,
            [
                "train.batch_size",
                "51 processes cannot share 100 images: each needs 2",
                "start at most 50 processes, or raise train.batch_size",
            ],
        ),
        ({"phase": [{"epochs": 1.0}, {"epochs": 0.01}]}, 100, 1, []),
        (
            {"phase": [{"epochs": 1.0}, {"epochs": 1.0, "batch_size": 120}]},
            99,
            1,
            [
                *("train.batch_size", "100 is more than the 99 training images", "--set train.batch_size=99"),
                *("phase.1.batch_size", "120 is more than the 99 training images", "--set phase.1.batch_size=99"),
            ],
        ),
        (
            {"phase": [{"epochs": 1.0, "crops": [{"count": 1}, {"count": 2}]}]},
            100,
            51,
            [
                "phase.0.batch_size",
                "51 processes cannot share 100 images: each needs 2",
                "start at most 50 processes, or raise phase.0.batch_size",
            ],
        ),
        (
            {"phase": [{"epochs": 0.5, "schedule": {"name": "cosine", "warmup": 6}, "adversary": {"name": "none"}}]},
            1200,  # 6 batches
            1,
            [
                "phase.0.schedule.warmup",
                "6 updates of warm-up leave nothing of a phase of 6",
                "lower phase.0.schedule.warmup, or raise phase.0.epochs",
            ],
        ),
        (WARM_UP, 400, 1, []),  # 10 epochs of 4 batches, 3 updates each
        (
            WARM_UP,
            399,
            1,
            [
                "schedule.warmup",
                "90 updates of warm-up leave nothing of a run of 90",
                "lower schedule.warmup, or raise train.epochs",
            ],
        ),
    ],
)
def test_whether_a_recipe_fits(tables: dict[str, Any], images: int, processes: int, expected: list[str]) -> None:
    found = [part for misfit in recipe(**tables).misfits(images, processes=processes) for part in misfit]
    assert found == expected


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CfamcError, match=r"train\.batch_size: 100 is more than the 99 training images") as refused:
        recipe().require_fit(99)
    assert (refused.value.hint, refused.value.exit_code) == ("--set train.batch_size=99", ExitCode.INVALID)


def test_digest_does_not_depend_on_the_hash_seed() -> None:
    code = f"from cfamc_cli.recipe.schema import Recipe; print(Recipe.model_validate({RAW!r}).digest())"
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == GOLDEN


def test_adversaries_accept_an_eps_of_zero() -> None:
    assert FreeAdversary(name="free", eps="0", replays=1).eps == "0"
