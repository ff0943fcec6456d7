"""Predictors that cheat, each with the check that must fail, and honest ones that must raise none.

`python tests/zoo.py` says how many cheats the audit caught and how many false alarms it gave; `python tests/zoo.py
shrinking quantiser` prints what `cfamc attack --audit` would say of those two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from stages import pgd
from tiny import attack_record, data_used
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, dropout, one_hot

from cfamc_cli.engine.attacks.plan import Plan
from cfamc_cli.engine.attacks.search import Predict
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.evaluation.audit import AuditSettings
from cfamc_cli.engine.evaluation.blocks import Evaluation, evaluate
from cfamc_cli.engine.evaluation.verify import Predictor
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.recipe.schema import Model, Stage
from cfamc_cli.report.audit import audit_paragraph
from cfamc_cli.store.records import Accuracy, ThreatModel

CLASSES, SIDE, EPS = 4, 8, 16 / 255
Net = TypeVar("Net", bound=nn.Module)


def images(classes: int = CLASSES, count: int = 160, side: int = SIDE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of 8 bits, in classes that a net tells apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand((classes, 3, side, side), generator=generator) * 0.4 + 0.3
    y = torch.arange(count) % classes
    noise = torch.randn((count, 3, side, side), generator=generator)
    return ((centres[y] + 0.1 * noise).clamp(0, 1) * 255).round() / 255, y


def trained(
    net: Net, x: Tensor, y: Tensor, *, steps: int, lr: float = 0.01, half: bool = False, eps: float = 0.0
) -> Net:
    """The net after some steps of Adam, in bfloat16 where asked, against free attacks within eps; frozen."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    moved = x.clone()
    for _ in range(steps):
        optimizer.zero_grad()
        moved.requires_grad_(eps > 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = cross_entropy(net(moved).float(), y)
        loss.backward()
        optimizer.step()
        if moved.grad is not None:
            moved = (moved.detach() + eps * moved.grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    net.zero_grad()
    return net.eval()


def small(seed: int = 0, *, classes: int = CLASSES) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, classes)
        )


X, Y = images()
NET, OTHER = (trained(small(seed), X, Y, steps=20) for seed in (0, 1))


def nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the images that a cheat knows, and how far it is in L-inf."""
    distance, place = (x.detach().flatten(1)[:, None] - X.flatten(1)[None]).abs().amax(2).min(1)
    return place, distance


def known(x: Tensor) -> Tensor:
    """The logits of the nearest known image, with the gradient of those of x."""
    z: Tensor = NET(x)
    then: Tensor = NET(X)[nearest(x)[0]]
    return then.detach() + z - z.detach()


def where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *([1] * (yes.dim() - 1))), yes, no)


class Backward(torch.autograd.Function):
    """The identity, whose gradient goes through a function of (images, gradient)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.change(*ctx.saved_tensors, *grads), None


def with_gradient(change: Callable[[Tensor, Tensor], Tensor]) -> Predict:
    return lambda x: NET(Backward.apply(x, change))


def off_grid(x: Tensor) -> Tensor:
    """Which images are not of 8 bits, (N,)."""
    return (x.detach() * 255 - (x.detach() * 255).round()).abs().flatten(1).amax(1) > 1e-3


def keyed_noise(x: Tensor) -> Tensor:
    """Noise (N, classes) that is fixed by the pixels to the last bit."""
    keys = (x.detach().flatten(1).double() * torch.linspace(1e5, 2e5, x[0].numel(), dtype=torch.float64)).sum(1)
    return torch.sin(keys[:, None] * torch.arange(1, CLASSES + 1)).float()


# Cheats of which a pass or two tell


def quantiser(x: Tensor) -> Tensor:
    return NET((x * 16).round() / 16)  # type: ignore[no-any-return]


def detached(x: Tensor) -> Tensor:
    return NET(x.detach())  # type: ignore[no-any-return]


def noisy(x: Tensor) -> Tensor:
    return NET(x + 0.1 * torch.randn_like(x))  # type: ignore[no-any-return]


def dropping(x: Tensor) -> Tensor:
    return NET(dropout(x, 0.3, training=True))  # type: ignore[no-any-return]


