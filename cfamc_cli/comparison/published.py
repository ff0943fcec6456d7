"""What others report of a ResNet-18, as rows of the comparison; never ranked with what was measured here.

Each table is of one protocol: the data, what the head is and reads, and the attack. RobustSSL's modes are heads of
ours: SLF is linear, ALF robust-linear, AFF finetune, each on the backbone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from cfamc_cli.comparison.tables import Condition


@dataclass(frozen=True, slots=True)
class Published:
    """A row of a published table, in percent; nothing of it was measured here."""

    system: str
    clean: float | None  # None where only the robust accuracy is told
    robust: float
    source: str  # where it stands, of which date
    epochs: int | None = None
    minutes: int | None = None


_PAPER = "arXiv:2501.03507, ResNet-18"  # linear head: epochs, minutes, then clean, PGD 4/255, PGD 8/255 a data set
_OF_THE_PAPER = {
    "Patch-based EMP-SSL, 16 patches, PGD-5": (30, 530, (61.0, 37.65, 16.95), (39.26, 14.38, 4.22)),
    "Crop-based EMP-SSL, 16 crops, PGD-5": (30, 530, (76.55, 53.3, 28.49), (51.71, 33.88, 19.35)),
    "Crop-based SimCLR, 2 crops, PGD-5": (500, 934, (72.86, 47.98, 16.81), (44.57, 19.84, 5.68)),
    "Patch-based SimCLR, 2 patches, PGD-5": (500, 934, (65.44, 41.85, 17.19), (43.71, 21.87, 8.33)),
    "Patch-based EMP-FreeAdv, 16 patches, m = 3": (10, 97, (61.83, 42.28, 21.53), (40.31, 23.78, 12.13)),
    "Crop-based SimCLR-FreeAdv, 2 crops, m = 3": (167, 157, (70.25, 48.34, 24.5), (47.64, 26.53, 11.7)),
    "CF-AMC-SSL, 16 crops, m = 3": (10, 97, (75.88, 55.97, 33.34), (50.74, 31.73, 17.19)),
}

_BOARD = "robustssl.github.io of 2023-12-12, ResNet-18, vanilla fine-tuning, standard AutoAttack"
_MODES = ("linear", "robust-linear", "finetune")
_ON_THE_BOARD: dict[str, dict[str, tuple[tuple[float, float] | None, ...]]] = {  # AutoAttack 8/255 and clean a mode
    "cifar10": {
        "DynACL-AIR++": ((46.99, 81.80), (48.23, 79.56), (50.79, 82.36)),
        "DynACL++": ((46.54, 79.82), (47.98, 78.81), (50.34, 81.93)),
        "DynACL-AIR": ((45.17, 78.08), (46.14, 77.42), (50.58, 82.74)),
        "DynACL": ((45.09, 75.41), (45.67, 72.97), (50.52, 81.86)),
        "DynACL-RCS": ((44.29, 77.14), (45.75, 74.95), (49.63, 80.70)),
        "DeACL": ((43.27, 79.94), (41.99, 77.71), (44.96, 78.29)),
        "AdvCL, from an ImageNet model": ((43.18, 82.36), (44.05, 80.04), (49.61, 83.00)),
        "A-InfoNCE, from an ImageNet model": ((42.72, 83.70), (43.28, 80.30), (49.73, 82.99)),
        "ACL": ((39.17, 78.22), (40.60, 75.53), (49.60, 81.25)),
        "TARO, as its paper says": ((35.81, 78.45), None, None),
        "RoCL": ((26.12, 77.90), (29.69, 75.62), (45.02, 78.51)),
    },
    "cifar100": {
        "DynACL-AIR++": ((20.61, 53.93), (22.96, 52.09), (25.58, 57.57)),
        "A-InfoNCE, from an ImageNet model": ((20.41, 50.06), (19.53, 44.78), (25.11, 58.08)),
        "DynACL-AIR": ((20.13, 46.19), (21.53, 45.46), (25.97, 57.75)),
        "DynACL++": ((20.07, 52.16), (22.24, 49.92), (25.21, 57.30)),
        "DynACL-RCS": ((19.38, 43.04), (20.31, 41.28), (24.77, 56.92)),
        "DynACL": ((19.30, 45.83), (20.69, 43.58), (24.88, 57.43)),
        "AdvCL, from an ImageNet model": ((19.10, 44.60), (18.19, 39.85), (25.26, 58.29)),
        "ACL": ((17.30, 45.82), (19.07, 43.49), (24.78, 57.74)),
        "RoCL": ((8.72, 42.93), None, None),
    },
}
_ASTRA = "Chhipa et al., ICLR 2025 (ASTrA), ResNet-18, standard AutoAttack"

_ROBUSTBENCH = "RobustBench of 2025-03-31, ResNet-18, supervised, standard AutoAttack"
_SUPERVISED = {  # AutoAttack 8/255 and clean; the board has them without additional data
    "cifar10": {
        "Sehwag et al., ICLR 2022 (10 M synthetic images)": (55.54, 84.59),
        "DAJAT, NeurIPS 2022": (52.48, 85.71),
        "OA-AT, ECCV 2022": (51.06, 80.24),
        "DNR, ASP-DAC 2021": (40.41, 87.32),
        "CURE, CVPR 2019": (38.50, 83.11),
        "Jin and Rinard, arXiv 2020": (1.35, 90.84),
    },
    "cifar100": {"DAJAT, NeurIPS 2022": (27.67, 65.45)},
}


def published() -> dict[Condition, list[Published]]:
    """Return the published tables by what they were measured under; a digest of the data is not published.

    Nor are the steps of the paper's PGD; AutoAttack has none to choose, and stands with its version.

    Source:
        Ghofrani and Jamshidi, Cost-Free Adversarial Multi-Crop Self-Supervised Learning, arXiv:2501.03507; leaderboard/
        of RobustSSL/RobustSSL.github.io; model_info/ of RobustBench/robustbench.
    """
    tables: dict[Condition, list[Published]] = defaultdict(list)
    for at, dataset in enumerate(("cifar10", "cifar100")):
        for size, eps in enumerate(("4/255", "8/255"), start=1):
            condition = Condition(dataset, "test", "", "linear", "pre_feature", "image", "linf", eps, "pgd")
            for system, (epochs, minutes, *accuracies) in _OF_THE_PAPER.items():
                clean, robust = accuracies[at][0], accuracies[at][size]
                tables[condition].append(Published(system, clean, robust, _PAPER, epochs, minutes))
        for place, head in enumerate(_MODES):
            of_mode = [(system, modes[place]) for system, modes in _ON_THE_BOARD[dataset].items()]
            rows = [Published(system, pair[1], pair[0], _BOARD) for system, pair in of_mode if pair is not None]
            tables[_autoattack(dataset, head)] = sorted(rows, key=lambda row: -row.robust)
        rows = [
            Published(system, clean, robust, _ROBUSTBENCH) for system, (robust, clean) in _SUPERVISED[dataset].items()
        ]
        tables[_autoattack(dataset, "supervised")] = rows
    tables[_autoattack("cifar100", "linear")].insert(0, Published("ASTrA++", None, 21.95, _ASTRA))
    return dict(tables)


def _autoattack(dataset: str, head: str) -> Condition:
    """The boards' protocol: the standard version at 8/255 on the whole test set, on heads that read the backbone."""
    attack = ("autoattack", "version standard")
    return Condition(dataset, "test", "", head, "backbone", "image", "linf", "8/255", *attack)
