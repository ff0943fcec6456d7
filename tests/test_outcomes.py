"""The ledger of an evaluation: what is committed is read back, bit for bit, by whoever goes on with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.store.outcomes import key_of, open_ledger
from cfamc_cli.store.records import Outcome, Outcomes, load_record, unpack_bits
from cfamc_cli.store.runs import OUTCOMES, RunFolder

BLOCK = 4
NAMES = ("clean", "pgd-2")


def empty(n: int, key: str = "aa") -> Outcomes:
    return Outcomes(n=n, block=BLOCK, order_digest="bb", data_fingerprint="cc", done=0, clean="", stages=(), key=key)


def outcome(block: int, stage: int, size: int = BLOCK) -> Outcome:
    """A stage of a block whose masks and costs differ from those of every other."""
    masks: list[Any] = [tuple(bool((7 * block + 3 * stage + kind + i) % 5) for i in range(size)) for kind in range(5)]
    costs: list[Any] = [100 * block + 10 * stage + 1, 100 * block + 10 * stage + 2, 0.5 + block + 0.25 * stage]
    return Outcome(block, stage, NAMES[stage], *masks, *costs)


def work(folder: Path, n: int, outcomes: Sequence[Outcome], key: str = "aa") -> tuple[Path, list[Outcome], list[str]]:
    """Open an evaluation and commit outcomes: its folder, what it began with, and what was said."""
    said: list[str] = []
    with open_ledger(RunFolder(folder), "PGD", empty(n, key), warn=said.append) as ledger:
        known = ledger.in_order()
        for one in outcomes:
            ledger.commit(one)
    return ledger.folder, known, said


def every(n: int) -> Iterator[Outcome]:
    for block, first in enumerate(range(0, n, BLOCK)):
        yield from (outcome(block, stage, min(BLOCK, n - first)) for stage in (0, 1))


def test_what_is_committed_is_read_back(tmp_path: Path) -> None:
    done = list(every(10))
    folder, known, said = work(tmp_path, 10, done[:3])
    assert (folder.name, known, said) == ("pgd-001", [], [])
    stored = load_record(folder / OUTCOMES, Outcomes)
    assert (stored.done, stored.stages[0].done) == (8, 4)
    assert not any(unpack_bits(stored.clean, 10)[8:] + unpack_bits(stored.stages[0].robust, 10)[4:])
    assert work(tmp_path, 10, done[3:]) == (folder, done[:3], [])
    assert work(tmp_path, 10, []) == (folder, done, [])


def test_outcomes_that_carry_their_digest_where_a_version_put_it_are_gone_on_with(tmp_path: Path) -> None:
    done = list(every(10))
    folder, _, _ = work(tmp_path, 10, done[:3])
    stored = load_record(folder / OUTCOMES, Outcomes).model_dump(mode="json")
    (folder / OUTCOMES).write_text(json.dumps({"sha256": "aa"} | stored))
    assert work(tmp_path, 10, done[3:]) == (folder, done[:3], [])


def test_what_the_file_holds(tmp_path: Path) -> None:
    done = list(every(10))
    folder, _, _ = work(tmp_path, 10, done)
    stored = load_record(folder / OUTCOMES, Outcomes)
    clean = [one for one in done if one.stage == 0]
    assert (stored.n, stored.block, stored.done, stored.key) == (10, BLOCK, 10, "aa")
    assert unpack_bits(stored.clean, 10) == [not bit for one in clean for bit in one.broken]
    assert stored.predictions is not None
    for part, stage in ((stored.predictions, 0), (stored.stages[0], 1)):
        own = [one for one in done if one.stage == stage]
        assert (part.name, part.done) == (NAMES[stage], 10)
        assert part.passes == tuple((one.forward, one.backward) for one in own)
        assert unpack_bits(part.robust, 10) == [bit for one in own for bit in one.standing]
        for name in ("broken", "not_finite", "unsteady", "invalid"):
            assert unpack_bits(getattr(part, name), 10) == [bit for one in own for bit in getattr(one, name)]
    lines = [json.loads(line) for line in (RunFolder(folder).timing).read_text().splitlines()]
    assert [(line["block"], line["stage"], line["seconds"]) for line in lines] == [
        (one.block, one.stage, one.seconds) for one in done
    ]


def test_samples_that_were_attacked_again_are_kept_where_there_are_some(tmp_path: Path) -> None:
    done = list(every(8))
    folder, _, _ = work(tmp_path, 8, done)
    assert load_record(folder / OUTCOMES, Outcomes).stages[0].again == ()
    searched = [replace(one, again=one.block + 2 if one.stage else 0) for one in done]
    folder, _, _ = work(tmp_path, 8, searched, key="dd")
    assert load_record(folder / OUTCOMES, Outcomes).stages[0].again == (2, 3)
    assert work(tmp_path, 8, done, key="dd") == (folder, searched, [])  # what it cost is no matter


def test_a_larger_evaluation_takes_the_whole_blocks_of_all_smaller_ones(tmp_path: Path) -> None:
    assert work(tmp_path, 6, list(every(6)))[0].name == "pgd-001"
    assert work(tmp_path, 4, [])[1] == list(every(4))  # a smaller one likewise
    first = list(every(12))
    folder, known, said = work(tmp_path, 12, first[2:5])
    assert folder.name == "pgd-003"
    assert known == first[:2]
    assert said == ["blocks of 4 samples are evaluated whole: the last 2 of pgd-001 are attacked again"]
    folder, known, said = work(tmp_path, 10, [])
    assert known == first[:4]  # of block 2, half as large here, nothing
    assert load_record(folder / OUTCOMES, Outcomes).done == 8
    assert work(tmp_path, 12, [], key="dd")[1] == []  # with other settings, nothing


def test_a_stage_that_comes_out_differently_is_refused(tmp_path: Path) -> None:
    done = list(every(8))
    folder, _, _ = work(tmp_path, 8, done)
    work(tmp_path, 8, [replace(done[1], seconds=9.0, forward=7)])  # what it cost is no matter
    assert work(tmp_path, 8, [])[1] == done
    for name in ("standing", "broken", "not_finite", "unsteady", "invalid"):
        mask = getattr(done[1], name)
        other: dict[str, Any] = {name: (not mask[0], *mask[1:])}
        with pytest.raises(CfamcError, match="pgd-2 of block 0 came out differently") as refused:
            work(tmp_path, 8, [replace(done[1], **other)])
        assert (refused.value.exit_code, refused.value.hint) == (ExitCode.BAD_DATA, f"remove {folder} to evaluate anew")


@pytest.mark.parametrize("change", ["done", "passes", "ahead"])
def test_outcomes_that_contradict_each_other_are_left_alone(tmp_path: Path, change: str) -> None:
    folder, _, _ = work(tmp_path, 8, list(every(8)))
    stored = json.loads((folder / OUTCOMES).read_text())
    del stored["sha256"]  # as of an older version
    match change:
        case "done":
            stored["stages"][0]["done"] = 7
        case "passes":
            del stored["stages"][0]["passes"][1]
        case "ahead":  # a stage of a block whose clean predictions are missing
            stored["predictions"]["done"] = 4
            del stored["predictions"]["passes"][1]
    (folder / OUTCOMES).write_text(json.dumps(stored))
    begun, known, said = work(tmp_path, 8, [])
    assert (begun.name, known) == ("pgd-002", [])
    assert len(said) == 1
    assert said[0].endswith("left alone")
    assert "pgd-2 is done with" in said[0]


def test_lost_times_lose_nothing_else(tmp_path: Path) -> None:
    folder, _, _ = work(tmp_path, 8, list(every(8)))
    (RunFolder(folder).timing).write_text('{"block": "one"}\n')
    assert work(tmp_path, 8, [])[1] == [replace(one, seconds=0.0) for one in every(8)]


def test_the_key_is_that_of_the_settings_in_any_order() -> None:
    assert key_of({"b": 1, "a": {"d": 2, "c": 3}}) == key_of({"a": {"c": 3, "d": 2}, "b": 1})
    assert key_of({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert key_of({"a": 1}) != key_of({"a": 2})
