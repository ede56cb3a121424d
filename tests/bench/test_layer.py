"""lora_ref.bench.layer: the rows of the benchmark, their summary, and the cases."""

import pytest
import torch

from lora_ref.bench.layer import DEFAULT_LAYERS, LAYERS, expected_ratio, measure_layer, summarize_layer
from lora_ref.bench.layer_contenders import Layer

CPU = torch.device("cpu")
FACTORED = Layer(d=48, k=80, N=40, r=3)


def test_rows_have_times_ratios_and_the_formula():
    (row,) = measure_layer(FACTORED, rounds=2, device=CPU)
    assert row["model"] == expected_ratio(FACTORED) == pytest.approx(2 / 3 + 3 * 128 / (48 * 80))
    assert {len(times) for times in row["seconds"].values()} == {2} and row["peft_ms"] > 0
    assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
    assert "d, k ≥ 256" in summarize_layer([row])


def test_the_summary_counts_large_cases_only():
    def row(d, N, ratio):
        return {"d": d, "k": 300, "N": N, "ratio": {"median": ratio}, "bound": ratio - 0.06}

    summary = summarize_layer([row(256, 512, 0.8), row(256, 512, 0.95), row(255, 512, 7.0), row(256, 511, 7.0)])
    assert "0.88×" in summary and "median of 2 cases" in summary and "1 of them ≤ 0.90×, and 1 of the others" in summary


def test_the_grid_covers_what_was_asked():
    cases = LAYERS
    assert len(cases) == len(set(cases)) and {c.dtype for c in cases} == {torch.float32, torch.bfloat16}
    assert {c.p for c in cases} == {0.0, 0.1} and {c.r for c in cases} >= {1, 64}
    assert {min(c.d for c in cases), max(c.d for c in cases)} == {128, 4096}
    assert {min(c.N for c in cases), max(c.N for c in cases)} == {64, 8192}
    assert (
        any(c.d != c.k for c in cases)
        and len(DEFAULT_LAYERS) < len(cases)
        and LAYERS[: len(DEFAULT_LAYERS)] == DEFAULT_LAYERS
    )
