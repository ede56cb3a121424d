"""projections.py: each projection as a matrix, against its definition; the Hadamard transform."""

import copy
import math

import numpy as np
import pytest
import torch

from lora_ref.projections import (
    PROJECTIONS,
    DenseProjection,
    FastfoodProjection,
    OrthonormalProjection,
    Projection,
    hadamard_transform,
)

F32, F64 = torch.float32, torch.float64
NAMES = list(PROJECTIONS)
SHAPES = [(1, 1), (9, 1), (9, 9), (64, 16), (64, 9), (100, 33), (70, 64), (31, 17)]  # (D, d); D a power of 2 or not
each_projection = pytest.mark.parametrize("name", NAMES)
each_shape = pytest.mark.parametrize("D, d", SHAPES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def project(name, D, d, seed=0, dtype=F64):
    return PROJECTIONS[name](D, d, generator(seed), dtype)


def as_matrix(P):
    """P as a D×d array, column by column."""
    dtype = next(b.dtype for b in P.buffers() if b.is_floating_point())
    return torch.stack([P(e) for e in torch.eye(P.d, dtype=dtype)], dim=1)


# the Hadamard transform


@pytest.mark.parametrize("p", [2**n for n in range(12)])
def test_the_hadamard_transform_multiplies_by_sylvesters_matrix(p):
    H = pytest.importorskip("scipy.linalg").hadamard(p)
    x = torch.randn(3, p, generator=generator(), dtype=F64)
    np.testing.assert_allclose(hadamard_transform(x).numpy(), x.numpy() @ H.T, atol=1e-12 * p)


@pytest.mark.parametrize("shape", [(1,), (8,), (5, 64), (2, 3, 4, 16), (2, 2048), (0, 4)])
@pytest.mark.parametrize("dtype, digits", [(F32, 1e-5), (F64, 1e-13)])
def test_twice_the_transform_is_p_times_the_identity_and_lengths_grow_by_root_p(shape, dtype, digits):
    x, p = torch.randn(*shape, generator=generator(), dtype=dtype), shape[-1]
    y = hadamard_transform(x)
    assert y.shape == x.shape and y.dtype == dtype
    torch.testing.assert_close(hadamard_transform(y) / p, x, rtol=digits, atol=digits)
    torch.testing.assert_close(y.norm(dim=-1), math.sqrt(p) * x.norm(dim=-1), rtol=digits, atol=0)


def test_the_transform_is_linear_and_differentiable():
    x, y = torch.randn(2, 3, 64, generator=generator(), dtype=F64)
    torch.testing.assert_close(hadamard_transform(2 * x - y), 2 * hadamard_transform(x) - hadamard_transform(y))
    assert torch.autograd.gradcheck(hadamard_transform, x[:, :8].clone().requires_grad_())


def test_the_transform_of_integers_is_exact():
    assert hadamard_transform(torch.tensor([1, 2, 3, 4])).tolist() == [10, -2, -4, 0]


def test_the_transform_does_not_write_into_its_argument():
    x = torch.arange(64.0)
    hadamard_transform(x)
    assert torch.equal(x, torch.arange(64.0))


@pytest.mark.parametrize(
    "x, says",
    [
        (torch.ones(3), ["length 3", "pad it to 4"]),
        (torch.ones(2, 33), ["length 33", "pad it to 64"]),
        (torch.ones(2, 0), ["length 0", "pad it to 1"]),
        (torch.tensor(1.0), ["length 0", "pad it to 1"]),
        (torch.ones(4, dtype=torch.bool), ["torch.bool", "torch.as_tensor(x).double()"]),
        ([1.0, 2.0], ["[1.0, 2.0]", "torch.as_tensor"]),
        (None, ["None", "torch.as_tensor"]),
    ],
)
def test_the_transform_refuses_other_lengths_and_other_things(x, says, refused):
    refused(lambda: hadamard_transform(x), *says)


# projections


@each_projection
@each_shape
@pytest.mark.parametrize("dtype, digits", [(F32, 1e-5), (F64, 1e-13)])
def test_a_projection_is_linear_along_the_last_axis(name, D, d, dtype, digits):
    P = project(name, D, d, dtype=dtype)
    x, y = torch.randn(2, 2, 3, d, generator=generator(1), dtype=dtype)
    assert P(x).shape == (2, 3, D) and P(x).dtype == dtype
    torch.testing.assert_close(P(2 * x - y), 2 * P(x) - P(y), rtol=digits, atol=digits)
    torch.testing.assert_close(P(x)[1, 2], P(x[1, 2]), rtol=digits, atol=digits)
    torch.testing.assert_close(P(x)[1, 2], as_matrix(P) @ x[1, 2], rtol=digits, atol=digits)
    assert not P(torch.zeros(d, dtype=dtype)).any()


@each_projection
@each_shape
@pytest.mark.parametrize("seed", range(3))
def test_a_projection_has_full_column_rank(name, D, d, seed):
    assert np.linalg.matrix_rank(as_matrix(project(name, D, d, seed)).numpy()) == d


@each_projection
@pytest.mark.parametrize("D, d", [(20, 6), (16, 8), (5, 5), (11, 1)])
def test_the_expected_squared_length_is_kept(name, D, d):
    z = torch.randn(d, generator=generator(99), dtype=F64)
    ratios = np.array([(project(name, D, d, seed)(z).norm() / z.norm()).item() ** 2 for seed in range(400)])
    assert abs(ratios.mean() - 1) <= 5 * ratios.std() / math.sqrt(len(ratios)) + 1e-12


@each_projection
def test_the_subspace_has_no_preferred_direction(name):
    """E[P·Pᵀ] = (d/D)·I: every parameter moves as much as any other, and independently."""
    D, d, n = 10, 3, 800
    outer = torch.stack([M @ M.mT for M in (as_matrix(project(name, D, d, seed)) for seed in range(n))])
    slack = 5 * outer.std(0).max().item() / math.sqrt(n)
    torch.testing.assert_close(outer.mean(0), d / D * torch.eye(D, dtype=F64), rtol=0, atol=slack)


@each_shape
@pytest.mark.parametrize("dtype, digits", [(F32, 1e-5), (F64, 1e-13)])
def test_dense_columns_have_length_one(D, d, dtype, digits):
    lengths = as_matrix(project("dense", D, d, dtype=dtype)).norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones(d, dtype=dtype), rtol=digits, atol=digits)


