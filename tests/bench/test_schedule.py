"""lora_ref.bench.schedule: which cases, in which order, with how many rounds; estimates against a known cost."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ref.bench.benchmarks import BENCHMARKS, Benchmark
from lora_ref.bench.hardware import emulated_dtypes
from lora_ref.bench.schedule import Estimator, Job, choose, most_informative_first, run, without_emulated

CPU = torch.device("cpu")


class Case(NamedTuple):
    size: float
    group: str = ""


class Machine:
    """A clock, and benchmarks that take overhead + rate · work of its seconds."""

    def __init__(self):
        self.now = 0.0
        self.measured = []

    def __call__(self):
        return self.now

    def benchmark(self, cases, overhead=0.5, rate=1e-9, slow=(), **options):
        def work(case, rounds):
            return rounds * case.size

        def measure(case, rounds, device):
            slower = 30 if case.group in slow else 1
            self.now += overhead + slower * rate * work(case, rounds)
            self.measured.append((case, rounds))
            yield {"size": case.size, "seconds": {}}

        return Benchmark(measure, str, work, cases, **options)


def jobs_of(**benchmarks):
    return choose(benchmarks, "full")


def test_a_size_chooses_the_first_the_default_or_all_cases():
    benchmark = Machine().benchmark([Case(n) for n in (1, 2, 3)], default_cases=2)
    found = {size: [job.case.size for job in choose({"a": benchmark}, size)] for size in ("quick", "default", "full")}
    assert found == {"quick": [1], "default": [1, 2], "full": [1, 2, 3]}
    assert {job.case.dtype for job in choose(BENCHMARKS, "quick") if job.name == "layer"} == {torch.float32}


def test_every_benchmark_and_group_comes_before_any_comes_again_and_sizes_spread():
    sizes = (1, 2, 4, 8, 16, 32, 64)
    cases = [Case(n, group) for n in reversed(sizes) for group in "xy"]
    machine = Machine()
    jobs = jobs_of(a=machine.benchmark(cases), b=machine.benchmark(cases[:4]))
    ordered = most_informative_first(jobs, 7)
    assert sorted(map(id, ordered)) == sorted(map(id, jobs))
    assert [(job.name, job.group) for job in ordered[:4]] == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert {job.case.size for job in ordered[:2]} == {1}, "the cheapest come first"
    of_a_group = [job.case.size for job in ordered if (job.name, job.group) == ("a", "x")]
    assert of_a_group == [1, 16, 4, 64, 2, 8, 32]


def test_no_case_of_the_real_benchmarks_is_lost_by_ordering():
    jobs = choose(BENCHMARKS, "full")
    ordered = most_informative_first(jobs, 7)
    places = [(job.name, job.position) for job in ordered]
    assert sorted(places) == sorted((job.name, job.position) for job in jobs) and len(set(places)) == len(jobs)
    assert len({(job.name, job.group) for job in ordered[:14]}) == 14


def test_the_work_of_the_real_cases_is_positive_and_grows_with_their_rounds():
    for job in choose(BENCHMARKS, "full"):
        few, many = (job.benchmark.work(job.case, rounds) for rounds in (3, 7))
        assert 0 < few and (few < many if job.benchmark.has_rounds else few == many), job


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

    def estimate(name, group, size=1e10):
        return estimator.seconds(Job(name, benchmark, 0, Case(size, group)), 7)

    assert estimate("a", "x") == pytest.approx(2 + 0.5)  # two threads at 1e10 multiply-adds a second
    estimator.add(Job("b", benchmark, 0, Case(1e10)), 7, 6.0)  # of which 2 are expected whatever the size
    assert estimate("a", "x") == pytest.approx(2 + 4)
    estimator.add(Job("a", benchmark, 0, Case(1e10, "y")), 7, 32.0)
    assert estimate("a", "x") == pytest.approx(32) and estimate("a", "x", 2e10) == pytest.approx(62)
    estimator.add(Job("a", benchmark, 0, Case(1e10, "x")), 7, 3.0)
    assert estimate("a", "x") == pytest.approx(3) and estimate("a", "x", 2e10) == pytest.approx(4)


def test_noise_makes_no_case_free():
    benchmark = Benchmark(None, None, lambda case, rounds: case.size, [])
    estimator = Estimator("cpu")
    for size, seconds in ((1e9, 2.0), (1e10, 1.0)):  # the larger one took less
        estimator.add(Job("a", benchmark, 0, Case(size)), 7, seconds)
    found = [estimator.seconds(Job("a", benchmark, 0, Case(size)), 7) for size in (1e8, 1e11, 1e12)]
    assert 0.5 <= found[0] and 1 + 0.2 * 9 < found[1] < found[2] <= 1 + 1e12 / 1e10


def test_expensive_cases_get_fewer_rounds_but_three():
    machine = Machine()
    benchmark = machine.benchmark([Case(1)], overhead=0, setup_seconds=0)
    estimator = Estimator("cpu")
    estimator.first_rate = 1.0  # a round of n multiply-adds takes n seconds
    job = Job("a", benchmark, 0, Case(1))
    assert [estimator.affordable_rounds(job, 7, allowance) for allowance in (10, 7, 5.5, 3, 0.1)] == [7, 7, 5, 3, 3]
    assert estimator.affordable_rounds(job, 2, 0.1) == 2, "what was asked for is never raised"
    without = Job("a", benchmark._replace(has_rounds=False), 0, Case(1))
    assert estimator.affordable_rounds(without, 7, 0.1) == 7


@pytest.mark.parametrize("rate", [1e-12, 1e-9, 3e-8])
@pytest.mark.parametrize("budget", [20, 300])
def test_a_run_stays_within_its_budget_on_fast_and_slow_machines(rate, budget):
    machine = Machine()
    cases = [Case(size, group) for size in (1e7, 3e7, 1e8, 3e8, 1e9, 3e9, 1e10) for group in "xy"]
    benchmarks = {"a": machine.benchmark(cases, rate=rate), "b": machine.benchmark(cases[:6], 2, rate)}
    outcome = run(jobs_of(**benchmarks), 7, budget, CPU, clock=machine)
    assert machine.now <= 1.2 * budget and outcome.rows["a"] and outcome.rows["b"]
    left = len(outcome.left_out)
    assert len(machine.measured) + left == 20 and outcome.complete == (left == 0)
    if rate == 1e-12 and budget == 300:
        assert left == 0 and all(rounds == 7 for _, rounds in machine.measured)
    if rate == 3e-8:
        assert left > 0 and {one.reason for one in outcome.left_out} == {"budget"}
    assert {rounds for _, rounds in machine.measured} <= set(range(3, 8))


def test_a_kind_that_is_thirty_times_slower_than_expected_overshoots_by_one_cheap_case():
    machine = Machine()
    cases = [Case(size, group) for size in (1e8, 3e8, 1e9, 3e9) for group in ("native", "emulated")]
    run(jobs_of(a=machine.benchmark(cases, slow=("emulated",))), 7, 60, CPU, clock=machine)
    assert machine.now <= 1.2 * 60
    assert (Case(1e8, "emulated"), 7) in machine.measured and Case(3e9, "emulated") not in dict(machine.measured)


def test_a_case_that_does_not_fit_is_left_out_and_a_cheaper_one_after_it_still_runs():
    machine = Machine()
    cases = [Case(1e9, "x"), Case(1e12, "x"), Case(1e9, "y")]
    outcome = run(jobs_of(a=machine.benchmark(cases)), 7, 60, CPU, clock=machine)
    assert [one.job.case for one in outcome.left_out] == [Case(1e12, "x")] and len(machine.measured) == 2


def test_the_budget_counts_from_the_start_of_the_program():
    machine = Machine()
    machine.now = 59
    outcome = run(jobs_of(a=machine.benchmark([Case(1e9)])), 7, 60, CPU, clock=machine, started=0)
    assert not machine.measured and len(outcome.left_out) == 1


def test_rows_are_passed_on_as_they_are_measured():
    machine, seen = Machine(), []
    benchmark = machine.benchmark([Case(1e9), Case(2e9)])
    run(jobs_of(a=benchmark), 7, None, CPU, on_row=lambda job, row: seen.append((machine.now, row["rounds"])))
    assert seen == [(pytest.approx(7.5), 7), (pytest.approx(22), 7)]


def test_emulated_cases_are_set_aside():
    jobs = choose({"layer": BENCHMARKS["layer"]}, "default")
    native, left_out = without_emulated(jobs, {torch.bfloat16: "why"})
    assert {job.case.dtype for job in native} == {torch.float32} and len(native) == len(left_out) == len(jobs) / 2
    assert {one.reason for one in left_out} == {"emulated"}
    assert str(native[0]) == "d 256, k 384, N 512, r 8, p 0.0, dtype float32"
    assert without_emulated(jobs, {}) == (jobs, [])


# What the hardware says


@pytest.mark.parametrize(
    "found, emulated",
    [
        ({"avx2": True, "avx512_bf16": False, "amx_tile": False}, True),
        ({"avx2": True, "avx512_bf16": True}, False),
        ({"avx512_f": True, "amx_tile": True}, False),
        ({"neon": True, "bf16": False}, True),
        ({"neon": True, "bf16": True}, False),
    ],
)
def test_bfloat16_is_emulated_where_no_instruction_multiplies_it(found, emulated, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert (torch.bfloat16 in emulated_dtypes(CPU)) == emulated


@pytest.mark.parametrize("flags, emulated", [("fpu avx2 fma", True), ("avx2 avx512_bf16", False), (None, False)])
def test_proc_cpuinfo_is_read_where_torch_does_not_tell(flags, emulated, monkeypatch, tmp_path):
    for name in ("get_capabilities", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr("lora_ref.bench.hardware.CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    found = emulated_dtypes(CPU)
    assert (torch.bfloat16 in found) == emulated
    assert all("avx512_bf16, amx_bf16" in reason for reason in found.values())


def test_older_torch_answers_by_single_questions(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert emulated_dtypes(CPU) == {}
