"""The machine that a figure was taken on, and how every benchmark of this folder prints its result.

stdout carries one JSON object, stderr a table to read. Memory is what Linux counts as resident, in bytes.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, object]:
    """What a reader needs to judge a time: processor, cores, versions, threads, and who else was busy."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def usable_cores() -> int:
    """The number of cores this process may run on."""
    return len(os.sched_getaffinity(0))


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The largest resident memory that this process ever had, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and count of repeated measurements, beside the values themselves."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
        "values": [round(value, 6) for value in values],
    }


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of ours / theirs over runs that were taken in turns, so that a busy neighbour hits both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def emit(record: dict[str, object], *, title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print `record` as JSON on stdout and `rows` (the first one a heading) as a table on stderr."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(title, file=sys.stderr)
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip(), file=sys.stderr)
        if number == 0:
            print("  " + "  ".join("-" * width for width in widths), file=sys.stderr)
    print(json.dumps(record, indent=2))
