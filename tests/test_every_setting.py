"""Law 3, by walking the recipe's models: every setting changes the weights, or what a head or an attack yields.

A leaf is one value of a table, or one number of a list in it. Its other values come from its type, and from what the
recipe's own checks let pass. A key that is added to a table is walked from that day on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest import mock

import pytest
import torch
from fixed_inputs import signed, uniform
from tiny import image_folder
from torch import Tensor, nn

from cfamc_cli import cli
from cfamc_cli.engine.attacks.plan import plan
from cfamc_cli.engine.evaluation.blocks import Examples, evaluate
from cfamc_cli.engine.evaluation.verify import Predictor
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import CfamcError
from cfamc_cli.recipe import file
from cfamc_cli.recipe.schema import Attack, Measure, Normalize, Probe, Recipe, Table
from cfamc_cli.store.records import Outcome

# Runs of two batches that together make every setting of training effective
BASE: dict[str, Any] = {
    "schema": 1,
    "name": "base",
    "data": {"dataset": "folder", "root": "images", "limit": 16},
    "crops": [{"count": 2, "size": 8}, {"count": 1, "size": 8}],
    "model": {"width": 4, "hidden_dim": 8, "embedding_dim": 4},
    "adversary": {"name": "none"},
    "train": {"epochs": 1.0, "batch_size": 8, "precision": "float32"},
}
PHASE: dict[str, Any] = {
    "epochs": 0.5,
    "batch_size": 4,
    "crops": [{"count": 2, "size": 8}, {"count": 1, "size": 8}],
    "augment": {"blur_p": 0.5, "solarize_p": 0.5},
    "objective": {"name": "simclr"},
    "adversary": {"name": "free", "replays": 2, "step_size": "4/255"},
    "optimizer": {"lr": 0.3},
    "schedule": {"name": "cosine"},
}
VIT: dict[str, Any] = {
    "backbone": "timm:vit_tiny_patch16_224",
    "options": {"img_size": 12, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
}
TRAINED = [
    BASE
    | {
        "objective": {"name": "emp-ssl"},
        "adversary": {"name": "free", "replays": 2, "step_size": "4/255"},
        "schedule": {"name": "official-cosine"},
    },
    BASE | {"objective": {"name": "simclr"}, "adversary": {"name": "pgd", "steps": 3, "step_size": "3/255"}},
    BASE
    | {
        "objective": {"name": "supcon"},
        "train": BASE["train"] | {"evaluate_every": 1},
        "model": BASE["model"] | {"normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}, "input_size": 10},
    },
    BASE | {"objective": {"name": "emp-ssl"}, "phase": [PHASE]},
    BASE | {"objective": {"name": "emp-ssl"}, "phase": [PHASE | {"objective": {"name": "clusters", "count": 3}}]},
    BASE
    | {
        "objective": {"name": "emp-ssl"},
        "model": VIT | {"hidden_dim": 8, "embedding_dim": 4},
        "optimizer": {"name": "adamw"},
        "crops": [{"count": 2, "size": 12}],
    },
]

# What is cheap, for the keys of these names in any table of a head or of an attack
SHORT = {"epochs": 2, "batch_size": 8, "steps": 3, "crops": 2, "k": 5, "targets": 2, "queries": 40}

# The few values that a type does not tell
OVERRIDES: dict[str, tuple[Any, ...]] = {
    "data.dataset": ("fashion-mini",),  # the others are downloaded
    "data.root": ("moved",),  # the same images elsewhere
    "data.holdout": (4,),  # an image of each class
    "model.backbone": ("resnet34", "timm:deit_tiny_distilled_patch16_224"),
    "model.options": (VIT["options"] | {"depth": 2},),
    "train.init": ("source",),  # a run of the store
    "model.normalize": (Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),),
}

# What the weights of a run on a CPU cannot show, and why
EXEMPT = {
    "seed": "it changes the weights, and seeds of one recipe are to fold together in its digest",
    "train.batch_norm": "one process has the whole batch",
    "train.deterministic": "chooses among kernels of a GPU; those of a CPU repeat anyway",
    "train.compile": "what is compiled computes the same up to rounding, and takes a compiler and half a minute",
}


# The walk


@dataclass(frozen=True)
class Leaf:
    """One value of a table of a recipe; `place` where it is a number of a list."""

    table: Table
    at: tuple[str | int, ...]  # where the table stands
    name: str
    place: int | None

    @property
    def key(self) -> str:
        return type(self.table).model_fields[self.name].alias or self.name

    @property
    def path(self) -> str:
        """As in `train.lr`; places in a list of tables are left out."""
        return ".".join([*(str(part) for part in self.at if isinstance(part, str)), self.key])

    @property
    def id(self) -> str:
        place = "" if self.place is None else f"[{self.place}]"
        return ".".join([*map(str, self.at), self.key]) + place + f" of {type(self.table).__name__}"

    @property
    def options(self) -> tuple[Any, ...]:
        """What a Literal allows; none for other types."""
        annotation = type(self.table).model_fields[self.name].annotation
        return get_args(annotation) if get_origin(annotation) is Literal else ()


def leaves(table: Table, at: tuple[str | int, ...] = ()) -> Iterator[Leaf]:
    for name, info in type(table).model_fields.items():
        value, key = getattr(table, name), info.alias or name
        match value:
            case Table():
                yield from leaves(value, (*at, key))
            case tuple() if value and isinstance(value[0], Table):
                for place, part in enumerate(value):
                    yield from leaves(part, (*at, key, place))
            case tuple():
                yield from (Leaf(table, at, name, place) for place in range(len(value)))
            case _:
                yield Leaf(table, at, name, None)


def other_values(leaf: Leaf) -> Sequence[Any]:
    """Values that may stand in a leaf's place, near ones first; which of them are valid the recipe tells."""
    value = getattr(leaf.table, leaf.name)
    if leaf.path in OVERRIDES:
        return OVERRIDES[leaf.path]
    if leaf.options:
        return [option for option in leaf.options if option != value]
    if leaf.place is not None:
        return [(*value[: leaf.place], new, *value[leaf.place + 1 :]) for new in _numbers(value[leaf.place])]
    match value:
        case bool():
            return [not value]
        case int() | float():
            return _numbers(value)
        case None:
            return [16]
        case str():
            try:
                return [str(Fraction(value) / 2), str(Fraction(value) * 2)]
            except ValueError:
                return [value + " too"]
        case _:
            raise AssertionError(f"{leaf.id}: how else could {value!r} be?")


