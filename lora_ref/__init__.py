"""lora_ref: LoRA from its mathematics. Every function is an equation; the lessons prove them."""

from .checkpoint import load_adapter, save_adapter
from .config import LoRAConfig
from .functional import lora_linear
from .intrinsic_dimension import RandomSubspace
from .layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALinear
from .model import add_lora, count_parameters, lora_parameters, merge, unmerge
from .svd import energy, randomized_svd, truncated_svd

__version__ = "0.1.0"
__all__ = [
    "LoRAConfig",
    "LoRAConv1D",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "RandomSubspace",
    "add_lora",
    "count_parameters",
    "energy",
    "load_adapter",
    "lora_linear",
    "lora_parameters",
    "merge",
    "randomized_svd",
    "save_adapter",
    "truncated_svd",
    "unmerge",
]
