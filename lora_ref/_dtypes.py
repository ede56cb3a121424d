"""Which dtype a computation runs in: LAPACK's lower limit, and autocast."""

import torch
from torch import Tensor


def at_least_float32(W: Tensor) -> Tensor:
    """W itself in float32 or float64, else W in float32: LAPACK has no decompositions of narrower numbers."""
    return W if W.dtype in (torch.float32, torch.float64) else W.float()


def is_autocast(*tensors: Tensor) -> bool:
    """Whether autocast is on and casts these tensors to its dtype; it does not cast float64, nor meta tensors."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return False
    return all(tensor.dtype != torch.float64 for tensor in tensors)
