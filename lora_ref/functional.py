"""One LoRA linear layer as an equation, and its gradient as it is derived.

    Y = X·W0ᵀ + b + s·H·Bᵀ,     H = X·Aᵀ                  X N×k, W0 d×k, A r×k, B d×r, H N×r
    Z = G·B,                    G = ∂L/∂Y                 G N×d, Z N×r
    ∂L/∂X = G·W0 + s·Z·A,       ∂L/∂A = s·Zᵀ·X,           ∂L/∂B = s·Gᵀ·H

`lora_linear_reference` is the first line in three lines of torch: the specification. `lora_linear`
computes the same with the backward written out, so that

- X is saved for the backward by reference, not as a copy, and beside it only H (N·r numbers);
- s multiplies r-sized matrices alone, or is a factor of a product that is computed anyway;
- Z is computed once for two gradients; a gradient that is not required is not computed, ∂L/∂W0 least of all.

Multiply-adds beyond the frozen layer's (forward and backward): 3·N·r·(d+k) as above. With
W = W0 + s·B·A formed first, 2·N·r·(d+k) + 2·d·k·r, and a buffer of d·k numbers: `should_materialize` says
when that is right. Source: the chain rule; Hu et al. 2021 (arXiv 2106.09685), equation 3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import is_autocast
from ._functional_checks import check_lora_linear

# One idea: the layer's forward and its derived backward, line for line beside the specification that they must equal.

# A 16-bit X is cast up for the products with A and B, and not saved, where X and Y have at most this many numbers each:
# on a CPU each 16-bit product costs 12 µs before it starts, more than the cast.
CPU_UPCAST_MAX_NUMEL = 1 << 15
# A dropout mask is drawn from 16-bit integers: p is rounded to a multiple of 1/DROPOUT_LEVELS.
DROPOUT_LEVELS = 1 << 16


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """y = x·W0ᵀ + b + s·D(x)·Aᵀ·Bᵀ, D = dropout: the specification, which `lora_linear` must equal.

    Args:
        x, weight, bias, A, B, scale, dropout_p, training: as in `lora_linear`.

    Returns:
        y, shape (…, d), in x's dtype. Nothing is checked here.

    Example:
        >>> x, W0 = torch.tensor([[1.0, 2.0]]), torch.zeros(3, 2)
        >>> A, B = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0], [2.0]])
        >>> lora_linear_reference(x, W0, None, A, B, scale=0.5)
        tensor([[1.5000, 0.0000, 3.0000]])
    """
    h = F.linear(F.dropout(x, dropout_p, training), A.to(x.dtype))
    update = F.linear(h, B.to(x.dtype))
    return F.linear(x, weight, bias) + scale * update


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """y = W0·x + b + s·B·(A·D(x)), with the backward that is derived at the head of this module.

    D is inverted dropout with probability dropout_p while `training`, else the identity; it acts on the
    adapter's x alone. Any layout of x and of the gradient, and an empty batch, is allowed. Differentiable twice.

    Dtypes: x, weight and bias share one; A and B have their own, and so have their gradients: they are cast to x's
    for the products, x not to theirs (on a CPU a 16-bit x is, for the moment of a product, where neither x nor y has
    more than CPU_UPCAST_MAX_NUMEL numbers). Under autocast x, weight and bias are cast as F.linear casts them.

    Under torch.compile and torch.func's transforms (vmap, grad, jvp …) the specification runs instead, which they
    can transform. If A is frozen x is not saved, and a second derivative is refused.

    Args:
        x: the input, shape (…, k).
        weight: W0, shape (d, k).
        bias: b, shape (d,), or None.
        A: shape (r, k).
        B: shape (d, r).
        scale: s, a finite number.
        dropout_p: probability of dropping an entry of the adapter's input, in [0, 1), in steps of 1/DROPOUT_LEVELS.
        training: whether dropout is on.

    Returns:
        y, shape (…, d), in x's dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes do not match.
        ValueError: shapes that do not fit, tensors on several devices, a scale that is not finite, or a dropout_p
            outside [0, 1).

    Example:
        >>> x, W0, b = torch.tensor([1.0, 2.0]), torch.zeros(3, 2), torch.ones(3)
        >>> A, B = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0], [2.0]])
        >>> lora_linear(x, W0, b, A, B, scale=0.5)  # b + 0.5·B·3
        tensor([2.5000, 1.0000, 4.0000])

    Source:
        Hu et al. 2021 (arXiv 2106.09685), equation 3.
    """
    check_lora_linear(x, weight, bias, A, B, scale, dropout_p)
    if is_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    p = dropout_p if training else 0.0
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return lora_linear_reference(x, weight, bias, A, B, scale, p, training)
    if x.ndim == 2:
        return LoRALinearFunction.apply(x, weight, bias, A, B, scale, p)
    X = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # a view where the layout allows; N may be 0
    return LoRALinearFunction.apply(X, weight, bias, A, B, scale, p).view(*x.shape[:-1], len(weight))


def should_materialize(N: int, d: int, k: int, dtype: torch.dtype, dropout_p: float = 0.0) -> bool:
    """Whether W = W0 + s·B·A is formed before the product: N ≥ 40·dk/(d+k), no dropout, 32 or 64 bits.

    Forming W takes d·k·r multiply-adds where adding H·Bᵀ or Z·A takes N·r·d or N·r·k, so it costs less as
    soon as N > dk/(d+k); its buffer of dk numbers is at most 2.5 % of y and ∂L/∂x from 40 times
    that on. In 16 bits W0 + s·B·A would round the update away; dropout leaves no single W.

    Args:
        N: rows of X.
        d: rows of W0.
        k: columns of W0.
        dtype: X's dtype.
        dropout_p: the probability that is in effect.

    Returns:
        True where W is to be formed.

    Example:
        >>> should_materialize(8000, 200, 600, torch.float32), should_materialize(100, 200, 600, torch.float32)
        (True, False)
    """
    return dropout_p == 0 and dtype in (torch.float32, torch.float64) and N * (d + k) >= 40 * d * k


def _keep_mask(X: Tensor, p: float) -> Tensor:
    """A boolean mask of X's shape, True with probability 1 − p, from 16-bit random integers.

    A quarter of the time of bernoulli_ on a CPU, which draws at least 32 bits for each number.
    """
    lanes = torch.empty(-(-X.numel() // 4), dtype=torch.int64, device=X.device).random_(-(2**63), None)
    return (lanes.view(torch.int16)[: X.numel()] >= round(p * DROPOUT_LEVELS) - DROPOUT_LEVELS // 2).view(X.shape)


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as zeros and ones; read as bytes first, which a CPU converts eight times as fast as booleans."""
    return mask.view(torch.uint8).to(dtype)


