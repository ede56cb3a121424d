"""What a training step of a transformer takes, from shapes alone: parameters, FLOPs and bytes."""

from .estimate import NF4_BITS, SCHEMES, Cost, Scheme, cost

__all__ = ["NF4_BITS", "SCHEMES", "Cost", "Scheme", "cost"]
