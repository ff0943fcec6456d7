"""Exports a run's classifier as ONNX and as torch.export's archive, and holds both against the live model.

The live model is encoder and linear head of a run. Each file is read back by its own runtime, which classifies the
first test images and adversarial examples of them that PGD found with the live model (Madry et al., arXiv:1706.06083;
L-inf, from zero). It stops at the first step that misclassifies an image, near the border between two classes, where
rounding would show first; an image that was misclassified as it is stays as it is.
`pip install 'cfamc[onnx]'` first. Example:
python tests/benchmarks/export_round_trip.py runs/ID ~/.cache/cifar10-jpeg --head linear
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from heads import probe_of
from judge import read_folder, wilson
from machine import emit, machine
from torch import Tensor

from cfamc_cli.engine import export
from cfamc_cli.engine.attacks.pgd import pgd
from cfamc_cli.engine.attacks.search import Region
from cfamc_cli.engine.heads.classifier import Classifier, load_classifier, load_encoder
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.store.records import Format, ProbeRecord, load_record
from cfamc_cli.store.runs import HEAD, RunFolder

BATCH = 250
FORMATS: tuple[Format, ...] = ("onnx", "pt2")
_ROUNDING = 1e-6  # by which an example may leave the ball
_PACKAGES = ("cfamc", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime")


def adversarial(classifier: Classifier, x: Tensor, y: Tensor, *, eps: float, step_size: float, steps: int) -> Tensor:
    """PGD against the live model, held to ball and box, (N, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for images, labels in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
        found = pgd(
            classifier,
            Region.around(images, eps=eps, norm="linf"),
            labels,
            step_size=step_size,
            steps=steps,
            restarts=1,
            start="zero",
            generator=generator,
        )
        parts.append(found.detach())
    points = torch.cat(parts)
    if (points - x).abs().max() > eps + _ROUNDING or points.min() < 0 or points.max() > 1:
        raise RuntimeError("an adversarial image left the ball or the box")
    return points


@torch.no_grad()
def logits_of(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Logits (N, C), by batches."""
    return torch.cat([forward(block) for block in torch.split(x, BATCH)])


def agreement(live: Tensor, found: Tensor, labels: Tensor) -> dict[str, object]:
    """How the logits of a file compare with those of the live model, both (N, C)."""
    return {
        "n": len(live),
        "equal_predictions": int((found.argmax(1) == live.argmax(1)).sum()),
        "largest_logit_difference": float((found - live).abs().max()),
        "largest_logit": float(live.abs().max()),
        "right": int((found.argmax(1) == labels).sum()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("folder", type=Path, help="image folder with test/<class>/")
    parser.add_argument("--head", default="linear", help="part of the name of the run's probe")
    parser.add_argument("--limit", type=int, default=1000, help="test images, balanced")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--step-size", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    run, probe = RunFolder(options.run), probe_of(options.run, options.head)
    images, labels, names = read_folder(options.folder / "test", limit=options.limit)
    record = load_record(probe / "record.json", ProbeRecord)
    if names != [entry.name for entry in record.classes]:
        raise ValueError(f"{options.folder} has the classes {names}, not those of {probe}, in their order")
    device = torch.device("cpu")
    recipe = run.recipe()
    loaded = load_encoder(run.checkpoints, recipe.model, device=device, talk=NullTalk())
    classifier = load_classifier(loaded, record, probe / HEAD, recipe)
    subject = export.classifier_of(classifier, recipe.model, device=device)

    x = images.float() / 255
    attack = {"step_size": options.step_size, "steps": options.steps}
    points = adversarial(classifier, x, labels, eps=float(Fraction(options.eps)), **attack)
    sets = {"clean": x, f"pgd-{options.steps} {options.eps}": points}
    live = {name: logits_of(classifier, batch) for name, batch in sets.items()}
    right = {name: int((logits.argmax(1) == labels).sum()) for name, logits in live.items()}

    files: dict[str, dict[str, object]] = {}
    rows = [["file", "images", "equal predictions", "n", "largest logit difference"]]
    for wanted in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            path, started = Path(folder, f"classifier.{wanted}"), time.perf_counter()
            export.write(subject, path, export.some_images(images), data=record.test, wanted=wanted)
            written = time.perf_counter() - started
            reader, forward = export.read_back(subject, path, wanted=wanted)
            found = {name: agreement(live[name], logits_of(forward, batch), labels) for name, batch in sets.items()}
            files[wanted] = {"reader": reader, "bytes": path.stat().st_size, "export_seconds": written, "images": found}
        for name, result in found.items():
            difference = f"{result['largest_logit_difference']:.2g}"
            rows.append([f"{wanted} ({reader})", name, str(result["equal_predictions"]), str(result["n"]), difference])
            print(f"{wanted} {name}: {result['equal_predictions']} of {result['n']} equal", file=sys.stderr)

    result = {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "run": options.run.name,
        "probe": probe.name,
        "head_digest": record.head_digest,
        "n": len(x),
        "threat": {"norm": "linf", "space": "image", "eps": options.eps, "start": "zero", **attack},
        "live": {
            name: {"right": count, "n": len(x), "interval95": wilson(count, len(x))} for name, count in right.items()
        },
        "files": files,
    }
    emit(result, title=f"Exports of {options.run.name}, {probe.name}, beside the live model", rows=rows)


if __name__ == "__main__":
    main()
