"""Accuracy on held-out images against training time: the published recipe, faster ones, and the official script's time.

Four stages, each of which appends lines to one record (--record) and leaves out what stands there already, so that a
long measurement is made in pieces:

rates      in one sitting, in turns: a dozen batches of the official free script, and each recipe trained at two
           lengths. The line through the two medians gives the length that fills a budget, and the minutes of a length.
train      each recipe at each budget with each seed, by `cfamc pretrain`; all phases of a recipe shrink alike.
evaluate   both linear heads by `cfamc probe`, PGD-20 with step 0.01 on each by `cfamc attack`, on the same images,
           which no training saw.
answer     the smallest budget whose mean over all seeds reaches a target (nothing between measured budgets counts),
           its time beside the official one, and the picture; reads the record alone.

Seconds of training are `wall_seconds` of a run.json without online evaluation: from building the encoder to the last
checkpoint, with crops, adversary, averages, clusters and checkpoints. Imports and reading images are left out. The
official time is the script's batches alone, as many as its epoch has.
Example: python tests/benchmarks/time_to_accuracy.py ~/.cache/cifar10-jpeg --official CHECKOUT --record points.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import emit, summary
from official import SIZES
from points import (
    FIGURES,
    HEADS,
    Record,
    add_arguments,
    judge,
    lengths,
    percentages,
    say,
    scaled,
    settings,
    train,
)
from turns import Contestant

from cfamc_cli.recipe import file

STAGES = ("rates", "train", "evaluate", "answer")
OFFICIAL_BATCHES = 50_000 // SIZES["laptop"].batch  # of the one epoch that the official script is held to
OFFICIAL_TURN = 4  # batches of a turn; what its workers have ready of the first ones is in its favour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class Cost:
    """Seconds of a training as a line in its length: what does not grow with it, and what an epoch takes."""

    start: float
    per_epoch: float

    @classmethod
    def through(cls, short: tuple[float, float], long: tuple[float, float]) -> Cost:
        """The line through two measured (epochs, seconds)."""
        per_epoch = (long[1] - short[1]) / (long[0] - short[0])
        return cls(short[1] - per_epoch * short[0], per_epoch)

    def seconds(self, epochs: float) -> float:
        return self.start + self.per_epoch * epochs

    def epochs(self, seconds: float) -> float:
        """The length that takes so many seconds."""
        if seconds <= self.start:
            raise SystemExit(
                f"{seconds:g} s are gone before the first batch: {self.start:.1f} s do not grow with length"
            )
        return (seconds - self.start) / self.per_epoch


def smallest(means: Mapping[float, Sequence[float]], target: Sequence[float]) -> float | None:
    """The smallest measured budget whose means reach the target in every figure; None where none does."""
    reached = (budget for budget, found in means.items() if all(a >= b for a, b in zip(found, target, strict=True)))
    return min(reached, default=None)


class Timed(Record):
    """A record that holds sittings of rates."""

    @property
    def rates(self) -> dict[str, Any]:
        """The newest sitting of rates."""
        found = self.of("rates")
        return found[-1] if found else {"recipes": {}, "official": None, "machine": None}

    def cost(self, name: str) -> Cost:
        own = self.rates["recipes"][name]
        points = zip(own["epochs"], (median["median"] for median in own["seconds"]), strict=True)
        return Cost.through(*points)

    def official_seconds(self) -> float | None:
        """Seconds of the official script's epoch."""
        measured = self.rates["official"]
        return None if measured is None else OFFICIAL_BATCHES * float(measured["median"])


def at_length(options: argparse.Namespace, recipe: str, epochs: float) -> list[str]:
    """Settings that make a recipe so many epochs long in sum."""
    own = lengths(file.load(recipe, overrides=settings(options)))
    return scaled(own, epochs / sum(own.values()))


