"""layers.py: the four kinds of layer against peft, loralib and their own merged weight in float64."""

import copy
import io
import math
import pickle
from typing import NamedTuple

import loralib
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_ref.config import LoRAConfig
from lora_ref.initialization import INITIALIZERS, Init, kaiming, lora_ga
from lora_ref.layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALinear

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CONFIG = LoRAConfig(r=3, lora_alpha=5)  # α ≠ r: pitfall 8: peft#2489


class Kind(NamedTuple):
    """A layer class, its base, a batch of input, and the shape of B·A as the base stores it."""

    layer: type
    base: object
    batch: object
    d: int
    k: int
    stored: object


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=generator(seed), dtype=F64).to(dtype)


def ids(*shape, seed=0):
    return torch.randint(11, shape, generator=generator(seed))


KINDS = {
    "Linear": Kind(LoRALinear, lambda: nn.Linear(7, 5), lambda dt=F32: normal(2, 3, 7, dtype=dt), 5, 7, lambda M: M),
    "Conv1D": Kind(LoRAConv1D, lambda: Conv1D(5, 7), lambda dt=F32: normal(2, 3, 7, dtype=dt), 5, 7, lambda M: M.T),
    "Embedding": Kind(LoRAEmbedding, lambda: nn.Embedding(11, 5), lambda dt=F32: ids(2, 9), 5, 11, lambda M: M.T),
    "Conv2d": Kind(
        LoRAConv2d,
        lambda: nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=(1, 2)),
        lambda dt=F32: normal(3, 2, 8, 6, dtype=dt),
        5,
        12,
        lambda M: M.reshape(5, 2, 3, 2),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
of_floats = pytest.mark.parametrize("kind", [name for name in KINDS if name != "Embedding"])


def base_of(kind, dtype=F32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = KINDS[kind].base()
        if getattr(base, "bias", None) is not None:
            nn.init.normal_(base.bias)
        return base.to(dtype)


def randomize(layer, seed=1, std=0.5):
    """Give A and B numbers, as training would."""
    with torch.no_grad():
        for i, factor in enumerate((layer.lora_A, layer.lora_B)):
            factor.copy_(std * normal(*factor.shape, seed=seed + i))
    return layer


def layer_of(kind, dtype=F32, config=CONFIG, **options):
    """A layer whose adapter does something."""
    return randomize(KINDS[kind].layer(base_of(kind, dtype), config, **options))


def bits(tensor):
    return tensor.detach().clone()


def same_bits(tensor, other):
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


def dense(kind, layer, base):
    """The base in float64 with the weight W0 + s·B·A: what the layer must compute."""
    plain = copy.deepcopy(base).double()
    delta = layer.config.lora_alpha / layer.config.r * (layer.lora_B.double() @ layer.lora_A.double())
    plain.weight = nn.Parameter((base.weight.double() + KINDS[kind].stored(delta)).detach())
    return plain


def error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def output(layer, x):
    with torch.no_grad():
        return layer(x)


# peft and loralib as oracles


def peft_layer(kind, layer, base, **options):
    """peft's layer around a copy of the base, with this layer's factors."""
    config = layer.config
    model = nn.Sequential(copy.deepcopy(base))
    options = {"fan_in_fan_out": kind == "Conv1D"} | options
    model = inject_adapter_in_model(
        LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            lora_dropout=config.lora_dropout,
            target_modules=["0"],
            **options,
        ),
        model,
    )
    other = model[0]
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    if kind == "Embedding":
        other.lora_embedding_A["default"].data, other.lora_embedding_B["default"].data = A.clone(), B.clone()
        return other, (other.lora_embedding_A["default"], other.lora_embedding_B["default"])
    if kind == "Conv2d":
        A, B = A.reshape(-1, *base.weight.shape[1:]), B[:, :, None, None]
    factors = other.lora_A["default"].weight, other.lora_B["default"].weight
    for factor, value in zip(factors, (A, B)):
        factor.data = value.clone()
    return other, factors


def loralib_layer(kind, layer, base):
    config = layer.config
    options = {"r": config.r, "lora_alpha": config.lora_alpha}
    if kind == "Embedding":
        other = loralib.Embedding(*base.weight.shape, **options)
    else:
        other = loralib.Linear(7, 5, fan_in_fan_out=kind == "Conv1D", **options)
        other.bias.data = base.bias.detach().clone()
    other.weight.data = base.weight.detach().clone()
    other.lora_A.data, other.lora_B.data = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    return other, (other.lora_A, other.lora_B)


# pitfall 16: microsoft/LoRA#103, Conv1D stores (in, out): peft and loralib by fan_in_fan_out
ORACLES = [(peft_layer, kind) for kind in KINDS] + [(loralib_layer, kind) for kind in KINDS if kind != "Conv2d"]
each_oracle = pytest.mark.parametrize("oracle, kind", ORACLES, ids=[f"{o.__name__}-{kind}" for o, kind in ORACLES])


@each_oracle
def test_outputs_and_gradients_equal_the_oracles(oracle, kind):
    base = base_of(kind)
    layer = randomize(KINDS[kind].layer(copy.deepcopy(base), CONFIG))
    other, factors = oracle(kind, layer, base)
    x = KINDS[kind].batch()
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    y, z = layer(x), other(x)
    assert error(y, z) <= 1e-6
    G = normal(*y.shape, seed=9)
    found = torch.autograd.grad(y, [layer.lora_A, layer.lora_B, *inputs], G)
    truth = torch.autograd.grad(z, [*factors, *inputs], G)
    for own, theirs in zip(found, truth, strict=True):
        assert error(own, theirs.reshape(own.shape)) <= 1e-6


@each_oracle
def test_merged_weights_equal_the_oracles(oracle, kind):
    base = base_of(kind)
    layer = randomize(KINDS[kind].layer(copy.deepcopy(base), CONFIG))
    other, _ = oracle(kind, layer, base)
    layer.merge()
    if oracle is peft_layer:
        other.merge()
        merged = other.get_base_layer().weight
    else:
        other.eval()
        merged = other.weight
    assert error(layer.merged_weight, merged) <= 1e-7
    assert error(layer.merged_weight, base.weight) > 0.1  # something was merged


@pytest.mark.parametrize("use_rslora", [False, True])  # pitfall 7: peft#2733
@each_kind
def test_the_scale_is_that_of_pefts_layer(kind, use_rslora):
    config = LoRAConfig(r=3, lora_alpha=7, use_rslora=use_rslora)
    layer = layer_of(kind, config=config)
    other, _ = peft_layer(kind, layer, base_of(kind))
    assert layer.scale == other.scaling["default"] == 7 / (math.sqrt(3) if use_rslora else 3)
    assert error(layer(KINDS[kind].batch()), other(KINDS[kind].batch())) <= 1e-6


def test_a_fused_qkv_conv1d_equals_peft():  # pitfall 16: microsoft/LoRA#103
    base = Conv1D(3 * 8, 8)
    nn.init.normal_(base.weight)
    layer = randomize(LoRAConv1D(copy.deepcopy(base), LoRAConfig(r=2, lora_alpha=7)))
    other, _ = peft_layer("Conv1D", layer, base)
    x = normal(2, 5, 8)
    assert layer.lora_A.shape == (2, 8) and layer.lora_B.shape == (24, 2)
    for own, theirs in zip(layer(x).split(8, -1), other(x).split(8, -1)):
        assert error(own, theirs) <= 1e-6


def test_a_new_layer_computes_what_its_base_does_and_moves_the_zero_factor_first():
    for kind in KINDS:
        base, x = base_of(kind), KINDS[kind].batch()
        layer = KINDS[kind].layer(copy.deepcopy(base), CONFIG, generator=generator())
        assert same_bits(layer(x), base(x)), kind
        layer(x).square().sum().backward()
        zero, other = (layer.lora_A, layer.lora_B) if kind == "Embedding" else (layer.lora_B, layer.lora_A)
        assert not zero.any() and other.any(), kind
        assert zero.grad.any() and not other.grad.any(), kind


@each_kind
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)  # pitfall 18: unsloth#212, peft#2421
def test_output_and_gradients_equal_those_of_the_dense_weight(kind, dtype):
    base = base_of(kind, dtype)
    layer = randomize(KINDS[kind].layer(copy.deepcopy(base), CONFIG))
    plain, x = dense(kind, layer, base), KINDS[kind].batch(dtype)
    y = layer(x)
    z = plain(x.double() if x.is_floating_point() else x)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype and error(y, z) <= 4 * eps
    G = normal(*y.shape, seed=9, dtype=dtype)
    y.backward(G)
    z.backward(G.double())
    s, d = 5 / 3, KINDS[kind].d
    # ∂L/∂W as the base stores it, back as a matrix (d, k)
    full = plain.weight.grad.T if kind in ("Conv1D", "Embedding") else plain.weight.grad.reshape(d, -1)
    wide = torch.promote_types(dtype, F32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == wide
    assert error(layer.lora_A.grad, s * layer.lora_B.double().T @ full) <= 6 * eps
    assert error(layer.lora_B.grad, s * full @ layer.lora_A.double().T) <= 6 * eps


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([0, (1, 0), (2, 3), "same", "valid"]),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_a_convolution_of_any_stride_padding_and_dilation(kernel, stride, padding, dilation, r, bias, batched):
    """Against a convolution with the merged weight; peft's A ignores the dilation."""
    if padding == "same":
        stride = (1, 1)
    base = nn.Conv2d(4, 5, kernel, stride, padding, dilation, bias=bias, dtype=F64)
    layer = LoRAConv2d(copy.deepcopy(base), LoRAConfig(r=r, lora_alpha=r + 1.5))
    randomize(layer)
    x = normal(2, 4, 9, 10, dtype=F64) if batched else normal(4, 9, 10, dtype=F64)
    truth = copy.deepcopy(base)
    delta = (r + 1.5) / r * (layer.lora_B @ layer.lora_A).reshape(base.weight.shape)
    truth.weight = nn.Parameter((base.weight + delta).detach())
    torch.testing.assert_close(layer(x), truth(x))
    layer.merge()
    torch.testing.assert_close(output(layer, x), truth(x))


def test_a_convolution_in_channels_last_keeps_its_layout():
    base = base_of("Conv2d").to(memory_format=torch.channels_last)
    layer = randomize(LoRAConv2d(base, CONFIG))
    assert layer.weight is base.weight and base.weight.is_contiguous(memory_format=torch.channels_last)
    x = KINDS["Conv2d"].batch()
    truth = dense("Conv2d", layer, base)(x.double())
    assert error(layer(x), truth) <= 1e-6
    layer.merge()
    assert error(output(layer, x), truth) <= 1e-6


@pytest.mark.parametrize("options", [{"padding_idx": 4}, {"scale_grad_by_freq": True}, {"padding_idx": -1}], ids=str)
def test_options_of_an_embedding_act_on_A_as_on_a_weight(options):
    base = nn.Embedding(11, 5, **options)
    layer = randomize(LoRAEmbedding(copy.deepcopy(base), CONFIG))
    other, factors = peft_layer("Embedding", layer, base)
    x = torch.tensor([4, 4, 1, 4, 10, 0, 0, 10])
    G = normal(8, 5, seed=9)
    found = torch.autograd.grad(layer(x), [layer.lora_A, layer.lora_B], G)
    for own, theirs in zip(found, torch.autograd.grad(other(x), factors, G)):
        assert error(own, theirs) <= 1e-6
    if "padding_idx" in options:
        assert not found[0][:, base.padding_idx].any() and found[0][:, 1].any()


@each_kind
def test_under_autocast_outputs_and_gradients_are_close_and_factors_stay_in_32_bits(kind):
    base = base_of(kind)
    layer = randomize(KINDS[kind].layer(copy.deepcopy(base), CONFIG))
    x = KINDS[kind].batch()
    with torch.autocast("cpu", BF16):
        y = layer(x)
        assert y.dtype == base(x).dtype
        layer.merge()
        assert layer.merged_weight.dtype == F32
    truth = dense(kind, layer, base)(x.double() if x.is_floating_point() else x)
    assert error(y, truth) <= 4 * torch.finfo(BF16).eps
    y.sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == F32


# dropout


@of_floats
@pytest.mark.parametrize("rows", [3000])
def test_dropout_acts_on_the_adapters_input_in_training_alone_and_merging_needs_no_factor(kind, rows):
    """Pitfall 27: peft#2066. The mean over masks is the output without dropout; so is the merged output."""
    config = LoRAConfig(r=3, lora_alpha=5, lora_dropout=0.4)
    layer = layer_of(kind, F64, config)
    x = KINDS[kind].batch(F64)[:1]
    x = x[:, :1] if x.ndim == 3 else x
    plain = dense(kind, layer, base_of(kind, F64))(x)
    frozen = base_of(kind, F64)(x)
    layer.train()
    torch.manual_seed(3)
    many = output(layer, x.expand(rows, *x.shape[1:]))
    assert not torch.equal(many[0], many[1])
    mean, spread = many.mean(0), many.std(0)
    assert ((mean - plain[0]).abs() <= 5 * spread / math.sqrt(rows) + 1e-12).all()
    assert spread.norm() > 0.1 * (plain - frozen).norm()  # dropout was at work
    layer.eval()
    torch.testing.assert_close(output(layer, x), plain)
    torch.testing.assert_close(layer(x), plain)  # in eval, with gradients too
    layer.merge()
    torch.testing.assert_close(output(layer, x), plain)


def test_a_convolution_drops_entries_of_the_adapters_input_and_rescales_them():
    layer = layer_of("Conv2d", F64, LoRAConfig(r=3, lora_alpha=5, lora_dropout=0.4)).train()
    base, x = base_of("Conv2d", F64), KINDS["Conv2d"].batch(F64)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    delta = dense("Conv2d", layer, base).weight - base.weight
    update = F.conv2d(dropped, delta, None, base.stride, base.padding)
    torch.testing.assert_close(found, base(x) + update)


def test_an_embedding_has_no_dropout():
    layer = layer_of("Embedding", config=LoRAConfig(r=3, lora_alpha=5, lora_dropout=0.9)).train()
    assert layer.lora_dropout == 0
    x = ids(2, 9)
    torch.testing.assert_close(layer(x).double(), dense("Embedding", layer, base_of("Embedding"))(x))


@of_floats
def test_checkpointing_gives_the_same_gradients_with_dropout(kind):  # pitfall 10: microsoft/LoRA#120
    layer, x = layer_of(kind, config=LoRAConfig(r=3, lora_alpha=5, lora_dropout=0.4)).train(), KINDS[kind].batch()

    def gradients(forward):
        torch.manual_seed(5)
        return torch.autograd.grad(forward(x).square().sum(), [layer.lora_A, layer.lora_B])

    for own, other in zip(gradients(lambda x: checkpoint(layer, x, use_reentrant=False)), gradients(layer)):
        assert torch.equal(own, other) and own.any()


# merging


@each_kind
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_merging_and_unmerging_leave_the_base_bit_for_bit(kind, dtype):  # pitfall 2: peft#2502
    base = base_of(kind, dtype)
    before, x = bits(base.weight), KINDS[kind].batch(dtype)
    layer = randomize(KINDS[kind].layer(base, CONFIG))
    y = output(layer, x)
    for _ in range(3):
        layer.merge()
        output(layer, x)
        assert layer.merged and same_bits(layer.weight, before)
        layer.unmerge()
        assert not layer.merged and same_bits(layer.weight, before)
    assert layer.weight is base.weight
    assert same_bits(output(layer, x), y)


@each_kind
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_merging_in_16_bits_rounds_once(kind, dtype):  # pitfall 1: peft#1388
    """The merged weight is the exact W0 + s·B·A rounded: within half a unit in the last place, not more."""
    base = base_of(kind, dtype)
    layer = randomize(KINDS[kind].layer(base, CONFIG))
    layer.merge()
    truth = dense(kind, layer, base).weight
    assert layer.merged_weight.dtype == dtype
    unit = torch.finfo(dtype).eps * truth.abs()
    assert ((layer.merged_weight.double() - truth).abs() <= 0.501 * unit).all()  # s·B·A is summed in 32 bits
    twice = base.weight + KINDS[kind].stored((layer.scale * (layer.lora_B @ layer.lora_A)).to(dtype))
    assert ((twice.double() - truth).abs() > 0.501 * unit).any()  # rounding s·B·A first would be seen


@each_kind
def test_delta_weight_is_s_B_A_as_the_base_stores_it_without_a_graph(kind):
    layer, base = layer_of(kind), base_of(kind)
    delta = layer.delta_weight()
    assert delta.shape == base.weight.shape and not delta.requires_grad
    assert error(delta, dense(kind, layer, base).weight - base.weight) <= 1e-6


@each_kind
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_merged_and_unmerged_outputs_agree(kind, dtype):
    layer, x = layer_of(kind, dtype), KINDS[kind].batch(dtype)
    y = output(layer, x)
    layer.merge()
    assert output(layer, x).dtype == dtype
    assert error(output(layer, x), y) <= 4 * torch.finfo(dtype).eps
    base = base_of(kind, dtype)
    assert error(y, base(x)) > 0.1


@each_kind
def test_merged_inference_is_the_bases_forward_with_one_weight(kind):
    layer, base, x = layer_of(kind), base_of(kind), KINDS[kind].batch()
    layer.eval().merge()
    formed = layer.merged_weight
    base.weight = nn.Parameter(formed)
    assert same_bits(output(layer, x), base(x))
    assert layer.merged_weight is formed  # once, not at every call


@each_kind
def test_train_unmerges_and_eval_changes_no_number(kind):  # pitfall 15: microsoft/LoRA#34, #61
    layer, x = layer_of(kind), KINDS[kind].batch()
    y, before = output(layer, x), bits(layer.weight)
    for state in (layer.eval, layer.eval, layer.train, layer.eval, layer.train, layer.train):
        assert state() is layer
        assert not layer.merged and same_bits(output(layer, x), y)
    layer.eval()
    layer.merge()
    merged = output(layer, x)
    layer.eval()
    assert layer.merged and same_bits(output(layer, x), merged)
    model = nn.Sequential(layer)
    model.train()
    assert not layer.merged and layer.training and same_bits(output(layer, x), y)
    model.eval()
    assert not layer.merged and not layer.training  # merging is asked for, never assumed
    assert same_bits(output(layer, x), y) and same_bits(layer.weight, before)


@each_kind
def test_a_merged_layer_still_gives_gradients(kind):
    layer, x = layer_of(kind).eval(), KINDS[kind].batch()
    wanted = [layer.lora_A, layer.lora_B]
    truth = torch.autograd.grad(layer(x).square().sum(), wanted)
    layer.merge()
    for own, other in zip(torch.autograd.grad(layer(x).square().sum(), wanted), truth):
        assert torch.equal(own, other) and own.any()
    for frozen, left in ((layer.lora_A, layer.lora_B), (layer.lora_B, layer.lora_A)):
        frozen.requires_grad_(False)
        assert torch.autograd.grad(layer(x).square().sum(), left)[0].any()
        frozen.requires_grad_(True)


@of_floats
def test_a_merged_layer_with_a_frozen_adapter_passes_gradients_to_its_input(kind):
    layer = layer_of(kind, F64).eval().requires_grad_(False)
    x = KINDS[kind].batch(F64).requires_grad_()
    (truth,) = torch.autograd.grad(layer(x).square().sum(), x)
    with torch.inference_mode():  # where nothing that is made may meet autograd later
        layer.merge()
        layer(x)
    layer.adapted_forward = None  # no adapter is trained, so none is computed
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, truth)


