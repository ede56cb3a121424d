"""peft_format.py: the configuration and the names of tensors, as peft writes and reads them."""

import copy
import fractions
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaForCausalLM,
)

from lora_ref import (
    LoRAConfig,
    add_lora,
    load_adapter,
    save_adapter,
)
from lora_ref._adapter_files import CONFIG
from lora_ref.config import INITIALIZERS
from lora_ref.layers import LoRALinear
from lora_ref.peft_format import FIELDS, PREFIX, peft_config, read_config
from tests.tiny_adapters import (
    IDS,
    TEXT,
    adapted,
    base_of,
    error,
    logits,
    peft_load,
    peft_of,
    peft_save,
    randomize,
    refuses,
    rewrite,
    settings_in,
    tensors_in,
    twins,
)


@pytest.fixture
def saved(tmp_path):
    """A directory with the adapter of `adapted()`."""
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_classifier_that_peft_made_has_a_head_that_the_model_lacks(tmp_path):
    """peft puts "classifier" and "score" in modules_to_save; here the ending means "pre_classifier" too."""
    base = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=31, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3)
    ).eval()
    batch = {"input_ids": IDS}
    for model, target in ((base, "q_lin"), (base_of("BERT"), "query")):
        other = randomize(peft_of(model, r=3, lora_alpha=7, target_modules=[target], task_type="SEQ_CLS")).eval()
        peft_save(other, tmp_path)
        assert "score" in settings_in(tmp_path)["modules_to_save"]
        own = load_adapter(copy.deepcopy(model), tmp_path).eval()
        assert error(logits(own, batch), logits(other, batch)) <= 1e-6
        assert len(twins(own, other)) == len([p for p in other.parameters() if p.requires_grad])
        save_adapter(own, tmp_path)
        assert error(logits(peft_load(model, tmp_path), batch), logits(other, batch)) <= 1e-6
    rewrite(tmp_path, modules_to_save=["classifier", "skore"])
    refuses(tmp_path, "modules_to_save has 'skore'", base=base_of("BERT"))


NAMES = st.lists(st.sampled_from(["q_proj", "v_proj", "self_attn.k_proj", "mlp.up_proj"]), min_size=1, unique=True)
PATTERNS = ["q_proj", r".*_proj", r"layers\.\d+\..*"]


@given(
    targets=st.one_of(NAMES, NAMES.map(set), NAMES.map(tuple), st.sampled_from([r".*_proj", "all-linear"])),
    excluded=st.sampled_from([None, ["down_proj"], r".*\.o_proj", ("o_proj", "down_proj")]),
    full=st.sampled_from([None, ["lm_head"], ("lm_head", "norm")]),
    start=st.sampled_from([True, False, *INITIALIZERS]),
    ranks=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 12).map(lambda r: 2 * r), max_size=2),
    alphas=st.dictionaries(st.sampled_from(PATTERNS), st.floats(0.5, 1e3), max_size=2),
    r=st.integers(1, 3).map(lambda r: 2 * r),
    alpha=st.one_of(st.integers(1, 64), st.floats(1e-3, 1e3)),
    dropout=st.floats(0, 0.9),
    flags=st.tuples(st.booleans(), st.booleans()),
    bias=st.sampled_from(["none", "all", "lora_only"]),
)
def test_every_field_survives_and_peft_reads_the_same(
    tmp_path_factory, targets, excluded, full, start, ranks, alphas, r, alpha, dropout, flags, bias
):
    sizes = {"r": r, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "lora_dropout": dropout}
    options = {"target_modules": targets, "exclude_modules": excluded, "modules_to_save": full, "bias": bias}
    config = LoRAConfig(**sizes, **options, init_lora_weights=start, use_rslora=flags[0], fan_in_fan_out=flags[1])
    directory = tmp_path_factory.mktemp("config")
    model = nn.Module()
    model.q_proj = LoRALinear(nn.Linear(9, 7), LoRAConfig(r=2))
    (directory / CONFIG).write_text(json.dumps(peft_config(model, config)))
    found, theirs = read_config(directory), peft.LoraConfig.from_pretrained(directory)
    for name in FIELDS:
        value, own, other = getattr(config, name), getattr(found, name), getattr(theirs, name)
        if name == "init_lora_weights":
            own_start = {"random": False, "kaiming": True, "zero": True, "zero_a": True}.get(value, value)
            assert own == own_start and other == own
        elif name.endswith("_modules") or name == "modules_to_save":
            value = ["q_proj"] if value == "all-linear" else value
            plain = value if value is None or isinstance(value, str) else sorted(value)
            assert (own if isinstance(own, str | None) else sorted(own)) == plain
            assert (other if isinstance(other, str | None) else sorted(other)) == plain
        else:
            assert own == value and other == value, name
    assert found.scale == config.scale


