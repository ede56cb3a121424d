"""lora_ref.layer_bench: equal layers under the clock, and the bytes that the table promises."""

import pytest
import torch

from lora_ref.bench import layer as layer_bench
from lora_ref.bench.layer import Layer, contenders, formula, layer_finding, layer_rows, memory_finding, memory_rows

FACTORED = Layer(d=48, k=80, N=40, r=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_contenders_compute_the_same_and_train_what_they_should(dtype):
    case = Layer(48, 80, 600, 3, 0.0, dtype)
    layers = contenders(case)
    assert list(layers) == ["frozen", "lora_ref", "peft", "loralib", "parametrised", "full"]
    x, gradient = layer_bench.tensors(case)
    frozen, results = layers["frozen"](x), {}
    for name in ("lora_ref", "peft", "loralib", "parametrised"):
        y = layers[name](x)
        results[name] = [y, *torch.autograd.grad(y, x, gradient)]
        assert not torch.equal(y, frozen)
        assert sum(p.numel() for p in layers[name].parameters() if p.requires_grad) == 3 * (48 + 80)
    for name, (y, dx) in results.items():
        scale = 3e-6 if dtype == torch.float32 else 3e-2
        for mine, theirs in zip(results["lora_ref"], (y, dx)):
            assert (mine - theirs).norm() <= scale * theirs.norm(), name
    assert sum(p.numel() for p in layers["full"].parameters() if p.requires_grad) == 48 * 80 + 48
    assert not any(p.requires_grad for p in layers["frozen"].parameters())


def test_a_weight_has_no_dropout():
    assert "parametrised" not in contenders(FACTORED._replace(p=0.1))


def test_rows_have_times_ratios_and_the_formula():
    (row,) = layer_rows(FACTORED, rounds=2)
    assert row["model"] == formula(FACTORED) == pytest.approx(2 / 3 + 3 * 128 / (48 * 80))
    assert {len(times) for times in row["seconds"].values()} == {2} and row["peft_ms"] > 0
    assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
    assert "d, k ≥ 256" in layer_finding([row])


def test_the_finding_counts_large_cases_only():
    def row(d, N, ratio):
        return {"d": d, "k": 300, "N": N, "ratio": {"median": ratio}, "bound": ratio - 0.06}

    finding = layer_finding([row(256, 512, 0.8), row(256, 512, 0.95), row(255, 512, 7.0), row(256, 511, 7.0)])
    assert "0.88×" in finding and "median of 2 cases" in finding and "1 of them ≤ 0.90×, and 1 of the others" in finding


def test_memory_is_what_the_derivation_says():
    (row,) = memory_rows(FACTORED, rounds=1)
    N, d, k, r = FACTORED.N, FACTORED.d, FACTORED.k, FACTORED.r
    assert row["frozen_MiB"] * 2**20 == pytest.approx(4 * N * (d + k), rel=0.01)  # y and ∂L/∂x
    assert row["saved_lora_ref"] == 1 and row["saved_parametrised"] == pytest.approx(d * k / (N * r), rel=0.02)
    assert row["lora_ref"] < 1 + 2 * r / (d + k) + 0.1 < row["peft"]
    assert "≤ 1.05× the frozen layer's in 0 of 1 cases" in memory_finding([row])
    (dropped,) = memory_rows(FACTORED._replace(p=0.25), rounds=1)
    assert dropped["saved_lora_ref"] == pytest.approx(1 + k / r / 4)  # N·k bytes of mask
    assert dropped["saved_peft"] > 2 * dropped["saved_lora_ref"]


def test_the_grid_covers_what_was_asked():
    cases = layer_bench.LAYERS
    assert len(cases) == len(set(cases)) and {c.dtype for c in cases} == {torch.float32, torch.bfloat16}
    assert {c.p for c in cases} == {0.0, 0.1} and {c.r for c in cases} >= {1, 64}
    assert {min(c.d for c in cases), max(c.d for c in cases)} == {128, 4096}
    assert {min(c.N for c in cases), max(c.N for c in cases)} == {64, 8192}
    assert any(c.d != c.k for c in cases) and layer_bench.PLAIN < len(cases)