@each_kind
def test_a_layer_that_inference_mode_made_merges(kind):
    x = KINDS[kind].batch()
    with torch.inference_mode():
        layer = layer_of(kind).eval()
        y = layer(x)
        layer.merge()
        assert error(layer(x), y) <= 1e-6
        layer.unmerge()
        assert same_bits(layer(x), y)


def other_state(layer):
    return {name: normal(*value.shape, seed=20 + i) for i, (name, value) in enumerate(layer.state_dict().items())}


def step_of_an_optimizer(layer, x):
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()


def new_parameters(layer, x):
    layer.lora_A, layer.lora_B = nn.Parameter(layer.lora_A + 1), nn.Parameter(layer.lora_B * 2)


def other_data(layer, x):
    layer.lora_A.data = layer.lora_A.data + 1


CHANGES = {
    "optimizer step": step_of_an_optimizer,
    "load_state_dict": lambda layer, x: layer.load_state_dict(other_state(layer)),
    "load_state_dict, assigned": lambda layer, x: layer.load_state_dict(other_state(layer), assign=True),
    "state of a twin, assigned": lambda layer, x: layer.load_state_dict(
        randomize(copy.deepcopy(layer), seed=5).state_dict(), assign=True
    ),
    "A alone": lambda layer, x: layer.lora_A.detach().mul_(2),
    "B alone": lambda layer, x: layer.lora_B.detach().mul_(2),
    "W0": lambda layer, x: layer.weight.detach().mul_(2),
    "new parameters": new_parameters,
    "other data": other_data,
    "float64": lambda layer, x: layer.double(),
}


