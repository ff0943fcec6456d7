"""Data sets: the embedded one, image folders as people really have them, packs, and how batches leave."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import select
import signal
import socket
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor
from torch.nn import functional

from cfamc_cli.datasets import FASHION_MINI_FOLDER, KNOWN_SETS, make_fashion_mini
from cfamc_cli.engine.data import archives, folder, packs
from cfamc_cli.engine.data import sets as data
from cfamc_cli.engine.data.sets import ImageSet, batch, class_balanced_split, load, to_device
from cfamc_cli.engine.randomness import addressed_generator, addressed_seed, epoch_order
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.schema import Data, Split

CPU = torch.device("cpu")
Name = Literal["fashion-mini", "cifar10", "cifar100", "fashion-mnist", "svhn", "stl10", "folder"]


def Settings(  # noqa: N802 - a [data] table, short
    dataset: Name = "folder",
    root: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    holdout: int = 0,
) -> Data:
    return Data(dataset=dataset, root=root, size=size, limit=limit, holdout=holdout)


class Listener(NullTalk):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.progressed: list[tuple[str, int, int]] = []
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, values: Mapping[str, float | str]) -> None:
        self.progressed.append((task, done, total))


@pytest.fixture(autouse=True)
def _no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def read(settings: Data, cache: Path, split: Split = "train", *, seed: int = 0) -> ImageSet:
    return load(settings, split, seed=seed, cache=cache, talk=NullTalk())


def refused(settings: Data, cache: Path, split: Literal["train", "test"] = "train") -> CfamcError:
    with pytest.raises(CfamcError) as caught:
        read(settings, cache, split)
    assert caught.value.exit_code == ExitCode.BAD_DATA
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


def noise(height: int = 8, width: int = 8, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_folder(root: Path, *, per_class: int = 3, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(per_class):
                noise(seed=100 * label + index).save(root / split / name / f"{index}.png")
    return root


def packs_in(cache: Path) -> int:
    """How many packs, each a manifest and its pixels, and nothing else, lie in a cache."""
    manifests = sorted(path.stem for path in (cache / "packs").glob("*.json"))
    pixels = sorted(path.stem for path in (cache / "packs").glob("*.npy"))
    assert len(list((cache / "packs").iterdir())) == len(manifests) + len(pixels)
    assert all(name.rpartition("-")[0] == stem for name, stem in zip(pixels, manifests, strict=True))
    return len(manifests)


# The embedded set


def test_fashion_mini_is_balanced_real_and_small(tmp_path: Path) -> None:
    for split, per_class in (("train", 600), ("test", 100)):
        images = read(Settings("fashion-mini"), tmp_path, split)  # type: ignore[arg-type]
        assert images.images.shape == (10 * per_class, 3, 28, 28)
        assert images.images.dtype == torch.uint8
        assert images.require_labels().bincount().tolist() == [per_class] * 10
        assert images.classes[9] == "Ankle boot"
        assert "MIT" in images.licence
        assert len({image.tobytes() for image in images.images.numpy()}) > 0.99 * len(images)
    assert sum(path.stat().st_size for path in FASHION_MINI_FOLDER.iterdir()) <= 4 * 2**20
    assert not list(tmp_path.iterdir()), "nothing is cached"


def test_fashion_mini_that_was_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in FASHION_MINI_FOLDER.iterdir():
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[-1] ^= 1
        (tmp_path / path.name).write_bytes(gzip.compress(content, 1))
    monkeypatch.setattr(data, "FASHION_MINI_FOLDER", tmp_path)
    assert "not what was shipped" in refused(Settings("fashion-mini"), tmp_path).message


def test_the_subset_is_the_first_images_of_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_fashion_mini, "IMAGES_PER_CLASS", {"train": 6, "t10k": 1})
    make_fashion_mini.cut(FASHION_MINI_FOLDER, tmp_path / "cut")
    shrink(monkeypatch, "fashion-mnist", 60, 10)
    whole = read(Settings("fashion-mini"), tmp_path)
    labels = whole.require_labels()
    first = torch.cat([(labels == label).nonzero().flatten()[:6] for label in range(10)]).sort().values
    assert (
        read(Settings("fashion-mnist", root=str(tmp_path / "cut")), tmp_path).fingerprint
        == whole.take(first).fingerprint
    )


def test_size_and_limit(tmp_path: Path) -> None:
    whole = read(Settings("fashion-mini"), tmp_path, "test")
    resized = read(Settings("fashion-mini", size=14), tmp_path, "test")
    assert resized.images.shape == (1000, 3, 14, 14)
    expected = functional.interpolate(whole.images.float(), size=14, mode="bilinear", antialias=True)
    assert (resized.images - expected).abs().max() <= 1
    few = read(Settings("fashion-mini", limit=50), tmp_path)
    again = read(Settings("fashion-mini", limit=60), tmp_path)
    other = read(Settings("fashion-mini", limit=50), tmp_path, seed=1)
    assert torch.equal(few.images, again.images[:50])
    assert len({few.fingerprint, again.fingerprint, other.fingerprint}) == 3
    assert len(read(Settings("fashion-mini", limit=50), tmp_path, "test")) == 1000
    with pytest.raises(CfamcError, match=r"data\.limit is 6,001 but fashion-mini has 6,000") as caught:
        read(Settings("fashion-mini", limit=6001), tmp_path)
    assert caught.value.exit_code == ExitCode.INVALID


# Images that are held out


def rows(images: ImageSet) -> Counter[tuple[bytes, int]]:
    assert images.labels is not None
    pairs = zip(images.images.numpy(), images.labels.tolist(), strict=True)
    return Counter((image.tobytes(), label) for image, label in pairs)


def test_held_out_images_are_even_and_the_same_for_every_seed(tmp_path: Path) -> None:
    settings = Settings("fashion-mini", holdout=1000)
    whole, held, left = (
        read(Settings("fashion-mini"), tmp_path),
        read(settings, tmp_path, "holdout"),
        read(settings, tmp_path),
    )
    assert held.require_labels().bincount().tolist() == [100] * 10
    assert left.require_labels().bincount().tolist() == [500] * 10
    assert rows(held) + rows(left) == rows(whole)
    shuffled = torch.randperm(6000, generator=addressed_generator("holdout"))
    labels = whole.require_labels()
    chosen = torch.cat([shuffled[labels[shuffled] == label][:100] for label in range(10)]).sort().values
    assert held.fingerprint == whole.take(chosen).fingerprint
    assert (held.split, left.split, held.used().split) == ("holdout", "train", "holdout")
    few = {seed: Settings("fashion-mini", holdout=1000, limit=50) for seed in (0, 1)}
    for seed, limited in few.items():
        assert read(limited, tmp_path, "holdout", seed=seed).fingerprint == held.fingerprint
        assert read(settings, tmp_path, seed=seed).fingerprint == left.fingerprint
        assert rows(read(limited, tmp_path, seed=seed)) <= rows(left)
        assert len(read(limited, tmp_path, seed=seed)) == 50
    assert read(few[0], tmp_path, seed=0).fingerprint != read(few[1], tmp_path, seed=1).fingerprint
    fewer = read(Settings("fashion-mini", holdout=13), tmp_path, "holdout")
    assert sorted(fewer.require_labels().bincount().tolist()) == [1] * 7 + [2] * 3
    assert rows(fewer) <= rows(held), "fewer are some of them"
    fewest = read(Settings("fashion-mini", holdout=10), tmp_path, "holdout")
    assert fewest.require_labels().bincount().tolist() == [1] * 10
    assert read(settings, tmp_path, "test").fingerprint == read(Settings("fashion-mini"), tmp_path, "test").fingerprint
    with pytest.raises(CfamcError, match=r"5,001 but fashion-mini has 5,000 training images beside those held out"):
        read(Settings("fashion-mini", holdout=1000, limit=5001), tmp_path)


def test_images_without_labels_are_held_out_by_a_plain_shuffle(tmp_path: Path) -> None:
    for index in range(7):
        (tmp_path / "images").mkdir(exist_ok=True)
        noise(seed=index).save(tmp_path / "images" / f"{index}.png")
    whole, settings = Settings(root=str(tmp_path / "images")), Settings(root=str(tmp_path / "images"), holdout=3)
    order = torch.randperm(7, generator=addressed_generator("holdout"))
    for split, part in (("holdout", order[:3]), ("train", order[3:])):
        expected = read(whole, tmp_path / "cache").take(part.sort().values)
        for seed in (0, 1):
            found = read(settings, tmp_path / "cache", split, seed=seed)  # type: ignore[arg-type]
            assert found.labels is None
            assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        (9, "data.holdout is 9 but folder has 9 training images"),
        (10, "data.holdout is 10 but folder has 9 training images"),
        (2, "data.holdout is 2, fewer than one image of each of the 3 classes of folder"),
        (5, "data.holdout is 5, which takes every training image of class cat"),
    ],
)
def test_a_holdout_that_leaves_a_side_without_a_class_is_refused(tmp_path: Path, holdout: int, message: str) -> None:
    root = make_folder(tmp_path / "images", classes=("ant", "bee", "cat"), per_class=4)
    for index in (1, 2, 3):
        (root / "train" / "cat" / f"{index}.png").unlink()
    for split in ("train", "holdout"):
        with pytest.raises(CfamcError) as caught:
            read(Settings(root=str(root), holdout=holdout), tmp_path / "cache", split)
        assert (caught.value.message, caught.value.exit_code) == (message, ExitCode.INVALID)
        assert caught.value.hint


# Image folders


def test_a_folder_is_packed_once_and_a_changed_one_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = make_folder(tmp_path / "images"), tmp_path / "cache"
    listener = Listener()
    first = load(Settings(root=str(root)), "train", seed=0, cache=cache, talk=listener)
    assert listener.progressed[-1][1:] == (6, 6)
    assert first.classes == ("ant", "bee")
    assert first.require_labels().tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.from_numpy(np.asarray(noise(seed=101)).copy()).permute(2, 0, 1)
    assert torch.equal(first.images[4], expected)
    assert first.fingerprint == packs.fingerprint(first.images, first.labels, first.classes)

    with monkeypatch.context() as patched:
        patched.setattr(folder, "decode", lambda *_, **__: pytest.fail("decoded again"))
        assert torch.equal(read(Settings(root=str(root)), cache).images, first.images)

    noise(seed=7).save(root / "train" / "bee" / "1.png")
    os.utime(root / "train" / "bee" / "1.png", ns=(1, 1))
    second = read(Settings(root=str(root)), cache)
    assert second.fingerprint != first.fingerprint
    assert torch.equal(first.images[4], expected), "the old pack stays mapped"
    assert packs_in(cache) == 1, "the old pack is replaced, no temp file stays"


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    here = read(Settings(root=str(make_folder(tmp_path / "a"))), tmp_path / "cache")
    there = read(Settings(root=str(make_folder(tmp_path / "b c\u00e9\nd"))), tmp_path / "cache")
    named = read(Settings(root=str(make_folder(tmp_path / "e", classes=("ant", "cat")))), tmp_path / "cache")
    assert here.fingerprint == there.fingerprint != named.fingerprint
    assert torch.equal(here.images, named.images)


@pytest.mark.parametrize("cut_at", [0, 8, 15, 16, 200, -1])
@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_a_damaged_pack_is_made_again(tmp_path: Path, cut_at: int, suffix: str) -> None:
    root, cache = make_folder(tmp_path / "images"), tmp_path / "cache"
    first = read(Settings(root=str(root)), cache)
    kept = first.images.clone()
    (path,) = (cache / "packs").glob(f"*{suffix}")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:cut_at])
    assert torch.equal(read(Settings(root=str(root)), cache).images, kept)
    assert path.read_bytes() == content


@pytest.mark.parametrize("part", ["pixels", "labels"])
def test_a_pack_whose_content_changed_is_made_again(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the old fingerprint, and as large as before; an unchanged one is read through once in a process."""
    settings, cache, listener = Settings(root=str(make_folder(tmp_path / "images"))), tmp_path / "cache", Listener()
    first = read(settings, cache)
    kept, labels = first.images.clone(), first.require_labels().clone()
    (path,) = (cache / "packs").glob("*.npy" if part == "pixels" else "*.json")
    content = path.read_bytes()
    path.unlink()  # what is mapped stays
    changed = content[:-50] + bytes(50) if part == "pixels" else content.replace(b"[0, 0, 0, 1", b"[0, 0, 1, 1")
    assert len(changed) == len(content)
    assert changed != content
    path.write_bytes(changed)
    monkeypatch.setattr(packs, "_whole", set())  # as a process that starts
    again = load(settings, "train", seed=0, cache=cache, talk=listener)
    assert torch.equal(again.images, kept)
    assert torch.equal(again.require_labels(), labels)
    assert again.fingerprint == first.fingerprint
    (warning,) = listener.warnings
    assert warning.endswith(".npy has changed since it was packed: it is packed anew")

    with mock.patch.object(packs, "fingerprint", side_effect=packs.fingerprint) as computed:
        assert [read(settings, cache).fingerprint for _ in range(3)] == [first.fingerprint] * 3
    assert computed.call_count == 1


