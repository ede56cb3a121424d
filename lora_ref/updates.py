"""What an update ΔW = W − W0 looks like: its directions, and how they lie to W0's (its singular values: `spectrum`).

Each measure has a *null*: what a matrix or a subspace of the same size, drawn at random, would give. A number
without its null says nothing: two random 8-dimensional subspaces of a 12-dimensional space overlap by two thirds.

Matrices may have any floating-point dtype; 16-bit matrices are computed with in float32. All functions refuse, with
TypeError or ValueError, anything but finite, non-empty, real matrices, and singular vectors beyond a matrix's rank:
those consist of rounding errors.
"""

import torch
from torch import Tensor

from ._checks import check_fraction, check_integer, check_matrix
from ._dtypes import at_least_float32


def _directions(M: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, m), S (m,), Vh (m, k) of M, m its numerical rank (σ above max(d, k)·ε·σ₁); refuses the zero matrix."""
    U, S, Vh = torch.linalg.svd(at_least_float32(M), full_matrices=False)
    m = int((S > max(M.shape) * torch.finfo(S.dtype).eps * S[0]).sum())
    if m == 0:
        raise ValueError(f"{name} is the zero matrix and has no directions; pass a matrix with a non-zero entry")
    return U[:, :m], S[:m], Vh[:m]


def _check_pair(W: Tensor, dW: Tensor, names: tuple[str, str], fix: str) -> None:
    """Refuse anything but two finite matrices of one shape."""
    check_matrix(W, names[0])
    check_matrix(dW, names[1])
    if W.shape != dW.shape:
        raise ValueError(f"{names[0]} is {tuple(W.shape)} and {names[1]} {tuple(dW.shape)}; {fix}")


def subspace_similarity(U: Tensor, V: Tensor, i: int, j: int) -> float:
    """Overlap of two subspaces: φ(U, V, i, j) = ‖U_iᵀV_j‖²_F / min(i, j) ∈ [0, 1], U_i the first i columns of U.

    1: one of the two subspaces contains the other; 0: they are orthogonal. Null: `similarity_null`.

    Args:
        U: orthonormal columns, such as singular vectors, shape (n, p).
        V: orthonormal columns, shape (n, q).
        i: how many columns of U, 1 … p.
        j: how many columns of V, 1 … q.

    Returns:
        The similarity, without unit.

    Raises:
        TypeError: U or V is not a dense tensor of real floating-point numbers, or i or j not an integer.
        ValueError: the columns have unequal length or are not orthonormal (to 0.01), or i or j exceeds their number.

    Example:
        >>> Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
        >>> round(subspace_similarity(Q[:, :2], Q[:, 1:4], i=2, j=3), 4)  # one direction of two is shared
        0.5

    Source:
        Hu et al. 2021 (arXiv 2106.09685), section 7.2.
    """
    check_matrix(U, "U")
    check_matrix(V, "V")
    if len(U) != len(V):
        raise ValueError(f"U has {len(U)} rows and V {len(V)}; compare directions of one space")
    i = check_integer(i, "i", 1, U.shape[1], f"U has {U.shape[1]} columns")
    j = check_integer(j, "j", 1, V.shape[1], f"V has {V.shape[1]} columns")
    U, V = at_least_float32(U[:, :i]), at_least_float32(V[:, :j])
    for name, M in (("U", U), ("V", V)):
        gap = (M.T @ M - torch.eye(M.shape[1]).to(M)).abs().max().item()
        if gap > 0.01:
            raise ValueError(
                f"{name}'s columns are not orthonormal, {name}ᵀ{name} is {gap:.2g} from the identity; "
                f"pass singular vectors as columns, or torch.linalg.qr({name}).Q"
            )
    return ((U.T @ V.to(U.dtype)).square().sum() / min(i, j)).item()


def similarity_null(n: int, i: int, j: int) -> float:
    """The mean of φ for two independent, uniformly random subspaces of R^n: E‖U_iᵀV_j‖²_F = ij/n, hence max(i, j)/n.

    It holds, too, when only one of them is random.

    Args:
        n: dimension of the space, at least 1.
        i: dimension of the one subspace, 1 … n.
        j: dimension of the other, 1 … n.

    Returns:
        The mean similarity, without unit.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> round(similarity_null(12, 8, 8), 4)
        0.6667

    Source:
        The linearity of the mean: each of the i·j squared cosines is 1/n on average.
    """
    n = check_integer(n, "n", 1)
    i = check_integer(i, "i", 1, n, f"n = {n}")
    j = check_integer(j, "j", 1, n, f"n = {n}")
    return max(i, j) / n


def _leading(W: Tensor, dW: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_r, the first r singular values, V_rᵀ of ΔW, after the checks on all three."""
    _check_pair(W, dW, ("W", "dW"), "pass a weight and its own update")
    if not W.any():
        raise ValueError("W is the zero matrix, and any update is infinitely stronger; pass the weight before training")
    U, S, Vh = _directions(dW, "dW")
    r = check_integer(r, "r", 1, len(S), f"dW is {dW.shape[0]}×{dW.shape[1]} and has rank {len(S)}")
    return U[:, :r], S[:r], Vh[:r]