def _product_dtype(X: Tensor, W0: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of the products with A and B: X's, or A's where X and Y are tiny (see CPU_UPCAST_MAX_NUMEL)."""
    tiny = X.itemsize == 2 and len(X) * max(W0.shape) <= CPU_UPCAST_MAX_NUMEL and X.device.type == "cpu"
    return A.dtype if tiny else X.dtype


def _to(M: Tensor, dtype: torch.dtype) -> Tensor:
    """M.to(dtype), without the call where M has the dtype."""
    return M if M.dtype == dtype else M.to(dtype)


def _add_product(Y: Tensor, H: Tensor, M: Tensor, s: float) -> Tensor:
    """Y += s·H·M in place; H·M is formed beside Y only where its dtype is another."""
    return Y.addmm_(H, M, alpha=s) if Y.dtype == H.dtype else Y.add_(torch.mm(H, M), alpha=s)


class LoRALinearFunction(torch.autograd.Function):
    """The derivation at the head of this module, for a matrix X (N, k).

    Its `apply` takes (X, W0, bias, A, B, s, p), p the dropout's probability, and returns Y (N, d). It checks nothing:
    call `lora_linear`.

    Example:
        >>> X, W0, A, B = torch.ones(1, 2), torch.zeros(3, 2), torch.ones(1, 2), torch.ones(3, 1, requires_grad=True)
        >>> LoRALinearFunction.apply(X, W0, None, A, B, 0.5, 0.0).sum().backward()
        >>> B.grad.T  # s·Gᵀ·H, with H = 2
        tensor([[1., 1., 1.]])
    """

    @staticmethod
    def forward(ctx, X, W0, bias, A, B, s, p):
        if is_autocast(X):
            with torch.autocast(X.device.type, enabled=False):
                return LoRALinearFunction.forward(ctx, X, W0, bias, A, B, s, p)
        need_X, need_W0, _, need_A, need_B, _, _ = ctx.needs_input_grad
        dtype = _product_dtype(X, W0, A)
        a, b, dropped, mask = _to(A, dtype), _to(B, dtype), X, None
        if p:
            p = min(round(p * DROPOUT_LEVELS), DROPOUT_LEVELS - 1) / DROPOUT_LEVELS
            mask = _keep_mask(X, p)
            dropped, s = _as_numbers(mask, X.dtype).mul_(X), s / (1 - p)
        materialized = should_materialize(len(X), len(W0), X.shape[1], X.dtype, p)
        H = torch.mm(_to(dropped, dtype), a.t()) if need_B or not materialized else None
        if materialized:
            Y = F.linear(X, torch.addmm(W0, b, a, alpha=s), bias)
        else:
            Y = _add_product(F.linear(X, W0, bias), H, b.t(), s)
        ctx.s, ctx.materialized, ctx.dtypes = s, materialized, (dtype, A.dtype, B.dtype)
        ctx.save_for_backward(
            X if need_A or need_W0 else None,
            W0 if need_X else None,
            A if need_X or need_B else None,
            B if need_X or need_A else None,
            H if need_B else None,
            mask if need_X or need_A else None,
        )
        return Y

    @staticmethod
    def backward(ctx, G):
        if is_autocast(G):
            with torch.autocast(G.device.type, enabled=False):
                return LoRALinearFunction.backward(ctx, G)
        need_X, need_W0, need_bias, need_A, need_B, _, _ = ctx.needs_input_grad
        X, W0, A, B, H, mask = ctx.saved_tensors
        s, create_graph, (dtype, dtype_A, dtype_B) = ctx.s, torch.is_grad_enabled(), ctx.dtypes
        keep = None if mask is None else _as_numbers(mask, G.dtype)
        dX = dW0 = dA = dB = None
        if need_X or need_A or need_B:
            g = _to(G, dtype)
        if need_X or need_A:
            b = _to(B, dtype)
            Z = torch.mm(g, b)
        if need_X:  # ∂L/∂X = G·W0 + s·Z·A, the second part masked
            a = _to(A, dtype)
            if ctx.materialized:
                dX = torch.mm(G, torch.addmm(W0, b, a, alpha=s))
            elif keep is None:
                dX = _add_product(torch.mm(G, W0), Z, a, s)
            else:
                dX = _to(torch.mm(Z * s, a), G.dtype).mul_(keep).addmm_(G, W0)
        again = need_B and create_graph and (need_X or need_A)  # H is computed again, now with its own derivative
        if need_A or again:
            D = X  # the adapter's input; `keep` is not needed after this, and its memory is used again
            if keep is not None and X is not None:
                D = X * keep if create_graph else keep.mul_(X)
            D = None if D is None else _to(D, dtype)
        if need_A:  # ∂L/∂A = s·Zᵀ·X
            dA = _to(torch.mm(Z.t(), D).mul_(s), dtype_A)
        if need_B:  # ∂L/∂B = s·Gᵀ·H, as (HᵀG)ᵀ: on a CPU half the time
            if again:
                H = _differentiable_H(D, A)
            dB = _to(torch.mm(H.t(), g).mul_(s).t(), dtype_B)
        if need_W0:
            dW0 = torch.mm(G.t(), X)
        return dX, dW0, G.sum(0) if need_bias else None, dA, dB, None, None


def _differentiable_H(D: Tensor | None, A: Tensor) -> Tensor:
    """H = D·Aᵀ as autograd can differentiate it; refused where X was not saved."""
    if D is None:
        raise RuntimeError(
            "lora_linear saves no x while A is frozen, and has no second derivative then; "
            "let A require a gradient, or use lora_linear_reference"
        )
    return torch.mm(D, _to(A, D.dtype).t())
