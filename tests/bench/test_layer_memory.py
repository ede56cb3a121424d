"""lora_ref.bench.layer_memory: the bytes that the table promises."""

import pytest
import torch

from lora_ref.bench.layer_contenders import Layer
from lora_ref.bench.layer_memory import measure_memory, summarize_memory

CPU = torch.device("cpu")
FACTORED = Layer(d=48, k=80, N=40, r=3)


def test_memory_is_what_the_derivation_says():
    (row,) = measure_memory(FACTORED, rounds=1, device=CPU)
    N, d, k, r = FACTORED.N, FACTORED.d, FACTORED.k, FACTORED.r
    assert row["frozen_MiB"] * 2**20 == pytest.approx(4 * N * (d + k), rel=0.01)  # y and ∂L/∂x
    assert row["saved_lora_ref"] == 1 and row["saved_parametrised"] == pytest.approx(d * k / (N * r), rel=0.02)
    assert row["lora_ref"] < 1 + 2 * r / (d + k) + 0.1 < row["peft"]
    assert "≤ 1.05× the frozen layer's in 0 of 1 cases" in summarize_memory([row])
    (dropped,) = measure_memory(FACTORED._replace(p=0.25), rounds=1, device=CPU)
    assert dropped["saved_lora_ref"] == pytest.approx(1 + k / r / 4)  # N·k bytes of mask
    assert dropped["saved_peft"] > 2 * dropped["saved_lora_ref"]


def test_the_summary_leaves_out_dropout_and_16_bit_cases_that_are_cast_up():
    (row,) = measure_memory(FACTORED, rounds=1, device=CPU)
    assert "in 0 of 1 cases" in summarize_memory([row, row | {"p": 0.1}, row | {"dtype": "bfloat16"}])
    assert "in 0 of 2 cases" in summarize_memory([row, row | {"dtype": "bfloat16", "N": 1 << 15}])
    assert summarize_memory([row | {"p": 0.1}]) == "No case without dropout was measured"
