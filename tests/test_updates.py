"""updates.py: similarity, amplification and intruders by hand, against principal angles, and each null by drawing."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_ref.svd import truncated_svd
from lora_ref.updates import (
    amplification,
    amplification_null,
    intruders,
    similarity_null,
    subspace_similarity,
    update_of,
)

F32, F64 = torch.float32, torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(d, k, seed, dtype=F64):
    return torch.randn(d, k, generator=generator(seed), dtype=F64).to(dtype)


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(gaussian(rows, columns, seed)).Q


def with_spectrum(d, k, S, seed=0):
    """A d×k matrix with these singular values."""
    S = torch.as_tensor(S, dtype=F64)
    return orthonormal(d, len(S), seed) * S @ orthonormal(k, len(S), seed + 1).T


def near(values, expected):
    """Whether the mean of the draws is the expected one, within five standard errors of the draws themselves."""
    values = torch.as_tensor(values, dtype=F64)
    return abs(values.mean() - expected) < 5 * values.std() / len(values) ** 0.5


@st.composite
def frames(draw):
    """Two orthonormal frames of one R^n, of p and q columns, and how many of each to use."""
    n = draw(st.integers(2, 12))
    p, q = draw(st.integers(1, n)), draw(st.integers(1, n))
    seed = draw(st.integers(0, 2**16))
    return orthonormal(n, p, seed), orthonormal(n, q, seed + 1), draw(st.integers(1, p)), draw(st.integers(1, q))


@st.composite
def pairs(draw):
    """A weight, an update of it and a rank that the update has; d ≠ k."""
    d = draw(st.integers(2, 10))
    k = draw(st.integers(2, 10).filter(lambda k: k != d))
    seed, rank = draw(st.integers(0, 2**16)), draw(st.integers(1, min(d, k)))
    dW = gaussian(d, rank, seed) @ gaussian(rank, k, seed + 1)
    S = torch.linalg.svdvals(dW)
    assume(S[rank - 1] > 1e-3 * S[0])
    return gaussian(d, k, seed + 2), dW, draw(st.integers(1, rank))


def same(one, other):
    return one == pytest.approx(other, rel=1e-9)


# the similarity of subspaces


def test_similarity_of_unit_vectors_by_hand():
    E = torch.eye(7, dtype=F64)
    assert subspace_similarity(E[:, :3], E[:, 3:], 3, 4) == 0
    assert subspace_similarity(E, E, 3, 3) == 1
    assert subspace_similarity(E, E, 2, 5) == subspace_similarity(E, E, 5, 2) == 1  # one contains the other
    assert subspace_similarity(E[:, [0, 1, 2]], E[:, [2, 3, 0]], 3, 3) == pytest.approx(2 / 3)
    assert subspace_similarity(E[:, [0, 1, 2]], E[:, [2, 3, 0]], 2, 3) == pytest.approx(1 / 2)
    assert subspace_similarity(E[:, [0, 1, 2]], E[:, [2, 3, 0]], 1, 1) == 0


@pytest.mark.parametrize("degrees", [0, 30, 60, 90])
def test_similarity_of_two_lines_is_the_squared_cosine_of_their_angle(degrees):
    angle = math.radians(degrees)
    u, v = torch.tensor([[1.0], [0], [0]]), torch.tensor([[math.cos(angle)], [0], [-math.sin(angle)]])
    assert subspace_similarity(u, v, 1, 1) == pytest.approx(math.cos(angle) ** 2, abs=1e-6)


@given(frames())
def test_similarity_is_the_mean_squared_cosine_of_the_principal_angles(frames):
    U, V, i, j = frames
    angles = scipy.linalg.subspace_angles(U[:, :i].numpy(), V[:, :j].numpy())
    assert subspace_similarity(U, V, i, j) == pytest.approx((np.cos(angles) ** 2).mean(), abs=1e-10)


@given(frames())
def test_similarity_is_between_0_and_1_and_symmetric(frames):
    U, V, i, j = frames
    found = subspace_similarity(U, V, i, j)
    assert -1e-12 <= found <= 1 + 1e-12
    assert found == pytest.approx(subspace_similarity(V, U, j, i), abs=1e-12)
    assert subspace_similarity(U, U, i, U.shape[1]) == pytest.approx(1)


@given(frames(), st.integers(0, 99))
def test_similarity_sees_subspaces_and_neither_their_bases_nor_the_axes(frames, seed):
    U, V, i, j = frames
    found, n = subspace_similarity(U, V, i, j), len(U)
    turned_U, turned_V = U[:, :i] @ orthonormal(i, i, seed), V[:, :j] @ orthonormal(j, j, seed + 1)
    assert subspace_similarity(turned_U, turned_V, i, j) == pytest.approx(found, abs=1e-10)
    R = orthonormal(n, n, seed + 2)
    assert subspace_similarity(R @ U, R @ V, i, j) == pytest.approx(found, abs=1e-10)


@given(frames())
def test_similarity_leaves_the_complement_what_it_does_not_take(frames):
    """‖U_iᵀV‖² + ‖U_iᵀV⊥‖² = i: the squared cosines to a whole basis add up."""
    U, V, i, j = frames
    n = len(U)
    assume(j < n)
    rest = torch.linalg.qr(torch.cat([V[:, :j], gaussian(n, n - j, 5)], 1)).Q[:, j:]
    inside = subspace_similarity(U, V, i, j) * min(i, j)
    assert inside + subspace_similarity(U, rest, i, n - j) * min(i, n - j) == pytest.approx(i, abs=1e-9)


@pytest.mark.parametrize("n, i, j", [(12, 8, 8), (12, 2, 5), (9, 7, 3), (5, 5, 2), (6, 1, 1)])
def test_random_subspaces_are_as_similar_as_the_null_says(n, i, j):
    found = [subspace_similarity(orthonormal(n, i, s), orthonormal(n, j, s + 1), i, j) for s in range(0, 600, 2)]
    expected = similarity_null(n, i, j)
    assert expected == max(i, j) / n
    assert near(found, expected) or found == pytest.approx([1] * 300)  # a whole space contains any subspace


def test_the_null_holds_for_one_fixed_and_one_random_subspace_too():
    fixed = torch.eye(12, dtype=F64)[:, :4]
    assert near(
        [subspace_similarity(fixed, orthonormal(12, 6, s), 4, 6) for s in range(300)], similarity_null(12, 4, 6)
    )


# amplification


def test_amplification_of_diagonal_matrices_by_hand():
    W, dW = torch.zeros(4, 6, dtype=F64), torch.zeros(4, 6, dtype=F64)
    W[0, 0], W[1, 1], W[2, 2], W[3, 5] = 10.0, 2.0, 1.0, 7.0
    dW[1, 1], dW[2, 2] = 6.0, -3.0
    assert amplification(W, dW, 1) == pytest.approx(6 / 2)
    assert amplification(W, dW, 2) == pytest.approx(math.sqrt((36 + 9) / (4 + 1)))
    assert amplification_null(W, dW, 1) == pytest.approx(6 * math.sqrt(24) / math.sqrt(154))
    assert amplification_null(W, dW, 2) == pytest.approx(math.sqrt(45) * math.sqrt(24) / (2 * math.sqrt(154)))


def test_amplification_needs_both_the_input_and_the_output_direction():
    W, dW = torch.zeros(4, 6, dtype=F64), torch.zeros(4, 6, dtype=F64)
    W[0, 0], W[1, 3], W[2, 0] = 10.0, 2.0, 5.0
    dW[1, 0] = 6.0  # W writes to output 1, from input 3; and reads input 0, for outputs 0 and 2
    assert amplification(W, dW, 1) == math.inf
    W[1, 0] = 0.5
    assert amplification(W, dW, 1) == pytest.approx(12)


@given(pairs())
def test_amplification_by_numpy(pair):
    W, dW, r = pair
    U, S, Vh = np.linalg.svd(dW.numpy())
    expected = np.sqrt((S[:r] ** 2).sum()) / np.linalg.norm(U[:, :r].T @ W.numpy() @ Vh[:r].T)
    assert amplification(W, dW, r) == pytest.approx(expected, rel=1e-7)
    B, A = truncated_svd(dW, r)
    d, k = W.shape
    null = np.linalg.norm((B @ A).numpy()) * math.sqrt(d * k) / (r * np.linalg.norm(W.numpy()))
    assert amplification_null(W, dW, r) == pytest.approx(null, rel=1e-9)


@given(pairs(), st.sampled_from([1e-6, -0.5, 3.0, 1e6]))
def test_amplification_grows_with_the_update_falls_with_the_weight_and_sees_no_rotation(pair, c):
    W, dW, r = pair
    R, Q = orthonormal(len(W), len(W), 3), orthonormal(W.shape[1], W.shape[1], 4)
    for measure in (amplification, amplification_null):
        found = measure(W, dW, r)
        assert same(measure(W, c * dW, r), abs(c) * found)
        assert same(measure(c * W, dW, r), found / abs(c))
        assert measure(R @ W @ Q, R @ dW @ Q, r) == pytest.approx(found, rel=1e-6)
        assert measure(W.T, dW.T, r) == pytest.approx(found, rel=1e-6)


@given(pairs())
def test_an_update_along_W_itself_amplifies_by_its_factor_and_no_more_than_the_null(pair):
    """W is strongest in its own directions: ‖U_rᵀWV_r‖² = Σ_{i≤r} σ_i² ≥ r‖W‖²/min(d, k) ≥ r²‖W‖²/(dk)."""
    W, _, r = pair
    assert amplification(W, 3 * W, r) == pytest.approx(3)
    assert amplification_null(W, 3 * W, r) >= 3 * (1 - 1e-9)


def test_random_directions_amplify_as_the_null_says():
    W = with_spectrum(9, 14, 2.0 ** -torch.arange(9), seed=50)
    for r in (1, 3):
        S = torch.tensor([4.0, 2.0, 1.0])[:r]
        draws = [with_spectrum(9, 14, S, seed) for seed in range(0, 1000, 2)]
        squares = [amplification(W, dW, r) ** -2 for dW in draws]  # ‖U_rᵀWV_r‖² / ‖ΔW_r‖²
        assert near(squares, amplification_null(W, draws[0], r) ** -2), r
        # the statement itself: E‖U_rᵀWV_r‖² = r²‖W‖²/(dk)
        inside = [s * S.square().sum().item() for s in squares]
        assert near(inside, r**2 * W.square().sum().item() / (9 * 14)), r


@pytest.mark.parametrize("r", [1, 2])
def test_directions_beyond_r_do_not_count(r):
    W, S = gaussian(7, 5, 0), torch.tensor([8.0, 4.0, 1.0])
    other = torch.cat([S[:r], torch.full((3 - r,), 0.5)])  # the same directions, another tail
    one, two = with_spectrum(7, 5, S, 3), with_spectrum(7, 5, other, 3)
    assert same(amplification(W, one, r), amplification(W, two, r))
    assert same(amplification_null(W, one, r), amplification_null(W, two, r))


# intruders


def test_a_spike_along_a_singular_vector_is_none_and_across_all_of_them_is_one():
    W0 = torch.zeros(6, 9, dtype=F64)
    W0[range(4), range(4)] = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=F64)  # of rank 4: rows 4 and 5 are empty
    along, across = torch.zeros_like(W0), torch.zeros_like(W0)
    along[0, 0], across[5, 8] = 10.0, 10.0
    assert intruders(W0, W0 + along, top=4) == 0
    assert intruders(W0, W0 + across, top=1) == intruders(W0, W0 + across, top=5) == 1
    assert intruders(W0, W0 + 0.5 * along + across, top=5) == 1
    across[4, 7] = 5.0
    assert intruders(W0, W0 + across, top=1) == 1 and intruders(W0, W0 + across, top=2) == 2
    assert intruders(W0, W0 + across / 100, top=4) == 0  # too weak to be among the top


@pytest.mark.parametrize("n, new", [(2, 0), (3, 0), (5, 1), (9, 1)])
def test_a_direction_spread_evenly_over_n_of_W0s_has_the_cosine_1_over_root_n(n, new):
    W0 = torch.zeros(12, 10, dtype=F64)
    W0[range(10), range(10)] = torch.arange(10, 0, -1, dtype=F64)
    u = torch.zeros(12, 1, dtype=F64)
    u[:n] = n**-0.5
    W = W0 + 1e9 * u @ orthonormal(10, 1, 0).T  # so strong that W's first left singular vector is u, to 1e-8
    assert intruders(W0, W, top=1) == new  # 1/√n against the threshold of a half
    assert intruders(W0, W, top=1, threshold=1.001 * n**-0.5) == 1
    assert intruders(W0, W, top=1, threshold=0.999 * n**-0.5) == 0


@given(pairs(), st.sampled_from([1.0, 2.0, -0.3, 1e-6, 1e6]))
def test_a_weight_and_its_multiples_have_no_intruders(pair, c):
    W0 = pair[0]
    S = torch.linalg.svdvals(W0)
    assume((S.diff().abs() > 1e-4 * S[0]).all() and S[-1] > 1e-4 * S[0])  # equal values: any basis would do
    for top in range(1, min(W0.shape) + 1):
        assert intruders(W0, c * W0, top, threshold=1 - 1e-6) == 0


@given(pairs(), st.floats(0.01, 1))
def test_intruders_by_numpy_more_of_them_with_more_vectors_and_a_higher_threshold(pair, threshold):
    W0, dW, _ = pair
    W = W0 + dW
    U0, U = (np.linalg.svd(M.numpy(), full_matrices=False)[0] for M in (W0, W))
    assume(np.linalg.matrix_rank(W.numpy(), tol=1e-6) == np.linalg.matrix_rank(W0.numpy(), tol=1e-6) == min(W.shape))
    largest = abs(U0.T @ U).max(0)
    assume((abs(largest - threshold) > 1e-6).all())
    found = [intruders(W0, W, top, threshold) for top in range(1, min(W.shape) + 1)]
    assert found == np.cumsum(largest < threshold).tolist()
    assert all(a <= intruders(W0, W, i + 1, (1 + threshold) / 2) for i, a in enumerate(found))


def test_ten_vectors_and_a_half_by_default():
    W0 = with_spectrum(30, 20, torch.arange(20, 0, -1))
    W = W0 + with_spectrum(30, 20, torch.full((20,), 30.0), seed=7)
    assert intruders(W0, W) == intruders(W0, W, 10, 0.5) > intruders(W0, W, 2)


@pytest.mark.parametrize("d, k", [(192, 200), (48, 60), (192, 24)])
def test_the_largest_cosine_of_a_random_direction_is_about_what_the_docstring_says(d, k):
    """With all m = min(d, k) of W0's left singular vectors: √(2 ln m / d), up to a tenth too high at these sizes."""
    m = min(d, k)
    x = gaussian(d, 800, 0)
    largest = (orthonormal(d, m, 1).T @ (x / x.norm(dim=0))).abs().amax(0).mean().item()
    formula = math.sqrt(2 * math.log(m) / d)
    assert 0.85 * formula < largest < formula
    if d == m == 192:
        assert (round(largest, 2), round(formula, 3)) == (0.22, 0.234)


