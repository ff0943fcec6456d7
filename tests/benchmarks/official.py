"""Runs the free EMP-SSL script of the official repository (github.com/softsys4ai/CF-AMC-SSL) on a CPU, from outside.

Nothing of that repository lives here and none of its files is changed: CUDA calls become no-ops, its data set class
reads an image folder, its loader takes as many workers as there are cores, and its encoder is narrowed.
Example: python tests/benchmarks/official.py CHECKOUT ~/.cache/cifar10-jpeg --save encoder.safetensors
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from judge import NarrowResNet18, read_folder
from machine import emit, machine, peak_resident, resident, summary, usable_cores
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from turns import Gate

FREE_EMP_SSL = "main_empssl_free_adv.py"


@dataclass(frozen=True)
class Size:
    """Sizes of the encoder and of a training batch."""

    width: int
    hidden: int
    embedding: int
    crops: int
    batch: int
    replays: int = 3


SIZES = {
    "laptop": Size(width=16, hidden=1024, embedding=256, crops=4, batch=100),
    # One replay a batch, so that a turn is one weight update; a batch's crops are a hundredth of it.
    "full": Size(width=64, hidden=4096, embedding=1024, crops=16, batch=32, replays=1),
}


@dataclass
class Pace:
    """Decides when the script may have its next batch, and hears how long the last one took."""

    turn: Callable[[], bool] = lambda: True
    done: Callable[[float], None] = lambda seconds: None


@dataclass
class Levels:
    """Resident memory in bytes at the points of the script that a comparison needs."""

    after_imports: int = 0
    after_data: int = 0


class FolderImages(torch.utils.data.Dataset[tuple[Any, int]]):
    """Stands where torchvision's CIFAR10 stands: keeps (N, 32, 32, 3) uint8 and hands PIL images to the transform."""

    def __init__(self, folder: Path, *, limit: int | None, transform: Callable[[Image.Image], Any] | None) -> None:
        images, labels, _ = read_folder(folder, limit=limit)
        self.data = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.data[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


class EndOfTurnsError(Exception):
    """Ends the script between two batches, when there are no more turns."""


class PacedLoader(torch.utils.data.DataLoader[Any]):
    """A DataLoader with no more workers than cores, whose batches are handed out at the pace of `pace`.

    The time of a batch runs from asking the workers for it until the script comes back for the next one.
    """

    pace = Pace()

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings["num_workers"] = min(settings.get("num_workers", 0), usable_cores())
        super().__init__(*args, **settings)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            if not self.pace.turn():
                raise EndOfTurnsError
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch
            self.pace.done(time.perf_counter() - started)


class _Metric:
    """As much of torchmetrics' base class as an import of the official helpers needs."""

    def __init__(self, **settings: object) -> None:
        pass

    def add_state(self, name: str, default: object, **settings: object) -> None:
        setattr(self, name, default)


def _stub(name: str, **attributes: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module


def _off_the_gpu(moved: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensor.to without the moves to a GPU."""

    def to(self: Tensor, *args: Any, **settings: Any) -> Tensor:
        if args and str(args[0]).startswith("cuda"):
            return self
        return moved(self, *args, **settings)

    return to


@contextlib.contextmanager
def on_a_cpu(checkout: Path) -> Iterator[None]:
    """Make the modules of `checkout` importable and their CUDA calls harmless; everything is put back at the end."""
    if not (checkout / FREE_EMP_SSL).is_file():
        raise FileNotFoundError(f"{checkout} is not a checkout of the official repository: no {FREE_EMP_SSL}")
    before = set(sys.modules)
    stubs = {
        "tqdm": _stub("tqdm", tqdm=lambda batches, **settings: batches),
        "torchmetrics": _stub("torchmetrics"),
        "torchmetrics.metric": _stub("torchmetrics.metric", Metric=_Metric),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "path", [str(checkout), *sys.path]))
        stack.enter_context(mock.patch.object(sys, "dont_write_bytecode", True))
        stack.enter_context(mock.patch.dict(sys.modules, stubs))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda self: self))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", _off_the_gpu(torch.Tensor.to)))
        stack.enter_context(mock.patch.object(nn.Module, "cuda", lambda self: self))
        stack.enter_context(mock.patch.object(nn, "DataParallel", lambda module: module))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                module = sys.modules[name]
                if str(getattr(module, "__file__", "")).startswith(str(checkout)):
                    del sys.modules[name]


def narrow(size: Size) -> None:
    """Give the official encoder, inside `on_a_cpu`, the sizes asked for; its forward stays its own."""
    import model.model as official_model  # type: ignore[import-not-found]

    if size.width != 64:
        official_model.getmodel = lambda arch: (NarrowResNet18(size.width), 8 * size.width)
    official_model.encoder.__init__.__defaults__ = (size.embedding, size.hidden, 2, "resnet18-cifar")


def load_script(
    checkout: Path,
    script: str,
    *,
    arguments: list[str],
    data_set: Callable[..., torch.utils.data.Dataset[Any]],
    loader: type[torch.utils.data.DataLoader[Any]] = PacedLoader,
) -> dict[str, Any]:
    """Run a script, inside `on_a_cpu`, up to its `main`, and return its globals: the net, the optimizer, `main`, ..."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [script, *arguments]))
        stack.enter_context(mock.patch.object(torchvision.datasets, "CIFAR10", data_set))
        stack.enter_context(mock.patch.object(torch.utils.data, "DataLoader", loader))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        scope = runpy.run_path(str(checkout / script), run_name="official")
    live: dict[str, Any] = scope["main"].__globals__  # run_path returns a copy; main reads these
    return live


def free_arguments(size: Size, *, epochs: int) -> list[str]:
    """Command line of the free script for crop-based training at `size`."""
    crops = ["--scale_min", ".08", "--scale_max", "1", "--ratio_min", ".75", "--ratio_max", "1.3333333"]
    counts = [
        "--num_patches",
        str(size.crops),
        "--bs",
        str(size.batch),
        "--m",
        str(size.replays),
        "--epoch",
        str(epochs),
    ]
    return counts + crops


def train(
    checkout: Path,
    folder: Path,
    size: Size,
    *,
    pace: Pace,
    epochs: int = 1,
    limit: int | None = None,
    set_up: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, Levels]:
    """Run the free script on the training images of `folder` and return its encoder.

    Args:
        checkout: The official repository.
        folder: Image folder with train/<class>/.
        size: Sizes of encoder and batch.
        pace: Hands out the batches; training ends early when it has no more turns.
        epochs: Epochs of the script.
        limit: Use the first images only, balanced.
        set_up: Called when the script is ready to train.
    """
    levels = Levels()

    def data_set(*, transform: Callable[[Image.Image], Any], **settings: object) -> FolderImages:
        levels.after_imports = resident()
        images = FolderImages(folder / "train", limit=limit, transform=transform)
        levels.after_data = resident()
        return images

    with on_a_cpu(checkout), mock.patch.object(PacedLoader, "pace", pace):
        narrow(size)
        script = load_script(checkout, FREE_EMP_SSL, arguments=free_arguments(size, epochs=epochs), data_set=data_set)
        set_up()
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(EndOfTurnsError):
            script["main"]()
    net = script["net"]
    assert isinstance(net, nn.Module)
    return net, levels


def save_encoder(net: nn.Module, path: Path) -> None:
    """Write the encoder under the names that cfamc gives its parts."""
    tensors = {
        name.replace("projection.", "projector.", 1): value.contiguous() for name, value in net.state_dict().items()
    }
    save_file(tensors, path)


def serve(options: argparse.Namespace, size: Size) -> None:
    """One batch a turn, told by a parent process over stdin and stdout (see turns.py)."""
    gate = Gate()
    pace = Pace(turn=gate.turn, done=gate.done)
    _, levels = train(
        options.checkout,
        options.folder,
        size,
        pace=pace,
        epochs=1000,
        limit=options.limit,
        set_up=lambda: gate.ready(pid=os.getpid()),
    )
    gate.end(after_imports=levels.after_imports, after_data=levels.after_data, peak=peak_resident(), machine=machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of the official repository")
    parser.add_argument("folder", type=Path, help="image folder with train/<class>/")
    parser.add_argument("--size", choices=sorted(SIZES), default="laptop")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batches", type=int, help="stop after so many batches (default: train to the end)")
    parser.add_argument("--limit", type=int, help="use the first N training images, balanced (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", type=Path, help="write the trained encoder to this safetensors file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    size = SIZES[options.size]
    if options.serve:
        serve(options, size)
        return

    seconds: list[float] = []
    pace = Pace(turn=lambda: options.batches is None or len(seconds) < options.batches, done=seconds.append)
    started = time.perf_counter()
    net, levels = train(options.checkout, options.folder, size, pace=pace, epochs=options.epochs, limit=options.limit)
    if options.save is not None:
        save_encoder(net, options.save)
    kept = seconds[1:] or seconds  # the first batch waits for the workers to start
    record = {
        "machine": machine(),
        "size": vars(size),
        "seed": options.seed,
        "seconds_in_all": time.perf_counter() - started,
        "seconds_per_batch": summary(kept)
        if len(kept) <= 100
        else {k: v for k, v in summary(kept).items() if k != "values"},
        "memory_bytes": {
            "after_imports": levels.after_imports,
            "after_data": levels.after_data,
            "peak": peak_resident(),
        },
    }
    rows = [
        ["official free EMP-SSL", "value"],
        ["batches", str(len(seconds))],
        ["median s / batch", f"{summary(kept)['median']:.3f}"],
    ]
    rows.append(["peak above imports, MiB", f"{(peak_resident() - levels.after_imports) / 2**20:.0f}"])
    emit(record, title=f"Official script, size {options.size}", rows=rows)


if __name__ == "__main__":
    main()
