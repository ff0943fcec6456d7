"""The one exception that a user is meant to see, and the exit codes of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from importlib.util import find_spec


class ExitCode(IntEnum):
    """What a shell learns from a run of cfamc."""

    DONE = 0
    FAILED = 1  # the work failed
    INVALID = 2  # invocation or recipe
    DIVERGED = 3  # training became non-finite
    BAD_DATA = 4  # data set or checkpoint
    UNTRUSTED = 5  # an evaluation that --strict refuses
    LOCKED = 6  # the run belongs to a live process
    HUNG_UP = 129  # SIGHUP, the terminal is gone; the work can be resumed
    INTERRUPTED = 130  # SIGINT; the work can be resumed
    ASKED = 138  # SIGUSR1, by Linux's number: a scheduler wants the machine back; the work can be resumed
    TERMINATED = 143  # SIGTERM; the work can be resumed


class CfamcError(Exception):
    """A failure with a cause that a user can act on.

    Attributes:
        message: One line that names the thing that is wrong.
        hint: One line with the way out; empty where there is none.
        exit_code: What the process exits with.
        details: Plain JSON values for `--json`, such as all problems of a recipe.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        exit_code: ExitCode = ExitCode.FAILED,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code
        self.details = dict(details or {})


def invalid(message: str, hint: str = "") -> CfamcError:
    """What was asked for makes no sense."""
    return CfamcError(message, hint=hint, exit_code=ExitCode.INVALID)


def bad_data(message: str, hint: str = "") -> CfamcError:
    """What was read cannot be used: a data set, a checkpoint, a record."""
    return CfamcError(message, hint=hint, exit_code=ExitCode.BAD_DATA)


def require_libraries(*names: str, by: str, extra: str) -> None:
    """Refuse what needs libraries that only an extra of the package installs, without importing them.

    Raises:
        CfamcError: Exit 2, with how to install them.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise invalid(f"{by} needs {', '.join(missing)}", f"pip install 'cfamc[{extra}]'")


class Interrupted(BaseException):
    """A signal ended the work; what was saved can be resumed.

    Attributes:
        signal: Its number.
        message: What is kept.
        hint: One line with the way on; empty where nothing is left to go on with.
        details: Plain JSON values for `--json`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number
        self.message, self.hint = "interrupted", ""
        self.details: dict[str, object] = {}
