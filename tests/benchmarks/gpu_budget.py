"""What a weight update of each phase of a recipe costs a GPU, term by term: counted on `meta`, at assumed rates.

Counted: every operation's floating-point operations (2 per multiply-add) and the bytes it reads and writes, as the
tensors' sizes say, for the encoder in bfloat16, the crops, objective, optimizer and adversary in float32. Assumed: what
share of the card's peak rates a kernel reaches, and that each takes the longer of its arithmetic and its traffic.
The pass that finds clusters and the average of the weights are left out. Nothing is timed and no GPU is needed; caches
that spare traffic, and gaps between kernels, are not seen.
Example: python tests/benchmarks/gpu_budget.py recipes/cifar10.toml
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from machine import emit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cfamc_cli.engine.adversary import build_adversary
from cfamc_cli.engine.crops import crop_batch, sample_parameters
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.objectives import objective_loss
from cfamc_cli.engine.optim import build_optimizer
from cfamc_cli.recipe.file import load
from cfamc_cli.recipe.plan import plan
from cfamc_cli.recipe.schema import Recipe

TRAFFIC = 3.35e12  # bytes/s of an H100 SXM's memory, as its maker says
PEAK = {torch.bfloat16: 989e12, torch.float32: 67e12}  # operations/s of its dense matrix units, and of float32
REACHED = {"arithmetic": 0.5, "traffic": 0.8}  # shares of them, assumed
LINK = 300e9  # bytes/s that each of several cards sums gradients with, assumed
FUSED = {"aten::relu", "aten::relu_", "aten::threshold_backward", "aten::add"}  # a compiler does them in passing
COMPILED = ("adversary", "encoder, forward", "encoder, backward")


class Count(TorchDispatchMode):
    """Sums work by section and kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.section = ""
        self.rows: list[tuple[str, str, float, float, torch.dtype]] = []  # section, name, operations, bytes, dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.is_meta]
        flops = flop_registry.get(func._overloadpacket)
        work = flops(*args, **(kwargs or {}), out_val=out) if flops is not None else 0
        size = sum(t.numel() * t.element_size() for t in moved)
        if moved:
            self.rows.append((self.section, func._schema.name, float(work), float(size), moved[0].dtype))
        return out

    @contextmanager
    def of(self, section: str) -> Iterator[None]:
        self.section = section
        yield
        self.section = ""


def seconds(row: tuple[str, str, float, float, torch.dtype]) -> float:
    """The longer of arithmetic and traffic."""
    _, _, work, size, dtype = row
    peak = PEAK.get(dtype, PEAK[torch.float32])
    return max(work / (peak * REACHED["arithmetic"]), size / (TRAFFIC * REACHED["traffic"]))


def counted(recipe: Recipe, *, share: float) -> Count:
    """One batch of a recipe without phases, of which this card has a share: crops once, then one replay."""
    images = max(1, round(recipe.train.batch_size * share))
    size = recipe.data.size or 32
    meta = torch.device("meta")
    encoder = Encoder(recipe.model).to(memory_format=torch.channels_last).to(meta, torch.bfloat16)
    optimizer = build_optimizer(
        [torch.nn.Parameter(p.detach().float()) for p in encoder.parameters()], recipe.optimizer
    )
    adversary = build_adversary(recipe.adversary)
    generator = torch.Generator().manual_seed(0)
    torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign,assignment,misc]  # there is no card
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[misc,assignment]  # it does not know meta
    batch = torch.empty(images, 3, size, size, dtype=torch.uint8, device=meta)
    count = Count()
    with count:
        with count.of("crops"):
            crops = []
            for group in recipe.crops:
                drawn = sample_parameters(images, size, size, group=group, augment=recipe.augment, generator=generator)
                crops.append(crop_batch(batch, drawn, size=group.size))
        adversary.begin(crops, [generator] * len(crops))
        with count.of("adversary"):
            moved = adversary.perturb(
                lambda groups: encoder.embed([group.bfloat16() for group in groups]).float().sum()
            )
            given = [part.bfloat16().flatten(0, 1) for part in [*adversary.spared, *moved]]
        with count.of("encoder, forward"):
            embedded = [encoder(part) for part in given]
        with count.of("objective"):  # every card sees the whole batch's embeddings
            shape = recipe.views, recipe.train.batch_size, recipe.model.embedding_dim
            whole = torch.empty(shape, device=meta, requires_grad=True)
            labels = torch.empty(shape[1], dtype=torch.int64, device=meta)
            objective_loss(whole, labels, objective=recipe.objective).loss.backward()
        with count.of("encoder, backward"):
            torch.autograd.backward(embedded, [torch.empty_like(z) for z in embedded])
        with count.of("adversary"):
            adversary.ascend()
        for parameter in optimizer.parameters:
            parameter.grad = torch.empty_like(parameter)
        with count.of("optimizer"):
            optimizer.step(lr=0.1)
    return count


