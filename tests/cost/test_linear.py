"""lora_ref.cost.linear: a linear layer and its adapter, alone and in a model."""

import itertools

import pytest
import torch

from lora_ref.cost import cost
from lora_ref.cost.linear import AdapterSize, LinearSize, adapter_flops, linear_flops
from lora_ref.functional import lora_linear, should_materialize

from .steps import Step, build, check, counted, query_value


@pytest.mark.parametrize("N", [40, 400])
@pytest.mark.parametrize("x, W, A, B", [case for case in itertools.product([False, True], repeat=4) if any(case)])
def test_every_choice_of_what_is_trained_is_counted_as_lora_linear_computes_it(N, x, W, A, B):
    d, k, r = 6, 10, 3
    X, W0 = torch.ones(N, k, requires_grad=x), torch.ones(d, k, requires_grad=W)
    factors = torch.ones(r, k, requires_grad=A), torch.ones(d, r, requires_grad=B)
    materialized = should_materialize(N, d, k, torch.float32)
    assert materialized == (N == 400)
    size, adapter = LinearSize(N, d, k, x, W), AdapterSize(r, A, B, materialized)
    sums = [base + more for base, more in zip(linear_flops(size), adapter_flops(size, adapter), strict=True)]

    def forward():
        return lora_linear(X, W0, None, *factors, 0.5)

    assert sums[0] == counted(forward)
    assert sum(sums) == counted(lambda: forward().sum().backward())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "RobertaForMaskedLM"])
def test_the_weight_that_lora_linear_forms_for_many_rows_is_counted(name):
    narrow = {"n_embd": 16, "n_inner": 24} if name[0] == "G" else {"hidden_size": 16, "intermediate_size": 24}
    step = Step(build(name, **narrow), query_value(name, target_modules="all-linear"), 4, 200)
    own, N, r, layers = check(step), 800, 3, step.cost().name.count("Llama") * 2
    if layers:  # gate_proj: 40·dk/(d+k) = 384 ≤ N; factored would add 2Nr(d+k), formed 2dkr + 2Nkr
        assert own.flops_forward < cost(step.model, batch=4, length=200, scheme="bf16").flops_forward
        factored = 2 * N * r * (4 * (16 + 16) + 3 * (16 + 24)) * layers
        assert (
            cost(step.model, batch=4, length=200, scheme="bf16").flops_forward
            == factored + cost(build(name, **narrow), batch=4, length=200).flops_forward
        )


PARTS = {
    "dropout": {"target_modules": "all-linear", "lora_dropout": 0.25},
    "bias": {"target_modules": ["k_proj", "down_proj"], "bias": "all"},
    "head and embeddings trained": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "head adapted": {"target_modules": ["k_proj", "lm_head"]},
    "o": {"target_modules": ["o_proj"]},
    "ranks": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 7}},
}


@pytest.mark.parametrize("part", PARTS)
def test_every_kind_of_adapter_is_counted_exactly(part):
    for attention in ("sdpa", "eager"):
        check(Step(build("Qwen2ForCausalLM", attention), query_value("Qwen2ForCausalLM", **PARTS[part])))
