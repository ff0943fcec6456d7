"""The command reference and the man page are those of the commands as they are."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import reference


def test_the_reference_and_the_man_page_are_those_of_the_commands() -> None:
    """Write them anew with: python tests/reference.py."""
    assert reference.REFERENCE.read_text(encoding="utf-8") == reference.markdown()
    assert reference.MAN.read_text(encoding="utf-8") == reference.man()


def test_they_name_every_command_option_and_exit_code() -> None:
    told = reference.markdown()
    for command in reference.commands():
        assert f"\n## {command.name}\n" in told
        assert command.about
        assert all(about for entries in command.parts.values() for _, about in entries), command.name
    assert "- `--save-examples N`: Draw N adversarial examples as a PNG." in told
    assert "\n- 138: SIGUSR1, by Linux's number:" in told
    assert told.count("- `-h, --help`: Show this message and exit.") == len(list(reference.commands()))


def test_man_shows_the_page_without_a_complaint() -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    command = ["groff", "-man", "-Tascii", "-P-cbou", "-ww", str(reference.MAN)]  # without bold and underlines
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    words = " ".join(shown.stdout.split())
    for part in ("cfamc - Train vision encoders", "cfamc recipes explain", "--step-size LENGTH", "EXIT STATUS"):
        assert part in words
