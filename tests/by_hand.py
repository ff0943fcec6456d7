"""The attacks written a second time from their papers, plainly: one image, no batch, Python loops.

Each takes `logits`, from one image (C, H, W) to its logits (classes,), and returns the point it ends with. Nothing of
cfamc_cli is used, so that agreement says something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]


def length(delta: Tensor, norm: str) -> float:
    return float(delta.abs().max()) if norm == "linf" else float(delta.square().sum().sqrt())


def into_region(x: Tensor, point: Tensor, eps: float, norm: str) -> Tensor:
    """Ball first, then box."""
    delta = point - x
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    elif length(delta, norm) > eps:
        delta = delta * (eps / length(delta, norm))
    return (x + delta).clamp(0, 1)


def uphill(grad: Tensor, norm: str) -> Tensor:
    return grad.sign() if norm == "linf" else grad / length(grad, norm)


def wrong(logits: Logits, point: Tensor, y: int) -> bool:
    return int(logits(point).argmax()) != y


def likeliest(logits: Logits, x: Tensor, y: int) -> list[int]:
    """The classes other than y, likeliest first."""
    z = logits(x).tolist()
    return sorted((j for j in range(len(z)) if j != y), key=lambda j: (-z[j], j))


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Logits, point: Tensor) -> tuple[float, Tensor]:
    point = point.detach().requires_grad_()
    value = loss(logits(point))
    (grad,) = torch.autograd.grad(value, point)
    return float(value.detach()), grad


def cross_entropy(z: Tensor, y: int) -> Tensor:
    return z.exp().sum().log() - z[y]


def loss_of(name: str, y: int, target: int) -> Callable[[Tensor], Tensor]:
    """Equations 6 and 7 of arXiv:2003.01690, for at least four classes."""

    def dlr(z: Tensor) -> Tensor:
        top = z.sort(descending=True).values
        other = max(z[j] for j in range(len(z)) if j != y)
        return -(z[y] - other) / (top[0] - top[2])

    def targeted(z: Tensor) -> Tensor:
        top = z.sort(descending=True).values
        return -(z[y] - z[target]) / (top[0] - (top[2] + top[3]) / 2)

    return {"apgd-ce": lambda z: cross_entropy(z, y), "apgd-dlr": dlr, "apgd-t": targeted}[name]


def fgsm(logits: Logits, x: Tensor, y: int, *, eps: float, norm: str) -> Tensor:
    _, grad = value_and_gradient(lambda z: cross_entropy(z, y), logits, x)
    return into_region(x, x + eps * uphill(grad, norm), eps, norm)


def pgd(
    logits: Logits, x: Tensor, y: int, starts: Sequence[Tensor], *, eps: float, norm: str, step_size: float, steps: int
) -> Tensor:
    """The first misclassified point from any of the starts, else the last point of the last run."""
    point = x
    for start in starts:
        point = into_region(x, start, eps, norm)
        for _ in range(steps):
            if wrong(logits, point, y):
                return point
            _, grad = value_and_gradient(lambda z: cross_entropy(z, y), logits, point)
            point = into_region(x, point + step_size * uphill(grad, norm), eps, norm)
        if wrong(logits, point, y):
            return point
    return point


def embedding_pgd(
    embed: Logits, x: Tensor, starts: Sequence[Tensor], *, eps: float, norm: str, step_size: float, steps: int
) -> Tensor:
    """The point of the most distant embedding of unit length that was met."""
    clean = embed(x) / length(embed(x), "l2")

    def distance(z: Tensor) -> Tensor:
        return (z / z.square().sum().sqrt() - clean).square().sum()

    best, furthest = x, 0.0
    for start in starts:
        point = into_region(x, start, eps, norm)
        for step in range(steps + 1):
            value, grad = value_and_gradient(distance, embed, point)
            if value > furthest:
                best, furthest = point, value
            if step < steps:
                point = into_region(x, point + step_size * uphill(grad, norm), eps, norm)
    return best


def apgd(
    logits: Logits,
    x: Tensor,
    y: int,
    runs: Sequence[tuple[int, Tensor]],
    *,
    loss: str,
    eps: float,
    norm: str,
    steps: int,
) -> Tensor:
    """Algorithm 1 of arXiv:2003.01690, for each target and start of `runs` in turn until a point is misclassified."""
    end = x
    for target, start in runs:
        if wrong(logits, x, y):
            return x
        end = _apgd_run(logits, x, y, start, loss_of(loss, y, target), eps=eps, norm=norm, steps=steps)
        if wrong(logits, end, y):
            return end
    return end


def _apgd_run(
    logits: Logits,
    x: Tensor,
    y: int,
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    eps: float,
    norm: str,
    steps: int,
) -> Tensor:
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(round(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06), 2))
    marks = [math.ceil(round(share * steps, 6)) for share in shares[1:-1]]

    point = before = best = into_region(x, start, eps, norm)
    value, grad = value_and_gradient(loss, logits, point)
    highest, best_grad = value, grad
    eta, halved, rises, last_mark, highest_then = 2 * eps, True, 0, 0, value
    for step in range(1, steps + 1):
        if wrong(logits, point, y):
            return point
        ahead = into_region(x, point + eta * uphill(grad, norm), eps, norm)
        if step > 1:
            ahead = into_region(x, point + 0.75 * (ahead - point) + 0.25 * (point - before), eps, norm)
        before, point = point, ahead
        value_before, (value, grad) = value, value_and_gradient(loss, logits, point)
        rises += value > value_before
        if wrong(logits, point, y):
            return point
        if value > highest:
            best, highest, best_grad = point, value, grad
        if step in marks:
            seldom = rises < 0.75 * (step - last_mark)
            stuck = not halved and highest == highest_then
            halved = seldom or stuck
            if halved:
                eta, point, grad = eta / 2, best, best_grad
            rises, last_mark, highest_then = 0, step, highest
    return best


def to_hyperplane(point: Tensor, w: Tensor, gap: float, norm: str) -> Tensor:
    """The shortest step to gap + w.d = 0 within the box, by bisection."""
    direction = -math.copysign(1, gap) * w.sign()
    room = torch.where(direction > 0, 1 - point, point)
    rate = torch.ones_like(w) if norm == "linf" else w.abs() / w.abs().max()
    low, high = 0.0, 1e6
    for _ in range(80):
        t = (low + high) / 2
        low, high = (low, t) if float((w.abs() * torch.minimum(t * rate, room)).sum()) >= abs(gap) else (t, high)
    return direction * torch.minimum(high * rate, room)


def fab(logits: Logits, x: Tensor, y: int, targets: Sequence[int], *, eps: float, norm: str, steps: int) -> Tensor:
    """FAB of arXiv:1907.02044 for each target, until a misclassified point within eps is met; else x."""
    if wrong(logits, x, y):
        return x
    for target in targets:
        point = x
        for _ in range(steps):
            gap, w = value_and_gradient(lambda z, t=target: z[t] - z[y], logits, point)  # type: ignore[misc]
            step = to_hyperplane(point, w, gap, norm)
            step_from_x = to_hyperplane(x, w, gap + float((w * (x - point)).sum()), norm)
            far, far_from_x = max(length(step, norm), 1e-8), max(length(step_from_x, norm), 1e-8)
            alpha = min(far / (far + far_from_x), 0.1)
            point = ((1 - alpha) * (point + 1.05 * step) + alpha * (x + 1.05 * step_from_x)).clamp(0, 1)
            if length(point - x, norm) > eps:
                point = x + 0.9 * (point - x)
            elif wrong(logits, point, y):
                return point
    return x


def margin(z: Tensor, y: int) -> float:
    values = z.tolist()
    return float(values[y] - max(values[:y] + values[y + 1 :]))


def share_of_area(query: int) -> float:
    """Section 3.2 of arXiv:1912.00049, for a budget of 10,000."""
    share = 0.8
    for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
        if query > mark:
            share /= 2
    return share


@lru_cache
def bump(side: int) -> Tensor:
    """The update of a square window of the L2 attack, of unit length (arXiv:1912.00049, section 3.3)."""

    def pyramid(height: int, width: int) -> Tensor:
        values, n = torch.zeros(height, width, dtype=torch.float64), height // 2
        for r in range(1, height + 1):
            for s in range(1, width + 1):
                reach = n - max(abs(r - height // 2 - 1), abs(s - width // 2 - 1))
                values[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(reach + 1))
        return values

    whole = torch.cat((pyramid(side // 2, side), -pyramid(side - side // 2, side)))
    return whole / whole.square().sum().sqrt()


def square(
    logits: Logits,
    x: Tensor,
    y: int,
    first: Tensor,
    draws: Sequence[Tensor],
    *,
    eps: float,
    norm: str,
) -> Tensor:
    """Random search from `first` (arXiv:1912.00049, algorithm 1), which takes the numbers of one query from each draw.

    A draw (5 + C,): down and across of the window that gains, of the one that loses, upright or not, a sign a channel.
    """
    if margin(logits(x), y) < 0:
        return x
    point, lowest = first, margin(logits(first), y)
    height, width = x.shape[1:]
    for query, numbers in enumerate(draws, 1):
        if lowest < 0:
            break
        side = max(1, round(math.sqrt(share_of_area(query) * height * width)))
        drawn = numbers.tolist()
        if norm == "linf":
            side = min(side, height, width)
            ahead = point.clone()
            window = _window(drawn[:2], side, height, width)
            for channel, number in enumerate(drawn[5:]):
                reach = eps if number < 0.5 else -eps
                ahead[channel][window] = (x[channel][window] + reach).clamp(0, 1)
        else:
            side = min(max(3, min(side, height, width) // 2 * 2 + 1), height, width)
            ahead = _move_mass(x, point - x, drawn, side, eps)
        value = margin(logits(ahead), y)
        if value < lowest:
            point, lowest = ahead, value
    return point


def _window(drawn: Sequence[float], side: int, height: int, width: int) -> tuple[slice, slice]:
    top, left = int(drawn[0] * (height - side + 1)), int(drawn[1] * (width - side + 1))
    return slice(top, top + side), slice(left, left + side)


def _move_mass(x: Tensor, delta: Tensor, drawn: Sequence[float], side: int, eps: float) -> Tensor:
    """Algorithm 3 of arXiv:1912.00049."""
    channels, height, width = x.shape
    gains, loses = _window(drawn[:2], side, height, width), _window(drawn[2:4], side, height, width)
    either = torch.zeros(height, width, dtype=torch.bool)
    either[gains] = either[loses] = True
    unused = max(eps**2 - float(delta.square().sum()), 0.0)
    new = delta.clone()
    for channel in range(channels):
        new[channel][loses] = 0
        old = delta[channel][gains]
        available = math.sqrt(float(delta[channel][either].square().sum()) + unused / channels)
        upright = bump(side) if drawn[4] < 0.5 else bump(side).T
        sign = 1 if drawn[5 + channel] < 0.5 else -1
        added = sign * upright + (old / length(old, "l2") if length(old, "l2") > 0 else 0)
        new[channel][gains] = added / max(length(added, "l2"), 1e-12) * available
    return into_region(x, x + new, eps, "l2")


def stripes(x: Tensor, up: Tensor, eps: float) -> Tensor:
    """A column of each channel moves by +-eps as `up` (C, W) says."""
    return (x + eps * torch.where(up, 1.0, -1.0)[:, None, :]).clamp(0, 1)


def tiles(x: Tensor, drawn: Tensor, eps: float) -> Tensor:
    """A grid of bumps with five along the shorter side; `drawn` (2, C, down, across): sign and orientation of each."""
    side = max(3, min(x.shape[1:]) // 5)
    delta = torch.zeros_like(x)
    for channel in range(drawn.shape[1]):
        for row in range(x.shape[1] // side):
            for column in range(x.shape[2] // side):
                sign, upright = (float(n) < 0.5 for n in drawn[:, channel, row, column])
                tile = (bump(side) if upright else bump(side).T) * (1 if sign else -1)
                delta[channel, row * side : (row + 1) * side, column * side : (column + 1) * side] = tile
    return into_region(x, x + delta / length(delta, "l2") * eps, eps, "l2")
