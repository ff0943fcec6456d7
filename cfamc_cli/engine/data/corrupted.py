"""Published sets of corrupted test images: CIFAR-10-C and its like as npy files, ImageNet-C as folders of images.

Hendrycks & Dietterich, arXiv:1903.12261. Of npy files each kind has one, (5 N, H, W, 3), severity after severity,
beside labels.npy; folders are kind/severity/class/image. Nothing is unpickled, and only what is asked for is read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfamc_cli.engine.corruptions import SEVERITIES
from cfamc_cli.engine.data.folder import SUFFIXES, decode
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.errors import bad_data

_LAYOUT = "it must hold labels.npy and a file for each kind, or kind/severity/class/image"


@dataclass(frozen=True)
class Published:
    """Where corrupted versions of a test set lie."""

    folder: Path
    kinds: tuple[str, ...]
    names: tuple[str, ...]  # of the images below kind/severity, in the order of the test set; none for npy files
    size: int  # pixels of a side
    fingerprint: str  # digest of the names and sizes of what there is

    def images(self, places: Tensor, *, kind: str, severity: int) -> Tensor:
        """The images at `places` (N,) of the test set, corrupted: float32 (N, 3, H, W) in [0, 1].

        Raises:
            CfamcError: Exit 4; one cannot be read.
        """
        if not self.names:
            whole = _array(self.folder / f"{kind}.npy")
            pixels = whole[(severity - 1) * (len(whole) // len(SEVERITIES)) + places.numpy()]
        else:
            paths = [self.folder / kind / str(severity) / self.names[place] for place in places.tolist()]
            pixels = np.stack([_decoded(path, self.size) for path in paths])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def find_published(folder: Path, test: ImageSet) -> Published:
    """Look at a folder of corrupted images and hold it against the test set that it is of.

    Raises:
        CfamcError: Exit 4; it holds no such images, or they are not those of the test set.
    """
    labels, (height, width) = test.require_labels(), test.images.shape[2:]
    if (folder / "labels.npy").is_file():
        kinds = sorted(path.stem for path in folder.glob("*.npy") if path.stem != "labels")
        expected = labels.numpy()
        found = _array(folder / "labels.npy")
        if found.shape != (5 * len(expected),) or not bool((found.reshape(5, -1) == expected).all()):
            raise bad_data(
                f"{folder / 'labels.npy'} are not the labels of {test.dataset} {test.split}, five times over",
                "name the folder that was made of the same test images, in their order",
            )
        for kind in kinds:
            pixels, wanted = _array(folder / f"{kind}.npy"), (5 * len(labels), height, width, 3)
            if pixels.shape != wanted or pixels.dtype != np.uint8:
                raise bad_data(
                    f"{folder / kind}.npy is {pixels.shape} of {pixels.dtype}, not {wanted} of uint8",
                    "take the file as it was published: all images at severity 1, then at 2, and so on to 5",
                )
        sizes = [f"{kind} {(folder / f'{kind}.npy').stat().st_size}" for kind in kinds]
        names: tuple[str, ...] = ()
    else:
        kinds = sorted(path.name for path in folder.glob("[!.]*") if (path / "1").is_dir())
        if cut := [f"{kind}/{s}" for kind in kinds for s in SEVERITIES if not (folder / kind / str(s)).is_dir()]:
            raise bad_data(f"{folder} holds no {cut[0]}", _LAYOUT)
        listed = [
            (f"{name}/{path.name}", label)
            for label, name in enumerate(test.classes)
            for path in sorted((folder / kinds[0] / "1" / name).glob("[!.]*") if kinds else ())
            if path.suffix.lower() in SUFFIXES
        ]
        if kinds and [label for _, label in listed] != labels.tolist():
            raise bad_data(
                f"{folder / kinds[0] / '1'} does not hold the images of {test.dataset} {test.split}, by class",
                _LAYOUT,
            )
        names = tuple(name for name, _ in listed)
        sizes = list(names)
    if not kinds:
        raise bad_data(f"{folder} holds no corrupted images", _LAYOUT)
    digest = hashlib.sha256("\n".join([*kinds, *sizes]).encode()).hexdigest()
    return Published(folder, tuple(kinds), names, int(height), digest)


@lru_cache(maxsize=32)
def _array(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A npy file, mapped; an array of objects would need pickle, and is refused."""
    try:
        found: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise bad_data(f"{path} is no array that can be read: {error}"[:300], "get the file again") from error
    return found


def _decoded(path: Path, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        return decode(path, size=size)
    except ValueError as error:
        raise bad_data(f"{path} {error}", _LAYOUT) from error
