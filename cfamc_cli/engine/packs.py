"""Packs: a data set decoded once into one file of the cache, memory-mapped from then on.

Layout: pixels uint8 (N, 3, H, W), labels int64 (N,) where there are any, a JSON header, then 16 bytes: the header's
length and a magic word. Pixels come first so that they can be mapped from offset 0; the magic word comes last so that
a file that was cut is no pack.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cfamc_cli.engine.sink import Sink
from cfamc_cli.files import explained, staged_file, sweep

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

FORMAT = 1
_MAGIC = b"CFAMCPK1"
_FOOTER = struct.Struct("<Q8s")
_HEADER_LIMIT = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Pack:
    """What a pack file holds.

    Attributes:
        images: uint8, (N, 3, H, W), mapped from the file: pages are read when they are touched.
        labels: int64, (N,), -1 where an image has none; None where no image has one.
        classes: Class names by label.
        fingerprint: SHA-256, hexadecimal, as `fingerprint` computes it.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    fingerprint: str


class Fingerprint:
    """SHA-256 over shape, class names, labels and pixels, fed in pieces.

    Paths, devices and the way the data was stored have no part in it.
    """

    def __init__(self, shape: tuple[int, ...], labels: Labels | None, classes: tuple[str, ...]) -> None:
        head = {"shape": list(shape), "classes": list(classes), "labelled": labels is not None}
        self._hash = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        if labels is not None:
            self._hash.update(labels.astype("<i8").tobytes())

    def update(self, pixels: Pixels) -> None:
        self._hash.update(np.ascontiguousarray(pixels).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def fingerprint(images: Tensor, labels: Tensor | None, classes: tuple[str, ...]) -> str:
    """Compute what identifies a set of images, wherever it lies.

    Args:
        images: uint8, (N, 3, H, W).
        labels: int64, (N,), or None.
        classes: Class names by label.

    Returns:
        SHA-256, hexadecimal.
    """
    state = Fingerprint(tuple(images.shape), None if labels is None else labels.cpu().numpy(), classes)
    for start in range(0, len(images), 4096):
        state.update(images[start : start + 4096].cpu().numpy())
    return state.hexdigest()


def read_pack(path: Path, *, key: str) -> Pack | None:
    """Map a pack.

    Args:
        path: The file.
        key: What it must have been made from.

    Returns:
        The pack; None where the file is absent, cut, of another format or made from something else.
    """
    try:
        with path.open("rb") as file:
            total = file.seek(0, os.SEEK_END)
            file.seek(max(total - _FOOTER.size, 0))
            length, magic = _FOOTER.unpack(file.read(_FOOTER.size))
            if magic != _MAGIC or length > min(total, _HEADER_LIMIT):
                return None
            file.seek(total - _FOOTER.size - length)
            header = json.loads(file.read(length))
            if header["format"] != FORMAT or header["key"] != key:
                return None
            count, channels, height, width = header["shape"]
            pixels = count * channels * height * width
            label_bytes = 8 * count if header["labelled"] else 0
            if total != pixels + label_bytes + length + _FOOTER.size:
                return None
            file.seek(pixels)
            labels = np.frombuffer(bytearray(file.read(label_bytes)), dtype="<i8").astype(np.int64)
    except (OSError, ValueError, KeyError, struct.error):
        return None
    images = torch.from_file(str(path), shared=False, size=pixels, dtype=torch.uint8)
    return Pack(
        images=images.view(count, channels, height, width),
        labels=torch.from_numpy(labels) if header["labelled"] else None,
        classes=tuple(header["classes"]),
        fingerprint=header["fingerprint"],
    )


def write_pack(
    path: Path,
    chunks: Iterable[Pixels],
    *,
    key: str,
    shape: tuple[int, int, int, int],
    labels: Labels | None,
    classes: tuple[str, ...],
    task: str,
    sink: Sink,
) -> None:
    """Write a pack: whole, or not at all. Processes that write the same pack at once do not disturb each other.

    Args:
        path: The file; its folder is made where needed.
        chunks: uint8, (n, 3, H, W) each, N images in all.
        key: What the pack is made from.
        shape: (N, 3, H, W).
        labels: int64, (N,), or None.
        classes: Class names by label.
        task: What the progress is called.
        sink: Hears the progress, in images.

    Raises:
        CfamcError: When the file cannot be written, with the space that it needs.
    """
    count = shape[0]
    state = Fingerprint(shape, labels, classes)
    header: dict[str, object] = {"format": FORMAT, "key": key, "shape": shape, "classes": classes}
    header["labelled"] = labels is not None
    with cached_file(path, needed=int(np.prod(shape))) as temporary, temporary.open("wb") as file:
        done = 0
        for chunk in chunks:
            state.update(chunk)
            file.write(np.ascontiguousarray(chunk).data)
            done += len(chunk)
            sink.progress(task, done, count, {})
        assert done == count, "the chunks must add up to the shape"
        if labels is not None:
            file.write(labels.astype("<i8").tobytes())
        text = json.dumps(header | {"fingerprint": state.hexdigest()}).encode()
        file.write(text + _FOOTER.pack(len(text), _MAGIC))


@contextmanager
def cached_file(path: Path, *, needed: int | None = None) -> Iterator[Path]:
    """As `staged_file`, in a folder that is made where needed and swept of what dead processes left."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with staged_file(path, needed=needed) as temporary:
        yield temporary
