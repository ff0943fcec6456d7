"""Pictures say what was measured: a closer look at leading rows, the plane of features, crops, curves of a training."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_compare_command import A, B, add_attack, add_metrics, add_probe, make_run, put_lines, run
from tiny import data_used, tiny_recipe

from cfamc_cli.commands.preview import draw_crops
from cfamc_cli.comparison.gather import gather
from cfamc_cli.comparison.tables import ComparedTable, tabulate
from cfamc_cli.engine.adversary import Groups
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.distributed import ALONE
from cfamc_cli.engine.evaluation.pictures import crops_sheet
from cfamc_cli.engine.heads.frozen import principal_plane
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sink import NullLedger, NullTalk
from cfamc_cli.errors import CfamcError
from cfamc_cli.report.closer import close_up
from cfamc_cli.report.plots import (
    Panel,
    _in_words,
    _name,
    draw,
    draw_training,
    learning_curves,
    looks_of,
    results,
    trainings,
)
from cfamc_cli.report.sheets import figure_text
from cfamc_cli.store.records import (
    Accuracy,
    ClassAccuracy,
    ClassRobustness,
    FeatureMap,
    TrainLine,
    read_metrics,
    save_record,
)
from cfamc_cli.store.runs import RunFolder

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two attacked runs with their heads; in one the classes differ."""
    runs = tmp_path / "runs"
    right = [12 + 5 * k for k in range(10)]
    for item, name in ((A, "a"), (B, "b")):
        found = right if name == "b" else [30] * 10
        classes = tuple(
            ClassRobustness(name=f"class {k}", clean=Accuracy.of(70, 100), robust=Accuracy.of(count, 100))
            for k, count in enumerate(found)
        )
        clean, robust = ([i < count for i in range(1000)] for count in (700, sum(found)))
        add_attack(make_run(runs, item, name=name, digest=2 * name), clean=clean, robust=robust, classes=classes)
        add_probe(runs / item)
    return runs


def compared(store: Path) -> tuple[ComparedTable, dict[str, RunFolder]]:
    found = gather([], store)
    tables = tabulate(found.entries, fold=True, baseline=None, outcomes_of=lambda _: None, order=None)
    return tables[0], found.folders


def axes_of(panel: Panel) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    panel(axes)
    return axes


def test_classes_are_drawn_with_both_accuracies_the_weakest_first(store: Path) -> None:
    panels, _, left_out = close_up(*compared(store))
    assert left_out == []
    axes = axes_of(panels[f"By class\n{B}, pgd-001"])
    clean, robust = axes.containers
    assert [bar.get_width() for bar in clean] == [70.0] * 10
    assert [bar.get_width() for bar in robust] == pytest.approx([12.0 + 5 * k for k in range(10)])
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"class {k}" for k in range(10)]
    assert axes.yaxis_inverted()


