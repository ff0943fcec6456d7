"""Recipes as files: what cannot be read, overrides, every error's text, generated recipes, and writing."""

# ruff: noqa: E501 - a line for each error

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_recipe

from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe import file, wording
from cfamc_cli.recipe.plan import plan
from cfamc_cli.recipe.schema import AdamW, Cosine, FreeAdversary, Lars, NoAdversary, PgdAdversary, Recipe

MINIMAL = """schema = 1
name = "minimal"
[data]
dataset = "cifar10"
[[crops]]
count = 4
[objective]
name = "emp-ssl"
[adversary]
name = "free"
"""
PRINTS_ONE = "`cfamc recipes show cifar10` prints a recipe that loads"


def refusal(reference: object = "cifar10", *overrides: str, seed: int | None = None) -> CfamcError:
    start = time.process_time()
    with pytest.raises(CfamcError) as refused:
        file.load(str(reference), overrides=overrides, seed=seed)
    assert time.process_time() - start < 5
    assert refused.value.exit_code is ExitCode.INVALID
    return refused.value


def problems(*overrides: str, reference: object = "cifar10", seed: int | None = None) -> list[str]:
    """The problems' lines, once the first line and the details are checked."""
    error = refusal(reference, *overrides, seed=seed)
    first, *lines = error.message.split("\n")
    assert first == f"{reference}: {len(lines)} problem{'s' if len(lines) != 1 else ''}"
    listed = error.details["problems"]
    assert isinstance(listed, list)
    assert len(listed) == len(lines)
    given = {override.partition("=")[0].strip() for override in overrides}
    for at, (line, problem) in enumerate(zip(lines, listed, strict=True)):
        path, message = problem["path"], problem["message"]
        assert path
        lines[at] = message if f'"{path}"' in message else f"{path}: {message}"
        flag = "--seed" if (path, seed is None) == ("seed", False) else f"--set {path}" if path in given else ""
        assert line == (f"{flag}: {message}" if flag else lines[at])
    json.dumps(error.details)
    return lines


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def _write(content: str | bytes) -> Path:
        path = tmp_path / "r.toml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


# Files


def test_reads_a_file_with_defaults_and_a_seed_of_the_callers(write: Any) -> None:
    path = write(MINIMAL)
    recipe = file.load(str(path), overrides=[], seed=None)
    assert (recipe.name, recipe.seed, recipe.views, recipe.train.batch_size) == ("minimal", 0, 4, 100)
    assert file.load(str(path), seed=7).seed == 7


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + MINIMAL.encode(), MINIMAL.replace("\n", "\r\n").encode()], ids=["BOM", "CRLF"]
)
def test_byte_order_mark_and_crlf_are_accepted(write: Any, content: bytes) -> None:
    assert file.load(str(write(content))).name == "minimal"


TOO_DEEP = "{path}: is nested too deeply"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"a = 1\nb = \0", "{path}: line 2 holds a NUL byte", id="NUL"),
        pytest.param(b"a = 1\nb = '\xff'", "{path}: line 2 is not UTF-8 (byte 0xff)", id="Latin-1"),
        pytest.param("schema = 1".encode("utf-16"), "{path}: line 1 holds a NUL byte", id="UTF-16"),
        pytest.param(
            b"seed = 1\nseed = 2\n",
            "{path}: not TOML: Cannot overwrite a value (at line 2, column 9)",
            id="duplicate key",
        ),
        pytest.param(
            b"[data]\n[data]\n",
            "{path}: not TOML: Cannot declare ('data',) twice (at line 2, column 6)",
            id="duplicate table",
        ),
        pytest.param(
            b"seed 1",
            "{path}: not TOML: Expected '=' after a key in a key/value pair (at line 1, column 6)",
            id="syntax",
        ),
        pytest.param(b"a = " + b"[" * 10_000, TOO_DEEP, id="arrays"),
        pytest.param(b"a = " + b"{a=" * 10_000, TOO_DEEP, id="inline tables"),
        pytest.param(b"a." * 10_000 + b"a = 1", TOO_DEEP, id="dotted key"),
        pytest.param(b"[" + b"a . " * 10_000 + b"a]", TOO_DEEP, id="dotted header"),
        pytest.param(b"[" + b'"a".' * 10_000 + b"a]", TOO_DEEP, id="quoted key"),
        pytest.param(b"seed = " + b"9" * 5_000, "{path}: a number is too long", id="5,000 digits"),
        pytest.param(b"#" * (2**20 + 1), "{path}: is larger than 1 MiB", id="over 1 MiB"),
        pytest.param(b"a." * 500_000 + b"a=1", TOO_DEEP, id="1 MiB of dots"),
    ],
)
def test_text_that_is_no_recipe(write: Any, content: bytes, message: str) -> None:
    path = write(content)
    assert refusal(path).message == message.format(path=path)