def measure_rates(options: argparse.Namespace, record: Timed, digests: Mapping[str, str]) -> None:
    """One sitting, in turns: official batches, then each recipe at both lengths."""
    official = None
    if options.official is not None:
        script = [str(Path(__file__).parent / "official.py"), str(options.official), str(options.folder)]
        words = [*script, "--size", "laptop", "--threads", str(options.threads), "--serve"]
        official = Contestant("official", [sys.executable, *words])
        official.turn()  # its workers start
    batches: list[float] = []
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in digests}
    for turn in range(options.turns):
        if official is not None:
            batches += [official.turn() for _ in range(OFFICIAL_TURN)]
            say(f"turn {turn + 1}: official, {statistics.median(batches[-OFFICIAL_TURN:]):.2f} s a batch")
        for name, kept in seconds.items():
            for epochs, taken in zip(options.lengths, kept, strict=True):
                with tempfile.TemporaryDirectory() as runs:
                    run = train(options, name, at_length(options, name, epochs), seed=0, runs=Path(runs))
                taken.append(run["wall_seconds"])
                say(f"turn {turn + 1}: {name}, {epochs:g} epochs: {taken[-1]:.1f} s")
    if official is not None:
        official.end()
    recipes = {
        name: {"digest": digests[name], "epochs": options.lengths, "seconds": [summary(taken) for taken in kept]}
        for name, kept in seconds.items()
    }
    record.append("rates", official=summary(batches) if batches else None, recipes=recipes)


def train_points(options: argparse.Namespace, record: Timed, digests: Mapping[str, str]) -> None:
    """Train what is not in the record yet; a first seed of everything before the second."""
    for seed in options.seeds:
        for budget in options.budgets:
            for name, digest in digests.items():
                point = {"recipe": name, "digest": digest, "budget": budget}
                if record.of("training", **point, seed=seed):
                    continue
                others = record.of("training", **point)  # all seeds of a budget are of one length
                epochs = others[0]["epochs"] if others else round(record.cost(name).epochs(60 * budget), 4)
                say(f"{name}: {budget:g} minutes, seed {seed}: {epochs:g} epochs")
                run = train(options, name, at_length(options, name, epochs), seed=seed, runs=options.runs)
                cost = {"seconds": run["wall_seconds"], "view_passes": run["totals"]["view_passes"]}
                record.append("training", **point, seed=seed, epochs=epochs, run=run["id"], **cost)


def evaluate_points(options: argparse.Namespace, record: Timed, digests: Mapping[str, str]) -> None:
    """Fit and attack both heads of every training that lacks them, of these recipes, budgets and seeds."""
    for training in record.of("training"):
        asked = training["budget"] in options.budgets and training["seed"] in options.seeds
        if not asked or training["digest"] != digests.get(training["recipe"]):
            continue
        name = f"{training['recipe']}: {training['budget']:g} minutes, seed {training['seed']}"
        judge(options, record, training["run"], name=name, split=options.split)


def rows(record: Timed, *, seeds: Sequence[int], split: str, n: int) -> list[dict[str, Any]]:
    """Each recipe at each budget: its minutes, and of each head the figures of these seeds in percent."""
    found = []
    for name, rate in record.rates["recipes"].items():
        trained = [one for one in record.of("training", recipe=name, digest=rate["digest"]) if one["seed"] in seeds]
        for budget in sorted({one["budget"] for one in trained}):
            own = [one for one in trained if one["budget"] == budget]
            row = {
                "recipe": name,
                "budget": budget,
                "epochs": own[0]["epochs"],
                "view_passes": own[0]["view_passes"],
                "minutes": record.cost(name).seconds(own[0]["epochs"]) / 60,  # at the rates of the one sitting
                "minutes_by_own_clock": [one["seconds"] / 60 for one in own],  # with whatever else was running
                "heads": {},
            }
            for head in HEADS:
                judged = {one["seed"]: percentages(record, one["run"], head=head, split=split, n=n) for one in own}
                right = {seed: of for seed, of in judged.items() if of}
                if right:
                    row["heads"][head] = {"seeds": list(right)} | {
                        figure: [of[figure] for of in right.values()] for figure in FIGURES
                    }
            found.append(row)
    return found


