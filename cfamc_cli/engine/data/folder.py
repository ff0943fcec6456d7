"""Image folders: what lies in them, and how a file becomes pixels.

Every image leaves here as 8-bit RGB: EXIF rotation applied, alpha dropped, 16-bit grey scaled to 8 bits, CMYK and
palettes converted. With a size, the shorter side is resized to it (bilinear, antialiased) and the
centred square cut out.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from cfamc_cli.engine.data.packs import Pixels, Raw
from cfamc_cli.engine.randomness import balanced_order
from cfamc_cli.errors import CfamcError, ExitCode, bad_data

Failure = tuple[str, str]  # file and cause

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # no format whose decoder runs programs
MIN_SIDE = 4  # pixels; below it a file is a tracking pixel or a ruler, not a picture
MAX_PIXELS = 2**26  # 67 megapixels, 201 MB as RGB; larger ones are refused by their header
CHUNK = 32  # images per unit of work: few, since a worker that is told to stop finishes its unit
PROCESSES_FROM = 1024  # images from which decoding processes are worth their start
MAX_FAILURES = 100  # unreadable files after which decoding gives up

_TESTED = 5  # one image in so many is for testing, where one folder holds all images of a class
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Listing:
    """The image files of one split."""

    folder: Path  # the folder that `names` are relative to
    names: tuple[str, ...]  # paths of the images, by class and then by name
    labels: tuple[int, ...] | None  # class of each image; None where the folder has no class folders
    classes: tuple[str, ...]  # class names by label, sorted; also those without images
    key: str  # SHA-256 over path, size and modification time of every file: another one after any change


def list_images(root: Path, split: Literal["train", "test"]) -> Listing:
    """Find the images of a split.

    `root/train/<class>/` and `root/test/<class>/` (or `root/val/<class>/`) hold labelled images, `root/train/` and
    `root/` themselves unlabelled ones. Without any of these folders and without loose images, `root/<class>/` holds
    labelled images, of which a fifth of each class is for testing. Class folders are searched to any depth; names that
    start with a dot and files that are no images by their suffix are passed over.

    Args:
        root: The recipe's data.root.
        split: Which images.

    Returns:
        What was found: at least one image.

    Raises:
        CfamcError: The folder is missing or empty, mixes class folders with loose images, has no such split, or its
            test split has a class that training images never had.
    """
    if not root.is_dir():
        cause = "is not a folder" if root.exists() else "does not exist"
        raise bad_data(f"data.root {root} {cause}", "it must hold <class>/, or train/<class>/ and test/<class>/")
    try:
        folder = _required_folder(root, split)
        train = folder if split == "train" else _split_folder(root, "train") or folder
        classes = _class_names(train, root)
        unknown = sorted(set(_class_names(folder, root)) - set(classes))
        if unknown:
            raise bad_data(
                f"{folder / unknown[0]} is a class that {train} does not have",
                "both splits must name their class folders alike",
            )
        names, labels, key = _find(folder, classes)
    except OSError as error:
        raise bad_data(f"cannot read {error.filename or root}: {error.strerror}") from error
    if not names:
        raise bad_data(f"no images in {folder}", f"images end in {' '.join(SUFFIXES)}")
    if folder == root and classes:
        kept = _drawn(labels, split)
        names, labels = [names[at] for at in kept], [labels[at] for at in kept]
    return Listing(folder, tuple(names), tuple(labels) if classes else None, classes, key)


def decode(path: Path, *, size: int | None) -> Pixels:
    """Read one image.

    Args:
        path: The file.
        size: Side in pixels of the centred square, after a resize of the shorter side; None keeps the image as it is.

    Returns:
        uint8, (H, W, 3).

    Raises:
        ValueError: With the cause, when the file is no image, is cut, too small or too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_size(*image.size)
            if size is not None:
                image.draft(image.mode, (2 * size, 2 * size))  # JPEG: skip frequencies that the resize would drop
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
            rgb = _to_rgb(ImageOps.exif_transpose(image) if turned else image)
            return resize(rgb, size) if size is not None else np.asarray(rgb)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"has more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise ValueError("is not an image of a known format") from error
    except _Refused as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # decoders of broken files raise anything: IndexError, struct.error, SyntaxError ...
        raise ValueError(f"cannot be decoded: {error}") from error


