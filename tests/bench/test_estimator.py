"""lora_ref.bench.estimator: estimates against a known cost."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ref.bench.benchmarks import Benchmark, Job
from lora_ref.bench.estimator import Estimator


class Case(NamedTuple):
    size: float
    group: str = ""
    dtype: torch.dtype = torch.float32


@given(
    overhead=st.floats(0, 5),
    rate=st.floats(1e-10, 1e-6),
    sizes=st.lists(st.integers(1, 10**9), min_size=2, max_size=5, unique=True),
    size=st.integers(1, 10**9),
)
def test_an_estimate_is_right_for_a_machine_of_constant_speed(overhead, rate, sizes, size):
    benchmark = Benchmark(None, None, lambda case, rounds: rounds * case.size, [])
    estimator = Estimator("cpu")
    for own in sizes:
        estimator.add(Job("a", benchmark, 0, Case(own)), 7, overhead + rate * 7 * own)
    smallest, truth = overhead + rate * 7 * min(sizes), overhead + rate * 7 * size
    estimate = estimator.seconds(Job("a", benchmark, 0, Case(size)), 7)
    assert estimate == pytest.approx(max(truth, smallest / 2), rel=1e-3)


def test_estimates_come_from_the_group_then_the_benchmark_then_the_others():
    benchmark = Benchmark(None, None, lambda case, rounds: case.size, [], setup_seconds=2)
    estimator = Estimator("cpu", threads=2)

    def job(name, group, size=1e10, dtype=torch.float32):
        return Job(name, benchmark, 0, Case(size, group, dtype))

    def estimate(*what):
        return estimator.seconds(job(*what), 7)

    assert estimate("a", "x") == pytest.approx(2 + 0.5)  # two threads at 1e10 multiply-adds a second
    estimator.add(job("b", ""), 7, 6.0)  # of which 2 are expected whatever the size
    assert estimate("a", "x") == pytest.approx(2 + 4)
    estimator.add(job("a", "y"), 7, 4.0)
    assert estimate("a", "x") == pytest.approx(4) and estimate("a", "x", 2e10) == pytest.approx(4 + 2)
    estimator.add(job("a", "x"), 7, 3.0)
    assert estimate("a", "x") == pytest.approx(3) and estimate("a", "x", 2e10) == pytest.approx(3 + 1)
    estimator.add(job("a", "x", 3e10), 7, 13.0)
    assert estimate("a", "x", 5e10) == pytest.approx(13 + 2 * 3)  # the largest took 0.43 seconds in 1e9

    assert estimate("a", "z", 1e10, torch.bfloat16) == pytest.approx(4)
    estimator.add(job("a", "z", 1e10, torch.bfloat16), 7, 92.0)  # emulated
    assert estimate("a", "z", 2e10, torch.bfloat16) == pytest.approx(92 + 90)
    assert estimate("b", "z", 1e10, torch.bfloat16) == pytest.approx(6)
    assert estimate("c", "z", 1e10, torch.bfloat16) == pytest.approx(2 + 90)


def test_noise_makes_no_case_free():
    benchmark = Benchmark(None, None, lambda case, rounds: case.size, [])
    estimator = Estimator("cpu")
    for size, seconds in ((1e9, 2.0), (1e10, 1.0)):  # the larger one took less
        estimator.add(Job("a", benchmark, 0, Case(size)), 7, seconds)
    found = [estimator.seconds(Job("a", benchmark, 0, Case(size)), 7) for size in (1e8, 1e11, 1e12)]
    assert 0.5 <= found[0] and 1 + 0.2 * 9 < found[1] < found[2] <= 1 + 1e12 / 1e10


def test_expensive_cases_get_fewer_rounds_but_three():
    benchmark = Benchmark(None, None, lambda case, rounds: rounds * case.size, [], setup_seconds=0)
    estimator = Estimator("cpu")
    estimator.first_rate = 1.0  # a round of n multiply-adds takes n seconds
    job = Job("a", benchmark, 0, Case(1))
    assert [estimator.affordable_rounds(job, 7, allowance) for allowance in (10, 7, 5.5, 3, 0.1)] == [7, 7, 5, 3, 3]
    assert estimator.affordable_rounds(job, 2, 0.1) == 2, "what was asked for is never raised"
    without = Job("a", benchmark._replace(has_rounds=False), 0, Case(1))
    assert estimator.affordable_rounds(without, 7, 0.1) == 7
