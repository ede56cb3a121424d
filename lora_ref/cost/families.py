"""The forward of each family of models, written once, as transformers and torch execute it; FAMILIES by class name."""

import math

from torch import nn

from .operations import Operations
from .tape import Value


def llama(tape: Operations, model: nn.Module) -> None:
    """Llama, Mistral, Qwen2: RMSNorm, RoPE, grouped queries, SwiGLU."""
    config, body = model.config, model.model
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    angles = [tape.value(tape.length * head_dim), tape.value(tape.length * head_dim)]

    def block(layer: nn.Module, x: Value) -> Value:
        attention, mlp = layer.self_attn, layer.mlp
        normed = tape.rms_norm(x, layer.input_layernorm)
        q = tape.rope(tape.linear(normed, attention.q_proj), angles)
        k = tape.rope(tape.linear(normed, attention.k_proj), angles)
        v = tape.linear(normed, attention.v_proj)
        y = tape.attention(q, k, v, head_dim, config.attention_dropout, softmax_in_32_bits=True)
        x = tape.add(x, tape.linear(y, attention.o_proj))
        normed = tape.rms_norm(x, layer.post_attention_layernorm)
        gate = tape.activation(tape.linear(normed, mlp.gate_proj), config.hidden_act)
        y = tape.multiply(gate, tape.linear(normed, mlp.up_proj))
        return tape.add(x, tape.linear(y, mlp.down_proj))

    x = tape.embedding(body.embed_tokens)
    for layer in body.layers:
        x = tape.block(block, layer, x)
    logits = tape.linear(tape.rms_norm(x, body.norm), model.lm_head)
    tape.cross_entropy(logits, shifted=tape.tokens)


def gpt2(tape: Operations, model: nn.Module) -> None:
    """GPT-2: LayerNorm before each part, one layer for q, k and v."""
    config, body = model.config, model.transformer

    def block(layer: nn.Module, x: Value) -> Value:
        qkv = tape.linear(tape.layer_norm(x, layer.ln_1), layer.attn.c_attn)
        y = tape.attention(qkv, qkv, qkv, layer.attn.head_dim, config.attn_pdrop)
        y = tape.linear(y, layer.attn.c_proj)
        x = tape.add(x, tape.dropout(y, config.resid_pdrop))
        y = tape.linear(tape.layer_norm(x, layer.ln_2), layer.mlp.c_fc)
        y = tape.linear(tape.activation(y, config.activation_function), layer.mlp.c_proj)
        return tape.add(x, tape.dropout(y, config.resid_pdrop))

    x = tape.dropout(tape.embedding(body.wte, body.wpe, made=tape.length), config.embd_pdrop)
    for layer in body.h:
        x = tape.block(block, layer, x)
    logits = tape.linear(tape.layer_norm(x, body.ln_f), model.lm_head)
    tape.cross_entropy(logits, shifted=tape.tokens)


def bert(tape: Operations, model: nn.Module) -> None:
    """BERT and RoBERTa: LayerNorm after each sum."""
    config, body = model.config, getattr(model, model.base_model_prefix)
    tables = body.embeddings

    def add_and_norm(x: Value, y: Value, part: nn.Module) -> Value:
        y = tape.dropout(tape.linear(y, part.dense), config.hidden_dropout_prob)
        return tape.layer_norm(tape.add(x, y), part.LayerNorm)

    def block(layer: nn.Module, x: Value) -> Value:
        attention = layer.attention.self
        q = tape.linear(x, attention.query)
        k = tape.linear(x, attention.key)
        v = tape.linear(x, attention.value)
        y = tape.attention(q, k, v, attention.attention_head_size, config.attention_probs_dropout_prob)
        x = add_and_norm(x, y, layer.attention.output)
        y = tape.activation(tape.linear(x, layer.intermediate.dense), config.hidden_act)
        return add_and_norm(x, y, layer.output)

    made = 2 * tape.tokens if config.model_type == "roberta" else tape.length
    x = tape.embedding(tables.word_embeddings, tables.token_type_embeddings, tables.position_embeddings, made=made)
    x = tape.dropout(tape.layer_norm(x, tables.LayerNorm), config.hidden_dropout_prob)
    for layer in body.encoder.layer:
        x = tape.block(block, layer, x)
    if type(model).__name__.endswith("MaskedLM"):
        logits = _masked_head(tape, model, x)
    else:
        logits = _class_head(tape, model, x)
    tape.cross_entropy(logits)


def _masked_head(tape: Operations, model: nn.Module, x: Value) -> Value:
    """Logits of the vocabulary for each token."""
    if hasattr(model, "lm_head"):  # RoBERTa
        head = model.lm_head
        dense, activation, norm = head.dense, "gelu", head.layer_norm
    else:
        head = model.cls.predictions
        dense, activation, norm = head.transform.dense, model.config.hidden_act, head.transform.LayerNorm
    x = tape.activation(tape.linear(x, dense), activation)
    return tape.linear(tape.layer_norm(x, norm), head.decoder)


def _class_head(tape: Operations, model: nn.Module, x: Value) -> Value:
    """Logits of the classes, from each sequence's first token, which is a view of x."""
    head, pooler = model.classifier, getattr(model, model.base_model_prefix).pooler
    p = model.config.hidden_dropout_prob
    if pooler is not None:  # BERT
        dense, last = pooler.dense, head
    else:
        dense, last = head.dense, head.out_proj
        x = tape.dropout(x, p, one_row_in=tape.length)
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


def longest(model: nn.Module) -> tuple[float, str]:
    """The longest sequence that the formulas describe, and what limits it, in words."""
    config = model.config
    if FAMILIES[type(model).__name__] is llama:  # from its window's length on it makes a mask, which changes the kernel
        return (getattr(config, "sliding_window", None) or math.inf) - 1, "sliding window"
    reserved = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return config.max_position_embeddings - reserved, "positions"
