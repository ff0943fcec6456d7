"""What shells offer: by Typer's protocol for each of them, and by the shells themselves where they are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from process import environment
from tiny import probe_record, run_record, write_record

from cfamc_cli.cli import run

RUN, NEWER = "20261122-120000-tiny-000000", "20261123-120000-other-000001"
OFFERED = [
    ("pretrain qui", ["quickstart"]),
    ("bench cifar10-l", ["cifar10-laptop", "cifar10-laptop-fast", "cifar10-laptop-strong"]),
    ("pretrain mine/", ["mine/own.toml", "mine/further/"]),
    ("recipes copy fol", ["folder"]),
    ("recipes explain train.ep", ["train.epochs"]),
    ("attack --runs runs 2026", [RUN, NEWER]),
    ("probe --runs runs be", ["best"]),
    ("runs rm --runs runs la", ["latest"]),
    ("pretrain --runs runs --resume 2026", [RUN, NEWER]),
    ("attack --runs nowhere 2026", []),
    (f"attack --runs runs {RUN} --head linear-", ["linear-001"]),
    ("export --runs newer --head linear-", []),
    ("export tiny --runs runs --head linear-", ["linear-001"]),
    ("probe --runs runs --head linear", ["linear"]),
    ("attack --attack s", ["square", "smallest", "smoothing"]),
    ("attack --attack apgd", ["apgd-ce", "apgd-dlr", "apgd-t"]),
    ("pretrain cifar10 --set adversary.n", ["adversary.name=none", "adversary.name=pgd", "adversary.name=free"]),
    ("pretrain cifar10 --set adversary.name=f", ["adversary.name=free"]),
    (
        "pretrain cifar10 --set optimizer.n",
        ["optimizer.name=lars", "optimizer.name=adamw", "optimizer.nesterov=true", "optimizer.nesterov=false"],
    ),
    ("pretrain cifar10 --set optimizer.l", ["optimizer.lr=", "optimizer.lr=0.3"]),
    ("bench cifar10 --set adversary.e", ["adversary.eps=", "adversary.eps=8/255"]),
    ("pretrain cifar10 --set crops.0.sc", ["crops.0.scale="]),  # of two numbers and a blank
    ("pretrain no-such-recipe --set optimizer.l", ["optimizer.lr="]),
    ("pretrain cifar10 --set adversary.name = f", ["free"]),  # as bash splits it
    ("pretrain cifar10 --set seed = 1 --set adversary.name =", ["none", "pgd", "free"]),
    ("probe --runs = runs --head = linear", ["linear"]),
    ("probe --set probe.tr", ["probe.trades_beta="]),
    ("probe --set train", []),
    ("export --part en", ["encoder"]),
]


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(tmp_path / "runs" / RUN / "run.json", run_record(id=RUN))
    (tmp_path / "runs" / RUN / "tags.json").write_text('["best"]')
    write_record(tmp_path / "runs" / RUN / "probes/linear-001/record.json", probe_record(run=RUN))
    write_record(tmp_path / "newer" / NEWER / "run.json", run_record(id=NEWER, name="other"))
    write_record(tmp_path / "runs" / NEWER / "run.json", run_record(id=NEWER, name="other"))
    (tmp_path / "mine/further").mkdir(parents=True)
    (tmp_path / "mine/own.toml").touch()
    (tmp_path / "mine/notes.txt").touch()


@pytest.mark.parametrize(("line", "offered"), OFFERED)
def test_words_are_offered(
    line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_CFAMC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(["cfamc", *line.split()]))
    monkeypatch.setenv("COMP_CWORD", str(len(line.split())))
    with pytest.raises(SystemExit):
        run([])
    assert sorted(capsys.readouterr().out.split()) == sorted(offered)


@pytest.mark.parametrize(
    ("shell", "told"),
    [
        ("zsh", '"linear-001":"linear head"'),
        ("fish", "linear-001\tlinear head"),
        ("bash", "linear-001"),
    ],
)
def test_shells_are_told_what_a_word_means(
    shell: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"cfamc attack {RUN} --runs runs --head linear-0"
    monkeypatch.setenv("_CFAMC_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    with pytest.raises(SystemExit):
        run([])
    assert told in capsys.readouterr().out


ASKED = {
    "bash": 'eval "$(_CFAMC_COMPLETE=source_bash cfamc)"; COMP_WORDS=(cfamc pretrain qui); COMP_CWORD=2; '
    '_cfamc_completion cfamc; printf "%s\\n" "${COMPREPLY[@]}"; '
    "COMP_WORDS=(cfamc bench cifar10 --set adversary.name = p); COMP_CWORD=6; "
    '_cfamc_completion cfamc; test "${COMPREPLY[*]}" = pgd || exit 1',
    "fish": "_CFAMC_COMPLETE=source_fish cfamc | source; complete -C 'cfamc pretrain qui'",
    "zsh": "autoload -Uz compinit; compinit -u -d ./dump; _arguments() { print -r -- $@ }; "
    'eval "$(_CFAMC_COMPLETE=source_zsh cfamc)"; words=(cfamc pretrain qui); CURRENT=3; _cfamc_completion',
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", ASKED)
def test_the_shells_offer_it(shell: str, tmp_path: Path) -> None:
    """The functions that the shells call; only zsh's own display is replaced by printing."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = f"{Path(sys.executable).parent}:{environment().get('PATH', '')}"
    there = environment() | {"HOME": str(tmp_path), "PATH": path}
    done = subprocess.run([shell, "-c", ASKED[shell]], capture_output=True, text=True, check=False, env=there)
    assert (done.returncode, "quickstart" in done.stdout) == (0, True), done
    assert "cifar10" not in done.stdout
