"""Intrinsic dimension: train a network inside a random d-dimensional slice of its parameters.

    θ = θ₀ + P·z,    θ₀, θ ∈ R^D,   P ∈ R^{D×d} random and fixed,   z ∈ R^d trained from 0

The intrinsic dimension d_int90 of an objective is the least d at which this reaches 90 % of the
score of training all D parameters (Li et al. 2018, arXiv 1804.08838). It counts the dimensions
of a flat slice of parameter space. It is no matrix rank: lesson 02 shows both.

The three choices of P stand in `projections`, and can be imported from here too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ._checks import check_choice, check_fraction, check_positive, check_tensor
from .projections import (
    PROJECTIONS,
    DenseProjection,
    FastfoodProjection,
    OrthonormalProjection,
    Projection,
    hadamard_transform,
)

__all__ = [
    "PROJECTIONS",
    "DenseProjection",
    "FastfoodProjection",
    "OrthonormalProjection",
    "Projection",
    "RandomSubspace",
    "hadamard_transform",
    "intrinsic_dimension",
]


class RandomSubspace(nn.Module):
    """Any module, trained in a random d-dimensional subspace: f(x; θ₀ + P·z), z ∈ R^d from 0.

    θ₀ is the module's own parameters that required a gradient, taken as they are; the wrapper freezes all of the
    module's parameters and trains z alone. Each forward forms θ once, of D numbers. Tied parameters count once;
    buffers (batch-norm statistics) work as ever.

    Args:
        model: the module; it is frozen, and its forward's arguments are this one's.
        d: dimension of the subspace, 1 … D.
        projection: the choice of P, "dense", "orthonormal" or "fastfood".
        generator: a CPU generator, which makes P reproducible; None takes torch's global generator.

    Attributes:
        z: the trained parameter, shape (d,).

    Raises:
        TypeError: the model is not a module, or d not an integer. The module is unchanged.
        ValueError: nothing in the module is trainable, a parameter is not finite, d is outside 1 … D, or the
            projection is unknown. The module is unchanged.

    Example:
        >>> subspace = RandomSubspace(nn.Linear(50, 20), d=10)
        >>> optimizer = torch.optim.Adam([subspace.z], lr=0.1)
        >>> subspace(torch.ones(3, 50)).shape, subspace.projection.D
        (torch.Size([3, 20]), 1020)

    Source:
        Li et al. 2018 (arXiv 1804.08838), equation 2.
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
        check_choice(projection, "projection", PROJECTIONS)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trained:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameters to span a subspace of; "
                "pass a module with parameters, or set requires_grad_(True) on those to train"
            )
        for name, parameter in trained.items():
            check_tensor(parameter, f"parameter {name!r}")
        first = next(iter(trained.values()))
        dtype = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
        D = sum(parameter.numel() for parameter in trained.values())
        P = PROJECTIONS[projection](D, d, generator, dtype)
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


def intrinsic_dimension(
    dimensions: Sequence[float] | Tensor, scores: Sequence[float] | Tensor, full_score: float, fraction: float = 0.9
) -> float:
    """d_int: where the scores, one for each dimension, first reach fraction·full_score.

    Between two dimensions of the grid the score is taken to be linear in log d.

    Args:
        dimensions: n positive numbers in rising order.
        scores: n numbers; higher is better (accuracy, say).
        full_score: the score of training all parameters, above 0.
        fraction: the share of full_score to reach, in (0, 1]; 0.9 gives d_int90.

    Returns:
        The dimension. The first one of the grid when that already suffices (then d_int is at most that), math.inf
        when no dimension of the grid suffices.

    Raises:
        TypeError: dimensions or scores are not numbers, or full_score or fraction is not one.
        ValueError: lists of unequal length or empty, dimensions that are not positive and rising, numbers that are not
            finite, a full_score that is not positive, or a fraction outside (0, 1].

    Example:
        >>> round(intrinsic_dimension([10, 100, 1000], [0.2, 0.8, 1.0], full_score=1.0), 1)  # √(100·1000)
        316.2
        >>> intrinsic_dimension([10, 100], [0.2, 0.8], full_score=1.0)
        inf

    Source:
        Li et al. 2018 (arXiv 1804.08838): d_int90 at fraction = 0.9.
    """
    fraction = check_fraction(fraction)
    dims, values = _as_vector(dimensions, "dimensions"), _as_vector(scores, "scores")
    if dims.ndim != 1 or dims.shape != values.shape:
        raise ValueError(f"{tuple(dims.shape)} dimensions and {tuple(values.shape)} scores; pass one score for each d")
    check_tensor(dims, "dimensions")
    check_tensor(values, "scores")
    if dims[0] <= 0 or (dims.diff() <= 0).any():
        raise ValueError(f"dimensions = {dims.tolist()} must be positive and rising; sort them, with their scores")
    if isinstance(full_score, Tensor) and full_score.numel() == 1:
        full_score = full_score.item()
    full_score = check_positive(full_score, "full_score", "the score of training all parameters")
    threshold = fraction * full_score
    reached = (values >= threshold).nonzero()
    if len(reached) == 0:
        return math.inf
    i = int(reached[0])
    if i == 0:
        return dims[0].item()
    share = (threshold - values[i - 1]) / (values[i] - values[i - 1])
    return math.exp(torch.lerp(dims[i - 1].log(), dims[i].log(), share).item())


def _as_vector(values: Sequence[float] | Tensor, name: str) -> Tensor:
    """The numbers as a tensor in float64."""
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} = {values!r} are not numbers; pass a list of numbers, one for each d") from None