@pytest.mark.parametrize("content", ["[]", "7", "null", '{"key": null}'])
def test_a_manifest_of_something_else_is_written_again(tmp_path: Path, content: str) -> None:
    root, cache = make_folder(tmp_path / "images"), tmp_path / "cache"
    kept = read(Settings(root=str(root)), cache).images.clone()
    (path,) = (cache / "packs").glob("*.json")
    path.unlink()
    path.write_text(content)
    assert torch.equal(read(Settings(root=str(root)), cache).images, kept)


def test_pixels_beside_the_manifest_of_others_are_no_pack(tmp_path: Path) -> None:
    def pack(value: int) -> packs.Pack:
        pixels, labels = np.full((1, 3, 2, 2), value, dtype=np.uint8), np.array([value])
        raw = packs.Raw(pixels.shape, iter([pixels]), labels, (f"class {value}",))
        return packs.packed(tmp_path, "x", key=f"state {value}", make=lambda: raw, task="", talk=NullTalk())

    pack(1)
    (first,) = tmp_path.glob("*.npy")
    kept = first.read_bytes()
    pack(2)
    first.write_bytes(kept)  # as where two processes pack a folder that changes between them, and one is killed
    again = pack(1)
    assert again.labels is not None
    assert (again.labels.tolist(), again.classes, again.images.unique().tolist()) == ([1], ("class 1",), [1])


