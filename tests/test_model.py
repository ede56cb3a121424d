"""model.py: LoRA in whole transformers against peft; what is trained; merging; checkpointing; refusals."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from lora_ref import LoRAConfig, add_lora, count_parameters, lora_parameters, merge, unmerge
from lora_ref.initialization import INITIALIZERS, lora_ga
from lora_ref.layers import LoRAConv2d, LoRAEmbedding
from lora_ref.model import lora_layers
from tests.tiny_adapters import (
    ARCHITECTURES,
    BF16,
    CONFIGS,
    ENCODER,
    F32,
    IDS,
    IMAGES,
    TEXT,
    adapted,
    base_of,
    both,
    config_of,
    copy_trained,
    error,
    logits,
    peft_of,
    randomize,
    same,
    state,
    twins,
)

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


# peft as oracle


@each_architecture
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_factors_give_pefts_logits(name, kind):
    model, other = both(name, kind)
    batch = ARCHITECTURES[name].batch
    found, truth = logits(model, batch), logits(other, batch)
    assert error(found, truth) <= 1e-6
    assert error(found, logits(base_of(name).eval(), batch)) > 1e-3  # the adapter does something
    assert error(model(**batch).logits, truth) <= 1e-6  # with gradients, as in training


@each_architecture
@pytest.mark.parametrize("kind", CONFIGS)
def test_training_goes_as_in_peft(name, kind):
    """20 steps of AdamW from peft's start: the losses agree."""
    base, options = base_of(name), config_of(name, kind)
    torch.manual_seed(0)
    other = peft_of(base, **options).train()
    model = add_lora(base, LoRAConfig(**options)).train()
    with torch.no_grad():
        for own, theirs in twins(model, other):
            own.copy_(theirs.view(own.shape))

    def train(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(20):
            loss = model(**ARCHITECTURES[name].batch).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    losses = train(model)
    assert losses == pytest.approx(train(other), rel=1e-5)
    assert losses[-1] < 0.999 * losses[0]


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "T5"])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_biases_are_trained_as_in_peft(name, bias):
    options = config_of(name, bias=bias)
    model = add_lora(base_of(name), LoRAConfig(**options))
    twins(model, peft_of(base_of(name), **options))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = set(lora_parameters(model))
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    of_layers = {name for name in biases if name.rpartition(".")[0] in lora_layers(model)}
    assert trained == factors | {"none": set(), "all": biases, "lora_only": of_layers}[bias]


# counting


@pytest.mark.parametrize(
    "build, targets, trainable, total",
    [
        (lambda: LlamaForCausalLM(LlamaConfig()), ["q_proj", "v_proj"], 4_194_304, 6_742_609_920),  # LLaMA-7B
        (lambda: GPT2LMHeadModel(GPT2Config()), ["c_attn"], 294_912, 124_439_808 + 294_912),  # GPT-2 small
    ],
    ids=["LLaMA-7B", "GPT-2"],
)
def test_real_models_are_counted_on_the_meta_device(build, targets, trainable, total):
    with torch.device("meta"):
        model = build()
    count = count_parameters(add_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=targets)))
    assert count == (trainable, total)
    assert count.percent == pytest.approx(100 * trainable / total)
    assert all(p.is_meta for p in model.parameters())


def test_a_tied_weight_counts_once_and_the_names_of_factors_are_the_models():
    model = base_of()
    own = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (own, own)
    add_lora(model, LoRAConfig(r=3, lora_alpha=5, target_modules=["v_proj", "down_proj"]))
    factors = lora_parameters(model)
    size = 2 * 3 * (16 + 12 + 24 + 16)
    assert count_parameters(model) == (size, own + size)
    assert sum(p.numel() for p in factors.values()) == size
    named = dict(model.named_parameters())
    assert len(factors) == 8 and all(named[name] is p for name, p in factors.items())
    assert "model.layers.0.mlp.down_proj.lora_A" in factors


# freezing


