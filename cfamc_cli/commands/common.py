"""What every command that works shares: where and how it works, whom it tells, and how an interruption ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cfamc_cli.engine.sink import NullTalk, Talk
from cfamc_cli.errors import CfamcError, ExitCode, Interrupted, bad_data
from cfamc_cli.recipe.schema import Recipe, Split
from cfamc_cli.report import terminal as render
from cfamc_cli.store.records import Tracker
from cfamc_cli.store.runs import RunFolder, cache_folder, default_store

if TYPE_CHECKING:
    import torch

    from cfamc_cli.engine.data.sets import ImageSet
    from cfamc_cli.engine.distributed import World


_ENDS = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}
if hasattr(signal, "SIGUSR1"):  # neither is on Windows; SIGUSR1 has another number on macOS
    _ENDS |= {signal.SIGUSR1: ExitCode.ASKED, signal.SIGHUP: ExitCode.HUNG_UP}


@dataclass(frozen=True)
class Options:
    """Where and how to work; nothing here changes a number."""

    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:0" or "mps"
    runs: Path | None = None  # the run store; None for CFAMC_RUNS, else ./runs
    quiet: bool = False  # say only warnings and errors
    as_json: bool = False  # whether stdout gets one JSON object
    track: Tracker | None = None  # who else hears of a training's metrics

    @property
    def store(self) -> Path:
        """The run store."""
        return default_store(self.runs)

    def reference(self, run: RunFolder) -> str:
        """What a next command calls the run by, typed in the same place."""
        return run.id if self.runs is None else str(run.path)


def require_checkpoint(run: RunFolder, options: Options) -> None:
    """Refuse to attack what has nothing to attack yet.

    Raises:
        CfamcError: Exit 4.
    """
    if not run.has_checkpoint():
        hint = f"go on with: cfamc pretrain --resume {options.reference(run)}"
        raise bad_data(f"run {run.id} has no checkpoint to attack yet", hint)


SAME_COMMAND = "see its own messages; then give the same command again"  # where another process ended


class Signals:
    """What has arrived, and whether work under way asks to be told instead of being cut."""

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal only sets `received`; the second raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def pending(self) -> int:
        """The signal that arrived, or 0."""
        return self.received

    def arrive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            Interrupted: It cuts the work.
        """
        if self.received or not self._deferred:
            raise Interrupted(number)
        self.received = number


class Session:
    """One command at work.

    Attributes:
        options: Where and how.
        signals: SIGINT, SIGTERM, SIGUSR1 and SIGHUP, for work that finishes its step and saves.
        talk: The person; nobody in the processes of torchrun that do not lead.
    """

    def __init__(self, options: Options, signals: Signals, talk: Talk) -> None:
        self.options, self.signals, self.talk = options, signals, talk

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        from cfamc_cli.engine.device import pick_device

        return pick_device(self.options.device)

    @cached_property
    def world(self) -> World:
        """The processes of torchrun, entered when first asked for; left with the session."""
        from cfamc_cli.engine.distributed import join

        return join(self.device)

    def load_images(self, recipe: Recipe, split: Split) -> ImageSet:
        """The images of a recipe, downloaded and packed by one process of each node."""
        from cfamc_cli.engine.distributed import first_on_each_node

        return first_on_each_node(lambda: load_images(recipe, split, talk=self.talk), self.world)

    def agreed(self, text: str) -> str:
        """The text of the first process of torchrun, in all of them; without torchrun it is the own one."""
        if not among_others():
            return text
        from cfamc_cli.engine.distributed import peers, told

        with peers(self.world, hint=SAME_COMMAND):
            return told(text, self.world)


@contextmanager
def session(options: Options) -> Iterator[Session]:
    """Within, a signal ends the work as an error that says what is kept and how to go on.

    Raises:
        CfamcError: In place of `Interrupted`; exit code 129, 130, 138 or 143.
    """
    signals = Signals()
    deaf = {number for number in _ENDS if signal.getsignal(number) == signal.SIG_IGN}
    told = [number for number, code in _ENDS.items() if code != ExitCode.HUNG_UP or number not in deaf]  # nohup's wish
    before = {number: signal.signal(number, signals.arrive) for number in told}
    try:
        with render.Terminal(quiet=options.quiet) as terminal:
            working = Session(options, signals, terminal if leads() else NullTalk())
            try:
                yield working
            finally:
                if "world" in vars(working):
                    from cfamc_cli.engine.distributed import leave

                    leave(working.world)
    except Interrupted as end:
        code = _ENDS[signal.Signals(end.signal)]
        raise CfamcError(end.message, hint=end.hint, exit_code=code, details=end.details) from end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruption(*, message: str = "interrupted", hint: Callable[[], str] = str) -> Iterator[None]:
    """Within, an interruption takes these words along.

    Args:
        message: What is kept of the work.
        hint: Makes the way on, when it is known what there is to go on with; empty for none.
    """
    try:
        yield
    except Interrupted as end:
        end.message, end.hint = message, hint()
        raise


def load_images(recipe: Recipe, split: Split, *, talk: Talk) -> ImageSet:
    """The images of a recipe; see `engine.data.sets.load`."""
    from cfamc_cli.engine.data.sets import load

    return load(recipe.data, split, seed=recipe.seed, cache=cache_folder(), talk=talk)


def leads() -> bool:
    """Whether this process speaks and has stdout for itself: under torchrun, the first one."""
    return not among_others() or os.environ.get("RANK", "0") == "0"


def among_others() -> bool:
    """Whether torchrun started more processes than this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"