@each_kind
@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_merge_is_formed_anew(kind, change):  # pitfall 15: microsoft/LoRA#34, #61
    layer, x = layer_of(kind).eval(), KINDS[kind].batch()
    layer.merge()
    before = output(layer, x)
    CHANGES[change](layer, x)
    x = x.to(layer.weight.dtype) if x.is_floating_point() else x
    base = base_of(kind)
    base.load_state_dict({name: value for name, value in layer.state_dict().items() if not name.startswith("lora_")})
    base.to(layer.weight.dtype).weight = nn.Parameter(layer.weight.detach())
    truth = dense(kind, layer, base)(x.double() if x.is_floating_point() else x)
    assert layer.merged
    assert error(output(layer, x), truth) <= 4 * torch.finfo(layer.weight.dtype).eps
    assert change == "float64" or error(before, truth) > 1e-3


@each_kind
def test_a_merge_survives_a_copy_and_the_copy_is_its_own(kind):
    layer, x = layer_of(kind).eval(), KINDS[kind].batch()
    layer.merge()
    twin = copy.deepcopy(layer)
    y = output(layer, x)
    assert twin.merged and same_bits(output(twin, x), y)
    with torch.no_grad():  # as many writes as the original saw
        twin.lora_A.mul_(2)
        twin.lora_B.mul_(2)
    assert error(output(twin, x), dense(kind, twin, base_of(kind))(x.double() if x.is_floating_point() else x)) <= 1e-6
    assert same_bits(output(layer, x), y)


