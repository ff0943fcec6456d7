from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfamc_cli.comparison.published import published
from cfamc_cli.comparison.selection import Filter, filtered, row_filter, sort_key
from cfamc_cli.comparison.statistics import Difference, Figure, mcnemar, paired, pareto_front, probability
from cfamc_cli.comparison.tables import (
    Condition,
    Entry,
    Row,
    RowFilter,
    Run,
    difference,
    exact_number,
    find_superseded,
    tabulate,
)
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.report.sheets import sheets
from cfamc_cli.store.records import Accuracy, Outcomes, StageOutcome, pack_bits

PGD = Condition(
    dataset="cifar10",
    split="test",
    fingerprint="ab" * 32,
    head="linear",
    features="pre_feature",
    space="image",
    norm="linf",
    eps="8/255",
    attack="pgd",
    settings="steps 20",
)
CLEAN = Condition(dataset="cifar10", split="test", fingerprint="ab" * 32, head="linear", features="pre_feature")


def entry(
    run: str,
    clean: float,
    robust: float | None = None,
    *,
    condition: Condition = PGD,
    seed: int = 0,
    family: str = "",
    n: int = 1000,
    recipe: dict[str, str | float | bool | None] | None = None,
    day: int = 1,
    order: str = "",
    failed: tuple[str, ...] = (),
) -> Entry:
    return Entry(
        run=Run(
            id=run,
            name=run[0],
            seed=seed,
            family=family or run,
            recipe=recipe or {},
            epochs=1.0,
            steps=10,
            view_passes=100,
            attack_view_passes=0,
            seconds=60.0 + seed,
        ),
        result="attacks/pgd-001",
        condition=condition,
        head=(),
        created=datetime(2026, 1, day, tzinfo=UTC),
        clean=Accuracy.of(round(clean * n), n),
        robust=None if robust is None else Accuracy.of(round(robust * n), n),
        order=order,
        failed=failed,
    )


def no_outcomes(_: Entry) -> Outcomes | None:
    return None


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1))
    exact = min(Fraction(1), Fraction(2 * tail, 2**total))
    assert mcnemar(gained, lost) == pytest.approx(float(exact), rel=1e-12)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_mcnemar_on_large_counts_agrees_with_whole_numbers() -> None:
    tail = sum(math.comb(2000, k) for k in range(961))
    assert mcnemar(960, 1040) == pytest.approx(float(Fraction(2 * tail, 2**2000)), rel=1e-9)
    assert mcnemar(0, 10_000) < 1e-300
    assert mcnemar(0, 0) == 1.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200), st.data())
def test_pairs_are_counted_on_the_shared_samples_only(pairs: list[tuple[bool, bool]], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(pairs)))
    first, second = (int(pack_bits([pair[i] for pair in pairs]), 16) for i in range(2))
    found = paired(first, second, n=n)
    assert found.shared == n
    assert found.gained == sum(a and not b for a, b in pairs[:n])
    assert found.lost == sum(b and not a for a, b in pairs[:n])
    assert found.value == pytest.approx(sum(a - b for a, b in pairs[:n]) / n)
    assert found.p == mcnemar(found.gained, found.lost)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(x: int, y: int) -> bool:
        return any(u >= x and v >= y and (u, v) != (x, y) for u, v in points)

    assert pareto_front(points) == [not dominated(x, y) for x, y in points]


def test_figures_are_of_one_run_or_of_several() -> None:
    low, high = Accuracy.of(30, 100).low, Accuracy.of(30, 100).high
    assert Figure.of([Accuracy.of(30, 100)]) == Figure(0.3, 100, 1, None, low, high)
    several = Figure.of([Accuracy.of(k, 100) for k in (30, 36, 48)])
    assert several.value == pytest.approx(0.38)
    assert several.std == pytest.approx(0.0084**0.5)
    assert (several.n, several.runs, several.low, several.high) == (100, 3, None, None)
    two = Figure.of([Accuracy.of(k, 100) for k in (30, 36)])
    assert two.runs == 2
    assert two.std == pytest.approx(0.0018**0.5)


def test_p_values_in_words() -> None:
    told = ["= 1", "= 0.031", "= 0.0001", "< 0.0001", "< 0.0001"]
    assert [probability(p) for p in (1.0, 0.0312, 1e-4, 9.9e-5, 0.0)] == told


