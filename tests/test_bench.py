"""`cfamc bench`: where the time of a step goes, what a run will take, and which settings pay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_recipe

from cfamc_cli.engine import sections
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sections import Clock, section
from cfamc_cli.engine.sink import NullLedger, NullTalk

CPU = torch.device("cpu")


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time goes on by one second whenever it is asked for."""
    seconds: Iterator[float] = iter(map(float, range(100_000)))
    monkeypatch.setattr(sections.time, "perf_counter", lambda: next(seconds))


@pytest.mark.usefixtures("ticks")
def test_the_time_of_a_section_is_its_own_without_those_within() -> None:
    with Clock(CPU) as clock:  # 0
        with section("adversary"):  # 1 to 6
            with section("forward"):  # 2 to 3
                pass
            with section("forward"):  # 4 to 5
                pass
        assert clock.lap() == 7
        assert clock.lap() == 1
    with section("crops"):  # nobody listens
        pass
    first, second = clock.laps()
    assert (first.seconds, first.host, first.device) == (7, {"adversary": 3, "forward": 2}, None)
    assert (second.seconds, second.host) == (1, {})


@pytest.mark.parametrize(
    ("adversary", "changes"),
    [
        ("none", {"crops": 1, "forward": 1, "objective": 1, "backward": 1, "optimizer": 3, "records": 2}),
        ("free", {"crops": 1, "forward": 3, "objective": 3, "backward": 3, "optimizer": 9, "records": 4}),
        ("pgd", {"crops": 1, "forward": 3, "objective": 3, "backward": 3, "optimizer": 3, "records": 2}),
    ],
)
def test_the_loop_names_its_sections(
    adversary: str,
    changes: dict[str, int],
    tiny_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How often each is entered in a batch: PGD-2 passes forward and back twice more, free training has 3 replays."""
    entered: dict[str, int] = {}
    span = Clock.span

    def counted(clock: Clock, name: sections.Section) -> object:
        entered[name] = entered.get(name, 0) + 1
        return span(clock, name)

    monkeypatch.setattr(Clock, "span", counted)
    recipe = tiny_recipe("emp-ssl", adversary, train={"epochs": 0.125})
    trainer = Trainer(recipe, tiny_images, device=CPU, world=World(), talk=NullTalk(), ledger=NullLedger())
    with Clock(CPU):
        trainer.train(tmp_path, stop=lambda: 0)
    moved = {"none": {}, "free": {"adversary": 8}, "pgd": {"adversary": 2}}[adversary]
    assert entered == {**changes, **moved, "checkpoint": 1}
