"""Times `cfamc --help` beside a bare Typer app, in turns, and checks that torch stays unimported.

Example: python tests/benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import emit, machine, paired_ratio, summary

BARE = '''
import typer

app = typer.Typer()


@app.command()
def main(name: str = "you") -> None:
    """Say hello."""
    print(name)


app()
'''

SPY = """
import sys
sys.argv = ["cfamc", "--help"]
from cfamc_cli.__main__ import main
try:
    main()
except SystemExit:
    pass
heavy = [name for name in ("torch", "torchvision", "numpy") if name in sys.modules]
print(",".join(heavy), file=sys.stderr)
"""


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE)
        commands = {
            "bare typer": [sys.executable, str(bare), "--help"],
            "cfamc": [str(Path(sys.executable).parent / "cfamc"), "--help"],
        }
        took: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(1 + options.turns):
            for name, command in commands.items():
                once = seconds(command)
                if turn > 0:  # the first one fills the page cache
                    took[name].append(once)
    spied = subprocess.run([sys.executable, "-c", SPY], check=True, capture_output=True, text=True)
    heavy = [name for name in spied.stderr.strip().split(",") if name]

    ratio = paired_ratio(took["cfamc"], took["bare typer"])
    record = {
        "machine": machine(),
        "cfamc_seconds": summary(took["cfamc"]),
        "bare_seconds": summary(took["bare typer"]),
        "ratio": ratio,
        "heavy_modules_imported": heavy,
    }
    rows = [["--help", "median s"]]
    rows += [[name, f"{summary(values)['median']:.3f}"] for name, values in took.items()]
    rows += [["ratio", f"{ratio:.2f}"], ["heavy imports", ", ".join(heavy) or "none"]]
    emit(record, title="Start-up", rows=rows)


if __name__ == "__main__":
    main()
