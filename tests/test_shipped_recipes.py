"""Every shipped recipe loads, plans and says where it comes from; list, show and copy."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cfamc_cli import recipe_file
from cfamc_cli.commands import recipes
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.plan import plan
from cfamc_cli.recipe import FreeAdversary, PgdAdversary

FOLDER = Path(__file__).parent.parent / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))

# objective, adversary, its views, groups of (count, scale, ratio), embedding dimension, batch, epochs
CROP, PATCH = ((0.08, 1.0), (0.75, 1.3333333333333333)), ((0.25, 0.25), (1.0, 1.0))
SIMCLR_PATCH = ((0.75, 0.75), (1.0, 1.0))
SYSTEMS = {
    "cifar10": ("emp-ssl", "free", "all", [(16, *CROP)], 1024, 100, 10),
    "cifar100": ("emp-ssl", "free", "all", [(16, *CROP)], 1024, 100, 10),
    "cifar10-emp-ssl-crop-pgd": ("emp-ssl", "pgd", "all", [(16, *CROP)], 1024, 128, 30),
    "cifar10-emp-ssl-patch-pgd": ("emp-ssl", "pgd", "all", [(16, *PATCH)], 1024, 128, 30),
    "cifar10-emp-ssl-patch-free": ("emp-ssl", "free", "all", [(16, *PATCH)], 1024, 100, 10),
    "cifar10-emp-ssl-clean": ("emp-ssl", "none", "", [(64, *PATCH)], 1024, 128, 30),
    "cifar10-simclr-crop-pgd": ("simclr", "pgd", "second", [(1, *CROP), (1, *CROP)], 128, 512, 500),
    "cifar10-simclr-patch-pgd": ("simclr", "pgd", "second", [(1, *SIMCLR_PATCH), (1, *SIMCLR_PATCH)], 128, 512, 500),
    "cifar10-simclr-crop-free": ("simclr", "free", "second", [(1, *CROP), (1, *CROP)], 128, 512, 167),
    "cifar10-simclr-clean": ("simclr", "none", "", [(1, *CROP), (1, *CROP)], 128, 512, 500),
}


def test_all_are_there() -> None:
    assert list(recipe_file.shipped()) == NAMES
    assert set(NAMES) == {*SYSTEMS, "quickstart", "imagenet100", "folder", "cifar10-laptop"}


@pytest.mark.parametrize("name", NAMES)
def test_loads_plans_and_names_its_source(name: str) -> None:
    recipe = recipe_file.load(name)
    assert plan(recipe).batches > 0
    assert recipe_file.load(str(FOLDER / f"{name}.toml")) == recipe
    header = (FOLDER / f"{name}.toml").read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in header)
    assert "arXiv:" in "".join(header)
    assert not {"checkpoint_every", "keep"} & tomllib.loads((FOLDER / f"{name}.toml").read_text())["train"].keys()


def test_names_are_unlike_each_other() -> None:
    assert len({recipe_file.load(name).name for name in NAMES}) == len(NAMES)
    assert len({recipe_file.load(name).digest() for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_of_the_published_table(name: str) -> None:
    objective, adversary, views, groups, embedding, batch, epochs = SYSTEMS[name]
    recipe = recipe_file.load(name)
    assert (recipe.objective.name, recipe.adversary.name) == (objective, adversary)
    assert [(group.count, group.scale, group.ratio) for group in recipe.crops] == groups
    assert {group.size for group in recipe.crops} == {32}
    assert recipe.model.embedding_dim == embedding
    assert (recipe.train.batch_size, recipe.train.epochs) == (batch, epochs)
    assert (recipe.model.backbone, recipe.model.width, recipe.model.hidden_dim) == ("resnet18", 64, 4096)
    match recipe.adversary:
        case PgdAdversary(eps="8/255", step_size="0.01", steps=5, start="zero"):
            assert recipe.adversary.views == views
        case FreeAdversary(eps="8/255", step_size="0.01", replays=3, start="zero"):
            assert recipe.adversary.views == views
        case _:
            assert adversary == "none"
    assert recipe.optimizer.model_dump() == {
        "name": "lars", "lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4,
        "trust_coefficient": 0.005, "clip": True,
    }  # fmt: skip
    assert recipe.schedule.model_dump() == {"name": "cosine", "warmup": 0}
    simclr = objective == "simclr"
    assert recipe.augment.jitter == (0.4, 0.4, 0.4, 0.1 if simclr else 0.2)
    assert (recipe.augment.blur_p, recipe.augment.solarize_p) == ((0, 0) if simclr else (0.1, 0.1))


def test_laptop_yardstick_and_its_folder_of_images() -> None:
    recipe = recipe_file.load("cifar10-laptop", overrides=["data.dataset=folder", "data.root=/data/cifar10"])
    assert (recipe.model.width, recipe.model.hidden_dim, recipe.model.embedding_dim) == (16, 1024, 256)
    assert (recipe.views, recipe.replays, recipe.train.batch_size, recipe.train.epochs) == (4, 3, 100, 1)


def test_quickstart_needs_no_download() -> None:
    recipe = recipe_file.load("quickstart")
    assert recipe.data.dataset == "fashion-mini"
    assert recipe.train.evaluate_every == 1


def test_found_outside_a_checkout(tmp_path: Path) -> None:
    code = "from cfamc_cli.recipe_file import load; print(load('recipes/cifar10.toml') == load('cifar10'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_found_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "cfamc_cli"
    (package / "recipes").mkdir(parents=True)
    (tmp_path / "site-packages" / "recipes").mkdir()
    (tmp_path / "site-packages" / "recipes" / "somebody-elses.toml").touch()
    (package / "recipes" / "mine.toml").write_text((FOLDER / "cifar10.toml").read_text())
    monkeypatch.setattr(recipe_file, "__file__", str(package / "recipe_file.py"))
    assert list(recipe_file.shipped()) == ["mine"]
    (package / "recipes" / "mine.toml").unlink()
    (package / "recipes").rmdir()
    assert not recipe_file.shipped()  # a neighbour's folder of recipes is not ours


def test_a_folder_named_like_a_recipe_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert recipe_file.load("cifar10").name == "cifar10-cf-amc-ssl"


def test_a_file_of_ones_own_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes.copy("cifar100", tmp_path / "cifar10.toml")
    assert recipe_file.load("cifar10.toml").name == "cifar100-cf-amc-ssl"
    assert recipe_file.load("recipes/cifar10.toml").name == "cifar10-cf-amc-ssl"


def test_list_and_show() -> None:
    listed = recipes.list_recipes()
    assert listed[0].name == "quickstart"
    assert sorted(entry.name for entry in listed) == NAMES
    assert all(20 < len(entry.title) < 118 and not entry.title.startswith("#") for entry in listed)
    assert recipes.show("cifar10") == (FOLDER / "cifar10.toml").read_text()


def test_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.copy("cifar10") == Path("cifar10.toml")
    assert Path("cifar10.toml").read_text() == (FOLDER / "cifar10.toml").read_text()
    with pytest.raises(CfamcError) as refused:
        recipes.copy("cifar10")
    assert refused.value.message == "cifar10.toml exists"
    assert refused.value.hint == "--force replaces it; or name another file"
    assert refused.value.exit_code is ExitCode.INVALID
    assert recipes.copy("folder", Path("cifar10.toml"), force=True).read_text() == recipes.show("folder")
    (tmp_path / "mine").mkdir()
    assert recipes.copy("cifar10", tmp_path / "mine") == tmp_path / "mine" / "cifar10.toml"
    Path("dangling.toml").symlink_to("nowhere")
    with pytest.raises(CfamcError, match=r"dangling\.toml exists"):
        recipes.copy("cifar10", Path("dangling.toml"))
    with pytest.raises(CfamcError, match="no such file or directory"):
        recipes.copy("cifar10", tmp_path / "missing" / "a.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar10.toml", "dangling.toml", "mine"]
