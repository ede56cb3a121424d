"""A plan carried out: build its LoRA layers, put them into the model, freeze the rest."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import LoRAConfig
from .initialization import Init
from .lora_layer import LoRALayer
from .matching import Plan, _planned_layer_class

InitFn = Callable[[str, Tensor, LoRAConfig], Init | None]  # (path, W, the layer's config) → how the layer starts


def build_layers(
    model: nn.Module,
    plan: Plan,
    init_fn: InitFn,
    generator: torch.Generator | None = None,
) -> dict[str, LoRALayer]:
    """The plan's LoRA layers by path, not yet in the model; they have frozen their bases' weights.

    `init_fn` and `generator` as in add_lora; the layers draw from the generator in the plan's order. ValueError or
    TypeError with the path of a layer that cannot be built; what the others froze is then as before.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = {}
    try:
        for path, layer_config in plan.layers.items():
            base = model.get_submodule(path)
            layer_class = _planned_layer_class(base)
            init = init_fn(path, layer_class.weight_to_matrix(base.weight.detach()), layer_config)
            try:
                layers[path] = layer_class(base, layer_config, init, generator)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from None
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return layers


def apply_plan(model: nn.Module, plan: Plan, layers: dict[str, nn.Module]) -> nn.Module:
    """Put the layers in, freeze what is not trained, and remember the plan as `model.lora_plan`.

    A new layer is in training or evaluation mode as the one that it replaces.
    """
    modes = {path: model.get_submodule(path).training for path in layers}
    copies = {path: copy.deepcopy(model.get_submodule(path)) for path in plan.saved}
    trained = {id(p) for layer in layers.values() for p in layer.parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        is_trained_bias = plan.config.bias == "all" and name.rpartition(".")[2] == "bias"
        parameter.requires_grad_(is_trained_bias or id(parameter) in trained)
    for path, module in (layers | copies).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
        if path in copies:
            module.requires_grad_(True)
        else:
            module.train(modes[path])
    model.lora_plan = plan
    for embeddings in _input_embeddings(model):  # deepcopy and pickle can copy a partial
        embeddings.register_forward_hook(functools.partial(_require_gradient, model))
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


def _require_gradient(model: nn.Module, module: nn.Module, args: tuple, output: object) -> None:
    """A hook: the embeddings' output requires a gradient while a part of the model checkpoints its activations."""
    for part in output if isinstance(output, (tuple, list)) else (output,):
        if torch.is_grad_enabled() and isinstance(part, torch.Tensor) and part.is_floating_point():
            if not part.requires_grad and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
                part.requires_grad_(True)