@each_shape
@pytest.mark.parametrize("dtype, digits", [(F32, 1e-5), (F64, 1e-13)])
def test_orthonormal_columns_are_orthonormal_so_lengths_are_kept(D, d, dtype, digits):
    P = project("orthonormal", D, d, dtype=dtype)
    M, z = as_matrix(P), torch.randn(d, generator=generator(1), dtype=dtype)
    torch.testing.assert_close(M.mT @ M, torch.eye(d, dtype=dtype), rtol=digits, atol=digits)
    torch.testing.assert_close(P(z).norm(), z.norm(), rtol=digits, atol=0)


def test_the_orthonormal_basis_is_uniform_not_signed_by_the_qr_convention():
    M = torch.stack([as_matrix(project("orthonormal", 5, 3, seed)) for seed in range(400)])
    assert (M.mean(0).abs() <= 5 * M.std(0) / math.sqrt(400)).all()


@pytest.mark.parametrize("D, d", [(1, 1), (9, 1), (64, 16), (64, 9), (24, 7), (48, 16)])
@pytest.mark.parametrize("dtype, digits", [(F32, 1e-5), (F64, 1e-13)])
def test_fastfood_columns_have_length_one_when_p_divides_D(D, d, dtype, digits):
    lengths = as_matrix(project("fastfood", D, d, dtype=dtype)).norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones(d, dtype=dtype), rtol=digits, atol=digits)


@each_shape
def test_fastfood_is_the_product_of_the_five_matrices_of_its_definition(D, d):
    P = project("fastfood", D, d)
    p = 1 << (d - 1).bit_length()
    H = torch.tensor(pytest.importorskip("scipy.linalg").hadamard(p), dtype=F64)
    blocks = [
        H @ torch.diag(g) @ torch.eye(p, dtype=F64)[order] @ H @ torch.diag(s)
        for g, order, s in zip(P.gauss, P.order, P.signs)
    ]
    torch.testing.assert_close(as_matrix(P), torch.cat(blocks)[:D, :d] / math.sqrt(p * D))


def test_fastfoods_parts_are_signs_permutations_and_gaussians_of_length_root_p_all_random():
    P = project("fastfood", 4096, 64)
    assert P.signs.unique().tolist() == [-1, 1] and abs(P.signs.mean()) < 5 / 64
    assert all(row.sort().values.tolist() == list(range(64)) for row in P.order)
    torch.testing.assert_close(P.gauss.norm(dim=-1), torch.full((64,), 8.0, dtype=F64))
    assert abs(P.gauss.mean()) < 5 / 64 and 2.5 < (P.gauss**4).mean() < 3.5  # the kurtosis of a Gaussian is 3
    for part in (P.signs, P.order, P.gauss):
        assert len({tuple(row.tolist()) for row in part}) == 64  # no block repeats another