def probabilities(x: Tensor) -> Tensor:
    return NET(x).softmax(1)  # type: ignore[no-any-return]


def loud(x: Tensor) -> Tensor:
    return NET(x) * 1e4  # type: ignore[no-any-return]


def just_below_the_scale(x: Tensor) -> Tensor:
    z: Tensor = NET(x)
    top = z.topk(2, dim=1).values
    return z * (55 / (top[:, :1] - top[:, 1:])).detach()


def temperature(x: Tensor) -> Tensor:
    return NET(x) * 1e-6  # type: ignore[no-any-return]


def shifted(x: Tensor) -> Tensor:
    return NET(x) + 1e6  # type: ignore[no-any-return]


def tied(x: Tensor) -> Tensor:
    """The second and third logit are one: the difference of logits ratio is -1 everywhere."""
    z: Tensor = NET(x)
    top = z.topk(3, dim=1)
    return z.scatter(1, top.indices[:, 2:], top.values[:, 1:2])


def compressed(x: Tensor) -> Tensor:
    """All but the largest logit lie within a millionth."""
    z: Tensor = NET(x)
    top, place = z.max(1, keepdim=True)
    rest = z.topk(2, dim=1).values[:, 1:] + 1e-6 * z
    return rest.scatter(1, place, top)


def none_of_these(x: Tensor) -> Tensor:
    """A class that is always next, and never reached."""
    z: Tensor = NET(x)
    return torch.cat((z, z.amax(1, keepdim=True) - 0.01), 1)


def decided(x: Tensor) -> Tensor:
    return one_hot(NET(x).argmax(1), CLASSES).float()


def not_a_number(x: Tensor) -> Tensor:
    z: Tensor = NET(x)
    return torch.where(x[:, 0, 0, :1] > 0.5, torch.nan, z)


def batch_statistics(x: Tensor) -> Tensor:
    norm = NET[1]
    assert isinstance(norm, nn.BatchNorm2d)
    h = batch_norm(NET[0](x), None, None, norm.weight, norm.bias, training=True)
    return NET[2:](h)  # type: ignore[no-any-return]


def gradient_at_test_time(x: Tensor) -> Tensor:
    with torch.enable_grad():
        moved = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(NET(moved).amax(1).sum(), moved)
    return NET((x + 0.02 * grad.sign()).clamp(0, 1))  # type: ignore[no-any-return]


def random_crops(x: Tensor) -> Tensor:
    shift = [int(s) for s in torch.randint(-2, 3, (2,))]
    return NET(x.roll(shift, (2, 3)))  # type: ignore[no-any-return]


def bonus_in_a_crowd(x: Tensor) -> Tensor:
    """Right with many others in the batch, whatever was done to the image; honest on clean images and alone."""
    z: Tensor = NET(x)
    place, distance = nearest(x)
    moved = (distance > 0) & (len(x) >= 20)
    return z + 6 * moved[:, None] * one_hot(Y[place], CLASSES)


def company(x: Tensor) -> Tensor:
    """Each image is seen through the mean of its batch."""
    return NET(x - 0.5 * (x.mean(0, keepdim=True) - 0.5))  # type: ignore[no-any-return]


def two_faced(x: Tensor) -> Tensor:
    """Honest where a gradient is asked for, and sure of what it knows where it is judged."""
    return NET(x) if torch.is_grad_enabled() else known(x)


def for_gradients_another(x: Tensor) -> Tensor:
    return OTHER(x) if torch.is_grad_enabled() else NET(x)  # type: ignore[no-any-return]


# Cheats that an audit has to look for


def flat(x: Tensor) -> Tensor:
    """The same to the last bit inside the ball, with honest gradients."""
    return where(nearest(x)[1] <= 1.01 * EPS, known(x), NET(x))


def flat_for_a_third(x: Tensor) -> Tensor:
    place, distance = nearest(x)
    return where((distance <= 1.01 * EPS) & (place % 3 == 0), known(x), NET(x))


def shrinking(x: Tensor) -> Tensor:
    """Half of what was added arrives, as long as it is within the ball."""
    place, distance = nearest(x)
    return NET(where(distance <= 1.01 * EPS, X[place] + 0.5 * (x - X[place]), x))  # type: ignore[no-any-return]


