"""Which module may import which, and what starts without torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cfamc_cli

PACKAGE = Path(cfamc_cli.__file__).parent
ENGINE = sorted((PACKAGE / "engine").rglob("*.py"))
ABOVE = {f"cfamc_cli.{name}" for name in ("recipe", "errors", "files", "records", "datasets")}  # what engine may import


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module in ("cfamc_cli", "cfamc_cli.engine"):  # then the names are modules
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.name)
def test_the_engine_knows_neither_terminals_nor_what_lies_above_it(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {"typer", "rich", "click"}, name
        if name.startswith("cfamc_cli") and not name.startswith("cfamc_cli.engine."):
            assert name in ABOVE, name


def test_click_is_nowhere_imported() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] == "click" for name in imports(path)), path


def test_safetensors_is_touched_in_one_file_and_nothing_is_unpickled() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = {name.split(".")[0] for name in imports(path)}
        assert "safetensors" not in names or path.name == "checkpoint.py", path
        assert not names & {"dill", "joblib", "shelve"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords
                ), path


_PROBE = """
import contextlib, io, json, sys
from cfamc_cli import cli
codes = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            codes.append(cli.run(arguments))
        except SystemExit as error:
            codes.append(error.code)
heavy = [name for name in ("torch", "torchvision", "numpy", "safetensors", "matplotlib") if name in sys.modules]
print(json.dumps([codes, heavy]))
"""


def test_help_listings_and_recipe_errors_come_without_torch(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("schema = 1\nname = 3\n[data]\ndataset = 'cifar11'\n")
    commands: list[tuple[list[str], int | None]] = [
        (["--help"], 0),
        (["--version"], 0),
        (["pretrain", "--help"], 0),
        (["recipes", "list"], 0),
        (["recipes", "show", "cifar10"], 0),
        (["pretrain", "cifar10", "--dry-run"], 0),
        (["pretrain", str(broken)], 2),
        (["pretrain", str(tmp_path / "missing.toml")], 2),
        (["pretrain", "cifar10", "--set", "train.batchsize=3"], 2),
        (["pretrain", "cifar10", "--set", "adversary.eps=8", "--json"], 2),
        (["nonsense"], 2),
    ]
    (tmp_path / "runs").mkdir()
    known = cli_commands()
    if "compare" in known:
        commands += [(["compare", "--help"], 0), (["compare", str(tmp_path / "runs")], None)]
    arguments = json.dumps([words for words, _ in commands])
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, arguments], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    codes, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    for code, (words, expected) in zip(codes, commands, strict=True):
        assert expected is None or code == expected, words


def cli_commands() -> set[str]:
    from cfamc_cli.cli import app

    return {str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands}