@pytest.mark.parametrize(
    ("text", "number"),
    [("8/255", 8 / 255), (" 0.03 ", 0.03), ("1e-3", 0.001), ("-2", -2.0)]
    + [(text, None) for text in ("", "x", "1/0", "1e999", "inf", "nan")],
)
def test_exact_numbers(text: str, number: float | None) -> None:
    assert exact_number(text) == number


def test_conditions_say_what_they_are_and_what_keeps_them_apart() -> None:
    data = "cifar10 test images (abababab), linear head on pre_feature"
    assert CLEAN.title() == f"{data}, clean images"
    assert PGD.title() == f"{data}, pgd (steps 20), linf 8/255 in image space"
    plain = replace(PGD, settings="", eps="0")
    assert plain.title() == f"{data}, pgd, linf 0 in image space"
    assert PGD.rank() == (False, False, 8 / 255, PGD.title())
    assert plain.rank() == (False, True, 0.0, plain.title())
    assert CLEAN.rank() == (True, True, 0.0, CLEAN.title())
    assert PGD.differences(PGD) == []
    assert PGD.differences(CLEAN) == ["attacked, not clean"]
    assert CLEAN.differences(PGD) == ["clean images, not attacked"]
    long = "ab" * 32
    assert replace(PGD, settings=long, eps="").differences(replace(PGD, settings="", norm="l2")) == [
        "norm linf, not l2",
        "eps none, not 8/255",
        f"settings {long[:60]}, not none",
    ]
    assert replace(PGD, settings="").differences(replace(PGD, settings=long)) == [f"settings none, not {long[:60]}"]


def test_tables_come_in_the_order_of_what_people_ask_for_first() -> None:
    """Whole groups first, then those with more rows, the usual eps, by its size, and clean images last."""
    sizes = [replace(PGD, eps=eps) for eps in ("16/255", "2/255", "8/255")]
    entries = [entry(f"x{k}", 0.5, 0.4, condition=condition) for k, condition in enumerate([CLEAN, *sizes])]
    more = replace(PGD, norm="l2")
    entries += [entry(name, 0.5, 0.4, condition=more, n=500, order="0f") for name in "abc"]
    entries += [entry(name, 0.5, 0.4, condition=more, n=1000, order="aa") for name in "de"]
    entries += [entry(name, 0.5, 0.4, condition=more, n=200, order="0f") for name in "fg"]
    tables = tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes)
    assert [([row.label for row in table.rows], table.apart) for table in tables] == [
        (["f", "g"], ""),
        (["x3"], "norm linf, not l2"),
        (["x2"], "norm linf, not l2; eps 2/255, not 8/255"),
        (["x1"], "norm linf, not l2; eps 16/255, not 8/255"),
        (["x0"], "clean images, not attacked"),
        (["a", "b", "c"], "n 500, and no outcomes on the 200 samples that others share"),
        (["d", "e"], "n 1,000, and no outcomes on the 200 samples that others share"),
    ]
    assert all(table.notes == () for table in tables)


def kept(n: int, clean: int, *robust: int) -> Outcomes:
    """Outcomes whose sample i is right where the bit i is set, clean and after each stage."""
    masks = [pack_bits([bool(mask >> i & 1) for i in range(n)]) for mask in (clean, *robust)]
    stages = tuple(StageOutcome(name="pgd", done=n, robust=mask) for mask in masks[1:])
    return Outcomes(n=n, block=1, order_digest="0f", data_fingerprint="", done=n, clean=masks[0], stages=stages)


def test_what_is_cut_is_counted_anew_clean_and_after_the_last_stage() -> None:
    first, second = entry("a", 1.0, 0.5, n=8, order="0f"), entry("b", 0.75, 0.25, n=4, order="0f")
    third = entry("c", 0.75, 0.75, n=3, order="aa")  # few, but of another order: not what the others are cut to
    fourth = entry("d", 1.0, 1.0, n=8, order="bb")  # its first 4 are other samples
    known = {
        "a": kept(8, 0b10110111, 0b10110111, 0b00110110, 0b00110010),
        "b": kept(4, 0b0111, 0b0101, 0b0001),
        "d": kept(8, 255, 255),
    }
    shared, other, apart = tabulate(
        [first, second, third, fourth], fold=True, baseline="b", outcomes_of=lambda entry: known.get(entry.run.id)
    )
    assert [row.label for row in shared.rows] == ["a", "b"]  # as right under attack, by name
    row = shared.rows[0]
    assert (row.entries[0].clean, row.entries[0].robust) == (Accuracy.of(3, 4), Accuracy.of(1, 4))
    assert row.entries[0].whole == first
    assert row.against == {"clean": Difference(0.0, 4, 0, 0, 1.0), "robust": Difference(0.0, 4, 1, 1, 1.0)}
    assert (shared.rows[1].baseline, shared.rows[1].against) == (True, None)
    assert shared.verdict == (
        "a and b have equal robust accuracy on 4 shared samples: chance alone explains that (McNemar p = 1)"
    )
    assert apart.apart == "n 3, and no outcomes on the 4 samples that others share"
    assert other.apart == "n 8, and no outcomes on the 4 samples that others share"