def test_a_mebibyte_is_read_whole_and_quickly(write: Any) -> None:
    comment = b"# " + b"a" * (2**20 - len(MINIMAL) - 3) + b"\n"
    assert file.load(str(write(comment + MINIMAL.encode()))).name == "minimal"
    many = "".join(f"key{place} = 1\n" for place in range(60_000))
    error = refusal(write(many[: 2**20 - 2_000].rpartition("\n")[0] + "\n" + MINIMAL))
    assert error.message.split("\n")[1] == 'unknown key "key0"'
    assert error.message.split("\n")[-1].startswith("and ")
    assert len(error.message.split("\n")) == 52


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    assert refusal(tmp_path).message == f"{tmp_path}: is a folder, not a recipe"
    os.mkfifo(tmp_path / "fifo.toml")
    assert refusal(tmp_path / "fifo.toml").message == f"{tmp_path}/fifo.toml: is not a regular file"
    assert refusal("/dev/zero").message == "/dev/zero: is not a regular file"
    (tmp_path / "link.toml").symlink_to("link.toml")
    assert refusal(tmp_path / "link.toml").message.startswith(f"{tmp_path}/link.toml: cannot be read: ")
    (tmp_path / "gone.toml").symlink_to("nowhere")
    assert refusal(tmp_path / "gone.toml").message == f"{tmp_path}/gone.toml: cannot be read: No such file or directory"


def test_a_file_without_permission(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(MINIMAL)
    refuse = mock.Mock(side_effect=PermissionError(errno.EACCES, os.strerror(errno.EACCES)))  # root reads everything
    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(path).message == f"{path}: cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("reference", "shown", "hint"),
    [
        ("cifar11", "cifar11", 'did you mean "cifar10"? `cfamc recipes list` shows what ships'),
        (
            "recipes/cifar1000.toml",
            "recipes/cifar1000.toml",
            'did you mean "cifar100"? `cfamc recipes list` shows what ships',
        ),
        (
            "elsewhere/cifar10.toml",
            "elsewhere/cifar10.toml",
            'did you mean "cifar10"? `cfamc recipes list` shows what ships',
        ),
        ("zzz", "zzz", "`cfamc recipes list` shows what ships"),
        ("", "", "`cfamc recipes list` shows what ships"),
        ("a\0b", r"a\x00b", "`cfamc recipes list` shows what ships"),
        ("\x1b[31m", r"\x1b[31m", "`cfamc recipes list` shows what ships"),
        ("q" * 5_000, "q" * 200 + "...", "`cfamc recipes list` shows what ships"),
    ],
)
def test_no_such_recipe(reference: str, shown: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(reference)
    assert error.message == f'no recipe "{shown}": neither a file nor the name of a shipped recipe'
    assert error.hint == hint


# Overrides


def test_overrides_reach_every_kind_of_place() -> None:
    recipe = file.load(
        "cifar10",
        overrides=[
            "name=mine",
            "crops.0.count=8",
            "crops.0.scale=[0.1, 0.5]",
            "attack.0.eps=4/255",
            "adversary.step_size = 0.02",
            "train.deterministic=true",
            'data.root="a=b"',
            "probe={head='knn', k=5}",
            "schedule.warmup=10",
        ],
        seed=3,
    )
    assert (recipe.name, recipe.seed, recipe.crops[0].count, recipe.crops[0].scale) == ("mine", 3, 8, (0.1, 0.5))
    assert recipe.attack[0].eps == "4/255"
    assert isinstance(recipe.adversary, FreeAdversary)
    assert recipe.adversary.step_size == "0.02"
    assert recipe.train.deterministic
    assert recipe.data.root == "a=b"
    assert recipe.probe.model_dump(exclude_unset=True) == {"head": "knn", "k": 5}
    assert recipe.schedule.model_dump() == {"name": "cosine", "warmup": 10, "end": 0}


def test_overrides_reach_tables_that_the_file_leaves_to_their_defaults(write: Any) -> None:
    overrides = ["attack.0.steps=50", "probe.epochs=3", "schedule.warmup=2", "model.width=8", "optimizer.lr=0.1"]
    recipe = file.load(str(write(MINIMAL)), overrides=overrides)
    assert recipe.attack[0].model_dump(exclude_unset=True) == {"name": "pgd", "steps": 50}
    assert recipe.probe.model_dump(exclude_unset=True) == {"head": "linear", "epochs": 3}
    assert (recipe.model.width, recipe.optimizer.lr) == (8, 0.1)
    assert file.load(str(write(MINIMAL))).attack[0].model_dump()["steps"] == 20  # the default is untouched


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.epochs"], ["--set train.epochs: write KEY=VALUE with a dotted key, such as --set train.epochs=5"]),
        (["=5"], ["--set =5: write KEY=VALUE with a dotted key, such as --set train.epochs=5"]),
        (["a..b=5"], ["--set a..b=5: write KEY=VALUE with a dotted key, such as --set train.epochs=5"]),
        (
            ["a." * 20 + "a=5"],
            [f"--set {'a.' * 20}a=5: write KEY=VALUE with a dotted key, such as --set train.epochs=5"],
        ),
        (["train.epochs=1", "train.epochs=2"], ["--set train.epochs: given twice"]),
        (["train.epochs=1", "train={}"], ["--set train: would undo --set train.epochs; give it first"]),
        (
            ["crops.count=8"],
            ['--set crops.count: crops is a list, so an index comes next (did you mean "crops.0.count"?)'],
        ),
        (["crops.1.count=8"], ["--set crops.1.count: crops has 1 entry, counted from 0"]),
        (
            ["attack.-1.eps=0"],
            ['--set attack.-1.eps: attack is a list, so an index comes next (did you mean "attack.0.-1.eps"?)'],
        ),
        (["attack.2.eps=0"], ["--set attack.2.eps: attack has 2 entries, counted from 0"]),
        (["train.epochs.x=1"], ["--set train.epochs.x: train.epochs is 10.0, not a table"]),
        (["name.x=1"], ['--set name.x: name is the text "cifar10-cf-amc-ssl", not a table']),
        (["trian.epochs=1"], ['unknown key "trian" (did you mean "train"?)']),
        (["epochs=1"], ['unknown key "epochs" (did you mean "train.epochs"?)']),
        (["count=1"], ['unknown key "count" (did you mean "crops.0.count"?)']),
        (["train.epoch=1"], ['unknown key "train.epoch" (did you mean "epochs"?)']),
        (["train.zzz=1"], ['unknown key "train.zzz"']),
        (["crops.0.cout=1"], ['unknown key "crops.0.cout" (did you mean "count"?)']),
        (["adversary.esp=8/255"], ['unknown key "adversary.esp" (did you mean "eps"?)']),
        (["attack.1.esp=8/255"], ['unknown key "attack.1.esp" (did you mean "eps"?)']),
        (["schema_version=1"], ['unknown key "schema_version" (did you mean "schema"?)']),
        (["\x1b[31m=1"], [r'unknown key "\x1b[31m"']),
        (["name=\x1b[31m", "model.width=0"], ["model.width: must be at least 1, not 0"]),
        (["x." * 3 + "a=[[[" + "[" * 10_000], ['unknown key "x"']),
    ],
)
def test_bad_overrides(overrides: list[str], expected: list[str]) -> None:
    assert problems(*overrides) == expected


