"""Layers with an adapter: W = W0 + s·B·A, W0 frozen, A and B trained.

    layer = LoRALinear(nn.Linear(k, d), LoRAConfig(r=4, lora_alpha=8))

One class for each kind of layer; each says how its weight is a matrix W0 (d, k), and what applies a
weight to its input. What is common to all is in `LoRALayer`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_generator, check_rank
from .config import LoRAConfig
from .functional import lora_linear
from .initialization import INITIALIZERS, Init


class LoRALayer(nn.Module):
    """The common part. It takes over the base's own weight and bias, freezes the weight, and adds A and B.

    `weight` and `bias` are the base's parameters themselves (the bias is trained if config.bias says so);
    `lora_A` (r, k) and `lora_B` (d, r) are new, in float32 when the base has 16 bits. `init` overrides
    config.init_lora_weights; a start with its own W0 (PiSSA, LoRA-GA) replaces `weight` by a new parameter and
    leaves the base's as it is, for whoever shares it. `generator`, on the base's device, makes A and B
    reproducible.

    merge() forms W = W0 + s·B·A once, rounded once, for use whenever no gradient of A or B is asked for; it
    costs one more weight in memory while it lasts. W0 is never written to: unmerge() drops W, and the base
    is the same bit for bit. So the state dict is the same merged or not; train() unmerges; and should A, B
    or W0 change while merged (an optimizer step, a loaded state), W is formed anew. (A write through
    `.data` goes unnoticed: unmerge first.) On a meta base A and B hold nothing until a state is loaded.

    Errors, the base unchanged: TypeError for a base of another kind or with an integer weight; ValueError for
    r outside 1 … min(d, k) or a start that does not fit. RuntimeError for merging twice, or unmerging
    what is not merged.
    """

    base_type: type = nn.Module  # of the base
    mirrored_attributes: tuple[str, ...] = ()  # of the base's attributes that other code reads off a layer

    def __init__(
        self,
        base: nn.Module,
        config: LoRAConfig = LoRAConfig(),
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
        if not isinstance(init, Init):
            raise TypeError(
                f"init must be an Init(A, B, W0), got {type(init).__name__}; see initialization.INITIALIZERS"
            )
        (d, k), r = W0.shape, config.r
        if init.A.shape != (r, k) or init.B.shape != (d, r) or init.W0.shape != (d, k):
            shapes = ", ".join(f"{name} {tuple(M.shape)}" for name, M in init._asdict().items())
            raise ValueError(f"the start has {shapes}; this layer needs A ({r}, {k}), B ({d}, {r}), W0 ({d}, {k})")
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

    # What a kind of layer says about itself

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
        """The base's forward plus s·B·A's, for training."""
        raise NotImplementedError

    # What follows from it

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig) -> None:
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
        if not isinstance(config, LoRAConfig):
            raise TypeError(f"config must be a LoRAConfig, got {config!r}; use LoRAConfig(r=8, lora_alpha=16)")
        if not isinstance(base.weight, nn.Parameter):
            raise TypeError("the base's weight is computed, not a parameter; remove its parametrization first")
        if not base.weight.is_floating_point() or base.weight.itemsize < 2:
            raise TypeError(f"the base's weight is {base.weight.dtype}, not 16 bits or more; dequantise it first")

    def initial_factors(self, W0: Tensor, config: LoRAConfig, generator: torch.Generator | None) -> Init:
        """Where A and B begin when no start is given."""
        if config.init_name == "lora_ga":
            raise ValueError("init_lora_weights = 'lora_ga' needs a gradient; pass init=lora_ga(W, r, s, gradient=…)")
        if W0.is_meta:  # shapes alone: for counting
            dtype = torch.promote_types(W0.dtype, torch.float32)
            new = W0.new_empty
            return Init(new(config.r, W0.shape[1], dtype=dtype), new(len(W0), config.r, dtype=dtype), W0)
        return INITIALIZERS[config.init_name](W0, config.r, config.scale, generator)

    def forward(self, x: Tensor) -> Tensor:
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
        return self.merged_weight is not None

    def merge(self) -> None:
        """Use W0 + s·B·A where no gradient of A or B is asked for: the base's speed, one more weight in memory."""
        if self.merged:
            raise RuntimeError(f"this {type(self).__name__} is merged already; unmerge() it first")
        self._form()

    def unmerge(self) -> None:
        """Drop the merged weight; W0, which merging left alone, is in use again."""
        if not self.merged:
            raise RuntimeError(f"this {type(self).__name__} is not merged; there is nothing to unmerge")
        self.merged_weight = None

    def train(self, mode: bool = True):
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
        (d, k), c = self.weight_to_matrix(self.weight).shape, self.config
        rule = "/√r" if c.use_rslora else "/r"
        return (
            f"d={d}, k={k}, r={len(self.lora_A)}, lora_alpha={c.lora_alpha:g}, scale={self.scale:g} (α{rule})"
            + (f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else "")
            + (", merged" if self.merged else "")
        )


def _parameter(M: Tensor) -> nn.Parameter:
    """A parameter of its own, contiguous memory."""
    return nn.Parameter(M.detach().clone(memory_format=torch.contiguous_format))


