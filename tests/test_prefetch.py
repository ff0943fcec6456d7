"""In which order two streams of a card make and use batches; the streams note what they were told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cfamc_cli.engine.adversary import Groups
from cfamc_cli.engine.prefetch import Prefetch


class Streams:
    """The stream that trains and the one that makes, and what both were told in the order of the host."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.now, self.events = "train", 0

    def make(self, batch: int) -> tuple[Groups, Tensor | None]:
        self.told.append(f"{self.now}: make {batch}")
        return [torch.tensor(batch)], None


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def record_event(self) -> int:
        self.streams.events += 1
        self.streams.told.append(f"{self.name}: event {self.streams.events}")
        return self.streams.events

    def wait_event(self, event: int) -> None:
        self.streams.told.append(f"{self.name}: wait for event {event}")

    def wait_stream(self, other: Stream) -> None:
        self.streams.told.append(f"{self.name}: wait for {other.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        streams.now, before = stream.name, streams.now
        yield
        streams.now = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(streams, "make"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(streams, "train"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    return streams


def test_the_next_batch_is_made_beside_the_training_on_this_one(streams: Streams) -> None:
    prefetch = Prefetch(streams.make, torch.device("cuda", 0))
    for batch in (3, 4):  # a run that was resumed
        assert [int(crops) for crops in prefetch.take(batch)[0]] == [batch]
        streams.told.append(f"train: {batch}")
        prefetch.begin(batch + 1)
    assert streams.told == [
        "train: event 1",  # nothing was made ahead
        "make: wait for event 1",
        "make: make 3",
        "train: wait for make",
        "train: event 2",
        "train: 3",
        "make: wait for event 2",  # the training before batch 3, not that on it
        "make: make 4",
        "train: wait for make",
        "train: event 3",
        "train: 4",
        "make: wait for event 3",
        "make: make 5",
    ]
    assert int(prefetch.take(9)[0][0]) == 9, "what was made ahead was not asked for"


def test_elsewhere_a_batch_is_made_when_it_is_taken(streams: Streams) -> None:
    prefetch = Prefetch(streams.make, torch.device("cpu"))
    prefetch.begin(0)
    assert streams.told == []
    assert int(prefetch.take(0)[0][0]) == 0
    assert streams.told == ["train: make 0"]
