"""What a person sees: talk on stderr, data on stdout.

Text that comes from recipes, files and measurements is never interpreted: it is printed as `rich.text.Text`, which
knows no markup, and its control characters are spelled out. A terminal that went away ends the talk, not the work.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.plan import duration

if TYPE_CHECKING:
    from jinja2 import Environment

    from cfamc_cli.store.records import Accuracy

PLAIN_SECONDS = 10.0  # at least this long between two plain lines of one task
_LONGEST = 4000  # characters of one text; a name of a megabyte is nobody's name


class TalkConsole(Console):
    """A rich console that falls silent when nobody listens any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _silence(self.file)

    def say(self, text: str | Text) -> None:
        """Print one line, never wrapped, never raising; plain text is cleaned first."""
        try:
            self.print(Text(clean(text)) if isinstance(text, str) else text, soft_wrap=True)
        except OSError:
            self.on_broken_pipe()


def talk() -> TalkConsole:
    """A console on stderr; NO_COLOR and TERM=dumb are heeded."""
    return TalkConsole(stderr=True, highlight=False, emoji=False, markup=False)


def clean(text: object) -> str:
    """Spell out what a terminal would obey, and cut off what nobody would read."""
    full = str(text)
    shown = full[:_LONGEST]
    if not shown.isprintable():  # control, bidirectional and line-breaking characters, lone surrogates
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return shown if len(full) <= _LONGEST else f"{shown}... ({len(full):,} characters)"


def error(failure: CfamcError, *, console: TalkConsole | None = None) -> None:
    """Say what went wrong and what to do about it, on stderr."""
    console = console or talk()
    message, *rest = failure.message.split("\n")
    console.say(Text.assemble(("error: ", "bold red"), clean(message)))
    for line in rest:
        console.say(f"  {line}")
    if failure.hint:
        console.say(Text.assemble(("hint: ", "bold cyan"), clean(failure.hint)))


def write_out(text: str) -> None:
    """Write data to stdout; a reader that left early is no failure.

    Raises:
        CfamcError: The data could not be written.
    """
    out = sys.stdout
    if out is None:
        return
    encoding = out.encoding or "utf-8"
    try:
        out.write(text if text.isascii() else text.encode(encoding, "backslashreplace").decode(encoding))
        out.flush()
    except BrokenPipeError:
        _silence(out)
    except OSError as failure:
        _silence(out)
        cause = os.strerror(failure.errno or errno.EIO).lower()
        raise CfamcError(f"cannot write to stdout: {cause}", exit_code=ExitCode.FAILED) from failure
    except ValueError:  # closed by the program that called us
        return


