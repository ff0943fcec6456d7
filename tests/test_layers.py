"""Which module may import which, and what starts without torch."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from process import environment
from tiny import attack_record, probe_record, run_record, tiny_recipe, write_record

import cfamc_cli
from cfamc_cli.recipe.file import to_toml

PACKAGE = Path(cfamc_cli.__file__).parent
ENGINE = sorted((PACKAGE / "engine").rglob("*.py"))
FLOORS = ("errors", "datasets", "recipe", "store", "comparison", "report", "engine", "commands", "cli", "__main__")
BELOW_THE_ENGINE = {"recipe", "store.records", "store.files", "errors", "datasets"}  # files: what a save stands on


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            for alias in node.names:  # a name may be a module
                whole = f"{module}.{alias.name}"
                inside = PACKAGE.parent.joinpath(*whole.split("."))
                yield whole if inside.is_dir() or inside.with_suffix(".py").exists() else module


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def below(name: str) -> str | None:
    """What `name` is called within the package; None for what lies outside and for the package itself."""
    return name.removeprefix("cfamc_cli.") if name.startswith("cfamc_cli.") else None


@pytest.mark.parametrize("path", ENGINE, ids=module_of)
def test_the_engine_knows_neither_terminals_nor_what_lies_above_it(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {"typer", "rich", "click"}, name
        if (inner := below(name)) is not None and inner.split(".")[0] != "engine":
            assert inner.split(".")[0] in BELOW_THE_ENGINE or inner in BELOW_THE_ENGINE, name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_of)
def test_no_import_runs_back_up(path: Path) -> None:
    """Each room stands on those before it; only the commands call the engine."""
    here = module_of(path).split(".")[0]
    if here in ("__init__", "cfamc_cli"):
        return
    for name in imports(path):
        if (inner := below(name)) is None or (there := inner.split(".")[0]) == here:
            continue
        assert FLOORS.index(there) < FLOORS.index(here), f"{module_of(path)} imports {name}"
        assert there != "engine" or here == "commands", f"{module_of(path)} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        inner = {below(name) for name in imports(path)}
        graph[module_of(path)] = {name for name in inner if name is not None and "." in name}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


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


# The one test of what starts without torch

_PROBE = """
import contextlib, importlib, io, json, sys
modules, commands = json.loads(sys.argv[1])
for name in modules:
    importlib.import_module(name)
from cfamc_cli import cli
codes = []
for arguments in commands:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        codes.append(cli.run(arguments))
print(json.dumps([codes, sorted(sys.modules)]))
"""
HEAVY = {
    *("torch", "torchvision", "numpy", "scipy", "safetensors"),
    *("matplotlib", "PIL", "onnx", "tensorboard", "jinja2"),
}


def light_modules() -> list[str]:
    """Every module that lies outside the engine."""
    paths = [path for path in PACKAGE.rglob("*.py") if path not in ENGINE and path.stem != "__main__"]
    dotted = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
    return sorted(name.removesuffix(".__init__") for name in dotted)


def loaded_by(modules: Sequence[str], commands: Sequence[Sequence[str]], *, cwd: Path) -> tuple[list[int], set[str]]:
    """The exit codes of command lines in one process, and the modules that it holds at the end."""
    command = [sys.executable, "-c", _PROBE, json.dumps([modules, commands])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd, env=environment())
    codes, loaded = json.loads(done.stdout.splitlines()[-1])
    return codes, set(loaded)


def test_what_is_light_comes_without_torch(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("schema = 1\nname = 3\n[data]\ndataset = 'cifar11'\n")
    run = tmp_path / "runs" / "20261122-120000-a-000000"
    write_record(run / "run.json", run_record())
    write_record(run / "probes/linear-001/record.json", probe_record())
    write_record(run / "attacks/pgd-001/record.json", attack_record())
    (run / "resolved.json").write_text(json.dumps(tiny_recipe().resolved()))
    (run / "recipe.toml").write_text(to_toml(tiny_recipe()))
    line = {"kind": "train", "step": 1, "batch": 1, "epoch": 1.0, "loss": 1.0, "lr": 0.3}
    line |= {"gradient_norm": 1.0, "effective_rank": 1.0, "feature_std": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    commands = {
        "--help": 0,
        "--version": 0,
        "nonsense": 2,
        "recipes list": 0,
        "recipes show cifar10": 0,
        "recipes schema": 0,
        "recipes explain train.epochs": 0,
        "pretrain --help": 0,
        "pretrain cifar10 --dry-run": 0,
        "pretrain imagenet100 --dry-run --json": 0,
        "pretrain broken.toml": 2,
        "pretrain missing.toml": 2,
        "pretrain cifar10 --set train.batchsize=3": 2,
        "pretrain quickstart --set adversary.eps=8 --json": 2,
        "pretrain --resume latest": 2,
        "bench --help": 0,
        "bench missing.toml": 2,
        "bench cifar10 --set train.batchsize=3": 2,
        "bench cifar10 --set data.limit=50": 2,
        "probe --help": 0,
        "attack --help": 0,
        "attack --eps 8": 2,
        "attack --norm l1": 2,
        "compare --help": 0,
        "compare": 0,
        "compare runs --json": 0,
        "export --help": 0,
        "export latest --metrics csv --out m": 0,
    }
    codes, loaded = loaded_by(light_modules(), [words.split() for words in commands], cwd=tmp_path)
    assert dict(zip(commands, codes, strict=True)) == commands
    assert not loaded & HEAVY


def test_recipes_and_their_plans_come_without_terminal_libraries() -> None:
    code = (
        "import sys; from cfamc_cli.recipe import plan, file as recipe_file; from cfamc_cli.commands import recipes;"
        "plan.plan(recipe_file.load('cifar10')); recipes.titles();"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'rich', 'typer')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
