"""checkpoint.py: files to and from peft; what is on disk; damage, crashes and foreign files."""

import builtins
import copy
import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from pathlib import Path

import filelock
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
)

from lora_ref import (
    LoRAConfig,
    _adapter_files,
    add_lora,
    checkpoint,
    load_adapter,
    lora_parameters,
    merge,
    save_adapter,
)
from lora_ref._adapter_files import CONFIG, TENSORS
from lora_ref.initialization import pissa
from lora_ref.layers import LoRALinear
from lora_ref.model import count_parameters, lora_layers
from lora_ref.peft_format import DUPLICATE_KEYS, PREFIX
from tests.tiny_adapters import (
    ARCHITECTURES,
    BF16,
    CONFIGS,
    F32,
    IDS,
    TEXT,
    adapted,
    base_of,
    both,
    config_of,
    contents,
    copy_trained,
    error,
    llama,
    logits,
    peft_layers,
    peft_load,
    peft_of,
    peft_save,
    randomize,
    refuses,
    rewrite,
    same,
    settings_in,
    state,
    tensors_in,
    twins,
)

LAYER = "model.layers.0.self_attn.q_proj"
KEY = f"{PREFIX}{LAYER}.lora_A.weight"
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
each_config = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(autouse=True, scope="module")
def locks_of_these_tests(tmp_path_factory):
    """Locks in a folder that goes with the tests' others."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture
def saved(tmp_path):
    """A directory with the adapter of `adapted()`."""
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


# peft as oracle


@each_architecture
@each_config
def test_what_peft_wrote_is_read_here(name, kind, tmp_path):
    _, other = both(name, kind)
    peft_save(other, tmp_path)
    model = load_adapter(base_of(name), tmp_path).eval()
    assert error(logits(model, ARCHITECTURES[name].batch), logits(other, ARCHITECTURES[name].batch)) <= 1e-6
    for own, theirs in twins(model, other):
        assert torch.equal(own.view(theirs.shape), theirs)


@each_architecture
@each_config
def test_what_is_written_here_is_read_by_peft_key_for_key(name, kind, tmp_path):
    model, other = both(name, kind)
    save_adapter(model, tmp_path / "own")
    read, batch = peft_load(base_of(name), tmp_path / "own"), ARCHITECTURES[name].batch
    assert error(logits(model, batch), logits(read, batch)) <= 1e-6
    peft_save(other, tmp_path / "theirs")
    own, theirs = tensors_in(tmp_path / "own"), tensors_in(tmp_path / "theirs")
    theirs = {key: value for key, value in theirs.items() if not DUPLICATE_KEYS.search(key)}
    assert own.keys() == theirs.keys()
    for key, value in own.items():
        assert torch.equal(value, theirs[key]), key
    with safe_open(tmp_path / "own" / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    expected, found = settings_in(tmp_path / "theirs"), settings_in(tmp_path / "own")
    for field in ("target_modules", "modules_to_save"):
        expected[field], found[field] = (set(value[field] or ()) for value in (expected, found))
    assert {key: value for key, value in found.items() if value != expected[key]} == {}
    again = load_adapter(base_of(name), tmp_path / "own").eval()
    assert torch.equal(logits(again, batch), logits(model, batch))


@settings(max_examples=20)
@given(
    name=st.sampled_from(["Llama", "GPT-2", "BERT"]),
    targets=st.sampled_from(["names", "pattern", "all-linear"]),
    rank=st.integers(1, 3),
    alpha=st.sampled_from([1, 2.5, 7]),
    ranks=st.booleans(),
    rslora=st.booleans(),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    full=st.booleans(),
)
def test_random_configurations_go_both_ways(tmp_path_factory, name, targets, rank, alpha, ranks, rslora, bias, full):
    architecture, directory = ARCHITECTURES[name], tmp_path_factory.mktemp("adapter")
    targets = {"names": architecture.targets, "pattern": architecture.pattern}.get(targets, targets)
    options = {"target_modules": targets, "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "bias": bias}
    options |= {"modules_to_save": True} if full else {}
    if ranks and targets == architecture.targets:
        options |= {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {".*": 11, targets[1]: 13}}
    model, other = both(name, **options)
    truth = logits(model, architecture.batch)
    save_adapter(model, directory)
    assert error(logits(peft_load(base_of(name), directory), architecture.batch), truth) <= 2e-6
    peft_save(other, directory)
    assert error(logits(load_adapter(base_of(name), directory).eval(), architecture.batch), truth) <= 2e-6


class Picture(nn.Module):
    """Each kind of layer in one small module, for peft as for us."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.tokens = nn.Embedding(11, 5, padding_idx=2)
        self.out = nn.Linear(5, 4)

    def forward(self, x, ids):
        return self.out(self.norm(self.conv(x)).mean((2, 3)) + self.tokens(ids).sum(1))


def picture():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Picture()
        base.train()(torch.randn(4, 2, 8, 6), torch.ones(4, 3, dtype=torch.long))  # running statistics of its own
    return base.eval()


X, TOKENS = torch.randn(3, 2, 8, 6, generator=torch.Generator().manual_seed(1)), IDS.flatten()[:9].view(3, 3) % 11


