"""The command line as a contract: its surface, its exit codes, one JSON object in every case, no terminal too odd."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from process import cfamc, environment
from tiny import image_folder, recipe_text

from cfamc_cli import __main__, __version__, cli
from cfamc_cli.recipe import file

SURFACE = {
    "cfamc": "--install-completion --show-completion --version",
    "cfamc bench": "RECIPE --alone --attack --device --json --quiet/-q --runs --seconds --set",
    "cfamc pretrain": (
        "RECIPE --device --dry-run --force --jobs --json --plot --print-jobs --quiet/-q --resume --runs --seed --seeds "
        "--set --sweep --track"
    ),
    "cfamc probe": (
        "RUN --architecture --batch-norm --crops --data --device --epochs --features --head --import --json --limit "
        "--mean --network --protocol --quiet/-q --resume --runs --set --size --split --std --stem"
    ),
    "cfamc attack": (
        "RUN --alpha --attack --audit --corruptions --data --device --eps --head --json --limit --n --n0 --norm --plot "
        "--queries --quiet/-q --restarts --runs --save-examples --search-precision --sigma --source --space --split "
        "--step-size --steps --strict --targets --unlabelled"
    ),
    "cfamc compare": (
        "REFERENCES --baseline --checklist --fold/--no-fold --format --html --json --limit --plot --published --runs "
        "--sort --where"
    ),
    "cfamc export": "RUN --device --force --format --head --json --metrics --out --part --quiet/-q --runs",
    "cfamc recipes": "",
    "cfamc recipes list": "--json",
    "cfamc recipes show": "NAME --plot",
    "cfamc recipes copy": "NAME TARGET --force",
    "cfamc recipes explain": "KEY --json",
    "cfamc recipes schema": "",
    "cfamc runs": "",
    "cfamc runs list": "--json --runs",
    "cfamc runs show": "RUN --runs",
    "cfamc runs watch": "RUN --runs",
    "cfamc runs tag": "RUN WORDS --runs",
    "cfamc runs untag": "RUN WORDS --runs",
    "cfamc runs rm": "REFERENCES --runs --yes/-y",
    "cfamc runs gc": "REFERENCES --dry-run --json --runs",
}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its full name."""

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        for inner, found in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {inner}", found)

    yield from walk("cfamc", typer.main.get_command(cli.app))


def surface() -> dict[str, str]:
    """What each command takes: arguments in order, then options as they are spelled, by name."""
    found = {}
    for name, command in commands():
        words = [param.name.upper() for param in command.params if param.param_type_name == "argument"]
        options = [param for param in command.params if param.param_type_name == "option"]
        words += sorted("/".join([*param.opts, *param.secondary_opts]) for param in options)
        found[name] = " ".join(words)
    return found


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_surface_changes_only_on_purpose() -> None:
    assert surface() == SURFACE


@pytest.mark.parametrize("name", SURFACE)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        code, out, err = run(capsys, *name.split()[1:], flag)
        assert (code, err) == (0, "")
        assert out.startswith(f"Usage: {name} ")
        for option in re.findall(r"--[a-z-]+", SURFACE[name]):
            assert option in out
    for line in out.splitlines():
        assert len(line) <= 80, line


def test_without_a_command_the_help_is_talk(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("recipes",), ("runs",)):
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, "")
        assert err.startswith("Usage: cfamc")
        assert "Commands:" in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--version")
    first, libraries, devices = out.splitlines()
    assert (code, first, err) == (0, f"cfamc {__version__}", "")
    assert libraries.startswith(f"torch {metadata.version('torch')}, torchvision ")
    assert f"{os.cpu_count()} cores of " in devices


INVALID: list[tuple[list[str], str]] = [
    (["nothing"], "No such command"),
    (["--nothing"], "No such option"),
    (["pretrain"], "which recipe?"),
    (["pretrain", "a", "b"], "unexpected extra argument"),
    (["pretrain", "--seed", "x"], "--seed"),
    (["pretrain", "--set"], "--set"),
    (["pretrain", "quickstart", "--seed", "1", "--seeds", "1"], "exclude each other"),
    (["pretrain", "quickstart", "--seeds", "1,x"], "not a list of whole numbers"),
    (["pretrain", "quickstart", "--seeds", "1,1"], "names a seed twice"),
    (["pretrain", "quickstart", "--seeds", ""], "not a list of whole numbers"),
    (["pretrain", "quickstart", "--set", "crops.0.cuont=1"], "crops.0.cuont"),
    (["pretrain", "quickstart", "--set", "adversary.eps=8"], "8/255"),
    (["pretrain", "nowhere.toml"], "no recipe"),
    (["pretrain", "--resume", "latest", "--seed", "1"], "--resume"),
    (["pretrain", "quickstart", "--resume", "latest", "--dry-run"], "exclude each other"),
    (["pretrain", "--resume", "latest", "--runs", "nowhere"], "no run in nowhere"),
    (["recipes", "nothing"], "hint: cfamc recipes --help lists what there is"),
    (["compare", "--format", "x"], "error: Invalid value for '--format': 'x' is not one of 'rich',"),
    (["recipes", "show"], "NAME"),
    (["recipes", "show", "nothing"], "no recipe"),
]


