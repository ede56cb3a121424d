"""intrinsic_dimension.py: the subspace against plain flattening, d_int by hand."""

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
    RandomSubspace,
    intrinsic_dimension,
)

F32, F64 = torch.float32, torch.float64
NAMES = list(PROJECTIONS)
each_projection = pytest.mark.parametrize("name", NAMES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def as_matrix(P):
    """P as a D×d array, column by column."""
    dtype = next(b.dtype for b in P.buffers() if b.is_floating_point())
    return torch.stack([P(e) for e in torch.eye(P.d, dtype=dtype)], dim=1)


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
