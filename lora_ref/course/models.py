"""The digit classifier."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DigitClassifier(nn.Module):
    """Two hidden layers on 8×8 digits: 64 → width → width → classes, tanh between.

    (N, 64) → logits (N, classes). Its weight matrices are `layers[0].weight` (width, 64),
    `layers[1].weight` (width, width) and `layers[2].weight` (classes, width).
    """

    def __init__(self, width: int = 64, classes: int = 10):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, classes)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.layers[-1](x)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` with its random start drawn from `seed`; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of right answers: logits (…, N, classes), y (N,) or (…, N) → (…)."""
    return (logits.argmax(-1) == y).double().mean(-1)
