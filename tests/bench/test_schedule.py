"""lora_ref.bench.schedule: order, budget, rounds and Ctrl-C, with benchmarks whose time a fake clock counts."""

from typing import NamedTuple

import pytest
import torch

from lora_ref.bench.benchmarks import Benchmark
from lora_ref.bench.schedule import Estimator, Job, Outcome, choose, most_informative_first, run, without_emulated

CPU = torch.device("cpu")


class Case(NamedTuple):
    size: int
    group: str = ""
    dtype: torch.dtype = torch.float32


class Machine:
    """A clock, and benchmarks that move it: a case takes setup + size · rounds seconds."""

    def __init__(self):
        self.now = 0.0
        self.calls = []  # (benchmark, size, rounds)

    def clock(self):
        return self.now

    def benchmark(self, name, cases, setup=0.0, interrupted_at=None, **settings):
        def measure(case, rounds, device):
            self.calls.append((name, case.size, rounds))
            self.now += setup + case.size * (rounds if settings.get("has_rounds", True) else 1)
            yield {"size": case.size, "part": 1}
            if case.size == interrupted_at:
                raise KeyboardInterrupt
            yield {"size": case.size, "part": 2}

        return Benchmark(measure, str, lambda case, rounds: case.size * rounds, cases, setup_seconds=0, **settings)

    def run(self, benchmarks, budget, rounds=7, **settings):
        return run(choose(benchmarks, "full"), rounds, budget, CPU, clock=self.clock, **settings)


def sizes(*values, group=""):
    return [Case(size, group) for size in values]


def test_the_first_wave_has_one_case_of_every_benchmark_and_group_the_cheapest_first():
    machine = Machine()
    one = machine.benchmark("one", sizes(9, 5, 7, group="x") + sizes(3, 4, 2, group="y"))
    two = machine.benchmark("two", sizes(60, 10, 30))
    ordered = most_informative_first(choose({"one": one, "two": two}, "full"), rounds=7)
    found = [(job.name, job.group, job.case.size) for job in ordered]
    assert found[:3] == [("one", "y", 2), ("one", "x", 5), ("two", "", 10)]
    assert {(name, group) for name, group, _ in found[3:6]} == {("one", "x"), ("one", "y"), ("two", "")}
    assert len(found) == len(set(found)) == 9


def test_within_a_group_the_sizes_spread_out():
    jobs = choose({"one": Machine().benchmark("one", sizes(8, 1, 3, 2, 4, 5, 7, 6))}, "full")
    assert [job.case.size for job in most_informative_first(jobs, 7)] == [1, 5, 3, 7, 2, 4, 6, 8]
    assert most_informative_first([], 7) == []


def test_without_a_budget_all_cases_run_in_the_order_of_the_table_with_all_rounds():
    machine = Machine()
    outcome = machine.run({"one": machine.benchmark("one", sizes(1000, 1, 50))}, budget=None)
    assert machine.calls == [("one", 1000, 7), ("one", 1, 7), ("one", 50, 7)]
    assert outcome.complete and not outcome.interrupted and outcome.left_out == []


def test_what_does_not_fit_is_left_out_and_counted_and_the_budget_holds():
    machine = Machine()
    benchmarks = {
        "one": machine.benchmark("one", sizes(1, 2, 3, 4, 500)),
        "two": machine.benchmark("two", sizes(1, 2, 600)),
    }
    outcome = machine.run(benchmarks, budget=200.0)
    assert machine.now <= 200
    left_out = [(left.job.name, left.job.case.size, left.reason) for left in outcome.left_out]
    assert sorted(left_out) == [("one", 500, "budget"), ("two", 600, "budget")]
    assert not outcome.complete and not outcome.interrupted
    assert len(machine.calls) + len(outcome.left_out) == 8


def test_rows_come_back_in_the_order_of_the_table():
    machine = Machine()
    outcome = machine.run({"one": machine.benchmark("one", sizes(3, 1, 2))}, budget=1000.0)
    assert [call[1] for call in machine.calls] != [3, 1, 2]
    assert [(row["size"], row["part"]) for row in outcome.rows["one"]] == [
        (3, 1), (3, 2), (1, 1), (1, 2), (2, 1), (2, 2),
    ]  # fmt: skip


def test_expensive_cases_get_fewer_rounds_but_never_fewer_than_3():
    machine = Machine()
    outcome = machine.run({"one": machine.benchmark("one", sizes(1, 4, 20))}, budget=240.0)
    rounds = {size: rounds for _, size, rounds in machine.calls}
    assert rounds[1] == 7 and rounds[20] == 3 and 3 <= rounds[4] < 7
    assert all(row["rounds"] == rounds[row["size"]] for row in outcome.rows["one"])
    assert outcome.complete


