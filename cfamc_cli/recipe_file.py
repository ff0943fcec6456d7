"""Recipes as files: finding, bounded reading, `--set` overrides, errors in a user's words, and writing.

All problems of a recipe come in one CfamcError. A table that is broken is left out of the checks across tables, and the
others are still held to them. This module never imports torch.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.plan import known_images
from cfamc_cli.recipe import Cosine, FreeAdversary, PgdAdversary, Recipe, SimClr, SupCon, Table, number

MAX_BYTES = 2**20
MAX_PROBLEMS = 50  # as many are worded; the rest is counted
_DEEP_KEY = re.compile(r"(?<![\w\"'-])(?:[\w\"'-]++[ \t]*+\.[ \t]*+){64}")
_TAGGED = ("objective", "adversary", "schedule", "probe", "attack")  # tables chosen by a name or head
_STAND_INS: dict[str, Any] = {
    "schema": 1,
    "name": "stand-in",
    "data": {"dataset": "cifar10"},
    "crops": [{"count": 2}],
    "objective": {"name": "emp-ssl"},
    "adversary": {"name": "none"},
}
_OUTSIDE_THE_RUN = ("name", "data.root", "train.keep", "train.checkpoint_every", "train.log_every")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe.

    Attributes:
        path: Dotted path of the key, list indices included; empty for the recipe as a whole.
        message: What is wrong with it.
        stale: Whether the key belongs to another choice of its table's name.
    """

    path: str
    message: str
    stale: bool = False

    def __str__(self) -> str:
        return self.message if not self.path or f'"{self.path}"' in self.message else f"{self.path}: {self.message}"