@each_architecture
def test_a_step_changes_what_is_trained_and_nothing_else(name):
    model = add_lora(base_of(name), LoRAConfig(**config_of(name, "saved", bias="lora_only"))).train()
    randomize(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    expected = set(lora_parameters(model))
    expected |= {f"{p}.bias" for p, m in lora_layers(model).items() if m.bias is not None}
    expected |= {n for n, _ in model.named_parameters() if n.startswith("classifier.")}
    assert trained == expected
    before = state(model)["values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(**ARCHITECTURES[name].batch).loss.backward()
    optimizer.step()
    after = {n: not torch.equal(v, before[n]) for n, v in model.state_dict().items()}
    assert {n for n, changed in after.items() if changed} == trained


def test_what_was_trained_before_is_frozen_and_what_was_frozen_stays_so():
    model = base_of()
    model.model.layers[0].requires_grad_(False)
    add_lora(model, LoRAConfig(r=3, target_modules=["q_proj"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))


@pytest.mark.parametrize("name, embedding, head", [("Llama", "embed_tokens", "lm_head"), ("GPT-2", "wte", "lm_head")])
def test_an_adapted_embedding_leaves_the_tied_head_alone(name, embedding, head):  # pitfall 9: peft#2018, peft#2777
    base = base_of(name)
    model = add_lora(copy.deepcopy(base), LoRAConfig(r=3, lora_alpha=5, target_modules=[embedding]))
    randomize(model).eval()
    embeddings = next(iter(lora_layers(model).values()))
    assert isinstance(embeddings, LoRAEmbedding) and embeddings.weight is model.lm_head.weight
    merge(model)
    assert not torch.equal(embeddings.merged_weight, embeddings.weight)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    hidden = model(**TEXT, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model(**TEXT).logits, base.lm_head(hidden))
    other = add_lora(copy.deepcopy(base), LoRAConfig(r=3, lora_alpha=5, target_modules=[head]))
    randomize(other)
    merge(other.eval())
    assert torch.equal(other.get_input_embeddings().weight, base.get_input_embeddings().weight)


# merging


@each_architecture
def test_merging_keeps_logits_and_state_and_unmerging_restores_every_bit(name):  # pitfalls 2, 9, 15
    model, _ = both(name, "patterns")
    batch, before = ARCHITECTURES[name].batch, state(model)
    truth = logits(model, batch)
    merge(model)
    assert all(layer.merged for layer in lora_layers(model).values())
    assert error(logits(model, batch), truth) <= 1e-6
    same(before, state(model))
    unmerge(model)
    assert not any(layer.merged for layer in lora_layers(model).values())
    assert torch.equal(logits(model, batch), truth)
    same(before, state(model))


def test_merging_or_unmerging_twice_is_refused_and_changes_nothing():
    model = adapted()
    path, last = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    with pytest.raises(RuntimeError, match=f"{path} is not merged; there is nothing to undo"):
        unmerge(model)
    merge(model)
    with pytest.raises(RuntimeError, match=rf"{path} is merged already; unmerge\(model\) first"):
        merge(model)
    model.get_submodule(last).unmerge()
    with pytest.raises(RuntimeError, match=f"{last} is not merged"):
        unmerge(model)
    assert [layer.merged for layer in lora_layers(model).values()] == [True, True, True, False]
    model.get_submodule(path).unmerge()
    with pytest.raises(RuntimeError, match="model.layers.0.self_attn.v_proj is merged already"):
        merge(model)
    assert [layer.merged for layer in lora_layers(model).values()] == [False, True, True, False]


def test_a_merged_model_trains_and_saves_as_an_unmerged_one():  # pitfall 15: microsoft/LoRA#34, #61
    model = adapted()
    merge(model)
    plain = base_of()
    assert model.state_dict().keys() == adapted().state_dict().keys()
    add_lora(plain, model.lora_plan.config).load_state_dict(model.state_dict())
    assert error(logits(plain.eval(), TEXT), logits(model, TEXT)) <= 1e-6  # not added twice
    model.train()
    assert not any(layer.merged for layer in lora_layers(model).values())


# gradient checkpointing


def gradients(model, batch):
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing:FutureWarning", "error:None of the inputs have requires_grad"
)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "T5", "ViT"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", ["checkpointing", "adapter"])
def test_checkpointing_a_frozen_model_gives_the_same_gradients(name, reentrant, first):
    """Pitfall 10: microsoft/LoRA#120. Without transformers' own hooks, which not every model and version has."""
    options, batch = config_of(name, target_modules="all-linear"), ARCHITECTURES[name].batch
    truth = gradients(randomize(add_lora(base_of(name), LoRAConfig(**options))).train(), batch)
    model = base_of(name)

    def enable():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.disable_input_require_grads()

    if first == "checkpointing":
        enable()
    randomize(add_lora(model, LoRAConfig(**options))).train()
    if first == "adapter":
        enable()
    calls = []
    for block in model.modules():
        if getattr(block, "gradient_checkpointing", False) and hasattr(block, "_gradient_checkpointing_func"):
            function = block._gradient_checkpointing_func
            block._gradient_checkpointing_func = lambda *args, f=function: (calls.append(1), f(*args))[1]
    found = gradients(model, batch)
    assert calls
    for key, gradient in truth.items():
        assert found[key] is not None, key
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7)
    assert any(gradient.any() for key, gradient in found.items() if ".0." in key)  # in the first block


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_without_checkpointing_the_embeddings_require_no_gradient():
    """The first block would compute ∂x for nobody."""
    model, seen = adapted().train(), []
    assert len(model.model.embed_tokens._forward_hooks) == 1
    model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is anything deprecated asked for
        model(**TEXT)
    model.gradient_checkpointing_enable()
    model.disable_input_require_grads()
    model(**TEXT)
    with torch.no_grad():
        model(**TEXT)
    model.gradient_checkpointing_disable()
    model(**TEXT)
    assert seen == [False, True, False, False]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_checkpointing_with_embeddings_that_give_a_tuple():
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}
    model = SwinForImageClassification(SwinConfig(**sizes))
    randomize(add_lora(model, LoRAConfig(r=2, target_modules="all-linear"))).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    found = gradients(model, {"pixel_values": IMAGES["pixel_values"], "labels": torch.tensor([0, 1])})
    assert all(gradient is not None and gradient.any() for gradient in found.values())


