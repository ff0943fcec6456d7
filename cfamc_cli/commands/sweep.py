"""Several runs of one recipe: a grid of settings and seeds, taken up again as a whole, several at a time.

Each run is a process of its own, `cfamc pretrain` as a person would type it; this starts them and waits.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cfamc_cli.commands.common import Options, Session, among_others, interruption, session
from cfamc_cli.commands.pretrain import pinned
from cfamc_cli.errors import CfamcError, Interrupted, invalid
from cfamc_cli.recipe import file
from cfamc_cli.report import terminal
from cfamc_cli.store.records import RunRecord
from cfamc_cli.store.runs import RunFolder, list_runs

_SECONDS = 0.2  # between two looks at the processes


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    settings: tuple[str, ...]  # texts of --set
    seed: int
    label: str  # of settings that the grid varies, and of the seed

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Job:
    """What is left to do for a point."""

    point: Point
    words: tuple[str, ...]  # behind `cfamc pretrain`


def grid(reference: str, overrides: Sequence[str], path: Path | None, seeds: Sequence[int]) -> list[Point]:
    """Every combination of the values that settings and seeds are given.

    Args:
        reference: The recipe.
        overrides: Texts of --set; one whose value the recipe refuses as a whole, and which has commas, is several.
        path: A TOML file in which keys of a recipe, and seed, have lists of values; None for none.
        seeds: Of each combination; the recipe's own where there are none.

    Raises:
        CfamcError: The file is none such, or a recipe is wrong.
    """
    axes, listed = [list(_values(reference, override)) for override in overrides], list(seeds)
    if path is not None:
        for key, values in file.leaves(file.parse(file.read(path, label=str(path)), label=str(path)), ""):
            if not isinstance(values, list) or not values:
                raise invalid(f"{path}: {key} is no list of values", "write it as: crops.0.count = [4, 8]")
            if key == "seed":
                listed += values
            else:
                axes.append([f"{key}={file.toml(value)}" for value in values])
    points = []
    for settings in itertools.product(*axes):
        recipes = [file.load(reference, overrides=settings, seed=seed) for seed in listed or (None,)]
        varied = [setting for setting, axis in zip(settings, axes, strict=True) if len(axis) > 1]
        points += [Point(settings, recipe.seed, " ".join([*varied, f"seed={recipe.seed}"])) for recipe in recipes]
    return points


def _values(reference: str, override: str) -> Iterator[str]:
    key, _, text = override.partition("=")
    values = [text]
    if "," in text:
        try:
            file.load(reference, overrides=[override])
        except CfamcError:
            values = text.split(",")
            with suppress(ValueError):
                values = [file.toml(value) for value in tomllib.loads(f"x = [{text}]")["x"]]
    yield from (f"{key}={value.strip()}" for value in values)


def sweep(
    reference: str, points: Sequence[Point], *, jobs: int, print_jobs: bool, flags: Sequence[str], options: Options
) -> None:
    """Train what is not finished of a grid, or print a line for each run that is left.

    Args:
        reference: The recipe.
        points: The grid.
        jobs: Runs at a time.
        print_jobs: Print lines for a shell or an array of jobs, and do nothing.
        flags: Others of `pretrain`, for each run.
        options: Where and how.

    Raises:
        CfamcError: Some runs did not finish; or a signal ended the work, and all can be gone on with.
    """
    if among_others():
        raise invalid("a sweep starts its own processes, and torchrun has started others", "leave out torchrun")
    done, left = _sorted(reference, points, options)
    if print_jobs:
        common = ("--runs", str(options.store), "--device", options.device, *flags)
        again = (_words(reference, job.point) for job in left)  # --jobs 1: a line that is run again goes on
        lines = (shlex.join(["cfamc", "pretrain", *words, *common, "--jobs", "1"]) for words in again)
        terminal.write_out("".join(f"{line}\n" for line in lines))
        return
    message = "interrupted; every run is kept where it was"
    with session(options) as working, interruption(message=message, hint=lambda: "give the same command again"):
        for point, run in done.items():
            working.talk.message(f"left out: {point}: finished as {run.id}")
        working.talk.message(f"{len(left)} of {len(points)} runs to train, {min(jobs, max(len(left), 1))} at a time")
        trained, failed = _train(left, jobs, flags, working)
    records = [run.record().model_dump(mode="json") for run in done.values()] + trained
    if failed:
        told = "; ".join(f"{point} (exit code {code})" for point, code in failed.items())
        raise CfamcError(
            f"{len(failed)} of {len(points)} runs did not finish: {told}",
            hint="see their own messages; the same command goes on with them",
            details={"runs": records},
        )
    if options.as_json:
        terminal.print_json({"runs": records})
    else:
        terminal.write_out("".join(f"{record['id']}\n" for record in records))


def _sorted(reference: str, points: Sequence[Point], options: Options) -> tuple[dict[Point, RunFolder], list[Job]]:
    """Which points are finished, and what is left to do; the newest run of a point counts, a finished one most."""
    store, known = options.store, dict[tuple[str, int], tuple[RunFolder, RunRecord]]()
    for run in list_runs(store) if store.is_dir() else []:
        with suppress(CfamcError):
            record = run.record()
            key = (record.recipe_digest, record.seed)
            if key not in known or known[key][1].status != "finished":
                known[key] = (run, record)
    done: dict[Point, RunFolder] = {}
    left = []
    for point in points:
        recipe = pinned(file.load(reference, overrides=point.settings, seed=point.seed), store)
        found = known.get((recipe.digest(), point.seed))
        if found is None:
            left.append(Job(point, _words(reference, point)))
        elif found[1].status == "finished":
            done[point] = found[0]
        else:
            left.append(Job(point, ("--resume", str(found[0].path))))
    return done, left


def _words(reference: str, point: Point) -> tuple[str, ...]:
    settings = itertools.chain.from_iterable(("--set", setting) for setting in point.settings)
    return (reference, *settings, "--seed", str(point.seed))


def _train(
    left: Sequence[Job], jobs: int, flags: Sequence[str], working: Session
) -> tuple[list[dict[str, Any]], dict[Point, int]]:
    """Run jobs until none is left: the records of those that finished, and the exit codes of the others."""
    waiting = list(reversed(left))
    running: dict[int, tuple[Job, subprocess.Popen[str]]] = {}
    trained: list[dict[str, Any]] = []
    failed: dict[Point, int] = {}
    cards = _cards(working.options.device) if jobs > 1 else []
    try:
        while waiting or running:
            for slot in range(jobs):
                if waiting and slot not in running:
                    job = waiting.pop()
                    running[slot] = job, _start(job, slot, cards, jobs, flags, working)
            for slot, (job, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[slot]
                    out = process.communicate()[0]
                    if code:
                        failed[job.point] = code
                    else:
                        trained.append(json.loads(out))
            time.sleep(_SECONDS)
    except Interrupted:
        for _, process in running.values():
            process.terminate()  # once: a second signal would cut what it saves
        for _, process in running.values():
            process.wait()
        raise
    return trained, failed


def _start(
    job: Job, slot: int, cards: Sequence[str], jobs: int, flags: Sequence[str], working: Session
) -> subprocess.Popen[str]:
    options, environment = working.options, dict(os.environ)
    if cards:
        environment["CUDA_VISIBLE_DEVICES"] = cards[slot % len(cards)]
    elif jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    words = [*job.words, *flags, "--runs", str(options.store), "--json"]
    words += ["--device", options.device, *(["--quiet"] if options.quiet else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "cfamc_cli", "pretrain", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if jobs > 1 else None,  # alone it has the terminal for itself
        text=True,
        start_new_session=True,  # what a terminal sends to all is for this process, which passes it on
    )
    if process.stderr is not None:
        threading.Thread(target=_pass_on, args=(process.stderr, str(job.point), working), daemon=True).start()
    return process


def _pass_on(stream: IO[str], label: str, working: Session) -> None:
    for line in stream:
        working.talk.message(f"[{label}] {line.rstrip()}")


def _cards(device: str) -> list[str]:
    """The GPUs of this machine that runs may be spread over, as CUDA_VISIBLE_DEVICES names them."""
    if device not in ("auto", "cuda"):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [card for card in visible.split(",") if card]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