def test_a_seed_given_twice() -> None:
    assert problems("seed=1", seed=2) == ["seed: given twice, by --seed and by --set"]


def test_another_kind_takes_what_belongs_to_the_old_one_out_of_its_table() -> None:
    """What both have stays as the file has it, the rest is the new kind's own; other tables stay as they are."""
    before = file.load("cifar10", overrides=["adversary.eps=4/255"])
    pgd = file.load("cifar10", overrides=["adversary.eps=4/255", "adversary.name=pgd"])
    assert pgd.adversary == PgdAdversary(name="pgd", eps="4/255", step_size="0.01", steps=5, views="all")
    assert pgd.model_copy(update={"adversary": before.adversary}) == before
    assert file.load("cifar10", overrides=["adversary.name=none"]).adversary == NoAdversary(name="none")
    adamw = file.load("cifar10", overrides=["optimizer.name=adamw", "optimizer.lr=0.001"])
    assert adamw.optimizer == AdamW(name="adamw", lr=0.001, weight_decay=1e-4)
    assert file.load("cifar10", overrides=["objective.name=emp-ssl"]) == file.load("cifar10")
    attacks = file.load("cifar10", overrides=["attack.1.name=autoattack"]).attack
    assert [(attack.name, attack.eps) for attack in attacks] == [("pgd", "4/255"), ("autoattack", "8/255")]
    assert file.load("cifar10-laptop-fast", overrides=["probe.head=knn"]).probe.head == "knn"
    phase = file.load("cifar10-laptop-fast", overrides=["phase.0.adversary.name=none"])
    assert [part.adversary.name for part in phase.parts()] == ["free", "none"]


def test_what_a_person_gives_of_another_kind_is_told() -> None:
    assert problems("schedule.name=official-cosine", "schedule.warmup=3") == [
        'unknown key "schedule.warmup": name = "official-cosine" has no warmup'
    ]
    assert problems("adversary.name=none", "adversary.replays=2") == [
        'unknown key "adversary.replays": name = "none" has no replays'
    ]
    assert problems("adversary.steps=2") == ['unknown key "adversary.steps": name = "free" has no steps']
    hint = "remove such keys, or replace the whole table: --set 'adversary={ ... }'"
    assert refusal("cifar10", "adversary.steps=2").hint == hint


