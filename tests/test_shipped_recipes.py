"""Every shipped recipe loads, plans and says where it comes from; list, show and copy."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cfamc_cli.commands import recipes
from cfamc_cli.engine.costs import plan_of
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe import file
from cfamc_cli.recipe.schema import FreeAdversary, PgdAdversary

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


YARDSTICKS = ("cifar10-fast", "cifar10-laptop", "cifar10-laptop-fast", "cifar10-laptop-strong")


def test_all_are_there() -> None:
    assert list(file.shipped()) == NAMES
    assert set(NAMES) == {*SYSTEMS, "quickstart", "imagenet100", "folder", *YARDSTICKS, "cifar10-vit-laptop"}


@pytest.mark.parametrize("name", NAMES)
def test_loads_plans_and_names_its_source(name: str) -> None:
    recipe = file.load(name)
    assert plan_of(recipe).batches > 0
    assert file.load(str(FOLDER / f"{name}.toml")) == recipe
    header = (FOLDER / f"{name}.toml").read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in header)
    assert "arXiv:" in "".join(header)
    assert not {"checkpoint_every", "keep"} & tomllib.loads((FOLDER / f"{name}.toml").read_text())["train"].keys()


def test_names_are_unlike_each_other() -> None:
    assert len({file.load(name).name for name in NAMES}) == len(NAMES)


# Frozen: seeds of one recipe are folded by it, and runs of earlier versions stand beside later ones.
DIGESTS = {
    "cifar10": "5bbf43151bb08a94b6cbc1a9d8e0711ea3256f59f36fcd8dad00796d8219cee1",
    "cifar10-emp-ssl-clean": "a1fbcfd33da3431d6fc92b14cc2a2891e54ad8a901e4802fe5c583ac8a9906d2",
    "cifar10-emp-ssl-crop-pgd": "4a8f998fceaf9d468ce2cb2fb53ce691d8ce1e7e24626752931cacd5f90fa43a",
    "cifar10-emp-ssl-patch-free": "4c3a2b2faf732be7df7a6267f098bbe2c3c2c261f2b9bf5c3518373ae8015ca7",
    "cifar10-emp-ssl-patch-pgd": "a514f91790d7a959a9a2995ea2a5cb4028a0202bd325c468e230a0d8a439aa74",
    "cifar10-fast": "36894c7adf6b82db72c5c5793c900f798ed4e627c86313f69346c400679976d6",
    "cifar10-laptop": "b5e221a04b77438e2d6f37886f8b1835e66e9b9cb22e15713d1a14c13e7f0e6d",
    "cifar10-laptop-fast": "58d5d6fe62de94a07d9b1a6de6b068c769c78fe4f1c42d12d6aa74a8bf8c5d95",
    "cifar10-laptop-strong": "2ca2d485180bde20d936cd9a852e6129f2fba0083ef7a098a3e4aee7dff9515f",
    "cifar10-simclr-clean": "6e23640a8749cb52868a7bc9e48cf25f96756564064bb9d25d5ef3cf0132fc9e",
    "cifar10-simclr-crop-free": "b3f3b4f650e8b312fcdf08b56771d8729f98395593047b46b54bef1ebc0c8e35",
    "cifar10-simclr-crop-pgd": "b6dac6571f36d3299850e369d2bda6dd43d5055592a56bf5e1fbfb1ea84af04c",
    "cifar10-simclr-patch-pgd": "e92fded08cce83927e36819410f7037345aae62d6ff0bbf964db3e90306acdd9",
    "cifar10-vit-laptop": "328f7040d8d6dfa5c9cf18a992effa12001352758a494a2777f5c030e11a6fba",
    "cifar100": "9a8fe8998ca3e73c183e0fefd4a82b90869502cd862ea8c6e4e1b266d2ea331d",
    "folder": "12c9d05f140beeeb1a36360c963eb81c563a99cbc43632885b7270b9de9023d7",
    "imagenet100": "8c0b0420f73036dd9f9a3a795277929dbe68bad967ddeb40a67ee900352d367f",
    "quickstart": "d223aaf93784cfcf2fc54b1c0866f897f49e2b35b67663dc2c256c9bb5bc7b83",
}


def test_digests_are_frozen() -> None:
    assert {name: file.load(name).digest() for name in NAMES} == DIGESTS
    assert len(set(DIGESTS.values())) == len(NAMES)


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_of_the_published_table(name: str) -> None:
    objective, adversary, views, groups, embedding, batch, epochs = SYSTEMS[name]
    recipe = file.load(name)
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
        "name": "lars",
        "lr": 0.3,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "trust_coefficient": 0.005,
        "clip": True,
    }
    assert recipe.schedule.model_dump() == {"name": "cosine", "warmup": 0, "end": 0}
    simclr = objective == "simclr"
    assert recipe.augment.jitter == (0.4, 0.4, 0.4, 0.1 if simclr else 0.2)
    assert (recipe.augment.blur_p, recipe.augment.solarize_p) == ((0, 0) if simclr else (0.1, 0.1))


def test_laptop_yardstick_and_its_folder_of_images() -> None:
    recipe = file.load("cifar10-laptop", overrides=["data.dataset=folder", "data.root=/data/cifar10"])
    assert (recipe.model.width, recipe.model.hidden_dim, recipe.model.embedding_dim) == (16, 1024, 256)
    assert (recipe.views, recipe.replays, recipe.train.batch_size, recipe.train.epochs) == (4, 3, 100, 1)


def test_the_fast_recipe_at_full_size_is_the_laptops() -> None:
    """But for what full size means: width, crops, and ten times the length."""
    large, small = (file.load(name).resolved() for name in ("cifar10-fast", "cifar10-laptop-fast"))
    large["name"], large["model"] = small["name"], small["model"]
    for part, own in zip((large, *large["phase"]), (small, *small["phase"]), strict=True):
        assert [group.pop("count") for group in (part["crops"][0], own["crops"][0])] == [16, 4]
        longer, length = (table.get("train", table) for table in (part, own))
        assert longer.pop("epochs") == pytest.approx(10 * length.pop("epochs"))
    assert large == small


def test_no_shipped_recipe_reads_a_label() -> None:
    assert not any(part.reads_labels for name in NAMES for part in file.load(name).parts())


def test_quickstart_needs_no_download() -> None:
    recipe = file.load("quickstart")
    assert recipe.data.dataset == "fashion-mini"
    assert recipe.train.evaluate_every == 1


def test_found_outside_a_checkout(tmp_path: Path) -> None:
    code = "from cfamc_cli.recipe.file import load; print(load('recipes/cifar10.toml') == load('cifar10'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_found_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "cfamc_cli"
    (package / "recipes").mkdir(parents=True)
    (tmp_path / "site-packages" / "recipes").mkdir()
    (tmp_path / "site-packages" / "recipes" / "somebody-elses.toml").touch()
    (package / "recipes" / "mine.toml").write_text((FOLDER / "cifar10.toml").read_text())
    monkeypatch.setattr(file, "__file__", str(package / "recipe" / "file.py"))
    assert list(file.shipped()) == ["mine"]
    (package / "recipes" / "mine.toml").unlink()
    (package / "recipes").rmdir()
    assert not file.shipped()  # a neighbour's folder of recipes is not ours


def test_a_folder_named_like_a_recipe_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert file.load("cifar10").name == "cifar10-cf-amc-ssl"


def test_a_file_of_ones_own_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes.copy("cifar100", tmp_path / "cifar10.toml")
    assert file.load("cifar10.toml").name == "cifar100-cf-amc-ssl"
    assert file.load("recipes/cifar10.toml").name == "cifar10-cf-amc-ssl"


def test_list_and_show() -> None:
    titles = recipes.titles()
    assert next(iter(titles)) == "quickstart"
    assert sorted(titles) == NAMES
    assert all(20 < len(title) < 118 and not title.startswith("#") for title in titles.values())
    assert recipes.show("cifar10") == (FOLDER / "cifar10.toml").read_text()


def test_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.copy("cifar10") == Path("cifar10.toml")
    told = "#:schema ./cfamc-recipe.schema.json\n"  # to editors
    assert Path("cifar10.toml").read_text() == told + (FOLDER / "cifar10.toml").read_text()
    with pytest.raises(CfamcError) as refused:
        recipes.copy("cifar10")
    assert refused.value.message == "cifar10.toml exists"
    assert refused.value.hint == "--force replaces it; or name another file"
    assert refused.value.exit_code is ExitCode.INVALID
    assert recipes.copy("folder", Path("cifar10.toml"), force=True).read_text() == told + recipes.show("folder")
    (tmp_path / "mine").mkdir()
    assert recipes.copy("cifar10", tmp_path / "mine") == tmp_path / "mine" / "cifar10.toml"
    Path("dangling.toml").symlink_to("nowhere")
    with pytest.raises(CfamcError, match=r"dangling\.toml exists"):
        recipes.copy("cifar10", Path("dangling.toml"))
    with pytest.raises(CfamcError, match="no such file or directory"):
        recipes.copy("cifar10", tmp_path / "missing" / "a.toml")
    made = ["cfamc-recipe.schema.json", "cifar10.toml", "dangling.toml", "mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made