@pytest.mark.parametrize("full", [None, ["norm"]])
def test_convolutions_embeddings_and_a_norms_buffers_go_both_ways(full, tmp_path):
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["conv", "tokens", "out"], "modules_to_save": full}
    base = picture()
    model, other = add_lora(copy.deepcopy(base), LoRAConfig(**options)), peft_of(base, **options)
    randomize(model, std=0.5)
    if full:
        model.train()(X, TOKENS)  # trained in full, its statistics move too
        other.train()(X, TOKENS)
        assert model.norm.num_batches_tracked == 2
    copy_trained(model.eval(), other.eval())
    truth = model(X, TOKENS).detach()
    save_adapter(model, tmp_path / "own")
    shapes = {key.removeprefix(PREFIX): tuple(value.shape) for key, value in tensors_in(tmp_path / "own").items()}
    assert shapes["conv.lora_A.weight"] == (3, 2, 3, 2) and shapes["conv.lora_B.weight"] == (5, 3, 1, 1)
    assert shapes["tokens.lora_embedding_A"] == (3, 11) and shapes["tokens.lora_embedding_B"] == (5, 3)
    assert shapes["out.lora_A.weight"] == (3, 5) and shapes["out.lora_B.weight"] == (4, 3)
    assert len(shapes) == (11 if full else 6)
    with torch.no_grad():
        assert error(load_adapter(copy.deepcopy(base), tmp_path / "own").eval()(X, TOKENS), truth) <= 1e-6
        assert error(peft_load(base, tmp_path / "own")(X, TOKENS), truth) <= 1e-6
        buffers_there = [buffer for name, buffer in other.named_buffers() if "original" not in name]
        for own, theirs in zip(model.buffers(), buffers_there, strict=True):
            theirs.copy_(own)
        peft_save(other, tmp_path / "theirs")
        assert error(load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()(X, TOKENS), truth) <= 1e-6


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_of_the_base_that_peft_adds_for_embeddings_is_checked(target, tied, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = llama(tie_word_embeddings=tied)
    other = randomize(peft_of(base, r=3, lora_alpha=7, target_modules=[target, "q_proj"])).eval()
    peft_save(other, tmp_path)
    path = "lm_head" if target == "lm_head" else "model.embed_tokens"
    key = f"{PREFIX}{path}.base_layer.weight"
    assert key in tensors_in(tmp_path)
    assert error(logits(load_adapter(copy.deepcopy(base), tmp_path).eval(), TEXT), logits(other, TEXT)) <= 1e-6
    rewrite(tmp_path, lambda tensors: tensors[key].mul_(1.5))
    refuses(tmp_path, key, "no use", base=copy.deepcopy(base))
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.zeros(40, 16)}))
    refuses(tmp_path, key, "no use", base=copy.deepcopy(base))


def test_tied_biases_go_both_ways(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        base = BertForMaskedLM(BertConfig(vocab_size=31, **sizes)).eval()
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["query"], "bias": "all"}
    model, other = randomize(add_lora(copy.deepcopy(base), LoRAConfig(**options))).eval(), peft_of(base, **options)
    copy_trained(model, other)
    truth = logits(model, {"input_ids": IDS})
    peft_save(other, tmp_path / "theirs")
    save_adapter(model, tmp_path / "own")
    assert tensors_in(tmp_path / "own").keys() == tensors_in(tmp_path / "theirs").keys()
    for directory in ("own", "theirs"):
        read = load_adapter(copy.deepcopy(base), tmp_path / directory).eval()
        assert error(logits(read, {"input_ids": IDS}), truth) <= 1e-6
    assert error(logits(peft_load(base, tmp_path / "own"), {"input_ids": IDS}), truth) <= 1e-6


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scale_survives(use_rslora, tmp_path):  # pitfalls 7, 17: peft#2733, diffusers#6087
    options = {"r": 3, "lora_alpha": 11, "use_rslora": use_rslora, "target_modules": ["q_proj", "v_proj"]}
    model = adapted(**options, rank_pattern={"v_proj": 2}, alpha_pattern={r"1\..*": 5.5})
    save_adapter(model, tmp_path)
    read, other = load_adapter(base_of(), tmp_path), peft_load(base_of(), tmp_path)
    scales = [layer.scale for layer in lora_layers(model).values()]
    root = 0.5 if use_rslora else 1
    assert scales == pytest.approx([11 / 3**root, 11 / 2**root, 5.5 / 3**root, 5.5 / 2**root])
    assert [layer.scale for layer in lora_layers(read).values()] == scales
    assert [layer.scaling["default"] for layer in peft_layers(other).values()] == scales


def test_the_files_look_like_pefts(saved):
    assert sorted(contents(saved)) == [CONFIG, TENSORS]
    text = (saved / CONFIG).read_text()
    found = json.loads(text)
    assert text == json.dumps(found, indent=2, sort_keys=True) + "\n"
    assert found["peft_type"] == "LORA" and found["inference_mode"] is True
    (saved / "other").write_text("")
    assert {path.stat().st_mode for path in saved.iterdir()} == {(saved / "other").stat().st_mode}


def test_an_adapter_of_an_older_version_is_read_and_saved_again_byte_for_byte(tmp_path):
    """Written before the modules had their present names, with what the adapted model then computed."""
    old = Path(__file__).parent / "data" / "before_the_rooms"
    x, y = torch.load(old / "output.pt", weights_only=True).values()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))
    assert error(base(x), y) > 0.01  # the adapter does something
    model = load_adapter(base, old).eval()
    assert error(model(x), y) <= 1e-6  # another processor rounds in another order
    save_adapter(model, tmp_path)
    assert contents(tmp_path) == {name: (old / name).read_bytes() for name in (CONFIG, TENSORS)}


# starts that change the base


