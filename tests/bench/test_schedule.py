"""lora_ref.bench.schedule: which cases, in which order, with how many rounds."""

from typing import NamedTuple

import pytest
import torch

from lora_ref.bench.benchmarks import BENCHMARKS, Benchmark, choose
from lora_ref.bench.schedule import most_informative_first, run, without_emulated

CPU = torch.device("cpu")


class Case(NamedTuple):
    size: float
    group: str = ""


class Typed(NamedTuple):
    size: float
    group: str
    dtype: torch.dtype


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


def test_a_benchmark_of_tiny_cases_on_a_busy_machine_does_not_shut_itself_or_others_out():
    """A case that takes 8 seconds whatever its size says nothing of what a multiply-add takes."""
    machine = Machine()
    sizes = (1e6, 1e7, 1e8, 1e9)
    benchmarks = {
        "timed": machine.benchmark([Case(100 * size) for size in sizes], 8, 1e-11),
        "tiny": machine.benchmark([Case(size) for size in sizes], 8, 1e-11, setup_seconds=1),
        "later": machine.benchmark([Case(1e10)], 8, 1e-11),
    }
    outcome = run(jobs_of(**benchmarks), 7, 300, CPU, clock=machine)
    assert outcome.complete


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
    kinds = (("native", torch.float32), ("emulated", torch.bfloat16))
    cases = [Typed(size, *kind) for size in (1e8, 3e8, 1e9, 3e9) for kind in kinds]
    run(jobs_of(a=machine.benchmark(cases, slow=("emulated",))), 7, 60, CPU, clock=machine)
    assert machine.now <= 1.2 * 60
    measured = [case.size for case, _ in machine.measured if case.group == "emulated"]
    assert measured[0] == 1e8 and 3e9 not in measured


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