def load(reference: str, *, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        reference: Path of a TOML file, or the name of a recipe that ships with the package.
        overrides: Texts such as "train.epochs=5" or "crops.0.count=8", applied in order.
        seed: Taken instead of the recipe's own.

    Raises:
        CfamcError: There is no such recipe, it cannot be read, or something in it is wrong; names every problem.
    """
    path = find(reference)
    raw = parse(read(path, label=reference), label=reference)
    problems = _override(raw, overrides)
    if seed is not None:
        if any(override.partition("=")[0].strip() == "seed" for override in overrides):
            problems.append(Problem("seed", "given twice, by --seed and by --set"))
        raw["seed"] = seed
    label = f"{reference} with --set" if overrides else reference
    return validate(raw, label=label, before=problems)


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).parent
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
    try:
        if reference and os.path.lexists(path):
            return path
    except (OSError, ValueError):  # too long for a path, or a NUL in it
        pass
    short = Path(reference.replace("\\", "/"))
    if short.suffix == ".toml" and str(short.parent) in (".", "recipes") and short.stem in known:
        return known[short.stem]
    close = difflib.get_close_matches(short.stem[:60], known, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    raise CfamcError(
        f'no recipe "{_plain(reference)}": neither a file nor the name of a shipped recipe',
        hint=f"{hint}`cfamc recipes list` shows what ships",
        exit_code=ExitCode.INVALID,
    )


def read(path: Path, *, label: str) -> str:
    """Read a recipe's text: a regular file of at most 1 MiB in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        label: What messages call it.

    Raises:
        CfamcError: It is not that.
    """

    def refused(why: str, hint: str = "a recipe is a TOML file of at most 1 MiB") -> CfamcError:
        return CfamcError(f"{_plain(label)}: {why}", hint=hint, exit_code=ExitCode.INVALID)

    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise refused("is a folder, not a recipe")
        if not stat.S_ISREG(mode):
            raise refused("is not a regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise refused("is not a regular file")
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
        why = f"not TOML: {_plain(str(error))}" if is_syntax else "a number is too long"
    raise CfamcError(f"{_plain(label)}: {why}", exit_code=ExitCode.INVALID)


def validate(raw: Mapping[str, Any], *, label: str, before: Sequence[Problem] = ()) -> Recipe:
    """Turn parsed TOML into a recipe.

    Args:
        raw: Parsed TOML.
        label: What messages call the recipe.
        before: Problems that were found earlier, to be told with the others.

    Raises:
        CfamcError: Something is wrong; the message names every problem, `details` lists them for `--json`.
    """
    problems = list(before)
    total = len(problems)
    recipe = None
    try:
        recipe = Recipe.model_validate(raw)
        found = check_across(recipe)
        problems += found
        total += len(found)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
        worded = _worded(errors[:MAX_PROBLEMS], raw)
        broken = {str(error["loc"][0]) for error in errors if error["loc"]}
        found = check_across(Recipe.model_validate(_repaired(raw, broken)), broken=broken)
        problems += [*worded, *found]
        total += len(worded) + len(found) + max(0, len(errors) - MAX_PROBLEMS)
    if recipe is not None and not problems:
        return recipe
    raise _refusal(label, problems, total)


def _repaired(raw: Mapping[str, Any], broken: set[str]) -> dict[str, Any]:
    """The recipe with something valid in place of each broken table."""
    return {key: value for key, value in (_STAND_INS | dict(raw)).items() if key not in broken} | {
        key: value for key, value in _STAND_INS.items() if key in broken
    }


def _refusal(label: str, problems: Sequence[Problem], total: int) -> CfamcError:
    shown = problems[:MAX_PROBLEMS]
    lines = [f"{_plain(label)}: {total} problem{'s' if total != 1 else ''}", *(str(problem) for problem in shown)]
    if total > len(shown):
        lines.append(f"and {total - len(shown)} more")
    stale = next((problem for problem in problems if problem.stale), None)
    hint = "`cfamc recipes show cifar10` prints a recipe that loads"
    if stale is not None:
        table = stale.path.rpartition(".")[0]
        hint = f"remove such keys, or replace the whole table: --set '{table}={{ ... }}'"
    return CfamcError(
        "\n".join(lines),
        hint=hint,
        exit_code=ExitCode.INVALID,
        details={"problems": [{"path": problem.path, "message": problem.message} for problem in shown]},
    )


# Overrides


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Apply `--set` texts to parsed TOML, in order."""
    problems: list[Problem] = []
    done: list[str] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        keys = path.split(".")
        name = f"--set {_plain(path)}"
        if not equals or not all(keys) or len(keys) > 16:
            message = "write KEY=VALUE with a dotted key, such as --set train.epochs=5"
            problems.append(Problem(f"--set {_plain(override)}", message))
            continue
        earlier = next((other for other in done if f"{other}.".startswith(f"{path}.")), None)
        if earlier is not None:
            what = "given twice" if earlier == path else f"would undo --set {_plain(earlier)}; give it first"
            problems.append(Problem(name, what))
            continue
        done.append(path)
        problem = _place(raw, keys, _value(text.strip()))
        if problem:
            problems.append(Problem(name, problem))
    return problems


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
        default = _DEFAULTS.get(keys[0])
        raw[keys[0]] = json.loads(json.dumps(default)) if default is not None else {}
    node: Any = raw
    for place, key in enumerate(keys):
        walked = ".".join(keys[:place])
        last = place == len(keys) - 1
        if isinstance(node, list):
            if not re.fullmatch(r"[0-9]{1,9}", key, re.ASCII):
                meant = ".".join([walked, "0", *keys[place:]])
                return f'{_plain(walked)} is a list, so an index comes next (did you mean "{_plain(meant)}"?)'
            index = int(key)
            if index >= len(node):
                count = f"{len(node)} {'entry' if len(node) == 1 else 'entries'}"
                return f"{_plain(walked)} has {count}, counted from 0"
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, {})
        else:
            return f"{_plain(walked)} is {_shown(node)}, not a table"
    return ""


# Problems in a user's words


def _worded(errors: Sequence[Mapping[str, Any]], raw: Mapping[str, Any]) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for error in errors:
        for problem in _problems_of(error, raw):
            problems.setdefault(problem.path, problem)
    return list(problems.values())


