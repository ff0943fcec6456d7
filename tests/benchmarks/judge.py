"""A judge of encoders that shares nothing with the engine: clean and PGD accuracy of a plain linear head.

It reads a safetensors file (keys: backbone.* as torchvision's resnet18, pre_feature.{0,1}.*, projector.{0,1,3}.*),
fits linear heads by Adam on the clean `pre_feature` outputs of the whole training set, and attacks encoder and head
with PGD-20 (Madry et al., arXiv:1706.06083): L-inf, step size .01, from zero. Images are in [0, 1]. Robust accuracy
depends on how far the head is fitted, so there are two: "converged", and "short", 20 epochs at 3e-4 as the official
evaluation has it.
Example: python tests/benchmarks/judge.py runs/ID/checkpoints/step-00001500/model.safetensors ~/.cache/cifar10-jpeg
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import emit, machine
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms.functional import pil_to_tensor

BATCH = 250


def read_folder(folder: Path, *, limit: int | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, 3, H, W) uint8, labels (N,) and class names of an image folder.

    The order goes round the classes (the first image of each, then the second of each), so that the first `limit`
    images are balanced.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        raise FileNotFoundError(f"{folder} holds no class folders")
    files = [
        (rank, label, path)
        for label, name in enumerate(names)
        for rank, path in enumerate(sorted((folder / name).iterdir()))
    ]
    files = sorted(files)[:limit]

    with Image.open(files[0][2]) as first:
        size = (first.height, first.width)
    images = torch.empty(len(files), 3, *size, dtype=torch.uint8)

    def decode(index: int) -> None:
        with Image.open(files[index][2]) as image:
            images[index] = pil_to_tensor(image.convert("RGB"))

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(decode, range(len(files)), chunksize=500))
    return images, torch.tensor([label for _, label, _ in files]), names


class NarrowResNet18(ResNet):  # type: ignore[misc]
    """torchvision's ResNet-18 with `width` instead of 64 channels in its first stage, CIFAR stem, no classifier."""

    def __init__(self, width: int) -> None:
        self._width = width
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.fc = nn.Identity()

    def _make_layer(
        self, block: type[nn.Module], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self._width
        layer: nn.Sequential = super()._make_layer(block, planes * self._width // 64, blocks, stride, dilate)
        return layer


def load_encoder(path: Path, *, prefix: str = "") -> nn.Sequential:
    """The frozen feature extractor (N, 3, H, W) in [0, 1] -> (N, hidden), its sizes read off the file."""
    tensors = {
        key.removeprefix(prefix): value.float() for key, value in load_file(path).items() if key.startswith(prefix)
    }
    if "backbone.conv1.weight" not in tensors:
        raise KeyError(f"{path} has no {prefix}backbone.conv1.weight; it has {sorted(load_file(path))[:5]}")
    backbone = NarrowResNet18(tensors["backbone.conv1.weight"].shape[0])
    hidden, features = tensors["pre_feature.0.weight"].shape
    linear, norm = nn.Linear(features, hidden), nn.BatchNorm1d(hidden)
    parts: list[tuple[str, nn.Module]] = [("backbone.", backbone), ("pre_feature.0.", linear), ("pre_feature.1.", norm)]
    for name, module in parts:
        own = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
        missing, unexpected = module.load_state_dict(own, strict=False)
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise KeyError(f"{path}: {name} lacks {missing} and has unknown {unexpected}")
    return fold_batch_norm(backbone, linear, norm)


def fold_batch_norm(backbone: NarrowResNet18, linear: nn.Linear, norm: nn.BatchNorm1d) -> nn.Sequential:
    """The same function in eval mode, each batch norm multiplied into the layer before it, weights frozen."""
    backbone.eval()
    norm.eval()
    linear.eval()
    owners = [
        backbone,
        *(block for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4) for block in layer),
    ]
    for owner in owners:
        for number in ("1", "2"):
            if hasattr(owner, f"bn{number}"):
                fused = fuse_conv_bn_eval(getattr(owner, f"conv{number}"), getattr(owner, f"bn{number}"))
                setattr(owner, f"conv{number}", fused)
                setattr(owner, f"bn{number}", nn.Identity())
        if isinstance(getattr(owner, "downsample", None), nn.Sequential):
            owner.downsample = fuse_conv_bn_eval(owner.downsample[0], owner.downsample[1])
    folded = fuse_linear_bn_eval(linear, norm)
    encoder = nn.Sequential(backbone, folded, nn.ReLU()).to(memory_format=torch.channels_last)
    return encoder.eval().requires_grad_(False)


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 in [0, 1], channels last."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract(encoder: nn.Module, images: Tensor) -> Tensor:
    """Features (N, hidden) of uint8 images."""
    return torch.cat([encoder(to_float(block)) for block in torch.split(images, BATCH)])


def fit_head(
    features: Tensor, labels: Tensor, *, classes: int, seed: int = 0, max_epochs: int = 200
) -> tuple[nn.Linear, dict[str, object]]:
    """A linear classifier fitted by Adam until its training loss stands still at each of three learning rates.

    Features are standardised for the fit, and the standardisation is folded into the head. Cross-entropy, no
    regularisation, batches of 500; a learning rate is left after three epochs in a row that did not lower the best
    loss by 0.1 %.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / std
    head = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters())
    order = torch.Generator().manual_seed(seed)
    best = math.log(classes)
    epochs = 0
    for lr in (1e-3, 1e-4, 1e-5):
        optimizer.param_groups[0]["lr"] = lr
        still = 0
        while still < 3 and epochs < max_epochs:
            for rows in torch.split(torch.randperm(len(x), generator=order), 500):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(head(x[rows]), labels[rows]))
                optimizer.step()
            epochs += 1
            with torch.no_grad():
                logits = head(x)
                loss = F.cross_entropy(logits, labels).item()
            still = still + 1 if loss > best * 0.999 else 0
            best = min(best, loss)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    with torch.no_grad():
        head.weight.div_(std)
        head.bias.sub_(head.weight @ mean)
    report = {"epochs": epochs, "train_loss": loss, "train_accuracy": accuracy, "converged": epochs < max_epochs}
    return head.requires_grad_(False), report


def fit_short(features: Tensor, labels: Tensor, *, classes: int, seed: int = 0) -> tuple[nn.Linear, dict[str, object]]:
    """A linear classifier by Adam, learning rate 3e-4, batches of 256, 20 epochs, features as they are."""
    order = torch.Generator().manual_seed(seed)
    head = nn.Linear(features.shape[1], classes)
    bound = features.shape[1] ** -0.5
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=order).mul_(2 * bound).sub_(bound))
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-4)
    for _ in range(20):
        for rows in torch.split(torch.randperm(len(features), generator=order), 256):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(head(features[rows]), labels[rows]))
            optimizer.step()
    with torch.no_grad():
        logits = head(features)
    loss, accuracy = F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
    return head.requires_grad_(False), {"epochs": 20, "train_loss": loss, "train_accuracy": accuracy}


def pgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, step_size: float, steps: int) -> tuple[Tensor, Tensor]:
    """Whether each image of x (N, 3, H, W) in [0, 1] is still right at the last iterate, and at every iterate.

    Ball and box are checked here for the images that are counted.
    """
    adversarial: Tensor = x.clone()
    always = torch.ones(len(x), dtype=torch.bool)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        logits = model(adversarial)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), adversarial)
        always &= logits.detach().argmax(1) == y
        with torch.no_grad():
            stepped = adversarial.add(grad.sign(), alpha=step_size)
            adversarial = torch.min(torch.max(stepped, x - eps), x + eps).clamp(0, 1)
    if (adversarial - x).abs().max() > eps + 1e-6 or adversarial.min() < 0 or adversarial.max() > 1:
        raise RuntimeError("an adversarial image left the ball or the box")
    with torch.no_grad():
        last = model(adversarial).argmax(1) == y
    return last, always & last


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def judge(
    encoder: nn.Module,
    folder: Path,
    *,
    eps: list[str],
    limit: int | None,
    train_limit: int | None = None,
    step_size: float = 0.01,
    steps: int = 20,
) -> dict[str, Any]:
    """Clean accuracy and accuracy under PGD at each eps under both heads, as a record with n and Wilson intervals."""
    started = time.perf_counter()
    train_images, train_labels, names = read_folder(folder / "train", limit=train_limit)
    test_images, labels, test_names = read_folder(folder / "test", limit=limit)
    if names != test_names:
        raise ValueError(f"{folder}: the classes of train and test differ")
    features = extract(encoder, train_images)
    heads = {
        "converged": fit_head(features, train_labels, classes=len(names)),
        "short": fit_short(features, train_labels, classes=len(names)),
    }
    del features
    fitted = time.perf_counter()
    return {
        "threat": {"norm": "linf", "space": "image", "step_size": step_size, "steps": steps, "start": "zero"},
        "head": {"kind": "linear", "features": "pre_feature", "train_images": len(train_labels)},
        "heads": {
            name: {
                **fit,
                "results": attacked(
                    nn.Sequential(encoder, head), test_images, labels, eps=eps, step_size=step_size, steps=steps
                ),
            }
            for name, (head, fit) in heads.items()
        },
        "seconds": {"heads": fitted - started, "attacks": time.perf_counter() - fitted},
    }


def attacked(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: list[str], step_size: float, steps: int
) -> dict[str, dict[str, Any]]:
    """Clean accuracy and accuracy under PGD at each eps, each with n and its interval."""
    with torch.no_grad():
        clean = torch.cat([model(to_float(block)).argmax(1) for block in torch.split(images, BATCH)]) == labels

    def entry(last: Tensor, always: Tensor) -> dict[str, Any]:
        right, n = int(last.sum()), len(last)
        return {
            "accuracy": right / n,
            "interval95": wilson(right, n),
            "right": right,
            "right_at_every_iterate": int(always.sum()),
            "n": n,
        }

    results = {"clean": entry(clean, clean)}
    for text in eps:
        # An image that is wrong as it is counts as wrong: delta = 0 lies in the ball.
        last, always = torch.zeros_like(clean), torch.zeros_like(clean)
        for rows in torch.split(clean.nonzero().flatten(), BATCH):
            last[rows], always[rows] = pgd(
                model,
                to_float(images[rows]),
                labels[rows],
                eps=float(Fraction(text)),
                step_size=step_size,
                steps=steps,
            )
        results[f"pgd-{steps} {text}"] = entry(last, always)
        print(f"pgd-{steps} {text}: {int(last.sum())} of {len(last)} right", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path, nargs="+", help="safetensors files; several print several records")
    parser.add_argument("folder", type=Path, help="image folder with train/<class>/ and test/<class>/")
    parser.add_argument("--prefix", default="", help="what stands before backbone. in the file's keys")
    parser.add_argument("--eps", action="append", help="radius, repeatable (default: 4/255 and 8/255)")
    parser.add_argument("--limit", type=int, help="judge the first N test images, balanced (default: all)")
    parser.add_argument("--train-limit", type=int, help="fit on the first N training images (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    records: dict[str, object] = {}
    rows = [["encoder", "head", "test", "accuracy", "95 % interval", "n"]]
    for path in options.encoder:
        record = judge(
            load_encoder(path, prefix=options.prefix),
            options.folder,
            eps=options.eps or ["4/255", "8/255"],
            limit=options.limit,
            train_limit=options.train_limit,
        )
        records[str(path)] = record
        for head, fitted in record["heads"].items():
            for name, entry in fitted["results"].items():
                low, high = entry["interval95"]
                cells = [path.stem, head, name, f"{entry['accuracy']:.4f}", f"{low:.4f}-{high:.4f}", str(entry["n"])]
                rows.append(cells)
    emit({"machine": machine(), "encoders": records}, title="Linear heads on frozen pre_feature outputs", rows=rows)


if __name__ == "__main__":
    main()
