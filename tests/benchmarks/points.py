"""Points of a measurement: recipes trained and judged by the commands of this project, and the record of them.

A record is a file of JSON lines that is appended to. Who measures leaves out what stands there already, so that a long
measurement is made in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine

from cfamc_cli.errors import ExitCode
from cfamc_cli.recipe.schema import Recipe

HEADS = ("official", "converged")  # protocols of the linear head: 20 epochs of Adam, and to its optimum
EPS = ("4/255", "8/255")
FIGURES = ("clean", *EPS)


class Diverged(SystemExit):
    """A training whose loss or weights left the numbers."""


class Record:
    """The lines of the record file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def append(self, kind: str, **facts: object) -> None:
        line = {"kind": kind, **facts, "machine": machine()}
        with self.path.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def of(self, kind: str, **facts: object) -> list[dict[str, Any]]:
        """The lines of a kind that say all of this."""
        return [line for line in self.lines if line["kind"] == kind and facts.items() <= line.items()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every measurement of points asks for."""
    parser.add_argument("folder", type=Path, help="image folder with train/<class>/")
    parser.add_argument("--record", type=Path, required=True, help="JSON lines of all that was measured; appended to")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="store of the trained points")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--holdout", type=int, default=5000, help="training images that are kept for the evaluation")
    parser.add_argument("--limit", "--n", dest="n", type=int, default=2000, help="so many images are judged")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def lengths(recipe: Recipe) -> dict[str, float]:
    """How long a recipe trains, in epochs, by dotted key: the phase of its own tables, and those after it."""
    resolved = recipe.resolved()
    after = {f"phase.{place}.epochs": phase["epochs"] for place, phase in enumerate(resolved.get("phase", ()))}
    return {"train.epochs": resolved["train"]["epochs"], **after}


def scaled(keys: Mapping[str, float], factor: float) -> list[str]:
    """Settings that make every phase of a recipe longer by the same factor."""
    return [f"{key}={own * factor:.6g}" for key, own in keys.items()]


def settings(options: argparse.Namespace) -> list[str]:
    """What every recipe is trained with here: the images, those held out, and no online evaluation."""
    return [
        "data.dataset=folder",
        f"data.root={options.folder.expanduser().absolute()}",
        f"data.holdout={options.holdout}",
        "train.evaluate_every=0",
    ]


def cfamc(options: argparse.Namespace, *words: str) -> dict[str, Any]:
    """Run a command of this project and return the JSON object that it prints."""
    command = [sys.executable, "-m", "cfamc_cli", *words, "--json", "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        failure = Diverged if done.returncode == ExitCode.DIVERGED else SystemExit
        raise failure(f"exit code {done.returncode}: cfamc {' '.join(words)}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def train(
    options: argparse.Namespace, recipe: str, overrides: Sequence[str], *, seed: int, runs: Path
) -> dict[str, Any]:
    """Train a recipe with overrides beside `settings`, and return its run.json."""
    words = [word for setting in (*settings(options), *overrides) for word in ("--set", setting)]
    return cfamc(options, "pretrain", recipe, *words, "--seed", str(seed), "--runs", str(runs))


def judge(options: argparse.Namespace, record: Record, run: str, *, name: str, split: str) -> None:
    """Fit both heads of a run and attack them by PGD-20 of step 0.01, where the record lacks it."""
    path = options.runs / run
    for head in HEADS:
        which = {"run": run, "head": head, "split": split, "n": options.n}
        if record.of("evaluation", **which):
            continue
        say(f"{name}: head {head}")
        common = [str(path), "--split", split]
        probe = cfamc(options, "probe", *common, "--head", "linear", "--protocol", head)
        radii = [word for eps in EPS for word in ("--eps", eps)]
        pgd = ["--attack", "pgd", "--steps", "20", "--step-size", "0.01", *radii, "--limit", str(options.n)]
        results = cfamc(options, "attack", *common, "--head", probe["id"], *pgd)["results"]
        right = {eps: found["robust"]["correct"] for eps, found in zip(EPS, results, strict=True)}
        right["clean"] = results[0]["clean"]["correct"]
        record.append("evaluation", **which, right=right)


def percentages(record: Record, run: str, *, head: str, split: str, n: int) -> dict[str, float] | None:
    """The figures of a run under a head, in percent of n images; None where it was not judged so."""
    judged = record.of("evaluation", run=run, head=head, split=split, n=n)
    return {figure: 100 * judged[-1]["right"][figure] / n for figure in FIGURES} if judged else None