def _problems_of(error: Mapping[str, Any], raw: Mapping[str, Any]) -> Iterator[Problem]:
    loc = _without_tags(error["loc"])
    path = ".".join(_plain(str(part)) for part in loc)
    kind, value, ctx = error["type"], error["input"], error.get("ctx", {})
    match kind:
        case "at_field":
            for field, message in ctx["fields"].items():
                yield Problem(f"{path}.{field}", message)
        case "extra_forbidden":
            yield _unknown(loc, path, raw)
        case "missing" if isinstance(loc[-1], int):  # a tuple that is too short
            yield Problem(path.rpartition(".")[0], _wants_list(loc[:-1], raw))
        case "too_long" if isinstance(value, list) and value and not isinstance(value[0], dict):
            yield Problem(path, _wants_list(loc, raw))
        case "too_short" if isinstance(value, list) and len(value) >= ctx["min_length"]:
            return  # what is wrong with its entries is told already
        case "union_tag_not_found":
            key = str(ctx["discriminator"]).strip("'")
            yield Problem(f"{path}.{key}", f"missing; {_one_of(_tags(loc))}")
        case "union_tag_invalid":
            key = str(ctx["discriminator"]).strip("'")
            yield Problem(f"{path}.{key}", _not_among(value[key] if isinstance(value, dict) else value, _tags(loc)))
        case _:
            yield Problem(path, _wording(kind, value, ctx, loc))


def _wording(kind: str, value: Any, ctx: Mapping[str, Any], loc: Sequence[str | int]) -> str:
    shown = _shown(value)
    match kind:
        case "missing":
            return _missing(loc)
        case "literal_error" if tuple(loc) == ("schema",):
            return f"must be 1, the version that this cfamc reads, not {shown}"
        case "literal_error":
            return _not_among(value, _literals(loc))
        case "value_error":
            return str(ctx["error"])
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            bound = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}[kind]
            words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}[bound]
            limit = ctx[bound]
            text = f"{limit:,}".replace(",", "_") if isinstance(limit, int) else f"{limit:g}"
            return f"must be {words} {text}, not {shown}"
        case "finite_number":
            return f"must be a finite number, not {shown}"
        case "string_too_short":
            return "must not be empty"
        case "string_too_long":
            return f"must have at most {ctx['max_length']} characters, not {len(value)}"
        case "too_short":
            return f"needs at least one table: [[{loc[-1]}]]"
        case "too_long":
            return f"has {ctx['actual_length']} tables, more than {ctx['max_length']}"
        case _:
            return f"must be {_WANTED.get(kind, 'something else')}, not {shown}{_meant(kind, value, loc)}"


_WANTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text in UTF-8",
    "tuple_type": "a list",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "a table",
}


def _meant(kind: str, value: Any, loc: Sequence[str | int]) -> str:
    """A way out for the most likely slip of a wrong type."""
    if kind == "tuple_type" and isinstance(value, dict) and loc[-1] in ("crops", "attack"):
        return f" (did you mean [[{loc[-1]}]], with double brackets?)"
    if kind in ("float_type", "int_type") and isinstance(value, str) and re.fullmatch(r"[0-9.eE+-]{1,20}", value):
        complete = re.sub(r"(?<![0-9])[.]", "0.", re.sub(r"[.](?![0-9])", ".0", value))  # TOML: digits on both sides
        return f" (did you mean {complete}{', without quotes' if complete == value else ''}?)"
    if kind == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        return " (in quotes it is text; from a shell: 'name=\"7\"')" if loc[-1] == "name" else ""
    return ""


def _missing(loc: Sequence[str | int]) -> str:
    if len(loc) > 1:
        return "missing"
    match loc[0]:
        case "schema":
            return "missing; write schema = 1"
        case "crops":
            return "missing; add a table [[crops]] with a count"
        case "objective" | "adversary" as table:
            return f"missing; add a table [{table}] with a name: {_one_of(_tags(loc))}"
        case "data":
            return "missing; add a table [data] with a dataset"
        case _:
            return "missing"


def _wants_list(loc: Sequence[str | int], raw: Mapping[str, Any]) -> str:
    value = _dig(raw, loc)
    wanted = 4 if loc[-1] == "jitter" else 2
    return f"must be a list of {wanted} numbers, not of {len(value) if isinstance(value, list) else 0}"


