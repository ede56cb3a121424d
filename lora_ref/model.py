"""LoRA in any nn.Module: adapt the layers that a config means, freeze the rest, merge, count.

    model = add_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

Which layers a config means is decided in `matching`. A module's *path* is its name in model.named_modules(), such as
"model.layers.0.self_attn.q_proj".
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn

from ._apply_plan import InitFn, apply_plan, build_layers
from .config import LoRAConfig
from .layers import LoRALayer
from .matching import _check_module, plan_lora


class Count(NamedTuple):
    """Numbers in a model's parameters, a tied one counted once; `percent` is 100·trainable/total.

    Args:
        trainable: how many are trained.
        total: how many there are, adapters included.

    Example:
        >>> Count(trainable=3, total=200).percent
        1.5
    """

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """The trained share, in per cent; 0 for a model without parameters."""
        return 100 * self.trainable / max(1, self.total)


def add_lora(
    model: nn.Module,
    config: LoRAConfig,
    init_fn: InitFn | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Adapt the model in place and return it: W = W0 + s·B·A in every targeted layer, everything else frozen.

    config.target_modules: a list of names, each a path or its last dotted parts ("q_proj", "self_attn.q_proj"); a
    string, a regular expression that must match whole paths; or "all-linear", every linear layer but the output
    head. config.exclude_modules takes from these, in the same ways. rank_pattern and alpha_pattern give layers
    another r or α: the first key that matches the end of the path, from its beginning or from a dot. modules_to_save
    (any ending of a path, as in PEFT) are trained in full, each as a copy of its own, so that a tied weight elsewhere
    stays frozen. config.bias: "lora_only" trains the adapted layers' biases, "all" every bias.

    With gradient checkpointing the inputs of the first layers are made to require a gradient, without which there
    would be none for the adapters. Works on the meta device, for counting.

    Args:
        model: a plain model; one that torch.compile wraps is adapted inside the wrapper.
        config: which layers, rank, α, dropout, start, and what is trained beside A and B.
        init_fn: init_fn(path, W, layer_config) → Init or None overrides how a layer starts, for W (d, k); None (by
            default, or for a layer) leaves it to config.init_lora_weights.
        generator: on the model's device, makes random starts reproducible; None is torch's global one.

    Returns:
        The same model. Its attribute `lora_plan` is the Plan, which save_adapter reads.

    Raises:
        ValueError: targets, exclusions, patterns or modules_to_save that match nothing, with near matches; a rank
            above min(d, k), with the path; a model that is adapted already. The model is unchanged after any error.
        TypeError: a matched module of a kind that has no LoRA layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4))
        >>> model = add_lora(model, LoRAConfig(r=2, lora_alpha=3, target_modules=["0"]))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.lora_A', '0.lora_B']

    Source:
        Hu et al. 2021 (arXiv 2106.09685); PEFT, get_peft_model, for what the config's fields mean.
    """
    inner = uncompiled(model)
    plan = plan_lora(inner, config)
    layers = build_layers(inner, plan, init_fn or (lambda path, W, layer_config: None), generator)
    if init_fn is not None:  # a reader of the adapter needs to know whether the base is still what it was
        is_base = all(layer.weight is inner.get_submodule(path).weight for path, layer in layers.items())
        plan = plan._replace(config=dataclasses.replace(config, init_lora_weights=is_base or "lora_ga"))
    apply_plan(inner, plan, layers)
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper.

    Args:
        model: compiled or not.

    Returns:
        The wrapped model; a model without a wrapper is itself.

    Example:
        >>> model = nn.Linear(7, 5)
        >>> uncompiled(torch.compile(model)) is model, uncompiled(model) is model
        (True, True)
    """
    return getattr(model, "_orig_mod", model)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The model's LoRA layers by path.

    Args:
        model: an adapted model.

    Returns:
        The layers, in the model's order.

    Raises:
        ValueError: a model without any.
        TypeError: a model that is no nn.Module.

    Example:
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4))
        >>> model = add_lora(model, LoRAConfig(r=2, lora_alpha=3, target_modules="all-linear"))
        >>> {path: layer.scale for path, layer in lora_layers(model).items()}
        {'0': 1.5, '2': 1.5}
    """
    _check_module(model)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layer; add_lora(model, config) puts them in")
    return layers


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All A and B by name.

    Args:
        model: an adapted model.

    Returns:
        The parameters, named as in model.named_parameters().

    Raises:
        ValueError: a model without a LoRA layer.
        TypeError: a model that is no nn.Module.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(7, 5)), LoRAConfig(r=2, lora_alpha=3, target_modules=["0"]))
        >>> {name: tuple(parameter.shape) for name, parameter in lora_parameters(model).items()}
        {'0.lora_A': (2, 7), '0.lora_B': (5, 2)}
    """
    return {
        f"{path}.{name}": getattr(layer, name)
        for path, layer in lora_layers(model).items()
        for name in ("lora_A", "lora_B")
    }


def merge(model: nn.Module) -> None:
    """Form W0 + s·B·A in every LoRA layer, for inference at the base's speed; see LoRALayer.

    Args:
        model: an adapted model.

    Raises:
        RuntimeError: a layer is merged already, with its path. Nothing is changed after any error.
        ValueError: a model without a LoRA layer.
        TypeError: a model that is no nn.Module.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(7, 5)), LoRAConfig(r=2, lora_alpha=3, target_modules=["0"]))
        >>> merge(model.eval())
        >>> model[0].merged
        True
    """
    _check_merged(model, merged=False, fix="unmerge(model) first")
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo merge: W0 is in use again, bit for bit what it was.

    Args:
        model: a merged model.

    Raises:
        RuntimeError: a layer is not merged, with its path. Nothing is changed after any error.
        ValueError: a model without a LoRA layer.
        TypeError: a model that is no nn.Module.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(7, 5)), LoRAConfig(r=2, lora_alpha=3, target_modules=["0"]))
        >>> merge(model.eval())
        >>> unmerge(model)
        >>> model[0].merged
        False
    """
    _check_merged(model, merged=True, fix="there is nothing to undo; merge(model) merges")
    for layer in lora_layers(model).values():
        layer.unmerge()


def count_parameters(model: nn.Module) -> Count:
    """Trainable and all numbers of a model, adapted or not; works on the meta device.

    They are counted as PEFT's print_trainable_parameters counts them, but for the originals of modules_to_save, which
    PEFT keeps and counts beside the copies.

    Args:
        model: any model.

    Returns:
        Count(trainable, total), with `percent`.

    Raises:
        TypeError: a model that is no nn.Module.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(7, 5)), LoRAConfig(r=2, lora_alpha=3, target_modules=["0"]))
        >>> count_parameters(model)  # 2·(7 + 5) of 7·5 + 5 + 2·(7 + 5)
        Count(trainable=24, total=64)
    """
    _check_module(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Count(trainable, sum(parameter.numel() for parameter in model.parameters()))


def _check_merged(model: nn.Module, merged: bool, fix: str) -> None:
    """Refuse a model with a layer in the other state, before any is changed."""
    for path, layer in lora_layers(model).items():
        if layer.merged != merged:
            raise RuntimeError(f"{path} is {'not merged' if merged else 'merged already'}; {fix}")
