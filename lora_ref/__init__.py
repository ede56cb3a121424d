"""lora_ref: LoRA from its mathematics. Every function is an equation; the lessons in notebooks/ prove them.

- spectrum, svd, projections, intrinsic_dimension, updates: the linear algebra, and what an update looks like.
- config, initialization, functional, layers: one LoRA layer. model, checkpoint, batched: whole models, files, serving.
- measure, environment: time and memory of a piece of code, and the machine that it ran on.
- cost: parameters, FLOPs and bytes from shapes. bench: paired timings, python -m lora_ref.bench.
- course: what the lessons need; nothing outside it imports it.
"""

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
