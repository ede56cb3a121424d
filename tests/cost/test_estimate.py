"""lora_ref.cost: whole steps against the known sums, real models, the call and what it refuses."""

import ast
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_ref.cost
from lora_ref import LoRAConfig, add_lora
from lora_ref.cost import SCHEMES, cost

from .steps import build, query_value, transformers


def test_full_fine_tuning_takes_six_flops_per_weight_and_token_and_attention():
    model = build("LlamaForCausalLM", device="meta")
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    own = cost(model, batch=3, length=32)
    attention = 2 * 2 * 3 * 32 * 32 * 48  # layers · 2N·L·q
    assert own.flops_forward == 2 * 96 * linear + 2 * attention
    assert own.flops_backward == 4 * 96 * linear + 5 * attention


@pytest.mark.parametrize("d, r", [(1024, 8), (2048, 8), (2048, 64)])
def test_lora_takes_two_thirds_plus_2r_over_d_of_full_fine_tuning(d, r):
    """On square layers; attention on two tokens, a tiny head and the first of 64 layers hardly count."""
    square = {"hidden_size": d, "intermediate_size": d, "num_hidden_layers": 64, "num_key_value_heads": 4}
    model = build("LlamaForCausalLM", device="meta", **square)
    config = LoRAConfig(r=r, lora_alpha=3, target_modules="all-linear")
    ratio = cost(model, config, batch=1, length=2).flops / cost(model, batch=1, length=2).flops
    assert ratio == pytest.approx(2 / 3 + 2 * r / d, abs=0.004)


def test_nothing_is_run(monkeypatch):
    model = build("LlamaForCausalLM", device="meta")

    def refuse(*_, **__):
        raise AssertionError("cost ran the model")

    for kind in {type(module) for module in model.modules()}:
        monkeypatch.setattr(kind, "forward", refuse)
    assert cost(model, query_value("LlamaForCausalLM"), batch=1, length=9).flops > 0


@pytest.fixture(scope="module")
def llama_7b():
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(attn_implementation="sdpa"))


@pytest.fixture(scope="module")
def llama_70b():
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    large |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**large))


LLAMA_QV = LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])


def test_llama_7b(llama_7b):
    full = cost(llama_7b, batch=1, length=2048, scheme="mixed")
    lora = cost(llama_7b, LLAMA_QV, batch=1, length=2048, scheme="mixed")
    assert full.parameters == full.trainable == 6_738_415_616
    assert lora.trainable == 32 * 2 * 8 * (4096 + 4096) == 4_194_304
    assert lora.parameters == 6_742_609_920
    assert lora.peak < 24e9 < 80e9 < full.peak
    assert 0.6 < lora.flops / full.flops < 0.75
    assert 0.7 < lora.activations / full.activations < 0.8  # most stay: LoRA is no saving of activations


def test_llama_70b_takes_138_gb_of_weights_and_a_terabyte_to_tune_in_full(llama_70b):
    """The popular 600 GB are pure bf16; mixed precision takes 1.1 TB. The popular 160 GB for LoRA are not exceeded."""
    shape = {"batch": 1, "length": 2048, "checkpointing": True}
    full = {scheme: cost(llama_70b, scheme=scheme, **shape) for scheme in ("bf16", "mixed")}
    lora = {scheme: cost(llama_70b, LLAMA_QV, scheme=scheme, **shape) for scheme in ("bf16", "nf4")}
    assert full["bf16"].weights / 1e9 == pytest.approx(138, abs=0.1)
    assert full["bf16"].peak / 1e9 == pytest.approx(552, abs=1)
    assert full["mixed"].peak / 1e9 == pytest.approx(1104, abs=1)
    assert 138 < lora["bf16"].peak / 1e9 < 160
    assert 36 < lora["nf4"].weights / 1e9 < 37 and lora["nf4"].peak / 1e9 < 48


