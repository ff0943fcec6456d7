"""`cfamc recipes show --plot`: the crops of a recipe as the encoder meets them, clean and perturbed."""

from __future__ import annotations

from pathlib import Path

from cfamc_cli.commands.common import Options, session
from cfamc_cli.engine.sink import NullLedger
from cfamc_cli.errors import invalid
from cfamc_cli.recipe import file
from cfamc_cli.store.files import write_bytes
from cfamc_cli.store.runs import cache_folder

_IMAGES = 4  # that are drawn
_CROPS = 8  # of each, of a group
_GAIN = 8.0  # of differences
_STAND_IN = "fashion-mini"


def draw_crops(reference: str, target: Path) -> None:
    """Draw crops of a few images of a recipe's first batch, and below them what its adversary makes of them.

    The encoder is untrained. Images that would have to be downloaded are not: the embedded ones stand in for them.

    Args:
        reference: As for `file.load`.
        target: The PNG to write.

    Raises:
        CfamcError: The recipe or its images cannot be used, or the file cannot be written.
    """
    from cfamc_cli.engine.data.sets import at_hand
    from cfamc_cli.engine.evaluation.pictures import crops_sheet
    from cfamc_cli.engine.pretrain import Trainer

    if target.suffix != ".png":
        raise invalid(f"cannot draw {target.suffix!r:.20}", "use .png")
    recipe = file.load(reference)
    own = at_hand(recipe.data, cache=cache_folder())
    small = {"batch_size": _IMAGES, "precision": "float32", "compile": False, "memory": "full"}
    data = recipe.data if own else recipe.data.model_copy(update={"dataset": _STAND_IN, "root": None, "holdout": 0})
    shown = recipe.model_copy(update={"train": recipe.train.model_copy(update=small), "data": data})
    with session(Options(device="cpu")) as working:
        data_set = working.load_images(shown, "train")
        trainer = Trainer(
            shown, data_set, device=working.device, world=working.world, talk=working.talk, ledger=NullLedger()
        )
        images, *parts = trainer.preview()
        clean, moved = ([group[:_CROPS] for group in part] for part in parts)
        heading = [
            f"{recipe.name}, seed {recipe.seed}: images of {data.dataset}, at most {_CROPS} crops of each group",
            f"clean; as the adversary ({recipe.adversary.name}) moves them before training; {_GAIN:g} x the difference",
        ]
        write_bytes(target, crops_sheet(images, clean, moved, heading=heading, gain=_GAIN))
        if not own:
            working.talk.message(f"{recipe.data.dataset} is not on this machine: drawn on the embedded images")
        working.talk.message(f"drawn: {target}")