def test_what_has_no_order_is_never_cut() -> None:
    def unasked(_: Entry) -> Outcomes | None:
        raise AssertionError

    tables = tabulate(
        [entry("a", 0.5, 0.5, n=8), entry("b", 0.5, 0.5, n=4)], fold=True, baseline=None, outcomes_of=unasked
    )
    assert [[row.label for row in table.rows] for table in tables] == [["b"], ["a"]]


def row_of(*entries: Entry) -> Row:
    robust = [entry.robust for entry in entries if entry.robust]
    return Row(entries, "", Figure.of([entry.clean for entry in entries]), Figure.of(robust))


def test_only_single_runs_in_one_known_order_are_paired() -> None:
    one, other = entry("a", 1.0, 0.5, n=8, order="0f"), entry("b", 1.0, 0.25, n=4, order="0f")
    known = {"a": kept(8, 0xFF, 0xFF, 0b11110000), "b": kept(4, 0xF, 0b0001)}

    def found(first: Row, second: Row, **without: None) -> Difference:
        return difference(first, second, which="robust", outcomes_of=lambda entry: (known | without).get(entry.run.id))

    assert found(row_of(one), row_of(other)) == Difference(-0.25, 4, 0, 1, 1.0)  # on the first 4
    assert found(row_of(other), row_of(one)) == Difference(0.25, 4, 1, 0, 1.0)
    assert found(row_of(one, one), row_of(other)) == Difference(0.25)
    assert found(row_of(one), row_of(other, other)) == Difference(0.25)
    assert found(row_of(one), row_of(replace(other, order="aa"))) == Difference(0.25)
    assert found(row_of(replace(one, order="")), row_of(replace(other, order=""))) == Difference(0.25)
    assert found(row_of(one), row_of(other), a=None) == Difference(0.25)
    assert found(row_of(one), row_of(other), b=None) == Difference(0.25)


def test_rows_of_one_run_are_told_apart_by_their_results() -> None:
    entries = [entry("a", 0.5, 0.3), replace(entry("a", 0.5, 0.4), result="attacks/pgd-002", head=(("epochs", 3),))]
    entries += [entry("b", 0.6, 0.3), entry("c", 0.6, 0.3)]
    (table,) = tabulate(entries, fold=False, baseline=None, outcomes_of=no_outcomes)
    assert [row.label for row in table.rows] == ["a attacks/pgd-002", "b", "c", "a attacks/pgd-001"]
    assert table.keys == ("epochs",)
    assert [row.front for row in table.rows] == [True, True, True, False]


@pytest.mark.parametrize(
    ("entries", "verdict"),
    [
        (
            [entry("a", 0.5, 0.31), entry("b", 0.5, 0.3)],
            "a leads b by 1.0 points of robust accuracy: their intervals overlap; samples could not be paired",
        ),
        (
            [entry("a", 0.9, condition=CLEAN), entry("b", 0.5, condition=CLEAN), entry("c", 0.1, condition=CLEAN)],
            "a leads b by 40.0 points of clean accuracy: their intervals are apart; samples could not be paired",
        ),
        (
            [entry("a", 0.9, 0.5), entry("b", 0.5, 0.5)],
            "a and b have equal robust accuracy: their intervals overlap; samples could not be paired",
        ),
        (
            [entry(run, 0.5, 0.3 + k / 5, family="a", seed=k) for k, run in enumerate(("a0", "z1"))]
            + [entry("b", 0.5, 0.2)],
            "a (2 seeds) leads b by 20.0 points of robust accuracy (means over seeds; std 14.1 and one run)",
        ),
        (
            [entry(f"a{k}", 0.5, 0.3 + k / 100, family="a", seed=k) for k in range(2)] + [entry("b", 0.5, 0.4)],
            "b leads a (2 seeds) by 9.5 points of robust accuracy (means over seeds; std one run and 0.7)",
        ),
        ([entry("a", 0.9, 0.5), entry("b", 0.8, 0.3, failed=("masking",))], ""),
        ([entry(name, 0.9, 0.5, failed=("masking",)) for name in "ab"], ""),
    ],
)
def test_verdicts_word_for_word(entries: list[Entry], verdict: str) -> None:
    (table,) = tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes)
    assert table.verdict == verdict
    if not verdict:
        assert not any(row.front for row in table.rows)  # one row alone leads nothing


