"""The heads of a run, as the benchmarks choose among them."""

from __future__ import annotations

from pathlib import Path


def probe_of(run: Path, head: str) -> Path:
    """The first probe of a run whose name holds `head`.

    Raises:
        FileNotFoundError: There is none.
    """
    probes = sorted(path for path in (run / "probes").glob("*") if head in path.name)
    if not probes:
        raise FileNotFoundError(f"{run} has no probe whose name holds {head!r}")
    return probes[0]
