"""initialization.py: each start's distribution, what it leaves of W, and its source's own code."""

import inspect
import math

import loralib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from scipy import stats
from torch import nn

from lora_ref import config, initialization
from lora_ref.functional import lora_linear
from lora_ref.initialization import (
    INITIALIZERS,
    Init,
    gaussian,
    kaiming,
    lora_ga,
    orthogonal,
    pissa,
    random,
    zero,
    zero_a,
)
from lora_ref.svd import truncated_svd

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
S = 0.7
BEGINS_AS_W = {"kaiming", "gaussian", "zero_a", "zero", "orthogonal"}  # B·A = 0
RESIDUAL = {"pissa", "lora_ga"}  # s·B·A is taken off W
each_start = pytest.mark.parametrize("name", INITIALIZERS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=generator(seed), dtype=F64).to(dtype)


def start(name, W, r, s=S, generator=None, **options):
    if name == "lora_ga":
        options.setdefault("gradient", normal(*W.shape, seed=77, dtype=F64 if W.dtype == F64 else F32))
    return INITIALIZERS[name](W, r, s, generator, **options)


def rounding(W):
    return 50 * torch.finfo(torch.promote_types(W.dtype, F32)).eps * W.double().norm().item()


def from_same_distribution(sample, other):
    return stats.ks_2samp(sample.detach().flatten().numpy(), other.detach().flatten().numpy()).pvalue > 1e-3


def has_distribution(sample, distribution):
    return stats.kstest(sample.flatten().numpy(), distribution.cdf).pvalue > 1e-3


def uniform(bound):
    return stats.uniform(-bound, 2 * bound)


def assert_moments(sample, variance, kurtosis):
    """Mean 0 and this variance, to five standard errors of a sample with this kurtosis."""
    sample, n = sample.double(), sample.numel()
    assert abs(sample.mean().item()) <= 5 * math.sqrt(variance / n)
    assert abs(sample.var().item() - variance) <= 5 * variance * math.sqrt((kurtosis - 1) / n)


# what every start promises