def test_all_linear_is_written_out_so_that_it_means_no_other_layer(tmp_path):
    """In a list, the path "0" would mean "1.0" too, which is no linear layer."""
    base = nn.Sequential(nn.Linear(7, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 4)))
    model = randomize(add_lora(copy.deepcopy(base), LoRAConfig(r=2, lora_alpha=5, target_modules="all-linear")))
    save_adapter(model, tmp_path / "clash")
    assert settings_in(tmp_path / "clash")["target_modules"] == r"0|1\.1"
    x = torch.ones(3, 7)
    for read in (load_adapter(copy.deepcopy(base), tmp_path / "clash"), peft_load(base, tmp_path / "clash")):
        assert error(read(x).detach(), model(x).detach()) <= 1e-6
    save_adapter(adapted(target_modules="all-linear"), tmp_path / "plain")
    found = settings_in(tmp_path / "plain")["target_modules"]
    assert len(found) == 14 and found == sorted(found) and found[-1] == "model.layers.1.self_attn.v_proj"


def test_numbers_of_numpy_torch_and_fractions_are_written(tmp_path):
    numbers = {"r": np.int64(3), "lora_alpha": np.float32(2.5), "lora_dropout": fractions.Fraction(1, 4)}
    config = LoRAConfig(**numbers, rank_pattern={"v_proj": torch.tensor(2)}, target_modules={"q_proj", "v_proj"})
    save_adapter(add_lora(base_of(), config), tmp_path)
    found = read_config(tmp_path)
    assert (found.r, found.lora_alpha, found.lora_dropout, found.rank_pattern) == (3, 2.5, 0.25, {"v_proj": 2})
    assert found.target_modules == ["q_proj", "v_proj"]


def test_little_is_needed_to_read_and_what_has_no_effect_is_passed_over(saved):
    (saved / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    assert read_config(saved) == LoRAConfig(target_modules=["q_proj"])
    ignored = {"revision": "main", "task_type": "CAUSAL_LM", "peft_version": "9.9", "loftq_config": {"loftq_bits": 4}}
    off = {"use_dora": False, "lora_bias": False, "layers_to_transform": None, "rank_pattern": None, "of_2031": None}
    (saved / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]} | ignored | off))
    assert read_config(saved) == LoRAConfig(target_modules=["q_proj"])


def test_the_configuration_is_in_utf_8(tmp_path, monkeypatch):
    model = nn.ModuleDict({"größe": nn.Linear(7, 5)})
    save_adapter(add_lora(model, LoRAConfig(r=2, target_modules=["größe"])), tmp_path)
    text = (tmp_path / CONFIG).read_bytes().decode()
    (tmp_path / CONFIG).write_bytes(text.replace("\\u00f6", "ö").replace("\\u00df", "ß").encode())
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding="latin-1", **more: read(path, encoding, **more))
    assert read_config(tmp_path).target_modules == ["größe"]


def test_the_bases_name_is_written(tmp_path):
    model = adapted()
    model.config._name_or_path = "somewhere/small-llama"
    save_adapter(model, tmp_path / "named")
    assert settings_in(tmp_path / "named")["base_model_name_or_path"] == "somewhere/small-llama"
    save_adapter(add_lora(nn.Sequential(nn.Linear(7, 5)), LoRAConfig(r=2, target_modules=["0"])), tmp_path / "none")
    assert settings_in(tmp_path / "none")["base_model_name_or_path"] is None


