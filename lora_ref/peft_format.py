"""PEFT's format of an adapter: its configuration, its tensors' names and shapes, and how they correspond to ours.

Tensors are named base_model.model.<path>.lora_A.weight (r, in) and .lora_B.weight (out, r), for embeddings
.lora_embedding_A and _B; convolutions have (r, in, h, w) and (out, r, 1, 1). The scale is in no tensor: it follows from
r, lora_alpha and use_rslora in the configuration. Source: files that PEFT 0.21 wrote.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

from torch import Tensor, nn

from ._adapter_files import CONFIG, unfinished_save
from .config import LoRAConfig
from .layers import LoRAConv2d, LoRAEmbedding, LoRALayer
from .matching import Plan
from .model import lora_layers, uncompiled

PREFIX = "base_model.model."  # begins the name of every tensor
DUPLICATE_KEYS = re.compile(r"\.(modules_to_save|original_module)\.")  # peft with bias="all" writes such biases twice
CLASSIFIER_HEADS = ("classifier", "score")  # peft has both in every classifier's modules_to_save; a model has one
FIELDS = [field.name for field in dataclasses.fields(LoRAConfig)]
TO_PEFT = {"kaiming": True, "random": False, "zero_a": True, "zero": True}  # the rest has the same name there
# What else peft writes: of no effect on the weights, or allowed at these values only, being a variant otherwise.
IGNORED_PEFT_KEYS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"}
IGNORED_PEFT_KEYS |= {"revision", "task_type", "loftq_config", "megatron_config", "megatron_core", "runtime_config"}
IGNORED_PEFT_KEYS |= {"corda_config", "eva_config", "lora_ga_config", "qalora_group_size"}


def read_config(directory: str | os.PathLike) -> LoRAConfig:
    """The LoRAConfig in an adapter's directory, written by PEFT or by save_adapter.

    Args:
        directory: holds adapter_config.json, in UTF-8; peft_type and target_modules are enough in it.

    Returns:
        The configuration; fields that the file lacks have their defaults.

    Raises:
        FileNotFoundError: no such file; after a save that was cut short the message says how to restore it.
        ValueError: a file that is no configuration of a LoRA adapter, enables what is not implemented here, or has a
            field out of range; with the file's name.
        OSError: a file that cannot be read.

    Example:
        >>> _ = Path("adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
        >>> config = read_config(".")
        >>> config.r, config.lora_alpha, config.target_modules
        (4, 8, ['q_proj'])
    """
    path = Path(directory) / CONFIG
    settings = _read_json(path)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        found = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{path} has peft_type {found!r}; only 'LORA' is read here")
    for key, value in settings.items():
        is_off = value is None or value is False or value in ([], {})
        if key not in FIELDS and key not in IGNORED_PEFT_KEYS and not is_off:
            raise ValueError(f"{path} enables {key} = {value!r}, which is not implemented; load this adapter in peft")
    fields = {key: settings[key] for key in FIELDS if key in settings}
    for key in ("rank_pattern", "alpha_pattern"):
        fields[key] = fields.get(key) or {}
    try:
        return LoRAConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        fix = "name a directory that save_adapter or peft wrote"
        if folder := unfinished_save(path.parent):
            fix = f"a save still runs, or was cut short: then move the adapter_* files of {folder} to {path.parent}"
        raise FileNotFoundError(f"{path} does not exist; {fix}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it was cut short, or is no adapter's configuration") from None


def peft_config(model: nn.Module, config: LoRAConfig) -> dict[str, object]:
    """The configuration as PEFT reads it; "all-linear" is written out as a list of paths, as PEFT does.

    For a model of transformers its class and its name or path are included, with which PEFT's AutoPeftModel… finds
    the base: the path is the one that the base was loaded from, and so of use on the same machine alone.

    Args:
        model: the adapted model, compiled or not.
        config: of the whole adapter.

    Returns:
        The settings of adapter_config.json by name. Lists are sorted; numbers may be NumPy's or torch's.

    Raises:
        ValueError: "all-linear" for a model without a LoRA layer.

    Example:
        >>> from lora_ref.model import add_lora
        >>> config = LoRAConfig(r=2, lora_alpha=3, target_modules="all-linear")
        >>> settings = peft_config(add_lora(nn.Sequential(nn.Linear(7, 5), nn.Tanh()), config), config)
        >>> settings["peft_type"], settings["target_modules"], settings["init_lora_weights"]
        ('LORA', ['0'], True)
    """
    settings = {name: getattr(config, name) for name in FIELDS}
    settings["init_lora_weights"] = TO_PEFT.get(config.init_name, config.init_name)
    if settings["target_modules"] == "all-linear":
        paths = sorted(map(plain_path, lora_layers(model)))
        others = {plain_path(path) for path, _ in model.named_modules()} - set(paths)
        clash = any(other.endswith("." + path) for other in others for path in paths)  # "0" would mean "1.0" too
        settings["target_modules"] = "|".join(map(re.escape, paths)) if clash else paths
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(settings[name], (set, tuple)):
            settings[name] = sorted(settings[name])
    base_class, mapping = type(uncompiled(model)), None
    if base_class.__module__.startswith("transformers."):
        mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    settings |= {"auto_mapping": mapping, "base_model_name_or_path": name_or_path}
    return settings | {"peft_type": "LORA", "inference_mode": True, "task_type": None}


def plain_path(path: str) -> str:
    """The path without the parts that torch.compile puts around a part of the model.

    Args:
        path: of a module or a parameter.

    Returns:
        The path in the model that is not compiled.

    Example:
        >>> plain_path("layers.0._orig_mod.q_proj.weight")
        'layers.0.q_proj.weight'
    """
    return path.replace("_orig_mod.", "")


def factor_keys(path: str, layer_class: type[LoRALayer]) -> tuple[str, str]:
    """The keys of A and B in adapter_model.safetensors.

    Args:
        path: the layer's path in the model.
        layer_class: its class of LoRA layer.

    Returns:
        The two keys.

    Example:
        >>> from lora_ref.layers import LoRALinear
        >>> factor_keys("layers.0.q_proj", LoRALinear)[0]
        'base_model.model.layers.0.q_proj.lora_A.weight'
        >>> factor_keys("wte", LoRAEmbedding)[1]
        'base_model.model.wte.lora_embedding_B'
    """
    path = plain_path(path)
    if layer_class is LoRAEmbedding:
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def factor_shapes(base_weight: Tensor, layer_class: type[LoRALayer], r: int) -> tuple[tuple, tuple]:
    """The shapes of A and B in adapter_model.safetensors.

    Args:
        base_weight: as the base stores it.
        layer_class: the class of LoRA layer that wraps the base.
        r: the rank.

    Returns:
        (r, k) and (d, r); of a convolution (r, c, h, w) and (d, r, 1, 1).

    Example:
        >>> import torch
        >>> factor_shapes(torch.ones(5, 2, 3, 4), LoRAConv2d, 6)
        ((6, 2, 3, 4), (5, 6, 1, 1))
    """
    d, k = layer_class.weight_to_matrix(base_weight).shape
    if layer_class is LoRAConv2d:
        return (r, *base_weight.shape[1:]), (d, r, 1, 1)
    return (r, k), (d, r)


def trained_beside(model: nn.Module, plan: Plan) -> dict[str, str]:
    """PEFT's keys → this model's names of what is trained beside A and B: biases, modules in full (buffers too).

    Args:
        model: plain or adapted.
        plan: which layers are adapted, and what is trained in full.

    Returns:
        The names by key, in the order of the state dict.

    Example:
        >>> from lora_ref.matching import plan_lora
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4))
        >>> plan = plan_lora(model, LoRAConfig(target_modules=["0"], bias="lora_only", modules_to_save=["1"]))
        >>> trained_beside(model, plan)["base_model.model.0.base_layer.bias"]
        '0.bias'
    """
    keys, adapted = {}, set(map(plain_path, plan.layers))
    saved = list(map(plain_path, plan.saved))
    for name in model.state_dict(keep_vars=True):
        path, _, last = plain_path(name).rpartition(".")
        if any(path == s or path.startswith(s + ".") for s in saved):
            keys[PREFIX + plain_path(name)] = name
        elif last == "bias" and path in adapted and plan.config.bias != "none":
            keys[f"{PREFIX}{path}.base_layer.bias"] = name
        elif last == "bias" and plan.config.bias == "all":
            keys[PREFIX + plain_path(name)] = name
    return keys
