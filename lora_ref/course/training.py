"""One explicit training loop, for one run or for hundreds at once.

Runs that differ in seed, learning rate or start are stacked along a first axis R and trained as
one batched computation. The runs share nothing: the gradient of the summed loss is each run's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def batch_indices(n: int, batch: int, steps: int, seeds: list[int]) -> Tensor:
    """For every step and seed, which of n examples to use: (steps, len(seeds), batch), int64.

    Each seed walks through its own shuffles, epoch by epoch, without replacement within one.
    """
    if not 1 <= batch <= n:
        raise ValueError(f"batch = {batch} is out of range; choose 1 <= batch <= {n}, the number of examples")
    per_epoch = n // batch
    orders = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        epochs = [torch.randperm(n, generator=g)[: per_epoch * batch] for _ in range(-(-steps // per_epoch))]
        orders.append(torch.cat(epochs)[: steps * batch].view(steps, batch))
    return torch.stack(orders, dim=1)


def train_many(
    loss: Callable[[dict[str, Tensor], int], Tensor],
    start: dict[str, Tensor],
    rates: Tensor,
    steps: int,
    optimizer: str = "adam",
    decay: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train R independent runs together; return their parameters and loss curves (steps, R).

    `loss(parameters, step)` gives one loss for each run, (R,). `start` maps names to (R, …).
    `rates` (R,) are the learning rates, which with `decay` fall linearly to 0 over the steps.
    "sgd" is plain gradient descent; "adam" is Adam with β = (0.9, 0.999), ε = 1e-8, equal to
    torch.optim.Adam's for each run. A run whose loss diverges does not disturb the others.
    """
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer = {optimizer!r} is unknown; choose 'adam' or 'sgd'")
    runs = len(rates)
    for name, value in start.items():
        if value.shape[:1] != (runs,):
            raise ValueError(f"start[{name!r}] has shape {tuple(value.shape)}; its first axis must be the {runs} runs")
    p = {name: value.clone().requires_grad_() for name, value in start.items()}
    m = {name: torch.zeros_like(value) for name, value in start.items()}
    v = {name: torch.zeros_like(value) for name, value in start.items()}
    curve = torch.empty(steps, runs)
    for t in range(steps):
        losses = loss(p, t)
        gradients = torch.autograd.grad(losses.sum(), list(p.values()))
        curve[t] = losses.detach()
        rate = rates * (1 - t / steps) if decay else rates
        with torch.no_grad():
            for (name, value), g in zip(p.items(), gradients):
                eta = rate.to(value).view(-1, *[1] * (value.ndim - 1))
                if optimizer == "sgd":
                    value -= eta * g
                    continue
                m[name].lerp_(g, 0.1)
                v[name].mul_(0.999).addcmul_(g, g, value=0.001)
                unbiased = (v[name] / (1 - 0.999 ** (t + 1))).sqrt_().add_(1e-8)
                value -= eta * (m[name] / (1 - 0.9 ** (t + 1))) / unbiased
    return {name: value.detach() for name, value in p.items()}, curve


def cross_entropy_many(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each run, in nats: logits (R, N, classes), y (N,) or (R, N) → (R,)."""
    y = y.expand(logits.shape[:-1])
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(-1)
