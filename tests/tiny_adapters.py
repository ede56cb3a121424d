"""Tiny models of every architecture, adapters on them, here and in peft, and their files: what the tests share."""

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from lora_ref import LoRAConfig, add_lora, load_adapter
from lora_ref._adapter_files import CONFIG, TENSORS
from lora_ref.layers import LoRAEmbedding, LoRALayer

logging.set_verbosity_error()

F32, BF16 = torch.float32, torch.bfloat16


class Architecture(NamedTuple):
    build: Callable  # a tiny one, without dropout; r = 3 fits every layer
    batch: dict  # with labels
    targets: list  # names
    pattern: str  # a regular expression for other layers
    heads: tuple = ()  # modules_to_save


def whole_numbers(*shape, high=31):
    return torch.randint(2, high, shape, generator=torch.Generator().manual_seed(0))


IDS = whole_numbers(2, 7)
TEXT = {"input_ids": IDS, "labels": IDS}
CLASSES = {"input_ids": IDS, "labels": torch.tensor([2, 0])}
IMAGES = {
    "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    "labels": CLASSES["labels"],
}
ENCODER = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "initializer_range": 0.2,
}


def llama(**options):
    """Queries of 4 heads share the keys and values of 2; the head is tied to the embeddings."""
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | tokens | options))


def gpt2():
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes | dropout, bos_token_id=0, eos_token_id=1))


def bert():
    return BertForSequenceClassification(BertConfig(**ENCODER))


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**ENCODER, pad_token_id=1))


def t5():
    sizes = {"vocab_size": 31, "d_model": 16, "d_ff": 24, "d_kv": 6, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))


def vit():
    options = {name: value for name, value in ENCODER.items() if name != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**options, image_size=8, patch_size=4))


ARCHITECTURES = {
    "Llama": Architecture(
        llama, TEXT, ["q_proj", "v_proj", "down_proj"], r"model\.layers\.1\.(mlp|self_attn)\..*_proj"
    ),
    "GPT-2": Architecture(gpt2, TEXT, ["c_attn", "mlp.c_proj", "wte"], r".*\.h\.\d\.attn\.c_.*"),
    "BERT": Architecture(
        bert, CLASSES, ["query", "intermediate.dense"], r".*\.(key|value|output\.dense)", ("classifier",)
    ),
    "RoBERTa": Architecture(roberta, CLASSES, ["value", "word_embeddings"], r".*\.layer\.0\..*dense", ("classifier",)),
    "T5": Architecture(t5, TEXT, ["q", "v", "wo"], r"(encoder|decoder)\.block\.1\..*\.(k|wi)"),
    "ViT": Architecture(vit, IMAGES, ["q_proj", "fc2"], r".*\.(v_proj|fc1)", ("classifier",)),
}
CONFIGS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "bias": "lora_only"},
    "patterns": {"bias": "all"},  # patterns_of
    "saved": {"modules_to_save": True},
}


@functools.cache
def _base(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = ARCHITECTURES[name].build()
        for module in model.modules():  # biases that are not 0
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, std=0.1)
    return model


def base_of(name="Llama"):
    return copy.deepcopy(_base(name))


def config_of(name, kind="plain", **options):
    """LoRAConfig's arguments, peft's too."""
    architecture = ARCHITECTURES[name]
    options = {"r": 3, "lora_alpha": 5, "target_modules": architecture.targets} | CONFIGS[kind] | options
    options["fan_in_fan_out"] = name == "GPT-2"
    if kind == "patterns":
        first, second = architecture.targets[:2]
        options |= {"rank_pattern": {first: 2, f".*{second}": 4}, "alpha_pattern": {second: 7}}
    if "modules_to_save" in options:
        options["modules_to_save"] = list(architecture.heads) or None
    return options


def peft_of(base, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on fan_in_fan_out, tied heads
        return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))


def peft_layers(other):
    return {path: m for path, m in other.base_model.model.named_modules() if isinstance(m, LoraLayer)}


def peft_name(model, name):
    """peft's name, inside its base_model.model, for a parameter of ours."""
    path, _, last = name.rpartition(".")
    for saved in model.lora_plan.saved:
        if name.startswith(saved + "."):
            return f"{saved}.modules_to_save.default.{name.removeprefix(saved + '.')}"
    layer = model.get_submodule(path)
    if not isinstance(layer, LoRALayer):
        return name
    if last in ("weight", "bias"):
        return f"{path}.base_layer.{last}"
    if isinstance(layer, LoRAEmbedding):
        return f"{path}.{last.replace('lora_', 'lora_embedding_')}.default"
    return f"{path}.{last}.default.weight"


def twins(model, other):
    """(own parameter, peft's) for all that is trained; it is the same set on both sides."""
    theirs = {name: p for name, p in other.base_model.model.named_parameters() if p.requires_grad}
    own = {peft_name(model, name): p for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == theirs.keys()
    return [(own[name], theirs[name]) for name in own]


def randomize(model, seed=1, std=0.2):
    """Give all that is trained other numbers, as training would; the factors, numbers of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(0 if "lora_" in name else 1)
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def copy_trained(model, other):
    """Into peft's model."""
    with torch.no_grad():
        for own, theirs in twins(model, other):
            theirs.copy_(own.view(theirs.shape))


def both(name, kind="plain", **options):
    """The same adapter, random, here and in peft, on the same base."""
    base, options = base_of(name), config_of(name, kind, **options)
    model = randomize(add_lora(copy.deepcopy(base), LoRAConfig(**options)))
    other = peft_of(base, **options)
    copy_trained(model, other)
    return model.eval(), other.eval()


def error(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def adapted(**options):
    """A tiny Llama whose adapter does something."""
    config = LoRAConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]} | options)
    return randomize(add_lora(base_of(), config)).eval()


def state(model):
    """All that a refused call must leave alone."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "modules": {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "plan": getattr(model, "lora_plan", None),
    }


def same(before, after):
    assert before["values"].keys() == after["values"].keys()
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    assert {k: v for k, v in before.items() if k != "values"} == {k: v for k, v in after.items() if k != "values"}


# files


def peft_save(other, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the embeddings are saved too
        other.save_pretrained(directory)


def peft_load(base, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on fan_in_fan_out, tied heads
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()


def tensors_in(directory):
    return load_file(Path(directory) / TENSORS)


def settings_in(directory):
    return json.loads((Path(directory) / CONFIG).read_text())


def rewrite(directory, change=lambda tensors: None, **options):
    """The same adapter with other tensors or settings."""
    tensors, found = tensors_in(directory), settings_in(directory)
    change(tensors)
    save_file(tensors, Path(directory) / TENSORS, metadata={"format": "pt"})
    (Path(directory) / CONFIG).write_text(json.dumps(found | options))


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}


def refuses(directory, *says, error=ValueError, base=None):
    """Loading fails, says this, and leaves the model as it was."""
    model = base_of() if base is None else base
    before = state(model)
    with pytest.raises(error) as refusal:
        load_adapter(model, directory)
    for part in says:
        assert part in str(refusal.value), f"{part!r} is not in: {refusal.value}"
    same(before, state(model))
