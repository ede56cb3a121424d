"""Checks at the door: every public function refuses bad input here, before it changes anything.

Each error names the argument, the value it had, and how to mend it.
"""

import numbers
import operator

import torch
from torch import Tensor


def check_tensor(tensor: Tensor, name: str) -> None:
    """Refuse anything but a non-empty, real, floating-point, finite tensor that holds numbers."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(tensor).__name__}; convert it with torch.as_tensor({name})"
        )
    if not tensor.is_floating_point():
        mend = f"take {name}.real" if tensor.is_complex() else f"use {name}.double()"
        raise TypeError(f"{name} must hold real floating-point numbers, got {tensor.dtype}; {mend}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}; use {name}.to_dense()")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no numbers; load its values first")
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(tensor.shape)}; every dimension must be at least 1")
    finite = torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float())  # float8 has no isfinite
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(f"{name} has {bad} NaN or infinite entries; find where they come from, or torch.nan_to_num")


def check_matrix(matrix: Tensor, name: str = "W") -> tuple[int, int]:
    """Refuse anything but a finite real matrix; return its shape (d, k) = (out, in)."""
    if isinstance(matrix, Tensor) and matrix.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix of shape (d, k), got shape {tuple(matrix.shape)}; "
            f"use {name}.reshape(d, k) or {name}.flatten(1)"
        )
    check_tensor(matrix, name)
    return matrix.shape[0], matrix.shape[1]


def check_integer(value: int, name: str, low: int, high: int | None = None, why: str = "") -> int:
    """Refuse anything but an integer in [low, high]; return it as a Python int."""
    bound = f"at least {low}" if high is None else f"between {low} and {high}"
    hint = f" ({why})" if why else ""
    try:
        if isinstance(value, bool):
            raise TypeError
        integer = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, got {value!r} of type {type(value).__name__}; choose one {bound}{hint}"
        ) from None
    if integer < low or (high is not None and integer > high):
        raise ValueError(f"{name} = {integer} is out of range; choose {name} {bound}{hint}")
    return integer


def check_rank(r: int, d: int, k: int) -> int:
    """Refuse any rank outside 1 ≤ r ≤ min(d, k)."""
    return check_integer(r, "r", 1, min(d, k), f"a {d}×{k} matrix has rank at most {min(d, k)}")


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Refuse anything but None or a generator of this device; a seed is no generator."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r} of type {type(generator).__name__}; "
            "use torch.Generator().manual_seed(0)"
        )
    if generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device}, the numbers it draws are for {device}; "
            f"use torch.Generator({device.type!r})"
        )


def check_fraction(fraction: float, name: str = "fraction") -> float:
    """Refuse anything but a number in (0, 1]."""
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 < fraction <= 1:
        raise ValueError(f"{name} = {fraction!r} is out of range; choose a number with 0 < {name} <= 1, such as 0.9")
    return float(fraction)
