"""Times training batches of the engine in turns: a recipe as it is, and with some of its keys set otherwise.

Example: python tests/benchmarks/settings_time.py ~/.cache/cifar10-jpeg --set train.deterministic=true
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from machine import emit, machine, paired_ratio, summary
from official import SIZES
from step_time import own_command
from turns import Contestant, alternate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="image folder with train/<class>/")
    parser.add_argument("--set", action="append", required=True, help="a key of the recipe; repeatable")
    parser.add_argument("--size", choices=sorted(SIZES), default="laptop")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()

    common = [".", str(options.folder), "--size", options.size, "--threads", str(options.threads)]
    sides = [Contestant("as it is", own_command(common, [])), Contestant("set", own_command(common, options.set))]
    plain, changed = alternate(sides, warmup=options.warmup, turns=options.turns)
    memory = {side.name: int(facts["peak"]) - int(facts["after_imports"]) for side in sides for facts in [side.end()]}
    ratio = paired_ratio(changed, plain)
    record = {
        "machine": machine(),
        "size": {"name": options.size, **vars(SIZES[options.size])},
        "set": options.set,
        "seconds_per_batch": {"as it is": summary(plain), "set": summary(changed)},
        "time_ratio": ratio,
        "peak_bytes_above_imports": memory,
    }
    rows = [["", "median s / batch", "peak MiB above imports"]]
    rows += [
        [name, f"{summary(values)['median']:.3f}", f"{memory[name] / 2**20:.0f}"]
        for name, values in (("as it is", plain), ("set", changed))
    ]
    rows.append(["set / as it is", f"{ratio:.3f}", f"{memory['set'] / memory['as it is']:.3f}"])
    emit(record, title=f"{', '.join(options.set)}: {options.turns} batches of each, in turns", rows=rows)


if __name__ == "__main__":
    main()
