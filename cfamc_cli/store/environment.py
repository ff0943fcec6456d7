"""What a result depends on besides its recipe: versions and machine; no secrets, and no remote of git."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path

from cfamc_cli import __version__
from cfamc_cli.store.records import Computation, Environment


def capture_environment(device: str, computation: Computation | None) -> Environment:
    """Collect what a result depends on besides its recipe.

    Args:
        device: Name of the device that computes, as the engine tells it.
        computation: How it computes, likewise; None where nothing was computed yet.
    """
    revision, changed = _git_state(Path(__file__).parents[1])
    return Environment(
        cfamc=__version__,
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        torchvision=importlib.metadata.version("torchvision"),
        platform=platform.platform(),
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        device=device,
        git_revision=revision,
        git_changed=changed,
        computation=computation,
    )


def versions() -> str:
    """What is at work here, in three lines; torch is not imported for it."""
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision"))
    facts = Path("/proc/driver/nvidia/gpus").glob("*/information")  # NVIDIA's kernel driver on Linux
    cards = [line.partition(":")[2].strip() for path in facts for line in path.read_text().splitlines()[:1]]
    devices = [f"{count} x {name}" for name, count in Counter(cards).items()]
    devices.append(f"{os.cpu_count()} cores of {_cpu_model()}")
    return f"cfamc {__version__}\n{libraries}, Python {platform.python_version()}\n{', '.join(devices)}"


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")  # Linux
    lines = facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git_state(folder: Path) -> tuple[str | None, bool]:
    """Revision of the checkout that this package is tracked in, and whether it was changed; no remote is looked at."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=5)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", "."))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, False
