"""Small models and losses that the tests of training share."""

import torch
from torch import nn

from lora_ref.course.training import train

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def regression(seed=0, frozen=False):
    """A model with dropout, and the loss of step t on data that depend on t alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(not frozen)

    def loss(model, t):
        x = randn(16, 6, seed=100 + t, dtype=torch.float32)
        return (model(x) - x[:, :3].sin()).square().mean()

    return model, loss


COUNTS = [1, 5, 2, 4]  # tokens of the four rows of a step: a mean of rows' means is not the mean over tokens


def partial_loss(model, t, mine):
    """The share of the loss of step t that these rows have: their tokens' losses over all rows' tokens."""
    total = 0.0
    for row in mine:
        x = randn(COUNTS[row], 6, seed=1000 * t + row, dtype=torch.float32)
        total = total + (row + 1) * (model(x) - x[:, :3].sin()).square().sum()
    return total / sum(COUNTS)


def without_dropout():
    """A model without dropout, one layer of it frozen."""
    model, _ = regression()
    model[1].p = 0.0
    model[0].weight.requires_grad_(False)
    return model


def whole_run(**options):
    model = without_dropout()
    history = train(model, lambda model, t: partial_loss(model, t, [0, 1, 2, 3]), 7, 0.05, warmup_steps=2, **options)
    return model, history


def assert_same(mine, theirs, rtol=1e-5):
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)
