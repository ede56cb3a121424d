"""Intrinsic dimension: train a network inside a random d-dimensional slice of its parameters.

    θ = θ₀ + P·z,    θ₀, θ ∈ R^D,   P ∈ R^{D×d} random and fixed,   z ∈ R^d trained from 0

The intrinsic dimension d_int90 of an objective is the least d at which this reaches 90 % of the
score of training all D parameters (Li et al. 2018, arXiv 1804.08838). It counts the dimensions
of a flat slice of parameter space. It is no matrix rank: lesson 02 shows both.

Three choices of P, each scaled so that E‖P·z‖² = ‖z‖²:

    projection   columns               memory      one product P·z
    dense        unit length           D·d         O(D·d)
    orthonormal  orthonormal           D·d         O(D·d), after an O(D·d²) start
    fastfood     unit length (nearly)  O(D)        O(D·log d)
"""

import math
from functools import cache
from numbers import Real

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ._checks import check_fraction, check_generator, check_integer, check_tensor


def hadamard_transform(x: Tensor) -> Tensor:
    """H·x along the last axis, with H_1 = [1] and H_2p = [[H_p, H_p], [H_p, −H_p]].

    Shape (…, p) → (…, p), p a power of two. H·H = p·I, so ‖H·x‖² = p·‖x‖².
    Cost O(p·log p): H_p = H_r ⊗ … ⊗ H_r, so with x laid out as a (p/r)×r table one small product
    transforms the last factor, and the transpose brings the next one to the end. Differentiable.
    Errors: ValueError unless p is a power of two; TypeError for anything but a tensor of numbers.
    Source: Fino & Algazi 1976.
    """
    if not isinstance(x, Tensor) or x.dtype == torch.bool:
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else repr(x)
        raise TypeError(f"x must be a torch.Tensor of numbers, got {got}; use torch.as_tensor(x).double()")
    p = x.shape[-1] if x.ndim else 0
    if p < 1 or p & (p - 1):
        raise ValueError(f"the last axis has length {p}; pad it to {1 << p.bit_length()}, a power of two")
    shape, left = x.shape, p
    while left > 1:
        r = min(left, 32)
        x = (x.reshape(*shape[:-1], p // r, r) @ _hadamard(r).to(x)).mT.reshape(shape)
        left //= r
    return x


@cache
def _hadamard(r: int) -> Tensor:
    H = torch.ones(1, 1)
    while len(H) < r:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    return H


class Projection(nn.Module):
    """A fixed random linear map P: R^d → R^D, applied to the last axis: (…, d) → (…, D).

    Holds only buffers, nothing trainable. `generator` (a CPU generator) makes P reproducible;
    `dtype` is that of P and of the z it expects.
    Errors: ValueError or TypeError unless 1 ≤ d ≤ D, both integers, the dtype is float32 or float64,
    the generator is one, and the z given has d numbers along its last axis.
    Source: Li et al. 2018 (arXiv 1804.08838), §2.
    """

    def __init__(self, D: int, d: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.D = check_integer(D, "D", 1)
        self.d = check_integer(d, "d", 1, self.D, f"a subspace of {self.D} parameters has at most {self.D} dimensions")
        check_generator(generator, torch.device("cpu"))
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype = {dtype!r} is unknown; choose torch.float32 or torch.float64; P.to converts")

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

    Memory D·d numbers; product O(D·d). Source: Li et al. 2018 (arXiv 1804.08838), §2.
    """

    def __init__(self, D: int, d: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(D, d, generator, dtype)
        P = torch.randn(self.d, self.D, generator=generator, dtype=dtype).mT
        self.register_buffer("rows", self.normalise(P).mT.contiguous())  # Pᵀ, so that a product reads it in order

    @property
    def P(self) -> Tensor:
        """The matrix itself, (D, d)."""
        return self.rows.mT

    def normalise(self, P: Tensor) -> Tensor:
        return P / P.norm(dim=0)

    def forward(self, z: Tensor) -> Tensor:
        self.check(z)
        return z @ self.rows


class OrthonormalProjection(DenseProjection):
    """PᵀP = I: the orthonormal basis of a uniformly random d-dimensional subspace, so ‖P·z‖ = ‖z‖.

    Memory D·d numbers; product O(D·d), after a QR decomposition of O(D·d²).
    Source: Li et al. 2018, §2; uniformity by the rotation invariance of the Gaussian.
    """

    def normalise(self, P: Tensor) -> Tensor:
        Q, R = torch.linalg.qr(P)
        return Q * R.diagonal().sign()  # QR's own signs are a convention; without this Q is not uniform


class FastfoodProjection(Projection):
    """P = (pD)^(−½)·[H·G_j·Π_j·H·S_j], j = 1 … ⌈D/p⌉, its first D rows and d columns; nothing dense.

    H is the p×p Hadamard matrix with p = 2^⌈log₂ d⌉, S_j random signs, Π_j a random permutation,
    G_j a Gaussian diagonal scaled to ‖g_j‖² = p. Columns have length 1 when p divides D, nearly
    so otherwise. Memory 16 bytes per row in float32; product O(D·log d).
    Source: Le, Sarlós & Smola 2013 (arXiv 1408.3060); for this use Li et al. 2018, §S7.
    """

    def __init__(self, D: int, d: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(D, d, generator, dtype)
        p = 1 << (self.d - 1).bit_length()
        blocks = math.ceil(self.D / p)
        signs = torch.randint(0, 2, (blocks, p), generator=generator, dtype=dtype) * 2 - 1
        order = torch.rand(blocks, p, generator=generator, dtype=torch.float64).argsort(dim=-1)
        gauss = torch.randn(blocks, p, generator=generator, dtype=dtype)
        self.register_buffer("signs", signs)
        self.register_buffer("order", order)
        length = gauss.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)  # randn can be 0: no 0/0 at p = 1
        self.register_buffer("gauss", gauss * math.sqrt(p) / length)

    def forward(self, z: Tensor) -> Tensor:
        self.check(z)
        p = self.signs.shape[-1]
        x = nn.functional.pad(z, (0, p - self.d))[..., None, :]  # (…, 1, p): one copy per block
        x = hadamard_transform(x * self.signs)
        x = x.gather(-1, self.order.expand(x.shape))
        x = hadamard_transform(x * self.gauss)
        return x.flatten(-2)[..., : self.D] / math.sqrt(p * self.D)


PROJECTIONS = {"dense": DenseProjection, "orthonormal": OrthonormalProjection, "fastfood": FastfoodProjection}


class RandomSubspace(nn.Module):
    """Any module, trained in a random d-dimensional subspace: f(x; θ₀ + P·z), z ∈ R^d from 0.

        subspace = RandomSubspace(model, d=100)
        optimizer = torch.optim.Adam([subspace.z], lr=0.1)

    θ₀ is the module's own parameters that required a gradient, taken as they are; the wrapper
    freezes all of the module's parameters and trains z alone. Each forward forms θ once, of D numbers. Tied
    parameters count once; buffers (batch-norm statistics) work as ever. `projection` is
    "dense", "orthonormal" or "fastfood"; `generator`, on the CPU, makes it reproducible.

    Errors, the module unchanged: TypeError for anything but a module; ValueError when nothing in
    it is trainable, a parameter is not finite, d < 1, d > D or the projection is unknown.
    Source: Li et al. 2018 (arXiv 1804.08838), equation 2.
    """

    def __init__(
        self, model: nn.Module, d: int, projection: str = "fastfood", generator: torch.Generator | None = None
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {model!r} of type {type(model).__name__}; "
                "wrap functions and lists of layers in one"
            )
        if not isinstance(projection, str) or projection not in PROJECTIONS:
            raise ValueError(f"projection = {projection!r} is unknown; choose one of {', '.join(PROJECTIONS)}")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameters to span a subspace of; "
                "pass a module with parameters, or set requires_grad_(True) on those to train"
            )
        for name, parameter in trained.items():
            check_tensor(parameter, f"parameter {name!r}")
        first = next(iter(trained.values()))
        dtype = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
        P = PROJECTIONS[projection](sum(p.numel() for p in trained.values()), d, generator, dtype)
        self.projection = P.to(first.device)
        self.z = nn.Parameter(torch.zeros(P.d, dtype=dtype, device=first.device))
        self.model = model.requires_grad_(False)
        self.names = tuple(trained)

    def theta(self) -> dict[str, Tensor]:
        """θ₀ + P·z, cut into the module's own names, shapes and dtypes."""
        start = dict(self.model.named_parameters())
        step, theta, at = self.projection(self.z), {}, 0
        for name in self.names:
            theta0 = start[name]
            delta = step[at : at + theta0.numel()].view_as(theta0)
            theta[name] = theta0 + delta.to(theta0)
            at += theta0.numel()
        return theta

    def forward(self, *args, **kwargs):
        return functional_call(self.model, self.theta(), args, kwargs)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Write θ₀ + P·z into the module, set z back to 0, and return the module (still frozen)."""
        theta = self.theta()
        for name, parameter in self.model.named_parameters():
            if name in theta:
                parameter.copy_(theta[name])
        self.z.zero_()
        return self.model


def intrinsic_dimension(dimensions, scores, full_score: float, fraction: float = 0.9) -> float:
    """d_int: where the scores, one for each dimension, first reach fraction·full_score.

    Between two dimensions of the grid the score is taken to be linear in log d. Returns the first
    dimension itself when it already suffices (then d_int is at most that), math.inf when no
    dimension of the grid suffices.

    Shapes: `dimensions` n positive numbers in rising order, `scores` n numbers, higher is better
    (accuracy, say), `full_score` > 0 that of training all parameters.
    Errors: ValueError for unequal or empty lists, dimensions not rising, numbers not finite,
    a full_score that is not positive, a fraction outside (0, 1].
    Source: Li et al. 2018 (d_int90 at fraction = 0.9).
    """
    fraction = check_fraction(fraction)
    dims, values = _numbers(dimensions, "dimensions"), _numbers(scores, "scores")
    if dims.ndim != 1 or dims.shape != values.shape:
        raise ValueError(f"{tuple(dims.shape)} dimensions and {tuple(values.shape)} scores; pass one score for each d")
    check_tensor(dims, "dimensions")
    check_tensor(values, "scores")
    if dims[0] <= 0 or (dims.diff() <= 0).any():
        raise ValueError(f"dimensions = {dims.tolist()} must be positive and rising; sort them, with their scores")
    is_number = isinstance(full_score, (Real, Tensor)) and not isinstance(full_score, bool)
    if not (is_number and math.isfinite(full_score) and full_score > 0):
        raise ValueError(f"full_score = {full_score!r} must be a positive number, the score of training everything")
    threshold = fraction * float(full_score)
    reached = (values >= threshold).nonzero()
    if len(reached) == 0:
        return math.inf
    i = int(reached[0])
    if i == 0:
        return dims[0].item()
    share = (threshold - values[i - 1]) / (values[i] - values[i - 1])
    return math.exp(torch.lerp(dims[i - 1].log(), dims[i].log(), share).item())


def _numbers(values, name: str) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} = {values!r} are not numbers; pass a list of numbers, one for each d") from None
