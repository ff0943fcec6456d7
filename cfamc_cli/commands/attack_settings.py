"""What `cfamc attack` is asked for: the flags of the command line, else the recipe's attacks."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import Field, TypeAdapter, ValidationError

from cfamc_cli.errors import CfamcError, ExitCode, invalid
from cfamc_cli.recipe.schema import Attack, Judged, Measure, Recipe, Table, fraction, reach
from cfamc_cli.store.records import Space


@dataclass(frozen=True)
class Flags:
    """What the command line says of the evaluation; an attack that is described here replaces the recipe's attacks."""

    eps: tuple[str, ...] = ()  # radii, exact text
    attack: str | None = None  # its name, or that of a measure; those up to `alpha` are its settings
    steps: int | None = None
    step_size: str | None = None  # exact text
    restarts: int | None = None
    norm: str | None = None  # "linf" or "l2"
    search_precision: str | None = None  # "float32" or "tf32"
    queries: int | None = None
    targets: int | None = None
    sigma: str | None = None  # exact text
    n0: int | None = None
    n: int | None = None
    alpha: float | None = None
    corruptions: Path | None = None  # folder of the published ones
    limit: int | None = None  # so many samples, the first of the balanced order; all of them for None
    split: Judged | None = None  # which images; held-out ones where there are some, else test images
    head: str | None = None  # id of a probe, or a kind of head
    space: str = "image"  # where the attacker acts; "crops" for each crop of the aggregated head by itself
    strict: bool = False  # a failed check is exit code 5; makes the full audit
    audit: bool = False  # make the full audit too
    save_examples: int | None = None  # draw so many adversarial examples
    plot: bool = False  # draw loss against steps and accuracy against eps, and after an audit the loss around images
    source: str | None = None  # a run to make the examples on, in place of the one that is judged
    unlabelled: bool = False  # measure the encoder by itself, without labels or a head
    data: str | None = None  # other images for that: a known set's name, or the path of a folder


def check_flags(flags: Flags) -> None:
    """Refuse what needs no run to be seen as wrong."""
    if flags.data is not None:
        raise invalid(
            "--data has no effect without --unlabelled: heads are attacked on the data that they read",
            "fit one to it first: cfamc probe RUN --data ...",
        )
    if flags.space not in get_args(Space):
        raise invalid(f'--space: "{flags.space[:40]}" is neither "image" nor "crops"')
    if flags.space == "crops" and (flags.save_examples or flags.plot or flags.attack == "embedding"):
        what = "--save-examples" if flags.save_examples else "--plot" if flags.plot else "--attack embedding"
        raise invalid(f"{what} shows whole images, and --space crops attacks crops", "leave --space out")


_ATTACK: TypeAdapter[Attack] = TypeAdapter(Attack)
_MEASURE: TypeAdapter[Measure] = TypeAdapter(Annotated[Measure, Field(discriminator="name")])
_ATTACKS, _MEASURES = (
    {name: table for table in tables for name in get_args(table.model_fields["name"].annotation)}
    for tables in (get_args(get_args(Attack)[0]), get_args(Measure))
)
_TABLES: dict[str, type[Table]] = _ATTACKS | _MEASURES
_SETTINGS = (
    *("steps", "step_size", "restarts", "norm", "search_precision", "queries", "targets"),
    *("sigma", "n0", "n", "alpha"),
)
_RAND = "autoattack-rand"  # on the command line; in a recipe it is version = "rand"


def asked_measure(flags: Flags) -> Measure | None:
    """The measure that the flags describe; None where they ask for attacks.

    Raises:
        CfamcError: Exit 2; a flag is malformed or has no effect on the measure.
    """
    name = flags.attack
    if name is None or name not in _MEASURES:
        return None
    given = _given(flags, name)
    for flag in ("eps", "audit", "save_examples"):
        if getattr(flags, flag):
            raise invalid(f"{_flag(flag)} has no effect on {name}")
    if flags.space != "image":
        raise invalid(f"--space crops has no effect on {name}", "leave --space out")
    source = {"source": "published"} if flags.corruptions else {}
    return _validated(_MEASURE, {"name": name} | source | given)


def asked_attacks(flags: Flags, recipe: Recipe) -> tuple[Attack, ...]:
    """The attacks that the flags describe, else the recipe's.

    Raises:
        CfamcError: Exit 2; a flag is malformed or has no effect on the attack.
    """
    name = flags.attack or "pgd"
    known = [*_TABLES, _RAND]
    if name not in known:
        close = difflib.get_close_matches(name[:40].lower(), known, n=1)
        meant = f'did you mean "{close[0]}"? ' if close else ""
        raise invalid(f'--attack: "{name[:40]}" is no attack', f"{meant}there are: {', '.join(known)}")
    given = _given(flags, name)
    if not given and not flags.eps and flags.attack is None:
        if not recipe.attack:
            raise invalid("the recipe of this run has no [[attack]]", "name one: cfamc attack --eps 8/255")
        return recipe.attack
    table = {"name": "autoattack", "version": "rand"} if name == _RAND else {"name": name}
    sizes: list[dict[str, str]] = [{"eps": text} for text in flags.eps] or [{}]
    found = tuple(_validated(_ATTACK, table | given | size) for size in sizes)
    if len({fraction(attack.eps) for attack in found}) < len(found):
        raise invalid("--eps: a radius is given twice")
    return found


def require_reach(attacks: Sequence[Attack]) -> None:
    """Refuse what --strict could never trust, before anything is computed.

    Raises:
        CfamcError: Exit 5; the steps of an attack are too few or too short to get to the border of its ball.
    """
    for table in attacks:
        way = reach(table)
        if way is not None and way < fraction(table.eps):
            raise CfamcError(
                f"{table.name} at eps {table.eps} cannot be trusted: its steps lead {float(way):.4g} at most",
                hint="raise --steps or --step-size, or leave --strict out",
                exit_code=ExitCode.UNTRUSTED,
            )


def _given(flags: Flags, name: str) -> dict[str, Any]:
    """The settings among the flags, each of which the table of that name has."""
    given = {key: value for key in _SETTINGS if (value := getattr(flags, key)) is not None}
    fields = _TABLES["autoattack" if name == _RAND else name].model_fields
    if idle := [key for key in given if key not in fields]:
        raise invalid(f"{_flag(idle[0])} has no effect on {name}")
    if flags.corruptions and name != "corruptions":
        raise invalid(f"--corruptions has no effect on {name}", "add --attack corruptions")
    return given


A = TypeVar("A")


def _validated(kind: TypeAdapter[A], table: dict[str, Any]) -> A:
    try:
        return kind.validate_python(table)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field, message = str(problem["loc"][-1]), " ".join(problem["msg"].replace("Input should", "should").split())
        if problem["type"] == "at_field":
            field, message = next(iter(problem["ctx"]["fields"].items()))
        raise invalid(f"{_flag(field)}: {message.removeprefix('Value error, ')}"[:300]) from None


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"
