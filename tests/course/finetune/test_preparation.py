"""preparation: what is frozen, what is trained, in which type; and what does not fit."""

import copy
import os

import pytest
import torch
from torch import nn

from lora_ref.batched import adapter_parameters
from lora_ref.course.finetune.hub import load_model, load_tokenizer
from lora_ref.course.finetune.preparation import check_model, lora_config, make_accelerator, prepare_model
from lora_ref.course.finetune.profiles import profile
from lora_ref.course.finetune.tasks import ClassificationTask, Task, make_task
from lora_ref.course.training import train
from tests.course.finetune.tiny_models import llama, roberta

F32, BF16 = torch.float32, torch.bfloat16
SMALL = {
    "max_train_samples": 20,
    "max_validation_samples": 4,
    "max_test_samples": 3,
    "batch_size": 4,
    "steps": 3,
    "lora_alpha": 5.0,
    "max_new_tokens": 6,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_model(llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def setting(**changes):
    return profile("cpu-mini", **SMALL | changes)


def config(own, head_modules=None):
    return lora_config("r=3", own.adapter, head_modules)


def test_lora_trains_its_factors_alone_in_float32_over_a_frozen_base_of_16_bits(model):
    own = setting(frozen_dtype="bf16")
    frequencies = model.model.rotary_emb.inv_freq.clone()
    prepare_model(model, config(own), own.system, seed=0)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert all("lora_" in name for name in trained) and len(trained) == 2 * 7 * 2
    assert {x.dtype for x in trained.values()} == {torch.float32}
    assert {x.dtype for x in model.parameters() if not x.requires_grad} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies) and frequencies.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert next(iter(trained.values())).shape == (3, 16)


def test_full_fine_tuning_trains_all_in_float32_whatever_lora_freezes(model):
    own = setting(frozen_dtype="bf16")
    prepare_model(model.requires_grad_(False), None, own.system, seed=0)
    assert all(x.requires_grad and x.dtype == torch.float32 for x in model.parameters())


def test_the_start_is_drawn_from_the_seed_and_from_nothing_else(base, rng_untouched):
    own = setting()
    factors = [
        [x for x in prepare_model(copy.deepcopy(base), config(own), own.system, seed).parameters() if x.requires_grad]
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(factors[0], factors[1]))
    assert not torch.equal(factors[0][0], factors[2][0])


@pytest.mark.parametrize("frozen", ["fp32", "bf16"])
def test_adapters_side_by_side_begin_as_each_does_alone_over_one_frozen_base(base, frozen):
    own = setting(frozen_dtype=frozen, gradient_checkpointing=True)
    configs = [lora_config(arm, own.adapter, None) for arm in ("r=3", "r=2", "r=3")]
    model = prepare_model(copy.deepcopy(base), configs, own.system, seed=4)
    assert {x.dtype for x in model.parameters() if not x.requires_grad} == {{"fp32": F32, "bf16": BF16}[frozen]}
    assert getattr(model.model.layers[0], "gradient_checkpointing", False)
    for e, each in enumerate(configs):
        expected = [
            x for x in prepare_model(copy.deepcopy(base), each, own.system, seed=4).parameters() if x.requires_grad
        ]
        for mine, theirs in zip(adapter_parameters(model, e), expected, strict=True):
            assert mine.dtype == F32 and mine.requires_grad and torch.equal(mine, theirs)


@pytest.mark.parametrize("frozen", ["fp32", "bf16"])
def test_checkpointing_gives_the_same_gradients_with_frozen_inputs(base, frozen):
    task, found = make_task(load_tokenizer("prose_llama"), setting()), []
    for checkpointing in (False, True):
        own = setting(gradient_checkpointing=checkpointing, frozen_dtype=frozen)
        model = prepare_model(copy.deepcopy(base), config(own), own.system, seed=0).train()
        assert getattr(model.model.layers[0], "gradient_checkpointing", False) is checkpointing
        assert not model.model.embed_tokens.weight.requires_grad
        total = task.summed_loss(model, task.rows["train"][:4])
        total.backward()
        found.append([x.grad for x in model.parameters() if x.requires_grad])
    assert any(g.abs().max() > 0 for g in found[0])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_tied_embeddings_stay_tied_when_they_are_trained(model):
    own = setting()
    prepare_model(model, None, own.system, seed=0)
    task = make_task(load_tokenizer("prose_llama"), own)
    before = model.lm_head.weight.detach().clone()
    train(model, task.loss(task.plan(0)), 2, 1e-3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, before)


def test_a_classifiers_head_is_trained_in_full_and_in_float32(tmp_path):
    model = load_model(roberta(tmp_path), "classification", 2)
    types = {"frozen_dtype": "bf16", "precision": "bf16"}
    own = setting(task="classification", model="x", target_modules=("query",), max_length=40, **types)
    task = ClassificationTask.__new__(ClassificationTask)  # without data
    Task.__init__(task, None, own, {})
    before = {name: x.requires_grad for name, x in model.named_parameters()}
    task.read_model(model)
    check_model(model, load_tokenizer(str(tmp_path)), task, own)
    assert {name: x.requires_grad for name, x in model.named_parameters()} == before
    assert task.head_modules == ["classifier"] and task.has_token_types is False
    prepare_model(model, config(own, task.head_modules), own.system, seed=0)
    names = {name for name, x in model.named_parameters() if x.requires_grad and "lora_" not in name}
    assert names == {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
    assert {x.dtype for x in model.parameters() if x.requires_grad} == {torch.float32}


def test_what_does_not_fit_is_refused(base, refused, tmp_path):
    class Text(Task):
        def longest_sequence(self):
            return 99

    tokenizer = load_tokenizer("prose_llama")

    def check(model=base, **changes):
        own = setting(**changes)
        check_model(model, tokenizer, Text(tokenizer, own, {}), own)

    check()
    refused(lambda: check(target_modules=("query",)), "'query'")
    refused(lambda: check(arms=("r=17",)), "arms has 'r=17'", "q_proj has rank 16 at most")
    refused(lambda: check(max_length=257), "max_length = 257", "at most 256")
    check(target_modules=("q_proj", "embed_tokens"))
    refused(
        lambda: check(target_modules=("q_proj", "embed_tokens"), parallel_adapters=2),
        "parallel_adapters = 2, but model.embed_tokens is a Embedding",
        "choose parallel_adapters = 1",
    )
    small = load_model(llama(tmp_path, max_position_embeddings=64))
    refused(lambda: check(small, max_length=64), "max_new_tokens and the longest prompt = 99", "at most 64")
    other = copy.deepcopy(base)
    other.set_input_embeddings(nn.Embedding(2047, 16))
    refused(lambda: check(other), "the tokeniser has 2,048 tokens, the model's embeddings 2,047 rows")
    other = copy.deepcopy(base)
    type(other).supports_gradient_checkpointing, kept = False, type(other).supports_gradient_checkpointing
    try:
        refused(lambda: check(other, gradient_checkpointing=True), "supports no gradient checkpointing")
    finally:
        type(other).supports_gradient_checkpointing = kept


def test_accelerators_of_different_kinds_follow_each_other(refused):
    assert "WORLD_SIZE" not in os.environ
    for precision in ("fp32", "bf16", "fp32"):
        accelerator = make_accelerator(setting(precision=precision).system)
        assert accelerator.mixed_precision == ("no" if precision == "fp32" else precision)
        assert accelerator.device.type == "cpu" and accelerator.num_processes == 1
    refused(lambda: make_accelerator(setting(precision="fp16").system), "precision = 'fp16' needs a GPU", "'bf16'")


def test_a_gpu_is_wanted_where_the_profile_says_so_and_the_accelerator_chooses_which(monkeypatch, refused):
    made = []
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: made.append(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("gpu-offline", "gpu-hub", "gpu-hub-mrpc", "gpu-hub-sst2"):
        refused(
            lambda: make_accelerator(profile(name).system), "torch sees no GPU", "--profile cpu-mini", "--device cpu"
        )
    refused(lambda: make_accelerator(setting(device="cuda").system), "torch sees no GPU")
    assert made == []
    for device in ("auto", "cpu"):
        make_accelerator(profile("gpu-offline", device=device).system)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cpu", "cuda"):
        make_accelerator(profile("gpu-offline", device=device).system)
    assert [options["cpu"] for options in made] == [False, True, False, True, False]
