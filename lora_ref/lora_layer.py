"""What all LoRA layers have in common: W = W0 + s·B·A, W0 frozen, A and B trained, merged or not.

`LoRALayer` is the base of the classes in `layers`, one for each kind of layer. A class says how its base's weight is
a matrix W0 (d, k) and how a weight is applied to an input; the rest is here.
"""

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ._checks import check_generator, check_rank
from .config import LoRAConfig
from .initialization import INITIALIZERS, Init

DEFAULT_CONFIG = LoRAConfig()


class LoRALayer(nn.Module):
    """W = W0 + s·B·A around one layer; the part that all kinds of layer share.

    The layer takes over the base's own weight and bias, freezes the weight, and adds A and B. `weight` and `bias` are
    the base's parameters themselves (the bias is trained if config.bias says so); `lora_A` (r, k) and `lora_B` (d, r)
    are new, in float32 when the base has 16 bits. A start with its own W0 (PiSSA, LoRA-GA) replaces `weight` by a new
    parameter and leaves the base's as it is, for other modules that share it.

    merge() forms W = W0 + s·B·A once, rounded once, for use whenever no gradient of A or B is required; it costs one
    more weight in memory while the layer is merged. W0 is never written to: unmerge() drops W, and the base is the
    same bit for bit. So the state dict is the same merged or not; train() unmerges; and if A, B or W0 change while
    the layer is merged (an optimizer step, a loaded state), W is formed again. (A write through `.data` is not
    noticed: unmerge first.) On a meta base A and B hold nothing until a state is loaded.

    Args:
        base: the layer to adapt, of the class that this kind of LoRA layer wraps.
        config: rank, α, dropout, start and which biases are trained; r = 8 and α = 8 by default.
        init: A, B and W0 at the start, which override config.init_lora_weights; shapes (r, k), (d, r), (d, k).
        generator: on the base's device, makes the random start reproducible; None is torch's global one.

    Attributes:
        scale: s, a number without unit.
        merged: whether the merged weight is formed.

    Raises:
        TypeError: a base of another kind or with an integer weight, a config or init of another type. The base is
            unchanged after any error.
        ValueError: r outside 1 … min(d, k), or a start that does not fit.
        RuntimeError: merge() of a merged layer, unmerge() of one that is not.

    Example:
        >>> from lora_ref.layers import LoRALinear
        >>> layer = LoRALinear(nn.Linear(7, 5), LoRAConfig(r=2, lora_alpha=3))
        >>> layer.scale, tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)
        (1.5, (2, 7), (5, 2))
        >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        ['lora_A', 'lora_B']
    """

    base_type: type[nn.Module] = nn.Module  # the class of the base
    mirrored_attributes: ClassVar[tuple[str, ...]] = ()  # of the base's attributes that other code reads from a layer

    def __init__(
        self,
        base: nn.Module,
        config: LoRAConfig = DEFAULT_CONFIG,
        init: Init | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.check(base, config)
        W0 = self.weight_to_matrix(base.weight.detach())
        check_rank(config.r, *W0.shape)
        check_generator(generator, W0.device)
        if init is None:
            init = self.initial_factors(W0, config, generator)
        _check_init(init, W0, config.r)
        self.config, self.scale, self.lora_dropout = config, config.scale, config.lora_dropout
        for name in self.mirrored_attributes:
            setattr(self, name, getattr(base, name))
        self.weight, self.bias = base.weight, getattr(base, "bias", None)
        if init.W0.data_ptr() != W0.data_ptr():
            self.weight = _parameter(self.matrix_to_weight(init.W0))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(config.bias != "none")
        self.lora_A, self.lora_B = _parameter(init.A), _parameter(init.B)
        self.register_buffer("merged_weight", None, persistent=False)

    # What a kind of layer defines

    @staticmethod
    def weight_to_matrix(weight: Tensor) -> Tensor:
        """The weight as W0 (d, k): a view."""
        return weight

    def matrix_to_weight(self, W: Tensor) -> Tensor:
        """W (d, k) in the layout of the weight: the inverse of `weight_to_matrix`."""
        return W

    def base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The base's forward, with this weight."""
        raise NotImplementedError

    def adapted_forward(self, x: Tensor) -> Tensor:
        """The base's forward plus the adapter's, s·B·A·D(x), for training."""
        raise NotImplementedError

    # What follows from it

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig) -> None:
        """Refuse a base that this class cannot adapt: TypeError with what it wraps."""
        if isinstance(base, LoRALayer):
            raise TypeError(f"this {type(base).__name__} has an adapter already; wrap a plain layer")
        if not isinstance(base, cls.base_type):
            kinds = "LoRALinear, LoRAEmbedding, LoRAConv2d and LoRAConv1D (GPT-2's)"
            raise TypeError(
                f"{cls.__name__} wraps {cls.base_type.__name__}, got {type(base).__name__}; there are {kinds}"
            )
        if type(base).forward is not cls.base_type.forward:
            raise TypeError(
                f"{type(base).__name__} is a {cls.base_type.__name__} with a forward of its own, which {cls.__name__} "
                "would not compute; adapt a layer inside it, if it has one"
            )
        if type(base).__name__ == "NonDynamicallyQuantizableLinear":
            raise TypeError(
                "this layer is the out_proj of an nn.MultiheadAttention, which reads its weight and never calls it: an "
                "adapter would do nothing; use separate linear layers for attention"
            )
        cls.check_supported(base, config)

    @staticmethod
    def check_supported(base: nn.Module, config: LoRAConfig) -> None:
        """Refuse what no kind of layer supports: another config, a computed weight, less than 16 bits."""
        if not isinstance(config, LoRAConfig):
            raise TypeError(f"config must be a LoRAConfig, got {config!r}; use LoRAConfig(r=8, lora_alpha=16)")
        if not isinstance(base.weight, nn.Parameter):
            raise TypeError("the base's weight is computed, not a parameter; remove its parametrization first")
        if not base.weight.is_floating_point() or base.weight.itemsize < 2:
            raise TypeError(f"the base's weight is {base.weight.dtype}, not 16 bits or more; dequantise it first")

    def initial_factors(self, W0: Tensor, config: LoRAConfig, generator: torch.Generator | None) -> Init:
        """A, B and W0 at the start, by the config's name, when the caller gives none."""
        if config.init_name == "lora_ga":
            raise ValueError("init_lora_weights = 'lora_ga' needs a gradient; pass init=lora_ga(W, r, s, gradient=…)")
        if W0.is_meta:  # shapes alone: for counting
            dtype = torch.promote_types(W0.dtype, torch.float32)
            new = W0.new_empty
            return Init(new(config.r, W0.shape[1], dtype=dtype), new(len(W0), config.r, dtype=dtype), W0)
        return INITIALIZERS[config.init_name](W0, config.r, config.scale, generator)

    def forward(self, x: Tensor) -> Tensor:
        """The merged weight's output where it is formed and no factor requires a gradient, else the adapter's."""
        if self.merged_weight is None or (
            torch.is_grad_enabled() and (self.lora_A.requires_grad or self.lora_B.requires_grad)
        ):
            return self.adapted_forward(x)
        if not torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():  # the factors may be a transform's, gone after it
                return self.adapted_forward(x)
            if self._versions != self._current():
                self._form()
        return self.base_forward(x, self.merged_weight)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """s·B·A in the layout of the weight, in the factors' dtype."""
        return self.matrix_to_weight(self.scale * (self.lora_B @ self.lora_A))

    @property
    def merged(self) -> bool:
        """Whether the merged weight is formed."""
        return self.merged_weight is not None

    def merge(self) -> None:
        """Use W0 + s·B·A where no gradient of A or B is required: the base's speed, one more weight in memory."""
        if self.merged:
            raise RuntimeError(f"this {type(self).__name__} is merged already; unmerge() it first")
        self._form()

    def unmerge(self) -> None:
        """Drop the merged weight; W0, which merging did not change, is in use again."""
        if not self.merged:
            raise RuntimeError(f"this {type(self).__name__} is not merged; there is nothing to unmerge")
        self.merged_weight = None

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; training drops the merged weight."""
        if mode:
            self.merged_weight = None
        return super().train(mode)

    @torch.inference_mode(False)  # autograd may meet the merged weight later
    @torch.no_grad()
    def _form(self) -> None:
        """W0 + s·B·A in the wider of both dtypes, then rounded once to W0's."""
        W0, BA = self.weight, self.delta_weight()
        self.merged_weight = (W0.to(torch.promote_types(W0.dtype, BA.dtype)) + BA).to(W0.dtype)
        self._versions = self._current()

    def _current(self) -> tuple:
        """Changes with every write to A, B or W0, and when another tensor takes the place of one."""
        factors = (self.lora_A, self.lora_B, self.weight)
        return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in factors)

    def extra_repr(self) -> str:
        """The numbers in the layer's text: d, k, r, α, s, dropout, merged."""
        (d, k), c = self.weight_to_matrix(self.weight).shape, self.config
        rule = "/√r" if c.use_rslora else "/r"
        return (
            f"d={d}, k={k}, r={len(self.lora_A)}, lora_alpha={c.lora_alpha:g}, scale={self.scale:g} (α{rule})"
            + (f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else "")
            + (", merged" if self.merged else "")
        )


def _check_init(init: Init, W0: Tensor, r: int) -> None:
    """Refuse a start whose shapes are not A (r, k), B (d, r), W0 (d, k)."""
    if not isinstance(init, Init):
        raise TypeError(f"init must be an Init(A, B, W0), got {type(init).__name__}; see initialization.INITIALIZERS")
    d, k = W0.shape
    if init.A.shape != (r, k) or init.B.shape != (d, r) or init.W0.shape != (d, k):
        shapes = ", ".join(f"{name} {tuple(M.shape)}" for name, M in init._asdict().items())
        raise ValueError(f"the start has {shapes}; this layer needs A ({r}, {k}), B ({d}, {r}), W0 ({d}, {k})")


def _parameter(M: Tensor) -> nn.Parameter:
    """A parameter in contiguous memory of its own."""
    return nn.Parameter(M.detach().clone(memory_format=torch.contiguous_format))