def _numbers(value: float) -> list[float]:
    if isinstance(value, int):
        return [value + 1, value * 2, value // 2]
    return [value / 2, value * 2, value + 0.1, value / 100]


def changed(recipe: Recipe, leaf: Leaf) -> Iterator[Recipe]:
    """Valid recipes that differ in one leaf, and in what that makes idle."""
    for value in other_values(leaf):
        table = leaf.table.model_copy(update={leaf.name: value}).model_dump(mode="json", by_alias=True)
        raw = recipe.resolved()
        place: Any = raw
        for part in leaf.at[:-1]:
            place = place[part]
        new = table | {leaf.key: list(value) if isinstance(value, tuple) else value}  # given, be it idle
        if leaf.at:
            place[leaf.at[-1]] = new
        else:
            raw = new
        with contextlib.suppress(CfamcError):
            yield file.validate(raw, label=leaf.id)


def is_tag(leaf: Leaf) -> bool:
    """Whether a leaf only says which table this is: there is a table of its own for each other value."""
    return len(leaf.options) == 1


def tables(recipe: Recipe) -> set[type[Table]]:
    return {type(leaf.table) for leaf in leaves(recipe)}


def concrete(table: type[Table] = Table) -> set[type[Table]]:
    """Every table there is."""
    below = [concrete(child) for child in table.__subclasses__()]
    return set().union(*below) if below else {table}


def kinds(union: Any, others: Mapping[str, Any], name: str) -> list[Recipe]:
    """Recipes with each table of a union at `name`, cheap, in each of its ways to be."""
    made = []
    for table in get_args(get_args(union)[0]):
        short = {key: value for key, value in SHORT.items() if key in table.model_fields}
        options = {
            key: get_args(info.annotation)
            for key, info in table.model_fields.items()
            if get_origin(info.annotation) is Literal
        }
        first = {key: values[0] for key, values in options.items() if len(values) == 1 or key == "name"}
        ways = [first] + [first | {key: value} for key, values in options.items() for value in values[1:]]
        for way in ways:
            idle = table.model_construct(**way).idle()
            settings = {key: value for key, value in (short | way).items() if key not in idle}
            entry: Any = [settings] if name == "attack" else settings
            made.append(file.validate({**others, name: entry}, label=f"{name} {settings}"))
    return made


BASES = [file.validate(raw, label="base") for raw in TRAINED]
HEADS = kinds(Probe, TRAINED[2], "probe")
ATTACKS = kinds(Attack, TRAINED[2], "attack")


def by_id(recipes: Sequence[Recipe], *, within: str = "") -> dict[str, list[tuple[Recipe, Leaf]]]:
    """Every leaf, with the recipes that have it."""
    found: dict[str, list[tuple[Recipe, Leaf]]] = {}
    for recipe in recipes:
        for leaf in leaves(recipe):
            if not is_tag(leaf) and leaf.path.startswith(within):
                found.setdefault(leaf.id, []).append((recipe, leaf))
    return found


def assert_effective(cases: Sequence[tuple[Recipe, Leaf]], outcome: Callable[[Recipe], object]) -> None:
    """A leaf must change the outcome of one of its recipes, and be refused wherever its table calls it idle."""
    shown = False
    for recipe, leaf in cases:
        if leaf.name in leaf.table.idle():
            assert not list(changed(recipe, leaf)), f"{leaf.id} is idle and not refused"
        elif not shown:
            before = outcome(recipe)
            shown = any(outcome(other) != before for other in changed(recipe, leaf))
    assert shown, f"{cases[0][1].id} has no effect"


# What a recipe leads to


@dataclass
class Workshop:
    """A folder with images, in which commands run and each recipe runs once."""

    folder: Path
    seen: dict[str, str] = field(default_factory=dict)

    def command(self, *arguments: str) -> Mapping[str, Any]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.chdir(self.folder):
            assert cli.run([*arguments, "--json", "--quiet"]) in (0, None), out.getvalue()
        answer = json.loads(out.getvalue())
        assert isinstance(answer, dict)
        return answer

    def run_of(self, recipe: Recipe) -> Path:
        text = file.to_toml(recipe)
        if text not in self.seen:
            (self.folder / "recipe.toml").write_text(text)
            self.seen[text] = str(self.command("pretrain", "recipe.toml")["id"])
        return self.folder / "runs" / self.seen[text]

    def weights(self, recipe: Recipe) -> str:
        """The SHA-256 of the encoder that a recipe makes."""
        newest = max((self.run_of(recipe) / "checkpoints").glob("step-*"))
        return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()

    def head(self, recipe: Recipe) -> str:
        """What [probe] makes of the encoder: the head's digest, and how it answers."""
        text = json.dumps(recipe.probe.model_dump(mode="json"))
        if text not in self.seen:
            table = json.loads(text)
            settings = [f"--set=probe.{key}={json.dumps(value)}" for key, value in table.items() if key != "head"]
            run = self.run_of(BASES[2])
            record = self.command("probe", run.name, "--head", recipe.probe.head, *settings)
            assert record["settings"] == table
            self.seen[text] = json.dumps([record["head_digest"], record["train_accuracy"], record["confusion"]])
        return self.seen[text]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("workshop")
    image_folder(folder / "images", train=6, test=20, classes="abcd", told=0)
    shutil.copytree(folder / "images", folder / "moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.delenv("CFAMC_RUNS", raising=False)
        patch.setattr(os, "fsync", lambda _: None)  # nothing here outlives the test
        made = Workshop(folder)
        source = BASES[0].model_copy(update={"seed": 7})
        made.run_of(source).rename(folder / "runs" / "source")
        yield made


# What an attack comes to, on a net that is cheaper to attack than an encoder


def _net() -> tuple[nn.Module, nn.Module]:
    """Curved enough for one start to find what another does not."""
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 16), nn.Tanh())
    head = nn.Linear(16, 10)
    with torch.no_grad():
        for name, value in nn.ModuleList([encoder, head]).named_parameters():
            value.copy_(signed(*value.shape, key=name))
    return encoder.requires_grad_(False), head.requires_grad_(False)


