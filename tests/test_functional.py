"""functional.py: the equation and its backward against autograd, peft, loralib and finite differences."""

import inspect
import itertools
import math
import warnings

import loralib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

from lora_ref import functional
from lora_ref.functional import (
    CPU_UPCAST_MAX_NUMEL,
    DROPOUT_LEVELS,
    lora_linear,
    lora_linear_reference,
    should_materialize,
)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
S = 0.7
NAMES = ("x", "weight", "bias", "A", "B")
ADAPTER = ("x", "A", "B")
LARGE = (3, 400)  # rows of a d=5, k=7 layer beyond the bound of `should_materialize`
each_dtype = pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
each_shape = pytest.mark.parametrize("lead", [(2, 3), LARGE], ids=["factored", "materialised"])
each_dropout = pytest.mark.parametrize("p", [0.0, 0.3])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(*lead, d=5, k=7, r=3, dtype=F64, factors=None, bias=True, trained=ADAPTER, seed=0):
    """x (*lead, k), weight, bias, A and B, leaves of which `trained` require a gradient."""
    shapes = {"x": (*lead, k), "weight": (d, k), "bias": (d,), "A": (r, k), "B": (d, r)}
    g, parts = generator(seed), {}
    for name, shape in shapes.items():
        own = factors if factors and name in ("A", "B") else dtype
        parts[name] = torch.randn(shape, generator=g, dtype=F64).to(own).requires_grad_(name in trained)
    if not bias:
        parts["bias"] = None
    return parts


def formula(x, weight, bias, A, B, scale, mask=1.0):
    """The equation, written with none of the package's means."""
    y = x @ weight.mT + scale * ((x * mask) @ A.mT @ B.mT)
    return y if bias is None else y + bias


def step(function, parts, G=None, **options):
    """{"y": output} and the gradient of ⟨G, y⟩ for every part that requires one."""
    wanted = {name: part for name, part in parts.items() if part is not None and part.requires_grad}
    y = function(*parts.values(), S, **options)
    G = torch.randn(y.shape, generator=generator(99), dtype=F64).to(y.dtype) if G is None else G
    found = torch.autograd.grad(y, list(wanted.values()), G, allow_unused=True)
    return {"y": y.detach()} | dict(zip(wanted, found))


def exact(parts):
    """The same numbers in float64."""
    return {n: None if p is None else p.detach().double().requires_grad_(p.requires_grad) for n, p in parts.items()}


def error(found, truth):
    """‖found − truth‖ / ‖truth‖ in float64; where the truth is 0, the absolute error."""
    return (found.double() - truth.double()).norm().item() / (truth.double().norm().item() or 1)


def assert_close(found, truth, tolerance):
    assert found.keys() == truth.keys()
    for name in truth:
        assert found[name].shape == truth[name].shape, name
        assert error(found[name], truth[name]) <= tolerance, name


def mask_of(seed, lead, k, p, dtype=F64):
    """The factors 0 and 1/(1 − p) that dropout gives to a (*lead, k) input after this seed.

    Seen from outside: W0 = 0, A and B identities, x all ones.
    """
    eye = torch.eye(k, dtype=dtype)
    B = torch.cat([eye, torch.zeros(1, k, dtype=dtype)])
    torch.manual_seed(seed)
    return lora_linear(torch.ones(*lead, k, dtype=dtype), torch.zeros_like(B), None, eye, B, 1.0, p, True)[..., :k]


@pytest.fixture
def formed(monkeypatch):
    """Form W0 + s·B·A for every shape, so that small ones test it too."""
    monkeypatch.setattr(functional, "should_materialize", lambda N, d, k, dtype, p: p == 0)


