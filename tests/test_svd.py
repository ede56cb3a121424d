"""svd.py and spectrum.py: Eckart–Young, energies, ranks and the randomised SVD, against numpy and against rivals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ref.svd import (
    balanced_factors,
    break_even_rank,
    effective_rank,
    energy,
    randomized_svd,
    randomized_svd_bound,
    rank_at_energy,
    singular_values,
    stable_rank,
    truncated_svd,
    truncation_error,
)

F32, F64 = torch.float32, torch.float64
SPECTRA = {
    "decaying": lambda n: 2.0 ** -torch.arange(n, dtype=F64),
    "slow": lambda n: 1 / torch.arange(1, n + 1, dtype=F64),
    "flat": lambda n: torch.ones(n, dtype=F64),
    "rank deficient": lambda n: (torch.arange(n) < (n + 1) // 2).to(F64),
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator(seed), dtype=F64)).Q


def with_spectrum(d, k, S, seed=0):
    """A d×k float64 matrix with these singular values."""
    return orthonormal(d, len(S), seed) * S @ orthonormal(k, len(S), seed + 1).mT


@st.composite
def matrices(draw, dtypes=(F32, F64), largest=14):
    """Tall and wide matrices, never square, of full or deficient rank, in each of these dtypes."""
    d = draw(st.integers(1, largest))
    k = draw(st.integers(1, largest).filter(lambda k: k != d))
    spectrum, seed = draw(st.sampled_from(sorted(SPECTRA))), draw(st.integers(0, 2**16))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return scale * with_spectrum(d, k, SPECTRA[spectrum](min(d, k)), seed).to(draw(st.sampled_from(dtypes)))


def rank_of(data, W):
    return data.draw(st.integers(1, min(W.shape)), label="r")


def exact(W):
    """The singular values by numpy, in float64."""
    return np.linalg.svd(W.double().numpy(), compute_uv=False)


def residual(W, B, A):
    return W.double().numpy() - B.double().numpy() @ A.double().numpy()


def rounding(W):
    """What the SVD of W may be wrong by: a few units in the last place of ‖W‖_F for each side of W."""
    eps = max(torch.finfo(W.dtype).eps, torch.finfo(F64).eps)
    return 4 * sum(W.shape) * eps * np.linalg.norm(W.double().numpy())


# singular values


@given(matrices())
def test_squared_singular_values_are_the_eigenvalues_of_the_gram_matrix(W):
    S, M = singular_values(W), W.double().numpy()
    gram = M @ M.T if W.shape[0] < W.shape[1] else M.T @ M
    np.testing.assert_allclose(
        S.double().numpy() ** 2, np.linalg.eigvalsh(gram)[::-1], rtol=0, atol=2 * exact(W)[0] * rounding(W)
    )
    assert S.shape == (min(W.shape),) and S.dtype == W.dtype
    assert (S.diff() <= 0).all() and (S >= 0).all()


# truncation


@given(matrices(), st.data())
def test_truncation_leaves_exactly_the_tail_in_both_norms(W, data):
    r = rank_of(data, W)
    R, S = residual(W, *truncated_svd(W, r)), exact(W)
    assert np.linalg.norm(R, "fro") == pytest.approx(np.sqrt((S[r:] ** 2).sum()), abs=rounding(W))
    assert np.linalg.norm(R, 2) == pytest.approx(np.append(S, 0)[r], abs=rounding(W))


@given(matrices())
def test_truncation_error_is_what_truncation_leaves_at_every_rank(W):
    M = W.double().numpy()
    leaves = [M] + [residual(W, *truncated_svd(W, r)) for r in range(1, min(W.shape) + 1)]
    for norm, order in (("fro", "fro"), ("spectral", 2)):
        errors = truncation_error(W, norm)
        np.testing.assert_allclose(
            errors.double().numpy(), [np.linalg.norm(R, order) for R in leaves], rtol=0, atol=rounding(W)
        )
        assert errors[-1] == 0 and (errors.diff() <= 0).all() and errors.dtype == W.dtype


@given(matrices(dtypes=(F64,)), st.data())
def test_no_other_matrix_of_rank_r_is_closer(W, data):
    d, k = W.shape
    r, seed = rank_of(data, W), data.draw(st.integers(0, 99), label="seed")
    B, A = truncated_svd(W, r)
    M = W.numpy()
    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    rng = np.random.default_rng(seed)
    free, others = rng.normal(size=(d, r)), rng.permutation(len(S))[:r]
    rivals = {
        "random column space, best fit in it": free @ np.linalg.lstsq(free, M, rcond=None)[0],
        "other singular directions": U[:, others] * S[others] @ Vh[others],
        "nearby": (B.numpy() + 1e-3 * rng.normal(size=(d, r))) @ (A.numpy() + 1e-3 * rng.normal(size=(r, k))),
        "shrunk": 0.99 * (B @ A).numpy(),
    }
    for order in ("fro", 2):
        best = np.linalg.norm(residual(W, B, A), order)
        for name, rival in rivals.items():
            assert best <= np.linalg.norm(M - rival, order) + rounding(W), (name, order)


@given(matrices(), st.data())
def test_the_factors_have_rank_at_most_r_and_the_shapes_of_the_convention(W, data):
    r = rank_of(data, W)
    B, A = truncated_svd(W, r)
    assert B.shape == (W.shape[0], r) and A.shape == (r, W.shape[1])
    assert B.dtype == A.dtype == W.dtype
    product = B.double().numpy() @ A.double().numpy()
    assert np.linalg.matrix_rank(product, tol=rounding(W)) == min(r, np.linalg.matrix_rank(W.numpy(), tol=rounding(W)))


@given(matrices(), st.data())
def test_singular_values_are_split_evenly(W, data):
    r = rank_of(data, W)
    B, A = (factor.double().numpy() for factor in truncated_svd(W, r))
    np.testing.assert_allclose(B.T @ B, np.diag(exact(W)[:r]), rtol=0, atol=rounding(W))
    np.testing.assert_allclose(A @ A.T, np.diag(exact(W)[:r]), rtol=0, atol=rounding(W))


@given(matrices(dtypes=(F64,)), st.data())
def test_balanced_factors_reach_twice_the_nuclear_norm_and_no_others_less(W, data):
    r, seed = rank_of(data, W), data.draw(st.integers(0, 99), label="seed")
    B, A = (factor.numpy() for factor in truncated_svd(W, r))
    nuclear = np.linalg.norm(B @ A, "nuc")
    assert (B**2).sum() + (A**2).sum() == pytest.approx(2 * nuclear, rel=1e-12)
    M = np.random.default_rng(seed).normal(size=(r, r)) + 3 * np.eye(r)
    B2, A2 = B @ M, np.linalg.solve(M, A)
    assert (B2**2).sum() + (A2**2).sum() >= 2 * np.linalg.norm(B2 @ A2, "nuc") * (1 - 1e-9)


def test_balanced_factors_multiply_back_to_the_product_of_the_three():
    U, S, Vh = orthonormal(6, 3, 0), torch.tensor([4.0, 1.0, 0.0], dtype=F64), orthonormal(5, 3, 1).mT
    B, A = balanced_factors(U, S, Vh)
    torch.testing.assert_close(B @ A, U @ torch.diag(S) @ Vh)
    assert B.norm(dim=0).tolist() == pytest.approx([2, 1, 0]) == A.norm(dim=1).tolist()


@given(matrices(), st.data())
def test_truncating_twice_changes_nothing_and_full_rank_returns_the_matrix(W, data):
    r = rank_of(data, W)
    B, A = truncated_svd(W, r)
    assert abs(residual(B @ A, *truncated_svd(B @ A, r))).max() <= 2 * rounding(W)
    assert abs(residual(W, *truncated_svd(W, min(W.shape)))).max() <= rounding(W)


@given(matrices(), st.data())
def test_no_function_writes_into_its_matrix(W, data):
    r, before = rank_of(data, W), W.clone()
    truncated_svd(W, r), truncation_error(W), energy(W), effective_rank(W), randomized_svd(W, r, generator=generator(0))
    assert torch.equal(W, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_narrow_matrices_are_decomposed_in_float32_and_answered_in_their_own_dtype(dtype):
    W = torch.randn(9, 6, generator=generator(3)).to(dtype)
    S, eps = exact(W.float()), torch.finfo(dtype).eps
    B, A = truncated_svd(W, 4)
    U, Sr, Vh = randomized_svd(W, 4, generator=generator(0))
    errors = truncation_error(W)
    assert {x.dtype for x in (B, A, U, Sr, Vh, errors, singular_values(W))} == {dtype}
    tail = math.sqrt((S[4:] ** 2).sum())
    for left, right in ((B, A), (U.float() * Sr.float(), Vh)):
        assert np.linalg.norm(residual(W, left, right)) == pytest.approx(tail, abs=2 * eps * np.linalg.norm(S))
    assert errors[4].item() == pytest.approx(tail, rel=eps)
    assert energy(W).numpy() == pytest.approx(np.cumsum(S**2) / (S**2).sum(), rel=1e-5)  # not rounded to 16 bits


@pytest.mark.parametrize(
    "scale, dtype", [(1e-30, F64), (1e30, F64), (1e-20, F32), (1e-25, F32), (1e18, F32), (1e25, F32)]
)
def test_truncation_error_scales_with_the_matrix_where_squares_would_overflow_or_vanish(scale, dtype):
    W = torch.randn(7, 5, generator=generator(1), dtype=F64).to(dtype)
    for norm in ("fro", "spectral"):
        expected = truncation_error(W.double(), norm) * scale
        torch.testing.assert_close(truncation_error(W * scale, norm).double(), expected, rtol=1e-5, atol=1e-6 * scale)


def test_truncation_of_the_zero_matrix_is_zero():
    W = torch.zeros(4, 3)
    assert [x.abs().max().item() for x in truncated_svd(W, 2)] == [0, 0]
    assert truncation_error(W).tolist() == [0, 0, 0, 0]


def test_half_precision_whose_norm_overflows_keeps_its_energy_and_ranks():
    W = torch.full((4, 3), 6e4, dtype=torch.float16)  # ‖W‖ is 2e5, the largest float16 is 65504
    assert energy(W).tolist() == pytest.approx([1, 1, 1])
    assert (stable_rank(W), effective_rank(W), rank_at_energy(W)) == pytest.approx((1, 1, 1), rel=1e-5)


# energy and the ranks it gives


@given(matrices())
def test_energy_rises_to_one_and_is_what_truncation_keeps(W):
    E, n = energy(W), min(W.shape)
    assert E.shape == (n,) and E[-1] == 1 and (E.diff() >= 0).all() and E[0] >= 1 / n - 1e-6
    S = exact(W)
    np.testing.assert_allclose(E.double().numpy(), np.cumsum(S**2) / (S**2).sum(), atol=rounding(W) / S[0])
    for r in range(1, n + 1):
        kept = np.linalg.norm((lambda B, A: (B.double() @ A.double()).numpy())(*truncated_svd(W, r)))
        assert E[r - 1].item() == pytest.approx(kept**2 / np.linalg.norm(S) ** 2, abs=4 * rounding(W) / S[0])


def test_energy_of_a_diagonal_matrix_by_hand():
    W = torch.zeros(3, 5, dtype=F64)
    W[0, 4], W[1, 0], W[2, 2] = -2.0, 3.0, 1.0
    assert energy(W).tolist() == pytest.approx([9 / 14, 13 / 14, 1])
    assert stable_rank(W) == pytest.approx(14 / 9)
    assert effective_rank(W) == pytest.approx(2 ** (1 / 2) * 3 ** (1 / 3) * 6 ** (1 / 6))  # Π p^(−p), p = ½, ⅓, ⅙


@given(matrices(dtypes=(F64,)), st.sampled_from([1e-30, 1e30, -1.0, 1e-150, 1e150]))
def test_spectral_shares_do_not_see_the_scale_in_float64(W, scale):
    torch.testing.assert_close(energy(scale * W), energy(W), rtol=1e-12, atol=1e-12)
    assert stable_rank(scale * W) == pytest.approx(stable_rank(W), rel=1e-12)
    assert effective_rank(scale * W) == pytest.approx(effective_rank(W), rel=1e-10)


@given(matrices(dtypes=(F32,)), st.sampled_from([1e-20, 1e-25, 1e18, 1e25]))
def test_spectral_shares_do_not_see_the_scale_in_float32(W, scale):
    torch.testing.assert_close(energy(scale * W), energy(W), rtol=1e-5, atol=1e-5)
    assert stable_rank(scale * W) == pytest.approx(stable_rank(W), rel=1e-5)
    assert effective_rank(scale * W) == pytest.approx(effective_rank(W), rel=1e-4)


@given(matrices(dtypes=(F64,)), st.integers(0, 99))
def test_spectral_shares_do_not_see_orthogonal_transformations_or_transposition(W, seed):
    d, k = W.shape
    turned = orthonormal(d, d, seed) @ W @ orthonormal(k, k, seed + 1)
    for other in (turned, W.mT):
        torch.testing.assert_close(energy(other), energy(W), rtol=1e-11, atol=1e-11)
        assert stable_rank(other) == pytest.approx(stable_rank(W), rel=1e-11)
        assert effective_rank(other) == pytest.approx(effective_rank(W), rel=1e-10)


@given(matrices(dtypes=(F64,)))
def test_the_chain_of_ranks(W):
    """1 ≤ Σσ²/σ₁² ≤ Σσ/σ₁ ≤ e^H ≤ rank: σ_i/σ₁ ≤ 1, then Rényi entropies fall with their order (∞, 1, 0)."""
    S, M = exact(W), W.numpy()
    middle = S.sum() / S[0]
    stable, effective, slack = stable_rank(W), effective_rank(W), 1 + 1e-10
    assert 1 <= stable <= middle * slack and middle <= effective * slack
    assert effective <= np.linalg.matrix_rank(M, tol=rounding(W)) * (1 + 1e-9)
    assert stable == pytest.approx(np.linalg.norm(M, "fro") ** 2 / np.linalg.norm(M, 2) ** 2, rel=1e-11)
    p = S[S > 0] / S.sum()
    assert math.log(effective) == pytest.approx(-(p * np.log(p)).sum(), abs=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_equal_singular_values_make_all_ranks_equal(rank):
    W = with_spectrum(8, 5, (torch.arange(5) < rank).to(F64))
    assert stable_rank(W) == pytest.approx(rank) == effective_rank(W)
    assert rank_at_energy(W, 1 - 1e-9) == rank


@given(matrices(dtypes=(F64,)), st.floats(0.01, 1.0))
def test_rank_at_energy_is_enough_and_one_less_is_not(W, fraction):
    S, r = exact(W), rank_at_energy(W, fraction)
    E = np.cumsum(S**2) / (S**2).sum()
    assert E[r - 1] >= fraction - 1e-12
    assert r == 1 or E[r - 2] < fraction + 1e-12


@pytest.mark.parametrize("fraction, r", [(1e-9, 1), (0.6399, 1), (0.6401, 2), (0.9899, 2), (0.9901, 3), (1, 3)])
def test_rank_at_energy_of_shares_64_35_1_percent_and_a_zero(fraction, r):
    W = torch.zeros(4, 6, dtype=F64)
    W[0, 1], W[2, 0], W[3, 5] = 8.0, 35**0.5, 1.0
    assert rank_at_energy(W, fraction) == r
    assert rank_at_energy(W) == 2  # 90 % by default


@given(st.tuples(st.integers(1, 60), st.integers(1, 60)).filter(lambda shape: shape[0] != shape[1]))
def test_below_the_break_even_rank_the_factors_are_smaller(shape):
    d, k = shape
    for r in range(1, max(d, k) + 1):
        B, A = torch.empty(d, r, device="meta"), torch.empty(r, k, device="meta")
        assert (B.numel() + A.numel() < torch.empty(d, k, device="meta").numel()) == (r < break_even_rank(d, k))


def test_break_even_rank_by_hand():
    assert break_even_rank(3, 6) == 2
    assert break_even_rank(4096, 11008) == pytest.approx(2985.2, abs=0.1)


# the randomised SVD


@given(matrices(), st.integers(0, 12), st.integers(0, 2), st.data())
def test_randomized_svd_returns_orthonormal_factors_and_falling_values(W, p, q, data):
    r = rank_of(data, W)
    U, S, Vh = randomized_svd(W, r, p, q, generator(data.draw(st.integers(0, 99), label="seed")))
    assert U.shape == (W.shape[0], r) and S.shape == (r,) and Vh.shape == (r, W.shape[1])
    assert U.dtype == S.dtype == Vh.dtype == W.dtype
    tolerance = 4 * sum(W.shape) * torch.finfo(W.dtype).eps
    for frame in (U, Vh.mT):
        torch.testing.assert_close(frame.mT @ frame, torch.eye(r, dtype=W.dtype), rtol=0, atol=tolerance)
    assert (S.diff() <= 0).all() and (S >= 0).all()
    assert (S.double().numpy() <= exact(W)[:r] + rounding(W)).all()  # a projection shortens


@given(matrices(), st.integers(0, 2), st.data())
def test_randomized_svd_is_exact_once_it_has_as_many_columns_as_the_rank(W, q, data):
    r = rank_of(data, W)
    rank = np.linalg.matrix_rank(W.double().numpy(), tol=rounding(W))
    U, S, Vh = randomized_svd(W, r, max(0, rank - r) + 3, q, generator(0))
    R, oracle = residual(W, U * S, Vh), exact(W)
    slack = 20 * rounding(W)  # the sketch is Gaussian, not orthonormal
    assert np.linalg.norm(R) == pytest.approx(np.sqrt((oracle[r:] ** 2).sum()), abs=slack)
    np.testing.assert_allclose(S.double().numpy(), oracle[:r], rtol=0, atol=slack)


@pytest.mark.parametrize("dtype, digits", [(F64, 1e-13), (F32, 1e-5)])
def test_randomized_svd_finds_the_leading_subspaces_of_a_decaying_spectrum(dtype, digits):
    W = with_spectrum(50, 30, 3.0 ** -torch.arange(30, dtype=F64)).to(dtype)
    U, S, Vh = randomized_svd(W, 4, generator=generator(0))
    exact_U, exact_S, exact_Vh = np.linalg.svd(W.double().numpy())
    np.testing.assert_allclose(S.double().numpy(), exact_S[:4], rtol=digits)
    for ours, theirs in ((U, exact_U[:, :4]), (Vh.mT, exact_Vh[:4].T)):  # projections: blind to signs
        P = ours.double().numpy() @ ours.double().numpy().T
        np.testing.assert_allclose(P, theirs @ theirs.T, atol=300 * digits)


def test_the_same_generator_gives_the_same_answer_and_another_seed_another(rng_untouched):
    W = with_spectrum(30, 20, SPECTRA["slow"](20))
    first, again, other = (randomized_svd(W, 3, 2, 0, generator(seed)) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.allclose(first[1], other[1], rtol=1e-6)


def test_without_a_generator_the_global_one_decides():
    W = with_spectrum(30, 20, SPECTRA["slow"](20))
    with torch.random.fork_rng():
        answers = []
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            answers.append(randomized_svd(W, 3, 2, 0)[1])
    assert torch.equal(answers[0], answers[1]) and not torch.allclose(answers[0], answers[2], rtol=1e-6)


@pytest.mark.parametrize("d, k", [(60, 40), (40, 60)])
@pytest.mark.parametrize("spectrum", ["decaying", "slow", "flat"])
@pytest.mark.parametrize("r, p", [(3, 2), (5, 5), (10, 10)])
def test_the_mean_error_keeps_the_halko_bound(d, k, spectrum, r, p):
    W = with_spectrum(d, k, SPECTRA[spectrum](min(d, k)))
    S = singular_values(W)
    basis, cut = [], []
    for seed in range(20):
        Q, _, _ = randomized_svd(W, r + p, 0, 0, generator(seed))  # r + p columns, none cut: their span is Q's
        basis.append(np.linalg.norm((W - Q @ (Q.mT @ W)).numpy(), 2))
        U, s, Vh = randomized_svd(W, r, p, 0, generator(seed))
        cut.append(np.linalg.norm(residual(W, U * s, Vh), 2))
    bound = randomized_svd_bound(S, r, p)
    assert S[r + p].item() - 1e-12 <= np.mean(basis) <= bound
    assert S[r].item() - 1e-12 <= np.mean(cut) <= bound + S[r].item()


def test_the_halko_bound_by_hand():
    S = torch.tensor([5.0, 4.0, 3.0])
    assert randomized_svd_bound(S, 1, 2) == pytest.approx(2 * 4 + math.e * math.sqrt(3) / 2 * 5)
    assert randomized_svd_bound(S, 2, 5) == pytest.approx((1 + math.sqrt(0.5)) * 3 + math.e * math.sqrt(7) / 5 * 3)
    assert randomized_svd_bound(S, 3, 2) == 0


@pytest.mark.parametrize("dtype", [F32, F64])
def test_oversampling_and_power_iterations_help_on_a_nearly_flat_spectrum(dtype):
    W = with_spectrum(60, 45, torch.arange(1, 46, dtype=F64) ** -0.3).to(dtype)

    def error(p, q):
        parts = (randomized_svd(W, 5, p, q, generator(seed)) for seed in range(10))
        return np.mean([np.linalg.norm(residual(W, U * S, Vh)) for U, S, Vh in parts])

    best = truncation_error(W)[5].item()
    assert error(5, 0) > error(5, 1) > error(5, 2) > error(5, 6) > best
    assert error(0, 0) > error(5, 0) > error(20, 0) > best
    assert error(5, 6) < 1.01 * best


def test_small_singular_values_survive_many_power_iterations():
    S = 10.0 ** -torch.arange(10, dtype=F64)  # without orthonormalising between products, 1e-9 would be (1e-9)^7
    _, found, _ = randomized_svd(with_spectrum(40, 25, S), 10, 2, 3, generator(0))
    torch.testing.assert_close(found, S, rtol=1e-5, atol=0)


# bad input

OF_A_MATRIX = {
    "singular_values": singular_values,
    "truncated_svd": lambda W: truncated_svd(W, 1),
    "truncation_error": truncation_error,
    "energy": energy,
    "rank_at_energy": rank_at_energy,
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
    "randomized_svd": lambda W: randomized_svd(W, 1),
    "balanced_factors U": lambda W: balanced_factors(W, torch.ones(1), torch.ones(1, 3)),
    "balanced_factors Vh": lambda W: balanced_factors(torch.ones(4, 1), torch.ones(1), W),
}
GOOD = torch.arange(15.0).reshape(5, 3)
BAD_MATRICES = {
    "list": ([[1.0, 2.0]], ["got list", "torch.as_tensor"]),
    "array": (np.ones((4, 3)), ["got ndarray", "torch.as_tensor"]),
    "none": (None, ["got NoneType", "torch.as_tensor"]),
    "integers": (torch.ones(4, 3, dtype=torch.int64), ["torch.int64", ".double()"]),
    "booleans": (torch.ones(4, 3, dtype=torch.bool), ["torch.bool", ".double()"]),
    "complex": (torch.ones(4, 3, dtype=torch.complex64), ["torch.complex64", ".real"]),
    "sparse": (torch.ones(4, 3).to_sparse(), ["torch.sparse_coo", ".to_dense()"]),
    "meta": (torch.ones(4, 3, device="meta"), ["meta device", "load its values"]),
    "empty": (torch.ones(0, 3), ["(0, 3)", "at least 1"]),
    "vector": (torch.ones(4), ["(4,)", "reshape(d, k)"]),
    "scalar": (torch.ones(()), ["()", "reshape(d, k)"]),
    "batch": (torch.ones(2, 4, 3), ["(2, 4, 3)", "flatten(1)"]),
    "nan": (torch.full((4, 3), float("nan")), ["12 NaN", "nan_to_num"]),
    "inf": (torch.tensor([[1.0, 2.0], [3.0, -math.inf], [5.0, 6.0]]), ["1 NaN or inf", "nan_to_num"]),
}


@pytest.mark.parametrize("kind", BAD_MATRICES)
@pytest.mark.parametrize("function", OF_A_MATRIX)
def test_what_is_no_finite_real_matrix_is_refused(function, kind, refused, rng_untouched):
    bad, says = BAD_MATRICES[kind]
    refused(lambda: OF_A_MATRIX[function](bad), *says)


OUT_OF_RANGE = [0, -1, 4, 10**9]
NO_INTEGERS = [True, False, 2.0, math.nan, math.inf, "2", None, [1], 1j]


@pytest.mark.parametrize("r", OUT_OF_RANGE + NO_INTEGERS, ids=repr)
@pytest.mark.parametrize("function", [truncated_svd, randomized_svd])
def test_a_rank_outside_1_to_min_d_k_is_refused(function, r, refused, rng_untouched):
    refused(lambda: function(GOOD, r), repr(r), "between 1 and 3", "5×3")


@pytest.mark.parametrize("value", [-1, *NO_INTEGERS], ids=repr)
@pytest.mark.parametrize("name", ["oversampling", "power_iterations"])
def test_bad_counts_in_randomized_svd_are_refused(name, value, refused, rng_untouched):
    refused(lambda: randomized_svd(GOOD, 2, **{name: value}), name, repr(value), "at least 0")


def test_a_seed_is_no_generator(refused, rng_untouched):
    refused(lambda: randomized_svd(GOOD, 2, generator=3), "got 3 of type int", "torch.Generator().manual_seed")


@pytest.mark.parametrize("norm", ["nuc", 2, None, ["fro"]], ids=repr)
def test_an_unknown_norm_is_refused(norm, refused):
    refused(lambda: truncation_error(GOOD, norm), repr(norm), "'fro' or 'spectral'")


@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.1, 90, math.nan, math.inf], ids=repr)
def test_a_fraction_outside_0_to_1_is_refused(fraction, refused):
    refused(lambda: rank_at_energy(GOOD, fraction), f"fraction = {fraction!r}", "0 < fraction <= 1")


@pytest.mark.parametrize("fraction", [True, "0.9", None, [0.9]], ids=repr)
def test_a_fraction_that_is_not_a_number_is_refused(fraction, refused):
    says = f"fraction must be a number, got {fraction!r}"
    refused(lambda: rank_at_energy(GOOD, fraction), says, "0 < fraction <= 1")


def test_numpy_and_torch_integers_and_numpy_fractions_are_numbers():
    assert truncated_svd(GOOD, np.int64(2))[0].shape == truncated_svd(GOOD, torch.tensor(2))[0].shape == (5, 2)
    assert rank_at_energy(GOOD, np.float32(0.9)) == rank_at_energy(GOOD, 0.9)


@pytest.mark.parametrize("function", [energy, rank_at_energy, stable_rank, effective_rank])
def test_the_zero_matrix_has_no_energy(function, refused):
    refused(lambda: function(torch.zeros(4, 3)), "zero matrix", "non-zero entry")


@pytest.mark.parametrize(
    "d, k, bad", [(0, 3, "d = 0"), (4, -2, "k = -2"), (2.5, 3, "2.5"), (4, True, "True"), ("4", 3, "'4'")]
)
def test_break_even_rank_requires_positive_integers(d, k, bad, refused):
    refused(lambda: break_even_rank(d, k), bad, "at least 1")


VECTOR = torch.tensor([5.0, 4.0, 3.0])


@pytest.mark.parametrize(
    "S, r, p, says",
    [
        ([5.0, 4.0], 1, 2, ["got list", "torch.as_tensor"]),
        (torch.ones(2, 3), 1, 2, ["(2, 3)", "singular_values(W)"]),
        (torch.ones(0), 1, 2, ["(0,)", "at least 1"]),
        (torch.tensor([1, 2]), 1, 2, ["torch.int64", ".double()"]),
        (VECTOR * math.nan, 1, 2, ["3 NaN", "nan_to_num"]),
        (torch.tensor([4.0, 5.0]), 1, 2, ["[4.0, 5.0]", "singular_values(W)"]),
        (torch.tensor([4.0, -5.0]), 1, 2, ["[4.0, -5.0]", "non-negative"]),
        (VECTOR, 0, 2, ["r = 0", "between 1 and 3"]),
        (VECTOR, 4, 2, ["r = 4", "between 1 and 3"]),
        (VECTOR, 1.0, 2, ["1.0", "between 1 and 3"]),
        (VECTOR, 1, 1, ["oversampling = 1", "at least 2", "oversampling − 1"]),
        (VECTOR, 1, True, ["True", "at least 2"]),
        (VECTOR, 1, math.nan, ["nan", "at least 2"]),
    ],
)
def test_the_bound_refuses_what_it_does_not_hold_for(S, r, p, says, refused):
    refused(lambda: randomized_svd_bound(S, r, p), *says)


@pytest.mark.parametrize(
    "S, says",
    [
        (torch.ones(3), ["(5, 2)", "(3,)", "(2, 4)", "(d, r), (r,) and (r, k)"]),
        (torch.ones(2, 2), ["(2, 2)", "(d, r), (r,) and (r, k)"]),
        (torch.tensor([1.0, -2.0]), ["-2", "S.abs()"]),
        (torch.tensor([1.0, math.nan]), ["1 NaN", "nan_to_num"]),
        (torch.tensor([2, 1]), ["torch.int64", ".double()"]),
        ([2.0, 1.0], ["got list", "torch.as_tensor"]),
        (torch.ones(2, device="meta"), ["meta device", "load its values"]),
    ],
)
def test_balanced_factors_refuse_values_that_are_none(S, says, refused):
    refused(lambda: balanced_factors(torch.ones(5, 2), S, torch.ones(2, 4)), *says)


def test_balanced_factors_refuse_shapes_that_do_not_chain(refused):
    refused(lambda: balanced_factors(torch.ones(5, 2), torch.ones(2), torch.ones(3, 4)), "(3, 4)", "(r,) and (r, k)")