def terms_of(recipe: Recipe, *, cards: int) -> dict[str, dict[str, float]]:
    """What one weight update of a recipe without phases costs each of several cards, by section."""
    terms: dict[str, dict[str, float]] = {}
    for row in counted(recipe, share=1 / cards).rows:
        section, name, work, size, _ = row
        if not section:
            continue
        per_update = 1 / recipe.replays if section == "crops" else 1
        term = terms.setdefault(section, dict.fromkeys(("operations", "tflop", "gigabytes", "ms", "ms_fused"), 0.0))
        term["operations"] += per_update
        term["tflop"] += per_update * work / 1e12
        term["gigabytes"] += per_update * size / 1e9
        term["ms"] += per_update * seconds(row) * 1e3
        fused = name in FUSED and section in COMPILED
        term["ms_fused"] += 0 if fused else per_update * seconds(row) * 1e3
    if cards > 1:  # a ring sends each gradient almost twice; it is hidden as far as the backward pass lasts longer
        parameters = plan(recipe).parameters
        summed = 2 * (cards - 1) / cards * 4 * parameters / LINK * 1e3
        terms["gradients summed"] = {"gigabytes": 4 * parameters / 1e9, "ms": summed, "ms_fused": summed}
    return terms


def budget(recipe: Recipe, *, cards: int) -> dict[str, Any]:
    """The terms of a weight update of each phase on each of several cards, in ms, and the minutes of the whole run."""
    phases, minutes = [], {"ms": 0.0, "ms_fused": 0.0}
    for part in recipe.parts():
        terms, updates = terms_of(part, cards=cards), plan(part).weight_updates
        phases.append({"weight_updates": updates, "terms": terms})
        for key in minutes:
            minutes[key] += updates * sum(term[key] for term in terms.values()) / 60e3
    return {"cards": cards, "phases": phases, "minutes": minutes["ms"], "minutes_fused": minutes["ms_fused"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--arithmetic", type=float, default=REACHED["arithmetic"], help="assumed share of the peak")
    parser.add_argument("--traffic", type=float, default=REACHED["traffic"], help="assumed share of the peak")
    arguments = parser.parse_args()
    REACHED.update(arithmetic=arguments.arithmetic, traffic=arguments.traffic)
    recipe = load(arguments.recipe)
    found = [budget(recipe, cards=cards) for cards in arguments.cards]
    rows: list[tuple[str, ...]] = [("cards", "phase", "a weight update", "kernels", "TFLOP", "GB", "ms", "ms fused")]
    for part in found:
        for place, phase in enumerate(part["phases"]):
            for name, term in phase["terms"].items():
                keys = ("operations", "tflop", "gigabytes", "ms", "ms_fused")
                texts = [f"{term.get(key, 0):.{digits}f}" for key, digits in zip(keys, (0, 3, 3, 2, 2), strict=True)]
                rows.append((str(part["cards"]), str(place), name, *texts))
        whole = (f"{part[key]:.1f}" for key in ("minutes", "minutes_fused"))
        rows.append((str(part["cards"]), "", "the run, minutes", "", "", "", *whole))
    assumed = {"traffic": TRAFFIC, "peak": {str(kind): peak for kind, peak in PEAK.items()}, "reached": REACHED}
    emit(
        {"recipe": arguments.recipe, "assumed": assumed | {"link": LINK}, "budgets": found},
        title=arguments.recipe,
        rows=rows,
    )


if __name__ == "__main__":
    main()