def test_many_at_once_pack_the_same_folder(tmp_path: Path) -> None:
    root, cache = make_folder(tmp_path / "images"), tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        sets = list(pool.map(lambda _: read(Settings(root=str(root)), cache), range(8)))
    assert len({images.fingerprint for images in sets}) == 1
    assert all(packs.fingerprint(s.images, s.labels, s.classes) == s.fingerprint for s in sets)
    assert packs_in(cache) == 1


def test_decoding_processes_agree_with_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images", per_class=20)
    monkeypatch.setattr(folder, "CHUNK", 7)
    threads = read(Settings(root=str(root)), tmp_path / "a")
    monkeypatch.setattr(folder, "PROCESSES_FROM", 1)
    assert read(Settings(root=str(root)), tmp_path / "b").fingerprint == threads.fingerprint
    (root / "train" / "ant" / "3.png").write_bytes(b"no")
    error = refused(Settings(root=str(root)), tmp_path / "b")
    assert "ant/3.png is not an image" in error.message
    assert packs_in(tmp_path / "b") == 1, "only the old pack"


def test_a_decoding_process_that_dies_is_an_error_with_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images")
    decode, parent = folder.decode, os.getpid()

    def fatal(path: Path, *, size: int | None) -> packs.Pixels:
        if os.getpid() != parent and path.name == "2.png":
            os._exit(9)
        return decode(path, size=size)

    monkeypatch.setattr(folder, "decode", fatal)
    monkeypatch.setattr(folder, "PROCESSES_FROM", 1)
    monkeypatch.setattr(folder, "CHUNK", 2)
    with pytest.raises(CfamcError, match=r"a decoding process ended near .*/ant/[02]\.png") as caught:
        read(Settings(root=str(root)), tmp_path / "cache")
    assert caught.value.exit_code == ExitCode.FAILED
    assert not list((tmp_path / "cache" / "packs").iterdir())