def test_gpt2_and_roberta_from_their_published_shapes():
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        shapes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
        roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**shapes))
    assert cost(gpt2, batch=4, length=1024).parameters == 124_439_808
    own = cost(roberta, query_value("RobertaForMaskedLM", r=8), batch=4, length=512)
    assert own.trainable == 12 * 2 * 8 * (768 + 768) == 294_912


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "RobertaForSequenceClassification"])
def test_a_config_means_the_model_as_add_lora_would_adapt_it_and_leaves_it_alone(name):
    model = build(name)

    def state():
        return {path: (one.requires_grad, one.device, one.data_ptr()) for path, one in model.named_parameters()}

    before = state()
    planned = cost(model, query_value(name), batch=2, length=9)
    assert state() == before
    applied = cost(add_lora(model, query_value(name)), batch=2, length=9)
    assert dataclasses.replace(planned, name="") == dataclasses.replace(applied, name="")
    on_meta = cost(build(name, device="meta"), query_value(name), batch=2, length=9)
    assert on_meta == planned


def test_the_table_says_everything(llama_7b):
    lines = str(cost(llama_7b, LLAMA_QV, batch=1, length=2048, scheme="nf4", checkpointing=True)).splitlines()
    assert lines[0] == "LlamaForCausalLM, 1 × 2048 tokens, nf4, r = 8, checkpointing"
    assert lines[1].split() == ["parameters", "6,742,609,920"]
    assert lines[2].split() == ["trained", "4,194,304", "0.0622", "%"]
    names = ["FLOPs", "FLOPs", "weights", "master", "optimizer", "gradients", "activations", "logits", "peak"]
    assert [line.split()[0] for line in lines[3:]] == names
    assert all(line.endswith(" GB") for line in lines[5:])
    assert str(cost(build("LlamaForCausalLM", device="meta"), batch=1, length=9)).endswith(" MB")


def test_it_needs_torch_alone():
    sources = sorted(Path(lora_ref.cost.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    names = set()
    for node in (node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"batch": 0}, ["batch = 0", "at least 1"]),
        ({"length": 2.5}, ["length must be an integer", "2.5"]),
        ({"scheme": "fp8"}, ["scheme = 'fp8'", "'mixed'", "'nf4'"]),
        ({"scheme": SCHEMES["bf16"]._replace(activation=1)}, ["activation = 1", "2 or 4"]),
        ({"scheme": "nf4"}, ["frozen linear layers", "'mixed'"]),
        ({"checkpointing": 1}, ["checkpointing must be True or False", "1"]),
        ({"config": LoRAConfig(target_modules=["q_prj"])}, ["'q_prj'", "did you mean 'q_proj'"]),
        ({"config": LoRAConfig(r=99, target_modules=["q_proj"])}, ["q_proj", "r = 99"]),
        ({"config": LoRAConfig(target_modules=["embed_tokens"])}, ["model.embed_tokens is a LoRAEmbedding", "target"]),
    ],
)
def test_bad_arguments_are_refused(changes, says, refused):
    model = build("LlamaForCausalLM", device="meta")
    refused(lambda: cost(model, **({"batch": 1, "length": 8} | changes)), *says)


def test_models_without_a_formula_are_refused(refused):
    shape = {"batch": 1, "length": 8}
    refused(lambda: cost("llama", **shape), "model must be a torch.nn.Module", "str")
    refused(lambda: cost(nn.Linear(2, 3), **shape), "no formula for a Linear", "LlamaForCausalLM")
    model = build("LlamaForCausalLM", device="meta")
    refused(lambda: cost(model.model, **shape), "no formula for a LlamaModel")
    refused(lambda: cost(model.requires_grad_(False), **shape), "nothing is trained", "requires_grad_(True)")
    other = build("LlamaForCausalLM", "flex_attention", device="meta")
    refused(lambda: cost(other, **shape), "attn_implementation = 'flex_attention'", "'sdpa' or 'eager'")
    swish = build("LlamaForCausalLM", device="meta", hidden_act="mish")
    refused(lambda: cost(swish, **shape), "activation 'mish'", "silu")
    model.model.layers[1].mlp.up_proj = nn.Identity()
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.empty(3, 3))
    refused(
        lambda: cost(model.requires_grad_(True), **shape), "model.layers.1.mlp.up_proj is a Identity", "plain model"
    )


@pytest.mark.parametrize(
    "name, option",
    [("GPT2LMHeadModel", "reorder_and_upcast_attn"), ("BertForMaskedLM", "is_decoder")]
    + [("BertForMaskedLM", "chunk_size_feed_forward")],
)
def test_options_that_change_the_step_are_refused(name, option, refused):
    model = build(name, device="meta")
    setattr(model.config, option, True)
    refused(lambda: cost(model, batch=1, length=8), f"{option} = True", "without")
