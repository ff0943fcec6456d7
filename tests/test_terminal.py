from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cfamc_cli.engine.sink import Talk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.plan import duration
from cfamc_cli.report import terminal as render
from cfamc_cli.store.records import Accuracy

HOSTILE = {
    "markup": ("[bold red]x[/] [link=http://a]", "[bold red]x[/] [link=http://a]"),
    "ansi": ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
    "osc8": ("\x1b]8;;http://a\x07x", "\\x1b]8;;http://a\\x07x"),
    "csi": ("\x9b31m", "\\x9b31m"),
    "lines": ("a\r\nhint: b", "a\\r\\nhint: b"),
    "nul": ("a\0b", "a\\x00b"),
    "bidi": ("a\u202eb\u2028c", "a\\u202eb\\u2028c"),
    "emoji code": (":smile:", ":smile:"),
    "surrogate": ("a\udcff", "a\\udcff"),
    "script": ("<script>", "<script>"),
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_talk(width: int = 80) -> tuple[render.TalkConsole, io.StringIO]:
    out = io.StringIO()
    return render.TalkConsole(file=out, width=width, highlight=False, emoji=False, markup=False), out


@pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_spelled_out(text: str, shown: str) -> None:
    assert render.clean(text) == shown
    talk, out = plain_talk()
    render.error(CfamcError(f"no run {text}".replace("\n", " "), hint=text), console=talk)
    terminal = render.Terminal(quiet=False, console=talk)
    terminal.message(text)
    terminal.warning(text)
    terminal.progress(text, 1, 2, {text: 1.0})
    talk.print(render.table([text], [[text]]))
    lines = out.getvalue()
    assert shown in lines
    assert all(character.isprintable() or character == "\n" for character in lines)
    assert sum(line.startswith("hint: ") for line in lines.splitlines()) == 1


def test_a_megabyte_is_cut() -> None:
    assert render.clean("x" * 10**6).endswith("x... (1,000,000 characters)")
    assert len(render.clean("\0" * 10**6)) < 20_000


def test_an_error_is_not_wrapped_and_keeps_its_lines() -> None:
    talk, out = plain_talk(width=20)
    path = " ".join(["/a/rather/long/path/that/one/copies"] * 3)
    render.error(CfamcError(f"2 problems:\n{path}\nb", hint="fix"), console=talk)
    assert out.getvalue() == f"error: 2 problems:\n  {path}\n  b\nhint: fix\n"


def test_numbers() -> None:
    assert [render.number(value) for value in (3, 3.0, 0.30000001, 123456.7, 1e12, float("nan"), float("-inf"))] == [
        "3",
        "3",
        "0.3",
        "123457",
        "1e+12",
        "nan",
        "-inf",
    ]
    assert [duration(value) for value in (0.4, 59.6, 185, 5820)] == [
        "0 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 37 min",
    ]
    assert render.interval(Accuracy.of(1, 10)) == "10.0 [1.8, 40.4]"


def test_plain_lines_come_now_and_then() -> None:
    talk, out = plain_talk()
    clock = Clock()
    terminal: Talk = render.Terminal(quiet=False, console=talk, clock=clock)
    for step in range(1, 61):
        clock.now += 0.5
        values: Mapping[str, float] = {"loss": -step / 7, "views/s": 1234.56}
        terminal.progress("train", step, 60, values if step != 41 else {**values, "clean": 0.5})
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/60", "21/60", "41/60", "60/60"]
    assert lines[0] == "train 1/60  started  loss -0.1429  views/s 1235"
    assert lines[1].startswith("train 21/60  20 s left  ")
    assert lines[2].endswith("views/s 1235  clean 0.5")
    assert lines[3] == "train 60/60  took 30 s  loss -8.571  views/s 1235"


def test_quiet_says_only_warnings() -> None:
    talk, out = plain_talk()
    terminal = render.Terminal(quiet=True, console=talk)
    terminal.message("a")
    terminal.progress("train", 1, 1, {})
    terminal.warning("b")
    assert out.getvalue() == "warning: b\n"


def test_json_on_stdout_always_parses(capsys: pytest.CaptureFixture[str]) -> None:
    value = {
        "nan": float("nan"),
        "path": Path("/a"),
        "tuple": (1, None, True),
        "text": "\x1b\udcff\u202e",
        "code": ExitCode.INVALID,
        3: {"set": {1}},
    }
    render.print_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == {
        "nan": None,
        "path": "/a",
        "tuple": [1, None, True],
        "text": "\x1b\udcff\u202e",
        "code": 2,
        "3": {"set": [1]},
    }
    assert out.isascii()
    assert all(character.isprintable() or character == "\n" for character in out)


def test_a_table_is_as_wide_as_it_needs_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    cells = ["x" * 60, "[bold]", "y" * 60]
    render.print_rows("T", ["a", "b", "c"], [cells], right=[1])
    out = capsys.readouterr().out
    assert all(cell in out for cell in cells)


def test_rows_become_lists_where_a_terminal_is_too_narrow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows = [("one", "75.9 [75.0, 76.7]"), ("two", "")]
    for width, expected in ((60, 1), (15, 0)):
        monkeypatch.setenv("COLUMNS", str(width))
        render.print_rows("T", ("name", "clean"), rows, right=(1,))
        out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert ("one   75.9 [75.0, 76.7]" in out) == bool(expected)
    assert "  name   one\n  clean  75.9\n         [75.0,\n         76.7]" in "\n".join(
        map(str.rstrip, out.splitlines())
    )
    assert "  name  two" in out


def test_what_is_said_breaks_no_word_and_a_path_can_be_copied() -> None:
    said = "about 4 min 47 s for the 150 updates left of phase 0, and 11 min 43 s for evaluations"
    path = f"  runs/{'x' * 70}"
    for terminal, lines in ((True, [said[:57], said[58:], path]), (False, [said, path])):
        out = io.StringIO()
        console = render.TalkConsole(file=out, width=60, force_terminal=terminal, color_system=None)
        with render.Terminal(quiet=False, console=console) as talk:
            talk.message(said)
            talk.message(path)
        assert out.getvalue().splitlines() == lines


def test_a_narrow_terminal_breaks_no_word_of_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    columns = ["run", "clean %", "robust %", "n", "why apart"]
    why = "settings of another attack than the one of the first table, which had steps 20"
    row = ["20261122-120000-cifar10-cf-amc-ssl-s0-00000a", "75.9 [75.0, 76.7]", "45.1 \u00b1 0.3", "10,000", why]
    title = (
        "fashion-mini test images, linear head on pre_feature, pgd (restarts 1, start zero, step_size 0.01, steps 20)"
    )
    for width in (80, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        render.print_rows(title, columns, [row], right=(1, 2, 3))
        out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert max(map(len, out.splitlines())) <= width
        words = set(re.split(r"\s+", out))
        assert {
            "cifar10-cf-amc-ssl-s0-00000a",
            "clean",
            "10,000",
            *why.split(),
            *title.split(),
        } <= words  # the id's end addresses it
        for figure in ("[75.0, 76.7]", "45.1 \u00b1 0.3"):
            assert figure in out


def test_signs_are_spelled_where_an_encoding_has_none() -> None:
    text = f"75.9 \u00b1 0.3 {render.BLOCKS}"
    for encoding, shown in (("utf-8", text), ("ascii", "75.9 +- 0.3 _.,:-=+#")):
        command = f"from cfamc_cli.report import terminal; terminal.print_rows('T', ['a'], [[{text!r}]])"
        kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "HOME") if key in os.environ}
        done = subprocess.run(
            [sys.executable, "-c", command], env=kept | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True
        )
        assert shown in done.stdout.decode(encoding)