@pytest.fixture
def fresh_compiler():
    """No graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# the specification


@each_dtype
def test_the_reference_is_the_equation(dtype):
    parts = problem(2, 3, dtype=dtype, factors=F32 if dtype != F64 else None)
    found = lora_linear_reference(*parts.values(), S)
    assert found.dtype == dtype
    assert error(found, formula(*exact(parts).values(), S)) <= 4 * torch.finfo(dtype).eps


def test_the_reference_takes_the_same_arguments():
    assert inspect.signature(lora_linear) == inspect.signature(lora_linear_reference)
    assert list(inspect.signature(lora_linear).parameters) == [*NAMES, "scale", "dropout_p", "training"]
    defaults = [p.default for p in inspect.signature(lora_linear).parameters.values()]
    assert defaults[-2:] == [0.0, False] and all(default is inspect.Parameter.empty for default in defaults[:-2])


def test_the_reference_drops_entries_of_the_adapters_input_alone():
    parts = problem(2, 3, r=7, d=9, trained=())
    torch.manual_seed(1)
    found = lora_linear_reference(*parts.values(), S, 0.4, True)
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(2, 3, 7, dtype=F64), 0.4)
    torch.testing.assert_close(found, formula(*parts.values(), S, mask))
    torch.testing.assert_close(lora_linear_reference(*parts.values(), S, 0.4), formula(*parts.values(), S))


# the derived backward is the gradient


@pytest.mark.parametrize("form", ["factored", "materialised", "dropout"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [ADAPTER, NAMES], ids=["adapter", "all"])
def test_first_and_second_derivatives_equal_finite_differences(form, bias, trained, request):
    if form == "materialised":
        request.getfixturevalue("formed")
    parts = problem(4, d=3, k=4, r=2, bias=bias, trained=trained)
    wanted = [name for name in trained if parts[name] is not None]

    def function(*values):
        torch.manual_seed(3)  # the same mask at every evaluation
        return lora_linear(*(parts | dict(zip(wanted, values))).values(), S, 0.3 * (form == "dropout"), True)

    values = [parts[name] for name in wanted]
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@each_shape
def test_derivatives_of_a_real_shape_equal_finite_differences(lead):
    N = math.prod(lead)
    assert should_materialize(N, 5, 7, F64) == (lead == LARGE)
    parts = problem(*lead)
    values = [parts[name] for name in ADAPTER]
    function = lambda x, A, B: lora_linear(x, parts["weight"], parts["bias"], A, B, S)  # noqa: E731
    assert torch.autograd.gradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def peft_linear(parts, r, alpha):
    d, k = parts["weight"].shape
    model = nn.Sequential(nn.Linear(k, d, bias=parts["bias"] is not None))
    layer = inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"]), model)[0]
    layer.base_layer.weight.data = parts["weight"].detach()
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = (nn.Parameter(parts[n].detach()) for n in "AB")
    if parts["bias"] is not None:
        layer.base_layer.bias.data = parts["bias"].detach()
    return layer, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def loralib_linear(parts, r, alpha):
    d, k = parts["weight"].shape
    layer = loralib.Linear(k, d, r=r, lora_alpha=alpha, bias=parts["bias"] is not None)
    layer.weight.data = parts["weight"].detach()
    layer.lora_A, layer.lora_B = (nn.Parameter(parts[name].detach()) for name in "AB")
    if parts["bias"] is not None:
        layer.bias.data = parts["bias"].detach()
    return layer, (layer.lora_A, layer.lora_B)


@pytest.mark.parametrize("lead, d, k, r", [((2, 9), 48, 64, 4), ((2, 9), 64, 48, 16), ((1500,), 20, 33, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("oracle", ["autograd", peft_linear, loralib_linear])
def test_output_and_gradients_in_float32_agree_to_a_millionth(oracle, bias, lead, d, k, r):
    parts = problem(*lead, d=d, k=k, r=r, dtype=F32, bias=bias)
    found = step(lora_linear, parts)
    if oracle == "autograd":
        truth = step(formula, parts)
    else:
        layer, factors = oracle(parts, r, S * r)  # α = s·r
        y = layer(parts["x"])
        G = torch.randn(y.shape, generator=generator(99), dtype=F64).float()
        truth = {"y": y.detach()} | dict(zip(ADAPTER, torch.autograd.grad(y, (parts["x"], *factors), G)))
    assert_close(found, truth, 1e-6)
    assert_close(found, step(formula, exact(parts), G=None), 1e-6)


LAYOUTS = {
    "contiguous": lambda M: M.contiguous(),
    "transposed": lambda M: M.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda M: torch.stack([M, M * math.nan], -1)[..., 0],
    "expanded": lambda M: M[..., :1].expand_as(M),
    "one row for all": lambda M: M[:1].expand_as(M),
}
layouts = st.sampled_from(sorted(LAYOUTS))


@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 7)).filter(lambda t: t[0] != t[1]),
    st.booleans(),
    st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3) | st.just(0.0),
    st.tuples(layouts, layouts),
    st.sampled_from([0.0, 0.25]),
    st.booleans(),
)
def test_any_leading_shape_layout_rank_scale_and_bias(lead, sizes, bias, scale, kinds, p, form):
    (d, k, r), (of_x, of_G) = sizes, kinds
    parts = problem(*lead, d=d, k=k, r=r, bias=bias, trained=NAMES)
    parts["x"] = LAYOUTS[of_x](parts["x"]).detach().requires_grad_()
    G = LAYOUTS[of_G](torch.randn(*lead, d, generator=generator(5), dtype=F64))
    mask, wanted = mask_of(7, lead, k, p) if p else 1.0, [part for part in parts.values() if part is not None]
    rule = functional.should_materialize
    try:
        functional.should_materialize = lambda *shape: form and shape[-1] == 0
        torch.manual_seed(7)
        y = lora_linear(*parts.values(), scale, p, True)
        found = [y, *torch.autograd.grad(y, wanted, G)]
    finally:
        functional.should_materialize = rule
    truth = formula(*parts.values(), scale, mask)
    truth = [truth, *torch.autograd.grad(truth, wanted, G)]
    size = formula(*[None if t is None else abs(t) for t in parts.values()], abs(scale), mask)  # of the terms summed
    sizes = [size, *torch.autograd.grad(size, wanted, abs(G))]
    for own, other, terms in zip(found, truth, sizes, strict=True):
        assert own.shape == other.shape
        assert ((own - other).abs() <= 1e-13 * terms.abs().max()).all()


each_subset = pytest.mark.parametrize(
    "wanted", [names for n in range(1, 6) for names in itertools.combinations(NAMES, n)], ids="-".join
)
each_form = pytest.mark.parametrize("form", ["factored", "materialised", "dropout"])


@each_subset
@each_form
def test_only_the_required_gradients_are_computed_and_only_what_they_need_is_saved(wanted, form, request):
    """∂x needs W0 and the factors; ∂A needs x and B; ∂B needs H and A; ∂W0 needs x."""
    if form == "materialised":
        request.getfixturevalue("formed")
    p = 0.3 * (form == "dropout")
    parts = problem(6, trained=wanted)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.manual_seed(2)
        y = lora_linear(*parts.values(), S, p, True)
    pointers = {name: part.data_ptr() for name, part in parts.items()}
    known = {pointers[name] for name in pointers}
    kept_parts = {name for name in NAMES if pointers[name] in {t.data_ptr() for t in kept}}
    needs = {"x": {"weight", "A", "B"}, "weight": {"x"}, "bias": set(), "A": {"x", "B"}, "B": {"A"}}
    assert kept_parts == set().union(*(needs[name] for name in wanted))
    others = {t.dtype: t.numel() for t in kept if t.data_ptr() not in known}
    expected = ({F64: 6 * 3} if "B" in wanted else {}) | ({torch.bool: 6 * 7} if p and {"x", "A"} & set(wanted) else {})
    assert others == expected
    G = torch.randn(y.shape, generator=generator(99), dtype=F64)
    y.backward(G)
    truth = step(lambda *args: formula(*args, mask_of(2, (6,), 7, p) if p else 1.0), parts, G)
    for name, part in parts.items():
        assert (part.grad is not None) == (name in wanted), name
        if name in wanted:
            assert error(part.grad, truth[name]) <= 1e-13, name


@each_subset
@each_form
def test_second_derivatives_for_every_choice_of_what_is_trained(wanted, form, request):
    if form == "materialised":
        request.getfixturevalue("formed")
    p = 0.3 * (form == "dropout")
    parts = problem(6, trained=wanted)
    mask = mask_of(2, (6,), 7, p) if p else 1.0
    G, *probes = (
        torch.randn(s, generator=generator(7), dtype=F64) for s in [(6, 5)] + [parts[n].shape for n in wanted]
    )
    leaves = [G.requires_grad_(), *(parts[name] for name in wanted)]

    def second(function):
        torch.manual_seed(2)
        first = torch.autograd.grad(function(*parts.values(), S), leaves[1:], G, create_graph=True)
        inner = sum((probe * own).sum() for probe, own in zip(probes, first))
        return torch.autograd.grad(inner, leaves, allow_unused=True)

    found = lambda: second(lambda *args: lora_linear(*args, p, True))  # noqa: E731
    if {"x", "B"} <= set(wanted) and not {"A", "weight"} & set(wanted):
        with pytest.raises(RuntimeError, match="saves no x while A is frozen"):
            found()
        return
    for own, other in zip(found(), second(lambda *args: formula(*args, mask))):
        zero = torch.zeros(())
        torch.testing.assert_close(*(zero if t is None or not t.any() else t for t in (own, other)), check_dtype=False)


@pytest.mark.parametrize("trained", [("x", "B"), ("A",), ("B",)], ids="-".join)
@pytest.mark.parametrize("d, k", [(40, 7), (7, 40)])
def test_the_products_of_forward_and_backward_share_a_dtype(trained, d, k):
    """16-bit x on one side of CPU_UPCAST_MAX_NUMEL, y on the other."""
    N = CPU_UPCAST_MAX_NUMEL // 40 + 1
    assert N * 7 <= CPU_UPCAST_MAX_NUMEL < N * 40
    parts = problem(N, d=d, k=k, dtype=BF16, factors=F32, trained=trained)
    G = torch.randn(N, d, generator=generator(99), dtype=F64).to(BF16)
    found = step(lora_linear, parts, G)
    assert_close(found, step(formula, exact(parts), G.double()), 4 * torch.finfo(BF16).eps)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_second_derivative_without_x_is_refused(p):
    parts = problem(4, trained=("x", "B"))
    y = lora_linear(*parts.values(), S, p, True)
    with pytest.raises(RuntimeError, match="saves no x while A is frozen.*let A require a gradient"):
        torch.autograd.grad(y.sum(), parts["B"], create_graph=True)
    torch.autograd.grad(lora_linear(*parts.values(), S).sum(), parts["B"])  # the first derivative is there
    parts = problem(4, trained=("x",))  # no second derivative to refuse: y is linear in x
    y = lora_linear(*parts.values(), S)
    torch.autograd.grad(y.sum(), parts["x"], create_graph=True)


@each_shape
@each_dropout
def test_the_backward_may_run_twice_and_gradients_accumulate(lead, p):
    parts = problem(*lead, trained=NAMES)
    y = lora_linear(*parts.values(), S, p, True)
    y.sum().backward(retain_graph=True)
    first = {name: part.grad.clone() for name, part in parts.items()}
    y.sum().backward()
    for name, part in parts.items():
        torch.testing.assert_close(part.grad, 2 * first[name])


def test_one_backward_for_many_upstream_gradients():
    """is_grads_batched, as torch.autograd.functional.jacobian(vectorize=True) uses it."""
    parts = problem(2, 3)
    Gs = torch.randn(4, 2, 3, 5, generator=generator(1), dtype=F64)
    for p in (0.0, 0.3):
        y = lora_linear(*parts.values(), S, p, True)
        wanted = [parts[name] for name in ADAPTER]
        found = torch.autograd.grad(y, wanted, Gs, is_grads_batched=True, retain_graph=True)
        for i, G in enumerate(Gs):
            for many, one in zip(found, torch.autograd.grad(y, wanted, G, retain_graph=True)):
                torch.testing.assert_close(many[i], one)


# dtypes


@each_dtype
@pytest.mark.parametrize("factors", [F32, F64, BF16, F16], ids=str)  # pitfall 18: unsloth#212, peft#2421
@pytest.mark.parametrize("lead", [(2, 3), (CPU_UPCAST_MAX_NUMEL // 7 + 1,)], ids=["small", "large"])
@each_dropout
def test_y_has_the_dtype_of_x_and_each_gradient_that_of_its_tensor(dtype, factors, lead, p):
    parts = problem(*lead, dtype=dtype, factors=factors, trained=NAMES)
    torch.manual_seed(4)
    found = step(lora_linear, parts, dropout_p=p, training=True)
    assert found["y"].dtype == dtype
    for name, part in parts.items():
        assert found[name].dtype == part.dtype and found[name].shape == part.shape, name
    mask = mask_of(4, lead, 7, p) if p else 1.0
    G = torch.randn(found["y"].shape, generator=generator(99), dtype=F64).to(dtype).double()
    truth = step(lambda *args: formula(*args, mask), exact(parts), G)
    eps = max(torch.finfo(dtype).eps, torch.finfo(factors).eps)
    tolerance = 4 * eps + math.sqrt(math.prod(lead)) * min(eps, torch.finfo(F32).eps)  # rows are summed in 32 bits
    for name in truth:
        if not (name == "bias" and dtype in (F16, BF16)):  # its sum over rows is torch's own
            assert error(found[name], truth[name]) <= tolerance, name


@each_dtype
@each_shape
@each_dropout
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_with_B_zero_the_output_is_the_frozen_layers_bit_for_bit(dtype, lead, p, bias, autocast):
    parts = problem(*lead, dtype=dtype, factors=F32, bias=bias)
    parts["B"] = torch.zeros_like(parts["B"]).requires_grad_()
    assert should_materialize(math.prod(lead), 5, 7, F32, p) == (lead == LARGE and p == 0)
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = lora_linear(*parts.values(), S, p, True)
        base = F.linear(parts["x"], parts["weight"], parts["bias"])
    assert y.dtype == base.dtype == (BF16 if autocast and dtype != F64 else dtype)
    assert torch.equal(y, base)


@pytest.mark.parametrize("lead", [(2, 3), (3, 400), (CPU_UPCAST_MAX_NUMEL // 7 + 1,)], ids=["small", "rows", "large"])
@each_dropout
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("inside", [False, True])  # where the backward runs
def test_autocast(dtype, lead, p, inside):
    parts = problem(*lead, dtype=dtype, factors=F32)
    kept = []
    with (
        torch.autocast("cpu", BF16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        torch.manual_seed(4)
        y = lora_linear(*parts.values(), S, p, True)
    assert y.dtype == BF16
    rows = [t.dtype for t in kept if t.shape == (math.prod(lead), 7) and t.dtype != torch.bool]
    assert rows == [BF16]  # X is kept once, in 16 bits
    G = torch.randn(y.shape, generator=generator(99), dtype=F64).to(BF16)
    with torch.autocast("cpu", BF16, enabled=inside):
        y.backward(G)
    mask = mask_of(4, lead, 7, p) if p else 1.0
    truth = step(lambda *args: formula(*args, mask), exact(parts), G.double())
    for name in ADAPTER:
        assert parts[name].grad.dtype == parts[name].dtype, name
        assert error(parts[name].grad, truth[name]) <= 4 * torch.finfo(BF16).eps, name
    assert error(y, truth["y"]) <= 4 * torch.finfo(BF16).eps
    if not p:
        with torch.autocast("cpu", BF16):
            other = lora_linear_reference(*parts.values(), S)
        assert other.dtype == BF16 and error(y, other) <= 2 * torch.finfo(BF16).eps


def test_autocast_takes_any_mixture_without_float64_as_linear_does():
    x, weight, bias, A, B = problem(2, 3, dtype=F32, factors=F64).values()
    with torch.autocast("cpu", BF16):
        for mixture in itertools.product([F32, BF16, F16], repeat=3):
            base = [t.detach().to(dtype) for t, dtype in zip((x, weight, bias), mixture)]
            assert torch.equal(lora_linear(*base, A, torch.zeros_like(B), S), F.linear(*base))
        double = [t.detach().double() for t in (x, weight, bias, A, B)]
        assert lora_linear(*double, S).dtype == F64  # autocast leaves float64 alone
        assert torch.equal(lora_linear(*double, S), functional.LoRALinearFunction.apply(
            double[0].flatten(0, 1), *double[1:], S, 0.0).view(2, 3, 5))  # fmt: skip


def test_autocast_off_inside_gives_what_it_gives_outside():
    parts = problem(2, 3, dtype=F32)
    outside = step(lora_linear, parts)
    with torch.autocast("cpu", BF16), torch.autocast("cpu", enabled=False):
        inside = step(lora_linear, parts)
    for name in outside:
        assert torch.equal(outside[name], inside[name])


# memory


def held(function):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


@each_shape
@each_dropout
@each_dtype
def test_beside_x_and_the_parameters_at_most_N_r_numbers_and_a_mask_are_kept(lead, p, dtype):
    parts = problem(*lead, dtype=dtype, factors=F32)
    pointers, N = {part.data_ptr() for part in parts.values()}, math.prod(lead)
    kept = held(lambda: lora_linear(*parts.values(), S, p, True))
    assert parts["x"].data_ptr() in {t.data_ptr() for t in kept}  # by reference
    more = [t for t in kept if t.data_ptr() not in pointers]
    numbers, masks = [t for t in more if t.dtype != torch.bool], [t for t in more if t.dtype == torch.bool]
    assert sum(t.numel() for t in numbers) <= N * 3
    assert sum(t.numel() for t in masks) == (N * 7 if p else 0)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_large_16_bit_x_is_not_cast_up(dtype):
    """Seen from H, which is kept in the dtype of the products."""
    N = CPU_UPCAST_MAX_NUMEL // 7 + 1
    parts = problem(N, dtype=dtype, factors=F32)
    assert [t.dtype for t in held(lambda: lora_linear(*parts.values(), S)) if t.shape == (N, 3)] == [dtype]


def test_two_layers_that_share_x_keep_it_once():
    q, v = problem(2, 50, seed=0), problem(2, 50, seed=1)
    v["x"] = q["x"]
    kept = held(lambda: (lora_linear(*q.values(), S), lora_linear(*v.values(), S)))
    parameters = {part.data_ptr() for part in (*q.values(), *v.values())} - {q["x"].data_ptr()}
    others = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in parameters}
    assert others.pop(q["x"].data_ptr()) == 100 * 7
    assert sorted(others.values()) == [100 * 3, 100 * 3]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_frozen_throughout_keeps_nothing(p):
    parts = problem(4, trained=())
    assert held(lambda: lora_linear(*parts.values(), S, p, True)) == []
    with torch.no_grad():
        parts = problem(4)
        assert held(lambda: lora_linear(*parts.values(), S, p, True)) == []


@pytest.mark.parametrize("name", ["x", "A", "B"])
def test_a_value_rewritten_between_forward_and_backward_is_noticed(name):
    parts = problem(4)
    y = lora_linear(*parts.values(), S)
    with torch.no_grad():
        parts[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_shape
@each_dropout
@each_dtype
def test_no_argument_is_written_to(lead, p, dtype):
    parts = problem(*lead, dtype=dtype, factors=F32, trained=NAMES)
    before = {name: (part.detach().clone(), part._version) for name, part in parts.items()}
    G = torch.randn(*lead, 5, generator=generator(3), dtype=F64).to(dtype)
    G_before = G.clone()
    step(lora_linear, parts, G, dropout_p=p, training=True)
    for name, part in parts.items():
        assert torch.equal(part, before[name][0]) and part._version == before[name][1], name
    assert torch.equal(G, G_before) and G._version == 0


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@each_dropout
def test_an_empty_batch(lead, dtype, p):
    parts = problem(*lead, dtype=dtype, factors=F32, trained=NAMES)
    y = lora_linear(*parts.values(), S, p, True)
    assert y.shape == (*lead, 5) and y.dtype == dtype
    y.sum().backward()
    for name, part in parts.items():
        assert part.grad.shape == part.shape and not part.grad.any(), name


def test_the_meta_device_gives_shapes():
    parts = {name: part.detach().to("meta").requires_grad_() for name, part in problem(2, 3).items()}
    for p in (0.0, 0.3):
        y = lora_linear(*parts.values(), S, p, True)
        assert y.is_meta and y.shape == (2, 3, 5)
        y.sum().backward()
        assert all(part.grad.shape == part.shape for part in parts.values())


# which contraction


@given(
    st.integers(0, 5000),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([F32, F64, BF16, F16]),
    st.sampled_from([0.0, 1e-9, 0.1]),
)
def test_materialises_is_its_docstrings_rule(N, d, k, dtype, p):
    enough = N >= 40 * d * k / (d + k) - 1e-9
    assert should_materialize(N, d, k, dtype, p) == (enough and p == 0 and dtype in (F32, F64))


def test_materialises_from_the_bound_on():
    assert should_materialize(80, 6, 3, F32) and not should_materialize(79, 6, 3, F32)  # 40·18/9 = 80


@pytest.mark.parametrize(
    "N, p, dtype, forms", [(200, 0, F32, 1), (100, 0, F32, 0), (200, 0.1, F32, 0), (200, 0, BF16, 0)]
)
def test_the_rule_is_what_runs(N, p, dtype, forms):
    """Only the materialised forward and backward make a d×k product of B and A, one each."""
    parts = problem(N, dtype=dtype, factors=F32)

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        formed = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            self.formed += name in ("mm", "addmm") and tuple(out.shape) == (5, 7)
            return out

    with Count() as count:
        lora_linear(*parts.values(), S, p, True).sum().backward()
    assert count.formed == 2 * forms


# dropout


def test_no_dropout_in_eval_or_at_zero(rng_untouched):
    parts = problem(2, 3)
    plain = lora_linear(*parts.values(), S)
    assert torch.equal(lora_linear(*parts.values(), S, 0.9, False), plain)
    assert torch.equal(lora_linear(*parts.values(), S, 0.9), plain)
    assert torch.equal(lora_linear(*parts.values(), S, 0.0, True), plain)


def test_every_call_draws_another_mask_and_a_seed_repeats_it():
    one, other = mask_of(0, (50,), 7, 0.5), mask_of(1, (50,), 7, 0.5)
    assert torch.equal(one, mask_of(0, (50,), 7, 0.5)) and not torch.equal(one, other)
    parts = problem(50)
    assert not torch.equal(lora_linear(*parts.values(), S, 0.5, True), lora_linear(*parts.values(), S, 0.5, True))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 / DROPOUT_LEVELS, 0.25])
def test_the_mask_drops_with_probability_p_everywhere_and_independently(p):
    kept = mask_of(11, (20000,), 10, p) != 0
    n, dropped = kept.numel(), ~kept

    def near(share, expected, count):
        return abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / count)

    assert near(dropped.double().mean().item(), p, n)
    for column in dropped.T:
        assert near(column.double().mean().item(), p, len(column))
    flat = dropped.flatten()
    for apart in (1, 2, 3, 4, 5, 10):
        both = (flat[:-apart] & flat[apart:]).double().mean().item()
        assert abs(both - p * p) <= 5 * math.sqrt((p * p + 2 * p**3) / n) + 1e-12


@pytest.mark.parametrize("p", [0.3, 0.1, 1 / 3, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_what_is_kept_is_divided_by_one_minus_the_rounded_p(p, dtype):
    rounded = round(p * DROPOUT_LEVELS) / DROPOUT_LEVELS
    assert abs(rounded - p) <= 0.5 / DROPOUT_LEVELS
    values = mask_of(0, (4000,), 7, p, dtype).unique()
    assert values.tolist() == pytest.approx([0, 1 / (1 - rounded)], rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("p, values", [(1e-7, [1.0]), (1 - 1e-9, [0.0, DROPOUT_LEVELS])])
def test_p_next_to_0_and_1(p, values):
    assert mask_of(0, (40000,), 7, p).unique().tolist() == values
    parts, found = problem(400, d=5), {}
    torch.manual_seed(0)
    found = step(lora_linear, parts, dropout_p=p, training=True)
    assert_close(found, step(lambda *args: formula(*args, mask_of(0, (400,), 7, p)), parts), 1e-12)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_dropout_is_unbiased_in_the_output_and_in_every_gradient(dtype):
    n, p = 8000, 0.3
    parts = problem(1, dtype=dtype, factors=F32)
    rows = parts | {"x": parts["x"].detach().expand(n, 7).requires_grad_()}
    G = torch.randn(1, 5, generator=generator(99), dtype=F64).to(dtype)
    torch.manual_seed(6)
    y = lora_linear(*rows.values(), S, p, True)
    dx, dA, dB = torch.autograd.grad(y, [rows[name] for name in ADAPTER], G.expand(n, 5))
    means = {"y": y.double().mean(0, True), "x": dx.double().mean(0, True), "A": dA / n, "B": dB / n}
    wide = exact(parts)
    truth = step(formula, wide, G.double())
    x, _, _, A, B = (part.detach() for part in wide.values())
    noise, z = math.sqrt(p / (1 - p)), G.double() @ B
    spread = {
        "y": S * noise * ((x * (B @ A)) ** 2).sum(1).sqrt()[None],
        "x": S * noise * (z @ A).abs(),
        "A": S * noise * (z.T @ x).abs(),
        "B": S * noise * G.double().T.abs() @ ((x * A) ** 2).sum(1).sqrt()[None],
    }
    for name, mean in means.items():
        rounding = 2 * torch.finfo(dtype).eps * truth[name].abs().max()
        assert ((mean - truth[name]).abs() <= 5 * spread[name] / math.sqrt(n) + rounding).all(), name


@each_dtype
@pytest.mark.parametrize("lead", [(), (9,), (2, 3)], ids=str)
def test_the_backward_uses_the_mask_of_the_forward(dtype, lead):
    parts = problem(*lead, dtype=dtype, factors=F32, trained=NAMES)
    torch.manual_seed(8)
    found = step(lora_linear, parts, dropout_p=0.4, training=True)
    G = torch.randn(*lead, 5, generator=generator(99), dtype=F64).to(dtype).double()
    mask = mask_of(8, lead, 7, 0.4)
    truth = step(lambda *args: formula(*args, mask), exact(parts), G)
    assert_close(found, truth, max(4 * torch.finfo(dtype).eps, 4e-7))


# checkpointing, compilation, transforms


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@each_shape
def test_checkpointing_changes_no_gradient(use_reentrant, p, lead):
    parts = problem(*lead)

    def function(*values):
        return checkpoint(lora_linear, *values[:5], S, p, True, use_reentrant=use_reentrant)

    def run(forward):
        for part in parts.values():
            part.grad = None
        torch.manual_seed(5)
        forward(*parts.values()).square().sum().backward()
        return {name: parts[name].grad for name in ADAPTER}

    direct = run(lambda *values: lora_linear(*values, S, p, True))
    for name, gradient in run(function).items():
        assert torch.equal(gradient, direct[name]), name


def test_checkpointing_a_frozen_input_still_trains_the_adapter():  # pitfall 10: microsoft/LoRA#120
    parts = problem(4, trained=("A", "B"))
    direct = step(lora_linear, parts)
    found = step(lambda *args: checkpoint(lora_linear, *args, use_reentrant=False), parts)
    for name in ("y", "A", "B"):
        assert torch.equal(found[name], direct[name])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_compiled_without_a_graph_break_it_is_the_same(dtype, fresh_compiler):
    parts = problem(2, 9, dtype=dtype, factors=F32)
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True, dynamic=False)
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(step(compiled, parts), step(lora_linear, parts), tolerance)
    assert torch.equal(compiled(*parts.values(), S, 0.5, False), compiled(*parts.values(), S))
    with torch.autocast("cpu", BF16):
        found = compiled(*parts.values(), S)
        assert found.dtype == BF16 and error(found, lora_linear(*parts.values(), S)) <= 2 * torch.finfo(BF16).eps
    assert_close(step(compiled, parts | {"bias": None}), step(lora_linear, parts | {"bias": None}), tolerance)
    for scale in (0.3, 3.0, 5):  # the layers of a model may differ in it; dynamo makes it a symbol
        assert error(compiled(*parts.values(), scale), lora_linear(*parts.values(), scale)) <= tolerance


def test_compiled_dropout_is_drawn_and_rescaled(fresh_compiler):
    x, weight, B, A = torch.ones(4000, 7), torch.zeros(9, 7), torch.eye(9, 7), torch.eye(7)
    torch.manual_seed(0)
    y = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)(x, weight, None, A, B, 1.0, 0.3, True)[:, :7]
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert abs((y == 0).double().mean().item() - 0.3) <= 5 * math.sqrt(0.21 / y.numel())


def test_vmap_over_adapters_over_rows_and_over_both():
    x, weight, bias, A, B = (part.detach() for part in problem(4, 6).values())
    As, Bs = torch.stack([A, 2 * A, -A]), torch.stack([B, B + 1, 3 * B])
    many = vmap(lambda A, B: lora_linear(x, weight, bias, A, B, S))(As, Bs)
    each = torch.stack([formula(x, weight, bias, A, B, S) for A, B in zip(As, Bs)])
    torch.testing.assert_close(many, each)
    rows = vmap(lambda x: lora_linear(x, weight, bias, A, B, S))(x)
    torch.testing.assert_close(rows, formula(x, weight, bias, A, B, S))
    both = vmap(vmap(lambda x: lora_linear(x, weight, bias, A, B, S)), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(both, rows)


def test_grad_jvp_and_hessian_equal_those_of_the_equation():
    x, weight, bias, A, B = (part.detach() for part in problem(4).values())

    def loss(function):
        return lambda A, B: function(x, weight, bias, A, B, S).square().sum()

    for order in (grad, hessian):
        found = order(loss(lora_linear), argnums=(0, 1))(A, B)
        truth = order(loss(formula), argnums=(0, 1))(A, B)
        for own, other in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(truth)):
            torch.testing.assert_close(own, other)
    tangents = torch.randn_like(A), torch.randn_like(B)
    for own, other in zip(jvp(loss(lora_linear), (A, B), tangents), jvp(loss(formula), (A, B), tangents)):
        torch.testing.assert_close(own, other)
    samples = vmap(grad(lambda A, x: lora_linear(x, weight, bias, A, B, S).square().sum()), in_dims=(None, 0))(A, x)
    truth = grad(loss(formula))(A, B)
    torch.testing.assert_close(samples.sum(0), truth)  # the gradient of a batch is the sum of its samples'


def test_the_second_derivative_of_autograd_is_that_of_functorch():
    x, weight, bias, A, B = problem(3).values()
    flat = torch.autograd.functional.hessian(lambda A: lora_linear(x, weight, bias, A, B, S).pow(3).sum(), A)
    truth = hessian(lambda A: formula(x, weight, bias, A, B, S).pow(3).sum())(A)
    torch.testing.assert_close(flat, truth)


def test_a_module_called_functionally():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B = nn.Parameter(torch.ones(3, 7)), nn.Parameter(torch.zeros(5, 3))

        def forward(self, x, weight):
            return lora_linear(x, weight, None, self.A, self.B, S)

    x, weight, _, A, B = (part.detach() for part in problem(4, dtype=F32).values())
    found = functional_call(Layer(), {"A": A, "B": B}, (x, weight))
    torch.testing.assert_close(found, formula(x, weight, None, A, B, S))


@pytest.mark.parametrize("name", ["x", "A", "B"])
def test_forward_mode_outside_of_torch_func_is_an_exception_and_no_number(name):
    import torch.autograd.forward_ad as forward

    parts = problem(4, trained=())
    with forward.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        parts[name] = forward.make_dual(parts[name], torch.ones_like(parts[name]))
        lora_linear(*parts.values(), S)


# bad input: the argument, its value and the fix

META = torch.device("meta")
BAD = {
    "x a list": ({"x": [1.0]}, TypeError, ["x must be a torch.Tensor", "got list", "torch.as_tensor(x)"]),
    "weight None": ({"weight": None}, TypeError, ["weight must be", "got NoneType"]),
    "A an array": ({"A": np.ones((3, 7))}, TypeError, ["A must be", "got ndarray"]),
    "B a number": ({"B": 0.0}, TypeError, ["B must be", "got float"]),
    "bias True": ({"bias": True}, TypeError, ["bias must be", "got bool"]),
    "x integers": ({"x": torch.ones(4, 7, dtype=torch.int64)}, TypeError, ["x", "torch.int64", "x.float()"]),
    "all integers": (
        {
            name: torch.ones(shape, dtype=torch.int64)
            for name, shape in (("x", (4, 7)), ("weight", (5, 7)), ("bias", 5))
        },
        TypeError,
        ["x must", "torch.int64", "x.float()"],
    ),
    "weight int8": ({"weight": torch.ones(5, 7, dtype=torch.int8)}, TypeError, ["weight", "torch.int8"]),
    "A booleans": ({"A": torch.ones(3, 7, dtype=torch.bool)}, TypeError, ["A must", "torch.bool", "A.float()"]),
    "B complex": ({"B": torch.ones(5, 3, dtype=torch.complex64)}, TypeError, ["B must", "torch.complex64"]),
    "bias integers": ({"bias": torch.ones(5, dtype=torch.int32)}, TypeError, ["bias", "torch.int32"]),
    "x too wide": ({"x": torch.ones(4, 8)}, ValueError, ["x (4, 8)", "x must be (…, 7)"]),
    "one row too wide": ({"x": torch.ones(8)}, ValueError, ["x (8,)", "x must be (…, 7)"]),
    "a stack too wide": ({"x": torch.ones(2, 7, 8)}, ValueError, ["x (2, 7, 8)", "x must be (…, 7)"]),
    "x a scalar": ({"x": torch.tensor(1.0)}, ValueError, ["x ()", "no scalar"]),
    "A transposed": ({"A": torch.ones(7, 3)}, ValueError, ["A (7, 3)", "transposed?"]),
    "B transposed": ({"B": torch.ones(3, 5)}, ValueError, ["B (3, 5)", "B (5, 3)", "transposed?"]),
    "weight transposed": ({"weight": torch.ones(7, 5)}, ValueError, ["weight (7, 5)", "x must be (…, 5)"]),
    "other rank": ({"B": torch.ones(5, 2)}, ValueError, ["B (5, 2)", "B (5, 3)"]),
    "A too wide": ({"A": torch.ones(3, 8)}, ValueError, ["A (3, 8)", "A (3, 7)"]),
    "B a vector": ({"B": torch.ones(5)}, ValueError, ["B (5,)", "must be matrices"]),
    "A a vector": ({"A": torch.ones(7)}, ValueError, ["A (7,)", "must be matrices"]),
    "weight a stack": ({"weight": torch.ones(1, 5, 7)}, ValueError, ["weight (1, 5, 7)", "must be matrices"]),
    "bias of k": ({"bias": torch.ones(7)}, ValueError, ["bias (7,)", "bias (5,)"]),
    "bias of 1": ({"bias": torch.ones(1)}, ValueError, ["bias (1,)", "bias (5,)"]),
    "bias a row": ({"bias": torch.ones(1, 5)}, ValueError, ["bias (1, 5)", "bias (5,)"]),
    "x half": ({"x": torch.ones(4, 7).half()}, TypeError, ["x is torch.float16", "weight is torch.float32", "cast x"]),
    "bias double": ({"bias": torch.ones(5).double()}, TypeError, ["bias is torch.float64", "cast"]),
    "x on meta": ({"x": torch.ones(4, 7, device=META)}, ValueError, ["x on meta", "weight is on cpu", "to one device"]),
    "A on meta": ({"A": torch.ones(3, 7, device=META)}, ValueError, ["A is on meta", "to one device"]),
    "B on meta": ({"B": torch.ones(5, 3, device=META)}, ValueError, ["B is on meta", "to one device"]),
    "bias on meta": ({"bias": torch.ones(5, device=META)}, ValueError, ["bias is on meta", "to one device"]),
    "scale inf": ({"scale": math.inf}, ValueError, ["scale = inf", "LoRAConfig"]),
    "scale -inf": ({"scale": -math.inf}, ValueError, ["scale = -inf", "LoRAConfig"]),
    "scale nan": ({"scale": math.nan}, ValueError, ["scale = nan", "LoRAConfig"]),
    "scale text": ({"scale": "2"}, TypeError, ["scale must be a number", "'2'"]),
    "scale None": ({"scale": None}, TypeError, ["scale must be a number", "None"]),
    "scale a tensor": ({"scale": torch.tensor(2.0)}, TypeError, ["scale must be a number", "Tensor"]),
    "p = 1": ({"dropout_p": 1.0}, ValueError, ["dropout_p = 1.0", "0 <= dropout_p < 1"]),
    "p < 0": ({"dropout_p": -0.1}, ValueError, ["dropout_p = -0.1", "0 <= dropout_p < 1"]),
    "p nan": ({"dropout_p": math.nan}, ValueError, ["dropout_p = nan"]),
    "p None": ({"dropout_p": None}, TypeError, ["dropout_p must be a number", "None"]),
    "p True": ({"dropout_p": True}, TypeError, ["dropout_p must be a number", "True"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_by_name(kind, refused, rng_untouched):
    bad, error_type, says = BAD[kind]
    good = problem(4, dtype=F32, trained=()) | {"scale": S, "dropout_p": 0.0, "training": True}
    before = {name: part.clone() for name, part in good.items() if isinstance(part, torch.Tensor)}
    refused(lambda: lora_linear(**(good | bad)), *says)
    with pytest.raises(error_type):
        lora_linear(**(good | bad))
    assert all(torch.equal(good[name], part) for name, part in before.items())
    lora_linear(**good)  # what is left when the bad argument is taken back
    if "bias" not in bad:
        refused(lambda: lora_linear(**(good | {"bias": None} | bad)), says[0])


def test_autocast_refuses_a_mixture_with_float64_by_name(refused):
    parts = problem(4, dtype=F32, trained=())
    with torch.autocast("cpu", BF16):
        for name in ("x", "weight", "bias"):
            refused(lambda: lora_linear(*(parts | {name: parts[name].double()}).values(), S), "torch.float64", "cast")


def test_autocast_does_not_hide_which_number_is_wrong(refused):
    parts = problem(4, dtype=F32, trained=())
    parts["x"] = parts["x"].bfloat16()
    with torch.autocast("cpu", BF16):
        lora_linear(*parts.values(), S)
        refused(lambda: lora_linear(*parts.values(), S, 1.5), "dropout_p = 1.5")
        refused(lambda: lora_linear(*parts.values(), math.nan), "scale = nan")


def test_numbers_of_other_kinds_are_numbers():
    parts = problem(4)
    plain = lora_linear(*parts.values(), 2.0)
    for scale in (2, np.float64(2), np.float32(2), np.int64(2)):
        assert torch.equal(lora_linear(*parts.values(), scale), plain)


def test_nothing_is_warned_about():
    parts = problem(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(lora_linear, parts, dropout_p=0.2, training=True)
        step(lora_linear, problem(2, 3, dtype=BF16, factors=F32))
