"""One linear layer, with or without a LoRA adapter: the FLOPs of its products, and what it keeps for its backward.

    Y = X·W0ᵀ + b + s·H·Bᵀ,     H = X·Aᵀ                  X N×k, W0 d×k, A r×k, B d×r, H N×r
    Z = G·B,                    G = ∂L/∂Y                 G N×d, Z N×r
    ∂L/∂X = G·W0 + s·Z·A,       ∂L/∂A = s·Zᵀ·X,           ∂L/∂B = s·Gᵀ·H

as functional.py computes it. The product of an n×m and an m×l matrix takes 2·n·m·l FLOPs.
"""

from dataclasses import dataclass

from torch import nn

from ..layers import LoRAConv1D, LoRALayer, LoRALinear
from ..matching import lora_layer_class


@dataclass(frozen=True)
class LinearSize:
    """X is N×k and the weight d×k; which of X and the weight W0 require a gradient."""

    N: int
    d: int
    k: int
    x_requires_grad: bool
    weight_requires_grad: bool


@dataclass(frozen=True)
class AdapterSize:
    """The adapter's rank, which of A and B are trained, and whether W0 + s·B·A is formed before the product."""

    r: int
    A_requires_grad: bool
    B_requires_grad: bool
    materialized: bool


def linear_flops(size: LinearSize) -> tuple[int, int]:
    """FLOPs of the layer without its adapter: (forward, backward)."""
    product = 2 * size.N * size.d * size.k
    forward = product  # X·W0ᵀ
    backward = 0
    if size.x_requires_grad:
        backward += product  # ∂L/∂X = G·W0
    if size.weight_requires_grad:
        backward += product  # ∂L/∂W0 = Gᵀ·X
    return forward, backward


def adapter_flops(size: LinearSize, adapter: AdapterSize) -> tuple[int, int]:
    """FLOPs of the adapter, beyond those of `linear_flops`: (forward, backward)."""
    with_A = 2 * size.N * size.k * adapter.r  # X·Aᵀ, Z·A or Zᵀ·X
    with_B = 2 * size.N * size.d * adapter.r  # H·Bᵀ, G·B or Gᵀ·H
    B_times_A = 2 * size.d * size.k * adapter.r

    if adapter.materialized:
        forward = B_times_A  # W0 + s·B·A takes W0's place in the product with X
        if adapter.B_requires_grad:
            forward += with_A  # H, for ∂L/∂B
    else:
        forward = with_A + with_B  # H = X·Aᵀ, then H·Bᵀ

    backward = 0
    if size.x_requires_grad or adapter.A_requires_grad:
        backward += with_B  # Z = G·B
    if size.x_requires_grad:
        if adapter.materialized:
            backward += B_times_A  # W0 + s·B·A is formed again
        else:
            backward += with_A  # Z·A
    if adapter.A_requires_grad:
        backward += with_A  # ∂L/∂A = s·Zᵀ·X
    if adapter.B_requires_grad:
        backward += with_B  # ∂L/∂B = s·Gᵀ·H
    return forward, backward


def matrix_layer_type(layer: nn.Module) -> type[LoRALayer] | None:
    """LoRALinear or LoRAConv1D, whose `weight_to_matrix` gives the weight of a linear layer, adapted or not, as a
    matrix (d, k); None for another layer."""
    layer_type = type(layer) if isinstance(layer, LoRALayer) else lora_layer_class(layer)
    return layer_type if layer_type in (LoRALinear, LoRAConv1D) else None
