"""Times PGD-20 of a linear head: the loop of the official evaluation script beside the evaluation of `cfamc attack`.

The two functions of the official script are read out of a checkout and run as they are, with their net, head, loader
and arguments set from outside; the script itself trains heads at import. Both sides take the same encoder, head, images
and steps. The official loop attacks every image and forms weight gradients; ours attacks what is right as it is.
Example: python tests/benchmarks/evaluation_time.py CHECKOUT ~/.cache/cifar10-jpeg --run runs/ID
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import sys
import time
import types
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from heads import probe_of
from judge import read_folder
from machine import emit, machine, paired_ratio, summary
from official import SIZES, narrow, on_a_cpu
from torch import Tensor, nn

from cfamc_cli.engine.attacks.plan import Plan
from cfamc_cli.engine.evaluation.blocks import BLOCK, evaluate
from cfamc_cli.engine.evaluation.predictor import as_predictor
from cfamc_cli.engine.heads.classifier import Classifier, load_classifier, load_encoder
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.recipe.schema import PgdAttack
from cfamc_cli.store.records import ProbeRecord, load_record
from cfamc_cli.store.runs import HEAD, RECORD, RunFolder

CPU = torch.device("cpu")
STEP_SIZE = 0.01  # of the official evaluation, which fixes it


def official_evaluation(
    checkout: Path, classifier: Classifier, x: Tensor, y: Tensor, *, eps: float, steps: int
) -> Callable[[], float]:
    """The official loop over (x, y) in batches of 100, with the weights of `classifier`; it returns the accuracy."""
    wanted = {"pgd_linf_end2end", "test_central_crop_cls_adv"}
    tree = ast.parse((checkout / "evaluate_empssl.py").read_text())
    functions: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    if len(functions) != len(wanted):
        raise ValueError(f"{checkout}/evaluate_empssl.py lacks one of {sorted(wanted)}")
    with on_a_cpu(checkout):
        narrow(SIZES["laptop"])
        import model.model as official_model  # type: ignore[import-not-found]

        net: nn.Module = official_model.encoder()
    net.load_state_dict(
        {name.replace("projector.", "projection.", 1): value for name, value in classifier.encoder.state_dict().items()}
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=100)
    own = classifier.head
    head = nn.Linear(own.weight.shape[1], own.weight.shape[0])
    weight = own.weight if own.std is None else own.weight / own.std
    head.load_state_dict({"weight": weight, "bias": own.bias if own.mean is None else own.bias - weight @ own.mean})
    scope: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "net": net,
        "LL2": head,
        "testLoader": loader,
        "device": CPU,
        "tqdm": lambda batches: batches,
        "args": types.SimpleNamespace(alpha=STEP_SIZE, iter=steps),
    }
    exec(compile(ast.Module(functions, type_ignores=[]), "evaluate_empssl.py", "exec"), scope)

    def run() -> float:
        with contextlib.redirect_stdout(sys.stderr):
            return float(scope["test_central_crop_cls_adv"](eps))

    return run


def own_evaluation(classifier: Classifier, x: Tensor, y: Tensor, *, eps: str, steps: int) -> Callable[[], float]:
    """What `cfamc attack` does between reading and writing, its verification and cheap checks included."""

    def run() -> float:
        result = evaluate(
            as_predictor(classifier, x[:8], space="image"),
            x,
            y,
            plan=Plan((PgdAttack(name="pgd", eps=eps, step_size=repr(STEP_SIZE), steps=steps),)),
            seed=0,
            block_size=BLOCK,
            device=CPU,
            finished=(),
            commit=lambda outcome, examples: None,
            audit=None,
            label="pgd",
            talk=NullTalk(),
        )
        return sum(result.robust) / len(x)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of the official repository")
    parser.add_argument("folder", type=Path, help="image folder with test/<class>/")
    parser.add_argument("--run", type=Path, required=True, help="folder of a cifar10-laptop run with a linear probe")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, default=1000, help="test images, balanced")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    images, labels, _ = read_folder(options.folder / "test", limit=options.limit)
    x = images.float() / 255
    probe = probe_of(options.run, "linear")
    folder = RunFolder(options.run)
    loaded = load_encoder(folder.checkpoints, folder.recipe().model, device=CPU, talk=NullTalk())
    classifier = load_classifier(loaded, load_record(probe / RECORD, ProbeRecord), probe / HEAD, folder.recipe())
    eps = float(Fraction(options.eps))
    sides = {
        "official": official_evaluation(options.checkout, classifier, x, labels, eps=eps, steps=options.steps),
        "ours": own_evaluation(classifier, x, labels, eps=options.eps, steps=options.steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    accuracy: dict[str, float] = {}
    for _ in range(options.turns):
        for name, run in sides.items():
            started = time.perf_counter()
            accuracy[name] = run()
            seconds[name].append(time.perf_counter() - started)
            print(f"{name}: {accuracy[name]:.4f} in {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)

    ratio = paired_ratio(seconds["ours"], seconds["official"])
    record = {
        "machine": machine(),
        "run": options.run.name,
        "probe": probe.name,
        "eps": options.eps,
        "steps": options.steps,
        "n": len(x),
        "robust_accuracy": accuracy,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "time_ratio": ratio,
    }
    rows = [["", "median s", "robust accuracy"]]
    rows += [[name, f"{summary(seconds[name])['median']:.1f}", f"{accuracy[name]:.4f}"] for name in sides]
    rows.append(["ours / official", f"{ratio:.3f}", ""])
    emit(record, title=f"PGD-{options.steps} {options.eps} on {len(x)} images", rows=rows)


if __name__ == "__main__":
    main()
