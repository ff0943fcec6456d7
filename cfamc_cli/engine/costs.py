"""What backbones cost and take: our ResNets are counted, and what timm makes is measured, which takes torch."""

from __future__ import annotations

from cfamc_cli.errors import require_libraries
from cfamc_cli.recipe.plan import Plan, plan
from cfamc_cli.recipe.schema import Model, Recipe


def plan_of(recipe: Recipe, images: int | None = None) -> Plan:
    """The cost of a run; see `recipe.plan.plan`. Torch is imported for backbones of timm alone.

    Raises:
        CfamcError: As for `Recipe.require_fit`, `require_library` and `timm_backbone.measure`.
    """
    if recipe.model.timm is None:
        return plan(recipe, images)
    require_library(recipe.model)
    from cfamc_cli.engine.timm_backbone import measure

    return plan(recipe, images, measured=measure(recipe))


def require_size(model: Model, height: int, width: int) -> None:
    """Refuse images of a size that a backbone of timm does not take; our ResNets take every size.

    Raises:
        CfamcError: Exit 2, with timm's reason.
    """
    if model.timm is not None:
        from cfamc_cli.engine import timm_backbone

        timm_backbone.require_size(model, height, width)


def require_library(model: Model) -> None:
    """Refuse a backbone whose library is missing, without importing it.

    Raises:
        CfamcError: Exit 2, with how to install it.
    """
    if model.timm is not None:
        require_libraries("timm", by=f'model.backbone = "{model.backbone}"', extra="timm")