def test_a_copy_that_is_written_to_before_its_first_use_is_not_stale():
    layer, x = LoRALinear(base_of("Linear"), CONFIG).eval(), normal(4, 7)
    with torch.no_grad():
        layer.lora_A.add_(1)
        layer.lora_B.add_(1)
        layer.weight.add_(1)
        layer.merge()
        twin = copy.deepcopy(layer)
        for part in (twin.lora_A, twin.lora_B, twin.weight):
            part.add_(1)
    assert error(output(twin, x), dense("Linear", twin, twin_base(twin))(x.double())) <= 1e-6


def twin_base(layer):
    base = nn.Linear(7, 5)
    base.weight, base.bias = nn.Parameter(layer.weight.detach().clone()), nn.Parameter(layer.bias.detach().clone())
    return base


@each_kind
def test_merging_twice_and_unmerging_what_is_not_merged_are_refused(kind):
    layer = layer_of(kind)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    merged = bits(layer.merged_weight)
    with pytest.raises(RuntimeError, match=r"merged already; unmerge\(\) it first"):
        layer.merge()
    assert same_bits(layer.merged_weight, merged)


@each_kind
def test_functional_calls_see_their_own_factors_merged_or_not(kind):
    layer, base = layer_of(kind).eval(), base_of(kind)
    x = KINDS[kind].batch()
    As = torch.stack([layer.lora_A.detach() * c for c in (1, -2, 0.5)])
    layer.merge()
    y = output(layer, x)
    with torch.no_grad():
        one = functional_call(layer, {"lora_A": As[1]}, (x,))
        many = vmap(lambda A: functional_call(layer, {"lora_A": A}, (x,)))(As)
    other = copy.deepcopy(layer)
    other.lora_A.data.copy_(As[1])
    truth = dense(kind, other, base)(x.double() if x.is_floating_point() else x)
    assert error(one, truth) <= 1e-6 and error(many[1], truth) <= 1e-6
    assert same_bits(output(layer, x), y) and type(layer.merged_weight) is torch.Tensor