def _samples() -> tuple[Tensor, Tensor]:
    """Those that are broken soonest come first."""
    x = uniform(96, 3, 8, 8, key="attacked").float()
    logits = HEAD(ENCODER(x)).sort(1).values
    x = x[(logits[:, -1] - logits[:, -2]).argsort()]
    return x, HEAD(ENCODER(x)).argmax(1)


ENCODER, HEAD = _net()
X, Y = _samples()


@cache
def examples(attack: Attack) -> object:
    """Whose prediction an attack breaks, and by which images."""
    found: list[object] = []

    def commit(outcome: Outcome, examples: Examples) -> None:
        found.append((outcome.broken, examples.positions, examples.images.numpy().tobytes()))

    def logits(x: Tensor) -> Tensor:
        z: Tensor = HEAD(ENCODER(x))
        return z

    def shortened(x: Tensor) -> Tensor:
        """As a card that shortens float32 would read it."""
        return x + ((x * 16).round() / 16 - x).detach() if torch.backends.cuda.matmul.allow_tf32 else x

    n = 3 if attack.name == "autoattack" else len(X)  # its stages are as long as the publication has them
    evaluate(
        Predictor(logits, lambda x: logits(shortened(x)), (ENCODER, HEAD), lambda x: ENCODER(shortened(x))),
        X[:n],
        Y[:n],
        plan=plan(attack, classes=10),
        seed=0,
        block_size=n,
        device=torch.device("cpu"),
        finished=[],
        commit=commit,
        audit=None,
        label="",
        talk=NullTalk(),
    )
    return found


