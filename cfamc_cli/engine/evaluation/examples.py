"""The adversarial examples of an evaluation that a person asked to see, kept in a file beside its outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from cfamc_cli.engine.checkpoint import read_tensors, write_tensors
from cfamc_cli.engine.evaluation.blocks import Examples, Place
from cfamc_cli.errors import CfamcError
from cfamc_cli.store.records import Outcome


class Gallery:
    """The first examples of an evaluation in the order of their stages, kept as they are found.

    Attributes:
        outcomes: What the evaluation has committed, as it goes on.
    """

    def __init__(self, path: Path, outcomes: Mapping[Place, Outcome], *, block_size: int, wanted: int) -> None:
        self.outcomes = outcomes
        self._path, self._block_size, self._wanted = path, block_size, wanted
        self._found: dict[int, tuple[Tensor, int]] = {}
        if wanted and path.is_file():
            with suppress(CfamcError, KeyError, ValueError):  # then they are made again
                stored = read_tensors(path)
                rows = zip(stored["positions"].tolist(), stored["images"], stored["labels"].tolist(), strict=True)
                self._found = {position: (image, label) for position, image, label in rows}

    def _places(self, outcomes: Mapping[Place, Outcome]) -> dict[int, Place]:
        """Positions of the first examples that the outcomes speak of, each with its block and stage."""
        places = [
            (block * self._block_size + row, (block, stage))
            for (block, stage), outcome in sorted(outcomes.items())
            for row, broken in enumerate(outcome.broken)
            if broken and stage > 0
        ]
        return dict(places[: self._wanted])

    def missing(self) -> set[Place]:
        """Stages of blocks whose examples are wanted and were not kept."""
        return {place for position, place in self._places(self.outcomes).items() if position not in self._found}

    def add(self, outcome: Outcome, examples: Examples) -> None:
        """Keep what is still wanted; to be called before the outcome is committed."""
        wanted = self._places({**self.outcomes, (outcome.block, outcome.stage): outcome})
        rows = zip(examples.positions, examples.images, examples.labels, strict=True)
        new = {position: (image.clone(), label) for position, image, label in rows if position in wanted}
        if new:
            self._found |= new
            kept = sorted(self._found.items())
            tensors = {
                "positions": torch.tensor([position for position, _ in kept]),
                "images": torch.stack([image for _, (image, _) in kept]),
                "labels": torch.tensor([label for _, (_, label) in kept]),
            }
            write_tensors(self._path, tensors)

    def shown(self) -> list[tuple[int, Tensor, int]]:
        """Position, image and predicted label of the first examples."""
        places = sorted(self._places(self.outcomes))
        return [(position, *self._found[position]) for position in places if position in self._found]
