"""What an update ΔW = W − W0 looks like: its directions, and how they lie to W0's (its spectrum: `svd`).

Each measure has a *null*: what a matrix or a subspace of the same size, drawn at random, would give. A number
without its null says nothing: two random 8-dimensional subspaces of a 12-dimensional space overlap by two thirds.
"""

import torch
from torch import Tensor

from ._checks import check_integer, check_matrix, check_rank
from .svd import truncated_svd


def subspace_similarity(U: Tensor, V: Tensor, i: int, j: int) -> float:
    """φ(U, V, i, j) = ‖U_iᵀV_j‖²_F / min(i, j) ∈ [0, 1], U_i the first i columns of U.

    U (n, p) and V (n, q) have orthonormal columns, such as singular vectors. 1: one of the two subspaces contains
    the other; 0: they are orthogonal. Null: `similarity_null`. Hu et al. 2021, section 7.2.
    Errors: ValueError when the columns have unequal length, or i, j exceed their number.
    """
    check_matrix(U, "U")
    check_matrix(V, "V")
    if len(U) != len(V):
        raise ValueError(f"U has {len(U)} rows and V {len(V)}; compare directions of one space")
    i = check_integer(i, "i", 1, U.shape[1], f"U has {U.shape[1]} columns")
    j = check_integer(j, "j", 1, V.shape[1], f"V has {V.shape[1]} columns")
    return ((U[:, :i].T @ V[:, :j]).square().sum() / min(i, j)).item()


def similarity_null(n: int, i: int, j: int) -> float:
    """E φ of two independent, uniformly random subspaces of R^n: E‖U_iᵀV_j‖²_F = ij/n, hence max(i, j)/n."""
    return max(i, j) / n


def amplification(W: Tensor, dW: Tensor, r: int) -> float:
    """‖ΔW_r‖_F / ‖U_rᵀ W V_r‖_F: how much stronger the update is than W in the update's own directions.

    U_r, V_r: the first r singular vectors of ΔW, ΔW_r its truncation. Hu et al. 2021, table 7. A large factor may
    mean that ΔW is large, or that W is weak there: compare with `amplification_null`. Errors: unequal shapes.
    """
    check_matrix(W)
    check_rank(r, *W.shape)
    if W.shape != dW.shape:
        raise ValueError(f"W is {tuple(W.shape)} and dW {tuple(dW.shape)}; pass a weight and its own update")
    B, A = truncated_svd(dW, r)
    U, V = torch.linalg.qr(B).Q, torch.linalg.qr(A.T).Q
    return ((B @ A).norm() / (U.T @ W @ V).norm()).item()


def amplification_null(W: Tensor, dW: Tensor, r: int) -> float:
    """The factor if ΔW's directions had nothing to do with W's: ‖ΔW_r‖_F·√(dk) / (r·‖W‖_F).

    For independent, uniformly random U_r and V_r, E‖U_rᵀWV_r‖²_F = r²‖W‖²_F / (dk).
    """
    B, A = truncated_svd(dW, r)
    return ((B @ A).norm() * W.numel() ** 0.5 / (r * W.norm())).item()


def intruders(W0: Tensor, W: Tensor, top: int = 10, threshold: float = 0.5) -> int:
    """How many of W's `top` left singular vectors resemble none of W0's: largest |cosine| below `threshold`.

    Shuttleworth et al. 2024, arXiv 2410.21228. With all d of W0's left singular vectors to choose from (d ≤ k), a
    random direction of R^d has a largest |cosine| near √(2 ln d / d). Errors: unequal shapes, top > min(d, k).
    """
    check_matrix(W0, "W0")
    check_matrix(W)
    if W0.shape != W.shape:
        raise ValueError(f"W0 is {tuple(W0.shape)} and W {tuple(W.shape)}; pass one weight before and after")
    top = check_integer(top, "top", 1, min(W.shape), f"W is {tuple(W.shape)}")
    before = torch.linalg.svd(W0, full_matrices=False).U
    after = torch.linalg.svd(W, full_matrices=False).U[:, :top]
    return int(((before.T @ after).abs().amax(0) < threshold).sum())


def update_of(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names → after − before, for every matrix that both have under one name and shape."""
    shared = [name for name in before if name in after and before[name].ndim == 2]
    return {name: after[name] - before[name] for name in shared if after[name].shape == before[name].shape}
