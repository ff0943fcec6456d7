"""How the problems of a recipe are worded, from Pydantic's own errors and their context."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from cfamc_cli.recipe.schema import Phase, Recipe, Table, tables

_LISTS = ("crops", "attack", "phase")  # the tables with double brackets
_MODELS = {field.alias or name: tables(field.annotation) for name, field in Recipe.model_fields.items()}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe."""

    path: str  # dotted, list indices included; empty for the recipe as a whole
    message: str
    stale: bool = False  # whether the key belongs to another choice of its table's name

    def told_of(self, flag: str) -> str:
        """It as a line, of the flag that gave the value where there is one."""
        return f"{flag}: {self.message}" if flag else str(self)

    def __str__(self) -> str:
        return self.message if not self.path or f'"{self.path}"' in self.message else f"{self.path}: {self.message}"


_WORDS = {  # of Pydantic's kinds of errors, filled with its own context
    "at_field": "{message}",
    "value_error": "{error}",
    "greater_than": "must be above {gt}, not {shown}",
    "greater_than_equal": "must be at least {ge}, not {shown}",
    "less_than": "must be below {lt}, not {shown}",
    "less_than_equal": "must be at most {le}, not {shown}",
    "finite_number": "must be a finite number, not {shown}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters, not {length}",
    "too_short": "needs at least one table: [[{header}]]",
    "too_long": "has {actual_length} tables, more than {max_length}",
    "float_type": "must be a number, not {shown}",
    "int_type": "must be a whole number, not {shown}",
    "bool_type": "must be true or false, not {shown}",
    "string_type": "must be text, not {shown}",
    "string_unicode": "must be text in UTF-8, not {shown}",
    "tuple_type": "must be a list, not {shown}",
    "model_type": "must be a table, not {shown}",
    "model_attributes_type": "must be a table, not {shown}",
}