# other models, other forms


def test_a_model_without_embeddings_that_transformers_knows():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    base = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
    options = {"r": 3, "lora_alpha": 5, "target_modules": r".*\.convolution", "bias": "all"}
    model, other = add_lora(copy.deepcopy(base), LoRAConfig(**options)), peft_of(base, **options)
    assert all(type(layer) is LoRAConv2d for layer in lora_layers(model).values())
    randomize(model, std=0.5)
    copy_trained(model, other)
    assert error(logits(model.eval(), IMAGES), logits(other.eval(), IMAGES)) <= 1e-6


def test_tied_biases_are_trained_together():
    """A masked-language head and its decoder share one bias."""
    base = BertForMaskedLM(BertConfig(**ENCODER))
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["query"], "bias": "all"}
    model, other = add_lora(copy.deepcopy(base), LoRAConfig(**options)), peft_of(base, **options)
    assert tuple(count_parameters(model)) == other.get_nb_trainable_parameters()
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias and model.cls.predictions.bias.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_new_layers_train_or_not_as_those_they_replace(training):
    model = base_of().train(training)
    model.model.layers[1].train(not training)
    add_lora(model, LoRAConfig(r=3, lora_dropout=0.5, target_modules=["q_proj"]))
    assert [layer.training for layer in lora_layers(model).values()] == [training, not training]
    assert model.training == training


def test_dropout_reaches_the_layers():
    model = adapted(lora_dropout=0.5).train()
    assert not torch.equal(logits(model, TEXT), logits(model, TEXT))
    model.eval()
    assert torch.equal(logits(model, TEXT), logits(model, TEXT))


def test_a_generator_makes_the_starts_reproducible_and_spares_the_global_one(rng_untouched):
    def factors(seed):
        generator = torch.Generator().manual_seed(seed)
        model = add_lora(base_of(), LoRAConfig(r=3, target_modules=["q_proj", "v_proj"]), generator=generator)
        return torch.cat([p.detach().flatten() for p in lora_parameters(model).values()])

    assert torch.equal(factors(3), factors(3)) and not torch.equal(factors(3), factors(4))


