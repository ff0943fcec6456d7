"""Times the linear head on cached features beside a loop that takes every image through the encoder in every epoch.

The features are synthetic, for their values do not matter. The other side is not run whole: some of its batches are
timed, and the sum over all epochs is computed from their median.

Example: python tests/benchmarks/linear_head.py --width 64
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from machine import emit, machine, peak_resident

from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.heads.frozen import fit_by_batches, new_head
from cfamc_cli.recipe.schema import Linear, Model

CPU = torch.device("cpu")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=4096, help="features of a sample")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage of the ResNet-18")
    parser.add_argument("--batches", type=int, default=3, help="timed batches through the encoder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    settings = Linear(head="linear", epochs=arguments.epochs)
    labels = torch.arange(arguments.samples) % 10
    features = torch.rand(arguments.samples, arguments.dim)
    head = new_head(arguments.dim, 10, seed=0, device=CPU)
    started, started_cpu = time.perf_counter(), time.process_time()
    fit_by_batches(head, features, labels, settings=settings, seed=0)
    cached, cached_cpu = time.perf_counter() - started, time.process_time() - started_cpu
    del features

    encoder = Encoder(Model(width=arguments.width, hidden_dim=arguments.dim)).eval().requires_grad_(False)
    encoder = encoder.to(memory_format=torch.channels_last)
    through, extraction = [], []
    head = new_head(arguments.dim, 10, seed=0, device=CPU)
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr)
    x, y = torch.rand(settings.batch_size, 3, 32, 32), labels[: settings.batch_size]
    for batch in range(arguments.batches + 1):
        started = time.perf_counter()
        with torch.no_grad():
            read = encoder.features(x)
        middle = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(head(read), y).backward()
        optimizer.step()
        if batch:  # the first one warms up
            extraction.append(middle - started)
            through.append(time.perf_counter() - started)
    batches = -(-arguments.samples // settings.batch_size)
    once = statistics.median(extraction) * batches
    every = statistics.median(through) * batches * arguments.epochs
    record = {
        "machine": machine(),
        "samples": arguments.samples,
        "dim": arguments.dim,
        "epochs": arguments.epochs,
        "width": arguments.width,
        "cached_head_seconds": cached,
        "cached_head_cpu_seconds": cached_cpu,
        "extraction_seconds_computed": once,
        "every_epoch_seconds_computed": every,
        "ratio_with_extraction": every / (once + cached),
        "timed_batches": len(through),
        "peak_resident_bytes": peak_resident(),
    }
    rows = [
        ("", "seconds"),
        ("linear head on cached features", f"{cached:.1f}"),
        ("  of them on the processor", f"{cached_cpu:.1f}"),
        ("extracting them once (computed)", f"{once:.0f}"),
        ("encoder in every epoch (computed)", f"{every:.0f}"),
        ("ratio", f"{every / (once + cached):.1f}"),
    ]
    emit(record, title=f"Linear head, {arguments.samples:,} x {arguments.dim}, {arguments.epochs} epochs", rows=rows)


if __name__ == "__main__":
    main()