def _unknown(loc: Sequence[str | int], path: str, raw: Mapping[str, Any]) -> Problem:
    """An unknown key, with what may have been meant: a sibling, another choice's key, the same key elsewhere."""
    key = str(loc[-1])
    table = _table_at(loc[:-1], raw)
    siblings = list(_keys(table)) if table else []
    choices = _choices(loc[:-1])
    if len(choices) > 1 and table is not None and any(key in _keys(choice) for choice in choices):
        tag = "head" if loc[0] == "probe" else "name"
        chosen = _literals_of(table, tag)[0]
        return Problem(path, f'unknown key "{path}": {tag} = "{chosen}" has no {_plain(key)}', stale=True)
    close = difflib.get_close_matches(key, siblings, n=1) if len(key) <= 60 else []
    if not close and len(loc) == 1:
        close = [found for found in _all_paths() if found.rpartition(".")[2] == key][:1]
    return Problem(path, f'unknown key "{path}"' + (f' (did you mean "{close[0]}"?)' if close else ""))


def _not_among(value: Any, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) and len(value) <= 60 else []
    return f"{_one_of(allowed)}, not {_shown(value)}" + (f' (did you mean "{close[0]}"?)' if close else "")


def _one_of(allowed: Sequence[str]) -> str:
    quoted = [f'"{choice}"' for choice in allowed]
    return f"must be {', '.join(quoted[:-1])}{' or ' if len(quoted) > 1 else ''}{quoted[-1]}"