def test_pissa_is_replayed_here_and_in_peft_and_spares_a_shared_base(tmp_path):  # pitfall 14: peft#2184
    base = base_of().eval()
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["lm_head", "q_proj"], "init_lora_weights": "pissa"}
    model = randomize(add_lora(copy.deepcopy(base), LoRAConfig(**options))).eval()
    truth = logits(model, TEXT)
    save_adapter(model, tmp_path / "own")
    assert settings_in(tmp_path / "own")["init_lora_weights"] == "pissa"
    read = copy.deepcopy(base)
    shared = read.model.embed_tokens.weight
    load_adapter(read, tmp_path / "own").eval()
    assert error(logits(read, TEXT), truth) <= 1e-6
    assert read.model.embed_tokens.weight is shared and torch.equal(shared, base.model.embed_tokens.weight)
    assert not torch.equal(read.lm_head.weight, shared)
    save_adapter(read, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "own")
    options["target_modules"] = ["q_proj", "v_proj"]  # of a tied head, peft changes the embeddings too
    other = randomize(peft_of(base, **options)).eval()
    peft_save(other, tmp_path / "theirs")
    own = load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert error(logits(own, TEXT), logits(other, TEXT)) <= 2e-6
    save_adapter(own, tmp_path / "back")
    assert error(logits(peft_load(base, tmp_path / "back"), TEXT), logits(other, TEXT)) <= 2e-6


def test_peft_replays_pissa_on_linear_layers_alone(tmp_path):
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["wte", "c_attn"], "init_lora_weights": "pissa"}
    other = randomize(peft_of(base_of("GPT-2"), **options, fan_in_fan_out=True)).eval()
    peft_save(other, tmp_path)
    model = load_adapter(base_of("GPT-2"), tmp_path).eval()
    assert error(logits(model, TEXT), logits(other, TEXT)) <= 2e-6
    own = add_lora(base_of("GPT-2"), LoRAConfig(**options))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"transformer.wte: peft replays.*'pissa' on linear.*LoRAEmbedding"):
        save_adapter(own, tmp_path)
    assert contents(tmp_path) == before


def test_a_base_changed_by_what_no_file_holds_is_not_saved(tmp_path, refused):
    base, config = base_of(), LoRAConfig(r=3, lora_alpha=7, target_modules=["q_proj"])
    for options in ({}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "lora_ga"}):
        own = LoRAConfig(r=3, lora_alpha=7, target_modules=["q_proj"], **options)
        model = add_lora(copy.deepcopy(base), own, lambda path, W, c: pissa(W, c.r, c.scale))
        refused(lambda: save_adapter(model, tmp_path / "no"), "changed the base", "state_dict")
    config = LoRAConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])
    model = add_lora(copy.deepcopy(base), config, lambda path, W, c: pissa(W, 3, c.scale) if "1.self" in path else None)
    refused(lambda: save_adapter(model, tmp_path / "no"), "changed the base")  # though only of some layers
    assert not (tmp_path / "no").exists()
    for start in ("zero_a", "kaiming"):  # the base is as it was: the file says so, and peft replays nothing
        config = LoRAConfig(r=3, lora_alpha=7, target_modules=["q_proj"], init_lora_weights="pissa")
        model = add_lora(
            copy.deepcopy(base), config, lambda path, W, c: checkpoint.INITIALIZERS[start](W, c.r, c.scale)
        )
        randomize(model).eval()
        save_adapter(model, tmp_path)
        assert settings_in(tmp_path)["init_lora_weights"] is True
        assert error(logits(peft_load(base, tmp_path), TEXT), logits(model, TEXT)) <= 1e-6


def test_lora_ga_in_a_file_is_refused(saved):
    rewrite(saved, init_lora_weights="lora_ga")
    refuses(saved, "lora_ga", "no file holds")


# what is loaded, what is saved


def test_loading_uses_no_random_numbers_and_keeps_factors_bit_for_bit(saved, rng_untouched):
    with torch.random.fork_rng():
        base = base_of()
        truth = tensors_in(saved)
    model = load_adapter(base, saved)
    assert model is base
    names = {name.replace(PREFIX, "").removesuffix(".weight"): value for name, value in truth.items()}
    assert names.keys() == lora_parameters(model).keys()
    assert all(torch.equal(p, names[name]) for name, p in lora_parameters(model).items())


@pytest.mark.parametrize("trainable", [True, False])
def test_what_is_trained_after_loading(trainable, tmp_path):
    options = config_of("BERT", "saved", bias="lora_only")
    model = add_lora(base_of("BERT"), LoRAConfig(**options))
    save_adapter(model, tmp_path)
    read = load_adapter(base_of("BERT"), tmp_path, trainable=trainable)
    expected = {name for name, p in model.named_parameters() if p.requires_grad} if trainable else set()
    assert {name for name, p in read.named_parameters() if p.requires_grad} == expected
    assert count_parameters(read).total == count_parameters(model).total
    assert [m.training for m in lora_layers(read).values()] == [m.training for m in lora_layers(model).values()]


def test_a_loaded_adapter_trains_on_as_the_original(saved):
    def step(model):
        model.train()(**TEXT).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        return torch.cat([p.detach().flatten() for p in lora_parameters(model).values()])

    assert torch.equal(step(load_adapter(base_of(), saved)), step(adapted()))


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float64], ids=str)
def test_factors_keep_the_files_dtype_whatever_the_bases(dtype, tmp_path):  # pitfall 18: unsloth#212, peft#2421
    model = adapted(bias="all")
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(dtype)
    save_adapter(model, tmp_path)
    assert {value.dtype for value in tensors_in(tmp_path).values()} == {dtype}
    for base in (F32, BF16):
        read = load_adapter(base_of().to(base), tmp_path).eval()
        assert {p.dtype for p in lora_parameters(read).values()} == {dtype}
        assert read.lm_head.weight.dtype == base
        found, truth = logits(read, TEXT), logits(model, TEXT)
        assert found.dtype == base and error(found.float(), truth.float()) <= 8 * torch.finfo(base).eps
        read(**TEXT).loss.backward()
        assert all(p.grad.dtype == dtype and p.grad.any() for p in lora_parameters(read).values())


