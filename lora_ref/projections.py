"""Random linear maps P from R^d into R^D, the parameters' space: what `intrinsic_dimension` trains through.

Three choices of P, each scaled so that E‖P·z‖² = ‖z‖²:

    projection   columns               memory      one product P·z
    dense        unit length           D·d         O(D·d)
    orthonormal  orthonormal           D·d         O(D·d), after an O(D·d²) start
    fastfood     unit length (nearly)  O(D)        O(D·log d)
"""

import math
from functools import cache

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_generator, check_integer


def hadamard_transform(x: Tensor) -> Tensor:
    """H·x along the last axis, with H_1 = [1] and H_2n = [[H_n, H_n], [H_n, −H_n]].

    H·H = n·I, so ‖H·x‖² = n·‖x‖². Cost O(n·log n): H_n = H_m ⊗ … ⊗ H_m, so with x laid out as an (n/m)×m table one
    small product transforms the last factor, and the transpose brings the next one to the end. Differentiable.

    Args:
        x: a tensor of numbers, shape (…, n), n a power of two.

    Returns:
        A new tensor of x's shape and dtype.

    Raises:
        TypeError: x is not a tensor of numbers.
        ValueError: n is not a power of two.

    Example:
        >>> hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([10., -2., -4.,  0.])

    Source:
        Fino & Algazi 1976.
    """
    if not isinstance(x, Tensor) or x.dtype == torch.bool:
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else repr(x)
        raise TypeError(f"x must be a torch.Tensor of numbers, got {got}; use torch.as_tensor(x).double()")
    n = x.shape[-1] if x.ndim else 0
    if n < 1 or n & (n - 1):
        raise ValueError(f"the last axis has length {n}; pad it to {1 << n.bit_length()}, a power of two")
    shape, left = x.shape, n
    while left > 1:
        m = min(left, 32)
        x = (x.reshape(*shape[:-1], n // m, m) @ _hadamard(m).to(x)).mT.reshape(shape)
        left //= m
    return x


@cache
def _hadamard(m: int) -> Tensor:
    """The m×m matrix itself, in float32, for a power of two m."""
    H = torch.ones(1, 1)
    while len(H) < m:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    return H


class Projection(nn.Module):
    """A fixed random linear map P: R^d → R^D, applied to the last axis: (…, d) → (…, D).

    Holds only buffers, nothing trainable. This is what all three have in common; it has no map of its own.

    Args:
        D: dimension of the space, at least 1.
        d: dimension of the subspace, 1 … D.
        generator: a CPU generator, which makes P reproducible; None takes torch's global generator.
        dtype: of P and of the z that it expects, torch.float32 or torch.float64.

    Raises:
        TypeError: D or d is not an integer, the generator not a torch.Generator, or a z not a tensor.
        ValueError: D, d or the dtype is out of range, or a z does not have d numbers along its last axis.

    Example:
        >>> P = DenseProjection(D=1000, d=10)
        >>> P(torch.zeros(10)).shape, P.nbytes(), len(list(P.parameters()))
        (torch.Size([1000]), 40000, 0)

    Source:
        Li et al. 2018 (arXiv 1804.08838), section 2.
    """

    def __init__(self, D: int, d: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.D = check_integer(D, "D", 1)
        self.d = check_integer(d, "d", 1, self.D, f"a subspace of {self.D} parameters has at most {self.D} dimensions")
        check_generator(generator, torch.device("cpu"))
        check_choice(dtype, "dtype", (torch.float32, torch.float64), "P.to converts")

    def check(self, z: Tensor) -> None:
        """Refuse a z that is not d numbers along its last axis; Fastfood would stretch a single one."""
        if not isinstance(z, Tensor):
            raise TypeError(f"z must be a torch.Tensor, got {type(z).__name__}; convert it with torch.as_tensor(z)")
        if z.ndim == 0 or z.shape[-1] != self.d:
            raise ValueError(f"z has shape {tuple(z.shape)}; its last axis must hold the d = {self.d} numbers")

    def nbytes(self) -> int:
        """Memory that P takes, in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"D={self.D}, d={self.d}"


class DenseProjection(Projection):
    """P_ij ~ N(0, 1), then each column divided by its length.

    Memory D·d numbers; product O(D·d).

    Args:
        D, d, generator, dtype: as in `Projection`.

    Example:
        >>> P = DenseProjection(D=5, d=2, dtype=torch.float64)
        >>> P.P.shape, torch.allclose(P.P.norm(dim=0), torch.ones(2).double())
        (torch.Size([5, 2]), True)

    Source:
        Li et al. 2018 (arXiv 1804.08838), section 2.
    """

    def __init__(self, D: int, d: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(D, d, generator, dtype)
        P = torch.randn(self.d, self.D, generator=generator, dtype=dtype).mT
        self.register_buffer("rows", self.normalize(P).mT.contiguous())  # Pᵀ, so that a product reads it in order

    @property
    def P(self) -> Tensor:
        """The matrix itself, (D, d)."""
        return self.rows.mT

    def normalize(self, P: Tensor) -> Tensor:
        """P with columns of length 1."""
        return P / P.norm(dim=0)

    def forward(self, z: Tensor) -> Tensor:
        self.check(z)
        return z @ self.rows


class OrthonormalProjection(DenseProjection):
    """PᵀP = I: the orthonormal basis of a uniformly random d-dimensional subspace, so ‖P·z‖ = ‖z‖.

    Memory D·d numbers; product O(D·d), after a QR decomposition of O(D·d²).

    Args:
        D, d, generator, dtype: as in `Projection`.

    Example:
        >>> P = OrthonormalProjection(D=5, d=2, dtype=torch.float64).P
        >>> torch.allclose(P.T @ P, torch.eye(2).double())
        True

    Source:
        Li et al. 2018 (arXiv 1804.08838), section 2; uniformity by the rotation invariance of the Gaussian.
    """

    def normalize(self, P: Tensor) -> Tensor:
        """An orthonormal basis of P's columns."""
        Q, R = torch.linalg.qr(P)
        return Q * R.diagonal().sign()  # QR's own signs are a convention; without this Q is not uniform


class FastfoodProjection(Projection):
    """P = (nD)^(−½)·[H·G_j·Π_j·H·S_j], j = 1 … ⌈D/n⌉, its first D rows and d columns; nothing dense.

    H is the n×n Hadamard matrix with n = 2^⌈log₂ d⌉, S_j random signs, Π_j a random permutation,
    G_j a Gaussian diagonal scaled to ‖g_j‖² = n. Columns have length 1 when n divides D, nearly
    so otherwise. Memory 16 bytes per row in float32; product O(D·log d).

    Args:
        D, d, generator, dtype: as in `Projection`.

    Example:
        >>> P = FastfoodProjection(D=1_000_000, d=500)
        >>> P(torch.zeros(500)).shape, P.nbytes() / P.D < 17
        (torch.Size([1000000]), True)

    Source:
        Le, Sarlós & Smola 2013 (arXiv 1408.3060); for this use Li et al. 2018 (arXiv 1804.08838), section S7.
    """

    def __init__(self, D: int, d: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(D, d, generator, dtype)
        n = 1 << (self.d - 1).bit_length()
        blocks = math.ceil(self.D / n)
        signs = torch.randint(0, 2, (blocks, n), generator=generator, dtype=dtype) * 2 - 1
        order = torch.rand(blocks, n, generator=generator, dtype=torch.float64).argsort(dim=-1)
        gauss = torch.randn(blocks, n, generator=generator, dtype=dtype)
        self.register_buffer("signs", signs)
        self.register_buffer("order", order)
        length = gauss.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)  # randn can be 0: no 0/0 at n = 1
        self.register_buffer("gauss", gauss * math.sqrt(n) / length)

    def forward(self, z: Tensor) -> Tensor:
        self.check(z)
        n = self.signs.shape[-1]
        x = nn.functional.pad(z, (0, n - self.d))[..., None, :]  # (…, 1, n): one copy per block
        x = hadamard_transform(x * self.signs)
        x = x.gather(-1, self.order.expand(x.shape))
        x = hadamard_transform(x * self.gauss)
        return x.flatten(-2)[..., : self.D] / math.sqrt(n * self.D)


PROJECTIONS = {"dense": DenseProjection, "orthonormal": OrthonormalProjection, "fastfood": FastfoodProjection}
