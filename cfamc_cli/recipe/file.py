"""Recipes as files: finding, bounded reading, `--set` overrides, checks across tables, and writing.

All problems of a recipe come in one CfamcError, in the words of `wording`. A table that is broken is left out of the
checks across tables, and the others are still held to them. This module never imports torch.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.errors import CfamcError, ExitCode, invalid
from cfamc_cli.recipe.schema import (
    AdamW,
    Data,
    NoAdversary,
    Outside,
    PgdAdversary,
    Recipe,
    SimClr,
    SupCon,
    Table,
    as_before,
    key_of,
    number,
    outside,
)
from cfamc_cli.recipe.wording import Problem, plain_text, show_value, word_problems

MAX_BYTES = 2**20
MAX_PROBLEMS = 50  # as many are worded; the rest is counted
_DEEP_KEY = re.compile(r"(?<![\w\"'-])(?:[\w\"'-]++[ \t]*+\.[ \t]*+){64}")
_STAND_INS: dict[str, Any] = {  # valid, in place of what is broken or missing
    "schema": 1,
    "name": "stand-in",
    "data": {"dataset": "cifar10"},
    "crops": [{"count": 2}],
    "objective": {"name": "emp-ssl"},
    "adversary": {"name": "none"},
}


def load(reference: str, *, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        reference: Path of a TOML file, or the name of a recipe that ships with the package.
        overrides: Texts such as "train.epochs=5" or "crops.0.count=8", applied in order. One that changes a table's
            kind, such as "adversary.name=none", takes what the file says of the old kind alone out of it.
        seed: Taken instead of the recipe's own.

    Raises:
        CfamcError: There is no such recipe, it cannot be read, or something in it is wrong; names every problem.
    """
    raw = parse(read(find(reference), label=reference), label=reference)
    problems = list(_override(raw, overrides))
    _drop_stale(raw, {override.partition("=")[0].strip() for override in overrides})
    if seed is not None:
        if any(override.partition("=")[0].strip() == "seed" for override in overrides):
            problems.append(Problem("seed", "given twice, by --seed and by --set"))
        raw["seed"] = seed
    flags = {path: f"--set {path}" for path in (override.partition("=")[0].strip() for override in overrides)}
    return validate(raw, label=reference, before=problems, flags=flags | ({} if seed is None else {"seed": "--seed"}))


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).parents[1]
    folder = package / "recipes"  # in a wheel
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "recipes"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def find(reference: str) -> Path:
    """Return the file that a reference means; a bare name is that of a shipped recipe first.

    Raises:
        CfamcError: There is none.
    """
    known = shipped()
    if reference in known:
        return known[reference]
    path = Path(reference)
    with suppress(OSError, ValueError):  # too long for a path, or a NUL in it
        if reference and os.path.lexists(path):
            return path
    short = Path(reference.replace("\\", "/"))
    if short.suffix == ".toml" and str(short.parent) in (".", "recipes") and short.stem in known:
        return known[short.stem]
    close = difflib.get_close_matches(short.stem[:60], known, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    wrong = f'no recipe "{plain_text(reference)}": neither a file nor the name of a shipped recipe'
    raise invalid(wrong, f"{hint}`cfamc recipes list` shows what ships")


def read(path: Path, *, label: str) -> str:
    """Read a recipe's text: a regular file of at most 1 MiB in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        label: What messages call it.

    Raises:
        CfamcError: It is not that.
    """

    def refused(why: str, hint: str = "a recipe is a TOML file of at most 1 MiB") -> CfamcError:
        return invalid(f"{plain_text(label)}: {why}", hint)

    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise refused("is a folder, not a recipe")
        if not stat.S_ISREG(mode):
            raise refused("is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror or error}", hint="") from None
    if len(data) > MAX_BYTES:
        raise refused("is larger than 1 MiB")
    if b"\0" in data:
        raise refused(f"line {data[: data.index(0)].count(10) + 1} holds a NUL byte")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise refused(f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x})") from None