def test_trained_biases_take_the_models_dtype(tmp_path):
    options = config_of("BERT", "saved", bias="lora_only")
    model = randomize(add_lora(base_of("BERT"), LoRAConfig(**options)))
    save_adapter(model, tmp_path)
    read = load_adapter(base_of("BERT").to(BF16), tmp_path)
    path = "bert.encoder.layer.0.attention.self.query"
    assert read.get_submodule(path).bias.dtype == read.classifier.weight.dtype == BF16
    assert torch.equal(read.get_submodule(path).bias, model.get_submodule(path).bias.to(BF16))


def test_saving_merged_writes_the_same_bytes(tmp_path):  # pitfall 15: microsoft/LoRA#34, #61
    model = adapted(bias="all", modules_to_save=["lm_head"])
    save_adapter(model, tmp_path / "plain")
    merge(model)
    save_adapter(model, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "plain")
    assert all(layer.merged for layer in lora_layers(model).values())


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = adapted(bias="all", modules_to_save=["lm_head"])
    before = state(model)
    save_adapter(model, tmp_path)
    same(before, state(model))


def test_factors_that_share_memory_or_are_not_contiguous_are_saved(tmp_path):  # pitfall 25: peft#1876
    model = adapted()
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    second.lora_A = first.lora_A
    first.lora_B.data = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).T
    assert not first.lora_B.is_contiguous()
    save_adapter(model, tmp_path)
    read = load_adapter(base_of(), tmp_path).eval()
    assert torch.equal(logits(read, TEXT), logits(model, TEXT))
    again = [read.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1)]
    assert again[0].lora_A is not again[1].lora_A and again[0].lora_B.is_contiguous()


COMPILED = {  # pitfall 22: transformers#27397, peft#2957
    "whole": lambda model: torch.compile(model, backend="eager"),
    "parts": lambda model: model.apply(lambda part: compile_child(part, "attention", "classifier")),
    "in place": lambda model: (model.compile(backend="eager"), model)[1],
}


def compile_child(module, *names):
    for name in names:
        if isinstance(child := getattr(module, name, None), nn.Module):
            setattr(module, name, torch.compile(child, backend="eager"))


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("targets", ["all-linear", ["query"], r"bert\.encoder\.layer\..*query"], ids=str)
def test_a_compiled_model_is_saved_and_loaded_under_plain_names(how, targets, tmp_path):
    compiled, whole = COMPILED[how], isinstance(targets, list) or how != "parts"  # an expression sees all of the path
    options = {"r": 3, "lora_alpha": 5, "target_modules": targets, "bias": "all"}
    config = LoRAConfig(**options, modules_to_save=["classifier", "output.LayerNorm"])
    plain = randomize(add_lora(base_of("BERT"), config)).eval()
    save_adapter(plain, tmp_path / "plain")
    truth = contents(tmp_path / "plain")
    after = compiled(copy.deepcopy(plain))
    assert any("_orig_mod" in name for name, _ in after.named_parameters()) == (how != "in place")
    save_adapter(after, tmp_path / "after")
    assert contents(tmp_path / "after") == truth
    if not whole:
        return
    before = compiled(base_of("BERT"))
    assert add_lora(before, config) is before
    save_adapter(randomize(before), tmp_path / "before")
    assert contents(tmp_path / "before") == truth
    read = compiled(base_of("BERT"))
    assert load_adapter(read, tmp_path / "plain") is read
    save_adapter(read, tmp_path / "read")
    assert contents(tmp_path / "read")[TENSORS] == truth[TENSORS]


def test_a_saved_directory_is_made_and_written_over(tmp_path):
    model, directory = adapted(), tmp_path / "a" / "b"
    save_adapter(model, str(directory))
    randomize(model, seed=7)
    save_adapter(model, directory)
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG, TENSORS]
    assert torch.equal(tensors_in(directory)[KEY], model.get_submodule(LAYER).lora_A)


# what is not saved


def test_a_model_that_cannot_be_saved_is_refused_and_the_old_files_stay(saved, refused):
    before = contents(saved)
    refused(lambda: save_adapter(base_of(), saved), "LlamaForCausalLM has no LoRA layer", "add_lora")
    refused(lambda: save_adapter("model", saved), "torch.nn.Module", "str")
    by_hand = nn.Sequential(LoRALinear(nn.Linear(7, 5), LoRAConfig(r=2)))
    refused(lambda: save_adapter(by_hand, saved), "Sequential was adapted by hand", "load_adapter")
    with torch.device("meta"):
        shapes = add_lora(llama(), LoRAConfig(r=2, target_modules=["q_proj"]))
    refused(lambda: save_adapter(shapes, saved), KEY, "meta device")
    for value in (float("nan"), float("inf"), -float("inf")):
        model = adapted()
        model.get_submodule(LAYER).lora_A.data[1, 2] = value
        refused(lambda: save_adapter(model, saved), KEY, "NaN or infinite")
    assert contents(saved) == before


