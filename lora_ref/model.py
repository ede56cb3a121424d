"""LoRA in any nn.Module: choose layers by name, replace each by its LoRA layer, freeze the rest.

    model = add_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

The names are matched as peft matches them, so that a configuration means the same in both. A module's
*path* is its name in model.named_modules(), such as "model.layers.0.self_attn.q_proj".
"""

import copy
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .config import LoRAConfig
from .initialization import Init
from .layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear

PATTERN = r"(.*\.)?({})$"  # what a key of rank_pattern or alpha_pattern must match


class Plan(NamedTuple):
    """What add_lora does to a model: the config of each layer to adapt, by path; the paths to train in full."""

    config: LoRAConfig
    layers: dict[str, LoRAConfig]
    saved: list[str]


class Count(NamedTuple):
    """Numbers in a model's parameters, a tied one counted once: trained, and all of them, adapters included."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / max(1, self.total)


def add_lora(
    model: nn.Module,
    config: LoRAConfig,
    init_fn: Callable[[str, torch.Tensor, LoRAConfig], Init] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Adapt the model in place and return it: W = W0 + s·B·A in every targeted layer, all else frozen.

    config.target_modules: a list of names, each a path or its last dotted parts ("q_proj", "self_attn.q_proj"); a
    string, a regular expression that must match whole paths; or "all-linear", every linear layer but the output
    head. config.exclude_modules takes from these, in the same ways. rank_pattern and alpha_pattern give layers
    another r or α: the first key that matches the end of the path, from its beginning or from a dot. modules_to_save
    (any ending of a path, as in peft) are trained in full, each as a copy of its own, so that a tied weight elsewhere
    stays frozen. config.bias: "lora_only" trains the adapted layers' biases, "all" every bias.

    `init_fn(path, W, config)` overrides how a layer begins; `generator` makes the starts reproducible. With
    gradient checkpointing the inputs of the first layers are made to want a gradient, without which there would
    be none for the adapters. Works on the meta device, for counting.

    Errors, the model unchanged: ValueError for targets, exclusions, patterns or modules_to_save that match nothing,
    with near matches; for a rank above min(d, k), with the path; for a model that is adapted already. TypeError for
    a matched module of a kind that has no LoRA layer.
    """
    whole, model = model, uncompiled(model)
    plan = plan_lora(model, config)
    built = build_layers(model, plan, init_fn or (lambda path, W, own: None), generator)
    if init_fn is not None:  # what a reader of the adapter must know: whether the base is still what it was
        kept = all(layer.weight is model.get_submodule(path).weight for path, layer in built.items())
        plan = plan._replace(config=dataclasses.replace(config, init_lora_weights=kept or "lora_ga"))
    apply_plan(model, plan, built)
    return whole


def build_layers(
    model: nn.Module,
    plan: Plan,
    init_fn: Callable[[str, torch.Tensor, LoRAConfig], Init | None],
    generator: torch.Generator | None = None,
) -> dict[str, LoRALayer]:
    """The plan's LoRA layers, not yet in the model. If one cannot be built, what the others froze is as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    built = {}
    try:
        for path, own in plan.layers.items():
            base = model.get_submodule(path)
            kind = layer_kind(base)
            init = init_fn(path, kind.weight_to_matrix(base.weight.detach()), own)
            try:
                built[path] = kind(base, own, init, generator)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from None
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return built


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper; a model without one is itself."""
    return getattr(model, "_orig_mod", model)


def layer_kind(module: nn.Module) -> type[LoRALayer] | None:
    """The LoRA layer for a module, None where there is none."""
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return LoRAConv1D
    kinds = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding, nn.Conv2d: LoRAConv2d}
    return next((layer for kind, layer in kinds.items() if isinstance(module, kind)), None)