def test_decoding_processes_end_with_a_parent_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = folder.list_images(make_folder(tmp_path / "images", per_class=20), "train")
    monkeypatch.setattr(folder, "PROCESSES_FROM", 1)
    monkeypatch.setattr(folder, "CHUNK", 1)
    monkeypatch.setattr(folder, "decode", lambda *_, **__: np.zeros((512, 512, 3), np.uint8))  # more than a pipe holds
    worker, told = os.pipe()  # its end closes when the last process that inherited it is gone
    child = os.fork()
    if child == 0:
        try:
            chunks = folder.read(listing, size=None).chunks
            next(chunks)
            os.write(told, b"+")
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    with os.fdopen(worker, "rb", buffering=0) as ends:
        assert ends.read(1) == b"+"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert select.select([ends], [], [], 5)[0], "a worker outlives its parent"
        assert ends.read(1) == b""


def test_order_labels_and_pixels_of_a_folder_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greys = {"bee/10.png": 4, "bee/9.png": 5, "ant/b/0.png": 2, "ant/a.png": 1, "ant/z.png": 3}  # sorted as text
    for name, grey in greys.items():
        path = tmp_path / "images" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), (grey, 10 * grey, 20 * grey)).save(path)
    for processes_from in (1000, 1):
        monkeypatch.setattr(folder, "PROCESSES_FROM", processes_from)
        monkeypatch.setattr(folder, "CHUNK", 2)
        images = read(Settings(root=str(tmp_path / "images")), tmp_path / str(processes_from))
        assert images.images.shape == (5, 3, 9, 12)
        assert (images.images[:, :, 4, 5] == torch.tensor([[g, 10 * g, 20 * g] for g in range(1, 6)])).all()
        assert images.require_labels().tolist() == [0, 0, 0, 1, 1]
    again = read(Settings(root=str(tmp_path / "images")), tmp_path / "1")
    assert torch.equal(again.images, images.images)
    assert torch.equal(again.require_labels(), images.require_labels())
    assert (again.classes, again.fingerprint) == (images.classes, images.fingerprint)


