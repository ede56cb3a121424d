"""One LoRA layer and the layers it is compared with, in the benchmarks `layer` and `layer_memory`.

The contenders carry the same weights and take the same x (N, k), which requires a gradient, and ∂L/∂y (N, d):

    frozen         F.linear, W0 frozen: what any adapter costs at least
    lora_ref       LoRALinear
    peft           peft's LoRA layer as get_peft_model makes it (on a bf16 base: float32 factors)
    loralib        loralib.Linear, where installed
    parametrised   torch.nn.utils.parametrize with W0 + s·B·A as the weight, as minLoRA does
    full           F.linear, W0 trained

On a bf16 base lora_ref's factors are float32 as well, loralib's and the parametrised ones bf16.
"""

import copy
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..layers import LoRALinear

CONTENDERS = 6


class Layer(NamedTuple):
    """A case: W0 is d×k, x has N rows, B·A rank r and α = 2r; dropout p, dtype."""

    d: int
    k: int
    N: int
    r: int
    p: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """Multiply-adds of the frozen layer's forward."""
        return self.N * self.d * self.k

    @property
    def group(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, dropout {self.p}"

    def row(self) -> dict:
        """The columns that say which case it is."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"d": self.d, "k": self.k, "N": self.N, "r": self.r, "p": self.p, "dtype": dtype}


class OneLayer(nn.Module):
    """A module of one layer, for peft to adapt."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


class LowRankUpdate(nn.Module):
    """W0 ↦ W0 + s·B·A, as a parametrisation of a weight."""

    def __init__(self, A: Tensor, B: Tensor, s: float):
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.s = s

    def forward(self, W0: Tensor) -> Tensor:
        return W0 + self.s * (self.B @ self.A)


def contenders(case: Layer, device: torch.device) -> dict[str, nn.Module]:
    """The layers of the head of this module, by name; those whose library is missing are left out."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(case.k, case.d).to(device, case.dtype).requires_grad_(False)
    config = LoRAConfig(r=case.r, lora_alpha=2 * case.r, lora_dropout=case.p)
    A = (torch.randn(case.r, case.k, generator=generator) / case.k**0.5).to(device)
    B = (torch.randn(case.d, case.r, generator=generator) / case.r**0.5).to(device)

    layers = {"frozen": base, "lora_ref": LoRALinear(copy.deepcopy(base), config).to(device)}
    factors = {"lora_ref": (layers["lora_ref"].lora_A, layers["lora_ref"].lora_B)}
    if importlib.util.find_spec("peft"):
        layers["peft"] = _peft_layer(base, case).to(device)
        factors["peft"] = (layers["peft"].lora_A["default"].weight, layers["peft"].lora_B["default"].weight)
    if importlib.util.find_spec("loralib"):
        layers["loralib"] = _loralib_layer(base, case).to(device, case.dtype)
        factors["loralib"] = (layers["loralib"].lora_A, layers["loralib"].lora_B)
    with torch.no_grad():
        for own_A, own_B in factors.values():
            own_A.copy_(A)
            own_B.copy_(B)
    if case.p == 0:  # a weight has no x to drop
        layers["parametrised"] = copy.deepcopy(base)
        update = LowRankUpdate(A.to(case.dtype), B.to(case.dtype), config.scale)
        nn.utils.parametrize.register_parametrization(layers["parametrised"], "weight", update)
    layers["full"] = copy.deepcopy(base).requires_grad_(True)
    return layers


def _peft_layer(base: nn.Linear, case: Layer) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=case.r, lora_alpha=2 * case.r, lora_dropout=case.p, target_modules=["layer"])
    return get_peft_model(OneLayer(copy.deepcopy(base)), settings).base_model.model.layer


def _loralib_layer(base: nn.Linear, case: Layer) -> nn.Module:
    import loralib

    layer = loralib.Linear(case.k, case.d, r=case.r, lora_alpha=2 * case.r, lora_dropout=case.p)
    layer.load_state_dict(base.state_dict(), strict=False)
    layer.bias.requires_grad_(False)
    return layer


def inputs(case: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
    """x (N, k), which requires a gradient, and ∂L/∂y (N, d)."""
    x = torch.randn(case.N, case.k, device=device).to(case.dtype)
    gradient = torch.randn(case.N, case.d, device=device).to(case.dtype)
    return x.requires_grad_(), gradient


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """A function that clears the gradients and runs the layer forward and backward once."""
    parameters = list(layer.parameters())

    def run() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        y = layer(x)  # held until the end, as a network's next layer would
        y.backward(gradient)

    return run
