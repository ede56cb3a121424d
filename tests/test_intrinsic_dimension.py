"""intrinsic_dimension.py: the projections as matrices, the subspace against plain flattening, d_int by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lora_ref.intrinsic_dimension import (
    PROJECTIONS,
    DenseProjection,
    FastfoodProjection,
    OrthonormalProjection,
    Projection,
    RandomSubspace,
    hadamard_transform,
    intrinsic_dimension,
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


# the subspace


class Tied(nn.Module):
    """One matrix used twice: to embed 11 tokens in 6 dimensions, and to read them out again."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.mix(self.embed(tokens)).tanh())


class Block(nn.Module):
    """A transformer block called with keywords."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x, *, causal=False, scale=1.0):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if causal else None
        h = self.norm(x)
        x = x + scale * self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.down(self.up(x).relu())


def images(*shape):
    return torch.randn(*shape, generator=generator(5))


MODELS = {  # name → (module, positional, keyword arguments)
    "linear": lambda: (nn.Linear(5, 3), (images(4, 5),), {}),
    "mlp": lambda: (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (images(4, 5),), {}),
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)),
        (images(4, 2, 4, 4),),
        {},
    ),
    "batch norm": lambda: (
        nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)),
        (images(6, 5),),
        {},
    ),
    "transformer": lambda: (Block(), (images(2, 5, 8),), {"causal": True, "scale": 0.5}),
    "tied": lambda: (Tied(), (torch.arange(11).view(1, 11),), {}),
    "bfloat16": lambda: (
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).bfloat16(),
        (images(4, 5).bfloat16(),),
        {},
    ),
    "frozen half": lambda: (
        nn.Sequential(nn.Linear(5, 7).requires_grad_(False), nn.Tanh(), nn.Linear(7, 3)),
        (images(4, 5),),
        {},
    ),
}
each_model = pytest.mark.parametrize("kind", MODELS)


def build(kind, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[kind]()


def moved(subspace, seed=1, length=0.5):
    """The subspace with z away from 0."""
    z = torch.randn(subspace.z.shape, generator=generator(seed), dtype=subspace.z.dtype)
    subspace.z.data = length * z
    return subspace


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@each_model
@each_projection
def test_at_z_0_the_output_is_the_models_bit_for_bit(kind, name):
    model, args, kwargs = build(kind)
    twin = copy.deepcopy(model)
    subspace = RandomSubspace(model, 4, name, generator())
    for mode in (True, False):
        assert torch.equal(subspace.train(mode)(*args, **kwargs), twin.train(mode)(*args, **kwargs))
    for ours, theirs in zip(model.buffers(), twin.buffers()):
        assert torch.equal(ours, theirs)  # batch norm's statistics were collected as ever


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "bfloat16"])
@each_projection
def test_the_subspace_is_theta0_plus_P_z_and_its_gradient_P_transposed_times_the_models(kind, name):
    model, args, kwargs = build(kind)
    model.double().eval()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    twin = copy.deepcopy(model)
    subspace = moved(RandomSubspace(model, 4, name, generator()))
    P = as_matrix(subspace.projection)
    theta = parameters_to_vector(trained(twin)).detach() + P @ subspace.z.detach()
    vector_to_parameters(theta, trained(twin))

    output, expected = subspace(*args, **kwargs), twin(*args, **kwargs)
    torch.testing.assert_close(output, expected)
    (ours,) = torch.autograd.grad(output.square().mean(), subspace.z)
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(expected.square().mean(), trained(twin))])
    torch.testing.assert_close(ours, P.mT @ theirs)


@each_model
@each_projection
def test_z_alone_is_trained(kind, name):
    model, args, kwargs = build(kind)
    subspace = RandomSubspace(model, 4, name, generator())
    assert [n for n, p in subspace.named_parameters() if p.requires_grad] == ["z"]
    assert subspace.z.shape == (4,) and not subspace.z.any()
    subspace(*args, **kwargs).float().square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert torch.isfinite(subspace.z.grad).all() and subspace.z.grad.any()


def test_parameters_frozen_before_stay_out_of_the_subspace():
    model, args, _ = build("frozen half")
    subspace = moved(RandomSubspace(model, 4, generator=generator()))
    assert subspace.projection.D == 7 * 3 + 3
    assert sorted(subspace.theta()) == ["2.bias", "2.weight"]


def test_tied_parameters_count_once_and_stay_tied():
    model, args, _ = build("tied")
    subspace = moved(RandomSubspace(model, 4, generator=generator()))
    assert subspace.projection.D == 11 * 6 + 6 * 6 + 6
    subspace.merge()
    assert model.out.weight is model.embed.weight


def test_a_bfloat16_model_is_moved_by_a_float32_z():
    model, args, _ = build("bfloat16")
    subspace = moved(RandomSubspace(model, 4, generator=generator()))
    assert subspace.z.dtype == F32 and {t.dtype for t in subspace.theta().values()} == {torch.bfloat16}
    assert subspace(*args).dtype == torch.bfloat16
    assert not torch.equal(subspace(*args), model(*args))


@torch.no_grad()  # with gradients, attention takes another path through a frozen module than through the subspace
@each_model
@each_projection
def test_merge_keeps_the_function_and_sets_z_back_to_0(kind, name):
    model, args, kwargs = build(kind)
    subspace = moved(RandomSubspace(model, 4, name, generator())).eval()
    fixed = {n: p.clone() for n, p in model.named_parameters() if n not in subspace.names}
    before, start = subspace(*args, **kwargs), model(*args, **kwargs)
    assert subspace.merge() is model
    assert not subspace.z.any() and subspace.z.requires_grad
    assert torch.equal(model(*args, **kwargs), before) and torch.equal(subspace(*args, **kwargs), before)
    assert not torch.equal(before, start)
    assert trained(model) == []
    assert all(torch.equal(dict(model.named_parameters())[n], value) for n, value in fixed.items())
    subspace.merge()
    assert torch.equal(model(*args, **kwargs), before)


@each_projection
def test_a_state_dict_carries_the_whole_subspace(name):
    model, args, _ = build("batch norm")
    subspace = moved(RandomSubspace(model, 4, name, generator(1))).train()
    subspace(*args)
    other = RandomSubspace(build("batch norm", seed=9)[0], 4, name, generator(2))
    assert not torch.equal(other.eval()(*args), subspace.eval()(*args))
    other.load_state_dict(subspace.state_dict())
    assert torch.equal(other(*args), subspace(*args))


@each_projection
def test_training_lowers_the_loss_and_moves_only_z(name):
    model, _, _ = build("mlp")
    subspace = RandomSubspace(model, 12, name, generator())
    x = torch.randn(64, 5, generator=generator(2))
    y = x[:, :3].sin()
    frozen = {n: t.clone() for n, t in subspace.state_dict().items() if n != "z"}
    optimizer, losses = torch.optim.Adam([subspace.z], lr=0.1), []
    for _ in range(60):
        loss = nn.functional.mse_loss(subspace(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(subspace.state_dict()[n], t) for n, t in frozen.items())


@each_projection
@pytest.mark.parametrize("d, k", [(7, 5), (4, 9)])
def test_one_dimension_changes_a_weight_matrix_at_full_rank(name, d, k):
    layer = nn.Linear(k, d, bias=False).double()
    subspace = moved(RandomSubspace(layer, 1, name, generator()), length=1.0)
    delta = subspace.theta()["weight"].detach() - layer.weight.detach()
    assert np.linalg.matrix_rank(delta.numpy(), tol=1e-6) == min(d, k)


def test_the_whole_space_reaches_every_parameter_vector():
    model, _, _ = build("linear")
    model.double()
    subspace = RandomSubspace(model, 18, "fastfood", generator())
    target = torch.randn(18, generator=generator(3), dtype=F64)
    theta0 = parameters_to_vector(model.parameters()).detach()
    subspace.z.data = torch.linalg.solve(as_matrix(subspace.projection), target - theta0)
    torch.testing.assert_close(torch.cat([t.flatten() for t in subspace.theta().values()]).detach(), target)


def test_the_same_generator_gives_the_same_subspace_and_none_touches_the_global_one(rng_untouched):
    first, again, other = (moved(RandomSubspace(build("mlp")[0], 4, generator=generator(s))) for s in (3, 3, 4))
    x = images(4, 5)
    assert torch.equal(first(x), again(x)) and not torch.allclose(first(x), other(x))


def with_value(value):
    model, _, _ = build("mlp")
    model[2].weight.data[1, 3] = value
    return model


BAD_SUBSPACES = {  # name → (module, arguments, what the error says)
    "d = 0": ("mlp", {"d": 0}, ["d = 0", "between 1 and 66"]),
    "d < 0": ("mlp", {"d": -3}, ["d = -3", "between 1 and 66"]),
    "d > D": ("mlp", {"d": 67}, ["d = 67", "between 1 and 66", "66 parameters"]),
    "d > trained": ("frozen half", {"d": 25}, ["d = 25", "between 1 and 24"]),
    "d bool": ("mlp", {"d": True}, ["True", "between 1 and 66"]),
    "d float": ("mlp", {"d": 2.0}, ["2.0", "between 1 and 66"]),
    "d nan": ("mlp", {"d": math.nan}, ["nan", "between 1 and 66"]),
    "d inf": ("mlp", {"d": math.inf}, ["inf", "between 1 and 66"]),
    "d none": ("mlp", {"d": None}, ["None", "between 1 and 66"]),
    "projection unknown": ("mlp", {"projection": "sparse"}, ["'sparse'", "'dense', 'orthonormal' or 'fastfood'"]),
    "projection none": ("mlp", {"projection": None}, ["None", "'dense', 'orthonormal' or 'fastfood'"]),
    "projection list": ("mlp", {"projection": ["dense"]}, ["['dense']", "'dense', 'orthonormal' or 'fastfood'"]),
    "projection class": (
        "mlp",
        {"projection": DenseProjection},
        ["DenseProjection", "'dense', 'orthonormal' or 'fastfood'"],
    ),
    "generator": ("mlp", {"generator": 3}, ["got 3 of type int", "torch.Generator().manual_seed"]),
    "no parameters": (nn.Tanh, {}, ["Tanh has no trainable", "requires_grad_(True)"]),
    "frozen": (lambda: build("mlp")[0].requires_grad_(False), {}, ["Sequential has no train", "requires_grad_(True)"]),
    "nan": (lambda: with_value(math.nan), {}, ["'2.weight'", "1 NaN or inf", "nan_to_num"]),
    "inf": (lambda: with_value(-math.inf), {}, ["'2.weight'", "1 NaN or inf", "nan_to_num"]),
    "complex": (lambda: nn.Linear(5, 3, dtype=torch.complex64), {}, ["'weight'", "torch.complex64", ".real"]),
    "meta": (lambda: nn.Linear(5, 3, device="meta"), {}, ["'weight'", "meta device", "load its values"]),
    "empty": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 0)), {}, ["'1.weight'", "(0, 2)", "at least 1"]),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Complex modules")
@pytest.mark.parametrize("case", BAD_SUBSPACES)
def test_a_refused_subspace_leaves_the_module_as_it_was(case, refused):
    kind, arguments, says = BAD_SUBSPACES[case]
    model = build(kind)[0] if isinstance(kind, str) else kind()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    g = generator()
    state = g.get_state()
    refused(lambda: RandomSubspace(model, **{"d": 2, "generator": g, **arguments}), *says)
    assert torch.equal(g.get_state(), state)
    for name, parameter in model.named_parameters():
        flag, value = before[name]
        assert parameter.requires_grad == flag
        assert value.is_meta or torch.allclose(parameter, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("thing", [None, [nn.Linear(3, 2)], nn.Linear, math.sin, torch.ones(3)], ids=repr)
def test_what_is_no_module_is_refused(thing, refused):
    refused(lambda: RandomSubspace(thing, 2), repr(thing), "torch.nn.Module")


def test_every_projection_is_in_the_table():
    assert list(PROJECTIONS.values()) == [DenseProjection, OrthonormalProjection, FastfoodProjection]
    assert NAMES == ["dense", "orthonormal", "fastfood"]
    assert all(issubclass(P, Projection) for P in PROJECTIONS.values())


# d_int


@pytest.mark.parametrize(
    "scores, full, fraction, expected",
    [
        ([0.2, 0.4, 0.8], 1.0, 0.6, 100 * 10**0.5),  # half way between 100 and 1000, in log d
        ([0.2, 0.4, 0.8], 1.0, 0.3, 10 * 10**0.5),
        ([0.2, 0.4, 0.8], 0.5, 0.9, 100 * 10 ** (0.05 / 0.4)),
        ([0.2, 0.4, 0.8], 1.0, 0.4, 100),  # reached exactly at a dimension of the grid
        ([0.2, 0.4, 0.8], 0.8, 1.0, 1000),
        ([0.2, 0.4, 0.8], 1.0, 0.2, 10),  # the first dimension suffices
        ([0.9, 0.1, 0.9], 1.0, 0.9, 10),
        ([0.1, 0.9, 0.1], 1.0, 0.5, 10 * 10**0.5),  # the first time counts
        ([-1.0, 0.0, 1.0], 1.0, 0.5, 100 * 10**0.5),  # scores may be negative
        ([0.2, 0.4, 0.8], 1.0, 0.9, math.inf),  # never reached
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.DoubleTensor])
def test_the_intrinsic_dimension_by_hand(scores, full, fraction, expected, kind):
    assert intrinsic_dimension(kind([10, 100, 1000]), kind(scores), full, fraction) == pytest.approx(expected)


def test_the_share_is_90_percent_by_default():
    assert intrinsic_dimension([4, 16], [0.8, 1.0], 1.0) == pytest.approx(8)
    assert intrinsic_dimension([4], [0.9], torch.tensor(1.0, dtype=F64)) == 4


curves = st.lists(st.floats(-1, 1), min_size=1, max_size=8)


@given(curves, st.floats(0.05, 1), st.floats(0.05, 1), st.floats(0.1, 10))
def test_the_intrinsic_dimension_rises_with_the_fraction_and_ignores_the_unit_of_the_score(scores, f, g, unit):
    dims = [3 * 2**i for i in range(len(scores))]
    low, high = (intrinsic_dimension(dims, scores, 0.7, x) for x in sorted((f, g)))
    assert low <= high * (1 + 1e-12)
    assert low == math.inf or dims[0] <= low <= dims[-1] * (1 + 1e-12)
    scaled = intrinsic_dimension(dims, [8 * s for s in scores], 8 * 0.7, min(f, g))
    assert scaled == pytest.approx(low)


@given(curves, st.floats(0.05, 1))
def test_the_dimension_found_lies_in_the_cell_where_the_scores_first_cross(scores, fraction):
    dims = [3 * 2**i for i in range(len(scores))]
    enough = [i for i, s in enumerate(scores) if s >= fraction * 0.7]
    found = intrinsic_dimension(dims, scores, 0.7, fraction)
    if not enough:
        assert found == math.inf
    else:
        low = dims[max(enough[0] - 1, 0)]
        assert low * (1 - 1e-12) <= found <= dims[enough[0]] * (1 + 1e-12)


GOOD = {"dimensions": [1, 2, 4], "scores": [0.1, 0.5, 0.9], "full_score": 1.0, "fraction": 0.9}


NO_SCORES = [0, -1.0, math.nan, math.inf, True, "1", None, [1.0]]
NO_FRACTIONS = [0, -0.5, 1.5, 90, math.nan, math.inf, True, "0.9", None]


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("dimensions", [], ["(0,)", "one score for each d"]),
        ("dimensions", [1, 2], ["(2,)", "(3,)", "one score for each d"]),
        ("dimensions", [[1, 2, 4]], ["(1, 3)", "one score for each d"]),
        ("dimensions", 3, ["()", "one score for each d"]),
        ("dimensions", [1, 4, 2], ["[1.0, 4.0, 2.0]", "sort them"]),
        ("dimensions", [1, 2, 2], ["[1.0, 2.0, 2.0]", "sort them"]),
        ("dimensions", [0, 2, 4], ["[0.0, 2.0, 4.0]", "positive"]),
        ("dimensions", [1, 2, math.inf], ["dimensions has 1 NaN or inf", "nan_to_num"]),
        ("dimensions", ["a", 2, 4], ["['a', 2, 4]", "a list of numbers"]),
        ("dimensions", [1, 2, 4j], ["[1, 2, 4j]", "a list of numbers"]),
        ("dimensions", None, ["None", "a list of numbers"]),
        ("scores", [0.1, math.nan, 0.9], ["scores has 1 NaN", "nan_to_num"]),
        ("scores", [0.1, 0.9], ["(3,)", "(2,)", "one score for each d"]),
        ("scores", "abc", ["'abc'", "a list of numbers"]),
        ("scores", None, ["None", "a list of numbers"]),
        *[("full_score", value, ["full_score", repr(value), "finite number above 0"]) for value in NO_SCORES],
        *[("fraction", value, [repr(value), "0 < fraction <= 1"]) for value in NO_FRACTIONS],
    ],
)
def test_intrinsic_dimension_refuses_what_is_no_curve(name, value, says, refused):
    refused(lambda: intrinsic_dimension(**{**GOOD, name: value}), *says)


def test_two_empty_lists_are_refused(refused):
    refused(lambda: intrinsic_dimension([], [], 1.0), "dimensions is empty", "(0,)", "at least 1")


@pytest.mark.parametrize("name", ["dense", "orthonormal"])
def test_the_matrix_of_a_dense_projection_is_the_map_itself(name):
    P = PROJECTIONS[name](23, 7, torch.Generator().manual_seed(0), torch.float64)
    z = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert P.P.shape == (23, 7) and torch.allclose(P.P @ z, P(z))
