"""The digit classifier, the same with LoRA, and with a low-rank update spelt out."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._checks import check_integer
from ..config import LoRAConfig
from ..initialization import Init
from ..layers import LoRALinear


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


class LowRankUpdate(nn.Module):
    """A network whose weight matrices are W0 + B·A: W0 and the biases frozen, B and A trained.

    For every weight matrix (d, k) of `model`: A (r, k) ~ N(0, 1/k), B (d, r) = 0, r capped at
    min(d, k), scale 1. It forms W0 + B·A in each forward: the equation, spelt out, for small
    networks. Lesson 03 builds the layer that never forms B·A.
    Errors: ValueError when the model has no weight matrix or r < 1.
    """

    def __init__(self, model: nn.Module, r: int):
        super().__init__()
        weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
        check_integer(r, "r", 1)
        if not weights:
            raise ValueError(f"{type(model).__name__} has no weight matrix; pass a model with linear layers")
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.names = list(weights)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for W0 in weights.values():
            d, k = W0.shape
            self.A.append(torch.randn(min(r, d, k), k).to(W0) / k**0.5)
            self.B.append(W0.new_zeros(d, min(r, d, k)))

    def weights(self) -> dict[str, Tensor]:
        """Names → W0 + B·A, the weight matrices as they are used."""
        W0 = dict(self.model.named_parameters())
        return {name: W0[name] + B @ A for name, B, A in zip(self.names, self.B, self.A)}

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.model, self.weights(), (x,))

    def merged(self) -> nn.Module:
        """A copy of the network with W0 + B·A written into its weights."""
        merged = copy.deepcopy(self.model)
        merged.load_state_dict({name: W.detach() for name, W in self.weights().items()}, strict=False)
        return merged


def with_lora(
    model: DigitClassifier,
    config: LoRAConfig,
    seed: int = 0,
    layers: tuple[int, ...] = (0, 1, 2),
    init_fn: Callable[..., Init] | None = None,
) -> DigitClassifier:
    """A copy of the classifier, frozen, with a LoRALinear around each of these layers.

    `init_fn(W, r, s, generator)`, a function as in lora_ref.initialization, overrides the config's. One generator,
    from `seed`, serves the layers in turn. Errors: those of LoRALinear, the model unchanged.
    """
    adapted, generator = copy.deepcopy(model).requires_grad_(False), torch.Generator().manual_seed(seed)
    for i in layers:
        W = adapted.layers[i].weight.detach()
        first = None if init_fn is None else init_fn(W, config.r, config.scale, generator)
        adapted.layers[i] = LoRALinear(adapted.layers[i], config, first, generator)
    return adapted


def trainable(model: nn.Module) -> int:
    """How many numbers of the model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def with_values(model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with these parameter values (names → tensors), as `Fit.parameters` gives them."""
    filled = copy.deepcopy(model)
    filled.load_state_dict(values)
    return filled


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` with its random start drawn from `seed`; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU generator alone: torch.manual_seed would move the GPU ones
        return build()


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of right answers: logits (…, N, classes), y (N,) or (…, N) → (…)."""
    return (logits.argmax(-1) == y).double().mean(-1)