def test_rounds_below_3_stay_as_they_were_asked_for():
    machine = Machine()
    machine.run({"one": machine.benchmark("one", sizes(1, 20))}, budget=100.0, rounds=2)
    assert {rounds for _, _, rounds in machine.calls} == {2}


def test_a_benchmark_without_rounds_has_no_such_column():
    machine = Machine()
    outcome = machine.run({"one": machine.benchmark("one", sizes(1), has_rounds=False)}, budget=100.0)
    assert all("rounds" not in row for row in outcome.rows["one"]) and machine.calls == [("one", 1, 7)]


def test_the_budget_counts_from_the_start_of_the_program():
    machine = Machine()
    machine.now = 95.0
    outcome = machine.run({"one": machine.benchmark("one", sizes(1, 2))}, budget=100.0, started=0.0)
    assert len(machine.calls) == 1 and [left.job.case.size for left in outcome.left_out] == [2]


@pytest.mark.parametrize("budget", [None, 1000.0])
def test_ctrl_c_keeps_the_rows_and_names_what_is_missing(budget):
    machine = Machine()
    shown = []
    benchmarks = {"one": machine.benchmark("one", sizes(1, 2), interrupted_at=2), "two": machine.benchmark("two", [])}
    benchmarks["three"] = machine.benchmark("three", sizes(5, 6, 7))
    outcome = machine.run(benchmarks, budget, on_row=lambda job, row: shown.append((job.name, row["size"])))
    assert outcome.interrupted and not outcome.complete
    assert [(row["size"], row["part"]) for row in outcome.rows["one"]] == [(1, 1), (1, 2), (2, 1)]
    missing = {(left.job.name, left.job.case.size) for left in outcome.left_out}
    assert ("one", 2) in missing and {left.reason for left in outcome.left_out} == {"interrupted"}
    assert {name for name, _ in missing} == {"one", "three"}
    assert len(shown) == sum(map(len, outcome.rows.values()))


def test_rows_are_given_at_once():
    machine = Machine()
    seen = []
    machine.run({"one": machine.benchmark("one", sizes(1, 2))}, None, on_row=lambda job, row: seen.append(machine.now))
    assert seen == [7, 7, 21, 21]


def test_the_estimate_is_never_too_low_for_times_linear_in_the_work():
    estimator = Estimator("cpu")
    jobs = choose({"one": Machine().benchmark("one", sizes(1, 10, 100, 1000))}, "full")
    for job in jobs[:3]:
        estimator.add(job, 7, 5 + 2 * job.case.size * 7)
    assert 5 + 2 * 7000 <= estimator.seconds(jobs[3], 7) < 1.5 * (5 + 2 * 7000)


def test_the_first_estimates_come_from_other_groups_and_then_from_other_benchmarks():
    estimator = Estimator("cpu", threads=2)
    machine = Machine()
    one = machine.benchmark("one", [Case(10, "x"), Case(10, "y")])
    jobs = choose({"one": one, "two": machine.benchmark("two", sizes(10))}, "full")
    assert estimator.seconds(jobs[0], 3) == pytest.approx(30 / 2e10)
    estimator.add(jobs[0], 3, 60.0)
    assert estimator.seconds(jobs[1], 3) == 60 + 30 * 2
    assert estimator.seconds(jobs[2], 3) == 30 * 2


def test_choose_takes_the_cases_of_the_size():
    benchmark = Machine().benchmark("one", sizes(1, 2, 3), default_cases=2)
    counts = {size: len(choose({"one": benchmark}, size)) for size in ("quick", "default", "full")}
    assert counts == {"quick": 1, "default": 2, "full": 3}


def test_emulated_cases_are_set_aside_and_do_not_make_a_run_incomplete():
    cases = [Case(1), Case(2, dtype=torch.bfloat16)]
    jobs = choose({"one": Machine().benchmark("one", cases)}, "full")
    native, left_out = without_emulated(jobs, {torch.bfloat16: "why"})
    assert native == jobs[:1] and [(left.job, left.reason) for left in left_out] == [(jobs[1], "emulated")]
    assert Outcome({}, left_out).complete
    assert without_emulated(jobs, {}) == (jobs, [])


def test_a_job_is_named_by_its_case():
    benchmark = Machine().benchmark("one", [])
    assert str(Job("one", benchmark, 0, Case(2, "g", torch.bfloat16))) == "size 2, group g, dtype bfloat16"
    assert str(Job("one", benchmark, 0, (256, 192))) == "256×192" and str(Job("one", benchmark, 0, "x")) == "x"
