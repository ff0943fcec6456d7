"""The table of protections follows the code, and a sample of it is taken out: see protections.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
from protections import ROOT, SAMPLE, TABLE


def test_every_protection_is_where_the_table_says() -> None:
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    for one in TABLE:
        whole, without = one.taken_out(ROOT / "cfamc_cli")
        assert whole != without
        file, _, name = one.test.partition("::")
        assert f"\ndef {name.partition('[')[0]}(" in tests[file], one.test
    assert len({one.promise for one in TABLE}) == 32


@pytest.mark.slow
def test_who_takes_protections_out_sees_red() -> None:
    command = [sys.executable, str(ROOT / "tests" / "protections.py"), "--sample"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{SAMPLE} of {SAMPLE} noticed" in done.stdout
