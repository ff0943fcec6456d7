"""Packs: a data set decoded once into the cache, memory-mapped from then on.

A pack is two files: NAME-KEY.npy, the pixels, and NAME.json, the manifest with labels, class names, fingerprint and the
key of what it was made from. The manifest comes last, so that a pack exists whole or not at all; the pixels carry the
key in their name, so that processes that pack a folder while it changes never mix two states of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cfamc_cli.engine.sink import Talk
from cfamc_cli.store.files import explained, staged_file, sweep, write_text

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
_whole: set[tuple[Path, int, int, int, str]] = set()  # packs whose content this process has seen to be right


@dataclass(frozen=True)
class Raw:
    """A split as it is read from its files."""

    shape: tuple[int, ...]  # (N, 3, H, W)
    chunks: Iterator[Pixels]  # uint8 (n, 3, H, W) each, N images in all; what cannot be read raises here
    labels: Labels | None  # int64, (N,), -1 where an image has none; None where no image has one
    classes: tuple[str, ...]  # by label


@dataclass(frozen=True)
class Pack:
    """A split, ready to be trained on."""

    images: Tensor  # uint8, (N, 3, H, W), mapped from a file (pages are read when they are touched) or in host memory
    labels: Tensor | None  # int64, (N,), -1 where an image has none; None where no image has one
    classes: tuple[str, ...]  # by label
    fingerprint: str  # as `fingerprint` computes it; the same wherever the data lies


def fingerprint(images: Tensor, labels: Tensor | None, classes: tuple[str, ...]) -> str:
    """Compute what identifies a set of images: neither paths nor the way in which it is stored have a part in it.

    Args:
        images: uint8, (N, 3, H, W), in host memory.
        labels: int64, (N,), or None.
        classes: Class names by label.

    Returns:
        SHA-256 over shape, class names, labels and pixels, hexadecimal.
    """
    head = {"shape": list(images.shape), "classes": list(classes), "labelled": labels is not None}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    if labels is not None:
        digest.update(labels.numpy().astype("<i8").tobytes())
    for piece in images.split(4096):  # a strided tensor is copied piece by piece
        digest.update(piece.contiguous().numpy().data)
    return digest.hexdigest()


def packed(folder: Path, name: str, *, key: str, make: Callable[[], Raw], task: str, talk: Talk) -> Pack:
    """Map a pack, after making it where there is none for this key yet.

    Args:
        folder: Where packs lie; made where needed.
        name: What the pack is called there; one of another key is replaced.
        key: Changes with whatever the pack is made from.
        make: Reads the split.
        task: What the progress is called.
        talk: Hears the progress, in images.

    Returns:
        The pack. Processes that make the same one at once do not disturb each other.

    Raises:
        CfamcError: The files cannot be written, with the space that they need; or as `make` and its chunks do.
    """
    mark = hashlib.sha256(key.encode()).hexdigest()[:16]
    manifest, pixels = folder / f"{name}.json", folder / f"{name}-{mark}.npy"
    try:
        found = json.loads(manifest.read_bytes())
        if found["key"] == key:
            labels = found["labels"] and torch.tensor(found["labels"])
            pack = Pack(_mapped(pixels), labels, tuple(found["classes"]), found["fingerprint"])
            if _is_whole(pack, pixels):
                return pack
            talk.warning(f"{pixels} has changed since it was packed: it is packed anew")
    except (OSError, ValueError, TypeError, KeyError):
        pass  # absent or damaged: made anew
    raw = make()
    with cached_file(pixels, needed=int(np.prod(raw.shape))) as temporary:
        _write(temporary, raw, task=task, talk=talk)
        images, labels = _mapped(temporary), None if raw.labels is None else torch.from_numpy(raw.labels)
        pack = Pack(images, labels, raw.classes, fingerprint(images, labels, raw.classes))
    content = {"key": key, "fingerprint": pack.fingerprint, "classes": pack.classes}
    write_text(manifest, json.dumps(content | {"labels": None if labels is None else labels.tolist()}))
    for other in folder.glob(f"{name}-*.npy"):
        if other != pixels:
            other.unlink(missing_ok=True)
    return pack


def _is_whole(pack: Pack, pixels: Path) -> bool:
    """Whether a pack holds what its fingerprint says; read once in a process, as long as its file stays as it is."""
    status = pixels.stat()
    seen = (pixels, status.st_ino, status.st_size, status.st_mtime_ns, pack.fingerprint)
    if seen not in _whole and fingerprint(pack.images, pack.labels, pack.classes) == pack.fingerprint:
        _whole.add(seen)
    return seen in _whole


@contextmanager
def cached_file(path: Path, *, needed: int | None = None) -> Iterator[Path]:
    """As `staged_file`, in a folder that is made where needed and swept of what dead processes left."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with staged_file(path, needed=needed) as temporary:
        yield temporary


def _write(path: Path, raw: Raw, *, task: str, talk: Talk) -> None:
    done = 0
    with path.open("wb") as file:  # not mapped: through a mapping, a full disk is the end of the process
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": raw.shape})
        for chunk in raw.chunks:
            file.write(np.ascontiguousarray(chunk).data)
            done += len(chunk)
            talk.progress(task, done, raw.shape[0], {})
    assert done == raw.shape[0], "the chunks must add up to the shape"


def _mapped(path: Path) -> Tensor:
    # Copy on write, since torch wants a writable array. Arrays of objects cannot be mapped, so nothing is unpickled.
    return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
