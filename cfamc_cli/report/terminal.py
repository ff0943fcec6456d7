"""What a person sees: talk on stderr, data on stdout.

Text that comes from recipes, files and measurements is never interpreted: it is printed as `rich.text.Text`, which
knows no markup, and its control characters are spelled out. A terminal that went away ends the talk, not the work.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.plan import duration

if TYPE_CHECKING:
    from jinja2 import Environment

    from cfamc_cli.store.records import Accuracy

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # of a curve in a line of text, from low to high
_NARROW = 60  # characters of a line; below that cells are not wrapped
_WORD = 40  # characters; a longer one may be broken
_GAP = 2  # blanks between the columns of a table
_DATE = re.compile(r"\b\d{8}-\d{6}-(?=[a-z0-9-]+-[0-9a-f]{6}\b)")  # of an id, which what is left addresses as well
_BETWEEN_WORDS = re.compile(  # blanks, but for those within a figure with its interval, spread or unit
    r"(?<!\u00b1)(?<!\+-) (?!\u00b1|\+-|[^\[]*\]|(?:[kMGhsd%]|min|[KMG]iB)(?:[ )]|$))"
)
_PLAIN = {"\u00b1": "+-", **dict(zip(BLOCKS, "_.,:-=+#", strict=True))}  # where the encoding has none of these
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
        text = text.translate(_spelled(out))
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


def write_lines(lines: Iterable[str]) -> None:
    """Write sentences to stdout: on a terminal broken between words, elsewhere a line each.

    Raises:
        CfamcError: As for `write_out`.
    """
    console = Console()
    write_out("".join(f"{part}\n" for line in lines for part in _broken(line, console)))


def _broken(line: str, console: Console) -> list[str]:
    """A cleaned line, on a terminal in parts that fit; a longer word, such as a path, stays whole."""
    line = clean(line)
    if not console.is_terminal or console.width < _NARROW or cell_len(line) <= console.width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    return [indent + part for part in _cell(line.lstrip(), console.width - len(indent)).plain.split("\n")]


def _spelled(out: IO[str] | None) -> dict[int, str]:
    """What stands for the signs that the encoding of a stream has not."""
    try:
        "".join(_PLAIN).encode(getattr(out, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return str.maketrans(_PLAIN)
    return {}


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


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[int] = (),
    widths: Sequence[int] | None = None,
) -> Table:
    """Make a table of plain cells.

    Args:
        columns: Headings.
        rows: Cells.
        right: Columns that are aligned to the right.
        widths: Of the columns; cells are wrapped between words. As wide as their cells where it is None.
    """
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        width = None if widths is None else widths[index]
        justify: Literal["left", "right"] = "right" if index in right else "left"
        made.add_column(_cell(name, width), justify=justify, width=width, overflow="fold")
    for row in rows:
        made.add_row(*map(_cell, row, widths or itertools.repeat(None)))
    return made


def print_rows(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()
) -> None:
    """Write rows to stdout, if any, as a table, or on a terminal too narrow for it each row as a list of its cells.

    Raises:
        CfamcError: As for `write_out`.
    """
    write_lines([title, ""])
    if not rows:
        return
    if not fits(columns, rows, wrapped=False):
        rows = [[_DATE.sub("", cell) for cell in row] for row in rows]
    if fits(columns, rows, wrapped=_is_wide()):
        _print_table(table(columns, rows, right=right, widths=_widths(columns, rows)))
        write_out("\n")
        return
    for row in rows:
        listed = Table.grid(padding=(0, 2))
        listed.add_column(no_wrap=True)
        listed.add_column(overflow="fold")
        for name, cell in zip(columns, row, strict=True):
            if cell:
                listed.add_row(_cell(f"  {name}"), _cell(cell))
        _print_table(listed)
        write_out("\n")


def _cell(text: str, width: int | None = None) -> Text:
    if width is None:
        return Text(_shown(text))
    lines = [""]
    for word in _BETWEEN_WORDS.split(_shown(text)):
        if lines[-1] and cell_len(f"{lines[-1]} {word}") > width:
            lines.append(word)
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return Text("\n".join(lines))


def _shown(text: str) -> str:
    return clean(text).translate(_spelled(sys.stdout))


def _print_table(shown: Table) -> None:
    """In the width of a terminal, or elsewhere as wide as it wants to be."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.measure(shown, options=console.options.update(max_width=10_000)).maximum, 1)
    with console.capture() as capture:
        console.print(shown)
    write_out(capture.get())


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]], *, wrapped: bool = True) -> bool:
    """Whether stdout is wide enough for a table of these cells; anything but a terminal is.

    Args:
        columns: Headings.
        rows: Cells.
        wrapped: Whether cells may take several lines.
    """
    console = Console()
    taken = _widths(columns, rows) if wrapped else [max(parts) for parts in _lengths(columns, rows, whole=True)]
    return not console.is_terminal or sum(taken) + _GAP * (len(columns) - 1) <= console.width


def _is_wide() -> bool:
    """Whether cells of several lines leave a table readable."""
    return Console().width >= _NARROW


def _lengths(columns: Sequence[str], rows: Sequence[Sequence[str]], *, whole: bool) -> list[list[int]]:
    """Cells on the screen that the texts of each column take, or the longest word of each."""
    lines = [map(_shown, line) for line in (columns, *rows)]
    return [
        [cell_len(text) if whole else min(max(map(cell_len, _BETWEEN_WORDS.split(text))), _WORD) for text in column]
        for column in zip(*lines, strict=True)
    ]


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Widths of columns in which no word is broken, as far as stdout is wide; more goes to who lacks most."""
    console = Console()
    wanted = [max(parts) for parts in _lengths(columns, rows, whole=True)]
    if not console.is_terminal:
        return wanted
    widths = [max(parts) for parts in _lengths(columns, rows, whole=False)]
    for _ in range(console.width - sum(widths) - _GAP * (len(widths) - 1)):
        widths[max(range(len(widths)), key=lambda at: wanted[at] / max(widths[at], 1))] += 1
    return [min(pair) for pair in zip(widths, wanted, strict=True)]


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
            self._say(text)

    def warning(self, text: str) -> None:
        self._console.say(Text.assemble(("warning: ", "bold yellow"), clean(text)))

    def progress(self, task: str, done: int, total: int, values: Mapping[str, float | str]) -> None:
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
            self._say(state.line(task, done, total, now))
        if finished:
            if self._bars is not None and state.bar is not None:
                self._bars.remove_task(state.bar)
            del self._tasks[task]

    def _say(self, text: str) -> None:
        for part in _broken(text, self._console):
            self._console.say(part)

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
        self.values: Mapping[str, float | str] = {}
        self.bar: TaskID | None = None

    def shown(self) -> str:
        return "  ".join(
            f"{clean(name)} {clean(value) if isinstance(value, str) else number(value)}"
            for name, value in self.values.items()
        )

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


def curve(values: Sequence[float], *, width: int) -> str:
    """Finite values in a line of blocks, from the lowest of them to the highest; of many, evenly picked ones."""
    if len(values) > width:
        values = [values[round(at * (len(values) - 1) / (width - 1))] for at in range(width)]
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


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