def test_decoding_in_processes_leaves_the_callers_random_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "PROCESSES_FROM", 1)
    before = torch.get_rng_state()
    read(Settings(root=str(make_folder(tmp_path / "images"))), tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_covers_shape_labels_names_and_every_pixel() -> None:
    images = torch.arange(5000 * 12, dtype=torch.int64).remainder(251).to(torch.uint8).view(5000, 3, 2, 2)
    labels = torch.arange(5000) % 3
    first = packs.fingerprint(images, labels, ("a", "b", "c"))
    # Frozen: evaluations name the data that they were made on by it.
    assert first == "35f907bb1002fd050a5c476d7c49f7e5f6ea06e515b433528ee48761d5f1ff16"
    last, middle, swapped = images.clone(), images.clone(), labels.clone()
    last[-1, -1, -1, -1] += 1
    middle[4096, 0, 0, 0] += 1
    swapped[0] = 1
    others = [
        packs.fingerprint(last, labels, ("a", "b", "c")),
        packs.fingerprint(middle, labels, ("a", "b", "c")),
        packs.fingerprint(images, swapped, ("a", "b", "c")),
        packs.fingerprint(images, None, ("a", "b", "c")),
        packs.fingerprint(images, labels, ("a", "c", "b")),
        packs.fingerprint(images.view(5000, 3, 1, 4), labels, ("a", "b", "c")),
        packs.fingerprint(images[:4999], labels[:4999], ("a", "b", "c")),
    ]
    assert len({first, *others}) == 8
    assert packs.fingerprint(images.transpose(2, 3).contiguous().transpose(2, 3), labels, ("a", "b", "c")) == first


def test_unlabelled_folders(tmp_path: Path) -> None:
    for place in (tmp_path / "a" / "train", tmp_path / "b"):
        place.mkdir(parents=True)
        for index in range(3):
            noise(seed=index).save(place / f"{index}.png")
    loose, bare = (read(Settings(root=str(tmp_path / name)), tmp_path / "cache") for name in "ab")
    assert loose.labels is None
    assert loose.classes == ()
    assert loose.fingerprint == bare.fingerprint
    with pytest.raises(CfamcError, match="have no labels"):
        loose.require_labels()
    assert "no test images" in refused(Settings(root=str(tmp_path / "b")), tmp_path / "cache", "test").message


def test_class_folders_that_no_classifier_can_use(tmp_path: Path) -> None:
    root, cache = make_folder(tmp_path / "one", classes=("ant",)), tmp_path / "cache"
    with pytest.raises(CfamcError, match="only one class, ant") as caught:
        read(Settings(root=str(root)), cache).require_labels()
    assert caught.value.exit_code == ExitCode.BAD_DATA
    root = make_folder(tmp_path / "two")
    (root / "train" / "cat").mkdir()
    images = read(Settings(root=str(root)), cache)
    assert images.classes == ("ant", "bee", "cat")
    with pytest.raises(CfamcError, match="no images of class cat"):
        images.require_labels()
    assert read(Settings(root=str(root)), cache, "test").classes == ("ant", "bee", "cat"), "labels follow training"
    (root / "test" / "dog").mkdir()
    assert "dog is a class that" in refused(Settings(root=str(root)), cache, "test").message


def test_of_folders_of_classes_alone_a_fifth_of_each_is_for_testing(tmp_path: Path) -> None:
    root = tmp_path / "whole"
    for name, count in (("ant", 10), ("bee", 4), ("cat", 1)):
        (root / name / "deep").mkdir(parents=True)
        for number in range(count):
            noise(seed=number).save(root / name / "deep" / f"{number:02d}.png")
    train, test = (folder.list_images(root, split) for split in ("train", "test"))
    assert Counter(train.labels) == {0: 8, 1: 3, 2: 1}
    assert Counter(test.labels) == {0: 2, 1: 1}
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert sorted(train.names + test.names) == sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    assert [name.split("/")[0] for name in train.names] == [train.classes[label] for label in train.labels or ()]
    assert folder.list_images(root, "test") == test
    found = read(Settings(root=str(root)), tmp_path / "cache", "test")
    assert (found.split, len(found), found.classes) == ("test", 3, train.classes)
    (root / "loose.png").write_bytes((root / "cat/deep/00.png").read_bytes())
    assert folder.list_images(root, "train").names == ("loose.png",)  # beside it folders may be of anything
    assert "no test images" in refused(Settings(root=str(root)), tmp_path / "cache", "test").message


def test_folders_that_are_not_there_or_empty_or_mixed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert "does not exist" in refused(Settings(root=str(tmp_path / "no")), cache).message
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(Settings(root=str(tmp_path / "file")), cache).message
    (tmp_path / "empty").mkdir()
    assert "no training images" in refused(Settings(root=str(tmp_path / "empty")), cache).message
    (tmp_path / "empty" / "train" / "ant").mkdir(parents=True)
    assert "no images in" in refused(Settings(root=str(tmp_path / "empty")), cache).message
    root = make_folder(tmp_path / "mixed")
    noise().save(root / "train" / "loose.png")
    assert "loose.png lies beside class folders" in refused(Settings(root=str(root)), cache).message


def test_odd_company_is_passed_over(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "train" / ".git").mkdir()
    (root / "train" / "ant" / "._0.png").write_bytes(b"finder")
    (root / "train" / "ant" / "Thumbs.db").write_bytes(b"windows")
    os.mkfifo(root / "train" / "ant" / "pipe.png")
    (root / "train" / "ant" / "loop").symlink_to(root / "train" / "ant")
    (root / "train" / "bee" / "deep").mkdir()
    noise().save(root / "train" / "bee" / "deep" / "x.PNG")
    assert read(Settings(root=str(root)), tmp_path / "cache").require_labels().tolist() == [0, 0, 0, 1, 1, 1, 1]


def png_header(width: int, height: int) -> bytes:
    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    ihdr = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", ihdr) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("cut.jpg", jpeg(noise(64, 64))[:-500], "cannot be read: image file is truncated"),
        ("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image of a known format"),
        ("text.jpg", b"not an image", "is not an image of a known format"),
        ("empty.png", b"", "is not an image of a known format"),
        ("dot.jpg", jpeg(noise(1, 1)), "is 1x1: smaller than 4 pixels"),
        ("ruler.jpg", jpeg(noise(4000, 1)), "is 1x4000: smaller than 4 pixels"),
        ("huge.png", png_header(20_000, 20_000), "has more than 67,108,864 pixels"),
        ("large.png", png_header(9_000, 9_000), "is 9000x9000: more than 67,108,864 pixels"),
        ("other.png", jpeg(noise(9, 8)), "is 8x9 where the first image is 8x8"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    root = make_folder(tmp_path / "images")
    (root / "train" / "bee" / name).write_bytes(content)
    error = refused(Settings(root=str(root)), tmp_path / "cache")
    assert error.message.startswith(f"{root}/train/bee/{name} {cause}")
    assert error.hint
    assert not list((tmp_path / "cache" / "packs").iterdir())
    # The same where it is the first image of the folder.
    (root / "train" / "bee" / name).rename(root / "train" / "ant" / f"!{name}")
    assert refused(Settings(root=str(root)), tmp_path / "cache").message.startswith(f"{root}/train/ant/")


def test_every_broken_file_is_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    for name in ("1.png", "2.png"):
        (root / "train" / "ant" / name).write_bytes(b"")
    error = refused(Settings(root=str(root)), tmp_path / "cache")
    assert error.message.endswith("(and 1 more image)")
    assert [Path(str(e["file"])).name for e in error.details["files"]] == ["1.png", "2.png"]  # type: ignore[attr-defined]


def test_modes_become_rgb(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    rgb = noise()
    palette = rgb.quantize(8)
    palette.info["transparency"] = bytes([0, 128, 255])
    cases = {
        "grey.png": (Image.fromarray(grey), grey[..., None].repeat(3, 2)),
        "grey16.png": (Image.fromarray(grey.astype(np.uint16) * 257), grey[..., None].repeat(3, 2)),
        "alpha.png": (Image.merge("RGBA", (*rgb.split(), Image.fromarray(grey))), np.asarray(rgb)),
        "palette.png": (palette, np.asarray(rgb.quantize(8).convert("RGB"))),
        "bit.png": (Image.fromarray(grey > 128), np.where(grey > 128, 255, 0)[..., None].repeat(3, 2)),
        "cmyk.tif": (rgb.convert("CMYK"), np.asarray(rgb)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(folder.decode(tmp_path / name, size=None), expected, err_msg=name)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(folder.decode(tmp_path / "cmyk.jpg", size=None).astype(int) - np.asarray(rgb)).mean() < 8
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="floating-point"):
        folder.decode(tmp_path / "float.tif", size=None)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = noise(8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.save(tmp_path / "turned.png", exif=exif)
    turned = folder.decode(tmp_path / "turned.png", size=None)
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))


def test_resize_cuts_the_centred_square(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    whole = np.asarray(Image.fromarray(pixels).resize((12, 4), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(folder.decode(tmp_path / "wide.png", size=4), whole[:, 4:8])
    np.testing.assert_array_equal(folder.decode(tmp_path / "wide.png", size=8), pixels[:, 8:16])
    tall = np.random.default_rng(0).integers(0, 256, (25, 10, 3), dtype=np.uint8)
    Image.fromarray(tall).save(tmp_path / "tall.png")  # 15 rows too many: 7 go above, 8 below
    np.testing.assert_array_equal(folder.decode(tmp_path / "tall.png", size=10), tall[7:17])
    square = torch.from_numpy(tall[7:17].copy()).permute(2, 0, 1)[None].float()
    halved = functional.interpolate(square, size=5, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    within = slice(1, -1)  # at the ends the filter also sees rows beyond the square
    assert np.abs(folder.decode(tmp_path / "tall.png", size=5) - halved.numpy())[within].max() <= 1


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(CfamcError, match=r"cannot use .*cache") as caught:
        read(Settings(root=str(root)), tmp_path / "cache")
    assert caught.value.exit_code == ExitCode.FAILED


# Known sets


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, train: int, test: int) -> None:
    monkeypatch.setitem(KNOWN_SETS, name, KNOWN_SETS[name]._replace(train=train, test=test))


def random_images(count: int, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def test_cifar_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, "cifar10", 10, 2)
    shrink(monkeypatch, "cifar100", 10, 2)
    images = random_images(10, 32)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        add(archive, "cifar-10-batches-bin/batches.meta.txt", "\n".join("abcdefghij").encode() + b"\n\n")
        for part in range(5):
            rows = [bytes([i]) + images[i].tobytes() for i in (2 * part, 2 * part + 1)]
            add(archive, f"cifar-10-batches-bin/data_batch_{part + 1}.bin", b"".join(rows))
    found = read(Settings("cifar10", root=str(tmp_path)), tmp_path / "cache")
    assert torch.equal(found.images, torch.from_numpy(images))
    assert found.require_labels().tolist() == list(range(10))
    assert found.classes == tuple("abcdefghij")
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    with pytest.raises(CfamcError, match=r"does not hold cifar-10-binary\.tar\.gz"):
        read(Settings("cifar10", root=str(tmp_path)), tmp_path / "cache", "test")
    assert len(read(Settings("cifar10", root=str(tmp_path)), tmp_path / "cache")) == 10, "packed"

    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as archive:
        add(archive, "cifar-100-binary/fine_label_names.txt", "\n".join(f"c{i}" for i in range(100)).encode())
        rows = [bytes([0, 90 + i]) + images[i].tobytes() for i in range(10)]
        add(archive, "cifar-100-binary/train.bin", b"".join(rows))
    found = read(Settings("cifar100", root=str(tmp_path), size=16), tmp_path / "cache")
    assert found.labels is not None
    assert found.labels.tolist() == list(range(90, 100))
    assert found.images.shape == (10, 3, 16, 16)
    halved = functional.interpolate(torch.from_numpy(images).float(), size=16, mode="bilinear", antialias=True)
    assert (found.images - halved).abs().max() <= 1


def test_fashion_mnist_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, "fashion-mnist", 6000, 1000)
    full = read(Settings("fashion-mnist", root=str(FASHION_MINI_FOLDER)), tmp_path)
    mini = read(Settings("fashion-mini"), tmp_path)
    assert torch.equal(full.images, mini.images)
    assert full.fingerprint == mini.fingerprint


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_matlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool) -> None:
    shrink(monkeypatch, "svhn", 10, 2)
    images = random_images(10, 32)
    labels = np.arange(1, 11, dtype=np.uint8)[:, None]
    content = {"X": images.transpose(2, 3, 1, 0), "y": labels}
    savemat(tmp_path / "train_32x32.mat", content, do_compression=compressed)
    found = read(Settings("svhn", root=str(tmp_path)), tmp_path / "cache")
    assert torch.equal(found.images, torch.from_numpy(images))
    assert found.require_labels().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is damaged" in refused(Settings("svhn", root=str(tmp_path)), tmp_path / "new").message


def test_stl10_keeps_its_unlabelled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, "stl10", 13, 2)
    images = random_images(13, 96)
    with tarfile.open(tmp_path / "stl10_binary.tar.gz", "w:gz") as archive:
        stored = images.transpose(0, 1, 3, 2)
        add(archive, "stl10_binary/unlabeled_X.bin", stored[10:].tobytes())
        add(archive, "stl10_binary/class_names.txt", "\n".join("abcdefghij").encode())
        add(archive, "stl10_binary/train_y.bin", bytes(range(1, 11)))
        add(archive, "stl10_binary/train_X.bin", stored[:10].tobytes())
    found = read(Settings("stl10", root=str(tmp_path)), tmp_path / "cache")
    assert torch.equal(found.images, torch.from_numpy(images))
    with pytest.raises(CfamcError, match="3 of 13 images have no label"):
        found.require_labels()
    labelled = found.labelled()
    assert labelled.require_labels().tolist() == list(range(10))
    assert torch.equal(labelled.images, found.images[:10])
    with pytest.raises(CfamcError, match=r"data\.holdout is 10 but stl10 has 10 labelled training images"):
        read(Settings("stl10", root=str(tmp_path), holdout=10), tmp_path / "cache")


def test_offline_is_one_line_that_says_where_to_put_the_file(tmp_path: Path) -> None:
    error = refused(Settings("cifar10"), tmp_path)
    assert error.message.startswith("cannot download cifar-10-binary.tar.gz: ")
    assert error.hint.endswith(f"put it at {tmp_path}/downloads/cifar-10-binary.tar.gz")
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in error.hint
    assert not list((tmp_path / "downloads").iterdir())


class Answer(io.BytesIO):
    """What a server says."""

    def __init__(self, content: bytes, length: int) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(length)}


@pytest.mark.parametrize("proxy", ["http://me:s3cr3t@h:s3cr3t", "http://h:s3cr3t", "http://me:s3cr3t@127.0.0.1:1"])
def test_the_password_of_a_proxy_is_not_shown(proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setattr("urllib.request._opener", None)  # made once in a process, of the variables as they were
    error = refused(Settings("cifar10"), tmp_path)
    assert error.message.startswith("cannot download cifar-10-binary.tar.gz: ")
    assert "s3cr3t" not in f"{error.message}{error.hint}{error.__cause__}"


def test_downloads_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"published"
    remote = archives.Remote("https://example.org/x.bin", hashlib.md5(content).hexdigest())
    answers = {"cut": Answer(content[:4], 9), "other": Answer(b"portal!!!", 9), "right": Answer(content, 9)}
    waiting = iter(answers.values())
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: next(waiting))
    with pytest.raises(CfamcError, match=r"x\.bin was cut at 4 of 9 bytes"):
        archives.fetch(remote, tmp_path, talk=NullTalk())
    with pytest.raises(CfamcError, match="is not what was published"):
        archives.fetch(remote, tmp_path, talk=NullTalk())
    assert not list(tmp_path.iterdir())
    listener = Listener()
    assert archives.fetch(remote, tmp_path, talk=listener).read_bytes() == content
    assert listener.progressed == [("downloading x.bin", 9, 9)]
    assert archives.fetch(remote, tmp_path, talk=NullTalk()).read_bytes() == content, "not asked for again"


@pytest.mark.parametrize("content", [b"", b"<html>", gzip.compress(b"x" * 1000, mtime=0)[:-4]])
def test_damaged_archives_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content)
    error = refused(Settings("cifar10", root=str(tmp_path)), tmp_path / "cache")
    assert "cifar-10-binary.tar.gz is damaged" in error.message


# Batches, orders, splits


def test_batches_keep_the_order_of_the_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 2, 2).contiguous()
    indices = torch.tensor([7, 3, 19, 3, 0])
    assert to_device(images, device=CPU) is images
    assert batch(images, indices, device=CPU)[:, 0, 0, 0].tolist() == [7, 3, 19, 3, 0]
    to_meta: list[Tensor] = []

    def noted(rows: Tensor, _: torch.device) -> Tensor:
        to_meta.append(rows)
        return rows

    monkeypatch.setattr(data, "move", noted)
    batch(images, indices, device=torch.device("meta"))
    assert [rows[:, 0, 0, 0].tolist() for rows in to_meta] == [[7, 3, 19, 3, 0]], "in order already, in one copy"