@pytest.mark.parametrize(("words", "says"), INVALID)
def test_what_is_invalid_is_said_in_a_line_and_in_json(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert "Traceback" not in err
    code, out, again = run(capsys, *words, "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"]) == (2, 2)
    assert set(error) >= {"message", "hint", "exit_code"}
    assert again.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_every_problem_of_a_recipe_is_in_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "quickstart", "--set", "train.epochs=-1", "--set", "model.width=0", "--json"]
    code, out, _ = run(capsys, *words)
    assert code == 2
    problems = json.loads(out)["error"]["problems"]
    assert [problem["path"] for problem in problems] == ["model.width", "train.epochs"]


def test_a_dry_run_looks_at_the_folder_that_it_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = (
        "pretrain",
        "quickstart",
        "--dry-run",
        "--set",
        "data.dataset=folder",
        "--set",
        f"data.root={tmp_path / 'a'}",
    )
    code, out, err = run(capsys, *words)
    assert (code, "counts are per 1,000" in out, "a does not exist; counts are of a stand-in" in err) == (0, True, True)
    image_folder(tmp_path / "a", train=50)
    code, out, err = run(capsys, *words, "--set", "data.holdout=20")
    assert (code, "# images          130 images\n" in out, err) == (0, True, "")
    (tmp_path / "a/train/loose.png").write_bytes((tmp_path / "a/train/ant/000.png").read_bytes())
    assert run(capsys, *words)[0] == 4


def test_dry_run_prints_a_recipe_that_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "pretrain", "cifar10", "--dry-run", "--seed", "7", "--set", "train.epochs=2")
    assert (code, err) == (0, "")
    for word in ("parameters", "weight updates", "view passes", "FLOP", "memory"):
        assert word in out
    assert "# memory          about 4.2 GiB in bfloat16, 2.2 with train.memory = recompute\n" in out
    (tmp_path / "resolved.toml").write_text(out)
    resolved = file.load(str(tmp_path / "resolved.toml"))
    assert resolved == file.load("cifar10", overrides=["train.epochs=2"], seed=7)
    code, out, err = run(capsys, "pretrain", "cifar10", "--dry-run", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["recipe"] == file.load("cifar10").resolved()
    assert answer["plan"]["weight_updates"] == 10 * 500 * 3
    assert set(answer["plan"]) >= {"parameters", "view_passes", "flops", "memory"}
    code, out, _ = run(capsys, "pretrain", "cifar10", "--dry-run", "--seeds", "3,5")
    assert (code, out.splitlines()[-1]) == (0, "# runs            2, seeds 3, 5; counts are of each")


def test_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "recipes", "list")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split()[0] == "quickstart"
    code, listed, _ = run(capsys, "recipes", "list", "--json")
    recipes = json.loads(listed)["recipes"]
    assert [recipe["name"] for recipe in recipes] == [line.split()[0] for line in out.splitlines()]
    assert all(recipe["title"] for recipe in recipes)
    code, text, err = run(capsys, "recipes", "show", "quickstart")
    assert (code, err) == (0, "")
    assert text == file.shipped()["quickstart"].read_text()
    assert run(capsys, "recipes", "copy", "quickstart") == (0, "quickstart.toml\n", "")
    assert Path("quickstart.toml").read_text().partition("\n")[2] == text  # below the line for editors
    Path("quickstart.toml").write_text("mine")
    code, out, err = run(capsys, "recipes", "copy", "quickstart")
    assert (code, out) == (2, "")
    assert "--force" in err
    assert Path("quickstart.toml").read_text() == "mine"
    assert run(capsys, "recipes", "copy", "quickstart", "--force")[0] == 0
    assert Path("quickstart.toml").read_text().partition("\n")[2] == text  # below the line for editors
    assert run(capsys, "recipes", "copy", "quickstart", "other.toml") == (0, "other.toml\n", "")
    code, _, err = run(capsys, "recipes", "copy", "quickstart", "no/such/folder.toml")
    assert code == 1
    assert "no such file" in err


