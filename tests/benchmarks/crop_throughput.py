"""Crops a second: the official PIL pipeline under a DataLoader with two workers against the engine's batched kernels.

Both make crops of the same real images with the published augmentation, in turns; the loader's workers end before the
engine's turn begins. Example: python tests/benchmarks/crop_throughput.py CHECKOUT ~/.cache/cifar10-jpeg
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from judge import read_folder
from machine import emit, machine, paired_ratio, summary
from official import FolderImages, on_a_cpu
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cfamc_cli.engine.crops import crop_batch, sample_parameters
from cfamc_cli.recipe.schema import Augment, Crops

WORKERS = 2


def official_data_set(checkout: Path, folder: Path, *, crops: int, limit: int) -> Dataset[Any]:
    """The official data set with its own transform: each item is a list of `crops` tensors, and a label."""

    def data_set(*, transform: Any, **settings: object) -> FolderImages:
        return FolderImages(folder / "train", limit=limit, transform=transform)

    with on_a_cpu(checkout), mock.patch.object(torchvision.datasets, "CIFAR10", data_set):
        from dataset.datasets import load_dataset  # type: ignore[import-not-found]

        bounds = argparse.Namespace(scale_min=0.08, scale_max=1.0, ratio_min=0.75, ratio_max=4 / 3)
        made: Dataset[Any] = load_dataset(bounds, "cifar10", train=True, num_patch=crops)
        made[0]  # type: ignore[unused-ignore]  # imports its transform while the checkout is importable
    return made


def time_official(images: Dataset[Any], *, crops: int, batch: int, batches: int) -> float:
    """Crops a second of the loader in its steady state: the clock starts when each worker has delivered once."""
    loader = DataLoader(images, batch_size=batch, shuffle=True, drop_last=True, num_workers=WORKERS)
    delivered = iter(loader)
    for _ in range(WORKERS):
        next(delivered)
    started = time.perf_counter()
    for _ in range(batches):
        views, _ = next(delivered)
        assert len(views) == crops
        torch.cat(views)
    return crops * batch * batches / (time.perf_counter() - started)


def time_ours(images: Tensor, *, group: Crops, batch: int, batches: int) -> float:
    """Crops a second of the engine, the drawing of parameters and the gathering of the batch included."""
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for _ in range(batches):
        rows = torch.randint(len(images), (batch,), generator=generator)
        height, width = images.shape[-2:]
        parameters = sample_parameters(batch, height, width, group=group, augment=Augment(), generator=generator)
        made = crop_batch(images[rows], parameters, size=group.size)
        assert made.shape[:2] == (group.count, batch)
    return group.count * batch * batches / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of the official repository")
    parser.add_argument("folder", type=Path, help="image folder with train/<class>/")
    parser.add_argument("--crops", type=int, default=16)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--batches", type=int, default=6, help="batches a turn; a multiple of the two workers")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--limit", type=int, default=10_000, help="images to draw from")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    theirs = official_data_set(options.checkout, options.folder, crops=options.crops, limit=options.limit)
    images, _, _ = read_folder(options.folder / "train", limit=options.limit)
    group = Crops(count=options.crops)
    time_ours(images, group=group, batch=options.batch, batches=1)

    rates: dict[str, list[float]] = {"official": [], "ours": []}
    for _ in range(options.turns):
        rates["official"].append(
            time_official(theirs, crops=options.crops, batch=options.batch, batches=options.batches)
        )
        rates["ours"].append(time_ours(images, group=group, batch=options.batch, batches=options.batches))

    ratio = paired_ratio(rates["ours"], rates["official"])
    record = {
        "machine": machine(),
        "settings": {"crops": options.crops, "batch": options.batch, "workers": WORKERS, "images": len(images)},
        "official_crops_per_second": summary(rates["official"]),
        "ours_crops_per_second": summary(rates["ours"]),
        "ratio": ratio,
    }
    rows = [["crops / s", "median"]]
    rows += [[name, f"{summary(values)['median']:.0f}"] for name, values in rates.items()]
    rows.append(["ratio", f"{ratio:.2f}"])
    emit(record, title=f"{options.crops} crops of {options.batch} images a batch", rows=rows)


if __name__ == "__main__":
    main()
