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

    Args:
        width: how many units each hidden layer has.
        classes: how many classes it tells apart.

    Example:
        >>> model = DigitClassifier(width=16, classes=3)
        >>> tuple(model(torch.zeros(5, 64)).shape), tuple(model.layers[2].weight.shape)
        ((5, 3), (3, 16))
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

    Args:
        model: the network; it is copied, not changed.
        r: the rank of every B·A, an integer ≥ 1.

    Raises:
        TypeError: r is not an integer.
        ValueError: r < 1, or the model has no weight matrix.

    Example:
        >>> model = DigitClassifier(width=16)
        >>> update, x = LowRankUpdate(model, r=2), torch.ones(5, 64)
        >>> torch.equal(update(x), model(x))  # B = 0 at the start
        True
        >>> trainable(update)  # 2·(64 + 16) + 2·(16 + 16) + 2·(16 + 10)
        276
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

    Args:
        model: the classifier; it is not changed.
        config: the adapter's hyperparameters, the same for every layer.
        seed: of the one generator that serves the layers in turn.
        layers: indices of the layers to adapt, 0 … 2.
        init_fn: `init_fn(W, r, s, generator)`, a function as in lora_ref.initialization; overrides the config's.

    Returns:
        The adapted copy; only its LoRA factors, and a bias that the config trains, require a gradient.

    Raises:
        TypeError, ValueError: as LoRALinear, the model unchanged.

    Example:
        >>> adapted = with_lora(DigitClassifier(width=16), LoRAConfig(r=2, lora_alpha=3), layers=(1,))
        >>> trainable(adapted)  # 2·(16 + 16)
        64
    """
    adapted, generator = copy.deepcopy(model).requires_grad_(False), torch.Generator().manual_seed(seed)
    for i in layers:
        W = adapted.layers[i].weight.detach()
        first = None if init_fn is None else init_fn(W, config.r, config.scale, generator)
        adapted.layers[i] = LoRALinear(adapted.layers[i], config, first, generator)
    return adapted


def trainable(model: nn.Module) -> int:
    """How many numbers of the model are trained.

    Args:
        model: any module.

    Returns:
        The size, in numbers, of all parameters that require a gradient.

    Example:
        >>> trainable(nn.Linear(5, 3)), trainable(nn.Linear(5, 3).requires_grad_(False))
        (18, 0)
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def with_values(model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with other parameter values.

    Args:
        model: any module; it is not changed.
        values: the whole state, names → tensors, as `Fit.parameters` gives it.

    Returns:
        The copy.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> filled = with_values(model, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        >>> filled(torch.ones(3)).tolist()
        [3.0, 3.0]
    """
    filled = copy.deepcopy(model)
    filled.load_state_dict(values)
    return filled


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` with its random start drawn from `seed`; the global generator stays as it was.

    Args:
        seed: of the CPU's generator while `build` runs.
        build: makes the module, without arguments.

    Returns:
        The module.

    Example:
        >>> first, second = seeded(3, DigitClassifier), seeded(3, DigitClassifier)
        >>> torch.equal(first.layers[0].weight, second.layers[0].weight)
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU generator alone: torch.manual_seed would move the GPU ones
        return build()


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of right answers.

    Args:
        logits: shape (…, N, classes).
        y: the right classes, shape (N,) or (…, N), integers.

    Returns:
        Shape (…), float64, in [0, 1].

    Example:
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
        >>> accuracy(logits, torch.tensor([0, 1, 1, 0])).item()
        0.75
    """
    return (logits.argmax(-1) == y).double().mean(-1)