@pytest.mark.parametrize("d, k", [(120, 200), (200, 120)])
def test_a_spike_on_noise_comes_out_above_the_threshold_and_drowns_below_it(d, k):
    """Benaych-Georges & Nadakuditi 2012, for entries N(0, 1/max(d, k)): threshold c^¼, c = min(d, k)/max(d, k)."""
    c = min(d, k) / max(d, k)
    for theta in (0.3, 0.5, 1.6, 2.0, 3.0):
        left, right, new = [], [], []
        for seed in range(6):
            W0 = gaussian(d, k, seed) / max(d, k) ** 0.5
            u, v = orthonormal(d, 1, seed + 50), orthonormal(k, 1, seed + 70)
            W = W0 + theta * u @ v.T
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            left.append(subspace_similarity(U, u, 1, 1))  # of two lines: the overlap²
            right.append(subspace_similarity(Vh.T, v, 1, 1))
            new.append(intruders(W0, W, top=5))
        short, long = (left, right) if d < k else (right, left)
        if theta < c**0.25:
            assert max(np.mean(left), np.mean(right)) < 0.1 and new == [0] * 6, theta
            continue
        t = theta**2
        assert near(short, 1 - c * (1 + t) / (t * (t + c))), theta  # the singular vector of length min(d, k)
        assert near(long, 1 - (c + t) / (t * (t + 1))), theta
        assert new == [1] * 6, theta


