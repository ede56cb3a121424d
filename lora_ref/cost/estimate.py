"""What one training step takes (`cost`), as a table (`Cost`)."""

import copy
import math
from dataclasses import dataclass

from torch import nn

from .._checks import check_bool, check_integer
from ..config import LoRAConfig
from ..model import add_lora, count_parameters, uncompiled
from .families import FAMILIES, longest
from .memory import Memory
from .operations import Operations
from .schemes import Scheme, check_scheme


@dataclass(frozen=True)
class Cost:
    """What a training step takes: numbers, FLOPs and bytes. `str` of it is a table.

    The peak is less than the sum of all bytes, as gradients come while activations go.

    Args:
        name: the model, the shape and the scheme, in words.
        parameters: how many parameters the model has, the adapter's included.
        trainable: how many of them require a gradient.
        flops_forward: FLOPs of the forward; a multiply-add is two, only matrix products count.
        flops_backward: FLOPs of the backward; with checkpointing the second run of the forward is in here.
        weights: bytes of all parameters.
        master: bytes of the master copies of the trained ones.
        optimizer: bytes of AdamW's two moments.
        gradients: bytes of all gradients of parameters.
        activations: bytes that the model keeps for the backward.
        logits: bytes that the loss keeps for the backward.
        peak: the most bytes alive at any moment of the step.

    Example:
        >>> states = {"weights": 200, "master": 40, "optimizer": 80, "gradients": 20}
        >>> one = Cost("model", 100, 10, 600, 800, **states, activations=50, logits=10, peak=390)
        >>> one.flops, one.states
        (1400, 340)
        >>> print(str(one).splitlines()[2])
        trained                           10 10 %
    """

    name: str
    parameters: int
    trainable: int
    flops_forward: int
    flops_backward: int
    weights: int
    master: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    peak: int

    @property
    def flops(self) -> int:
        """FLOPs of the whole step."""
        return self.flops_forward + self.flops_backward

    @property
    def states(self) -> int:
        """Bytes that no batch changes: weights, master copies, moments and gradients."""
        return self.weights + self.master + self.optimizer + self.gradients

    def __str__(self) -> str:
        share = f"{100 * self.trainable / max(1, self.parameters):.3g} %"
        unit, size = ("GB", 1e9) if self.peak >= 1e9 else ("MB", 1e6)
        rows = [
            ("parameters", f"{self.parameters:,}", ""),
            ("trained", f"{self.trainable:,}", share),
            ("FLOPs forward", f"{self.flops_forward:.4g}", ""),
            ("FLOPs backward", f"{self.flops_backward:.4g}", ""),
        ]
        for name in ("weights", "master", "optimizer", "gradients", "activations", "logits", "peak"):
            rows.append((name, f"{getattr(self, name) / size:,.3f}", unit))
        return "\n".join([self.name] + [f"{name:<16}{value:>20} {unit}".rstrip() for name, value, unit in rows])


