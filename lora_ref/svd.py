"""Singular value decomposition and truncation: the linear algebra under LoRA.

    W = U·diag(σ)·Vᵀ,   W ∈ R^{d×k},   σ₁ ≥ σ₂ ≥ … ≥ 0
    W_r = Σ_{i≤r} σ_i·u_i·v_iᵀ = B·A,   B ∈ R^{d×r},   A ∈ R^{r×k}

W_r is the closest matrix of rank at most r to W, in the Frobenius and in the spectral norm
(Eckart & Young 1936, Mirsky 1960). Lesson 01 derives it.

Every function takes one matrix W of shape (d, k), d rows and k columns, in any floating-point
dtype. 16-bit matrices are decomposed in float32, and matrices and singular values are returned in
W's own dtype (a float16 overflows above 65,504); `energy`, a share, stays in float32.
All raise TypeError or ValueError, with the value and the mend, for anything but a finite,
non-empty, real matrix.
"""

import math

import torch
from torch import Tensor

from ._checks import check_fraction, check_generator, check_integer, check_matrix, check_rank, check_tensor


def _computable(W: Tensor) -> Tensor:
    """LAPACK knows no 16-bit numbers: those go through float32."""
    return W if W.dtype in (torch.float32, torch.float64) else W.float()


def _spectrum(W: Tensor) -> Tensor:
    """The singular values in the precision they are computed in: no 16-bit overflow or rounding."""
    check_matrix(W)
    return torch.linalg.svdvals(_computable(W))


def _nonzero_spectrum(W: Tensor) -> Tensor:
    """The same, refusing the zero matrix."""
    S = _spectrum(W)
    if S[0] == 0:
        raise ValueError("W is the zero matrix and has no energy to share; pass a matrix with a non-zero entry")
    return S


def singular_values(W: Tensor) -> Tensor:
    """σ₁ ≥ … ≥ σ_min(d,k) ≥ 0, shape (min(d, k),), in W's units.

    Cost O(dk·min(d, k)). Errors: as the module says.
    Source: torch.linalg.svdvals (LAPACK gesdd).
    """
    return _spectrum(W).to(W.dtype)