def parse(text: str, *, label: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        CfamcError: It is none, or nested beyond reason.
    """
    try:
        if _DEEP_KEY.search(text):
            raise RecursionError
        return tomllib.loads(text)
    except RecursionError:
        why = "is nested too deeply"
    except ValueError as error:
        is_syntax = isinstance(error, tomllib.TOMLDecodeError)  # else more digits than Python converts
        why = f"not TOML: {plain_text(str(error))}" if is_syntax else "a number is too long"
    raise invalid(f"{plain_text(label)}: {why}")


def validate(
    raw: Mapping[str, Any], *, label: str, before: Sequence[Problem] = (), flags: Mapping[str, str] = {}
) -> Recipe:
    """Turn parsed TOML into a recipe.

    Args:
        raw: Parsed TOML.
        label: What messages call the recipe.
        before: Problems that were found earlier, to be told with the others.
        flags: What on the command line gave a key its value, by dotted key.

    Raises:
        CfamcError: Something is wrong; the message names every problem, `details` lists them for `--json`.
    """
    errors = []
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as found:
        errors = found.errors(include_url=False)
    broken = {str(error["loc"][0]) for error in errors}
    if broken:
        recipe = Recipe.model_validate(_STAND_INS | {key: value for key, value in raw.items() if key not in broken})
    problems = [*before, *word_problems(errors[:MAX_PROBLEMS])]
    problems += [problem for needed, problem in _across(recipe) if needed.isdisjoint(broken)]
    if not problems:
        return recipe
    shown, total = problems[:MAX_PROBLEMS], len(problems) + max(0, len(errors) - MAX_PROBLEMS)
    lines = [
        f"{plain_text(label)}: {total} problem{'s' if total != 1 else ''}",
        *(problem.told_of(flags.get(problem.path, "")) for problem in shown),
    ]
    lines += [f"and {total - len(shown)} more"] if total > len(shown) else []
    hint = "`cfamc recipes show cifar10` prints a recipe that loads"
    if any(problem.path in flags for problem in shown):
        hint = "`cfamc recipes explain KEY` tells what a key takes"
    if (stale := next((problem for problem in problems if problem.stale), None)) is not None:
        table = stale.path.rpartition(".")[0]
        hint = f"remove such keys, or replace the whole table: --set '{table}={{ ... }}'"
    details = {"problems": [{"path": problem.path, "message": problem.message} for problem in shown]}
    raise CfamcError("\n".join(lines), hint=hint, exit_code=ExitCode.INVALID, details=details)


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> Iterator[Problem]:
    """Apply `--set` texts to parsed TOML, in order."""
    done: list[str] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        keys = path.split(".")
        if not equals or not all(keys) or len(keys) > 16:
            message = "write KEY=VALUE with a dotted key, such as --set train.epochs=5"
            yield Problem(f"--set {plain_text(override)}", message)
            continue
        if earlier := next((other for other in done if f"{other}.".startswith(f"{path}.")), ""):
            wrong = "given twice" if earlier == path else f"would undo --set {plain_text(earlier)}; give it first"
        else:
            done.append(path)
            wrong = _place(raw, keys, _value(text.strip()))
        if wrong:
            yield Problem(f"--set {plain_text(path)}", wrong)


def _drop_stale(raw: dict[str, Any], given: AbstractSet[str]) -> None:
    """Take keys of the file out of tables whose kind --set changed, where the new kind has none such."""
    tables = {path.rpartition(".")[0] for path in given if path.endswith((".name", ".head"))}
    try:
        if tables:
            Recipe.model_validate(raw)
    except ValidationError as found:
        for problem in word_problems(found.errors(include_url=False)):
            path, _, key = problem.path.rpartition(".")
            if problem.stale and path in tables and problem.path not in given:
                node: Any = raw
                for step in path.split("."):
                    node = node[int(step) if isinstance(node, list) else step]
                del node[key]


def _value(text: str) -> Any:
    """A TOML value, or else plain text."""
    try:
        parsed = tomllib.loads(f"value = {text}") if len(text) <= MAX_BYTES and not _DEEP_KEY.search(text) else {}
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _place(raw: dict[str, Any], keys: Sequence[str], value: Any) -> str:
    """Put `value` at a dotted path; returns what is wrong with the path, or nothing."""
    if len(keys) > 1 and keys[0] not in raw:
        raw[keys[0]] = _default(keys[0])
    node: Any = raw
    for place, key in enumerate(keys):
        walked = plain_text(".".join(keys[:place]))
        step: Any = key
        if isinstance(node, list):
            if not re.fullmatch(r"[0-9]{1,9}", key, re.ASCII):
                meant = plain_text(".".join([walked, "0", *keys[place:]]))
                return f'{walked} is a list, so an index comes next (did you mean "{meant}"?)'
            step = int(key)
            if step >= len(node):
                return f"{walked} has {len(node)} {'entry' if len(node) == 1 else 'entries'}, counted from 0"
        elif not isinstance(node, dict):
            return f"{walked} is {show_value(node)}, not a table"
        if place == len(keys) - 1:
            node[step] = value
        else:
            inherited = keys[0] == "phase" and place == 2
            fresh = copy.deepcopy(raw.get(key, _default(key))) if inherited else {}
            node = node[step] if isinstance(node, list) else node.setdefault(step, fresh)
    return ""


def _default(key: str) -> Any:
    """What stands in a table that the file leaves out, as it would be parsed."""
    default = Recipe.model_fields[key].default if key in Recipe.model_fields else None
    if isinstance(default, tuple):
        return [entry.model_dump(exclude_unset=True) for entry in default]
    return default.model_dump(exclude_unset=True) if isinstance(default, Table) else {}


def _across(recipe: Recipe) -> Iterator[tuple[set[str], Problem]]:
    """What no table shows by itself, each problem with the tables that it stands on."""
    for place, part in enumerate(recipe.parts()):
        given = set(recipe.phase[place - 1].given) if place else set(Recipe.model_fields)
        for needed, found in _across_method(part):
            if needed & given:  # else it is the recipe's own problem
                yield needed - given if place else needed, Problem(key_of(place, found.path), found.message)
        own = recipe.phase[place - 1].optimizer if place else None
        if own is not None and "name" not in own.model_fields_set and isinstance(recipe.optimizer, AdamW):
            message = 'missing; it would be "lars", where the recipe\'s is "adamw"'
            yield {"phase", "optimizer"}, Problem(key_of(place, "optimizer.name"), message)
    if recipe.clusters and recipe.train.init is None:
        message = "clusters are those of what an encoder has learnt: put them into a [[phase]], or set train.init"
        yield {"objective", "train"}, Problem("objective.name", message)
    if (problem := _beyond_the_known(recipe.data)) is not None:
        yield {"data"}, problem
    images = recipe.data.known_images
    for key, message, _ in recipe.misfits(images) if images else ():
        needed = {"schedule", "adversary"} if key.endswith("schedule.warmup") else set()
        yield {"data", "train", "objective"} | needed, Problem(key, message)


def _across_method(recipe: Recipe) -> Iterator[tuple[set[str], Problem]]:
    """What the tables of one phase show together."""
    objective, adversary = recipe.objective, recipe.adversary
    if recipe.views < 2 and not recipe.clusters:
        if isinstance(objective, SimClr | SupCon):
            message = f"{objective.name} compares two views of an image, and this is one (set crops.0.count = 2)"
        else:
            message = "emp-ssl draws the crops of an image together, and this is one (set crops.0.count = 2 or more)"
        yield {"crops", "objective"}, Problem("crops.0.count", message)
    if recipe.clusters > recipe.model.embedding_dim:
        message = f"{recipe.clusters} clusters do not fit into {recipe.model.embedding_dim} dimensions of an embedding"
        yield {"model", "objective"}, Problem("objective.count", message)
    if not isinstance(adversary, NoAdversary) and adversary.views == "second" and len(recipe.crops) < 2:
        message = '"second" perturbs the second group of crops, and there is one group'
        yield {"crops", "adversary"}, Problem("adversary.views", message)
    if isinstance(adversary, PgdAdversary):
        if number(adversary.eps) == 0:
            yield {"adversary"}, Problem("adversary.eps", 'pgd has no effect with eps 0 (set name = "none")')
        elif number(adversary.step_size) == 0 and adversary.start == "zero":
            yield {"adversary"}, Problem("adversary.step_size", "pgd has no effect with a step of 0 from zero")
    if recipe.schedule.name == "official-cosine" and recipe.replays < 2:
        message = '"official-cosine" differs from "cosine" only in a free adversary of 2 or more replays'
        yield {"schedule", "adversary"}, Problem("schedule.name", message)


def _beyond_the_known(data: Data) -> Problem | None:
    """What a data set that is known by name has too few images for."""
    if (known := KNOWN_SETS.get(data.dataset)) is None:
        return None
    left = known.train - data.holdout
    if left < 1:
        message = f"{data.dataset} has {known.train} training images, and {data.holdout} held out leave none"
        return Problem("data.holdout", message)
    if 0 < data.holdout < known.classes:
        message = f"{data.dataset} has {known.classes} classes, so {data.holdout} images cannot be of all of them"
        return Problem("data.holdout", message)
    if data.limit is not None and data.limit > left:
        beside = " beside those held out" if data.holdout else ""
        return Problem("data.limit", f"{data.dataset} has {left} training images{beside}, not {data.limit}")
    return None


def differing_keys(a: Recipe, b: Recipe) -> list[str]:
    """The dotted keys in which two recipes describe different runs, sorted: those not marked `Outside.RUN`."""
    left, right = ({(key, toml(value)) for key, value in leaves(as_before(one.resolved()), "")} for one in (a, b))
    return sorted({key for key, _ in left ^ right}.difference(outside(Outside.RUN)))


def settings(recipe: Recipe) -> dict[str, str]:
    """Every setting of a recipe that has an effect but seed and name, as TOML writes it, by dotted key."""
    return {key: toml(value) for key, value in leaves(recipe.resolved(), "") if key not in ("seed", "name")}


def leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values of nested tables by dotted key below `path`; the entries of a list of tables are numbered."""
    if isinstance(node, list) and node and isinstance(node[0], dict):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        yield path, node
        return
    for key, value in node.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def to_toml(recipe: Recipe) -> str:
    """Write a recipe with every setting that has an effect; what is written loads as an equal recipe."""
    return "\n".join(_toml_lines(recipe.resolved())) + "\n"


def _toml_lines(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The settings of a table, and then the tables in it: what follows a header belongs to that."""
    below = {}
    for key, value in table.items():
        entries = value if isinstance(value, list) else [value]
        if entries and isinstance(entries[0], dict):
            below[f"[[{above}{key}]]" if entries is value else f"[{above}{key}]"] = key, entries
        elif value is not None:
            yield f"{key} = {toml(value)}"
    for header, (key, entries) in below.items():
        for entry in entries:
            yield from ("", header, *_toml_lines(entry, f"{above}{key}."))


def toml(value: Any) -> str:
    """A plain value of a recipe, which TOML writes as JSON does, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
