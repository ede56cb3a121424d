"""The singular values of a matrix, and what they say: truncation errors, energy, three kinds of rank.

    W = U·diag(σ)·Vᵀ,   W ∈ R^{d×k},   σ₁ ≥ σ₂ ≥ … ≥ 0

Every function takes one matrix W of shape (d, k) in any floating-point dtype. Narrower numbers than float32 are
decomposed in float32; `singular_values` and `truncation_error` are returned in W's own dtype (a float16 overflows
above 65,504), while `energy`, a share, stays in float32. Each costs O(dk·min(d, k)).
"""

import math

import torch
from torch import Tensor

from ._checks import check_choice, check_fraction, check_matrix
from ._dtypes import at_least_float32


def _spectrum(W: Tensor) -> Tensor:
    """The singular values in the precision in which they are computed: no 16-bit overflow or rounding."""
    check_matrix(W)
    return torch.linalg.svdvals(at_least_float32(W))


def _nonzero_spectrum(W: Tensor) -> Tensor:
    """The same; refuses the zero matrix."""
    S = _spectrum(W)
    if S[0] == 0:
        raise ValueError("W is the zero matrix and has no energy to share; pass a matrix with a non-zero entry")
    return S


def singular_values(W: Tensor) -> Tensor:
    """σ₁ ≥ … ≥ σ_min(d,k) ≥ 0.

    Args:
        W: a matrix, shape (d, k).

    Returns:
        The singular values, shape (min(d, k),), in W's units and dtype.

    Raises:
        TypeError: W is not a dense tensor of real floating-point numbers.
        ValueError: W is not a finite, non-empty matrix.

    Example:
        >>> W = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]])
        >>> singular_values(W).round(decimals=4).tolist()
        [4.0, 3.0]

    Source:
        torch.linalg.svdvals (LAPACK gesdd).
    """
    return _spectrum(W).to(W.dtype)


def truncation_error(W: Tensor, norm: str = "fro") -> Tensor:
    """The error that truncation leaves, at every rank: e_r for r = 0 … min(d, k).

        norm="fro":      e_r = (Σ_{i>r} σ_i²)^½
        norm="spectral": e_r = σ_{r+1}            (both 0 at r = min(d, k))

    Args:
        W: a matrix, shape (d, k).
        norm: the norm of the error, "fro" (Frobenius) or "spectral".

    Returns:
        The errors, shape (min(d, k) + 1,), in W's units and dtype; e_0 is the norm of W itself.

    Raises:
        TypeError: W is not a dense tensor of real floating-point numbers.
        ValueError: W is not a finite, non-empty matrix, or another norm.

    Example:
        >>> W = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]])
        >>> truncation_error(W).round(decimals=4).tolist()
        [5.0, 3.0, 0.0]

    Source:
        Eckart & Young 1936; Mirsky 1960.
    """
    check_choice(norm, "norm", ("fro", "spectral"))
    errors = _spectrum(W)
    if norm == "fro" and errors[0] > 0:
        largest = errors[0]  # divided out, so that no square overflows or vanishes
        squares = (errors / largest).square()
        errors = squares.flip(0).cumsum(0).flip(0).sqrt() * largest  # summed from the smallest up: no cancellation
    return torch.cat([errors, errors.new_zeros(1)]).to(W.dtype)


def energy(W: Tensor) -> Tensor:
    """E_r = Σ_{i≤r} σ_i² / Σ_i σ_i²: the share of ‖W‖²_F that the best matrix of rank r holds.

    Args:
        W: a matrix, shape (d, k), not all zero.

    Returns:
        The shares, shape (min(d, k),), entry r − 1 for rank r; they rise from E_1 ≥ 1/min(d, k) to 1.

    Raises:
        TypeError: W is not a dense tensor of real floating-point numbers.
        ValueError: W is not a finite, non-empty matrix, or is the zero matrix, which has no energy to share.

    Example:
        >>> W = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]])
        >>> [round(share, 4) for share in energy(W).tolist()]  # 16/25, 25/25
        [0.64, 1.0]

    Source:
        Eckart & Young 1936; 1 − E_r is the square of their relative error.
    """
    S = _nonzero_spectrum(W)
    squares = (S / S[0]).square()  # scaled first, so that no square overflows or vanishes
    cumulative = squares.cumsum(0)
    return cumulative / cumulative[-1]


def rank_at_energy(W: Tensor, fraction: float = 0.9) -> int:
    """The least r with E_r ≥ fraction: how many directions carry that share of ‖W‖²_F.

    Args:
        W: a matrix, shape (d, k), not all zero.
        fraction: the share, in (0, 1].

    Returns:
        The rank, 1 … min(d, k).

    Raises:
        TypeError: W is not a dense tensor of real floating-point numbers, or the fraction is not a number.
        ValueError: W is not a finite, non-empty, non-zero matrix, or the fraction is outside (0, 1].

    Example:
        >>> W = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]])
        >>> rank_at_energy(W, 0.6), rank_at_energy(W, 0.7)
        (1, 2)

    Source:
        Eckart & Young 1936, as `energy`.
    """
    fraction = check_fraction(fraction)
    E = energy(W)
    return int((E < min(fraction, E[-1].item())).sum()) + 1


def stable_rank(W: Tensor) -> float:
    """‖W‖²_F / ‖W‖²₂ = Σσ_i² / σ₁², between 1 and rank(W); small singular values hardly change it.

    Args:
        W: a matrix, shape (d, k), not all zero.

    Returns:
        The stable rank, without unit.

    Raises:
        TypeError: W is not a dense tensor of real floating-point numbers.
        ValueError: W is not a finite, non-empty, non-zero matrix.

    Example:
        >>> W = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]])
        >>> round(stable_rank(W), 4)  # 25/16
        1.5625

    Source:
        Rudelson & Vershynin 2007.
    """
    return 1.0 / energy(W)[0].item()


def effective_rank(W: Tensor) -> float:
    """exp(−Σ q_i·ln q_i) with q_i = σ_i / Σσ: the exponential of the spectrum's entropy.

    Between 1 and rank(W); equal to rank(W) exactly when all non-zero σ_i are equal.

    Args:
        W: a matrix, shape (d, k), not all zero.

    Returns:
        The effective rank, without unit.

    Raises:
        TypeError: W is not a dense tensor of real floating-point numbers.
        ValueError: W is not a finite, non-empty, non-zero matrix.

    Example:
        >>> W = torch.tensor([[0.0, 3.0], [3.0, 0.0], [0.0, 0.0]])  # two equal singular values
        >>> round(effective_rank(W), 4)
        2.0

    Source:
        Roy & Vetterli 2007.
    """
    S = _nonzero_spectrum(W).double()
    shares = S / S.sum()
    return math.exp(torch.special.entr(shares).sum().item())
