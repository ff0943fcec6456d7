"""What keys of a recipe mean: said for every key, from the comments of the schema alone, and read by editors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cfamc_cli.cli import run
from cfamc_cli.errors import ExitCode
from cfamc_cli.recipe import describe, schema
from cfamc_cli.recipe.file import load, shipped

SOURCE = Path(schema.__file__).read_text(encoding="utf-8")
LINTERS = {"taplo": ("taplo", "lint"), "tombi": ("tombi", "lint", "--offline")}


def test_every_key_has_a_meaning() -> None:
    entries = describe.explain("")
    assert [entry for entry in entries if not entry.meaning] == []
    assert len({entry.key for entry in entries}) > 100


def test_every_key_of_a_recipe_is_explained() -> None:
    """Walked by what recipes resolve to, and not by the schema; what is left out of one has no keys."""

    def leaves(node: Any, path: str) -> list[str]:
        if isinstance(node, list) and node and isinstance(node[0], dict):
            node = {"0": node[0]}
        if not isinstance(node, dict) or path == "model.options":
            return [path]
        told = {key: value for key, value in node.items() if value is not None}
        return [leaf for key, value in told.items() for leaf in leaves(value, f"{path}.{key}".lstrip("."))]

    known = {entry.key for entry in describe.explain("")}
    for name in shipped():
        assert set(leaves(load(name).resolved(), "")) <= known


@pytest.mark.parametrize(
    ("key", "entries"),
    [
        ("train.batch_size", [("", "images, over all processes", "a whole number from 2 to 1,000,000; default 100")]),
        (
            "adversary.eps",
            [
                (
                    f'name = "{name}"',
                    "how far a perturbation may go in any pixel; in units of the range of pixels, which is [0, 1]: "
                    'text such as "8/255", or 0.03',
                    'text or a number; default "8/255"',
                )
                for name in ("pgd", "free")
            ],
        ),
        (
            "schedule.end",
            [('name = "cosine"', "where it falls to, as a share of lr", "a number from 0 to below 1; default 0.0")],
        ),
        ("crops.count", [("", "crops of an image", "a whole number from 1 to 1,024; must be given")]),
        ("crops.0.ratio", [("", "width / height", "2 numbers; default [0.75, 1.3333333333333333]")]),
        ("optimizer.name", [("", "which of these forms it has", '"lars" or "adamw"; default "lars"')]),
        (
            "optimizer.beta2",
            [
                (
                    'name = "adamw"',
                    "of the mean of their squares; share of what was before that an update keeps",
                    "a number from 0 to below 1; default 0.999",
                )
            ],
        ),
        ("train.compile", [("", "", '"auto" or true or false; default "auto"')]),
        (
            "phase.0.batch_size",
            [("", "images, over all processes", "a whole number from 2 to 1,000,000; may be left out")],
        ),
    ],
)
def test_a_key_is_told_with_unit_range_and_default(key: str, entries: list[tuple[str, str, str]]) -> None:
    found = describe.explain(key)
    assert [(one.form, one.value) for one in found] == [(form, value) for form, _, value in entries]
    assert all(said in one.meaning for one, (_, said, _) in zip(found, entries, strict=True))


def test_what_is_said_stands_in_the_schema_once() -> None:
    for said in ("channels of the first stage", "images, over all processes", "how far each ascent step goes"):
        assert SOURCE.count(said) == 1


def test_explain_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "explain", "adversary"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        'adversary.name\n    which of these forms it has\n    "none" or "pgd" or "free"; must be given\n'
    )
    assert '[adversary], name = "free"\n    Free adversarial training, arXiv:1904.12843' in out
    assert run(["recipes", "explain", "train.epochs", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["keys"]
    assert (told["key"], told["value"]) == ("train.epochs", "a number above 0 to 100,000; default 10.0")


@pytest.mark.parametrize(
    ("key", "meant"),
    [("train.batchsize", "train.batch_size"), ("batch_size", "train.batch_size"), ("crop.count", "crops.0.count")],
)
def test_an_unknown_key_is_told_what_may_be_meant(key: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "explain", key]) == ExitCode.INVALID
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: no recipe has a key '{key}'"
    assert hint == f'hint: did you mean "{meant}"? `cfamc recipes explain` lists all'


def test_the_schema_keeps_to_draft_4(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "schema"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["$schema"] == "http://json-schema.org/draft-04/schema#"
    text = json.dumps(made)
    for later in ('"const"', '"$defs"', '"prefixItems"', '"null"', '"discriminator"'):
        assert later not in text
    lr = made["definitions"]["Linear"]["properties"]["lr"]
    assert lr == {"type": "number", "minimum": 0, "exclusiveMinimum": True, "default": 3e-4} | {
        "description": "learning rate of Adam"
    }


def test_a_copy_tells_editors_its_schema(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert run(["recipes", "copy", "cifar10", str(tmp_path)]) == 0
    assert (tmp_path / "cifar10.toml").read_text().splitlines()[0] == "#:schema ./cfamc-recipe.schema.json"
    assert load(str(tmp_path / "cifar10.toml")) == load("cifar10")
    assert json.loads((tmp_path / "cfamc-recipe.schema.json").read_text()) == describe.json_schema()
    (tmp_path / "mine/cfamc-recipe.schema.json").write_text("{}")  # somebody else's
    (tmp_path / "cfamc-recipe.schema.json").write_text(f'{{"title": "{describe.TITLE}"}}')  # of another version
    for folder in (tmp_path, tmp_path / "mine"):
        assert run(["recipes", "copy", "quickstart", str(folder)]) == 0
    assert (tmp_path / "mine/cfamc-recipe.schema.json").read_text() == "{}"
    assert json.loads((tmp_path / "cfamc-recipe.schema.json").read_text()) == describe.json_schema()


@pytest.mark.parametrize("linter", LINTERS)
def test_editors_take_the_recipes_and_find_what_is_wrong(linter: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / LINTERS[linter][0]), *LINTERS[linter][1:]]
    for name in shipped():
        assert run(["recipes", "copy", name, str(tmp_path)]) == 0

    def lint(*files: Path) -> tuple[int, str]:
        done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    assert lint(*tmp_path.glob("*.toml"))[0] == 0
    good = (tmp_path / "cifar10.toml").read_text()
    for wrong in ("optimizer.lr = -1", "adversary.nam = 1", 'model.stem = "c"', "probe.steps = 3", "augment.flip = 2"):
        table, _, rest = wrong.partition(".")
        tables = [part for part in good.split("\n\n") if not part.startswith(f"[{table}]")]
        (tmp_path / "cifar10.toml").write_text("\n\n".join(tables) + f"\n\n[{table}]\n{rest}\n")
        code, said = lint(tmp_path / "cifar10.toml")
        assert code != 0, (wrong, said)
    (tmp_path / "cifar10.toml").write_text(good.replace('"8/255"', "0.03"))
    assert lint(tmp_path / "cifar10.toml")[0] == 0