# damaged and foreign files


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
@pytest.mark.parametrize("eighths", range(8))
def test_a_truncated_file_is_refused(file, eighths, saved, rng_untouched):
    data = (saved / file).read_bytes()
    (saved / file).write_bytes(data[: len(data) * eighths // 8])
    with torch.random.fork_rng():
        says = "is not JSON" if file == CONFIG else "is not a whole safetensors file"
        refuses(saved, str(saved / file), says)


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"\x80\x04N.", b"[" * 100_000, b"\0" * 64], ids=range(4))
def test_a_file_of_another_kind_is_refused(file, data, saved):
    (saved / file).write_bytes(data)
    refuses(saved, str(saved / file))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"target_modules": ["q_proj", "query"]}, ["'query'"]),
        ({"target_modules": None}, ["target_modules is None"]),
        ({"target_modules": "("}, ["not a regular expression"]),
        ({"rank_pattern": {"k_proj": 2}}, ["rank_pattern key 'k_proj'"]),
        ({"exclude_modules": ["query"]}, ["exclude_modules has 'query'"]),
        ({"r": 4}, [KEY, "(3, 16)", "(4, 16)"]),
        ({"r": 10**12}, [KEY, "(3, 16)"]),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, ["lacks", "k_proj.lora_A.weight"]),
        ({"target_modules": ["q_proj"]}, ["v_proj.lora_A.weight and 3 more", "no use"]),
        ({"bias": "all", "modules_to_save": ["norm"]}, ["lacks", "layernorm.weight"]),
    ],
    ids=str,
)
def test_a_configuration_that_fits_neither_model_nor_tensors_is_refused(options, says, saved):
    rewrite(saved, **options)
    refuses(saved, *says)


def change(key, function):
    return lambda tensors: tensors.update({key: function(tensors[key])})


