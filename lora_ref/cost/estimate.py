"""What a training step of a transformer takes, from its shapes alone: parameters, FLOPs and bytes.

    print(cost(model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]), batch=1, length=2048, scheme="nf4"))

The model may be on the meta device: nothing is run. Its forward is written down once for each family below, as
transformers and torch execute it; each operation (`Tape`) knows its FLOPs, what it keeps for its backward, and
which of its inputs want a gradient. The rest is adding up.

FLOPs: a multiply-add is two, and only matrix products count. N = batch·length rows, a linear layer d×k:
    linear layer    forward 2Ndk; backward 2Ndk for ∂L/∂X, if X wants it, and 2Ndk for ∂L/∂W, if W is trained
    its adapter     forward 2Nr(d+k), backward 4Nr(d+k), less what nobody asks for; as functional.py does it
    attention       products of 2N·L·q, L the length and q = heads·dim, the causal half not spared: 2 forward; 4
                    backward, of which eager forms those that are asked for; the fused kernel all, and the scores anew

Numbers kept for the backward, per token and layer. h hidden, f inside the MLP, H heads, q and v the queries' and the
keys' heads·dim. A trained or adapted linear layer keeps its input, an adapted one also r numbers, a frozen one
nothing. What several operations keep counts once.
    Llama   norm: x h, x/rms h*, 1/rms 1 · input of q, k, v: h · q and k after RoPE, v: q + 2v · attention's output q,
            log-sum-exp H · norm: h, h*, 1 · input of gate and up: h · gate f, its SiLU f, up f · input of down f
                                                                            = 6h + 2q + 2v + 4f + H + 2
    GPT-2   norm: x h, mean and 1/σ 2 · input of c_attn: h · q, k, v: 3h · output h, H · norm: h, 2 · input of c_fc: h ·
            GELU, written out: 4f · input of c_proj: f                      = 8h + 5f + H + 4
    BERT    input of q, k, v: h · q, k, v: 3h · output h, H · sum h, 2 · normed: h · GELU's input f · input of the
            last layer f · sum h, 2                                         = 8h + 2f + H + 4
*for the norm's weight, if that is trained. LoRA on q and v alone leaves 3h + 2q + 2v + 3f + H + 2 + 2r of Llama's:
not what r suggests. Eager attention keeps H·L probabilities for the log-sum-exp, and k and v once for each query
head. In 16 bits a number takes two bytes, but four where torch computes in 32: RMSNorm's x, 1/rms, mean, log-sum-exp,
and the loss, which keeps N·V log-probabilities, and needs two more tensors of that size when its backward begins.

The peak is the largest sum, at any moment of the backward, of weights, optimizer's state, what is still kept,
gradients so far and scratch tensors. With checkpointing a block keeps its input alone, and runs its forward again,
up to the last tensor that its backward needs.

Sources: Hu et al. 2021 (arXiv 2106.09685); Korthikanti et al. 2022 (arXiv 2205.05198) for the way of counting; Dettmers
et al. 2023 (arXiv 2305.14314) for NF4; transformers' modeling files; torch's derivatives.yaml.
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .._checks import check_integer
from ..config import LoRAConfig
from ..model import add_lora, count_parameters, uncompiled
from .tape import Memory, Tape, Value

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a code; an 8-bit scale for 64 numbers; a 32-bit one for 256 such scales


class Scheme(NamedTuple):
    """Bytes per number: of a frozen weight; of a trained one, its gradient, AdamW's two moments, its master copy; of an
    activation. `linear`: of a frozen linear layer's weight, the output head's excepted, where that is quantised."""

    frozen: int
    weight: int
    gradient: int
    moments: int
    master: int
    activation: int
    linear: float | None = None


SCHEMES = {
    "fp32": Scheme(frozen=4, weight=4, gradient=4, moments=8, master=0, activation=4),
    "bf16": Scheme(frozen=2, weight=2, gradient=2, moments=4, master=0, activation=2),
    "mixed": Scheme(frozen=2, weight=2, gradient=2, moments=8, master=4, activation=2),
    "nf4": Scheme(frozen=2, weight=2, gradient=2, moments=8, master=4, activation=2, linear=NF4_BITS / 8),
}


@dataclass(frozen=True)
class Cost:
    """What a training step takes: numbers, FLOPs (a checkpointed forward's second run is in the backward), bytes.

    `optimizer` is AdamW's moments; `activations` and `logits` are what the model and its loss keep for the
    backward. The peak is less than the sum of all, as gradients come while activations go.
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
        return self.flops_forward + self.flops_backward

    @property
    def states(self) -> int:
        """Bytes that no batch changes: weights, master copies, moments and gradients."""
        return self.weights + self.master + self.optimizer + self.gradients

    def __str__(self) -> str:
        share = f"{100 * self.trainable / max(1, self.parameters):.3g} %"
        unit, size = ("GB", 1e9) if self.peak >= 1e9 else ("MB", 1e6)
        rows = [("parameters", f"{self.parameters:,}", ""), ("trained", f"{self.trainable:,}", share)]
        rows += [(f"FLOPs {way}", f"{getattr(self, f'flops_{way}'):.4g}", "") for way in ("forward", "backward")]
        names = ("weights", "master", "optimizer", "gradients", "activations", "logits", "peak")
        rows += [(name, f"{getattr(self, name) / size:,.3f}", unit) for name in names]
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

    With `config`, of the model as add_lora would adapt it; the model itself is left alone. Without, of the
    model as it is, adapted or not: trained is what requires a gradient. On any device, meta included, and in
    any dtype: `scheme`, a name in SCHEMES or a Scheme, says the bytes. (On a 16-bit base add_lora's A and B have
    32 bits: 4 + 4 + 8 bytes a number, the same 16 as "mixed".)

    Assumed: no padding; use_cache=False; `checkpointing` of every block, the non-reentrant kind, as transformers
    enables it; the fused AdamW (foreach, CUDA's default, takes half the moments' bytes again in passing; the CPU's
    loop two of the largest trained tensor); dropout masks of one byte a number, as on a GPU. Not counted: buffers,
    masks of attention, a matrix library's own scratch memory.

    Knows the classes in FAMILIES with attention "sdpa" or "eager". Errors, nothing changed: TypeError for another
    model or a foreign layer in it (peft's, bitsandbytes'); ValueError for another scheme, attention or activation,
    "nf4" with no frozen linear layer, nothing trained, a length beyond the positions or the sliding window; add_lora's
    for the config.
    Source: the head of this module.
    """
    batch, length = check_integer(batch, "batch", 1), check_integer(length, "length", 1)
    widths = _check_scheme(scheme)
    if not isinstance(checkpointing, bool):
        raise TypeError(f"checkpointing must be True or False, got {checkpointing!r}")
    model = _check_model(model, length)
    name = f"{type(model).__name__}, {batch} × {length} tokens, {scheme if isinstance(scheme, str) else 'own scheme'}"
    if config is not None:
        model, name = _adapted(model, config), f"{name}, r = {config.r}"
    count = count_parameters(model)
    if not count.trainable:
        raise ValueError("no parameter requires a gradient: nothing is trained; pass a config, or requires_grad_(True)")
    tape = Tape(model, batch, length, widths.activation, widths.linear is not None, checkpointing)
    FAMILIES[type(model).__name__](tape, model)
    memory, logits = Memory(widths.gradient).keep(tape.nodes), sum(value.bytes for value in tape.nodes[-1].saved)
    activations, weights = memory.live - logits, count.trainable * widths.weight + _frozen_bytes(tape, widths)
    master, optimizer = count.trainable * widths.master, count.trainable * widths.moments
    gradients = count.trainable * widths.gradient
    return Cost(
        name=name + ", checkpointing" * checkpointing,
        parameters=count.total,
        trainable=count.trainable,
        flops_forward=sum(node.forward for node in tape.nodes),
        flops_backward=sum(node.backward for node in tape.nodes),
        weights=weights,
        master=master,
        optimizer=optimizer,
        gradients=gradients,
        activations=activations,
        logits=logits,
        peak=weights + master + optimizer + max(gradients, memory.backward(tape.nodes).peak),
    )


def _check_scheme(scheme: str | Scheme) -> Scheme:
    if isinstance(scheme, str) and scheme in SCHEMES:
        return SCHEMES[scheme]
    if not isinstance(scheme, Scheme):
        raise ValueError(f"scheme = {scheme!r} is unknown; choose {', '.join(map(repr, SCHEMES))}, or pass a Scheme(…)")
    if scheme.activation not in (2, 4):
        raise ValueError(f"activation = {scheme.activation!r} bytes is not counted; choose 2 or 4")
    return scheme


def _check_model(model: nn.Module, length: int) -> nn.Module:
    """Refuse what the families below do not describe."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = uncompiled(model)
    name = type(model).__name__
    if name not in FAMILIES or not hasattr(model, "config"):
        raise TypeError(f"there is no formula for a {name}; cost knows transformers' {', '.join(FAMILIES)}")
    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation = {attention!r} is not counted; choose 'sdpa' or 'eager'")
    for name in ("is_decoder", "add_cross_attention", "reorder_and_upcast_attn", "chunk_size_feed_forward"):
        if getattr(config, name, False):
            raise ValueError(f"{name} = {getattr(config, name)!r} is not counted; make the model without")
    if FAMILIES[type(model).__name__] is llama:  # from its window's length on it makes a mask, which changes the kernel
        limit, what = (getattr(config, "sliding_window", None) or math.inf) - 1, "sliding window"
    else:
        taken = config.pad_token_id + 1 if config.model_type == "roberta" else 0
        limit, what = config.max_position_embeddings - taken, "positions"
    if length > limit:
        raise ValueError(f"length = {length} is beyond the model's {what}; choose length <= {limit}")
    return model


def _frozen_bytes(tape: Tape, scheme: Scheme) -> int:
    frozen = sum(parameter.numel() for parameter in tape.model.parameters() if not parameter.requires_grad)
    linear = sum(weight.numel() for weight in tape.quantised.values())
    return (frozen - linear) * scheme.frozen + math.ceil(linear * (scheme.linear or 0))


def _adapted(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """A copy on the meta device, with the adapter."""
    copies = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return add_lora(copy.deepcopy(model, copies), config)


# ---------------------------------------------------------------- families


def llama(tape: Tape, model: nn.Module) -> None:
    """Llama, Mistral, Qwen2: RMSNorm, RoPE, grouped queries, SwiGLU."""
    config, body = model.config, model.model
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    angles = [tape.value(tape.length * dim), tape.value(tape.length * dim)]

    def block(layer: nn.Module, x: Value) -> Value:
        own, mlp = layer.self_attn, layer.mlp
        n = tape.rms_norm(x, layer.input_layernorm)
        q, k = (tape.rope(tape.linear(n, part), angles) for part in (own.q_proj, own.k_proj))
        y = tape.attention(q, k, tape.linear(n, own.v_proj), dim, config.attention_dropout, wide=True)
        x = tape.add(x, tape.linear(y, own.o_proj))
        n = tape.rms_norm(x, layer.post_attention_layernorm)
        gate = tape.activation(tape.linear(n, mlp.gate_proj), config.hidden_act)
        return tape.add(x, tape.linear(tape.multiply(gate, tape.linear(n, mlp.up_proj)), mlp.down_proj))

    x = tape.embedding(body.embed_tokens)
    for layer in body.layers:
        x = tape.block(block, layer, x)
    tape.cross_entropy(tape.linear(tape.rms_norm(x, body.norm), model.lm_head), shifted=tape.tokens)


def gpt2(tape: Tape, model: nn.Module) -> None:
    """GPT-2: LayerNorm before each part, one layer for q, k and v."""
    config, body = model.config, model.transformer

    def block(layer: nn.Module, x: Value) -> Value:
        qkv, dim = tape.linear(tape.layer_norm(x, layer.ln_1), layer.attn.c_attn), layer.attn.head_dim
        y = tape.linear(tape.attention(qkv, qkv, qkv, dim, config.attn_pdrop), layer.attn.c_proj)
        x = tape.add(x, tape.dropout(y, config.resid_pdrop))
        y = tape.activation(tape.linear(tape.layer_norm(x, layer.ln_2), layer.mlp.c_fc), config.activation_function)
        return tape.add(x, tape.dropout(tape.linear(y, layer.mlp.c_proj), config.resid_pdrop))

    x = tape.dropout(tape.embedding(body.wte, body.wpe, made=tape.length), config.embd_pdrop)
    for layer in body.h:
        x = tape.block(block, layer, x)
    tape.cross_entropy(tape.linear(tape.layer_norm(x, body.ln_f), model.lm_head), shifted=tape.tokens)


def bert(tape: Tape, model: nn.Module) -> None:
    """BERT and RoBERTa: LayerNorm after each sum."""
    config, body = model.config, getattr(model, model.base_model_prefix)
    p, tables = config.hidden_dropout_prob, body.embeddings

    def after(x: Value, y: Value, part: nn.Module) -> Value:
        return tape.layer_norm(tape.add(x, tape.dropout(tape.linear(y, part.dense), p)), part.LayerNorm)

    def block(layer: nn.Module, x: Value) -> Value:
        own = layer.attention.self
        q, k, v = (tape.linear(x, part) for part in (own.query, own.key, own.value))
        y = tape.attention(q, k, v, own.attention_head_size, config.attention_probs_dropout_prob)
        x = after(x, y, layer.attention.output)
        return after(x, tape.activation(tape.linear(x, layer.intermediate.dense), config.hidden_act), layer.output)

    made = 2 * tape.tokens if config.model_type == "roberta" else tape.length
    x = tape.embedding(tables.word_embeddings, tables.token_type_embeddings, tables.position_embeddings, made=made)
    x = tape.dropout(tape.layer_norm(x, tables.LayerNorm), p)
    for layer in body.encoder.layer:
        x = tape.block(block, layer, x)
    tape.cross_entropy((masked_head if "MaskedLM" in type(model).__name__ else class_head)(tape, model, x, p))


def masked_head(tape: Tape, model: nn.Module, x: Value, p: float) -> Value:
    """Logits of the vocabulary for each token."""
    head = model.lm_head if hasattr(model, "lm_head") else model.cls.predictions
    first = getattr(head, "transform", head)
    norm, name = (head.layer_norm, "gelu") if first is head else (first.LayerNorm, model.config.hidden_act)
    return tape.linear(tape.layer_norm(tape.activation(tape.linear(x, first.dense), name), norm), head.decoder)


def class_head(tape: Tape, model: nn.Module, x: Value, p: float) -> Value:
    """Logits of the classes, from each sequence's first token, which is a view of x."""
    head, pooler = model.classifier, getattr(model, model.base_model_prefix).pooler
    dense, last = (pooler.dense, head) if pooler is not None else (head.dense, head.out_proj)
    x = x if pooler is not None else tape.dropout(x, p, share=tape.length)
    x = tape.activation(tape.linear(x, dense, rows=tape.batch), "tanh")
    return tape.linear(tape.dropout(x, p), last, rows=tape.batch)


FAMILIES = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "GPT2LMHeadModel": gpt2,
    "BertForMaskedLM": bert,
    "BertForSequenceClassification": bert,
    "RobertaForMaskedLM": bert,
    "RobertaForSequenceClassification": bert,
}
