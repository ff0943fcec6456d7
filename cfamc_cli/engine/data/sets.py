"""A data set as one uint8 tensor (N, 3, H, W), and how batches leave it.

Data is read from its published form once and packed into one file of the cache; from then on it is memory-mapped, or
resident on the device where it fits. Nothing here looks at single images during an epoch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cfamc_cli.datasets import FASHION_MINI_FINGERPRINTS, FASHION_MINI_FOLDER, KNOWN_SETS
from cfamc_cli.engine.data import archives, folder
from cfamc_cli.engine.data.packs import Pack, Pixels, Raw, fingerprint, packed
from cfamc_cli.engine.device import move
from cfamc_cli.engine.randomness import addressed_generator, balanced_order
from cfamc_cli.engine.sink import Talk
from cfamc_cli.errors import bad_data, invalid
from cfamc_cli.recipe.schema import Data, Split
from cfamc_cli.store.records import DataUsed

RESIDENT_SHARE = 0.25  # of the free device memory; the rest is for the encoder and its activations


@dataclass(frozen=True)
class ImageSet(Pack):
    """The images of one split."""

    dataset: str  # as in the recipe
    split: Split
    licence: str  # what is known of the terms of use; empty where nothing is

    def __len__(self) -> int:
        return len(self.images)

    def used(self) -> DataUsed:
        """What a record says of these images."""
        return DataUsed(dataset=self.dataset, split=self.split, n=len(self), fingerprint=self.fingerprint)

    def labelled(self) -> ImageSet:
        """Return the images that have a label: all of them, or (stl10) the labelled part.

        Raises:
            CfamcError: No image has one.
        """
        if self.labels is None or not bool((self.labels >= 0).any()):
            hint = "labels come from class folders, train/<class>/ and test/<class>/; or cfamc attack --unlabelled"
            raise bad_data(f"the {self.split} images of {self.dataset} have no labels", hint)
        keep = (self.labels >= 0).nonzero().flatten()
        return self if len(keep) == len(self) else self.take(keep)

    def require_labels(self) -> Tensor:
        """Return the labels of a set that a classifier can be trained or judged on.

        Returns:
            int64, (N,), each of the classes at least once.

        Raises:
            CfamcError: An image has no label, there are fewer than two classes, or a class has no image.
        """
        missing = 0 if self.labels is None else int((self.labels < 0).sum())
        labels = self.labelled().labels
        assert labels is not None, "labelled() raises otherwise"
        empty = (torch.bincount(labels, minlength=len(self.classes)) == 0).nonzero().flatten().tolist()
        if missing:
            cause, hint = f"{missing:,} of {len(self):,} images have no label", ""
        elif len(self.classes) < 2:
            cause, hint = f"there is only one class, {', '.join(self.classes)}", "a classifier needs two or more"
        elif empty:
            names = ", ".join(self.classes[label] for label in empty[:5])
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            cause, hint = f"no images of class {names}{more}", "add some, or remove the class folders"
        else:
            return labels
        raise bad_data(f"{self.split} images of {self.dataset}: {cause}", hint)

    def take(self, indices: Tensor) -> ImageSet:
        """Return the images at `indices`, int64 (n,), as a set of its own, copied into memory."""
        images = self.images.index_select(0, indices)
        labels = None if self.labels is None else self.labels.index_select(0, indices)
        mark = fingerprint(images, labels, self.classes)
        return dataclasses.replace(self, images=images, labels=labels, fingerprint=mark)


def load(data: Data, split: Split, *, seed: int, cache: Path, talk: Talk) -> ImageSet:
    """Load one split; download, decode and pack it before where that was not done yet.

    The training split of `stl10` is its 5,000 labelled images followed by its 100,000 unlabelled ones (label -1).
    A socket is opened only for a download that is needed: never for `fashion-mini`, `folder`, a set that is packed,
    or one whose data.root says where its files lie.

    Args:
        data: The recipe's [data] table. `holdout` is taken from the training split, and `limit` applies to the rest.
        split: Which part; "holdout" are the training images that are held out, of a table that says how many.
        seed: The recipe's seed; shuffles before `limit` cuts.
        cache: Folder for downloads and packs.
        talk: Hears progress and messages.

    Returns:
        The images.

    Raises:
        CfamcError: The data is missing, unreadable or unfit; exit code BAD_DATA. FAILED where the cache cannot be
            written, INVALID where `holdout` or `limit` do not fit the images.
    """
    root = None if data.root is None else Path(data.root).expanduser().absolute()
    files: archives.Split = "test" if split == "test" else "train"
    match data.dataset:
        case "folder":
            assert root is not None, "the recipe asks for one"
            pack = _folder(files, size=data.size, root=root, cache=cache, talk=talk)
        case "fashion-mini":
            pack = _fashion_mini(files, size=data.size)
        case known:
            pack = _known(known, files, size=data.size, root=root, cache=cache, talk=talk)
    licence = KNOWN_SETS[data.dataset].licence if data.dataset in KNOWN_SETS else ""
    images = ImageSet(pack.images, pack.labels, pack.classes, pack.fingerprint, data.dataset, split, licence)
    if split == "test" or (data.limit is None and not data.holdout):
        return images
    left, beside = torch.arange(len(images)), ""
    if data.holdout:
        held, left = _hold_out(images, data.holdout)
        if split == "holdout":
            return images.take(held)
        beside = " beside those held out"
    if data.limit is None:
        return images.take(left)
    if data.limit > len(left):
        cause = f"data.limit is {data.limit:,} but {data.dataset} has {len(left):,} training images{beside}"
        raise invalid(cause, "lower data.limit or leave it out")
    order = torch.randperm(len(left), generator=addressed_generator("limit", seed))
    return images.take(left[order[: data.limit]])


def at_hand(data: Data, *, cache: Path) -> bool:
    """Whether images of a table lie on this machine, so that `load` downloads nothing; unchecked otherwise."""
    match data.dataset:
        case "fashion-mini":
            return True
        case "folder":
            return Path(data.root or "").expanduser().is_dir()
        case known:
            return data.root is not None or any((cache / "packs").glob(f"{known}-train-*"))


def _hold_out(images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Draw the images to hold out: by no seed, so that results of all seeds are on the same ones and can be paired.

    Args:
        images: All training images. Labels serve only to draw evenly of all classes; unlabelled images of a set that
            has labels are not drawn, for a head could not be judged on them.
        count: How many, at least 1.

    Returns:
        Indices held out, (count,), and all others; both int64, ascending.

    Raises:
        CfamcError: INVALID where nothing is left, or a class has no image on one of the sides.
    """
    labels, name = images.labels, images.dataset
    labelled = labels is not None and bool((labels >= 0).any())
    if labels is not None and labelled:
        order = balanced_order(labels, "holdout")
    else:
        order = torch.randperm(len(images), generator=addressed_generator("holdout"))
    said = f"data.holdout is {count:,}"
    if count >= len(order):
        kind = "labelled training" if len(order) < len(images) else "training"
        raise invalid(f"{said} but {name} has {len(order):,} {kind} images", "lower it: what it leaves is trained on")
    if labels is not None and labelled:
        whole, drawn = (torch.bincount(labels[part], minlength=len(images.classes)) for part in (order, order[:count]))
        there = whole > 0
        if count < (least := int(there.sum())):
            cause = f"{said}, fewer than one image of each of the {least} classes of {name}"
            raise invalid(cause, f"raise it to {least} or more")
        if bool((gone := there & (drawn == whole)).any()):
            cause = f"{said}, which takes every training image of class {images.classes[int(gone.int().argmax())]}"
            raise invalid(cause, "lower data.holdout, or add images")
    held = torch.zeros(len(images), dtype=torch.bool)
    held[order[:count]] = True
    return held.nonzero().flatten(), (~held).nonzero().flatten()