@pytest.mark.parametrize("merged", [False, True])
def test_a_compiled_layer_computes_the_same(merged):
    torch._dynamo.reset()
    model = nn.Sequential(layer_of("Linear"), LoRALinear(nn.Linear(5, 4), LoRAConfig(r=2, lora_alpha=7))).eval()
    if merged:
        model[0].merge(), model[1].merge()
    x = KINDS["Linear"].batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    assert error(output(compiled, x), output(model, x)) <= 1e-6
    torch._dynamo.reset()


# the state dict


@each_kind
def test_the_state_dict_is_the_same_merged_or_not_and_its_names_are_the_bases(kind):
    layer, base = layer_of(kind), base_of(kind)
    before = {name: bits(value) for name, value in layer.state_dict().items()}
    assert set(before) == set(base.state_dict()) | {"lora_A", "lora_B"}
    layer.eval().merge()
    after = layer.state_dict()
    assert list(after) == list(before) and all(same_bits(after[name], before[name]) for name in before)


@each_kind
@pytest.mark.parametrize("into", ["merged", "unmerged"])
def test_a_state_saved_merged_is_not_counted_twice(kind, into):  # pitfall 15: microsoft/LoRA#34
    layer, x = layer_of(kind).eval(), KINDS[kind].batch()
    y = output(layer, x)
    layer.merge()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = KINDS[kind].layer(base_of(kind, seed=1), CONFIG).eval()
    if into == "merged":
        other.merge()
        output(other, x)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert error(output(other, x), y) <= 1e-6
    if not other.merged:
        other.merge()
    assert error(output(other, x), y) <= 1e-6
    other.unmerge()
    assert same_bits(output(other, x), y)


@each_kind
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_safetensors_takes_the_state_for_nothing_is_shared_or_scattered(kind, start, tmp_path):  # pitfall 25: peft#1876
    layer = KINDS[kind].layer(base_of(kind), LoRAConfig(r=3, lora_alpha=5, init_lora_weights=start))
    layer.merge()
    state = layer.state_dict()
    assert all(value.is_contiguous() for value in state.values())
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    save_file(state, tmp_path / "layer.safetensors")
    loaded = load_file(tmp_path / "layer.safetensors")
    assert all(same_bits(loaded[name], value) for name, value in state.items())