def test_results_under_different_conditions_never_share_a_table() -> None:
    others = [
        Condition(**{**_fields(PGD), key: value})
        for key, value in [
            ("dataset", "cifar100"),
            ("fingerprint", "cd" * 32),
            ("head", "crops"),
            ("features", "backbone"),
            ("space", "crops"),
            ("norm", "l2"),
            ("eps", "4/255"),
            ("attack", "autoattack"),
            ("settings", "steps 50"),
        ]
    ]
    entries = [entry("a", 0.8, 0.3), entry("b", 0.7, 0.4)]
    entries += [entry(f"x{k}", 0.9, 0.9, condition=condition) for k, condition in enumerate([*others, CLEAN])]
    tables = tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes)
    assert [len(table.rows) for table in tables] == [2] + [1] * 10
    assert tables[0].apart == ""
    reasons = {table.condition: table.apart for table in tables[1:]}
    assert reasons[others[4]] == "space crops, not image"
    assert reasons[others[6]] == "eps 4/255, not 8/255"
    assert reasons[others[7]] == "attack autoattack, not pgd"
    assert reasons[CLEAN] == "clean images, not attacked"
    assert all(not table.verdict for table in tables[1:])


def _fields(condition: Condition) -> dict[str, str]:
    return {name: getattr(condition, name) for name in Condition.__dataclass_fields__}


def test_seeds_fold_into_mean_and_spread() -> None:
    entries = [entry(f"a{seed}", 0.7 + seed / 100, 0.3, seed=seed, family="f") for seed in range(3)]
    entries.append(entry("b", 0.6, 0.2))
    (table,) = tabulate(entries, fold=True, baseline="a1", outcomes_of=no_outcomes)
    folded, single = table.rows
    assert folded.label == "a (3 seeds)"
    assert folded.clean.value == pytest.approx(0.71)
    assert folded.clean.std == pytest.approx(0.01)
    assert (folded.clean.n, folded.clean.runs, folded.clean.low) == (1000, 3, None)
    assert folded.baseline
    assert single.clean.low is not None
    assert single.against is not None
    assert single.against["robust"].value == pytest.approx(-0.1)
    assert single.against["robust"].p is None
    assert (
        table.verdict == "a (3 seeds) leads b by 10.0 points of robust accuracy (means over seeds; std 0.0 and one run)"
    )
    (table,) = tabulate(entries, fold=False, baseline=None, outcomes_of=no_outcomes)
    assert [row.label for row in table.rows] == ["a2", "a1", "a0", "b"]


def test_one_run_counts_once() -> None:
    small, large = entry("a", 0.7, 0.3, n=100, day=2), entry("a", 0.7, 0.3, n=1000)
    again = entry("c", 0.7, 0.3, family="a", day=3)
    assert find_superseded([small, large], fold=True) == {0: "a attacks/pgd-001"}
    assert find_superseded([large, small], fold=True) == {1: "a attacks/pgd-001"}
    assert find_superseded([large, again], fold=True) == {0: "c attacks/pgd-001"}
    assert find_superseded([large, again], fold=False) == {}
    assert find_superseded([large, entry("b", 0.7, condition=CLEAN)], fold=True) == {}
    assert find_superseded([large, replace(large, result="attacks/pgd-002")], fold=True) == {0: "a attacks/pgd-002"}
    assert find_superseded([large, replace(large, head=(("epochs", 3),))], fold=True) == {}
    assert find_superseded([large, entry("a", 0.7, 0.3, seed=1)], fold=True) == {}
    assert find_superseded([large, entry("a", 0.7, 0.3, condition=CLEAN)], fold=True) == {}


def outcomes_of_seed(seed: int, n: int, right: float) -> tuple[Outcomes, Accuracy]:
    bits = [random.Random(seed * 10_000 + i).random() < right for i in range(n)]
    stage = StageOutcome(name="pgd", done=n, robust=pack_bits(bits))
    clean = pack_bits([True] * n)
    outcomes = Outcomes(n=n, block=1, order_digest="0f", data_fingerprint="", done=n, clean=clean, stages=(stage,))
    return outcomes, Accuracy.of(sum(bits), n)