# The tests


def test_every_table_is_walked() -> None:
    elsewhere = set(get_args(Measure))  # no part of a recipe; test_measures walks them
    assert set().union(*map(tables, [*BASES, *HEADS, *ATTACKS])) == concrete() - elsewhere


TRAINING, PROBE, ATTACK = by_id(BASES), by_id(HEADS, within="probe"), by_id(ATTACKS, within="attack")


@pytest.mark.parametrize("name", [name for name, cases in TRAINING.items() if cases[0][1].path not in EXEMPT])
def test_a_setting_changes_the_weights_if_and_only_if_the_digest_keeps_it(name: str, workshop: Workshop) -> None:
    cases = TRAINING[name]
    recipe, leaf = cases[0]
    other = next(changed(recipe, leaf), None)
    if other is not None and other.digest() == recipe.digest():
        assert workshop.weights(other) == workshop.weights(recipe), f"{name} is not in the digest"
    elif leaf.at[:1] not in (("probe",), ("attack",)):
        assert_effective(cases, workshop.weights)


def test_heads_and_attacks_to_come_leave_the_weights_alone(workshop: Workshop) -> None:
    attacks = tuple(recipe.attack[0] for recipe in ATTACKS)
    expected = workshop.weights(BASES[2])
    for recipe in HEADS:
        assert workshop.weights(recipe.model_copy(update={"attack": attacks})) == expected, recipe.probe


@pytest.mark.parametrize("path", EXEMPT)
def test_an_exemption_is_needed_and_the_setting_is_heeded(path: str, workshop: Workshop) -> None:
    ((recipe, leaf),) = [case for cases in by_id(BASES[2:3]).values() for case in cases if case[1].path == path]
    (other, *_) = changed(recipe, leaf)
    before = workshop.weights(recipe)
    with (
        mock.patch.object(torch, "use_deterministic_algorithms") as deterministic,
        mock.patch.object(nn.Module, "compile") as compiled,
        mock.patch("cfamc_cli.engine.pretrain.synchronise", autospec=True) as synchronised,
    ):
        after = workshop.weights(other)
    match path:
        case "seed":
            assert other.digest() == recipe.digest()
            assert after != before
        case "train.deterministic":
            assert other.digest() != recipe.digest()
            assert after == before
            deterministic.assert_called_with(True)
        case "train.compile":
            assert other.digest() != recipe.digest()
            assert after == before
            compiled.assert_called_once_with(dynamic=False)
        case "train.batch_norm":  # tests/test_distributed.py says what it does for several processes
            assert other.digest() != recipe.digest()
            assert after == before
            synchronised.assert_called_once()
        case _:
            raise AssertionError(f"{path} is exempt, and nothing shows that it is heeded")


@pytest.mark.parametrize("name", PROBE)
def test_a_setting_of_a_head_changes_the_head(name: str, workshop: Workshop) -> None:
    assert_effective(PROBE[name], workshop.head)


@pytest.mark.parametrize("name", ATTACK)
def test_a_setting_of_an_attack_changes_its_examples(name: str) -> None:
    assert_effective(ATTACK[name], lambda recipe: examples(recipe.attack[0]))
