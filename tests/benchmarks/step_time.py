"""Times training batches of the official free script and of the engine in turns, and compares their peak memory.

Size "laptop" is recipes/cifar10-laptop.toml (a turn is a batch of 3 replays), "full" one replay of CF-AMC-SSL at batch
32. Each side is a process of its own with the same number of threads. Memory counts from the level after the imports,
in the main process alone: the official loader's workers come on top of it and are left out.
Example: python tests/benchmarks/step_time.py CHECKOUT ~/.cache/cifar10-jpeg --size laptop
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import emit, machine, paired_ratio, peak_resident, resident, summary
from official import SIZES, EndOfTurnsError, Size
from turns import Contestant, Gate, alternate


def overrides(size: Size, folder: Path) -> list[str]:
    """What turns the shipped CF-AMC-SSL recipe into the official script's settings at `size`."""
    return [
        "data.dataset=folder",
        f"data.root={folder}",
        f"model.width={size.width}",
        f"model.hidden_dim={size.hidden}",
        f"model.embedding_dim={size.embedding}",
        f"crops.0.count={size.crops}",
        f"adversary.replays={size.replays}",
        f"train.batch_size={size.batch}",
        "train.epochs=1000",
        "train.evaluate_every=0",
    ]


def serve_ours(reference: str, settings: list[str]) -> None:
    """The engine's own loop on a recipe, one batch a turn; the clock runs from one batch's crops to the next one's."""
    gate = Gate()
    from cfamc_cli.engine.data import sets
    from cfamc_cli.engine.device import pick_device
    from cfamc_cli.engine.distributed import World
    from cfamc_cli.engine.pretrain import Trainer
    from cfamc_cli.engine.sink import NullLedger, NullTalk
    from cfamc_cli.recipe import file

    class PacedTrainer(Trainer):
        started: float | None = None

        def crops_of(self, batch: int) -> Any:
            if self.started is not None:
                gate.done(time.perf_counter() - self.started)
            if not gate.turn():
                raise EndOfTurnsError
            self.started = time.perf_counter()
            return super().crops_of(batch)

    after_imports = resident()
    recipe = file.load(reference, overrides=settings)
    with tempfile.TemporaryDirectory() as checkpoints:
        cache = Path(tempfile.gettempdir()) / "cfamc-benchmarks"
        cache.mkdir(exist_ok=True)
        images = sets.load(recipe.data, "train", seed=recipe.seed, cache=cache, talk=NullTalk())
        after_data = resident()
        trainer = PacedTrainer(
            recipe, images, device=pick_device("cpu"), world=World(), talk=NullTalk(), ledger=NullLedger()
        )
        gate.ready(pid=os.getpid(), precision=trainer.precision)
        try:
            trainer.train(Path(checkpoints), stop=lambda: 0)
        except EndOfTurnsError:
            gate.end(after_imports=after_imports, after_data=after_data, peak=peak_resident(), machine=machine())


def own_command(common: list[str], settings: list[str]) -> list[str]:
    """The command of a child that serves our batches, with `settings` over the recipe."""
    return [
        sys.executable,
        str(Path(__file__)),
        *common,
        "--serve-ours",
        *(word for setting in settings for word in ("--set", setting)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of the official repository")
    parser.add_argument("folder", type=Path, help="image folder with train/<class>/")
    parser.add_argument("--size", choices=sorted(SIZES), default="laptop")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", action="append", default=[], help="a key of our recipe, such as train.compile=true")
    parser.add_argument("--serve-ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    if options.serve_ours:
        serve_ours("cifar10", [*overrides(size, options.folder), *options.set])
        return

    here = Path(__file__).parent
    common = [str(options.checkout), str(options.folder), "--size", options.size, "--threads", str(options.threads)]
    official = Contestant("official", [sys.executable, str(here / "official.py"), *common, "--serve"])
    ours = Contestant("ours", own_command(common, options.set))
    seconds = dict(
        zip(
            ("official", "ours"),
            alternate([official, ours], warmup=options.warmup, turns=options.turns),
            strict=True,
        )
    )
    last_words = {"official": official.end(), "ours": ours.end()}
    above = {name: int(facts["peak"]) - int(facts["after_imports"]) for name, facts in last_words.items()}

    time_ratio, memory_ratio = paired_ratio(seconds["ours"], seconds["official"]), above["ours"] / above["official"]
    record = {
        "machine": machine(),
        "size": {"name": options.size, **vars(size)},
        "set": options.set,
        "precision": {"official": "float32", "ours": ours.facts["precision"]},
        "seconds_per_batch": {name: summary(values) for name, values in seconds.items()},
        "time_ratio": time_ratio,
        "peak_bytes_above_imports": above,
        "memory_ratio": memory_ratio,
        "processes": last_words,
    }
    rows = [["", "official", "ours", "ours / official"]]
    medians = [f"{summary(seconds[name])['median']:.3f}" for name in ("official", "ours")]
    rows.append(["median s / batch", *medians, f"{time_ratio:.3f}"])
    mebibytes = [f"{above[name] / 2**20:.0f}" for name in ("official", "ours")]
    rows.append(["peak MiB above imports", *mebibytes, f"{memory_ratio:.3f}"])
    emit(record, title=f"Size {options.size}: {options.turns} batches each, in turns", rows=rows)


if __name__ == "__main__":
    main()