def test_runs_with_different_n_are_compared_on_the_samples_they_share() -> None:
    known = {"a": outcomes_of_seed(1, 500, 0.6)[0], "b": outcomes_of_seed(2, 200, 0.4)[0]}
    first = entry("a", 1.0, 0.6, n=500, order="0f")
    second = entry("b", 1.0, 0.4, n=200, order="0f")
    (table,) = tabulate([first, second], fold=True, baseline="b", outcomes_of=lambda entry: known[entry.run.id])
    against = table.rows[0].against
    assert against is not None
    expected = [outcomes_of_seed(seed, 200, right)[1].correct for seed, right in ((1, 0.6), (2, 0.4))]
    assert against["robust"].shared == 200
    assert against["robust"].value == pytest.approx((expected[0] - expected[1]) / 200)
    assert against["clean"].value == 0
    assert "on 200 shared samples: more than chance (McNemar p < 0.0001)" in table.verdict
    row, other = table.rows
    assert difference(row, other, which="robust", outcomes_of=no_outcomes).shared is None
    assert table.notes == (
        "All rows on the first 200 samples, which they share: --where 'n>200' compares those with more.",
    )


def test_what_was_computed_differently_is_said_in_one_line() -> None:
    def computed(run: str, seed: int, **facts: str | bool | None) -> Entry:
        known = tuple((f"training.{key}", value) for key, value in facts.items())
        return replace(entry(run, 0.5 + seed / 10, family="a", seed=seed), computed=known)

    def notes(*entries: Entry) -> tuple[str, ...]:
        (table,) = tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes)
        return table.notes

    first = computed("a", 0, precision="float32", compiled=False, cuda=None, torch="2.14.1")
    other = computed("b", 1, precision="bfloat16", compiled=True, cuda="13.0", torch="2.14.1")
    assert notes(first, other) == (
        "Computed differently: training precision float32 / bfloat16; training compiled False / True.",
    )
    assert notes(first, replace(first, run=other.run)) == ()
    assert notes(first, computed("b", 1)) == (), "an older record says nothing, which is no difference"


def test_rank_fold_and_front_are_of_the_shared_samples() -> None:
    """a is the best on its 400 samples, and the worst on the first 100 of them; both of its seeds are cut."""
    late = pack_bits([i >= 100 for i in range(400)])
    stage = StageOutcome(name="pgd", done=400, robust=late)
    outcomes = Outcomes(n=400, block=1, order_digest="0f", data_fingerprint="", done=400, clean=late, stages=(stage,))
    whole = [entry(f"a{k}", 0.75, 0.75, seed=k, family="a", n=400, order="0f") for k in range(2)]
    other = [entry("b", 0.5, 0.4, n=100, order="0f"), entry("c", 0.4, 0.3, n=100, order="0f")]

    def outcomes_of(entry: Entry) -> Outcomes | None:
        return outcomes if entry in whole else None

    (table,) = tabulate([*whole, *other], fold=True, baseline=None, outcomes_of=outcomes_of)
    assert [(row.label, row.front) for row in table.rows] == [("b", True), ("c", False), ("a (2 seeds)", False)]
    folded = table.rows[2]
    assert (folded.clean.value, folded.clean.n, folded.clean.std, folded.n) == (0.0, 100, 0.0, 100)
    assert [entry.whole for entry in folded.entries] == whole
    assert table.verdict.startswith("b leads c by 10.0 points")


@pytest.mark.parametrize("order", ["0f", "aa"])
def test_what_cannot_be_cut_to_the_shared_samples_is_apart(order: str) -> None:
    """Without outcomes, or in another order."""
    entries = [entry("a", 0.9, 0.8, n=500, order=order), entry("d", 0.9, 0.8, n=500, order=order)]
    entries += [entry(name, 0.5, 0.4, n=200, order="0f") for name in "bce"]
    first, second = tabulate(entries, fold=True, baseline="b", outcomes_of=no_outcomes)
    assert {row.label for row in first.rows} == {"b", "c", "e"}
    assert first.notes == ()
    assert [row.label for row in second.rows] == ["a", "d"]
    assert second.apart == "n 500, and no outcomes on the 200 samples that others share"
    assert second.notes == ("No differences: there is no result of the baseline b among these.",)