def to_device(images: Tensor, *, device: torch.device) -> Tensor:
    """Make a set resident on the device if it takes at most a quarter of the free memory there.

    Args:
        images: uint8, (N, 3, H, W), on the host.
        device: Where batches are needed.

    Returns:
        The images on the device, or as they are: mapped pages of the host, from which `batch` moves what it needs.
    """
    if device.type == "cpu":
        return images
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes > RESIDENT_SHARE * free:
            return images
    return images.to(device)


def batch(images: Tensor, indices: Tensor, *, device: torch.device) -> Tensor:
    """Gather one batch.

    Args:
        images: uint8, (N, 3, H, W), as `to_device` returns it.
        indices: int64, (B,), on the CPU, or where the images are.
        device: Where the batch is needed.

    Returns:
        uint8, (B, 3, H, W), on the device, in the order of `indices`.
    """
    if images.device.type != "cpu":
        return images.index_select(0, move(indices, images.device))
    if device.type == "cpu":
        return images.index_select(0, indices)
    ascending, order = indices.sort()  # a mapped file is read forwards
    return move(images.index_select(0, ascending)[order.argsort()], device)


def class_balanced_split(labels: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Hold images out, as evenly over the classes as `count` allows.

    Args:
        labels: int64, (N,); images labelled -1 are in neither part.
        count: Number of images to hold out, below the number of labelled ones.
        seed: The recipe's seed.

    Returns:
        Indices held out, (count,), and the other labelled ones; both int64, ascending, on the CPU.

    Raises:
        ValueError: When `count` leaves nothing on one side.
    """
    labels = labels.cpu()
    labelled = int((labels >= 0).sum())
    if not 0 < count < labelled:
        raise ValueError(f"cannot hold {count} of {labelled} labelled images out")
    order = balanced_order(labels, "held-out", seed)
    return order[:count].sort().values, order[count:].sort().values


def _fashion_mini(split: archives.Split, *, size: int | None) -> Pack:
    stem = "train" if split == "train" else "t10k"
    files = tuple(FASHION_MINI_FOLDER / f"{stem}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1"))
    raw = archives.read("fashion-mini", split, files)
    assert raw.labels is not None, "read() has counted them"
    images, labels = torch.from_numpy(next(raw.chunks)), torch.from_numpy(raw.labels)
    mark = fingerprint(images, labels, raw.classes)
    if mark != FASHION_MINI_FINGERPRINTS[split]:
        raise bad_data(f"{files[0]} is not what was shipped", "install cfamc again")
    if size is not None and size != images.shape[-1]:
        images = torch.from_numpy(_resized(images.numpy(), size))
        mark = fingerprint(images, labels, raw.classes)
    return Pack(images=images, labels=labels, classes=raw.classes, fingerprint=mark)


def _known(
    known: archives.Known, split: archives.Split, *, size: int | None, root: Path | None, cache: Path, talk: Talk
) -> Pack:
    def read() -> Raw:
        remotes = archives.remote_files(known, split)
        for remote in remotes:
            if root is not None and not (root / remote.name).is_file():
                hint = f"put {remote.url} there, or leave data.root out to have it downloaded"
                raise bad_data(f"data.root {root} does not hold {remote.name}", hint)
        files = tuple(archives.fetch(remote, root or cache / "downloads", talk=talk) for remote in remotes)
        raw = archives.read(known, split, files)
        if size is None or size == raw.shape[-1]:
            return raw
        return dataclasses.replace(
            raw, shape=(raw.shape[0], 3, size, size), chunks=(_resized(chunk, size) for chunk in raw.chunks)
        )

    key = json.dumps([known, split, size, None if root is None else str(root)])
    name = _pack_name(f"{known}-{split}", key)
    return packed(cache / "packs", name, key=key, make=read, task=f"packing {known}", talk=talk)


def _folder(split: archives.Split, *, size: int | None, root: Path, cache: Path, talk: Talk) -> Pack:
    listing = folder.list_images(root, split)
    # One pack per (root, split, size): the pack of a folder that changed is replaced.
    name = _pack_name(f"folder-{split}", json.dumps([str(root), split, size]))
    make = partial(folder.read, listing, size=size)
    return packed(cache / "packs", name, key=listing.key, make=make, task=f"packing {root}", talk=talk)


def _pack_name(stem: str, identity: str) -> str:
    return f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _resized(images: Pixels, size: int) -> Pixels:
    """(n, 3, H, W) to (n, 3, size, size)."""
    rows = (Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images)
    return np.stack([folder.resize(row, size).transpose(2, 0, 1) for row in rows])
