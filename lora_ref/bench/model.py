"""A fine-tuning step of a whole Llama, adapted here and by peft: rows for the benchmark `model` of lora_ref.bench.

Needs transformers, and peft to compare with; the weights are random, which changes no time.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..config import LoRAConfig
from ..measure import paired, peak_bytes
from ..model import add_lora, count_parameters
from .ratios import median_ratio, ratio

VOCABULARY = 8192
CONTENDERS = 3


class Llama(NamedTuple):
    """A case: the model's shape, the batch, the adapter (α = 2r) on all linear layers, and the dropout p."""

    name: str
    hidden: int
    layers: int
    batch: int
    length: int
    r: int = 8
    p: float = 0.0

    @property
    def intermediate(self) -> int:
        return 8 * self.hidden // 3

    @property
    def group(self) -> str:
        return f"dropout {self.p}"


CASES = [Llama("2 M", 192, 4, 8, 128), Llama("25 M", 512, 6, 4, 128), Llama("100 M", 768, 12, 2, 128)]
LLAMAS = [case._replace(p=p) for case in CASES for p in (0.0, 0.1)]


def build(case: Llama, device: torch.device) -> nn.Module:
    """The model, with the same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        max_position_embeddings=case.length,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device)


def contenders(case: Llama, device: torch.device) -> dict[str, nn.Module]:
    """peft and lora_ref with the same adapter, and full fine-tuning."""
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit(
            "a benchmark of whole models needs transformers, which is not installed; pip install transformers"
        )
    settings = {"r": case.r, "lora_alpha": 2 * case.r, "lora_dropout": case.p, "target_modules": "all-linear"}
    models = {"lora_ref": add_lora(build(case, device), LoRAConfig(**settings)), "full": build(case, device)}
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        models["peft"] = get_peft_model(build(case, device), LoraConfig(**settings))
    return {name: model.train() for name, model in models.items()}


def token_ids(case: Llama, device: torch.device) -> torch.Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(0, VOCABULARY, (case.batch, case.length), device=device)


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW's step on one batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return run


def peak(model: nn.Module, run: Callable[[], None], device: torch.device) -> int:
    """Bytes at the peak of a step that has run before: weights, AdamW's two moments, and what the step allocates."""
    model.zero_grad()  # what an earlier step left
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    moments = sum(2 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return held + moments + peak_bytes(run, device)


def work(case: Llama, rounds: int) -> float:
    """About how many multiply-adds a case takes: in each round, warm-up and measurement of memory included, two or
    three products of each linear layer and the output head, for each contender."""
    per_token = case.layers * (4 * case.hidden**2 + 3 * case.hidden * case.intermediate) + VOCABULARY * case.hidden
    return 2.5 * CONTENDERS * (rounds + 2) * case.batch * case.length * per_token


def measure_model(case: Llama, rounds: int, device: torch.device) -> Iterator[dict]:
    """A fine-tuning step of a whole Llama (forward, backward, AdamW), LoRA on all linear layers, in ms.

        ratio = lora_ref / peft;   ÷full = lora_ref / full fine-tuning, which tends to 2/3 + 2r/d

    float32; trained: the adapter's numbers. The embeddings and the output head are not adapted. MiB: the peak of a
    step with weights and AdamW's state.
    """
    models, ids = contenders(case, device), token_ids(case, device)
    runs = {name: step(model, ids) for name, model in models.items()}
    timing = paired(runs, rounds)
    trained = count_parameters(models["lora_ref"]).trainable
    row = {"model": case.name, "tokens": ids.numel(), "r": case.r, "dropout": case.p, "trained": trained}
    for name, one in timing.items():
        row[f"{name}_ms"] = one.ms
    row["ratio"] = ratio(timing, "lora_ref", "peft")
    row["÷full"] = median_ratio(timing, "lora_ref", "full")
    for name, model in models.items():
        row[f"{name}_MiB"] = peak(model, runs[name], device) / 2**20
    size = count_parameters(models["full"]).total
    yield row | {"size": size, "seconds": {name: one.seconds for name, one in timing.items()}}


def summarize_model(rows: list[dict]) -> str:
    last = rows[-1]
    peft = f"{last['ratio']['median']:.2f}× peft's time and " if last["ratio"] else ""
    return f"At {last['model']} parameters a lora_ref step takes {peft}{last['÷full']:.2f}× full fine-tuning's"