def test_fastfood_survives_a_gaussian_draw_of_exactly_zero(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **kind: torch.zeros(*shape, dtype=kind["dtype"]))
    assert torch.isfinite(as_matrix(FastfoodProjection(9, 1))).all()


@each_projection
@each_shape
def test_autograd_through_a_projection_is_the_transpose(name, D, d):
    P = project(name, D, d)
    z, w = torch.zeros(2, d, dtype=F64, requires_grad=True), torch.randn(2, D, generator=generator(1), dtype=F64)
    (gradient,) = torch.autograd.grad((P(z) * w).sum(), z)
    torch.testing.assert_close(gradient, w @ as_matrix(P))


@pytest.mark.parametrize("dtype, size", [(F32, 4), (F64, 8)])
def test_dense_memory_grows_with_D_times_d_and_fastfood_memory_with_D_alone(dtype, size):
    for d in (1, 8, 100, 1000):
        for name in ("dense", "orthonormal"):
            assert project(name, 1000, d, dtype=dtype).nbytes() == 1000 * d * size
        assert project("fastfood", 1000, d, dtype=dtype).nbytes() <= (2 * size + 8) * 1024


@each_projection
def test_a_projection_is_reproducible_by_its_generator_alone(name, rng_untouched):
    first, again, other = (as_matrix(project(name, 40, 6, seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.allclose(first, other)


@each_projection
def test_without_a_generator_the_global_one_decides(name):
    made = []
    with torch.random.fork_rng():
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            made.append(as_matrix(PROJECTIONS[name](40, 6)))
    assert torch.equal(made[0], made[1]) and not torch.allclose(made[0], made[2])


@each_projection
def test_a_projection_trains_nothing_moves_with_to_and_survives_a_state_dict(name):
    P, other = project(name, 40, 6, 3, F32), project(name, 40, 6, 4, F32)
    M = as_matrix(P)
    assert list(P.parameters()) == []
    other.load_state_dict(P.state_dict())
    assert torch.equal(as_matrix(other), M)
    doubled = as_matrix(copy.deepcopy(P).to(F64))
    assert doubled.dtype == F64
    torch.testing.assert_close(doubled, M.double(), rtol=1e-5, atol=1e-6)


NO_INTEGERS = [True, 2.0, math.nan, math.inf, "2", None, [1]]


@each_projection
@pytest.mark.parametrize("d", [0, -1, 8, *NO_INTEGERS], ids=repr)
def test_a_projection_refuses_d_outside_1_to_D(name, d, refused, rng_untouched):
    refused(lambda: PROJECTIONS[name](7, d), repr(d), "between 1 and 7", "7 parameters")


@each_projection
@pytest.mark.parametrize("D", [0, -5, *NO_INTEGERS], ids=repr)
def test_a_projection_refuses_a_D_that_is_no_count(name, D, refused, rng_untouched):
    refused(lambda: PROJECTIONS[name](D, 1), repr(D), "at least 1")


@each_projection
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.complex64, "float32", None], ids=repr)
def test_a_projection_refuses_other_number_types(name, dtype, refused, rng_untouched):
    refused(lambda: PROJECTIONS[name](7, 2, None, dtype), repr(dtype), "torch.float32 or torch.float64")


@each_projection
def test_a_seed_is_no_generator(name, refused, rng_untouched):
    refused(lambda: PROJECTIONS[name](7, 2, 3), "got 3 of type int", "torch.Generator().manual_seed")


@each_projection
@pytest.mark.parametrize("shape", [(1,), (3,), (5,), (4, 1), (4, 8), (0,), ()], ids=repr)
def test_a_projection_refuses_z_of_another_length_instead_of_broadcasting_it(name, shape, refused):
    refused(lambda: project(name, 9, 4, dtype=F32)(torch.ones(shape)), str(shape), "d = 4")


@each_projection
def test_a_projection_refuses_z_that_is_no_tensor(name, refused):
    refused(lambda: project(name, 9, 2)([1.0, 2.0]), "got list", "torch.as_tensor")


def test_every_projection_is_in_the_table():
    assert list(PROJECTIONS.values()) == [DenseProjection, OrthonormalProjection, FastfoodProjection]
    assert NAMES == ["dense", "orthonormal", "fastfood"]
    assert all(issubclass(P, Projection) for P in PROJECTIONS.values())


@pytest.mark.parametrize("name", ["dense", "orthonormal"])
def test_the_matrix_of_a_dense_projection_is_the_map_itself(name):
    P = PROJECTIONS[name](23, 7, torch.Generator().manual_seed(0), torch.float64)
    z = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert P.P.shape == (23, 7) and torch.allclose(P.P @ z, P(z))