def cost(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    batch: int,
    length: int,
    scheme: str | Scheme = "fp32",
    checkpointing: bool = False,
) -> Cost:
    """What one training step on batch × length tokens takes: FLOPs, and bytes under `scheme`.

        optimizer.zero_grad(); model(input_ids=ids, labels=labels).loss.backward(); optimizer.step()

    Nothing is run, and the model is not changed. What is counted, operation by operation, is at the head of
    lora_ref.cost.

    Assumed: no padding; use_cache=False; the fused AdamW (foreach, CUDA's default, takes half the moments' bytes
    again in passing; the CPU's loop two of the largest trained tensor); dropout masks of one byte a number, as on a
    GPU. Not counted: buffers, masks of attention, a matrix library's own scratch memory.

    Args:
        model: of a class in FAMILIES, with attention "sdpa" or "eager"; on any device, meta included, and in any
            dtype.
        config: counts the model as add_lora would adapt it. None: the model as it is, adapted or not; trained is what
            requires a gradient.
        batch: how many sequences, at least 1.
        length: how many tokens each has, at least 1.
        scheme: the bytes of a number: a name in SCHEMES ("fp32", "bf16", "mixed", "nf4"), or a Scheme. (On a 16-bit
            base add_lora's A and B have 32 bits: 4 + 4 + 8 bytes a number, the same 16 as "mixed".)
        checkpointing: of every block, the non-reentrant kind, as transformers enables it.

    Returns:
        The count: numbers, FLOPs, bytes.

    Raises:
        TypeError: a model of another class, a foreign layer in it (peft's, bitsandbytes'), or checkpointing that is
            no bool.
        ValueError: another scheme, attention or activation, "nf4" with no frozen linear layer, nothing trained, a
            length beyond the positions or the sliding window; add_lora's for the config.

    Example:
        >>> import torch, transformers
        >>> sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "vocab_size": 101}
        >>> with torch.device("meta"):
        ...     model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=2))
        >>> lora = cost(model, LoRAConfig(r=3, lora_alpha=5, target_modules=["q_proj"]), batch=2, length=16)
        >>> lora.trainable == 2 * 3 * (48 + 48)
        True
        >>> lora.peak < cost(model, batch=2, length=16).peak
        True

    Source:
        The head of lora_ref.cost.
    """
    batch, length = check_integer(batch, "batch", 1), check_integer(length, "length", 1)
    widths = check_scheme(scheme)
    check_bool(checkpointing, "checkpointing")
    model = _check_model(model, length)
    name = f"{type(model).__name__}, {batch} × {length} tokens, {scheme if isinstance(scheme, str) else 'own scheme'}"
    if config is not None:
        model = _adapted(model, config)
        name += f", r = {config.r}"
    if checkpointing:
        name += ", checkpointing"
    if not count_parameters(model).trainable:
        raise ValueError("no parameter requires a gradient: nothing is trained; pass a config, or requires_grad_(True)")
    tape = Operations(model, batch, length, widths.activation, widths.linear is not None, checkpointing)
    FAMILIES[type(model).__name__](tape, model)
    return _add_up(tape, widths, name)


def _add_up(tape: Operations, scheme: Scheme, name: str) -> Cost:
    """The sums over a tape that a family has filled; its last operation is the loss."""
    count = count_parameters(tape.model)
    weights = count.trainable * scheme.weight + _frozen_bytes(tape, scheme)
    master = count.trainable * scheme.master
    optimizer = count.trainable * scheme.moments
    gradients = count.trainable * scheme.gradient
    logits = sum(value.bytes for value in tape.nodes[-1].saved)

    memory = Memory(scheme.gradient)
    memory.keep(tape.nodes)
    activations = memory.live - logits
    memory.backward(tape.nodes)
    return Cost(
        name=name,
        parameters=count.total,
        trainable=count.trainable,
        flops_forward=sum(node.forward_flops for node in tape.nodes),
        flops_backward=sum(node.backward_flops for node in tape.nodes),
        weights=weights,
        master=master,
        optimizer=optimizer,
        gradients=gradients,
        activations=activations,
        logits=logits,
        peak=weights + master + optimizer + max(gradients, memory.peak),
    )


def _frozen_bytes(tape: Operations, scheme: Scheme) -> int:
    """Bytes of the frozen parameters, quantised or not."""
    frozen = sum(parameter.numel() for parameter in tape.model.parameters() if not parameter.requires_grad)
    quantized = sum(weight.numel() for weight in tape.quantized.values())
    quantized_bytes = 0 if scheme.linear is None else math.ceil(quantized * scheme.linear)
    return (frozen - quantized) * scheme.frozen + quantized_bytes


def _adapted(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """A copy on the meta device, with the adapter."""
    copies = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return add_lora(copy.deepcopy(model, copies), config)


def _check_model(model: nn.Module, length: int) -> nn.Module:
    """Refuse what the families do not describe; return the model without torch.compile's wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = uncompiled(model)
    name = type(model).__name__
    if name not in FAMILIES or not hasattr(model, "config"):
        raise TypeError(f"there is no formula for a {name}; cost counts transformers' {', '.join(FAMILIES)}")
    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation = {attention!r} is not counted; choose 'sdpa' or 'eager'")
    for option in ("is_decoder", "add_cross_attention", "reorder_and_upcast_attn", "chunk_size_feed_forward"):
        if getattr(config, option, False):
            raise ValueError(f"{option} = {getattr(config, option)!r} is not counted; make the model without")
    limit, what = longest(model)
    if length > limit:
        raise ValueError(f"length = {length} is beyond the model's {what}; choose length <= {limit}")
    return model
