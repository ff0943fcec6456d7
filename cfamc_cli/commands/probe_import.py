"""`cfamc probe --import`: a run of a network that somebody else trained, and what there is to suspect of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cfamc_cli.commands.common import Session, load_images
from cfamc_cli.engine.costs import require_library, require_size
from cfamc_cli.errors import CfamcError, invalid
from cfamc_cli.recipe import file
from cfamc_cli.recipe.schema import TIMM, Model, Normalize, Recipe
from cfamc_cli.store.ledger import found
from cfamc_cli.store.records import Totals, now, save_record
from cfamc_cli.store.runs import RunFolder, create_run

if TYPE_CHECKING:
    from cfamc_cli.engine.heads.imported import Foreign, LastLayer, Reading

# Mean and std that networks are commonly trained with; kuangliu's std is the mean of the images' own deviations.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10-kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_STEMS = {
    "cifar": "3x3 stem of stride 1 and padding 1 without pooling",
    "cifar-padded": "3x3 stem of stride 1 and padding 2 without pooling",
    "cifar-linear": "3x3 stem of stride 1 and padding 1 without ReLU and pooling",
    "imagenet": "7x7 stem",
}
_SMALL = 64  # pixels of a side: images that an ImageNet stem makes next to nothing of


@dataclass(frozen=True)
class Import:
    """A file of foreign weights, and how it is to be read as flags say it; None leaves that to the file."""

    path: Path
    mean: str | None = None  # a name of `NORMALIZATIONS`, or three numbers
    std: str | None = None
    size: int | None = None  # pixels of a side that the network expects
    batch_norm: str | None = None
    network: str | None = None
    stem: str | None = None
    architecture: str | None = None  # timm:NAME, with options behind it

    def reading(self) -> Reading:
        """The flags as the engine takes them.

        Raises:
            CfamcError: Exit 2; --mean and --std are no normalisation.
        """
        from cfamc_cli.engine.heads.imported import Reading

        return Reading(_normalize(self.mean, self.std), self.size, self.batch_norm, self.network, self.stem)


def _architecture(text: str) -> Model:
    """What --architecture says, such as timm:vit_tiny_patch16_224,img_size=32,patch_size=4: values are those of JSON.

    Raises:
        CfamcError: Exit 2; it is no backbone of timm, or timm is not installed.
    """
    backbone, *settings = re.split(r",(?=[a-z_]+=)", text)
    options: dict[str, object] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    way = "such as: --architecture timm:vit_tiny_patch16_224,img_size=32,patch_size=4"
    if not backbone.startswith(TIMM):
        raise invalid(f"--architecture {text!r:.80}: timm:NAME is what it can be; other files tell it themselves", way)
    try:
        # The smallest layers: the file has none of them
        model = Model.model_validate({"backbone": backbone, "options": options, "hidden_dim": 2, "embedding_dim": 2})
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise invalid(f"--architecture {text!r:.80}: {why}", way) from error
    require_library(model)
    return model


def _normalize(mean: str | None, std: str | None) -> Normalize | None:
    """The normalisation of two flags; the name of a common one stands for both."""
    if mean is None and std is None:
        return None
    given = {"--mean": (mean or std or "", 0), "--std": (std or mean or "", 1)}
    if None in (mean, std) and (mean or std) not in NORMALIZATIONS:
        flag = "--std" if std is None else "--mean"
        raise invalid(f"{flag} is missing: three numbers of one flag say nothing of the other", f"say {flag} too")
    numbers: list[tuple[float, ...]] = []
    for flag, (text, place) in given.items():
        if text in NORMALIZATIONS:
            numbers.append(NORMALIZATIONS[text][place])
            continue
        try:
            numbers.append(tuple(float(part) for part in text.split(",")))
        except ValueError as error:
            names = ", ".join(NORMALIZATIONS)
            raise invalid(f"{flag} {text!r:.80} is no normalisation", f"three numbers, or one of: {names}") from error
    try:
        return Normalize.model_validate({"mean": numbers[0], "std": numbers[1]})
    except ValueError as error:
        message = f"--mean {mean or std}, --std {std or mean}: three numbers each, of pixels in [0, 1], std above 0"
        raise invalid(message[:300], "such as: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225") from error


def import_run(asked: Import, data: Mapping[str, object], working: Session) -> tuple[RunFolder, LastLayer | None]:
    """Make a finished run of somebody else's network; nothing is left of one that cannot be read.

    Args:
        asked: The file, and how to read it.
        data: The [data] table of the images that it is to be measured on.
        working: The command at work.

    Returns:
        The run, and the last layer of a classifier of so many classes as the data has.

    Raises:
        CfamcError: Exit 4; file or data cannot be used. Exit 2; the flags do not fit the file.
    """
    from cfamc_cli.engine import checkpoint
    from cfamc_cli.engine.checkpoint import Checkpoint
    from cfamc_cli.engine.device import describe
    from cfamc_cli.engine.heads.imported import read_foreign

    path, talk = asked.path, working.talk
    if asked.architecture is None:
        foreign = read_foreign(path, asked.reading())
    else:
        architecture = _architecture(asked.architecture)
        from cfamc_cli.engine.heads.imported_timm import read_timm

        foreign = read_timm(path, architecture, asked.reading())
    model, last = foreign.model, foreign.last
    raw: dict[str, object] = {
        "schema": 1,
        "name": path.stem[:200] or "imported",
        "data": data,
        "crops": [{"count": 16, "size": _crop_size(model)}],
        "model": model.model_dump(mode="json"),
        "objective": {"name": "emp-ssl"},
        "adversary": {"name": "none"},
        "probe": {"head": "linear", "features": "backbone" if foreign.backbone_only else "pre_feature"},
    }
    recipe = file.validate(raw, label=str(path))
    images = load_images(recipe, "test", talk=talk)
    classes = images.classes
    if model.input_size is None:  # else they are resized
        require_size(model, *images.images.shape[-2:])
    if last is not None and len(last.head.bias) != len(classes):
        talk.message(f"left out: {last.name} tells {len(last.head.bias):,} classes, not the {len(classes)} of the data")
        last = None
    run = create_run(working.options.store, recipe.name, seed=recipe.seed, now=now())
    record = found(run, recipe, device=describe(working.device))
    progress = {"step": 0, "recipe": recipe.digest(), "positions": {}, "backbone_only": foreign.backbone_only}
    checkpoint.save(run.checkpoints, 0, Checkpoint(foreign.encoder.state_dict(), {}, progress))
    totals = Totals(steps=0, view_passes=0, parameters=checkpoint.count_parameters(foreign.encoder))
    save_record(run.run_json, record.model_copy(update={"status": "finished", "totals": totals, "imported": str(path)}))
    shape = str(model.options) if model.timm else f"{_STEMS[model.stem]}, width {model.width}"
    talk.message(f"imported {path} as {run.id}: {model.backbone}, {shape}")
    for text in foreign.notes:
        talk.message(text)
    if last is not None:
        names = ", ".join(f"{place} {name}" for place, name in enumerate(classes[:10]))
        more = "" if len(classes) <= 10 else f" and so on to {len(classes) - 1}"
        talk.message(f"its last layer {last.name} is the head; its outputs are taken as {names}{more}")
    _suspect(replace(foreign, last=last), recipe, working)
    return run, last


def _crop_size(model: Model) -> int:
    """Pixels of a side that crops of a network's images have."""
    if model.timm is not None and model.input_size is None:
        size = model.options.get("img_size", 224)
        return size if isinstance(size, int) else 224
    return 32 if model.stem != "imagenet" or model.input_size else 224