def resize(image: Image.Image, size: int) -> Pixels:
    """Resize the shorter side and cut out the centred square, in one pass.

    Args:
        image: RGB.
        size: Side in pixels.

    Returns:
        uint8, (size, size, 3).
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) == (size, size):
        return np.asarray(image)
    square = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=square))


def read(listing: Listing, *, size: int | None) -> Raw:
    """Decode a split, in order; a large one on all cores.

    Args:
        listing: The files.
        size: As for `decode`.

    Returns:
        The split, decoded while its chunks are iterated over.

    Raises:
        CfamcError: A file is unreadable, or, without a size, images differ in theirs; names the first such file and
            counts the others. Raised for the first image at once, for the others by the chunks.
    """
    first = listing.folder / listing.names[0]
    try:
        height, width, _ = decode(first, size=size).shape
    except ValueError as error:
        raise _unreadable([(str(first), str(error))]) from error
    labels = None if listing.labels is None else np.array(listing.labels, dtype=np.int64)
    chunks = _chunks(_Decoder(listing, size=size, height=height, width=width))
    return Raw((len(listing.names), 3, height, width), chunks, labels, listing.classes)


class _Refused(Exception):  # noqa: N818 - it never leaves this file
    """An image that is turned down for what its header says."""


class _Decoder(Dataset[tuple[Pixels, list[Failure]]]):
    """The chunks of a listing by number: pixels, black where a file cannot be used, and those files."""

    def __init__(self, listing: Listing, *, size: int | None, height: int, width: int) -> None:
        self.listing, self.size, self.height, self.width = listing, size, height, width

    def __len__(self) -> int:
        return -(-len(self.listing.names) // CHUNK)

    def __getitem__(self, chunk: int) -> tuple[Pixels, list[Failure]]:
        names = self.listing.names[chunk * CHUNK : (chunk + 1) * CHUNK]
        pixels = np.zeros((len(names), 3, self.height, self.width), dtype=np.uint8)
        failures = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata is no news; what cannot be read fails
            for row, name in enumerate(names):
                path = self.listing.folder / name
                try:
                    image = decode(path, size=self.size)
                    height, width, _ = image.shape
                    if (height, width) != (self.height, self.width):
                        raise ValueError(f"is {width}x{height} where the first image is {self.width}x{self.height}")
                    pixels[row] = image.transpose(2, 0, 1)  # (3, H, W)
                except ValueError as error:
                    failures.append((str(path), str(error)))
        return pixels, failures


def _chunks(decoder: _Decoder) -> Iterator[Pixels]:
    names = decoder.listing.names
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chunks = iter(
        DataLoader(
            decoder,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=cores if len(names) >= PROCESSES_FROM else 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the loader draws a seed; not from the caller's stream
        )
    )
    failures: list[Failure] = []
    ended = ""
    for start in range(0, len(names), CHUNK):
        try:
            pixels, failed = next(chunks)
        except RuntimeError as error:
            ended = f"a decoding process ended near {decoder.listing.folder / names[start]} ({error})"
            break
        failures += failed
        if len(failures) >= MAX_FAILURES:
            break
        yield pixels
    del chunks  # ends the processes now, not when the last to speak of an error has let go of this frame
    if ended:
        raise CfamcError(ended, hint="too little memory, or an image that crashes the decoder")
    if failures:
        raise _unreadable(failures)


def _as_it_is(chunk: object) -> object:
    return chunk  # as an array it goes through a pipe; as a tensor it would take shared memory, scarce in containers


def _start_worker(_number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the terminal it reaches every process; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # killed: else the worker would wait for ever for somebody to read what it decoded
    os._exit(1)


def _unreadable(failures: list[Failure]) -> CfamcError:
    path, cause = failures[0]
    others = len(failures) - 1
    more = f" (and {others} more {'image' if others == 1 else 'images'})" if others else ""
    if "the first image is" in cause:
        hint = "set data.size, such as `--set data.size=32`, to bring all images to one size"
    else:
        hint = "repair or remove the file"
    files = [{"file": name, "cause": why} for name, why in failures]
    return CfamcError(f"{path} {cause}{more}", hint=hint, exit_code=ExitCode.BAD_DATA, details={"files": files})


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _Refused(f"is {width}x{height}: more than {MAX_PIXELS:,} pixels")
    if min(width, height) < MIN_SIDE:
        raise _Refused(f"is {width}x{height}: smaller than {MIN_SIDE} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "F":
        raise _Refused("has floating-point pixels")
    if image.mode.startswith("I"):  # 16 bits of grey: 65535 is white
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise _Refused("has pixels of more than 16 bits")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        return image.convert("RGBA").convert("RGB")  # straight to RGB warns about transparency
    return image.convert("RGB")


def _split_folder(root: Path, split: Literal["train", "test"]) -> Path | None:
    for name in ("train",) if split == "train" else ("test", "val"):
        if (root / name).is_dir():
            return root / name
    if not any((root / name).is_dir() for name in ("train", "test", "val")):
        with os.scandir(root) as found:
            entries = [entry for entry in found if entry.name[0] != "."]
        loose = any(map(_is_image, entries))
        if split == "train" if loose else any(entry.is_dir() for entry in entries):
            return root
    return None


def _required_folder(root: Path, split: Literal["train", "test"]) -> Path:
    folder = _split_folder(root, split)
    if folder is None:
        name = "training" if split == "train" else "test"
        loose = ", or without classes into it" if split == "train" else ""
        where = f"{root / split}/<class>/{loose}; or all images into {root}/<class>/"
        raise bad_data(f"no {name} images in {root}", f"put them into {where}")
    return folder


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES) and entry.is_file()


def _drawn(labels: Sequence[int], split: Literal["train", "test"]) -> list[int]:
    """Of images in class folders alone those of a split: the same for every seed, so that results can be paired."""
    counts, drawn = Counter(labels), Counter[int]()
    test = set()
    for index in balanced_order(torch.tensor(labels), "image folder").tolist():
        label = labels[index]
        if drawn[label] < max(counts[label] // _TESTED, min(1, counts[label] - 1)):
            drawn[label] += 1
            test.add(index)
    return [index for index in range(len(labels)) if (index in test) == (split == "test")]


def _class_names(folder: Path, root: Path) -> tuple[str, ...]:
    names, loose = [], ""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.is_dir():
                names.append(entry.name)
            elif _is_image(entry):
                loose = entry.path
    if folder == root and loose:
        return ()  # loose images beside folders of something else
    if names and loose:
        raise bad_data(f"{loose} lies beside class folders", "move it into one of them, or away")
    return tuple(sorted(names))


def _find(folder: Path, classes: tuple[str, ...]) -> tuple[list[str], list[int], str]:
    """Paths relative to the folder by class and then by name, their labels, and the key of it all."""
    names: list[str] = []
    labels: list[int] = []
    digest = hashlib.sha256(json.dumps(classes).encode())
    for label, name in enumerate(classes or ("",)):
        found: dict[str, str] = {}  # path: bytes and mtime; strings keep the garbage collector out of 50,000 files
        waiting = [name] if (folder / name).is_dir() else []  # the test split may lack a class
        while waiting:
            inner = waiting.pop()
            prefix = f"{inner}/" if inner else ""
            with os.scandir(folder / inner) as entries:
                for entry in entries:
                    if _is_image(entry):
                        status = entry.stat()
                        found[prefix + entry.name] = f"{status.st_size} {status.st_mtime_ns}"
                    elif classes and entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
                        waiting.append(prefix + entry.name)
        paths = sorted(found)
        names += paths
        labels += [label] * len(paths)
        lines = "\0".join([f"{path}\0{found[path]}" for path in paths])  # no path holds a NUL
        digest.update(f"{label} {len(paths)}\0{lines}".encode("utf-8", "surrogatepass"))
    return names, labels, digest.hexdigest()
