"""Image folders: what lies in them, and how a file becomes pixels. Torch-free.

Every image leaves here as 8-bit RGB: EXIF rotation applied, alpha dropped, 16-bit grey scaled to 8 bits, CMYK and
palettes converted. With a size, the shorter side is resized to it (bilinear, antialiased) and the
centred square cut out.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cfamc_cli.errors import CfamcError, ExitCode

Pixels = npt.NDArray[np.uint8]
Failure = tuple[str, str]  # file and cause

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # no format whose decoder runs programs
MIN_SIDE = 4  # pixels; below it a file is a tracking pixel or a ruler, not a picture
MAX_PIXELS = 2**26  # 67 megapixels, 201 MB as RGB; larger ones are refused by their header
CHUNK = 256  # images per unit of work
PROCESSES_FROM = 4096  # images from which decoding processes are worth their start
MAX_FAILURES = 100  # unreadable files after which decoding gives up

_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Listing:
    """The image files of one split.

    Attributes:
        folder: The folder that `names` are relative to.
        names: Paths of the images, by class and then by name.
        labels: Class of each image; None where the folder has no class folders.
        classes: Class names by label, sorted; also those without images.
        key: SHA-256 over path, size and modification time of every file: another one after any change.
    """

    folder: Path
    names: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    key: str


def list_images(root: Path, split: Literal["train", "test"]) -> Listing:
    """Find the images of a split.

    `root/train/<class>/` and `root/test/<class>/` (or `root/val/<class>/`) hold labelled images, `root/train/` and
    `root/` themselves unlabelled ones. Class folders are searched to any depth; names that start with a dot and files
    that are no images by their suffix are passed over.

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
        raise _bad(f"data.root {root} {cause}", hint="it must hold train/<class>/ and test/<class>/")
    try:
        folder = _required_folder(root, split)
        train = folder if split == "train" else _split_folder(root, "train") or folder
        classes = _class_names(train)
        unknown = sorted(set(_class_names(folder)) - set(classes))
        if unknown:
            raise _bad(
                f"{folder / unknown[0]} is a class that {train} does not have",
                hint="both splits must name their class folders alike",
            )
        names, labels, key = _find(folder, classes)
    except OSError as error:
        raise _bad(f"cannot read {error.filename or root}: {error.strerror}") from error
    if not names:
        raise _bad(f"no images in {folder}", hint=f"images end in {' '.join(SUFFIXES)}")
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
            if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                rgb = _to_rgb(ImageOps.exif_transpose(image))
            else:
                rgb = _to_rgb(image)
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


def decode_all(listing: Listing, *, size: int | None) -> tuple[tuple[int, int], Iterator[Pixels]]:
    """Decode a split on all cores, in order.

    Large folders go through one decoding process per core: Pillow spends most of a thumbnail's time in the interpreter,
    where threads only take turns (32x32 JPEG, 2 cores: 7,300 images a second against 3,200). The processes are plain
    children fed through pipes, so they end with their parent however it ends, and run nothing of the caller's program.

    Args:
        listing: The files.
        size: As for `decode`.

    Returns:
        Height and width of every image in pixels, and an iterator over uint8 arrays (n, 3, H, W).

    Raises:
        CfamcError: A file is unreadable, or, without a size, images differ in theirs; names the first such file and
            counts the others. Raised for the first image at once, for the others by the iterator.
    """
    try:
        first = decode(listing.folder / listing.names[0], size=size)
    except ValueError as error:
        raise _unreadable([(str(listing.folder / listing.names[0]), str(error))]) from error
    shape = (first.shape[0], first.shape[1])
    return shape, _decode_chunks(listing, size=size, shape=shape)


class _Work(NamedTuple):
    folder: str
    names: tuple[str, ...]
    size: int | None
    shape: tuple[int, int]


class _Refused(Exception):  # noqa: N818 - it never leaves this file
    """An image that is turned down for what its header says."""


def _decode_chunks(listing: Listing, *, size: int | None, shape: tuple[int, int]) -> Iterator[Pixels]:
    failures: list[Failure] = []
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[tuple[Pixels, list[Failure]]]] = deque()
    with ExitStack() as stack:
        pool: SimpleQueue[_Decoder] | None = None
        if len(listing.names) >= PROCESSES_FROM:
            pool = SimpleQueue()
            for _ in range(workers):
                pool.put(stack.enter_context(_Decoder()))
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata is no news; what cannot be read fails
        try:
            for start in range(0, len(listing.names), CHUNK):
                work = _Work(str(listing.folder), listing.names[start : start + CHUNK], size, shape)
                waiting.append(threads.submit(_decode_chunk if pool is None else partial(_delegate, pool), work))
                if len(waiting) > 2 * workers:
                    pixels, failed = waiting.popleft().result()
                    failures += failed
                    if len(failures) >= MAX_FAILURES:
                        raise _unreadable(failures)
                    yield pixels
            while waiting:
                pixels, failed = waiting.popleft().result()
                failures += failed
                yield pixels
        finally:
            for future in waiting:
                future.cancel()
    if failures:
        raise _unreadable(failures)


