"""Adapters on disk, in peft's format, both ways: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, "my_adapter")            # then, in peft: PeftModel.from_pretrained(base, "my_adapter")
    load_adapter(base, "my_adapter")             # and what peft saved, here

Tensors are named base_model.model.<path>.lora_A.weight (r, in) and .lora_B.weight (out, r), for embeddings
.lora_embedding_A and _B; convolutions have (r, in, h, w) and (out, r, 1, 1). The scale is in no tensor: it is
r, lora_alpha and use_rslora in the configuration. Nothing is unpickled. Source: files that peft 0.21 wrote.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor, nn

from .config import LoRAConfig
from .initialization import STARTS, Start
from .layers import LoRAConv2d, LoRAEmbedding, LoRALayer
from .model import Plan, apply_plan, layer_kind, lora_layers, plan_lora

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
COPY = re.compile(r"\.(modules_to_save|original_module)\.")  # peft with bias="all" writes such biases a second time
FIELDS = [field.name for field in dataclasses.fields(LoRAConfig)]
TO_PEFT = {"kaiming": True, "random": False, "zero_a": True, "zero": True}  # the rest has the same name there
# What else peft writes: of no effect on the weights, or allowed at these values only, being a variant otherwise.
INERT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
INERT |= {"task_type", "ensure_weight_tying", "loftq_config", "megatron_config", "megatron_core", "runtime_config"}
INERT |= {"corda_config", "eva_config", "lora_ga_config", "qalora_group_size", "arrow_config", "velora_config"}


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the model's adapter to `directory`, made if need be: factors, trained biases, modules trained in full.

    Both files are written beside and renamed into place: whatever happens, what was there stays whole until then.
    Merged or not makes no difference. Errors: ValueError for a model without adapter, a start that a reader
    cannot replay ("lora_ga"), or numbers that are not finite; OSError as the system gives it. Nothing changed.
    """
    plan = _plan(model)
    if plan.config.start == "lora_ga":
        raise ValueError(
            "init_lora_weights = 'lora_ga' changed the base by a gradient that no file holds; "
            "save the whole model (its state_dict) instead"
        )
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in _tensors(model, plan).items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} has NaN or infinite entries; an adapter that diverged is not worth saving")
    settings = _to_peft(model, plan.config)
    content = {
        TENSORS: format_tensors(tensors, metadata={"format": "pt"}),
        CONFIG: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode(),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        for name, data in content.items():
            with open(beside / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in content:
            os.replace(beside / name, directory / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_adapter(model: nn.Module, directory: str | os.PathLike, trainable: bool = True) -> nn.Module:
    """Adapt a plain model as the files in `directory` say, in place, and return it.

    With trainable = False everything is frozen, for inference. The files are read and checked against the model
    before anything in it changes. A start that peft replays on the base ("pissa") is replayed.

    Errors, the model unchanged: FileNotFoundError for a missing file (a pickled adapter_model.bin is not read);
    ValueError, with the name, for a truncated or foreign file, a configuration that enables what is not
    implemented, targets that the model lacks, missing, unknown or misshapen tensors, and numbers that are not finite.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = _read_tensors(directory)
    plan = plan_lora(model, config)
    if config.start == "lora_ga":
        raise ValueError(f"{directory / CONFIG}: init_lora_weights = 'lora_ga' needs a base that no file holds")
    expected = _expected(model, plan)
    for key, shape in expected.items():
        if key not in tensors:
            raise ValueError(f"{directory / TENSORS} lacks {key}; it is an adapter for another base, or cut short")
        if tuple(tensors[key].shape) != shape:
            raise ValueError(
                f"{directory / TENSORS}: {key} has shape {tuple(tensors[key].shape)}, this model needs {shape}; "
                "it is an adapter for another base"
            )
        if not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{directory / TENSORS}: {key} has NaN or infinite entries")
    unknown = sorted(key for key in set(tensors) - set(expected) if not COPY.search(key))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"{directory / TENSORS} has {unknown[0]}{more}, for which this model has no use")
    built: dict[str, LoRALayer] = {}
    for path, own in plan.layers.items():
        base = model.get_submodule(path)
        kind = layer_kind(base)
        W = kind.matrix(base.weight.detach())
        names = _names(path, kind)
        A, B = (tensors[name].to(W.device) for name in names)
        W0 = STARTS["pissa"](W, own.r, own.scale).W0 if own.start == "pissa" else W
        built[path] = kind(base, own, Start(A.flatten(1).contiguous(), B.flatten(1).contiguous(), W0))
    apply_plan(model, plan, built)
    with torch.no_grad():
        state = dict(model.named_parameters())
        for key, parameter in _others(model, plan).items():
            state[parameter].copy_(tensors[key])
    return model if trainable else model.requires_grad_(False)


def read_config(directory: str | os.PathLike) -> LoRAConfig:
    """The LoRAConfig in an adapter's directory. Errors as load_adapter's."""
    path = Path(directory) / CONFIG
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; name a directory that save_adapter or peft wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it was cut short, or is no adapter's configuration") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{path} has peft_type {kind!r}; only 'LORA' is read here")
    for key, value in settings.items():
        if key not in FIELDS and key not in INERT and value not in (None, False, [], {}):
            raise ValueError(f"{path} enables {key} = {value!r}, which is not implemented; load this adapter in peft")
    known = {key: settings[key] for key in FIELDS if key in settings}
    for key in ("rank_pattern", "alpha_pattern"):
        known[key] = known.get(key) or {}
    try:
        return LoRAConfig(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _plan(model: nn.Module) -> Plan:
    lora_layers(model)
    plan = getattr(model, "lora_plan", None)
    if plan is None:
        raise ValueError(f"{type(model).__name__} was adapted by hand; add_lora or load_adapter remember what to save")
    return plan


def _to_peft(model: nn.Module, config: LoRAConfig) -> dict:
    """The configuration as peft reads it; "all-linear" is written out, as peft does."""
    settings = {name: getattr(config, name) for name in FIELDS}
    settings["init_lora_weights"] = TO_PEFT.get(config.start, config.start)
    if settings["target_modules"] == "all-linear":
        settings["target_modules"] = sorted(lora_layers(model))
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(settings[name], (set, tuple)):
            settings[name] = sorted(settings[name])
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return settings | {"peft_type": "LORA", "base_model_name_or_path": name, "inference_mode": True, "task_type": None}


def _names(path: str, kind: type[LoRALayer]) -> tuple[str, str]:
    if kind is LoRAEmbedding:
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def _file_shapes(base_weight: Tensor, kind: type[LoRALayer], r: int) -> tuple[tuple, tuple]:
    d, k = kind.matrix(base_weight).shape
    if kind is LoRAConv2d:
        return (r, *base_weight.shape[1:]), (d, r, 1, 1)
    return (r, k), (d, r)


def _tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The adapter as the file has it: peft's keys → tensors in its shapes."""
    tensors = {}
    for path, layer in lora_layers(model).items():
        shapes = _file_shapes(layer.weight, type(layer), len(layer.lora_A))
        for key, factor, shape in zip(_names(path, type(layer)), (layer.lora_A, layer.lora_B), shapes):
            tensors[key] = factor.reshape(shape)
    state = dict(model.named_parameters(remove_duplicate=False))
    return tensors | {key: state[name] for key, name in _others(model, plan).items()}


def _others(model: nn.Module, plan: Plan) -> dict[str, str]:
    """peft's keys → this model's names of what is trained beside the factors: biases, modules in full."""
    keys = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, last = name.rpartition(".")
        if any(path == saved or path.startswith(saved + ".") for saved in plan.saved):
            keys[PREFIX + name] = name
        elif last == "bias" and path in plan.layers and plan.config.bias != "none":
            keys[f"{PREFIX}{path}.base_layer.bias"] = name
        elif last == "bias" and plan.config.bias == "all":
            keys[PREFIX + name] = name
    return keys


def _expected(model: nn.Module, plan: Plan) -> dict[str, tuple]:
    """The file's keys and shapes for a plain model that is to be adapted by this plan."""
    shapes = {}
    for path, own in plan.layers.items():
        base = model.get_submodule(path)
        kind = layer_kind(base)
        shapes |= dict(zip(_names(path, kind), _file_shapes(base.weight, kind, own.r)))
    state = dict(model.named_parameters(remove_duplicate=False))
    return shapes | {key: tuple(state[name].shape) for key, name in _others(model, plan).items()}


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / TENSORS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        pickled = (directory / "adapter_model.bin").exists()
        hint = "adapter_model.bin is a pickle, which can run code: convert it in peft" if pickled else "save it first"
        raise FileNotFoundError(f"{path} does not exist; {hint}") from None
    try:
        return parse_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or save it again") from None