# Errors of one table


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            'train.epochs="0.3"',
            'train.epochs: must be a number, not the text "0.3" (did you mean 0.3, without quotes?)',
        ),
        ("train.epochs=.3", 'train.epochs: must be a number, not the text ".3" (did you mean 0.3?)'),
        ("train.epochs=-3.", 'train.epochs: must be a number, not the text "-3." (did you mean -3.0?)'),
        ("train.epochs=soon", 'train.epochs: must be a number, not the text "soon"'),
        ("train.epochs=true", "train.epochs: must be a number, not true"),
        ("train.epochs=inf", "train.epochs: must be a finite number, not inf"),
        ("train.epochs=nan", "train.epochs: must be a finite number, not nan"),
        ("train.epochs=0", "train.epochs: must be above 0, not 0"),
        ("train.epochs=2020-01-01", "train.epochs: must be a number, not a date or time"),
        ("train.epochs=0x1" + "0" * 5_000, "train.epochs: must be a number, not a number of more than 38 digits"),
        ("train.batch_size=true", "train.batch_size: must be a whole number, not true"),
        ("train.batch_size=1.0", "train.batch_size: must be a whole number, not 1.0"),
        ("train.batch_size=1", "train.batch_size: must be at least 2, not 1"),
        ("train.keep=10001", "train.keep: must be at most 10_000, not 10001"),
        ("train.compile=1", 'train.compile: must be "auto", true or false, not 1'),
        (
            "train.compile=True",
            'train.compile: must be "auto", true or false, not the text "True" (did you mean true?)',
        ),
        ("train.precision=half", 'train.precision: must be "auto", "float32" or "bfloat16", not the text "half"'),
        ("train=3", "train: must be a table, not 3"),
        ("train=[]", "train: must be a table, not a list"),
        ("data=cifar10", 'data: must be a table, not the text "cifar10"'),
        ("data.root=", "data.root: must not be empty"),
        (r'data.root="a\u0000"', "data.root: a path cannot hold a NUL character"),
        (
            "data.dataset=cifar",
            'data.dataset: must be "fashion-mini", "cifar10", "cifar100", "fashion-mnist", "svhn", '
            '"stl10" or "folder", not the text "cifar" (did you mean "cifar10"?)',
        ),
        ("data.dataset=folder", 'data.root: missing; dataset "folder" needs the folder that holds train/ and test/'),
        ("name=7", "name: must be text, not 7 (in quotes it is text; from a shell: 'name=\"7\"')"),
        ("name=", "name: must not be empty"),
        ("name=" + "n" * 201, "name: must have at most 200 characters, not 201"),
        ("name=\udcff", r'name: must be text in UTF-8, not the text "\udcff"'),
        ("seed=-1", "seed: must be at least 0, not -1"),
        ("seed=4294967296", "seed: must be below 4_294_967_296, not 4294967296"),
        ("schema=2", "schema: must be 1, the version that this cfamc reads, not 2"),
        ("schema=one", 'schema: must be 1, the version that this cfamc reads, not the text "one"'),
        (
            f"schema={10**40}",
            "schema: must be 1, the version that this cfamc reads, not a number of more than 38 digits",
        ),
        ("optimizer.name=sgd", 'optimizer.name: must be "lars" or "adamw", not the text "sgd"'),
        ("optimizer.name=7", 'optimizer.name: must be "lars" or "adamw", not 7'),
        ("optimizer.name=[]", 'optimizer.name: must be "lars" or "adamw", not a list'),
        ("optimizer=7", "optimizer: must be a table, not 7"),
        ("crops=[]", "crops: needs at least one table: [[crops]]"),
        ("crops=3", "crops: must be a list, not 3"),
        ("crops=[3]", "crops.0: must be a table, not 3"),
        ("crops={count=3}", "crops: must be a list, not a table (did you mean [[crops]], with double brackets?)"),
        ("crops=[{size=32}]", "crops.0.count: missing"),
        (f"crops=[{'{count=2},' * 17}]", "crops: has 17 tables, more than 16"),
        ("crops.0.count=0", "crops.0.count: must be at least 1, not 0"),
        ("crops.0.scale=0.3", "crops.0.scale: must be a list, not 0.3"),
        ("crops.0.scale=[0.3]", "crops.0.scale: must be a list of 2 numbers, not of 1"),
        ("crops.0.scale=[]", "crops.0.scale: must be a list of 2 numbers, not of 0"),
        ("crops.0.scale=[0.1,0.2,0.3]", "crops.0.scale: must be a list of 2 numbers, not of 3"),
        ("crops.0.scale=[0.5,0.2]", "crops.0.scale: the lower end 0.5 is above the upper end 0.2"),
        ("crops.0.scale=[0.5,1.2]", "crops.0.scale: 1.2 is larger than the image; shares of its area lie in (0, 1]"),
        ("crops.0.scale=[0,1]", "crops.0.scale.0: must be above 0, not 0"),
        (
            'crops.0.scale=["0.1",1]',
            'crops.0.scale.0: must be a number, not the text "0.1" (did you mean 0.1, without quotes?)',
        ),
        ("augment.flip=2", "augment.flip: must be at most 1, not 2"),
        ("augment.jitter=[0,0,0]", "augment.jitter: must be a list of 4 numbers, not of 3"),
        ("augment.jitter=[0,0,0,0.6]", "augment.jitter: hue, the fourth number, lies in [0, 0.5]"),
        (
            "augment.jitter=[2,0,0,0]",
            "augment.jitter: brightness, contrast and saturation, the first three numbers, lie in [0, 1]",
        ),
        ("augment.jitter_p=0", "augment.jitter: has no effect: jitter_p is 0"),
        ("objective.tcr_weight=0", "objective.tcr_eps: has no effect: tcr_weight is 0"),
        (
            "objective={name='emp-ssl', tcr_weight=0, invariance_weight=0}",
            "objective.invariance_weight: must not be 0 where tcr_weight is 0: nothing would be learnt",
        ),
        (
            "objective.name=simclrr",
            'objective.name: must be "emp-ssl", "simclr", "supcon" or "clusters", not the text "simclrr" '
            '(did you mean "simclr"?)',
        ),
        ("objective={}", 'objective.name: missing; must be "emp-ssl", "simclr", "supcon" or "clusters"'),
        ("objective=[]", "objective: must be a table, not a list"),
        ("adversary={name=3}", 'adversary.name: must be "none", "pgd" or "free", not 3'),
        ("adversary=pgd", 'adversary: must be a table, not the text "pgd"'),
        ("adversary.eps=8", "adversary.eps: 8 is larger than 1: did you mean 8/255?"),
        ("adversary.eps=8/0", "adversary.eps: '8/0' divides by zero"),
        ("adversary.eps=-1/255", "adversary.eps: '-1/255' is not a number such as 8/255 or 0.03 between 0 and 1"),
        ("adversary.eps=1e400", "adversary.eps: 'inf' is not a number such as 8/255 or 0.03 between 0 and 1"),
        ("adversary.eps=nan", "adversary.eps: 'nan' is not a number such as 8/255 or 0.03 between 0 and 1"),
        (
            "adversary.step_size=8//255",
            "adversary.step_size: '8//255' is not a number such as 8/255 or 0.03 between 0 and 1",
        ),
        ("adversary.eps=0x1" + "0" * 5_000, "adversary.eps: is larger than 1: images live in [0, 1]"),
        ("adversary.replays=0", "adversary.replays: must be at least 1, not 0"),
        ("adversary={name='pgd', steps=0}", "adversary.steps: must be at least 1, not 0"),
        ("optimizer.momentum=0", "optimizer.nesterov: has no effect: momentum is 0 (set nesterov = false)"),
        ("optimizer.momentum=1", "optimizer.momentum: must be below 1, not 1"),
        ("optimizer.lr=-1", "optimizer.lr: must be at least 0, not -1"),
        (
            "probe={head='linear', protocol='converged', lr=0.1}",
            'probe.lr: has no effect: protocol "converged" trains until the loss stands still',
        ),
        (
            "probe={head='finetune', objective='clean', eps='8/255'}",
            'probe.eps: has no effect: objective "clean" attacks nothing',
        ),
        (
            "probe={head='finetune', trades_beta=3}",
            'probe.trades_beta: has no effect: it belongs to objective "trades"',
        ),
        (
            "probe={head='svm'}",
            'probe.head: must be "linear", "robust-linear", "crops", "knn" or "finetune", not the text "svm"',
        ),
        ("probe={k=3}", 'probe.head: missing; must be "linear", "robust-linear", "crops", "knn" or "finetune"'),
        (
            "attack=[{}]",
            'attack.0.name: missing; must be "pgd", "fgsm", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "square", "embedding" or "autoattack"',
        ),
        (
            "attack=[{name='pdg'}]",
            'attack.0.name: must be "pgd", "fgsm", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "square", "embedding" or "autoattack", not the text "pdg" (did you mean "pgd"?)',
        ),
        ("attack={name='pgd'}", "attack: must be a list, not a table (did you mean [[attack]], with double brackets?)"),
        ("attack.1.norm=l1", 'attack.1.norm: must be "linf" or "l2", not the text "l1"'),
    ],
)
def test_one_problem(override: str, expected: str) -> None:
    assert problems(override) == [expected]