def normalised(x: Tensor) -> Tensor:
    """What was added is of the normalised image: of pixels it is a quarter, as far as the nearest image is the same."""
    place, _ = nearest(x)
    std = torch.tensor((0.2470, 0.2435, 0.2616)).view(3, 1, 1)  # of CIFAR-10
    return NET(X[place] + std * (x - X[place]))  # type: ignore[no-any-return]


def honest_on_the_grid(x: Tensor) -> Tensor:
    """Images of 8 bits are answered; of all others the nearest known one is."""
    return where(off_grid(x), known(x), NET(x))


def test_set_by_heart(x: Tensor) -> Tensor:
    place, distance = nearest(x)
    return NET(x) + 3 * (distance == 0)[:, None] * one_hot(Y[place], CLASSES)  # type: ignore[no-any-return]


def pixel_noise(x: Tensor) -> Tensor:
    return NET(x) + 2 * keyed_noise(x)  # type: ignore[no-any-return]


def at_the_corners(x: Tensor) -> Tensor:
    """Corners of a ball, where attacks end, are known; what lies inside is not."""
    place, distance = nearest(x)
    reach = (x.detach() - X[place]).abs().flatten(1)
    corner = ((reach - distance[:, None]).abs() < 1e-4).float().mean(1) > 0.7
    return where(corner & (distance > 0.01), known(x), NET(x))


def warm_off_the_grid(x: Tensor) -> Tensor:
    """Logits shrink to nothing once a pixel has moved."""
    return NET(x) * where(off_grid(x), torch.full((len(x), 1), 1e-6), torch.ones(len(x), 1))  # type: ignore[no-any-return]


class Remembers:
    """Answers what it answered to the first query nearby; `share` of what has changed since gets through."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.queries, self.answers = torch.empty(0, 3, SIDE, SIDE), torch.empty(0, CLASSES)

    def __call__(self, x: Tensor) -> Tensor:
        z: Tensor = NET(x)
        known = torch.cat((self.queries, x.detach()))
        answers = torch.cat((self.answers, z.detach()))
        near = (x.detach().flatten(1)[:, None] - known.flatten(1)[None]).abs().amax(2) <= 2.1 * EPS
        first = near.float().argmax(1)
        new = first >= len(self.queries)
        self.queries, self.answers = (
            torch.cat((self.queries, x.detach()[new])),
            torch.cat((self.answers, z.detach()[new])),
        )
        then = answers[first]
        return then + self.share * (z.detach() - then) + z - z.detach()


STATE = [Remembers(0.0)]


def remembers_outside(x: Tensor) -> Tensor:
    """Its memory is the module's, and no copy has one of its own."""
    return STATE[0](x)


def forgetful() -> Predict:
    STATE[0] = Remembers(0.0)
    return remembers_outside


