"""What a step of one LoRA layer holds in memory: rows for the benchmark `layer_memory` of lora_ref.bench.

The cases are those of `layer`, the contenders those of `layer_contenders`.
"""

from collections.abc import Iterator

import torch

from ..functional import CPU_UPCAST_MAX_NUMEL
from ..measure import peak_bytes, saved_bytes
from .layer_contenders import CONTENDERS, Layer, contenders, inputs, step

COMPARED = ("lora_ref", "peft", "loralib", "parametrised", "full")


def work(case: Layer, rounds: int) -> float:
    """About how many multiply-adds a case takes: of each contender two steps and a forward, whatever `rounds` is."""
    return 6 * CONTENDERS * case.size


def measure_memory(case: Layer, rounds: int, device: torch.device) -> Iterator[dict]:
    """The peak of a step's memory beyond x, ∂L/∂y and the weights, as a multiple of the frozen layer's (which holds y
    and ∂L/∂x); and what autograd saves beyond x and the weights, in units of N·r numbers.

        expected for lora_ref: peak 1 + 2r/(d+k), from H and Z; saved 1, with dropout N·k bytes of mask more
    """
    x, gradient = inputs(case, device)
    numbers_of_H = case.N * case.r
    peaks, saved = {}, {}
    for name, layer in contenders(case, device).items():
        run = step(layer, x, gradient)
        run()
        x.grad = None
        layer.zero_grad()
        peaks[name] = peak_bytes(run, device)
        saved_by_layer = saved_bytes(lambda layer=layer: layer(x), [x, *layer.parameters()])
        saved[name] = saved_by_layer / (numbers_of_H * x.itemsize)
    row = case.row() | {"frozen_MiB": peaks["frozen"] / 2**20}
    for name in COMPARED:
        row[name] = peaks[name] / peaks["frozen"] if name in peaks else None
    row["1+2r/(d+k)"] = 1 + 2 * case.r / (case.d + case.k)
    for name in COMPARED[:-1]:
        row[f"saved_{name}"] = saved.get(name)
    yield row | {"size": case.size, "seconds": {}}


def summarize_memory(rows: list[dict]) -> str:
    def is_cast_up(row: dict) -> bool:
        return row["dtype"] != "float32" and row["N"] * max(row["d"], row["k"]) <= CPU_UPCAST_MAX_NUMEL

    compared = [row for row in rows if row["p"] == 0 and not is_cast_up(row)]
    if not compared:
        return "No case without dropout was measured"
    worst = max(row["lora_ref"] / row["1+2r/(d+k)"] for row in compared)
    within = sum(row["lora_ref"] <= 1.05 for row in compared)
    return (
        f"Without dropout lora_ref's peak is ≤ 1.05× the frozen layer's in {within} of {len(compared)} cases, at most "
        f"{worst:.2f}× what the frozen layer, H and Z need (16-bit cases of at most {CPU_UPCAST_MAX_NUMEL:,} numbers, "
        "cast up, left out)"
    )


def draw_memory(axes, rows: list[dict]) -> None:
    """Peak memory of a step over the frozen layer's, lora_ref and peft, in the order of the table."""
    for name, marker in (("lora_ref", "o"), ("peft", "s"), ("parametrised", "^")):
        measured = [(i, row[name]) for i, row in enumerate(rows) if row[name]]
        axes.plot([i for i, _ in measured], [peak for _, peak in measured], marker, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xlabel="case, in the order of the table", ylabel="peak memory of a step / frozen layer's", yscale="log")
