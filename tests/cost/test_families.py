"""lora_ref.cost.families: FLOPs and kept bytes of every family, exactly those that torch counts and saves."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_ref.cost import cost

from .steps import MODELS, Step, adapters, build, check, query_value


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_flops_and_kept_bytes_are_exactly_those_of_the_step(name, attention):
    for config in adapters(name).values():
        check(Step(build(name, attention), config))


@pytest.mark.parametrize("name", [name for name in MODELS if "Mask" not in name])
def test_a_checkpointed_step_runs_forwards_again_and_keeps_their_inputs(name):
    for adapter, config in adapters(name).items():
        own = check(Step(build(name), config, checkpointing=True))
        plain = Step(build(name), config).cost()
        assert own.flops_forward == plain.flops_forward and own.flops_backward > plain.flops_backward
        assert own.activations < plain.activations / 2, adapter


@settings(max_examples=12)
@given(
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3)]),
    sizes=st.tuples(*[st.integers(1, 6)] * 2),
    shape=st.tuples(st.integers(2, 4), st.integers(1, 40)),
    r=st.integers(1, 4),
    adapter=st.sampled_from(["full", "q, v", "all"]),
    attention=st.sampled_from(["sdpa", "eager"]),
)
def test_any_shape_of_llama_is_counted_exactly(heads, sizes, shape, r, adapter, attention):
    changes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 2 * sizes[0] + 4}
    changes |= {"hidden_size": 8 * heads[0], "intermediate_size": 7 * sizes[1]}
    config = adapters("LlamaForCausalLM")[adapter]
    config = config and dataclasses.replace(config, r=r)
    check(Step(build("LlamaForCausalLM", attention, **changes), config, *shape))


@pytest.mark.parametrize(
    "name, trained", [("LlamaForCausalLM", "norm"), ("BertForMaskedLM", "bias"), ("GPT2LMHeadModel", ".1.")]
)
def test_what_is_trained_is_what_requires_a_gradient(name, trained):
    model = build(name)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(trained in path)
    own = check(Step(model))
    assert own.trainable == sum(one.numel() for path, one in model.named_parameters() if trained in path)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_16_bit_numbers_are_kept_as_such_but_for_what_torch_computes_in_32(attention):
    for config in adapters("Qwen2ForCausalLM").values():
        step = Step(build("Qwen2ForCausalLM", attention, torch.bfloat16), config, 4, 200)
        own, wide = step.cost(scheme="bf16"), step.cost()
        assert own.activations + own.logits == step.saved()
        assert own.logits == wide.logits
        if attention == "sdpa":
            assert wide.activations / 2 < own.activations < 0.7 * wide.activations


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "RobertaForSequenceClassification", "LlamaForCausalLM"])
def test_dropout_keeps_a_mask_of_a_byte_per_number_as_on_a_gpu(name, monkeypatch):
    def native(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if p and training else x

    monkeypatch.setattr(nn.functional, "dropout", native)
    rates = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1} if name[0] == "G" else {"attention_dropout": 0.1}
    if name[0] == "R":
        rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    for config in adapters(name).values():
        with torch.random.fork_rng():
            own = check(Step(build(name, "eager", **rates), config))
        assert own.activations > cost(build(name, "eager"), config, batch=2, length=17).activations


def per_layer(name, config=None, attention="sdpa", **changes) -> float:
    """Numbers kept per token by one more layer."""
    key = "n_layer" if name[0] == "G" else "num_hidden_layers"
    few, more = (
        cost(build(name, attention, device="meta", **changes | {key: layers}), config, batch=3, length=32)
        for layers in (4, 5)
    )
    return (more.activations - few.activations) / (4 * 3 * 32)


def test_a_llama_layer_keeps_what_the_derivation_says():
    h, q, v, f, H, r = 48, 48, 24, 80, 4, 3
    assert per_layer("LlamaForCausalLM", num_key_value_heads=2) == 6 * h + 2 * q + 2 * v + 4 * f + H + 2
    left = 3 * h + 2 * q + 2 * v + 3 * f + H + 2 + 2 * r
    assert per_layer("LlamaForCausalLM", query_value("LlamaForCausalLM"), num_key_value_heads=2) == left
    eager = 6 * h + 4 * q + 4 * f + 2 + H * 32
    assert per_layer("LlamaForCausalLM", attention="eager", num_key_value_heads=2) == eager


def test_a_gpt2_and_a_bert_layer_keep_what_the_derivation_says():
    h, f, H = 48, 80, 4
    assert per_layer("GPT2LMHeadModel") == 8 * h + 5 * f + H + 4
    assert per_layer("BertForMaskedLM") == per_layer("RobertaForMaskedLM") == 8 * h + 2 * f + H + 4


@pytest.mark.parametrize(
    "name, limit, what",
    [("GPT2LMHeadModel", 1024, "positions"), ("BertForMaskedLM", 1024, "positions")]
    + [("RobertaForMaskedLM", 1022, "positions"), ("MistralForCausalLM", 11, "sliding window")],
)
def test_a_length_is_refused_where_the_model_or_its_mask_ends(name, limit, what, refused):
    model = build(name, device="meta", **({"sliding_window": 12} if name[0] == "M" else {}))
    assert cost(model, batch=1, length=limit).flops > 0
    refused(lambda: cost(model, batch=1, length=limit + 1), f"length = {limit + 1}", what, f"length <= {limit}")