def test_addresses_are_distinct_and_frozen() -> None:
    addresses: list[tuple[int | str, ...]] = [("a", 1), ("a", "1"), ("a1",), (1, "a"), ("a", 1, 0), (), ("a", -1)]
    seeds = [addressed_seed(*address) for address in addresses]
    assert len(set(seeds)) == len(addresses)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Computed once and frozen: runs of earlier versions must repeat.
    assert addressed_seed("order", 3, 2) == 2729176615940045185
    assert epoch_order(3, 2, 10).tolist() == [4, 6, 8, 5, 0, 7, 2, 9, 3, 1]


def test_epoch_orders() -> None:
    state = torch.get_rng_state()
    orders = [epoch_order(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(torch.get_rng_state(), state), "the caller's stream is untouched"
    assert epoch_order(0, 1, 100) is epoch_order(0, 1, 100), "drawn once for all batches of an epoch"
    first, second = (torch.rand(3, generator=addressed_generator("x", 1)) for _ in range(2))
    assert torch.equal(first, second)


def counts(labels: Tensor) -> list[int]:
    return labels.bincount().tolist()


def test_held_out_images_are_balanced_and_apart() -> None:
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 3 + [-1] * 17)[torch.randperm(100)]
    held, rest = class_balanced_split(labels, 23, seed=0)
    assert counts(labels[held]) == [10, 10, 3]
    assert len(rest) == 60
    assert torch.equal(torch.cat([held, rest]).sort().values, (labels >= 0).nonzero().flatten())
    even, _ = class_balanced_split(torch.arange(10).repeat(60), 100, seed=0)
    other, _ = class_balanced_split(torch.arange(10).repeat(60), 100, seed=1)
    assert counts(even % 10) == [10] * 10
    assert even.tolist() != other.tolist()
    with pytest.raises(ValueError, match="cannot hold 83 of 83"):
        class_balanced_split(labels, 83, seed=0)