# Whole processes


def shell(line: str, folder: Path, **env: str) -> tuple[int, str, str]:
    """Run a line of bash in which $cfamc is the program."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        env=environment(cfamc=f"{sys.executable} -m cfamc_cli", **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


DRY = "$cfamc pretrain quickstart --dry-run --json"
BAD = "$cfamc pretrain quickstart --set adversary.eps=8 --json"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (f"{DRY} >&-", 0),
        (f"{DRY} 2>&- <&-", 0),
        (f"{BAD} >&- 2>&- <&-", 2),
        (f"{DRY} | head -1", 0),
        ("$cfamc --help | head -1", 0),
        (f"{DRY} >/dev/full", 1),
        (f"{BAD} >/dev/full", 2),
        (f"{BAD} 2>/dev/full", 2),
        ("$cfamc recipes list >/dev/full", 1),
    ],
)
def test_streams_that_take_nothing(line: str, code: int, tmp_path: Path) -> None:
    found, out, err = shell(line, tmp_path)
    assert found == code, (out, err)
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    if "head" in line:
        assert len(out.splitlines()) == 1
        assert err == ""


@pytest.mark.parametrize(
    "env",
    [
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "COLUMNS": "20"},
        {"HOME": "/proc/none", "NO_COLOR": "1", "TERM": "nonsense", "COLUMNS": "x"},
    ],
)
def test_json_parses_in_any_environment(env: dict[str, str], tmp_path: Path) -> None:
    text = recipe_text().replace('name = "tiny"', 'name = "caf\\u00e9 \\u202e [red]x[/] \\u001b[31m"')
    (tmp_path / "recipe.toml").write_text(text)
    code, out, err = shell("$cfamc pretrain recipe.toml --dry-run --json", tmp_path, **env)
    assert (code, err) == (0, "")
    assert json.loads(out)["recipe"]["name"] == "caf\u00e9 \u202e [red]x[/] \x1b[31m"
    code, out, err = shell("$cfamc pretrain r\u00e9cipe.toml --json", tmp_path, **env)
    assert code == 2, err
    assert "no recipe" in json.loads(out)["error"]["message"]
    assert "\x1b" not in err


def test_completion_prints_a_script_and_completes(tmp_path: Path) -> None:
    # Typer looks among its parents for a shell: without the exit, bash would become the program and be none.
    code, script, _ = shell("$cfamc --show-completion bash; exit $?", tmp_path)
    assert code == 0
    assert "complete " in script
    assert "cfamc" in script
    code, source, _ = shell("_CFAMC_COMPLETE=source_bash $cfamc", tmp_path)
    assert code == 0
    assert "_CFAMC_COMPLETE=complete_bash" in source
    code, words, _ = shell('COMP_WORDS="cfamc pre" COMP_CWORD=1 _CFAMC_COMPLETE=complete_bash $cfamc', tmp_path)
    assert (code, words.split()) == (0, ["pretrain"])


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Else what a library says on stderr would land in it."""
    code = """
import os, sys
from cfamc_cli import cli
for number in (0, 1, 2):
    os.close(number)
cli.run(["--version"])
with open("opened", "w") as file:
    file.write(str(file.fileno()))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=False, timeout=120)
    assert (tmp_path / "opened").read_text() == "3"


def test_an_interrupt_in_the_first_moment_is_no_traceback(tmp_path: Path) -> None:
    code = """
from cfamc_cli import __main__, cli
def interrupted(words): raise KeyboardInterrupt
cli.run = interrupted
__main__.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_command_cut_by_ctrl_c_still_prints_its_object(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cfamc_cli.commands.runs.show_list", cut)
    monkeypatch.setattr("cfamc_cli.commands.compare.gather", cut)
    for command in (["runs", "list"], ["compare"]):
        assert cli.run([*command, *["--json"] * as_json]) == 130
        out = capsys.readouterr().out
        error = {"message": "interrupted", "hint": "", "exit_code": 130}
        assert (json.loads(out) == {"error": error}) if as_json else not out


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_threads_spin_for_a_short_time_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
) -> None:
    variables = dict(own)
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(cli, "run", lambda _: 7)  # all of the program; torch comes with it
    with pytest.raises(SystemExit, match="7"):
        __main__.main()
    assert variables == (own or {"GOMP_SPINCOUNT": "10000"})


def test_the_program_is_installed_under_its_name(tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "cfamc"
    done = subprocess.run([program, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == cfamc("--version", cwd=tmp_path).out
    assert done.stdout.startswith(f"cfamc {__version__}\ntorch ")
