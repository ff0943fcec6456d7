"""Times the total coding rate, forward and backward: the official loop over crops against the engine's batched form.

Both see the same embeddings, in turns. Example: python tests/benchmarks/coding_rate.py CHECKOUT
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import emit, machine, paired_ratio, summary
from official import FREE_EMP_SSL, Size, free_arguments, load_script, narrow, on_a_cpu
from torch import Tensor

from cfamc_cli.engine.objectives import total_coding_rate

EPS = 0.2


class Blank(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images that nobody looks at: the script wants a data set before it defines its functions."""

    def __init__(self, **settings: object) -> None:
        pass

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3, 32, 32), 0


def official_rate(checkout: Path, crops: int) -> Callable[[Tensor], Tensor]:
    """The official term, a function of embeddings (V * B, D) in crop-major order."""
    tiny = Size(width=4, hidden=8, embedding=8, crops=1, batch=2)
    with on_a_cpu(checkout):
        narrow(tiny)
        script = load_script(checkout, FREE_EMP_SSL, arguments=free_arguments(tiny, epochs=1), data_set=Blank)
    criterion, loop = script["criterion"], script["cal_TCR"]

    def rate(z: Tensor) -> Tensor:
        value: Tensor = -loop(z, criterion, crops)
        return value

    return rate


def timed(rate: Callable[[Tensor], Tensor], z: Tensor) -> tuple[float, float, Tensor]:
    """Seconds of one forward and backward, the value, and the gradient."""
    z = z.clone().requires_grad_(True)
    started = time.perf_counter()
    value = rate(z)
    (grad,) = torch.autograd.grad(value, z)
    return time.perf_counter() - started, value.item(), grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of the official repository")
    parser.add_argument("--crops", type=int, default=16)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    v, b, d = options.crops, options.batch, options.dimension
    z = F.normalize(torch.randn(v * b, d), dim=1)
    theirs = official_rate(options.checkout, v)

    def ours(flat: Tensor) -> Tensor:
        return total_coding_rate(flat.reshape(v, b, d), eps=EPS).mean()

    seconds: dict[str, list[float]] = {"official": [], "ours": []}
    values: dict[str, float] = {}
    grads: dict[str, Tensor] = {}
    for turn in range(options.warmup + options.turns):
        for name, rate in (("official", theirs), ("ours", ours)):
            took, values[name], grads[name] = timed(rate, z)
            if turn >= options.warmup:
                seconds[name].append(took)

    difference = ((grads["ours"] - grads["official"]).norm() / grads["official"].norm()).item()
    times_faster = 1 / paired_ratio(seconds["ours"], seconds["official"])
    record = {
        "machine": machine(),
        "settings": {"crops": v, "batch": b, "dimension": d, "eps": EPS, "dtype": "float32"},
        "official_seconds": summary(seconds["official"]),
        "ours_seconds": summary(seconds["ours"]),
        "times_faster": times_faster,
        "value": values,
        "relative_gradient_difference": difference,
    }
    rows = [["coding rate", "median ms", "value"]]
    rows += [
        [name, f"{1000 * summary(seconds[name])['median']:.1f}", f"{values[name]:.4f}"] for name in ("official", "ours")
    ]
    rows.append(["times faster", f"{times_faster:.1f}", f"gradient differs by {difference:.1e}"])
    emit(record, title=f"Total coding rate, forward + backward, V {v}, B {b}, D {d}", rows=rows)


if __name__ == "__main__":
    main()
