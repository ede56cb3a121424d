"""What the tests of lora_ref.cost share: small models of every family, their training step, and what measures it."""

import gc

import pytest
import torch
from torch import nn
from torch.utils import flop_counter

from lora_ref import LoRAConfig, add_lora
from lora_ref.cost import Cost, cost
from lora_ref.measure import peak_bytes, saved_bytes

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
GPT2 = {"vocab_size": 101, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_inner": 80, "n_positions": 1024}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
BERT = {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA | {"num_key_value_heads": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA),
    "MistralForCausalLM": ("MistralConfig", LLAMA),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "BertForMaskedLM": ("BertConfig", BERT),
    "BertForSequenceClassification": ("BertConfig", BERT),
    "RobertaForMaskedLM": ("RobertaConfig", BERT),
    "RobertaForSequenceClassification": ("RobertaConfig", BERT),
}
QUERY_VALUE = {"GPT2LMHeadModel": ["c_attn"]} | {name: ["query", "value"] for name in MODELS if "ert" in name}


def build(name, attention="sdpa", dtype=torch.float32, device="cpu", **changes) -> nn.Module:
    """A model of this class, in training, with small shapes unless changes say otherwise."""
    config, shapes = MODELS[name]
    config = getattr(transformers, config)(**(shapes | {"attn_implementation": attention} | changes))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return getattr(transformers, name)(config).to(dtype).train()


def query_value(name, **changes) -> LoRAConfig:
    saved = ["classifier"] if name.endswith("Classification") else None
    targets = QUERY_VALUE.get(name, ["q_proj", "v_proj"])
    return LoRAConfig(**({"r": 3, "lora_alpha": 5, "target_modules": targets, "modules_to_save": saved} | changes))


def adapters(name) -> dict[str, LoRAConfig | None]:
    return {"full": None, "q, v": query_value(name), "all": query_value(name, target_modules="all-linear")}


class Step:
    """A model's training step on random tokens, and what torch counts and measures of it."""

    def __init__(self, model, config=None, batch=2, length=17, checkpointing=False):
        self.model = model if config is None else add_lora(model, config)
        self.frozen_sum = config is not None and model.base_model_prefix != "model"
        self.shape = {"batch": batch, "length": length, "checkpointing": checkpointing}
        if checkpointing:
            old = getattr(model, "gradient_checkpointing_enable", None)  # before transformers 5.2x
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
        classes = type(model).__name__.endswith("Classification")
        self.inputs = {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.long) if classes else ids}
        if "ert" not in type(model).__name__:
            self.inputs["use_cache"] = False

    def cost(self, **options) -> Cost:
        return cost(self.model, **self.shape, **options)

    def forward(self):
        return self.model(**self.inputs).loss

    def backward(self):
        self.model(**self.inputs).loss.backward()

    def saved(self) -> int:
        known = [*self.model.parameters(), *self.model.buffers(), *list(self.inputs.values())[:2]]
        kept = saved_bytes(self.forward, known)
        if (
            self.shape["checkpointing"] and self.frozen_sum
        ):  # the tokens' rows require a gradient, which hooks do not see
            kept += 4 * self.inputs["input_ids"].numel() * self.model.config.hidden_size
        return kept

    def peak(self) -> int:
        """Of a second step, above weights and moments."""
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad], fused=True
        )

        def run():
            optimizer.zero_grad()
            self.backward()
            optimizer.step()

        run()
        optimizer.zero_grad()
        gc.disable()  # what an earlier step left behind, freed in this one, would count as negative bytes
        try:
            return peak_bytes(run)
        finally:
            gc.enable()


def counted(function) -> int:
    """FlopCounterMode's FLOPs, with its own formulas for what it leaves out on a CPU: attention, and Y += H·M."""
    aten = torch.ops.aten
    missing = {
        aten.addmm_: lambda Y, H, M, **_: 2 * H[0] * H[1] * M[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda g, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=missing) as counter:
        function()
    return counter.get_total_flops()


def check(step: Step, **options) -> Cost:
    """FLOPs and kept bytes, exactly."""
    own = step.cost(**options)
    assert own.flops_forward == counted(step.forward)
    assert own.flops == counted(step.backward)
    assert own.activations + own.logits == step.saved()
    return own