# differences of two state dicts


def test_update_of_is_the_difference_of_every_matrix_that_both_have():
    before = {
        "a": torch.tensor([[1.0, 2.0, 3.0]]),
        "b": torch.ones(2, 3),
        "bias": torch.ones(3),
        "kernel": torch.ones(2, 3, 1, 1),
        "gone": torch.ones(2, 3),
        "grown": torch.ones(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "ids": torch.ones(2, 3, dtype=torch.int64),
    }
    after = {name: 3 * value for name, value in before.items() if name not in ("gone", "mask")}
    after |= {"mask": before["mask"], "grown": torch.ones(3, 3), "new": torch.ones(2, 3)}
    found = update_of(before, after)
    assert list(found) == ["a", "b"]
    assert found["a"].tolist() == [[2, 4, 6]] and found["b"].tolist() == [[2] * 3] * 2
    assert before["a"].tolist() == [[1, 2, 3]]


def test_update_of_a_model_after_a_step():
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model[1].weight.add_(torch.ones(2, 1) @ torch.ones(1, 3))
    found = update_of(before, model.state_dict())
    assert list(found) == ["0.weight", "1.weight"] and not found["0.weight"].any()
    assert torch.allclose(found["1.weight"], torch.ones(2, 3))


@pytest.mark.parametrize("before, after", [({}, {}), ({"a": torch.ones(2, 3)}, {"b": torch.ones(2, 3)})])
def test_update_of_two_models_that_share_nothing_is_refused(before, after, refused):
    refused(lambda: update_of(before, after), *before, *after, "share no matrix", "of one model")


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
def test_narrow_matrices_give_what_their_float64_copies_give(dtype):
    W0, dW = gaussian(12, 9, 0, dtype), 3 * (gaussian(12, 2, 1) @ gaussian(2, 9, 2)).to(dtype)
    W, wide = W0 + dW, W0.double()
    for measure in (amplification, amplification_null):
        assert measure(W0, dW, 2) == pytest.approx(measure(wide, dW.double(), 2), rel=1e-4)
        assert measure(W0, dW.double(), 2) == pytest.approx(measure(wide, dW.double(), 2), rel=1e-4)
    assert intruders(W0, W, 5, 0.8) == intruders(wide, W.double(), 5, 0.8) == intruders(W0, W.double(), 5, 0.8)
    U, V = orthonormal(12, 4, 3).to(dtype), orthonormal(12, 3, 4).to(dtype)
    expected = subspace_similarity(U.double(), V.double(), 4, 3)
    assert subspace_similarity(U, V, 4, 3) == pytest.approx(expected, rel=1e-4)
    assert subspace_similarity(U, V.double(), 4, 3) == pytest.approx(expected, rel=1e-4)


def test_no_function_writes_into_its_matrices():
    W0, dW, U = gaussian(5, 8, 0), gaussian(5, 8, 1), orthonormal(5, 3, 2)
    before = [x.clone() for x in (W0, dW, U)]
    amplification(W0, dW, 2), amplification_null(W0, dW, 2), intruders(W0, W0 + dW, 3), subspace_similarity(U, U, 2, 3)
    assert all(torch.equal(x, y) for x, y in zip((W0, dW, U), before))


# bad input

GOOD = torch.arange(15.0).reshape(5, 3) + torch.eye(5, 3)
FRAME = torch.eye(5, 3)
OF_A_MATRIX = {
    "U": lambda M: subspace_similarity(M, FRAME, 1, 1),
    "V": lambda M: subspace_similarity(FRAME, M, 1, 1),
    "W": lambda M: amplification(M, GOOD, 1),
    "dW": lambda M: amplification(GOOD, M, 1),
    "W of the null": lambda M: amplification_null(M, GOOD, 1),
    "dW of the null": lambda M: amplification_null(GOOD, M, 1),
    "W0": lambda M: intruders(M, GOOD, 1),
    "W of intruders": lambda M: intruders(GOOD, M, 1),
}
BAD_MATRICES = {
    "array": (np.ones((5, 3)), ["got ndarray", "torch.as_tensor"]),
    "none": (None, ["got NoneType", "torch.as_tensor"]),
    "integers": (torch.ones(5, 3, dtype=torch.int64), ["torch.int64", ".double()"]),
    "complex": (torch.ones(5, 3, dtype=torch.complex64), ["torch.complex64", ".real"]),
    "meta": (torch.ones(5, 3, device="meta"), ["meta device", "load its values"]),
    "empty": (torch.ones(0, 3), ["(0, 3)", "at least 1"]),
    "vector": (torch.ones(5), ["(5,)", "reshape(d, k)"]),
    "nan": (torch.full((5, 3), math.nan), ["15 NaN", "nan_to_num"]),
    "inf": (torch.eye(5, 3) / torch.eye(5, 3), ["12 NaN or inf", "nan_to_num"]),
}


@pytest.mark.parametrize("kind", BAD_MATRICES)
@pytest.mark.parametrize("function", OF_A_MATRIX)
def test_what_is_no_finite_real_matrix_is_refused_by_its_name(function, kind, refused):
    bad, says = BAD_MATRICES[kind]
    refused(lambda: OF_A_MATRIX[function](bad), f"{function.split()[0]} ", *says)


@pytest.mark.parametrize("function", [amplification, amplification_null])
def test_amplification_refuses_unequal_shapes_zeros_and_ranks_that_the_update_has_not(function, refused):
    refused(lambda: function(GOOD, GOOD.T, 1), "(5, 3)", "(3, 5)", "its own update")
    refused(lambda: function(GOOD, torch.zeros(5, 3), 1), "dW is the zero matrix", "non-zero entry")
    refused(lambda: function(torch.zeros(5, 3), GOOD, 1), "W is the zero matrix", "before training")
    low = torch.ones(5, 1) @ torch.tensor([[1.0, -2.0, 0.5]])
    assert function(GOOD, low, 1) > 0
    refused(lambda: function(GOOD, low, 2), "r = 2", "between 1 and 1", "5×3 and has rank 1")
    for r in (0, 4, -1, 2.0, True, "2", None, math.nan):
        refused(lambda: function(GOOD, GOOD, r), repr(r), "between 1 and 3", "5×3")


@pytest.mark.parametrize("value", [0, 4, -1, 2.0, True, "2", None], ids=repr)
def test_similarity_refuses_counts_beyond_its_columns(value, refused):
    refused(lambda: subspace_similarity(FRAME, torch.eye(5, 2), value, 1), "i", repr(value), "U has 3 columns")
    refused(lambda: subspace_similarity(torch.eye(5, 2), FRAME, 1, value), "j", repr(value), "V has 3 columns")


def test_similarity_refuses_directions_of_different_spaces_and_what_is_not_orthonormal(refused):
    refused(lambda: subspace_similarity(FRAME, torch.eye(4, 3), 1, 1), "5 rows", "4", "one space")
    refused(lambda: subspace_similarity(2 * FRAME, FRAME, 1, 1), "U's columns", "UᵀU is 3 ", "torch.linalg.qr(U).Q")
    refused(lambda: subspace_similarity(FRAME, GOOD, 2, 2), "V's columns", "VᵀV is", "torch.linalg.qr(V).Q")
    Vh = orthonormal(5, 2, 0).T.float()  # rows instead of columns
    refused(lambda: subspace_similarity(Vh, Vh, 2, 2), "singular vectors as columns")
    half = torch.cat([FRAME[:, :2], 9 * FRAME[:, 2:]], 1)
    assert subspace_similarity(half, FRAME, 2, 2) == 1  # what is not used is not judged


@pytest.mark.parametrize(
    "n, i, j, says",
    [
        (0, 1, 1, ["n = 0", "at least 1"]),
        (4.0, 1, 1, ["n must be an integer", "4.0"]),
        (4, 5, 1, ["i = 5", "between 1 and 4", "n = 4"]),
        (4, 1, 0, ["j = 0", "between 1 and 4", "n = 4"]),
        (4, 1, None, ["j must be an integer", "None"]),
        (4, True, 1, ["i must be an integer", "True"]),
    ],
)
def test_the_null_of_similarity_refuses_what_is_no_subspace(n, i, j, says, refused):
    refused(lambda: similarity_null(n, i, j), *says)


@pytest.mark.parametrize("top", [0, 4, -1, 2.0, True, "2", None], ids=repr)
def test_intruders_refuses_more_vectors_than_there_are(top, refused):
    refused(lambda: intruders(GOOD, GOOD, top), "top", repr(top), "between 1 and 3", "5×3")


def test_intruders_refuses_unequal_shapes_zeros_and_vectors_beyond_the_rank(refused):
    refused(lambda: intruders(GOOD, GOOD.T, 1), "W0 is (5, 3)", "W (3, 5)", "before and after")
    refused(lambda: intruders(torch.zeros(5, 3), GOOD, 1), "W0 is the zero matrix", "non-zero entry")
    refused(lambda: intruders(GOOD, torch.zeros(5, 3), 1), "W is the zero matrix", "non-zero entry")
    low = torch.ones(5, 1) @ torch.tensor([[1.0, -2.0, 0.5]])
    refused(lambda: intruders(GOOD, low, 2), "top = 2", "between 1 and 1", "has rank 1")
    for threshold in (0, -0.1, 1.1, 50, math.nan):
        refused(lambda: intruders(GOOD, GOOD, 1, threshold), f"threshold = {threshold!r}", "0 < threshold <= 1")
    for threshold in (True, "0.5", None):
        says = f"threshold must be a number, got {threshold!r}"
        refused(lambda: intruders(GOOD, GOOD, 1, threshold), says, "0 < threshold <= 1")
