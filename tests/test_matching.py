"""matching.py: which layers a configuration means, against peft; refusals that name what is near."""

import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_ref import LoRAConfig, add_lora, count_parameters
from lora_ref.layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALinear
from lora_ref.matching import lora_layer_class, plan_lora
from lora_ref.model import lora_layers
from tests.tiny_adapters import (
    ARCHITECTURES,
    TEXT,
    adapted,
    base_of,
    both,
    config_of,
    copy_trained,
    error,
    logits,
    peft_layers,
    peft_of,
    randomize,
    same,
    state,
    twins,
)

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@each_architecture
@pytest.mark.parametrize("how", ["names", "pattern", "all-linear", "excluded names", "excluded pattern"])
def test_the_same_layers_are_adapted_and_counted_as_in_peft(name, how):
    architecture = ARCHITECTURES[name]
    targets = {"names": architecture.targets, "pattern": architecture.pattern}.get(how, "all-linear")
    excluded = {"excluded names": [architecture.targets[0]], "excluded pattern": architecture.pattern}.get(how)
    options = config_of(name, target_modules=targets, exclude_modules=excluded)
    base = base_of(name)
    model = add_lora(copy.deepcopy(base), LoRAConfig(**options))
    other = peft_of(base, **options)
    assert lora_layers(model).keys() == peft_layers(other).keys()
    assert tuple(count_parameters(model)) == other.get_nb_trainable_parameters()
    linear = [path for path, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    if how == "all-linear":
        assert set(lora_layers(model)) == set(linear) - {"lm_head"}
    elif excluded:
        assert 0 < len(lora_layers(model)) < len(set(linear) - {"lm_head"})


NAMES = ["q_proj", "v_proj", "down_proj", "embed_tokens", "layers.0.mlp.up_proj", "self_attn.k_proj", "lm_head"]
EXPRESSIONS = [r".*_proj", r"model\.layers\.0\..*_proj", r".*\.(q|k)_proj", r".*(embed_tokens|o_proj)", "lm_head"]
KEYS = ["q_proj", "v_proj", r"layers\.0\..*", r".*proj", "embed_tokens", r"[a-z_]*\.v_proj", "proj", "self_attn.q_proj"]


@settings(max_examples=60)
@given(
    targets=st.one_of(st.lists(st.sampled_from(NAMES), min_size=1, unique=True), st.sampled_from(EXPRESSIONS)),
    excluded=st.one_of(st.none(), st.lists(st.sampled_from(NAMES), max_size=2), st.sampled_from(EXPRESSIONS)),
    ranks=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 6), max_size=3),
    alphas=st.dictionaries(st.sampled_from(KEYS), st.floats(0.5, 40), max_size=3),
    r=st.integers(1, 6),
    alpha=st.sampled_from([1, 2.5, 7, 16]),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    rslora=st.booleans(),
)
def test_random_configurations_mean_the_same_as_in_peft(targets, excluded, ranks, alphas, r, alpha, bias, rslora):
    options = {"target_modules": targets, "exclude_modules": excluded, "r": r, "lora_alpha": alpha, "bias": bias}
    options |= {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    base = base_of()
    try:
        model = add_lora(copy.deepcopy(base), LoRAConfig(**options))
    except ValueError as refusal:  # peft takes a pattern that matches nothing, and keeps silent
        keys = re.search(r"_pattern key '(.*)' matches no adapted layer", str(refusal))
        if keys is None:
            assert "nothing would be adapted" in str(refusal)
            with pytest.raises(ValueError, match="No modules were targeted|not found in the base model"):
                peft_of(base, **options)
        else:
            key = keys[1].replace("\\\\", "\\")
            paths = peft_layers(peft_of(base, **options))
            assert not any(re.match(rf"(.*\.)?({key})$", path) for path in paths)
        return
    other = peft_of(base, **options)
    assert {path: (len(m.lora_A), m.scale) for path, m in lora_layers(model).items()} == {
        path: (m.r["default"], m.scaling["default"]) for path, m in peft_layers(other).items()
    }
    assert tuple(count_parameters(model)) == other.get_nb_trainable_parameters()
    randomize(model)
    copy_trained(model, other)
    assert error(logits(model.eval(), TEXT), logits(other.eval(), TEXT)) <= 2e-6


def test_the_first_matching_pattern_decides():
    ranks = {r"layers\.0\..*": 2, "q_proj": 4, ".*proj": 5}
    model = add_lora(base_of(), LoRAConfig(r=3, target_modules=["q_proj", "v_proj"], rank_pattern=ranks))
    found = {path.removeprefix("model.layers."): len(m.lora_A) for path, m in lora_layers(model).items()}
    assert found == {"0.self_attn.q_proj": 2, "0.self_attn.v_proj": 2, "1.self_attn.q_proj": 4, "1.self_attn.v_proj": 5}


def test_a_name_means_whole_parts_of_a_path():
    """ "proj" is no layer of "q_proj"; "self_attn.q_proj" and whole paths are."""
    whole = "model.layers.1.self_attn.k_proj"
    model = add_lora(base_of(), LoRAConfig(r=3, target_modules=["layers.0.self_attn.q_proj", whole]))
    assert list(lora_layers(model)) == ["model.layers.0.self_attn.q_proj", whole]
    for name in ("proj", "ayers.0.self_attn.q_proj"):
        with pytest.raises(ValueError, match=name):
            add_lora(base_of(), LoRAConfig(r=3, target_modules=[name]))
    with pytest.raises(ValueError, match="matches no path whole"):
        add_lora(base_of(), LoRAConfig(r=3, target_modules="q_proj"))


@pytest.mark.parametrize("name, saved", [("BERT", ["classifier"]), ("RoBERTa", ["dense"]), ("Llama", ["head"])])
def test_the_same_modules_are_trained_in_full_as_in_peft(name, saved):
    """peft takes any ending of a path; each is a copy, so that the embeddings tied to a head stay as they are."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "q_proj"][name == "Llama"]}
    options |= {"target_modules": ["q_proj" if name == "Llama" else "query"], "modules_to_save": saved}
    base = base_of(name)
    model, other = add_lora(copy.deepcopy(base), LoRAConfig(**options)), peft_of(base, **options)
    assert twins(model, other)
    assert count_parameters(model).trainable == other.get_nb_trainable_parameters()[0]
    originals = sum(
        p.numel() for n, p in other.named_parameters() if ".original_module." in n and not n.endswith("embed_tokens")
    )
    shared = sum(p.numel() for p in base.parameters()) + count_parameters(model).trainable
    assert other.get_nb_trainable_parameters()[1] == shared
    assert count_parameters(model).total == shared - (originals if name != "Llama" else 0)  # a tied original is there
    randomize(model)
    copy_trained(model, other)
    batch = ARCHITECTURES[name].batch
    assert error(logits(model.eval(), batch), logits(other.eval(), batch)) <= 1e-6
    if name == "Llama":
        assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
        assert not torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_layers_inside_a_module_to_save_get_no_adapter():
    options = {"r": 3, "target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}
    model = add_lora(base_of("RoBERTa"), LoRAConfig(**options))
    assert type(model.classifier.dense) is nn.Linear and model.classifier.dense.weight.requires_grad
    assert lora_layers(model).keys() == peft_layers(peft_of(base_of("RoBERTa"), **options)).keys()


def test_a_module_to_save_spares_others_whose_names_it_begins():
    model = nn.ModuleDict({name: nn.Linear(7, 5) for name in ("head", "header", "sub")})
    add_lora(model, LoRAConfig(r=2, target_modules="all-linear", modules_to_save=["head"]))
    assert list(lora_layers(model)) == ["header", "sub"] and model["head"].weight.requires_grad


def test_each_kind_of_layer_has_its_class():
    kinds = {name: type(m) for name, m in lora_layers(both("GPT-2")[0]).items()}
    assert kinds["transformer.wte"] is LoRAEmbedding and kinds["transformer.h.0.attn.c_attn"] is LoRAConv1D
    assert {type(m) for m in lora_layers(adapted()).values()} == {LoRALinear}
    assert lora_layer_class(nn.Conv2d(2, 3, 1)) is LoRAConv2d
    assert lora_layer_class(nn.LayerNorm(3)) is lora_layer_class(nn.Conv1d(2, 3, 1)) is None


# refusals

LLAMA_REFUSALS = {  # pitfalls 12, 13: peft#1959, #3658, #3582
    "None": ({"target_modules": None}, ["target_modules is None", "'q_proj'", "all-linear"]),
    "empty": ({"target_modules": []}, ["target_modules = []", "nothing would be adapted"]),
    "a name among others": ({"target_modules": ["q_proj", "v_porj"]}, ["'v_porj'", "did you mean", "'v_proj'"]),
    "a path": ({"target_modules": ["layers.0.mlp.upproj"]}, ["'layers.0.mlp.upproj'", "did you mean", "'up_proj'"]),
    "far off": ({"target_modules": ["zzz"]}, ["'zzz'", "there are", "embed_tokens", "more"]),
    "regex": ({"target_modules": r".*\.q_porj"}, ["matches no path whole", "q_porj", "did you mean", "'q_proj'"]),
    "regex of a beginning": ({"target_modules": r"model\.layers\.0\.self_attn\.q"}, ["matches no path whole"]),
    "no regex": ({"target_modules": "("}, ["'('", "not a regular expression", "unterminated"]),
    "exclude": ({"exclude_modules": ["v_porj"]}, ["exclude_modules has 'v_porj'", "did you mean", "'v_proj'"]),
    "exclude regex": ({"exclude_modules": "v_proj"}, ["exclude_modules = 'v_proj'", "no path whole"]),
    "all excluded": ({"exclude_modules": ["self_attn.q_proj", "v_proj"]}, ["exclude_modules", "nothing would be"]),
    "saved": ({"modules_to_save": ["lm_hat"]}, ["modules_to_save has 'lm_hat'", "did you mean", "'lm_head'"]),
    "all saved": ({"modules_to_save": ["model"]}, ["modules_to_save", "nothing would be adapted"]),
    "rank_pattern": (
        {"rank_pattern": {"q_proj": 2, "k_proj": 2}},
        ["rank_pattern key 'k_proj'", "layers.0.self_attn.q_"],
    ),
    "pattern of a beginning": ({"rank_pattern": {"layers.0": 2}}, ["rank_pattern key 'layers.0'", "no adapted layer"]),
    "alpha_pattern": ({"alpha_pattern": {"proj": 2}}, ["alpha_pattern key 'proj'", "no adapted layer"]),
    "pattern no regex": ({"rank_pattern": {"[": 2}}, ["rank_pattern key = '['", "not a regular expression"]),
    "pattern flags inside": ({"alpha_pattern": {"(?i)Q_PROJ": 2}}, ["'(?i)Q_PROJ'", "not a regular expression"]),
    "container": ({"target_modules": ["q_proj", "mlp"]}, ["model.layers.0.mlp", "LlamaMLP", "Linear, Conv1D"]),
    "norm": ({"target_modules": ["q_proj", "input_layernorm"]}, ["layers.0.input_layernorm", "LlamaRMSNorm"]),
    "rank": ({"r": 13}, ["model.layers.0.self_attn.v_proj: r = 13", "between 1 and 12", "12×16"]),
    "rank by pattern": ({"rank_pattern": {r"1\..*v_proj": 13}}, ["model.layers.1.self_attn.v_proj: r = 13"]),
    "start": ({"init_lora_weights": "lora_ga"}, ["model.layers.0.self_attn.q_proj", "lora_ga", "gradient"]),
    "odd": ({"init_lora_weights": "orthogonal"}, ["model.layers.0.self_attn.q_proj", "r = 3 is odd"]),
}


@pytest.mark.parametrize("case", LLAMA_REFUSALS)
def test_a_refused_call_says_why_and_leaves_the_model_as_it_was(case, refused, rng_untouched):
    options, says = LLAMA_REFUSALS[case]
    model = base_of().train()
    model.model.layers[0].mlp.requires_grad_(False)
    before = state(model)
    config = LoRAConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "bias": "all"} | options)
    with torch.random.fork_rng():
        refused(lambda: add_lora(model, config), *says)
    same(before, state(model))
    error = TypeError if case in ("container", "norm") else ValueError
    with torch.random.fork_rng(), pytest.raises(error):
        add_lora(model, config)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Linear(7, 5)], ids=["no layer", "a bare layer"])
def test_a_model_without_a_layer_to_adapt_is_refused(model, refused):
    refused(lambda: add_lora(model, LoRAConfig(r=2, target_modules="all-linear")), "'all-linear' means no layer")


def test_planning_changes_nothing():
    model = base_of()
    before = state(model)
    config = LoRAConfig(r=4, use_rslora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    plan = plan_lora(model, config)
    same(before, state(model))
    assert list(plan.layers) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)] and plan.saved == ["lm_head"]
    assert all(own.scale == 8 / math.sqrt(4) for own in plan.layers.values())
