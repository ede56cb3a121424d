"""lora_ref.bench.decompositions: the rows of the SVDs and of the projections."""

import pytest
import torch

from lora_ref.bench import decompositions

CPU = torch.device("cpu")


def test_svd_rows_carry_all_times_and_errors_that_eckart_young_allows():
    (row,) = decompositions.measure_svd((96, 64), rounds=2, device=CPU)
    assert row["shape"] == "96×64" and row["size"] == 96 * 64
    assert {name: len(times) for name, times in row["seconds"].items()} == {"full": 2, "randomised": 2}
    assert row["full_error"] == pytest.approx(1, abs=1e-3)
    assert 1 - 1e-3 < row["randomised_error"] < 1.1


def test_projection_rows_count_what_is_built_and_what_is_not(monkeypatch):
    D, d = 3000, 16
    rows = {row["projection"]: row for row in decompositions.measure_projections((D, d), rounds=1, device=CPU)}
    assert list(rows) == ["dense", "orthonormal", "fastfood"]
    assert rows["dense"]["bytes"] == rows["orthonormal"]["bytes"] == 4 * D * d
    assert rows["fastfood"]["bytes"] < rows["dense"]["bytes"] / 2
    assert all(row["step_ms"] > 0 and row["ratio"]["q1"] > 0 for row in rows.values())

    monkeypatch.setattr(decompositions, "LARGEST_DENSE", 4 * D * d - 1)
    rows = {row["projection"]: row for row in decompositions.measure_projections((D, d), rounds=1, device=CPU)}
    assert rows["dense"]["bytes"] == 4 * D * d
    assert rows["dense"]["step_ms"] is rows["dense"]["setup_s"] is rows["fastfood"]["ratio"] is None
    assert rows["fastfood"]["step_ms"] > 0
    assert decompositions.summarize_projections(list(rows.values())).startswith("Fastfood was not timed")
