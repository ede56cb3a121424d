"""Which cases a run measures, in which order, and with how many rounds, so that it ends within its budget.

    estimate(w) = t_j + c·(w − w_j)

seconds for a case of w multiply-adds. j is the case of its benchmark and group, of those measured so far, whose
multiply-adds w_j are nearest, t_j its seconds; c is the slope between the smallest and the largest of them: what a
multiply-add takes once the time that every case takes is subtracted.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from .benchmarks import Benchmark

MIN_ROUNDS = 3
SHARE_OF_A_CASE = 1 / 12  # of the budget: a case that takes longer gets fewer rounds
SLOPE_FLOOR = 4  # times FIRST_RATE: no case is expected to run faster than this
FIRST_RATE = {"cpu": 1e10, "cuda": 5e12}  # multiply-adds per second, until a case of the run says more


class Job(NamedTuple):
    """One case of one benchmark; `position` is its place in the benchmark's table."""

    name: str
    benchmark: Benchmark
    position: int
    case: Any

    @property
    def group(self) -> str:
        """Cases of one group differ in size only."""
        return getattr(self.case, "group", "")

    def __str__(self) -> str:
        if hasattr(self.case, "_asdict"):
            return ", ".join(f"{name} {value}" for name, value in self.case._asdict().items()).replace("torch.", "")
        return "×".join(map(str, self.case)) if isinstance(self.case, tuple) else str(self.case)


class Point(NamedTuple):
    """Multiply-adds and seconds of a case that was measured."""

    work: float
    seconds: float


class LeftOut(NamedTuple):
    """A case that was not measured, and why: "budget", "emulated" or "interrupted"."""

    job: Job
    reason: str


@dataclass
class Outcome:
    """What a run measured.

    Attributes:
        rows: benchmark → rows, in the order of its cases.
        left_out: what was not measured.
        interrupted: whether Ctrl-C ended it.
    """

    rows: dict[str, list[dict]]
    left_out: list[LeftOut] = field(default_factory=list)
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether all cases were measured but those that the hardware emulates."""
        return all(one.reason == "emulated" for one in self.left_out)


def choose(benchmarks: dict[str, Benchmark], size: str) -> list[Job]:
    """The cases of a run of size "quick", "default" or "full"."""
    jobs = []
    for name, benchmark in benchmarks.items():
        end = {"quick": 1, "default": benchmark.default_cases, "full": None}[size]
        jobs += [Job(name, benchmark, position, case) for position, case in enumerate(benchmark.cases[:end])]
    return jobs


def without_emulated(jobs: list[Job], emulated: dict[torch.dtype, str]) -> tuple[list[Job], list[LeftOut]]:
    """(the cases in dtypes that the device multiplies itself, the others)."""
    native, left_out = [], []
    for job in jobs:
        if getattr(job.case, "dtype", None) in emulated:
            left_out.append(LeftOut(job, "emulated"))
        else:
            native.append(job)
    return native, left_out


def most_informative_first(jobs: list[Job], rounds: int) -> list[Job]:
    """The cases in waves. Each wave has one case of every benchmark and group, so that however early a run ends, all
    of them are represented; from wave to wave the sizes spread out. Within a wave a benchmark's cheap cases come
    first."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.name, job.group), []).append(job)

    def by_work(job: Job) -> float:
        return job.benchmark.work(job.case, rounds)

    spread = [_spread(sorted(group, key=by_work)) for group in groups.values()]
    names = list(dict.fromkeys(job.name for job in jobs))
    ordered = []
    for wave in zip_longest(*spread):
        present = [job for job in wave if job is not None]
        ordered += sorted(present, key=lambda job: (names.index(job.name), by_work(job)))
    return ordered


def _spread(ascending: list) -> list:
    """The cheapest first, then the middle one, then those in the middle of what is left, the cheaper part first. The
    dearest come last where this puts them."""
    if not ascending:
        return []
    order, parts = ascending[:1], [ascending[1:]]
    while parts:
        part = parts.pop(0)
        if part:
            middle = len(part) // 2
            order.append(part[middle])
            parts += [part[:middle], part[middle + 1 :]]
    return order