def means(row: Mapping[str, Any], head: str) -> list[float]:
    """The means over seeds of the three figures."""
    return [statistics.mean(row["heads"][head][figure]) for figure in FIGURES]


def answers(
    found: Sequence[Mapping[str, Any]], *, seeds: Sequence[int], target: Sequence[float], official: float | None
) -> list[dict[str, Any]]:
    """For each head and recipe the smallest budget, of those with all seeds, that reaches the target; and its time."""
    said = []
    for head in HEADS:
        whole = [row for row in found if len(row["heads"].get(head, {"seeds": ()})["seeds"]) == len(seeds)]
        for name in dict.fromkeys(row["recipe"] for row in whole):
            own = {row["budget"]: row for row in whole if row["recipe"] == name}
            budget = smallest({budget: means(row, head) for budget, row in own.items()}, target)
            answer: dict[str, Any] = {"head": head, "recipe": name, "budgets": list(own), "reached_at": budget}
            if budget is not None:
                minutes = own[budget]["minutes"]
                answer |= {"minutes": minutes, "ratio_to_official": official and 60 * minutes / official}
            said.append(answer)
    return said


def draw(path: Path, answered: Mapping[str, Any], *, head: str) -> None:
    """Draw the figures of one head against minutes: means as lines, seeds as points, the official code as a star."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn = [row for row in answered["rows"] if head in row["heads"]]
    names = sorted({row["recipe"] for row in drawn}, key=lambda name: answered["recipes"].index(name))
    official = answered["official_seconds"]
    last = max([row["minutes"] for row in drawn] + [official / 60 if official else 0])
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= 1.1 * last]
    with matplotlib.rc_context({"font.size": 8, "axes.spines.right": False, "axes.spines.top": False}):
        canvas = Figure(figsize=(7, 2.8), layout="constrained")
        for place, figure in enumerate(FIGURES):
            axes = canvas.add_subplot(1, 3, place + 1)
            axes.margins(y=0.12)
            for name, colour in zip(names, COLOURS, strict=False):
                own = sorted((row for row in drawn if row["recipe"] == name), key=lambda row: float(row["minutes"]))
                minutes, line = [row["minutes"] for row in own], [means(row, head)[place] for row in own]
                axes.plot(minutes, line, "-o", color=colour, markersize=3.5, linewidth=1.6)
                for row in own:
                    seeds = row["heads"][head][figure]
                    axes.plot([row["minutes"]] * len(seeds), seeds, "o", color=colour, alpha=0.3, markersize=2.5)
                if place == 1:  # these lines rise: a name stands free above its end, or below it to the right
                    below = name == names[0]
                    at = max(0, len(own) - 2) if below else len(own) - 1
                    offset, side = ((6, -8), "left") if below else ((0, 6), "right")
                    look: dict[str, Any] = {"textcoords": "offset points", "color": colour, "ha": side}
                    axes.annotate(Path(name).stem, (minutes[at], line[at]), offset, **look)
            target = answered["target"][figure]
            axes.axhline(target, color="0.4", linewidth=0.8, linestyle=":", zorder=0)
            if official is not None:
                axes.plot(official / 60, target, "*", color="black", markersize=8)
                if place == 0:
                    axes.annotate(
                        "official\ncode", (official / 60, target), (2, -22), textcoords="offset points", ha="right"
                    )
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.set_title(figure if place == 0 else f"PGD-20, eps {figure}", fontsize=9)
        images = {"holdout": "held-out", "test": "test"}[answered["split"]]
        canvas.supylabel(f"{images} images right (%)", fontsize=8)
        fitted = {"official": "of 20 epochs", "converged": "to its optimum"}[head]
        threads = answered["machine"]["threads"]
        canvas.supxlabel(
            f"minutes of training on {threads} threads (linear head {fitted}, {answered['n']:,} images)", fontsize=8
        )
        canvas.savefig(path, dpi=200)


def answer(options: argparse.Namespace, record: Timed) -> None:
    """Print the answers and the rows they stand on, and draw the picture."""
    found = rows(record, seeds=options.seeds, split=options.split, n=options.n)
    official = record.official_seconds()
    answered = {
        "machine": record.rates["machine"],
        "split": options.split,
        "n": options.n,
        "seeds": options.seeds,
        "target": dict(zip(FIGURES, options.target, strict=True)),
        "official_seconds": official,
        "recipes": list(record.rates["recipes"]),
        "answers": answers(found, seeds=options.seeds, target=options.target, official=official),
        "rows": found,
    }
    table = [["recipe", "minutes", "own clock", *(f"{head}: {figure}" for head in HEADS for figure in FIGURES)]]
    for row in found:
        cells = [row["recipe"], f"{row['minutes']:.2f}", f"{statistics.mean(row['minutes_by_own_clock']):.2f}"]
        for head in HEADS:
            cells += [f"{mean:.1f}" for mean in means(row, head)] if head in row["heads"] else ["-"] * len(FIGURES)
        table.append(cells)
    if options.plot is not None:
        draw(options.plot, answered, head=options.head)
    minutes = "not measured" if official is None else f"{official / 60:.1f} minutes"
    title = f"{options.split} images right, %; the official script's {OFFICIAL_BATCHES} batches: {minutes}"
    emit(answered, title=title, rows=table)
    for one in answered["answers"]:
        said = "not reached" if one["reached_at"] is None else f"{one['minutes']:.2f} minutes"
        if (ratio := one.get("ratio_to_official")) is not None:
            said += f", {ratio:.3f} of the official time"
        say(f"{one['head']} head, {one['recipe']}, seeds {options.seeds}: {said}")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", choices=STAGES, action="append", help="make this stage; repeatable (default: all)")
    parser.add_argument("--yardstick", default="cifar10-laptop", help="the published recipe")
    parser.add_argument("--fast", action="append", help="a recipe beside it; repeatable (default: cifar10-laptop-fast)")
    parser.add_argument("--official", type=Path, help="checkout of the official repository, to be timed beside them")
    parser.add_argument("--turns", type=int, default=3, help=f"of {OFFICIAL_TURN} official batches and all recipes")
    parser.add_argument(
        "--lengths", type=numbers, default=[0.02, 0.1], help="two, in epochs, that recipes are timed at"
    )
    parser.add_argument("--budgets", type=numbers, default=[0.5, 1, 2, 5, 10], help="minutes")
    parser.add_argument("--split", choices=("holdout", "test"), default="holdout", help="images that are judged")
    parser.add_argument("--target", type=numbers, default=[51.1, 30.8, 15.5], help="clean, 4/255, 8/255 in percent")
    parser.add_argument("--plot", type=Path, help="draw this PNG")
    parser.add_argument("--head", choices=HEADS, default=HEADS[0], help="the head that is drawn")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stages, record = options.only or STAGES, Timed(options.record)
    if set(stages) != {"answer"}:
        names = [options.yardstick, *(options.fast or ["cifar10-laptop-fast"])]
        digests = {name: file.load(name, overrides=settings(options)).digest() for name in names}
        known = record.rates["recipes"]
        timed = all(name in known and known[name]["digest"] == digest for name, digest in digests.items())
        if "rates" in (options.only or ()) or ("rates" in stages and not timed):
            measure_rates(options, record, digests)
        elif not timed and "train" in stages:
            raise SystemExit("the record has no rates of these recipes as they are: make the stage rates first")
        if "train" in stages:
            train_points(options, record, digests)
        if "evaluate" in stages:
            evaluate_points(options, record, digests)
    if "answer" in stages:
        answer(options, record)


if __name__ == "__main__":
    main()