def test_a_kind_of_problem_that_only_a_newer_pydantic_knows() -> None:
    error = {"type": "too_blue", "loc": ("train", "epochs"), "input": 3, "msg": "must be {redder}", "ctx": {"hue": 4}}
    assert wording.word_problems([error]) == [wording.Problem("train.epochs", "must be {redder}")]


def test_several_idle_settings_are_told_apart() -> None:
    assert problems("probe={head='finetune', objective='clean', eps=0, steps=3}") == [
        'probe.eps: has no effect: objective "clean" attacks nothing',
        'probe.steps: has no effect: objective "clean" attacks nothing',
    ]


def test_missing_tables(write: Any) -> None:
    assert problems(reference=write("")) == [
        "schema: missing; write schema = 1",
        "name: missing",
        "data: missing; add a table [data] with a dataset",
        "crops: missing; add a table [[crops]] with a count",
        'objective: missing; add a table [objective] with a name: must be "emp-ssl", "simclr", "supcon" or "clusters"',
        'adversary: missing; add a table [adversary] with a name: must be "none", "pgd" or "free"',
    ]


# Problems across tables


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["crops.0.count=1"],
            "crops.0.count: emp-ssl draws the crops of an image together, and this is one "
            "(set crops.0.count = 2 or more)",
        ),
        (
            ["crops.0.count=1", "objective={name='simclr'}"],
            "crops.0.count: simclr compares two views of an image, and this is one (set crops.0.count = 2)",
        ),
        (
            ["crops.0.count=1", "objective={name='supcon'}"],
            "crops.0.count: supcon compares two views of an image, and this is one (set crops.0.count = 2)",
        ),
        (
            ["objective={name='clusters'}"],
            "objective.name: clusters are those of what an encoder has learnt: put them into a [[phase]], or set "
            "train.init",
        ),
        (
            ["objective={name='clusters', count=1025}", "train.init=run"],
            "objective.count: 1025 clusters do not fit into 1024 dimensions of an embedding",
        ),
        (
            ["objective={name='clusters', count=101}", "train.init=run", "data.limit=100"],
            "objective.count: 101 clusters are more than the 100 training images",
        ),
        (
            ["adversary.views=second"],
            'adversary.views: "second" perturbs the second group of crops, and there is one group',
        ),
        (["adversary={name='pgd', eps=0}"], 'adversary.eps: pgd has no effect with eps 0 (set name = "none")'),
        (
            ["adversary={name='pgd', step_size='0'}"],
            "adversary.step_size: pgd has no effect with a step of 0 from zero",
        ),
        (
            ["adversary.replays=1", "schedule.name=official-cosine"],
            'schedule.name: "official-cosine" differs from "cosine" only in a free adversary of 2 or more replays',
        ),
        (["data.limit=60000"], "data.limit: cifar10 has 50000 training images, not 60000"),
        (
            ["data.holdout=5000", "data.limit=45001"],
            "data.limit: cifar10 has 45000 training images beside those held out, not 45001",
        ),
        (["data.holdout=50000"], "data.holdout: cifar10 has 50000 training images, and 50000 held out leave none"),
        (["data.holdout=9"], "data.holdout: cifar10 has 10 classes, so 9 images cannot be of all of them"),
        (["data.holdout=49950"], "train.batch_size: 100 is more than the 50 training images"),
        (["train.batch_size=60000"], "train.batch_size: 60000 is more than the 50000 training images"),
        (["data.limit=64"], "train.batch_size: 100 is more than the 64 training images"),
        (["data={dataset='folder', root='x', limit=64}"], "train.batch_size: 100 is more than the 64 training images"),
        (["schedule.warmup=15000"], "schedule.warmup: 15000 updates of warm-up leave nothing of a run of 15000"),
    ],
)
def test_tables_that_do_not_fit(overrides: list[str], expected: str) -> None:
    assert problems(*overrides) == [expected]


