"""One LoRA linear layer as an equation, and its gradient as it is derived.

    Y = X·W0ᵀ + b + s·H·Bᵀ,     H = X·Aᵀ                  X N×k, W0 d×k, A r×k, B d×r, H N×r
    Z = G·B,                    G = ∂L/∂Y                 G N×d, Z N×r
    ∂L/∂X = G·W0 + s·Z·A,       ∂L/∂A = s·Zᵀ·X,           ∂L/∂B = s·Gᵀ·H

`lora_linear_reference` is the first line in three lines of torch: the specification. `lora_linear`
computes the same with the backward written out, so that

- X is kept for the backward by reference, not as a copy, and beside it only H (N·r numbers);
- s multiplies r-sized matrices alone, or rides on a product that is computed anyway;
- Z is computed once for two gradients; a gradient that nobody asked for is not computed, ∂L/∂W0 least of all.

Multiply-adds beyond the frozen layer's (forward and backward): 3·N·r·(d+k) as above. With
W = W0 + s·B·A formed first, 2·N·r·(d+k) + 2·d·k·r, and a buffer of d·k numbers: `should_materialize` says
when that is right. Source: the chain rule; Hu et al. 2021 (arXiv 2106.09685), equation 3.
"""

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_UPCAST_MAX_NUMEL = (
    1 << 15
)  # a 16-bit X, with Y at most so many numbers each, is cast up, and not kept, for the products with A
# and B: on a CPU each 16-bit product costs 12 µs before it begins, more than the cast
DROPOUT_LEVELS = 1 << 16  # a dropout mask is drawn from 16-bit integers: p is rounded to a multiple of 1/DROPOUT_LEVELS


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
    """y = x·W0ᵀ + b + s·D(x)·Aᵀ·Bᵀ, D = dropout: what `lora_linear` must equal. Shapes and errors as there."""
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
    """y = W0·x + b + s·B·(A·D(x)), with the backward derived above.

    x (…, k), weight W0 (d, k), bias (d) or None, A (r, k), B (d, r), scale s a number → y (…, d), in x's dtype.

    D is inverted dropout with probability dropout_p while `training`, else the identity; it acts on the
    adapter's x alone. x, weight and bias share a dtype; A and B keep their own, and so do their gradients:
    they are cast to x's for the products, x not to theirs (on a CPU a 16-bit x is, for the moment of a
    product, where neither x nor y has more than CPU_UPCAST_MAX_NUMEL numbers). Under autocast x, weight and bias are cast
    as F.linear casts them. dropout_p counts in steps of 1/DROPOUT_LEVELS. Any layout of x and of the gradient, and
    an empty batch, will do.

    Differentiable twice. Under torch.compile and torch.func's transforms (vmap, grad, jvp …) the
    specification runs in its stead, which they transform as they know how. If A is frozen x is not kept,
    and a second derivative is refused.

    Errors, nothing changed: TypeError for what is not a floating-point tensor or dtypes that do not
    match; ValueError for shapes that do not fit, tensors on several devices, a scale that is not finite
    or a dropout_p outside [0, 1).
    Source: Hu et al. 2021 (arXiv 2106.09685), equation 3.
    """
    _check(x, weight, bias, A, B, scale, dropout_p)
    if _autocasts(x):
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
    """
    return dropout_p == 0 and dtype in (torch.float32, torch.float64) and N * (d + k) >= 40 * d * k


def _check(x, weight, bias, A, B, scale, dropout_p) -> None:
    """Refuse what the equation does not fit; what fits passes the first test, in 3 microseconds."""
    try:
        (d, k), (r, _) = weight.shape, A.shape
        fits = x.shape[-1] == k == A.shape[1] and B.shape == (d, r) and (bias is None or bias.shape == (d,))
        like = x.device == weight.device == A.device == B.device and (x.dtype == weight.dtype or _autocasts(x, weight))
        if fits and like and x.is_floating_point() and A.is_floating_point() and B.is_floating_point():
            if bias is None or (bias.device == x.device and (bias.dtype == x.dtype or _autocasts(x, bias))):
                if not isinstance(scale, Tensor) and -math.inf < scale < math.inf and 0 <= dropout_p < 1:
                    return
    except (AttributeError, IndexError, TypeError, ValueError):
        pass
    raise _refusal({"x": x, "weight": weight, "bias": bias, "A": A, "B": B}, scale, dropout_p)


def _autocasts(*tensors: Tensor) -> bool:
    """Whether autocast is on and gives these tensors its dtype; it leaves float64 alone, and knows no meta device."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return False
    return all(tensor.dtype != torch.float64 for tensor in tensors)


