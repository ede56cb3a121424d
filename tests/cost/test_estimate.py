"""lora_ref.cost: FLOPs against torch's counter, kept bytes and peaks against measurements, real models against sums."""

import ast
import dataclasses
import gc
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import flop_counter

from lora_ref import LoRAConfig, add_lora
from lora_ref.cost import cost
from lora_ref.cost import estimate as cost_module
from lora_ref.cost.estimate import NF4_BITS, SCHEMES, Cost, Scheme
from lora_ref.measure import peak_bytes, saved_bytes

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
GPT2 = {"vocab_size": 101, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_inner": 80, "n_positions": 1024}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
BERT = {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA | {"num_key_value_heads": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA),
    "MistralForCausalLM": ("MistralConfig", LLAMA),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "BertForMaskedLM": ("BertConfig", BERT),
    "BertForSequenceClassification": ("BertConfig", BERT),
    "RobertaForMaskedLM": ("RobertaConfig", BERT),
    "RobertaForSequenceClassification": ("RobertaConfig", BERT),
}
QUERY_VALUE = {"GPT2LMHeadModel": ["c_attn"]} | {name: ["query", "value"] for name in MODELS if "ert" in name}


def build(name, attention="sdpa", dtype=torch.float32, device="cpu", **changes) -> nn.Module:
    """A model of this class, in training, with small shapes unless changes say otherwise."""
    config, shapes = MODELS[name]
    config = getattr(transformers, config)(**(shapes | {"attn_implementation": attention} | changes))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return getattr(transformers, name)(config).to(dtype).train()


def query_value(name, **changes) -> LoRAConfig:
    saved = ["classifier"] if name.endswith("Classification") else None
    targets = QUERY_VALUE.get(name, ["q_proj", "v_proj"])
    return LoRAConfig(**({"r": 3, "lora_alpha": 5, "target_modules": targets, "modules_to_save": saved} | changes))


def adapters(name) -> dict[str, LoRAConfig | None]:
    return {"full": None, "q, v": query_value(name), "all": query_value(name, target_modules="all-linear")}


class Step:
    """A model's training step on random tokens, and what oracles say of it."""

    def __init__(self, model, config=None, batch=2, length=17, checkpointing=False):
        self.model = model if config is None else add_lora(model, config)
        self.frozen_sum = config is not None and model.base_model_prefix != "model"
        self.shape = {"batch": batch, "length": length, "checkpointing": checkpointing}
        if checkpointing:
            old = getattr(model, "gradient_checkpointing_enable", None)  # before transformers 5.2x
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
        classes = type(model).__name__.endswith("Classification")
        self.inputs = {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.long) if classes else ids}
        if "ert" not in type(model).__name__:
            self.inputs["use_cache"] = False

    def cost(self, **options) -> Cost:
        return cost(self.model, **self.shape, **options)

    def forward(self):
        return self.model(**self.inputs).loss

    def backward(self):
        self.model(**self.inputs).loss.backward()

    def saved(self) -> int:
        known = [*self.model.parameters(), *self.model.buffers(), *list(self.inputs.values())[:2]]
        kept = saved_bytes(self.forward, known)
        if self.shape["checkpointing"] and self.frozen_sum:  # the tokens' rows want a gradient, which hooks do not see
            kept += 4 * self.inputs["input_ids"].numel() * self.model.config.hidden_size
        return kept

    def peak(self) -> int:
        """Of a second step, above weights and moments."""
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)

        def run():
            optimizer.zero_grad()
            self.backward()
            optimizer.step()

        run()
        optimizer.zero_grad()
        gc.disable()  # what an earlier step left behind, freed in this one, would count as negative bytes
        try:
            return peak_bytes(run)
        finally:
            gc.enable()


def counted(function) -> int:
    """FlopCounterMode's FLOPs, with its own formulas for what it leaves out on a CPU: attention, and Y += H·M."""
    aten = torch.ops.aten
    missing = {
        aten.addmm_: lambda Y, H, M, **_: 2 * H[0] * H[1] * M[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda g, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=missing) as counter:
        function()
    return counter.get_total_flops()


def check(step: Step, **options) -> Cost:
    """FLOPs and kept bytes, exactly."""
    own = step.cost(**options)
    assert own.flops_forward == counted(step.forward)
    assert own.flops == counted(step.backward)
    assert own.activations + own.logits == step.saved()
    return own


# ---------------------------------------------------------------- FLOPs and kept bytes, exactly


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


@pytest.mark.parametrize(
    "name, trained", [("LlamaForCausalLM", "norm"), ("BertForMaskedLM", "bias"), ("GPT2LMHeadModel", ".1.")]
)
def test_what_is_trained_is_what_requires_a_gradient(name, trained):
    model = build(name)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(trained in path)
    own = check(Step(model))
    assert own.trainable == sum(p.numel() for path, p in model.named_parameters() if trained in path)


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


# ---------------------------------------------------------------- the derivation


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


# ---------------------------------------------------------------- the peak

WIDE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 1000}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch, length", [(4, 128), (1, 96)])
def test_the_peak_of_a_llama_step_is_the_measured_one(batch, length, checkpointing):
    """Within 2 %, where the goal is 10; the loss, the last block or the gradients make it, as the case may be."""
    for adapter, config in adapters("LlamaForCausalLM").items():
        step = Step(build("LlamaForCausalLM", **WIDE), config, batch, length, checkpointing)
        own = step.cost()
        assert own.peak - own.weights - own.optimizer == pytest.approx(step.peak(), rel=0.02), adapter


