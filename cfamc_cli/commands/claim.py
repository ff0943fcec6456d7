"""The claim of an export for RobustBench: its JSON, only from what was measured, and what its model zoo can hold."""

from __future__ import annotations

from collections.abc import Sequence

from cfamc_cli.datasets import KNOWN_SETS
from cfamc_cli.errors import CfamcError, ExitCode, invalid
from cfamc_cli.recipe.schema import Recipe, fraction
from cfamc_cli.store.records import AttackRecord, ProbeRecord, RunRecord, failed_names

CLAIM = "claim.json"
EPS = "8/255"  # of the board that the claim is for, L-inf
_DATA = ("cifar10", "cifar100")  # that the board has
_WIDTH = 64  # of the zoo's ResNets, whose last pooling takes images of 32 pixels
_SIZE = 32


def require_architecture(recipe: Recipe, probe: ProbeRecord, *, run: str) -> None:
    """Refuse what the zoo's ResNets cannot hold: those of kuangliu, with a linear layer on the pooled features.

    Raises:
        CfamcError: Exit 2.
    """
    model, data, hint = recipe.model, probe.test.dataset, "export --format safetensors, pt2 or onnx instead"
    probed = f"fit one: cfamc probe {run} --features backbone, then name it with --head"
    faults = (
        (data not in _DATA, f"RobustBench has no board for {data}", "it has: " + ", ".join(_DATA)),
        (model.timm is not None, f"the zoo's ResNets are no {model.timm}", hint),
        (bool(model.normalize or model.input_size), "the zoo's networks take images as they are, in [0, 1]", hint),
        (model.width != _WIDTH, f"the zoo's {model.backbone} is {_WIDTH} wide, and this one {model.width}", hint),
        (model.stem != "cifar", f"the zoo's {model.backbone} has the cifar stem, not {model.stem}", hint),
        (probe.data.get("size") not in (None, _SIZE), f"the zoo's images have {_SIZE} pixels a side", hint),
        (probe.head == "crops", f"{probe.id} reads random crops, and the zoo's networks whole images", probed),
        (probe.features != "backbone", f"{probe.id} reads {probe.features}, which the zoo's networks lack", probed),
    )
    for wrong, message, way in faults:
        if wrong:
            raise invalid(f"--format robustbench: {message}", way)


def claim_of(
    record: RunRecord, recipe: Recipe, probe: ProbeRecord, attacks: Sequence[AttackRecord], *, run: str
) -> dict[str, object]:
    """RobustBench's fields, with the numbers of the newest AutoAttack on the whole test set.

    Args:
        record: The run.
        recipe: Its recipe.
        probe: The head.
        attacks: What was measured on exactly this encoder and head.
        run: What a next command calls the run by.

    Returns:
        Its fields in their order. What only a person knows is left empty: link, authors, and whether additional data
        was used where the encoder did not begin here.

    Raises:
        CfamcError: Exit 2; there is no such measurement. Exit 5; a check says not to trust it.
    """
    data = probe.test.dataset
    whole = [
        attack
        for attack in attacks
        if (attack.attack, attack.settings.get("version"), attack.source) == ("autoattack", "standard", None)
        and (attack.threat.space, attack.threat.norm) == ("image", "linf")
        and fraction(attack.threat.eps) == fraction(EPS)
        and (attack.data.dataset, attack.data.split, attack.data.n) == (data, "test", KNOWN_SETS[data].test)
    ]
    if not whole:
        raise invalid(
            f"--format robustbench: {probe.id} has no standard AutoAttack at {EPS} on all test images of {data}",
            f"make one: cfamc attack {run} --head {probe.id} --attack autoattack --eps {EPS} --split test",
        )
    attack = max(whole, key=lambda attack: attack.created)
    if failed := failed_names(attack.flags):
        hint = "its record says what was measured and what is allowed"
        message = f"--format robustbench: {attack.id} is not to be trusted: {', '.join(failed)}"
        raise CfamcError(message, hint=hint, exit_code=ExitCode.UNTRUSTED)
    elsewhere = record.imported is not None or recipe.train.init is not None
    robust = f"{100 * attack.robust.value:.2f}"
    return {
        "link": "",
        "name": record.name,
        "authors": "",
        "additional_data": None if elsewhere else recipe.data.dataset != data,
        "number_forward_passes": 1,
        "dataset": data,
        "venue": "Unpublished",
        "architecture": f"ResNet-{recipe.model.backbone.removeprefix('resnet')}",
        "eps": EPS,
        "clean_acc": f"{100 * attack.clean.value:.2f}",
        "reported": robust,
        "autoattack_acc": robust,
    }
