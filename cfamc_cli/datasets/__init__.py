"""Which data sets are known by name, and where the embedded one lies. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

DATASETS_FOLDER = Path(__file__).parent
FASHION_MINI_FOLDER = DATASETS_FOLDER / "fashion-mini"

# SHA-256 over pixels, labels and class names as `cfamc_cli.engine.data.sets.fingerprint` computes it; checked at load.
FASHION_MINI_FINGERPRINTS = {
    "train": "5d9cddab6f2db128f28e30cec713febff93e39a75153286bebc862b3dbdf8512",
    "test": "ef0ec1566c5ae97a6b5a7ce32cd08df990ee43b621fe40a62c72e4d78ecbf9b1",
}


class KnownSet(NamedTuple):
    """What is known about a data set before any of its files are read."""

    train: int  # number of training images; for `stl10` the unlabelled ones are part of it
    test: int  # number of test images
    size: int  # height and width in pixels
    classes: int  # number of classes
    licence: str = ""  # what is known of the terms of use; empty where nothing is
    hub: str = ""  # its name on the Hugging Face Hub; empty where its makers or that Hub keep none there


_ZALANDO = "MIT, Copyright (c) 2017 Zalando SE"
KNOWN_SETS: dict[str, KnownSet] = {
    "fashion-mini": KnownSet(6_000, 1_000, 28, 10, _ZALANDO, "zalando-datasets/fashion_mnist"),
    "cifar10": KnownSet(50_000, 10_000, 32, 10, "", "uoft-cs/cifar10"),
    "cifar100": KnownSet(50_000, 10_000, 32, 100, "", "uoft-cs/cifar100"),
    "fashion-mnist": KnownSet(60_000, 10_000, 28, 10, _ZALANDO, "zalando-datasets/fashion_mnist"),
    "svhn": KnownSet(73_257, 26_032, 32, 10, "for non-commercial use only", "ufldl-stanford/svhn"),
    "stl10": KnownSet(105_000, 8_000, 96, 10),
}
