"""Many small adapters on one frozen base, trained at once: E groups of rows in a batch, each through its own.

    y_e = W0·x_e + b + s_e·B_e·(A_e·D(x_e))          x_e: the rows e·n … (e + 1)·n − 1 of x (E·n, …, k)

    model = add_batched_lora(model, configs, generators)
    groups = [{"params": adapter_parameters(model, e), "lr": lrs[e]} for e in range(E)]
    train(model, loss, steps, 1.0, param_groups=groups)   # loss(model, t): one for each group of rows, (E,)
    with single_adapter(model, e):                        # adapter e alone, as after add_lora
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

from ._apply_plan import apply_plan, build_layers
from ._dtypes import is_autocast
from .config import LoRAConfig
from .layers import LoRALinear
from .matching import Plan, plan_lora
from .model import lora_parameters


class BatchedLoRALinear(nn.Module):
    """y_e = W0·x_e + b + s_e·B_e·(A_e·D(x_e)) around one nn.Linear: x (E·n, …, k) → y (E·n, …, d).

    The ranks, scales and dropout of the E adapters may differ. Rank r_e < r = max r_e is padded: zero rows of A_e, zero
    columns of B_e. A and B are cast to x's dtype, as lora_linear does; each adapter draws its own dropout mask.
    forward raises ValueError for a number of rows that E does not divide.

    Args:
        adapters: E LoRALinear around the same weight and bias.

    Example:
        >>> base = nn.Linear(7, 5)
        >>> layer = BatchedLoRALinear([LoRALinear(base, LoRAConfig(r=r, lora_alpha=3)) for r in (1, 2)])
        >>> layer(torch.ones(6, 7)).shape  # rows 0, 1, 2 through the first adapter, 3, 4, 5 through the second
        torch.Size([6, 5])
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
        """Each of E groups of rows through its adapter: x (E·n, …, k) → y (E·n, …, d)."""
        E, k = len(self.adapters), self.in_features
        if x.ndim < 2 or len(x) % E:
            raise ValueError(f"x has shape {tuple(x.shape)}; {E} adapters need {E} groups with equally many rows")
        if is_autocast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        X = x.reshape(E, math.prod(x.shape[:-1]) // E, k)
        A = _stack_padded([layer.lora_A for layer in self.adapters])  # (E, r, k)
        B = _stack_padded([layer.lora_B.t() for layer in self.adapters]) * self.scales  # (E, r, d)
        H = torch.bmm(self._dropout(X), A.to(x.dtype).mT)
        Y = F.linear(X.flatten(0, 1), self.weight, self.bias).view(E, X.shape[1], self.out_features)
        return torch.baddbmm(Y, H, B.to(x.dtype)).view(*x.shape[:-1], self.out_features)

    def _dropout(self, X: Tensor) -> Tensor:
        """D of each group, with its adapter's probability."""
        if not (self.training and any(layer.lora_dropout for layer in self.adapters)):
            return X
        return torch.stack(
            [F.dropout(group, layer.lora_dropout) for group, layer in zip(X, self.adapters, strict=True)]
        )


def _stack_padded(matrices: list[Tensor]) -> Tensor:
    """Matrices (r_e, n) as one tensor (E, r, n), those of fewer rows padded with zeros: one copy of all."""
    r, n, zero = max(map(len, matrices)), matrices[0].shape[1], matrices[0].new_zeros(1)
    rows = [part for M in matrices for part in (M, zero.expand(r - len(M), n))]
    return torch.cat(rows).view(len(matrices), r, n)


def add_batched_lora(
    model: nn.Module, configs: list[LoRAConfig], generators: list[torch.Generator | None]
) -> nn.Module:
    """Give the model's linear layers E adapters each, in place, and return it; everything else is frozen.

    Adapter e starts bit for bit as in add_lora(model, configs[e], generator=generators[e]). The model then takes E
    groups of rows, see BatchedLoRALinear.

    Args:
        model: a plain model.
        configs: one for each adapter. They mean the same layers; ranks, α, dropout and starts may differ.
        generators: one for each adapter, or None for torch's global one.

    Returns:
        The same model. Its attribute `lora_plans` has the adapters' plans.

    Raises:
        ValueError: as add_lora; also no configs, another number of generators, layers that differ, modules_to_save,
            trained biases, a start with a W0 of its own. The model is unchanged after any error.
        TypeError: as add_lora; also layers that are no nn.Linear.

    Example:
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.Tanh())
        >>> configs = [LoRAConfig(r=r, lora_alpha=3, target_modules=["0"]) for r in (1, 2)]
        >>> model = add_batched_lora(model, configs, [None, None])
        >>> model(torch.ones(6, 7)).shape
        torch.Size([6, 5])
    """
    if not configs or len(configs) != len(generators):
        raise ValueError(f"{len(configs)} configs, {len(generators)} generators; pass one of each for every adapter")
    plans = [plan_lora(model, config) for config in configs]
    _check_shared_base(model, plans)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        adapters = [
            build_layers(model, plan, lambda *_: None, generator)
            for plan, generator in zip(plans, generators, strict=True)
        ]
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    paths = list(plans[0].layers)
    layers = {path: BatchedLoRALinear([adapter[path] for adapter in adapters]) for path in paths}
    apply_plan(model, plans[0], layers)
    del model.lora_plan  # of one adapter: see `single_adapter`
    model.lora_plans = plans
    return model


def _check_shared_base(model: nn.Module, plans: list[Plan]) -> None:
    """Refuse adapters that do not have the same linear layers, or that would change the base that they share."""
    paths = list(plans[0].layers)
    for plan in plans:
        config = plan.config
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


def adapter_parameters(model: nn.Module, e: int) -> list[nn.Parameter]:
    """A and B of adapter e in every layer: a parameter group for the optimizer.

    Args:
        model: adapted by add_batched_lora.
        e: the adapter's number, 0 … E − 1.

    Returns:
        The parameters, in the model's order.

    Raises:
        ValueError: as single_adapter.

    Example:
        >>> configs = [LoRAConfig(r=r, lora_alpha=3, target_modules=["0"]) for r in (1, 2)]
        >>> model = add_batched_lora(nn.Sequential(nn.Linear(7, 5)), configs, [None, None])
        >>> [tuple(parameter.shape) for parameter in adapter_parameters(model, 1)]
        [(2, 7), (5, 2)]
    """
    with single_adapter(model, e):
        return list(lora_parameters(model).values())


def for_each_adapter(model: nn.Module, function: Callable[[nn.Module], object]) -> list:
    """function(model) with each adapter alone, in turn.

    Args:
        model: adapted by add_batched_lora.
        function: called E times with the model, inside `single_adapter`.

    Returns:
        What the calls returned.

    Raises:
        ValueError: as single_adapter.

    Example:
        >>> from lora_ref.model import count_parameters
        >>> configs = [LoRAConfig(r=r, lora_alpha=3, target_modules=["0"]) for r in (1, 2)]
        >>> model = add_batched_lora(nn.Sequential(nn.Linear(7, 5)), configs, [None, None])
        >>> for_each_adapter(model, lambda model: count_parameters(model).trainable)
        [12, 24]
    """
    found = []
    for e in range(max(1, len(getattr(model, "lora_plans", ())))):
        with single_adapter(model, e):
            found.append(function(model))
    return found


@contextmanager
def single_adapter(model: nn.Module, e: int) -> Iterator[nn.Module]:
    """Inside the `with`, the model has adapter e alone, as add_lora would have made it.

    All rows pass through adapter e, and merge, save_adapter, count_parameters and state_dict do as they do after
    add_lora. What was merged is unmerged at the end.

    Args:
        model: adapted by add_batched_lora.
        e: the adapter's number, 0 … E − 1.

    Yields:
        The same model.

    Raises:
        ValueError: a model that add_batched_lora did not adapt, or that is inside single_adapter already; an e that it
            does not have.

    Example:
        >>> configs = [LoRAConfig(r=r, lora_alpha=3, target_modules=["0"]) for r in (1, 2)]
        >>> model = add_batched_lora(nn.Sequential(nn.Linear(7, 5)), configs, [None, None])
        >>> with single_adapter(model, 1):
        ...     print(model[0])
        LoRALinear(d=5, k=7, r=2, lora_alpha=3, scale=1.5 (α/r))
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
