"""The full and the randomised SVD, and random projections: rows for the benchmarks `svd` and `projections`."""

import math
import statistics
from collections.abc import Iterator

import torch

from ..intrinsic_dimension import PROJECTIONS
from ..measure import paired, quartiles
from ..svd import randomized_svd

LARGEST_DENSE = 256 * 2**20  # bytes: a larger dense P is counted, not built
SHAPES = [(256, 192), (512, 384), (1024, 768), (2048, 1536), (3072, 2304)]
SUBSPACES = [(8_970, 256), (100_000, 256), (1_000_000, 256), (4_000_000, 256)]
MAX_SETUPS = 3


def svd_work(case: tuple[int, int], rounds: int) -> float:
    """About how many multiply-adds the full SVD takes, which takes most of the time."""
    d, k = case
    return 10 * (rounds + 4) * d * k * min(d, k)


def measure_svd(case: tuple[int, int], rounds: int, device: torch.device) -> Iterator[dict]:
    """The full and the randomised SVD (p = 10, q = 2), cut to rank r = 16, of a d×k matrix with σ_i = 1/i.

        error = ‖W − U_r·diag(S_r)·V_rᵀ‖₂ / σ_{r+1} ≥ 1 (Eckart–Young);   ratio = randomised / full
        expected cost: full O(dk·min(d, k)), randomised O(dk·r)

    float32, on the CPU. Source: Halko, Martinsson & Tropp 2011 (arXiv 0909.4061).
    """
    (d, k), r = case, 16
    generator = torch.Generator().manual_seed(0)
    sigma = 1 / torch.arange(1, min(d, k) + 1)
    left, right = (torch.linalg.qr(torch.randn(n, len(sigma), generator=generator)).Q for n in (d, k))
    W = left * sigma @ right.mT
    functions = {
        "full": lambda: torch.linalg.svd(W, full_matrices=False),
        "randomised": lambda: randomized_svd(W, r, oversampling=10, power_iterations=2, generator=generator),
    }
    timing = paired(functions, rounds)
    row = {"shape": f"{d}×{k}", "size": d * k, "seconds": {name: one.seconds for name, one in timing.items()}}
    for name, one in timing.items():
        row[f"{name}_ms"] = one.ms
    row["ratio"] = quartiles(timing["randomised"].ratios)
    for name, function in functions.items():
        U, S, Vh = function()
        residual = W - U[:, :r] * S[:r] @ Vh[:r]
        row[f"{name}_error"] = (torch.linalg.matrix_norm(residual, 2) / sigma[r]).item()
    yield row


def summarize_svd(rows: list[dict]) -> str:
    return f"At {rows[-1]['shape']} the randomised SVD takes {rows[-1]['ratio']['median']:.3f}× the full one's time"


def _is_built(name: str, D: int, d: int) -> bool:
    return name == "fastfood" or 4 * D * d <= LARGEST_DENSE


def projections_work(case: tuple[int, int], rounds: int) -> float:
    """About how many multiply-adds a case takes: set-ups, of which the orthonormal P's costs most, and steps."""
    D, d = case
    fastfood = 50 * D * math.log2(d) * (rounds + MAX_SETUPS)
    if not _is_built("dense", D, d):
        return fastfood
    return fastfood + 2 * (MAX_SETUPS + 2) * D * d**2 + 10 * (rounds + 1) * D * d


def measure_projections(case: tuple[int, int], rounds: int, device: torch.device) -> Iterator[dict]:
    """Projections P: R^d → R^D (lesson 02): memory, set-up, and a step, z ↦ P·z with its backward g ↦ Pᵀ·g.

        expected cost: dense and orthonormal O(D·d) in memory and time, Fastfood O(D) and O(D·log d)

    float32, on the CPU; ratio = step / dense step. A dense P above 256 MiB is counted, not built (—).
    """
    D, d = case
    built = {name: make for name, make in PROJECTIONS.items() if _is_built(name, D, d)}
    setup = paired({name: lambda make=make: make(D, d) for name, make in built.items()}, min(rounds, MAX_SETUPS))
    modules = {name: make(D, d, torch.Generator().manual_seed(0)) for name, make in built.items()}
    z, gradient = torch.ones(d, requires_grad=True), torch.ones(D)
    step = paired({name: lambda P=P: torch.autograd.grad(P(z), z, gradient) for name, P in modules.items()}, rounds)
    for name in PROJECTIONS:
        row = {"D": D, "d": d, "projection": name, "bytes": 4 * D * d, "setup_s": None, "step_ms": None, "ratio": None}
        if name in built:
            row["bytes"] = modules[name].nbytes()
            row["setup_s"] = statistics.median(setup[name].seconds)
            row["step_ms"] = step[name].ms
            row["ratio"] = quartiles(step[name].ratios) if "dense" in built else None
        yield row | {"size": D, "seconds": {name: step[name].seconds} if name in built else {}}


def summarize_projections(rows: list[dict]) -> str:
    compared = [row for row in rows if row["projection"] == "fastfood" and row["ratio"]]
    if not compared:
        return "Fastfood was not timed against a dense projection"
    row = compared[-1]
    share = row["bytes"] / (4 * row["D"] * row["d"])
    return f"At D = {row['D']:,} Fastfood takes {row['ratio']['median']:.3f}× dense's time, {share:.3f}× its memory"