def test_confusion_is_in_shares_of_the_true_class(store: Path) -> None:
    classes = tuple(
        ClassAccuracy(name=name, accuracy=Accuracy.of(*of)) for name, of in (("x", (30, 40)), ("y", (5, 10)))
    )
    judged: dict[str, Any] = {"test": data_used("test", 50), "test_accuracy": Accuracy.of(35, 50)}
    add_probe(store / A, confusion=((30, 10), (5, 5)), classes=classes, **judged)
    panels, _, _ = close_up(*compared(store))
    axes = axes_of(panels[f"Confusion on clean images\n{A}, linear-001"])
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), [[0.75, 0.25], [0.5, 0.5]])
    assert [text.get_text() for text in axes.texts] == ["75", "25", "50", "50"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("answered (%)", "true class")


def test_features_lie_where_the_map_says_and_names_amid_their_images(store: Path) -> None:
    points = ((0.0, 1.0, 0), (2.0, 3.0, 0), (-4.0, 5.0, 3))
    save_record(store / A / "probes" / "linear-001" / "map.json", FeatureMap(points=points, explained=(0.5, 0.25)))
    panels, _, _ = close_up(*compared(store))
    axes = axes_of(panels[f"Features at their first two principal components\n{A}, linear-001"])
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[0.0, 1.0], [2.0, 3.0], [-4.0, 5.0]]
    assert {text.get_text(): text.get_position() for text in axes.texts} == {"0": (1.0, 2.0), "3": (-4.0, 5.0)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("50 % of the variance", "25 % of the variance")


def test_examples_come_as_they_were_drawn_and_nothing_else_does(store: Path) -> None:
    (store / A / "attacks" / "pgd-001" / "examples.png").write_bytes(PNG + b"of a")
    (store / B / "attacks" / "pgd-001" / "examples.png").write_bytes(b"<script>")
    _, sheets, left_out = close_up(*compared(store))
    assert sheets == {f"Adversarial examples: {A}, pgd-001": PNG + b"of a"}
    ((what, why),) = left_out
    assert what == f"{B} attacks/pgd-001"
    assert "is no PNG" in why


def test_a_missing_head_takes_only_the_closer_look(store: Path, tmp_path: Path) -> None:
    (store / A / "probes" / "linear-001" / "record.json").unlink()
    page = tmp_path / "page.html"
    run([], store, html=page)
    text = page.read_text()
    assert "no closer look" in text.partition("<h2>Left out</h2>")[2]
    assert f"Confusion on clean images, {B}" in text


def test_the_page_opens_with_its_verdict_and_the_results(store: Path, tmp_path: Path) -> None:
    for item in (A, B):
        add_metrics(store / item)
    page = tmp_path / "page.html"
    run([], store, html=page)
    text = page.read_text().partition("<main>")[2]
    places = [text.index(part) for part in ('class="verdict"', "<h2>Results", "<table", "<h2>Training", "<h2>A closer")]
    assert places == sorted(places)
    assert f'<p class="verdict">{B} leads {A}' in text
    assert ">time</th>" in text
    assert ">note</th>" not in text  # a column without content takes no room


def test_a_page_of_one_run_says_what_it_reached(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    add_attack(make_run(runs, A, name="a"))
    page = tmp_path / "page.html"
    run([], runs, html=page)
    assert f'<p class="verdict">{A}: clean 70.0 [67.1, 72.8] %, robust 23.4 [20.9, 26.1] %.</p>' in page.read_text()


def test_every_curve_of_a_training_has_axes_of_its_own(store: Path) -> None:
    add_metrics(store / A)
    table, folders = compared(store)
    curves, _ = learning_curves([table], folders)
    panels = trainings(curves, looks_of(table))
    assert list(panels) == [
        *("Training loss", "Learning rate", "Effective rank"),
        *("Online accuracy while training", "Online accuracy under attack"),
    ]  # no terms and no grip were measured
    drawn = {title: axes_of(panel).get_lines()[0].get_ydata() for title, panel in panels.items()}
    assert set(drawn["Learning rate"]) == {0.3}
    assert set(drawn["Effective rank"]) == {2.0}
    assert set(drawn["Online accuracy under attack"]) == {10.0}
    (store / A / "resolved.json").write_text(json.dumps(tiny_recipe().resolved()))
    assert draw_training(folders[A]).startswith(PNG)


def test_losses_of_two_objectives_have_axes_of_their_own(store: Path) -> None:
    recipe: dict[str, Any] = {
        "objective": {"name": "emp-ssl"},
        "phase": [{"epochs": 1, "objective": {"name": "clusters"}}],
    }
    make_run(store, A, name="a", recipe=recipe)
    rest: dict[str, Any] = {"lr": 0.3, "gradient_norm": 1.0, "effective_rank": 2.0, "feature_std": 1.0}
    put_lines(
        store / A / "metrics.jsonl",
        [TrainLine(step=k, batch=k, epoch=k, phase=k // 3, loss=-200.0 if k < 3 else 2.0, **rest) for k in range(6)],
    )
    table, folders = compared(store)
    curves, _ = learning_curves([table], folders)
    assert list(curves) == ["Training loss, emp-ssl", "Training loss, clusters", "Learning rate", "Effective rank"]
    found = {title: list(lines.values()) for title, lines in curves.items()}
    assert found["Training loss, emp-ssl"] == [[[(0.0, -200.0), (1.0, -200.0), (2.0, -200.0)]]]
    assert found["Training loss, clusters"] == [[[(3.0, 2.0), (4.0, 2.0), (5.0, 2.0)]]]
    assert axes_of(trainings(curves, looks_of(table))["Training loss, clusters"]).get_ylabel() == "loss"


def test_a_run_with_two_heads_has_one_line(store: Path) -> None:
    for item in (A, B):
        add_metrics(store / item)
    add_probe(store / A, "linear-002", settings={"head": "linear", "protocol": "converged"})
    attacked = [i < 300 for i in range(1000)]
    add_attack(store / A, "pgd-002", probe="linear-002", robust=attacked)
    table, folders = compared(store)
    assert len(table.rows) == 3
    curves, _ = learning_curves([table], folders)
    assert sum(len(lines) for lines in curves["Training loss"].values()) == 2
    names = [name.strip() for name, _ in looks_of(table).values()]
    assert sorted(names) == ["a, head.protocol=converged", "a, head.protocol=official", "b"]


def test_accuracy_against_eps_joins_the_attacks_of_one_head(store: Path) -> None:
    add_probe(store / A, "linear-002", settings={"head": "linear", "protocol": "converged"})
    for item, head, eps, right in (("2", "1", "4/255", 400), ("3", "2", "8/255", 200), ("4", "2", "4/255", 350)):
        attacked = [i < right for i in range(1000)]
        add_attack(store / A, f"pgd-00{item}", probe=f"linear-00{head}", eps=eps, robust=attacked)
    found = gather([], store)
    tables = tabulate(found.entries, fold=True, baseline=None, outcomes_of=lambda _: None, order=None)
    lines = axes_of(results(tables, tables[0])["Accuracy against eps"]).get_lines()
    found_lines = sorted([round(y) for y in line.get_ydata()] for line in lines)
    assert found_lines == [[70, 35, 20], [70, 40, 30]]


def test_names_at_the_ends_of_lines_never_meet(store: Path) -> None:
    for item in (A, B):
        add_metrics(store / item)
    table, folders = compared(store)
    curves, _ = learning_curves([table], folders)
    axes = axes_of(trainings(curves, looks_of(table))["Training loss"])  # both lines are the same
    low, high = sorted(text.get_position()[1] for text in axes.texts)
    assert high - low >= 0.05
    assert {text.get_text() for text in axes.texts} == {"a", "b"}


@pytest.mark.parametrize("height", [0.0, 1.0])
@pytest.mark.parametrize("place", [0.0, 0.45, 0.55, 1.0])
def test_long_names_stay_within_the_axes(place: float, height: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    _name(axes, [(place, height, name) for name in "abc"], {name: (42 * name, "black") for name in "abc"})
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    for text in axes.texts:
        box = text.get_window_extent()
        assert frame.x0 - 1 <= box.x0 < box.x1 <= frame.x1 + 1
        assert frame.y0 - 1 <= box.y0 < box.y1 <= frame.y1 + 1


def told(page: Path) -> dict[str, str]:
    """What is said of each picture to those who do not see it, by its title."""
    texts = [html.unescape(text) for text in re.findall(r'<img alt="([^"]*)"', page.read_text())]
    return dict(text.split(": ", 1) for text in texts)


def test_pictures_of_the_page_are_told_in_figures(store: Path, tmp_path: Path) -> None:
    add_metrics(store / A)
    save_record(store / A / "probes" / "linear-001" / "map.json", FeatureMap(points=((0, 1, 0),), explained=(0.5, 0.2)))
    (store / A / "attacks" / "pgd-001" / "examples.png").write_bytes(PNG)
    page = tmp_path / "page.html"
    run([], store, html=page)
    words = told(page)
    table, _ = compared(store)
    rows = [
        f"{row.run.name}: clean {figure_text(row.clean)} %, robust {figure_text(row.robust)} %" for row in table.rows
    ]
    assert rows[0] == "b: clean 70.0 [67.1, 72.8] %, robust 34.5 [31.6, 37.5] %"
    assert words["Clean against robust accuracy"] == f"{rows[0]}; {rows[1]}."
    times = [f"{row}, trained for 11 min 40 s" for row in rows]
    assert words["Accuracy against training time"] == f"{times[0]}; {times[1]}."
    lines = [line for line in read_metrics(store / A / "metrics.jsonl") if isinstance(line, TrainLine)]
    ends = ", ".join(f"{line.loss:.4g} at {line.epoch:.3g}" for line in (lines[0], lines[-1]))
    assert words["Training loss"] == f"loss, by epoch. a: {ends}."
    classes = "; ".join(f"class {k} 70 % clean, {12 + 5 * k} % under attack" for k in range(10))
    assert words[f"By class, {B}, pgd-001"] == f"{classes}."
    assert words[f"Features at their first two principal components, {A}, linear-001"].startswith(
        "1 images of 10 classes"
    )
    examples = [text for title, text in words.items() if title.startswith("Adversarial examples")]
    assert [text.startswith(f"{A}, pgd-001: images as they are") for text in examples] == [True]


def test_of_several_seeds_the_first_is_told() -> None:
    lines = {"x": [[(0.5, 1.0), (1.0, 2.0)], [(0.5, 3.0), (1.0, 4.0)]], "not drawn": [[(0.0, 9.0)]]}
    assert _in_words(lines, {"x": (" x (2 seeds)", "black")}, ("epoch", "loss")) == (
        "loss, by epoch. x (2 seeds), the first: 1 at 0.5, 2 at 1"
    )


def test_a_confusion_is_told_with_what_each_class_is_taken_for(store: Path, tmp_path: Path) -> None:
    of = {"x": (30, 40), "y": (4, 10), "z": (0, 1)}
    classes = tuple(ClassAccuracy(name=name, accuracy=Accuracy.of(*found)) for name, found in of.items())
    judged: dict[str, Any] = {"test": data_used("test", 51), "test_accuracy": Accuracy.of(34, 51)}
    add_probe(store / A, confusion=((30, 4, 6), (6, 4, 0), (1, 0, 0)), classes=classes, **judged)
    page = tmp_path / "page.html"
    run([], store, html=page)
    expected = "x 75 % right, 15 % taken for z; y 40 % right, 60 % taken for x; z 0 % right, 100 % taken for x."
    assert told(page)[f"Confusion on clean images, {A}, linear-001"] == expected


# The plane of features


@pytest.mark.parametrize("dim", [2, 40])
def test_the_plane_is_that_of_the_singular_vectors(dim: int) -> None:
    features = torch.randn(1203, dim, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 3, dim) + 5
    plane = principal_plane(features)
    assert plane is not None
    assert plane.stride == 3
    chosen = features[::3].double()
    _, singular, directions = torch.linalg.svd(chosen - chosen.mean(0), full_matrices=False)
    expected = (chosen - chosen.mean(0)) @ directions[:2].T
    signs = torch.sign((expected * plane.points).sum(0))
    torch.testing.assert_close(plane.points, expected * signs, rtol=1e-6, atol=1e-6)
    assert torch.all(plane.points.gather(0, plane.points.abs().argmax(0, keepdim=True)) > 0)
    shares = singular.square() / singular.square().sum()
    assert plane.explained == pytest.approx(tuple(shares[:2].tolist()))


def test_two_points_have_no_plane() -> None:
    assert principal_plane(torch.randn(2, 5)) is None


# Crops


def previewed(recipe: Any, images: ImageSet) -> tuple[Trainer, torch.Tensor, Groups, Groups]:
    trainer = Trainer(recipe, images, device=torch.device("cpu"), world=ALONE, talk=NullTalk(), ledger=NullLedger())
    return trainer, *trainer.preview()


@pytest.mark.parametrize("name", ["free", "pgd"])
def test_a_preview_shows_the_first_batch_and_what_the_adversary_makes_of_it(name: str, tiny_images: ImageSet) -> None:
    recipe = tiny_recipe("emp-ssl", name)
    trainer, images, crops, moved = previewed(recipe, tiny_images)
    expected, _ = trainer.crops_of(0)
    for own, clean, attacked in zip(expected, crops, moved, strict=True):
        assert torch.equal(own, clean)
        size = (attacked - clean).abs().max()
        assert 0.01 < size <= 8 / 255 + 1e-6
        assert not attacked.requires_grad
    assert images.shape[0] == recipe.train.batch_size
    assert 0 <= images.min() < images.max() <= 1
    found = {tuple(image.flatten().tolist()) for image in tiny_images.images.float() / 255}
    assert all(tuple(image.flatten().tolist()) in found for image in images)


def test_a_preview_without_an_adversary_moves_nothing(tiny_images: ImageSet) -> None:
    _, _, crops, moved = previewed(tiny_recipe("emp-ssl", "none"), tiny_images)
    assert all(torch.equal(clean, same) for clean, same in zip(crops, moved, strict=True))


def test_a_sheet_of_crops_holds_image_crops_and_amplified_difference() -> None:
    levels = torch.tensor([0.2, 0.4, 0.6])  # of the image, its crop, the moved crop
    image, clean, moved = (torch.full((1, 3, 8, 8), float(level)) for level in levels)
    drawn = Image.open(io.BytesIO(crops_sheet(image, [clean[None]], [moved[None]], heading=["x"], gain=2.0)))
    pixels = np.asarray(drawn)[..., 0]
    top, tile = 8 + 14 * 2, 114
    column = [pixels[top + 10 + line * tile, 2 * 8 + tile + 10] for line in range(3)]
    assert [int(pixels[top + 10, 8 + 10]), *map(int, column)] == [51, 102, 153, round(255 * 0.9)]


@pytest.mark.parametrize("recipe", ["quickstart", "cifar10"])
def test_recipes_show_draws_crops_without_a_download(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfamc_cli.commands.preview.cache_folder", lambda: tmp_path / "empty")
    narrow = tmp_path / "narrow.toml"
    from cfamc_cli.recipe import file

    text = file.to_toml(file.load(recipe, overrides=["model.width=4", "crops.0.count=2"]))
    narrow.write_text(text)
    draw_crops(str(narrow), tmp_path / "crops.png")
    assert (tmp_path / "crops.png").read_bytes().startswith(PNG)
    said = capsys.readouterr().err
    assert ("not on this machine" in said) == (recipe == "cifar10")


def test_crops_are_drawn_as_png_alone(tmp_path: Path) -> None:
    with pytest.raises(CfamcError, match="cannot draw"):
        draw_crops("quickstart", tmp_path / "crops.pdf")


def test_a_run_its_head_and_what_was_measured_fit_above_a_panel() -> None:
    def panel(axes: Any) -> None:
        axes.set_title("20261130-210233-cifar10-laptop-strong-s0-9b92db, linear-001, corruptions, n = 10000")

    drawn = np.asarray(Image.open(io.BytesIO(draw([panel], ".png"))).convert("L"))
    assert drawn[:, :3].min() == drawn[:, -3:].min() == 255  # what is cut off has ink at the edge
