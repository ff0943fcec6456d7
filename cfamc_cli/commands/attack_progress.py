"""How far an evaluation under attack is: the engine's reports and the passes it makes, as one task with an end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, assert_never

if TYPE_CHECKING:
    from torch import Tensor

    from cfamc_cli.engine import attacks as engine
    from cfamc_cli.engine.attacks.search import Predict
    from cfamc_cli.engine.attacks.verify import Predictor
    from cfamc_cli.engine.sink import Sink
    from cfamc_cli.records import MetricLine, TimingLine

_HEARTBEAT = 1.0  # seconds between two looks at the progress of a stage


class Progress:
    """Turns the engine's reports and the passes it makes into one task with an end in sight."""

    def __init__(self, sink: Sink, label: str, attack: engine.Attack, *, classes: int, block: int) -> None:
        from cfamc_cli.engine.attacks import plan, stage_name

        self._sink, self._label, self._block = sink, label, block
        stages = plan(attack, classes=classes).stages
        self._names = ["clean", *(stage_name(stage) for stage in stages)]
        self._costs = [5.0, *(_passes(stage) for stage in stages)]  # of one sample
        self._stage, self._standing, self._passes = 0, 1.0, 0
        self._block_done, self._total = 0, 0
        self._last = time.monotonic()

    def watched(self, target: Predictor) -> Predictor:
        """The same predictor, whose passes are seen here."""
        embed = None if target.embed is None else self._watch(target.embed)
        return dataclasses.replace(target, search=self._watch(target.search), embed=embed)

    def _watch(self, predict: Predict) -> Predict:
        def seen(images: Tensor) -> Tensor:
            self._passes += len(images)
            if time.monotonic() - self._last >= _HEARTBEAT and self._total:
                self._last = time.monotonic()
                size = min(self._block, self._total - self._block_done)
                share = self._passes / max(1.0, self._costs[self._stage] * self._standing * size)
                self._report(min(share, 0.99))
            return predict(images)

        return seen

    def _report(self, within: float) -> None:
        """`within`: the share of the current stage that is done."""
        size = min(self._block, self._total - self._block_done)
        done = sum(self._costs[: self._stage]) + within * self._costs[self._stage] if self._stage < len(
            self._costs
        ) else sum(self._costs)  # fmt: skip
        share = done / sum(self._costs)
        at = min(self._block_done + int(share * size), self._total - 1)
        self._sink.progress(self._label, at, self._total, {"standing in block": self._standing})

    def message(self, text: str) -> None:
        self._sink.message(text)

    def warning(self, text: str) -> None:
        self._sink.warning(text)

    def progress(self, task: str, done: int, total: int, values: Mapping[str, float]) -> None:
        self._total, self._passes = total, 0
        self._standing = values.get("standing in block", 1.0)
        self._stage = self._names.index(task) + 1
        if self._stage == len(self._names):
            self._stage, self._block_done, self._standing = 0, done, 1.0
        if done >= total:
            self._sink.progress(self._label, total, total, {})
        else:
            self._report(0.0)

    def metrics(self, line: MetricLine) -> None:
        self._sink.metrics(line)

    def timing(self, line: TimingLine) -> None:
        self._sink.timing(line)

    def positions(self) -> dict[str, int]:
        return self._sink.positions()


def _passes(stage: engine.Stage) -> float:
    """About how many passes forward a stage makes for a sample that it does not break."""
    from cfamc_cli.engine import attacks as engine

    match stage:
        case engine.Fgsm():
            return 3.0
        case engine.Pgd() | engine.Embedding():
            return float((stage.steps + 1) * stage.restarts)
        case engine.Apgd():
            return float((stage.steps + 1) * stage.restarts * stage.targets * stage.eot)
        case engine.Fab():
            return float((stage.steps + 1) * stage.targets * 2)
        case engine.Square():
            return float(stage.queries + 1)
        case _:
            assert_never(stage)
