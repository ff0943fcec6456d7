"""Two programs that take turns: each runs in a process of its own and does one batch when it is told to.

A shared machine is never equally busy twice, so times are compared only between neighbouring turns. The processes
speak JSON lines: the child's `Gate` reads "go" from stdin and answers on stdout; end of input ends the child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


class Gate:
    """The child's end. Made first thing in the child: from then on whatever is printed goes to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self, **facts: object) -> None:
        self._say({"event": "ready", **facts})

    def turn(self) -> bool:
        """Wait for a turn; false when there are no more."""
        return sys.stdin.readline().strip() == "go"

    def done(self, seconds: float) -> None:
        self._say({"event": "done", "seconds": seconds})

    def end(self, **facts: object) -> None:
        self._say({"event": "end", **facts})

    def _say(self, record: dict[str, object]) -> None:
        print(json.dumps(record), file=self._answers, flush=True)


class Contestant:
    """The parent's end of one child process."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._hear("ready")

    def turn(self) -> float:
        """Let it do one batch and return the seconds it took."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._hear("done")["seconds"])

    def end(self) -> dict[str, Any]:
        """Let it finish and return its last words."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        facts = self._hear("end")
        self._process.wait()
        return facts

    def _hear(self, event: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        record: dict[str, Any] = json.loads(line) if line else {"event": "nothing"}
        if record["event"] != event:
            raise RuntimeError(f"{self.name}: expected {event!r}, got {record} (exit code {self._process.poll()})")
        return record


def alternate(contestants: Sequence[Contestant], *, warmup: int, turns: int) -> list[list[float]]:
    """Seconds of each turn of each contestant, `warmup` turns each thrown away first."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for turn in range(warmup + turns):
        for contestant, kept in zip(contestants, seconds, strict=True):
            took = contestant.turn()
            print(f"turn {turn + 1 - warmup:3d}  {contestant.name:10s} {took:8.3f} s", file=sys.stderr)
            if turn >= warmup:
                kept.append(took)
    return seconds
