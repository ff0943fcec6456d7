"""What `cfamc attack` is asked for: the flags of the command line, else the recipe's attacks."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from cfamc_cli.errors import invalid
from cfamc_cli.recipe.schema import Attack, Judged, Recipe, Table, fraction
from cfamc_cli.store.records import Space


@dataclass(frozen=True)
class Flags:
    """What the command line says of the evaluation; an attack that is described here replaces the recipe's attacks."""

    eps: tuple[str, ...] = ()  # radii, exact text
    attack: str | None = None  # its name; the next five are its settings
    steps: int | None = None
    step_size: str | None = None  # exact text
    restarts: int | None = None
    norm: str | None = None  # "linf" or "l2"
    search_precision: str | None = None  # "float32" or "tf32"
    limit: int | None = None  # so many samples, the first of the balanced order; all of them for None
    split: Judged | None = None  # which images; held-out ones where there are some, else test images
    head: str | None = None  # id of a probe, or a kind of head
    space: str = "image"  # where the attacker acts; "crops" for each crop of the aggregated head by itself
    strict: bool = False  # a failed check is exit code 5
    audit: bool = False  # make the full audit too
    save_examples: int | None = None  # draw so many adversarial examples
    plot: bool = False  # draw loss against steps and accuracy against eps


def check_flags(flags: Flags) -> None:
    """Refuse what needs no run to be seen as wrong."""
    if flags.space not in get_args(Space):
        raise invalid(f'--space: "{flags.space[:40]}" is neither "image" nor "crops"')
    if flags.space == "crops" and (flags.save_examples or flags.plot or flags.attack == "embedding"):
        what = "--save-examples" if flags.save_examples else "--plot" if flags.plot else "--attack embedding"
        raise invalid(f"{what} shows whole images, and --space crops attacks crops", "leave --space out")


_ATTACK: TypeAdapter[Attack] = TypeAdapter(Attack)
_TABLES: dict[str, type[Table]] = {
    name: table for table in get_args(get_args(Attack)[0]) for name in get_args(table.model_fields["name"].annotation)
}
_RAND = "autoattack-rand"  # on the command line; in a recipe it is version = "rand"


def asked_attacks(flags: Flags, recipe: Recipe) -> tuple[Attack, ...]:
    """The attacks that the flags describe, else the recipe's.

    Raises:
        CfamcError: Exit 2; a flag is malformed or has no effect on the attack.
    """
    given = {key: getattr(flags, key) for key in ("steps", "step_size", "restarts", "norm", "search_precision")}
    given = {key: value for key, value in given.items() if value is not None}
    if not given and not flags.eps and flags.attack is None:
        if not recipe.attack:
            raise invalid("the recipe of this run has no [[attack]]", "name one: cfamc attack --eps 8/255")
        return recipe.attack
    name = flags.attack or "pgd"
    known = [*_TABLES, _RAND]
    if name not in known:
        close = difflib.get_close_matches(name[:40].lower(), known, n=1)
        meant = f'did you mean "{close[0]}"? ' if close else ""
        raise invalid(f'--attack: "{name[:40]}" is no attack', f"{meant}there are: {', '.join(known)}")
    table = {"name": "autoattack", "version": "rand"} if name == _RAND else {"name": name}
    for key in given:
        if key not in _TABLES[table["name"]].model_fields:
            raise invalid(f"{_flag(key)} has no effect on {name}")
    found = tuple(_validated(table | given | sized) for sized in [{"eps": text} for text in flags.eps] or [{}])
    if len({fraction(attack.eps) for attack in found}) < len(found):
        raise invalid("--eps: a radius is given twice")
    return found


def _validated(table: dict[str, Any]) -> Attack:
    try:
        return _ATTACK.validate_python(table)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field, message = str(problem["loc"][-1]), " ".join(problem["msg"].replace("Input should", "should").split())
        if problem["type"] == "at_field":
            field, message = next(iter(problem["ctx"]["fields"].items()))
        raise invalid(f"{_flag(field)}: {message.removeprefix('Value error, ')}"[:300]) from None


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"