def balanced_factors(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """B = U·√Σ and A = √Σ·Vᵀ, so that B·A = U·diag(S)·Vh with the singular values split evenly.

    Shapes: U (d, r), S (r,), Vh (r, k) → B (d, r), A (r, k). Of all pairs with this product it is
    one with the least ‖B‖²_F + ‖A‖²_F, namely 2·ΣS, and it satisfies BᵀB = AAᵀ = diag(S).
    Errors: ValueError when the shapes do not chain or S has a negative entry.
    Source: Srebro, Rennie & Jaakkola 2004 (the variational form of the nuclear norm).
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

    Shapes: W (d, k), 1 ≤ r ≤ min(d, k) → B (d, r), A (r, k). B and A are unique only up to
    B·M, M⁻¹·A; the product is unique when σ_r > σ_{r+1}.
    Cost O(dk·min(d, k)): the whole SVD. `randomized_svd` costs O(dkr).
    Errors: as the module says, and ValueError for r < 1 or r > min(d, k).
    Source: Eckart & Young 1936; Mirsky 1960.
    """
    d, k = check_matrix(W)
    r = check_rank(r, d, k)
    U, S, Vh = torch.linalg.svd(_computable(W), full_matrices=False)
    B, A = balanced_factors(U[:, :r], S[:r], Vh[:r])
    return B.to(W.dtype), A.to(W.dtype)


def truncation_error(W: Tensor, norm: str = "fro") -> Tensor:
    """The error that truncation leaves, at every rank: e_r for r = 0 … min(d, k).

        norm="fro":      e_r = (Σ_{i>r} σ_i²)^½
        norm="spectral": e_r = σ_{r+1}            (both 0 at r = min(d, k))

    Shape (min(d, k) + 1,), in W's units; e_0 is the norm of W itself.
    Errors: as the module says, and ValueError for another norm. Source: Eckart & Young 1936.
    """
    if norm not in ("fro", "spectral"):
        raise ValueError(f"norm = {norm!r} is unknown; choose 'fro' or 'spectral'")
    errors = _spectrum(W)
    if norm == "fro" and errors[0] > 0:
        largest = errors[0]  # divided out, so that no square overflows or vanishes
        squares = (errors / largest).square()
        errors = squares.flip(0).cumsum(0).flip(0).sqrt() * largest  # summed from the smallest up: no cancellation
    return torch.cat([errors, errors.new_zeros(1)]).to(W.dtype)


def energy(W: Tensor) -> Tensor:
    """E_r = Σ_{i≤r} σ_i² / Σ_i σ_i², the share of ‖W‖²_F that the best rank-r matrix keeps.

    Shape (min(d, k),), entry r − 1 for rank r; rises from E_1 ≥ 1/min(d, k) to 1.
    Errors: as the module says, and ValueError for the zero matrix, which has no energy to share.
    Source: Eckart & Young 1936; 1 − E_r is the square of their relative error.
    """
    S = _nonzero_spectrum(W)
    squares = (S / S[0]).square()  # scaled first, so that no square overflows or vanishes
    cumulative = squares.cumsum(0)
    return cumulative / cumulative[-1]


def rank_at_energy(W: Tensor, fraction: float = 0.9) -> int:
    """The least r with E_r ≥ fraction: how many directions carry that share of ‖W‖²_F.

    Errors: as `energy`, and ValueError for a fraction outside (0, 1]. Source: as `energy`.
    """
    fraction = check_fraction(fraction)
    E = energy(W)
    return int((E < min(fraction, E[-1].item())).sum()) + 1


def stable_rank(W: Tensor) -> float:
    """‖W‖²_F / ‖W‖²₂ = Σσ_i² / σ₁², between 1 and rank(W); small entries hardly move it.

    Errors: as `energy`. Source: Rudelson & Vershynin 2007.
    """
    return 1.0 / energy(W)[0].item()


def effective_rank(W: Tensor) -> float:
    """exp(−Σ p_i·ln p_i) with p_i = σ_i / Σσ: the exponential of the spectrum's entropy.

    Between 1 and rank(W); equal to rank(W) exactly when all non-zero σ_i are equal.
    Errors: as `energy`. Source: Roy & Vetterli 2007.
    """
    S = _nonzero_spectrum(W).double()
    p = S / S.sum()
    return math.exp(torch.special.entr(p).sum().item())


def break_even_rank(d: int, k: int) -> float:
    """dk/(d + k): below this rank, B and A together hold fewer numbers than the matrix.

        r·(d + k) < d·k   ⇔   r < dk/(d + k)        (d/2 when d = k)

    Errors: ValueError or TypeError unless d and k are positive integers.
    Source: counting, r·d + r·k numbers in B and A against d·k in the matrix.
    """
    d, k = check_integer(d, "d", 1), check_integer(k, "k", 1)
    return d * k / (d + k)


def randomized_svd(
    W: Tensor, r: int, oversampling: int = 10, power_iterations: int = 2, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U·diag(S)·Vh ≈ W_r, from r + p random combinations of W's columns.

        Y = (W·Wᵀ)^q·W·Ω,  Ω ∈ R^{k×(r+p)} Gaussian;  Q = orth(Y);  SVD of the small QᵀW;  keep r

    Shapes: W (d, k), 1 ≤ r ≤ min(d, k) → U (d, r), S (r,), Vh (r, k). p = `oversampling` ≥ 0,
    q = `power_iterations` ≥ 0, with an orthonormalisation between products so that small
    singular values survive rounding. `generator` makes Ω reproducible.
    Cost O((2q + 2)·dk·(r + p) + (d + k)·(r + p)²), against O(dk·min(d, k)) for the whole SVD.
    At q = 0 its expected error is bounded by `randomized_svd_bound`; each q sharpens it.
    Errors: as `truncated_svd`, and for a negative or non-integer p or q.
    Source: Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    d, k = check_matrix(W)
    r = check_rank(r, d, k)
    columns = min(r + check_integer(oversampling, "oversampling", 0), d, k)
    power_iterations = check_integer(power_iterations, "power_iterations", 0)
    check_generator(generator, W.device)
    M = _computable(W)
    omega = torch.randn(k, columns, generator=generator, dtype=M.dtype, device=M.device)
    Q = torch.linalg.qr(M @ omega).Q
    for _ in range(power_iterations):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q).Q).Q
    small_U, S, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return (Q @ small_U[:, :r]).to(W.dtype), S[:r].to(W.dtype), Vh[:r].to(W.dtype)


def randomized_svd_bound(S: Tensor, r: int, oversampling: int) -> float:
    """What `randomized_svd` with q = 0 leaves at most, on average, in the spectral norm.

        E‖W − Q·Qᵀ·W‖₂ ≤ (1 + √(r/(p−1)))·σ_{r+1} + (e·√(r+p)/p)·(Σ_{j>r} σ_j²)^½

    Q is the basis of r + p columns, before the cut to r (the cut adds at most σ_{r+1}).
    Shapes: S (min(d, k),) descending; result in S's units. Errors: ValueError unless
    1 ≤ r ≤ len(S), p ≥ 2 and S is descending and non-negative.
    Source: Halko, Martinsson & Tropp 2011, theorem 10.6.
    """
    check_tensor(S, "S")
    if S.ndim != 1:
        raise ValueError(f"S must be a vector of singular values, got shape {tuple(S.shape)}; use singular_values(W)")
    r = check_integer(r, "r", 1, len(S))
    p = check_integer(oversampling, "oversampling", 2, None, "the bound divides by p − 1")
    if (S < 0).any() or (S.diff() > 0).any():
        raise ValueError(f"S = {S.tolist()} must be non-negative and descending, as singular_values(W) returns it")
    tail = S[r:].double()
    if len(tail) == 0:
        return 0.0
    return (1 + math.sqrt(r / (p - 1))) * tail[0].item() + math.e * math.sqrt(r + p) / p * tail.norm().item()
