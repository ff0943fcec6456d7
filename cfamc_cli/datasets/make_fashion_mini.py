"""Cuts `fashion-mini` out of Fashion-MNIST: the first 600 training and 100 test images of each class, in file order.

Run once, by a maintainer: `python -m cfamc_cli.datasets.make_fashion_mini FOLDER`, where FOLDER holds the four
idx .gz files (Debian's package dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist). The subset
keeps that format, so one reader serves both. What is decompressed from it repeats bit for bit anywhere.
"""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

from cfamc_cli.datasets import FASHION_MINI_FOLDER

IMAGES_PER_CLASS = {"train": 600, "t10k": 100}
CLASSES = 10


def cut(source: Path, target: Path) -> None:
    """Write the four files of the subset.

    Args:
        source: Folder with the four idx .gz files of Fashion-MNIST.
        target: Folder that receives four files of the same names.
    """
    target.mkdir(parents=True, exist_ok=True)
    for split, per_class in IMAGES_PER_CLASS.items():
        images = gzip.decompress((source / f"{split}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((source / f"{split}-labels-idx1-ubyte.gz").read_bytes())[8:]
        _, _, height, width = struct.unpack(">4I", images[:16])
        pixels = height * width
        taken = [0] * CLASSES
        chosen = []
        for index, label in enumerate(labels):
            if taken[label] < per_class:
                taken[label] += 1
                chosen.append(index)
        rows = b"".join(images[16 + pixels * index : 16 + pixels * (index + 1)] for index in chosen)
        header = struct.pack(">4I", 0x803, len(chosen), height, width)
        _write(target / f"{split}-images-idx3-ubyte.gz", header + rows)
        header = struct.pack(">2I", 0x801, len(chosen))
        _write(target / f"{split}-labels-idx1-ubyte.gz", header + bytes(labels[index] for index in chosen))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


if __name__ == "__main__":
    cut(Path(sys.argv[1]), FASHION_MINI_FOLDER)
