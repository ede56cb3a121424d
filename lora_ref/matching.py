"""Which layers of a model a LoRAConfig means: names, patterns, exclusions, modules trained in full.

    plan = plan_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

Names are matched as PEFT matches them, so that a configuration means the same in both. A module's *path* is its name in
model.named_modules(), such as "model.layers.0.self_attn.q_proj".
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeVar

from torch import nn

from ._checks import check_regex, did_you_mean
from .config import LoRAConfig
from .layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear

Number = TypeVar("Number", int, float)
PATTERN = r"(.*\.)?({})$"  # what a key of rank_pattern or alpha_pattern must match


class Plan(NamedTuple):
    """What add_lora does to a model: which layers get an adapter, and which modules are trained in full.

    Args:
        config: the configuration of the whole adapter.
        layers: the config of each layer to adapt, with its own r and α, by path.
        saved: the paths of the modules to train in full.

    Example:
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4))
        >>> config = LoRAConfig(r=2, lora_alpha=3, target_modules=["0", "2"], rank_pattern={"2": 1})
        >>> plan = plan_lora(model, config)
        >>> {path: layer_config.r for path, layer_config in plan.layers.items()}, plan.saved
        ({'0': 2, '2': 1}, [])
    """

    config: LoRAConfig
    layers: dict[str, LoRAConfig]
    saved: list[str]


def lora_layer_class(module: nn.Module) -> type[LoRALayer] | None:
    """The class of LoRA layer that wraps this module; None where there is none.

    Args:
        module: any module.

    Returns:
        LoRALinear, LoRAConv1D (for GPT-2's Conv1D), LoRAEmbedding, LoRAConv2d or None.

    Example:
        >>> lora_layer_class(nn.Embedding(11, 5)).__name__
        'LoRAEmbedding'
        >>> lora_layer_class(nn.LayerNorm(5)) is None
        True
    """
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return LoRAConv1D
    classes = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding, nn.Conv2d: LoRAConv2d}
    return next((layer_class for base, layer_class in classes.items() if isinstance(module, base)), None)


def _planned_layer_class(module: nn.Module) -> type[LoRALayer]:
    """The class of LoRA layer of a module that a plan targets, which has one: plan_lora refuses any other."""
    layer_class = lora_layer_class(module)
    assert layer_class is not None, f"{type(module).__name__} is in a plan and has no LoRA layer"
    return layer_class


def plan_lora(model: nn.Module, config: LoRAConfig) -> Plan:
    """Which layers `config` means in `model`, and with which rank and α; nothing is changed.

    add_lora describes how names and patterns are matched. A layer inside a module of modules_to_save gets no adapter.

    Args:
        model: a plain model, on any device.
        config: with target_modules.

    Returns:
        The plan, with the layers in the model's order.

    Raises:
        ValueError: targets, exclusions, patterns or modules_to_save that match nothing, with near matches; a pattern
            that is no regular expression; no layer left to adapt; a model that is adapted already.
        TypeError: a matched module that has no class of LoRA layer; a model that is no nn.Module.

    Example:
        >>> model = nn.ModuleDict({"query": nn.Linear(7, 5), "value": nn.Linear(7, 4), "head": nn.Linear(4, 3)})
        >>> list(plan_lora(model, LoRAConfig(target_modules=r"query|value")).layers)
        ['query', 'value']
        >>> list(plan_lora(model, LoRAConfig(target_modules="all-linear", exclude_modules=["head"])).layers)
        ['query', 'value']
    """
    _check_module(model)
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is adapted already; add_lora works on a plain model")
    modules = {path: module for path, module in model.named_modules() if path}
    saved = []
    targets = _targets(model, modules, config)
    if config.modules_to_save is not None:
        saved = _matched(model, modules, config.modules_to_save, "modules_to_save")
    targets = [path for path in targets if not any(path == s or path.startswith(s + ".") for s in saved)]
    _check_targets(model, modules, config, targets)
    _check_patterns(config, targets)
    layers = {}
    for path in targets:
        r = _from_pattern(config.rank_pattern, path, config.r)
        alpha = _from_pattern(config.alpha_pattern, path, config.lora_alpha)
        layers[path] = dataclasses.replace(config, r=r, lora_alpha=alpha)
    return Plan(config, layers, saved)


def _targets(model: nn.Module, modules: dict[str, nn.Module], config: LoRAConfig) -> list[str]:
    """The paths of target_modules without those of exclude_modules."""
    if config.target_modules is None:
        names = [path.rpartition(".")[2] for path, module in modules.items() if lora_layer_class(module)]
        raise ValueError(
            f"target_modules is None; name layers of {type(model).__name__}, such as "
            f"{_first_few(list(dict.fromkeys(names)))}, or use 'all-linear'"
        )
    targets = _matched(model, modules, config.target_modules, "target_modules")
    if config.exclude_modules is None:
        return targets
    excluded = set(_matched(model, modules, config.exclude_modules, "exclude_modules"))
    return [path for path in targets if path not in excluded]


def _check_targets(model: nn.Module, modules: dict[str, nn.Module], config: LoRAConfig, targets: list[str]) -> None:
    """Refuse a plan without a layer, and a target that no class of LoRA layer wraps."""
    if not targets:
        raise ValueError(
            f"target_modules = {config.target_modules!r} means no layer of this {type(model).__name__}, or "
            "exclude_modules and modules_to_save leave none; nothing would be adapted"
        )
    for path in targets:
        if lora_layer_class(modules[path]) is None:
            raise TypeError(
                f"target_modules matches {path}, a {type(modules[path]).__name__}; LoRA is for Linear, Conv1D "
                "(GPT-2), Embedding and Conv2d: name such a layer inside it"
            )


def _check_patterns(config: LoRAConfig, targets: list[str]) -> None:
    """Refuse a key of rank_pattern or alpha_pattern that matches no target."""
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            check_regex(key, f"{name} key", PATTERN)
            if not any(_pattern_matches(key, path) for path in targets):
                raise ValueError(f"{name} key {key!r} matches no adapted layer; they are {_first_few(targets)}")


def _matched(model: nn.Module, modules: dict[str, nn.Module], wanted: str | Collection[str], field: str) -> list[str]:
    """The paths that `wanted` means, in the model's order; every part of it must mean at least one."""
    if wanted == "all-linear":
        return _all_linear(model, modules)
    if isinstance(wanted, str):
        check_regex(wanted, field)
        found = [path for path in modules if re.fullmatch(wanted, path)]
        if not found:
            raise ValueError(f"{field} = {wanted!r} matches no path whole; {_near_match(wanted, modules)}")
        return found
    dot = "" if field == "modules_to_save" else "."  # peft: any ending; "classifier" means "pre_classifier" too
    for name in wanted:
        if not any(path == name or path.endswith(dot + name) for path in modules):
            raise ValueError(f"{field} has {name!r}, which is no module of this model; {_near_match(name, modules)}")
    return [path for path in modules if any(path == name or path.endswith(dot + name) for name in wanted)]


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Every linear layer but the output head, where the model says which that is."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        path
        for path, module in modules.items()
        if (isinstance(module, nn.Linear) or lora_layer_class(module) is LoRAConv1D) and module is not head
    ]


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _near_match(name: str, modules: dict[str, nn.Module]) -> str:
    """What to write instead of a name that no module has: a module's last name, near to this one's."""
    last_names = [path.rpartition(".")[2] for path in modules]
    return did_you_mean(name.rpartition(".")[2], [name for name in last_names if not name.isdigit()], listed=6)


def _first_few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _pattern_matches(key: str, path: str) -> bool:
    return re.match(PATTERN.format(key), path) is not None


def _from_pattern(pattern: Mapping[str, Number], path: str, default: Number) -> Number:
    """The value of the first key that matches the path."""
    return next((value for key, value in pattern.items() if _pattern_matches(key, path)), default)