class Estimator:
    """How many seconds a case will take, learnt from those that were measured."""

    def __init__(self, device_type: str, threads: int = 1):
        self.first_rate = FIRST_RATE[device_type]
        if device_type == "cpu":
            self.first_rate *= threads
        self.measured: dict[tuple[str, str], list[Point]] = {}  # by benchmark and group

    def add(self, job: Job, rounds: int, seconds: float) -> None:
        """A case that was measured."""
        point = Point(job.benchmark.work(job.case, rounds), seconds)
        self.measured.setdefault((job.name, job.group), []).append(point)

    def seconds(self, job: Job, rounds: int) -> float:
        """The estimate at the head of this module; from the benchmark's other groups, or from other benchmarks, where
        the group has no case yet."""
        work, setup = job.benchmark.work(job.case, rounds), job.benchmark.setup_seconds
        points = self.measured.get((job.name, job.group))
        if points is None:
            points = [point for (name, _), group in self.measured.items() if name == job.name for point in group]
        if not points:
            slopes = [self._slope(group, setup) for group in self.measured.values()]
            return setup + work * (statistics.median(slopes) if slopes else 1 / self.first_rate)
        near = min(points, key=lambda point: abs(math.log(work / point.work)))
        extrapolated = near.seconds + self._slope(points, setup) * (work - near.work)
        return max(extrapolated, min(point.seconds for point in points) / 2)

    def _slope(self, points: list[Point], setup: float) -> float:
        """Seconds per multiply-add. The clock's noise makes it neither 0 nor more than a case took altogether."""
        small, large = min(points), max(points)
        if small.work < large.work:
            slope = (large.seconds - small.seconds) / (large.work - small.work)
        else:
            slope = (large.seconds - setup) / large.work
        slope = max(slope, 1 / (SLOPE_FLOOR * self.first_rate))
        return min(slope, min(point.seconds / point.work for point in points))

    def affordable_rounds(self, job: Job, rounds: int, allowance: float) -> int:
        """The most rounds, from `rounds` down to MIN_ROUNDS, with which the case takes at most `allowance` seconds."""
        if not job.benchmark.has_rounds:
            return rounds
        while rounds > MIN_ROUNDS and self.seconds(job, rounds) > allowance:
            rounds -= 1
        return rounds


def run(
    jobs: list[Job],
    rounds: int,
    budget: float | None,
    device: torch.device,
    *,
    on_row: Callable[[Job, dict], None] = lambda job, row: None,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
) -> Outcome:
    """Measure the cases. With a budget, the most informative ones come first, expensive ones get fewer rounds, and
    those whose estimate exceeds the time that is left are left out; Ctrl-C ends the run and keeps the rows.

    `on_row` is called with each row as it is measured. `started` is the clock's reading from which the budget counts.
    """
    started = clock() if started is None else started
    estimator = Estimator(device.type, torch.get_num_threads())
    found: list[tuple[Job, dict]] = []
    outcome = Outcome({job.name: [] for job in jobs})
    waiting = list(jobs) if budget is None else most_informative_first(jobs, rounds)
    try:
        while waiting:
            job, own_rounds = waiting[0], rounds
            begin = clock()
            if budget is not None:
                left = budget - (begin - started)
                own_rounds = estimator.affordable_rounds(job, rounds, min(left, budget * SHARE_OF_A_CASE))
                if estimator.seconds(job, own_rounds) > left:
                    outcome.left_out.append(LeftOut(waiting.pop(0), "budget"))
                    continue
            for row in job.benchmark.measure(job.case, own_rounds, device):
                if job.benchmark.has_rounds:
                    row["rounds"] = own_rounds
                found.append((job, row))
                on_row(job, row)
            estimator.add(job, own_rounds, clock() - begin)
            waiting.pop(0)
    except KeyboardInterrupt:
        outcome.interrupted = True
        outcome.left_out += [LeftOut(job, "interrupted") for job in waiting]
    for job, row in sorted(found, key=lambda pair: pair[0].position):
        outcome.rows[job.name].append(row)
    return outcome