@pytest.mark.parametrize(
    "overrides",
    [
        ["adversary.eps=0"],  # replays alone: the control of free adversarial training
        ["adversary.eps=0.0314"],
        ["schedule.name=official-cosine"],
        ["schedule.warmup=14999"],
        ["data.limit=100"],
        ["attack.0.eps=0"],
        ["attack=[]"],
        ["crops=[{count=1},{count=1,size=24}]", "adversary.views=second"],
        ["crops=[{count=2}]", "objective={name='simclr'}"],
        ["attack.0.restarts=5", "attack.0.start=random"],
        ["objective={name='clusters', count=100}", "train.init=run", "data.limit=100", "crops.0.count=1"],
    ],
)
def test_what_is_allowed(overrides: list[str]) -> None:
    file.load("cifar10", overrides=overrides)


PHASE = "phase=[{epochs=0.5}, {epochs=1, adversary={name='pgd'}, crops=[{count=1}, {count=1}]}]"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["phase=[{}]"], "phase.0.epochs: missing"),
        (["phase=[{epochs=0}]"], "phase.0.epochs: must be above 0, not 0"),
        (["phase={epochs=1}"], "phase: must be a list, not a table (did you mean [[phase]], with double brackets?)"),
        (["phase.0.epochs=1"], "--set phase.0.epochs: phase has 0 entries, counted from 0"),
        ([PHASE, "phase.2.epochs=1"], "--set phase.2.epochs: phase has 2 entries, counted from 0"),
        ([PHASE, "phase.0.batchsize=1"], 'unknown key "phase.0.batchsize" (did you mean "batch_size"?)'),
        ([PHASE, "phase.0.model.width=8"], 'unknown key "phase.0.model"'),
        ([PHASE, "phase.1.adversary.esp=0"], 'unknown key "phase.1.adversary.esp" (did you mean "eps"?)'),
        (
            [PHASE, "phase.1.adversary.replays=2"],
            'unknown key "phase.1.adversary.replays": name = "pgd" has no replays',
        ),
        ([PHASE, "phase.1.adversary.eps=8"], "phase.1.adversary.eps: 8 is larger than 1: did you mean 8/255?"),
        ([PHASE, "phase.1.crops.0.count=0"], "phase.1.crops.0.count: must be at least 1, not 0"),
        ([PHASE, "phase.1.crops=[]"], "phase.1.crops: needs at least one table: [[phase.crops]]"),
        (
            [PHASE, "phase.1.crops={count=2}"],
            "phase.1.crops: must be a list, not a table (did you mean [[phase.crops]], with double brackets?)",
        ),
        (
            [PHASE, "phase.0.objective={temperature=1}"],
            'phase.0.objective.name: missing; must be "emp-ssl", "simclr", "supcon" or "clusters"',
        ),
        (
            [PHASE, "phase.0.schedule.name=cosin"],
            'phase.0.schedule.name: must be "cosine" or "official-cosine", not the text "cosin" (did you mean "cosine"?)',
        ),
        ([PHASE, "phase.0.augment={jitter_p=0}"], None),
        ([PHASE, "phase.0.objective={name='clusters'}"], None),
        ([PHASE, "phase.0.objective={name='clusters', count=1024}"], None),  # as many as there are dimensions
        (
            [PHASE, "phase.0.objective={name='clusters', count=1025}"],
            "phase.0.objective.count: 1025 clusters do not fit into 1024 dimensions of an embedding",
        ),
        (
            [PHASE, "phase.0.objective={name='clusters', count=200}", "data.limit=150"],
            "phase.0.objective.count: 200 clusters are more than the 150 training images",
        ),
        ([PHASE, "phase.0.augment.jitter_p=0"], "phase.0.augment.jitter: has no effect: jitter_p is 0"),
        # across tables: told once, where the phase can be changed
        (
            [PHASE, "phase.1.crops=[{count=1}]"],
            "phase.1.crops.0.count: emp-ssl draws the crops of an image together, and this is one "
            "(set crops.0.count = 2 or more)",
        ),
        (
            [PHASE, "phase.0.adversary.views=second"],
            'phase.0.adversary.views: "second" perturbs the second group of crops, and there is one group',
        ),
        (
            ["schedule.name=official-cosine", PHASE],
            'phase.1.schedule.name: "official-cosine" differs from "cosine" only in a free adversary of 2 or more replays',
        ),
        (
            ["adversary.views=second", PHASE],
            'adversary.views: "second" perturbs the second group of crops, and there is one group',
        ),
        (["crops=[{count=1}, {count=3}]", "adversary.views=second", PHASE], None),
        ([PHASE, "phase.0.batch_size=60000"], "phase.0.batch_size: 60000 is more than the 50000 training images"),
        ([PHASE, "train.batch_size=60000"], "train.batch_size: 60000 is more than the 50000 training images"),
        (
            [PHASE, "phase.1.schedule.warmup=500"],
            "phase.1.schedule.warmup: 500 updates of warm-up leave nothing of a phase of 500",
        ),
        (
            ["adversary.views=third", PHASE, "phase.1.adversary.views=second"],
            'adversary.views: must be "all" or "second", not the text "third"',
        ),
    ],
)
def test_problems_of_a_phase(overrides: list[str], expected: str | None) -> None:
    if expected is None:
        file.load("cifar10", overrides=overrides)
    else:
        assert problems(*overrides) == [expected]


