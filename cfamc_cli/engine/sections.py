"""Where the time of a training step goes: the loop names its sections, and a clock may listen.

Without a clock a section costs about a microsecond. Sections nest: the time of an inner one is not the outer one's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

Section = Literal[
    # of every batch
    "crops",
    "forward",
    "objective",
    "backward",
    "adversary",
    "optimizer",
    "records",
    # now and then
    "monitor",
    "evaluation",
    "clusters",
    "checkpoint",
]
_listening: Clock | None = None


@contextmanager
def section(name: Section) -> Iterator[None]:
    """Time within, or in a function that this decorates, belongs to the section `name`."""
    if _listening is None:
        yield
        return
    with _listening.span(name):
        yield


@dataclass
class Lap:
    """The sections of one batch, in seconds; a section that had no turn is missing."""

    seconds: float  # the whole batch: on CUDA as the device saw it, elsewhere as the host did
    host: dict[Section, float]  # time in which the host was busy or waited
    device: dict[Section, float] | None  # time on the device; None where it cannot be told from the host's


@dataclass
class _Span:
    name: Section
    outer: _Span | None
    began: float
    begin: torch.cuda.Event | None
    seconds: float = 0.0
    end: torch.cuda.Event | None = None


@dataclass
class _Open:
    """A batch whose events are not read yet."""

    began: float
    begin: torch.cuda.Event | None
    spans: list[_Span] = field(default_factory=list)


class Clock:
    """Takes the time of sections, batch by batch, and never makes the device wait: CUDA's events are read at the end.

    Within `with clock:` it is the one that listens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._innermost: _Span | None = None
        self._batches = [_Open(time.perf_counter(), self._event())]

    def __enter__(self) -> Clock:
        global _listening
        _listening = self
        return self

    def __exit__(self, *_: object) -> None:
        global _listening
        _listening = None

    @contextmanager
    def span(self, name: Section) -> Iterator[None]:
        """Time within is a section's."""
        span = _Span(name, self._innermost, time.perf_counter(), self._event())
        self._innermost = span
        self._batches[-1].spans.append(span)
        try:
            yield
        finally:
            self._innermost = span.outer
            span.seconds, span.end = time.perf_counter() - span.began, self._event()

    def lap(self) -> float:
        """A batch ends here and the next begins; the host's seconds of the one that ended."""
        now = time.perf_counter()
        self._batches.append(_Open(now, self._event()))
        return now - self._batches[-2].began

    def laps(self) -> list[Lap]:
        """The batches that ended, in order; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        pairs = zip(self._batches, self._batches[1:], strict=False)
        return [self._read(batch, after) for batch, after in pairs]

    def _read(self, batch: _Open, after: _Open) -> Lap:
        host: dict[Section, float] = {}
        device: dict[Section, float] = {}
        for span in batch.spans:
            _add(host, span, span.seconds)
            if span.begin is not None and span.end is not None:
                _add(device, span, span.begin.elapsed_time(span.end) / 1000)
        if batch.begin is None or after.begin is None:
            return Lap(after.began - batch.began, host, None)
        return Lap(batch.begin.elapsed_time(after.begin) / 1000, host, device)

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _add(times: dict[Section, float], span: _Span, seconds: float) -> None:
    """Give a span its time, and take it from the span around it."""
    times[span.name] = times.get(span.name, 0.0) + seconds
    if span.outer is not None:
        times[span.outer.name] = times.get(span.outer.name, 0.0) - seconds
