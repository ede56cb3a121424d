"""A fine-tuning step of a whole Llama, adapted here and by peft: rows for the benchmark `model` of lora_ref.bench.

Needs transformers, and peft to compare with; the weights are random, which changes no time.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..config import LoRAConfig
from ..measure import paired, peak_bytes, quartiles
from ..model import add_lora, count_parameters
from . import layer as layer_bench


class Llama(NamedTuple):
    """A case: the model's shape, the batch, the adapter (α = 2r) on all linear layers, and the dropout."""

    name: str
    hidden: int
    layers: int
    batch: int
    length: int
    r: int = 8
    p: float = 0.0


CASES = [Llama("2 M", 192, 4, 8, 128), Llama("25 M", 512, 6, 4, 128), Llama("100 M", 768, 12, 2, 128)]


def build(case: Llama) -> nn.Module:
    """The model, with the same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=case.hidden,
        intermediate_size=8 * case.hidden // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        max_position_embeddings=case.length,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(layer_bench.DEVICE)


def contenders(case: Llama) -> dict[str, nn.Module]:
    """peft and lora_ref with the same adapter, and full fine-tuning."""
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit(
            "a benchmark of whole models needs transformers, which is not installed; pip install transformers"
        )
    settings = {"r": case.r, "lora_alpha": 2 * case.r, "lora_dropout": case.p, "target_modules": "all-linear"}
    models = {"lora_ref": add_lora(build(case), LoRAConfig(**settings)), "full": build(case)}
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        models["peft"] = get_peft_model(build(case), LoraConfig(**settings))
    return {name: model.train() for name, model in models.items()}


def batch(case: Llama) -> torch.Tensor:
    """Token ids (batch, length)."""
    return torch.randint(0, 8192, (case.batch, case.length), device=layer_bench.DEVICE)


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW's step on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return run


def peak(model: nn.Module, run: Callable[[], None]) -> int:
    """Bytes at the peak of a step that has run before: weights, AdamW's two moments, and what the step allocates."""
    model.zero_grad()  # what an earlier step left
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    moments = sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)
    return held + moments + peak_bytes(run, layer_bench.DEVICE)


def rows(case: Llama, rounds: int) -> Iterator[dict]:
    """A fine-tuning step of a whole Llama (forward, backward, AdamW), LoRA on all linear layers, in ms.

        ratio = lora_ref / peft;   ÷full = lora_ref / full fine-tuning, which tends to 2/3 + 2r/d

    float32; trained: the adapter's numbers. The embeddings and the output head are not adapted. MiB: the peak of a
    step with weights and AdamW's state.
    """
    models, ids = contenders(case), batch(case)
    runs = {name: step(model, ids) for name, model in models.items()}
    timing = paired(runs, rounds)
    trained = count_parameters(models["lora_ref"]).trainable

    def over(name: str, other: str) -> dict | None:
        if name not in timing or other not in timing:
            return None
        return quartiles([a / b for a, b in zip(timing[name].seconds, timing[other].seconds)])

    row = {"model": case.name, "tokens": ids.numel(), "r": case.r, "dropout": case.p, "trained": trained}
    row |= {f"{name}_ms": one.ms for name, one in timing.items()} | {"ratio": over("lora_ref", "peft")}
    row |= {"÷full": over("lora_ref", "full")["median"]}
    row |= {f"{name}_MiB": peak(model, runs[name]) / 2**20 for name, model in models.items()}
    size = count_parameters(models["full"]).total
    yield row | {"size": size, "seconds": {name: one.seconds for name, one in timing.items()}}


def finding(rows: list[dict]) -> str:
    last = rows[-1]
    peft = f"{last['ratio']['median']:.2f}× peft's time and " if last["ratio"] else ""
    return f"At {last['model']} parameters a lora_ref step takes {peft}{last['÷full']:.2f}× full fine-tuning's"