def test_a_setting_of_a_phase_is_changed_beside_those_of_the_recipe(write: Any) -> None:
    overrides = [
        "phase=[{epochs=1}]",
        "adversary.eps=4/255",
        "phase.0.adversary.step_size=0.02",
        "phase.0.crops.0.size=24",
    ]
    overrides += ["phase.0.augment.flip=0", "phase.0.batch_size=50"]
    recipe = file.load("cifar10", overrides=overrides)
    (phase,) = recipe.phase
    assert phase.batch_size == 50
    assert phase.adversary == recipe.adversary.model_copy(update={"step_size": "0.02"})
    assert phase.crops == (recipe.crops[0].model_copy(update={"size": 24}),)
    assert phase.augment == recipe.augment.model_copy(update={"flip": 0})
    assert (recipe.crops[0].size, recipe.augment.flip) == (32, 0.5)
    assert phase.optimizer is None
    overrides = ["phase=[{epochs=1}]", "phase.0.optimizer.lr=0.1", "phase.0.schedule.warmup=2"]
    (phase,) = file.load(str(write(MINIMAL)), overrides=overrides).phase
    assert phase.optimizer == Lars(lr=0.1)
    assert phase.schedule == Cosine(name="cosine", warmup=2)


def test_an_optimizer_without_a_name_is_lars_and_a_phase_does_not_turn_to_it_unasked() -> None:
    shipped = file.load("cifar10")
    nameless = file.load("cifar10", overrides=["optimizer={lr=0.3}"])
    assert (nameless.optimizer, nameless.digest()) == (shipped.optimizer, shipped.digest())
    assert problems("optimizer.name=adamw", "phase=[{epochs=1, optimizer={lr=0.1}}]") == [
        'phase.0.optimizer.name: missing; it would be "lars", where the recipe\'s is "adamw"'
    ]
    named = "phase=[{epochs=1, optimizer={name='lars', lr=0.1}}]"
    _, part = file.load("cifar10", overrides=["optimizer.name=adamw", named]).parts()
    assert part.optimizer == Lars(lr=0.1)
    (phase,) = file.load("cifar10", overrides=["phase=[{epochs=1, optimizer={lr=0.1}}]"]).phase
    assert phase.optimizer == Lars(lr=0.1)


def test_a_phase_is_held_to_its_own_tables_also_beside_broken_ones_of_the_recipe() -> None:
    own = "phase=[{epochs=1, crops=[{count=2}], adversary={name='free', views='second'}}]"
    assert problems("crops.0.count=0", own) == [
        "crops.0.count: must be at least 1, not 0",
        'phase.0.adversary.views: "second" perturbs the second group of crops, and there is one group',
    ]


def test_all_problems_come_in_one_message_also_across_tables_beside_broken_ones() -> None:
    assert problems("crops.0.count=1", "adversary.views=second", "train.batch_size=60000", "augment.flip=2", "x=1") == [
        "augment.flip: must be at most 1, not 2",
        'unknown key "x"',
        "crops.0.count: emp-ssl draws the crops of an image together, and this is one (set crops.0.count = 2 or more)",
        'adversary.views: "second" perturbs the second group of crops, and there is one group',
        "train.batch_size: 60000 is more than the 50000 training images",
    ]


def test_nothing_is_said_across_tables_about_a_broken_one() -> None:
    assert problems("crops.0.count=0", "adversary.views=second") == ["crops.0.count: must be at least 1, not 0"]
    assert problems("data.dataset=nothing", "train.batch_size=60000")[1:] == []


def test_message_and_hint_whole(write: Any) -> None:
    path = write(MINIMAL.replace("count = 4", "count = 1\nsise = 3") + "eps = 8\n")
    error = refusal(path)
    assert error.message == (
        f"{path}: 2 problems\n"
        'unknown key "crops.0.sise" (did you mean "size"?)\n'
        "adversary.eps: 8 is larger than 1: did you mean 8/255?"
    )
    assert error.hint == PRINTS_ONE


# Generated recipes


FIELDS = [*wording._all_paths(), *Recipe.model_fields, "crops.0", "attack.0", "crops.1.size", "schema", "a.b.c"]
SCALARS = st.one_of(
    st.integers(-2, 300),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(max_size=20),
    st.sampled_from(
        ["8/255", "0", "none", "pgd", "free", "second", "simclr", "folder", "knn", "official-cosine", "clean"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "head", "eps", "count", "x"]), inner)
    ),
    max_leaves=6,
)


def _as_toml(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{key} = {_as_toml(inner)}" for key, inner in value.items()) + "}"
        case list():
            return f"[{', '.join(map(_as_toml, value))}]"
        case _:
            return repr(value) if isinstance(value, float) else file.toml(value)  # JSON has no inf


