"""A recipe small enough for a step to take milliseconds: an 8-channel net, batches of 8 images, 4 crops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfamc_cli.recipe import Recipe

OBJECTIVES: dict[str, dict[str, Any]] = {
    "emp-ssl": {"name": "emp-ssl"},
    "simclr": {"name": "simclr"},
    "supcon": {"name": "supcon"},
}
ADVERSARIES: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "pgd": {"name": "pgd", "steps": 2},
    "free": {"name": "free", "replays": 3},
}


def tiny_recipe(objective: str = "emp-ssl", adversary: str = "free", /, **tables: Mapping[str, Any] | int) -> Recipe:
    """A recipe of one epoch over 64 images: 8 batches; `tables` are laid over its own, key by key.

    SimCLR takes two groups of one crop and perturbs the second; the others take one group of four.
    """
    two_views = objective == "simclr"
    moved = ADVERSARIES[adversary] | ({"views": "second"} if two_views and adversary != "none" else {})
    whole: dict[str, Any] = {
        "schema": 1,
        "name": "tiny",
        "data": {"dataset": "folder", "root": "images"},
        "crops": [{"count": 1, "size": 8}] * 2 if two_views else [{"count": 4, "size": 8}],
        "model": {"width": 8, "hidden_dim": 16, "embedding_dim": 8},
        "objective": OBJECTIVES[objective],
        "adversary": moved,
        "train": {"epochs": 1.0, "batch_size": 8, "precision": "float32", "log_every": 1},
    }
    for name, table in tables.items():
        whole[name] = {**whole.get(name, {}), **table} if isinstance(table, Mapping) else table
    return Recipe.model_validate(whole)