def test_the_layers_begin_differently():
    model = add_lora(base_of(), LoRAConfig(r=3, target_modules=["q_proj"]))
    first, second = lora_layers(model).values()
    assert not torch.equal(first.lora_A, second.lora_A)


def test_starts_override_the_configuration_by_path():
    """LoRA-GA from a real gradient: the model begins as it was, on another base."""
    model = base_of()
    truth = logits(model.eval(), TEXT)
    model(**TEXT).loss.backward()
    slopes = {name: p.grad for name, p in model.named_parameters()}
    seen = {}

    def init_fn(path, W, config):
        seen[path] = W.shape, config.r
        return lora_ga(W, config.r, config.scale, gradient=slopes[f"{path}.weight"])

    config = LoRAConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, config, init_fn)
    assert seen["model.layers.0.self_attn.q_proj"] == ((24, 16), 3)
    assert seen["model.layers.1.self_attn.v_proj"] == ((12, 16), 2)
    assert seen.keys() == lora_layers(model).keys()
    for path, layer in lora_layers(model).items():
        W = before[f"{path}.weight"]
        start = lora_ga(W, layer.config.r, layer.scale, gradient=slopes[f"{path}.weight"])
        assert torch.equal(layer.lora_A, start.A) and torch.equal(layer.lora_B, start.B)
        assert torch.equal(layer.weight, start.W0) and not torch.equal(layer.weight, W)
    assert error(logits(model, TEXT), truth) <= 1e-6


def test_a_start_may_be_the_configured_one_for_some_layers(rng_untouched):
    def init_fn(path, W, config):
        return INITIALIZERS["zero"](W, config.r) if "v_proj" in path else None

    config = LoRAConfig(r=3, target_modules=["q_proj", "v_proj"])
    model = add_lora(base_of(), config, init_fn, torch.Generator().manual_seed(0))
    assert {p.rpartition(".")[2] for p, m in lora_layers(model).items() if m.lora_A.any()} == {"q_proj"}


def test_a_conv1d_start_gets_the_weight_as_d_times_k():
    shapes = {}

    def init_fn(path, W, config):
        shapes[path.rpartition(".")[2]] = tuple(W.shape)

    add_lora(base_of("GPT-2"), LoRAConfig(r=3, target_modules=["c_attn", "wte"]), init_fn)
    assert shapes == {"c_attn": (48, 16), "wte": (16, 31)}


def test_pissa_leaves_a_shared_weight_alone():  # pitfall 14: peft#2184
    base = base_of()
    model = copy.deepcopy(base)
    shared = model.lm_head.weight
    add_lora(model, LoRAConfig(r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"], init_lora_weights="pissa"))
    assert model.lm_head.weight is shared and torch.equal(shared, base.lm_head.weight)
    assert not torch.equal(model.model.embed_tokens.weight, shared)
    assert error(logits(model.eval(), TEXT), logits(base.eval(), TEXT)) <= 2e-6


def test_a_16_bit_model_keeps_its_dtype_and_gets_factors_in_32_bits():  # pitfall 18
    base = base_of().to(BF16)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
    model, other = add_lora(copy.deepcopy(base), LoRAConfig(**options)), peft_of(base, **options)
    factors = set(lora_parameters(model))
    assert {p.dtype for n, p in model.named_parameters() if n in factors} == {F32}
    assert {p.dtype for n, p in model.named_parameters() if n not in factors} == {BF16}
    assert {own.dtype for own, _ in twins(model, other)} == {theirs.dtype for _, theirs in twins(model, other)}
    randomize(model)
    copy_trained(model, other)
    found, truth = logits(model.eval(), TEXT), logits(other.eval(), TEXT)
    assert found.dtype == BF16 and error(found.float(), truth.float()) <= 2 * torch.finfo(BF16).eps
    gradient = gradients(model.train(), TEXT)
    assert all(g.dtype == F32 and g.any() for g in gradient.values())


def test_a_compiled_model_equals_the_eager_one():
    model = adapted()
    truth, slopes = logits(model, TEXT), gradients(copy.deepcopy(model), TEXT)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert error(compiled(**TEXT).logits.detach(), truth) <= 1e-6
    for name, gradient in gradients(compiled, TEXT).items():
        torch.testing.assert_close(gradient, slopes[name.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-7)


def test_a_copy_is_independent():
    model = adapted()
    before, truth = state(model), logits(model, TEXT)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, TEXT), truth)
    randomize(other, seed=5)
    merge(other)
    assert not torch.equal(logits(other, TEXT), truth)
    assert torch.equal(logits(model, TEXT), truth)
    same(before, state(model))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_checkpoints_by_its_own_switch(how):
    """The hook on the embeddings goes with the copy: it must not look at the original."""
    model = randomize(add_lora(base_of("ViT"), LoRAConfig(**config_of("ViT")))).train()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    found, truth = gradients(other, IMAGES), gradients(model, IMAGES)
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_an_adapted_model_generates_merged_or_not():
    model, prompt = randomize(adapted(), seed=2, std=1), IDS[:1, :3]
    base = base_of().eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    text = model.generate(prompt, **options)
    assert text.shape == (1, 9) and torch.equal(text[:, :3], prompt)
    ids = prompt
    while ids.shape[1] < 9:  # greedy by hand, without a cache
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, ids)
    merge(model)
    assert torch.equal(model.generate(prompt, **options), text)
    assert not torch.equal(base.generate(prompt, **options), text)


