"""Singular value decomposition and truncation: the linear algebra under LoRA.

    W = U·diag(σ)·Vᵀ,   W ∈ R^{d×k},   σ₁ ≥ σ₂ ≥ … ≥ 0
    W_r = Σ_{i≤r} σ_i·u_i·v_iᵀ = B·A,   B ∈ R^{d×r},   A ∈ R^{r×k}

W_r is the closest matrix of rank at most r to W, in the Frobenius and in the spectral norm
(Eckart & Young 1936, Mirsky 1960). Lesson 01 derives it. What the singular values alone say stands
in `spectrum`; its functions can be imported from here too.

Every function takes matrices in any floating-point dtype. Narrower numbers than float32 are decomposed in
float32, and the results are returned in W's own dtype (a float16 overflows above 65,504).
"""

import math

import torch
from torch import Tensor

from ._checks import check_generator, check_integer, check_matrix, check_rank, check_tensor
from ._dtypes import at_least_float32
from .spectrum import effective_rank, energy, rank_at_energy, singular_values, stable_rank, truncation_error

__all__ = [
    "balanced_factors",
    "break_even_rank",
    "effective_rank",
    "energy",
    "randomized_svd",
    "randomized_svd_bound",
    "rank_at_energy",
    "singular_values",
    "stable_rank",
    "truncated_svd",
    "truncation_error",
]