def test_what_is_left_of_a_comparison_is_apart_from_nothing() -> None:
    entries = [entry("a", 0.9, 0.8, n=500, order="aa"), *(entry(name, 0.5, 0.4, n=200, order="0f") for name in "bc")]
    assert len(tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes)) == 2
    (table,) = tabulate(
        entries, fold=True, baseline=None, outcomes_of=no_outcomes, keep=RowFilter("n 500", lambda row: row.n == 500)
    )
    assert (table.apart, [row.label for row in table.rows]) == ("", ["a"])


def test_a_limit_says_how_many_rows_it_hides() -> None:
    entries = [entry(name, 0.5, 0.4) for name in "abc"]
    entries += [entry(name, 0.5, 0.4, condition=replace(PGD, norm=name)) for name in "defg"]
    tables = tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes)
    told = {
        limit: [(len(sheet.rows), sheet.more) for sheet in sheets(tables, with_published=False, limit=limit)]
        for limit in (0, 1, 9)
    }
    assert told == {0: [(3, 0), (4, 0)], 1: [(1, 2), (1, 3)], 9: [(3, 0), (4, 0)]}


def test_what_is_not_trusted_is_shown_but_never_wins() -> None:
    entries = [entry("a", 0.9, 0.9, failed=("masking",)), entry("b", 0.8, 0.3), entry("c", 0.7, 0.2)]
    (table,) = tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes)
    assert [row.front for row in table.rows] == [False, True, False]
    assert table.verdict.startswith("b leads c by 10.0 points")
    assert "their intervals are apart" in table.verdict


def test_only_the_keys_that_differ_are_shown() -> None:
    recipes = [{"a": 1, "b": True, "c": "x"}, {"a": 1, "b": 1, "c": "x", "d": None}]
    entries = [entry(str(k), 0.5, recipe=recipe, condition=CLEAN) for k, recipe in enumerate(recipes)]  # type: ignore[arg-type]
    (table,) = tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes)
    assert table.keys == ("b", "d")


def test_published_rows() -> None:
    of_paper = {condition: rows for condition, rows in published().items() if condition.attack == "pgd"}
    tables = {(condition.dataset, condition.eps): rows for condition, rows in of_paper.items()}
    assert [len(rows) for rows in tables.values()] == [7] * 4
    rows = {row.system: row for row in tables["cifar10", "8/255"]}
    ours = rows["CF-AMC-SSL, 16 crops, m = 3"]
    assert (ours.clean, ours.robust, ours.minutes, ours.epochs) == (75.88, 33.34, 97, 10)
    assert tables["cifar100", "4/255"][0].robust == 14.38


@pytest.mark.parametrize(
    ("dataset", "head", "count", "best", "robust", "clean"),
    [
        ("cifar10", "linear", 11, "DynACL-AIR++", 46.99, 81.80),
        ("cifar10", "robust-linear", 10, "DynACL-AIR++", 48.23, 79.56),
        ("cifar10", "finetune", 10, "DynACL-AIR++", 50.79, 82.36),
        ("cifar10", "supervised", 6, "Sehwag et al., ICLR 2022 (10 M synthetic images)", 55.54, 84.59),
        ("cifar100", "linear", 10, "ASTrA++", 21.95, None),
        ("cifar100", "robust-linear", 8, "DynACL-AIR++", 22.96, 52.09),
        ("cifar100", "finetune", 8, "DynACL-AIR", 25.97, 57.75),
        ("cifar100", "supervised", 1, "DAJAT, NeurIPS 2022", 27.67, 65.45),
    ],
)
def test_rows_of_the_boards(dataset: str, head: str, count: int, best: str, robust: float, clean: float | None) -> None:
    boards = {
        (where.dataset, where.head): (where, rows) for where, rows in published().items() if where.attack != "pgd"
    }
    where, rows = boards[dataset, head]
    assert len(boards) == 8
    assert (where.features, where.space, where.norm, where.eps) == ("backbone", "image", "linf", "8/255")
    assert (where.attack, where.settings) == ("autoattack", "version standard")
    assert (len(rows), rows[0].system, rows[0].robust, rows[0].clean) == (count, best, robust, clean)
    assert [row.robust for row in rows] == sorted((row.robust for row in rows), reverse=True)
    assert all(re.search(r"20\d\d", row.source) and "standard AutoAttack" in row.source for row in rows)
    dajat = next(row for row in boards["cifar10", "supervised"][1] if row.system.startswith("DAJAT"))
    assert (dajat.robust, dajat.clean) == (52.48, 85.71)