SPEAK = """
    import sys
    from cfamc_cli.report import terminal as render
    from cfamc_cli.cli import open_standard_streams
    from cfamc_cli.errors import CfamcError
    open_standard_streams()
    with render.Terminal(quiet=False) as talk:
        talk.message("gr\\xfc\\xdfe")
        for step in range(50):
            talk.progress("train", step + 1, 50, {"loss": step / 3, "lr": 0.3})
        render.print_rows("T", ["\\xe4"], [["\\xf6"]])
        render.print_json({"a": "\\xfc"})
        render.error(CfamcError("m\\xfcll", hint="x"))
    print("end", file=sys.stderr)
"""


def speak(redirect: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", "-c", f'"$0" -c "$1" {redirect}', sys.executable, textwrap.dedent(SPEAK)]
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "HOME") if key in os.environ}
    return subprocess.run(command, env=kept | environment, capture_output=True, check=False, timeout=60)


def with_slow(quick: list[Any], slow: list[Any]) -> list[Any]:
    return quick + [pytest.param(value, marks=pytest.mark.slow) for value in slow]


@pytest.mark.parametrize(
    "redirect",
    with_slow(["", ">&- 2>&- <&-", "| head -c 1 > /dev/null"], [">&-", "2>&-", "<&-", ">/dev/null", "2>/dev/full"]),
)
def test_streams_may_be_closed(redirect: str) -> None:
    done = speak(f"{redirect}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    if not redirect:
        assert json.loads(done.stdout[done.stdout.index(b"{") :]) == {"a": "ü"}
        assert done.stderr.decode().splitlines()[-3:] == ["error: müll", "hint: x", "end"]
        assert b"\x1b" not in done.stderr


def test_what_an_encoding_lacks_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    held = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(held, "ascii"))
    render.write_out("m\u00fcll \U0001f600\n")
    assert held.getvalue() == b"m\\xfcll \\U0001f600\n"