@pytest.mark.parametrize(
    "how, says",
    [
        (lambda tensors: tensors.pop(KEY), ["lacks", KEY, "another base"]),  # pitfall 11: peft#2118, #2566
        (lambda tensors: tensors.update(extra=torch.ones(2)), ["has extra, for which"]),
        (lambda tensors: tensors.update({KEY.replace("layers.0", "layers.7"): torch.ones(3)}), ["layers.7", "no use"]),
        (lambda tensors: tensors.update({KEY.replace("_A", "_magnitude_vector"): torch.ones(24)}), ["_magnitude_"]),
        (lambda tensors: tensors.update({KEY.removeprefix(PREFIX): tensors.pop(KEY)}), ["lacks", KEY]),
        (change(KEY, lambda A: A.T.contiguous()), [KEY, "(16, 3)", "(3, 16)", "another base"]),
        (change(KEY, lambda A: A.reshape(3, 16, 1)), [KEY, "(3, 16, 1)"]),
        (change(KEY, lambda A: A[:, :0]), [KEY, "(3, 0)"]),
        (change(KEY, lambda A: A * float("nan")), [KEY, "NaN or infinite"]),
        (change(KEY, lambda A: A.index_fill(0, torch.tensor(2), -float("inf"))), [KEY, "NaN or infinite"]),
        (change(KEY, lambda A: A.int()), [KEY, "torch.int32"]),
        (change(KEY, lambda A: A > 0), [KEY, "torch.bool"]),
        (change(KEY, lambda A: A.to(torch.complex64)), [KEY, "torch.complex64"]),
        (change(KEY, lambda A: A.to(torch.float8_e4m3fn)), [KEY, "torch.float8_e4m3fn"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(how, says, saved):
    rewrite(saved, how)
    refuses(saved, str(saved / TENSORS), *says)


def test_an_adapter_for_another_base_is_refused(saved):
    with torch.random.fork_rng():
        refuses(saved, KEY, "(3, 16)", "(3, 24)", "another base", base=llama(hidden_size=24))
        deeper = llama(num_hidden_layers=3)
        refuses(saved, "lacks", "layers.2.self_attn.q_proj.lora_A.weight", base=deeper)
        refuses(saved, "layers.1.self_attn", "no use", base=llama(num_hidden_layers=1))
    refuses(saved, "target_modules has 'q_proj'", base=base_of("BERT"))


def test_a_trained_bias_or_buffer_that_does_not_fit_is_refused(tmp_path):
    options = LoRAConfig(r=3, target_modules=["out"], bias="lora_only", modules_to_save=["norm"])
    save_adapter(add_lora(picture(), options), tmp_path)
    bias, counter = f"{PREFIX}out.base_layer.bias", f"{PREFIX}norm.num_batches_tracked"
    for key, function, says in (
        (bias, lambda b: b[:3], "(3,)"),
        (bias, lambda b: b * float("nan"), "NaN"),
        (bias, lambda b: b.long(), "torch.int64"),
        (counter, lambda n: n.float(), "torch.float32"),
    ):
        good = contents(tmp_path)
        rewrite(tmp_path, change(key, function))
        refuses(tmp_path, key, says, base=picture())
        (tmp_path / TENSORS).write_bytes(good[TENSORS])
    load_adapter(picture(), tmp_path)


def test_a_layer_that_refuses_its_adapter_is_named_and_every_flag_restored(tmp_path):
    model = nn.ModuleDict({"first": nn.Linear(7, 5), "tokens": nn.Embedding(11, 5)})
    save_adapter(add_lora(copy.deepcopy(model), LoRAConfig(r=2, target_modules=["first", "tokens"])), tmp_path)
    model["tokens"].max_norm = 1.0
    refuses(tmp_path, "tokens: the embedding has max_norm", base=model)


# paths


def test_missing_files_are_named(saved, tmp_path):
    refuses(tmp_path / "nowhere", str(tmp_path / "nowhere" / CONFIG), "does not exist", error=FileNotFoundError)
    refuses(saved / CONFIG, str(saved / CONFIG / CONFIG), "does not exist", "directory", error=FileNotFoundError)
    (saved / TENSORS).unlink()
    refuses(saved, str(saved / TENSORS), "does not exist", error=FileNotFoundError)
    (saved / TENSORS).mkdir()
    refuses(saved, str(saved / TENSORS), error=IsADirectoryError)


RAN = []


def explode():
    RAN.append(1)


class Bomb:
    def __reduce__(self):
        return explode, ()


def test_a_pickled_adapter_is_never_unpickled(saved):  # pitfall 26: peft#1993, CVE-2025-32434
    (saved / TENSORS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refuses(saved, str(saved / TENSORS), "adapter_model.bin is a pickle", "convert it in peft", error=FileNotFoundError)
    (saved / TENSORS).write_bytes(pickle.dumps(Bomb()))
    refuses(saved, str(saved / TENSORS))
    (saved / CONFIG).write_bytes(pickle.dumps(Bomb()))
    refuses(saved, str(saved / CONFIG))
    assert not RAN
    pickle.loads(pickle.dumps(Bomb()))  # it is armed
    assert RAN


def test_saving_to_a_path_that_is_a_file_or_below_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="file"):
        save_adapter(adapted(), tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file"):
        save_adapter(adapted(), tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("method", ["read_text", "read_bytes"])
def test_a_file_that_may_not_be_read_is_named(method, saved, monkeypatch):
    """Simulated: the superuser may read all."""

    def denied(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, denied)
    refuses(saved, str(saved), "Permission denied", error=PermissionError)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read and write all")
def test_a_directory_without_permission_is_named(saved):
    before = contents(saved)
    try:
        saved.chmod(0o500)
        with pytest.raises(PermissionError, match=str(saved)):
            save_adapter(adapted(bias="all"), saved)
        assert contents(saved) == before
        (saved / TENSORS).chmod(0)
        refuses(saved, str(saved / TENSORS), error=PermissionError)
    finally:
        saved.chmod(0o700)
        (saved / TENSORS).chmod(0o600)


# crashes


@pytest.mark.parametrize("which", [CONFIG, TENSORS])
def test_a_full_disk_leaves_the_old_files_whole(which, saved, monkeypatch):
    before, model = contents(saved), randomize(adapted(), seed=7)

    def full(path, *args, **kwargs):
        return builtins.open("/dev/full" if Path(path).name == which else path, *args, **kwargs)

    monkeypatch.setattr(_adapter_files, "open", full, raising=False)
    unchanged = state(model)
    with pytest.raises(OSError) as failure:
        save_adapter(model, saved)
    assert failure.value.errno == errno.ENOSPC
    same(unchanged, state(model))
    assert contents(saved) == before and len(list(saved.iterdir())) == 2
    assert torch.equal(logits(load_adapter(base_of(), saved).eval(), TEXT), logits(adapted(), TEXT))
    monkeypatch.undo()
    save_adapter(model, saved)
    assert torch.equal(logits(load_adapter(base_of(), saved).eval(), TEXT), logits(model, TEXT))


@pytest.mark.parametrize("done", [0, 1])
def test_a_failed_rename_leaves_whole_files(done, saved, monkeypatch):
    """With `done` = 1 the tensors are the new ones and the configuration the old: here they are the same."""
    model, replaced = randomize(adapted(), seed=7), []

    def replace(source, target):
        if len(replaced) == done:
            raise OSError(errno.EIO, "Input/output error", str(target))
        replaced.append(Path(target).name)
        os.rename(source, target)

    monkeypatch.setattr(_adapter_files.os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"):
        save_adapter(model, saved)
    truth = model if done else adapted()
    assert torch.equal(logits(load_adapter(base_of(), saved).eval(), TEXT), logits(truth, TEXT))
    assert len(list(saved.iterdir())) == 2


def test_both_files_are_on_the_disk_before_either_takes_its_place(saved, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(_adapter_files.os, "fsync", lambda file: (calls.append("fsync"), sync(file)))
    monkeypatch.setattr(_adapter_files.os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    save_adapter(adapted(), saved)
    assert calls == ["fsync", "fsync", "replace", "replace"]


def in_process(call):
    """A forked process that runs it; it ends with this one at the latest."""
    process = multiprocessing.get_context("fork").Process(target=call, daemon=True)
    process.start()
    return process


def save_forever(model, directory):
    while True:
        for value in (1.0, 2.0):
            with torch.no_grad():
                for factor in lora_parameters(model).values():
                    factor.fill_(value)
            save_adapter(model, directory)


def test_a_process_killed_while_saving_leaves_a_whole_adapter(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    interrupted = 0
    for attempt in range(15):
        before = (tmp_path / CONFIG).stat().st_mtime_ns
        process = in_process(lambda: save_forever(model, tmp_path))
        deadline = time.monotonic() + 20
        while (tmp_path / CONFIG).stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(0.0003 * attempt)
        process.kill()
        process.join()
        assert process.exitcode == -9
        read = load_adapter(base_of(), tmp_path)
        values = {value for factor in lora_parameters(read).values() for value in factor.unique().tolist()}
        assert values in ({1.0}, {2.0})
        interrupted += any(path.is_dir() for path in tmp_path.iterdir())
    assert interrupted  # what it was writing beside is still there, and does no harm
    save_adapter(adapted(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]
    assert torch.equal(logits(load_adapter(base_of(), tmp_path).eval(), TEXT), logits(adapted(), TEXT))


def killed(call, at):
    """Run it in a process that is killed at the at-th of its steps on the disk; False if it ended before."""
    steps = itertools.count(1)

    def stepping(function):
        def step(*args, **kwargs):
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return step

    def run():
        for module, name in ((_adapter_files.tempfile, "mkdtemp"), (shutil, "rmtree")):
            setattr(module, name, stepping(getattr(module, name)))
        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, stepping(getattr(os, name)))
        call()

    process = in_process(run)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def small(value, **options):
    """An adapter all of whose factors' entries have this value."""
    model = add_lora(plain(), LoRAConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0", "1"]} | options))
    with torch.no_grad():
        for factor in lora_parameters(model).values():
            factor.fill_(value)
    return model


def plain():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4))


def found(directory):
    """What there is: the (value, scale) of each layer."""
    layers = lora_layers(load_adapter(plain(), directory)).values()
    assert all(layer.lora_A.unique().tolist() == layer.lora_B.unique().tolist() for layer in layers)
    return [(layer.lora_A[0, 0].item(), layer.scale) for layer in layers]


def restored(directory, message):
    """The directory after doing what the message says, which is to move files out of the folder that it names."""
    (beside,) = [path for path in directory.iterdir() if f"adapter_* files of {path} to {directory}" in message]
    for path in beside.glob("adapter_*"):
        path.rename(directory / path.name)
    return directory


# of the same shapes: only the configuration tells them apart
OTHERS = [
    {"lora_alpha": 3},
    {"use_rslora": True},
    {"alpha_pattern": {"1": 5}},
    {"r": 2, "rank_pattern": {"[01]": 4}, "use_rslora": True, "lora_alpha": 2},
    {"init_lora_weights": "pissa"},
]


@pytest.mark.parametrize("options", [{}, *OTHERS], ids=str)
def test_a_kill_at_any_moment_leaves_the_old_the_new_or_no_configuration_never_a_mixture(options, tmp_path):
    """Two adapters whose tensors fit each other's configuration: with the wrong one they would load, and be wrong."""
    old, new = small(1.0), small(2.0, **options)
    pairs = {}
    for name, model in (("old", old), ("new", new)):
        save_adapter(model, tmp_path / name)
        pairs[name] = contents(tmp_path / name)
    x, seen = torch.ones(1, 7), []
    for at in range(1, 100):
        directory = tmp_path / str(at)
        save_adapter(old, directory)
        if not killed(lambda: save_adapter(new, directory), at):
            break
        try:
            load_adapter(plain(), directory)
        except FileNotFoundError as refusal:
            with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
                peft_load(plain(), directory)
            assert f"{directory / CONFIG} does not exist; a save still runs, or was cut short" in str(refusal)
            restored(directory, str(refusal))
            assert contents(directory) == pairs["new"]
            seen.append("restored")
        else:
            assert contents(directory) in pairs.values()
            seen.append("new" if contents(directory) == pairs["new"] else "old")
        truth = old if seen[-1] == "old" else new
        for read in (load_adapter(plain(), directory), peft_load(plain(), directory)):
            torch.testing.assert_close(read(x), truth(x))
        save_adapter(new, directory)
        assert sorted(path.name for path in directory.iterdir()) == [CONFIG, TENSORS]
    assert [state for state, _ in itertools.groupby(seen)] == (
        ["old", "restored", "new"] if options else ["old", "new"]
    )
    assert len(seen) == 7 + 2 * bool(options)


def test_a_kill_during_the_first_save_is_restored_too_and_one_after_the_other(tmp_path):
    """Of saves cut short, the folder of the one whose tensors are in place is named."""
    for value in (1.0, 2.0):
        assert killed(lambda: save_adapter(small(value, lora_alpha=value), tmp_path), at=5)
        assert contents(tmp_path).keys() == {TENSORS}
    assert killed(lambda: save_adapter(small(3.0), tmp_path), at=4)
    with pytest.raises(FileNotFoundError, match="cut short") as refusal:
        found(tmp_path)
    assert found(restored(tmp_path, str(refusal.value))) == [(2.0, 0.5)] * 2
    assert killed(lambda: save_adapter(small(3.0), tmp_path / "first"), at=2)
    refuses(tmp_path / "first", "name a directory", error=FileNotFoundError, base=plain())  # nothing is in place


@pytest.mark.parametrize("done", range(3))
def test_a_failed_rename_between_adapters_of_two_scales_loses_neither(done, tmp_path, monkeypatch):
    save_adapter(small(1.0), tmp_path)
    before, count, replace = contents(tmp_path), itertools.count(), os.replace

    def failing(source, target):
        if next(count) == done:
            raise OSError(errno.EIO, "Input/output error", str(target))
        replace(source, target)

    monkeypatch.setattr(_adapter_files.os, "replace", failing)
    with pytest.raises(OSError, match="Input/output error"):
        save_adapter(small(2.0, lora_alpha=3), tmp_path)
    monkeypatch.undo()
    if done < 2:
        assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 2
    else:
        with pytest.raises(FileNotFoundError, match="cut short") as refusal:
            found(tmp_path)
        assert found(restored(tmp_path, str(refusal.value))) == [(2.0, 0.75)] * 2


def test_a_scale_edited_by_hand_counts(tmp_path):
    save_adapter(small(1.0), tmp_path)
    rewrite(tmp_path, lora_alpha=16, alpha_pattern={"1": 2})
    assert found(tmp_path) == [(1.0, 4.0), (1.0, 0.5)]
    assert [layer.scaling["default"] for layer in peft_layers(peft_load(plain(), tmp_path)).values()] == [4.0, 0.5]


def test_saves_to_one_directory_take_turns_and_nobody_removes_what_a_living_one_writes(tmp_path):
    reads, writes = os.pipe()

    def stuck():
        _adapter_files.os.fsync = lambda file: (os.write(writes, b"."), time.sleep(60))
        save_adapter(small(1.0), tmp_path)

    first = in_process(stuck)
    assert os.read(reads, 1) == b"."
    (beside,) = tmp_path.iterdir()
    second = in_process(lambda: save_adapter(small(2.0), tmp_path))
    second.join(0.5)
    assert second.is_alive() and list(tmp_path.iterdir()) == [beside]
    assert (beside / TENSORS).exists()
    first.kill()
    first.join()
    second.join(20)
    assert second.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]
    assert found(tmp_path) == [(2.0, 2.0)] * 2
    os.close(reads)
    os.close(writes)


def test_a_process_forked_during_a_save_does_not_keep_the_next_one_waiting(tmp_path, monkeypatch):
    forked = []
    monkeypatch.setattr(_adapter_files.os, "fsync", lambda file: forked.append(in_process(lambda: time.sleep(60))))
    save_adapter(small(1.0), tmp_path)
    monkeypatch.undo()
    second = in_process(lambda: save_adapter(small(2.0), tmp_path))
    second.join(20)
    for process in (second, *forked):
        process.kill()
    assert second.exitcode == 0 and len(forked) == 2
    assert found(tmp_path) == [(2.0, 2.0)] * 2


def without_locks(how, monkeypatch, tmp_path_factory):
    """Make the lock impossible to have."""

    def refuse(*args):
        raise OSError(errno.EBADF, "Bad file descriptor")

    if how == "no fcntl":  # filelock's own substitute then: a file, which a killed process would leave
        monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    elif how == "no lock":
        monkeypatch.setattr(fcntl, "flock", refuse)
    elif how == "no right to read":  # mkdtemp and rmtree open nothing here
        monkeypatch.setattr(_adapter_files.os, "open", refuse)
        monkeypatch.setattr(_adapter_files.shutil, "rmtree", lambda path, ignore_errors: os.rmdir(path))
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        locks = Path(tempfile.gettempdir(), f"lora_ref-locks-{os.getuid()}")
        if how == "a file in its place":
            locks.write_text("")
        elif how == "a link in its place":
            locks.symlink_to(tmp_path_factory.mktemp("elsewhere"))
        elif how == "others may write there":
            locks.mkdir()
            locks.chmod(0o777)
        else:
            locks.mkdir(0o700)
            monkeypatch.setattr(_adapter_files.os, "getuid", lambda: os.stat(locks).st_uid + 1)
            locks.rename(locks.with_name(f"lora_ref-locks-{os.getuid()}"))


NO_LOCKS = ["no fcntl", "no lock", "no right to read"]
NO_LOCKS += ["a file in its place", "a link in its place", "others may write there", "another user's"]


@pytest.mark.parametrize("how", NO_LOCKS)
def test_without_locks_adapters_are_saved_and_what_others_write_is_left_alone(
    how, tmp_path, monkeypatch, tmp_path_factory
):
    without_locks(how, monkeypatch, tmp_path_factory)
    killed(lambda: save_adapter(small(1.0), tmp_path), at=4)
    (beside,) = tmp_path.iterdir()
    save_adapter(small(2.0), tmp_path)
    assert (beside / TENSORS).exists() and found(tmp_path) == [(2.0, 2.0)] * 2
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_was_made_under_another_lock_is_left_alone(tmp_path, monkeypatch, tmp_path_factory):
    """As by another machine over NFS, or with another TMPDIR: whether its save still runs cannot be seen from here."""
    directory = tmp_path / "adapter"
    assert killed(lambda: save_adapter(small(1.0), directory), at=2)
    (left,) = directory.iterdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    save_adapter(small(3.0), directory)
    assert {path.name for path in directory.iterdir()} == {CONFIG, TENSORS, left.name}
    monkeypatch.undo()
    save_adapter(small(4.0), directory)
    assert {path.name for path in directory.iterdir()} == {CONFIG, TENSORS}
    assert found(directory) == [(4.0, 2.0)] * 2


def test_the_lock_is_neither_in_the_directory_nor_beside_it_and_only_this_user_can_open_it(tmp_path):
    save_adapter(small(1.0), tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", CONFIG, TENSORS, "b"]
    locks = Path(tempfile.gettempdir(), f"lora_ref-locks-{os.getuid()}")
    assert locks.stat().st_mode & 0o777 == 0o700 and list(locks.glob("*.lock"))


def test_files_are_not_mixed_when_they_are_saved_again_while_they_are_read(tmp_path, monkeypatch):
    save_adapter(small(1.0), tmp_path)
    read = checkpoint._read_tensors
    for model, says in ((small(2.0), None), (small(3.0, lora_alpha=3), "saved again while it was read; load it again")):
        monkeypatch.setattr(checkpoint, "_read_tensors", lambda path: (save_adapter(model, path), read(path))[1])
        if says:
            refuses(tmp_path, str(tmp_path), says, base=plain())
        else:
            assert found(tmp_path) == [(2.0, 2.0)] * 2
    monkeypatch.undo()
    assert found(tmp_path) == [(3.0, 0.75)] * 2


# models that are not for it


def test_an_adapter_is_loaded_once(saved):
    model = load_adapter(base_of(), saved)
    refuses(saved, "LlamaForCausalLM is adapted already", base=model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))


def test_what_holds_no_numbers_takes_no_adapter(saved, refused):
    with torch.device("meta"):
        refuses_meta = llama()
    refused(lambda: load_adapter(refuses_meta, saved), "meta device", "LlamaForCausalLM")
    assert not hasattr(refuses_meta, "lora_plan")
    refused(lambda: load_adapter("model", saved), "torch.nn.Module", "str")