ENTRIES = [
    entry("a", 0.9, 0.2, recipe={"adversary.name": "free", "lr": 0.3, "init": None, "fast": True}),
    entry("b", 0.8, 0.3, recipe={"adversary.name": "pgd", "lr": 0.1, "adversary.eps": "8/255", "fast": False}),
    entry("c", 0.7, 0.4, recipe={"adversary.name": "none", "lr": 1.0, "fast": False}),
]


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ([], "abc"),
        (["adversary.name=free"], "a"),
        (["adversary.name!=free"], "bc"),
        (["lr<1", "lr>0.1"], "a"),
        (["lr=3e-1"], "a"),
        (["adversary.eps=8/255"], "b"),
        (["adversary.eps!=8/255"], ""),
        (["fast=true"], "a"),
        (["fast!=True"], "bc"),
        (["run=b"], "b"),
        (["name=zzz"], ""),
    ],
)
def test_filters(filters: list[str], left: str) -> None:
    assert "".join(entry.run.id for entry in filtered(ENTRIES, list(map(Filter.parse, filters)))) == left


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("robust", "cannot read the filter 'robust'", "write KEY=VALUE"),
        ("robus>3", "no result has a key 'robus'", "did you mean robust or "),
        ("name<b", "cannot compare 'a' with 'b'", "use = or !="),
        ("__import__('os')=1", "no result has a key", ""),
    ],
)
def test_filters_that_mean_nothing(text: str, message: str, hint: str) -> None:
    with pytest.raises(CfamcError) as caught:
        filtered(ENTRIES, [Filter.parse(text)])
    assert message in caught.value.message
    assert caught.value.hint.startswith(hint)
    assert caught.value.exit_code == ExitCode.INVALID


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("robust", "cba"),
        ("robust:asc", "abc"),
        ("clean", "abc"),
        ("lr", "bac"),
        ("lr:desc", "cab"),
        ("adversary.name", "acb"),
        ("adversary.name:desc", "bca"),
        ("adversary.eps", "bca"),
    ],
)
def test_sorting(key: str, order: str) -> None:
    (table,) = tabulate(ENTRIES, fold=True, baseline=None, outcomes_of=no_outcomes, order=sort_key(ENTRIES, key))
    found = "".join(row.run.id for row in table.rows)
    assert found == order


def test_sort_keys_that_mean_nothing() -> None:
    for text in ("nothing", "robust:up"):
        with pytest.raises(CfamcError):
            sort_key(ENTRIES, text)


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        (["robust_diff>0"], "cb"),  # the baseline stays: the others are held against it
        (["robust_diff>=-10", "clean_diff>0"], "ba"),
        (["robust_p<0.05"], "b"),  # nothing was paired
        (["robust>30"], "cb"),
        (["clean<75"], "cb"),
    ],
)
def test_filters_on_outcomes(filters: list[str], left: str) -> None:
    parsed = list(map(Filter.parse, filters))
    keep = row_filter(parsed, baseline="b")
    assert filtered(ENTRIES, parsed) == ENTRIES
    (table,) = tabulate(ENTRIES, fold=True, baseline="b", outcomes_of=no_outcomes, keep=keep)
    assert "".join(row.run.id for row in table.rows) == left
    assert bool(table.verdict) == (len(left) > 1)


def test_a_filter_on_results_takes_no_seed_out_of_a_mean() -> None:
    """Three seeds of 25, 30 and 35 % are 30 % on average, or nothing."""
    entries = [entry(f"a{seed}", 0.7, 0.25 + 0.05 * seed, seed=seed, family="a") for seed in range(3)]
    entries += [entry(f"b{seed}", 0.6, 0.20 + 0.05 * seed, seed=seed, family="b") for seed in range(3)]
    for text, expected in (("robust>=29.9", {"a": 0.30}), ("robust>=20", {"a": 0.30, "b": 0.25}), ("robust>30.1", {})):
        filters = [Filter.parse(text)]
        assert filtered(entries, filters) == entries
        tables = tabulate(
            entries, fold=True, baseline=None, outcomes_of=no_outcomes, keep=row_filter(filters, baseline=None)
        )
        rows = {row.run.name: row.figure("robust").value for table in tables for row in table.rows}
        assert rows == pytest.approx(expected)
        notes = [note for table in tables for note in table.notes]
        assert notes == [f"Only rows with {text}; of several seeds that is their mean."] * len(tables)


