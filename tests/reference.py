"""The command reference and the man page, made from Typer's own commands: `python tests/reference.py` writes them anew.

`test_reference.py` holds what is written to what the commands say now.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from cfamc_cli import __version__, cli, errors

HERE = Path(__file__).parents[1]
REFERENCE, MAN = HERE / ".github/REFERENCE.md", HERE / "cfamc_cli/cfamc.1"


@dataclass(frozen=True)
class Command:
    """A command as its own help tells it."""

    name: str
    about: str
    usage: str
    parts: dict[str, list[tuple[str, str]]]  # arguments and options, each with what is said of it


def commands() -> Iterator[Command]:
    """Every command with its full name, in the order of the help."""

    def walk(command: Any, name: str, above: typer.Context | None) -> Iterator[Command]:
        context = typer.Context(command, info_name=name, parent=above, help_option_names=["-h", "--help"])
        parts: dict[str, list[tuple[str, str]]] = {}
        for param in command.get_params(context):
            if (told := param.get_help_record(context)) is not None:
                parts.setdefault(f"{param.param_type_name.capitalize()}s", []).append(told)
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        yield Command(context.command_path, command.help or "", usage, parts)
        for inner in command.list_commands(context) if hasattr(command, "list_commands") else []:
            yield from walk(command.get_command(context, inner), inner, context)

    return walk(typer.main.get_command(cli.app), "cfamc", None)


def exit_codes() -> list[tuple[str, str]]:
    """Each exit code, and the comment that says what it means."""
    source = Path(errors.__file__).read_text(encoding="utf-8")
    told = dict(re.findall(r"^    ([A-Z_]+) = \d+  # (.*)$", source, re.MULTILINE))
    return [(str(int(code)), told.get(code.name, code.name.lower())) for code in errors.ExitCode]


def markdown() -> str:
    """The reference, for GitHub."""
    lines = ["# Commands", "", "Made from the commands themselves by `python tests/reference.py`."]
    for command in commands():
        lines += ["", f"## {command.name}", "", command.about, "", f"```\n{command.usage}\n```"]
        for part, entries in command.parts.items():
            lines += ["", f"{part}:", "", *(f"- `{name}`: {about}" for name, about in entries)]
    lines += ["", "## Exit codes", "", *(f"- {code}: {about}" for code, about in exit_codes())]
    return "\n".join(lines) + "\n"


def man() -> str:
    """The man page, in roff."""
    whole, *further = commands()
    lines = [f'.TH CFAMC 1 "" "cfamc {__version__}"', ".SH NAME", f"cfamc \\- {_roff(whole.about)}"]
    lines += [".SH SYNOPSIS", f".B {_roff(whole.usage)}", *_tagged(whole.parts), ".SH COMMANDS"]
    for command in further:
        lines += [f".SS {_roff(command.name)}", _roff(command.about), ".PP", f".B {_roff(command.usage)}"]
        lines += _tagged(command.parts)
    lines += [".SH EXIT STATUS", *_tagged({"": exit_codes()})]
    lines += [".SH SEE ALSO", _roff("`cfamc recipes explain` says what each key of a recipe means.")]
    return "\n".join(lines) + "\n"


def _tagged(parts: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    for entries in parts.values():
        for name, about in entries:
            yield from (".TP", f".B {_roff(name)}", _roff(about))


def _roff(text: str) -> str:
    """Text on one line, none of which is a command of roff."""
    line = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{line}" if line.startswith((".", "'")) else line


if __name__ == "__main__":
    REFERENCE.write_text(markdown(), encoding="utf-8")
    MAN.write_text(man(), encoding="utf-8")
