"""Attacks on several blocks of samples side by side, whose passes through the predictor are made together.

Each attack runs in a thread of its own as if it were alone: its draws, who is still worked on and what it counts are
its own. Where it wants a pass it waits until every other attack wants one too or has ended; the caller's thread then
makes one pass over the samples of all, always in the same order. That fills a card that is too large for one block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pass = Callable[[Tensor], Tensor]  # outputs (N, ...) from images (N, C, H, W)


class _OverError(Exception):
    """Another attack, or the caller, has failed."""


@dataclass(frozen=True)
class _Graph:
    """What one joint pass keeps for the way back."""

    points: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class _Wish:
    """A pass that an attack waits for: forward through a function, or back through a graph."""

    through: Pass | _Graph
    tensor: Tensor
    graph: bool = False  # whether a way back is wanted


class Member:
    """A predictor as one of the attacks sees it.

    Attributes:
        forward: Samples that it passed forward so far.
        backward: And backward.
    """

    def __init__(self, meeting: _Meeting, number: int, predict: Pass) -> None:
        self._meeting, self._number, self._predict = meeting, number, predict
        self._graph: _Graph | None = None
        self.forward = self.backward = 0

    def __call__(self, points: Tensor) -> Tensor:
        """Outputs at the points; where a gradient is wanted they are leaves, from which `back` leads to the points."""
        self.forward += len(points)
        graph = torch.is_grad_enabled() and points.requires_grad
        outputs, self._graph = self._meeting.ask(self._number, _Wish(self._predict, points.detach(), graph))
        return outputs

    def back(self, grad: Tensor) -> Tensor:
        """The gradient with respect to the last points from that with respect to their outputs."""
        assert self._graph is not None, "outputs without a way back have no gradient"
        self.backward += len(grad)
        return self._meeting.ask(self._number, _Wish(self._graph, grad))[0]


class _Meeting:
    """Where attacks wait for each other; `wishes` are those of the ones that wait."""

    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._running = count
        self._wishes: dict[int, _Wish] = {}
        self._granted: dict[int, tuple[Tensor, _Graph | None]] = {}
        self._over = False

    def ask(self, number: int, wish: _Wish) -> tuple[Tensor, _Graph | None]:
        with self._changed:
            self._wishes[number] = wish
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._over or number in self._granted)
            if self._over:
                raise _OverError
            return self._granted.pop(number)

    def end(self) -> None:
        """One attack has ended."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody is granted anything any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def serve(self) -> None:
        """Grant wishes until all attacks have ended, or one has failed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over or len(self._wishes) == self._running)
                wishes, self._wishes = dict(sorted(self._wishes.items())), {}
            if self._over or not wishes:
                return
            granted: dict[int, tuple[Tensor, _Graph | None]] = {}
            for kind in {(id(wish.through), wish.graph): wish for wish in wishes.values()}.values():
                alike = {n: w for n, w in wishes.items() if w.through is kind.through and w.graph == kind.graph}
                granted |= zip(alike, _made(list(alike.values())), strict=True)
            with self._changed:
                self._granted |= granted
                self._changed.notify_all()


def _made(wishes: Sequence[_Wish]) -> list[tuple[Tensor, _Graph | None]]:
    """One pass for wishes of one kind, and each one's part of what came out."""
    through, sizes = wishes[0].through, [len(wish.tensor) for wish in wishes]
    whole = torch.cat([wish.tensor for wish in wishes])
    if isinstance(through, _Graph):
        (grad,) = torch.autograd.grad(through.outputs, through.points, whole)
        return [(part, None) for part in grad.split(sizes)]
    with torch.set_grad_enabled(wishes[0].graph):
        outputs = through(whole.requires_grad_(wishes[0].graph))
    graph = _Graph(whole, outputs) if outputs.requires_grad else None
    return [(part.requires_grad_(graph is not None), graph) for part in outputs.detach().split(sizes)]


def side_by_side(attacks: Sequence[Callable[[Callable[[Pass], Member]], Tensor]]) -> list[Tensor]:
    """Run attacks in threads, their passes together.

    Args:
        attacks: Each is called with what makes a predictor one of its own; passes through one predictor are joined.

    Returns:
        What each returned.

    Raises:
        Exception: The first that an attack raised.
    """
    meeting = _Meeting(len(attacks))
    results: dict[int, Tensor] = {}
    failures: list[Exception] = []

    def run(number: int, attack: Callable[[Callable[[Pass], Member]], Tensor]) -> None:
        try:
            results[number] = attack(lambda predict: Member(meeting, number, predict))
        except _OverError:
            pass
        except Exception as error:
            failures.append(error)
            meeting.close()
        finally:
            meeting.end()

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(attacks)]
    try:
        for thread in threads:
            thread.start()
        meeting.serve()
    finally:
        meeting.close()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(attacks))]
