"""How many bytes a number takes, in each way of storing a model while it is trained (`Scheme`, `SCHEMES`)."""

from typing import NamedTuple

from .._checks import check_choice

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a code; an 8-bit scale for 64 numbers; a 32-bit one for 256 such scales


class Scheme(NamedTuple):
    """Bytes per number of a model that is trained with AdamW.

    A trained parameter takes `weight + gradient + moments + master` bytes, a frozen one `frozen`, or `linear` where
    frozen linear layers are quantised.

    Args:
        frozen: of a frozen parameter.
        weight: of a trained parameter.
        gradient: of its gradient.
        moments: of AdamW's two moments of it, together.
        master: of its master copy in 32 bits; 0 where there is none.
        activation: of an activation, 2 or 4.
        linear: of a frozen linear layer's weight, the output head's excepted; None where those are not quantised.

    Example:
        >>> scheme = SCHEMES["mixed"]
        >>> scheme.weight + scheme.gradient + scheme.moments + scheme.master
        16
        >>> SCHEMES["fp32"]._replace(moments=0)  # SGD without momentum
        Scheme(frozen=4, weight=4, gradient=4, moments=0, master=0, activation=4, linear=None)
    """

    frozen: int
    weight: int
    gradient: int
    moments: int
    master: int
    activation: int
    linear: float | None = None


SCHEMES = {
    "fp32": Scheme(frozen=4, weight=4, gradient=4, moments=8, master=0, activation=4),
    "bf16": Scheme(frozen=2, weight=2, gradient=2, moments=4, master=0, activation=2),
    "mixed": Scheme(frozen=2, weight=2, gradient=2, moments=8, master=4, activation=2),
    "nf4": Scheme(frozen=2, weight=2, gradient=2, moments=8, master=4, activation=2, linear=NF4_BITS / 8),
}


def check_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of this name, or this scheme itself; ValueError for any other."""
    if not isinstance(scheme, Scheme):
        return SCHEMES[check_choice(scheme, "scheme", SCHEMES, "or pass a Scheme(…)")]
    if scheme.activation not in (2, 4):
        raise ValueError(f"activation = {scheme.activation!r} bytes is not counted; choose 2 or 4")
    return scheme
