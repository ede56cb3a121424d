"""Layers with an adapter: W = W0 + s·B·A, W0 frozen, A and B trained; one class for each kind of layer.

    layer = LoRALinear(nn.Linear(k, d), LoRAConfig(r=4, lora_alpha=8))

Each class says how its base's weight is a matrix W0 (d, k) and how a weight is applied to an input. What they have in
common is in `lora_layer.LoRALayer`.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoRAConfig
from .functional import lora_linear
from .initialization import Init
from .lora_layer import DEFAULT_CONFIG, LoRALayer

__all__ = ["LoRAConv1D", "LoRAConv2d", "LoRAEmbedding", "LoRALayer", "LoRALinear"]


class LoRALinear(LoRALayer):
    """y = W0·x + b + s·B·(A·D(x)) around an nn.Linear: x (…, k) → y (…, d). Weight (d, k).

    D is dropout with probability config.lora_dropout while training. Code that reads `weight` and does not call the
    layer does not see the adapter: nn.TransformerEncoderLayer's fast path for inference does so (switch it off with
    torch.backends.mha.set_fastpath_enabled(False)).

    Args:
        base, config, init, generator: as for LoRALayer; the base is an nn.Linear.

    Raises:
        TypeError, ValueError: as LoRALayer; also for a subclass of nn.Linear with a forward of its own.

    Example:
        >>> base = nn.Linear(7, 5)
        >>> layer = LoRALinear(base, LoRAConfig(r=2, lora_alpha=3))
        >>> x = torch.ones(4, 7)
        >>> torch.equal(layer(x), base(x)), layer.weight is base.weight  # B = 0 at the start
        (True, True)

    Source:
        Hu et al. 2021 (arXiv 2106.09685), section 4.1.
    """

    base_type = nn.Linear
    mirrored_attributes: ClassVar[tuple[str, ...]] = ("in_features", "out_features")

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
    """y = W0·x + b + s·B·(A·D(x)) around GPT-2's Conv1D, a linear layer that stores its weight as (k, d) = (in, out).

    It takes transformers' Conv1D, which it recognises by the class's name, so that transformers need not be installed.

    Args:
        base, config, init, generator: as for LoRALayer; the base is a transformers.pytorch_utils.Conv1D.

    Raises:
        TypeError, ValueError: as LoRALayer; nn.Conv1d has no LoRA layer here.

    Example:
        >>> from transformers.pytorch_utils import Conv1D
        >>> layer = LoRAConv1D(Conv1D(nf=5, nx=7), LoRAConfig(r=2, lora_alpha=3))
        >>> tuple(layer.weight.shape), tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)
        ((7, 5), (2, 7), (5, 2))
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

    Args:
        base: an nn.Embedding.
        config: as for LoRALayer; lora_dropout has no effect.
        init: as for LoRALayer.
        generator: as for LoRALayer.

    Raises:
        TypeError: as LoRALayer.
        ValueError: as LoRALayer; also for max_norm, which rewrites rows of the weight, and sparse=True.

    Example:
        >>> layer = LoRAEmbedding(nn.Embedding(11, 5), LoRAConfig(r=2, lora_alpha=3))
        >>> tuple(layer.lora_A.shape), tuple(layer.lora_B.shape), bool(layer.lora_A.any())
        ((2, 11), (5, 2), False)
        >>> layer(torch.tensor([[1, 4, 4]])).shape
        torch.Size([1, 3, 5])

    Source:
        loralib 0.1.2, Embedding; PEFT, lora.Embedding.
    """

    base_type = nn.Embedding
    mirrored_attributes = ("num_embeddings", "embedding_dim", "padding_idx")

    def __init__(
        self,
        base: nn.Module,
        config: LoRAConfig = DEFAULT_CONFIG,
        init: Init | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(base, config, init, generator)
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

    A filter is a row of the matrix W0 (d, k): A is r filters of the base's size, stride, padding and dilation, and B
    mixes their outputs at each place. D is dropout of single entries while training. x (N, c, …) → y (N, d, …).

    Args:
        base: an nn.Conv2d with groups = 1 and padding_mode "zeros".
        config: as for LoRALayer.
        init: as for LoRALayer; the matrices A (r, c·h·w), B (d, r), W0 (d, c·h·w).
        generator: as for LoRALayer.

    Raises:
        TypeError: as LoRALayer.
        ValueError: as LoRALayer; also for groups other than 1 and a padding_mode other than "zeros".

    Example:
        >>> layer = LoRAConv2d(nn.Conv2d(2, 5, kernel_size=(3, 4)), LoRAConfig(r=3, lora_alpha=4))
        >>> tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)  # k = 2·3·4
        ((3, 24), (5, 3))
        >>> layer(torch.ones(1, 2, 8, 8)).shape
        torch.Size([1, 5, 6, 5])

    Source:
        loralib 0.1.2, Conv2d, with PEFT's meaning of r.
    """

    base_type = nn.Conv2d
    mirrored_attributes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")

    def __init__(
        self,
        base: nn.Module,
        config: LoRAConfig = DEFAULT_CONFIG,
        init: Init | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(base, config, init, generator)
        self.options = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig) -> None:
        super().check(base, config)
        if base.groups != 1 or base.padding_mode != "zeros":
            raise ValueError(
                f"the convolution has groups = {base.groups}, padding_mode = {base.padding_mode!r}; "
                "LoRAConv2d supports groups = 1 and padding_mode = 'zeros'"
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
