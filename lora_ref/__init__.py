"""lora_ref: LoRA from its mathematics. Every function is an equation; the lessons prove them."""

from .intrinsic_dimension import RandomSubspace
from .svd import energy, randomized_svd, truncated_svd

__version__ = "0.1.0"
__all__ = ["RandomSubspace", "energy", "randomized_svd", "truncated_svd"]