def _shown(value: Any) -> str:
    """A value of a TOML file as its writer would name it."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value) if value.bit_length() <= 128 else "a number of more than 38 digits"
        case float():
            return repr(value)
        case str():
            return f'the text "{_plain(value, limit=40)}"'
        case list():
            return "a list"
        case dict():
            return "a table"
        case _:
            return "a date or time"


def _plain(text: str, *, limit: int = 200) -> str:
    """Text that a terminal shows and does not obey, shortened."""
    cut = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


# The shape of a recipe, read from its models


def _tables(annotation: Any) -> list[type[Table]]:
    """The models that an annotation allows, below unions, tuples and metadata."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _tables(get_args(annotation)[0])
    if origin in (Union, UnionType, tuple):
        return [table for part in get_args(annotation) if part is not NoneType for table in _tables(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Table) else []


def _choices(loc: Sequence[str | int]) -> list[type[Table]]:
    """The models that may stand at a path."""
    if not loc:
        return [Recipe]
    field = Recipe.model_fields.get(str(loc[0]))
    depth = 2 if loc[0] in ("crops", "attack") else 1
    return _tables(field.annotation) if field is not None and len(loc) <= depth else []


def _table_at(loc: Sequence[str | int], raw: Mapping[str, Any]) -> type[Table] | None:
    """The model that stands at a path, told by the name or head that was given there."""
    choices = _choices(loc)
    if len(choices) < 2:
        return choices[0] if choices else None
    tag = "head" if loc[0] == "probe" else "name"
    given = _dig(raw, [*loc, tag])
    return next((choice for choice in choices if given in _literals_of(choice, tag)), None)


def _keys(table: type[Table]) -> Iterator[str]:
    for name, field in table.model_fields.items():
        yield field.alias or name


def _all_paths() -> Iterator[str]:
    for key in _keys(Recipe):
        for table in _choices([key]):
            for inner in _keys(table):
                yield f"{key}.0.{inner}" if key in ("crops", "attack") else f"{key}.{inner}"


def _literals_of(table: type[Table], key: str) -> tuple[str, ...]:
    annotation = table.model_fields[key].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _tags(loc: Sequence[str | int]) -> list[str]:
    tag = "head" if loc[0] == "probe" else "name"
    return [literal for choice in _choices(loc) for literal in _literals_of(choice, tag)]


def _literals(loc: Sequence[str | int]) -> list[str]:
    """The texts that are allowed at a path."""
    found = [
        literal
        for choice in _choices(loc[:-1])
        if str(loc[-1]) in choice.model_fields
        for literal in _literals_of(choice, str(loc[-1]))
    ]
    return list(dict.fromkeys(found))


def _without_tags(loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """A path without the tags that Pydantic puts behind the tables of a union."""
    place = 2 if loc and loc[0] == "attack" else 1
    if loc and loc[0] in _TAGGED and len(loc) > place:
        return (*loc[:place], *loc[place + 1 :])
    return tuple(loc)


def _dig(node: Any, loc: Sequence[str | int]) -> Any:
    for key in loc:
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return None
    return node


_DEFAULTS: dict[str, Any] = {
    key: [entry.model_dump(mode="json", exclude_unset=True) for entry in default]
    if isinstance(default := field.default, tuple)
    else default.model_dump(mode="json", exclude_unset=True)
    for key, field in Recipe.model_fields.items()
    if isinstance(field.default, Table | tuple)
}


# Checks across tables


def check_across(recipe: Recipe, *, broken: Collection[str] = ()) -> list[Problem]:
    """Find what no table shows by itself.

    Args:
        recipe: A recipe whose tables are valid each.
        broken: Tables that only stand in for broken ones, of which nothing is said.
    """
    problems = []
    for tables, problem in _across(recipe):
        if tables.isdisjoint(broken):
            problems.append(problem)
    return problems


def _across(recipe: Recipe) -> Iterator[tuple[set[str], Problem]]:
    """Problems, each with the tables it stands on."""
    objective, adversary, train = recipe.objective, recipe.adversary, recipe.train
    if recipe.views < 2:
        if isinstance(objective, SimClr | SupCon):
            message = f"{objective.name} compares two views of an image, and this is one (set crops.0.count = 2)"
        else:
            message = "emp-ssl draws the crops of an image together, and this is one (set crops.0.count = 2 or more)"
        yield {"crops", "objective"}, Problem("crops.0.count", message)
    if isinstance(adversary, PgdAdversary | FreeAdversary) and adversary.views == "second" and len(recipe.crops) < 2:
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
    yield from _against_the_data(recipe)
    images = known_images(recipe)
    if images is not None and isinstance(recipe.schedule, Cosine) and images >= train.batch_size:
        updates = recipe.batches(images) * recipe.replays
        if recipe.schedule.warmup >= updates:
            message = f"{recipe.schedule.warmup} updates of warm-up leave nothing of a run of {updates}"
            yield {"schedule", "data", "train", "adversary"}, Problem("schedule.warmup", message)


def _against_the_data(recipe: Recipe) -> Iterator[tuple[set[str], Problem]]:
    limit, batch = recipe.data.limit, recipe.train.batch_size
    known = KNOWN_SETS.get(recipe.data.dataset)
    if limit is not None and known is not None and limit > known.train:
        message = f"{recipe.data.dataset} has {known.train} training images, not {limit}"
        yield {"data"}, Problem("data.limit", message)
    images = known_images(recipe)
    if images is not None and batch > images:
        whose = "data.limit leaves" if limit == images else f"{recipe.data.dataset} has"
        yield {"data", "train"}, Problem("train.batch_size", f"{batch} is more than the {images} images that {whose}")


# Comparing and writing


def differing_keys(a: Recipe, b: Recipe) -> list[str]:
    """The dotted keys in which two recipes describe different runs, sorted.

    Left out is what may change when a run is resumed: its name, where the data lie, how checkpoints are kept, and how
    often it logs.
    """
    left, right = dict(_leaves(a.resolved(), "")), dict(_leaves(b.resolved(), ""))
    keys = sorted(left.keys() | right.keys())
    missing = object()
    return [key for key in keys if key not in _OUTSIDE_THE_RUN and left.get(key, missing) != right.get(key, missing)]


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    entries: Iterator[tuple[Any, Any]]
    if isinstance(node, dict):
        entries = iter(node.items())
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        entries = iter(enumerate(node))
    else:
        yield path, node
        return
    for key, value in entries:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def to_toml(recipe: Recipe) -> str:
    """Write a recipe with every setting that has an effect; what is written loads as an equal recipe."""
    resolved = recipe.resolved()
    lines = [f"{key} = {_toml(value)}" for key, value in resolved.items() if not _is_table(value)]
    for key, value in resolved.items():
        if not _is_table(value):
            continue
        for table in value if isinstance(value, list) else [value]:
            lines += ["", f"[[{key}]]" if isinstance(value, list) else f"[{key}]"]
            lines += [f"{inner} = {_toml(setting)}" for inner, setting in table.items() if setting is not None]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(_toml(entry) for entry in value)}]"
        case _:
            raise AssertionError(f"no recipe holds {type(value)}")
