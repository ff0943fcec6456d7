"""What tests share: one thread, and a run small enough for a step to take milliseconds."""

from __future__ import annotations

import os

import pytest
import torch
from fixed_inputs import uniform

from cfamc_cli.engine.data.sets import ImageSet

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: sums depend on the number of threads


@pytest.fixture
def tiny_images() -> ImageSet:
    """64 labelled images of 12x12 pixels, of four classes."""
    return ImageSet(
        images=(uniform(64, 3, 12, 12, key="tiny images") * 256).to(torch.uint8),
        labels=torch.arange(64) % 4,
        classes=("ant", "bee", "cat", "dog"),
        dataset="folder",
        split="train",
        fingerprint="0" * 64,
        licence="",
    )