def test_any_module_can_be_adapted():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4)))
    assert add_lora(model, LoRAConfig(r=2, lora_alpha=5, target_modules="all-linear")) is model
    assert list(lora_layers(model)) == ["0", "2.0"]
    assert model(torch.ones(3, 7)).shape == (3, 4)


# refusals


def test_a_failure_in_the_middle_restores_every_flag():
    model = base_of("BERT")
    before = state(model)

    def init_fn(path, W, config):
        if "1.attention.self.value" in path:
            raise KeyError("no gradient for this one")

    with pytest.raises(KeyError, match="no gradient for this one"):
        add_lora(model, LoRAConfig(r=3, target_modules=["query", "value"]), init_fn)
    same(before, state(model))
    config = LoRAConfig(r=3, target_modules=["query", "value"])
    with pytest.raises(TypeError, match=r"bert.encoder.layer.0.attention.self.query: init must be an Init"):
        add_lora(model, config, lambda path, W, config: 3)
    same(before, state(model))
    with pytest.raises(TypeError, match=r"query: generator must be a torch.Generator.*got 0"):
        add_lora(model, config, generator=0)
    same(before, state(model))


def test_an_adapted_model_is_not_adapted_again(refused):
    model = adapted()
    before = state(model)
    refused(lambda: add_lora(model, LoRAConfig(r=2, target_modules=["k_proj"])), "LlamaForCausalLM is adapted already")
    same(before, state(model))


def test_attention_that_reads_its_projections_weight_itself_is_refused(refused):
    """nn.MultiheadAttention never calls out_proj: an adapter there would do nothing."""
    model = nn.TransformerEncoderLayer(8, 2, 12)
    refused(lambda: add_lora(model, LoRAConfig(r=2, target_modules="all-linear")), "self_attn.out_proj")
    config = LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["out_proj"])
    assert list(lora_layers(add_lora(model, config))) == ["linear1", "linear2"]


@pytest.mark.parametrize("model", [None, "llama", {"a": nn.Linear(2, 3)}], ids=repr)
def test_what_is_no_module_is_refused(model, refused):
    config = LoRAConfig(r=2, target_modules="all-linear")
    for call in (lambda m: add_lora(m, config), merge, unmerge, lora_parameters, count_parameters):
        refused(lambda: call(model), "torch.nn.Module", type(model).__name__)


def test_a_plain_model_has_nothing_to_merge(refused):
    for call in (merge, unmerge, lora_parameters, lora_layers):
        refused(lambda: call(nn.Linear(3, 2)), "Linear has no LoRA layer", "add_lora(model, config)")
