"""What each key of a recipe means, for editors and for `cfamc recipes explain`.

The comments of `schema` say it, and nobody else does: those above and behind a field, else those of the type that its
annotation names. Types, ranges and defaults are Pydantic's own.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import json
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from cfamc_cli.errors import invalid
from cfamc_cli.recipe import schema
from cfamc_cli.recipe.schema import Recipe, Table, tables

TITLE = "A recipe of cfamc"  # of the JSON schema


@dataclass(frozen=True)
class Entry:
    """A key, or a table, in one of the forms that its place allows."""

    key: str  # dotted, with 0 for an entry of a list
    form: str  # such as 'name = "pgd"'; empty where its table has one form
    meaning: str
    value: str  # type, range and default in words; empty for a table
    choices: tuple[str, ...] = ()  # what the key may be where that is one of a few; of a table the names of its form


@cache
def _comments() -> dict[tuple[str, str], str]:
    """What is said of the fields of each class, and of the types of the module, whose class is empty."""
    text = inspect.getsource(schema)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    said = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}

    found: dict[tuple[str, str], str] = {}

    def of(node: ast.stmt, kind: ast.expr) -> str:
        first = node.lineno
        while first - 1 in said and said[first - 1].line.lstrip().startswith("#"):
            first -= 1
        lines = range(first, (node.end_lineno or node.lineno) + 1)
        own = " ".join(said[line].string.lstrip("# ") for line in lines if line in said)
        types = (found.get(("", part.id), "") for part in ast.walk(kind) if isinstance(part, ast.Name))
        return "; ".join(text.rstrip(".") for text in (own, next(filter(None, types), "")) if text)

    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found["", node.targets[0].id] = of(node, node.value)
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    found[node.name, field.target.id] = of(field, field.annotation)
    return found


def meaning(table: type[Table], field: str) -> str:
    """What the comments say of a field; empty where they say nothing."""
    return next((said for owner in table.__mro__ if (said := _comments().get((owner.__name__, field)))), "")


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, in the part of Draft 4 that editors of TOML read."""
    made: dict[str, Any] = _draft_4(Recipe.model_json_schema(by_alias=True))
    for name, node in [("Recipe", made), *made["definitions"].items()]:
        table: type[Table] = getattr(schema, name)
        for field, settings in table.model_fields.items():
            if said := meaning(table, field):
                node["properties"][settings.alias or field]["description"] = said
    return {"$schema": "http://json-schema.org/draft-04/schema#", "title": TITLE} | made


def _draft_4(node: Any) -> Any:
    """What Pydantic says in the words of Draft 4; TOML knows no null."""
    if isinstance(node, list):
        return [_draft_4(part) for part in node]
    if not isinstance(node, dict):
        return node
    if {"type": "null"} in node.get("anyOf", []):
        node = {key: value for key, value in node.items() if key not in ("anyOf", "default")} | node["anyOf"][0]
    return {key: value for pair in node.items() for key, value in _keyword(*pair).items()}


def _keyword(key: str, value: Any) -> dict[str, Any]:
    match key:
        case "properties" | "$defs":
            return {key.replace("$defs", "definitions"): {name: _draft_4(part) for name, part in value.items()}}
        case "$ref":
            return {key: value.replace("$defs", "definitions")}
        case "const":
            return {"enum": [value]}
        case "prefixItems":  # all of one kind
            return {"items": _draft_4(value[0])}
        case "exclusiveMinimum" | "exclusiveMaximum":
            return {key: True, key.removeprefix("exclusive").lower(): value}
        case "title" | "discriminator":
            return {}
        case _:
            return {key: _draft_4(value)}


@cache
def _properties() -> Mapping[str, Mapping[str, Any]]:
    """The JSON schema of each table's keys."""
    made = json_schema()
    return {name: node["properties"] for name, node in made["definitions"].items()} | {"Recipe": made["properties"]}


def _entries(table: type[Table], above: str = "", form: str = "") -> Iterator[Entry]:
    """Every table and key below a table, in the order of the schema."""
    for field, settings in table.model_fields.items():
        made = _properties()[table.__name__][settings.alias or field]
        key, forms = above + (settings.alias or field), tables(settings.annotation)
        key += ".0" if forms and made.get("type") == "array" else ""
        if len(forms) > 1:
            tag, names = _tag(forms[0]), _names(forms)
            chosen = forms[0].model_fields[tag]
            told = f"{_either(names)}; "
            told += "must be given" if chosen.is_required() else f"default {json.dumps(chosen.default)}"
            yield Entry(f"{key}.{tag}", "", "which of these forms it has", told, tuple(names))
        if not forms and not (form and field == _tag(table)):
            value = _in_words(made, required=settings.is_required())
            few = (True, False) if made.get("type") == "boolean" else made.get("enum", ())
            choices = tuple(one if isinstance(one, str) else json.dumps(one) for one in few)
            yield Entry(key, form, meaning(table, field), value, choices)
        for one in forms:
            names = _names([one]) if len(forms) > 1 else []
            label = f"{_tag(one)} = {_either(names)}" if names else ""
            yield Entry(key, label, inspect.cleandoc(one.__doc__ or ""), "", tuple(names))
            yield from _entries(one, f"{key}.", label)


def _tag(table: type[Table]) -> str:
    """The key that chooses among the forms of a table."""
    return "head" if "head" in table.model_fields else "name"


def _names(forms: Iterable[type[Table]]) -> list[str]:
    return [name for table in forms for name in get_args(table.model_fields[_tag(table)].annotation)]


def _either(values: Iterable[object]) -> str:
    return " or ".join(json.dumps(value) for value in values)


def _in_words(made: Mapping[str, Any], *, required: bool) -> str:
    """The type, range and default of a key."""
    if "anyOf" in made:
        kind = " or ".join(_KINDS[part["type"]] for part in made["anyOf"])
    else:
        kind = _either(made["enum"]) if "enum" in made else _KINDS[made["type"]]
    if kind == _KINDS["array"]:
        kind = f"{made['minItems']} numbers"
    low, high = made.get("minimum"), made.get("maximum")
    if low is not None:
        kind += f" {'above' if made.get('exclusiveMinimum') else 'from'} {low:,}"
    if high is not None:
        kind += f" {'to below' if made.get('exclusiveMaximum') else 'to'} {high:,}"
    default = f"default {json.dumps(made['default'])}" if "default" in made else "may be left out"
    return f"{kind}; {'must be given' if required else default}"


_KINDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "numbers",
    "object": "a table",
}


def explain(key: str) -> list[Entry]:
    """What a key means, in each form that its place allows; of a table also the keys in it.

    Args:
        key: As --set takes it; the place in a list may be left out. Empty for all keys.

    Raises:
        CfamcError: Exit 2; no recipe has such a key.
    """
    entries, wanted = list(_entries(Recipe)), _without_places(key)
    found = [one for one in entries if not wanted or f"{_without_places(one.key)}.".startswith(f"{wanted}.")]
    if not found:
        known = {_without_places(one.key): one.key for one in reversed(entries)}
        same = [name for name in reversed(known) if name.rpartition(".")[2] == wanted.rpartition(".")[2]]
        close = same or difflib.get_close_matches(wanted[:60], known, n=1)
        hint = f'did you mean "{known[close[0]]}"? ' if close else ""
        raise invalid(f"no recipe has a key {key[:80]!r}", f"{hint}`cfamc recipes explain` lists all")
    return found


def _without_places(key: str) -> str:
    return ".".join(part for part in key.split(".") if not part.isdigit())