class LoRALinear(LoRALayer):
    """y = W0·x + b + s·B·(A·D(x)) around an nn.Linear: x (…, k) → y (…, d). Weight (d, k).

    D is dropout with config.lora_dropout while training. Code that reads `weight` and does not call the layer does
    not see the adapter: nn.TransformerEncoderLayer's fast path for inference does (switch it off with
    torch.backends.mha.set_fastpath_enabled(False)). Source: Hu et al. 2021 (arXiv 2106.09685).
    """

    base_type = nn.Linear
    mirrored_attributes = ("in_features", "out_features")

    def base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def adapted_forward(self, x: Tensor) -> Tensor:
        return lora_linear(
            x,
            self.weight_to_matrix(self.weight),
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scale,
            self.lora_dropout,
            self.training,
        )


class LoRAConv1D(LoRALinear):
    """The same around GPT-2's Conv1D, a linear layer that stores its weight transposed: (k, d) = (in, out).

    Takes transformers' Conv1D, known by its name, so that transformers need not be there.
    """

    mirrored_attributes = ("nf",)

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig) -> None:
        if type(base).__name__ != "Conv1D" or not hasattr(base, "nf"):
            raise TypeError(
                f"LoRAConv1D wraps transformers' Conv1D, GPT-2's linear layer, got {type(base).__name__}; "
                "for nn.Linear use LoRALinear; nn.Conv1d has no LoRA layer here"
            )
        cls.check_supported(base, config)

    @staticmethod
    def weight_to_matrix(weight: Tensor) -> Tensor:
        return weight.T

    def matrix_to_weight(self, W: Tensor) -> Tensor:
        return W.T

    def base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.T, self.bias)


class LoRAEmbedding(LoRALayer):
    """Token i ↦ row i of W0ᵀ + s·(B·A)ᵀ, around an nn.Embedding of V tokens: ids (…) → (…, d). Weight (V, d).

    With the one-hot vector e_i as input it is the linear layer y = (W0 + s·B·A)·e_i, so k = V: A (r, V) gives each
    token r numbers, B (d, r) is shared. When config.init_lora_weights is True, A = 0 and B ~ N(0, 1), as in
    loralib and PEFT. There is no dropout: an id cannot be dropped. The padding token's column of A gets no gradient.
    Errors: ValueError for max_norm or sparse=True, which rewrite or spare rows of the weight.
    """

    base_type = nn.Embedding
    mirrored_attributes = ("num_embeddings", "embedding_dim", "padding_idx")

    def __init__(self, base: nn.Module, *args, **kwargs):
        super().__init__(base, *args, **kwargs)
        self.lora_dropout = 0.0
        self.options = {"padding_idx": base.padding_idx, "scale_grad_by_freq": base.scale_grad_by_freq}

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig) -> None:
        super().check(base, config)
        for name in ("max_norm", "sparse"):
            if getattr(base, name):
                raise ValueError(
                    f"the embedding has {name} = {getattr(base, name)!r}, of no use to a frozen weight; unset it"
                )

    def initial_factors(self, W0: Tensor, config: LoRAConfig, generator: torch.Generator | None) -> Init:
        init = super().initial_factors(W0, config, generator)
        if config.init_name != "kaiming" or W0.is_meta:
            return init
        return Init(torch.zeros_like(init.A), torch.empty_like(init.B).normal_(generator=generator), W0)

    @staticmethod
    def weight_to_matrix(weight: Tensor) -> Tensor:
        return weight.T

    def matrix_to_weight(self, W: Tensor) -> Tensor:
        return W.T

    def base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, **self.options)

    def adapted_forward(self, x: Tensor) -> Tensor:
        y = self.base_forward(x, self.weight)
        update = self.scale * F.linear(self.base_forward(x, self.lora_A.T), self.lora_B)
        return y + update.to(y.dtype)


class LoRAConv2d(LoRALayer):
    """conv(x, W0) + b + s·conv₁ₓ₁(conv(D(x), A), B) around an nn.Conv2d. Weight (d, c, h, w), k = c·h·w.

    A filter is a row of the matrix W0 (d, k): A is r filters of the base's size, stride, padding and dilation, B
    mixes their outputs at each place. Source: loralib's Conv2d, with PEFT's meaning of r.
    Errors: ValueError for groups other than 1 or a padding_mode other than "zeros".
    """

    base_type = nn.Conv2d
    mirrored_attributes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")

    def __init__(self, base: nn.Module, *args, **kwargs):
        super().__init__(base, *args, **kwargs)
        self.options = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig) -> None:
        super().check(base, config)
        if base.groups != 1 or base.padding_mode != "zeros":
            raise ValueError(
                f"the convolution has groups = {base.groups}, padding_mode = {base.padding_mode!r}; "
                "LoRAConv2d knows groups = 1 and padding_mode = 'zeros'"
            )

    @staticmethod
    def weight_to_matrix(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def matrix_to_weight(self, W: Tensor) -> Tensor:
        return W.view(len(W), *self.weight.shape[1:])

    def base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, **self.options)

    def adapted_forward(self, x: Tensor) -> Tensor:
        y = self.base_forward(x, self.weight)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        h = F.conv2d(dropped, self.matrix_to_weight(self.lora_A).to(x.dtype), **self.options)
        return y + self.scale * F.conv2d(h, self.lora_B.to(x.dtype)[:, :, None, None])