def _loaded(base: str, overrides: Sequence[str]) -> Recipe | CfamcError:
    try:
        return file.load(base, overrides=overrides)
    except CfamcError as error:
        return error


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    base=st.sampled_from(sorted(file.shipped())),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5),
)
def test_generated_recipes_load_or_name_their_problems(base: str, changes: dict[str, Any]) -> None:
    loaded = _loaded(base, [f"{path}={_as_toml(value)}" for path, value in changes.items()])
    if isinstance(loaded, Recipe):
        assert loaded.model.timm or plan(loaded).batches >= 1  # what timm makes has to be measured
        assert file.validate(file.parse(file.to_toml(loaded), label=""), label="") == loaded
        return
    assert loaded.exit_code is ExitCode.INVALID
    listed: Any = loaded.details["problems"]
    assert listed
    assert all(problem["path"] and problem["message"] for problem in listed)
    assert "pydantic" not in loaded.message
    assert all(line.isprintable() for line in loaded.message.split("\n"))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(raw=st.dictionaries(st.sampled_from([*Recipe.model_fields, "schema", "x"]), VALUES))
def test_generated_tables_load_or_name_their_problems(raw: dict[str, Any]) -> None:
    with pytest.raises(CfamcError) as refused:  # never whole
        file.validate(raw, label="generated")
    listed: Any = refused.value.details["problems"]
    assert all(problem["path"] for problem in listed)


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(FIELDS), value=st.text(max_size=20))
def test_any_text_is_a_value_or_a_problem(path: str, value: str) -> None:
    loaded = _loaded("cifar10", [f"{path}={value}"])
    assert isinstance(loaded, Recipe) or loaded.exit_code is ExitCode.INVALID


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_is_an_override_or_a_problem(text: str) -> None:
    loaded = _loaded("cifar10", [text])
    assert isinstance(loaded, Recipe) or loaded.exit_code is ExitCode.INVALID


# Writing and comparing


NASTY = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(
    name=NASTY,
    root=NASTY.filter(lambda text: "\0" not in text),
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(0, 1e300),
    scale=st.tuples(st.floats(1e-300, 0.5), st.floats(0.5, 1)),
    weights=st.floats(0, 1),
    eps=st.integers(0, 255),
)
def test_what_is_written_loads_as_an_equal_recipe(
    name: str, root: str, seed: int, lr: float, scale: Sequence[float], weights: float, eps: int
) -> None:
    recipe = tiny_recipe(
        name=name,
        seed=seed,
        data={"root": root},
        crops=[{"count": 2, "scale": scale}, {"count": 1, "size": 96}],
        augment={"jitter_p": 0.0},
        objective={"tcr_weight": weights},
        adversary={"eps": f"{eps}/255"},
        optimizer={"lr": lr},
        attack=[{"name": "autoattack"}, {"name": "pgd", "eps": 1e-30}],
    )
    written = file.to_toml(recipe)
    again = file.validate(file.parse(written, label="written"), label="written")
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert file.to_toml(again) == written
    assert file.differing_keys(recipe, again) == []


def test_phases_are_written_and_read_back() -> None:
    recipe = file.load("cifar10", overrides=[PHASE, "phase.0.augment.flip=0", "phase.1.crops.1.scale=[0.5, 1]"])
    written = file.to_toml(recipe)
    order = [line for line in written.splitlines() if line.startswith("[")]
    assert order[order.index("[train]") :][:7] == [
        *("[train]", "[[phase]]", "[phase.augment]", "[[phase]]", "[[phase.crops]]", "[[phase.crops]]"),
        "[phase.adversary]",
    ]
    again = file.validate(file.parse(written, label=""), label="")
    assert (again, again.digest()) == (recipe, recipe.digest())
    other = file.load("cifar10", overrides=["phase=[{epochs=0.5, augment={flip=0.25}}]"])
    differing = file.differing_keys(recipe, other)
    assert [key for key in differing if not key.startswith("phase.1.")] == ["phase.0.augment.flip"]
    assert {"phase.1.epochs", "phase.1.crops.0.count", "phase.1.adversary.steps"} < set(differing)
    assert file.differing_keys(recipe, again) == []


def test_every_probe_can_be_written() -> None:
    for probe in (
        "head='linear', protocol='converged'",
        "head='robust-linear'",
        "head='crops'",
        "head='knn'",
        "head='finetune', objective='clean'",
        "head='finetune', objective='trades'",
    ):
        recipe = file.load("cifar10", overrides=[f"probe={{{probe}}}", "attack=[]"])
        assert file.validate(file.parse(file.to_toml(recipe), label=""), label="") == recipe


def test_differing_keys() -> None:
    recipe = file.load("cifar10")

    def differ(*overrides: str, seed: int | None = None) -> list[str]:
        return file.differing_keys(recipe, file.load("cifar10", overrides=overrides, seed=seed))

    assert differ() == []
    assert differ("name=other", "data.root=/elsewhere", "train.keep=5", "train.checkpoint_every=7") == []
    assert differ("train.compile=false", "train.memory=recompute") == []
    assert differ("train.compile=true", seed=1) == ["seed", "train.compile"]
    assert differ("train.log_every=3", "train.evaluate_every=1") == ["train.evaluate_every"]
    assert differ("crops.0.count=8", "crops.0.scale=[0.1, 1]") == ["crops.0.count", "crops.0.scale"]
    assert differ("crops=[{count=16},{count=2}]") == [f"crops.1.{key}" for key in ("count", "ratio", "scale", "size")]
    assert differ("attack=[]")[:2] == ["attack", "attack.0.eps"]
    assert differ("adversary={name='none'}") == [
        f"adversary.{key}" for key in ("eps", "name", "replays", "start", "step_size", "views")
    ]
