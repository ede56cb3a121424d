"""Many small adapters on one frozen base, trained at once: E groups of rows in a batch, each through its own.

    y_e = W0·x_e + b + s_e·B_e·(A_e·D(x_e))          x_e: the rows e·n … (e + 1)·n − 1 of x (E·n, …, k)

    model = add_batched_lora(model, configs, generators)
    groups = [{"params": adapter_parameters(model, e), "lr": lrs[e]} for e in range(E)]
    train(model, loss, steps, 1.0, groups=groups)    # loss(model, t): one for each group of rows, (E,)
    with single_adapter(model, e):                             # adapter e alone, as after add_lora
        save_adapter(model, directory)

All rows share the product with W0; those with the factors are batched over e. No row meets another group's adapter, so
the gradient of the summed losses is each adapter's own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoRAConfig
from .functional import _autocasts
from .layers import LoRALinear
from .model import apply_plan, build_layers, lora_parameters, plan_lora


class BatchedLoRALinear(nn.Module):
    """y_e = W0·x_e + b + s_e·B_e·(A_e·D(x_e)) around one nn.Linear: x (E·n, …, k) → y (E·n, …, d).

    `adapters` are E LoRALinear of the same weight; their ranks, scales and dropout may differ. Rank r_e < r = max r_e
    is filled up: zero rows of A_e, zero columns of B_e. A and B are cast to x's dtype, as lora_linear does; every D
    draws its own mask. Errors: ValueError for a number of rows that E does not divide.
    """

    def __init__(self, adapters: list[LoRALinear]):
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        first = adapters[0]
        self.weight, self.bias = first.weight, first.bias
        self.in_features, self.out_features = first.in_features, first.out_features
        scales = torch.tensor([layer.scale for layer in adapters], dtype=first.lora_A.dtype, device=first.weight.device)
        self.register_buffer("scales", scales.view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        E, k = len(self.adapters), self.in_features
        if x.ndim < 2 or len(x) % E:
            raise ValueError(f"x has shape {tuple(x.shape)}; {E} adapters need {E} groups of as many rows each")
        if _autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        X = x.reshape(E, math.prod(x.shape[:-1]) // E, k)
        A = _stacked([layer.lora_A for layer in self.adapters])  # (E, r, k)
        B = _stacked([layer.lora_B.t() for layer in self.adapters]) * self.scales  # (E, r, d)
        H = torch.bmm(self.dropped(X), A.to(x.dtype).mT)
        Y = F.linear(X.flatten(0, 1), self.weight, self.bias).view(E, X.shape[1], self.out_features)
        return torch.baddbmm(Y, H, B.to(x.dtype)).view(*x.shape[:-1], self.out_features)

    def dropped(self, X: Tensor) -> Tensor:
        """D of each group."""
        if not (self.training and any(layer.lora_dropout for layer in self.adapters)):
            return X
        return torch.stack([F.dropout(part, layer.lora_dropout) for part, layer in zip(X, self.adapters)])


def _stacked(matrices: list[Tensor]) -> Tensor:
    """Matrices (r_e, n) as one tensor (E, r, n), those of fewer rows filled up with zeros: one copy of all."""
    r, n, zero = max(map(len, matrices)), matrices[0].shape[1], matrices[0].new_zeros(1)
    rows = [part for M in matrices for part in (M, zero.expand(r - len(M), n))]
    return torch.cat(rows).view(len(matrices), r, n)


def add_batched_lora(
    model: nn.Module, configs: list[LoRAConfig], generators: list[torch.Generator | None]
) -> nn.Module:
    """Adapt the model's linear layers E times over, in place, and return it; all else is frozen.

    Adapter e begins bit for bit as in add_lora(model, configs[e], generator=generators[e]). The configs mean the same
    layers; ranks, α, dropout and starts may differ. The model then takes E groups of rows, see BatchedLoRALinear.

    Errors, the model unchanged: those of add_lora; ValueError for no configs, another number of generators, layers
    that differ, modules_to_save, trained biases, a start with a W0 of its own; TypeError for layers that are no
    nn.Linear.
    """
    if not configs or len(configs) != len(generators):
        raise ValueError(f"{len(configs)} configs, {len(generators)} generators; pass one of each for every adapter")
    plans = [plan_lora(model, config) for config in configs]
    paths = list(plans[0].layers)
    for config, plan in zip(configs, plans):
        if differ := sorted(set(plan.layers) ^ set(paths)):
            raise ValueError(f"the configs mean different layers ({', '.join(differ[:3])}); give them the same targets")
        if plan.saved or config.bias != "none" or config.init_name in ("pissa", "lora_ga"):
            raise ValueError(
                f"modules_to_save = {config.modules_to_save!r}, bias = {config.bias!r}, init_lora_weights = "
                f"{config.init_lora_weights!r}: adapters that share a base change nothing in it; choose None, 'none' "
                "and a start that keeps W0"
            )
    for path in paths:
        if not isinstance(layer := model.get_submodule(path), nn.Linear):
            raise TypeError(f"{path} is a {type(layer).__name__}; many adapters at once are for nn.Linear")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        built = [build_layers(model, plan, lambda *_: None, own) for plan, own in zip(plans, generators)]
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    apply_plan(model, plans[0], {path: BatchedLoRALinear([layers[path] for layers in built]) for path in paths})
    del model.lora_plan  # of one adapter: see `single_adapter`
    model.lora_plans = plans
    return model


def adapter_parameters(model: nn.Module, e: int) -> list[nn.Parameter]:
    """A and B of adapter e in every layer: a group for the optimizer. Errors as `single_adapter`'s."""
    with single_adapter(model, e):
        return list(lora_parameters(model).values())


def for_each_adapter(model: nn.Module, function: Callable[[nn.Module], object]) -> list:
    """function(model) with each adapter alone, in turn. Errors as `single_adapter`'s."""
    found = []
    for e in range(max(1, len(getattr(model, "lora_plans", ())))):
        with single_adapter(model, e):
            found.append(function(model))
    return found


@contextmanager
def single_adapter(model: nn.Module, e: int) -> Iterator[nn.Module]:
    """Inside the `with`, the model is adapter e's, as add_lora would have made it: all rows pass through e, and merge,
    save_adapter, count_parameters and state_dict do as they do there. What was merged is unmerged at the end.

    Errors: ValueError for a model that `add_batched_lora` did not adapt, or is inside `single_adapter` already; for an e that it lacks.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, BatchedLoRALinear)}
    count = len(model.lora_plans) if layers else 0
    if not 0 <= e < count:
        raise ValueError(
            f"{type(model).__name__} has {count} adapters side by side now, not number {e!r}; see add_batched_lora()"
        )
    try:
        for path, layer in layers.items():
            model.set_submodule(path, layer.adapters[e])
        model.lora_plan = model.lora_plans[e]
        yield model
    finally:
        del model.lora_plan
        for path, layer in layers.items():
            layer.adapters[e].merged_weight = None
            model.set_submodule(path, layer.train(layer.adapters[e].training))