@pytest.mark.parametrize(
    "name, attention, checkpointing, dtype",
    [
        ("GPT2LMHeadModel", "sdpa", False, torch.float32),
        ("GPT2LMHeadModel", "sdpa", True, torch.float32),
        ("RobertaForSequenceClassification", "sdpa", False, torch.float32),
        ("BertForMaskedLM", "sdpa", True, torch.float32),
        ("MistralForCausalLM", "eager", False, torch.float32),
        ("Qwen2ForCausalLM", "sdpa", True, torch.bfloat16),
    ],
)
def test_the_peak_of_other_steps_is_the_measured_one(name, attention, checkpointing, dtype):
    """Within 10 %; BERT's checkpointed blocks, of which a forward's locals make the peak, miss it by 7."""
    wide = WIDE | {"num_attention_heads": 4}
    if name[0] == "G":
        wide = {"n_embd": 256, "n_inner": 1024, "n_layer": 4, "vocab_size": 1000}
    scheme = "fp32" if dtype == torch.float32 else "bf16"
    for adapter, config in adapters(name).items():
        step = Step(build(name, attention, dtype, **wide), config, 2, 128, checkpointing)
        own = step.cost(scheme=scheme)
        assert own.peak - own.weights - own.optimizer == pytest.approx(step.peak(), rel=0.1), adapter


def test_a_tied_weight_counts_once_but_its_gradients_are_added_up():
    tied = Step(build("LlamaForCausalLM", vocab_size=4000, tie_word_embeddings=True), None, 1, 8)
    own = tied.cost()
    assert own.parameters == sum(p.numel() for p in tied.model.parameters())
    assert own.peak - own.weights - own.optimizer == pytest.approx(tied.peak(), rel=0.02)
    assert own.peak - own.states > 2 * 4 * 4000 * 48 * 0.95


def test_the_logits_can_make_the_peak():
    """Three tensors of N·V: log-probabilities and two gradients."""
    own = cost(build("LlamaForCausalLM", device="meta", vocab_size=32000), batch=4, length=256)
    assert own.logits == pytest.approx(4 * 1024 * 32000, rel=1e-3)
    assert own.peak - own.weights - own.optimizer == own.activations + own.logits + 2 * 4 * 1024 * 32000


# ---------------------------------------------------------------- bytes of the states


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
    optimizer = torch.optim.AdamW([p for p in step.model.parameters() if p.requires_grad])
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


# ---------------------------------------------------------------- real models


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


# ---------------------------------------------------------------- the call


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "RobertaForSequenceClassification"])
def test_a_config_means_the_model_as_add_lora_would_adapt_it_and_leaves_it_alone(name):
    model = build(name)
    before = {path: (p.requires_grad, p.device, p.data_ptr()) for path, p in model.named_parameters()}
    planned = cost(model, query_value(name), batch=2, length=9)
    assert {path: (p.requires_grad, p.device, p.data_ptr()) for path, p in model.named_parameters()} == before
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
    tree = ast.parse(Path(cost_module.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
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
    "name, limit, what",
    [("GPT2LMHeadModel", 1024, "positions"), ("BertForMaskedLM", 1024, "positions")]
    + [("RobertaForMaskedLM", 1022, "positions"), ("MistralForCausalLM", 11, "sliding window")],
)
def test_a_length_is_refused_where_the_model_or_its_mask_ends(name, limit, what, refused):
    model = build(name, device="meta", **({"sliding_window": 12} if name[0] == "M" else {}))
    assert cost(model, batch=1, length=limit).flops > 0
    refused(lambda: cost(model, batch=1, length=limit + 1), f"length = {limit + 1}", what, f"length <= {limit}")


@pytest.mark.parametrize(
    "name, option",
    [("GPT2LMHeadModel", "reorder_and_upcast_attn"), ("BertForMaskedLM", "is_decoder")]
    + [("BertForMaskedLM", "chunk_size_feed_forward")],
)
def test_options_that_change_the_step_are_refused(name, option, refused):
    model = build(name, device="meta")
    setattr(model.config, option, True)
    refused(lambda: cost(model, batch=1, length=8), f"{option} = True", "without")