def _decode_chunk(work: _Work) -> tuple[Pixels, list[Failure]]:
    pixels = np.zeros((len(work.names), 3, *work.shape), dtype=np.uint8)
    failures = []
    for row, name in enumerate(work.names):
        path = Path(work.folder, name)
        try:
            image = decode(path, size=work.size)
            if image.shape[:2] != work.shape:
                height, width = image.shape[:2]
                raise ValueError(f"is {width}x{height} where the first image is {work.shape[1]}x{work.shape[0]}")
            pixels[row] = image.transpose(2, 0, 1)  # (3, H, W)
        except ValueError as error:
            failures.append((str(path), str(error)))
    return pixels, failures


class _Decoder:
    """A child process that decodes: one JSON line in, one JSON line of failures and the raw pixels out."""

    def __init__(self) -> None:
        package_root = str(Path(__file__).parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", "from cfamc_cli.engine.folder import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # an interrupt from the terminal is the parent's affair
        )

    def __enter__(self) -> _Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()  # closes the pipes and waits

    def decode(self, work: _Work) -> tuple[Pixels, list[Failure]]:
        """Have one chunk decoded."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        count = len(work.names) * 3 * work.shape[0] * work.shape[1]
        try:
            self._process.stdin.write(json.dumps(work).encode() + b"\n")
            self._process.stdin.flush()
            head = self._process.stdout.readline()
            data = self._process.stdout.read(count)
        except BrokenPipeError:
            head = data = b""
        if not head or len(data) < count:
            raise CfamcError(
                f"a decoding process ended near {Path(work.folder, work.names[0])} (status {self._process.poll()})",
                hint="too little memory, or an image that crashes the decoder",
            )
        failures = [(path, cause) for path, cause in json.loads(head)]
        return np.frombuffer(data, dtype=np.uint8).reshape(-1, 3, *work.shape), failures


def _delegate(pool: SimpleQueue[_Decoder], work: _Work) -> tuple[Pixels, list[Failure]]:
    decoder = pool.get()  # as many as there are threads
    try:
        return decoder.decode(work)
    finally:
        pool.put(decoder)


def serve() -> None:
    """Decode what comes through stdin until it closes: the life of a decoding process."""
    for line in sys.stdin.buffer:
        folder, names, size, (height, width) = json.loads(line)
        pixels, failures = _decode_chunk(_Work(folder, tuple(names), size, (height, width)))
        sys.stdout.buffer.write(json.dumps(failures).encode() + b"\n")
        sys.stdout.buffer.write(pixels.data)
        sys.stdout.buffer.flush()


def _unreadable(failures: list[Failure]) -> CfamcError:
    path, cause = failures[0]
    others = len(failures) - 1
    more = f" (and {others} more {'image' if others == 1 else 'images'})" if others else ""
    if "the first image is" in cause:
        hint = "set data.size, such as `--set data.size=32`, to bring all images to one size"
    else:
        hint = "repair or remove the file"
    return _bad(f"{path} {cause}{more}", hint=hint, files=[{"file": name, "cause": why} for name, why in failures])


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
    if split == "train" and not any((root / name).is_dir() for name in ("test", "val")):
        with os.scandir(root) as entries:
            if any(_is_image(entry) for entry in entries):
                return root
    return None


def _required_folder(root: Path, split: Literal["train", "test"]) -> Path:
    folder = _split_folder(root, split)
    if folder is None:
        name = "training" if split == "train" else "test"
        loose = ", or without classes into it" if split == "train" else ""
        raise _bad(f"no {name} images in {root}", hint=f"put them into {root / split}/<class>/{loose}")
    return folder


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES) and entry.is_file()


def _class_names(folder: Path) -> tuple[str, ...]:
    names, loose = [], ""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.is_dir():
                names.append(entry.name)
            elif _is_image(entry):
                loose = entry.path
    if folder.name not in ("train", "test", "val"):
        return ()  # loose images beside folders of something else
    if names and loose:
        raise _bad(f"{loose} lies beside class folders", hint="move it into one of them, or away")
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


def _bad(message: str, *, hint: str = "", files: list[dict[str, str]] | None = None) -> CfamcError:
    return CfamcError(message, hint=hint, exit_code=ExitCode.BAD_DATA, details={"files": files} if files else None)
