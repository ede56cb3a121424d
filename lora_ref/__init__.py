"""lora_ref: LoRA from its mathematics. Every function is an equation; the lessons prove them."""

from .config import LoRAConfig
from .functional import lora_linear
from .intrinsic_dimension import RandomSubspace
from .layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALinear
from .svd import energy, randomized_svd, truncated_svd

__version__ = "0.1.0"
__all__ = [
    "LoRAConfig",
    "LoRAConv1D",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "RandomSubspace",
    "energy",
    "lora_linear",
    "randomized_svd",
    "truncated_svd",
]
