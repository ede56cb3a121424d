"""Checks of arguments: every public function calls these first, before it changes anything.

Each error names the argument, the value it had, and how to fix it. A value of the wrong kind is a TypeError, a value
out of range a ValueError.
"""

import difflib
import math
import numbers
import operator
import re
from collections.abc import Iterable

import torch
from torch import Tensor


def check_tensor(tensor: Tensor, name: str) -> None:
    """Refuse anything but a non-empty, real, floating-point, finite tensor that holds numbers."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(tensor).__name__}; convert it with torch.as_tensor({name})"
        )
    if not tensor.is_floating_point():
        fix = f"take {name}.real" if tensor.is_complex() else f"use {name}.double()"
        raise TypeError(f"{name} must hold real floating-point numbers, got {tensor.dtype}; {fix}")
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
    """Refuse anything but None or a generator of this device; a seed is not a generator."""
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
    """Refuse anything but a number in (0, 1]; return it as a float."""
    choose = f"choose a number with 0 < {name} <= 1, such as 0.9"
    _check_real(fraction, name, choose)
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} = {fraction!r} is out of range; {choose}")
    return float(fraction)


def check_probability(value: float, name: str) -> float:
    """Refuse anything but a probability in [0, 1), such as a dropout's; return it as a float."""
    choose = f"choose a number with 0 <= {name} < 1, such as 0.1"
    _check_real(value, name, choose)
    if not 0 <= value < 1:
        raise ValueError(f"{name} = {value!r} is out of range; {choose}")
    return float(value)


def check_positive(value: float, name: str, fix: str = "") -> float:
    """Refuse anything but a finite number above 0; return it as a float. `fix` says where to take a good one from."""
    choose = f"choose a finite number above 0{f' ({fix})' if fix else ''}"
    number = _check_real(value, name, choose)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} = {value!r} is out of range; {choose}")
    return number


def check_finite(value: float, name: str, fix: str = "") -> float:
    """Refuse anything but a finite number; return it as a float."""
    choose = f"choose a finite number{f' ({fix})' if fix else ''}"
    number = _check_real(value, name, choose)
    if not math.isfinite(number):
        raise ValueError(f"{name} = {value!r} is not finite; {choose}")
    return number


def _check_real(value: float, name: str, choose: str) -> float:
    """Refuse anything but a real number of Python or NumPy; return it as a float, infinite where it is too large."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}; {choose}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_bool(value: bool, name: str) -> bool:
    """Refuse anything but True and False; return it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return value


def check_choice(value: object, name: str, choices: Iterable, fix: str = ""):
    """Refuse anything but one of `choices`; return it. 1 is not True here, nor 0 False."""
    choices = list(choices)
    for choice in choices:
        if isinstance(value, type(choice)) and isinstance(value, bool) == isinstance(choice, bool) and value == choice:
            return value
    *others, last = map(repr, choices)
    known = f"{', '.join(others)} or {last}" if others else last
    raise ValueError(f"{name} = {value!r} is unknown; choose {known}{f'; {fix}' if fix else ''}")


def check_regex(expression: str, name: str, template: str = "{}") -> re.Pattern:
    """Refuse anything but a regular expression; return it compiled, inside `template` where one is given."""
    if not isinstance(expression, str):
        raise TypeError(f"{name} must be a regular expression, got {expression!r} of type {type(expression).__name__}")
    try:
        return re.compile(template.format(expression))
    except re.error as error:
        raise ValueError(
            f"{name} = {expression!r} is not a regular expression: {error}; re.escape takes a name literally"
        ) from None


def did_you_mean(name: str, known: Iterable[str], listed: int | None = None) -> str:
    """A hint for a name that is not among the known ones.

    Args:
        name: what was given.
        known: the names that there are.
        listed: how many of them to list where none is near: None for all, 0 for none (the hint is then empty).

    Returns:
        "did you mean 'a', 'b'?" with at most three near names, else "there are a, b, c", else "".
    """
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(map(repr, near))}?"
    if listed == 0:
        return ""
    if not known:
        return "there are none"
    shown = known[:listed]
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"there are {', '.join(shown)}{more}"
