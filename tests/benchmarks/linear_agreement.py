"""Holds the converged linear head of a run against scikit-learn's logistic regression on the same encoder.

The other side shares nothing with ours: it reads the images, runs the encoder and fits the head by itself. Both
minimise mean cross-entropy + l2 |W|^2, biases free, from zero to convergence.
Example: cfamc probe runs/ID --head linear --protocol converged
python tests/benchmarks/linear_agreement.py ~/.cache/cifar10-jpeg --run runs/ID
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from judge import extract, load_encoder, read_folder, wilson
from machine import emit, machine
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="image folder with train/<class>/ and test/<class>/")
    parser.add_argument("--run", type=Path, required=True, help="a run with a probe of protocol converged")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    probes = [(path, json.loads(path.read_text())) for path in sorted(options.run.glob("probes/*/record.json"))]
    path, probe = next(
        (path, record) for path, record in probes if record["converged"] and not record["settings"]["standardize"]
    )
    l2 = probe["settings"]["l2"]
    ours = load_file(path.parent / "head.safetensors")

    (encoder_file,) = sorted(options.run.glob("checkpoints/*/model.safetensors"))[-1:]
    encoder = load_encoder(encoder_file)
    sets = {split: read_folder(options.folder / split)[:2] for split in ("train", "test")}
    features = {split: extract(encoder, images).double() for split, (images, _) in sets.items()}
    labels = {split: y.numpy() for split, (_, y) in sets.items()}

    started = time.perf_counter()
    solver = LogisticRegression(C=1 / (2 * l2 * len(labels["train"])), tol=1e-6, max_iter=options.iterations)
    solver.fit(features["train"].numpy(), labels["train"])
    seconds = time.perf_counter() - started

    weight = next(value for name, value in ours.items() if name.endswith("weight")).double()
    bias = next(value for name, value in ours.items() if name.endswith("bias")).double()
    record: dict[str, object] = {
        "machine": machine(),
        "run": options.run.name,
        "probe": probe["id"],
        "l2": l2,
        "iterations": int(solver.n_iter_[0]),
        "seconds": seconds,
    }
    rows = [["split", "n", "ours", "scikit-learn", "95 % interval of it", "equal predictions"]]
    for split, y in labels.items():
        mine = (features[split] @ weight.T + bias).argmax(1).numpy()
        theirs = solver.predict(features[split].numpy())
        right, n = int((theirs == y).sum()), len(y)
        low, high = wilson(right, n)
        equal = float((mine == theirs).mean())
        record[split] = {
            "n": n,
            "ours": float((mine == y).mean()),
            "scikit_learn": right / n,
            "interval95": (low, high),
            "equal_predictions": equal,
        }
        rows.append(
            [split, str(n), f"{(mine == y).mean():.4f}", f"{right / n:.4f}", f"{low:.4f}-{high:.4f}", f"{equal:.4f}"]
        )
    emit(record, title=f"Linear head to convergence, l2 {l2}", rows=rows)


if __name__ == "__main__":
    main()
