"""The published files of known data sets: where they come from, how they are fetched and read.

CIFAR is read in its binary version and SVHN by a small reader of MATLAB arrays, rather than through torchvision:
torchvision opens CIFAR with pickle, SVHN with scipy, and writes its own progress to the terminal. A download is
checked against its publisher's MD5; what a person put in place is checked by the CRC of its own compression.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.engine.data.packs import Pixels, Raw, cached_file
from cfamc_cli.engine.sink import Talk
from cfamc_cli.errors import CfamcError, bad_data

Known = Literal["fashion-mini", "cifar10", "cifar100", "fashion-mnist", "svhn", "stl10"]
Split = Literal["train", "test"]

_TIMEOUT = 30.0  # seconds without an answer
_PIECE = 2**20  # bytes per read of a download
_CHUNK = 1024  # images per piece of a large archive


@dataclass(frozen=True)
class Remote:
    """A file that its publisher offers."""

    url: str
    md5: str  # as its publisher states it

    @property
    def name(self) -> str:
        """File name, kept in the cache."""
        return self.url.rpartition("/")[2]


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_STANFORD = "http://ufldl.stanford.edu/housenumbers"
_COATES = "http://ai.stanford.edu/~acoates/stl10"
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


_REMOTES: dict[tuple[Known, Split | None], tuple[Remote, ...]] = {  # None: one archive holds both splits
    ("cifar10", None): (Remote(f"{_TORONTO}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
    ("cifar100", None): (Remote(f"{_TORONTO}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),),
    ("fashion-mnist", "train"): (
        Remote(f"{_ZALANDO}/train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        Remote(f"{_ZALANDO}/train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
    ),
    ("fashion-mnist", "test"): (
        Remote(f"{_ZALANDO}/t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
        Remote(f"{_ZALANDO}/t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    ("svhn", "train"): (Remote(f"{_STANFORD}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),),
    ("svhn", "test"): (Remote(f"{_STANFORD}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),),
    ("stl10", None): (Remote(f"{_COATES}/stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0c7dfb"),),
}


def remote_files(dataset: Known, split: Split) -> tuple[Remote, ...]:
    """Name the published files that hold a split of a set that is not embedded."""
    return _REMOTES[dataset, None if (dataset, None) in _REMOTES else split]


def fetch(remote: Remote, folder: Path, *, talk: Talk) -> Path:
    """Return a published file, downloaded into `folder` unless it lies there.

    Args:
        remote: What to fetch.
        folder: Where it lies or will lie.
        talk: Hears the progress, in bytes.

    Returns:
        The file.

    Raises:
        CfamcError: It cannot be downloaded, or what came is not what was published.
    """
    path = folder / remote.name
    if path.is_file():
        return path
    hint = f"download {remote.url} by other means and put it at {path}"
    talk.message(f"downloading {remote.url} to {path}")
    digest = hashlib.md5(usedforsecurity=False)
    with cached_file(path) as temporary:
        try:
            request = urllib.request.Request(remote.url, headers={"User-Agent": "cfamc"})
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, temporary.open("wb") as file:
                total = int(answer.headers.get("Content-Length") or 0)
                done = 0
                while piece := answer.read(_PIECE):
                    digest.update(piece)
                    file.write(piece)
                    done += len(piece)
                    talk.progress(f"downloading {remote.name}", done, max(total, done), {})
        except (http.client.InvalidURL, UnicodeError):  # its text repeats what may be a password
            raise bad_data(f"cannot download {remote.name}: the proxy of the environment is no address", hint) from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            cause = getattr(error, "reason", None) or error
            raise bad_data(f"cannot download {remote.name}: {cause}", hint) from error
        if total and done < total:
            raise bad_data(f"the download of {remote.name} was cut at {done:,} of {total:,} bytes", hint)
        if digest.hexdigest() != remote.md5:
            raise bad_data(f"{remote.name} is not what was published: MD5 {digest.hexdigest()}", hint)
    return path


def read(dataset: Known, split: Split, files: tuple[Path, ...]) -> Raw:
    """Read a split from its published files.

    `stl10` has 5,000 labelled training images and 100,000 unlabelled ones; its training split holds both, the
    labelled ones first and the others labelled -1.

    Args:
        dataset: Which data set.
        split: Which images.
        files: The files of `remote_files`, in that order.

    Returns:
        The split; large ones are read piece by piece while the chunks are iterated over.

    Raises:
        CfamcError: A file is damaged or holds something else.
    """
    path = files[0]
    try:
        match dataset:
            case "cifar10" | "cifar100":
                raw = _read_cifar(path, dataset, split)
            case "fashion-mini" | "fashion-mnist":
                raw = _read_idx(files[0], files[1])
            case "svhn":
                raw = _read_svhn(path)
            case "stl10":
                raw = _read_stl10(path, split)
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    known = KNOWN_SETS[dataset]
    expected = known.train if split == "train" else known.test
    if raw.shape != (expected, 3, known.size, known.size) or raw.labels is None or len(raw.labels) != expected:
        raise bad_data(f"{path} does not hold the {expected:,} {split} images of {dataset}", "remove it and try again")
    return raw


_DAMAGED = (OSError, EOFError, KeyError, ValueError, IndexError, struct.error, tarfile.TarError, zlib.error)


def _damaged(path: Path, error: Exception) -> CfamcError:
    return bad_data(f"{path} is damaged: {error or type(error).__name__}", "remove it, and it is downloaded again")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file")
    with file:
        return file.read()


def _read_cifar(path: Path, dataset: Literal["cifar10", "cifar100"], split: Split) -> Raw:
    # A record is one label byte (CIFAR-100: coarse, then fine), then 3 x 32 x 32 pixels.
    if dataset == "cifar10":
        folder, names, label_bytes = "cifar-10-batches-bin", "batches.meta.txt", 1
        parts = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    else:
        folder, names, label_bytes = "cifar-100-binary", "fine_label_names.txt", 2
        parts = [f"{split}.bin"]
    with tarfile.open(path, "r:gz") as archive:
        classes = tuple(_member(archive, f"{folder}/{names}").decode().split())
        data = b"".join(_member(archive, f"{folder}/{part}") for part in parts)
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, label_bytes + 3 * 32 * 32)
    labels = records[:, label_bytes - 1].astype(np.int64)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return Raw(images.shape, iter([images]), labels, classes)


def _read_idx(images_path: Path, labels_path: Path) -> Raw:
    images, labels = gzip.decompress(images_path.read_bytes()), gzip.decompress(labels_path.read_bytes())
    magic, count, height, width = struct.unpack(">4I", images[:16])
    label_magic, label_count = struct.unpack(">2I", labels[:8])
    if (magic, label_magic) != (0x803, 0x801) or count != label_count:
        raise ValueError("not a pair of idx files")
    grey = np.frombuffer(images, dtype=np.uint8, offset=16).reshape(count, 1, height, width)
    targets = np.frombuffer(labels, dtype=np.uint8, offset=8).astype(np.int64)
    rgb = np.repeat(grey, 3, axis=1)
    return Raw(rgb.shape, iter([rgb]), targets, _FASHION)


def _read_svhn(path: Path) -> Raw:
    arrays = _read_matlab(path.read_bytes())
    images = np.ascontiguousarray(arrays["X"].reshape(32, 32, 3, -1, order="F").transpose(3, 2, 0, 1))  # (N, 3, H, W)
    labels = arrays["y"].astype(np.int64) % 10  # the digit 0 is labelled 10 there
    return Raw(images.shape, iter([images]), labels, tuple("0123456789"))


def _read_matlab(data: bytes) -> dict[str, Pixels]:
    """Flat uint8 arrays by name from a MATLAB 5 file, little-endian, compressed or not."""
    arrays = {}
    for kind, element in _matlab_elements(data, 128):
        if kind == 15:  # compressed: one matrix with its tag
            ((_, element),) = _matlab_elements(zlib.decompress(element))
        _, _, (_, name), (_, values) = _matlab_elements(element)  # flags and dimensions come first
        arrays[name.decode()] = np.frombuffer(values, dtype=np.uint8)
    return arrays


def _matlab_elements(data: bytes, position: int = 0) -> Iterator[tuple[int, bytes]]:
    while position < len(data):
        kind, length = struct.unpack_from("<2I", data, position)
        if small := kind >> 16:  # a small element: length and kind share the first word, the data is the second
            yield kind & 0xFFFF, data[position + 4 : position + 4 + small]
            position += 8
            continue
        element = data[position + 8 : position + 8 + length]
        if len(element) < length:
            raise ValueError("cut short")
        yield kind, element
        position += 8 + (length if kind == 15 else -(-length // 8) * 8)


def _read_stl10(path: Path, split: Split) -> Raw:
    names = ["train_X.bin", "unlabeled_X.bin"] if split == "train" else ["test_X.bin"]
    with tarfile.open(path, "r:gz") as archive:
        classes = tuple(_member(archive, "stl10_binary/class_names.txt").decode().split())
        labels = np.frombuffer(_member(archive, f"stl10_binary/{split}_y.bin"), dtype=np.uint8).astype(np.int64) - 1
        pixels = 3 * 96 * 96
        count = sum(archive.getmember(f"stl10_binary/{name}").size // pixels for name in names)
    labels = np.concatenate([labels, np.full(count - len(labels), -1, dtype=np.int64)])
    return Raw((count, 3, 96, 96), _stl10_chunks(path, names), labels, classes)


def _stl10_chunks(path: Path, names: list[str]) -> Iterator[Pixels]:
    size = 3 * 96 * 96
    try:
        with tarfile.open(path, "r:gz") as archive:
            for name in names:
                file = archive.extractfile(f"stl10_binary/{name}")
                assert file is not None, "counted before"
                with file:
                    while piece := file.read(_CHUNK * size):
                        columns = np.frombuffer(piece, dtype=np.uint8).reshape(-1, 3, 96, 96)
                        yield columns.transpose(0, 1, 3, 2)  # stored column by column
    except _DAMAGED as error:
        raise _damaged(path, error) from error
