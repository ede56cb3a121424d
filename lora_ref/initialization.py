"""Where A and B begin: pure functions of (W, r, s, …) → Init(A, B, W0).

Each takes the pretrained W (d, k) and returns A (r, k), B (d, r) and the matrix W0 to freeze, so that
the layer computes W0 + s·B·A. Most leave W0 = W and B·A = 0, and the adapted layer begins as the
pretrained one. Those that begin with B·A ≠ 0 either take it off, W0 = W − s·B·A (PiSSA, LoRA-GA),
or change the layer and say so. W itself is never written to. A and B come in float32 when W has
16 bits, else in W's dtype. INITIALIZERS maps the names of LoRAConfig.init_lora_weights to the functions.

Every function takes a `generator` on W's device (None: the global one) and checks W, r and s:
TypeError or ValueError for a W that is not a finite real matrix, r outside 1 … min(d, k), s ≤ 0.
"""

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_generator, check_matrix, check_rank
from .config import INITIALIZERS as NAMES


class Init(NamedTuple):
    """A (r, k), B (d, r), and the W0 (d, k) to freeze beside them."""

    A: Tensor
    B: Tensor
    W0: Tensor


def kaiming(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """A_ij ~ U(−1/√k, 1/√k), variance 1/(3k); B = 0; W0 = W: loralib's and PEFT's default.

    It is kaiming_uniform_ with a = √5, nn.Linear's own. Source: loralib 0.1.2; PEFT init_lora_weights=True.
    """
    new = _factors(W, r, s, generator)
    return Init(new(r, W.shape[1]).uniform_(-1, 1, generator=generator) / math.sqrt(W.shape[1]), new(len(W), r), W)


def gaussian(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """A_ij ~ N(0, 1/r²), B = 0, W0 = W: Hu et al.'s "random Gaussian", with PEFT's width.

    Its A is √(3k)/r times as wide as `kaiming`'s. Source: Hu et al. 2021, §4.1; PEFT "gaussian".
    """
    new = _factors(W, r, s, generator)
    return Init(new(r, W.shape[1]).normal_(generator=generator) / r, new(len(W), r), W)


def zero_a(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """A = 0, B_ij ~ U(−1/√r, 1/√r), W0 = W: the other one-sided start; not `kaiming` mirrored in its dynamics.

    PEFT and loralib start embeddings from A = 0 (with B ~ N(0, 1)). Source: Hayou et al. 2024 (arXiv 2406.08447).
    """
    new = _factors(W, r, s, generator)
    return Init(new(r, W.shape[1]), new(len(W), r).uniform_(-1, 1, generator=generator) / math.sqrt(r), W)


def random(
    W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None, std: float | None = None
) -> Init:
    """Both random, W0 = W: the layer no longer begins as W, but as W + s·B·A.

    With `std`, A and B ~ N(0, std²): each entry of s·B·A then has standard deviation s·std²·√r. Without,
    A ~ U(±1/√k) and B ~ U(±1/√r), which is PEFT's init_lora_weights=False.
    """
    new = _factors(W, r, s, generator)
    A, B = new(r, W.shape[1]), new(len(W), r)
    if std is not None:
        _check_positive(std, "std", "None gives PEFT's widths")
    if std is None:
        A, B = kaiming(W, r, s, generator).A, zero_a(W, r, s, generator).B
    else:
        A, B = A.normal_(generator=generator) * std, B.normal_(generator=generator) * std
    return Init(A, B, W)


def zero(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """A = B = 0, W0 = W: a saddle. Both gradients vanish, and no gradient method ever leaves it (lesson 04)."""
    new = _factors(W, r, s, generator)
    return Init(new(r, W.shape[1]), new(len(W), r), W)


def orthogonal(W: Tensor, r: int, s: float = 1.0, generator: torch.Generator | None = None) -> Init:
    """B·A = 0 with neither factor 0, W0 = W: the rows of A live in one half of an orthonormal basis Q of R^r
    (r×r), those of B in the other.

        A = Q₁ᵀ·N_A/10,   B = N_B·Q₂/10,   Q₁ = even, Q₂ = odd rows of Q,   N ~ N(0, 1)

    Needs an even r. Both factors move at the first step. Source: PEFT "orthogonal".
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

    The layer begins as W to within rounding; W0 is new, so whoever shares W keeps it. No random numbers.
    Source: Meng et al. 2024 (arXiv 2404.02948).
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
    `gradient` (d, k) is G on one batch or more; 2r ≤ min(d, k). The layer begins as W. No random numbers.
    Source: after Wang et al. 2024 (arXiv 2407.05000); the s in c, which keeps s·B·A the same for every s,
    is ours.
    """
    new = _factors(W, r, s, generator)
    _check_positive(gamma, "gamma", "the paper's is 16")
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


INITIALIZERS = dict(zip(NAMES, (kaiming, gaussian, zero_a, random, zero, orthogonal, pissa, lora_ga), strict=True))


def _factors(W: Tensor, r: int, s: float, generator: torch.Generator | None):
    """Check, and return a maker of zero tensors of the factors' dtype on W's device."""
    check_rank(r, *check_matrix(W))
    check_generator(generator, W.device)
    _check_positive(s, "s", "take it from LoRAConfig(r=…, lora_alpha=…).scale")
    dtype = torch.promote_types(W.dtype, torch.float32)
    return lambda *shape: torch.zeros(*shape, dtype=dtype, device=W.device)


def _check_positive(value: float, name: str, mend: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}; {mend}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} = {value!r} is out of range; {mend}")


def _residual(W: Tensor, A: Tensor, B: Tensor, s: float) -> Init:
    return Init(A.contiguous(), B.contiguous(), (W.detach().to(A.dtype) - s * (B @ A)).to(W.dtype))
