"""What `cfamc attack` is asked for: the flags of the command line, else the recipe's attacks."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import TypeAdapter, ValidationError

from cfamc_cli import recipe as recipes
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe import Attack, Recipe, fraction, length

Space = Literal["image", "crops"]
_RAND = "autoattack-rand"  # on the command line; in a recipe it is version = "rand"


@dataclass(frozen=True)
class Flags:
    """What the command line says of the evaluation.

    Attributes:
        eps: Radii, exact text; with `attack`, `steps`, `step_size`, `restarts` and `norm` in place of the recipe's
            attacks.
        attack: Name of an attack.
        steps: Its steps.
        step_size: Its step size, exact text.
        restarts: Its restarts.
        norm: "linf" or "l2".
        limit: So many samples, the first of the balanced order; all of them for None.
        head: Id of a probe, the beginning of one, or a kind of head.
        space: Where the attacker acts: "image", or "crops" for each crop of the aggregated head by itself.
        strict: A failed check is exit code 5.
        audit: Make the full audit too.
        save_examples: Draw so many adversarial examples.
        plot: Draw loss against steps and accuracy against eps.
    """

    eps: tuple[str, ...] = ()
    attack: str | None = None
    steps: int | None = None
    step_size: str | None = None
    restarts: int | None = None
    norm: str | None = None
    limit: int | None = None
    head: str | None = None
    space: str = "image"
    strict: bool = False
    audit: bool = False
    save_examples: int | None = None
    plot: bool = False


def check_flags(flags: Flags) -> None:
    """Refuse what needs no run to be seen as wrong."""
    if flags.space not in get_args(Space):
        raise invalid(f'--space: "{flags.space[:40]}" is neither "image" nor "crops"')
    if flags.space == "crops" and (flags.save_examples or flags.plot or flags.attack == "embedding"):
        what = "--save-examples" if flags.save_examples else "--plot" if flags.plot else "--attack embedding"
        raise invalid(f"{what} shows whole images, and --space crops attacks crops", "leave --space out")
    if flags.limit is not None and flags.limit < 1:
        raise invalid(f"--limit: {flags.limit} samples are none")


def asked_attacks(flags: Flags, recipe: Recipe) -> tuple[Attack, ...]:
    """The attacks that the flags describe, else the recipe's.

    Raises:
        CfamcError: Exit 2; a flag is malformed or has no effect on the attack.
    """
    given: dict[str, object] = {"steps": flags.steps, "restarts": flags.restarts, "norm": flags.norm}
    given["step_size"] = None if flags.step_size is None else _length("--step-size", flags.step_size)
    given = {key: value for key, value in given.items() if value is not None}
    if not given and not flags.eps and flags.attack is None:
        if not recipe.attack:
            raise invalid("the recipe of this run has no [[attack]]", "name one: cfamc attack --eps 8/255")
        return recipe.attack
    table = _table(flags.attack or "pgd")
    radii = [_length("--eps", text) for text in flags.eps]
    if len({fraction(text) for text in radii}) < len(radii):
        raise invalid("--eps: a radius is given twice")
    for key in given:
        if key not in _tables()[table["name"]].model_fields:
            raise invalid(f"{_flag(key)} has no effect on {flags.attack or 'pgd'}")
    found = []
    for sized in [{"eps": radius} for radius in radii] or [{}]:
        asked = table | given | sized
        try:
            found.append(_ATTACK.validate_python(asked))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = str(problem["loc"][-1]) if len(problem["loc"]) > 1 else "attack"
            message = " ".join(problem["msg"].replace("Input should", "should").split())
            if problem["type"] == "at_field":
                field, message = next(iter(problem["ctx"]["fields"].items()))
            raise invalid(f"{_flag(field)}: {message}"[:300]) from None
    return tuple(found)


_ATTACK: TypeAdapter[Attack] = TypeAdapter(Attack)


def _tables() -> dict[str, type[recipes.Table]]:
    """The recipe's attack tables by name."""
    union = get_args(Attack)[0]
    return {name: table for table in get_args(union) for name in get_args(table.model_fields["name"].annotation)}


def _table(name: str) -> dict[str, str]:
    if name == _RAND:
        return {"name": "autoattack", "version": "rand"}
    known = [*_tables(), _RAND]
    if name not in known:
        close = difflib.get_close_matches(name[:40].lower(), known, n=1)
        meant = f'did you mean "{close[0]}"? ' if close else ""
        raise invalid(f'--attack: "{name[:40]}" is no attack', f"{meant}there are: {', '.join(known)}")
    return {"name": name}


def _length(flag: str, text: str) -> str:
    try:
        return length(text)
    except ValueError as error:
        raise invalid(f"{flag}: {error}") from None


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def invalid(message: str, hint: str = "") -> CfamcError:
    """An error of the command line."""
    return CfamcError(message, hint=hint, exit_code=ExitCode.INVALID)