@st.composite
def problems(draw):
    """(W, r, s): tall or wide, never square, r even and at most half of the smaller side."""
    d, k = draw(st.tuples(st.integers(4, 12), st.integers(4, 12)).filter(lambda shape: shape[0] != shape[1]))
    W = normal(d, k, seed=draw(st.integers(0, 99)), dtype=draw(st.sampled_from([F32, F64])))
    r = 2 * draw(st.integers(1, min(d, k) // 4))
    return draw(st.sampled_from([1e-3, 1.0, 30.0])) * W, r, draw(st.floats(1e-2, 1e2))


@each_start
@given(problem=problems())
def test_a_start_adds_up_to_W_or_says_that_it_does_not_and_leaves_W_alone(name, problem):
    W, r, s = problem
    before, (d, k) = W.clone(), W.shape
    W.requires_grad_()
    A, B, W0 = start(name, W, r, s, generator(3))
    assert isinstance(start(name, W, r, s), Init)
    assert A.shape == (r, k) and B.shape == (d, r) and W0.shape == (d, k)
    assert A.dtype == B.dtype == W0.dtype == W.dtype
    assert torch.equal(W, before) and W._version == 0
    assert not A.requires_grad and not B.requires_grad
    BA = B @ A
    scale = s * (A.norm() * B.norm()).item()
    if name in BEGINS_AS_W:
        assert BA.norm().item() <= 1e-5 * (A.norm() * B.norm()).item()
        assert W0.data_ptr() == W.data_ptr()
    elif name == "random":
        assert BA.norm() > 0 and W0.data_ptr() == W.data_ptr()
    else:
        assert BA.norm() > 0 and W0.data_ptr() != W.data_ptr() and not W0.requires_grad
        assert (W0.detach().double() + s * BA.double() - before.double()).norm().item() <= (
            rounding(before) + 50 * torch.finfo(W.dtype).eps * scale
        )


def test_the_sets_above_name_every_start():
    assert set(INITIALIZERS) == BEGINS_AS_W | RESIDUAL | {"random"}
    assert tuple(INITIALIZERS) == config.INITIALIZERS
    for name, function in INITIALIZERS.items():
        assert function is getattr(initialization, name)
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:4] == ["W", "r", "s", "generator"] and parameters["s"].default == 1.0, name
    assert inspect.signature(lora_ga).parameters["gamma"].default == 16.0  # the paper's


@each_start
def test_a_generator_repeats_a_start_and_spares_the_global_one(name, rng_untouched):
    W = normal(8, 10)
    one, again, other = (start(name, W, 4, generator=generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.A, again.A) and torch.equal(one.B, again.B)
    drawn = not (torch.equal(one.A, other.A) and torch.equal(one.B, other.B))
    assert drawn == (name not in ("zero", "pissa", "lora_ga"))


@each_start
def test_without_a_generator_the_global_one_is_used(name):
    W, state = normal(8, 10), torch.get_rng_state()
    torch.manual_seed(5)
    one = start(name, W, 4)
    torch.manual_seed(5)
    again, seeded = start(name, W, 4), start(name, W, 4, generator=generator(5))
    torch.set_rng_state(state)
    for other in (again, seeded):
        assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


@each_start
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_factors_of_a_16_bit_weight_have_32_bits(name, dtype):
    W = normal(8, 10, dtype=dtype)
    before = W.clone()
    A, B, W0 = start(name, W, 4, generator=generator())
    assert A.dtype == B.dtype == F32 and W0.dtype == dtype and torch.equal(W, before)
    if name in RESIDUAL:  # W0 is rounded once
        exact = W.double() - S * B.double() @ A.double()
        assert ((W0.double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


# distributions


def test_kaiming_is_uniform_with_bound_one_over_root_k():
    d, k, r = 50, 600, 40
    A, B, _ = kaiming(torch.zeros(d, k) + 1, r, S, generator())
    bound = 1 / math.sqrt(k)
    assert not B.any() and A.abs().max() <= bound and A.abs().max() > 0.999 * bound
    assert has_distribution(A, uniform(bound))
    assert_moments(A, 1 / (3 * k), 1.8)


def test_gaussian_has_standard_deviation_one_over_r():
    d, k, r = 30, 600, 25
    A, B, _ = gaussian(torch.ones(d, k), r, S, generator())
    assert not B.any() and has_distribution(A, stats.norm(0, 1 / r))
    assert_moments(A, 1 / r**2, 3)
    ratio = A.std() / kaiming(torch.ones(d, k), r, S, generator()).A.std()
    assert ratio.item() == pytest.approx(math.sqrt(3 * k) / r, rel=0.05)  # as the docstring says


def test_zero_a_has_A_zero_and_B_uniform_with_bound_one_over_root_r():
    d, k, r = 600, 30, 25
    A, B, _ = zero_a(torch.ones(d, k), r, S, generator())
    assert not A.any() and has_distribution(B, uniform(1 / math.sqrt(r)))
    assert_moments(B, 1 / (3 * r), 1.8)


def test_random_has_both_and_independent():
    d, k, r = 500, 600, 25
    A, B, W0 = random(torch.ones(d, k), r, S, generator())
    assert has_distribution(A, uniform(1 / math.sqrt(k))) and has_distribution(B, uniform(1 / math.sqrt(r)))
    n = d * r
    assert abs(np.corrcoef(A.flatten()[:n], B.flatten()[:n])[0, 1]) <= 5 / math.sqrt(n)


@pytest.mark.parametrize("std, r", [(0.3, 16), (2.0, 5)])
def test_random_with_a_std_has_entries_of_the_update_with_deviation_s_std2_root_r(std, r):
    d, k, s = 120, 150, 1.7
    A, B, W0 = random(torch.ones(d, k), r, s, generator(), std=std)
    for factor in (A, B):
        assert has_distribution(factor / std, stats.norm)
    # Var((B·A)_ij) = r·std⁴; rows and columns share factors, so d·k entries count as about d + k
    found = (s * (B @ A)).pow(2).mean().item()
    assert found == pytest.approx(
        (s * std**2) ** 2 * r, rel=5 * math.sqrt(2 * (1 / (d * r) + 1 / (k * r)) + 2 / (d * k))
    )


def test_zero_is_zero_and_a_saddle():
    W, x = normal(5, 7), normal(4, 7)
    A, B, W0 = zero(W, 3, S, generator())
    A.requires_grad_(), B.requires_grad_()
    lora_linear(x, W0, None, A, B, S).square().sum().backward()
    assert not (A.any() or B.any() or A.grad.any() or B.grad.any())


def test_orthogonal_halves_the_rank_and_moves_both_factors():
    d, k, r = 300, 400, 20
    A, B, W0 = orthogonal(torch.ones(d, k, dtype=F64), r, S, generator())
    assert (B @ A).abs().max() <= 1e-14
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == r // 2
    for factor in (A, B):  # each is N·Q/10, Q half of an orthonormal basis: r/2 of r directions, N(0, 1/100) in them
        assert factor.pow(2).mean().item() == pytest.approx(1 / 200, rel=5 * math.sqrt(2 / (factor.numel() / 2)))
        values = torch.linalg.svdvals(factor)[: r // 2] / math.sqrt(max(factor.shape))
        assert values.min() > 0.05 and values.max() < 0.15
    A, B = A.requires_grad_(), B.requires_grad_()
    lora_linear(normal(6, k), W0, None, A, B, S).square().sum().backward()
    assert A.grad.any() and B.grad.any()


# peft and loralib as oracles


def peft_start(W, r, alpha, init, **options):
    """A, B and the base weight that peft makes, with rsLoRA's scale if use_rslora is set."""
    base = nn.Linear(W.shape[1], W.shape[0], bias=False)
    base.weight.data = W.clone()
    layer_config = LoraConfig(r=r, lora_alpha=alpha, init_lora_weights=init, target_modules=["0"], **options)
    layer = inject_adapter_in_model(layer_config, nn.Sequential(base))[0]
    return Init(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_A_and_B_are_distributed_as_pefts(init):
    d, k, r = 300, 500, 24
    W, name = torch.ones(d, k), {True: "kaiming", False: "random"}.get(init, init)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = peft_start(W, r, 5, init)
    own = INITIALIZERS[name](W, r, S, generator(1))
    for factor, other in ((own.A, theirs.A), (own.B, theirs.B)):
        assert factor.shape == other.shape
        assert bool(factor.any()) == bool(other.any())
        if factor.any():
            assert from_same_distribution(factor, other)
            assert factor.std().item() == pytest.approx(other.std().item(), rel=0.03)
    assert theirs.A.abs().max() <= 1 / math.sqrt(k) or init in ("gaussian", "orthogonal")


def test_A_is_distributed_as_loralibs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = loralib.Linear(500, 300, r=24)
    own = kaiming(torch.ones(300, 500), 24, S, generator(1))
    assert from_same_distribution(own.A, theirs.lora_A) and not theirs.lora_B.any()
    assert theirs.lora_A.abs().max() <= 1 / math.sqrt(500)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_is_pefts(shape, use_rslora):
    W, r, alpha = normal(*shape, dtype=F32), 4, 7
    theirs = peft_start(W, r, alpha, "pissa", use_rslora=use_rslora)
    own = pissa(W, r, config.scale(alpha, r, use_rslora))
    for name in ("A", "B"):  # up to the sign of each singular pair, the same in both
        torch.testing.assert_close(getattr(own, name).abs(), getattr(theirs, name).abs().detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.B @ own.A, (theirs.B @ theirs.A).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.W0, theirs.W0.detach(), rtol=1e-4, atol=1e-5)


# PiSSA


@pytest.mark.parametrize("s", [0.3, 4.0])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_pissas_update_is_the_truncated_svd_of_W(s, shape):
    W = normal(*shape)
    A, B, W0 = pissa(W, 4, s)
    left, right = truncated_svd(W, 4)
    torch.testing.assert_close(s * B @ A, left @ right)
    torch.testing.assert_close(W0, W - left @ right)
    torch.testing.assert_close(B.mT @ B, A @ A.mT)  # split evenly
    torch.testing.assert_close((B.mT @ B).diagonal() * s, torch.linalg.svdvals(W)[:4])
    assert A.is_contiguous() and B.is_contiguous()


# LoRA-GA


def best_of_rank(G, r):
    left, right = truncated_svd(G, r)
    return left @ right


@pytest.mark.parametrize("s, gamma", [(0.3, 16.0), (4.0, 3.0)])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_lora_gas_first_step_is_the_best_rank_2r_approximation_of_the_gradient(s, gamma, shape):
    W, G, r, eta = normal(*shape), normal(*shape, seed=1), 3, 1e-8
    A, B, W0 = lora_ga(W, r, s, gradient=G, gamma=gamma)
    c2 = math.sqrt(shape[0]) / (gamma * s)
    torch.testing.assert_close(G @ A.mT @ A + B @ B.mT @ G, c2 * best_of_rank(G, 2 * r))
    A.requires_grad_(), B.requires_grad_()  # one step of SGD on ⟨G, W0 + s·B·A⟩, whose gradient is G
    (G * lora_linear(torch.eye(shape[1], dtype=F64), W0, None, A, B, s).mT).sum().backward()
    with torch.no_grad():
        step = s * ((B - eta * B.grad) @ (A - eta * A.grad) - B @ A)
    torch.testing.assert_close(step / eta, -(s**2) * c2 * best_of_rank(G, 2 * r), rtol=1e-4, atol=1e-4)


def test_lora_gas_update_is_the_same_at_every_scale_and_as_wide_as_stated():
    W, G = normal(9, 14), normal(9, 14, seed=1)
    one, other = (lora_ga(W, 3, s, gradient=G) for s in (0.3, 4.0))
    torch.testing.assert_close(0.3 * one.B @ one.A, 4.0 * other.B @ other.A)
    torch.testing.assert_close(one.W0, other.W0)
    c2 = 9**0.5 / (16 * 0.3)
    for gram in (one.A @ one.A.mT, one.B.mT @ one.B):
        torch.testing.assert_close(gram, c2 * torch.eye(3, dtype=F64))
    assert (one.B @ one.A).norm() > 0
    overlap = torch.linalg.svd(G).U[:, :3].mT @ one.B  # B takes the second r directions, A the first
    assert overlap.abs().max() <= 1e-12


def test_lora_ga_takes_a_gradient_of_another_precision_and_leaves_it_alone():
    G = normal(9, 14, seed=1).requires_grad_()
    before = G.detach().clone()
    start = lora_ga(normal(9, 14, dtype=F32), 3, S, gradient=G)
    assert start.A.dtype == F32 and torch.equal(G, before)
    assert not any(M.requires_grad for M in start)


# bad input


BAD_W = {
    "list": ([[1.0]], ["W must be a torch.Tensor", "got list"]),
    "integers": (torch.ones(5, 7, dtype=torch.int64), ["torch.int64", ".double()"]),
    "vector": (torch.ones(7), ["(7,)", "reshape"]),
    "stack": (torch.ones(2, 5, 7), ["(2, 5, 7)", "flatten(1)"]),
    "nan": (torch.full((5, 7), math.nan), ["35 NaN"]),
    "meta": (torch.ones(5, 7, device="meta"), ["meta device"]),
}


@each_start
@pytest.mark.parametrize("what", BAD_W)
def test_a_W_that_is_no_finite_matrix_is_refused(name, what, refused, rng_untouched):
    W, says = BAD_W[what]
    refused(lambda: INITIALIZERS[name](W, 2, S, **({"gradient": torch.ones(5, 7)} if name == "lora_ga" else {})), *says)


@each_start
@pytest.mark.parametrize("r", [0, 6, -2, 2.0, True, None, "2"], ids=repr)
def test_a_rank_outside_1_to_min_d_k_is_refused(name, r, refused, rng_untouched):
    refused(lambda: start(name, torch.ones(5, 7), r), repr(r), "between 1 and 5", "5×7")


@each_start
@pytest.mark.parametrize("s", [0, -1.0, math.nan, math.inf, "1", None, True, torch.tensor(1.0)], ids=repr)
def test_a_scale_that_is_not_finite_and_positive_is_refused(name, s, refused, rng_untouched):
    refused(lambda: start(name, torch.ones(5, 7), 2, s), "s ", repr(s), "LoRAConfig")


@each_start
def test_a_seed_is_no_generator(name, refused, rng_untouched):
    refused(lambda: start(name, torch.ones(5, 7), 2, generator=3), "got 3 of type int", "manual_seed")


@pytest.mark.parametrize("r", [1, 3])
def test_the_orthogonal_start_refuses_an_odd_rank(r, refused, rng_untouched):
    refused(lambda: orthogonal(torch.ones(5, 7), r, S), f"r = {r}", "even")


@pytest.mark.parametrize("std", [0, -1.0, math.nan, math.inf, "1", True], ids=repr)
def test_random_refuses_a_width_that_is_none(std, refused, rng_untouched):
    refused(lambda: random(torch.ones(5, 7), 2, S, std=std), "std ", repr(std), "None gives PEFT's widths")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"gradient": torch.ones(7, 5)}, ["(7, 5)", "(5, 7)"]),
        ({"gradient": torch.ones(5, 7) * math.nan}, ["gradient has 35 NaN"]),
        ({"gradient": None}, ["gradient must be a torch.Tensor", "NoneType"]),
        ({"gradient": torch.ones(5, 7), "gamma": 0.0}, ["gamma = 0.0", "16"]),
        ({"gradient": torch.ones(5, 7), "gamma": -1.0}, ["gamma = -1.0", "16"]),
        ({"gradient": torch.ones(5, 7), "gamma": math.nan}, ["gamma = nan", "16"]),
        ({"gradient": torch.ones(5, 7), "r": 3}, ["r = 3", "2r directions", "r <= 2"]),
        ({}, ["gradient"]),
    ],
)
def test_lora_ga_refuses_what_is_no_gradient_of_W(options, says, refused, rng_untouched):
    refused(lambda: lora_ga(torch.ones(5, 7), **({"r": 2, "s": S} | options)), *says)