def _refusal(tensors: dict, scale: float, dropout_p: float) -> Exception:
    """The error for what _check refused, with the value and the mend."""
    if tensors["bias"] is None:
        del tensors["bias"]
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            return TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; use torch.as_tensor({name})")
        if not tensor.is_floating_point():
            return TypeError(f"{name} must hold floating-point numbers, got {tensor.dtype}; use {name}.float()")
    x, weight, A, B = (tensors[name] for name in ("x", "weight", "A", "B"))
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            return ValueError(f"{name} is on {tensor.device}, x on {x.device}; move all of them to one device")
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    if weight.ndim != 2 or A.ndim != 2 or B.ndim != 2 or x.ndim == 0:
        return ValueError(f"weight (d, k), A (r, k) and B (d, r) must be matrices and x (…, k) no scalar; got {shapes}")
    (d, k), r = weight.shape, len(A)
    bias = tensors.get("bias")
    if x.shape[-1] != k or A.shape[1] != k or B.shape != (d, r) or (bias is not None and bias.shape != (d,)):
        return ValueError(
            f"shapes do not fit: {shapes}; with weight (d, k) = ({d}, {k}) and A of {r} rows, x must be (…, {k}), "
            f"A ({r}, {k}), B ({d}, {r}), bias ({d},); is a factor transposed?"
        )
    for name in ("weight", "bias"):
        if name in tensors and tensors[name].dtype != x.dtype:
            return TypeError(f"x is {x.dtype}, {name} is {tensors[name].dtype}; cast x, or run under torch.autocast")
    for name, value in (("scale", scale), ("dropout_p", dropout_p)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}; pass a float")
    if not math.isfinite(scale):
        return ValueError(f"scale = {scale!r} is not finite; take it from LoRAConfig(r=…, lora_alpha=…).scale")
    return ValueError(f"dropout_p = {dropout_p!r} is out of range; choose 0 <= dropout_p < 1")


def _keep_mask(X: Tensor, p: float) -> Tensor:
    """A boolean mask of X's shape, True with probability 1 − p, from 16-bit random integers.

    A quarter of the time of bernoulli_ on a CPU, which draws at least 32 bits for each number.
    """
    lanes = torch.empty(-(-X.numel() // 4), dtype=torch.int64, device=X.device).random_(-(2**63), None)
    return (lanes.view(torch.int16)[: X.numel()] >= round(p * DROPOUT_LEVELS) - DROPOUT_LEVELS // 2).view(X.shape)


def _number(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as zeros and ones; read as bytes first, which a CPU converts eight times as fast as booleans."""
    return mask.view(torch.uint8).to(dtype)


def _product_dtype(X: Tensor, W0: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of the products with A and B: X's, or A's where X and Y are tiny (see CPU_UPCAST_MAX_NUMEL)."""
    tiny = X.itemsize == 2 and len(X) * max(W0.shape) <= CPU_UPCAST_MAX_NUMEL and X.device.type == "cpu"
    return A.dtype if tiny else X.dtype


def _to(M: Tensor, dtype: torch.dtype) -> Tensor:
    return M if M.dtype == dtype else M.to(dtype)


def _add_product(Y: Tensor, H: Tensor, M: Tensor, s: float) -> Tensor:
    """Y += s·H·M in place; H·M is formed beside Y only where its dtype is another."""
    return Y.addmm_(H, M, alpha=s) if Y.dtype == H.dtype else Y.add_(torch.mm(H, M), alpha=s)


class LoRALinearFunction(torch.autograd.Function):
    """The derivation at the head of this module, for a matrix X (N, k)."""

    @staticmethod
    def forward(ctx, X, W0, bias, A, B, s, p):
        if _autocasts(X):
            with torch.autocast(X.device.type, enabled=False):
                return LoRALinearFunction.forward(ctx, X, W0, bias, A, B, s, p)
        need_X, need_W0, _, need_A, need_B, _, _ = ctx.needs_input_grad
        dtype = _product_dtype(X, W0, A)
        a, b, dropped, mask = _to(A, dtype), _to(B, dtype), X, None
        if p:
            p = min(round(p * DROPOUT_LEVELS), DROPOUT_LEVELS - 1) / DROPOUT_LEVELS
            mask = _keep_mask(X, p)
            dropped, s = _number(mask, X.dtype).mul_(X), s / (1 - p)
        materialised = should_materialize(len(X), *W0.shape, X.dtype, p)
        H = torch.mm(_to(dropped, dtype), a.t()) if need_B or not materialised else None
        if materialised:
            Y = F.linear(X, torch.addmm(W0, b, a, alpha=s), bias)
        else:
            Y = _add_product(F.linear(X, W0, bias), H, b.t(), s)
        ctx.s, ctx.materialised, ctx.dtypes = s, materialised, (dtype, A.dtype, B.dtype)
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
        if _autocasts(G):
            with torch.autocast(G.device.type, enabled=False):
                return LoRALinearFunction.backward(ctx, G)
        need_X, need_W0, need_bias, need_A, need_B, _, _ = ctx.needs_input_grad
        X, W0, A, B, H, mask = ctx.saved_tensors
        s, create_graph, (dtype, dtype_A, dtype_B) = ctx.s, torch.is_grad_enabled(), ctx.dtypes
        keep = None if mask is None else _number(mask, G.dtype)
        dX = dW0 = dA = dB = None
        if need_X or need_A or need_B:
            g = _to(G, dtype)
        if need_X or need_A:
            b = _to(B, dtype)
            Z = torch.mm(g, b)
        if need_X:  # ∂L/∂X = G·W0 + s·Z·A, the second part masked
            a = _to(A, dtype)
            if ctx.materialised:
                dX = torch.mm(G, torch.addmm(W0, b, a, alpha=s))
            elif keep is None:
                dX = _add_product(torch.mm(G, W0), Z, a, s)
            else:
                dX = _to(torch.mm(Z * s, a), G.dtype).mul_(keep).addmm_(G, W0)
        again = need_B and create_graph and (need_X or need_A)  # H once more, this time with its own derivative
        if need_A or again:
            D = X  # as the adapter saw it; keep has done its work above and its memory is used again
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
    if D is None:
        raise RuntimeError(
            "lora_linear keeps no x while A is frozen, and has no second derivative then; "
            "let A require a gradient, or use lora_linear_reference"
        )
    return torch.mm(D, _to(A, D.dtype).t())