def test_few_samples_cut_no_others() -> None:
    """Results on 1,000, 500 and 10 samples: two are cut to 500, and one stands apart."""

    def outcomes_of(entry: Entry) -> Outcomes:
        mask = pack_bits([True] * entry.n)
        return Outcomes(
            n=entry.n,
            block=entry.n,
            order_digest=entry.order,
            data_fingerprint="f" * 64,
            done=entry.n,
            clean=mask,
            stages=(StageOutcome(name="pgd", done=entry.n, robust=mask),),
        )

    entries = [entry(name, 1.0, 1.0, n=n, order="0f") for name, n in (("a", 1000), ("b", 500), ("c", 10))]
    first, second = tabulate(entries, fold=True, baseline=None, outcomes_of=outcomes_of)
    assert [(row.label, row.n) for row in first.rows] == [("a", 500), ("b", 500)]
    assert ([row.label for row in second.rows], second.apart) == (
        ["c"],
        "n 10, too few to cut the others to, which have 500 and more",
    )


def test_the_first_table_answers_the_question() -> None:
    """Three seeds of a trusted attack come before an odd one; what is not trusted comes last."""
    odd, strong = replace(PGD, attack="fgsm"), replace(PGD, attack="autoattack", settings="")
    seeds = [entry(f"a{seed}", 0.7, 0.3, seed=seed, family="a") for seed in range(3)]
    others = [entry("a0", 0.7, 0.6, condition=odd, n=60, failed=("masking",)), entry("a0", 0.7, 0.2, condition=strong)]
    tables = tabulate([*others, *seeds], fold=True, baseline=None, outcomes_of=no_outcomes)
    assert [table.condition.attack for table in tables] == ["pgd", "autoattack", "fgsm"]
    apart = sheets(tables, with_published=False)[-1]
    assert [row[-1].split(":")[0] for row in apart.rows] == [
        "attack autoattack, not pgd; settings none, not steps 20",
        "not trusted",
    ]


@pytest.mark.parametrize(("attacked", "first"), [("ab", "pgd"), ("a", "")])
def test_a_comparison_comes_before_a_single_row_and_one_under_attack_before_a_longer_one(
    attacked: str, first: str
) -> None:
    entries = [entry(name, 0.7, 0.3) for name in attacked] + [entry(name, 0.7, condition=CLEAN) for name in "abc"]
    tables = tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes)
    assert [table.condition.attack for table in tables] == [first, "pgd" if first == "" else ""]


def test_several_radii_are_one_table() -> None:
    other = replace(PGD, eps="4/255")
    entries = [entry("a", 0.7, 0.3), entry("b", 0.6, 0.2), entry("a", 0.7, 0.5, condition=other, failed=("masking",))]
    by_eps, *_ = sheets(tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes), with_published=False)
    assert by_eps.columns == ("run", "n", "clean %", "4/255 %", "8/255 %", "note")
    cells = [(row[0], row[2].split()[0], row[3].split()[:1], row[4].split()[0], row[5]) for row in by_eps.rows]
    assert cells == [("a", "70.0", ["50.0"], "30.0", "4/255 not trusted: masking"), ("b", "60.0", [], "20.0", "")]


def test_sorting_by_differences() -> None:
    for key, expected in (("clean_diff", "abc"), ("robust_diff", "cba"), ("robust_diff:asc", "abc")):
        order = sort_key(ENTRIES, key, baseline="b")
        (table,) = tabulate(ENTRIES, fold=True, baseline="b", outcomes_of=no_outcomes, order=order)
        assert "".join(row.run.id for row in table.rows) == expected


def test_differences_need_a_baseline() -> None:
    assert row_filter([Filter.parse("lr>3")], baseline=None) is None
    for ask in (
        lambda: row_filter([Filter.parse("clean_diff>3")], baseline=None),
        lambda: sort_key(ENTRIES, "clean_diff"),
    ):
        with pytest.raises(CfamcError, match="clean_diff is a difference to a baseline") as caught:
            ask()
        assert caught.value.exit_code == ExitCode.INVALID


def test_seeds_are_sorted_by_their_mean() -> None:
    entries = [entry(f"a{seed}", 0.7, seed=seed, family="f", condition=CLEAN) for seed in (0, 9)]
    entries.append(entry("b", 0.7, seed=1, condition=CLEAN))
    (table,) = tabulate(entries, fold=True, baseline=None, outcomes_of=no_outcomes, order=sort_key(entries, "time"))
    assert [row.label for row in table.rows] == ["b", "a (2 seeds)"]