def balanced_factors(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """B = U·√Σ and A = √Σ·Vᵀ, so that B·A = U·diag(S)·Vh with the singular values split evenly.

    Of all pairs with this product it is one with the least ‖B‖²_F + ‖A‖²_F, namely 2·ΣS, and it satisfies
    BᵀB = AAᵀ = diag(S).

    Args:
        U: left singular vectors as columns, shape (d, r).
        S: singular values, all ≥ 0, shape (r,).
        Vh: right singular vectors as rows, shape (r, k).

    Returns:
        B of shape (d, r) and A of shape (r, k), in the square root of S's units.

    Raises:
        TypeError: an argument is not a dense tensor of real floating-point numbers.
        ValueError: the shapes do not chain, an entry is not finite, or S has a negative entry.

    Example:
        >>> W = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]])
        >>> B, A = balanced_factors(*torch.linalg.svd(W, full_matrices=False))
        >>> torch.allclose(B @ A, W), torch.allclose(B.T @ B, A @ A.T)
        (True, True)

    Source:
        Srebro, Rennie & Jaakkola 2004 (the variational form of the nuclear norm).
    """
    check_matrix(U, "U")
    check_matrix(Vh, "Vh")
    check_tensor(S, "S")
    if S.shape != (U.shape[1],) or S.shape != (Vh.shape[0],):
        raise ValueError(
            f"U {tuple(U.shape)}, S {tuple(S.shape)} and Vh {tuple(Vh.shape)} do not chain; "
            "pass (d, r), (r,) and (r, k)"
        )
    if (S < 0).any():
        raise ValueError(
            f"S has a negative entry, {S.min().item():.3g}; take S.abs() and flip the signs of those columns of U"
        )
    root = S.sqrt()
    return U * root, root[:, None] * Vh


def truncated_svd(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B·A = W_r, the best approximation of W of rank at most r, singular values split evenly.

        min_{rank(M) ≤ r} ‖W − M‖ = ‖W − B·A‖,  in both norms:
        ‖W − B·A‖_F = (Σ_{i>r} σ_i²)^½,   ‖W − B·A‖₂ = σ_{r+1}

    B and A are unique only up to B·M, M⁻¹·A; the product is unique when σ_r > σ_{r+1}.
    Cost O(dk·min(d, k)): the whole SVD. `randomized_svd` costs O(dkr).

    Args:
        W: a matrix, shape (d, k).
        r: the rank, 1 … min(d, k).

    Returns:
        B of shape (d, r) and A of shape (r, k), in W's dtype.

    Raises:
        TypeError: W is not a dense tensor of real floating-point numbers, or r is not an integer.
        ValueError: W is not a finite, non-empty matrix, or r is outside 1 … min(d, k).

    Example:
        >>> W = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]])
        >>> B, A = truncated_svd(W, r=1)
        >>> B.shape, A.shape
        (torch.Size([3, 1]), torch.Size([1, 2]))
        >>> round(torch.linalg.norm(W - B @ A).item(), 4)  # σ₂
        3.0

    Source:
        Eckart & Young 1936; Mirsky 1960.
    """
    d, k = check_matrix(W)
    r = check_rank(r, d, k)
    U, S, Vh = torch.linalg.svd(at_least_float32(W), full_matrices=False)
    B, A = balanced_factors(U[:, :r], S[:r], Vh[:r])
    return B.to(W.dtype), A.to(W.dtype)


def break_even_rank(d: int, k: int) -> float:
    """dk/(d + k): below this rank, B and A together hold fewer numbers than the matrix.

        r·(d + k) < d·k   ⇔   r < dk/(d + k)        (d/2 when d = k)

    Args:
        d: rows of the matrix, at least 1.
        k: columns of the matrix, at least 1.

    Returns:
        The rank at which both hold equally many numbers; seldom an integer.

    Raises:
        TypeError: d or k is not an integer.
        ValueError: d or k is below 1.

    Example:
        >>> break_even_rank(300, 600)
        200.0

    Source:
        Counting: r·d + r·k numbers in B and A against d·k in the matrix.
    """
    d, k = check_integer(d, "d", 1), check_integer(k, "k", 1)
    return d * k / (d + k)


def randomized_svd(
    W: Tensor, r: int, oversampling: int = 10, power_iterations: int = 2, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U·diag(S)·Vh ≈ W_r, from r + `oversampling` random combinations of W's columns.

        Y = (W·Wᵀ)^q·W·Ω,  Ω ∈ R^{k×(r+o)} Gaussian;  Q = orth(Y);  SVD of the small QᵀW;  cut to r

    with q = `power_iterations`, o = `oversampling`. Between the products Y is orthonormalised, so that small
    singular values survive rounding. At q = 0 the expected error is bounded by `randomized_svd_bound`; each q
    sharpens it. Cost O((2q + 2)·dk·(r + o) + (d + k)·(r + o)²), against O(dk·min(d, k)) for the whole SVD.

    Args:
        W: a matrix, shape (d, k).
        r: the rank, 1 … min(d, k).
        oversampling: additional random columns, at least 0.
        power_iterations: additional products with W·Wᵀ, at least 0.
        generator: makes Ω reproducible, on W's device; None takes torch's global generator.

    Returns:
        U of shape (d, r), S of shape (r,), descending, and Vh of shape (r, k), in W's dtype.

    Raises:
        TypeError: W is not a dense tensor of real floating-point numbers, a count is not an integer, or the generator
            is not a torch.Generator.
        ValueError: W is not a finite, non-empty matrix, a count is out of range, or the generator is on another device.

    Example:
        >>> W = torch.outer(torch.arange(40.0), torch.ones(30))  # rank 1
        >>> U, S, Vh = randomized_svd(W, r=1, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(U * S @ Vh, W, atol=1e-3)
        True

    Source:
        Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    d, k = check_matrix(W)
    r = check_rank(r, d, k)
    columns = min(r + check_integer(oversampling, "oversampling", 0), d, k)
    power_iterations = check_integer(power_iterations, "power_iterations", 0)
    check_generator(generator, W.device)
    M = at_least_float32(W)
    omega = torch.randn(k, columns, generator=generator, dtype=M.dtype, device=M.device)
    Q = torch.linalg.qr(M @ omega).Q
    for _ in range(power_iterations):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q).Q).Q
    small_U, S, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return (Q @ small_U[:, :r]).to(W.dtype), S[:r].to(W.dtype), Vh[:r].to(W.dtype)


def randomized_svd_bound(S: Tensor, r: int, oversampling: int) -> float:
    """The most that `randomized_svd` without power iterations leaves, on average, in the spectral norm.

        E‖W − Q·Qᵀ·W‖₂ ≤ (1 + √(r/(o−1)))·σ_{r+1} + (e·√(r+o)/o)·(Σ_{j>r} σ_j²)^½,    o = `oversampling`

    Q is the basis of r + o columns, before the cut to r (the cut adds at most σ_{r+1}).

    Args:
        S: all singular values of W, descending, shape (min(d, k),).
        r: the rank, 1 … len(S).
        oversampling: additional random columns, at least 2.

    Returns:
        The bound, in S's units.

    Raises:
        TypeError: S is not a tensor of real floating-point numbers, or r or oversampling is not an integer.
        ValueError: S is not a finite vector, is negative somewhere or not descending, or a count is out of range.

    Example:
        >>> round(randomized_svd_bound(torch.tensor([4.0, 3.0, 0.0]), r=1, oversampling=2), 4)
        13.0623

    Source:
        Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), theorem 10.6.
    """
    check_tensor(S, "S")
    if S.ndim != 1:
        raise ValueError(f"S must be a vector of singular values, got shape {tuple(S.shape)}; use singular_values(W)")
    r = check_integer(r, "r", 1, len(S))
    extra = check_integer(oversampling, "oversampling", 2, None, "the bound divides by oversampling − 1")
    if (S < 0).any() or (S.diff() > 0).any():
        raise ValueError(f"S = {S.tolist()} must be non-negative and descending, as singular_values(W) returns it")
    tail = S[r:].double()
    if len(tail) == 0:
        return 0.0
    leading = (1 + math.sqrt(r / (extra - 1))) * tail[0].item()
    return leading + math.e * math.sqrt(r + extra) / extra * tail.norm().item()