def word_problems(errors: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """What Pydantic found, in our words; each problem once."""
    problems: dict[str, Problem] = {}
    for problem in (problem for error in errors for problem in _problems_of(error)):
        problems.setdefault(problem.path, problem)
    return list(problems.values())


def _problems_of(error: Mapping[str, Any]) -> Iterator[Problem]:
    loc, kind, value, context = _without_tag(error["loc"]), error["type"], error["input"], error.get("ctx", {})
    if kind == "missing" and isinstance(loc[-1], int):
        loc, kind = loc[:-1], "too_long"  # a list of numbers that is too short is told as one too long
    path = ".".join(plain_text(str(part)) for part in loc)
    match kind:
        case "at_field":
            for field, message in context["fields"].items():
                yield Problem(f"{path}.{field}", message)
        case "extra_forbidden":
            yield _unknown(error["loc"], path)
        case "too_short" if len(value) >= context["min_length"]:
            return  # what is wrong with its entries is told already
        case "union_tag_not_found":
            yield Problem(f"{path}.{_tag(path)}", f"missing; {_one_of(_choices(_in_phase(loc)[0]))}")
        case "union_tag_invalid":
            yield Problem(f"{path}.{_tag(path)}", _not_among(value[_tag(path)], _choices(_in_phase(loc)[0])))
        case _:
            yield Problem(path, _message(kind, value, context, loc, msg=error["msg"]))


def _message(kind: str, value: Any, context: Mapping[str, Any], loc: Sequence[str | int], *, msg: str) -> str:
    key = loc[-1]
    match kind:
        case "missing":
            return f"missing{_MISSING[str(key)]}" if len(loc) == 1 and key in _MISSING else "missing"
        case "too_long" if key not in _LISTS:
            return f"must be a list of {4 if key == 'jitter' else 2} numbers, not of {len(value)}"
        case "literal_error" | "int_parsing_size" if key == "schema":
            return f"must be 1, the version that this cfamc reads, not {show_value(value)}"
        case "literal_error":
            choices = re.findall(r"'([^']+)'|(True|False)", context["expected"])
            return _not_among(value, [text or truth.lower() for text, truth in choices])
        case _:
            spelled = {name: _limit(found) for name, found in context.items()}
            length = len(value) if isinstance(value, str) else 0
            words = _WORDS.get(kind, "{msg}")  # a newer Pydantic may know kinds that this does not
            header = ".".join(part for part in loc if isinstance(part, str))
            text = words.format(**spelled, shown=show_value(value), length=length, header=header, msg=msg)
            return text + _meant(kind, value, key, header)


def _limit(found: object) -> object:
    return f"{found:_}" if isinstance(found, int) else f"{found:g}" if isinstance(found, float) else found


def _meant(kind: str, value: Any, key: str | int, header: str) -> str:
    """A way out for the most likely slip of a wrong type."""
    if kind == "tuple_type" and isinstance(value, dict) and key in _LISTS:
        return f" (did you mean [[{header}]], with double brackets?)"
    if kind in ("float_type", "int_type") and isinstance(value, str) and re.fullmatch(r"[0-9.eE+-]{1,20}", value):
        complete = re.sub(r"(?<![0-9])[.]", "0.", re.sub(r"[.](?![0-9])", ".0", value))  # TOML: digits on both sides
        return f" (did you mean {complete}{', without quotes' if complete == value else ''}?)"
    if kind == "string_type" and key == "name" and isinstance(value, int | float) and not isinstance(value, bool):
        return " (in quotes it is text; from a shell: 'name=\"7\"')"
    return ""


def _unknown(loc: Sequence[str | int], path: str) -> Problem:
    """An unknown key, with what may have been meant: a sibling, another choice's key, the same key elsewhere."""
    inner = _in_phase(loc)
    key, choices = str(loc[-1]), _MODELS[str(inner[0])] if len(inner) > 1 else []
    fitting = (choice for choice in choices if len(choices) == 1 or loc[-2] in _literals(choice, _tag(path)))
    table: type[Table] = next(fitting, Recipe if inner is loc else Phase)
    if any(key in choice.model_fields for choice in choices):
        return Problem(path, f'unknown key "{path}": {_tag(path)} = "{loc[-2]}" has no {plain_text(key)}', stale=True)
    siblings = list(_MODELS if table is Recipe else table.model_fields)
    close = difflib.get_close_matches(key, siblings, n=1) if len(key) <= 60 else []
    if not close and table is Recipe:
        close = [found for found in _all_paths() if found.rpartition(".")[2] == key][:1]
    return Problem(path, f'unknown key "{path}"' + (f' (did you mean "{close[0]}"?)' if close else ""))


def _all_paths() -> Iterator[str]:
    for key, models in _MODELS.items():
        for inner in (inner for model in models for inner in model.model_fields):
            yield f"{key}.0.{inner}" if key in _LISTS else f"{key}.{inner}"


def _tag(path: str) -> str:
    """The key that chooses among the models of a table."""
    return "head" if path.startswith("probe") else "name"


def _choices(table: str | int) -> list[str]:
    """The names or heads that a table of the recipe may have."""
    return [choice for model in _MODELS[str(table)] for choice in _literals(model, _tag(str(table)))]


def _literals(model: type[Table], key: str) -> tuple[str, ...]:
    return get_args(model.model_fields[key].annotation)


def _without_tag(loc: Sequence[str | int]) -> Sequence[str | int]:
    """A path without the tag that Pydantic puts behind the tables of a union."""
    table = _in_phase(loc)[0]
    place = len(loc) - len(_in_phase(loc)) + (2 if table == "attack" else 1)
    return [*loc[:place], *loc[place + 1 :]] if len(_MODELS.get(str(table), ())) > 1 else loc


def _in_phase(loc: Sequence[str | int]) -> Sequence[str | int]:
    """The path of a phase's table as it would be in the recipe, whose tables these are; other paths as they are."""
    return loc[2:] if loc[0] == "phase" and len(loc) > 2 else loc


def _not_among(value: Any, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) and len(value) <= 60 else []
    return f"{_one_of(allowed)}, not {show_value(value)}" + (f" (did you mean {_quoted(close[0])}?)" if close else "")


def _quoted(choice: str) -> str:
    return choice if choice in ("true", "false") else f'"{choice}"'  # no setting has such a text


def _one_of(allowed: Sequence[str]) -> str:
    quoted = [_quoted(choice) for choice in allowed]
    return "must be " + " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))


_MISSING = {
    "schema": "; write schema = 1",
    "crops": "; add a table [[crops]] with a count",
    "data": "; add a table [data] with a dataset",
    **{key: f"; add a table [{key}] with a name: {_one_of(_choices(key))}" for key in ("objective", "adversary")},
}


def show_value(value: Any) -> str:
    """A value of a TOML file as its writer would name it."""
    if isinstance(value, str):
        return f'the text "{plain_text(value, limit=40)}"'
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of more than 38 digits"
    if isinstance(value, bool | int | float):
        return repr(value).lower()
    return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else "a date or time"


def plain_text(text: str, *, limit: int = 200) -> str:
    """Text that a terminal shows and does not obey, shortened."""
    cut = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