def test_a_reader_of_stderr_may_leave() -> None:
    done = speak("2> >(head -c 1 > /dev/null); exit $?")
    assert done.returncode == 0
    assert json.loads(done.stdout[done.stdout.index(b"{") :]) == {"a": "ü"}


def test_a_full_disk_behind_stdout_is_an_error() -> None:
    done = speak(">/dev/full")
    assert b"CfamcError: cannot write to stdout: no space left on device" in done.stderr


@pytest.mark.parametrize(
    "environment",
    with_slow(
        [{"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "COLUMNS": "1"}],
        [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "20"}, {"COLUMNS": "nonsense"}],
    ),
)
def test_any_locale_and_width_will_do(environment: dict[str, str]) -> None:
    done = speak("", **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index(b"{") :]) == {"a": "ü"}
    assert b"error: m" in done.stderr


def on_a_terminal(**environment: str) -> tuple[int, str, bytes]:
    """Run with stderr on a pseudo-terminal; returns the exit code, what it showed, and stdout."""
    controller, terminal = pty.openpty()
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "HOME") if key in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SPEAK)],
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=terminal,
        stdin=subprocess.DEVNULL,
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            chunk = os.read(controller, 65536)
        except OSError:  # the last holder of the other end is gone
            break
        if not chunk:
            break
        seen += chunk
    os.close(controller)
    out, _ = process.communicate(timeout=60)
    return process.returncode, seen.decode(), out


@pytest.mark.parametrize("columns", with_slow(["20"], ["80", "300"]))
def test_a_terminal_shows_bars_and_stdout_stays_data(columns: str) -> None:
    code, seen, out = on_a_terminal(TERM="xterm-256color", COLUMNS=columns)
    assert code == 0, seen
    assert "\x1b[" in seen
    assert "train" in seen
    assert "Traceback" not in seen
    assert json.loads(out[out.index(b"{") :]) == {"a": "ü"}
    assert "took 0 s" in seen  # the last line stays


@pytest.mark.slow
def test_no_color_and_dumb_terminals_are_heeded() -> None:
    colours = ("\x1b[31m", "\x1b[1;31m", "\x1b[38;", "\x1b[1;36m")
    code, seen, _ = on_a_terminal(TERM="xterm-256color", COLUMNS="80", NO_COLOR="1")
    assert code == 0
    assert not [colour for colour in colours if colour in seen]
    code, seen, _ = on_a_terminal(TERM="dumb", COLUMNS="80")
    assert code == 0
    assert "\x1b" not in seen
    assert "train 50/50" in seen


@pytest.mark.slow
def test_a_terminal_that_goes_away_does_not_end_the_work() -> None:
    controller, terminal = pty.openpty()
    code = textwrap.dedent(SPEAK).replace("    talk.message", "    sys.stdin.readline(); talk.message", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=terminal,
        start_new_session=True,  # without a controlling terminal there is no SIGHUP
    )
    os.close(terminal)
    os.close(controller)
    out, _ = process.communicate(b"\n", timeout=60)
    assert json.loads(out[out.index(b"{") : out.rindex(b"}") + 1]) == {"a": "ü"}
