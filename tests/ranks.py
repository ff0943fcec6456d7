"""One process of a world: trains small systems on a shared batch, and the first one prints what came of them.

Batch norm is frozen or synchronised, so that it is the same for any number of processes. Arguments: the folder of this
world's checkpoints, and that of another world's, from which runs are gone on with.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from fixed_inputs import uniform
from tiny import tiny_recipe
from torch import Tensor, nn

from cfamc_cli.engine import checkpoint, distributed
from cfamc_cli.engine.batch_norm import synchronise
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.heads import frozen
from cfamc_cli.engine.journal import Journal
from cfamc_cli.engine.objectives import Terms, objective_loss
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sink import NullLedger, NullTalk

BATCH = 8
IMAGES = ImageSet(
    images=(uniform(32, 3, 12, 12, key="ranks") * 256).to(torch.uint8),
    labels=torch.arange(32) % 4,
    classes=("a", "b", "c", "d"),
    dataset="folder",
    split="train",
    fingerprint="0" * 64,
    licence="",
)


def trained(
    objective: str,
    adversary: str,
    folder: Path,
    *,
    world: distributed.World,
    start: Path | None = None,
    norm: Literal["frozen", "synchronised"] = "frozen",
    phases: Sequence[Mapping[str, Any]] = (),
) -> tuple[Trainer, list[list[float]]]:
    """Two batches and `phases`, or what is after `start`: the trainer, and loss and gradient norm of each update."""
    recipe = tiny_recipe(
        objective,
        adversary,
        train={
            "epochs": 0.5,
            "batch_size": BATCH,
            "checkpoint_every": 1,
            "average": 0.9,
            "keep": 9,
            "batch_norm": "synchronised" if norm == "synchronised" else "local",
            "memory": "recompute" if norm == "synchronised" and world.size > 1 else "full",
        },
        # with room to move, rounding would turn signs, and they the rest
        adversary={"eps": "0"} if (norm, adversary) == ("synchronised", "pgd") else {},
        optimizer={"lr": 0.05},
        phase=phases,
    )
    trainer = Trainer(recipe, IMAGES, device=torch.device("cpu"), world=world, talk=NullTalk(), ledger=NullLedger())
    if norm == "frozen":
        trainer.encoder.eval()
        trainer.encoder.train = lambda mode=True: trainer.encoder  # type: ignore[method-assign]
    updates, add = [], Journal.add

    def note(journal: Journal, terms: Terms, gradient_norm: Tensor, *, lr: float) -> None:
        updates.append([terms.loss.item(), gradient_norm.item()])
        add(journal, terms, gradient_norm, lr=lr)

    if start is not None:
        trainer.load(checkpoint.load(start), path=start)
    with mock.patch.object(Journal, "add", note):
        trainer.train(folder, stop=lambda: 0)
    return trainer, updates


def outcome(trainer: Trainer, updates: list[list[float]]) -> dict[str, object]:
    """Numbers that several worlds have in common."""
    delta = distributed.gather_images(trainer.adversary.delta, trainer.shares, trainer.world)
    return {
        "updates": updates,
        "weights": [float(part.detach().double().norm()) for part in trainer.encoder.state_dict().values()],
        "average": [float(part.double().norm()) for part in trainer.average.encoder.state_dict().values()],
        "delta": [part.double().abs().mean((0, 2, 3, 4)).tolist() for part in delta],  # of each image
    }


def first_images(trainer: Trainer, ranks: int) -> float:
    """The loss of the first image of each of `ranks` shares, as an adversary of so many processes sees it."""
    groups, labels = trainer.crops_of(0)
    if trainer.world.size == ranks:
        return trainer.attacked_loss([group[:, :1] for group in groups], still=[], labels=labels).item()
    assert labels is not None
    first = [rank * BATCH // ranks for rank in range(ranks)]
    z = trainer.encoder.embed([group[:, first] for group in groups])
    return objective_loss(z, labels[first], objective=trainer.recipe.objective).loss.item()


def norm_error(world: distributed.World) -> float:
    """How far synchronised batch norm is from batch norm of the whole batch: outputs, gradients and statistics."""
    x, weight = (uniform(BATCH, 3, 2, 2, key=key).double() for key in ("values", "weights"))
    whole = nn.BatchNorm2d(3).double()
    nn.init.uniform_(whole.weight, generator=torch.Generator().manual_seed(0))
    parted = nn.Sequential(nn.BatchNorm2d(3)).double()
    parted[0].load_state_dict(whole.state_dict())
    synchronise(parted, device=torch.device("cpu"), world=world)
    share = world.share(BATCH)
    inputs = [x.clone().requires_grad_(), x[share].clone().requires_grad_()]
    for _ in range(2):
        outputs = [whole(inputs[0])[share], parted(inputs[1])]
    (whole(inputs[0]) * weight).square().sum().backward()
    (parted(inputs[1]) * weight[share]).square().sum().backward()
    pairs = [tuple(outputs), *zip(whole.buffers(), parted.buffers(), strict=True)]
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    pairs.append((inputs[0].grad[share], inputs[1].grad))
    for one, part in zip(whole.parameters(), parted.parameters(), strict=True):
        assert one.grad is not None
        assert part.grad is not None
        if world.size > 1:
            torch.distributed.all_reduce(part.grad)
        pairs.append((one.grad, part.grad))
    assert list(whole.state_dict()) == [name.removeprefix("0.") for name in parted.state_dict()]
    return max(float((one - part).detach().abs().max()) for one, part in pairs)


def main(own: Path, other: Path) -> None:
    """Train, go on from checkpoints, and print."""
    distributed._BUCKET = 2000  # so that there are several
    world = distributed.join(torch.device("cpu"))
    found: dict[str, object] = {"size": world.size}
    for objective, adversary in (("emp-ssl", "free"), ("simclr", "free"), ("supcon", "pgd"), ("emp-ssl", "none")):
        name = f"{objective} {adversary}"
        trainer, updates = trained(objective, adversary, own / name, world=world)
        found[name] = outcome(trainer, updates)
        if name == "emp-ssl free":
            middle = f"{name}/step-{trainer.recipe.replays:08d}"
            again, _ = trained(objective, adversary, own / "again", world=world, start=own / middle)
            parts = [
                list(made.encoder.parameters()) + list(made.average.encoder.parameters()) for made in (trainer, again)
            ]
            found["resumed is uncut"] = all(torch.equal(*pair) for pair in zip(*parts, strict=True))
            if other.exists():
                found["resumed"] = outcome(
                    *trained(objective, adversary, own / "resumed", world=world, start=other / middle)
                )
        if objective == "supcon":
            sizes = (2, 3) if world.size == 1 else (world.size,)
            found["first images"] = {str(ranks): first_images(trainer, ranks) for ranks in sizes}
    for objective, adversary in (("simclr", "pgd"), ("emp-ssl", "none"), ("emp-ssl", "free")):
        name = f"{objective} {adversary} synchronised"
        found[name] = outcome(*trained(objective, adversary, own / name, world=world, norm="synchronised"))
    # 11 images are shared evenly by nobody, as batches of 8 are by three
    phases: list[dict[str, Any]] = [{"epochs": 1.0, "batch_size": 11, "adversary": {"name": "free", "replays": 1}}]
    trainer, updates = trained("emp-ssl", "none", own / "phases", world=world, phases=phases)
    found["phases"] = outcome(trainer, updates)
    for step in (2, 3):  # the border, and within the second phase
        start = own / f"phases/step-{step:08d}"
        again, after = trained("emp-ssl", "none", own / f"after {step}", world=world, start=start, phases=phases)
        assert after == updates[step:]
        assert checkpoint.digest_of(again.encoder) == checkpoint.digest_of(trainer.encoder)
    frozen._CHUNK = 5  # so that each process reads features
    trainer, updates = trained(
        *("emp-ssl", "none", own / "clusters"),
        world=world,
        phases=[{"epochs": 0.5, "objective": {"name": "clusters", "count": 5}}],
    )
    assert trainer.clusters is not None
    found["clusters"] = outcome(trainer, updates) | {"clusters": trainer.clusters.double().tolist()}
    found["norm error"] = norm_error(world)
    if world.leads:
        print(json.dumps(found))
    control = None if world.control is None else weakref.ref(world.control)
    distributed.leave(world)
    assert control is None or control() is None, "threads of gloo may outlive Python"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
