"""Where the process starts: one handler turns every failure into a line, a hint and an exit code."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit."""
    # Read when torch is loaded. By GNU's default, threads that wait for work spin 300,000 rounds: others have to wait.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        from cfamc_cli.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # in the moment before there is a handler, or after
        code = 130
    try:
        sys.stdout and sys.stdout.flush()
    except OSError:  # whoever read us left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


if __name__ == "__main__":
    main()