@each_kind
def test_layers_are_copied_pickled_and_cast(kind):
    layer, x = layer_of(kind), KINDS[kind].batch()
    y = output(layer, x)
    for merged in (False, True):
        if merged:
            layer.eval().merge()
            y = output(layer, x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.merged == merged and same_bits(output(twin, x), y)
            assert not twin.weight.requires_grad and twin.lora_A.requires_grad and twin.lora_B.requires_grad
            assert twin.lora_A.data_ptr() != layer.lora_A.data_ptr()
    wide = copy.deepcopy(layer).double()
    truth = dense(kind, wide, base_of(kind))(x.double() if x.is_floating_point() else x)
    x = x.double() if x.is_floating_point() else x
    assert output(wide, x).dtype == F64 and error(output(wide, x), truth) <= 1e-14
    assert wide.merged_weight.dtype == F64


@each_kind
@pytest.mark.parametrize("start", list(INITIALIZERS)[:-1])
def test_on_the_meta_device_a_layer_has_shapes_and_no_numbers(kind, start, rng_untouched):
    layer = KINDS[kind].layer(base_of(kind).to("meta"), LoRAConfig(r=2, lora_alpha=3, init_lora_weights=start))
    assert layer.lora_A.shape == (2, KINDS[kind].k) and layer.lora_B.shape == (KINDS[kind].d, 2)
    assert all(p.is_meta for p in layer.parameters())
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    x = KINDS[kind].batch()
    shape = base_of(kind)(x).shape
    assert layer(x.to("meta")).shape == shape
    layer.merge()
    assert output(layer, x.to("meta")).shape == shape


# what is shared


@pytest.mark.parametrize("start", ["pissa", "lora_ga"])
def test_a_start_with_its_own_base_leaves_a_shared_weight_alone(start):  # pitfall 14: peft#2184
    for kind in KINDS:
        base, holder = base_of(kind), base_of(kind)
        holder.weight = base.weight
        before, x = bits(base.weight), KINDS[kind].batch()
        y, d, k = base(x).detach(), KINDS[kind].d, KINDS[kind].k
        given_start, config = None, LoRAConfig(r=2, lora_alpha=3, init_lora_weights=start)
        if start == "lora_ga":
            matrix = base.weight.detach().T if kind in ("Conv1D", "Embedding") else base.weight.detach().reshape(d, k)
            given_start = lora_ga(matrix, 2, config.scale, gradient=normal(d, k))
        layer = KINDS[kind].layer(base, config, init=given_start)
        assert same_bits(base.weight, before) and holder.weight is base.weight and base.weight.requires_grad
        assert layer.weight is not base.weight and not layer.weight.requires_grad
        assert layer.weight.shape == base.weight.shape and layer.weight.is_contiguous()
        assert not torch.equal(layer.weight, before)
        torch.testing.assert_close(layer(x), y)
        layer(x).sum().backward()
        assert layer.lora_A.grad.any() and layer.lora_B.grad.any(), kind


def test_merging_a_tied_layer_leaves_the_other_holder_alone():  # pitfall 9: peft#2018, #2777
    embedding = nn.Embedding(11, 5)
    head = nn.Linear(5, 11, bias=False)
    head.weight = embedding.weight
    x, before = normal(4, 5), bits(embedding.weight)
    logits, tokens = head(x), ids(2, 9)
    y = embedding(tokens)
    layer = randomize(LoRALinear(head, CONFIG))
    assert layer.weight is embedding.weight
    layer.merge()
    assert error(output(layer, x), logits) > 0.1
    assert same_bits(embedding(tokens), y) and same_bits(embedding.weight, before)
    other = randomize(LoRAEmbedding(embedding, CONFIG), seed=7)
    other.merge()
    assert same_bits(layer.weight, before) and layer.weight is other.weight


def test_two_layers_from_one_start_are_trained_apart():
    start = kaiming(base_of("Linear").weight.detach(), 3, generator=generator())
    first, second = (LoRALinear(base_of("Linear"), CONFIG, init=start) for _ in range(2))
    before = bits(second.lora_A)
    with torch.no_grad():
        first.lora_A.add_(1)
        first.lora_B.add_(1)
    assert same_bits(second.lora_A, before) and not second.lora_B.any()
    assert same_bits(start.A, before) and not start.B.any()


# freezing


@each_kind
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_one_optimizer_step_changes_the_factors_and_the_bias_that_was_asked_for(kind, bias):
    base = base_of(kind)
    layer = randomize(KINDS[kind].layer(base, LoRAConfig(r=3, lora_alpha=5, bias=bias)))
    before = {name: bits(value) for name, value in layer.state_dict().items()}
    trained = {"lora_A", "lora_B"} | ({"bias"} if bias != "none" and kind != "Embedding" else set())
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == trained
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(KINDS[kind].batch()).square().sum().backward()
    assert layer.weight.grad is None
    optimizer.step()
    changed = {name for name, value in layer.state_dict().items() if not same_bits(value, before[name])}
    assert changed == trained


@each_kind
def test_the_layer_holds_the_bases_own_parameters(kind):
    base = base_of(kind)
    layer = KINDS[kind].layer(base, CONFIG)
    assert layer.weight is base.weight and layer.bias is getattr(base, "bias", None)
    assert len(list(layer.parameters())) == len(list(base.parameters())) + 2


def test_a_base_without_bias():
    base = nn.Linear(7, 5, bias=False)
    layer, x = randomize(LoRALinear(base, LoRAConfig(r=3, lora_alpha=5, bias="all"))), normal(2, 7)
    assert layer.bias is None
    assert error(layer(x), dense("Linear", layer, base)(x.double())) <= 1e-6


# how A and B begin


@each_kind
def test_A_and_B_begin_as_the_named_start_says_and_are_repeatable(kind, rng_untouched):
    for name in list(INITIALIZERS)[:-1]:
        config = LoRAConfig(r=2, lora_alpha=3, init_lora_weights=name)
        one, again, other = (KINDS[kind].layer(base_of(kind), config, generator=generator(seed)) for seed in (4, 4, 5))
        assert same_bits(one.lora_A, again.lora_A) and same_bits(one.lora_B, again.lora_B), name
        if name not in ("zero", "pissa"):
            assert not (same_bits(one.lora_A, other.lora_A) and same_bits(one.lora_B, other.lora_B)), name
        if not (kind == "Embedding" and name == "kaiming"):
            base = base_of(kind).weight.detach()
            matrix = base.T if kind in ("Conv1D", "Embedding") else base.reshape(len(base), -1)
            truth = INITIALIZERS[name](matrix, 2, 1.5, generator(4))
            assert same_bits(one.lora_A, truth.A) and same_bits(one.lora_B, truth.B), name


def test_an_embedding_begins_with_A_zero_and_B_normal_as_pefts_and_loralibs():
    base = nn.Embedding(500, 300)
    layer = LoRAEmbedding(copy.deepcopy(base), LoRAConfig(r=40, lora_alpha=5), generator=generator())
    peft_base = inject_adapter_in_model(LoraConfig(r=40, target_modules=["0"]), nn.Sequential(copy.deepcopy(base)))[0]
    starts = {
        "lora_ref": (layer.lora_A, layer.lora_B),
        "peft": (peft_base.lora_embedding_A["default"], peft_base.lora_embedding_B["default"]),
        "loralib": (lambda other: (other.lora_A, other.lora_B))(loralib.Embedding(500, 300, r=40)),
    }
    n = 300 * 40
    for name, (A, B) in starts.items():
        assert A.shape == (40, 500) and B.shape == (300, 40) and not A.any(), name
        assert abs(B.mean().item()) <= 5 / math.sqrt(n) and abs(B.var().item() - 1) <= 5 * math.sqrt(2 / n), name


def test_a_given_start_is_used_and_overrides_the_config():
    A, B = normal(3, 7), normal(5, 3, seed=1)
    base = base_of("Linear")
    layer = LoRALinear(base, CONFIG, init=Init(A, B, base.weight.detach()))
    assert same_bits(layer.lora_A, A) and same_bits(layer.lora_B, B) and layer.weight is base.weight
    layer = LoRALinear(base_of("Linear"), CONFIG, init=Init(A, B, normal(5, 7, seed=2)))
    assert same_bits(layer.weight, normal(5, 7, seed=2)) and not layer.weight.requires_grad


def test_factors_of_a_start_may_be_scattered():
    start = Init(normal(18, 3).T, normal(3, 5, seed=1).T, normal(18, 5, seed=2).T)
    base = nn.Conv2d(2, 5, 3)
    layer = LoRAConv2d(base, CONFIG, init=start)
    assert all(p.is_contiguous() for p in layer.parameters())
    x, W = normal(1, 2, 6, 6), start.W0 + 5 / 3 * start.B @ start.A
    torch.testing.assert_close(layer(x), F.conv2d(x, W.reshape(5, 2, 3, 3), base.bias))


def test_the_text_of_a_layer_says_its_numbers():
    layer = LoRALinear(nn.Linear(7, 5), LoRAConfig(r=2, lora_alpha=3, use_rslora=True, lora_dropout=0.1))
    assert repr(layer) == "LoRALinear(d=5, k=7, r=2, lora_alpha=3, scale=2.12132 (α/√r), lora_dropout=0.1)"
    layer.merge()
    assert repr(layer).endswith("lora_dropout=0.1, merged)")
    assert (
        repr(LoRAConv2d(nn.Conv2d(2, 5, 3), CONFIG)) == "LoRAConv2d(d=5, k=18, r=3, lora_alpha=5, scale=1.66667 (α/r))"
    )


# bad input


class OtherForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherEmbedding(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


NamedConv1D = type("Conv1D", (nn.Linear,), {})  # not GPT-2's
WithNf = type("WithNf", (nn.Linear,), {"nf": 5})


def with_weight(weight):
    base = nn.Linear(7, 5)
    base.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return base


W = torch.ones(5, 7)
BAD = {
    "own forward": (LoRALinear, lambda: OtherForward(7, 5), {}, ["OtherForward", "forward of its own"]),
    "own embedding": (LoRAEmbedding, lambda: OtherEmbedding(11, 5), {}, ["OtherEmbedding", "forward of its own"]),
    "Conv1D as Linear": (LoRALinear, lambda: Conv1D(5, 7), {}, ["wraps Linear", "got Conv1D"]),
    "Linear as Conv1D": (LoRAConv1D, lambda: nn.Linear(7, 5), {}, ["GPT-2", "got Linear", "use LoRALinear"]),
    "another Conv1D": (LoRAConv1D, lambda: NamedConv1D(7, 5), {}, ["GPT-2", "got Conv1D"]),
    "another with nf": (LoRAConv1D, lambda: WithNf(7, 5), {}, ["GPT-2", "got WithNf"]),
    "Conv1d as Conv2d": (LoRAConv2d, lambda: nn.Conv1d(2, 5, 3), {}, ["wraps Conv2d", "got Conv1d"]),
    "transposed": (LoRAConv2d, lambda: nn.ConvTranspose2d(2, 5, 3), {}, ["wraps Conv2d", "got ConvTranspose2d"]),
    "Linear as Embedding": (LoRAEmbedding, lambda: nn.Linear(7, 5), {}, ["wraps Embedding", "got Linear"]),
    "adapted twice": (
        LoRALinear,
        lambda: LoRALinear(nn.Linear(7, 5), CONFIG),
        {},
        ["LoRALinear has an adapter already"],
    ),
    "None": (LoRALinear, lambda: None, {}, ["wraps Linear", "got NoneType"]),
    "integers": (LoRALinear, lambda: with_weight(W.to(torch.int8)), {}, ["torch.int8", "dequantise"]),
    "float8": (LoRALinear, lambda: with_weight(W.to(torch.float8_e4m3fn)), {}, ["float8_e4m3fn", "dequantise"]),
    "of attention": (LoRALinear, lambda: nn.MultiheadAttention(8, 2).out_proj, {}, ["nn.MultiheadAttention"]),
    "nan": (LoRALinear, lambda: with_weight(W * math.nan), {}, ["35 NaN"]),
    "parametrized": (LoRALinear, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(7, 5)), {}, ["computed"]),
    "groups": (LoRAConv2d, lambda: nn.Conv2d(4, 8, 3, groups=2), {}, ["groups = 2", "groups = 1"]),
    "padding_mode": (LoRAConv2d, lambda: nn.Conv2d(4, 8, 3, padding_mode="circular"), {}, ["'circular'", "'zeros'"]),
    "max_norm": (LoRAEmbedding, lambda: nn.Embedding(11, 5, max_norm=1.5), {}, ["max_norm = 1.5", "unset it"]),
    "sparse": (LoRAEmbedding, lambda: nn.Embedding(11, 5, sparse=True), {}, ["sparse = True", "unset it"]),
    "rank": (LoRALinear, lambda: nn.Linear(7, 5), {"config": LoRAConfig(r=6, lora_alpha=5)}, ["r = 6", "1 and 5"]),
    "rank on meta": (
        LoRALinear,
        lambda: nn.Linear(7, 5, device="meta"),
        {"config": LoRAConfig(r=6, lora_alpha=5)},
        ["r = 6", "1 and 5"],
    ),
    "config": (LoRALinear, lambda: nn.Linear(7, 5), {"config": {"r": 2}}, ["LoRAConfig", "{'r': 2}"]),
    "seed": (LoRALinear, lambda: nn.Linear(7, 5), {"generator": 3}, ["got 3 of type int", "manual_seed"]),
    "seed on meta": (LoRALinear, lambda: nn.Linear(7, 5, device="meta"), {"generator": 3}, ["got 3 of type int"]),
    "Conv1D's config": (LoRAConv1D, lambda: Conv1D(5, 7), {"config": None}, ["LoRAConfig", "None"]),
    "lora_ga": (
        LoRALinear,
        lambda: nn.Linear(7, 5),
        {"config": LoRAConfig(r=2, lora_alpha=5, init_lora_weights="lora_ga")},
        ["'lora_ga'", "gradient", "init=lora_ga("],
    ),
    "odd rank": (
        LoRALinear,
        lambda: nn.Linear(7, 5),
        {"config": LoRAConfig(r=3, lora_alpha=5, init_lora_weights="orthogonal")},
        ["r = 3", "even"],
    ),
    "start a tuple": (LoRALinear, lambda: nn.Linear(7, 5), {"init": (W[:3], W[:, :3], W)}, ["Init(A, B, W0)"]),
    "start's A": (LoRALinear, lambda: nn.Linear(7, 5), {"init": Init(W[:2], W[:, :3], W)}, ["A (2, 7)", "A (3, 7)"]),
    "start's B": (LoRALinear, lambda: nn.Linear(7, 5), {"init": Init(W[:3], W[:3, :5], W)}, ["B (3, 5)", "B (5, 3)"]),
    "start's W0": (LoRALinear, lambda: nn.Linear(7, 5), {"init": Init(W[:3], W[:, :3], W.T)}, ["W0 (7, 5)"]),
}


@pytest.mark.parametrize("what", BAD)
def test_a_base_or_start_that_does_not_fit_is_refused_and_left_alone(what, refused, rng_untouched):
    layer, make, options, says = BAD[what]
    with torch.random.fork_rng():
        base = make()
    parameters = list(base.parameters()) if base is not None else []
    before = [(p.detach().clone(), p.requires_grad, p._version) for p in parameters]
    names = list(base.state_dict()) if base is not None else []
    refused(lambda: layer(base, **({"config": CONFIG} | options)), *says)
    for p, (value, requires_grad, version) in zip(parameters, before, strict=True):
        assert p.is_meta or torch.equal(p.float().nan_to_num(), value.float().nan_to_num())
        assert p.requires_grad == requires_grad and p._version == version
    assert names == (list(base.state_dict()) if base is not None else [])


def test_the_default_config_is_LoRAConfigs():
    assert LoRALinear(nn.Linear(9, 10)).config == LoRAConfig()


def test_bad_input_to_a_layer_is_refused_as_by_lora_linear(refused):
    layer = layer_of("Linear")
    refused(lambda: layer(normal(2, 6)), "x (2, 6)", "(…, 7)")
    refused(lambda: layer(ids(2, 7)), "torch.int64")
    refused(lambda: layer(normal(2, 7, dtype=F16)), "torch.float16", "cast x")