def plan_lora(model: nn.Module, config: LoRAConfig) -> Plan:
    """Which layers `config` means in `model`, and with which rank and α; nothing is changed. Errors as add_lora's."""
    _check_module(model)
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is adapted already; add_lora works on a plain model")
    modules = {path: module for path, module in model.named_modules() if path}
    if config.target_modules is None:
        raise ValueError(
            f"target_modules is None; name layers of {type(model).__name__}, such as {_examples(modules)}, "
            "or use 'all-linear'"
        )
    targets = _matched(model, modules, config.target_modules, "target_modules")
    if config.exclude_modules is not None:
        excluded = set(_matched(model, modules, config.exclude_modules, "exclude_modules"))
        targets = [path for path in targets if path not in excluded]
    saved = (
        [] if config.modules_to_save is None else _matched(model, modules, config.modules_to_save, "modules_to_save")
    )
    targets = [path for path in targets if not any(path == s or path.startswith(s + ".") for s in saved)]
    if not targets:
        raise ValueError(
            f"target_modules = {config.target_modules!r} means no layer of this {type(model).__name__}, or "
            "exclude_modules and modules_to_save leave none; nothing would be adapted"
        )
    for path in targets:
        if layer_kind(modules[path]) is None:
            raise TypeError(
                f"target_modules matches {path}, a {type(modules[path]).__name__}; LoRA is for Linear, Conv1D "
                "(GPT-2), Embedding and Conv2d: name such a layer inside it"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            _check_expression(key, f"{name} key", PATTERN)
            if not any(_pattern_matches(key, path) for path in targets):
                raise ValueError(f"{name} key {key!r} matches no adapted layer; they are {_some(targets)}")
    layers = {}
    for path in targets:
        r = _from_pattern(config.rank_pattern, path, config.r)
        alpha = _from_pattern(config.alpha_pattern, path, config.lora_alpha)
        layers[path] = dataclasses.replace(config, r=r, lora_alpha=alpha)
    return Plan(config, layers, saved)


def apply_plan(model: nn.Module, plan: Plan, built: dict[str, LoRALayer]) -> nn.Module:
    """Put the LoRA layers in, freeze what is not trained, and remember the plan as `model.lora_plan`."""
    modes = {path: model.get_submodule(path).training for path in built}
    copies = {path: copy.deepcopy(model.get_submodule(path)) for path in plan.saved}
    trained = {id(p) for layer in built.values() for p in layer.parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        bias = plan.config.bias == "all" and name.rpartition(".")[2] == "bias"
        parameter.requires_grad_(bias or id(parameter) in trained)
    for path, module in (built | copies).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
        if path in copies:
            module.requires_grad_(True)
        else:
            module.train(modes[path])
    model.lora_plan = plan
    for embeddings in _input_embeddings(model):
        embeddings.register_forward_hook(functools.partial(_want_gradient, model))  # deepcopy and pickle know partial
    return model


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """Where inputs become vectors, in every part that says so: T5's encoder and decoder each have their own."""
    found = {}
    for module in model.modules():
        try:
            embeddings = getattr(module, "get_input_embeddings", lambda: None)()
        except NotImplementedError:  # transformers, for a model without
            continue
        if isinstance(embeddings, nn.Module):
            found[id(embeddings)] = embeddings
    return list(found.values())


def _want_gradient(model: nn.Module, module: nn.Module, args: tuple, output) -> None:
    """A hook: the embeddings' output wants a gradient while a part of the model checkpoints its activations."""
    for part in output if isinstance(output, (tuple, list)) else (output,):
        if torch.is_grad_enabled() and isinstance(part, torch.Tensor) and part.is_floating_point():
            if not part.requires_grad and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
                part.requires_grad_(True)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The model's LoRA layers by path. Errors: ValueError where there are none."""
    _check_module(model)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layer; add_lora(model, config) puts them in")
    return layers


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All A and B by name, as in model.named_parameters(). Errors: ValueError where there are none."""
    return {
        f"{path}.{name}": getattr(layer, name)
        for path, layer in lora_layers(model).items()
        for name in ("lora_A", "lora_B")
    }


def merge(model: nn.Module) -> None:
    """Form W0 + s·B·A in every LoRA layer, for inference at the base's speed; see LoRALayer.merge.

    Errors, nothing changed: RuntimeError, with the path, if a layer is merged already.
    """
    _all(model, merged=False, mend="unmerge(model) first")
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo merge, bit for bit. Errors, nothing changed: RuntimeError, with the path, if a layer is not merged."""
    _all(model, merged=True, mend="there is nothing to undo; merge(model) merges")
    for layer in lora_layers(model).values():
        layer.unmerge()


def _all(model: nn.Module, merged: bool, mend: str) -> None:
    """Refuse a model with a layer in the other state, before any is changed."""
    for path, layer in lora_layers(model).items():
        if layer.merged != merged:
            raise RuntimeError(f"{path} is {'not merged' if merged else 'merged already'}; {mend}")


def count_parameters(model: nn.Module) -> Count:
    """Trainable and all numbers, as peft's print_trainable_parameters counts them, but for the originals of
    modules_to_save, which it keeps and counts beside the copies. Works on the meta device."""
    _check_module(model)
    return Count(
        sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())
    )


def _matched(model: nn.Module, modules: dict[str, nn.Module], wanted, field: str) -> list[str]:
    """The paths that `wanted` means, in the model's order; every part of it must mean at least one."""
    if wanted == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = (nn.Linear,)
        return [
            path
            for path, module in modules.items()
            if (isinstance(module, linear) or layer_kind(module) is LoRAConv1D) and module is not head
        ]
    if isinstance(wanted, str):
        _check_expression(wanted, field)
        found = [path for path in modules if re.fullmatch(wanted, path)]
        if not found:
            raise ValueError(f"{field} = {wanted!r} matches no path whole; {_near(wanted, modules)}")
        return found
    dot = "" if field == "modules_to_save" else "."  # peft: any ending; "classifier" means "pre_classifier" too
    for name in wanted:
        if not any(path == name or path.endswith(dot + name) for path in modules):
            raise ValueError(f"{field} has {name!r}, which is no module of this model; {_near(name, modules)}")
    return [path for path in modules if any(path == name or path.endswith(dot + name) for name in wanted)]


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check_expression(expression: str, field: str, whole: str = "{}") -> None:
    try:
        re.compile(whole.format(expression))
    except re.error as error:
        raise ValueError(f"{field} {expression!r} is no regular expression: {error}") from None


def _near(name: str, modules: dict[str, nn.Module]) -> str:
    known = list(dict.fromkeys(path.rpartition(".")[2] for path in modules if not path.rpartition(".")[2].isdigit()))
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {_some(known)}"


def _examples(modules: dict[str, nn.Module]) -> str:
    return _some(list(dict.fromkeys(path.rpartition(".")[2] for path, m in modules.items() if layer_kind(m))))


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _pattern_matches(key: str, path: str) -> bool:
    return re.match(PATTERN.format(key), path) is not None


def _from_pattern(pattern: dict, path: str, default):
    return next((value for key, value in pattern.items() if _pattern_matches(key, path)), default)
