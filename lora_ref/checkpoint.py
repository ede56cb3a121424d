"""Adapters on disk, in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, "my_adapter")            # then, in peft: PeftModel.from_pretrained(base, "my_adapter")
    load_adapter(base, "my_adapter")             # and what peft saved, here

The format is described in `peft_format`. Nothing is unpickled.
"""

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor, nn

from ._adapter_files import CONFIG, TENSORS, write_pair
from ._apply_plan import apply_plan, build_layers
from .config import LoRAConfig
from .initialization import INITIALIZERS, Init
from .layers import LoRALinear
from .matching import Plan, _planned_layer_class, plan_lora
from .model import lora_layers, uncompiled
from .peft_format import (
    CLASSIFIER_HEADS,
    DUPLICATE_KEYS,
    PREFIX,
    factor_keys,
    factor_shapes,
    peft_config,
    read_config,
    trained_beside,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that a file's factors may have


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the model's adapter to `directory`: factors, trained biases, modules trained in full.

    Both files are written into a folder inside it and renamed into place, and an old configuration that differs is
    taken away first: a kill at any moment leaves the old adapter, the new one, or no configuration (load_adapter then
    says how to restore it), and what it left behind is removed by the next save. Saves to one directory by this user
    on this machine take turns. Merged, compiled or not makes no difference to the bytes.

    Args:
        model: adapted by add_lora or load_adapter.
        directory: made if need be; in the end it holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: a model without adapter, a start that a reader cannot replay ("lora_ga", add_lora's `init_fn` with
            another base, "pissa" but in linear layers), or numbers that are not finite. The files are unchanged
            after any error.
        TypeError: a model that is no nn.Module.
        OSError: as the system gives it.

    Example:
        >>> model = nn.Sequential(nn.Linear(7, 5))
        >>> from lora_ref.model import add_lora
        >>> save_adapter(add_lora(model, LoRAConfig(r=2, lora_alpha=3, target_modules=["0"])), "my_adapter")
        >>> sorted(path.name for path in Path("my_adapter").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    plan = _plan_of(model)
    _check_start(model, plan)
    tensors = _adapter_tensors(model, plan)
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device and holds no numbers; there is nothing to save")
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} has NaN or infinite entries; an adapter that diverged is not worth saving")
    settings = json.dumps(peft_config(model, plan.config), indent=2, sort_keys=True, default=_number) + "\n"
    write_pair(Path(directory), format_tensors(tensors, metadata={"format": "pt"}), settings.encode())


def load_adapter(model: nn.Module, directory: str | os.PathLike, trainable: bool = True) -> nn.Module:
    """Adapt a plain model as the files in `directory` say, in place, and return it.

    The files are read and checked against the model before anything in it changes. A start that PEFT replays on the
    base ("pissa") is replayed. Factors keep the file's dtype, biases and modules trained in full the model's.

    Args:
        model: the plain base that the adapter was trained on, with its numbers; compiled or not.
        directory: holds adapter_config.json and adapter_model.safetensors, written by save_adapter or PEFT.
        trainable: False freezes everything, for inference.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a missing file (a pickled adapter_model.bin is not read). The model is unchanged after any
            error.
        ValueError: with the name, a truncated or foreign file, a configuration that enables what is not implemented,
            targets that the model lacks, missing, unknown or misshapen tensors, numbers that are not finite, files
            that were saved again while they were read, or a model on the meta device.
        TypeError: a model that is no nn.Module.

    Example:
        >>> from lora_ref.model import add_lora
        >>> config = LoRAConfig(r=2, lora_alpha=3, target_modules=["0"])
        >>> save_adapter(add_lora(nn.Sequential(nn.Linear(7, 5)), config), "my_adapter")
        >>> load_adapter(nn.Sequential(nn.Linear(7, 5)), "my_adapter", trainable=False)
        Sequential(
          (0): LoRALinear(d=5, k=7, r=2, lora_alpha=3, scale=1.5 (α/r))
        )
    """
    directory, inner = Path(directory), uncompiled(model)
    config = read_config(directory)
    tensors = _read_tensors(directory)
    if read_config(directory) != config:
        raise ValueError(f"{directory} was saved again while it was read; load it again")
    plan = plan_lora(inner, _without_missing_heads(inner, config))
    if config.init_name == "lora_ga":
        raise ValueError(f"{directory / CONFIG}: init_lora_weights = 'lora_ga' needs a base that no file holds")
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise ValueError(f"this {type(inner).__name__} is on the meta device and holds no numbers; load its own first")
    _check_tensors(inner, plan, tensors, directory / TENSORS)

    def init_fn(path: str, W: Tensor, layer_config: LoRAConfig) -> Init:
        layer_class = _planned_layer_class(inner.get_submodule(path))
        A, B = (tensors[key].to(W.device).flatten(1).contiguous() for key in factor_keys(path, layer_class))
        is_replayed = layer_config.init_name == "pissa" and issubclass(layer_class, LoRALinear)  # as peft does
        return Init(A, B, INITIALIZERS["pissa"](W, layer_config.r, layer_config.scale).W0 if is_replayed else W)

    apply_plan(inner, plan, build_layers(inner, plan, init_fn))
    with torch.no_grad():
        state = inner.state_dict(keep_vars=True)
        for key, name in trained_beside(inner, plan).items():
            state[name].copy_(tensors[key])
    return model if trainable else model.requires_grad_(False)


def _plan_of(model: nn.Module) -> Plan:
    """What add_lora or load_adapter did to the model."""
    lora_layers(model)
    plan = getattr(model, "lora_plan", None)
    if plan is None:
        raise ValueError(f"{type(model).__name__} was adapted by hand; add_lora or load_adapter remember what to save")
    return plan


def _check_start(model: nn.Module, plan: Plan) -> None:
    """Refuse an adapter whose W0 a reader could not find again from the base and the file."""
    if plan.config.init_name == "lora_ga":
        raise ValueError(
            "the start (init_lora_weights = 'lora_ga', or add_lora's `init_fn`) changed the base by what no file "
            "holds; save the whole model (its state_dict) instead"
        )
    for path in plan.layers if plan.config.init_name == "pissa" else ():
        if not isinstance(layer := model.get_submodule(path), LoRALinear):
            raise ValueError(
                f"{path}: peft replays init_lora_weights = 'pissa' on linear layers alone, this is a "
                f"{type(layer).__name__}; save the whole model (its state_dict) instead"
            )


def _adapter_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The adapter as the file has it: peft's keys → tensors in its shapes, which share the model's memory."""
    tensors = {}
    for path, layer in lora_layers(model).items():
        keys = factor_keys(path, type(layer))
        shapes = factor_shapes(layer.weight, type(layer), len(layer.lora_A))
        for key, factor, shape in zip(keys, (layer.lora_A, layer.lora_B), shapes, strict=True):
            tensors[key] = factor.reshape(shape)
    state = model.state_dict(keep_vars=True)
    return tensors | {key: state[name] for key, name in trained_beside(model, plan).items()}


def _expected_tensors(model: nn.Module, plan: Plan) -> dict[str, tuple[tuple, torch.dtype]]:
    """The file's keys with their shapes and dtypes, for a plain model; float32 stands for any floating-point dtype."""
    expected: dict[str, tuple[tuple, torch.dtype]] = {}
    for path, layer_config in plan.layers.items():
        base = model.get_submodule(path)
        layer_class = _planned_layer_class(base)
        keys = factor_keys(path, layer_class)
        shapes = factor_shapes(base.weight, layer_class, layer_config.r)
        expected |= {key: (shape, torch.float32) for key, shape in zip(keys, shapes, strict=True)}
    state = model.state_dict(keep_vars=True)
    others = trained_beside(model, plan)
    return expected | {key: (tuple(state[name].shape), state[name].dtype) for key, name in others.items()}


def _check_tensors(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], file: Path) -> None:
    """Refuse a file that lacks a tensor, has one that does not fit, or one that the model has no use for."""
    expected = _expected_tensors(model, plan)
    for key, (shape, dtype) in expected.items():
        if key not in tensors:
            raise ValueError(f"{file} lacks {key}; it is an adapter for another base, or cut short")
        found = tensors[key]
        if tuple(found.shape) != shape:
            raise ValueError(
                f"{file}: {key} has shape {tuple(found.shape)}, this model needs {shape}; "
                "it is an adapter for another base"
            )
        if found.dtype not in (FLOATS if dtype.is_floating_point else (dtype,)):
            raise ValueError(f"{file}: {key} holds {found.dtype}, this model needs {dtype}")
        if not torch.isfinite(found).all():
            raise ValueError(f"{file}: {key} has NaN or infinite entries")
    others = {key for key in set(tensors) - set(expected) if not DUPLICATE_KEYS.search(key)}
    unknown = sorted(key for key in others if not _is_copy_of_base(model, key, tensors[key]))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"{file} has {unknown[0]}{more}, for which this model has no use")


def _is_copy_of_base(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether this is a copy of a weight that the model has: peft writes adapted embeddings' so."""
    weight = model.state_dict().get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    return weight is not None and weight.shape == tensor.shape and torch.equal(weight, tensor.to(weight))


def _without_missing_heads(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The config without the classifier heads that peft names and this model lacks."""
    if config.modules_to_save is None or not isinstance(model, nn.Module):
        return config
    paths = [path for path, _ in model.named_modules()]
    missing = {name for name in CLASSIFIER_HEADS if not any(path.endswith(name) for path in paths)}
    return dataclasses.replace(config, modules_to_save=[name for name in config.modules_to_save if name not in missing])


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / TENSORS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        pickled = (directory / "adapter_model.bin").exists()
        fix = "adapter_model.bin is a pickle, which can run code: convert it in peft" if pickled else "save it first"
        raise FileNotFoundError(f"{path} does not exist; {fix}") from None
    try:
        return parse_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or save it again") from None


def _number(value) -> int | float:
    """What json cannot write: NumPy's and torch's numbers, fractions."""
    return value.item() if hasattr(value, "item") else float(value)