def test_the_base_is_named_as_peft_names_it_and_its_auto_class_finds_it(tmp_path):
    base_of().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = randomize(add_lora(copy.deepcopy(base), LoRAConfig(r=3, target_modules=["q_proj"]))).eval()
    save_adapter(model, tmp_path / "own")
    peft_save(peft_of(base, r=3, target_modules=["q_proj"]), tmp_path / "peft")
    own, theirs = settings_in(tmp_path / "own"), settings_in(tmp_path / "peft")
    for key in ("auto_mapping", "base_model_name_or_path", "task_type"):
        assert own[key] == theirs[key]
    assert own["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "own").eval()
    assert error(logits(found, TEXT), logits(model, TEXT)) <= 1e-6
    assert error(logits(load_adapter(base, tmp_path / "own").eval(), TEXT), logits(model, TEXT)) <= 1e-6
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    assert settings_in(tmp_path / "compiled") == own


def test_a_base_that_is_no_model_of_transformers_has_no_class_in_the_file(tmp_path):
    save_adapter(add_lora(nn.Sequential(nn.Linear(7, 5)), LoRAConfig(r=2, target_modules=["0"])), tmp_path)
    assert settings_in(tmp_path)["auto_mapping"] is None and read_config(tmp_path).r == 2


def test_only_the_whole_names_of_saved_modules_are_written(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(7, 5) for name in ("head", "header")})
    config = LoRAConfig(r=2, target_modules=["header"], modules_to_save=["head"])
    save_adapter(add_lora(model, config), tmp_path)
    names = {key.removeprefix(PREFIX) for key in tensors_in(tmp_path)}
    assert names == {"head.weight", "head.bias", "header.lora_A.weight", "header.lora_B.weight"}


@pytest.mark.parametrize(
    "text, says",
    [
        ("[]", ["list"]),
        ("3", ["int"]),
        ("{}", ["None", "'LORA'"]),
        ('{"peft_type": "IA3", "target_modules": ["q_proj"]}', ["'IA3'", "'LORA'"]),
        ('{"peft_type": "ADALORA", "target_r": 4}', ["'ADALORA'"]),
        ('{"peft_type": "lora"}', ["'lora'"]),
    ],
)
def test_another_kind_of_adapter_is_refused(text, says, saved):
    (saved / CONFIG).write_text(text)
    refuses(saved, str(saved / CONFIG), *says)


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_pattern": ["layers"]},
        {"lora_bias": True},
        {"target_parameters": ["mlp.experts"]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [3]},
        {"alora_invocation_tokens": [1]},
        {"arrow_config": {"top_k": 2}},
        {"ensure_weight_tying": True},
        {"velora_config": {"num_groups": 2}},
        {"monteclora_config": {}, "kasa_config": {"beta": 1}},
        {"of_2031": "yes"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_enabled_variant_is_refused_by_name(options, saved):
    rewrite(saved, **options)
    refuses(saved, str(saved / CONFIG), f"enables {list(options)[-1]} = ", "not implemented", "in peft")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"use_dora": True}, ["use_dora"]),
        ({"r": 0}, ["r = 0"]),
        ({"r": "3"}, ["'3'"]),
        ({"r": None}, ["None"]),
        ({"lora_alpha": -1}, ["lora_alpha = -1"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha = nan"]),
        ({"lora_dropout": 1.5}, ["lora_dropout = 1.5"]),
        ({"bias": "some"}, ["bias = 'some'"]),
        ({"init_lora_weights": "olora"}, ["'olora'"]),
        ({"init_lora_weights": "loftq"}, ["'loftq'"]),
        ({"rank_pattern": [1]}, ["rank_pattern", "[1]"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj']"]),
        ({"target_modules": 3}, ["target_modules", "3"]),
        ({"modules_to_save": "lm_head"}, ["modules_to_save", "'lm_head'"]),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options, says, saved):
    rewrite(saved, **options)
    refuses(saved, str(saved / CONFIG), *says)
