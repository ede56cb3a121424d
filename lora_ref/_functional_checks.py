"""The checks of `functional.lora_linear`: fast for arguments that fit, explicit for those that do not."""

import math

from torch import Tensor

from ._checks import check_finite, check_probability
from ._dtypes import is_autocast


def check_lora_linear(x, weight, bias, A, B, scale, dropout_p) -> None:
    """Refuse arguments that the equation does not fit; those that do pass the first test, in 3 microseconds."""
    try:
        (d, k), (r, _) = weight.shape, A.shape
        fits = x.shape[-1] == k == A.shape[1] and B.shape == (d, r) and (bias is None or bias.shape == (d,))
        like = x.device == weight.device == A.device == B.device and (x.dtype == weight.dtype or is_autocast(x, weight))
        if fits and like and x.is_floating_point() and A.is_floating_point() and B.is_floating_point():
            if bias is None or (bias.device == x.device and (bias.dtype == x.dtype or is_autocast(x, bias))):
                if not isinstance(scale, Tensor) and -math.inf < scale < math.inf and 0 <= dropout_p < 1:
                    return
    except (AttributeError, IndexError, TypeError, ValueError):
        pass  # whatever it was, the checks one by one name it
    tensors = {"x": x, "weight": weight, "bias": bias, "A": A, "B": B}
    if bias is None:
        del tensors["bias"]
    _check_kinds(tensors)
    _check_shapes(tensors)
    _check_dtypes(tensors)
    check_finite(scale, "scale", "take it from LoRAConfig(r=…, lora_alpha=…).scale")
    check_probability(dropout_p, "dropout_p")


def _check_kinds(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; use torch.as_tensor({name})")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must hold floating-point numbers, got {tensor.dtype}; use {name}.float()")
    device = tensors["x"].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}; move all of them to one device")


def _check_shapes(tensors: dict[str, Tensor]) -> None:
    x, weight, A, B = (tensors[name] for name in ("x", "weight", "A", "B"))
    bias = tensors.get("bias")
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    if weight.ndim != 2 or A.ndim != 2 or B.ndim != 2 or x.ndim == 0:
        raise ValueError(f"weight (d, k), A (r, k) and B (d, r) must be matrices and x (…, k) no scalar; got {shapes}")
    (d, k), r = weight.shape, len(A)
    if x.shape[-1] != k or A.shape[1] != k or B.shape != (d, r) or (bias is not None and bias.shape != (d,)):
        raise ValueError(
            f"shapes do not fit: {shapes}; with weight (d, k) = ({d}, {k}) and A of {r} rows, x must be (…, {k}), "
            f"A ({r}, {k}), B ({d}, {r}), bias ({d},); is a factor transposed?"
        )


def _check_dtypes(tensors: dict[str, Tensor]) -> None:
    x = tensors["x"]
    for name in ("weight", "bias"):
        if name in tensors and tensors[name].dtype != x.dtype and not is_autocast(x, tensors[name]):
            raise TypeError(f"x is {x.dtype}, {name} is {tensors[name].dtype}; cast x, or run under torch.autocast")
