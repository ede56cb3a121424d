"""Explicit training loops: `train` for one run of one model, `train_many` and `fit` for hundreds at once.

Runs that differ in seed, learning rate or start are stacked along the first axes and trained as
one batched computation. The runs share nothing: the gradient of the summed loss is each run's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .._checks import check_integer
from .classifiers import accuracy

__all__ = [
    "Fit",
    "batch_indices",
    "cross_entropy_many",
    "fit",
    "one_thread",
    "train_many",
]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread inside the `with`: on tensors this small, threads cost more than they give.

    It also makes the result independent of how many threads the machine has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def batch_indices(n: int, batch: int, steps: int, seeds: list[int]) -> Tensor:
    """For every step and seed, which of n examples to use: (steps, len(seeds), batch), int64.

    Each seed walks through its own shuffles, epoch by epoch, without replacement within one.
    """
    n, steps = check_integer(n, "n", 1), check_integer(steps, "steps", 1)
    batch = check_integer(batch, "batch", 1, n, f"there are {n} examples")
    if len(seeds) == 0:
        raise ValueError(f"seeds = {seeds!r} is empty; pass at least one")
    per_epoch = n // batch
    orders = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        epochs = [torch.randperm(n, generator=g)[: per_epoch * batch] for _ in range(-(-steps // per_epoch))]
        orders.append(torch.cat(epochs)[: steps * batch].view(steps, batch))
    return torch.stack(orders, dim=1)


@one_thread()
def train_many(
    loss: Callable[[dict[str, Tensor], int], Tensor],
    initial: dict[str, Tensor],
    lrs: Tensor,
    steps: int,
    optimizer: str = "adam",
    decay: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train many independent runs together; return their parameters and loss curves.

    A run whose loss diverges does not disturb the others.

    Args:
        loss: `loss(parameters, step)` gives one loss for each run, shape R.
        initial: names → tensors of shape (*R, …), the start of every run; not changed.
        lrs: the runs' learning rates, of any shape R (one axis, or seeds × rates).
        steps: how many updates, an integer ≥ 1.
        optimizer: "sgd" is plain gradient descent; "adam" is Adam with β = (0.9, 0.999), ε = 1e-8, equal to
            torch.optim.Adam's for each run.
        decay: whether the learning rates fall linearly to 0 over the steps.

    Returns:
        Names → trained values, shape (*R, …), and the loss before each update, shape (steps, *R).

    Raises:
        ValueError: an unknown optimizer, steps < 1, an initial value whose first axes are not the runs, or a loss
            that is not one for each run.
        TypeError: lrs is not a tensor, or steps not an integer.

    Example:
        >>> start, lrs = {"x": torch.ones(2)}, torch.tensor([0.25, 0.5])
        >>> trained, curve = train_many(lambda p, step: p["x"] ** 2, start, lrs, 1, "sgd")  # x − lr·2x
        >>> trained["x"].tolist(), curve.tolist()
        ([0.5, 0.0], [[1.0, 1.0]])
    """
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer = {optimizer!r} is unknown; choose 'adam' or 'sgd'")
    check_integer(steps, "steps", 1)
    if not isinstance(lrs, Tensor):
        raise TypeError(f"lrs must be a torch.Tensor, got {lrs!r}; convert it with torch.tensor(lrs)")
    for name, value in initial.items():
        if value.shape[: lrs.ndim] != lrs.shape:
            raise ValueError(
                f"initial[{name!r}] has shape {tuple(value.shape)}; its first axes must be those of lrs, "
                f"{tuple(lrs.shape)}"
            )
    p = {name: value.clone().requires_grad_() for name, value in initial.items()}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in initial.items()}
    curve = None
    for t in range(steps):
        losses = loss(p, t)
        if losses.shape != lrs.shape:
            raise ValueError(
                f"loss returned shape {tuple(losses.shape)}; it must return one loss for each run, {tuple(lrs.shape)}"
            )
        gradients = torch.autograd.grad(losses.sum(), list(p.values()))
        curve = losses.new_empty(steps, *lrs.shape) if curve is None else curve
        curve[t] = losses.detach()
        lr = lrs * (1 - t / steps) if decay else lrs
        with torch.no_grad():
            for (name, value), g in zip(p.items(), gradients):
                eta = lr.to(value).view(*lrs.shape, *[1] * (value.ndim - lrs.ndim))
                if optimizer == "sgd":
                    value -= eta * g
                else:
                    _adam_update(value, g, *moments[name], eta, t + 1)
    return {name: value.detach() for name, value in p.items()}, curve


