"""Where A and B start: pure functions of (W, r, s, …) → Init(A, B, W0).

Each takes the pretrained W (d, k) and returns A (r, k), B (d, r) and the matrix W0 to freeze, so that
the layer computes W0 + s·B·A. Most leave W0 = W and B·A = 0, and the adapted layer starts as the
pretrained one. Those that start with B·A ≠ 0 either take it off, W0 = W − s·B·A (PiSSA, LoRA-GA),
or change the layer and say so. W itself is never written to. A and B come in float32 when W has
16 bits, else in W's dtype. INITIALIZERS maps the names of LoRAConfig.init_lora_weights to the functions.

Every function takes a `generator` on W's device (None: the global one) and checks W, r and s:
TypeError or ValueError for a W that is not a finite real matrix, r outside 1 … min(d, k), s ≤ 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_generator, check_matrix, check_positive, check_rank
from .config import INITIALIZERS as NAMES

# One idea: each start is a function of the same arguments, a few lines long; side by side they can be compared.


class Init(NamedTuple):
    """The factors, and the matrix to freeze beside them.

    Attributes:
        A: shape (r, k).
        B: shape (d, r).
        W0: shape (d, k); the layer computes W0 + s·B·A.

    Example:
        >>> A, B, W0 = kaiming(torch.ones(3, 5), r=2)
        >>> A.shape, B.shape, W0.shape
        (torch.Size([2, 5]), torch.Size([3, 2]), torch.Size([3, 5]))
    """

    A: Tensor
    B: Tensor
    W0: Tensor


def kaiming(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """A_ij ~ U(−1/√k, 1/√k), variance 1/(3k); B = 0; W0 = W: loralib's and PEFT's default.

    It is kaiming_uniform_ with a = √5, nn.Linear's own.

    Args:
        W: the pretrained weight, shape (d, k).
        r: the rank, 1 … min(d, k).
        s: the scale, above 0; here it is only checked.
        generator: draws the numbers, on W's device; None takes torch's global generator.

    Returns:
        A (r, k), B (d, r) and W0 = W.

    Raises:
        TypeError: W is not a dense tensor of real floating-point numbers, or an argument is of the wrong kind.
        ValueError: W is not a finite, non-empty matrix, or r or s is out of range.

    Example:
        >>> A, B, W0 = kaiming(torch.ones(3, 100), r=2)
        >>> bool(A.abs().max() <= 0.1), bool(B.any())  # 1/√100
        (True, False)

    Source:
        loralib 0.1.2; PEFT, init_lora_weights=True.
    """
    new = _factors(W, r, s, generator)
    return Init(new(r, W.shape[1]).uniform_(-1, 1, generator=generator) / math.sqrt(W.shape[1]), new(len(W), r), W)


def gaussian(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """A_ij ~ N(0, 1/r²), B = 0, W0 = W: the first paper's "random Gaussian", with PEFT's width.

    Its A is √(3k)/r times as wide as `kaiming`'s.

    Args:
        W, r, s, generator: as in `kaiming`.

    Returns:
        A (r, k), B (d, r) and W0 = W.

    Example:
        >>> A, B, W0 = gaussian(torch.ones(30, 5000), r=20, generator=torch.Generator().manual_seed(0))
        >>> round(A.std().item(), 3), bool(B.any())  # 1/r
        (0.05, False)

    Source:
        Hu et al. 2021 (arXiv 2106.09685), section 4.1; PEFT, init_lora_weights="gaussian".
    """
    new = _factors(W, r, s, generator)
    return Init(new(r, W.shape[1]).normal_(generator=generator) / r, new(len(W), r), W)


def zero_a(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """A = 0, B_ij ~ U(−1/√r, 1/√r), W0 = W: the other one-sided start; not `kaiming` mirrored in its dynamics.

    PEFT and loralib start embeddings from A = 0 (with B ~ N(0, 1)).

    Args:
        W, r, s, generator: as in `kaiming`.

    Returns:
        A (r, k), B (d, r) and W0 = W.

    Example:
        >>> A, B, W0 = zero_a(torch.ones(3, 5), r=2)
        >>> bool(A.any()), bool(B.any())
        (False, True)

    Source:
        Hayou et al. 2024 (arXiv 2406.08447).
    """
    new = _factors(W, r, s, generator)
    return Init(new(r, W.shape[1]), new(len(W), r).uniform_(-1, 1, generator=generator) / math.sqrt(r), W)


def random(
    W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None, std: float | None = None
) -> Init:
    """Both random, W0 = W: the layer no longer starts as W, but as W + s·B·A.

    With `std`, A and B ~ N(0, std²): each entry of s·B·A then has standard deviation s·std²·√r. Without,
    A ~ U(±1/√k) and B ~ U(±1/√r), which is PEFT's init_lora_weights=False.

    Args:
        W, r, s, generator: as in `kaiming`.
        std: the standard deviation of both factors' entries, above 0; None takes PEFT's widths.

    Returns:
        A (r, k), B (d, r) and W0 = W.

    Raises:
        TypeError: as `kaiming`, and std is not a number.
        ValueError: as `kaiming`, and std is not a finite number above 0.

    Example:
        >>> A, B, W0 = random(torch.ones(3, 5), r=2)
        >>> bool((B @ A).any())
        True

    Source:
        PEFT, init_lora_weights=False.
    """
    new = _factors(W, r, s, generator)
    if std is None:
        return Init(kaiming(W, r, s, generator).A, zero_a(W, r, s, generator).B, W)
    check_positive(std, "std", "None gives PEFT's widths")
    A = new(r, W.shape[1]).normal_(generator=generator) * std
    B = new(len(W), r).normal_(generator=generator) * std
    return Init(A, B, W)


def zero(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """A = B = 0, W0 = W: a saddle. Both gradients vanish, and no gradient method ever leaves it (lesson 04).

    Args:
        W, r, s, generator: as in `kaiming`.

    Returns:
        A (r, k), B (d, r) and W0 = W.

    Example:
        >>> A, B, W0 = zero(torch.ones(3, 5), r=2)
        >>> bool(A.any() or B.any())
        False
    """
    new = _factors(W, r, s, generator)
    return Init(new(r, W.shape[1]), new(len(W), r), W)


def orthogonal(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """B·A = 0 with neither factor 0, W0 = W; both factors move at the first step.

    The rows of A lie in one half of an orthonormal basis Q (r×r) of R^r, those of B in the other:

        A = Q₁ᵀ·N_A/10,   B = N_B·Q₂/10,   Q₁ = even, Q₂ = odd rows of Q,   N ~ N(0, 1)

    Args:
        W, r, s, generator: as in `kaiming`; r must be even.

    Returns:
        A (r, k), B (d, r) and W0 = W.

    Raises:
        TypeError: as `kaiming`.
        ValueError: as `kaiming`, and r is odd.

    Example:
        >>> A, B, W0 = orthogonal(torch.ones(4, 7), r=2)
        >>> bool(A.any() and B.any()), torch.allclose(B @ A, torch.zeros(4, 7), atol=1e-6)
        (True, True)

    Source:
        PEFT, init_lora_weights="orthogonal".
    """
    new = _factors(W, r, s, generator)
    if r % 2:
        raise ValueError(f"r = {r} is odd, and the orthogonal start halves it; choose an even rank")
    Q = torch.linalg.qr(new(r, r).normal_(generator=generator)).Q
    A = Q[0::2].mT @ new(r // 2, W.shape[1]).normal_(generator=generator) / 10
    return Init(A, new(len(W), r // 2).normal_(generator=generator) @ Q[1::2] / 10, W)


def pissa(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """s·B·A = the best rank-r approximation of W, W0 = the rest: the principal part is trained.

        W = U·diag(σ)·Vᵀ:   B = U_r·diag(√(σ/s)),   A = diag(√(σ/s))·V_rᵀ,   W0 = W − s·B·A

    The layer starts as W to within rounding; W0 is a new tensor, so other modules that share W are not changed.
    No random numbers.

    Args:
        W, r, s, generator: as in `kaiming`; s divides the factors, and the generator is not used.

    Returns:
        A (r, k), B (d, r) and W0 = W − s·B·A.

    Example:
        >>> W = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]])
        >>> A, B, W0 = pissa(W, r=1, s=0.5)
        >>> torch.allclose(W0 + 0.5 * B @ A, W), round(torch.linalg.norm(W0).item(), 4)
        (True, 3.0)

    Source:
        Meng et al. 2024 (arXiv 2404.02948).
    """
    new = _factors(W, r, s, generator)
    U, S, Vh = torch.linalg.svd(W.detach().to(new(0).dtype), full_matrices=False)
    root = (S[:r] / s).sqrt()
    return _residual(W, root[:, None] * Vh[:r], U[:, :r] * root, s)


def lora_ga(
    W: Tensor,
    r: int,
    s: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    gradient: Tensor,
    gamma: float = 16.0,
) -> Init:
    """A and B span the first gradient's top singular directions, W0 = W − s·B·A.

        ∂L/∂W = G = U·diag(σ)·Vᵀ:   A = c·V_{1…r}ᵀ,   B = c·U_{r+1…2r},   c = d^¼/√(γ·s)

    so that SGD's first step, −η·s²·(G·AᵀA + B·BᵀG), is −η·s²·c² times the best rank-2r approximation of G.
    The layer starts as W. No random numbers.

    Args:
        W, r, s, generator: as in `kaiming`; 2r ≤ min(d, k), and the generator is not used.
        gradient: G on one batch or more, shape (d, k).
        gamma: γ, above 0; the larger, the smaller the factors.

    Returns:
        A (r, k), B (d, r) and W0 = W − s·B·A.

    Raises:
        TypeError: as `kaiming`, and the gradient is not such a tensor, or gamma not a number.
        ValueError: as `kaiming`, and the gradient has another shape, 2r > min(d, k), or gamma ≤ 0.

    Example:
        >>> W, G = torch.ones(4, 6), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        >>> A, B, W0 = lora_ga(W, r=2, s=0.5, gradient=G)
        >>> torch.allclose(W0 + 0.5 * B @ A, W, atol=1e-5)
        True

    Source:
        After Wang et al. 2024 (arXiv 2407.05000); the s in c, which makes s·B·A the same for every s, is ours.
    """
    new = _factors(W, r, s, generator)
    check_positive(gamma, "gamma", "the paper's is 16")
    if check_matrix(gradient, "gradient") != tuple(W.shape):
        raise ValueError(f"gradient has shape {tuple(gradient.shape)}, W {tuple(W.shape)}; pass ∂L/∂W of this layer")
    if 2 * r > min(W.shape):
        raise ValueError(
            f"r = {r}: the start takes 2r directions of a {len(W)}×{W.shape[1]} gradient; "
            f"choose r <= {min(W.shape) // 2}"
        )
    U, _, Vh = torch.linalg.svd(gradient.detach().to(new(0).dtype), full_matrices=False)
    c = len(W) ** 0.25 / math.sqrt(gamma * s)
    return _residual(W, c * Vh[:r], c * U[:, r : 2 * r], s)


INITIALIZERS: dict[str, Callable[..., Init]] = dict(
    zip(NAMES, (kaiming, gaussian, zero_a, random, zero, orthogonal, pissa, lora_ga), strict=True)
)


def _factors(W: Tensor, r: int, s: float, generator: torch.Generator | None) -> Callable[..., Tensor]:
    """Check the arguments; return a function that makes zero tensors of the factors' dtype on W's device."""
    check_rank(r, *check_matrix(W))
    check_generator(generator, W.device)
    check_positive(s, "s", "take it from LoRAConfig(r=…, lora_alpha=…).scale")
    dtype = torch.promote_types(W.dtype, torch.float32)
    return lambda *shape: torch.zeros(*shape, dtype=dtype, device=W.device)


def _residual(W: Tensor, A: Tensor, B: Tensor, s: float) -> Init:
    """The factors as they are, and W0 = W − s·B·A in W's dtype."""
    return Init(A.contiguous(), B.contiguous(), (W.detach().to(A.dtype) - s * (B @ A)).to(W.dtype))