def amplification(W: Tensor, dW: Tensor, r: int) -> float:
    """‖ΔW_r‖_F / ‖U_rᵀ W V_r‖_F: how much stronger the update is than W in the update's own directions.

    U_r, V_r are the first r singular vectors of ΔW, ΔW_r its truncation. A large factor may mean that ΔW is large,
    or that W is weak there: compare with `amplification_null`.

    Args:
        W: the weight before training, shape (d, k), not all zero.
        dW: the update ΔW, shape (d, k), not all zero.
        r: how many directions, 1 … rank(ΔW).

    Returns:
        The factor, without unit; inf where W has nothing in these directions.

    Raises:
        TypeError: W or dW is not a dense tensor of real floating-point numbers, or r not an integer.
        ValueError: unequal shapes, a zero matrix, or r outside 1 … rank(ΔW).

    Example:
        >>> W = torch.tensor([[2.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
        >>> dW = torch.tensor([[6.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # along W's direction of length 2
        >>> round(amplification(W, dW, r=1), 4)
        3.0

    Source:
        Hu et al. 2021 (arXiv 2106.09685), table 7 (there ΔW has rank r).
    """
    U, S, Vh = _leading(W, dW, r)
    return (S.norm() / (U.T @ W.to(U.dtype) @ Vh.T).norm()).item()


def amplification_null(W: Tensor, dW: Tensor, r: int) -> float:
    """The factor if ΔW's directions had nothing to do with W's: ‖ΔW_r‖_F·√(dk) / (r·‖W‖_F).

    For independent, uniformly random U_r and V_r, E‖U_rᵀWV_r‖²_F = r²‖W‖²_F / (dk); its root stands in the
    denominator.

    Args:
        W: the weight before training, shape (d, k), not all zero.
        dW: the update ΔW, shape (d, k), not all zero.
        r: how many directions, 1 … rank(ΔW).

    Returns:
        The factor, without unit.

    Raises:
        TypeError: W or dW is not a dense tensor of real floating-point numbers, or r not an integer.
        ValueError: unequal shapes, a zero matrix, or r outside 1 … rank(ΔW).

    Example:
        >>> W, dW = torch.ones(2, 3), torch.tensor([[6.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> round(amplification_null(W, dW, r=1), 4)  # 6·√6 / √6
        6.0

    Source:
        Rotation invariance: E of a squared entry of UᵀWV is ‖W‖²_F / (dk) for uniformly random U and V.
    """
    _, S, _ = _leading(W, dW, r)
    return (S.norm() * W.numel() ** 0.5 / (r * W.to(S.dtype).norm())).item()


def intruders(W0: Tensor, W: Tensor, top: int = 10, threshold: float = 0.5) -> int:
    """How many of W's `top` left singular vectors resemble none of W0's: largest |cosine| below `threshold`.

    With all m = min(d, k) left singular vectors of W0 to choose from, a random direction of R^d has a largest
    |cosine| of about √(2 ln m / d): 0.234 for d = m = 192, where 0.216 is the mean. A spike θ·u·vᵀ on a W0 of entries
    N(0, 1/max(d, k)) is no intruder below θ = (m/max(d, k))^¼, and comes out as one above.

    Args:
        W0: the weight before training, shape (d, k), not all zero.
        W: the weight after training, shape (d, k), not all zero.
        top: how many leading singular vectors of W are examined, 1 … rank(W).
        threshold: the cosine below which a vector counts, in (0, 1].

    Returns:
        The count, 0 … top.

    Raises:
        TypeError: W0 or W is not a dense tensor of real floating-point numbers, top not an integer, or threshold not
            a number.
        ValueError: unequal shapes, a zero matrix, top outside 1 … rank(W), or threshold outside (0, 1].

    Example:
        >>> W0 = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> W = W0 + torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 0.0]])  # a new direction, the strongest
        >>> intruders(W0, W, top=1), intruders(W0, W0, top=2)
        (1, 0)

    Source:
        Shuttleworth et al. 2024 (arXiv 2410.21228); the spike: Benaych-Georges & Nadakuditi 2012 (arXiv 1103.2221).
    """
    _check_pair(W0, W, ("W0", "W"), "pass one weight before and after")
    threshold = check_fraction(threshold, "threshold")
    before, after = _directions(W0, "W0")[0], _directions(W, "W")[0]
    top = check_integer(top, "top", 1, after.shape[1], f"W is {W.shape[0]}×{W.shape[1]} and has rank {after.shape[1]}")
    cosines = (before.T @ after[:, :top].to(before.dtype)).abs()
    return int((cosines.amax(0) < threshold).sum())


def update_of(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """The update ΔW = after − before of every floating-point matrix that both have under one name and shape.

    Args:
        before: a state_dict, copied before the training.
        after: a state_dict of the same model with its adapter merged; unmerged, its layers show no change.

    Returns:
        Names → updates, each of its matrix's shape.

    Raises:
        ValueError: there is no such matrix.

    Example:
        >>> before = {"proj.weight": torch.zeros(2, 3), "proj.bias": torch.zeros(2)}
        >>> after = {"proj.weight": torch.ones(2, 3), "proj.bias": torch.ones(2)}
        >>> {name: dW.sum().item() for name, dW in update_of(before, after).items()}  # the bias is not a matrix
        {'proj.weight': 6.0}
    """
    found = {
        name: after[name] - W0
        for name, W0 in before.items()
        if W0.ndim == 2 and W0.is_floating_point() and name in after and after[name].shape == W0.shape
    }
    if not found:
        names = ", ".join([*before][:3]) or "nothing", ", ".join([*after][:3]) or "nothing"
        raise ValueError(
            f"before ({names[0]} …) and after ({names[1]} …) share no matrix; pass two state_dicts of one model"
        )
    return found