def _suspect(foreign: Foreign, recipe: Recipe, working: Session) -> None:
    """Say what makes it likely that the network was trained on other pixels."""
    from cfamc_cli.engine.heads.imported import better_with

    model, talk, dataset = foreign.model, working.talk, recipe.data.dataset
    images = load_images(recipe, "test", talk=talk)
    if model.stem == "imagenet" and model.input_size is None and images.images.shape[-1] <= _SMALL:
        pixels = images.images.shape[-1]
        talk.warning(f"an ImageNet stem reads images of {pixels} pixels: was it trained on larger ones? say --size 224")
    if model.normalize is not None:
        return
    known = dataset if dataset in NORMALIZATIONS and model.stem != "imagenet" else "imagenet"
    mean, std = NORMALIZATIONS[known]
    talk.message(
        "pixels reach the network in [0, 1] as they are; one that was trained on others needs --mean and --std"
    )
    if model.stem == "imagenet":
        talk.warning("networks with an ImageNet stem are mostly trained on normalised pixels: see --mean imagenet")
    try:
        images = images.labelled()
        bank = images if foreign.last is not None else load_images(recipe, "train", talk=talk).labelled()
        better = better_with(foreign, Normalize(mean=mean, std=std), bank, images)
    except CfamcError as error:
        talk.message(f"whether it wants normalised pixels could not be tried: {error.message}")
        return
    if better is not None:
        without, with_it, n = better
        what = "its last layer" if foreign.last is not None else "the nearest neighbour vote"
        talk.warning(
            f"{what} is right on {with_it} of {n} images normalised as for {known}, and on {without} without: "
            f"it was likely trained so; import it again with --mean {known}"
        )