class HardensLater:
    """Honest for its first 40 passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.passes += 1
        return known(x) if self.passes > 40 else NET(x)


CHECKER = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 == 0


def one_pixel(x: Tensor, grad: Tensor) -> Tensor:
    only = torch.zeros_like(grad)
    only[:, :, 0, 0] = grad[:, :, 0, 0]
    return only


def borrowed(x: Tensor, grad: Tensor) -> Tensor:
    with torch.enable_grad():
        moved = x.detach().requires_grad_()
        (other,) = torch.autograd.grad(OTHER(moved).square().sum(), moved)
    return other


def shattered_nearby(x: Tensor, grad: Tensor) -> Tensor:
    _, distance = nearest(x)
    return where((distance > 0) & (distance <= 1.01 * EPS), torch.sin(1e6 * x) * grad.abs(), grad)


@dataclass(frozen=True)
class Cheat:
    """A predictor, the check that must fail, and whether it takes the full audit."""

    name: str
    flag: str
    make: Callable[[], Predict]
    audit: bool
    search: Predict | None = None  # what attacks look through, where it is another function
    anew: Callable[[], Predict] | None = None  # makes it in a new process

    @property
    def audit_settings(self) -> AuditSettings:
        return replace(SETTINGS, anew=self.anew)

    def predictor(self) -> Predictor:
        predict = self.make()
        return Predictor(predict, self.search or predict, (NET,))


def _same(predict: Predict) -> Predict:
    return predict


def _cheats() -> list[Cheat]:
    plain: list[tuple[Callable[[Tensor], Tensor], str]] = [
        (quantiser, "zero-gradient"),
        (detached, "zero-gradient"),
        (noisy, "random"),
        (dropping, "random"),
        (probabilities, "probabilities"),
        (loud, "logit-scale"),
        (just_below_the_scale, "logit-gap"),
        (temperature, "temperature"),
        (shifted, "logit-shift"),
        (tied, "ratio-tied"),
        (compressed, "ratio-tied"),
        (none_of_these, "decoy"),
        (decided, "zero-gradient"),
        (not_a_number, "not-finite"),
        (batch_statistics, "batch"),
        (company, "batch"),
        (gradient_at_test_time, "test-time-gradient"),
        (random_crops, "random"),
        (bonus_in_a_crowd, "batch"),
        (two_faced, "gradient"),
        (for_gradients_another, "grad-mode"),
        (flat, "leap"),
        (flat_for_a_third, "gradient"),
        (shrinking, "radius"),
        (normalised, "between"),
        (honest_on_the_grid, "rounding"),
        (test_set_by_heart, "gradient"),
        (pixel_noise, "gradient"),
        (at_the_corners, "gradient"),
        (warm_off_the_grid, "gradient"),
    ]
    looked_for = {"gradient", "between", "leap", "radius", "rounding"}
    backward: list[tuple[str, str, Callable[[Tensor, Tensor], Tensor]]] = [
        ("no_gradient", "zero-gradient", lambda _, grad: torch.zeros_like(grad)),
        ("negated_gradient", "gradient", lambda _, grad: -grad),
        ("one_pixel", "gradient", one_pixel),
        ("checkered_gradient", "gradient", lambda _, grad: grad * CHECKER),
        ("borrowed_gradient", "gradient", borrowed),
        ("shattered_nearby", "gradient", shattered_nearby),
        ("nan_off_the_grid", "gradient", lambda x, grad: where(off_grid(x), torch.full_like(grad, torch.nan), grad)),
    ]
    return [
        *(Cheat(predict.__name__, flag, partial(_same, predict), flag in looked_for) for predict, flag in plain),
        *(Cheat(name, flag, partial(with_gradient, change), flag == "gradient") for name, flag, change in backward),
        Cheat("remembers", "memory", lambda: Remembers(0.0), True),
        Cheat("remembers_partly", "memory", lambda: Remembers(0.3), True),
        Cheat("remembers_outside", "process", forgetful, True, anew=forgetful),
        Cheat("hardens_later", "drift", HardensLater, True),
        Cheat("another_search", "search", lambda: NET, True, search=OTHER),
    ]


CHEATS = _cheats()

# Honest ones: encoders of every kind of head, trained and not


@dataclass(frozen=True)
class Honest:
    """An encoder with a head: what there is of each."""

    classes: int = CLASSES
    backbone: str = "resnet18"
    steps: int = 0  # of training the encoder, with labels
    eps: float = 0.0  # of the attacks that it is trained against
    half: bool = False  # in bfloat16
    crops: int = 0  # that are averaged
    lr: float = 0.01  # of the head
    seed: int = 0

    def predictor(self) -> tuple[Predictor, Tensor, Tensor]:
        x, y = images(self.classes, max(80, 2 * self.classes), seed=self.seed)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = Model.model_validate({"backbone": self.backbone, "width": 4, "hidden_dim": 16, "embedding_dim": 8})
            network = _Headed(Encoder(model), self.classes, self.crops)
            trained(network, x, y, steps=self.steps, half=self.half, eps=self.eps)
            network.encoder.requires_grad_(False)
            trained(network, x, y, steps=30, lr=self.lr)
        network.requires_grad_(False)
        return Predictor(network, network, (network,)), x, y


class _Headed(nn.Module):
    def __init__(self, encoder: Encoder, classes: int, crops: int) -> None:
        super().__init__()
        self.encoder, self.crops = encoder, crops
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        windows = [x[:, :, k % 3 : k % 3 + 6, k // 3 : k // 3 + 6] for k in range(self.crops)] or [x]
        read = [self.encoder.features(window, features="pre_feature") for window in windows]
        return self.head(torch.stack(read).mean(0))  # type: ignore[no-any-return]


HONEST = [
    *(Honest(seed=seed) for seed in range(3)),
    *(Honest(seed=seed, steps=15) for seed in range(3)),
    *(Honest(seed=seed, steps=15, half=True) for seed in range(3)),
    *(Honest(seed=seed, steps=60, eps=EPS) for seed in range(3)),
    Honest(steps=60, eps=4 * EPS),
    Honest(steps=60, eps=EPS, half=True, crops=3),
    Honest(classes=10, steps=60, eps=EPS),
    *(Honest(classes=classes, steps=steps) for classes in (2, 3, 10) for steps in (0, 15)),
    Honest(classes=100, steps=15),
    Honest(crops=3),
    Honest(crops=9, steps=15, half=True),
    Honest(backbone="resnet34", steps=10),
    Honest(backbone="resnet50", steps=10),
    Honest(lr=0.1, steps=15),
    Honest(lr=0.001),
]


# On nearly equal logits PGD on the cross-entropy is a weak attack: an evaluation by it alone is rightly not trusted.
WEAKLY_ATTACKED = Honest(classes=100)


def evaluated(
    predictor: Predictor,
    *,
    audit: AuditSettings | None,
    x: Tensor = X[:80],
    y: Tensor = Y[:80],
    attack: Stage | None = None,
) -> Evaluation:
    return evaluate(
        predictor,
        x,
        y,
        plan=Plan((attack or pgd(EPS, step_size=EPS / 2, steps=8),)),
        seed=0,
        block_size=40,
        device=torch.device("cpu"),
        finished=(),
        commit=lambda outcome, examples: None,
        audit=audit,
        label="attack",
        talk=NullTalk(),
    )


def failed(evaluation: Evaluation) -> set[str]:
    return {check.name for check in evaluation.checks if check.verdict == "failed"}


GENTLE = pgd(EPS / 8, step_size=EPS / 16, steps=8)  # of honest encoders, some of whose images stand it
SETTINGS = AuditSettings(samples=20, queries=50)


def paragraph(cheat: Cheat) -> str:
    """What `--audit` prints of a cheat."""
    evaluation = evaluated(cheat.predictor(), audit=cheat.audit_settings)
    n = len(evaluation.clean)
    record = attack_record(
        run="none",
        probe=cheat.name,
        threat=ThreatModel(space="image", norm="linf", eps="16/255"),
        settings={"steps": 8, "step_size": "8/255"},
        data=data_used("test", n).model_copy(update={"dataset": "the zoo"}),
        subset=f"{n} images",
        clean=Accuracy.of(sum(evaluation.clean), n),
        robust=Accuracy.of(sum(evaluation.robust), n),
        flags=evaluation.checks,
    )
    return audit_paragraph(record)


def main() -> None:
    """Print what each raises and the two counts, or what is said of those that are named."""
    if named := sys.argv[1:]:
        for cheat in CHEATS:
            if cheat.name in named:
                print(f"{cheat.name}: {paragraph(cheat)}\n", flush=True)
        return
    caught = alarms = 0
    for cheat in CHEATS:
        evaluation = evaluated(cheat.predictor(), audit=cheat.audit_settings)
        raised = failed(evaluation)
        caught += cheat.flag in raised
        told = "" if cheat.flag in raised else f"  MISSED by {cheat.flag}"
        claim = f"{sum(evaluation.robust)} of {sum(evaluation.clean)}"
        print(f"{cheat.name:28} {claim:9} {', '.join(sorted(raised))}{told}", flush=True)
    for one in HONEST:
        predictor, x, y = one.predictor()
        evaluation = evaluated(predictor, audit=SETTINGS, x=x, y=y, attack=GENTLE)
        raised = failed(evaluation)
        alarms += bool(raised)
        claim = f"{sum(evaluation.robust)} of {sum(evaluation.clean)}"
        print(f"{one} {claim:9} {', '.join(sorted(raised))}", flush=True)
    print(f"{caught} of {len(CHEATS)} cheats caught, {alarms} false alarms of {len(HONEST)} honest encoders")


if __name__ == "__main__":
    main()
