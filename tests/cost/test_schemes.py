"""lora_ref.cost.schemes: the bytes of weights, gradients, moments and master copies."""

import pytest
import torch

from lora_ref.cost import NF4_BITS, SCHEMES, Scheme, cost

from .steps import Step, build, query_value


def test_full_fine_tuning_in_mixed_precision_takes_16_bytes_a_parameter():
    own = cost(build("LlamaForCausalLM", device="meta"), batch=1, length=8, scheme="mixed")
    P = own.parameters
    assert (own.weights, own.gradients, own.master, own.optimizer) == (2 * P, 2 * P, 4 * P, 8 * P)
    assert own.states == 16 * P
    for scheme, width in {"fp32": 16, "bf16": 8}.items():
        assert cost(build("LlamaForCausalLM", device="meta"), batch=1, length=8, scheme=scheme).states == width * P


def test_lora_takes_2_bytes_a_frozen_and_16_an_adapter_parameter():
    name = "LlamaForCausalLM"
    own = cost(build(name, device="meta"), query_value(name), batch=1, length=8, scheme="mixed")
    assert own.trainable == 2 * 2 * 3 * (48 + 48)
    assert own.states == 2 * (own.parameters - own.trainable) + 16 * own.trainable
    assert own.optimizer == 8 * own.trainable and own.gradients == 2 * own.trainable


def test_add_lora_holds_a_16_bit_bases_adapter_in_16_bytes_too():
    step = Step(build("LlamaForCausalLM", dtype=torch.bfloat16), query_value("LlamaForCausalLM"))
    optimizer = torch.optim.AdamW([one for one in step.model.parameters() if one.requires_grad])
    step.backward()
    optimizer.step()
    tensors = [*step.model.parameters(), *[p.grad for p in step.model.parameters() if p.grad is not None]]
    tensors += [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    assert step.cost(scheme="mixed").states == sum(tensor.nbytes for tensor in tensors)


def test_nf4_takes_4_and_an_eighth_bits_for_frozen_linear_layers_alone():
    assert NF4_BITS == pytest.approx(4.127, abs=5e-4)
    name = "LlamaForCausalLM"
    model = build(name, device="meta")
    own, mixed = (cost(model, query_value(name), batch=1, length=8, scheme=s) for s in ("nf4", "mixed"))
    linear = sum(layer.weight.numel() for path, layer in model.named_modules() if path.endswith("_proj"))
    assert mixed.weights - own.weights == pytest.approx(linear * (2 - NF4_BITS / 8), abs=1)
    assert own.flops == mixed.flops and own.activations == mixed.activations and own.optimizer == mixed.optimizer
    gpt2 = cost(
        build("GPT2LMHeadModel", device="meta"), query_value("GPT2LMHeadModel"), batch=1, length=8, scheme="nf4"
    )
    assert gpt2.weights < 2 * gpt2.parameters


def test_a_scheme_of_ones_own():
    model = build("LlamaForCausalLM", device="meta")
    sgd = cost(model, batch=1, length=8, scheme=SCHEMES["fp32"]._replace(moments=0))
    assert sgd.states == 8 * sgd.parameters and "own scheme" in sgd.name
    assert cost(model, batch=1, length=8, scheme=Scheme(*SCHEMES["bf16"])).peak == (
        cost(model, batch=1, length=8, scheme="bf16").peak
    )