def print_json(value: object) -> None:
    """Write one JSON object to stdout, in plain ASCII; numbers that are not finite become null.

    A person at a terminal gets it indented; a program gets one line, which takes a fifth of the time to write.

    Raises:
        CfamcError: As for `write_out`.
    """
    indent = 2 if sys.stdout is not None and sys.stdout.isatty() else None
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except (TypeError, ValueError):  # something in it is no JSON; the copy is spared where nothing is
        text = json.dumps(_plain(value), indent=indent)
    write_out(text + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> Table:
    """Make a table of plain cells; the columns in `right` are aligned to the right."""
    made = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        number = index in right
        made.add_column(
            Text(clean(name)),
            justify="right" if number else "left",
            overflow="ellipsis" if number else "fold",  # half a number is marked as such
            no_wrap=number,
        )
    for row in rows:
        made.add_row(*(Text(clean(cell)) for cell in row))
    return made


def print_rows(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()
) -> None:
    """Write rows to stdout as a table, or on a terminal too narrow for it each row as a list of its cells.

    Raises:
        CfamcError: As for `write_out`.
    """
    write_out(f"{clean(title)}\n")
    if fits(columns, rows):
        _print_table(table(columns, rows, right=right))
        return
    for row in rows:
        listed = Table.grid(padding=(0, 2))
        listed.add_column(no_wrap=True)
        listed.add_column(overflow="fold")
        for name, cell in zip(columns, row, strict=True):
            if cell:
                listed.add_row(Text(f"  {clean(name)}"), Text(clean(cell)))
        _print_table(listed)
        write_out("\n")


def _print_table(shown: Table) -> None:
    """In the width of a terminal, or elsewhere as wide as it wants to be."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = _natural_width(shown, console)
    with console.capture() as capture:
        console.print(shown)
    write_out(capture.get())


def fits(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Whether stdout is wide enough for a table of these cells; anything but a terminal is."""
    console = Console()
    return not console.is_terminal or _natural_width(table(columns, rows), console) <= console.width


def _natural_width(shown: Table, console: Console) -> int:
    return max(console.measure(shown, options=console.options.update(max_width=10_000)).maximum, 1)


def percent(share: float) -> str:
    """Such as 75.9."""
    return f"{100 * share:.1f}"


def interval(accuracy: Accuracy) -> str:
    """Such as 75.9 [75.0, 76.7], in percent."""
    return f"{percent(accuracy.value)} [{percent(accuracy.low)}, {percent(accuracy.high)}]"


def templates() -> Environment:
    """The templates of pages and cards, which lie beside this file; what they are not given is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


class Terminal:
    """Tells a person what the engine does.

    On a terminal each task is a live bar; elsewhere it is a plain line now and then. A value that was reported once
    stays beside its task until the task ends, so that the last evaluation remains in sight.
    """

    def __init__(
        self,
        *,
        quiet: bool,
        console: TalkConsole | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to speak.

        Args:
            quiet: Say only warnings.
            console: Where to speak; stderr unless told.
            clock: Seconds, for tests.
        """
        self._console = console or talk()
        self._quiet = quiet
        self._clock = clock
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, _Task] = {}

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the live display down."""
        bars, self._bars = self._bars, None
        if bars is not None:
            with suppress(OSError):
                bars.stop()

    def message(self, text: str) -> None:
        if not self._quiet:
            self._console.say(text)

    def warning(self, text: str) -> None:
        self._console.say(Text.assemble(("warning: ", "bold yellow"), clean(text)))

    def progress(self, task: str, done: int, total: int, values: Mapping[str, float]) -> None:
        if self._quiet:
            return
        now = self._clock()
        state = self._tasks.setdefault(task, _Task(start=now, first=done))
        state.values = values  # what was said before may be of another phase, or of a block that is done
        finished = done >= total
        if self._live:
            self._show(task, state, done, total)
        if finished or (not self._live and now >= state.next_line):
            state.next_line = now + PLAIN_SECONDS
            self._console.say(state.line(task, done, total, now))
        if finished:
            if self._bars is not None and state.bar is not None:
                self._bars.remove_task(state.bar)
            del self._tasks[task]

    def _show(self, task: str, state: _Task, done: int, total: int) -> None:
        if self._bars is None:
            self._bars = _Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}", markup=False),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
                transient=True,
                redirect_stdout=False,  # that is where the data goes
                refresh_per_second=4,
            )
            with suppress(OSError):
                self._bars.start()
        if state.bar is None:
            state.bar = self._bars.add_task(clean(task), total=total)
        self._bars.update(state.bar, completed=done, total=total, shown=state.shown())


class _Task:
    """What is known of a task under way."""

    def __init__(self, *, start: float, first: int) -> None:
        self.start = start
        self.first = first  # a resumed task does not begin at 0
        self.next_line = start
        self.values: Mapping[str, float] = {}
        self.bar: TaskID | None = None

    def shown(self) -> str:
        return "  ".join(f"{clean(name)} {number(value)}" for name, value in self.values.items())

    def line(self, task: str, done: int, total: int, now: float) -> str:
        elapsed, advanced = now - self.start, done - self.first
        if done >= total:
            when = f"took {duration(elapsed)}"
        elif advanced > 0:
            when = f"{duration(elapsed / advanced * (total - done))} left"
        else:
            when = "started"
        return "  ".join(filter(None, [f"{task} {done}/{total}", when, self.shown()]))


class _Bars(Progress):
    """A bar per task, and below them what is known of each, wrapped to the terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if shown := str(task.fields.get("shown", "")):
                yield Text(shown)


def number(value: float) -> str:
    """A number in at most 4 significant digits, whole ones in full."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e9):
        return f"{int(value)}"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _plain(value: object) -> object:
    """Copy a value with what JSON can hold."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case str() | int() | None:
            return value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case Iterable() if not isinstance(value, bytes | Path):
            return [_plain(item) for item in value]
        case _:
            return str(value)


def _silence(stream: IO[str]) -> None:
    """Let the interpreter's last flush go nowhere, or it would report the broken pipe once more."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
