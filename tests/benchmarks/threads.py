"""Times training batches with one and several threads that wait in several ways, on an idle machine and on a busy one.

OpenMP's threads spin for a while when they have nothing to do. Where other programs want the cores, they spin away the
time that the thread they wait for would need. Each way is a process of its own; all take turns on the quickstart's
recipe, first alone, then beside programs that never rest.
Example: python tests/benchmarks/threads.py --turns 12
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from machine import emit, machine, paired_ratio, summary, usable_cores
from step_time import serve_ours
from turns import Contestant, alternate

WAITS = {  # for how long libgomp lets an idle thread spin before it sleeps
    "spin": [],  # its default: 300,000 rounds, but 1,000 where it started more threads itself than there are cores
    "spin 10,000": ["GOMP_SPINCOUNT=10000"],
    "spin 1,000": ["GOMP_SPINCOUNT=1000"],
    "passive": ["OMP_WAIT_POLICY=passive"],
}
NEVER_RESTS = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
SETTINGS = ["train.epochs=1000", "train.evaluate_every=0"]


def contestant(threads: int, waits: str) -> Contestant:
    """A process that trains with so many threads, which wait in this way."""
    variables = ["-u", "OMP_WAIT_POLICY", "-u", "GOMP_SPINCOUNT", f"OMP_NUM_THREADS={threads}", *WAITS[waits]]
    name = f"{threads} threads, {waits}" if threads > 1 else "1 thread"
    return Contestant(name, ["env", *variables, sys.executable, str(Path(__file__)), "--serve"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--others", type=int, default=2, help="programs that never rest")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_ours("quickstart", SETTINGS)
        return

    sides = [contestant(1, "spin"), *(contestant(options.threads, waits) for waits in WAITS)]
    idle = alternate(sides, warmup=options.warmup, turns=options.turns)
    others = [subprocess.Popen([sys.executable, "-c", NEVER_RESTS]) for _ in range(options.others)]
    try:
        busy = alternate(sides, warmup=options.warmup, turns=options.turns)
    finally:
        for other in others:
            other.kill()
            other.wait()
    for side in sides:
        side.end()
    today = idle[1]
    record = {
        "machine": machine(),
        "others": options.others,
        "seconds_per_batch": {
            side.name: {
                "idle": summary(alone),
                "busy": summary(beside),
                "idle_ratio_to_default": paired_ratio(alone, today),
                "busy_ratio_to_idle": summary(beside)["median"] / summary(alone)["median"],
            }
            for side, alone, beside in zip(sides, idle, busy, strict=True)
        },
    }
    rows = [["", "idle: median s / batch", "to the default", "busy: median s / batch", "busy / idle"]]
    for side, alone, beside in zip(sides, idle, busy, strict=True):
        calm, crowded = summary(alone)["median"], summary(beside)["median"]
        ratio = paired_ratio(alone, today)
        rows.append([side.name, f"{calm:.3f}", f"{ratio:.3f}", f"{crowded:.3f}", f"{crowded / calm:.2f}"])
    emit(record, title=f"{options.turns} batches of each, in turns; busy: {options.others} other programs", rows=rows)


if __name__ == "__main__":
    main()
