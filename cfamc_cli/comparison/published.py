"""What arXiv:2501.03507 reports, as rows of the comparison; never ranked with what was measured here."""

from __future__ import annotations

from dataclasses import dataclass

from cfamc_cli.comparison.tables import Condition


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the published table, in percent; nothing of it was measured here."""

    system: str
    epochs: int
    minutes: int
    clean: float
    robust: float


_PUBLISHED = {  # arXiv:2501.03507, ResNet-18, linear head: epochs, minutes, then clean, PGD 4/255, PGD 8/255 a data set
    "Patch-based EMP-SSL, 16 patches, PGD-5": (30, 530, (61.0, 37.65, 16.95), (39.26, 14.38, 4.22)),
    "Crop-based EMP-SSL, 16 crops, PGD-5": (30, 530, (76.55, 53.3, 28.49), (51.71, 33.88, 19.35)),
    "Crop-based SimCLR, 2 crops, PGD-5": (500, 934, (72.86, 47.98, 16.81), (44.57, 19.84, 5.68)),
    "Patch-based SimCLR, 2 patches, PGD-5": (500, 934, (65.44, 41.85, 17.19), (43.71, 21.87, 8.33)),
    "Patch-based EMP-FreeAdv, 16 patches, m = 3": (10, 97, (61.83, 42.28, 21.53), (40.31, 23.78, 12.13)),
    "Crop-based SimCLR-FreeAdv, 2 crops, m = 3": (167, 157, (70.25, 48.34, 24.5), (47.64, 26.53, 11.7)),
    "CF-AMC-SSL, 16 crops, m = 3": (10, 97, (75.88, 55.97, 33.34), (50.74, 31.73, 17.19)),
}


def published() -> dict[Condition, list[Published]]:
    """Return the published tables by what they were measured under; digest of the data and steps are not published.

    Source:
        Ghofrani and Jamshidi, Cost-Free Adversarial Multi-Crop Self-Supervised Learning, arXiv:2501.03507.
    """
    tables = {}
    for at, dataset in enumerate(("cifar10", "cifar100")):
        for size, eps in enumerate(("4/255", "8/255"), start=1):
            condition = Condition(dataset, "test", "", "linear", "pre_feature", "image", "linf", eps, "pgd")
            tables[condition] = [
                Published(system, epochs, minutes, accuracies[at][0], accuracies[at][size])
                for system, (epochs, minutes, *accuracies) in _PUBLISHED.items()
            ]
    return tables