def _adam_update(value: Tensor, g: Tensor, m: Tensor, v: Tensor, eta: Tensor, t: int) -> None:
    """Adam's update number t = 1, 2, … of value, its moments m and v, all in place; eta is the learning rate."""
    m.lerp_(g, 0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    unbiased = (v / (1 - 0.999**t)).sqrt_().add_(1e-8)
    value -= eta * (m / (1 - 0.9**t)) / unbiased


def cross_entropy_many(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each run, in nats: logits (…, N, classes), y (…, N) → (…)."""
    y = y.expand(logits.shape[:-1])
    return nn.functional.cross_entropy(logits.movedim(-1, 1), y, reduction="none").mean(-1)


@dataclass(frozen=True)
class Fit:
    """Classifiers trained from S seeds at L learning rates each: what `fit` returns.

    Args:
        model: the first of the models, for its form.
        trained: names → trained values, shape (S, L, …).
        fixed: names → values that were not trained, shape (S, …).
        lrs: the L learning rates.
        curve: the training loss in nats, shape (steps, S, L).
    """

    model: nn.Module
    trained: dict[str, Tensor]
    fixed: dict[str, Tensor]
    lrs: list[float]
    curve: Tensor

    def scores(self, X: Tensor, y: Tensor) -> Tensor:
        """Accuracy (S, L) on the images X (N, 64) with labels y (N,)."""
        with torch.no_grad():
            return accuracy(_logits(self.model, self.trained, self.fixed, X.expand(len(self.curve[0]), *X.shape)), y)

    def losses(self, X: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy (S, L) in nats on X (N, 64), y (N,); inf where a run has diverged."""
        with torch.no_grad():
            logits = _logits(self.model, self.trained, self.fixed, X.expand(len(self.curve[0]), *X.shape))
            return cross_entropy_many(logits, y).nan_to_num(torch.inf)

    def best(self, X: Tensor, y: Tensor) -> int:
        """The index of the rate with the highest mean accuracy over seeds, on validation data."""
        return int(self.scores(X, y).mean(0).argmax())

    def parameters(self, seed: int, rate: int) -> dict[str, Tensor]:
        """Names → values of one run: the seed's index, the rate's index."""
        return {name: v[seed, rate] for name, v in self.trained.items()} | {n: v[seed] for n, v in self.fixed.items()}


def _logits(model: nn.Module, trained: dict, fixed: dict, X: Tensor) -> Tensor:
    """Seeds × lrs: trained (S, L, …), fixed (S, …), X (S, N, 64) → (S, L, N, classes)."""

    def one(trained, fixed, x):
        return functional_call(model, {**fixed, **trained}, (x,))

    return vmap(vmap(one, in_dims=(0, None, None)), in_dims=(0, 0, 0))(trained, fixed, X)


def fit(
    models: list[nn.Module],
    X: Tensor,
    y: Tensor,
    lrs: list[float],
    steps: int = 400,
    batch: int = 128,
    optimizer: str = "adam",
) -> Fit:
    """Train every model (one for each seed) at every rate, all at once, by cross-entropy.

    Seed i draws its mini-batches from its own generator; its runs share them, so that rates are compared on equal
    data. The learning rates fall linearly to 0.

    Args:
        models: one for each seed, equal but for their numbers; not changed. Whatever in them requires a gradient is
            trained: all of a network, its LoRA factors, the z of a RandomSubspace.
        X: the images, shape (N, 64).
        y: their labels, shape (N,).
        lrs: the learning rates.
        steps: how many updates, an integer ≥ 1.
        batch: images of a step, an integer ≥ 1; at most all of X are used.
        optimizer: "adam" or "sgd", as in `train_many`.

    Returns:
        The trained values and the training loss of every seed and rate.

    Raises:
        ValueError: no models, models that train nothing, unequal numbers of images and labels, or arguments that
            `train_many` or `batch_indices` refuses.

    Example:
        >>> models = [nn.Linear(64, 3), nn.Linear(64, 3)]
        >>> X, y = torch.eye(64)[:6], torch.tensor([0, 1, 2, 0, 1, 2])
        >>> result = fit(models, X, y, lrs=[1e-3, 0.1, 1.0], steps=5)
        >>> tuple(result.trained["weight"].shape), tuple(result.curve.shape)
        ((2, 3, 3, 64), (5, 2, 3))
    """
    if not models or len(X) != len(y):
        raise ValueError(
            f"{len(models)} models, {len(X)} images, {len(y)} labels; pass a model a seed, a label an image"
        )
    state = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in models]
    names = [name for name, p in models[0].named_parameters() if p.requires_grad]
    if not names:
        raise ValueError(
            f"{type(models[0]).__name__} trains nothing; set requires_grad_(True) on what is to be trained"
        )
    stacked = {name: torch.stack([s[name].detach() for s in state]) for name in state[0]}
    initial = {name: stacked[name][:, None].repeat_interleave(len(lrs), 1) for name in names}
    fixed = {name: value for name, value in stacked.items() if name not in names}
    picks = batch_indices(len(X), min(batch, len(X)), steps, list(range(len(models))))

    def loss(trained, t):
        logits = _logits(models[0], trained, fixed, X[picks[t]])
        return cross_entropy_many(logits, y[picks[t]][:, None].expand(logits.shape[:-1]))

    trained, curve = train_many(loss, initial, torch.tensor(lrs).repeat(len(models), 1), steps, optimizer)
    return Fit(models[0], trained, fixed, list(lrs), curve)
